"""
Text: opens a dataset of the Hub or of local files, and reads its documents in pieces.

A short document is one piece; a long one is cut into pieces of about 16,000 characters, so that time and memory stay
bounded. Pieces are numbered through the whole text, and every decision that must be the same in every process is made
on these numbers: the held-out text is the first so many pieces, and of the others every `world_size`-th belongs to a
process.
"""

import glob
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets

from ..files import one_line


logger = logging.getLogger(__name__)

PIECE_CHARACTERS = 16_384  # a longer document is cut into pieces of at most this length
GROUP_CHARACTERS = 262_144  # pieces are read in groups that hold this many characters ...
GROUP_PIECES = 1_024  # ... or are this many

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Libraries that read over the network; not all of their errors are OSErrors.
NETWORK = ("aiohttp", "httpx", "httpx2", "httpcore", "urllib3", "requests", "http")
TRIES = "STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES"  # of datasets.config; the first try included
_LOCK = threading.Lock()
_READERS = {"count": 0, "own": {}}


# -- opening ----------------------------------------------------------------------------------------------------------


def load_text_dataset(
    dataset: str | Path,
    *,
    split: str = "train",
    config_name: str | None = None,
    text_column: str = "text",
    streaming: bool = True,
    max_samples: int | None = None,
) -> datasets.IterableDataset:
    """
    Opens a text dataset and checks that its text can be read.

    A path that exists is a local file or folder, anything else the name of a dataset on the Hub. Documents are the
    rows of the dataset; in a `.txt` file they are the paragraphs, separated by empty lines.

    Args:
        dataset: Name of a Hub dataset, a local `.txt`, `.jsonl`, `.json` or `.parquet` file, or a folder of such files
            (read in the order of their names; all of one kind, where `.json` and `.jsonl` count as one).
        split: Split of the dataset. Local files are one split, `"train"`.
        config_name: Configuration of the Hub dataset, for those that have several.
        text_column: Column that holds the text. For `.txt` files it is always `"text"`.
        streaming: Whether to stream a Hub dataset instead of downloading it first. Local files are always streamed.
        max_samples: Use the first `max_samples` documents only.

    Returns:
        The documents, with the column `text_column` alone.

    Raises:
        ValueError: If there is no such dataset, file, configuration, split or column, if it cannot be read, if it is
            empty, or if `max_samples` is not positive.
    """
    if max_samples is not None and max_samples <= 0:
        raise ValueError(
            f"max_samples is {max_samples}: give a positive number of documents, or None for all of them."
        )
    dataset = str(dataset)
    path = Path(dataset).expanduser()
    is_local = path.exists()
    is_path = path.is_absolute() or dataset.startswith((".", "~")) or path.suffix.lower() in BUILDERS
    if is_path and not is_local:
        raise ValueError(
            f"dataset {dataset!r}: there is no such file or folder; give a path that exists, or a Hub name"
        )
    files = _local_files(path, split, config_name) if is_local else None
    try:
        documents = _open_files(files) if is_local else _open_hub(dataset, config_name, split, streaming)
        first = next(iter(documents), None)
    except Exception as error:  # whatever a file can hold or a server can answer
        remedy = ""
        if isinstance(error, OSError) and not is_local:
            remedy = (
                "; it is no local file or folder, and the Hub does not give it: check the name and the network, and "
                "log in if it is private or gated"
            )
        raise ValueError(f"dataset {dataset!r} cannot be read ({one_line(error)}){remedy}") from error
    if first is None:
        raise ValueError(f"dataset {dataset!r}, split {split!r}, is empty: it has no documents.")
    if text_column not in first:
        raise ValueError(
            f"dataset {dataset!r} has no column {text_column!r}: name its text column, one of {', '.join(first)}."
        )
    documents = documents.select_columns([text_column])
    return documents if max_samples is None else documents.take(max_samples)


def _local_files(path: Path, split: str, config_name: str | None) -> list[Path]:
    """The files of text that a local path means, all of one kind."""
    if config_name is not None:
        raise ValueError(f"config_name is {config_name!r}, but {str(path)!r} is local and has no configurations.")
    if split != "train":
        raise ValueError(f"{str(path)!r} has no split {split!r}: local files are one split, 'train'.")
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise ValueError(f"file {str(path)!r} is not one of {', '.join(BUILDERS)}: convert it to one of these.")
        return [path]
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        raise ValueError(f"{str(path)!r} was written by save_to_disk: write it with to_parquet or to_json instead.")
    inside = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in inside if file.suffix.lower() in BUILDERS]
    others = [file.name for file in inside if file not in files]
    if not files:
        found = ", ".join(others[:5]) or "no files"
        raise ValueError(f"folder {str(path)!r} holds no {', '.join(BUILDERS)} file (found: {found}).")
    if others:
        logger.warning("%s: left out %d files of other kinds: %s", path, len(others), ", ".join(others[:5]))
    if len({BUILDERS[file.suffix.lower()] for file in files}) > 1:
        suffixes = sorted({file.suffix.lower() for file in files})
        raise ValueError(f"folder {str(path)!r} mixes {' and '.join(suffixes)} files: keep one kind in a folder.")
    return files


def _open_files(files: list[Path]) -> datasets.IterableDataset:
    builder = BUILDERS[files[0].suffix.lower()]
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    names = [glob.escape(str(file.resolve())) for file in files]
    return datasets.load_dataset(builder, data_files={"train": names}, split="train", streaming=True, **options)


