"""Metrics on hand-made cases, and `evaluate` as a whole."""

import math

import numpy as np
import pytest
import torch

from meidnet_core import matching, metrics
from meidnet_core.metrics import alignment, effective_dimension, regression, retrieval


def test_alignment_of_equal_opposite_and_orthogonal_vectors():
    e = np.eye(4)
    assert alignment(e, e) == {"cosine": 1, "l2d": 0}
    assert alignment(e, -e) == {"cosine": -1, "l2d": 2}
    assert alignment(e, np.roll(e, 1, 0)) == {"cosine": 0, "l2d": pytest.approx(2**0.5)}
    half = alignment(e[:2], np.array([[1.0, 0, 0, 0], [0, -1, 0, 0]]))
    assert half == {"cosine": 0, "l2d": 1}


def test_l2d_follows_from_the_cosine_on_the_unit_sphere():
    a, b = (np.random.default_rng(s).normal(size=(1, 5)) for s in (0, 1))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    m = alignment(a, b)
    assert m["l2d"] == pytest.approx(math.sqrt(2 - 2 * m["cosine"]))


def test_regression_by_hand_without_missing_labels():
    m = regression(np.array([1.0, 2, 5, 7]), np.array([1.0, 2, 3, np.nan]))
    assert m == {"mae": pytest.approx(2 / 3), "r2": pytest.approx(1 - 4 / 2)}


def test_r2_is_one_for_the_truth_and_zero_for_the_mean():
    labels = np.array([1.0, 2, 6, np.nan])
    assert regression(labels, labels) == {"mae": 0, "r2": 1}
    assert regression(np.full(4, 3.0), labels)["r2"] == pytest.approx(0)


def test_retrieval_finds_the_partner():
    e, labels = np.eye(12), np.arange(12.0)[:, None]
    assert retrieval(e, e, labels) == {"top1": 1, "top10": 1, "top1_label": 1}
    m = retrieval(e, -e, labels)
    assert m["top1"] == 0 and m["top10"] == 0, "the partner comes last"


def test_retrieval_counts_ranks():
    """Query 0 finds its partner at rank 2, query 1 at rank 1."""
    query = np.array([[1.0, 0], [0, 1]])
    pool = np.array([[0.6, 0.8], [0.8, 0.6]])
    m = retrieval(query, pool, np.array([[0.0], [1.0]]))
    assert m == {"top1": 0, "top10": 1, "top1_label": 0}
    m = retrieval(np.array([[1.0, 0], [1, 0]]), np.array([[1.0, 0], [0.6, 0.8]]), np.zeros((2, 1)))
    assert m == {"top1": 0.5, "top10": 1, "top1_label": 1}


def test_the_ten_most_similar_are_ten():
    """One query for all; partner k stands at rank k + 1: ten of twenty are found, no more."""
    angle = np.linspace(0, 1.5, 20)
    pool = np.stack([np.cos(angle), np.sin(angle)], 1)
    m = retrieval(np.array([[1.0, 0.0]] * 20), pool, angle[:, None])
    assert m["top10"] == 10 / 20 and m["top1"] == 1 / 20


def test_equally_similar_crystals_share_the_ten_places():
    same = np.tile([[0.6, 0.8]], (40, 1))
    m = retrieval(same, same, np.arange(40.0)[:, None])
    assert m["top10"] == pytest.approx(10 / 40), "a collapsed embedding scores chance"
    assert m["top1"] == pytest.approx(1 / 40)


def test_any_crystal_with_equal_labels_is_a_right_label():
    query = np.eye(3)
    pool = query[[1, 0, 2]]
    labels = np.array([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0]])
    m = retrieval(query, pool, labels)
    assert m["top1"] == pytest.approx(1 / 3) and m["top1_label"] == 1


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_the_effective_dimension_of_k_equal_directions_is_k(k):
    y = np.zeros((2 * k, 16))
    for i in range(k):
        y[2 * i, i], y[2 * i + 1, i] = 1, -1
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    assert effective_dimension(y @ turn + 3.0) == pytest.approx(k)


