"""Checkpoints: one safetensors file (weights, optimiser, generators) with a JSON header, beside it the header as .json.

The safetensors file is complete in itself and replaced in one step, so a kill leaves the old or the
new state, never half of one. Nothing is pickled.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from .config import Config
from .model import MEIDNet, Shape


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another configuration; the message names file and reason."""


def write(path, tensors, meta):
    """Atomic write of a dict of tensors and a JSON-able dict; the dict once more, readable, beside it (.json). ValueError for a path
    that ends so itself: one would replace the other."""
    from safetensors.torch import save_file
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(f"{path}: a checkpoint ends in .safetensors; .json is the readable copy of its header")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, temporary, metadata={"meidnet": json.dumps(meta)})
    os.replace(temporary, path)
    readable = path.with_suffix(f".json.{os.getpid()}.tmp")
    readable.write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(readable, path.with_suffix(".json"))


def read(path):
    """(tensors, meta) of a checkpoint."""
    return _opened(path, lambda f: ({k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["meidnet"])))


def header(path):
    """meta alone: no tensor is read."""
    return _opened(path, lambda f: json.loads(f.metadata()["meidnet"]))


def _opened(path, take):
    from safetensors import SafetensorError, safe_open
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such checkpoint. Train one (notebook 02) or correct the path.")
    try:
        with safe_open(path, "pt") as f:
            return take(f)
    except (SafetensorError, KeyError, TypeError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable MEIDNet checkpoint ({type(error).__name__}: {error}).") from error


def save_model(path, model, **extra):
    """Weights, configuration and data shape: what a user needs to run the model. extra goes into the JSON."""
    write(path, model.state_dict(), {"config": model.cfg.to_dict(), "shape": asdict(model.shape), **extra})


def load_model(path, device="cpu"):
    """(model in eval mode, meta) from `save_model`."""
    tensors, meta = read(path)
    try:
        shape = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["shape"].items()}      # features: rows stay lists
        model = MEIDNet(Config.from_dict(meta["config"]), Shape(**shape))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header describes no model of this version ({type(error).__name__}: {error}).") from error
    fit(path, model, tensors)
    return model.to(device).eval(), meta


def fit(path, model, tensors):
    """Load weights; CheckpointError names the file and the first tensor that does not fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise CheckpointError(f"{path}: weights do not fit the configuration or the data: {first}") from error


def device_name(model):
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def device_of(path):
    """Name of the device that wrote a training state; None when there is no such file, or one of an older version."""
    return header(path).get("device") if Path(path).exists() else None


def epochs_done(path):
    """Epochs behind a training state that `save_state` wrote; 0 when there is no such file."""
    return header(path).get("epoch", 0) if Path(path).exists() else 0


def made_on(path):
    """{"device": name} of a training state for a run file; empty where it is not known, so that the run file says what was used here."""
    name = device_of(path)
    return {"device": name} if name else {}


def save_state(path, run, model, average, optimizer, epoch, finished=False):
    """Everything a resumed run needs, the random generators included. finished: nothing is left to do, whatever cfg.epochs says."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {"rng": torch.get_rng_state()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    tensors |= _optimizer_tensors(optimizer)
    meta = {"config": model.cfg.to_dict(), "shape": asdict(model.shape), "epoch": epoch, "seconds": run.seconds, "history": run.history,
            "finished": finished, "device": device_name(model)}
    write(path, tensors, meta)


def load_state(path, run, model, average, optimizer):
    """Restore what `save_state` wrote into the given objects; returns the epoch to go on with, cfg.epochs after a finished run."""
    tensors, meta = read(path)
    differing = [k for k, v in meta["config"].items() if model.cfg.to_dict().get(k) != v]
    if differing or "epoch" not in meta:
        raise CheckpointError(f"{path}: belongs to another run ({', '.join(differing) or 'no training state'} differ); "
                              "delete it or choose another path.")
    fit(path, model, _part(tensors, "model."))
    if average is not None:
        fit(path, average, _part(tensors, "average."))
    _restore_optimizer(optimizer, _part(tensors, "optimizer."))
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    run.history, run.seconds = meta["history"], meta["seconds"]
    return model.cfg.epochs if meta.get("finished") else meta["epoch"]            # older files lack the flag


def _part(tensors, prefix):
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}


def _optimizer_tensors(optimizer):
    states = optimizer.state_dict()["state"]
    return {f"optimizer.{k}.{name}": torch.as_tensor(v) for k, state in states.items() for name, v in state.items()}


def _restore_optimizer(optimizer, tensors):
    state = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ---- the baselines keep their own loops (FTCP, CDVAE stand-in): no average, no generator -----------

def save_progress(path, identity, model, optimizer, history, seconds):
    """Model, optimiser, history and seconds of a training that `identity` (JSON-able) names."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | _optimizer_tensors(optimizer)
    write(path, tensors, {"run": identity, "history": history, "seconds": seconds, "lr": optimizer.param_groups[0]["lr"],
                          "device": device_name(model)})


def load_progress(path, identity, model, optimizer):
    """Restore what `save_progress` wrote; (history, seconds). CheckpointError when it belongs to another training."""
    tensors, meta = read(path)
    if meta.get("run") != identity:
        raise CheckpointError(f"{path}: belongs to another run ({meta.get('run')}, not {identity}); delete it.")
    fit(path, model, _part(tensors, "model."))
    _restore_optimizer(optimizer, _part(tensors, "optimizer."))
    optimizer.param_groups[0]["lr"] = meta["lr"]
    return meta["history"], meta["seconds"]
