"""Machine-learned potentials behind one function: `get_calculator(name, device)` -> ASE calculator (eV, angstrom).

Weights come inside the package (SevenNet, CHGNet), from a local file, or from a hub. Local files lie in the folder named by
MEIDNET_POTENTIALS under the names of FILES. eSEN-30M-OAM, the potential of the paper, needs fairchem-core 1.10, which cannot
live beside the other packages: it runs as a worker in the Python named by MEIDNET_FAIRCHEM1_PYTHON (worker.py).
"""

import os
from pathlib import Path

import numpy as np
from ase.calculators.calculator import Calculator, all_changes

from .worker import WorkerCalculator

# name -> (what it was trained on, file of a local checkpoint or None when the weights come inside the package)
FILES = {"esen-30m-oam": ("OMat24, MPtrj, sAlex (PBE)", "esen_30m_oam.pt"), "uma": ("OMat24 task of UMA (PBE)", "uma-s-1p1.pt"),
         "mace-omat-0": ("OMat24 (PBE)", "mace-omat-0-medium.model"), "mace-mpa-0": ("MPtrj, sAlex (PBE)", "mace-mpa-0-medium.model"),
         "sevennet-l3i5": ("MPtrj (PBE)", None), "sevennet-0": ("MPtrj (PBE)", None),
         "chgnet": ("MPtrj (PBE), energies with MP2020 corrections", None)}
CORRECTED = ("chgnet",)                                # learnt energies that carry the MP2020 corrections already
PACKAGES = {"uma": "fairchem", "mace-omat-0": "mace", "mace-mpa-0": "mace", "chgnet": "chgnet"}      # eSEN's lives elsewhere; else sevenn
ORDER = tuple(FILES)                                   # `auto`: the first that needs no download; by Matbench Discovery F1


class PotentialError(RuntimeError):
    """A potential cannot be had; the message says what is missing and how to get it."""


def local_file(name, checkpoint=None):
    """Path of the local weights of a potential, or None. PotentialError when a named checkpoint does not exist."""
    if checkpoint:
        if not Path(checkpoint).exists():
            raise PotentialError(f"{name}: checkpoint {checkpoint} does not exist")
        return Path(checkpoint)
    folder, file = os.environ.get("MEIDNET_POTENTIALS"), FILES.get(name, (None, None))[1]
    path = Path(folder) / file if folder and file else None
    return path if path and path.exists() else None


def present(name):
    """Can this potential be used without a download: are its package and its weights here?"""
    from importlib.util import find_spec
    if name == "esen-30m-oam":
        able = bool(os.environ.get("MEIDNET_FAIRCHEM1_PYTHON"))
    else:
        able = find_spec(PACKAGES.get(name, "sevenn")) is not None
    return able and (FILES[name][1] is None or local_file(name) is not None)


def pick(name="auto"):
    """The potential that `auto` stands for on this machine; any other name is returned when it is known."""
    if name != "auto":
        if name not in FILES:
            raise PotentialError(f"unknown potential {name!r}: expected auto, {', '.join(FILES)}")
        return name
    return next(n for n in ORDER if present(n))


def get_calculator(name="auto", device="auto", checkpoint=None):
    """ASE calculator of a potential of FILES, or of the best one that is present (`auto`, which prints its choice).

    device: auto | cpu | cuda. checkpoint: path of local weights, else MEIDNET_POTENTIALS, else the hub. PotentialError when
    neither weights nor packages can be had.
    """
    chosen, device = pick(name), find_device(device)
    if name == "auto":
        print(f"potential: {chosen} (trained on {FILES[chosen][0]}), on {device}")
    build = {"esen-30m-oam": _esen, "uma": _uma, "mace-omat-0": _mace, "mace-mpa-0": _mace, "chgnet": _chgnet}.get(chosen, _sevennet)
    path = local_file(chosen, checkpoint)
    try:
        return build(chosen, device, path)
    except PotentialError:
        raise
    except Exception as error:                         # each package fails in its own way when weights or network are missing
        others = ", ".join(n for n in FILES if n != chosen and present(n))
        raise PotentialError(f"{chosen}: {_reason(chosen, path, error)}, or choose one of {others}, which need no download.") from error


