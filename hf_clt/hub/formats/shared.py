"""What the modules of the formats share: checks on files, the configuration, the tensors of a layer, and a model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from ... import checkpoint_format as files
from ... import folding
from ...configuration_clt import FEATURE_INPUT_HOOKS, FEATURE_OUTPUT_HOOKS, CLTConfig
from ...modeling_clt import CrossLayerTranscoder


Checkpoint = tuple[CLTConfig, Iterator[dict[str, Tensor]]]  # a configuration, and per layer its tensors as on disk

# What the files say about a CLT; a caller cannot set it otherwise.
READ_FROM_FILES = ("num_layers", "d_model", "num_features", "activation_fn", "k", "k_scope", "decoder_reach")
READ_FROM_FILES += ("decoder_tying", "trained_decoder_tying", "skip_connection", "dtype")


# -- reading files ----------------------------------------------------------------------------------------------------


def file_numbers(folder: Path, name: str) -> list[int]:
    """The numbers, ascending, that stand for `{}` in the names of a folder's files."""
    pattern = re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))
    return sorted(int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name)))


def numbered_files(folder: Path, name: str) -> list[Path]:
    """The files whose names fit, in the order of their numbers, which must run from 0 without a gap."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; give the folder of the weights")
    numbers = file_numbers(folder, name)
    for number in range(max(numbers, default=0) + 1):
        if number not in numbers:
            raise FileNotFoundError(f"{name.format(number)} is missing in {folder}: download or save it again")
    return [folder / name.format(number) for number in numbers]


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing in {path.parent}; it describes the weights, download it too")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); download or save it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; download or save it again")
    return found


def read_yaml(path: Path) -> dict:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({error}); download or save it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no YAML mapping; download or save it again")
    return found


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the tensors in a file, without reading them."""
    return files.read_header(path.parent, path.name)


def read_tensor(path: Path, name: str) -> Tensor:
    return files.read_tensor(path.parent, path.name, name)


def read_slice(path: Path, name: str, index: int | slice) -> Tensor:
    """A part of a tensor along its first dimension; only that is read."""
    with safe_open(path, "pt") as tensors:
        return tensors.get_slice(name)[index]


# -- checking what was read -------------------------------------------------------------------------------------------


def check_names(path: Path, header: dict, names: list[str]) -> None:
    for name in names:
        if name not in header:
            raise ValueError(f"{path} has no tensor {name}; it holds {some(header)}")


def check_tensors(path: Path, header: dict, shapes: dict, may_hold: set[str] = frozenset()) -> None:
    """Raises ValueError for the first tensor that is missing, has another shape, or is not known."""
    check_names(path, header, list(shapes))
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


def matrix_shape(path: Path, header: dict, name: str) -> tuple[int, int]:
    shape = header[name][0]
    if len(shape) != 2:
        raise ValueError(f"{name} in {path} has shape {shape}; expected a matrix")
    return shape


def check_threshold(path: Path, name: str, theta: Tensor) -> None:
    """Raises ValueError if a θ is negative or not a number."""
    bad = int((~(theta >= 0)).sum())
    if bad:
        raise ValueError(f"{name} in {path} has {bad} negative or NaN values of θ; a threshold is at least 0")


def common_dtype(paths: list[Path], headers: list[dict], names) -> str:
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


def some(names) -> str:
    """The first few of some names."""
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"


# -- a CLT from what was read -----------------------------------------------------------------------------------------


def hook_by_ending(name: str | None, hooks: dict[str, str]) -> str | None:
    """The hook that a module path with this ending means; the path itself if it means none."""
    return next((hook for ending, hook in hooks.items() if str(name).endswith(ending)), name)


def make_config(found: dict, overrides: dict, described: Path | str) -> CLTConfig:
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


def sum_biases(biases: list[Tensor]) -> Tensor:
    """The sum in float64; a single tensor as it is."""
    return biases[0] if len(biases) == 1 else torch.stack(biases).sum(dim=0, dtype=torch.float64)


