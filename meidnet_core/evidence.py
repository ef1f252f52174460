"""What the calculations of chapters 13-16 say about the paper's claims: run files from data/dft, data/phonons and data/polymorphs.

    python -m meidnet_core.evidence phonons     # Figure S7: phonons of the nine materials, cubic and repaired -> data/phonons
    python -m meidnet_core.evidence claims      # gaps, soft modes, energies above hull -> data/results, claims.csv
"""

import argparse
import json
import time

import numpy as np

from . import dft, dft_store, hull, phonons, relax, results

FIGURE5 = ("KTaSe3", "LaScSe3", "YbScSe3", "BaHfSe3")
SHIFTED = ("YbFeSe3", "YbMnSe3", "YbCoSe3", "TmMnSe3")      # repaired ones of which Table S2 gives a gap off the Fermi level: metals
KNOWN = ("SrTiO3", "CsPbI3")              # leave the cubic phase: by rotations (a0a0c-), by tilts (Pnma)
PHONONS, POLYMORPHS = results.ROOT / "data" / "phonons", results.ROOT / "data" / "polymorphs"
POTENTIAL = "sevennet-0"
SAME, GROWN = 0.01, 0.1        # eV: gaps nearer than that are one gap; a gap grew by more than what basis and valence leave open


# ---- what is stored -----------------------------------------------------------------------------

def polymorphs(potential=POTENTIAL, seed=0, folder=None, formulas=dft.FIGURE4):
    """{formula: result of repair.repair} of the nine materials, in the order of `formulas`; those not searched yet are left out."""
    paths = {f: (folder or POLYMORPHS) / f"{f}-{potential}-seed{seed}.json" for f in formulas}
    return {f: json.loads(p.read_text()) for f, p in paths.items() if p.exists()}


def searches(potential=POTENTIAL, folder=None):
    """{seed: polymorphs of that seed} of all seeds with which materials were searched."""
    names = (folder or POLYMORPHS).glob(f"*-{potential}-seed*.json")
    found = {s: polymorphs(potential, s, folder) for s in sorted({int(p.stem.rsplit("seed", 1)[1]) for p in names})}
    return {s: r for s, r in found.items() if r}


def studies(potential=POTENTIAL, folder=None):
    """{name: phonons.study} that are stored; names are formulas and <formula>-polymorph."""
    names = [n for f in dft.FIGURE4 for n in (f, f"{f}-polymorph")]
    paths = {n: (folder or PHONONS) / potential / f"{n}.json" for n in names}
    return {n: json.loads(p.read_text()) for n, p in paths.items() if p.exists()}


def bands(names, profile="quick", suffix="", folder=None):
    """{formula: result of dft.run} of those that are stored with a gap; of polymorphs, those that the last search chose."""
    found = {f: dft.load(f + suffix, profile) for f in names}
    found = {f: r for f, r in found.items() if r and "gap" in r}
    if suffix.startswith("-polymorph"):
        chosen = polymorphs(folder=folder)
        found = {f: r for f, r in found.items() if f in chosen and dft_store.same_crystal(r["cell"], relax.cell_from(chosen[f]))}
    return found


def repaired_bands(profile="quick"):
    """{formula: dft result} of polymorphs; where anions pair and leave Yb 2+, that with 4f14 in the core; in plane waves if calculated."""
    plain, waves, divalent = (bands(dft.FIGURE4, profile, f"-polymorph{s}") for s in ("", "-waves", "-divalent"))
    return plain | {f: r for f, r in waves.items() if r["bands"]} | {f: r for f, r in divalent.items() if anion_pairs(r["cell"])[0] > 0}


