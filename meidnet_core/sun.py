"""Stable, unique, novel: the rate of Figure 3b for the model and for what it must beat, at one budget and one screening.

    python -m meidnet_core.sun --seeds 5                  # every method, 140 candidates a seed; goes on where it was killed
    python -m meidnet_core.sun --methods ours --free      # cells as decoded, not put on ideal sites; with --start rattled: displaced
    python -m meidnet_core.sun --ceiling                  # the whole enumeration; --export: data/candidates; --everywhere: new to every set

Stable: energy above the `list` hull after relaxation of the cubic cell, at 0.1 and 0 eV/atom. Unique: no earlier candidate
of the same method and seed matches after relaxation. Novel: formula absent from training, MP-20, the hull list, all of OQMD.
"""

import argparse
import os
import time

import numpy as np

from . import candidate_files, candidates, experiments, hull, matching, novelty, oqmd, relax, results, seeds, stability
from .config import EXTENDED, EXTENDED_OWN

GAPS, PER_TARGET, ENTHALPY = (0.8, 1.0, 1.2, 1.5), 35, -0.025        # the paper's request: eV, candidates each, eV/atom
THRESHOLDS = {"100": 0.1, "0": 0.0}                                  # meV/atom: eV/atom
BATCH, FEEDBACK_STARTS = 7, 2048                                     # of methods with feedback: candidates chosen at a time, latents
RETRO = "enrichment_140_any gap"                                     # metric of a retrospective run that is claimed
DRAWN = 15                                                           # structures that notebook 11 draws
DECODED = ("ours", "strict", "unmoved", "paper", "gap", "ours-feedback")                # methods whose geometry a decoder gives


def targets(method):
    """The four requests. `paper` and `gap` ask in the labels of Perov-5 as the paper did, the others in PBE gaps."""
    if method in ("paper", "gap"):
        return [{"dir_gap": g, "heat_all": ENTHALPY} for g in GAPS]
    return [{"pbe_gap": g} for g in GAPS]


def designer(seeds=(0, 1, 2), own=False, device="auto", **options):
    """Designer over the committed extended models of `seeds` on a device. CheckpointError when one is not there.

    own: those that learnt the cells relaxed by this project, too; stability is then the distance to the list hull.
    """
    models = [experiments.required((EXTENDED_OWN if own else EXTENDED).with_(seed=s), device) for s in seeds]
    return candidates.Designer(models, oqmd.load("train", stand_in=not own, own=own), **options)


# ---- one method, one seed -----------------------------------------------------------------------

def gather(tool, method, seed=0, per_target=PER_TARGET, **options):
    """Candidates of one method, none of them twice: (cells, DataFrame of what is known before relaxation)."""
    import pandas as pd
    cells, tables, taken = [], [], set()
    for wanted in targets(method):
        p = tool.propose(method, wanted, per_target, seed, avoid=taken, **options)
        taken |= candidates.seen(p.crystals)
        cells += matching.true_cells(p.crystals)
        tables.append(described(tool, p, wanted))
    return cells, pd.concat(tables, ignore_index=True)


def described(tool, p, wanted):
    """DataFrame of what is known of a Proposal before relaxation."""
    import pandas as pd
    read = {l: p.mean[:, i] for i, l in enumerate(tool.labels)} | {f"{l}_sd": p.spread[:, i] for i, l in enumerate(tool.labels)}
    return pd.DataFrame({"formula": formulas(p.crystals), "target": next(iter(wanted.values())), "confidence": p.confidence} | read)


def gather_with_feedback(tool, method, seed, per_target, measure, batch=BATCH):
    """As `gather`, from FEEDBACK_STARTS latents and `batch` by batch: what one taught of its elements shifts the predicted stability of
    the next.

    measure(cells) -> e_above_hull (eV/atom, NaN: none) of relaxed cells. The budget is the same: nothing else is relaxed.
    """
    import pandas as pd
    cells, tables, taken, known, lesson = [], [], set(), [], None
    for wanted in targets(method):
        found = tool.search(candidates.FEEDBACK[method], wanted, seed, FEEDBACK_STARTS)
        for size in [min(batch, per_target - k) for k in range(0, per_target, batch)]:
            p = tool.ranked(found.without(taken), wanted, size, lesson)
            taken |= candidates.seen(p.crystals)
            chosen = matching.true_cells(p.crystals)
            cells += chosen
            tables.append(described(tool, p, wanted))
            residual = np.array(measure(chosen), float) - p.column(tool.stability)
            known += [(z, r) for z, r in zip(p.crystals.numbers, residual) if np.isfinite(r)]
            lesson = candidates.Lesson(*map(np.array, zip(*known))) if len(known) >= batch else None
    return cells, pd.concat(tables, ignore_index=True)


