"""
Processes that fail or stop together. One that raises alone leaves the others waiting at the next exchange; so what can
fail in one of them, such as reading its text, is followed by a word from each on how it went.
"""

import torch


class StopRequested(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the run is to stop as soon as a checkpoint is written."""


class OtherProcessFailed(RuntimeError):
    """Another process of the run has failed, and says why."""


class OtherProcessGone(RuntimeError):
    """Another process of the run does not answer, so nothing can be done together any more, not even a checkpoint."""


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
    if accelerator.num_processes > 1:
        stopped = isinstance(error, StopRequested)
        found = torch.tensor([error is not None and not stopped, stopped], device=accelerator.device).int()
        try:
            num_failed, num_stopped = accelerator.reduce(found, "sum").tolist()
        except RuntimeError as failure:  # of the connection
            reason = " ".join(str(failure).split())[:200]
            raise OtherProcessGone(f"another process of this run was killed, or failed alone ({reason})") from error
        if error is None and num_failed:
            error = OtherProcessFailed("another process of this run has failed, and says why")
        elif error is None and num_stopped:
            error = StopRequested()
    if error is not None:
        raise error
    return result


__all__ = ["OtherProcessFailed", "OtherProcessGone", "StopRequested", "together"]
