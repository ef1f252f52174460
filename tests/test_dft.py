"""Electronic structure: gaps of hand-made bands, labelled failures, resume; silicon and MgO against known PBE numbers.

The small GPAW runs need `make dft` and are skipped without it. All results and run folders lie in tmp_path.
"""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from meidnet_core import crystal, dft, gpaw_job

needs_gpaw = pytest.mark.skipif(not dft.available(), reason="GPAW is not installed here: run `make dft`")
needs_seekpath = pytest.mark.skipif(importlib.util.find_spec("seekpath") is None, reason="seekpath is not installed: run `make dft`")


DIAMOND, ROCKSALT = [[0, 0, 0], [0.25, 0.25, 0.25]], [[0, 0, 0], [0.5, 0.5, 0.5]]


def fcc(a, symbols, frac):
    return [a / 2**0.5] * 3 + [60.0] * 3, symbols, np.array(frac, float)


SILICON, MGO = fcc(5.43, ["Si", "Si"], DIAMOND), fcc(4.212, ["Mg", "O"], ROCKSALT)
COPPER = ([3.6] * 3 + [90.0] * 3, ["Cu"] * 4, np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]))
PEROVSKITE = ([4.0] * 3 + [90.0] * 3, ["Ba", "Ti", "O", "O", "O"], crystal.PEROVSKITE)
TINY = dft.Settings(250, (2, 2, 2), (3, 3, 3), 0.05, 30)                  # in the small cells of this file: 4x4x4 and 5x5x5
LEAST = dft.Settings(200, (1, 1, 1), (1, 1, 1), 0.05, 0)                  # 2x2x2


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Nothing is read from or written to data/dft and runs/dft; what `import gpaw` does to NumPy's errors ends with the test."""
    before = np.geterr()
    monkeypatch.setattr(dft, "STORE", tmp_path / "store")
    monkeypatch.setattr(dft, "WORK", tmp_path / "work")
    monkeypatch.setattr(dft, "PROFILES", {"tiny": TINY, "least": LEAST, "two": replace(LEAST, maxiter=2)})
    yield
    np.seterr(**before)


@pytest.fixture
def no_gpaw(monkeypatch):
    monkeypatch.setattr(dft, "available", lambda: False)


@pytest.fixture
def no_setups(monkeypatch):
    """Jobs without a look at gpaw-data."""
    monkeypatch.setattr(dft, "setups_for", lambda *args, **kwargs: {})


def as_in_gpaw():
    """GPAW has NumPy raise on invalid arithmetic, in all that runs in its process."""
    return np.errstate(over="raise", divide="raise", invalid="raise", under="ignore")


def here(job, folder, ranks=1, timeout=None):
    """dft.execute within this process: the steps are those of gpaw_job, the start of Python is saved."""
    import gpaw
    folder.mkdir(parents=True, exist_ok=True)
    gpaw.setup_paths[:] = [*dft._standard_setups(), *(p for p in gpaw.setup_paths if p not in dft._standard_setups())]
    with as_in_gpaw():
        gpaw_job.run(json.loads(json.dumps(job)), folder)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(dft, "execute", here)


# ---- gaps ---------------------------------------------------------------------------------------

K = [[0, 0, 0], [0.25, 0, 0], [0.5, 0, 0]]


def test_gap_of_a_direct_insulator():
    g = dft.gaps([[[-3, -1.0, 0.5, 4], [-3, -1.5, 1.0, 4], [-3, -2.0, 2.0, 4]]], K, 4)
    assert g["indirect"] == g["direct"] == g["overlap"] == pytest.approx(1.5) and g["metal"] is False
    assert g["vbm_k"] == g["cbm_k"] == g["direct_k"] == K[0]


def test_gap_of_an_indirect_insulator():
    g = dft.gaps([[[-1.0, 2.0], [-1.5, 0.7], [-2.0, 0.5]]], K, 2)
    assert g["indirect"] == pytest.approx(1.5) and g["direct"] == pytest.approx(2.2) and not g["metal"]
    assert (g["vbm_k"], g["cbm_k"], g["direct_k"]) == (K[0], K[2], K[1])


def test_the_number_of_electrons_says_which_bands_are_filled():
    bands = [[[-3, -1, 0.5, 4.0], [-3, -1, 0.5, 5.0], [-3, -1, 0.5, 4.5]]]
    assert [dft.gaps(bands, K, n)["indirect"] for n in (2, 4, 6)] == pytest.approx([2.0, 1.5, 3.5])
    assert dft.gaps(bands, K, 3.9999996)["indirect"] == pytest.approx(1.5)                # as a calculation sums it up


def test_overlapping_bands_are_a_metal_with_a_negative_overlap():
    g = dft.gaps([[[-1.0, 2.0], [0.2, 1.0], [-2.0, -0.3]]], K, 2)
    assert g["metal"] is True and g["indirect"] == g["direct"] == 0.0
    assert g["overlap"] == pytest.approx(-0.5) and (g["vbm_k"], g["cbm_k"]) == (K[1], K[2])


def test_touching_bands_are_a_metal():
    assert dft.gaps([[[0.0, 0.0], [-1, 1]]], K[:2], 2)["metal"] is True


def test_an_odd_electron_leaves_a_hole_whatever_the_bands_do():
    g = dft.gaps([[[-1.0, 2.0], [0.1, 2.0], [-0.5, 2.0]]], K, 1)                            # half-filled, far from the next band
    assert g["metal"] is True and g["indirect"] == g["direct"] == 0.0 and g["overlap"] == pytest.approx(1.9)


