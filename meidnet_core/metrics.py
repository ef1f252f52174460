"""What a trained model is worth on a split: alignment, reconstruction, properties, retrieval.

Every metric of `evaluate` has a trivial baseline or ceiling in `baselines`.
"""

import numpy as np
import torch

from . import matching


@torch.no_grad()
def encode(model, tensors, block=1024):
    """All embeddings and predictions of a split, in blocks: numpy arrays in physical units.

    y_c, z (M, 128), y_p list of (M, 128), known list of (M,), joint and alone: predicted labels (M, P) from
    the joint latent and from the structure alone, labels (M, P).
    """
    parts = []
    for k in range(0, len(tensors["species"]), block):
        batch = {key: t[k:k + block] for key, t in tensors.items()}
        y_c, z_c = model.embed_structure(batch)[::-1]
        ys = model.embed_properties(model.scale(batch)[1])
        z = model.join(y_c, ys)
        unscale = lambda p: p * model.label_std + model.label_mean
        branches = {f"{name}{i}": pair[j] for i, pair in enumerate(ys) for j, name in enumerate(("y_p", "known"))}
        parts.append({"y_c": y_c, "z": z, "labels": batch["labels"], "joint": unscale(model.properties(z, z_c)),
                      "alone": unscale(model.properties_alone(y_c, z_c)), **branches})
    return {key: torch.cat([p[key] for p in parts]).cpu().numpy() for key in parts[0]}


def decode(model, z, elements, sample=False, block=2048):
    """Latents (M, 128) -> (cells, confidence (M,), raw dict of tensors); see matching.decoded_cells."""
    z = torch.as_tensor(z, device=model.lattice_mean.device)
    parts = [model.decode(part, sample) for part in z.split(block)]
    raw = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    return matching.decoded_cells(raw, elements), raw["confidence"].cpu().numpy(), raw


def alignment(y_a, y_b):
    """Mean cosine similarity and L2 distance of paired unit vectors (M, D)."""
    return {"cosine": float((y_a * y_b).sum(1).mean()), "l2d": float(np.linalg.norm(y_a - y_b, axis=1).mean())}


def regression(predicted, labels):
    """MAE and R2 over known labels, (M,) each; NaN when none is known."""
    known = ~np.isnan(labels)
    if not known.any():
        return {"mae": np.nan, "r2": np.nan}
    error, spread = predicted[known] - labels[known], labels[known] - labels[known].mean()
    return {"mae": float(np.abs(error).mean()), "r2": float(1 - (error**2).sum() / max((spread**2).sum(), 1e-12))}


def retrieval(query, pool, labels):
    """Rank of the right partner by cosine similarity, (M, D) unit vectors and (M, P) labels.

    top1 counts the very crystal, top1_label any crystal with the same labels: many crystals share
    theirs, so only the second can be near 1 when properties are the query. Of several equally similar
    crystals, top10 counts the share that fits into the ten: a collapsed embedding scores chance.
    """
    similarity = query @ pool.T
    own = np.diag(similarity)[:, None]
    better, tied = (similarity > own + 1e-6).sum(1), (np.abs(similarity - own) <= 1e-6).sum(1)
    best = similarity.argmax(1)
    return {"top1": float((best == np.arange(len(query))).mean()), "top10": float(np.clip((10 - better) / tied, 0, 1).mean()),
            "top1_label": float((np.abs(labels[best] - labels) < 1e-6).all(1).mean())}


def effective_dimension(y):
    """Participation ratio of the covariance spectrum: how many of the D directions carry variance."""
    values = np.linalg.svd(y - y.mean(0), compute_uv=False) ** 2
    return float(values.sum() ** 2 / (values**2).sum())


