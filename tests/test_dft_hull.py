"""Energies above the hull by DFT: which phases compete, their cells, the arithmetic, the claims. Synthetic phases; no GPAW."""

import numpy as np
import pytest

from meidnet_core import dft, dft_hull, dft_store, evidence, hull, physics_tables, plots_physics

CUBE = [4.0, 4.0, 4.0, 90.0, 90.0, 90.0]
FORMULA = ["Ba", "Hf", "Se", "Se", "Se"]


def cell(symbols, a=4.0):
    n = len(symbols)
    return [a, a, a * n, 90.0, 90.0, 90.0], list(symbols), np.array([[0, 0, k / n] for k in range(n)])


PHASES = [cell(["Ba", "Se"]), cell(["Hf", "Se", "Se"]), cell(["Se"]), cell(["Ba", "Se", "Se"])]
LISTED = {hull.reduced(["Ba", "Se"]): -2.0, hull.reduced(["Hf", "Se", "Se"]): -1.5, hull.reduced(["Ba", "Hf", "Se"]): -9.0,
          hull.reduced(["Ba", "Se", "Se"]): -1.0}


def lists(monkeypatch, listed):
    """The list of ground states holds these {hull.whole: eV/atom}."""
    parsed = [dict(key) for key in listed]
    found = ["".join(f"{e}{n}" for e, n in key) for key in listed], parsed, np.array(list(listed.values())), hull._index(parsed)
    monkeypatch.setattr(hull, "ground_states", lambda: found)
    hull.list_diagram.cache_clear()


@pytest.fixture
def phases(monkeypatch):
    """BaSe, HfSe2, Se and an unstable BaSe2 with cells; BaHfSe is listed, but nobody knows its cell."""
    known = dft_hull.known_cells
    known.cache_clear()
    labels = np.array([[-2.0, 0, 0], [-1.5, 0, 0], [0.0, 0, 0], [-1.0, 0, 0]])
    monkeypatch.setattr(hull, "known_phases", lambda: (PHASES, labels, [frozenset(c[1]) for c in PHASES]))
    lists(monkeypatch, LISTED)
    yield
    known.cache_clear()
    hull.list_diagram.cache_clear()


def stored(name, symbols, energy, folder, status="ok"):
    out = {"name": name, "profile": "quick", "status": status, "cell": [CUBE, symbols, [[0.0] * 3] * len(symbols)], "bands": None,
           "dos": None, "seconds": 1.0}
    dft.save(out | ({"energy_per_atom": energy} if status == "ok" else {}), folder)
    return dft.load(name, "quick", folder)


def test_products_are_listed_phases_whose_cell_is_known(phases):
    parts = [(round(x, 6), dft_hull.name_of(c)) for x, c in dft_hull.products(FORMULA)]
    assert parts == [(0.6, "HfSe2-phase"), (0.4, "BaSe-phase")]
    assert list(dft_hull.needed(["BaHfSe3"])) == ["BaSe-phase", "HfSe2-phase"]         # small cells first


def test_phases_of_ytterbium_take_the_volume_of_their_setup(phases, monkeypatch):
    """The others stay in the cell of MP-20."""
    assert dft_hull.kind_of(["Ba", "Se"]) == "phase" and dft_hull.kind_of(["Yb", "Se"]) == "sized"
    assert dft.STEPS["sized"] == ("eos", "scf") and dft.STEPS["phase"] == ("scf",)
    asked = {}
    monkeypatch.setattr(dft_hull, "needed", lambda formulas: {"YbSe-phase": cell(["Yb", "Se"]), "BaSe-phase": cell(["Ba", "Se"])})
    monkeypatch.setattr(dft, "frozen_4f", lambda symbol, tag: tag)
    keep = lambda name, cell, profile, kind, ranks, **words: asked.update({name: (kind, words["setups"])}) or {"status": "ok", "seconds": 1}
    monkeypatch.setattr(dft, "run", keep)
    monkeypatch.setattr("sys.argv", ["dft_hull", "phases", "--materials", "YbScSe3"])
    dft_hull.main()
    assert asked == {"YbSe-phase": ("sized", {"Yb": "2p"}), "BaSe-phase": ("phase", {})}


