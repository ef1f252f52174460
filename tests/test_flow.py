"""The set autoencoder: symmetries, the assignment, the flow on the torus, refinement."""

import numpy as np
import pytest
import torch

from meidnet_core import flow
from meidnet_core.crystal import lattice_matrix

ELEMENTS = ("C", "O", "Ti")


@pytest.fixture
def cells():
    """Four triclinic cells of five atoms."""
    g = torch.Generator().manual_seed(1)
    lattice = torch.cat([4 + 2 * torch.rand(4, 3, generator=g), 80 + 20 * torch.rand(4, 3, generator=g)], 1)
    return {"species": torch.tensor([[0, 0, 1, 1, 2]] * 4), "frac": torch.rand(4, 5, 3, generator=g), "lattice": lattice}


@pytest.fixture
def model():
    torch.manual_seed(0)
    cfg = flow.FlowConfig(width=24, edge_width=12, latent=16, blocks=2, rbf=6, fourier=2, heads=2)
    return flow.SetAutoencoder(cfg, flow.SetShape(ELEMENTS, 4)).eval()


def encode(model, cells):
    return model.encoder(cells["species"], cells["frac"], cells["lattice"])


def test_encoder_ignores_origin_order_and_choice_of_image(model, cells):
    order = torch.tensor([3, 1, 0, 4, 2])
    moved = {"species": cells["species"][:, order], "lattice": cells["lattice"],
             "frac": (cells["frac"] + torch.tensor([0.3, -0.2, 0.7]))[:, order] + torch.randint(-2, 3, (4, 5, 3))}
    assert torch.allclose(encode(model, cells), encode(model, moved), atol=1e-5)


def test_encoder_tells_species_and_geometry_apart(model, cells):
    z = encode(model, cells)
    other = {**cells, "species": torch.tensor([[0, 1, 1, 0, 2]] * 4)}
    shaken = {**cells, "frac": cells["frac"] + 0.1 * torch.randn(4, 5, 3)}
    assert (encode(model, other) - z).norm(dim=1).min() > 1e-4
    assert (encode(model, shaken) - z).norm(dim=1).min() > 1e-4


def test_velocity_ignores_origin_follows_order_and_has_no_common_shift(model, cells):
    z, t, order = torch.randn(4, 16), torch.rand(4), torch.tensor([3, 1, 0, 4, 2])
    v = model.velocity(z, cells["species"], cells["frac"], t)
    moved = model.velocity(z, cells["species"][:, order], (cells["frac"] + 0.37)[:, order], t)
    assert torch.allclose(v[:, order], moved, atol=1e-5)
    assert v.mean(1).abs().max() < 1e-6


def test_image_sums_see_a_cell_of_one_atom():
    a = torch.tensor([[3.0, 3, 3, 90, 90, 90], [3.5, 3.5, 3.5, 90, 90, 90]])
    sums = flow.image_sums(torch.zeros(2, 1, 3), lattice_matrix(a), 8, 6.0)
    assert sums.shape == (2, 1, 1, 8) and (sums[0] - sums[1]).abs().max() > 0.1


def test_image_sums_count_neighbours_of_a_simple_cubic_cell():
    """With one broad Gaussian at the cutoff's centre the six nearest neighbours dominate: known distance, known number."""
    a = torch.tensor([[3.0, 3, 3, 90, 90, 90]])
    got = flow.image_sums(torch.zeros(1, 1, 3), lattice_matrix(a), 16, 4.2)[0, 0, 0]
    centres, d, n = torch.linspace(0.8, 4.2, 16), torch.tensor([3.0, 18**0.5]), torch.tensor([6.0, 12.0])
    envelope = 0.5 * (torch.cos(d.clamp_max(4.2) * np.pi / 4.2) + 1)
    want = (n * envelope * torch.exp(-0.5 * ((d - centres[:, None]) * 16 / 4.2) ** 2)).sum(1)
    assert torch.allclose(got, want, atol=1e-4)


def test_lattice_features_round_trip(cells):
    assert torch.allclose(flow.lattice_from(flow.lattice_features(cells["lattice"])), cells["lattice"], atol=1e-3)