def test_the_window_of_a_metal_lies_off_its_fermi_level():
    bands = [[[-1.0, -0.5, 1.5], [0.2, 0.3, 1.9], [-2.0, -0.3, 1.6]]]                        # a gap of 1.2 eV whose middle is at 0.9 eV
    assert dft.window(bands) == pytest.approx({"window": 1.2, "window_at": 0.9})
    assert dft.window(bands, within=0.5) == {"window": 0.0, "window_at": None}
    other = [[[0.0, 0.8], [0.1, 0.9], [0.0, 0.7]]]                                           # the other spin fills a part of it
    assert dft.window(np.concatenate([np.array(bands)[..., 1:], other])) == pytest.approx({"window": 0.6, "window_at": 1.2})
    assert dft.gaps(bands, K, 2)["window"] == pytest.approx(1.2) and dft.gaps(bands, K, 2)["metal"]


UP, DOWN = [[-2, -1, 1.0], [-2, -0.8, 1.5]], [[-2, 0.6, 3], [-2, 0.9, 3]]                    # two electrons up, one down


def test_gap_of_a_magnetic_insulator_is_between_all_and_within_each_spin():
    g = dft.gaps([UP, DOWN], K[:2], 3, magnetic=True)
    assert g["metal"] is False and g["indirect"] == pytest.approx(1.4)                       # up top -0.8, down bottom 0.6
    assert g["direct"] == pytest.approx(2.0) and (g["vbm_k"], g["cbm_k"]) == (K[1], K[0])


def test_a_half_metal_is_a_metal():
    crossing = [[-2, -0.2, 3], [-2, 0.3, 3]]
    g = dft.gaps([UP, crossing], K[:2], 3, magnetic=True)
    assert g["metal"] is True and g["indirect"] == g["direct"] == 0.0
    assert dft.gaps([UP, DOWN], K[:2], 3)["metal"] is True                                   # the same bands, were they not magnetic


def test_a_magnetic_metal_whose_counts_average_out():
    up = [[-2, -0.5, -0.1], [-2, -0.5, 0.2], [-2, 0.1, 0.5]]                                 # 3, 2 and 1 levels below
    assert dft.gaps([up, DOWN + [[-2, 0.6, 3]]], K, 3, magnetic=True)["metal"] is True


# ---- path ---------------------------------------------------------------------------------------


@needs_seekpath
def test_path_of_a_cubic_perovskite():
    cell, path = dft.band_path(PEROVSKITE, 60)
    assert np.allclose(cell[0], PEROVSKITE[0]) and list(cell[1]) == PEROVSKITE[1] and np.allclose(cell[2] % 1, PEROVSKITE[2] % 1)
    names = [name for _, name in path["labels"]]
    assert set("|".join(names).split("|")) == {"Γ", "X", "M", "R"} and names[:4] == ["Γ", "X", "M", "Γ"]
    assert 45 <= len(path["kpoints"]) <= 75 and len(path["kpoints"]) == len(path["distance"])
    assert (np.diff(path["distance"]) >= 0).all() and path["labels"][0][0] == 0 and path["labels"][-1][0] == path["distance"][-1]
    special = {"Γ": [0, 0, 0], "X": [0, 0.5, 0], "M": [0.5, 0.5, 0], "R": [0.5, 0.5, 0.5]}
    for x, name in path["labels"]:
        at = [k for k, d in zip(path["kpoints"], path["distance"]) if abs(d - x) < 1e-6]
        assert sorted(map(sorted, at)) == sorted(sorted(special[n]) for n in name.split("|"))


@needs_seekpath
def test_a_jump_is_one_label_of_two_names():
    jumps = [(x, name) for x, name in dft.band_path(PEROVSKITE, 60)[1]["labels"] if "|" in name]
    assert [name for _, name in jumps] == ["X|R"]
    assert [name for _, name in dft.band_path(SILICON, 60)[1]["labels"]] == ["Γ", "X", "U|K", "Γ", "L", "W", "X"]


@needs_seekpath
def test_more_points_are_a_denser_path():
    few, many = (len(dft.band_path(PEROVSKITE, n)[1]["kpoints"]) for n in (40, 160))
    assert 2.5 < many / few < 6


@needs_seekpath
def test_a_conventional_cell_becomes_primitive():
    frac = np.concatenate([COPPER[2], COPPER[2] + 0.25])
    cell, _ = dft.band_path(([5.43] * 3 + [90.0] * 3, ["Si"] * 8, frac), 20)
    assert list(cell[1]) == ["Si", "Si"] and np.allclose(cell[0], SILICON[0])


# ---- jobs and setups ----------------------------------------------------------------------------


def test_without_gpaw_the_message_says_what_to_run(no_gpaw):
    with pytest.raises(dft.DFTError, match="make dft"):
        dft.setups_for(["Si"], "PBE")
    with pytest.raises(dft.DFTError, match="make dft"):
        dft.run("Si", SILICON, "least", "static")
    assert not dft.STORE.exists() and not dft.WORK.exists()


def test_a_stored_result_needs_no_gpaw(no_gpaw):
    dft.save(result(), dft.STORE)
    assert dft.run("Si", SILICON, "least", "static")["gap"]["indirect"] == 0.6


@needs_gpaw
def test_an_element_without_a_setup_is_named():
    with pytest.raises(dft.DFTError, match="GLLBSC.*La"):
        dft.setups_for(["La", "O"], "GLLBSC")
    assert dft.setups_for(["La", "O"], "PBE") == {} == dft.setups_for(["Sr", "Ti", "O"], "GLLBSC")


@needs_gpaw
def test_lanthanides_get_the_4f_core_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEIDNET_CACHE", str(tmp_path))
    dft.setup_folder().mkdir(parents=True)
    (dft.setup_folder() / "Yb.3p.PBE").write_text("there")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("made again"))
    assert dft.setups_for(["Yb", "Sc", "Se"], "PBE") == {"Yb": "3p"}


