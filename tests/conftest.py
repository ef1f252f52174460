"""Small synthetic crystals and models; real data where a mirror or a download is found."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from meidnet_core import crystal, data, sources
from meidnet_core.config import PRESETS
from meidnet_core.model import MEIDNet
from meidnet_core.train import shape_of

torch.set_num_threads(1)

CATIONS = ["Na", "Mg", "K", "Ca", "Sc", "Ti", "Sr", "Zr", "Ba", "La"]
ANIONS = ["N", "O", "F"]
SMALL = {"width": 16, "edge_width": 8, "latent": 12, "blocks": 2, "batch": 8, "epochs": 4}
NOISE = ("dropout", "structure_only", "latent_noise", "label_noise", "exchange")


def cif(lattice, symbols, frac):
    """A P1 CIF as the CDVAE files have it."""
    keys = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = ["data_x", "_symmetry_space_group_name_H-M   'P 1'", "_symmetry_Int_Tables_number   1"]
    lines += [f"_cell_{k}   {v}" for k, v in zip(keys, lattice, strict=True)]
    lines += ["loop_", " _symmetry_equiv_pos_site_id", " _symmetry_equiv_pos_as_xyz"]
    lines += ["  1  'x, y, z'", "loop_"]
    lines += [f" _atom_site_{k}" for k in ("type_symbol", "label", "fract_x", "fract_y", "fract_z")]
    lines += [" _atom_site_occupancy"]
    for i, (s, x) in enumerate(zip(symbols, frac, strict=True)):
        lines.append(f"  {s}  {s}{i}  {x[0]:.8f}  {x[1]:.8f}  {x[2]:.8f}  1")
    return "\n".join(lines) + "\n"


@pytest.fixture
def write_cif():
    return cif


def raw_perovskite(rng, slide=0.1):
    """(lattice, atomic numbers, frac): cubic ABX3 slid along x, A B X X X, canonical axes."""
    a, b = rng.choice(CATIONS, 2, replace=False)
    symbols = [a, b, *rng.choice(ANIONS, 3)]
    frac = crystal.PEROVSKITE.copy()
    frac[:, 0] += rng.uniform(-slide, slide, 5)
    lattice = np.array([rng.uniform(3.6, 4.6)] * 3 + [90.0] * 3)
    lattice[1:3] = lattice[0]
    return lattice, np.array([crystal.atomic_number(s) for s in symbols]), frac


def raw_cell(rng, atoms):
    """(lattice, atomic numbers, frac): triclinic cell, no two atoms closer than 1 angstrom."""
    lattice = np.array([*rng.uniform(4, 6, 3), *rng.uniform(75, 105, 3)])
    cell = crystal.lattice_matrix(torch.from_numpy(lattice[None]))
    far = np.eye(atoms) * 10
    while True:
        frac = rng.random((atoms, 3))
        d, _ = crystal.minimum_image(torch.from_numpy(frac[None]), cell)
        if (d[0].numpy() + far).min() > 1.0:
            break
    numbers = [crystal.atomic_number(s) for s in rng.choice(CATIONS + ANIONS, atoms)]
    return lattice, np.array(numbers), frac


def pack(cells, labels, name="perov_5", split="train"):
    """Raw cells and labels (M, P) -> CrystalSet, the way `data.parse` does it."""
    names = tuple(data.LABELS[name])
    table = pd.DataFrame(labels, columns=names)
    table["material_id"] = [f"id-{i}" for i in range(len(cells))]
    canonical = [(lattice, crystal.canonicalize(lattice, z, f)) for lattice, z, f in cells]
    return data._pack(name, split, names, table, canonical)


@pytest.fixture
def perovskite():
    return raw_perovskite


@pytest.fixture
def triclinic():
    return raw_cell


@pytest.fixture
def perovskites():
    """perovskites(count, seed): CrystalSet of random cubic perovskites with random labels."""

    def make(count=16, seed=0, labels=None, slide=0.1):
        rng = np.random.default_rng(seed)
        cells = [raw_perovskite(rng, slide) for _ in range(count)]
        return pack(cells, rng.normal(size=(count, 2)) if labels is None else labels)

    return make


@pytest.fixture
def mixed():
    """mixed(count, seed): CrystalSet of triclinic cells of 3 to 6 atoms, some are padded."""

    def make(count=8, seed=0):
        rng = np.random.default_rng(seed)
        cells = [raw_cell(rng, 3 + i % 4) for i in range(count)]
        return pack(cells, rng.normal(size=(count, 2)), "mp_20")

    return make


@pytest.fixture
def vocabulary():
    return tuple(sorted(CATIONS + ANIONS, key=crystal.atomic_number))


@pytest.fixture
def config():
    """config(preset, **changes): a preset made small, without regularising noise."""

    def make(preset="improved", **changes):
        small = SMALL | dict.fromkeys(NOISE, 0.0) | ({"rbf": 6, "pool_heads": 2} if preset != "paper" else {})
        return PRESETS[preset].with_(**{**small, **changes})

    return make


@pytest.fixture
def tensors_of(vocabulary):
    def make(crystals, cfg, sites=None):
        return data.to_tensors(crystals, vocabulary, cfg.labels, cutoff=cfg.cutoff, sites=sites)

    return make


@pytest.fixture
def model_of(vocabulary):
    """model_of(cfg, tensors): seeded, untrained, in training mode."""

    def make(cfg, tensors, seed=0):
        torch.manual_seed(seed)
        return MEIDNet(cfg, shape_of(tensors, vocabulary, cfg))

    return make


# ---- real data ----------------------------------------------------------------------------------


def find_table(name, split):
    """Path of a split in the mirror or among earlier downloads; never downloads."""
    mirror = os.environ.get("MEIDNET_DATA_MIRROR")
    ends = (".csv.gz", ".csv") if mirror else ()
    places = [Path(mirror) / name / f"{split}{end}" for end in ends]
    places.append(sources.cache_dir() / f"{name}-{split}-{sources.COMMIT[:8]}.csv")
    for path in places:
        if path.exists():
            return path
    pytest.skip(
        f"{name}/{split} not found: point MEIDNET_DATA_MIRROR at a folder that holds it, or "
        f"download it once: python -c \"from meidnet_core import data; data.load('{name}', '{split}')\""
    )


@pytest.fixture(scope="session")
def real_table():
    """real_table(name, split): path of the published table, or skip."""
    return find_table


@pytest.fixture(scope="session")
def real():
    """real(name, split): the parsed split, or skip. The first call parses and caches (minutes)."""

    def get(name, split):
        find_table(name, split)
        return data.load(name, split)

    return get


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Empty mirror and cache below tmp_path, and no network: (mirror, cache)."""
    pooch = pytest.importorskip("pooch")

    def unreachable(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(pooch, "retrieve", unreachable)
    monkeypatch.setenv("MEIDNET_DATA_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("MEIDNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "mirror", tmp_path / "cache"


@pytest.fixture
def dft_arrays():
    """Bands (1, 7, 4) and a density of states as a dft result holds them."""
    rng = np.random.default_rng(0)
    bands = {"energies": rng.normal(size=(1, 7, 4)), "kpoints": rng.random((7, 3)), "distance": np.arange(7, dtype=float),
             "labels": [[0.0, "Γ"], [6.0, "X|R"]], "status": "ok"}
    return {"bands": bands, "dos": {"energies": np.linspace(-8, 8, 801), "total": rng.random((2, 801)), "status": "ok"}}


@pytest.fixture
def splits(perovskites, tensors_of, config, vocabulary):
    from meidnet_core import experiments
    crystals = {s: perovskites(n, seed=k) for k, (s, n) in enumerate((("train", 24), ("val", 10), ("test", 8)))}
    return experiments.Splits(crystals, {s: tensors_of(c, config()) for s, c in crystals.items()}, vocabulary)
