"""Soft-mode repair: a compact genetic algorithm on VibroML's genes that looks for the polymorph below an unstable crystal.

As in the paper (Dynamical stability evaluation): structures are displaced along unstable eigenvectors (displacement scale, coupling
of modes, phase, supercell, three cell scales, three angles) and relaxed; fitness is the relaxed energy per atom; selection by
tournament, crossover, mutation; the search is refreshed with the soft modes of its most promising candidate. From the three lowest
polymorphs without soft modes the most symmetric one is taken.

    python -m meidnet_core.repair KTaSe3 LaScSe3 --potential sevennet-0 --generations 19 --minutes 8 --seed 0
    python -m meidnet_core.repair SrTiO3 --lattice 3.905          # under the pressure that gives the cubic cell its measured size
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np

from . import phonons, relax
from .genes import SMALL, cell_of, child_of, random_genes, starters
from .ledger import Ledger

FMAX, STEPS = 0.05, 50         # eV/angstrom: every individual; the most promising ones are polished to relax.FMAX
TOURNAMENT = 3
EVERY = 7                      # generations between two refreshes
KEPT = 8                       # soft modes kept of a base that is itself a product of the search
SAME = 0.0003                  # eV/atom; closer energies may be one polymorph (those of SrTiO3 lie 1 meV apart)
SETTLED = 8                    # lowest individuals that are relaxed to the end before they are ranked
SYMPRECS = (0.3, 0.1, 0.03)    # angstrom; the most symmetric cell whose relaxed energy is no higher is taken
CHECKED, LOWEST, ROUNDS = 4, 3, 3                      # polymorphs with phonons; stable ones to choose from; rounds after the search
LENGTHS = (9.0, 14.0)          # angstrom, least edge of the supercell for phonons of a polymorph: at first, and when in doubt
LARGEST = 170                  # atoms of a supercell for phonons, after the first
SHARE = 0.7                    # of the minutes, for the search; the rest is phonons


def engine(potential, batch=None, wrap=lambda calculator: calculator):
    """(calculator, evaluate of individuals, settle of the lowest ones) of a potential, where relax.place puts it.

    On a GPU SevenNet relaxes `batch` cells side by side. On a CPU one by one is the default: there the time goes into the atoms, however
    they are grouped, and a batch gains nothing. Phonons go one by one anywhere. wrap: puts another calculator around one (pressure).
    PotentialError for a batch of a potential that cannot be batched.
    """
    from .potentials import get_calculator
    device, size = relax.place(potential, "auto", batch)
    calculator, kinds = wrap(get_calculator(potential, device)), ((FMAX, STEPS), (relax.FMAX, 2 * STEPS))
    if not size:
        return calculator, *(relax.serial(calculator, *kind) for kind in kinds)
    own = get_calculator(potential, device)                                  # batches change the network: phonons need the other one
    return calculator, *(relax.side_by_side(own, size, *kind, wrap) for kind in kinds)


def _modes(ph, most=None):
    return [m | {"eigenvector": [np.round(m["eigenvector"].real, 6).tolist(), np.round(m["eigenvector"].imag, 6).tolist()]}
            for m in phonons.soft_modes(ph)[:most]]


def _base(cell, modes):
    """Base of a search from the JSON form of modes."""
    return {"cell": cell, "modes": [m | {"eigenvector": np.array(m["eigenvector"][0]) + 1j * np.array(m["eigenvector"][1])} for m in modes]}


def examine(cell, calculator, polish=True):
    """Polish, symmetrise, phonons -> row of relax.relax with spacegroup, symprec, lowest, lowest_exact (THz), modes; failures labelled."""
    row = relax.relax(cell, calculator, "ideal", relax.FMAX, 150 if polish else 0)
    if "lattice" not in row:
        return row
    try:
        row = _symmetric(row, calculator) if polish else row | {"symprec": phonons.SYMPREC}
        cell, ph = relax.cell_from(row), None
        for size in _sizes(cell) if polish else [(2, 2, 2)]:
            ph = phonons.phonopy_of(cell, calculator, size)
            exact = min(phonons.lowest_exact(ph), row.get("lowest_exact", np.inf))
            row |= {"lowest": round(phonons.lowest(ph), 4), "lowest_exact": round(exact, 4), "supercell": list(size)}
            if row["lowest"] >= phonons.SOFT or exact < phonons.SOFT:
                break
        if polish and row["lowest"] < phonons.SOFT <= exact:
            row |= {"lowest_outside": round(phonons.lowest(ph, outside=True), 4), "elastic": round(phonons.elastic(cell, calculator), 2)}
        return row | {"modes": _modes(ph, KEPT if polish else None), "spacegroup": phonons.spacegroup(cell, row["symprec"])}
    except Exception as error:                                               # potentials and symmetry searches fail on odd cells
        if relax.passing(error, calculator):
            raise
        return row | {"status": f"failed: {type(error).__name__}: {str(error)[:200]}"}


def _sizes(cell):
    """Supercells for phonons: what only the interpolation of a small one calls soft is asked of a larger one."""
    sizes = dict.fromkeys(phonons.supercell_for(cell, n) for n in LENGTHS)
    return [s for i, s in enumerate(sizes) if i == 0 or len(cell[1]) * np.prod(s) <= LARGEST]


def _symmetric(row, calculator):
    """The most symmetric primitive cell, relaxed, whose energy is not above the row's by more than SAME."""
    for symprec in SYMPRECS:
        try:
            cell, _ = phonons.primitive(relax.cell_from(row), symprec)
        except (TypeError, ValueError, AttributeError):                      # spglib finds no group at this tolerance
            continue
        new = relax.relax(cell, calculator, "ideal", relax.FMAX / 2, 150)
        if "lattice" in new and new["energy_per_atom"] < row["energy_per_atom"] + SAME:
            return new | {"symprec": min(symprec, 0.05)}
    return row | {"symprec": 0.05}