@needs_gpaw
def test_a_setup_that_was_not_made_is_an_error_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("MEIDNET_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda words, **kwargs: subprocess.CompletedProcess(words, 1, "", "ghost state"))
    with pytest.raises(dft.DFTError, match="Tm.*ghost state"):
        dft.setups_for(["Tm"], "PBE")


@needs_seekpath
def test_moments_follow_the_atoms_into_the_primitive_cell(no_setups):
    cell = ([4.0] * 3 + [90.0] * 3, ["Se", "Mn", "Se", "Yb", "Se"], crystal.PEROVSKITE[[2, 1, 3, 0, 4]])
    job = dft.prepare(cell, TINY)
    assert [m for e, m in zip(job["cell"][1], job["magmoms"]) if e == "Mn"] == [4.0] and sum(job["magmoms"]) == 4.0
    europium = PEROVSKITE[0], ["Eu", "Ta", "O", "O", "O"], PEROVSKITE[2]
    assert dft.prepare(europium, TINY)["magmoms"][0] == 7.0
    job = dft.prepare(europium, TINY, setups={"Eu": "2p", "Yb": "2p"})                        # its 4f electrons are in the core
    assert job["magmoms"] == [] and job["setups"] == {"Eu": "2p"}
    assert dft.prepare(cell, TINY, moments=False)["magmoms"] == [] == dft.prepare(PEROVSKITE, TINY)["magmoms"]
    assert job["xc"] == "PBE" and dft.prepare(PEROVSKITE, LEAST, "gllbsc")["xc"] == "GLLBSC"


def test_moments_of_single_sites(no_setups):
    assert dft.prepare(SILICON, LEAST, "static", moments=(2, -2))["magmoms"] == [2.0, -2.0]
    assert dft.prepare(SILICON, LEAST, "static", moments=(0, 0))["magmoms"] == []
    with pytest.raises(dft.DFTError, match="3 moments for 2 sites"):
        dft.prepare(SILICON, LEAST, "static", moments=(1, 2, 3))
    with pytest.raises(dft.DFTError, match="no bands"):                                      # seekpath may order the sites anew
        dft.prepare(SILICON, LEAST, moments=(2, -2))


@needs_seekpath
def test_meshes_have_the_density_of_the_cubic_cell(no_setups):
    settings = replace(LEAST, kpts=(6, 6, 6), dos_kpts=(8, 8, 8))
    mesh = lambda *edges: dft.for_cell(settings, [*edges, 90, 90, 90])
    assert mesh(5.2, 5.2, 5.2) == settings
    assert mesh(5.2, 10.4, 2.6).kpts == (6, 3, 12) and mesh(5.2, 10.4, 2.6).dos_kpts == (8, 4, 16)
    assert mesh(500, 500, 500).kpts == (1, 1, 1)
    long = ([5.2, 5.2, 10.4, 90, 90, 90], ["Si"], np.zeros((1, 3)))
    assert dft.prepare(long, settings, "polymorph")["settings"]["kpts"] == (6, 6, 3)
    assert dft.prepare(long, settings, "static")["settings"]["kpts"] == (6, 6, 3)
    small = ([3.9] * 3 + [90] * 3, PEROVSKITE[1], PEROVSKITE[2])                             # what the meshes are meant for
    assert dft.prepare(small, settings, "static")["settings"]["kpts"] == dft.prepare(small, settings)["settings"]["kpts"] == (6, 6, 6)


@needs_seekpath
def test_the_path_is_that_of_the_symmetry_behind_the_last_digits():
    tetragonal = ([4.0, 4.0, 4.3, 90, 90, 90], PEROVSKITE[1], np.array(PEROVSKITE[2]) + np.random.default_rng(0).normal(0, 2e-4, (5, 3)))
    names = lambda cell: {name for _, label in dft.band_path(cell, 40)[1]["labels"] for name in label.split("|")}
    assert names(tetragonal) == {"Γ", "X", "M", "Z", "R", "A"}


def test_another_job_in_the_folder_is_refused(no_setups, tmp_path, monkeypatch):
    first, second = (dft.prepare(SILICON, s, "static") for s in (LEAST, replace(LEAST, cutoff=210)))
    (tmp_path / "job.json").write_text(json.dumps(first, sort_keys=True))
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("started"))
    with pytest.raises(dft.DFTError, match=re.escape(str(tmp_path)) + ".*another calculation"):
        dft.execute(second, tmp_path, 1)
    assert json.loads((tmp_path / "job.json").read_text())["settings"]["cutoff"] == 200


def test_the_folder_of_a_job_may_be_relative(no_setups, tmp_path, monkeypatch):
    monkeypatch.setattr(dft, "_standard_setups", lambda: [""])
    monkeypatch.setattr(subprocess, "run", lambda words, **options: started.append(words) or subprocess.CompletedProcess(words, 0))
    monkeypatch.chdir(tmp_path)
    started = []
    dft.execute(dft.prepare(SILICON, LEAST, "static"), "runs/si", 1)
    assert started[0][-1] == str(tmp_path / "runs" / "si") and (tmp_path / "runs" / "si" / "job.json").exists()


@needs_gpaw
def test_a_process_that_dies_is_an_error_with_its_last_words(tmp_path):
    job = dft.prepare(SILICON, LEAST, "static")
    del job["steps"]
    with pytest.raises(dft.DFTError, match=re.escape(str(tmp_path)) + "(.|\n)*KeyError: 'steps'"):
        dft.execute(job, tmp_path, 1)


# ---- collect ------------------------------------------------------------------------------------


def steps_in(folder, **records):
    folder.mkdir(parents=True, exist_ok=True)
    for step, record in records.items():
        (folder / f"{step}.json").write_text(json.dumps({"status": "ok", "seconds": 1.0} | record))


MESH = {"energy_per_atom": -5.0, "efermi": 6.0, "energies": [[[-1.0, 2.0, 5.0], [-2.0, 1.5, 5.0]]], "moment": 0.0, "kpoints": K[:2],
        "weights": [0.5, 0.5], "electrons": 2.0, "lattice": [4.0] * 3 + [60.0] * 3, "symbols": ["Si", "Si"], "frac": DIAMOND}
