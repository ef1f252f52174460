"""A SMALL STAND-IN for CDVAE (Xie et al., ICLR 2022), not CDVAE: the same idea, minutes instead of days of training.

    python -m meidnet_core.cdvae --dataset perov_5 --epochs 40

Kept: an invariant encoder to a variational latent z; number of atoms, composition and lattice predicted from z; coordinates
from annealed Langevin dynamics with an equivariant score network conditioned on z, trained by denoising score matching on
minimum-image vectors; reconstruction from z alone. Different: EGNN instead of DimeNet++ and GemNet, 40 epochs instead of
3,000, 20 noise levels of 5 steps instead of 50 of 100, elements fixed by the predicted composition instead of denoised.
Its match rate says what this sketch reaches and nothing about CDVAE: no claim of the table of claims is written.
"""

import argparse
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from . import checkpoint, crystal, data, matching, results
from .config import IMPROVED
from .egnn import EGNN, gaussians, mlp
from .ftcp import RUNS, evaluate
from .model import CrystalEncoder, Shape
from .train import bar


@dataclass(frozen=True)
class Settings:
    """Everything that defines a run; stored with its result. `cells` concerns the scoring alone, the rest the training."""

    dataset: str = "perov_5"
    seed: int = 0
    epochs: int = 40
    latent: int = 128
    width: int = 64                # node features
    edge_width: int = 48           # messages
    blocks: int = 3                # EGNN blocks of the encoder, and of the score network
    rbf: int = 24                  # Gaussians on the minimum-image distance
    levels: int = 20               # noise levels, geometric from sigma_max to sigma_min (angstrom)
    sigma_max: float = 2.0
    sigma_min: float = 0.02
    steps: int = 5                 # Langevin steps per level
    step: float = 0.3              # step size over sigma^2
    w_kl: float = 0.01             # as CDVAE
    w_lattice: float = 10.0        # as CDVAE
    w_coords: float = 1.0
    batch: int = 128
    lr: float = 2e-3
    cells: int = 1000              # test cells that are scored (Langevin dynamics is slow)

    def training(self):
        """{setting: value} of what the training depends on."""
        return {k: v for k, v in asdict(self).items() if k != "cells"}

    def sigmas(self):
        """(levels,) angstrom, falling."""
        return torch.logspace(np.log10(self.sigma_max), np.log10(self.sigma_min), self.levels)


# ---- model -------------------------------------------------------------------------------------

class ScoreNetwork(nn.Module):
    """Way back of every coordinate from the noise in units of sigma (score times sigma), mean zero over the cell; E(3)-equivariant."""

    def __init__(self, cfg, elements):
        super().__init__()
        self.rbf = cfg.rbf
        self.embed = nn.Embedding(elements + 1, cfg.width)
        self.condition = mlp(cfg.latent + 1, cfg.width, cfg.width)
        self.egnn = EGNN(cfg.blocks, cfg.width, edge_width=cfg.edge_width, edge_attributes=cfg.rbf + 1, residual=True, length=4.0)

    def forward(self, frac, cell, species, mask, z, sigma):
        """frac (B, N, 3), cell (B, 3, 3), species and mask (B, N), z (B, L), sigma (B,) angstrom -> (B, N, 3) Cartesian."""
        d, r = crystal.minimum_image(frac, cell)
        pair = mask[:, :, None] * mask[:, None] * (1 - torch.eye(frac.shape[1]))
        level = sigma.log()[:, None]
        h = self.embed(species) + self.condition(torch.cat([z, level], 1))[:, None]
        a = torch.cat([gaussians(d, self.rbf, 0.0, 6.0), level[:, None, None].expand(*d.shape, 1)], -1)
        total = torch.zeros_like(frac)
        for layer in self.egnn.layers:                                 # distances stay those of the noisy cell
            h, shift = layer(h, r, a, pair)
            total = total + shift
        return centred(total, mask)


def centred(v, mask):
    """(B, N, 3) minus its mean over real sites; zero on empty ones. The origin of a cell carries no information."""
    mask = mask[..., None]
    return (v - (v * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)) * mask


