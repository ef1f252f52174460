"""CGCNN: the graph against pymatgen, invariances, training, files; baselines on cases with a known answer."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from meidnet_core import cgcnn, checkpoint, crystal, data
from meidnet_core.checkpoint import CheckpointError

NAMES = ("dir_gap", "heat_all")
TINY = cgcnn.SETTINGS.with_(width=8, blocks=2, rbf=12, batch=8, epochs=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return cgcnn.CGCNN(TINY, cgcnn.Scale((0.5, 1.0), (2.0, 0.5))).eval()


def entries(graph, m, i):
    """Sorted (distance, site, weight) of one site."""
    keep = graph["weight"][m, i] > 0
    return sorted(zip(graph["distance"][m, i][keep].tolist(), graph["index"][m, i][keep].tolist(), graph["weight"][m, i][keep].tolist()))


def rewritten(crystals, seed=0):
    """The same crystals with another origin, another order of the sites and atoms in other cells."""
    rng, n = np.random.default_rng(seed), crystals.numbers.shape[1]
    order = np.array([rng.permutation(int((z > 0).sum())).tolist() + list(range(int((z > 0).sum()), n)) for z in crystals.numbers])
    frac = np.take_along_axis(crystals.frac, order[..., None], 1) + rng.random((len(order), 1, 3)) + rng.integers(-2, 3, (*order.shape, 3))
    return replace(crystals, numbers=np.take_along_axis(crystals.numbers, order, 1), frac=frac)


@pytest.mark.parametrize("cutoff", [3.0, 8.0])
def test_neighbours_are_those_of_pymatgen(mixed, cutoff):
    crystals = mixed(8)
    graph = cgcnn.neighbours(crystals, cutoff=cutoff)
    for m in range(len(crystals)):
        structure = crystals.structure(m)
        for i, near in enumerate(structure.get_all_neighbors(cutoff)):
            expected = sorted((x.nn_distance, x.index) for x in near)[:12]
            found = [(d, j) for d, j, w in entries(graph, m, i) for _ in range(round(w))]   # own images come in pairs
            assert [j for _, j in found] == [j for _, j in expected]
            np.testing.assert_allclose([d for d, _ in found], [d for d, _ in expected], atol=1e-4)


def test_a_long_cell_needs_more_than_the_first_images(mixed):
    crystals = mixed(1)
    crystals.lattice[:] = [20.0, 2.0, 20.0, 90, 90, 90]
    structure, graph = crystals.structure(0), cgcnn.neighbours(crystals)
    for i, near in enumerate(structure.get_all_neighbors(8.0)):
        expected = sorted(x.nn_distance for x in near)[:12]
        assert len(expected) >= 8                                                            # four cells to either side
        assert sum(w for _, _, w in entries(graph, 0, i)) == pytest.approx(min(12, len(expected)))
        assert entries(graph, 0, i)[-1][0] == pytest.approx(expected[-1], abs=1e-4)


def test_atoms_of_the_last_shell_share_what_is_left(perovskites):
    crystals = perovskites(1, slide=0.0)
    a, graph = crystals.lattice[0, 0], cgcnn.neighbours(crystals)
    assert [(round(d / a, 4), w) for d, _, w in entries(graph, 0, 0)] == [(0.7071, 4.0)] * 3     # A: twelve X
    b = entries(graph, 0, 1)                                                                     # B: six X, then eight A
    assert [(round(d / a, 4), w) for d, _, w in b] == [(0.5, 2.0)] * 3 + [(0.866, 6.0)]
    x = [(round(d / a, 4), j, w) for d, j, w in entries(graph, 0, 2)]                            # X: two B, then four A and eight X
    assert x[0] == (0.5, 1, 2.0) and [j for _, j, _ in x[1:]] == [0, 3, 4] and {d for d, _, _ in x[1:]} == {0.7071}
    assert [w for _, _, w in x[1:]] == pytest.approx([10 / 3] * 3)                               # ten places for twelve atoms


def test_the_prediction_does_not_depend_on_how_the_cell_is_written(perovskites, mixed, model):
    for crystals in (perovskites(8, slide=0.0), perovskites(8), mixed(8)):
        np.testing.assert_allclose(cgcnn.predict(model, rewritten(crystals)), cgcnn.predict(model, crystals), atol=1e-4)


def test_a_supercell_has_the_properties_of_its_cell(perovskites, model):
    crystals = perovskites(4)
    double = replace(crystals, lattice=crystals.lattice * [1, 1, 2, 1, 1, 1], numbers=np.tile(crystals.numbers, 2),
                     frac=np.concatenate([crystals.frac * [1, 1, 0.5], crystals.frac * [1, 1, 0.5] + [0, 0, 0.5]], 1))
    np.testing.assert_allclose(cgcnn.predict(model, double), cgcnn.predict(model, crystals), atol=1e-4)


def test_padding_and_company_change_nothing(mixed, model):
    crystals = mixed(8)
    alone = [cgcnn.predict(model, crystals.select(slice(m, m + 1)))[0] for m in range(8)]
    np.testing.assert_allclose(cgcnn.predict(model, crystals, block=3), alone, atol=1e-5)


def test_swapped_cations_and_another_lattice_are_told_apart(perovskites, model):
    crystals = perovskites(4)
    swapped = replace(crystals, numbers=crystals.numbers[:, [1, 0, 2, 3, 4]])
    larger = replace(crystals, lattice=crystals.lattice * [1.1, 1.1, 1.1, 1, 1, 1])
    for other in (swapped, larger):
        assert (np.abs(cgcnn.predict(model, other) - cgcnn.predict(model, crystals)) > 1e-4).any(1).all()


def test_every_element_has_features_of_its_own():
    table = cgcnn.atom_features()
    assert table.shape[0] == 104 and not table[0].any()
    assert np.isfinite(table).all() and len(np.unique(table, axis=0)) == 104
    assert (table[1:, :29].sum(1) == 3).all()                                               # group, row, block
    chemistry = lambda a, b: np.linalg.norm(table[crystal.atomic_number(a)] - table[crystal.atomic_number(b)])
    assert chemistry("S", "Se") < chemistry("S", "Cs") and chemistry("Yb", "Lu") < chemistry("Yb", "F")


def test_elements_never_seen_in_training_get_finite_and_different_predictions(perovskites, model):
    crystals = perovskites(1)
    cells = {name: replace(crystals, numbers=np.array([[crystal.atomic_number(e) for e in ("K", "Ta", name, name, name)]]))
             for name in ("Se", "I", "Yb", "Lr")}
    values = np.array([cgcnn.predict(model, c)[0] for c in cells.values()])
    assert np.isfinite(values).all() and len(np.unique(values.round(6), axis=0)) == 4


def test_the_gradient_reaches_every_weight_and_leaves_out_unknown_labels(perovskites, model):
    crystals = perovskites(6)
    batch = cgcnn.neighbours(crystals) | {"labels": torch.as_tensor(crystals.labels, dtype=torch.float32)}
    batch["labels"][0] = torch.nan
    cgcnn.objective(model.train(), batch)[0].backward()
    flat = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0]
    assert flat == []
    batch["labels"][0] = torch.tensor([torch.nan, 1e6])
    assert cgcnn.objective(model.eval(), batch)[0] > 100                                    # the one that is known counts


def test_training_learns_and_the_predictions_are_in_electronvolt(perovskites):
    crystals = perovskites(48, labels=np.zeros((48, 2)))
    z = crystals.numbers[:, 0].astype(float)
    crystals.labels[:] = np.stack([z / 10, 5 + z / 20], 1)                                  # the A site tells
    run = cgcnn.train_cgcnn(TINY.with_(epochs=30), crystals, crystals, progress=False)
    found = cgcnn.score(cgcnn.predict(run.model, crystals), crystals.labels, NAMES)
    assert found["heat_all_mae"] < 0.4 * np.abs(crystals.labels[:, 1] - crystals.labels[:, 1].mean()).mean()
    assert found["dir_gap_r2"] > 0.7 and run.history[-1]["dir_gap_mae"] < run.history[0]["dir_gap_mae"]
    assert not run.model.training


def test_a_killed_run_goes_on_as_if_it_had_not_been(perovskites, tmp_path, monkeypatch):
    crystals = perovskites(16)
    whole = cgcnn.train_cgcnn(TINY, crystals, crystals, progress=False)
    real, state = cgcnn.train_epoch, tmp_path / "state.safetensors"

    def killed(model, average, optimizer, tensors, cfg, epoch, objective):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(model, average, optimizer, tensors, cfg, epoch, objective)

    monkeypatch.setattr(cgcnn, "train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        cgcnn.train_cgcnn(TINY, crystals, crystals, state=state, every=1, progress=False)
    monkeypatch.setattr(cgcnn, "train_epoch", real)
    resumed = cgcnn.train_cgcnn(TINY, crystals, crystals, state=state, progress=False)
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in whole.history]
    assert np.array_equal(cgcnn.predict(resumed.model, crystals), cgcnn.predict(whole.model, crystals))
    with pytest.raises(CheckpointError, match="seed"):
        cgcnn.train_cgcnn(TINY.with_(seed=1), crystals, crystals, state=state, progress=False)


def test_a_loss_that_is_not_finite_is_an_error(perovskites):
    crystals = perovskites(8)
    with pytest.raises(ValueError, match="lower lr"):
        cgcnn.train_cgcnn(TINY.with_(lr=1e30, clip=0.0), crystals, crystals, progress=False)


def test_record_writes_a_checkpoint_and_a_run_file_that_agree(perovskites, tmp_path, monkeypatch):
    sets = {s: perovskites(12, seed=k) for k, s in enumerate(data.SPLITS)}
    monkeypatch.setattr(cgcnn.data, "load", lambda name, split, scheme: sets[split])
    monkeypatch.setattr(cgcnn, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(cgcnn.experiments, "RUNS", tmp_path / "runs")
    write = cgcnn.results.write_run
    monkeypatch.setattr(cgcnn.results, "write_run", lambda *a, **k: write(*a, **k, root=tmp_path / "results"))
    m = cgcnn.record(TINY)
    stored = json.loads((tmp_path / "results" / "perov_5-cgcnn" / "seed0.json").read_text())
    model, meta = cgcnn.load(cgcnn.path_of(TINY))
    assert stored["metrics"] == meta["metrics"] == m and stored["split"] == meta["split"] == "test"
    assert set(m) == {"dir_gap_mae", "dir_gap_r2", "heat_all_mae", "heat_all_r2"} and meta["seed"] == 0
    assert model.cfg == TINY and len(meta["history"]) == TINY.epochs
    assert cgcnn.score(cgcnn.predict(model, sets["test"]), sets["test"].labels, NAMES) == pytest.approx(m, abs=1e-6)
    assert cgcnn.record(TINY) == pytest.approx(m)                                           # finished: scored again, not trained


def test_files_that_hold_no_cgcnn_are_refused_by_name(tmp_path, model):
    with pytest.raises(CheckpointError, match="missing.safetensors"):
        cgcnn.load(tmp_path / "missing.safetensors")
    checkpoint.write(tmp_path / "other.safetensors", model.state_dict(), {"config": TINY.to_dict()})
    with pytest.raises(CheckpointError, match="other.safetensors.*no CGCNN"):
        cgcnn.load(tmp_path / "other.safetensors")
    meta = {"config": TINY.with_(width=16).to_dict(), "shape": {"label_mean": [0, 0], "label_std": [1, 1]}}
    checkpoint.write(tmp_path / "wide.safetensors", model.state_dict(), meta)
    with pytest.raises(CheckpointError, match="wide.safetensors.*do not fit"):
        cgcnn.load(tmp_path / "wide.safetensors")


def test_the_files_lie_apart_from_those_the_model_card_reads():
    assert cgcnn.path_of(TINY) not in set(cgcnn.experiments.CHECKPOINTS.glob("*.safetensors"))
    assert cgcnn.path_of(TINY).parent.parent == cgcnn.experiments.CHECKPOINTS
    assert "grouped" in cgcnn.path_of(TINY.with_(split_scheme="grouped")).name


# ---- baselines ----------------------------------------------------------------------------------


def test_twins_share_their_composition_features_and_not_their_sites(perovskites):
    crystals = perovskites(4)
    twins = replace(crystals, numbers=crystals.numbers[:, [1, 0, 2, 3, 4]])
    np.testing.assert_allclose(cgcnn.composition_features(twins), cgcnn.composition_features(crystals), atol=1e-6)
    assert (cgcnn.site_features(twins) != cgcnn.site_features(crystals)).any(1).all()


def test_nearest_neighbours_find_the_answer_and_choose_k_on_val(perovskites):
    rng = np.random.default_rng(0)
    x = {s: rng.uniform(size=(n, 1)) for s, n in zip(data.SPLITS, (400, 60, 60))}
    noise = rng.normal(size=400)
    labels = {s: np.hstack([v, 0 * v]) for s, v in x.items()}
    labels["train"][:, 1] = noise                                                           # nothing to find: large k wins
    sets = {s: perovskites(len(v), labels=labels[s]) for s, v in x.items()}
    out = cgcnn.knn_baseline(x, sets, NAMES)
    assert out["dir_gap_mae"] < 0.01 and out["dir_gap_r2"] > 0.99 and out["dir_gap_k"] < 12
    assert out["heat_all_k"] == max(cgcnn.KS)
    assert cgcnn.knn_baseline(x, sets, NAMES, ks=(1,))["heat_all_mae"] > 2 * out["heat_all_mae"]


def test_unknown_labels_of_neighbours_are_left_out(perovskites):
    x = {s: np.linspace(0, 1, 40)[:, None] for s in data.SPLITS}
    sets = {s: perovskites(40, labels=np.hstack([v, v])) for s, v in x.items()}
    sets["train"].labels[::2, 0] = np.nan
    assert 0 < cgcnn.knn_baseline(x, sets, NAMES, ks=(2,))["dir_gap_mae"] < 0.03


def test_the_constant_baseline_uses_the_training_labels_only(perovskites):
    sets = {s: perovskites(10, labels=np.full((10, 2), v)) for s, v in zip(data.SPLITS, (1.0, 5.0, 3.5))}
    sets["train"].labels[:5, 0] = np.nan
    for what in ("mean", "median"):
        out = cgcnn.constant_baseline(sets, NAMES, what)
        assert out["dir_gap_mae"] == pytest.approx(2.5) and out["heat_all_mae"] == pytest.approx(2.5)


def test_of_gaps_that_are_mostly_zero_the_median_is_no_gap(perovskites):
    gaps = {s: np.array([[0.0, 1.0]] * 7 + [[3.0, 2.0]] * 3) for s in data.SPLITS}
    sets = {s: perovskites(10, labels=gaps[s]) for s in data.SPLITS}
    assert cgcnn.constant_baseline(sets, NAMES, "median")["dir_gap_mae"] == pytest.approx(0.9)
    assert cgcnn.constant_baseline(sets, NAMES, "mean")["dir_gap_mae"] == pytest.approx(0.7 * 0.9 + 0.3 * 2.1)


def test_another_schedule_stands_beside_the_stored_one():
    assert cgcnn.settings(seed=1).name == "cgcnn" and cgcnn.settings(epochs=100).name == "cgcnn100"
    assert cgcnn.path_of(cgcnn.settings(epochs=100)) != cgcnn.path_of(cgcnn.settings(epochs=cgcnn.SETTINGS.epochs))