LINE = {"energies": [[[-1.0, 2.0], [-1.5, 0.5]]], "kpoints": [K[0], K[2]], "distance": [0.0, 1.0], "labels": [[0.0, "Γ"], [1.0, "X"]]}


def test_the_gap_is_that_of_the_mesh_and_the_path_together(no_setups, tmp_path):
    job = dft.prepare(SILICON, LEAST, "waves")
    steps_in(tmp_path, scf=MESH)
    part = dft.collect("Si", job, tmp_path, "least")
    assert part["status"] == "bands: not run" and part["gap"]["indirect"] == pytest.approx(2.5) and part["bands"] is None
    steps_in(tmp_path, scf=MESH, bands=LINE, dos={"energies": [0.0, 1.0], "total": [[0.0, 1.0]]})
    out = dft.collect("Si", job, tmp_path, "least")
    assert out["status"] == "ok" and out["gap"]["indirect"] == pytest.approx(1.5) and out["gap"]["cbm_k"] == K[2]
    assert out["cell"][0] == MESH["lattice"] and out["seconds"] == 3.0 and out["dos"]["total"].shape == (1, 2)


def test_levels_of_another_basis_have_a_gap_of_their_own(no_setups, tmp_path):
    job = dft.prepare(SILICON, LEAST, "polymorph")
    assert job["basis"] == dft.BASIS and "basis" not in dft.prepare(SILICON, LEAST, "waves")
    steps_in(tmp_path, scf=MESH, basis={"error": 0.04, "levels": 4}, bands=LINE, dos={"energies": [0.0, 1.0], "total": [[0.0, 1.0]]})
    out = dft.collect("Si", job, tmp_path, "least")
    assert out["gap"]["indirect"] == pytest.approx(2.5) and out["path_gap"]["indirect"] == pytest.approx(1.5)
    assert out["basis"]["name"] == dft.BASIS and out["basis"]["error"] == 0.04


def test_the_first_step_without_a_result_is_the_status(no_setups, tmp_path):
    job = dft.prepare(SILICON, LEAST, "waves")
    assert dft.collect("Si", job, tmp_path, "least")["status"] == "scf: not run"
    steps_in(tmp_path, scf=MESH, bands={"status": "not converged"})
    out = dft.collect("Si", job, tmp_path, "least")
    assert out["status"] == "bands: not converged" and out["energy_per_atom"] == -5.0 and out["bands"] is None


# ---- run and storage ----------------------------------------------------------------------------


def result(**changes):
    return {"engine": "gpaw", "name": "Si", "profile": "least", "status": "ok", "bands": None, "dos": None, "seconds": 1.0,
            "cell": [SILICON[0], SILICON[1], DIAMOND], "settings": json.loads(json.dumps(asdict(LEAST))), "setups": {}, "xc": "PBE",
            "gap": {"indirect": 0.6, "metal": False}} | changes


def test_a_stored_result_is_read_and_not_calculated(dft_arrays, monkeypatch):
    dft.save(result(**dft_arrays, eos={"volume": 40.0}), dft.STORE)
    monkeypatch.setattr(dft, "execute", lambda *args: pytest.fail("calculated again"))
    assert dft.run("Si", SILICON, "least")["bands"]["energies"].shape == (1, 7, 4)
    nearly = fcc(5.50, *SILICON[1:])                                                         # the start need not be the minimum
    assert dft.run("Si", nearly, "least")["status"] == "ok"
    with pytest.raises(dft.DFTError, match="another crystal"):                               # of an equation of state
        dft.run("Si", nearly, "least", "static")


@pytest.mark.parametrize("asked", [{"kind": "pbe"}, {"kind": "polymorph"}, {"setups": {"Si": "other"}}], ids=str)
def test_a_stored_result_of_other_steps_or_setups_is_refused(asked, monkeypatch):
    dft.save(result(), dft.STORE)
    monkeypatch.setattr(dft, "execute", lambda *args: pytest.fail("calculated"))
    with pytest.raises(dft.DFTError, match="Si: .*setups or steps"):
        dft.run("Si", SILICON, "least", **{"kind": "static"} | asked)


OTHERS = {"elements": fcc(5.43, ["Ge", "Ge"], DIAMOND), "composition": fcc(5.43, ["Si", "C"], DIAMOND), "volume": fcc(6.2, *SILICON[1:])}


@pytest.mark.parametrize("other", OTHERS)
def test_a_stored_result_of_another_crystal_is_refused(other, monkeypatch):
    dft.save(result(), dft.STORE)
    monkeypatch.setattr(dft, "execute", lambda *args: pytest.fail("calculated"))
    with pytest.raises(dft.DFTError, match="Si: .*another crystal"):
        dft.run("Si", OTHERS[other], "least")


@pytest.mark.parametrize("change", [{"cutoff": 700}, {"path_points": LEAST.path_points + 6}])
def test_a_stored_result_with_other_settings_is_refused(change, monkeypatch):
    dft.save(result(), dft.STORE)
    monkeypatch.setattr(dft, "PROFILES", {"least": replace(LEAST, **change)})
    monkeypatch.setattr(dft, "execute", lambda *args: pytest.fail("calculated"))
    with pytest.raises(dft.DFTError, match="settings"):
        dft.run("Si", SILICON, "least")


def test_a_calculation_out_of_time_is_a_row_and_goes_on(no_setups, monkeypatch):
    calls = []

    def slow(job, folder, ranks, timeout):
        calls.append(timeout)
        dos = {"energies": [0.0], "total": [[1.0]]}
        steps_in(folder, **({"scf": MESH | {"lattice": SILICON[0]}} if len(calls) == 1 else {"bands": LINE, "dos": dos}))
        (folder / "scf.gpw").touch()
        if len(calls) == 1:
            raise subprocess.TimeoutExpired("mpirun", timeout)

    monkeypatch.setattr(dft, "execute", slow)
    first = dft.run("Si", SILICON, "least", "waves", timeout=9)
    assert first["status"] == "bands: not run" == dft.load("Si", "least", dft.STORE)["status"] and calls == [9]
    assert (dft.WORK / "Si-least" / "scf.gpw").exists()                                      # the next call starts from it
    second = dft.run("Si", SILICON, "least", "waves", timeout=9)
    assert second["status"] == "ok" and len(calls) == 2 and not (dft.WORK / "Si-least" / "scf.gpw").exists()
    assert dft.run("Si", SILICON, "least", "waves")["gap"] == second["gap"] and len(calls) == 2


