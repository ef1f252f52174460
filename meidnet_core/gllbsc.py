"""Band gaps at the level of theory of Perov-5's labels: is our GLLB-SC recipe theirs, and what gap do the candidates have?

    python -m meidnet_core.gllbsc study         # which mesh made the labels? on a few development materials
    python -m meidnet_core.gllbsc causes        # which setups, and whose oxides? on others
    python -m meidnet_core.gllbsc validate      # 41 materials of the test split against their labels
    python -m meidnet_core.gllbsc candidates    # proposals of data/candidates
    python -m meidnet_core.gllbsc paper         # the materials of Table S1 that have setups

The labels are Kohn-Sham gaps of GLLB-SC plus the derivative discontinuity (Castelli et al. 2012; Kuisma et al. 2010), in steps
of 0.1 eV, in the very cells of the data set.
"""

import argparse
import json
import time
from dataclasses import asdict, replace

import numpy as np

from . import crystal, data, dft, dft_store, results
from .gpaw_job import read

FIRST, SECOND = (5, True), (10, False)                                 # meshes of the two studies: points along each axis, with Γ or not
LATE = {"Y", "Sb", "Hf", "Re", "Hg", "Tl", "Te"}                       # whose oxides are of the second; GPAW 0.8 had a setup for Te alone
SETUPS_08 = {"Mg": "2", "Na": "1", "V": "5", "Mn": "7", "Ni": "10", "Nb": "5", "Mo": "6", "Ru": "8", "Rh": "9", "Pd": "10", "Ag": "11",
             "Te": "16", "Ta": "5", "W": "6", "Os": "8", "Ir": "9", "Pt": "10"}            # tags of its setups in today's gpaw-data
STUDY = ("GeSiO3", "SrSnO3", "CaGeO3", "CdTiO3", "ScSbON2", "TeSiON2", "HfLiO2F", "HfAlO2N")         # the table that shows it
LATE_OXIDES = ("SbBO3", "LiSbO3", "HgSiO3", "YGaO3", "CaTeO3", "TeMgO3")        # of which study are oxides of LATE? Both meshes
OLD_SETUPS = ("ScNbON2", "AlTaON2", "SrTaO2N", "BaNbO2N")              # both kinds of setups
ALKALI = {"Li", "Na", "K", "Rb"}                                       # whose niobates and tantalates fit the present setups
NIOBATES = ("AgNbO3", "CuNbO3", "GaNbO3", "BNbO3", "InTaO3", "CsTaO3", "LiTaO3", "NaTaO3", "KNbO3", "RbNbO3")    # of the first study
MISSED = ("BeTiO3", "MgZrO3")                                          # oxides that fit neither mesh
SEEN = set("""
    ScAlOFN SiGaO2F AlRuN3 SiNbO2N MgZrO3 ZnTiO2S KNbOFN CaGaO2F ZrGeON2 CaTeO3 GeTiO2S NaNbOFN BGeO2F
    AlTiO2N CdSiO3 SiTiO2S YAlOFN NaZrO2F YSiO2N SnZrO3 BeTeO2S CaTiOFN SnScO2F CaNbO2N BeTiO3 BeBeO2S
    MgZrOFN BeAlO2F TaAlON2 YInO3 CaGeO2S SiSnOFN GeScO2F AlNbON2 BiBO3 GeSiO2S SbBOFN LiSnO2F BLiON2
    ScGaO3 LiNbO2S BeTiOFN AsGaO2F ScTaON2 SbGaO3 MgZrO2S CaScO2F AlNaON2 GeZrO3 LiSbO2S CuTiO2F AlSbON2
    """.split())                                   # they validated earlier recipes: the meshes alone, and without tellurium
EARLIER = set("""
    ScBOFN MgAlO2F AsNbON2 BePbO3 ScNaO2S SrSiOFN GeAlO2F ScGeO2N MgGeO3 ScAlO2S GeTiOFN CaBO2F ZrTiON2
    NaNbO2S SiInO2F ScBO3 BeSiO2S BeBO2F SiSiO2S KTiO2F SiZrO3 CuSiO2F ZrMgO3 BaBO2F
    """.split())              # of the validation: calculated before the setups of NIOBATES were chosen, which concern none of them