def test_an_uneven_spectrum_counts_less():
    y = np.diag([3.0, 1.0, 0.0])
    both = np.concatenate([y, -y])
    assert effective_dimension(both) == pytest.approx((9 + 1) ** 2 / (81 + 1))


# ---- a model as a whole --------------------------------------------------------------------------


@pytest.fixture
def case(config, perovskites, tensors_of, model_of):
    """case(**changes): (untrained model, tensors, crystals), labels in both units."""

    def make(count=12, **changes):
        cfg = config("improved", **changes)
        crystals = perovskites(count)
        tensors = tensors_of(crystals, cfg)
        return model_of(cfg, tensors).eval(), tensors, crystals

    return make


@pytest.mark.parametrize("changes", [{}, {"fusion": "late"}, {"labels": ("heat_all",)}])
def test_evaluate_gives_a_finite_value_for_every_metric(case, changes):
    model, tensors, crystals = case(**changes)
    tensors["labels"][3, 0] = math.nan
    m, details = metrics.evaluate(model, tensors, crystals, processes=1)
    rates = [f"{k}{end}" for k in ("cdvae", "default") for end in ("", "_alone")]
    unmatched = {f"rmse_{k}" for k in rates if m[f"sm_{k}"] == 0}
    assert {k for k, v in m.items() if v is None} == unmatched
    assert all(math.isfinite(v) for v in m.values() if v is not None)
    expected = {"sm_cdvae", "sm_default", "sm_cdvae_alone", "sm_default_alone", "exact_composition", "site_accuracy", "lattice_mae"}
    expected |= {"cosine", "l2d", "effective_dimension", "property_to_structure_top1"}
    expected |= {f"{lab}_{s}_{k}" for lab in model.cfg.labels for s in ("joint", "alone") for k in ("mae", "r2")}
    assert expected <= set(m) and m["n"] == 12
    assert len(details["cells"]) == len(details["rms_cdvae"]) == len(details["confidence"]) == 12


class Perfect:
    """Stands for a model that decodes the truth."""

    def __init__(self, model, tensors):
        self.model, self.tensors = model, tensors

    def __getattr__(self, name):
        return getattr(self.model, name)

    def decode(self, z, sample=False):
        t, n = self.tensors, len(z)
        return {
            "lattice": t["lattice"],
            "species": t["species"],
            "frac": t["frac"],
            "adjacency": t["adjacency"],
            "confidence": torch.ones(n),
        }


def test_a_perfect_decoder_scores_100_percent(case):
    model, tensors, crystals = case()
    m, _ = metrics.evaluate(Perfect(model, tensors), tensors, crystals, processes=1)
    assert m["sm_cdvae"] == m["sm_default"] == m["exact_composition"] == m["site_accuracy"] == 100
    assert m["rmse_cdvae"] < 1e-4 and m["lattice_mae"] < 1e-4


def test_one_wrong_site_costs_one_site_and_one_composition(case):
    model, tensors, crystals = case()
    wrong = {k: t.clone() for k, t in tensors.items()}
    wrong["species"][4, 0] = (wrong["species"][4, 0] + 1) % len(model.shape.elements)
    m, _ = metrics.evaluate(Perfect(model, wrong), tensors, crystals, processes=1)
    assert m["exact_composition"] == pytest.approx(100 * 11 / 12)
    assert m["site_accuracy"] == pytest.approx(100 * 59 / 60)


def test_encoding_in_blocks_is_the_same(case):
    model, tensors, _ = case()
    whole, blocks = metrics.encode(model, tensors), metrics.encode(model, tensors, block=5)
    assert whole.keys() == blocks.keys()
    for key in whole:
        assert np.allclose(whole[key], blocks[key], atol=1e-5), key


