"""Navigation in the latent space toward target properties."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from meidnet_core.data import DataError
from meidnet_core.design import navigate, unlabelled


@pytest.fixture
def model(config, perovskites, tensors_of, model_of):
    """Untrained, with standardised labels that differ from the physical ones."""
    cfg = config("improved")
    tensors = tensors_of(perovskites(16), cfg)
    tensors["labels"] = tensors["labels"] * 2 + 3
    return model_of(cfg, tensors).eval()


@pytest.fixture
def start():
    g = torch.Generator().manual_seed(0)
    lengths = torch.linspace(0.6, 1.0, 5)[:, None]
    return F.normalize(torch.randn(5, 12, generator=g), dim=1) * lengths


def target(model):
    """Half a standard deviation from what the model reads at first."""
    return (model.label_mean + torch.tensor([0.3, -0.2]) * model.label_std).tolist()


def read(model, z):
    return (model.properties(z) * model.label_std + model.label_mean).detach()


def test_the_distance_to_the_target_falls(model, start):
    path = navigate(model, start, target(model), steps=100)
    assert path.latents.shape == (100, 5, 12) and path.distance.shape == (100, 5)
    assert (path.distance[-1] < 0.2 * path.distance[0]).all()
    reached = (read(model, path.latents[-1]) - torch.tensor(target(model))) / model.label_std
    assert torch.allclose(reached.norm(dim=1), path.distance[-1], atol=1e-4)


def test_it_starts_where_it_is_told_and_leaves_the_start_alone(model, start):
    before = start.clone()
    path = navigate(model, start, target(model), steps=5)
    assert torch.equal(start, before) and not start.requires_grad
    assert torch.allclose(path.latents[0], start, atol=1e-6)
    assert not torch.allclose(path.latents[-1], start, atol=1e-3)


def test_latents_keep_their_length_on_the_way(model, start):
    path = navigate(model, start, target(model), steps=60)
    lengths = start.norm(dim=1).expand(60, 5)
    assert torch.allclose(path.latents.norm(dim=2), lengths, atol=1e-5)


def test_a_length_can_be_given(model, start):
    path = navigate(model, start, target(model), steps=10, norm=0.9)
    assert torch.allclose(path.latents.norm(dim=2), torch.full((10, 5), 0.9), atol=1e-5)


def test_a_property_without_target_is_free(model, start):
    wanted = target(model)
    path = navigate(model, start, [wanted[0], math.nan], steps=100)
    first = (read(model, start)[:, 0] - wanted[0]).abs() / model.label_std[0]
    assert torch.allclose(path.distance[0], first, atol=1e-4), "measured on the first label alone"
    assert path.latents.isfinite().all()
    assert (path.distance[-1] < 0.2 * path.distance[0]).all()
    other = navigate(model, start, [wanted[0], wanted[1]], steps=100)
    assert not torch.allclose(path.latents[-1], other.latents[-1], atol=1e-3)


def test_without_any_target_nothing_moves(model, start):
    path = navigate(model, start, [math.nan, math.nan], steps=5)
    assert torch.allclose(path.latents[-1], start, atol=1e-6)
    assert (path.distance == 0).all()


def test_the_model_is_not_changed(model, start):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    navigate(model, start, target(model), steps=5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_bimodal_model_is_refused(config, perovskites, tensors_of, model_of, start):
    cfg = config("improved", labels=("heat_all",))
    model = model_of(cfg, tensors_of(perovskites(8), cfg)).eval()
    with pytest.raises(ValueError, match="needs a tri-modal model"):
        navigate(model, start, [0.0])


def test_cells_of_several_sizes_are_refused_by_a_model_of_one():
    sizes = SimpleNamespace(numbers=[[19, 50, 53, 53, 53], [11, 17, 0, 0, 0]])
    with pytest.raises(DataError, match="cells of several sizes"):
        unlabelled(SimpleNamespace(shape=SimpleNamespace(padded=False)), sizes)
