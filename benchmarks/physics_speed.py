"""Wall time on two free cores: a band structure of `quick`; phonons, search and phonons of a repair; 140 candidates relaxed and placed.

    python benchmarks/physics_speed.py bands KTaSe3 TmMnSe3     # data/results/physics-speed/bands.json
    python benchmarks/physics_speed.py repair KTaSe3            # data/results/physics-speed/repair.json
    python benchmarks/physics_speed.py screening ours           # data/results/physics-speed/screening.json

Everything is computed anew in a folder of its own; what else runs on the machine counts, so run nothing else.
"""

import argparse
import json
import tempfile
import time

from meidnet_core import dft, evidence, hull, relax, repair, results, sun

SEARCHES = {"quick": {"generations": 1, "offspring": 2, "population": 4, "minutes": 2.0}}     # CPU time; `paper`: data/polymorphs


def bands(formula, folder):
    """{"<formula>": seconds} of the `quick` profile: equation of state, density, bands, density of states, two MPI ranks."""
    job = dft.prepare(dft.cubic_start(formula), dft.PROFILES["quick"])
    start = time.perf_counter()
    dft.execute(job, f"{folder}/{formula}", ranks=2)
    seconds = time.perf_counter() - start
    out = dft.collect(formula, job, f"{folder}/{formula}", "quick")
    if out["status"] != "ok":
        raise RuntimeError(f"{formula}: {out['status']}")
    return {formula: seconds}


def search(formula, folder):
    """{"<formula>_<profile>": seconds, ..._free_of_soft_modes, ..._gain (meV/atom)}: cell to polymorph with its phonons, one process."""
    rows, cell = {}, evidence.cubic_cells([formula], "sevennet-0")[formula]
    for profile, asked in SEARCHES.items():
        start = time.perf_counter()
        out = repair.repair(formula, cell, "sevennet-0", f"{folder}/{profile}", **asked)
        name = f"{formula}_{profile}"
        rows |= {name: time.perf_counter() - start, f"{name}_free_of_soft_modes": int(out["status"] == "repaired"),
                 f"{name}_gain": 1000 * out["gain"]}
    return rows


def screening(method, folder):
    """{"<method>": seconds, ..._candidates} of relaxing (two processes, ideal start, empty cache) and placing what seed 0 proposes."""
    cells, table = sun.gather(sun.designer(symmetrize=True), method, 0, sun.PER_TARGET)
    start = time.perf_counter()
    rows = relax.relax_all(cells, f"{folder}/cells.jsonl", "sevennet-0", processes=2)["ideal"]
    judged = sun.judge(cells, table, rows, hull.corrections("sevennet-0"))
    return {method: time.perf_counter() - start, f"{method}_candidates": len(judged)}


CONFIG = {"bands": {"profile": "quick", "ranks": 2}, "repair": {"potential": "sevennet-0", "searches": SEARCHES},
          "screening": {"potential": "sevennet-0", "hull": "list", "processes": 2, "start": "ideal", "seed": 0}}
MEASURE = {"bands": bands, "repair": search, "screening": screening}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURE)
    parser.add_argument("names", nargs="+", help="formulas, or methods of sun.py")
    args = parser.parse_args()
    path = results.RESULTS / "physics-speed" / f"{args.what}.json"
    m = json.loads(path.read_text())["metrics"] if path.exists() else {}
    for name in args.names:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            m |= MEASURE[args.what](name, folder)
        results.write_run("physics-speed", args.what, config=CONFIG[args.what], seed=None, split="computed",
                          data_set={"screening": "extended"}.get(args.what, "paper, Table S1"),
                          n=len({k.split("_")[0] for k in m}), metrics=m, claims={}, wall_time_s=time.perf_counter() - start)
        print({k: round(v, 1) for k, v in m.items() if k.startswith(name)}, flush=True)


if __name__ == "__main__":
    main()
