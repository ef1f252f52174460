"""Several trainings abreast: runs that differ in seed and curriculum alone become one batched model and one CUDA graph a step.

    python -m meidnet_core.campaign fusion --preset paper --epochs 200 --pack runs/fusion.safetensors   # where the data are
    python -m meidnet_core.abreast runs/fusion.safetensors                  # on a GPU: torch, numpy, safetensors
    python -m meidnet_core.campaign fusion --preset paper --epochs 200      # back again, with runs/: scores the states found there

A batch of 16 cells leaves a GPU idle and a step waits for a thousand launches. Here torch.func.vmap gives every tensor a first
axis of M runs, torch.compile fuses what it can and the graph replays a step without Python. Initial weights and the order of
the cells are those of `train.train` for the same seed; noise is drawn from one generator, and after an interruption on a GPU it is
another draw. torch and numpy only.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from . import checkpoint
from .config import Config
from .losses import contrastive_weight, total_loss
from .model import MEIDNet
from .train import Run, average_decay, bar, batches, learning_rate, make_optimizer, optimizer_of, pick_device, shape_of


def pack(path, runs, tensors, elements, val):
    """Write what a GPU machine needs: runs {file name of the state: Config}, tensors of train and of the cells every epoch scores.

    Raises ValueError for a configuration with element descriptors: their table does not travel.
    """
    if any(cfg.descriptors for cfg in runs.values()):
        raise ValueError(f"{path}: configurations with element descriptors are trained where the data are")
    named = {f"{split}.{k}": t for split, part in (("train", tensors), ("val", val)) for k, t in part.items()}
    checkpoint.write(path, named, {"runs": {k: cfg.to_dict() for k, cfg in runs.items()}, "elements": list(elements)})


def unpack(path, device):
    """(runs, training tensors, val tensors, elements) of a file that `pack` wrote; checkpoint.CheckpointError when it is no such file."""
    tensors, meta = checkpoint.read(path)
    if "runs" not in meta:
        raise checkpoint.CheckpointError(f"{path}: holds no packed runs; write it with `campaign ... --pack`.")
    part = lambda split: {k.split(".", 1)[1]: t.to(device) for k, t in tensors.items() if k.startswith(f"{split}.")}
    return {k: Config.from_dict(c) for k, c in meta["runs"].items()}, part("train"), part("val"), meta["elements"]


def architecture(cfg):
    """What runs abreast must share: everything but the seed and the curriculum."""
    return cfg.with_(seed=0, curriculum="none", ramp=1.0)


def groups(runs, folder):
    """Runs {name: Config} by architecture and by how far their states in `folder` are, in the order given: a kill between two writes,
    or a state that is gone, sets back those runs and no others."""
    found = {}
    for name, cfg in runs.items():
        found.setdefault((architecture(cfg), checkpoint.epochs_done(Path(folder) / name)), {})[name] = cfg
    return list(found.values())


class Objective(nn.Module):
    """total_loss as the forward of a module: functional_call wants one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, alpha):
        return total_loss(self.model, batch, alpha)


@torch.no_grad()
def held_out(model, batch):
    """Proxies of `trial.proxies` as tensors, so that they can be batched over runs: exact (%), cosine, l2d, joint_r2.

    exact: all species right from the joint latent; the others as in metrics.alignment and metrics.regression, means over the labels.
    """
    z_c, y_c = model.embed_structure(batch)
    ys = model.embed_properties(model.scale(batch)[1])
    z = model.join(y_c, ys)
    right = (model.decoder(z)["species"].argmax(-1) == batch["species"]) | (batch["mask"] == 0)
    mean = lambda v, known: (v * known).sum(0) / known.sum(0)
    labels, known = torch.nan_to_num(batch["labels"]), ~batch["labels"].isnan()
    error = (model.properties(z, z_c) * model.label_std + model.label_mean - labels) ** 2
    spread = (labels - mean(labels, known)) ** 2
    r2 = 1 - (error * known).sum(0) / (spread * known).sum(0)
    return {"exact": 100 * right.all(-1).float().mean(),
            "cosine": torch.stack([mean((y_c * y).sum(-1), k) for y, k in ys]).mean(),
            "l2d": torch.stack([mean((y_c - y).norm(dim=-1), k) for y, k in ys]).mean(), "joint_r2": r2.mean()}


