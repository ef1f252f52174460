"""Table 1 from run files: match rate and RMSE of every method and data set, published and measured here.

    python -m meidnet_core.table1        # who is first -> data/results/table1, claims.csv
"""

import pandas as pd

from . import results

PUBLISHED = results.ROOT / "data" / "reference" / "table1_published.csv"
DATASETS = {"perov_5": "Perov-5", "carbon_24": "Carbon-24", "mp_20": "MP-20"}
# (row of the table, experiment folder, form of the metric names)
METHODS = [("random sites (oracle: true composition and lattice)", "trivial/{}", "random_sites_{}"),
           ("sites of the training cell of nearest shape (same oracle)", "trivial/{}", "nearest_shape_{}"),
           ("ideal sites, mean cell (oracle: elements on their sites)", "data/trivial", "prototype_{}"),
           ("FTCP", "{}-ftcp", "{}"), ("CDVAE, small stand-in of ours", "{}-cdvae-small", "{}"),
           ("MEIDNet, one flow, no memory", "{}-flow", "one_flow_{}"), ("MEIDNet", "{}-flow", "{}"),
           ("MEIDNet", "perov_5-structure", "{}_alone"),
           ("MEIDNet, production, structure alone", "perov_5-production", "{}_alone"),
           ("MEIDNet, production, joint latent (is told both labels)", "perov_5-production", "{}")]

ORDER = [*(m for m, _, _ in METHODS[:5]), "CDVAE", *dict.fromkeys(m for m, _, _ in METHODS[5:])]


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
    return pd.DataFrame(rows)


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
    claim = {"value": min(first.values()), "split": "test, structure alone (ours here; FTCP here and published, CDVAE published)"}
    return results.write_run("table1", "order", config={"rivals": "FTCP here, FTCP and CDVAE as published"}, seed=None,
                             data_set=", ".join(DATASETS), split="test", n=len(first), metrics=first, claims={"t1.first": claim},
                             wall_time_s=0.0)


def table(runs=None):
    """Measured and published side by side, one row per method, one group of columns per data set."""
    published = pd.read_csv(PUBLISHED).rename(columns={"sm": "published SM (%)", "rmse": "published RMSE"}).drop(columns="source")
    ours = measured(runs).rename(columns={"sm": "SM here (%)", "sm_sd": "sd", "sm_default": "SM default (%)", "rmse": "RMSE here"})
    both = ours.merge(published, how="outer", on=["method", "dataset"])
    both["rank"] = both["method"].map(ORDER.index)
    both["set"] = both["dataset"].map(list(DATASETS).index)
    return both.sort_values(["set", "rank"]).drop(columns=["rank", "set"]).reset_index(drop=True)


if __name__ == "__main__":
    record()
    results.write_claims()
