"""Energy above hull: against pymatgen on a known system, corrections that are recovered, references that are missing."""

import json

import numpy as np
import pytest

from meidnet_core import hull, potentials, relax, results, sources, stability
from meidnet_core.hull import HullError

# eV/atom: a made-up system Li-O with one ternary-free hull: Li2O (-2.0) on it, LiO (-1.4) above it
ELEMENTS = {"Li": -1.9, "O": -4.9, "Sr": -1.7, "Ti": -7.8, "V": -9.0, "Br": -1.6}
LISTED = {"Li2O1": -2.0, "Li1O1": -1.4, "Sr1O1": -3.0, "Ti1O2": -3.4, "Sr1Ti1O3": -3.55}


@pytest.fixture
def table(monkeypatch):
    import re
    parsed = [{e: int(n) for e, n in re.findall(r"([A-Z][a-z]?)(\d+)", f)} for f in LISTED]
    found = list(LISTED), parsed, np.array(list(LISTED.values())), hull._index(parsed)
    monkeypatch.setattr(hull, "ground_states", lambda: found)
    monkeypatch.setattr(hull, "elemental_energies", lambda: ELEMENTS)
    hull.list_diagram.cache_clear()
    yield
    hull.list_diagram.cache_clear()


def row(symbols, formation, status="ok"):
    """A relaxed row whose formation energy (uncorrected) is given."""
    x = hull.composition_of(symbols)
    return {"symbols": symbols, "status": status, "energy_per_atom": formation + sum(v * ELEMENTS[e] for e, v in x.items())}


def test_distance_to_the_hull_by_hand(table):
    none = np.zeros(len(hull.TERMS))
    on = hull.e_above_hull(row(["Li", "Li", "O"], -2.0), none)
    assert on["e_above_hull"] == pytest.approx(0, abs=1e-9) and on["formation_energy"] == pytest.approx(-2.0)
    # LiO decomposes into Li2O and O: 3/4 of the atoms at -2.0, 1/4 at 0
    above = hull.e_above_hull(row(["Li", "O"], -1.4), none)
    assert above["e_above_hull"] == pytest.approx(-1.4 + 0.75 * 2.0) and above["decomposition"] == "0.75 Li2O + 0.25 O2"
    assert hull.e_above_hull(row(["Li", "Li", "O"], -2.3), none)["e_above_hull"] == pytest.approx(-0.3), "below all that is known"


def test_distance_agrees_with_pymatgen(table):
    from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
    from pymatgen.core import Composition
    entries = [PDEntry(Composition(e), 0) for e in ("Sr", "Ti", "O")]
    entries += [PDEntry(Composition(f), v * Composition(f).num_atoms) for f, v in LISTED.items() if "Li" not in f]
    expected = PhaseDiagram(entries).get_e_above_hull(PDEntry(Composition("SrTiO3"), 5 * -3.50))
    got = hull.e_above_hull(row(["Sr", "Ti", "O", "O", "O"], -3.50), np.zeros(len(hull.TERMS)))["e_above_hull"]
    assert got == pytest.approx(expected) and expected == pytest.approx(0.05)


def test_a_failed_relaxation_has_no_distance(table):
    found = hull.e_above_hull({"symbols": ["Li", "O"], "status": "exploded: volume x 9", "energy_per_atom": None}, None)
    assert np.isnan(found["e_above_hull"]) and found["decomposition"].startswith("exploded")


def test_sites_of_a_formula():
    assert hull.sites_in("CsPbI3") == ("Cs", "Pb", "I") and hull.sites_in("YbScSe3") == ("Yb", "Sc", "Se")
    with pytest.raises(HullError, match="'Sr2TiO4' is no formula ABX3"):
        hull.sites_in("Sr2TiO4")


def test_an_element_without_reference_is_named(table):
    with pytest.raises(HullError, match="no elemental reference for Og"):
        hull.formation_energy(-1.0, ["Li", "Og"])


def test_terms_know_oxides_and_plus_u():
    at = lambda symbols: dict(zip(hull.TERMS, hull.terms(symbols)))
    oxide, sulphide = at(["Sr", "V", "O", "O", "O"]), at(["Sr", "V", "S", "S", "S"])
    assert oxide["O"] == pytest.approx(0.6) and oxide["V+U"] == pytest.approx(0.2)
    assert sulphide["S"] == pytest.approx(0.6) and sulphide["V+U"] == 0, "+U only beside O and F"
    assert not hull.terms(["Fe", "Ni"]).any() and at(["S", "O", "O"])["O"] > 0


