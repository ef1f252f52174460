"""Cubic ABX3 relaxed by this project, data/abx3_relaxed.csv: what stands in for OQMD where its table cannot be had.

    python -m meidnet_core.own_cells --minutes 20      # relax more compositions, write what is there

Neutral compositions of the tolerance window in random order (seed 0), cubic cells, a potential of this book, energies above
the list hull. These energies are no label of OQMD's theory: `oqmd.own_cells` reads compositions and cells, and leaves every label unknown.
"""

import argparse
import json
import time

import numpy as np

from . import crystal, hull, matching, relax, sun
from .oqmd import OWN, OWN_COLUMNS
from .results import _write_atomic


def relax_more(potential, minutes, seed=0, block=20, **options):
    """Relax compositions that are not in the cache yet, block by block until the time is over; a killed call goes on."""
    start, pool = time.time(), sun.designer(symmetrize=True, novel=False).pool(True).crystals
    cells = matching.true_cells(pool.select(np.random.default_rng(seed).permutation(len(pool))))
    for k in range(0, len(cells), block):
        if time.time() - start > 60 * minutes:
            return
        relax.relax_all(cells[k:k + block], hull.default_path(potential, "cells"), potential, progress=False, **options)


def table(potential, path=None):
    """Cells of the cache that are cubic ABX3 and relaxed from the ideal start: DataFrame, one row a formula and site order."""
    import pandas as pd
    correction, rows = hull.corrections(potential), {}
    for r in relax.read_rows(path or hull.default_path(potential, "cells")).values():
        z = [crystal.atomic_number(e) for e in r["symbols"]]
        if r["status"] == "ok" and r.get("start") == "ideal" and len(z) == 5 and z[2] == z[3] == z[4] and is_cubic(r):
            a, b, x = r["symbols"][:3]
            placed = hull.e_above_hull(r, correction)["e_above_hull"]
            rows[a, b, x] = (a, b, x, np.cbrt(r["volume"] * 5), r["energy_per_atom"], placed, potential)
    return pd.DataFrame([rows[k] for k in sorted(rows)], columns=OWN_COLUMNS).round({"a": 4, "energy_per_atom": 5, "e_above_hull": 4})


def is_cubic(row, tolerance=1e-3):
    """Edges equal, angles right, sites where the perovskite has them."""
    lattice, shift = np.asarray(row["lattice"]), np.asarray(row["frac"]) - crystal.PEROVSKITE
    shift = crystal.wrap(shift - shift[1])
    return np.ptp(lattice[:3]) < tolerance * lattice[0] and np.abs(lattice[3:] - 90).max() < 0.1 and np.abs(shift).max() < tolerance


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--potential", default="sevennet-0")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    relax_more(args.potential, args.minutes, processes=args.processes)
    out = table(args.potential)
    _write_atomic(OWN, out.to_csv(index=False))
    print(json.dumps({"file": str(OWN), "cells": len(out), "within 0.1 eV/atom": int((out.e_above_hull <= 0.1).sum())}))


if __name__ == "__main__":
    main()
