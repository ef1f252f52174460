"""Canonical form and back, periodic geometry."""

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice

from meidnet_core import crystal
from meidnet_core.crystal import PEROVSKITE, canonicalize, restore, wrap

CUBIC = np.array([4.0] * 3 + [90.0] * 3)


def same_description(z1, f1, z2, f2, tolerance=1e-9):
    """Equal species and equal coordinates modulo 1, site by site."""
    return (z1 == z2).all() and np.abs(wrap(f1 - f2)).max() < tolerance


def redescribe(rng, z, frac, symmetry=True):
    """Another description of the same crystal: origin, order; mirror of x, swap of y and z."""
    order, frac = rng.permutation(len(z)), frac.copy()
    if symmetry and rng.random() < 0.5:
        frac[:, 0] *= -1
    if symmetry and rng.random() < 0.5:
        frac = frac[:, [0, 2, 1]]
    return z[order], frac[order] + rng.uniform(-2, 2, 3)


@pytest.mark.parametrize("slide", [0.0, 0.05, 0.2, 0.45])
def test_restore_undoes_canonicalize_for_any_description_of_a_perovskite(perovskite, slide):
    rng = np.random.default_rng(0)
    for _ in range(40):
        lattice, z, frac = perovskite(rng, slide)
        z, frac = redescribe(rng, z, frac)
        canonical = canonicalize(lattice, z, frac)
        assert same_description(*restore(canonical), z, frac)


@pytest.mark.parametrize("atoms", [1, 2, 5, 11, 20])
def test_restore_undoes_canonicalize_for_generic_cells(triclinic, atoms):
    rng = np.random.default_rng(atoms)
    for _ in range(8):
        lattice, z, _ = triclinic(rng, min(atoms, 6))
        z, frac = rng.choice(z, atoms), rng.random((atoms, 3)) * 4 - 2
        canonical = canonicalize(lattice, z, frac)
        assert same_description(*restore(canonical), z, frac)
        assert sorted(canonical.order) == list(range(atoms))


def test_restore_undoes_canonicalize_for_cubic_cells_that_are_no_perovskite():
    rng = np.random.default_rng(3)
    z, frac = np.array([38, 22, 8, 8, 8]), rng.random((5, 3))
    assert crystal._perovskite_order(z, frac) is None
    assert same_description(*restore(canonicalize(CUBIC, z, frac)), z, frac)


@pytest.mark.parametrize("slide", [0.05, 0.2, 0.45])
def test_all_descriptions_of_a_perovskite_have_one_canonical_form(perovskite, slide):
    rng = np.random.default_rng(1)
    for _ in range(30):
        lattice, z, frac = perovskite(rng, slide)
        first = canonicalize(lattice, z, frac)
        for _ in range(5):
            other = canonicalize(lattice, *redescribe(rng, z, frac))
            assert (first.species == other.species).all()
            assert np.abs(first.frac - other.frac).max() < 1e-6


def test_all_origins_and_orders_of_a_generic_cell_have_one_canonical_form(triclinic):
    rng = np.random.default_rng(2)
    for atoms in (2, 3, 4, 5, 6) * 4:
        lattice, z, frac = triclinic(rng, atoms)
        first = canonicalize(lattice, z, frac)
        other = canonicalize(lattice, *redescribe(rng, z, frac, symmetry=False))
        assert (first.species == other.species).all()
        assert np.abs(wrap(first.frac - other.frac)).max() < 1e-6
        assert (np.diff(first.species) >= 0).all()


def test_two_different_perovskites_have_different_canonical_forms():
    lattice, z = CUBIC, np.array([38, 22, 8, 8, 8])
    moved = PEROVSKITE.copy()
    moved[0, 0] += 0.05
    swapped = canonicalize(lattice, z[[1, 0, 2, 3, 4]], PEROVSKITE)
    assert (swapped.species != canonicalize(lattice, z, PEROVSKITE).species).any()
    distorted = canonicalize(lattice, z, moved).frac - canonicalize(lattice, z, PEROVSKITE).frac
    assert np.abs(distorted).max() > 0.01