# ---- search -------------------------------------------------------------------------------------------

def search(cell, calculator, path, *, generations=19, offspring=3, population=12, seed=0, minutes=None, progress=True, evaluate=None,
           parent=None):
    """Genetic search below a cell. path: JSON lines, one per relaxed individual with its genes; a killed call goes on from them.

    Returns {"status", "individuals" (rows with genes, lowest energy first), "bases", "generations", "evaluations", "seconds"}. status:
    ok | no soft modes | failed: reason. evaluate(cells) -> rows replaces the serial relaxations. minutes (CPU time of this process and of
    earlier calls): no new generation after that. parent: row of `examine(cell, polish=False)` if known.
    """
    from tqdm.auto import trange
    ledger, rng, evaluate = Ledger(path), np.random.default_rng(seed), evaluate or relax.serial(calculator, FMAX, STEPS)
    parent = parent or ledger.ask("parent", [cell], lambda cells: (examine(c, calculator, False) for c in cells))[0]
    out = {"status": parent["status"], "individuals": [], "bases": [], "generations": 0}
    if parent.get("modes"):
        out["status"], out["bases"] = "ok", [_base(cell, parent["modes"])]
        first = starters(out["bases"], population)
        first += [random_genes(rng, out["bases"]) for _ in range(population - len(first))]
        out["individuals"] = _evaluated(first, out["bases"], ledger, evaluate, 0)
        for g in trange(1, generations + 1, desc="generations", disable=not progress, mininterval=1):
            if minutes is not None and ledger.seconds > 60 * minutes:
                break
            out["generations"] = g
            _generation(out, g, offspring, population, rng, ledger, evaluate, calculator)
    elif "modes" in parent:
        out["status"] = "no soft modes"
    return out | {"evaluations": len(out["individuals"]), "seconds": round(ledger.seconds, 1)}


def _generation(out, g, offspring, population, rng, ledger, evaluate, calculator):
    pool = distinct(out["individuals"])[:population]
    if g % EVERY == 0 and pool:                                              # new soft modes of the most promising candidate
        found = ledger.ask("examine", [relax.cell_from(pool[0])], lambda cells: (examine(c, calculator) for c in cells))[0]
        out["bases"] += [_base(relax.cell_from(found), found["modes"])] if found.get("modes") else []
    if not pool:
        genes = [random_genes(rng, out["bases"]) for _ in range(offspring)]
    else:
        genes = [child_of(_winner(pool, rng)["genes"], _winner(pool, rng)["genes"], out["bases"], rng) for _ in range(offspring)]
    out["individuals"] += _evaluated(genes, out["bases"], ledger, evaluate, g)


