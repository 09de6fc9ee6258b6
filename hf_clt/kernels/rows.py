"""
The two primitives of everything that is computed on active features alone: sums of rows, and dot products of rows.

`row_sums_reference` and `row_dots_reference` are the formulas. On a GPU they run as Triton kernels (`triton_rows`), on
a CPU, and where Triton is missing, as the operators behind `torch.nn.EmbeddingBag`.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sparsity import LayerFeatures
from . import triton_rows


# Above this share of listed entries one matrix product is faster than gathering rows: measured on a CPU
# (scripts/measure_crossover.py); on a GPU only modelled, from the rates of tensor cores and memory of an H100.
DENSE_ABOVE, DENSE_ABOVE_GPU = 0.08, 0.01


def use_dense(entries: Tensor, num_tokens: int, num_features: int) -> bool:
    """Whether one matrix product beats gathering the rows of the listed entries, a vector with one element each."""
    share = DENSE_ABOVE_GPU if entries.is_cuda else DENSE_ABOVE
    return entries.numel() > share * num_tokens * num_features


def use_triton(rows: Tensor) -> bool:
    """Whether the Triton kernels take these rows. (They also run on CPU tensors, interpreted: for tests alone.)"""
    return rows.is_cuda and rows.dtype in triton_rows.DTYPES and triton_rows.available(rows)


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
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def row_dots(left: Tensor, left_indices: Tensor, right: Tensor, right_indices: Tensor) -> Tensor:
    """
    out[e] = <left[left_indices[e]], right[right_indices[e]]>.

    Entries in the order of `right_indices` read every row of `right` once.

    Args:
        left: (A, C).
        left_indices: (nnz,) int64.
        right: (R, C), of the same dtype.
        right_indices: (nnz,) int64.

    Returns:
        (nnz,).
    """
    if use_triton(left):
        return triton_rows.row_dots(left, left_indices, right, right_indices)
    # The gradient of an embedding bag to its per-sample weights; its offsets are not read when the bags are given.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_indices, right_indices, left_indices, 0
    )


def transposed_row_sums(rows: Tensor, features: LayerFeatures, values: Tensor) -> Tensor:
    """
    out[f] = Σ_n values[n, f] · rows[n]: the gradient of a matrix of which only the listed entries' rows were used.

    Args:
        rows: (N, C).
        features: Lists the entries (n, f); its own values are not read.
        values: (nnz,), one per entry.

    Returns:
        (F, C), in the dtype of `rows`.
    """
    values = values.to(rows.dtype)
    if use_dense(values, features.num_tokens, features.num_features):
        return features.dense(values).T @ rows
    if use_triton(rows):
        return triton_rows.transposed_row_sums(rows, features, values)
    order, offsets = features.by_feature
    if has_sparse_product(rows):
        lists = torch.sparse_csr_tensor(
            offsets, features.tokens[order], values[order], (features.num_features, len(rows))
        )
        out = rows.new_empty(features.num_features, rows.shape[1])
        return torch.addmm(out, lists, rows, beta=0, out=out)
    return row_sums(rows, features.tokens[order], offsets, values[order])


def has_sparse_product(rows: Tensor) -> bool:
    """
    Whether a sparse matrix product takes `rows`: it writes each row of the gradient once, the embedding bag twice
    (zeros first), and on a CPU this write is most of the cost.
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

__all__ = ["row_dots", "row_dots_reference", "row_sums", "row_sums_reference", "transposed_row_sums", "use_dense"]
