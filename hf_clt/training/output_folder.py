"""The folder of a run: who may write to it, and what is removed from it."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .. import release as files
from ..hub.facts import FACTS_FILE, read_facts, write_facts
from ..hub.plots import PLOTS, PLOTS_FOLDER, draw_plots
from .checkpoints import (
    foreign_checkpoints,
    list_checkpoints,
    remove_checkpoint,
    remove_checkpoints_after,
    remove_leftovers,
)
from .reporting import truncate_metrics


if TYPE_CHECKING:
    from .trainer import CLTTrainer

RUN_FILES = ("config.json", "metrics.jsonl")
PUSH_FOLDER = ".pushing.tmp"  # folder in output_dir with what is pushed while training goes on


def prepare_output_dir(trainer: "CLTTrainer") -> None:
    """Makes the folder, without what the run would contradict: an overwritten run, or what came after a resume."""
    if not trainer.accelerator.is_main_process:
        return
    folder = trainer.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    trainer.lock = lock_folder(folder)
    remove_leftovers(folder)
    shutil.rmtree(folder / PUSH_FOLDER, ignore_errors=True)  # of a run that was stopped in a push
    if trainer.goes_on:
        # In this order: the newest checkpoint, whichever that is after a crash, has all its lines of metrics.
        remove_checkpoints_after(folder, trainer.step)
        truncate_metrics(folder, trainer.step)
    elif trainer.args.overwrite_output_dir:
        remove_run(folder)


def check_output_dir(output_dir: Path, overwrite: bool, goes_on: bool) -> None:
    """
    Refuses a folder that cannot be written to, or that holds another run, unless this one goes on with it or was told
    to overwrite; and one with files of others that the run would replace.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file; give a folder")
    nearest = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir={str(output_dir)!r} cannot be written to ({str(nearest)!r} is read-only); give another folder"
        )
    if goes_on:
        return
    if foreign := foreign_files(output_dir):
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds {foreign[0].relative_to(output_dir)}, which is not of a run and "
            "which this one would replace; give another folder"
        )
    found = [name for name in RUN_FILES if (output_dir / name).exists()]
    found += [path.name for path in list_checkpoints(output_dir)]
    if found and not overwrite:
        raise ValueError(
            f"output_dir={str(output_dir)!r} already holds a run ({found[0]}); give another folder, or "
            "--resume-from-checkpoint latest, or --overwrite-output-dir"
        )


def foreign_files(output_dir: Path) -> list[Path]:
    """Files with the names of a run's or a release's files that something else wrote, as their contents show."""
    found = [*files.foreign_files(output_dir), *foreign_checkpoints(output_dir)]
    facts = False
    try:
        facts = read_facts(output_dir) is not None
    except ValueError:
        found.append(output_dir / FACTS_FILE)
    plots = [output_dir / PLOTS_FOLDER / file for file, _, _ in PLOTS]
    found += [] if facts else [path for path in plots if path.exists()]
    log = output_dir / "metrics.jsonl"
    if log.exists():
        try:
            with open(log, encoding="utf-8") as lines:
                first = next(lines, "")
            is_log = not first.strip() or {"step", "split"} <= json.loads(first).keys()
        except (OSError, ValueError, AttributeError):
            is_log = False
        found += [] if is_log else [log]
    return found


def lock_folder(folder: Path) -> int | None:
    """
    Takes a folder for this process until the descriptor is closed or the process ends, so that two runs that do not
    know of each other, such as those of an `srun` without torchrun, never write to the same one.

    Returns:
        The descriptor to close; None where the system or the file system has no such locks.

    Raises:
        ValueError: If another process has taken it.
    """
    if os.name != "posix":
        return None
    import fcntl  # there is none elsewhere

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise ValueError(
                f"{str(folder)!r} is being written to by another run; give another folder, or let that run end (the "
                "processes of one run need a launcher, see docs/launching.md)"
            ) from None
        return None
    return descriptor


def remove_run(output_dir: Path) -> None:
    """
    Removes what an earlier run wrote: its CLT, metrics, plots and checkpoints. Other files, what trackers keep, and
    the README.md, stay.
    """
    if not output_dir.is_dir():
        return
    remove_leftovers(output_dir)
    for path in reversed(list_checkpoints(output_dir)):
        remove_checkpoint(path)
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)
    files.remove_release(output_dir)
    write_facts(output_dir, {})
    draw_plots(output_dir, {})
