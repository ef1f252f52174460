"""The joint latent as a landscape: its principal plane, random points in it, and how broad a set of crystals is. numpy only."""

import numpy as np

from . import crystal, data


def principal(z):
    """(projections (M, D) on the principal directions, share of variance (D,)) of latents (M, D), by SVD."""
    u, s, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
    return u * s, s**2 / (s**2).sum()


def explained(z, features, k=10):
    """Share of the variance of latents (M, D) that features (M, P) determine: each z against the mean of its k nearest others.

    Features are standardised. A share near 1: who knows the features knows the latent; unrelated features give about -1/k.
    """
    f = (features - features.mean(0)) / np.maximum(features.std(0), 1e-12)
    square = (f**2).sum(1)
    distance = square[:, None] + square[None] - 2 * f @ f.T
    np.fill_diagonal(distance, np.inf)
    near = np.argpartition(distance, k, axis=1)[:, :k]
    return float(1 - ((z - z[near].mean(1)) ** 2).sum() / ((z - z.mean(0)) ** 2).sum())


def element_features(numbers):
    """One-hot elements of the three kinds of sites, (M, 5) -> (M, F): A, B, and counts over X."""
    kinds = np.unique(numbers)
    return np.concatenate([numbers[:, :1] == kinds, numbers[:, 1:2] == kinds, (numbers[:, 2:, None] == kinds).sum(1)], 1).astype(float)


def random_latents(z, count, kind, seed=0):
    """`count` points near the joint latents z (M, D): kind "mixture" (of two of them) or "gaussian" (of their covariance).

    Both get the length of a random data latent: the decoder has only seen lengths like these. float32 (count, D).
    """
    rng = np.random.default_rng(seed)
    a, b, c = z[rng.integers(len(z), size=(3, count))]
    if kind == "mixture":
        share = rng.random((count, 1))
        points = share * a + (1 - share) * b
    elif kind == "gaussian":
        points = rng.multivariate_normal(z.mean(0), np.cov(z.T), count, method="eigh")
    else:
        raise ValueError(f"kind = {kind!r}: expected mixture or gaussian")
    return (points * np.linalg.norm(c, axis=1, keepdims=True) / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def effective_number(values):
    """Exponential of the entropy of (M,) values: how many are in use."""
    share = np.unique(values, return_counts=True)[1] / len(values)
    return float(np.exp(-(share * np.log(share)).sum()))


def breadth(numbers, known):
    """Distinct compositions (A/B twins are one), share (%) not in `known`, effective number of elements on A and on B.

    numbers (M, 5) atomic numbers, known: CrystalSet. Without cells all are 0.
    """
    if len(numbers) == 0:
        return {"distinct": 0, "new": 0.0, "effective_a": 0.0, "effective_b": 0.0}
    keys, seen = [data.composition_key(row) for row in numbers], {data.composition_key(row) for row in known.numbers}
    return {"distinct": len(set(keys)), "new": 100 * float(np.mean([k not in seen for k in keys])),
            "effective_a": effective_number(numbers[:, 0]), "effective_b": effective_number(numbers[:, 1])}


def anion_sets(crystals):
    """(M,) names of the X3 sets of perovskites, e.g. "O3" or "O2N", the majority anion first."""
    def name(row):
        z, n = np.unique(row, return_counts=True)
        pairs = sorted(zip(-n, map(crystal.symbol, z)))
        return "".join(f"{s}{-k if k < -1 else ''}" for k, s in pairs)
    return np.array([name(row) for row in crystals.numbers[:, 2:]])


def chemistry_map(points, kinds, values, hover, shares):
    """Interactive map of latents (plotly) with a button for each colouring.

    points (M, 2); kinds (M,) text, one legend entry each; values {name: (M,) numbers}; hover (M,) texts;
    shares: the two axes' shares of the variance.
    """
    import plotly.graph_objects as go

    from . import plots
    colours = [plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED, plots.PURPLE, plots.SKY, plots.BLACK]
    dots = lambda pick, **marker: dict(x=points[pick, 0].round(4), y=points[pick, 1].round(4), mode="markers", text=hover[pick],
                                       hoverinfo="text", marker={"size": 5, "opacity": 0.8, **marker})
    figure, names = go.Figure(), sorted(set(kinds))
    for k, name in enumerate(names):
        figure.add_trace(go.Scattergl(**dots(kinds == name, color=colours[k % len(colours)]), name=name))
    for name, v in values.items():
        scale = {"color": v.round(3), "colorscale": "Cividis", "showscale": True, "colorbar": {"title": name, "thickness": 14}}
        figure.add_trace(go.Scattergl(**dots(slice(None), **scale), name=name, visible=False, showlegend=False))
    show = lambda chosen: [chosen is None] * len(names) + [name == chosen for name in values]
    buttons = [{"label": name or "anions", "method": "update", "args": [{"visible": show(name)}]} for name in (None, *values)]
    menu = {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.12, "buttons": buttons}
    titles = [f"principal component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares)]
    figure.update_layout(template="simple_white", updatemenus=[menu], xaxis_title=titles[0], yaxis_title=titles[1])
    return figure
