"""Perov-5 and the cubic ABX3 cells of OQMD in one set: chemistry that Perov-5 lacks (halides, lanthanides, some chalcogenides).

Labels of different theory stay apart: the set has a column for each, NaN where a source has none. Splits go by composition.
"""

import warnings
from functools import lru_cache

import numpy as np

from . import crystal, data
from .data import CrystalSet
from .results import ROOT
from .sources import DataError, MissingTable, mirror

# label column -> level of theory
LABELS = data.LABELS["perov_5"] | {
    "pbe_gap": "gap, PBE (eV), OQMD", "delta_e": "formation energy, PBE with OQMD references (eV/atom)",
    "stability": "energy above the OQMD hull, PBE (eV/atom)"}
COLUMNS = {"pbe_gap": "band_gap", "delta_e": "delta_e", "stability": "stability"}          # ours -> the table's
UNCONVERGED = 5.0              # eV/atom; rows beyond are failed calculations
OWN = ROOT / "data" / "abx3_relaxed.csv"                                                   # written by own_cells.py
OWN_LABEL = {"own_stability": "energy above the list hull, SevenNet-0 (eV/atom), cells relaxed by this project"}
OWN_COLUMNS = ["A", "B", "X", "a", "energy_per_atom", "e_above_hull", "potential"]         # angstrom, eV, eV/atom
SHARES = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}


def read_table():
    """The OQMD table, rows with |delta_e| or stability above 5 eV/atom dropped. DataError for a missing column."""
    import pandas as pd
    path = mirror("oqmd_abx3", "oqmd_abx3")
    table = pd.read_csv(path)
    missing = [c for c in ("name", "spacegroup", "volume", "natoms", "sites", *COLUMNS.values()) if c not in table]
    if missing:
        raise DataError(f"{path}: column {', '.join(missing)} missing; found {', '.join(table.columns)}")
    return table[(table.delta_e.abs() < UNCONVERGED) & (table.stability.abs() < UNCONVERGED)]


def perovskite_sites(text):
    """'Cs @ 0 0 0; ...' of a cubic five-atom cell -> atomic numbers A, B, X, X, X; None when it is no perovskite ABX3.

    X is the element of three sites, B the one of the others that is half a cell away from each X (A: half a face diagonal).
    """
    symbols, places = zip(*(part.split(" @ ") for part in text.split("; ")))
    frac = np.array([p.split() for p in places], float)
    x = [i for i, s in enumerate(symbols) if symbols.count(s) == 3]
    rest = [i for i in range(5) if i not in x]
    if len(x) != 3 or symbols[rest[0]] == symbols[rest[1]]:
        return None
    away = {i: np.linalg.norm(crystal.wrap(frac[x] - frac[i]), axis=1) for i in rest}
    b = [i for i in rest if np.allclose(away[i], 0.5, atol=1e-3)]
    a = [i for i in rest if np.allclose(away[i], 0.5**0.5, atol=1e-3)]
    return [crystal.atomic_number(symbols[i]) for i in (*a, *b, *x)] if len(a) == len(b) == 1 else None


@lru_cache(None)
def cubic(stand_in=False):
    """All cubic perovskite cells of the table as one CrystalSet; of equal arrangements the one of lowest energy.

    stand_in: where the table is not there, the cells of data/abx3_relaxed.csv, without labels and with a warning.
    """
    try:
        table = read_table()
    except MissingTable as error:
        if not stand_in:
            raise
        warnings.warn(f"{str(error).split(':')[0]} is not there: cells of data/abx3_relaxed.csv stand in for it", stacklevel=2)
        return own_cells()
    table = table[(table.natoms == 5) & (table.spacegroup == "Pm-3m")].sort_values("delta_e", kind="stable")
    sites = [perovskite_sites(s) for s in table.sites]
    first = {tuple(z): i for i, z in reversed(list(enumerate(sites))) if z}
    rows = sorted(first.values())
    table, numbers = table.iloc[rows], np.array([sites[i] for i in rows], np.int16)
    labels = np.column_stack([table[COLUMNS[l]] if l in COLUMNS else np.full(len(table), np.nan) for l in LABELS])
    return cells("oqmd_abx3", "all", [str(i) for i in table.entry_id], numbers, np.cbrt(table.volume.to_numpy()), labels)


def distances(numbers):
    """(M, 2) eV/atom above the OQMD hull by DFT: the cubic cells (M, 5) with A, B, X, X, X, and the lowest phase of their formulas.

    NaN where OQMD has none.
    """
    from .hull import whole_of
    known, table, lowest = cubic(), read_table(), {}
    site = {tuple(z): e for z, e in zip(known.numbers, known.labels[:, list(LABELS).index("stability")])}
    for key, e in zip(map(whole_of, table.name), table.stability):
        lowest[key] = min(e, lowest.get(key, np.inf))
    formula = [whole_of("".join(map(crystal.symbol, z))) for z in numbers]
    return np.array([(site.get(tuple(z), np.nan), lowest.get(f, np.nan)) for z, f in zip(numbers, formula)]).reshape(-1, 2)


