"""Set autoencoder on data sets: Niggli cells, buckets, batches, training that resumes, decoding, scoring."""

import numpy as np
import pytest
import torch

from meidnet_core import checkpoint, crystal, data, flow, large_cells, matching
from meidnet_core.memory import Memory, roles_of

SMALL = flow.FlowConfig(width=16, edge_width=8, latent=12, blocks=1, rbf=4, fourier=1, heads=2, epochs=2, pairs=60)


@pytest.fixture
def trained(mixed):
    crystals = mixed(12)
    elements = data.vocabulary(crystals)
    groups = large_cells.buckets(crystals, elements)
    return crystals, elements, groups, large_cells.train(SMALL, groups, elements, progress=False).model


def test_niggli_is_the_same_crystal(triclinic):
    rng = np.random.default_rng(0)
    for _ in range(4):
        lattice, numbers, frac = triclinic(rng, 4)
        symbols = [crystal.symbol(z) for z in numbers]
        skewed = crystal.to_structure(lattice, symbols, frac)
        skewed = skewed * [[1, 1, 0], [0, 1, 0], [0, 1, 1]]                      # another cell of the same crystal
        new_lattice, new_frac = large_cells.niggli(skewed.lattice.parameters, skewed.frac_coords)
        names = [s.specie.symbol for s in skewed]
        rms = matching.match_one(((np.array(new_lattice), names, new_frac), (lattice, symbols, frac), matching.DEFAULT))
        assert rms < 1e-3
        assert np.ptp(new_lattice[:3]) <= np.ptp(skewed.lattice.abc) + 1e-6


def test_buckets_hold_every_cell_once(mixed):
    crystals = mixed(10)
    groups = large_cells.buckets(crystals, data.vocabulary(crystals))
    index = torch.cat([g["index"] for g in groups.values()])
    assert sorted(index.tolist()) == list(range(10))
    for n, g in groups.items():
        assert g["species"].shape[1] == n and g["frac"].shape[1:] == (n, 3)
        assert all((crystals.numbers[i] > 0).sum() == n for i in g["index"])


def test_batches_cover_every_cell_and_depend_on_seed_and_epoch(mixed):
    crystals = mixed(20)
    groups = large_cells.buckets(crystals, data.vocabulary(crystals))
    todo = large_cells.epoch_batches(groups, SMALL, 0)
    rows = sorted((n, i) for n, part in todo for i in part.tolist())
    assert rows == sorted((n, i) for n, g in groups.items() for i in range(len(g["index"])))
    again, later = large_cells.epoch_batches(groups, SMALL, 0), large_cells.epoch_batches(groups, SMALL, 1)
    key = lambda t: [(n, p.tolist()) for n, p in t]
    assert key(todo) == key(again) != key(later)


def test_killed_training_resumes_to_the_same_weights(mixed, tmp_path):
    crystals = mixed(12)
    elements = data.vocabulary(crystals)
    make = lambda: large_cells.buckets(crystals, elements)
    whole = large_cells.train(SMALL, make(), elements, tmp_path / "a.safetensors", progress=False)

    class Killed(Exception):
        pass

    def kill(model, epoch, record):
        if epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        large_cells.train(SMALL, make(), elements, tmp_path / "b.safetensors", on_epoch=kill, progress=False)
    resumed = large_cells.train(SMALL, make(), elements, tmp_path / "b.safetensors", progress=False)
    assert [r["epoch"] for r in resumed.history] == [0, 1]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


def test_state_of_another_configuration_is_refused(mixed, tmp_path):
    crystals = mixed(8)
    elements = data.vocabulary(crystals)
    run = lambda cfg: large_cells.train(cfg, large_cells.buckets(crystals, elements), elements, tmp_path / "a.safetensors", progress=False)
    run(SMALL)
    with pytest.raises(checkpoint.CheckpointError, match="width"):
        run(SMALL.with_(width=24))


