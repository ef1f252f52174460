"""Genes of the soft-mode search (VibroML's): which unstable modes displace a crystal, how far, in which supercell and strain."""

import numpy as np

from . import phonons

SMALL = 20                     # atoms of a supercell in the search; a base with more than half of it gets twice its own
MUTATION = 0.2
SCALE, STRETCH, ANGLE = (0.15, 1.0), 0.05, 5.0         # angstrom, relative, degrees
NOISE = 0.05                   # share of the displacement scale that is random: relaxation alone keeps every symmetry


def _cells():
    """Supercell matrices (rows: new axes), small ones first; for a cubic parent they hold Gamma, X, M and R where det is 4 or 8."""
    eye, out = np.eye(3, dtype=int), []
    axes = [np.roll(np.arange(3), k) for k in range(3)]
    bases = [np.diag([1, 1, 2]), [[1, -1, 0], [1, 1, 0], [0, 0, 1]], [[1, -1, 0], [1, 1, 0], [0, 0, 2]], np.diag([2, 2, 1])]
    for base in bases:
        out += [np.asarray(base)[np.ix_(a, a)] for a in axes]
    out = [eye, np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]), *out, np.diag([2, 2, 2])]
    return sorted((m * int(np.sign(round(np.linalg.det(m)))) for m in out), key=lambda m: round(np.linalg.det(m)))


CELLS = _cells()


def fitting(qs, atoms, limit):
    """Numbers of the CELLS with at most `limit` atoms that hold every q (Q, 3) (M q whole), small ones first."""
    whole = lambda m: np.abs(m @ np.transpose(qs) - np.round(m @ np.transpose(qs))).max() < 1e-3
    return [i for i, m in enumerate(CELLS) if atoms * round(np.linalg.det(m)) <= limit and whole(m)]


def random_genes(rng, bases):
    """Genes of one individual as a JSON-able dict: base, modes, weights, phases, scale, stretch, angles, cell, noise."""
    base = len(bases) - 1 if rng.random() < 0.6 else int(rng.integers(len(bases)))
    strength = np.array([m["frequency"] for m in bases[base]["modes"]]) ** 2
    count = min(int(rng.integers(1, 4)), len(strength))
    modes = rng.choice(len(strength), count, replace=False, p=strength / strength.sum())
    genes = {"base": base, "modes": modes.tolist(), "weights": rng.uniform(0.3, 1, count).round(3).tolist(),
             "phases": rng.choice([0, 90, 180, 270], count).tolist(), "scale": round(float(rng.uniform(*SCALE)), 3),
             "stretch": rng.normal(1, STRETCH / 2, 3).round(4).tolist(), "angles": rng.normal(0, ANGLE / 2, 3).round(3).tolist(),
             "noise": int(rng.integers(1 << 31))}
    return place(genes, bases, rng)


def place(genes, bases, rng=None):
    """Give genes a supercell that holds their modes, mostly the smallest; modes that share none with the first are dropped."""
    base = bases[genes["base"]]
    atoms = len(base["cell"][1])
    limit = max(SMALL, 2 * atoms)
    while not (fits := fitting([base["modes"][i]["q"] for i in genes["modes"]], atoms, limit)) and len(genes["modes"]) > 1:
        genes = genes | {k: genes[k][:-1] for k in ("modes", "weights", "phases")}
    larger = rng is not None and len(fits) > 1 and rng.random() < 0.3
    pick = (fits[int(rng.integers(1, len(fits)))] if larger else fits[0]) if fits else 0
    return genes | {"cell": CELLS[pick].tolist()}


def cell_of(genes, base):
    """The displaced, strained supercell that genes describe, as a cell tuple; scale 0 without strain is the supercell of the base."""
    u = sum(w * phonons.moves(base["cell"], base["modes"][i], genes["cell"], phase + 1e-3)
            for i, w, phase in zip(genes["modes"], genes["weights"], genes["phases"]))
    u = u / max(np.linalg.norm(u, axis=1).max(), 1e-12) + NOISE * np.random.default_rng(genes["noise"]).normal(size=u.shape)
    return phonons.build(base["cell"], genes["cell"], genes["scale"] * u, np.concatenate([genes["stretch"], genes["angles"]]))


def starters(bases, count):
    """Simple distortions of the newest base: one partner of a soft mode, all partners at one q, two of one kind with one of another."""
    modes = bases[-1]["modes"]
    kinds = list({(m["label"], m["frequency"]): None for m in modes})[:4]
    groups = [[i for i, m in enumerate(modes) if (m["label"], m["frequency"]) == k] for k in kinds]
    at = [[i for i in g if modes[i]["q"] == modes[g[0]]["q"]] for g in groups]
    sets = [g[:1] for g in at] + [g for g in at if len(g) > 1]
    sets += [a[:2] + [i] for n, a in enumerate(at) for g in groups[n + 1:] for i in g[-1:]]
    sets = list({tuple(s): None for s in sets})[:count]
    plain = {"base": len(bases) - 1, "scale": 0.4, "stretch": [1.0] * 3, "angles": [0.0] * 3}
    genes = [plain | {"modes": list(s), "weights": [1.0] * len(s), "phases": [0] * len(s), "noise": n} for n, s in enumerate(sets)]
    return [place(g, bases) for g in genes]


def child_of(mother, father, bases, rng):
    """Crossover, then mutation of each gene with probability MUTATION. Modes go together, with their weights, phases and base."""
    fresh, out = random_genes(rng, bases), {}
    for group in (("base", "modes", "weights", "phases"), ("scale",), ("stretch",), ("angles",)):
        parent = mother if rng.random() < 0.5 else father
        parent = fresh if rng.random() < MUTATION else parent
        out |= {k: parent[k] for k in group}
    if rng.random() < MUTATION:
        out["weights"] = rng.uniform(0.3, 1, len(out["modes"])).round(3).tolist()
    return place(out | {"noise": fresh["noise"]}, bases, rng)
