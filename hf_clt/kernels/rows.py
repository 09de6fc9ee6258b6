"""
The two primitives of everything that is computed on active features alone: sums of rows, and dot products of rows.

`row_sums_reference` and `row_dots_reference` are the formulas. On a GPU they run as Triton kernels (`triton_rows`,
`triton_layers`), on a CPU, and where Triton is missing, as the operators behind `torch.nn.EmbeddingBag`.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sparsity import LayerFeatures
from . import triton_layers, triton_rows


# Above this share of listed entries one matrix product is faster than gathering rows: measured on a CPU
# (benchmarks/measure_crossover.py); on a GPU only modelled, from the rates of tensor cores and memory of an H100.
DENSE_ABOVE, DENSE_ABOVE_GPU = 0.15, 0.01

# What a CPU gathers from again and again should stay in its last-level cache: of a larger matrix, that many bytes of
# columns at a time. Below this width the columns of a row no longer stream.
CACHE_BYTES, NARROWEST = 12 * 2**20, 128


def use_dense(entries: Tensor, num_tokens: int, num_features: int) -> bool:
    """Whether one matrix product beats gathering the rows of the listed entries, a vector with one element each."""
    share = DENSE_ABOVE_GPU if entries.is_cuda else DENSE_ABOVE
    return entries.numel() > share * num_tokens * num_features


def use_triton(rows: Tensor) -> bool:
    """Whether the Triton kernels take these rows. (They also run on CPU tensors, interpreted: for tests alone.)"""
    return rows.is_cuda and triton_rows.available(rows)


def row_sums_reference(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[b] = Σ over the entries e of bag b of weights[e] · rows[indices[e]]. See [`row_sums`]."""
    bags = torch.arange(offsets.numel() - 1, device=offsets.device).repeat_interleave(offsets.diff())
    out = rows.new_zeros(offsets.numel() - 1, rows.shape[1])
    return out.index_add(0, bags, weights[:, None].to(rows.dtype) * rows[indices])


def row_dots_reference(left: Tensor, left_indices: Tensor, right: Tensor, right_indices: Tensor) -> Tensor:
    """out[e] = <left[left_indices[e]], right[right_indices[e]]>. See [`row_dots`]."""
    return (left[left_indices] * right[right_indices]).sum(dim=1)


