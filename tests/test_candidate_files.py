"""The folder of candidates: files and table say the same, and the table says what is known of each."""

import numpy as np
import pandas as pd
import pytest

from meidnet_core import candidate_files, crystal, oqmd, results


def crystal_of(a):
    return [4.0] * 3 + [90.0] * 3, [a, "Mg", "F", "F", "F"], crystal.PEROVSKITE


def test_the_folder_of_candidates_and_its_table_say_the_same(tmp_path):
    for names in (("KMgF3", "RbMgF3"), ("CsMgF3",)):
        candidate_files.write(tmp_path / "new", pd.DataFrame({"formula": names}), [crystal_of(n.split("Mg")[0]) for n in names])
        assert sorted(p.stem for p in (tmp_path / "new").glob("*.cif")) == sorted(names)
    (tmp_path / "new" / "mine.cif").write_text("")
    candidate_files.write(tmp_path / "new", pd.DataFrame({"formula": []}), [])
    assert [p.name for p in (tmp_path / "new").glob("*.cif")] == ["mine.cif"]


def test_relaxed_crystals_stand_beside_the_decoded_ones(tmp_path):
    from pymatgen.core import Structure
    names, (lattice, symbols, frac) = ["KMgF3", "RbMgF3", "CsMgF3"], crystal_of("K")
    table = pd.DataFrame({"formula": names})
    candidate_files.write(tmp_path, table, [crystal_of(n.split("Mg")[0]) for n in names], [([3.9] * 3 + [90.0] * 3, symbols, frac), None])
    assert sorted(p.name for p in tmp_path.glob("*-relaxed.cif")) == ["KMgF3-relaxed.cif"]   # the second failed, the third was not relaxed
    read = [Structure.from_file(tmp_path / f"KMgF3{end}").lattice.a for end in candidate_files.ENDS]
    assert read == pytest.approx([lattice[0], 3.9])
    candidate_files.write(tmp_path, table[1:], [crystal_of("Rb"), crystal_of("Cs")])
    assert sorted(p.name for p in tmp_path.glob("*.cif")) == ["CsMgF3.cif", "RbMgF3.cif"]


def test_what_is_known_of_exported_gaps_is_added_once(monkeypatch, tmp_path):
    from pymatgen.core import Lattice, Structure
    Structure(Lattice.cubic(4.0), ["K", "Mg", "F", "F", "F"], crystal.PEROVSKITE).to(filename=str(tmp_path / "KMgF3.cif"))
    pd.DataFrame({"formula": ["KMgF3"], "target": [1.0], "pbe_gap": [1.15]}).to_csv(tmp_path / "candidates.csv", index=False)
    row = {"formula": "KMgF3", "pbe": 1.3, "gllbsc": 2.5}
    monkeypatch.setattr(results, "read_run", lambda *a: {"curve": [row]})
    monkeypatch.setattr(oqmd, "distances", lambda numbers: np.array([[0.01, np.nan]]))
    for _ in range(2):
        found = candidate_files.annotate(tmp_path)
    assert found.on_target.tolist() == [True] and found.a[0] == pytest.approx(4.0) and (found.pbe[0], found.gllbsc[0]) == (1.3, 2.5)
    assert found.oqmd_cubic[0] == 0.01 and np.isnan(found.oqmd_lowest[0])
    assert np.isfinite(found.cgcnn_gap[0]) and list(pd.read_csv(tmp_path / "candidates.csv")) == list(found)


def test_the_exported_table_is_annotated():
    table = pd.read_csv(results.ROOT / "data" / "candidates" / "candidates.csv")
    assert (((table.pbe_gap - table.target).abs() <= 0.2) == table.on_target).all() and table.cgcnn_gap.notna().all()
    known = [min(int(part.split()[1]) for part in row.split(", ")) for row in table.training_cells]
    assert known == table.cells_with_rarest_element.tolist()
