"""The equivariant layer: symmetries in float64, gradients, adjacency."""

import pytest
import torch

from meidnet_core.egnn import EGNN, EGNNLayer, gaussians, mlp

B, N, H, E = 2, 5, 8, 3


def orthogonal(determinant, seed=0):
    """Random orthogonal 3x3 matrix of determinant +1 (rotation) or -1 (rotation and mirror)."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q[:, 0] *= determinant * torch.sign(torch.linalg.det(q))
    return q


def differences(x):
    return x[:, :, None] - x[:, None]


@pytest.fixture
def inputs():
    """h, x, symmetric edge attributes a, symmetric 0/1 adjacency."""
    g = torch.Generator().manual_seed(1)
    h = torch.randn(B, N, H, generator=g, dtype=torch.float64)
    x = torch.randn(B, N, 3, generator=g, dtype=torch.float64) * 2
    a = torch.randn(B, N, N, E, generator=g, dtype=torch.float64)
    upper = torch.triu((torch.rand(B, N, N, generator=g) < 0.7).double(), 1)
    return h, x, a + a.transpose(1, 2), upper + upper.transpose(1, 2)


def build(kind, residual):
    torch.manual_seed(0)
    options = {"edge_width": 6, "edge_attributes": E, "residual": residual, "length": 2.0}
    module = EGNNLayer(H, **options) if kind == "layer" else EGNN(3, H, **options)
    for name, p in module.named_parameters():
        if "phi_x" in name:
            torch.nn.init.normal_(p, std=0.05)  # shifts of order 0.1 to 1: seen, and no blow-up
    return module.double()


CASES = [(kind, residual) for kind in ("layer", "stack") for residual in (False, True)]


@pytest.mark.parametrize("kind, residual", CASES)
@pytest.mark.parametrize("transform", ["rotation", "reflection", "translation", "permutation"])
def test_features_are_invariant_and_shifts_equivariant(kind, residual, transform, inputs):
    module, (h, x, a, weight) = build(kind, residual), inputs
    out, shift = module(h, differences(x), a, weight)
    if transform == "permutation":
        p = torch.tensor([3, 0, 4, 1, 2])
        pairs = a[:, p][:, :, p], weight[:, p][:, :, p]
        new, new_shift = module(h[:, p], differences(x[:, p]), *pairs)
        expected, expected_shift = out[:, p], shift[:, p]
    else:
        q = {"rotation": orthogonal(1), "reflection": orthogonal(-1)}.get(transform)
        q = torch.eye(3, dtype=torch.float64) if q is None else q
        t = torch.tensor([1.7, -40.0, 3.1]) if transform == "translation" else 0.0
        new, new_shift = module(h, differences(x @ q.T + t), a, weight)
        expected, expected_shift = out, shift @ q.T
    deviation = max((new - expected).abs().max(), (new_shift - expected_shift).abs().max()).item()
    print(f"{kind}, residual={residual}, {transform}: max deviation {deviation:.1e}")
    assert 1e-2 < shift.abs().max() < 10, "of the size of the coordinates"
    assert deviation < 1e-10


def test_shifts_are_not_invariant_under_rotation(inputs):
    """Guard against a layer whose shift is trivially zero or constant."""
    module, (h, x, a, weight) = build("layer", False), inputs
    shift = module(h, differences(x), a, weight)[1]
    turned = module(h, differences(x @ orthogonal(1).T), a, weight)[1]
    assert (shift - turned).abs().max() > 1e-2


def test_stack_moves_coordinates_as_explicit_positions_would(inputs):
    module, (h, x, a, weight) = build("stack", True), inputs
    out, total = module(h, differences(x), a, weight)
    position = x
    for layer in module.layers:
        h, shift = layer(h, differences(position), a, weight)
        position = position + shift
    assert torch.allclose(out, h, atol=1e-12)
    assert torch.allclose(total, position - x, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    layer = EGNNLayer(3, edge_width=2, edge_attributes=1, residual=True, length=2.0).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    weight = (1 - torch.eye(3, dtype=torch.float64))[None]
    sizes = [(1, 3, 3), (1, 3, 3, 3), (1, 3, 3, 1)]
    h, r, a = (torch.randn(*s, dtype=torch.float64) for s in sizes)

    def run(h, r, a, *values):
        by_name = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, by_name, (h, r, a, weight))

    leaves = [t.detach().clone().requires_grad_(True) for t in (h, r, a, *parameters)]
    assert torch.autograd.gradcheck(run, leaves)


def test_without_neighbours_there_is_no_message(inputs):
    layer, (h, x, a, weight) = build("layer", False), inputs
    out, shift = layer(h, differences(x), a, torch.zeros_like(weight))
    assert shift.abs().max() == 0
    alone = layer.phi_h(torch.cat([h, torch.zeros(B, N, 6, dtype=h.dtype)], -1))
    assert torch.allclose(out, alone, atol=1e-14)


def test_a_message_travels_only_along_the_adjacency(inputs):
    layer, (h, x, a, _) = build("layer", False), inputs
    weight = torch.zeros(B, N, N, dtype=h.dtype)
    weight[:, 0, 1] = weight[:, 1, 0] = 1
    out, _ = layer(h, differences(x), a, weight)
    changed = h.clone()
    changed[:, 1] += 1
    new, _ = layer(changed, differences(x), a, weight)
    moved = (new - out).abs().amax((0, 2))
    assert moved[0] > 1e-6 and moved[1] > 1e-6
    assert moved[2:].max() == 0


def test_two_equal_sites_move_oppositely():
    layer = build("layer", False)
    h = torch.randn(1, 1, H, dtype=torch.float64).expand(1, 2, H)
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    a = torch.ones(1, 2, 2, E, dtype=torch.float64)
    _, shift = layer(h, differences(x), a, 1 - torch.eye(2, dtype=torch.float64)[None])
    assert shift.abs().max() > 1e-3
    assert torch.allclose(shift[:, 0], -shift[:, 1], atol=1e-12)


def test_factorised_first_layer_equals_one_linear_layer_on_the_concatenation(inputs):
    """Eq. (viii) applies phi_e to [h_i, h_j, d2, a_ij]; the sum of three maps is the same."""
    layer, (h, x, a, weight) = build("layer", False), inputs
    r = differences(x)
    d2 = (r**2).sum(-1, keepdim=True) / 4.0
    pair = torch.cat([h[:, :, None].expand(B, N, N, H), h[:, None].expand(B, N, N, H), d2, a], -1)
    matrix = torch.cat([layer.receiver.weight, layer.sender.weight, layer.edge.weight], 1)
    m = layer.message(pair @ matrix.T + layer.receiver.bias)
    total = (m * weight[..., None]).sum(2)
    out, shift = layer(h, r, a, weight)
    assert torch.allclose(out, layer.phi_h(torch.cat([h, total], -1)), atol=1e-12)
    count = weight.sum(-1, keepdim=True).clamp_min(1)
    expected = (r * layer.phi_x(m) * weight[..., None]).sum(2) / count
    assert torch.allclose(shift, expected, atol=1e-12)


def test_gaussians_peak_at_their_centres_and_tell_distances_apart():
    centres = torch.linspace(0.8, 5.8, 11, dtype=torch.float64)
    basis = gaussians(centres, 11)
    assert torch.allclose(torch.diagonal(basis), torch.ones(11, dtype=torch.float64))
    assert (basis.argmax(-1) == torch.arange(11)).all()
    d = torch.linspace(0.8, 5.8, 200, dtype=torch.float64)
    assert torch.cdist(gaussians(d, 11), gaussians(d, 11)).add(torch.eye(200)).min() > 1e-2


def test_mlp_has_dropout_and_activation_only_between_layers():
    kinds = [type(m).__name__ for m in mlp(2, 3, 4, dropout=0.1)]
    assert kinds == ["Linear", "SiLU", "Dropout", "Linear"]
