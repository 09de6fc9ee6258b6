"""
Encoding: pre-activations where an activation function needs them, and their gradients there alone.

The product of inputs and encoder is computed whole, since nothing says beforehand which features it makes active. Then
it is thrown away but for the selected entries, and the backward pass sums only over those: it is as much cheaper than
the dense one as the features are sparse.
"""

from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..folding import at_least_float32
from ..sparsity import LayerFeatures, sum_by_feature
from .rows import row_dots_by_feature, row_sums, transposed_row_sums, use_dense


def encode_dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """
    h = W x + b: (N, D) inputs and (F, D) encoder rows to (N, F). The reference.

    On a CPU the result is stored feature by feature: the product is a tenth faster this way round (its larger operand
    is read as it lies in memory), and the selected entries come out in the order in which the backward pass uses them.
    There autocast to bfloat16 is followed only if it pays, see [`multiplies_bfloat16`]; else the product is exact.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    with autocast_where_fast(x.device):
        return torch.addmm(bias[:, None], weight, x.T).T


def encode_layers(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """
    h of B layers in one batched product: (N, B, D) inputs, (B, F, D) rows and (B, F) biases to (B · N, F).

    A batched product adds no bias: it is one more column of the rows (and seven of zeros, which keep them aligned).
    They are copied in any case where autocast rounds them.
    """
    kind, width = x.device.type, x.shape[2]
    is_rough = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_rough else at_least_float32(weight.dtype)

    def padded(rows: Tensor, last: Tensor | float) -> Tensor:
        columns = rows.new_zeros(*rows.shape[:2], width + 8, dtype=dtype)
        columns[..., :width] = rows
        columns[..., width] = last
        return columns

    return torch.bmm(padded(x.transpose(0, 1), 1.0), padded(weight, bias).transpose(1, 2)).flatten(0, 1)


def autocast_where_fast(device: torch.device) -> torch.autocast:
    """A context without autocast on a CPU that would emulate bfloat16 products; elsewhere it changes nothing."""
    slow = device.type == "cpu" and not multiplies_bfloat16()
    return torch.autocast("cpu", enabled=False) if slow else nullcontext()


@cache
def multiplies_bfloat16() -> bool:
    """
    Whether this CPU has instructions for bfloat16 products. x86 processors before AVX512-BF16 and AMX emulate them,
    which takes up to eight times as long as the float32 product.
    """
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return found.get("architecture") != "x86_64" or any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))


class _PreActivations(torch.autograd.Function):
    """h at the entries of `features`, (nnz,), computed before: what is differentiated is where it came from."""

    @staticmethod
    def forward(ctx, x, weight, bias, values, features: LayerFeatures):
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.features, ctx.dtype = features, weight.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad_values):
        x, weight = ctx.saved_tensors
        features, wide = ctx.features, at_least_float32(ctx.dtype)
        num_tokens, num_layers, width = x.shape
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            rows = weight.to(wide).flatten(0, 1)
            grad_x = row_sums(rows, features.indices, features.offsets, grad_values)
            halves = 1 if features.first is None else 2
            grad_x = grad_x.view(halves, num_layers, num_tokens, width).sum(dim=0).transpose(0, 1).to(x.dtype)
        if ctx.needs_input_grad[1]:
            x, per_layer = x.to(wide), features.num_features // num_layers
            if num_layers > 1 and use_dense(grad_values, features.num_rows, per_layer):
                layers = enumerate(features.with_values(grad_values).by_layer())
                grad_weight = torch.stack([transposed_row_sums(x[:, b], layer, layer.values) for b, layer in layers])
            else:
                rows = x.reshape(-1, width)
                grad_weight = transposed_row_sums(rows, features, grad_values, input_rows(features))
            grad_weight = grad_weight.view(num_layers, -1, width).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_by_feature(features, grad_values).to(ctx.dtype).view(num_layers, -1)
        return grad_x, grad_weight, grad_bias, None, None


def input_rows(features: LayerFeatures) -> Tensor:
    """Which row of the inputs (N, B, D), taken as (N · B, D), each entry was computed from, (nnz,)."""
    if features.num_layers == 1 and features.first is None:
        return features.rows
    if "inputs" not in features.orders:
        rows = features.rows if features.first is None else features.rows % features.first[0]
        num_tokens = max(1, features.num_tokens)
        features.orders["inputs"] = rows % num_tokens * features.num_layers + rows // num_tokens
    return features.orders["inputs"]


def pre_activations_at(x: Tensor, weight: Tensor, bias: Tensor, features: LayerFeatures) -> LayerFeatures:
    """
    Makes selected pre-activations differentiable in what they were computed from.

    Args:
        x: (N, B, D) inputs of B layers.
        weight: (B, F, D).
        bias: (B, F).
        features: The selected entries of h = W x + b with their values. Where h was computed in less than float32
            (autocast), they are computed again, so that only the selection is rough; but for -inf among dead features
            that follow, which stands for no pre-activation (see [`largest_dead`]).

    Returns:
        The features, differentiable in `x`, `weight` and `bias`.
    """
    values, dtype = features.values, at_least_float32(weight.dtype)
    with torch.no_grad():
        if torch.finfo(values.dtype).eps > torch.finfo(dtype).eps:
            rows, columns = x.to(dtype).reshape(-1, x.shape[2]), weight.to(dtype).flatten(0, 1)
            exact = row_dots_by_feature(rows, columns, features, input_rows(features)).to(dtype)
            exact += bias.flatten()[features.indices]
            values = exact if features.first is None else torch.where(values.isneginf(), values, exact)
    return features.with_values(_PreActivations.apply(x, weight, bias, values, features))


def pre_activation_sums(x: Tensor, weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """Σ_n h of the given features b · F + f, an int64 vector; x (N, B, D), weight (B, F, D), bias (B, F)."""
    dtype = at_least_float32(weight.dtype)
    sums = x.to(dtype).sum(dim=0)[features // weight.shape[1]]
    # no matmul, which autocast would round to half precision
    products = (weight.flatten(0, 1)[features].to(dtype) * sums).sum(dim=1)
    return products + len(x) * bias.flatten()[features].to(dtype)


__all__ = [
    "autocast_where_fast",
    "encode_dense",
    "encode_layers",
    "multiplies_bfloat16",
    "pre_activation_sums",
    "pre_activations_at",
]
