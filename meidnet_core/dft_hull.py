"""Energy above the hull by DFT: a perovskite against the phases into which the Materials Project says it falls apart.

    python -m meidnet_core.dft divalent        # cubic cells with Yb or Eu 2+, as the Materials Project has ytterbium; also trivalent
    python -m meidnet_core.dft_hull substitute # cells of listed phases that MP-20 lacks, from relatives (minutes)
    python -m meidnet_core.dft_hull phases     # the competing phases (to a quarter of an hour each); of oxides: --profile oxide
    python -m meidnet_core.dft_hull claims     # energies above hull -> data/results/dft-hull, claims.csv

The list of ground states (hull.py) says which phases compete, MP-20 gives their cells (SUBSTITUTED: a relative's, relaxed with the
potential), GPAW (PBE) gives every energy: no correction. All products are known phases, so each number is a lower bound: a phase
that is in no list can only raise it.
"""

import argparse
import json
from functools import lru_cache

import numpy as np

from . import data, dft, evidence, flows, hull, phonons, repair, results
from .crystal import to_structure
from .potentials import get_calculator
from .relax import relax

SUBSTITUTED = {"La2Se3": ("La2S3", "Tm2Se3", "Lu2S3")}  # a ground state without a cell in MP-20, of up to 20 atoms: cells to put it in
PHASES = results.ROOT / "data" / "reference" / "phases"
# Phases that go back on the sites of the space group found within so many angstrom: MP-20 keeps Co3O4 as a spinel distorted by its
# ferromagnetic order, with one symmetry operation in place of 24 and 63 k-points.
IDEAL = {"Co3O4": 0.2}
CORE_4F = {"Yb": "2p", "Eu": "2p"}                    # valence of the lanthanides whose 4f is in the core; of europium, except in:
TRIVALENT = (*dft.TRIVALENT, "Eu2O3")
SIZED = ("Yb",)          # phases of these take the volume that their setup gives them, as the cubic cells do: YbO in MP-20's cell (4.75
                         # angstrom, measured 4.86, with 4f14 in the core 4.98) would lie 0.13 eV/atom too high


@lru_cache(None)
def known_cells():
    """{hull.whole of a composition: its cell in MP-20 of the lowest formation energy}, and those of PHASES where MP-20 has none."""
    cells = {hull.reduced(cell[1]): cell for cell in flows.read_table(PHASES).values()} | mp20_cells()
    distorted = {hull.whole_of(f): within for f, within in IDEAL.items()}
    return cells | {key: phonons.primitive(cells[key], within)[0] for key, within in distorted.items() if key in cells}


def mp20_cells():
    """Those of MP-20 alone, where they come from."""
    cells, labels, _ = hull.known_phases()
    best = {}
    for cell, label in zip(cells, labels):
        key, energy = hull.reduced(list(cell[1])), label[0] if label[0] == label[0] else np.inf
        if key not in best or energy < best[key][0]:
            best[key] = energy, cell
    return {key: cell for key, (_, cell) in best.items()}


def substitute(formula, potential=evidence.POTENTIAL):
    """The lowest of the cells of SUBSTITUTED with the elements of `formula`, relaxed with the potential: PHASES/<formula>.cif.

    Returns {relative: energy (eV/atom)}; HullError when none relaxes. Elements are matched by their order in the formula.
    """
    found, cells, calculator = {}, mp20_cells(), get_calculator(potential, "cpu")
    for relative in SUBSTITUTED[formula]:
        lattice, symbols, frac = cells[hull.whole_of(relative)]
        swap = dict(zip(data.elements_of(relative), data.elements_of(formula)))
        row = relax((lattice, [swap[e] for e in symbols], frac), calculator, "rattled")
        found |= {relative: row} if row["status"] == "ok" else {}
    if not found:
        raise hull.HullError(f"{formula}: none of {', '.join(SUBSTITUTED[formula])} relaxes with {potential}")
    best = min(found.values(), key=lambda row: row["energy_per_atom"])
    PHASES.mkdir(parents=True, exist_ok=True)
    cell = to_structure(best["lattice"], best["symbols"], best["frac"])
    cell.to(filename=str(PHASES / f"{formula}.cif"), symprec=0.05)    # without the rest of the rattling: k-points by symmetry
    return {relative: row["energy_per_atom"] for relative, row in found.items()}