class CDVAESmall(nn.Module):
    """Encoder -> (mean, log variance); z -> number of atoms, composition, lattice; score network for the coordinates."""

    def __init__(self, cfg, shape):
        super().__init__()
        self.cfg, self.shape, count = cfg, shape, len(shape.elements)
        same = {k: getattr(cfg, k) for k in ("width", "edge_width", "blocks", "rbf")}
        encoder = IMPROVED.with_(latent=2 * cfg.latent, dropout=0.0, **same)
        self.encoder = CrystalEncoder(encoder, shape)
        self.number, self.composition = mlp(cfg.latent, 128, shape.sites), mlp(cfg.latent, 256, count)
        self.lattice = mlp(cfg.latent, 128, 6)
        self.score = ScoreNetwork(cfg, count)
        for key in ("lattice_mean", "lattice_std"):
            self.register_buffer(key, torch.tensor(getattr(shape, key), dtype=torch.float32))

    def encode(self, batch):
        """(mean, log variance) of z, (B, L) each."""
        lattice = (per_atom(batch["lattice"], batch["mask"].sum(1)) - self.lattice_mean) / self.lattice_std
        geometry = data.geometry(batch["lattice"], batch["frac"], batch["mask"])
        mean, log_var = self.encoder(batch | geometry, lattice).chunk(2, 1)
        return mean, log_var.clamp(-10, 10)

    def loss(self, batch):
        """(loss, terms): KL, number, composition (cross-entropy of the fractions), lattice, denoising score matching."""
        mean, log_var = self.encode(batch)
        z = mean + torch.exp(log_var / 2) * torch.randn_like(mean)
        n = batch["mask"].sum(1)                                                            # (B,) atoms
        fraction = F.one_hot(batch["species"], len(self.shape.elements) + 1)[..., :-1].sum(1) / n[:, None]
        lattice = (per_atom(batch["lattice"], n) - self.lattice_mean) / self.lattice_std
        terms = {"kl": -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1).mean(),
                 "number": F.cross_entropy(self.number(z), n.long() - 1), "composition": F.cross_entropy(self.composition(z), fraction),
                 "lattice": F.mse_loss(self.lattice(z), lattice), "coords": self.denoising(batch, z)}
        weights = {"kl": self.cfg.w_kl, "lattice": self.cfg.w_lattice, "coords": self.cfg.w_coords}
        loss = sum(weights.get(k, 1.0) * v for k, v in terms.items())
        return loss, {"loss": loss.item()} | {k: v.item() for k, v in terms.items()}

    def denoising(self, batch, z):
        """Mean squared error of the predicted way back, sites moved by a random level of Gaussian noise and wrapped."""
        cell, mask = crystal.lattice_matrix(batch["lattice"]), batch["mask"]
        sigma = self.cfg.sigmas()[torch.randint(self.cfg.levels, (len(z),))]                # (B,)
        noise = torch.randn_like(batch["frac"]) * sigma[:, None, None]
        noisy = batch["frac"] + noise @ torch.linalg.inv(cell)
        back = batch["frac"] - noisy                                                        # the way home, nearest image
        target = centred((back - back.round()) @ cell / sigma[:, None, None], mask)
        error = (self.score(noisy, cell, batch["species"], mask, z, sigma) - target) ** 2
        return error.sum() / mask.sum() / 3

    @torch.no_grad()
    def decode(self, z):
        """Latents (B, L) -> list of cells. Number, composition and lattice are the most likely, coordinates are sampled."""
        n = self.number(z).argmax(1) + 1
        species = whole_counts(torch.softmax(self.composition(z), 1), n)                    # (B, N)
        mask = (species < len(self.shape.elements)).float()
        lattice = self.lattice(z) * self.lattice_std + self.lattice_mean
        lattice = torch.cat([lattice[:, :3].clamp_min(0.5) * n[:, None] ** (1 / 3), lattice[:, 3:].clamp(30, 150)], 1)
        frac = self.langevin(crystal.lattice_matrix(lattice), species, mask, z)
        return matching.decoded_cells({"lattice": lattice, "species": species, "frac": frac}, self.shape.elements)

    @torch.no_grad()
    def langevin(self, cell, species, mask, z):
        """Annealed Langevin dynamics from uniform coordinates (Song & Ermon 2019), last step without noise. -> frac (B, N, 3)."""
        frac, to_frac = torch.rand(*mask.shape, 3), torch.linalg.pinv(cell)                 # one impossible cell must not stop all
        for sigma in self.cfg.sigmas():
            for _ in range(self.cfg.steps):
                noise = torch.randn_like(frac) * (2 * self.cfg.step) ** 0.5
                eps = self.score(frac, cell, species, mask, z, sigma.expand(len(z)))
                frac = (frac + sigma * (self.cfg.step * eps + noise) @ to_frac) % 1.0
        return frac + sigma * self.score(frac, cell, species, mask, z, sigma.expand(len(z))) @ to_frac


