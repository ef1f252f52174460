"""Inverse design (Figure 1c, methodology): latents move toward target properties under physical constraints. torch only on top."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn import functional as F

from . import data, metrics, perovskite


@dataclass
class Path:
    """latents (T, B, 128) on the way, distance (T, B) to the target in standardised units, per step."""

    latents: torch.Tensor
    distance: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """Of the terms of `objective`; 0 switches a term off."""

    target: float = 1.0            # properties read from the latent
    cycle: float = 1.0             # properties of the decoded crystal, read from its structure alone
    volume: float = 0.1            # lattice beyond three standard deviations of the training cells
    distance: float = 1.0          # atoms closer than perovskite.SHORTEST
    charge: float = 0.2            # distance (e) from charge neutrality
    roles: float = 1.0             # an element without an oxidation state of its site's sign
    tolerance: float = 1.0         # Goldschmidt factor outside its window
    near: float = 0.05             # squared distance from the start: the decoder knows the neighbourhood of the data


WEIGHTS = Weights()
SOFT = 3.0                         # temperature of the species while latents move; 1: 3 instead of 9 of the 35 best are found (lab notes)


def standard(model, target):
    """Target {label: value} or (P,) in physical units -> (P,) standardised, NaN: free. ValueError names an unknown label."""
    labels = model.cfg.labels
    if isinstance(target, dict):
        unknown = set(target) - set(labels)
        if unknown:
            raise ValueError(f"target {', '.join(sorted(unknown))}: the model knows {', '.join(labels)}")
        target = [target.get(l, float("nan")) for l in labels]
    return (torch.as_tensor(target, dtype=torch.float32, device=model.label_mean.device) - model.label_mean) / model.label_std


def navigate(model, start, target, steps=200, lr=0.02, norm=None):
    """Adam moves B latents until the property decoder reads the target (methodology, inverse design).

    start (B, 128), target (P,) in physical units (NaN: free). Latents keep their length (or `norm`), since
    the decoder has only seen joint latents near the unit sphere.
    """
    if model.bimodal:
        raise ValueError("navigate reads properties from the joint latent: it needs a tri-modal model (two labels)")
    goal = standard(model, target)
    error = lambda point: (model.properties(point) - goal)[:, ~goal.isnan()]                # (B, P)
    distance = lambda point: error(point).norm(dim=1)
    return descend(lambda point, _: (error(point) ** 2).sum(1), start, steps, lr, norm, distance)[1]


def descend(loss, start, steps, lr, norm=None, watch=None):
    """Adam on latents alone. loss(point (B, D), start) -> (B,). Returns the last latents, and with watch(point) -> (B,) a Path."""
    z, latents, distance = start.clone().requires_grad_(True), [], []
    norm = start.norm(dim=1, keepdim=True) if norm is None else norm
    optimizer = torch.optim.Adam([z], lr=lr)
    for _ in range(steps):
        point = F.normalize(z, dim=1) * norm
        if watch:
            latents.append(point.detach())
            distance.append(watch(point).detach())
        z.grad, = torch.autograd.grad(loss(point, start).sum(), z)       # of the latents alone, not of the weights
        optimizer.step()
    last = (F.normalize(z, dim=1) * norm).detach()
    return last, Path(torch.stack(latents), torch.stack(distance)) if latents else None


# ---- what is asked of a latent ------------------------------------------------------------------

def soft_decode(model, z, sites=None, temperature=1.0):
    """Latents -> species probabilities (B, 5, S), lattice (B, 6) in angstrom and degrees, frac (B, 5, 3); differentiable.

    sites (5, S) bool: elements allowed on each site. The three X sites share their element when `sites` is given.
    A temperature above 1 softens the choice: gradients then reach elements that the latent does not name yet.
    """
    out = model.decoder(z)
    return probabilities(out["species"], sites, temperature), out["lattice"] * model.lattice_std + model.lattice_mean, out["frac"]


def probabilities(logits, sites=None, temperature=1.0):
    """Of the elements, (B, 5, S) from the decoder's logits; see soft_decode."""
    logits = logits / temperature
    if sites is not None:
        logits = torch.cat([logits[:, :2], logits[:, 2:].mean(1, keepdim=True).expand(-1, 3, -1)], 1).masked_fill(~sites, -1e9)
    return torch.softmax(logits, -1)