DEVELOPMENT = {*STUDY, "PbSiO3", "TiGeON2", "YAlO3", "BiGaO3", "CsNbO3", "TiTiON2", "NaNbO3", "PdWON2", "ZrSnON2", "TiMgO3",
               "BeSiOFN", "AlZnN3", "AlLiO2S", "MgSiOFN", "MgSiO3", "CaZrO3", "BaTaO2N", "KSbO3",
               "CuTaO3", "AgVO3", "InNbO3", *LATE_OXIDES, *OLD_SETUPS, *NIOBATES, *SEEN}
MESHES = {"5 with Γ": FIRST, "10 without Γ": SECOND}
CUTOFFS = {"SrSnO3": (FIRST, (400, 800))}                             # eV, beside that of the profile
LEAST, WANTED = 1.0, 41                                                # eV, smallest direct gap of a validation material; how many
LIGHT = {8: 150, 4: 90}                                                # most electrons of a validation cell with so many operations
HEAVY = {*range(57, 72)}                                               # La and the lanthanides have no GLLB-SC setup


def labelled(split):
    """Table of a split of Perov-5 with cif, dir_gap and ind_gap (eV; train has no ind_gap)."""
    import pandas as pd

    from .sources import mirror
    return pd.read_csv(mirror("perov_5", split)).drop_duplicates("formula").set_index("formula")


def cell_from_cif(text):
    """The cell of the data set as it is: displaced, in its own origin."""
    from pymatgen.core import Structure
    s = Structure.from_str(text, fmt="cif")
    return list(s.lattice.parameters), [e.symbol for e in s.species], s.frac_coords


def validation(count=WANTED, seed=0):
    """[(formula, cell, direct, indirect)] of the test split: gaps of at least LEAST eV, spread over anion sets and gaps.

    One after another from the anion sets, each in a random order of its gap quartiles; without materials of DEVELOPMENT, elements that
    have no setup, and cells that would take too long (LIGHT).
    """
    table, rng = labelled("test"), np.random.default_rng(seed)
    known = lambda f: len(data.elements_of(f)) > 2 and not {crystal.atomic_number(e) for e in data.elements_of(f)} & HEAVY
    table = table[[g >= LEAST and known(f) and f not in DEVELOPMENT for f, g in zip(table.index, table.dir_gap)]]
    table = table[[affordable(cell_from_cif(text)) for text in table.cif]]
    anions = np.array(["".join(sorted(set(data.elements_of(f)) & {"O", "N", "F", "S"})) for f in table.index])
    groups = {}
    for kind in sorted(set(anions)):
        rows = table.index[anions == kind]
        order = table.dir_gap[rows].rank(method="first").to_numpy()
        quartile = np.floor(4 * (order - 1) / len(rows)).astype(int)
        queue = [list(rng.permutation(rows[quartile == q])) for q in rng.permutation(4)]
        groups[kind] = [q[i] for i in range(max(map(len, queue))) for q in queue if i < len(q)]
    mixed = [g[i] for i in range(max(map(len, groups.values()))) for g in groups.values() if i < len(g)]
    return [(f, cell_from_cif(table.cif[f]), table.dir_gap[f], table.ind_gap[f]) for f in mixed[:count]]


def second(symbols):
    """Is the label of these elements from the second study (Castelli et al. 2012b: N, F, S, oxides of LATE), not the first (2012a)?"""
    return bool(({"N", "F", "S"} | LATE) & set(symbols))


def old_setups(symbols):
    """{symbol: tag} of the setups of GPAW 0.8 that today's gpaw-data still has for these elements."""
    return {e: SETUPS_08[e] for e in symbols if e in SETUPS_08}


def setups(symbols):
    """{symbol: tag} of the setups behind a label: those of GPAW 0.8, which left more shells in the core, for the second study and for
    the niobates and tantalates of the first, but not those of ALKALI; the other labels of the first fit the present ones about as well."""
    old = second(symbols) or ({"Nb", "Ta"} & set(symbols) and not ALKALI & set(symbols))
    return old_setups(symbols) if old else {}