def compact(cell):
    """Niggli cell: the one with the shortest edges, which the grids of plane waves need."""
    from .large_cells import niggli
    lattice, frac = niggli(cell[0], cell[2])
    return lattice, cell[1], frac


def products(symbols):
    """[(share of the atoms, cell)] on the hull of the listed phases whose cell is known; the ABX3 itself only as another polymorph.

    HullError when an element that is needed has no cell.
    """
    from pymatgen.core import Composition
    cells = known_cells()
    found = hull.list_diagram(frozenset(symbols), frozenset(cells)).get_decomposition(Composition("".join(symbols)))
    parts = [(round(float(x), 9), hull.whole_of(entry.composition)) for entry, x in found.items()]
    missing = [e for _, k in parts if k not in cells for e, _ in k]
    if missing:
        raise hull.HullError(f"{''.join(symbols)}: no cell of {', '.join(sorted(missing))} in MP-20")
    return [(x, cells[k]) for x, k in sorted(parts, reverse=True)]


def name_of(cell):
    """"HfSe2-phase": the name under which a competing phase is stored in data/dft."""
    from pymatgen.core import Composition
    return f"{Composition(''.join(cell[1])).reduced_formula}-phase"


def cores(symbols):
    """{lanthanide: tag of its setup} of a crystal: ytterbium 2+, as in the Yb_2 potential behind the list; europium 2+ or 3+ as neutrality
    asks, one valence in a perovskite and in its products: energies of two cores do not compare."""
    trivalent = hull.reduced(symbols) in {hull.whole_of(f) for f in TRIVALENT}
    return {e: "3p" if e == "Eu" and trivalent else tag for e, tag in CORE_4F.items() if e in symbols}


def kind_of(symbols):
    """What dft.run does with a competing phase: one self-consistent run in the cell of MP-20, or an equation of state first (SIZED)."""
    return "sized" if set(SIZED) & set(symbols) else "phase"


def spinel_moments(cell):
    """(N,) Bohr magnetons to start a cobalt spinel from: Co 2+ with four oxygens antiparallel in pairs, Co 3+ with six without moment.
    From parallel ones on all sites the density of Co3O4 does not converge (lab notes)."""
    from ase.neighborlist import neighbor_list

    from .relax import to_atoms
    oxygens = np.bincount(neighbor_list("i", to_atoms(cell), {("Co", "O"): 2.3}), minlength=len(cell[1]))
    signs = iter((1, -1) * len(cell[1]))
    return [next(signs) * dft.MOMENTS["Co"] if e == "Co" and n == 4 else 0.0 for e, n in zip(cell[1], oxygens)]


def cubic_names():
    """{formula: name of its cubic result} of Table S1; with ytterbium or europium that with 4f in the core."""
    return {f: f + "".join(f"-{dft.VALENCE[t]}" for t in cores(evidence.hull_symbols(f)).values()) for f in results.read_table_s1().formula}


def needed(formulas):
    """{name: compact cell} of the competing phases of formulas, small cells first."""
    cells = {name_of(c): compact(c) for f in formulas for _, c in products(evidence.hull_symbols(f))}
    return dict(sorted(cells.items(), key=lambda item: len(item[1][1])))


def above(result, profile="quick", store=dft.STORE):
    """Energy above the hull (eV/atom) of a dft result of an ABX3; None while a product is not calculated.

    E(ABX3) - sum of x_i E(product i), all per atom and of one profile.
    """
    parts = products(list(result["cell"][1]))
    stored = [dft.load(name_of(c), profile, store) for _, c in parts]
    if not all(r and r["status"] == "ok" for r in stored):
        return None
    return float(result["energy_per_atom"] - sum(x * r["energy_per_atom"] for (x, _), r in zip(parts, stored)))