@pytest.mark.parametrize("slide", [0.1, 0.45])
def test_cations_and_anions_land_on_their_sites_however_far_they_slid(perovskite, slide):
    rng = np.random.default_rng(4)
    for _ in range(40):
        lattice, z, frac = perovskite(rng, slide)
        canonical = canonicalize(lattice, *redescribe(rng, z, frac))
        assert list(canonical.species[:2]) == list(z[:2])
        assert sorted(canonical.species[2:]) == sorted(z[2:])
        assert canonical.species[2] == z[2], "the X in the column of B"
        assert canonical.species[3] <= canonical.species[4]
        assert np.abs(canonical.frac[:, 1:] - PEROVSKITE[:, 1:]).max() < 1e-9


def test_canonical_origin_has_zero_mean_deviation_and_a_moves_to_positive_x(perovskite):
    rng = np.random.default_rng(5)
    for _ in range(20):
        lattice, z, frac = perovskite(rng, 0.1)
        dev = canonicalize(lattice, *redescribe(rng, z, frac)).frac - PEROVSKITE
        assert np.abs(dev.mean(0)).max() < 1e-9
        assert dev[0, 0] > 0


def test_the_ideal_perovskite_is_its_own_canonical_form():
    z = np.array([38, 22, 8, 8, 8])
    canonical = canonicalize(np.array([3.9] * 3 + [90.0] * 3), z, PEROVSKITE)
    assert same_description(canonical.species, canonical.frac, z, PEROVSKITE)


def test_only_cubic_cells_are_read_as_perovskites():
    """A tetragonal cell keeps x, y, z apart: swapping y and z would not be a symmetry."""
    z, lattice = np.array([38, 22, 8, 8, 8]), np.array([3.9, 4.0, 3.9, 90.0, 90.0, 90.0])
    assert (canonicalize(lattice, z, PEROVSKITE).rotation == np.eye(3)).all()
    assert list(canonicalize(lattice, z, PEROVSKITE).species) == sorted(z)


def test_wrap_is_the_nearest_image():
    x = np.array([0.0, 0.49, 0.51, -0.51, 1.2, -3.7])
    assert np.allclose(wrap(x), [0.0, 0.49, -0.49, 0.49, 0.2, 0.3])


def test_circular_mean_follows_the_origin():
    rng = np.random.default_rng(0)
    frac, shift = rng.uniform(-0.2, 0.2, (6, 3)), np.array([0.45, -0.3, 0.7])
    moved = crystal.circular_mean(frac + shift) - crystal.circular_mean(frac)
    assert np.abs(wrap(moved - shift)).max() < 1e-12
    assert np.isfinite(crystal.circular_mean(np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))).all()


# ---- elements ------------------------------------------------------------------------------------


def test_symbols_and_atomic_numbers_are_inverse():
    assert [crystal.atomic_number(crystal.symbol(z)) for z in range(1, 104)] == list(range(1, 104))
    assert crystal.atomic_number("Lr") == 103 and crystal.symbol(np.int16(22)) == "Ti"


@pytest.mark.parametrize("name", ["Xx", "", "-", "ti", "Rf", 22])
def test_an_unknown_element_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"unknown element {name!r}"):
        crystal.atomic_number(name)


def test_electronegativities_are_finite_and_pauling():
    x = crystal.electronegativities()
    assert x.shape == (104,) and np.isfinite(x).all()
    assert x[9] == 3.98 and x[8] == 3.44 and x[2] == 0


# ---- periodic geometry ---------------------------------------------------------------------------


def random_lattices(count=50, seed=0):
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(2, 15, (count, 3)), rng.uniform(65, 114, (count, 3))])


def test_lattice_matrix_equals_pymatgen_for_triclinic_cells():
    lattices = random_lattices()
    ours = crystal.lattice_matrix(torch.from_numpy(lattices)).numpy()
    theirs = np.array([Lattice.from_parameters(*row).matrix for row in lattices])
    assert np.abs(ours - theirs).max() < 1e-9
    assert np.abs(np.linalg.norm(ours, axis=2) - lattices[:, :3]).max() < 1e-9


def niggli_cells(count=20):
    rng = np.random.default_rng(7)
    for row in random_lattices(count, seed=1):
        lattice = Lattice.from_parameters(*row).get_niggli_reduced_lattice()
        yield np.array(lattice.parameters), rng.random((6, 3)) * 3 - 1


