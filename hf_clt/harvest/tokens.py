"""Text to packed blocks of tokens: `load_text_dataset` finds the text, `TokenStream` cuts it into batches.

The text is read as a sequence of *pieces*: a short document is one piece, a long one is cut at a space into pieces of
about 16,000 characters, so that time and memory stay bounded whatever a document's length. Pieces are numbered through
the whole text, and every decision that must be the same in every process is made on these numbers: the held-out text
is the first so many pieces, and process `rank` reads the pieces whose number is `rank` modulo `world_size`.
"""

import copy
import glob
import hashlib
import json
import logging
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import torch


logger = logging.getLogger(__name__)

PIECE_CHARACTERS = 16_384  # a longer document is cut into pieces of at most this length
GROUP_CHARACTERS = 262_144  # pieces are tokenized together until they hold this many characters ...
GROUP_PIECES = 1_024  # ... or are this many

RETRIES = 5  # times that datasets tries again what it reads over the network, 5 seconds apart
# Libraries that read over the network; not all of their errors are OSErrors.
NETWORK = ("aiohttp", "httpx", "httpx2", "httpcore", "urllib3", "requests", "http")

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_text_dataset(
    dataset,
    *,
    split="train",
    config_name=None,
    text_column="text",
    streaming=True,
    trust_remote_code=False,
    max_samples=None,
):
    """
    Opens a text dataset and checks that its text can be read.

    A path that exists is taken as a local file or folder, anything else as the name of a dataset on the Hub. Documents
    are the rows of the dataset; in a `.txt` file they are the paragraphs, separated by empty lines.

    Args:
        dataset (`str`):
            Name of a Hub dataset, a local `.txt`, `.jsonl`, `.json` or `.parquet` file, or a folder of such files
            (read in the order of their names; all of one kind, `.json` and `.jsonl` count as one).
        split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset. Local files are one split, `"train"`.
        config_name (`str`, *optional*):
            Configuration of the Hub dataset, for those that have several.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text. For `.txt` files it is always `"text"`.
        streaming (`bool`, *optional*, defaults to `True`):
            Whether to stream a Hub dataset instead of downloading it first. Local files are always streamed.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Accepted, but datasets 4 and later run no code from the Hub: a dataset that is a loading script is refused
            whatever this says.
        max_samples (`int`, *optional*):
            Use the first `max_samples` documents only.

    Returns:
        `datasets.IterableDataset`: the documents, with the column `text_column` alone.

    Raises:
        `ValueError`: if there is no such dataset, file, configuration, split or column, if it cannot be read, if it is
            empty, or if `max_samples` is not positive.
    """
    if max_samples is not None and max_samples <= 0:
        raise ValueError(
            f"max_samples is {max_samples}: give a positive number of documents, or None for all of them."
        )
    dataset = str(dataset)
    path = Path(dataset).expanduser()
    if path.exists():
        documents = _open_local(path, split, config_name)
    elif path.is_absolute() or dataset.startswith((".", "~")) or path.suffix.lower() in BUILDERS:
        raise ValueError(
            f"dataset {dataset!r}: there is no such file or folder; give a path that exists, or a Hub name"
        )
    else:
        documents = _open_hub(dataset, split, config_name, streaming, trust_remote_code)

    try:
        first = next(iter(documents), None)
    except Exception as error:  # whatever a file can hold or a server can answer
        raise ValueError(f"dataset {dataset!r} cannot be read: {_one_line(error)}") from error
    if first is None:
        raise ValueError(f"dataset {dataset!r}, split {split!r}, is empty: it has no documents.")
    if text_column not in first:
        raise ValueError(
            f"dataset {dataset!r} has no column {text_column!r}: name its text column, one of {', '.join(first)}."
        )
    documents = documents.select_columns([text_column])
    return documents if max_samples is None else documents.take(max_samples)


