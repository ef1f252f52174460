"""Energies above hull: agreement with known ones, cells from both starts, precision at another share."""

import numpy as np
import pytest

from meidnet_core import crystal, hull, stability


def test_agreement_at_a_threshold():
    ours, reference = np.array([0.0, 0.05, 0.3, 0.2]), np.array([0.0, 0.2, 0.05, 0.3])
    assert stability.agreement(ours, reference, 0.1) == {"accuracy": 50.0, "precision": 50.0, "recall": 50.0}
    assert stability.agreement(ours + 1, reference, 0.1)["precision"] is None


def test_cells_are_placed_from_both_starts(monkeypatch, tmp_path):
    cell = [4.0, 4.0, 4.0, 90, 90, 90], ["K", "Mg", "F", "F", "F"], crystal.PEROVSKITE
    good = {"status": "ok", "volume": 12.8, "energy_per_atom": -5.0, "symbols": cell[1], "lattice": cell[0], "frac": "cubic"}
    bad = {"status": "exploded: volume x 9"}
    rows = {"ideal": [good, bad], "rattled": [good | {"energy_per_atom": -5.1, "frac": "tilted"}, bad]}
    monkeypatch.setattr(stability.relax, "relax_all", lambda *a, **k: rows)
    monkeypatch.setattr(hull, "corrections", lambda potential: None)
    monkeypatch.setattr(hull, "e_above_hull", lambda r, c: {"e_above_hull": r["energy_per_atom"] + 5.2 if "volume" in r else np.nan,
                                                            "decomposition": "KF" if "volume" in r else r["status"]})
    found, relaxed = stability.placed([cell, cell])
    assert relaxed == [(cell[0], cell[1], "tilted"), None]                                   # the lower of the two; both failed
    assert found[["e_above_hull", "rattled", "relaxed a"]].to_numpy()[0] == pytest.approx([0.2, 0.1, 4.0])
    assert np.isnan(found.e_above_hull[1]) and found["falls apart into"].tolist() == ["KF", "exploded: volume x 9"]


def test_precision_falls_with_the_share_that_is_stable():
    assert stability.precision_at(0.5, 0.9, 0.8) == pytest.approx(0.9)                  # where it was measured
    assert stability.precision_at(0.07, 134 / 143, 134 / 150) == pytest.approx(0.07 * 134 / (0.07 * 134 + 0.93 * 9))
    assert stability.precision_at(0.01, 1.0, 0.5) == 1.0                                # nothing wrongly called stable
