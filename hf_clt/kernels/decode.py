"""
Decoding: adding what a source layer's features write to the reconstruction of its target layers.

`decode_dense` is the formula. `add_decoded` computes the same from the active features only, forward and backward, and
adds it into the reconstruction in place: slicing one source's output into its targets under autograd would allocate a
full zero tensor per slice in the backward pass, which is O(L^3) traffic.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..sparsity import LayerFeatures
from . import triton_layers
from .encode import autocast_where_fast
from .rows import entry_dots, row_sums, transposed_row_sums, use_dense


# Rows that are read more often than that on average are rounded first, under autocast: that passes 6 bytes of memory
# for each weight, and saves 2 of the cache each time. By times of its parts on an H200 it pays from 8.2 (12 layers of
# 768), 7.2 (30 of 576) and 5.8 (12 of 768, 200 active features) reads on; the copies take memory besides.
ROUND_ABOVE = 8


def decode_dense(acts: Tensor, weight: Tensor) -> Tensor:
    """
    Σ_f a[n, f] · W[f, j]: (N, F) activations and (F, J, D) decoder rows to (N, J, D). The reference.
    """
    return torch.einsum("nf,fjd->njd", acts, weight)


class _AddDecoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reconstruction, values, weight, features: LayerFeatures, targets: slice, with_squares: bool):
        ctx.set_materialize_grads(False)
        rows = weight.reshape(weight.shape[0], -1)
        # jumprelu lists inactive features of its window: they write nothing, and get a gradient all the same. The GPU
        # kernels skip them by themselves; counting them here would wait for the GPU.
        active, active_values = features, values
        if values.device.type == "cpu" and not values.all():
            entries = values.nonzero().squeeze(1)
            active, active_values = features.take(entries), values[entries]
        if use_dense(active_values, active.num_rows, active.num_features):
            with autocast_where_fast(rows.device):
                written = active.dense(active_values).to(rows.dtype) @ rows
        else:
            written = row_sums(rows, active.indices, active.offsets, active_values)
        # A tied decoder has J = 1 and writes the same to all its targets.
        reconstruction[:, targets] += written.view(-1, *weight.shape[1:])
        ctx.mark_dirty(reconstruction)
        ctx.save_for_backward(weight, active_values)
        ctx.features, ctx.active, ctx.targets, ctx.dtype = features, active, targets, gradient_dtype(weight)
        return reconstruction, squared_norms(rows) if with_squares else None

    @staticmethod
    def backward(ctx, grad, grad_squares):
        weight, active_values = ctx.saved_tensors
        features, active = ctx.features, ctx.active
        rows = weight.reshape(weight.shape[0], -1)
        grad_values = grad_rows = None
        if grad is not None:
            grad_written = grad[:, ctx.targets]
            if weight.shape[1] == 1:
                grad_written = grad_written.sum(dim=1, keepdim=True)
            grad_written = grad_written.reshape(grad.shape[0], -1).to(ctx.dtype).to(rows.dtype)
            if ctx.needs_input_grad[1]:
                grad_values = entry_dots(grad_written, rows, features).to(active_values.dtype)
            if ctx.needs_input_grad[2]:
                grad_rows = transposed_row_sums(grad_written, active, active_values)
        if grad_squares is not None and ctx.needs_input_grad[2]:
            slope = 2 * grad_squares.to(rows.dtype)[:, None]
            grad_rows = slope * rows if grad_rows is None else grad_rows.addcmul_(slope, rows)
        return grad, grad_values, None if grad_rows is None else grad_rows.view_as(weight), None, None, None


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """Of the reconstruction's gradient: autocast on a GPU rounds what goes into products, in the backward pass too."""
    is_rough = weight.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if is_rough else weight.dtype


