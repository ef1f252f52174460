"""What a GPU machine is sent for FTCP gives the training that would have run here."""

import pytest
import torch

from meidnet_core import checkpoint, ftcp, ftcp_gpu


@pytest.fixture
def prepared(perovskites, vocabulary, tmp_path, monkeypatch):
    """(layout, tensors) of a few cells in place of a data set, and a folder in place of runs/."""
    tensors, cells = ftcp.to_tensors(perovskites(6), vocabulary, 5, 5)
    layout = ftcp.Layout(vocabulary, 5, 5).fit(tensors)
    monkeypatch.setattr(ftcp, "RUNS", tmp_path)
    monkeypatch.setattr(ftcp, "prepare", lambda dataset: (layout, {"train": tensors}, {"train": cells}))
    return layout, tensors


def test_a_packed_training_is_the_one_here(prepared, tmp_path):
    layout, tensors = prepared
    ftcp_gpu.pack("perov_5", tmp_path / "packed.safetensors")
    path = ftcp_gpu.train(tmp_path / "packed.safetensors", seed=1, epochs=3, device="cpu")
    assert path == ftcp.state_of("perov_5", 1, 3) and checkpoint.device_of(path) == "cpu"
    before = path.stat().st_mtime_ns
    here, history, _ = ftcp.train(layout, tensors, seed=1, epochs=3, progress=False)
    there, again, _ = ftcp.train(layout, tensors, seed=1, epochs=3, path=path, progress=False)            # finished: only loads
    assert [h["loss"] for h in again] == [h["loss"] for h in history]
    assert path.stat().st_mtime_ns == before, "a finished state keeps the name of its device"
    assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), there.state_dict().values(), strict=True))


def test_what_is_unpacked_is_what_was_packed(prepared, tmp_path):
    ftcp_gpu.pack("perov_5", tmp_path / "packed.safetensors")
    dataset, layout, tensors = ftcp_gpu.unpack(tmp_path / "packed.safetensors")
    assert dataset == "perov_5" and tensors.keys() == prepared[1].keys()
    assert all(torch.equal(t.nan_to_num(), tensors[k].nan_to_num()) for k, t in prepared[1].items())
    assert torch.equal(layout.represent(tensors), prepared[0].represent(prepared[1]))


def test_another_file_is_refused(prepared, tmp_path):
    ftcp_gpu.pack("perov_5", tmp_path / "packed.safetensors")
    state = ftcp_gpu.train(tmp_path / "packed.safetensors", epochs=1, device="cpu")
    with pytest.raises(checkpoint.CheckpointError, match="holds no cells for FTCP"):
        ftcp_gpu.train(state, epochs=1, device="cpu")
