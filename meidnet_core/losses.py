"""The losses of S2.4 and S2.5 and the curriculum (eq. vi, S1.1). torch only."""

import math

import torch
from torch.nn import functional as F

from .model import gumbel_softmax


def info_nce(y_a, y_b, temperature, known=None):
    """Symmetric InfoNCE (eqs. v, xxii) of paired unit vectors (B, D): mean of both directions, in nats.

    known (B,) bool: the pairs that exist, all by default. The others are neither rows nor negatives; shapes do not depend on how
    many there are, so that a step can be a CUDA graph. Fewer than two pairs: no negatives, 0.
    """
    known = torch.ones_like(y_a[:, 0], dtype=torch.bool) if known is None else known
    logits = y_a @ y_b.T / temperature                            # (B, B) cosine similarity over tau
    surprise = sum(torch.logsumexp(s.masked_fill(~known, -1e9), 1) - s.diagonal() for s in (logits, logits.T))     # (B,)
    return 0.5 * torch.where(known, surprise, torch.zeros_like(surprise)).sum() / known.sum().clamp_min(1)


def contrastive(y_c, ys, temperature):
    """Early fusion: NCE(c, p). Late fusion (S1.2): mean over NCE(c, h), NCE(c, d), NCE(h, d)."""
    views = [(y_c, torch.ones_like(y_c[:, 0], dtype=torch.bool))] + list(ys)
    terms = [info_nce(y_a, y_b, temperature, known_a & known_b)
             for i, (y_a, known_a) in enumerate(views) for y_b, known_b in views[i + 1:]]
    return torch.stack(terms).mean()


def contrastive_weight(epoch, epochs, schedule="exp", ramp=2 / 3):
    """Curriculum factor: rises from 0 to 1 over the first `ramp` of the epochs, then stays at 1.

    exp is eq. (vi), 1 - exp(-gamma t), with gamma such that 99 % is reached at the end of the ramp;
    linear is the warm-up of S1.1; none is 1 throughout. `epoch` may be fractional.
    """
    end = ramp * epochs
    if schedule == "none" or epoch >= end:
        return 1.0
    if schedule == "linear":
        return epoch / end
    return 1.0 - math.exp(-math.log(100.0) * epoch / end)


def reconstruction(out, batch, lattice, cfg):
    """Eq. (xix), term by term: lattice, adjacency, species, coordinates (means, unweighted).

    Coordinates are compared on the torus when targets are standardised (`improved`), as plain
    differences otherwise. Empty sites count for the species ("empty" is a class) and for nothing else.
    """
    mask, pair = batch["mask"], batch["pair"]
    diff = out["frac"] - batch["frac"]
    diff = diff - diff.round() if cfg.normalize else diff
    bce = F.binary_cross_entropy_with_logits(out["adjacency"], batch["adjacency"], reduction="none")
    return {"lattice": F.mse_loss(out["lattice"], lattice),
            "adjacency": (bce * pair).sum() / pair.sum(),
            "species": species_loss(out["species"], batch["species"], cfg),
            "coords": ((diff**2).sum(-1) * mask).sum() / mask.sum()}


def species_loss(logits, species, cfg):
    """CE(S^, S); with `gumbel_noise`, while gradients are recorded, on a Gumbel-softmax sample of the species instead of the logits."""
    if cfg.gumbel_noise and torch.is_grad_enabled():                  # logits.requires_grad is False inside torch.vmap
        soft = gumbel_softmax(logits, cfg.gumbel_tau, hard=False)
        return F.nll_loss(torch.log(soft.clamp_min(1e-9)).flatten(0, 1), species.flatten())
    return F.cross_entropy(logits.flatten(0, 1), species.flatten())


def property_loss(predicted, labels, absolute=False):
    """Masked squared error (eqs. xx, xxi), plus the absolute one: a NaN label adds nothing, to the value or to the gradient."""
    known = ~labels.isnan()
    diff = torch.where(known, predicted - torch.nan_to_num(labels), torch.zeros_like(predicted))
    return (diff**2 + diff.abs() if absolute else diff**2).sum() / known.sum().clamp_min(1)


def misalignment(y_c, ys):
    """1 - cosine of paired embeddings, mean over known pairs and property branches."""
    terms = [((1 - (y_c * y).sum(-1)) * known).sum() / known.sum().clamp_min(1) for y, known in ys]
    return torch.stack(terms).mean()


def total_loss(model, batch, alpha):
    """Eqs. (xxiii), (xxiv) with the contrastive weight alpha * lambda (a number or a tensor). Returns (loss, detached terms)."""
    cfg = model.cfg
    out = model(batch)
    lattice, labels = model.scale(batch)
    terms = reconstruction(out, batch, lattice, cfg)
    props, target = model.exchanged(labels, out["y_c"], out["z_c"]) if cfg.exchange else (out["props"], labels)
    terms["prop"] = property_loss(props, target)
    terms["prop_structure"] = property_loss(out["props_structure"], labels, cfg.prop_l1)
    terms["nce"] = contrastive(out["y_c"], out["ys"], cfg.temperature)
    terms["align"] = misalignment(out["y_c"], out["ys"])
    weights = {"lattice": cfg.w_lattice, "adjacency": cfg.w_adjacency, "species": cfg.w_species, "coords": cfg.w_coords,
               "prop": cfg.w_prop, "prop_structure": cfg.w_prop_structure, "nce": cfg.w_con, "align": cfg.w_align}
    factor = {"nce": alpha, "align": alpha}
    loss = sum(factor.get(k, 1.0) * weights[k] * v for k, v in terms.items() if weights[k])
    return loss, {k: v.detach() for k, v in terms.items()} | {"loss": loss.detach()}
