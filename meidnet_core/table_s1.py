"""The 19 materials of Table S1: energies above the hull by a potential, and gaps by the independent CGCNN.

    python -m meidnet_core.table_s1 paper --potential sevennet-0       # on the list hull, from the ideal and from a rattled cell
    python -m meidnet_core.table_s1 self --potential sevennet-0        # those of Figure 3c on a hull of the potential's own
    python -m meidnet_core.table_s1 gaps                               # gaps by the independent CGCNN (PBE of OQMD)
    python -m meidnet_core.table_s1 claims                             # the claims of the stored runs follow the code
"""

import argparse
import os
import time

import numpy as np

from . import candidates, crystal, hull, oqmd, potentials, relax, results
from .stability import DEFAULT, placing


def paper_cells():
    """(formulas, cubic cells) of Table S1."""
    formulas = list(results.read_table_s1().formula)
    return formulas, candidates.cells_of(formulas)


def _finite(metrics):
    return {k: v for k, v in metrics.items() if np.isfinite(v)}


def _failed(formulas, rows):
    """{"KTaSe3 ideal": status} of relaxations without an energy; rows as of relax.relax_all."""
    return {f"{f} {kind}": r["status"] for kind in rows for f, r in zip(formulas, rows[kind]) if r["energy_per_atom"] is None}


def paper(potential, seed=0, **options):
    """Table S1 on the list hull, from the ideal and from a rattled cell; data/results/table-s1/<potential>.json.

    Rows of paper.csv are answered by DEFAULT alone: a stand-in for eSEN-30M-OAM, named in the claim. A relaxation that failed has
    no metrics and no claim; the entry "failed" names it.
    """
    start, correction, (formulas, cells), m = time.time(), hull.corrections(potential), paper_cells(), {}
    rows = relax.relax_all(cells, hull.default_path(potential, "cells"), potential, relax.STARTS, **options)
    found = {kind: [hull.e_above_hull(r, correction) for r in rows[kind]] for kind in relax.STARTS}
    for kind in relax.STARTS:
        for formula, row, placed in zip(formulas, rows[kind], found[kind]):
            edge = float(np.cbrt(5 * row.get("volume", np.nan)))
            m |= _finite({f"{formula}_{kind}": 1000 * placed["e_above_hull"], f"{formula}_{kind}_a": edge})
    m["in_list"] = sum(hull.reduced(c[1]) in hull.listed() for c in cells)
    claims = claims_of_paper(m, formulas, potential) if potential == DEFAULT else {}
    curve = {kind: [p["decomposition"] for p in found[kind]] for kind in relax.STARTS}
    return results.write_run("table-s1", potential, config={"potential": potential, "hull": "list"}, seed=seed, data_set="paper, Table S1",
                             split="all 19", n=len(formulas), metrics=m, claims=claims, curve=curve, failed=_failed(formulas, rows),
                             wall_time_s=time.time() - start)


def claims_of_paper(m, formulas, potential):
    """Rows of Table S1 and Figure 3c: cubic cells, which keep their symmetry. Undecided where the rattled cell has another verdict: the
    paper relaxes decoded cells and says nothing of symmetry."""
    reference = results.read_reference().set_index("id")
    claims = {"ts1.rows": {"value": len(formulas), "split": results.BUILT}, "ts1.in_mp": {"value": m["in_list"], "split": "all"}}
    for f in (f for f in formulas if f"{f}_ideal" in m):
        rattled, split = m.get(f"{f}_rattled"), f"cubic cell ({potential} for eSEN, list hull"
        split += f"; rattled {rattled:.0f})" if rattled is not None else ")"
        for name in (i for i in (f"ts1.{f.lower()}.ehull_esen", f"f3c.{f.lower()}.ehull_esen") if i in reference.index):
            row, values = reference.loc[name], [v for v in (m[f"{f}_ideal"], rattled) if v is not None]
            claims[name] = {"value": values[0], "split": split, "undecided": results.disagree(values, row)}
    return claims


def own_hull(potential, seed=0, formulas=("KTaSe3", "BaHfSe3", "LaScSe3", "YbScSe3"), **options):
    """Figure 3c on a hull of the potential's own: competing phases of MP-20 relaxed with it; data/results/hull-self/<potential>.json.

    What failed, a relaxation or a whole hull, has no metrics; the entry "failed" names it.
    """
    start, (names, cells), m = time.time(), paper_cells(), {}
    cells = [cells[names.index(f)] for f in formulas]
    rows = relax.relax_all(cells, hull.default_path(potential, "cells"), potential, relax.STARTS, **options)
    failed = _failed(formulas, rows)
    for i, formula in enumerate(formulas):
        try:
            diagram = hull.self_diagram(set(cells[i][1]), hull.default_path(potential, "phases"), potential, **options)
        except hull.HullError as error:
            failed[formula] = str(error)
            continue
        m |= _finite({f"{formula}_{kind}": 1000 * hull.self_above(rows[kind][i], diagram) for kind in relax.STARTS})
        m[f"{formula}_phases"] = len(diagram.all_entries)
    return results.write_run("hull-self", potential, config={"potential": potential, "hull": "self"}, seed=seed, data_set="mp_20",
                             split="all", n=len(formulas), metrics=m, claims={}, failed=failed, wall_time_s=time.time() - start)


