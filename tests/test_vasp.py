"""VASP route: inputs with the paper's settings; finished, cut-short and unconverged runs, from vasprun files made here."""

import re
import shutil

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from meidnet_core import crystal, plots_physics, vasp

matplotlib.use("Agg")

KTASE3 = (np.array([5.135] * 3 + [90.0] * 3), ["K", "Ta", "Se", "Se", "Se"], crystal.PEROVSKITE)
YBSCSE3 = (KTASE3[0], ["Yb", "Sc", "Se", "Se", "Se"], KTASE3[2])
MNO = (np.array([4.4] * 3 + [90.0] * 3), ["Mn"] * 4 + ["O"] * 4,
       np.array([[0, 0, 0], [.5, .5, 0], [.5, 0, .5], [0, .5, .5], [.5, .5, .5], [0, 0, .5], [0, .5, 0], [.5, 0, 0]]))


@pytest.fixture(autouse=True)
def unlicensed(monkeypatch):
    from pymatgen.core import SETTINGS
    monkeypatch.delitem(SETTINGS, "PMG_VASP_PSP_DIR", raising=False)


# ---- inputs -------------------------------------------------------------------------------------

def incar(folder):
    from pymatgen.io.vasp import Incar
    return Incar.from_file(folder / "INCAR")


@pytest.mark.parametrize("step", vasp.STEPS)
def test_inputs_have_the_settings_of_the_paper(step, tmp_path):
    said, found = vasp.write_inputs(KTASE3, tmp_path, step), incar(tmp_path)
    assert found["ENCUT"] == 520 and found["LDAU"] is False and "LDAUU" not in found and found["LSORBIT"] is False and "GGA" not in found
    assert said["potcar"] == {"K": "K_sv", "Ta": "Ta_pv", "Se": "Se"} and not said["licensed"]
    assert (tmp_path / "POTCAR.spec").read_text().split() == ["K_sv", "Ta_pv", "Se"] and not (tmp_path / "POTCAR").exists()
    if step != "bands":
        assert np.prod(said["kpoints"]) * 5 >= 1000 and (tmp_path / "KPOINTS").read_text().split("\n")[2].startswith("Gamma")
    assert found.get("ICHARG") == (11 if step in ("bands", "dos") else None)


def test_no_hubbard_u_where_the_materials_project_has_one(tmp_path):
    vasp.write_inputs(MNO, tmp_path, "static")
    assert incar(tmp_path)["LDAU"] is False and "LDAUU" not in incar(tmp_path) and max(incar(tmp_path)["MAGMOM"]) == 5


@pytest.mark.parametrize("cell", [KTASE3, MNO, (np.array([4, 4, 12, 90, 90, 120.0]), ["C"] * 2, np.zeros((2, 3)))])
def test_mesh_is_dense_enough_and_even(cell):
    n = np.array(vasp.mesh(cell))
    assert n.prod() * len(cell[1]) >= 1000 and (n - 1).clip(1).prod() * len(cell[1]) < 1000
    assert vasp.mesh(KTASE3) == (6, 6, 6)


def test_bands_follow_the_named_path_of_the_primitive_cell(tmp_path):
    from pymatgen.io.vasp import Kpoints, Poscar
    vasp.write_inputs(MNO, tmp_path, "bands")                        # rocksalt: 2 atoms in the primitive cell
    points = Kpoints.from_file(tmp_path / "KPOINTS")
    assert len(Poscar.from_file(tmp_path / "POSCAR").structure) == 2
    assert {"GAMMA", "X", "L"} <= set(points.labels) and points.kpts[points.labels.index("L")] == pytest.approx((0.5, 0.5, 0.5))


def test_the_ytterbium_dataset_is_named_and_can_be_chosen(tmp_path):
    assert vasp.write_inputs(YBSCSE3, tmp_path, "static")["potcar"]["Yb"] == "Yb_2"
    other = vasp.write_inputs(YBSCSE3, tmp_path, "static", potcar={"Yb": "Yb_3"}, functional="PBE_54")
    assert other["potcar"]["Yb"] == "Yb_3" and "Yb_3" in (tmp_path / "POTCAR.spec").read_text()


def test_a_wrong_step_or_element_is_a_clear_error(tmp_path):
    with pytest.raises(vasp.VaspError, match="unknown step 'scf': expected relax"):
        vasp.write_inputs(KTASE3, tmp_path, "scf")
    with pytest.raises(vasp.VaspError, match="no POTCAR dataset for Fm, Rn"):
        vasp.write_inputs((KTASE3[0], ["Fm", "Rn", "Se", "Se", "Se"], KTASE3[2]), tmp_path, "static")