def test_a_sized_phase_has_meshes_of_its_cell():
    quick = dft.PROFILES["quick"]
    job = dft.prepare(cell(["Ba", "Se"], 2.6), quick, "sized")
    assert job["settings"]["kpts"] == dft.prepare(cell(["Ba", "Se"], 2.6), quick, "phase")["settings"]["kpts"] != quick.kpts
    assert job["steps"] == ("eos", "scf") and job["path"] is None


def test_the_material_itself_counts_as_another_polymorph(phases, monkeypatch):
    same = cell(FORMULA)
    lists(monkeypatch, LISTED | {hull.reduced(FORMULA): -3.0})
    monkeypatch.setattr(dft_hull, "known_cells", lambda: {hull.reduced(c[1]): c for c in [*PHASES, same]})
    assert [(x, dft_hull.name_of(c)) for x, c in dft_hull.products(FORMULA)] == [(1.0, "BaHfSe3-phase")]


def test_an_element_without_a_cell_is_named(phases):
    with pytest.raises(hull.HullError, match="BaHfHfHf: no cell of Ba, Hf in MP-20"):
        dft_hull.products(["Ba", "Hf", "Hf", "Hf"])


def test_cells_are_compact():
    skewed = [12.6, 12.35, 3.48, 85.97, 78.05, 15.98], ["Ta", "Se", "Se"], np.array([[0, 0, 0], [0.1, 0.2, 0.3], [0.6, 0.5, 0.4]])
    lattice, symbols, frac = dft_hull.compact(skewed)
    assert max(lattice[:3]) < 12.4 and sorted(symbols) == ["Se", "Se", "Ta"] and min(lattice[3:]) > 59
    assert dft_store.same_crystal((lattice, symbols, frac), skewed)


def test_energy_above_the_hull_by_hand(phases, tmp_path):
    cubic = stored("BaHfSe3", FORMULA, -4.0, tmp_path)
    assert dft_hull.above(cubic, store=tmp_path) is None                                  # nothing calculated yet
    stored("BaSe-phase", ["Ba", "Se"], -5.0, tmp_path)
    stored("HfSe2-phase", ["Hf", "Se", "Se"], None, tmp_path, status="scf: not converged")
    assert dft_hull.above(cubic, store=tmp_path) is None                                  # one of them did not converge
    stored("HfSe2-phase", ["Hf", "Se", "Se"], -3.5, tmp_path)
    assert dft_hull.above(cubic, store=tmp_path) == pytest.approx(-4.0 + 0.4 * 5.0 + 0.6 * 3.5)


def test_a_lanthanide_has_one_valence_in_a_perovskite_and_its_products(monkeypatch):
    assert dft_hull.cores(["Yb", "Se"]) == {"Yb": "2p"} and dft_hull.cores(["Ba", "Se"]) == {}
    assert dft_hull.cores(["Eu", "O"]) == {"Eu": "2p"} and dft_hull.cores(["O", "Eu", "O", "Eu", "O"]) == {"Eu": "3p"}
    names = dft_hull.cubic_names()
    assert names["YbScSe3"] == "YbScSe3-divalent" and names["KTaSe3"] == "KTaSe3" and len(names) == 19
    assert names["EuTaO3"] == "EuTaO3-divalent" and names["EuCoO3"] == "EuCoO3-trivalent"
    assert {f for f, n in names.items() if n.endswith("valent")} >= {*dft.DIVALENT, *dft.TRIVALENT}


def test_products_hold_europium_of_the_same_valence(real_table):
    real_table("hull", "mp_ground_states"), real_table("mp_20", "train")
    for f in ("EuTaO3", "EuCoO3"):
        own = dft_hull.cores(evidence.hull_symbols(f))
        assert all(dft_hull.cores(cell[1]) in ({}, own) for _, cell in dft_hull.products(evidence.hull_symbols(f)))


def test_a_polymorph_of_an_earlier_search_is_none(monkeypatch):
    cells = {"KTaSe3": [CUBE, FORMULA, []], "KTaSe3-polymorph": [CUBE, FORMULA, []]}
    monkeypatch.setattr(dft, "load", lambda name, profile: {"cell": cells[name], "gap": {}})
    for same in (True, False):
        monkeypatch.setattr(dft_store, "same_crystal", lambda a, b, same=same: same)
        found = dft_hull.results_of("KTaSe3")
        assert found["cubic"] and (found["repaired"] is not None) == same


