"""
Checkpoints: what resuming needs, in safetensors and JSON, never half written.

`checkpoint-<step>/` holds `model.safetensors` (weights and statistics as they live in the model, not folded),
`optimizer.safetensors`, `trainer.safetensors` (feature counters), `state.json`, and per process the position in the
text, the buffer and the random state in `rank-<r>.safetensors` and `rank-<r>.json`. Another number of processes can go
on from it: see `own_from_others`.

Where n processes share the features of one CLT, each writes its slice of the first three, as
`model-00001-of-0000n.safetensors` and so on. Any number of processes can read them, each its own slice.

Every folder with such a name is whole: it gets the name when all of it is on the disk, and loses it before it is
deleted. A checkpoint that is written again is `checkpoint-<step>.old` until the new one stands in its place. All other
names, which begin with a dot, are leftovers of a process that was killed.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..files import as_json
from ..harvest.dealing import deal_buffers
from ..sharding import FeatureShard, rows_of
from .optimizers import WideAdam, state_entries
from .processes import OtherProcessFailed, together, wait_for_all


logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)(\.old)?")
# Of checkpoints that were being written or deleted, of files of a release (files.replacing), and of
# safetensors, which itself writes under a temporary name.
LEFTOVER = re.compile(r"\.checkpoint-\d+(\.old)?\.tmp|\..+\.\d+\.tmp|\.tmp\w{6}")
ALL = slice(None)
SHARED = ("model", "optimizer", "trainer")  # what all processes agree on, or hold a slice of each


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, one for each step."""
    found = {}
    for path in sorted(Path(output_dir).glob("checkpoint-*")):  # checkpoint-5 comes before checkpoint-5.old
        if CHECKPOINT.fullmatch(path.name) and is_checkpoint(path):
            found.setdefault(step_of(path), path)
    return [found[step] for step in sorted(found)]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of ours, damaged perhaps; transformers' Trainer gives its own the same name."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except OSError:
        return any(path.glob("rank-*.json"))
    except ValueError:
        return True
    return isinstance(state, dict) and {"step", "num_processes"} <= state.keys()


def foreign_checkpoints(output_dir: Path) -> list[Path]:
    """Folders of others that are named as checkpoints are."""
    named = Path(output_dir).glob("checkpoint-*")
    return sorted(path for path in named if CHECKPOINT.fullmatch(path.name) and not is_checkpoint(path))


def step_of(checkpoint: Path) -> int:
    """The number of updates after which a checkpoint was written."""
    return int(CHECKPOINT.fullmatch(checkpoint.name)[1])


def newest_usable(output_dir: Path) -> str:
    """What a run that has to stop can say about going on."""
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return "there is no checkpoint to go on from"
    return f"{checkpoints[-1].name} is whole: continue with --resume-from-checkpoint latest"


def find_checkpoint(resume_from: str, output_dir: Path) -> Path:
    """
    The checkpoint that `--resume-from-checkpoint` means: a folder, or "latest" for the newest in `output_dir`.

    Raises:
        ValueError: If there is none.
    """
    if resume_from == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise ValueError(
                f"resume_from_checkpoint='latest', but output_dir={str(output_dir)!r} holds no checkpoint; "
                "leave the option out"
            )
        return checkpoints[-1]
    folder = Path(resume_from)
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint={resume_from!r} is no checkpoint folder (it has no state.json); give one named "
            'checkpoint-<step>, or "latest"'
        )
    return folder


def read_state(checkpoint: Path) -> dict:
    """`state.json` of a checkpoint; raises ValueError if it is missing or damaged."""
    return _read(checkpoint / "state.json")


