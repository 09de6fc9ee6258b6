"""
TensorBoard, wandb and trackio: they receive the lines of `metrics.jsonl` under the same names, in the main process
alone, through the tracker classes of Accelerate.

`metrics.jsonl` is what a run keeps; a tracker that fails is given up with a warning, and the run goes on.
"""

import importlib.metadata
import itertools
import json
import logging
import os
import shlex
import shutil
import sqlite3
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import huggingface_hub.constants
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from ..configuration_clt import CLT_CONFIG_HELP, CLTConfig
from ..files import write_text
from .arguments import CLTTrainingArguments


logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"  # in output_dir
IDS_FILE = "trackers.json"  # in output_dir: the names under which wandb and trackio know the run
DEFAULT_PROJECT = "clt-training"


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


def remove_tracked(output_dir: Path) -> None:
    """Removes what an overwritten run left; runs of wandb stay in `wandb/`, where they may wait to be sent."""
    known = known_runs(output_dir)
    if known is None:
        return
    if "tensorboard" in known:
        shutil.rmtree(output_dir / TENSORBOARD_FOLDER, ignore_errors=True)
    (output_dir / IDS_FILE).unlink()


def known_runs(output_dir: Path) -> dict[str, dict] | None:
    """The trackers of the run in a folder, and the names under which they know it; None where no run of ours is."""
    try:
        found = json.loads((output_dir / IDS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    runs = found.values() if isinstance(found, dict) else [None]
    return found if all(isinstance(known, dict) and "project" in known for known in runs) else None


def foreign_tracked(output_dir: Path) -> list[Path]:
    """What is there by the names that [`Trackers`] use, and is not of a run of ours."""
    known = known_runs(output_dir)
    paths = [output_dir / IDS_FILE] if known is None else []
    if "tensorboard" not in (known or {}):
        paths.append(output_dir / TENSORBOARD_FOLDER)
    return [path for path in paths if path.exists()]


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


# -- one function per tracker that starts it, and one that logs a histogram ------------------------------------------


def _start_tensorboard(output_dir: Path, args, settings: dict, known: dict | None, step: int) -> GeneralTracker:
    # The readers drop what the run logged after the checkpoint that it goes on from.
    purge_step = None if known is None else step + 1
    tracker = TensorBoardTracker(TENSORBOARD_FOLDER, output_dir, purge_step=purge_step)
    tracker.start()
    if known is None:
        lines = ["|setting|value|", "|---|---|", *(f"|{name}|{value}|" for name, value in settings.items())]
        # As text: Accelerate's hyperparameters are a run of their own beside the run.
        tracker.log({"settings": "\n".join(lines)}, step=0)
    return tracker


def _start_wandb(output_dir: Path, args, settings: dict, known: dict | None, step: int) -> GeneralTracker:
    import wandb

    kwargs = {"entity": args.wandb_entity, "name": args.wandb_run_name, "dir": str(output_dir), "config": settings}
    if known is not None:
        kwargs["id"] = known["id"]
        if wandb.setup().settings.mode == "online":
            kwargs["resume"] = "allow"  # offline it is ignored, with a warning
    tracker = WandBTracker(args.wandb_project or DEFAULT_PROJECT, **kwargs)
    tracker.start()
    return tracker


def _start_trackio(output_dir: Path, args, settings: dict, known: dict | None, step: int) -> GeneralTracker:
    name = args.wandb_run_name if known is None else known["name"]
    tracker = TrackioTracker(
        args.wandb_project or DEFAULT_PROJECT,
        name=name,
        config=settings,
        resume="never" if known is None else "allow",
        embed=False,  # in a notebook trackio would start its server
    )
    is_local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
    with _no_hub_requests(is_local):
        tracker.start()
    if known is not None:
        tracker.run.id = known["id"]  # trackio took the newest run of that name
        if is_local:
            _empty_trackio_run(tracker.run)
    return tracker


@contextmanager
def _no_hub_requests(wanted: bool):
    """trackio asks the Hub who is logged in, for a note in its own database; a run that stays here asks nobody."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _empty_trackio_run(run) -> None:
    """
    Deletes what a run has logged: steps that were dropped would be shown beside the new ones, and those of the last
    moments before it was killed are not there.
    """
    from trackio.sqlite_storage import SQLiteStorage

    path = SQLiteStorage.get_project_db_path(run.project)
    if path.is_file():
        with closing(sqlite3.connect(path, timeout=30)) as database, database:
            database.execute("DELETE FROM metrics WHERE run_id = ?", (run.id,))


def _log_tensorboard_histogram(tracker: GeneralTracker, name: str, edges: list, counts: list, step: int) -> None:
    # A bucket has an upper limit only: an empty one in front holds the lower limit of the first.
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    tracker.writer.add_histogram_raw(
        name,
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
        sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
        bucket_limits=edges,
        bucket_counts=[0, *counts],
        global_step=step,
    )
    tracker.writer.flush()


def _log_wandb_histogram(tracker: GeneralTracker, name: str, edges: list, counts: list, step: int) -> None:
    import wandb

    tracker.log({name: wandb.Histogram(np_histogram=(counts, edges))}, step=step)


def _log_trackio_histogram(tracker: GeneralTracker, name: str, edges: list, counts: list, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Histogram(np_histogram=(counts, edges))}, step=step)


START = {"tensorboard": _start_tensorboard, "wandb": _start_wandb, "trackio": _start_trackio}
LOG_HISTOGRAM = {
    "tensorboard": _log_tensorboard_histogram,
    "wandb": _log_wandb_histogram,
    "trackio": _log_trackio_histogram,
}


def _known_as(name: str, tracker: GeneralTracker) -> dict:
    """What it takes to go on with the run of a tracker that was started."""
    if name == "wandb":
        return {"project": tracker.run_name, "id": tracker.run.id}
    if name == "trackio":
        return {"project": tracker.run_name, "id": tracker.run.id, "name": tracker.run.name}
    return {"project": tracker.run_name}


def _finish(name: str, tracker: GeneralTracker, failed: bool) -> None:
    if name == "wandb" and failed:
        tracker.run.finish(exit_code=1)
        return
    tracker.finish()
    if name == "trackio":
        import trackio

        if trackio.context_vars.current_run.get() is tracker.run:
            trackio.context_vars.current_run.set(None)  # or it is finished a second time, with a word, at exit


def _is_empty(name: str, tracker: GeneralTracker) -> bool:
    """
    Whether the place where a resumed run goes on holds nothing of it yet: offline, wandb begins another file, and the
    one before may have steps that were dropped, or lack the last ones before the run was killed.
    """
    return (name == "wandb" and tracker.run.offline) or (name == "trackio" and tracker.run.url is None)


def _where_to_look(name: str, tracker: GeneralTracker, output_dir: Path) -> str:
    """A line for people: the command that shows the run, or its address."""
    if name == "tensorboard":
        return f"TensorBoard: tensorboard --logdir {shlex.quote(str(output_dir / TENSORBOARD_FOLDER))}"
    run = tracker.run
    if name == "wandb":
        if run.disabled:
            return "wandb: switched off by WANDB_MODE, nothing was kept"
        if not run.offline:
            return f"wandb: {run.url}"
        folder = max((output_dir / "wandb").glob(f"offline-run-*-{run.id}"))  # of a resumed run the last is whole
        return f"wandb: kept offline; to send it: wandb sync {shlex.quote(str(folder))}"
    if run.url is None:
        folder = os.environ.get("TRACKIO_DIR")
        folder = f"TRACKIO_DIR={shlex.quote(folder)} " if folder else ""
        return f"trackio: {folder}trackio show --project {shlex.quote(run.project)}"
    is_space = not run.url.startswith(("http://", "https://"))
    return f"trackio: {'https://huggingface.co/spaces/' if is_space else ''}{run.url}"


# -- all of them ------------------------------------------------------------------------------------------------------


class Trackers:
    """
    The trackers of a run. Every process may call the methods; the main process alone does something.

    Args:
        accelerator ([`Accelerator`]): Its `trackers` will hold those that run, for `accelerator.get_tracker`.
        args ([`CLTTrainingArguments`]): `report_to` and the `wandb_...` options, which are for trackio too.
        config ([`CLTConfig`]): Logged as settings, together with `args`.

    Attributes:
        where_to_look (`list[str]`): Once the run has finished, a line for each tracker that says where to look.
    """

    def __init__(self, accelerator: Accelerator, args: CLTTrainingArguments, config: CLTConfig):
        self.accelerator, self.args, self.config = accelerator, args, config
        self.output_dir = Path(args.output_dir)
        self.where_to_look: list[str] = []
        self._running: dict[str, GeneralTracker] = {}

    def start(self, step: int, goes_on: bool) -> None:
        """
        Starts them, once `output_dir` is there.

        Args:
            step (`int`): Updates done; later steps that were logged are dropped where the tracker can.
            goes_on (`bool`): Whether the run in `output_dir` goes on: under the names that are kept there.
        """
        if not self.args.report_to or not self.accelerator.is_main_process:
            return
        path = self.output_dir / IDS_FILE
        known = (known_runs(self.output_dir) if goes_on else None) or {}
        settings = {**self.args.to_dict(), **{name: getattr(self.config, name) for name in CLT_CONFIG_HELP}}
        settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        for name in self.args.report_to:
            project = TENSORBOARD_FOLDER if name == "tensorboard" else self.args.wandb_project or DEFAULT_PROJECT
            before = known.get(name)
            if before is not None and before["project"] != project:
                before = None  # another project: another run
            with self._giving_up(name, "could not be started"):
                tracker = START[name](self.output_dir, self.args, settings, before, step)
                known[name] = _known_as(name, tracker)
                self._running[name] = tracker
                self.accelerator.trackers.append(tracker)
                if goes_on and (before is None or _is_empty(name, tracker)):
                    for row in self._written():
                        self._send(name, tracker, row)
        write_text(path, json.dumps(known, indent=2) + "\n")

    def log(self, row: dict) -> None:
        """Sends a line of `metrics.jsonl`."""
        for name, tracker in list(self._running.items()):
            with self._giving_up(name, f"failed at step {row['step']}"):
                self._send(name, tracker, row)

    def _send(self, name: str, tracker: GeneralTracker, row: dict) -> None:
        scalars, histograms = tracked_values(row)
        tracker.log(scalars, step=row["step"])
        for histogram, value in histograms.items():
            LOG_HISTOGRAM[name](tracker, histogram, value["bin_edges"], value["counts"], row["step"])

    def _written(self) -> list[dict]:
        """The lines of `metrics.jsonl`, for a tracker that has none of them."""
        path = self.output_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]

    def finish(self, failed: bool = False) -> None:
        """Closes them; `failed` is for wandb, which marks such a run."""
        for name, tracker in list(self._running.items()):
            with self._giving_up(name, "could not be closed"):
                _finish(name, tracker, failed)
                self.where_to_look.append(_where_to_look(name, tracker, self.output_dir))
        self._running.clear()

    @contextmanager
    def _giving_up(self, name: str, what: str):
        """If the block fails, that tracker gets nothing more, and one warning says so."""
        try:
            yield
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._running.pop(name, None)
            logger.warning(
                "%s %s (%s); it gets nothing more of this run, which goes on: metrics.jsonl holds all metrics",
                *(name, what, reason),
            )


__all__ = ["Trackers", "check_trackers", "remove_tracked", "tracked_values"]
