"""Statistics over seeds: crossings, the speed-up, ties, spreads."""

import numpy as np
import pytest

from meidnet_core import seeds


def test_epochs_to_interpolates_and_tells_when_never():
    assert seeds.epochs_to([20.0, 60.0, 90.0], 40) == pytest.approx(1.5)
    assert seeds.epochs_to([20.0, 60.0, 90.0], 10) == pytest.approx(0.5)
    assert seeds.epochs_to([20.0, 60.0, 40.0, 70.0], 60) == pytest.approx(2)       # the first time
    assert seeds.epochs_to([20.0, 60.0], 61) == float("inf")


def test_speedup_of_a_slowed_down_curve_is_the_slowing():
    t = np.arange(1, 61)
    rise = lambda scale: np.minimum(100, 10 * t / scale)
    with_ = np.array([rise(1.0), rise(1.1), rise(0.9)])
    without = np.array([rise(3.0), rise(3.3), rise(2.7)])
    value, low, high = seeds.speedup(without, with_, 90)
    assert value == pytest.approx(3, rel=1e-3) and low < 3 < high and high - low < 1.5
    assert seeds.speedup(with_, with_, 90)[0] == pytest.approx(1)
    assert seeds.gain(without, with_, 6)[0] == pytest.approx(3, rel=0.01)
    assert seeds.largest_gain(without, with_)[0] > 2.9


def test_speedup_where_a_level_is_not_reached():
    low, high = np.array([[10.0, 20.0], [10.0, 25.0]]), np.array([[50.0, 95.0], [60.0, 96.0]])
    assert seeds.speedup(low, high, 90)[0] == float("inf") and seeds.speedup(high, low, 90)[0] == 0
    assert np.isnan(seeds.speedup(low, low, 90)).all()
    assert np.isnan(seeds.gain(np.zeros((2, 2)), high, 1)).all()


def test_best_dimension_knows_ties():
    clear = {64: np.array([90.0, 90.1, 89.9]), 128: np.array([97.0, 97.1, 96.9]), 256: np.array([95.0, 95.1, 94.9])}
    top, p, ties = seeds.best(clear)
    assert top == 128 and p < 0.05 and ties == []
    noisy = clear | {256: np.array([92.0, 97.0, 101.0])}
    top, p, ties = seeds.best(noisy)
    assert top == 128 and p > 0.05 and ties == [256]
    assert seeds.best({1: np.array([5.0]), 2: np.array([9.0])}) == (2, 1.0, [1])    # one seed decides nothing


def test_spread_and_overview():
    runs = [{"metrics": {"sm": v}, "wall_time_s": 1.0, "curve": {"val_exact": [v, v]}} for v in (90.0, 92.0)]
    assert seeds.spread(seeds.values(runs, "sm")) == pytest.approx(2**0.5) and seeds.spread(np.array([5.0])) == 0
    assert seeds.overview({"a": runs}, {"sm": "SM"}).loc["a", "SM"] == "91 ± 1.4"
    assert seeds.curves(runs).shape == (2, 2)


def test_variants_are_paired_by_seed():
    runs = lambda variant, *numbers: [{"seed": n, "variant": variant} for n in numbers]
    pairs = seeds.paired({"none": runs("none", 0, 1, 2), "exp67": runs("exp67", 1, 2, 3), "other": []}, ("none", "exp67"))
    assert [[(r["seed"], r["variant"]) for r in p] for p in pairs] == [[(n, "none"), (n, "exp67")] for n in (1, 2)]


def test_a_repeated_screening_counts_once():
    runs = [{"seed": s, "curve": {"formula": list(f)}} for s, f in enumerate(("AB", "BC", "CD", "AB"))]
    assert [r["seed"] for r in seeds.distinct(runs)] == [0, 1, 2]


def test_formulas_that_seeds_share_count_once():
    runs = [{"curve": {"formula": ["a", "b", "c", "d"]}, "metrics": {"sun": rate}} for rate in (50.0, 100.0)]
    assert seeds.effective(runs, "sun") == (3, 4)
    runs = [{"curve": {"formula": list(f)}, "metrics": {"sun": 50.0}} for f in ("abc", "abd", "abe")]        # 3, 3, 1, 1, 1: 81 / 21
    assert seeds.effective(runs, "sun") == (2, 4)
    alone = [{"curve": {"formula": list(f)}, "metrics": {"sun": 50.0}} for f in ("abc", "def")]
    assert seeds.effective(alone, "sun") == (3, 6)


def test_a_ratio_names_the_hits_it_rests_on():
    assert seeds.rests_on([80, 82], [4, 4]) == "over the mean of 2 distinct runs with 8 hits, 95 % 20 to 20.5"
    assert seeds.rests_on([8, 8], [0, 4]).endswith("4 hits, 95 % 2 to inf") and seeds.rests_on([8], [0, 0]) == "no hits"


def test_a_sample_without_spread_is_compared_as_welch_would_and_without_a_warning(recwarn):
    same, other = [100.0] * 5, [99.8, 99.9, 99.6, 100.0, 99.9]
    assert seeds.p_value(same, other) == seeds.p_value(other, same) == pytest.approx(0.0777, abs=1e-4)
    assert seeds.p_value(same, [90.0] * 3) == pytest.approx(2 / 56) and seeds.p_value([1.0] * 3, [2.0] * 3) == pytest.approx(0.1)
    assert seeds.p_value(same, same) == 1.0 and not recwarn.list


def test_a_mean_is_told_with_its_spread():
    assert seeds.mean_sd(np.array([1.0, 2.0, 3.0])) == "2 ± 1" and seeds.mean_sd(np.array([1.23456, 1.23456]), 3) == "1.23"
