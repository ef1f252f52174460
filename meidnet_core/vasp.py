"""The paper's own route to bands and gaps, for those with a VASP licence: inputs written, finished runs read.

Inputs are the Materials Project's sets of pymatgen with the paper's settings: PBE PAW, 520 eV, 1000 k-points per reciprocal atom,
without +U and without spin-orbit coupling. `read_run` returns what dft.run returns for GPAW, so tables and plots serve both.

Datasets are the MPRelaxSet's: Yb_2, Tm_3 and La. Yb_2 holds 4f14 in its core (divalent Yb) and is pymatgen's default, which the
paper does not change as far as it says; the Materials Project uses Yb_3 (4f13, trivalent) by now. The gap of an Yb compound
depends on the choice: `potcar={"Yb": "Yb_3"}, functional="PBE_54"` gives the other (the oldest release, "PBE", has no Yb_3).
"""

import warnings
from pathlib import Path

import numpy as np

from . import dft

ENCUT, KPPRA, DOS_KPPRA, PATH_POINTS = 520, 1000, 4000, 80     # eV; k-points per reciprocal atom of meshes; points along the path
STEPS = ("relax", "static", "bands", "dos")
INCAR = {"ENCUT": ENCUT, "LDAU": False, "LSORBIT": False, "LREAL": False}
EMPTY = 1.5                                                    # bands of a band structure over those of the static run
MAGNETIC = 0.1                                                 # Bohr magnetons a cell
JUMPS = "seekpath; jumps after points"                         # first line of KPOINTS, numbers from 1 follow


class VaspError(RuntimeError):
    """Inputs cannot be written or a run cannot be read; the message names the file and the reason."""


# ---- inputs -------------------------------------------------------------------------------------

def mesh(cell, density=KPPRA):
    """Gamma-centred (n1, n2, n3) with n1 n2 n3 N >= density for the N atoms of a cell, spaced evenly in reciprocal space."""
    from .relax import to_atoms
    lengths = np.linalg.norm(to_atoms(cell).cell.reciprocal()[:], axis=1)
    scale = (density / len(cell[1]) / lengths.prod()) ** (1 / 3)
    return tuple(int(n) for n in np.ceil(lengths * scale - 1e-6))


def _path(path):
    """pymatgen Kpoints of the explicit seekpath points; the ends of the segments carry their names, the comment says where it jumps."""
    from pymatgen.io.vasp import Kpoints
    distance, names = np.asarray(path["distance"]), [""] * len(path["distance"])
    for x, name in path["labels"]:
        parts = name.split("|")                                # a jump has two points at one distance
        for n, i in enumerate(np.flatnonzero(np.abs(distance - x) < 1e-6)):
            names[i] = parts[min(n, len(parts) - 1)].replace("Γ", "GAMMA")
    jumps = " ".join(str(i + 1) for i in np.flatnonzero(np.diff(distance) < 1e-6))
    return Kpoints(f"{JUMPS} {jumps}", len(distance), Kpoints.supported_modes.Reciprocal, path["kpoints"], kpts_weights=[1] * len(distance),
                   labels=names)


