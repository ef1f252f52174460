"""From a configuration to a committed result: data, training (or a stored checkpoint), test metrics, run file.

    python -m meidnet_core.experiments production --seed 0        # train, evaluate, write checkpoint and JSON; also: --help
    python -m meidnet_core.experiments data                       # what the data sets hold; also workflow, speed, card
"""

import argparse
import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from . import checkpoint, data, ions, metrics, oqmd, results
from .config import PRESETS, PRODUCTION, SPLIT_SCHEMES, Config, renamed
from .design import navigate
from .train import pick_device, train

CHECKPOINTS = results.ROOT / "data" / "checkpoints"
RUNS = results.ROOT / "runs"                         # states of interrupted trainings, git-ignored


def config_for(profile, dataset="perov_5", seed=0):
    """`paper`: the full production configuration; `quick`: the same model, small and about 2 minutes on 2 cores."""
    if profile not in ("quick", "paper"):
        raise ValueError(f"profile = {profile!r}: expected quick or paper")
    cfg = PRODUCTION.with_(dataset=dataset, labels=tuple(data.LABELS[dataset]) if dataset in data.LABELS else (), seed=seed)
    if profile == "paper":
        return cfg
    epochs = {"perov_5": 14, "carbon_24": 4, "mp_20": 1}.get(dataset, 10)
    return cfg.with_(name="quick", width=64, edge_width=32, batch=64, epochs=epochs, temperature=0.2, w_con=0.3,
                     latent_noise=0.0, label_noise=0.0)


@dataclass
class Splits:
    """The three splits of a data set, as crystals and as tensors, and the species vocabulary."""

    crystals: dict
    tensors: dict
    elements: tuple


def load_split(cfg, split):
    """CrystalSet of a split of the configuration's data set."""
    if cfg.dataset.startswith("extended"):
        return oqmd.load(split, own=cfg.dataset == "extended_own")
    return data.load(cfg.dataset, split, cfg.split_scheme)


def prepare(cfg, device="auto"):
    """Load, log the missing labels, move to the device. All splits are padded to the same number of sites."""
    device = pick_device(device)
    crystals = {s: load_split(cfg, s) for s in data.SPLITS}
    elements = data.vocabulary(*crystals.values())
    sites = max(c.numbers.shape[1] for c in crystals.values())
    tensors = {s: data.to_tensors(c, elements, cfg.labels, device, cfg.cutoff, sites) for s, c in crystals.items()}
    for s, c in crystals.items():
        missing = {l: int(np.isnan(c.labels[:, i]).sum()) for i, l in enumerate(c.label_names)}
        print(f"{cfg.dataset}/{s}: {len(c):,} cells; missing labels (masked, not imputed): {missing}")
    return Splits(crystals, tensors, elements)


def scheme_of(cfg):
    """Prefix that keeps models and results of another split apart from those of the CDVAE split."""
    return "" if cfg.split_scheme == "cdvae" else f"{cfg.split_scheme}-"


def path_of(cfg):
    return CHECKPOINTS / f"{cfg.dataset}_{scheme_of(cfg)}{cfg.name}_seed{cfg.seed}.safetensors"


def stored(cfg, device="auto"):
    """The committed model of exactly this configuration, or None."""
    path = path_of(cfg)
    if not path.exists():
        return None
    model, meta = checkpoint.load_model(path, pick_device(device))
    return (model, meta) if Config.from_dict(meta["config"]) == cfg else None


def required(cfg, device="auto"):
    """The committed model of a configuration; CheckpointError with the command that trains it when it is not there."""
    found = stored(cfg, device)
    if not found:
        preset = next((k for k, p in PRESETS.items() if (p.dataset, p.name) == (cfg.dataset, cfg.name)), cfg.name)
        split = f" --split-scheme {cfg.split_scheme}" if scheme_of(cfg) else ""
        raise checkpoint.CheckpointError(f"{path_of(cfg)}: not there or of another configuration; run "
                                         f"`python -m meidnet_core.experiments {preset}{split} --seed {cfg.seed}`")
    return found[0]


def model_for(cfg, splits, fresh=False, device="auto", progress=True):
    """(model, history, seconds, origin): the committed checkpoint when it fits, else trained here.

    A training that is interrupted goes on from runs/ at the next call; fresh=True forgets it and the checkpoint.
    """
    found = None if fresh else stored(cfg, device)
    if found:
        model, meta = found
        return model, meta["history"], meta["seconds"], f"committed checkpoint {path_of(cfg).name}"
    state = RUNS / path_of(cfg).name
    if fresh:
        state.unlink(missing_ok=True)
    origin = f"continued from runs/{state.name}" if state.exists() else "trained in this run"
    features = ions.descriptors(splits.elements) if cfg.descriptors else ()
    run = train(cfg, splits.tensors["train"], splits.elements, checkpoint=state, device=device, progress=progress, features=features)
    return run.model, run.history, run.seconds, origin


