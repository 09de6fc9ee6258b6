"""
Reads cross-layer and per-layer transcoders that other trainers saved.

| format | what it is | where its facts come from |
|---|---|---|
| `hf_clt` | the files of `hf_clt.checkpoint_format` | DESIGN.md |
| `circuit-tracer` | the same tensors, no `config.json` | safety-research/circuit-tracer `cross_layer_transcoder.py` |
| `circuit-tracer-plt` | one file per layer, a transcoder each | the same, `single_layer_transcoder.py`, `utils/` |
| `crosslayer-coding` | one flat file, pairs of layers | curt-tigges/crosslayer-coding `clt/models`, `clt/training` |
| `clt-forge` | one file, stacked layers | LLM-Interp/CLT-Forge `clt.py`, `attribution/loading.py` |
| `gemma-scope-2` | one file per layer, google/gemma-scope-2-* `clt/` | circuit-tracer `load_gemma_scope_2_clt` |

For each format there are two functions. `read_...` compares the names and shapes of all tensors with what the format
needs, from the headers of the files alone, and returns the configuration and an iterator over the layers: a layer is
read when it is asked for, so that one at a time is in memory. `import_...` puts the layers into a
[`CrossLayerTranscoder`]. Both raise on whatever would change the function: an unknown tensor, an activation function
that depends on the batch, statistics that are missing. Only safetensors files are read, never a pickle.

Tensors are taken bit by bit where the format needs no arithmetic. Statistics are folded in float64. θ lives as log θ
in a model, so that it comes back to 1e-6 relative.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel
from transformers.initialization import no_init_weights

from .. import checkpoint_format as files
from ..configuration_clt import FEATURE_INPUT_HOOKS, FEATURE_OUTPUT_HOOKS, CLTConfig
from ..modeling_clt import CrossLayerTranscoder


logger = logging.getLogger(__name__)

FORMATS = ("hf_clt", "circuit-tracer", "circuit-tracer-plt", "crosslayer-coding", "clt-forge", "gemma-scope-2")
Checkpoint = tuple[CLTConfig, Iterator[dict[str, Tensor]]]  # a configuration, and per layer its tensors as on disk

# What the files say about a CLT; a caller cannot set it otherwise.
READ_FROM_FILES = ("num_layers", "d_model", "num_features", "activation_fn", "k", "k_scope", "decoder_reach")
READ_FROM_FILES += ("decoder_tying", "trained_decoder_tying", "skip_connection", "dtype")

PLT_FILE = "layer_{}.safetensors"
PLT_THRESHOLD = "activation_function.threshold"
CODING_FILE = "clt_checkpoint_latest.safetensors"
CODING_ENCODER = re.compile(r"encoder_module\.encoders\.(\d+)\.weight")
CODING_STATISTICS = "norm_stats.json"
CODING_MIN_STD = 1e-6  # crosslayer-coding adds it to every standard deviation
FORGE_WEIGHTS, FORGE_CONFIG = "clt_weights.safetensors", "clt_cfg.json"
FORGE_SHARD = "rank{}_clt_weights.safetensors"
FORGE_BUFFERS = {"feature_count", "layer_mask", "l_idx", "k_idx"}  # counts of the training, and what follows from L
GEMMA_FILE = "params_layer_{}.safetensors"
GEMMA_INPUTS = {".pre_feedforward_layernorm.output": "mlp.hook_in"}  # ends of `hf_hook_point_in`
GEMMA_OUTPUTS = {".post_feedforward_layernorm.output": "hook_mlp_out"}


# -- the formats as a whole -------------------------------------------------------------------------------------------


def detect_format(path: str | Path) -> str:
    """
    Which of `FORMATS` a folder or file is in, from its file names and, for a single file, the names of its tensors.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If it is in none of them.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder; give a checkpoint on this machine")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is no safetensors file, and nothing else is read (a pickle can run code); save its tensors "
                "with safetensors.torch.save_file first"
            )
        names = set(_header(path))
        if any(CODING_ENCODER.fullmatch(name) for name in names):
            return "crosslayer-coding"
        if {"W_enc", "W_dec", "log_threshold"} <= names:
            return "clt-forge"
        raise ValueError(f"{path} is in none of the formats {', '.join(FORMATS)}: it holds {_some(names)}")
    names = {entry.name for entry in path.iterdir()}
    if "config.json" in names and _read_json(path / "config.json").get("model_type") == CLTConfig.model_type:
        return "hf_clt"
    if "W_enc_0.safetensors" in names:
        return "circuit-tracer"
    described = _read_yaml(path / files.CIRCUIT_TRACER_FILE) if files.CIRCUIT_TRACER_FILE in names else {}
    if "layer_0.safetensors" in names or described.get("model_kind") == "transcoder_set":
        return "circuit-tracer-plt"
    if _numbers(path, GEMMA_FILE):
        return "gemma-scope-2"
    if FORGE_WEIGHTS in names or _numbers(path, FORGE_SHARD):
        return "clt-forge"
    if _coding_files(path):
        return "crosslayer-coding"
    raise ValueError(
        f"{path} is in none of the formats {', '.join(FORMATS)}: it holds {_some(names)}; give the folder or file of "
        "the weights themselves"
    )


