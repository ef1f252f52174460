"""Flows and array jobs: rows in order, failures labelled, shards disjoint and resumable. The potential is ASE's EMT: seconds."""

import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
import test_vasp
from ase.calculators.emt import EMT

from meidnet_core import flows, potentials, vasp

FCC = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
fcc = lambda element, a: (np.array([a] * 3 + [90.0] * 3), [element] * 4, FCC)
CELLS = {"copper": fcc("Cu", 3.7), "silver": fcc("Ag", 4.2), "gold": fcc("Au", 4.2)}
MIXED = {"copper": CELLS["copper"], "iron": fcc("Fe", 3.6), "silver": CELLS["silver"]}           # EMT knows no iron


@pytest.fixture(autouse=True)
def emt(monkeypatch):
    flows._calculator.cache_clear()
    monkeypatch.setattr(potentials, "get_calculator", lambda *args: EMT())
    yield
    flows._calculator.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """Counter of the materials that were relaxed."""
    count, original = Counter(), flows._relax

    def counted(name, cell, **options):
        count[name] += 1
        return original(name, cell, **options)
    monkeypatch.setitem(flows.TASKS, "relax", counted)
    return count


# ---- flows --------------------------------------------------------------------------------------

def test_rows_come_in_the_order_of_the_materials():
    rows = flows.run_here(flows.flow({"silver": CELLS["silver"], "copper": CELLS["copper"]}))
    assert [(r["name"], r["step"], r["status"]) for r in rows] == [("silver", "relax", "ok"), ("copper", "relax", "ok")]
    assert [r["lattice"][0] for r in rows] == pytest.approx([4.06, 3.59], abs=0.02)


def test_a_failing_job_is_labelled_and_the_others_finish():
    rows = flows.run_here(flows.flow(MIXED))
    assert [r["status"] for r in rows][::2] == ["ok", "ok"] and rows[1]["status"].startswith("failed: ") and "Fe" in rows[1]["status"]


def test_an_unforeseen_error_is_labelled_and_the_others_finish(monkeypatch):
    def die(name, cell, **options):
        if name == "iron":
            raise KeyError("no iron")
        return {"status": "ok"}
    monkeypatch.setitem(flows.TASKS, "relax", die)
    assert [r["status"] for r in flows.run_here(flows.flow(MIXED))] == ["ok", "failed: KeyError: 'no iron'", "ok"]


def test_a_job_that_jobflow_lost_is_labelled(monkeypatch):
    import jobflow
    monkeypatch.setattr(jobflow, "run_locally", lambda *args, **words: {})
    (row,) = flows.run_here(flows.flow({"copper": CELLS["copper"]}))
    assert row["name"] == "copper" and row["status"].startswith("failed: the job did not run")


def test_later_steps_take_the_relaxed_cell_or_are_skipped(monkeypatch):
    seen = {}
    monkeypatch.setitem(flows.TASKS, "phonons", lambda name, cell, **options: seen.update({name: cell}) or {"status": "ok", **options})
    rows = flows.run_here(flows.flow(MIXED, ("relax", "phonons"), {"phonons": {"potential": "chgnet"}}))
    assert [(r["name"], r["step"]) for r in rows][:2] == [("copper", "relax"), ("copper", "phonons")]
    assert seen["copper"][0] == rows[0]["lattice"] and rows[1]["potential"] == "chgnet" and "iron" not in seen
    assert rows[3]["status"].startswith("skipped: relaxation failed")


def test_phonons_of_the_relaxed_cell_run_in_a_flow():
    rows = flows.run_here(flows.flow({"copper": CELLS["copper"]}, ("relax", "phonons")))
    assert [r["status"] for r in rows] == ["ok", "ok"] and rows[1]["lowest"] > -0.1


def test_gpaw_that_is_missing_is_a_row(monkeypatch):
    from meidnet_core import dft
    monkeypatch.setattr(dft, "available", lambda: False)
    (row,) = flows.run_here(flows.flow({"silver": CELLS["silver"]}, ("dft",), {"dft": {"store": "/nowhere"}}))
    assert row["status"].startswith("failed: DFTError: GPAW is not installed here")


def test_a_folder_keeps_the_outputs(tmp_path):
    flows.run_here(flows.flow({"copper": CELLS["copper"]}), tmp_path / "jobs")
    (stored,) = json.loads((tmp_path / "jobs" / "jobs.json").read_text())
    assert stored["name"] == "relax copper" and stored["output"]["status"] == "ok"


