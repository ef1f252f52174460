"""The stand-in for CDVAE: symmetry of the score network, the heads, denoising, training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from meidnet_core import cdvae, crystal
from meidnet_core.checkpoint import CheckpointError

SMALL = {"latent": 8, "width": 16, "edge_width": 12, "rbf": 6, "blocks": 2, "levels": 4, "steps": 2, "batch": 8}


@pytest.fixture
def cfg():
    return cdvae.Settings(epochs=3, **SMALL)


@pytest.fixture
def build(vocabulary, cfg):
    """build(crystals) -> (model, tensors), untrained."""

    def make(crystals):
        tensors = cdvae.to_tensors(crystals, vocabulary, crystals.numbers.shape[1])
        torch.manual_seed(1)
        return cdvae.CDVAESmall(cfg, cdvae.shape_of(tensors, vocabulary)), tensors

    return make


def score(model, t, frac=None, cell=None, order=None):
    """Output of the score network for given coordinates, cells, order of sites."""
    torch.manual_seed(0)
    z, sigma = torch.randn(len(t["mask"]), 8), torch.full((len(t["mask"]),), 0.5)
    order = torch.arange(t["mask"].shape[1]) if order is None else order
    frac = t["frac"] if frac is None else frac
    cell = crystal.lattice_matrix(t["lattice"]) if cell is None else cell
    model.score.egnn.layers[0].phi_x.weight.data.fill_(0.3)             # not the near-zero start
    return model.score(frac[:, order], cell, t["species"][:, order], t["mask"][:, order], z, sigma)


# ---- symmetry ------------------------------------------------------------------------------------


def test_the_score_turns_with_the_crystal(mixed, build):
    model, t = build(mixed(6))
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))[0]
    plain = score(model, t)
    turned = score(model, t, cell=crystal.lattice_matrix(t["lattice"]) @ rotation)
    assert plain.abs().max() > 1e-2 and torch.allclose(plain @ rotation, turned, atol=1e-4)


def test_the_score_knows_neither_origin_nor_image_nor_order(mixed, build):
    model, t = build(mixed(6))
    plain = score(model, t)
    assert torch.allclose(score(model, t, frac=t["frac"] + 0.3), plain, atol=1e-4)
    assert torch.allclose(score(model, t, frac=t["frac"] + torch.randint(-2, 3, t["frac"].shape)), plain, atol=1e-4)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(score(model, t, order=order), plain[:, order], atol=1e-4)


def test_the_score_has_mean_zero_and_nothing_on_empty_sites(mixed, build):
    model, t = build(mixed(6))
    out = score(model, t)
    assert out.sum(1).abs().max() < 1e-5 and (t["mask"] == 0).any()
    assert out[t["mask"] == 0].abs().max() == 0
    padded = {k: v if k == "lattice" else torch.cat([v, torch.full_like(v[:, :1], len(model.shape.elements) if k == "species" else 0)], 1)
              for k, v in t.items()}
    assert torch.allclose(score(model, padded)[:, :-1], out, atol=1e-5)


def test_the_encoder_is_invariant(mixed, build):
    model, t = build(mixed(6))
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    other = {k: v if k == "lattice" else v[:, order] for k, v in t.items()} | {"frac": t["frac"][:, order] + 0.21}
    for a, b in zip(model.encode(t), model.encode(other), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


# ---- heads ---------------------------------------------------------------------------------------


def test_counts_are_whole_and_nearest_to_the_fractions():
    fraction = torch.tensor([[0.2, 0.2, 0.6], [0.34, 0.33, 0.33], [1.0, 0.0, 0.0]])
    species = cdvae.whole_counts(fraction, torch.tensor([5, 4, 2]))
    assert species.tolist() == [[0, 1, 2, 2, 2], [0, 0, 1, 2, 3], [0, 0, 3, 3, 3]]


def test_counts_always_add_up():
    fraction = torch.softmax(torch.randn(200, 7, generator=torch.Generator().manual_seed(0)), 1)
    n = torch.arange(200) % 9 + 1
    assert torch.equal((cdvae.whole_counts(fraction, n) < 7).sum(1), n)


def test_lengths_per_atom_are_the_same_for_a_supercell():
    one, eight = torch.tensor([[4.0, 4, 4, 90, 90, 90]]), torch.tensor([[8.0, 8, 8, 90, 90, 90]])
    assert torch.allclose(cdvae.per_atom(one, torch.tensor([5.0])), cdvae.per_atom(eight, torch.tensor([40.0])))


def test_noise_levels_fall_geometrically():
    sigmas = cdvae.Settings().sigmas()
    assert sigmas[0] == pytest.approx(2.0) and sigmas[-1] == pytest.approx(0.02) and len(sigmas) == 20
    assert torch.allclose(sigmas[1:] / sigmas[:-1], sigmas[1] / sigmas[0])


def test_decoded_cells_have_the_predicted_number_of_atoms_and_a_lattice(mixed, build):
    model, t = build(mixed(6))
    z = torch.randn(5, 8)
    cells = model.decode(z)
    n = model.number(z).argmax(1) + 1
    assert [len(c[1]) for c in cells] == n.tolist()
    for lattice, symbols, frac in cells:
        assert frac.shape == (len(symbols), 3) and np.isfinite(frac).all() and set(symbols) <= set(model.shape.elements)
        assert (lattice[:3] > 0).all() and (30 <= lattice[3:]).all() and (lattice[3:] <= 150).all()


# ---- denoising -----------------------------------------------------------------------------------


def test_langevin_with_the_exact_score_finds_the_crystal(perovskites, build, monkeypatch):
    """With the score of one known cell the dynamics must end there, whatever it started from."""
    model, t = build(perovskites(4))
    cell = crystal.lattice_matrix(t["lattice"])

    def exact(frac, cell, species, mask, z, sigma):
        back = t["frac"] - frac
        return (back - back.round()) @ cell / sigma[:, None, None]

    monkeypatch.setattr(model.score, "forward", exact)
    frac = model.langevin(cell, t["species"], t["mask"], torch.zeros(4, 8))
    off = t["frac"] - frac
    assert ((off - off.round()) @ cell).norm(dim=-1).max() < 1e-4


def test_the_denoising_loss_of_the_exact_noise_is_zero(mixed, build, monkeypatch):
    model, t = build(mixed(6))
    monkeypatch.setattr(cdvae.Settings, "sigmas", lambda self: torch.full((self.levels,), 0.05))   # nearest image is the own one

    def exact(frac, cell, species, mask, z, sigma):
        back = t["frac"] - frac
        return cdvae.centred((back - back.round()) @ cell / sigma[:, None, None], mask)

    random = model.denoising(t, torch.zeros(6, 8))
    monkeypatch.setattr(model.score, "forward", exact)
    assert model.denoising(t, torch.zeros(6, 8)) < 1e-6 < 0.3 < random


def test_every_term_reaches_the_encoder_and_gradients_are_finite(mixed, build):
    model, t = build(mixed(6))
    torch.manual_seed(0)
    loss, terms = model.loss(t)
    loss.backward()
    assert set(terms) == {"loss", "kl", "number", "composition", "lattice", "coords"}
    assert all(math.isfinite(v) and v >= 0 for v in terms.values())
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in grads.values())
    assert grads["encoder.embed.weight"].abs().max() > 0 and grads["score.condition.0.weight"].abs().max() > 0


# ---- training ------------------------------------------------------------------------------------


def test_batches_hold_every_cell_once_and_cells_of_like_size(mixed, build):
    _, t = build(mixed(16))
    torch.manual_seed(0)
    parts = cdvae.batches(t["mask"], 4)
    assert sorted(torch.cat(parts).tolist()) == list(range(16))
    assert [len(set(t["mask"][rows].sum(1).tolist())) for rows in parts] == [1] * 4
    small = min(parts, key=lambda rows: t["mask"][rows].sum())
    cut = cdvae.trimmed(t, small)
    assert cut["frac"].shape == (4, 3, 3) and cut["lattice"].shape == (4, 6)


def test_training_lowers_the_loss_and_resumes_bit_for_bit(perovskites, build, cfg, tmp_path):
    model, t = build(perovskites(24))
    long = cdvae.Settings(**{**SMALL, "epochs": 25, "lr": 5e-3})
    history = cdvae.train(long, model.shape, t, progress=False)[1]
    assert history[-1]["composition"] < 0.9 * history[0]["composition"]
    assert history[-1]["number"] < 0.5 * history[0]["number"]
    whole = cdvae.train(cfg, model.shape, t, progress=False)[0]
    path = tmp_path / "run.safetensors"
    once = cdvae.train(cfg, model.shape, t, minutes=1e-9, path=path, progress=False)
    assert len(once[1]) == 1
    resumed = cdvae.train(cfg, model.shape, t, path=path, progress=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        cdvae.train(cdvae.Settings(**{**SMALL, "epochs": 3, "seed": 1}), model.shape, t, path=path, progress=False)


def test_how_many_cells_are_scored_is_not_the_training(perovskites, build, cfg, tmp_path):
    model, t = build(perovskites(8))
    first = cdvae.train(cfg, model.shape, t, path=tmp_path / "run.safetensors", progress=False)
    again = cdvae.train(replace(cfg, cells=5), model.shape, t, path=tmp_path / "run.safetensors", progress=False)
    assert again[1] == first[1] and again[2] == first[2]


def test_reconstruct_keeps_the_order_of_the_cells(mixed, build, monkeypatch):
    model, t = build(mixed(9))
    seen = lambda z: [("cell", round(float(v), 4)) for v in z[:, 0]]
    monkeypatch.setattr(model, "decode", seen)
    found = cdvae.reconstruct(model.eval(), t, block=4)
    expected = seen(model.encode(t)[0].detach())
    assert [round(a[1] - b[1], 3) for a, b in zip(found, expected, strict=True)] == [0] * 9


@pytest.mark.parametrize("epochs, folder", [(cdvae.Settings.epochs, "perov_5-cdvae-small"), (3, "perov_5-cdvae-small3")])
def test_another_length_is_a_run_of_its_own(perovskites, build, cfg, monkeypatch, epochs, folder):
    crystals, written = perovskites(4), []
    model, tensors = build(crystals)
    history = [dict.fromkeys(("coords", "composition", "lattice", "kl"), 0.0)]
    splits = ({"train": tensors, "test": tensors}, {"test": crystals})
    monkeypatch.setattr(cdvae, "prepare", lambda cfg: (None, *splits))
    monkeypatch.setattr(cdvae, "train", lambda *args: (model, history, 1.0))
    keep = lambda experiment, run, config, **words: written.append((experiment, config["epochs"]))
    monkeypatch.setattr(cdvae.results, "write_run", keep)
    cdvae.run(replace(cfg, epochs=epochs, cells=4), processes=1)
    assert written == [(folder, 1)]                                           # the epochs that were reached
