"""
The loss terms of a cross-layer transcoder, one pure function each. Every term is a mean over tokens, so doubling the
batch changes nothing; over no tokens it is 0. Sources: Ameisen et al. 2025, "Circuit Tracing" (reconstruction, tanh
sparsity, pre-activation loss); Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (auxiliary loss).
"""

import torch
from torch import Tensor

from .sharding import FeatureShard
from .sparsity import AtEntries, LayerFeatures, among_largest, true_positions


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
    pre_activations: list[Tensor], thresholds: list[Tensor], decoder_norms: list[Tensor], dead: list[Tensor]
) -> Tensor:
    """
    mean_N Σ over dead (s, f) of max(θ - h, 0) · ‖W_dec[s][f]‖: pulls dead features up to their threshold.

    Args:
        pre_activations: One (N, dead) tensor per source layer: h of its dead features.
        thresholds: One (F,) tensor of θ per source layer (0 for relu).
        decoder_norms: One (F,) tensor per source layer.
        dead: The dead features of each source layer, int64 vectors.
    """
    terms = [
        (torch.relu(threshold[f] - h) * norms[f]).sum()
        for h, threshold, norms, f in zip(pre_activations, thresholds, decoder_norms, dead, strict=True)
    ]
    return torch.stack(terms).sum() / max(1, pre_activations[0].shape[0])


def dead_features(
    pre_activations: Tensor, dead: Tensor, aux_k: int, num_features: int, shard: FeatureShard | None = None
) -> LayerFeatures:
    """
    The `aux_k` largest pre-activations among the dead features of one layer (all of them when fewer), then ReLU.

    Args:
        pre_activations: (N, dead), h of the dead features.
        dead: (dead,) int64, which these are.
        aux_k: Features per token.
        num_features: F, or as many as this process holds.
        shard: Where features are spread over a group of processes, all of whose dead features compete.
    """
    per_token = min(aux_k, dead.numel())
    top = pre_activations.topk(per_token, dim=1)
    features = LayerFeatures(
        values=torch.relu(top.values).flatten(),
        indices=dead[top.indices].flatten(),
        offsets=torch.arange(len(pre_activations) + 1, device=dead.device) * per_token,
        num_features=num_features,
    )
    if shard is None:
        return features
    # Processes with fewer dead features than others fill their candidates up with -inf.
    candidates = top.values.detach().new_full((len(pre_activations), min(aux_k, num_features)), -torch.inf)
    candidates[:, :per_token] = top.values.detach()
    kept = among_largest(candidates, min(aux_k, shard.size * candidates.shape[1]), shard)
    return features.take(true_positions(kept[:, :per_token]))


__all__ = ["dead_features", "preactivation_loss", "reconstruction_loss", "safe_sqrt", "sparsity_loss"]
