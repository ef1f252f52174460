"""Runs abreast are the runs that train.train does one after the other."""

import math

import pytest
import torch

from meidnet_core import abreast, checkpoint, experiments, trial
from meidnet_core.config import PAPER, PRODUCTION
from meidnet_core.train import Diverged, train

# no noise: its numbers come from one generator for all runs
QUIET = {"gumbel_noise": False, "dropout": 0.0, "latent_noise": 0.0, "label_noise": 0.0, "exchange": 0.0, "batch": 16, "width": 32,
         "edge_width": 16, "epochs": 2}


@pytest.fixture(scope="module")
def splits():
    return experiments.prepare(PAPER, "cpu")


@pytest.fixture(scope="module")
def cells(splits):
    """70 training cells (four batches and a rest) and 40 to score."""
    few = lambda split, n: {k: t[:n] for k, t in splits.tensors[split].items()}
    return few("train", 70), few("val", 40)


def team(base, **changes):
    base = base.with_(**(QUIET | changes))
    return [base.with_(seed=0), base.with_(seed=1, curriculum="none"), base.with_(seed=2, curriculum="linear", ramp=1.0)]


@pytest.mark.parametrize("base", [PAPER, PRODUCTION, PAPER.with_(fusion="late")], ids=["paper", "production", "late"])
def test_runs_abreast_equal_runs_one_by_one(base, splits, cells):
    """Clipping, average, schedules, decay, curriculum: weights and histories agree to rounding."""
    tensors, val = cells
    for cfg, run in zip(team(base), abreast.train(team(base), tensors, splits.elements, val, progress=False)):
        score = lambda model, epoch, record: record.update({f"val_{k}": v for k, v in trial.proxies(model, val).items()})
        alone = train(cfg, tensors, splits.elements, device="cpu", progress=False, on_epoch=score)
        for a, b in zip(alone.model.parameters(), run.model.parameters()):
            assert torch.allclose(a, b, atol=5e-4)
        assert run.finished and [h.keys() for h in run.history] == [h.keys() for h in alone.history]
        for key in run.history[0].keys() - {"seconds"}:
            assert [h[key] for h in run.history] == pytest.approx([h[key] for h in alone.history], rel=2e-3, abs=1e-3), key


def losses_of(splits, cells, **noise):
    """First losses of a small team abreast."""
    runs = abreast.train(team(PRODUCTION, epochs=1, **noise), cells[0], splits.elements, cells[1], progress=False)
    return [r.history[0]["loss"] for r in runs]


@pytest.fixture(scope="module")
def quiet(splits, cells):
    first, again = (losses_of(splits, cells) for _ in range(2))
    assert first == again
    return first


@pytest.mark.parametrize("noise", [{"gumbel_noise": True}, {"dropout": 0.3}, {"latent_noise": 0.5}, {"label_noise": 0.5},
                                   {"structure_only": 0.5}, {"exchange": 0.5}], ids=lambda n: next(iter(n)))
def test_every_noise_is_drawn_abreast_as_it_is_alone(noise, splits, cells, quiet):
    """No noise may get lost in torch.vmap: it moves the mean loss of an epoch, and by about as much as it does alone."""
    loud = losses_of(splits, cells, **noise)
    alone = [train(c, cells[0], splits.elements, device="cpu", progress=False) for c in team(PRODUCTION, epochs=1, **noise)]
    assert all(a != b for a, b in zip(quiet, loud)) and sum(loud) == pytest.approx(sum(r.history[0]["loss"] for r in alone), rel=0.1)


def test_a_killed_team_goes_on_as_if_it_had_not_been(splits, cells, tmp_path):
    cfgs, names = team(PRODUCTION, epochs=3, exchange=0.5, dropout=0.1), ["a.safetensors", "b.safetensors", "c.safetensors"]
    torch.manual_seed(0)
    (tmp_path / "whole").mkdir()
    whole = abreast.train(cfgs, cells[0], splits.elements, cells[1], tmp_path / "whole", names, progress=False)
    part = abreast.train(cfgs, cells[0], splits.elements, cells[1], tmp_path, names, every=1, stop_after=2, progress=False)
    assert not any(run.finished for run in part)
    again = abreast.train(cfgs, cells[0], splits.elements, cells[1], tmp_path, names, progress=False)
    for a, b in zip(whole, again):
        assert [h["loss"] for h in a.history] == [h["loss"] for h in b.history] and b.finished
        assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))