def make_layer(layer: int, dtype: str, statistics: tuple[Tensor, ...] | None = None, **tensors) -> dict[str, Tensor]:
    """
    The tensors of one layer, named as on disk.

    Args:
        layer: Its number.
        dtype: Of the decoder; the rest is at least float32.
        statistics: mean_in, std_in, mean_out and std_out, (L, D) float64 each, to fold in; None for none.
        tensors: W_enc (F, D), b_enc (F,), b_dec (D,), W_dec (F, J, D), and θ (F,) and W_skip (D, D), or None.
    """
    if statistics is not None:
        mean_in, std_in, mean_out, std_out = (column[layer] for column in statistics)
        w_enc, b_enc = folding.fold_encoder(tensors["W_enc"].double(), tensors["b_enc"].double(), mean_in, std_in)
        skip = tensors.get("W_skip")
        b_dec, skip = folding.fold_output(
            tensors["b_dec"].double(), None if skip is None else skip.double(), mean_in, std_in, mean_out, std_out
        )
        std_targets = statistics[3][layer : layer + tensors["W_dec"].shape[1]]
        w_dec = folding.fold_decoder(tensors["W_dec"].double(), std_targets)
        tensors |= {"W_enc": w_enc, "b_enc": b_enc, "b_dec": b_dec, "W_dec": w_dec, "W_skip": skip}
    of_decoder = getattr(torch, dtype)
    wide = torch.promote_types(of_decoder, torch.float32)
    formats = {"W_dec": of_decoder, "threshold": torch.float32}
    return {
        f"{name}_{layer}": tensor.to(formats.get(name, wide)).contiguous()
        for name, tensor in tensors.items()
        if tensor is not None
    }


@torch.no_grad()
def build_clt(config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> CrossLayerTranscoder:
    """A CLT of this configuration with these layers, relu or jumprelu or topk, in eval mode."""
    with torch.device("meta"):
        clt = CrossLayerTranscoder(config)
    state = {}
    for layer, tensors in enumerate(layers):
        stored = 1 if config.decoder_tying != "none" else config.num_targets(layer)  # a tied decoder is stored once
        state[f"encoders.{layer}.weight"] = tensors[f"W_enc_{layer}"]
        state[f"encoders.{layer}.bias"] = tensors[f"b_enc_{layer}"]
        state[f"decoders.{layer}.weight"] = tensors[f"W_dec_{layer}"][:, :stored].contiguous()
        state[f"decoders.{layer}.bias"] = tensors[f"b_dec_{layer}"]
        if config.activation_fn == "jumprelu":
            state[f"thresholds.{layer}.value"] = tensors[f"threshold_{layer}"].double().log().float()
        if config.skip_connection:
            state[f"skips.{layer}.weight"] = tensors[f"W_skip_{layer}"]
    clt.load_state_dict(state, assign=True)
    return clt.eval()


# -- writing ----------------------------------------------------------------------------------------------------------


def check_activation_fn(config: CLTConfig, format: str) -> None:
    if config.activation_fn == "topk":
        raise ValueError(
            f"activation_fn='topk': {format} has no top-k that drops negative pre-activations; convert the CLT to "
            "jumprelu first"
        )


def check_hooks(config: CLTConfig, format: str) -> None:
    for name, needed in (("feature_input_hook", "mlp.hook_in"), ("feature_output_hook", "hook_mlp_out")):
        if getattr(config, name) != needed:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: CLTs of {format} have {needed!r}, and its files name no other; "
                "keep the CLT in hf_clt's files"
            )


def jumprelu_threshold(config: CLTConfig, tensors: dict[str, Tensor], layer: int) -> Tensor:
    """θ of a layer, (F,) float32; 0 for relu, the running threshold for batchtopk."""
    if config.activation_fn == "relu":
        return torch.zeros(config.num_features)
    theta = tensors[f"threshold_{layer}"]
    if config.activation_fn == "batchtopk" and theta.isinf().all():
        raise ValueError(
            f"threshold_{layer} is infinite: this batchtopk CLT has no running threshold yet; train it first"
        )
    return theta


def make_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


__all__ = [
    "Checkpoint",
    "build_clt",
    "check_activation_fn",
    "check_hooks",
    "check_names",
    "check_tensors",
    "check_threshold",
    "common_dtype",
    "file_numbers",
    "hook_by_ending",
    "jumprelu_threshold",
    "make_config",
    "make_folder",
    "make_layer",
    "matrix_shape",
    "numbered_files",
    "read_header",
    "read_json",
    "read_slice",
    "read_tensor",
    "read_yaml",
    "some",
    "sum_biases",
]
