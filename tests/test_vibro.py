"""VibroML with our calculators: a stable crystal is told, a soft one searched (slow), a missing package and a stop are clear errors."""

import json
import sys

import pytest
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

from meidnet_core import candidates, potentials, relax, repair, results, vibro

FCC = ([2.538] * 3 + [60.0] * 3, ["Cu"], [[0.0, 0, 0]])


class Broken(Calculator):
    implemented_properties = ["energy", "forces", "stress"]

    def calculate(self, *args, **options):
        raise RuntimeError("no parameters for Og")


def test_a_missing_package_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vibroml", None)
    assert not vibro.available()
    with pytest.raises(vibro.VibroError, match="pip install vibroml"):
        vibro.search(FCC, EMT(), tmp_path)


def test_a_stable_crystal_needs_no_search(tmp_path):
    out = vibro.search(FCC, EMT(), tmp_path, supercell=(4, 4, 4))
    assert out["soft"] is False and out["rows"] == [] and out["lowest"] > vibro.THRESHOLD
    assert "Testing Supercell" in (tmp_path / "vibroml.log").read_text()


def test_a_stop_names_the_log_and_the_engine_is_put_back(tmp_path):
    before = vibro._package().initialize_calculator
    with pytest.raises(vibro.VibroError, match="vibroml.log"):
        vibro.search(FCC, Broken(), tmp_path)
    assert vibro._package().initialize_calculator is before


def test_settings_are_lists_of_one_length():
    assert vibro.settings() == [[(2, 2, 2)], [0.03], [0.05]]
    assert vibro.settings([(2, 2, 2), (3, 3, 3)], (0.01, 0.03), 0.02) == [[(2, 2, 2), (3, 3, 3)], [0.01, 0.03], [0.02, 0.02]]
    assert vibro.settings(delta=(0.01, 0.02, 0.03))[0] == [(2, 2, 2)] * 3
    with pytest.raises(ValueError, match="have 1, 2, 3 values"):
        vibro.settings((2, 2, 2), (0.01, 0.03), (0.1, 0.05, 0.02))


class Package:
    """What of vibroml.auto_optimize a search calls: keeps what it was given, finds a soft mode with the last setting."""

    initialize_calculator = None

    def run_phonon_calculation_sweep_optimization(self, args, folder, atoms, calculator, prefix, *given, **common):
        self.sweep = given
        best = {"supercell_dims": given[0][-1], "delta": given[1][-1], "fmax": given[2][-1]}
        return -1.5, best, ["a mode"], atoms

    def run_ga_soft_mode_optimization(self, args, folder, atoms, modes, *given, **options):
        self.ga, self.args, self.options = given, args, options


def test_lists_are_handed_over_and_the_best_setting_goes_on(monkeypatch, tmp_path):
    package = Package()
    monkeypatch.setattr(vibro, "_package", lambda: package)
    out = vibro.search(FCC, EMT(), tmp_path, supercell=[(2, 2, 2), (3, 3, 3)], delta=(0.03, 0.01), scales=(0.3, 0.6), ratios=(0.5,),
                       population=5, generations=4, offspring=7)
    assert package.sweep == ([(2, 2, 2), (3, 3, 3)], [0.03, 0.01], [0.05, 0.05], vibro.THRESHOLD)
    assert package.args.supercell_dims == (3, 3, 3) and (package.args.delta, package.args.fmax) == (0.01, 0.05)
    assert package.ga[1:4] == ([0.3, 0.6], [0.0], [0.5]) and out["setting"]["delta"] == 0.01 and out["soft"] and out["rows"] == []
    assert [package.options[f"ga_{k}"] for k in ("population_size", "generations")] == [5, 4]
    assert package.options["num_new_points_per_iteration"] == 7
    vibro.search(FCC, EMT(), tmp_path)
    assert package.sweep[:3] == ([(2, 2, 2)], [0.03], [0.05]) and package.ga[1:4] == ([0.5], [0.0], [0.0, 1.0])


