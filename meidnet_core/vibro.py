"""VibroML 0.1.0 with any ASE calculator: its own parameter sweep and genetic algorithm on one cell, its structures as our rows.

The package is driven from its command line and knows no engine but its own. Here its functions are called one by one, and its
`initialize_calculator` is replaced for the time of a call, so that it relaxes and computes phonons with our potential. The default
settings that its wheel lacks (default_settings.json) are given as arguments. It does not resume here, relaxes one structure at a time,
and takes no seed but Python's and numpy's. The search of ours on the same genes is meidnet_core.repair.

    python -m meidnet_core.vibro KTaSe3 --generations 2 --population 3       # -> data/results/vibroml
    python -m meidnet_core.vibro KTaSe3 --delta 0.05 0.03 0.01 --fmax 0.05 0.01 0.005    # a sweep of three points first
    python -m meidnet_core.vibro KTaSe3 --rounds 3           # again below the lowest cell of the round before, while that is soft
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from .relax import cell_from, to_atoms

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


def settings(supercell=(2, 2, 2), delta=0.03, fmax=0.05):
    """The lists of VibroML's sweep: supercells, displacements (angstrom), largest forces of the relaxation before (eV/angstrom).

    They are tried in step, so all have one length, or one value that stands for all; ValueError if not.
    """
    lists = [[tuple(map(int, n)) for n in (supercell if np.ndim(supercell) == 2 else [supercell])],
             *([float(v) for v in np.atleast_1d(values)] for values in (delta, fmax))]
    length = max(map(len, lists))
    if any(len(v) not in (1, length) for v in lists):
        raise ValueError(f"supercell, delta and fmax have {', '.join(str(len(v)) for v in lists)} values: expected as many of each, or one")
    return [v * (length if len(v) == 1 else 1) for v in lists]


def search(cell, calculator, folder, *, supercell=(2, 2, 2), delta=0.03, fmax=0.05, scales=(0.5,), stretches=(0.0,), ratios=(0.0, 1.0),
           generations=2, population=3, offspring=3, seed=0):
    """VibroML's sweep over `settings` and, when it finds a soft mode, its genetic algorithm with the best of them.

    The sweep keeps the setting whose lowest frequency is highest, and ends where the next one adds less than 0.05 THz. The first cells of
    the genetic algorithm combine scales (of the displacement), stretches (of the cell edges) and ratios (second mode to first).
    Returns {"lowest": THz, interpolated along its path (a small supercell makes a stable crystal soft), "soft": bool, "setting": the best,
    "rows": [status, energy_per_atom (eV), lattice, symbols, frac, file], lowest first}. Everything that VibroML writes, its phonons of the
    best included, lies in `folder`. VibroError when it gives up, ValueError for settings that do not fit.
    """
    from ase.io import write
    lists, module, folder = settings(supercell, delta, fmax), _package(), Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(seed)
    np.random.seed(seed)                                                     # noqa: NPY002, the generator that VibroML draws from
    cif, atoms = folder / "cell.cif", to_atoms(cell)
    write(cif, atoms)
    common = {"phonon_path_npoints": 40, "phonon_dos_grid": (6, 6, 6), "default_traj_kT": 1.0, "num_modes_to_return": 2}
    try:
        with _engine(module, calculator, folder / "vibroml.log"):
            lowest, best, modes, relaxed = module.run_phonon_calculation_sweep_optimization(
                _arguments(str(cif), *(v[0] for v in lists)), str(folder / "sweep"), atoms, calculator, "cell", *lists, THRESHOLD, **common)
            if modes and lowest < THRESHOLD:
                args = _arguments(str(cif), *(best[k] for k in ("supercell_dims", "delta", "fmax")))
                module.run_ga_soft_mode_optimization(
                    args, str(folder / "ga"), relaxed, modes, 1, list(scales), list(stretches), list(ratios), 1, THRESHOLD, **common,
                    ga_population_size=population, ga_mutation_rate=0.2, ga_generations=generations,
                    num_new_points_per_iteration=offspring, ga_disp_scale_bounds=(0.1, 2.0), ga_ratio_bounds=(-1.0, 1.0),
                    ga_cell_scale_bounds=(-0.05, 0.05), ga_cell_angle_bounds=(-5.0, 5.0))
    except (Exception, SystemExit) as error:                                 # it leaves with sys.exit where others raise
        raise VibroError(f"VibroML stopped: {type(error).__name__}: {error}; its output is in {folder / 'vibroml.log'}") from error
    if not np.isfinite(lowest):
        raise VibroError(f"VibroML came to no phonons; its output is in {folder / 'vibroml.log'}")
    soft = bool(modes and lowest < THRESHOLD)
    return {"lowest": float(lowest), "soft": soft, "setting": {k: best[k] for k in ("supercell_dims", "delta", "fmax")},
            "rows": _rows(folder / "ga", calculator) if soft else []}


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


def in_rounds(name, cell, calculator, folder, rounds=1, **options):
    """`search`, then again below the lowest cell of the one before for as long as that is soft: [(search, its best cell examined as in
    repair.py)], at most `rounds`. VibroError when the first finds no soft mode, or its best fails. ValueError: fewer than one."""
    from . import repair
    if rounds < 1:
        raise ValueError(f"{name}: rounds={rounds}, expected at least 1")
    done = []
    while len(done) < rounds:
        found = search(cell, calculator, Path(folder) / f"round{len(done)}", **options)
        best = repair.examine(cell_from(found["rows"][0]), calculator) if found["rows"] else {"status": "no soft modes"}
        if best.get("lowest") is None:
            if done:
                break
            raise VibroError(f"{name}: {best['status']}; the output of VibroML is in {folder}")
        done.append((found, best))
        if repair.stable(best):
            break
        cell = cell_from(best)
    return done


def measure(formula, potential="sevennet-0", rounds=1, **options):
    """`in_rounds` below the relaxed cubic cell of a formula; writes data/results/vibroml/<formula>-<potential>.json.

    metrics: gain of the lowest structure as VibroML left it and polished as those of repair.py are (eV/atom below the cubic cell), its
    lowest frequencies (THz; as in repair.py), gain after each round, evaluations, CPU seconds. VibroError as in_rounds.
    """
    from . import candidates, repair, results
    from .potentials import get_calculator
    calculator, row = get_calculator(potential, "cpu"), candidates.relaxed_cubic([formula], potential)[0]
    start, cpu, folder = time.time(), time.process_time(), results.ROOT / "runs" / "vibroml" / f"{formula}-{potential}"
    shutil.rmtree(folder, ignore_errors=True)                                # VibroML would go on from what another call left
    done = in_rounds(formula, cell_from(row), calculator, folder, rounds, **options)
    found, best = min(done, key=lambda pair: pair[1]["energy_per_atom"])
    below = lambda r: row["energy_per_atom"] - r["energy_per_atom"]
    metrics = {"lowest_before": done[0][0]["lowest"], "gain": below(found["rows"][0]), "gain_polished": below(best),
               "lowest_after": best["lowest"], "lowest_exact_after": best["lowest_exact"], "rounds": len(done),
               "repaired": int(repair.stable(best)), "evaluations": sum(len(f["rows"]) for f, _ in done),
               "cpu_seconds": time.process_time() - cpu} | {f"gain_round{n + 1}": below(b) for n, (_, b) in enumerate(done)}
    keep = ("energy_per_atom", "lattice", "symbols", "frac", "spacegroup", "symprec", "supercell")
    config = {"potential": potential, "setting": done[0][0]["setting"], "rounds": rounds, **options}
    return results.write_run("vibroml", f"{formula}-{potential}", config=config, seed=options.get("seed", 0), data_set="paper, Table S2",
                             split="polymorphs", n=1, metrics=metrics, claims={}, wall_time_s=time.time() - start,
                             best={k: best.get(k) for k in keep})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formulas", nargs="+")
    parser.add_argument("--potential", default="sevennet-0")
    for name, value in (("rounds", 1), ("generations", 2), ("population", 3), ("offspring", 3), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, values, what in (("delta", [0.03], "points of the sweep, angstrom"), ("fmax", [0.05], "points of the sweep, eV/angstrom"),
                               ("scales", [0.5], "first cells: of the displacement"), ("ratios", [0.0, 1.0], "first cells: of two modes")):
        parser.add_argument(f"--{name}", type=float, nargs="+", default=values, help=what)
    options = vars(parser.parse_args())
    for formula in options.pop("formulas"):
        print(measure(formula, **options))


if __name__ == "__main__":
    main()