def test_what_counts_as_an_anion():
    at = lambda symbols: dict(zip(hull.TERMS, hull.terms(symbols)))
    assert at(["Nd", "F", "S"])["F"] > 0 == at(["Nd", "F", "S"])["S"], "a known limit: S lies more than 0.9 below F"
    assert at(["Ba", "Ti", "O", "O", "H"])["H"] == 0 < at(["Li", "H"])["H"] and at(["Ba", "S", "O", "O", "O", "O"])["S"] > 0
    assert all(at(["Au", "W", x, x, x])[x] == pytest.approx(0.6) for x in hull.CORRECTED), "one X always counts"


def test_fit_recovers_corrections_despite_outliers():
    rng, symbols = np.random.default_rng(0), []
    for _ in range(300):
        symbols.append([rng.choice(["Sr", "K", "V", "W"]), rng.choice(["Ti", "Nb", "V"]), *[rng.choice(["O", "S", "F", "Br"])] * 3])
    true = np.array([{"O": 0.7, "S": 0.6, "F": 0.5, "V+U": 1.7, "W+U": 4.4}.get(t, 0.0) for t in hull.TERMS])
    listed = rng.normal(-2, 1, 300)
    energy = listed + np.array([hull.terms(s) @ true for s in symbols]) + rng.normal(0, 0.003, 300)
    energy[:30] += 1.0                                               # single phases in which potential and list disagree
    found = dict(zip(hull.TERMS, hull.fit(symbols, energy, listed)))
    for term, value in zip(hull.TERMS, true):
        assert found[term] == pytest.approx(value, abs=0.05), term
    assert dict(zip(hull.TERMS, hull.fit(symbols, energy, listed, fewest=301)))["O"] == 0, "too few to rest on"


