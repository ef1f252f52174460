"""Figures of the book: one function a figure, colour-blind-safe (Okabe-Ito), units on every axis."""

from functools import reduce

import matplotlib.pyplot as plt
import numpy as np

from . import seeds

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
GREY = "#999999"
NAMES = {"dir_gap": "band gap, GLLB-SC (eV)", "heat_all": "enthalpy $H_f$ vs competing phases (eV/atom)", "band_gap": "band gap, PBE (eV)",
         "formation_energy_per_atom": "formation energy, PBE (eV/atom)", "energy_per_atom": "energy, PBE (eV/atom)"}
SMALL = [{"selector": "td, th", "props": "font-size: 75%; padding: 2px 4px"}]      # table styles of pandas, for wide tables


def style():
    """Readable at page width and on a phone."""
    plt.rcParams.update({"figure.dpi": 120, "savefig.bbox": "tight", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK]), "legend.frameon": False})


_plotly_js = [True]      # the first figure of a page brings the library (no network needed), later ones use it


def show_html(figure, height=None):
    """Show a plotly figure as HTML that survives Jupyter Book 1 (bare plotly outputs vanish there), from inside an `if` as well."""
    from IPython.display import HTML, display
    figure.update_layout(autosize=True, height=height, margin={"l": 0, "r": 0, "t": 40, "b": 0})
    html = figure.to_html(include_plotlyjs=_plotly_js[0], full_html=False, config={"responsive": True})
    _plotly_js[0] = False
    display(HTML(html))


def periodic_table(counts, title, missing=(), unit="cells"):
    """Heat map of counts {symbol: n} (log colour); `missing` symbols are ringed in red."""
    from matplotlib.colors import LogNorm
    from pymatgen.core import Element
    fig, ax = plt.subplots(figsize=(9.5, 5))
    norm, cmap = LogNorm(min(counts.values()) / 4, max(counts.values())), plt.get_cmap("cividis")
    for e in (Element.from_Z(z) for z in range(1, 93)):
        row, column = e.row, e.group
        if e.is_lanthanoid or e.is_actinoid:
            row, column = e.row + 2.4, 3 + e.Z - (57 if e.is_lanthanoid else 89)
        n = counts.get(e.symbol, 0)
        face = cmap(norm(n)) if n else "#f2f2f2"
        ax.add_patch(plt.Rectangle((column, -row), 0.94, 0.94, facecolor=face, edgecolor=RED if e.symbol in missing else "none", lw=2.2))
        ink = "#999999" if not n else "white" if norm(n) < 0.55 else "black"
        ax.text(column + 0.47, -row + 0.6, e.symbol, ha="center", va="center", fontsize=9, color=ink)
        ax.text(column + 0.47, -row + 0.22, f"{n:,}" if n else "", ha="center", va="center", fontsize=5.2, color=ink)
    ax.set(xlim=(0.9, 19.1), ylim=(-9.6, 0.2), title=title)
    ax.set_aspect("equal")
    ax.axis("off")
    fig.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=ax, shrink=0.55, label=unit)
    return fig


def label_histograms(sets, theory):
    """Distribution of every label, per split (density, log scale): sets {split: CrystalSet}, theory {label: text}."""
    fig, axes = plt.subplots(1, len(theory), figsize=(9.5, 3.4))
    for ax, (label, text) in zip(np.atleast_1d(axes), theory.items()):
        i = next(iter(sets.values())).label_names.index(label)
        values = {s: c.labels[~np.isnan(c.labels[:, i]), i] for s, c in sets.items()}
        bins = np.linspace(min(v.min() for v in values.values()), max(v.max() for v in values.values()), 45)
        for (s, v), width in zip(values.items(), (3, 2, 1)):
            ax.hist(v, bins, histtype="step", density=True, lw=width, label=f"{s} (n = {len(v):,})")
        ax.set(xlabel=text, yscale="log")
    np.atleast_1d(axes)[0].set_ylabel("density")
    np.atleast_1d(axes)[0].legend(fontsize=8)
    fig.tight_layout()
    return fig


