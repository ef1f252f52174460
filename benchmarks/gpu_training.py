"""Training time of the production model on a GPU: seeds abreast, then the same held-out evaluation as chapter 7.

    python benchmarks/gpu_training.py pack                              # where the data are: runs/gpu-production.safetensors
    python -m meidnet_core.abreast runs/gpu-production.safetensors --no-compile       # on the GPU machine; bring runs/ back
    python benchmarks/gpu_training.py score                             # test split, run files perov_5-production-gpu, claim x.speed.gpu

The seconds are those of the clock for all seeds together, the recording of the CUDA graph and the proxies on 500 validation cells
after every epoch included.
"""

import argparse

from meidnet_core import abreast, checkpoint, metrics, results, trial
from meidnet_core.config import PRODUCTION
from meidnet_core.experiments import RUNS, prepare
from meidnet_core.train import train

NAME, SEEDS = "gpu-production", 3


def state(seed):
    return RUNS / f"{NAME}-seed{seed}.safetensors"


def pack():
    splits = prepare(PRODUCTION, "cpu")
    runs = {state(seed).name: PRODUCTION.with_(seed=seed) for seed in range(SEEDS)}
    abreast.pack(RUNS / f"{NAME}.safetensors", runs, splits.tensors["train"], splits.elements, trial.subset(splits.tensors["val"]))


def score():
    """Evaluate the finished states on the test split; the claim is their training time, the figures it buys stand in the run files."""
    splits = prepare(PRODUCTION, "cpu")
    for seed in range(SEEDS):
        cfg = PRODUCTION.with_(seed=seed)
        if not state(seed).exists():
            raise SystemExit(f"{state(seed).name}: not in runs/; train it as the head of this file says")
        run = train(cfg, splits.tensors["train"], splits.elements, checkpoint=state(seed), device="cpu")    # finished: loads it
        m, _ = metrics.evaluate(run.model, splits.tensors["test"], splits.crystals["test"])
        m |= {"seconds_together": run.seconds, "runs_abreast": SEEDS}
        made = checkpoint.made_on(state(seed))
        claim = {"value": run.seconds / 60, "split": f"train, one clock for {SEEDS} runs abreast, {made.get('device', 'device not known')}"}
        results.write_run("perov_5-production-gpu", f"seed{seed}", config=cfg.to_dict(), seed=seed, data_set="perov_5", split="test",
                          n=m["n"], metrics=m, claims={} if seed else {"x.speed.gpu": claim},
                          wall_time_s=run.seconds, **made)
        print(seed, {k: round(float(m[k]), 4) for k in ("seconds_together", "sm_cdvae", "sm_default", "cosine", "l2d")}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pack", "score"])
    {"pack": pack, "score": score}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
