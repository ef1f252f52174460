"""Batched relaxations: the same rows as one after the other, fewer calls, a bad crystal fails alone, an interrupted run starts nothing."""

import threading

import numpy as np
import pytest
from ase.calculators.emt import EMT

from meidnet_core import batch, potentials, relax

CELLS = [([a] * 3 + [90.0] * 3, [e] * 4, np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]))
         for e, a in (("Cu", 3.8), ("Ag", 4.3), ("Au", 4.0), ("Cu", 3.5), ("Al", 4.2))]
CUBE = ([3.95] * 3 + [90.0] * 3, ["Sr", "Ti", "O", "O", "O"], np.array([[0.5] * 3, [0] * 3, [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]))


def emt(crystals):
    """evaluate of ASE's EMT; refuses xenon."""
    found = []
    for atoms in crystals:
        calc = EMT()
        atoms = atoms.copy()
        atoms.calc = calc
        found.append({"energy": atoms.get_potential_energy(), "free_energy": atoms.get_potential_energy(), "forces": atoms.get_forces(),
                      "stress": atoms.get_stress()})
    return found


def work(job, calculator):
    return job, relax.relax(CELLS[job] if job < len(CELLS) else ([4.0] * 3 + [90.0] * 3, ["Xe"], np.zeros((1, 3))), calculator)


def in_batches(jobs, size, evaluate=emt):
    gather = batch.Gather(evaluate)
    return dict(batch.run(jobs, work, gather, size)), gather


@pytest.mark.parametrize("size", [1, 3, 8])
def test_rows_are_those_of_serial_relaxation(size):
    rows, gather = in_batches(range(len(CELLS)), size)
    serial = [relax.relax(c, EMT()) for c in CELLS]
    for k, row in enumerate(serial):
        assert rows[k]["status"] == row["status"] == "ok" and rows[k]["steps"] == row["steps"]
        assert rows[k]["energy_per_atom"] == pytest.approx(row["energy_per_atom"], abs=1e-9)
    asked = sum(r["steps"] + 1 for r in serial)
    assert gather.calls <= asked and (size == 1 or gather.calls < 0.8 * asked) and not gather.waiting and gather.live == 0


def test_a_bad_crystal_fails_alone():
    rows, _ = in_batches([0, 5, 1], 3)
    assert rows[5]["status"].startswith("failed: NotImplementedError") and rows[0]["status"] == rows[1]["status"] == "ok"


def test_what_no_row_can_say_is_raised():
    def broken(job, calculator):
        raise KeyError("a defect of the program")
    with pytest.raises(KeyError, match="a defect"):
        list(batch.run([0, 1], broken, batch.Gather(emt), 2))


def test_an_interrupted_run_starts_nothing_new():
    started = []

    def slow(job, calculator):
        started.append(job)
        return job
    rows, before = batch.run(range(100), slow, batch.Gather(emt), 1), threading.active_count()
    next(rows)
    rows.close()
    count = len(started)
    assert count <= 100 and threading.active_count() <= before + 1
    threading.Event().wait(0.05)
    assert len(started) - count <= 1


def test_sevennet_in_one_call_agrees_with_its_calculator():
    calculator = potentials.get_calculator("sevennet-0", "cpu")
    crystals = [relax.to_atoms(c) for c in (CUBE, ([4.1] * 3 + [90.0] * 3, ["Ba", "Zr", "O", "O", "O"], CUBE[2] + 0.01))]
    crystals[1].rattle(0.05, seed=1)
    alone = []
    for atoms in crystals:
        atoms.calc = calculator
        alone.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    together = batch.sevennet(calculator)([a.copy() for a in crystals])
    for (energy, forces, stress), found in zip(alone, together, strict=True):
        assert found["energy"] == pytest.approx(energy, abs=1e-4) and found["forces"].shape == (5, 3)
        assert np.allclose(found["forces"], forces, atol=1e-4) and np.allclose(found["stress"], stress, atol=1e-5)


def test_relax_all_in_batches_writes_the_same_rows(tmp_path):
    cells = [CUBE, ([4.3] * 3 + [90.0] * 3, ["Ba", "Zr", "O", "O", "O"], CUBE[2])]
    one = relax.relax_all(cells, tmp_path / "one", "sevennet-0", processes=1, device="cpu", progress=False)["ideal"]
    two = relax.relax_all(cells, tmp_path / "two", "sevennet-0", batch=2, device="cpu", progress=False)["ideal"]
    assert [r["key"] for r in one] == [r["key"] for r in two] and len(relax.read_rows(tmp_path / "two")) == 2
    for a, b in zip(one, two):
        assert a["status"] == b["status"] == "ok" and a["energy_per_atom"] == pytest.approx(b["energy_per_atom"], abs=1e-4)


def test_fewer_than_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 relaxations side by side: 1 or more"):
        next(batch.run([1], lambda job, calculator: job, batch.Gather(emt), 0))
    with pytest.raises(ValueError, match="batch -1: so many"):
        relax.relax_all([CUBE], tmp_path / "rows", "sevennet-0", batch=-1, device="cpu")


def test_only_sevennet_is_batched(monkeypatch):
    with pytest.raises(potentials.PotentialError, match="chgnet cannot be batched"):
        relax.place("chgnet", batch=4)
    cases = ("sevennet-0", "cuda", ("cuda", batch.SIZE)), ("sevennet-0", "cpu", ("cpu", 0)), ("chgnet", "cuda", ("cpu", 0))
    for name, there, expected in cases:
        monkeypatch.setattr(potentials, "find_device", lambda device, there=there: there if device == "auto" else device)
        assert relax.place(name) == expected
    assert relax.place("sevennet-0", "cpu", 16) == ("cpu", 16)
