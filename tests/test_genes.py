"""Genes of the soft-mode search: supercells that hold the modes, displacement and strain."""

import numpy as np
import pytest
from test_repair import BASES, STO, TILT, mode

from meidnet_core import genes, phonons, relax, repair


def test_cells_hold_the_soft_points_of_a_cubic_parent():
    q = {"Γ": [0, 0, 0], "X": [0, 0, 0.5], "M": [0.5, 0.5, 0], "R": [0.5, 0.5, 0.5]}
    assert sorted(round(np.linalg.det(m)) for m in genes.CELLS) == [1] + [2] * 7 + [4] * 6 + [8]
    tilted = next(i for i, m in enumerate(genes.CELLS) if m.tolist() == [[1, -1, 0], [1, 1, 0], [0, 0, 2]])
    assert tilted in genes.fitting(list(q.values()), 5, 20)                           # 20 atoms hold Gamma, X, M and R
    for points, atoms in ((["Γ"], 5), (["R"], 10), (["X"], 10), (["M"], 10), (["R", "M"], 20)):
        first = genes.CELLS[genes.fitting([q[p] for p in points], 5, 20)[0]]
        assert 5 * round(np.linalg.det(first)) == atoms
    assert genes.fitting([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0.5, 0.5]], 5, 20) == []


@pytest.mark.parametrize("matrix", [m.tolist() for m in genes.CELLS])
def test_no_displacement_gives_the_supercell_of_the_parent(matrix):
    one = {"modes": [0], "weights": [1.0], "phases": [0], "scale": 0.0, "stretch": [1.0] * 3, "angles": [0.0] * 3, "cell": matrix,
             "noise": 0}
    cell = genes.cell_of(one, BASES[0])
    assert len(cell[1]) == 5 * round(np.linalg.det(matrix))
    assert phonons.spacegroup(cell) == "Pm-3m (221)" and len(phonons.primitive(cell)[0][1]) == 5


def test_genes_say_how_far_and_how_strained():
    one = {"modes": [3], "weights": [1.0], "phases": [0], "scale": 0.3, "stretch": [1.1, 1.0, 1.0], "angles": [0.0, 2.0, 0.0], "noise": 0}
    one = genes.place(one | {"base": 0}, BASES)
    cell, plain = genes.cell_of(one, BASES[0]), phonons.build(STO, one["cell"])
    assert cell[0][0] == pytest.approx(1.1 * plain[0][0]) and cell[0][4] == pytest.approx(plain[0][4] + 2)
    shift = (np.asarray(cell[2]) - plain[2] + 0.5) % 1 - 0.5
    length = np.linalg.norm(shift @ relax.to_atoms(plain).cell[:], axis=1)
    assert length.max() == pytest.approx(0.3, abs=0.08) and length[:2].max() < 0.08    # the tilt leaves Sr alone, but for the noise


def test_modes_that_share_no_cell_are_dropped():
    modes = [mode(q, "M", -1.0, TILT) for q in ([0.5, 0.5, 0], [0, 0.5, 0.5])]
    one = genes.place({"base": 0, "modes": [0, 1], "weights": [1.0, 1.0], "phases": [0, 0]}, [repair._base(STO, modes)])
    assert one["modes"] == [0] and 5 * np.linalg.det(one["cell"]) == pytest.approx(10)
