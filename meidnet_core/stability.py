"""From a potential to an energy above hull, and how far to trust it.

    python -m meidnet_core.stability fit --potential sevennet-0        # corrections, fitted and tested on MP-20
    python -m meidnet_core.stability validate --potential sevennet-0   # known cubic ABX3 against OQMD's; --own: on the hull of `self`
    python -m meidnet_core.stability paper --potential sevennet-0      # the 19 materials of Table S1 on the same hull
    python -m meidnet_core.stability self --potential sevennet-0       # those of Figure 3c on a hull of the potential's own
    python -m meidnet_core.stability gaps                              # gaps of Table S1 by the independent CGCNN
"""

import argparse
import os
import time
from functools import partial

import numpy as np

from . import candidates, crystal, hull, matching, oqmd, potentials, relax, results

PER_CLASS, TEST_SHARE, LARGEST = 80, 0.25, 12          # MP-20 cells per class of correction; share kept for the test; sites per cell
GROUND = 0.001                                         # eV/atom above the hull: the cell is the ground state of its formula
FEWEST = 8                                             # cells that a correction must rest on; else it is zero
THRESHOLDS = (0.0, 0.1)                                # eV/atom above hull
DEFAULT = "sevennet-0"                                 # the potential whose numbers answer rows of paper.csv
VALIDATE = 300                                         # known cubic perovskites
OWN_FMAX = 0.05                                        # eV/angstrom, competing phases of the validation on a potential's own hull


def placing(potential=DEFAULT):
    """The potential to place crystals on the list hull with: as named, for `auto` the best that is present and has fitted corrections.

    `auto` prints its choice. HullError when none that is present was fitted.
    """
    if potential != "auto":
        return potential
    best = potentials.pick()
    fitted = [n for n in potentials.ORDER if potentials.present(n) and hull.fit_file(n).exists()]
    if not fitted:
        raise hull.HullError("auto: no potential that is present has corrections for the list hull: run `python -m "
                             f"meidnet_core.stability fit --potential {best}`")
    why = "" if fitted[0] == best else f" ({best}, the best that is present, has no corrections for this hull)"
    print(f"placed on the list hull with {fitted[0]}{why}")
    return fitted[0]


def placed(cells, potential=DEFAULT, path=None, **options):
    """Crystals relaxed from the ideal and from a rattled start, on the list hull: (DataFrame, a row a crystal; the relaxed cells, each
    of the start that ends lower, None where both failed).

    e_above_hull, rattled: eV/atom of the two starts (NaN where a relaxation failed); relaxed a: cube root of the volume a formula unit
    (angstrom); falls apart into: products of the ideal start, or what went wrong. potential: see `placing`. options: of relax.relax_all.
    """
    import pandas as pd
    potential = placing(potential)
    correction, path = hull.corrections(potential), path or hull.default_path(potential, "notebook")
    rows = relax.relax_all(cells, path, potential, relax.STARTS, **options)
    found = {s: [hull.e_above_hull(r, correction) for r in rows[s]] for s in relax.STARTS}
    volume = [r.get("volume", np.nan) * 5 for r in rows["ideal"]]
    above, rattled = ([f["e_above_hull"] for f in found[s]] for s in ("ideal", "rattled"))
    table = pd.DataFrame({"e_above_hull": above, "rattled": rattled, "relaxed a": np.cbrt(volume),
                          "falls apart into": [str(f["decomposition"]) for f in found["ideal"]]}).round(3)
    return table, [_lower(pair) for pair in zip(*rows.values())]


def _lower(rows):
    """Cell (lattice, symbols, frac) of the relaxation that ends lowest in energy; None when none of them ended."""
    ended = [r for r in rows if r["status"] == "ok"]
    best = min(ended, key=lambda r: r["energy_per_atom"], default=None)
    return best and relax.cell_from(best)


def ground_state_cells(seed=0):
    """(cells, listed formation energies): MP-20 cells that are the ground state of their formula in the list, random order.

    At most PER_CLASS cells of each class: every metal that the list treats with +U, every anion, everything else.
    """
    cells, labels, _ = hull.known_phases()
    count, out = {}, []
    for i in np.random.default_rng(seed).permutation(len(cells)):
        symbols = cells[i][1]
        if not (1 < len(set(symbols)) and len(symbols) <= LARGEST and labels[i, 2] < GROUND):
            continue
        kind, listed = _class(symbols), hull.listed().get(hull.reduced(symbols))
        if listed is not None and count.get(kind, 0) < PER_CLASS:
            count[kind] = count.get(kind, 0) + 1
            out.append((cells[i], listed))
    return [c for c, _ in out], np.array([e for _, e in out])


def _class(symbols):
    carried = [t for t, x in zip(hull.TERMS, hull.terms(symbols)) if x]
    return carried[-1] if carried else "none"                                         # +U metals come last, so they go first


def _formula(symbols):
    return "".join(f"{e}{n if n > 1 else ''}" for e, n in hull.reduced(symbols))


