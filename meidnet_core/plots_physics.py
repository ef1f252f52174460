"""Figures of the chapters on bands, phonons and repair; colours and style as in plots.py."""

import re

import matplotlib.pyplot as plt
import numpy as np

from .plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY

SPINS = ((BLUE, "spin up"), (ORANGE, "spin down"))


GREEK = {"SIGMA": "Σ", "DELTA": "Δ", "LAMBDA": "Λ"}                     # as seekpath spells them


def _ticks(ax, labels, letter=0.02):
    """Names of the points of a path; one that would touch the one before (letters are a share `letter` of the path) stands a line lower."""
    for x, _ in labels:
        ax.axvline(x, color="#cccccc", lw=0.6, zorder=0)
    first, last, names, low = labels[0][0], labels[-1][0], [], 0
    for (before, previous), (x, name) in zip([(-np.inf, ""), *labels], labels):
        low = low + 1 if x - before < letter * len(previous + name) * (last - first) else 0
        names.append("\n" * (low % 3) + re.sub(r"_(\w+)", r"$_{\1}$", re.sub("|".join(GREEK), lambda m: GREEK[m[0]], name)))
    ax.set_xticks([x for x, _ in labels], names)
    ax.set_xlim(first, last)


def band_structure(result, title, paper_gap=None, window=(-4, 4), axes=None):
    """Bands beside the density of states of one dft result; the paper's gap as a band above the valence top where we have a gap."""
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(6.2, 3.6), width_ratios=(3, 1), sharey=True)
    left, right = axes
    b, g = result["bands"], result["gap"]
    top = 0.0 if g["metal"] else _valence_top(result)
    for e, (color, name) in zip(b["energies"], SPINS):
        left.plot(*_broken(b["distance"], e - top), color=color, lw=1)
        left.plot([], [], color=color, lw=1, label=name if len(b["energies"]) == 2 else None)
    left.axhline(0, color=BLACK, lw=0.7, ls=":")
    if paper_gap:
        left.axhspan(0, paper_gap, color=RED, alpha=0.12, lw=0, label=f"paper: gap {paper_gap:g} eV")
    for e, (color, _) in zip(result["dos"]["total"], SPINS):
        right.plot(e, result["dos"]["energies"] - top, color=color, lw=1)
    _ticks(left, b["labels"])
    filled = (result["dos"]["energies"] - top > window[0]) & (result["dos"]["energies"] < top)
    right.set(xlabel="states/(eV cell)", xlim=(0, 1.5 * np.max(result["dos"]["total"][:, filled])))      # flat empty 4f levels are cut
    kind = "metal" if g["metal"] else f"{'direct' if abs(g['direct'] - g['indirect']) < 0.01 else 'indirect'} gap {g['indirect']:.2f} eV"
    left.set(ylim=window, title=f"{title}: {kind}", ylabel=f"$E - E_{{\\mathrm{{{'F' if g['metal'] else 'VBM'}}}}}$ (eV)")
    if paper_gap or len(b["energies"]) == 2:
        left.legend(fontsize=7.5, loc="lower right", frameon=True)
    return axes


def two_bases(waves, orbitals, title, window=(-3, 3)):
    """Bands of one crystal by plane waves and by atomic orbitals (two dft results), each relative to the Fermi level of its density."""
    fig, ax = plt.subplots(figsize=(6.2, 3.6))
    names = "plane waves", f"atomic orbitals ({orbitals['basis']['name']})"
    for r, color, style, name in zip((waves, orbitals), (SKY, BLACK), "-:", names):
        for e in r["bands"]["energies"]:
            ax.plot(*_broken(r["bands"]["distance"], e), color=color, ls=style, lw=1.8 if style == "-" else 1.1)
        ax.plot([], [], color=color, ls=style, label=name)
    _ticks(ax, waves["bands"]["labels"])
    ax.set(ylim=window, title=title, ylabel="$E - E_{\\mathrm{F}}$ (eV)")
    ax.legend(fontsize=8, loc="lower right", frameon=True)
    return fig


def _broken(x, energies):
    """x (K,) and energies (K, B) with a gap where the path jumps (two points at one distance)."""
    jump = np.flatnonzero(np.diff(x) < 1e-6) + 1
    return np.insert(x, jump, np.nan), np.insert(energies, jump, np.nan, axis=0)


