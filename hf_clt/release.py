"""
The files of a released CLT, which hf_clt and circuit-tracer both read:

| file | holds |
|---|---|
| `config.json`, `config.yaml` | the `CLTConfig`; circuit-tracer's model name and hooks |
| `W_enc_{l}.safetensors` | `W_enc_{l}` (F, D), `b_enc_{l}` (F,), `b_dec_{l}` (D,), `threshold_{l}`, `W_skip_{l}` |
| `W_dec_{l}.safetensors` | `W_dec_{l}` (F, min(L-l, R), D); `[:, j]` writes to layer l+j |
| `model.safetensors.index.json` | which tensor is in which file |
"""

import copy
import ctypes
import hashlib
import json
import logging
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import folding
from .configuration_clt import CLT_CONFIG_HELP, WITH_THRESHOLD, CLTConfig
from .files import read_json, replacing, write_json, write_text
from .folding import at_least_float32
from .sharding import FeatureShard, collect_rows, rows_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
CIRCUIT_TRACER_FILE = "config.yaml"
SMALL_FILES = ("config.json", CIRCUIT_TRACER_FILE, INDEX_FILE)
WEIGHT_FILE = re.compile(r"W_(enc|dec)_(\d+)\.safetensors")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}  # safetensors' names and torch's
READ_PIECE = 1 << 17  # bytes; the kernel reads no more than its read-ahead window (128 KiB or larger) for one advice
ALL = slice(None)


def layer_files(config: CLTConfig, layer: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """The two files of a layer, each with the names and shapes of its tensors."""
    f, d = config.num_features, config.d_model
    encoder = {f"W_enc_{layer}": (f, d), f"b_enc_{layer}": (f,), f"b_dec_{layer}": (d,)}
    if config.activation_fn in WITH_THRESHOLD:
        encoder[f"threshold_{layer}"] = (f,)
    if config.skip_connection:
        encoder[f"W_skip_{layer}"] = (d, d)
    decoder = {f"W_dec_{layer}": (f, config.num_targets(layer), d)}
    return {f"W_enc_{layer}.safetensors": encoder, f"W_dec_{layer}.safetensors": decoder}


# -- writing ----------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes a safetensors file, whole or not at all; the same tensors and metadata give the same bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        if metadata:
            sort_metadata(temporary)


def sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, which the library writes in random order, by name."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > size:
            raise RuntimeError(f"the header of {path.name} has {size} bytes and would need {len(text)}")
        file.seek(8)
        file.write(text.ljust(size))


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """16 digits of the SHA-256 of the names and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def write_release(folder: Path, config: CLTConfig, layers: Iterable[dict[str, Tensor]]) -> None:
    """
    Writes the files of a released CLT, each whole or not at all. The index is written last and has the digests of the
    weight files, so that loading notices a folder in which some files are of an earlier release.

    Args:
        folder: Where to write; created if missing.
        config: The configuration to write.
        layers: One dict per layer, in order, from tensor name to tensor. Consumed one at a time.

    Raises:
        ValueError: If the folder has a file of another model under the name of a file of a CLT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if foreign := foreign_files(folder):
        raise ValueError(f"{foreign[0]} exists and is not a file of a CLT; give another folder than {folder}")
    weight_map, digests, total_size, total_parameters = {}, {}, 0, 0
    for layer, tensors in enumerate(layers):
        for file, names in layer_files(config, layer).items():
            of_file = {name: tensors[name] for name in names}
            digests[file] = digest_tensors(of_file)
            write_tensors(folder / file, of_file, digest=digests[file])
            weight_map |= dict.fromkeys(names, file)
            total_size += sum(tensor.nbytes for tensor in of_file.values())
            total_parameters += sum(tensor.numel() for tensor in of_file.values())
    remove_weights(folder, first_layer=config.num_layers)
    described = {
        "model_name": config.base_model_name_or_path,
        "model_kind": config.model_type,
        "feature_input_hook": config.feature_input_hook,
        "feature_output_hook": config.feature_output_hook,
    }
    described = {name: value for name, value in described.items() if value is not None}
    write_text(folder / CIRCUIT_TRACER_FILE, yaml.safe_dump(described, sort_keys=False))
    write_text(folder / "config.json", config.to_json_string())
    metadata = {"total_size": total_size, "total_parameters": total_parameters, "digests": digests}
    write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map}, indent=2)


