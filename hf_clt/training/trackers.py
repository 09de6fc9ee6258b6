"""
TensorBoard, wandb and trackio receive the lines of `metrics.jsonl` under the same names, through Accelerate.

`metrics.jsonl` is what a run keeps; a tracker that fails is given up with a warning, and the run goes on.
"""

import importlib
import importlib.metadata
import itertools
import logging
import sys
from pathlib import Path

from accelerate import Accelerator

from ..configuration_clt import CLT_CONFIG_HELP, CLTConfig
from ..files import one_line
from .arguments import CLTTrainingArguments


logger = logging.getLogger(__name__)


def check_trackers(args: CLTTrainingArguments) -> None:
    """
    Finds before any work what would keep a tracker from starting.

    Raises:
        ValueError: If one is not installed, or if wandb is to send to its server and knows no login.
    """
    for name in args.report_to:
        try:
            importlib.metadata.version(name)  # a folder `wandb/` beside the script can be imported as well
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f'report_to={name!r}: {name} is not installed; install it with `pip install "hf_clt[trackers]"`, or '
                "leave it out"
            ) from None
    if "wandb" in args.report_to:
        import wandb

        at_terminal = sys.stdin is not None and sys.stdin.isatty()  # there wandb asks for the key itself
        online = wandb.setup().settings.mode == "online"
        if online and not at_terminal and not wandb.login(prompt=False, verify=False):
            raise ValueError(
                "report_to='wandb': nobody is logged in; run `wandb login`, or set WANDB_MODE=offline to keep the run "
                "on this machine"
            )


def start_trackers(
    accelerator: Accelerator, args: CLTTrainingArguments, config: CLTConfig, run_id: str, step: int, goes_on: bool
) -> None:
    """
    Starts the trackers of `args.report_to` with the settings of the run.

    Args:
        run_id: The run's id on wandb, and part of its name on trackio.
        step: Updates done; TensorBoard hides what was logged after it, also by a run that this one overwrites.
        goes_on: Whether the run `run_id` goes on.
    """
    settings = {**args.to_dict(), **{name: getattr(config, name) for name in CLT_CONFIG_HELP}}
    settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
    name, resume = args.wandb_run_name, "allow" if goes_on else "never"
    wandb = {"entity": args.wandb_entity, "name": name, "id": run_id, "dir": str(args.output_dir), "config": settings}
    kwargs = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": wandb | ({"resume": resume} if goes_on else {}),
        # embed: in a notebook trackio would start its server
        "trackio": {"name": f"{name or Path(args.output_dir).name}-{run_id}", "config": settings, "embed": False}
        | {"resume": resume},
    }
    try:
        accelerator.init_trackers(args.wandb_project or "clt-training", None if goes_on else settings, kwargs)
    except Exception as error:
        accelerator.trackers.clear()
        _warn_of(", ".join(args.report_to), "could not be started", error)


def log_row(accelerator: Accelerator, row: dict) -> None:
    """Sends a line of `metrics.jsonl` to the trackers that were started."""
    scalars, histograms = tracked_values(row)
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(scalars, step=row["step"])
            for name, found in histograms.items():
                _log_histogram(tracker, name, found["bin_edges"], found["counts"], row["step"])
        except Exception as error:
            accelerator.trackers.remove(tracker)
            _warn_of(tracker.name, f"failed at step {row['step']}", error)


def finish_trackers(accelerator: Accelerator) -> None:
    """Closes them. Accelerate's `end_training` would end the connection of the processes as well."""
    while accelerator.trackers:
        tracker = accelerator.trackers.pop()
        try:
            tracker.finish()
        except Exception as error:
            _warn_of(tracker.name, "could not be closed", error)


def _warn_of(name: str, what: str, error: Exception) -> None:
    reason = one_line(f"{type(error).__name__}: {error}", 200)
    logger.warning(
        "%s %s (%s); it gets nothing more of this run, which goes on: metrics.jsonl holds all metrics",
        *(name, what, reason),
    )


def _log_histogram(tracker, name: str, edges: list[float], counts: list[int], step: int) -> None:
    """Logs counts between edges, for which Accelerate has no call."""
    if tracker.name != "tensorboard":  # wandb or trackio
        histogram = importlib.import_module(tracker.name).Histogram
        tracker.log({name: histogram(np_histogram=(counts, edges))}, step=step)
        return
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    tracker.writer.add_histogram_raw(
        name,
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
        sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
        bucket_limits=edges,
        bucket_counts=[0, *counts],  # a bucket has an upper limit only: an empty one holds the first's lower limit
        global_step=step,
    )


def tracked_values(row: dict) -> tuple[dict[str, int | float], dict[str, dict]]:
    """
    What trackers get of a line of `metrics.jsonl`.

    Args:
        row (`dict`): The line.

    Returns:
        Scalars by name: those of held-out lines begin with `heldout/`, and a list `<name>_per_layer` is a scalar
        `<name>_per_layer/<layer>` for each layer, the numbers of the layers as wide as the last. Values that are None
        are left out. And histograms by name, each `{"bin_edges": ..., "counts": ...}`.
    """
    prefix = "" if row["split"] == "train" else "heldout/"
    scalars, histograms = {}, {}
    for name, value in row.items():
        if name == "step":
            continue
        if isinstance(value, int | float):
            scalars[prefix + name] = value
        elif name.endswith("_per_layer") and value is not None:
            width = len(str(len(value) - 1))
            found = [(layer, of_layer) for layer, of_layer in enumerate(value) if of_layer is not None]
            scalars |= {f"{prefix}{name}/{layer:0{width}}": of_layer for layer, of_layer in found}
        elif isinstance(value, dict):
            histograms[prefix + name] = value
    return scalars, histograms