def input_set(cell, step, potcar=None, functional="PBE", **incar):
    """pymatgen input set of relax | static | bands (seekpath path) | dos (denser mesh, tetrahedra), of the standard primitive cell.

    potcar: {element: dataset} that replace the MPRelaxSet's. VaspError for an unknown step or an element without a dataset.
    """
    from pymatgen.core import Lattice, Structure
    from pymatgen.io.vasp import Kpoints
    from pymatgen.io.vasp.sets import MPNonSCFSet, MPRelaxSet, MPStaticSet
    if step not in STEPS:
        raise VaspError(f"unknown step {step!r}: expected {', '.join(STEPS)}")
    known = {**MPRelaxSet.CONFIG["POTCAR"], **(potcar or {})}
    if missing := sorted(set(cell[1]) - set(known)):
        raise VaspError(f"no POTCAR dataset for {', '.join(missing)} in MPRelaxSet; name one in `potcar`")
    cell, path = dft.band_path(cell, PATH_POINTS)              # one cell for all steps: CHGCAR goes from one to the next
    kpoints = _path(path) if step == "bands" else Kpoints.gamma_automatic(mesh(cell, DOS_KPPRA if step == "dos" else KPPRA))
    make = {"relax": MPRelaxSet, "static": MPStaticSet}.get(step, MPNonSCFSet)
    mode = {"bands": {"mode": "line"}, "dos": {"mode": "uniform"}}.get(step, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                        # pymatgen's advice on Yb_2: said above
        return make(Structure(Lattice.from_parameters(*cell[0]), cell[1], cell[2]), user_incar_settings=INCAR | incar, inherit_incar=False,
                    user_kpoints_settings=kpoints, user_potcar_settings=potcar or {}, user_potcar_functional=functional, **mode)


def write_inputs(cell, folder, step, previous=None, potcar=None, functional="PBE"):
    """INCAR, KPOINTS, POSCAR, and POTCAR where PMG_VASP_PSP_DIR is configured, else POTCAR.spec with the names of the datasets.

    previous: folder of the finished static run, for bands and dos: its CHGCAR is copied, and half as many bands are added.
    Returns {"step", "kpoints", "potcar": {element: dataset}, "functional", "licensed"}. VaspError as input_set, for a `previous`
    without CHGCAR or a readable vasprun.xml, and for a dataset that the configured folder lacks.
    """
    import shutil

    from pymatgen.core import SETTINGS
    folder, licensed, incar = Path(folder), bool(SETTINGS.get("PMG_VASP_PSP_DIR")), {}
    if previous and not (charge := Path(previous) / "CHGCAR").exists():
        raise VaspError(f"{charge}: missing; the static run must be finished first")
    if previous:
        incar["NBANDS"] = int(np.ceil(EMPTY * _vasprun(_file(previous)).parameters["NBANDS"]))
    inputs = input_set(cell, step, potcar, functional, **incar)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs.write_input(str(folder), potcar_spec=not licensed)
    except (OSError, ValueError, KeyError) as error:
        raise VaspError(f"{folder}: inputs not written: {error}") from error
    if previous:
        shutil.copy(charge, folder / "CHGCAR")
    names = dict(zip(inputs.poscar.site_symbols, inputs.potcar_symbols))
    return {"step": step, "kpoints": [int(n) for n in inputs.kpoints.kpts[0]] if step != "bands" else len(inputs.kpoints.kpts),
            "potcar": names, "functional": functional, "licensed": licensed}


# ---- finished runs ------------------------------------------------------------------------------

def _file(place):
    """vasprun.xml or vasprun.xml.gz of a folder, or the file itself; None where there is neither."""
    place = Path(place)
    return place if place.is_file() else next((f for f in sorted(place.glob("vasprun.xml*")) if f.suffix in (".xml", ".gz")), None)


def _vasprun(path):
    from pymatgen.io.vasp import Vasprun
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                    # "not converged" becomes the status
            run = Vasprun(str(path), parse_potcar_file=False)
            run.final_energy, run.eigenvalues, run.final_structure                         # noqa: B018 - absent in a broken run
            return run
    except SyntaxError as error:                               # of lxml and of ElementTree alike
        raise VaspError(f"{path}: cut short or no XML ({error})") from error
    except (OSError, EOFError, KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise VaspError(f"{path}: no finished calculation in it ({type(error).__name__}: {error})") from error


def _state(run):
    """ok | not converged; an ionic loop counts only where ions move."""
    return "ok" if run.converged_electronic and (run.parameters.get("NSW", 0) < 2 or run.converged_ionic) else "not converged"


def _labels(path, count):
    """(names, jumps) of `count` k-points by KPOINTS beside a vasprun.xml: "" where a point has no name; indices after which the
    path jumps, None where the file does not say. None when it is no path.
    """
    from pymatgen.io.vasp import Kpoints
    file = next(iter(sorted(path.parent.glob("KPOINTS*"))), None)
    points = Kpoints.from_file(str(file)) if file else None
    if points is None or not any(points.labels or []):
        return None
    names = [str(n or "").strip().lstrip("\\") for n in points.labels]
    _, said, after = points.comment.partition(JUMPS)
    jumps = [int(n) - 1 for n in after.split()] if said else None
    if points.style == Kpoints.supported_modes.Line_mode:      # two names a segment, so many points in between
        names = [names[2 * (i // points.num_kpts) + (i % points.num_kpts > 0)] if i % points.num_kpts in (0, points.num_kpts - 1) else ""
                 for i in range(count)]
        jumps = list(range(points.num_kpts - 1, count - 1, points.num_kpts))
    return (names, jumps) if len(names) == count else None


def _jumps(names, step):
    """Indices of the steps (K - 1,) that are jumps: between names, and longer than any within a segment.

    seekpath puts max(2, whole part of length / spacing) points on a segment: they lie up to three spacings apart.
    """
    return [i for i, (a, b) in enumerate(zip(names, names[1:])) if a and b and step[i] > 3 * np.median(step)]


def _bands(run, path, efermi):
    """Bands along a path in the common format, or None when the k-points are no path. Distances in 1/angstrom, with 2 pi."""
    k = np.asarray(run.actual_kpoints, float)
    found = _labels(path, len(k))
    if found is None:
        return None
    names, jumps = found
    step = np.linalg.norm(np.diff(k @ run.final_structure.lattice.reciprocal_lattice.matrix, axis=0), axis=1)
    step[_jumps(names, step) if jumps is None else jumps] = 0
    distance = np.concatenate([[0], np.cumsum(step)])
    zero = np.isclose(k, 0).all(1)                             # tI2 has a point G elsewhere
    labels = dft.joined_labels(distance, ["Γ" if name.upper() == "GAMMA" or (name.upper() == "G" and at) else name
                                          for name, at in zip(names, zero)])
    return {"distance": distance, "energies": _levels(run, efermi), "labels": labels, "kpoints": k}


def _xc(run):
    """The functional that ran, +U and +SOC said: comparisons at "PBE" must not mix them in."""
    tag = str(run.parameters.get("GGA", "--")).strip().upper()
    tag = tag if tag.strip("-") else "PE" if all("PBE" in name for name in run.potcar_symbols) else "none"   # the datasets decide
    base = {"PE": "PBE", "PS": "PBEsol", "RP": "RPBE"}.get(tag, f"GGA={tag}")
    hybrid = "HSE " if run.parameters.get("LHFCALC") else ""
    return hybrid + base + ("+U" if run.is_hubbard else "") + ("+SOC" if run.parameters.get("LSORBIT") else "")


def _settings(run):
    p = run.parameters
    return {"cutoff": float(p.get("ENCUT", p.get("ENMAX", np.nan))), "kpts": np.asarray(run.kpoints.kpts).tolist()[:1],
            "datasets": list(run.potcar_symbols), "spins": int(p.get("ISPIN", 1)), "smearing": [p.get("ISMEAR"), p.get("SIGMA")],
            "version": run.vasp_version, "zero": "Fermi level of the static run"}


def read_run(place, name=None):
    """A finished run in the result format of dft.run (engine "vasp"; energies in eV relative to the Fermi level, gap of a metal 0).

    place: a vasprun.xml(.gz), its folder, a folder with the subfolders relax, static, bands, dos, or {step: folder}. Energy, cell
    and Fermi level are of the static run (else of the relaxation); the gap is searched on its mesh and along the path. A step that
    is cut short or does not converge is named in `status`. VaspError when no vasprun.xml is there at all.
    """
    folders = place if isinstance(place, dict) else {s: Path(place) / s for s in STEPS if (Path(place) / s).is_dir()} or {"static": place}
    files = {s: file for s, f in folders.items() if (file := _file(f))}
    if not files:
        raise VaspError(f"{place}: no vasprun.xml in it or in its subfolders {', '.join(STEPS)}")
    runs, states = {}, {s: f"failed: no vasprun.xml in {f}" for s, f in folders.items() if s not in files}
    for step, file in files.items():
        try:
            runs[step] = _vasprun(file)
            states[step] = _state(runs[step])
        except VaspError as error:
            states[step] = f"failed: {error}"
    bad = next((states[s] for s in STEPS if states.get(s, "ok") != "ok"), "ok")
    out = dict.fromkeys(("xc", "energy_per_atom", "cell", "efermi", "gap", "bands", "dos"))
    out |= {"engine": "vasp", "name": name, "status": bad, "steps": states, "settings": {}}
    main = next((s for s in ("static", "relax") if s in runs), None)
    return out | _result(runs, files, main, name) if main else out


def _result(runs, files, main, name):
    run, path, s = runs[main], runs.get("bands", runs[main]), runs[main].final_structure
    efermi, electrons = float(run.calculate_efermi()), float(run.parameters["NELECT"])    # middle of the gap; VASP's may touch an edge
    bands = _bands(path, files["bands" if "bands" in runs else main], efermi)
    levels, points = _levels(run, efermi), np.asarray(run.actual_kpoints, float)
    if bands and path is not run:
        few = min(levels.shape[2], bands["energies"].shape[2])
        levels = np.concatenate([levels[..., :few], bands["energies"][..., :few]], 1)
        points = np.concatenate([points, bands["kpoints"]])
    moment, enough = _moment(run), bool((levels[..., -1] > 0).all())                      # without an empty band there is no gap to find
    gap = dft.gaps(levels, points, electrons * (2 if _spinors(run) else 1), moment > MAGNETIC) if enough else None
    return {"name": name or s.composition.reduced_formula, "xc": _xc(run), "energy_per_atom": float(run.final_energy) / len(s),
            "cell": (list(s.lattice.parameters), [x.symbol for x in s.species], np.round(s.frac_coords, 8)), "efermi": efermi,
            "electrons": electrons, "moment": moment, "gap": gap,
            "bands": bands, "dos": _dos(runs.get("dos", run).tdos, efermi), "settings": _settings(run)}


def _spinors(run):
    """Do the bands hold one electron each, where dft.gaps counts two?"""
    return bool(run.parameters.get("LSORBIT") or run.parameters.get("LNONCOLLINEAR"))


def _spins(table):
    """Values of a table by spin, up first."""
    return [table[s] for s in sorted(table, key=lambda s: -s.value)]


def _levels(run, efermi):
    """(S, K, B) eigenvalues in eV relative to `efermi`."""
    return np.array(_spins(run.eigenvalues))[..., 0] - efermi


def _dos(table, efermi):
    return table and {"energies": np.asarray(table.energies) - efermi, "total": np.array(_spins(table.densities))}


def _moment(run):
    """Magnetic moment of the cell in Bohr magnetons, from the occupations (0 without spins)."""
    weights, filled = np.asarray(run.actual_kpoints_weights), np.array(_spins(run.eigenvalues))[..., 1].sum(2)
    counts = filled @ weights / weights.sum()
    return float(abs(counts[0] - counts[-1]))
