"""Claims of chapters 13-16: which gap answers which row, the paper's values, energies above hull of repaired crystals; their figures."""

import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from meidnet_core import dft, evidence, hull, phonons, plots_physics, relax, repair, results

matplotlib.use("Agg")


def gap(indirect=0.5, direct=0.5, metal=False):
    return {"indirect": indirect, "direct": direct, "overlap": indirect, "metal": metal, "vbm_k": [0, 0, 0], "cbm_k": [0, 0, 0],
            "direct_k": [0, 0, 0]}


def result(**words):
    """A dft result with two bands, a gap of 1 eV around the Fermi level."""
    k = np.linspace(0, 1, 11)
    energies = np.stack([-0.5 - k, 0.5 + k], 1)[None]
    bands = {"energies": energies, "distance": k, "kpoints": np.zeros((11, 3)), "labels": [(0.0, "Γ"), (1.0, "X")]}
    dos = {"energies": np.linspace(-3, 3, 61), "total": np.ones((1, 61))}
    return {"gap": gap(1.0, 1.0), "bands": bands, "dos": dos, "seconds": 1.0, "electrons": 2, **words}


def test_paper_gaps_are_those_of_the_tables():
    before, after = evidence.paper_gaps("before"), evidence.paper_gaps("after")
    assert before["KTaSe3"] == 0 and before["YbScSe3"] == 0.63 and before["CsPbI3"] == 1.48 and len(before) == 19
    assert after["KTaSe3"] == 0.68 and after["YbMnSe3"] == 1.98 and len(after) == 9


def test_gaps_answer_their_rows():
    found = {"KTaSe3": {"gap": gap(0, 0, True)}, "BaHfSe3": {"gap": gap(0.3, 0.7)}, "CsPbI3": {"gap": gap(1.4, 1.4)}}
    claims, metrics = evidence.gap_claims(found, "before", "PBE")
    value = {k: c["value"] for k, c in claims.items()}
    assert value == {"f4.ktase3.gap": 0, "f4.ktase3.metal": 1, "f4.bahfse3.gap": 0.3, "f4.bahfse3.indirect": 1, "ts1.cspbi3.gap_dft": 1.4}
    assert metrics["BaHfSe3_direct"] == 0.7 and metrics["KTaSe3_metal"] == 1
    after, _ = evidence.gap_claims({"KTaSe3": {"gap": gap(0.6, 0.6)}}, "after", "PBE")
    assert {k: c["value"] for k, c in after.items()} == {"ts2.ktase3.gap": 0.6, "f5.ktase3.direct": 1}
    metal = {"TmMnSe3": {"gap": gap(0, 0, True) | {"window": 0.7, "window_at": 1.1}}}        # Table S2 gives a gap off the Fermi level
    assert evidence.gap_claims(metal, "after", "PBE")[0]["ts2.tmmnse3.gap"]["value"] == 0.7
    cubic = {"TmMnSe3": {"gap": gap(0, 0, True)}}                                            # stored before windows were looked for
    assert evidence.gap_claims(cubic, "before", "PBE")[0]["s6.tmmnse3.gap"]["value"] == 0
    assert evidence.compared(metal, "after")["mae_paper"] == pytest.approx(0.09)


def test_targets_against_gaps_say_how_many_materials():
    table = results.read_table_s1()
    found = {f: {"gap": {"indirect": t - 0.5}} for f, t in zip(table.formula, table.target_gap_ev)}
    claims = evidence.target_claims(found, "PBE")
    assert claims["ts1.gap_dft_mae"] == {"value": pytest.approx(0.5), "split": "19 of 19 materials, PBE"}
    assert claims["ts1.below_target"]["value"] == 19
    found.pop("RbTaSe3")
    claims = evidence.target_claims(found, "PBE")
    assert "ts1.below_target" not in claims and claims["ts1.gap_dft_mae"]["split"].startswith("18 of 19")
    assert not evidence.target_claims(dict(list(found.items())[:11]), "PBE")


