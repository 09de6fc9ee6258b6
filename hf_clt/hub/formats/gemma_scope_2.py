"""
`gemma-scope-2`: a cross-layer transcoder of Gemma Scope 2, a folder `clt/...` of google/gemma-scope-2-*, with
`config.json` and `params_layer_{l}.safetensors`.

Each file holds `w_enc` (D, F), `b_enc` (F,), `threshold` (F,), `w_dec` (F, L, D) whose second index is the target
layer, `b_dec` (D,) of the layer, and perhaps `affine_skip_connection` (D, D), by which the layer's own input is
multiplied (`x @ affine_skip_connection`) and added. Features are 1[h > θ]·relu(h). `config.json` names the output of
`pre_feedforward_layernorm` as the input (`mlp.hook_in`) and that of `post_feedforward_layernorm` as the output
(`hook_mlp_out`). Whether published decoders are exactly zero towards earlier layers could not be verified.

Sources: `load_gemma_scope_2_clt` in circuit-tracer (`circuit_tracer/transcoder/cross_layer_transcoder.py`), and the
`JumpReLUMultiLayerSAE` of Google's tutorial, as several public repositories repeat it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ... import checkpoint_format as files
from ...configuration_clt import CLTConfig
from ...files import write_text
from . import shared
from .shared import Checkpoint


CONFIG = "config.json"
LAYER_FILE = "params_layer_{}.safetensors"
INPUT_HOOKS = {".pre_feedforward_layernorm.output": "mlp.hook_in"}  # ends of `hf_hook_point_in`
OUTPUT_HOOKS = {".post_feedforward_layernorm.output": "hook_mlp_out"}  # ends of `hf_hook_point_out`
WRITTEN_HOOKS = {
    "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
}


def read(folder: str | Path, drop_acausal: bool = False, **overrides) -> Checkpoint:
    """
    A cross-layer transcoder of Gemma Scope 2.

    Args:
        folder: The folder.
        drop_acausal: Leaves out what a feature writes to layers before its own, as circuit-tracer does. `hf_clt`
            cannot express it, so that anything but zero there is refused otherwise.
        overrides: Fields of [`CLTConfig`] that the files do not say, such as the hooks if `config.json` is missing.

    Raises:
        FileNotFoundError: For a missing file.
        ValueError: For a missing, unknown or wrongly shaped tensor, a negative threshold, another kind of model, or,
            when a layer is read, a decoder that writes to earlier layers.
    """
    folder = Path(folder).expanduser()
    paths = shared.numbered_files(folder, LAYER_FILE)
    cfg_path = folder / CONFIG
    cfg = shared.read_json(cfg_path) if cfg_path.is_file() else {}
    for name, expected in (("type", "clt"), ("architecture", "jump_relu")):
        if cfg.get(name, expected) != expected:
            raise ValueError(f"{name}={cfg[name]!r} in {cfg_path}: a CLT of Gemma Scope 2 has {name}={expected!r}")
    headers = [shared.read_header(path) for path in paths]
    shared.check_names(paths[0], headers[0], ["w_enc"])
    d_model, num_features = shared.matrix_shape(paths[0], headers[0], "w_enc")
    num_layers = len(paths)
    with_skip = "affine_skip_connection" in headers[0]
    if cfg.get("affine_connection", with_skip) != with_skip:
        raise ValueError(
            f"affine_connection={cfg['affine_connection']} in {cfg_path}, but {paths[0].name} has "
            f"{'an' if with_skip else 'no'} affine_skip_connection; the files belong to different CLTs"
        )
    shapes = {
        "w_enc": (d_model, num_features),
        "b_enc": (num_features,),
        "threshold": (num_features,),
        "w_dec": (num_features, num_layers, d_model),
        "b_dec": (d_model,),
    }
    if with_skip:
        shapes["affine_skip_connection"] = (d_model, d_model)
    for path, header in zip(paths, headers, strict=True):
        shared.check_tensors(path, header, shapes)
        shared.check_threshold(path, "threshold", shared.read_tensor(path, "threshold"))
    dtype = shared.common_dtype(paths, headers, [name for name in shapes if name != "threshold"])
    config = shared.make_config(
        {
            "num_layers": num_layers,
            "d_model": d_model,
            "num_features": num_features,
            "activation_fn": "jumprelu",
            "skip_connection": with_skip,
            "base_model_name_or_path": cfg.get("model_name") or None,
            "feature_input_hook": shared.hook_by_ending(cfg.get("hf_hook_point_in"), INPUT_HOOKS),
            "feature_output_hook": shared.hook_by_ending(cfg.get("hf_hook_point_out"), OUTPUT_HOOKS),
            "dtype": dtype,
        },
        overrides,
        cfg_path,
    )

    def layers():
        for layer, path in enumerate(paths):
            decoder = shared.read_tensor(path, "w_dec")
            if not drop_acausal and decoder[:, :layer].any():
                raise ValueError(
                    f"w_dec in {path} writes to layers before its own, {layer}, which hf_clt cannot express; give "
                    "drop_acausal to leave that out, as circuit-tracer does"
                )
            yield shared.make_layer(
                layer,
                dtype,
                W_enc=shared.read_tensor(path, "w_enc").T,
                b_enc=shared.read_tensor(path, "b_enc"),
                b_dec=shared.read_tensor(path, "b_dec"),
                W_dec=decoder[:, layer:],
                threshold=shared.read_tensor(path, "threshold"),
                W_skip=shared.read_tensor(path, "affine_skip_connection") if with_skip else None,
            )

    return config, layers()


def write(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """
    Writes the files of a cross-layer transcoder of Gemma Scope 2.

    Raises:
        ValueError: For topk, batchtopk without a running threshold, or hooks other than `mlp.hook_in` and
            `hook_mlp_out`.
    """
    shared.check_activation_fn(config, "gemma-scope-2")
    shared.check_hooks(config, "gemma-scope-2")
    folder = shared.make_folder(folder)
    for layer, tensors in enumerate(layers):
        decoder = tensors[f"W_dec_{layer}"]
        w_dec = decoder.new_zeros(config.num_features, config.num_layers, config.d_model)
        w_dec[:, layer : layer + decoder.shape[1]] = decoder
        params = {
            "w_enc": tensors[f"W_enc_{layer}"].T,
            "b_enc": tensors[f"b_enc_{layer}"],
            "threshold": shared.jumprelu_threshold(config, tensors, layer),
            "w_dec": w_dec,
            "b_dec": tensors[f"b_dec_{layer}"],
        }
        if config.skip_connection:
            params["affine_skip_connection"] = tensors[f"W_skip_{layer}"]
        files.write_tensors(folder / LAYER_FILE.format(layer), params)
    described = {
        **WRITTEN_HOOKS,
        "width": config.num_layers * config.num_features,
        "model_name": config.base_model_name_or_path,
        "architecture": "jump_relu",
        "affine_connection": config.skip_connection,
        "type": "clt",
    }
    write_text(folder / CONFIG, json.dumps(described, indent=2) + "\n")


__all__ = ["LAYER_FILE", "read", "write"]
