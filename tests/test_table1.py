"""Table 1 joins run files with published values."""

import math

import pytest

from meidnet_core import table1


def run(experiment, name="seed0", n=10, epochs=None, **metrics):
    dataset = next((d for d in table1.DATASETS if d in f"{experiment}/{name}"), "perov_5")
    config = {"epochs": epochs} if epochs else {}
    return {"experiment": experiment, "run": name, "n": n, "data_set": dataset, "config": config, "metrics": metrics}


def test_mean_and_spread_over_seeds():
    runs = [run("mp_20-flow", f"seed{k}", sm_cdvae=v, rmse_cdvae=0.1, one_flow_sm_cdvae=10.0) for k, v in enumerate((70.0, 74.0))]
    frame = table1.measured(runs).set_index("method")
    assert frame.loc["MEIDNet", "sm"] == 72 and frame.loc["MEIDNet", "seeds"] == 2
    assert frame.loc["MEIDNet", "sm_sd"] == pytest.approx(8**0.5)
    assert frame.loc["MEIDNet, one flow, no memory", "sm"] == 10


def test_perov_5_takes_the_structure_alone_and_tells_the_joint_latent_apart():
    runs = [run("perov_5-flow", sm_cdvae=50.0), run("perov_5-production", sm_cdvae=99.0, sm_cdvae_alone=70.0),
            run("perov_5-structure", sm_cdvae=60.0, sm_cdvae_alone=98.0), run("mp_20-production", sm_cdvae=1.0)]
    frame = table1.measured(runs)
    assert frame[frame.method == "MEIDNet"].sm.tolist() == [98.0]
    assert frame[frame.method.str.contains("production")].sm.tolist() == [70.0, 99.0] and set(frame.dataset) == {"perov_5"}


def test_trivial_runs_are_found_by_name():
    runs = [run("trivial", "mp_20", nearest_shape_sm_cdvae=60.0), run("trivial", "carbon_24", nearest_shape_sm_cdvae=70.0)]
    frame = table1.measured(runs)
    assert frame[frame.sm.notna()].groupby("dataset").sm.first().to_dict() == {"carbon_24": 70.0, "mp_20": 60.0}
    ideal = table1.measured([run("data", "trivial", prototype_sm_cdvae=97.9)])
    assert ideal.dataset.tolist() == ["perov_5"] and ideal.sm.tolist() == [97.9]


def test_published_values_stand_without_a_run_of_ours():
    frame = table1.table([run("mp_20-ftcp", epochs=28, sm_cdvae=40.0, rmse_cdvae=0.2)]).set_index(["dataset", "method"])
    assert frame.loc[("mp_20", "FTCP"), "SM here (%)"] == 40.0 and frame.loc[("mp_20", "FTCP"), "published SM (%)"] == 69.89
    assert math.isnan(frame.loc[("carbon_24", "CDVAE"), "SM here (%)"])
    assert frame.loc[("mp_20", "FTCP"), "epochs"] == 28 and len(frame) >= 9


def test_who_is_first_is_asked_on_every_data_set(monkeypatch):
    ours = {"perov_5-structure": 99.9, "carbon_24-flow": 95.0, "mp_20-flow": 86.0}
    written = {}
    monkeypatch.setattr(table1.results, "write_run", lambda experiment, run, **words: written.update(words))
    for mp_20, first in ((86.0, 1.0), (60.0, 0.0)):
        runs = [run(e, sm_cdvae=v, sm_cdvae_alone=v, epochs=1) for e, v in (ours | {"mp_20-flow": mp_20}).items()]
        monkeypatch.setattr(table1.results, "read_runs", lambda root, runs=runs: runs)
        table1.record()
        assert written["claims"]["t1.first"]["value"] == first == written["metrics"]["mp_20"] and written["metrics"]["perov_5"] == 1.0


def test_the_whole_rule_is_a_run_file_of_every_committed_model(monkeypatch):
    written, rates = {}, [{"sm_cdvae": 86.0, "sm_rule": v, "sm_rule_ceiling": 90.0} for v in (80.0, 78.0)]    # of few cells: not its own
    monkeypatch.setattr(table1, "committed", lambda dataset, count: iter(rates))
    monkeypatch.setattr(table1.data, "load", lambda dataset, split: None)
    cells = [(None, symbols, None) for symbols in [["Sr", "Ti", "O", "O", "O"]] * 91 + [["Na", "Cl", "Cl"]] * 9]
    monkeypatch.setattr(table1.matching, "true_cells", lambda crystals: cells)
    monkeypatch.setattr(table1.results, "write_run", lambda experiment, run, **words: written.update({run: words}))
    table1.record_rule("mp_20")
    m = written["rule-mp_20"]["metrics"]
    assert m == {"sm_cdvae": 86.0, "sm_rule": 79.0, "sm_rule_ceiling": 91.0, "sm_rule_sd": pytest.approx(2**0.5), "models": 2}
    assert written["rule-mp_20"]["n"] == 100 and written["rule-mp_20"]["split"] == "test"
    rates.pop()
    table1.record_rule("carbon_24", 20)
    assert written["rule-carbon_24"]["n"] == written["rule-carbon_24"]["config"]["cells"] == 20
    assert "sm_rule_sd" not in written["rule-carbon_24"]["metrics"]                # one model has no spread


def test_trivial_oracle_and_ceiling_stand_beside_ours(monkeypatch):
    runs = [run("mp_20-flow", f"seed{k}", sm_cdvae=v) for k, v in enumerate((85.0, 87.0))]
    runs += [run("carbon_24-flow", sm_cdvae=95.0), run("perov_5-structure", sm_cdvae_alone=99.9)]
    runs += [run("trivial", "mp_20", random_sites_sm_cdvae=17.0, nearest_shape_sm_cdvae=78.0)]
    rule = run("table1", "rule-mp_20", sm_rule=79.0, sm_rule_ceiling=91.0, models=1)
    monkeypatch.setattr(table1.results, "read_runs", lambda folder: [rule])
    frame = table1.beside(table1.table(runs)).set_index("data set")
    row = frame.loc["MP-20"]
    assert (row["published (%)"], row["here (%)"], row["trivial (%)"], row["best oracle (%)"]) == (72.35, 86.0, 17.0, 78.0)
    assert (row["ceiling (%)"], row["here, whole rule (%)"], row["its ceiling (%)"]) == (100.0, 79.0, 91.0)
    assert math.isnan(frame.loc["Carbon-24", "its ceiling (%)"]) and math.isnan(frame.loc["Carbon-24", "trivial (%)"])


def test_a_data_set_that_is_not_in_the_table_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["table1", "rule", "mp20"])
    with pytest.raises(SystemExit):
        table1.main()
    assert "no data set mp20: choose from perov_5, carbon_24, mp_20" in capsys.readouterr().err
