"""Structure matching: what counts as the same crystal, and what a bad prediction does."""

import numpy as np
import pytest
import torch

from meidnet_core import matching
from meidnet_core.crystal import PEROVSKITE
from meidnet_core.matching import CDVAE, DEFAULT, match, match_one, summary

LATTICE = np.array([3.9, 3.9, 3.9, 90.0, 90.0, 90.0])
SYMBOLS = ["Sr", "Ti", "O", "O", "O"]


def cell(lattice=LATTICE, symbols=SYMBOLS, frac=PEROVSKITE):
    return np.array(lattice, float), list(symbols), np.array(frac, float)


@pytest.mark.parametrize("tolerances", [CDVAE, DEFAULT])
def test_a_crystal_matches_itself_without_distance(tolerances, perovskites, mixed):
    cells = matching.true_cells(perovskites(8)) + matching.true_cells(mixed(8))
    rms = match(cells, cells, tolerances, processes=1)
    assert summary(rms)["sm"] == 100
    assert summary(rms)["rmse"] == pytest.approx(0, abs=1e-6)


def test_another_origin_order_or_image_is_the_same_crystal():
    order, moved = [4, 2, 0, 3, 1], PEROVSKITE + [0.3, -0.2, 1.4]
    other = cell(symbols=[SYMBOLS[k] for k in order], frac=moved[order])
    assert match_one((other, cell(), DEFAULT)) == pytest.approx(0, abs=1e-6)


def test_swapped_cations_do_not_match():
    assert np.isnan(match_one((cell(symbols=["Ti", "Sr", "O", "O", "O"]), cell(), CDVAE)))


def test_one_wrong_element_does_not_match():
    assert np.isnan(match_one((cell(symbols=["Ca", "Ti", "O", "O", "O"]), cell(), CDVAE)))
    assert np.isnan(match_one((cell(symbols=SYMBOLS[:4], frac=PEROVSKITE[:4]), cell(), CDVAE)))


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_another_volume_matches_since_the_matcher_rescales(factor):
    """So a match rate says nothing about the lattice constant: report its error beside it."""
    scaled = cell(lattice=[3.9 * factor] * 3 + [90] * 3)
    assert match_one((scaled, cell(), DEFAULT)) == pytest.approx(0, abs=1e-6)


def test_rms_is_the_displacement_over_the_length_per_atom():
    """One atom moved by u: rms of the five about their mean is u * sqrt(4/5 / 5)."""
    moved = PEROVSKITE.copy()
    moved[0, 0] += 0.04
    expected = 0.04 * 3.9 * np.sqrt(0.8 / 5) / (3.9**3 / 5) ** (1 / 3)
    assert match_one((cell(frac=moved), cell(), CDVAE)) == pytest.approx(expected, rel=1e-2)


def test_a_large_distortion_matches_at_wide_tolerances_only():
    rng = np.random.default_rng(0)
    frac = PEROVSKITE + rng.normal(size=(5, 3)) * 0.12
    rms = [match_one((cell(frac=frac), cell(), tolerances)) for tolerances in (CDVAE, DEFAULT)]
    assert 0.3 < rms[0] < 0.5 and np.isnan(rms[1])


