"""FTCP: the representation against its definition, what survives it, the model, the training."""

import math

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice

from meidnet_core import crystal, ftcp, matching
from meidnet_core.checkpoint import CheckpointError
from meidnet_core.data import DataError


@pytest.fixture
def build(vocabulary):
    """build(crystals) -> (layout fitted on them, tensors, cells)."""

    def make(crystals):
        sites, columns = crystals.numbers.shape[1], max(3, *(len(set(z[z > 0])) for z in crystals.numbers))
        tensors, cells = ftcp.to_tensors(crystals, vocabulary, sites, columns)
        return ftcp.Layout(vocabulary, sites, columns).fit(tensors), tensors, cells

    return make


def raw(layout, tensors):
    return layout.represent(tensors) * layout.span + layout.low


# ---- element properties and k points -------------------------------------------------------------


def test_every_element_has_one_class_per_known_property():
    table = ftcp.element_properties()
    assert table.shape[0] == 104 and set(table.unique().tolist()) == {0.0, 1.0}
    iron, oxygen = table[26], table[8]
    assert iron.sum() == oxygen.sum() == 9 and table[0].sum() == 0
    assert iron[:18].argmax() == 7 and oxygen[:18].argmax() == 15, "groups 8 and 16"
    assert iron[18:25].argmax() == 3 and oxygen[18:25].argmax() == 1, "periods 4 and 2"
    assert table[10][29:39].sum() == 0, "neon has no electronegativity"


@pytest.mark.parametrize("lattice", [[4.1, 4.1, 4.1, 90, 90, 90], [2.46, 2.46, 6.7, 90, 90, 120], [3.1, 7.4, 9.2, 80, 97, 112]])
def test_k_points_are_those_of_the_original_recipe(lattice):
    """Ren et al.: points in a sphere by pymatgen, the first 59 in the order |h|+|k|+|l|, -h, -k, -l."""
    hkl, g = ftcp.k_points(np.array([lattice], dtype=float))
    reciprocal = Lattice.from_parameters(*lattice).reciprocal_lattice_crystallographic
    for radius in ftcp.RADII:
        points, length, _, _ = reciprocal.get_points_in_sphere([[0, 0, 0]], [0, 0, 0], radius, zip_results=False)
        if len(points) >= 60:
            break
    points, length = points[length > 0], length[length > 0]
    order = np.lexsort((*-points.T[::-1], np.abs(points).sum(1)))[: ftcp.POINTS]
    assert np.array_equal(hkl[0], points[order]) and np.allclose(g[0], length[order])


def test_a_cell_with_too_few_k_points_is_filled_with_zeros():
    hkl, g = ftcp.k_points(np.array([[1.5, 1.5, 1.5, 90, 90, 90]]))
    few = int((g[0] > 0).sum())
    assert 0 < few < ftcp.POINTS and not hkl[0, few:].any() and g.max() <= ftcp.RADII[1]


# ---- representation ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["perovskites", "mixed"])
def test_decoding_a_representation_gives_back_the_cell(request, build, kind):
    layout, tensors, cells = build(request.getfixturevalue(kind)(12))
    for found, true in zip(layout.cells(layout.represent(tensors)), cells, strict=True):
        assert found[1] == true[1]
        assert np.allclose(found[0], true[0], atol=1e-3) and np.allclose(found[2], true[2], atol=1e-5)


def test_cells_are_those_of_the_file(perovskites, build):
    crystals = perovskites(10)
    cells = build(crystals)[2]
    for i, (lattice, symbols, frac) in enumerate(cells):
        original = crystals.structure(i, original=True)
        assert symbols == [s.specie.symbol for s in original] and np.allclose(lattice, original.lattice.parameters)
        assert np.abs(crystal.wrap(frac - original.frac_coords)).max() < 1e-6 and frac.min() >= 0 and frac.max() < 1