def anion_pairs(cell, stretch=1.15):
    """Bonds X-X of an ABX3 cell a formula unit, charge (e) that they leave for A + B, shortest X-X distance (angstrom).

    Atoms nearer than `stretch` times twice their covalent radius are a pair X2 2-; any other X is 2- (chalcogenides only).
    """
    from ase.data import atomic_numbers, covalent_radii

    x = max(set(cell[1]), key=list(cell[1]).count)
    atoms = relax.to_atoms(cell)
    atoms = atoms[[i for i, e in enumerate(cell[1]) if e == x]].repeat((2, 2, 2))            # a cell may be one bond wide
    d = atoms.get_all_distances(mic=True)
    d = d[np.triu_indices(len(d), 1)]
    units = len(atoms) / 3
    pairs = float((d < stretch * 2 * covalent_radii[atomic_numbers[x]]).sum() / units)
    return pairs, 2 * (3 - pairs), float(d.min())


def paper_gaps(where):
    """{formula: PBE gap (eV)} the paper states; where: "before" (Table S1) or "after" (Table S2)."""
    table, out = results.read_reference().set_index("id").paper, {}
    names = {name.split(".")[1]: name for name in table.index if _is_gap(name, where)}
    for f in (*dft.FIGURE4, *dft.REST):
        if f.lower() in names:
            out[f] = float(table[names[f.lower()]])
    return out


def _is_gap(name, where):
    parts = name.split(".")
    if where == "after":
        return parts[0] == "ts2" and parts[-1] == "gap"
    return (parts[0] in ("f4", "s5", "s6") and parts[-1] == "gap") or (parts[0] == "ts1" and parts[-1] == "gap_dft")


# ---- phonons ------------------------------------------------------------------------------------

def cubic_cells(formulas, potential=POTENTIAL):
    """{formula: cubic cell relaxed with the potential}."""
    from . import candidates
    rows = candidates.relaxed_cubic(formulas, potential)
    return {f: relax.cell_from(r) for f, r in zip(formulas, rows) if "lattice" in r}


def all_phonons(potential=POTENTIAL):
    """Phonons of the cubic cells (2x2x2) and of the chosen polymorphs (edges of at least phonons.LENGTH, or what repair needed)."""
    phonons.study_all(cubic_cells(list(dft.FIGURE4), potential), PHONONS / potential, potential, (2, 2, 2))
    for f, found in polymorphs(potential).items():
        if found.get("lattice"):
            phonons.study_all({f"{f}-polymorph": relax.cell_from(found)}, PHONONS / potential, potential, _supercell(found))


def _supercell(found):
    """That of the phonons by which the polymorph was judged."""
    same = [p for p in found["polymorphs"] if p["lattice"] == found["lattice"] and p.get("supercell")]
    return tuple(same[0]["supercell"]) if same else None


# ---- claims -------------------------------------------------------------------------------------

def gap_claims(found, where, theory):
    """Claims and metrics of gaps: found {formula: dft result}, where before | after; theory has "{}" where a polymorph's k-points go."""
    known, claims, metrics = set(results.read_reference()["id"]), {}, {}
    for f, r in found.items():
        low, g = f.lower(), r["gap"]
        apart = g["direct"] - g["indirect"]                                  # between 0 and SAME the kind of gap is open
        direct = not g["metal"] and apart < SAME
        values = {f"f4.{low}.gap": g["indirect"], f"s5.{low}.gap": g["indirect"], f"s6.{low}.gap": g["indirect"],
                  f"ts1.{low}.gap_dft": g["indirect"], f"f4.{low}.metal": int(g["metal"]),
                  f"f4.{low}.indirect": int(not g["metal"] and not direct)}
        if where == "after":
            values = {f"ts2.{low}.gap": answer(f, r, where), f"f5.{low}.direct": int(direct)}
        waves = r.get("bands") and "basis" not in r                          # along the path as well: one gap of both
        split = theory.format("on mesh and path" if waves else "on the mesh")
        unsure = {f"f4.{low}.indirect", f"f5.{low}.direct"} if not g["metal"] and 0 < apart < SAME else set()
        unsure |= {f"ts2.{low}.gap"} if where == "after" and surpassed(f) else set()
        claims |= {k: {"value": v, "split": split, "undecided": k in unsure} for k, v in values.items() if k in known}
        more = ("window",) if where == "after" and f in SHIFTED else ()
        metrics |= {f"{f}_{k}": float(g[k]) for k in ("indirect", "direct", "overlap", "metal", *more)}
    return claims, metrics


