"""
The loss terms of a cross-layer transcoder, one pure function each. Every term is a mean over tokens, so doubling the
batch changes nothing; over no tokens it is 0. Sources: Ameisen et al. 2025, "Circuit Tracing" (reconstruction, tanh
sparsity, pre-activation loss); Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (auxiliary loss).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .device import values_at_hand
from .sharding import FeatureShard
from .sparsity import (
    GROUPS,
    AtEntries,
    LayerFeatures,
    among_largest,
    columns_of,
    entries_at,
    features_at,
    positions_topk,
    true_positions,
)


def safe_sqrt(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 rather than infinite: a decoder row of zeros must not produce NaN."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def reconstruction_loss(targets: Tensor, reconstruction: Tensor) -> Tensor:
    """Σ_t mean_N ‖ỹ_t - ỹ̂_t‖², from normalised (N, L, D) tensors; the norm sums over D."""
    return (targets - reconstruction).square().sum() / max(1, targets.shape[0])


def sparsity_loss(features: list[LayerFeatures], decoder_norms: list[Tensor], c: float) -> Tensor:
    """
    mean_N Σ_s Σ_f tanh(c · ‖W_dec[s][f]‖ · a_sf); λ and its schedule are applied by the caller.

    Args:
        features: The features of each source layer.
        decoder_norms: One (F,) tensor per source layer, the norm over all targets and dimensions.
        c: Scale inside the tanh.
    """
    terms = [
        torch.tanh(c * AtEntries.apply(norms, f) * f.values).sum()
        for f, norms in zip(features, decoder_norms, strict=True)
    ]
    return torch.stack(terms).sum() / max(1, features[0].num_tokens)


def preactivation_loss(
    sums: list[Tensor],
    above: list[LayerFeatures],
    thresholds: list[Tensor],
    decoder_norms: list[Tensor],
    dead: list[Tensor],
) -> Tensor:
    """
    mean_N Σ over dead (s, f) of max(θ - h, 0) · ‖W_dec[s][f]‖: pulls dead features up to their threshold.

    Nearly all of these h are below θ, where the maximum is linear: Σ_n max(θ - h, 0) = N θ - Σ_n h, and θ - h too much
    for each h above θ. So no other h has to be kept, and no gradient is a product over all tokens.

    Args:
        sums: Σ_n h of the dead features, one (dead,) tensor per source layer.
        above: The entries of dead features above their thresholds; values h.
        thresholds: One (F,) tensor of θ per source layer (0 for relu).
        decoder_norms: One (F,) tensor per source layer.
        dead: The dead features of each source layer, int64 vectors.
    """
    num_tokens = above[0].num_tokens
    terms = []
    for sum_h, entries, threshold, norms, f in zip(sums, above, thresholds, decoder_norms, dead, strict=True):
        terms.append((norms[f] * (num_tokens * threshold[f] - sum_h)).sum())
        missing = entries.values - AtEntries.apply(threshold, entries)
        terms.append((AtEntries.apply(norms, entries) * missing).sum())
    return torch.stack(terms).sum() / max(1, num_tokens)


@torch.no_grad()
def largest_dead(h: Tensor, dead: Tensor, aux_k: int, shard: FeatureShard | None = None) -> LayerFeatures:
    """
    The `aux_k` largest pre-activations of each token among the dead features of one layer, all of them when fewer. On
    a GPU, where their number is not asked for, entries of other features, with -inf, then make up the number.

    Args:
        h: (N, F).
        dead: (F,) bool.
        aux_k: Features per token.
        shard: Where features are spread over a group of processes, all of whose dead features compete.
    """
    num_tokens, num_features = h.shape
    if values_at_hand(h):  # the dead columns alone are looked through
        features = true_positions(dead)
        per_token = min(aux_k, len(features))
        whole_groups = (0, 0, 0, -len(features) % max(GROUPS))  # in which `positions_topk` looks through them
        columns = pad(columns_of(h, features).T, whole_groups, value=-torch.inf).T
    else:
        features, per_token = None, min(aux_k, num_features)
        columns = h.masked_fill(~dead, -torch.inf)
    entries = entries_at(columns, positions_topk(columns, per_token))
    indices = entries.indices
    if features is not None:  # a column that was added can be chosen where h is -inf itself, in a run that diverges
        indices = features[indices.clamp(max=max(0, len(features) - 1))]
    found = LayerFeatures(entries.values, indices, entries.offsets, num_features)
    if shard is None:
        return found
    # Processes with fewer dead features than others fill their candidates up with -inf.
    candidates = h.new_full((num_tokens, min(aux_k, num_features)), -torch.inf)
    candidates[:, :per_token] = found.values.view(num_tokens, per_token)
    kept = among_largest(candidates, min(aux_k, shard.size * candidates.shape[1]), shard)
    return found.take(true_positions(kept[:, :per_token]))


@torch.no_grad()
def dead_above(h: Tensor, dead: Tensor, threshold: Tensor) -> LayerFeatures:
    """The entries of dead features of one layer, (dead,) int64, above their thresholds; h (N, F), θ (F,)."""
    columns = columns_of(h, dead)
    entries = features_at(columns, columns > threshold[dead])
    return LayerFeatures(entries.values, dead[entries.indices], entries.offsets, h.shape[1])


__all__ = [
    "dead_above",
    "largest_dead",
    "preactivation_loss",
    "reconstruction_loss",
    "safe_sqrt",
    "sparsity_loss",
]