def reencode(model, p, lattice, frac):
    """Properties of a decoded crystal from its structure alone, (B, P) standardised: the cycle check.

    Gradients flow through the elements and the lattice; distances are taken as they are.
    """
    mask = torch.ones(p.shape[:2], device=p.device)
    with torch.no_grad():
        geometry = data.geometry(lattice, frac, mask, model.cfg.cutoff)
    batch = {"species": p, "lattice": lattice, "frac": frac, "mask": mask, **geometry}
    z_c = model.encoder(batch, (lattice - model.lattice_mean) / model.lattice_std)
    return model.properties_alone(F.normalize(model.project_c(z_c), dim=-1), z_c)


def miss(predicted, goal, below):
    """(B,) mean squared distance from the known targets; for labels in `below` (P,) bool only an excess counts."""
    known = ~goal.isnan()
    if not known.any():
        return predicted.new_zeros(len(predicted))
    error = (predicted - goal)[:, known]
    return (torch.where(below[known], F.relu(error), error) ** 2).mean(1)


def objective(model, goal, weights=WEIGHTS, sites=None, below=(), temperature=SOFT):
    """loss(point, start) -> (B,) for `descend`: target + cycle + constraints, weighted."""
    from .ions import tables
    tab = tables(tuple(model.shape.elements), goal.device.type)
    flags = torch.tensor([l in below for l in model.cfg.labels], device=goal.device)

    def loss(point, start):
        p, lattice, frac = soft_decode(model, point, sites, temperature)
        terms = perovskite.per_cell(p, lattice, frac, tab)
        scaled = (lattice - model.lattice_mean) / model.lattice_std
        terms |= {"target": miss(model.properties(point), goal, flags), "volume": F.relu(scaled.abs() - 3).sum(1),
                  "near": ((point - start) ** 2).sum(1)}
        if weights.cycle:
            terms["cycle"] = miss(reencode(model, p, lattice, frac), goal, flags)
        return sum(w * terms[k] for k, w in asdict(weights).items() if w)
    return loss


# ---- from targets to crystals -------------------------------------------------------------------

def starts(model, z, goal, count, seed=0):
    """`count` latents to begin with: embeddings of random data crystals joined with the embedded target, (count, 128).

    z (M, 128) structural embeddings y_c of the data. Without any known target the crystals' own embeddings.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    y_c = z[torch.randint(len(z), (count,), generator=generator).to(z.device)]
    with torch.no_grad():
        return model.join(y_c, model.embed_properties(goal.expand(count, -1))) if (~goal.isnan()).any() else y_c


@torch.no_grad()
def decode(model, z, sites=None, draws=1, temperature=1.0, seed=0):
    """Latents -> species indices (B * draws, 5) and confidence (B * draws,): the lowest probability over the sites at temperature 1.

    draws=1: the most likely elements. More: the likeliest, then draws - 1 samples at `temperature`.
    """
    logits, generator = model.decoder(z)["species"], torch.Generator(z.device).manual_seed(seed)
    sure, p = (probabilities(logits, sites, t) for t in (1.0, temperature))
    picks = [sure.argmax(-1)] + [_sample(p, generator) for _ in range(draws - 1)]
    species = torch.cat(picks)
    confidence = sure.repeat(draws, 1, 1).gather(-1, species[..., None]).squeeze(-1).min(1).values
    return species.cpu().numpy(), confidence.cpu().numpy()


def _sample(p, generator):
    """One element per site (B, 5) from p (B, 5, S); X, X, X share theirs."""
    drawn = torch.multinomial(p[:, :3].flatten(0, 1), 1, generator=generator).view(len(p), 3)
    return drawn[:, [0, 1, 2, 2, 2]]


@torch.no_grad()
def geometry(model, crystals):
    """Lattice (M, 6) and coordinates (M, 5, 3) that the decoder gives crystals of known elements, from their own embedding."""
    out = model.decode(model.embed_structure(unlabelled(model, crystals))[1])
    return out["lattice"].cpu().numpy().astype(float), out["frac"].cpu().numpy().astype(float)


def unlabelled(model, crystals):
    """Tensors of a CrystalSet for a model, without labels. DataError for cells of several sizes and a model that learnt of one."""
    if not model.shape.padded and len({int(n) for n in (np.asarray(crystals.numbers) > 0).sum(1)}) > 1:
        raise data.DataError("cells of several sizes, and this model learnt of one: predict each size by itself")
    tensors = data.to_tensors(crystals, model.shape.elements, (), model.label_mean.device, model.cfg.cutoff)
    return tensors | {"labels": torch.full((len(crystals), len(model.cfg.labels)), torch.nan, device=model.label_mean.device)}


def predict(models, crystals):
    """Labels of a CrystalSet from the structure alone by several models: (mean (M, P), standard deviation over models (M, P))."""
    out = []
    for model in models:
        out.append(metrics.encode(model, unlabelled(model, crystals))["alone"])
    return np.mean(out, 0), np.std(out, 0)
