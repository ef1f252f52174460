"""Stored results of electronic structure: data/dft/<name>-<profile>.json, and .npz for what belongs to arrays.

GPAW (dft.py) and VASP (vasp.py) runs are kept in one format; reading them needs neither code.
"""

import json
import os
import zipfile
from pathlib import Path

import numpy as np

from .results import ROOT, _write_atomic

STORE = ROOT / "data" / "dft"
ARRAYS = ("bands", "dos")


class DFTError(RuntimeError):
    """A calculation cannot be started; the message says what is missing."""


def save(out, store=STORE):
    """<name>-<profile>.json, and .npz with the bands and the density of states (float32)."""
    name, arrays, plain = f"{out['name']}-{out['profile']}", {}, dict(out)
    for part in ARRAYS:
        if out[part]:
            arrays |= {f"{part}.{k}": np.asarray(v, np.float32) for k, v in out[part].items() if isinstance(v, np.ndarray)}
            plain[part] = {k: v for k, v in out[part].items() if not isinstance(v, np.ndarray)}
    Path(store).mkdir(parents=True, exist_ok=True)
    path, part = Path(store) / f"{name}.npz", Path(store) / f".{name}.{os.getpid()}.npz"
    if arrays:                                                        # first: a JSON never stands without its arrays
        np.savez_compressed(part, **arrays)
        os.replace(part, path)
    else:
        path.unlink(missing_ok=True)
    _write_atomic(Path(store) / f"{name}.json", json.dumps(plain, indent=1) + "\n")


def load(name, profile, store=STORE):
    """A stored result with its arrays, or None; DFTError naming the file when it is no JSON."""
    path = Path(store) / f"{name}-{profile}.json"
    if not path.exists():
        return None
    try:
        out = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DFTError(f"{path}: not a stored result ({error}); delete it") from error
    if path.with_suffix(".npz").exists():
        try:
            arrays = dict(np.load(path.with_suffix(".npz")))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DFTError(f"{path.with_suffix('.npz')}: no arrays ({error}); delete it and the .json beside it") from error
        for key, value in arrays.items():
            part, field = key.split(".")
            if out[part]:                                             # else killed before the JSON told of it: the step is collected again
                out[part][field] = value.astype(float)
    lost = [part for part in ARRAYS if out.get(part) and "energies" not in out[part]]
    if lost:
        raise DFTError(f"{path.with_suffix('.npz')}: no arrays of {', '.join(lost)}; delete the .json beside it")
    return out


def same_cell(a, b):
    """Are two cells (lattice, symbols, frac_coords) the same, to the last digits?"""
    return list(a[1]) == list(b[1]) and all(np.allclose(a[k], b[k], rtol=0, atol=1e-4) for k in (0, 2))


def same_crystal(a, b, volume_within=0.2):
    """Are two cells one crystal, but for its volume (fraction)? Beyond five atoms pymatgen's StructureMatcher has to agree."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    from .crystal import to_structure
    from .hull import reduced
    from .relax import to_atoms
    volume = [to_atoms(c).get_volume() / len(c[1]) for c in (a, b)]
    if reduced(list(a[1])) != reduced(list(b[1])) or abs(np.log(volume[0] / volume[1])) > volume_within:
        return False
    return max(len(a[1]), len(b[1])) <= 5 or StructureMatcher(0.05, 0.05, 1.5).fit(to_structure(*a), to_structure(*b))


def check_same(stored, cell, name, volume_within=0.2):
    """DFTError unless a stored cell and a new one are one crystal."""
    if not same_crystal(stored, cell, volume_within):
        raise DFTError(f"{name}: the stored result is of another crystal; choose another name or folder")