def test_the_cells_of_the_file_match_their_canonical_form(mixed, build):
    crystals = mixed(6)
    assert not np.isnan(matching.match(build(crystals)[2], matching.true_cells(crystals))).any()


def test_scaled_rows_fill_zero_to_one_and_constant_rows_are_zero(mixed, build):
    layout, tensors, _ = build(mixed(12))
    x = layout.represent(tensors)
    assert x.shape == (12, layout.rows, layout.columns + 59) and layout.rows % 4 == 0
    low, high = x.amin((0, 2)), x.amax((0, 2))
    assert low.min() == 0 and torch.allclose(high[high > 0], torch.ones(1))
    assert high[len(layout.elements)] == 1 and (high == 0).any()


def test_reciprocal_features_follow_their_definition(mixed, build):
    """F = sum over sites of the property of the element times pi k.r, written with loops."""
    layout, tensors, cells = build(mixed(4))
    x = raw(layout, tensors)
    first = len(layout.elements) + 3 + 2 * layout.sites
    count = layout.properties.shape[1]
    for i, (_, symbols, frac) in enumerate(cells):
        expected = np.zeros((count, 59))
        for s, position in zip(symbols, frac, strict=True):
            one_hot = layout.properties[layout.elements.index(s)].numpy()
            expected += one_hot[:, None] * (math.pi * tensors["hkl"][i].numpy() @ position)[None]
        assert np.allclose(x[i, first:first + count, layout.columns:], expected, atol=1e-3)
        assert torch.allclose(x[i, first - 1, layout.columns:], tensors["g"][i], atol=1e-5)
        assert x[i, :first - 1, layout.columns:].abs().max() < 1e-3, "real-space rows are empty in reciprocal columns"


def test_a_site_below_the_occupancy_threshold_is_empty(perovskites, build):
    layout, tensors, cells = build(perovskites(3))
    x, site = layout.represent(tensors), len(layout.elements) + 2 + layout.sites + 2
    x[:, site, : layout.columns] *= 0.2
    assert [c[1] for c in layout.cells(x)] == [c[1] for c in cells]
    assert [c[1] for c in layout.cells(x, threshold=0.5)] == [c[1][:2] + c[1][3:] for c in cells]


def test_an_unknown_element_is_named(perovskites, vocabulary):
    with pytest.raises(DataError, match="is not in the model's vocabulary"):
        ftcp.to_tensors(perovskites(8), vocabulary[:3], 5, 5)


def test_too_many_elements_for_the_columns_are_named(perovskites, vocabulary):
    with pytest.raises(DataError, match="elements, 1 columns"):
        ftcp.to_tensors(perovskites(4), vocabulary, 5, 1)


# ---- model and training --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 144, 212])
def test_shapes_and_a_fixed_output_outside_training(rows):
    torch.manual_seed(0)
    model, x = ftcp.FTCP(rows, 64, 2), torch.rand(3, rows, 64)
    noisy = [model(x)[0] for _ in range(2)]
    assert not torch.equal(*noisy), "the latent is sampled in training"
    model.eval()
    out, mean, log_var, prop = model(x)
    assert out.shape == x.shape and mean.shape == log_var.shape == (3, 256) and prop.shape == (3, 2)
    assert torch.equal(out, model(x)[0]) and 0 < out.min() and out.max() < 1


def test_the_loss_is_the_stated_sum_and_missing_labels_add_nothing():
    torch.manual_seed(0)
    model, x, labels = ftcp.FTCP(64, 62, 2).eval(), torch.rand(4, 64, 62), torch.rand(4, 2)
    out, mean, log_var, prop = model(x)
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
    expected = ((out - x) ** 2).sum() + 2 * kl + 10 * ((prop - labels) ** 2).sum()
    assert ftcp.loss_of(model, x, labels)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    loss, terms = ftcp.loss_of(model, x, labels * math.nan)
    loss.backward()
    assert terms["prop"] == 0 and terms["kl"] > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_learning_rate_follows_the_callbacks_of_the_original():
    falling = [{"loss": -float(i), "cut": False} for i in range(200)]
    rate, rates = ftcp.SETTINGS["lr"], []
    for epoch in range(200):
        rate, cut = ftcp.next_rate(falling[:epoch], rate, 200)
        rates.append(rate)
        assert not cut
    assert rates[0] == rates[49] == 5e-4 and rates[50] == rates[99] == 1e-4 and rates[100] == rates[199] == 5e-5
    assert ftcp.rate_steps(20) == (12, 17)