def recipe(symbols, cutoff=None, mesh=None):
    """Settings of the labels for a cell with these elements; found on DEVELOPMENT. The two studies did not use the same mesh."""
    n, gamma = mesh or (SECOND if second(symbols) else FIRST)
    settings = dft.PROFILES["gllbsc"]
    return replace(settings, kpts=(n,) * 3, gamma=gamma, cutoff=cutoff or settings.cutoff)


def affordable(cell):
    """Is a calculation of this cell a matter of minutes? By its electrons and symmetry."""
    electrons, found = sum(map(crystal.atomic_number, cell[1])), operations(cell)
    return any(found >= least and electrons <= most for least, most in LIGHT.items())


def operations(cell):
    """Number of symmetry operations of a cell, within 0.01 angstrom."""
    import spglib

    from .relax import to_atoms
    atoms = to_atoms(cell)
    return len(spglib.get_symmetry((atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers), symprec=0.01)["rotations"])


def gap(name, cell, settings, folder, ranks=1, timeout=1500, tags=None):
    """Result of one GLLB-SC calculation: gpaw_job.gllbsc's dict with its status, kept in runs/dft/<folder>/<name>. tags: of setups."""
    where, wanted = dft.WORK / folder / name, {"settings": json.loads(json.dumps(asdict(settings))), "setups": tags or {}}
    try:
        job = read(where, "job") or wanted
    except ValueError:
        return {"status": f"failed: {where / 'job.json'} is not JSON; delete the folder", "seconds": 0}
    if any(job[k] != v for k, v in wanted.items()) or not dft_store.same_cell(job.get("cell", cell), cell):
        return {"status": f"failed: {where} holds another recipe or crystal; delete it", "seconds": 0}
    if not (read(where, "gllbsc") or {}).get("status"):
        import subprocess
        try:
            dft.execute(dft.prepare(cell, settings, "gllbsc", moments=False, setups=tags), where, ranks, timeout)
        except subprocess.TimeoutExpired:
            return {"status": f"failed: no result in {timeout} s", "seconds": timeout}
        except dft.DFTError as error:
            return {"status": f"failed: {error}"[:400], "seconds": 0}
    return read(where, "gllbsc")


def row_of(r):
    """What a table shows of a result: gaps in eV; none where there is no gap or no result."""
    keys = ("ks_indirect", "ks_direct", "discontinuity", "indirect", "direct")
    return {"status": r["status"], "seconds": round(r["seconds"]), "gap": bool(r.get("gap")), **{k: r[k] for k in keys if k in r}}


def counted(r, key):
    """A gap (eV) of `row_of` with "no gap" as 0; None without a result."""
    return None if r["status"] != "ok" else r[key] if r["gap"] else 0.0


def misses(rows, kind):
    """(M,) eV by which the "direct" or "indirect" gaps of rows lie above their labels; rows without a gap or a label are left out."""
    return np.array([r[kind] - r[f"label_{kind}"] for r in rows if r["gap"] and r[f"label_{kind}"] is not None])


# ---- the questions ------------------------------------------------------------------------

def every():
    """All labelled materials, of any split: development materials are taken from where they are."""
    return labelled("train").combine_first(labelled("val")).combine_first(labelled("test"))


def causes(ranks=1):
    """Which mesh oxides of LATE fit, and which setups the second study and NIOBATES; writes data/results/gllbsc-study/setups.json."""
    from tqdm.auto import tqdm
    table, rows = every(), []
    jobs = [(k, f, mesh, {}) for f in LATE_OXIDES for k, mesh in (("first_mesh", FIRST), ("second_mesh", SECOND))]
    both = lambda f, present, old: ((present, {}), (old, old_setups(data.elements_of(f))))
    jobs += [(k, f, SECOND, tags) for f in OLD_SETUPS for k, tags in both(f, "present_setups", "old_setups")]
    jobs += [("missed", f, SECOND, {}) for f in MISSED]
    jobs += [("alkali_" * bool(ALKALI & set(data.elements_of(f))) + k, f, FIRST, tags)
             for f in NIOBATES for k, tags in both(f, "niobate_present", "niobate_old")]
    for what, f, (n, gamma), tags in tqdm(jobs, desc="GLLB-SC"):
        cell, name = cell_from_cif(table.cif[f]), "-".join([f, f"{n}{'G' if gamma else 'M'}", *(e + t for e, t in tags.items())])
        r = gap(name, cell, recipe(cell[1], mesh=(n, gamma)), "gllbsc-study", ranks, tags=tags)
        rows.append({"formula": f, "question": what, "mesh": n, "gamma": gamma, "setups": " ".join(e + "." + t for e, t in tags.items()),
                     "label_direct": table.dir_gap[f], **row_of(r)})
    m = {f"mae_{k}": float(np.abs(misses([r for r in rows if r["question"] == k], "direct")).mean())
         for k in dict.fromkeys(r["question"] for r in rows) if k != "missed"}
    config = {"materials": [*LATE_OXIDES, *OLD_SETUPS, *NIOBATES], "xc": "GLLBSC"}
    return results.write_run("gllbsc-study", "setups", config=config, seed=None, data_set="perov_5", split="development",
                             n=len(config["materials"]), metrics=m, claims={}, curve=rows, wall_time_s=sum(r["seconds"] for r in rows))


