"""From a potential to an energy above hull, and how far to trust it.

    python -m meidnet_core.stability fit --potential sevennet-0        # corrections, fitted and tested on MP-20
    python -m meidnet_core.stability validate --potential sevennet-0   # known cubic ABX3 against OQMD's; --own: on a hull of its own
"""

import argparse
import os
import time
from functools import partial

import numpy as np

from . import crystal, hull, matching, oqmd, potentials, relax, results

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fit", "validate"])
    parser.add_argument("--potential", default=DEFAULT, help="auto: the best that is present (and, on the list hull, was fitted)")
    parser.add_argument("--own", action="store_true", help="validate: on the potential's own hull (an hour)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.own and args.what != "validate":
        parser.error("--own goes with validate")
    listed = args.what == "validate" and not args.own
    job = fit if args.what == "fit" else partial(validate, own=args.own)
    print(job((placing if listed else potentials.pick)(args.potential), processes=args.processes))


if __name__ == "__main__":
    main()