def _winner(pool, rng):
    """Tournament: pool is sorted by energy, so the smallest of a few random numbers wins."""
    return pool[int(rng.integers(len(pool), size=TOURNAMENT).min())]


def _evaluated(genes, bases, ledger, evaluate, generation):
    cells, notes = [cell_of(g, bases[g["base"]]) for g in genes], [{"generation": generation, "genes": g} for g in genes]
    rows = ledger.ask("individual", cells, evaluate, notes)
    return [row | {"genes": g, "generation": generation} for row, g in zip(rows, genes)]


def distinct(rows, same=lambda a, b: True):
    """Rows with an energy, lowest first, without those whose energy lies within SAME of a kept one that is the same polymorph."""
    kept, rows = [], [r for r in rows if r.get("lattice") and r["energy_per_atom"] is not None]
    for row in sorted(rows, key=lambda r: r["energy_per_atom"]):
        if not any(row["energy_per_atom"] - k["energy_per_atom"] < SAME and same(k, row) for k in kept):
            kept.append(row)
    return kept


def alike(a, b):
    """Are two rows one polymorph? Primitive cells at 0.05 angstrom compared by pymatgen's StructureMatcher, which does not reduce them:
    its own reduction, at 0.25 angstrom, would undo small tilts."""
    from pymatgen.analysis.structure_matcher import StructureMatcher
    cells = [_reduced(r) for r in (a, b)]
    matcher = StructureMatcher(ltol=0.05, stol=0.05, angle_tol=1.5, primitive_cell=False)
    return len(cells[0][1]) == len(cells[1][1]) and bool(matcher.fit(*map(phonons._structure, cells)))


def _reduced(row):
    try:
        return phonons.primitive(relax.cell_from(row), 0.05)[0]
    except (TypeError, ValueError, AttributeError):                          # spglib finds no group at this tolerance
        return relax.cell_from(row)


# ---- repair -------------------------------------------------------------------------------------------

def repair(name, cell, potential, folder, *, generations=19, offspring=3, population=12, minutes=None, seed=0, calculator=None,
           evaluate=None, settle=None, batch=None, progress=True):
    """Repair of one relaxed cubic cell -> JSON-able dict; folder keeps the answers, so that a killed call goes on.

    status: repaired | not repaired | no soft modes | failed: reason. Energies in eV/atom, gain = parent - chosen; frequencies in THz,
    soft below phonons.SOFT. calculator, evaluate, settle: of `engine` with this batch; relaxations with a given calculator alone are
    serial. spacegroup_before/after, lowest_before/after, lattice, symbols, frac of the chosen polymorph (of the lowest
    one when none is free of soft modes), polymorphs (lowest first, lowest = None where no phonons were computed), seconds (CPU).
    """
    if calculator is None:
        calculator, *both = engine(potential, batch)
        evaluate, settle = evaluate or both[0], settle or both[1]
    settle, path = settle or relax.serial(calculator, relax.FMAX, 2 * STEPS), Path(folder) / f"{name}-{potential}-seed{seed}.jsonl"
    out = {"name": name, "potential": potential, "seed": seed, "threshold": phonons.SOFT, "generations_asked": generations}
    ledger = Ledger(path)
    parent = ledger.ask("parent", [cell], lambda cells: (examine(c, calculator, False) for c in cells))[0]
    out |= {"parent_energy": parent["energy_per_atom"], "spacegroup_before": parent.get("spacegroup"),
            "lowest_before": parent.get("lowest")}
    found = search(cell, calculator, path, generations=generations, offspring=offspring, population=population, seed=seed,
                   minutes=None if minutes is None else SHARE * minutes, progress=progress, evaluate=evaluate, parent=parent)
    out |= {k: found[k] for k in ("status", "generations", "evaluations")}
    if found["status"] == "ok":
        ledger = Ledger(path)                                                # with what the search wrote
        ledger.seconds = parent["seconds"] + found["seconds"]
        polymorphs = _polymorphs(found, parent, ledger, calculator, evaluate or relax.serial(calculator, FMAX, STEPS), settle, minutes)
        out |= _chosen(polymorphs, parent) | {"polymorphs": [_plain(p) for p in polymorphs[:8]]}
    return out | {"seconds": round(ledger.seconds, 1)}