def own_cells(path=OWN, labelled=False, potential=None):
    """CrystalSet of the cubic cells that this project relaxed. DataError names a missing file, column or element.

    Every label of LABELS is unknown; labelled: OWN_LABEL is one more column, and known. potential: only cells of this one.
    """
    import pandas as pd
    if not path.exists():
        raise DataError(f"{path}: not there; write it by `python -m meidnet_core.own_cells`")
    found = pd.read_csv(path)
    missing = [c for c in OWN_COLUMNS if c not in found]
    found = found if missing or potential is None else found[found.potential == potential]
    if missing or not len(found):
        raise DataError(f"{path}: " + (f"column {', '.join(missing)} missing" if missing else "no rows"))
    try:
        numbers = np.array([[crystal.atomic_number(e) for e in (a, b, x, x, x)] for a, b, x in found[["A", "B", "X"]].to_numpy()], np.int16)
        edges, known = found[["a", "e_above_hull"]].to_numpy(float).T
    except ValueError as error:                                              # it names the element, or what is no number
        raise DataError(f"{path}: {error}") from error
    own = cells("abx3_relaxed", "all", [str(i) for i in range(len(found))], numbers, edges, known[:, None], tuple(OWN_LABEL))
    return widened(own, (*LABELS, *OWN_LABEL) if labelled else tuple(LABELS))


def cells(name, split, ids, numbers, a, labels, names=tuple(LABELS)):
    """Cubic ideal cells as a CrystalSet: numbers (M, 5) in order A, B, X, X, X, a (M,) angstrom, labels (M, P) of these names."""
    m = len(ids)
    lattice = np.column_stack([np.repeat(np.asarray(a, float)[:, None], 3, 1), np.full((m, 3), 90.0)])
    order, frac = np.tile(np.arange(5, dtype=np.int16), (m, 1)), np.tile(crystal.PEROVSKITE, (m, 1, 1))
    return CrystalSet(name, split, names, list(ids), lattice, np.asarray(numbers, np.int16), frac, np.asarray(labels, float),
                      order, np.zeros((m, 3)), np.tile(np.eye(3, dtype=np.int8), (m, 1, 1)))


def position(numbers, seed=0):
    """Place of every composition, (M, N) numbers -> (M,) in [0, 1): A/B twins share it; a fixed function of formula and seed."""
    import zlib
    return np.array([zlib.crc32(f"{seed} {data.composition_key(z)}".encode()) / 2**32 for z in numbers])


def widened(crystals, names=tuple(LABELS)):
    """A CrystalSet with these label columns, NaN where it has none."""
    column = {l: crystals.labels[:, i] for i, l in enumerate(crystals.label_names)}
    labels = np.column_stack([column.get(l, np.full(len(crystals), np.nan)) for l in names])
    arrays = {k: getattr(crystals, k) for k in CrystalSet.ARRAYS} | {"labels": labels}
    return CrystalSet(crystals.name, crystals.split, names, crystals.ids, **arrays)


def part(split, seed=0, everything=None):
    """The cubic cells (of OQMD, or of another set `everything`) of one split: 80/10/10 by composition, another draw for another seed."""
    everything, (low, high) = cubic() if everything is None else everything, SHARES[split]
    place = position(everything.numbers, seed)
    return everything.select((place >= low) & (place < high), split)


def load(split, seed=0, stand_in=False, own=False):
    """One split of the union. OQMD by composition, 80/10/10; of Perov-5 the CDVAE split, `train` without the compositions
    that OQMD's val and test hold: nothing about a held-out OQMD composition is seen in training, whatever the theory.
    stand_in: see `cubic`; for what needs cells and no labels. own: with the cells that this project relaxed, split the same way,
    and a column for their label; ValueError together with stand_in, which would hold them twice.
    """
    if own and stand_in:
        raise ValueError("own and stand_in: the same cells twice")
    names = (*LABELS, *OWN_LABEL) if own else tuple(LABELS)
    cubes = [cubic(stand_in), *([own_cells(labelled=True)] if own else [])]
    parts = lambda s: [part(s, seed, c) for c in cubes]
    perov = data.load("perov_5", split)
    if split == "train":
        held_out = {data.composition_key(z) for s in ("val", "test") for p in parts(s) for z in p.numbers}
        perov = perov.select(np.array([data.composition_key(z) not in held_out for z in perov.numbers]))
    return data.concatenate([widened(p, names) for p in (perov, *parts(split))], split)