def read_clt(path: str | Path, format: str | None = None, **options) -> Checkpoint:
    """
    Opens a checkpoint in any of `FORMATS`.

    Args:
        path: A folder, or the file of a format that has a single one.
        format: One of `FORMATS`; recognised if left out.
        options: What the format's `read_...` takes; None counts as left out.

    Returns:
        The configuration, and an iterator over one dict per layer with the tensors that
        [`hf_clt.checkpoint_format.write_release`] takes.

    Raises:
        ValueError: For an unknown format, or an option that it has not.
    """
    format = detect_format(path) if format is None else format
    readers = {
        "hf_clt": read_hf_clt,
        "circuit-tracer": read_hf_clt,
        "circuit-tracer-plt": read_circuit_tracer_plt,
        "crosslayer-coding": read_crosslayer_coding,
        "clt-forge": read_clt_forge,
        "gemma-scope-2": read_gemma_scope_2,
    }
    if format not in readers:
        raise ValueError(f"format={format!r} is none of {', '.join(FORMATS)}; leave it out to have it recognised")
    options = _options(path, format, options)
    return readers[format](path, **options)


def import_clt(path: str | Path, format: str | None = None, **options) -> CrossLayerTranscoder:
    """A [`CrossLayerTranscoder`] from a checkpoint in any of `FORMATS`; arguments as for [`read_clt`]."""
    format = detect_format(path) if format is None else format
    if format in ("hf_clt", "circuit-tracer"):
        return import_circuit_tracer(path, **_options(path, format, options))
    return _build(*read_clt(path, format, **options))


def _options(path: str | Path, format: str, options: dict) -> dict:
    """The options that are set; raises ValueError for one that the format has not."""
    options = {name: value for name, value in options.items() if value is not None}
    for name, owner in (("norm_stats", "crosslayer-coding"), ("drop_acausal", "gemma-scope-2")):
        if name in options and format != owner:
            raise ValueError(f"{name} is for {owner}, but {path} is read as {format}; leave out {name}")
    return options


# -- hf_clt, circuit-tracer -------------------------------------------------------------------------------------------


def read_hf_clt(folder: str | Path, **overrides) -> Checkpoint:
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


def import_circuit_tracer(folder: str | Path, **overrides) -> CrossLayerTranscoder:
    """
    A CLT in circuit-tracer's own files: [`CrossLayerTranscoder.from_pretrained`] reads them as they are. A repository
    on the Hub can be named too. The way back is `save_pretrained`.
    """
    return CrossLayerTranscoder.from_pretrained(folder, **overrides)


# -- circuit-tracer, per-layer transcoders ----------------------------------------------------------------------------


def read_circuit_tracer_plt(folder: str | Path, **overrides) -> Checkpoint:
    """
    circuit-tracer's per-layer transcoders, which become a CLT of `decoder_reach` 1.

    A folder with `config.yaml` (`model_kind: transcoder_set`, `model_name`, the hooks, `activation`, `k`, and perhaps
    `transcoders`, a list of files) and `layer_{l}.safetensors`: `W_enc` (F, D), `W_dec` (F, D), `b_enc` (F,), `b_dec`
    (D,), and perhaps `activation_function.threshold` (F,), θ itself, and `W_skip` (D, D). Without a threshold the
    activation function is a ReLU. circuit-tracer applies the skip as `x @ W_skip.T`, other than in its CLTs, so that
    it is transposed here. Source: `circuit_tracer/transcoder/single_layer_transcoder.py` (`load_transcoder`,
    `compute_skip`) and `circuit_tracer/utils/hf_utils.py` (`resolve_transcoder_paths`).

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
    yaml_path = folder / files.CIRCUIT_TRACER_FILE
    described = _read_yaml(yaml_path) if yaml_path.is_file() else {}
    kind = described.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise ValueError(f"model_kind={kind!r} in {yaml_path}: per-layer transcoders are of the kind 'transcoder_set'")
    paths = _plt_paths(folder, described)
    headers = [_header(path) for path in paths]
    _check_names(paths[0], headers[0], ["W_enc", "b_dec"])
    num_features, d_model = _matrix_shape(paths[0], headers[0], "W_enc")

    activation = described.get("activation")
    with_threshold = PLT_THRESHOLD in headers[0]
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
                f"{'a' if with_threshold else 'no'} tensor {PLT_THRESHOLD}; correct config.yaml"
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
        shapes[PLT_THRESHOLD] = (num_features,)
    if with_skip:
        shapes["W_skip"] = (d_model, d_model)
    for path, header in zip(paths, headers, strict=True):
        _check_tensors(path, header, shapes, may_hold={"k"} if function["activation_fn"] == "topk" else set())
        if PLT_THRESHOLD in shapes:
            _check_threshold(path, PLT_THRESHOLD, _tensor(path, PLT_THRESHOLD))
    dtype = _common_dtype(paths, headers, shapes)
    config = _configuration(
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
            yield _layer(
                layer,
                dtype,
                W_enc=_tensor(path, "W_enc"),
                b_enc=_tensor(path, "b_enc"),
                b_dec=_tensor(path, "b_dec"),
                W_dec=_tensor(path, "W_dec")[:, None],
                threshold=_tensor(path, PLT_THRESHOLD) if PLT_THRESHOLD in shapes else None,
                W_skip=_tensor(path, "W_skip").T if with_skip else None,
            )

    return config, layers()


def import_circuit_tracer_plt(folder: str | Path, **overrides) -> CrossLayerTranscoder:
    """circuit-tracer's per-layer transcoders as a CLT of `decoder_reach` 1; see [`read_circuit_tracer_plt`]."""
    return _build(*read_circuit_tracer_plt(folder, **overrides))


