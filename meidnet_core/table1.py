"""Table 1 from run files: match rate and RMSE of every method and data set, published and measured here.

    python -m meidnet_core.table1                # who is first -> data/results/table1, claims.csv
    python -m meidnet_core.table1 rule mp_20 --cells 2000     # the committed models by the whole rule of CDVAE's code (minutes)
"""

import argparse
import time

import numpy as np
import pandas as pd

from . import data, experiments, large_cells, matching, metrics, results, trial
from .config import STRUCTURE

PUBLISHED = results.ROOT / "data" / "reference" / "table1_published.csv"
DATASETS = {"perov_5": "Perov-5", "carbon_24": "Carbon-24", "mp_20": "MP-20"}
# (row of the table, experiment folder, form of the metric names)
METHODS = [("random sites (oracle: true composition and lattice)", "trivial/{}", "random_sites_{}"),
           ("random sites (oracle: true composition and lattice)", "data/trivial", "random_coords_{}"),
           ("sites of the training cell of nearest shape (same oracle)", "trivial/{}", "nearest_shape_{}"),
           ("ideal sites, mean cell (oracle: elements on their sites)", "data/trivial", "prototype_{}"),
           ("FTCP", "{}-ftcp", "{}"), ("CDVAE, small stand-in of ours", "{}-cdvae-small", "{}"), ("CDVAE", "{}-cdvae", "{}"),
           ("MEIDNet, one flow, no memory", "{}-flow", "one_flow_{}"), ("MEIDNet", "{}-flow", "{}"),
           ("MEIDNet", "perov_5-structure", "{}_alone"),
           ("MEIDNet, production, structure alone", "perov_5-production", "{}_alone"),
           ("MEIDNet, production, joint latent (is told both labels)", "perov_5-production", "{}")]

ORDER = list(dict.fromkeys(m for m, _, _ in METHODS))


def runs_of(runs, experiment):
    """Runs of "folder" or of "folder/run"."""
    folder, _, name = experiment.partition("/")
    return [r for r in runs if r["experiment"] == folder and (not name or r["run"] == name)]


def measured(runs=None):
    """One row per data set and method with a run: mean and spread over seeds of SM (%) and RMSE on the test split.

    Every row but the last sees the structure alone. For Perov-5 the row MEIDNet is the model `structure`, elsewhere the set
    autoencoder. Columns: dataset, method, sm, sm_sd, sm_default, rmse, seeds, cells (scored), epochs (trained).
    """
    runs = results.read_runs(results.RESULTS) if runs is None else runs
    rows = []
    for dataset in DATASETS:
        for method, experiment, form in METHODS:
            found = [r for r in runs_of(runs, experiment.format(dataset)) if r["data_set"] == dataset]
            if found and not (method == "MEIDNet" and dataset == "perov_5" and experiment.endswith("-flow")):
                rows.append({"dataset": dataset, "method": method, **summary(found, form)})
    return pd.DataFrame([row for row in rows if np.isfinite(row["sm"])])


def summary(found, form):
    """Means over runs; sd is empty for a single run."""
    m = pd.DataFrame([r["metrics"] for r in found])
    column = lambda key: m[form.format(key)] if form.format(key) in m else pd.Series(dtype=float)
    return {"sm": column("sm_cdvae").mean(), "sm_sd": column("sm_cdvae").std(), "sm_default": column("sm_default").mean(),
            "rmse": column("rmse_cdvae").mean(), "seeds": len(found), "cells": found[0]["n"], "epochs": found[0]["config"].get("epochs")}


def record():
    """data/results/table1/order.json: is ours, from the structure alone, first on every data set, against what is published and FTCP
    trained here?"""
    here, published = measured()[["dataset", "method", "sm"]], pd.read_csv(PUBLISHED)[["dataset", "method", "sm"]]
    rivals = pd.concat([here[here.method == "FTCP"], published[published.method.isin(["FTCP", "CDVAE"])]])
    ours = here[here.method == "MEIDNet"].set_index("dataset").sm
    first = {d: float(ours[d] > max(rivals.sm[rivals.dataset == d])) for d in DATASETS}
    models = "Perov-5: MEIDNet; Carbon-24, MP-20: set autoencoder with a memory; FTCP here and published, CDVAE published"
    claim = {"value": min(first.values()), "split": f"test, structure alone ({models})"}
    return results.write_run("table1", "order", config={"rivals": "FTCP here, FTCP and CDVAE as published"}, seed=None,
                             data_set=", ".join(DATASETS), split="test", n=len(first), metrics=first, claims={"t1.first": claim},
                             wall_time_s=0.0)


