"""Elements left out of training."""

import numpy as np

from meidnet_core import crystal, data, ions, oqmd, unseen
from meidnet_core.config import EXTENDED
from meidnet_core.model import MEIDNet
from meidnet_core.train import shape_of


def cells(*formulas):
    numbers = np.array([[crystal.atomic_number(e) for e in (a, b, x, x, x)] for a, b, x in formulas], np.int16)
    m = len(numbers)
    return oqmd.cells("x", "all", [str(i) for i in range(m)], numbers, np.full(m, 4.0), np.random.default_rng(0).random((m, 5)))


def test_nothing_with_a_left_out_element_remains():
    every = cells(("Sr", "Ti", "O"), ("Rb", "Mg", "F"), ("K", "Zr", "O"), ("Rb", "Zr", "Br"))
    rest, held = unseen.split_off(every)
    assert [rest.formula(i) for i in range(len(rest))] == ["SrTiO3"]
    assert {e: len(c) for e, c in held.items()} == {"Br": 1, "Rb": 2, "Y": 0, "Zr": 2, "Co": 0}


def test_similar_elements_start_alike_with_descriptors():
    """Before training, an unseen element is described by what it shares: K is nearer to Rb than to O."""
    rows = dict(zip(("O", "K", "Rb", "Zr"), np.array(ions.descriptors(("O", "K", "Rb", "Zr")))))
    apart = lambda a, b: np.linalg.norm(rows[a] - rows[b])
    assert apart("K", "Rb") < 0.5 * min(apart("Rb", "O"), apart("Rb", "Zr"))
    every = cells(("Sr", "Ti", "O"), ("Rb", "Ti", "F"))
    elements = data.vocabulary(every, extra=("K",))
    cfg = EXTENDED.with_(width=16, edge_width=8, latent=16, blocks=1)
    model = MEIDNet(cfg, shape_of(data.to_tensors(every, elements, cfg.labels), elements, cfg, ions.descriptors(elements)))
    vectors = model.encoder.embed.weight().detach()[:len(elements)]
    at = {e: vectors[k] for k, e in enumerate(elements)}
    assert (at["K"] - at["Rb"]).norm() < (at["K"] - at["O"]).norm()
