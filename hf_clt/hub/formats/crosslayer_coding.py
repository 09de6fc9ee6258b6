"""
`crosslayer-coding`: one flat safetensors file beside `cfg.json`.

The file holds

- `encoder_module.encoders.{l}.weight` (F, D) and `.bias_param` (F,);
- `decoder_module.decoders.{s}->{t}.weight` (D, F) and `.bias_param` (D,) for every pair s ≤ t, or `decoders.{l}` with
  tied decoders;
- for jumprelu `theta_manager.log_threshold` (L, F).

Each decoder adds its own bias, so that the biases of a target's pairs (with `per_source` tying, of all source layers
up to it) are summed. Its gate is h ≥ θ where `hf_clt`'s is h > θ: they differ only where a pre-activation equals its
threshold exactly.

The model works on normalised activations. The statistics lie in a file of their own, `norm_stats.json`:
`{layer: {"inputs" | "targets": {"mean", "std"}}}`, per dimension, and 1e-6 is added to each std
(`ManifestActivationStore._prep_norm`). They are folded into the weights. What its trainer applied is a setting of its
`TrainingConfig`, which a checkpoint does not hold; `normalization_method` in `cfg.json` may be `none` even so.

Sources: `clt/models/clt.py`, `activations.py` and `clt/training` in curt-tigges/crosslayer-coding;
`clt/models/encoder.py`, `decoder.py`, `theta.py`, `parallel.py` in its copy utahnlp/crosslayer-coding.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ... import checkpoint_format as files
from ...configuration_clt import CLTConfig
from ...files import write_text
from . import shared
from .shared import Checkpoint


logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "clt_checkpoint_latest.safetensors", "cfg.json"
STATISTICS = "norm_stats.json"
MIN_STD = 1e-6  # crosslayer-coding adds it to every standard deviation
ENCODER = re.compile(r"encoder_module\.encoders\.(\d+)\.weight")
LOG_THRESHOLD = "theta_manager.log_threshold"
INPUT_HOOKS = {".mlp.input": "mlp.hook_in"}  # ends of `mlp_input_template`
OUTPUT_HOOKS = {".mlp.output": "mlp.hook_out"}  # ends of `mlp_output_template`


# -- reading ----------------------------------------------------------------------------------------------------------


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is a checkpoint of crosslayer-coding."""
    return any(ENCODER.fullmatch(name) for name in names)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of crosslayer-coding in a folder; the latest alone if it is among them under that name."""
    latest = folder / WEIGHTS
    candidates = [latest] if latest.is_file() else sorted(folder.glob("*.safetensors"))
    return [path for path in candidates if is_checkpoint(shared.read_header(path))]


def read(path: str | Path, norm_stats: str | Path | None = None, **overrides) -> Checkpoint:
    """
    A checkpoint of crosslayer-coding, its statistics folded in.

    Args:
        path: The safetensors file, or its folder.
        norm_stats: The statistics' file; `"none"` if the CLT was trained on raw activations. By default a
            `norm_stats.json` beside the checkpoint.
        overrides: Fields of [`CLTConfig`] that the files do not say, such as the hooks.

    Raises:
        FileNotFoundError: For a missing file.
        ValueError: For a missing, unknown or wrongly shaped tensor; statistics that are missing or contradict
            `cfg.json`; topk and batchtopk, which rank pre-activations standardised over the batch and keep negative
            ones; `sqrt_d_model` normalisation, of which no code could be found; feature offsets and scales; a skip
            connection that adds other layers' inputs.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = find_checkpoints(path)
        if len(found) != 1:
            names = shared.some(file.name for file in found)
            raise ValueError(
                f"{path} holds {len(found)} checkpoints of crosslayer-coding"
                + (f" ({names}): give one of these files" if found else ": give the file")
            )
        path = found[0]
    cfg_path = path.with_name(CONFIG)
    cfg = shared.read_json(cfg_path)
    for name in ("num_layers", "d_model", "num_features"):
        if not isinstance(cfg.get(name), int):
            raise ValueError(f"{name}={cfg.get(name)!r} in {cfg_path} is no number; it must describe {path.name}")
    num_layers, d_model, num_features = cfg["num_layers"], cfg["d_model"], cfg["num_features"]
    activation_fn = cfg.get("activation_fn", "jumprelu")
    if activation_fn not in ("relu", "jumprelu"):
        raise ValueError(
            f"activation_fn={activation_fn!r} in {cfg_path}: crosslayer-coding ranks pre-activations standardised "
            "over the batch, which hf_clt has not; convert it with its scripts/convert_batchtopk_to_jumprelu.py first"
        )
    with_threshold = activation_fn == "jumprelu"
    for name in ("enable_feature_offset", "enable_feature_scale"):
        if cfg.get(name):
            raise ValueError(f"{name}=True in {cfg_path}: hf_clt's features have no offset and no scale per target")
    tying = cfg.get("decoder_tying", "none")
    if tying not in ("none", "per_source", "per_target"):
        raise ValueError(f"decoder_tying={tying!r} in {cfg_path} is none of none, per_source and per_target")
    with_skip = bool(cfg.get("skip_connection"))
    if with_skip and tying != "none" and num_layers > 1:
        raise ValueError(
            f"skip_connection=True with decoder_tying={tying!r} in {cfg_path}: crosslayer-coding adds the inputs of "
            "all layers up to the target, hf_clt's skip connection only the target's own"
        )

    pairs = [(s, t) for s in range(num_layers) for t in range(s, num_layers)]
    shapes = {}
    for layer in range(num_layers):
        shapes[f"encoder_module.encoders.{layer}.weight"] = (num_features, d_model)
        shapes[f"encoder_module.encoders.{layer}.bias_param"] = (num_features,)
    for key in dict.fromkeys(_decoder_key(s, t, tying) for s, t in pairs):
        shapes[f"decoder_module.decoders.{key}.weight"] = (d_model, num_features)
        shapes[f"decoder_module.decoders.{key}.bias_param"] = (d_model,)
    skip_keys = [_decoder_key(s, t, tying) for s, t in pairs] if with_skip else []
    for key in skip_keys:
        shapes[f"decoder_module.skip_weights.{key}"] = (d_model, d_model)
    if with_threshold:
        shapes[LOG_THRESHOLD] = (num_layers, num_features)
    header = shared.read_header(path)
    shared.check_tensors(path, header, shapes)
    dtype = shared.common_dtype([path], [header], shapes)
    if with_threshold:
        shared.check_threshold(path, LOG_THRESHOLD, shared.read_tensor(path, LOG_THRESHOLD).double().exp())
    for (s, t), key in zip(pairs, skip_keys, strict=False):
        if s < t and shared.read_tensor(path, f"decoder_module.skip_weights.{key}").any():
            raise ValueError(
                f"decoder_module.skip_weights.{key} in {path} is not zero: hf_clt's skip connection reads the target "
                "layer's own input alone"
            )
    statistics = _read_statistics(path, cfg, norm_stats)
    released_tying = tying
    if tying == "per_source" and statistics is not None and not (statistics[3] == statistics[3][0]).all():
        released_tying = "none"  # one row cannot carry several output scales
    config = shared.make_config(
        {
            "num_layers": num_layers,
            "d_model": d_model,
            "num_features": num_features,
            "activation_fn": activation_fn,
            "decoder_tying": released_tying,
            "trained_decoder_tying": tying if tying != released_tying else None,
            "skip_connection": with_skip,
            "base_model_name_or_path": cfg.get("model_name") or None,
            "feature_input_hook": shared.hook_by_ending(cfg.get("mlp_input_template"), INPUT_HOOKS),
            "feature_output_hook": shared.hook_by_ending(cfg.get("mlp_output_template"), OUTPUT_HOOKS),
            "dtype": dtype,
        },
        overrides,
        cfg_path,
    )

    def layers():
        for layer in range(num_layers):
            targets = range(layer, num_layers)
            decoders = [f"decoder_module.decoders.{_decoder_key(layer, t, tying)}.weight" for t in targets]
            # With `per_target` tying, activations are summed before they are decoded: one bias.
            sources = [layer] if tying == "per_target" else range(layer + 1)
            biases = [f"decoder_module.decoders.{_decoder_key(s, layer, tying)}.bias_param" for s in sources]
            skip = f"decoder_module.skip_weights.{_decoder_key(layer, layer, tying)}"
            theta = shared.read_slice(path, LOG_THRESHOLD, layer).double().exp() if with_threshold else None
            yield shared.make_layer(
                layer,
                dtype,
                statistics,
                W_enc=shared.read_tensor(path, f"encoder_module.encoders.{layer}.weight"),
                b_enc=shared.read_tensor(path, f"encoder_module.encoders.{layer}.bias_param"),
                b_dec=shared.sum_biases([shared.read_tensor(path, name) for name in biases]),
                W_dec=torch.stack([shared.read_tensor(path, name).T for name in decoders], dim=1),
                threshold=theta,
                W_skip=shared.read_tensor(path, skip).T if with_skip else None,
            )

    return config, layers()


