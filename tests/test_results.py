"""Run files, their join with the paper's claims, and the verdicts."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from meidnet_core import results
from meidnet_core.config import Config

NONE = math.nan
HEADER = ",".join(results.REFERENCE_COLUMNS)


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "paper.csv"
    path.write_text(
        f"{HEADER}\nt1.sm,Table 1,SM | Perov-5,%,97,higher,0.5,\n"
        "f4.gap,Fig 4,PBE gap,eV,0.63,match,0.15,\nx.rate,beyond,rate,1/min,,higher,,1000\n"
        "f1.flow,Fig 1,schematic,,,match,,\n"
    )
    return path


@pytest.fixture
def write(tmp_path, reference):
    """write_run with everything filled in that a test does not care about."""

    def run(experiment="perov5", run="seed0", **changes):
        given = dict(
            config={"dim": 128, "seed": 0},
            seed=0,
            data_set="perov5",
            split="test",
            n=10,
            metrics={"sm": 97.0},
            claims={"t1.sm": 97.0},
            wall_time_s=1.0,
        )
        return results.write_run(
            experiment, run, root=tmp_path / "runs", reference=reference, **{**given, **changes}
        )

    return run


def join(tmp_path, reference):
    return results.join_claims(reference, tmp_path / "runs").set_index("id")


@pytest.mark.parametrize(
    "paper, ours, sense, tolerance, target, expected",
    [
        (0.97, NONE, "higher", 0.02, NONE, "not yet"),
        (0.97, None, "higher", 0.02, None, "not yet"),
        (66, 69, "higher", 2, NONE, "exceeded"),
        (66, 68, "higher", 2, NONE, "reproduced"),
        (
            0.91,
            0.89,
            "higher",
            0.02,
            NONE,
            "reproduced",
        ),  # the edge: 0.91 - 0.02 is not 0.89 in binary
        (66, 63.9, "higher", 2, NONE, "not reproduced"),
        (0.24, 0.19, "lower", 0.04, NONE, "exceeded"),
        (0.24, 0.28, "lower", 0.04, NONE, "reproduced"),
        (0.24, 0.29, "lower", 0.04, NONE, "not reproduced"),
        (0.31, 0.33, "match", 0.02, NONE, "reproduced"),
        (0.31, 0.90, "match", 0.02, NONE, "not reproduced"),  # a better baseline is no success
        (9, 9, "match", 0, NONE, "reproduced"),
        (9, 8, "match", 0, NONE, "not reproduced"),
        (99.85, 99.93, "higher", 0.5, 99.925, "exceeded"),  # no headroom for the tolerance
        (99.85, 99.90, "higher", 0.5, 99.925, "reproduced"),
        (99.85, 99.3, "higher", 0.5, 99.925, "not reproduced"),
        (10.7, 14, "higher", 3, 15, "reproduced"),  # better than the paper, short of the target
        (10.7, 15, "higher", 3, 15, "exceeded"),
        (10.7, 7, "higher", 3, 15, "not reproduced"),
        (NONE, 1000, "higher", NONE, 1000, "exceeded"),
        (NONE, 999, "higher", NONE, 1000, "not reproduced"),
        (None, 999, "higher", None, 1000, "not reproduced"),
        (NONE, 0.04, "lower", NONE, 0.045, "exceeded"),
        (NONE, 0.05, "lower", NONE, 0.045, "not reproduced"),
        (NONE, 1, "match", NONE, NONE, "reproduced"),  # a schematic that a run draws
    ],
)
def test_verdict(paper, ours, sense, tolerance, target, expected):
    assert results.verdict(paper, ours, sense, tolerance, target) == expected


def test_verdict_refuses_an_unknown_sense():
    with pytest.raises(ValueError, match="bigger"):
        results.verdict(1, 1, "bigger", 0, NONE)


def test_a_run_file_says_what_was_run_and_where(write):
    path = write(
        metrics={"sm": np.float32(0.5), "curve": np.arange(3)},
        potential="SevenNet-0",
        device="test bench",
    )
    record = json.loads(path.read_text())
    assert set(results.KEYS) <= set(record)
    assert record["metrics"] == {"sm": 0.5, "curve": [0, 1, 2]}
    assert (record["potential"], record["device"]) == ("SevenNet-0", "test bench")
    assert record["claims"] == {"t1.sm": {"value": 97.0, "split": "test"}}
    assert (
        record["packages"]["python"].startswith("3.")
        and record["cpu"]
        and record["date"].endswith("+00:00")
    )


def test_seeds_are_averaged(write, reference, tmp_path):
    for seed, value in enumerate([96.0, 97.0, 99.0]):
        write(
            run=f"seed{seed}", seed=seed, config={"dim": 128, "seed": seed}, claims={"t1.sm": value}
        )
    row = join(tmp_path, reference).loc["t1.sm"]
    assert row["ours"] == pytest.approx(292 / 3)
    assert row["sd"] == pytest.approx(np.std([96, 97, 99], ddof=1))
    assert (row["n_seeds"], row["split"], row["verdict"]) == (3, "test", "undecided")            # 95 % interval: 93.5 to 101.1
    assert len(row["source"].split(";")) == 3


@pytest.mark.parametrize("values, said", [((94.0, 95.0, 99.0), "undecided"), ((90.0, 90.1, 90.2), "not reproduced"),
                                          ((97.9, 98.0, 98.1), "exceeded"), ((94.0,), "not reproduced")])
def test_seeds_whose_interval_holds_the_edge_decide_nothing(write, reference, tmp_path, values, said):
    for seed, value in enumerate(values):
        write(run=f"seed{seed}", seed=seed, claims={"t1.sm": value})
    assert join(tmp_path, reference).loc["t1.sm", "verdict"] == said


def test_a_run_that_cannot_tell_says_so(write, reference, tmp_path):
    path = write(claims={"t1.sm": {"value": 98, "undecided": True}})
    assert json.loads(path.read_text())["claims"]["t1.sm"] == {"value": 98.0, "split": "test", "undecided": True}
    assert join(tmp_path, reference).loc["t1.sm", "verdict"] == "undecided"


def test_one_seed_has_no_sd_and_no_run_no_value(write, reference, tmp_path):
    write(claims={"t1.sm": 98, "f1.flow": True})
    table = join(tmp_path, reference)
    assert pd.isna(table.loc["t1.sm", "sd"]) and table.loc["t1.sm", "n_seeds"] == 1
    assert list(table["verdict"]) == ["exceeded", "not yet", "not yet", "reproduced"]


def test_many_seeds_are_sourced_by_their_folder(write, reference, tmp_path):
    for seed in range(results.FEW + 1):
        write(run=f"seed{seed}", seed=seed)
    assert (
        join(tmp_path, reference).loc["t1.sm", "source"]
        == (tmp_path / "runs" / "perov5").resolve().as_posix()
    )


def test_a_claim_may_name_its_own_split(write, reference, tmp_path):
    write(claims={"t1.sm": {"value": 97, "split": "train"}, "f4.gap": 0.6})
    assert list(join(tmp_path, reference)["split"]) == ["train", "test", "", ""]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"config": {"dim": 64, "seed": 1}}, "configs"),
        ({"split": "train"}, "splits"),
        ({"data_set": "mp20"}, "data sets"),
        ({"experiment": "other"}, "experiments"),
        ({"seed": 0}, "seeds appear twice"),
    ],
)
def test_a_mean_over_unlike_runs_is_refused(write, reference, tmp_path, change, reason):
    write()
    write(**{"run": "seed1", "seed": 1, "config": {"dim": 128, "seed": 1}, **change})
    with pytest.raises(ValueError, match=f"claim t1.sm: .*{reason}"):
        join(tmp_path, reference)


def test_a_field_that_came_later_counts_as_its_default(write, reference, tmp_path):
    write(config={"dim": 128, "seed": 0})
    write(run="seed1", seed=1, config={"dim": 128, "seed": 1, "partial": False})
    assert join(tmp_path, reference).loc["t1.sm", "n_seeds"] == 2
    write(run="seed2", seed=2, config={"dim": 128, "seed": 2, "partial": True})
    with pytest.raises(ValueError, match="claim t1.sm: .*configs"):
        join(tmp_path, reference)


def test_unlike_runs_may_carry_different_claims(write, reference, tmp_path):
    write()
    write(run="dim64", config={"dim": 64}, claims={"f4.gap": 0.6})
    assert join(tmp_path, reference)["ours"].notna().sum() == 2


def test_an_unknown_claim_is_refused(write, reference, tmp_path):
    with pytest.raises(ValueError, match="t9.sm.*paper.csv"):
        write(claims={"t9.sm": 1})
    path = write()
    path.write_text(path.read_text().replace("t1.sm", "t9.sm"))
    with pytest.raises(ValueError, match="seed0.json.*t9.sm.*paper.csv"):
        join(tmp_path, reference)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"metrics": {"deep": [1.0, {"sm": float("nan")}]}}, "metrics.deep.1.sm"),
        ({"metrics": {"sm": np.inf}}, "metrics.sm"),
        ({"claims": {"t1.sm": float("nan")}}, "claims.t1.sm"),
        ({"claims": {"t1.sm": "97"}}, "t1.sm"),
        ({"claims": {"t1.sm": {"value": 97, "split": ""}}}, "split"),
    ],
)
def test_values_no_table_could_show_are_refused(write, tmp_path, changes, name):
    with pytest.raises(ValueError, match=name):
        write(**changes)
    assert not list((tmp_path / "runs").glob("**/*"))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "not a JSON run file"),
        ("[]", "missing experiment"),
        ('{"experiment": "perov5"}', "missing run"),
        ('{"metrics": NaN}', "not standard JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, reason):
    (tmp_path / "perov5").mkdir()
    (tmp_path / "perov5" / "seed0.json").write_text(text)
    with pytest.raises(ValueError, match=f"seed0.json: .*{reason}"):
        results.read_runs(tmp_path)


def test_a_moved_file_is_refused(write, tmp_path):
    path = write()
    path.rename(path.with_name("seed7.json"))
    with pytest.raises(ValueError, match="seed7.json: says it is perov5/seed0"):
        results.read_runs(tmp_path / "runs")


def test_a_nested_run_is_refused_and_not_overlooked(write, tmp_path):
    write(experiment="perov5/grouped")
    with pytest.raises(ValueError, match="says it is perov5/grouped/seed0"):
        results.read_runs(tmp_path / "runs")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(write, monkeypatch):
    path = write()
    before = path.read_text()
    with pytest.raises(TypeError, match="object"):
        write(metrics={"sm": object()})
    monkeypatch.setattr(
        results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        write(metrics={"sm": 1.0})
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_markdown(write, reference, tmp_path):
    for seed, value in enumerate([97.0, 97.02]):
        write(run=f"seed{seed}", seed=seed, claims={"t1.sm": value, "x.rate": 20000, "f1.flow": 1})
    results.write_claims(reference, tmp_path / "runs")
    csv = tmp_path / "runs" / "claims.csv"
    text = results.headline_markdown(csv)
    assert (
        r"| SM \| Perov-5 | Table 1 | % | 97.01 ± 0.014 (2 seeds) | test | 97 | reproduced |" in text
    )
    assert "| 20,000 ± 0 (2 seeds) | test | – | exceeded |" in text
    assert "schematic" not in text and "PBE gap" not in text
    assert ("4 rows: 1 exceeded, 2 reproduced, 0 undecided, 0 not reproduced, 1 not yet "
            "(of the reproduced 1 have no number in the paper)") in text
    assert "schematic" in results.full_markdown(
        csv
    ) and "| PBE gap | Fig 4 | eV | – |  | 0.63 | not yet |" in results.full_markdown(csv)


def test_readings_with_other_verdicts_disagree():
    row = pd.Series({"paper": 95.0, "sense": "match", "tolerance": 25.0, "target": float("nan")})
    assert results.disagree([604.0, 113.0], row) and not results.disagree([90.0, 113.0], row)
    assert not results.disagree([604.0, 300.0], row) and not results.disagree([604.0], row)                # both are far; one alone


def test_rows_that_hold_by_construction_are_counted():
    split = ["test", f"generated, {results.BUILT}", "test", f"all, {results.BUILT}"]
    claims = pd.DataFrame({"verdict": ["reproduced", "reproduced", "exceeded", "undecided"], "paper": [1.0, 2.0, 3.0, 4.0], "split": split})
    assert results.counts_line(claims).endswith("(of the reproduced 1 hold by construction).")
    assert results.counts_line(claims[2:]) == "2 rows: 1 exceeded, 0 reproduced, 1 undecided, 0 not reproduced, 0 not yet."


def test_markdown_before_any_run(reference, tmp_path):
    results.write_claims(reference, tmp_path)
    assert results.headline_markdown(tmp_path / "claims.csv").startswith(
        "No run carries a headline claim yet."
    )


@pytest.mark.parametrize(
    "rows, reason",
    [
        ("a,Fig 1,q,,1,match,0,\na,Fig 1,q,,1,match,0,", "a: the id appears twice"),
        ("a,Fig 1,q,,1,bigger,0,", "a: sense"),
        ("a,Fig 1,q,,1,match,,", "a: a number needs a tolerance"),
        ("a,Fig 1,q,,1,match,0,2", "a: a target needs"),
    ],
)
def test_a_bad_reference_is_named(tmp_path, rows, reason):
    path = tmp_path / "paper.csv"
    path.write_text(f"{HEADER}\n{rows}\n")
    with pytest.raises(ValueError, match=f"paper.csv: {reason}"):
        results.read_reference(path)
    path.write_text("id,paper\na,1\n")
    with pytest.raises(ValueError, match="columns are"):
        results.read_reference(path)


def test_every_figure_and_table_of_the_paper_is_listed():
    table = results.read_reference()
    assert table["id"].is_unique
    where = " / ".join(table["where"]).split(" / ")
    labels = (
        ["Table 1", "Table S1", "Table S2"]
        + [f"Fig {n}" for n in range(1, 6)]
        + [f"Fig S{n}" for n in range(1, 8)]
    )
    panels = [
        f"Fig {n}{p}"
        for n, last in [("1", "c"), ("2", "e"), ("3", "c"), ("4", "d"), ("5", "d")]
        for p in "abcde"[: "abcde".index(last) + 1]
    ]
    for label in labels:
        assert any(w == label or w[:-1] == label for w in where), label
    assert not set(panels) - set(where)


def test_targets_lie_beyond_the_paper():
    table = results.read_reference()
    both = table[table["target"].notna() & table["paper"].notna()]
    assert ((both["target"] > both["paper"]) == (both["sense"] == "higher")).all()
    assert table["target"].notna().sum() >= 12


def test_the_committed_claims_are_a_fresh_join(tmp_path):
    results.write_claims(path=tmp_path / "claims.csv")
    committed = results.RESULTS / "claims.csv"
    assert committed.read_text() == (tmp_path / "claims.csv").read_text(), (
        "run: python -m meidnet_core.results"
    )
    table = results.read_claims(committed)
    assert list(table.columns) == results.COLUMNS
    for source in table["source"][table["source"] != ""]:
        assert all((results.ROOT / part).exists() for part in source.split(";")), source


def test_a_run_of_another_configuration_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    config = Config(epochs=3, seed=1).to_dict() | {"regimes": {"free": ({}, False)}}
    older = {k: v for k, v in config.items() if k != "descriptors"}                     # written before the field existed
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "seed1.json").write_text(json.dumps({"config": older}))
    assert results.done("x", 1) and results.done("x", 1, config) and not results.done("x", 2, config)
    assert not results.done("x", 1, config | {"epochs": 4}) and not results.done("x", 1, config | {"descriptors": True})
    assert not results.done("x", 1, config | {"regimes": {"free": ({"charge": 1.0}, False)}})


def test_a_stored_run_can_be_called_otherwise_but_not_changed(write, tmp_path, reference):
    path = write(metrics={"sm": 97.0, "n": 3})
    before = json.loads(path.read_text())
    results.restate("perov5", "seed0", {"t1.sm": {"value": 97.0, "split": "test (half the cells)"}}, tmp_path / "runs", reference)
    after = json.loads(path.read_text())
    assert after.pop("claims") == {"t1.sm": {"value": 97.0, "split": "test (half the cells)"}} and before.pop("claims") and after == before
    with pytest.raises(ValueError, match="t9"):
        results.restate("perov5", "seed0", {"t9.sm": 1.0}, tmp_path / "runs", reference)