def _polymorphs(found, parent, ledger, calculator, evaluate, settle, minutes):
    """Distinct polymorphs; the lowest ones examined, then their own soft modes followed while none is free of them."""
    top = [relax.cell_from(r) for r in distinct(found["individuals"])[:SETTLED]]
    examined, rest = [], distinct(ledger.ask("settle", top, settle), alike)
    late = lambda: minutes is not None and ledger.seconds > 60 * minutes
    look = lambda row: ledger.ask("examine", [relax.cell_from(row)], lambda cells: (examine(c, calculator) for c in cells))[0]
    while rest and len(examined) < CHECKED and len([e for e in examined if stable(e)]) < LOWEST and not (examined and late()):
        examined, rest = examined + [look(rest[0])], rest[1:]
    for n in range(ROUNDS):
        best = min((e for e in examined if e.get("modes")), key=lambda e: e["energy_per_atom"], default=None)
        if best is None or any(map(stable, examined)) or late():
            break
        bases = [_base(relax.cell_from(best), best["modes"])]
        rows = distinct(_evaluated(starters(bases, 5), bases, ledger, evaluate, f"round {n + 1}"))
        examined += [look(r) for r in rows[:1]]
    if not any(map(stable, examined)) and not late():                        # large cells crowd out small ones, whose phonons are surer
        small = [relax.cell_from(r) for r in distinct(found["individuals"]) if len(r["symbols"]) <= SMALL][:SETTLED]
        rows = distinct(ledger.ask("settle", small, settle), alike)
        examined += [look(r) for r in rows[:LOWEST]]
    return [r for r in distinct(examined + rest, alike) if r["energy_per_atom"] < parent["energy_per_atom"]]


def stable(row):
    """Is no mode soft: at commensurate points, and on the path and a mesh? What is soft there only around Gamma, between it and the next
    commensurate points, is left to the elastic tensor, computed without interpolation: it must be positive (see phonons.lowest)."""
    if row.get("lowest") is None or row["lowest_exact"] < phonons.SOFT:
        return False
    return row["lowest"] >= phonons.SOFT or (row.get("lowest_outside", -np.inf) >= phonons.SOFT and row["elastic"] > 0)


def _chosen(polymorphs, parent):
    """Of the LOWEST lowest polymorphs without soft modes the one with the highest space group number; else the lowest with phonons."""
    good = [p for p in polymorphs if stable(p)][:LOWEST]
    known = good or [p for p in polymorphs if p.get("spacegroup") and p.get("lowest") is not None]        # none: failed half way
    if not known:
        return {"status": "not repaired", "gain": None, "lowest_after": None, "spacegroup_after": None, "energy_per_atom": None}
    best = max(known, key=lambda p: (_number(p), -p["energy_per_atom"])) if good else known[0]
    return {"status": "repaired" if good else "not repaired", "gain": parent["energy_per_atom"] - best["energy_per_atom"],
            "best_gain": parent["energy_per_atom"] - polymorphs[0]["energy_per_atom"], "energy_per_atom": best["energy_per_atom"],
            "spacegroup_after": best["spacegroup"], "symprec": best["symprec"], "lowest_after": best["lowest"],
            "lowest_exact_after": best["lowest_exact"], "lowest_outside_after": best.get("lowest_outside"),
            "elastic_after": best.get("elastic"), **{k: best[k] for k in ("lattice", "symbols", "frac")}}


def _number(row):
    return int(row["spacegroup"].split("(")[1].rstrip(")"))


def _plain(row):
    """A polymorph for the JSON: cell, energy, space group, lowest frequencies; None where no phonons were computed."""
    keys = ("status", "energy_per_atom", "lattice", "symbols", "frac", "spacegroup", "symprec", "lowest", "lowest_exact",
            "lowest_outside", "elastic", "supercell")
    plain = {k: row.get(k) for k in keys}
    return plain if plain["spacegroup"] else plain | {"spacegroup": phonons.spacegroup(relax.cell_from(row), 0.05), "symprec": 0.05}


def parents(formulas, potential, lattice=None):
    """Rows like relax.relax's of the cubic cells: relaxed by the potential, or at this lattice constant (angstrom)."""
    from . import candidates
    if lattice is None:
        return candidates.relaxed_cubic(formulas, potential)
    return [{"status": "ok", "lattice": [*3 * [lattice], 90, 90, 90], "symbols": symbols, "frac": frac}
            for _, symbols, frac in candidates.cells_of(formulas)]


