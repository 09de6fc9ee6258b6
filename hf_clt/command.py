"""What all commands share: wrong options, and whatever else a user can mend, give one line and the exit status 2."""

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError

from .files import one_line


USER_ERRORS = (ValueError, OSError, StrictDataclassError)


class OneLineParser(argparse.ArgumentParser):
    """
    Says what is wrong with the options in a ValueError of one line; argparse would print a page and exit. `~` is the
    user's folder in `--output=~/clt` too, where no shell expands it. The description is printed as it is written.
    """

    def __init__(self, *args: Any, formatter_class: type = argparse.RawDescriptionHelpFormatter, **kwargs: Any):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([expand_home(word) for word in args], namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message[0].lower() + message[1:] + "; see --help")


def expand_home(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (os.path.expanduser(value) if value.startswith("~") else value)


def one_line_errors(*others: type[Exception], interrupted: str | None = None) -> Callable:
    """
    A decorator of a command's `main(argv)`: what a user can mend becomes one line on stderr and the status 2. Any
    other error is a bug and keeps its traceback, and all of them do where the environment has `HF_CLT_DEBUG=1`.

    Args:
        others: Errors that a user of this command can mend, besides [`USER_ERRORS`].
        interrupted: What is said after Ctrl-C or SIGTERM, with the status 130, by a command that can go on later.
    """

    def decorate(main):
        @wraps(main)
        def decorated(argv: list[str] | None = None) -> int:
            try:
                with nullcontext() if interrupted is None else sigterm_as_ctrl_c():
                    status = main(argv) or 0
                sys.stdout.flush()  # here, where an error of it is caught
                return status
            except KeyboardInterrupt:
                if interrupted is None:
                    raise
                print(f"interrupted; {interrupted}", file=sys.stderr)
                return 130
            except BrokenPipeError:  # `hf-clt ... | head` has read enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141  # what a shell says of a program that SIGPIPE ended
            except (*USER_ERRORS, *others) as error:
                if os.environ.get("HF_CLT_DEBUG") == "1":
                    raise
                print(f"error: {one_line(error)}", file=sys.stderr)
                return 2

        return decorated

    return decorate


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, which clusters send before they take a machine back, raises KeyboardInterrupt as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_next(*words: object) -> None:
    """Names the command that usually comes next; capital words are for the user to fill in."""
    print(f"Next: {shlex.join(['hf-clt', *map(str, words)])}")
