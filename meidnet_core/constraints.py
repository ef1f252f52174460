"""Physical constraints as differentiable training terms (methodology, Figure S4), and what they do to learning and breadth.

Four penalties on the decoder's output, each zero where a perovskite A B X X X (canonical order of crystal.py) obeys:
charge neutrality, cation and anion roles, shortest distance, Goldschmidt tolerance factor. torch and numpy on top.

    python -m meidnet_core.constraints --seeds 3 --minutes 15      # both regimes, three seeds; goes on where it was killed
"""

import argparse
import copy
import hashlib
import json
import os
import time

import numpy as np
import torch
from torch.nn import functional as F

from . import checkpoint, crystal, data, maps, matching, metrics, results
from .config import IMPROVED
from .experiments import RUNS, prepare
from .ions import COMMON, tables
from .losses import total_loss
from .model import MEIDNet
from .perovskite import SHORTEST, WINDOW, of_crystals, per_cell
from .seeds import crossing
from .train import bar, make_optimizer, shape_of, train_epoch

TERMS = ("charge", "roles", "distance", "tolerance")
LEVEL = 96.8                   # % (Figure S4)


# ---- in training --------------------------------------------------------------------------------

def constraint_terms(out, model, batch, consistent=False):
    """Means over the batch of the four terms of a decoder output `out` (species logits, lattice, frac), dict of scalars.

    consistent=True counts a cell only in the constraints that the true crystal obeys: the term then never
    asks for something else than the reconstruction does. ValueError for cells that are no perovskites.
    """
    if model.shape.padded:
        raise ValueError("the constraints are written for perovskites A B X X X, this model has empty sites")
    tab = tables(tuple(model.shape.elements), out["frac"].device.type)
    terms = per_cell(torch.softmax(out["species"], -1), out["lattice"] * model.lattice_std + model.lattice_mean, out["frac"], tab)
    if consistent:
        truth = per_cell(F.one_hot(batch["species"], model.shape.classes).float(), batch["lattice"], batch["frac"], tab)
        terms = {k: v * (truth[k] < 1e-4) for k, v in terms.items()}
    return {k: v.mean() for k, v in terms.items()}


def constrained_loss(weights, consistent=False):
    """total_loss plus weighted constraints: an objective for train_epoch. ValueError for an unknown term."""
    if set(weights) - set(TERMS):
        raise ValueError(f"unknown constraints {', '.join(sorted(set(weights) - set(TERMS)))}: expected some of {', '.join(TERMS)}")

    def objective(model, batch, alpha):
        seen = []                                        # total_loss keeps the decoder's output for itself
        hook = model.decoder.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            loss, terms = total_loss(model, batch, alpha)
        finally:
            hook.remove()
        extra = constraint_terms(seen[0], model, batch, consistent)
        loss = loss + sum(w * extra[k] for k, w in weights.items())
        return loss, terms | {k: v.detach() for k, v in extra.items()} | {"loss": loss.detach()}
    return objective


# ---- the experiment of Figure S4 ----------------------------------------------------------------

# The small model of the quick profile, on a schedule that should pass LEVEL before its end (14 epochs end below it, see the
# lab notes). What the preset may change later is fixed here.
CONFIG = IMPROVED.with_(
    name="constraints", width=64, edge_width=32, batch=64, epochs=22, temperature=0.2, w_con=0.3, w_align=0.0, prop_head=False,
    prop_l1=False, exchange=0.0, structure_only=0.0, latent_noise=0.0, label_noise=0.0)
# Perov-5 obeys roles and distance throughout. Charge and tolerance it mostly does not: their weights are as large as they can be
# while the true crystal stays the optimum of cross-entropy (1/5 per site) plus constraint: 0.02 * 7 e + 0.1 * 0.42 < 0.2.
WEIGHTS = {"charge": 0.02, "roles": 1.0, "distance": 1.0, "tolerance": 0.1}


@torch.no_grad()
def exact_composition(model, tensors, block=1024):
    """Percentage of crystals whose five elements are all right from the joint latent; SM at CDVAE tolerances to 0.1 points."""
    right = 0
    for k in range(0, len(tensors["species"]), block):
        batch = {key: t[k:k + block] for key, t in tensors.items()}
        right += int((model(batch)["species"].argmax(-1) == batch["species"]).all(1).sum())
    return 100 * right / len(tensors["species"])


