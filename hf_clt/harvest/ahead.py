"""An iterator that is read ahead, by a thread of its own."""

import queue
import threading
from collections.abc import Iterator
from typing import Any


class ReadAhead:
    """
    Reads an iterator in a thread of its own, which begins with the first `take`.

    Args:
        iterator: Read by the thread alone.
        most: Items that may wait to be taken, with the one that is being read.

    Attributes:
        stopped (`bool`): Whether nothing can be taken any more.
    """

    def __init__(self, iterator: Iterator, most: int):
        self._iterator = iterator
        self._room = threading.Semaphore(most)
        self._items = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="hf_clt reads ahead", daemon=True)
        self.stopped = False

    def take(self) -> Any:
        """
        The next item, which is waited for; a signal handler that raises ends the wait. Raises what the iterator raised
        in its place, at its end StopIteration, and the thread is over.
        """
        if self._thread.ident is None:
            self._thread.start()
        item, error = self._items.get()
        self._room.release()
        if error is not None:
            raise error
        return item

    def stop(self) -> None:
        """Ends the thread, after the item that it is reading."""
        self.stopped = True
        self._room.release()

    def join(self, seconds: float) -> None:
        """Waits for the thread to end, but not longer: it may be waiting for a network."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _read(self) -> None:
        error = None
        while error is None:
            self._room.acquire()
            if self.stopped:
                break
            item = None
            try:
                item = next(self._iterator)
            except BaseException as raised:
                error = raised
            self._items.put((item, error))