def study(ranks=1):
    """Meshes, and cutoffs at one mesh, for the materials of STUDY; writes data/results/gllbsc-study/mesh.json."""
    from tqdm.auto import tqdm
    table, rows = every(), []
    usual = dft.PROFILES["gllbsc"].cutoff
    jobs = [(f, mesh, usual) for f in STUDY for mesh in MESHES.values()]
    jobs += [(f, mesh, cut) for f, (mesh, cuts) in CUTOFFS.items() for cut in cuts]
    for f, (n, gamma), cut in tqdm(jobs, desc="GLLB-SC"):
        cell = cell_from_cif(table.cif[f])
        r = gap(f"{f}-{n}-{cut}{'G' if gamma else 'M'}", cell, recipe(cell[1], cut, (n, gamma)), "gllbsc-study", ranks)
        indirect = None if np.isnan(table.ind_gap[f]) else table.ind_gap[f]
        rows.append({"formula": f, "mesh": n, "gamma": gamma, "cutoff": cut, "label_direct": table.dir_gap[f], "label_indirect": indirect,
                     "oxide": not second(cell[1]), **row_of(r)})
    at = lambda n, g, oxide: [r for r in rows if (r["mesh"], r["gamma"], r["cutoff"], r["oxide"]) == (n, g, usual, oxide)]
    m = {f"mae_{k}_{n}{'G' if g else 'M'}_{'oxides' if oxide else 'others'}": float(np.abs(found).mean())
         for n, g in MESHES.values() for k in ("direct", "indirect") for oxide in (True, False) if len(found := misses(at(n, g, oxide), k))}
    return results.write_run("gllbsc-study", "mesh", config={"materials": list(STUDY), "xc": "GLLBSC"}, seed=None, data_set="perov_5",
                             split="development", n=len(STUDY), metrics=m, claims={}, curve=rows,
                             wall_time_s=sum(r["seconds"] for r in rows))


def validate(count=WANTED, seed=0, ranks=1, minutes=None):
    """The recipe against labels it was not chosen on; writes data/results/gllbsc-validation/seed<seed>.json."""
    from tqdm.auto import tqdm
    start, rows = time.time(), []
    for formula, cell, direct, indirect in tqdm(validation(count, seed), desc="GLLB-SC"):
        if minutes and time.time() - start > 60 * minutes:
            break
        r = row_of(gap(formula, cell, recipe(cell[1]), "gllbsc-labels", ranks, tags=setups(cell[1])))
        anions = "".join(sorted({"O", "N", "F", "S"} & set(cell[1])))
        rows.append({"formula": formula, "anions": anions, "label_direct": direct, "label_indirect": indirect, **r})
    good, m = [r for r in rows if r["gap"]], errors(rows)
    tried = {r["formula"] for r in rows}
    late = {f for f in tried if second(data.elements_of(f))}
    for name, group in {"first": tried - late, "second": late, "new": tried - EARLIER}.items():
        found = errors([r for r in rows if r["formula"] in group])
        m |= {f"{k}_{name}": v for k, v in found.items() if k in ("tried", "mae_direct", "mae_indirect")}
    config = {"xc": "GLLBSC", "cutoff": recipe("O").cutoff, "smearing": recipe("O").smearing, "oxides": _mesh("O"), "others": _mesh("N"),
              "late": sorted(LATE), "old setups": SETUPS_08, "alkali": sorted(ALKALI)}
    return results.write_run("gllbsc-validation", f"seed{seed}", config=config, seed=seed, data_set="perov_5", split="test",
                             n=len(good), metrics=m, claims=claims_of(m), curve=rows, wall_time_s=sum(r["seconds"] for r in rows))