# ---- steps, with EMT in the place of GPAW or nothing at all ----------------------------------------


def fake(seen, *names, fail=None):
    """Steps that write down that they ran; `fail`: {name: exception}."""

    def step(name):
        def do(job, folder):
            seen.append(name)
            if name in (fail or {}):
                raise fail[name]
            return {"value": len(seen)}
        return do

    return {name: step(name) for name in names}


@needs_gpaw
def test_steps_that_are_there_are_not_run_again(monkeypatch, tmp_path):
    seen, job = [], {"steps": ["eos", "scf", "bands"]}
    monkeypatch.setattr(gpaw_job, "STEPS", fake(seen, "eos", "scf", "bands", fail={"scf": KeyboardInterrupt()}))
    with pytest.raises(KeyboardInterrupt):
        gpaw_job.run(job, tmp_path)
    assert seen == ["eos", "scf"] and gpaw_job.read(tmp_path, "scf") is None
    before = (tmp_path / "eos.json").stat().st_mtime_ns
    monkeypatch.setattr(gpaw_job, "STEPS", fake(seen, "eos", "scf", "bands"))
    gpaw_job.run(job, tmp_path)
    assert seen == ["eos", "scf", "scf", "bands"] and (tmp_path / "eos.json").stat().st_mtime_ns == before
    gpaw_job.run(job, tmp_path)
    assert len(seen) == 4 and not list(tmp_path.glob(".*"))


@needs_gpaw
@pytest.mark.parametrize("error, status", [(ValueError("no minimum"), "failed: ValueError: no minimum"),
                                           (FileNotFoundError("Xx.PBE"), "failed: FileNotFoundError"),
                                           pytest.param(IndexError("band 5"), "failed: IndexError")])
