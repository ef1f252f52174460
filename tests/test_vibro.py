"""VibroML with our calculators: a stable crystal is told, a soft one searched (slow), a missing package and a stop are clear errors."""

import sys

import pytest
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

from meidnet_core import candidates, potentials, relax, vibro

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


@pytest.mark.slow
def test_its_search_goes_below_the_cubic_phase(tmp_path):
    calculator = potentials.get_calculator("sevennet-0", "cpu")
    row = relax.relax(candidates.cells_of(["KTaSe3"])[0], calculator)
    out = vibro.search((row["lattice"], row["symbols"], row["frac"]), calculator, tmp_path, generations=1, population=2, offspring=2)
    best = out["rows"][0]
    assert out["soft"] and best["energy_per_atom"] < row["energy_per_atom"] - 0.05
    assert relax.to_atoms((best["lattice"], best["symbols"], best["frac"])).get_chemical_symbols().count("Se") % 3 == 0
