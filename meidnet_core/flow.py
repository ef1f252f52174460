"""Cells of any size: a crystal becomes one 128-d latent, and the latent becomes a set of atoms again.

Sorted rows fail beyond a few atoms: equal atoms have no order and a cell has no origin. Here the decoder
reads composition and lattice from z, and a flow on the torus (Lipman et al. 2023; periodic differences as in
DiffCSP, Jiao et al. 2023), conditioned on z, carries random points to the sites. Start points are assigned to
sites by the Hungarian algorithm per element, so no order is taught; only differences of coordinates enter and
a common shift of all sites is projected out, so no origin is. torch and numpy (scipy for the assignment).
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .crystal import lattice_matrix
from .egnn import mlp


@dataclass(frozen=True)
class FlowConfig:
    """All settings of a set autoencoder and its training."""

    name: str = "flow"
    dataset: str = "mp_20"
    latent: int = 128
    width: int = 128
    edge_width: int = 48
    blocks: int = 3
    rbf: int = 16                          # Gaussians up to `cutoff`, summed over periodic images
    cutoff: float = 6.0                    # angstrom
    fourier: int = 4                       # harmonics of fractional differences
    heads: int = 8                         # weighted means over sites in the encoder
    latent_noise: float = 0.1              # on components of order 1, training only
    swap: float = 0.0                      # augmentation: fraction of cells whose elements are exchanged for random ones
    strain: float = 0.0                    # augmentation: relative strain of lengths (angles: 60 degrees times it)
    shake: float = 0.0                     # augmentation: displacements in angstrom
    w_composition: float = 0.3             # cross-entropy of the counts, summed over elements
    w_lattice: float = 1.0
    w_flow: float = 4.0
    draws: int = 1                         # noise levels per crystal and step: one encoding serves several
    pairs: int = 6400                      # batch size: about this many pairs of sites
    schedule: str = "onecycle"
    lr: float = 2e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    optimizer: str = "adamw"
    epochs: int = 40
    seed: int = 0

    def with_(self, **changes):
        return replace(self, **changes)

    def to_dict(self):
        return asdict(self)


def image_sums(frac, cell, count, cutoff):
    """Gaussians of the distance, summed over 27 periodic images: (B, N, 3), (B, 3, 3) -> (B, N, N, count).

    The diagonal holds an atom's distances to its own images: a cell of one atom is seen too. A smooth
    envelope ends at the cutoff. In a Niggli cell 27 images hold every neighbour nearer than half a cell.
    """
    images = torch.cartesian_prod(*[torch.arange(-1.0, 2.0, device=frac.device)] * 3)        # (27, 3)
    diff = frac[:, :, None] - frac[:, None]
    r = ((diff - diff.round())[:, :, :, None] + images) @ cell[:, None, None]                # (B, N, N, 27, 3)
    d = (r**2).sum(-1).clamp_min(1e-8).sqrt()
    envelope = 0.5 * (torch.cos(d.clamp_max(cutoff) * (np.pi / cutoff)) + 1) * (d > 0.01)
    centres = torch.linspace(0.8, cutoff, count, device=frac.device)
    return (torch.exp(-0.5 * ((d[..., None] - centres) * (count / cutoff)) ** 2) * envelope[..., None]).sum(-2)


def harmonics(frac, count):
    """sin and cos of 2 pi k (f_i - f_j), k = 1..count: (B, N, 3) -> (B, N, N, 6 count)."""
    angle = 2 * np.pi * frac
    diff = angle[:, :, None] - angle[:, None]
    parts = [f(k * diff) for k in range(1, count + 1) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, -1)


class Messages(nn.Module):
    """Message passing between all pairs of sites: h' = h + phi_h(h, mean_j phi_e(h_i, h_j, a_ij)), eqs. (viii)-(x)."""

    def __init__(self, width, edge_width, attributes):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.receiver, self.sender = nn.Linear(width, edge_width), nn.Linear(width, edge_width, bias=False)
        self.edge = nn.Linear(attributes, edge_width, bias=False)
        self.message = nn.Sequential(nn.SiLU(), nn.Linear(edge_width, edge_width), nn.SiLU())
        self.phi_h = mlp(width + edge_width, width, width)

    def forward(self, h, a):
        x = self.norm(h)
        m = self.message(self.receiver(x)[:, :, None] + self.sender(x)[:, None] + self.edge(a))   # (B, N, N, E)
        return h + self.phi_h(torch.cat([x, m.mean(2)], -1))