def test_a_step_that_fails_is_a_row_and_the_last(error, status, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(gpaw_job, "STEPS", fake(seen, "eos", "scf", fail={"eos": error}))
    gpaw_job.run({"steps": ["eos", "scf"]}, tmp_path)
    record = gpaw_job.read(tmp_path, "eos")
    assert record["status"].startswith(status) and record["seconds"] >= 0 and seen == ["eos"]
    gpaw_job.run({"steps": ["eos", "scf"]}, tmp_path)
    assert seen == ["eos", "eos"]                                                            # tried again, and not passed over


@pytest.fixture
def emt(monkeypatch):
    """Copper by EMT: the cells that are asked for an energy."""
    from ase.calculators.emt import EMT
    asked = []

    class Counted(EMT):
        stop = None

        def calculate(self, atoms=None, *args, **kwargs):
            if Counted.stop == len(asked):
                raise KeyboardInterrupt
            asked.append(atoms.get_volume())
            super().calculate(atoms, *args, **kwargs)

    Counted.asked = asked
    monkeypatch.setattr(gpaw_job, "calculator", lambda *args, **kwargs: Counted())
    with as_in_gpaw():
        yield Counted


JOB = {"cell": [COPPER[0], COPPER[1], COPPER[2].tolist()], "magmoms": [], "steps": ["eos"]}


@needs_gpaw
def test_an_equation_of_state_goes_on_at_the_next_point(emt, tmp_path):
    (tmp_path / "whole").mkdir()
    gpaw_job.run(JOB, tmp_path / "whole")
    whole = gpaw_job.read(tmp_path / "whole", "eos")
    assert len(emt.asked) == 5 and whole["status"] == "ok" and whole["volume"] ** (1 / 3) == pytest.approx(3.59, abs=0.01)
    assert whole["bulk_modulus"] == pytest.approx(134, abs=10)                               # GPa, EMT of copper
    emt.asked.clear()
    emt.stop = 2
    with pytest.raises(KeyboardInterrupt):
        gpaw_job.run(JOB, tmp_path)
    assert len(gpaw_job.read(tmp_path, "eos-points")) == 2 and gpaw_job.read(tmp_path, "eos") is None
    emt.stop = None
    gpaw_job.run(JOB, tmp_path)
    assert len(emt.asked) == 5 and len(set(np.round(emt.asked, 6))) == 5                     # each cell once
    again = gpaw_job.read(tmp_path, "eos")
    assert again["energies"] == whole["energies"] and again["volume"] == whole["volume"]


@needs_gpaw
@pytest.mark.parametrize("a", [3.50, 3.75])
def test_an_equation_of_state_goes_on_beyond_an_edge(a, emt, tmp_path):
    gpaw_job.run(JOB | {"cell": [[a] * 3 + [90.0] * 3, *JOB["cell"][1:]]}, tmp_path)
    found = gpaw_job.read(tmp_path, "eos")
    assert found["status"] == "ok" and found["volume"] ** (1 / 3) == pytest.approx(3.59, abs=0.003)
    assert 5 < len(emt.asked) == len(set(np.round(emt.asked, 6))) <= gpaw_job.MOST and found["volumes"] == sorted(emt.asked)
    assert min(found["volumes"]) < found["volume"] < max(found["volumes"])


@needs_gpaw
@pytest.mark.parametrize("a", [3.2, 3.9])
def test_a_minimum_outside_the_strained_cells_is_no_result(a, emt, tmp_path):
    gpaw_job.run(JOB | {"cell": [[a] * 3 + [90.0] * 3, *JOB["cell"][1:]]}, tmp_path)
    assert "outside the strained cells" in gpaw_job.read(tmp_path, "eos")["status"] and len(emt.asked) == gpaw_job.MOST


@needs_gpaw
def test_a_relaxation_goes_on_where_it_was_killed(emt, tmp_path):
    frac = COPPER[2] + np.array([[0.02, 0, 0], [0, 0.01, 0], [0, 0, 0], [0, 0, 0]])
    job = JOB | {"cell": [[3.5, 3.55, 3.6, 90.0, 90.0, 90.0], COPPER[1], frac.tolist()], "steps": ["relax"], "settings": {"cutoff": 200}}
    emt.stop = 3
    with pytest.raises(KeyboardInterrupt):
        gpaw_job.run(job, tmp_path)
    kept = gpaw_job.read(tmp_path, "relax-path")
    assert len(kept) == 3 and gpaw_job.read(tmp_path, "relax") is None
    emt.stop = None
    gpaw_job.run(job, tmp_path)
    found = gpaw_job.read(tmp_path, "relax")
    assert found["status"] == "ok" and found["lattice"] == pytest.approx([3.59] * 3 + [90] * 3, abs=0.05)
    assert gpaw_job.read(tmp_path, "relax-path")[:3] == kept and found["steps"] < gpaw_job.MOVES
    assert found["energy"] < min(step["energy"] for step in kept)


@needs_gpaw
def test_a_relaxation_that_takes_too_long_says_so(emt, tmp_path, monkeypatch):
    monkeypatch.setattr(gpaw_job, "MOVES", 2)
    job = JOB | {"cell": [[3.3, 3.5, 3.9, 90.0, 90.0, 90.0], *JOB["cell"][1:]], "steps": ["relax", "scf"], "settings": {"cutoff": 200}}
    gpaw_job.run(job, tmp_path)
    assert gpaw_job.read(tmp_path, "relax")["status"] == "not relaxed in 2 steps" and gpaw_job.read(tmp_path, "scf") is None


def points_at(energies):
    """(volume, energy) points of a cell of volume 1 from {strain: energy}."""
    return [[(1 + s) ** 3, e] for s, e in energies.items()]


def test_the_next_strain():
    assert gpaw_job.next_strain([], 1.0) == gpaw_job.STRAINS[0]
    well = dict(zip(sorted(gpaw_job.STRAINS), [2.0, 1.0, 0.0, 1.0, 2.0]))
    assert gpaw_job.next_strain(points_at(well), 1.0) is None
    assert gpaw_job.next_strain(points_at({s: e for s, e in well.items() if s != 0.01}), 1.0) == 0.01
    down, up = ({s: sign * s for s in well} for sign in (1, -1))
    assert gpaw_job.next_strain(points_at(down), 1.0) == -0.03 and gpaw_job.next_strain(points_at(up), 1.0) == 0.03
    assert gpaw_job.next_strain(points_at(down | {-0.03: 1.0}), 1.0) is None                 # now the lowest is inside
    assert gpaw_job.next_strain(points_at(down | {-0.03: -0.03, -0.04: -0.04, -0.05: -0.05, -0.06: -0.06}), 1.0) is None      # enough


def asked_of(energy):
    """The strains at which next_strain asks for the energy of a cell, in their order."""
    done = {}
    while (strain := gpaw_job.next_strain(points_at(done), 1.0)) is not None:
        done[strain] = energy(strain)
    return list(done)


def test_a_minimum_near_the_start_takes_the_five_points_around_it():
    for lowest in (0.0, 0.004, -0.004, 0.011, -0.011):
        assert sorted(asked_of(lambda s, lowest=lowest: (s - lowest) ** 2)) == sorted(gpaw_job.STRAINS)


def test_points_follow_a_minimum_that_lies_elsewhere():
    assert asked_of(lambda s: (s - 0.021) ** 2) == [0.0, 0.01, -0.01, 0.02, 0.03]           # five, the lowest inside
    assert asked_of(lambda s: (s + 0.033) ** 2) == [0.0, 0.01, -0.01, -0.02, -0.03, -0.04]
    assert len(asked_of(lambda s: s)) == len(asked_of(lambda s: -s)) == gpaw_job.MOST       # never found: the fit says so


def test_points_of_a_killed_run_are_not_asked_for_again():
    kept = {-0.02: 2.0, -0.01: 1.0, 0.0: 0.0}                                                # in the order of an older version
    assert gpaw_job.next_strain(points_at(kept), 1.0) == 0.01
    assert gpaw_job.next_strain(points_at(kept | {0.01: 1.0}), 1.0) == 0.02


def test_later_steps_stand_at_the_volume_of_the_equation_of_state(tmp_path):
    assert gpaw_job.relaxed(JOB, tmp_path).get_volume() == pytest.approx(3.6**3)
    steps_in(tmp_path, eos={"volume": 45.0})
    atoms = gpaw_job.relaxed(JOB, tmp_path)
    assert atoms.get_volume() == pytest.approx(45.0) and np.allclose(atoms.get_scaled_positions(), COPPER[2])
    steps_in(tmp_path, eos={"volume": 45.0, "status": "failed: ValueError"})
    assert gpaw_job.relaxed(JOB, tmp_path).get_volume() == pytest.approx(3.6**3)


# ---- GPAW ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def silicon(tmp_path_factory):
    """(result, store, work) of all four steps, in a process of its own as users run it."""
    if not dft.available():
        pytest.skip("GPAW is not installed here: run `make dft`")
    root = tmp_path_factory.mktemp("silicon")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dft, "WORK", root / "work")
        patch.setattr(dft, "PROFILES", {"tiny": TINY})
        return dft.run("Si", SILICON, "tiny", ranks=1, store=root / "store"), root / "store", root / "work"


def test_lattice_constant_of_silicon(silicon):
    out = silicon[0]
    assert out["status"] == "ok" and 5.40 < (4 * out["eos"]["volume"]) ** (1 / 3) < 5.50     # PBE 5.47
    assert 80 < out["eos"]["bulk_modulus"] < 98                                              # PBE 88 GPa
    assert out["cell"][0][0] * 2**0.5 == pytest.approx((4 * out["eos"]["volume"]) ** (1 / 3), abs=1e-6)


