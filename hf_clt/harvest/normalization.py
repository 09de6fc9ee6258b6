"""Per-layer, per-dimension mean and standard deviation of activations, and the initial values set from data."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from ..folding import STATISTICS
from ..modeling_clt import CrossLayerTranscoder
from ..sharding import rows_of
from .harvester import Harvester
from .statistics import Moments, gather
from .tokens import TokenStream


logger = logging.getLogger(__name__)

START_TOKENS = 1024  # at a time, for the initial weights
CLUSTER_PASSES = 5


def estimate_statistics(
    tokens: TokenStream,
    harvester: Harvester,
    num_batches: int | None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    skip_bad: bool = False,
    together: Callable[[Callable[[], None]], None] = lambda function: function(),
) -> dict[str, Tensor]:
    """
    Mean and standard deviation of inputs and targets over the first extraction batches of the text, which is rewound
    afterwards: nothing that was harvested is kept.

    Args:
        tokens: The training text, or [`CachedTokens`].
        harvester: Runs the language model, or reads an [`ActivationCache`].
        num_batches: Extraction batches to use; None for all of the text.
        accelerator: Merges the statistics of all processes.
        progress: Whether to show a progress bar.
        skip_bad: Whether to leave out blocks with activations that are NaN or infinite, instead of raising.
        together: Calls a function in all processes, which then wait for each other.

    Returns:
        `mean_in`, `std_in`, `mean_out`, `std_out`, float64 (L, D) each, on the CPU.

    Raises:
        ValueError: If the text has no token that counts.
    """
    shape = (harvester.num_layers, harvester.d_model)
    moments = Moments(shape, harvester.device), Moments(shape, harvester.device)

    def read() -> None:
        tokens.rewind()
        with tqdm(total=num_batches, desc="Estimating statistics", unit="batch", disable=not progress) as bar:
            for seen, batch in enumerate(tokens, start=1):
                for moment, rows in zip(moments, harvester.harvest(batch, skip_bad=skip_bad), strict=True):
                    moment.update(rows)
                bar.update()
                if seen == num_batches:
                    break
        tokens.rewind()

    together(read)
    moments = [Moments.from_gathered(gather(accelerator, moment.tensors())) for moment in moments]
    if moments[0].count == 0:
        raise ValueError("dataset: no token counts for training; give more text or allow special tokens")
    found = [value.cpu() for moment in moments for value in moment.mean_and_std()]
    return dict(zip(STATISTICS, found, strict=True))


def warn_if_lost(mean: Tensor, std: Tensor, dtype: torch.dtype, option: str) -> None:
    """Warns of dimensions whose spread `std` is less than a step of `dtype` at their `mean`, (L, D) each."""
    lost = int(((std > 0) & (std < torch.finfo(dtype).eps * mean.abs())).sum())
    if lost:
        logger.warning(
            "%d dimensions of the activations vary by less than %s can tell apart at their mean; keep them in float32 "
            "(%s)",
            *(lost, str(dtype).removeprefix("torch."), option),
        )


def load_statistics(path: str | Path) -> dict[str, Tensor]:
    """
    Reads `mean_in`, `std_in`, `mean_out`, `std_out`, (L, D) each, from a safetensors file.

    Raises:
        ValueError: If the file is damaged, or one of them is missing; the message names it.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"normalization_file={str(path)!r} is no whole safetensors file ({error})") from error
    missing = [name for name in STATISTICS if name not in tensors]
    if missing:
        raise ValueError(f"normalization_file={str(path)!r} has no tensor {missing[0]}; it needs {STATISTICS}")
    return {name: tensors[name] for name in STATISTICS}


@torch.no_grad()
def cluster_directions(x: Tensor, num_clusters: int) -> Tensor:
    """
    Directions of the means of clusters of x (N, D), (C, D) of length 1: spherical k-means (Dhillon & Modha 2001),
    begun from the first C of x, which some share where N is less. A cluster without a token keeps its direction.
    """
    x = normalize(x, dim=1)
    means = x[torch.arange(num_clusters, device=x.device) % len(x)]
    for _ in range(CLUSTER_PASSES):
        nearest = torch.cat([(part @ means.T).argmax(dim=1) for part in x.split(START_TOKENS)])
        sums = torch.zeros_like(means).index_add_(0, nearest, x)
        means = torch.where(sums.any(dim=1, keepdim=True), normalize(sums, dim=1), means)
    return means


