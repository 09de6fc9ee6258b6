"""
Processes that wait for each other, and fail or stop together.

One that raises alone leaves the others waiting at the next exchange; so what can fail in one of them, such as reading
its text, is followed by an exchange of how it went. These exchanges have a group of their own, on the CPU (gloo), on
GPUs too: they do not wait for a GPU, a peer whose connection breaks is noticed there at once, which NCCL does not, and
they wait long for text that is retried or a release that is written, while the timeout of gradients stays short.
"""

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from ..files import one_line


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..harvest.buffer import ActivationBuffer


PATIENCE = timedelta(hours=6)  # longer than anything that one process does while the others wait
ASK_SECONDS = 2.0  # between two times that processes ask each other whether one has failed or was told to stop


class StopRequested(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the run is to stop as soon as a checkpoint is written."""


class OtherProcessFailed(RuntimeError):
    """Another process of the run has failed, and says why."""


class OtherProcessGone(RuntimeError):
    """Another process of the run does not answer, so nothing can be done together any more, not even a checkpoint."""


def connect_hosts(accelerator: "Accelerator") -> None:
    """Makes the group of these exchanges; all processes call this once, right after the accelerator is made."""
    several = accelerator.num_processes > 1
    accelerator.hosts = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None


def disconnect() -> None:
    """
    Ends the connections, as the last act of a program. A thread of gloo may still hold the tensor of the last
    exchange; if it lets go of it while the interpreter shuts down, that aborts a process which has done all its work.
    A DistributedDataParallel model that is alive keeps the threads, so the caller must hold none.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def together(accelerator: "Accelerator", function: Callable[[], Any]) -> Any:
    """
    Calls `function` in every process. If it fails in one, it raises in all, once all are through with it.

    Args:
        accelerator (`Accelerator`): All its processes call this, at the same place.
        function: Takes no arguments. It must not exchange anything between processes, unless by `together`: a process
            that fails in it would leave the others inside.

    Returns:
        What `function` returned in this process.

    Raises:
        Exception: What `function` raised in this process.
        [`StopRequested`]: If it raised that in any.
        [`OtherProcessFailed`]: If it failed in another process only.
        [`OtherProcessGone`]: If another process does not answer.
    """
    result = error = None
    try:
        result = function()
    except (Exception, StopRequested) as raised:
        error = raised
    stopped = isinstance(error, StopRequested)
    try:
        any_failed, any_stopped = _exchange(accelerator, [error is not None and not stopped, stopped], "MAX")
    except OtherProcessGone as gone:
        raise gone from error
    if error is None and any_failed:
        error = OtherProcessFailed("another process of this run has failed, and says why")
    elif error is None and any_stopped:
        error = StopRequested()
    if error is not None:
        raise error
    return result


def any_process(accelerator: "Accelerator", found: bool) -> bool:
    """Whether it was found in any process."""
    return bool(_exchange(accelerator, [found], "MAX")[0])


def smallest(accelerator: "Accelerator", number: int) -> int:
    """The smallest number of all processes."""
    return _exchange(accelerator, [number], "MIN")[0]


def wait_for_all(accelerator: "Accelerator") -> None:
    """Returns when all processes have come here."""
    _exchange(accelerator, [0], "MAX")


def _exchange(accelerator, numbers: list[int], reduction: str) -> list[int]:
    """The largest or smallest over all processes of each of a few numbers."""
    if accelerator.num_processes == 1:
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.int64)
    try:
        dist.all_reduce(numbers, op=getattr(dist.ReduceOp, reduction), group=accelerator.hosts)
    except RuntimeError as failure:  # of the connection
        reason = one_line(failure, 200)
        raise OtherProcessGone(f"another process of this run was killed, or failed alone ({reason})") from failure
    return numbers.tolist()


class StopSignals:
    """
    Ctrl-C and SIGTERM as a flag, `requested`: the step ends and a checkpoint is written. While text is waited for,
    which can take minutes, they end the wait. When all updates are done, an evaluation is broken off, and a release is
    not. A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.requested = False

    @contextmanager
    def caught(self, is_waiting: Callable[[], bool], announce: bool) -> Iterator[None]:
        """
        Args:
            is_waiting: Whether the signal may end what is being done by raising [`StopRequested`].
            announce: Whether to tell the user.
        """

        def request_stop(signum, frame):
            self.requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            waiting = is_waiting()
            if announce:
                first = "" if waiting else "what is being computed is finished, then "
                tqdm.write(f"stopping: {first}a checkpoint is written (Ctrl-C again: stop at once)")
            if waiting:
                raise StopRequested

        try:
            before = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where no handler can be set: Python stops it as usual
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.requested = False


class AgreedBatches:
    """
    The batches of a buffer, read by all processes together. Reading can fail in one process, and then fails in all,
    for which they have to ask each other; so they agree on a number of batches that all of them have ready,
    ASK_SECONDS' worth at most. The next question then begins an update, where a run may stop.

    Args:
        accelerator (`Accelerator`): With the group of [`connect_hosts`].
        buffer ([`ActivationBuffer`]): Of this process.
        per_update (`int`): Batches per optimizer update.
    """

    def __init__(self, accelerator: "Accelerator", buffer: "ActivationBuffer", per_update: int):
        self.accelerator, self.buffer, self.per_update = accelerator, buffer, per_update
        self.num_agreed = 0  # batches that all have ready, of those agreed on last
        self._last_agreed = 0
        self._asked_at = time.perf_counter()
        self._batches = buffer.endless()

    def may_fail_within_update(self) -> bool:
        """Whether the next update has a batch, after its first or of another process, whose reading may fail."""
        several = self.per_update > 1 or self.accelerator.num_processes > 1
        return several and self.num_agreed < self.per_update

    def read(self, micro_step: int, signals: StopSignals) -> dict[str, torch.Tensor]:
        """
        The next batch of this process, the `micro_step`-th of an update.

        Raises:
            [`StopRequested`]: If a process was told to stop, before the first batch of an update.
            Exception: As [`together`].
        """
        if self.num_agreed > 0:
            self.num_agreed -= 1
            return next(self._batches)

        def read() -> dict[str, torch.Tensor]:
            if signals.requested and micro_step == 0:
                raise StopRequested
            return next(self._batches)

        batch = together(self.accelerator, read)
        if self.accelerator.num_processes > 1:
            now = time.perf_counter()
            per_batch = (now - self._asked_at) / (self._last_agreed + 1)
            in_time = int(ASK_SECONDS / max(per_batch, 1e-6))
            number = smallest(self.accelerator, min(self.buffer.num_ready, in_time))
            rest = self.per_update - 1 - micro_step  # of this update
            if number >= rest:
                number -= (number - rest) % self.per_update
            self.num_agreed = self._last_agreed = number
            self._asked_at = now
        return batch