def test_gaps_of_silicon(silicon):
    gap = silicon[0]["gap"]
    assert gap["metal"] is False and gap["indirect"] == pytest.approx(0.60, abs=0.08)        # PBE 0.6 eV near 0.85 of Γ-X
    assert gap["direct"] == pytest.approx(2.55, abs=0.1) and np.allclose([gap["vbm_k"], gap["direct_k"]], 0, atol=1e-6)
    assert sorted(gap["cbm_k"]) == pytest.approx([0, 0.4, 0.4], abs=0.05)
    assert silicon[0]["electrons"] == pytest.approx(8) and silicon[0]["moment"] == 0.0


def test_bands_of_silicon(silicon):
    bands = silicon[0]["bands"]
    names = [name for _, name in bands["labels"]]
    assert names[0] == "Γ" and "X" in names and bands["energies"].shape[1] == len(bands["distance"]) == len(bands["kpoints"])
    levels = bands["energies"][0, 0]                                                         # Γ: one s level, three p levels, PBE 12 eV
    assert levels[3] - levels[0] == pytest.approx(11.9, abs=0.3) and np.ptp(levels[1:4]) < 0.01
    assert (bands["energies"][0, :, :4] < 0).all() and (bands["energies"][0, :, 4:] > 0).all()


def test_the_density_of_states_vanishes_in_the_gap_and_only_there(silicon):
    out = silicon[0]
    e, total = out["dos"]["energies"], out["dos"]["total"][0]
    top, bottom = out["bands"]["energies"][0, :, 3].max(), out["bands"]["energies"][0, :, 4].min()
    assert total[(e > top + 0.03) & (e < bottom - 0.03)].max() == 0
    zeros = e[(total == 0) & (e > -5.5) & (e < 4)]
    assert zeros.min() == pytest.approx(top, abs=0.03) and bottom - 0.03 < zeros.max() < bottom + 0.25   # its mesh misses 0.85 of Γ-X


def test_a_stored_silicon_is_the_calculated_one(silicon):
    out, store, _ = silicon
    back = dft.load("Si", "tiny", store)
    assert back["gap"] == out["gap"] and back["bands"]["energies"] == pytest.approx(out["bands"]["energies"], abs=1e-5)
    assert back["dos"]["total"] == pytest.approx(out["dos"]["total"], abs=1e-5)


def test_a_second_run_calculates_nothing(silicon, monkeypatch, tmp_path):
    out, _, work = silicon
    monkeypatch.setattr(dft, "WORK", work)
    times = {p.name: p.stat().st_mtime_ns for p in (work / "Si-tiny").glob("*.json")}
    assert {"eos.json", "eos-points.json", "scf.json", "bands.json", "dos.json"} < times.keys()
    again = dft.run("Si", SILICON, "tiny", ranks=1, store=tmp_path)                           # the store is lost, the folder is not
    assert again["gap"] == out["gap"] and again["seconds"] == out["seconds"] and dft.load("Si", "tiny", tmp_path)["status"] == "ok"
    after = {p.name: p.stat().st_mtime_ns for p in (work / "Si-tiny").glob("*.json")}
    assert {k: v for k, v in after.items() if k != "job.json"} == {k: v for k, v in times.items() if k != "job.json"}


@needs_gpaw
@needs_seekpath
def test_mgo_is_an_insulator_with_a_direct_gap(monkeypatch, in_process):
    monkeypatch.setattr(dft, "PROFILES", {"tiny": dft.Settings(400, (2, 2, 2), (2, 2, 2), 0.05, 16)})    # 300 eV is too few for oxygen
    out = dft.run("MgO", MGO, "tiny", "waves")
    gap = out["gap"]
    assert out["status"] == "ok" and 4.4 < gap["indirect"] < 4.8 and gap["direct"] == pytest.approx(gap["indirect"], abs=1e-4)
    assert np.allclose([gap[k] for k in ("vbm_k", "cbm_k", "direct_k")], 0, atol=1e-6)
    e, total = out["dos"]["energies"], out["dos"]["total"][0]
    levels = out["bands"]["energies"][0]
    top, bottom = levels[:, 7].max(), levels[:, 8].min()                                     # both at Γ, on the mesh of the dos as well
    inside = e[(total == 0) & (e > -5) & (e < 5)]
    assert inside.min() == pytest.approx(top, abs=0.03) and inside.max() == pytest.approx(bottom, abs=0.03)
    oxygen = (e > levels[:, 5].min() - 0.5) & (e < bottom)
    assert np.trapezoid(total[oxygen], e[oxygen]) == pytest.approx(6, abs=0.05)              # the 2p shell, both spins


@needs_gpaw
def test_potassium_with_its_odd_electron_is_a_metal(in_process):
    out = dft.run("K", ([5.33 * 0.75**0.5] * 3 + [109.4712206] * 3, ["K"], np.zeros((1, 3))), "least", "static")
    assert out["status"] == "ok" and out["gap"]["metal"] is True


@needs_gpaw
def test_where_bold_mixing_does_not_converge_the_careful_one_does(in_process, monkeypatch, tmp_path):
    job = dft.prepare(SILICON, LEAST, "static")
    bold = gpaw_job.scf(job, tmp_path)
    tried, calculator = [], gpaw_job.calculator
    monkeypatch.setattr(gpaw_job, "calculator", lambda *args, **words: tried.append(args[3:]) or calculator(*args, **words))
    monkeypatch.setattr(gpaw_job, "PATIENCE", {"bold": (2, 2), "gentle": (2, 2)})
    careful = gpaw_job.scf(job, tmp_path)
    assert tried == [("bold",), ("gentle",), ("careful",)]
    assert careful["energy_per_atom"] == pytest.approx(bold["energy_per_atom"], abs=1e-5)
    again = gpaw_job.scf(job, tmp_path)
    assert tried[3:] == [("careful",)] and again["energy_per_atom"] == careful["energy_per_atom"]        # what swung is not tried again


