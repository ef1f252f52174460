"""Potentials: names, what `auto` picks, clear errors when weights are missing, the worker in another Python."""

import importlib.util
import sys

import numpy as np
import pytest
from ase.build import bulk

from meidnet_core import potentials
from meidnet_core.potentials import PotentialError
from meidnet_core.worker import WorkerCalculator, WorkerError

EMT = "from ase.calculators.emt import EMT\ndef make(path, device):\n    print('noise')\n    return EMT()\n"


@pytest.fixture(autouse=True)
def nothing_local(monkeypatch):
    for name in ("MEIDNET_POTENTIALS", "MEIDNET_FAIRCHEM1_PYTHON"):
        monkeypatch.delenv(name, raising=False)


def test_auto_is_the_best_that_needs_no_download(monkeypatch, tmp_path):
    assert potentials.pick("auto") == "sevennet-l3i5"
    monkeypatch.setenv("MEIDNET_POTENTIALS", str(tmp_path))
    (tmp_path / "mace-omat-0-medium.model").touch()
    assert potentials.pick("auto") == "mace-omat-0"
    (tmp_path / "uma-s-1p1.pt").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fairchem" else "here")
    assert potentials.pick("auto") == "mace-omat-0", "UMA needs a package that is not installed"
    (tmp_path / "esen_30m_oam.pt").touch()
    assert potentials.pick("auto") == "mace-omat-0", "eSEN needs its own environment as well"
    monkeypatch.setenv("MEIDNET_FAIRCHEM1_PYTHON", sys.executable)
    assert potentials.pick("auto") == "esen-30m-oam"


def test_unknown_name_is_told_the_known_ones():
    with pytest.raises(PotentialError, match="expected auto, esen-30m-oam, uma, mace-omat-0"):
        potentials.get_calculator("esen")


def test_esen_says_what_it_needs():
    with pytest.raises(PotentialError, match="MEIDNET_FAIRCHEM1_PYTHON.*fairchem-core==1.10.0"):
        potentials.get_calculator("esen-30m-oam")


def test_a_named_checkpoint_must_exist(tmp_path):
    with pytest.raises(PotentialError, match="none.model does not exist"):
        potentials.get_calculator("mace-omat-0", checkpoint=tmp_path / "none.model")


def test_a_damaged_checkpoint_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MEIDNET_POTENTIALS", str(tmp_path))
    (tmp_path / "mace-mpa-0-medium.model").write_bytes(b"no model")
    with pytest.raises(PotentialError, match="mace-mpa-0-medium.model.*chgnet"):
        potentials.get_calculator("mace-mpa-0", "cpu")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "chgnet.model", None)           # as if it were not installed
    with pytest.raises(PotentialError, match="chgnet: the package chgnet.model cannot be imported") as error:
        potentials.get_calculator("chgnet", "cpu")
    assert "local file" not in str(error.value) and "choose one of sevennet-l3i5, sevennet-0, which" in str(error.value)


def test_weights_of_a_package_are_no_local_file(monkeypatch):
    def broken(name, device, path):
        raise RuntimeError("truncated")
    monkeypatch.setattr(potentials, "_chgnet", broken)
    with pytest.raises(PotentialError, match="inside its package; RuntimeError: truncated. Install the package again, or choose"):
        potentials.get_calculator("chgnet", "cpu")


def test_worker_agrees_with_the_calculator_it_hosts():
    from ase.calculators.emt import EMT
    here, there = bulk("Cu").repeat(2), bulk("Cu").repeat(2)
    here.rattle(0.05, seed=1)
    there.positions = here.positions
    here.calc, there.calc = EMT(), WorkerCalculator(sys.executable, EMT_SOURCE)
    assert there.get_potential_energy() == pytest.approx(here.get_potential_energy())
    assert there.get_forces() == pytest.approx(here.get_forces()) and there.get_stress() == pytest.approx(here.get_stress())


EMT_SOURCE = EMT


def test_worker_reports_why_it_cannot():
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        WorkerCalculator(sys.executable, "def make(path, device):\n    1 / 0\n")
    with pytest.raises(WorkerError, match="cannot be started"):
        WorkerCalculator("/no/such/python", EMT)
    atoms = bulk("Xe", "fcc", 5.0)                                   # EMT has no xenon: an answer, and the worker lives on
    atoms.calc = WorkerCalculator(sys.executable, EMT)
    with pytest.raises(WorkerError, match="No EMT-potential for Xe"):
        atoms.get_potential_energy()
    copper = bulk("Cu")
    copper.calc = atoms.calc
    assert np.isfinite(copper.get_potential_energy())


def test_a_dead_worker_is_told():
    atoms = bulk("Cu")
    atoms.calc = WorkerCalculator(sys.executable, EMT)
    atoms.calc.process.kill()
    atoms.calc.process.wait()
    with pytest.raises(WorkerError, match="gone|ended"):
        atoms.get_potential_energy()


def test_pressure_is_enthalpy_and_its_gradient():
    from ase.calculators.emt import EMT
    atoms = bulk("Cu", "fcc", a=3.5, cubic=True)
    atoms.rattle(0.05, seed=0)
    atoms.calc = EMT()
    energy, stress, forces = atoms.get_potential_energy(), atoms.get_stress(), atoms.get_forces()
    atoms.calc = potentials.Pressed(EMT(), 0.02)
    assert atoms.get_potential_energy() == pytest.approx(energy + 0.02 * atoms.get_volume())
    assert np.allclose(atoms.get_stress() - stress, 0.02 * np.array([1, 1, 1, 0, 0, 0])) and np.allclose(atoms.get_forces(), forces)
    enthalpy = {}
    for strain in (-1e-4, 1e-4):                                       # dH = V tr(stress) strain
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell * (1 + strain), scale_atoms=True)
        scaled.calc = potentials.Pressed(EMT(), 0.02)
        enthalpy[strain] = scaled.get_potential_energy()
    slope = (enthalpy[1e-4] - enthalpy[-1e-4]) / 2e-4
    assert slope == pytest.approx(atoms.get_volume() * atoms.get_stress()[:3].sum(), rel=1e-3)


def test_a_held_crystal_relaxes_to_the_cell_at_which_it_is_held():
    from ase.calculators.emt import EMT

    from meidnet_core import relax
    cell = ([3.5] * 3 + [90.0] * 3, ["Cu"] * 4, bulk("Cu", "fcc", a=3.5, cubic=True).get_scaled_positions())
    calculator = potentials.held_at(relax.to_atoms(cell), EMT())
    assert calculator.pressure > 0                                     # EMT's own constant is 3.59 angstrom
    away = ([3.6] * 3 + [90.0] * 3, *cell[1:])
    assert relax.relax(away, calculator, fmax=0.001)["lattice"][0] == pytest.approx(3.5, abs=0.002)