def answer(formula, result, where="after"):
    """The gap (eV) that compares with the paper's: of the metals of Table S2 the widest window near the Fermi level."""
    return result["gap"]["window" if where == "after" and formula in SHIFTED else "indirect"]


def smallest_gap(result):
    """The smaller of the gaps (eV) of the mesh and of the path, whatever the basis."""
    return min(result["gap"]["indirect"], result.get("path_gap", result["gap"])["indirect"])


def larger(before, after, margin=GROWN):
    """Formulas whose smallest gap grew by more than `margin` (eV) from one {formula: dft result} to the other."""
    return [f for f in after if f in before and smallest_gap(after[f]) > smallest_gap(before[f]) + margin]


def like_for_like(before, after, profile="quick"):
    """`before` with the cubic cells of those materials that are repaired with divalent ytterbium in that valence, too, where stored."""
    divalent = [f for f, r in after.items() if r.get("setups", {}).get("Yb") == "2p"]
    return before | bands([f for f in divalent if f in before], profile, "-divalent")


def compared(found, where):
    """Mean absolute difference (eV) of our gaps and the paper's over the materials that both have, and their number."""
    paper = paper_gaps(where)
    difference = [abs(answer(f, r, where) - paper[f]) for f, r in found.items() if f in paper]
    return {"mae_paper": float(np.mean(difference)), "within_0.15": int(sum(d <= 0.15 for d in difference)), "compared": len(difference)}


def surpassed(formula, profile="quick"):
    """Does a cell with a cation off its site, relaxed by PBE, lie below the chosen polymorph, which is not relaxed by it (same 4f shells in
    the core)? Which of them is the repaired phase is open then."""
    from .off_centre import DIRECTIONS, name_of
    chosen = dft.load(f"{formula}-polymorph", profile)
    others = [r for d in DIRECTIONS if (r := dft.load(name_of(formula, d, pbe=True), profile))]
    return bool(chosen) and any(r["energy_per_atom"] < chosen["energy_per_atom"] for r in others)


def target_claims(found, theory):
    """Requested gaps of Table S1 against PBE ones: mean absolute difference (eV), and how many lie below their target.

    The mean over the materials that have a gap here (from twelve on; the split says how many), the count only when all do.
    """
    table = results.read_table_s1()
    miss = {f: found[f]["gap"]["indirect"] - t for f, t in zip(table.formula, table.target_gap_ev) if f in found}
    claims, where = {}, f"{len(miss)} of {len(table)} materials, {theory}"
    if len(miss) >= 12:
        claims["ts1.gap_dft_mae"] = {"value": float(np.mean(np.abs(list(miss.values())))), "split": where}
    if len(miss) == len(table):
        claims["ts1.below_target"] = {"value": sum(v < 0 for v in miss.values()), "split": where}
    return claims


def write_gaps(profile="quick", careful="paper"):
    """Run files of the gaps; those of pristine cells that were calculated with the settings `careful` as well answer the claims there."""
    pristine, repaired, answered = "equation of state", f"{{}}, polymorph of {POTENTIAL}, Yb 2+ where X pair", set()
    for where, settings, found, cells in (("before", careful, bands(dft.FIGURE4, careful), pristine),
                                          ("before", profile, bands((*dft.FIGURE4, *dft.REST), profile), pristine),
                                          ("after", profile, repaired_bands(profile), repaired)):
        if not found:
            continue
        engine = f"PBE, GPAW {settings} ({dft.PROFILES[settings].cutoff} eV)"
        theory = f"{engine}, {cells}"
        claims, m = gap_claims(found, where, theory)
        claims |= target_claims(found, theory) if where == "before" else {}
        if where == "after" and set(FIGURE5) <= set(found):
            four = {f: found[f] for f in FIGURE5}
            alike = like_for_like(bands(FIGURE5, profile), four, profile)
            grown, at_all = larger(alike, four), larger(alike, four, 0.005)
            told = f"{engine}, smaller gap of mesh and path, polymorph of {POTENTIAL}, YbScSe3 with Yb 2+ in both"
            claims["f5.larger_gap"] = {"value": len(grown), "split": told, "undecided": len(grown) < len(at_all)}
        claims = {k: v for k, v in claims.items() if k not in answered}
        answered |= claims.keys()
        results.write_run(f"dft-{where}", settings, config={"profile": settings, "xc": "PBE"}, seed=None,
                          data_set="paper, Tables S1 and S2", split=where, n=len(found), metrics=m | compared(found, where), claims=claims,
                          wall_time_s=sum(r["seconds"] for r in found.values()))


