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
from .rows import row_dots, row_sums, transposed_row_sums


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
        ctx.save_for_backward(x, weight)
        ctx.features = features
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad_values):
        x, weight = ctx.saved_tensors
        features, dtype = ctx.features, at_least_float32(weight.dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = row_sums(weight.to(dtype), features.indices, features.offsets, grad_values).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = transposed_row_sums(x.to(dtype), features, grad_values).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = sum_by_feature(features, grad_values).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def pre_activations_at(x: Tensor, weight: Tensor, bias: Tensor, features: LayerFeatures) -> LayerFeatures:
    """
    Makes selected pre-activations differentiable in what they were computed from.

    Args:
        x: (N, D) inputs.
        weight: (F, D).
        bias: (F,).
        features: The selected entries of h = W x + b with their values. Where h was computed in less than float32
            (autocast), they are computed again, so that only the selection is rough; but for -inf among dead features
            that follow, which stands for no pre-activation (see [`largest_dead`]).

    Returns:
        The features, differentiable in `x`, `weight` and `bias`.
    """
    values, dtype = features.values, at_least_float32(weight.dtype)
    with torch.no_grad():
        if torch.finfo(values.dtype).eps > torch.finfo(dtype).eps:
            exact = row_dots(x.to(dtype), features.tokens, weight.to(dtype), features.indices)
            exact = exact.to(dtype) + bias[features.indices]
            values = exact if features.first is None else torch.where(values.isneginf(), values, exact)
    return features.with_values(_PreActivations.apply(x, weight, bias, values, features))


__all__ = ["autocast_where_fast", "encode_dense", "multiplies_bfloat16", "pre_activations_at"]
