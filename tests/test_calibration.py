"""ROC AUC and reliability on cases with a known answer, and against scikit-learn."""

import numpy as np
import pytest

from meidnet_core.calibration import expected_calibration_error, reliability, roc_auc, roc_curve, roc_interval, wilson


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("score, label, auc", [
    ([1, 2, 3, 4], [0, 0, 1, 1], 1.0), ([4, 3, 2, 1], [0, 0, 1, 1], 0.0), ([5, 5, 5, 5], [0, 0, 1, 1], 0.5),
    ([1, 2, 2, 3], [0, 0, 1, 1], 0.875), ([1, 3, 2, 4], [0, 0, 1, 1], 0.75)])
def test_auc_by_hand(score, label, auc):
    assert roc_auc(score, label) == pytest.approx(auc)


def test_auc_is_that_of_scikit_learn_with_ties(rng):
    from sklearn.metrics import roc_auc_score
    label = rng.random(500) < 0.1
    score = np.round(rng.normal(size=500) + label, 1)
    assert len(np.unique(score)) < 100 and roc_auc(score, label) == pytest.approx(roc_auc_score(label, score))
    assert roc_auc(np.exp(score), label) == pytest.approx(roc_auc(score, label))                # any rising scale
    assert roc_auc(-score, label) == pytest.approx(1 - roc_auc(score, label))


@pytest.mark.parametrize("label", [[1, 1, 1], [0, 0, 0]])
def test_one_class_has_no_auc(label):
    assert np.isnan(roc_auc([0.1, 0.2, 0.3], label)) and np.isnan(roc_interval([0.1, 0.2, 0.3], label)).all()


def test_the_area_under_the_curve_is_the_auc(rng):
    label = rng.random(300) < 0.3
    score = np.round(rng.normal(size=300) + label, 1)
    x, y = roc_curve(score, label)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1) and (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()
    assert len(x) == len(np.unique(score)) + 1
    assert np.trapezoid(y, x) == pytest.approx(roc_auc(score, label))


def test_the_interval_covers_the_true_auc_about_as_often_as_it_says(rng):
    hits = 0
    for k in range(40):                                                                     # true AUC of N(1,1) over N(0,1): 0.760
        score, label = np.concatenate([rng.normal(size=40) + 1, rng.normal(size=120)]), np.arange(160) < 40
        auc, low, high = roc_interval(score, label, draws=100, seed=k)
        assert low <= auc <= high
        hits += low <= 0.7602 <= high
    assert 32 <= hits <= 40


def test_the_interval_narrows_with_more_cases_and_is_reproducible(rng):
    case = lambda n: (np.concatenate([rng.normal(size=n) + 1, rng.normal(size=n)]), np.arange(2 * n) < n)
    width = lambda n: np.ptp(roc_interval(*case(n), draws=150)[1:])
    assert width(500) < 0.5 * width(15)
    score, label = rng.random(50), np.arange(50) < 5
    assert roc_interval(score, label, draws=50) == roc_interval(score, label, draws=50)
    assert roc_interval(score, label, level=0.5, draws=300)[1] > roc_interval(score, label, level=0.99, draws=300)[1]


def test_separated_classes_give_an_interval_without_width():
    assert roc_interval(np.arange(100), np.arange(100) >= 3, draws=50) == (1.0, 1.0, 1.0)


def test_reliability_counts_every_case_once(rng):
    confidence = np.concatenate([rng.random(400), [0.0, 0.5, 1.0]])
    correct = rng.random(403) < confidence
    rows = reliability(confidence, correct, np.linspace(0, 1, 6))
    assert sum(r["n"] for r in rows) == 403 and sum(r["n"] * r["correct"] for r in rows) == pytest.approx(correct.sum())
    assert all(r["from"] <= r["confidence"] <= r["to"] and r["low"] <= r["correct"] <= r["high"] for r in rows)
    assert reliability([0.5], [True], [0, 0.5, 1])[0]["from"] == 0.5                        # bins are closed below
    assert reliability([1.0, 0.1], [1, 0], [0, 0.5, 1])[1]["n"] == 1                        # and the last one above


def test_calibrated_confidence_has_a_small_error_and_overconfidence_a_large_one(rng):
    p = rng.random(20_000)
    correct = rng.random(20_000) < p
    good, bad = (expected_calibration_error(reliability(c, correct, np.linspace(0, 1, 11))) for c in (p, p**0.2))
    assert good < 0.02 and bad > 0.2


def test_wilson_interval_against_known_values():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert all(low <= h / n <= high for n in range(1, 200) for h in (0, n) for low, high in [wilson(h, n)])
    assert wilson(10, 10)[1] == 1.0 and wilson(10, 10)[0] > wilson(5, 5)[0]


@pytest.mark.parametrize("score, label", [([0.1], [1, 0]), ([], []), ([[0.1]], [[1]]), ([np.nan, 1], [0, 1])])
def test_bad_input_is_refused(score, label):
    for function in (roc_auc, roc_interval, roc_curve, reliability):
        with pytest.raises(ValueError):
            function(score, label)


def test_a_confidence_outside_the_bins_is_refused():
    with pytest.raises(ValueError, match="leaves the bins"):
        reliability([0.5, 1.5], [1, 1])


def test_an_unknown_label_is_no_success():
    with pytest.raises(ValueError, match="1 of 3 labels are not known"):
        roc_auc([0.1, 0.2, 0.3], [0.0, 1.0, np.nan])