def per_atom(lattice, n):
    """(B, 6) with lengths over the cube root of the number of atoms (B,)."""
    return torch.cat([lattice[:, :3] / n[:, None] ** (1 / 3), lattice[:, 3:]], 1)


def whole_counts(fraction, n):
    """Fractions (B, E) and numbers of atoms (B,) -> species (B, max n), E: empty. Largest remainders get the atoms left over."""
    want = fraction * n[:, None]
    counts = want.floor()
    order = (want - counts).argsort(1, descending=True).argsort(1)
    counts = (counts + (order < (n - counts.sum(1)).long()[:, None])).long()
    rows = [torch.repeat_interleave(torch.arange(fraction.shape[1]), c) for c in counts]
    return torch.stack([F.pad(r, (0, int(n.max()) - len(r)), value=fraction.shape[1]) for r in rows])


# ---- training and evaluation -------------------------------------------------------------------

def to_tensors(crystals, elements, sites):
    """species (M, N), mask (M, N), frac (M, N, 3), lattice (M, 6)."""
    species = torch.from_numpy(data.encode_species(crystals, elements, sites))
    frac = np.pad(crystals.frac, ((0, 0), (0, sites - crystals.frac.shape[1]), (0, 0)))
    return {"species": species, "mask": (species < len(elements)).float(), "frac": torch.from_numpy(frac).float(),
            "lattice": torch.from_numpy(crystals.lattice).float()}


def trimmed(tensors, rows):
    """The rows of a batch, cut to the sites that its largest cell needs."""
    n = int(tensors["mask"][rows].sum(1).max())
    return {k: t[rows] if k == "lattice" else t[rows, :n] for k, t in tensors.items()}


def batches(mask, size):
    """Index tensors of one epoch: random, but cells of a batch have about the same number of atoms (pairs cost N^2)."""
    order = torch.randperm(len(mask))
    order = order[mask[order].sum(1).argsort(stable=True)]
    parts = order.split(size)
    return [parts[k] for k in torch.randperm(len(parts))]


def prepare(cfg):
    """(shape, tensors by split, crystals by split)."""
    crystals = {s: data.load(cfg.dataset, s) for s in data.SPLITS}
    elements = data.vocabulary(*crystals.values())
    sites = max(c.numbers.shape[1] for c in crystals.values())
    tensors = {s: to_tensors(c, elements, sites) for s, c in crystals.items()}
    return shape_of(tensors["train"], elements), tensors, crystals


def shape_of(tensors, elements):
    """Shape with the statistics of the lattice per atom."""
    scaled = per_atom(tensors["lattice"], tensors["mask"].sum(1))
    std = scaled.std(0)
    std = torch.where(std > 1e-3, std, torch.ones_like(std))                                # fixed angles: no scale
    sites = tensors["species"].shape[1]
    return Shape(sites, tuple(elements), True, lattice_mean=tuple(scaled.mean(0).tolist()), lattice_std=tuple(std.tolist()))