def claims_of(m, cfg):
    """Metrics of a Perov-5 test evaluation that answer rows of paper.csv. The split says what was decoded: Table 1 compares codes of
    the structure alone (`structure`), the joint latent of Figure 2 holds the true labels (`production`)."""
    scheme, told = scheme_of(cfg), "the joint latent, told both labels"
    joint = lambda value: {"value": value, "split": f"{scheme}test, {told}"}
    if cfg.dataset != "perov_5" or cfg.name not in ("production", "structure"):
        return {}
    if cfg.name == "structure":
        return {} if scheme else {"t1.perov5.meidnet": {"value": m["sm_cdvae_alone"], "split": "test, structure alone"}}
    if scheme:
        return {"x.perov5.sm_grouped": joint(m["sm_cdvae"])}
    pulled = lambda value: {"value": value, "split": f"test, {cfg.epochs} epochs, 1 - cosine in the loss"}
    return {"f2c.sm": joint(m["sm_cdvae"]), "f2.prod.cs": pulled(m["cosine"]), "f2.prod.l2d": pulled(m["l2d"]),
            "abs.cs": pulled(m["cosine"]), "f2d.r2_gap": joint(m["dir_gap_joint_r2"]), "f2e.r2_h": joint(m["heat_all_joint_r2"]),
            "x.perov5.sm_default_tol": joint(m["sm_default"]),
            "x.perov5.h_mae_structure": m["heat_all_alone_mae"], "x.perov5.gap_mae_structure": m["dir_gap_alone_mae"]}


def record(cfg, splits, model, seconds, split="test"):
    """Evaluate on a held-out split and write the run file; returns (metrics, details)."""
    m, details = metrics.evaluate(model, splits.tensors[split], splits.crystals[split])
    scheme = scheme_of(cfg)
    results.write_run(f"{cfg.dataset}-{scheme}{cfg.name}", f"seed{cfg.seed}", config=cfg.to_dict(), seed=cfg.seed, data_set=cfg.dataset,
                      split=f"{scheme}{split}", n=m["n"], metrics=m, claims=claims_of(m, cfg), wall_time_s=seconds)
    return m, details


CARD = """# Model card

Written by `python -m meidnet_core.experiments card` from the headers of the checkpoints. Load one with
`meidnet_core.checkpoint.load_model(path)`. The two error columns are of the labels of Perov-5: a GLLB-SC gap, and an enthalpy
against competing phases (RPBE). *joint*: decoded from the joint latent, which is told the labels; `perov_5_structure_*` are
trained to decode from the structure alone and are no good at the other. Models `perov_5_*` have seen no Se, I, Br, Cl and no
lanthanide but La: they know nothing about them. `extended_*` learnt from OQMD's cubic ABX3 too (PBE gap, formation energy, hull
distance, each a label of its own), and `extended_own_*` from cells that this project relaxed. Training times are wall clock
beside other work on the same two cores.

"""


OTHERS = """
## Other models

`flow/`: set autoencoders for cells of up to 24 atoms (`meidnet_core.large_cells.load_model`). Their memory is the training split,
which is loaded beside them. `cgcnn/` (`meidnet_core.cgcnn.load`): `perov_5_*` on the labels of Perov-5, `oqmd_abx3_independent_*`
on OQMD's PBE gaps.

"""


def write_card():
    """data/checkpoints/README.md: data, split, held-out metrics and licence of every committed model."""
    shown = {"sm_cdvae": "SM CDVAE, joint (%)", "sm_cdvae_alone": "the same, structure alone (%)", "sm_default": "SM default, joint (%)",
             "rmse_cdvae": "RMSE, joint", "cosine": "cosine", "l2d": "L2D",
             "heat_all_alone_mae": "enthalpy MAE, structure alone (eV/atom)", "dir_gap_alone_mae": "gap MAE, structure alone (eV)"}
    columns = ["file", "metrics of", "training (s, one CPU thread)", "licence", *shown.values()]
    rows = [columns, ["---"] * len(columns)]
    for path in sorted(CHECKPOINTS.glob("*.safetensors")):
        meta = checkpoint.header(path)
        values = [f"{meta['metrics'][k]:.4g}" if k in meta["metrics"] else "-" for k in shown]
        rows.append([f"`{path.name}`", f"{meta['config']['dataset']}, {meta['split']}", f"{meta['seconds']:.0f}", meta["licence"], *values])
    (CHECKPOINTS / "README.md").write_text(CARD + _markdown(rows) + OTHERS + _markdown(_other_models()))


def _other_models():
    """Rows for models of other kinds: flow/ (large_cells.load_model) and cgcnn/ (cgcnn.load_model)."""
    shown = {"sm_cdvae": "SM CDVAE (%)", "sm_default": "SM default (%)", "rmse_cdvae": "RMSE", "heat_all_mae": "enthalpy MAE (eV/atom)",
             "dir_gap_mae": "gap MAE, GLLB-SC (eV)", "pbe_gap_mae": "gap MAE, PBE (eV)"}
    columns = ["file", "seed", "metrics of", "licence", *shown.values()]
    rows = [columns, ["---"] * len(columns)]
    for path in sorted(CHECKPOINTS.glob("*/*.safetensors")):
        meta = checkpoint.header(path)
        values = [f"{meta['metrics'][k]:.4g}" if k in meta["metrics"] else "-" for k in shown]
        config = meta["config"]
        file, of = f"`{path.parent.name}/{path.name}`", f"{config.get('dataset', 'perov_5')}, {meta['split']}"
        rows.append([file, str(config.get("seed", "-")), of, meta.get("licence", "weights CC BY 4.0"), *values])
    return rows


