"""
The four activation functions, and the sparse form of feature activations.

Every activation function is written in two steps, so that nothing that is zero has to be computed afterwards:
`support` says *where* an activation or its gradient can be non-zero, `activate` says *what* stands there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerFeatures:
    """
    The features of one source layer on N tokens, in compressed-row form.

    Args:
        values (`Tensor` of shape `(nnz,)`): Activations. Zeros may occur: jumprelu lists features inside the
            straight-through window, which are inactive but receive gradient.
        indices (`Tensor` of shape `(nnz,)`, int64): Feature of each entry, ascending within a token.
        offsets (`Tensor` of shape `(N + 1,)`, int64): Token n owns the entries `offsets[n]` to `offsets[n + 1]`.
        num_features (`int`): F.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    num_features: int

    @property
    def num_tokens(self) -> int:
        return self.offsets.numel() - 1

    @property
    def tokens(self) -> Tensor:
        """Token of each entry, shape `(nnz,)`."""
        tokens = torch.arange(self.num_tokens, device=self.offsets.device)
        return tokens.repeat_interleave(self.offsets.diff(), output_size=self.indices.numel())

    def to_dense(self) -> Tensor:
        """Activations of shape (N, F)."""
        dense = self.values.new_zeros(self.num_tokens, self.num_features)
        return dense.index_put((self.tokens, self.indices), self.values)


@dataclass
class SparseFeatures:
    """
    The features of all source layers.

    Args:
        layers (`list[LayerFeatures]`): One entry per source layer, all on the same N tokens.
        batch_shape (`torch.Size`): The leading dimensions of the input; their product is N.
    """

    layers: list[LayerFeatures]
    batch_shape: torch.Size

    def to_dense(self) -> Tensor:
        """Activations of shape (..., L, F)."""
        dense = torch.stack([layer.to_dense() for layer in self.layers], dim=1)
        return dense.view(*self.batch_shape, *dense.shape[1:])

    def active_counts(self) -> Tensor:
        """Number of tokens on which each feature is active, (L, F) int64."""
        return torch.stack(
            [
                torch.bincount(layer.indices[layer.values.detach() > 0], minlength=layer.num_features)
                for layer in self.layers
            ]
        )

    def l0_per_layer(self) -> Tensor:
        """Mean number of active features per token in each layer, (L,) float32."""
        active = torch.stack([(layer.values.detach() > 0).sum() for layer in self.layers])
        return active.float() / max(1, self.layers[0].num_tokens)


def features_at(values: Tensor, support: Tensor) -> LayerFeatures:
    """
    Takes the entries of `values` (N, F) at the true entries of `support` (N, F); differentiable in `values`.
    """
    flat = support.flatten().nonzero().squeeze(1)
    offsets = torch.zeros(support.shape[0] + 1, dtype=torch.int64, device=support.device)
    torch.cumsum(support.sum(dim=1), dim=0, out=offsets[1:])
    return LayerFeatures(values.flatten()[flat], flat % support.shape[1], offsets, support.shape[1])


def sparse_from_dense(acts: Tensor) -> SparseFeatures:
    """Sparse form of dense activations (..., L, F)."""
    rows = acts.reshape(-1, *acts.shape[-2:])
    return SparseFeatures([features_at(rows[:, s], rows[:, s] != 0) for s in range(rows.shape[1])], acts.shape[:-2])


class JumpReLU(torch.autograd.Function):
    """
    a = h · 1[h > θ], with the straight-through gradient of Rajamanoharan et al. 2024 for θ:
    ∂a/∂h = 1[h > θ], ∂a/∂θ = -(θ/ε) · 1[|h - θ| < ε/2] with ε the bandwidth. All tensors have the same shape.
    """

    @staticmethod
    def forward(ctx, pre_activation, threshold, bandwidth):
        ctx.save_for_backward(pre_activation, threshold)
        ctx.bandwidth = bandwidth
        return pre_activation * (pre_activation > threshold)

    @staticmethod
    def backward(ctx, grad):
        pre_activation, threshold = ctx.saved_tensors
        inside = (pre_activation - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = -(threshold / ctx.bandwidth) * inside * grad
        return grad * (pre_activation > threshold), grad_threshold.to(threshold.dtype), None


def topk_support(pre_activations: list[Tensor], k: int, scope: str) -> list[Tensor]:
    """
    Where the k largest pre-activations of each token are.

    Args:
        pre_activations: One (N, F) tensor per layer.
        k: Budget per layer and token.
        scope: "layer" selects k in each layer, "token" selects k·L over all layers of a token.

    Returns:
        One (N, F) bool tensor per layer, k (or together k·L) entries of each row true.
    """
    if scope == "layer":
        supports = []
        for h in pre_activations:
            support = torch.zeros_like(h, dtype=torch.bool)
            supports.append(support.scatter_(1, h.topk(k, dim=1, sorted=False).indices, True))
        return supports
    all_layers = topk_support([torch.cat(pre_activations, dim=1)], k * len(pre_activations), "layer")[0]
    return list(all_layers.split(pre_activations[0].shape[1], dim=1))


def batchtopk_support(pre_activations: list[Tensor], k: int, scope: str) -> list[Tensor]:
    """
    Where the k·N largest pre-activations of the batch are (Bussmann et al. 2024).

    Args:
        pre_activations: One (N, F) tensor per layer.
        k: Mean number of selected features per layer and token.
        scope: "layer" selects k·N in each layer, "token" selects k·L·N over all layers.

    Returns:
        One (N, F) bool tensor per layer with k·N (or together k·L·N) true entries.
    """
    if scope == "layer":
        supports = []
        for h in pre_activations:
            support = torch.zeros(h.numel(), dtype=torch.bool, device=h.device)
            support[largest(h.flatten(), k * h.shape[0])] = True
            supports.append(support.view_as(h))
        return supports
    all_layers = batchtopk_support([torch.cat(pre_activations, dim=1)], k * len(pre_activations), "layer")[0]
    return list(all_layers.split(pre_activations[0].shape[1], dim=1))


def largest(values: Tensor, count: int) -> Tensor:
    """
    Positions of exactly the `count` largest entries of a vector, in no particular order.

    A sample bounds the cut from below, so that the selection itself only sees the few entries above the bound; where
    the sample misleads (too few entries above it), the whole vector is searched, so the result is always exact.
    """
    size = values.numel()
    if size > 16 * count and size > 100_000:
        sample = values[:: size // 20_000]
        keep = min(sample.numel(), int(1.5 * sample.numel() * count / size) + 20)
        candidates = (values >= sample.topk(keep, sorted=False).values.min()).nonzero().squeeze(1)
        if candidates.numel() >= count:
            return candidates[values[candidates].topk(count, sorted=False).indices]
    return values.topk(count, sorted=False).indices


__all__ = [
    "JumpReLU",
    "LayerFeatures",
    "SparseFeatures",
    "batchtopk_support",
    "features_at",
    "largest",
    "sparse_from_dense",
    "topk_support",
]
