"""Small helpers: names of files and repositories, writing files whole, JSON, numbers in words."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def local_or_hub(name: str) -> str:
    """
    A name of a folder, a file or a repository, so that it is read the same way later: a path that exists gets a
    leading `./` (or has its `/`), which no repository name has.
    """
    name = os.path.expanduser(name)
    is_plain = not os.path.isabs(name) and not name.startswith(".")
    return f"./{name}" if is_plain and os.path.exists(name) else name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Yields the name of a temporary file, which replaces `path` when the block succeeds, flushed to disk, and is removed
    when it raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file; a reader sees all of it or what was there before."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_json(record: Any, indent: int | None = 1) -> str:
    """
    A record as JSON that every reader accepts, with a line end: what is not finite is null. With an indent, a list of
    numbers or texts stays on one line.
    """

    def finite(value):
        if isinstance(value, dict):
            return {name: finite(entry) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(finite(record), indent=indent, allow_nan=False)
    # JSON has no line end inside a string, so this finds nothing but lists.
    lists = re.compile(r"\[\n\s*([^\[\]{}]*?)\n\s*\]")
    return lists.sub(lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text) + "\n"


def write_json(path: Path, record: Any, indent: int | None = 1) -> None:
    """Writes a record as a JSON file, see [`as_json`], whole or not at all."""
    write_text(path, as_json(record, indent))


def read_json(path: Path) -> Any:
    """
    What is in a JSON file.

    Raises:
        ValueError: If it is not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or move it away") from None


# -- messages and numbers in words ------------------------------------------------------------------------------------


def one_line(message: object, longest: int | None = None) -> str:
    """An error, or a text, on one line, cut after `longest` characters; the type of an error that says nothing."""
    text = " ".join(str(message).split()) or type(message).__name__
    return text if longest is None or len(text) <= longest else f"{text[:longest]}..."


def format_number(value: float | None, spec: str) -> str:
    """A number in the format `spec`, such as ".4f"; a dash for None."""
    return "-" if value is None else format(value, spec)


def format_size(num_bytes: float) -> str:
    """A number of bytes as "1.5 GB", "2.0 MB", "3.1 kB" or "12 B"; units of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """A time as "2 h 5 min", "5 min 3 s" or "3 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
