"""
The sparse form of feature activations, and the four activation functions on it.

Every activation function has two steps, so that nothing that is zero has to be computed afterwards: a selection says
*where* an activation or its gradient can be non-zero (`selection.select`), an elementwise function says *what* stands
there (`activate`).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .configuration_clt import CLTConfig


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
        first (`tuple[int, int]`, *optional*): Where the rows of dead features begin, see [`with_dead`]: their first
            row (N) and their first entry. None: there are none.
        orders (`dict`): What follows from indices and offsets, found once for all values at these entries.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    num_features: int
    first: tuple[int, int] | None = None
    orders: dict = field(default_factory=dict, repr=False, compare=False)

    def with_values(self, values: Tensor) -> "LayerFeatures":
        """
        The same entries with other values. Autograd functions keep the features that they were given; were their
        result put into the same object, it would refer to itself through the graph, which is never freed.
        """
        return replace(self, values=values)

    @property
    def num_tokens(self) -> int:
        return self.offsets.numel() - 1

    @property
    def tokens(self) -> Tensor:
        """Token of each entry, shape `(nnz,)`."""
        if "tokens" not in self.orders:
            tokens = torch.arange(self.num_tokens, device=self.offsets.device)
            tokens = tokens.repeat_interleave(self.offsets.diff(), output_size=self.indices.numel())
            self.orders["tokens"] = tokens
        return self.orders["tokens"]

    @property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """
        The posting lists: the order of the entries by feature, shape `(nnz,)`, tokens ascending within a feature; and
        the offsets (F + 1,) of each feature's entries in this order.
        """
        if "by_feature" not in self.orders:
            order = stable_order(self.indices, self.num_features)
            self.orders["by_feature"] = order, offsets_of(self.indices, self.num_features)
        return self.orders["by_feature"]

    def dense(self, values: Tensor) -> Tensor:
        """(N, F) with `values` (nnz,) at the listed entries and 0 elsewhere."""
        dense = values.new_zeros(self.num_tokens, self.num_features)
        return dense.index_put((self.tokens, self.indices), values)

    def to_dense(self) -> Tensor:
        """Activations of shape (N, F)."""
        return self.dense(self.values)

    def with_dead(self, dead: "LayerFeatures") -> "LayerFeatures":
        """2 N rows: these, and below them the dead features of the same N tokens, which are to be revived."""
        return LayerFeatures(
            values=torch.cat([self.values, dead.values]),
            indices=torch.cat([self.indices, dead.indices]),
            offsets=torch.cat([self.offsets, dead.offsets[1:] + self.indices.numel()]),
            num_features=self.num_features,
            first=(self.num_tokens, self.indices.numel()),
        )

    def without_dead(self) -> "LayerFeatures":
        """The first N rows, without the dead features below them."""
        if self.first is None:
            return self
        tokens, entries = self.first
        values, _ = self.values.split([entries, len(self.values) - entries])
        return LayerFeatures(values, self.indices[:entries], self.offsets[: tokens + 1], self.num_features)

    def take(self, entries: Tensor) -> "LayerFeatures":
        """Only the given entries, a vector of ascending numbers below nnz."""
        offsets = torch.searchsorted(entries, self.offsets)
        return LayerFeatures(self.values[entries], self.indices[entries], offsets, self.num_features)


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
            [counts_of(layer.indices, layer.num_features, layer.values.detach() > 0) for layer in self.layers]
        )

    def l0_per_layer(self) -> Tensor:
        """Mean number of active features per token in each layer, (L,) float32."""
        active = torch.stack([(layer.values.detach() > 0).sum() for layer in self.layers])
        return active.float() / max(1, self.layers[0].num_tokens)


def counts_of(indices: Tensor, size: int, counted: Tensor | None = None) -> Tensor:
    """How often each index below `size` occurs, (size,) int64, or is `counted`. (`bincount` would wait for a GPU.)"""
    ones = torch.ones_like(indices) if counted is None else counted.to(torch.int64)
    return torch.zeros(size, dtype=torch.int64, device=indices.device).index_add_(0, indices, ones)


def offsets_of(indices: Tensor, size: int) -> Tensor:
    """Where each index below `size` begins when the entries are in ascending order of `indices`, (size + 1,) int64."""
    offsets = torch.zeros(size + 1, dtype=torch.int64, device=indices.device)
    torch.cumsum(counts_of(indices, size), dim=0, out=offsets[1:])
    return offsets


def stable_order(indices: Tensor, size: int) -> Tensor:
    """The stable ascending order of `indices` (nnz,), which are below `size`."""
    if indices.device.type == "cpu" and size <= 2**16:
        # numpy sorts 16-bit numbers by radix, several times faster.
        return torch.from_numpy(np.argsort(indices.numpy().astype(np.uint16), kind="stable"))
    return indices.argsort(stable=True)


def is_stored_by_feature(values: Tensor) -> bool:
    """Whether the memory of `values` (N, F) is an (F, N) matrix, as that of [`encode_dense`] on a CPU is."""
    return values.T.is_contiguous() and not values.is_contiguous()


def in_storage_order(values: Tensor) -> Tensor:
    """`values` (N, F) as a vector: token by token, or feature by feature where they are stored so."""
    return values.T.flatten() if is_stored_by_feature(values) else values.flatten()


def entries_at(values: Tensor, positions: Tensor) -> LayerFeatures:
    """
    The entries of `values` (N, F) at ascending flat `positions` (nnz,) in storage order; differentiable in `values`.
    """
    num_tokens, num_features = values.shape
    chosen = in_storage_order(values)[positions]
    if not is_stored_by_feature(values):
        starts = torch.arange(num_tokens + 1, device=values.device) * num_features
        return LayerFeatures(chosen, positions % num_features, torch.searchsorted(positions, starts), num_features)
    # The positions are the posting lists already; what has to be found is the order by token.
    indices, tokens = positions // num_tokens, positions % num_tokens
    order = stable_order(tokens, num_tokens)
    features = LayerFeatures(chosen[order], indices[order], offsets_of(tokens, num_tokens), num_features)
    by_feature = torch.empty_like(order)
    by_feature[order] = torch.arange(len(order), device=order.device)
    features.orders["by_feature"] = by_feature, offsets_of(indices, num_features)
    return features


def features_at(values: Tensor, support: Tensor) -> LayerFeatures:
    """The entries of `values` (N, F) at the true entries of `support` (N, F); differentiable in `values`."""
    return entries_at(values, true_positions(support.T if is_stored_by_feature(values) else support))


def columns_of(values: Tensor, features: Tensor) -> Tensor:
    """`values[:, features]` of (N, F), stored as `values` is."""
    return values.T[features].T if is_stored_by_feature(values) else values[:, features]


def sparse_from_dense(acts: Tensor) -> SparseFeatures:
    """Sparse form of dense activations (..., L, F)."""
    rows = acts.reshape(-1, *acts.shape[-2:])
    return SparseFeatures([features_at(rows[:, s], rows[:, s] != 0) for s in range(rows.shape[1])], acts.shape[:-2])


def in_window(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The straight-through window of jumprelu: where ∂a/∂θ is not 0."""
    return (h - threshold).abs() < bandwidth / 2


