"""Stable, unique, novel: counting, matching, intervals."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from ase.calculators.emt import EMT

from meidnet_core import (
    candidates,
    checkpoint,
    crystal,
    design,
    experiments,
    hull,
    novelty,
    oqmd,
    potentials,
    relax,
    results,
    seeds,
    stability,
    sun,
    sun_tables,
)


def relaxed(a, *symbols, frac=crystal.PEROVSKITE):
    return {"symbols": list(symbols), "lattice": [a] * 3 + [90.0] * 3, "frac": frac.tolist(), "status": "ok"}


def test_formulas_are_the_same_however_written():
    twice = ["Sr", "Ti", "O", "O", "O"] * 2
    assert hull.reduced(["Ti", "O", "Sr", "O", "O"]) == hull.reduced(twice) == hull.whole({"O": 6, "Sr": 2, "Ti": 2})


def table(**columns):
    base = {"e_above_hull": [0.05, -0.01, 0.2, np.nan], "unique": [True, True, True, True], "pbe_gap": [1.0, 2.0, 1.0, 1.0], "target": 1.0,
            **{f"new_{r}": True for r in (*novelty.REFERENCES, "anywhere")}}
    return pd.DataFrame(base | columns)


def test_rates_count_against_the_budget():
    m = sun.rates(table(), 5)
    assert m["sun_100_training"] == 40 and m["sun_0_anywhere"] == 20 and m["count_100_training"] == 2 and m["candidates"] == 4
    assert m["on_target_sun"] == 20
    assert sun.rates(table(unique=[True, False, True, True]), 5)["sun_100_training"] == 20
    m = sun.rates(table(new_mp_20=[False, True, True, True]), 5)
    assert (m["sun_100_training"], m["sun_100_mp_20"]) == (40, 20)


def test_interval_of_a_rate():
    low, high = sun.interval(19, 140)
    assert low == pytest.approx(8.4, abs=0.1) and high == pytest.approx(20.4, abs=0.1)      # Clopper and Pearson 1934
    assert sun.interval(0, 10)[0] == 0 and sun.interval(10, 10)[1] == 100


def test_the_miss_is_that_of_the_gap_that_was_asked_for():
    t = table().assign(target=1.0, dir_gap=1.1, pbe_gap=3.0, e_above_hull=0.05, unique=True, new_training=True)
    assert sun.aim(t, len(t)) == {"gap_miss": 2.0, "on_target_sun": 0.0}
    assert sun.aim(t, len(t), "dir_gap") == {"gap_miss": pytest.approx(0.1), "on_target_sun": 100.0}


def test_rates_are_apart_or_not():
    assert sun.against((90, 140), (60, 140)) == "above" and sun.against((60, 140), (90, 140)) == "below"
    assert sun.against((85, 140), (80, 140)) == "not distinguishable from"


def test_without_a_model_the_designer_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "CHECKPOINTS", tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="experiments extended"):
        sun.designer()


def test_columns_are_plain_json():
    frame = pd.DataFrame({"a": [1.23456, np.nan], "b": ["x", "y"], "c": [True, False]})
    assert sun.columns(frame, "a b c") == {"a": [1.2346, None], "b": ["x", "y"], "c": [True, False]}


def test_feedback_keeps_the_budget_and_learns(monkeypatch):
    numbers = np.array([[a, b, x, x, x] for a in (19, 37, 55, 56) for b in (12, 20, 22, 40, 50) for x in (8, 9, 17)], np.int16)
    pool = candidates.ideal(numbers, lambda z: np.full(len(z), 4.0))
    mean = np.zeros((len(numbers), len(oqmd.LABELS)))
    mean[:, list(oqmd.LABELS).index("stability")] = 0.001 * np.arange(len(numbers))
    everything = candidates.Proposal(pool, mean, np.zeros_like(mean), np.full(len(mean), np.nan))
    tool = candidates.Designer.__new__(candidates.Designer)
    tool.labels, tool.stability, tool.tolerance = list(oqmd.LABELS), "stability", 0.1
    tool.search, calls = lambda *a: everything, []

    def measure(cells):                                              # chlorides turn out bad, one relaxation fails
        calls.append(len(cells))
        return [np.nan if len(calls) == 1 and i == 0 else 1.0 * ("Cl" in c[1]) for i, c in enumerate(cells)]

    monkeypatch.setattr(sun, "GAPS", (0.8, 1.0))
    cells, table = sun.gather_with_feedback(tool, "ours-feedback", 0, 10, measure, batch=4)
    assert calls == [4, 4, 2, 4, 4, 2] and len(cells) == len(table) == 20
    assert len(set(table.formula)) == 20 and table.target.tolist() == [0.8] * 10 + [1.0] * 10
    assert sum("Cl" in f for f in table.formula[:4]) >= 1 and not any("Cl" in f for f in table.formula[8:])


def test_claims_name_threshold_hull_potential_and_what_is_new():
    row = lambda count: {"candidates": 140, "count_100_training": count, "sun_100_training": count, "sun_100_anywhere": count / 10}
    groups = {m: row(n) for m, n in (("ours", 84), ("random", 0), ("screening", 70), ("paper", 28))}
    hits = {"ours": {"enrichment_140_any gap": 20.0}, "screening": {"enrichment_140_any gap": 40.0}}
    window = sun.over_window({"ours": {0: {"n": 84}, 1: {"n": 80}}, "window": {0: {"n": 8}, 1: {"n": 12}}}, "n")
    claims = sun.claims_of(groups, {"ours": row(14)}, hits, {"random": (3.5, "7 hits"), "screening": (70, "")}, "sevennet-0", window)
    assert claims["x.retro.enrichment140"]["split"].endswith("hull); 8.2 times random within the tolerance window")
    assert sun.over_window({"ours": {0: {"n": 84}}}, "n") == ""                                        # no such runs, no hits: no ratio
    value = {k: c["value"] for k, c in claims.items()}
    hits["ensemble"] = {"enrichment_140_any gap": 44.0}
    told = sun.claims_of(groups, {}, hits, {"random": (0, ""), "screening": (0, "")}, "sevennet-0")
    assert told["x.retro.over_screening"]["split"].endswith("; screening with all models has 44.0 times chance")
    assert value["f3b.sun"] == 84 and value["f3b.sun_count"] == 84 and value["x.sun.as_asked"] == 28 and value["s2.n"] == sun.DRAWN
    assert value["x.sun.over_random"] == 24 and value["x.sun.over_screening"] == 1.2 and value["x.retro.over_screening"] == 0.5
    for name in ("f3b.sun", "x.sun.as_asked", "x.sun.strict", "x.sun.over_random"):
        assert all(word in claims[name]["split"] for word in ("0.1 eV/atom", "list hull", "sevennet-0", "new to"))
    none = {"ours": hits["ours"], "screening": {"enrichment_140_any gap": 0.0}}
    without = sun.claims_of(groups, {}, none, {"random": (0, "no hits")}, "sevennet-0")
    assert not {"x.sun.strict", "x.sun.over_random", "x.retro.over_screening"} & set(without)          # no ratio to nothing


def test_runs_of_two_potentials_are_not_one_claim(monkeypatch):
    runs = {m: [{"seed": 0, "config": {"potential": p}, "metrics": {"count_100_training": 1}}] for m, p in
            (("ours", "sevennet-0"), ("random", "chgnet"), ("screening", "sevennet-0"))}
    monkeypatch.setattr(sun, "stored", lambda *a, **k: runs)
    monkeypatch.setattr(results, "write_run", lambda *a, **k: pytest.fail("written"))
    with pytest.raises(ValueError, match="mix potentials: chgnet, sevennet-0"):
        sun.figures()


def test_a_rate_has_a_threshold_and_a_reference_that_runs_count():
    assert sun.rate_key(0.1) == "100_training" and sun.rate_key(0, "anywhere") == "0_anywhere"
    for limit, reference in ((0.05, "training"), (0.1, "mp20")):
        with pytest.raises(ValueError, match=f"no rate at {limit} eV/atom, new to '{reference}': expected one of 0.1, 0.0 and"):
            sun.rate_key(limit, reference)


def test_stored_claims_follow_from_the_stored_runs():
    rows = results.read_claims().set_index("id").ours
    mean = lambda m, key: np.mean([r["metrics"][key] for r in sun.stored()[m]])
    assert rows["f3b.sun"] == pytest.approx(mean("ours", "sun_100_training"), rel=1e-5)
    assert rows["x.sun.as_asked"] == pytest.approx(mean("paper", "sun_100_training"), rel=1e-5)


def test_what_is_exported_says_how_often_training_saw_its_elements(monkeypatch, tmp_path):
    cells = [crystal_of("K", "Mg"), crystal_of("K", "Cu")]
    rows = [relaxed(4.0, *c[1]) for c in cells]
    monkeypatch.setattr(sun, "gather", lambda *a: (cells, pd.DataFrame({"formula": ["KMgF3", "KCuF3"]})))
    monkeypatch.setattr(sun.relax, "relax_all", lambda *a, **k: {"ideal": rows, "rattled": rows})
    monkeypatch.setattr(hull, "corrections", lambda potential: None)
    monkeypatch.setattr(hull, "e_above_hull", lambda r, correction: {"e_above_hull": 0.05 if "Mg" in r["symbols"] else 0.3})
    monkeypatch.setattr(novelty, "new_to", lambda symbols: dict.fromkeys(novelty.REFERENCES, True))
    tool = SimpleNamespace(train=SimpleNamespace(numbers=np.array([[19, 12, 9, 9, 9], [19, 29, 9, 9, 9]])))
    sun.export(tool, tmp_path)
    found = pd.read_csv(tmp_path / "candidates.csv")
    assert found.formula.tolist() == ["KMgF3"] and (tmp_path / "KMgF3.cif").exists()
    assert found.training_cells[0] == "K 2, Mg 1, F 2" and found.cells_with_rarest_element[0] == 1


def crystal_of(a, b):
    return [4.0] * 3 + [90.0] * 3, [a, b, "F", "F", "F"], crystal.PEROVSKITE


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Runs of two metals in place of 140 crystals, in a folder of their own: EMT relaxes, the hull is at zero energy."""
    box = [3.7, 3.7, 3.7, 90.0, 90.0, 90.0], crystal.PEROVSKITE[1:] + 0.5
    cells = [(np.array(box[0]) + shift, [e] * 4, box[1]) for e, shift in (("Cu", 0.0), ("Ag", [0.5, 0.5, 0.5, 0, 0, 0]))]
    table = pd.DataFrame({"formula": ["Cu", "Ag"], "target": 0.8} | dict.fromkeys(("pbe_gap", "dir_gap", "heat_all", "stability"), 0.8))
    monkeypatch.setattr(sun, "gather", lambda *a: (cells, table))
    monkeypatch.setattr(potentials, "get_calculator", lambda *a: EMT())
    monkeypatch.setattr(potentials, "pick", lambda potential: potential)
    monkeypatch.setattr(hull, "corrections", lambda potential: None)
    monkeypatch.setattr(hull, "default_path", lambda *a: tmp_path / "cells.jsonl")
    monkeypatch.setattr(hull, "e_above_hull", lambda row, correction: {"e_above_hull": row["energy_per_atom"]})
    monkeypatch.setattr(novelty, "new_to", lambda symbols: dict.fromkeys(novelty.REFERENCES, True))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "write_run", partial(results.write_run, root=tmp_path))
    monkeypatch.setattr(sun, "designer", lambda symmetrize, known: SimpleNamespace(symmetrize=symmetrize, models=[None], labels=()))
    monkeypatch.setattr(sun, "figures", lambda: pytest.fail("such runs carry no claims"))
    return tmp_path


