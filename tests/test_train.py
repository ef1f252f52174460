"""Training: the same for a seed, the same after a kill, schedules, refusals."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from meidnet_core import train as training
from meidnet_core.checkpoint import CheckpointError, write
from meidnet_core.config import IMPROVED, PAPER

ROOT = Path(__file__).resolve().parents[1]
# everything random that a resumed run has to repeat
RANDOM = {"dropout": 0.1, "structure_only": 0.3, "latent_noise": 0.1, "label_noise": 0.1}


@pytest.fixture
def tensors(perovskites, tensors_of, config):
    return tensors_of(perovskites(20), config())


@pytest.fixture
def train(vocabulary):
    def run(cfg, tensors, **kwargs):
        return training.train(cfg, tensors, vocabulary, device="cpu", progress=False, **kwargs)

    return run


def losses_of(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]


def same_weights(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("preset", ["paper", "improved", "production"])
def test_two_runs_with_one_seed_are_identical(config, tensors, train, preset):
    cfg = config(preset, **RANDOM)
    first, second = train(cfg, tensors), train(cfg, tensors)
    assert same_weights(first, second) and losses_of(first) == losses_of(second)
    other = train(cfg.with_(seed=1), tensors)
    assert not same_weights(first, other)


@pytest.mark.parametrize("preset", ["paper", "improved", "production"])
def test_training_lowers_the_loss(config, tensors, train, preset):
    cfg = config(preset, epochs=25, lr=0.02, w_con=0.0, gumbel_noise=False)
    history = train(cfg, tensors).history
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert [row["epoch"] for row in history] == list(range(25))
    assert history[-1]["alpha"] == 1 and history[0]["alpha"] == 0


@pytest.mark.parametrize("preset", ["paper", "improved", "production"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(config, tensors, train, tmp_path, preset):
    cfg, path = config(preset, epochs=6, **RANDOM), tmp_path / "run.safetensors"
    whole = train(cfg, tensors)
    stopped = train(cfg, tensors, checkpoint=path, every=1, stop_after=2)
    assert not stopped.finished and len(stopped.history) == 2
    again = train(cfg, tensors, checkpoint=path, every=2, stop_after=5)
    assert len(again.history) == 5, "goes on with epoch 3, leaves after 5, of which 4 are stored"
    torch.manual_seed(99)  # whatever happened in between
    resumed = train(cfg, tensors, checkpoint=path, every=1)
    assert resumed.finished
    assert same_weights(whole, resumed) and losses_of(whole) == losses_of(resumed)
    assert resumed.seconds >= stopped.seconds > 0
    finished = train(cfg, tensors, checkpoint=path)
    assert same_weights(whole, finished) and len(finished.history) == 6


CHILD = """
import sys, time
import torch
from safetensors.torch import load_file
from meidnet_core import train
from meidnet_core.config import Config
import json
folder = sys.argv[1]
cfg = Config.from_dict(json.load(open(f"{folder}/config.json")))
elements = json.load(open(f"{folder}/elements.json"))
torch.set_num_threads(1)
slow = lambda model, epoch, record: time.sleep(0.3)
train.train(cfg, load_file(f"{folder}/tensors.safetensors"), elements, device="cpu", progress=False,
            checkpoint=f"{folder}/run.safetensors", every=1, on_epoch=slow)
