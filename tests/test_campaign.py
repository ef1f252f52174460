"""Campaigns: which runs, that they resume and are shared, and the statistics that the figures stand on."""

import json
import math

import numpy as np
import pytest

from meidnet_core import abreast, campaign, checkpoint, experiments, losses, results, seeds, train, trial
from meidnet_core.config import PAPER, PAPER_CLEAN


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results.write_run, "__kwdefaults__", {**results.write_run.__kwdefaults__, "root": tmp_path / "results"})
    monkeypatch.setattr(results, "write_claims", lambda: None)
    known = results.environment()                                      # git and the list of packages: once, not per file
    monkeypatch.setattr(results, "environment", lambda: known)
    return tmp_path / "results"


@pytest.fixture
def small(config, splits, monkeypatch):
    """A sweep of tiny models on synthetic cells."""
    base = config(name="sweep", epochs=3)
    monkeypatch.setattr(campaign, "SWEEP", base)
    monkeypatch.setattr(experiments, "prepare", lambda cfg, *device: splits)
    return base


# ---- tables -------------------------------------------------------------------------------------


def test_tables_hold_what_the_figures_need():
    latent, fusion, curriculum = (campaign.table(n) for n in ("latent", "fusion", "curriculum"))
    assert {e.cfg.latent for e in latent} == {16, 32, 64, 128, 256, 512} and len(latent) == 18
    assert {(e.cfg.fusion, e.cfg.curriculum) for e in fusion} == {("late", "none"), ("early", "none"), ("early", "exp")}
    assert len(fusion) == 15
    ramps = {(e.cfg.curriculum, round(e.cfg.ramp, 2)) for e in curriculum if e.cfg.temperature == 1}
    assert ramps == {("none", 0.67)} | {(kind, r) for kind in ("exp", "linear") for r in (0.33, 0.67, 1.0)}
    for runs in (latent, fusion, curriculum):
        assert len({(e.experiment, e.run) for e in runs}) == len(runs)
        assert [e.cfg.seed for e in runs] == sorted(e.cfg.seed for e in runs)


def test_claim_ids_are_those_of_the_paper_and_belong_to_one_experiment():
    known = set(results.read_reference()["id"])
    owner = {}
    for name in campaign.SEEDS:
        for e in campaign.table(name):
            for claim in e.claims:
                assert claim in known and owner.setdefault(claim, e.experiment) == e.experiment
    assert {"f2a.lf.sm", "f2a.efcl.cs", "s1.dim64.sm", "s1.dim128.sm", "s1.dim256.sm", "s1.loss"} <= set(owner)


def test_a_shortened_protocol_of_the_paper_answers_no_claim():
    short, full = (campaign.table("fusion", PAPER.with_(epochs=n), 1) for n in (6, 200))
    assert not any(e.claims for e in (*short, *full))                                        # until all of its variants are there
    assert {e.experiment for e in short} == {"fusion-paper6-lf", "fusion-paper6-ef", "fusion-paper6-efcl"}
    assert not any(e.claims for e in campaign.table("fusion", campaign.SWEEP.with_(epochs=500), 1))


def test_unknown_campaign_is_named():
    with pytest.raises(ValueError, match="fusoin.*latent, fusion, curriculum"):
        campaign.table("fusoin")


# ---- runs ---------------------------------------------------------------------------------------


def test_a_campaign_is_resumed_and_shares_equal_runs(place, small, capsys):
    assert campaign.campaign("fusion", small, 1, minutes=1e-9, progress=False) in (2, 3)
    campaign.campaign("fusion", small, 1, progress=False)
    files = sorted(place.rglob("*.json"))
    assert [f.parent.name for f in files] == ["fusion-ef", "fusion-efcl", "fusion-first", "fusion-lf"]
    before = {f: f.stat().st_mtime_ns for f in files}
    assert campaign.campaign("fusion", small, 1, progress=False) == 0
    trained = [f for f in files if f.parent.name != "fusion-first"]
    assert all(f.stat().st_mtime_ns == before[f] for f in trained)                     # not trained again
    other = place / "gllbsc" / "a.json"                                                # other chapters keep curves as well
    other.parent.mkdir()
    changes = {"config": {"potential": "p", "epochs": 1}, "curve": {}, "experiment": "gllbsc", "run": "a"}
    other.write_text(json.dumps(json.loads(files[0].read_text()) | changes))
    entry = next(e for e in campaign.table("curriculum", small, 1) if e.experiment == "curriculum-none")
    shared = json.loads(campaign.execute(entry, None).read_text())                     # no data needed: it is there already
    original = json.loads((place / "fusion-ef" / "seed0.json").read_text())
    assert shared["same_run"] == "fusion-ef/seed0" and shared["metrics"] == original["metrics"]
    assert original["claims"]["f2a.ef.cs"]["value"] == original["metrics"]["cosine"] and not shared["claims"]
    assert not list(experiments.RUNS.glob("*"))                                        # states of finished runs are gone


