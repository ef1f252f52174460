"""VibroML 0.1.0 with any ASE calculator: its own parameter sweep and genetic algorithm on one cell, its structures as our rows.

The package is driven from its command line and knows no engine but its own. Here its functions are called one by one, and its
`initialize_calculator` is replaced for the time of a call, so that it relaxes and computes phonons with our potential. The default
settings that its wheel lacks (default_settings.json) are given as arguments. It does not resume here, relaxes one structure at a time,
and takes no seed but Python's and numpy's. The search of ours on the same genes is meidnet_core.repair.
"""

import contextlib
import io
import os
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from .relax import to_atoms

THRESHOLD = -0.1               # THz


class VibroError(RuntimeError):
    """VibroML is missing, or what it was asked for did not come out; the message says where it stopped."""


def available():
    """Can VibroML be imported?"""
    try:
        _package()
    except VibroError:
        return False
    return True


def _package():
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vibroml import auto_optimize
    except ImportError as error:
        raise VibroError(f"vibroml cannot be imported ({error}): pip install vibroml==0.1.0") from error
    return auto_optimize


@contextlib.contextmanager
def _engine(module, calculator, log):
    """VibroML with our calculator as its engine; what it prints goes to a file."""
    original, module.initialize_calculator = module.initialize_calculator, lambda *args, **options: calculator
    try:
        with (open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), warnings.catch_warnings()):
            warnings.simplefilter("ignore")
            yield
    finally:
        module.initialize_calculator = original


def search(cell, calculator, folder, *, supercell=(2, 2, 2), delta=0.03, fmax=0.05, generations=2, population=3, offspring=3, seed=0):
    """VibroML's sweep (one setting) and, when it finds a soft mode, its genetic algorithm.

    Returns {"lowest": THz, interpolated along its path (a small supercell makes a stable crystal soft), "soft": bool, "rows": [status,
    energy_per_atom (eV), lattice, symbols, frac, file], lowest first}. Everything that VibroML writes, its phonons of the best included,
    lies in `folder`. VibroError when it gives up.
    """
    from ase.io import write
    module, folder = _package(), Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(seed)
    np.random.seed(seed)                                                     # noqa: NPY002, the generator that VibroML draws from
    cif, atoms = folder / "cell.cif", to_atoms(cell)
    write(cif, atoms)
    args = _arguments(str(cif), supercell, delta, fmax)
    common = {"phonon_path_npoints": 40, "phonon_dos_grid": (6, 6, 6), "default_traj_kT": 1.0, "num_modes_to_return": 2}
    try:
        with _engine(module, calculator, folder / "vibroml.log"):
            lowest, _, modes, relaxed = module.run_phonon_calculation_sweep_optimization(
                args, str(folder / "sweep"), atoms, calculator, "cell", [tuple(supercell)], [delta], [fmax], THRESHOLD, **common)
            if modes and lowest < THRESHOLD:
                module.run_ga_soft_mode_optimization(
                    args, str(folder / "ga"), relaxed, modes, 1, [0.5], [0.0], [0.0, 1.0], 1, THRESHOLD, **common,
                    ga_population_size=population, ga_mutation_rate=0.2, ga_generations=generations,
                    num_new_points_per_iteration=offspring, ga_disp_scale_bounds=(0.1, 2.0), ga_ratio_bounds=(-1.0, 1.0),
                    ga_cell_scale_bounds=(-0.05, 0.05), ga_cell_angle_bounds=(-5.0, 5.0))
    except (Exception, SystemExit) as error:                                 # it leaves with sys.exit where others raise
        raise VibroError(f"VibroML stopped: {type(error).__name__}: {error}; its output is in {folder / 'vibroml.log'}") from error
    if not np.isfinite(lowest):
        raise VibroError(f"VibroML came to no phonons; its output is in {folder / 'vibroml.log'}")
    soft = bool(modes and lowest < THRESHOLD)
    return {"lowest": float(lowest), "soft": soft, "rows": _rows(folder / "ga", calculator) if soft else []}


def _arguments(cif, supercell, delta, fmax):
    """What its argument parser would give. engine "mace" is its path for any ASE calculator."""
    text = "x".join(map(str, supercell))
    return SimpleNamespace(cif=cif, engine="mace", model_name="injected", checkpoint=None, nep_model=None, checkpoint_model=None,
                           units="THz", supercell=text, supercell_dims=tuple(supercell), delta=delta, fmax=fmax, save_yaml=False,
                           compute_pdos=False, constrained_supercell_growth=False, decomposition_threshold=5.0, method="ga",
                           relaxation_patience=5, volume_expansion_threshold=2.5, max_atoms_per_supercell=20)


def _rows(folder, calculator):
    """Its relaxed structures as rows, energies by our calculator on the files it wrote."""
    from ase.io import read
    rows = []
    for path in sorted(folder.rglob("*relaxed*.cif"), key=os.fspath):
        atoms = read(path)
        atoms.calc = calculator
        rows.append({"status": "ok", "file": str(path), "energy_per_atom": float(atoms.get_potential_energy()) / len(atoms),
                     "lattice": atoms.cell.cellpar().round(6).tolist(), "symbols": atoms.get_chemical_symbols(),
                     "frac": atoms.get_scaled_positions().round(6).tolist()})
    return sorted(rows, key=lambda r: r["energy_per_atom"])
