"""Candidates: filters, enumeration against known formulas, methods that keep their promises, an honest empty answer."""

import numpy as np
import pytest
import torch

from meidnet_core import answer, candidates, crystal, data, design, ions, oqmd
from meidnet_core.answer import NothingFound
from meidnet_core.candidates import Designer
from meidnet_core.config import EXTENDED, EXTENDED_OWN
from meidnet_core.model import MEIDNet
from meidnet_core.train import shape_of

ELEMENTS = ("Li", "O", "F", "Na", "Mg", "S", "Cl", "K", "Ca", "Ti", "Rb", "Sr", "Zr", "Sn", "Cs", "Ba", "Pb")


def numbers_of(*formulas):
    return np.array([[crystal.atomic_number(e) for e in (a, b, x, x, x)] for a, b, x in formulas], np.int16)


@pytest.fixture(scope="module")
def train():
    numbers = numbers_of(("Sr", "Ti", "O"), ("Ba", "Ti", "O"), ("K", "Mg", "F"), ("Cs", "Pb", "Cl"), ("Ba", "Zr", "S"), ("Na", "Mg", "F"),
                         ("Li", "Sn", "Cl"), ("Rb", "Ca", "F"))
    labels = np.random.default_rng(0).random((len(numbers), 5))
    return oqmd.cells("extended", "train", [str(i) for i in range(len(numbers))], numbers, np.linspace(3.9, 5.5, len(numbers)), labels)


@pytest.fixture(scope="module")
def tool(train):
    torch.manual_seed(0)
    cfg = EXTENDED.with_(width=16, edge_width=8, latent=16, blocks=1)
    tensors = data.to_tensors(train, ELEMENTS, cfg.labels)
    models = [MEIDNet(cfg, shape_of(tensors, ELEMENTS, cfg, ions.descriptors(ELEMENTS))).eval() for _ in range(2)]
    return Designer(models, train, symmetrize=True)


def formulas(proposal):
    return [proposal.crystals.formula(i) for i in range(len(proposal.crystals))]


# ---- filters and enumeration --------------------------------------------------------------------

def test_sites_take_cations_and_anions():
    sites = candidates.sites_of(ELEMENTS)
    at = lambda k: {e for e, ok in zip(ELEMENTS, sites[k]) if ok}
    assert at(2) == at(4) == {"O", "F", "S", "Cl"} and not at(0) & at(2) and {"Sr", "Ti"} <= at(1)
    without = candidates.sites_of(ELEMENTS, exclude=candidates.TOXIC + ("Cl",))
    assert not without[0, ELEMENTS.index("Pb")] and not without[2, ELEMENTS.index("Cl")]
    only = candidates.sites_of(ELEMENTS, include=("K", "Mg", "F"))
    assert only.sum(1).tolist() == [2, 2, 1, 1, 1]


def test_impossible_filters_are_told():
    with pytest.raises(ValueError, match="unknown element Xx"):
        candidates.sites_of(ELEMENTS, exclude=("Xx",))
    with pytest.raises(ValueError, match="leave 1 elements for A and B and 0 for X"):
        candidates.sites_of(ELEMENTS, include=("K",))


@pytest.mark.parametrize("formula, neutral, window", [(("Sr", "Ti", "O"), True, True), (("K", "Mg", "F"), True, True),
                                                      (("Cs", "Sn", "Cl"), True, True), (("Na", "Ti", "O"), False, False),
                                                      (("K", "Mg", "O"), False, False), (("Mg", "Ba", "F"), False, False),
                                                      (("Mg", "Sn", "S"), True, False)])
def test_known_formulas(formula, neutral, window):
    cells = candidates.ideal(numbers_of(formula), lambda n: np.full(len(n), 4.5))
    assert candidates.obeyed(cells.numbers, cells.lattice, cells.frac, window=False)[0] == neutral
    assert candidates.obeyed(cells.numbers, cells.lattice, cells.frac)[0] == window


