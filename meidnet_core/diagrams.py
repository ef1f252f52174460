"""Figure 1 drawn from the real modules: names, shapes and sizes are read off a model, not typed in."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from .plots import BLUE, GREEN, ORANGE, PURPLE, SKY


def count(module):
    """Number of parameters of a module, or of several, in thousands."""
    parts = module if isinstance(module, (list, tuple)) else [module]
    return f"{sum(p.numel() for m in parts for p in m.parameters()) / 1000:.0f} k"


def box(ax, x, y, text, color, width=2.3, height=1.0):
    """A rounded box centred at (x, y); returns its centre and half sizes for `arrow`."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0.02,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color + "33", edgecolor=color, lw=1.4))
    ax.text(x, y, text, ha="center", va="center", fontsize=7.2)
    return x, y, width / 2, height / 2


def arrow(ax, a, b, style="-|>", **kwargs):
    """From the right edge of box a to the left edge of box b (or between top and bottom when they stand in a column)."""
    if abs(a[0] - b[0]) < 0.1:
        up = 1 if b[1] > a[1] else -1
        start, end = (a[0], a[1] + up * a[3]), (b[0], b[1] - up * b[3])
    else:
        right = 1 if b[0] > a[0] else -1
        start, end = (a[0] + right * a[2], a[1]), (b[0] - right * b[2], b[1])
    ax.annotate("", end, start, arrowprops={"arrowstyle": style, "lw": 1.2, "shrinkA": 1, "shrinkB": 1, **kwargs})


def canvas(width, height, title):
    fig, ax = plt.subplots(figsize=(9.5, 9.5 * height / width))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_title(title, loc="left", fontsize=10)
    ax.axis("off")
    return fig, ax


def workflow(model, data_set):
    """Figure 1a: from data to checked candidates, with the sizes of `model`."""
    fig, ax = canvas(16, 6.6, "(a) workflow, sizes read from the model")
    cfg, n = model.cfg, model.shape.sites
    cell = f"crystal ({data_set})\nlattice 6, species {n}x{model.shape.classes}\ncoordinates {n}x3\nadjacency {n}x{n}"
    branches = f"{len(model.prop_encoders)} property encoder{'s' * (len(model.prop_encoders) > 1)}\n{count(list(model.prop_encoders))}"
    crystal = box(ax, 1.5, 5.2, cell, GREEN, 2.7, 1.7)
    props = box(ax, 1.5, 2.6, "properties\n" + "\n".join(cfg.labels), ORANGE, 2.7)
    encoder = box(ax, 4.75, 5.2, f"CrystalEncoder\n{cfg.blocks} EGNN blocks\n{count(model.encoder)} parameters", BLUE)
    prop_encoder = box(ax, 4.75, 2.6, branches, BLUE)
    y_c = box(ax, 7.5, 5.2, f"$y_c$ on the sphere\n{cfg.latent}-d", SKY, 1.9)
    y_p = box(ax, 7.5, 2.6, f"$y_p$ on the sphere\n{cfg.latent}-d", SKY, 1.9)
    joint = box(ax, 9.7, 3.9, f"joint latent\n$z$, {cfg.latent}-d", PURPLE, 1.7)
    decoder = box(ax, 12.25, 5.2, f"CrystalDecoder\n{cfg.blocks} EGNN blocks\n{count(model.decoder)}", BLUE)
    prop_decoder = box(ax, 12.25, 2.6, f"property decoder\n{count(model.prop_decoder)}", BLUE)
    crystal_out = box(ax, 14.9, 5.2, "crystal", GREEN, 1.5)
    props_out = box(ax, 14.9, 2.6, "properties", ORANGE, 1.5)
    for a, b in ((crystal, encoder), (props, prop_encoder), (encoder, y_c), (prop_encoder, y_p), (y_c, joint), (y_p, joint),
                 (joint, decoder), (joint, prop_decoder), (decoder, crystal_out), (prop_decoder, props_out)):
        arrow(ax, a, b)
    arrow(ax, y_c, y_p, style="<|-|>", color=PURPLE)
    ax.text(7.35, 3.9, "InfoNCE", color=PURPLE, fontsize=8, ha="right", va="center")
    later = ((9.7, "Adam on $z$ toward\ntarget properties", PURPLE), (12.25, "relaxation, hull,\nSUN screening", GREEN),
             (14.9, "DFT, phonons", GREEN))
    chain = [box(ax, x, 0.7, text, color, 2.1, 0.9) for x, text, color in later]
    arrow(ax, joint, chain[0])
    arrow(ax, chain[0], chain[1])
    arrow(ax, chain[1], chain[2])
    return fig


def fusion(early, late):
    """Figure 1b: the branches that exist in an early- and in a late-fusion model."""
    fig, ax = canvas(16, 5.2, "(b) fusion: branches of the two real models")
    for x0, model, name in ((0.2, early, "early fusion"), (8.0, late, "late fusion")):
        ax.text(x0, 4.9, name, fontsize=9, weight="bold", va="center")
        joint = box(ax, x0 + 6.2, 2.4, f"$z$ = mean of {1 + len(model.prop_encoders)}\nembeddings", PURPLE, 1.9)
        names = [", ".join(model.cfg.labels)] if len(model.prop_encoders) == 1 else list(model.cfg.labels)
        rows = [("crystal", model.encoder, GREEN)] + [(n, e, ORANGE) for n, e in zip(names, model.prop_encoders)]
        for (name, module, color), y in zip(rows, ((3.9, 1.4) if len(rows) == 2 else (4.0, 2.4, 0.8))):
            source = box(ax, x0 + 1.0, y, name.replace(", ", "\n"), color, 1.6, 0.9)
            encoder = box(ax, x0 + 3.5, y, f"{'EGNN' if name == 'crystal' else 'MLP'} encoder\n{count(module)}", BLUE, 2.0, 0.9)
            arrow(ax, source, encoder)
            arrow(ax, encoder, joint)
    return fig
