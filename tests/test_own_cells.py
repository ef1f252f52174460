"""Cells relaxed by this project: what counts as one, what stands in for OQMD, bad files."""

import json

import numpy as np
import pytest

from meidnet_core import checkpoint, crystal, data, experiments, hull, oqmd, own_cells, results
from meidnet_core.candidates import CubicConstant
from meidnet_core.sources import DataError, MissingTable


def row(symbols, a=4.0, **words):
    plain = {"key": "".join(symbols) + str(a), "potential": "sevennet-0", "start": "ideal", "symbols": symbols, "status": "ok", "steps": 3,
             "energy_per_atom": -5.0, "lattice": [a, a, a, 90.0, 90.0, 90.0], "volume": a**3 / 5, "frac": crystal.PEROVSKITE.tolist()}
    return plain | words


def test_only_relaxed_cubic_cells_count(tmp_path, monkeypatch):
    monkeypatch.setattr(hull, "corrections", lambda potential: np.zeros(len(hull.TERMS)))
    monkeypatch.setattr(hull, "e_above_hull", lambda r, c: {"e_above_hull": 0.05})
    sto, moved = ["Sr", "Ti", "O", "O", "O"], (crystal.PEROVSKITE + 0.01 * np.eye(5, 3)).tolist()
    rows = [row(sto), row(["Ba", "Ti", "O", "O", "O"], start="rattled"), row(["K", "Ta", "O", "O", "O"], frac=moved),
            row(["Ca", "Ti", "O", "O", "O"], status="exploded: volume x 9"), row(["Na", "Cl"]), row(["Cs", "Pb", "I", "I", "I"], 6.3),
            row(["Rb", "Pb", "I", "I", "I"], lattice=[6.2, 6.2, 6.3, 90, 90, 90])]
    (tmp_path / "cells.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{half a line")
    found = own_cells.table("sevennet-0", tmp_path / "cells.jsonl")
    assert found[["A", "B", "X"]].to_numpy().tolist() == [["Cs", "Pb", "I"], ["Sr", "Ti", "O"]]
    assert found.a.tolist() == [6.3, 4.0] and list(found) == oqmd.OWN_COLUMNS
    found.to_csv(tmp_path / "t.csv", index=False)
    cells = oqmd.own_cells(tmp_path / "t.csv")
    assert [cells.formula(i) for i in range(2)] == ["CsPbI3", "SrTiO3"] and np.isnan(cells.labels).all()
    again = own_cells.merged(found[:1].assign(a=6.4), tmp_path / "t.csv")                    # a cache that holds one cell only
    assert again.a.tolist() == [6.4, 4.0] and again.B.tolist() == ["Pb", "Ti"]


HEAD = ",".join(oqmd.OWN_COLUMNS) + "\n"


@pytest.mark.parametrize("text, reason", [("A,B,X,a\nSr,Ti,O,3.9\n", "column energy_per_atom"), (HEAD, "no rows"),
                                          (HEAD + "Sr,Xx,O,3.9,-5,0,p\n", "unknown element"),
                                          (HEAD + "Sr,Ti,O,3.9,-5,stable,p\n", "stable")])
def test_bad_files_are_named(tmp_path, text, reason):
    path = tmp_path / "t.csv"
    with pytest.raises(DataError, match="t.csv: not there"):
        oqmd.own_cells(path)
    path.write_text(text)
    with pytest.raises(DataError, match=f"t.csv: .*{reason}"):
        oqmd.own_cells(path)


def test_committed_cells_stand_in_for_oqmd(monkeypatch, tmp_path):
    monkeypatch.setenv("MEIDNET_DATA_MIRROR", str(tmp_path))
    oqmd.cubic.cache_clear()
    with pytest.raises(MissingTable):
        oqmd.cubic()
    with pytest.warns(UserWarning, match="data/abx3_relaxed.csv stand in"):
        cells = oqmd.cubic(stand_in=True)
    oqmd.cubic.cache_clear()
    assert len(cells) > 200 and np.isnan(cells.labels).all()
    error = CubicConstant(cells)(cells.numbers) - cells.lattice[:, 0]
    assert np.abs(error).mean() < 0.1


def test_own_cells_join_with_a_label_of_their_own_and_nothing_leaks(real_table, real):
    real_table("oqmd_abx3", "oqmd_abx3"), real("perov_5", "train")                           # or skip
    with pytest.raises(ValueError, match="twice"):
        oqmd.load("test", own=True, stand_in=True)
    train, test = (oqmd.load(s, own=True) for s in ("train", "test"))
    plain, own = oqmd.load("test"), oqmd.own_cells(labelled=True)
    known = np.isfinite(test.labels[:, -1])
    assert len(test) == len(plain) + known.sum() and test.label_names == (*plain.label_names, "own_stability")
    assert np.isnan(test.labels[known][:, :-1]).all()                                        # no label of another theory
    assert np.isfinite(own.labels[:, -1]).all() and 0.05 < known.sum() / len(own) < 0.25
    held = {data.composition_key(z) for z in oqmd.part("test", everything=own).numbers}
    assert held and not held & {data.composition_key(z) for z in train.numbers}


def test_the_cells_of_table_s1_are_not_those_of_training():
    train = oqmd.part("train", everything=oqmd.own_cells(labelled=True))
    cells = own_cells.paper_cells(train)
    assert 0 < len(cells) < 19 and not {data.composition_key(z) for z in cells.numbers} & {data.composition_key(z) for z in train.numbers}
    m = results.read_run("table-s1", "sevennet-0")["metrics"]
    assert cells.labels[0, -1] == pytest.approx(m[f"{cells.ids[0]}_ideal"] / 1000)


def test_a_missing_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CHECKPOINTS", tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="extended_own.*run `python -m meidnet_core.experiments extended-own --seed 1"):
        experiments.required(own_cells.EXTENDED_OWN.with_(seed=1))


def test_what_is_ranked_was_never_learnt_from(real_table):
    real_table("oqmd_abx3", "oqmd_abx3")
    cells, above = own_cells.window()
    learnt = oqmd.load("train", own=True)
    assert len(cells) > 500 and not {data.composition_key(z) for z in cells.numbers} & {data.composition_key(z) for z in learnt.numbers}
    perfect, worst = own_cells.ranked({"x": lambda _: above}), own_cells.ranked({"x": lambda _: -above})
    assert perfect["window_x"] == 100 and worst["window_x"] == 0 and 5 < perfect["window_chance"] < 15


def test_the_stored_comparison_is_that_of_the_committed_models(real_table):
    real_table("oqmd_abx3", "oqmd_abx3")
    stored, now = results.read_run("own-cells", "seed0")["metrics"], own_cells.compare(0)
    assert stored.keys() == now.keys() and all(stored[k] == pytest.approx(now[k], abs=1e-3) for k in now)
