"""Is a crystal new, and to whom? Formulas of training, MP-20, the hull list and OQMD; structures among each other."""

from functools import lru_cache

import numpy as np

from . import crystal, hull, matching, oqmd

REFERENCES = ("training", "mp_20", "list", "oqmd")
SPOKEN = {"training": "training", "mp_20": "MP-20", "list": "the hull list", "oqmd": "OQMD", "anywhere": "every set"}


def known_everywhere():
    """Composition keys of all ABX3 that any reference holds, for Designer(known=...)."""
    keys = set().union(*map(known_formulas, REFERENCES))
    return frozenset((tuple(z for z, _ in k), tuple(n for _, n in k)) for k in
                     (sorted((crystal.atomic_number(e), n) for e, n in f) for f in keys if sum(n for _, n in f) == 5))


@lru_cache(None)
def known_formulas(reference):
    """Reduced formulas of a reference: training | mp_20 | list | oqmd (every phase of the table, cubic or not)."""
    if reference == "training":
        return frozenset(hull.reduced(c[1]) for c in matching.true_cells(oqmd.load("train")))
    if reference == "mp_20":
        return frozenset(hull.reduced(c[1]) for c in hull.known_phases()[0])
    if reference == "list":
        return frozenset(hull.listed())
    return frozenset(map(hull.whole_of, oqmd.read_table().name.unique()))


def new_to(symbols):
    """{reference: bool} of one crystal: its formula is unknown there."""
    return {r: hull.reduced(symbols) not in known_formulas(r) for r in REFERENCES}


def unique(rows):
    """(M,) bool: the first of its kind among relaxed rows, by formula and StructureMatcher at pymatgen's tolerances."""
    groups, out = {}, []
    for row in rows:
        cell = (np.array(row["lattice"]), row["symbols"], np.array(row["frac"])) if "lattice" in row else None
        others = groups.setdefault(hull.reduced(row["symbols"]), [])
        fresh = cell is None or all(np.isnan(matching.match_one((cell, o, matching.DEFAULT))) for o in others)
        if cell is not None and fresh:
            others.append(cell)
        out.append(fresh)
    return np.array(out, bool)
