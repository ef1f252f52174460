"""Relaxation: a known minimum, labelled failures, resume after a kill. The potential is ASE's EMT or Lennard-Jones: seconds."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

from meidnet_core import potentials, relax
from meidnet_core.worker import WorkerCalculator, WorkerError

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
        if isinstance(self.how, Exception):
            raise self.how
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


@pytest.mark.parametrize("lattice", [(4, 4, 4, 20, 20, 150), (0, 4, 4, 90, 90, 90)])
def test_a_cell_that_cannot_be_is_a_row(lattice):
    row = relax.relax((np.array(lattice, float), *COPPER[1:]), EMT(), "rattled")
    assert row["status"].startswith("failed") and row["energy_per_atom"] is None and row["symbols"] == ["Cu"] * 4


PASSING = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: launch failure"),
           WorkerError("OutOfMemoryError: CUDA out of memory")]


@pytest.mark.parametrize("error", PASSING, ids=lambda e: type(e).__name__)
def test_what_says_nothing_of_the_crystal_stops_and_leaves_no_row(tmp_path, monkeypatch, error):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(potentials, "get_calculator", lambda *args: Bad(error))
    with pytest.raises(type(error), match="No row is stored for CuCuCuCu"):
        relax.relax_all([COPPER], path, "sevennet-0", processes=1, progress=False, device="cpu")
    assert not relax.read_rows(path)
    monkeypatch.setattr(potentials, "get_calculator", lambda *args: EMT())
    assert relax.relax_all([COPPER], path, "sevennet-0", processes=1, progress=False, device="cpu")["ideal"][0]["status"] == "ok"


def test_a_worker_that_died_stops_one_that_refuses_is_a_row():
    worker = WorkerCalculator(sys.executable, "from ase.calculators.emt import EMT\ndef make(path, device):\n    return EMT()\n")
    refused = relax.relax((COPPER[0], ["Xe"] * 4, COPPER[2]), worker)
    assert refused["status"].startswith("failed: WorkerError: NotImplementedError")
    worker.process.kill()
    with pytest.raises(WorkerError, match="gone|ended"):
        relax.relax(COPPER, worker)


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


def test_another_checkpoint_is_another_question():
    key = lambda **o: relax.key_of(COPPER, "ideal", "sevennet-0", **o)
    assert key() == key(checkpoint=None) == "3ac12c0dcfceac3a", "names of stored rows stay valid"
    assert len({key(), key(checkpoint="a.pth"), key(checkpoint="b.pth")}) == 3


def test_weights_of_another_folder_are_another_question(emt, monkeypatch, tmp_path):
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "mace-omat-0-medium.model").touch()
        monkeypatch.setenv("MEIDNET_POTENTIALS", str(tmp_path / name))
        relax.relax_all([COPPER], tmp_path / "rows", "mace-omat-0", processes=1, device="cpu", progress=False)
    assert len(relax.read_rows(tmp_path / "rows")) == 2


def test_rows_of_another_checkpoint_are_not_taken(emt, tmp_path):
    for checkpoint in (None, "a.pth", "b.pth", "b.pth"):
        relax.relax_all([COPPER], tmp_path / "rows", "sevennet-0", processes=1, device="cpu", checkpoint=checkpoint, progress=False)
    assert len(relax.read_rows(tmp_path / "rows")) == 3


def test_several_processes_say_why_they_cannot_start(tmp_path):
    with pytest.raises(potentials.PotentialError, match="none.pth does not exist"):
        relax.relax_all([COPPER, SILVER], tmp_path / "rows", "sevennet-0", processes=2, device="cpu", checkpoint="none.pth", progress=False)


def test_a_failure_ends_what_has_not_begun(emt, tmp_path, monkeypatch):
    asked = []

    def failing(cell, *args):
        asked.append(cell)
        if len(asked) == 1:
            raise MemoryError
        time.sleep(0.05)
        return {"status": "ok"}

    threads = lambda count, context, start, what: ThreadPoolExecutor(count, initializer=start, initargs=what)
    monkeypatch.setattr(relax, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(relax, "relax", failing)
    cells = [(COPPER[0] + i, *COPPER[1:]) for i in range(40)]
    with pytest.raises(MemoryError):
        relax.relax_all(cells, tmp_path / "rows", "sevennet-0", processes=2, device="cpu", progress=False)
    assert len(asked) < 20


def test_a_half_line_is_ended_without_writing_the_file_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda *args: pytest.fail("a kill in here would empty the file"))
    for before, after in (("", ""), ("a\n", "a\n"), ("a\nb", "a\nb\n")):
        path = tmp_path / "rows"
        path.write_text(before)
        relax._mend(path)
        assert path.read_text() == after
    relax._mend(tmp_path / "none")
    assert not (tmp_path / "none").exists()


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


def test_an_unknown_start_is_a_clear_error():
    with pytest.raises(ValueError, match="start 'ratled': expected one of ideal, rattled"):
        relax.relax(COPPER, EMT(), "ratled")


def test_off_centre_takes_the_lowest_that_ends(monkeypatch):
    cell, asked = ([4.0] * 3 + [90.0] * 3, ["Ba", "Ti", "O", "O", "O"], np.zeros((5, 3))), []

    def relaxed(cell, calculator):
        asked.append(cell[2])
        ends = len(asked) != 2                                          # the second would be the lowest
        return {"status": "ok" if ends else "exploded: x", "energy_per_atom": {2: -9.0, 3: -2.0}.get(len(asked), -1.0), "n": len(asked)}

    monkeypatch.setattr(relax, "relax", relaxed)
    assert relax.off_centre(cell, None, (0, 0, 2))["n"] == 3
    assert [f[:2, 2].tolist() for f in asked] == [[0.04, 0], [0.1, 0], [0, 0.04], [0, 0.1]] and not any(f[:, :2].any() for f in asked)
    monkeypatch.setattr(relax, "relax", lambda *a: {"status": "exploded: x"})
    with pytest.raises(RuntimeError, match="BaTiOOO off centre along .*exploded"):
        relax.off_centre(cell, None, (1, 1, 1))