def formulas(crystals):
    return [crystals.formula(i) for i in range(len(crystals))]


def judge(cells, table, rows, correction):
    """Adds e_above_hull (eV/atom), decomposition, status, unique and novelty columns."""
    found = [hull.e_above_hull(r, correction) for r in rows]
    table = table.assign(**{k: [f[k] for f in found] for k in found[0]}, status=[r["status"] for r in rows], unique=novelty.unique(rows))
    new = [novelty.new_to(list(c[1])) for c in cells]
    for reference in novelty.REFERENCES:
        table[f"new_{reference}"] = [n[reference] for n in new]
    table["new_anywhere"] = table[[f"new_{r}" for r in novelty.REFERENCES]].all(axis=1)
    return table


def aim(table, budget, label="pbe_gap"):
    """How far the predicted gap (`label`, that of the request) misses its target (eV), and SUN within 0.2 eV of it (% of the budget)."""
    miss = (table[label] - table.target).abs()
    hit = (table.e_above_hull <= 0.1) & table.unique & table.new_training & (miss <= candidate_files.ON_TARGET)
    return {"gap_miss": float(miss.mean()), "on_target_sun": 100 * float(hit.sum()) / budget}


def rates(table, budget, label="pbe_gap"):
    """SUN rates in % of the budget, {sun_<meV>_<novel against>}, counts, `aim`, and rates that leave one condition out."""
    m = {"candidates": len(table)}
    for name, limit in THRESHOLDS.items():
        stable = table.e_above_hull <= limit
        m[f"stable_{name}"] = 100 * float(stable.sum()) / budget
        for where in (*novelty.REFERENCES, "anywhere"):
            count = int((stable & table.unique & table[f"new_{where}"]).sum())
            m |= {f"sun_{name}_{where}": 100 * count / budget, f"count_{name}_{where}": count}
    m["unique"] = 100 * float(table.unique.sum()) / budget
    m["median_e_above_hull"] = float(table.e_above_hull.median())
    return m | aim(table, budget, label)


def terms(limit, potential, reference="training"):
    """What a SUN rate counts, in words: threshold (eV/atom), hull, potential and what is known (of novelty.REFERENCES, or anywhere)."""
    return f"at most {limit:g} eV/atom on the list hull, {potential}, new to {novelty.SPOKEN[reference]}"


def rate_key(limit, reference="training"):
    """Ending of the metrics of a SUN rate, e.g. "100_training". ValueError for a threshold or a reference that no stored run counts."""
    name = next((k for k, v in THRESHOLDS.items() if abs(v - limit) < 1e-9), None)
    if name is None or reference not in novelty.SPOKEN:
        raise ValueError(f"no rate at {limit} eV/atom, new to {reference!r}: expected one of {', '.join(map(str, THRESHOLDS.values()))} "
                         f"and of {', '.join(novelty.SPOKEN)}")
    return f"{name}_{reference}"


def interval(count, n, level=0.95):
    """Clopper-Pearson interval (%) of a binomial rate."""
    from scipy.stats import binomtest
    low, high = binomtest(count, n).proportion_ci(level)
    return 100 * float(low), 100 * float(high)


def against(ours, other):
    """above | below | not distinguishable from: do the 95 % intervals of two rates, (count, budget) each, lie apart?"""
    (low, high), (other_low, other_high) = interval(*ours), interval(*other)
    return "above" if low > other_high else "below" if high < other_low else "not distinguishable from"


