"""
Writes CLTs as other trainers save them, and converts between the formats of [`hf_clt.hub.importers`].

`write_...` takes a configuration and an iterator over layers, as `read_...` returns them; `export_...` takes a
[`CrossLayerTranscoder`]. The names, shapes and scales of each format stand in its `read_...`.

What another format computes is what the CLT computes in eval mode: a batchtopk CLT becomes a jumprelu one at its
running thresholds, relu becomes jumprelu with θ = 0 where a format has no relu, tied decoders are written out, and a
decoder that a reach below L leaves out is written as zeros. What a format cannot express raises before anything is
written.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor

from .. import checkpoint_format as files
from ..configuration_clt import CLTConfig
from ..modeling_clt import CrossLayerTranscoder
from .importers import (
    CODING_FILE,
    FORGE_CONFIG,
    FORGE_WEIGHTS,
    FORMATS,
    GEMMA_FILE,
    PLT_FILE,
    PLT_THRESHOLD,
    detect_format,
    read_clt,
)
from .model_card import circuit_tracer_gaps, save_model_card


logger = logging.getLogger(__name__)

OWN_FORMATS = ("hf_clt", "circuit-tracer")  # one set of files
NUMBERED_FILES = {"circuit-tracer-plt": PLT_FILE, "gemma-scope-2": GEMMA_FILE}
GEMMA_HOOKS = {
    "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
}


# -- conversion -------------------------------------------------------------------------------------------------------


def convert(
    source: str | Path,
    output: str | Path,
    from_format: str | None = None,
    to_format: str = "hf_clt",
    overwrite: bool = False,
    **options,
) -> tuple[str, CLTConfig, list[Path]]:
    """
    Converts a checkpoint, one layer at a time where both formats have a file per layer.

    The files are written into a folder beside the output and moved there when all of them are complete.

    Args:
        source: A folder, or the file of a format that has a single one.
        output: Folder to write to; created if missing.
        from_format: Format of the source, one of `FORMATS`; recognised if left out.
        to_format: Format of the output.
        overwrite: Whether the output may hold files already. Those of the same names are replaced, and files of layers
            that the CLT has not are removed; all others stay.
        options: Passed to [`read_clt`].

    Returns:
        The source's format, the configuration of the CLT that was read, and the paths of the files that were written.

    Raises:
        FileNotFoundError: If the source or a file of it is missing.
        ValueError: For an unknown format, an output that is not empty, or what either format cannot express.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    if to_format not in FORMATS:
        raise ValueError(f"to_format={to_format!r} is none of {', '.join(FORMATS)}; give one of them")
    from_format = detect_format(source) if from_format is None else from_format
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()):
        if output.resolve() in (source.resolve(), source.resolve().parent):
            raise ValueError(f"output={str(output)!r} is where the source lies; give another folder")
        if not overwrite:
            raise ValueError(f"output={str(output)!r} is not empty; give another folder, or overwrite")
    config, layers = read_clt(source, from_format, **options)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        write_clt(temporary, config, layers, to_format)
        output.mkdir(exist_ok=True)
        written = []
        for path in sorted(Path(temporary).iterdir()):
            written.append(output / path.name)
            os.replace(path, written[-1])
    _remove_other_layers(output, to_format, config.num_layers)
    if to_format in OWN_FORMATS:
        written.append(save_model_card(output, config))
        for gap in circuit_tracer_gaps(config):
            logger.warning("circuit-tracer cannot express %s; hf_clt loads the CLT as it is", gap)
    return from_format, config, written


def write_clt(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]], format: str) -> None:
    """
    Writes a checkpoint in any of `FORMATS`.

    Args:
        folder: Where to; created if missing.
        config: The configuration.
        layers: One dict per layer, as [`read_clt`] gives them.
        format: One of `FORMATS`.
    """
    writers = {
        "hf_clt": write_hf_clt,
        "circuit-tracer": write_hf_clt,
        "circuit-tracer-plt": write_circuit_tracer_plt,
        "crosslayer-coding": write_crosslayer_coding,
        "clt-forge": write_clt_forge,
        "gemma-scope-2": write_gemma_scope_2,
    }
    if format not in writers:
        raise ValueError(f"format={format!r} is none of {', '.join(FORMATS)}; give one of them")
    writers[format](folder, config, layers)