def test_a_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (row,) = flows.run_here(flows.flow({"copper": CELLS["copper"]}), "runs/jobs")
    assert row["status"] == "ok" and (tmp_path / "runs" / "jobs" / "jobs.json").exists()


def test_a_flow_can_be_sent_elsewhere():
    """jobflow-remote and FireWorks send the flow as JSON."""
    from jobflow import Flow
    from monty.json import MontyDecoder, MontyEncoder
    text = json.dumps(flows.flow({"copper": CELLS["copper"]}, ("relax", "phonons", "dft")), cls=MontyEncoder)
    again = json.loads(text, cls=MontyDecoder)
    assert isinstance(again, Flow) and [j.name for j in again.jobs] == ["relax copper", "phonons copper", "dft copper"]
    assert again.jobs[0].function is flows.task


def test_an_unknown_step_is_a_clear_error():
    with pytest.raises(ValueError, match="unknown steps .'bands'.: expected relax"):
        flows.flow(CELLS, ("relax", "bands"))


def test_vasp_after_relax_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"vasp_flow\(relax=True\)"):
        flows.flow(CELLS, ("relax", "vasp"))


def test_vasp_flows_want_atomate2(monkeypatch):
    monkeypatch.setitem(sys.modules, "atomate2.vasp.jobs.core", None)
    with pytest.raises(ImportError, match="make install"):
        flows.vasp_flow("copper", CELLS["copper"])


def test_vasp_jobs_start_from_each_other_and_end_in_a_row():
    made = flows.vasp_flow("copper", CELLS["copper"], relax=True)
    relax, static, bands, dos, read = made.jobs
    assert [j.name for j in made.jobs] == ["relax copper", "static copper", "bands copper", "dos copper", "vasp copper"]
    assert made.graph.has_edge(relax.uuid, static.uuid) and made.graph.has_edge(static.uuid, dos.uuid)
    assert not made.graph.has_edge(bands.uuid, dos.uuid) and made.graph.has_edge(bands.uuid, read.uuid)
    assert static.maker.input_set_generator.user_incar_settings["ENCUT"] == 520


# ---- array jobs ---------------------------------------------------------------------------------

def test_shards_are_disjoint_and_complete():
    names = [f"m{i}" for i in range(23)]
    parts = [flows.shard(names, f"{k}/5") for k in range(1, 6)]
    assert sorted(sum(parts, [])) == sorted(names) and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert flows.shard(["a"], "2/3") == []


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0", "1/2/3"])
def test_a_wrong_shard_is_a_clear_error(part):
    with pytest.raises(ValueError, match="expected k/n"):
        flows.shard(["a"], part)


def test_shards_resume_also_when_cut_otherwise(asked, tmp_path):
    first = flows.run_shard("relax", CELLS, tmp_path, "1/2")
    assert [r["name"] for r in first] == ["copper", "gold"] and asked == {"copper": 1, "gold": 1}
    rows = flows.run_shard("relax", CELLS, tmp_path, "1/1")
    assert [r["name"] for r in rows] == list(CELLS) and asked == {"copper": 1, "silver": 1, "gold": 1} and rows[0] == first[0]
    flows.run_shard("relax", CELLS, tmp_path, options={"start": "rattled", "device": "cpu"})         # another question
    assert set(asked.values()) == {2}


def test_an_option_that_is_named_or_not_is_one_question(tmp_path):
    first = flows.run_shard("relax", CELLS, tmp_path, options={"potential": "sevennet-0", "start": "ideal"})
    assert flows.run_shard("relax", CELLS, tmp_path) == first and len(flows.rows_in(tmp_path, "relax")) == len(CELLS)


