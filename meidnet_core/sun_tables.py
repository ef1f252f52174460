"""What the stored SUN runs say: their claims, rates with intervals, and what the choice of cell and start does to them."""

import numpy as np

from . import results, seeds, sun

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


def figures():
    """Claims of the stored runs, seed by seed: Figures 3 and S2, the paper's own request, ours over the mean of random sampling (2 to 5
    hits a seed) and of screening. ValueError when the runs are of more than one potential."""
    by_seed = lambda found: {m: {r["seed"]: r["metrics"] for r in runs} for m, runs in found.items()}
    plain, strict = sun.stored(), sun.stored(tag="-new")
    groups, new, retro = map(by_seed, (plain, strict, sun.stored("retrospective")))
    potentials = {r["config"]["potential"] for runs in (*plain.values(), *strict.values()) for r in runs}
    if len(potentials) > 1:
        raise ValueError(f"{results.RESULTS}/sun-*: runs mix potentials: {', '.join(sorted(potentials))}")
    potential = next(iter(potentials), None)
    counts = {m: seeds.values(seeds.distinct(plain.get(m, [])), "count_100_training") for m in ("ours", "random", "screening")}
    others = {m: (counts[m].mean() if len(counts[m]) else 0.0, seeds.rests_on(counts["ours"], counts[m])) for m in ("random", "screening")}
    for seed in sorted(set.intersection(*(set(groups.get(m, {})) for m in ("ours", "random", "screening")))):
        at = ({m: runs[seed] for m, runs in found.items() if seed in runs} for found in (groups, new, retro))
        claims = claims_of(*at, others, potential)
        m = {name: claims[f"x.sun.{name}"]["value"] for name in ("over_random", "over_screening") if f"x.sun.{name}" in claims}
        config = {"potential": potential, "hull": "list", "threshold": sun.THRESHOLDS["100"]}
        results.write_run("sun-figures", f"seed{seed}", config=config, seed=seed, data_set="extended", split="generated",
                          n=groups["ours"][seed]["candidates"], metrics=m, claims=claims, wall_time_s=0.0)


def claims_of(groups, new, retro, others, potential):
    """Rows of one seed from {method: metrics} of the SUN runs, of those that propose what no set holds, and of the retrospective ones.
    others: {method: (mean SUN count, what it rests on)}; a ratio to a method without hits is left out."""
    known, anywhere = (f"({sun.terms(sun.THRESHOLDS['100'], potential, where)})" for where in ("training", "anywhere"))
    ranked = f"generated, ranked by predicted stability {known}"
    held = "OQMD compositions unseen in training (any gap, at most 0.1 eV/atom on the OQMD hull)"
    ours = groups["ours"]["count_100_training"]
    claim = lambda value, split="generated": {"value": float(value), "split": split}
    out = {"f3.n": claim(groups["ours"]["candidates"]), "f3.targets": claim(len(sun.GAPS)), "f3a.distribution": claim(1),
           "f3c.structures": claim(1, "the paper's formulas, drawn"), "s2.n": claim(min(ours, sun.DRAWN)),
           "f3b.sun": claim(groups["ours"]["sun_100_training"], ranked), "f3b.sun_count": claim(ours, ranked)}
    out |= {f"x.sun.over_{m}": claim(ours / usual, f"generated {known}, {rests}") for m, (usual, rests) in others.items() if usual}
    if "paper" in groups:
        out["x.sun.as_asked"] = claim(groups["paper"]["sun_100_training"], f"generated {known}")
    if "ours" in new:
        out["x.sun.strict"] = claim(new["ours"]["sun_100_anywhere"], f"generated {anywhere}")
    if "ours" in retro:
        out["x.retro.enrichment140"] = claim(retro["ours"]["enrichment_140_any gap"], held)
    if {"ours", "screening"} <= set(retro):
        hits = {m: r["enrichment_140_any gap"] for m, r in retro.items()}
        whole = f"; screening with all models has {hits['ensemble']:.1f} times chance" if "ensemble" in hits else ""
        out |= {"x.retro.over_screening": claim(hits["ours"] / hits["screening"], held + whole)} if hits["screening"] else {}
    return out
