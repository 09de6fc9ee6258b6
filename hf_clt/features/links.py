"""
What the weights of a CLT alone say of its features: the tokens that they make more and less likely, and the features
that they feed.

Notation as in `modeling_clt`; W_enc[s] is (F, D), W_dec[s] is (F, J, D), statistics folded in.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..modeling_clt import CrossLayerTranscoder


BLOCK_ENTRIES = 2**24  # of a product that exists at a time: 64 MiB in float32


# -- logits -----------------------------------------------------------------------------------------------------------


def logit_extremes(decoder: Tensor, unembedding: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    The tokens whose logits features raise and lower most: the extremes of W_U Σ_t W_dec[s][f, t-s]. What a feature
    writes to all its target layers is added up as it is, and goes through the unembedding alone: without the final
    norm (its scale depends on the prompt), without a bias, and without what later layers make of it.

    Args:
        decoder (`Tensor` of shape (F, J, D)): W_dec[s], raw.
        unembedding (`Tensor` of shape (V, D)): W_U.
        count (`int`): Tokens wanted at each end, at most V.

    Returns:
        `tuple[Tensor, ...]`: token ids of the largest logits, largest first, and these logits; token ids of the
        smallest, smallest first, and these logits. (F, count) each, on the CPU, per unit of activation.
    """
    written = decoder.float().sum(dim=1).to(unembedding.device)
    count = min(count, len(unembedding))
    parts = []
    for rows in written.split(max(1, BLOCK_ENTRIES // len(unembedding))):
        logits = rows @ unembedding.float().T
        top, bottom = logits.topk(count, dim=1), logits.topk(count, dim=1, largest=False)
        parts.append((top.indices.cpu(), top.values.cpu(), bottom.indices.cpu(), bottom.values.cpu()))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# -- virtual weights --------------------------------------------------------------------------------------------------


class Links:
    """
    The strongest virtual weights of every feature, strongest first; none at first.

    Attributes:
        weights (`Tensor` of shape (L, F, M), float32): 0 where there is no link.
        partners (`Tensor` of shape (L, F, M), int64): Layer · F + feature at the other end; -1 where there is none.
    """

    def __init__(self, num_layers: int, num_features: int, size: int):
        self.weights = torch.zeros(num_layers, num_features, size)
        self.partners = torch.full((num_layers, num_features, size), -1)

    def of(self, layer: int, feature: int) -> list[tuple[int, int, float]]:
        """Layer, feature and weight at the other ends of one feature's links."""
        num_features = self.weights.shape[1]
        weights, partners = self.weights[layer, feature].tolist(), self.partners[layer, feature].tolist()
        return [(*divmod(p, num_features), w) for w, p in zip(weights, partners, strict=True) if p >= 0]

    def add(self, layer: int, rows: slice, found: Tensor, candidates: Tensor) -> None:
        """
        Keeps the M strongest links, by |weight|, of features `rows` of a layer: of those so far and of `found` (n, C),
        whose other ends are `candidates` (C,). Weights that are 0 are no links.
        """
        size = self.weights.shape[2]
        order = found.abs().topk(min(size, found.shape[1]), dim=1).indices
        new = found.gather(1, order).cpu()
        partners = torch.where(new == 0, -1, candidates[order.cpu()])
        weights = torch.cat([self.weights[layer, rows], new], dim=1)
        partners = torch.cat([self.partners[layer, rows], partners], dim=1)
        order = weights.abs().argsort(dim=1, descending=True, stable=True)[:, :size]
        self.weights[layer, rows], self.partners[layer, rows] = weights.gather(1, order), partners.gather(1, order)


def virtual_weights(decoder: Tensor, source: int, encoders: list[Tensor]) -> Iterator[tuple[int, slice, Tensor]]:
    """
    How a feature moves the pre-activations of features in later layers, per unit of its activation, along the residual
    stream alone:

        V[(s, f), (u, g)] = Σ_{s ≤ t < u, t-s < R} W_dec[s][f, t-s] · W_enc[u][g]

    (Ameisen et al. 2025: virtual weights.) Features of layer u read what MLPs of the layers below have written, not
    those of u itself. Attention is left out, and so is the norm where features read behind it (`mlp.hook_in`).

    Args:
        decoder (`Tensor` of shape (F, J, D)): W_dec[s].
        source (`int`): s.
        encoders (`list[Tensor]`): W_enc of all layers, (F, D) each.

    Yields:
        `tuple[int, slice, Tensor]`: u; features of layer s, as many as bound the block; V, (features, F).
    """
    written = torch.zeros_like(decoder[:, 0], dtype=torch.float32)
    for target in range(source + 1, len(encoders)):
        if target - 1 - source < decoder.shape[1]:
            written = written + decoder[:, target - 1 - source].float()
        encoder = encoders[target].to(written.device).float()
        at_a_time = max(1, BLOCK_ENTRIES // len(encoder))
        for start in range(0, len(written), at_a_time):
            rows = slice(start, min(start + at_a_time, len(written)))
            yield target, rows, written[rows] @ encoder.T


@torch.no_grad()
def strongest_links(
    clt: CrossLayerTranscoder, active: Tensor, size: int, *, progress: bool = False
) -> tuple[Links, Links]:
    """
    For every feature the features of later layers that it feeds most, and those of earlier layers that it reads most,
    by |V| of [`virtual_weights`]; among the features that are active at all. Never more than a block of V exists at a
    time; all of it is computed once, at L²/2 · F² · D multiplications.

    Args:
        clt ([`CrossLayerTranscoder`]): The CLT.
        active (`Tensor` of shape (L, F), bool): Features that are considered.
        size (`int`): Links kept per feature and direction.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar over pairs of layers.

    Returns:
        `tuple[Links, Links]`: what each feature feeds, and what it reads.
    """
    num_layers, num_features = active.shape
    feeds, reads = Links(num_layers, num_features, size), Links(num_layers, num_features, size)
    if size == 0:
        return feeds, reads
    encoders = [clt.released_layer(layer)[f"W_enc_{layer}"] for layer in range(num_layers)]
    pairs = num_layers * (num_layers - 1) // 2
    numbers = torch.arange(num_features)
    with tqdm(total=pairs, desc="Virtual weights", unit="pair", disable=not progress, leave=False) as bar:
        for source in range(num_layers):
            decoder = clt.released_layer(source)[f"W_dec_{source}"].to(clt.device)
            for target, rows, found in virtual_weights(decoder, source, encoders):
                both = active[source, rows, None] & active[target]
                found = torch.where(both.to(found.device), found, 0.0)
                feeds.add(source, rows, found, target * num_features + numbers)
                reads.add(target, slice(None), found.T, source * num_features + numbers[rows])
                if rows.stop == num_features:
                    bar.update()
    return feeds, reads
