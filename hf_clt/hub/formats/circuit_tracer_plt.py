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

import yaml
from torch import Tensor

from ... import checkpoint_format as files
from ...configuration_clt import CLTConfig
from ...files import write_text
from . import shared
from .shared import Checkpoint


CONFIG = files.CIRCUIT_TRACER_FILE
LAYER_FILE = "layer_{}.safetensors"
THRESHOLD = "activation_function.threshold"


def read(folder: str | Path, **overrides) -> Checkpoint:
    """
    Per-layer transcoders as a CLT of `decoder_reach` 1.

    Args:
        folder: The folder.
        overrides: Fields of [`CLTConfig`] that the files do not say, such as a hook that `hf_clt` has no name for.
            With `activation: topk`, `activation_fn="topk"` must be given: circuit-tracer keeps the k largest
            pre-activations whatever their sign, `hf_clt` applies a ReLU to them, which is the same as long as the k
            largest are positive.

    Raises:
        FileNotFoundError: For a missing file.
        ValueError: For a missing, unknown or wrongly shaped tensor, a negative threshold, a hook without a name here,
            or an activation function that `hf_clt` has not.
    """
    folder = Path(folder).expanduser()
    yaml_path = folder / CONFIG
    described = shared.read_yaml(yaml_path) if yaml_path.is_file() else {}
    kind = described.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise ValueError(f"model_kind={kind!r} in {yaml_path}: per-layer transcoders are of the kind 'transcoder_set'")
    paths = _layer_paths(folder, described)
    headers = [shared.read_header(path) for path in paths]
    shared.check_names(paths[0], headers[0], ["W_enc", "b_dec"])
    num_features, d_model = shared.matrix_shape(paths[0], headers[0], "W_enc")

    activation = described.get("activation")
    with_threshold = THRESHOLD in headers[0]
    if activation == "topk":
        if overrides.get("activation_fn") != "topk":
            raise ValueError(
                f"activation='topk' in {yaml_path}: circuit-tracer keeps the k largest pre-activations even if they "
                "are negative, hf_clt applies a ReLU to them; give activation_fn='topk' if they are positive"
            )
        k = overrides.get("k", described.get("k"))
        if k is None:
            raise ValueError(f"activation='topk' in {yaml_path}, but k is missing; give k")
        function = {"activation_fn": "topk", "k": k}
        overrides = {name: value for name, value in overrides.items() if name not in function}
    elif activation in (None, "relu", "jumprelu", "jump_relu"):
        if activation is not None and with_threshold != (activation != "relu"):
            raise ValueError(
                f"activation={activation!r} in {yaml_path}, but {paths[0].name} has "
                f"{'a' if with_threshold else 'no'} tensor {THRESHOLD}; correct config.yaml"
            )
        function = {"activation_fn": "jumprelu" if with_threshold else "relu"}
    else:
        raise ValueError(f"activation={activation!r} in {yaml_path} is none of relu, jumprelu and topk")

    with_skip = "W_skip" in headers[0]
    shapes = {
        "W_enc": (num_features, d_model),
        "W_dec": (num_features, d_model),
        "b_enc": (num_features,),
        "b_dec": (d_model,),
    }
    if function["activation_fn"] == "jumprelu":
        shapes[THRESHOLD] = (num_features,)
    if with_skip:
        shapes["W_skip"] = (d_model, d_model)
    for path, header in zip(paths, headers, strict=True):
        shared.check_tensors(path, header, shapes, may_hold={"k"} if function["activation_fn"] == "topk" else set())
        if THRESHOLD in shapes:
            shared.check_threshold(path, THRESHOLD, shared.read_tensor(path, THRESHOLD))
    dtype = shared.common_dtype(paths, headers, shapes)
    config = shared.make_config(
        {
            "num_layers": len(paths),
            "d_model": d_model,
            "num_features": num_features,
            "decoder_reach": 1,
            "skip_connection": with_skip,
            "base_model_name_or_path": described.get("model_name"),
            "feature_input_hook": described.get("feature_input_hook"),
            "feature_output_hook": described.get("feature_output_hook"),
            "dtype": dtype,
            **function,
        },
        overrides,
        yaml_path,
    )

    def layers():
        for layer, path in enumerate(paths):
            yield shared.make_layer(
                layer,
                dtype,
                W_enc=shared.read_tensor(path, "W_enc"),
                b_enc=shared.read_tensor(path, "b_enc"),
                b_dec=shared.read_tensor(path, "b_dec"),
                W_dec=shared.read_tensor(path, "W_dec")[:, None],
                threshold=shared.read_tensor(path, THRESHOLD) if THRESHOLD in shapes else None,
                W_skip=shared.read_tensor(path, "W_skip").T if with_skip else None,
            )

    return config, layers()


def _layer_paths(folder: Path, described: dict) -> list[Path]:
    """The weight files in the order of their layers."""
    listed = described.get("transcoders")
    if listed is None:
        return shared.numbered_files(folder, LAYER_FILE)
    for name in listed:
        if "://" in str(name) or not str(name).endswith(".safetensors"):
            raise ValueError(
                f"transcoders in {folder / CONFIG} names {name}, which is no safetensors file on "
                "this machine; download the files and name them layer_0.safetensors, layer_1.safetensors and so on"
            )
    return [folder / name for name in listed]


def write(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """
    Writes a CLT of `decoder_reach` 1 as per-layer transcoders.

    Raises:
        ValueError: For a decoder that reaches later layers, topk, or batchtopk without a running threshold.
    """
    if config.reach > 1:
        raise ValueError(
            f"decoder_reach={config.reach}: circuit-tracer-plt has transcoders that write to their own layer alone; "
            "export to circuit-tracer"
        )
    shared.check_activation_fn(config, "circuit-tracer-plt")
    folder = shared.make_folder(folder)
    for layer, tensors in enumerate(layers):
        named = {name: tensors[f"{name}_{layer}"] for name in ("W_enc", "b_enc", "b_dec")}
        named["W_dec"] = tensors[f"W_dec_{layer}"][:, 0]
        if config.activation_fn != "relu":
            named[THRESHOLD] = shared.jumprelu_threshold(config, tensors, layer)
        if config.skip_connection:
            named["W_skip"] = tensors[f"W_skip_{layer}"].T
        files.write_tensors(folder / LAYER_FILE.format(layer), named)
    described = {
        "model_name": config.base_model_name_or_path,
        "model_kind": "transcoder_set",
        "feature_input_hook": config.feature_input_hook,
        "feature_output_hook": config.feature_output_hook,
    }
    if config.base_model_name_or_path is None:
        del described["model_name"]
    write_text(folder / CONFIG, yaml.safe_dump(described, sort_keys=False))


__all__ = ["LAYER_FILE", "read", "write"]
