"""
Reads cross-layer and per-layer transcoders as several trainers save them, and converts them into those of `hf_clt` and
circuit-tracer.

| format | what it is | read by |
|---|---|---|
| `hf_clt` | the files of `hf_clt.release` | `circuit_tracer.py` |
| `circuit-tracer` | the same tensors, no `config.json` | `circuit_tracer.py` |
| `circuit-tracer-plt` | one file per layer, a transcoder each | `circuit_tracer_plt.py` |
| `crosslayer-coding` | one flat file, pairs of layers | `crosslayer_coding.py` |
| `clt-forge` | one file, stacked layers | `clt_forge.py` |
| `gemma-scope-2` | one file per layer, google/gemma-scope-2-* `clt/` | `gemma_scope_2.py` |

A format's module says in its docstring what the files hold and where that is known from. Its `read(path, **options)`
compares the names and shapes of all tensors with what the format needs, from the headers of the files alone, and
returns the configuration and an iterator over the layers: a layer is read when it is asked for, so that one at a time
is in memory. It raises on whatever would change the function: an unknown tensor, an activation function that depends
on the batch, statistics that are missing. Only safetensors files are read, never a pickle. Tensors are taken bit by
bit where the format needs no arithmetic. Statistics are folded in float64. θ lives as log θ in a model, so that it
comes back to 1e-6 relative.
"""

import copy
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from .. import release as files
from ..configuration_clt import CLTConfig
from ..hub.card import circuit_tracer_gaps, save_model_card
from ..modeling_clt import CrossLayerTranscoder
from . import circuit_tracer, circuit_tracer_plt, clt_forge, crosslayer_coding, gemma_scope_2
from .shared import Checkpoint, build_clt, read_header, read_settings


logger = logging.getLogger(__name__)