def remove_checkpoints_after(output_dir: Path, step: int) -> None:
    """Deletes the checkpoints after `step`, which a run that goes on from there abandons."""
    for path in reversed(list_checkpoints(output_dir)):
        if step_of(path) > step:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint. It loses its name first: a process killed meanwhile leaves nothing that looks whole."""
    hidden = path.with_name(f".{path.name}.tmp")
    if hidden.exists():
        shutil.rmtree(hidden)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def remove_leftovers(output_dir: Path) -> None:
    """Deletes what a killed process left half written or half deleted. No other process may write to the folder."""
    for path in list(Path(output_dir).glob(".*")):
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in Path(output_dir).glob("checkpoint-*.old"):
        if CHECKPOINT.fullmatch(path.name) and path.with_suffix("").exists():  # the new one stands in its place
            remove_checkpoint(path)


def shared_file(name: str, rank: int, size: int) -> str:
    """The file with slice `rank` of `size` of the features."""
    return f"{name}.safetensors" if size == 1 else f"{name}-{rank + 1:05}-of-{size:05}.safetensors"


def save_checkpoint(
    output_dir: Path,
    step: int,
    shared: dict,
    own: dict,
    accelerator: Accelerator,
    keep: int | None,
    shard: FeatureShard | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> Path:
    """
    Writes `checkpoint-<step>` under a temporary name, flushes it to the disk, and renames it; then deletes old ones.

    Args:
        output_dir: The run's folder.
        step: Updates done.
        shared: What all processes agree on: name -> dict of tensors, written as `<name>.safetensors`, and "state", a
            JSON-able dict. Written by the main process; with `shard`, the tensors by each process of the first group.
        own: "values" (JSON-able) and "tensors" of this process.
        accelerator: For the rank and the barriers.
        keep: Number of checkpoints to keep; None for all.
        shard: The slice of the features that this process holds; None: all.
        given_up: Whether it must not get its name any more, which is asked when all is written.

    Returns:
        The folder.

    Raises:
        [`CheckpointError`]: If it cannot be written (a full disk, a folder that is read-only). What was written of it
            is deleted, and the checkpoints before it stay.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = Path(output_dir) / f".checkpoint-{step}.tmp"
    rank = accelerator.process_index
    size = 1 if shard is None else shard.size

    def begin():
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write():
        _write_tensors(temporary / f"rank-{rank}.safetensors", own["tensors"])
        _write_json(temporary / f"rank-{rank}.json", own["values"])
        if rank < size:
            for name, tensors in shared.items():
                if name != "state":
                    _write_tensors(temporary / shared_file(name, rank, size), tensors)
        if accelerator.is_main_process:
            _write_json(temporary / "state.json", shared["state"])
            if (metrics := final.with_name("metrics.jsonl")).exists():
                _sync_file(metrics)  # a run that goes on from here writes none of its lines again

    def finish():
        if given_up():
            raise CheckpointError("given up")
        if accelerator.is_main_process:
            _put_in_place(temporary, final)

    try:
        for part in (begin, write, finish):
            together(accelerator, part)
    except (OSError, SafetensorError, OtherProcessFailed) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{final.name} cannot be written to {str(output_dir)!r} ({reason}); {newest_usable(output_dir)}"
        ) from error
    if accelerator.is_main_process and keep is not None:
        for old in list_checkpoints(output_dir)[:-keep]:
            remove_checkpoint(old)
    wait_for_all(accelerator)
    return final


def load_checkpoint(
    folder: Path,
    rank: int,
    num_processes: int,
    shard: FeatureShard | None = None,
    per_feature: set[str] = frozenset(),
) -> tuple[dict, dict]:
    """
    Reads what `save_checkpoint` wrote.

    Args:
        folder: The checkpoint.
        rank: Which process this is.
        num_processes: How many there are.
        shard: The slice of the features to read; None: all. The checkpoint may have been written in another layout.
        per_feature: See [`load_shared`].

    Returns:
        `shared` and `own`, as given to `save_checkpoint`; `own` as [`own_from_others`] gives it, if there were more or
        fewer processes.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    shared = load_shared(folder, shard, per_feature)
    before = shared["state"].get("num_processes")
    if not isinstance(before, int) or before < 1:
        raise ValueError(
            f"{folder.name}/state.json says num_processes={before!r}, which is no number of processes; resume from "
            "another checkpoint"
        )
    if before == num_processes:
        return shared, _read_own(folder, rank)
    if rank == 0:
        logger.warning(
            "%s was written by %d processes, and %d go on: what lay in the buffers is shared out, and the text goes "
            "on where the slowest of them stood; about a buffer of each may be read twice, and nothing is left out",
            *(folder.name, before, num_processes),
        )
    every = [_read_own(folder, old_rank) for old_rank in range(before)]
    state = shared["state"]
    return shared, own_from_others(every, rank, num_processes, hash((state["args"]["seed"], state["step"], rank)))


def _read_own(folder: Path, rank: int) -> dict:
    return {"values": _read(folder / f"rank-{rank}.json"), "tensors": _read(folder / f"rank-{rank}.safetensors")}


def own_from_others(every: list[dict], rank: int, num_processes: int, seed: int) -> dict:
    """
    What process `rank` of `num_processes` has for its own, from what each of another number of processes had.

    Args:
        every: `own` of each old process, as given to `save_checkpoint`, by rank.
        rank: Which of the new processes this is.
        num_processes: How many they are.
        seed: Of its random state.

    Returns:
        `own` of this process. Sums since the last line of metrics are kept: of tokens in the first process, of losses,
        whose mean over the processes is logged, as that mean in each.
    """
    generator = torch.Generator().manual_seed(seed)
    buffers = [(own["values"]["buffer"], own["tensors"]) for own in every]
    buffer, tensors = deal_buffers(buffers, rank, num_processes, generator)
    tokens = sum(own["values"]["tokens_since_log"] for own in every)
    updates = every[0]["values"]["updates_since_log"]
    tensors["totals"] = torch.stack([own["tensors"]["totals"] for own in every]).mean(dim=0)
    tensors["torch_rng"] = generator.get_state()
    values = {"buffer": buffer, "tokens_since_log": tokens if rank == 0 else 0, "updates_since_log": updates}
    return {"values": values, "tensors": tensors}


def load_shared(folder: Path, shard: FeatureShard | None = None, per_feature: set[str] = frozenset()) -> dict:
    """
    The part of a checkpoint that does not depend on the number of processes, of which only a slice of the features is
    read.

    Args:
        folder: The checkpoint.
        shard: The slice of the features to read; None: all.
        per_feature: The parameters with a row per feature, see [`CrossLayerTranscoder.per_feature`]. Without it, a
            checkpoint is read in the layout in which it was written, of one process.

    Returns:
        `shared`, as given to `save_checkpoint`.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    state = _read(folder / "state.json")
    size = state.get("feature_parallel_size", 1)
    if size == 1 and shard is None:
        shared = {name: _read(folder / shared_file(name, 0, 1)) for name in SHARED}
    else:
        num_features = state["config"]["num_features"]
        rows = rows_of(shard, num_features)
        shared = {name: _read_slice(folder, name, size, num_features, rows, per_feature) for name in SHARED}
    return {**shared, "state": state}


