"""MEIDNet: crystal autoencoder, property autoencoder, one aligned latent (S2.2, S2.3). torch and numpy only."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .egnn import EGNN, gaussians, mlp


@dataclass
class Shape:
    """What the data fix: sites per cell, elements, whether cells differ in size, statistics for scaling."""

    sites: int                              # N, padded
    elements: tuple                         # vocabulary, index -> symbol
    padded: bool                            # some cells have fewer than N sites: one more class, "empty"
    lattice_mean: tuple = (0.0,) * 6
    lattice_std: tuple = (1.0,) * 6
    label_mean: tuple = (0.0, 0.0)
    label_std: tuple = (1.0, 1.0)
    features: tuple = ()                    # descriptors of the elements, one row each (cfg.descriptors)

    @property
    def classes(self):
        return len(self.elements) + int(self.padded)


class ElementTable(nn.Module):
    """A vector per element, (S, H): a map of its descriptors plus a residual that starts at zero.

    An element that training never shows keeps the residual zero and is what its neighbours in the periodic table make of it.
    """

    def __init__(self, cfg, shape):
        super().__init__()
        rows = torch.tensor(shape.features, dtype=torch.float32)
        if rows.dim() != 2 or len(rows) != len(shape.elements):
            raise ValueError(f"descriptors for {len(rows)} elements, the vocabulary has {len(shape.elements)}: see ions.descriptors")
        self.register_buffer("rows", F.pad(rows, (0, 0, 0, shape.classes - len(rows))))
        self.map, self.own = mlp(rows.shape[1], cfg.width, cfg.width), nn.Parameter(torch.zeros(shape.classes, cfg.width))

    def weight(self):
        return self.map(self.rows) + self.own                                               # (S, H)

    def forward(self, species):
        """Indices (B, N), or probabilities (B, N, S), to features (B, N, H)."""
        return species @ self.weight() if species.is_floating_point() else self.weight()[species]


class ElementScores(nn.Module):
    """Logits (B, N, S) from node features: their product with the vectors of an ElementTable."""

    def __init__(self, cfg, shape):
        super().__init__()
        self.query, self.table = mlp(cfg.width, cfg.width, cfg.width), ElementTable(cfg, shape)

    def forward(self, h):
        return self.query(h) @ self.table.weight().T


class CrystalEncoder(nn.Module):
    """f_c: crystal -> z_c in R^128 (eq. iv with a lattice MLP). Invariant to E(3) and to the order of sites."""

    def __init__(self, cfg, shape):
        super().__init__()
        self.cfg = cfg
        attributes = cfg.rbf + 1 if cfg.rbf else 0
        self.embed = ElementTable(cfg, shape) if cfg.descriptors else nn.Embedding(shape.classes, cfg.width)
        self.egnn = EGNN(cfg.blocks, cfg.width, edge_width=cfg.edge_width, edge_attributes=attributes,
                         residual=cfg.residual, length=cfg.cutoff, dropout=cfg.dropout)
        self.lattice = mlp(6, cfg.width, cfg.width)
        if cfg.pool_heads:                                          # which sites a head listens to, and what it hears
            self.score, self.value = nn.Linear(cfg.width, cfg.pool_heads), nn.Linear(cfg.width, cfg.width // 2)
        pooled = cfg.pool_heads * (cfg.width // 2) or cfg.width
        self.out = mlp(pooled + cfg.width, 2 * cfg.width, cfg.latent)

    def pool(self, h, mask):
        """Sites to cell, (B, N, H) -> (B, K): the mean of eq. (iv), or one weighted mean per head."""
        if not self.cfg.pool_heads:
            return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        weight = torch.softmax(self.score(h).masked_fill(mask[..., None] == 0, -1e9), 1)    # (B, N, heads)
        return torch.einsum("bnk,bnv->bkv", weight, self.value(h)).flatten(1)

    def forward(self, batch, lattice):
        h = self.embed(batch["species"])                                                    # (B, N, H)
        pair = batch["pair"]                                                                # (B, N, N) both sites real
        a = None
        if self.cfg.rbf:
            a = torch.cat([gaussians(batch["d"], self.cfg.rbf), batch["adjacency"][..., None]], -1)
        h, _ = self.egnn(h, batch["r"], a, pair if self.cfg.all_pairs else batch["adjacency"])
        return self.out(torch.cat([self.pool(h, batch["mask"]), self.lattice(lattice)], -1))   # (B, 128)


def latent_gain(cfg):
    """Points of the unit sphere have components of 1/sqrt(128): brought to order 1 for the layers that read them."""
    return cfg.latent**0.5 if cfg.residual else 1.0


class CrystalDecoder(nn.Module):
    """d_c: z -> lattice, adjacency logits, species logits, coordinates; nothing else enters.

    Node features start from z and the number of the site, coordinates from learned anchors; fully
    connected EGNN blocks then move the anchors. The frame is the canonical cell of `crystal.py`.
    """

    def __init__(self, cfg, shape):
        super().__init__()
        self.cfg, self.sites = cfg, shape.sites
        self.gain = latent_gain(cfg)
        out = shape.sites * cfg.width if cfg.site_init else cfg.width
        self.start = mlp(cfg.latent, 2 * cfg.width, out) if cfg.site_init else mlp(cfg.latent, cfg.width, out)
        self.query = nn.Parameter(torch.randn(shape.sites, cfg.width) * 0.5)
        self.anchor = nn.Parameter(torch.rand(shape.sites, 3))
        self.egnn = EGNN(cfg.blocks, cfg.width, edge_width=cfg.edge_width, residual=cfg.residual, dropout=cfg.dropout)
        self.species = ElementScores(cfg, shape) if cfg.descriptors else mlp(cfg.width, cfg.width, shape.classes)
        self.left, self.right = nn.Linear(cfg.width, cfg.edge_width), nn.Linear(cfg.width, cfg.edge_width)
        self.adjacency = nn.Linear(cfg.edge_width, 1)
        self.lattice = mlp(cfg.latent, cfg.width, 6)

    def forward(self, z):
        z = z * self.gain
        start = self.start(z)
        h = start.view(len(z), self.sites, -1) if self.cfg.site_init else start[:, None]
        h = h + self.query                                                                  # (B, N, H)
        x = self.anchor.expand(len(z), -1, -1)                                              # (B, N, 3)
        full = (1 - torch.eye(self.sites, device=z.device)).expand(len(z), -1, -1)
        h, shift = self.egnn(h, x[:, :, None] - x[:, None], None, full)
        pair = F.silu(self.left(h)[:, :, None] + self.right(h)[:, None])
        adjacency = self.adjacency(pair + pair.transpose(1, 2)).squeeze(-1)                 # symmetric, eq. (xi)
        return {"lattice": self.lattice(z), "adjacency": adjacency, "species": self.species(h), "frac": x + shift}


def gumbel_softmax(logits, tau=1.0, hard=True):
    """Straight-through Gumbel-softmax (Jang et al. 2017): one-hot forward, soft gradient. (..., S) -> (..., S)."""
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)))
    soft = torch.softmax((logits + noise) / tau, -1)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return one_hot + soft - soft.detach()


class MEIDNet(nn.Module):
    """Bi-modal (one label) or tri-modal (two labels), early or late fusion.

    Early fusion (eqs. xiii-xviii): one encoder for all labels, z = (y_c + y_p) / 2. Late fusion (S1.2):
    an encoder per label, z = mean of all embeddings. Embeddings y are projected to the unit sphere. A
    sample without labels keeps its structural embedding alone: labels are never imputed.
    """

    def __init__(self, cfg, shape):
        super().__init__()
        self.cfg, self.shape = cfg, shape
        widths = [len(cfg.labels) * (1 + cfg.partial)] if cfg.fusion == "early" else [1] * len(cfg.labels)
        self.encoder, self.decoder = CrystalEncoder(cfg, shape), CrystalDecoder(cfg, shape)
        self.prop_encoders = nn.ModuleList(mlp(w, cfg.width, cfg.width, cfg.latent) for w in widths)
        self.project_c = mlp(cfg.latent, cfg.latent, cfg.latent)
        self.project_p = nn.ModuleList(mlp(cfg.latent, cfg.latent, cfg.latent) for _ in widths)
        self.prop_decoder = mlp(cfg.latent, cfg.width, len(cfg.labels), dropout=cfg.dropout)
        self.prop_from_c = mlp(cfg.latent, cfg.width, 1) if self.bimodal else None         # eq. (xvi)
        self.prop_head = mlp(cfg.latent, cfg.width, len(cfg.labels), dropout=cfg.dropout) if cfg.prop_head else None
        keys = ("lattice_mean", "lattice_std", "label_mean", "label_std")
        for key in keys:
            self.register_buffer(key, torch.tensor(getattr(shape, key), dtype=torch.float32))

    @property
    def bimodal(self):
        return len(self.cfg.labels) == 1

    def scale(self, batch):
        """Standardised lattice (B, 6) and labels (B, P) (the raw ones in the `paper` configuration)."""
        return ((batch["lattice"] - self.lattice_mean) / self.lattice_std,
                (batch["labels"] - self.label_mean) / self.label_std)

    def embed_structure(self, batch):
        """(z_c (B, 128), y_c (B, 128) on the unit sphere), eq. (xiii)."""
        z_c = self.encoder(batch, self.scale(batch)[0])
        return z_c, F.normalize(self.project_c(z_c), dim=-1)

    def embed_properties(self, labels):
        """Standardised labels (B, P) -> list of (y (B, 128) on the unit sphere, known (B,) bool).

        With early fusion a sample is known when all its labels are (`partial`: when any is), with late fusion label by label.
        """
        parts = [labels] if self.cfg.fusion == "early" else labels.unbind(-1)
        out = []
        for part, encode, project in zip(parts, self.prop_encoders, self.project_p):
            part = part if part.dim() == 2 else part[:, None]
            have = ~part.isnan()
            known, part = have.any(-1) if self.cfg.partial else have.all(-1), torch.nan_to_num(part)
            part = torch.cat([part, have.to(part.dtype)], -1) if self.cfg.partial else part
            y = F.normalize(project(encode(part)), dim=-1)                                  # masked below, not imputed
            out.append((y, known))
        return out

    @staticmethod
    def join(y_c, ys):
        """Joint latent: mean of the embeddings that exist, eqs. (xiv), (xviii), (iv of S1)."""
        total, count = y_c, torch.ones_like(y_c[:, :1])
        for y, known in ys:
            total, count = total + y * known[:, None], count + known[:, None]
        return total / count

    def perturb(self, z, y_c):
        """Regularisation while training: some samples without their labels, noise of given length on all."""
        if self.cfg.structure_only:
            alone = torch.rand(len(z), 1, device=z.device) < self.cfg.structure_only
            z = torch.where(alone, y_c, z)
        if self.cfg.latent_noise:
            z = z + self.cfg.latent_noise * torch.randn_like(z) / z.shape[1] ** 0.5
        return z

    def blur(self, labels):
        """What the property encoder sees while training: noise on the labels, some of them hidden."""
        if self.cfg.label_noise:
            labels = labels + self.cfg.label_noise * torch.randn_like(labels)
        if self.cfg.label_drop:
            labels = labels.masked_fill(torch.rand_like(labels) < self.cfg.label_drop, torch.nan)
        return labels

    def properties(self, z, z_c=None):
        """Predicted labels in standardised units (B, P): from z (tri-modal, eq. xxi) or z_c (bi-modal, eq. xv)."""
        return self.prop_from_c(z_c) if self.bimodal else self.prop_decoder(z * latent_gain(self.cfg))

    def properties_alone(self, y_c, z_c):
        """Labels predicted from the structure alone (B, P), standardised: from z_c by a head of its own, or from y_c."""
        return self.prop_head(z_c) if self.prop_head is not None else self.properties(y_c, z_c)

    def exchanged(self, labels, y_c, z_c):
        """(predicted, target) of the property decoder when labels and structure disagree (training).

        On unseen cells the two embeddings disagree by the error of the structural one. Labels with noise
        are embedded and are what the decoder must return, so that it learns to read y_p and not y_c.
        """
        noisy = labels + self.cfg.exchange * torch.randn_like(labels)
        return self.properties(self.join(y_c, self.embed_properties(noisy)), z_c), noisy

    def forward(self, batch):
        z_c, y_c = self.embed_structure(batch)
        labels = self.scale(batch)[1]
        if self.training:
            labels = self.blur(labels)
        ys = self.embed_properties(labels)
        z = self.perturb(self.join(y_c, ys), y_c) if self.training else self.join(y_c, ys)
        return {**self.decoder(z), "z": z, "z_c": z_c, "y_c": y_c, "ys": ys,
                "props": self.properties(z, z_c), "props_structure": self.properties_alone(y_c, z_c)}

    @torch.no_grad()
    def decode(self, z, sample=False):
        """Latents (B, 128) -> physical units: lattice (angstrom, degrees), species index, frac, confidence.

        sample=True draws species with the Gumbel-softmax instead of taking the most likely element.
        Confidence (B,) is the lowest top probability over the sites.
        """
        out = self.decoder(z)
        p = torch.softmax(out["species"], -1)
        species = gumbel_softmax(out["species"]).argmax(-1) if sample else p.argmax(-1)
        return {"lattice": out["lattice"] * self.lattice_std + self.lattice_mean, "species": species,
                "frac": out["frac"], "adjacency": torch.sigmoid(out["adjacency"]),
                "confidence": p.max(-1).values.min(-1).values}