def test_enumeration_is_complete_and_pools_hold_what_is_new(tool):
    everything = candidates.enumerate_abx3(ELEMENTS, tool.sites)
    assert len(everything) == 13 * 12 * 4 and len(np.unique(everything, axis=0)) == len(everything)
    inside, neutral = tool.pool(True), tool.pool(False)
    assert set(formulas(inside)) < set(formulas(neutral)) and len(inside.mean) == len(inside.crystals)
    keys = candidates.seen(tool.train)
    assert not any(data.composition_key(z) in keys for z in neutral.crystals.numbers), "training compositions are not proposed"
    assert "CaTiO3" in formulas(inside) and "SrTiO3" not in formulas(inside) and "TiSrO3" not in formulas(neutral)


def test_known_compositions_are_proposed_when_that_is_wanted(tool, train):
    every = Designer(tool.models, train, novel=False).pool(True)
    assert {"SrTiO3", "KMgF3"} <= set(formulas(every)) and set(formulas(tool.pool(True))) < set(formulas(every))


def test_lattice_constants_add_up(train):
    estimate = candidates.CubicConstant(train, ridge=1e-3)
    assert np.abs(estimate(train.numbers) - train.lattice[:, 0]).max() < 0.05


# ---- proposals ----------------------------------------------------------------------------------

@pytest.mark.parametrize("method", candidates.METHODS)
def test_every_method_proposes_new_neutral_distinct_cells(tool, method):
    target = {"dir_gap": 1.0, "heat_all": 0.0} if method in ("paper", "gap") else {"pbe_gap": 1.0}
    p = tool.propose(method, target, 6, starts=32, steps=4)
    keys = [data.composition_key(z) for z in p.crystals.numbers]
    assert len(set(keys)) == len(keys) <= 6 and not set(keys) & tool.known
    cells = p.crystals
    assert candidates.obeyed(cells.numbers, cells.lattice, cells.frac, window=method != "random").all()
    assert p.mean.shape == p.spread.shape == (len(keys), 5) and np.isfinite(p.mean).all()
    assert np.isnan(p.confidence).all() == (method in ("screening", "ensemble", "window", "random")) or not len(keys)


def test_what_was_proposed_is_not_proposed_again(tool):
    first = tool.propose("window", {"pbe_gap": 1.0}, 5)
    taken = candidates.seen(first.crystals)
    again = tool.propose("window", {"pbe_gap": 1.0}, 50, avoid=taken)
    assert not candidates.seen(again.crystals) & taken


def test_seeds_repeat_and_differ(tool):
    a, b, c = (formulas(tool.propose("random", {"pbe_gap": 1.0}, 8, seed=s)) for s in (0, 0, 1))
    assert a == b != c


def test_ranking_prefers_stable_and_on_target(tool):
    pool = tool.pool(True)
    i, g = tool.labels.index("stability"), tool.labels.index("pbe_gap")
    mean = np.zeros_like(pool.mean)
    mean[:, i], mean[:, g] = np.linspace(0, 1, len(mean)), 1.0
    fake = candidates.Proposal(pool.crystals, mean, np.zeros_like(mean), pool.confidence)
    assert formulas(tool.ranked(fake, {"pbe_gap": 1.0}, 3))[0] == formulas(pool)[0]
    mean[0, g] = 30.0                                                # far off the target: no longer first
    assert formulas(tool.ranked(fake, {"pbe_gap": 1.0}, 3))[0] == formulas(pool)[1]


