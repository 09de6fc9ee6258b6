"""
Normalisation statistics: how they are set, and folded into the weights.

While a CLT trains, x̃ = (x - mean_in) / std_in and ỹ = (y - mean_out) / std_out are applied inside it. A release has
them in its weights: the same function, without statistics. All is computed in float32 or better, and exact for every
activation function.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .configuration_clt import CLTConfig


if TYPE_CHECKING:
    from transformers import PreTrainedModel


STATISTICS = ("mean_in", "std_in", "mean_out", "std_out")
MIN_STD = 1e-6  # a dimension with a smaller standard deviation, also of its mean, does not vary: it is rounding


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Reconstructions are sums over many source layers, losses over many dimensions: half precision is too little."""
    return torch.promote_types(dtype, torch.float32)


# -- the formulas -----------------------------------------------------------------------------------------------------


def fold_encoder(weight: Tensor, bias: Tensor, mean_in: Tensor, std_in: Tensor) -> tuple[Tensor, Tensor]:
    """
    W_enc' = W_enc / std_in and b_enc' = b_enc - W_enc' mean_in, for W_enc (F, D), b_enc (F,), statistics (D,).

    Like the others here it computes in float32 or better and gives the weights' own dtype. b_enc' follows from W_enc'
    as it was rounded, so that W_enc' (x - mean_in) is as exact as its summands, however large the mean is.
    """
    folded = _scaled(weight, 1 / std_in)
    return folded, (bias.double() - folded.double() @ mean_in.double()).to(bias.dtype)


def fold_decoder(weight: Tensor, std_out: Tensor) -> Tensor:
    """W_dec'[:, j] = W_dec[:, j] · std_out[j], for W_dec (F, J, D) and the targets' std_out (J, D)."""
    return _scaled(weight, std_out)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * scale.to(wide)).to(weight.dtype)


def fold_output(
    bias: Tensor, skip: Tensor | None, mean_in: Tensor, std_in: Tensor, mean_out: Tensor, std_out: Tensor
) -> tuple[Tensor, Tensor | None]:
    """
    W_skip' = diag(1/std_in) W_skip diag(std_out) and b_dec' = b_dec · std_out + mean_out - mean_in W_skip',
    for b_dec (D,), W_skip (D, D) or None, statistics (D,).
    """
    folded = bias.double() * std_out + mean_out
    if skip is not None:
        skip = _scaled(skip, std_out / std_in[:, None])
        folded = folded - mean_in.double() @ skip.double()
    return folded.to(bias.dtype), skip


