"""Training: the data set lives on the device as tensors, a run can be killed and goes on as if it had not been.

torch and numpy only (tqdm if present, safetensors for checkpoints): runs on a bare GPU machine.
"""

import copy
import math
import os
import time
from dataclasses import dataclass, field

import torch

from .checkpoint import load_state, save_state
from .losses import contrastive_weight, total_loss
from .model import MEIDNet, Shape


@dataclass
class Run:
    """What a training returns. `model` carries the averaged weights when cfg.ema > 0."""

    model: MEIDNet
    history: list = field(default_factory=list)      # one dict of mean losses per epoch
    seconds: float = 0.0                             # training time, all pieces of a resumed run together
    finished: bool = True


class Diverged(ValueError):
    """The loss is not finite any more. run: the Run up to the last finite epoch."""

    def __init__(self, message, run):
        super().__init__(message)
        self.run = run


def pick_device(device="auto"):
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device)


def shape_of(tensors, elements, cfg, features=()):
    """Shape of a training set; standardisation statistics when cfg.normalize, else zeros and ones (units with cfg.unit_lattice)."""
    sites = tensors["species"].shape[1]
    shape = Shape(sites, tuple(elements), bool((tensors["mask"] == 0).any()),
                  label_mean=(0.0,) * len(cfg.labels), label_std=(1.0,) * len(cfg.labels), features=features)
    if cfg.unit_lattice:
        shape.lattice_std = (20.0,) * 3 + (180.0,) * 3
    if cfg.normalize:
        std = tensors["lattice"].std(0)
        shape.lattice_mean = tuple(tensors["lattice"].mean(0).tolist())
        shape.lattice_std = tuple(torch.where(std > 1e-3, std, torch.ones_like(std)).tolist())   # fixed angles: no scale
        stats = [(l[~l.isnan()].mean().item(), l[~l.isnan()].std().item()) for l in tensors["labels"].T]
        shape.label_mean, shape.label_std = map(tuple, zip(*stats))
    return shape


def learning_rate(cfg, progress):
    """Learning rate at a fraction of the training: constant, or one cycle (10 % warm-up, cosine to zero)."""
    if cfg.schedule == "constant":
        return cfg.lr
    warm = 0.1
    rise = 0.5 * (1 - math.cos(math.pi * min(progress / warm, 1)))
    fall = 0.5 * (1 + math.cos(math.pi * max((progress - warm) / (1 - warm), 0)))
    return cfg.lr * max(0.04 * (1 - rise) + rise, 0.04) * fall + 1e-6


def make_optimizer(model, cfg):
    """Adam or AdamW (weight decay on matrices only)."""
    return optimizer_of(list(model.parameters()), cfg)


def optimizer_of(parameters, cfg, axes=0, **options):
    """make_optimizer of a list of parameters. axes: leading axes that are not the model's own; options: of the optimizer."""
    matrices = [p for p in parameters if p.dim() > 1 + axes]
    vectors = [p for p in parameters if p.dim() <= 1 + axes]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    kind = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, **{"lr": cfg.lr, "fused": True, **options})


def average_decay(cfg, step):
    """Decay of the averaged weights after so many steps: the average starts as that of all steps."""
    return min(cfg.ema, (1 + step) / (10 + step))


def batches(count, cfg, epoch, device):
    """Index tensors of one epoch; the order depends on seed and epoch alone, so a resumed run sees the same."""
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).to(device).split(cfg.batch)


@torch.no_grad()
def update_average(average, model, decay):
    names = zip(average.parameters(), model.parameters())
    for a, p in names:
        a.lerp_(p, 1 - decay)


def train_epoch(model, average, optimizer, tensors, cfg, epoch, objective=total_loss):
    """One pass; returns mean losses, contrastive weight and learning rate."""
    index = batches(len(tensors["species"]), cfg, epoch, tensors["species"].device)
    alpha, sums = contrastive_weight(epoch, cfg.epochs, cfg.curriculum, cfg.ramp), {}
    model.train()
    for k, rows in enumerate(index):
        lr = learning_rate(cfg, (epoch + k / len(index)) / cfg.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, terms = objective(model, {key: t[rows] for key, t in tensors.items()}, alpha)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if cfg.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        if average is not None:
            update_average(average, model, average_decay(cfg, epoch * len(index) + k))
        for key, value in terms.items():
            sums[key] = sums.get(key, 0) + value
    return {key: float(v) / len(index) for key, v in sums.items()} | {"alpha": alpha, "lr": lr}


def train(cfg, tensors, elements, checkpoint=None, every=10, device="auto", on_epoch=None, stop_after=None, compiled=False,
          progress=True, objective=total_loss, features=()):
    """Train from scratch, or go on from `checkpoint` when that file exists.

    tensors: data.to_tensors of the training split. checkpoint: path of a .safetensors file, written
    every `every` epochs and at the end. on_epoch(model, epoch, record) may add to the record and
    return True to stop early: the run is finished then, a later call returns it as it is.
    stop_after: leave after that many epochs as a kill would (finished=False).
    objective(model, batch, alpha) -> (loss, terms): what is minimised (constraints.py adds terms).
    features: descriptors of the elements (ions.descriptors), for cfg.descriptors.
    compiled: torch.compile the step (needs a C++ compiler; on a CPU it costs 40 s and gains nothing, see lab notes).
    Raises Diverged (a ValueError) when the loss is not finite, ValueError when the checkpoint belongs to another configuration.
    """
    device = pick_device(device)
    tensors = {k: t.to(device) for k, t in tensors.items()}
    torch.manual_seed(cfg.seed)
    model = MEIDNet(cfg, shape_of(tensors, elements, cfg, features)).to(device)
    average = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
    optimizer, run, first = make_optimizer(model, cfg), Run(model), 0
    objective = torch.compile(objective, dynamic=False) if compiled else objective
    if checkpoint and os.path.exists(checkpoint):
        first = load_state(checkpoint, run, model, average, optimizer)
    for epoch in bar(range(first, cfg.epochs), cfg, first, progress):
        start = time.perf_counter()
        record = {"epoch": epoch, **train_epoch(model, average, optimizer, tensors, cfg, epoch, objective)}
        run.seconds += time.perf_counter() - start
        if not math.isfinite(record["loss"]):
            raise Diverged(f"loss became {record['loss']} in epoch {epoch} (seed {cfg.seed}); lower lr = {cfg.lr} or set clip", run)
        run.history.append(record | {"seconds": run.seconds})
        stop = on_epoch and on_epoch(average or model, epoch, run.history[-1])
        run.finished = bool(stop) or epoch + 1 == cfg.epochs
        if checkpoint and ((epoch + 1) % every == 0 or run.finished):
            save_state(checkpoint, run, model, average, optimizer, epoch + 1, run.finished)
        if stop or (stop_after and epoch + 1 >= stop_after):
            break
    run.model = (average or model).eval()
    return run


def bar(epochs, cfg, first, show):
    """tqdm over epochs when installed, else the plain range."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return epochs
    return tqdm(epochs, desc=f"{cfg.name} seed {cfg.seed}", initial=first, total=cfg.epochs, disable=not show, mininterval=1)
