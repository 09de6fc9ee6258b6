"""Both ways to decode (gathered rows, matrix product) against the dense formula, forward and backward."""

import pytest
import torch

from hf_clt.kernels import encode, rows
from hf_clt.kernels.decode import add_decoded, decode_dense
from hf_clt.sparsity import features_at


N, L, F, D = 6, 4, 8, 3
BRANCHES = pytest.mark.parametrize("dense_above", [-1.0, 1.0], ids=["matrix product", "gathered rows"])


@pytest.fixture
def branch(monkeypatch, dense_above):
    monkeypatch.setattr(rows, "DENSE_ABOVE", dense_above)
    return dense_above


def random_features(density=0.4, seed=0, num_tokens=N):
    """Dense activations (N, F) with the given share of non-zero entries, and where they are."""
    generator = torch.Generator().manual_seed(seed)
    support = torch.rand(num_tokens, F, generator=generator) < density
    return torch.randn(num_tokens, F, generator=generator, dtype=torch.float64) * support, support


def random_tensor(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_decode_dense_by_hand():
    acts = torch.tensor([[2.0, 0.0, -1.0]])
    weight = torch.arange(12.0).view(3, 2, 2)
    assert decode_dense(acts, weight).tolist() == [[[0 - 8, 2 - 9], [4 - 10, 6 - 11]]]


@BRANCHES
@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_adds_to_the_reached_targets_alone(branch, first, tied):
    acts, support = random_features()
    num_targets = L - first
    weight = random_tensor(F, 1 if tied else num_targets, D)
    start = random_tensor(N, L, D, seed=2)
    out, _ = add_decoded(start.clone(), features_at(acts, support), weight, slice(first, first + num_targets))
    torch.testing.assert_close(out[:, :first], start[:, :first], rtol=0, atol=0)
    for j in range(num_targets):
        expected = start[:, first + j] + acts @ weight[:, 0 if tied else j]
        torch.testing.assert_close(out[:, first + j], expected)
    written = decode_dense(acts, weight).expand(-1, num_targets, -1)
    torch.testing.assert_close(out[:, first:], start[:, first:] + written)


@BRANCHES
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_by_finite_differences(branch, density, tied):
    acts, support = random_features(density)
    features = features_at(acts, support)
    weight = random_tensor(F, 1 if tied else 2, D).requires_grad_()
    start = random_tensor(N, L, D, seed=2).requires_grad_()
    values = features.values.clone().requires_grad_()

    def function(start, values, weight):
        features.values = values
        return add_decoded(start.clone(), features, weight, slice(1, 3))[0]

    assert values.numel() == support.sum()
    assert torch.autograd.gradcheck(function, (start, values, weight))


@BRANCHES
def test_gradients_match_the_dense_formula_where_some_rows_never_fire(branch):
    acts, support = random_features()
    support[:, 2] = False
    support[3] = False
    acts = acts * support
    weight = random_tensor(F, L, D)
    grad = random_tensor(N, L, D, seed=3)
    leaves = [acts.clone().requires_grad_(), weight.clone().requires_grad_()]
    start = torch.zeros(N, L, D, dtype=torch.float64)
    out, _ = add_decoded(start, features_at(leaves[0], support), leaves[1], slice(0, L))
    found = torch.autograd.grad(out, leaves, grad)
    dense = [acts.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted = torch.autograd.grad(decode_dense(*dense), dense, grad)
    torch.testing.assert_close(found[0], wanted[0] * support)
    torch.testing.assert_close(found[1], wanted[1])
    assert (found[1][2] == 0).all() and found[1][3].any()


@BRANCHES
def test_listed_zeros_receive_gradient(branch):
    """jumprelu lists inactive features inside its window: their values are 0, their gradient is not."""
    acts, support = random_features()
    zeros = torch.zeros_like(acts).requires_grad_()
    weight = random_tensor(F, L, D)
    out, _ = add_decoded(torch.zeros(N, L, D, dtype=torch.float64), features_at(zeros, support), weight, slice(0, L))
    assert (out == 0).all()
    (found,) = torch.autograd.grad(out.sum(), zeros)
    torch.testing.assert_close(found, weight.sum(dim=(1, 2)).expand(N, F) * support)


@BRANCHES
def test_chained_sources_accumulate(branch):
    """Several sources into one reconstruction, as the model calls it; the in-place sum must not disturb autograd."""
    sources = [random_features(seed=s) for s in range(L)]
    weights = [random_tensor(F, L - s, D, seed=10 + s).requires_grad_() for s in range(L)]
    bias = random_tensor(L, D, seed=5).requires_grad_()
    out = bias.expand(N, -1, -1).clone()
    expected = [bias[t].expand(N, -1) for t in range(L)]
    for s, (acts, support) in enumerate(sources):
        out, _ = add_decoded(out, features_at(acts, support), weights[s], slice(s, L))
        for t in range(s, L):
            expected[t] = expected[t] + acts @ weights[s][:, t - s]
    expected = torch.stack(expected, dim=1)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), [bias, *weights])
    wanted = torch.autograd.grad(expected.square().sum(), [bias, *weights])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@BRANCHES
def test_only_what_is_asked_for_gets_a_gradient(branch):
    acts, support = random_features()
    weight = random_tensor(F, L, D).requires_grad_()
    start = torch.zeros(N, L, D, dtype=torch.float64)
    out, _ = add_decoded(start, features_at(acts, support), weight, slice(0, L))
    (found,) = torch.autograd.grad(out.sum(), [weight])
    torch.testing.assert_close(found, acts.sum(0)[:, None, None].expand_as(weight))


@pytest.mark.parametrize("density, dense", [(0.0, False), (0.02, False), (0.2, True)])
def test_the_choice_follows_the_share_of_listed_entries(density, dense):
    acts, support = random_features(density, num_tokens=400)
    assert rows.use_dense(features_at(acts, support).values, 400, F) is dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decoders_add_into_float32(dtype):
    acts, support = random_features(0.02, num_tokens=50)
    assert support.any()
    weight = random_tensor(F, L, D).to(dtype).requires_grad_()
    values = acts.float().requires_grad_()
    start = torch.ones(50, L, D)
    out, _ = add_decoded(start, features_at(values, support), weight, slice(0, L))
    expected = 1 + decode_dense(acts.to(dtype).double(), weight.detach().double())
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(out.sum(), [values, weight])
    assert out.dtype == torch.float32 and [grad.dtype for grad in grads] == [torch.float32, dtype]
    rows = weight.detach().double().sum(dim=(1, 2)).expand(50, F)
    torch.testing.assert_close(grads[0].double(), rows * support, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("fast", [False, True])
def test_the_dense_product_follows_autocast_where_that_is_fast(monkeypatch, fast):
    monkeypatch.setattr(encode, "multiplies_bfloat16", lambda: fast)
    monkeypatch.setattr(rows, "DENSE_ABOVE", -1.0)
    generator = torch.Generator().manual_seed(0)
    acts, weight = torch.rand(8, 16, generator=generator), torch.randn(16, 2, 4, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = add_decoded(torch.zeros(8, 2, 4), features_at(acts, acts > 0.5), weight, slice(0, 2))
    error = (found - decode_dense(torch.where(acts > 0.5, acts, 0), weight)).abs().max()
    assert (error > 1e-4) if fast else (error < 1e-5)
