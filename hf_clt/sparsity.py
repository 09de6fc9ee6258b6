"""
The four activation functions, and the sparse form of feature activations.

Every activation function is written in two steps, so that nothing that is zero has to be computed afterwards: a
selection says *where* an activation or its gradient can be non-zero (the `positions_*` functions), an elementwise
function says *what* stands there.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .sharding import FeatureShard, gather_candidates


GROUPS = (64, 32, 16)  # entries whose maximum stands for them in the first round of an exact top-k


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
        orders (`dict`): What follows from indices and offsets, found once for all values at these entries.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    num_features: int
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

    def followed_by(self, other: "LayerFeatures") -> "LayerFeatures":
        """The features of these N tokens, and then `other`'s as those of further tokens."""
        return LayerFeatures(
            values=torch.cat([self.values, other.values]),
            indices=torch.cat([self.indices, other.indices]),
            offsets=torch.cat([self.offsets, other.offsets[1:] + self.indices.numel()]),
            num_features=self.num_features,
        )

    def parted(self, num_tokens: int, num_entries: int) -> tuple["LayerFeatures", "LayerFeatures | None"]:
        """The first tokens, with the first so many entries, and the others; None where there are no others."""
        if num_tokens == self.num_tokens:
            return self, None
        sizes = [num_entries, self.indices.numel() - num_entries]
        values, indices = self.values.split(sizes), self.indices.split(sizes)
        offsets = self.offsets[: num_tokens + 1], self.offsets[num_tokens:] - num_entries
        return tuple(LayerFeatures(*part, self.num_features) for part in zip(values, indices, offsets, strict=True))

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
    """Flat positions of the true entries of a bool tensor, ascending. (On a CPU numpy looks at many at a time.)"""
    flat = mask.flatten()
    if flat.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flat.numpy()))
    return flat.nonzero().squeeze(1)


def ascending(positions: Tensor, size: int) -> Tensor:
    """Different positions below `size`, sorted: on a CPU by marking and collecting, faster where they are many."""
    if positions.device.type != "cpu":
        return positions.sort().values
    mask = torch.zeros(size, dtype=torch.bool)
    mask[positions] = True
    return true_positions(mask)


def positions_topk(h: Tensor, k: int) -> Tensor:
    """
    Flat positions, in storage order, of the k largest entries of each row of `h` (N, F), ascending, k·N in all.

    Exact in two rounds: an entry among the k largest lies in one of the k groups with the largest maxima.
    """
    num_tokens, num_features = h.shape
    by_feature = is_stored_by_feature(h)
    sizes = [size for size in GROUPS if num_features % size == 0 and 0 < k * size <= num_features // 2]
    if sizes and by_feature and h.dtype in (torch.float32, torch.float64):
        positions = _positions_topk_above_cut(h.T, k, max(sizes))
        if positions is not None:
            return positions
    if not sizes:
        columns = h.topk(k, dim=1, sorted=False).indices
    else:
        size = min(sizes, key=lambda size: num_features / size + k * size)  # entries seen in both rounds
        # A group is every `width`-th column, so that the maxima are taken over whole rows at a time.
        width = num_features // size
        groups = h.reshape(num_tokens, size, width).amax(dim=1).topk(k, dim=1, sorted=False).indices
        members = torch.arange(0, num_features, width, device=h.device)
        candidates = (groups[:, None, :] + members[:, None]).flatten(1)
        best = h.gather(1, candidates).topk(k, dim=1, sorted=False).indices
        columns = candidates.gather(1, best)
    tokens = torch.arange(num_tokens, device=h.device)[:, None]
    if by_feature:
        return ascending((columns * num_tokens + tokens).flatten(), h.numel())
    return (columns.sort(dim=1).values + tokens * num_features).flatten()


def _positions_topk_above_cut(h: Tensor, k: int, size: int) -> Tensor | None:
    """
    [`positions_topk`] of `h` (F, N), on a CPU: the k-th largest maximum of a token's groups of `size` features is a
    cut that hardly more than k of its entries reach, and these are ranked. None where ties or NaN leave more or fewer
    than k.
    """
    num_features, num_tokens = h.shape
    cut = kth_largest(h.view(num_features // size, size, num_tokens).amax(dim=1).T, k)
    below = np.less(h.numpy(), cut.numpy())  # NaN is not, and is ranked above all, as topk does
    candidates = true_positions(torch.from_numpy(np.logical_not(below, out=below)))
    tokens = candidates % num_tokens
    counts = counts_of(tokens, num_tokens)
    if len(candidates) > 2 * k * num_tokens or counts.amin() < k:
        return None
    # One row per token with its candidates, filled up with -inf.
    order = stable_order(tokens, num_tokens)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[tokens[order]]
    values = h.flatten()[candidates]
    rows = values.new_full((num_tokens, int(counts.amax())), -torch.inf)
    rows[tokens, places] = values
    kept = candidates[values >= kth_largest(rows, k)[tokens]]
    return kept if len(kept) == k * num_tokens else None


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest entry of each row, (rows,); float32 or float64, on a CPU."""
    place = rows.shape[1] - k
    return torch.from_numpy(np.partition(rows.contiguous().numpy(), place, axis=1)[:, place].copy())


def positions_batchtopk(h: Tensor, count: int) -> Tensor:
    """
    Flat positions, in storage order, of the `count` largest entries of `h` (N, F) (Bussmann et al. 2024), ascending.
    """
    return ascending(largest(in_storage_order(h), count), h.numel())


def topk_over_layers(
    candidates: list[LayerFeatures], k: int, shard: FeatureShard | None = None
) -> list[LayerFeatures]:
    """
    The k largest entries of each token over all given layers and all processes of a group, from the k largest of each
    (every token has as many).
    """
    if candidates[0].num_tokens == 0:
        return candidates
    rows = [layer.values.view(layer.num_tokens, -1) for layer in candidates]
    kept = among_largest(torch.cat(rows, dim=1), k, shard).split([row.shape[1] for row in rows], dim=1)
    return [layer.take(true_positions(mask)) for layer, mask in zip(candidates, kept, strict=True)]


def among_largest(rows: Tensor, k: int, shard: FeatureShard | None = None) -> Tensor:
    """
    Which of this process's candidates (N, C) are among the k largest of their row over all processes of a group, bool
    (N, C): exactly k in all, ties too.
    """
    values, own = gather_candidates(shard, rows)
    chosen = values.topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)[:, own]


def batchtopk_over_layers(
    candidates: list[LayerFeatures], count: int, shard: FeatureShard | None = None
) -> list[LayerFeatures]:
    """
    The `count` largest entries of the batch over all given layers and all processes of a group, from the `count`
    largest of each.
    """
    values, own = gather_candidates(shard, torch.cat([layer.values for layer in candidates]))
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[largest(values, count)] = True
    kept = kept[own].split([layer.values.numel() for layer in candidates])
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
        sample = values[:: size // 20_000 | 1]  # odd: a step of N or F would see one token or feature alone
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
    "among_largest",
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
