"""Is the gap of a proposal the one that was asked for (Figure S3)? An independent CGCNN reads it; held-out crystals say what to expect.

    python -m meidnet_core.gap_check --seeds 5                      # data/results/design-gap, a minute a seed
    python -m meidnet_core.gap_check --candidates                   # what is known of the gaps in data/candidates/candidates.csv

All gaps are PBE (OQMD). Two networks that learn from few cells with a small gap differ by what each of them does not know: how
far the design model is from the labels of cells it has never seen, where it reads such gaps, is the floor of the comparison.
"""

import argparse
import time

import numpy as np

from . import candidate_files, candidates, cgcnn, design, oqmd, results, sun

HITS = (0.1, candidate_files.ON_TARGET, 0.5)                         # eV
LABEL = "pbe_gap"


def held_out(tool, split):
    """(predicted, spread, label) of the PBE gap of OQMD's cells of a split, (M,) each in eV, where the models read a gap near those
    of the paper's request."""
    cells, column = oqmd.part(split), list(oqmd.LABELS).index(LABEL)
    cells = cells.select(np.isfinite(cells.labels[:, column]))
    mean, spread = (v[:, tool.labels.index(LABEL)] for v in design.predict(tool.models, cells))
    near = (mean >= min(sun.GAPS) - tool.tolerance) & (mean <= max(sun.GAPS) + tool.tolerance)
    return mean[near], spread[near], cells.labels[near, column]


def floor(tool, split):
    """{<split>_floor_mae, _median, _cells and the same of the cells about which the models agree}: error against the label, eV."""
    mean, spread, label = held_out(tool, split)
    m = {}
    for name, chosen in (("floor", spread < np.inf), ("floor_sure", spread <= tool.agreement)):
        m[f"{split}_{name}_cells"] = int(chosen.sum())
        if chosen.any():
            error = np.abs(mean - label)[chosen]
            m |= {f"{split}_{name}_mae": float(error.mean()), f"{split}_{name}_median": float(np.median(error))}
    return m


def proposals(tool, seed=0):
    """DataFrame of the nearest proposals to each target with what the design model and the independent CGCNN read; near and sure.

    Each target is asked for by itself: here, unlike in a SUN rate, an earlier target does not use up what a later one needs.
    """
    import pandas as pd
    found = [(w, tool.propose("strict", w, sun.PER_TARGET, seed)) for w in sun.targets("strict")]
    described = lambda w, p: sun.described(tool, p, w).assign(near=tool.missed(p, w) <= tool.tolerance, sure=tool.sure(p, w))
    table = pd.concat([described(w, p) for w, p in found], ignore_index=True)
    numbers, lattice = (np.concatenate([getattr(p.crystals, k) for _, p in found]) for k in ("numbers", "lattice"))
    table["cgcnn"] = cgcnn.predict(cgcnn.independent(), candidates.ideal(numbers, lambda _: lattice[:, 0]))[:, 0]
    return table


def measured(table):
    """Metrics of a table of proposals: misses of the target (eV) and hits (%), of all, of those on target, of the sure ones."""
    miss = (table.cgcnn - table.target).abs()
    m = {"own_mae": float((table.pbe_gap - table.target).abs().mean()), "cgcnn_mae": float(miss.mean()),
         "cgcnn_against_own": float((table.cgcnn - table.pbe_gap).abs().mean())}
    for name, chosen in (("on_target", table.near), ("sure", table.sure)):
        m[name] = int(chosen.sum())
        if chosen.any():
            m[f"cgcnn_mae_{name}"] = float(miss[chosen].mean())
            m |= {f"cgcnn_within_{h:g}_{name}": 100 * float((miss[chosen] <= h).mean()) for h in HITS}
    return m