def squared_norms(rows: Tensor) -> Tensor:
    """Σ over a row of W², (F, C) to (F,), in at least float32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)).square()


def add_decoded(
    reconstruction: Tensor, features: LayerFeatures, weight: Tensor, targets: slice, with_squares: bool = False
) -> tuple[Tensor, Tensor | None]:
    """
    Adds Σ_f a_f W[f, j] to the reconstruction of the j-th of some target layers, in place.

    Args:
        reconstruction: (N, L, D), changed in place.
        features: The source layer's features on N tokens.
        weight: (F, J, D), J the number of `targets`, or 1 for a decoder that writes the same to all of them.
        targets: The target layers.
        with_squares: Whether to return ‖W[f]‖² as well. Together, because the weight's gradient is then written once.

    Returns:
        `reconstruction`, differentiable in the feature values and in the weight; ‖W[f]‖² as stored, (F,), or None.
    """
    return _AddDecoded.apply(reconstruction, features.values, weight, features, targets, with_squares)


class _DecodeLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, start, values, features: LayerFeatures, reach: int, tied: bool, with_squares: bool, *weights):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, *weights)
        ctx.features, ctx.reach, ctx.tied, ctx.dtype = features, reach, tied, gradient_dtype(weights[0])
        is_often = features.indices.numel() > ROUND_ABOVE * features.num_features
        rounds = weights[0].dtype != ctx.dtype and is_often
        rows = triton_layers.rounded(weights, ctx.dtype) if rounds else weights
        decoded = triton_layers.decode(start, features, values, rows, reach, tied)
        return decoded, triton_layers.square_sums(weights) if with_squares else None

    @staticmethod
    def backward(ctx, grad, grad_squares):
        values, *weights = ctx.saved_tensors
        num_layers, width = len(weights), weights[0].shape[2]
        if grad is None:
            grad = values.new_zeros(ctx.features.num_rows // num_layers, num_layers, width)
        written = grad
        if ctx.tied:  # what a source writes to one target it writes to all
            written = torch.nn.functional.pad(written, (0, 0, 0, ctx.reach - 1)).unfold(1, ctx.reach, 1).sum(dim=3)
        gradients = [torch.empty_like(w) for w in weights] if any(ctx.needs_input_grad[6:]) else [None] * num_layers
        has_sums, has_slopes = gradients[0] is not None, gradients[0] is not None and grad_squares is not None
        dots = triton_layers.posting_sums(
            written.to(ctx.dtype).flatten(1),
            output_rows(ctx.features),
            ctx.features,
            values=values if has_sums else None,
            columns=[(s * width, w[0].numel()) for s, w in enumerate(weights)],
            gradients=gradients if has_sums else None,
            weights=weights if ctx.needs_input_grad[1] or has_slopes else None,
            slopes=2 * grad_squares if has_slopes else None,
        )
        grad_values = None if dots is None else dots.to(values.dtype)
        return grad, grad_values, None, None, None, None, *gradients


def output_rows(features: LayerFeatures) -> Tensor:
    """Which row of the outputs (N, L, D), or (2 N, L, D) with dead features, each entry writes to, (nnz,)."""
    if "outputs" not in features.orders:
        num_tokens = max(1, features.num_tokens)
        per_half = num_tokens * features.num_layers
        features.orders["outputs"] = features.rows // per_half * num_tokens + features.rows % num_tokens
    return features.orders["outputs"]


def takes_layers(features: LayerFeatures, weights: list[Tensor], start: Tensor) -> bool:
    """
    Whether [`decode_layers`] can be had, and beats products by layer. It gives all gradients at once: where there are
    some to add them to, of an earlier batch or in the buckets of several processes, layer by layer takes less memory.
    """
    in_buckets = dist.is_available() and dist.is_initialized()
    if torch.is_grad_enabled() and (weights[0].grad is not None or in_buckets):
        return False
    num_features = features.num_features // features.num_layers
    return triton_layers.takes(weights, start) and not use_dense(features.values, features.num_rows, num_features)


def decode_layers(
    start: Tensor, features: LayerFeatures, weights: list[Tensor], reach: int, tied: bool, with_squares: bool = False
) -> tuple[Tensor, Tensor | None]:
    """
    start + Σ_{s ≤ t, t - s < R} Σ_f a_sf W_s[f, t - s] of all L layers in one kernel, where [`takes_layers`].

    Args:
        start: (N, L, D) float32; with dead features (2 N, L, D).
        features: Of all layers.
        weights: (F, J_s, D) of each layer.
        reach: R.
        tied: Whether a source writes the same to all its targets (J_s = 1).
        with_squares: Whether to return ‖W_s[f]‖² as well.

    Returns:
        (N, L, D) float32, differentiable in `start`, the feature values and the weights; ‖W_s[f]‖² as stored,
        (L · F,), or None.
    """
    return _DecodeLayers.apply(start, features.values, features, reach, tied, with_squares, *weights)


__all__ = ["add_decoded", "decode_dense", "decode_layers", "takes_layers"]
