"""
Selection: at which entries of the pre-activations an activation function, or its gradient, can be non-zero.

relu and jumprelu select what is above a threshold, topk and batchtopk the largest: exactly k per token, or k·N in a
batch of N (batchtopk only in training). With `k_scope="token"` all layers share one budget, and so do the processes
over which features are spread: each layer and process then gives its largest, and what is kept is chosen from these.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .configuration_clt import CLTConfig
from .device import is_on_cpu
from .kernels import triton_select
from .sharding import FeatureShard, gather_candidates
from .sparsity import (
    LayerFeatures,
    columns_of,
    counts_of,
    entries_at,
    features_at,
    in_storage_order,
    is_stored_by_feature,
    stable_order,
    true_positions,
)


GROUPS = (64, 32, 16)  # entries whose maximum stands for them in the first round of an exact top-k


# -- by activation function -------------------------------------------------------------------------------------------


def is_by_rank(config: CLTConfig, training: bool) -> bool:
    """Whether the largest pre-activations are selected; otherwise those above a threshold."""
    return config.activation_fn == "topk" or (config.activation_fn == "batchtopk" and training)


def shares_budget(config: CLTConfig, training: bool, shard: FeatureShard | None) -> bool:
    """Whether features compete with those of other layers or processes: no layer can be selected on its own."""
    return is_by_rank(config, training) and (config.k_scope == "token" or shard is not None)


def select(
    h: Tensor, lower: Tensor | float, config: CLTConfig, k: int, training: bool, num_layers: int = 1
) -> LayerFeatures:
    """
    Where the activation function of B layers, or its gradient, can be non-zero, with h there.

    Args:
        h: (B · N, F).
        lower: For a selection by threshold: what h must exceed, one for all, or (B,) or (B · F,).
        config: Names the activation function and its budget.
        k: Of the budget, which changes in training.
        training: Whether the selection is that of training.
        num_layers: B; layers that share a budget are selected one by one, and then [`within_budget`].
    """
    if not is_by_rank(config, training):
        return features_above(h, lower, num_layers)
    k = min(k * config.num_layers if config.k_scope == "token" else k, h.shape[1])
    if config.activation_fn == "topk":
        positions = positions_topk(h, k)
    else:
        positions = positions_batchtopk(h, k * (len(h) // num_layers), num_layers)
    return replace(entries_at(h, positions, num_layers), is_even=True)


def features_above(h: Tensor, lower: Tensor | float, num_layers: int = 1) -> LayerFeatures:
    """The entries of `h` (B · N, F) above a threshold: one number, or (B,), or (B · F,). A GPU is asked how many."""
    if isinstance(lower, Tensor):
        lower = lower.view(num_layers, -1)
    if triton_select.takes(h):
        words, counts = triton_select.mark_above(h, lower)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        positions = triton_select.positions_marked(words, offsets, int(offsets[-1]), h.shape[1])
        return entries_at(h, positions, num_layers, offsets)
    if num_layers == 1:
        return features_at(h, h > lower)
    above = h.view(num_layers, -1, h.shape[1]) > (lower[:, None] if isinstance(lower, Tensor) else lower)
    return features_at(h, above.flatten(0, 1), num_layers)


@torch.no_grad()
def within_budget(
    selected: list[LayerFeatures], config: CLTConfig, k: int, training: bool, shard: FeatureShard | None
) -> list[LayerFeatures]:
    """Of what [`select`] gave in each layer, and on each process of a group, what is within the budget of all."""
    if not shares_budget(config, training, shard):
        return selected
    per_token = config.activation_fn == "topk"
    count = k * (1 if per_token else selected[0].num_tokens)
    if config.k_scope == "token":
        return keep_largest(selected, count * config.num_layers, per_token, shard)
    return [keep_largest([layer], count, per_token, shard)[0] for layer in selected]


def keep_largest(
    candidates: list[LayerFeatures], count: int, per_token: bool, shard: FeatureShard | None = None
) -> list[LayerFeatures]:
    """
    Of the candidates of some layers those that are among the `count` largest over all these layers and all processes
    of a group.

    Args:
        candidates: The `count` largest entries of each layer on this process, or all that it has.
        count: How many to keep, exactly, ties too.
        per_token: Whether each token has a budget of `count` (topk; all tokens then have equally many candidates), or
            the whole batch (batchtopk).
        shard: Where features are spread over a group of processes, this one's slice.
    """
    num_rows = candidates[0].num_tokens if per_token else 1
    if num_rows == 0:
        return candidates
    rows = [layer.values.view(num_rows, -1) for layer in candidates]
    kept = among_largest(torch.cat(rows, dim=1), count, shard).split([row.shape[1] for row in rows], dim=1)
    return [layer.take(true_positions(mask)) for layer, mask in zip(candidates, kept, strict=True)]


def among_largest(rows: Tensor, k: int, shard: FeatureShard | None = None) -> Tensor:
    """
    Which of this process's candidates (N, C) are among the k largest of their row over all processes of a group, bool
    (N, C): exactly k in all, ties too.
    """
    values, own = gather_candidates(shard, rows)
    chosen = largest(values[0], k)[None] if len(values) == 1 else values.topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)[:, own]


@torch.no_grad()
def largest_dead(h: Tensor, dead: Tensor, aux_k: int, shard: FeatureShard | None = None) -> LayerFeatures:
    """
    The `aux_k` largest pre-activations of each token and layer among the dead features, all of them when fewer. On a
    GPU, where their number is not asked for, entries of other features, with -inf, then make up the number.

    Args:
        h: (B · N, F).
        dead: (B, F) bool.
        aux_k: Features per token and layer.
        shard: Where features are spread over a group of processes, all of whose dead features compete; B is 1 then.
    """
    num_layers, num_features = dead.shape
    if num_layers > 1 or not is_on_cpu(h):
        per_token = min(aux_k, num_features)
        if triton_select.takes(h):
            found = entries_at(h, triton_select.positions_topk(h, per_token, dead), num_layers)
            found = found.with_values(torch.where(dead.flatten()[found.indices], found.values, -torch.inf))
        else:
            columns = h.view(num_layers, -1, num_features).masked_fill(~dead[:, None], -torch.inf).view_as(h)
            found = entries_at(columns, positions_topk(columns, per_token), num_layers)
        found = replace(found, is_even=True)
    else:
        found, per_token = _largest_of_few(h, true_positions(dead), aux_k)
    if shard is None:
        return found
    # Processes with fewer dead features than others fill their candidates up with -inf.
    candidates = h.new_full((len(h), min(aux_k, num_features)), -torch.inf)
    candidates[:, :per_token] = found.values.view(len(h), per_token)
    kept = among_largest(candidates, min(aux_k, shard.size * candidates.shape[1]), shard)
    return found.take(true_positions(kept[:, :per_token]))


def _largest_of_few(h: Tensor, features: Tensor, count: int) -> tuple[LayerFeatures, int]:
    """The largest entries of each row of `h` (N, F) in the columns of some features, and how many; on a CPU."""
    per_token = min(count, len(features))
    whole_groups = (0, 0, 0, -len(features) % max(GROUPS))  # in which `positions_topk` looks through them
    columns = pad(columns_of(h, features).T, whole_groups, value=-torch.inf).T
    entries = entries_at(columns, positions_topk(columns, per_token))
    # A column that was added can be chosen where h is -inf itself, in a run that diverges.
    indices = features[entries.indices.clamp(max=max(0, len(features) - 1))]
    return LayerFeatures(entries.values, indices, entries.offsets, h.shape[1]), per_token


# -- the exact selection ----------------------------------------------------------------------------------------------


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

    Exact in two rounds: an entry among the k largest lies in one of the k groups with the largest maxima. On a GPU it
    is one kernel.
    """
    if triton_select.takes(h):
        return triton_select.positions_topk(h, k)
    num_tokens, num_features = h.shape
    by_feature = is_stored_by_feature(h)
    sizes = group_sizes(num_features, k)
    if sizes and by_feature and h.dtype in (torch.float32, torch.float64):
        positions = _positions_topk_above_cut(h.T, k, max(sizes))
        if positions is not None:
            return positions
    columns = _topk_in_groups(h, k)
    tokens = torch.arange(num_tokens, device=h.device)[:, None]
    if by_feature:
        return ascending((columns * num_tokens + tokens).flatten(), h.numel())
    return (columns.sort(dim=1).values + tokens * num_features).flatten()


