"""What the stored SUN runs say: rates with intervals, and what the choice of cell and start does to them."""

import numpy as np

from . import seeds, sun

CELLS = {"": "symmetrized, ideal", "-free": "as decoded, ideal", "-rattled": "symmetrized, rattled", "-free-rattled": "as decoded, rattled"}
DEEPER = 0.025                                                       # eV/atom: another phase, not the noise of a relaxation


def with_intervals(groups, rates, others=()):
    """seeds.overview of runs {method: runs}, every rate (%) followed by its 95 % interval, the one of the bars of Figure 3b.

    rates, others: {metric: title}; the interval is binomial for as many candidates as the runs are worth (seeds.effective).
    """
    table = seeds.overview(groups, {**rates, **dict(others)})
    for key, title in rates.items():
        bounds = [sun.interval(*seeds.effective(runs, key)) for runs in groups.values()]
        table.insert(table.columns.get_loc(title) + 1, f"{title}, 95 %", [f"{low:.1f} to {high:.1f}" for low, high in bounds])
    return table


def starts(runs, method="ours", seed=0):
    """DataFrame: SUN rates (% of the candidates, novel against training) of one method and seed by geometry and start of the relaxation.

    runs: {"experiment/run": run}; a row for each of CELLS that is stored. Energies are compared (meV/atom) with the first row's, formula
    by formula: the hull is the same, so a difference of two distances to it is one of energies.
    """
    import pandas as pd
    found = {text: runs[name] for tag, text in CELLS.items() if (name := f"sun-{method}{tag}/seed{seed}") in runs}
    first, rows = None, []
    for text, run in found.items():
        energy = {f: e for f, e in zip(run["curve"]["formula"], run["curve"]["e_above_hull"]) if e is not None}
        first = first or energy
        change = np.array([e - first[f] for f, e in energy.items() if f in first])
        rows.append({"method": method, "geometry, start": text, "candidates": run["metrics"]["candidates"]} | _rates(run["metrics"]) | {
            "compared": len(change), "median energy - first row (meV/atom)": 1000 * float(np.median(change)) if len(change) else None,
            f"deeper by {1000 * DEEPER:.0f} meV/atom": int((change < -DEEPER).sum())})
    return pd.DataFrame(rows)


def _rates(m):
    """{column: value} of the SUN rates against training at the two thresholds, each with its binomial interval."""
    out = {}
    for name, limit in sun.THRESHOLDS.items():
        low, high = sun.interval(m[f"count_{name}_training"], m["candidates"])
        out |= {f"SUN at {limit:g} eV/atom (%)": 100 * m[f"count_{name}_training"] / m["candidates"],
                f"95 %, {limit:g} eV/atom": f"{low:.1f} to {high:.1f}"}
    return out
