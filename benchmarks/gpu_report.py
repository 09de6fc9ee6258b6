"""What gpu_check.py and gpu_train.py share: their pieces, one after the other within a budget; one JSON; a profile."""

import argparse
import gc
import shlex
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from hf_clt.files import as_json, write_text
from hf_clt.training.reporting import versions
from hf_clt.training.setup import prepare_cpu, take_device

from .machine import device_name, synchronize


def add_options(parser: argparse.ArgumentParser, json: str) -> None:
    parser.add_argument("--device", help="cuda (default), cuda:n, or cpu, which goes with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program itself")
    parser.add_argument("--json", type=Path, default=Path(json), help=f"file for all figures (default {json})")


def device_of(options: argparse.Namespace) -> torch.device:
    """The device, made torch's current one. Raises ValueError where these measurements make no sense on it."""
    if options.device is None and not torch.cuda.is_available():
        raise ValueError("no GPU is available; give --device cpu --tiny to try the program itself")
    device = take_device(options.device or "cuda")
    if device.type == "cpu":
        if not options.tiny:
            raise ValueError("device='cpu' would take hours at these shapes; give --tiny as well")
        prepare_cpu()
    return device


class Report:
    """
    Runs pieces while the budget lasts, prints what they find, and keeps it in a JSON file that is whole at all times.

    Args:
        path: The file.
        command: What was run, word by word.
        device: What it runs on.
        budget: Seconds from now on.
        only: Beginnings of the names of the pieces that are wanted; by default all are.
    """

    def __init__(self, path: Path, command: list[str], device: torch.device, budget: float, only=("",)):
        self.path, self.device, self.only, self.end = path, device, tuple(only), time.perf_counter() + budget
        self.record = {"device": device_name(str(device)), "versions": versions(), "command": shlex.join(command)}
        self.record["pieces"] = {}
        print(f"{self.record['device']}; {', '.join(f'{n} {v}' for n, v in self.record['versions'].items())}")

    def left(self) -> float:
        return self.end - time.perf_counter()

    def piece(self, name: str, about: float, work: Callable[[list], None]) -> list[dict]:
        """
        One piece, if `about` so many seconds are left. `work` is given a list that it appends its figures to; one with
        `passed` False makes the piece fail, as does an exception, which stops nothing else. Returns the list.
        """
        rows, begin, error = [], time.perf_counter(), None
        if not name.startswith(self.only):
            return rows
        print(f"\n{name}: about {about:.0f} s, of {self.left():.0f} s left", flush=True)
        if about > self.left():
            status = "skipped"
        else:
            try:
                work(rows)
                synchronize(self.device)
                status = "failed" if any(row.get("passed") is False for row in rows) else "done"
            except Exception as found:
                status, error = "failed", f"{type(found).__name__}: {found}"
                traceback.print_exc()
            gc.collect()  # what an error held as well
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - begin
        print(f"{name}: {status}" + ("" if status == "skipped" else f" after {seconds:.1f} s"), flush=True)
        self.record["pieces"][name] = {"status": status, "error": error, "seconds": seconds, "rows": rows}
        write_text(self.path, as_json(self.record))
        return rows

    def finish(self) -> int:
        """Says what became of the pieces; the exit status."""
        states = {name: found["status"] for name, found in self.record["pieces"].items()}
        print()
        for status in ("done", "skipped", "failed"):
            named = [name for name, state in states.items() if state == status]
            print(f"{status}: {len(named)}" + (f" ({', '.join(named)})" if named and status != "done" else ""))
        print(f"figures: {self.path}")
        return int("failed" in states.values())


def attempt(rows: list, row: dict, work: Callable[[], dict]) -> dict:
    """Appends `row` with what `work` gives. After an exception it is one that failed, and the others go on."""
    rows.append(row)
    try:
        row |= work()
    except Exception as error:
        row |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
        print(f"FAIL  {row}", flush=True)
    return row


def make_profiler(device: torch.device) -> torch.profiler.profile:
    kind = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kind.CUDA if device.type == "cuda" else kind.CPU])


def profile_figures(profiler: torch.profiler.profile, device: torch.device, updates: int, top: int) -> dict:
    """
    What a profiler saw in so many updates, for each of them: the number of kernels (`launches`; on a CPU operators),
    `busy_ms` in which at least one ran, and the longest, `kernels`: milliseconds, number and name.
    """
    cuda, found, spans = device.type == "cuda", {}, []
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    for event in profiler.events():
        if event.device_type != kind or event.is_user_annotation or event.name.startswith(("clt::", "Optimizer.")):
            continue
        count, micros = found.get(event.name, (0, 0.0))
        alone = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        found[event.name] = count + 1, micros + alone
        spans.append((event.time_range.start, event.time_range.end))
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    kernels = sorted(
        ((micros / 1000 / updates, count / updates, name[:80]) for name, (count, micros) in found.items())
    )
    return {
        "launches": len(spans) / updates,
        "busy_ms": busy / 1000 / updates,
        "kernels": kernels[: -top - 1 : -1],
    }


def print_kernels(kernels: list) -> None:
    for milliseconds, count, name in kernels:
        print(f"    {milliseconds:9.3f} ms, {count:7.1f} x  {name}")


__all__ = ["Report", "add_options", "attempt", "device_of", "make_profiler", "print_kernels", "profile_figures"]
