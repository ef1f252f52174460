"""Perov-5, Carbon-24 and MP-20: found, checked, parsed once, cached as tensors, split.

Files come from `sources.py`. The parsed cells are kept in MEIDNET_CACHE (default: user cache).
"""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from . import crystal
from .config import SPLIT_SCHEMES
from .crystal import atomic_number, symbol
from .sources import DataError, cache_dir, check_cells, locate

# label column -> level of theory. A GLLB-SC gap and a PBE gap are different quantities.
LABELS = {
    "perov_5": {"dir_gap": "direct gap, GLLB-SC (eV)", "heat_all": "enthalpy against competing phases, RPBE (eV/atom)"},
    "mp_20": {"band_gap": "gap, PBE (eV)", "formation_energy_per_atom": "formation energy, PBE (eV/atom)"},
    "carbon_24": {"energy_per_atom": "total energy, PBE (eV/atom)"},
}
SPLITS = ("train", "val", "test")
ORIGINAL = {"carbon_24": 6091}                                       # cells of the published training split
SMALLER = {"carbon_24": f"trained on 2,897 of the original {ORIGINAL['carbon_24']:,} cells"}     # beside every claim on such a data set
VERSION = 1                                                          # of the canonical form: part of the cache key


def test_split(dataset, note=""):
    """Split of a claim: "test", with what a reader must know of the training."""
    notes = "; ".join(n for n in (note, SMALLER.get(dataset)) if n)
    return f"test ({notes})" if notes else "test"


