"""Do element descriptors carry to elements that training never showed? A model without five of them is asked about their crystals.

    python -m meidnet_core.unseen --seed 0         # two short trainings, with descriptors and with plain embeddings
"""

import argparse
import time

import numpy as np
import torch

from . import crystal, data, experiments, ions, metrics, oqmd, results
from .config import EXTENDED
from .train import pick_device, train

ELEMENTS = ("Br", "Rb", "Y", "Zr", "Co")          # an anion, an A, an A or B, two B; all common in OQMD
LABELS = ("pbe_gap", "delta_e", "stability")
EPOCHS = 15


def split_off(crystals, elements=ELEMENTS):
    """(cells without any of the elements, {element: cells with it}) of a CrystalSet."""
    holds = {e: (crystals.numbers == crystal.atomic_number(e)).any(1) for e in elements}
    return crystals.select(~np.any(list(holds.values()), 0)), {e: crystals.select(h) for e, h in holds.items()}


def compare(seed=0, epochs=EPOCHS, device="auto"):
    """Errors (MAE from the structure alone) on OQMD cells with each left-out element: {element_label_kind: value}.

    kind: descriptors, embedding (a vector per element, untrained for these), mean (of the training labels).
    """
    everything, held = oqmd.load("train"), split_off(oqmd.cubic())[1]
    rest, device, m = split_off(everything)[0], pick_device(device), {}
    elements = data.vocabulary(everything, oqmd.cubic())
    tensors = data.to_tensors(rest, elements, EXTENDED.labels, device)
    for kind in ("descriptors", "embedding"):
        cfg = EXTENDED.with_(seed=seed, epochs=epochs, descriptors=kind == "descriptors", name=f"unseen-{kind}")
        state = experiments.RUNS / f"unseen_{kind}_seed{seed}.safetensors"
        model = train(cfg, tensors, elements, state, features=ions.descriptors(elements) if cfg.descriptors else ()).model
        for e, cells in held.items():
            predicted = metrics.encode(model, data.to_tensors(cells, elements, cfg.labels, device))["alone"]
            error = np.abs(predicted - cells.labels)
            m |= {f"{e}_{l}_{kind}": float(error[:, cfg.labels.index(l)].mean()) for l in LABELS}
    for e, cells in held.items():
        m[f"{e}_cells"] = len(cells)
        for l in LABELS:
            i = everything.label_names.index(l)
            m[f"{e}_{l}_mean"] = float(np.abs(cells.labels[:, i] - np.nanmean(rest.labels[:, i])).mean())
    return m | {"training_cells": len(rest)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, m = time.time(), compare(args.seed)
    config, n = {"elements": list(ELEMENTS), "epochs": EPOCHS}, sum(m[f"{e}_cells"] for e in ELEMENTS)
    results.write_run("unseen-elements", f"seed{args.seed}", config=config, seed=args.seed, data_set="extended", n=n, metrics=m, claims={},
                      split="OQMD cells with an element left out of training", wall_time_s=time.time() - start)
    print("\n".join(f"{k:30s} {v:.3f}" for k, v in m.items()))


if __name__ == "__main__":
    main()
