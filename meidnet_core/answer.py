"""What a user who asks for crystals is told: those whose own structure meets the request, or that there are none and which came closest."""

import numpy as np

from . import crystal
from .candidates import GAP_LABELS, first_of_each, sightings

NEAREST = 5                    # crystals that an empty answer shows


class NothingFound(ValueError):
    """No crystal meets the request; `nearest` holds the ones that came closest."""

    def __init__(self, message, nearest):
        super().__init__(message)
        self.nearest = nearest


def on_target(designer, target, count, **options):
    """`ours`, only crystals whose own structure predicts every label of the target, those first of which the models are `sure`.

    Checked (Designer.within): gaps to designer.tolerance (eV), energies to candidates.ENERGY_TOLERANCE (eV/atom); a stability may
    always be lower. options: of Designer.search. NothingFound (with the nearest) when there is none.
    """
    found = designer.search("ours", target, **options)
    good = designer.within(found, target)
    if not good.any():
        raise nothing(designer, found, target)
    found = designer.ranked(found.select(good), target, None)
    return found.select(np.argsort(~designer.sure(found, target), kind="stable")[:count])


def nothing(designer, found, target):
    """NothingFound: what was asked, how many crystals were looked at, and those that miss it least, in units of what is allowed."""
    unit = {l: "eV" if l in GAP_LABELS else "eV/atom" for l in target}
    far = [v / designer.allowed(l) for l, v in designer.misses(found, target).items()]
    looked = first_of_each(found.select(np.argsort(np.max([np.zeros(len(found.mean)), *far], 0), kind="stable")))
    miss = designer.misses(looked.select(slice(NEAREST)), target)
    told = [f"{v[0]:.2f} {unit[l]} ({l})" for l, v in miss.items() if len(v)]
    limits = dict.fromkeys(f"{designer.allowed(l)} {unit[l]}" for l in target)
    return NothingFound(f"no crystal within {' and '.join(limits)} of {target}; {len(looked.mean)} distinct new ones were looked at"
                        + (f", the nearest misses by {' and '.join(told)}" if told else ""), looked.select(slice(NEAREST)))


def report(tool, found, target):
    """What is known of a Proposal before relaxation, for a reader: DataFrame, a row a crystal, of predictions, geometry, elements seen.

    a: edge of the cube of the decoded volume (angstrom). off sites: largest distance of a decoded atom from its ideal site (angstrom).
    """
    import pandas as pd
    c = found.crystals
    edge = np.cbrt(c.volume)
    shift = np.linalg.norm(crystal.wrap(c.frac - crystal.PEROVSKITE), axis=2) * edge[:, None]
    predicted = {f"{l} (predicted)": v for l, v in zip(tool.labels, found.mean.T)}
    table = pd.DataFrame({"formula": [c.formula(i) for i in range(len(c))]} | predicted)
    table = table.assign(**{"confidence": found.confidence, "a (Å)": edge, "off sites (Å)": shift.max(1)})
    if len(tool.models) > 1:
        spread = {f"{l} spread": found.spread[:, tool.labels.index(l)] for l in target}
        table = table.assign(**spread, sure=tool.sure(found, target))
    table["training cells"] = sightings(table.formula, tool.train)
    return table.round(3)


def brief(table, target):
    """Columns of a `report` (with those of stability.placed, where they were joined) that a page has room for, what was asked for first."""
    asked = [f"{l} {what}" for l in target for what in ("(predicted)", "spread")]
    order = ["formula", *asked, "sure", "e_above_hull", "rattled", "a (Å)", "relaxed a", "off sites (Å)", "confidence", "training cells",
             "falls apart into"]
    return table[[name for name in order if name in table]]
