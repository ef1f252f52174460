"""Storage of electronic structure: round trips, malformed files, one crystal or two."""

import json
import re

import numpy as np
import pytest

from meidnet_core import dft_store


def result(**changes):
    return {"name": "Si", "profile": "least", "status": "ok", "bands": None, "dos": None, "gap": {"indirect": 0.6}} | changes


def test_arrays_come_back(dft_arrays, tmp_path):
    out = result(**dft_arrays)
    dft_store.save(out, tmp_path)
    back = dft_store.load("Si", "least", tmp_path)
    for part in ("bands", "dos"):
        assert back[part].keys() == out[part].keys()
        for key, value in out[part].items():
            if isinstance(value, np.ndarray):
                assert back[part][key].dtype == float and back[part][key] == pytest.approx(value, abs=1e-6)
            else:
                assert back[part][key] == value
    assert {k: v for k, v in back.items() if k not in dft_store.ARRAYS} == {k: v for k, v in out.items() if k not in dft_store.ARRAYS}
    assert "energies" not in json.loads((tmp_path / "Si-least.json").read_text())["bands"]


def test_nothing_stored_is_none(tmp_path):
    dft_store.save(result(), tmp_path)
    assert dft_store.load("Si", "tiny", tmp_path) is None and dft_store.load("Ge", "least", tmp_path) is None
    assert dft_store.load("Si", "least", tmp_path)["dos"] is None


@pytest.mark.parametrize("text", ['{"engine": "gpaw", "name": "S', "", "[1, 2"])
def test_a_malformed_file_is_named(text, tmp_path):
    (tmp_path / "Si-least.json").write_text(text)
    with pytest.raises(Exception, match=re.escape(str(tmp_path / "Si-least.json"))):
        dft_store.load("Si", "least", tmp_path)


def test_malformed_arrays_are_named(dft_arrays, tmp_path):
    dft_store.save(result(**dft_arrays), tmp_path)
    whole = (tmp_path / "Si-least.npz").read_bytes()
    (tmp_path / "Si-least.npz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(Exception, match=re.escape(str(tmp_path / "Si-least.npz"))):
        dft_store.load("Si", "least", tmp_path)


def test_arrays_of_an_earlier_attempt_do_not_outlive_it(dft_arrays, tmp_path):
    dft_store.save(result(status="dos: not converged", **dft_arrays | {"dos": None}), tmp_path)
    dft_store.save(result(status="scf: not converged"), tmp_path)
    assert dft_store.load("Si", "least", tmp_path)["bands"] is None


def test_killed_between_the_two_files(dft_arrays, tmp_path):
    dft_store.save(result(**dft_arrays), tmp_path)
    arrays = (tmp_path / "Si-least.npz").read_bytes()
    dft_store.save(result(status="bands: not run"), tmp_path)
    (tmp_path / "Si-least.npz").write_bytes(arrays)                    # the JSON was not written any more
    assert dft_store.load("Si", "least", tmp_path)["bands"] is None
    dft_store.save(result(**dft_arrays), tmp_path)
    (tmp_path / "Si-least.npz").unlink()
    with pytest.raises(dft_store.DFTError, match="no arrays of bands"):
        dft_store.load("Si", "least", tmp_path)


def test_two_polymorphs_are_not_one_crystal():
    wurtzite = ([3.25, 3.25, 5.2, 90, 90, 120], ["Zn", "Zn", "O", "O"], [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5], [1 / 3, 2 / 3, 0.38],
                                                                        [2 / 3, 1 / 3, 0.88]])
    doubled = ([6.5, 3.25, 5.2, 90, 90, 120], 2 * wurtzite[1], [[(x + k) / 2, y, z] for k in (0, 1) for x, y, z in wurtzite[2]])
    blende = ([4.6] * 3 + [90] * 3, 4 * ["Zn"] + 4 * ["O"], [[x + s, y + s, z + s] for s in (0, 0.25)
                                                             for x, y, z in ((0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))])
    assert dft_store.same_crystal(wurtzite, doubled) and not dft_store.same_crystal(blende, doubled)