def test_free_and_rattled_runs_have_experiments_of_their_own(small, monkeypatch):
    common = ["sun", "--methods", "ours", "--seeds", "1", "--processes", "1", "--potential", "emt"]
    for extra in (["--free"], ["--start", "rattled"], ["--free", "--start", "rattled"]):
        monkeypatch.setattr(sys, "argv", [*common, *extra])
        sun.main()
    read = lambda tag: json.loads((small / f"sun-ours-{tag}-emt" / "seed0.json").read_text())
    free, rattled, both = map(read, ("free", "rattled", "free-rattled"))
    assert (free["config"]["start"], free["config"]["geometry"], free["claims"]) == ("ideal", "decoded", {})
    assert rattled["config"]["start"] == both["config"]["start"] == "rattled" and "geometry" not in rattled["config"]
    rows = relax.read_rows(small / "cells.jsonl").values()
    assert sorted(r["start"] for r in rows) == ["ideal"] * 2 + ["rattled"] * 2           # both rattled runs ask the same of the same cells
    monkeypatch.setattr(sun, "run", lambda *a, **k: pytest.fail("done before"))
    sun.main()


def test_auto_names_the_potential_that_it_chose(small, monkeypatch):
    """The folder, the configuration and the corrections are those of the choice."""
    monkeypatch.setattr(stability, "placing", {"auto": "emt"}.get)
    monkeypatch.setattr(sys, "argv", ["sun", "--methods", "ours", "--seeds", "1", "--processes", "1", "--potential", "auto", "--free"])
    sun.main()
    assert json.loads((small / "sun-ours-free-emt" / "seed0.json").read_text())["config"]["potential"] == "emt"


