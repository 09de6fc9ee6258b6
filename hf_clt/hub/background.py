"""Pushing while training goes on."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..files import one_line
from .push import push_folder


logger = logging.getLogger(__name__)


class BackgroundPush:
    """
    One push at a time, in a thread of [`~huggingface_hub.HfApi.run_as_future`]. What goes wrong there is logged and
    stops nothing: the next push, at the latest that of the finished CLT, sends what is missing. A program that ends
    waits for the push under way.

    Args:
        repo_id (`str`): Where to; see [`push_folder`].
        kwargs: Passed to [`push_folder`].
    """

    def __init__(self, repo_id: str, **kwargs: Any):
        self.repo_id, self.kwargs = repo_id, kwargs
        self._api, self._future = HfApi(library_name="hf_clt"), None

    @property
    def is_running(self) -> bool:
        """Whether a push is under way: its folder must not be changed then."""
        return self._future is not None and not self._future.done()

    def start(self, folder: str | Path, commit_message: str) -> None:
        """Begins to push a released CLT. RuntimeError if a push is under way."""
        if self.is_running:
            raise RuntimeError(f"a push to {self.repo_id} is under way; ask is_running first")
        self._future = self._api.run_as_future(self._push, folder, commit_message)

    def wait(self) -> None:
        """Returns when no push is under way any more."""
        if self._future is not None:
            self._future.result()

    def _push(self, folder: str | Path, commit_message: str) -> None:
        shows_bars = not are_progress_bars_disabled()
        if shows_bars:
            disable_progress_bars()  # of uploads, which would be drawn over the bar of the training
        try:
            info = push_folder(folder, self.repo_id, commit_message=commit_message, **self.kwargs)
        except Exception as error:
            logger.warning(
                "%s: pushing %r failed, training goes on (%s)", self.repo_id, commit_message, one_line(error)
            )
        else:
            logger.info("%s: pushed %r as %s", self.repo_id, commit_message, info.oid)
        finally:
            if shows_bars:
                enable_progress_bars()
