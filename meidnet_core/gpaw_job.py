"""The steps of one GPAW calculation, run under MPI by dft.py: `mpirun -np 2 python -m meidnet_core.gpaw_job FOLDER`.

FOLDER/job.json says what to do; each step writes FOLDER/<step>.json when it is done and is not done twice. A step that does
not converge, or fails, is a file with that status: nothing is lost and nothing looks like a result.

eos: energies of scaled cells -> lattice; relax: atoms and cell by forces and stress, within the symmetry of the start; scf: density
and eigenvalues on a mesh with Gamma; bands: along a path; dos: total density of states; basis: what atomic orbitals in place of plane
waves cost, where job["basis"] asks for them in bands and dos; gllbsc: band gap with the derivative discontinuity (Kuisma et al. 2010).
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

STRAINS = (0.0, 0.01, -0.01, 0.02, -0.02)      # of the lattice constant, in this order: the first NEAREST in any case
NEAREST, ENOUGH, MOST = 3, 5, 9                # points of an equation of state
EMPTY = 14                                     # empty bands at most: in large cells the highest would take most of the time
LOOSE = {"energy": 3e-5, "density": 1e-3, "eigenstates": 3e-4}      # of strained cells: energies to 0.1 meV in half the steps
DENSE = {"energy": 1e-5, "density": 1e-4, "eigenstates": 3e-5}      # of the self-consistent run: levels to 0.03 meV
MIXING = {"bold": ((0.4, 8, 20), (0.25, 8, 20)), "gentle": ((0.2, 5, 50), (0.1, 5, 50)),     # without and with spin; see energy()
          "careful": ((0.1, 5, 50), (0.05, 5, 50))}
PATIENCE = {"bold": (16, 30), "gentle": (40, 50)}      # steps to LOOSE, to DENSE, after which the next mixing starts anew
FMAX, MOVES = 0.03, 60                         # eV/angstrom, largest force and stress x cell of a relaxed cell; most steps to it
TINY_GAP = 0.1                                 # eV; below this Kohn-Sham gap the discontinuity means nothing
WINDOW = (-8.0, 8.0)                           # eV around the Fermi level, of the density of states
NEAR = 2.0                                     # eV around the Fermi level, of the levels by which a basis is judged


def calculator(job, folder, step, mixing="careful", **changes):
    """A GPAW calculator for one step; everything that the numbers depend on comes from job["settings"]."""
    from gpaw import GPAW, PW, FermiDirac, Mixer, MixerSum
    s, spin, dense = job["settings"], bool(job["magmoms"]), changes.get("convergence") != LOOSE
    steps = s["maxiter"] if mixing == "careful" else min(PATIENCE[mixing][dense], s["maxiter"])
    words = dict(mode=PW(s["cutoff"]), xc=job["xc"], kpts={"size": s["kpts"], "gamma": s["gamma"]}, occupations=FermiDirac(s["smearing"]),
                 convergence=DENSE, maxiter=steps, mixer=(MixerSum if spin else Mixer)(*MIXING[mixing][spin]), setups=job["setups"],
                 txt=str(folder / f"{step}.txt"))
    if len(job["cell"][1]) < 3:                                      # GPAW's default leaves a potassium atom no empty band
        words["nbands"] = -4
    return GPAW(**(words | changes))


def energy(atoms, job, folder, step, **changes):
    """Energy (eV) of atoms with a calculator of `step`: bold mixing, which takes half the steps, then the gentler ones where it swings.

    What swung once is not tried again in this folder: other strains of a cell swing as well. KohnShamConvergenceError where none
    converges. Mixing changes the way to the density, not the density.
    """
    from gpaw import KohnShamConvergenceError
    swung = read(folder, "swung") or []
    *others, last = (mixing for mixing in MIXING if mixing not in swung)
    for mixing in others:
        try:
            atoms.calc = calculator(job, folder, step, mixing, **changes)
            return atoms.get_potential_energy()
        except KohnShamConvergenceError:
            swung = [*swung, mixing]
            write(folder, "swung", swung)
    atoms.calc = calculator(job, folder, step, last, **changes)
    return atoms.get_potential_energy()


def atoms_of(job):
    from .relax import to_atoms
    atoms = to_atoms(job["cell"])
    if job["magmoms"]:
        atoms.set_initial_magnetic_moments(job["magmoms"])
    return atoms


def cell_of(atoms):
    """The cell of a record: lattice (6,) angstrom and degrees, symbols, frac (N, 3)."""
    return {"lattice": atoms.cell.cellpar().tolist(), "symbols": list(atoms.symbols), "frac": atoms.get_scaled_positions().tolist()}


def read(folder, step):
    path = folder / f"{step}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(folder, step, record):
    """Master writes, beside the file and renamed: a reader sees all of it or nothing."""
    from gpaw.mpi import world
    if world.rank == 0:
        part = folder / f".{step}.{os.getpid()}"
        part.write_text(json.dumps(record))
        os.replace(part, folder / f"{step}.json")
    world.barrier()


# ---- steps --------------------------------------------------------------------------------------

def next_strain(points, start):
    """Strain of the next point of the equation of state of a cell of volume `start`, or None when (volume, energy) points are enough.

    The NEAREST points first; then beyond the edge at which the lowest energy lies, MOST in all; with a minimum inside, ENOUGH in all.
    """
    done = {round((v / start) ** (1 / 3) - 1, 4): e for v, e in points}
    missing = [strain for strain in STRAINS if strain not in done]
    if len(done) < NEAREST:
        return missing[0]
    lowest = min(done, key=done.get)
    beyond = {min(done): -0.01, max(done): 0.01}.get(lowest)
    if beyond:
        return round(lowest + beyond, 4) if len(done) < MOST else None
    return missing[0] if len(done) < ENOUGH else None


def eos(job, folder):
    """Energies (eV) of uniformly strained cells, kept one by one, and the volume of the fitted minimum (Birch-Murnaghan)."""
    from ase.eos import EquationOfState
    from gpaw import Davidson
    points, start = read(folder, "eos-points") or [], atoms_of(job).get_volume()
    changes = {"convergence": LOOSE} | ({"eigensolver": Davidson(1)} if job["magmoms"] else {})      # with spin the density takes longer
    while (strain := next_strain(points, start)) is not None:
        atoms = atoms_of(job)
        atoms.set_cell(atoms.cell * (1 + strain), scale_atoms=True)
        points.append([atoms.get_volume(), energy(atoms, job, folder, "eos", **changes)])
        write(folder, "eos-points", points)
    volumes, energies = np.array(sorted(points)).T
    v0, e0, bulk = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
    if not volumes.min() < v0 < volumes.max():
        raise ValueError(f"the minimum at {v0:.1f} cubic angstrom lies outside the strained cells: start nearer to it")
    return {"volumes": volumes.tolist(), "energies": energies.tolist(), "volume": float(v0), "energy": float(e0),
            "bulk_modulus": float(bulk) / 0.006241509}                                     # eV/angstrom^3 -> GPa


def relax(job, folder):
    """Atoms and cell moved by forces and stress (less its error of a finite cutoff) until FMAX; steps are kept, a killed run goes on."""
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS
    from gpaw import PW
    atoms, kept = atoms_of(job), read(folder, "relax-path") or []
    if kept:
        atoms.set_cell(kept[-1]["cell"])
        atoms.set_scaled_positions(kept[-1]["frac"])
    waves = PW(job["settings"]["cutoff"], dedecut="estimate")
    atoms.calc = calculator(job, folder, "relax", mode=waves, symmetry={"tolerance": 1e-4}, convergence={**DENSE, "forces": 1e-2})

    def keep():
        now = {"cell": atoms.cell.tolist(), "frac": atoms.get_scaled_positions().tolist()}
        kept.append(now | {"energy": float(atoms.get_potential_energy())})
        write(folder, "relax-path", kept)
    optimizer = BFGS(FrechetCellFilter(atoms), logfile=None)
    optimizer.attach(keep)
    done = optimizer.run(fmax=FMAX, steps=MOVES)
    return {"status": "ok" if done else f"not relaxed in {MOVES} steps", "steps": len(kept), "energy": kept[-1]["energy"]} | cell_of(atoms)


def relaxed(job, folder):
    """Atoms at the volume of the equation of state, or as given when the job has none."""
    atoms, found = atoms_of(job), read(folder, "eos")
    if found and found["status"] == "ok":
        atoms.set_cell(atoms.cell * (found["volume"] / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
    return atoms


def eigenvalues(calc):
    """(S, K, B) eV relative to the Fermi level, (K, 3) k-points of the irreducible zone, (K,) weights."""
    spins, k = calc.get_number_of_spins(), calc.get_ibz_k_points()
    e = np.array([[calc.get_eigenvalues(kpt=i, spin=s) for i in range(len(k))] for s in range(spins)])
    return e - calc.get_fermi_level(), k, calc.get_k_point_weights()


def scf(job, folder):
    atoms = relaxed(job, folder)
    total = energy(atoms, job, folder, "scf")
    atoms.calc.write(folder / "scf.gpw")                             # density and potential; bands and dos start from it
    e, k, w = eigenvalues(atoms.calc)
    moment = float(atoms.calc.get_magnetic_moment()) if job["magmoms"] else 0.0
    return {"energy_per_atom": total / len(atoms), "efermi": float(atoms.calc.get_fermi_level()), "energies": e.tolist(), "moment": moment,
            "kpoints": k.tolist(), "weights": w.tolist(), "electrons": float(atoms.calc.get_number_of_electrons())} | cell_of(atoms)


def fixed(job, folder, step, kpts, extra):
    """Eigenvalues at other k-points in the fixed density of the self-consistent run; the highest bands, `extra` or more, are a buffer.

    job["basis"]: by atomic orbitals instead of plane waves, one diagonalisation a k-point (KTaSe3, 10 atoms: 38 instead of 679 s).
    """
    from gpaw import GPAW
    occupied = int(np.ceil(read(folder, "scf")["electrons"] / 2))
    ground = GPAW(folder / "scf.gpw", txt=None)
    if job.get("basis"):
        keep = occupied + max(8, occupied // 2)                          # empty bands cost nothing here
        ground.parameters["mode"] = {"name": "lcao"}                     # fixed_density takes the mode from there
        words = {"nbands": keep, "basis": basis_sets(job)}
    else:
        keep = occupied + min(max(8, occupied // 3), EMPTY)
        enough = {"bands": keep, "eigenstates": 3e-3}                    # levels to 1 meV, to 0.2 near the Fermi level
        words = {"nbands": keep + max(extra, occupied // 5), "maxiter": 200, "convergence": enough}
    fixed = ground.fixed_density(kpts=kpts, symmetry={} if step == "dos" else "off", txt=str(folder / f"{step}.txt"), **words)
    return ground, fixed, keep


def basis_sets(job):
    """{element: basis} of job["basis"]; a setup with the 4f shell in the core takes the element's standard one, whose 5d it needs."""
    from gpaw.basis_data import Basis
    return {"default": job["basis"], **{e: Basis.find(e, job["basis"]) for e in job["setups"]}}