def named_files(folder: Path) -> list[Path]:
    """The files in a folder that have the name of a file of a release, whoever wrote them."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if path.name in SMALL_FILES or WEIGHT_FILE.fullmatch(path.name)]


def foreign_files(folder: Path) -> list[Path]:
    """The files in a folder that have the name of a file of a release and are not of a CLT."""
    return [path for path in named_files(folder) if not is_release_file(path)]


def remove_weights(folder: Path, first_layer: int = 0) -> None:
    """Removes the weight files of layers from `first_layer` on; circuit-tracer counts layers by these files."""
    for path in named_files(folder):
        match = WEIGHT_FILE.fullmatch(path.name)
        if match and int(match[2]) >= first_layer and is_release_file(path):
            path.unlink()


def remove_release(folder: Path) -> None:
    """Removes the files that `write_release` writes."""
    for path in named_files(folder):
        if is_release_file(path):
            path.unlink()


def is_release_file(path: Path) -> bool:
    """Whether the content of a file is that of a file of a release; False if it cannot be read."""
    try:
        if WEIGHT_FILE.fullmatch(path.name):
            return path.stem in read_header(path.parent, path.name)
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if path.name == INDEX_FILE:
            files = set(found["weight_map"].values())
            return bool(files) and all(map(WEIGHT_FILE.fullmatch, files))
        return CLTConfig.model_type in (found.get("model_type"), found.get("model_kind"))
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return False


# -- checking ---------------------------------------------------------------------------------------------------------


@contextmanager
def open_weights(folder: Path, file: str) -> Iterator[safe_open]:
    """
    A weight file, opened with `safe_open`.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is truncated or not a safetensors file.
    """
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"{file} is missing in {folder}: the CLT is incomplete; download or save it again")
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(
            f"{file} in {folder} is truncated or not a safetensors file ({error}); download or save it again"
        ) from error


def read_header(folder: Path, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the tensors in a weight file; nothing else is read. Errors as for [`open_weights`]."""
    with open_weights(folder, file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def read_tensor(folder: Path, file: str, name: str, selection: slice | tuple = ALL) -> Tensor:
    """A tensor of a weight file, or `[selection]` of it; whole rows are mapped where the file system allows it."""
    with open_weights(folder, file) as tensors:
        return tensors.get_slice(name)[selection]


def check_files(folder: Path, config: CLTConfig, rows: slice = ALL, layers: Iterable[int] | None = None) -> None:
    """
    Checks the weight files of a CLT against its configuration before anything is loaded.

    Args:
        folder: The CLT's folder.
        config: Its configuration.
        rows: The features whose thresholds and ties are checked.
        layers: Which layers to check, without their ties; None: all.

    Raises:
        FileNotFoundError: For a missing file.
        ValueError: For a truncated file, a missing tensor, a wrong shape, a negative threshold, a decoder that is
            not tied as the configuration says, or files of two releases.
    """
    digests = {}
    for layer in range(config.num_layers) if layers is None else layers:
        for file, shapes in layer_files(config, layer).items():
            with open_weights(folder, file) as tensors:
                digests[file] = (tensors.metadata() or {}).get("digest")
                found = {name: tuple(tensors.get_slice(name).get_shape()) for name in sorted(tensors.keys())}
            for name, shape in shapes.items():
                if name not in found:
                    raise ValueError(
                        f"{file} in {folder} has no tensor {name}, which activation_fn={config.activation_fn!r} and "
                        f"skip_connection={config.skip_connection} need; it holds {', '.join(found)}"
                    )
                if found[name] != shape:
                    raise ValueError(
                        f"{name} in {folder / file} has shape {found[name]}, but num_layers={config.num_layers}, "
                        f"num_features={config.num_features}, d_model={config.d_model}, decoder_reach="
                        f"{config.decoder_reach} need {shape}; correct the config or the file"
                    )
        if config.activation_fn in WITH_THRESHOLD:
            check_threshold(folder, config, layer, rows)
    check_digests(folder, digests)
    if config.decoder_tying != "none" and layers is None:
        check_tying(folder, config, rows)


def check_digests(folder: Path, found: dict[str, str | None]) -> None:
    """
    Raises ValueError if weight files are of two releases, because writing one over the other was cut off: a digest
    `found` in a file is not the one in the index. A file without a digest, of another program, is not checked.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        return
    expected = read_json(index).get("metadata", {}).get("digests", {})
    if bad := [file for file, digest in found.items() if digest not in (None, expected.get(file))]:
        raise ValueError(
            f"{bad[0]} in {folder} is of another CLT than {INDEX_FILE}: writing one over the other was cut off; save "
            "or download it again (a training run: --resume-from-checkpoint latest)"
        )


def check_threshold(folder: Path, config: CLTConfig, layer: int, rows: slice) -> None:
    """Raises ValueError if a threshold is negative or NaN, or if those of a batchtopk layer differ."""
    theta = read_tensor(folder, f"W_enc_{layer}.safetensors", f"threshold_{layer}", rows)
    if bad := int((~(theta >= 0)).sum()):
        raise ValueError(f"threshold_{layer} in {folder} has {bad} negative or NaN values; a threshold is at least 0")
    if config.activation_fn == "batchtopk" and not (theta == theta[0]).all():
        raise ValueError(
            f"threshold_{layer} in {folder} differs between features; batchtopk has one threshold per layer: "
            "load it with activation_fn='jumprelu'"
        )


def check_tying(folder: Path, config: CLTConfig, rows: slice) -> None:
    """Raises ValueError if the decoders in the files are not tied as the configuration says; reads two at a time."""

    def decoder(source: int, j: int) -> Tensor:
        return read_tensor(folder, f"W_dec_{source}.safetensors", f"W_dec_{source}", (rows, j))

    for layer in range(config.num_layers):  # the others are tied to what it writes to itself
        tied_to = decoder(layer, 0)
        if config.decoder_tying == "per_source":
            others = [(layer, j) for j in range(1, config.num_targets(layer))]
        else:
            others = [(s, layer - s) for s in range(layer) if layer - s < config.num_targets(s)]
        for source, j in others:
            if not torch.equal(decoder(source, j), tied_to):
                raise ValueError(
                    f"decoder_tying={config.decoder_tying!r}, but W_dec_{source}[:, {j}] in {folder} differs from the "
                    "decoder it is tied to; load it with decoder_tying='none'"
                )


# -- reading ----------------------------------------------------------------------------------------------------------


def read_state(
    folder: Path,
    config: CLTConfig,
    rows: slice = ALL,
    layers: Iterable[int] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """
    The parameters of a CLT by their names in the model, from files that [`check_files`] has checked.

    Args:
        folder: The CLT's folder.
        config: Its configuration.
        rows: The features to read.
        layers: The layers to read; None: all.
        dtype: Of the decoders; the rest is at least float32, thresholds are float32. None: as in the files, and left
            in them where they can be mapped.
    """
    state = {}
    for layer in range(config.num_layers) if layers is None else layers:
        encoder = partial(read_tensor, folder, f"W_enc_{layer}.safetensors")
        wide = {
            f"encoders.{layer}.weight": encoder(f"W_enc_{layer}", rows),
            f"encoders.{layer}.bias": encoder(f"b_enc_{layer}", rows),
            f"decoders.{layer}.bias": encoder(f"b_dec_{layer}"),
        }
        if config.skip_connection:
            wide[f"skips.{layer}.weight"] = encoder(f"W_skip_{layer}")
        selection = rows if config.decoder_tying == "none" else (rows, slice(0, 1))  # ties are written out in the file
        decoder = read_tensor(folder, f"W_dec_{layer}.safetensors", f"W_dec_{layer}", selection).contiguous()
        if dtype is not None:
            decoder = decoder.to(dtype)
            wide = {name: tensor.to(at_least_float32(dtype)) for name, tensor in wide.items()}
        state |= {**wide, f"decoders.{layer}.weight": decoder}
        if config.activation_fn in WITH_THRESHOLD:
            theta = encoder(f"threshold_{layer}", rows).float()
            is_log = config.activation_fn == "jumprelu"
            state[f"thresholds.{layer}.value"] = theta.log() if is_log else theta[:1].clone()
    return state


def wanted_dtype(config: CLTConfig, dtype: torch.dtype | str | None) -> torch.dtype:
    """What `dtype` of `from_pretrained` means; None and "auto" are that of the configuration, by default float32."""
    dtype = (config.dtype or torch.float32) if dtype in (None, "auto") else dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def read_config(folder: Path, overrides: dict) -> CLTConfig:
    """
    The configuration in a CLT's folder, with some fields overridden. Without a `config.json`, as in circuit-tracer's
    folders, it is taken from the tensors and `config.yaml`.

    Raises:
        ValueError: If the folder holds another model.
        FileNotFoundError: If it holds no CLT.
    """
    path = folder / "config.json"
    if path.is_file():
        values = read_json(path)
        found = values.get("model_type")
        if found != CLTConfig.model_type:
            raise ValueError(
                f"{folder} holds a model_type={found!r}, not {CLTConfig.model_type!r}; give a CLT's folder"
            )
        return CLTConfig.from_values(values, **overrides)
    names = [path.name for path in folder.iterdir()]
    return config_from_headers(folder, folder, names, lambda file: read_header(folder, file), overrides)


def config_from_headers(
    where: str | Path, folder: Path, files: Iterable[str], header_of: Callable[[str], dict], overrides: dict
) -> CLTConfig:
    """
    The configuration of a CLT without `config.json`, from the first layer's two files and `config.yaml`.

    Args:
        where: Folder or repository, for messages.
        folder: Where `config.yaml` is, if there is one.
        files: Names of the files of the CLT.
        header_of: From the name of a file to what [`read_header`] gives for it.
        overrides: Fields of `CLTConfig` that the caller sets.

    Raises:
        FileNotFoundError: If there are no weight files.
        ValueError: If a file does not have the tensor of its name.
    """
    layers = [int(match[2]) for file in files if (match := WEIGHT_FILE.fullmatch(file))]
    if not layers:
        raise FileNotFoundError(f"{where} holds no CLT: it has neither config.json nor W_enc_0.safetensors")
    num_layers = max(layers) + 1
    encoder, decoder = header_of("W_enc_0.safetensors"), header_of("W_dec_0.safetensors")
    for name, header in (("W_enc_0", encoder), ("W_dec_0", decoder)):
        if name not in header:
            raise ValueError(f"{name}.safetensors in {where} has no tensor {name}; it holds {', '.join(header)}")
    path = folder / CIRCUIT_TRACER_FILE
    described = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    num_features, d_model = encoder["W_enc_0"][0]
    shape, dtype = decoder["W_dec_0"]
    reach = shape[1]
    found = {
        "num_layers": num_layers,
        "d_model": d_model,
        "num_features": num_features,
        "decoder_reach": None if reach == num_layers else reach,
        "activation_fn": "jumprelu" if "threshold_0" in encoder else "relu",
        "skip_connection": "W_skip_0" in encoder,
        "base_model_name_or_path": described.get("model_name"),
        "dtype": DTYPES.get(dtype, "float32"),
    }
    for hook in ("feature_input_hook", "feature_output_hook"):
        if hook in described:
            found[hook] = described[hook]
    return CLTConfig(**{**found, **overrides})


# -- weights that stay in their files ---------------------------------------------------------------------------------


def check_lazy(folder: Path, dtype: torch.dtype | str | None) -> None:
    """Raises ValueError if the system, or a `dtype` that is not that of the decoders, does not go with `lazy=True`."""
    if sys.platform != "linux":
        raise ValueError(f"lazy=True is for Linux, not {sys.platform}; leave out lazy")
    on_disk = DTYPES.get(read_header(folder, "W_dec_0.safetensors")["W_dec_0"][1])
    if str(dtype or "auto").removeprefix("torch.") not in (on_disk, "auto"):
        raise ValueError(
            f"dtype={dtype} is given with lazy=True, but the weights in {folder} are {on_disk} and stay there; leave "
            "out dtype, or lazy to read and convert them"
        )


def check_mapped(weights: dict[str, Tensor]) -> None:
    """Raises RuntimeError, naming the first, if a weight lies in memory of its own and not in a mapped file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            ranges.append(range(*(int(address, 16) for address in addresses.split("-"))))
    for name, weight in weights.items():
        if not any(weight.data_ptr() in addresses for addresses in ranges):
            raise RuntimeError(
                f"{name} was read into memory despite lazy=True: its file cannot be mapped where it lies (a network "
                "mount?); copy the CLT to a local disk, or leave out lazy"
            )


def read_ahead(weight: Tensor, rows: Tensor) -> None:
    """
    Asks the kernel to read rows of a tensor that is mapped from a file: all at once, and nothing around them.

    Without this, each row that is touched makes the kernel wait for a window around it (128 KiB on many disks, 8 MiB
    on others), so that a few scattered rows cost as much as the file. It is advice: it changes no value, and has no
    effect on a tensor that is not mapped.

    Args:
        weight: (F, J, D), contiguous, on the CPU.
        rows: Rows of `weight`, int64, in any order, possibly repeated.
    """
    madvise = ctypes.CDLL(None).madvise
    row_bytes = weight[0].nbytes
    for row in rows.unique().tolist():
        start = weight.data_ptr() + row * row_bytes
        for piece in range(start - start % mmap.PAGESIZE, start + row_bytes, READ_PIECE):
            length = min(READ_PIECE, start + row_bytes - piece)
            madvise(ctypes.c_void_p(piece), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


# -- a CLT to its files, and back -------------------------------------------------------------------------------------

PER_FEATURE = ("W_enc", "b_enc", "W_dec", "threshold")  # what has a row per feature among what is released


@torch.no_grad()
def released_layer(clt: "PreTrainedModel", layer: int) -> dict[str, Tensor]:
    """
    The tensors of one layer of a CLT as they are released: named as on disk, on the CPU, statistics folded in. Where
    the features are spread over a group, all its processes call this, and the first gets them whole.
    """

    def on_host(name: str, tensor: Tensor) -> Tensor:
        return collect_rows(clt.shard, tensor.detach()) if name in PER_FEATURE else tensor.detach().cpu()

    config = clt.config
    tensors = {name: on_host(name, tensor) for name, tensor in folding.narrow_tensors(clt, layer).items()}
    num_targets = config.num_targets(layer)
    if config.decoder_tying == "per_target":  # with ties written out
        decoders = [on_host("W_dec", clt.decoders[layer + j].weight) for j in range(num_targets)]
        tensors["W_dec"] = torch.cat(decoders, dim=1)
    else:
        tensors["W_dec"] = on_host("W_dec", clt.decoders[layer].weight).expand(-1, num_targets, -1)
    if clt.mean_in is not None:  # in host memory, since a GPU that is full of the CLT has no room
        statistics = {name: value.cpu() for name, value in folding.statistics_of(clt).items()}
        tensors = folding.fold_layer(tensors, statistics, layer)
    if hasattr(clt, "thresholds"):
        tensors["threshold"] = on_host("threshold", clt.thresholds[layer]().expand(clt.num_held).float())
    return {f"{name}_{layer}": tensor for name, tensor in tensors.items()}


def write_clt(clt: "PreTrainedModel", folder: Path, is_main_process: bool) -> CLTConfig | None:
    """Writes a CLT's release; its configuration in the process that wrote it, None in others."""
    layers = (released_layer(clt, layer) for layer in range(clt.config.num_layers))
    if clt.shard is not None and clt.shard.rank > 0:
        for _ in layers:  # this process's slices go to the first
            pass
        return None
    if not is_main_process:
        return None
    config = copy.deepcopy(clt.config)
    if clt.mean_in is not None and folding.scales_untie(config, clt.std_out):
        config.decoder_tying, config.trained_decoder_tying = "none", "per_source"
    config.dtype = str(clt.dtype).removeprefix("torch.")
    config.architectures = [type(clt).__name__]
    write_release(folder, config, layers)
    return config


def load_slices(
    cls: "type[PreTrainedModel]",
    folder: Path,
    config: CLTConfig,
    shard: FeatureShard | None,
    name: str,
    lazy: bool,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> "PreTrainedModel | tuple[PreTrainedModel, dict]":
    """A CLT of which only the rows of `shard` are read, or, with `lazy`, none before they are used."""
    with_info = kwargs.pop("output_loading_info", False)
    given = [argument for argument, value in {**kwargs, "lazy": lazy and shard is not None}.items() if value]
    if given:
        raise ValueError(
            f"{given[0]} is given with {'shard' if shard is not None else 'lazy=True'}, which reads the files as they "
            "are, onto the CPU; leave out one of the two"
        )
    rows = rows_of(shard, config.num_features)
    check_files(folder, config, rows)
    if lazy:
        check_lazy(folder, dtype)
    with torch.device("meta"):
        clt = cls(config, shard=shard)
    fill(clt, read_state(folder, config, rows, dtype=None if lazy else wanted_dtype(config, dtype)), name)
    if lazy:
        untied = config.decoder_tying == "none"
        in_files = ("encoders.", "decoders.") if untied else "encoders."
        check_mapped({n: w for n, w in clt.named_parameters() if n.startswith(in_files) and n.endswith(".weight")})
        clt.requires_grad_(False)
        clt.lazy = True
        for decoder in clt.decoders:
            decoder.in_file = untied
    else:
        check_half_range(clt)
    info = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
    return (clt, info) if with_info else clt


def fill(clt: "PreTrainedModel", state: dict[str, Tensor], name: str) -> None:
    """Gives a CLT without weights those of `state`, which has all of them, and the `name` that it was loaded by."""
    clt.load_state_dict(state, assign=True)
    clt.config.name_or_path = clt.name_or_path = name
    clt.config.dtype = clt.dtype
    clt.eval()


def with_weights(clt: "PreTrainedModel", state_dict: dict[str, Tensor]) -> "PreTrainedModel":
    """A CLT as `clt` that holds the given weights, and statistics where there are some."""
    with torch.device("meta"):
        other = type(clt)(copy.deepcopy(clt.config), clt.shard)
    for name in folding.STATISTICS:
        setattr(other, name, state_dict.get(name))
    other.load_state_dict(state_dict, assign=True)
    return other


def check_half_range(clt: "PreTrainedModel") -> None:
    """Raises ValueError if a weight in float16 is not finite."""
    for name, weight in clt.named_parameters():
        if weight.dtype == torch.float16 and not weight.isfinite().all():
            name = name.replace("decoders.", "W_dec_").removesuffix(".weight")
            raise ValueError(f"{name} exceeds float16, which ends at 65,504; load the CLT in bfloat16 or float32")


def save(
    clt: "PreTrainedModel",
    save_directory: str | Path,
    is_main_process: bool,
    state_dict: dict[str, Tensor] | None,
    push_to_hub: bool,
    safe_serialization: bool = True,
    variant: str | None = None,
    distributed_checkpoint: bool = False,
    **kwargs: Any,
) -> None:
    """Writes a release and its card, and pushes it on demand; see [`CrossLayerTranscoder.save_pretrained`]."""
    folder = Path(save_directory).expanduser()
    if not safe_serialization or variant is not None or distributed_checkpoint:
        raise ValueError(
            f"safe_serialization={safe_serialization}, variant={variant!r}, distributed_checkpoint="
            f"{distributed_checkpoint}: a CLT is saved in safetensors files with fixed names; leave these out"
        )
    for name in ("max_shard_size", "save_function", "save_peft_format", "save_original_format"):
        kwargs.pop(name, None)  # a CLT has a file for each layer and half of it
    if not push_to_hub:
        kwargs.pop("token", None)
        if kwargs:
            raise TypeError(f"save_pretrained has no argument {next(iter(kwargs))!r}")
    if state_dict is not None:
        clt = with_weights(clt, state_dict)
    if folder.is_file():
        raise ValueError(f"save_directory={str(folder)!r} is a file; give a folder")
    if clt.shard is not None and push_to_hub:
        raise ValueError("push_to_hub=True on a CLT with a shard of the features; save it and push the folder")
    config = write_clt(clt, folder, is_main_process)
    if config is not None:
        from .hub.card import circuit_tracer_gaps, save_model_card

        save_model_card(folder, config)
        for gap in circuit_tracer_gaps(config):
            logger.warning("circuit-tracer cannot express %s; hf_clt loads the CLT as it is", gap)
        if push_to_hub:
            clt.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)


def load(
    cls: "type[PreTrainedModel]",
    read_whole: Callable,
    name: str,
    config: CLTConfig | None,
    lazy: bool,
    layers: list[int] | None,
    shard: FeatureShard | None,
    *args: Any,
    **kwargs: Any,
) -> "PreTrainedModel | tuple[PreTrainedModel, dict]":
    """
    Finds, checks and reads a CLT; see [`CrossLayerTranscoder.from_pretrained`]. `read_whole` is that of
    `PreTrainedModel`, for what is neither lazy nor a part.
    """
    from .download import HUB_ARGUMENTS, find_folder

    hub = {argument: kwargs.pop(argument) for argument in HUB_ARGUMENTS if argument in kwargs}
    folder = find_folder(name, kwargs.pop("subfolder", None) or "", layers, **hub)
    overrides = {field: kwargs.pop(field) for field in CLT_CONFIG_HELP if field in kwargs}
    if config is not None and overrides:
        raise ValueError(f"{next(iter(overrides))} is given beside config=; set it in the configuration instead")
    if config is None:
        config = read_config(folder, overrides)
    if lazy or layers is not None or shard is not None:
        for argument in ("_from_auto", "adapter_kwargs", "trust_remote_code"):  # which AutoModel adds
            kwargs.pop(argument, None)
    if layers is not None:
        from .partial_clt import load_layers

        return load_layers(folder, config, layers, name, lazy=lazy, shard=shard, **kwargs)
    if lazy or shard is not None:
        return load_slices(cls, folder, config, shard, name, lazy, **kwargs)
    check_files(folder, config)
    loaded = read_whole(None, *args, config=config, state_dict=read_state(folder, config), **kwargs)
    clt = loaded[0] if isinstance(loaded, tuple) else loaded
    clt.config.name_or_path = clt.name_or_path = name
    check_half_range(clt)
    return loaded
