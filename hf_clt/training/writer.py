"""Checkpoints that a thread writes, from copies in host memory, while training goes on."""

import copy
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ..device import free_memory


logger = logging.getLogger(__name__)

SAME_SIZE = ("model", "optimizer", "trainer")  # parts of every checkpoint, whose copies are kept


def is_copied(part: str, value: Tensor) -> bool:
    """Whether a tensor of a part of a checkpoint is on a GPU, or changes when training goes on."""
    return value.is_cuda or part in SAME_SIZE


class CheckpointWriter:
    """
    Writes one checkpoint at a time.

    In the background, what is on a GPU is copied into pinned memory first, which is kept for the next checkpoint; the
    GPU makes the copies between two updates, and neither it nor the host waits for the disk. Where less than twice the
    memory is free that this takes, checkpoints are written in place.

    Args:
        in_background: Whether to write in a thread.
    """

    def __init__(self, in_background: bool):
        self.in_background = in_background
        self.given_up = False  # whether what is being written must not get its name any more
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._kept: dict[tuple[str, str], Tensor] = {}

    def write(self, save: Callable[[dict, dict], None], shared: dict, own: dict, in_place: bool = False) -> None:
        """
        Calls `save(shared, own)`, which writes a checkpoint; in the background at once returns, with copies of both.

        Raises:
            Exception: What `save` raised; in the background the next `check`, `wait` or `write` raises it.
        """
        self.wait()
        self.given_up = False
        if in_place or not self.in_background or not self._has_memory(shared, own):
            save(shared, own)
            return
        copies = [{name: self._copy(name, part) for name, part in parts.items()} for parts in (shared, own)]
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None

        def run() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                save(*copies)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="hf_clt writes a checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what writing the last checkpoint has raised, and does not wait for one that is being written."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is written, and raises what that raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _copy(self, part: str, values: dict) -> dict:
        """Tensors in host memory, and other values, that do not change when training goes on."""
        copies = {}
        for name, value in values.items():
            if not isinstance(value, Tensor):
                copies[name] = copy.deepcopy(value)
                continue
            if not is_copied(part, value):
                copies[name] = value
                continue
            kept = self._kept.get((part, name))
            if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
                kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                if part in SAME_SIZE:
                    self._kept[part, name] = kept
            copies[name] = kept.copy_(value.detach(), non_blocking=True)
        return copies

    def _has_memory(self, shared: dict, own: dict) -> bool:
        """Whether there is memory for copies; if not, that is said, and no copies are made any more."""
        needed = sum(
            1 << max(0, value.nbytes - 1).bit_length()  # pinned memory comes in powers of two
            for parts in (shared, own)
            for part, values in parts.items()
            for name, value in values.items()
            if isinstance(value, Tensor) and is_copied(part, value) and (part, name) not in self._kept
        )
        free = free_memory(torch.device("cpu"))
        if 2 * needed > free:
            self.in_background = False
            self._kept.clear()
            logger.warning(
                "training waits while checkpoints are written: copies of what they hold take %.1f GB of the host's "
                "memory, of which %.1f GB are free, and half of that at most is used",
                *(needed / 1e9, free / 1e9),
            )
        return self.in_background