def test_a_training_that_diverged_is_shared_but_gives_way_to_one_that_did_not(place, small):
    first, second, third = (next(e for e in campaign.table(n, small, 1) if e.experiment == x) for n, x in
                            (("fusion", "fusion-ef"), ("curriculum", "curriculum-none"), ("fusion", "fusion-efcl")))
    campaign.write(first, {"diverged": 2, "species": 1.0}, 1.0, curve={})
    shared = json.loads(campaign.execute(second, None).read_text())                    # no data needed
    assert shared["same_run"] == "fusion-ef/seed0" and shared["split"] == "val" and not shared["claims"]
    campaign.write(campaign.replace(third, cfg=first.cfg, claims={}), {"sm_cdvae": 1.0, "n": 8}, 1.0, curve={})
    assert campaign.same_run(first.cfg)["experiment"] == "fusion-efcl"


def test_a_run_of_another_configuration_is_replaced(place, small):
    entry = campaign.table("latent", small, 1)[0]
    m = {"sm_cdvae": 1.0, "n": 8}
    campaign.write(entry, m, 1.0)
    assert entry.done
    other = campaign.Entry(entry.experiment, entry.cfg.with_(lr=0.1), entry.claims)
    assert not other.done and not campaign.table("latent", small, 2)[-1].done


def test_a_killed_training_goes_on(place, small, splits, monkeypatch):
    entry = campaign.table("latent", small.with_(epochs=7), 1)[0]
    whole = campaign.execute(entry, splits, progress=False).read_text()
    entry.path.unlink()
    original, calls = trial.proxies, []

    def killed(model, tensors):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(model, tensors)

    monkeypatch.setattr(trial, "proxies", killed)
    with pytest.raises(KeyboardInterrupt):
        campaign.execute(entry, splits, progress=False)
    monkeypatch.setattr(trial, "proxies", original)
    again = json.loads(campaign.execute(entry, splits, progress=False).read_text())
    whole = json.loads(whole)
    drop = lambda r: {k: v for k, v in r["curve"].items() if k != "seconds"} | r["metrics"]
    assert drop(again) == drop(whole) and len(again["curve"]["val_exact"]) == 7


