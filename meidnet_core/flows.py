"""Many materials through relaxation, phonons, GPAW and VASP: on a cluster, or the same flows here. See book/scale_out.md.

Two ways over the same tasks. Array jobs without a database; each row is written when it is there and not asked again:

    python -m meidnet_core.flows relax --table table.csv --shard 3/10 --out runs/cluster
    python -m meidnet_core.flows collect --step relax --out runs/cluster

and jobflow flows: `rows = run_here(flow({name: cell}, ("relax", "phonons")))`, or the same flow given to jobflow-remote. A task
returns a row with name, step and status (ok | not converged | failed: reason | skipped: reason ...) and raises nothing.
"""

import argparse
import hashlib
import inspect
import json
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import relax as relaxation
from .results import _write_atomic

ELSEWHERE = ("device", "ranks", "store", "command", "folder")          # options that change where a row is computed, not what it says
VASP_STEPS = ("static", "bands", "dos")


# ---- one material -------------------------------------------------------------------------------

@lru_cache(1)
def _calculator(potential, device, checkpoint):
    from .potentials import get_calculator
    return get_calculator(potential, device, checkpoint)


def _relax(name, cell, potential="sevennet-0", device="cpu", checkpoint=None, start="ideal"):
    return {"potential": potential} | relaxation.relax(cell, _calculator(potential, device, checkpoint), start)


def _phonons(name, cell, potential="sevennet-0", device="cpu", checkpoint=None):
    from . import phonons
    return {"potential": potential} | phonons.study(cell, _calculator(potential, device, checkpoint))


def _dft(name, cell, profile="quick", store=None, ranks=2):
    """Bands and density of states are in `store` (data/dft by default), the row has the rest."""
    from . import dft
    return {k: v for k, v in dft.run(name, cell, profile, ranks=ranks, store=store).items() if k not in dft.ARRAYS}


def _vasp(name, cell, folder="runs/vasp", command=None, steps=VASP_STEPS, potcar=None, functional="PBE"):
    """Inputs of each step in folder/name/step, run there by `command` (as "srun vasp_std"); steps that are done are not run again.

    Without a command the first step's inputs are written and the row says so. ValueError as in `_finished`.
    """
    from . import vasp
    place, previous = Path(folder) / name, None
    for step in steps:
        here, question = place / step, {"step": step, "cell": _rounded(cell), "potcar": potcar or {}, "functional": functional}
        if not _finished(here, question):
            vasp.write_inputs(cell, here, step, previous, potcar, functional)
            _write_atomic(here / "key.json", json.dumps(question))     # after the inputs: without them it binds no folder
            if not command:
                return {"status": f"inputs written: {here}"}
            with open(here / "vasp.log", "w") as log:
                subprocess.run(shlex.split(command), cwd=here, stdout=log, stderr=subprocess.STDOUT, check=True)
            if (status := vasp.read_run({step: here}, name)["status"]) != "ok":
                return {"status": status, "vasp_step": step}           # what comes next would start from a wrong charge
        cell = vasp.read_run({step: here})["cell"] if step == "relax" else cell
        previous = here if step == "static" else previous
    return {k: v for k, v in vasp.read_run({s: place / s for s in steps}, name).items() if k not in ("bands", "dos", "name")}


def _finished(here, question):
    """Is the answer to this question (step, cell, potcar, functional) in the folder?

    ValueError naming the folder when it belongs to another question by its key.json, or holds a run without one.
    """
    from . import vasp
    key, ran = here / "key.json", vasp._file(here)
    asked = json.loads(key.read_text()) if key.exists() else {}
    differ = [k for k, v in question.items() if asked.get(k) != v]
    if differ and (asked or ran):
        raise ValueError(f"{here}: holds another calculation ({', '.join(differ) if asked else 'no key.json says of what'}); "
                         "delete it or choose another folder")
    return bool(ran) and vasp.read_run({question["step"]: here})["status"] == "ok"


TASKS = {"relax": _relax, "phonons": _phonons, "dft": _dft, "vasp": _vasp}


