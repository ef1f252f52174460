"""Losses against plain loops and hand computation, masked labels, curriculum."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meidnet_core import losses
from meidnet_core.config import PAPER, PAPER_CLEAN

STANDARDISED = PAPER.with_(normalize=True, gumbel_noise=False)


def unit(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def info_nce_by_hand(a, b, temperature):
    """Eqs. (v) and (xxii), both directions."""
    total, n = 0.0, len(a)
    for i in range(n):
        forward = [math.exp(float(a[i] @ b[j]) / temperature) for j in range(n)]
        backward = [math.exp(float(a[j] @ b[i]) / temperature) for j in range(n)]
        total -= math.log(forward[i] / sum(forward)) + math.log(backward[i] / sum(backward))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_equals_a_plain_double_loop(temperature):
    a, b = unit(6, 10, seed=1), unit(6, 10, seed=2)
    expected = info_nce_by_hand(a, b, temperature)
    assert losses.info_nce(a, b, temperature).item() == pytest.approx(expected, rel=1e-10)


def test_info_nce_is_symmetric_and_lowest_for_the_right_partners():
    a, b = unit(6, 10, seed=1), unit(6, 10, seed=2)
    assert torch.allclose(losses.info_nce(a, b, 0.1), losses.info_nce(b, a, 0.1))
    assert losses.info_nce(a, a, 0.1) < losses.info_nce(a, b, 0.1)
    assert losses.info_nce(a, a, 0.1) < losses.info_nce(a, a.roll(1, 0), 0.1)


def test_info_nce_of_equal_embeddings_is_the_logarithm_of_the_batch():
    same = unit(1, 4).expand(5, 4)
    assert losses.info_nce(same, same, 0.07).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("count", [0, 1])
def test_without_negatives_there_is_nothing_to_contrast(count):
    a = unit(count, 4).requires_grad_(True)
    loss = losses.info_nce(a, unit(count, 4, seed=1), 0.07)
    loss.backward()
    assert loss.item() == 0 and (a.grad == 0).all()


def known(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_early_fusion_contrasts_structure_and_properties():
    c, p = unit(4, 8, seed=1), unit(4, 8, seed=2)
    loss = losses.contrastive(c, [(p, known(1, 1, 1, 1))], 0.1)
    assert torch.allclose(loss, losses.info_nce(c, p, 0.1))


def test_late_fusion_is_the_mean_of_three_pairs():
    c, h, d = (unit(4, 8, seed=s) for s in (1, 2, 3))
    everything = known(1, 1, 1, 1)
    loss = losses.contrastive(c, [(h, everything), (d, everything)], 0.1)
    pairs = [(c, h), (c, d), (h, d)]
    assert torch.allclose(loss, sum(losses.info_nce(a, b, 0.1) for a, b in pairs) / 3)


def test_rows_without_a_label_take_no_part_in_the_contrast():
    c, h, d = (unit(5, 8, seed=s) for s in (1, 2, 3))
    has_h, has_d = known(1, 1, 0, 1, 1), known(1, 0, 1, 1, 1)
    loss = losses.contrastive(c, [(h, has_h), (d, has_d)], 0.1)
    pairs = [(c, h, has_h), (c, d, has_d), (h, d, has_h & has_d)]
    expected = sum(losses.info_nce(a[k], b[k], 0.1) for a, b, k in pairs) / 3
    assert torch.allclose(loss, expected)
    h = h.clone().requires_grad_(True)
    losses.contrastive(c, [(h, has_h), (d, has_d)], 0.1).backward()
    assert (h.grad[2] == 0).all() and (h.grad[[0, 1, 3, 4]] != 0).any(1).all()


# ---- curriculum ----------------------------------------------------------------------------------


def test_exponential_curriculum_follows_equation_vi():
    weight = lambda t: losses.contrastive_weight(t, 90, "exp", 2 / 3)
    assert weight(0) == 0
    assert weight(30) == pytest.approx(1 - math.exp(-math.log(100) / 2)) == pytest.approx(0.9)
    assert weight(59.999999) == pytest.approx(0.99, abs=1e-6)
    assert weight(60) == weight(75) == weight(1000) == 1


def test_linear_curriculum_rises_evenly():
    weight = lambda t: losses.contrastive_weight(t, 90, "linear", 2 / 3)
    assert [weight(t) for t in (0, 15, 30, 45)] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert weight(60) == weight(89) == 1


def test_no_curriculum_is_full_weight_from_the_start():
    assert {losses.contrastive_weight(t, 90, "none") for t in (0, 1, 50, 90)} == {1.0}


@pytest.mark.parametrize("schedule", ["exp", "linear"])
@pytest.mark.parametrize("ramp", [0.2, 2 / 3, 1.0])
def test_curriculum_never_falls_and_stays_within_zero_and_one(schedule, ramp):
    values = [losses.contrastive_weight(t / 7, 40, schedule, ramp) for t in range(7 * 40)]
    assert np.all(np.diff(values) >= 0) and values[0] == 0 and max(values) <= 1
    assert losses.contrastive_weight(40, 40, schedule, ramp) == 1


# ---- reconstruction and properties --------------------------------------------------------------


@pytest.fixture
def pair():
    """A decoder output and its target: 2 cells of 3 sites, the last site of the second empty."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g)
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    neighbours = mask[:, :, None] * mask[:, None] * (1 - torch.eye(3))
    batch = {"frac": draw(2, 3, 3), "mask": mask, "pair": neighbours}
    batch["adjacency"] = neighbours * torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
    batch["species"] = torch.tensor([[0, 1, 2], [2, 2, 3]])
    out = {"lattice": draw(2, 6), "adjacency": draw(2, 3, 3), "species": draw(2, 3, 4)}
    return out | {"frac": draw(2, 3, 3)}, batch, draw(2, 6)