def _decoder_key(source: int, target: int, tying: str) -> str:
    """The key of the decoder from a source to a target layer."""
    return {"none": f"{source}->{target}", "per_source": f"{source}", "per_target": f"{target}"}[tying]


def _read_statistics(path: Path, cfg: dict, norm_stats: str | Path | None) -> tuple[Tensor, ...] | None:
    """mean_in, std_in, mean_out and std_out, (L, D) float64 each; None if the CLT was trained on raw activations."""
    method = cfg.get("normalization_method", "none")
    if "sqrt_d_model" in str(method) or cfg.get("sqrt_d_model_normalize"):
        raise ValueError(
            f"normalization_method={method!r} in {path.with_name(CONFIG)} is not supported: what it multiplies "
            "could not be verified; train or export the CLT with mean_std"
        )
    normalised = method != "none"
    if norm_stats == "none":
        if normalised:
            raise ValueError(
                f"norm_stats='none', but normalization_method={method!r} in {path.with_name(CONFIG)}: give the "
                f"{STATISTICS} of the activations that it was trained on"
            )
        return None
    beside = path.with_name(STATISTICS)
    if norm_stats is None and not beside.is_file():
        if normalised:
            raise ValueError(
                f"normalization_method={method!r} in {path.with_name(CONFIG)}, but no {STATISTICS} lies "
                f"beside {path.name}: give norm_stats, the file in the folder of the activations it was trained on"
            )
        logger.warning(
            "%s has no %s beside it and is taken to be trained on raw activations; if it was not, give norm_stats",
            path,
            STATISTICS,
        )
        return None
    if norm_stats is None and not normalised:
        raise ValueError(
            f"normalization_method={method!r} in {path.with_name(CONFIG)}, but {beside} lies beside it: give "
            f"norm_stats={str(beside)!r} if it was trained with these statistics, norm_stats='none' if not"
        )
    stats_path = beside if norm_stats is None else Path(norm_stats).expanduser()
    found = shared.read_json(stats_path)
    columns = []
    for side in ("inputs", "targets"):
        for kind in ("mean", "std"):
            rows = []
            for layer in range(cfg["num_layers"]):
                values = found.get(str(layer), {}).get(side, {}).get(kind)
                row = None if values is None else torch.tensor(values, dtype=torch.float32)
                where = f"{side}.{kind} of layer {layer} in {stats_path}"
                if row is None or tuple(row.shape) != (cfg["d_model"],):
                    shape = None if row is None else tuple(row.shape)
                    raise ValueError(f"{where} has shape {shape}; expected (d_model,) = ({cfg['d_model']},)")
                if kind == "std":
                    row = row + MIN_STD
                if not row.isfinite().all() or (kind == "std" and not (row > 0).all()):
                    raise ValueError(f"{where} holds values that no statistic has; compute the statistics again")
                rows.append(row.double())
            columns.append(torch.stack(rows))
    return tuple(columns)


# -- writing ----------------------------------------------------------------------------------------------------------


def write(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """
    Writes a checkpoint of crosslayer-coding on raw activations (`normalization_method` none). All layers are in memory
    at once, since they are in one file. The bias of a target layer goes to the decoder of its own layer. `cfg.json`
    has no place for the hooks.

    Raises:
        ValueError: For topk, or batchtopk without a running threshold.
    """
    shared.check_activation_fn(config, "crosslayer-coding")
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
            log_thresholds.append(shared.jumprelu_threshold(config, tensors, source).double().log().float())
    if log_thresholds:
        weights[LOG_THRESHOLD] = torch.stack(log_thresholds)
    folder = shared.make_folder(folder)
    files.write_tensors(folder / WEIGHTS, weights)
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
    write_text(folder / CONFIG, json.dumps(cfg, indent=4) + "\n")


__all__ = ["find_checkpoints", "is_checkpoint", "read", "write"]