def task(step, name, cell, options=None, after=None):
    """Row of one step for one cell, or for the relaxed cell of the row `after`. Nothing is raised: a failure is a status."""
    row = {"name": name, "step": step}
    if after is not None and after["status"] != "ok":
        return row | {"status": f"skipped: relaxation {after['status']}"}
    try:
        return row | TASKS[step](name, relaxation.cell_from(after) if after else cell, **(options or {}))
    except Exception as error:                                         # engines fail in many ways; the other materials go on
        return row | {"status": f"failed: {type(error).__name__}: {str(error)[:300]}"}


def _rounded(cell):
    """[symbols, lattice, frac] as JSON keeps them, without the last digits, by which the same cell may differ."""
    return [list(cell[1]), np.round(cell[0], 4).tolist(), np.round(cell[2], 5).tolist()]


# ---- flows --------------------------------------------------------------------------------------

def _job(step, name, cell, after=None, **options):
    from jobflow import Job
    plain = (np.asarray(cell[0]).tolist(), list(cell[1]), np.asarray(cell[2]).tolist())
    return Job(task, function_args=(step, name, plain, options), function_kwargs={"after": after}, name=f"{step} {name}",
               metadata={"name": name, "step": step})


def relax_job(name, cell, **options):
    """jobflow Job of a relaxation; options: potential, device, checkpoint, start (ideal | rattled)."""
    return _job("relax", name, cell, **options)


def phonon_job(name, cell, after=None, **options):
    """Job of phonons.study; after: output of a relax_job, whose cell is taken. options: potential, device, checkpoint."""
    return _job("phonons", name, cell, after, **options)


def dft_job(name, cell, after=None, **options):
    """Job of dft.run (GPAW); options: profile (quick | paper), store, ranks."""
    return _job("dft", name, cell, after, **options)


def vasp_flow(name, cell, relax=False, potcar=None, functional="PBE"):
    """Flow of atomate2's VASP jobs with the inputs of vasp.input_set; its last job is the row. ImportError without atomate2."""
    try:
        from atomate2.vasp.jobs.core import NonSCFMaker, RelaxMaker, StaticMaker
    except ImportError as error:
        raise ImportError("vasp_flow needs atomate2, which requirements.lock pins: `make install`") from error
    from jobflow import Flow, Job

    from . import vasp
    sets = {s: vasp.input_set(cell, s, potcar, functional) for s in vasp.STEPS}
    jobs, last = {}, None
    for step in (*(["relax"] if relax else []), *VASP_STEPS):
        make = {"relax": RelaxMaker, "static": StaticMaker}.get(step, NonSCFMaker)(name=f"{step} {name}", input_set_generator=sets[step])
        mode = {"bands": {"mode": "line"}, "dos": {"mode": "uniform"}}.get(step, {})
        start = (last.output.structure, last.output.dir_name) if last else (sets[step].structure, None)
        jobs[step] = make.make(*start, **mode)
        last = jobs["static"] if "static" in jobs else jobs[step]      # bands and dos both start from the static run
    read = Job(read_vasp, function_args=(name, {s: j.output.dir_name for s, j in jobs.items()}), name=f"vasp {name}",
               metadata={"name": name, "step": "vasp"})
    return Flow([*jobs.values(), read], name=f"vasp {name}")


def read_vasp(name, folders):
    """Row of finished atomate2 jobs, {step: folder as atomate2 writes it, "host:/path"}."""
    from . import vasp
    return {"step": "vasp"} | vasp.read_run({s: f.split(":", 1)[-1] for s, f in folders.items()}, name)