def errors(rows):
    """How far rows of `validate` are from their labels (eV); counted_<kind>: with those that have no gap here as 0."""
    good, m = [r for r in rows if r["gap"]], {"tried": len(rows)}
    m |= {"no_result": sum(r["status"] != "ok" for r in rows), "no_gap": sum(r["status"] == "ok" and not r["gap"] for r in rows)}
    for k in ("direct", "indirect") if good else ():
        e = misses(rows, k)
        m |= {f"mae_{k}": np.abs(e).mean(), f"bias_{k}": e.mean(), f"median_{k}": np.median(np.abs(e)), f"largest_{k}": np.abs(e).max()}
    if good:
        mean = np.mean([r["label_direct"] for r in good])
        m["trivial_direct"] = float(np.mean([abs(r["label_direct"] - mean) for r in good]))
    done = [r for r in rows if r["status"] == "ok"]
    for k in ("direct", "indirect") if done else ():
        m[f"counted_{k}"] = float(np.mean([abs(counted(r, k) - r[f"label_{k}"]) for r in done]))
    return m


def claims_of(m):
    """What `errors` answers of paper.csv; the split says what became of the materials without a gap. Undecided where the target is met
    without them and missed with them as 0 eV."""
    claims, reference = {}, results.read_reference().set_index("id")
    for kind, row in (("direct", "x.gllbsc.mae"), ("indirect", "x.gllbsc.mae_indirect")):
        split = f"test, {m['tried'] - m['no_result'] - m['no_gap']} of {m['tried']} with a gap"
        split += f" ({m[f'counted_{kind}']:.3f} eV with the others as 0)" if m["no_gap"] else ""
        if f"mae_{kind}" in m:
            counts = [m[f"mae_{kind}"]] + ([m[f"counted_{kind}"]] if m["no_gap"] else [])
            claims[row] = {"value": counts[0], "split": f"{split}, not used for the recipe",
                           "undecided": results.disagree(counts, reference.loc[row])}
    return claims


def _mesh(symbols):
    return {"kpts": list(recipe(symbols).kpts), "gamma": recipe(symbols).gamma}


def _config():
    s = dft.PROFILES["gllbsc"]
    return {"xc": "GLLBSC", "cutoff": s.cutoff, "kpts": list(s.kpts), "gamma": s.gamma, "smearing": s.smearing}


OPEN_D = {"Cr", "Mn", "Fe", "Co", "Ni", "V", "Re", "Mo", "W", "Cu", "Rh", "Pd"}         # as cations of halides; Pd 2+ is d8, as Ni 2+


def treatable(table):
    """Rows of data/candidates/candidates.csv with a setup for each element and without open d shells, and the others' reasons."""
    reason = []
    for f in table.formula:
        found = {crystal.atomic_number(e) for e in data.elements_of(f)}
        magnetic = sorted(set(data.elements_of(f)) & OPEN_D)
        heavy = sorted(crystal.symbol(z) for z in found & HEAVY)
        reason.append(f"no GLLB-SC setup: {', '.join(heavy)}" if heavy else f"open d shell: {', '.join(magnetic)}" if magnetic else "")
    return table.assign(reason=reason)


def nearest_first(table):
    """Rows of `treatable` without a reason against them, the predicted PBE gap nearest to its target first."""
    table = table[table.reason == ""]
    return table.iloc[np.argsort(np.abs(table.pbe_gap - table.target), kind="stable")]


