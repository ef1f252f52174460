"""FTCP, a baseline of Table 1: a 1-D convolutional VAE on real- and reciprocal-space features (Ren et al. 2022).

    python -m meidnet_core.ftcp --dataset perov_5 --seed 0 --epochs 200

Written after Ren et al., Matter 5, 314 (2022) and the settings of its code (PV-Lab/FTCP): representation, scaling,
layers, loss, optimiser and decoding are theirs. What differs: rows of elements and properties that never occur,
constant zeros, are left out; element properties are recomputed from pymatgen in the classes of CGCNN; the scaling is fitted
on the training cells alone; an empty site between others is dropped (there it becomes hydrogen). A cell is taken as the file
has it, pymatgen's site order included: FTCP has no canonical origin or order. The KL term is weak by design: 2 times a mean
over 256 latents against a sum over a batch, so the model is close to an autoencoder.
"""

import argparse
import os
import time

import numpy as np
import torch
from torch import nn

from . import checkpoint, crystal, data, matching, results
from .experiments import RUNS
from .train import bar

POINTS, RADII, LATENT = 59, (1.297, 1.4), 256          # k points, radii in 1/angstrom (the second where the first holds too few)
SETTINGS = {"latent": LATENT, "optimizer": "rmsprop", "lr": 5e-4, "lr_steps": (1e-4, 5e-5), "plateau": 0.3,
            "patience": 4, "lr_min": 1e-6, "batch": 256, "w_kl": 2.0, "w_prop": 10.0, "occupancy": 0.05, "k_points": POINTS}
CHOICES = {"element_properties": "CGCNN classes from pymatgen", "scaling": "min-max per row on train", "cells": "file order and origin"}
EPOCHS = 200                                            # of the original
CLAIMS = {"perov_5": "t1.perov5.ftcp", "carbon_24": "t1.carbon24.ftcp", "mp_20": "t1.mp20.ftcp"}


