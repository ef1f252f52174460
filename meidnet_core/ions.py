"""What elements can do: oxidation states (smact), Shannon radii and electronegativities (pymatgen), as tensors over a vocabulary."""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from . import crystal

COMMON = "medium"              # smact: oxidation states in at least 10 % of an element's ICSD entries


@dataclass(frozen=True)
class Tables:
    """Per element of a vocabulary of S. Elements with the same set of states form a class."""

    cation: torch.Tensor         # (S, C) one-hot class of positive states, the last class is "none"
    anion: torch.Tensor          # (S, K) the same for negative states
    charge: torch.Tensor         # (C * C, K * K * K) distance of 0 from the reachable total charges, in e
    order: torch.Tensor          # (S, S) by how much the first is more electronegative than the second, else 0 (Pauling)
    radius: torch.Tensor         # (3, S) Shannon radii as A (XII), B and X (VI), angstrom


def oxidation_states(common=COMMON):
    """{symbol: states} of smact's ICSD-24 list. common: low (all) | medium (10 % of the entries) | high (50 %) | main."""
    from smact.utils.oxidation import ICSD24OxStatesFilter
    table = ICSD24OxStatesFilter().filter(consensus=3, include_zero=False, commonality=common)
    return {e: tuple(int(q) for q in str(states).split()) for e, states in zip(table.element, table.oxidation_state)}


def _classes(elements, states, sign):
    """Sets of states of one sign that occur, and the class of each element; last class: no such state."""
    own = [tuple(q for q in states.get(e, ()) if q * sign > 0) for e in elements]
    kinds = [*sorted({s for s in own if s}), ()]
    return kinds, F.one_hot(torch.tensor([kinds.index(s) for s in own]), len(kinds)).float()


def _sums(kinds, sites):
    """Reachable sums of `sites` independent choices, for every combination; an element without states counts as neutral."""
    choices = itertools.product([s or (0,) for s in kinds], repeat=sites)
    return [frozenset(map(sum, itertools.product(*choice))) for choice in choices]


def _shannon(element, states, coordination):
    """Mean Shannon radius over `states` that have one, at the listed coordination nearest to the wanted one; NaN: none."""
    from pymatgen.core import Element
    table, values = Element(element).data.get("Shannon radii") or {}, []
    roman = {"II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6, "VII": 7, "VIII": 8, "IX": 9, "X": 10, "XI": 11, "XII": 12, "XIV": 14}
    for q in states:
        listed = {roman[k]: v for k, v in table.get(str(q), {}).items() if k in roman}
        if listed:
            spins = listed[min(listed, key=lambda n: abs(n - coordination))]
            values.append(np.mean([v["ionic_radius"] for v in spins.values()]))
    return np.mean(values) if values else np.nan


def _radii(elements, states):
    """(3, S); an element that cannot play a role gets the mean of those that can: the roles term deals with it."""
    rows = [[_shannon(e, [q for q in states.get(e, ()) if q * sign > 0], n) for e in elements] for sign, n in ((1, 12), (1, 6), (-1, 6))]
    rows = np.array(rows)
    return np.where(np.isnan(rows), np.nanmean(rows, 1, keepdims=True), rows)


@lru_cache(None)
def tables(elements, device="cpu", common=COMMON):
    """Tables of a vocabulary (tuple of symbols), from smact (states), pymatgen (radii, electronegativity)."""
    states = oxidation_states(common)
    (cations, cation), (anions, anion) = _classes(elements, states, 1), _classes(elements, states, -1)
    metal, rest = _sums(cations, 2), _sums(anions, 3)
    distance = lru_cache(None)(lambda a, b: min(abs(p + q) for p in a for q in b))
    charge = torch.tensor([[distance(a, b) for b in rest] for a in metal], dtype=torch.float32)
    chi = crystal.electronegativities()[crystal.atomic_numbers(elements)]
    order = torch.tensor(np.maximum(chi[:, None] - chi[None], 0), dtype=torch.float32)
    radius = torch.tensor(_radii(elements, states), dtype=torch.float32)
    return Tables(*(t.to(device) for t in (cation, anion, charge, order, radius)))


def descriptors(elements):
    """Rows of standardised descriptors, one per element (tuple of tuples): what similar elements share.

    Group, row, block, electronegativity, radii (atomic, Shannon as A, B, X), ionisation energy, electron affinity, molar volume,
    commonest positive and negative oxidation state. A missing value becomes the mean: 0 after standardisation.
    """
    import warnings

    from pymatgen.core import Element
    states = oxidation_states()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # pymatgen announces every value it lacks
        plain = [[e.group, e.row, *(e.block == b for b in "spdf"), e.X, e.atomic_radius_calculated or e.atomic_radius,
                  e.ionization_energy, e.electron_affinity, e.molar_volume] for e in map(Element, elements)]
    most = [[max((q for q in states.get(e, ()) if q > 0), default=0), min((q for q in states.get(e, ()) if q < 0), default=0)]
            for e in elements]
    rows = np.hstack([np.array(plain, float), _radii(elements, states).T, most])
    spread = np.nanstd(rows, 0)
    rows = np.nan_to_num((rows - np.nanmean(rows, 0)) / np.where(spread > 0, spread, 1))
    return tuple(tuple(round(float(v), 4) for v in row) for row in rows)
