"""The union of Perov-5 and the cubic cells of OQMD: sites, labels kept apart, no composition in two splits."""

import gzip

import numpy as np
import pytest

from meidnet_core import crystal, data, oqmd, sources
from meidnet_core.sources import DataError

ROWS = """name,entry_id,spacegroup,volume,ntypes,natoms,sites,band_gap,delta_e,stability
CsSnI3,1,Pm-3m,247.0,3,5,Cs @ 0.5 0.5 0.5; I @ 0.5 0 0; I @ 0 0.5 0; I @ 0 0 0.5; Sn @ 0 0 0,0.5,-1.2,0.01
CsSnI3,2,Pm-3m,240.0,3,5,Cs @ 0 0 0; I @ 0.5 0 0; I @ 0 0.5 0; I @ 0 0 0.5; Sn @ 0.5 0.5 0.5,0.1,-0.9,0.31
CsSnI3,3,Pm-3m,250.0,3,5,Sn @ 0 0 0; I @ 0.5 0 0; I @ 0 0.5 0; I @ 0 0 0.5; Cs @ 0.5 0.5 0.5,0.4,-1.1,0.11
KMgF3,4,Pm-3m,64.0,3,5,K @ 0 0 0; F @ 0 0.5 0.5; F @ 0.5 0 0.5; F @ 0.5 0.5 0; Mg @ 0.5 0.5 0.5,7.0,-3.0,0.0
KMgF3,5,Pnma,300.0,3,20,K @ 0 0 0,7.0,-3.0,0.0
LaBiO3,6,Pm-3m,80.0,3,5,La @ 0 0 0; O @ 0 0.5 0.5; O @ 0.5 0 0.5; O @ 0.5 0.5 0; Bi @ 0.5 0.5 0.5,0.0,9.0,7.0
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    (tmp_path / "oqmd_abx3").mkdir()
    path = tmp_path / "oqmd_abx3" / "oqmd_abx3.csv.gz"
    path.write_bytes(gzip.compress(ROWS.encode()))
    monkeypatch.setenv("MEIDNET_DATA_MIRROR", str(tmp_path))
    monkeypatch.setattr(sources, "registry", dict)
    clear = oqmd.cubic.cache_clear
    clear()
    yield path
    clear()


def test_sites_are_found_by_geometry():
    read = lambda text: [crystal.symbol(z) for z in oqmd.perovskite_sites(text)]
    assert read("Cs @ 0.5 0.5 0.5; I @ 0.5 0 0; I @ 0 0.5 0; I @ 0 0 0.5; Sn @ 0 0 0") == ["Cs", "Sn", "I", "I", "I"]
    assert read("Cs @ 0 0 0; I @ 0.5 0 0; I @ 0 0.5 0; I @ 0 0 0.5; Sn @ 0.5 0.5 0.5") == ["Sn", "Cs", "I", "I", "I"]
    assert oqmd.perovskite_sites("Cs @ 0 0 0; I @ 0.1 0 0; I @ 0 0.5 0; I @ 0 0 0.5; Sn @ 0.5 0.5 0.5") is None
    assert oqmd.perovskite_sites("Cs @ 0 0 0; I @ 0.5 0 0; I @ 0 0.5 0; Sn @ 0 0 0.5; Sn @ 0.5 0.5 0.5") is None


def test_cells_and_labels(table):
    cells = oqmd.cubic()
    found = {cells.formula(i): (cells.ids[i], cells.labels[i]) for i in range(len(cells))}
    assert set(found) == {"CsSnI3", "SnCsI3", "KMgF3"}, "other space groups and unconverged rows are left out"
    assert found["CsSnI3"][0] == "1", "of equal arrangements the one of lowest energy"
    gap, heat, *pbe = found["KMgF3"][1]
    assert np.isnan([gap, heat]).all() and pbe == [7.0, -3.0, 0.0]
    i = cells.ids.index("4")
    assert cells.lattice[i] == pytest.approx([4, 4, 4, 90, 90, 90]) and (cells.frac[i] == crystal.PEROVSKITE).all()


def test_distances_of_the_cube_and_of_the_lowest_phase(table):
    numbers = [[crystal.atomic_number(e) for e in (a, b, x, x, x)] for a, b, x in
               (("Cs", "Sn", "I"), ("Sn", "Cs", "I"), ("K", "Mg", "F"), ("Mg", "K", "F"), ("K", "Zn", "F"))]
    found = oqmd.distances(np.array(numbers))
    assert found[:4] == pytest.approx(np.array([[0.01, 0.01], [0.31, 0.01], [0, 0], [np.nan, 0]]), nan_ok=True) and np.isnan(found[4]).all()
    assert oqmd.distances(np.zeros((0, 5), int)).shape == (0, 2)


def test_missing_table_and_column_are_named(table, monkeypatch):
    table.write_bytes(gzip.compress(b"name,volume\nA,1\n"))
    with pytest.raises(DataError, match="oqmd_abx3.csv.gz: column spacegroup, natoms, sites"):
        oqmd.cubic()
    monkeypatch.delenv("MEIDNET_DATA_MIRROR")
    with pytest.raises(DataError, match="not found in MEIDNET_DATA_MIRROR=None"):
        oqmd.read_table()


def test_splits_share_no_composition_and_training_forgets_what_is_held_out(monkeypatch):
    rng, metals = np.random.default_rng(0), np.arange(20, 31)
    numbers = np.array([[a, b, 8, 8, 8] for a in metals for b in metals if a != b], np.int16)
    everything = oqmd.cells("oqmd_abx3", "all", [str(i) for i in range(len(numbers))], numbers, np.full(len(numbers), 4.0),
                            rng.random((len(numbers), 5)))
    monkeypatch.setattr(oqmd, "cubic", lambda stand_in=False: everything)
    monkeypatch.setattr(data, "load", lambda name, split: everything.select(slice(None), split))      # Perov-5, the same compositions
    place, keys = oqmd.position(numbers), [data.composition_key(z) for z in numbers]
    own = {s: {k for k, p in zip(keys, place) if low <= p < high} for s, (low, high) in oqmd.SHARES.items()}
    assert all(own.values()) and not own["train"] & own["val"] and not own["train"] & own["test"] and not own["val"] & own["test"]
    trained_on = {data.composition_key(z) for z in oqmd.load("train").numbers}
    assert trained_on == own["train"], "Perov-5 must not bring a held-out composition back"
    twins = oqmd.position(np.array([[38, 22, 8, 8, 8], [22, 38, 8, 8, 8]]))
    assert twins[0] == twins[1]


def test_labels_of_different_theory_stay_apart(perovskites):
    wide = oqmd.widened(perovskites(6))
    assert wide.label_names == tuple(oqmd.LABELS) and np.isfinite(wide.labels[:, :2]).all() and np.isnan(wide.labels[:, 2:]).all()