def _markdown(rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def record_data():
    """Sizes of the data sets and the match rates of predictions without a model (test split of Perov-5)."""
    start, sets = time.time(), {n: {s: data.load(n, s) for s in data.SPLITS} for n in data.LABELS}
    n = {name: sum(map(len, group.values())) for name, group in sets.items()}
    test, train = sets["perov_5"]["test"], sets["perov_5"]["train"]
    m = metrics.baselines(test, train) | {f"cells_{k}": v for k, v in n.items()} | {"elements_perov_5": len(train.elements)}
    m = {k: v for k, v in m.items() if v is not None}                 # no RMSE where nothing matches
    claims = {f"d.{name.replace('_', '')}.n": size_claim(name, sets[name]) for name in sets}
    claims["d.perov5.elements"] = {"value": len(train.elements), "split": "all"}
    results.write_run("data", "trivial", config={"cells": 800}, seed=0, data_set="perov_5", split="test", n=800, metrics=m, claims=claims,
                      wall_time_s=time.time() - start)


def size_claim(name, splits):
    """Cells of a data set as published; the split says how many of them are in the files here."""
    here, n = sum(map(len, splits.values())), len(splits["train"])
    return {"value": here - n + data.ORIGINAL.get(name, n), "split": f"published splits, {here:,} cells of them here"}


def record_workflow(cfg, target=(1.2, -0.025), count=1000, steps=150):
    """Figure 1: the workflow runs; latents of test crystals move toward a target (panel c)."""
    start, splits = time.time(), prepare(cfg)
    model = stored(cfg)[0]
    z = torch.from_numpy(metrics.encode(model, splits.tensors["test"])["z"][:count]).to(model.lattice_mean.device)
    path = navigate(model, z, target, steps)
    m = {"median_distance_start": float(path.distance[0].median()), "median_distance_end": float(path.distance[-1].median()),
         "fraction_closer": float((path.distance[-1] < path.distance[0]).float().mean())}
    claims = {"f1a.workflow": 1, "f1b.fusion": 1, "f1c.trajectories": m["fraction_closer"]}
    results.write_run("workflow", f"seed{cfg.seed}", config=cfg.to_dict() | {"target": list(target), "steps": steps},
                      seed=cfg.seed, data_set=cfg.dataset, split="test", n=count, metrics=m, claims=claims, wall_time_s=time.time() - start)


def record_speed():
    """data/results/training-speed/production-seed<k>.json: minutes that the committed production models took, from their headers."""
    for path in sorted(CHECKPOINTS.glob("perov_5_production_seed*.safetensors")):
        meta = checkpoint.header(path)
        cfg, minutes = Config.from_dict(meta["config"]), meta["seconds"] / 60
        claim = {"value": minutes, "split": f"{cfg.epochs} epochs, one CPU thread beside other work"}
        results.write_run("training-speed", f"production-seed{cfg.seed}", config=cfg.to_dict(), seed=cfg.seed, data_set=cfg.dataset,
                          split="train", n=1, metrics={"minutes": minutes}, claims={"x.speed.cpu": claim}, wall_time_s=meta["seconds"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    also = ("data", "workflow", "speed", "card")
    parser.add_argument("preset", choices=[*PRESETS, *also], help="a configuration to train, or what else to record")
    parser.add_argument("--dataset", choices=list(data.LABELS), help="default: that of the preset")
    parser.add_argument("--split-scheme", default="cdvae", choices=SPLIT_SCHEMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    other = {"data": record_data, "card": write_card, "speed": record_speed,
             "workflow": lambda: record_workflow(config_for("paper", seed=args.seed))}
    if args.preset in other:
        other[args.preset]()
        return results.write_claims()
    cfg = PRESETS[args.preset].with_(split_scheme=args.split_scheme, seed=args.seed)
    cfg = cfg.with_(dataset=args.dataset, labels=tuple(data.LABELS[args.dataset])) if args.dataset else cfg
    cfg = renamed(cfg, args.epochs or cfg.epochs)
    splits, start = prepare(cfg), time.time()
    model, history, seconds, origin = model_for(cfg, splits)
    m, _ = record(cfg, splits, model, seconds)
    checkpoint.save_model(path_of(cfg), model, history=history, seconds=seconds, metrics=m, split=f"{args.split_scheme} test",
                          licence="weights CC BY 4.0, data see data/README.md")
    results.write_claims()
    write_card()
    print(f"{origin}; training {seconds:.0f} s, all {time.time() - start:.0f} s")
    for key, value in m.items():
        print(f"{key:40s} {value}")


if __name__ == "__main__":
    main()
