"""Wall time of one material on two free cores: band structure of `quick`, and phonons, search and phonons of a repair.

    python benchmarks/physics_speed.py bands KTaSe3 TmMnSe3     # data/results/physics-speed/bands.json
    python benchmarks/physics_speed.py repair KTaSe3            # data/results/physics-speed/repair.json

Everything is computed anew in a folder of its own; what else runs on the machine counts, so run nothing else.
"""

import argparse
import json
import tempfile
import time

from meidnet_core import dft, evidence, repair, results

SEARCHES = {"quick": {"generations": 1, "offspring": 2, "population": 4, "minutes": 2.0},          # minutes: of CPU time
            "paper": {"generations": 19, "minutes": 30.0}}


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bands", "repair"])
    parser.add_argument("formulas", nargs="+")
    args = parser.parse_args()
    path = results.RESULTS / "physics-speed" / f"{args.what}.json"
    m = json.loads(path.read_text())["metrics"] if path.exists() else {}
    for formula in args.formulas:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            m |= {"bands": bands, "repair": search}[args.what](formula, folder)
        config = {"bands": {"profile": "quick", "ranks": 2}, "repair": {"potential": "sevennet-0", "searches": SEARCHES}}[args.what]
        results.write_run("physics-speed", args.what, config=config, seed=None, data_set="paper, Table S1", split="computed",
                          n=len({k.split("_")[0] for k in m}), metrics=m, claims={}, wall_time_s=time.perf_counter() - start)
        print({k: round(v, 1) for k, v in m.items() if k.startswith(formula)}, flush=True)


if __name__ == "__main__":
    main()