def committed(dataset, count=None):
    """Match rates by each committed model of the row MEIDNet, from the structure alone, on `count` test cells (the same for every model,
    all by default): yields matching.score."""
    if dataset == "perov_5":
        splits = experiments.prepare(STRUCTURE)
        rows = trial.chosen(len(splits.crystals["test"]), count)
        few, tensors = splits.crystals["test"].select(rows), trial.subset(splits.tensors["test"], count)
        for seed in range(3):
            model = experiments.required(STRUCTURE.with_(seed=seed))
            cells = metrics.decode(model, metrics.encode(model, tensors)["y_c"], model.shape.elements)[0]
            yield matching.score(cells, matching.true_cells(few))[0]
        return
    crystals = {s: data.load(dataset, s) for s in ("train", "test")}
    crystals["test"] = crystals["test"].select(trial.chosen(len(crystals["test"]), count))
    for path in sorted((large_cells.CHECKPOINTS / "flow").glob(f"{dataset}_flow_seed*.safetensors")):
        model = large_cells.load_model(path)[0]
        groups = {s: large_cells.buckets(c, model.elements) for s, c in crystals.items()}
        yield large_cells.evaluate(model, groups, crystals, seed=0)


def record_rule(dataset, count=None):
    """data/results/table1/rule-<dataset>.json: `committed` with the whole rule of CDVAE's code, mean and spread over its models, and the
    rule's ceiling on the whole test split."""
    start, found, test = time.time(), pd.DataFrame(committed(dataset, count)), matching.true_cells(data.load(dataset, "test"))
    ceiling = 100 * np.mean([matching.allowed(symbols) for _, symbols, _ in test])
    m = {"sm_cdvae": found.sm_cdvae.mean(), "sm_rule": found.sm_rule.mean(), "sm_rule_ceiling": ceiling, "sm_rule_sd": found.sm_rule.std(),
         "models": len(found)}
    m = {k: float(v) for k, v in m.items() if np.isfinite(v)}                # one model has no spread
    return results.write_run("table1", f"rule-{dataset}", config={"states": matching.STATES, "cells": count}, seed=None,
                             data_set=dataset, split="test", n=min(count or len(test), len(test)), metrics=m, claims={},
                             wall_time_s=time.time() - start)


def beside(frame):
    """The row MEIDNet of `table` by data set: published and here, what no model reaches (random sites under the true composition and
    lattice), the better oracle, and what CDVAE's whole rule makes of it, with its ceiling (%; empty where `record_rule` has not run)."""
    runs = {r["data_set"]: r for r in results.read_runs(results.RESULTS / "table1") if r["run"].startswith("rule-")}
    rows = []
    for dataset, name in DATASETS.items():
        of = frame[frame.dataset == dataset].set_index("method")["SM here (%)"]
        ours, run = frame[(frame.dataset == dataset) & (frame.method == "MEIDNet")].iloc[0], runs.get(dataset, {})
        rule = run.get("metrics", {})
        rows.append({"data set": name, "published (%)": ours["published SM (%)"], "here (%)": ours["SM here (%)"], "sd": ours["sd"],
                     "trivial (%)": of.filter(like="random sites").max(), "best oracle (%)": of.filter(like="oracle").max(),
                     "ceiling (%)": 100.0, "here, whole rule (%)": rule.get("sm_rule"), "sd, whole rule": rule.get("sm_rule_sd"),
                     "its ceiling (%)": rule.get("sm_rule_ceiling"), "models": rule.get("models"), "cells": run.get("n")})
    return pd.DataFrame(rows)


def table(runs=None):
    """Measured and published side by side, one row per method, one group of columns per data set."""
    published = pd.read_csv(PUBLISHED).rename(columns={"sm": "published SM (%)", "rmse": "published RMSE"}).drop(columns="source")
    ours = measured(runs).rename(columns={"sm": "SM here (%)", "sm_sd": "sd", "sm_default": "SM default (%)", "rmse": "RMSE here"})
    both = ours.merge(published, how="outer", on=["method", "dataset"])
    both["rank"] = both["method"].map(ORDER.index)
    both["set"] = both["dataset"].map(list(DATASETS).index)
    return both.sort_values(["set", "rank"]).drop(columns=["rank", "set"]).reset_index(drop=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="order", choices=["order", "rule"])
    parser.add_argument("datasets", nargs="*", help="of the rule; default: all three")
    parser.add_argument("--cells", type=int, help="of the test split that are decoded; default: all")
    args = parser.parse_args()
    wrong = sorted(set(args.datasets) - set(DATASETS))
    if wrong:
        parser.error(f"no data set {', '.join(wrong)}: choose from {', '.join(DATASETS)}")
    if args.what == "rule":
        for dataset in args.datasets or DATASETS:
            print(record_rule(dataset, args.cells))
    else:
        record()
    results.write_claims()


if __name__ == "__main__":
    main()
