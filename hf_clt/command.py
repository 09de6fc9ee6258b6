"""What all commands share: wrong options, and whatever else a user can mend, give one line and the exit status 2."""

import argparse
import os
import signal
import sys
import threading
from contextlib import contextmanager
from functools import wraps

from huggingface_hub.errors import StrictDataclassError


USER_ERRORS = (ValueError, OSError, StrictDataclassError)


class OneLineParser(argparse.ArgumentParser):
    """
    Says what is wrong with the options in a ValueError of one line; argparse would print a page and exit. `~` is the
    user's folder in `--output=~/clt` too, where no shell says so.
    """

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([expand_home(word) for word in args], namespace)

    def error(self, message):
        raise ValueError(message[0].lower() + message[1:] + "; see --help")


def expand_home(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (os.path.expanduser(value) if value.startswith("~") else value)


def one_line_errors(*others: type[Exception]):
    """
    A decorator of a command's `main(argv)`: what a user can mend becomes one line on stderr and the status 2. Any
    other error is a bug and keeps its traceback, and all of them do where the environment has `HF_CLT_DEBUG=1`.

    Args:
        others: Errors that a user of this command can mend, besides [`USER_ERRORS`].
    """

    def decorate(main):
        @wraps(main)
        def decorated(argv: list[str] | None = None) -> int:
            try:
                status = main(argv) or 0
                sys.stdout.flush()  # here, where an error of it is caught
                return status
            except BrokenPipeError:  # `hf-clt ... | head` has read enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141  # what a shell says of a program that SIGPIPE ended
            except (*USER_ERRORS, *others) as error:
                if os.environ.get("HF_CLT_DEBUG") == "1":
                    raise
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                return 2

        return decorated

    return decorate


@contextmanager
def sigterm_as_ctrl_c():
    """SIGTERM, which clusters send before they take a machine back, raises KeyboardInterrupt as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["USER_ERRORS", "OneLineParser", "one_line_errors", "sigterm_as_ctrl_c"]