def test_claims_name_cell_theory_and_reference():
    found = {"BaHfSe3": {"products": [], "cubic": 55.0, "repaired": 12.0}, "KSnI3": {"products": [], "cubic": 40.0}}
    claims = dft_hull.claims_of(found, "PBE")
    value = {k: c["value"] for k, c in claims.items()}
    assert value == {"ts1.bahfse3.ehull_dft": 55.0, "ts2.bahfse3.ehull": 12.0, "ts1.ksni3.ehull_dft": 40.0}
    assert claims["ts2.bahfse3.ehull"]["split"] == "polymorph (PBE, products of the list)"
    below = dft_hull.claims_of({"BaHfSe3": {"products": [], "cubic": -12.4}}, "PBE")["ts1.bahfse3.ehull_dft"]
    assert below == {"value": 0.0, "split": "cubic cell (PBE, products of the list, 12 meV/atom below them)", "undecided": False}
    chosen = {"TmMnSe3": {"products": [], "repaired": 44.0}}                                # the paper has 41
    for above, undecided in ((31.0, True), (2.0, False)):
        claim = dft_hull.claims_of(chosen, "PBE", {"TmMnSe3": above})["ts2.tmmnse3.ehull"]
        assert claim["undecided"] == undecided and f"{above:.0f} above the lowest" in claim["split"] and claim["value"] == 44.0


def test_the_stored_table_follows_from_the_stored_energies():
    for profile, least in (("quick", 3), ("paper", 1), ("oxide", 1)):
        run = dft_hull.stored(profile)
        names = [f for f in run["curve"] if f"{f}_cubic" in run["metrics"]]
        assert len(names) >= least
        for f in names:
            hull_energy = sum(x * dft.load(f"{p}-phase", profile)["energy_per_atom"] for x, p in run["curve"][f])
            cubic = dft.load(dft_hull.cubic_names()[f], profile)["energy_per_atom"]
            assert 1000 * (cubic - hull_energy) == pytest.approx(run["metrics"][f"{f}_cubic"], abs=0.01)
    table = dft_hull.table()
    assert set(table["material"]) == set(dft_hull.cubic_names()) and evidence.POTENTIAL in table.columns[3]


def test_the_figure_draws_what_the_table_holds():
    import matplotlib
    matplotlib.use("Agg")
    table = dft_hull.table()
    left, right = plots_physics.hull_distances(table).axes
    drawn = {line.get_label(): line for line in left.get_lines()}
    x = drawn["here, PBE"].get_xdata()
    assert np.allclose(x[~np.isnan(x)], table["DFT, cubic"].dropna()) and "paper, eSEN" in drawn
    assert [t.get_text() for t in left.get_yticklabels()] == list(table["material"]) and "repaired" in right.get_title()


def test_oxides_are_answered_with_the_higher_cutoff_and_others_are_not():
    for profile in ("quick", "paper", "oxide"):
        answered = {name.split(".")[1] for name in dft_hull.stored(profile)["claims"]}
        assert all(("o3" in f) == (profile == "oxide") and profile != "paper" for f in answered)
    assert dft_hull.stored()["claims"] and [dft_hull.claimed(f) for f in ("YbTaO3", "YbCoSe3")] == ["oxide", "quick"]
    both = dft_hull.convergence().set_index("material")
    assert abs(both["quick"] - both["better settings"])["BaHfSe3"] < 15


def test_oxides_have_rough_equations_of_state_at_the_low_cutoff():
    rough = {f: physics_tables.eos_residual(r) for f in dft.FIGURE4 + dft.REST if (r := dft.load(f, "quick")) and r.get("eos")}
    assert min(rough[f] for f in ("YbTaO3", "EuTaO3", "EuCoO3")) > 2 * max(v for f, v in rough.items() if not f.endswith("O3"))


