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

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import shared


logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "clt_checkpoint_latest.safetensors", "cfg.json"
STATISTICS = "norm_stats.json"
MIN_STD = 1e-6  # crosslayer-coding adds it to every standard deviation
LOG_THRESHOLD = "theta_manager.log_threshold"
INPUT_HOOKS = {".mlp.input": "mlp.hook_in"}  # ends of `mlp_input_template`
OUTPUT_HOOKS = {".mlp.output": "mlp.hook_out"}  # ends of `mlp_output_template`
KEYS = {"none": "{s}->{t}", "per_source": "{s}", "per_target": "{t}"}  # of the decoder from layer s to t, by tying


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is a checkpoint of crosslayer-coding."""
    return any(name.startswith("encoder_module.encoders.") for name in names)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of crosslayer-coding in a folder; the latest alone if it is among them under that name."""
    latest = folder / WEIGHTS
    candidates = [latest] if latest.is_file() else sorted(folder.glob("*.safetensors"))
    return [path for path in candidates if is_checkpoint(shared.read_header(path))]


def read(path: Path, norm_stats: str | Path | None = None, **overrides: Any) -> shared.Checkpoint:
    """
    A checkpoint of crosslayer-coding, its statistics folded in.

    Args:
        path: The safetensors file, or its folder.
        norm_stats: The statistics' file; `"none"` if the CLT was trained on raw activations. By default a
            `norm_stats.json` beside the checkpoint.
        overrides: Fields of [`CLTConfig`] that the files do not say, such as the hooks.

    Raises:
        ValueError: For statistics that are missing or contradict `cfg.json`, and what hf_clt cannot express: topk and
            batchtopk, which rank pre-activations standardised over the batch and keep negative ones; `sqrt_d_model`
            normalisation, of which no code could be found; feature offsets and scales; a skip connection that adds
            other layers' inputs.
    """
    if path.is_dir():
        found = find_checkpoints(path)
        if len(found) != 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} holds {len(found)} checkpoints of crosslayer-coding ({names}); give the file")
        path = found[0]
    described = path.with_name(CONFIG)
    cfg = {"activation_fn": "jumprelu", "decoder_tying": "none", "normalization_method": "none"}
    cfg |= shared.read_settings(described)
    check_config(cfg, described)
    num_layers, d_model, num_features = cfg["num_layers"], cfg["d_model"], cfg["num_features"]
    tying, with_skip = cfg["decoder_tying"], bool(cfg.get("skip_connection"))
    with_threshold = cfg["activation_fn"] == "jumprelu"

    def encoder(layer: int, part: str) -> str:
        return f"encoder_module.encoders.{layer}.{part}"

    def decoder(source: int, target: int, part: str) -> str:
        return f"decoder_module.decoders.{KEYS[tying].format(s=source, t=target)}.{part}"

    def skip(source: int, target: int) -> str:
        return f"decoder_module.skip_weights.{KEYS[tying].format(s=source, t=target)}"

    shapes = {}
    for s in range(num_layers):
        shapes[encoder(s, "weight")] = (num_features, d_model)
        shapes[encoder(s, "bias_param")] = (num_features,)
        for t in range(s, num_layers):
            shapes[decoder(s, t, "weight")] = (d_model, num_features)
            shapes[decoder(s, t, "bias_param")] = (d_model,)
            if with_skip:
                shapes[skip(s, t)] = (d_model, d_model)
    if with_threshold:
        shapes[LOG_THRESHOLD] = (num_layers, num_features)
    dtype = shared.check_tensors([path], shapes)
    for s, t in itertools.combinations(range(num_layers), 2) if with_skip else ():
        if shared.read_tensor(path, skip(s, t)).any():
            raise ValueError(
                f"{skip(s, t)} in {path} is not zero: hf_clt's skip connection reads only the target layer's own input"
            )
    statistics = read_statistics(path, cfg, norm_stats)
    # one row cannot carry several output scales
    unties = tying == "per_source" and statistics and not (statistics["std_out"] == statistics["std_out"][0]).all()
    fields = {
        "num_layers": num_layers,
        "d_model": d_model,
        "num_features": num_features,
        "activation_fn": cfg["activation_fn"],
        "decoder_tying": "none" if unties else tying,
        "trained_decoder_tying": tying if unties else None,
        "skip_connection": with_skip,
        "base_model_name_or_path": cfg.get("model_name") or None,
        "feature_input_hook": shared.hook_by_ending(cfg.get("mlp_input_template"), INPUT_HOOKS),
        "feature_output_hook": shared.hook_by_ending(cfg.get("mlp_output_template"), OUTPUT_HOOKS),
        "dtype": dtype,
    }

    def read_layer(layer: int) -> dict[str, Tensor | None]:
        # With `per_target` tying, activations are summed before they are decoded: one bias.
        sources = [layer] if tying == "per_target" else range(layer + 1)
        biases = torch.stack([shared.read_tensor(path, decoder(s, layer, "bias_param")) for s in sources])
        weights = [shared.read_tensor(path, decoder(layer, t, "weight")).T for t in range(layer, num_layers)]
        log_threshold = shared.read_tensor(path, LOG_THRESHOLD, layer) if with_threshold else None
        return {
            "W_enc": shared.read_tensor(path, encoder(layer, "weight")),
            "b_enc": shared.read_tensor(path, encoder(layer, "bias_param")),
            "b_dec": biases.sum(dim=0, dtype=torch.float64),
            "W_dec": torch.stack(weights, dim=1),
            "threshold": log_threshold.double().exp() if with_threshold else None,
            "W_skip": shared.read_tensor(path, skip(layer, layer)).T if with_skip else None,
        }

    return shared.make_checkpoint(fields, overrides, described, read_layer, statistics)


