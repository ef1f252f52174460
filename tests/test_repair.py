"""Soft-mode repair: one seed one search, resume after a kill, labelled failures. Physics in the slow tests."""

import json

import numpy as np
import pytest
from ase.units import GPa

from meidnet_core import candidates, genes, potentials, relax, repair

STO = ([3.945] * 3 + [90.0] * 3, ["Sr", "Ti", "O", "O", "O"], [[0.5, 0.5, 0.5], [0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]])
TILT = [[0, 0, 0], [0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, 0, 0]]                        # about z


def mode(q, label, frequency, vector):
    return {"q": q, "label": label, "frequency": frequency, "eigenvector": [vector, np.zeros((5, 3)).tolist()]}


POLAR = [mode([0, 0, 0], "Γ", -3.0, np.outer([0, 1, 0, 0, 0], np.eye(3)[i]).tolist()) for i in range(3)]
MODES = [*POLAR, mode([0.5, 0.5, 0.5], "R", -2.0, TILT), mode([0.5, 0.5, 0], "M", -1.0, TILT), mode([0, 0, 0.5], "X", -1.0, TILT)]
PARENT = {"status": "ok", "energy_per_atom": 0.0, "lattice": STO[0], "symbols": STO[1], "frac": STO[2], "modes": MODES, "seconds": 1.0,
          "lowest": -3.0, "spacegroup": "Pm-3m (221)"}
BASES = [repair._base(STO, MODES)]


def toy(cells):
    """Rows as relax.relax gives them; the energy falls as Ti leaves the centre of its cell."""
    for lattice, symbols, frac in cells:
        atoms = relax.to_atoms((lattice, symbols, frac))
        energy = -float(np.linalg.norm(atoms.positions.std(0)) / len(atoms)) - atoms.get_volume() / len(atoms) / 100
        yield {"status": "ok", "energy_per_atom": energy, "lattice": list(map(float, lattice)), "symbols": list(symbols),
               "frac": np.asarray(frac).tolist(), "steps": 1}


def look(cell, calculator=None, polish=True):
    return next(toy([cell])) | {"modes": MODES[:4] if len(cell[1]) == 5 else [], "lowest": -1.0 if len(cell[1]) == 5 else 0.3,
                                "lowest_exact": 0.3, "spacegroup": "P1 (1)", "symprec": 0.05}


def run(path, seed=0, generations=8, **options):
    return repair.search(STO, None, path, generations=generations, population=6, seed=seed, parent=PARENT, progress=False,
                         **({"evaluate": toy} | options))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(repair, "examine", look)


def test_seeds_reproduce_and_differ(fake, tmp_path):
    first, again, other = run(tmp_path / "a"), run(tmp_path / "b"), run(tmp_path / "c", 1)
    genes = lambda found: [r["genes"] for r in found["individuals"]]
    assert genes(first) == genes(again) != genes(other) and first["evaluations"] == 6 + 8 * 3 and first["generations"] == 8
    assert len(first["bases"]) == 2 or len(repair.distinct(first["individuals"])[0]["symbols"]) != 5      # refreshed in generation 7
    best = lambda found: min(r["energy_per_atom"] for r in found["individuals"])
    assert best(first) < min(r["energy_per_atom"] for r in first["individuals"] if r["generation"] == 0)


def test_a_killed_search_goes_on_with_the_same_individuals(fake, tmp_path):
    whole, asked = run(tmp_path / "whole"), []

    def killed(cells):
        for row in toy(cells):
            asked.append(row)
            if len(asked) == 14:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", evaluate=killed)
    with open(tmp_path / "part", "a") as file:
        file.write('{"key": "half a li')                             # as a kill in the middle of a write leaves it
    again = run(tmp_path / "part", evaluate=killed)
    strip = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert strip(again["individuals"]) == strip(whole["individuals"])
    assert len(asked) == 14 + whole["evaluations"] - 13                                # thirteen were kept
    line = json.loads((tmp_path / "part").read_text().splitlines()[0])
    assert {"genes", "lattice", "energy_per_atom", "status", "generation"} <= line.keys()


def test_minutes_end_a_search(fake, tmp_path):
    assert run(tmp_path / "a", minutes=-1)["generations"] == 0 and run(tmp_path / "a", minutes=60)["generations"] == 8


def test_failing_relaxations_are_labelled_and_the_search_goes_on(fake, tmp_path):
    def failing(cells):
        return ({"status": "exploded: volume x 9", "energy_per_atom": None, "symbols": list(c[1]), "steps": 1} for c in cells)

    found = run(tmp_path / "a", evaluate=failing)
    assert found["evaluations"] == 30 and {r["status"] for r in found["individuals"]} == {"exploded: volume x 9"}