def test_a_kill_between_two_writes_sets_back_one_run(splits, cells, tmp_path):
    """Of three runs one state is an epoch older than the others and one is gone: each goes on from where it is."""
    runs = dict(zip(("a.safetensors", "b.safetensors", "c.safetensors"), team(PAPER, epochs=3)))
    go_on = lambda group, **options: abreast.train(list(group.values()), cells[0], splits.elements, cells[1], tmp_path, list(group),
                                                   every=1, progress=False, **options)
    go_on(runs, stop_after=1)
    older = (tmp_path / "b.safetensors").read_bytes()
    go_on(runs, stop_after=2)
    (tmp_path / "b.safetensors").write_bytes(older)
    (tmp_path / "c.safetensors").unlink()
    parts = abreast.groups(runs, tmp_path)
    assert [list(p) for p in parts] == [[name] for name in runs]
    assert [checkpoint.epochs_done(tmp_path / name) for name in runs] == [2, 1, 0]
    done = [run for part in parts for run in go_on(part)]
    assert all(run.finished and [h["epoch"] for h in run.history] == [0, 1, 2] for run in done)


def test_the_state_it_leaves_is_one_that_train_finds_finished(splits, cells, tmp_path):
    cfg = team(PAPER)[1]
    run = abreast.train([cfg], cells[0], splits.elements, cells[1], tmp_path, ["x.safetensors"], progress=False)[0]
    found = train(cfg, cells[0], splits.elements, checkpoint=tmp_path / "x.safetensors", device="cpu", progress=False)
    assert found.finished and found.history == run.history
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), found.model.parameters()))
    assert checkpoint.device_of(tmp_path / "x.safetensors") == "cpu"


def test_an_unfinished_state_is_one_that_train_goes_on_from(splits, cells, tmp_path):
    cfg = team(PAPER, epochs=3)[0]
    whole = train(cfg, cells[0], splits.elements, device="cpu", progress=False)
    abreast.train([cfg], cells[0], splits.elements, cells[1], tmp_path, ["x.safetensors"], stop_after=2, every=1, progress=False)
    found = train(cfg, cells[0], splits.elements, checkpoint=tmp_path / "x.safetensors", device="cpu", progress=False)
    assert found.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=1e-3)


def test_an_infinite_loss_with_finite_weights_is_a_divergence_too(splits, cells, tmp_path, monkeypatch):
    """The weights go on for the sake of the others; the state must not offer them as those of the last finite epoch."""
    cfgs, names, epoch = team(PRODUCTION, epochs=3), ["a.safetensors", "b.safetensors", "c.safetensors"], abreast.Abreast.epoch
    burst = lambda rows, number: [r | ({"loss": math.inf} if (i, number) == (1, 1) else {}) for i, r in enumerate(rows)]
    monkeypatch.setattr(abreast.Abreast, "epoch", lambda self, number: burst(epoch(self, number), number))
    runs = abreast.train(cfgs, cells[0], splits.elements, cells[1], tmp_path, names, every=3, progress=False)
    assert [len(r.history) for r in runs] == [3, 1, 3]
    with pytest.raises(Diverged) as error:
        train(cfgs[1], cells[0], splits.elements, checkpoint=tmp_path / names[1], device="cpu", progress=False)
    assert len(error.value.run.history) == 1
    assert train(cfgs[0], cells[0], splits.elements, checkpoint=tmp_path / names[0], device="cpu", progress=False).finished


