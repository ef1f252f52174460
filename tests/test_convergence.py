"""The scan of cutoff and mesh: what is varied, what is counted from where, what is kept."""

import pytest

from meidnet_core import convergence, dft, results


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """GPAW's place is taken by a formula: the energy falls with the cutoff, the gap with the mesh."""
    jobs = {}

    def collect(name, job, folder, profile):
        s = job["settings"]
        return {"status": "ok", "energy_per_atom": 1 / s["cutoff"], "gap": {"indirect": 1 / s["kpts"][0]}, "seconds": 2.0}

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results.write_run, "__kwdefaults__", results.write_run.__kwdefaults__ | {"root": tmp_path})
    monkeypatch.setattr(dft, "cubic_start", lambda f: ([5.2] * 3 + [90.0] * 3, ["Ba", "Hf", "Se", "Se", "Se"], []))
    monkeypatch.setattr(dft, "prepare", lambda cell, s, kind: {"settings": {"cutoff": s.cutoff, "kpts": s.kpts}, "kind": kind})
    monkeypatch.setattr(dft, "execute", lambda job, folder, ranks: jobs.setdefault(folder.name, job))
    monkeypatch.setattr(dft, "collect", collect)
    return jobs


def test_one_setting_at_a_time_is_varied(fake):
    rows = convergence.measure("BaHfSe3")
    asked = [("cutoff", c) for c in convergence.CUTOFFS] + [("mesh", n) for n in convergence.MESHES]
    assert [(r["varied"], r["value"]) for r in rows] == asked
    assert len(fake) == len(rows) and {j["kind"] for j in fake.values()} == {"static"}
    assert {j["settings"]["kpts"] for f, j in fake.items() if "cutoff" in f} == {convergence.BASE.kpts}
    assert {j["settings"]["cutoff"] for f, j in fake.items() if "mesh" in f} == {convergence.BASE.cutoff}


def test_differences_are_counted_from_the_finest(fake):
    rows = convergence.relative(convergence.measure("BaHfSe3"))
    assert rows[4]["energy"] == rows[7]["gap"] == 0
    m = results.read_run("dft-convergence", convergence.write("BaHfSe3").stem)["metrics"]
    assert m == {k: rows[i][k.split("_")[1]] for k, i in (("cutoff_energy", 0), ("cutoff_gap", 0), ("mesh_energy", 5), ("mesh_gap", 5))}
    assert rows[0]["energy"] == pytest.approx(1000 * (1 / 350 - 1 / 700)) and rows[5]["gap"] == pytest.approx(1000 * (1 / 4 - 1 / 8))


def test_a_run_that_does_not_converge_is_named(fake, monkeypatch):
    monkeypatch.setattr(dft, "collect", lambda *a: {"status": "scf: not converged"})
    with pytest.raises(dft.DFTError, match="BaHfSe3, cutoff 350: scf: not converged"):
        convergence.measure("BaHfSe3")
