"""Where candidates come from: latents moved to a target, and what they must beat: random, enumerated and screened ABX3.

Every method returns a CrystalSet of `count` cells whose composition the training set does not hold, with predicted labels.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import crystal, data, design, hull, matching, metrics, oqmd, perovskite
from .ions import tables

ANIONS = ("H", "N", "O", "F", "S", "Cl", "Se", "Br", "Te", "I")
RADIOACTIVE = ("Tc", "Pm", "Ac", "Th", "Pa", "U", "Np", "Pu")
TOXIC = ("Be", "As", "Cd", "Hg", "Tl", "Pb")
SCARCE = ("Ru", "Rh", "Pd", "Re", "Os", "Ir", "Pt", "Au", "Te")
GAP_LABELS = ("dir_gap", "pbe_gap")
STABILITY = (*oqmd.OWN_LABEL, "stability")        # the label that ranks: the first of these that a model has; less is always welcome
ENERGY_TOLERANCE = 0.1         # eV/atom by which an energy read from a candidate may miss what was asked: twice the error on held-out cells
METHODS = ("ours", "strict", "unmoved", "paper", "gap", "screening", "ensemble", "window", "random")
FEEDBACK = {"ours-feedback": "ours", "screening-feedback": "screening"}     # chosen in batches, each relaxed before the next is chosen
EXCHANGE = 0.1                 # eV/atom of predicted stability that a miss of the gap by 1 eV (beyond the tolerance) is worth
STARTS, STEPS = 1024, 40       # latents a search begins with, and how far they move
STEP, SNAPSHOTS = 0.03, 4      # learning rate of Adam on latents; how often they are decoded on their way
DRAWS, SAMPLING = 8, 6.0       # compositions per latent, and the temperature at which they are drawn


@dataclass
class Proposal:
    """crystals with predicted labels mean and spread (M, P) over models, confidence (M,) of the decoder (NaN: not decoded).

    labels: names of the P columns.
    """

    crystals: data.CrystalSet
    mean: np.ndarray
    spread: np.ndarray
    confidence: np.ndarray
    labels: tuple = (*oqmd.LABELS, *oqmd.OWN_LABEL)

    def select(self, index):
        return replace(self, crystals=self.crystals.select(index), mean=self.mean[index], spread=self.spread[index],
                       confidence=self.confidence[index])

    def without(self, compositions):
        """Those whose composition (data.composition_key) is not among `compositions`."""
        return self.select(np.array([data.composition_key(z) not in compositions for z in self.crystals.numbers], bool))

    def column(self, label):
        return self.mean[:, self.labels.index(label)]


# ---- which elements, which compositions ---------------------------------------------------------

def sites_of(elements, exclude=RADIOACTIVE, include=None, anions=ANIONS):
    """(5, S) bool: elements of a vocabulary allowed on A, B, X, X, X. ValueError for an unknown name or when nothing is left."""
    unknown = [e for e in (*exclude, *(include or ()), *anions) if e not in crystal._table()[0][1:]]
    if unknown:
        raise ValueError(f"unknown element {', '.join(unknown)}")
    states = tables(tuple(elements))
    wanted = torch.tensor([e not in exclude and (include is None or e in include) for e in elements])
    metal = wanted & (states.cation[:, -1] == 0)
    x = wanted & (states.anion[:, -1] == 0) & torch.tensor([e in anions for e in elements])
    metal = metal & ~torch.tensor([e in anions for e in elements])
    if not (metal.sum() >= 2 and x.any()):
        raise ValueError(f"the element filters leave {int(metal.sum())} elements for A and B and {int(x.sum())} for X")
    return torch.stack([metal, metal, x, x, x])


def enumerate_abx3(elements, sites):
    """All A B X3 with A != B on the allowed sites, (M, 5) atomic numbers, neutral or not."""
    z = crystal.atomic_numbers(elements)
    a, b, x = (z[s.numpy()] for s in sites[:3])
    grid = np.array(np.meshgrid(a, b, x, indexing="ij")).reshape(3, -1).T
    grid = grid[grid[:, 0] != grid[:, 1]]
    return grid[:, [0, 1, 2, 2, 2]]


def obeyed(numbers, lattice, frac, window=True):
    """(M,) bool: neutral, elements in their roles, no short distance, tolerance factor in the window if asked."""
    if len(numbers) == 0:
        return np.zeros(0, bool)
    terms = perovskite.of_crystals(numbers, lattice, frac)
    return np.all([terms[k] < 1e-4 for k in ("charge", "roles", "distance", *(("tolerance",) if window else ()))], 0)


class CubicConstant:
    """Lattice constant (angstrom) of an ideal cell as a sum over its elements, ridge regression on known cells."""

    def __init__(self, crystals, ridge=1.0):
        x = self.features(crystals.numbers)
        self.mean = crystals.lattice[:, 0].mean()
        self.weight = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (crystals.lattice[:, 0] - self.mean))

    @staticmethod
    def features(numbers):
        eye = np.eye(104)
        return np.hstack([eye[numbers[:, 0]], eye[numbers[:, 1]], eye[numbers[:, 2:]].sum(1)])

    def __call__(self, numbers):
        return self.mean + self.features(numbers) @ self.weight


class Lesson:
    """What relaxations taught: measured minus predicted stability (eV/atom) as a sum over site elements, ridge regression.

    numbers (M, 5), residual (M,). The penalty is the one of RIDGES with the smallest leave-one-out error.
    """

    RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0)

    def __init__(self, numbers, residual):
        x, y = self.features(numbers), residual - residual.mean()
        self.ridge = min(self.RIDGES, key=lambda r: self._left_out(x, y, r))
        self.mean, self.weight = residual.mean(), x.T @ np.linalg.solve(x @ x.T + self.ridge * np.eye(len(x)), y)

    @staticmethod
    def features(numbers):
        eye = np.eye(104)
        return np.hstack([eye[numbers[:, 0]], eye[numbers[:, 1]], eye[numbers[:, 2]]])

    @staticmethod
    def _left_out(x, y, ridge):
        hat = x @ x.T @ np.linalg.inv(x @ x.T + ridge * np.eye(len(x)))
        return float((((y - hat @ y) / (1 - np.diag(hat))) ** 2).mean())

    def __call__(self, numbers):
        return self.mean + self.features(numbers) @ self.weight


def ideal(numbers, constant):
    """Ideal cubic cells of compositions (M, 5) as a CrystalSet without labels."""
    none = np.full((len(numbers), len(oqmd.LABELS)), np.nan)
    return oqmd.cells("ideal", "all", [str(i) for i in range(len(numbers))], numbers, constant(numbers), none)


def numbers_of(formulas):
    """Atomic numbers (M, 5) in order A, B, X, X, X of formulas ABX3."""
    return np.array([[crystal.atomic_number(e) for e in (a, b, x, x, x)] for a, b, x in map(hull.sites_in, formulas)])


def cubes_of(formulas):
    """CrystalSet of ideal cubic cells of formulas ABX3, lattice constants estimated from known cells, without labels."""
    return ideal(numbers_of(formulas), CubicConstant(oqmd.load("train", stand_in=True)))


def cells_of(formulas):
    """The same as [(lattice (6,), symbols, frac)]."""
    return matching.true_cells(cubes_of(formulas))


def relaxed_cubic(formulas, potential):
    """Rows of relax.relax_all of cells_of(formulas), one a formula, from the potential's cache or relaxed now."""
    from . import relax
    return relax.relax_all(cells_of(formulas), hull.default_path(potential, "cells"), potential, processes=1)["ideal"]