@needs_gpaw
def test_a_mixing_that_swings_at_one_strain_is_left_out_at_the_next(monkeypatch, tmp_path):
    from gpaw import KohnShamConvergenceError
    tried = []

    class Atoms:
        def get_potential_energy(self):
            tried.append(self.calc)
            if self.calc == "bold":
                raise KohnShamConvergenceError
            return -1.0
    monkeypatch.setattr(gpaw_job, "calculator", lambda job, folder, step, mixing: mixing)
    assert [gpaw_job.energy(Atoms(), {}, tmp_path, "eos") for _ in range(2)] == [-1.0, -1.0]
    assert tried == ["bold", "gentle", "gentle"]


@needs_gpaw
def test_an_scf_that_does_not_converge_is_saved_and_tried_again(in_process, monkeypatch):
    out = dft.run("Si", SILICON, "two", "static")
    assert out["status"] == "scf: not converged" == dft.load("Si", "two", dft.STORE)["status"] and "gap" not in out
    record = dft.WORK / "Si-two" / "scf.json"
    assert "onverge" in json.loads(record.read_text())["reason"]
    before = record.stat().st_mtime_ns
    assert dft.run("Si", SILICON, "two", "static")["status"] == "scf: not converged"
    assert record.stat().st_mtime_ns > before
    monkeypatch.setattr(gpaw_job, "STEPS", {"scf": lambda job, folder: dict(MESH)})          # the third time it goes well
    assert dft.run("Si", SILICON, "two", "static")["gap"]["indirect"] == pytest.approx(2.5)


@needs_gpaw
@needs_seekpath
def test_atomic_orbitals_give_the_bands_of_plane_waves(monkeypatch, in_process):
    monkeypatch.setattr(dft, "PROFILES", {"least": replace(LEAST, path_points=20)})
    waves, orbitals = (dft.run(f"Si-{kind}", SILICON, "least", kind) for kind in ("waves", "polymorph"))
    assert waves["status"] == orbitals["status"] == "ok" and "basis" not in waves
    a, b = (r["bands"]["energies"] - r["bands"]["energies"][0, :, :4].max() for r in (waves, orbitals))
    assert np.abs(a - b)[0, :, :5].mean() < 0.15 and 0 < orbitals["basis"]["error"] < 0.3 and orbitals["basis"]["levels"] > 0
    assert orbitals["path_gap"]["indirect"] == pytest.approx(waves["gap"]["indirect"], abs=0.15)
    again = dft.load("Si-polymorph", "least", dft.STORE)
    assert again["basis"] == orbitals["basis"] and again["path_gap"] == orbitals["path_gap"]


@needs_gpaw
def test_a_missing_setup_file_is_a_row(in_process):
    out = dft.run("Si", SILICON, "least", "static", setups={"Si": "nosuch"})
    assert out["status"].startswith("scf: failed: FileNotFoundError") and dft.load("Si", "least", dft.STORE)["setups"] == {"Si": "nosuch"}


@needs_gpaw
def test_two_ranks_have_the_energy_of_one(in_process, monkeypatch, tmp_path):
    one = dft.run("Si", SILICON, "least", "static")
    monkeypatch.undo()
    job = dft.prepare(SILICON, LEAST, "static")
    dft.execute(job, tmp_path / "two", 2)
    two = dft.collect("Si", job, tmp_path / "two", "least")
    assert two["status"] == one["status"] == "ok" and two["energy_per_atom"] == pytest.approx(one["energy_per_atom"], abs=1e-5)
    assert two["gap"]["indirect"] == pytest.approx(one["gap"]["indirect"], abs=1e-3)
    assert len(list((tmp_path / "two").glob("*.json"))) == 2


@pytest.mark.slow
@needs_gpaw
def test_a_killed_process_goes_on(tmp_path):
    job = dft.prepare(SILICON, replace(LEAST, kpts=(4, 4, 4), cutoff=300)) | {"steps": ["eos", "scf"], "path": None}
    (tmp_path / "job.json").write_text(json.dumps(job, sort_keys=True))
    process = subprocess.Popen([sys.executable, "-m", "meidnet_core.gpaw_job", str(tmp_path)], cwd=dft.ROOT)
    try:
        deadline = time.time() + 120
        while time.time() < deadline and len(gpaw_job.read(tmp_path, "eos-points") or []) < 2:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    points = gpaw_job.read(tmp_path, "eos-points")
    assert 2 <= len(points) < 5 and gpaw_job.read(tmp_path, "eos") is None
    dft.execute(job, tmp_path, 1)
    out = dft.collect("Si", job, tmp_path, "least")
    assert out["status"] == "ok" and 5.40 < (4 * out["eos"]["volume"]) ** (1 / 3) < 5.50
    assert gpaw_job.read(tmp_path, "eos-points")[:len(points)] == points


@pytest.mark.slow
@needs_gpaw
def test_lanthanides_with_4f_in_the_core_are_made(monkeypatch, tmp_path):
    monkeypatch.setenv("MEIDNET_CACHE", str(tmp_path))
    assert dft.setups_for(["Yb", "Eu"], "PBE") == {"Yb": "3p"} and dft.frozen_4f("Yb", "2p") == "2p"
    for element, tag, number, f in (("Yb", "3p", 70, 13), ("Yb", "2p", 70, 14), ("Eu", "2p", 63, 7), ("Eu", "3p", 63, 6)):
        text = (dft.setup_folder() / f"{element}.{dft.frozen_4f(element, tag)}.PBE").read_text()
        z, core, valence = map(float, re.search(r'<atom symbol="\w+" Z="(\S+?)" core="(\S+?)" valence="(\S+?)"', text).groups())
        assert z == number and core + valence == z and core == 46 + f                            # [Xe] less 5s2 5p6, and the 4f shell
