"""FTCP on a GPU machine that has PyTorch, numpy and safetensors, but neither pymatgen nor the data.

    python -m meidnet_core.ftcp_gpu pack mp_20 runs/ftcp-mp_20.safetensors       # where the data are
    python -m meidnet_core.ftcp_gpu train runs/ftcp-mp_20.safetensors --seed 0   # on the GPU machine; goes on where it was killed
    python -m meidnet_core.ftcp --dataset mp_20 --seed 0                         # back again, with runs/: scores the state found there
"""

import argparse

import torch

from . import checkpoint, ftcp
from .train import pick_device

INTEGERS = ("species", "column", "hkl")                # small ones: a byte each


def pack(dataset, path):
    """Training cells and layout of a data set in one file."""
    layout, tensors, _ = ftcp.prepare(dataset)
    small = {k: t.to(torch.int8) if k in INTEGERS else t for k, t in tensors["train"].items()}
    fixed = {f"layout.{k}": getattr(layout, k) for k in ("properties", "low", "span")}
    checkpoint.write(path, fixed | small, {"ftcp": dataset, "elements": layout.elements, "sites": layout.sites, "columns": layout.columns})


def unpack(path):
    """(data set, layout, tensors) of a file that `pack` wrote; checkpoint.CheckpointError when it is no such file."""
    tensors, meta = checkpoint.read(path)
    if "ftcp" not in meta:
        raise checkpoint.CheckpointError(f"{path}: holds no cells for FTCP; write it with `python -m meidnet_core.ftcp_gpu pack`.")
    layout = ftcp.Layout(meta["elements"], meta["sites"], meta["columns"], tensors.pop("layout.properties"))
    layout.low, layout.span = tensors.pop("layout.low"), tensors.pop("layout.span")
    return meta["ftcp"], layout, {k: t.float() if k == "hkl" else t.long() if k in INTEGERS else t for k, t in tensors.items()}


def train(path, seed=0, epochs=ftcp.EPOCHS, device="auto"):
    """Train on a packed file; returns the path of the state, which is the one that ftcp.run looks for."""
    dataset, layout, tensors = unpack(path)
    state = ftcp.state_of(dataset, seed, epochs)
    ftcp.train(layout, tensors, seed, epochs, path=state, every=20, device=pick_device(device))
    return state


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    here, there = what.add_parser("pack"), what.add_parser("train")
    here.add_argument("dataset", choices=list(ftcp.CLAIMS))
    here.add_argument("file")
    there.add_argument("file")
    there.add_argument("--seed", type=int, default=0)
    there.add_argument("--epochs", type=int, default=ftcp.EPOCHS)
    args = parser.parse_args()
    if args.what == "pack":
        pack(args.dataset, args.file)
    else:
        print(train(args.file, args.seed, args.epochs))


if __name__ == "__main__":
    main()
