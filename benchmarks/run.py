"""Runs the measurements of a benchmark, each in a process of its own, the two sides taking turns."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from .cases import Case
from .measure import Source
from .report import summarize


def measure_in_process(job: dict) -> dict:
    """
    Does a job of [`benchmarks.measure`] in a fresh process.

    Raises:
        ValueError: What the process found wrong with the job.
        RuntimeError: If it ended without a result; its own words are on stderr.
    """
    with TemporaryDirectory() as folder:
        job_file, result_file = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.measure", str(job_file), str(result_file)]
        environment = {"KINETO_LOG_LEVEL": "9", **os.environ}  # the profiler tells when it starts and stops
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment).returncode
        if not result_file.is_file():
            killed = " (killed, most likely for want of memory: give a smaller shape)" if status == -9 else ""
            raise RuntimeError(f"the process that measures {job['kind']} ended with status {status}{killed}")
        result = json.loads(result_file.read_text())
    if "error" in result:
        raise ValueError(result["error"])
    return result


def run_case(
    case: Case,
    dense: bool = True,
    source: Source | None = None,
    activations: str | None = None,
    harvested: dict | None = None,
    say: Callable[[str], None] = lambda text: None,
    measure: Callable[[dict], dict] = measure_in_process,
) -> tuple[dict, dict]:
    """
    Measures one case: the machine, then the sides in turns.

    Args:
        case: The shape and the settings.
        dense: Whether to measure the dense reference.
        source: With real activations, where they come from; the run end to end is measured then.
        activations: The file that [`run_harvest`] wrote.
        harvested: What [`run_harvest`] returned.
        say: Gets a line before each measurement.
        measure: Does a job.

    Returns:
        `tuple[dict, dict]`: The row, see [`summarize`]; and `device` and `versions` of the machine.
    """
    say("rates of the machine")
    machine = measure({"kind": "machine", "case": case.to_dict()})
    runs = []
    for number in range(case.rounds):
        for side in ("ours", "dense") if dense else ("ours",):
            say(f"round {number + 1} of {case.rounds}, {side}")
            job = {"kind": "step", "case": case.to_dict(), "side": side, "activations": activations}
            runs.append(measure({**job, "profile": number == 0}))
    facts = None
    if source is not None:
        say("end to end")
        job = {"kind": "end_to_end", "case": case.to_dict(), "source": asdict(source), "statistics": activations}
        facts = {"harvest": harvested, "end_to_end": measure(job), "source": asdict(source)}
    return summarize(case, machine["rates"], runs, facts), {name: machine[name] for name in ("device", "versions")}


def run_harvest(source: Source, tokens: int, device: str, path: str, measure=measure_in_process) -> dict:
    """Harvests real activations into a file; see [`benchmarks.measure.harvest`]."""
    return measure({"kind": "harvest", "source": asdict(source), "tokens": tokens, "device": device, "path": path})


__all__ = ["measure_in_process", "run_case", "run_harvest"]
