"""Encoding the selected entries alone against the dense product, forward and backward."""

import pytest
import torch

from hf_clt.kernels import encode, rows
from hf_clt.kernels.encode import encode_dense, encode_layers, pre_activation_sums, pre_activations_at
from hf_clt.sparsity import LayerFeatures, features_at


N, F, D = 7, 12, 5
BRANCHES = pytest.mark.parametrize("dense_above", [-1.0, 1.0], ids=["matrix product", "gathered rows"])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves():
    return [tensor.requires_grad_() for tensor in (randn(N, D), randn(F, D, seed=1), randn(F, seed=2))]


def selected(x, weight, bias):
    h = encode_dense(x, weight, bias).detach()
    support = h > 0.7
    support[2] = False
    support[:, 4] = False
    features = features_at(h, support)
    return pre_activations_at(x[:, None], weight[None], bias[None], features), support


def test_encode_dense_by_hand():
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert encode_dense(x, weight, torch.tensor([0.5, -1.0])).tolist() == [[11.5, 1.0]]


@BRANCHES
def test_equals_the_dense_product_forward_and_backward(monkeypatch, dense_above):
    monkeypatch.setattr(rows, "DENSE_ABOVE", dense_above)
    found = leaves()
    features, support = selected(*found)
    wanted = leaves()
    h = encode_dense(*wanted)
    torch.testing.assert_close(features.to_dense(), h * support)
    loss, expected = features.values.square().sum(), (h * support).square().sum()
    for a, b in zip(torch.autograd.grad(loss, found), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b)


@BRANCHES
def test_gradients_by_finite_differences(monkeypatch, dense_above):
    """The entries are held fixed: where they are is not differentiated."""
    monkeypatch.setattr(rows, "DENSE_ABOVE", dense_above)
    features, _ = selected(*leaves())

    def function(x, weight, bias):
        h = encode_dense(x, weight, bias).detach()
        entries = LayerFeatures(h[features.rows, features.indices], features.indices, features.offsets, F)
        return pre_activations_at(x[:, None], weight[None], bias[None], entries).values

    assert torch.autograd.gradcheck(function, leaves())


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight, bias = leaves()
    features, support = selected(x.detach(), weight, bias.detach())
    (grad,) = torch.autograd.grad(features.values.sum(), [weight])
    torch.testing.assert_close(grad, support.double().T @ x.detach())


@pytest.mark.parametrize("fast", [True, False], ids=["bfloat16 instructions", "none"])
def test_a_rough_product_only_selects(monkeypatch, fast):
    """Under autocast the product is bfloat16, where it pays; the values are those of the weights' own precision."""
    monkeypatch.setattr(encode, "multiplies_bfloat16", lambda: fast)
    x, weight, bias = (tensor.detach().float() for tensor in leaves())
    with torch.autocast("cpu", torch.bfloat16):
        h = encode_dense(x, weight, bias)
        assert h.dtype == (torch.bfloat16 if fast else torch.float32)
        features = features_at(h, h > 0.7)
        features = pre_activations_at(x[:, None], weight[None], bias[None], features)
    exact = encode_dense(x, weight, bias)
    assert features.values.dtype == torch.float32 and features.values.numel() > 5
    torch.testing.assert_close(features.values, exact[features.rows, features.indices], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_layers_together_are_those_one_by_one(autocast):
    """Also where the layers are slices of more, and half precision rounds the inputs, the weights and the biases."""
    x, weight, bias = randn(N, 5, D)[:, 1:4], randn(5, F, D, seed=1)[1:4], 1e-3 + randn(3, F, seed=2)
    if autocast:
        x, weight, bias = (tensor.bfloat16().float() for tensor in (x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = encode_layers(x, weight, bias)
    assert found.dtype == (torch.bfloat16 if autocast else torch.float64)
    exact = torch.stack([encode_dense(x[:, b].double(), weight[b].double(), bias[b].double()) for b in range(3)])
    rounding = 2**-7 if autocast else 1e-12  # of one number; its sum is in float32
    torch.testing.assert_close(found.view(3, N, F).double(), exact, rtol=rounding, atol=rounding / 10)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_sums_of_pre_activations(autocast):
    x, weight, bias = randn(64, 3, D).float(), randn(3, F, D, seed=1).float(), randn(3, F, seed=2).float()
    listed = torch.tensor([0, 3, F, 2 * F + 5])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums = pre_activation_sums(x, weight, bias, listed)
    h = torch.einsum("nbd,bfd->nbf", x.double(), weight.double()) + bias.double()
    exact = h.sum(dim=0).flatten()[listed]
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-4)  # float32 sums of 64 · D terms