def flow(cells, steps=("relax",), options=None):
    """jobflow Flow of {name: cell}: each step for each material; phonons and dft after "relax" take the relaxed cell.

    steps: relax, phonons, dft, vasp (atomate2). options: {step: {option: value}} of relax_job, phonon_job, dft_job, vasp_flow.
    ValueError for an unknown step, and for vasp with relax: its inputs are made before the relaxed cell is there.
    """
    from jobflow import Flow
    options, jobs = options or {}, []
    if unknown := set(steps) - set(TASKS):
        raise ValueError(f"unknown steps {sorted(unknown)}: expected {', '.join(TASKS)}")
    if {"relax", "vasp"} <= set(steps):
        raise ValueError("vasp does not take the relaxed cell of another step; relax with VASP, vasp_flow(relax=True), which as an option "
                         'of flow is {"vasp": {"relax": True}}, or give flow the relaxed cells')
    for name, cell in cells.items():
        first = relax_job(name, cell, **options.get("relax", {})) if "relax" in steps else None
        jobs += [first] if first else []
        make = {"phonons": phonon_job, "dft": dft_job}
        jobs += [make[s](name, cell, first and first.output, **options.get(s, {})) for s in steps if s in make]
        jobs += [vasp_flow(name, cell, **options.get("vasp", {}))] if "vasp" in steps else []
    return Flow(jobs, name="meidnet " + " ".join(steps))


def _rows_of(flow):
    for job in flow.jobs:
        if hasattr(job, "jobs"):
            yield from _rows_of(job)
        elif job.metadata.get("step") in TASKS:
            yield job


def run_here(flow, folder=None, log=False):
    """Run a flow in this process; rows in the order of its jobs. folder: keeps jobs.json (a jobflow store) and the job folders."""
    from jobflow import JobStore, run_locally
    from maggma.stores import JSONStore, MemoryStore
    if folder:
        folder = Path(folder).resolve()                                # jobflow changes into the folder of each job
        folder.mkdir(parents=True, exist_ok=True)
    store = JobStore(JSONStore(str(folder / "jobs.json"), read_only=False) if folder else MemoryStore())
    jobs = list(_rows_of(flow))
    found = run_locally(flow, log=log, store=store, create_folders=bool(folder), root_dir=folder)
    lost = {"status": "failed: the job did not run; log=True says why"}
    return [found[j.uuid][1].output if j.uuid in found else {k: j.metadata[k] for k in ("name", "step")} | lost for j in jobs]


# ---- array jobs ---------------------------------------------------------------------------------

def read_table(path):
    """{name: cell} of a folder of CIF files, or of a CSV with columns name (or material_id) and cif (text).

    ValueError naming the file for missing columns, no materials, a name that occurs twice, or a CIF that cannot be read or has
    partial occupancies.
    """
    import warnings

    import pandas as pd
    from pymatgen.core import Structure
    path, cells = Path(path), {}
    if path.is_dir():
        entries = [(f.stem, f, f.read_text()) for f in sorted(path.glob("*.cif"))]
    else:
        table = pd.read_csv(path)
        column = next((c for c in ("name", "material_id") if c in table), None)
        if column is None or "cif" not in table:
            raise ValueError(f"{path}: expected columns name (or material_id) and cif, found {', '.join(table.columns)}")
        entries = [(name, f"{path}: {name}", text) for name, text in zip(table[column].astype(str), table["cif"])]
    if not entries:
        raise ValueError(f"{path}: no {'*.cif' if path.is_dir() else 'rows'} in it")
    for name, where, text in entries:
        if name in cells or Path(name).name != name:
            raise ValueError(f"{path}: the name {name!r} occurs twice or is no file name")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                s = Structure.from_str(text, fmt="cif")
        except Exception as error:                                     # pymatgen's reader raises anything
            raise ValueError(f"{where}: unreadable CIF: {error}") from error
        if not s.is_ordered:
            raise ValueError(f"{where}: partial occupancies ({s.formula}); an ordered cell is needed")
        cells[name] = (list(s.lattice.parameters), [x.specie.symbol for x in s], s.frac_coords.tolist())
    return cells


def shard(names, part):
    """Every n-th name from the k-th for part "k/n", 1 <= k <= n: parts are disjoint and complete. ValueError for anything else."""
    try:
        k, n = map(int, part.split("/"))
    except ValueError:
        k, n = 0, 0
    if not 1 <= k <= n:
        raise ValueError(f"shard {part!r}: expected k/n with 1 <= k <= n")
    return list(names)[k - 1::n]


def defaults(step):
    """{option: value} of a task when none is named: the same question, said or not, has one key."""
    found = inspect.signature(TASKS[step]).parameters.items()
    return {k: p.default for k, p in found if p.default is not p.empty and k not in ELSEWHERE}