def row_sums(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """
    out[b] = Σ over the entries e of bag b of weights[e] · rows[indices[e]].

    Args:
        rows: (R, C).
        indices: (nnz,) int64 rows.
        offsets: (B + 1,) int64; bag b owns the entries offsets[b] to offsets[b + 1].
        weights: (nnz,).

    Returns:
        (B, C), in the dtype of `rows`.
    """
    weights = weights.to(rows.dtype)
    if use_triton(rows):
        return triton_rows.row_sums(rows, indices, offsets, weights)
    num_rows, num_columns = rows.shape
    count = num_tiles(rows) if rows.is_contiguous() and indices.numel() > 2 * num_rows else 1
    if count == 1:
        return bag_sums(indices, rows, offsets, weights)
    tiles, width = rows.view(num_rows * count, -1), num_columns // count
    first, out = indices * count, rows.new_empty(offsets.numel() - 1, num_columns)
    for i, columns in enumerate(out.split(width, dim=1)):
        columns.copy_(bag_sums(first + i, tiles, offsets, weights))
    return out


def bag_sums(indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def num_tiles(rows: Tensor) -> int:
    """Into how many tiles of equal width a CPU should cut the columns of `rows` (R, C) to gather from each in turn."""
    num_rows, num_columns = rows.shape
    size = num_rows * num_columns * rows.element_size()
    if size <= 3 * CACHE_BYTES:  # reading short pieces of rows costs more than the cache saves
        return 1
    widest = max(num_columns * CACHE_BYTES // size, NARROWEST)
    return next(n for n in range(1, num_columns + 1) if num_columns % n == 0 and num_columns // n <= widest)


def row_dots(left: Tensor, left_indices: Tensor, right: Tensor, right_indices: Tensor) -> Tensor:
    """
    out[e] = <left[left_indices[e]], right[right_indices[e]]>, by torch's operators.

    Entries in the order of `right_indices` read every row of `right` once.

    Args:
        left: (A, C).
        left_indices: (nnz,) int64.
        right: (R, C), of the same dtype.
        right_indices: (nnz,) int64.

    Returns:
        (nnz,).
    """
    # The gradient of an embedding bag to its per-sample weights; its offsets are not read when the bags are given.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_indices, right_indices, left_indices, 0
    )


def entry_dots(left: Tensor, right: Tensor, features: LayerFeatures) -> Tensor:
    """
    <left[n], right[f]> at the listed entries (n, f) of the product left · rightᵀ, (N, F): the gradient of activations.

    Args:
        left: (N, C).
        right: (F, C), of the same dtype.
        features: Lists the entries; its values are not read.

    Returns:
        (nnz,), in the order of the entries.
    """
    if use_dense(features.indices, features.num_rows, features.num_features):
        return (left @ right.T)[features.rows, features.indices]
    if use_triton(left):
        return row_dots_by_feature(left, right, features, features.rows)
    order, offsets = features.by_feature  # by feature, so that each row of `right` is read once
    tokens = features.rows[order]
    count = num_tiles(left)
    if count > 1 and has_sparse_product(left):
        places = torch.sparse_csr_tensor(offsets, tokens, left.new_zeros(len(order)), (len(right), len(left)))
        width = left.shape[1] // count
        tiles = zip(right.split(width, dim=1), left.T.split(width), strict=True)
        dots = sum(torch.sparse.sampled_addmm(places, a, b, beta=0).values() for a, b in tiles)
    else:
        dots = row_dots(left, tokens, right, features.indices[order])
    return torch.empty_like(dots).index_copy_(0, order, dots)


def row_dots_by_feature(left: Tensor, right: Tensor, features: LayerFeatures, places: Tensor) -> Tensor:
    """<left[p], right[f]> at the listed entries, (nnz,), `places` p their rows; a GPU reads a row of `right` once."""
    if use_triton(left):
        columns = [(0, left.shape[1])]
        return triton_layers.posting_sums(left, places, features, columns=columns, weights=[right.contiguous()])
    return row_dots(left, places, right, features.indices)


def transposed_row_sums(rows: Tensor, features: LayerFeatures, values: Tensor, places: Tensor | None = None) -> Tensor:
    """
    out[f] = Σ over the entries (n, f) of value · rows[n]: the gradient of a matrix of which only the listed entries'
    rows were used.

    Args:
        rows: (R, C).
        features: Lists the entries; its own values are not read.
        values: (nnz,), one per entry.
        places: (nnz,) int64, the row of each entry; None: that of `features`.

    Returns:
        (F, C), in the dtype of `rows`, F all features of all layers.
    """
    values = values.to(rows.dtype)
    if features.num_layers == 1 and use_dense(values, features.num_rows, features.num_features):
        dense = features.dense(values).view(-1, len(rows), features.num_features).sum(dim=0)
        return dense.T @ rows
    places = features.rows if places is None else places
    if use_triton(rows):
        out = rows.new_empty(features.num_features, rows.shape[1])
        triton_layers.posting_sums(
            rows, places, features, values=values, columns=[(0, rows.shape[1])], gradients=[out]
        )
        return out
    order, offsets = features.by_feature
    if not has_sparse_product(rows):
        return row_sums(rows, places[order], offsets, values[order])
    lists = torch.sparse_csr_tensor(offsets, places[order], values[order], (features.num_features, len(rows)))
    out = rows.new_empty(features.num_features, rows.shape[1])
    width = rows.shape[1] // num_tiles(rows)
    for columns, tile in zip(out.split(width, dim=1), rows.split(width, dim=1), strict=True):
        torch.addmm(columns, lists, tile, beta=0, out=columns)
    return out


def has_sparse_product(rows: Tensor) -> bool:
    """
    Whether sparse matrix products take `rows`: they write each row of a gradient once, the embedding bag twice (zeros
    first), and on a CPU this write is most of the cost; and they take columns of a matrix as they lie.
    """
    return (
        rows.device.type == "cpu"
        and rows.dtype in (torch.float32, torch.float64)
        and torch.backends.mkl.is_available()
    )


with warnings.catch_warnings():
    # torch calls its compressed rows "beta" once per process; say it here, where it disturbs nobody.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))

__all__ = [
    "entry_dots",
    "row_dots",
    "row_dots_by_feature",
    "row_dots_reference",
    "row_sums",
    "row_sums_reference",
    "transposed_row_sums",
    "use_dense",
]
