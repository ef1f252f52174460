"""One crystal: canonical form and back, periodic geometry.

A crystal has many equal descriptions (origin, order of sites, mirror image). A decoder that
must name one of them needs a rule, and the rule must be invertible. `canonicalize` applies the
rule to one cell and returns the operation, `restore` undoes it.

Only numpy and torch at import time; pymatgen is imported where a `Structure` is made.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

# Fractional ideal sites of a cubic perovskite in canonical order A, B, X (on the x axis of B), X, X.
PEROVSKITE = np.array([[0.5, 0.5, 0.5], [0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]])
SWAP_YZ = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=float)
# The B atom shares its column along x with one X, the A atom stands alone: enumerate (A, B, X, X, X).
_ORDERS = np.array([(a, b, x, y, z) for a in range(5) for b in range(5) for x in range(5)
                    for y in range(5) for z in range(5) if len({a, b, x, y, z}) == 5])


@lru_cache(None)
def _table():
    """Symbols and Pauling electronegativities (0 where none is defined) by atomic number."""
    import warnings

    from pymatgen.core import Element
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # noble gases have none, pymatgen says so each time
        elements = [Element.from_Z(z) for z in range(1, 104)]
        return ["-"] + [e.symbol for e in elements], np.nan_to_num(np.array([0.0] + [e.X for e in elements]))


def symbol(z):
    """Symbol of an atomic number up to 103."""
    return _table()[0][int(z)]


def atomic_number(name):
    """Atomic number of a symbol; ValueError for anything that is no element up to Z = 103."""
    if name not in _table()[0][1:]:
        raise ValueError(f"unknown element {name!r}: expected a symbol up to Lr")
    return _table()[0].index(name)


def atomic_numbers(names):
    """Atomic numbers of symbols, (M,); ValueError as atomic_number."""
    return np.array([atomic_number(e) for e in names])


def electronegativities():
    """Pauling scale, (104,) by atomic number."""
    return _table()[1]


@dataclass
class Canonical:
    """A cell in canonical form, and how it got there: `frac = (original[order] - origin) @ rotation.T`."""

    species: np.ndarray      # (N,) atomic numbers
    frac: np.ndarray         # (N, 3) canonical fractional coordinates
    order: np.ndarray        # (N,) site i of the canonical cell is site order[i] of the original
    origin: np.ndarray       # (3,) fractional
    rotation: np.ndarray     # (3, 3) integer matrix on fractional coordinates, its own cell's symmetry


def wrap(frac):
    """Fractional differences to the nearest image, in [-0.5, 0.5)."""
    return frac - np.floor(frac + 0.5)


def circular_mean(frac):
    """Mean position on the torus, (N, 3) -> (3,). Never NaN; where all images cancel (sites 0 and 1/2) there is no mean, and rounding
    decides: the origin of such cells is not canonical."""
    return np.angle(np.exp(2j * np.pi * frac).sum(0)) / (2 * np.pi)


def canonicalize(lattice, species, frac):
    """Canonical form of one cell. lattice (6,) angstrom and degrees, species (N,) atomic numbers, frac (N, 3).

    Cubic ABX3 cells are recognised by geometry (`_perovskite_order`); all others are put at the
    circular mean of their sites and sorted by element, then position.
    """
    cubic = np.ptp(lattice[:3]) < 1e-4 and np.abs(lattice[3:] - 90).max() < 1e-4
    order = _perovskite_order(species, frac) if cubic and len(species) == 5 else None
    return _generic(species, frac) if order is None else _perovskite(species, frac, order)


def _perovskite_order(species, frac):
    """Which row is A, B, X, X, X? The columns along x tell, however far the atoms have slid along x.

    Returns (5,) row numbers, or None when the cell is no perovskite. Of the two atoms in one
    column the more electronegative is X: for strong distortions distances along x no longer say.
    """
    dev = wrap(frac[_ORDERS][:, :, 1:] - PEROVSKITE[None, :, 1:]
               - (frac[_ORDERS[:, 1]][:, None, 1:] - PEROVSKITE[None, 1:2, 1:]))   # (120, 5, 2) against B
    fits = _ORDERS[np.abs(dev).max((1, 2)) < 0.02]
    if len(fits) == 0:
        return None
    electronegativity = electronegativities()
    x_minus_b = electronegativity[species[fits[:, 2]]] - electronegativity[species[fits[:, 1]]]
    along_x = wrap(frac[fits][:, :, 0] - PEROVSKITE[None, :, 0] - frac[fits[:, 1], 0][:, None])
    return fits[np.lexsort((np.abs(along_x).sum(1), -x_minus_b))[0]]


def _perovskite(species, frac, order):
    """Origin: the mean deviation from the ideal sites is zero. Mirror: A moves to +x; y/z sites by element."""
    origin, rotation = np.zeros(3), np.eye(3)
    for _ in range(20):                                   # the mean of wrapped deviations settles in 2-3 rounds
        origin += _mean_deviation(frac[order] - origin)
    dev = wrap(frac[order] - origin - PEROVSKITE)         # (5, 3)
    if _sign(dev[:, 0]) < 0:
        rotation[0, 0] = -1
    if (species[order[3]], round(rotation[0, 0] * dev[3, 0], 6)) > (species[order[4]], round(rotation[0, 0] * dev[4, 0], 6)):
        rotation, order = rotation @ SWAP_YZ, order[[0, 1, 2, 4, 3]]
    out = wrap((frac[order] - origin) @ rotation.T - PEROVSKITE) + PEROVSKITE
    return Canonical(species[order], out, order, origin, rotation)


def _mean_deviation(frac):
    dev = frac - PEROVSKITE
    centre = circular_mean(dev)
    return centre + wrap(dev - centre).mean(0)


def _sign(dev_x):
    """+1 or -1: the mirror image in which the atom that moved along x most (A first) moved to +x."""
    for value in (dev_x[0], *dev_x[[2, 3, 4, 1]]):
        if abs(value) > 1e-4:
            return np.sign(value)
    return 1.0


def _generic(species, frac):
    origin = circular_mean(frac)
    shifted = np.mod(frac - origin + 1e-6, 1.0) - 1e-6    # a site at 0 must not flip to 0.9999999
    order = np.lexsort((*np.round(shifted.T[::-1], 4), species))
    return Canonical(species[order], shifted[order], order, origin, np.eye(3))


def restore(canonical):
    """Undo `canonicalize`: (species (N,), frac (N, 3)) in the original order, origin and orientation."""
    back = np.linalg.inv(canonical.rotation)
    species, frac = np.empty_like(canonical.species), np.empty_like(canonical.frac)
    species[canonical.order] = canonical.species
    frac[canonical.order] = canonical.frac @ back.T + canonical.origin
    return species, frac


def to_structure(lattice, symbols, frac):
    """pymatgen Structure from (6,) lattice parameters, N symbols and (N, 3) fractional coordinates."""
    from pymatgen.core import Lattice, Structure

    return Structure(Lattice.from_parameters(*map(float, lattice)), symbols, np.asarray(frac, dtype=float))


# ---- periodic geometry, batched, torch --------------------------------------------------------

def lattice_matrix(lattice):
    """(B, 6) lengths and angles -> (B, 3, 3) row vectors in the frame of pymatgen's from_parameters."""
    a, b, c = lattice[:, :3].unbind(-1)
    cos_a, cos_b, cos_g = torch.cos(torch.deg2rad(lattice[:, 3:])).unbind(-1)
    sin_a, sin_b = torch.sin(torch.deg2rad(lattice[:, 3])), torch.sin(torch.deg2rad(lattice[:, 4]))
    cos_gs = ((cos_a * cos_b - cos_g) / (sin_a * sin_b)).clamp(-1, 1)
    sin_gs, zero = torch.sqrt((1 - cos_gs**2).clamp_min(0)), torch.zeros_like(a)
    rows = [torch.stack([a * sin_b, zero, a * cos_b], -1),
            torch.stack([-b * sin_a * cos_gs, b * sin_a * sin_gs, b * cos_a], -1),
            torch.stack([zero, zero, c], -1)]
    return torch.stack(rows, 1)


def minimum_image(frac, cell, softness=0.1):
    """Minimum-image geometry of a batch. frac (B, N, 3), cell (B, 3, 3) row vectors in angstrom.

    Returns distances d (B, N, N), hard minimum over 27 images around the wrapped difference, and
    vectors r (B, N, N, 3) = x_i - x_j. A vector is the mean over images weighted by
    exp(-(|r|^2 - d^2) / softness): where several images tie, as everywhere in a cubic cell, a
    single minimum image would be an arbitrary choice and break equivariance; the mean is not.
    """
    images = torch.cartesian_prod(*[torch.arange(-1, 2, device=frac.device)] * 3).to(frac.dtype)   # (27, 3)
    diff = frac[:, :, None] - frac[:, None]                                                   # (B, N, N, 3)
    diff = diff - diff.round()
    r = (diff[:, :, :, None] + images) @ cell[:, None, None]                                   # (B, N, N, 27, 3)
    d2 = (r**2).sum(-1)
    d2_min = d2.min(-1, keepdim=True).values
    weight = torch.softmax(-(d2 - d2_min) / softness, -1)
    return d2_min.squeeze(-1).sqrt(), (weight[..., None] * r).sum(-2)
