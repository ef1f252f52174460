"""Structure matching (SM): does a decoded crystal equal the one that was encoded?

A cell here is a tuple (lattice (6,), symbols, frac (N, 3)). pymatgen's StructureMatcher decides,
at the tolerances of CDVAE (Xie et al. 2021) or at pymatgen's own, in parallel over processes.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

import numpy as np

from . import crystal

CDVAE = {"ltol": 0.3, "stol": 0.5, "angle_tol": 10}
DEFAULT = {"ltol": 0.2, "stol": 0.3, "angle_tol": 5}
TOLERANCES = {"cdvae": CDVAE, "default": DEFAULT}
MIN_DISTANCE = 0.5        # angstrom; closer atoms make a prediction invalid, which counts as no match (CDVAE)
STATES = "smact14"        # oxidation states of smact 2.2.1, which CDVAE's code asks


def decoded_cells(decoded, elements):
    """Output of MEIDNet.decode -> list of cells; sites of class len(elements) are empty."""
    lattice, species, frac = (decoded[k].cpu().numpy() for k in ("lattice", "species", "frac"))
    symbols = np.array([*elements, ""])
    real = species < len(elements)
    return [(l, symbols[s[keep]].tolist(), f[keep]) for l, s, f, keep in zip(lattice, species, frac, real)]


def true_cells(crystals):
    """CrystalSet -> list of cells in canonical form."""
    real = crystals.numbers > 0
    return [(l, [crystal.symbol(z) for z in zs[keep]], f[keep])
            for l, zs, f, keep in zip(crystals.lattice, crystals.numbers, crystals.frac, real)]


def match_one(job):
    """(predicted cell, true cell, tolerances) -> RMS distance over (V/N)^(1/3), NaN when they do not match.

    A cell that cannot exist (no atoms, impossible lattice, overlapping atoms) does not match. `score` has the rest of the rule.
    """
    import warnings

    from pymatgen.analysis.structure_matcher import StructureMatcher
    predicted, true, tolerances = job
    if sorted(predicted[1]) != sorted(true[1]) or not _possible(predicted[0]) or not np.isfinite(predicted[2]).all():
        return np.nan
    a, b = crystal.to_structure(*predicted), crystal.to_structure(*true)
    off_diagonal = a.distance_matrix + np.eye(len(a)) * 10
    if off_diagonal.min() < MIN_DISTANCE:
        return np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rms = StructureMatcher(**tolerances).get_rms_dist(a, b)
    return np.nan if rms is None else rms[0]


def _possible(lattice):
    """Positive lengths and angles that close a cell with volume."""
    if not np.isfinite(lattice).all() or (lattice[:3] <= 0).any() or (lattice[3:] <= 0).any() or (lattice[3:] >= 180).any():
        return False
    x, y, z = np.cos(np.radians(lattice[3:]))
    return 1 - x * x - y * y - z * z + 2 * x * y * z > 1e-6


def match(predicted, true, tolerances=CDVAE, processes=None):
    """RMS distances (M,) of paired lists of cells, NaN: no match. Shows progress for large sets."""
    from tqdm.auto import tqdm
    jobs = [(p, t, tolerances) for p, t in zip(predicted, true, strict=True)]
    processes = processes or os.cpu_count()
    if len(jobs) < 100 or processes == 1:
        return np.array([match_one(j) for j in jobs])
    with ProcessPoolExecutor(processes) as pool:
        bar = tqdm(pool.map(match_one, jobs, chunksize=50), total=len(jobs), desc="match", mininterval=1)
        return np.array(list(bar))


def summary(rms):
    """Match rate (%) and RMSE over the matched cells only, as CDVAE reports them."""
    hit = ~np.isnan(rms)
    return {"sm": 100 * hit.mean(), "rmse": float(rms[hit].mean()) if hit.any() else None}


def score(predicted, true, processes=None):
    """Both sets of tolerances: ({sm_cdvae, rmse_cdvae, sm_default, rmse_default, sm_rule, sm_rule_ceiling}, {name: RMS distances (M,)}).

    sm_rule: the match rate (%) by the whole rule of CDVAE's code, which counts an `allowed` composition only; no decoder can be
    above sm_rule_ceiling, the share of the true cells that it allows.
    """
    rms = {name: match(predicted, true, tolerances, processes) for name, tolerances in TOLERANCES.items()}
    fine = np.array([allowed(t[1]) for t in true], bool)                     # a match has the true composition
    rule = {"sm_rule": 100 * float((fine & ~np.isnan(rms["cdvae"])).mean()), "sm_rule_ceiling": 100 * float(fine.mean())}
    return {f"{k}_{name}": v for name, r in rms.items() for k, v in summary(r).items()} | rule, rms


def allowed(symbols):
    """Does CDVAE's evaluation accept this composition? One element, metals alone, or neutral with some oxidation states that follow
    the electronegativities (smact; `smact_validity` and `RecEval` in the code of Xie et al. 2021)."""
    return _allowed("".join(sorted(symbols)))


@lru_cache(None)
def _allowed(formula):
    from smact.screening import smact_validity
    return bool(smact_validity(formula, oxidation_states_set=STATES))


def same_composition(predicted, true):
    """(M,) bool: the elements are right, whatever their places. A match needs that first."""
    return np.array([sorted(p[1]) == sorted(t[1]) for p, t in zip(predicted, true, strict=True)])


# ---- what a match rate can and cannot tell: trivial predictions ---------------------------------

def trivial(crystals, kind, seed=0, lattice=None):
    """Predictions that use no model, from the true cells of a perovskite set.

    prototype: right elements on ideal sites (lattice: (6,) of the prediction, default the true one);
    swapped: the same with A and B exchanged; wrong_element: the same with one site replaced by another
    element of the set; random_coords: right composition and lattice, uniform coordinates.
    """
    rng, elements, out = np.random.default_rng(seed), crystals.elements, []
    for true_lattice, symbols, frac in true_cells(crystals):
        sites, symbols = crystal.PEROVSKITE.copy(), list(symbols)
        if kind == "swapped":
            symbols[:2] = symbols[1::-1]
        elif kind == "wrong_element":
            k = rng.integers(len(symbols))
            symbols[k] = rng.choice([e for e in elements if e != symbols[k]])
        elif kind == "random_coords":
            sites = rng.random(frac.shape)
        elif kind != "prototype":
            raise ValueError(f"kind = {kind!r}: expected prototype, swapped, wrong_element or random_coords")
        out.append((true_lattice if lattice is None else np.asarray(lattice), symbols, sites))
    return out