def test_corrections_that_were_never_fitted(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(HullError, match="stability fit --potential chgnet"):
        hull.corrections("chgnet")
    (tmp_path / "hull-fit").mkdir()
    (tmp_path / "hull-fit" / "chgnet.json").write_text(json.dumps({"metrics": {f"correction_{t}": k for k, t in enumerate(hull.TERMS)}}))
    assert hull.corrections("chgnet").tolist() == list(range(len(hull.TERMS)))


def test_auto_places_with_the_best_potential_that_was_fitted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(potentials, "present", lambda name: name in ("sevennet-l3i5", "sevennet-0", "chgnet"))
    with pytest.raises(HullError, match="auto: no potential.*stability fit --potential sevennet-l3i5"):
        stability.placing("auto")
    (tmp_path / "hull-fit").mkdir()
    zero = json.dumps({"metrics": {f"correction_{t}": 0 for t in hull.TERMS}})
    for name in ("mace-omat-0", "chgnet", "sevennet-0"):                                       # the first is not here
        (tmp_path / "hull-fit" / f"{name}.json").write_text(zero)
    assert stability.placing("auto") == "sevennet-0" and potentials.pick("auto") == "sevennet-l3i5"
    assert capsys.readouterr().out == ("placed on the list hull with sevennet-0 (sevennet-l3i5, the best that is present, has no "
                                       "corrections for this hull)\n")
    assert stability.placing("chgnet") == "chgnet" and not capsys.readouterr().out
    used, none = [], {s: [] for s in relax.STARTS}
    monkeypatch.setattr(relax, "relax_all", lambda cells, path, potential, *a: used.append((path.name, potential)) or none)
    stability.placed([], "auto")
    assert used == [("notebook-sevennet-0.jsonl", "sevennet-0")]
    (tmp_path / "hull-fit" / "sevennet-l3i5.json").touch()
    capsys.readouterr()
    assert stability.placing("auto") == "sevennet-l3i5" and capsys.readouterr().out == "placed on the list hull with sevennet-l3i5\n"


def test_the_real_list_puts_known_ground_states_on_its_hull():
    """Elements and energies as stored: what is listed and stable lies at 0, SrTiO3 within 10 meV/atom, as it must with a potential."""
    assert abs(results.read_run("hull-fit", stability.DEFAULT)["metrics"]["srtio3_e_above_hull"]) < 0.010
    try:
        known, reference = hull.listed(), hull.elemental_energies()
    except sources.MissingTable as missing:
        pytest.skip(str(missing))
    assert len(known) > 80_000 and len(reference) > 80
    for formula in ("SrTiO3", "BaTiO3", "KMgF3", "NaCl", "MgO", "CsPbBr3"):
        symbols = [e for e, n in hull.whole_of(formula) for _ in range(n)]
        energy = known[hull.reduced(symbols)] + sum(x * reference[e] for e, x in hull.composition_of(symbols).items())
        found = hull.e_above_hull({"symbols": symbols, "status": "ok", "energy_per_atom": energy}, np.zeros(len(hull.TERMS)))
        assert abs(found["e_above_hull"]) < (0.010 if formula == "SrTiO3" else 1e-6), formula
        higher = hull.above(hull.list_diagram(frozenset(symbols)), symbols, found["formation_energy"] + 0.05)[0]
        assert higher == pytest.approx(found["e_above_hull"] + 0.05)


def test_hull_of_the_potentials_own(table, tmp_path, monkeypatch):
    cell = lambda symbols: (np.array([4.0] * 3 + [90.0] * 3), symbols, np.zeros((len(symbols), 3)))
    known = [cell(["Li"]), cell(["Li", "Li", "O"])]
    labels = np.array([[0, 0, 0.0], [-2, 5, 0.0]])
    monkeypatch.setattr(hull, "known_phases", lambda: (known, labels, [frozenset(c[1]) for c in known]))
    energies = {1: -2.0, 3: -5.0}
    answer = lambda cells, path, potential, **o: {"ideal": [{"symbols": c[1], "energy_per_atom": energies[len(c[1])]} for c in cells]}
    monkeypatch.setattr(relax, "relax_all", answer)
    diagram = hull.self_diagram({"Li", "O"}, tmp_path / "x.jsonl", "sevennet-0")      # O is not in MP-20: its DFT energy stands in
    assert {e.composition.reduced_formula for e in diagram.all_entries} == {"Li", "Li2O", "O2"}
    got = hull.self_above({"symbols": ["Li", "O"], "energy_per_atom": -4.5}, diagram)
    assert got == pytest.approx(-4.5 - (0.75 * -5.0 + 0.25 * -4.9))
    rows = [{"symbols": ["Li", "O"], "energy_per_atom": -4.5}, {"symbols": ["Li", "O"], "energy_per_atom": None}]
    one, none = stability.above_own(rows, "sevennet-0", processes=1)
    assert one == pytest.approx(got) and np.isnan(none)


def test_a_hull_without_one_of_its_phases_is_refused(table, tmp_path, monkeypatch, capsys):
    phases = [{"symbols": ["Li"], "energy_per_atom": -2.0, "status": "ok"},
              {"symbols": ["Li", "Li", "O"], "energy_per_atom": None, "status": "exploded: volume x 9"}]
    monkeypatch.setattr(hull, "competing", lambda *a: [])
    monkeypatch.setattr(relax, "relax_all", lambda *a, **o: {"ideal": phases})
    with pytest.raises(HullError, match=r"hull of Li-O: no energy for Li2O \(exploded: volume x 9\)"):
        hull.self_diagram({"Li", "O"}, tmp_path / "x.jsonl", "sevennet-0")
    assert np.isnan(stability.above_own([{"symbols": ["Li", "O"], "energy_per_atom": -4.5}], "sevennet-0")).all()
    assert "Li2O" in capsys.readouterr().out


def test_api_needs_a_key_and_corrects_the_candidate(monkeypatch):
    monkeypatch.delenv("MP_API_KEY", raising=False)
    candidate = {"symbols": ["Li", "Li", "O"], "energy_per_atom": -4.5, "lattice": [4.0, 4.0, 4.0, 90, 90, 90],
                 "frac": [[0, 0, 0], [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]]}
    with pytest.raises(HullError, match="MP_API_KEY"):
        hull.api_above(candidate)
    from pymatgen.entries.computed_entries import ComputedEntry

    class Client:
        def get_entries_in_chemsys(self, elements, additional_criteria=None):
            assert elements == ["Li", "O"] and additional_criteria == {"thermo_types": ["GGA_GGA+U"]}, "the default mixes r2SCAN in"
            return [ComputedEntry("Li", -1.9), ComputedEntry("O", -4.9), ComputedEntry("Li2O", 3 * -4.8)]

    oxide = -0.687 / 3                                               # MP2020: oxide, per O
    assert hull.api_above(candidate, client=Client()) == pytest.approx(-4.5 + oxide + 4.8, abs=1e-3)
    assert hull.api_above(candidate | {"potential": "sevennet-0"}, client=Client()) == pytest.approx(-4.5 + oxide + 4.8, abs=1e-3)
    assert hull.api_above(candidate | {"potential": "chgnet"}, client=Client()) == pytest.approx(-4.5 + 4.8, abs=1e-3), "has them already"


def test_a_formula_of_parts_of_atoms_is_refused():
    with pytest.raises(hull.HullError, match="Li0.5CoO2: amounts that are no whole numbers"):
        hull.whole_of("Li0.5CoO2")