def test_a_model_that_learnt_own_cells_ranks_by_their_label(tool, train):
    cells = oqmd.widened(train, (*oqmd.LABELS, *oqmd.OWN_LABEL))
    cells.labels[:, -1] = np.linspace(0, 1, len(cells))
    cfg = EXTENDED_OWN.with_(width=16, edge_width=8, latent=16, blocks=1)
    tensors = data.to_tensors(cells, ELEMENTS, cfg.labels)
    own = Designer([MEIDNet(cfg, shape_of(tensors, ELEMENTS, cfg, ions.descriptors(ELEMENTS))).eval()], cells, symmetrize=True)
    assert (tool.stability, own.stability) == ("stability", "own_stability")
    pool = own.pool(True)
    mean = np.zeros_like(pool.mean)
    mean[:, own.labels.index("stability")] = np.linspace(0, 1, len(mean))
    mean[:, own.labels.index("own_stability")] = np.linspace(1, 0, len(mean))
    fake = candidates.Proposal(pool.crystals, mean, np.zeros_like(mean), pool.confidence)
    assert formulas(own.ranked(fake, {}, 3))[0] == formulas(pool)[-1]
    assert own.search("ours", {"pbe_gap": 1.0}, starts=32, steps=4).mean.shape[1] == len(own.labels)       # it moves latents, too


def test_a_lesson_learns_the_elements_that_were_wrong():
    rng = np.random.default_rng(0)
    z = np.array([[a, b, x, x, x] for a in (19, 37, 55) for b in (12, 20, 22, 40) for x in (8, 9, 17)], np.int16)
    wrong = 0.4 * (z[:, 1] == 22) - 0.2 * (z[:, 2] == 9)             # Ti on B too stable as predicted, fluorides not enough
    chosen = rng.permutation(len(z))[:20]
    lesson = candidates.Lesson(z[chosen], wrong[chosen] + 0.01 * rng.normal(size=20))
    others = np.setdiff1d(np.arange(len(z)), chosen)
    assert np.abs(lesson(z[others]) - wrong[others]).mean() < 0.03
    noise = candidates.Lesson(z[chosen], rng.normal(size=20))
    assert noise.ridge > lesson.ridge and lesson.ridge == min(candidates.Lesson.RIDGES)


def test_a_lesson_changes_the_ranking(tool):
    pool = tool.pool(True)
    worse = lambda z: 10.0 * (z[:, 2] == crystal.atomic_number("O"))
    got = tool.ranked(pool, {"pbe_gap": 1.0}, 10, worse)
    assert not (got.crystals.numbers == crystal.atomic_number("O")).any()


def test_decoded_geometry_or_the_ideal_cube(tool, train):
    z = tool.moved({"pbe_gap": 1.0}, 64, 4)
    free = Designer(tool.models, train)
    a, b = free.decoded(z), tool.decoded(z)
    assert (b.crystals.frac == crystal.PEROVSKITE).all() and (b.crystals.lattice[:, :1] == b.crystals.lattice[:, :3]).all()
    assert len(a.mean) == 0 or not (a.crystals.frac == crystal.PEROVSKITE).all()


def test_the_cube_has_the_mean_of_the_decoded_edges(tool, train, monkeypatch):
    edges = np.array([4.0, 5.0, 6.3, 90, 90, 90])
    monkeypatch.setattr(design, "geometry", lambda model, cells: (np.tile(edges, (len(cells), 1)), cells.frac))
    cells = tool.decoded(tool.moved({"pbe_gap": 1.0}, 64, 4)).crystals
    assert len(cells) and cells.lattice[:, 0] == pytest.approx(edges[:3].mean())


def test_a_model_without_a_stability_is_refused(tool, train):
    cfg = EXTENDED.with_(width=16, edge_width=8, latent=16, blocks=1, labels=("dir_gap", "heat_all"))
    tensors = data.to_tensors(train, ELEMENTS, cfg.labels)
    model = MEIDNet(cfg, shape_of(tensors, ELEMENTS, cfg, ions.descriptors(ELEMENTS))).eval()
    with pytest.raises(ValueError, match="labels dir_gap, heat_all; a Designer ranks by one of own_stability, stability"):
        Designer([model], train)


def test_bad_requests(tool):
    with pytest.raises(ValueError, match="method 'magic': expected one of ours"):
        tool.propose("magic", {"pbe_gap": 1.0}, 3)
    with pytest.raises(ValueError, match="target hardness: the model knows dir_gap"):
        tool.propose("ours", {"hardness": 1.0}, 3, starts=8, steps=4)


# ---- what a user asks ---------------------------------------------------------------------------