RELEASES = ("hf_clt", "circuit-tracer")  # one set of files
WRITTEN = (*RELEASES, "circuit-tracer-plt")
FORMATS = {
    "hf_clt": circuit_tracer,
    "circuit-tracer": circuit_tracer,
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
            raise ValueError(f"{path} is no safetensors file, and nothing else is read: a pickle can run code")
        names = set(read_header(path))
        candidates = {
            "crosslayer-coding": crosslayer_coding.is_checkpoint(names),
            "clt-forge": names >= clt_forge.NAMES,
        }
    else:
        names = {entry.name for entry in path.iterdir()}
        config = read_settings(path / "config.json") if "config.json" in names else {}
        described = read_settings(path / "config.yaml") if "config.yaml" in names else {}
        candidates = {
            "hf_clt": config.get("model_type") == CLTConfig.model_type,
            "circuit-tracer": "W_enc_0.safetensors" in names,
            "circuit-tracer-plt": "layer_0.safetensors" in names or described.get("model_kind") == "transcoder_set",
            "gemma-scope-2": any(path.glob(gemma_scope_2.LAYER_FILE.format("*"))),
            "clt-forge": any(path.glob("*" + clt_forge.WEIGHTS)),
            "crosslayer-coding": crosslayer_coding.find_checkpoints(path),
        }
    for format, fits in candidates.items():
        if fits:
            return format
    held = ", ".join(sorted(names)[:6]) or "nothing"
    raise ValueError(f"{path} is in none of the formats {', '.join(FORMATS)}; it holds {held}")


def read_clt(path: str | Path, format: str | None = None, **options: Any) -> Checkpoint:
    """
    Opens a checkpoint in any of `FORMATS`.

    Args:
        path: A folder, or the file of a format that has a single one.
        format: One of `FORMATS`; recognised if left out.
        options: What the `read` of the format's module takes; None counts as left out.

    Returns:
        The configuration, and an iterator over one dict per layer with the tensors that
        [`hf_clt.release.write_release`] takes.

    Raises:
        FileNotFoundError: For a missing file.
        ValueError: For an unknown format, an option that is not for it, a missing, unknown or wrongly shaped tensor, a
            negative threshold, or what `hf_clt` cannot express.
    """
    format, options = resolve_format(path, format, options)
    return FORMATS[format].read(Path(path).expanduser(), **options)


def import_clt(path: str | Path, format: str | None = None, **options: Any) -> CrossLayerTranscoder:
    """
    A [`CrossLayerTranscoder`] from a checkpoint in any of `FORMATS`; arguments as for [`read_clt`]. With
    `format="circuit-tracer"` or `"hf_clt"` it can be a repository on the Hub too.
    """
    format, options = resolve_format(path, format, options)
    if format in RELEASES:
        return CrossLayerTranscoder.from_pretrained(path, **options)
    return build_clt(*FORMATS[format].read(Path(path).expanduser(), **options))


def convert(
    source: str | Path,
    output: str | Path,
    from_format: str | None = None,
    to_format: str = "hf_clt",
    overwrite: bool = False,
    **options: Any,
) -> tuple[str, CLTConfig, list[Path]]:
    """
    Converts a checkpoint, one layer at a time. The files are written into a folder beside the output and moved there
    when all of them are complete.

    Args:
        source: A folder, or the file of a format that has a single one.
        output: Folder to write to; created if missing.
        from_format: Format of the source, one of `FORMATS`; recognised if left out.
        to_format: Format of the output, one of `WRITTEN`.
        overwrite: Whether the output may hold files already. Those of the same names are replaced, and files of layers
            that the CLT has not are removed; all others stay.
        options: Passed to [`read_clt`].

    Returns:
        The source's format, the configuration of the CLT that was read, and the paths of the files that were written.

    Raises:
        FileNotFoundError, ValueError: As [`read_clt`], and for an output that holds files or cannot express the CLT.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    if to_format not in WRITTEN:
        raise ValueError(f"to_format={to_format!r} is none of {', '.join(WRITTEN)}; give one of them")
    from_format, options = resolve_format(source, from_format, options)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()):
        if output.resolve() in (source.resolve(), source.resolve().parent):
            raise ValueError(f"output={str(output)!r} is where the source lies; give another folder")
        if not overwrite:
            raise ValueError(f"output={str(output)!r} is not empty; give another folder, or overwrite")
        if foreign := files.foreign_files(output) if to_format in RELEASES else []:
            raise ValueError(f"{foreign[0]} is no file of a CLT; give another folder than output={str(output)!r}")
    config, layers = FORMATS[from_format].read(source, **options)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        if to_format in RELEASES:
            written_config = copy.deepcopy(config)
            if to_format == "circuit-tracer":
                written_config, layers = circuit_tracer.with_full_reach(written_config, layers)
            written_config.architectures = [CrossLayerTranscoder.__name__]
            files.write_release(Path(temporary), written_config, layers)
        else:
            circuit_tracer_plt.write(Path(temporary), config, layers)
        output.mkdir(exist_ok=True)
        written = []
        for path in sorted(Path(temporary).iterdir()):
            written.append(output / path.name)
            os.replace(path, written[-1])
    # readers count the layers by these files
    if to_format in RELEASES:
        files.remove_weights(output, first_layer=config.num_layers)
        written.append(save_model_card(output, written_config))
        for gap in circuit_tracer_gaps(written_config):
            logger.warning("circuit-tracer cannot express %s; hf_clt loads the CLT as it is", gap)
    else:
        layer = config.num_layers
        while (stale := output / circuit_tracer_plt.LAYER_FILE.format(layer)).is_file():
            stale.unlink()
            layer += 1
    return from_format, config, written


def resolve_format(path: str | Path, format: str | None, options: dict) -> tuple[str, dict]:
    """The format, and the options that are set; raises ValueError for one that is not for this format."""
    format = detect_format(path) if format is None else format
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none of {', '.join(FORMATS)}; leave it out to have it recognised")
    options = {name: value for name, value in options.items() if value is not None}
    for name, owner in OPTIONS.items():
        if name in options and format != owner:
            raise ValueError(f"{name} is for {owner}, but {path} is read as {format}; leave out {name}")
    return format, options


__all__ = ["FORMATS", "WRITTEN", "convert", "detect_format", "import_clt", "read_clt"]