def _open_hub(name: str, config_name: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
    documents = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    return documents if streaming else documents.to_iterable_dataset()


# -- errors of reading ------------------------------------------------------------------------------------------------


class StreamError(OSError):
    """The text cannot be read on; what was read before the error is not lost."""


@contextmanager
def reading_text(retries: int) -> Iterator[None]:
    """
    While text is read: datasets tries `retries` times again, 5 seconds apart, what it reads over the network; what
    fails all the same is raised as a [`StreamError`]. Several threads of a run may read at once.
    """
    _change_tries(1, retries + 1)
    try:
        yield
    except Exception as error:
        if isinstance(error, StreamError) or not is_reading_error(error):
            raise
        reason = error.__cause__ or error  # of datasets' "Server Disconnected"
        raise StreamError(
            f"the text cannot be read, with stream_retries={retries} ({type(reason).__name__}: {one_line(reason)})"
        ) from error
    finally:
        _change_tries(-1)


def _change_tries(readers: int, tries: int | None = None) -> None:
    """One reader more, with its number of tries, or one less; when there is none, datasets has its own again."""
    with _LOCK:
        if _READERS["count"] == 0:
            _READERS["own"] = {
                name: getattr(datasets.config, name) for name in TRIES if hasattr(datasets.config, name)
            }
        _READERS["count"] += readers
        if tries is not None or _READERS["count"] == 0:
            for name, own in _READERS["own"].items():
                setattr(datasets.config, name, own if tries is None else tries)


def is_reading_error(error: Exception) -> bool:
    """Whether a disk or a network failed, as opposed to text that is wrong in itself."""
    if isinstance(error, (ValueError, TypeError)):
        return False
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, OSError) or not modules.isdisjoint(NETWORK)


# -- reading ----------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """
    A piece of a document.

    Args:
        document: Row of the dataset.
        text: A part of it.
        is_end: Whether EOS follows.
    """

    document: int
    text: str
    is_end: bool


def split_document(text: str, drop_space: bool = False) -> Iterator[str]:
    """
    Cuts a document into pieces of at most `PIECE_CHARACTERS` characters, before a single space between two words where
    there is one, else before another white space, else anywhere.

    Args:
        text: The document.
        drop_space: Leave out the space at which the text is cut: for tokenizers that put one in front of their text.

    Yields:
        The pieces, in order.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = _cut_point(text, start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
        yield text[start:cut]
        start = cut + 1 if drop_space and text[cut] == " " and cut + 1 < len(text) else cut
    yield text[start:]


def _cut_point(text: str, low: int, high: int) -> int:
    cut = text.rfind(" ", low, high)
    while cut > low:
        if not text[cut - 1].isspace() and not text[cut + 1].isspace():
            return cut
        cut = text.rfind(" ", low, cut)
    for cut in range(high - 1, low, -1):
        if text[cut].isspace():
            return cut
    return high


def read_groups(
    rows: datasets.IterableDataset, text_column: str, pieces: range, start: dict | None, drop_space: bool
) -> Iterator[tuple[dict, list[Piece]]]:
    """
    Reads the text in groups of pieces, to be tokenized together. Documents that are empty, white space or None have
    none.

    Args:
        rows: The documents. They are read by nobody else.
        text_column: Column that holds the text.
        pieces: Numbers of the pieces to read.
        start: Where to begin: `document`, the row that holds the first piece; `dataset`, the dataset's own state
            before this row (None: go there by counting rows); `split`, the number of the piece in its document;
            `piece`, its number in the text. None is the beginning of the text.
        drop_space: As of [`split_document`].

    Yields:
        The `start` of a group, and the group.

    Raises:
        ValueError: If a document cannot be read or is not text; the message has its row.
    """
    start = start or {"dataset": None, "document": 0, "split": 0, "piece": 0}
    document = 0
    if start["dataset"] is not None:
        rows.load_state_dict(start["dataset"])
        document = start["document"]
    iterator = iter(rows)
    piece = start["piece"]
    group, group_start, characters = [], None, 0
    while piece < pieces.stop:
        state = rows.state_dict()
        try:
            row = next(iterator, None)
        except ValueError as error:  # broken UTF-8, JSON or Parquet
            raise ValueError(f"document {document} of the dataset cannot be read: {one_line(error)}") from error
        if row is None:
            break
        text = _text_of(row, text_column, document) if document >= start["document"] else ""
        parts = list(split_document(text, drop_space)) if text and not text.isspace() else []
        first_part = start["split"] if document == start["document"] else 0
        for split in range(first_part, len(parts)):
            if piece in pieces:
                if not group:
                    group_start = {"dataset": state, "document": document, "split": split, "piece": piece}
                # What follows a piece in the share of one process of several is never its continuation.
                is_end = split == len(parts) - 1 or pieces.step > 1
                group.append(Piece(document, parts[split], is_end))
                characters += len(parts[split])
                if characters >= GROUP_CHARACTERS or len(group) == GROUP_PIECES:
                    yield group_start, group
                    group, characters = [], 0
            piece += 1
        document += 1
    if group:
        yield group_start, group


def _text_of(row: dict, text_column: str, document: int) -> str:
    if text_column not in row:
        raise ValueError(
            f"document {document} of the dataset has no column {text_column!r}: text_column must be one of "
            f"{', '.join(row)}."
        )
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"document {document} of the dataset holds a {type(text).__name__} in column {text_column!r}: text_column "
            "must name a column of strings."
        )
    return text or ""
