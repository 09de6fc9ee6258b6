"""
Processes that wait for each other, and fail or stop together.

One that raises alone leaves the others waiting at the next exchange; so what can fail in one of them, such as reading
its text, is followed by an exchange of how it went. These exchanges have a group of their own, on the CPU (gloo), on
GPUs too: they do not wait for a GPU, a peer whose connection breaks is noticed there at once, which NCCL does not, and
they wait long for text that is retried or a release that is written, while the timeout of gradients stays short.
"""

from datetime import timedelta

import torch
import torch.distributed as dist


PATIENCE = timedelta(hours=6)  # longer than anything that one process does while the others wait


class StopRequested(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the run is to stop as soon as a checkpoint is written."""


class OtherProcessFailed(RuntimeError):
    """Another process of the run has failed, and says why."""


class OtherProcessGone(RuntimeError):
    """Another process of the run does not answer, so nothing can be done together any more, not even a checkpoint."""


def connect_hosts(accelerator) -> None:
    """Makes the group of these exchanges; all processes call this once, right after the accelerator is made."""
    several = accelerator.num_processes > 1
    accelerator.hosts = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None


def together(accelerator, function):
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


def any_process(accelerator, found: bool) -> bool:
    """Whether it was found in any process."""
    return bool(_exchange(accelerator, [found], "MAX")[0])


def least(accelerator, number: int) -> int:
    """The smallest number of all processes."""
    return _exchange(accelerator, [number], "MIN")[0]


def wait_for_all(accelerator) -> None:
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
        reason = " ".join(str(failure).split())[:200]
        raise OtherProcessGone(f"another process of this run was killed, or failed alone ({reason})") from failure
    return numbers.tolist()


__all__ = [
    "OtherProcessFailed",
    "OtherProcessGone",
    "StopRequested",
    "any_process",
    "connect_hosts",
    "least",
    "together",
    "wait_for_all",
]