@pytest.mark.parametrize("error, kept", [(RuntimeError("odd cell"), True), (MemoryError(), False)], ids=["crystal", "machine"])
def test_what_says_nothing_of_the_crystal_is_no_row(monkeypatch, error, kept):
    def phonopy_of(*args):
        raise error

    monkeypatch.setattr(relax, "relax", lambda *args: next(toy([STO])))
    monkeypatch.setattr(repair.phonons, "phonopy_of", phonopy_of)
    if kept:
        assert repair.examine(STO, None, polish=False)["status"] == "failed: RuntimeError: odd cell"
    else:
        with pytest.raises(MemoryError):
            repair.examine(STO, None, polish=False)


@pytest.mark.parametrize("parent, status", [({"modes": [], "status": "ok"}, "no soft modes"),
                                            ({"status": "failed: RuntimeError: Og"}, "failed: RuntimeError: Og")])
def test_a_parent_without_soft_modes_or_phonons_is_told(tmp_path, monkeypatch, parent, status):
    row = {k: v for k, v in PARENT.items() if k != "modes"} | parent
    monkeypatch.setattr(repair, "examine", lambda *args: row)
    out = repair.repair("SrTiO3", STO, "sevennet-0", tmp_path, calculator="none", progress=False)
    assert out["status"] == status and out["parent_energy"] == 0 and out["evaluations"] == 0 and json.dumps(out)


def test_a_repair_is_json_and_a_cif(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(relax, "serial", lambda *args: toy)
    monkeypatch.setattr(repair, "examine", lambda c, calculator, polish=True: look(c) if polish else PARENT)
    out = repair.repair("SrTiO3", STO, "sevennet-0", tmp_path, generations=2, calculator="none", progress=False)
    assert out["status"] == "repaired" and out["gain"] > 0 and out["lowest_after"] == 0.3 and out["spacegroup_before"] == "Pm-3m (221)"
    path = repair.write(out, tmp_path / "polymorphs", tmp_path / "cifs")
    assert json.loads(path.read_text()) == json.loads(json.dumps(out)) and path.name == "SrTiO3-sevennet-0-seed0.json"
    assert (tmp_path / "cifs" / "SrTiO3.cif").read_text().startswith("# generated")
    repair.write(out | {"seed": 3}, tmp_path / "polymorphs", tmp_path / "cifs")
    repair.write(out | {"held_at": 3.905}, tmp_path / "polymorphs", tmp_path / "cifs")
    found, count = {p.name for p in (tmp_path / "cifs").iterdir()}, len(out["polymorphs"])
    bases = ("SrTiO3", "SrTiO3-seed3", "SrTiO3-a3.905")
    assert count and found == {f"{b}{end}.cif" for b in bases for end in ("", *(f"-{k + 1}" for k in range(count)))}


def test_of_the_three_lowest_stable_the_most_symmetric_is_taken():
    row = lambda e, number, low: look(STO) | {"energy_per_atom": e, "spacegroup": f"P ({number})", "lowest": low}
    rows = [row(-0.5, 200, -1), row(-0.4, 2, 0), row(-0.3, 140, 0.1), row(-0.2, 62, 0.2), row(-0.1, 221, 0.3)]
    chosen = repair._chosen(rows, PARENT)
    assert (chosen["status"], chosen["spacegroup_after"], chosen["gain"], chosen["best_gain"]) == ("repaired", "P (140)", 0.3, 0.5)
    assert repair._chosen(rows[:1], PARENT)["status"] == "not repaired" and repair._chosen([], PARENT)["gain"] is None
    halfway = {k: v for k, v in rows[0].items() if k != "spacegroup"} | {"status": "failed: RuntimeError"}   # phonons of one supercell only
    assert repair._chosen([halfway], PARENT)["status"] == "not repaired"
    assert repair._chosen([halfway, rows[0]], PARENT)["spacegroup_after"] == "P (200)"


@pytest.mark.parametrize("outside, elastic, verdict", [(0.5, 20.0, True), (0.5, -1.0, False), (-0.5, 20.0, False)])
def test_interpolation_around_gamma_is_left_to_the_elastic_tensor(outside, elastic, verdict):
    row = {"lowest": -0.9, "lowest_exact": 1.3, "lowest_outside": outside, "elastic": elastic}
    assert repair.stable(row) == verdict and not repair.stable(row | {"lowest_exact": -0.2}) and not repair.stable({"lowest": None})


def test_tilted_and_cubic_are_two_polymorphs():
    one = genes.place({"base": 0, "modes": [3], "weights": [1.0], "phases": [0], "stretch": [1.0] * 3, "angles": [0.0] * 3}, BASES)
    still, tilted = (next(toy([genes.cell_of(one | {"scale": s, "noise": 0}, BASES[0])])) for s in (0.0, 0.25))
    assert not repair.alike(still, tilted) and repair.alike(still, PARENT)
    assert len(repair.distinct([still, still | {"energy_per_atom": None}, still], repair.alike)) == 1


def test_a_batch_gives_the_rows_of_one_by_one(monkeypatch):
    """Two at a time, under pressure; the network of the batches is not that of the calculator, which still answers single crystals."""
    monkeypatch.setattr(repair, "STEPS", 2)
    wrap = lambda c: potentials.Pressed(c, 0.01)
    moved = np.array(STO[2]) + np.array([[0, 0, 0], [0, 0, 0.02], [0.01, 0, 0], [0, 0, 0], [0, 0.01, 0]])
    cells = [(STO[0], STO[1], moved), ([3.2] * 3 + [90.0] * 3, ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.52]]),
             ([2.5] * 3 + [60.0] * 3, ["Cu"], [[0.0, 0, 0]])]
    calculator, evaluate, _ = repair.engine("sevennet-0", 2, wrap)
    for a, b in zip(evaluate(cells), relax.serial(calculator, repair.FMAX, 2)(cells), strict=True):
        assert a["symbols"] == b["symbols"] and (a["status"], a["steps"]) == (b["status"], b["steps"]) and 1 <= a["steps"] <= 2
        assert a["energy_per_atom"] == pytest.approx(b["energy_per_atom"], abs=1e-4)
        np.testing.assert_allclose(a["frac"], b["frac"], atol=1e-3)


