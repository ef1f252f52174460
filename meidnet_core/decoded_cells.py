"""Is the cell that a decoder gives a candidate the cell of that crystal? Edges beside those of the relaxed cube.

    python -m meidnet_core.decoded_cells --seeds 3                  # data/results/design-cells, a minute a seed

Three readings of the edge of a candidate: *latent*, decoded from the latent that names its elements, before and after it was moved;
*embedding*, decoded from the embedding of the ideal cube of these elements (`candidates.Designer.decoded`); *sum*, that ideal cube itself,
a sum over elements fitted to the training cells. The truth is the edge of the cubic cell as SevenNet-0 relaxed it
(data/abx3_relaxed.csv), which the models have not seen. On held-out cells of OQMD, whose own cell is what the decoder is given, the same
two readings say how much of a miss is the decoder's anyway.
"""

import argparse
import time

import numpy as np

from . import candidates, crystal, design, oqmd, results, sun

POTENTIAL = "sevennet-0"
READINGS = ("latent", "embedding", "sum")
STAGES = ("start", "moved")


def relaxed_edges():
    """{(A, B, X): edge in angstrom} of the cubic cells relaxed with POTENTIAL."""
    cells = oqmd.own_cells(oqmd.OWN, potential=POTENTIAL)
    return {tuple(map(crystal.symbol, z[:3])): a for z, a in zip(cells.numbers, cells.lattice[:, 0])}


def edges(tool, z, seed=0):
    """DataFrame of the likeliest composition of latents (B, 128), where it is new, allowed and relaxed, each one once.

    Columns: formula, READINGS, relaxed (angstrom; mean of a, b and c), off: the largest distance of a site decoded from the latent from
    the ideal one (in edges).
    """
    import pandas as pd
    model, known = tool.generator(seed), relaxed_edges()
    species, _ = design.decode(model, z, tool.sites.to(z.device))
    numbers = crystal.atomic_numbers(tool.elements)[species]
    lattice, frac = (v.detach().cpu().numpy() for v in design.soft_decode(model, z)[1:])
    cells = candidates.ideal(numbers, tool.constant)
    table = pd.DataFrame({"formula": sun.formulas(cells), "latent": lattice[:, :3].mean(1),
                          "embedding": design.geometry(model, cells)[0][:, :3].mean(1), "sum": cells.lattice[:, 0],
                          "relaxed": [known.get(tuple(map(crystal.symbol, n[:3])), np.nan) for n in numbers],
                          "off": np.abs(crystal.wrap(frac - crystal.PEROVSKITE)).max((1, 2))})
    usable = tool.fresh(numbers) & candidates.obeyed(cells.numbers, cells.lattice, cells.frac) & table.relaxed.notna()
    return table[usable].drop_duplicates("formula", ignore_index=True)


def held_out(tool, seed=0):
    """Mean errors (angstrom) on OQMD's cells of the test split: edges decoded from the embedding of the cell itself, and the sum."""
    cells = oqmd.part("test")
    true, decoded = cells.lattice[:, :3].mean(1), design.geometry(tool.generator(seed), cells)[0][:, :3].mean(1)
    return {"test_cells": len(cells), "test_embedding_mae": float(np.abs(decoded - true).mean()),
            "test_sum_mae": float(np.abs(tool.constant(cells.numbers) - true).mean())}


def summary(table, stage):
    """{<stage>_<reading>_mae, _bias} in angstrom, <stage>_cells and <stage>_off of a table of `edges`."""
    m = {f"{stage}_cells": len(table), f"{stage}_off": float(table.off.mean())}
    for name in READINGS:
        error = table[name] - table.relaxed
        m |= {f"{stage}_{name}_mae": float(error.abs().mean()), f"{stage}_{name}_bias": float(error.mean())}
    return m


def measure(tool, seed=0, starts=candidates.STARTS, steps=candidates.STEPS):
    """(metrics, DataFrame of the moved ones) over the four gaps of the paper, the latents of `ours` on which SUN rates rest."""
    import pandas as pd
    ways = [tool.moved({tool.stability: 0.0, **wanted}, starts, steps, seed) for wanted in sun.targets("ours")]
    first, last = (pd.concat([edges(tool, z, seed) for z in part]).drop_duplicates("formula", ignore_index=True)
                   for part in ([z[:starts] for z in ways], [z[-starts:] for z in ways]))
    return held_out(tool, seed) | summary(first, STAGES[0]) | summary(last, STAGES[1]), last


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args, tool = parser.parse_args(), sun.designer(symmetrize=True)
    for seed in range(args.seeds):
        start, (m, table) = time.time(), measure(tool, seed)
        config = {"potential": POTENTIAL, "targets": sun.targets("ours"), "starts": candidates.STARTS, "steps": candidates.STEPS}
        path = results.write_run("design-cells", f"seed{seed}", config=config, seed=seed, data_set="extended", split="generated",
                                 n=len(table), metrics=m, claims={}, wall_time_s=time.time() - start,
                                 curve=sun.columns(table, "formula latent embedding sum relaxed"))
        print(path.name, {k: round(v, 3) for k, v in m.items()}, flush=True)


if __name__ == "__main__":
    main()