def test_a_listed_phase_that_mp20_lacks_has_the_cell_of_a_relative(phases, monkeypatch, tmp_path):
    said = {0: ("ok", -2.0), 1: ("ok", -3.0), 2: ("failed: no", None)}
    told = iter(said.values())

    def fake(cell, calculator, start):
        status, energy = next(told)
        return {"status": status, "energy_per_atom": energy, "lattice": cell[0], "symbols": cell[1], "frac": cell[2]}

    monkeypatch.setattr(dft_hull, "PHASES", tmp_path)
    monkeypatch.setattr(dft_hull, "SUBSTITUTED", {"SrTe2": ("BaSe2", "HfSe2", "HfSe2")})
    monkeypatch.setattr(dft_hull, "relax", fake)
    monkeypatch.setattr(dft_hull, "get_calculator", lambda *a: None)
    assert dft_hull.substitute("SrTe2") == {"BaSe2": -2.0, "HfSe2": -3.0}
    key = hull.reduced(["Sr", "Te", "Te"])
    assert key in dft_hull.known_cells() and sorted(dft_hull.known_cells()[key][1]) == ["Sr", "Te", "Te"]
    (tmp_path / "BaSe.cif").write_text((tmp_path / "SrTe2.cif").read_text())
    dft_hull.known_cells.cache_clear()
    assert dft_hull.known_cells()[hull.reduced(["Ba", "Se"])] is PHASES[0]                   # MP-20's own cell comes first


def test_a_phase_that_fits_no_relative_is_named(phases, monkeypatch, tmp_path):
    monkeypatch.setattr(dft_hull, "PHASES", tmp_path)
    monkeypatch.setattr(dft_hull, "SUBSTITUTED", {"SrTe2": ("HfSe2",)})
    monkeypatch.setattr(dft_hull, "relax", lambda *a: {"status": "not converged", "energy_per_atom": -1.0})
    monkeypatch.setattr(dft_hull, "get_calculator", lambda *a: None)
    with pytest.raises(hull.HullError, match="SrTe2: none of HfSe2 relaxes with sevennet-0"):
        dft_hull.substitute("SrTe2")
    assert not list(tmp_path.iterdir())


def test_a_cobalt_spinel_starts_antiferromagnetic_on_its_tetrahedra():
    pymatgen = pytest.importorskip("pymatgen.core")
    spinel = pymatgen.Structure.from_spacegroup("Fd-3m:2", pymatgen.Lattice.cubic(8.08), ["Co", "Co", "O"],
                                                [[1 / 8, 1 / 8, 1 / 8], [1 / 2, 1 / 2, 1 / 2], [0.2633] * 3]).get_primitive_structure()
    cell = [*spinel.lattice.abc, *spinel.lattice.angles], [e.symbol for e in spinel.species], spinel.frac_coords
    moments = dft_hull.spinel_moments(cell)
    assert len(moments) == 14 and sorted(moments) == [-3.0] + [0.0] * 12 + [3.0]
    assert {e for e, m in zip(cell[1], moments) if m} == {"Co"}


def test_a_distorted_phase_goes_back_on_its_sites(monkeypatch):
    pymatgen = pytest.importorskip("pymatgen.core")
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
    cubic = pymatgen.Structure.from_spacegroup("Fm-3m", pymatgen.Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    bent = cubic.copy()
    bent.translate_sites([0], [0.004, 0.002, 0.0])
    assert SpacegroupAnalyzer(bent, symprec=0.01).get_space_group_number() < 225
    cell = [*bent.lattice.abc, *bent.lattice.angles], [e.symbol for e in bent.species], bent.frac_coords
    monkeypatch.setattr(dft_hull, "mp20_cells", lambda: {hull.whole_of("NaCl"): cell})
    monkeypatch.setattr(dft_hull, "IDEAL", {"NaCl": 0.1, "KCl": 0.1})
    dft_hull.known_cells.cache_clear()
    found = dft_hull.known_cells()[hull.whole_of("NaCl")]
    dft_hull.known_cells.cache_clear()
    back = dft_hull.to_structure(*found)
    assert len(found[1]) == 2 and SpacegroupAnalyzer(back, symprec=1e-5).get_space_group_number() == 225
    assert back.volume * 4 == pytest.approx(bent.volume, rel=1e-3)


def test_a_profile_without_results_has_no_run_file(monkeypatch):
    """Whoever has calculated with one profile alone can still state its claims."""
    monkeypatch.setattr(dft_hull, "places", lambda profile: {"KTaSe3": {"products": []}})
    monkeypatch.setattr(dft_hull.results, "write_run", lambda *a, **k: pytest.fail("nothing to write"))
    assert dft_hull.write("oxide") is None
