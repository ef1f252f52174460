"""Campaigns: the trainings behind Figure S1 (latent), Figure 2a (fusion), Figure 2b (curriculum); `seeds.py` compares them. And `reading`:
early fusion with one choice changed at a time, of the paper's settings with `--preset paper-clean --epochs 20`.

    python -m meidnet_core.campaign latent                                        # `sweep`: about a minute a run, one CPU thread
    python -m meidnet_core.campaign latent --preset improved --variants 64 128 256  # at full length: seven minutes a run
    python -m meidnet_core.campaign fusion --preset paper --epochs 200 --seeds 5  # the protocol of the paper (GPU)

A campaign is a table of runs. Runs whose JSON is there are skipped and an unfinished training goes on from runs/, so
a campaign can be killed at any time. A configuration that another campaign has already run is not run twice.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from . import abreast, checkpoint, experiments, results
from .config import IMPROVED, PAPER, PAPER_CLEAN, PAPER_SCALED, PRESETS, Config
from .seeds import best, curves, epochs_to, largest_gain, p_value, paired, values
from .train import Diverged
from .trial import TEST_CELLS, VAL_CELLS, curve_of, held_out_reconstruction, last_finite, subset, tested, trained

# About 75 s a run on one CPU thread, in place of the 500 (Figure S1) and 200 (Figure 2a) epochs of the paper. Without the
# noise that `improved` needs for its long schedule: with it a run ends at SM 28 % instead of 60 %.
SWEEP = IMPROVED.with_(name="sweep", width=64, edge_width=32, batch=64, epochs=12, latent_noise=0.0, label_noise=0.0, dropout=0.0)
FULL = {"latent": 500, "fusion": 200, "curriculum": 200}               # epochs of the paper
SEEDS = {"latent": 3, "fusion": 5, "curriculum": 3, "reading": 1}
DIMENSIONS = (16, 32, 64, 128, 256, 512)
PAPER_DIMENSIONS = (64, 128, 256)                                       # the three that the paper compares
FUSIONS = {"lf": {"fusion": "late", "curriculum": "none"}, "ef": {"curriculum": "none"}, "efcl": {}}
NEEDED = {"latent": tuple(map(str, PAPER_DIMENSIONS)), "fusion": tuple(FUSIONS), "curriculum": ("none", "exp67")}   # by the claims
BEYOND = {"fusion": ("cosine", "l2d", "sm_cdvae")}                      # what `improved` answers besides, in rows x.<id>
COMPARING = ("best", "first", "speedup")                                # endings of the run files that compare variants
READINGS = {"clip": {"clip": 1.0}, "warm": {"temperature": 1.0}, "units": {"unit_lattice": True}, "standard": {"normalize": True},
            "coords": {"w_coords": 30.0}, "sites": {"site_init": True}, "residual": {"residual": True}}
READINGS["together"] = {k: getattr(PAPER_SCALED, k) for k in ("clip", "temperature", "normalize", "w_coords", "residual")}
READINGS["code"] = {"unit_lattice": True, "site_init": True, "blocks": 2, "temperature": 0.01, "w_con": 5.0}
RAMPS = {33: 1 / 3, 67: 2 / 3, 100: 1.0}                                # % of the epochs in which the weight rises
LEVELS = (32.0, 50.0, 90.0, 96.8)                                       # SM (%) whose epoch is compared
CLAIM_LEVEL = 32.0                                                      # answers f2b.speedup: where the paper's EF ends (Figure 2a)


@dataclass(frozen=True)
class Entry:
    """One run: data/results/<experiment>/<run>.json; claims maps ids of paper.csv to metrics of the test split."""

    experiment: str
    cfg: Config
    claims: dict = field(default_factory=dict)
    variant: str = ""

    @property
    def run(self):
        return f"seed{self.cfg.seed}"

    @property
    def path(self):
        return results.RESULTS / self.experiment / f"{self.run}.json"

    @property
    def state(self):
        """Where an unfinished training lies."""
        return experiments.RUNS / f"{self.experiment}-{self.run}.safetensors"

    @property
    def done(self):
        """A run file of exactly this configuration is there; one of another configuration is replaced."""
        return results.done(self.experiment, self.cfg.seed, self.cfg.to_dict())


def tag_of(name, base):
    """"" for the sweep of this book, else preset and epochs, e.g. "paper200-": other protocols go to other folders."""
    return "" if base == SWEEP else f"{base.name}{base.epochs}-"


def table(name, base=SWEEP, seeds=None, answers=None):
    """The runs of a campaign, in the order in which they run. answers: do they answer rows of paper.csv? By default those of the sweep."""
    answers = base == SWEEP if answers is None else answers
    if name not in SEEDS:
        raise ValueError(f"campaign {name!r}: expected one of {', '.join(SEEDS)}")
    variants = {"latent": _latent, "fusion": _fusion, "curriculum": _curriculum, "reading": _reading}[name](seeds or SEEDS[name])
    rows = [Entry(f"{name}-{tag_of(name, base)}{variant}", base.with_(seed=seed, **changes), claims if answers else {}, variant)
            for variant, changes, claims, count in variants for seed in range(count)]
    return sorted(rows, key=lambda entry: entry.cfg.seed)              # all variants of a seed first: a cut campaign compares


def _latent(seeds):
    claims = {d: {f"s1.dim{d}.sm": "sm_cdvae"} for d in PAPER_DIMENSIONS}
    claims[128]["s1.loss"] = "reconstruction"
    return [(str(d), {"latent": d}, claims.get(d, {}), seeds) for d in DIMENSIONS]


def _fusion(seeds):
    keys = {"cs": "cosine", "l2d": "l2d", "sm": "sm_cdvae", "r2": "joint_r2"}
    return [(v, changes, {f"f2a.{v}.{k}": metric for k, metric in keys.items()}, seeds) for v, changes in FUSIONS.items()]


def _curriculum(seeds):
    """The pair behind the 60-fold claim gets two more seeds; `cold` repeats it where the contrastive term pulls hardest."""
    rows = [("none", {"curriculum": "none"}, {}, seeds + 2)]
    rows += [(f"{kind}{p}", {"curriculum": kind, "ramp": ramp}, {}, seeds + 2 * (kind == "exp" and p == 67))
             for kind in ("exp", "linear") for p, ramp in RAMPS.items()]
    cold = {"temperature": 0.07}
    return rows + [("cold-none", cold | {"curriculum": "none"}, {}, seeds), ("cold-exp67", cold, {}, seeds)]


def _reading(seeds):
    """EF from the paper's settings with one choice changed at a time; `code`: scales, sites, depth and contrast of the authors' code
    (github.com/ABnano/MEIDNet, tri_curri_v1_save.py, a later version than the paper's), which also hands the decoder the coordinates."""
    return [(v, FUSIONS["ef"] | changes, {}, seeds) for v, changes in READINGS.items()]


# ---- one run ------------------------------------------------------------------------------------
def repeated(name, variant, seed, splits):
    """(trained here, stored): exact on val (%) after the last epoch of a stored run of the sweep; seeds beyond them go round."""
    seed %= SEEDS[name]
    entry = next(e for e in table(name, SWEEP) if e.variant == variant and e.cfg.seed == seed)
    before = curves([r for r in stored(name, SWEEP, partial=True)[variant] if r["seed"] == seed])[0, -1]
    return trained(entry.cfg, splits, device="cpu").history[-1]["val_exact"], before


def run_files(diverged=False):
    """Run files of data/results: those of trainings whose loss stayed finite (and all that train nothing), or the others."""
    return [r for r in results.read_runs(results.RESULTS) if ("diverged" in r["metrics"]) == diverged]


def same_run(cfg):
    """The stored run of exactly this configuration and seed, one that diverged if there is no other, or None: campaigns share it."""
    ours = cfg.to_dict()                                               # a run file may be older than the newest fields
    match = lambda c: c.keys() <= ours.keys() and "epochs" in c and Config.from_dict(c) == cfg
    found = sorted(results.read_runs(results.RESULTS), key=lambda r: "diverged" in r["metrics"])
    return next((r for r in found if "curve" in r and match(r["config"])), None)


def execute(entry, splits, progress=True, device="auto"):
    """Train, look at the test split once, write the run file. Returns its path."""
    known = same_run(entry.cfg)
    if known:
        extra = {k: known[k] for k in ("device", "threads", "cpu", "packages", "commit", "date", "curve")}
        return write(entry, known["metrics"], known["wall_time_s"], same_run=f"{known['experiment']}/{known['run']}", **extra)
    state = entry.state
    try:
        run = trained(entry.cfg, splits, state=state, progress=progress, device=device)
    except Diverged as error:                                          # a row, not an exception; the checkpoint stays
        return write(entry, last_finite(error.run), error.run.seconds, curve=curve_of(error.run), **checkpoint.made_on(state))
    m = tested(run.model, splits) | held_out_reconstruction(run.model, splits.tensors["test"])
    m |= {"parameters": sum(p.numel() for p in run.model.parameters())}
    path = write(entry, m, run.seconds, curve=curve_of(run), **checkpoint.made_on(state))
    for old in (state, state.with_suffix(".json")):
        old.unlink(missing_ok=True)
    return path


def labelled(claim, split, cfg):       # the split says by which protocol: the paper's number comes from a longer schedule
    claim = claim if isinstance(claim, dict) else {"value": claim}
    return claim | {"split": f"{split} ({cfg.name}, {cfg.epochs} epochs)"}


def claims_of(entry, m):
    """Claims of a run: SM is that of TEST_CELLS test cells, everything else that is claimed of the whole split."""
    told = {"sm_cdvae": f"test, {TEST_CELLS} cells, told both labels", "reconstruction": f"test, dimension {entry.cfg.latent}"}
    return {name: labelled(m[key], told.get(key, "test"), entry.cfg) for name, key in entry.claims.items()}


def write(entry, m, seconds, **extra):
    """The run file; a training that diverged has no claim and no score on the test split."""
    split, n, claims = ("val", VAL_CELLS, {}) if "diverged" in m else ("test", m["n"], claims_of(entry, m))
    return results.write_run(entry.experiment, entry.run, config=entry.cfg.to_dict(), seed=entry.cfg.seed, data_set=entry.cfg.dataset,
                             split=split, n=n, metrics=m, claims=claims, wall_time_s=seconds, **extra)


def missing(name, base=SWEEP, seeds=None, variants=None):
    """Entries of a campaign (of `variants`, all by default) without a run file; ValueError for a variant that it does not have."""
    rows = table(name, base, seeds)
    unknown = set(variants or ()) - {e.variant for e in rows}
    if unknown:
        raise ValueError(f"campaign {name} has no variant {', '.join(sorted(unknown))}")
    return [e for e in rows if not e.done and (not variants or e.variant in variants)]


def campaign(name, base=SWEEP, seeds=None, minutes=None, progress=True, variants=None):
    """Run what is missing (of `variants`, all by default); no new run starts after `minutes`. Returns how many are still missing."""
    start, rows = time.time(), missing(name, base, seeds, variants)
    splits = experiments.prepare(base) if rows else None
    for k, entry in enumerate(rows):
        if minutes and time.time() - start > 60 * minutes:
            return len(rows) - k
        m = json.loads(execute(entry, splits, progress).read_text())["metrics"]
        told = f"diverged after {m['diverged']} epochs" if "diverged" in m else f"SM {m['sm_cdvae']:.2f} %, cosine {m['cosine']:.3f}"
        print(f"{k + 1}/{len(rows)} {entry.experiment}/{entry.run}: {told}", flush=True)
    summarise(name, base)
    return 0


def pack(path, name, base=SWEEP, seeds=None, variants=None):
    """What is missing, with the cells, in one file for `abreast`, which trains it on a GPU; configurations that are equal go once, those
    that another campaign has run not at all. The states it leaves in runs/ are what `campaign` finds. Returns their names."""
    seen = {}
    for e in missing(name, base, seeds, variants):
        if not same_run(e.cfg):
            seen.setdefault(e.cfg, e.state.name)
    splits = experiments.prepare(base, "cpu")
    abreast.pack(path, {n: cfg for cfg, n in seen.items()}, splits.tensors["train"], splits.elements, subset(splits.tensors["val"]))
    return list(seen.values())


def stored(name, base=SWEEP, partial=False):
    """{variant: runs ordered by seed} of a campaign, from data/results, but for those that diverged; ValueError when a variant has none.

    partial: variants without runs are left out instead.
    """
    found = run_files()
    groups = {e.variant: [r for r in found if r["experiment"] == e.experiment] for e in table(name, base, 1)}
    missing = [v for v, runs in groups.items() if not runs]
    if missing and not partial:
        options = "" if base == SWEEP else f" --preset {base.name} --epochs {base.epochs}"
        raise ValueError(f"no runs of {', '.join(missing)} in data/results; first run: python -m meidnet_core.campaign {name}{options}")
    return {v: sorted(runs, key=lambda r: r["seed"]) for v, runs in groups.items() if runs}


def diverged(name):
    """Runs of a campaign, of whatever schedule, whose loss did not stay finite."""
    return [r for r in run_files(diverged=True) if r["experiment"].startswith(f"{name}-")]


# ---- what the campaigns answer ------------------------------------------------------------------
def answering(name):
    """The configuration that answers the claims: a reading of the paper's at full length, else `improved` at its own, else the sweep; the
    first of which every variant that a claim needs was run and kept a finite loss (and, for a speed-up, one run reached the level)."""
    full = [base.with_(epochs=FULL[name]) for base in (PAPER, PAPER_CLEAN)]
    return next((base for base in (*full, IMPROVED) if _answers(name, stored(name, base, partial=True))), SWEEP)


def _answers(name, groups):
    reached = name != "curriculum" or any(curves(runs).max() >= CLAIM_LEVEL for v, runs in groups.items() if v in NEEDED[name])
    return set(NEEDED[name]) <= set(groups) and reached


def summarise(name, base=SWEEP):
    """Claims that compare variants, as run files of their own, and claims.csv; `base` is what was run last."""
    if name not in NEEDED:
        return results.write_claims()
    lacking = sorted(set(NEEDED[name]) - set(stored(name, base, partial=True)))
    if lacking:
        print(f"no finite run of {', '.join(tag_of(name, base) + v for v in lacking)}: these runs answer no claim")
    top = answering(name)
    groups = stored(name, top, partial=True)
    if set(NEEDED[name]) <= set(groups):
        {"latent": _best_dimension, "fusion": _first, "curriculum": _speedups}[name](groups, top, tag_of(name, top))
        hand_over(name, top, groups)
    return results.write_claims()


def hand_over(name, base, groups):
    """The runs of one configuration, {variant: runs}, get the claims of a campaign, all others lose them; BEYOND is that of `improved`."""
    seeds = 1 + max(r["seed"] for runs in groups.values() for r in runs)
    own = table(name, IMPROVED, answers=True) if name in BEYOND else []
    beyond = [replace(e, claims={f"x.{k}": v for k, v in e.claims.items() if v in BEYOND[name]}) for e in own]
    entries = table(name, base, seeds, answers=True) + beyond
    comparing = {f"{name}-{tag_of(name, base)}{end}" for end in COMPARING}
    for r in run_files():
        if r["experiment"].startswith(f"{name}-") and r["experiment"] not in comparing:
            mine = [e for e in entries if (e.experiment, e.run) == (r["experiment"], r["run"])]
            claims = {k: v for e in mine for k, v in claims_of(e, r["metrics"]).items()}
            if claims != r["claims"]:
                results.restate(r["experiment"], r["run"], claims, r["path"].parents[1])


def _compared(name, run, base, claims, m, seed, split, n, **config):
    results.write_run(name, run, config={"base": base.with_(seed=0).to_dict(), **config}, seed=seed, data_set=base.dataset, split=split,
                      n=n, metrics=m, claims={k: labelled(v, split, base) for k, v in claims.items()}, wall_time_s=0.0)


def _best_dimension(groups, base, tag):
    """s1.best_dim among the paper's three dimensions; beside it among all, with the test against the runner-up."""
    m = {}
    for text, dims in (("paper", PAPER_DIMENSIONS), ("all", DIMENSIONS)):                 # exact: SM on the whole test split
        top, p, ties = best({d: values(groups[str(d)], "exact_composition") for d in dims if str(d) in groups})
        m |= {f"best_of_{text}": top, f"p_runner_up_{text}": p, f"ties_{text}": ties, f"significant_{text}": int(not ties)}
    level = ", ".join(map(str, sorted(m["ties_paper"])))
    count = len(groups["128"])
    split = f"test, told both labels, {count} seeds each" + (f", level with {level}" if level else "")
    claim = {"value": m["best_of_paper"], "undecided": bool(m["ties_paper"])}
    _compared(f"latent-{tag}best", "summary", base, {"s1.best_dim": claim}, m, None, split,
              groups["128"][0]["n"], dimensions=list(PAPER_DIMENSIONS), seeds=count)


def _first(groups, base, tag):
    """f2a.efcl_first, seed by seed: EF+CL has the highest cosine and the lowest L2 distance; undecided unless both lie apart from EF's over
    all seeds (Welch, 0.05): an order that other seeds may turn round is none."""
    clear = all(p_value(values(groups["efcl"], k), values(groups["ef"], k)) < 0.05 for k in ("cosine", "l2d"))
    for rows in paired(groups, FUSIONS):
        seed, score = rows[0]["seed"], {k: [r["metrics"][k] for r in rows] for k in ("cosine", "l2d", "exact_composition")}
        m = {f"{k}_first": int(v[2] < min(v[:2]) if k == "l2d" else v[2] > max(v[:2])) for k, v in score.items()}
        claims = {"f2a.efcl_first": {"value": m["cosine_first"] * m["l2d_first"], "undecided": not clear}}
        _compared(f"fusion-{tag}first", f"seed{seed}", base, claims, m, seed, "test", rows[0]["n"])


def _speedups(groups, base, tag):
    """f2b.speedup, seed by seed: definition (a) at CLAIM_LEVEL; f2b.gain: definition (b) at its most favourable epoch."""
    for a, b in paired(groups, ("none", "exp67")):
        x, y = curves([a]), curves([b])
        ratio = {level: epochs_to(x[0], level) / epochs_to(y[0], level) for level in LEVELS}      # inf / inf: neither gets there
        m = {f"epochs_ratio_{level:g}": r for level, r in ratio.items() if np.isfinite(r)} | {"largest_gain": largest_gain(x, y)[0]}
        claims = {"f2b.curves": 1} | ({"f2b.speedup": ratio[CLAIM_LEVEL]} if np.isfinite(ratio[CLAIM_LEVEL]) else {})
        claims |= {"f2b.gain": m["largest_gain"]} if m["largest_gain"] else {}                    # 0: never far enough without
        _compared(f"curriculum-{tag}speedup", f"seed{a['seed']}", base, claims, m, a["seed"], "val", VAL_CELLS, level=CLAIM_LEVEL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=list(SEEDS))
    parser.add_argument("--preset", choices=list(PRESETS), help="default: the sweep configuration of this module")
    parser.add_argument("--epochs", type=int, help="default: those of the configuration; the paper has 500 (latent) and 200")
    parser.add_argument("--seeds", type=int, help=f"default: {SEEDS}")
    parser.add_argument("--variants", nargs="*", help="only these, e.g. 64 128 256 or none exp67")
    parser.add_argument("--minutes", type=float, help="start no further run after that")
    parser.add_argument("--pack", metavar="FILE", help="train nothing: write what is missing for meidnet_core.abreast on a GPU machine")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    base = PRESETS[args.preset] if args.preset else SWEEP
    base = base.with_(epochs=args.epochs) if args.epochs else base
    if args.pack:
        print(*pack(args.pack, args.campaign, base, args.seeds, args.variants), sep="\n")
        return
    left = campaign(args.campaign, base, args.seeds, args.minutes, variants=args.variants)
    print(f"{left} runs are missing; the same command goes on" if left else "complete")


if __name__ == "__main__":
    main()
