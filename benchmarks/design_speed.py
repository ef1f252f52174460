"""How many candidates a minute: distinct, new, neutral ABX3 with sensible distances and tolerance factor, decoded and read again.

    python benchmarks/design_speed.py          # four minutes; data/results/design-speed/seed<k>.json

CPU seconds of one process with one thread, so that other work on the machine does not count. Two processes on two cores
make twice as many.
"""

import time

import torch

from meidnet_core import candidates, data, results, sun

SEEDS, CONFIG = 10, {"starts": candidates.STARTS, "steps": candidates.STEPS, "gap": 1.0}


def measure(tool, seed, gap, starts, steps):
    """Metrics of one search for a PBE gap (eV) and stability: latents moved, decoded, filtered, predicted."""
    tool.latents(tool.generator(seed))                               # the training set is embedded once, not per search
    start = time.process_time()
    z = tool.moved({"pbe_gap": gap, "stability": 0.0}, starts, steps, seed)
    moved = time.process_time()
    found = tool.decoded(z, candidates.DRAWS, seed)
    end = time.process_time()
    distinct = len({data.composition_key(n) for n in found.crystals.numbers})
    return {"candidates": distinct, "decodings": len(z) * candidates.DRAWS, "seconds_move": moved - start, "seconds_decode": end - moved,
            "per_minute": 60 * distinct / (end - start), "decodings_per_minute": 60 * len(z) * candidates.DRAWS / (end - start)}


def main():
    torch.set_num_threads(1)
    tool = sun.designer(device="cpu")
    for seed in range(SEEDS):
        m = measure(tool, seed, **CONFIG)
        results.write_run("design-speed", f"seed{seed}", config=CONFIG | {"threads": 1}, seed=seed,
                          data_set="extended", split="generated", n=m["candidates"], metrics=m, wall_time_s=m["seconds_move"],
                          claims={"x.design.per_minute": {"value": m["per_minute"], "split": "generated, one thread"}})
        print({k: round(v, 1) for k, v in m.items()})


if __name__ == "__main__":
    main()
