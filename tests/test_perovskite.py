"""What a perovskite is asked to obey: zero where it does, right gradients, a known relaxation."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meidnet_core import crystal, ions, perovskite
from meidnet_core.constraints import TERMS

pytest.importorskip("smact")
ELEMENTS = ("Li", "N", "O", "F", "K", "Ti", "Fe", "Sr", "Ba", "Ta", "Bi")


@pytest.fixture(scope="module")
def tab():
    return ions.tables(ELEMENTS)


def probabilities(*symbols, dtype=torch.float32):
    """(1, 5, S), sure of the given A, B, X, X, X."""
    return F.one_hot(torch.tensor([[ELEMENTS.index(s) for s in symbols]]), len(ELEMENTS)).to(dtype)


def cubic(a=3.905, dtype=torch.float32):
    return torch.tensor([[a, a, a, 90, 90, 90]], dtype=dtype), torch.tensor(crystal.PEROVSKITE[None], dtype=dtype)


@pytest.mark.parametrize("cell", [("Sr", "Ti", "O", "O", "O"), ("Ba", "Ti", "O", "O", "O"), ("K", "Ta", "O", "O", "O"),
                                  ("Ba", "Ta", "N", "O", "O"), ("Bi", "Fe", "O", "O", "O")])
def test_real_perovskites_obey(tab, cell):
    terms = perovskite.per_cell(probabilities(*cell), *cubic(), tab)
    assert set(terms) == set(TERMS)
    assert all(float(v) == pytest.approx(0, abs=1e-5) for v in terms.values()), terms


def test_charge_is_the_distance_to_the_nearest_reachable_total(tab):
    for cell, expected in [(("Li", "Ti", "O", "O", "O"), 1), (("Li", "K", "N", "N", "N"), 7), (("Ta", "Ta", "F", "F", "F"), 7),
                           (("K", "Fe", "O", "O", "O"), 2)]:        # Fe reaches +2 and +3 only: 1 + 3 - 6
        assert float(perovskite.charge_term(probabilities(*cell), tab)) == pytest.approx(expected)


def test_charge_is_the_exact_expectation_over_independent_sites(tab):
    p = torch.softmax(torch.randn(1, 5, len(ELEMENTS), generator=torch.Generator().manual_seed(0)), -1)
    p[:, :, 5:] = 0                                                 # 5 elements a site are enough: 3,125 cells
    states = ions.oxidation_states()
    allowed = lambda k, e: [q for q in states[e] if (q > 0) == (k < 2)] or [0]
    expected = 0.0
    for cell in itertools.product(range(5), repeat=5):
        sums = map(sum, itertools.product(*(allowed(k, ELEMENTS[e]) for k, e in enumerate(cell))))
        expected += float(np.prod([p[0, k, e] for k, e in enumerate(cell)])) * min(map(abs, sums))
    assert float(perovskite.charge_term(p, tab)) == pytest.approx(expected, rel=1e-4)


def test_what_is_allowed_decides():
    """Known limit: with every state ever reported nearly anything is neutral."""
    cell = np.array([[crystal.atomic_number(e) for e in ("Sr", "Sc", "O", "O", "O")]])
    lattice, frac = (t.numpy() for t in cubic())
    charge = {common: float(perovskite.of_crystals(cell, lattice, frac, common)["charge"][0]) for common in ("low", "medium")}
    assert charge["medium"] == 1 and charge["low"] == 0


def test_roles(tab):
    cells = ("Sr", "Ti", "O", "O", "O"), ("O", "Ti", "Sr", "O", "O"), ("F", "Ti", "O", "O", "O")
    good, swapped, fluoride = (probabilities(*cell) for cell in cells)
    chi = crystal.electronegativities()
    assert float(perovskite.roles_term(good, tab)) == 0
    assert float(perovskite.roles_term(swapped, tab)) == pytest.approx(
        2 / 5 + sum(max(0, chi[a] - chi[b]) for a in (8, 22) for b in (38, 8, 8)) / 6, rel=1e-5)
    assert float(perovskite.roles_term(fluoride, tab)) > 1 / 5      # F has no positive state, and is above O


def test_distances_are_those_of_minimum_image(triclinic):
    rng = np.random.default_rng(0)
    lattice, _, frac = triclinic(rng, 3)
    lattice, frac = torch.tensor(lattice[None]), torch.tensor(frac[None]) + 2.5
    d, _ = crystal.minimum_image(frac, crystal.lattice_matrix(lattice))
    i, j = np.triu_indices(3, 1)
    assert perovskite.pair_distances(lattice, frac)[0].numpy() == pytest.approx(d[0, i, j].numpy())


def test_distance_hinge_counts_angstroms():
    lattice, frac = cubic(a=4.0)
    frac[0, 2, 0] = 0.25                                             # an X atom 1.0 angstrom from B
    assert float(perovskite.distance_term(lattice, frac, shortest=1.3)) == pytest.approx(0.3, abs=1e-5)
    assert float(perovskite.distance_term(lattice, frac, shortest=0.9)) == 0


def test_coincident_atoms_and_extreme_logits_give_finite_gradients(tab):
    logits = torch.full((1, 5, len(ELEMENTS)), -1e4)
    logits[0, :, 0] = 1e4
    lattice, frac = cubic()
    frac[0, 1] = frac[0, 0]
    leaves = [t.requires_grad_() for t in (logits, lattice, frac)]
    terms = perovskite.per_cell(torch.softmax(logits, -1), lattice, frac, tab)
    assert float(terms["distance"].detach()) >= perovskite.SHORTEST - 2e-3
    sum(v.sum() for v in terms.values()).backward()
    assert all(torch.isfinite(t.grad).all() for t in leaves)


def test_tolerance_factor_and_window(tab):
    t = lambda *cell: float(perovskite.tolerance_factor(probabilities(*cell), tab))
    assert t("Sr", "Ti", "O", "O", "O") == pytest.approx((1.44 + 1.40) / (2**0.5 * (0.605 + 1.40)), abs=1e-3)
    assert t("Ba", "Ti", "O", "O", "O") > t("Sr", "Ti", "O", "O", "O") > t("Li", "Ti", "O", "O", "O")
    below = float(perovskite.tolerance_term(probabilities("Li", "Ba", "O", "O", "O"), tab))
    assert below == pytest.approx(perovskite.WINDOW[0] - t("Li", "Ba", "O", "O", "O"), abs=1e-6)


@pytest.mark.parametrize("term", TERMS)
def test_gradients_against_finite_differences(tab, term):
    """In random directions of logits, lattice and coordinates together, in double precision."""
    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    lattice = torch.tensor([[1.9, 2.1, 2.0, 85, 95, 92], [1.6, 1.7, 1.5, 90, 88, 91]], dtype=torch.float64)
    point = [random(2, 5, len(ELEMENTS)), lattice, random(2, 5, 3)]
    double = ions.Tables(*(getattr(tab, k).double() for k in ions.Tables.__dataclass_fields__))
    value = lambda p, l, f: perovskite.per_cell(torch.softmax(p, -1), l, f, double)[term].sum()
    slopes = torch.autograd.grad(value(*[t.requires_grad_() for t in point]), point, allow_unused=True)
    for _ in range(5):
        way = [1e-6 * random(*t.shape) for t in point]
        ahead, back = ([(t + sign * w).detach() for t, w in zip(point, way)] for sign in (1, -1))
        expected = float(value(*ahead) - value(*back)) / 2
        assert sum(float((g * w).sum()) for g, w in zip(slopes, way) if g is not None) == pytest.approx(expected, rel=1e-4, abs=1e-13)
        assert expected != 0


def test_descent_turns_a_charged_cell_into_a_neutral_one(tab):
    logits = (3 * probabilities("Li", "Ti", "O", "O", "O")).requires_grad_()
    for _ in range(200):
        loss = perovskite.charge_term(torch.softmax(logits, -1), tab).sum()
        logits = (logits - 2 * torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
    best = F.one_hot(logits.argmax(-1), len(ELEMENTS)).float()
    assert float(perovskite.charge_term(best, tab)) == 0