def energies(cells, path, potential, **options):
    """Energies (M,) eV/atom at given geometries: a relaxation of no step, so that it is parallel, kept and resumed like one."""
    rows = relax.relax_all(cells, path, potential, steps=0, **options)["ideal"]
    return np.array([np.nan if r["energy_per_atom"] is None else r["energy_per_atom"] for r in rows])


def fit(potential, seed=0, **options):
    """Fit the corrections on MP-20 ground states, test them on others; writes data/results/hull-fit/<potential>.json."""
    start = time.time()
    cells, listed = ground_state_cells(seed)
    energy = energies(cells, hull.default_path(potential, "points"), potential, **options)
    plain = np.array([hull.formation_energy(e, c[1]) for e, c in zip(energy, cells)])
    test = np.random.default_rng(seed).random(len(cells)) < TEST_SHARE
    known = ~np.isnan(plain)
    few = known & ~test
    c = hull.fit([cells[i][1] for i in np.flatnonzero(few)], plain[few], listed[few], FEWEST)
    after = plain - np.array([hull.terms(x[1]) @ c for x in cells])
    m = {f"correction_{t}": float(v) for t, v in zip(hull.TERMS, c)} | {"n_fit": int(few.sum())}
    for name, value in (("before", plain), ("after", after)):
        error = (value - listed)[known & test]
        m |= {f"mae_{name}": float(np.abs(error).mean()), f"median_{name}": float(np.median(error)),
              f"p90_{name}": float(np.quantile(np.abs(error), 0.9))}
    m["srtio3_e_above_hull"] = srtio3(potential, c, **options)
    curve = {"formula": [_formula(x[1]) for x in cells], "test": test.tolist(), "listed": listed.round(4).tolist(),
             "before": plain.round(4).tolist(), "after": after.round(4).tolist()}
    config = {"potential": potential, "largest": LARGEST, "ground": GROUND, "fewest": FEWEST, "per_class": PER_CLASS}
    return results.write_run("hull-fit", potential, config=config, seed=seed, data_set="mp_20",
                             split="ground states of the list, 3/4 for the fit, 1/4 for its test", n=int((known & test).sum()), metrics=m,
                             claims={}, curve=curve, wall_time_s=time.time() - start)


def srtio3(potential, correction, **options):
    """Energy above the list hull (eV/atom) of cubic SrTiO3 relaxed with the potential: the check that a hull must pass."""
    cell = (np.array([3.95] * 3 + [90.0] * 3), ["Sr", "Ti", "O", "O", "O"], crystal.PEROVSKITE)
    row = relax.relax_all([cell], hull.default_path(potential, "cells"), potential, **options)["ideal"][0]
    return hull.e_above_hull(row, correction)["e_above_hull"]


