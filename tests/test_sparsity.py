"""The sparse form of activations, and the activation functions on it."""

import itertools
from dataclasses import replace

import pytest
import torch

from hf_clt.sparsity import (
    AtEntries,
    JumpReLU,
    LayerFeatures,
    SparseFeatures,
    entries_at,
    features_at,
    join,
    sparse_from_dense,
    sum_by_feature,
    true_positions,
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
    assert features.rows.tolist() == [0, 0, 2]
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


def stored_by_feature(values):
    """The same matrix (N, F), its memory that of an (F, N) one."""
    return values.T.contiguous().T


@pytest.mark.parametrize("shape", [(9, 5), (1, 5), (9, 1), (0, 5), (6, 64)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_entries_do_not_depend_on_the_storage_order(shape, density):
    values = torch.randn(shape, generator=generator(), dtype=torch.float64)
    support = torch.rand(shape, generator=generator(1)) < density
    found, wanted = features_at(stored_by_feature(values), support), features_at(values, support)
    for name in ("values", "indices", "offsets", "rows"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for a, b in zip(found.by_feature, wanted.by_feature, strict=True):
        assert torch.equal(a, b)
    leaf = values.clone().requires_grad_()
    (grad,) = torch.autograd.grad(features_at(stored_by_feature(leaf), support).values.pow(2).sum(), leaf)
    assert torch.equal(grad, 2 * values * support)


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 8), (0, 8), (64, 1024)])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_true_positions(shape, density):
    mask = torch.rand(shape, generator=generator()) < density
    assert torch.equal(true_positions(mask), mask.flatten().nonzero().squeeze(1))
    assert torch.equal(true_positions(mask.T), mask.T.flatten().nonzero().squeeze(1))  # not contiguous


def some_entries():
    values = torch.randn(9, 5, generator=generator(), dtype=torch.float64)
    support = torch.rand(9, 5, generator=generator(1)) < 0.5
    support[:, 3] = False
    return values, support, features_at(values, support)


def test_posting_lists():
    _, support, features = some_entries()
    order, offsets = features.by_feature
    for f in range(5):
        entries = order[offsets[f] : offsets[f + 1]]
        assert (features.indices[entries] == f).all()
        assert features.rows[entries].tolist() == support[:, f].nonzero().flatten().tolist()
    assert offsets[-1] == order.numel() == features.values.numel()


def test_sum_by_feature():
    values, support, features = some_entries()
    torch.testing.assert_close(sum_by_feature(features, features.values), (values * support).sum(dim=0))


def test_values_of_a_vector_at_the_entries_and_their_gradient():
    _, support, features = some_entries()
    vector = torch.randn(5, generator=generator(2), dtype=torch.float64).requires_grad_()
    out = AtEntries.apply(vector, features)
    torch.testing.assert_close(out, vector.expand(9, 5)[support], rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda v: AtEntries.apply(v, features), (vector,))


@pytest.mark.parametrize("entries", [[], [0], [1, 3, 4, 9], list(range(12))])
def test_taking_some_entries(entries):
    _, _, features = some_entries()
    taken = features.take(torch.tensor(entries, dtype=torch.int64))
    assert taken.values.tolist() == [features.values[e].item() for e in entries]
    assert taken.rows.tolist() == [features.rows[e].item() for e in entries]
    assert taken.indices.tolist() == [features.indices[e].item() for e in entries]


def test_features_of_further_tokens_follow_and_are_taken_off():
    first, second = (features_at(h, h > 0.3) for h in torch.randn(2, 4, 7).unbind())
    joined = first.with_dead(second)
    assert torch.equal(joined.to_dense(), torch.cat([first.to_dense(), second.to_dense()]))
    alone = joined.with_values(2 * joined.values).halves()[0]
    assert torch.equal(alone.to_dense(), 2 * first.to_dense()) and torch.equal(alone.offsets, first.offsets)
    assert first.halves() == (first, None)


@pytest.mark.parametrize("with_dead", [False, True])
def test_layers_of_a_block_and_blocks_of_layers(with_dead):
    """Uneven ones; a block of layers, of which one has no entry, gives them back, with the dead features of each."""
    h = torch.randn(2, 3, 6, 5, generator=generator())
    support = h > torch.tensor([0.3, 9.0, -0.2])[:, None, None]
    layers, dead = ([features_at(h[half, b], support[half, b]) for b in range(3)] for half in range(2))
    block = join([join(layers[:2]), layers[2]])
    if with_dead:
        block = block.with_dead(join(dead))
        layers = [a.with_dead(b) for a, b in zip(layers, dead, strict=True)]
    assert block.num_tokens == 6 and block.num_layers == 3 and block.num_features == 15
    for found, wanted in zip(block.by_layer(), layers, strict=True):
        assert torch.equal(found.to_dense(), wanted.to_dense()) and found.first == wanted.first
        assert torch.equal(found.rows, wanted.rows) and torch.equal(found.offsets, wanted.offsets)


def test_even_layers_need_no_offsets_to_be_told_apart():
    h = torch.randn(6, 5, generator=generator())
    block = replace(entries_at(h, torch.tensor([0, 7, 11, 16, 22, 29]), 3), is_even=True)
    joined = join([block, block])
    assert joined.is_even and not join([block, replace(block, is_even=False)]).is_even
    for features, (a, b) in zip(joined.by_layer(), itertools.pairwise(range(0, 13, 2)), strict=True):
        assert torch.equal(features.values, joined.values[a:b])
        assert features.indices.tolist() == (joined.indices[a:b] % 5).tolist()