def test_a_killed_shard_goes_on(asked, tmp_path, monkeypatch):
    original = flows.TASKS["relax"]

    def killed(name, cell, **options):
        if name == "silver":
            raise KeyboardInterrupt
        return original(name, cell, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(flows.TASKS, "relax", killed)
        flows.run_shard("relax", CELLS, tmp_path)
    with open(tmp_path / "relax-1-of-1.jsonl", "a") as file:
        file.write('{"key": "half a li')
    assert [r["status"] for r in flows.run_shard("relax", CELLS, tmp_path)] == ["ok"] * 3
    assert asked == {"copper": 1, "silver": 1, "gold": 1}


def test_failures_are_kept_and_asked_again_only_on_demand(asked, tmp_path):
    for again, count in ((False, 1), (False, 1), (True, 2)):
        rows = flows.run_shard("relax", MIXED, tmp_path, again=again)
        assert [r["status"][:6] for r in rows] == ["ok", "failed", "ok"] and asked["iron"] == count and asked["copper"] == 1


def test_phonons_wait_for_the_relaxation(tmp_path, monkeypatch):
    monkeypatch.setitem(flows.TASKS, "phonons", lambda name, cell, **options: {"status": "ok", "a": cell[0][0], "dos": np.ones(2)})
    early = flows.run_shard("phonons", MIXED, tmp_path, relaxed=True)
    assert {r["status"][:8] for r in early} == {"skipped:"} and not flows.rows_in(tmp_path, "phonons")
    flows.run_shard("relax", MIXED, tmp_path)
    rows = flows.run_shard("phonons", MIXED, tmp_path, relaxed=True)
    assert [r["status"][:7] for r in rows] == ["ok", "skipped", "ok"] and rows[0]["a"] == pytest.approx(3.59, abs=0.02)
    flows.run_shard("relax", MIXED, tmp_path, options={"start": "rattled"})
    with pytest.raises(ValueError, match="several relaxations of one name"):
        flows.run_shard("phonons", MIXED, tmp_path, relaxed=True)


def test_the_command_line_runs_a_shard_and_collects(tmp_path, write_cif, capsys):
    import pandas as pd
    table = tmp_path / "table.csv"
    pd.DataFrame([{"name": n, "cif": write_cif(*c)} for n, c in CELLS.items()]).to_csv(table, index=False)
    for k in (1, 2):
        flows.main(["relax", "--table", str(table), "--shard", f"{k}/2", "--out", str(tmp_path / "out"), "--option", "potential=chgnet"])
    assert "shard 1/2: 2 rows, 2 ok" in capsys.readouterr().out
    flows.main(["collect", "--step", "relax", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "energy_per_atom" in lines[0] and "frac" not in lines[0] and ",chgnet," in lines[1]


def test_tables_are_read_or_refused(tmp_path, write_cif):
    import pandas as pd
    for name, cell in CELLS.items():
        (tmp_path / f"{name}.cif").write_text(write_cif(*cell))
    assert list(flows.read_table(tmp_path)) == sorted(CELLS) and flows.read_table(tmp_path)["copper"][1] == ["Cu"] * 4
    bad = {"formula,cif\nCu,x\n": "expected columns name", "name,cif\nCu,x\n": "Cu: unreadable CIF"}
    for text, words in bad.items():
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=f"bad.csv: {words}"):
            flows.read_table(tmp_path / "bad.csv")
    pd.DataFrame([{"name": "x", "cif": write_cif(*CELLS["copper"])}] * 2).to_csv(tmp_path / "bad.csv")
    with pytest.raises(ValueError, match="'x' occurs twice"):
        flows.read_table(tmp_path / "bad.csv")


def test_a_cif_with_partial_occupancies_is_named(tmp_path, write_cif):
    (tmp_path / "alloy.cif").write_text(re.sub(r"(?m)1(\.0+)?$", "0.5", write_cif(*CELLS["copper"])))
    with pytest.raises(ValueError, match="alloy.cif: partial occupancies"):
        flows.read_table(tmp_path)
    (tmp_path / "alloy.cif").write_text("x")
    with pytest.raises(ValueError, match="alloy.cif: unreadable CIF"):
        flows.read_table(tmp_path)


def test_a_table_without_materials_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no \*.cif in it"):
        flows.main(["relax", "--table", str(tmp_path), "--out", str(tmp_path / "out")])
    (tmp_path / "table.csv").write_text("name,cif\n")
    with pytest.raises(ValueError, match="table.csv: no rows in it"):
        flows.read_table(tmp_path / "table.csv")


def test_the_steps_of_vasp_are_named_with_commas(tmp_path, write_cif, monkeypatch):
    (tmp_path / "copper.cif").write_text(write_cif(*CELLS["copper"]))
    monkeypatch.setitem(flows.TASKS, "vasp", lambda name, cell, steps: {"status": "ok", "steps": steps})
    flows.main(["vasp", "--table", str(tmp_path), "--out", str(tmp_path / "out"), "--option", "steps=static,dos"])
    (row,) = flows.rows_in(tmp_path / "out", "vasp").values()
    assert row["steps"] == ["static", "dos"]


# ---- VASP without atomate2 ----------------------------------------------------------------------

SCRIPT = """
step=$(basename $PWD)
[ $step = "{broken}" ] && exit 139
cp {files}/$step.xml vasprun.xml && echo charge > CHGCAR && printf x >> count
"""


@pytest.fixture
def fake_vasp(tmp_path):
    """fake_vasp(broken step): a command that leaves a vasprun.xml in its folder, as VASP would."""
    from pymatgen.io.vasp import Kpoints
    vasp.write_inputs(MGO, tmp_path / "files", "bands")
    for step in flows.VASP_STEPS:
        points = Kpoints.from_file(tmp_path / "files" / "KPOINTS").kpts if step == "bands" else test_vasp.GRID
        levels = test_vasp.levels_of(np.full(len(points), 0.5), np.full(len(points), 1.5))
        (tmp_path / "files" / f"{step}.xml").write_text(test_vasp.vasprun(levels, test_vasp.filled(levels), points))

    def make(broken=""):
        (tmp_path / "vasp.sh").write_text(SCRIPT.format(broken=broken, files=tmp_path / "files"))
        return f"sh {tmp_path / 'vasp.sh'}"
    return make


MGO = (np.array([4.0] * 3 + [90.0] * 3), ["Mg", "O"], np.array([[0, 0, 0], [.5, .5, .5]]))


def test_vasp_steps_follow_each_other_and_resume(fake_vasp, tmp_path):
    options = {"folder": str(tmp_path / "vasp"), "command": fake_vasp("dos")}
    row = flows.task("vasp", "MgO", MGO, options)
    assert row["status"].startswith("failed: CalledProcessError")
    row = flows.task("vasp", "MgO", MGO, options | {"command": fake_vasp()})
    assert row["status"] == "ok" and row["gap"]["indirect"] == pytest.approx(1.0) and row["name"] == "MgO" and "bands" not in row
    assert {s: (tmp_path / "vasp" / "MgO" / s / "count").read_text() for s in flows.VASP_STEPS} == dict.fromkeys(flows.VASP_STEPS, "x")
    assert json.dumps(row, default=lambda x: x.tolist())


def test_a_folder_answers_one_question_of_vasp(fake_vasp, tmp_path):
    options = {"folder": str(tmp_path / "vasp"), "command": fake_vasp(), "steps": ["static"]}
    here = tmp_path / "vasp" / "MgO" / "static"
    assert flows.task("vasp", "MgO", MGO, options)["status"] == "ok"
    wider = (MGO[0] * [1.01, 1.01, 1.01, 1, 1, 1], *MGO[1:])
    for cell, more, what in ((wider, {}, "cell"), (MGO, {"potcar": {"Mg": "Mg"}}, "potcar"), (MGO, {"functional": "PBE_54"}, "functional")):
        row = flows.task("vasp", "MgO", cell, options | more)
        assert row["status"] == f"failed: ValueError: {here}: holds another calculation ({what}); delete it or choose another folder"
    assert flows.task("vasp", "MgO", MGO, options)["status"] == "ok" and (here / "count").read_text() == "x"
    (here / "key.json").unlink()                                      # a run of a stranger
    assert f"{here}: holds another calculation (no key.json" in flows.task("vasp", "MgO", MGO, options)["status"]


def test_inputs_that_cannot_be_written_bind_no_folder(tmp_path, monkeypatch):
    from pymatgen.core import SETTINGS
    options = {"folder": str(tmp_path / "vasp")}
    with monkeypatch.context() as patch:
        patch.setitem(SETTINGS, "PMG_VASP_PSP_DIR", str(tmp_path))    # holds no dataset
        assert "inputs not written" in flows.task("vasp", "MgO", MGO, options)["status"]
    assert flows.task("vasp", "MgO", MGO, options | {"functional": "PBE_54"})["status"].startswith("inputs written")


def test_without_a_command_inputs_are_written(tmp_path):
    row = flows.task("vasp", "MgO", MGO, {"folder": str(tmp_path)})
    assert row["status"] == f"inputs written: {tmp_path / 'MgO' / 'static'}" and (tmp_path / "MgO" / "static" / "INCAR").exists()


def test_a_row_of_inputs_is_not_kept(fake_vasp, tmp_path):
    options = {"folder": str(tmp_path / "vasp"), "steps": ["static"]}
    (row,) = flows.run_shard("vasp", {"MgO": MGO}, tmp_path / "out", options=options)
    assert row["status"].startswith("inputs written") and not flows.rows_in(tmp_path / "out", "vasp")
    (row,) = flows.run_shard("vasp", {"MgO": MGO}, tmp_path / "out", options=options | {"command": fake_vasp()})
    assert row["status"] == "ok"
