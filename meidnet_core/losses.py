"""The losses of S2.4 and S2.5 and the curriculum (eq. vi, S1.1). torch only."""

import math

import torch
from torch.nn import functional as F

from .model import gumbel_softmax


def info_nce(y_a, y_b, temperature):
    """Symmetric InfoNCE (eqs. v, xxii) of paired unit vectors (B, D): mean of both directions, in nats."""
    if len(y_a) < 2:
        return (y_a * 0).sum()                                    # no negatives, nothing to contrast
    logits = y_a @ y_b.T / temperature                            # (B, B) cosine similarity over tau
    target = torch.arange(len(y_a), device=y_a.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def contrastive(y_c, ys, temperature):
    """Early fusion: NCE(c, p). Late fusion (S1.2): mean over NCE(c, h), NCE(c, d), NCE(h, d)."""
    everything = torch.ones(len(y_c), dtype=torch.bool, device=y_c.device)
    views = [(y_c, everything)] + list(ys)
    terms = []
    for i, (y_a, known_a) in enumerate(views):
        for y_b, known_b in views[i + 1:]:
            both = known_a & known_b
            terms.append(info_nce(y_a[both], y_b[both], temperature))
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
    """CE(S^, S); with `gumbel_noise` on a Gumbel-softmax sample of the species instead of the clean logits."""
    if cfg.gumbel_noise and logits.requires_grad:
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
    """Eqs. (xxiii), (xxiv) with the contrastive weight alpha * lambda. Returns (loss, dict of detached terms)."""
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
               "prop": cfg.w_prop, "prop_structure": cfg.w_prop_structure, "nce": alpha * cfg.w_con,
               "align": alpha * cfg.w_align}
    loss = sum(weights[k] * v for k, v in terms.items() if weights[k])
    return loss, {k: v.detach() for k, v in terms.items()} | {"loss": loss.detach()}
