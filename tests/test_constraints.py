"""Constraints: zero where a crystal obeys, positive where it does not, with right gradients and a known relaxation."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meidnet_core import constraints, crystal, ions, maps
from meidnet_core.losses import total_loss

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
    terms = constraints.per_cell(probabilities(*cell), *cubic(), tab)
    assert set(terms) == set(constraints.TERMS)
    assert all(float(v) == pytest.approx(0, abs=1e-5) for v in terms.values()), terms


def test_charge_is_the_distance_to_the_nearest_reachable_total(tab):
    for cell, expected in [(("Li", "Ti", "O", "O", "O"), 1), (("Li", "K", "N", "N", "N"), 7), (("Ta", "Ta", "F", "F", "F"), 7),
                           (("K", "Fe", "O", "O", "O"), 2)]:        # Fe reaches +2 and +3 only: 1 + 3 - 6
        assert float(constraints.charge_term(probabilities(*cell), tab)) == pytest.approx(expected)


def test_charge_is_the_exact_expectation_over_independent_sites(tab):
    p = torch.softmax(torch.randn(1, 5, len(ELEMENTS), generator=torch.Generator().manual_seed(0)), -1)
    p[:, :, 5:] = 0                                                 # 5 elements a site are enough: 3,125 cells
    states = ions.oxidation_states()
    allowed = lambda k, e: [q for q in states[e] if (q > 0) == (k < 2)] or [0]
    expected = 0.0
    for cell in itertools.product(range(5), repeat=5):
        sums = map(sum, itertools.product(*(allowed(k, ELEMENTS[e]) for k, e in enumerate(cell))))
        expected += float(np.prod([p[0, k, e] for k, e in enumerate(cell)])) * min(map(abs, sums))
    assert float(constraints.charge_term(p, tab)) == pytest.approx(expected, rel=1e-4)


def test_what_is_allowed_decides():
    """Known limit: with every state ever reported nearly anything is neutral."""
    cell = np.array([[crystal.atomic_number(e) for e in ("Sr", "Sc", "O", "O", "O")]])
    lattice, frac = (t.numpy() for t in cubic())
    charge = {common: float(constraints.of_crystals(cell, lattice, frac, common)["charge"][0]) for common in ("low", "medium")}
    assert charge["medium"] == 1 and charge["low"] == 0


def test_roles(tab):
    cells = ("Sr", "Ti", "O", "O", "O"), ("O", "Ti", "Sr", "O", "O"), ("F", "Ti", "O", "O", "O")
    good, swapped, fluoride = (probabilities(*cell) for cell in cells)
    chi = crystal.electronegativities()
    assert float(constraints.roles_term(good, tab)) == 0
    assert float(constraints.roles_term(swapped, tab)) == pytest.approx(
        2 / 5 + sum(max(0, chi[a] - chi[b]) for a in (8, 22) for b in (38, 8, 8)) / 6, rel=1e-5)
    assert float(constraints.roles_term(fluoride, tab)) > 1 / 5      # F has no positive state, and is above O


def test_distances_are_those_of_minimum_image(triclinic):
    rng = np.random.default_rng(0)
    lattice, _, frac = triclinic(rng, 3)
    lattice, frac = torch.tensor(lattice[None]), torch.tensor(frac[None]) + 2.5
    d, _ = crystal.minimum_image(frac, crystal.lattice_matrix(lattice))
    i, j = np.triu_indices(3, 1)
    assert constraints.pair_distances(lattice, frac)[0].numpy() == pytest.approx(d[0, i, j].numpy())


def test_distance_hinge_counts_angstroms():
    lattice, frac = cubic(a=4.0)
    frac[0, 2, 0] = 0.25                                             # an X atom 1.0 angstrom from B
    assert float(constraints.distance_term(lattice, frac, shortest=1.3)) == pytest.approx(0.3, abs=1e-5)
    assert float(constraints.distance_term(lattice, frac, shortest=0.9)) == 0


def test_coincident_atoms_and_extreme_logits_give_finite_gradients(tab):
    logits = torch.full((1, 5, len(ELEMENTS)), -1e4)
    logits[0, :, 0] = 1e4
    lattice, frac = cubic()
    frac[0, 1] = frac[0, 0]
    leaves = [t.requires_grad_() for t in (logits, lattice, frac)]
    terms = constraints.per_cell(torch.softmax(logits, -1), lattice, frac, tab)
    assert float(terms["distance"].detach()) >= constraints.SHORTEST - 2e-3
    sum(v.sum() for v in terms.values()).backward()
    assert all(torch.isfinite(t.grad).all() for t in leaves)


def test_tolerance_factor_and_window(tab):
    t = lambda *cell: float(constraints.tolerance_factor(probabilities(*cell), tab))
    assert t("Sr", "Ti", "O", "O", "O") == pytest.approx((1.44 + 1.40) / (2**0.5 * (0.605 + 1.40)), abs=1e-3)
    assert t("Ba", "Ti", "O", "O", "O") > t("Sr", "Ti", "O", "O", "O") > t("Li", "Ti", "O", "O", "O")
    below = float(constraints.tolerance_term(probabilities("Li", "Ba", "O", "O", "O"), tab))
    assert below == pytest.approx(constraints.WINDOW[0] - t("Li", "Ba", "O", "O", "O"), abs=1e-6)


@pytest.mark.parametrize("term", constraints.TERMS)
def test_gradients_against_finite_differences(tab, term):
    """In random directions of logits, lattice and coordinates together, in double precision."""
    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    lattice = torch.tensor([[1.9, 2.1, 2.0, 85, 95, 92], [1.6, 1.7, 1.5, 90, 88, 91]], dtype=torch.float64)
    point = [random(2, 5, len(ELEMENTS)), lattice, random(2, 5, 3)]
    double = ions.Tables(*(getattr(tab, k).double() for k in ions.Tables.__dataclass_fields__))
    value = lambda p, l, f: constraints.per_cell(torch.softmax(p, -1), l, f, double)[term].sum()
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
        loss = constraints.charge_term(torch.softmax(logits, -1), tab).sum()
        logits = (logits - 2 * torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
    best = F.one_hot(logits.argmax(-1), len(ELEMENTS)).float()
    assert float(constraints.charge_term(best, tab)) == 0


@pytest.fixture
def setup(perovskites, config, tensors_of, model_of):
    cfg = config()
    batch = tensors_of(perovskites(12), cfg)
    return model_of(cfg, batch).eval(), batch


def test_the_objective_adds_the_weighted_terms_and_reaches_the_decoder(setup):
    model, batch = setup
    weights = {"charge": 0.5, "tolerance": 2.0}
    plain = total_loss(model, batch, 0.3)[0].detach()
    loss, terms = constraints.constrained_loss(weights)(model, batch, 0.3)
    loss = loss.detach()
    assert float(loss) == pytest.approx(float(plain) + sum(w * float(terms[k]) for k, w in weights.items()), rel=1e-5)
    assert float(terms["loss"]) == float(loss) and not model.decoder._forward_hooks
    model.zero_grad()
    constraints.constraint_terms(model(batch), model, batch)["charge"].backward()
    assert sum(float(p.grad.abs().sum()) for p in model.decoder.species.parameters()) > 0


def test_consistent_terms_are_silent_where_the_truth_itself_violates(setup):
    model, batch = setup
    tab = ions.tables(tuple(model.shape.elements))
    model.requires_grad_(False)
    truth = constraints.per_cell(F.one_hot(batch["species"], model.shape.classes).float(), batch["lattice"], batch["frac"], tab)
    out = model(batch)
    lattice = out["lattice"] * model.lattice_std + model.lattice_mean
    every = constraints.per_cell(torch.softmax(out["species"], -1), lattice, out["frac"], tab)
    got = constraints.constraint_terms(out, model, batch, consistent=True)
    assert (truth["charge"] > 0).any()
    assert float(got["charge"]) == pytest.approx(float((every["charge"] * (truth["charge"] < 1e-4)).mean()), rel=1e-5)
    assert float(got["charge"]) < float(constraints.constraint_terms(out, model, batch)["charge"])


def test_bad_input(setup, mixed, config, tensors_of, model_of):
    with pytest.raises(ValueError, match="volume"):
        constraints.constrained_loss({"volume": 1.0})
    cfg = config(labels=("band_gap", "formation_energy_per_atom"))
    cells = tensors_of(mixed(6), cfg)
    other = model_of(cfg, cells)
    with pytest.raises(ValueError, match="perovskites"):
        constraints.constraint_terms(other(cells), other, cells)


def test_epochs_to_a_level():
    curve = [(1.0, 50.0), (2.0, 90.0), (2.25, 98.0), (3.0, 96.0)]
    assert constraints.epochs_to(curve, 94.0) == pytest.approx(2.125)
    assert constraints.epochs_to(curve, 25.0) == pytest.approx(0.5)
    assert constraints.epochs_to(curve, 99.0) is None


def test_watch_looks_often_only_where_it_matters(setup, monkeypatch):
    model, batch = setup
    answers = iter([10.0, 70.0, 80.0, 97.0, 99.0])
    monkeypatch.setattr(constraints, "exact_composition", lambda *args: next(answers))
    watch = constraints.Watch(lambda *args: None, model, batch, steps=8)
    for _ in range(8 * 4):
        watch(model, batch, 0.0)
    assert [t for t, _ in watch.curve] == [1.0, 2.0, 2.25, 2.5, 3.0]
    assert watch.reached is not None


def test_claims_need_more_than_the_resolution():
    def regime(epochs, distinct):
        return {"epochs_to_level": epochs, "sm": 97.0, "mixture": {"distinct": distinct}}
    assert constraints.claims_of(regime(9.0, 1500), regime(8.9, 1480)) == {"s4.narrower": 0, "s4.faster": 0, "s4.sm_level": 97.0}
    assert constraints.claims_of(regime(9.0, 1500), regime(8.5, 1400)) == {"s4.narrower": 1, "s4.faster": 1, "s4.sm_level": 97.0}
    assert constraints.claims_of(regime(9.0, 1500), regime(None, 1400)) == {}


def test_random_latents_keep_the_lengths_of_the_data():
    z = np.random.default_rng(0).normal(size=(50, 6))
    for kind in ("mixture", "gaussian"):
        points = maps.random_latents(z, 30, kind, seed=1)
        lengths = np.linalg.norm(z, axis=1)
        assert points.shape == (30, 6) and all(np.abs(lengths - n).min() < 1e-5 for n in np.linalg.norm(points, axis=1))
    with pytest.raises(ValueError, match="sphere"):
        maps.random_latents(z, 3, "sphere")


def test_breadth_counts_twins_once(perovskites):
    crystals = perovskites(6)
    twins = crystals.numbers[:, [1, 0, 2, 3, 4]]
    both = maps.breadth(np.concatenate([crystals.numbers, twins]), crystals.select(slice(0, 3)))
    assert both["distinct"] == 6 and both["new"] == pytest.approx(50)
    assert maps.breadth(crystals.numbers[:0], crystals)["distinct"] == 0
    assert maps.effective_number(np.array([1, 1, 2, 2])) == pytest.approx(2)


def test_principal_and_anion_sets(perovskites):
    z = np.random.default_rng(0).normal(size=(40, 3)) * [5, 1, 0.1]
    projected, share = maps.principal(z)
    assert share.sum() == pytest.approx(1) and projected.var(0) / projected.var(0).sum() == pytest.approx(share)
    crystals = perovskites(1)
    crystals.numbers[0, 2:] = [8, 7, 8]
    assert maps.anion_sets(crystals)[0] == "O2N"


def test_explained_share_of_a_latent():
    rng = np.random.default_rng(0)
    f = rng.normal(size=(400, 2))
    z = np.c_[np.cos(f[:, 0]), np.sin(f[:, 0]), f[:, 1]]             # a ring: no linear measure would see all of it
    assert maps.explained(z, f) > 0.95
    assert maps.explained(rng.normal(size=(400, 3)), f) == pytest.approx(-0.1, abs=0.05)
    assert maps.element_features(np.array([[38, 22, 8, 8, 7]])).tolist() == [[0, 0, 0, 1] + [0, 0, 1, 0] + [1, 2, 0, 0]]
