"""Electronic structure with GPAW: lattice constant, bands, density of states, gaps; PBE, and GLLB-SC as the labels of Perov-5.

    python -m meidnet_core.dft figure4 --profile paper         # Figures 4, S5, S6; also tables1, divalent, trivalent, repaired

GPAW runs in processes of its own under MPI (gpaw_job.py), each step once: a killed run goes on with the next step. It is built
by `make dft`; without it, what is stored in data/dft can be read. One JSON and one compressed array file a material and profile.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .dft_store import ARRAYS, STORE, DFTError, check_same, load, save
from .gpaw_job import read
from .results import ROOT, _write_atomic

CUBE = 5.2                     # angstrom, cubic cell for which the meshes of the profiles are meant
WORK = ROOT / "runs" / "dft"


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on. cutoff (eV), meshes with Gamma, Fermi smearing (eV), points along the band path."""

    cutoff: float
    kpts: tuple
    dos_kpts: tuple
    smearing: float
    path_points: int
    maxiter: int = 150
    gamma: bool = True


PROFILES = {"quick": Settings(350, (4, 4, 4), (4, 4, 4), 0.05, 60), "paper": Settings(520, (6, 6, 6), (8, 8, 8), 0.05, 80),
            "oxide": Settings(520, (4, 4, 4), (4, 4, 4), 0.05, 60),         # `quick` with a cutoff that oxygen needs
            "gllbsc": Settings(550, (6, 6, 6), (7, 7, 7), 0.01, 0)}     # holds R, as `quick` does (no DOS); labels: gllbsc.recipe
PBE_PROFILES = tuple(p for p in PROFILES if p != "gllbsc")
STEPS = {"pbe": ("eos", "scf", "bands", "dos"), "polymorph": ("scf", "basis", "bands", "dos"), "waves": ("scf", "bands", "dos"),
         "static": ("scf",), "phase": ("scf",), "sized": ("eos", "scf"), "relax": ("relax",), "gllbsc": ("gllbsc",)}
BASIS = "dzp"                  # atomic orbitals for bands and density of states of polymorphs: along a path, plane waves take much longer

# Lanthanides with the 4f shell in the core, generated on first use: the valence 4f of PBE pins the Fermi level. 3p: trivalent; 2p:
# divalent (of ytterbium the analogue of VASP's Yb_2), whose 5d is not bound. (configuration, d projectors)
FROZEN_4F = {("Yb", "3p"): ("[Xe]6s2,5d1,4f13", "5d,d"), ("Tm", "3p"): ("[Xe]6s2,5d1,4f12", "5d,d"),
             ("Yb", "2p"): ("[Xe]6s2,5d0,4f14", "d,d"), ("Eu", "2p"): ("[Xe]6s2,5d0,4f7", "d,d"), ("Eu", "3p"): ("[Xe]6s2,5d1,4f6", "5d,d")}
VALENCE = {"2p": "divalent", "3p": "trivalent"}                        # tag of a setup: how a result that asks for it is called
CORE_4F = {"Yb": "3p", "Tm": "3p"}                                     # unless a run says otherwise; europium's 4f stays in the valence
MOMENTS = {"Mn": 4.0, "Fe": 4.0, "Co": 3.0, "Eu": 7.0}                 # Bohr magnetons to start from; other elements 0


# ---- GPAW and its setups ------------------------------------------------------------------------

def available():
    """Is GPAW installed, with its setups and an MPI launcher?"""
    import importlib.util
    return all(map(importlib.util.find_spec, ("gpaw", "gpaw_data"))) and shutil.which("mpirun") is not None


def setup_folder():
    from .sources import cache_dir
    return cache_dir() / "gpaw-setups"


def setups_for(symbols, xc):
    """{symbol: tag} of setups that are not the default; DFTError naming the elements for which there is no setup at all."""
    if not available():
        raise DFTError("GPAW is not installed here: run `make dft` (needs Debian's libxc, OpenBLAS, FFTW and Open MPI)")
    folder, tags = Path(_standard_setups()[0]), {}
    have = lambda e: any((folder / f"{e}.{xc}{end}").exists() for end in ("", ".gz"))
    for e in sorted(set(symbols)):
        if xc == "PBE" and e in CORE_4F:
            tags[e] = frozen_4f(e, CORE_4F[e])
        elif not have(e):
            raise DFTError(f"no {xc} setup for {e}: gpaw-data has none")
    return tags


