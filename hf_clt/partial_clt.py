"""Some layers of a CLT alone: for looking at a large one without reading, or downloading, all of it."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from .configuration_clt import CLTConfig
from .modeling_clt import CrossLayerTranscoder
from .release import check_files, check_half_range, fill, read_state, wanted_dtype
from .sparsity import LayerFeatures


class AbsentEncoder(nn.Module):
    """In the place of an encoder that was not read: no feature of the layer is ever active."""

    def __init__(self, num_features: int, dtype: torch.dtype):
        super().__init__()
        self.num_features, self.dtype = num_features, dtype

    def forward(self, x: Tensor, select=None, selected=None, dead=None) -> tuple[LayerFeatures, int, None]:
        nothing = torch.empty(0, dtype=torch.int64, device=x.device)
        offsets = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
        return LayerFeatures(nothing.to(self.dtype), nothing, offsets, self.num_features), 0, None


class AbsentThreshold(nn.Module):
    """In the place of a threshold that was not read."""

    def forward(self) -> Tensor:
        return torch.zeros(1)


class AbsentDecoder(nn.Module):
    """In the place of a decoder that was not read: writes nothing, and has an output bias of 0."""

    def __init__(self, layer: int, d_model: int, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        self.register_buffer("bias", torch.zeros(d_model, dtype=dtype), persistent=False)

    def forward(self, reconstruction: Tensor, features: LayerFeatures, *_) -> tuple[Tensor, None]:
        if features.indices.numel():
            raise ValueError(
                f"acts have features of layer {self.layer}, which was not read; load the CLT with this layer in layers"
            )
        return reconstruction, None


class AbsentSkip(nn.Module):
    """In the place of a skip connection that was not read: adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class PartialCLT(CrossLayerTranscoder):
    """
    A CLT of which some layers alone were read; see `layers` of [`CrossLayerTranscoder.from_pretrained`].

    `encode` and `encode_sparse` give the features of these layers as the whole CLT does, and none of the others.
    `decode` gives their part of the reconstruction: what these features write, and the output biases and skips of
    these layers. Parts with different layers add up to the reconstruction of the whole.
    """

    layers: tuple[int, ...] = ()

    def _refuse(self, *_, **__):
        raise ValueError(
            f"this CLT was loaded with layers={list(self.layers)}, for looking at their features with encode and "
            "decode; load it without layers for everything else"
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.decoders[self.layers[0]].weight.dtype

    forward = save_pretrained = push_to_hub = to_jumprelu = set_normalization = _refuse

    def train(self, mode: bool = True):
        return self._refuse() if mode else super().train(False)


def load_layers(
    folder: Path, config: CLTConfig, layers: Iterable[int], name: str, dtype: torch.dtype | str | None = None, **others
) -> PartialCLT:
    """
    Reads some layers of a CLT; see `layers` of [`CrossLayerTranscoder.from_pretrained`].

    Args:
        folder: The CLT's folder; the files of other layers may be missing.
        config: Its configuration.
        layers: Which ones.
        name: What the caller calls the CLT.
        dtype: Of the weights; None: as in the files.
        others: What else the caller gave; refused.

    Raises:
        ValueError: For a layer that the CLT does not have, for an argument that does not go with it, for a CLT whose
            layers share a budget of active features, and for files that do not fit the configuration.
        FileNotFoundError: If a file of these layers is missing.
    """
    layers = tuple(layers)
    given = [argument for argument, value in others.items() if value]
    if given:
        raise ValueError(f"{given[0]} is given with layers, which reads them onto the CPU; leave out one of the two")
    unknown = [layer for layer in layers if layer not in range(config.num_layers)]
    if unknown or not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers={list(layers)}: give different ones from 0 to {config.num_layers - 1}")
    if config.activation_fn == "topk" and config.k_scope == "token":
        raise ValueError(
            f"layers={list(layers)}: with activation_fn='topk' and k_scope='token' the layers share a budget, so that "
            "no layer's features are known without the others; leave out layers, or load with lazy=True"
        )
    check_files(folder, config, layers=layers)
    # Ties are written out in the files, and the layer that a decoder is tied to may not be read.
    config = CLTConfig.from_dict({**config.to_dict(), "decoder_tying": "none"})
    state = read_state(folder, config, layers=layers, dtype=wanted_dtype(config, dtype))
    wide = state[f"encoders.{layers[0]}.weight"].dtype
    with torch.device("meta"):
        model = PartialCLT(config)
    for layer in range(config.num_layers):
        if layer not in layers:
            model.encoders[layer] = AbsentEncoder(config.num_features, wide)
            model.decoders[layer] = AbsentDecoder(layer, config.d_model, wide)
            if hasattr(model, "thresholds"):
                model.thresholds[layer] = AbsentThreshold()
            if config.skip_connection:
                model.skips[layer] = AbsentSkip()
    model.layers = layers
    fill(model, state, name)
    check_half_range(model)
    return model.requires_grad_(False)


__all__ = ["PartialCLT", "load_layers"]