def test_reconstruction_terms_equal_hand_computation(pair):
    out, batch, lattice = pair
    terms = losses.reconstruction(out, batch, lattice, PAPER_CLEAN)
    squares = ((out["lattice"] - lattice) ** 2).flatten().tolist()
    assert terms["lattice"].item() == pytest.approx(sum(squares) / 12, rel=1e-5)
    real = [(0, i) for i in range(3)] + [(1, i) for i in range(2)]
    bce, nll, dist = [], [], []
    for b, i in real:
        dist.append(sum((out["frac"][b, i] - batch["frac"][b, i]).tolist()[k] ** 2 for k in range(3)))
        for c, j in real:
            if b == c and i != j:
                p = 1 / (1 + math.exp(-out["adjacency"][b, i, j].item()))
                bce.append(-math.log(p if batch["adjacency"][b, i, j] else 1 - p))
    for b in range(2):
        for i in range(3):
            logits = out["species"][b, i].tolist()
            right = logits[batch["species"][b, i]]
            nll.append(math.log(sum(map(math.exp, logits))) - right)
    assert len(bce) == 8
    assert terms["adjacency"].item() == pytest.approx(sum(bce) / 8, rel=1e-5)
    assert terms["coords"].item() == pytest.approx(sum(dist) / 5, rel=1e-5)
    assert terms["species"].item() == pytest.approx(sum(nll) / 6, rel=1e-5)


def test_empty_sites_count_for_the_species_and_for_nothing_else(pair):
    out, batch, lattice = pair
    before = losses.reconstruction(out, batch, lattice, PAPER)
    for key, index in (("frac", (1, 2)), ("adjacency", (1, 2)), ("adjacency", (1, slice(None), 2))):
        out[key][index] += 5.0
    out["species"][1, 2, 0] += 5.0
    after = losses.reconstruction(out, batch, lattice, PAPER)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"species"}


def test_coordinates_are_compared_on_the_torus_when_standardised(pair):
    out, batch, lattice = pair
    torus = losses.reconstruction(out, batch, lattice, STANDARDISED)["coords"]
    plain = losses.reconstruction(out, batch, lattice, PAPER)["coords"]
    shifted = out | {"frac": out["frac"] + torch.tensor([1.0, -2.0, 0.0])}
    moved = losses.reconstruction(shifted, batch, lattice, STANDARDISED)["coords"]
    assert torch.allclose(moved, torus, atol=1e-5)
    assert losses.reconstruction(shifted, batch, lattice, PAPER)["coords"] > plain + 1
    near = {"frac": torch.tensor([[[0.99, 0, 0]]]), "mask": torch.ones(1, 1)}
    target = near | {"frac": torch.tensor([[[0.01, 0, 0]]]), "pair": torch.ones(1, 1, 1)}
    target |= {"adjacency": torch.ones(1, 1, 1), "species": torch.zeros(1, 1, dtype=torch.long)}
    near |= {"adjacency": torch.ones(1, 1, 1), "species": torch.zeros(1, 1, 2)}
    near |= {"lattice": torch.zeros(1, 6)}
    value = losses.reconstruction(near, target, torch.zeros(1, 6), STANDARDISED)["coords"]
    assert value.item() == pytest.approx(0.02**2, rel=1e-3)


def test_species_noise_acts_in_training_only_and_keeps_the_target():
    logits = torch.zeros(4, 5, 3)
    logits[..., 1] = 3.0
    species = torch.ones(4, 5, dtype=torch.long)
    clean = F.cross_entropy(logits.flatten(0, 1), species.flatten())
    with torch.no_grad():
        assert torch.equal(losses.species_loss(logits, species, PAPER), clean)
    free = logits.clone().requires_grad_(True)
    torch.manual_seed(0)
    noisy = [losses.species_loss(free, species, PAPER).item() for _ in range(3)]
    assert len(set(noisy)) == 3
    assert torch.allclose(losses.species_loss(free, species, STANDARDISED), clean)
    losses.species_loss(free, species, PAPER).backward()
    assert (free.grad[..., 1] <= 0).all() and free.grad[..., 1].min() < 0