def train(cfg, shape, tensors, minutes=None, path=None, every=2, progress=True):
    """(model, history, seconds). Goes on from `path` when that file exists; ends after cfg.epochs or `minutes` of training.

    AdamW, learning rate on a cosine with 5 % warm-up. With `minutes` the cosine follows the time used where that is further.
    """
    torch.manual_seed(cfg.seed)
    model = CDVAESmall(cfg, shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.01)
    history, seconds = [], 0.0
    if path and os.path.exists(path):
        history, seconds = checkpoint.load_progress(path, cfg.training(), model, optimizer)
    first = len(history)
    for epoch in bar(range(first, cfg.epochs), argparse.Namespace(name="cdvae-small", seed=cfg.seed, epochs=cfg.epochs), first, progress):
        start, used = time.perf_counter(), seconds / (60 * minutes) if minutes else 0.0
        if used >= 1:
            break
        record = train_epoch(model, optimizer, tensors, cfg, epoch, used)
        seconds += time.perf_counter() - start
        history.append({"epoch": epoch, "seconds": seconds} | record)
        if not np.isfinite(record["loss"]):
            raise ValueError(f"loss became {record['loss']} in epoch {epoch} (seed {cfg.seed}); lower lr = {cfg.lr}")
        if path and (epoch + 1) % every == 0:
            checkpoint.save_progress(path, cfg.training(), model, optimizer, history, seconds)
    if path and len(history) > first:
        checkpoint.save_progress(path, cfg.training(), model, optimizer, history, seconds)
    return model.eval(), history, seconds


def train_epoch(model, optimizer, tensors, cfg, epoch, used=0.0):
    """One pass; mean loss terms. used: fraction of the time that is spent."""
    torch.manual_seed(cfg.seed * 1_000_003 + epoch)
    index, sums = batches(tensors["mask"], cfg.batch), {}
    model.train()
    for k, rows in enumerate(index):
        progress = max((epoch + k / len(index)) / cfg.epochs, used)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(progress / 0.05 + 0.05, 1.0) * (0.5 * (1 + np.cos(np.pi * min(progress, 1))) + 1e-3)
        loss, terms = model.loss(trimmed(tensors, rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sums = {key: sums.get(key, 0) + v / len(index) for key, v in terms.items()}
    return sums


@torch.no_grad()
def reconstruct(model, tensors, seed=0, block=128):
    """Every cell through the mean of z and back: list of cells, in the order of the tensors."""
    from tqdm.auto import tqdm
    torch.manual_seed(seed)
    cells = [None] * len(tensors["mask"])
    for rows in tqdm(batches(tensors["mask"], block), desc="Langevin", mininterval=1):
        for i, cell in zip(rows.tolist(), model.decode(model.encode(trimmed(tensors, rows))[0])):
            cells[i] = cell
    return cells


def run(cfg, minutes=None, split="test", processes=None):
    """Train, score cfg.cells random cells of a held-out split; the run file is written for `test` only. Returns the metrics."""
    shape, tensors, crystals = prepare(cfg)
    state = RUNS / f"cdvae-small-{cfg.dataset}-{cfg.epochs}-seed{cfg.seed}.safetensors"
    model, history, seconds = train(cfg, shape, tensors["train"], minutes, state)
    rows = np.sort(np.random.default_rng(cfg.seed).permutation(len(crystals[split]))[:cfg.cells])
    few = {k: t[rows] for k, t in tensors[split].items()}
    m = evaluate(reconstruct(model, few, cfg.seed), matching.true_cells(crystals[split].select(rows)), processes)
    m |= {"seconds_per_epoch": seconds / len(history)} | {f"train_{k}": history[-1][k] for k in ("coords", "composition", "lattice", "kl")}
    if split == "test":
        config = asdict(cfg) | {"epochs": len(history), "train_cells": len(tensors["train"]["mask"]), "stand_in_for": "CDVAE, 3000 epochs"}
        short = "" if cfg.epochs == Settings.epochs else cfg.epochs          # another length by request: a run of its own
        results.write_run(f"{cfg.dataset}-cdvae-small{short}", f"seed{cfg.seed}", config=config, seed=cfg.seed, data_set=cfg.dataset,
                          split=split, n=len(rows), metrics=m, claims={}, wall_time_s=seconds)
    return m


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="perov_5", choices=list(data.LABELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--minutes", type=float, help="stop the training after that long; the epochs reached are recorded")
    parser.add_argument("--cells", type=int, default=1000, help="how many cells are scored")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="val: to choose settings, nothing is written")
    parser.add_argument("--processes", type=int, help="for structure matching")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cfg = Settings(args.dataset, args.seed, args.epochs, cells=args.cells)
    for key, value in run(cfg, args.minutes, args.split, args.processes).items():
        print(f"{key:24s} {value:.5g}")


if __name__ == "__main__":
    main()
