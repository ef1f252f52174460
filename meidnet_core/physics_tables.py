"""Tables of chapters 13 and 16: gaps, repaired polymorphs and what the paper has for them; all from stored results."""

import numpy as np

from . import relax, results
from .evidence import SHIFTED, anion_pairs, answer, paper_gaps, stored_places


def kind(result):
    """metal | direct | indirect of a dft result; None for none. Gaps that differ by less than 0.01 eV are one."""
    if result is None:
        return None
    g = result["gap"]
    return "metal" if g["metal"] else "direct" if g["direct"] - g["indirect"] < 0.01 else "indirect"


def coordinates(k):
    """A k-point in reciprocal lattice vectors as text, two digits; Γ for zero."""
    return "(" + " ".join(f"{x:.2g}" for x in k) + ")" if np.any(np.round(k, 3)) else "Γ"


def point(k):
    """Name of a k-point of a simple cubic cell, its coordinates where it has none."""
    names = {(0, 0, 0.5): "X", (0, 0.5, 0.5): "M", (0.5, 0.5, 0.5): "R"}
    return names.get(tuple(sorted(np.abs(np.round(k, 3)).tolist())), coordinates(k))


def eos_residual(result):
    """How far the points of an equation of state lie from their Birch-Murnaghan curve, rms in meV/atom: too large, and cutoff or mesh do
    not suffice for the lattice constant."""
    from ase.eos import EquationOfState, birchmurnaghan
    volumes, energies = (np.array(result["eos"][k]) for k in ("volumes", "energies"))
    curve = EquationOfState(volumes, energies, eos="birchmurnaghan")
    curve.fit()
    return 1000 * float(np.sqrt(np.mean((energies - birchmurnaghan(volumes, *curve.eos_parameters)) ** 2))) / len(result["cell"][1])


def edges(result, name=point):
    """Where the gap of a dft result lies: columns from, to (valence top, conduction bottom), direct at; `name` of a k-point."""
    g = result["gap"]
    return {"from, to": f"{name(g['vbm_k'])}, {name(g['cbm_k'])}", "direct at": name(g["direct_k"])}


def gap_table(found):
    """Table S1: PBE gaps of cubic cells (eV) and where their edges lie, lattice constants (angstrom) and `eos_residual` (meV/atom), moments
    (Bohr magnetons a cell), wall time (minutes); the paper's targets and CGCNN gaps, in the theory of its labels, and its PBE gaps."""
    import pandas as pd
    paper, rows, read = paper_gaps("before"), [], results.read_reference().set_index("id").paper
    target = results.read_table_s1().set_index("formula").target_gap_ev
    for f, r in found.items():
        g, setups = r["gap"], ", ".join(f"{e} {tag}" for e, tag in r["setups"].items()) or "default"
        rows.append({"formula": f, "target, GLLB-SC (eV)": target.get(f), "paper, CGCNN (eV)": read.get(f"ts1.{f.lower()}.gap_cgcnn"),
                     "paper, VASP (eV)": paper.get(f), "here, GPAW (eV)": g["indirect"], "direct (eV)": g["direct"],
                     "kind": kind(r), "band edges (eV)": g["overlap"], **edges(r),
                     "a (Å)": r["eos"]["volume"] ** (1 / 3), "fit (meV)": eos_residual(r), "moment (µB)": r["moment"],
                     "setups": setups, "min": r["seconds"] / 60})
    return pd.DataFrame(rows)


def repair_table(found):
    """Table S2: energies and lowest frequencies before and after repair, distances to the hull beside the paper's (meV/atom)."""
    import pandas as pd
    paper, rows, places = results.read_reference().set_index("id").paper, [], stored_places()
    for f, r in found.items():
        here, first = places.get(f, {}), [f"ts1.{f.lower()}.ehull_dft", f"ts2.{f.lower()}.ehull"]
        rows.append({"material": f, "before": r["spacegroup_before"], "after": r.get("spacegroup_after"), "status": r["status"],
                     "atoms": len(r.get("symbols", [])) or None, "generations": r.get("generations"),
                     "CPU (min)": r["seconds"] / 60, "gain (meV/atom)": 1000 * r["gain"] if r.get("gain") is not None else None,
                     "lowest before (THz)": r["lowest_before"], "lowest after (THz)": r.get("lowest_after"),
                     "E_hull before": here.get("before"), "E_hull after": here.get("after"),
                     "paper: before": paper.get(first[0]), "paper: after": paper.get(first[1])})
    return pd.DataFrame(rows)


def charge_table(found):
    """What the anions of the chosen polymorphs leave for the cations, {formula: result of repair.repair}."""
    import pandas as pd
    rows = []
    for f, r in found.items():
        if r.get("lattice"):
            pairs, charge, shortest = anion_pairs(relax.cell_from(r))
            rows.append({"material": f, "space group": r["spacegroup_after"], "shortest X-X (Å)": shortest, "bonds X-X a formula": pairs,
                         "left for A + B (e)": charge, "gain (meV/atom)": 1000 * r["gain"]})
    return pd.DataFrame(rows)


def polymorph_table(found, most=3):
    """The lowest polymorphs of each material: energy below the cubic cell (meV/atom) and lowest frequencies (THz)."""
    import pandas as pd
    return pd.DataFrame([{"material": f, "rank": k + 1, "space group": p["spacegroup"], "atoms": len(p["symbols"]),
                          "below the cubic cell (meV/atom)": 1000 * (r["parent_energy"] - p["energy_per_atom"]),
                          "lowest, path and mesh (THz)": p["lowest"], "lowest, exact q (THz)": p["lowest_exact"],
                          "supercell": "x".join(map(str, p.get("supercell") or []))}             # whose q-points are exact
                         for f, r in found.items() for k, p in enumerate(r.get("polymorphs", [])[:most])])


def repaired_gaps(formulas, before, after):
    """PBE gaps (eV) before and after repair, {formula: dft result} each, beside the paper's; a metal's is `answer`'s window.

    "here" is the smallest of the mesh and, unless it has a `basis error`, of the band path; "on path" that of a path by atomic orbitals,
    whose mean error on the mesh (eV) is the basis error.
    """
    import pandas as pd
    gap, first, second = (lambda r: r and r["gap"]["indirect"]), paper_gaps("before"), paper_gaps("after")
    path = lambda f: answer(f, {"gap": after[f]["path_gap"]}) if after.get(f, {}).get("path_gap") else None
    return pd.DataFrame([{"material": f, "paper, cubic": first.get(f), "here, cubic": gap(before.get(f)), "paper, repaired": second.get(f),
                          "here, repaired": answer(f, after[f]) if f in after else None, "kind": kind(after.get(f)),
                          "window at": after[f]["gap"]["window_at"] if f in after and f in SHIFTED else None,
                          "on path": path(f), "basis error": after.get(f, {}).get("basis", {}).get("error")} for f in formulas])


def repaired_edges(found):
    """Of the repaired, {formula: dft result}: PBE gaps (eV), where they lie (each cell its own reciprocal vectors), wall time (minutes)."""
    import pandas as pd
    return pd.DataFrame([{"material": f, "atoms": len(r["cell"][1]), "indirect (eV)": r["gap"]["indirect"],
                          "direct (eV)": r["gap"]["direct"], "kind": kind(r), "band edges (eV)": r["gap"]["overlap"],
                          **edges(r, coordinates), "min": r["seconds"] / 60} for f, r in found.items()])