def test_a_missing_label_gives_no_gradient():
    predicted = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    labels = torch.tensor([[0.0, math.nan], [math.nan, 1.0]])
    loss = losses.property_loss(predicted, labels)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 9) / 2)
    assert predicted.grad.tolist() == [[1.0, 0.0], [0.0, 3.0]]


def test_missing_labels_cost_the_same_as_dropped_rows():
    g = torch.Generator().manual_seed(0)
    predicted, labels = torch.randn(6, 2, generator=g), torch.randn(6, 2, generator=g)
    labels[[1, 4]] = math.nan
    kept = [0, 2, 3, 5]
    masked = losses.property_loss(predicted, labels)
    assert torch.allclose(masked, losses.property_loss(predicted[kept], labels[kept]))
    assert losses.property_loss(predicted, torch.full((6, 2), math.nan)) == 0


def test_the_total_loss_is_the_weighted_sum_of_its_terms(config, perovskites, tensors_of, model_of):
    cfg = config("improved", w_prop_structure=0.5, w_con=0.3, gumbel_noise=False)
    t = tensors_of(perovskites(8), cfg)
    model = model_of(cfg, t).eval()
    loss, terms = losses.total_loss(model, t, alpha=0.25)
    weights = {"lattice": cfg.w_lattice, "adjacency": cfg.w_adjacency, "species": cfg.w_species}
    weights |= {"coords": cfg.w_coords, "prop": cfg.w_prop, "prop_structure": 0.5, "nce": 0.25 * 0.3}
    expected = sum(w * terms[k].item() for k, w in weights.items())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert terms["loss"].item() == loss.item() and not terms["loss"].requires_grad
    without, _ = losses.total_loss(model, t, alpha=0.0)
    assert without.item() == pytest.approx(expected - 0.25 * 0.3 * terms["nce"].item(), rel=1e-5)


def test_missing_labels_change_no_gradient_of_the_property_branch(config, perovskites, tensors_of, model_of):
    """A batch with unlabelled rows trains the property networks as the labelled rows alone do."""
    cfg = config("paper", w_lattice=0, w_adjacency=0, w_species=0, w_coords=0)
    t = tensors_of(perovskites(8), cfg)
    model = model_of(cfg, t)
    t["labels"][5:] = math.nan
    labelled = {k: v[:5] for k, v in t.items()}
    gradients = []
    for batch in (t, labelled):
        model.zero_grad()
        losses.total_loss(model, batch, alpha=1.0)[0].backward()
        parts = [model.prop_encoders, model.project_p, model.prop_decoder]
        gradients.append(torch.cat([p.grad.flatten() for m in parts for p in m.parameters()]))
    assert gradients[0].isfinite().all() and gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


# ---- production terms: misalignment, absolute error, exchanged labels ---------------------------


def test_misalignment_is_one_minus_cosine_over_known_pairs():
    y, some = unit(4, 6), torch.tensor([True, True, False, True])
    assert losses.misalignment(y, [(y, some)]).abs() < 1e-9
    assert losses.misalignment(y, [(-y, some)]).item() == pytest.approx(2)
    other = torch.where(some[:, None], y, -y)                                   # only the unknown pair disagrees
    assert losses.misalignment(y, [(other, some)]).abs() < 1e-9


def test_absolute_property_loss_adds_the_absolute_error():
    predicted, labels = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, float("nan")]])
    assert losses.property_loss(predicted, labels) == 4
    assert losses.property_loss(predicted, labels, absolute=True) == 6


def test_exchanged_labels_are_those_that_were_embedded(perovskites, config, tensors_of, model_of):
    """The target of the property decoder moves with the embedded labels, by the noise that was asked for."""
    cfg = config("production", exchange=0.5)
    batch = tensors_of(perovskites(64), cfg)
    model = model_of(cfg, batch)
    labels, (z_c, y_c) = model.scale(batch)[1], model.embed_structure(batch)
    predicted, target = model.exchanged(labels, y_c, z_c)
    assert (target - labels).std().item() == pytest.approx(0.5, rel=0.3)
    again = model.properties(model.join(y_c, model.embed_properties(target)), z_c)
    assert torch.allclose(predicted, again, atol=1e-6)


def test_a_head_of_its_own_predicts_from_the_structure(perovskites, config, tensors_of, model_of):
    cfg = config("production")
    batch = tensors_of(perovskites(8), cfg)
    model = model_of(cfg, batch).eval()
    out = model(batch)
    assert torch.equal(out["props_structure"], model.prop_head(out["z_c"]))
    assert not torch.allclose(out["props_structure"], model.properties(out["y_c"], out["z_c"]))
