"""
What a trained CLT must be better than: a CLT whose features are random, and one whose features write what others do.
Biases and skip connections stay, so what a control lacks is what the features know.
"""

import copy

import torch
from torch import Tensor

from ..evaluation.calibration import with_thresholds
from ..evaluation.evaluate import eval_mode
from ..modeling_clt import CrossLayerTranscoder


SMALLEST_THRESHOLD = 1e-6


@torch.no_grad()
def random_clt(like: CrossLayerTranscoder, inputs: Tensor, seed: int = 0) -> CrossLayerTranscoder:
    """
    A jumprelu CLT with random encoders and random decoder directions that is as active as another on given tokens, as
    strongly, and writes rows as long.

    Encoders are normal, of inputs in units of their spread. In each layer all features have one threshold, with which
    the layer's L0 on these tokens is that of `like`; then encoders and threshold are scaled so that the mean of the
    activations above zero is the same. Each decoder row has the length of the row of `like` in its place.

    Args:
        like ([`CrossLayerTranscoder`]): The trained CLT, which stays as it is; its activation function may be any.
        inputs (`Tensor` of shape `(N, L, D)`): What features read, raw, on some thousand tokens.
        seed (`int`): Of the random weights.
    """
    with eval_mode(like):
        features = like.encode_sparse(inputs.to(like.device)).layers
    active = [(layer.values > 0).sum().item() for layer in features]
    sizes = [layer.values.clamp_min(0).sum().item() / max(1, n) for layer, n in zip(features, active, strict=True)]
    clt = with_thresholds(like, torch.ones(like.config.num_layers, device=like.device))
    clt.lazy = False
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device)

    x = clt.normalize_inputs(inputs.to(like.device))
    for s, (encoder, decoder) in enumerate(zip(clt.encoders, clt.decoders, strict=True)):
        mean, spread = x[:, s].mean(dim=0), x[:, s].std(dim=0).clamp_min(1e-6)
        encoder.weight.copy_(normal(encoder.weight.shape) / spread / clt.config.d_model**0.5)
        encoder.bias.copy_(-encoder.weight.to(mean) @ mean)
        h = encoder(x[:, s])
        theta = threshold_of(h, active[s])
        if active[s]:
            if theta <= 0:  # more is active than is above 0, as relu may have it
                encoder.bias += SMALLEST_THRESHOLD - theta
                h, theta = encoder(x[:, s]), SMALLEST_THRESHOLD
            scale = sizes[s] / h[h > theta].mean().item()
            encoder.weight *= scale
            encoder.bias *= scale
            theta = threshold_of(encoder(x[:, s]), active[s])  # after all rounding of the weights
        clt.thresholds[s].value.fill_(max(theta, SMALLEST_THRESHOLD)).log_()
        decoder.in_file = False
        for rows in decoder.weight.split(256):  # a few at a time: a copy of all is large
            directions = normal(rows.shape)
            lengths = rows.norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True)
            rows.copy_(directions * lengths)
    return clt.eval()


def threshold_of(h: Tensor, count: int) -> float:
    """Midway between the `count` largest of the pre-activations and the others."""
    ordered = h.flatten().sort(descending=True).values
    if count == 0:
        return 2 * ordered[0].abs().item()
    return (ordered[count - 1] + ordered[min(count, len(ordered) - 1)]).item() / 2


@torch.no_grad()
def shuffled_clt(clt: CrossLayerTranscoder, seed: int = 0) -> CrossLayerTranscoder:
    """
    The CLT with its decoder rows shuffled between the features of each source layer: a feature is active where it was,
    and writes what another one did. Features are numbered by their decoders, which are those of `clt` itself and take
    no memory; the encoders are a copy.
    """
    shuffled = copy.deepcopy(clt, {id(clt.decoders): clt.decoders}).eval()
    generator = torch.Generator().manual_seed(seed)
    for s, encoder in enumerate(shuffled.encoders):
        order = torch.randperm(clt.num_held, generator=generator).to(clt.device)
        moved = [encoder.weight, encoder.bias]
        if clt.config.activation_fn == "jumprelu":
            moved.append(shuffled.thresholds[s].value)
        for values in moved:
            values.copy_(values[order])
    return shuffled


__all__ = ["random_clt", "shuffled_clt"]