@dataclass
class CrystalSet:
    """M cells padded to N sites. Canonical form (crystal.py) plus what is needed to undo it."""

    name: str
    split: str
    label_names: tuple
    ids: list                    # M identifiers
    lattice: np.ndarray          # (M, 6) angstrom, degrees
    numbers: np.ndarray          # (M, N) atomic numbers, 0: empty site
    frac: np.ndarray             # (M, N, 3) canonical fractional coordinates
    labels: np.ndarray           # (M, P), NaN: unknown
    order: np.ndarray            # (M, N) see crystal.Canonical
    origin: np.ndarray           # (M, 3)
    rotation: np.ndarray         # (M, 3, 3)

    ARRAYS = ("lattice", "numbers", "frac", "labels", "order", "origin", "rotation")

    def __len__(self):
        return len(self.ids)

    def select(self, index, split=None):
        """The cells of an index array or boolean mask, in that order."""
        index = np.arange(len(self))[index]
        arrays = {k: getattr(self, k)[index] for k in self.ARRAYS}
        return CrystalSet(self.name, split or self.split, self.label_names, [self.ids[i] for i in index], **arrays)

    @property
    def volume(self):
        """(M,) cubic angstrom."""
        return torch.linalg.det(crystal.lattice_matrix(torch.from_numpy(self.lattice))).abs().numpy()

    @property
    def elements(self):
        """Symbols present, by atomic number."""
        return tuple(symbol(z) for z in np.unique(self.numbers) if z)

    def structure(self, i, original=False):
        """Cell i as a pymatgen Structure; original=True: site order, origin and orientation of the file."""
        n = int((self.numbers[i] > 0).sum())
        numbers, frac = self.numbers[i, :n], self.frac[i, :n].astype(float)
        if original:
            cell = crystal.Canonical(numbers, frac, self.order[i, :n], self.origin[i], self.rotation[i])
            numbers, frac = crystal.restore(cell)
        return crystal.to_structure(self.lattice[i], [symbol(z) for z in numbers], frac)

    def formula(self, i):
        """Reduced formula in the canonical site order, e.g. SrTiO3 as 'Sr Ti O3' without spaces."""
        numbers = [z for z in self.numbers[i] if z]
        counts = {z: numbers.count(z) for z in dict.fromkeys(numbers)}
        divisor = np.gcd.reduce(list(counts.values()))
        return "".join(symbol(z) + (str(n // divisor) if n > divisor else "") for z, n in counts.items())


# ---- parsing ----------------------------------------------------------------------------------

def read_csv(path, labels):
    """The table of one split; DataError for an empty file, a missing column or labels that are no numbers."""
    import pandas as pd
    try:
        table = pd.read_csv(path)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a readable CSV file ({error}). Copy or download it again.") from error
    missing = [c for c in ("material_id", "cif", *labels) if c not in table]
    if missing or len(table) == 0:
        raise DataError(f"{path}: " + (f"column {', '.join(missing)} missing; found {', '.join(table.columns)}."
                                       if missing else "no rows.") + " Use the CSV files of the CDVAE repository.")
    for label in labels:
        numbers = pd.to_numeric(table[label], errors="coerce")
        bad = table.index[numbers.isna() & table[label].notna() | np.isinf(numbers)]
        if len(bad):
            raise DataError(f"{path}, row {bad[0] + 2}: {label} = {table[label][bad[0]]!r} is not a finite number. "
                            "Correct or empty the cell.")
    return table


def parse_cif(job):
    """(row, cif text) -> (lattice (6,), Canonical) or (row, reason) when pymatgen cannot read it."""
    import warnings

    from pymatgen.core import Structure
    row, text = job
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                          # rounding remarks of the CIF reader
            s = Structure.from_str(text, fmt="cif")
        lattice, frac = np.array(s.lattice.parameters), np.array(s.frac_coords)
        numbers = np.array([site.specie.Z for site in s])
        if numbers.min() < 1 or numbers.max() > 103:                 # pymatgen reads any symbol as a dummy species
            raise ValueError(f"unknown element among {', '.join(site.specie.symbol for site in s)}")
        if not (np.isfinite(lattice).all() and np.isfinite(frac).all()):
            raise ValueError("lattice or coordinates are not finite")
        return lattice, crystal.canonicalize(lattice, numbers, frac)
    except Exception as error:                                       # whatever the reader raises belongs in the report
        return row, f"{type(error).__name__}: {error}"


def parse(path, name, split, label_names, processes=None):
    """One CSV -> CrystalSet. Rows are read by pymatgen in parallel; DataError names file, row and reason."""
    from tqdm.auto import tqdm
    table = read_csv(path, label_names)
    jobs = list(enumerate(table["cif"]))
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        bar = tqdm(pool.map(parse_cif, jobs, chunksize=64), total=len(jobs), desc=f"parse {name}/{split}", disable=len(jobs) < 500)
        cells = list(bar)
    for first, second in cells:
        if isinstance(second, str):
            raise DataError(f"{path}, row {first + 2} (material_id {table['material_id'][first]}): unreadable CIF: {second}. "
                            "Correct or remove the row, or copy the file again.")
    return _pack(name, split, label_names, table, cells)


def _pack(name, split, label_names, table, cells):
    m, n = len(cells), max(len(c.species) for _, c in cells)
    numbers, order = np.zeros((m, n), np.int16), np.full((m, n), -1, np.int16)
    frac, origin, rotation = np.zeros((m, n, 3)), np.zeros((m, 3)), np.zeros((m, 3, 3), np.int8)
    for i, (_, c) in enumerate(cells):
        k = len(c.species)
        numbers[i, :k], order[i, :k], frac[i, :k] = c.species, c.order, c.frac
        origin[i], rotation[i] = c.origin, c.rotation
    labels = table[list(label_names)].to_numpy(float)
    ids = [str(x) for x in table["material_id"]]
    return CrystalSet(name, split, tuple(label_names), ids, np.array([l for l, _ in cells]), numbers, frac, labels, order, origin, rotation)


# ---- cache, splits ----------------------------------------------------------------------------

def save(crystals, path):
    """Atomic: a killed write leaves the old file or none."""
    from safetensors.numpy import save_file
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"name": crystals.name, "split": crystals.split, "label_names": json.dumps(crystals.label_names),
            "ids": json.dumps(crystals.ids)}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({k: np.ascontiguousarray(getattr(crystals, k)) for k in CrystalSet.ARRAYS}, temporary, metadata=meta)
    os.replace(temporary, path)


def read(path):
    """A cached CrystalSet; DataError when the file is damaged."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "np") as f:
            meta = f.metadata()
            arrays = {k: f.get_tensor(k) for k in CrystalSet.ARRAYS}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged cache ({error}). Delete the file; it will be made again.") from error
    return CrystalSet(meta["name"], meta["split"], tuple(json.loads(meta["label_names"])), json.loads(meta["ids"]), **arrays)


def load(name, split, scheme="cdvae", labels=None, processes=None):
    """One split of a data set as a CrystalSet.

    name: perov_5 | mp_20 | carbon_24. split: train | val | test. scheme: cdvae (the published
    split) or grouped (no composition in two splits, see `grouped`). labels: columns, default LABELS[name].
    """
    if name not in LABELS:
        raise DataError(f"unknown data set {name!r}: expected one of {', '.join(LABELS)}")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if scheme not in SPLIT_SCHEMES:
        raise DataError(f"unknown scheme {scheme!r}: expected one of {', '.join(SPLIT_SCHEMES)}")
    labels = tuple(labels or LABELS[name])
    if scheme == "grouped":
        return grouped([load(name, s, "cdvae", labels, processes) for s in SPLITS], split)
    path = locate(name, split)
    key = hashlib.sha256(f"{VERSION} {labels}".encode() + path.read_bytes()).hexdigest()[:16]
    cached = cache_dir() / f"{name}-{split}-{key}.safetensors"
    if not cached.exists():
        crystals = parse(path, name, split, labels, processes)
        check_cells(crystals, path)
        save(crystals, cached)
    return read(cached)


def composition_key(numbers):
    """Group of a composition, numbers (N,): reduced counts of elements, so that A/B twins share a key."""
    z, n = np.unique(numbers[numbers > 0], return_counts=True)
    n = n // np.gcd.reduce(n) if len(z) > 1 else n                   # elements: all carbon is one composition, keep the cell size
    return tuple(z.tolist()), tuple(n.tolist())


def elements_of(formula):
    """Symbols of a chemical formula, e.g. 'LaScSe3' -> ('La', 'Sc', 'Se'). DataError when it cannot be read."""
    from pymatgen.core import Composition
    try:
        return tuple(e.symbol for e in Composition(formula))
    except ValueError as error:
        raise DataError(f"formula {formula!r}: {error}") from error


def overlap(crystals, train):
    """Fraction of cells whose composition, or its A/B twin, also occurs in `train`."""
    known = {composition_key(z) for z in train.numbers}
    return float(np.mean([composition_key(z) in known for z in crystals.numbers]))


def concatenate(sets, split):
    """Several CrystalSets of one data set as one, padded to the largest cell."""
    n = max(s.numbers.shape[1] for s in sets)
    pad = lambda k, a: np.pad(a, [(0, 0), (0, n - a.shape[1])] + [(0, 0)] * (a.ndim - 2), constant_values=-1 if k == "order" else 0)
    arrays = {k: np.concatenate([pad(k, getattr(s, k)) if k in ("numbers", "frac", "order") else getattr(s, k) for s in sets])
              for k in CrystalSet.ARRAYS}
    return CrystalSet(sets[0].name, split, sets[0].label_names, [i for s in sets for i in s.ids], **arrays)


def grouped(sets, split, seed=0):
    """Re-split the union of the published splits by composition (fixed seed), as near to 60/20/20 cells as groups allow.

    All cells of a composition, and of its A/B twin, fall into one split. Carbon-24 is one single
    composition: there the number of atoms in the cell is the group.
    """
    union = concatenate(sets, split)
    keys = [composition_key(z) for z in union.numbers]
    groups, index, sizes = np.unique([str(k) for k in keys], return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(groups))
    middle = np.empty(len(groups))
    middle[order] = (np.cumsum(sizes[order]) - sizes[order] / 2) / len(keys)         # where a group's cells lie in [0, 1]
    position = middle[index]
    low, high = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}[split]
    return union.select((position >= low) & (position < high), split)


# ---- to the model -----------------------------------------------------------------------------

def vocabulary(*sets, extra=()):
    """Sorted symbols of all sets (and of `extra`): the species classes of a model."""
    numbers = {atomic_number(e) for s in sets for e in s.elements} | {atomic_number(e) for e in extra}
    return tuple(symbol(z) for z in sorted(numbers))


def encode_species(crystals, elements, sites=None):
    """(M, N) class indices; empty sites get len(elements). DataError names an element outside the vocabulary."""
    lookup = np.full(104, -1)
    lookup[0] = len(elements)
    for k, e in enumerate(elements):
        lookup[atomic_number(e)] = k
    numbers = np.pad(crystals.numbers, ((0, 0), (0, (sites or crystals.numbers.shape[1]) - crystals.numbers.shape[1])))
    unknown = np.argwhere(lookup[numbers] < 0)
    if len(unknown):
        i, j = unknown[0]
        raise DataError(f"{crystals.name}/{crystals.split}, cell {crystals.ids[i]}: element {symbol(numbers[i, j])} is not in "
                        f"the model's vocabulary of {len(elements)} elements; extend it with vocabulary(..., extra=...) and retrain.")
    return lookup[numbers]


def to_tensors(crystals, elements, labels, device="cpu", cutoff=4.0, sites=None):
    """Everything a model reads, on the device: see the shapes below. Geometry is computed once, in blocks."""
    n = sites or crystals.numbers.shape[1]
    if crystals.numbers.shape[1] > n:
        raise DataError(f"{crystals.name}/{crystals.split}: cells of up to {crystals.numbers.shape[1]} sites, the model has {n}.")
    missing = [l for l in labels if l not in crystals.label_names]
    if missing:
        raise DataError(f"{crystals.name}/{crystals.split}: no label {', '.join(missing)}; loaded: {', '.join(crystals.label_names)}.")
    columns = [crystals.label_names.index(l) for l in labels]
    as_tensor = lambda a: torch.as_tensor(np.ascontiguousarray(a), dtype=torch.float32, device=device)
    frac = as_tensor(np.pad(crystals.frac, ((0, 0), (0, n - crystals.frac.shape[1]), (0, 0))))
    out = {"lattice": as_tensor(crystals.lattice), "frac": frac,                            # (M, 6) (M, N, 3)
           "labels": as_tensor(crystals.labels[:, columns]),                                # (M, P)
           "species": torch.as_tensor(encode_species(crystals, elements, n), device=device)}    # (M, N)
    out["mask"] = (out["species"] < len(elements)).float()                                  # (M, N)
    return out | geometry(out["lattice"], frac, out["mask"], cutoff)


def geometry(lattice, frac, mask, cutoff=4.0, block=2048):
    """pair, adjacency, d (M, N, N) and r (M, N, N, 3), see crystal.minimum_image; zero on the diagonal and for empty sites."""
    parts = [crystal.minimum_image(f, crystal.lattice_matrix(l)) for l, f in zip(lattice.split(block), frac.split(block))]
    d, r = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    pair = mask[:, :, None] * mask[:, None] * (1 - torch.eye(frac.shape[1], device=frac.device))
    return {"pair": pair, "adjacency": ((d < cutoff) * pair), "d": d * pair, "r": r * pair[..., None]}
