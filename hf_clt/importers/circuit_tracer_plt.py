"""
`circuit-tracer-plt`: circuit-tracer's per-layer transcoders, which are a CLT of `decoder_reach` 1.

A folder with two kinds of files:

- `config.yaml`: `model_kind: transcoder_set`, `model_name`, the hooks, `activation`, `k`, and perhaps `transcoders`, a
  list of files;
- `layer_{l}.safetensors`: `W_enc` (F, D), `W_dec` (F, D), `b_enc` (F,), `b_dec` (D,), and perhaps
  `activation_function.threshold` (F,), θ itself, and `W_skip` (D, D).

Without a threshold the activation function is a ReLU. circuit-tracer applies the skip as `x @ W_skip.T`, other than in
its CLTs, so that it is transposed here.

Sources in safety-research/circuit-tracer: `circuit_tracer/transcoder/single_layer_transcoder.py` (`load_transcoder`,
`compute_skip`) and `circuit_tracer/utils/hf_utils.py` (`resolve_transcoder_paths`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from .. import release as files
from ..configuration_clt import CLTConfig
from ..files import write_text
from . import shared


CONFIG = files.CIRCUIT_TRACER_FILE
LAYER_FILE = "layer_{}.safetensors"
THRESHOLD = "activation_function.threshold"


def read(folder: Path, **overrides: Any) -> shared.Checkpoint:
    """
    Per-layer transcoders as a CLT of `decoder_reach` 1.

    Args:
        folder: The folder.
        overrides: Fields of [`CLTConfig`] that the files do not say, such as a hook that `hf_clt` has no name for.
            With `activation: topk`, `activation_fn="topk"` must be given: circuit-tracer keeps the k largest
            pre-activations whatever their sign, `hf_clt` applies a ReLU to them, which is the same as long as the k
            largest are positive.

    Raises:
        ValueError: For an activation function that `hf_clt` has not, or that the tensors contradict.
    """
    described = folder / CONFIG
    cfg = shared.read_settings(described) if described.is_file() else {}
    kind = cfg.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise ValueError(f"model_kind={kind!r} in {described}: per-layer transcoders are of the kind 'transcoder_set'")
    names = cfg.get("transcoders")
    paths = shared.numbered_files(folder, LAYER_FILE) if names is None else [folder / name for name in names]
    for name, path in zip(names or (), paths, strict=False):
        if not path.is_file():
            raise FileNotFoundError(
                f"{name}, of the transcoders in {described}, is no file in its folder; download the files and name "
                "them layer_0.safetensors, layer_1.safetensors and so on"
            )
    num_features, d_model = shared.read_shape(paths[0], "W_enc", "FD")
    shapes = {
        "W_enc": (num_features, d_model),
        "W_dec": (num_features, d_model),
        "b_enc": (num_features,),
        "b_dec": (d_model,),
    }
    optional = {THRESHOLD: (num_features,), "W_skip": (d_model, d_model)}
    shapes |= {name: optional[name] for name in optional if name in shared.read_header(paths[0])}
    function = read_activation(cfg, described, THRESHOLD in shapes, overrides)
    fields = {
        "num_layers": len(paths),
        "d_model": d_model,
        "num_features": num_features,
        "decoder_reach": 1,
        "skip_connection": "W_skip" in shapes,
        "base_model_name_or_path": cfg.get("model_name"),
        "feature_input_hook": cfg.get("feature_input_hook"),
        "feature_output_hook": cfg.get("feature_output_hook"),
        "dtype": shared.check_tensors(paths, shapes, may_hold=("k",) if "k" in function else ()),
    }

    def read_layer(layer: int) -> dict[str, Tensor | None]:
        tensors = {name: shared.read_tensor(paths[layer], name) for name in shapes}
        tensors["W_dec"] = tensors["W_dec"][:, None]
        tensors["threshold"] = tensors.pop(THRESHOLD, None)
        if "W_skip" in tensors:
            tensors["W_skip"] = tensors["W_skip"].T
        return tensors

    return shared.make_checkpoint(fields | function, overrides, described, read_layer)


def read_activation(cfg: dict, described: Path, with_threshold: bool, overrides: dict) -> dict:
    """`activation_fn`, and for topk `k`; what the caller may set of them is taken out of `overrides`."""
    activation = cfg.get("activation")
    if activation == "topk" and not with_threshold:
        if overrides.pop("activation_fn", None) != "topk":
            raise ValueError(
                f"activation='topk' in {described}: circuit-tracer keeps the k largest pre-activations even if they "
                "are negative, hf_clt applies a ReLU to them; give activation_fn='topk' if they are positive"
            )
        k = overrides.pop("k", cfg.get("k"))
        if k is None:
            raise ValueError(f"activation='topk' in {described}, but k is missing; give k")
        return {"activation_fn": "topk", "k": k}
    if activation not in ((None, "jumprelu", "jump_relu") if with_threshold else (None, "relu")):
        raise ValueError(
            f"activation={activation!r} in {described} is none that hf_clt has with {'a' if with_threshold else 'no'} "
            f"tensor {THRESHOLD}: that is jumprelu with one, relu or topk without; correct config.yaml"
        )
    return {"activation_fn": "jumprelu" if with_threshold else "relu"}


def write(folder: Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """
    Writes a CLT of `decoder_reach` 1 as per-layer transcoders: a batchtopk one as jumprelu at its running thresholds.

    Raises:
        ValueError: For a decoder that reaches later layers, topk, or batchtopk without a running threshold.
    """
    if config.reach > 1:
        raise ValueError(f"decoder_reach={config.reach}: per-layer transcoders write to their own layer alone")
    if config.activation_fn == "topk":
        raise ValueError(
            "activation_fn='topk': circuit-tracer's keeps negative pre-activations; make it jumprelu first"
        )
    for layer, tensors in enumerate(layers):
        named = {name: tensors[f"{name}_{layer}"] for name in ("W_enc", "b_enc", "b_dec")}
        named["W_dec"] = tensors[f"W_dec_{layer}"][:, 0]
        if config.activation_fn != "relu":
            named[THRESHOLD] = tensors[f"threshold_{layer}"]
            if named[THRESHOLD].isinf().all():
                raise ValueError("this batchtopk CLT has no running threshold yet; train it first")
        if config.skip_connection:
            named["W_skip"] = tensors[f"W_skip_{layer}"].T
        files.write_tensors(folder / LAYER_FILE.format(layer), named)
    described = {
        "model_name": config.base_model_name_or_path,
        "model_kind": "transcoder_set",
        "feature_input_hook": config.feature_input_hook,
        "feature_output_hook": config.feature_output_hook,
    }
    described = {name: value for name, value in described.items() if value is not None}
    write_text(folder / CONFIG, yaml.safe_dump(described, sort_keys=False))
