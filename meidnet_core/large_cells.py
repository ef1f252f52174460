"""Table 1 on cells of any size: train the set autoencoder of flow.py, decode test crystals from their latents, match.

    python -m meidnet_core.large_cells mp_20 --seed 0          # or carbon_24, perov_5; --trivial: match rates without a model
"""

import argparse
import copy
import os
import time
from dataclasses import asdict

import numpy as np
import torch

from . import checkpoint, data, flow, matching, results
from .config import renamed
from .crystal import lattice_matrix
from .experiments import CHECKPOINTS, RUNS
from .train import Run, bar, learning_rate, make_optimizer, pick_device, update_average

DRAWS = 2                                                  # of the flow, a cell
PRESETS = {"mp_20": flow.FlowConfig(swap=0.5, epochs=30), "perov_5": flow.FlowConfig(dataset="perov_5", swap=0.5, epochs=20),
           "carbon_24": flow.FlowConfig(dataset="carbon_24", strain=0.05, shake=0.1, epochs=40)}


NOTHING = (np.array([1.0, 1, 1, 90, 90, 90]), [], np.zeros((0, 3)))        # where no composition was decoded: matches nothing


def niggli(lattice, frac):
    """The same crystal in its Niggli cell: (6,), (N, 3) -> (6,), (N, 3). Where spglib finds none, unchanged."""
    import warnings

    import spglib
    from pymatgen.core import Lattice
    old = Lattice.from_parameters(*lattice).matrix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                               # its error handling is about to change, it says each time
        new = spglib.niggli_reduce(old)
    if new is None:
        return np.asarray(lattice), frac
    new = new * np.sign(np.linalg.det(new) * np.linalg.det(old))
    return np.array(Lattice(new).parameters), (frac @ old @ np.linalg.inv(new)) % 1.0


def buckets(crystals, elements, device="cpu"):
    """Cells of equal N together, in Niggli form: {N: dict(index (M,), species (M, N), frac (M, N, 3), lattice (M, 6))}."""
    species, sizes, groups = data.encode_species(crystals, elements), (crystals.numbers > 0).sum(1), {}
    for n in np.unique(sizes):
        rows = np.flatnonzero(sizes == n)
        cells = [niggli(crystals.lattice[i], crystals.frac[i, :n]) for i in rows]
        groups[int(n)] = {"index": torch.from_numpy(rows), "species": torch.from_numpy(species[rows, :n]),
                          "frac": torch.tensor(np.array([f for _, f in cells]), dtype=torch.float32),
                          "lattice": torch.tensor(np.array([l for l, _ in cells]), dtype=torch.float32)}
        groups[int(n)] = {k: t.to(device) for k, t in groups[int(n)].items()}
    return groups


def with_images(groups, cfg, block=256):
    """Add the distance features of cells that training does not strain or shake (half precision, about 0.1 GB for MP-20)."""
    if cfg.strain or cfg.shake:
        return groups
    for g in groups.values():
        parts = [flow.image_sums(f, lattice_matrix(l), cfg.rbf, cfg.cutoff).half()
                 for f, l in zip(g["frac"].split(block), g["lattice"].split(block))]
        g["images"] = torch.cat(parts)
    return groups


def shape_of(groups, elements, cfg, few=200):
    """SetShape from the training cells; radial distributions from `few` cells of every size."""
    sums = [flow.image_sums(g["frac"][:few], lattice_matrix(g["lattice"][:few]), cfg.rbf, cfg.cutoff).sum(2).flatten(0, 1)
            for g in groups.values()]
    rdf_std, rdf_mean = torch.std_mean(torch.cat(sums), 0)
    features = torch.cat([flow.lattice_features(g["lattice"]) for g in groups.values()])
    most = max(int(torch.nn.functional.one_hot(g["species"], len(elements)).sum(1).max()) for g in groups.values())
    statistics = features.mean(0), features.std(0).clamp_min(1e-2), rdf_mean, rdf_std.clamp_min(1e-2)
    return flow.SetShape(tuple(elements), most, *(tuple(t.tolist()) for t in statistics))