def _plt_paths(folder: Path, described: dict) -> list[Path]:
    """The weight files in the order of their layers."""
    listed = described.get("transcoders")
    if listed is None:
        return _numbered_files(folder, PLT_FILE)
    for name in listed:
        if "://" in str(name) or not str(name).endswith(".safetensors"):
            raise ValueError(
                f"transcoders in {folder / files.CIRCUIT_TRACER_FILE} names {name}, which is no safetensors file on "
                "this machine; download the files and name them layer_0.safetensors, layer_1.safetensors and so on"
            )
    return [folder / name for name in listed]


# -- crosslayer-coding ------------------------------------------------------------------------------------------------


def read_crosslayer_coding(path: str | Path, norm_stats: str | Path | None = None, **overrides) -> Checkpoint:
    """
    A checkpoint of `crosslayer-coding`: one flat safetensors file beside `cfg.json`.

    It holds `encoder_module.encoders.{l}.weight` (F, D), `.bias_param` (F,); `decoder_module.decoders.{s}->{t}.weight`
    (D, F) and `.bias_param` (D,) for every pair s ≤ t, or `decoders.{l}` with tied decoders; for jumprelu
    `theta_manager.log_threshold` (L, F). Each decoder adds its own bias, so that the biases of a target's pairs (with
    `per_source` tying, of all source layers up to it) are summed. Its gate is h ≥ θ where `hf_clt`'s is h > θ: they
    differ only where a pre-activation equals its threshold exactly. Sources: `clt/models/clt.py`, `activations.py` in
    curt-tigges/crosslayer-coding; `clt/models/encoder.py`, `decoder.py`, `theta.py`, `parallel.py` in its copy
    utahnlp/crosslayer-coding.

    The model works on normalised activations. The statistics lie in a file of their own, `norm_stats.json`:
    `{layer: {"inputs" | "targets": {"mean", "std"}}}`, per dimension, and 1e-6 is added to each std
    (`ManifestActivationStore._prep_norm`). They are folded into the weights. What its trainer applied is a setting of
    its `TrainingConfig`, which a checkpoint does not hold; `normalization_method` in `cfg.json` may be `none` even so.

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
        found = _coding_files(path)
        if len(found) != 1:
            raise ValueError(
                f"{path} holds {len(found)} checkpoints of crosslayer-coding"
                + (f" ({_some(file.name for file in found)}): give one of these files" if found else ": give the file")
            )
        path = found[0]
    cfg_path = path.with_name("cfg.json")
    cfg = _read_json(cfg_path)
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
    for key in dict.fromkeys(_coding_decoder(s, t, tying) for s, t in pairs):
        shapes[f"decoder_module.decoders.{key}.weight"] = (d_model, num_features)
        shapes[f"decoder_module.decoders.{key}.bias_param"] = (d_model,)
    skip_keys = [_coding_decoder(s, t, tying) for s, t in pairs] if with_skip else []
    for key in skip_keys:
        shapes[f"decoder_module.skip_weights.{key}"] = (d_model, d_model)
    log_threshold = "theta_manager.log_threshold"
    if activation_fn == "jumprelu":
        shapes[log_threshold] = (num_layers, num_features)
    header = _header(path)
    _check_tensors(path, header, shapes)
    dtype = _common_dtype([path], [header], shapes)
    if activation_fn == "jumprelu":
        _check_threshold(path, log_threshold, _tensor(path, log_threshold).double().exp())
    for (s, t), key in zip(pairs, skip_keys, strict=False):
        if s < t and _tensor(path, f"decoder_module.skip_weights.{key}").any():
            raise ValueError(
                f"decoder_module.skip_weights.{key} in {path} is not zero: hf_clt's skip connection reads the target "
                "layer's own input alone"
            )
    statistics = _coding_statistics(path, cfg, norm_stats)
    released_tying = tying
    if tying == "per_source" and statistics is not None and not (statistics[3] == statistics[3][0]).all():
        released_tying = "none"  # one row cannot carry several output scales
    config = _configuration(
        {
            "num_layers": num_layers,
            "d_model": d_model,
            "num_features": num_features,
            "activation_fn": activation_fn,
            "decoder_tying": released_tying,
            "trained_decoder_tying": tying if tying != released_tying else None,
            "skip_connection": with_skip,
            "base_model_name_or_path": cfg.get("model_name") or None,
            "feature_input_hook": _by_ending(cfg.get("mlp_input_template"), {".mlp.input": "mlp.hook_in"}),
            "feature_output_hook": _by_ending(cfg.get("mlp_output_template"), {".mlp.output": "mlp.hook_out"}),
            "dtype": dtype,
        },
        overrides,
        cfg_path,
    )

    def layers():
        for layer in range(num_layers):
            targets = range(layer, num_layers)
            decoders = [f"decoder_module.decoders.{_coding_decoder(layer, t, tying)}.weight" for t in targets]
            # With `per_target` tying, activations are summed before they are decoded: one bias.
            sources = [layer] if tying == "per_target" else range(layer + 1)
            biases = [f"decoder_module.decoders.{_coding_decoder(s, layer, tying)}.bias_param" for s in sources]
            skip = f"decoder_module.skip_weights.{_coding_decoder(layer, layer, tying)}"
            theta = _slice(path, log_threshold, layer).double().exp() if activation_fn == "jumprelu" else None
            yield _layer(
                layer,
                dtype,
                statistics,
                W_enc=_tensor(path, f"encoder_module.encoders.{layer}.weight"),
                b_enc=_tensor(path, f"encoder_module.encoders.{layer}.bias_param"),
                b_dec=_sum([_tensor(path, name) for name in biases]),
                W_dec=torch.stack([_tensor(path, name).T for name in decoders], dim=1),
                threshold=theta,
                W_skip=_tensor(path, skip).T if with_skip else None,
            )

    return config, layers()


def import_crosslayer_coding(
    path: str | Path, norm_stats: str | Path | None = None, **overrides
) -> CrossLayerTranscoder:
    """A CLT from a checkpoint of `crosslayer-coding`; see [`read_crosslayer_coding`]."""
    return _build(*read_crosslayer_coding(path, norm_stats, **overrides))


def _coding_files(folder: Path) -> list[Path]:
    """The checkpoints of crosslayer-coding in a folder; the latest alone if it is among them under that name."""
    latest = folder / CODING_FILE
    candidates = [latest] if latest.is_file() else sorted(folder.glob("*.safetensors"))
    return [path for path in candidates if any(CODING_ENCODER.fullmatch(name) for name in _header(path))]


def _coding_decoder(source: int, target: int, tying: str) -> str:
    """The key of the decoder from a source to a target layer."""
    return {"none": f"{source}->{target}", "per_source": f"{source}", "per_target": f"{target}"}[tying]


def _coding_statistics(path: Path, cfg: dict, norm_stats: str | Path | None) -> tuple[Tensor, ...] | None:
    """mean_in, std_in, mean_out and std_out, (L, D) float64 each; None if the CLT was trained on raw activations."""
    method = cfg.get("normalization_method", "none")
    if "sqrt_d_model" in str(method) or cfg.get("sqrt_d_model_normalize"):
        raise ValueError(
            f"normalization_method={method!r} in {path.with_name('cfg.json')} is not supported: what it multiplies "
            "could not be verified; train or export the CLT with mean_std"
        )
    normalised = method != "none"
    if norm_stats == "none":
        if normalised:
            raise ValueError(
                f"norm_stats='none', but normalization_method={method!r} in {path.with_name('cfg.json')}: give the "
                f"{CODING_STATISTICS} of the activations that it was trained on"
            )
        return None
    beside = path.with_name(CODING_STATISTICS)
    if norm_stats is None and not beside.is_file():
        if normalised:
            raise ValueError(
                f"normalization_method={method!r} in {path.with_name('cfg.json')}, but no {CODING_STATISTICS} lies "
                f"beside {path.name}: give norm_stats, the file in the folder of the activations it was trained on"
            )
        logger.warning(
            "%s has no %s beside it and is taken to be trained on raw activations; if it was not, give norm_stats",
            path,
            CODING_STATISTICS,
        )
        return None
    if norm_stats is None and not normalised:
        raise ValueError(
            f"normalization_method={method!r} in {path.with_name('cfg.json')}, but {beside} lies beside it: give "
            f"norm_stats={str(beside)!r} if it was trained with these statistics, norm_stats='none' if not"
        )
    stats_path = beside if norm_stats is None else Path(norm_stats).expanduser()
    found = _read_json(stats_path)
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
                    row = row + CODING_MIN_STD
                if not row.isfinite().all() or (kind == "std" and not (row > 0).all()):
                    raise ValueError(f"{where} holds values that no statistic has; compute the statistics again")
                rows.append(row.double())
            columns.append(torch.stack(rows))
    return tuple(columns)


# -- CLT-Forge --------------------------------------------------------------------------------------------------------


def read_clt_forge(path: str | Path, **overrides) -> Checkpoint:
    """
    A CLT of CLT-Forge: `clt_cfg.json` and `clt_weights.safetensors`, or `rank{r}_clt_weights.safetensors` where the
    features are sharded.

    The file holds `W_enc` (L, D, F), `b_enc` (L, F), `log_threshold` (L, F), and, with `cross_layer_decoders`, `W_dec`
    (L(L+1)/2, F, D) and `b_dec` (L(L+1)/2, D), one per pair of a source and a target layer in the order of
    `torch.triu_indices` (all targets of source layer 0, then of 1, ...); without it `W_dec` (L, F, D) and `b_dec`
    (L, D). The biases of a target are summed. `estimated_norm_scaling_factor_in` and `_out` (L,) multiply inputs and
    targets before training, so W_enc is multiplied and W_dec and b_dec are divided by them. Sources:
    `src/clt_forge/clt.py` (also of the shards, `_load_full_sharded_clt`), `training/activations_store.py`,
    `attribution/loading.py`.

    CLT-Forge reads TransformerLens' `ln2.hook_normalized`. With a LayerNorm model loaded without processing this can
    be the MLP's input (`mlp.hook_in`); TransformerLens has had it before the norm's weight as well, and RMSNorm models
    do. The files do not tell, so that `feature_input_hook` must be given. `hook_mlp_out` is the output.

    Args:
        path: The folder, or the weight file in it.
        overrides: Fields of [`CLTConfig`] that the files do not say; `feature_input_hook` at least.

    Raises:
        FileNotFoundError: For a missing file.
        ValueError: For a missing, unknown or wrongly shaped tensor, a scaling factor that is not positive, or another
            activation function than jumprelu.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    cfg_path = folder / FORGE_CONFIG
    cfg = _read_json(cfg_path)
    activation_fn = cfg.get("activation_fn", "jumprelu")
    if activation_fn != "jumprelu":
        raise ValueError(f"activation_fn={activation_fn!r} in {cfg_path}: only CLT-Forge's jumprelu can be read")
    shards = [path] if path.is_file() else _forge_files(folder)
    headers = [_header(shard) for shard in shards]
    _check_names(shards[0], headers[0], ["W_enc", "W_dec"])
    if len(headers[0]["W_enc"][0]) != 3:
        raise ValueError(f"W_enc in {shards[0]} has shape {headers[0]['W_enc'][0]}; expected (L, D, F)")
    num_layers, d_model, _ = headers[0]["W_enc"][0]
    crosses = cfg.get("cross_layer_decoders")
    if not isinstance(crosses, bool):
        raise ValueError(f"cross_layer_decoders={crosses!r} in {cfg_path} is neither true nor false; correct it")
    num_decoders = num_layers * (num_layers + 1) // 2 if crosses else num_layers
    num_features = 0
    for shard, header in zip(shards, headers, strict=True):
        _check_names(shard, header, ["W_enc"])
        local = header["W_enc"][0][-1]
        num_features += local
        shapes = {
            "W_enc": (num_layers, d_model, local),
            "b_enc": (num_layers, local),
            "log_threshold": (num_layers, local),
            "W_dec": (num_decoders, local, d_model),
            "b_dec": (num_decoders, d_model),
            "estimated_norm_scaling_factor_in": (num_layers,),
            "estimated_norm_scaling_factor_out": (num_layers,),
        }
        _check_tensors(shard, header, shapes, may_hold=FORGE_BUFFERS)
        _check_threshold(shard, "log_threshold", _tensor(shard, "log_threshold").double().exp())
    for name, expected in (("n_layers", num_layers), ("d_in", d_model), ("d_latent", num_features)):
        if cfg.get(name) != expected:
            raise ValueError(
                f"{name}={cfg.get(name)!r} in {cfg_path}, but the weights in {_some(shard.name for shard in shards)} "
                f"say {expected}; a file is missing or belongs to another CLT"
            )
    dtype = _common_dtype(shards, headers, ("W_enc", "b_enc", "W_dec", "b_dec"))
    statistics = _forge_statistics(shards[0], d_model)
    config = _configuration(
        {
            "num_layers": num_layers,
            "d_model": d_model,
            "num_features": num_features,
            "activation_fn": "jumprelu",
            "decoder_reach": None if crosses else 1,
            "base_model_name_or_path": cfg.get("model_name") or None,
            "feature_input_hook": None,
            "feature_output_hook": "hook_mlp_out",
            "dtype": dtype,
        },
        overrides,
        "the files do not say what is the input: TransformerLens' ln2.hook_normalized",
    )

    def layers():
        for layer in range(num_layers):
            # Rows of W_dec: the pairs of this source layer lie together, those of this target layer do not.
            first = _triangle_row(layer, layer, num_layers) if crosses else layer
            last = first + config.num_targets(layer)
            sources = range(layer + 1) if crosses else [layer]
            rows = [_triangle_row(s, layer, num_layers) if crosses else s for s in sources]
            decoder = [_slice(shard, "W_dec", slice(first, last)) for shard in shards]
            yield _layer(
                layer,
                dtype,
                statistics,
                W_enc=torch.cat([_slice(shard, "W_enc", layer) for shard in shards], dim=1).T,
                b_enc=torch.cat([_slice(shard, "b_enc", layer) for shard in shards]),
                b_dec=_sum([_slice(shards[0], "b_dec", row) for row in rows]),
                W_dec=torch.cat(decoder, dim=1).transpose(0, 1),
                threshold=torch.cat([_slice(shard, "log_threshold", layer) for shard in shards]).double().exp(),
            )

    return config, layers()


