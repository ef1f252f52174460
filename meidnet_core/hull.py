"""Energy above the convex hull of a relaxed crystal, with pymatgen's PhaseDiagram and three references.

list: Materials Project ground states (Bartel et al. 2020), DFT with the corrections of that time. A potential trained on
    uncorrected PBE energies lies on another scale: what separates the two is fitted per element on MP-20 (`fit`).
api: the Materials Project through mp-api, with MP2020 corrections applied to the candidate.
self: competing phases of MP-20 relaxed with the same potential, elements included; no correction is needed.
"""

import gzip
import json
import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import crystal
from .sources import mirror

CORRECTED = ("O", "S", "F", "Cl", "N", "H", "Br", "I", "Se", "Te")                     # anions: a term per atom
HUBBARD = ("V", "Cr", "Mn", "Fe", "Co", "Ni", "Mo", "W")                              # with +U in oxides and fluorides
TERMS = CORRECTED + tuple(f"{m}+U" for m in HUBBARD)


class HullError(ValueError):
    """A hull cannot be built; the message says what is missing."""


def composition_of(symbols):
    """{symbol: fraction} of a list of symbols."""
    return {e: symbols.count(e) / len(symbols) for e in sorted(set(symbols))}


def whole(counts):
    """{symbol: n} as a sorted tuple with the smallest whole counts: the same for every way of writing a formula."""
    divisor = np.gcd.reduce(list(counts.values()))
    return tuple(sorted((e, int(n // divisor)) for e, n in counts.items()))


def reduced(symbols):
    """`whole` of a list of symbols."""
    return whole({e: symbols.count(e) for e in set(symbols)})


def whole_of(formula):
    """`whole` of a formula, or of a pymatgen Composition. HullError for amounts that are no whole numbers."""
    from pymatgen.core import Composition
    found = {e.symbol: float(n) for e, n in Composition(formula).items()}
    if not all(n.is_integer() for n in found.values()):
        raise HullError(f"{formula}: amounts that are no whole numbers")
    return whole({e: int(n) for e, n in found.items()})


def sites_in(formula):
    """("A", "B", "X") of a formula ABX3 in that order; HullError when it is none."""
    found = re.fullmatch(r"([A-Z][a-z]?)([A-Z][a-z]?)([A-Z][a-z]?)3", formula)
    if not found:
        raise HullError(f"{formula!r} is no formula ABX3")
    return found.groups()


# ---- elemental references and corrections -------------------------------------------------------

@lru_cache(None)
def elemental_energies():
    """{symbol: eV/atom} of the elements in their Materials Project ground states, uncorrected PBE."""
    path = mirror("hull", "mp_elemental_reference_entries", ".json.gz")
    table = json.loads(gzip.decompress(path.read_bytes()))
    return {e: d["energy"] / sum(d["composition"].values()) for e, d in table.items()}


def formation_energy(energy_per_atom, symbols, correction=None):
    """eV/atom: energy of a potential minus the elements (DFT, uncorrected), minus the fitted correction when one is given.

    HullError for an element without a reference.
    """
    fractions, reference = composition_of(list(symbols)), elemental_energies()
    missing = [e for e in fractions if e not in reference]
    if missing:
        raise HullError(f"no elemental reference for {', '.join(missing)}")
    plain = energy_per_atom - sum(x * reference[e] for e, x in fractions.items())
    return plain - (sum(c * v for c, v in zip(terms(symbols), correction)) if correction is not None else 0.0)


def terms(symbols):
    """(T,) how much of each correction a crystal carries: fraction of each anion, of each +U metal beside O or F."""
    x = composition_of(list(symbols))
    hubbard = "O" in x or "F" in x
    anions = [x.get(e, 0.0) if _is_anion(e, x) else 0.0 for e in CORRECTED]
    return np.array(anions + [x.get(m, 0.0) * hubbard for m in HUBBARD])


def _is_anion(e, fractions):
    """The electronegativity (Pauling) of the element lies at most 0.9 below the largest one of the crystal.

    The rule that the stored corrections were fitted with, not a chemist's: a weaker anion beside one that is stronger by more is not
    counted (S in NdFS, H in an oxyhydride), and such a crystal is off by its correction; S of a sulphate or N of a nitrate is counted.
    ABX3 of two metals and one X is not affected: its X always counts.
    """
    chi = crystal.electronegativities()
    return len(fractions) > 1 and chi[crystal.atomic_number(e)] >= max(chi[crystal.atomic_number(o)] for o in fractions) - 0.9


def fit(symbols, energies, listed, fewest=1):
    """Corrections (T,) in eV per atom of each term: least absolute deviations of energies - listed over terms, (M,) each in eV/atom.

    Least absolute deviations by reweighting: single phases in which potential and list disagree must not bend the fit.
    A term that fewer than `fewest` crystals carry is left at zero.
    """
    x, y = np.array([terms(s) for s in symbols]), np.asarray(energies) - np.asarray(listed)
    x = x * ((x > 0).sum(0) >= fewest)
    w, ridge = np.ones(len(y)), 1e-4 * np.eye(x.shape[1])
    for _ in range(50):
        c = np.linalg.solve(x.T @ (w[:, None] * x) + ridge, x.T @ (w * y))
        w = 1 / np.maximum(np.abs(y - x @ c), 0.01)
    return c


# ---- list ---------------------------------------------------------------------------------------

@lru_cache(None)
def ground_states():
    """(formulas, list of {symbol: count}, formation energies (M,) eV/atom, {symbol: row numbers}) of the list."""
    import pandas as pd
    table = pd.read_csv(mirror("hull", "mp_ground_states"))
    parsed = [{e: int(n) for e, n in re.findall(r"([A-Z][a-z]?)(\d+)", f)} for f in table.formula]
    return list(table.formula), parsed, table.formation_energy_per_atom.to_numpy(), _index(parsed)


def _index(parsed):
    rows = {}
    for i, counts in enumerate(parsed):
        rows.setdefault(frozenset(counts), []).append(i)
    return rows


@lru_cache(None)
def listed():
    """{`whole` of a formula: formation energy (eV/atom)} of the list."""
    _, parsed, energy, _ = ground_states()
    return {whole(p): e for p, e in zip(parsed, energy)}


@lru_cache(4096)
def list_diagram(elements, only=None):
    """PhaseDiagram of a chemical system (frozenset of symbols) from the list; elements at 0. only: frozenset of `whole`s to keep."""
    from itertools import combinations

    from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
    from pymatgen.core import Composition
    _, parsed, energy, rows = ground_states()
    entries = [PDEntry(Composition(e), 0.0) for e in elements]
    for n in range(2, len(elements) + 1):
        for part in combinations(sorted(elements), n):
            for i in rows.get(frozenset(part), ()):
                if only is not None and whole(parsed[i]) not in only:
                    continue
                c = Composition(parsed[i])
                entries.append(PDEntry(c, energy[i] * c.num_atoms))
    return PhaseDiagram(entries)


def above(diagram, symbols, energy):
    """(e_above_hull eV/atom, decomposition as text); energy per atom on the diagram's scale. Negative below all known phases."""
    from pymatgen.analysis.phase_diagram import PDEntry
    from pymatgen.core import Composition
    composition = Composition({e: symbols.count(e) for e in set(symbols)})
    products, value = diagram.get_decomp_and_e_above_hull(PDEntry(composition, energy * len(symbols)), allow_negative=True)
    return float(value), " + ".join(f"{x:.2f} {p.composition.reduced_formula}" for p, x in products.items())


def fit_file(potential):
    """Path of what `python -m meidnet_core.stability fit` stores of a potential, there or not."""
    from . import results
    return results.RESULTS / "hull-fit" / f"{potential}.json"


def corrections(potential):
    """(T,) stored by `python -m meidnet_core.stability fit`; HullError when this potential was never fitted."""
    if not fit_file(potential).exists():
        raise HullError(f"no corrections for {potential}: run `python -m meidnet_core.stability fit --potential {potential}`")
    m = json.loads(fit_file(potential).read_text())["metrics"]
    return np.array([m[f"correction_{t}"] for t in TERMS])


def e_above_hull(row, correction):
    """A row of relax.relax -> {formation_energy, e_above_hull, decomposition} on the list hull; NaN for a row without energy."""
    if row["status"] not in ("ok", "not converged"):
        return {"formation_energy": np.nan, "e_above_hull": np.nan, "decomposition": row["status"]}
    symbols = list(row["symbols"])
    formation = formation_energy(row["energy_per_atom"], symbols, correction)
    value, products = above(list_diagram(frozenset(symbols)), symbols, formation)
    return {"formation_energy": formation, "e_above_hull": value, "decomposition": products}


# ---- self-consistent: MP-20 phases relaxed with the same potential ------------------------------

@lru_cache(None)
def known_phases():
    """(cells, labels (M, 3): formation energy, gap, e_above_hull; element sets) of MP-20, all splits."""
    from . import data, matching
    columns = ("formation_energy_per_atom", "band_gap", "e_above_hull")
    sets = [data.load("mp_20", s, labels=columns) for s in data.SPLITS]
    cells = [c for s in sets for c in matching.true_cells(s)]
    return cells, np.concatenate([s.labels for s in sets]), [frozenset(c[1]) for c in cells]


def competing(elements, limit=0.05):
    """Cells of MP-20 in a chemical system that lie at most `limit` eV/atom above the DFT hull, or whose distance is unknown."""
    cells, labels, systems = known_phases()
    return [c for c, l, s in zip(cells, labels, systems) if s <= frozenset(elements) and not l[2] > limit]


def self_diagram(elements, path, potential, limit=0.05, **options):
    """PhaseDiagram in total energies of one potential; phases (of `competing`) are relaxed once and kept in `path`.

    Elements that MP-20 lacks come from the uncorrected DFT references. HullError naming the phases without an energy: a hull that
    lacks them would lie too high.
    """
    from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
    from pymatgen.core import Composition

    from .relax import relax_all
    rows = relax_all(competing(elements, limit), path, potential, **options)["ideal"]
    entries, failed = [], []
    for r in rows:
        composition = Composition("".join(r["symbols"]))
        if r["energy_per_atom"] is None:
            failed.append(f"{composition.reduced_formula} ({r['status']})")
        else:
            entries.append(PDEntry(composition, r["energy_per_atom"] * len(r["symbols"])))
    if failed:
        raise HullError(f"hull of {'-'.join(sorted(elements))}: no energy for {', '.join(failed)}")
    have = {e.composition.elements[0].symbol for e in entries if e.is_element}
    entries += [PDEntry(Composition(e), elemental_energies()[e]) for e in elements if e not in have]
    return PhaseDiagram(entries)


def self_above(row, diagram):
    """e_above_hull (eV/atom) of a relaxed row on a hull of the same potential; NaN for a row without energy."""
    if row["energy_per_atom"] is None:
        return np.nan
    return above(diagram, list(row["symbols"]), row["energy_per_atom"])[0]


# ---- Materials Project API ----------------------------------------------------------------------

def api_above(row, key=None, client=None):
    """e_above_hull (eV/atom) against the Materials Project of today, GGA and GGA+U with MP2020 corrections.

    A row of one of potentials.CORRECTED has these in its energy already. key: MP_API_KEY of the environment by default; HullError
    without one. client: an open MPRester (tests).
    """
    from pymatgen.analysis.phase_diagram import PhaseDiagram
    from pymatgen.entries.compatibility import MaterialsProject2020Compatibility

    from .potentials import CORRECTED
    key = key or os.environ.get("MP_API_KEY")
    if client is None:
        if not key:
            raise HullError("the Materials Project hull needs a key: set MP_API_KEY (https://materialsproject.org/api)")
        from mp_api.client import MPRester
        client = MPRester(key)
    scale = {"thermo_types": ["GGA_GGA+U"]}                           # the default mixes r2SCAN in
    entries = client.get_entries_in_chemsys(sorted(set(row["symbols"])), additional_criteria=scale)
    corrected = row.get("potential") in CORRECTED
    scheme = MaterialsProject2020Compatibility(check_potcar=False)
    mine = [_as_entry(row)] if corrected else scheme.process_entries([_as_entry(row)], verbose=False)
    if not mine:
        raise HullError(f"{''.join(row['symbols'])}: MP2020 corrections do not apply")
    return float(PhaseDiagram(entries).get_decomp_and_e_above_hull(mine[0], allow_negative=True)[1])


U_VALUES = {"Co": 3.32, "Cr": 3.7, "Fe": 5.3, "Mn": 3.9, "Mo": 4.38, "Ni": 6.2, "V": 3.25, "W": 6.2}


def _as_entry(row):
    """ComputedStructureEntry of a relaxed row, as if computed by the Materials Project: +U for the metals of HUBBARD beside O, F."""
    from pymatgen.entries.computed_entries import ComputedStructureEntry
    symbols = list(row["symbols"])
    hubbards = {e: U_VALUES[e] for e in set(symbols) & set(HUBBARD)} if set(symbols) & {"O", "F"} else {}
    structure = crystal.to_structure(row["lattice"], symbols, row["frac"])
    return ComputedStructureEntry(structure, row["energy_per_atom"] * len(symbols), parameters={
        "run_type": "GGA+U" if hubbards else "GGA", "hubbards": hubbards, "is_hubbard": bool(hubbards), "potcar_symbols": []})


def default_path(potential, what):
    """Where relaxed phases of this machine are kept, git-ignored."""
    from . import results
    return Path(results.ROOT) / "runs" / "relaxed" / f"{what}-{potential}.jsonl"