def validation_cells(count=VALIDATE, seed=0):
    """Known cubic ABX3 of OQMD (cells, stability): half of them at most 0.1 eV/atom above the hull, fixed seed, no duplicates."""
    known, rng = oqmd.cubic(), np.random.default_rng(seed)
    value = known.labels[:, known.label_names.index("stability")]
    groups = np.flatnonzero(value <= 0.1), np.flatnonzero((value > 0.1) & (value < 1))
    rows = np.sort(np.concatenate([rng.permutation(g)[:count // 2] for g in groups]))
    return matching.true_cells(known.select(rows)), value[rows]


def agreement(ours, reference, threshold):
    """Classification at a threshold (eV/atom): accuracy, precision, recall (%)."""
    a, b = ours <= threshold, reference <= threshold
    return {"accuracy": 100 * float((a == b).mean()), "precision": 100 * float(b[a].mean()) if a.any() else None,
            "recall": 100 * float(a[b].mean()) if b.any() else None}


def validate(potential, seed=0, own=False, **options):
    """Energy above hull of known cubic perovskites against OQMD's, on the list hull or the potential's own.

    Writes data/results/hull-validation/<potential>.json or <potential>-self.json.
    """
    start, correction = time.time(), None if own else hull.corrections(potential)
    cells, reference = validation_cells(seed=seed)
    rows = relax.relax_all(cells, hull.default_path(potential, "cells"), potential, **options)["ideal"]
    ours = above_own(rows, potential, **options) if own else [hull.e_above_hull(r, correction)["e_above_hull"] for r in rows]
    ours, m = np.array(ours, float), {}
    known = ~np.isnan(ours)
    near = known & (reference <= 0.3)
    m["mae"], m["median"] = float(np.abs(ours - reference)[known].mean()), float(np.median((ours - reference)[known]))
    m["mae_near"], m["failed"] = float(np.abs(ours - reference)[near].mean()), int((~known).sum())
    for t in THRESHOLDS:
        m |= {f"{k}_at_{t:g}": v for k, v in agreement(ours[known], reference[known], t).items() if v is not None}
    plain = [round(v, 4) if v == v else None for v in ours.tolist()]
    curve = {"formula": [_formula(c[1]) for c in cells], "oqmd": reference.round(4).tolist(), "ours": plain}
    config = {"potential": potential, "hull": "self" if own else "list", "cells": len(cells)}
    config |= {"phases": "ground states of MP-20", "fmax": OWN_FMAX} if own else {}
    return results.write_run("hull-validation", f"{potential}-self" if own else potential, config=config, seed=seed, metrics=m, curve=curve,
                             data_set="oqmd_abx3", n=int(known.sum()), claims={}, wall_time_s=time.time() - start,
                             split="cubic cells, half of them within 0.1 eV/atom of the OQMD hull")


def precision_at(share, precision, recall, base=0.5):
    """Precision (0-1) where a `share` of all cells is stable, from precision and recall measured where `base` of them is (Bayes)."""
    wrong = recall * base / (1 - base) * (1 / precision - 1)               # of the unstable ones, called stable
    return recall * share / (recall * share + wrong * (1 - share))


def validation_table(runs):
    """How well potentials and hulls place known ABX3: a DataFrame; runs {"hull-fit/...": run, "hull-validation/...": run}."""
    import pandas as pd
    rows = []
    for key, run in runs.items():
        if key.startswith("hull-validation/"):
            v, own = run["metrics"], run["config"]["hull"] == "self"
            f = {} if own else runs[f"hull-fit/{run['config']['potential']}"]["metrics"]
            meV = lambda value: None if value is None else 1000 * value
            rows.append({"potential": run["config"]["potential"], "hull": "its own" if own else "list", "known ABX3": run["n"],
                         "fit: MAE before": meV(f.get("mae_before")), "after": meV(f.get("mae_after")),
                         "SrTiO3 above hull": meV(f.get("srtio3_e_above_hull")), "MAE against OQMD (meV/atom)": meV(v["mae"]),
                         "right at 0 (%)": v["accuracy_at_0"], "right at 0.1 (%)": v["accuracy_at_0.1"],
                         "precision at 0 (%)": v.get("precision_at_0"), "recall at 0 (%)": v.get("recall_at_0"),
                         "precision at 0.1 (%)": v.get("precision_at_0.1"), "recall at 0.1 (%)": v.get("recall_at_0.1")})
    return pd.DataFrame(rows)


def above_own(rows, potential, **options):
    """(M,) eV/atom of relaxed rows above hulls of the potential's own; NaN without an energy or without that of a competing phase.

    Competing phases: ground states of MP-20, relaxed to OWN_FMAX, all of them in one call so that it is parallel.
    """
    path, options = hull.default_path(potential, "phases"), options | {"fmax": OWN_FMAX}
    systems = {frozenset(r["symbols"]) for r in rows}
    phases = {id(c): c for s in systems for c in hull.competing(s, GROUND)}
    relax.relax_all(list(phases.values()), path, potential, **options)
    diagrams = {}
    for s in systems:
        try:
            diagrams[s] = hull.self_diagram(s, path, potential, GROUND, **options | {"progress": False})
        except hull.HullError as error:
            print(error)
    known = [(r, diagrams.get(frozenset(r["symbols"]))) for r in rows]
    return np.array([np.nan if d is None else hull.self_above(r, d) for r, d in known])


# ---- the paper's materials ----------------------------------------------------------------------

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
    claims = {"ts1.rows": {"value": len(formulas), "split": "by construction"}, "ts1.in_mp": {"value": m["in_list"], "split": "all"}}
    for f in (f for f in formulas if f"{f}_ideal" in m):
        rattled, split = m.get(f"{f}_rattled"), f"cubic cell ({potential} for eSEN, list hull"
        split += f"; rattled {rattled:.0f})" if rattled is not None else ")"
        for name in (i for i in (f"ts1.{f.lower()}.ehull_esen", f"f3c.{f.lower()}.ehull_esen") if i in reference.index):
            row, values = reference.loc[name], [v for v in (m[f"{f}_ideal"], rattled) if v is not None]
            said = {results.verdict(row.paper, v, row.sense, row.tolerance, row.target) for v in values}
            claims[name] = {"value": values[0], "split": split, "undecided": len(said) > 1}
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
    formulas = paper_cells()[0]
    for experiment, run, claims_of in (("table-s1", DEFAULT, lambda m: claims_of_paper(m, formulas, DEFAULT)),
                                       ("table-s1-gaps", "cgcnn", lambda m: claims_of_gaps(m, formulas))):
        results.restate(experiment, run, claims_of(results.read_run(experiment, run)["metrics"]))


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
    parser.add_argument("what", choices=["fit", "validate", "paper", "self", "gaps", "claims"], help="claims: of the stored runs, restated")
    parser.add_argument("--potential", default=DEFAULT, help="auto: the best that is present (and, on the list hull, was fitted)")
    parser.add_argument("--own", action="store_true", help="validate: on the potential's own hull (an hour)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.own and args.what != "validate":
        parser.error("--own goes with validate")
    if args.what == "claims":
        restate()
        return results.write_claims()
    jobs = {"fit": fit, "validate": partial(validate, own=args.own), "paper": paper, "self": own_hull, "gaps": gaps}
    listed = args.what in ("validate", "paper", "gaps") and not args.own
    print(jobs[args.what]((placing if listed else potentials.pick)(args.potential), processes=args.processes))


if __name__ == "__main__":
    main()
