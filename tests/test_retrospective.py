"""Retrospective discovery: what is held out, what counts as a hit."""

import numpy as np

from meidnet_core import candidates, crystal, oqmd, retrospective, sun


def test_held_out_are_the_compositions_that_training_lacks(monkeypatch):
    numbers = np.array([[a, b, 8, 8, 8] for a in range(20, 31) for b in range(20, 31) if a != b], np.int16)
    labels = np.tile([np.nan, np.nan, 1.5, -2.0, 0.05], (len(numbers), 1))
    cells = oqmd.cells("oqmd_abx3", "all", [str(i) for i in range(len(numbers))], numbers, np.full(len(numbers), 4.0), labels)
    monkeypatch.setattr(oqmd, "cubic", lambda stand_in=False: cells)
    truth = retrospective.held_out()
    place = oqmd.position(numbers)
    assert len(truth) == (place >= 0.8).sum() and set(truth.values()) == {(1.5, 0.05)}


def test_a_hit_meets_gap_and_hull_by_dft():
    assert retrospective.meets((1.0, 0.1), (0.5, 2.0)) and not retrospective.meets((1.0, 0.11), (0.5, 2.0))
    assert not retrospective.meets((2.1, 0.0), (0.5, 2.0)) and not retrospective.meets((np.nan, np.nan), (0.0, 99.0))


def test_what_is_asked_lies_in_the_window():
    for name, (low, high) in retrospective.WINDOWS.items():
        asked = retrospective.targets((low, high))
        assert asked == {} if name == "any gap" else low < asked["pbe_gap"] < high


def test_ranking_puts_the_window_first():
    class Tool:
        labels, tolerance = list(oqmd.LABELS), 0.1
    numbers = np.array([[crystal.atomic_number(e) for e in f] for f in (("Sr", "Ti", "O", "O", "O"), ("Ba", "Zr", "O", "O", "O"),
                                                                       ("Ca", "Sn", "O", "O", "O"))], np.int16)
    cells = oqmd.cells("x", "all", ["0", "1", "2"], numbers, np.full(3, 4.0), np.full((3, 5), np.nan))
    mean = np.zeros((3, 5))
    mean[:, 2], mean[:, 4] = [5.0, 1.0, 1.5], [0.0, 0.3, 0.2]
    p = retrospective.inside(Tool, candidates.Proposal(cells, mean, np.zeros((3, 5)), np.full(3, np.nan)), (0.5, 2.0), 3)
    assert [p.crystals.formula(i) for i in range(3)] == ["CaSnO3", "BaZrO3", "SrTiO3"]


def test_every_window_is_answered_from_all_searches():
    asked = []

    class Tool:
        labels, tolerance, models = list(oqmd.LABELS), 0.1, [None, None]

        def search(self, method, target, seed):
            asked.append((method, target.get("pbe_gap"), seed))
            numbers = np.array([[38 + len(asked), 22, 8, 8, 8]], np.int16)
            cells = oqmd.cells("x", "all", ["0"], numbers, np.full(1, 4.0), np.full((1, 5), np.nan))
            return candidates.Proposal(cells, np.zeros((1, 5)), np.zeros((1, 5)), np.ones(1))
    found, met = retrospective.chosen(Tool(), "ours", 3)
    assert asked == [("ours", gap, seed) for gap in (None, 1.25, 3.0, 5.0) for seed in (6, 7)]
    assert {len(p.mean) for p in found.values()} == {8} == {met} and list(found) == list(retrospective.WINDOWS)
    asked.clear()
    assert {len(p.mean) for p in retrospective.chosen(Tool(), "screening", 3)[0].values()} == {1} and asked == [("screening", None, 3)]
    assert "searches" in retrospective.configuration(Tool(), "unmoved") and "searches" not in retrospective.configuration(Tool(), "window")


def test_every_window_is_compared_with_screening():
    def runs(*hits):                                                  # of two seeds
        return [{"metrics": {f"{k}_{n}_{w}": v for w in retrospective.WINDOWS for n in retrospective.SIZES
                             for k, v in (("hits", 0 if w == "2 - 4 eV" and h == 9 else h), ("enrichment", 2 * h))}} for h in hits]
    table = retrospective.compared({"ours": runs(6, 8), "screening": runs(9, 9)}).set_index(["window", "method"])
    assert len(table) == 2 * len(retrospective.WINDOWS)
    row = table.loc[("any gap", "ours")]
    assert (row["hits of 35"], row["precision at 35 (%)"], row["times chance, 140"]) == (7, 20, 14)
    assert row["times screening, 140"] == 7 / 9 and table.loc[("above 4 eV", "screening"), "times screening, 35"] == 1
    assert np.isnan(table.loc[("2 - 4 eV", "ours"), "times screening, 35"])                 # nothing to divide by


def test_the_stored_precision_is_that_of_the_table():
    groups = sun.stored("retrospective", methods=retrospective.METHODS)
    table = retrospective.compared(groups).set_index(["window", "method"])
    for window in retrospective.WINDOWS:
        assert np.isclose(table.loc[(window, "ours"), "precision at 35 (%)"],
                          np.mean([r["metrics"][f"precision_35_{window}"] for r in groups["ours"]]))
