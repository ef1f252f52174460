"""Phonons with phonopy and any ASE calculator: bands along the path of the cell, density of states, soft modes, frozen modes.

Frequencies in THz; an imaginary one is written as a negative number, as in phonopy, and a mode below SOFT counts as soft.
There is no correction for long-range dipoles: potentials know no Born charges, so LO and TO modes meet at Gamma.

    python -m meidnet_core.phonons SrTiO3 KTaSe3 --potential sevennet-0      # relaxed cubic cells, runs/phonons/<potential>/
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from .relax import SYMMETRY, cell_from, key_of, passing, to_atoms

SOFT = -0.1                    # THz
DISPLACEMENT = 0.01            # angstrom
SYMPREC = 1e-3                 # angstrom; relaxed cells are kept with six digits
LENGTH = 7.0                   # angstrom, least edge of a supercell
DENSITY = 40.0                 # angstrom; a mesh has DENSITY / a points along a reciprocal axis
POINTS = 160                   # q-points along the whole path


def supercell_for(cell, length=LENGTH):
    """Repeats (3,) of a cell so that every edge is at least `length` angstrom."""
    return tuple(int(n) for n in np.maximum(1, np.ceil(length / np.asarray(cell[0][:3], float) - 1e-6)))


def primitive(cell, symprec=SYMPREC):
    """(standard primitive cell, space group as "I4/mcm (140)") of the symmetry found within symprec (angstrom)."""
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
    found = SpacegroupAnalyzer(_structure(cell), symprec=symprec)
    s = found.get_primitive_standard_structure()
    return ([*s.lattice.abc, *s.lattice.angles], [e.symbol for e in s.species], s.frac_coords), _named(found)


def spacegroup(cell, symprec=SYMPREC):
    """Space group within symprec (angstrom), as "Pm-3m (221)"."""
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
    return _named(SpacegroupAnalyzer(_structure(cell), symprec=symprec))


def _named(found):
    return f"{found.get_space_group_symbol()} ({found.get_space_group_number()})"


def _structure(cell):
    from .crystal import to_structure
    return to_structure(cell[0], list(cell[1]), cell[2])


def phonopy_of(cell, calculator, supercell=(2, 2, 2), displacement=DISPLACEMENT):
    """Phonopy with symmetrised force constants of a cell, in the basis of that very cell (no change to a primitive one).

    supercell: repeats (3,) or an integer matrix (3, 3). The attribute `asr` of the result is the largest violation of the
    acoustic sum rule before symmetrisation, max |sum_j Phi_ij| in eV/angstrom^2. Raises what the calculator raises.
    """
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms
    atoms, matrix = to_atoms(cell), np.asarray(supercell)
    unit = PhonopyAtoms(symbols=list(cell[1]), cell=atoms.cell[:], scaled_positions=atoms.get_scaled_positions(), masses=atoms.get_masses())
    ph = Phonopy(unit, np.diag(matrix) if matrix.ndim == 1 else matrix.T, np.eye(3), symprec=SYMPREC)   # phonopy: columns are new axes
    ph.generate_displacements(distance=displacement)
    rest = _forces(ph.supercell, calculator)                                 # of a cell that is not quite relaxed
    ph.forces = [_forces(s, calculator) - rest for s in ph.supercells_with_displacements]
    ph.produce_force_constants(show_drift=False)
    ph.asr = float(np.abs(ph.force_constants.sum(1)).max())
    ph.symmetrize_force_constants(level=2, show_drift=False)
    return ph


def _forces(cell, calculator):
    from ase import Atoms
    atoms = Atoms(cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=True, calculator=calculator)
    return np.asarray(atoms.get_forces(), float)


def frequencies(ph, q):
    """(Q, 3N) THz at q (Q, 3), fractions of the reciprocal cell."""
    return np.array(ph.run_qpoints(np.atleast_2d(q)).frequencies)


def path_of(ph):
    """({label: q (3,)}, [(label, label)]) of seekpath (HPKOT), in the reciprocal basis of the cell that ph was made of."""
    import warnings

    import seekpath
    unit = ph.unitcell
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                      # that the cell is not seekpath's standard one: meant
        found = seekpath.get_path_orig_cell((unit.cell, unit.scaled_positions, unit.numbers), symprec=SYMMETRY)
    name = lambda label: label.replace("GAMMA", "Γ")
    return {name(k): np.array(v) for k, v in found["point_coords"].items()}, [(name(a), name(b)) for a, b in found["path"]]


def bands(ph, points=POINTS):
    """Bands along the path: labels [[a, b]], distances (2 pi/angstrom left out), frequencies (Q, 3N) per segment, as lists."""
    where, path = path_of(ph)
    back = np.linalg.inv(ph.unitcell.cell)                                   # columns: reciprocal vectors
    lengths = [np.linalg.norm(back @ (where[b] - where[a])) for a, b in path]
    out, start = {"labels": [list(p) for p in path], "distances": [], "frequencies": []}, 0.0
    for (a, b), length in zip(path, lengths):
        x = np.linspace(0, 1, max(3, round(points * length / sum(lengths))))
        out["distances"].append(np.round(start + x * length, 5).tolist())
        out["frequencies"].append(frequencies(ph, where[a] + x[:, None] * (where[b] - where[a])).round(4).tolist())
        start += length
    return out


def dos(ph, mesh=1.5 * DENSITY):
    """Density of states, tetrahedron method: {"frequencies": (F,) THz, "density": (F,) states per THz and cell} as lists."""
    ph.run_mesh(mesh, is_gamma_center=True)
    ph.run_total_dos()
    found = ph.total_dos
    return {"frequencies": np.round(found.frequency_points, 4).tolist(), "density": np.round(found.dos, 4).tolist()}


def special_points(ph):
    """{label: frequencies (3N,)} at the special points of the path."""
    return {label: frequencies(ph, q)[0].round(4).tolist() for label, q in path_of(ph)[0].items()}


def lowest(ph, mesh=DENSITY, outside=False):
    """Lowest frequency on the path and on a mesh; the three modes nearest to zero at Gamma, its acoustic ones, are left out.

    outside: without the q whose nearest commensurate point is Gamma. There the acoustic branches are interpolated from Gamma, where they
    vanish, and come out imaginary when forces reach beyond the supercell; `elastic` answers for them.
    """
    where, path = path_of(ph)
    q = np.concatenate([where[a] + np.linspace(0, 1, 21)[:, None] * (where[b] - where[a]) for a, b in path])
    mesh = ph.run_mesh(mesh, is_gamma_center=True)
    q, freq = np.concatenate([q, mesh.qpoints]), np.concatenate([frequencies(ph, q), mesh.frequencies])
    near = (np.abs((q - np.round(q)) @ np.rint(ph.supercell_matrix)) < 0.5 - 1e-6).all(1)
    return _least(q[~near], freq[~near]) if outside else _least(q, freq)


def lowest_exact(ph):
    """Lowest frequency at the q-points that the supercell holds, where nothing is interpolated; acoustic modes as in `lowest`."""
    q = commensurate(ph)
    return _least(q, frequencies(ph, q))


def _least(q, freq):
    at_gamma = (np.abs(q - np.round(q)) < 1e-4).all(1)
    return min(float(f[np.sort(np.argsort(np.abs(f))[3:])].min(initial=np.inf) if g else f.min()) for f, g in zip(freq, at_gamma))


def commensurate(ph):
    """q-points (Q, 3) in [0, 1) that are commensurate with the supercell."""
    from phonopy.harmonic.dynmat_to_fc import get_commensurate_points
    return np.array(get_commensurate_points(np.rint(ph.supercell_matrix).astype(int)))


def elastic(cell, calculator, strain=0.004, fmax=0.005, steps=60):
    """Least eigenvalue (GPa, Kelvin notation: the smallest of c11 - c12 and 2 c44 in a cubic crystal) of the elastic tensor with relaxed
    ions, from central differences of the stress. Above zero no acoustic branch is imaginary at long wavelengths."""
    from ase.optimize import LBFGS
    from ase.units import GPa
    tensor, pairs = np.zeros((6, 6)), [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
    for i, (a, b) in enumerate(pairs):
        for sign in (1, -1):
            atoms, turn = to_atoms(cell), np.eye(3)
            turn[a, b] += sign * strain / 2
            turn[b, a] += sign * strain / 2                                  # on the diagonal both: the strain; else a shear by it
            atoms.set_cell(atoms.cell[:] @ turn, scale_atoms=True)
            atoms.calc = calculator
            LBFGS(atoms, logfile=None).run(fmax=fmax, steps=steps)
            tensor[:, i] += sign * np.asarray(atoms.get_stress()) / (2 * strain * GPa)
    kelvin = np.sqrt([1, 1, 1, 2, 2, 2])                                     # eigenvalues that do not depend on the orientation
    return float(np.linalg.eigvalsh((tensor + tensor.T) / 2 * np.outer(kelvin, kelvin)).min())


def label_of(ph, q):
    """Label of the special point that q (3,) is equivalent to by symmetry, else its coordinates as text."""
    turned = np.einsum("rij,j->ri", ph.primitive_symmetry.reciprocal_operations, q)
    for label, point in path_of(ph)[0].items():
        difference = turned - point
        if (np.abs(difference - np.round(difference)) < 1e-3).all(1).any():
            return label
    return "(" + ", ".join(f"{x:.3g}" for x in q) + ")"


def soft_modes(ph, threshold=SOFT):
    """Modes below the threshold at commensurate q, softest first: dicts of q (3,), label, frequency, eigenvector complex (N, 3).

    All partners of a degenerate mode and all arms of a star are listed. The eigenvector e is phonopy's, mass-weighted:
    atom j of the cell at l moves by e_j / sqrt(m_j) exp(2 pi i q.(l + x_j)). Partners are turned to the axes where q and -q are the same.
    """
    out, qs = [], commensurate(ph)
    found = ph.run_qpoints(qs, with_eigenvectors=True)
    for q, freq, vectors in zip(qs, np.array(found.frequencies), np.array(found.eigenvectors)):
        acoustic = set(np.argsort(np.abs(freq))[:3]) if np.allclose(q, 0) else set()
        rows = [i for i in range(len(freq)) if freq[i] < threshold and i not in acoustic]
        for level in _levels(freq, rows):
            for vector in _tidy(vectors[:, level].T.reshape(len(level), -1, 3), q, ph.unitcell.scaled_positions):
                out.append({"q": q.round(6).tolist(), "label": label_of(ph, q), "frequency": round(float(freq[level].mean()), 4),
                            "eigenvector": vector})
    return sorted(out, key=lambda m: (m["frequency"], m["label"]))


def _levels(freq, rows):
    """Rows grouped by frequency."""
    groups = []
    for i in rows:
        if groups and freq[i] - freq[groups[-1][-1]] < 0.01:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _tidy(vectors, q, frac):
    """A level (D, N, 3) made real and sparse where 2q is a reciprocal vector, with fixed phases: the same on every machine."""
    wave = np.exp(2j * np.pi * (frac @ q))[:, None]
    moves = (vectors * wave).reshape(len(vectors), -1)
    if np.allclose(2 * q, np.round(2 * q), atol=1e-4):                       # the dynamical matrix is real: so is a basis of the level
        _, _, real = np.linalg.svd(np.concatenate([moves.real, moves.imag]))
        moves = _echelon(real[:len(vectors)])
    else:
        moves = np.array([v * np.exp(-1j * np.angle(v[np.argmax(np.abs(v).round(4))])) for v in moves])
    return moves.reshape(vectors.shape) / wave


def _echelon(basis):
    """Orthonormal rows of the same span, each with a component of its own: three-fold modes come out along the axes."""
    rows = basis.copy()
    for i in range(len(rows)):
        pivot = np.argmax(np.abs(rows[i:]).max(0).round(4))
        j = i + np.argmax(np.abs(rows[i:, pivot]).round(4))
        rows[[i, j]] = rows[[j, i]]
        rows[i] /= rows[i, pivot]
        others = np.arange(len(rows)) != i
        rows[others] -= np.outer(rows[others, pivot], rows[i])
    turned, _ = np.linalg.qr(rows.T)
    return turned.T * np.sign((turned.T * rows).sum(1))[:, None]


def moves(cell, mode, supercell, phase=0.0):
    """Displacements (N det M, 3), the largest of length 1, of a mode in `supercells` order; phase in degrees."""
    atoms, (_, offset, index) = to_atoms(cell), supercells(cell, supercell)
    where = offset + np.asarray(cell[2], float)[index]
    wave = np.exp(1j * (2 * np.pi * where @ np.asarray(mode["q"], float) + np.deg2rad(phase)))
    u = (np.asarray(mode["eigenvector"])[index] / np.sqrt(atoms.get_masses()[index])[:, None] * wave[:, None]).real
    return u / max(np.linalg.norm(u, axis=1).max(), 1e-12)


def supercells(cell, supercell):
    """(matrix (3, 3), offsets (M, 3) in cells of the parent, index (M,) of the parent's atom) of a supercell, M = N det.

    supercell: repeats (3,) or integer matrix whose rows are the new axes in terms of the old.
    """
    matrix = np.asarray(supercell, int)
    matrix = np.diag(matrix) if matrix.ndim == 1 else matrix
    span = np.abs(matrix).sum(0)
    grid = np.stack(np.meshgrid(*[np.arange(-s, s + 1) for s in span], indexing="ij"), -1).reshape(-1, 3)
    inside = grid @ np.linalg.inv(matrix)
    grid = grid[((inside > -1e-6) & (inside < 1 - 1e-6)).all(1)]
    count = len(cell[1])
    return matrix, np.tile(grid, (count, 1)), np.repeat(np.arange(count), len(grid))


def displaced(cell, mode, amplitude, phase=0.0, supercell=(2, 2, 2)):
    """The supercell of a cell with a mode frozen in: its largest displacement is `amplitude` angstrom, at `phase` degrees."""
    return build(cell, supercell, amplitude * moves(cell, mode, supercell, phase))


def build(cell, supercell, shift=0.0, strain=None):
    """Supercell as a cell tuple. shift (M, 3) cartesian angstrom; strain (6,): factors of the edges, degrees added to the angles."""
    from ase.geometry import cell_to_cellpar
    matrix, offset, index = supercells(cell, supercell)
    old = to_atoms(cell).cell[:]
    new = matrix @ old
    frac = ((offset + np.asarray(cell[2], float)[index]) @ old + shift) @ np.linalg.inv(new)
    lattice = cell_to_cellpar(new)
    if strain is not None:
        lattice = np.concatenate([lattice[:3] * strain[:3], lattice[3:] + strain[3:]])
    return lattice, [cell[1][i] for i in index], frac % 1


def study(cell, calculator, supercell=None, displacement=DISPLACEMENT, points=POINTS):
    """Everything a notebook draws, JSON-able; a failure of the crystal is a dict with its status, one of the machine (`passing`) is raised.

    status ok | failed: reason; supercell, displacement, asr, spacegroup, bands, dos, special, soft (q, label, frequency), lowest,
    lowest_exact (THz), seconds. supercell: repeats (3,), from the length LENGTH by default.
    """
    start, supercell = time.time(), supercell_for(cell) if supercell is None else supercell
    out = {"status": "ok", "symbols": list(cell[1]), "lattice": np.round(cell[0], 6).tolist(), "frac": np.round(cell[2], 6).tolist(),
           "supercell": np.asarray(supercell).tolist(), "displacement": displacement, "threshold": SOFT}
    try:
        ph = phonopy_of(cell, calculator, supercell, displacement)
        out |= {"spacegroup": spacegroup(cell, SYMMETRY), "asr": ph.asr, "bands": bands(ph, points), "dos": dos(ph),
                "special": special_points(ph),
                "soft": [{k: m[k] for k in ("q", "label", "frequency")} for m in soft_modes(ph)],
                "lowest": round(lowest(ph), 4), "lowest_exact": round(lowest_exact(ph), 4)}
    except Exception as error:                                               # potentials fail on odd cells, each in its own way
        if passing(error, calculator):
            raise
        out["status"] = f"failed: {type(error).__name__}: {str(error)[:200]}"
    return out | {"seconds": round(time.time() - start, 1)}


def study_all(materials, folder, potential="sevennet-0", supercell=None, displacement=DISPLACEMENT, device="cpu", checkpoint=None,
              progress=True):
    """{name: study} of materials {name: cell}; one JSON per material in a folder. What is there for the same cell is not asked again."""
    from tqdm.auto import tqdm

    from .potentials import get_calculator, pick
    from .results import _write_atomic
    potential, out, calculator = pick(potential), {}, None
    for name, cell in tqdm(materials.items(), desc=f"phonons with {potential}", disable=not progress, mininterval=1):
        path, question = Path(folder) / f"{name}.json", f"phonons {supercell} {displacement}"
        key = key_of(cell, question, potential, checkpoint=checkpoint)
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("key") != key:
            calculator = calculator or get_calculator(potential, device, checkpoint)
            found = {"name": name, "potential": potential, "key": key} | study(cell, calculator, supercell, displacement)
            _write_atomic(path, json.dumps(found, ensure_ascii=False) + "\n")
        out[name] = found
    return out


def convergence(cell, calculator, sizes=((1, 1, 1), (2, 2, 2), (3, 3, 3)), displacements=(0.005, 0.01, 0.03)):
    """Lowest frequency at each special point: rows {supercell, displacement, lowest: {label: THz}}, sizes first, then displacements."""
    jobs = [(s, DISPLACEMENT) for s in sizes] + [(sizes[min(1, len(sizes) - 1)], d) for d in displacements if d != DISPLACEMENT]
    rows = []
    for size, d in jobs:
        ph = phonopy_of(cell, calculator, size, d)
        rows.append({"supercell": list(size), "displacement": d, "lowest": {k: min(v) for k, v in special_points(ph).items()}})
    return rows


def main():
    from . import candidates
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formulas", nargs="+")
    parser.add_argument("--potential", default="sevennet-0")
    args = parser.parse_args()
    rows = candidates.relaxed_cubic(args.formulas, args.potential)
    cells = {f: cell_from(r) for f, r in zip(args.formulas, rows) if "lattice" in r}
    for name, s in study_all(cells, Path("runs") / "phonons" / args.potential, args.potential).items():
        print(name, s["status"], s.get("lowest"), sorted({m["label"] for m in s.get("soft", [])}))


if __name__ == "__main__":
    main()
