"""
The sparse form of feature activations, and the four activation functions on it.

Every activation function has two steps, so that nothing that is zero has to be computed afterwards: a selection says
*where* an activation or its gradient can be non-zero (`selection.select`), an elementwise function says *what* stands
there (`activate`).
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .configuration_clt import CLTConfig


@dataclass
class LayerFeatures:
    """
    The features of one source layer on N tokens, in compressed-row form; or of several, one after another, as a GPU
    works on them: row b · N + n is token n in the b-th of B layers, b · F + f its feature f.

    Args:
        values (`Tensor` of shape `(nnz,)`): Activations. Zeros may occur: jumprelu lists features inside the
            straight-through window, which are inactive but receive gradient.
        indices (`Tensor` of shape `(nnz,)`, int64): Feature of each entry, ascending within a row.
        offsets (`Tensor` of shape `(B · N + 1,)`, int64): Row r owns the entries `offsets[r]` to `offsets[r + 1]`.
        num_features (`int`): B · F.
        num_layers (`int`): B.
        first (`tuple[int, int]`, *optional*): Where the rows of dead features begin, see [`with_dead`]: their first
            row (B · N) and their first entry. None: there are none.
        is_even (`bool`): Whether each layer has as many entries, so that nobody has to ask a GPU where each begins.
        orders (`dict`): What follows from indices and offsets, found once for all values at these entries.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    num_features: int
    num_layers: int = 1
    first: tuple[int, int] | None = None
    is_even: bool = False
    orders: dict = field(default_factory=dict, repr=False, compare=False)

    def with_values(self, values: Tensor) -> "LayerFeatures":
        """
        The same entries with other values. Autograd functions keep the features that they were given; were their
        result put into the same object, it would refer to itself through the graph, which is never freed.
        """
        return replace(self, values=values)

    @property
    def num_rows(self) -> int:
        return self.offsets.numel() - 1

    @property
    def num_tokens(self) -> int:
        """N, without the rows of dead features."""
        return (self.num_rows if self.first is None else self.first[0]) // self.num_layers

    @property
    def rows(self) -> Tensor:
        """Row of each entry, shape `(nnz,)`."""
        if "rows" not in self.orders:
            rows = torch.arange(self.num_rows, device=self.offsets.device)
            self.orders["rows"] = rows.repeat_interleave(self.offsets.diff(), output_size=self.indices.numel())
        return self.orders["rows"]

    @property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """
        The posting lists: the order of the entries by feature, shape `(nnz,)`, rows ascending within a feature; and
        the offsets (B · F + 1,) of each feature's entries in this order.
        """
        if "by_feature" not in self.orders:
            self.orders["by_feature"] = stable_order(self.indices, self.num_features)
        return self.orders["by_feature"]

    def dense(self, values: Tensor) -> Tensor:
        """Of one layer: (N, F) with `values` (nnz,) at the listed entries and 0 elsewhere."""
        dense = values.new_zeros(self.num_rows, self.num_features)
        return dense.index_put((self.rows, self.indices), values)

    def to_dense(self) -> Tensor:
        """Activations of one layer, (N, F)."""
        return self.dense(self.values)

    def with_dead(self, dead: "LayerFeatures") -> "LayerFeatures":
        """Twice the rows: these, and below them the dead features of the same tokens, which are to be revived."""
        return replace(
            self,
            values=torch.cat([self.values, dead.values]),
            indices=torch.cat([self.indices, dead.indices]),
            offsets=torch.cat([self.offsets, dead.offsets[1:] + self.indices.numel()]),
            first=(self.num_rows, self.indices.numel()),
            is_even=self.is_even and dead.is_even,
            orders={},
        )

    def halves(self) -> "tuple[LayerFeatures, LayerFeatures | None]":
        """The rows without the dead features below them, and these."""
        if self.first is None:
            return self, None
        (rows, entries), offsets = self.first, self.offsets
        parts = zip(
            self.values.split([entries, len(self.values) - entries]),
            (self.indices[:entries], self.indices[entries:]),
            (offsets[: rows + 1], offsets[rows:] - entries),
            strict=True,
        )
        own, dead = (LayerFeatures(*part, self.num_features, self.num_layers, is_even=self.is_even) for part in parts)
        return own, dead

    def by_layer(self) -> "list[LayerFeatures]":
        """The features of each layer. (Of several a GPU is asked where each begins, unless they are even.)"""
        if self.num_layers == 1:
            return [self]
        own, dead = self.halves()
        if dead is not None:
            return [a.with_dead(b) for a, b in zip(own.by_layer(), dead.by_layer(), strict=True)]
        num_tokens, num_features = self.num_tokens, self.num_features // self.num_layers
        if self.is_even or num_tokens == 0:
            starts = [b * len(self.indices) // self.num_layers for b in range(self.num_layers + 1)]
        else:
            starts = self.offsets[::num_tokens].tolist()
        values = self.values.split([end - start for start, end in pairwise(starts)])
        return [
            LayerFeatures(
                values[b],
                self.indices[starts[b] : starts[b + 1]] - b * num_features,
                self.offsets[b * num_tokens : (b + 1) * num_tokens + 1] - starts[b],
                num_features,
            )
            for b in range(self.num_layers)
        ]

    def take(self, entries: Tensor) -> "LayerFeatures":
        """Only the given entries, a vector of ascending numbers below nnz."""
        offsets = torch.searchsorted(entries, self.offsets)
        return LayerFeatures(self.values[entries], self.indices[entries], offsets, self.num_features, self.num_layers)


@dataclass
class SparseFeatures:
    """
    The features of all source layers.

    Args:
        blocks (`list[LayerFeatures]`): Of consecutive layers each, all on the same N tokens.
        batch_shape (`torch.Size`): The leading dimensions of the input; their product is N.
    """

    blocks: list[LayerFeatures]
    batch_shape: torch.Size

    @cached_property
    def layers(self) -> list[LayerFeatures]:
        """One entry per source layer."""
        return [layer for block in self.blocks for layer in block.by_layer()]

    def to_dense(self) -> Tensor:
        """Activations of shape (..., L, F)."""
        dense = torch.stack([layer.to_dense() for layer in self.layers], dim=1)
        return dense.view(*self.batch_shape, *dense.shape[1:])

    def active_counts(self) -> Tensor:
        """Number of tokens on which each feature is active, (L, F) int64."""
        counts = [counts_of(block.indices, block.num_features, block.values.detach() > 0) for block in self.blocks]
        return torch.cat(counts).view(sum(block.num_layers for block in self.blocks), -1)

    def l0_per_layer(self) -> Tensor:
        """Mean number of active features per token in each layer, (L,) float32."""
        return self.active_counts().sum(dim=1).float() / max(1, self.blocks[0].num_tokens)


def counts_of(indices: Tensor, size: int, counted: Tensor | None = None) -> Tensor:
    """How often each index below `size` occurs, (size,) int64, or is `counted`. (`bincount` would wait for a GPU.)"""
    ones = torch.ones_like(indices) if counted is None else counted.to(torch.int64)
    return torch.zeros(size, dtype=torch.int64, device=indices.device).index_add_(0, indices, ones)


def offsets_of(indices: Tensor, size: int) -> Tensor:
    """Where each index below `size` begins when the entries are in ascending order of `indices`, (size + 1,) int64."""
    offsets = torch.zeros(size + 1, dtype=torch.int64, device=indices.device)
    torch.cumsum(counts_of(indices, size), dim=0, out=offsets[1:])
    return offsets


def stable_order(indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """
    The stable ascending order of `indices` (nnz,), which are below `size`, and where each index begins in it,
    (size + 1,) int64.
    """
    if indices.device.type == "cpu":
        if size > 2**16:
            order = indices.argsort(stable=True)
        else:  # numpy sorts 16-bit numbers by radix, several times faster
            order = torch.from_numpy(np.argsort(indices.numpy().astype(np.uint16), kind="stable"))
        return order, offsets_of(indices, size)
    dtype = torch.int32 if size < 2**31 else torch.int64  # half the passes of a GPU's sort
    found, order = indices.to(dtype).sort(stable=True)
    return order, torch.searchsorted(found, torch.arange(size + 1, dtype=dtype, device=indices.device))


def is_stored_by_feature(values: Tensor) -> bool:
    """Whether the memory of `values` (N, F) is an (F, N) matrix, as that of [`encode_dense`] on a CPU is."""
    return values.T.is_contiguous() and not values.is_contiguous()


def in_storage_order(values: Tensor) -> Tensor:
    """`values` (N, F) as a vector: token by token, or feature by feature where they are stored so."""
    return values.T.flatten() if is_stored_by_feature(values) else values.flatten()


def entries_at(values: Tensor, positions: Tensor, num_layers: int = 1, offsets: Tensor | None = None) -> LayerFeatures:
    """
    The entries of `values` (B · N, F), of B layers, at ascending flat `positions` (nnz,) in storage order;
    differentiable in `values`. `offsets`, (B · N + 1,), if known, where values are stored row by row.
    """
    num_tokens, num_features = len(values) // num_layers, values.shape[1]
    chosen = in_storage_order(values)[positions]
    if not is_stored_by_feature(values):
        rows = positions // max(1, num_features)
        indices = positions - (rows if num_layers == 1 else rows - rows // max(1, num_tokens)) * num_features
        if offsets is None:
            starts = torch.arange(len(values) + 1, device=values.device) * num_features
            offsets = torch.searchsorted(positions, starts)
        found = LayerFeatures(chosen, indices, offsets, num_layers * num_features, num_layers)
        found.orders["rows"] = rows
        return found
    # The positions are the posting lists already; what has to be found is the order by token.
    indices, tokens = positions // num_tokens, positions % num_tokens
    order, offsets = stable_order(tokens, num_tokens)
    features = LayerFeatures(chosen[order], indices[order], offsets, num_features)
    by_feature = torch.empty_like(order)
    by_feature[order] = torch.arange(len(order), device=order.device)
    features.orders["by_feature"] = by_feature, offsets_of(indices, num_features)
    return features


def features_at(values: Tensor, support: Tensor, num_layers: int = 1) -> LayerFeatures:
    """The entries of `values` (B · N, F) at the true entries of `support`; differentiable in `values`."""
    return entries_at(values, true_positions(support.T if is_stored_by_feature(values) else support), num_layers)


def join(blocks: list[LayerFeatures]) -> LayerFeatures:
    """The features of consecutive layers as one block."""
    if len(blocks) == 1:
        return blocks[0]
    entries = [0, *accumulate(block.indices.numel() for block in blocks)]
    features = [0, *accumulate(block.num_features for block in blocks)]
    num_layers = sum(block.num_layers for block in blocks)
    return LayerFeatures(
        torch.cat([block.values for block in blocks]),
        torch.cat([block.indices + features[i] for i, block in enumerate(blocks)]),
        torch.cat([blocks[0].offsets[:1], *(block.offsets[1:] + entries[i] for i, block in enumerate(blocks))]),
        features[-1],
        num_layers,
        is_even=all(b.is_even and b.indices.numel() * num_layers == entries[-1] * b.num_layers for b in blocks),
    )


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
        h: The selected entries of B layers.
        theta: (B · F,) for jumprelu, (B,) for batchtopk; else not read.
        config: Names the activation function.
        training: Whether it is that of training, where batchtopk has no threshold.
    """
    if config.activation_fn == "jumprelu":
        return h.with_values(JumpReLU.apply(h.values, AtEntries.apply(theta, h), config.jumprelu_bandwidth))
    values = torch.relu(h.values)
    if config.activation_fn == "batchtopk" and not training:
        if h.num_layers > 1:
            theta = theta[h.indices // (h.num_features // h.num_layers)]
        passes = values > theta
        if h.first is not None:  # the dead features are revived whatever the threshold is
            passes[h.first[1] :] = True
        values = values * passes
    return h.with_values(values)
