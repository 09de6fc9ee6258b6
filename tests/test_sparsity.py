"""The activation functions' supports, the sparse form of activations, and the exact selection."""

import pytest
import torch

from hf_clt.sparsity import (
    JumpReLU,
    LayerFeatures,
    SparseFeatures,
    batchtopk_support,
    features_at,
    largest,
    sparse_from_dense,
    topk_support,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- the sparse form --------------------------------------------------------------------------------------------------


def test_features_at_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    support = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    features = features_at(values, support)
    assert features.values.tolist() == [1, 3, 8]
    assert features.indices.tolist() == [0, 2, 1]
    assert features.offsets.tolist() == [0, 2, 2, 3]
    assert features.tokens.tolist() == [0, 0, 2]
    assert features.num_tokens == 3 and features.num_features == 3
    assert features.to_dense().tolist() == [[1, 0, 3], [0, 0, 0], [0, 8, 0]]


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_dense_and_back_with_gradients(density):
    dense = torch.randn(2, 4, 3, 7, generator=generator(), dtype=torch.float64)
    dense = (dense * (torch.rand(dense.shape, generator=generator(1)) < density)).requires_grad_()
    sparse = sparse_from_dense(dense)
    assert sparse.batch_shape == (2, 4) and len(sparse.layers) == 3
    assert sum(layer.values.numel() for layer in sparse.layers) == (dense != 0).sum()
    torch.testing.assert_close(sparse.to_dense(), dense, rtol=0, atol=0)
    weights = torch.randn(dense.shape, generator=generator(2), dtype=torch.float64)
    (found,) = torch.autograd.grad((sparse.to_dense() * weights).sum(), dense)
    torch.testing.assert_close(found, weights * (dense != 0), rtol=0, atol=0)


def test_counts_ignore_listed_zeros():
    layer = LayerFeatures(
        values=torch.tensor([0.0, 2.0, 1.0, 0.0]),
        indices=torch.tensor([0, 3, 3, 1]),
        offsets=torch.tensor([0, 2, 4]),
        num_features=5,
    )
    empty = LayerFeatures(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 5)
    features = SparseFeatures([layer, empty], torch.Size([2]))
    assert features.active_counts().tolist() == [[0, 0, 0, 2, 0], [0] * 5]
    assert features.active_counts().dtype == torch.int64
    assert features.l0_per_layer().tolist() == [1.0, 0.0]


def test_l0_is_a_mean_over_all_leading_dimensions():
    acts = torch.rand(2, 5, 3, 8, generator=generator()).sub(0.5).relu()
    expected = (acts > 0).sum(dim=3).float().mean(dim=(0, 1))
    torch.testing.assert_close(sparse_from_dense(acts).l0_per_layer(), expected)


# -- jumprelu ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "h, theta, value, grad_h, grad_theta",
    [
        (0.495, 0.5, 0.0, 0.0, -25.0),  # inactive, inside the window: -θ/ε = -0.5/0.02
        (0.505, 0.5, 0.505, 1.0, -25.0),
        (0.5, 0.5, 0.0, 0.0, -25.0),  # the gate is strict
        (0.52, 0.5, 0.52, 1.0, 0.0),
        (0.48, 0.5, 0.0, 0.0, 0.0),
        (-1.0, 0.0, 0.0, 0.0, 0.0),
        (0.005, 0.0, 0.005, 1.0, 0.0),  # θ = 0 has no gradient
    ],
)
def test_jumprelu_by_hand(h, theta, value, grad_h, grad_theta):
    h = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
    out = JumpReLU.apply(h, theta, 0.02)
    assert out.item() == value
    found = torch.autograd.grad(3 * out, (h, theta))
    assert found[0].item() == 3 * grad_h
    assert found[1].item() == pytest.approx(3 * grad_theta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_jumprelu_of_half_precision_with_a_float32_threshold(dtype):
    h = torch.tensor([1.0, 0.25], dtype=dtype, requires_grad=True)
    theta = torch.tensor([0.5, 0.5], requires_grad=True)
    out = JumpReLU.apply(h, theta, 1.0)
    assert out.dtype == dtype and out.tolist() == [1.0, 0.0]
    grad_h, grad_theta = torch.autograd.grad(out.sum(), (h, theta))
    assert grad_h.dtype == dtype and grad_theta.dtype == torch.float32
    assert grad_h.tolist() == [1.0, 0.0]
    assert grad_theta.tolist() == [0.0, -0.5]  # |1 - 0.5| < 0.5 is false


# -- supports ---------------------------------------------------------------------------------------------------------


def stack_of(supports):
    return torch.stack(supports, dim=1)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_topk_support_per_layer(k):
    h = [torch.randn(6, 8, generator=generator(s)) for s in range(3)]
    for h_s, support in zip(h, topk_support(h, k, "layer"), strict=True):
        for row, selected in zip(h_s, support, strict=True):
            assert set(selected.nonzero().flatten().tolist()) == set(row.sort(descending=True).indices[:k].tolist())


@pytest.mark.parametrize("k", [1, 3, 8])
def test_topk_support_over_all_layers(k):
    h = [torch.randn(6, 8, generator=generator(s)) + s for s in range(3)]
    support = stack_of(topk_support(h, k, "token"))
    assert (support.sum(dim=(1, 2)) == 3 * k).all()
    for row, selected in zip(stack_of(h), support, strict=True):
        assert row[selected].min() >= row[~selected].max() if (~selected).any() else k == 8


@pytest.mark.parametrize("scope", ["layer", "token"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_batchtopk_support(k, scope):
    h = [torch.randn(6, 8, generator=generator(s)) + s - 3 for s in range(3)]
    values, support = stack_of(h), stack_of(batchtopk_support(h, k, scope))
    groups = [(values[:, s], support[:, s], 6 * k) for s in range(3)]
    if scope == "token":
        groups = [(values, support, 3 * 6 * k)]
    for h_here, selected, count in groups:
        assert selected.sum() == count
        expected = h_here.flatten().sort(descending=True).values[:count]
        torch.testing.assert_close(h_here[selected].sort(descending=True).values, expected, rtol=0, atol=0)


@pytest.mark.parametrize("select", [topk_support, batchtopk_support])
@pytest.mark.parametrize("scope", ["layer", "token"])
def test_the_budget_is_exact_among_ties(select, scope):
    h = [torch.zeros(6, 8) for _ in range(3)]
    support = stack_of(select(h, 2, scope))
    assert support.sum() == 2 * 3 * 6
    if scope == "layer":
        assert (support.sum(dim=(0, 2)) == 2 * 6).all()
    if select is topk_support:
        assert (support.sum(dim=(1, 2)) == 2 * 3).all()


# -- the exact selection ----------------------------------------------------------------------------------------------


SIZE = 250_000


def vectors():
    """Long vectors, some of which mislead a sample that takes every so-many-th entry."""
    random = torch.randn(SIZE, generator=generator())
    step = SIZE // 20_000
    sampled_large, sampled_small, periodic = random.clone(), random.clone(), random.clone()
    sampled_large[::step] += 100  # the sample sees the large entries alone
    sampled_small[::step] -= 100  # ... or none of them
    periodic[::step] = periodic[::step].abs() + 50
    few = torch.full((SIZE,), -1.0)
    few[:7] = torch.arange(7.0)
    return {
        "random": random,
        "ascending": random.sort().values,
        "descending": random.sort(descending=True).values,
        "the sample sees the large ones": sampled_large,
        "the sample sees the small ones": sampled_small,
        "periodic": periodic,
        "all the same": torch.ones(SIZE),
        "few values": (4 * random).round(),
        "few above a plateau": few,
        "one block": torch.cat([torch.zeros(SIZE - 5_000), torch.ones(5_000)]),
        "minus infinity": torch.where(random > 2.5, random, -torch.inf),
        "half precision": random.bfloat16(),
    }


VECTORS = vectors()


@pytest.mark.parametrize("count", [1, 50, 1_000, 10_000, SIZE // 16 + 1])
@pytest.mark.parametrize("name", VECTORS)
def test_largest_is_exact(name, count):
    values = VECTORS[name]
    positions = largest(values, count)
    assert positions.shape == (count,)
    assert positions.unique().numel() == count
    expected = values.topk(count).values
    torch.testing.assert_close(values[positions].sort(descending=True).values, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size, count", [(1, 1), (10, 10), (1000, 3), (100_001, 1), (100_001, 100_001)])
def test_largest_of_vectors_around_the_sampling_size(size, count):
    values = torch.randn(size, generator=generator(size))
    positions = largest(values, count)
    expected = values.topk(count).values
    torch.testing.assert_close(values[positions].sort(descending=True).values, expected, rtol=0, atol=0)
