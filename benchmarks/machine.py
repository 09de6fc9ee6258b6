"""The machine: what it is, how fast it multiplies and streams, and how much memory this process takes."""

import os
import platform
import time
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from .cases import Case


STREAM_BYTES = 640 * 2**20  # far beyond any cache
STREAM_COLUMNS = 4096
PROCESS = Path("/proc/self")  # Linux
VERSIONED = ("hf_clt", "torch", "transformers", "accelerate", "triton")


def device_name(device: str) -> str:
    """Name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions that the figures depend on."""
    installed = {name: version(name) for name in VERSIONED if find_spec(name) is not None}
    return {"python": platform.python_version(), **installed}


def measure_rates(case: Case, stream_bytes: int = STREAM_BYTES, at_least: float = 1.0) -> dict[str, float]:
    """
    The best rates of this machine, in the formats and shapes of a case: a limit is set by what it can do, so the
    fastest of several repeats counts.

    Args:
        case: Gives N, D, F, the device and the format of the products.
        stream_bytes: Size of the tensor that is streamed.
        at_least: Seconds that each is repeated for.

    Returns:
        `dict`: `gemm_encoder` (N, D) x (D, F) and `gemm_decoder` (N, F) x (F, J·D), J the mean number of target
        layers, each or its transpose, whichever is faster, in operations per second; `read`, `write` and `update`
        (each element read and written in place; both count) in bytes per second.
    """
    device, dtype = torch.device(case.device), getattr(torch, case.product_dtype)
    width = max(1, round(sum(case.targets) / case.num_layers)) * case.d_model
    rates = {}
    for name, rows, inner, columns in (
        ("gemm_encoder", case.tokens, case.d_model, case.num_features),
        ("gemm_decoder", case.tokens, case.num_features, width),
    ):
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(columns, inner, device=device, dtype=dtype).T  # stored as a weight is
        out = torch.empty(rows * columns, device=device, dtype=dtype)
        ways = ((a, b, out.view(rows, columns)), (b.T, a.T, out.view(columns, rows)))
        seconds = [best_seconds(lambda w=way: torch.mm(*w[:2], out=w[2]), device, at_least / 2) for way in ways]
        rates[name] = 2 * rows * inner * columns / min(seconds)
        del a, b, out, ways
    stream = torch.ones(max(1, stream_bytes // (4 * STREAM_COLUMNS)), STREAM_COLUMNS, device=device)
    size, ones = stream.numel() * 4, torch.ones(STREAM_COLUMNS, device=device)
    rates["read"] = size / best_seconds(
        lambda: torch.mv(stream, ones), device, at_least
    )  # the fastest way to read it all
    rates["write"] = size / best_seconds(lambda: stream.fill_(1.0), device, at_least)
    rates["update"] = 2 * size / best_seconds(lambda: stream.mul_(1.0), device, at_least)
    return rates


def best_seconds(work, device: torch.device, at_least: float) -> float:
    """The shortest wall time of a call, made three times at least and for some seconds, after one not counted."""
    work()
    seconds = []
    while len(seconds) < 3 or sum(seconds) < at_least:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_in_use(device: torch.device) -> int | None:
    """Bytes in use now: of this process (resident), or of tensors on the GPU. None where the system does not say."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """The largest value of [`memory_in_use`] since [`reset_peak_memory`]."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak; where the kernel does not let a process do that, the peak is that of its whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")


def _status_bytes(field: str) -> int | None:
    status = PROCESS / "status"
    if not status.is_file():
        return None
    kilobytes = [line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


__all__ = [
    "best_seconds",
    "device_name",
    "measure_rates",
    "memory_in_use",
    "peak_memory",
    "reset_peak_memory",
    "synchronize",
    "versions",
]