def key_of(step, name, cell, options):
    """Name of one task: the same question is asked once, wherever it is computed."""
    what = {k: v for k, v in options.items() if k not in ELSEWHERE}
    text = json.dumps([step, name, *_rounded(cell), sorted(what.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rows_in(folder, step):
    """{key: row} of a step in the files of all shards; of two answers to one question the good one counts."""
    rows = {}
    for file in sorted(Path(folder).glob(f"{step}-*-of-*.jsonl")):
        rows |= {k: r for k, r in relaxation.read_rows(file).items() if k not in rows or rows[k]["status"] != "ok"}
    return rows


def run_shard(step, cells, folder, part="1/1", options=None, relaxed=False, again=False):
    """Rows of the part "k/n" of {name: cell}, in order; each is appended to folder/<step>-k-of-n.jsonl when it is there.

    What any shard has is not asked again, unless `again` and its status is not ok. relaxed: take the cells of the relax rows in
    the folder; a material without one is left out of the file, so that a later call asks it. ValueError as in `shard`, and for
    two relaxations of one name in the folder.
    """
    options, folder, names = defaults(step) | (options or {}), Path(folder), shard(cells, part)
    before = _relaxed(folder) if relaxed else {}
    done, rows = rows_in(folder, step), []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step}-{part.replace('/', '-of-')}.jsonl"
    relaxation._mend(path)
    for name in names:
        if relaxed and name not in before:
            rows.append({"name": name, "step": step, "status": f"skipped: no finished relaxation in {folder}"})
            continue
        cell = relaxation.cell_from(before[name]) if relaxed else cells[name]
        key = key_of(step, name, cell, options)
        if key not in done or (again and done[key]["status"] != "ok"):
            done[key] = {"key": key} | task(step, name, cell, options)
            if not done[key]["status"].startswith("inputs written"):   # a later call, with a command, asks again
                with open(path, "a") as file:
                    file.write(json.dumps(done[key], default=lambda x: x.tolist()) + "\n")
        rows.append(done[key])
    return rows


def _relaxed(folder):
    rows = [r for r in rows_in(folder, "relax").values() if r["status"] == "ok"]
    by_name = {r["name"]: r for r in rows}
    if len(by_name) != len(rows):
        raise ValueError(f"{folder}: several relaxations of one name (another potential or start?); use one folder for each")
    return by_name


def main(words=None):
    from .potentials import pick
    parser = argparse.ArgumentParser(prog="python -m meidnet_core.flows", description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=(*TASKS, "collect"))
    parser.add_argument("--table", help="CSV with name and cif, or a folder of CIF files")
    parser.add_argument("--shard", default="1/1", help="k/n, as $SLURM_ARRAY_TASK_ID/10")
    parser.add_argument("--out", default="runs/cluster", help="folder of the rows")
    parser.add_argument("--step", dest="of", default="relax", choices=TASKS, help="collect: which rows")
    parser.add_argument("--relaxed", action="store_true", help="take the relaxed cells in --out")
    parser.add_argument("--again", action="store_true", help="ask those that are not ok again")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                        help="potential=chgnet, start=rattled, profile=paper, steps=static,dos")
    a = parser.parse_args(words)
    if a.step == "collect":
        import pandas as pd
        plain = [{k: v for k, v in r.items() if not isinstance(v, list | dict)} for r in rows_in(a.out, a.of).values()]
        return pd.DataFrame(plain).to_csv(sys.stdout, index=False)
    if not a.table:
        parser.error("--table is needed")
    options = dict(word.split("=", 1) for word in a.option)
    options |= {"ranks": int(options["ranks"])} if "ranks" in options else {}
    options |= {"steps": options["steps"].split(",")} if "steps" in options else {}
    options |= {"potential": pick(options["potential"])} if "potential" in options else {}          # rows name what `auto` stood for
    rows = run_shard(a.step, read_table(a.table), a.out, a.shard, options, a.relaxed, a.again)
    print(f"shard {a.shard}: {len(rows)} rows, {sum(r['status'] == 'ok' for r in rows)} ok")


if __name__ == "__main__":
    main()