def test_bands_of_a_polymorph_that_is_no_longer_chosen_are_left_out(tmp_path, monkeypatch):
    name, chosen = next((f, r) for f, r in evidence.polymorphs().items() if len(r["symbols"]) > 5)
    cell, cubic = relax.cell_from(chosen), evidence.dft.cubic_start(name)
    eight = phonons.build(cubic, np.diag([2, 1, 1]), np.zeros((10, 3)), np.array([1, 1, 1, 0, 0, 0]))
    for stored, kept in ((cell, [name]), (eight, [])):
        monkeypatch.setattr(dft, "load", lambda f, profile, cell=stored: {"gap": gap(), "cell": cell})
        assert list(evidence.bands([name], suffix="-polymorph")) == kept
        assert list(evidence.bands([name])) == [name]


def test_difference_from_the_paper():
    found = {"KTaSe3": {"gap": gap(0, 0, True)}, "LaScSe3": {"gap": gap(0.92, 1.0)}}
    both = evidence.compared(found, "before")
    assert both["compared"] == 2 and both["within_0.15"] == 1 and both["mae_paper"] == pytest.approx(0.1)


def test_repaired_crystals_are_placed_on_the_hull(monkeypatch):
    monkeypatch.setattr(hull, "corrections", lambda potential: None)
    monkeypatch.setattr(hull, "e_above_hull", lambda row, c: {"e_above_hull": row["energy_per_atom"] + len(row["symbols"]) / 1000})
    five, ten = ["K", "Ta", "Se", "Se", "Se"], ["K", "K", "Ta", "Ta", *6 * ["Se"]]
    here = evidence.placed({"name": "KTaSe3", "parent_energy": -4.9, "energy_per_atom": -5.0, "symbols": ten})
    assert here == {"before": pytest.approx(-4890), "after": pytest.approx(-4990)}
    assert evidence.hull_symbols("KTaSe3") == five
    assert set(evidence.placed({"name": "KTaSe3", "parent_energy": -4.9})) == {"before"}


def test_stored_repairs_agree_with_themselves():
    for name, r in evidence.polymorphs().items():
        assert r["name"] == name and r["threshold"] == phonons.SOFT
        if r.get("gain") is not None:
            assert r["gain"] == pytest.approx(r["parent_energy"] - r["energy_per_atom"]) and r["gain"] > 0
            assert hull.reduced(r["symbols"]) == hull.reduced(evidence.hull_symbols(name))
            assert (r["status"] == "repaired") == any(p["lattice"] == r["lattice"] and _free(p) for p in r["polymorphs"])
            assert relax.to_atoms((r["lattice"], r["symbols"], r["frac"])).get_all_distances(mic=True)[0, 1:].min() > 1.5


def test_seeds_of_the_search_stand_side_by_side(tmp_path):
    first = evidence.polymorphs()
    for seed, names in ((0, first), (2, first), (5, list(first)[:3])):                      # of the last, six are missing
        for name in names:
            row = first[name] | {"best_gain": first[name]["best_gain"] + 0.001 * seed}
            (tmp_path / f"{name}-sevennet-0-seed{seed}.json").write_text(json.dumps(row))
    found = evidence.searches(folder=tmp_path)
    assert list(found) == [0, 2, 5] and found[0] == first and len(found[5]) == 3
    assert len(repair.search_table({0: first})) == 0 and len(repair.search_table({0: first, 5: found[5]})) == 3
    table = repair.search_table({s: found[s] for s in (0, 2)})
    assert len(table) == 9 and table["lowest: spread (meV/atom)"].tolist() == pytest.approx([2.0] * 9)
    assert (table["space group, seed 0"] == table["space group, seed 2"]).all() and set(table.repaired) == {"2 of 2"}


def _free(p):
    from meidnet_core import repair
    return repair.stable(p)


def test_stored_bands_agree_with_their_gaps():
    for f in dft.FIGURE4:
        r = dft.load(f, "quick")
        if r and r["status"] == "ok" and r["bands"]:
            e, g = r["bands"]["energies"], r["gap"]
            assert e.shape[1] == len(r["bands"]["distance"]) == len(r["bands"]["kpoints"])
            inside = (r["dos"]["energies"] > -0.4 * g["indirect"]) & (r["dos"]["energies"] < 0.4 * g["indirect"])
            assert g["metal"] or g["indirect"] < 0.2 or r["dos"]["total"][:, inside].max() < 0.05 * r["dos"]["total"].max(), f