def import_clt_forge(path: str | Path, **overrides) -> CrossLayerTranscoder:
    """A CLT of CLT-Forge; see [`read_clt_forge`]."""
    return _build(*read_clt_forge(path, **overrides))


def _forge_files(folder: Path) -> list[Path]:
    """The weight file of a folder, or its shards in the order of their ranks."""
    if (folder / FORGE_WEIGHTS).is_file():
        return [folder / FORGE_WEIGHTS]
    if not _numbers(folder, FORGE_SHARD):
        raise FileNotFoundError(f"{FORGE_WEIGHTS} is missing in {folder}; give the folder of the weights")
    return _numbered_files(folder, FORGE_SHARD)


def _forge_statistics(path: Path, d_model: int) -> tuple[Tensor, ...] | None:
    """The scaling factors as means and standard deviations, (L, D) float64 each; None where all factors are 1."""
    factors = {}
    for side in ("in", "out"):
        name = f"estimated_norm_scaling_factor_{side}"
        factors[side] = _tensor(path, name).double()
        if not (factors[side].isfinite() & (factors[side] > 0)).all():
            raise ValueError(f"{name} in {path} holds values that are not positive numbers; export the CLT again")
    if all((factor == 1).all() for factor in factors.values()):
        return None
    std_in, std_out = ((1 / factors[side])[:, None].expand(-1, d_model) for side in ("in", "out"))
    zero = torch.zeros_like(std_in)
    return zero, std_in, zero, std_out