def feature_axis(name: str, dim: int, per_feature: set[str]) -> int | None:
    """The axis of the features in a tensor of a checkpoint, of `dim` axes; None if it has none."""
    if name == "steps_since_fired":
        return 1
    return 0 if dim > 0 and name.partition(":")[0] in per_feature else None  # of a parameter or its optimizer state


def _read_slice(
    folder: Path, name: str, size: int, num_features: int, rows: slice, per_feature: set[str]
) -> dict[str, torch.Tensor]:
    """The features `rows` of what was written in `size` slices."""
    held = num_features // size
    parts = {}
    for rank in range(rows.start // held, (rows.stop - 1) // held + 1):
        inside = slice(max(rows.start - rank * held, 0), min(rows.stop - rank * held, held))
        path = folder / shared_file(name, rank, size)
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (no dict)
                    stored = file.get_slice(key)
                    axis = feature_axis(key, len(stored.get_shape()), per_feature)
                    if axis is not None:
                        part = stored[(ALL,) * axis + (inside,)]
                        parts.setdefault(key, []).append(part)
                    elif key not in parts:
                        parts[key] = [file.get_tensor(key)]
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
    tensors = {}
    for key, found in parts.items():
        axis = feature_axis(key, found[0].dim(), per_feature)
        tensors[key] = found[0] if len(found) == 1 else torch.cat(found, dim=axis)
    return tensors


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: `<parameter>:<entry>`; not copied, since not all processes write it."""
    return {
        f"{name}:{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """
    Restores what `optimizer_tensors` gave.

    Raises:
        ValueError: If they are of another optimizer.
    """
    parameters = dict(model.named_parameters())
    found, expected = {key.rpartition(":")[2] for key in tensors}, state_entries(optimizer)
    if tensors and found != expected:
        raise ValueError(
            f"the checkpoint's optimizer state is {', '.join(sorted(found))}, and this run's would be "
            f"{', '.join(sorted(expected))}; resume with the same --optimizer and --adam-beta1"
        )
    for key, value in tensors.items():
        name, _, entry = key.rpartition(":")
        if isinstance(optimizer, WideAdam):  # older versions kept moments in the weights' format
            value = value.float() if value.element_size() < 4 else value
        device = "cpu" if entry == "step" else parameters[name].device
        optimizer.state[parameters[name]][entry] = value.to(device, copy=True)


def _read(path: Path) -> dict:
    """A JSON or safetensors file of a checkpoint."""
    try:
        return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path.parent.name}/{path.name} is missing or damaged ({error}); resume from another checkpoint"
    )


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    _sync_file(path)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(as_json(values), encoding="utf-8")
    _sync_file(path)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Gives a checkpoint its name. One that had the name is found under another until then, so there is always one."""
    _sync_folder(temporary)
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        if old.exists():
            remove_checkpoint(old)
        os.rename(final, old)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    if old.exists():
        remove_checkpoint(old)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