class Proxies(Objective):
    """held_out as the forward of a module; its parameters go by the names of Objective."""

    def forward(self, batch):
        return held_out(self.model, batch)


class Abreast:
    """M runs of one architecture: weights, moments, averages (M, ...); cells, order and schedules on the device.

    compiled: fuse the step (a GPU; on a CPU it needs a C++ compiler and gains nothing). graph: replay it as a CUDA graph.
    """

    def __init__(self, cfgs, tensors, elements, compiled=False, graph=True):
        self.cfgs, self.cfg, self.tensors = cfgs, cfgs[0], tensors
        self.device = tensors["species"].device
        self.models = [self.fresh(cfg, elements) for cfg in cfgs]
        self.weights, self.buffers = stack_module_state([Objective(m) for m in self.models])
        self.base, self.proxies = Objective(copy.deepcopy(self.models[0])), Proxies(copy.deepcopy(self.models[0]).eval())
        self.averages = {k: w.detach().clone() for k, w in self.weights.items()} if self.cfg.ema else None
        self.count, self.steps = len(tensors["species"]), -(-len(tensors["species"]) // self.cfg.batch)
        rate, cuda = torch.tensor(self.cfg.lr, device=self.device), self.device.type == "cuda"    # rate and counter stay on the device
        self.optimizer = optimizer_of(list(self.weights.values()), self.cfg, axes=1, lr=rate, capturable=cuda)
        self.order = torch.zeros(len(cfgs), self.count, dtype=torch.long, device=self.device)
        self.alpha = torch.zeros(len(cfgs), device=self.device)
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)                      # steps taken, all epochs together
        self.sums, self.graph, self.replay = {}, graph and cuda, {}                         # sums: losses of an epoch, (M,) each
        self.rates, self.decays = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in self.schedules())
        self.loss = torch.compile(self.batched_loss, dynamic=False) if compiled else self.batched_loss

    def fresh(self, cfg, elements):
        """The model that train.train starts from."""
        torch.manual_seed(cfg.seed)
        return MEIDNet(cfg, shape_of(self.tensors, elements, cfg)).to(self.device).train()

    def schedules(self):
        """Learning rate and decay of the average at every step of the training, as train.train_epoch sets them."""
        total = self.cfg.epochs * self.steps
        return [learning_rate(self.cfg, k / total) for k in range(total)], [average_decay(self.cfg, k) for k in range(total)]

    def batched_loss(self, weights, batch, alpha):
        one = lambda w, b, *inputs: functional_call(self.base, (w, b), inputs)
        loss, terms = torch.vmap(one, randomness="different")(weights, self.buffers, batch, alpha)
        return loss.sum(), terms                                                            # terms: (M,) each

    def step(self, size):
        """One batch of `size` cells for every run; nothing in it asks the device for a number."""
        first = self.at % self.steps * self.cfg.batch
        rows = self.order.index_select(1, first + torch.arange(size, device=self.device))   # (M, B)
        loss, terms = self.loss(self.weights, {k: t[rows] for k, t in self.tensors.items()}, self.alpha)
        weights = list(self.weights.values())
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True)):    # the last shift is used by nobody
            weight.grad = grad if grad is None else grad.contiguous()     # fused Adam reads memory as it lies
        self.clip()
        for group in self.optimizer.param_groups:
            group["lr"].copy_(self.rates.index_select(0, self.at).squeeze(0))
        self.optimizer.step()
        self.average()
        for k, v in terms.items():
            self.sums[k] = self.sums[k].add_(v) if k in self.sums else v.clone()
        self.at += 1

    def clip(self):
        """clip_grad_norm_ run by run."""
        if self.cfg.clip:
            grads = [w.grad for w in self.weights.values() if w.grad is not None]
            norm = sum(g.flatten(1).square().sum(1) for g in grads).sqrt()                  # (M,)
            factor = (self.cfg.clip / (norm + 1e-6)).clamp_max(1)
            for g in grads:
                g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))

    @torch.no_grad()
    def average(self):
        if self.averages is not None:
            weight = 1 - self.decays.index_select(0, self.at).squeeze(0)
            change = torch._foreach_sub(list(self.weights.values()), list(self.averages.values()))
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(list(self.averages.values()), change)

    def stepper(self, size):
        """step(size), as a CUDA graph where there is a GPU; made once for each size of batch."""
        if size not in self.replay:
            self.replay[size] = self.capture(size) if self.graph else lambda: self.step(size)
        return self.replay[size]

    def capture(self, size):
        """Three steps that compile and allocate, taken back (but for the sums, which an epoch starts at 0), then one that is recorded."""
        full = self.loss
        self.loss = full if size == self.cfg.batch else self.batched_loss                   # the last batch: not worth a compilation
        state = [*self.weights.values(), *(self.averages or {}).values(), self.at]
        before, known = [t.detach().clone() for t in state], bool(self.optimizer.state)
        moments = [t.clone() for s in self.optimizer.state.values() for t in s.values()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(size)
        with torch.no_grad():
            for t, old in zip(state, before):
                t.copy_(old)
            for k, t in enumerate([t for s in self.optimizer.state.values() for t in s.values()]):
                t.copy_(moments[k]) if known else t.zero_()
        self.loss = full
        return graph.replay

    def epoch(self, number):
        """One pass over the cells; mean losses of every run, a list of dicts."""
        index = [torch.cat(batches(self.count, cfg, number, "cpu")) for cfg in self.cfgs]
        self.order.copy_(torch.stack(index))
        alpha = [contrastive_weight(number, c.epochs, c.curriculum, c.ramp) for c in self.cfgs]
        self.alpha.copy_(torch.tensor(alpha))
        self.at.fill_(number * self.steps)
        sizes = [self.cfg.batch] * (self.count // self.cfg.batch) + [self.count % self.cfg.batch] * (self.count % self.cfg.batch > 0)
        replays = [self.stepper(size) for size in sizes]
        for total in self.sums.values():
            total.zero_()
        for replay in replays:
            replay()
        means = {k: (v / self.steps).tolist() for k, v in self.sums.items()}
        lr = float(self.rates[(number + 1) * self.steps - 1])
        return [{k: v[i] for k, v in means.items()} | {"alpha": alpha[i], "lr": lr} for i in range(len(self.cfgs))]

    @torch.no_grad()
    def score(self, val):
        """held_out of every run on the cells `val`, a list of dicts."""
        one = lambda w, b: functional_call(self.proxies, (w, b), (val,))
        scores = torch.vmap(one)(self.averages or self.weights, self.buffers)
        return [{f"val_{k}": float(v[i]) for k, v in scores.items()} for i in range(len(self.cfgs))]

    @torch.no_grad()
    def parts(self, i):
        """(model, average or None, optimizer) of run i, as train.train holds them."""
        model, average = self.models[i], copy.deepcopy(self.models[i]).requires_grad_(False) if self.averages else None
        for p, row in self.rows(i, model, average):
            p.copy_(row)
        optimizer = make_optimizer(model, self.cfg)
        for k, p in model.named_parameters():
            state = self.optimizer.state.get(self.weights[f"model.{k}"])
            if state:
                optimizer.state[p] = {key: v.clone() if key == "step" else v[i].clone() for key, v in state.items()}
        return model, average, optimizer

    def rows(self, i, model, average):
        """Each parameter of run i, those of the average after those of the model, with a view of where it is stacked."""
        yield from ((p, self.weights[f"model.{k}"][i]) for k, p in model.named_parameters())
        if average is not None:
            yield from ((p, self.averages[f"model.{k}"][i]) for k, p in average.named_parameters())


@torch.no_grad()
def resume(team, runs, folder, names):
    """Take up the states that `save` left when every run has one; returns the epoch to go on with."""
    if not folder or not all((Path(folder) / n).exists() for n in names):
        return 0
    moments, epochs = [], []
    for i, (run, name) in enumerate(zip(runs, names)):
        model, average, optimizer = team.parts(i)
        epochs.append(checkpoint.load_state(Path(folder) / name, run, model, average, optimizer))
        for p, row in team.rows(i, model, average):
            row.copy_(p)
        moments.append({k: optimizer.state.get(p, {}) for k, p in model.named_parameters()})
    for k in moments[0]:
        states = [m[k] for m in moments]
        if all(states):
            team.optimizer.state[team.weights[f"model.{k}"]] = {
                key: states[0][key].to(team.device) if key == "step" else torch.stack([s[key] for s in states]) for key in states[0]}
    return max(epochs)


def train(cfgs, tensors, elements, val, folder=None, names=None, every=20, compiled=None, graph=True, progress=True,
          stop_after=None):
    """Train Configs of one architecture abreast; returns a list of train.Run, states under folder/name as train.train writes them.

    A run whose loss is not finite any more keeps the history up to there, and NaN for weights, while the others go on (`finished` False):
    train.train, handed its state, says Diverged. compiled:
    by default on a GPU. Goes on from the states in folder when all are there. Raises ValueError when the architectures differ.
    """
    if len({architecture(c) for c in cfgs}) != 1:
        raise ValueError("runs abreast may differ in seed, curriculum and ramp alone")
    cuda = tensors["species"].device.type == "cuda"
    team = Abreast(cfgs, tensors, elements, compiled=cuda if compiled is None else compiled, graph=graph)
    runs = [Run(m, finished=False) for m in team.models]
    first = resume(team, runs, folder, names)
    for number in bar(range(first, cfgs[0].epochs), cfgs[0].with_(name=f"{len(cfgs)} runs, {cfgs[0].name}"), first, progress):
        start = time.perf_counter()
        records = [r | s for r, s in zip(team.epoch(number), team.score(val))]
        for run, record in zip(runs, records):
            run.seconds += time.perf_counter() - start
            if len(run.history) == number and math.isfinite(record["loss"]):
                run.history.append({"epoch": number, **record, "seconds": run.seconds})
            run.finished = len(run.history) == cfgs[0].epochs
        alive = any(len(run.history) == number + 1 for run in runs)
        if folder and ((number + 1) % every == 0 or number + 1 == cfgs[0].epochs or not alive):
            save(team, runs, folder, names, number + 1)
        if not alive or number + 1 == stop_after:
            break
    for i, run in enumerate(runs):
        model, average, _ = team.parts(i)
        run.model = (average or model).eval()
    return runs


@torch.no_grad()
def save(team, runs, folder, names, done):
    """States of all runs after `done` epochs; the moments of a finished one are of no use to anybody. Of one whose loss was infinite in
    an earlier epoch the weights went on: they are not those of its last finite epoch, and must not pass for them."""
    for i, (run, name) in enumerate(zip(runs, names)):
        model, average, optimizer = team.parts(i)
        if len(run.history) < done:
            for p in model.parameters():
                p.fill_(math.nan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0) if run.finished else optimizer
        checkpoint.save_state(Path(folder) / name, run, model, average, optimizer, len(run.history), run.finished)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", help="a file that `campaign --pack` wrote; states go beside it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="fuse the step: a minute at the start; default on a GPU")
    parser.add_argument("--every", type=int, default=20, help="epochs between two writes of the states")
    args = parser.parse_args()
    runs, tensors, val, elements = unpack(args.packed, pick_device(args.device))
    folder = Path(args.packed).parent
    for group in groups(runs, folder):
        start = time.perf_counter()
        done = train(list(group.values()), tensors, elements, val, folder, list(group), args.every, args.compile)
        for name, run in zip(group, done):
            print(f"{name}: {'finished' if run.finished else 'not finite any more'} after {len(run.history)} epochs")
        print(f"{len(group)} runs, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
