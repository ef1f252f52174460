"""Where data files come from: mirror, checksum, download, and what is said when there is none."""

import hashlib
import json

import numpy as np
import pytest

from meidnet_core import data, sources
from meidnet_core.sources import DataError, locate


def put(mirror, name, split, content, end=".csv.gz"):
    path = mirror / name / f"{split}{end}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


TABLES = {"oqmd_abx3/oqmd_abx3", "hull/mp_ground_states", "hull/mp_elemental_reference_entries"}      # from a mirror only


def test_the_registry_knows_every_split_of_every_data_set_and_every_table():
    known = sources.registry()
    assert set(known) == {f"{n}/{s}" for n in data.LABELS for s in data.SPLITS} | TABLES
    for name, entry in known.items():
        assert len(entry["sha256"]) == 64 and entry["rows"] > 0
        assert name in TABLES or len(entry["fingerprint"]) == 64


def test_a_table_of_the_mirror_is_checked(nowhere, monkeypatch):
    path = put(nowhere[0], "hull", "mp_ground_states", b"content")
    monkeypatch.setattr(sources, "registry", lambda: {"hull/mp_ground_states": {"sha256": hashlib.sha256(b"content").hexdigest()}})
    assert sources.mirror("hull", "mp_ground_states") == path
    path.write_bytes(b"altered")
    with pytest.raises(sources.DataError, match="wrong checksum"):
        sources.mirror("hull", "mp_ground_states")
    with pytest.raises(sources.DataError, match="hull/other.csv.gz: not found"):
        sources.mirror("hull", "other")


def test_a_mirror_file_with_the_right_checksum_is_used(nowhere, monkeypatch):
    path = put(nowhere[0], "perov_5", "test", b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    monkeypatch.setattr(sources, "registry", lambda: {"perov_5/test": {"sha256": digest}})
    assert locate("perov_5", "test") == path


def test_a_mirror_file_with_a_wrong_checksum_is_refused(nowhere):
    path = put(nowhere[0], "perov_5", "test", b"damaged")
    with pytest.raises(DataError, match="wrong checksum") as error:
        locate("perov_5", "test")
    expected = sources.registry()["perov_5/test"]["sha256"][:12]
    assert str(path) in str(error.value) and expected in str(error.value)
    with pytest.raises(DataError, match="wrong checksum"):
        data.load("perov_5", "test")


def test_the_gzip_file_comes_before_the_plain_one(nowhere, monkeypatch):
    monkeypatch.setattr(sources, "registry", dict)
    plain = put(nowhere[0], "perov_5", "val", b"plain", ".csv")
    assert locate("perov_5", "val") == plain
    packed = put(nowhere[0], "perov_5", "val", b"packed")
    assert locate("perov_5", "val") == packed


def test_without_mirror_and_network_the_message_names_both_and_the_cure(nowhere, monkeypatch):
    with pytest.raises(DataError, match="no source reachable") as error:
        locate("mp_20", "train")
    said = str(error.value)
    assert str(nowhere[0]) in said and "network is unreachable" in said
    assert sources.URL.format("mp_20", "train") in said and "MEIDNET_DATA_MIRROR" in said
    monkeypatch.delenv("MEIDNET_DATA_MIRROR")
    with pytest.raises(DataError, match="MEIDNET_DATA_MIRROR is not set"):
        data.load("mp_20", "train")


def test_a_missing_mirror_file_is_downloaded_from_the_pinned_commit(nowhere, monkeypatch):
    asked = {}

    def retrieve(url, known_hash, fname, path):
        asked.update(url=url, fname=fname, path=path)
        return str(path / fname)

    import pooch

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    path = locate("carbon_24", "val")
    assert sources.COMMIT in asked["url"] and asked["url"].endswith("carbon_24/val.csv")
    assert path == nowhere[1] / asked["fname"] and sources.COMMIT[:8] in path.name


def test_the_cache_folder_follows_its_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("MEIDNET_CACHE", str(tmp_path))
    assert sources.cache_dir() == tmp_path
    monkeypatch.delenv("MEIDNET_CACHE")
    assert sources.cache_dir() != tmp_path and "meidnet" in str(sources.cache_dir())


# ---- fingerprint of the cells -------------------------------------------------------------------


def test_the_fingerprint_ignores_row_order_site_order_and_padding(perovskites):
    crystals = perovskites(6)
    reference = sources.fingerprint(crystals)
    shuffled = crystals.select(np.array([3, 0, 5, 1, 4, 2]))
    shuffled.numbers = np.pad(shuffled.numbers[:, ::-1], ((0, 0), (0, 3)))
    assert sources.fingerprint(shuffled) == reference


@pytest.mark.parametrize("change", ["element", "volume", "count"])
def test_the_fingerprint_sees_another_element_volume_or_number_of_cells(perovskites, change):
    crystals = perovskites(6)
    reference = sources.fingerprint(crystals)
    if change == "element":
        crystals.numbers[2, 0] += 1
    elif change == "volume":
        crystals.lattice[2, :3] *= 1.001
    else:
        crystals = crystals.select(slice(0, 5))
    assert sources.fingerprint(crystals) != reference


def test_downloaded_cells_that_differ_from_the_published_split_are_refused(perovskites, tmp_path):
    with pytest.raises(DataError, match="not those of the published split") as error:
        sources.check_cells(perovskites(3), tmp_path / "perov_5-train.csv")
    assert "perov_5-train.csv" in str(error.value) and "3 cells" in str(error.value)


def test_cells_that_equal_the_registered_fingerprint_pass(perovskites, tmp_path, monkeypatch):
    crystals = perovskites(3)
    entry = {"perov_5/train": {"fingerprint": sources.fingerprint(crystals)}}
    monkeypatch.setattr(sources, "registry", lambda: entry)
    sources.check_cells(crystals, tmp_path / "perov_5-train.csv")
    crystals.lattice[0, :3] += 0.1
    with pytest.raises(DataError, match="published split"):
        sources.check_cells(crystals, tmp_path / "perov_5-train.csv")


@pytest.mark.parametrize("split", data.SPLITS)
def test_the_parsed_perovskites_have_the_registered_fingerprint(real, split):
    crystals, known = real("perov_5", split), sources.registry()[f"perov_5/{split}"]
    assert len(crystals) == known["rows"]
    assert sources.fingerprint(crystals) == known["fingerprint"]


def test_the_registry_file_is_shipped_with_the_package():
    path = sources.Path(sources.__file__).parent / "registry.json"
    assert json.loads(path.read_text()) == sources.registry()
