"""Checkpoints: round trip, refusals that name the file, atomic writes."""

import json
from pathlib import Path

import pytest
import torch

from meidnet_core import checkpoint
from meidnet_core.checkpoint import CheckpointError, load_model, save_model
from meidnet_core.train import Run, make_optimizer


@pytest.fixture
def saved(config, perovskites, tensors_of, model_of, tmp_path):
    """(path, model, tensors) of a stored untrained model."""
    cfg = config("improved")
    tensors = tensors_of(perovskites(6), cfg)
    model = model_of(cfg, tensors).eval()
    path = tmp_path / "folder" / "model.safetensors"
    save_model(path, model, seconds=1.5)
    return path, model, tensors


@pytest.mark.parametrize("preset", ["paper", "improved", "production"])
@pytest.mark.parametrize("changes", [{}, {"fusion": "late"}, {"labels": ("heat_all",)}])
def test_a_loaded_model_gives_equal_outputs(config, perovskites, tensors_of, model_of, tmp_path, preset, changes):
    cfg = config(preset, **changes)
    tensors = tensors_of(perovskites(6), cfg)
    model = model_of(cfg, tensors).eval()
    save_model(tmp_path / "model.safetensors", model, note="kept")
    loaded, meta = load_model(tmp_path / "model.safetensors")
    assert loaded.cfg == cfg and loaded.shape == model.shape
    assert meta["note"] == "kept" and not loaded.training
    a, b = model(tensors), loaded(tensors)
    for key in ("lattice", "adjacency", "species", "frac", "z", "props", "props_structure"):
        assert torch.equal(a[key], b[key]), key


def test_a_padded_model_keeps_its_class_for_empty_sites(config, mixed, tensors_of, model_of, tmp_path):
    cfg = config("paper", labels=("band_gap",))
    tensors = tensors_of(mixed(6), cfg)
    model = model_of(cfg, tensors).eval()
    save_model(tmp_path / "model.safetensors", model)
    loaded, _ = load_model(tmp_path / "model.safetensors")
    assert loaded.shape.padded and torch.equal(loaded(tensors)["z"], model(tensors)["z"])


def test_the_header_lies_beside_the_weights_as_json(saved):
    path, model, _ = saved
    meta = json.loads(path.with_suffix(".json").read_text())
    assert meta["config"] == model.cfg.to_dict() and meta["seconds"] == 1.5
    assert meta["shape"]["elements"] == list(model.shape.elements)


def test_the_safetensors_file_is_complete_without_the_json(saved):
    path, model, tensors = saved
    path.with_suffix(".json").unlink()
    assert torch.equal(load_model(path)[0](tensors)["z"], model(tensors)["z"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="none.safetensors: no such checkpoint"):
        load_model(tmp_path / "none.safetensors")


def rewritten(path, **changes):
    """The same weights under a changed header."""
    tensors, meta = checkpoint.read(path)
    checkpoint.write(path, tensors, meta | changes)


def without_header(path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, path)


def smaller(path):
    rewritten(path, config=checkpoint.read(path)[1]["config"] | {"width": 24})


def other_elements(path):
    rewritten(path, shape=checkpoint.read(path)[1]["shape"] | {"elements": ["O", "Ti"]})


def unknown_key(path):
    rewritten(path, config=checkpoint.read(path)[1]["config"] | {"colour": "red"})


def lost_weight(path):
    tensors, meta = checkpoint.read(path)
    tensors.pop("decoder.query")
    checkpoint.write(path, tensors, meta)


def no_config(path):
    checkpoint.write(path, checkpoint.read(path)[0], {"note": "weights only"})


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x00garbage" * 500),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut-header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "without-header": without_header,
    "no-config": no_config,
    "unknown-key": unknown_key,
    "smaller": smaller,
    "lost-weight": lost_weight,
    "other-elements": other_elements,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_usable_checkpoint_is_refused_by_name(saved, damage):
    path = saved[0]
    DAMAGES[damage](path)
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert str(path) in str(error.value)


def test_a_refusal_gives_the_reason(saved):
    path = saved[0]
    smaller(path)
    with pytest.raises(CheckpointError, match="weights do not fit .*: size mismatch for [a-z.]+"):
        load_model(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a readable MEIDNet checkpoint"):
        load_model(path)


def test_a_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a readable"):
        load_model(tmp_path)


def test_a_failed_write_leaves_the_old_checkpoint(saved, monkeypatch):
    import safetensors.torch

    path, model, tensors = saved
    before = path.read_bytes()

    def half(content, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, model)
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="disk full"):
        save_model(path.with_name("new.safetensors"), model)
    assert not path.with_name("new.safetensors").exists()
    assert torch.equal(load_model(path)[0](tensors)["z"], model(tensors)["z"])


def test_a_state_without_the_flag_goes_on_where_it_was(config, perovskites, tensors_of, model_of, tmp_path):
    cfg, path = config("improved", epochs=9), tmp_path / "state.safetensors"
    model = model_of(cfg, tensors_of(perovskites(6), cfg))
    run, optimizer = Run(model), make_optimizer(model, cfg)
    for finished, first in ((False, 4), (True, 9)):
        checkpoint.save_state(path, run, model, None, optimizer, 4, finished)
        assert checkpoint.load_state(path, run, model, None, optimizer) == first
    tensors, meta = checkpoint.read(path)
    checkpoint.write(path, tensors, {k: v for k, v in meta.items() if k != "finished"})
    assert checkpoint.load_state(path, run, model, None, optimizer) == 4, "as files were written before"


def test_nothing_is_pickled(saved):
    """The file is read by safetensors alone: 8 bytes of header length, JSON, raw numbers."""
    content = saved[0].read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert "meidnet" in header["__metadata__"]
    last = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    assert len(content) == 8 + size + last


def test_a_checkpoint_does_not_take_the_place_of_its_readable_header(tmp_path):
    with pytest.raises(ValueError, match="x.json: a checkpoint ends in .safetensors"):
        checkpoint.write(tmp_path / "x.json", {"a": torch.zeros(2)}, {})
    assert not list(tmp_path.iterdir())