def frozen_4f(symbol, tag):
    """Tag of the setup of a lanthanide with 4f in the core; generated (ten seconds) unless it is in the cache."""
    folder = setup_folder()
    if not (folder / f"{symbol}.{tag}.PBE").exists():
        folder.mkdir(parents=True, exist_ok=True)
        configuration, d = FROZEN_4F[symbol, tag]
        words = [str(Path(sys.executable).with_name("gpaw")), "dataset", symbol, "-f", "PBE", "-C", configuration,
                 "-P", f"5s,6s,5p,6p,{d},f,G", "-r", "2.4", "-z", "poly,4", "-t", tag, "-s", "-w", "-b"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if not (folder / f"{symbol}.{tag}.PBE").exists():
            raise DFTError(f"{symbol}: the 4f-core setup was not made: {done.stderr[-300:] or done.stdout[-300:]}")
    return tag


# ---- one material -------------------------------------------------------------------------------

def band_path(cell, points):
    """seekpath's standard primitive cell and its k-path: (cell, {"kpoints" (K, 3) fractional, "distance" (K,), "labels"}).

    labels: [(distance, name)], two at a jump joined by "|".
    """
    import seekpath
    from ase.data import chemical_symbols
    from ase.geometry import cell_to_cellpar

    from .relax import SYMMETRY, to_atoms
    atoms = to_atoms(cell)
    entry = (atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers)
    length = seekpath.get_explicit_k_path(entry, reference_distance=0.1, symprec=SYMMETRY)["explicit_kpoints_linearcoord"][-1]
    found = seekpath.get_explicit_k_path(entry, reference_distance=length / max(points, 2), symprec=SYMMETRY)
    primitive = (cell_to_cellpar(found["primitive_lattice"]), [chemical_symbols[z] for z in found["primitive_types"]],
                 np.asarray(found["primitive_positions"]))
    distance = found["explicit_kpoints_linearcoord"]
    labels = joined_labels(distance, [{"GAMMA": "Γ"}.get(name, name) for name in found["explicit_kpoints_labels"]])
    return primitive, {"kpoints": np.round(found["explicit_kpoints_rel"], 8).tolist(), "distance": distance.tolist(), "labels": labels}


def joined_labels(distance, names):
    """[(distance, name)] of the named points of a path; two names at one distance, where the path jumps, are joined by "|"."""
    labels = []
    for x, name in zip(distance, names):
        if name and labels and abs(labels[-1][0] - x) < 1e-6:
            labels[-1] = (float(x), labels[-1][1] + ("" if labels[-1][1] == name else f"|{name}"))
        elif name:
            labels.append((float(x), name))
    return labels


def prepare(cell, settings, kind="pbe", moments=True, setups=None):
    """The job of gpaw_job.run for a cell; `setups` overrides {symbol: tag}. moments: start from MOMENTS (an atom with 4f in the core
    from none), from these (N,) Bohr magnetons (not along a path, where sites may change), or, False, without spin."""
    given = None if isinstance(moments, bool) else [float(m) for m in moments]
    if given and ("bands" in STEPS[kind] or len(given) != len(cell[1])):
        raise DFTError(f"{len(given)} moments for {len(cell[1])} sites of a {kind}: one a site, and no bands")
    along = settings.path_points and "bands" in STEPS[kind]
    cell, path = band_path(cell, settings.path_points) if along else (cell, None)
    other = kind in ("pbe", "static") and len(cell[1]) != 5                          # than what the meshes of a profile are for
    settings = for_cell(settings, cell[0]) if other or kind in ("polymorph", "waves", "phase", "sized") else settings
    xc = "GLLBSC" if kind == "gllbsc" else "PBE"
    tags = setups_for(cell[1], xc) | {e: t for e, t in (setups or {}).items() if e in cell[1]}
    usual = lambda e: 0.0 if (e, tags.get(e)) in FROZEN_4F else MOMENTS.get(e, 0.0)
    magmoms = given or ([usual(e) for e in cell[1]] if moments is True else [])
    return {"cell": [np.asarray(cell[0]).tolist(), list(cell[1]), np.asarray(cell[2]).tolist()], "settings": asdict(settings), "xc": xc,
            "path": path, "steps": STEPS[kind], "magmoms": magmoms if any(magmoms) else [],
            "setups": tags, **({"basis": BASIS} if "basis" in STEPS[kind] else {})}


def for_cell(settings, lattice):
    """Settings whose meshes, meant for a cubic cell of CUBE angstrom, are as dense in a cell whose lattice planes lie otherwise."""
    from ase.geometry import cellpar_to_cell
    scale = CUBE * np.linalg.norm(np.linalg.inv(cellpar_to_cell(lattice)), axis=0)
    mesh = lambda n: tuple(int(k) for k in np.maximum(1, np.ceil(np.array(n) * scale - 0.2)))
    return replace(settings, kpts=mesh(settings.kpts), dos_kpts=mesh(settings.dos_kpts))


def execute(job, folder, ranks=2, timeout=None):
    """Run the steps of a job that are missing under MPI; DFTError when another job is in the folder or GPAW dies."""
    folder = Path(folder).resolve()                                      # GPAW's process starts elsewhere
    folder.mkdir(parents=True, exist_ok=True)
    text, path = json.dumps(job, sort_keys=True), folder / "job.json"
    if path.exists() and path.read_text() != text:
        raise DFTError(f"{folder}: holds another calculation; delete it or choose another folder")
    _write_atomic(path, text)
    words = [sys.executable, "-m", "meidnet_core.gpaw_job", str(folder)]
    if ranks > 1:
        words = ["mpirun", "--bind-to", "none", "--oversubscribe", "-np", str(ranks), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                                "GPAW_SETUP_PATH": os.pathsep.join([str(setup_folder()), *_standard_setups()])}
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
    if done.returncode:
        raise DFTError(f"GPAW ended with {done.returncode} in {folder}: {(done.stderr or done.stdout)[-600:]}")


def _standard_setups():
    import gpaw_data
    return [str(Path(gpaw_data.__file__).parent / "setups")]


def gaps(energies, kpoints, electrons, magnetic=False, counts=None):
    """Gaps of eigenvalues (S, K, B) in eV relative to the Fermi level, of a cell with so many electrons.

    counts: valence bands of each spin of a magnetic cell, where the Fermi level is that of other levels than these.

    indirect, direct (eV, 0 for a metal), overlap = lowest level above the valence bands minus their top (eV, negative: they overlap),
    metal, and the k-points. Bands are counted, in a magnetic cell by the Fermi level. An odd number of electrons without magnetism
    leaves a hole in the valence bands: a metal, whatever the overlap. window, window_at: see `window`.
    """
    e, k, odd = np.asarray(energies), np.asarray(kpoints), round(electrons) % 2 == 1 and not magnetic
    below = (e < 0).sum(2) if counts is None else np.array(counts)[:, None]        # (S, K) or (S, 1)
    count = [round(n.mean()) for n in below] if magnetic else [(round(electrons) + 1) // 2]
    tops, bottoms = (np.array([s[:, c + shift] for s, c in zip(e, count)]) for shift in (-1, 0))
    top, bottom, vertical = tops.max(0), bottoms.min(0), (bottoms - tops).min(0)
    v, c, d = top.argmax(), bottom.argmin(), vertical.argmin()
    overlap = float(bottom[c] - top[v])
    metal = bool(overlap <= 0 or odd or (magnetic and (below != below[:, :1]).any()))
    return {"indirect": 0.0 if metal else overlap, "direct": 0.0 if metal else float(vertical[d]), "overlap": overlap, "metal": metal,
            "vbm_k": k[v].tolist(), "cbm_k": k[c].tolist(), "direct_k": k[d].tolist(), **window(e)}


def valence_bands(energies):
    """[bands below the Fermi level at every k-point] of each spin, of eigenvalues (S, K, B); None in a metal, whose number changes."""
    below = (np.asarray(energies) < 0).sum(2)
    return below[:, 0].tolist() if (below == below[:, :1]).all() else None


def window(energies, within=2.0):
    """Widest window without levels of either spin whose middle lies within so many eV of the Fermi level, of eigenvalues (S, K, B) in eV.

    {"window": its width, 0 when there is none, "window_at": its middle, None then}: the gap that a metal would have if doping or a
    defect moved the Fermi level there, as Table S2 gives it for metals.
    """
    low, high = np.min(energies, 1).ravel(), np.max(energies, 1).ravel()                     # of every band
    order = np.argsort(low)
    low, high = low[order], np.maximum.accumulate(high[order])
    found = [(float(b - a), float(a + b) / 2) for a, b in zip(high[:-1], low[1:]) if b > a and abs(a + b) / 2 <= within]
    width, middle = max(found, default=(0.0, None))
    return {"window": width, "window_at": middle}


def collect(name, job, folder, profile):
    """One plain dict of everything that came out; status of the first step without a result, else ok."""
    steps = {s: read(Path(folder), s) for s in job["steps"]}
    bad = next((f"{s}: {r['status'] if r else 'not run'}" for s, r in steps.items() if not r or r["status"] != "ok"), None)
    done = {s: r for s, r in steps.items() if r and r["status"] == "ok"}
    out = {"engine": "gpaw", "name": name, "profile": profile, "status": bad or "ok", "cell": job["cell"], "bands": None, "dos": None,
           "seconds": sum(r["seconds"] for r in steps.values() if r), **{k: job[k] for k in ("xc", "settings", "setups")}}
    if "eos" in done:
        out["eos"] = done["eos"]
    if "gllbsc" in done:
        out["gllbsc"] = done["gllbsc"]
    if "scf" in done:
        s = done["scf"]
        out |= {k: s[k] for k in ("energy_per_atom", "efermi", "moment", "electrons")} | {"cell": [s["lattice"], s["symbols"], s["frac"]]}
        levels, points, magnetic = np.array(s["energies"]), np.array(s["kpoints"]), bool(job["magmoms"])
        if "bands" in done:
            out |= {s: {k: np.array(v) if k in ("energies", "distance", "kpoints", "total") else v for k, v in done[s].items()}
                    for s in ARRAYS if s in done}
            b = out["bands"]
            if "basis" in done:                                       # two kinds of levels: each has a gap of its own
                out |= {"basis": {"name": job["basis"], **done["basis"]},
                        "path_gap": gaps(b["energies"], b["kpoints"], s["electrons"], magnetic, valence_bands(levels))}
            else:
                few = min(levels.shape[2], b["energies"].shape[2])
                levels, points = np.concatenate([levels[..., :few], b["energies"][..., :few]], 1), np.concatenate([points, b["kpoints"]])
        out["gap"] = gaps(levels, points, s["electrons"], magnetic)
    return out


def run(name, cell, profile="quick", kind="pbe", ranks=2, store=None, timeout=None, moments=True, setups=None):
    """Calculate a cell (lattice (6,), symbols, frac), or read the stored result of this name and profile. Returns collect's dict.

    DFTError when the stored result answers another question: another crystal (other elements, or a volume per atom that differs by a
    fifth; by a hundredth where there is no equation of state), other settings, setups or steps.
    """
    store = Path(store or STORE)
    found = load(name, profile, store)
    if found and found["status"] == "ok":
        check_same(found["cell"], cell, name, 0.2 if "eos" in STEPS[kind] else 0.01)
        if not _answers(found, PROFILES[profile], kind, CORE_4F | (setups or {})):
            raise DFTError(f"{name}: the stored result has other settings, setups or steps than {profile}, {kind}, {setups or {}}; "
                           "delete it or choose another name")
        return found
    job, folder = prepare(cell, PROFILES[profile], kind, moments, setups), WORK / f"{name}-{profile}"
    try:
        execute(job, folder, ranks, timeout)
    except subprocess.TimeoutExpired:
        pass                                                          # the missing step says so in the status
    out = collect(name, job, folder, profile)
    save(out, store)
    if out["status"] == "ok":
        (folder / "scf.gpw").unlink(missing_ok=True)
    return out


def _answers(found, settings, kind, setups):
    """Was a stored result calculated as asked? Meshes may differ, they follow the cell; steps beyond those of the kind do no harm."""
    plain = lambda s: {k: v for k, v in s.items() if "kpts" not in k}
    cores = {e: setups.get(e) for e in found["cell"][1] if e in {e for e, _ in FROZEN_4F} | set(setups)}
    steps = ("basis" in found) == ("basis" in STEPS[kind]) and all(found.get(s) for s in STEPS[kind] if s in ("eos", *ARRAYS))
    return steps and plain(found["settings"]) == plain(asdict(settings)) and all(found["setups"].get(e) == t for e, t in cores.items())


# ---- the materials of the paper -----------------------------------------------------------------

FIGURE4 = ("KTaSe3", "BaHfSe3", "LaScSe3", "YbScSe3", "LaBiTe3", "YbMnSe3", "TmMnSe3", "YbFeSe3", "YbCoSe3")
CONVERGED = (*FIGURE4, "YbTaO3-divalent")        # also in `paper`: what the cheaper settings cost
DIVALENT = ("YbScSe3", "YbYSe3", "YbFeSe3", "YbCoSe3", "YbMnSe3", "YbTaO3", "EuTaO3")        # with Yb or Eu 2+ as well: dft_hull.py
TRIVALENT = ("EuCoO3",)                                                  # with Eu 3+, 4f in the core
REST = ("RbTaSe3", "RbNbSe3", "NaTaSe3", "YbYSe3", "KSnI3", "CsPbI3", "BaZrTe3", "YbTaO3", "EuTaO3", "EuCoO3")   # of Table S1


def cubic_start(formula, potential="sevennet-0"):
    """Cubic cell at the lattice constant of the potential (Table S1): the equation of state starts there. FileNotFoundError without it."""
    from . import crystal, hull, results
    path = results.RESULTS / "table-s1" / f"{potential}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: run `python -m meidnet_core.table_s1 paper --potential {potential}` first")
    m = json.loads(path.read_text())["metrics"]
    a, b, x = hull.sites_in(formula)
    return [*3 * [m[f"{formula}_ideal_a"]], 90, 90, 90], [a, b, x, x, x], crystal.PEROVSKITE


def polymorph(formula, potential="sevennet-0", seed=0):
    """Cell of a repaired polymorph of data/polymorphs; DFTError when the search found none."""
    path = ROOT / "data" / "polymorphs" / f"{formula}-{potential}-seed{seed}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if not found.get("lattice"):
        raise DFTError(f"{path}: no polymorph; run `python -m meidnet_core.repair {formula}`")
    return found["lattice"], found["symbols"], found["frac"]


def asked_for(args):
    """(name, cell, kind, setups), as `run` takes them, of each calculation of a command line."""
    asked = "divalent" if args.divalent else args.what
    tag = next((t for t, valence in VALENCE.items() if valence == asked), None)
    kind = "pbe" if args.what != "repaired" else "waves" if args.waves else "polymorph"
    end = {"pbe": "", "polymorph": "-polymorph", "waves": "-polymorph-waves"}[kind] + (f"-{asked}" if tag else "")
    for f in args.materials or {"tables1": REST, "divalent": DIVALENT, "trivalent": TRIVALENT}.get(args.what, FIGURE4):
        cell = cubic_start(f) if kind == "pbe" else polymorph(f)
        yield f + end, cell, kind, {e: frozen_4f(e, tag) for e, t in FROZEN_4F if t == tag and e in cell[1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["figure4", "tables1", "repaired", "divalent", "trivalent"])
    parser.add_argument("--profile", choices=PBE_PROFILES, default="quick")
    parser.add_argument("--materials", nargs="*")
    parser.add_argument("--divalent", action="store_true", help="repaired: Yb 2+ (4f14 in the core), as <formula>-polymorph-divalent")
    parser.add_argument("--waves", action="store_true", help="repaired: plane waves along the path, too, as <formula>-polymorph-waves")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, help="seconds a material may take in this call; the next call goes on")
    args = parser.parse_args()
    if args.waves and args.divalent:
        parser.error("--waves and --divalent: no chapter reads that")
    for name, cell, kind, setups in asked_for(args):
        out = run(name, cell, args.profile, kind, args.ranks, timeout=args.timeout, setups=setups)
        print(name, out["status"], out.get("gap"), f"{out['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