def epoch_batches(groups, cfg, epoch):
    """[(N, rows)] of one epoch, about cfg.pairs pairs of sites each; order fixed by seed and epoch."""
    g, out = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch), []
    for n, group in groups.items():
        size = min(max(round(cfg.pairs / n**2), 8), 256)
        out += [(n, rows) for rows in torch.randperm(len(group["index"]), generator=g).split(size)]
    return [out[i] for i in torch.randperm(len(out), generator=g)]


def train_epoch(model, average, optimizer, groups, cfg, epoch):
    """One pass; mean losses."""
    todo, sums = epoch_batches(groups, cfg, epoch), {}
    model.train()
    for k, (n, rows) in enumerate(todo):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, (epoch + k / len(todo)) / cfg.epochs)
        loss, terms = flow.set_loss(model, {key: t[rows] for key, t in groups[n].items()})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        step = epoch * len(todo) + k
        update_average(average, model, min(cfg.ema, (1 + step) / (10 + step)))
        for key, value in terms.items():
            sums[key] = sums.get(key, 0) + float(value)
    return {key: v / len(todo) for key, v in sums.items()}


def train(cfg, groups, elements, state=None, device="cpu", on_epoch=None, progress=True):
    """Train, or go on from the file `state`. Returns train.Run with the averaged model."""
    torch.manual_seed(cfg.seed)
    groups = with_images(groups, cfg)
    model = flow.SetAutoencoder(cfg, shape_of(groups, elements, cfg)).to(device)
    average, optimizer, run, first = copy.deepcopy(model).requires_grad_(False), make_optimizer(model, cfg), Run(model), 0
    if state and os.path.exists(state):
        first = checkpoint.load_state(state, run, model, average, optimizer)
    for epoch in bar(range(first, cfg.epochs), cfg, first, progress):
        start = time.perf_counter()
        record = {"epoch": epoch, **train_epoch(model, average, optimizer, groups, cfg, epoch)}
        run.seconds += time.perf_counter() - start
        run.history.append(record | {"seconds": run.seconds})
        if not np.isfinite(record["loss"]):
            raise ValueError(f"loss became {record['loss']} in epoch {epoch} (seed {cfg.seed}); lower lr = {cfg.lr}")
        if on_epoch:
            on_epoch(average, epoch, run.history[-1])
        if state:
            checkpoint.save_state(state, run, model, average, optimizer, epoch + 1)
    run.model = average.eval()
    return run


def save_model(path, model, **extra):
    """Weights, configuration and shape, as checkpoint.save_model does for MEIDNet."""
    checkpoint.write(path, model.state_dict(), {"config": model.cfg.to_dict(), "shape": asdict(model.shape), **extra})


def load_model(path, device="cpu"):
    """(model in eval mode, meta) from `save_model`; CheckpointError for another file."""
    tensors, meta = checkpoint.read(path)
    try:
        shape = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["shape"].items()}
        model = flow.SetAutoencoder(flow.FlowConfig(**meta["config"]), flow.SetShape(**shape))
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{path}: its header describes no set autoencoder ({type(error).__name__}: {error}).") from error
    checkpoint.fit(path, model, tensors)
    return model.to(device).eval(), meta