def candidates(ranks=1, minutes=None):
    """GLLB-SC and PBE gaps (eV) of all treatable proposals (relaxed cubic cells), beside target and prediction.

    Writes data/results/gllbsc-candidates/seed0.json.
    """
    import pandas as pd
    from pymatgen.core import Structure
    from tqdm.auto import tqdm
    folder, start, rows = results.ROOT / "data" / "candidates", time.time(), []
    table = treatable(pd.read_csv(folder / "candidates.csv"))
    able = nearest_first(table)
    for c in tqdm(list(able.itertuples()), desc="GLLB-SC"):
        if minutes and time.time() - start > 60 * minutes:
            break
        s = Structure.from_file(folder / f"{c.formula}.cif")
        cell = cell_from_cif(s.to(fmt="cif"))
        r = row_of(gap(c.formula, cell, dft.PROFILES["gllbsc"], "gllbsc-candidates", ranks))
        try:
            pbe = dft.run(f"{c.formula}-candidate", cell, "quick", "static", ranks)
        except dft.DFTError as error:
            pbe = {"status": f"failed: {error}"[:400]}
        rows.append({"formula": c.formula, "target_pbe": c.target, "predicted_pbe": c.pbe_gap, "predicted_gllbsc": c.dir_gap,
                     "e_above_hull": c.e_above_hull, "pbe": pbe["gap"]["indirect"] if pbe["status"] == "ok" else None,
                     "seconds_pbe": round(pbe.get("seconds", 0)), "gllbsc": counted(r, "indirect"), **r})
    good = [r for r in rows if r["gap"]]
    m = {"with_gap": len(good), "tried": len(rows), "treatable": len(able), "untreatable": len(table) - len(able)}
    claims = {"x.gllbsc.candidates": {"value": len(good), "split": "generated (relaxed cubic cells)"}}
    return results.write_run("gllbsc-candidates", "seed0", config=_config(), seed=0, data_set="data/candidates", split="generated",
                             n=len(rows), metrics=m, claims=claims, curve=rows,
                             wall_time_s=sum(r["seconds"] + r["seconds_pbe"] for r in rows))


def paper(ranks=1, minutes=None):
    """GLLB-SC gaps (eV) of the cubic materials of Table S1 beside their targets, which are stated in that theory, and their PBE gaps.

    At the PBE lattice constants of chapter 13. Writes data/results/gllbsc-paper/table-s1.json; left out: elements of HEAVY, and Co.
    """
    from tqdm.auto import tqdm

    from .evidence import paper_gaps
    start, rows, stated, table = time.time(), [], paper_gaps("before"), treatable(results.read_table_s1())
    for c in tqdm(list(table[table.reason == ""].itertuples()), desc="GLLB-SC"):
        pbe = dft.load(c.formula, "quick")
        if pbe is None or (minutes and time.time() - start > 60 * minutes):
            continue
        cell = pbe["cell"][0], pbe["cell"][1], np.array(pbe["cell"][2])
        r = row_of(gap(c.formula, cell, dft.PROFILES["gllbsc"], "gllbsc-paper", ranks))
        rows.append({"formula": c.formula, "target": c.target_gap_ev, "paper_pbe": stated[c.formula], "pbe": pbe["gap"]["indirect"],
                     "gllbsc": counted(r, "indirect"), **r})
    done = [r for r in rows if r["status"] == "ok"]
    m = {"tried": len(rows), "done": len(done), "with_gap": sum(r["gap"] for r in done)}
    for key in ("paper_pbe", "pbe", "gllbsc") if done else ():
        off = np.array([r[key] - r["target"] for r in done])
        m |= {f"bias_{key}": float(off.mean()), f"mae_{key}": float(np.abs(off).mean())}
    return results.write_run("gllbsc-paper", "table-s1", config=_config(), seed=None, data_set="paper, Table S1", split="cubic cells",
                             n=len(done), metrics=m, claims={}, curve=rows, wall_time_s=sum(r["seconds"] for r in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["study", "causes", "validate", "candidates", "paper"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="start no further calculation after that")
    args = parser.parse_args()
    options = {"ranks": args.ranks} | ({"minutes": args.minutes} if args.what not in ("study", "causes") else {})
    path = {"study": study, "causes": causes, "validate": validate, "candidates": candidates, "paper": paper}[args.what](**options)
    print(json.dumps(json.loads(path.read_text())["metrics"], indent=1))


if __name__ == "__main__":
    main()