def lattice_features(lattice):
    """(B, 6) angstrom, degrees -> (B, 6): logarithms of the lengths, angles from 90 degrees in units of 20."""
    return torch.cat([lattice[:, :3].log(), (lattice[:, 3:] - 90) / 20], -1)


def lattice_from(features):
    """Inverse of lattice_features; angles kept between 30 and 150 degrees."""
    return torch.cat([features[:, :3].exp(), (features[:, 3:] * 20 + 90).clamp(30, 150)], -1)


class SetEncoder(nn.Module):
    """(species (B, N), frac (B, N, 3), lattice (B, 6)) -> z (B, 128), components of order 1.

    Invariant to the order of sites, to the origin and to rotations; the cell is the Niggli cell.
    """

    def __init__(self, cfg, shape):
        super().__init__()
        self.cfg, elements = cfg, len(shape.elements)
        self.embed = nn.Embedding(elements, cfg.width)
        self.blocks = nn.ModuleList(Messages(cfg.width, cfg.edge_width, cfg.rbf + 6 * cfg.fourier) for _ in range(cfg.blocks))
        self.neighbours = nn.Linear(cfg.rbf, cfg.width)
        for key in ("rdf_mean", "rdf_std"):
            self.register_buffer(key, torch.tensor(getattr(shape, key)).expand(cfg.rbf).clone())
        self.norm = nn.LayerNorm(cfg.width)
        self.score, self.value = nn.Linear(cfg.width, cfg.heads), nn.Linear(cfg.width, cfg.width // 2)
        self.cell = mlp(6, cfg.width, cfg.width)
        self.counts = nn.Linear(2 * elements + 33, cfg.latent)         # composition has a path of its own
        self.out = mlp(cfg.heads * (cfg.width // 2) + cfg.width, 3 * cfg.width, cfg.latent)

    def forward(self, species, frac, lattice, images=None):
        """`images`: image_sums computed before, for cells that do not change while training."""
        cfg = self.cfg
        images = image_sums(frac, lattice_matrix(lattice), cfg.rbf, cfg.cutoff) if images is None else images.float()
        a = torch.cat([images, harmonics(frac, cfg.fourier)], -1)
        cell = self.cell(lattice_features(lattice))
        rdf = (images.sum(2) - self.rdf_mean) / self.rdf_std                                  # (B, N, rbf), spread of order 1
        h = self.embed(species) + cell[:, None] + 2 * self.neighbours(rdf)
        for block in self.blocks:
            h = block(h, a)
        h = self.norm(h)
        weight = torch.softmax(self.score(h), 1)                                              # (B, N, heads)
        pooled = torch.einsum("bnk,bnv->bkv", weight, self.value(h)).flatten(1)
        z, size = self.out(torch.cat([pooled, cell], -1)), (self.cfg.latent,)
        return (F.layer_norm(z, size) + F.layer_norm(self.counts(self.composition(species)), size)) / 2**0.5

    def composition(self, species):
        """(B, N) -> (B, 2 S + 33): fractions and logarithmic counts of the elements, number of sites (up to 32)."""
        counts = F.one_hot(species, self.embed.num_embeddings).sum(1)                         # (B, S)
        total = counts.sum(1, keepdim=True)
        return torch.cat([4 * counts / total, torch.log1p(counts), F.one_hot(total[:, 0].clamp_max(32), 33)], -1)


class Velocity(nn.Module):
    """Velocity field of the flow: (z, species, x_t, t) -> (B, N, 3) fractional per unit time, without common shift."""

    def __init__(self, cfg, elements):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(elements, cfg.width)
        self.condition = mlp(cfg.latent + 8, 2 * cfg.width, cfg.width)
        self.blocks = nn.ModuleList(Messages(cfg.width, cfg.edge_width, 6 * cfg.fourier) for _ in range(cfg.blocks))
        self.gates = nn.ModuleList(nn.Linear(cfg.width, cfg.width) for _ in range(cfg.blocks))
        self.out = nn.Sequential(nn.LayerNorm(cfg.width), nn.Linear(cfg.width, 3))

    def forward(self, z, species, frac, t):
        waves = torch.arange(1, 5, device=t.device) * np.pi * t[:, None]
        c = self.condition(torch.cat([z, torch.sin(waves), torch.cos(waves)], -1))
        h, a = self.embed(species), harmonics(frac, self.cfg.fourier)
        for block, gate in zip(self.blocks, self.gates):
            h = block(h + gate(c)[:, None], a)
        v = self.out(h)
        return v - v.mean(1, keepdim=True)


@dataclass
class SetShape:
    """What the data fix: species classes, the largest count of one element, statistics of lattice_features."""

    elements: tuple
    max_count: int
    lattice_mean: tuple = (0.0,) * 6
    lattice_std: tuple = (1.0,) * 6
    rdf_mean: tuple = (0.0,)                # of the radial distribution around a site; without them geometry
    rdf_std: tuple = (1.0,)                 # moves an untrained encoder 500 times less than composition does


class SetAutoencoder(nn.Module):
    """Encoder, and a decoder that sees nothing but z: counts of every element, lattice, flow."""

    def __init__(self, cfg, shape):
        super().__init__()
        self.cfg, self.shape, self.elements = cfg, shape, tuple(shape.elements)
        count = len(self.elements)
        self.encoder, self.velocity = SetEncoder(cfg, shape), Velocity(cfg, count)
        self.counts = mlp(cfg.latent, 4 * cfg.width, count * (shape.max_count + 1))
        self.lattice = mlp(cfg.latent, 3 * cfg.width, 6)
        self.register_buffer("lattice_mean", torch.tensor(shape.lattice_mean))
        self.register_buffer("lattice_std", torch.tensor(shape.lattice_std))

    def count_logits(self, z):
        """(B, 128) -> (B, S, max_count + 1)."""
        return self.counts(z).view(len(z), len(self.elements), -1)

    def decode_lattice(self, z):
        """(B, 128) -> (B, 6) angstrom, degrees."""
        return lattice_from(self.lattice(z) * self.lattice_std + self.lattice_mean)

    def decode_counts(self, z):
        """(B, 128) -> counts (B, S) and confidence (B,): probability of the most likely counts of all elements."""
        p = torch.softmax(self.count_logits(z), -1).max(-1)
        return p.indices, p.values.prod(-1)


def assign(start, frac, species, rounds=2):
    """Order of the start points, element by element, that shortens the way to the sites. numpy (B, N, 3), (B, N).

    Hungarian algorithm on squared torus distances; after each round the mean shift is removed and the
    assignment made again, because the origin is free. Returns the start points in the order of the sites.
    """
    from scipy.optimize import linear_sum_assignment
    start = start.copy()
    other = 1e3 * (species[:, :, None] != species[:, None])                                   # (B, N, N)
    shift = np.zeros((len(start), 1, 3))
    for _ in range(rounds):
        diff = frac[:, :, None] - start[:, None] - shift[:, :, None]
        cost = ((diff - np.round(diff)) ** 2).sum(-1) + other
        start = np.stack([s[linear_sum_assignment(c)[1]] for s, c in zip(start, cost)])
        way = frac - start - shift
        shift = shift + (way - np.round(way)).mean(1, keepdims=True)
    return start


def augment(batch, cfg, elements):
    """Strained, shaken, inverted or transmuted copies: every structure is a valid target of an autoencoder.

    Exchanged elements matter most: with the compositions of the training set alone the decoder of the counts
    learns them by heart (lab notes).
    """
    frac, lattice, species = batch["frac"], batch["lattice"], batch["species"]
    if cfg.swap:
        other = torch.rand(len(species), elements, device=species.device).argsort(1).gather(1, species)
        species = torch.where(torch.rand(len(species), 1, device=species.device) < cfg.swap, other, species)
    sign = torch.where(torch.rand(len(frac), 1, 1, device=frac.device) < 0.5, -1.0, 1.0)
    frac = frac * sign
    if cfg.strain:
        noise = cfg.strain * torch.randn_like(lattice) * torch.rand(len(lattice), 1, device=lattice.device)
        lattice = torch.cat([lattice[:, :3] * (1 + noise[:, :3]), lattice[:, 3:] + 60 * noise[:, 3:]], -1)
    if cfg.shake:
        size = cfg.shake * torch.rand(len(lattice), 1, 1, device=lattice.device)
        frac = frac + size * torch.randn_like(frac) / lattice[:, None, :3]
    return {**batch, "frac": frac, "lattice": lattice, "species": species}


def flow_loss(model, z, batch):
    """Squared error of the velocity in units of (V/N)^(1/3), mean over sites: conditional flow matching on the torus."""
    frac, species = batch["frac"], batch["species"]
    start = assign(torch.rand(frac.shape).numpy(), frac.cpu().numpy(), species.cpu().numpy())
    start = torch.from_numpy(start).to(frac)
    way = frac - start
    way = way - way.round()
    t = torch.rand(len(frac), device=frac.device)
    v = model.velocity(z, species, start + t[:, None, None] * way, t)
    cell = lattice_matrix(batch["lattice"])
    scale = (torch.linalg.det(cell).abs() / frac.shape[1]) ** (1 / 3)
    error = (v - (way - way.mean(1, keepdim=True))) @ cell / scale[:, None, None]
    return (error**2).sum(-1).mean()


def set_loss(model, batch):
    """(loss, dict of detached terms) of one batch of cells with equal N: species (B, N), frac (B, N, 3), lattice (B, 6)."""
    cfg, batch = model.cfg, augment(batch, model.cfg, len(model.elements))
    z = model.encoder(batch["species"], batch["frac"], batch["lattice"], batch.get("images"))
    z = z + cfg.latent_noise * torch.randn_like(z)
    counts = F.one_hot(batch["species"], len(model.elements)).sum(1)
    target = (lattice_features(batch["lattice"]) - model.lattice_mean) / model.lattice_std
    terms = {"composition": F.cross_entropy(model.count_logits(z).flatten(0, 1), counts.flatten()) * len(model.elements),
             "lattice": F.mse_loss(model.lattice(z), target),
             "flow": torch.stack([flow_loss(model, z, batch) for _ in range(cfg.draws)]).mean()}
    loss = cfg.w_composition * terms["composition"] + cfg.w_lattice * terms["lattice"] + cfg.w_flow * terms["flow"]
    return loss, {k: v.detach() for k, v in terms.items()} | {"loss": loss.detach()}


@torch.no_grad()
def sample(model, z, species, lattice, steps=20, generator=None):
    """Flow from random points to sites: z (B, 128), species (B, N), lattice (B, 6) -> frac (B, N, 3)."""
    x = torch.rand(*species.shape, 3, device=z.device, generator=generator)
    for k in range(steps):
        t = torch.full((len(z),), k / steps, device=z.device)
        x = x + model.velocity(z, species, x, t) / steps
    return x % 1.0


@torch.no_grad()
def residual(model, z, species, frac, lattice, images=None):
    """|E(x) - z| (B,): how far the encoding of a decoded cell is from the latent it was decoded from."""
    return (model.encoder(species, frac, lattice, images) - z).norm(dim=-1)


def refine(model, z, species, frac, lattice, steps=30, lr=0.01):
    """Move sites and lattice by Adam until the cell's own encoding equals the latent. Returns (frac, lattice, residual (B,)).

    Every cell keeps the best point on its way: refinement never ends with a larger residual than it began with.
    """
    scale = torch.tensor([1.0, 1, 1, 20, 20, 20], device=z.device) * 0.5
    x, u = frac.clone().requires_grad_(True), torch.zeros_like(lattice).requires_grad_(True)
    optimizer = torch.optim.Adam([x, u], lr=lr)
    best = [frac.clone(), lattice.clone(), residual(model, z, species, frac, lattice)]
    for k in range(steps + 1):
        cell = lattice + u * scale
        r = (model.encoder(species, x, cell) - z).norm(dim=-1)
        better = r.detach() < best[2]
        for kept, now in zip(best, (x, cell, r)):
            kept[better] = now.detach()[better]
        if k < steps:
            optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
            optimizer.zero_grad()
            r.square().sum().backward()
            optimizer.step()
    return best
