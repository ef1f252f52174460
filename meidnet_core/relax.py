"""Relaxation of many crystals with a potential: parallel over processes or batched on a GPU, one line of a file per result, resumable.

As in the paper (inverse design framework): forces below 0.01 eV/angstrom, at most 300 steps, cell free. From the given
cell ("ideal": a cubic cell keeps its symmetry) and from a rattled copy, which may fall into another phase.
"""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np

FMAX, STEPS = 0.01, 300
RATTLE = 0.05                  # angstrom, standard deviation of the displacement of a rattled start
STRETCH = 3.0                  # a volume beyond this factor (or its inverse) is an explosion
STARTS = ("ideal", "rattled")
SYMMETRY = 0.01                # angstrom, within which the cell of a row has its symmetry: relaxation leaves some thousandths
_state = {}                    # calculator of a worker process


def key_of(cell, start, potential, fmax=FMAX, steps=STEPS, checkpoint=None):
    """Name of one relaxation: equal questions are asked once. cell = (lattice (6,), symbols, frac (N, 3)).

    checkpoint: path of weights of one's own; they are known by it, so other weights need another path.
    """
    lattice, symbols, frac = cell
    what = [start, potential, fmax, steps, list(symbols), np.round(lattice, 4).tolist(), np.round(frac, 5).tolist()]
    text = json.dumps(what + ([str(checkpoint)] if checkpoint else []))                # without one the names of old rows stay valid
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cell_from(row):
    """Cell (lattice, symbols, frac) of a row that has them: of a relaxation, a polymorph, a stored result."""
    return row["lattice"], row["symbols"], row["frac"]


def to_atoms(cell):
    """ASE Atoms of a cell (lattice (6,) angstrom and degrees, symbols, frac)."""
    from ase import Atoms
    return Atoms(list(cell[1]), cell=np.asarray(cell[0], float), scaled_positions=np.asarray(cell[2], float), pbc=True)


class Exploded(RuntimeError):
    """The cell left the range in which a potential means anything."""


def relax(cell, calculator, start="ideal", fmax=FMAX, steps=STEPS, seed=0):
    """One relaxation -> dict: status, energy_per_atom (eV), steps, lattice, symbols, frac, volume (cubic angstrom per atom).

    status: ok | not converged | exploded | failed: reason. A bad crystal is a row; raised is only what says nothing of the crystal:
    a worker that is gone (WorkerError), memory or GPU that give up (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError), and
    ValueError for a start that is none of STARTS.
    """
    if start not in STARTS:
        raise ValueError(f"start {start!r}: expected one of {', '.join(STARTS)}")
    from ase.filters import FrechetCellFilter
    from ase.optimize import FIRE, LBFGS
    row = {"start": start, "symbols": list(cell[1]), "status": "not converged", "energy_per_atom": None, "steps": 0}
    try:
        atoms = to_atoms(cell)
        if start == "rattled":
            atoms.rattle(RATTLE, seed=seed)
        atoms.calc, volume = calculator, atoms.get_volume()
        optimizer = (LBFGS if start == "ideal" else FIRE)(FrechetCellFilter(atoms), logfile=None)
        optimizer.attach(lambda: _watch(atoms, volume))
        row["status"] = "ok" if optimizer.run(fmax=fmax, steps=steps) else "not converged"
        row["energy_per_atom"], row["steps"] = float(atoms.get_potential_energy()) / len(atoms), int(optimizer.nsteps)
    except Exploded as error:
        return row | {"status": f"exploded: {error}"}
    except Exception as error:                                       # potentials fail on odd cells, each in its own way
        if passing(error, calculator):
            error.add_note(f"No row is stored for {''.join(row['symbols'])} ({start}): the same call asks it again, what is done is kept.")
            raise
        return row | {"status": f"failed: {type(error).__name__}: {str(error)[:200]}"}
    return row | {"lattice": [round(float(v), 6) for v in atoms.cell.cellpar()], "volume": float(atoms.get_volume()) / len(atoms),
                  "frac": np.round(atoms.get_scaled_positions(), 6).tolist()}


def off_centre(cell, calculator, direction, shifts=(0.04, 0.1)):
    """Row of the lowest relaxation that begins with one of the first two sites (the cations of an ABX3 cell) moved along `direction`
    (3,) by one of `shifts` (of the lattice constant). RuntimeError when none of them ends."""
    step, rows = np.asarray(direction) / np.linalg.norm(direction), []
    for site, shift in ((site, shift) for site in (0, 1) for shift in shifts):
        frac = np.array(cell[2], float)
        frac[site] += shift * step
        rows.append(relax((cell[0], cell[1], frac), calculator))
    ended = [r for r in rows if r["status"] == "ok"]
    if not ended:
        raise RuntimeError(f"{''.join(cell[1])} off centre along {direction}: {', '.join(r['status'] for r in rows)}")
    return min(ended, key=lambda r: r["energy_per_atom"])


def passing(error, calculator):
    """Is a failure of the machine, not of the crystal? As a row it would be kept for ever."""
    import torch

    from .worker import WorkerError
    process = getattr(calculator, "process", None)                    # of a WorkerCalculator
    if process is not None and (process.poll() is not None or isinstance(error.__cause__, OSError)):
        return True
    told = isinstance(error, WorkerError) and str(error).startswith(("MemoryError", "OutOfMemoryError"))
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError))


def _watch(atoms, volume):
    ratio, energy = atoms.get_volume() / volume, atoms.get_potential_energy() / len(atoms)
    if not (1 / STRETCH < ratio < STRETCH) or not np.isfinite(energy) or abs(energy) > 100:
        raise Exploded(f"volume x {ratio:.2f}, {energy:.1f} eV/atom")