def basis(job, folder):
    """{"error": eV, mean absolute difference of the levels within NEAR of the Fermi level, "levels": their number} on the mesh,
    between job["basis"] and the plane waves of the self-consistent run, in the same density. error: None without such levels."""
    s = read(folder, "scf")
    ground, calc, keep = fixed(job, folder, "basis", np.array(s["kpoints"]), 0)
    waves, e = np.array(s["energies"])[..., :keep], eigenvalues(calc)[0] + calc.get_fermi_level() - ground.get_fermi_level()
    near, difference = np.abs(waves) < NEAR, np.abs(e[..., :waves.shape[2]] - waves)
    return {"error": float(difference[near].mean()) if near.any() else None, "levels": int(near.sum())}


def bands(job, folder):
    """(S, K, B) energies along job["path"]["kpoints"], eV relative to the Fermi level of the self-consistent run."""
    ground, calc, keep = fixed(job, folder, "bands", np.array(job["path"]["kpoints"]), 8)
    e = np.array([[calc.get_eigenvalues(kpt=i, spin=s)[:keep] for i in range(len(job["path"]["kpoints"]))]
                  for s in range(calc.get_number_of_spins())])
    return {"energies": (e - ground.get_fermi_level()).tolist(), **job["path"]}


def dos(job, folder):
    """Total density of states (S, M) per eV and cell by linear tetrahedra; energies relative to the Fermi level.

    The Fermi level is that of the denser mesh; DOSCalculator takes energies relative to it already.
    """
    from gpaw.dos import DOSCalculator
    ground, calc, _ = fixed(job, folder, "dos", {"size": job["settings"]["dos_kpts"], "gamma": True}, 8)
    energies, spins = np.linspace(*WINDOW, 801), calc.get_number_of_spins()
    shift = ground.get_fermi_level() - calc.get_fermi_level()        # the levels of the bands and of the dos must be the same one
    table = DOSCalculator.from_calculator(calc, shift_fermi_level=True)
    total = [table.raw_dos(energies + shift, spin=s if spins == 2 else None, width=0.0) for s in range(spins)]
    return {"energies": energies.tolist(), "total": np.nan_to_num(total).tolist()}


