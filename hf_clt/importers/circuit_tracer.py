"""
`hf_clt` and `circuit-tracer`: one set of files, those of [`hf_clt.release`].

A released CLT is `hf_clt`. The same tensors without a `config.json` are `circuit-tracer`: circuit-tracer reads a
released CLT as it is, and its own CLTs have these files and no others. Source: `cross_layer_transcoder.py` in
safety-research/circuit-tracer.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .. import release as files
from ..configuration_clt import CLTConfig
from .shared import Checkpoint


def read(folder: Path, **overrides: Any) -> Checkpoint:
    """A released CLT, or a folder that has circuit-tracer's files alone; `overrides` are fields of [`CLTConfig`]."""
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


def with_full_reach(config: CLTConfig, layers: Iterable[dict]) -> Checkpoint:
    """
    The same function with decoders that reach the last layer, as circuit-tracer takes every decoder to do: zeros
    behind the reach, and no ties.
    """
    if config.reach == config.num_layers:
        return config, layers
    whole = CLTConfig.from_dict(config.to_dict() | {"decoder_reach": None, "decoder_tying": "none"})

    def padded():
        for layer, tensors in enumerate(layers):
            decoder = tensors[f"W_dec_{layer}"]
            missing = whole.num_targets(layer) - decoder.shape[1]
            yield tensors | {f"W_dec_{layer}": torch.nn.functional.pad(decoder, (0, 0, 0, missing))}

    return whole, padded()