def losses(history):
    """Training losses, and the curriculum weight that explains the shape of the contrastive one."""
    epoch = [h["epoch"] + 1 for h in history]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    for key, name in (("species", "species (CE)"), ("coords", "coordinates"), ("lattice", "lattice"), ("adjacency", "adjacency (BCE)"),
                      ("prop", "properties, joint"), ("prop_structure", "properties, structure alone")):
        left.semilogy(epoch, [h[key] for h in history], label=name)
    left.set(xlabel="epoch", ylabel="training loss (unweighted terms)")
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    right.plot(epoch, [h["nce"] for h in history], color=BLUE)
    right.set(xlabel="epoch", ylabel="InfoNCE (nats)")
    twin = right.twinx()
    twin.plot(epoch, [h["alpha"] for h in history], color=ORANGE, ls="--")
    twin.set_ylabel("curriculum weight $\\alpha_t$", color=ORANGE)
    twin.spines["right"].set_visible(True)
    fig.tight_layout()
    return fig


def parity(true, predicted, labels, titles, paper_r2=None):
    """Parity plots, one panel a pair: true, predicted lists of (M,), labels axis texts, titles panel titles."""
    fig, axes = plt.subplots(1, len(true), figsize=(4.4 * len(true), 4.2))
    for ax, t, p, label, title in zip(np.atleast_1d(axes), true, predicted, labels, titles):
        known = ~np.isnan(t)
        t, p = t[known], p[known]
        r2 = 1 - ((p - t) ** 2).sum() / ((t - t.mean()) ** 2).sum()
        ax.scatter(t, p, s=5, alpha=0.3, color=BLUE, edgecolors="none", rasterized=True)
        low, high = min(t.min(), p.min()), max(t.max(), p.max())
        ax.plot([low, high], [low, high], color=BLACK, lw=1)
        text = f"MAE {np.abs(p - t).mean():.3f}\n$R^2$ {r2:.4f}" + (f"\npaper $R^2$ {paper_r2}" if paper_r2 else "")
        ax.text(0.04, 0.96, text, transform=ax.transAxes, va="top", fontsize=9)
        ax.set(xlabel=f"reference {label}", ylabel="predicted", title=title)
    fig.tight_layout()
    return fig