def paper_crystals(potential=DEFAULT):
    """CrystalSet of the cubic cells of Table S1 at the lattice constants of `paper`, ids their formulas; its label is what the potential
    said of them: energy above the list hull (eV/atom), NaN where it failed (the lattice constant is then the estimate it began with)."""
    from . import dft
    formulas, m = list(results.read_table_s1().formula), results.read_run("table-s1", potential)["metrics"]
    cells = [dft.cubic_start(f, potential) if f"{f}_ideal_a" in m else candidates.cells_of([f])[0] for f in formulas]
    numbers = np.array([[crystal.atomic_number(e) for e in c[1]] for c in cells], np.int16)
    labels = np.array([[m.get(f"{f}_ideal", np.nan) / 1000] for f in formulas])
    return oqmd.cells("table_s1", "all", formulas, numbers, [c[0][0] for c in cells], labels, tuple(oqmd.OWN_LABEL))


def gaps(potential=DEFAULT, **_):
    """Gaps (eV) of the paper's materials by the independent CGCNN of Figure S3; data/results/table-s1-gaps/cgcnn.json.

    Cubic cells at the lattice constants of `paper`. That CGCNN learnt PBE gaps of OQMD; the one of Perov-5 (GLLB-SC, trained
    without Se, I, Yb, Eu or Tm) is in the metrics as <formula>_perov5. <formula>_cells: training cells with the rarest element.
    """
    from . import cgcnn, data, evidence
    start, table, crystals = time.time(), results.read_table_s1(), paper_crystals(potential)
    formulas = crystals.ids
    judges = {"": cgcnn.independent(), "_perov5": cgcnn.load(cgcnn.path_of(cgcnn.SETTINGS))[0]}
    found = {end: dict(zip(formulas, cgcnn.predict(model, crystals)[:, 0].astype(float))) for end, model in judges.items()}
    seen = {"": candidates.counts(cgcnn.own_fold("train")), "_perov5": candidates.counts(data.load("perov_5", "train"))}
    m = {f"{f}{end}": v for end in found for f, v in found[end].items()}
    m |= {f"{f}_cells{end}": min(seen[end].get(e, 0) for e in hull.sites_in(f)) for end in seen for f in formulas}
    stated = {"target": dict(zip(table.formula, table.target_gap_ev)), "dft": evidence.paper_gaps("before")}
    m |= {f"mae_{k}{end}": float(np.mean([abs(v - stated[k][f]) for f, v in found[end].items()])) for k in stated for end in found}
    return results.write_run("table-s1-gaps", "cgcnn", config={"potential": potential}, seed=cgcnn.INDEPENDENT.seed,
                             split="all 19, cubic cells (PBE of OQMD)", data_set="paper, Table S1", n=len(formulas), metrics=m,
                             claims=claims_of_gaps(m, formulas), wall_time_s=time.time() - start)


def claims_of_gaps(m, formulas):
    """Rows of Table S1: gaps by a CGCNN. Undecided, all of them: ours learnt PBE gaps, the paper's presumably its GLLB-SC labels."""
    reference, split = set(results.read_reference()["id"]), "all 19, cubic cells (CGCNN of PBE gaps, OQMD; the paper's presumably GLLB-SC)"
    return {row: {"value": m[f], "split": split, "undecided": True} for f in formulas
            if (row := f"ts1.{f.lower()}.gap_cgcnn") in reference}


def restate():
    """The claims of the stored runs on Table S1 follow the code; their numbers stay."""
    formulas, (placed, read) = list(results.read_table_s1().formula), (("table-s1", DEFAULT), ("table-s1-gaps", "cgcnn"))
    results.restate(*placed, claims_of_paper(results.read_run(*placed)["metrics"], formulas, DEFAULT))
    results.restate(*read, claims_of_gaps(results.read_run(*read)["metrics"], formulas))


def gap_table(metrics):
    """Table S1's gaps (eV) beside those of `gaps`: a DataFrame; metrics: those of its run file."""
    import pandas as pd

    from .evidence import paper_gaps
    stated, paper, pbe = results.read_table_s1(), results.read_reference().set_index("id").paper, paper_gaps("before")
    rows = [{"formula": f, "target": t, "paper, CGCNN": paper[f"ts1.{f.lower()}.gap_cgcnn"], "paper, PBE": pbe[f],
             "CGCNN of OQMD, PBE": metrics[f], "cells seen": metrics[f"{f}_cells"], "CGCNN of Perov-5, GLLB-SC": metrics[f"{f}_perov5"],
             "cells seen there": metrics[f"{f}_cells_perov5"]} for f, t in zip(stated.formula, stated.target_gap_ev)]
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["paper", "self", "gaps", "claims"])
    parser.add_argument("--potential", default=DEFAULT, help="auto: the best that is present (and, on the list hull, was fitted)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.what == "claims":
        restate()
        return results.write_claims()
    chosen = (potentials.pick if args.what == "self" else placing)(args.potential)
    print({"paper": paper, "self": own_hull, "gaps": gaps}[args.what](chosen, processes=args.processes))


if __name__ == "__main__":
    main()
