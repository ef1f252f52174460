"""Named configurations: which command trains a missing model, what the headers of the committed ones say."""

import pytest
import torch

from meidnet_core import checkpoint, experiments


def test_a_missing_model_is_named_with_the_command_that_trains_it(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CHECKPOINTS", tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="meidnet_core.experiments structure --split-scheme grouped --seed 2"):
        experiments.required(experiments.PRESETS["structure"].with_(seed=2, split_scheme="grouped"))
    with pytest.raises(checkpoint.CheckpointError, match="meidnet_core.experiments production --seed 1"):
        experiments.required(experiments.PRODUCTION.with_(seed=1))


def test_the_time_of_a_production_model_is_that_of_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CHECKPOINTS", tmp_path)
    written, cfg = {}, experiments.PRODUCTION.to_dict()
    for seed, seconds in ((0, 600.0), (1, 900.0)):
        header = {"config": cfg | {"seed": seed}, "seconds": seconds}
        checkpoint.write(tmp_path / f"perov_5_production_seed{seed}.safetensors", {"w": torch.zeros(1)}, header)
    monkeypatch.setattr(experiments.results, "write_run", lambda experiment, run, **words: written.update({run: words}))
    experiments.record_speed()
    assert {k: v["claims"]["x.speed.cpu"]["value"] for k, v in written.items()} == {"production-seed0": 10.0, "production-seed1": 15.0}
    assert all("one CPU thread" in v["claims"]["x.speed.cpu"]["split"] for v in written.values())