def alignment_histogram(cosine, l2d, paper=(0.97, 0.24), rerun=(0.919, None)):
    """Cosine similarity and L2 distance of paired embeddings, per crystal, with the paper's mean on Perov-5 (None: not drawn)."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.3))
    for ax, values, reference, other, name in zip(axes, (cosine, l2d), paper, rerun, ("cosine similarity", "L2 distance")):
        ax.hist(values, 60, color=SKY)
        ax.axvline(values.mean(), color=BLUE, lw=2, label=f"mean {values.mean():.3f}")
        if reference:
            ax.axvline(reference, color=BLACK, lw=2, ls="--", label=f"paper {reference} (split unstated)")
        if other:
            ax.axvline(other, color=RED, lw=1.5, ls=":", label=f"authors' re-run, held out {other}")
        ax.set(xlabel=f"{name} of $y_c$ and $y_p$", ylabel="test crystals")
        ax.legend(fontsize=8)
    fig.tight_layout()
    return fig


def latent_map(points, values, name, hover):
    """Interactive 2-D map (PCA) of latents, (M, 2), coloured by values (M,); hover texts (M,)."""
    import plotly.graph_objects as go
    marker = {"size": 4, "color": values, "colorscale": "Cividis", "showscale": True, "colorbar": {"title": name}}
    figure = go.Figure(go.Scattergl(x=points[:, 0], y=points[:, 1], mode="markers", marker=marker, text=hover, hoverinfo="text"))
    figure.update_layout(template="simple_white", xaxis_title="principal component 1", yaxis_title="principal component 2")
    return figure


def verdicts(pattern):
    """Rows of the table of claims whose ids match a regular expression: a styled table."""
    from .results import read_claims
    claims = read_claims()
    rows = claims.loc[claims["id"].str.match(pattern), ["where", "quantity", "unit", "paper", "ours", "sd", "n_seeds", "split", "verdict"]]
    return rows.style.hide().format(precision=4, na_rep="-").format(precision=0, na_rep="-", subset=["n_seeds"]).set_table_styles(SMALL)


def structures(cells, titles, columns=2):
    """Rotatable 3-D views side by side: pymatgen Structures and their titles."""
    from pymatviz import structure_3d
    figure = structure_3d({str(k): s for k, s in enumerate(cells)}, n_cols=columns, show_bonds=False, site_labels="symbol",
                          cell_boundary_tol=0.08,     # a decoded atom at 0.01 is drawn at both faces, like one at 0
                          subplot_title=lambda _, key: {"text": titles[int(key)], "font": {"size": 12}})
    figure.update_layout(width=None, showlegend=False)
    return figure


def from_menu(groups, columns=2):
    """Rotatable 3-D views of a group chosen from a menu: {name: [(Structure, title), ...]}, the first the largest.

    One group at a time: browsers draw at most 16 such views on a page.
    """
    parts = {name: structures(*zip(*group), columns=columns) for name, group in groups.items()}
    owner = [name for name, part in parts.items() for _ in part.data]
    shown = lambda name: [o == name for o in owner]
    figure, *others = parts.values()
    figure.add_traces([trace for part in others for trace in part.data])
    buttons = [{"label": name, "method": "update", "args": [{"visible": shown(name)}, {"annotations": part.layout.annotations}]}
               for name, part in parts.items()]
    for trace, visible in zip(figure.data, shown(owner[0])):
        trace.visible = visible
    return figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.15}], margin={"t": 90})


def navigation(path, plane, target):
    """Figure 1c: trajectories in two principal directions of the latents, height = distance to the target."""
    points, distance = path.latents.cpu().numpy() @ plane, path.distance.cpu().numpy()      # (T, B, 2), (T, B)
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for b in range(points.shape[1]):
        left.plot(points[:, b, 0], distance[:, b], lw=1, color=SKY)
    left.scatter(points[0, :, 0], distance[0], color=ORANGE, s=18, label="start", zorder=3)
    left.scatter(points[-1, :, 0], distance[-1], color=BLUE, s=18, label="end", zorder=3)
    left.set(xlabel="first principal direction of the latents", ylabel="distance to target (label s.d.)", title=target)
    left.legend()
    right.semilogy(distance, lw=1, color=SKY)
    right.semilogy(np.median(distance, 1), lw=2.5, color=BLUE, label="median")
    right.set(xlabel="Adam step", ylabel="distance to target (label s.d.)")
    right.legend()
    fig.tight_layout()
    return fig


def table1_bars(frame, datasets, methods):
    """Match rates per data set: measured here (bars, spread over seeds) and published (diamonds), from table1.table()."""
    fig, axes = plt.subplots(1, len(datasets), figsize=(9.5, 5.4), sharey=True)
    colours = dict(zip(methods, ("#bbbbbb", "#888888", "#888888", ORANGE, PURPLE, SKY, GREEN, BLUE, "#cccccc", "#cccccc")))
    for ax, (key, title) in zip(np.atleast_1d(axes), datasets.items()):
        rows = frame[frame["dataset"] == key].set_index("method").reindex(methods)
        y = np.arange(len(methods))[::-1]
        ax.barh(y, rows["SM here (%)"].fillna(0), xerr=rows["sd"].fillna(0), color=[colours[m] for m in methods], height=0.7, ecolor=BLACK)
        ax.plot(rows["published SM (%)"], y, ls="", marker="D", mfc="white", mec=BLACK, ms=7, label="published")
        for value, at in zip(rows["SM here (%)"], y):
            if np.isfinite(value):
                ax.text(1, at, f"{value:.1f}", va="center", fontsize=9, bbox={"facecolor": "white", "alpha": 0.85, "pad": 1, "lw": 0})
        ax.set(title=title, xlim=(0, 105), xlabel="structure matching (%)")
        breaks = ((" (", "\n("), ("training cell of", "training cell\nof"), ("production, ", "production,\n"))
        ax.set_yticks(y, [reduce(lambda m, pair: m.replace(*pair), breaks, m) for m in methods], fontsize=8.5)
    np.atleast_1d(axes)[0].legend(loc="lower left", bbox_to_anchor=(-1.0, -0.22), fontsize=9)
    fig.tight_layout()
    return fig


def residual_histogram(residual, hit):
    """Distance |E(x) - z| after decoding, for cells that match and cells that do not."""
    fig, ax = plt.subplots(figsize=(6.5, 3.4))
    keep = np.isfinite(residual)
    bins = np.linspace(0, np.quantile(residual[keep], 0.99), 30)
    for mask, colour, name in ((hit & keep, BLUE, "match"), (~hit & keep, ORANGE, "no match")):
        ax.hist(np.clip(residual[mask], None, bins[-1]), bins, color=colour, alpha=0.65, label=f"{name} ({mask.sum()})")
    ax.set(xlabel="distance of the decoded cell's encoding from the latent", ylabel="test cells")
    ax.legend()
    return fig


def structure_of(cell):
    """pymatgen Structure of a decoded cell (lattice, symbols, frac)."""
    from .crystal import to_structure
    return to_structure(*cell)


# ---- generated crystals -------------------------------------------------------------------------

def hull_check(fit, validations):
    """How far a potential's energies can be put on a hull: ground states before and after correction, known ABX3 against OQMD.

    validations: {name of the hull: run of stability.validate}; points beyond the axes lie on their edge. The title of the right panel
    says how well the stable ones are told from the others, as stability.agreement counts.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2))
    c, test = {k: np.array(v) for k, v in fit["curve"].items()}, np.array(fit["curve"]["test"])
    bins = np.linspace(-0.3, 1.2, 61)
    for key, color, name in (("before", ORANGE, "uncorrected"), ("after", BLUE, "corrected")):
        error, mae = np.clip((c[key] - c["listed"])[test], *bins[[0, -1]]), 1000 * fit["metrics"][f"mae_{key}"]
        left.hist(error, bins, color=color, alpha=0.65, label=f"{name}: MAE {mae:.0f} meV/atom")
    left.set(xlabel="formation energy, potential - list (eV/atom)", ylabel="ground states not used in the fit", yscale="log")
    for (name, run), color, marker in zip(validations.items(), (BLUE, ORANGE), "ox"):
        x, y = (np.array(run["curve"][k], float) for k in ("oqmd", "ours"))
        label = f"{name}: MAE {1000 * run['metrics']['mae']:.0f}, median {1000 * np.nanmedian(np.abs(y - x)):.0f} meV/atom"
        right.scatter(x, np.clip(y, -0.24, 0.99), s=12, color=color, alpha=0.6, lw=1 if marker == "x" else 0, marker=marker, label=label)
    right.axline((0, 0), slope=1, color=BLACK, lw=1)
    right.axhline(0.1, color=RED, ls="--", lw=1)
    right.axvline(0.1, color=RED, ls="--", lw=1, label="0.1 eV/atom")
    right.set(xlabel="OQMD, DFT, own hull (eV/atom)", ylabel="potential (eV/atom)", xlim=(-0.05, 1), ylim=(-0.25, 1))
    told = [f"{name}: {_classified(run['metrics'], 0.0)} at 0, {_classified(run['metrics'], 0.1)} at 0.1 eV/atom"
            for name, run in validations.items()]
    right.set_title("\n".join([f"{len(x)} known cubic ABX$_3$; accuracy / precision / recall (%)", *told]), fontsize=8.5)
    for ax in (left, right):
        ax.legend(fontsize=8.5)
    fig.tight_layout()
    return fig