def _triangle_row(source: int, target: int, num_layers: int) -> int:
    """Where the pair (source, target) stands in `torch.triu_indices(L, L)`, which goes source by source."""
    return source * num_layers - source * (source - 1) // 2 + (target - source)


# -- Gemma Scope 2 ----------------------------------------------------------------------------------------------------


def read_gemma_scope_2(folder: str | Path, drop_acausal: bool = False, **overrides) -> Checkpoint:
    """
    A cross-layer transcoder of Gemma Scope 2: a folder `clt/...` of google/gemma-scope-2-*, with `config.json` and
    `params_layer_{l}.safetensors`.

    Each file holds `w_enc` (D, F), `b_enc` (F,), `threshold` (F,), `w_dec` (F, L, D) whose second index is the target
    layer, `b_dec` (D,) of the layer, and perhaps `affine_skip_connection` (D, D), by which the layer's own input is
    multiplied (`x @ affine_skip_connection`) and added. Features are 1[h > θ]·relu(h). Sources:
    `load_gemma_scope_2_clt` in circuit-tracer (`circuit_tracer/transcoder/cross_layer_transcoder.py`), and the
    `JumpReLUMultiLayerSAE` of Google's tutorial, as several public repositories repeat it. `config.json` names the
    output of `pre_feedforward_layernorm` as the input (`mlp.hook_in`) and that of `post_feedforward_layernorm` as the
    output (`hook_mlp_out`). Whether published decoders are exactly zero towards earlier layers could not be verified.

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
    paths = _numbered_files(folder, GEMMA_FILE)
    cfg_path = folder / "config.json"
    cfg = _read_json(cfg_path) if cfg_path.is_file() else {}
    for name, expected in (("type", "clt"), ("architecture", "jump_relu")):
        if cfg.get(name, expected) != expected:
            raise ValueError(f"{name}={cfg[name]!r} in {cfg_path}: a CLT of Gemma Scope 2 has {name}={expected!r}")
    headers = [_header(path) for path in paths]
    _check_names(paths[0], headers[0], ["w_enc"])
    d_model, num_features = _matrix_shape(paths[0], headers[0], "w_enc")
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
        _check_tensors(path, header, shapes)
        _check_threshold(path, "threshold", _tensor(path, "threshold"))
    dtype = _common_dtype(paths, headers, [name for name in shapes if name != "threshold"])
    config = _configuration(
        {
            "num_layers": num_layers,
            "d_model": d_model,
            "num_features": num_features,
            "activation_fn": "jumprelu",
            "skip_connection": with_skip,
            "base_model_name_or_path": cfg.get("model_name") or None,
            "feature_input_hook": _by_ending(cfg.get("hf_hook_point_in"), GEMMA_INPUTS),
            "feature_output_hook": _by_ending(cfg.get("hf_hook_point_out"), GEMMA_OUTPUTS),
            "dtype": dtype,
        },
        overrides,
        cfg_path,
    )

    def layers():
        for layer, path in enumerate(paths):
            decoder = _tensor(path, "w_dec")
            if not drop_acausal and decoder[:, :layer].any():
                raise ValueError(
                    f"w_dec in {path} writes to layers before its own, {layer}, which hf_clt cannot express; give "
                    "drop_acausal to leave that out, as circuit-tracer does"
                )
            yield _layer(
                layer,
                dtype,
                W_enc=_tensor(path, "w_enc").T,
                b_enc=_tensor(path, "b_enc"),
                b_dec=_tensor(path, "b_dec"),
                W_dec=decoder[:, layer:],
                threshold=_tensor(path, "threshold"),
                W_skip=_tensor(path, "affine_skip_connection") if with_skip else None,
            )

    return config, layers()


def import_gemma_scope_2(folder: str | Path, drop_acausal: bool = False, **overrides) -> CrossLayerTranscoder:
    """A cross-layer transcoder of Gemma Scope 2; see [`read_gemma_scope_2`]."""
    return _build(*read_gemma_scope_2(folder, drop_acausal, **overrides))


# -- what the formats share -------------------------------------------------------------------------------------------


def _configuration(found: dict, overrides: dict, described: Path | str) -> CLTConfig:
    """
    The configuration, from what the files say and what the caller sets.

    Args:
        found: Fields of [`CLTConfig`]; a hook is None where the files name none that `hf_clt` has.
        overrides: What the caller sets.
        described: The file that should name the hooks, or a sentence on them.

    Raises:
        ValueError: If a hook is unknown, or the caller sets what the files say.
    """
    for name in overrides:
        if name in READ_FROM_FILES:
            raise ValueError(f"{name}={overrides[name]!r} is given, but the checkpoint says it; leave out {name}")
    fields = {**found, **overrides}
    for name, known in (("feature_input_hook", FEATURE_INPUT_HOOKS), ("feature_output_hook", FEATURE_OUTPUT_HOOKS)):
        if fields[name] not in known:
            where = "" if name in overrides else f" ({described})"
            raise ValueError(f"{name}={fields[name]!r}{where} is none of {' and '.join(known)}; give {name}")
    return CLTConfig(**fields)


def _layer(layer: int, dtype: str, statistics: tuple[Tensor, ...] | None = None, **tensors) -> dict[str, Tensor]:
    """
    The tensors of one layer, named as on disk.

    Args:
        layer: Its number.
        dtype: Of the weights; θ is float32.
        statistics: mean_in, std_in, mean_out and std_out, (L, D) float64 each, to fold in; None for none.
        tensors: W_enc (F, D), b_enc (F,), b_dec (D,), W_dec (F, J, D), and θ (F,) and W_skip (D, D), or None.
    """
    if statistics is not None:
        mean_in, std_in, mean_out, std_out = (column[layer] for column in statistics)
        w_enc, b_enc = files.fold_encoder(tensors["W_enc"].double(), tensors["b_enc"].double(), mean_in, std_in)
        skip = tensors.get("W_skip")
        b_dec, skip = files.fold_output(
            tensors["b_dec"].double(), None if skip is None else skip.double(), mean_in, std_in, mean_out, std_out
        )
        std_targets = statistics[3][layer : layer + tensors["W_dec"].shape[1]]
        w_dec = files.fold_decoder(tensors["W_dec"].double(), std_targets)
        tensors |= {"W_enc": w_enc, "b_enc": b_enc, "b_dec": b_dec, "W_dec": w_dec, "W_skip": skip}
    return {
        f"{name}_{layer}": tensor.to(torch.float32 if name == "threshold" else getattr(torch, dtype)).contiguous()
        for name, tensor in tensors.items()
        if tensor is not None
    }


@torch.no_grad()
def _build(config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> CrossLayerTranscoder:
    """A CLT of this configuration with these layers, relu or jumprelu or topk, in eval mode."""
    with no_init_weights():  # every parameter is set below
        clt = AutoModel.from_config(config, dtype=getattr(torch, str(config.dtype).removeprefix("torch.")))
    for layer, tensors in enumerate(layers):
        clt.encoders[layer].weight.copy_(tensors[f"W_enc_{layer}"])
        clt.encoders[layer].bias.copy_(tensors[f"b_enc_{layer}"])
        clt.decoders[layer].bias.copy_(tensors[f"b_dec_{layer}"])
        stored = clt.decoders[layer].weight  # a tied decoder is stored once
        stored.copy_(tensors[f"W_dec_{layer}"][:, : stored.shape[1]])
        if config.activation_fn == "jumprelu":
            clt.thresholds[layer].value.copy_(tensors[f"threshold_{layer}"].double().log())
        if config.skip_connection:
            clt.skips[layer].weight.copy_(tensors[f"W_skip_{layer}"])
    return clt.eval()


def _sum(tensors: list[Tensor]) -> Tensor:
    """The sum in float64; a single tensor as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).sum(dim=0, dtype=torch.float64)