def test_a_run_that_diverges_stops_alone(splits, cells, tmp_path, monkeypatch):
    """NaN in run 1 from the start: its history is empty, those of the others are not; going on from its state is the same divergence."""
    plain = abreast.total_loss

    def breaking(model, batch, alpha):
        loss, terms = plain(model, batch, alpha)
        factor = torch.where(alpha == 1.0, torch.nan, 1.0)             # only the run without a curriculum starts at 1
        return loss * factor, terms | {"loss": terms["loss"] * factor}
    monkeypatch.setattr(abreast, "total_loss", breaking)
    names, cfgs = ["a.safetensors", "b.safetensors", "c.safetensors"], team(PAPER, epochs=2)
    runs = abreast.train(cfgs, cells[0], splits.elements, cells[1], tmp_path, names, progress=False)
    assert [len(r.history) for r in runs] == [2, 0, 2] and [r.finished for r in runs] == [True, False, True]
    monkeypatch.setattr(abreast, "total_loss", plain)
    with pytest.raises(ValueError, match="epoch 0"):                   # what `campaign` meets when it goes on from the state
        train(cfgs[1], cells[0], splits.elements, checkpoint=tmp_path / "b.safetensors", device="cpu", progress=False)


def test_different_architectures_are_refused(splits, cells):
    with pytest.raises(ValueError, match="seed, curriculum and ramp"):
        abreast.train([PAPER, PAPER.with_(latent=64)], cells[0], splits.elements, cells[1], progress=False)


def test_pack_and_unpack(splits, cells, tmp_path):
    runs = {f"{k}.safetensors": cfg for k, cfg in enumerate(team(PAPER))}
    abreast.pack(tmp_path / "p.safetensors", runs, cells[0], splits.elements, cells[1])
    found, tensors, val, elements = abreast.unpack(tmp_path / "p.safetensors", "cpu")
    assert found == runs and tuple(elements) == tuple(splits.elements)
    assert all(torch.equal(t, cells[0][k]) for k, t in tensors.items()) and val.keys() == cells[1].keys()
    with pytest.raises(ValueError, match="element descriptors are trained where the data are"):
        abreast.pack(tmp_path / "q.safetensors", {"a": PAPER.with_(descriptors=True)}, cells[0], splits.elements, cells[1])
    assert not (tmp_path / "q.safetensors").exists()


def test_unpack_refuses_another_file(tmp_path, splits):
    model = experiments.stored(PRODUCTION, "cpu")[0]
    checkpoint.save_model(tmp_path / "m.safetensors", model)
    with pytest.raises(checkpoint.CheckpointError, match="m.safetensors: holds no packed runs"):
        abreast.unpack(tmp_path / "m.safetensors", "cpu")
    with pytest.raises(checkpoint.CheckpointError, match="no such checkpoint"):
        abreast.unpack(tmp_path / "absent.safetensors", "cpu")


def test_groups_share_what_a_batch_can_share(tmp_path):
    runs = {"a": PAPER, "b": PAPER.with_(seed=3, curriculum="none"), "c": PAPER.with_(latent=64), "d": PAPER.with_(fusion="late")}
    assert [list(g) for g in abreast.groups(runs, tmp_path)] == [["a", "b"], ["c"], ["d"]]


def test_held_out_ignores_labels_that_are_not_known(splits, cells):
    """NaN labels leave cosine and R2 to the cells that have them."""
    model = experiments.stored(PRODUCTION, "cpu")[0]
    val = {k: t.clone() for k, t in cells[1].items()}
    few = {k: t[10:] for k, t in val.items()}
    val["labels"][:10] = math.nan
    with_holes, without = abreast.held_out(model, val), abreast.held_out(model, few)
    for key in ("cosine", "l2d", "joint_r2"):
        assert float(with_holes[key]) == pytest.approx(float(without[key]), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_repeats_the_step(perovskites, tensors_of, vocabulary):
    """The recorded step equals the plain one; warming up leaves no trace. Made-up cells: a GPU machine need not have the data."""
    tensors, val = ({k: t.to("cuda") for k, t in tensors_of(perovskites(n, seed=n), PRODUCTION).items()} for n in (70, 40))
    graph, plain = (abreast.train(team(PRODUCTION), tensors, vocabulary, val, progress=False, compiled=False, graph=g)
                    for g in (True, False))
    for a, b in zip(graph, plain):
        assert a.history[-1]["loss"] == pytest.approx(b.history[-1]["loss"], rel=1e-3)