"""


def test_a_killed_training_goes_on_bit_for_bit(config, tensors, train, vocabulary, tmp_path):
    from safetensors.torch import save_file

    cfg = config("improved", epochs=24, **RANDOM)
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "tensors.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_dict()))
    (tmp_path / "elements.json").write_text(json.dumps(vocabulary))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT)
    header, deadline, reached = tmp_path / "run.json", time.time() + 120, 0
    while reached < 3 and time.time() < deadline:
        assert child.poll() is None, "the child ended by itself"
        reached = json.loads(header.read_text())["epoch"] if header.exists() else 0
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = json.loads(header.read_text())["epoch"]
    assert 3 <= done < 24, "killed in the middle of the training"
    resumed = train(cfg, tensors, checkpoint=tmp_path / "run.safetensors", every=9)
    whole = train(cfg, tensors)
    assert len(resumed.history) == 24
    assert same_weights(whole, resumed) and losses_of(whole) == losses_of(resumed)


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 0.5}, {"width": 24}])
def test_a_checkpoint_of_another_configuration_is_refused(config, tensors, train, tmp_path, change):
    cfg, path = config("improved", epochs=2), tmp_path / "run.safetensors"
    train(cfg, tensors, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"another run .*{next(iter(change))}") as error:
        train(cfg.with_(**change), tensors, checkpoint=path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(config, tensors, train, mixed, tensors_of, tmp_path):
    cfg, path = config("paper", epochs=2), tmp_path / "run.safetensors"
    train(cfg, tensors, checkpoint=path)
    larger = mixed(8)
    larger.label_names = cfg.labels
    with pytest.raises(CheckpointError, match="weights do not fit .* data: size") as error:
        train(cfg, tensors_of(larger, cfg), checkpoint=path)
    assert str(path) in str(error.value)


def test_weights_without_training_state_are_refused(config, tensors, train, tmp_path):
    from meidnet_core.checkpoint import save_model

    cfg, path = config("paper", epochs=1), tmp_path / "model.safetensors"
    save_model(path, train(cfg, tensors).model)
    with pytest.raises(CheckpointError, match="no training state") as error:
        train(cfg, tensors, checkpoint=path)
    assert str(path) in str(error.value)


def test_a_damaged_state_is_refused(config, tensors, train, tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="run.safetensors: not a readable"):
        train(config("paper", epochs=1), tensors, checkpoint=path)


@pytest.mark.parametrize("preset", ["paper", "improved", "production"])
def test_a_loss_that_is_no_number_ends_the_training(config, tensors, train, tmp_path, preset):
    cfg, path = config(preset, seed=5), tmp_path / "run.safetensors"
    broken = tensors | {"d": tensors["d"] * math.nan, "r": tensors["r"] * math.nan}
    with pytest.raises(ValueError, match=r"loss became nan in epoch 0 \(seed 5\); lower lr = "):
        train(cfg, broken, checkpoint=path, every=1)
    assert not path.exists(), "a broken state is not stored"


def test_on_epoch_can_add_to_the_record_and_stop(config, tensors, train, tmp_path):
    path = tmp_path / "run.safetensors"

    def watch(model, epoch, record):
        record["seen"] = 2 * epoch
        return epoch == 1

    run = train(config(epochs=9), tensors, on_epoch=watch, checkpoint=path, every=5)
    assert run.finished and [row["seen"] for row in run.history] == [0, 2]
    assert json.loads(path.with_suffix(".json").read_text())["epoch"] == 2


def test_a_run_that_stopped_early_is_not_trained_on(config, tensors, train, tmp_path):
    path, cfg = tmp_path / "run.safetensors", config("improved", epochs=9)
    first = train(cfg, tensors, on_epoch=lambda model, epoch, record: epoch == 1, checkpoint=path, every=5)
    again = train(cfg, tensors, on_epoch=lambda *a: pytest.fail("trained on"), checkpoint=path)
    assert again.finished and len(again.history) == 2 and same_weights(first, again) and not again.model.training


def test_no_temporary_files_are_left(config, tensors, train, tmp_path):
    train(config(epochs=3), tensors, checkpoint=tmp_path / "run.safetensors", every=1)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["run.json", "run.safetensors"]


# ---- optimisation --------------------------------------------------------------------------------


def test_a_constant_learning_rate_is_constant():
    assert {training.learning_rate(PAPER, p / 10) for p in range(11)} == {PAPER.lr}


def test_the_one_cycle_rises_for_a_tenth_and_falls_to_zero():
    cfg = IMPROVED.with_(schedule="onecycle", lr=3e-3)
    rate = lambda p: training.learning_rate(cfg, p) / cfg.lr
    assert rate(0) == pytest.approx(0.04, abs=1e-3)
    assert rate(0.05) == pytest.approx(0.04 + 0.96 / 2, abs=1e-3)
    assert rate(0.1) == pytest.approx(1, abs=1e-3)
    assert rate(0.55) == pytest.approx(0.5, abs=1e-3)
    assert rate(1) == pytest.approx(0, abs=1e-3) and rate(1) > 0
    values = [rate(p / 1000) for p in range(1001)]
    assert all(a < b for a, b in zip(values[:100], values[1:101], strict=True))
    assert all(a > b for a, b in zip(values[100:], values[101:], strict=False))


def test_the_history_records_the_rate_and_weight_that_were_used(config, tensors, train):
    cfg = config("improved", epochs=10)
    history = train(cfg, tensors).history
    for epoch, row in enumerate(history):
        last = (epoch + 2 / 3) / 10  # 20 crystals in batches of 8: three steps
        assert row["lr"] == training.learning_rate(cfg, last)
        assert row["alpha"] == training.contrastive_weight(epoch, 10, cfg.curriculum, cfg.ramp)


def test_weight_decay_acts_on_matrices_only(config, tensors, model_of):
    cfg = config("improved", weight_decay=0.3)
    model = model_of(cfg, tensors)
    optimizer = training.make_optimizer(model, cfg)
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {g["weight_decay"]: g["params"] for g in optimizer.param_groups}
    assert {p.dim() > 1 for p in groups[0.3]} == {True}
    assert {p.dim() > 1 for p in groups[0.0]} == {False}
    count = len(groups[0.3]) + len(groups[0.0])
    assert count == len(list(model.parameters()))
    assert type(training.make_optimizer(model, cfg.with_(optimizer="adam"))) is torch.optim.Adam


def test_every_epoch_shows_every_crystal_once_in_its_own_order(config):
    cfg = config(batch=6)
    first, again, later = (training.batches(20, cfg, e, "cpu") for e in (3, 3, 4))
    assert [len(b) for b in first] == [6, 6, 6, 2]
    assert sorted(torch.cat(first).tolist()) == list(range(20))
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(later))
    other = training.batches(20, cfg.with_(seed=1), 3, "cpu")
    assert not torch.equal(torch.cat(first), torch.cat(other))


def test_the_average_moves_by_its_share_towards_the_weights():
    average, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = average.weight.detach().clone()
    training.update_average(average.requires_grad_(False), model, 0.9)
    assert torch.allclose(average.weight, 0.9 * before + 0.1 * model.weight)


def test_the_averaged_weights_are_returned_and_differ_from_the_last(config, tensors, train):
    """Same steps with and without averaging; the average must be the one of all steps."""
    cfg, seen = config("improved", ema=0.8), []
    averaged = train(cfg, tensors)
    plain = train(cfg.with_(ema=0.0), tensors, on_epoch=lambda m, e, r: seen.append(m) or False)
    assert losses_of(averaged) == losses_of(plain)
    assert not same_weights(averaged, plain)
    assert not averaged.model.training and not plain.model.training
    assert seen[0] is plain.model


def test_gradients_are_clipped(config, tensors, train):
    cfg = config("improved", weight_decay=0.0, epochs=1)
    free, tight = (train(cfg.with_(clip=c), tensors) for c in (0.0, 1e-12))
    torch.manual_seed(0)
    start = training.MEIDNet(free.model.cfg, free.model.shape).state_dict()
    key = "project_c.0.weight"
    moved = [(r.model.state_dict()[key] - start[key]).abs().max() for r in (free, tight)]
    assert moved[0] > 100 * moved[1]


# ---- statistics ----------------------------------------------------------------------------------


def test_a_lattice_in_units_of_the_authors_code(perovskites, tensors_of, config, vocabulary, model_of):
    cfg = config("paper", unit_lattice=True)
    tensors = tensors_of(perovskites(), cfg)
    scaled, labels = model_of(cfg, tensors).scale(tensors)
    assert torch.allclose(scaled, tensors["lattice"] / torch.tensor([20.0] * 3 + [180.0] * 3)) and torch.equal(labels, tensors["labels"])


def test_statistics_come_from_the_training_set_and_skip_missing_labels(config, tensors, vocabulary):
    tensors["labels"][:5, 1] = math.nan
    shape = training.shape_of(tensors, vocabulary, config("improved"))
    a, label = tensors["lattice"][:, 0], tensors["labels"][5:, 1]
    assert shape.lattice_mean[0] == pytest.approx(a.mean().item())
    assert shape.lattice_std[0] == pytest.approx(a.std().item())
    assert shape.lattice_std[3:] == (1.0,) * 3, "angles that never change are not blown up"
    assert shape.label_mean[1] == pytest.approx(label.mean().item(), abs=1e-6)
    assert shape.label_std[1] == pytest.approx(label.std().item())
    assert shape.sites == 5 and not shape.padded and shape.classes == len(vocabulary)


def test_the_paper_preset_uses_raw_targets(config, tensors, vocabulary, model_of):
    cfg = config("paper")
    shape = training.shape_of(tensors, vocabulary, cfg)
    assert set(shape.lattice_mean + shape.label_mean) == {0.0}
    assert set(shape.lattice_std + shape.label_std) == {1.0}
    lattice, labels = model_of(cfg, tensors).scale(tensors)
    assert torch.equal(lattice, tensors["lattice"]) and torch.equal(labels, tensors["labels"])


def test_cells_of_different_size_get_a_class_for_empty_sites(config, mixed, tensors_of, vocabulary):
    cfg = config(labels=("band_gap",))
    shape = training.shape_of(tensors_of(mixed(), cfg), vocabulary, cfg)
    assert shape.padded and shape.sites == 6 and shape.classes == len(vocabulary) + 1


def test_standardised_labels_have_mean_zero_and_deviation_one(config, tensors, model_of):
    labels = model_of(config("improved"), tensors).scale(tensors)[1]
    assert labels.mean(0).abs().max() < 1e-5
    assert torch.allclose(labels.std(0), torch.ones(2), atol=1e-4)


def test_a_device_can_be_named_and_auto_finds_one():
    assert training.pick_device("cpu").type == "cpu"
    assert training.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_state_is_one_file_with_a_readable_header(tmp_path):
    write(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {"epoch": 3})
    assert json.loads((tmp_path / "x.json").read_text()) == {"epoch": 3}