def test_methods_without_a_decoder_are_not_free(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sun", "--methods", "ours", "screening", "--free"])
    with pytest.raises(SystemExit):
        sun.main()
    assert "screening decode no geometry" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["sun", "--export", "--start", "rattled"])
    with pytest.raises(SystemExit):
        sun.main()
    assert "neither --ceiling nor --export" in capsys.readouterr().err


def test_stored_runs_are_what_the_code_asks_for():
    tool = SimpleNamespace(symmetrize=True, models=[None] * 3)
    for method in ("ours", "paper", "screening"):
        assert results.done(f"sun-{method}", 0, sun.configuration(tool, method))
    assert not results.done("sun-ours", 0, sun.configuration(SimpleNamespace(symmetrize=False, models=[None] * 3), "ours"))


@pytest.fixture(scope="module")
def committed():
    """A Designer over the committed models, as the stored runs had it."""
    return sun.designer(symmetrize=True)


@pytest.mark.parametrize("method, which", [("random", slice(None)), ("ensemble", slice(None)), ("screening", slice(1))])
def test_stored_runs_rest_on_the_committed_models(committed, method, which):
    """What they say of each cell is what the committed checkpoints read today: after another training the runs have to be made anew."""
    tool, run = committed, results.read_run(f"sun-{method}", "seed0")["curve"]
    cells = candidates.ideal(candidates.numbers_of(run["formula"]), tool.constant)
    read = design.predict(tool.models[which], cells)[0]
    for label in ("pbe_gap", "stability"):
        assert np.abs(read[:, tool.labels.index(label)] - run[label]).max() < 2e-3, label