def test_minimum_image_distances_equal_pymatgen_for_reduced_cells():
    for lattice, frac in niggli_cells():
        cell = crystal.lattice_matrix(torch.from_numpy(lattice[None]))
        d, _ = crystal.minimum_image(torch.from_numpy(frac[None]), cell)
        expected = crystal.to_structure(lattice, ["H"] * 6, frac).distance_matrix
        assert np.abs(d[0].numpy() - expected).max() < 1e-8


def orthogonal(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(3, 3, generator=generator).double())[0]


def ideal_perovskite():
    return torch.from_numpy(PEROVSKITE[None]), 4.0 * torch.eye(3, dtype=torch.float64)[None]


def test_vectors_rotate_with_the_cell_even_where_images_tie():
    triclinic = [
        (torch.from_numpy(f[None]), crystal.lattice_matrix(torch.from_numpy(p[None])))
        for p, f in niggli_cells(5)
    ]
    for frac, cell in [ideal_perovskite(), *triclinic]:
        d, r = crystal.minimum_image(frac, cell)
        for seed in range(4):
            q = orthogonal(seed)
            d_turned, r_turned = crystal.minimum_image(frac, cell @ q.T)
            assert (d_turned - d).abs().max() < 1e-10
            assert (r_turned - r @ q.T).abs().max() < 1e-10


def test_vectors_do_not_jump_under_tiny_moves_where_images_tie():
    """A hard minimum image of an ideal perovskite jumps by a lattice vector (4 angstrom)."""
    frac, cell = ideal_perovskite()
    _, r = crystal.minimum_image(frac, cell)
    for seed in range(5):
        noise = torch.randn(frac.shape, generator=torch.Generator().manual_seed(seed)).double()
        _, moved = crystal.minimum_image(frac + 1e-9 * noise, cell)
        assert (moved - r).abs().max() < 1e-6


def test_vectors_vanish_between_tying_images_and_are_exact_without_ties():
    frac, cell = ideal_perovskite()
    d, r = crystal.minimum_image(frac, cell)
    assert r.abs().max() < 1e-9, "every pair of an ideal perovskite sits midway between images"
    assert abs(d[0, 0, 1].item() - 2 * 3**0.5) < 1e-12 and abs(d[0, 1, 2].item() - 2) < 1e-12
    near = torch.tensor([[[0.0, 0, 0], [0.1, 0.9, 0.2]]], dtype=torch.float64)
    d, r = crystal.minimum_image(near, 2 * cell)
    assert torch.allclose(r[0, 1, 0], torch.tensor([0.8, -0.8, 1.6]).double(), atol=1e-6)
    assert torch.allclose(d[0, 1, 0], r[0, 1, 0].norm(), atol=1e-6)


def test_vectors_are_antisymmetric_and_distances_symmetric():
    for lattice, frac in niggli_cells(5):
        cell = crystal.lattice_matrix(torch.from_numpy(lattice[None]))
        d, r = crystal.minimum_image(torch.from_numpy(frac[None]), cell)
        assert (d - d.transpose(1, 2)).abs().max() < 1e-10
        assert (r + r.transpose(1, 2)).abs().max() < 1e-8


def test_geometry_does_not_depend_on_the_origin():
    for lattice, frac in niggli_cells(5):
        cell = crystal.lattice_matrix(torch.from_numpy(lattice[None]))
        d, r = crystal.minimum_image(torch.from_numpy(frac[None]), cell)
        d2, r2 = crystal.minimum_image(torch.from_numpy(frac[None] + [0.3, -1.4, 7.7]), cell)
        assert (d - d2).abs().max() < 1e-8 and (r - r2).abs().max() < 1e-6


def test_to_structure_keeps_what_it_is_given():
    lattice = np.array([3, 4, 5, 80, 90, 100.0])
    s = crystal.to_structure(lattice, ["Sr", "O"], [[0, 0, 0], [0.5, 0, 1.2]])
    assert np.allclose(s.lattice.parameters, [3, 4, 5, 80, 90, 100])
    assert [str(x.specie) for x in s] == ["Sr", "O"]
    assert np.allclose(s.frac_coords[1], [0.5, 0, 1.2])
