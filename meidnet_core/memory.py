"""Start structures from memory: sites of training cells under the decoded elements and lattice.

Most crystals share their arrangement of sites with another one. For a latent z with decoded counts and
lattice, training cells of the same counts (whatever their elements) lend their fractional coordinates; of all
ways to put the decoded elements on their sites the one whose encoding is nearest to z is kept. What comes
out is a function of z and of the training set alone.
"""

from itertools import islice, permutations, product

import torch

from . import flow
from .crystal import lattice_matrix


def roles_of(counts, most=6):
    """Counts {element: n} -> (pattern, [elements in role order, one tuple per permutation of equal counts, at most `most`])."""
    ordered = sorted(counts, key=lambda e: (-counts[e], e))
    pattern = tuple(counts[e] for e in ordered)
    equal = [[e for e in ordered if counts[e] == n] for n in dict.fromkeys(pattern)]
    return pattern, [sum(p, ()) for p in islice(product(*map(permutations, equal)), most)]


def shape_features(lattice):
    """Lengths in units of their geometric mean (logarithms) and angles (20 degrees): (B, 6), blind to volume."""
    x = flow.lattice_features(lattice)
    return torch.cat([x[:, :3] - x[:, :3].mean(1, keepdim=True), x[:, 3:]], -1)


class Memory:
    """Training cells by pattern of counts: sites in role order, lattice, latent."""

    def __init__(self, groups, z):
        """groups: large_cells.buckets of the training cells; z (M, 128): their latents in the order of the data set."""
        found = {}
        for group in groups.values():
            for k, row in enumerate(group["species"]):
                element, count = row.unique(return_counts=True)
                pattern, orders = roles_of(dict(zip(element.tolist(), count.tolist())))
                sites = torch.cat([torch.nonzero(row == e)[:, 0] for e in orders[0]])
                found.setdefault(pattern, []).append((group["frac"][k, sites], group["lattice"][k], z[group["index"][k]]))
        self.patterns = {p: [torch.stack(column) for column in zip(*cells)] for p, cells in found.items()}

    def nearest(self, pattern, lattice, z, top):
        """Rows (Q, K) of the stored cells nearest in shape of the lattice, and nearest in the latent, half each."""
        frac, lattices, latents = self.patterns[pattern]
        parts = [torch.cdist(shape_features(lattice), shape_features(lattices)), torch.cdist(z, latents)]
        k = min(top // 2, len(frac))
        return torch.cat([d.topk(k, largest=False).indices for d in parts], 1)

    @torch.no_grad()
    def propose(self, model, z, species, lattice, top=24):
        """Best stored arrangement of every latent: (species (Q, N), frac (Q, N, 3), residual (Q,), inf without any).

        z (Q, 128), species (Q, N) sorted by element, lattice (Q, 6).
        """
        best = [species.clone(), torch.zeros(*species.shape, 3, device=z.device), torch.full((len(z),), float("inf"), device=z.device)]
        queries = [roles_of(dict(zip(*(x.tolist() for x in row.unique(return_counts=True))))) for row in species]
        for pattern in {p for p, _ in queries} & set(self.patterns):
            rows = torch.tensor([i for i, (p, _) in enumerate(queries) if p == pattern], device=z.device)
            ways = torch.tensor([orders for p, orders in queries if p == pattern], device=z.device)     # (Q', P, roles)
            ways = ways.repeat_interleave(torch.tensor(pattern, device=z.device), 2)                    # (Q', P, N)
            for kept, now in zip(best, self.best_way(model, pattern, z[rows], ways, lattice[rows], top)):
                kept[rows] = now
        return best

    def best_way(self, model, pattern, z, ways, lattice, top):
        """The same for latents of one pattern; ways (Q, P, N): the decoded elements on the sites, all permutations."""
        stored, best = self.nearest(pattern, lattice, z, top), None
        for column in stored.unbind(1):
            frac = self.patterns[pattern][0][column]
            images = flow.image_sums(frac, lattice_matrix(lattice), model.cfg.rbf, model.cfg.cutoff)
            for way in ways.unbind(1):
                now = (way, frac, flow.residual(model, z, way, frac, lattice, images))
                best = best or [t.clone() for t in now]
                better = now[2] < best[2]
                for kept, new in zip(best, now):
                    kept[better] = new[better]
        return best
