"""How much of the MLP outputs a CLT explains, how sparsely, and over which distances its features write."""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.evaluate import eval_mode
from ..evaluation.metrics import FLOAT32_ROUNDING
from ..folding import at_least_float32
from ..harvest.harvester import check_fit
from ..modeling_clt import CrossLayerTranscoder
from .samples import (
    Given,
    figure,
    figures,
    output_means,
    ratio_figure,
    ratio_figures,
    sequences,
    sums_by_sequence,
)


SEQUENCES, QUICK_SEQUENCES = 32, 8
# shares of the tokens on which a feature is active, from the densest down
DENSITIES = {"over 10 %": 0.1, "1 to 10 %": 0.01, "0.1 to 1 %": 0.001, "below 0.1 %": 0.0}


@torch.no_grad()
def reconstruction(clt: CrossLayerTranscoder, given: Given) -> dict:
    """
    Reconstruction on held-out text, in raw space, of the MLP outputs of the language model as it is.

    Returns:
        `dict` of figures over sequences: `nmse` (mean over target layers, and `nmse_per_layer`), `l0` (summed over
        source layers, and `l0_per_layer`), `explained_by_distance`; and over features: `dead` (share active on none of
        these tokens) and `dead_per_layer`, `share_by_density` (of the features that are active at all, by the share of
        tokens on which they are), `norm_by_distance` and `mean_distance`.

        The distance is target minus source layer. `norm_by_distance` is Σ ‖W_dec[s][f, t-s]‖ / σ_t of all features
        at a distance, as a share of that at all; σ_t² is the variance of a target, summed over dimensions.
        `mean_distance` is the mean distance with these weights. `explained_by_distance` is the covariance of the
        targets with what the features at a distance write, over σ_t², mean over target layers: of a CLT that is fitted
        by least squares these add up to its explained variance.

    Raises:
        [`BlockSkipped`]: If there is too little text.
        ValueError: If the CLT does not fit the language model.
    """
    check_fit(clt.config, given.harvester)
    count = QUICK_SEQUENCES if given.quick else SEQUENCES
    means = output_means(given, given.harvester, count)
    sums = []
    with eval_mode(clt):
        for batch in tqdm(sequences(given, count), "Reconstructing", disable=not given.progress, leave=False):
            sums.append(sums_of_batch(clt, given, batch, means))
    tokens, errors, spreads, active, products = (torch.cat(parts) for parts in list(zip(*sums, strict=True))[:-1])
    counts = sum(part[-1] for part in sums).cpu()  # (L, F)
    total = tokens.sum()
    variances = spreads.sum(dim=0) / total
    varies = variances > FLOAT32_ROUNDING**2 * means.cpu().square().sum(dim=1)
    spreads[:, ~varies] = 0  # such a layer has no NMSE
    by_distance = diagonals(products / torch.where(varies, variances, torch.inf)) / max(1, int(varies.sum()))
    norms = torch.cat(row_norms(clt, torch.where(varies, variances, torch.inf).sqrt()))
    weights = norms @ torch.arange(norms.shape[1], dtype=norms.dtype)
    dead, density = counts == 0, counts[counts > 0] / total
    bins = torch.bucketize(-density, -torch.tensor(list(DENSITIES.values()), dtype=torch.float64))
    in_bins = torch.nn.functional.one_hot(bins.clamp(max=len(DENSITIES) - 1), len(DENSITIES))
    seed = given.seed
    result = {
        "nmse": ratio_figure(errors, spreads, seed),
        "l0": ratio_figure(active.sum(dim=1), tokens, seed),
        "dead": figure(dead.flatten().double(), seed),
        "mean_distance": ratio_figure(weights, norms.sum(dim=1), seed),
        "nmse_per_layer": ratio_figures(errors, spreads, seed),
        "l0_per_layer": ratio_figures(active, tokens[:, None], seed),
        "dead_per_layer": figures(dead.T.double(), seed),
        "norm_by_distance": ratio_figures(norms, norms.sum(dim=1, keepdim=True), seed),
        "explained_by_distance": ratio_figures(by_distance, tokens[:, None], seed),
    }
    if len(density):
        result["share_by_density"] = dict(zip(DENSITIES, figures(in_bins, seed), strict=True))
    return result


def sums_of_batch(
    clt: CrossLayerTranscoder, given: Given, batch: dict[str, Tensor], means: Tensor
) -> tuple[Tensor, ...]:
    """
    Sums over the tokens of each of P sequences: of 1 (P,); of the squared error, of the squared deviation of the
    targets from their `means` and of active features, (P, L) each; and (P, L, L), of the products of these deviations
    with what each source layer writes to each target layer. Last the tokens on which each feature is active, (L, F).
    """
    counted, config = batch["counted"], clt.config
    inputs, labels = given.harvester.harvest(batch, dtype=at_least_float32(given.model.dtype))
    output = clt(inputs.to(clt.device))
    labels = labels.to(clt.device)
    deviations = labels.double() - means.to(clt.device)
    error = labels.double() - output.reconstruction.double()
    scale = 1.0 if clt.std_out is None else clt.std_out
    scaled = (deviations * scale).to(labels.dtype)
    active, products = [], labels.new_zeros(len(labels), config.num_layers, config.num_layers)
    written = torch.empty_like(labels)
    for s, features in enumerate(output.features.layers):
        targets = slice(s, s + config.num_targets(s))
        written[:, targets] = 0
        clt.decode_layer(s, features, written)
        products[:, s, targets] = torch.einsum("ntd,ntd->nt", written[:, targets], scaled[:, targets])
        rows = torch.zeros(len(labels), device=clt.device)
        active.append(rows.index_add_(0, features.rows, (features.values > 0).float()))
    per_token = (error.square().sum(dim=2), deviations.square().sum(dim=2), torch.stack(active, dim=1), products)
    tokens = counted.sum(dim=1).double()
    return tokens, *(sums_by_sequence(v, counted) for v in per_token), output.features.active_counts()


def diagonals(products: Tensor) -> Tensor:
    """Sums of (P, L, L) by distance, target (last) minus source: (P, L)."""
    num_layers = products.shape[-1]
    return torch.stack([products.diagonal(d, 1, 2).sum(dim=1) for d in range(num_layers)], dim=1)


def row_norms(clt: CrossLayerTranscoder, spreads: Tensor) -> list[Tensor]:
    """Per source layer ‖W_dec[s][f, t-s]‖ / σ_t by distance, (F, L) float64, 0 beyond the last target; σ is (L,)."""
    found = []
    for s in range(clt.config.num_layers):
        decoder = clt.released_layer(s)[f"W_dec_{s}"]
        norms = torch.zeros(len(decoder), len(spreads), dtype=torch.float64)
        for j in range(decoder.shape[1]):  # a target at a time: a float64 copy of all is large
            norms[:, j] = decoder[:, j].double().norm(dim=1) / spreads[s + j]
        found.append(norms)
    return found


__all__ = ["reconstruction"]
