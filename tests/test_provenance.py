"""Where a run took place."""

import subprocess

import pytest

from meidnet_core import provenance


def test_commit_tells_clean_from_dirty_and_ignores_results(tmp_path):
    assert provenance.commit(tmp_path) == "unknown"

    def git(*words):
        name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *name, *words], check=True, capture_output=True, text=True
        )

    git("init")
    assert provenance.commit(tmp_path) == "unknown"
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-m", "a")
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "claims.csv").write_text("x\n")
    (tmp_path / "data" / "checkpoints").mkdir()
    (tmp_path / "data" / "checkpoints" / "model.json").write_text("{}\n")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert provenance.commit(tmp_path) == head
    (tmp_path / "a.py").write_text("2\n")
    assert provenance.commit(tmp_path) == f"{head}-dirty"


def test_a_gpu_that_a_run_did_not_use_is_not_its_device(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    for used, device in ((0, "cpu"), (1024, "H100")):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda used=used: used)
        assert provenance.environment()["device"] == device