def results_of(formula, profile="quick"):
    """{"cubic", "repaired": dft result or None} of a material of Table S1; a polymorph of an earlier search is none."""
    end = cubic_names()[formula].removeprefix(formula)
    stored = lambda suffix: evidence.bands([formula], profile, suffix + end).get(formula)
    return {"cubic": stored(""), "repaired": stored("-polymorph")}


def claimed(formula):
    """The profile that answers rows of paper.csv: at the cutoff of `quick` the equations of state of oxides are rough
    (`physics_tables.eos_residual`). `paper` is a check of what the others cost."""
    return "oxide" if "O" in data.elements_of(formula) else "quick"


def places(profile="quick"):
    """{formula: {products, cubic, repaired}} of Table S1, meV/atom above the hull; what is not calculated is left out."""
    out = {}
    for f in cubic_names():
        out[f] = {"products": [[x, name_of(c).removesuffix("-phase")] for x, c in products(evidence.hull_symbols(f))]}
        for key, r in results_of(f, profile).items():
            value = above(r, profile) if r else None
            out[f] |= {} if value is None else {key: 1000 * value}
    return out


def above_lowest(potential=evidence.POTENTIAL):
    """{formula: how far the chosen polymorph lies above the lowest without soft modes (meV/atom, by the potential)}, those of 1 and more:
    the paper takes the most symmetric of three, and the number of a space group is one way to say which that is."""
    energies = {f: (r["energy_per_atom"], [p["energy_per_atom"] for p in r.get("polymorphs", []) if repair.stable(p)])
                for f, r in evidence.polymorphs(potential).items()}
    return {f: above for f, (chosen, good) in energies.items() if good and (above := 1000 * (chosen - min(good))) >= 1}


def claims_of(found, theory, above=None):
    """Rows of paper.csv: DFT distances of cubic cells (Table S1) and of repaired ones (Table S2), meV/atom.

    A cell below all listed phases is itself on the hull: 0, as the paper counts; how far below is in the split. Undecided where the lowest
    polymorph without soft modes, `above` (meV/atom) below the chosen one, would have another verdict.
    """
    reference, claims = results.read_reference().set_index("id"), {}
    for f, row in found.items():
        for key, name, what in (("cubic", f"ts1.{f.lower()}.ehull_dft", "cubic cell"), ("repaired", f"ts2.{f.lower()}.ehull", "polymorph")):
            if key in row and name in reference.index:
                below = f", {-row[key]:.0f} meV/atom below them" if row[key] < 0 else ""
                higher = (above or {}).get(f, 0.0) if key == "repaired" else 0.0
                chosen = f"; chosen by symmetry, {higher:.0f} above the lowest" if higher else ""
                values = [max(row[key] - d, 0.0) for d in (0.0, higher)]
                claims[name] = {"value": values[0], "split": f"{what} ({theory}, products of the list{below}{chosen})",
                                "undecided": results.disagree(values, reference.loc[name])}
    return claims


def write(profile="quick"):
    """data/results/dft-hull/<profile>.json and its claims; None, and no file, where nothing is calculated with this profile."""
    found, paper = places(profile), results.read_reference().set_index("id").paper
    cubic = {f: row["cubic"] for f, row in found.items() if "cubic" in row}
    if not cubic:
        return None
    m = {f"{f}_{k}": v for f, row in found.items() for k, v in row.items() if k != "products"}
    stated = [paper[f"ts1.{f.lower()}.ehull_dft"] for f in cubic]
    m |= {"cubic": len(cubic), "cubic_mean": np.mean(list(cubic.values())), "paper_mean": np.mean(stated)}
    answers = {f: row for f, row in found.items() if claimed(f) == profile}
    seconds = [json.loads(p.read_text())["seconds"] for p in dft.STORE.glob(f"*-phase-{profile}.json")]
    config = {"profile": profile, "xc": "PBE", "4f in the core": CORE_4F}
    return results.write_run("dft-hull", profile, config=config, seed=None, n=len(found), data_set="paper, Tables S1 and S2",
                             split="cubic and repaired", metrics=m, wall_time_s=sum(seconds),
                             claims=claims_of(answers, f"PBE, GPAW {profile}", above_lowest()),
                             curve={f: r["products"] for f, r in found.items()})


