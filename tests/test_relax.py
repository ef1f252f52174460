"""Relaxation: a known minimum, labelled failures, resume after a kill. The potential is ASE's EMT or Lennard-Jones: seconds."""

import json

import numpy as np
import pytest
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

from meidnet_core import potentials, relax

COPPER = (np.array([3.8] * 3 + [90.0] * 3), ["Cu"] * 4, np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]))
SILVER = (np.array([4.3] * 3 + [90.0] * 3), ["Ag"] * 4, COPPER[2])


class Bad(Calculator):
    """Pushes the cell apart without end, or fails."""

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, how):
        super().__init__()
        self.how = how

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if self.how == "raises":
            raise RuntimeError("no parameters for Og")
        energy = np.nan if self.how == "nan" else -0.5 * atoms.get_volume()
        stress = np.array([-0.5] * 3 + [0.0] * 3)
        self.results = {"energy": energy, "free_energy": energy, "forces": np.zeros((len(atoms), 3)), "stress": stress}


@pytest.fixture
def emt(monkeypatch):
    monkeypatch.setattr(potentials, "get_calculator", lambda *args: EMT())


def test_copper_finds_its_lattice_constant():
    row = relax.relax(COPPER, EMT())
    assert row["status"] == "ok" and row["lattice"][:3] == pytest.approx([3.59] * 3, abs=0.02)
    assert row["energy_per_atom"] == pytest.approx(-0.007, abs=0.005) and len(row["frac"]) == 4
    rattled = relax.relax(COPPER, EMT(), "rattled")
    assert rattled["energy_per_atom"] == pytest.approx(row["energy_per_atom"], abs=1e-3)


def test_too_few_steps_are_labelled():
    row = relax.relax(COPPER, EMT(), "rattled", steps=1)
    assert row["status"] == "not converged" and row["energy_per_atom"] is not None


FAILURES = {"apart": "exploded", "nan": "exploded", "raises": "failed: RuntimeError: no parameters for Og"}


@pytest.mark.parametrize("how, status", FAILURES.items())
def test_a_bad_relaxation_is_a_row(how, status):
    row = relax.relax(COPPER, Bad(how))
    assert row["status"].startswith(status) and row["energy_per_atom"] is None and row["symbols"] == ["Cu"] * 4


def test_results_are_kept_in_order_and_not_asked_twice(emt, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    first = relax.relax_all([COPPER, SILVER], path, "sevennet-0", processes=1, progress=False)["ideal"]
    monkeypatch.setattr(potentials, "get_calculator", lambda *args: pytest.fail("asked again"))
    again = relax.relax_all([SILVER, COPPER, COPPER], path, "sevennet-0", processes=1, progress=False)["ideal"]
    assert [r["symbols"][0] for r in again] == ["Ag", "Cu", "Cu"] and again[1] == first[0]
    assert len(path.read_text().splitlines()) == 2


def test_another_start_or_potential_is_another_question():
    keys = {relax.key_of(c, s, p) for c in (COPPER, SILVER) for s in relax.STARTS for p in ("chgnet", "sevennet-0")}
    assert len(keys) == 8


def test_a_killed_screening_goes_on(emt, tmp_path, monkeypatch):
    path, original, calls = tmp_path / "rows.jsonl", relax.relax, []

    def killed(cell, *args):
        calls.append(cell)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(cell, *args)

    monkeypatch.setattr(relax, "relax", killed)
    with pytest.raises(KeyboardInterrupt):
        relax.relax_all([COPPER, SILVER], path, "sevennet-0", processes=1, progress=False)
    with open(path, "a") as file:
        file.write('{"key": "half a li')                             # as a kill in the middle of a write leaves it
    rows = relax.relax_all([COPPER, SILVER], path, "sevennet-0", processes=1, progress=False)["ideal"]
    assert [r["status"] for r in rows] == ["ok", "ok"] and len(calls) == 3
    whole = [line for line in path.read_text().splitlines() if "half" not in line]
    assert len(whole) == 2 and all(json.loads(line)["potential"] == "sevennet-0" for line in whole)