def _by_ending(name: str | None, hooks: dict[str, str]) -> str | None:
    """The hook that a module path with this ending means; the path itself if it means none."""
    return next((hook for ending, hook in hooks.items() if str(name).endswith(ending)), name)


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the tensors in a file, without reading them."""
    return files.read_header(path.parent, path.name)


def _tensor(path: Path, name: str) -> Tensor:
    return files.read_tensor(path.parent, path.name, name)


def _slice(path: Path, name: str, index: int | slice) -> Tensor:
    """A part of a tensor along its first dimension; only that is read."""
    with safe_open(path, "pt") as tensors:
        return tensors.get_slice(name)[index]


def _check_names(path: Path, header: dict, names: list[str]) -> None:
    for name in names:
        if name not in header:
            raise ValueError(f"{path} has no tensor {name}; it holds {_some(header)}")


def _check_tensors(path: Path, header: dict, shapes: dict, may_hold: set[str] = frozenset()) -> None:
    """Raises ValueError for the first tensor that is missing, has another shape, or is not known."""
    _check_names(path, header, list(shapes))
    for name, shape in shapes.items():
        if header[name][0] != shape:
            raise ValueError(
                f"{name} in {path} has shape {header[name][0]}; the other tensors and the configuration need {shape}"
            )
    for name in sorted(set(header) - set(shapes) - set(may_hold)):
        raise ValueError(
            f"{path} holds a tensor {name}, which is not known in this format: leaving it out might change what the "
            "CLT computes; remove it if it does not matter"
        )


def _matrix_shape(path: Path, header: dict, name: str) -> tuple[int, int]:
    shape = header[name][0]
    if len(shape) != 2:
        raise ValueError(f"{name} in {path} has shape {shape}; expected a matrix")
    return shape


def _check_threshold(path: Path, name: str, theta: Tensor) -> None:
    """Raises ValueError if a θ is negative or not a number."""
    bad = int((~(theta >= 0)).sum())
    if bad:
        raise ValueError(f"{name} in {path} has {bad} negative or NaN values of θ; a threshold is at least 0")


def _common_dtype(paths: list[Path], headers: list[dict], names) -> str:
    """The smallest dtype that holds all these tensors, thresholds aside, without loss."""
    dtypes = set()
    for path, header in zip(paths, headers, strict=True):
        for name in names:
            if "threshold" not in name:
                on_disk = header[name][1]
                if on_disk not in files.DTYPES:
                    raise ValueError(f"{name} in {path} is {on_disk}; weights are one of {', '.join(files.DTYPES)}")
                dtypes.add(getattr(torch, files.DTYPES[on_disk]))
    common = dtypes.pop()
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return str(common).removeprefix("torch.")


def _numbers(folder: Path, name: str) -> list[int]:
    """The numbers, ascending, that stand for `{}` in the names of a folder's files."""
    pattern = re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))
    return sorted(int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name)))


def _numbered_files(folder: Path, name: str) -> list[Path]:
    """The files whose names fit, in the order of their numbers, which must run from 0 without a gap."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; give the folder of the weights")
    numbers = _numbers(folder, name)
    for number in range(max(numbers, default=0) + 1):
        if number not in numbers:
            raise FileNotFoundError(f"{name.format(number)} is missing in {folder}: download or save it again")
    return [folder / name.format(number) for number in numbers]


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing in {path.parent}; it describes the weights, download it too")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); download or save it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; download or save it again")
    return found


def _read_yaml(path: Path) -> dict:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({error}); download or save it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no YAML mapping; download or save it again")
    return found


def _some(names) -> str:
    """The first few of some names."""
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"


__all__ = [
    "FORMATS",
    "detect_format",
    "import_circuit_tracer",
    "import_circuit_tracer_plt",
    "import_clt",
    "import_clt_forge",
    "import_crosslayer_coding",
    "import_gemma_scope_2",
    "read_circuit_tracer_plt",
    "read_clt",
    "read_clt_forge",
    "read_crosslayer_coding",
    "read_gemma_scope_2",
    "read_hf_clt",
]
