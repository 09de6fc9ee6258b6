"""
The four activation functions, and the sparse form of feature activations.

Every activation function is written in two steps, so that nothing that is zero has to be computed afterwards: a
selection says *where* an activation or its gradient can be non-zero (the `positions_*` functions), an elementwise
function says *what* stands there.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


GROUP = 16  # entries whose maximum stands for them in the first round of an exact top-k
WORD = 8  # flags that are searched at once, as one int64


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

    @cached_property
    def tokens(self) -> Tensor:
        """Token of each entry, shape `(nnz,)`."""
        tokens = torch.arange(self.num_tokens, device=self.offsets.device)
        return tokens.repeat_interleave(self.offsets.diff(), output_size=self.indices.numel())

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """
        The posting lists: the order of the entries by feature, shape `(nnz,)`, tokens ascending within a feature; and
        the offsets (F + 1,) of each feature's entries in this order.
        """
        indices = self.indices
        offsets = torch.zeros(self.num_features + 1, dtype=torch.int64, device=indices.device)
        torch.cumsum(count_by_feature(indices, self.num_features), dim=0, out=offsets[1:])
        if indices.device.type == "cpu" and self.num_features <= 2**16:
            # numpy sorts 16-bit numbers by radix, several times faster.
            order = torch.from_numpy(np.argsort(indices.numpy().astype(np.uint16), kind="stable"))
        else:
            order = indices.argsort(stable=True)
        return order, offsets

    def dense(self, values: Tensor) -> Tensor:
        """(N, F) with `values` (nnz,) at the listed entries and 0 elsewhere."""
        dense = values.new_zeros(self.num_tokens, self.num_features)
        return dense.index_put((self.tokens, self.indices), values)

    def to_dense(self) -> Tensor:
        """Activations of shape (N, F)."""
        return self.dense(self.values)

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
            [count_by_feature(layer.indices, layer.num_features, layer.values.detach() > 0) for layer in self.layers]
        )

    def l0_per_layer(self) -> Tensor:
        """Mean number of active features per token in each layer, (L,) float32."""
        active = torch.stack([(layer.values.detach() > 0).sum() for layer in self.layers])
        return active.float() / max(1, self.layers[0].num_tokens)


def count_by_feature(indices: Tensor, num_features: int, counted: Tensor | None = None) -> Tensor:
    """Number of entries of each feature, (F,) int64, or of its `counted` ones. (`bincount` would wait for a GPU.)"""
    ones = torch.ones_like(indices) if counted is None else counted.to(torch.int64)
    return torch.zeros(num_features, dtype=torch.int64, device=indices.device).index_add_(0, indices, ones)


def entries_at(values: Tensor, positions: Tensor) -> LayerFeatures:
    """The entries of `values` (N, F) at ascending flat `positions` (nnz,); differentiable in `values`."""
    num_tokens, num_features = values.shape
    starts = torch.arange(num_tokens + 1, device=values.device) * num_features
    return LayerFeatures(
        values.flatten()[positions], positions % num_features, torch.searchsorted(positions, starts), num_features
    )


def features_at(values: Tensor, support: Tensor) -> LayerFeatures:
    """The entries of `values` (N, F) at the true entries of `support` (N, F); differentiable in `values`."""
    return entries_at(values, true_positions(support))


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


class AtEntries(torch.autograd.Function):
    """
    vector[indices] of a vector with one value per feature, (F,) to (nnz,). Its gradient is summed over each feature's
    entries in a fixed order, so that it is the same in every run.
    """

    @staticmethod
    def forward(ctx, vector: Tensor, features: LayerFeatures) -> Tensor:
        ctx.features = features
        return vector[features.indices]

    @staticmethod
    def backward(ctx, grad):
        return sum_by_feature(ctx.features, grad), None


def sum_by_feature(features: LayerFeatures, values: Tensor) -> Tensor:
    """Σ over the entries of each feature of `values` (nnz,), (F,)."""
    order, offsets = features.by_feature
    return torch.segment_reduce(values[order], "sum", offsets=offsets, initial=0)


def true_positions(mask: Tensor) -> Tensor:
    """
    Flat positions of the true entries of a bool tensor, ascending.

    On a CPU, where `nonzero` looks at one entry after the other, eight flags at a time are compared with zero.
    """
    flat = mask.flatten()
    if flat.device.type != "cpu" or flat.numel() % WORD:
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64).nonzero()
    if words.numel() > flat.numel() // (4 * WORD):  # crowded: looking at the words was in vain
        return flat.nonzero().squeeze(1)
    positions = (words * WORD + torch.arange(WORD)).flatten()
    return positions[flat[positions]]


def positions_topk(h: Tensor, k: int) -> Tensor:
    """
    Flat positions of the k largest entries of each row of `h` (N, F), ascending, k·N in all.
    """
    num_tokens, num_features = h.shape
    width = num_features // GROUP
    if num_features % GROUP or k * GROUP > num_features // 2:
        columns = h.topk(k, dim=1, sorted=False).indices
    else:
        # Exact in two rounds: an entry among the k largest lies in one of the k groups with the largest maxima. A
        # group is every `width`-th column, so that the maxima are taken over whole rows at a time.
        groups = h.view(num_tokens, GROUP, width).amax(dim=1).topk(k, dim=1, sorted=False).indices
        members = torch.arange(0, num_features, width, device=h.device)
        candidates = (groups[:, None, :] + members[:, None]).flatten(1)
        best = h.gather(1, candidates).topk(k, dim=1, sorted=False).indices
        columns = candidates.gather(1, best)
    starts = torch.arange(num_tokens, device=h.device) * num_features
    return (columns.sort(dim=1).values + starts[:, None]).flatten()


def positions_batchtopk(h: Tensor, count: int) -> Tensor:
    """Flat positions of the `count` largest entries of `h` (N, F) (Bussmann et al. 2024), ascending."""
    return largest(h.flatten(), count).sort().values


def topk_over_layers(candidates: list[LayerFeatures], k: int) -> list[LayerFeatures]:
    """
    The k largest entries of each token over all layers, from the k largest of each layer (every token has as many).
    """
    if candidates[0].num_tokens == 0:
        return candidates
    rows = [layer.values.view(layer.num_tokens, -1) for layer in candidates]
    chosen = torch.cat(rows, dim=1).topk(k, dim=1, sorted=False).indices
    kept = torch.zeros_like(torch.cat(rows, dim=1), dtype=torch.bool).scatter_(1, chosen, True)
    kept = kept.split([row.shape[1] for row in rows], dim=1)
    return [layer.take(true_positions(mask)) for layer, mask in zip(candidates, kept, strict=True)]


def batchtopk_over_layers(candidates: list[LayerFeatures], count: int) -> list[LayerFeatures]:
    """The `count` largest entries of the batch over all layers, from the `count` largest of each layer."""
    values = torch.cat([layer.values for layer in candidates])
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[largest(values, count)] = True
    kept = kept.split([layer.values.numel() for layer in candidates])
    return [layer.take(true_positions(mask)) for layer, mask in zip(candidates, kept, strict=True)]


def largest(values: Tensor, count: int) -> Tensor:
    """
    Positions of exactly the `count` largest entries of a vector, in no particular order.

    A sample bounds the cut from below, so that the selection itself only sees the few entries above the bound; where
    the sample misleads (too few entries above it), the whole vector is searched, so the result is always exact. On a
    GPU, where a selection is one fast operation and counting the candidates would wait for it, there is no sample.
    """
    size = values.numel()
    if values.device.type == "cpu" and size > 16 * count and size > 100_000:
        sample = values[:: size // 20_000]
        keep = min(sample.numel(), int(1.5 * sample.numel() * count / size) + 20)
        candidates = true_positions(values >= sample.topk(keep, sorted=False).values.min())
        if candidates.numel() >= count:
            return candidates[values[candidates].topk(count, sorted=False).indices]
    return values.topk(count, sorted=False).indices


__all__ = [
    "AtEntries",
    "JumpReLU",
    "LayerFeatures",
    "SparseFeatures",
    "batchtopk_over_layers",
    "entries_at",
    "features_at",
    "largest",
    "positions_batchtopk",
    "positions_topk",
    "sparse_from_dense",
    "sum_by_feature",
    "topk_over_layers",
    "true_positions",
]