def test_a_configured_folder_without_the_dataset_is_a_clear_error(tmp_path, monkeypatch):
    from pymatgen.core import SETTINGS
    (tmp_path / "potcars").mkdir()
    monkeypatch.setitem(SETTINGS, "PMG_VASP_PSP_DIR", str(tmp_path / "potcars"))
    with pytest.raises(vasp.VaspError, match="inputs not written.*K_sv"):
        vasp.write_inputs(KTASE3, tmp_path / "run", "static")


# ---- finished runs ------------------------------------------------------------------------------

CUBE = np.eye(3) * 4


def vasprun(levels, occupied, kpoints, efermi=1.0, cycles=3, icharg=2, u=False, basis=CUBE, energy=-7.5, electrons=None, spinors=""):
    """A minimal vasprun.xml of two atoms: levels (S, K, B) in eV, `occupied` (S, K, B) in 0..1, NELM 5; spinors: the tag that is true."""
    levels, occupied = np.asarray(levels, float), np.asarray(occupied, float)
    rows = lambda x: "".join("<v>" + " ".join(f"{v:.6f}" for v in r) + "</v>" for r in np.atleast_2d(x))
    item = lambda kind, name, value: f'<i type="{kind}" name="{name}">{value}</i>'
    electrons = electrons or 2 / len(levels) * occupied.sum((0, 2)).mean()
    words = [item("string", "GGA", "PE"), item("int", "ICHARG", icharg), item("int", "ISPIN", len(levels)), item("int", "NELM", 5),
             item("int", "NSW", 0), item("int", "ISMEAR", 0), item("int", "IBRION", -1), item("int", "NBANDS", levels.shape[2])]
    words = "".join(words) + "".join(f'<i name="{k}">{v}</i>' for k, v in {"ENMAX": 520, "SIGMA": 0.05, "NELECT": electrons}.items())
    words += f'<i type="logical" name="LDAU">{"T" if u else "F"}</i>'
    words += "".join(f'<i type="logical" name="{k}">{"FT"[k == spinors]}</i>' for k in ("LSORBIT", "LNONCOLLINEAR"))
    words += "".join(f"<v name=\"{k}\">{v}</v>" for k, v in {"LDAUU": "4 0", "LDAUJ": "0 0", "LDAUL": "2 -1"}.items()) if u else ""
    crystal_ = (f'<crystal><varray name="basis">{rows(basis)}</varray><varray name="rec_basis">{rows(np.linalg.inv(basis).T)}</varray>'
                f'</crystal><varray name="positions">{rows([[0, 0, 0], [.5, .5, .5]])}</varray>')
    eigen = "".join(f'<set comment="spin {s + 1}">' + "".join(
        f'<set comment="kpoint {i + 1}">' + "".join(f"<r>{e:.6f} {o:.4f}</r>" for e, o in zip(levels[s, i], occupied[s, i])) + "</set>"
        for i in range(len(kpoints))) + "</set>" for s in range(len(levels)))
    states = "".join(f"<r>{e:.3f} {max(0, abs(e - 1) - .5):.4f} 0</r>" for e in range(-4, 7))
    dos = "".join(f'<set comment="spin {s + 1}">{states}</set>' for s in range(len(levels)))
    fields = "<field>energy</field><field>total</field><field>integrated</field>"
    energies = "".join(f'<i name="{k}">{energy}</i>' for k in ("e_fr_energy", "e_wo_entrp", "e_0_energy"))
    steps = f"<scstep><energy>{energies}</energy></scstep>" * cycles
    atoms = "".join(f"<rc><c>{e}</c><c>{i}</c></rc>" for i, e in enumerate(("Mg", "O"), 1))
    kinds = "".join(f"<rc><c>1</c><c>{e}</c><c>1.0</c><c>6.0</c><c>PAW_PBE {e} 01Jan2000</c></rc>" for e in ("Mg", "O"))
    weights = "".join(f"<v>{1 / len(kpoints):.8f}</v>" for _ in kpoints)
    return f"""<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling><generator>{item("string", "version", "6.4.2")}</generator><incar>{words}</incar>
<kpoints><varray name="kpointlist">{rows(kpoints)}</varray><varray name="weights">{weights}</varray></kpoints>
<parameters>{words}</parameters>
<atominfo><array name="atoms"><set>{atoms}</set></array><array name="atomtypes"><set>{kinds}</set></array></atominfo>
<structure name="initialpos">{crystal_}</structure>
<calculation>{steps}<structure>{crystal_}</structure><varray name="forces">{rows(np.zeros((2, 3)))}</varray>
<varray name="stress">{rows(np.zeros((3, 3)))}</varray><energy>{energies}</energy>
<eigenvalues><array>{fields}<set>{eigen}</set></array></eigenvalues>
<dos><i name="efermi">{efermi}</i><total><array>{fields}<set>{dos}</set></array></total></dos></calculation>
<structure name="finalpos">{crystal_}</structure></modeling>
"""