def seen(crystals):
    """Compositions (A/B twins are one) of a CrystalSet, to be left out of proposals."""
    return {data.composition_key(z) for z in crystals.numbers}


def counts(crystals):
    """{symbol: number of cells that hold it}: how often a model has seen an element."""
    rows = [np.unique(z[z > 0]) for z in crystals.numbers]
    z, n = np.unique(np.concatenate(rows), return_counts=True)
    return {crystal.symbol(k): int(c) for k, c in zip(z, n)}


def sightings(formulas, train):
    """["K 580, Sn 562, I 74"]: how many cells of the CrystalSet `train` hold each element of a formula; 0 for one never seen."""
    known = counts(train)
    return [", ".join(f"{e} {known.get(e, 0)}" for e in data.elements_of(f)) for f in formulas]


# ---- proposals ----------------------------------------------------------------------------------

class Designer:
    """Proposes crystals for a target: `propose(method, target, count, seed)`.

    models: an ensemble that judges; one of them generates, another one for each seed. train: CrystalSet; its compositions
    are not proposed, nor are those in `known` (data.composition_key), unless novel=False.
    exclude, include, anions: element filters. tolerance: eV by which the predicted gap may miss the target (energies:
    ENERGY_TOLERANCE), agreement: eV or eV/atom by which the models may differ (a standard deviation) and still count as sure.
    symmetrize: put the decoded atoms on the ideal sites of a cube whose edge is the mean of the decoded a, b and c.
    ValueError for models without a label of STABILITY.
    """

    def __init__(self, models, train, exclude=RADIOACTIVE, include=None, anions=ANIONS, tolerance=0.1, symmetrize=False,
                 known=frozenset(), novel=True, agreement=0.1):
        self.models, self.train, self.symmetrize, self.tolerance, self.agreement = models, train, symmetrize, tolerance, agreement
        self.labels, self.elements = list(models[0].cfg.labels), models[0].shape.elements
        self.stability = next((l for l in STABILITY if l in self.labels), None)
        if self.stability is None:
            raise ValueError(f"the models have the labels {', '.join(self.labels)}; a Designer ranks by one of {', '.join(STABILITY)}")
        self.sites = sites_of(self.elements, exclude, include, anions)
        self.known, self.constant = seen(train) | known if novel else frozenset(), CubicConstant(train)
        self._pool, self._embedded = {}, {}

    def fresh(self, numbers):
        """(M,) bool: A and B differ and the training set does not hold the composition."""
        return np.array([n[0] != n[1] and data.composition_key(n) not in self.known for n in numbers], bool)

    def judged(self, cells, confidence=None):
        """Proposal with the labels that the ensemble reads from the structures alone."""
        mean, spread = design.predict(self.models, cells) if len(cells) else np.zeros((2, 0, len(self.labels)))
        return Proposal(cells, mean, spread, np.full(len(cells), np.nan) if confidence is None else confidence, tuple(self.labels))

    def pool(self, window):
        """All allowed neutral compositions (in the tolerance window or not) that training does not hold; made once."""
        if window not in self._pool:
            cells = ideal(enumerate_abx3(self.elements, self.sites), self.constant)
            blocks = (cells.select(slice(k, k + 4000)) for k in range(0, len(cells), 4000))
            cells = cells.select(np.concatenate([obeyed(c.numbers, c.lattice, c.frac, window) for c in blocks]))
            self._pool[window] = self.judged(cells.select(self.fresh(cells.numbers)))
        return self._pool[window]

    def generator(self, seed):
        """The model that generates or screens for this seed: seeds go around the ensemble."""
        return self.models[seed % len(self.models)]

    def latents(self, model):
        """Structural embeddings of the training crystals, (M, 128)."""
        if id(model) not in self._embedded:
            embedded = metrics.encode(model, design.unlabelled(model, self.train))["y_c"]
            self._embedded[id(model)] = torch.from_numpy(embedded).to(model.label_mean.device)
        return self._embedded[id(model)]

    def moved(self, target, starts, steps, seed=0, weights=design.WEIGHTS):
        """Latents on their way to the target, start included, (starts * (SNAPSHOTS + 1), 128); of STABILITY only an excess counts."""
        model = self.generator(seed)
        goal = design.standard(model, target)
        z = design.starts(model, self.latents(model), goal, starts, seed)
        loss, seen = design.objective(model, goal, weights, self.sites.to(z.device), below=STABILITY), [z]
        for _ in range(SNAPSHOTS if steps else 0):
            parts = [design.descend(loss, part, steps // SNAPSHOTS, STEP)[0] for part in seen[-1].split(1024)]
            seen.append(torch.cat(parts))
        return torch.cat(seen)

    def decoded(self, z, draws=DRAWS, seed=0):
        """Latents -> distinct, new and allowed crystals, read again from their structures: Proposal."""
        model = self.generator(seed)
        species, confidence = design.decode(model, z, self.sites.to(z.device), draws, SAMPLING, seed)
        numbers = crystal.atomic_numbers(self.elements)[species]
        order = np.argsort(-confidence, kind="stable")                                   # of equal compositions the surest
        rows = np.sort(order[np.unique(numbers[order], axis=0, return_index=True)[1]])
        rows = rows[self.fresh(numbers[rows])]
        cells = ideal(numbers[rows], self.constant)
        if len(rows):
            lattice, frac = design.geometry(model, cells)
            cells.lattice[:] = np.where(np.arange(6) < 3, lattice[:, :3].mean(1, keepdims=True), 90.0) if self.symmetrize else lattice
            cells.frac[:] = cells.frac if self.symmetrize else crystal.PEROVSKITE + crystal.wrap(frac - crystal.PEROVSKITE)
        ok = obeyed(cells.numbers, cells.lattice, cells.frac)
        return self.judged(cells.select(ok), confidence[rows][ok])

    def misses(self, proposal, target):
        """{label: (M,)} by how much each label of the target is missed, read from the structures (eV, eV/atom); of STABILITY an excess."""
        off = {l: proposal.mean[:, self.labels.index(l)] - v for l, v in target.items()}
        return {l: np.maximum(d, 0) if l in STABILITY else np.abs(d) for l, d in off.items()}

    def allowed(self, label):
        """By how much a label may be missed: eV for a gap, eV/atom for an energy."""
        return self.tolerance if label in GAP_LABELS else ENERGY_TOLERANCE

    def missed(self, proposal, target):
        """(M,) eV by which the predicted gap misses the target, the larger miss of two: what rankings go by, energies do not count."""
        gaps = self.misses(proposal, {l: v for l, v in target.items() if l in GAP_LABELS})
        return np.max(list(gaps.values()), 0) if gaps else np.zeros(len(proposal.mean))

    def within(self, proposal, target):
        """(M,) bool, the cycle check: every label of the target, gap or energy, read from the structure is near what was asked."""
        near = [v <= self.allowed(l) for l, v in self.misses(proposal, target).items()]
        return np.all([np.ones(len(proposal.mean), bool), *near], 0)

    def sure(self, proposal, target):
        """(M,) bool: on target in every label, and the models agree about each (one model always agrees with itself)."""
        agree = [proposal.spread[:, self.labels.index(l)] <= self.agreement for l in target]
        return np.all([self.within(proposal, target), *agree], 0)

    def ranked(self, proposal, target, count, lesson=None):
        """The `count` best by predicted stability (its spread over models and a Lesson added) and EXCHANGE times the miss of the gap."""
        i = self.labels.index(self.stability)
        miss = np.maximum(self.missed(proposal, target) - self.tolerance, 0)
        taught = lesson(proposal.crystals.numbers) if lesson else 0.0
        order = np.argsort(proposal.mean[:, i] + proposal.spread[:, i] + taught + EXCHANGE * miss, kind="stable")
        return first_of_each(proposal.select(order)).select(slice(count))

    def propose(self, method, target, count, seed=0, starts=STARTS, steps=STEPS, avoid=frozenset(), weights=design.WEIGHTS):
        """Proposal of `count` crystals for one target {label: value}; fewer when the method finds fewer. No composition twice.

        ours: latents moved to target and stability, decoded, re-encoded, ranked. strict: the same, nearest to the target first.
        unmoved: as ours without moving.
        paper: latents moved to the target as given, the most confident ones. gap: the same for the gap alone.
        screening, ensemble: all compositions of the window, ranked by one model or by all as ours.
        window, random: drawn from all neutral compositions with and without the tolerance window.
        avoid: compositions (data.composition_key) that were proposed before. weights: of the terms that latents move by.
        """
        if method not in METHODS:
            raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
        found = self.search(method, target, seed, starts, steps, weights).without(avoid)
        if method in ("window", "random"):
            rng = np.random.default_rng([seed, zlib.crc32(str(target).encode())])
            return first_of_each(found.select(rng.permutation(len(found.mean)))).select(slice(count))
        if method in ("paper", "gap", "strict"):
            key = self.missed(found, target) if method == "strict" else -found.confidence
            return first_of_each(found.select(np.argsort(key, kind="stable"))).select(slice(count))
        return self.ranked(found, target, count)

    def search(self, method, target, seed=0, starts=STARTS, steps=STEPS, weights=design.WEIGHTS):
        """Everything a method looks at, before it chooses. A stability that the target asks for stays; else latents move to 0."""
        if method in ("window", "random", "ensemble"):
            return self.pool(method != "random")
        if method == "screening":
            cells = self.pool(True).crystals
            return Proposal(cells, *design.predict([self.generator(seed)], cells), np.full(len(cells), np.nan), tuple(self.labels))
        if method in ("paper", "gap"):
            wanted = target if method == "paper" else {k: v for k, v in target.items() if k.endswith("gap")}
            return self.decoded(self.moved(wanted, starts, steps, seed, weights)[-starts:], 1, seed)
        steps = 0 if method == "unmoved" else steps
        return self.decoded(self.moved({self.stability: 0.0, **target}, starts, steps, seed, weights), DRAWS, seed)


def first_of_each(proposal):
    """The first of every composition (A/B twins are one)."""
    keys = [str(data.composition_key(z)) for z in proposal.crystals.numbers]
    return proposal.select(np.sort(np.unique(keys, return_index=True)[1]) if keys else np.zeros(0, int))