def configuration(tool, method, potential="sevennet-0", per_target=PER_TARGET, start="ideal"):
    """What a run of `run` stands for: stored with it, and compared before it is skipped."""
    return {"potential": potential, "hull": "list", "start": start, "targets": targets(method), "models": len(tool.models),
            "per_target": per_target} | ({} if tool.symmetrize else {"geometry": "decoded"})


def run(tool, method, seed, potential="sevennet-0", per_target=PER_TARGET, tag="", start="ideal", **options):
    """One method and seed: propose, relax from `start` (of relax.STARTS), place, count; returns the table.

    Writes data/results/sun-<method><tag>/seed<seed>.json.
    """
    began, budget = time.time(), per_target * len(GAPS)
    correction = hull.corrections(potential)
    relaxed = lambda cells: relax.relax_all(cells, hull.default_path(potential, "cells"), potential, (start,), **options)[start]
    if method in candidates.FEEDBACK:
        measure = lambda cells: [hull.e_above_hull(r, correction)["e_above_hull"] for r in relaxed(cells)]
        cells, table = gather_with_feedback(tool, method, seed, per_target, measure)
    else:
        cells, table = gather(tool, method, seed, per_target)
    seconds = time.time() - began
    table = judge(cells, table, relaxed(cells), correction)
    m = rates(table, budget, next(iter(targets(method)[0]))) | {"seconds_propose": seconds}
    curve = columns(table, "formula target pbe_gap dir_gap heat_all stability e_above_hull unique new_training new_anywhere status")
    config = configuration(tool, method, potential, per_target, start)
    results.write_run(f"sun-{method}{tag}", f"seed{seed}", config=config, seed=seed, data_set="extended", split="generated", n=budget,
                      metrics=m, claims={}, curve=curve, wall_time_s=time.time() - began)
    return table


def ceiling(tool, potential="sevennet-0", **options):
    """Relax and place every composition of the window that training does not hold: what perfect knowledge could reach.

    Writes data/results/sun-ceiling/window.json: how many are stable, and how well the ensemble ranked them.
    """
    import pandas as pd
    start, pool, budget = time.time(), tool.pool(True), PER_TARGET * len(GAPS)
    cells = matching.true_cells(pool.crystals)
    rows = relax.relax_all(cells, hull.default_path(potential, "cells"), potential, **options)["ideal"]
    plain = {l: pool.mean[:, i] for i, l in enumerate(tool.labels)} | {"formula": formulas(pool.crystals)}
    table = judge(cells, pd.DataFrame(plain), rows, hull.corrections(potential))
    key = table.formula.index.map(lambda i: hull.reduced(cells[i][1]))
    best = table.assign(key=key).sort_values("e_above_hull").drop_duplicates("key")                 # of A/B twins the stabler
    m = {"compositions": len(best), "failed": int(table.e_above_hull.isna().sum()),
         "stability_mae": float((table.e_above_hull - table.stability).abs().mean())}
    for name, limit in THRESHOLDS.items():
        for where in ("training", "anywhere"):
            count = int(((best.e_above_hull <= limit) & best[f"new_{where}"]).sum())
            m |= {f"stable_{name}_{where}": count, f"highest_sun_{name}_{where}": 100 * min(count, budget) / budget}
    config = {"potential": potential, "hull": "list", "start": "ideal", "models": len(tool.models)}
    results.write_run("sun-ceiling", "window", config=config, seed=None, data_set="extended", split="all neutral ABX3 of the window",
                      n=len(table), metrics=m, claims={}, wall_time_s=time.time() - start,
                      curve=columns(table, "formula stability pbe_gap e_above_hull new_anywhere"))
    return table


def columns(table, names):
    """Columns of a table as lists for JSON: four decimals, NaN as None."""
    plain = lambda v: None if v != v else round(v, 4) if isinstance(v, float) else v
    return {k: [plain(v) for v in table[k].tolist()] for k in names.split()}


