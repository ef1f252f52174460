"""Cells off centre: names, symmetry given back to a relaxed cell, a PBE relaxation that fails or is late."""

import json
import subprocess

import numpy as np
import pytest
from ase.cell import Cell

from meidnet_core import crystal, dft, off_centre, phonons

pytest.importorskip("spglib")


def moved(direction, noise=0.0):
    """A cubic ABX3 cell whose B has left its site, sites in disorder by `noise` (angstrom)."""
    frac = crystal.PEROVSKITE + np.random.default_rng(0).normal(0, noise / 5, (5, 3))
    frac[1] += 0.05 * np.array(direction) / np.linalg.norm(direction)
    return [5.0, 5.0, 5.0, 90.0, 90.0, 90.0], ["Yb", "Sc", "Se", "Se", "Se"], frac


def test_names_tell_direction_and_method():
    assert off_centre.name_of("YbScSe3", (0, 0, 1)) == "YbScSe3-off001"
    assert off_centre.name_of("YbScSe3", (1, 1, 1), pbe=True) == "YbScSe3-off111pbe"


@pytest.mark.parametrize("direction, expected", zip(off_centre.DIRECTIONS, ("R3m (160)", "P4mm (99)", "Amm2 (38)")))
def test_a_relaxed_cell_gets_its_symmetry_back(direction, expected):
    rough = moved(direction, noise=0.01)
    assert phonons.spacegroup(rough, 1e-4) == "P1 (1)"
    lattice, symbols, frac = off_centre.symmetrized(rough)
    assert phonons.spacegroup((lattice, symbols, frac), 1e-4) == expected and sorted(symbols) == sorted(rough[1])
    assert Cell.fromcellpar(lattice).volume == pytest.approx(Cell.fromcellpar(rough[0]).volume, rel=1e-3)


def test_a_cell_that_is_no_primitive_one_is_refused():
    lattice, symbols, frac = moved((0, 0, 1))
    twice = [5.0, 5.0, 10.0, 90, 90, 90], symbols * 2, np.vstack([frac * [1, 1, 0.5], frac * [1, 1, 0.5] + [0, 0, 0.5]])
    with pytest.raises(ValueError, match="no primitive cell of 10 atoms within 0.1 angstrom"):
        off_centre.symmetrized(twice)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """dft without GPAW: what the relaxation leaves is put into outcome["relax"]; None: it runs out of time."""
    outcome = {}

    def execute(job, folder, ranks, timeout):
        folder.mkdir(parents=True, exist_ok=True)
        if outcome["relax"] is None:
            raise subprocess.TimeoutExpired("gpaw", timeout)
        (folder / "relax.json").write_text(json.dumps(outcome["relax"]))
    monkeypatch.setattr(dft, "WORK", tmp_path)
    monkeypatch.setattr(dft, "prepare", lambda cell, settings, kind: {"cell": cell, "kind": kind})
    monkeypatch.setattr(dft, "execute", execute)
    return outcome


def test_a_relaxed_cell_comes_back(runs):
    runs["relax"] = {"status": "ok", "lattice": [5.1] * 3 + [81.4] * 3, "symbols": ["Yb", "Sc", "Se", "Se", "Se"], "frac": [[0, 0, 0]] * 5}
    lattice, symbols, frac = off_centre.by_pbe("YbScSe3-off111pbe", moved((1, 1, 1)))
    assert lattice[3] == 81.4 and symbols[0] == "Yb" and frac.shape == (5, 3)


@pytest.mark.parametrize("outcome, told", [(None, "not relaxed in 60 s; the next call goes on"),
                                           ({"status": "not relaxed in 60 steps"}, "relaxation not relaxed in 60 steps")])
def test_what_did_not_end_is_an_error_with_a_name(runs, outcome, told):
    runs["relax"] = outcome
    with pytest.raises(dft.DFTError, match=f"YbScSe3-off111pbe: {told}"):
        off_centre.by_pbe("YbScSe3-off111pbe", moved((1, 1, 1)), timeout=60)