def hit_rates(table):
    """DataFrame: how far the independent CGCNN is from the target (eV), and hits (%) within HITS, of all proposals of a table (of
    `proposals`, or those of several seeds together), of those on target and of the sure ones; for all targets and for each.

    Beside it how far the same proposals are from the targets of all their kind: what asking for this gap has brought.
    """
    import pandas as pd
    rows = []
    for text, part in (("all", table), ("on target", table[table.near]), ("sure", table[table.sure])):
        for target in ("all", *sun.GAPS):
            chosen = part if target == "all" else part[part.target == target]
            miss = (chosen.cgcnn - chosen.target).abs()
            any_target = np.abs(np.subtract.outer(chosen.cgcnn.to_numpy(), part.target.to_numpy())).mean() if len(chosen) else np.nan
            rows.append((text, str(target), len(miss), chosen.formula.nunique(), miss.mean(), any_target,
                         *(100 * (miss <= h).mean() for h in HITS)))
    names = ["proposals", "target (eV)", "how many", "compositions", "CGCNN: MAE (eV)", "targets exchanged (eV)",
             *(f"within {h} eV (%)" for h in HITS)]
    return pd.DataFrame(rows, columns=names)


def claims_of(table, distinct=None):
    """Rows of Figure S3: miss of the target by the independent CGCNN, of the proposals of which the models are sure.

    distinct: {target, None for all: misses (eV)} of such proposals in all seeds, which share most of theirs: the split then says how many,
    and the row is undecided where so few do not tell whether it holds (interval of their mean).
    """
    miss, claims, reference = (table.cgcnn - table.target).abs()[table.sure], {}, results.read_reference().set_index("id")
    for g in (None, *sun.GAPS):
        v, name = miss if g is None else miss[table.target == g], "s3.gap_mae" if g is None else f"s3.t{int(10 * g):02d}.gap_mae"
        split = "generated, on target, models agree" + (f", {len(distinct[g])} distinct in all seeds" if distinct else "")
        if len(v):
            claims[name] = {"value": float(v.mean()), "split": split,
                            "undecided": bool(distinct) and results.straddles(distinct[g], reference.loc[name])}
    return claims


def restate():
    """The stored runs' claims, with the distinct proposals that all seeds together rest on."""
    import pandas as pd
    runs = [r for r in results.read_runs(results.RESULTS) if r["experiment"] == "design-gap"]
    tables = [pd.DataFrame(r["curve"]) for r in runs]
    sure = pd.concat(t[t.sure] for t in tables).drop_duplicates(["formula", "target"])
    miss = (sure.cgcnn - sure.target).abs()
    distinct = {None: miss} | {g: miss[sure.target == g] for g in sun.GAPS}
    for r, t in zip(runs, tables):
        results.restate("design-gap", r["run"], claims_of(t, distinct))


def write(tool, seed, floors):
    """Writes data/results/design-gap/seed<seed>.json and returns its metrics. floors: of `floor`, the same for all seeds of a tool."""
    start, table = time.time(), proposals(tool, seed)
    m = measured(table) | floors
    config = {"targets": list(sun.GAPS), "per_target": sun.PER_TARGET, "models": len(tool.models), "tolerance": tool.tolerance,
              "agreement": tool.agreement}
    results.write_run("design-gap", f"seed{seed}", config=config, seed=seed, data_set="extended", split="generated", n=len(table),
                      metrics=m, claims=claims_of(table), wall_time_s=time.time() - start,
                      curve=sun.columns(table, "formula target pbe_gap pbe_gap_sd cgcnn stability near sure"))
    return m


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--candidates", action="store_true", help="annotate data/candidates/candidates.csv instead")
    args = parser.parse_args()
    if args.candidates:
        found = candidate_files.annotate()
        return print(f"{found.on_target.sum()} of {len(found)} candidates have a predicted gap on target")
    tool = sun.designer(symmetrize=True)
    floors = floor(tool, "val") | floor(tool, "test")
    for seed in range(args.seeds):
        m = write(tool, seed, floors)
        miss = m.get("cgcnn_mae_sure", float("nan"))
        print(f"seed {seed}: {m['on_target']} on target, {m['sure']} sure; CGCNN off by {miss:.3f} eV", flush=True)
    restate()
    results.write_claims()


if __name__ == "__main__":
    main()