def fold_layer(tensors: dict[str, Tensor], statistics: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The tensors of one layer, named as on disk, with the statistics (L, D) folded in; W_dec and W_skip if given."""
    mean_in, std_in, mean_out, std_out = (statistics[name][layer] for name in STATISTICS)
    folded = {}
    folded["W_enc"], folded["b_enc"] = fold_encoder(tensors["W_enc"], tensors["b_enc"], mean_in, std_in)
    folded["b_dec"], skip = fold_output(tensors["b_dec"], tensors.get("W_skip"), mean_in, std_in, mean_out, std_out)
    if skip is not None:
        folded["W_skip"] = skip
    if "W_dec" in tensors:
        num_targets = tensors["W_dec"].shape[1]
        folded["W_dec"] = fold_decoder(tensors["W_dec"], statistics["std_out"][layer : layer + num_targets])
    return folded


def unfold_statistics(
    mean_in: Tensor, std_in: Tensor, mean_out: Tensor, std_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics whose fold undoes the fold of the given ones: (x - m)/s inverts as (x + m/s)/(1/s)."""
    return -mean_in / std_in, 1 / std_in, -mean_out / std_out, 1 / std_out


# -- of a CLT ---------------------------------------------------------------------------------------------------------


def check_statistics(clt: "PreTrainedModel", given: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    The given statistics, (L, D) each, on the CLT's device. A dimension that does not vary, whose standard deviation is
    rounding (at most 1e-6, or 1e-6 of its mean), is scaled as the median dimension of its layer (by 1 where none
    varies): folded into the weights, a scale of its own would only multiply rounding.

    Raises:
        ValueError: For a wrong shape, or a value that is not finite.
    """
    shape = (clt.config.num_layers, clt.config.d_model)
    found = {}
    for name in STATISTICS:
        if tuple(given[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}; expected (num_layers, d_model) = {shape}")
        if not given[name].isfinite().all():
            raise ValueError(f"{name} holds values that are not finite; estimate it again from finite activations")
        value = given[name].detach().to(clt.device)
        if name.startswith("std"):
            size = found[name.replace("std", "mean")].abs().clamp_min(1)
            value = torch.where(value > MIN_STD * size, value, torch.nan)
            usual = value.nanmedian(dim=1, keepdim=True).values.nan_to_num(1.0)
            value = torch.where(value.isnan(), usual, value)
        found[name] = value
    return found


@torch.no_grad()
def set_statistics(clt: "PreTrainedModel", given: dict[str, Tensor], reparametrize: bool) -> None:
    """See [`CrossLayerTranscoder.set_normalization`]."""
    if clt.lazy:
        raise ValueError("this CLT was loaded with lazy=True, for analysis; load it without lazy to normalise it")
    given = check_statistics(clt, given)
    if reparametrize:
        for std in (given["std_out"], clt.std_out):
            if std is not None and scales_untie(clt.config, std):
                raise ValueError(
                    "decoder_tying='per_source' with a std_out that differs between layers cannot be "
                    "reparametrized: load the CLT with decoder_tying='none'"
                )
        fold(clt)
        inverse = unfold_statistics(*(given[name].double() for name in STATISTICS))
        fold_into(clt, dict(zip(STATISTICS, inverse, strict=True)))
    for name, value in given.items():
        setattr(clt, name, value.to(at_least_float32(clt.dtype), copy=True))


def fold(clt: "PreTrainedModel") -> None:
    """See [`CrossLayerTranscoder.fold_normalization`]."""
    if clt.mean_in is not None:
        fold_into(clt, statistics_of(clt))
        for name in STATISTICS:
            setattr(clt, name, None)


def statistics_of(clt: "PreTrainedModel") -> dict[str, Tensor]:
    """Those of a CLT that has some, in float64."""
    return {name: getattr(clt, name).double() for name in STATISTICS}


def narrow_tensors(clt: "PreTrainedModel", layer: int) -> dict[str, Tensor]:
    """The parameters of one layer that are folded, named as on disk, without its decoder, nearly all of it."""
    encoder = clt.encoders[layer]
    tensors = {"W_enc": encoder.weight, "b_enc": encoder.bias, "b_dec": clt.decoders[layer].bias}
    return {**tensors, "W_skip": clt.skips[layer].weight} if clt.config.skip_connection else tensors


def scales_untie(config: CLTConfig, std_out: Tensor) -> bool:
    """Whether a row that a `per_source` decoder writes to all its targets would have to carry several scales."""
    return config.decoder_tying == "per_source" and not (std_out == std_out[0]).all()


@torch.no_grad()
def fold_into(clt: "PreTrainedModel", statistics: dict[str, Tensor]) -> None:
    """Folds statistics into the weights in place; unties a decoder whose row they would scale in several ways."""
    config = clt.config
    if scales_untie(config, statistics["std_out"]):
        for s, decoder in enumerate(clt.decoders):
            untied = decoder.weight.expand(-1, config.num_targets(s), -1).clone()
            decoder.weight = nn.Parameter(untied, requires_grad=decoder.weight.requires_grad)
        config.decoder_tying, config.trained_decoder_tying = "none", "per_source"
    for layer in range(config.num_layers):
        parameters = narrow_tensors(clt, layer)
        for name, folded in fold_layer(parameters, statistics, layer).items():
            parameters[name].copy_(folded)
        decoder = clt.decoders[layer].weight
        for j in range(decoder.shape[1]):  # a target at a time: a GPU may have no room for all of it once more
            decoder[:, j] = fold_decoder(decoder[:, j : j + 1], statistics["std_out"][layer + j][None])[:, 0]


@contextmanager
def folded(clt: "PreTrainedModel") -> Iterator[None]:
    """
    The CLT as its release has it, for measuring that: folded while the block runs, then exactly what it was. The
    weights wait in main memory.
    """
    if clt.mean_in is None:
        yield
        return
    statistics = [getattr(clt, name) for name in STATISTICS]
    tying = clt.config.decoder_tying, clt.config.trained_decoder_tying
    modules = [*clt.encoders, *clt.decoders, *getattr(clt, "skips", ())]
    kept = [(m, name, p, p.detach().to("cpu", copy=True)) for m in modules for name, p in m.named_parameters()]
    try:
        fold(clt)
        yield
    finally:
        for module, name, parameter, values in kept:  # a decoder that was untied has another parameter now
            parameter.data.copy_(values)
            setattr(module, name, parameter)
        for name, value in zip(STATISTICS, statistics, strict=True):
            setattr(clt, name, value)
        clt.config.decoder_tying, clt.config.trained_decoder_tying = tying