def test_runs_packed_for_a_gpu_are_scored_here(place, small, splits, monkeypatch):
    """Equal configurations go once; the states that come back are not trained again, and the run file names the device of the state."""
    base = small.with_(epochs=2, temperature=0.07)                     # cold-none is none, which has two seeds more than were asked for
    packed = experiments.RUNS / "curriculum.safetensors"
    names = campaign.pack(packed, "curriculum", base, 1, ["none", "exp67", "cold-none"])
    assert len(names) == len(set(names)) == 6
    runs, tensors, val, elements = abreast.unpack(packed, "cpu")
    for group in abreast.groups(runs, experiments.RUNS):
        abreast.train(list(group.values()), tensors, elements, val, experiments.RUNS, list(group), progress=False)
    entry = next(e for e in campaign.table("curriculum", base, 1) if e.variant == "exp67")
    assert entry.state.name in names
    monkeypatch.setattr(train, "train_epoch", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(checkpoint, "device_of", lambda path: "a GPU" if path == entry.state else "cpu")
    run = json.loads(campaign.execute(entry, splits, progress=False).read_text())
    assert run["device"] == "a GPU" and len(run["curve"]["val_exact"]) == 2 and run["n"] == 8
    assert entry.done and not entry.state.exists()
    assert len(campaign.pack(packed, "curriculum", base, 1, ["none", "exp67", "cold-none"])) == 5, "what was run is left out"
    with pytest.raises(ValueError, match="has no variant cold"):
        campaign.pack(packed, "curriculum", base, 1, ["cold"])


def test_a_training_that_diverges_is_a_row_and_is_not_compared(place, small, splits, monkeypatch):
    """The fourth loss is NaN: three epochs are kept, no claim is answered, the campaign goes on with the other runs."""
    original, calls = losses.total_loss, []

    def broken(model, batch, alpha):
        calls.append(1)
        loss, terms = original(model, batch, alpha)
        late = model.cfg.fusion == "late" and len(calls) > 3 * batches
        return (loss * math.nan, terms | {"loss": terms["loss"] * math.nan}) if late else (loss, terms)

    batches = -(-24 // small.batch)
    monkeypatch.setattr(train.train, "__defaults__", tuple(broken if d is original else d for d in train.train.__defaults__))
    base = small.with_(epochs=5)
    entry = next(e for e in campaign.table("fusion", base, 1) if e.cfg.fusion == "late")
    run = json.loads(campaign.execute(entry, splits, progress=False).read_text())
    assert run["metrics"]["diverged"] == 3 == len(run["curve"]["val_exact"]) and run["claims"] == {} and entry.done
    assert [r["seed"] for r in campaign.diverged("fusion")] == [0] and not campaign.diverged("latent")
    with pytest.raises(ValueError, match="no runs of lf, ef, efcl"):
        campaign.stored("fusion", base)
    with pytest.raises(ValueError, match=f"campaign fusion --preset {base.name} --epochs 5$"):       # what would help, not the small sweep
        campaign.stored("fusion", base)


# ---- what the campaigns answer ------------------------------------------------------------------


def test_a_full_campaign_takes_the_claims_over_once_every_variant_is_finite(place, small, capsys):
    campaign.campaign("fusion", small, 1, progress=False)
    swept, long = json.loads((place / "fusion-lf" / "seed0.json").read_text()), PAPER.with_(epochs=200)
    assert swept["claims"]
    lf, ef, efcl = campaign.table("fusion", long, 1)
    for entry in (lf, ef):
        campaign.write(entry, swept["metrics"] | {"cosine": 0.25}, 1.0, curve=swept["curve"])
    results.write_run(efcl.experiment, efcl.run, config=efcl.cfg.to_dict(), seed=0, data_set="perov_5", split="val", n=8, claims={},
                      metrics={"diverged": 64}, wall_time_s=1.0, curve=swept["curve"])
    campaign.summarise("fusion", long)
    assert "no finite run of paper200-efcl" in capsys.readouterr().out
    assert list(campaign.stored("fusion", long, partial=True)) == ["lf", "ef"] and len(campaign.diverged("fusion")) == 1
    assert {r["experiment"] for r in results.read_runs(place) if r["claims"]} == {"fusion-lf", "fusion-ef", "fusion-efcl", "fusion-first"}
    campaign.write(efcl, swept["metrics"], 1.0, curve=swept["curve"])
    campaign.summarise("fusion", long)
    runs = {r["experiment"]: r for r in results.read_runs(place)}
    assert not runs["fusion-lf"]["claims"] and runs["fusion-paper200-lf"]["claims"]["f2a.lf.cs"]["value"] == 0.25
    assert runs["fusion-paper200-first"]["claims"] and not runs["fusion-first"]["claims"]


def test_the_other_reading_of_the_paper_answers_where_the_first_diverged(place, small):
    for base in (PAPER.with_(epochs=200), PAPER_CLEAN.with_(epochs=200)):
        for e in campaign.table("fusion", base, 1):
            m = {"sm_cdvae": 1.0, "exact_composition": 1.0, "cosine": 0.5, "l2d": 1.0, "joint_r2": 0.9, "n": 8}
            campaign.write(e, {"diverged": 3} if base.gumbel_noise and e.variant == "efcl" else m, 1.0, curve={})
    assert campaign.answering("fusion") == PAPER_CLEAN.with_(epochs=200)


def test_improved_at_its_full_length_answers_before_the_sweep_and_the_paper_before_both(place, small, monkeypatch):
    monkeypatch.setattr(campaign, "IMPROVED", small.with_(name="improved", epochs=3))
    curve, m = {"val_exact": [1.0, 60.0]}, {"sm_cdvae": 90.0, "exact_composition": 90.0, "reconstruction": 1.0, "n": 8}
    assert campaign.answering("latent") == small
    for base, dims in ((small, campaign.DIMENSIONS), (campaign.IMPROVED, (64, 128)), (campaign.IMPROVED, (256,)),
                       (PAPER.with_(epochs=500), campaign.PAPER_DIMENSIONS)):
        for e in campaign.table("latent", base, 2):
            if e.cfg.latent in dims:
                campaign.write(e, m | {"sm_cdvae": m["sm_cdvae"] + base.epochs}, 1.0, curve=curve)
        campaign.summarise("latent", base)
        answers = {r["experiment"] for r in results.read_runs(place) if "s1.dim64.sm" in r["claims"] or "s1.best_dim" in r["claims"]}
        top = campaign.tag_of("latent", campaign.answering("latent"))
        assert answers == {f"latent-{top}64", f"latent-{top}best"}
    assert top == "paper500-"


def test_improved_keeps_rows_of_its_own_beside_those_of_the_paper(place, small, monkeypatch):
    monkeypatch.setattr(campaign, "IMPROVED", small.with_(name="improved", epochs=3))
    m = {"sm_cdvae": 90.0, "exact_composition": 90.0, "cosine": 0.5, "l2d": 1.0, "joint_r2": 0.9, "n": 8}
    ids = {f"f2a.{v}.{k}" for v in campaign.FUSIONS for k in ("cs", "l2d", "sm", "r2")}
    beside = {f"x.{i}" for i in ids if not i.endswith("r2")}
    told = lambda base: {c for r in results.read_runs(place) if f"-{base.name}{base.epochs}-" in r["experiment"] for c in r["claims"]}
    for base, others in ((campaign.IMPROVED, beside | ids), (PAPER.with_(epochs=200), beside)):
        for e in campaign.table("fusion", base, 2):
            campaign.write(e, m, 1.0, curve={"val_exact": [1.0]})
        campaign.summarise("fusion", base)
        assert told(campaign.IMPROVED) - {"f2a.efcl_first"} == others
    assert told(base) == ids | {"f2a.efcl_first"}


def test_a_curriculum_that_never_reaches_the_level_answers_nothing(place, small, monkeypatch):
    monkeypatch.setattr(campaign, "IMPROVED", small.with_(name="improved", epochs=3))
    for base, rise in ((campaign.IMPROVED, [1.0, 60.0]), (PAPER.with_(epochs=200), [1.0, 4.0])):
        for e in campaign.table("curriculum", base, 2):
            if e.variant in campaign.NEEDED["curriculum"]:
                campaign.write(e, {"sm_cdvae": 90.0, "n": 8}, 1.0, curve={"val_exact": rise})
        assert campaign.answering("curriculum") == campaign.IMPROVED


def test_readings_change_the_early_fusion_of_the_paper_one_by_one():
    base = PAPER_CLEAN.with_(epochs=20)
    rows = {e.variant: e for e in campaign.table("reading", base)}
    assert len(rows) == 9 and not any(e.claims for e in rows.values())
    for name, e in rows.items():
        differing = {k for k, v in e.cfg.to_dict().items() if v != base.with_(curriculum="none").to_dict()[k]}
        assert differing == set(campaign.READINGS[name]) and (len(differing) == 1) == (name not in ("together", "code"))


def test_a_campaign_of_some_variants_runs_these(place, small):
    assert campaign.campaign("fusion", small, 1, progress=False, variants=["ef"]) == 0
    assert {r["experiment"] for r in results.read_runs(place)} == {"fusion-ef"}
    with pytest.raises(ValueError, match="campaign fusion has no variant le"):
        campaign.campaign("fusion", small, 1, progress=False, variants=["le"])


def test_a_stored_run_is_repeated_whatever_the_seed(place, small, splits):
    assert campaign.campaign("fusion", small, 1, progress=False, variants=["efcl"]) == 0
    for seed in (0, campaign.SEEDS["fusion"]):                         # the second goes round to the first
        again, before = campaign.repeated("fusion", "efcl", seed, splits)
        assert again == pytest.approx(before, abs=1e-3)


def test_summaries_answer_the_comparing_claims(place, small):
    for name in ("latent", "curriculum"):
        for e in campaign.table(name, small, 2):
            rng = np.random.default_rng(e.cfg.seed + e.cfg.latent)
            sm = float(80 + (e.cfg.latent == 128) * 9 + rng.random() / 20)
            m = {"sm_cdvae": sm, "exact_composition": sm, "reconstruction": 1.0, "n": 8}
            rise = [2.0, 60.0, 95.0, 99.0] if e.cfg.curriculum != "none" else [1.0, 30.0, 80.0, 99.0]
            campaign.write(e, m, 1.0, curve={"val_exact": rise})
        campaign.summarise(name, small)
    best = json.loads((place / "latent-best" / "summary.json").read_text())
    assert best["claims"]["s1.best_dim"]["value"] == 128 and best["metrics"]["significant_all"] == 1
    fast = json.loads((place / "curriculum-speedup" / "seed0.json").read_text())
    assert fast["claims"]["f2b.speedup"]["value"] == pytest.approx((2 + 2 / 50) / (1 + 30 / 58))        # epochs to 32 %
    assert fast["claims"]["f2b.gain"]["value"] == pytest.approx(60 / 30)                                # the first epoch has under 2 %
    assert list(campaign.stored("latent", small)) == [str(d) for d in campaign.DIMENSIONS]
    assert "±" in seeds.overview(campaign.stored("latent", small), {"sm_cdvae": "SM"}).loc["128", "SM"]
