"""What a CLT is, from its small files alone, in a folder or on the Hub: weights are neither read nor downloaded."""

from pathlib import Path

from huggingface_hub import HfApi, constants

from .. import release
from ..configuration_clt import TOPK_FAMILY
from ..download import download, find_folder
from ..files import format_number, format_size
from ..release import WEIGHT_FILE, config_from_headers, read_config
from .card import SCALARS, count_parameters
from .facts import FACTS_FILE, read_facts
from .plots import PLOTS, PLOTS_FOLDER
from .report import TABLE_COLUMNS, format_metrics_table


SMALL_FILES = (*release.SMALL_FILES, FACTS_FILE, "README.md")


def describe_clt(name: str, revision: str | None = None, subfolder: str = "", token: str | None = None) -> dict:
    """
    Args:
        name (`str`): Folder of a CLT, or its repository on the Hub.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        subfolder (`str`, *optional*): Where in there the CLT is.
        token (`str`, *optional*): Defaults to the stored one.

    Returns:
        `dict`: `name`; `config` ([`CLTConfig`]); `files`, file name -> bytes; `complete`, False where there is no
        connection and only the files in the cache are known; `commit`, None for a folder; `metrics`, what an
        evaluation returned, and `training`, the known facts of the run: each None where `metrics.json` has none.

    Raises:
        FileNotFoundError: If there is no such folder or CLT.
        OSError: If there is no such repository or revision, it may not be read, or cannot be reached.
        ValueError: If what is there is no CLT.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() or folder.is_absolute() or name.startswith((".", "~")):
        found = _in_folder(find_folder(name, subfolder))
    else:
        found = _on_hub(name, revision, subfolder, token)
    facts = read_facts(found.pop("folder")) or {}
    return {"name": name, **found, "metrics": facts.get("metrics"), "training": facts.get("training")}


def _in_folder(folder: Path) -> dict:
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    if not (folder / "config.json").is_file() and checkpoints:
        raise FileNotFoundError(
            f"{folder} holds no finished CLT, only {', '.join(checkpoints)}; go on training with "
            "--resume-from-checkpoint latest"
        )
    files = _release_sizes(_sizes_in(folder, "*") | _sizes_in(folder, f"{PLOTS_FOLDER}/*"))
    return {"folder": folder, "config": read_config(folder, {}), "files": files, "complete": True, "commit": None}


def _on_hub(name: str, revision: str | None, subfolder: str, token: str | None) -> dict:
    api = HfApi(token=token, library_name="hf_clt")
    prefix = f"{subfolder}/" if subfolder else ""
    snapshot = download(name, [prefix + file for file in SMALL_FILES], {"revision": revision, "token": token})
    folder, complete = snapshot / subfolder, not constants.is_offline_mode()
    if complete:
        info = api.model_info(name, revision=revision, files_metadata=True)
        sizes, commit = {file.rfilename: file.size for file in info.siblings}, info.sha
    else:
        sizes, commit = _sizes_in(snapshot, "**/*"), snapshot.name
    files = _release_sizes({f.removeprefix(prefix): size for f, size in sizes.items() if f.startswith(prefix)})

    def header_of(file: str) -> dict:
        if not complete:
            raise FileNotFoundError(f"{name} has no config.json, and its weights' headers cannot be read offline")
        header = api.parse_safetensors_file_metadata(name, prefix + file, revision=revision)
        return {tensor: (tuple(info.shape), info.dtype) for tensor, info in header.tensors.items()}

    if (folder / "config.json").is_file():
        config = read_config(folder, {})
    else:  # circuit-tracer's files alone
        config = config_from_headers(name, folder, files, header_of, {})
    return {"folder": folder, "config": config, "files": files, "complete": complete, "commit": commit}


def _sizes_in(folder: Path, pattern: str) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.glob(pattern) if path.is_file()
    }


def _release_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """The files of a release among others."""
    names = [*SMALL_FILES, *(f"{PLOTS_FOLDER}/{file}" for file, _, _ in PLOTS)]
    return {file: size for file, size in sizes.items() if file in names or WEIGHT_FILE.fullmatch(file)}


def format_info(found: dict) -> str:
    """What [`describe_clt`] found, as plain text."""
    config, files = found["config"], found["files"]
    kind = "CLT" if config.reach == config.num_layers else f"CLT of reach {config.reach}"
    lines = [f"{found['name']}" + (f" at commit {found['commit'][:12]}" if found["commit"] else "")]
    lines.append(
        f"{config.activation_fn} {kind} of {config.base_model_name_or_path or 'an unnamed model'}: "
        f"{config.num_layers} layers, width {config.d_model:,}, {config.num_features:,} features per layer"
    )
    lines.append(f"from {config.feature_input_hook} to {config.feature_output_hook}")
    if config.activation_fn in TOPK_FAMILY:
        lines[-1] += f", k = {config.k:,} per {'layer and token' if config.k_scope == 'layer' else 'layer, shared'}"
    if config.decoder_tying != "none":
        lines[-1] += f", decoders tied {config.decoder_tying.replace('_', ' ')}"
    if config.skip_connection:
        lines[-1] += ", with a skip connection"
    weights = [size for file, size in files.items() if WEIGHT_FILE.fullmatch(file)]
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype is not None else "float32"
    lines.append(
        f"{count_parameters(config):,} weights in {dtype}: {format_size(sum(weights))} in {len(weights)} files"
    )
    training = found["training"] or {}
    if training.get("tokens"):
        steps = f" in {training['steps']:,} updates" if training.get("steps") else ""
        lines.append(f"trained on {training['tokens']:,} tokens{steps}")
    metrics = found["metrics"]
    if metrics is None:
        lines += ["", "No metrics; measure them with `hf-clt evaluate --update-card`."]
    else:
        lines += ["", "measured:", _metrics_text(metrics)]
    lines += ["", "files" + ("" if found["complete"] else " (offline: those that are in the cache)")]
    lines += [f"  {format_size(size):>10}  {file}" for size, file in _group_files(files)]
    return "\n".join(lines)


def _metrics_text(metrics: dict) -> str:
    lines, in_table = [], ()
    if metrics.get("nmse_per_layer") is not None or metrics.get("l0_per_layer") is not None:
        lines, in_table = [format_metrics_table(metrics)], [name for _, name, _ in TABLE_COLUMNS]
    for name, spec, meaning in SCALARS:
        if metrics.get(name) is not None and name not in in_table:
            lines.append(f"{name} {format_number(metrics[name], spec)} ({meaning})")
    return "\n".join(lines)


def _group_files(files: dict[str, int]) -> list[tuple[int, str]]:
    """Size and name of each file; all encoders are one line, and all decoders."""
    weights = {"enc": {}, "dec": {}}
    for file, size in files.items():
        if match := WEIGHT_FILE.fullmatch(file):
            weights[match[1]][int(match[2])] = size
    rows = [(size, file) for file, size in sorted(files.items()) if not WEIGHT_FILE.fullmatch(file)]
    for kind, sizes in weights.items():
        if sizes:
            layers = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"{min(sizes)}"
            rows.append((sum(sizes.values()), f"W_{kind}_N.safetensors, N = {layers}, {len(sizes)} files"))
    return rows