def _open_local(path, split, config_name):
    if config_name is not None:
        raise ValueError(f"config_name is {config_name!r}, but {str(path)!r} is local and has no configurations.")
    if split != "train":
        raise ValueError(f"{str(path)!r} has no split {split!r}: local files are one split, 'train'.")
    files = [path]
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            raise ValueError(
                f"{str(path)!r} was written by save_to_disk: write it with to_parquet or to_json instead."
            )
        everything = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        files = [file for file in everything if file.suffix.lower() in BUILDERS]
        others = [file.name for file in everything if file.suffix.lower() not in BUILDERS]
        if not files:
            found = ", ".join(others[:5]) or "no files"
            raise ValueError(f"folder {str(path)!r} holds no {', '.join(BUILDERS)} file (found: {found}).")
        if others:
            logger.warning("%s: left out %d files of other kinds: %s", path, len(others), ", ".join(others[:5]))
    suffixes = sorted({file.suffix.lower() for file in files})
    builders = {BUILDERS.get(suffix) for suffix in suffixes}
    if None in builders:
        raise ValueError(f"file {str(path)!r} is not one of {', '.join(BUILDERS)}: convert it to one of these.")
    if len(builders) > 1:
        raise ValueError(f"folder {str(path)!r} mixes {' and '.join(suffixes)} files: keep one kind in a folder.")
    for file in files:
        if "::" in str(file.resolve()):
            raise ValueError(f"{str(file)!r}: datasets takes '::' for a file within another; give a path without.")
    builder = builders.pop()
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    try:
        return datasets.load_dataset(
            builder,
            data_files={"train": [glob.escape(str(file.resolve())) for file in files]},
            split="train",
            streaming=True,
            **options,
        )
    except Exception as error:
        raise ValueError(f"dataset {str(path)!r} cannot be read: {_one_line(error)}") from error


def _open_hub(name, split, config_name, streaming, trust_remote_code):
    try:
        # every split, to be able to name those there are; it costs nothing when streaming
        splits = datasets.load_dataset(name, config_name, streaming=True) if streaming else None
        documents = splits.get(split) if streaming else datasets.load_dataset(name, config_name, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"dataset {name!r} is neither a local file or folder nor a dataset on the Hub that can be read: check the "
            f"name, and log in if it is private or gated ({_one_line(error)})"
        ) from error
    except OSError as error:
        raise ValueError(
            f"dataset {name!r} is no local file or folder, and the Hub cannot be reached for it: check the name and "
            f"the network ({_one_line(error)})"
        ) from error
    except Exception as error:  # the many ways of the network, the Hub and a repository's files
        if "scripts are no longer supported" in str(error):
            ignored = "trust_remote_code cannot change that" if trust_remote_code else "with trust_remote_code or not"
            raise ValueError(
                f"dataset {name!r} is a loading script, which datasets {datasets.__version__} does not run "
                f"({ignored}): use a copy in Parquet or JSON."
            ) from error
        raise ValueError(f"dataset {name!r}, split {split!r}, cannot be opened: {_one_line(error)}") from error
    if documents is None:
        raise ValueError(
            f"dataset {name!r} has no split {split!r}: it has {', '.join(splits)} "
            "(a slice of a split needs streaming off)."
        )
    return documents if streaming else documents.to_iterable_dataset()


def _one_line(error):
    text = " ".join(str(error).split())
    return text if text else type(error).__name__