def test_encode_returns_labels_and_predictions_in_physical_units(case):
    model, tensors, crystals = case()
    e = metrics.encode(model, tensors)
    assert np.allclose(e["labels"], crystals.labels, atol=1e-6)
    y = model.properties(torch.from_numpy(e["z"])).detach()
    assert np.allclose(e["joint"], (y * model.label_std + model.label_mean).numpy(), atol=1e-5)
    assert e["known0"].all() and np.allclose(np.linalg.norm(e["y_c"], axis=1), 1, atol=1e-5)


def test_decoded_cells_do_not_depend_on_the_block_size(case):
    model, _, _ = case()
    z = np.random.default_rng(0).normal(size=(7, model.cfg.latent)).astype(np.float32)
    whole, confidence, _ = metrics.decode(model, z, model.shape.elements)
    blocks, _, _ = metrics.decode(model, z, model.shape.elements, block=3)
    assert len(whole) == 7 and confidence.shape == (7,)
    for a, b in zip(whole, blocks, strict=True):
        assert a[1] == b[1] and np.allclose(a[0], b[0], atol=1e-4)
        assert np.allclose(a[2], b[2], atol=1e-5)


def test_alignment_is_scored_on_labelled_crystals_only(case):
    model, tensors, crystals = case()
    tensors["labels"][6:] = math.nan
    m, e = metrics.evaluate(model, tensors, crystals, processes=1)
    expected = metrics.alignment(e["y_c"][:6], e["y_p0"][:6])
    assert m["cosine"] == pytest.approx(expected["cosine"])
    assert e["known0"].tolist() == [True] * 6 + [False] * 6


# ---- baselines -----------------------------------------------------------------------------------


def test_baselines_state_what_needs_no_model(perovskites):
    train, test = perovskites(10, seed=1), perovskites(12, seed=2, slide=0.05)
    test.labels[:] = np.repeat([[0.0, 1.0], [0.0, 2.0], [3.0, 1.0]], 4, 0)
    test.labels[0, 0] = np.nan
    b = metrics.baselines(test, train, n=None, processes=1)
    assert b["prototype_sm_cdvae"] == 100 and b["swapped_sm_cdvae"] == 0
    assert b["wrong_element_sm_cdvae"] == 0 and b["wrong_element_rmse_cdvae"] is None
    mean = train.labels[:, 1].mean()
    assert b["heat_all_mean_mae"] == pytest.approx(np.abs(test.labels[:, 1] - mean).mean())
    gap = np.abs(test.labels[1:, 0] - train.labels[:, 0].mean()).mean()
    assert b["dir_gap_mean_mae"] == pytest.approx(gap)
    assert b["retrieval_ceiling_top1"] == pytest.approx(3 / 11)
    assert b["retrieval_chance_top1"] == pytest.approx(1 / 11)
    lengths = np.abs(test.lattice[:, :3] - train.lattice[:, :3].mean(0)).mean()
    assert b["mean_lattice_mae"] == pytest.approx(lengths)


def test_baselines_of_other_crystals_leave_the_prototype_out(mixed):
    b = metrics.baselines(mixed(6), mixed(8, seed=1), processes=1)
    assert not [k for k in b if "sm" in k] and "band_gap_mean_mae" in b


def test_matching_rates_of_evaluate_are_those_of_the_decoded_cells(case):
    model, tensors, crystals = case()
    m, e = metrics.evaluate(model, tensors, crystals, processes=1)
    again = matching.match(e["cells"], matching.true_cells(crystals), matching.CDVAE, 1)
    assert np.array_equal(again, e["rms_cdvae"], equal_nan=True)
    assert m["sm_cdvae"] == matching.summary(again)["sm"]


def test_without_a_known_label_there_is_no_score():
    m = regression(np.ones(3), np.full(3, np.nan))
    assert np.isnan(m["mae"]) and np.isnan(m["r2"])
