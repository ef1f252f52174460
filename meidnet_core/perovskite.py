"""What a perovskite ABX3 is asked to obey, as differentiable terms per cell: neutrality, roles, distances, tolerance factor. torch."""

import numpy as np
import torch
from torch.nn import functional as F

from . import crystal
from .ions import COMMON, tables

SHORTEST = 1.3                 # angstrom; the closest two atoms of Perov-5 are 1.34 apart
WINDOW = (0.8, 1.1)            # tolerance factor: GdFeO3 type to BaTiO3 (1.06)


def charge_term(p, tab):
    """Expected distance (e) of 0 from the reachable total charges, p (B, 5, S) -> (B,).

    A cell of given elements can reach the total charges sum q_i with q_i any allowed state, positive on A
    and B, negative on X; its penalty is the least |sum|. The relaxation is the expectation over elements
    with the sites independent, computed exactly (multilinear in p, so exact where p is one-hot). Limits: two
    atoms of one element may carry different states; every allowed state costs the same; what is allowed decides.
    """
    a, b = (p[:, :2] @ tab.cation).unbind(1)                                                # (B, C)
    x, y, z = (p[:, 2:] @ tab.anion).unbind(1)                                              # (B, K)
    metal = torch.einsum("ni,nj->nij", a, b).flatten(1)
    return ((metal @ tab.charge) * torch.einsum("ni,nj,nk->nijk", x, y, z).flatten(1)).sum(1)


def roles_term(p, tab):
    """Probability that a site holds an element without a state of its sign (mean over sites), plus the expected

    excess (Pauling units, mean over the six pairs) of a cation's electronegativity over an anion's. (B, 5, S) -> (B,).
    """
    none = torch.cat([p[:, :2] @ tab.cation[:, -1], p[:, 2:] @ tab.anion[:, -1]], 1).mean(1)
    return none + torch.einsum("nis,st,njt->nij", p[:, :2], tab.order, p[:, 2:]).mean((1, 2))


def pair_distances(lattice, frac):
    """Shortest distances (B, N(N-1)/2) of the pairs i < j, (B, 6) and (B, N, 3), angstrom.

    As crystal.minimum_image, which also takes the root of its zero diagonal: there the gradient would be NaN.
    """
    i, j = torch.triu_indices(frac.shape[1], frac.shape[1], 1, device=frac.device)
    images = torch.cartesian_prod(*[torch.arange(-1, 2, device=frac.device)] * 3).to(frac.dtype)
    diff = frac[:, i] - frac[:, j]
    r = ((diff - diff.round().detach())[:, :, None] + images) @ crystal.lattice_matrix(lattice)[:, None]
    return (r**2).sum(-1).min(-1).values.clamp_min(1e-6).sqrt()


def distance_term(lattice, frac, shortest=SHORTEST):
    """Sum over pairs of how much (angstrom) they are closer than `shortest`. (B, 6), (B, N, 3) -> (B,)."""
    return F.relu(shortest - pair_distances(lattice, frac)).sum(1)


def tolerance_factor(p, tab):
    """Goldschmidt (r_A + r_X) / (sqrt 2 (r_B + r_X)) from Shannon radii expected over p (B, 5, S); r_X: mean of three."""
    a, b, x = p[:, 0] @ tab.radius[0], p[:, 1] @ tab.radius[1], (p[:, 2:] @ tab.radius[2]).mean(1)
    return (a + x) / (2**0.5 * (b + x))


def tolerance_term(p, tab, window=WINDOW):
    """How far the tolerance factor lies outside the window, (B, 5, S) -> (B,)."""
    t = tolerance_factor(p, tab)
    return F.relu(window[0] - t) + F.relu(t - window[1])


def per_cell(p, lattice, frac, tab):
    """All terms, dict of (B,): p (B, 5, S) probabilities, lattice (B, 6) angstrom and degrees, frac (B, 5, 3)."""
    if p.shape[1] != 5:
        raise ValueError(f"cells of {p.shape[1]} sites: the constraints are written for perovskites A B X X X")
    return {"charge": charge_term(p, tab), "roles": roles_term(p, tab), "distance": distance_term(lattice, frac),
            "tolerance": tolerance_term(p, tab)}


def of_crystals(numbers, lattice, frac, common=COMMON):
    """The terms of given crystals: numbers (M, 5) atomic numbers, lattice (M, 6), frac (M, 5, 3) -> dict of arrays (M,)."""
    elements = tuple(crystal.symbol(z) for z in np.unique(numbers))
    p = F.one_hot(torch.as_tensor(np.searchsorted(np.unique(numbers), numbers)), len(elements)).float()
    as_tensor = lambda a: torch.as_tensor(np.asarray(a), dtype=torch.float32)
    return {k: v.numpy() for k, v in per_cell(p, as_tensor(lattice), as_tensor(frac), tables(elements, common=common)).items()}