@torch.no_grad()
def encode(model, groups):
    """Latents of all cells in the order of the data set, (M, 128)."""
    index = torch.cat([g["index"] for g in groups.values()])
    parts = [model.encoder(*(g[k][rows] for k in ("species", "frac", "lattice")))
             for n, g in groups.items() for rows in torch.arange(len(g["index"])).split(max(1, 40000 // n**2))]
    return torch.cat(parts)[index.argsort()]


@torch.no_grad()
def compositions(model, z, most=40):
    """Decoded counts as species rows grouped by N: [(rows (M,), species (M, N))], and the confidence (B,)."""
    counts, confidence = model.decode_counts(z)
    total, out = counts.sum(1), []
    for n in total.unique().tolist():
        rows = torch.nonzero(total == n)[:, 0]
        if 0 < n <= most:
            species = torch.stack([torch.arange(counts.shape[1], device=z.device).repeat_interleave(c) for c in counts[rows]])
            out += [(rows[p], species[p]) for p in torch.arange(len(rows)).split(max(1, 20000 // n**2))]
    return out, confidence


def reconstruct(model, z, draws=4, memory=None, steps=20, refine_steps=30, generator=None, progress=True):
    """Latents (M, 128) -> (cells as in matching.py, None where no composition came out; residual (M,); confidence (M,)).

    Candidates are `draws` flows and, with a `memory`, arrangements of training cells. The one whose own
    encoding is nearest to the latent is kept, then refined.
    """
    from tqdm.auto import tqdm
    groups, confidence = compositions(model, z)
    cells, left = [None] * len(z), torch.full((len(z),), float("nan"))
    for rows, species in tqdm(groups, desc="decode", disable=not progress, mininterval=1):
        zs, lattice = z[rows], model.decode_lattice(z[rows]).detach()
        species, frac, r = candidates(model, zs, species, lattice, draws, memory, steps, generator)
        if refine_steps:
            frac, lattice, r = flow.refine(model, zs, species, frac, lattice, refine_steps)
        left[rows] = r.cpu()
        for i, s, f, l in zip(rows.tolist(), species.tolist(), (frac % 1).cpu().numpy(), lattice.cpu().numpy()):
            cells[i] = (l, [model.elements[k] for k in s], f)
    return cells, left.numpy(), confidence.cpu().numpy()


@torch.no_grad()
def candidates(model, z, species, lattice, draws, memory=None, steps=20, generator=None):
    """The best candidate by its residual |E(x) - z|: (species (B, N), frac (B, N, 3), residual (B,))."""
    found = [memory.propose(model, z, species, lattice)] if memory else []
    for _ in range(draws):
        frac = flow.sample(model, z, species, lattice, steps, generator)
        found.append((species, frac, flow.residual(model, z, species, frac, lattice)))
    best = [t.clone() for t in found[0]]
    for other in found[1:]:
        better = other[2] < best[2]
        for kept, now in zip(best, other):
            kept[better] = now[better]
    return best


def score(cells, crystals, processes=None):
    """matching.score and exact composition: (metrics, {name: RMS distances}); a cell that was not decoded is no match."""
    predicted, true = [c or NOTHING for c in cells], matching.true_cells(crystals)
    m, rms = matching.score(predicted, true, processes)
    return m | {"exact_composition": 100 * float(matching.same_composition(predicted, true).mean()), "n": len(cells)}, rms


def evaluate(model, groups, crystals, draws=DRAWS, refine_steps=0, seed=0, details=False):
    """Match rates on held-out cells: memory and flows together (the decoder), and one flow alone ("one_flow_...").

    groups {split: buckets}, crystals {split: CrystalSet}; the memory holds the training cells. details=True: also a
    dict of the decoded cells, their RMS distance (NaN: no match) and their residual.
    """
    from .memory import Memory
    z, memory = encode(model, groups["test"]), Memory(groups["train"], encode(model, groups["train"]))
    generator = torch.Generator(z.device).manual_seed(seed)
    plain = reconstruct(model, z, 1, refine_steps=0, generator=generator)[0]
    cells, left, confidence = reconstruct(model, z, draws, memory, refine_steps=refine_steps, generator=generator)
    (m, rms), alone = score(cells, crystals["test"]), score(plain, crystals["test"])[0]
    m |= {f"one_flow_{k}": v for k, v in alone.items() if k[:2] in ("sm", "rm")}
    m |= {"residual_median": float(np.nanmedian(left)), "confidence_mean": float(confidence.mean())}
    return (m, {"cells": cells, "rms": rms["cdvae"], "residual": left}) if details else m


def trivial(crystals, train, n=400, seed=0):
    """What needs no model, on n test cells: random sites, and sites lent by the training cell of the nearest shape.

    Both are told the true composition and lattice, which the decoder must read from its latent: they are
    oracles and bounds, not competitors. Returns a flat dict of match rates.
    """
    from .memory import shape_features
    rng, stored = np.random.default_rng(seed), {}
    few = crystals.select(np.sort(rng.permutation(len(crystals))[:n]))
    for lattice, symbols, frac in matching.true_cells(train):
        stored.setdefault(pattern_of(symbols), []).append((lattice, frac))
    true, lent = matching.true_cells(few), []
    shape = lambda rows: shape_features(torch.tensor(np.array(rows), dtype=torch.float32))
    for lattice, symbols, _ in true:
        known = stored.get(pattern_of(symbols))
        if known:
            nearest = int(torch.cdist(shape([lattice]), shape([l for l, _ in known])).argmin())
        lent.append((lattice, symbols, known[nearest][1]) if known else None)
    scattered = [(l, s, rng.random(f.shape)) for l, s, f in true]
    parts = {"random_sites": score(scattered, few)[0], "nearest_shape": score(lent, few)[0]}
    return {f"{kind}_{k}": v for kind, m in parts.items() for k, v in m.items() if k != "n" and v is not None} | {"n": len(few)}


def pattern_of(symbols):
    """Order of equal and different elements, names removed: ['Sr', 'Ti', 'O', 'O'] -> (0, 1, 2, 2)."""
    first = {}
    return tuple(first.setdefault(s, len(first)) for s in symbols)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=list(PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--refine", type=int, default=0, help="steps of decode-time refinement")
    parser.add_argument("--trivial", action="store_true", help="match rates without a model instead")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cfg = PRESETS[args.dataset].with_(seed=args.seed)
    cfg = renamed(cfg, args.epochs or cfg.epochs)
    crystals = {s: data.load(cfg.dataset, s) for s in data.SPLITS}
    if args.trivial:
        return record_trivial(cfg, crystals)
    record(cfg, crystals, args)


def record_trivial(cfg, crystals):
    """data/results/trivial/<dataset>.json."""
    start, m = time.time(), trivial(crystals["test"], crystals["train"])
    results.write_run("trivial", cfg.dataset, config={"dataset": cfg.dataset, "cells": m["n"]}, seed=0, data_set=cfg.dataset,
                      split="test", n=m["n"], metrics=m, claims={}, wall_time_s=time.time() - start)


def claims_of(experiment, m):
    """Row of Table 1 from the experiments as they are by default; that of Perov-5 belongs to the production model."""
    dataset, _, name = experiment.partition("-")
    if dataset == "perov_5" or name != PRESETS[dataset].name:
        return {}
    told = f"{data.test_split(dataset)}, set autoencoder with a memory of training cells"
    return {f"t1.{dataset.replace('_', '')}.meidnet": {"value": m["sm_cdvae"], "split": told}}


def record(cfg, crystals, args):
    """Train (or go on), evaluate on the test split, write run file and checkpoint. Decoded in another way (draws, refinement), a model
    is another experiment, without a claim and a checkpoint."""
    device, start, elements = pick_device("auto"), time.time(), data.vocabulary(*crystals.values())
    groups = {s: buckets(crystals[s], elements, device) for s in ("train", "test")}
    name = f"{cfg.dataset}_{cfg.name}_seed{cfg.seed}.safetensors"
    run = train(cfg, groups["train"], elements, RUNS / name, device)
    m = evaluate(run.model, groups, crystals, args.draws, args.refine) | {"training_s": run.seconds}
    config, other = cfg.to_dict() | {"draws": args.draws, "refine": args.refine}, (args.draws, args.refine) != (DRAWS, 0)
    experiment = f"{cfg.dataset}-{cfg.name}" + (f"-draws{args.draws}-refine{args.refine}" if other else "")
    results.write_run(experiment, f"seed{cfg.seed}", config=config, seed=cfg.seed, data_set=cfg.dataset, split="test",
                      n=m["n"], metrics=m, claims=claims_of(experiment, m), wall_time_s=time.time() - start)
    if not other:
        save_model(CHECKPOINTS / "flow" / name, run.model, history=run.history, seconds=run.seconds, metrics=m, split="cdvae test",
                   licence="weights CC BY 4.0, data see data/README.md")
    print("\n".join(f"{k:30s} {v}" for k, v in m.items()))


if __name__ == "__main__":
    main()