@pytest.mark.parametrize("target, told", [({"pbe_gap": 500.0}, r"within 0.1 eV of .*500.* by \d+.\d\d eV \(pbe_gap\)"),
                                          ({"delta_e": -50.0}, r"within 0.1 eV/atom of .*-50.* by \d+.\d\d eV/atom \(delta_e\)"),
                                          ({"stability": -9.0}, r"within 0.1 eV/atom of .*-9.* eV/atom \(stability\)")])
def test_an_impossible_target_gets_an_honest_empty_answer(tool, target, told):
    with pytest.raises(NothingFound, match=f"no crystal {told}") as error:
        answer.on_target(tool, target, 5, starts=32, steps=4)
    nearest = error.value.nearest
    assert 0 < len(nearest.mean) <= 5
    (label, value), = target.items()
    assert (np.diff(np.abs(nearest.column(label) - value)) >= 0).all(), "the nearest come first"


def read_as(tool, monkeypatch, **labels):
    """Whatever is searched, the pool of the tool is found, and its labels read as given: {label: (M,) or number}, the others 0."""
    pool = tool.pool(True)
    mean = np.zeros_like(pool.mean)
    for label, value in labels.items():
        mean[:, tool.labels.index(label)] = value
    found = candidates.Proposal(pool.crystals, mean, np.zeros_like(mean), pool.confidence)
    monkeypatch.setattr(tool, "search", lambda *a, **k: found)
    return found


def test_an_impossible_enthalpy_is_no_answer_whatever_the_gap(tool, monkeypatch):
    read_as(tool, monkeypatch, pbe_gap=1.2, heat_all=-0.5)
    with pytest.raises(NothingFound, match=r"0.1 eV and 0.1 eV/atom of .* misses by 0.00 eV \(pbe_gap\) and 8.50 eV/atom \(heat_all\)"):
        answer.on_target(tool, {"pbe_gap": 1.2, "heat_all": -9.0}, 5)


def test_a_possible_enthalpy_is_met_by_all_that_is_returned(tool, monkeypatch):
    spread = np.linspace(-1.0, 1.0, len(tool.pool(True).mean))
    found = read_as(tool, monkeypatch, pbe_gap=1.2, heat_all=spread)
    met = int((np.abs(spread + 0.5) <= candidates.ENERGY_TOLERANCE).sum())
    got = answer.on_target(tool, {"pbe_gap": 1.25, "heat_all": -0.5}, 500)
    assert 0 < len(got.mean) <= met < len(found.mean) and tool.within(got, {"pbe_gap": 1.25, "heat_all": -0.5}).all()
    assert (np.abs(got.column("heat_all") + 0.5) <= candidates.ENERGY_TOLERANCE).all()
    table = answer.report(tool, got, {"pbe_gap": 1.25, "heat_all": -0.5})
    assert table.sure.all() and {"pbe_gap spread", "heat_all spread"} <= set(table)
    assert not answer.report(tool, found, {"heat_all": -50.0}).sure.any(), "what is shown as the nearest is not sure"
    page = list(answer.brief(table.assign(e_above_hull=0.1), {"pbe_gap": 1.25}))
    assert page[:5] == ["formula", "pbe_gap (predicted)", "pbe_gap spread", "sure", "e_above_hull"] and "dir_gap (predicted)" not in page
    assert set(answer.brief(table, {"pbe_gap": 1.25})) <= set(table)          # nothing was relaxed: such columns are not there


def test_a_wanted_stability_is_a_bound_and_is_kept(tool, monkeypatch):
    asked = []
    monkeypatch.setattr(tool, "moved", lambda target, *a: asked.append(target) or torch.zeros(1, 16))
    for target in ({"pbe_gap": 1.0}, {"pbe_gap": 1.0, "stability": -0.2}):
        tool.search("ours", target)
    assert [t["stability"] for t in asked] == [0.0, -0.2]
    found = read_as(tool, monkeypatch, stability=np.linspace(-1, 1, len(tool.pool(True).mean)))
    read = found.column("stability")
    assert tool.within(found, {"stability": 0.3}).tolist() == (read <= 0.3 + candidates.ENERGY_TOLERANCE).tolist()