def element_properties():
    """One-hot classes of CGCNN by atomic number, (104, K): group, period, electronegativity, radius, valence electrons,
    ionisation energy, electron affinity, block, molar volume. An unknown value has no class."""
    import warnings

    from pymatgen.core import Element
    bins = {"X": np.linspace(0.5, 4.0, 11), "atomic_radius": np.linspace(0.25, 2.5, 11), "valence": np.arange(0.5, 13),
            "log_ionization": np.linspace(1.3, 3.3, 11), "electron_affinity": np.linspace(-3, 3.7, 11),
            "log_volume": np.linspace(1.5, 4.3, 11)}
    log = lambda value: np.log(float(value)) if value else None
    rows = [np.zeros(18 + 7 + 4 + sum(len(b) - 1 for b in bins.values()))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # pymatgen names every missing value
        for e in map(Element.from_Z, range(1, 104)):
            values = {"X": e.X, "atomic_radius": e.atomic_radius, "valence": _valence(e), "electron_affinity": e.electron_affinity,
                      "log_ionization": log(e.ionization_energy), "log_volume": log(e.molar_volume)}    # eV, cm3/mol
            parts = [np.eye(18)[e.group - 1], np.eye(7)[e.row - 1], np.eye(4)["spdf".index(e.block)]]
            rows.append(np.concatenate(parts + [_one_hot(values[k], b) for k, b in bins.items()]))
    return torch.tensor(np.array(rows), dtype=torch.float32)


def _one_hot(value, edges):
    """Class of a value between edges; outside: the first or last class; None or NaN: no class."""
    if value is None or not np.isfinite(value):
        return np.zeros(len(edges) - 1)
    return np.eye(len(edges) - 1)[np.clip(np.searchsorted(edges, value) - 1, 0, len(edges) - 2)]


def _valence(element):
    """Electrons outside the noble-gas core and closed d and f shells."""
    shells = element.full_electronic_structure
    top = max(n for n, _, _ in shells)
    return sum(k for n, l, k in shells if n == top or (l == "d" and n == top - 1 and k < 10) or (l == "f" and n == top - 2 and k < 14))


def k_points(lattice):
    """Miller indices (M, 59, 3) and lengths (M, 59, in 1/angstrom) of the first 59 reciprocal points within 1.297 1/angstrom.

    Ordered by |h| + |k| + |l|, then -h, -k, -l. Cells with fewer points get 1.4, what still lacks stays zero.
    """
    grid = np.stack(np.meshgrid(*[np.arange(-8, 9)] * 3, indexing="ij"), -1).reshape(-1, 3)
    total = np.abs(grid).sum(1)
    grid = grid[(total > 0) & (total <= 8)]
    grid = grid[np.lexsort((*-grid.T[::-1], np.abs(grid).sum(1)))]
    hkl, g = [], []
    for cells in np.array_split(lattice, len(lattice) // 2048 + 1):
        reciprocal = np.linalg.inv(crystal.lattice_matrix(torch.from_numpy(cells)).numpy()).transpose(0, 2, 1)
        length = np.linalg.norm(grid @ reciprocal, axis=-1)                                 # (M, K)
        few = ((length <= RADII[0]).sum(1) < POINTS)[:, None]
        inside = length <= np.where(few, RADII[1], RADII[0])
        first = np.argsort(~inside, axis=1, kind="stable")[:, :POINTS]
        found = np.take_along_axis(inside, first, 1)
        hkl.append(grid[first] * found[..., None])
        g.append(np.take_along_axis(length, first, 1) * found)
    return np.concatenate(hkl), np.concatenate(g)


def original_cells(crystals):
    """(atomic numbers (M, N), frac (M, N, 3) in [0, 1), cells for matching): order and origin of the file, 0: empty."""
    numbers, frac, cells = np.zeros_like(crystals.numbers), np.zeros(crystals.frac.shape), []
    for i, z in enumerate(crystals.numbers):
        n = int((z > 0).sum())
        cell = crystal.Canonical(z[:n], crystals.frac[i, :n], crystals.order[i, :n], crystals.origin[i], crystals.rotation[i])
        numbers[i, :n], x = crystal.restore(cell)
        frac[i, :n] = np.maximum(np.mod(x + 1e-6, 1) - 1e-6, 0)      # a site at 0 must not flip to 0.9999999
        cells.append((crystals.lattice[i], [crystal.symbol(v) for v in numbers[i, :n]], frac[i, :n]))
    return numbers, frac, cells


def to_tensors(crystals, elements, sites, columns):
    """What `Layout.represent` needs: species of each element column (M, columns), column of each site (M, N), geometry, labels.

    Columns are the elements in order of first appearance; an empty column holds len(elements), an empty site -1.
    """
    numbers, frac, cells = original_cells(crystals)
    data.encode_species(crystals, elements)                          # DataError names an element outside the vocabulary
    lookup = {crystal.atomic_number(e): k for k, e in enumerate(elements)}
    species, column = np.full((len(numbers), columns), len(elements)), np.full((len(numbers), sites), -1)
    for i, z in enumerate(numbers):
        seen = list(dict.fromkeys(z[z > 0]))
        if len(seen) > columns:
            raise data.DataError(f"{crystals.name}/{crystals.split}, cell {crystals.ids[i]}: {len(seen)} elements, {columns} columns.")
        species[i, :len(seen)] = [lookup[v] for v in seen]
        column[i, :(z > 0).sum()] = [seen.index(v) for v in z[z > 0]]
    hkl, g = k_points(crystals.lattice)
    frac = np.pad(frac, ((0, 0), (0, sites - frac.shape[1]), (0, 0)))
    out = {"species": torch.from_numpy(species), "column": torch.from_numpy(column)}
    floats = {"lattice": crystals.lattice, "frac": frac, "hkl": hkl, "g": g, "labels": crystals.labels}
    return out | {k: torch.as_tensor(v, dtype=torch.float32) for k, v in floats.items()}, cells


class Layout:
    """Where things stand in a (rows, columns + 59) representation, and its min-max scaling (the limits of every row). Rows:
    elements, 2 lattice (lengths, angles), sites coordinates, sites occupancies, 1 distance of the k point, element properties, zeros
    up to a multiple of 4. Real space fills the first `columns`, reciprocal space the other 59.
    """

    def __init__(self, elements, sites, columns, properties=None):
        self.elements, self.sites, self.columns = tuple(elements), sites, columns
        if properties is None:
            table = element_properties()[crystal.atomic_numbers(elements)]
            properties = torch.cat([table[:, table.any(0)], torch.zeros(1, int(table.any(0).sum()))])
        self.properties = properties                                                        # (E + 1, K), last: empty
        self.rows = -(-(len(elements) + 2 + 2 * sites + 1 + self.properties.shape[1]) // 4) * 4
        self.low, self.span = torch.zeros(self.rows, 1), torch.ones(self.rows, 1)

    def represent(self, batch):
        """Scaled representation (B, rows, columns + 59). F = one-hot property of the site times pi k.r, summed over sites."""
        e, n, c = len(self.elements), self.sites, self.columns
        x = batch["g"].new_zeros(len(batch["g"]), self.rows, c + POINTS)
        x[:, :e, :c] = nn.functional.one_hot(batch["species"], e + 1)[..., :e].transpose(1, 2)
        x[:, e:e + 2, :3] = batch["lattice"].view(-1, 2, 3)
        x[:, e + 2:e + 2 + n, :3] = batch["frac"]
        x[:, e + 2 + n:e + 2 + 2 * n, :c] = occupancy = nn.functional.one_hot(batch["column"] + 1, c + 1)[..., 1:].float()
        x[:, e + 2 + 2 * n, c:] = batch["g"]
        k, last = self.properties.shape[1], e + 3 + 2 * n
        x[:, last:last + k, :c] = columns = self.properties[batch["species"]].transpose(1, 2)              # (B, K, c)
        phase = torch.pi * batch["hkl"] @ batch["frac"].transpose(1, 2)                                    # (B, 59, N)
        x[:, last:last + k, c:] = columns @ (occupancy.transpose(1, 2) @ phase.transpose(1, 2))
        return (x - self.low) / self.span

    def fit(self, tensors, block=1024):
        """Limits of every row over a training set; a constant row becomes 0."""
        high, low = torch.full((self.rows, 1), -torch.inf), torch.full((self.rows, 1), torch.inf)
        for rows in torch.arange(len(tensors["g"])).split(block):
            x = self.represent({k: t[rows] for k, t in tensors.items()})
            high, low = torch.maximum(high, x.amax((0, 2))[:, None]), torch.minimum(low, x.amin((0, 2))[:, None])
        self.low, self.span = low, torch.where(high > low, high - low, torch.ones_like(low))
        return self

    def to(self, device):
        """Its tensors on a device; returns itself."""
        self.properties, self.low, self.span = self.properties.to(device), self.low.to(device), self.span.to(device)
        return self

    def cells(self, x, threshold=SETTINGS["occupancy"]):
        """Representations (B, rows, columns + 59) -> cells of matching.py: most likely element of each column, most likely
        column of each site; a site whose largest occupancy is below the threshold is empty."""
        x, e, n = (x * self.span + self.low).cpu().numpy(), len(self.elements), self.sites
        names = np.array(self.elements)[x[:, :e, :self.columns].argmax(1)]                                # (B, columns)
        occupancy = x[:, e + 2 + n:e + 2 + 2 * n, :self.columns]
        real, column = occupancy.max(2) >= threshold, occupancy.argmax(2)                                 # (B, N)
        return [(x[i, e:e + 2, :3].reshape(6), names[i][column[i][real[i]]].tolist(), x[i, e + 2:e + 2 + n, :3][real[i]])
                for i in range(len(x))]


class FTCP(nn.Module):
    """VAE over rows (channels: columns) with a property branch on the latent mean. x (B, rows, channels) in [0, 1]."""

    def __init__(self, rows, channels, labels):
        super().__init__()
        leaky, relu, size = nn.LeakyReLU(0.2), nn.ReLU(), rows // 4
        norm = lambda width: nn.BatchNorm1d(width, eps=1e-3, momentum=0.01)   # the defaults of Keras
        self.encode = nn.Sequential(nn.Conv1d(channels, 32, 5, 2, 2), norm(32), leaky, nn.Conv1d(32, 64, 3, 2, 1), norm(64), leaky,
                                    nn.Conv1d(64, 128, 3, 1, 1), norm(128), leaky, nn.Flatten(),
                                    nn.Linear(128 * size, 1024), nn.Sigmoid())
        self.moments = nn.Linear(1024, 2 * LATENT)
        self.prop = nn.Sequential(relu, nn.Linear(LATENT, 128), relu, nn.Linear(128, 32), relu, nn.Linear(32, labels), nn.Sigmoid())
        self.decode = nn.Sequential(nn.Linear(LATENT, 128 * size), relu, nn.Unflatten(1, (128, size)), norm(128),
                                    nn.ConvTranspose1d(128, 64, 3, 1, 1), norm(64), relu,
                                    nn.ConvTranspose1d(64, 32, 3, 2, 1, 1), norm(32), relu,
                                    nn.ConvTranspose1d(32, channels, 5, 2, 2, 1), nn.Sigmoid())
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
                nn.init.xavier_uniform_(layer.weight)                  # Keras: Glorot, zero bias
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        """(reconstruction, latent mean, log variance, scaled labels). The latent is sampled in training, its mean used after."""
        mean, log_var = self.moments(self.encode(x.transpose(1, 2))).chunk(2, 1)
        z = mean + torch.exp(log_var / 2) * torch.randn_like(mean) if self.training else mean
        return self.decode(z).transpose(1, 2), mean, log_var, self.prop(mean)


def loss_of(model, x, labels, bf16=False):
    """Sum of squares + 2 KL (mean over latents and batch) + 10 times squared error of known labels, summed. Returns (loss, terms)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        out, mean, log_var, prop = model(x)
    out, mean, log_var, prop = out.float(), mean.float(), log_var.float(), prop.float()
    recon = ((out - x) ** 2).sum()
    kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).mean()
    known = ~labels.isnan()
    error = (torch.where(known, prop - torch.nan_to_num(labels), torch.zeros_like(prop)) ** 2).sum()
    loss = recon + SETTINGS["w_kl"] * kl + SETTINGS["w_prop"] * error
    return loss, {k: v.detach() for k, v in (("loss", loss), ("recon", recon), ("kl", kl), ("prop", error))}


def next_rate(history, lr, epochs):
    """(learning rate of the coming epoch, whether it was cut): steps to 1e-4 and 5e-5, and times 0.3 whenever the loss has
    not fallen for 4 epochs, as the callbacks of the original."""
    epoch, losses = len(history), [h["loss"] for h in history]
    bad = len(losses) - 1 - int(np.argmin(losses)) if losses else 0
    last_cut = max((i for i, h in enumerate(history) if h["cut"]), default=-1)
    if min(bad, epoch - last_cut) >= SETTINGS["patience"]:
        return max(lr * SETTINGS["plateau"], SETTINGS["lr_min"]), True
    steps = dict(zip(rate_steps(epochs), SETTINGS["lr_steps"]))
    return steps.get(epoch, lr) if epoch else SETTINGS["lr"], False


def rate_steps(epochs):
    """Epochs of the two steps: 50 and 100 as in the original; a run too short for them steps at 60 and 85 %."""
    return (50, 100) if epochs >= 200 else (round(0.6 * epochs), round(0.85 * epochs))


def scaled_labels(labels):
    """Labels scaled to [0, 1] by their known limits, NaN kept."""
    low, high = (torch.tensor(f(labels.numpy(), axis=0)) for f in (np.nanmin, np.nanmax))
    return (labels - low) / (high - low).clamp_min(1e-9)


def train(layout, tensors, seed=0, epochs=200, minutes=None, path=None, every=5, bf16=False, progress=True, device="cpu"):
    """(model, history, seconds). Goes on from `path` when that file exists, stops after `epochs` or `minutes` of training.

    bf16: layers in bfloat16, weights and loss in single precision (1.6 times faster on a CPU that has the instructions). Order
    and noise of an epoch depend on seed and epoch alone. Raises checkpoint.CheckpointError when `path` belongs to another run.
    """
    torch.manual_seed(seed)
    tensors = {k: t.to(device) for k, t in (tensors | {"labels": scaled_labels(tensors["labels"])}).items()}
    layout = layout.to(device)
    model = FTCP(layout.rows, layout.columns + POINTS, tensors["labels"].shape[1]).to(device)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=SETTINGS["lr"], alpha=0.9, eps=1e-7)
    identity, history, seconds = {"seed": seed, "epochs": epochs, "cells": len(tensors["g"]), "rows": layout.rows, "bf16": bf16}, [], 0.0
    if path and os.path.exists(path):
        history, seconds = checkpoint.load_progress(path, identity, model, optimizer)
    first = len(history)
    for epoch in bar(range(first, epochs), argparse.Namespace(name="ftcp", seed=seed, epochs=epochs), first, progress):
        if minutes and seconds > 60 * minutes:
            break
        start = time.perf_counter()
        lr, cut = next_rate(history, optimizer.param_groups[0]["lr"], epochs)
        optimizer.param_groups[0]["lr"] = lr
        record = train_epoch(model, optimizer, layout, tensors, seed * 1_000_003 + epoch, bf16)
        seconds += time.perf_counter() - start
        history.append({"epoch": epoch, "lr": lr, "cut": cut, "seconds": seconds} | record)
        if not np.isfinite(record["loss"]):
            raise ValueError(f"loss became {record['loss']} in epoch {epoch} (seed {seed})")
        if path and (epoch + 1) % every == 0:
            checkpoint.save_progress(path, identity, model, optimizer, history, seconds)
    if path and len(history) > first:                                     # a finished state says where it was trained
        checkpoint.save_progress(path, identity, model, optimizer, history, seconds)
    return model.eval(), history, seconds


def train_epoch(model, optimizer, layout, tensors, seed, bf16=False):
    """One pass; mean loss terms per batch."""
    torch.manual_seed(seed)
    index, sums = torch.randperm(len(tensors["g"])).to(tensors["g"].device).split(SETTINGS["batch"]), {}
    model.train()
    for rows in index:
        batch = {k: t[rows] for k, t in tensors.items()}
        loss, terms = loss_of(model, layout.represent(batch), batch["labels"], bf16)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        sums = {k: sums.get(k, 0) + v / len(index) for k, v in terms.items()}
    return {k: v.item() for k, v in sums.items()}


@torch.no_grad()
def reconstruct(model, layout, tensors, threshold=SETTINGS["occupancy"], block=512):
    """Every cell through encoder (latent mean) and decoder: list of cells."""
    cells = []
    for rows in torch.arange(len(tensors["g"])).split(block):
        cells += layout.cells(model(layout.represent({k: t[rows] for k, t in tensors.items()}))[0], threshold)
    return cells


def evaluate(predicted, true, processes=None):
    """SM and RMSE at both sets of tolerances (matching.py), and what a match needs first: the composition."""
    out = {"composition": 100 * float(matching.same_composition(predicted, true).mean()),
           "atoms": 100 * float(np.mean([len(p[1]) == len(t[1]) for p, t in zip(predicted, true)]))}
    return out | {k: v for k, v in matching.score(predicted, true, processes)[0].items() if v is not None}


def prepare(dataset):
    """(layout fitted on train, tensors by split, cells by split)."""
    crystals = {s: data.load(dataset, s) for s in data.SPLITS}
    elements = data.vocabulary(*crystals.values())
    sites = max(c.numbers.shape[1] for c in crystals.values())
    columns = max(3, *(len(set(z[z > 0])) for c in crystals.values() for z in c.numbers))
    both = {s: to_tensors(c, elements, sites, columns) for s, c in crystals.items()}
    layout = Layout(elements, sites, columns).fit(both["train"][0])
    return layout, {s: b[0] for s, b in both.items()}, {s: b[1] for s, b in both.items()}


def state_of(dataset, seed, epochs):
    """Where an unfinished training lies."""
    return RUNS / f"ftcp-{dataset}-{epochs}-seed{seed}.safetensors"


def claims_of(dataset, m, epochs):
    """Row of Table 1; its split says when the training was cut short."""
    note = "" if epochs >= EPOCHS else f"{epochs} of {EPOCHS} epochs"
    return {CLAIMS[dataset]: {"value": m["sm_cdvae"], "split": data.test_split(dataset, note)}}


def run(dataset, seed=0, epochs=EPOCHS, minutes=None, split="test", bf16=False, processes=None):
    """Train, score a held-out split; the run file is written for `test` only. Returns the metrics."""
    layout, tensors, cells = prepare(dataset)
    state = state_of(dataset, seed, epochs)
    model, history, seconds = train(layout, tensors["train"], seed, epochs, minutes, state, bf16=bf16)
    m = evaluate(reconstruct(model, layout, tensors[split]), cells[split], processes)
    m |= {"loss": history[-1]["loss"], "seconds_per_epoch": seconds / len(history)}
    if split == "test":
        config = SETTINGS | CHOICES | {"epochs": len(history), "epochs_original": EPOCHS, "lr_step_epochs": rate_steps(epochs),
                                       "bf16": bf16, "rows": layout.rows, "train_cells": len(tensors["train"]["g"])}
        short = "" if epochs == EPOCHS else epochs                    # another length by request: a run of its own, without a claim
        results.write_run(f"{dataset}-ftcp{short}", f"seed{seed}", config=config, seed=seed, data_set=dataset, split=split,
                          n=len(cells[split]), metrics=m, claims={} if short else claims_of(dataset, m, len(history)), wall_time_s=seconds,
                          **checkpoint.made_on(state))
    return m


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="perov_5", choices=list(CLAIMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--minutes", type=float, help="stop the training after that long; the epochs reached are recorded")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="val: to choose settings, nothing is written")
    parser.add_argument("--bf16", action="store_true", help="layers in bfloat16")
    parser.add_argument("--processes", type=int, help="for structure matching")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = run(args.dataset, args.seed, args.epochs, args.minutes, args.split, args.bf16, args.processes)
    for key, value in found.items():
        print(f"{key:24s} {value:.5g}")
    if args.split == "test":
        results.write_claims()


if __name__ == "__main__":
    main()
