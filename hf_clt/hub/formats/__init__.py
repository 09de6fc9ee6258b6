"""
Reads and writes cross-layer and per-layer transcoders as several trainers save them, and converts between them.

| format | what it is | its facts |
|---|---|---|
| `hf_clt` | the files of `hf_clt.checkpoint_format` | `own.py` |
| `circuit-tracer` | the same tensors, no `config.json` | `own.py` |
| `circuit-tracer-plt` | one file per layer, a transcoder each | `circuit_tracer_plt.py` |
| `crosslayer-coding` | one flat file, pairs of layers | `crosslayer_coding.py` |
| `clt-forge` | one file, stacked layers | `clt_forge.py` |
| `gemma-scope-2` | one file per layer, google/gemma-scope-2-* `clt/` | `gemma_scope_2.py` |

A format's module says in its docstring what the files hold and where that is known from, and has two functions.

`read(path, **options)` compares the names and shapes of all tensors with what the format needs, from the headers of
the files alone, and returns the configuration and an iterator over the layers: a layer is read when it is asked for,
so that one at a time is in memory. It raises on whatever would change the function: an unknown tensor, an activation
function that depends on the batch, statistics that are missing. Only safetensors files are read, never a pickle.
Tensors are taken bit by bit where the format needs no arithmetic. Statistics are folded in float64. θ lives as log θ
in a model, so that it comes back to 1e-6 relative.

`write(folder, config, layers)` takes what `read` returns. What another format computes is what the CLT computes in
eval mode: a batchtopk CLT becomes a jumprelu one at its running thresholds, relu becomes jumprelu with θ = 0 where a
format has no relu, tied decoders are written out, and a decoder that a reach below L leaves out is written as zeros.
What a format cannot express raises before anything is written.
"""

import copy
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ... import checkpoint_format as files
from ...configuration_clt import CLTConfig
from ...modeling_clt import CrossLayerTranscoder
from ..card_files import save_model_card
from ..model_card import circuit_tracer_gaps
from . import circuit_tracer_plt, clt_forge, crosslayer_coding, gemma_scope_2, own
from .shared import Checkpoint, build_clt, file_numbers, read_header, read_json, read_yaml, some


logger = logging.getLogger(__name__)

FORMATS = {
    "hf_clt": own,
    "circuit-tracer": own,
    "circuit-tracer-plt": circuit_tracer_plt,
    "crosslayer-coding": crosslayer_coding,
    "clt-forge": clt_forge,
    "gemma-scope-2": gemma_scope_2,
}
OPTIONS = {"norm_stats": "crosslayer-coding", "drop_acausal": "gemma-scope-2"}  # those that a single format has


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
        names = set(read_header(path))
        if crosslayer_coding.is_checkpoint(names):
            return "crosslayer-coding"
        if clt_forge.is_checkpoint(names):
            return "clt-forge"
        raise ValueError(f"{path} is in none of the formats {', '.join(FORMATS)}: it holds {some(names)}")
    names = {entry.name for entry in path.iterdir()}
    if "config.json" in names and read_json(path / "config.json").get("model_type") == CLTConfig.model_type:
        return "hf_clt"
    if "W_enc_0.safetensors" in names:
        return "circuit-tracer"
    described = read_yaml(path / files.CIRCUIT_TRACER_FILE) if files.CIRCUIT_TRACER_FILE in names else {}
    if circuit_tracer_plt.LAYER_FILE.format(0) in names or described.get("model_kind") == "transcoder_set":
        return "circuit-tracer-plt"
    if file_numbers(path, gemma_scope_2.LAYER_FILE):
        return "gemma-scope-2"
    if clt_forge.WEIGHTS in names or file_numbers(path, clt_forge.SHARD):
        return "clt-forge"
    if crosslayer_coding.find_checkpoints(path):
        return "crosslayer-coding"
    raise ValueError(
        f"{path} is in none of the formats {', '.join(FORMATS)}: it holds {some(names)}; give the folder or file of "
        "the weights themselves"
    )