GRID = [[0, 0, 0], [0.5, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0.5]]
VALENCE, CONDUCTION = np.array([0.2, -0.1, -0.2, 0.5]), np.array([1.5, 2.5, 2.2, 2.0])      # gap R to Gamma 1.0, direct at Gamma 1.3


def levels_of(valence=VALENCE, conduction=CONDUCTION):
    return np.stack([valence - 3, valence, conduction, conduction + 2], -1)[None]


def filled(levels, efermi=1.0):
    return (levels < efermi).astype(float)


@pytest.fixture
def put(tmp_path):
    """put(folder, levels, ...): write a vasprun.xml below tmp_path, return its folder."""

    def make(folder="run", levels=None, efermi=1.0, kpoints=GRID, **words):
        levels = levels_of() if levels is None else levels
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        occupied = words.pop("occupied", filled(levels, efermi))
        (tmp_path / folder / "vasprun.xml").write_text(vasprun(levels, occupied, kpoints, efermi, **words))
        return tmp_path / folder
    return make


def test_an_insulator(put):
    run = vasp.read_run(put(), "MgO")
    assert run["status"] == "ok" and run["engine"] == "vasp" and run["xc"] == "PBE" and run["name"] == "MgO"
    assert run["energy_per_atom"] == pytest.approx(-3.75) and run["cell"][1] == ["Mg", "O"]
    gap = run["gap"]
    assert gap["indirect"] == pytest.approx(1.0) and gap["direct"] == pytest.approx(1.3) and not gap["metal"]
    assert gap["vbm_k"] == GRID[3] and gap["cbm_k"] == GRID[0] and gap["direct_k"] == GRID[0]
    assert run["efermi"] == pytest.approx(1.0) and run["bands"] is None and run["moment"] == 0
    assert run["dos"]["total"].shape == (1, 11) and run["dos"]["energies"][0] == pytest.approx(-5)
    assert run["settings"]["cutoff"] == 520 and run["settings"]["datasets"] == ["PAW_PBE Mg 01Jan2000", "PAW_PBE O 01Jan2000"]


def test_a_fermi_level_on_the_band_edge_makes_no_metal(put):
    run = vasp.read_run(put(efermi=0.5004, occupied=filled(levels_of())))
    assert not run["gap"]["metal"] and run["gap"]["indirect"] == pytest.approx(1.0)


def test_a_semimetal_has_no_gap_and_a_negative_overlap(put):
    levels = levels_of(VALENCE, CONDUCTION - 1.4)                    # bottom at 0.1, top at 0.5
    gap = vasp.read_run(put(levels=levels, efermi=0.3, electrons=4))["gap"]
    assert gap["metal"] and gap["indirect"] == gap["direct"] == 0 and gap["overlap"] == pytest.approx(-0.4)


def test_a_partly_filled_band_is_a_metal(put):
    assert vasp.read_run(put(electrons=3))["gap"]["metal"]


def test_spins_are_kept_apart(put):
    levels = np.concatenate([levels_of(), levels_of(VALENCE + 2.0, CONDUCTION + 2.0)])       # down: one band fewer filled
    occupied = np.zeros_like(levels)
    occupied[0, :, :2], occupied[1, :, :1] = 1, 1
    run = vasp.read_run(put(levels=levels, occupied=occupied, electrons=3))
    assert run["moment"] == pytest.approx(1) and run["dos"]["total"].shape == (2, 11) and run["settings"]["spins"] == 2
    assert not run["gap"]["metal"] and run["gap"]["indirect"] == pytest.approx(1.0)          # 0.5 up to 1.5 up


