"""The two primitives and the weight gradient built from them, on CPU operators, against the plain formulas."""

import pytest
import torch

from hf_clt.kernels import rows as rows_module
from hf_clt.kernels.rows import (
    entry_dots,
    row_dots,
    row_dots_reference,
    row_sums,
    row_sums_reference,
    transposed_row_sums,
)
from hf_clt.sparsity import features_at


# Relative to the largest value: sums of at most 40 products, in float32 rounded to 2^-24 and in bfloat16 to 2^-8 each.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(found, wanted, dtype):
    assert found.dtype == dtype
    scale = wanted.double().abs().max().item() if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0))


def entries(num_tokens=40, num_features=24, density=0.3):
    """Features with an empty first token, an empty last one, and two features that never fire."""
    support = randn(num_tokens, num_features) < torch.distributions.Normal(0, 1).icdf(torch.tensor(density)).item()
    support[0] = support[-1] = False
    support[:, 3] = support[:, -1] = False
    return features_at(randn(num_tokens, num_features, seed=1), support)


@DTYPES
@pytest.mark.parametrize("columns", [1, 7, 300])
def test_row_sums(dtype, columns):
    features = entries()
    rows, weights = randn(24, columns, seed=2, dtype=dtype), features.values.to(dtype)
    found = row_sums(rows, features.indices, features.offsets, weights)
    wanted = row_sums_reference(rows.double(), features.indices, features.offsets, weights.double())
    assert_close(found, wanted, dtype)
    torch.testing.assert_close(wanted, features.dense(weights.double()) @ rows.double())


@DTYPES
@pytest.mark.parametrize("columns", [1, 7, 300])
def test_row_dots(dtype, columns):
    features = entries()
    left, right = randn(40, columns, seed=3, dtype=dtype), randn(24, columns, seed=4, dtype=dtype)
    found = row_dots(left, features.rows, right, features.indices)
    wanted = row_dots_reference(left.double(), features.rows, right.double(), features.indices)
    assert_close(found, wanted, dtype)
    torch.testing.assert_close(wanted, (left.double() @ right.double().T)[features.rows, features.indices])


TILES = pytest.mark.parametrize("tile", [None, 1, 2, 50], ids=["whole", "1 column", "2 columns", "50 columns"])


def cut_into_tiles(monkeypatch, rows, columns):
    """Makes a CPU cut `rows` into tiles of at most `columns` columns, as it does with what its cache cannot hold."""
    if columns is None:
        assert rows_module.num_tiles(rows) == 1
        return
    monkeypatch.setattr(rows_module, "CACHE_BYTES", len(rows) * columns * rows.element_size())
    monkeypatch.setattr(rows_module, "NARROWEST", 1)
    assert rows_module.num_tiles(rows) >= rows.shape[1] / columns > 3


@DTYPES
@TILES
def test_row_sums_by_tiles(monkeypatch, dtype, tile):
    features = entries(num_tokens=60, density=0.5)
    assert features.indices.numel() > 2 * 24  # tiles need rows that are gathered several times
    rows, weights = randn(24, 180, seed=2, dtype=dtype), features.values.to(dtype)
    cut_into_tiles(monkeypatch, rows, tile)
    found = row_sums(rows, features.indices, features.offsets, weights)
    assert_close(found, features.dense(weights.double()) @ rows.double(), dtype)


@DTYPES
@TILES
@pytest.mark.parametrize("path", ["matrix product", "sparse product", "embedding bag"])
def test_entry_dots(monkeypatch, dtype, tile, path):
    monkeypatch.setattr(rows_module, "DENSE_ABOVE", -1.0 if path == "matrix product" else 1.0)
    if path == "embedding bag":
        monkeypatch.setattr(rows_module, "has_sparse_product", lambda rows: False)
    features = entries()
    left = randn(40, 300, seed=3, dtype=dtype)[:, 20:200]  # as a slice of targets is: not contiguous
    right = randn(24, 180, seed=4, dtype=dtype)
    cut_into_tiles(monkeypatch, left, tile)
    found = entry_dots(left, right, features)
    assert_close(found, (left.double() @ right.double().T)[features.rows, features.indices], dtype)


@DTYPES
@TILES
@pytest.mark.parametrize("path", ["matrix product", "sparse product", "embedding bag"])
def test_transposed_row_sums(monkeypatch, dtype, path, tile):
    monkeypatch.setattr(rows_module, "DENSE_ABOVE", -1.0 if path == "matrix product" else 1.0)
    if path == "embedding bag":
        monkeypatch.setattr(rows_module, "has_sparse_product", lambda rows: False)
    features = entries()
    rows = randn(40, 300, seed=5, dtype=dtype)[:, 20:200]  # as a slice of targets is: not contiguous
    cut_into_tiles(monkeypatch, rows, tile)
    found = transposed_row_sums(rows, features, features.values)
    assert_close(found, features.dense(features.values).T @ rows.double(), dtype)
    assert (found[3] == 0).all() and (found[-1] == 0).all()
    assert torch.equal(found, transposed_row_sums(rows, features, features.values))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(monkeypatch, density):
    monkeypatch.setattr(rows_module, "DENSE_ABOVE", 1.0)
    features = features_at(randn(5, 6), torch.full((5, 6), bool(density)))
    rows = randn(5, 9, seed=1)
    torch.testing.assert_close(transposed_row_sums(rows, features, features.values), features.to_dense().T @ rows)
    weight = randn(6, 9, seed=2)
    found = row_sums(weight, features.indices, features.offsets, features.values)
    torch.testing.assert_close(found, features.to_dense() @ weight)
    assert row_dots(rows, features.rows, weight, features.indices).shape == (30 * density,)