def split_document(text, drop_space=False):
    """
    Cuts a document into pieces of at most `PIECE_CHARACTERS` characters, before a single space between two words where
    there is one, else before another white space, else anywhere.

    Args:
        text (`str`): The document.
        drop_space (`bool`): Leave out the space at which the text is cut: for tokenizers that put one in front of
            whatever they are given.

    Yields:
        `str`: the pieces, in order.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = _cut_point(text, start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
        yield text[start:cut]
        start = cut + 1 if drop_space and text[cut] == " " and cut + 1 < len(text) else cut
    yield text[start:]


def _cut_point(text, low, high):
    cut = text.rfind(" ", low, high)
    while cut > low:
        if not text[cut - 1].isspace() and not text[cut + 1].isspace():
            return cut
        cut = text.rfind(" ", low, cut)
    for cut in range(high - 1, low, -1):
        if text[cut].isspace():
            return cut
    return high


class StreamError(OSError):
    """The text could not be read on."""


def is_reading_error(error):
    """Whether text could not be read, by an OSError or an error of a network library, or is wrong in itself."""
    if isinstance(error, (ValueError, TypeError)):
        return False
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, OSError) or not modules.isdisjoint(NETWORK)


class TokenStream:
    """
    Packs the documents of a dataset into blocks of tokens: one epoch per iteration, resumable at every batch.

    Documents are tokenized without special tokens, each is followed by EOS, and the whole is cut into blocks of
    `context_size` tokens (`context_size - 1` after a BOS). No token is lost or repeated. Documents that are empty,
    white space or None are skipped. The last block of the stream is padded on the right.

    Long documents are tokenized in pieces (see [`split_document`]); with the usual tokenizers the tokens are those of
    the whole document, with others a token may differ at a cut.

    The held-out text is the smallest number of leading pieces that holds `heldout_tokens` counted tokens; the training
    stream begins right after it. Both are split over the processes piece by piece. With `world_size` above 1 the
    pieces of one long document go to different processes, and each piece is followed by EOS. Every process reads all
    of the text and tokenizes its share.

    What is read over the network is tried again by datasets, which warns of each retry. Where text cannot be read all
    the same, or a file vanishes, the stream stands where the last batch ended, and can go on from there.

    The dataset is copied (not its data), so one dataset can serve several streams at once. The constructor reads the
    beginning of the text, to find the held-out text and to see that there is enough.

    Args:
        dataset (`datasets.IterableDataset` or `datasets.Dataset`):
            The documents.
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's tokenizer. It must have an EOS token, which joins the documents.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text.
        context_size (`int`, *optional*, defaults to 128):
            T, tokens per block, BOS included.
        prepend_bos (`bool`, *optional*):
            Whether position 0 of each block is BOS; by default, when the tokenizer has one.
        exclude_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether special tokens (EOS between documents among them) are left out of `counted`.
        prompts_per_batch (`int`, *optional*, defaults to 8):
            P, blocks per batch. The last batch may have fewer.
        heldout_tokens (`int`, *optional*, defaults to 0):
            Size of the held-out text in counted tokens, at least (so for one process; split over several, where each
            packs its own blocks, it can be a few tokens less).
        heldout (`bool`, *optional*, defaults to `False`):
            Stream the held-out text, instead of what follows it. With fewer held-out pieces than processes, some of
            these streams are empty.
        rank (`int`, *optional*, defaults to 0):
            Number of this process.
        world_size (`int`, *optional*, defaults to 1):
            Number of processes.
        retries (`int`, *optional*, defaults to 5):
            How often datasets tries again, 5 seconds apart, what it reads over the network.

    Yields:
        `dict`: `input_ids` and `attention_mask` (P, T) int64; `counted` (P, T) bool, the tokens to train or measure
        on: never position 0, padding, or, if excluded, special tokens; `documents` (P, T) int64, index of the
        dataset's row each token comes from, -1 for BOS, EOS between documents and padding.

    Raises:
        `ValueError`: if an argument does not fit, if the text has too few tokens for the held-out text or nothing is
            left for training in some process, or if a document cannot be read or is not text (its index is named).
        [`StreamError`]: if the text cannot be read. The next iteration goes on at the same batch.
    """

    def __init__(
        self,
        dataset,
        tokenizer,
        *,
        text_column="text",
        context_size=128,
        prepend_bos=None,
        exclude_special_tokens=True,
        prompts_per_batch=8,
        heldout_tokens=0,
        heldout=False,
        rank=0,
        world_size=1,
        retries=RETRIES,
    ):
        if isinstance(dataset, datasets.Dataset):
            dataset = dataset.to_iterable_dataset()
        if not isinstance(dataset, datasets.IterableDataset):
            raise TypeError(f"dataset is a {type(dataset).__name__}: give one split, a Dataset or IterableDataset.")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token to join documents with: set tokenizer.eos_token.")
        if prepend_bos is None:
            prepend_bos = tokenizer.bos_token_id is not None
        if prepend_bos and tokenizer.bos_token_id is None:
            raise ValueError("prepend_bos is True, but the tokenizer has no BOS token: leave prepend_bos out.")
        if context_size < 2 + prepend_bos:
            raise ValueError(
                f"context_size is {context_size}: it must be at least {2 + prepend_bos} with "
                f"prepend_bos={prepend_bos}."
            )
        if prompts_per_batch < 1:
            raise ValueError(f"prompts_per_batch is {prompts_per_batch}: it must be at least 1.")
        if heldout_tokens < 0 or (heldout and heldout_tokens == 0):
            raise ValueError(
                f"heldout_tokens is {heldout_tokens}: it must be at least {int(heldout)} with heldout={heldout}."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}: it must be from 0 to world_size - 1, and world_size is {world_size}.")

        self.tokenizer = tokenizer
        self.text_column = text_column
        self.context_size = context_size
        self.prepend_bos = prepend_bos
        self.exclude_special_tokens = exclude_special_tokens
        self.prompts_per_batch = prompts_per_batch
        self.heldout_tokens = heldout_tokens
        self.heldout = heldout
        self.rank = rank
        self.world_size = world_size
        self.retries = retries
        # Whether text is read, or waited for, so that whoever raises from a signal handler now loses nothing.
        self.is_reading = False

        self._dataset = copy.deepcopy(dataset)  # never iterated itself: see _groups
        self._text_per_block = context_size - prepend_bos
        special = {tokenizer.eos_token_id, *tokenizer.all_special_ids}
        special.update(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._special_ids = np.array(sorted(special), dtype=np.int64)
        self._drop_space = _adds_space(tokenizer)

        with self._reading():
            self._heldout_pieces = self._find_heldout()
        self._pieces = self._pieces_of(rank, world_size)
        self.rewind()

    def _pieces_of(self, rank, world_size):
        if self.heldout:
            return range(rank, self._heldout_pieces, world_size)
        offset = (rank - self._heldout_pieces) % world_size
        return range(self._heldout_pieces + offset, sys.maxsize, world_size)

    def __iter__(self):
        while True:
            with self._reading():
                batch = self._next_batch()
            if batch is None:
                break
            yield batch
        self.rewind()

    def rewind(self):
        """Goes back to the start of the text."""
        self._position = None
        self._dataset_state = None  # the dataset's own state that led to the position; None: by counting documents
        self._reader = None

    def state_dict(self):
        """
        Returns:
            `dict`: where the stream stands, ready for `json.dump`. After the last batch of an epoch it stands at the
            end: a stream that loads this state has no batch left in its first iteration, and begins anew in the next.
        """
        return {"settings": self._settings(), "position": copy.deepcopy(self._position)}

    def load_state_dict(self, state):
        """
        Goes to where another stream on the same dataset stood: the next batch is the one it would have given next.
        `prompts_per_batch` may differ, the blocks go on from where they were.

        Args:
            state (`dict`): What `state_dict` returned, in the same process (`rank`) of as many processes.

        Raises:
            `ValueError`: if the state was taken with other settings, or from another text or tokenizer.
        """
        for name, value in self._settings().items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"the saved position in the text was taken with {name}={state['settings'].get(name)}, and now "
                    f"{name}={value}: resume with the same dataset and settings."
                )
        self.rewind()
        self._position = copy.deepcopy(state["position"])
        with self._reading():
            self._open()

    def go_on_from(self, states):
        """
        Goes on with this process's share after the documents that all of another number of processes had read.

        Args:
            states (`list[dict]`): What `state_dict` returned in each of them.

        Raises:
            `ValueError`: as [`load_state_dict`].
        """
        self.rewind()
        positions = [state["position"] for state in states]
        if None in positions:
            return
        first = min(states, key=lambda state: state["position"]["piece"])
        old = copy.copy(self)
        old.rank, old.world_size = first["settings"]["rank"], first["settings"]["world_size"]
        old._pieces = self._pieces_of(old.rank, old.world_size)
        old.load_state_dict(first)  # which checks that the text and the settings are the same
        start = {**first["position"], "dataset": old._dataset_state}
        with self._reading():
            self._position = self._after(start, min(p.get("next", -1) for p in positions))
            if self._position is None:  # no piece of this process is left
                self._left, self._reader = (np.empty(0, dtype=np.int64),) * 2, iter(())
            else:
                self._open()

    def _after(self, start, document):
        """The position of this process's first piece from `start` on that is of the document, or of a later one."""
        position = None
        for group_start, group in self._groups(start, self._pieces):
            ids, documents = self._flatten(group)
            later = documents >= document
            skip = int(later.argmax()) if later.any() else len(ids)
            digest = _digest(ids, documents)
            position = {**group_start, "tokens": len(ids), "digest": digest, "skip": skip, "next": document}
            position["dataset"] = _if_json(position["dataset"])
            if later.any():
                break
        return position

    def _settings(self):
        names = ("context_size", "prepend_bos", "exclude_special_tokens", "heldout_tokens", "heldout", "rank")
        settings = {name: getattr(self, name) for name in (*names, "world_size")}
        return {**settings, "heldout_pieces": self._heldout_pieces}

    @contextmanager
    def _reading(self):
        """While text is read: datasets tries as often as `retries` says, and what fails then is a [`StreamError`]."""
        names = "STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES"  # the first try included
        before = {name: getattr(datasets.config, name) for name in names if hasattr(datasets.config, name)}
        self.is_reading = True
        try:
            for name in before:
                setattr(datasets.config, name, self.retries + 1)
            yield
        except Exception as error:
            if not is_reading_error(error):
                raise
            reason = error.__cause__ or error  # of datasets' "Server Disconnected"
            raise StreamError(
                f"the text cannot be read, with stream_retries={self.retries} ({type(reason).__name__}: "
                f"{_one_line(reason)})"
            ) from error
        finally:
            self.is_reading = False
            for name, value in before.items():
                setattr(datasets.config, name, value)

    def _groups(self, start, pieces):
        """
        Reads the text from the piece that `start` describes.

        Args:
            start (`dict`, *optional*): `dataset`, the dataset's own state before the row that holds the piece (None:
                go there by counting rows); `document`, that row's index; `split`, the number of the piece in its
                document; `piece`, its number in the text. None is the beginning of the text.
            pieces (`range`): Numbers of the pieces to read.

        Yields:
            `(dict, list)`: the `start` of a group and its pieces, `(document, text, whether EOS follows)` each.
        """
        start = start or {"dataset": None, "document": 0, "split": 0, "piece": 0}
        rows = copy.deepcopy(self._dataset)
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
                raise ValueError(f"document {document} of the dataset cannot be read: {_one_line(error)}") from error
            if row is None:
                break
            text = self._text(row, document) if document >= start["document"] else ""
            parts = list(split_document(text, self._drop_space)) if text and not text.isspace() else []
            first_part = start["split"] if document == start["document"] else 0
            for split in range(first_part, len(parts)):
                if piece in pieces:
                    if not group:
                        group_start = {"dataset": state, "document": document, "split": split, "piece": piece}
                    # what follows a piece in the stream of one process of several is never its continuation
                    ends = split == len(parts) - 1 or pieces.step > 1
                    group.append((document, parts[split], ends))
                    characters += len(parts[split])
                    if characters >= GROUP_CHARACTERS or len(group) == GROUP_PIECES:
                        yield group_start, group
                        group, characters = [], 0
                piece += 1
            document += 1
        if group:
            yield group_start, group

    def _text(self, row, document):
        if self.text_column not in row:
            raise ValueError(
                f"document {document} of the dataset has no column {self.text_column!r}: text_column must be one of "
                f"{', '.join(row)}."
            )
        text = row[self.text_column]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise ValueError(
                f"document {document} of the dataset holds a {type(text).__name__} in column {self.text_column!r}: "
                "text_column must name a column of strings."
            )
        return text

    def _tokenize(self, group):
        """Token ids of each piece of a group, EOS included where it follows: a list of int64 arrays."""
        texts = [text for _, text, _ in group]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        eos = [self.tokenizer.eos_token_id]
        return [
            np.array(ids + eos if ends else ids, dtype=np.int64)
            for (_, _, ends), ids in zip(group, encoded["input_ids"], strict=True)
        ]

    def _flatten(self, group):
        """Token ids of a group, and the document each comes from (-1 for the EOS after one): two int64 arrays."""
        tokens = self._tokenize(group)
        documents = [
            np.full(len(ids), document, dtype=np.int64) for (document, _, _), ids in zip(group, tokens, strict=True)
        ]
        for (_, _, ends), row in zip(group, documents, strict=True):
            if ends:
                row[-1] = -1
        return np.concatenate(tokens), np.concatenate(documents)

    def _counted(self, ids, offset):
        """Which of the tokens count, when the first of them is number `offset` of its stream: a bool array."""
        position = (offset + np.arange(len(ids))) % self._text_per_block + self.prepend_bos
        counted = position != 0
        if self.exclude_special_tokens:
            counted &= ~np.isin(ids, self._special_ids)
        return counted

    def _find_heldout(self):
        """Number of leading pieces that are the held-out text; raises if it or what follows it has too few tokens."""
        heldout_pieces, found, offset = 0, 0, 0
        offsets, ready = [0] * self.world_size, set()  # per process: tokens so far; those with something to train on
        piece = 0
        for _, group in self._groups(None, range(sys.maxsize)):
            for ids in self._tokenize(group):
                if found < self.heldout_tokens:
                    found += int(self._counted(ids, offset).sum())
                    offset += len(ids)
                    heldout_pieces = piece + 1
                else:
                    rank = piece % self.world_size
                    if self._counted(ids, offsets[rank]).any():
                        ready.add(rank)
                    offsets[rank] += len(ids)
                piece += 1
                if found >= self.heldout_tokens and (self.heldout or len(ready) == self.world_size):
                    return heldout_pieces
        if piece == 0:
            raise ValueError(f"the dataset has no text: every document is empty in column {self.text_column!r}.")
        if found < self.heldout_tokens:
            raise ValueError(
                f"the dataset is too small: heldout_tokens (eval_tokens) is {self.heldout_tokens}, and all its text "
                f"gives {found} tokens to evaluate on: use more text (or more max_samples), or ask for fewer tokens."
            )
        raise ValueError(
            f"the dataset is too small: with heldout_tokens (eval_tokens) {self.heldout_tokens}, {found} tokens are "
            f"held out, and {len(ready)} of {self.world_size} processes have text left to train on: use more text (or "
            "more max_samples), hold out fewer tokens, or run fewer processes."
        )

    def _open(self):
        """Goes to the saved position: sets the reader, and the tokens that it had read but not yet given."""
        position = self._position
        if position is None:
            reader, nothing = self._groups(None, self._pieces), np.empty(0, dtype=np.int64)
            self._left, self._reader = (nothing, nothing), reader
            return
        # A dataset's own state is not always exact (it forgets a shuffle buffer); if the tokens it leads to are others
        # than those that were read, the documents are counted from the start instead, which is slow and exact.
        for state in [position["dataset"], None] if position["dataset"] else [None]:
            try:
                reader = self._groups({**position, "dataset": state}, self._pieces)
                start_and_group = next(reader, None)
            except (KeyError, IndexError, TypeError):  # the state of a dataset that is built otherwise
                if state is None:
                    raise
                continue
            if start_and_group is None:
                continue
            ids, documents = self._flatten(start_and_group[1])
            if _digest(ids, documents) == position["digest"]:
                self._dataset_state = state
                left = ids[position["skip"] :], documents[position["skip"] :]
                self._left, self._reader = left, reader
                return
        raise ValueError(
            f"the saved position in the text (document {position['document']}) holds other tokens now: resume with "
            "the dataset, the tokenizer and the max_samples that the run was started with."
        )

    def _next_batch(self):
        """The next batch, or None at the end of the text."""
        if self._reader is None:
            self._open()
        # Nothing is kept until the batch is whole, so that an error or Ctrl-C in between loses no token: without a
        # reader, the next call opens the text again where the last batch ended.
        reader, self._reader = self._reader, None
        (ids, documents), position = self._left, self._position
        wanted = self.prompts_per_batch * self._text_per_block
        while len(ids) < wanted:
            start_and_group = next(reader, None)
            if start_and_group is None:
                break
            start, group = start_and_group
            group_ids, group_documents = self._flatten(group)
            position = {**start, "tokens": len(group_ids), "digest": _digest(group_ids, group_documents)}
            ids, documents = np.concatenate([ids, group_ids]), np.concatenate([documents, group_documents])
        if len(ids) == 0:
            return None
        batch = self._pack(ids[:wanted], documents[:wanted])
        # What is left is always the end of the group read last.
        left = ids[wanted:], documents[wanted:]
        position = {**position, "dataset": _if_json(position["dataset"]), "skip": position["tokens"] - len(left[0])}
        unread = left[1][left[1] >= 0]
        position["next"] = int(unread[0] if len(unread) else documents.max())  # documents before it are read
        self.is_reading = False  # from here on the batch is given, and must not be lost on its way
        self._left, self._position, self._reader = left, position, reader
        return batch

    def _pack(self, ids, documents):
        """
        Blocks of a run of tokens that starts at the beginning of a block.

        Args:
            ids (`np.ndarray` of shape (n,)): Token ids.
            documents (`np.ndarray` of shape (n,)): The document of each.

        Returns:
            `dict`: the batch, see the class.
        """
        bos = int(self.prepend_bos)
        rows = -(-len(ids) // self._text_per_block)

        def blocks(values, filler, first):
            table = np.full(rows * self._text_per_block, filler, dtype=values.dtype)
            table[: len(values)] = values
            return np.pad(table.reshape(rows, -1), ((0, 0), (bos, 0)), constant_values=first)

        return {
            # Padding is masked: EOS, which the text has too, and not a padding token that the model may not have.
            "input_ids": torch.from_numpy(
                blocks(ids, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id if bos else 0)
            ),
            "attention_mask": torch.from_numpy(blocks(np.ones_like(ids), 0, 1)),
            "counted": torch.from_numpy(blocks(self._counted(ids, 0), False, False)),
            "documents": torch.from_numpy(blocks(documents, -1, -1)),
        }


def open_text(options, tokenizer, heldout=False, rank=0, world_size=1):
    """
    The stream that the options of a run name, so that whoever measures a CLT reads what its training held out.

    Args:
        options: Has the fields `dataset`, `dataset_split`, `dataset_config`, `dataset_text_column`, `streaming`,
            `trust_remote_code`, `max_samples`, `context_size`, `prepend_bos`, `exclude_special_tokens`,
            `store_batch_size_prompts`, `eval_tokens` and `stream_retries` of [`CLTTrainingArguments`].
        tokenizer (`PreTrainedTokenizerBase`): The language model's.
        heldout (`bool`, *optional*, defaults to `False`): Whether to give the held-out text, or the rest.
        rank, world_size (`int`, *optional*): This process, and how many share the text.

    Returns:
        [`TokenStream`]

    Raises:
        `ValueError`: as [`load_text_dataset`] and [`TokenStream`].
    """
    dataset = load_text_dataset(
        options.dataset,
        split=options.dataset_split,
        config_name=options.dataset_config,
        text_column=options.dataset_text_column,
        streaming=options.streaming,
        trust_remote_code=options.trust_remote_code,
        max_samples=options.max_samples,
    )
    return TokenStream(
        dataset,
        tokenizer,
        text_column=options.dataset_text_column,
        context_size=options.context_size,
        prepend_bos=options.prepend_bos,
        exclude_special_tokens=options.exclude_special_tokens,
        prompts_per_batch=options.store_batch_size_prompts or 8,  # None: of arguments that no device has settled
        heldout_tokens=options.eval_tokens,
        heldout=heldout,
        rank=rank,
        world_size=world_size,
        retries=options.stream_retries,
    )


def _adds_space(tokenizer):
    """Whether the tokenizer puts a space in front of its text, so that a text cut at a space must go on without it."""

    def tokens(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    whole, start, end = "The cat sat on the mat, and slept.", "The cat sat", " on the mat, and slept."
    if tokens(whole) == tokens(start) + tokens(end):
        return False
    return tokens(whole) == tokens(start) + tokens(end[1:])


def _digest(ids, documents):
    return hashlib.sha256(ids.tobytes() + documents.tobytes()).hexdigest()


def _if_json(state):
    """The state of a dataset if it can be written as JSON, else None: the documents are counted then."""
    try:
        return json.loads(json.dumps(state))
    except TypeError:
        return None


__all__ = ["StreamError", "TokenStream", "load_text_dataset", "open_text", "split_document"]