@pytest.mark.parametrize("tag", ["LSORBIT", "LNONCOLLINEAR"])
def test_a_band_of_spinors_holds_one_electron(put, tag):
    gap = vasp.read_run(put(electrons=2, spinors=tag))["gap"]
    assert not gap["metal"] and gap["indirect"] == pytest.approx(1.0)
    odd = np.concatenate([levels_of()[..., :1] - 3, levels_of()], -1)
    gap = vasp.read_run(put(levels=odd, electrons=3, spinors=tag))["gap"]
    assert not gap["metal"] and gap["indirect"] == pytest.approx(1.0)


def test_hubbard_u_shows_in_the_functional(put):
    assert vasp.read_run(put(u=True))["xc"] == "PBE+U"


def path_of(put, tmp_path):
    """bands/ with the KPOINTS that write_inputs makes, and static/ beside it."""
    put("static")
    cell = (np.array([4.0] * 3 + [90.0] * 3), ["Mg", "O"], np.array([[0, 0, 0], [.5, .5, .5]]))
    vasp.write_inputs(cell, tmp_path / "bands", "bands")
    from pymatgen.io.vasp import Kpoints
    points = np.array(Kpoints.from_file(tmp_path / "bands" / "KPOINTS").kpts)
    dip = 0.3 * np.exp(-((points - [0, 0.25, 0]) ** 2).sum(1) / 0.01)                        # the bottom lies between the mesh points
    return points, levels_of(0.1 * points[:, 0], 1.5 - dip)


def test_bands_of_the_path_it_wrote(put, tmp_path):
    from meidnet_core import dft
    points, levels = path_of(put, tmp_path)
    put("bands", levels, efermi=7.0, kpoints=points, icharg=11, occupied=filled(levels))    # E_F of a fixed-density run is not used
    run = vasp.read_run(tmp_path)
    bands, cell = run["bands"], run["cell"]
    path = dft.band_path(cell, vasp.PATH_POINTS)[1]
    assert run["status"] == "ok" and bands["energies"].shape == (1, len(points), 4)
    assert [n for _, n in bands["labels"]] == [n for _, n in path["labels"]] and "Γ" in [n for _, n in bands["labels"]]
    np.testing.assert_allclose(bands["distance"], path["distance"], atol=1e-4)
    assert bands["energies"][0, 0, 1] == pytest.approx(-1.0) and run["efermi"] == pytest.approx(1.0)
    assert run["gap"]["cbm_k"] == pytest.approx([0, 0.25, 0], abs=0.03)


def test_bands_are_drawn_as_those_of_gpaw(put, tmp_path):
    points, levels = path_of(put, tmp_path)
    put("bands", levels, kpoints=points, icharg=11)
    run = vasp.read_run(tmp_path)
    _, axes = plt.subplots(1, 2)
    left, right = plots_physics.band_structure(run, "MgO", paper_gap=0.5, axes=axes)
    drawn = [line.get_ydata() for line in left.lines if len(line.get_ydata()) >= len(points)]
    assert len(drawn) == levels.shape[2] and np.nanmax(drawn[1]) == pytest.approx(0, abs=1e-6)           # from the valence top
    assert len(right.lines) == 1 and len(right.lines[0].get_ydata()) == 11
    assert "MgO: indirect gap" in left.get_title() and "Γ" in [t.get_text() for t in left.get_xticklabels()]
    plt.close(left.figure)


FLAT = (np.array([2.5, 2.5, 20, 90, 90, 120.0]), ["B", "N"], np.array([[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0]]))     # short L-M|H-K
TETRAGONAL = (np.array([4, 4, 9, 90, 90, 90.0]), ["Mg", "Mg"], np.array([[0, 0, 0], [.5, .5, .5]]))       # tI2: G is not Γ


@pytest.mark.parametrize("cell", [FLAT, TETRAGONAL])
@pytest.mark.parametrize("marked", [True, False])
def test_short_segments_are_no_jumps_and_g_is_not_gamma(put, tmp_path, cell, marked):
    from pymatgen.io.vasp import Kpoints, Poscar

    from meidnet_core import dft
    vasp.write_inputs(cell, tmp_path / "run", "bands")
    file, path = tmp_path / "run" / "KPOINTS", dft.band_path(cell, vasp.PATH_POINTS)[1]
    points = np.array(Kpoints.from_file(file).kpts)
    if not marked:                                                   # a file of someone else says nothing of jumps
        file.write_text(re.sub(r"^.*", "my path", file.read_text(), count=1))
    basis = Poscar.from_file(tmp_path / "run" / "POSCAR").structure.lattice.matrix
    bands = vasp.read_run(put("run", levels_of(np.zeros(len(points)), np.full(len(points), 2.0)), kpoints=points, basis=basis))["bands"]
    names = [n for _, n in path["labels"]]
    assert [n for _, n in bands["labels"]] == names and ("M|H" in names or "R|G" in names)
    np.testing.assert_allclose(bands["distance"], path["distance"], atol=1e-4)