def placed(found, potential=POTENTIAL):
    """{before, after}: energy above the list hull (meV/atom) of a repair's parent and chosen polymorph."""
    correction, out = hull.corrections(potential), {}
    for key, energy in (("before", found["parent_energy"]), ("after", found.get("energy_per_atom"))):
        if energy is not None:
            row = {"status": "ok", "symbols": found.get("symbols") or hull_symbols(found["name"]), "energy_per_atom": energy}
            out[key] = 1000 * hull.e_above_hull(row, correction)["e_above_hull"]
    return out


def stored_places(potential=POTENTIAL):
    """{formula: {before, after}} of `placed`, as write_repair stored it: the hull itself is a table that a reader may not have."""
    m = results.read_run("repair", potential)["metrics"]
    keys = {f: {k: f"{f}_ehull_{k}" for k in ("before", "after")} for f in dft.FIGURE4}
    return {f: {k: m[name] for k, name in names.items() if name in m} for f, names in keys.items()}


def hull_symbols(formula):
    a, b, x = hull.sites_in(formula)
    return [a, b, x, x, x]


def write_repair(potential=POTENTIAL, seed=0):
    """Table S2 and Figure S7 in numbers."""
    found, m, claims, known = polymorphs(potential, seed), {}, {}, set(results.read_reference()["id"])
    by_dft = {name for r in results.read_runs(results.RESULTS / "dft-hull") for name in r["claims"]}          # dft_hull.py answers these
    for f, r in found.items():
        above = placed(r, potential)
        m |= {f"{f}_ehull_{k}": v for k, v in above.items()}
        m |= {f"{f}_{k}": r[k] for k in ("gain", "lowest_before", "lowest_after", "generations", "seconds") if r.get(k) is not None}
        m[f"{f}_repaired"] = int(r["status"] == "repaired")
        if f"ts2.{f.lower()}.ehull" in known - by_dft and "after" in above:
            claims[f"ts2.{f.lower()}.ehull"] = {"value": above["after"], "split": f"polymorph ({potential} for DFT, list hull)"}
    soft = sum(r["lowest_before"] < phonons.SOFT for r in found.values() if r.get("lowest_before") is not None)
    repaired = sum(r["status"] == "repaired" for r in found.values())
    if len(found) == len(dft.FIGURE4):
        split = f"9 materials ({potential} for MACE-OMAT-0)"
        claims |= {"s7.soft_pristine": {"value": soft, "split": split}, "s7.stable_repaired": {"value": repaired, "split": split}}
    m |= {"soft": soft, "repaired": repaired, "searched": len(found)}
    return results.write_run("repair", potential + (f"-seed{seed}" if seed else ""), seed=seed,
                             config={"potential": potential, "threshold_thz": phonons.SOFT},
                             data_set="paper, Table S2", split="polymorphs", n=len(found), metrics=m, claims=claims,
                             wall_time_s=sum(r.get("seconds", 0) for r in found.values()))


def write_repairs(potential=POTENTIAL):
    """A run file for seed 0 and for every other seed with which all nine materials were searched."""
    whole = [s for s, found in searches(potential).items() if s == 0 or len(found) == len(dft.FIGURE4)]
    return [write_repair(potential, s) for s in whole]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["phonons", "claims"])
    args, start = parser.parse_args(), time.time()
    if args.what == "phonons":
        all_phonons()
        print(f"{len(studies())} phonon calculations in {PHONONS}, {time.time() - start:.0f} s")
    else:
        write_gaps()
        write_repairs()
        print(results.counts_line(results.write_claims()))


if __name__ == "__main__":
    main()
