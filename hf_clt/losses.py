"""
The loss terms of a cross-layer transcoder, one pure function each. Every term is a mean over tokens, so doubling the
batch changes nothing; over no tokens it is 0. Sources: Ameisen et al. 2025, "Circuit Tracing"
"""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from .configuration_clt import CLTConfig
from .sparsity import AtEntries, LayerFeatures


def safe_sqrt(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 rather than infinite: a decoder row of zeros must not produce NaN."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def reconstruction_loss(targets: Tensor, reconstruction: Tensor) -> Tensor:
    """Σ_t mean_N ‖ỹ_t - ỹ̂_t‖², from normalised (N, L, D) tensors; the norm sums over D."""
    # One pass for the gradient, where squares of a difference take three.
    return mse_loss(reconstruction, targets, reduction="sum") / max(1, targets.shape[0])


def sparsity_loss(
    features: list[LayerFeatures], decoder_norms: list[Tensor], c: float, first_layer: float = 1.0
) -> Tensor:
    """
    mean_N Σ_s w_s Σ_f tanh(c · ‖W_dec[s][f]‖ · a_sf), w_0 = `first_layer`, else 1; λ and its schedule are applied by
    the caller.

    Args:
        features: The features of all source layers, in blocks of B.
        decoder_norms: One (B · F,) tensor per block, the norm over all targets and dimensions.
        c: Scale inside the tanh.
        first_layer: Weight of the first source layer.
    """
    penalties = [
        torch.tanh(c * AtEntries.apply(norms, f) * f.values) for f, norms in zip(features, decoder_norms, strict=True)
    ]
    if first_layer != 1:
        is_first = features[0].indices < features[0].num_features // features[0].num_layers
        penalties[0] = torch.where(is_first, first_layer * penalties[0], penalties[0])
    terms = [penalty.sum() for penalty in penalties]
    return torch.stack(terms).sum() / max(1, features[0].num_tokens)


def preactivation_loss(
    h: list[LayerFeatures],
    sums: list[Tensor],
    thresholds: list[Tensor],
    decoder_norms: list[Tensor],
    dead: list[Tensor],
) -> Tensor:
    """
    mean_N Σ over dead (s, f) of max(θ - h, 0) · ‖W_dec[s][f]‖: pulls dead features up to their threshold.

    Nearly all of these h are below θ, where the maximum is linear: Σ_n max(θ - h, 0) =
    N θ - Σ_n h + Σ_n max(h - θ, 0), and the last sum has listed entries alone. So no other h has to be kept, and no
    gradient is a product over all tokens.

    Args:
        h: The pre-activations of all source layers, in blocks of B; at least those above their threshold.
        sums: Σ_n h of the dead features, one (dead,) tensor per block.
        thresholds: One (B · F,) tensor of θ per block (0 for relu).
        decoder_norms: One (B · F,) tensor per block.
        dead: The dead features of each block, int64 vectors.
    """
    num_tokens = h[0].num_tokens
    terms = []
    for entries, sum_h, threshold, norms, f in zip(h, sums, thresholds, decoder_norms, dead, strict=True):
        terms.append((norms[f] * (num_tokens * threshold[f] - sum_h)).sum())
        excess = torch.relu(entries.values - AtEntries.apply(threshold, entries))
        norms_of_dead = norms * torch.zeros_like(norms).index_fill(0, f, 1)
        terms.append((AtEntries.apply(norms_of_dead, entries) * excess).sum())
    return torch.stack(terms).sum() / max(1, num_tokens)


def auxiliary_loss(targets: Tensor, reconstruction: Tensor, explained: Tensor) -> Tensor:
    """
    Σ_t mean_N ‖(ỹ_t - ỹ̂_t) - what dead features write to t‖²: they explain what the others leave, which is held fixed.
    All are (N, L, D), `explained` without output biases and skips.
    """
    return reconstruction_loss((targets - reconstruction).detach(), explained)


def norms_over_targets(squares: Tensor, config: CLTConfig) -> Tensor:
    """
    ‖W_dec[s][f]‖ over all targets and dimensions, (L, F), with a finite gradient at 0.

    Args:
        squares: Σ of W_dec² of each decoder as stored, (L, F): a tied decoder counts once.
        config: Says which decoders a source layer writes through.
    """
    num_layers = config.num_layers
    if config.decoder_tying == "per_source":
        num_targets = torch.arange(num_layers, 0, -1, device=squares.device).clamp(max=config.num_targets(0))
        squares = squares * num_targets[:, None]
    elif config.decoder_tying == "per_target":
        squares = torch.stack([squares[s : s + config.num_targets(s)].sum(dim=0) for s in range(num_layers)])
    return safe_sqrt(squares)


def list_by_block(dead: Tensor, num_layers: int) -> list[Tensor]:
    """The features that are true in (L, F), an int64 vector of b · F + f per block of B layers."""
    block, feature = dead.reshape(-1, num_layers * dead.shape[1]).nonzero(as_tuple=True)
    if num_layers == len(dead):
        return [feature]
    return list(feature.split(block.bincount(minlength=len(dead) // num_layers).tolist()))