def group_sizes(num_columns: int, k: int) -> list[int]:
    """Those of [`GROUPS`] with which the first of two rounds leaves at most half of a row of this length."""
    return [size for size in GROUPS if num_columns % size == 0 and 0 < k * size <= num_columns // 2]


def _topk_in_groups(rows: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row (R, C), (R, k), in no particular order."""
    num_rows, num_columns = rows.shape
    sizes = group_sizes(num_columns, k)
    if not sizes:
        return rows.topk(k, dim=1, sorted=False).indices
    size = min(sizes, key=lambda size: num_columns / size + k * size)  # entries seen in both rounds
    # A group is every `width`-th column, so that the maxima are taken over whole rows at a time.
    width = num_columns // size
    groups = rows.reshape(num_rows, size, width).amax(dim=1).topk(k, dim=1, sorted=False).indices
    members = torch.arange(0, num_columns, width, device=rows.device)
    candidates = (groups[:, None, :] + members[:, None]).flatten(1)
    best = rows.gather(1, candidates).topk(k, dim=1, sorted=False).indices
    return candidates.gather(1, best)


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
    order, starts = stable_order(tokens, num_tokens)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order)) - starts[tokens[order]]
    values = h.flatten()[candidates]
    rows = values.new_full((num_tokens, int(counts.amax())), -torch.inf)
    rows[tokens, places] = values
    kept = candidates[values >= kth_largest(rows, k)[tokens]]
    return kept if len(kept) == k * num_tokens else None


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest entry of each row, (rows,); float32 or float64, on a CPU."""
    place = rows.shape[1] - k
    return torch.from_numpy(np.partition(rows.contiguous().numpy(), place, axis=1)[:, place].copy())


def positions_batchtopk(h: Tensor, count: int, num_layers: int = 1) -> Tensor:
    """
    Flat positions, in storage order, of the `count` largest entries of each layer of `h` (B · N, F) (Bussmann et al.
    2024), ascending. On a GPU in two rounds.
    """
    entries = in_storage_order(h).view(num_layers, -1)
    if num_layers == 1 and is_on_cpu(h):
        return ascending(largest(entries[0], count), h.numel())
    # Of more than a group each it would look through all.
    few = count * triton_select.GROUP < entries.shape[1] <= triton_select.MAX_COLUMNS
    if few and triton_select.takes(entries):
        found = triton_select.positions_largest(entries, count)
    else:
        found = _topk_in_groups(entries, count).sort(dim=1).values
    return (found + torch.arange(num_layers, device=h.device)[:, None] * entries.shape[1]).flatten()


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