def _valence_top(result):
    """Of the drawn bands of an insulator, relative to the Fermi level: by their number, by the Fermi level in a magnetic cell."""
    e = result["bands"]["energies"]
    return e[0, :, :round(result["electrons"]) // 2].max() if len(e) == 1 else e[e < 0].max()


def band_structures(results, paper, columns=2, window=(-4, 4)):
    """Bands and densities of states of several results {title: result}, with the paper's gaps {title: eV}."""
    rows = -(-len(results) // columns)
    fig, axes = plt.subplots(rows, 2 * columns, figsize=(9.8, 3.5 * rows), width_ratios=(3, 1) * columns, squeeze=False)
    for k, (title, r) in enumerate(results.items()):
        pair = axes[k // columns, 2 * (k % columns):2 * (k % columns) + 2]
        band_structure(r, title, paper.get(title), window, pair)
        pair[1].set_ylim(window)
        pair[1].set_yticklabels([])
    for k in range(len(results), rows * columns):
        for ax in axes[k // columns, 2 * (k % columns):2 * (k % columns) + 2]:
            ax.axis("off")
    fig.tight_layout()
    return fig


def gllbsc_parity(rows, mae, title="validation"):
    """GLLB-SC gaps here against the labels of the data set, direct and indirect; labels come in steps of 0.1 eV."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.2))
    for ax, kind, color in zip(axes, ("direct", "indirect"), (BLUE, GREEN)):
        good = [r for r in rows if r["gap"]]
        x, y = (np.array([r[k] for r in good]) for k in (f"label_{kind}", kind))
        ax.errorbar(x, y, xerr=0.05, fmt="o", ms=5, color=color, ecolor=SKY, label=f"n = {len(x)}, MAE {mae[kind]:.2f} eV")
        for r in good:
            if abs(r[kind] - r[f"label_{kind}"]) > 0.3:
                ax.annotate(r["formula"], (r[f"label_{kind}"], r[kind]), fontsize=7.5, xytext=(4, -8), textcoords="offset points")
        ax.axline((1, 1), slope=1, color=BLACK, lw=1)
        ax.set(xlabel=f"label, {kind} gap (GLLB-SC, eV; steps of 0.1)", ylabel="GPAW here (GLLB-SC, eV)", title=title)
        ax.legend(fontsize=9)
    fig.tight_layout()
    return fig


def candidate_gaps(rows):
    """Target, prediction and two ab initio gaps of each candidate (a metal: 0); the label says which theory each symbol is."""
    rows = sorted(rows, key=lambda r: (r["gllbsc"] or 0, r["pbe"] or 0))
    fig, ax = plt.subplots(figsize=(9.5, 4.2))
    x = np.arange(len(rows))
    pick = lambda key: [np.nan if r.get(key) is None else r[key] for r in rows]
    for key, marker, color, name in (("target_pbe", "_", RED, "target (PBE)"), ("predicted_pbe", "o", SKY, "model (PBE)"),
                                     ("pbe", "s", BLUE, "GPAW, PBE"), ("gllbsc", "D", ORANGE, "GPAW, GLLB-SC, fundamental")):
        ax.plot(x, pick(key), ls="", marker=marker, ms=14 if marker == "_" else 6, mew=2 if marker == "_" else 1, color=color, label=name)
    turned = {"rotation": 90, "fontsize": 8} if len(rows) > 20 else {"rotation": 45, "ha": "right"}
    ax.set_xticks(x, [r["formula"] for r in rows], **turned)
    ax.set(ylabel="band gap (eV)", ylim=(-0.1, None))
    ax.legend(fontsize=8.5)
    return fig


def hull_distances(table, potential="sevennet-0", threshold=100):
    """Distances to the hull of dft_hull.table (meV/atom): cubic cells and polymorphs, DFT and potential, beside the paper's DFT."""
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 0.27 * len(table) + 1.4))
    axes[1].sharey(axes[0])                   # not in subplots: under pytest GPAW fills every np.empty with NaN, the axes to share too
    axes[1].tick_params(labelleft=False)
    y = np.arange(len(table))[::-1]
    for ax, kind, paper in zip(axes, ("cubic", "repaired"), ("paper, DFT", "paper, repaired")):
        points = [(paper, "x", RED, "paper, DFT"), (f"{potential}, {kind}", "o", SKY, f"{potential}, list hull"),
                  (f"DFT, {kind}", "D", BLUE, "here, PBE")]
        points += [("paper, eSEN", "+", ORANGE, "paper, eSEN")] if kind == "cubic" else []
        for column, marker, color, name in points:
            ax.plot(table[column].astype(float), y, ls="", marker=marker, ms=7, mew=1.6 if marker in "x+" else 0.8, color=color, label=name)
        ax.axvline(threshold, color=BLACK, lw=0.8, ls=":", label=f"{threshold} meV/atom")
        ax.set(title={"cubic": "cubic cells (Table S1)", "repaired": "repaired (Table S2)"}[kind], xlabel="energy above hull (meV/atom)")
        ax.grid(axis="y", lw=0.3)
    axes[0].set_yticks(y, table["material"])
    axes[0].legend(fontsize=8)
    return fig


def phonon_panel(study, title, ax=None, color=BLUE):
    """Phonon bands of a phonons.study (THz; imaginary drawn negative), soft parts in purple."""
    ax = ax or plt.subplots(figsize=(4.6, 3.4))[1]
    b, labels = study["bands"], []
    for (a, z), x, f in zip(b["labels"], b["distances"], b["frequencies"]):
        f = np.array(f)
        ax.plot(x, f, color=color, lw=0.9)
        ax.plot(x, np.where(f < study["threshold"], f, np.nan), color=PURPLE, lw=1.8)
        if labels and labels[-1][1] != a:
            labels[-1] = (labels[-1][0], f"{labels[-1][1]}|{a}")
        elif not labels:
            labels.append((x[0], a))
        labels.append((x[-1], z))
    _ticks(ax, labels)
    ax.axhline(0, color=BLACK, lw=0.7)
    ax.set(ylabel="frequency (THz)", title=title)
    return ax


def phonon_pairs(pairs, columns=3):
    """Figure S7: {formula: (study before, study after or None, text after)}, before above after."""
    rows = -(-len(pairs) // columns)
    fig, axes = plt.subplots(2 * rows, columns, figsize=(9.8, 5.4 * rows), squeeze=False)
    for k, (name, (before, after, text)) in enumerate(pairs.items()):
        r, c = 2 * (k // columns), k % columns
        phonon_panel(before, f"{name}: {before['spacegroup']}", axes[r, c])
        if after:
            phonon_panel(after, text, axes[r + 1, c], GREEN)
        else:
            axes[r + 1, c].axis("off")
    for k in range(len(pairs), rows * columns):
        axes[2 * (k // columns), k % columns].axis("off")
        axes[2 * (k // columns) + 1, k % columns].axis("off")
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
        ax.title.set_fontsize(8.5)
        ax.set_ylabel(ax.get_ylabel(), fontsize=8)
    fig.tight_layout()
    return fig


def phonon_dos(pairs, columns=3):
    """Densities of states of `phonon_pairs`, before and after in one panel; what lies left of zero is imaginary."""
    rows = -(-len(pairs) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(9.8, 2.3 * rows), squeeze=False)
    for ax in axes.flat[len(pairs):]:
        ax.axis("off")
    for ax in axes.flat[1:len(pairs)]:
        ax.sharey(axes.flat[0])               # not in subplots: see hull_distances
    for ax, (name, (before, after, _)) in zip(axes.flat, pairs.items()):
        for study, color in ((before, BLUE), (after, GREEN)):
            if study:
                density = np.array(study["dos"]["density"]) / len(study["symbols"])
                ax.plot(study["dos"]["frequencies"], density, color=color, lw=1.1, label=study["spacegroup"])
        ax.axvline(0, color=BLACK, lw=0.7)
        ax.set_title(name, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7)
    fig.supxlabel("frequency (THz; negative: imaginary)", fontsize=9)
    fig.supylabel("states/(THz atom)", fontsize=9)
    fig.tight_layout()
    return fig


def soft_mode_animation(cell, mode, supercell=(2, 2, 2), amplitude=0.5, frames=16):
    """A plotly animation of one mode frozen in at growing and falling amplitude (angstrom)."""
    import plotly.graph_objects as go

    from . import crystal, phonons
    from .relax import to_atoms
    colors = dict(zip(dict.fromkeys(cell[1]), (ORANGE, BLUE, GREEN)))
    still = to_atoms(phonons.displaced(cell, mode, 0.0, 0.0, supercell))
    moves = phonons.moves(cell, mode, supercell)
    at = lambda t: still.positions + amplitude * np.sin(2 * np.pi * t / frames) * moves
    sites = {e: [i for i, symbol in enumerate(still.symbols) if symbol == e] for e in colors}
    look = {e: {"size": 6 + 0.05 * crystal.atomic_number(e), "color": colors[e], "line": {"width": 1, "color": BLACK}} for e in colors}
    scatter = lambda t: [go.Scatter3d(**dict(zip("xyz", at(t)[i].T)), mode="markers", marker=look[e], name=e) for e, i in sites.items()]
    figure = go.Figure(scatter(0), frames=[go.Frame(data=scatter(t), name=str(t)) for t in range(frames)])
    play = {"frame": {"duration": 90, "redraw": True}, "fromcurrent": True, "transition": {"duration": 0}}
    buttons = [{"label": "play", "method": "animate", "args": [None, play]}]
    figure.update_layout(updatemenus=[{"type": "buttons", "buttons": buttons, "x": 0.05, "y": 0.95}],
                         legend={"x": 0.9, "y": 0.9, "itemsizing": "constant"},
                         scene={"xaxis_title": "x (Å)", "yaxis_title": "y (Å)", "zaxis_title": "z (Å)", "aspectmode": "data"})
    return figure


def convergence(rows, labels, title):
    """Lowest frequency at special points for each supercell and displacement (rows of phonons.convergence)."""
    fig, ax = plt.subplots(figsize=(8, 3.4))
    names = [f"{r['supercell'][0]}×{r['supercell'][1]}×{r['supercell'][2]}\n{r['displacement']:g} Å" for r in rows]
    for label, marker, color in zip(labels, "osD^", (BLUE, ORANGE, GREEN, PURPLE)):
        ax.plot(names, [r["lowest"].get(label, np.nan) for r in rows], ls="--", marker=marker, color=color, label=label)
    ax.axhline(0, color=BLACK, lw=0.7)
    ax.set(ylabel="lowest frequency (THz)", xlabel="supercell and displacement", title=title)
    ax.legend(ncols=len(labels), fontsize=9)
    return fig