def read_clt(path: str | Path, format: str | None = None, **options) -> Checkpoint:
    """
    Opens a checkpoint in any of `FORMATS`.

    Args:
        path: A folder, or the file of a format that has a single one.
        format: One of `FORMATS`; recognised if left out.
        options: What the `read` of the format's module takes; None counts as left out.

    Returns:
        The configuration, and an iterator over one dict per layer with the tensors that
        [`hf_clt.checkpoint_format.write_release`] takes.

    Raises:
        ValueError: For an unknown format, or an option that it has not.
    """
    format = detect_format(path) if format is None else format
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none of {', '.join(FORMATS)}; leave it out to have it recognised")
    return FORMATS[format].read(path, **_set_options(path, format, options))


def write_clt(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]], format: str) -> CLTConfig:
    """
    Writes a checkpoint in any of `FORMATS`.

    Args:
        folder: Where to; created if missing.
        config: The configuration.
        layers: One dict per layer, as [`read_clt`] gives them.
        format: One of `FORMATS`.

    Returns:
        The configuration of what is written: for circuit-tracer, decoders reach the last layer.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none of {', '.join(FORMATS)}; give one of them")
    if format == "circuit-tracer":
        config, layers = own.with_full_reach(config, layers)
    FORMATS[format].write(folder, config, layers)
    return config


def import_clt(path: str | Path, format: str | None = None, **options) -> CrossLayerTranscoder:
    """
    A [`CrossLayerTranscoder`] from a checkpoint in any of `FORMATS`; arguments as for [`read_clt`]. With
    `format="circuit-tracer"` or `"hf_clt"` it can be a repository on the Hub too.
    """
    format = detect_format(path) if format is None else format
    if FORMATS.get(format) is own:
        return CrossLayerTranscoder.from_pretrained(path, **_set_options(path, format, options))
    return build_clt(*read_clt(path, format, **options))


def export_clt(clt: CrossLayerTranscoder, folder: str | Path, format: str) -> None:
    """Writes a model in any of `FORMATS`, with its statistics folded in; the live model is left as it is."""
    folder = Path(folder).expanduser()
    whole = clt.config.reach == clt.config.num_layers
    if format == "hf_clt" or (format == "circuit-tracer" and whole):
        clt.save_pretrained(folder)
        return
    config = copy.deepcopy(clt.config)
    config.dtype = str(clt.dtype).removeprefix("torch.")
    layers = (clt.released_layer(layer) for layer in range(config.num_layers))
    write_clt(folder, config, layers, format)
    _remove_other_layers(folder, format, config.num_layers)


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
        if foreign := files.foreign_files(output) if FORMATS[to_format] is own else []:
            raise ValueError(f"{foreign[0]} is no file of a CLT; give another folder than output={str(output)!r}")
    config, layers = read_clt(source, from_format, **options)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        written_config = write_clt(temporary, config, layers, to_format)
        output.mkdir(exist_ok=True)
        written = []
        for path in sorted(Path(temporary).iterdir()):
            written.append(output / path.name)
            os.replace(path, written[-1])
    _remove_other_layers(output, to_format, config.num_layers)
    if FORMATS[to_format] is own:
        written.append(save_model_card(output, written_config))
        for gap in circuit_tracer_gaps(written_config):
            logger.warning("circuit-tracer cannot express %s; hf_clt loads the CLT as it is", gap)
    return from_format, config, written


def _set_options(path: str | Path, format: str, options: dict) -> dict:
    """The options that are set; raises ValueError for one that the format has not."""
    options = {name: value for name, value in options.items() if value is not None}
    for name, owner in OPTIONS.items():
        if name in options and format != owner:
            raise ValueError(f"{name} is for {owner}, but {path} is read as {format}; leave out {name}")
    return options


def _remove_other_layers(folder: Path, format: str, num_layers: int) -> None:
    """Removes files of layers that the CLT has not: readers count the layers by these files."""
    module = FORMATS[format]
    if module is own:
        files.remove_weights(folder, first_layer=num_layers)
    elif module in (circuit_tracer_plt, gemma_scope_2):
        layer = num_layers
        while (stale := folder / module.LAYER_FILE.format(layer)).is_file():
            stale.unlink()
            layer += 1


__all__ = ["FORMATS", "convert", "detect_format", "export_clt", "import_clt", "read_clt", "write_clt"]