def test_a_line_mode_file_with_two_points_a_segment(put):
    folder = put("run", levels_of(), kpoints=GRID)
    (folder / "KPOINTS").write_text("path\n2\nLine_mode\nReciprocal\n0 0 0 ! G\n0.5 0 0 ! X\n\n0.5 0.5 0 ! M\n0.5 0.5 0.5 ! R\n")
    bands = vasp.read_run(folder)["bands"]
    assert [n for _, n in bands["labels"]] == ["Γ", "X|M", "R"]
    np.testing.assert_allclose(bands["distance"], np.array([0, 0.5, 0.5, 1]) * 2 * np.pi / 4, atol=1e-6)


def test_bands_of_a_line_mode_file(put):
    line = [[0, 0, 0], [0.125, 0, 0], [0.25, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0.25], [0.5, 0.5, 0.5]]
    folder = put("run", levels_of(np.zeros(6), np.full(6, 2.0)), kpoints=line)
    (folder / "KPOINTS").write_text("path\n3\nLine_mode\nReciprocal\n0 0 0 ! \\Gamma\n0.25 0 0 ! X\n\n0.5 0.5 0 ! M\n0.5 0.5 0.5 ! R\n")
    bands, unit = vasp.read_run(folder)["bands"], 2 * np.pi / 4
    assert [n for _, n in bands["labels"]] == ["Γ", "X|M", "R"]
    np.testing.assert_allclose(bands["distance"], np.array([0, 0.125, 0.25, 0.25, 0.5, 0.75]) * unit, atol=1e-6)


def test_a_run_that_does_not_converge_is_labelled(put):
    run = vasp.read_run(put(cycles=5))                               # as many cycles as NELM allows
    assert run["status"] == "not converged" and run["energy_per_atom"] is not None


def test_a_step_that_is_cut_short_is_named_and_the_others_are_kept(put, tmp_path):
    points, levels = path_of(put, tmp_path)
    file = put("bands", levels, kpoints=points) / "vasprun.xml"
    file.write_text(file.read_text()[:-2000])
    run = vasp.read_run(tmp_path)
    assert re.match(r"failed: .*bands/vasprun.xml: cut short or no XML", run["status"]) and run["steps"]["static"] == "ok"
    assert run["bands"] is None and run["gap"]["indirect"] == pytest.approx(1.0)


def test_a_lone_file_that_is_cut_short_is_a_row(put):
    file = put() / "vasprun.xml"
    file.write_text(file.read_text()[:900])
    run = vasp.read_run(file, "MgO")
    assert run["status"].startswith(f"failed: {file}: cut short") and run["name"] == "MgO" and run["gap"] is None


@pytest.mark.parametrize("text", ["<modeling></modeling>", "no xml at all", ""])
def test_a_file_that_is_no_run_is_a_row(tmp_path, text):
    (tmp_path / "vasprun.xml").write_text(text)
    assert vasp.read_run(tmp_path)["status"].startswith(f"failed: {tmp_path}/vasprun.xml")


def test_no_file_is_a_clear_error(tmp_path):
    with pytest.raises(vasp.VaspError, match=f"{tmp_path}: no vasprun.xml in it"):
        vasp.read_run(tmp_path)


def test_bands_start_from_the_charge_of_the_static_run(put, tmp_path):
    static = put("static")
    with pytest.raises(vasp.VaspError, match="CHGCAR: missing"):
        vasp.write_inputs(KTASE3, tmp_path / "bands", "bands", previous=static)
    (static / "CHGCAR").write_text("charge")
    vasp.write_inputs(KTASE3, tmp_path / "bands", "bands", previous=static)
    assert (tmp_path / "bands" / "CHGCAR").read_text() == "charge" and incar(tmp_path / "bands")["NBANDS"] == 6


def test_a_compressed_run_is_read(put):
    import gzip
    file = put() / "vasprun.xml"
    with gzip.open(f"{file}.gz", "wb") as out, open(file, "rb") as plain:
        shutil.copyfileobj(plain, out)
    file.unlink()
    assert vasp.read_run(file.parent)["status"] == "ok"
