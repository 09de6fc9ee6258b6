"""Files: whether a name is a path, writing so that no half of a file is ever seen, JSON that every reader takes."""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path


def local_or_hub(name: str) -> str:
    """
    A name that may be a folder's, a file's or a repository's, so that it stays what it is now wherever it is read
    later: a path that exists begins with `./` or `/`, as no name of a repository does.
    """
    name = os.path.expanduser(name)
    is_plain = not os.path.isabs(name) and not name.startswith(".")
    return f"./{name}" if is_plain and os.path.exists(name) else name


@contextmanager
def replacing(path: Path):
    """
    Yields a temporary name that takes the place of `path` when the block ends well and its content is on the disk, and
    is removed otherwise.
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
    """Writes a text file so that at no time a part of it stands under its name."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_json(record, indent: int | None = 1) -> str:
    """A record as JSON that every reader takes, with a line end: what is not finite is null."""

    def finite(value):
        if isinstance(value, dict):
            return {name: finite(entry) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), indent=indent, allow_nan=False) + "\n"


__all__ = ["as_json", "local_or_hub", "replacing", "write_text"]
