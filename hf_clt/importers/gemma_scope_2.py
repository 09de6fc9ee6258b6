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

from pathlib import Path
from typing import Any

from torch import Tensor

from . import shared


CONFIG = "config.json"
LAYER_FILE = "params_layer_{}.safetensors"
SKIP = "affine_skip_connection"
INPUT_HOOKS = {".pre_feedforward_layernorm.output": "mlp.hook_in"}  # ends of `hf_hook_point_in`
OUTPUT_HOOKS = {".post_feedforward_layernorm.output": "hook_mlp_out"}  # ends of `hf_hook_point_out`


def read(folder: Path, drop_acausal: bool = False, **overrides: Any) -> shared.Checkpoint:
    """
    A cross-layer transcoder of Gemma Scope 2.

    Args:
        folder: The folder.
        drop_acausal: Leaves out what a feature writes to layers before its own, as circuit-tracer does. `hf_clt`
            cannot express it, so anything but zero there is refused otherwise.
        overrides: Fields of [`CLTConfig`] that the files do not say, such as the hooks if `config.json` is missing.

    Raises:
        ValueError: For another kind of model, or, when a layer is read, a decoder that writes to earlier layers.
    """
    paths = shared.numbered_files(folder, LAYER_FILE)
    described = folder / CONFIG
    cfg = shared.read_settings(described) if described.is_file() else {}
    with_skip = SKIP in shared.read_header(paths[0])
    for name, expected in (("type", "clt"), ("architecture", "jump_relu"), ("affine_connection", with_skip)):
        if cfg.get(name, expected) != expected:
            raise ValueError(f"{name}={cfg[name]!r} in {described}, but it needs {expected!r} to fit {paths[0].name}")
    num_layers, (d_model, num_features) = len(paths), shared.read_shape(paths[0], "w_enc", "DF")
    shapes = {
        "w_enc": (d_model, num_features),
        "b_enc": (num_features,),
        "threshold": (num_features,),
        "w_dec": (num_features, num_layers, d_model),
        "b_dec": (d_model,),
    }
    if with_skip:
        shapes[SKIP] = (d_model, d_model)
    fields = {
        "num_layers": num_layers,
        "d_model": d_model,
        "num_features": num_features,
        "activation_fn": "jumprelu",
        "skip_connection": with_skip,
        "base_model_name_or_path": cfg.get("model_name") or None,
        "feature_input_hook": shared.hook_by_ending(cfg.get("hf_hook_point_in"), INPUT_HOOKS),
        "feature_output_hook": shared.hook_by_ending(cfg.get("hf_hook_point_out"), OUTPUT_HOOKS),
        "dtype": shared.check_tensors(paths, shapes),
    }

    def read_layer(layer: int) -> dict[str, Tensor | None]:
        tensors = {name: shared.read_tensor(paths[layer], name) for name in shapes}
        if not drop_acausal and tensors["w_dec"][:, :layer].any():
            raise ValueError(
                f"w_dec in {paths[layer]} writes to layers before its own, {layer}, which hf_clt cannot express; give "
                "drop_acausal to leave that out, as circuit-tracer does"
            )
        return {
            "W_enc": tensors["w_enc"].T,
            "b_enc": tensors["b_enc"],
            "b_dec": tensors["b_dec"],
            "W_dec": tensors["w_dec"][:, layer:],
            "threshold": tensors["threshold"],
            "W_skip": tensors.get(SKIP),
        }

    return shared.make_checkpoint(fields, overrides, described, read_layer)