def check_config(cfg: dict, described: Path) -> None:
    """Raises ValueError for what hf_clt cannot express, see [`read`]."""

    def refuse(name: str, why: str):
        raise ValueError(f"{name}={cfg.get(name)!r} in {described}: {why}")

    for name in ("num_layers", "d_model", "num_features"):
        if not isinstance(cfg.get(name), int):
            refuse(name, "it must be the number that describes the checkpoint")
    if cfg["activation_fn"] not in ("relu", "jumprelu"):
        refuse(
            "activation_fn",
            "crosslayer-coding ranks pre-activations standardised over the batch, which hf_clt has not; convert it "
            "with its scripts/convert_batchtopk_to_jumprelu.py first",
        )
    for name in ("enable_feature_offset", "enable_feature_scale"):
        if cfg.get(name):
            refuse(name, "hf_clt's features have no offset and no scale per target")
    tying = cfg["decoder_tying"]
    if tying not in KEYS:
        refuse("decoder_tying", f"it is none of {', '.join(KEYS)}")
    if cfg.get("skip_connection") and tying != "none" and cfg["num_layers"] > 1:
        refuse("skip_connection", f"with {tying} decoders it adds the inputs of earlier layers, which hf_clt's cannot")
    if "sqrt_d_model" in str(cfg["normalization_method"]) or cfg.get("sqrt_d_model_normalize"):
        refuse("normalization_method", "what sqrt_d_model multiplies could not be verified; train with mean_std")


def read_statistics(path: Path, cfg: dict, norm_stats: str | Path | None) -> dict[str, Tensor] | None:
    """mean_in, std_in, mean_out and std_out, (L, D) float64 each; None if the CLT was trained on raw activations."""
    beside, method = path.with_name(STATISTICS), cfg["normalization_method"]
    normalised, has = method != "none", "a" if beside.is_file() else "no"
    if (norm_stats == "none" and normalised) or (norm_stats is None and normalised != beside.is_file()):
        raise ValueError(
            f"norm_stats={norm_stats!r}, normalization_method={method!r} in {path.with_name(CONFIG)}, and {has} "
            f"{STATISTICS} is beside {path.name}: give norm_stats, the statistics of the activations that the CLT was "
            "trained on, or 'none' if these were raw"
        )
    if norm_stats is None and not normalised:
        logger.warning(
            "%s has no %s beside it and is taken to be trained on raw activations; if it was not, give norm_stats",
            path,
            STATISTICS,
        )
        return None
    if norm_stats == "none":
        return None
    path = Path(norm_stats or beside).expanduser()
    found, statistics = shared.read_settings(path), {}
    for side, end in (("inputs", "in"), ("targets", "out")):
        for kind in ("mean", "std"):
            rows = []
            for layer in range(cfg["num_layers"]):
                row = torch.tensor(found.get(str(layer), {}).get(side, {}).get(kind, []), dtype=torch.float32)
                if kind == "std":
                    row = row + MIN_STD
                is_valid = (
                    row.shape == (cfg["d_model"],) and row.isfinite().all() and (kind == "mean" or (row > 0).all())
                )
                if not is_valid:
                    raise ValueError(
                        f"{side}.{kind} of layer {layer} in {path} is not {cfg['d_model']} numbers that a statistic "
                        "can be; compute the statistics again"
                    )
                rows.append(row.double())
            statistics[f"{kind}_{end}"] = torch.stack(rows)
    return statistics