def gllbsc(job, folder):
    """Fundamental gap = Kohn-Sham gap + derivative discontinuity, and the direct one: the same discontinuity on top of the
    smallest vertical Kohn-Sham gap. A Kohn-Sham gap below TINY_GAP is reported as no gap."""
    atoms = atoms_of(job)
    loose = {"energy": 1e-4, "density": 1e-3, "eigenstates": 1e-6}        # a third fewer steps for a few meV; labels have 0.1 eV
    from gpaw import Mixer
    words = {"convergence": loose, "mixer": Mixer(0.25, 5, 10)}           # of an insulator of few atoms: a third fewer steps again
    atoms.calc = calc = calculator(job | {"xc": "GLLBSC"}, folder, "gllbsc", **words)
    atoms.get_potential_energy()
    e, k, _ = eigenvalues(calc)
    if round(calc.get_number_of_electrons()) % 2:                    # a hole in the valence bands, wherever the next ones are
        return {"gap": False}
    occupied = int(round(calc.get_number_of_electrons() / 2))
    top, bottom = e[0, :, occupied - 1], e[0, :, occupied]
    ks, direct = float(bottom.min() - top.max()), float((bottom - top).min())
    record = {"ks_indirect": ks, "ks_direct": direct, "vbm_k": k[top.argmax()].tolist(), "cbm_k": k[bottom.argmin()].tolist(),
              "direct_k": k[(bottom - top).argmin()].tolist(),
              "kpoints": k.tolist(), "valence": top.tolist(), "conduction": bottom.tolist()}
    if ks < TINY_GAP:
        return record | {"gap": False}
    response, ef = calc.hamiltonian.xc.response, calc.get_fermi_level()
    potential = response.calculate_discontinuity_potential(float(top.max() + ef), float(bottom.min() + ef))
    found, discontinuity = response.calculate_discontinuity(potential)
    if abs(found - ks) > 0.02:
        raise ValueError(f"two Kohn-Sham gaps, {found:.3f} and {ks:.3f} eV")
    return record | {"gap": True, "discontinuity": float(discontinuity), "indirect": ks + discontinuity, "direct": direct + discontinuity}


STEPS = {"eos": eos, "relax": relax, "scf": scf, "basis": basis, "bands": bands, "dos": dos, "gllbsc": gllbsc}


def run(job, folder):
    """All steps of a job that are not there; stops at the first one without a result."""
    from gpaw import KohnShamConvergenceError
    for step in job["steps"]:
        record = read(folder, step)
        if not record or record["status"] != "ok":
            start = time.time()
            try:
                record = {"status": "ok"} | STEPS[step](job, folder)
            except KohnShamConvergenceError as error:
                record = {"status": "not converged", "reason": str(error)[:300]}
            except Exception as error:                               # of whatever kind: a row, not a dead process
                record = {"status": f"failed: {type(error).__name__}: {str(error)[:300]}"}
            write(folder, step, record | {"seconds": time.time() - start})
        if record["status"] != "ok":
            break


if __name__ == "__main__":
    where = Path(sys.argv[1])
    run(json.loads((where / "job.json").read_text()), where)