def holding(row):
    """`wrap` of engine: a calculator under the pressure that holds the cubic cell of a row."""
    from .potentials import held_at
    return partial(held_at, relax.to_atoms(relax.cell_from(row)))


def write(result, folder, cifs):
    """Store a result as <name>-<potential>-seed<k>.json, its chosen polymorph as <name>.cif (<name>-seed<k>.cif unless k is 0, whose
    polymorphs went on to DFT; with -a<lattice> when pressure held the cubic cell), and the polymorphs that were examined, lowest first,
    as <name>-1.cif, <name>-2.cif ...; returns the JSON's path."""
    from .results import _write_atomic
    path = Path(folder) / f"{result['name']}-{result['potential']}-seed{result['seed']}.json"
    _write_atomic(path, json.dumps(result, ensure_ascii=False) + "\n")
    at = f"-a{result['held_at']:g}" if result.get("held_at") else ""
    base = result["name"] + at + (f"-seed{result['seed']}" if result["seed"] else "")
    cells = {f"{base}-{k}": p for k, p in enumerate(result.get("polymorphs", []), 1)}
    for name, row in (cells | ({base: result} if result.get("lattice") else {})).items():
        _write_atomic(Path(cifs) / f"{name}.cif", phonons._structure(relax.cell_from(row)).to(fmt="cif", symprec=row["symprec"]))
    return path


def search_table(found):
    """What each seed of the search chose, of {seed: {formula: result}}, for materials searched more than once: space groups and meV/atom
    below the cubic cell; and how far the lowest polymorphs of the seeds lie apart."""
    import pandas as pd
    rows = []
    for f in next(iter(found.values()), {}):
        runs = {s: r[f] for s, r in found.items() if f in r and r[f].get("gain") is not None}
        row = {"material": f} | {f"{k}, seed {s}": r["spacegroup_after"] if k == "space group" else 1000 * r["gain"]
                                 for s, r in runs.items() for k in ("space group", "gain (meV/atom)")}
        best = [1000 * r["best_gain"] for r in runs.values()]
        row["repaired"] = f"{sum(r['status'] == 'repaired' for r in runs.values())} of {len(runs)}"
        rows += [row | {"lowest: spread (meV/atom)": max(best) - min(best)}] if len(runs) > 1 else []
    return pd.DataFrame(rows)


def from_row(formula, row, name, args):
    """Result for the row of a cubic cell, repaired as a command line asks."""
    from ase.units import GPa

    from .results import ROOT
    if "lattice" not in row:
        return {"name": formula, "potential": name, "seed": args.seed, "status": row["status"]}
    calculator, evaluate, settle = engine(args.potential, args.batch, *([holding(row)] if args.lattice else []))
    out = repair(formula, relax.cell_from(row), name, ROOT / "runs" / "repair", generations=args.generations, offspring=args.offspring,
                 minutes=args.minutes, seed=args.seed, calculator=calculator, evaluate=evaluate, settle=settle)
    return out | ({"held_at": args.lattice, "pressure": round(calculator.pressure / GPa, 3)} if args.lattice else {})


def main():
    from . import results
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formulas", nargs="+")
    for name, value in (("potential", "sevennet-0"), ("generations", 19), ("offspring", 3), ("minutes", 8.0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--lattice", type=float, help="angstrom, at which pressure holds the cubic cell: energies are enthalpies then")
    parser.add_argument("--batch", type=int, help="cells relaxed side by side (SevenNet; on a GPU the default), 0: one by one")
    args = parser.parse_args()
    data, name = results.ROOT / "data", args.potential + (f"-a{args.lattice:g}" if args.lattice else "")
    for formula, row in zip(args.formulas, parents(args.formulas, args.potential, args.lattice)):
        if (data / "polymorphs" / f"{formula}-{name}-seed{args.seed}.json").exists():
            continue
        result = from_row(formula, row, name, args)
        write(result, data / "polymorphs", data / "candidates" / "polymorphs")
        print({k: result.get(k) for k in ("name", "status", "spacegroup_after", "gain", "lowest_before", "lowest_after", "seconds")})


if __name__ == "__main__":
    main()