# -- the formats ------------------------------------------------------------------------------------------------------


def write_hf_clt(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """The files of a released CLT, which circuit-tracer reads too, without the model card."""
    config = CLTConfig.from_dict(config.to_dict())
    config.dtype = str(config.dtype).removeprefix("torch.")
    config.architectures = [CrossLayerTranscoder.__name__]
    files.write_release(Path(folder), config, layers)


def export_circuit_tracer(clt: CrossLayerTranscoder, folder: str | Path) -> None:
    """Writes circuit-tracer's files, which are `hf_clt`'s own: [`CrossLayerTranscoder.save_pretrained`]."""
    clt.save_pretrained(folder)


def write_circuit_tracer_plt(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """
    circuit-tracer's per-layer transcoders: `layer_{l}.safetensors` and `config.yaml`.

    Raises:
        ValueError: For a decoder that reaches later layers, topk, or batchtopk without a running threshold.
    """
    if config.reach > 1:
        raise ValueError(
            f"decoder_reach={config.reach}: circuit-tracer-plt has transcoders that write to their own layer alone; "
            "export to circuit-tracer"
        )
    _check_activation_fn(config, "circuit-tracer-plt")
    folder = _made(folder)
    for layer, tensors in enumerate(layers):
        named = {name: tensors[f"{name}_{layer}"] for name in ("W_enc", "b_enc", "b_dec")}
        named["W_dec"] = tensors[f"W_dec_{layer}"][:, 0]
        if config.activation_fn != "relu":
            named[PLT_THRESHOLD] = _threshold(config, tensors, layer)
        if config.skip_connection:
            named["W_skip"] = tensors[f"W_skip_{layer}"].T  # circuit-tracer computes x @ W_skip.T
        files.write_tensors(folder / PLT_FILE.format(layer), named)
    described = {
        "model_name": config.base_model_name_or_path,
        "model_kind": "transcoder_set",
        "feature_input_hook": config.feature_input_hook,
        "feature_output_hook": config.feature_output_hook,
    }
    if config.base_model_name_or_path is None:
        del described["model_name"]
    files.write_text(folder / files.CIRCUIT_TRACER_FILE, yaml.safe_dump(described, sort_keys=False))


def export_circuit_tracer_plt(clt: CrossLayerTranscoder, folder: str | Path) -> None:
    """Writes a CLT of `decoder_reach` 1 as circuit-tracer's per-layer transcoders."""
    _export(clt, folder, "circuit-tracer-plt")


def write_crosslayer_coding(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """
    A checkpoint of `crosslayer-coding`: `clt_checkpoint_latest.safetensors` and `cfg.json`, on raw activations
    (`normalization_method` none). All layers are in memory at once, since they are in one file. The bias of a target
    layer goes to the decoder of its own layer. `cfg.json` has no place for the hooks.

    Raises:
        ValueError: For topk, or batchtopk without a running threshold.
    """
    _check_activation_fn(config, "crosslayer-coding")
    num_layers = config.num_layers
    weights, log_thresholds = {}, []
    for source, tensors in enumerate(layers):
        decoder, bias = tensors[f"W_dec_{source}"], tensors[f"b_dec_{source}"]
        weights[f"encoder_module.encoders.{source}.weight"] = tensors[f"W_enc_{source}"]
        weights[f"encoder_module.encoders.{source}.bias_param"] = tensors[f"b_enc_{source}"]
        for target in range(source, num_layers):
            j = target - source
            pair = f"decoder_module.decoders.{source}->{target}"
            row = decoder[:, j] if j < decoder.shape[1] else torch.zeros_like(decoder[:, 0])
            weights[f"{pair}.weight"] = row.T
            weights[f"{pair}.bias_param"] = bias if j == 0 else torch.zeros_like(bias)
            if config.skip_connection:
                skip = tensors[f"W_skip_{source}"].T
                weights[f"decoder_module.skip_weights.{source}->{target}"] = skip if j == 0 else torch.zeros_like(skip)
        if config.activation_fn != "relu":
            log_thresholds.append(_threshold(config, tensors, source).double().log().float())
    if log_thresholds:
        weights["theta_manager.log_threshold"] = torch.stack(log_thresholds)
    folder = _made(folder)
    files.write_tensors(folder / CODING_FILE, weights)
    cfg = {
        "num_features": config.num_features,
        "num_layers": num_layers,
        "d_model": config.d_model,
        "model_name": config.base_model_name_or_path,
        "normalization_method": "none",
        "activation_fn": "relu" if config.activation_fn == "relu" else "jumprelu",
        "jumprelu_threshold": config.jumprelu_threshold,
        "clt_dtype": str(config.dtype).removeprefix("torch."),
        "decoder_tying": "none",
        "skip_connection": config.skip_connection,
    }
    files.write_text(folder / "cfg.json", json.dumps(cfg, indent=4) + "\n")


def export_crosslayer_coding(clt: CrossLayerTranscoder, folder: str | Path) -> None:
    """Writes a CLT as a checkpoint of `crosslayer-coding`."""
    _export(clt, folder, "crosslayer-coding")


def write_clt_forge(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """
    A CLT of CLT-Forge: `clt_weights.safetensors` and `clt_cfg.json`, with scaling factors of 1. All layers are in
    memory at once, since they are in one file. What its configuration demands about a training that is not known
    (seed, context size, ...) is 0.

    Raises:
        ValueError: For topk, batchtopk without a running threshold, a skip connection, or hooks other than
            `mlp.hook_in` and `hook_mlp_out`, next to which CLT-Forge reads.
    """
    _check_activation_fn(config, "clt-forge")
    if config.skip_connection:
        raise ValueError("skip_connection=True: clt-forge has no skip connection; keep the CLT in hf_clt's files")
    _check_hooks(config, "clt-forge")
    num_layers, crosses = config.num_layers, config.reach > 1 or config.num_layers == 1
    columns = {name: [] for name in ("W_enc", "b_enc", "log_threshold", "W_dec", "b_dec")}
    for source, tensors in enumerate(layers):
        decoder, bias = tensors[f"W_dec_{source}"], tensors[f"b_dec_{source}"]
        columns["W_enc"].append(tensors[f"W_enc_{source}"].T)
        columns["b_enc"].append(tensors[f"b_enc_{source}"])
        columns["log_threshold"].append(_threshold(config, tensors, source).double().log().float())
        for j in range(num_layers - source if crosses else 1):
            columns["W_dec"].append(decoder[:, j] if j < decoder.shape[1] else torch.zeros_like(decoder[:, 0]))
            columns["b_dec"].append(bias if j == 0 else torch.zeros_like(bias))
    weights = {name: torch.stack(tensors) for name, tensors in columns.items()}
    for side in ("in", "out"):
        weights[f"estimated_norm_scaling_factor_{side}"] = torch.ones(num_layers)
    # Buffers that CLT-Forge misses otherwise: counts of steps without activity, and which decoders a source layer has.
    weights["feature_count"] = torch.zeros(num_layers, config.num_features, dtype=torch.int64)
    if crosses:
        sources, _ = torch.triu_indices(num_layers, num_layers)
        weights["layer_mask"] = (sources == torch.arange(num_layers)[:, None]).to(weights["W_dec"].dtype)
    folder = _made(folder)
    files.write_tensors(folder / FORGE_WEIGHTS, weights)
    cfg = {
        "device": "cpu",
        "dtype": str(config.dtype).removeprefix("torch."),
        "seed": 0,
        "model_name": config.base_model_name_or_path or "",
        "d_in": config.d_model,
        "d_latent": config.num_features,
        "n_layers": num_layers,
        "jumprelu_bandwidth": config.jumprelu_bandwidth,
        "jumprelu_init_threshold": config.jumprelu_threshold,
        "normalize_decoder": False,
        "dead_feature_window": 0,
        "cross_layer_decoders": crosses,
        "context_size": 0,
        "l0_coefficient": 0.0,
    }
    files.write_text(folder / FORGE_CONFIG, json.dumps(cfg, indent=2) + "\n")


def export_clt_forge(clt: CrossLayerTranscoder, folder: str | Path) -> None:
    """Writes a CLT as CLT-Forge saves it."""
    _export(clt, folder, "clt-forge")


def write_gemma_scope_2(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """
    The files of a cross-layer transcoder of Gemma Scope 2: `params_layer_{l}.safetensors` and `config.json`.

    Raises:
        ValueError: For topk, batchtopk without a running threshold, or hooks other than `mlp.hook_in` and
            `hook_mlp_out`.
    """
    _check_activation_fn(config, "gemma-scope-2")
    _check_hooks(config, "gemma-scope-2")
    folder = _made(folder)
    for layer, tensors in enumerate(layers):
        decoder = tensors[f"W_dec_{layer}"]
        w_dec = decoder.new_zeros(config.num_features, config.num_layers, config.d_model)
        w_dec[:, layer : layer + decoder.shape[1]] = decoder
        params = {
            "w_enc": tensors[f"W_enc_{layer}"].T,
            "b_enc": tensors[f"b_enc_{layer}"],
            "threshold": _threshold(config, tensors, layer),
            "w_dec": w_dec,
            "b_dec": tensors[f"b_dec_{layer}"],
        }
        if config.skip_connection:
            params["affine_skip_connection"] = tensors[f"W_skip_{layer}"]
        files.write_tensors(folder / GEMMA_FILE.format(layer), params)
    described = {
        **GEMMA_HOOKS,
        "width": config.num_layers * config.num_features,
        "model_name": config.base_model_name_or_path,
        "architecture": "jump_relu",
        "affine_connection": config.skip_connection,
        "type": "clt",
    }
    files.write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")


def export_gemma_scope_2(clt: CrossLayerTranscoder, folder: str | Path) -> None:
    """Writes a CLT as Gemma Scope 2 does."""
    _export(clt, folder, "gemma-scope-2")


# -- what the formats share -------------------------------------------------------------------------------------------


def _export(clt: CrossLayerTranscoder, folder: str | Path, format: str) -> None:
    """Writes a model with its statistics folded in; the live model is left as it is."""
    config = CLTConfig.from_dict(clt.config.to_dict())
    config.dtype = str(clt.dtype).removeprefix("torch.")
    layers = (clt.released_layer(layer) for layer in range(config.num_layers))
    write_clt(folder, config, layers, format)
    _remove_other_layers(Path(folder), format, config.num_layers)


def _made(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove_other_layers(folder: Path, format: str, num_layers: int) -> None:
    """Removes files of layers that the CLT has not: readers count the layers by these files."""
    if format in OWN_FORMATS:
        files.remove_weights(folder, first_layer=num_layers)
    elif format in NUMBERED_FILES:
        layer = num_layers
        while (stale := folder / NUMBERED_FILES[format].format(layer)).is_file():
            stale.unlink()
            layer += 1


def _check_activation_fn(config: CLTConfig, format: str) -> None:
    if config.activation_fn == "topk":
        raise ValueError(
            f"activation_fn='topk': {format} has no top-k that drops negative pre-activations; convert the CLT to "
            "jumprelu first"
        )


def _check_hooks(config: CLTConfig, format: str) -> None:
    for name, needed in (("feature_input_hook", "mlp.hook_in"), ("feature_output_hook", "hook_mlp_out")):
        if getattr(config, name) != needed:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: CLTs of {format} have {needed!r}, and its files name no other; "
                "keep the CLT in hf_clt's files"
            )


def _threshold(config: CLTConfig, tensors: dict[str, Tensor], layer: int) -> Tensor:
    """θ of a layer, (F,) float32; 0 for relu, the running threshold for batchtopk."""
    if config.activation_fn == "relu":
        return torch.zeros(config.num_features)
    theta = tensors[f"threshold_{layer}"]
    if config.activation_fn == "batchtopk" and theta.isinf().all():
        raise ValueError(
            f"threshold_{layer} is infinite: this batchtopk CLT has no running threshold yet; train it first"
        )
    return theta


__all__ = [
    "convert",
    "export_circuit_tracer",
    "export_circuit_tracer_plt",
    "export_clt_forge",
    "export_crosslayer_coding",
    "export_gemma_scope_2",
    "write_circuit_tracer_plt",
    "write_clt",
    "write_clt_forge",
    "write_crosslayer_coding",
    "write_gemma_scope_2",
    "write_hf_clt",
]
