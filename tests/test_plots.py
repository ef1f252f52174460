"""Figures that a reader operates: what the menu of a viewer shows."""

import numpy as np
import pytest

from meidnet_core import crystal, plots, results

pytest.importorskip("pymatviz")


def cube(a, *symbols):
    return crystal.to_structure([a] * 3 + [90.0] * 3, [*symbols, symbols[2], symbols[2]], crystal.PEROVSKITE)


def test_a_menu_shows_one_pair_of_structures_at_a_time():
    pairs = {"SrTiO3": [(cube(3.9, "Sr", "Ti", "O"), "small"), (cube(4.2, "Sr", "Ti", "O"), "large")],
             "CsPbI3": [(cube(6.2, "Cs", "Pb", "I"), "before"), (cube(6.4, "Cs", "Pb", "I"), "after")]}
    figure = plots.from_menu(pairs)
    first, second = figure.layout.updatemenus[0].buttons
    assert (first.label, second.label) == ("SrTiO3", "CsPbI3")
    masks = [b.args[0]["visible"] for b in (first, second)]
    assert [a + b for a, b in zip(*masks)] == [1] * len(figure.data)                       # every trace belongs to one of them
    assert [t.visible for t in figure.data] == masks[0] and {t.scene for t in figure.data} == {"scene", "scene2"}
    assert [a["text"] for a in second.args[1]["annotations"]] == ["before", "after"]


def test_the_check_of_a_hull_tells_how_the_stable_are_classified():
    fit, run = results.read_run("hull-fit", "sevennet-0"), results.read_run("hull-validation", "sevennet-0")
    m = run["metrics"]
    title = plots.hull_check(fit, {"list hull": run}).axes[1].get_title()
    for t in (0, 0.1):
        told = " / ".join(f"{m[f'{k}_at_{t}']:.0f}" for k in ("accuracy", "precision", "recall"))
        assert f"{told} at {t}" in title


def test_a_figure_is_shown_wherever_it_is_asked_for(monkeypatch):
    go = pytest.importorskip("plotly.graph_objects")
    import IPython.display
    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    monkeypatch.setattr(plots, "_plotly_js", [True])
    for _ in range(2):
        assert plots.show_html(go.Figure(go.Scatter(y=[1, 2])), 300) is None                 # not the value of a cell: lost inside an `if`
    first, second = (h.data for h in shown)
    assert "Plotly.newPlot" in first and "Plotly.newPlot" in second
    assert len(first) > 1e6 > len(second)                                                      # one page, one copy of the library


def test_a_soft_mode_moves_atom_by_atom():
    pytest.importorskip("plotly")
    from meidnet_core import plots_physics
    cell = [4.0, 4.0, 4.0, 90, 90, 90], ["K", "Ta", "Se", "Se", "Se"], crystal.PEROVSKITE
    vector = np.zeros((5, 3), complex)
    vector[1, 0] = 1                                                                         # the second atom along x
    figure = plots_physics.soft_mode_animation(cell, {"q": [0, 0, 0], "eigenvector": vector}, supercell=(1, 1, 1), frames=4)
    assert [t.name for t in figure.data] == ["K", "Ta", "Se"] and [len(t.x) for t in figure.data] == [1, 1, 3] and len(figure.frames) == 4
    still, moved = (figure.frames[k].data for k in (0, 1))
    assert moved[1].x[0] - still[1].x[0] == pytest.approx(0.5) and list(moved[2].x) == list(still[2].x)
