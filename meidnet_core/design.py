"""Navigation of the aligned latent space toward target properties (Figure 1c). torch only."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class Path:
    """latents (T, B, 128) on the way, distance (T, B) to the target in standardised units, per step."""

    latents: torch.Tensor
    distance: torch.Tensor


def navigate(model, start, target, steps=200, lr=0.02, norm=None):
    """Adam moves B latents until the property decoder reads the target (methodology, inverse design).

    start (B, 128), target (P,) in physical units (NaN: free). Latents keep their length (or `norm`), since
    the decoder has only seen joint latents near the unit sphere.
    """
    if model.bimodal:
        raise ValueError("navigate reads properties from the joint latent: it needs a tri-modal model (two labels)")
    z = start.clone().requires_grad_(True)
    norm = start.norm(dim=1, keepdim=True) if norm is None else norm
    goal = (torch.as_tensor(target, dtype=z.dtype, device=z.device) - model.label_mean) / model.label_std
    known, optimizer, latents, distance = ~goal.isnan(), torch.optim.Adam([z], lr=lr), [], []
    for _ in range(steps):
        point = F.normalize(z, dim=1) * norm
        error = (model.properties(point) - goal)[:, known]                                  # (B, P)
        latents.append(point.detach())
        distance.append(error.detach().norm(dim=1))
        z.grad, = torch.autograd.grad((error**2).sum(), z)               # of the latents alone, not of the weights
        optimizer.step()
    return Path(torch.stack(latents), torch.stack(distance))