def stored(profile="quick"):
    """The run file of `write`, as a dict."""
    return results.read_run("dft-hull", profile)


def convergence():
    """What the cheaper settings cost: distances to the hull (meV/atom) of cubic cells with `quick` and a better profile, a DataFrame."""
    import pandas as pd
    quick, rows = stored("quick")["metrics"], []
    for profile in ("paper", "oxide"):
        rows += [{"material": k.removesuffix("_cubic"), "quick": quick[k], "better settings": v, "profile": profile}
                 for k, v in stored(profile)["metrics"].items() if k.endswith("_cubic") and k in quick]
    return pd.DataFrame(rows)


def table(potential=evidence.POTENTIAL):
    """Distances to the hull (meV/atom), DFT here (with the profile `claimed`), potential, paper: a DataFrame from the stored runs."""
    import pandas as pd
    runs, repaired = {p: stored(p) for p in ("quick", "oxide")}, evidence.stored_places(potential)
    cubic = results.read_run("table-s1", potential)["metrics"]
    paper, rows = results.read_reference().set_index("id").paper, []
    for f, parts in runs["quick"]["curve"].items():
        m = runs[claimed(f)]["metrics"]
        rows.append({"material": f, "falls apart into": " + ".join(f"{x:.2f} {p}" for x, p in parts),
                     "DFT, cubic": m.get(f"{f}_cubic"), f"{potential}, cubic": cubic[f"{f}_ideal"],
                     "paper, eSEN": paper.get(f"ts1.{f.lower()}.ehull_esen", paper.get(f"f3c.{f.lower()}.ehull_esen")),
                     "paper, DFT": paper.get(f"ts1.{f.lower()}.ehull_dft"), "DFT, repaired": m.get(f"{f}_repaired"),
                     f"{potential}, repaired": repaired.get(f, {}).get("after"), "paper, repaired": paper.get(f"ts2.{f.lower()}.ehull")})
    return pd.DataFrame(rows)


START = {"Co3O4": spinel_moments}                     # moments of phases that those of dft.MOMENTS do not lead to


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["substitute", "phases", "claims"])
    parser.add_argument("--profile", choices=dft.PBE_PROFILES, default="quick", help="of phases; what answers: `claimed`")
    parser.add_argument("--materials", nargs="*", help="formulas of Table S1 (all)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, help="seconds a calculation may take in this call; the next call goes on")
    args = parser.parse_args()
    if args.what == "claims":
        for profile in dft.PBE_PROFILES:
            write(profile)
        evidence.write_repairs()                                     # which gives up the rows that DFT answers now
        return print(results.counts_line(results.write_claims()))
    if args.what == "substitute":
        return [print(f"{f} in the cell of {r}: {e:.4f} eV/atom", flush=True) for f in SUBSTITUTED for r, e in substitute(f).items()]
    jobs = needed(args.materials or list(cubic_names()))
    for k, (name, cell) in enumerate(jobs.items()):
        setups = {e: dft.frozen_4f(e, tag) for e, tag in cores(cell[1]).items()}
        moments = START.get(name.removesuffix("-phase"), lambda cell: True)(cell)
        out = dft.run(name, cell, args.profile, kind_of(cell[1]), args.ranks, timeout=args.timeout, setups=setups, moments=moments)
        print(f"{k + 1}/{len(jobs)} {name} ({len(cell[1])} atoms): {out['status']}, {out['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
