"""Does a confidence tell right from wrong? ROC AUC with an interval, reliability table. numpy only."""

import numpy as np


def roc_auc(score, label):
    """Probability that a random positive scores above a random negative, ties counting one half (Mann-Whitney U).

    score (M,) finite numbers, label (M,) truth values. NaN when all labels are equal: there is nothing to rank.
    """
    score, label = _checked(score, label)
    positive, negative = label.sum(), (~label).sum()
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2                      # mean rank of each group of ties
    u = rank[inverse][label].sum() - positive * (positive + 1) / 2
    return float(u / (positive * negative))


def roc_interval(score, label, level=0.95, draws=2000, seed=0):
    """(AUC, low, high): percentile bootstrap, drawn within each class so that no draw loses the rarer one.

    With few cases of a class (under about ten) the draws repeat the same few values: the interval is then
    too narrow, and has no width when the classes are separated completely. Report the number of cases beside it.
    """
    score, label = _checked(score, label)
    if label.all() or not label.any():
        return (float("nan"),) * 3
    rng, sides = np.random.default_rng(seed), (np.flatnonzero(label), np.flatnonzero(~label))
    drawn = []
    for _ in range(draws):
        pick = np.concatenate([rng.choice(side, len(side)) for side in sides])
        drawn.append(roc_auc(score[pick], label[pick]))
    tail = 50 * (1 - level)
    return roc_auc(score, label), *(float(v) for v in np.percentile(drawn, [tail, 100 - tail]))


def roc_curve(score, label):
    """(false positive rate, true positive rate) at every threshold, from (0, 0) to (1, 1)."""
    score, label = _checked(score, label)
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)               # a threshold takes all of its ties
    rate = lambda hit: np.append(0, np.cumsum(hit[order])[last] / max(hit.sum(), 1))
    return rate(~label), rate(label)


def reliability(confidence, correct, edges=(0, 0.5, 0.9, 0.99, 0.999, 1)):
    """Table of confidence against what came true: one dict a bin [low, high) (the last one closed) that holds cases.

    n, mean confidence, fraction correct and its 95 % Wilson interval (low, high), which stays honest at few cases.
    """
    confidence, correct = _checked(confidence, correct)
    if confidence.min() < edges[0] or confidence.max() > edges[-1]:
        raise ValueError(f"confidence from {confidence.min()} to {confidence.max()} leaves the bins {edges}")
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, len(edges) - 2)
    rows = []
    for k in np.unique(index):
        inside = index == k
        low, high = wilson(correct[inside].sum(), inside.sum())
        rows.append({"from": edges[k], "to": edges[k + 1], "n": int(inside.sum()), "confidence": float(confidence[inside].mean()),
                     "correct": float(correct[inside].mean()), "low": low, "high": high})
    return rows


def expected_calibration_error(rows):
    """Mean over all cases of |fraction correct - mean confidence| of their bin (Guo et al. 2017), from `reliability`."""
    n = sum(r["n"] for r in rows)
    return sum(r["n"] * abs(r["correct"] - r["confidence"]) for r in rows) / n


def wilson(hits, n, z=1.96):
    """95 % score interval of a proportion of hits out of n (Wilson 1927): (low, high)."""
    p, shrink = hits / n, 1 + z**2 / n
    centre, half = (p + z**2 / (2 * n)) / shrink, z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / shrink
    return float(max(min(centre - half, p), 0)), float(min(max(centre + half, p), 1))       # p stays inside, whatever the last bit says


def _checked(score, label):
    score, label = np.asarray(score, float), np.asarray(label)
    if score.ndim != 1 or score.shape != label.shape or not len(score):
        raise ValueError(f"score {score.shape} and label {label.shape}: expected two arrays of one length M > 0")
    if not np.isfinite(score).all():
        raise ValueError(f"{(~np.isfinite(score)).sum()} of {len(score)} scores are not finite")
    if label.dtype.kind == "f" and np.isnan(label).any():
        raise ValueError(f"{np.isnan(label).sum()} of {len(label)} labels are not known")
    return score, label.astype(bool)
