"""The edge of a decoded candidate beside the relaxed one: what is compared, what counts, what is written."""

import numpy as np
import pandas as pd
import pytest
import torch

from meidnet_core import candidates, crystal, decoded_cells, design, oqmd

ELEMENTS = ("O", "F", "S", "Cl", "K", "Ca", "Ti", "Sr", "Zr", "Sn", "Cs")
CHOSEN = (("Sr", "Zr", "S"), ("Cs", "Sn", "Cl"), ("Cs", "Sn", "Cl"), ("Sr", "Ti", "O"), ("K", "Ca", "F"))


class Tool:
    """What of a Designer is asked: SrTiO3 is known, an edge is 4 angstrom and a hundredth of the atomic number of A."""

    elements, stability, sites = ELEMENTS, "stability", torch.ones(5, len(ELEMENTS), dtype=torch.bool)
    generator = staticmethod(lambda seed: None)
    constant = staticmethod(lambda numbers: 4.0 + numbers[:, 0] / 100)
    fresh = staticmethod(lambda numbers: np.array([crystal.symbol(n[1]) != "Ti" for n in numbers]))

    def moved(self, target, starts, steps, seed):
        """Two snapshots: zeros, then ones."""
        assert target["stability"] == 0.0 and set(target) > {"stability"}
        return torch.cat([torch.zeros(starts, 2), torch.ones(starts, 2)])


@pytest.fixture
def decoder(monkeypatch):
    """A decoder that names CHOSEN: two of one composition, one that training holds, one that nobody relaxed; a = 5, 6, 7 ... angstrom."""
    at = np.array([[ELEMENTS.index(e) for e in (a, b, x, x, x)] for a, b, x in CHOSEN])
    lattice = torch.tensor([[5.0 + k] * 3 + [90.0] * 3 for k in range(5)])
    frac = torch.tensor(np.tile(crystal.PEROVSKITE, (5, 1, 1)))
    frac[0, 1, 0] -= 0.9                                                # a tenth of an edge off, in the neighbouring cell
    monkeypatch.setattr(design, "decode", lambda model, z, sites: (at, np.ones(5)))
    monkeypatch.setattr(design, "soft_decode", lambda model, z: (None, lattice, frac))
    monkeypatch.setattr(design, "geometry", lambda model, cells: (cells.lattice + 0.5, cells.frac))
    monkeypatch.setattr(decoded_cells, "relaxed_edges", lambda: {c: 5.5 for c in CHOSEN[:4]})
    return decoded_cells.edges(Tool(), torch.zeros(5, 2))


def test_only_new_relaxed_compositions_count_and_once(decoder):
    assert decoder.formula.tolist() == ["SrZrS3", "CsSnCl3"]
    assert decoder.latent.tolist() == [5.0, 6.0] and decoder.relaxed.tolist() == [5.5, 5.5]
    assert decoder.off.tolist() == pytest.approx([0.1, 0.0])


def test_each_reading_is_its_own(decoder):
    assert decoder["sum"].tolist() == pytest.approx([4.38, 4.55])
    assert decoder.embedding.tolist() == pytest.approx([4.88, 5.05])


def test_errors_and_their_sign():
    table = pd.DataFrame({"formula": ["a", "b"], "latent": [4.0, 4.4], "embedding": [4.1, 4.1], "sum": [4.0, 4.0], "relaxed": [4.1, 4.1],
                          "off": [0.0, 0.1]})
    m = decoded_cells.summary(table, "moved")
    assert m["moved_cells"] == 2 and m["moved_off"] == pytest.approx(0.05)
    assert m["moved_latent_mae"] == pytest.approx(0.2) and m["moved_latent_bias"] == pytest.approx(0.1)
    assert m["moved_embedding_mae"] == 0 and m["moved_sum_bias"] == pytest.approx(-0.1)


def test_the_truth_is_of_one_potential(monkeypatch, tmp_path):
    monkeypatch.setattr(oqmd, "OWN", tmp_path / "t.csv")
    head = ",".join(oqmd.OWN_COLUMNS)
    oqmd.OWN.write_text(f"{head}\nSr,Ti,O,3.9,-8,0,sevennet-0\nSr,Ti,O,3.95,-8,0,chgnet\nK,Ta,O,4.0,-8,0,sevennet-0\n")
    assert decoded_cells.relaxed_edges() == {("Sr", "Ti", "O"): 3.9, ("K", "Ta", "O"): 4.0}


def test_before_and_after_moving(monkeypatch):
    """Both stages are measured over all four requests, a composition that two of them name once."""
    row = lambda z: {"formula": f"{z[0, 0]:g}", "latent": 5.0 + z[0, 0].item(), "embedding": 5.2, "sum": 5.0, "relaxed": 5.1, "off": 0.0}
    monkeypatch.setattr(decoded_cells, "edges", lambda tool, z, seed: pd.DataFrame([row(z), row(z)]))
    monkeypatch.setattr(decoded_cells, "held_out", lambda tool, seed: {"test_cells": 9})
    m, table = decoded_cells.measure(Tool(), 0, starts=3, steps=4)
    assert m["start_cells"] == m["moved_cells"] == len(table) == 1 and m["test_cells"] == 9
    assert m["start_latent_mae"] == pytest.approx(0.1) and m["moved_latent_mae"] == pytest.approx(0.9)
    assert table.latent.tolist() == [6.0]


def test_held_out_cells_are_decoded_from_their_own_embedding(monkeypatch):
    cells = candidates.cubes_of(["SrTiO3", "KMgF3"])
    monkeypatch.setattr(oqmd, "part", lambda split: cells)
    monkeypatch.setattr(design, "geometry", lambda model, given: (given.lattice + np.array([[0.1], [-0.3]]), given.frac))
    m, true = decoded_cells.held_out(Tool()), cells.lattice[:, 0]
    assert m["test_cells"] == 2 and m["test_embedding_mae"] == pytest.approx(0.2)
    assert m["test_sum_mae"] == pytest.approx(np.abs(true - [4.38, 4.19]).mean())
