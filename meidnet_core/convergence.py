"""What the cutoff and the k-mesh of a PBE calculation cost: one static run a setting, the other held at that of `quick`.

    python -m meidnet_core.convergence BaHfSe3            # data/results/dft-convergence/<formula>.json; a killed call goes on
"""

import argparse
from dataclasses import replace

from . import dft, results

CUTOFFS, MESHES = (350, 450, 520, 600, 700), (4, 6, 8)      # eV; points along each axis, with Gamma: all of them hold R
BASE = dft.PROFILES["quick"]


def settings():
    """[(what varies, its value, Settings)]; the last value of each kind is the finest."""
    return [("cutoff", c, replace(BASE, cutoff=c)) for c in CUTOFFS] + [("mesh", n, replace(BASE, kpts=(n, n, n))) for n in MESHES]


def measure(formula, ranks=2):
    """Rows {varied, value, energy (eV/atom), gap (eV), seconds} of a cubic cell at the lattice constant of the potential.

    DFTError naming the setting at which a run does not converge.
    """
    rows, cell = [], dft.cubic_start(formula)
    for varied, value, s in settings():
        job, folder = dft.prepare(cell, s, "static"), dft.WORK / f"convergence-{formula}-{varied}{value}"
        dft.execute(job, folder, ranks)
        out = dft.collect(formula, job, folder, "quick")
        if out["status"] != "ok":
            raise dft.DFTError(f"{formula}, {varied} {value}: {out['status']}")
        rows.append({"varied": varied, "value": value, "energy": out["energy_per_atom"], "gap": out["gap"]["indirect"],
                     "seconds": out["seconds"]})
        print(rows[-1], flush=True)
    return rows


def write(formula, ranks=2):
    """Run file of `measure`: its rows as `curve`, as metrics how far `quick` and the finest setting of each kind lie apart."""
    rows = measure(formula, ranks)
    m = {f"{r['varied']}_{key}": r[key] for r in relative(rows) if r["value"] in (CUTOFFS[0], MESHES[0]) for key in ("energy", "gap")}
    config = {"cutoffs": CUTOFFS, "meshes": MESHES, "base": "quick", "xc": "PBE"}
    return results.write_run("dft-convergence", formula, config=config, seed=None, data_set="paper, Table S1", split="cubic cell",
                             n=len(rows), metrics=m, claims={}, wall_time_s=sum(r["seconds"] for r in rows), curve=rows)


def relative(rows):
    """Rows with energy (meV/atom) and gap (meV) counted from the finest setting of their kind."""
    finest = {r["varied"]: r for r in rows}
    return [r | {k: 1000 * (r[k] - finest[r["varied"]][k]) for k in ("energy", "gap")} for r in rows]


def table(formula):
    """The stored rows as a DataFrame; FileNotFoundError when the scan was not run."""
    import pandas as pd
    names = {"varied": "varied", "value": "value", "energy": "energy (meV/atom)", "gap": "gap (meV)", "seconds": "wall time (s)"}
    rows = relative(results.read_run("dft-convergence", formula)["curve"])
    return pd.DataFrame([[r[k] for k in names] for r in rows], columns=list(names.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formulas", nargs="+")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    for formula in args.formulas:
        print(write(formula, args.ranks))


if __name__ == "__main__":
    main()