def evaluate(model, tensors, crystals, processes=None, sample=False):
    """All metrics of one split. Returns (metrics: flat dict, details: arrays per crystal).

    Match rates are of the joint latent, which holds the true labels; those that end in _alone of the structural embedding by itself.
    """
    cells = matching.true_cells(crystals)
    e = encode(model, tensors)
    predicted, confidence, raw = decode(model, e["z"], model.shape.elements, sample)
    out, rms = matching.score(predicted, cells, processes)
    same = (raw["species"] == tensors["species"]).cpu().numpy()
    real = tensors["mask"].cpu().numpy() > 0
    out |= {"exact_composition": 100 * float((same | ~real).all(1).mean()), "site_accuracy": 100 * float(same[real].mean()),
            "lattice_mae": float(np.abs(raw["lattice"].cpu().numpy() - crystals.lattice)[:, :3].mean()),
            "effective_dimension": effective_dimension(e["y_c"]), "n": len(crystals)}
    alone = matching.score(decode(model, e["y_c"], model.shape.elements, sample)[0], cells, processes)[0]
    out |= _aligned(e) | _properties(e, model.cfg.labels) | {f"{k}_alone": v for k, v in alone.items()}
    return out, e | {"rms_cdvae": rms["cdvae"], "rms_default": rms["default"], "confidence": confidence, "cells": predicted}


def _aligned(e):
    """Alignment (mean over property branches) and retrieval against the first branch, on labelled crystals."""
    branches = [k for k in e if k.startswith("y_p")]
    known = [e[f"known{k[3:]}"] for k in branches]
    pairs = [alignment(e["y_c"][m], e[k][m]) for k, m in zip(branches, known) if m.any()]
    if not pairs:
        return {}
    out = {key: float(np.mean([p[key] for p in pairs])) for key in ("cosine", "l2d")}
    m, y_p = known[0], e[branches[0]]
    for name, a, b in (("structure_to_property", e["y_c"], y_p), ("property_to_structure", y_p, e["y_c"])):
        out |= {f"{name}_{k}": v for k, v in retrieval(a[m], b[m], e["labels"][m]).items()}
    return out


def _properties(e, labels):
    return {f"{label}_{source}_{k}": v for source in ("joint", "alone") for i, label in enumerate(labels)
            for k, v in regression(e[source][:, i], e["labels"][:, i]).items()}


def baselines(crystals, train, n=800, seed=0, processes=None):
    """Trivial predictors and ceilings on the same split (facts every reader needs beside a metric).

    Match rates of the trivial structures on n random cells (all cells with n=None), MAE of the mean
    of the training labels, retrieval ceiling when equal labels cannot be told apart, chance.
    """
    pick = np.random.default_rng(seed).permutation(len(crystals))[:n]
    few, out = crystals.select(np.sort(pick)), {}
    if few.numbers.shape[1] == 5:
        mean_cell, true = train.lattice.mean(0), matching.true_cells(few)
        for kind in ("prototype", "swapped", "wrong_element", "random_coords"):
            cells = matching.trivial(few, kind, seed, mean_cell if kind == "prototype" else None)
            out |= {f"{kind}_{k}": v for k, v in matching.score(cells, true, processes)[0].items()}
    out["mean_lattice_mae"] = float(np.abs(crystals.lattice[:, :3] - train.lattice[:, :3].mean(0)).mean())
    for i, label in enumerate(crystals.label_names):
        for name, guess in (("mean", np.nanmean), ("median", np.nanmedian)):       # the median is the best constant for the error
            constant = np.full(len(crystals), guess(train.labels[:, i]))
            out[f"{label}_{name}_mae"] = regression(constant, crystals.labels[:, i])["mae"]
    return out | retrieval_bounds(crystals.labels)


def retrieval_bounds(labels):
    """What retrieval among crystals with these labels (N, P) can reach and what chance does: labels repeat, so the very crystal cannot
    always be first. {retrieval_ceiling_top1, retrieval_chance_top1, retrieval_chance_label: any crystal with the same labels}."""
    known = labels[~np.isnan(labels).any(1)]
    counts, n = np.unique(known, axis=0, return_counts=True)[1], max(len(known), 1)
    return {"retrieval_ceiling_top1": len(counts) / n, "retrieval_chance_top1": 1 / n,
            "retrieval_chance_label": float((counts ** 2).sum()) / n ** 2}
