"""Figure S3: misses of the target, the floor that held-out crystals set, and what counts as sure."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest

from meidnet_core import candidates, cgcnn, design, gap_check, oqmd, plots, results, sun


class Tool(candidates.Designer):
    """A Designer of two models that are not there: what they read is set by the test."""

    def __init__(self):
        self.labels, self.tolerance, self.agreement, self.models = list(oqmd.LABELS), 0.1, 0.1, [None, None]


@pytest.fixture
def held_out(monkeypatch):
    """Six held-out cells with labels 0, 1, 1, 1, 1 and none; the models read 0, 1.2, 1.5, 1.0 and 3 eV and agree but about the third."""
    cells = candidates.ideal(np.array([[19, 22, 8, 8, 8]] * 6, np.int16), lambda z: np.full(len(z), 4.0))
    column = list(oqmd.LABELS).index("pbe_gap")
    cells.labels[:, column] = [0, 1, 1, 1, 1, np.nan]
    mean, spread = np.zeros((2, 5, len(oqmd.LABELS)))
    mean[:, column], spread[:, column] = [0, 1.2, 1.5, 1.0, 3], [0, 0.05, 0.3, 0.1, 0]
    monkeypatch.setattr(oqmd, "part", lambda split: cells)
    monkeypatch.setattr(design, "predict", lambda models, chosen: (mean[:len(chosen)], spread[:len(chosen)]))


def test_the_floor_is_the_error_on_cells_read_near_a_target(held_out):
    m = gap_check.floor(Tool(), "test")
    assert m["test_floor_cells"] == 3 and m["test_floor_mae"] == pytest.approx((0.2 + 0.5 + 0) / 3)
    assert m["test_floor_median"] == pytest.approx(0.2)
    assert m["test_floor_sure_cells"] == 2 and m["test_floor_sure_mae"] == pytest.approx(0.1)


def test_a_split_without_such_cells_has_no_error(held_out, monkeypatch):
    monkeypatch.setattr(sun, "GAPS", (9.0,))
    assert gap_check.floor(Tool(), "val") == {"val_floor_cells": 0, "val_floor_sure_cells": 0}


def table():
    t = pd.DataFrame({"formula": ["a", "b", "c", "d"], "target": [0.8, 0.8, 1.0, 1.5], "pbe_gap": [0.8, 0.85, 1.05, 0.3],
                      "pbe_gap_sd": [0.01, 0.5, 0.09, 0.0], "cgcnn": [1.0, 2.0, 1.02, 1.5], "stability": 0.0})
    near = (t.pbe_gap - t.target).abs() <= 0.1
    return t.assign(near=near, sure=near & (t.pbe_gap_sd <= 0.1))


def test_sure_proposals_answer_the_claims():
    m, claims = gap_check.measured(table()), gap_check.claims_of(table())
    assert (m["on_target"], m["sure"]) == (3, 2)
    assert m["cgcnn_mae_on_target"] == pytest.approx((0.2 + 1.2 + 0.02) / 3) and m["cgcnn_mae_sure"] == pytest.approx(0.11)
    assert m["cgcnn_within_0.1_sure"] == 50 and m["cgcnn_within_0.5_on_target"] == pytest.approx(200 / 3)
    assert claims["s3.gap_mae"]["value"] == pytest.approx(0.11) and claims["s3.t10.gap_mae"]["value"] == pytest.approx(0.02)
    assert "s3.t12.gap_mae" not in claims and "s3.t15.gap_mae" not in claims                   # nothing sure: no answer
    few, many = [0.1, 0.3], [0.19, 0.2, 0.21, 0.2]                               # two say nothing of a mean, four that agree do
    told = gap_check.claims_of(table(), {None: many} | dict.fromkeys(sun.GAPS, few))
    assert told["s3.gap_mae"] == claims["s3.gap_mae"] | {"split": "generated, on target, models agree, 4 distinct in all seeds"}
    assert told["s3.t10.gap_mae"]["undecided"] and not claims["s3.t10.gap_mae"]["undecided"]


def test_nothing_on_target_is_no_number():
    nothing = table().assign(near=False, sure=False)
    assert "cgcnn_mae_sure" not in gap_check.measured(nothing) and gap_check.claims_of(nothing) == {}


def test_the_designer_is_sure_when_models_agree():
    column, tool = list(oqmd.LABELS).index("pbe_gap"), Tool()
    mean, spread = np.zeros((2, 3, len(oqmd.LABELS)))
    mean[:, column], spread[:, column] = [1.0, 1.0, 1.5], [0.05, 0.2, 0.0]
    proposal = candidates.Proposal(None, mean, spread, None)
    assert tool.sure(proposal, {"pbe_gap": 1.0}).tolist() == [True, False, False]
    assert tool.sure(proposal, {"stability": 0.0}).all()                                       # no gap was asked for


def test_a_run_is_written_with_its_rule(held_out, monkeypatch, tmp_path):
    """Four targets, one proposal each, asked for without regard to one another; the ideal cell goes to the judge."""
    monkeypatch.setattr(results, "write_run", partial(results.write_run, root=tmp_path))
    column, asked, judged = list(oqmd.LABELS).index("pbe_gap"), [], []

    def propose(method, target, count, seed):
        asked.append((method, target["pbe_gap"], count, seed))
        mean = np.zeros((1, len(oqmd.LABELS)))
        mean[:, column] = target["pbe_gap"] if len(asked) < 4 else 0.2
        cells = candidates.ideal(np.array([[19, 22, 8, 8, 8]], np.int16), lambda z: np.array([4.1]))
        return candidates.Proposal(cells, mean, np.full_like(mean, 0.05 if len(asked) != 2 else 0.5), np.ones(1))

    monkeypatch.setattr(cgcnn, "independent", lambda: None)
    monkeypatch.setattr(cgcnn, "predict", lambda model, cells: judged.append(cells) or np.array([[1.0], [2.0], [1.3], [1.5]]))
    tool = Tool()
    tool.propose = propose
    gap_check.write(tool, 3, gap_check.floor(tool, "val"))
    assert asked == [("strict", g, sun.PER_TARGET, 3) for g in sun.GAPS] and (judged[0].lattice[:, 0] == 4.1).all()
    run = json.loads((tmp_path / "design-gap" / "seed3.json").read_text())
    assert run["config"]["agreement"] == 0.1 and run["curve"]["sure"] == [True, False, True, False]
    assert run["metrics"]["on_target"] == 3 and run["metrics"]["val_floor_cells"] == 3
    assert run["metrics"]["cgcnn_mae_sure"] == pytest.approx(0.15) and run["claims"]["s3.t08.gap_mae"]["value"] == pytest.approx(0.2)


def test_hits_are_counted_of_all_of_those_on_target_and_of_the_sure():
    rates = gap_check.hit_rates(table()).set_index(["proposals", "target (eV)"])
    everything = rates.loc[("all", "all")]
    assert everything["how many"] == 4 and everything["CGCNN: MAE (eV)"] == pytest.approx((0.2 + 1.2 + 0.02 + 0) / 4)
    assert (everything["within 0.1 eV (%)"], everything["within 0.5 eV (%)"]) == (50, 75)
    t = table()                                                                                # what any of the targets would have given
    assert everything["targets exchanged (eV)"] == pytest.approx(np.mean([abs(c - g) for c in t.cgcnn for g in t.target]))
    assert rates.loc[("on target", "all"), "how many"] == 3 and rates.loc[("sure", "0.8"), "how many"] == 1
    assert np.isnan(rates.loc[("sure", "1.5"), "CGCNN: MAE (eV)"])                            # none: no number


def test_stored_proposals_have_a_gap_each():
    """The hit rates of all 140 follow from what the runs store, and the metrics of the run from the same rows."""
    run = json.loads((results.RESULTS / "design-gap" / "seed0.json").read_text())
    rates = gap_check.hit_rates(pd.DataFrame(run["curve"])).set_index(["proposals", "target (eV)"])
    assert rates.loc[("all", "all"), "how many"] == len(sun.GAPS) * sun.PER_TARGET
    assert rates.loc[("all", "all"), "CGCNN: MAE (eV)"] == pytest.approx(run["metrics"]["cgcnn_mae"], abs=1e-4)
    assert rates.loc[("sure", "all"), "within 0.2 eV (%)"] == pytest.approx(run["metrics"]["cgcnn_within_0.2_sure"])


def test_the_parity_figure_shows_all_proposals():
    full = plots.gap_parity(table(), 0.11)
    assert full.axes[0].get_legend_handles_labels()[1][:3] == ["off target when read again (1)", "on target, models differ (1)",
                                                              "on target, models agree (2)"]
    near = plots.gap_parity(table()[table().near], 0.11)
    assert len(near.axes[0].get_legend_handles_labels()[1]) == 3                              # two kinds and the line