def _start(potential, device, checkpoint):
    import torch

    from .potentials import get_calculator
    torch.set_num_threads(1)                                          # more threads than free cores spin: 50 times slower
    _state["calculator"] = get_calculator(potential, device, checkpoint)


def _start_process(*what):
    """_start in a process of a pool, which would not say why its initializer failed: the first job does."""
    try:
        _start(*what)
    except Exception as error:
        _state["error"] = error


def _job(job):
    if "error" in _state:
        raise _state["error"]
    key, cell, start, fmax, steps = job
    return key, relax(cell, _state["calculator"], start, fmax, steps)


def read_rows(path):
    """{key: row} of a results file; the half line of a killed run is left out and asked again."""
    rows = {}
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (json.JSONDecodeError, KeyError):
            continue
    return rows


def relax_all(cells, path, potential="sevennet-0", starts=("ideal",), processes=None, device="auto", checkpoint=None, fmax=FMAX,
              steps=STEPS, progress=True, batch=None):
    """Relax cells from each start; returns rows[start] = list in the order of `cells`.

    path: JSON lines, one per relaxation, appended as they come. What is there already is not relaxed again, so a killed
    call goes on where it was. `potential` is a name of potentials.FILES. batch: that many side by side through one network
    (batch.py, SevenNet only) instead of `processes`; by default batch.SIZE on a GPU, 0 on a CPU. device "auto": a GPU that is
    there, for a potential that can be batched.
    """
    from .potentials import local_file, pick
    potential, path = pick(potential), Path(path)
    device, batch = place(potential, device, batch)
    weights = checkpoint or local_file(potential)                    # rows of other weights are other rows
    keys = {s: [key_of(c, s, potential, fmax, steps, weights) for c in cells] for s in starts}
    done = read_rows(path)
    jobs = {k: (k, c, s, fmax, steps) for s in starts for k, c in zip(keys[s], cells) if k not in done}
    if jobs:
        spread = _here if processes == 1 else partial(_spread, processes=processes or os.cpu_count())
        rows = partial(_batched, size=batch) if batch else spread
        done |= _run(list(jobs.values()), path, rows, (potential, device, checkpoint), progress)
    return {s: [done[k] for k in keys[s]] for s in starts}


def place(potential, device="auto", batch=None):
    """(device, batch) that relax_all uses; PotentialError for a batch of a potential that batch.py does not know, ValueError for
    a batch below 0."""
    from .batch import SIZE
    from .potentials import PotentialError, find_device
    known = potential.startswith("sevennet")
    if batch is not None and batch < 0:
        raise ValueError(f"batch {batch}: so many relaxations side by side cannot be; 0 switches batches off")
    if batch and not known:
        raise PotentialError(f"{potential} cannot be batched: only SevenNet can; use processes")
    device = find_device(device) if known or device != "auto" else "cpu"
    return device, (SIZE if known and device == "cuda" else 0) if batch is None else batch


def _run(jobs, path, rows, what, progress):
    """Relaxes with rows(jobs, what) and keeps every row on disk; what = (potential, device, checkpoint)."""
    from tqdm.auto import tqdm
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    done = {}
    with open(path, "a") as file:
        for key, row in tqdm(rows(jobs, what), total=len(jobs), desc=f"relax with {what[0]}", disable=not progress, mininterval=1):
            done[key] = {"key": key, "potential": what[0]} | row
            file.write(json.dumps(done[key]) + "\n")
            file.flush()
    return done


def _here(jobs, what):
    _start(*what)
    yield from map(_job, jobs)


def _batched(jobs, what, size):
    from . import batch
    _start(*what)
    gather = batch.Gather(batch.sevennet(_state.pop("calculator")))
    work = lambda job, calculator: (job[0], relax(job[1], calculator, *job[2:]))
    yield from batch.run(jobs, work, gather, size)


def _spread(jobs, what, processes):
    """(key, row) as they finish: a kill loses only what runs, a failure ends what has not begun."""
    from multiprocessing import get_context
    with ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), _start_process, what) as pool:
        try:
            for future in as_completed([pool.submit(_job, job) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _mend(path):
    """End the half line that a kill may have left, so that the next line is whole."""
    if path.exists() and path.stat().st_size:
        with open(path, "a+b") as file:                               # nothing is rewritten, so a kill here loses nothing
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")


# ---- for a search that brings its own cells ------------------------------------------------------

def serial(calculator, fmax=FMAX, steps=STEPS):
    """evaluate(cells) of one ASE calculator: rows of `relax` from the ideal start, one by one."""
    return lambda cells: (relax(c, calculator, "ideal", fmax, steps) for c in cells)


def side_by_side(calculator, size, fmax=FMAX, steps=STEPS, wrap=lambda waiting: waiting):
    """The same with the same answers, `size` at once through one SevenNetCalculator (batch.py).

    Its network answers batches only from now on, so no one else may use it. wrap: puts another calculator around each one that waits.
    """
    from . import batch
    gather = batch.Gather(batch.sevennet(calculator))

    def evaluate(cells):
        found, due = {}, 0
        work = lambda i, waiting: (i, relax(cells[i], wrap(waiting), "ideal", fmax, steps))
        for i, row in batch.run(range(len(cells)), work, gather, size):
            found[i] = row
            while due in found:                                      # those that came before their turn wait for it
                yield found.pop(due)
                due += 1

    return evaluate
