"""A cation leaves its site in a cubic ABX3 cell of five atoms: what a relaxation finds that may break the symmetry, not double the cell.

    python -m meidnet_core.off_centre YbScSe3           # cells of the potential: data/dft/YbScSe3-off111-quick.json ...
    python -m meidnet_core.off_centre YbScSe3 --pbe     # relaxed on by PBE forces and stress: data/dft/YbScSe3-off111pbe-quick.json ...

Along a body diagonal (R3m), an axis (P4mm) or a face diagonal (Amm2). Bands by plane waves, lanthanides as everywhere in dft.py.
"""

import argparse
import subprocess

import numpy as np

from . import dft

DIRECTIONS = ((1, 1, 1), (0, 0, 1), (1, 1, 0))
LOOSE = 0.1                    # angstrom, within which a cell of the potential is given its symmetry before PBE moves it


def name_of(formula, direction, pbe=False):
    return f"{formula}-off{''.join(map(str, direction))}" + ("pbe" if pbe else "")


def stored_cell(name):
    """Cell of a stored result of data/dft; None without one."""
    return (dft.load(name, "quick") or {}).get("cell")


def by_potential(formula, direction, potential="sevennet-0"):
    """Cell (lattice (6,), symbols, frac) of the lowest relaxation with the potential (relax.off_centre)."""
    from . import potentials, relax
    return relax.cell_from(relax.off_centre(dft.cubic_start(formula, potential), potentials.get_calculator(potential, "cpu"), direction))


def symmetrized(cell, within=LOOSE):
    """Primitive cell with the symmetry that a relaxed cell has within so many angstrom; site order by spglib. ValueError: none found."""
    import spglib
    from ase.data import chemical_symbols
    from ase.geometry import cell_to_cellpar

    from .relax import to_atoms
    atoms = to_atoms(cell)
    found = spglib.standardize_cell((atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers), to_primitive=True, symprec=within)
    if found is None or len(found[2]) != len(atoms):
        raise ValueError(f"{''.join(cell[1])}: no primitive cell of {len(atoms)} atoms within {within} angstrom")
    return cell_to_cellpar(found[0]), [chemical_symbols[z] for z in found[2]], np.asarray(found[1])


def by_pbe(name, cell, profile="quick", ranks=2, timeout=None):
    """Cell relaxed by PBE within the symmetry of its start (gpaw_job.relax), kept in runs/dft/<name>-relax.

    DFTError when it is not finished in time or does not converge: the next call goes on.
    """
    folder = dft.WORK / f"{name}-relax"
    job = dft.prepare(symmetrized(cell), dft.PROFILES[profile], "relax")
    try:
        dft.execute(job, folder, ranks, timeout)
    except subprocess.TimeoutExpired:
        raise dft.DFTError(f"{name}: not relaxed in {timeout:.0f} s; the next call goes on") from None
    found = dft.read(folder, "relax")
    if found["status"] != "ok":
        raise dft.DFTError(f"{name}: relaxation {found['status']}")
    return found["lattice"], found["symbols"], np.array(found["frac"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("materials", nargs="*", default=["YbScSe3"])
    parser.add_argument("--pbe", action="store_true", help="from the stored cells of the potential, relaxed on by PBE")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, help="seconds a step may take in this call; the next call goes on")
    args = parser.parse_args()
    for formula, direction in ((f, d) for f in args.materials for d in DIRECTIONS):
        name = name_of(formula, direction, args.pbe)
        cell = stored_cell(name)
        if cell is None:
            cell = stored_cell(name_of(formula, direction)) or by_potential(formula, direction)
            cell = by_pbe(name, cell, ranks=args.ranks, timeout=args.timeout) if args.pbe else cell
        out = dft.run(name, cell, "quick", "waves", args.ranks, timeout=args.timeout)
        print(name, out["status"], out.get("energy_per_atom"), out.get("gap"), f"{out['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
