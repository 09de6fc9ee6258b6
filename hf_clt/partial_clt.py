"""Some layers of a CLT alone, to look at a large one without reading, or downloading, all of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_clt import CLTConfig
from .folding import at_least_float32
from .modeling_clt import CrossLayerTranscoder
from .release import check_files, check_half_range, fill, read_state, wanted_dtype
from .sparsity import LayerFeatures, SparseFeatures, features_at


class AbsentDecoder(nn.Module):
    """Replaces a decoder that was not read: writes nothing, and has an output bias of 0."""

    def __init__(self, layer: int, d_model: int, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        self.register_buffer("bias", torch.zeros(d_model, dtype=dtype), persistent=False)

    def forward(self, reconstruction: Tensor, features: LayerFeatures, *_: Any) -> tuple[Tensor, None]:
        if features.indices.numel():
            raise ValueError(
                f"acts have features of layer {self.layer}, which was not read; load the CLT with this layer in layers"
            )
        return reconstruction, None


class AbsentSkip(nn.Module):
    """Replaces a skip connection that was not read: adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class PartialCLT(CrossLayerTranscoder):
    """
    A CLT of which some layers alone were read; see `layers` of [`CrossLayerTranscoder.from_pretrained`].

    `encode` and `encode_sparse` give the features of these layers as the whole CLT does, and no features of other
    layers. `decode` gives what these features write, with the output biases and skips of these layers. Parts with
    different layers add up to the reconstruction of the whole.
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

    def encode_sparse(self, inputs: Tensor) -> SparseFeatures:
        x = self.normalize_inputs(self._flatten(inputs))
        nothing = x.new_zeros(len(x), self.config.num_features, dtype=at_least_float32(self.dtype))
        none = features_at(nothing, nothing != 0)
        layers = range(self.config.num_layers)
        features = [self.encode_layer(s, x[:, s]) if s in self.layers else none for s in layers]
        return SparseFeatures(features, inputs.shape[:-2])

    def train(self, mode: bool = True) -> "PartialCLT":
        return self._refuse() if mode else super().train(False)


def load_layers(
    folder: Path,
    config: CLTConfig,
    layers: Iterable[int],
    name: str,
    dtype: torch.dtype | str | None = None,
    **others: Any,
) -> PartialCLT:
    """
    Reads some layers of a CLT; see `layers` of [`CrossLayerTranscoder.from_pretrained`].

    Args:
        folder: The CLT's folder; the files of other layers may be missing.
        config: Its configuration.
        layers: The layers to read.
        name: The name or folder that the caller gave.
        dtype: Of the decoders; None: that of the configuration.
        others: Further arguments of `from_pretrained`; refused if they are set.

    Raises:
        ValueError: For a layer that the CLT does not have, for an argument that does not go with it, for a CLT whose
            layers share a budget of active features, and for files that do not fit the configuration.
        FileNotFoundError: If a file of these layers is missing.
    """
    layers = tuple(layers)
    if given := [argument for argument, value in others.items() if value]:
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
        clt = PartialCLT(config)
    for layer in range(config.num_layers):
        if layer not in layers:
            clt.encoders[layer] = nn.Identity()
            clt.decoders[layer] = AbsentDecoder(layer, config.d_model, wide)
            if hasattr(clt, "thresholds"):
                clt.thresholds[layer] = nn.Identity()
            if config.skip_connection:
                clt.skips[layer] = AbsentSkip()
    clt.layers = layers
    fill(clt, state, name)
    check_half_range(clt)
    return clt.requires_grad_(False)
