"""Statistics of runs that differ in their seed: means and spreads, tests, bootstrap, and the speed-up of Figure 2b. numpy only on top."""

import numpy as np


def values(runs, key):
    """A metric of the test split over seeds, (S,)."""
    return np.array([r["wall_time_s"] if key == "seconds" else r["metrics"][key] for r in runs], float)


def curves(runs, key="val_exact"):
    """A quantity per epoch, (S, epochs); entry k is taken after k + 1 epochs."""
    return np.array([r["curve"][key] for r in runs], float)


def spread(samples):
    """Standard deviation over seeds (axis 0); 0 for a single seed."""
    return np.std(samples, 0, ddof=1) if len(samples) > 1 else np.zeros(np.shape(samples)[1:])


def mean_interval(samples, level=0.95):
    """(low, high) of the mean of at least two samples by Student's t."""
    from scipy.stats import t
    half = t.ppf(0.5 + level / 2, len(samples) - 1) * spread(samples) / len(samples) ** 0.5
    return float(np.mean(samples) - half), float(np.mean(samples) + half)


def mean_sd(samples, digits=4):
    """"mean ± sd" of samples, the mean to `digits` significant digits; the mean alone where they do not differ."""
    return f"{samples.mean():.{digits}g}" + (f" ± {spread(samples):.2g}" if np.ptp(samples) > 0 else "")


def overview(groups, keys):
    """DataFrame of "mean ± sd" over seeds; groups {variant: runs}, keys {metric: column title}."""
    import pandas as pd
    rows = {v: {"seeds": len(runs)} | {title: mean_sd(values(runs, k)) for k, title in keys.items()} for v, runs in groups.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def p_value(a, b):
    """Two-sided Welch test of two samples over seeds; 1 when a sample is too small to tell. Two samples without spread: the exact
    permutation test, since a spread of nothing is no certainty."""
    from math import comb

    from scipy.stats import ttest_1samp, ttest_ind
    if min(len(a), len(b)) < 2 or np.ptp([*a, *b]) == 0:
        return 1.0
    if np.ptp(a) == 0 or np.ptp(b) == 0:                               # Welch's test then is that of one sample; without a warning
        fixed, other = (a, b) if np.ptp(a) == 0 else (b, a)
        return min(1.0, 2 / comb(len(a) + len(b), len(a))) if np.ptp(other) == 0 else float(ttest_1samp(other, fixed[0]).pvalue)
    return float(ttest_ind(a, b, equal_var=False).pvalue)


def best(samples, alpha=0.05):
    """The highest mean of {key: values over seeds}: (key, p against the runner-up, keys that tie: Bonferroni p >= alpha)."""
    order = sorted(samples, key=lambda k: -np.mean(samples[k]))
    p = {k: min(1.0, p_value(samples[order[0]], samples[k]) * (len(order) - 1)) for k in order[1:]}
    return order[0], p[order[1]] if p else 1.0, [k for k in order[1:] if p[k] >= alpha]


def crossing(points, level):
    """Time at which (time, value) points first reach `level`, linear between points, from (0, 0); inf if never."""
    points = list(points)
    for (t0, y0), (t1, y1) in zip([(0.0, 0.0), *points], points):
        if y1 >= level:
            return t0 + (t1 - t0) * (level - y0) / (y1 - y0)
    return float("inf")


def epochs_to(curve, level):
    """The same for a curve (epochs,) whose entry k is taken after k + 1 epochs."""
    return crossing(enumerate(curve, 1), level)


def interval(statistic, *samples, draws=2000, seed=0):
    """(value, low, high): 95 % bootstrap interval over seeds of statistic(*samples), each sample (S, ...)."""
    rng = np.random.default_rng(seed)
    drawn = [statistic(*(s[rng.integers(len(s), size=len(s))] for s in samples)) for _ in range(draws)]
    return float(statistic(*samples)), *(float(q) for q in np.nanquantile(drawn, [0.025, 0.975], method="nearest"))


def speedup(without, with_, level):
    """Definition (a): epochs to reach `level` % without over with curriculum, (value, low, high) from curves (S, epochs).

    Mean epochs over seeds. NaN when neither reaches the level; inf when only the curriculum does.
    """
    mean = lambda c: np.mean([epochs_to(row, level) for row in c])

    ratio = lambda a, b: mean(a) / mean(b) if np.isfinite(mean(b)) else 0.0 if np.isfinite(mean(a)) else np.nan
    return interval(ratio, without, with_) if np.isfinite([mean(without), mean(with_)]).any() else (np.nan,) * 3


def gain(without, with_, epoch):
    """Definition (b): SM after `epoch` epochs, with over without curriculum, (value, low, high)."""
    a, b = without[:, epoch - 1], with_[:, epoch - 1]
    return interval(lambda a, b: b.mean() / a.mean() if a.mean() > 0 else np.nan, a, b) if a.mean() > 0 else (np.nan,) * 3


def largest_gain(without, with_, floor=2.0):
    """Most favourable epoch for the curriculum under (b): (ratio, epoch), where the run without has at least `floor` %."""
    a = without.mean(0)
    ratio = np.where(a >= floor, with_.mean(0) / np.maximum(a, 1e-9), 0.0)
    return float(ratio.max()), int(ratio.argmax()) + 1


def paired(groups, variants):
    """[one run of each variant] for every seed that all of them have: one that diverged leaves its seed out."""
    runs = [{r["seed"]: r for r in groups[v]} for v in variants]
    return [[r[seed] for r in runs] for seed in sorted(set.intersection(*map(set, runs)))]


def distinct(runs):
    """Runs whose candidates no earlier one has: screening knows no chance, its seeds go round the models and then repeat."""
    first = {tuple(r["curve"]["formula"]): r for r in reversed(runs)}
    return sorted(first.values(), key=lambda r: r["seed"])


def effective(runs, key):
    """(count, n) for `interval`: the mean rate `key` (%) of as many candidates as the runs are worth, n = (sum m)^2 / sum m^2, where
    m runs propose a formula (Kish 1965: copies say nothing new)."""
    m = np.unique(np.concatenate([r["curve"]["formula"] for r in runs]), return_counts=True)[1]
    n = round(m.sum() ** 2 / (m**2).sum())
    return round(np.mean([r["metrics"][key] for r in runs]) / 100 * n), n


def rests_on(ours, others):
    """What the ratio of two mean counts over seeds rests on, in words: the hits below the line and its 95 % bootstrap interval."""
    if not np.sum(others):
        return "no hits"
    ratio = lambda a, b: a.mean() / b.mean() if b.any() else np.inf
    _, low, high = interval(ratio, np.asarray(ours), np.asarray(others))
    return f"over the mean of {len(others)} distinct runs with {np.sum(others):.0f} hits, 95 % {low:.3g} to {high:.3g}"