@torch.no_grad()
def set_encoder_directions(clt: CrossLayerTranscoder, layer: int, inputs: Tensor) -> None:
    """
    Gives each row of W_enc, whose length it keeps, the direction of a cluster of normalised inputs, less their mean,
    and a tenth of the random direction that it had, so that no two are the same. Such a feature fires on what is like
    these tokens; one that begins anywhere first has to be turned to where inputs are.

    Args:
        clt: A new CLT, its statistics set.
        layer: Whose encoder.
        inputs: (N, D) raw inputs of that layer, of tokens in random order, the same on all processes that share the
            features.
    """
    weight, held = clt.encoders[layer].weight, rows_of(clt.shard, clt.config.num_features)
    x = inputs.to(weight.dtype)
    x = (x - x.mean(dim=0)) / (1 if clt.std_in is None else clt.std_in[layer])
    directions = cluster_directions(x, clt.config.num_features)[held]
    lengths = weight.norm(dim=1, keepdim=True)
    weight.copy_(lengths * normalize(directions * lengths + weight / 10, dim=1))


@torch.no_grad()
def set_firing_rate(clt: CrossLayerTranscoder, inputs: Tensor, rate: float) -> None:
    """
    Sets b_enc so that each feature fires on a share `rate` of the given tokens: b = θ - (1 - rate) quantile of W x̃.

    Without this about half of the features fire on every token at first, and the others may never.

    Args:
        clt: A relu or jumprelu CLT, its statistics set.
        inputs: (N, L, D) raw inputs.
        rate: Share of tokens, 0 to 1.
    """
    above = max(1, round(rate * len(inputs)))
    for encoder in clt.encoders:
        encoder.bias.zero_()
    x = clt.normalize_inputs(inputs)
    for s, encoder in enumerate(clt.encoders):
        h = encoder(x[:, s])
        # Midway between the last one above and the first one below, so that exactly `above` tokens fire.
        top = h.topk(min(above + 1, len(h)), dim=0).values
        quantile = (top[above - 1] + top[-1]) / 2
        encoder.bias.copy_(clt.theta(s) - quantile)


@torch.no_grad()
def set_decoder_directions(clt: CrossLayerTranscoder, inputs: Tensor, labels: Tensor) -> None:
    """
    Makes each decoder row what its feature alone should write,

        W_dec[s][f, t] = c_t Σ_n a_nf ỹ_nt / (1 + Σ_n a_nf²),

    the slope of a regression (ridge 1); c_t scales what all source layers write to a target layer, by least squares.
    The sums over tokens are the gradient of Σ ỹ · ŷ. Tied decoders stay as they are; of a feature that fires nowhere
    the direction does.

    Args:
        clt: A new CLT whose encoders are set.
        inputs, labels: (N, L, D), raw.
    """
    if clt.config.decoder_tying != "none":
        return
    weights, training = [decoder.weight for decoder in clt.decoders], clt.training
    parts = list(zip(inputs.split(START_TOKENS), labels.split(START_TOKENS), strict=True))
    clt.train()
    squares = [torch.zeros_like(encoder.bias) for encoder in clt.encoders]
    for x, y in parts:
        with torch.enable_grad():
            output = clt(x)
            written = (clt.normalize_targets(output.reconstruction) * clt.normalize_targets(y)).sum()
        torch.autograd.backward(written, inputs=weights)
        for sums, layer in zip(squares, output.features.layers, strict=True):
            sums.index_add_(0, layer.indices, layer.values.detach().square())
    for weight, of_layer in zip(weights, squares, strict=True):
        of_layer = of_layer[:, None, None]
        weight.copy_(torch.where(of_layer > 0, weight.grad / (1 + of_layer), weight))
        weight.grad = None
    products = torch.zeros(2, clt.config.num_layers, dtype=torch.float64, device=clt.device)
    for x, y in parts:
        written, y = clt.normalize_targets(clt(x).reconstruction), clt.normalize_targets(y)
        products += torch.stack([(written * y).sum(dim=(0, 2)), written.square().sum(dim=(0, 2))])
    scale = (products[0] / products[1].clamp_min(1e-30)).to(weights[0].dtype)
    for s, weight in enumerate(weights):
        weight.mul_(scale[s : s + weight.shape[1], None])
    clt.train(training)
    if clt.config.activation_fn == "batchtopk":
        clt.restart_running_thresholds()


@torch.no_grad()
def set_output_bias(clt: CrossLayerTranscoder, labels: Tensor) -> None:
    """Sets b_dec to the mean of the raw targets (N, L, D), for a CLT without statistics."""
    for decoder, mean in zip(clt.decoders, labels.float().mean(dim=0), strict=True):
        decoder.bias.copy_(mean)
