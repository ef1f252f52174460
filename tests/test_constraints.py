"""Constraints: zero where a crystal obeys, positive where it does not, with right gradients and a known relaxation."""


import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meidnet_core import constraints, ions, maps, perovskite
from meidnet_core.losses import total_loss

pytest.importorskip("smact")


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
    truth = perovskite.per_cell(F.one_hot(batch["species"], model.shape.classes).float(), batch["lattice"], batch["frac"], tab)
    out = model(batch)
    lattice = out["lattice"] * model.lattice_std + model.lattice_mean
    every = perovskite.per_cell(torch.softmax(out["species"], -1), lattice, out["frac"], tab)
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
    few = constraints.Watch(lambda *args: None, model, batch, steps=2)
    few.curve, few.look = [(0.0, 70.0)], lambda: few.curve.append((few.count / 2, 70.0))    # fewer steps than looks in an epoch
    for _ in range(3):
        few(model, batch, 0.0)
    assert [t for t, _ in few.curve] == [0.0, 0.5, 1.0]


def test_claims_need_more_than_the_resolution():
    def regime(epochs, distinct, sm=97.0, rmse=0.04):
        return {"epochs_to_level": epochs, "sm": sm, "rmse": rmse, "mixture": {"distinct": distinct}}
    said = lambda bound: {k: c["value"] for k, c in constraints.claims_of(regime(9.0, 1500), bound).items()}
    assert said(regime(8.9, 1480)) == {"s4.narrower": 0, "s4.faster": 0, "s4.quality": 0, "s4.sm_level": 97.0}
    assert said(regime(8.5, 1400)) == {"s4.narrower": 1, "s4.faster": 1, "s4.quality": 0, "s4.sm_level": 97.0}
    assert said(regime(8.9, 1480, 98.0, 0.03))["s4.quality"] == 1 and said(regime(8.9, 1480, 98.0, 0.05))["s4.quality"] == 0
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