def _reason(name, path, error):
    """What is missing and what helps."""
    if isinstance(error, ImportError):
        return f"the package {error.name or name} cannot be imported ({error}). Install it"
    file = FILES[name][1]
    place = f"({file} in MEIDNET_POTENTIALS={os.environ.get('MEIDNET_POTENTIALS')})"
    where = f"local file {path}" if path else f"no local file {place}" if file else "the weights inside its package"
    return f"{where}; {type(error).__name__}: {error}. {'Copy the checkpoint there' if path or file else 'Install the package again'}"


def find_device(device):
    """auto | cpu | cuda -> cpu | cuda."""
    import torch
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _sevennet(name, device, path):
    import warnings

    from sevenn.calculator import SevenNetCalculator
    model = str(path) if path else {"sevennet-0": "7net-0", "sevennet-l3i5": "7net-l3i5"}[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No tensor product accelerator")      # of a GPU; it would stand in the chapters, with its path
        return SevenNetCalculator(model, device=device)


def _chgnet(name, device, path):
    import contextlib
    import io

    from chgnet.model import CHGNet
    from chgnet.model.dynamics import CHGNetCalculator
    with contextlib.redirect_stdout(io.StringIO()):    # it announces its version
        model = CHGNet.from_file(str(path)) if path else CHGNet.load(verbose=False)
        return CHGNetCalculator(model, use_device=device, check_cuda_mem=False)


def _mace(name, device, path):
    from mace.calculators import mace_mp
    return mace_mp(model=str(path) if path else {"mace-omat-0": "medium-omat-0", "mace-mpa-0": "medium-mpa-0"}[name],
                   default_dtype="float64", device=device)


def _uma(name, device, path):
    try:
        from fairchem.core import FAIRChemCalculator, pretrained_mlip
    except ImportError as error:
        raise PotentialError("uma: fairchem-core is not installed; run `make fairchem`") from error
    load, what = (pretrained_mlip.load_predict_unit, str(path)) if path else (pretrained_mlip.get_predict_unit, "uma-s-1p1")
    unit = load(what, device=device)
    return FAIRChemCalculator(unit, task_name="omat")


ESEN = """
from fairchem.core import OCPCalculator
def make(path, device):
    where = {"checkpoint_path": path} if path else {"model_name": "eSEN-30M-OAM", "local_cache": "."}
    return OCPCalculator(cpu=device == "cpu", **where)
"""


def _esen(name, device, path):
    python = os.environ.get("MEIDNET_FAIRCHEM1_PYTHON")
    if not python:
        raise PotentialError("esen-30m-oam: set MEIDNET_FAIRCHEM1_PYTHON to the Python of an environment with fairchem-core==1.10.0 (it "
                             "wants torch 2.4 and numpy < 2), and put esen_30m_oam.pt into MEIDNET_POTENTIALS or log in to the hub there")
    return WorkerCalculator(python, ESEN, str(path) if path else None, device)


class Pressed(Calculator):
    """Another calculator under hydrostatic pressure (eV/angstrom^3): its energy is the enthalpy E + pV, its stress that of the enthalpy.

    Whatever minimises an energy over atoms and cell then finds the crystal at this pressure.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, calculator, pressure):
        super().__init__()
        self.calculator, self.pressure = calculator, pressure
        self.process = getattr(calculator, "process", None)            # by which relax.passing sees a dead worker

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        inner = self.atoms.copy()
        inner.calc = self.calculator
        enthalpy = float(inner.get_potential_energy()) + self.pressure * inner.get_volume()
        stress = inner.get_stress() + self.pressure * np.array([1, 1, 1, 0, 0, 0])
        self.results = {"energy": enthalpy, "free_energy": enthalpy, "forces": inner.get_forces(), "stress": stress}


def held_at(atoms, calculator):
    """The calculator under the pressure at which the cell of these cubic `atoms` is in equilibrium: potentials trained on PBE make
    oxides a per cent too long, which is enough for a polar mode (SrTiO3)."""
    atoms = atoms.copy()
    atoms.calc = calculator
    return Pressed(calculator, -float(np.mean(atoms.get_stress()[:3])))