def test_a_loss_that_stays_cuts_the_learning_rate_once_in_four_epochs():
    history, rate = [], ftcp.SETTINGS["lr"]
    for _ in range(12):
        rate, cut = ftcp.next_rate(history, rate, 1000)
        history.append({"loss": 1.0, "cut": cut})
    assert [i for i, h in enumerate(history) if h["cut"]] == [5, 9]
    assert rate == pytest.approx(5e-4 * 0.09)


def test_it_learns_to_rebuild_a_few_cells(perovskites, build):
    layout, tensors, _ = build(perovskites(6))
    model, history, seconds = ftcp.train(layout, tensors, epochs=30, progress=False)
    assert history[-1]["recon"] < 0.5 * history[0]["recon"] and seconds > 0 and not model.training
    torch.manual_seed(0)
    untrained, x = ftcp.FTCP(layout.rows, layout.columns + 59, 2).eval(), layout.represent(tensors)
    with torch.no_grad():
        first, last = (((m(x)[0] - x) ** 2).sum() for m in (untrained, model))
    assert last < 0.9 * first, "in evaluation, with running statistics, too"


def test_a_resumed_run_ends_as_the_uninterrupted_one(perovskites, build, tmp_path):
    layout, tensors, _ = build(perovskites(6))
    whole, history, _ = ftcp.train(layout, tensors, epochs=4, progress=False)
    path = tmp_path / "run.safetensors"
    part = ftcp.train(layout, tensors, epochs=4, minutes=1e-9, path=path, progress=False)
    assert len(part[1]) == 1, "the time was over after one epoch"
    resumed, again, _ = ftcp.train(layout, tensors, epochs=4, path=path, progress=False)
    assert [h["loss"] for h in again] == [h["loss"] for h in history]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        ftcp.train(layout, tensors, seed=1, epochs=4, path=path, progress=False)


def test_evaluate_counts_compositions_matches_and_atoms(perovskites, build):
    cells = build(perovskites(4))[2]
    perfect = ftcp.evaluate(cells, cells, 1)
    assert perfect["composition"] == perfect["atoms"] == perfect["sm_cdvae"] == perfect["sm_default"] == 100
    assert perfect["rmse_cdvae"] == pytest.approx(0, abs=1e-6)
    lattice, symbols, frac = cells[0]
    worse = [(lattice, symbols[:-1], frac[:-1]), *cells[1:]]
    found = ftcp.evaluate(worse, cells, 1)
    assert found["atoms"] == found["composition"] == found["sm_cdvae"] == 75
    none = ftcp.evaluate([worse[0]], cells[:1], 1)
    assert none["sm_cdvae"] == 0 and "rmse_cdvae" not in none


def test_a_training_that_was_cut_short_says_so():
    whole, cut = (ftcp.claims_of("mp_20", {"sm_cdvae": 30.0}, n)["t1.mp20.ftcp"] for n in (ftcp.EPOCHS, 23))
    carbon = ftcp.claims_of("carbon_24", {"sm_cdvae": 30.0}, 23)["t1.carbon24.ftcp"]["split"]
    assert carbon == "test (23 of 200 epochs; trained on 2,897 of the original 6,091 cells)"
    assert whole == {"value": 30.0, "split": "test"} and cut["split"] == "test (23 of 200 epochs)"
