"""
`hf_clt` and `circuit-tracer`: one set of files, those of [`hf_clt.checkpoint_format`].

A released CLT is `hf_clt`. The same tensors without a `config.json` are `circuit-tracer`: circuit-tracer reads a
released CLT as it is, and its own CLTs have these files and no others. Source: `cross_layer_transcoder.py` in
safety-research/circuit-tracer.

circuit-tracer takes every decoder to reach the last layer: where a CLT of a smaller reach is written for it, the rest
is zeros.

As a model, they are read by [`CrossLayerTranscoder.from_pretrained`] and written by `save_pretrained`.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ... import checkpoint_format as files
from ...configuration_clt import CLTConfig
from ...modeling_clt import CrossLayerTranscoder
from .shared import Checkpoint


def read(folder: str | Path, **overrides) -> Checkpoint:
    """
    A released CLT, or a folder that has circuit-tracer's files alone.

    Args:
        folder: The folder.
        overrides: Fields of [`CLTConfig`].
    """
    folder = Path(folder).expanduser()
    config = files.read_config(folder, overrides)
    files.check_files(folder, config)

    def layers():
        for layer in range(config.num_layers):
            yield {
                name: files.read_tensor(folder, file, name)
                for file, names in files.layer_files(config, layer).items()
                for name in names
            }

    return config, layers()


def with_full_reach(config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> Checkpoint:
    """The same function with decoders that reach the last layer: zeros behind the reach, and no ties."""
    if config.reach == config.num_layers:
        return config, layers
    whole = CLTConfig.from_dict(config.to_dict() | {"decoder_reach": None, "decoder_tying": "none"})

    def padded():
        for layer, tensors in enumerate(layers):
            decoder = tensors[f"W_dec_{layer}"]
            missing = whole.num_targets(layer) - decoder.shape[1]
            zeros = decoder.new_zeros(decoder.shape[0], missing, decoder.shape[2])
            yield tensors | {f"W_dec_{layer}": torch.cat([decoder, zeros], dim=1)}

    return whole, padded()


def write(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """The files of a released CLT, which circuit-tracer reads too, without the model card."""
    config = copy.deepcopy(config)
    config.dtype = str(config.dtype).removeprefix("torch.")
    config.architectures = [CrossLayerTranscoder.__name__]
    files.write_release(Path(folder), config, layers)


__all__ = ["read", "with_full_reach", "write"]