def test_assign_finds_a_permutation_and_a_shift():
    rng = np.random.default_rng(0)
    frac, species = rng.random((3, 6, 3)), np.array([[0, 0, 0, 1, 1, 1]] * 3)
    order = np.array([2, 0, 1, 5, 3, 4])
    start = (frac + 0.01 * rng.standard_normal((3, 1, 3)))[:, order]
    way = frac - flow.assign(start, frac, species)
    way = way - np.round(way)
    assert np.abs(way - way.mean(1, keepdims=True)).max() < 1e-9


def test_assign_never_crosses_elements():
    rng = np.random.default_rng(0)
    frac, species = rng.random((2, 4, 3)), np.array([[0, 0, 1, 1]] * 2)
    start = rng.random((2, 4, 3))
    out = flow.assign(start, frac, species)
    for b in range(2):
        assert {tuple(x) for x in out[b, :2]} == {tuple(x) for x in start[b, :2]}


def test_loss_reaches_every_parameter_and_is_finite(model, cells):
    loss, terms = flow.set_loss(model.train(), cells)
    loss.backward()
    assert torch.isfinite(loss) and set(terms) == {"composition", "lattice", "flow", "loss"}
    untouched = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not [n for n in untouched if "velocity.embed" not in n and "encoder.embed" not in n]


def test_flow_memorises_four_cells(cells):
    """Known limit: a model trained on four cells must rebuild their composition and bring sites near the right ones."""
    torch.manual_seed(0)
    cfg = flow.FlowConfig(width=32, edge_width=16, latent=16, blocks=2, rbf=6, fourier=2, heads=2, latent_noise=0.0)
    cells["species"] = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 1, 2], [0, 0, 0, 1, 2], [1, 1, 1, 1, 2]])
    features = flow.lattice_features(cells["lattice"])
    model = flow.SetAutoencoder(cfg, flow.SetShape(ELEMENTS, 4, tuple(features.mean(0).tolist()), tuple(features.std(0).tolist())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(150):
        loss, terms = flow.set_loss(model, cells)
        first = first or terms
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = encode(model, cells)
    counts, confidence = model.decode_counts(z)
    assert torch.equal(counts, torch.nn.functional.one_hot(cells["species"], 3).sum(1)) and confidence.min() > 0.5
    assert (model.decode_lattice(z) - cells["lattice"]).abs().max() < 3
    assert terms["flow"] < 0.8 * first["flow"]


def test_refine_never_ends_worse_and_moves_toward_the_latent(model, cells):
    z = encode(model, cells).detach()
    shaken = cells["frac"] + 0.03 * torch.randn(4, 5, 3)
    before = flow.residual(model, z, cells["species"], shaken, cells["lattice"])
    frac, lattice, after = flow.refine(model, z, cells["species"], shaken, cells["lattice"], steps=40)
    assert (after <= before + 1e-6).all() and after.mean() < 0.6 * before.mean()
    assert torch.allclose(flow.residual(model, z, cells["species"], frac, lattice), after, atol=1e-4)


def test_augment_inversion_keeps_distances(cells):
    cfg = flow.FlowConfig()
    out = flow.augment(cells, cfg, 3)
    a, b = (flow.image_sums(c["frac"], lattice_matrix(c["lattice"]), 8, 5.0) for c in (cells, out))
    assert torch.allclose(a, b, atol=1e-4)
    strained = flow.augment(cells, cfg.with_(strain=0.05, shake=0.1), 3)
    assert 0 < (strained["lattice"] / cells["lattice"] - 1).abs().max() < 0.3


def test_exchanged_elements_keep_the_arrangement(cells):
    out = flow.augment(cells, flow.FlowConfig(swap=1.0), 3)["species"]
    for row, new in zip(cells["species"], out):
        assert ((row[:, None] == row) == (new[:, None] == new)).all()
    many = torch.cat([flow.augment(cells, flow.FlowConfig(swap=1.0), 3)["species"] for _ in range(20)])
    assert len(many.unique(dim=0)) == 6                                        # every way to name three elements


def test_sample_is_reproducible(model, cells):
    z, args = encode(model, cells).detach(), (cells["species"], cells["lattice"])
    a, b = (flow.sample(model, z, *args, steps=3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and a.min() >= 0 and a.max() < 1