def _classified(metrics, threshold):
    """"92 / 94 / 89": accuracy, precision and recall (%) of a validation at a threshold (eV/atom), - for one without a value."""
    found = (metrics[f"{k}_at_{threshold:g}"] for k in ("accuracy", "precision", "recall"))
    return " / ".join("-" if v is None else f"{v:.0f}" for v in found)


def e_above_hull(groups, names, potential):
    """Figure 3a: distribution of the energy above hull of all candidates, groups {method: (M,) eV/atom}, relaxed with a potential."""
    fig, ax = plt.subplots(figsize=(8, 3.8))
    bins = np.linspace(-0.25, 1.5, 71)
    for (method, values), color in zip(groups.items(), (BLUE, ORANGE, GREEN, PURPLE, BLACK)):
        values = np.clip(values[np.isfinite(values)], bins[0], bins[-1])
        ax.hist(values, bins, density=True, histtype="step", lw=2, color=color, label=f"{names[method]} (n = {len(values)})")
    ax.axvline(0.1, color=RED, ls="--", lw=1.2, label="threshold 0.1 eV/atom")
    ax.set(xlabel=f"energy above the list hull, {potential} (eV/atom; last bin: above 1.5)", ylabel="density")
    ax.legend(fontsize=8.5)
    return fig


