"""The E(n)-equivariant layer (Satorras et al. 2021; MEIDNet eqs. i-iii and viii-x), on dense batches.

Cells have at most a few dozen atoms, so all pairs of a batch fit in one (B, N, N) tensor: no
scatter, no Python loop over crystals. Coordinates enter only through difference vectors
r_ij = x_i - x_j, which in a crystal are minimum images (see crystal.minimum_image); a layer
returns the shift of every site, and differences follow as r_ij + shift_i - shift_j.
"""

import torch
from torch import nn


def mlp(*widths, dropout=0.0):
    """Linear layers with SiLU between them (none after the last)."""
    layers = []
    for k, (a, b) in enumerate(zip(widths, widths[1:])):
        layers += [nn.Linear(a, b)] + ([nn.SiLU(), nn.Dropout(dropout)] if k < len(widths) - 2 else [])
    return nn.Sequential(*layers)


class EGNNLayer(nn.Module):
    """One layer: messages, coordinate shift, node update.

    h (B, N, H) node features, r (B, N, N, 3) difference vectors, a (B, N, N, E) edge attributes
    or None, weight (B, N, N) adjacency (0/1, zero on the diagonal and for empty sites).
    Returns h' (B, N, H) and shift (B, N, 3). h' is invariant, shift equivariant, both
    permutation-equivariant.
    """

    def __init__(self, width, edge_width=None, edge_attributes=0, residual=False, length=1.0, dropout=0.0):
        super().__init__()
        edge_width = edge_width or width
        # phi_e's first layer on [h_i, h_j, d2, a_ij], written as a sum so that node terms cost N, not N^2
        self.receiver = nn.Linear(width, edge_width)
        self.sender = nn.Linear(width, edge_width, bias=False)
        self.edge = nn.Linear(1 + edge_attributes, edge_width, bias=False)
        self.message = nn.Sequential(nn.SiLU(), nn.Linear(edge_width, edge_width), nn.SiLU())   # rest of phi_e
        self.phi_x = nn.Linear(edge_width, 1, bias=False)
        nn.init.normal_(self.phi_x.weight, std=1e-3)                # small first shifts, as in the EGNN code
        self.phi_h = mlp(width + edge_width, width, width, dropout=dropout)
        self.norm = nn.LayerNorm(width) if residual else None
        self.length = length                                        # unit of length for d2 (angstrom)

    def forward(self, h, r, a, weight):
        d2 = (r**2).sum(-1, keepdim=True) / self.length**2                                  # (B, N, N, 1)
        edge = d2 if a is None else torch.cat([d2, a], -1)
        x = h if self.norm is None else self.norm(h)
        m = self.message(self.receiver(x)[:, :, None] + self.sender(x)[:, None] + self.edge(edge))  # (B, N, N, E)
        count = weight.sum(-1, keepdim=True).clamp_min(1)                                   # 1 / C of eq. (iii)
        shift = (r * (self.phi_x(m) * weight[..., None])).sum(2) / count                    # (B, N, 3)
        total = torch.einsum("bij,bije->bie", weight, m)                                    # m_i, eq. (ii)
        update = self.phi_h(torch.cat([x, total], -1))
        return (update if self.norm is None else h + update), shift


class EGNN(nn.Module):
    """A stack of layers. forward -> final h (B, N, H) and total shift of the sites (B, N, 3)."""

    def __init__(self, blocks, width, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(EGNNLayer(width, **kwargs) for _ in range(blocks))

    def forward(self, h, r, a, weight):
        total = torch.zeros_like(r[:, :, 0])
        for layer in self.layers:
            h, shift = layer(h, r, a, weight)
            r = r + shift[:, :, None] - shift[:, None]
            total = total + shift
        return h, total


def gaussians(d, count, low=0.8, high=5.8):
    """Smooth distance basis, (B, N, N) angstrom -> (B, N, N, count)."""
    centres = torch.linspace(low, high, count, device=d.device, dtype=d.dtype)
    return torch.exp(-0.5 * ((d[..., None] - centres) * (count - 1) / (high - low)) ** 2)
