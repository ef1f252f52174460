"""Cubic ABX3 relaxed by this project, data/abx3_relaxed.csv: what stands in for OQMD where its table cannot be had.

    python -m meidnet_core.own_cells --minutes 20      # relax more compositions, write what is there
    python -m meidnet_core.own_cells --compare 3       # does a model that was trained with them know thin chemistry better? three seeds

Neutral compositions of the tolerance window in random order (seed 0), and whatever else was relaxed as a cubic cell (proposals, known
ABX3 of the validation), with a potential of this book; energies above the list hull. These energies are no label of OQMD's theory:
where the cells stand in for OQMD (`oqmd.own_cells`) every label is unknown, and a model that learns from them (`experiments
extended-own`) has a column of its own for them.
"""

import argparse
import json
import time
from functools import lru_cache

import numpy as np

from . import candidates, crystal, data, design, experiments, hull, matching, oqmd, relax, results, sun, table_s1
from .config import EXTENDED, EXTENDED_OWN
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


def merged(found, path=OWN):
    """Rows of `found` and those of the file that it lacks, in order: a cache that was emptied takes nothing from the file."""
    import pandas as pd
    everything = pd.concat([pd.read_csv(path), found]) if path.exists() else found
    return everything.drop_duplicates(["A", "B", "X", "potential"], keep="last").sort_values(["A", "B", "X"], ignore_index=True)


def is_cubic(row, tolerance=1e-3):
    """Edges equal, angles right, sites where the perovskite has them."""
    lattice, shift = np.asarray(row["lattice"]), np.asarray(row["frac"]) - crystal.PEROVSKITE
    shift = crystal.wrap(shift - shift[1])
    return np.ptp(lattice[:3]) < tolerance * lattice[0] and np.abs(lattice[3:] - 90).max() < 0.1 and np.abs(shift).max() < tolerance


# ---- do they help? ------------------------------------------------------------------------------

CLASSES = {"all": (), "oxides": ("O",), "chalcogenides": ("S", "Se", "Te"), "halides": ("F", "Cl", "Br", "I"), "nitrides": ("N",)}


def readers(seed, train):
    """{name: function of a CrystalSet that reads "energy above the list hull, SevenNet-0" (M,) in eV/atom from it}.

    without: model of OQMD alone, its distance to the OQMD hull less the mean offset of `train`. with: own label of the model that learnt
    it. ridge: `train`, a sum over site elements. mean: of `train`. CheckpointError when a model is missing.
    """
    plain, taught = (experiments.required(cfg.with_(seed=seed)) for cfg in (EXTENDED, EXTENDED_OWN))
    say = lambda model, cells: design.predict([model], cells)[0][:, -1]                          # stability; own_stability
    known = train.labels[:, -1]
    offset, lesson = (known - say(plain, train)).mean(), candidates.Lesson(train.numbers, known)
    return {"without": lambda cells: say(plain, cells) + offset, "with": lambda cells: say(taught, cells),
            "mean": lambda cells: np.full(len(cells), known.mean()), "ridge": lambda cells: lesson(cells.numbers)}


def compare(seed=0):
    """What the `readers` are worth on held-out cells, MAE in eV/atom {set_class_reader: value}, and `ranked`.

    sets: own (test split of these cells, without compositions of OQMD), paper (those of Table S1 that the training split does not hold).
    """
    own = oqmd.own_cells(labelled=True)
    train, test = oqmd.part("train", everything=own), new_to(candidates.seen(oqmd.cubic()), oqmd.part("test", everything=own))
    reading, m = readers(seed, train), {"train_cells": len(train)}
    for name, cells in (("own", test), ("paper", paper_cells(train))):
        read = {k: f(cells) for k, f in reading.items()}
        for kind, anions in CLASSES.items():
            mine = np.isin(cells.numbers[:, 2], [crystal.atomic_number(x) for x in anions]) | (not anions)
            error = {k: float(np.abs(v - cells.labels[:, -1])[mine].mean()) for k, v in read.items() if mine.any()}
            m |= {f"{name}_{kind}_{k}": v for k, v in error.items()} | {f"{name}_{kind}_cells": int(mine.sum())}
    return m | ranked(reading)


@lru_cache(None)
def window():
    """(CrystalSet, energy above the list hull (M,) in eV/atom, SevenNet-0): compositions of the tolerance window, all relaxed
    (`sun --ceiling`), whose place in the splits is outside train: no model has learnt from them."""
    curve = results.read_run("sun-ceiling", "window")["curve"]
    cells, above = candidates.cubes_of(curve["formula"]), np.array(curve["e_above_hull"], float)
    held = (oqmd.position(cells.numbers) >= oqmd.SHARES["train"][1]) & np.isfinite(above)
    return cells.select(held), above[held]


def ranked(reading, limit=0.1):
    """Does a reader put stable compositions first? Of the K of `window` within `limit` eV/atom of the hull, the share (%) that stands
    among its K first: {window_<reader>}, window_chance, and the numbers of cells."""
    cells, above = window()
    stable = above <= limit
    first = lambda read: np.argsort(read, kind="stable")[:stable.sum()]
    m = {f"window_{k}": 100 * float(stable[first(f(cells))].mean()) for k, f in reading.items() if k != "mean"}       # no order in a mean
    return m | {"window_chance": 100 * float(stable.mean()), "window_cells": len(cells), "window_stable": int(stable.sum())}


def paper_cells(train):
    """Cubic cells of Table S1 that the potential could relax, labelled by it; without compositions of a training split."""
    cells = table_s1.paper_crystals()
    return new_to(candidates.seen(train), cells.select(np.isfinite(cells.labels[:, -1])))


def new_to(known, cells):
    """The cells of a CrystalSet whose composition is not among the known ones (candidates.seen)."""
    return cells.select(np.array([data.composition_key(z) not in known for z in cells.numbers]))


def write_comparison(seeds):
    for seed in range(seeds):
        start, m = time.time(), compare(seed)
        config = {"classes": {k: list(v) for k, v in CLASSES.items()}, "limit": 0.1}
        path = results.write_run("own-cells", f"seed{seed}", config=config, seed=seed, data_set="abx3_relaxed",
                                 split="test of these cells; cells of Table S1", n=m["own_all_cells"], metrics=m, claims={},
                                 wall_time_s=time.time() - start)
        print(path.name, {k: round(v, 3) for k, v in m.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--potential", default="sevennet-0")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--compare", type=int, metavar="SEEDS", help="compare models with and without these cells; relaxes nothing")
    args = parser.parse_args()
    if args.compare:
        return write_comparison(args.compare)
    relax_more(args.potential, args.minutes, processes=args.processes)
    out = merged(table(args.potential))
    _write_atomic(OWN, out.to_csv(index=False))
    print(json.dumps({"file": str(OWN), "cells": len(out), "within 0.1 eV/atom": int((out.e_above_hull <= 0.1).sum())}))


if __name__ == "__main__":
    main()