def test_rankings_go_by_gaps_alone(tool):
    pool = tool.pool(True)
    plain, more = ({"pbe_gap": 1.0} | extra for extra in ({}, {"heat_all": -9.0, "stability": -9.0}))
    assert (tool.missed(pool, plain) == tool.missed(pool, more)).all() and (tool.missed(pool, {"heat_all": -9.0}) == 0).all()
    assert formulas(tool.ranked(pool, plain, 9)) == formulas(tool.ranked(pool, more, 9))


# ---- latents ------------------------------------------------------------------------------------

def test_descent_lowers_what_it_is_asked(tool):
    model = tool.models[0]
    goal = design.standard(model, {"pbe_gap": 0.7, "stability": 0.2})
    loss = design.objective(model, goal, sites=tool.sites, below=("stability",))
    start = design.starts(model, tool.latents(model), goal, 24)
    end, _ = design.descend(loss, start, 40, 0.05)
    assert (loss(end, start) < 0.95 * loss(start, start)).all()
    assert torch.allclose(end.norm(dim=1), start.norm(dim=1), atol=1e-5) and end.isfinite().all()


def test_only_an_excess_of_a_bounded_label_counts():
    predicted, goal = torch.tensor([[0.0, -1.0], [0.0, 1.0]]), torch.tensor([0.0, 0.0])
    assert design.miss(predicted, goal, torch.tensor([False, True])).tolist() == [0.0, 0.5]
    assert design.miss(predicted, goal * torch.nan, torch.tensor([False, True])).tolist() == [0.0, 0.0], "nothing is asked"


def test_the_soft_crystal_equals_the_hard_one_when_it_is_sure(tool):
    """Re-encoding probabilities that are 0 or 1 is encoding the crystal."""
    model, cells = tool.models[0], tool.train
    batch = design.unlabelled(model, cells)
    p = torch.nn.functional.one_hot(batch["species"], len(ELEMENTS)).float()
    soft = design.reencode(model, p, batch["lattice"], batch["frac"])
    z_c, y_c = model.embed_structure(batch)
    assert torch.allclose(soft, model.properties_alone(y_c, z_c), atol=1e-5)


def test_three_x_sites_share_their_element(tool):
    species, confidence = design.decode(tool.models[0], torch.randn(10, 16), tool.sites, draws=4, temperature=5.0)
    assert species.shape == (40, 5) and (species[:, 2:] == species[:, 2:3]).all() and ((confidence >= 0) & (confidence <= 1)).all()
    assert all(tool.sites[k, s] for row in species for k, s in enumerate(row))


def test_a_report_says_what_is_known_before_relaxation(tool, train):
    found = tool.propose("ours", {"pbe_gap": 1.0}, 4, starts=64, steps=4)
    table, seen = answer.report(tool, found, {"pbe_gap": 1.0}), candidates.counts(train)
    assert table.formula.tolist() == formulas(found) and {f"{l} (predicted)" for l in tool.labels} <= set(table)
    assert (table["off sites (Å)"] == 0).all()                                               # symmetrised
    assert table["a (Å)"].to_numpy() == pytest.approx(found.crystals.lattice[:, 0], abs=1e-3)
    first = [crystal.symbol(z) for z in found.crystals.numbers[0][:3]]
    assert table["training cells"][0] == ", ".join(f"{e} {seen.get(e, 0)}" for e in first)


def test_each_term_of_the_design_can_be_switched_off(tool):
    used, plain = [], design.objective
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(design, "objective", lambda m, goal, weights, *a, **k: used.append(weights) or plain(m, goal, weights, *a, **k))
        tool.propose("ours", {"pbe_gap": 1.0}, 2, starts=8, steps=4, weights=design.Weights(tolerance=0.0))
        tool.propose("ours", {"pbe_gap": 1.0}, 2, starts=8, steps=4)
    assert [w.tolerance for w in used] == [0.0, 1.0]