def rate_bars(rows, paper=None, ceiling=None, label="SUN rate (%)", stated="paper"):
    """Horizontal bars with intervals: rows of (name, rate, low, high) in %; the paper's value and the ceiling as lines."""
    fig, ax = plt.subplots(figsize=(8.5, 0.42 * len(rows) + 1.3))
    y = np.arange(len(rows))[::-1]
    rate, low, high = (np.array([r[k] for r in rows]) for k in (1, 2, 3))
    error = [np.maximum(rate - low, 0), np.maximum(high - rate, 0)]
    ax.barh(y, rate, xerr=error, color=[BLUE] + [SKY] * (len(rows) - 1), capsize=3, height=0.65)
    for value, where, text, color in ((paper, "--", stated, BLACK), (ceiling, ":", "all of the window", RED)):
        if value is not None:
            ax.axvline(value, color=color, ls=where, lw=1.5, label=f"{text}: {value:g}")
    ax.set_yticks(y, [r[0] for r in rows])
    ax.set(xlabel=label, xlim=(0, None))
    if paper is not None or ceiling is not None:
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8.5, frameon=False)
    fig.tight_layout()
    return fig


def gap_parity(table, mae):
    """Figure S3: gap read by the independent CGCNN against the target, and against the model's own prediction, of the proposals in
    a table (gap_check.proposals). Full: models agree; grey: read off target. mae: of those in blue, or None for no title."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    jitter = np.random.default_rng(0).uniform(-0.03, 0.03, len(table))
    kinds = (("off target when read again", ~table.near, GREY, GREY), ("on target, models differ", table.near & ~table.sure, SKY, "none"),
             ("on target, models agree", table.sure, BLUE, BLUE))
    for text, rows, edge, face in kinds:
        part, words = table[rows], {"mec": edge, "mfc": face, "alpha": 0.5 if edge == GREY else 1}
        if len(part):
            left.plot(part.target + jitter[rows], part.cgcnn, "o", ms=3 if edge == GREY else 4.5, label=f"{text} ({len(part)})", **words)
            right.errorbar(part.pbe_gap, part.cgcnn, xerr=None if edge == GREY else part.pbe_gap_sd, fmt="o", ms=3 if edge == GREY else 4.5,
                           ecolor=SKY, lw=1, **words)
    left.plot([0.7, 1.6], [0.7, 1.6], color=BLACK, lw=1, label="CGCNN = target (paper: MAE 0.02 eV)")
    left.set(xlabel="target PBE gap (eV)", ylabel="independent CGCNN (eV)", title=f"MAE where models agree: {mae:.2f} eV" if mae else None)
    right.axline((1, 1), slope=1, color=BLACK, lw=1)
    right.set(xlabel="own prediction, structure alone (eV)", ylabel="independent CGCNN (eV)")
    left.legend(fontsize=8.5)
    fig.tight_layout()
    return fig


def edges(table, errors):
    """Edge of candidates, each reading of decoded_cells.READINGS against the relaxed cube; errors {reading: mean error, angstrom}."""
    fig, axes = plt.subplots(1, len(errors), figsize=(9.5, 3.4), sharex=True, sharey=True)
    for ax, (name, error), colour in zip(axes, errors.items(), (RED, BLUE, GREEN)):
        ax.plot(table.relaxed, table[name], "o", ms=3, color=colour, alpha=0.6)
        ax.axline((4.5, 4.5), slope=1, color=BLACK, lw=1)
        ax.set(xlabel="relaxed edge (angstrom)", title=f"{name}: {error:.2f} angstrom")
    axes[0].set(ylabel="edge as read (angstrom)")
    fig.tight_layout()
    return fig


def dimensions(groups, costs, chosen=128):
    """Reconstruction loss and exact composition (%) of the test split against latent dimension and cost, {dimension: runs} and
    {dimension: 10^12 operations of a training}."""
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.6))
    for ax, key in zip(axes, ("reconstruction", "exact_composition", "exact_composition")):
        for d, runs in groups.items():
            y = seeds.values(runs, key)
            x = np.full(len(y), costs[d] if ax is axes[2] else int(d))
            ax.plot(x, y, "o", ms=4, color=SKY)
            ax.errorbar(x.mean(), y.mean(), seeds.spread(y), fmt="o", color=BLUE, capsize=4)
            if ax is axes[2]:
                ax.annotate(d, (x.mean(), y.mean()), (6, 4), textcoords="offset points", fontsize=8)
        ax.set(ylabel="reconstruction loss, test" if key == "reconstruction" else "exact composition (%), test",
               xlabel="training ($10^{12}$ operations)" if ax is axes[2] else "latent dimension")
    for ax in axes[:2]:
        ax.set_xscale("log", base=2)
        ax.set_xticks([int(d) for d in groups], list(groups), fontsize=9)
        ax.axvline(chosen, color=BLACK, ls="--", lw=1)
    fig.tight_layout()
    return fig
