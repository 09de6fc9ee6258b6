"""The device that an option names, and what depends on its kind: defaults, clocks, the rounding of products."""

import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


DEVICES = r"cpu|cuda(:\d+)?"
MOST_PROMPTS = 256  # on a GPU; a forward pass over few waits for its thousand kernel launches


def chosen_device(name: str | None, option: str = "device") -> torch.device:
    """
    The device that an option names, a GPU with its number; `None` and `"cuda"` are the GPU of this process, and `None`
    is the CPU where there is no GPU.

    Raises:
        ValueError: For a device that is not there, or not of a kind that hf_clt runs on.
    """
    has_gpu = torch.cuda.is_available()
    if name is None:
        name = "cuda" if has_gpu else "cpu"
    check_kind(name, option)
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not has_gpu:
        raise ValueError(f"{option}={name!r}, but no GPU is available; leave {option} out or give cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"{option}={name!r} is GPU {index}, but there are {count}, numbered from 0; give another")
    return torch.device("cuda", index)


def check_kind(name: str, option: str = "device") -> None:
    """Raises ValueError for a kind of device that hf_clt does not run on, whether this machine has it or not."""
    if not re.fullmatch(DEVICES, name):
        raise ValueError(f"{option}={name!r}: hf_clt runs on CPUs and NVIDIA GPUs; give cpu, cuda or cuda:0")


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the CPU, where its values may decide how to go on; a GPU would have to be waited for."""
    return tensor.device.type == "cpu"


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    A tensor on a device; from the host to a GPU by way of pinned memory, in the order of the current stream, so that
    the host does not wait for what the GPU has to do before.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the machine's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process had in use at most, or of the machine's memory (0 where it does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # of POSIX alone

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def usual_model_dtype(device: torch.device) -> str | None:
    """The `dtype` for [`load_language_model`] where a run gives no `model_dtype`."""
    return "auto" if device.type == "cuda" else None


def prompts_by_memory(block_bytes: int, memory: int) -> int:
    """
    Blocks per pass of a language model on a GPU, a power of two from 8 to [`MOST_PROMPTS`]: as many as have their
    activations, of `block_bytes` each, in a sixteenth of its memory.
    """
    prompts = MOST_PROMPTS
    while prompts > 8 and prompts * block_bytes > memory / 16:
        prompts //= 2
    return prompts


@contextmanager
def rounded_products(device: torch.device, allowed: bool) -> Iterator[None]:
    """On a GPU, allows float32 products within the block in TF32: ten bits of precision, several times as fast."""
    before = torch.get_float32_matmul_precision()
    try:
        if allowed and device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Stopwatch:
    """
    Seconds of work: wall time on a CPU; on a GPU, which works asynchronously, the time between two events in its
    current stream, which are waited for only in `take`.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.events = device, 0.0, deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            try:
                yield
            finally:
                self.seconds += time.perf_counter() - start
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
        finally:
            end.record()
            self.events.append((start, end))
            while self.events and self.events[0][1].query():
                self._add_first()

    def _add_first(self) -> None:
        start, end = self.events.popleft()
        end.synchronize()
        self.seconds += start.elapsed_time(end) / 1000

    def take(self) -> float:
        """The seconds since the last call; waits until the work is done."""
        while self.events:
            self._add_first()
        taken, self.seconds = self.seconds, 0.0
        return taken