def window_floor(threshold: Tensor, bandwidth: float) -> Tensor:
    """What h exceeds wherever [`in_window`]; entries below it are never listed, so the two change together."""
    return threshold.detach() - bandwidth / 2


class JumpReLU(torch.autograd.Function):
    """
    a = h · 1[h > θ], with the straight-through gradient of Rajamanoharan et al. 2024 for θ:
    ∂a/∂h = 1[h > θ], ∂a/∂θ = -(θ/ε) · 1[|h - θ| < ε/2] with ε the bandwidth. All tensors have the same shape.
    """

    @staticmethod
    def forward(ctx: Any, pre_activation: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_activation, threshold)
        ctx.bandwidth = bandwidth
        return pre_activation * (pre_activation > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_activation, threshold = ctx.saved_tensors
        inside = in_window(pre_activation, threshold, ctx.bandwidth)
        grad_threshold = -(threshold / ctx.bandwidth) * inside * grad
        return grad * (pre_activation > threshold), grad_threshold.to(threshold.dtype), None


class AtEntries(torch.autograd.Function):
    """
    vector[indices] of a vector with one value per feature, (F,) to (nnz,). Its gradient is summed over each feature's
    entries in a fixed order, so that it is the same in every run.
    """

    @staticmethod
    def forward(ctx: Any, vector: Tensor, features: LayerFeatures) -> Tensor:
        ctx.features = features
        return vector[features.indices]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_by_feature(ctx.features, grad), None


def sum_by_feature(features: LayerFeatures, values: Tensor) -> Tensor:
    """Σ over the entries of each feature of `values` (nnz,), (F,)."""
    order, offsets = features.by_feature
    return torch.segment_reduce(values[order], "sum", offsets=offsets, initial=0)


def true_positions(mask: Tensor) -> Tensor:
    """Flat positions of the true entries of a bool tensor, ascending. (On a CPU numpy looks at many at a time.)"""
    flat = mask.flatten()
    if flat.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flat.numpy()))
    return flat.nonzero().squeeze(1)


def activate(h: LayerFeatures, theta: Tensor | float, config: CLTConfig, training: bool) -> LayerFeatures:
    """
    The activation function at selected pre-activations, its threshold included: after a rough product (autocast) they
    were computed again, and what was above it may be below.

    Args:
        h: The selected entries of one layer.
        theta: (F,) for jumprelu, (1,) for batchtopk; else not read.
        config: Names the activation function.
        training: Whether it is that of training, where batchtopk has no threshold.
    """
    if config.activation_fn == "jumprelu":
        return h.with_values(JumpReLU.apply(h.values, AtEntries.apply(theta, h), config.jumprelu_bandwidth))
    values = torch.relu(h.values)
    if config.activation_fn == "batchtopk" and not training:
        passes = values > theta
        if h.first is not None:  # the dead features are revived whatever the threshold is
            passes[h.first[1] :] = True
        values = values * passes
    return h.with_values(values)