@pytest.mark.parametrize("method", ["random", "window", "screening", "ensemble",
                                    *(pytest.param(m, marks=pytest.mark.slow) for m in ("ours", "strict", "unmoved", "paper"))])
def test_stored_runs_hold_what_is_proposed_today(committed, method):
    """Another search, filter or order of the code: the stored runs have to be made anew, their configurations do not tell."""
    seed = 1 if method in ("ours", "paper") else 0
    stored = results.read_run(f"sun-{method}", f"seed{seed}")["curve"]["formula"]
    assert list(sun.gather(committed, method, seed, sun.PER_TARGET)[1].formula) == stored


def test_a_rate_is_named_in_full():
    assert sun.terms(0.1, "sevennet-0") == "at most 0.1 eV/atom on the list hull, sevennet-0, new to training"
    assert sun.terms(0.0, "chgnet", "anywhere") == "at most 0 eV/atom on the list hull, chgnet, new to every set"
    assert sun.terms(0.1, "chgnet", "mp_20").endswith("new to MP-20")


def starting(counts, energies):
    return {"curve": {"formula": list(energies), "e_above_hull": list(energies.values())},
            "metrics": {"candidates": len(energies), "count_100_training": counts[0], "count_0_training": counts[1]}}


def test_kinds_of_cell_and_start_stand_beside_each_other():
    runs = {"sun-ours/seed0": starting((2, 1), {"a": -0.01, "b": 0.05, "c": 0.2, "d": None}),
            "sun-ours-rattled/seed0": starting((3, 2), {"a": -0.02, "b": 0.0, "c": 0.1, "d": 0.3})}
    table = sun_tables.starts(runs).set_index("geometry, start")
    assert list(table.index) == ["symmetrized, ideal", "symmetrized, rattled"]             # what is not stored has no row
    first, rattled = table.iloc[0], table.iloc[1]
    assert (first["SUN at 0.1 eV/atom (%)"], rattled["SUN at 0.1 eV/atom (%)"], rattled["SUN at 0 eV/atom (%)"]) == (50, 75, 50)
    assert rattled["compared"] == 3 and rattled["median energy - first row (meV/atom)"] == pytest.approx(-50)
    assert rattled["deeper by 25 meV/atom"] == 2 and first["median energy - first row (meV/atom)"] == 0
    low, high = sun.interval(3, 4)
    assert rattled["95 %, 0.1 eV/atom"] == f"{low:.1f} to {high:.1f}"


def test_rates_carry_their_intervals():
    groups = {m: seeds.distinct(r) for m, r in sun.stored().items() if m in ("ours", "screening")}
    table = sun_tables.with_intervals(groups, {"sun_100_training": "SUN (%)"}, {"gap_miss": "miss (eV)"})
    assert list(table.columns) == ["seeds", "SUN (%)", "SUN (%), 95 %", "miss (eV)"]
    low, high = sun.interval(*seeds.effective(groups["ours"], "sun_100_training"))
    assert table.loc["ours", "SUN (%), 95 %"] == f"{low:.1f} to {high:.1f}"
