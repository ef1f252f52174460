"""Unique among each other by structure, novel by formula against each reference."""

from meidnet_core import crystal, hull, novelty


def relaxed(a, *symbols):
    return {"symbols": list(symbols), "lattice": [a] * 3 + [90.0] * 3, "frac": crystal.PEROVSKITE.tolist(), "status": "ok"}


def test_equal_crystals_are_counted_once():
    rows = [relaxed(4.0, "Sr", "Ti", "O", "O", "O"), relaxed(4.05, "Sr", "Ti", "O", "O", "O"), relaxed(4.0, "Ti", "Sr", "O", "O", "O"),
            {"symbols": ["Sr", "Ti", "O", "O", "O"], "status": "exploded: volume x 9"}, relaxed(4.0, "Ba", "Ti", "O", "O", "O")]
    assert novelty.unique(rows).tolist() == [True, False, True, True, True]


def test_novelty_is_told_for_each_reference(monkeypatch):
    known = {"training": [["Sr", "Ti", "O", "O", "O"]], "mp_20": [["Ba", "Ti", "O", "O", "O"]], "list": [], "oqmd": []}
    monkeypatch.setattr(novelty, "known_formulas", lambda r: {hull.reduced(s) for s in known[r]})
    assert novelty.new_to(["Ti", "Sr", "O", "O", "O"]) == {"training": False, "mp_20": True, "list": True, "oqmd": True}
    keys = novelty.known_everywhere()
    assert ((8, 22, 38), (3, 1, 1)) in keys and len(keys) == 2