IMPOSSIBLE = {
    "nan": [np.nan, 3.9, 3.9, 90, 90, 90],
    "nan-angle": [3.9, 3.9, 3.9, 90, np.nan, 90],
    "infinite": [np.inf, 3.9, 3.9, 90, 90, 90],
    "zero-length": [0, 3.9, 3.9, 90, 90, 90],
    "negative-length": [-3.9, 3.9, 3.9, 90, 90, 90],
    "zero-angle": [3.9, 3.9, 3.9, 0, 90, 90],
    "flat-angle": [3.9, 3.9, 3.9, 180, 90, 90],
    "angles-do-not-close": [3.9, 3.9, 3.9, 30, 30, 120],
    "angles-beyond-360": [3.9, 3.9, 3.9, 130, 130, 130],
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_lattice_is_no_match_and_no_error(name):
    assert np.isnan(match_one((cell(lattice=IMPOSSIBLE[name]), cell(), CDVAE)))


def test_overlapping_atoms_are_no_match():
    close = PEROVSKITE.copy()
    close[3] = close[4] + [0.1, 0, 0]
    assert np.isnan(match_one((cell(frac=close), cell(frac=close), CDVAE)))
    close[3] = close[4] + [0.2, 0, 0]
    assert match_one((cell(frac=close), cell(frac=close), CDVAE)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_coordinates_that_are_no_numbers_are_no_match_and_no_error(value):
    broken = PEROVSKITE.copy()
    broken[2, 1] = value
    assert np.isnan(match_one((cell(frac=broken), cell(), CDVAE)))


def test_a_prediction_without_atoms_is_no_match():
    assert np.isnan(match_one((cell(symbols=[], frac=np.zeros((0, 3))), cell(), CDVAE)))


def test_parallel_matching_keeps_the_order(perovskites):
    cells = matching.true_cells(perovskites(20)) * 6
    wrong = [(lattice, ["H"] * 5, frac) if i % 3 == 0 else (lattice, symbols, frac) for i, (lattice, symbols, frac) in enumerate(cells)]
    rms = match(wrong, cells, CDVAE, processes=2)
    assert len(rms) == 120
    assert np.isnan(rms).tolist() == [i % 3 == 0 for i in range(120)]


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError):
        match([cell()], [cell(), cell()])


def test_the_summary_averages_over_matches_only():
    assert summary(np.array([0.1, np.nan, 0.3, np.nan])) == {"sm": 50.0, "rmse": pytest.approx(0.2)}
    assert summary(np.array([np.nan])) == {"sm": 0.0, "rmse": None}


def test_empty_sites_of_a_decoded_cell_are_left_out():
    raw = {"lattice": torch.ones(1, 6), "species": torch.tensor([[0, 2, 1]]), "frac": torch.arange(9.0).view(1, 3, 3)}
    [(lattice, symbols, frac)] = matching.decoded_cells(raw, ("Sr", "O"))
    assert symbols == ["Sr", "O"] and frac.tolist() == [[0, 1, 2], [6, 7, 8]]


def test_true_cells_are_the_canonical_crystals(mixed):
    crystals = mixed(4)
    for i, (lattice, symbols, frac) in enumerate(matching.true_cells(crystals)):
        s = crystals.structure(i)
        assert symbols == [str(site.specie) for site in s] and len(frac) == 3 + i
        assert np.allclose(s.frac_coords, frac) and np.allclose(s.lattice.parameters, lattice)


@pytest.mark.parametrize("kind, rate", [("prototype", 100), ("swapped", 0), ("wrong_element", 0)])
def test_trivial_predictions_of_slightly_distorted_perovskites(perovskites, kind, rate):
    crystals = perovskites(10, slide=0.05)
    cells = matching.trivial(crystals, kind)
    assert summary(match(cells, matching.true_cells(crystals), CDVAE))["sm"] == rate


def test_trivial_random_coordinates_keep_the_composition(perovskites):
    crystals = perovskites(10)
    cells, true = matching.trivial(crystals, "random_coords"), matching.true_cells(crystals)
    assert [c[1] for c in cells] == [c[1] for c in true]
    assert np.isnan(match(cells, true, DEFAULT)).mean() >= 0.8
    assert all(np.array_equal(c[0], t[0]) for c, t in zip(cells, true, strict=True))


def test_an_unknown_trivial_prediction_is_refused(perovskites):
    with pytest.raises(ValueError, match="kind = 'perfect': expected prototype"):
        matching.trivial(perovskites(1), "perfect")


def test_the_ideal_prototype_matches_most_real_perovskites(real):
    """At CDVAE's tolerances a match rate is the accuracy of the elements (99 %)."""
    crystals = real("perov_5", "test").select(slice(0, 3785, 50))
    true = matching.true_cells(crystals)
    rate = lambda kind: summary(match(matching.trivial(crystals, kind), true, CDVAE, 1))["sm"]
    assert rate("prototype") > 95 and rate("swapped") < 10 and rate("wrong_element") == 0


@pytest.mark.parametrize("symbols, expected", [
    (["C"] * 8, True), (["Fe", "Co"], True),                              # one element; metals alone
    (["Sr", "Ti", "O", "O", "O"], True), (["Sr", "Ti", "O", "O", "O"] * 2, True),
    (["Na", "Cl", "Cl"], False), (["O", "F", "F", "F", "F", "F"], False)])
def test_compositions_that_the_whole_rule_allows(symbols, expected):
    assert matching.allowed(symbols) is expected


def test_a_match_of_a_composition_that_is_not_allowed_counts_by_tolerances_alone():
    odd = cell(symbols=["Na", "Cl", "Cl"], frac=PEROVSKITE[:3])
    moved = cell(symbols=["Ti", "Sr", "O", "O", "O"])
    m, rms = matching.score([cell(), odd, moved, cell()], [cell(), odd, cell(), cell()], processes=1)
    assert m["sm_cdvae"] == 75 and m["sm_rule"] == 50 and m["sm_rule_ceiling"] == 75
    assert np.isnan(rms["cdvae"]).tolist() == [False, False, True, False]
