"""The paper's materials on a hull: a relaxation that failed costs its own row alone and is named."""

import json

import numpy as np
import pytest

from meidnet_core import dft, hull, relax, results, table_s1
from meidnet_core.hull import HullError

FORMULAS = ["KTaSe3", "BaHfSe3", "LaScSe3"]
CELLS = [(np.array([5.0] * 3 + [90.0] * 3), [*hull.sites_in(f), "Se", "Se"], np.zeros((5, 3))) for f in FORMULAS]


def good(symbols):
    return {"symbols": symbols, "status": "ok", "energy_per_atom": -5.0, "volume": 25.0}


@pytest.fixture
def written(monkeypatch):
    """BaHfSe3 failed from the ideal start; what write_run is given, as of json."""
    bad = {"symbols": CELLS[1][1], "status": "exploded: volume x 9", "energy_per_atom": None}
    rows = {"ideal": [good(CELLS[0][1]), bad, good(CELLS[2][1])], "rattled": [good(c[1]) for c in CELLS]}
    monkeypatch.setattr(table_s1, "paper_cells", lambda: (FORMULAS, CELLS))
    monkeypatch.setattr(relax, "relax_all", lambda *a, **o: rows)
    monkeypatch.setattr(hull, "corrections", lambda potential: None)
    monkeypatch.setattr(hull, "above", lambda diagram, symbols, energy: (0.1, "somewhere"))
    monkeypatch.setattr(hull, "formation_energy", lambda *a: -1.0)
    monkeypatch.setattr(hull, "list_diagram", lambda *a: None)
    monkeypatch.setattr(results, "write_run", lambda *a, **o: o)
    return monkeypatch


def test_table_s1_keeps_its_other_rows_when_one_fails(written):
    run = table_s1.paper("sevennet-0")
    m = run["metrics"]
    assert m["KTaSe3_ideal"] == pytest.approx(100) and m["KTaSe3_ideal_a"] == pytest.approx(5.0) and "BaHfSe3_rattled" in m
    assert "BaHfSe3_ideal" not in m and "BaHfSe3_ideal_a" not in m and np.isfinite(list(m.values())).all()
    assert run["failed"] == {"BaHfSe3 ideal": "exploded: volume x 9"} and run["curve"]["ideal"][1] == "exploded: volume x 9"
    assert "f3c.ktase3.ehull_esen" in run["claims"] and "f3c.bahfse3.ehull_esen" not in run["claims"]


def test_a_hull_of_its_own_keeps_its_other_rows_when_one_fails(written):
    class Diagram:
        all_entries = range(7)

    def diagram(elements, *a, **o):
        if "La" in elements:
            raise HullError("hull of La-Sc-Se: no energy for La2Se3 (exploded)")
        return Diagram

    written.setattr(hull, "self_diagram", diagram)
    run = table_s1.own_hull("sevennet-0", formulas=FORMULAS)
    assert set(run["metrics"]) == {"KTaSe3_ideal", "KTaSe3_rattled", "KTaSe3_phases", "BaHfSe3_rattled", "BaHfSe3_phases"}
    assert run["failed"] == {"BaHfSe3 ideal": "exploded: volume x 9", "LaScSe3": "hull of La-Sc-Se: no energy for La2Se3 (exploded)"}


def test_materials_that_failed_have_no_label(monkeypatch, tmp_path):
    m = results.read_run("table-s1", "sevennet-0")["metrics"]
    m = {k: v for k, v in m.items() if not k.startswith("KTaSe3_ideal")}
    whole = table_s1.paper_crystals()
    (tmp_path / "table-s1").mkdir()
    (tmp_path / "table-s1" / "sevennet-0.json").write_text(json.dumps({"metrics": m}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "read_run", lambda *a: {"metrics": m})
    crystals = table_s1.paper_crystals()
    i = crystals.ids.index("KTaSe3")
    assert np.isnan(crystals.labels[i]).all() and np.isnan(crystals.labels).sum() == 1
    assert crystals.lattice[i] == pytest.approx(whole.lattice[i], rel=0.05) and crystals.lattice[i, 0] != whole.lattice[i, 0]


def test_table_s1_is_undecided_where_the_start_decides():
    m = {"in_list": 4, "LaBiTe3_ideal": 604.0, "LaBiTe3_rattled": 113.0, "BaHfSe3_ideal": 66.0, "BaHfSe3_rattled": 60.0,
         "KSnI3_ideal": 70.0}
    claims = table_s1.claims_of_paper(m, ["LaBiTe3", "BaHfSe3", "KSnI3"], "sevennet-0")
    start = claims["ts1.labite3.ehull_esen"]
    assert start["undecided"] and start["value"] == 604.0 and start["split"].endswith("list hull; rattled 113)")
    assert not claims["f3c.bahfse3.ehull_esen"]["undecided"] and not claims["ts1.ksni3.ehull_esen"]["undecided"]
    assert claims["ts1.rows"] == {"value": 3, "split": "by construction"}
    assert all(c["undecided"] for c in table_s1.claims_of_gaps({"KTaSe3": 0.1}, ["KTaSe3"]).values())


def test_stored_claims_of_table_s1_are_those_of_the_code():
    names = table_s1.paper_cells()[0]
    for run, claims_of in (("table-s1/sevennet-0", lambda m: table_s1.claims_of_paper(m, names, "sevennet-0")),
                           ("table-s1-gaps/cgcnn", lambda m: table_s1.claims_of_gaps(m, names))):
        stored = results.read_run(*run.split("/"))
        asked = claims_of(stored["metrics"])
        assert {k: (c["split"], "undecided" in c) for k, c in stored["claims"].items()} == {
            k: (c["split"], bool(c.get("undecided"))) for k, c in asked.items()}


def test_gaps_of_table_s1_stand_beside_the_papers():
    run = json.loads((results.RESULTS / "table-s1-gaps" / "cgcnn.json").read_text())
    rows = table_s1.gap_table(run["metrics"]).set_index("formula")
    assert len(rows) == 19 and rows.loc["KTaSe3", "paper, PBE"] == 0 and rows.loc["CsPbI3", "paper, PBE"] == 1.48
    off = (rows["CGCNN of OQMD, PBE"] - rows["target"]).abs().mean()
    assert off == pytest.approx(run["metrics"]["mae_target"]) and run["claims"]["ts1.ksni3.gap_cgcnn"]["value"] == run["metrics"]["KSnI3"]
    with pytest.raises(FileNotFoundError, match="table_s1 paper --potential none"):
        dft.cubic_start("KTaSe3", "none")
