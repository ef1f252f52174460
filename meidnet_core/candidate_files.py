"""The files of designed crystals: a CIF each and candidates.csv beside them; what is known of those in data/candidates."""

from pathlib import Path

import numpy as np

from . import candidates, cgcnn, crystal, oqmd, results

ENDS = (".cif", "-relaxed.cif")
ON_TARGET = 0.2                # eV by which a predicted gap may miss its target
KNOWN = ["on_target", "cgcnn_gap", "a", "pbe", "gllbsc", "oqmd_cubic", "oqmd_lowest"]        # columns that `annotate` adds


def write(folder, table, cells, relaxed=()):
    """folder/candidates.csv and a CIF for each of its rows, named by formula; relaxed: cells of the first rows after relaxation (None:
    it failed), as <formula>-relaxed.cif. Files of the table that was there go: folder and table say the same."""
    import pandas as pd
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in pd.read_csv(folder / "candidates.csv").formula if (folder / "candidates.csv").exists() else []:
        for end in ENDS:
            (folder / f"{name}{end}").unlink(missing_ok=True)
    for end, given in zip(ENDS, (cells, relaxed)):
        for name, cell in zip(table.formula, given):
            if cell is not None:
                crystal.to_structure(*cell).to(filename=str(folder / f"{name}{end}"))
    table.to_csv(folder / "candidates.csv", index=False)


def annotate(folder=results.ROOT / "data" / "candidates"):
    """Adds to candidates.csv what is known of its gaps: on_target (predicted PBE gap within ON_TARGET of the target), cgcnn_gap
    (independent CGCNN, PBE, eV), a (angstrom, relaxed cube), gaps ab initio of those that chapter 14 calculated (eV; 0: none), and
    what OQMD says by DFT, where it has the formula (eV/atom above its hull): oqmd_cubic of the cubic cell, oqmd_lowest of any phase."""
    import pandas as pd
    from pymatgen.core import Structure
    table = pd.read_csv(folder / "candidates.csv").drop(columns=KNOWN, errors="ignore")
    edges = np.array([Structure.from_file(folder / f"{f}.cif").volume ** (1 / 3) for f in table.formula])
    numbers = candidates.numbers_of(table.formula)
    cells, oqmds = candidates.ideal(numbers, lambda _: edges), oqmd.distances(numbers)
    known = {r["formula"]: r for r in results.read_run("gllbsc-candidates", "seed0")["curve"]}
    gap = {k: [known.get(f, {}).get(k) for f in table.formula] for k in ("pbe", "gllbsc")}
    read = cgcnn.predict(cgcnn.independent(), cells)[:, 0]
    near = (table.pbe_gap - table.target).abs() <= ON_TARGET
    table = table.assign(on_target=near, cgcnn_gap=read, a=edges, **gap, oqmd_cubic=oqmds[:, 0], oqmd_lowest=oqmds[:, 1])
    table.round(4).to_csv(folder / "candidates.csv", index=False)
    return table