def export(tool, folder=None, potential="sevennet-0", limit=0.1, **options):
    """Stable, unique, new candidates of `ours`, seed 0: relaxed CIF files and candidates.csv in data/candidates, for checks ab initio."""
    folder = folder or results.ROOT / "data" / "candidates"
    cells, table = gather(tool, "ours", 0)
    rows = relax.relax_all(cells, hull.default_path(potential, "cells"), potential, relax.STARTS, **options)
    correction = hull.corrections(potential)
    table = judge(cells, table, rows["ideal"], correction)
    table["e_above_hull_rattled"] = [hull.e_above_hull(r, correction)["e_above_hull"] for r in rows["rattled"]]
    seen = candidates.counts(tool.train)
    table["cells_with_rarest_element"] = [min(seen.get(e, 0) for e in set(c[1])) for c in cells]
    chosen = table[(table.e_above_hull <= limit) & table.unique & table.new_training].sort_values("e_above_hull")
    cells = [relax.cell_from(rows["ideal"][i]) for i in chosen.index]
    chosen = chosen.assign(potential=potential, hull="list", training_cells=candidates.sightings(chosen.formula, tool.train))
    candidate_files.write(folder, chosen.round(4), cells)
    return chosen


def stored(experiment="sun", tag="", methods=(*candidates.METHODS, *candidates.FEEDBACK)):
    """{method: runs ordered by seed} from data/results/<experiment>-<method><tag>; methods without runs are left out."""
    found = results.read_runs(results.RESULTS)
    groups = {m: sorted((r for r in found if r["experiment"] == f"{experiment}-{m}{tag}"), key=lambda r: r["seed"]) for m in methods}
    return {m: runs for m, runs in groups.items() if runs}


# ---- what the stored runs claim ----------------------------------------------------------------

def figures():
    """Claims of the stored runs, seed by seed: Figures 3 and S2, the paper's own request, ours over the mean of random sampling (2 to 5
    hits a seed) and of screening. ValueError when the runs are of more than one potential."""
    by_seed = lambda found: {m: {r["seed"]: r["metrics"] for r in runs} for m, runs in found.items()}
    plain, strict = stored(), stored(tag="-new")
    groups, new, retro = map(by_seed, (plain, strict, stored("retrospective")))
    potentials = {r["config"]["potential"] for runs in (*plain.values(), *strict.values()) for r in runs}
    if len(potentials) > 1:
        raise ValueError(f"{results.RESULTS}/sun-*: runs mix potentials: {', '.join(sorted(potentials))}")
    potential = next(iter(potentials), None)
    counts = {m: seeds.values(seeds.distinct(plain.get(m, [])), "count_100_training") for m in ("ours", "random", "screening")}
    beside, held_out = {"random": over_window(groups, "count_100_training"), "screening": ""}, over_window(retro, RETRO)
    others = {m: (c.mean() if len(c := counts[m]) else 0.0, seeds.rests_on(counts["ours"], c) + text) for m, text in beside.items()}
    for seed in sorted(set.intersection(*(set(groups.get(m, {})) for m in ("ours", "random", "screening")))):
        at = ({m: runs[seed] for m, runs in found.items() if seed in runs} for found in (groups, new, retro))
        claims = claims_of(*at, others, potential, held_out)
        m = {name: claims[f"x.sun.{name}"]["value"] for name in ("over_random", "over_screening") if f"x.sun.{name}" in claims}
        config = {"potential": potential, "hull": "list", "threshold": THRESHOLDS["100"]}
        results.write_run("sun-figures", f"seed{seed}", config=config, seed=seed, data_set="extended", split="generated",
                          n=groups["ours"][seed]["candidates"], metrics=m, claims=claims, wall_time_s=0.0)


def over_window(groups, key):
    """Ours over random sampling within the tolerance-factor window, means over all seeds of {method: {seed: metrics}}, in words."""
    ours, window = (np.mean([m[key] for m in groups[name].values()] if name in groups else [0.0]) for name in ("ours", "window"))
    return f"; {ours / window:.2g} times random within the tolerance window" if window else ""