def test_crowded_points_of_a_path_are_told_apart():
    _, ax = plt.subplots()
    plots_physics._ticks(ax, [(0.0, "Γ"), (1.0, "X|U_2"), (1.05, "Y"), (1.1, "T"), (1.3, "SIGMA_0")])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["Γ", "X|U$_{2}$", "\nY", "\n\nT", "Σ$_{0}$"]


def test_figures_draw_what_they_are_given(tmp_path):
    waves = result()
    few = waves["bands"] | {"energies": waves["bands"]["energies"][..., :2]}
    both = plots_physics.two_bases(waves, waves | {"bands": few, "basis": {"name": "dzp"}}, "c").axes[0]
    assert [t.get_text() for t in both.get_legend().get_texts()] == ["plane waves", "atomic orbitals (dzp)"]
    figure = plots_physics.band_structures({"a": result(), "b": result(gap=gap(0, 0, True)), "c": result()}, {"a": 0.7})
    titles = [ax.get_title() for ax in figure.axes]
    assert any("a: direct gap 1.00 eV" in t for t in titles) and any("b: metal" in t for t in titles)
    rows = [{"formula": "AB", "gap": True, "label_direct": 2.0, "direct": 2.4, "label_indirect": 1.5, "indirect": 1.4}]
    assert "AB" in [t.get_text() for t in plots_physics.gllbsc_parity(rows, {"direct": 0.4, "indirect": 0.1}).axes[0].texts]
    study = {"bands": {"labels": [["Γ", "X"], ["M", "Γ"]], "distances": [[0, 1], [1, 2]], "frequencies": [[[1.0], [-2.0]], [[1.0], [2.0]]]},
             "threshold": -0.1}
    ax = plots_physics.phonon_panel(study, "t")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["Γ", "X|M", "Γ"]


def test_malformed_result_names_its_file(tmp_path):
    (tmp_path / "X-quick.json").write_text('{"name": ')
    with pytest.raises(dft.DFTError, match="X-quick.json"):
        dft.load("X", "quick", tmp_path)


def test_polymorph_that_is_not_there():
    with pytest.raises(dft.DFTError, match="meidnet_core.repair NaClO3"):
        dft.polymorph("NaClO3")


def test_claims_of_a_run_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, "bands", lambda names, profile, suffix="": {"KTaSe3": result(gap=gap(0, 0, True))}
                        if not suffix and profile == "quick" else {})
    written = []
    monkeypatch.setattr(evidence.results, "write_run", lambda *a, **k: written.append((a, k)))
    evidence.write_gaps()
    (name, run), words = written[0]
    assert len(written) == 1 and (name, run) == ("dft-before", "quick") and json.dumps(words["metrics"])
    assert words["claims"]["f4.ktase3.metal"]["value"] == 1 and "GPAW quick" in words["claims"]["f4.ktase3.gap"]["split"]


def test_better_settings_answer_the_claims_that_they_can(monkeypatch):
    """Two materials in `quick`, one of them in `paper` too: each claim is answered once, by the better of the two."""
    found = {"quick": {"KTaSe3": result(gap=gap(0, 0, True)), "BaHfSe3": result(gap=gap(0.2, 0.7))},
             "paper": {"BaHfSe3": result(gap=gap(0.3, 0.8))}}
    monkeypatch.setattr(evidence, "bands", lambda names, profile, suffix="": {} if suffix else found[profile])
    written = {}
    monkeypatch.setattr(evidence.results, "write_run", lambda name, run, **k: written.update({(name, run): k["claims"]}))
    evidence.write_gaps()
    careful, quick = written["dft-before", "paper"], written["dft-before", "quick"]
    assert careful["f4.bahfse3.gap"]["value"] == 0.3 and "GPAW paper (520 eV)" in careful["f4.bahfse3.gap"]["split"]
    assert quick["f4.ktase3.metal"]["value"] == 1 and not careful.keys() & quick.keys()


def test_densities_of_states_are_drawn_before_and_after():
    study = {"dos": {"frequencies": [-1.0, 0.0, 1.0], "density": [0.0, 1.0, 2.0]}, "symbols": ["X"] * 5, "spacegroup": "Pm-3m (221)"}
    figure = plots_physics.phonon_dos({f: (study, study if f == "B" else None, "") for f in "ABCD"})
    assert [len(ax.lines) for ax in figure.axes] == [2, 3, 2, 2, 0, 0]
    plt.close(figure)
