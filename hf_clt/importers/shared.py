"""What the readers share: settings and headers of files, the configuration and tensors of a checkpoint, a model."""

import functools
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from .. import folding
from .. import release as files
from ..configuration_clt import FEATURE_INPUT_HOOKS, FEATURE_OUTPUT_HOOKS, CLTConfig
from ..modeling_clt import CrossLayerTranscoder


Checkpoint = tuple[CLTConfig, Iterator[dict[str, Tensor]]]  # a configuration, and per layer its tensors as on disk

# What the files say about a CLT; a caller cannot set it otherwise.
READ_FROM_FILES = ("num_layers", "d_model", "num_features", "activation_fn", "k", "k_scope", "decoder_reach")
READ_FROM_FILES += ("decoder_tying", "trained_decoder_tying", "skip_connection", "dtype")


def numbered_files(folder: Path, name: str) -> list[Path]:
    """The files with a number in place of `{}` in their names, in its order; it must run from 0 without a gap."""
    paths = []
    while (path := folder / name.format(len(paths))).is_file():
        paths.append(path)
    if not paths or len(paths) < len(list(folder.glob(name.format("[0-9]*")))):
        raise FileNotFoundError(f"{path.name} is missing in {folder}: download or save it again")
    return paths


def read_settings(path: Path) -> dict:
    """The object in a JSON or YAML file; FileNotFoundError or ValueError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing in {path.parent}; it describes the weights, download it too")
    try:
        found = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download or save it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object with fields; download or save it again")
    return found


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the tensors in a file, without reading them."""
    return files.read_header(path.parent, path.name)


def read_tensor(path: Path, name: str, index: int | slice = slice(None)) -> Tensor:
    """A tensor, or a part of it along its first dimension; only that is read."""
    with safe_open(path, "pt") as tensors:
        return tensors.get_slice(name)[index]


def read_shape(path: Path, name: str, dimensions: str) -> tuple[int, ...]:
    """The shape of a tensor with as many dimensions as `dimensions`, such as "FD", names."""
    shape = read_header(path).get(name, (None,))[0]
    if shape is None or len(shape) != len(dimensions):
        expected = ", ".join(dimensions)
        raise ValueError(f"{name} in {path} has shape {shape}; expected ({expected})")
    return shape


def check_tensors(paths: list[Path], shapes: dict[str, tuple], may_hold: Collection[str] = ()) -> torch.dtype:
    """
    The smallest dtype that holds all tensors of the files, thresholds aside, without loss. Only headers are read.

    Raises:
        ValueError: If a file does not have floating-point tensors of exactly these names and shapes, besides those of
            `may_hold`: leaving an unknown one out might change what the CLT computes.
    """
    dtypes = []
    for path in paths:
        header = read_header(path)
        for name in [*shapes, *sorted(set(header) - set(may_hold))]:
            shape, dtype = header.get(name, (None, None))
            if name not in shapes:
                raise ValueError(f"{name} in {path} is not known in this format; remove it if it does not matter")
            if shape != shapes[name]:
                raise ValueError(f"{name} in {path} has shape {shape}; the files need {shapes[name]}")
            if dtype not in files.DTYPES:
                raise ValueError(f"{name} in {path} is {dtype}; weights are one of {', '.join(files.DTYPES)}")
            if "threshold" not in name:
                dtypes.append(getattr(torch, files.DTYPES[dtype]))
    return functools.reduce(torch.promote_types, dtypes)


def hook_by_ending(name: str | None, hooks: dict[str, str]) -> str | None:
    """The hook that a module path with this ending means; the path itself if it means none."""
    return next((hook for ending, hook in hooks.items() if str(name).endswith(ending)), name)


def make_checkpoint(
    fields: dict,
    overrides: dict,
    described: Path | str,
    read_layer: Callable[[int], dict[str, Tensor | None]],
    statistics: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """
    What a reader returns.

    Args:
        fields: Fields of [`CLTConfig`] that the files say, `dtype` among them; a hook is None where they name none.
        overrides: Fields that the caller sets.
        described: The file that should name the hooks, or a sentence on them.
        read_layer: From the number of a layer to its W_enc (F, D), b_enc (F,), b_dec (D,), W_dec (F, J, D), and θ (F,)
            as `threshold` and W_skip (D, D), or None.
        statistics: mean_in, std_in, mean_out and std_out, (L, D) float64 each, to fold in; None for none.

    Raises:
        ValueError: If a hook is unknown, or the caller sets what the files say.
    """
    for name in set(overrides) & set(READ_FROM_FILES):
        raise ValueError(f"{name}={overrides[name]!r} is given, but the checkpoint says it; leave out {name}")
    given = {**fields, **overrides}
    for name, known in (("feature_input_hook", FEATURE_INPUT_HOOKS), ("feature_output_hook", FEATURE_OUTPUT_HOOKS)):
        if given[name] not in known:
            where = "" if name in overrides else f" ({described})"
            raise ValueError(f"{name}={given[name]!r}{where} is none of {' and '.join(known)}; give {name}")
    config = CLTConfig(**given)

    def layers():
        for layer in range(config.num_layers):
            yield make_layer(layer, fields["dtype"], statistics, read_layer(layer))

    return config, layers()


def make_layer(
    layer: int, dtype: torch.dtype, statistics: dict[str, Tensor] | None, tensors: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """
    The tensors of one layer with statistics folded in, named as on disk. The decoder is in `dtype`, θ in float32, the
    rest at least in float32.

    Raises:
        ValueError: If a θ is negative or not a number.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if bad := int((~(tensors.get("threshold", torch.zeros(())) >= 0)).sum()):
        raise ValueError(f"the threshold of layer {layer} has {bad} negative or NaN values; one is at least 0")
    if statistics is not None:
        tensors |= folding.fold_layer({name: tensor.double() for name, tensor in tensors.items()}, statistics, layer)
    dtypes = {"W_dec": dtype, "threshold": torch.float32}
    wide = folding.at_least_float32(dtype)
    return {f"{name}_{layer}": tensor.to(dtypes.get(name, wide)).contiguous() for name, tensor in tensors.items()}


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
