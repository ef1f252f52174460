"""One training of a campaign: cheap proxies on validation cells after every epoch, and a single look at the test split at its end."""

import numpy as np
import torch

from . import abreast, losses, metrics
from .model import MEIDNet
from .train import shape_of, train

CURVE = "species coords lattice adjacency nce alpha val_exact val_cosine val_l2d val_joint_r2 seconds".split()      # kept per epoch
VAL_CELLS, TEST_CELLS = 500, 500                                        # proxies of an epoch; StructureMatcher at the end


def chosen(size, count=None):
    """Indices of `count` (all by default) of `size` cells, the same for every run."""
    return np.sort(np.random.default_rng(0).permutation(size)[:count])


def subset(tensors, count=VAL_CELLS):
    return {k: t[torch.as_tensor(chosen(len(t), count), device=t.device)] for k, t in tensors.items()}


def proxies(model, tensors):
    """Cheap held-out metrics of one epoch (abreast.held_out): exact (%), cosine, l2d, joint_r2 (mean over the labels).

    exact: all species right from the joint latent. On Perov-5 it equals SM at CDVAE tolerances to 0.1 points, because
    those forgive every geometry that is near the prototype and StructureMatcher rescales the volume.
    """
    return {k: float(v) for k, v in abreast.held_out(model.eval(), tensors).items()}


@torch.no_grad()
def held_out_reconstruction(model, tensors, block=1024):
    """Reconstruction loss (eq. xix) of a split, weighted as in training, and its terms; a mean over blocks of cells."""
    sums, count = {}, len(tensors["species"])
    for k in range(0, count, block):
        batch = {key: t[k:k + block] for key, t in tensors.items()}
        terms = losses.reconstruction(model.eval()(batch), batch, model.scale(batch)[0], model.cfg)
        for key, value in terms.items():
            sums[key] = sums.get(key, 0.0) + float(value) * len(batch["species"]) / count
    return {"reconstruction": sum(getattr(model.cfg, f"w_{k}") * v for k, v in sums.items())} | {f"loss_{k}": v for k, v in sums.items()}


@torch.no_grad()
def first_spread(cfg, splits, cells=VAL_CELLS):
    """Before any training, decoded from the joint latent of validation cells: standard deviation of the species logits over cells and over
    the sites of a cell. Where the first is nothing, gradients cannot tell one crystal from another."""
    torch.manual_seed(cfg.seed)
    model = MEIDNet(cfg, shape_of(splits.tensors["train"], splits.elements, cfg)).eval()
    logits = model(subset(splits.tensors["val"], cells))["species"]                         # (cells, N, K)
    return {"cells": float(logits.std(0).mean()), "sites": float(logits.std(1).mean())}


def cost(cfg, splits, cells=32):
    """Floating-point operations of a whole training (10^12), forward and backward: counted on one batch of `cells` by torch
    (matrix products alone), times the training cells and the epochs. Unlike a time, no busy machine changes it."""
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(cfg.seed)
    train_cells = splits.tensors["train"]
    model = MEIDNet(cfg, shape_of(train_cells, splits.elements, cfg))
    with FlopCounterMode(display=False) as counter:
        losses.total_loss(model, {k: t[:cells] for k, t in train_cells.items()}, 1.0)[0].backward()
    return counter.get_total_flops() / cells * len(train_cells["species"]) * cfg.epochs / 1e12


def trained(cfg, splits, cells=None, state=None, progress=False, device="auto"):
    """Train on `cells` training cells (all by default); the history holds the proxies on val as val_exact, val_cosine, ..."""
    val = subset(splits.tensors["val"])
    on_epoch = lambda model, epoch, record: record.update({f"val_{k}": v for k, v in proxies(model, val).items()})
    tensors = splits.tensors["train"] if cells is None else subset(splits.tensors["train"], cells)
    return train(cfg, tensors, splits.elements, checkpoint=state, every=5, device=device, on_epoch=on_epoch, progress=progress)


def tested(model, splits):
    """metrics.evaluate on TEST_CELLS fixed test cells (StructureMatcher takes longer than a sweep's training), with
    alignment, joint R2 and exact composition of the whole test split in their place; right elements are those of the few."""
    cells, whole = splits.crystals["test"], proxies(model, splits.tensors["test"])
    few, tensors = cells.select(chosen(len(cells), TEST_CELLS)), subset(splits.tensors["test"], TEST_CELLS)
    m, _ = metrics.evaluate(model, tensors, few, processes=torch.get_num_threads())
    return m | {"exact_composition": whole.pop("exact"), "n_whole": len(cells)} | whole


def curve_of(run):
    return {k: [float(f"{h[k]:.5g}") for h in run.history] for k in CURVE}


def last_finite(run):
    """What a training whose loss became infinite or NaN is told by: its last finite epoch."""
    curve = curve_of(run)
    return {"diverged": len(run.history)} | {k: curve[k][-1] for k in (*CURVE[:5], "val_exact", "val_cosine") if run.history}
