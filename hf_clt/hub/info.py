"""What a CLT is, from its small files alone, in a folder or on the Hub: weights are neither read nor downloaded."""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants

from ..configuration_clt import TOPK_FAMILY
from ..download import download
from ..files import format_size
from ..release import (
    CIRCUIT_TRACER_FILE,
    INDEX_FILE,
    WEIGHT_FILE,
    config_from_headers,
    read_config,
)
from .card import SCALARS, count_parameters
from .facts import FACTS_FILE, read_facts
from .plots import PLOTS, PLOTS_FOLDER
from .report import format_metrics_table, read_history


SMALL_FILES = ("config.json", CIRCUIT_TRACER_FILE, INDEX_FILE, FACTS_FILE, "README.md")


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
        evaluation returned, and `measured`, from where it is, both None where nothing was measured; `training`, the
        facts of the run that are known.

    Raises:
        FileNotFoundError: If there is no such folder or CLT.
        OSError: If there is no such repository or revision, it may not be read, or cannot be reached.
        ValueError: If what is there is no CLT.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        found = _in_folder(folder / subfolder)
    elif folder.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"{name}: there is no such folder; give a CLT's folder or its name on the Hub")
    else:
        found = _on_hub(name, revision, subfolder, token)
    return {"name": name} | found


def _in_folder(folder: Path) -> dict:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; give a CLT's folder or its name on the Hub")
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    if not (folder / "config.json").is_file() and checkpoints:
        raise FileNotFoundError(
            f"{folder} holds no finished CLT, only {', '.join(checkpoints)}; go on training with "
            "--resume-from-checkpoint latest"
        )
    paths = [*folder.iterdir(), *(folder / PLOTS_FOLDER).glob("*")]
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    files = {name: (folder / name).stat().st_size for name in names if _is_of_release(name)}
    return {
        "config": read_config(folder, {}),
        "files": files,
        "complete": True,
        "commit": None,
        **_measured(folder),
    }


def _on_hub(name: str, revision: str | None, subfolder: str, token: str | None) -> dict:
    api = HfApi(token=token, library_name="hf_clt")
    prefix = f"{subfolder}/" if subfolder else ""
    snapshot = download(name, [prefix + file for file in SMALL_FILES], {"revision": revision, "token": token})
    folder = snapshot / subfolder
    complete = not constants.is_offline_mode()
    if complete:
        info = api.model_info(name, revision=revision, files_metadata=True)
        files = {file.rfilename: file.size for file in info.siblings}
        commit = info.sha
    else:
        files = {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in snapshot.rglob("*")}
        commit = snapshot.name
    files = {
        file.removeprefix(prefix): size
        for file, size in files.items()
        if file.startswith(prefix) and _is_of_release(file.removeprefix(prefix))
    }
    if (folder / "config.json").is_file():
        config = read_config(folder, {})
    else:  # circuit-tracer's files alone, of which the headers of two say what the CLT is
        if not complete:
            raise FileNotFoundError(f"{name} has no config.json, and its weights' headers cannot be read offline")

        def header_of(file):
            header = api.parse_safetensors_file_metadata(name, prefix + file, revision=revision)
            return {tensor: (tuple(info.shape), info.dtype) for tensor, info in header.tensors.items()}

        config = config_from_headers(name, folder, files, header_of, {})
    return {"config": config, "files": files, "complete": complete, "commit": commit, **_measured(folder)}


def _is_of_release(name: str) -> bool:
    shown = name.removeprefix(f"{PLOTS_FOLDER}/") in [plot for plot, _, _ in PLOTS]
    return shown or ("/" not in name and (name in SMALL_FILES or name.endswith((".safetensors", ".py"))))


def _measured(folder: Path) -> dict:
    """The metrics in a folder: of the file beside the card, else of the run's last evaluation, else of the card."""
    nothing = {"metrics": None, "measured": None, "training": None}
    facts = read_facts(folder)
    if facts is not None:
        metrics = facts.get("metrics")
        return {"metrics": metrics, "measured": FACTS_FILE if metrics else None, "training": facts.get("training")}
    for row in reversed(read_history(folder)):
        if "num_tokens" in row:
            return nothing | {"metrics": row, "measured": f"metrics.jsonl, step {row['step']:,}"}
    path = folder / "README.md"
    results = (ModelCard.load(path).data.eval_results or []) if path.is_file() else []
    metrics = {result.metric_type: result.metric_value for result in results}
    counts = [result.dataset_args["num_tokens"] for result in results if "num_tokens" in (result.dataset_args or {})]
    if not metrics:
        return nothing
    return nothing | {"metrics": metrics | ({"num_tokens": counts[0]} if counts else {}), "measured": "model card"}


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
    weights = [size for file, size in files.items() if file.endswith(".safetensors")]
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
        lines += ["", "No measurement is with it; `hf-clt evaluate` makes one."]
    else:
        lines += ["", f"measured ({found['measured']}):", _metrics_text(metrics)]
    lines += ["", "files" + ("" if found["complete"] else " (offline: those that are in the cache)")]
    lines += [f"  {size:>10}  {file}" for size, file in _grouped(files)]
    return "\n".join(lines)


def _metrics_text(metrics: dict) -> str:
    text = []
    if any(metrics.get(f"{name}_per_layer") is not None for name in ("nmse", "l0")):
        text.append(format_metrics_table(metrics))
        shown = [row for row in SCALARS if row[0] not in ("nmse", "explained_variance", "l0", "dead_fraction")]
    else:
        shown = SCALARS
    for name, spec, meaning in shown:
        if metrics.get(name) is not None:
            text.append(f"{name} {metrics[name]:{spec}} ({meaning})")
    return "\n".join(text)


def _grouped(files: dict[str, int]) -> list[tuple[str, str]]:
    """Size and name of each file; a line for all encoders, and one for all decoders."""
    rows, layers = [], {}
    for file, size in sorted(files.items()):
        match = WEIGHT_FILE.fullmatch(file)
        if match is None:
            rows.append((format_size(size), file))
        else:
            layers.setdefault(match[1], []).append((int(match[2]), size))
    for kind, found in layers.items():
        numbers = sorted(number for number, _ in found)
        whole = numbers == list(range(numbers[0], numbers[-1] + 1))
        which = f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(map(str, numbers))
        rows.append((format_size(sum(size for _, size in found)), f"W_{kind}_N.safetensors, N = {which}"))
    return rows


__all__ = ["describe_clt", "format_info"]
