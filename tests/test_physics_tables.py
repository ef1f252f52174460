"""Tables of chapters 13 and 16, from stored results."""

import numpy as np
import pytest

from meidnet_core import dft, evidence, physics_tables, results


def test_pairs_of_anions_leave_less_for_the_cations():
    cubic = ([4.9] * 3 + [90.0] * 3, ["Yb", "Sc", "Se", "Se", "Se"], np.array([[0.5] * 3, [0] * 3, [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]))
    assert evidence.anion_pairs(cubic) == (0.0, 6.0, pytest.approx(4.9 / 2**0.5))
    paired = cubic[0], cubic[1], cubic[2] + [[0] * 3, [0] * 3, [-0.07, 0.07, 0], [0.07, -0.07, 0], [0] * 3]
    pairs, charge, shortest = evidence.anion_pairs(paired)             # two of three Se are 2.5 angstrom apart
    assert pairs == 1 and charge == 4 and shortest == pytest.approx(4.9 * 0.36 * 2**0.5)
    table = physics_tables.charge_table(evidence.polymorphs()).set_index("material")["left for A + B (e)"]
    assert table["YbScSe3"] == 5 and table["YbMnSe3"] == 4 and table["LaScSe3"] == 6


def test_bands_by_atomic_orbitals_agree_with_the_mesh():
    after = evidence.repaired_bands()
    lined = {f: r for f, r in after.items() if "path_gap" in r}
    assert set(after) - set(lined) == {"KTaSe3"}                                             # it has plane waves along the path
    for f, r in lined.items():
        assert 0 < r["basis"]["error"] < 0.1 and r["bands"]["energies"].shape[1] == len(r["bands"]["distance"])
        assert r["gap"]["metal"] == r["path_gap"]["metal"], f
        low, high = -6 * r["basis"]["error"], 3 * r["basis"]["error"]                            # the path may hold a smaller gap
        assert r["gap"]["metal"] or low < r["path_gap"]["indirect"] - r["gap"]["indirect"] < high, f
    table = physics_tables.repaired_gaps(list(after), {}, after).set_index("material")
    assert table["basis error"].notna().sum() == len(lined) and table["on path"]["LaScSe3"] == lined["LaScSe3"]["path_gap"]["indirect"]


def test_points_of_the_cubic_zone_have_names():
    assert [physics_tables.point(k) for k in ((0, 0, 0), (0.5, 0, 0), (-0.5, 0.5, 0), (0.5, -0.5, 0.5))] == ["Γ", "X", "M", "R"]
    assert physics_tables.point((0.25, 0, 0)) == "(0.25 0 0)"
    assert [physics_tables.coordinates(k) for k in ((0, 0, -0.0), (0.5, 0.5, -0.5), (1 / 3, 0, 0))] == ["Γ", "(0.5 0.5 -0.5)", "(0.33 0 0)"]


def test_edges_of_repaired_cells_are_coordinates_and_of_cubic_ones_names():
    stored = {f: r for f in ("KTaSe3", "LaScSe3") if (r := dft.load(f, "quick"))}
    table, targets = physics_tables.gap_table(stored).set_index("formula"), results.read_table_s1().set_index("formula").target_gap_ev
    assert table["target, GLLB-SC (eV)"]["LaScSe3"] == targets["LaScSe3"] == 1 and table["paper, CGCNN (eV)"]["KTaSe3"] == 0.807
    assert table["from, to"]["LaScSe3"] == "R, Γ" and table["direct at"]["LaScSe3"] == "Γ"
    after = evidence.repaired_bands()
    repaired, g = physics_tables.repaired_edges(after).set_index("material"), after["KTaSe3"]["gap"]
    assert list(repaired.index) == list(after) and repaired["direct (eV)"]["KTaSe3"] == g["direct"] and repaired["atoms"]["KTaSe3"] == 10
    assert repaired["direct at"]["KTaSe3"] == "(0.5 0.5 -0.5)" and repaired["from, to"]["KTaSe3"] == "(0.5 0.5 -0.5), Γ"


def test_polymorphs_name_the_supercell_whose_frequencies_are_exact():
    table = physics_tables.polymorph_table(evidence.polymorphs())
    known = table[table["lowest, exact q (THz)"].notna()]
    assert len(known) and known["supercell"].str.fullmatch(r"\d+x\d+x\d+").all()
    assert (table[table["lowest, exact q (THz)"].isna()]["supercell"] == "").all()