def claims_of(groups, new, retro, others, potential, beside=""):
    """Rows of one seed from {method: metrics} of the SUN runs, of those that propose what no set holds, and of the retrospective ones.
    others: {method: (mean SUN count, what it rests on)}; a ratio to a method without hits is left out. beside: what is to be said
    beside the retrospective enrichment."""
    known, anywhere = (f"({terms(THRESHOLDS['100'], potential, where)})" for where in ("training", "anywhere"))
    ranked = f"generated, ranked by predicted stability {known}; unranked: see the paper's own request"
    held = "OQMD compositions unseen in training (any gap, at most 0.1 eV/atom on the OQMD hull)"
    ours = groups["ours"]["count_100_training"]
    claim = lambda value, split="generated": {"value": float(value), "split": split}
    set_so = f"generated, {results.BUILT}"
    out = {"f3.n": claim(groups["ours"]["candidates"], set_so), "f3.targets": claim(len(GAPS), set_so), "f3a.distribution": claim(1),
           "f3c.structures": claim(1, "the paper's formulas, drawn"), "s2.n": claim(min(ours, DRAWN), set_so),
           "f3b.sun": claim(groups["ours"]["sun_100_training"], ranked), "f3b.sun_count": claim(ours, ranked)}
    out |= {f"x.sun.over_{m}": claim(ours / usual, f"generated {known}, {rests}") for m, (usual, rests) in others.items() if usual}
    if "paper" in groups:
        out["x.sun.as_asked"] = claim(groups["paper"]["sun_100_training"], f"generated {known}")
    if "ours" in new:
        out["x.sun.strict"] = claim(new["ours"]["sun_100_anywhere"], f"generated {anywhere}")
    if "ours" in retro:
        out["x.retro.enrichment140"] = claim(retro["ours"][RETRO], held + beside)
    if {"ours", "screening"} <= set(retro):
        hits = {m: r[RETRO] for m, r in retro.items()}
        whole = f"; screening with all models has {hits['ensemble']:.1f} times chance" if "ensemble" in hits else ""
        out |= {"x.retro.over_screening": claim(hits["ours"] / hits["screening"], held + whole)} if hits["screening"] else {}
    return out


# ---- command line -------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(candidates.METHODS),
                        choices=[*candidates.METHODS, *candidates.FEEDBACK])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--potential", default=stability.DEFAULT, help="auto: the best that is present and was fitted to the list hull")
    parser.add_argument("--everywhere", action="store_true", help="propose only formulas that no reference holds (results in sun-*-new)")
    parser.add_argument("--free", action="store_true", help="cells as decoded, not put on ideal sites (results in sun-*-free)")
    parser.add_argument("--start", default="ideal", choices=relax.STARTS, help="rattled: atoms displaced (results in sun-*-rattled)")
    parser.add_argument("--ceiling", action="store_true", help="relax the whole enumeration instead")
    parser.add_argument("--export", action="store_true", help="write data/candidates instead")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.potential = stability.placing(args.potential)
    if args.free and (plain := [m for m in args.methods if m not in DECODED]):
        parser.error(f"--free: {', '.join(plain)} decode no geometry")
    if (args.ceiling or args.export) and (args.free or args.start != "ideal"):
        parser.error("--free and --start go with neither --ceiling nor --export")
    if args.ceiling or args.export:
        return other(args)
    tag = tag_of(args)
    tool = designer(symmetrize=not args.free, known=novelty.known_everywhere() if args.everywhere else frozenset())
    for seed in range(args.seeds):
        for method in args.methods:
            if not results.done(f"sun-{method}{tag}", seed, configuration(tool, method, args.potential, start=args.start)):
                table = run(tool, method, seed, args.potential, tag=tag, start=args.start, processes=args.processes)
                m = rates(table, PER_TARGET * len(GAPS))
                print(f"{method}/seed{seed}: SUN {m['sun_100_training']:.1f} %, new anywhere {m['sun_100_anywhere']:.1f} %", flush=True)
    if not args.free and args.start == "ideal":                       # the others carry no claims
        figures()
        results.write_claims()


def tag_of(args):
    """Ending of the experiments of a command line: each kind of run has its own; the one without has most claims."""
    tag = ("-new" if args.everywhere else "") + ("-free" if args.free else "")
    return tag + "".join(f"-{v}" for v, usual in ((args.start, "ideal"), (args.potential, stability.DEFAULT)) if v != usual)


def other(args):
    tool = designer(symmetrize=True)
    if args.ceiling:
        ceiling(tool, args.potential, processes=args.processes)
    if args.export:
        export(tool, potential=args.potential, processes=args.processes)
        candidate_files.annotate()
    results.write_claims()


if __name__ == "__main__":
    main()