def test_model_round_trip(trained, tmp_path):
    crystals, elements, groups, model = trained
    large_cells.save_model(tmp_path / "m.safetensors", model, split="test")
    again, meta = large_cells.load_model(tmp_path / "m.safetensors")
    assert torch.equal(large_cells.encode(model, groups), large_cells.encode(again, groups)) and meta["split"] == "test"


def test_encode_keeps_the_order_of_the_data_set(trained):
    crystals, elements, groups, model = trained
    z = large_cells.encode(model, groups)
    few = large_cells.encode(model, large_cells.buckets(crystals.select([7, 2]), elements))
    assert torch.allclose(z[[7, 2]], few, atol=1e-5)


def test_reconstruct_gives_a_cell_per_latent_and_score_counts_them(trained):
    crystals, elements, groups, model = trained
    z = large_cells.encode(model, groups)
    cells, left, confidence = large_cells.reconstruct(model, z, draws=1, steps=2, refine_steps=1, progress=False)
    assert len(cells) == len(crystals) == len(left) and (confidence <= 1).all()
    m = large_cells.score(cells, crystals, 1)[0]
    assert m["n"] == len(crystals) and 0 <= m["sm_cdvae"] <= 100
    perfect = large_cells.score(matching.true_cells(crystals), crystals, 1)[0]
    assert perfect["sm_default"] == perfect["exact_composition"] == 100
    assert large_cells.score([None] * len(crystals), crystals, 1)[0]["sm_cdvae"] == 0


def test_roles_put_equal_counts_into_every_order():
    pattern, orders = roles_of({5: 1, 2: 3, 7: 1})
    assert pattern == (3, 1, 1) and orders == [(2, 5, 7), (2, 7, 5)]
    assert len(roles_of({k: 1 for k in range(5)}, most=6)[1]) == 6


def test_memory_returns_the_training_cell_itself(trained):
    """Known limit: asked for the latent of a stored cell with its true lattice, memory finds that cell (residual 0)."""
    crystals, elements, groups, model = trained
    z = large_cells.encode(model, groups)
    memory = Memory(groups, z)
    for g in groups.values():
        species = g["species"].sort(1).values
        _, frac, r = memory.propose(model, z[g["index"]], species, g["lattice"])
        assert r.max() < 1e-3


def test_memory_without_the_pattern_proposes_nothing(trained):
    crystals, elements, groups, model = trained
    z = large_cells.encode(model, groups)
    memory = Memory({}, z)
    n, g = next(iter(groups.items()))
    assert torch.isinf(memory.propose(model, z[g["index"]], g["species"], g["lattice"])[2]).all()


def test_cli_names_the_data_sets(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["large_cells", "silicon"])
    with pytest.raises(SystemExit):
        large_cells.main()
    assert "mp_20" in capsys.readouterr().err


def test_trivial_predictions_are_bounds_that_need_the_right_pattern(mixed):
    crystals = mixed(12)
    m = large_cells.trivial(crystals, crystals, n=6)
    assert m["nearest_shape_sm_default"] == 100 and m["n"] == 6                # the very cell is in "train"
    assert m["random_sites_exact_composition"] == 100
    alone = large_cells.trivial(crystals.select([0]), crystals.select([1]), n=1)
    assert alone["nearest_shape_sm_cdvae"] == 0                                # three against four sites: nothing to lend


def test_pattern_forgets_the_names():
    assert large_cells.pattern_of(["Sr", "Ti", "O", "O"]) == large_cells.pattern_of(["K", "C", "N", "N"]) == (0, 1, 2, 2)


def test_only_the_experiment_as_it_is_by_default_answers_table_1():
    m = {"sm_cdvae": 86.0}
    assert large_cells.claims_of("mp_20-flow", m)["t1.mp20.meidnet"]["value"] == 86.0
    for other in ("mp_20-flow5", "mp_20-flow-draws4-refine0", "perov_5-flow"):
        assert large_cells.claims_of(other, m) == {}