class Watch:
    """An objective that now and then looks at the averaged weights: once an epoch, four times where it matters.

    curve: (epochs, exact composition in %) pairs; reached: copy of the model at the first look at or above LEVEL.
    """

    def __init__(self, objective, average, tensors, steps):
        self.objective, self.average, self.tensors, self.steps = objective, average.eval(), tensors, steps
        self.count, self.curve, self.reached = 0, [], None

    def look(self):
        self.curve.append((self.count / self.steps, exact_composition(self.average, self.tensors)))
        if self.reached is None and self.curve[-1][1] >= LEVEL:
            self.reached = copy.deepcopy(self.average)

    def __call__(self, model, batch, alpha):
        close = self.curve and self.curve[-1][1] > 60 and self.reached is None
        if self.count and self.count % (max(1, self.steps // 4) if close else self.steps) == 0:
            self.look()
        self.count += 1
        return self.objective(model, batch, alpha)


def epochs_to(curve, level=LEVEL):
    """Epochs at which a curve first reaches a level, see seeds.crossing; None (JSON has no inf) when it never does."""
    epochs = crossing(curve, level)
    return epochs if np.isfinite(epochs) else None


def learn(cfg, splits, objective, train_cells=None, progress=True):
    """Train through train_epoch, watched on `val`, until LEVEL is reached or the epochs are over.

    Returns (averaged model, at LEVEL if it got there; Watch; seconds of training and looks).
    """
    tensors = {k: t[:train_cells] for k, t in splits.tensors["train"].items()}
    torch.manual_seed(cfg.seed)
    model, start = MEIDNet(cfg, shape_of(tensors, splits.elements, cfg)).to(tensors["frac"].device), time.perf_counter()
    average, optimizer = copy.deepcopy(model).requires_grad_(False), make_optimizer(model, cfg)
    watch = Watch(objective, average, splits.tensors["val"], -(-len(tensors["species"]) // cfg.batch))
    for epoch in bar(range(cfg.epochs), cfg, 0, progress):
        record = train_epoch(model, average, optimizer, tensors, cfg, epoch, watch)
        if not np.isfinite(record["loss"]):
            raise ValueError(f"loss became {record['loss']} in epoch {epoch} (seed {cfg.seed}); lower the constraint weights")
        if watch.reached is not None:
            return watch.reached, watch, time.perf_counter() - start
    watch.look()
    return average, watch, time.perf_counter() - start


def breadth(model, train_tensors, train_crystals, kind, count=2000, seed=0):
    """What random latents decode to: maps.breadth, the decoder's confidence, and how many obey each constraint (%)."""
    z = maps.random_latents(metrics.encode(model, train_tensors)["z"], count, kind, seed)
    raw = {k: v.cpu().numpy() for k, v in model.decode(torch.from_numpy(z).to(model.lattice_mean.device)).items()}
    numbers = crystal.atomic_numbers(model.shape.elements)[raw["species"]]
    ok = {k: v < 1e-4 for k, v in of_crystals(numbers, raw["lattice"], raw["frac"]).items()}
    return maps.breadth(numbers, train_crystals) | {
        "confidence": float(raw["confidence"].mean()), "distinct_neutral": maps.breadth(numbers[ok["charge"]], train_crystals)["distinct"],
        **{f"{k}_obeyed": 100 * float(v.mean()) for k, v in ok.items()}}


def trained(cfg, splits, weights, consistent=False):
    """One regime: (model, {curve, seconds}) as `learn`, from runs/ when the same was trained before."""
    what = json.dumps([cfg.to_dict(), weights, consistent, SHORTEST, WINDOW, COMMON, LEVEL], sort_keys=True)
    path = RUNS / f"constraints_{hashlib.sha256(what.encode()).hexdigest()[:12]}_seed{cfg.seed}.safetensors"
    if not path.exists():
        model, watch, seconds = learn(cfg, splits, constrained_loss(weights, consistent) if weights else total_loss)
        checkpoint.save_model(path, model, curve=watch.curve, seconds=seconds, weights=weights, consistent=consistent)
    return checkpoint.load_model(path)


def measure(model, meta, splits, processes=1):
    """Epochs to LEVEL (on `val`); SM on `test` and breadth of the model at that moment (or at the end if it never came)."""
    test, cells = splits.tensors["test"], matching.true_cells(splits.crystals["test"])
    decoded = metrics.decode(model, metrics.encode(model, test)["z"], splits.elements)[0]
    out = {"curve": meta["curve"], "epochs_to_level": epochs_to(meta["curve"]), "seconds": meta["seconds"],
           "exact_composition": exact_composition(model, test)} | matching.summary(matching.match(decoded, cells, processes=processes))
    return out | {kind: breadth(model, splits.tensors["train"], splits.crystals["train"], kind) for kind in ("mixture", "gaussian")}


def claims_of(free, bound):
    """Rows of paper.csv from one seed's two regimes.

    Faster and narrower are decided by more than what the measurement resolves: a quarter epoch (the distance between
    looks), and 2 % of the latents (two standard errors of a count). None where a regime never reached LEVEL: nothing equal to compare.
    Quality is never decided: both stop at one level, so what differs is where between two looks they stopped.
    """
    if None in (free["epochs_to_level"], bound["epochs_to_level"]):
        return {}
    narrower = float(bound["mixture"]["distinct"] < free["mixture"]["distinct"] - 40)
    faster = float(bound["epochs_to_level"] < free["epochs_to_level"] - 0.25)
    better = float(bound["sm"] > free["sm"] and bound["rmse"] < free["rmse"])
    return {"s4.narrower": {"value": narrower, "split": "decoded random latents"}, "s4.faster": {"value": faster, "split": "val"},
            "s4.quality": {"value": better, "split": "test, both trained until val has the level", "undecided": True},
            "s4.sm_level": {"value": (free["sm"] + bound["sm"]) / 2, "split": "test, told both labels, trained until val has it"}}


def shares(crystals):
    """How many cells of a data set (%) obey each constraint, by the list of states; stable: at most 0.1 eV/atom above others."""
    heat = crystals.labels[:, crystals.label_names.index("heat_all")]
    out = {"stable_cells": int((heat <= 0.1).sum())}
    for common in ("low", COMMON, "main"):
        obeyed = {k: v < 1e-4 for k, v in of_crystals(crystals.numbers, crystals.lattice, crystals.frac, common).items()}
        groups = {"charge": obeyed["charge"]} if common != COMMON else obeyed | {"all": np.all(list(obeyed.values()), 0)}
        for name, ok in groups.items():
            out |= {f"{name}_{common}": 100 * float(ok.mean()), f"{name}_{common}_stable": 100 * float(ok[heat <= 0.1].mean())}
    return out


def record_shares(splits):
    """data/results/constraints-data/perov_5.json: what the training can learn from the constraints."""
    start, crystals = time.time(), data.concatenate(list(splits.crystals.values()), "all")
    results.write_run("constraints-data", "perov_5", config={"shortest": SHORTEST, "window": WINDOW}, seed=None, data_set="perov_5",
                      split="all", n=len(crystals), metrics=shares(crystals), claims={}, wall_time_s=time.time() - start)


REGIMES = {"unconstrained": ({}, False), "constrained": (WEIGHTS, False)}
CONSISTENT = {"unconstrained": ({}, False), "consistent": ({"charge": 0.3, "roles": 1.0, "distance": 1.0, "tolerance": 1.0}, True)}


def record(seed, splits, deadline, regimes, experiment="constraints"):
    """data/results/<experiment>/seed<k>.json, unless it is there: the regimes of one seed; False when time.time() passes the deadline."""
    cfg, found = CONFIG.with_(seed=seed), {}
    config = cfg.to_dict() | {"regimes": regimes}
    if results.done(experiment, seed, config):
        return True
    for name, (weights, consistent) in regimes.items():
        if time.time() > deadline:
            return False
        found[name] = measure(*trained(cfg, splits, weights, consistent), splits)
    claims = claims_of(found["unconstrained"], found["constrained"]) if "constrained" in found else {}
    results.write_run(experiment, f"seed{seed}", config=config, seed=seed, data_set=cfg.dataset, split="test",
                      n=len(splits.crystals["test"]), metrics=found, claims=claims, wall_time_s=sum(r["seconds"] for r in found.values()))
    return True


def restate():
    """The claims of the stored runs, from their own measurements."""
    for r in results.read_runs(results.RESULTS):
        if r["experiment"] == "constraints":
            results.restate("constraints", r["run"], claims_of(r["metrics"]["unconstrained"], r["metrics"]["constrained"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30, help="start no training after this long; call again to go on")
    parser.add_argument("--consistent", action="store_true", help="constrain only where the true crystal obeys (constraints-consistent)")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    splits, deadline = prepare(CONFIG, "cpu"), time.time() + 60 * args.minutes
    record_shares(splits)
    choice = (CONSISTENT, "constraints-consistent") if args.consistent else (REGIMES, "constraints")
    done = [record(seed, splits, deadline, *choice) for seed in range(args.seeds)]
    restate()
    results.write_claims()
    print(f"{sum(done)} of {args.seeds} seeds recorded")


if __name__ == "__main__":
    main()
