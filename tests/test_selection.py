"""Where the largest pre-activations are: exactly so many, whatever ties there are, and whatever a sample misses."""

import pytest
import torch

from hf_clt.selection import keep_largest, largest, largest_dead, positions_batchtopk, positions_topk
from hf_clt.sparsity import entries_at


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- where the largest are --------------------------------------------------------------------------------------------


def check_positions(positions, h, count):
    assert positions.shape == (count,) and positions.dtype == torch.int64
    assert (positions.diff() > 0).all()  # ascending, none twice
    expected = h.flatten().sort(descending=True).values[:count]
    torch.testing.assert_close(h.flatten()[positions].sort(descending=True).values, expected, rtol=0, atol=0)


def stored_by_feature(values):
    """The same matrix (N, F), its memory that of an (F, N) one."""
    return values.T.contiguous().T


@pytest.mark.parametrize("num_features, k", [(8, 1), (8, 3), (8, 8), (37, 5), (256, 1), (256, 8), (256, 9), (640, 20)])
@pytest.mark.parametrize("kind", ["random", "few values", "ascending", "one group", "all the same", "bfloat16"])
def test_topk_of_each_token(num_features, k, kind):
    """In one round and in two; ties, and the largest all in one group of the first round or next to each other."""
    h = torch.randn(6, num_features, generator=generator())
    if kind == "few values":
        h = (2 * h).round()
    elif kind == "ascending":
        h = h.sort(dim=1).values
    elif kind == "one group":
        h[:, :: max(1, num_features // 16)] += 100
    elif kind == "all the same":
        h = torch.zeros_like(h)
    elif kind == "bfloat16":
        h = h.bfloat16()
    positions = positions_topk(h, k).view(6, k)
    for n in range(6):
        check_positions(positions[n] - n * num_features, h[n], k)
    h = stored_by_feature(h)
    positions = positions_topk(h, k)
    assert (positions.diff() > 0).all()
    entries = entries_at(h, positions)
    assert torch.equal(entries.offsets, torch.arange(7) * k)
    for n, chosen in enumerate(entries.indices.view(6, k)):
        check_positions(chosen, h[n], k)


def test_topk_with_nan_keeps_k_of_each_token():
    """The loss is NaN then, and stops the run with a clear error; the selection itself must not fail."""
    h = torch.randn(6, 256, generator=generator())
    h[2, 17] = torch.nan
    for layout in (h, stored_by_feature(h)):
        entries = entries_at(layout, positions_topk(layout, 4))
        assert torch.equal(entries.offsets, torch.arange(7) * 4)
        assert entries.values.isnan().sum() == 1


@pytest.mark.parametrize("count", [1, 6, 18, 48])
def test_batchtopk(count):
    h = torch.randn(6, 8, generator=generator())
    check_positions(positions_batchtopk(h, count), h, count)
    check_positions(positions_batchtopk(stored_by_feature(h), count), h.T, count)


@pytest.mark.parametrize("count", [1, 40, 700, 9000])
def test_batchtopk_in_two_rounds_as_on_a_gpu(monkeypatch, count):
    """In groups where they leave out half of the entries, and without; ties included."""
    monkeypatch.setattr("hf_clt.selection.is_on_cpu", lambda tensor: False)
    h = torch.randn(20, 960, generator=generator()).mul(4).round()
    check_positions(positions_batchtopk(h, count), h, count)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_topk_over_all_layers(k):
    h = [torch.randn(6, 8, generator=generator(s)) + s for s in range(3)]
    candidates = [entries_at(layer, positions_topk(layer, min(3 * k, 8))) for layer in h]
    kept = keep_largest(candidates, 3 * k, per_token=True)
    for n in range(6):
        values = torch.cat([layer.values[layer.rows == n] for layer in kept])
        expected = torch.cat([layer[n] for layer in h]).sort(descending=True).values[: 3 * k]
        torch.testing.assert_close(values.sort(descending=True).values, expected, rtol=0, atol=0)
    check_entries(kept, h)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_batchtopk_over_all_layers(k):
    h = [torch.randn(6, 8, generator=generator(s)) + s - 3 for s in range(3)]
    candidates = [entries_at(layer, positions_batchtopk(layer, min(3 * k, 8) * 6)) for layer in h]
    kept = keep_largest(candidates, 3 * 6 * k, per_token=False)
    values = torch.cat([layer.values for layer in kept])
    expected = torch.cat(h).flatten().sort(descending=True).values[: 3 * 6 * k]
    torch.testing.assert_close(values.sort(descending=True).values, expected, rtol=0, atol=0)
    check_entries(kept, h)


def check_entries(layers, h):
    for layer, values in zip(layers, h, strict=True):
        torch.testing.assert_close(layer.values, values[layer.rows, layer.indices], rtol=0, atol=0)


def test_the_budget_is_exact_among_ties():
    h = [torch.zeros(6, 8) for _ in range(3)]
    candidates = [entries_at(layer, positions_topk(layer, 6)) for layer in h]
    for count, per_token in ((6, True), (36, False)):
        kept = keep_largest(candidates, count, per_token)
        assert sum(layer.values.numel() for layer in kept) == 36
    assert positions_batchtopk(h[0], 12).numel() == 12


# -- dead features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux_k, kept", [(1, 1), (2, 2), (3, 3), (10, 3)])
def test_dead_features_are_the_largest_dead_ones(aux_k, kept):
    h = torch.randn(7, 6, generator=generator(), dtype=torch.float64) + 2
    dead = torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor([1, 3, 4]), True)
    features = largest_dead(h, dead[None], aux_k)
    assert features.indices.numel() == 7 * kept and features.num_features == 6
    dense = features.to_dense()
    for n in range(7):
        candidates = sorted([(h[n, f].item(), f) for f in (1, 3, 4)], reverse=True)[:kept]
        expected = torch.zeros(6, dtype=torch.float64)
        for value, f in candidates:
            expected[f] = value
        torch.testing.assert_close(dense[n], expected, rtol=0, atol=0)
    stored_by_feature = largest_dead(h.T.contiguous().T, dead[None], aux_k)
    assert torch.equal(stored_by_feature.to_dense(), dense)


def test_pre_activations_of_a_run_that_diverges_are_no_other_error():
    h = torch.full((128, 9), -torch.inf, dtype=torch.float64).T
    dead = torch.arange(128) < 20
    assert (largest_dead(h, dead[None], 16).indices < 20).all()


def test_no_feature_is_revived_where_none_is_dead():
    assert largest_dead(torch.randn(3, 4), torch.zeros(1, 4, dtype=torch.bool), 2).offsets.tolist() == [0, 0, 0, 0]


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
