"""Would the model have found them? Proposals against OQMD materials that training never saw, by their DFT labels.

    python -m meidnet_core.retrospective --seeds 5

Held out: the compositions of OQMD's `val` and `test` (oqmd.load), which training saw in no data set. A hit is a proposal,
A and B in their places, that is a held-out cell and meets the target by DFT: PBE gap in the window, at most 0.1 eV/atom
above the OQMD hull. Most good proposals are no hits, since OQMD was asked about a part of all compositions only; the rate is
compared with the one that drawing at random from the same enumeration gives.
"""

import argparse
import time

import numpy as np

from . import candidates, data, oqmd, results, seeds, sun

WINDOWS = {"any gap": (0.0, 99.0), "0.5 - 2 eV": (0.5, 2.0), "2 - 4 eV": (2.0, 4.0), "above 4 eV": (4.0, 99.0)}
LIMIT, SIZES = 0.1, (35, 140)                     # eV/atom above the hull; how many proposals are looked at
METHODS = ("ours", "unmoved", "screening", "ensemble", "window", "random")
LATENT = METHODS[:2]


def held_out():
    """{(A, B, X): (gap, stability)} by DFT of the OQMD cells whose composition training never saw."""
    known = data.concatenate([oqmd.part(s) for s in ("val", "test")], "held out")
    gap, stability = (known.labels[:, known.label_names.index(l)] for l in ("pbe_gap", "stability"))
    return {site_key(z): (float(g), float(e)) for z, g, e in zip(known.numbers, gap, stability)}


def site_key(numbers):
    """(A, B, X) of atomic numbers A, B, X, X, X: A and B in their places."""
    return tuple(int(z) for z in numbers[:3])


def meets(labels, window):
    return window[0] <= labels[0] <= window[1] and labels[1] <= LIMIT


def targets(window):
    """What the model is asked: the middle of a bounded gap window, its lower end plus 1 eV otherwise; nothing for any gap."""
    low, high = window
    return {} if low <= 0 else {"pbe_gap": (low + high) / 2 if high < 90 else low + 1}


def inside(tool, proposal, window, count):
    """The `count` proposals of lowest predicted stability whose predicted gap lies in the window, the others after them."""
    gap, stability = (proposal.mean[:, tool.labels.index(l)] for l in ("pbe_gap", "stability"))
    miss = np.maximum(window[0] - gap, 0) + np.maximum(gap - window[1], 0)
    order = np.lexsort((stability + proposal.spread[:, tool.labels.index("stability")], np.maximum(miss - tool.tolerance, 0)))
    return candidates.first_of_each(proposal.select(order)).select(slice(count))


def searched(tool, method, seed):
    """Everything that a method looks at for all windows. Latents move towards the target of every window in every model, and each
    window is answered from all that they met: one target by itself leads to half as many of the compositions that matter."""
    if method not in LATENT:
        return tool.search(method, {}, seed)
    models = len(tool.models)
    found = [tool.search(method, targets(w), models * seed + k) for w in WINDOWS.values() for k in range(models)]
    whole = {key: np.concatenate([getattr(p, key) for p in found]) for key in ("mean", "spread", "confidence")}
    return candidates.Proposal(data.concatenate([p.crystals for p in found], "found"), **whole, labels=found[0].labels)


def chosen(tool, method, seed):
    """({window: max(SIZES) proposals of a method}, how many compositions it looked at); random methods draw, the others rank."""
    found = searched(tool, method, seed)
    met = len({data.composition_key(n) for n in found.crystals.numbers})
    if method in ("window", "random"):
        return {name: tool.propose(method, targets(w) or {"any": 0.0}, max(SIZES), seed) for name, w in WINDOWS.items()}, met
    return {name: inside(tool, found, w, max(SIZES)) for name, w in WINDOWS.items()}, met


def configuration(tool, method):
    """What a run stands for: stored with it, and compared before it is skipped."""
    searches = {"searches": "every window, every model"} if method in LATENT else {}
    return {"limit": LIMIT, "windows": {k: list(v) for k, v in WINDOWS.items()}, "models": len(tool.models), **searches}


def run(tool, method, seed):
    """Hits and enrichment of one method and seed over all windows; writes data/results/retrospective-<method>/seed<seed>.json."""
    start, truth, pool = time.time(), held_out(), set(map(site_key, tool.pool(False).crystals.numbers))
    proposals, met = chosen(tool, method, seed)
    m = {"met": met}
    for name, p in proposals.items():
        good = {k for k, labels in truth.items() if k in pool and meets(labels, WINDOWS[name])}
        hit, chance = np.array([site_key(n) in good for n in p.crystals.numbers], bool), len(good) / len(pool)
        m |= {f"possible_{name}": len(good), f"chance_{name}": chance}
        for size in SIZES:
            rate = float(hit[:size].sum()) / size
            m |= {f"hits_{size}_{name}": int(hit[:size].sum()), f"precision_{size}_{name}": 100 * rate,
                  f"enrichment_{size}_{name}": rate / chance if chance else 0.0}
    results.write_run(f"retrospective-{method}", f"seed{seed}", config=configuration(tool, method), seed=seed, data_set="oqmd_abx3",
                      n=len(truth), metrics=m, claims={}, split="val and test compositions, unseen in training",
                      wall_time_s=time.time() - start)
    return m


def compared(groups, reference="screening"):
    """DataFrame, a row for each window and method of stored runs {method: runs}, means over seeds, for each of SIZES: hits, precision (%),
    hits over what chance gives and over those of `reference` (NaN when it has none)."""
    import pandas as pd
    mean = lambda method, key: float(seeds.values(groups[method], key).mean())
    rows = []
    for window, method in ((w, m) for w in WINDOWS for m in groups):
        row = {"window": window, "method": method}
        for n in SIZES:
            hits, usual = (mean(m, f"hits_{n}_{window}") for m in (method, reference))
            chance, ratio = mean(method, f"enrichment_{n}_{window}"), hits / usual if usual else np.nan
            row |= {f"hits of {n}": hits, f"precision at {n} (%)": 100 * hits / n, f"times chance, {n}": chance,
                    f"times {reference}, {n}": ratio}
        rows.append(row)
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    tool = sun.designer(symmetrize=True)
    for seed in range(args.seeds):
        for method in args.methods:
            if not results.done(f"retrospective-{method}", seed, configuration(tool, method)):
                m = run(tool, method, seed)
                shown = [f"{k[15:]} {v:.1f}" for k, v in m.items() if k.startswith("enrichment_140")]
                print(f"{method}/seed{seed}, enrichment at 140: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
