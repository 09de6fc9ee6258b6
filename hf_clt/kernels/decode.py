"""
Decoding: adding what a source layer's features write to the reconstruction of its target layers.

`decode_dense` is the formula. `add_decoded` computes the same from the active features only, forward and backward, and
adds it into the reconstruction in place: slicing one source's output into its targets under autograd would allocate a
full zero tensor per slice in the backward pass, which is O(L^3) traffic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sparsity import LayerFeatures


# Above this share of listed entries one matrix product is faster than gathering rows (measured on CPU: 4 to 5 %).
DENSE_ABOVE = 0.04


def decode_dense(acts: Tensor, weight: Tensor) -> Tensor:
    """
    Σ_f a[n, f] · W[f, j]: (N, F) activations and (F, J, D) decoder rows to (N, J, D). The reference.
    """
    return torch.einsum("nf,fjd->njd", acts, weight)


def row_sums(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """
    out[b] = Σ over the entries e of bag b of weights[e] · rows[indices[e]].

    Args:
        rows: (R, C).
        indices: (nnz,) int64 rows.
        offsets: (B + 1,) int64; bag b owns the entries offsets[b] to offsets[b + 1].
        weights: (nnz,).

    Returns:
        (B, C).
    """
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _AddDecoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reconstruction, values, weight, features: LayerFeatures, first_target: int, num_targets: int):
        rows = weight.reshape(weight.shape[0], -1)
        ctx.dense = use_dense(features)
        if ctx.dense:
            written = features_dense(features, values).to(rows.dtype) @ rows
        else:
            written = row_sums(rows, features.indices, features.offsets, values.to(rows.dtype))
        # A tied decoder has J = 1 and writes the same to all its targets.
        targets = slice(first_target, first_target + num_targets)
        reconstruction[:, targets] += written.view(-1, *weight.shape[1:])
        ctx.mark_dirty(reconstruction)
        ctx.save_for_backward(values, weight)
        ctx.features, ctx.targets = features, targets
        return reconstruction

    @staticmethod
    def backward(ctx, grad):
        values, weight = ctx.saved_tensors
        features = ctx.features
        rows = weight.reshape(weight.shape[0], -1)
        grad_written = grad[:, ctx.targets]
        if weight.shape[1] == 1:
            grad_written = grad_written.sum(dim=1, keepdim=True)
        grad_written = grad_written.reshape(grad.shape[0], -1).to(rows.dtype)
        grad_values = grad_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.dense:
                grad_values = (grad_written @ rows.T)[features.tokens, features.indices]
            else:
                grad_values = row_dots(rows, grad_written, features)
            grad_values = grad_values.to(values.dtype)
        if ctx.needs_input_grad[2]:
            if ctx.dense:
                grad_weight = features_dense(features, values).to(rows.dtype).T @ grad_written
            else:
                # Posting lists: the tokens of each feature, so that the gradient is again a sum of rows.
                order = features.indices.argsort(stable=True)
                offsets = torch.zeros(features.num_features + 1, dtype=torch.int64, device=rows.device)
                torch.cumsum(features.indices.bincount(minlength=features.num_features), dim=0, out=offsets[1:])
                grad_weight = row_sums(grad_written, features.tokens[order], offsets, values[order].to(rows.dtype))
            grad_weight = grad_weight.view_as(weight)
        return grad, grad_values, grad_weight, None, None, None


def use_dense(features: LayerFeatures) -> bool:
    """Whether one matrix product beats gathering the listed rows."""
    return features.indices.numel() > DENSE_ABOVE * features.num_tokens * features.num_features


def features_dense(features: LayerFeatures, values: Tensor) -> Tensor:
    dense = values.new_zeros(features.num_tokens * features.num_features)
    dense[features.tokens * features.num_features + features.indices] = values
    return dense.view(features.num_tokens, features.num_features)


def row_dots(rows: Tensor, grad_written: Tensor, features: LayerFeatures) -> Tensor:
    """
    The gradient of a sum of rows to its weights: for each entry, <grad_written of its token, row of its feature>.

    Args:
        rows: (F, C).
        grad_written: (N, C).
        features: The entries.

    Returns:
        (nnz,).
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_written, rows, features.indices, features.offsets, features.tokens, 0
    )


def add_decoded(
    reconstruction: Tensor, features: LayerFeatures, weight: Tensor, first_target: int, num_targets: int
) -> Tensor:
    """
    Adds Σ_f a_f W[f, j] to the reconstruction of target layer `first_target + j`, in place.

    Args:
        reconstruction: (N, L, D), changed in place.
        features: The source layer's features on N tokens.
        weight: (F, J, D) with J = `num_targets`, or J = 1 for a decoder that writes the same to all its targets.
        first_target: The first target layer.
        num_targets: Number of target layers written to.

    Returns:
        `reconstruction`, differentiable in the feature values and in the weight.
    """
    return _AddDecoded.apply(reconstruction, features.values, weight, features, first_target, num_targets)


__all__ = ["add_decoded", "decode_dense"]
