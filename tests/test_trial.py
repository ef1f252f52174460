"""One training of a campaign: its proxies, its cells, its reconstruction loss."""

import numpy as np
import pytest
import torch

from meidnet_core import metrics, trial
from meidnet_core.train import train


@pytest.fixture
def sweep(config):
    return config(name="sweep", epochs=3)


def test_proxies_do_not_disturb_the_training(sweep, splits):
    plain = train(sweep, splits.tensors["train"], splits.elements, device="cpu", progress=False)
    watched = trial.trained(sweep, splits, device="cpu")
    a, b = plain.model.state_dict(), watched.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert {"val_exact", "val_cosine", "val_l2d", "val_joint_r2"} <= set(watched.history[-1])


def test_proxies_agree_with_the_evaluation(sweep, splits):
    for cfg in (sweep, sweep.with_(fusion="late")):
        model = trial.trained(cfg, splits, device="cpu").model
        cheap = trial.proxies(model, splits.tensors["test"])
        full, _ = metrics.evaluate(model, splits.tensors["test"], splits.crystals["test"], processes=1)
        r2 = np.mean([full[f"{l}_joint_r2"] for l in cfg.labels])
        for key, value in {"exact": full["exact_composition"], "cosine": full["cosine"], "l2d": full["l2d"], "joint_r2": r2}.items():
            assert cheap[key] == pytest.approx(value, abs=1e-4)


def test_reconstruction_is_the_weighted_sum_and_independent_of_blocks(sweep, splits, model_of):
    model, tensors = model_of(sweep, splits.tensors["train"]).eval(), splits.tensors["train"]
    whole, parts = (trial.held_out_reconstruction(model, tensors, block) for block in (24, 5))
    assert whole["reconstruction"] == pytest.approx(sum(getattr(sweep, f"w_{k}") * whole[f"loss_{k}"] for k in
                                                        ("lattice", "adjacency", "species", "coords")))
    assert parts["loss_species"] == pytest.approx(whole["loss_species"], rel=1e-4)
    assert parts["loss_coords"] == pytest.approx(whole["loss_coords"], rel=1e-4)


def test_the_subset_is_fixed(splits):
    a, b = (trial.subset(splits.tensors["val"], 4) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a) and len(a["species"]) == 4
    assert len(trial.subset(splits.tensors["val"], 100)["species"]) == 10


def test_crystals_differ_little_for_an_untrained_model_without_residuals(sweep, splits):
    plain, residual = (trial.first_spread(sweep.with_(residual=r), splits, 10) for r in (False, True))
    assert 0 < plain["cells"] < 0.1 * residual["cells"] and plain == trial.first_spread(sweep.with_(residual=False), splits, 10)


def test_the_cost_of_a_training_is_counted_not_timed(sweep, splits):
    changed = (sweep, sweep.with_(latent=4 * sweep.latent), sweep.with_(epochs=3 * sweep.epochs))
    small, large, longer = (trial.cost(cfg, splits) for cfg in changed)
    assert 0 < small < large and longer == pytest.approx(3 * small)
    assert trial.cost(sweep, splits, cells=4) == pytest.approx(trial.cost(sweep, splits, cells=8), rel=0.2)