def test_a_repair_in_batches(fake, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(repair, "engine", lambda potential, batch: ("none", toy, lambda cells: asked.append(batch) or toy(cells)))
    monkeypatch.setattr(repair, "examine", lambda c, calculator, polish=True: look(c) if polish else PARENT)
    out = repair.repair("SrTiO3", STO, "sevennet-0", tmp_path, generations=1, batch=8, progress=False)
    assert out["status"] == "repaired" and asked == [8]


def cubic(formula, calculator):
    return relax.cell_from(relax.relax(candidates.cells_of([formula])[0], calculator))


@pytest.mark.slow
def test_strontium_titanate_leaves_the_cubic_phase(tmp_path):
    """At SevenNet-0's own size its polar tilts lie below a0a0c-; for that one see the next test."""
    calculator = potentials.get_calculator("sevennet-0", "cpu")
    out = repair.repair("SrTiO3", cubic("SrTiO3", calculator), "sevennet-0", tmp_path, generations=3, population=9, calculator=calculator)
    tilted = [p for p in out["polymorphs"] if len(p["symbols"]) > 5]
    assert tilted and out["gain"] > 0.0005 and tilted[0]["energy_per_atom"] == min(p["energy_per_atom"] for p in out["polymorphs"])
    assert "140" in " ".join(p["spacegroup"] for p in out["polymorphs"]) or out["best_gain"] >= 0.0012


@pytest.mark.slow
def test_strontium_titanate_at_its_measured_size_is_tetragonal(tmp_path):
    """PBE's cell is 1 % too long, where a polar mode wins; under the pressure that takes this back a0a0c- is lowest, without soft modes."""
    row = repair.parents(["SrTiO3"], "sevennet-0", 3.905)[0]
    calculator, *_ = repair.engine("sevennet-0", 0, repair.holding(row))
    pressure = calculator.pressure / GPa
    out = repair.repair("SrTiO3", relax.cell_from(row), "sevennet-0-a3.905", tmp_path, generations=3, population=9, calculator=calculator)
    assert 4 < pressure < 7 and out["status"] == "repaired" and "140" in out["polymorphs"][0]["spacegroup"]
    assert repair.stable(out["polymorphs"][0])


@pytest.mark.slow
def test_caesium_lead_iodide_leaves_the_cubic_phase(tmp_path):
    calculator = potentials.get_calculator("sevennet-0", "cpu")
    out = repair.repair("CsPbI3", cubic("CsPbI3", calculator), "sevennet-0", tmp_path, generations=2, population=8, calculator=calculator)
    assert out["gain"] > 0.005 and "221" not in out["spacegroup_after"]