def test_a_measured_search_is_a_run_file(monkeypatch, tmp_path):
    row = {"energy_per_atom": -3.0, "lattice": FCC[0], "symbols": FCC[1], "frac": FCC[2]}
    found = {"lowest": -1.5, "soft": True, "setting": {"delta": 0.03}, "rows": [row | {"energy_per_atom": -3.1}]}
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results.write_run, "__kwdefaults__", results.write_run.__kwdefaults__ | {"root": tmp_path / "out"})
    monkeypatch.setattr(potentials, "get_calculator", lambda *args: EMT())
    monkeypatch.setattr(candidates, "relaxed_cubic", lambda *args: [row])
    monkeypatch.setattr(vibro, "search", lambda cell, calculator, folder, **options: found)
    monkeypatch.setattr(repair, "examine", lambda *args: row | {"energy_per_atom": -3.2, "lowest": -1.0, "lowest_exact": -0.9,
                                                               "spacegroup": "P1 (1)"})
    said = json.loads(vibro.measure("KTaSe3", generations=1).read_text())
    assert said["metrics"]["gain"] == pytest.approx(0.1) and said["metrics"]["gain_polished"] == pytest.approx(0.2)
    assert said["metrics"]["repaired"] == 0 and said["config"]["generations"] == 1 and said["best"]["spacegroup"] == "P1 (1)"
    monkeypatch.setattr(vibro, "search", lambda *args, **options: found | {"rows": []})
    with pytest.raises(vibro.VibroError, match="KTaSe3: no soft modes"):
        vibro.measure("KTaSe3")


@pytest.mark.slow
def test_its_search_goes_below_the_cubic_phase(tmp_path):
    calculator = potentials.get_calculator("sevennet-0", "cpu")
    row = relax.relax(candidates.cells_of(["KTaSe3"])[0], calculator)
    out = vibro.search((row["lattice"], row["symbols"], row["frac"]), calculator, tmp_path, generations=1, population=2, offspring=2)
    best = out["rows"][0]
    assert out["soft"] and best["energy_per_atom"] < row["energy_per_atom"] - 0.05
    assert relax.to_atoms((best["lattice"], best["symbols"], best["frac"])).get_chemical_symbols().count("Se") % 3 == 0


def test_the_command_line_hands_the_points_of_the_sweep_over(monkeypatch):
    asked = {}
    monkeypatch.setattr(vibro, "measure", lambda formula, **options: asked.update({formula: options}))
    monkeypatch.setattr(sys, "argv", "vibro KTaSe3 --delta 0.05 0.01 --fmax 0.05 0.01 --scales 0.3 0.6 --generations 9".split())
    vibro.main()
    options = asked["KTaSe3"]
    assert options["delta"] == [0.05, 0.01] and options["scales"] == [0.3, 0.6] and options["ratios"] == [0.0, 1.0]
    assert options["generations"] == 9 and options["population"] == 3
    assert vibro.settings(delta=options["delta"], fmax=options["fmax"]) == [[(2, 2, 2)] * 2, [0.05, 0.01], [0.05, 0.01]]


@pytest.mark.parametrize("lowest, rows, expected", [((-1.0, 0.2, 0.2), 1, 2), ((-1.0, -0.8, -0.7), 1, 3), ((-1.0, 0.2, 0.2), 0, 1)])
def test_rounds_go_on_below_a_soft_cell_and_end_at_a_stable_one(monkeypatch, tmp_path, lowest, rows, expected):
    """rows: cells that a search after the first finds."""
    cells, given = [{"energy_per_atom": -3.0 - k, "lattice": FCC[0], "symbols": FCC[1], "frac": [[0.1 * k, 0, 0]]} for k in range(3)], []

    def search(cell, calculator, folder, **options):
        given.append((cell[2][0][0], folder.name, options))
        return {"lowest": -1.5, "soft": True, "setting": {}, "rows": cells[len(given) - 1:][:1 if len(given) == 1 else rows]}
    monkeypatch.setattr(vibro, "search", search)
    monkeypatch.setattr(repair, "examine", lambda cell, calculator: cells[len(given) - 1] | {
        "status": "ok", "lowest": lowest[len(given) - 1], "lowest_exact": lowest[len(given) - 1]})
    monkeypatch.setattr(repair, "stable", lambda best: best["lowest"] > 0)
    done = vibro.in_rounds("Cu", FCC, EMT(), tmp_path, rounds=3, generations=4)
    assert len(done) == expected and [best["lowest"] for _, best in done] == list(lowest[:expected])
    assert [g[1] for g in given] == [f"round{k}" for k in range(len(given))] and all(g[2] == {"generations": 4} for g in given)
    assert [g[0] for g in given] == [0.0, 0.0, 0.1][:len(given)]                      # each below the best of the round before


def test_no_round_is_no_search(tmp_path):
    with pytest.raises(ValueError, match="Cu: rounds=0"):
        vibro.in_rounds("Cu", FCC, EMT(), tmp_path, rounds=0)
