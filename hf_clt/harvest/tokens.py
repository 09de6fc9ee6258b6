"""Tokens: packs the pieces of a text into blocks, and blocks into extraction batches for the language model."""

import copy
import hashlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .ahead import ReadAhead
from .text import Piece, load_text_dataset, read_groups, reading_text


if TYPE_CHECKING:
    import argparse

    from ..training.arguments import CLTTrainingArguments

RETRIES = 5  # times that datasets tries again what it reads over the network
NO_TOKENS = np.empty(0, dtype=np.int64)
# One at a time: streams that share a tokenizer may be read in two threads, and not every tokenizer allows that.
TOKENIZING = threading.Lock()
CLOSING_SECONDS = 5.0  # to wait for a read that is going on


class TokenStream:
    """
    Packs the documents of a dataset into blocks of tokens: one epoch per iteration, resumable at every batch.

    Documents are tokenized without special tokens, each is followed by EOS, and the whole is cut into blocks of
    `context_size` tokens (`context_size - 1` after a BOS). No token is lost or repeated. Documents that are empty,
    white space or None are skipped. The last block of the stream is padded on the right.

    Long documents are tokenized in pieces (see [`split_document`]); with the usual tokenizers the tokens are those of
    the whole document, with others a token may differ at a cut.

    The held-out text is the smallest number of leading pieces that holds `heldout_tokens` counted tokens; the training
    stream begins right after it. Both are split over the processes piece by piece: every process reads all of the
    text, tokenizes its share, and puts EOS after each of its pieces.

    When text cannot be read, the stream stands where the last batch ended, and can go on from there.

    With `read_ahead`, a thread reads and tokenizes the next batches of an epoch, while those before are worked on.
    Batches, positions and errors are the same, and come at the same batch; `close` ends the thread.

    The dataset is copied (not its data), so one dataset can serve several streams at once. The constructor reads the
    beginning of the text, to find the held-out text and to see that there is enough.

    Args:
        dataset: The documents.
        tokenizer: The language model's tokenizer. It must have an EOS token, which joins the documents.
        text_column: Column that holds the text.
        context_size: T, tokens per block, BOS included.
        prepend_bos: Whether position 0 of each block is BOS; None: when the tokenizer has one.
        exclude_special_tokens: Whether special tokens (EOS between documents among them) do not count.
        prompts_per_batch: P, blocks per batch. The last batch may have fewer.
        heldout_tokens: Least size of the held-out text in counted tokens (as one process packs it; split over several
            it can be a few tokens less).
        heldout: Stream the held-out text, instead of what follows it. With fewer held-out pieces than processes, some
            of these streams are empty.
        rank: Number of this process.
        world_size: Number of processes.
        retries: How often datasets tries again what it reads over the network.
        read_ahead: Batches that may be read ahead; 0: each is read when it is asked for.

    Attributes:
        is_reading (`bool`): Whether text is read, or waited for: an exception raised by a signal handler then loses no
            token.

    Yields:
        `dict`: `input_ids` and `attention_mask` (P, T) int64; `counted` (P, T) bool, the tokens to train or measure
        on: never position 0, padding, or, if excluded, special tokens; `documents` (P, T) int64, index of the
        dataset's row each token comes from, -1 for BOS, EOS between documents and padding.

    Raises:
        TypeError: If the dataset is no `Dataset` or `IterableDataset`.
        ValueError: If an argument does not fit, if the text has too few tokens for the held-out text or nothing is
            left for training in some process, or if a document cannot be read or is not text (its index is named).
        [`StreamError`]: If the text cannot be read. The next iteration goes on at the same batch.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset | datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text_column: str = "text",
        context_size: int = 128,
        prepend_bos: bool | None = None,
        exclude_special_tokens: bool = True,
        prompts_per_batch: int = 8,
        heldout_tokens: int = 0,
        heldout: bool = False,
        rank: int = 0,
        world_size: int = 1,
        retries: int = RETRIES,
        read_ahead: int = 0,
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
        for name, value, least in (
            ("context_size", context_size, 2 + prepend_bos),
            ("prompts_per_batch", prompts_per_batch, 1),
            ("heldout_tokens", heldout_tokens, int(heldout)),
            ("read_ahead", read_ahead, 0),
        ):
            if value < least:
                raise ValueError(
                    f"{name} is {value}: it must be at least {least} with prepend_bos={prepend_bos} and "
                    f"heldout={heldout}."
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
        self.read_ahead = read_ahead
        self.is_reading = False
        self._reader: ReadAhead | None = None  # of the batches after `_position`; it has what is `_opened` then

        self._dataset = dataset
        self._text_per_block = context_size - prepend_bos
        special = {tokenizer.eos_token_id, *tokenizer.all_special_ids}
        special.update(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._special_ids = np.array(sorted(special), dtype=np.int64)
        self._drop_space = _adds_space(tokenizer)
        with self._reading():
            self._heldout_pieces = self._find_heldout()
        self._pieces = self._pieces_of(rank, world_size)
        self.rewind()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            with self._reading():
                batch = self._next_batch()
            if batch is None:
                break
            yield batch
        self.rewind()

    def rewind(self) -> None:
        """Goes back to the start of the text."""
        self._stop_reader()
        self._position = None  # behind the last batch that was given; None: at the beginning
        self._opened = None  # the text from there on: the rest of the last group, and a reader of the next ones

    def close(self) -> None:
        """
        Ends the thread that reads ahead; the next iteration goes on at the same batch. A thread that waits for a
        network is not waited for, and ends when it has an answer.
        """
        self._stop_reader()
        if self._reader is not None:
            self._reader.join(CLOSING_SECONDS)

    def _stop_reader(self) -> None:
        if self._reader is not None:
            self._reader.stop()

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """
        Where the stream stands, ready for `json.dump`. After the last batch of an epoch it stands at the end: a stream
        that loads this state has no batch left in its first iteration, and begins anew in the next.
        """
        return {"settings": self._settings(), "position": copy.deepcopy(self._position)}

    def load_state_dict(self, state: dict) -> None:
        """
        Goes to where another stream on the same dataset stood: the next batch is the one it would have given next.
        `prompts_per_batch` may differ, the blocks go on from where they were.

        Args:
            state: What `state_dict` returned, in the same process (`rank`) of as many processes.

        Raises:
            ValueError: If the state was taken with other settings, or from another text or tokenizer.
        """
        self._check_settings(state.get("settings", {}))
        self.rewind()
        self._position = copy.deepcopy(state["position"])
        with self._reading():
            self._opened = self._open(self._position, self._pieces)[1:]

    def continue_after(self, states: list[dict]) -> None:
        """
        Continues with this process's share after the documents that all of another number of processes had read.

        Args:
            states: What `state_dict` returned in each of them.

        Raises:
            ValueError: As [`load_state_dict`].
        """
        for state in states:
            self._check_settings({**state.get("settings", {}), "rank": self.rank, "world_size": self.world_size})
        self.rewind()
        positions = [state["position"] for state in states]
        if None in positions:
            return
        first = min(states, key=lambda state: state["position"]["piece"])
        share = first["settings"]["rank"], first["settings"]["world_size"]
        document = min(position.get("next", -1) for position in positions)  # all before it was read
        with self._reading():
            # At its own position, to see that the text is the same; from there on to this process's first piece.
            start = self._open(first["position"], self._pieces_of(*share))[0]
            reader = self._groups(self._pieces, start)
            self._opened = NO_TOKENS, NO_TOKENS, reader  # no piece of this process may be left
            for group_start, group in reader:
                ids, documents = self._tokenize(group)
                later = documents >= document
                skip = int(later.argmax()) if later.any() else len(ids)
                self._position = _position_in(group_start, ids, documents, skip=skip, next=document)
                self._opened = ids[skip:], documents[skip:], reader
                if later.any():
                    break

    def _settings(self) -> dict:
        names = ("context_size", "prepend_bos", "exclude_special_tokens", "heldout_tokens", "heldout", "rank")
        settings = {name: getattr(self, name) for name in (*names, "world_size")}
        return {**settings, "heldout_pieces": self._heldout_pieces}

    def _check_settings(self, settings: dict) -> None:
        for name, value in self._settings().items():
            if settings.get(name) != value:
                raise ValueError(
                    f"the saved position in the text was taken with {name}={settings.get(name)}, and now "
                    f"{name}={value}: resume with the same dataset and settings."
                )

    # -- reading ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self):
        self.is_reading = True
        try:
            with reading_text(self.retries):
                yield
        finally:
            self.is_reading = False

    def _pieces_of(self, rank: int, world_size: int) -> range:
        """Numbers of the pieces of a process."""
        if self.heldout:
            return range(rank, self._heldout_pieces, world_size)
        offset = (rank - self._heldout_pieces) % world_size
        return range(self._heldout_pieces + offset, sys.maxsize, world_size)

    def _groups(self, pieces: range, start: dict | None = None) -> Iterator[tuple[dict, list[Piece]]]:
        dataset = copy.deepcopy(self._dataset)  # which other readers of it do not disturb
        return read_groups(dataset, self.text_column, pieces, start, self._drop_space)

    def _tokenize(self, group: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a group, and the document each comes from (-1 for the EOS after one): (n,) int64 each."""
        texts = [piece.text for piece in group]
        with TOKENIZING:
            encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids, documents = [], []
        for piece, found in zip(group, encoded["input_ids"], strict=True):
            ids += found
            documents += [piece.document] * len(found)
            if piece.is_end:
                ids.append(self.tokenizer.eos_token_id)
                documents.append(-1)
        return np.array(ids, dtype=np.int64), np.array(documents, dtype=np.int64)

    def _counted(self, ids: np.ndarray, offset: int) -> np.ndarray:
        """Which of the tokens count, when the first of them is number `offset` of its stream: (n,) bool."""
        position = (offset + np.arange(len(ids))) % self._text_per_block + self.prepend_bos
        counted = position != 0
        if self.exclude_special_tokens:
            counted &= ~np.isin(ids, self._special_ids)
        return counted

    def _find_heldout(self) -> int:
        """Number of leading pieces that are the held-out text; raises if it or what follows it has too few tokens."""
        heldout_pieces, found, offset = 0, 0, 0
        offsets, ready = [0] * self.world_size, set()  # per process: tokens so far; those with something to train on
        number = -1
        pieces = (piece for _, group in self._groups(range(sys.maxsize)) for piece in group)
        for number, piece in enumerate(pieces):
            ids, _ = self._tokenize([piece])
            if found < self.heldout_tokens:
                found += int(self._counted(ids, offset).sum())
                offset += len(ids)
                heldout_pieces = number + 1
            else:
                rank = number % self.world_size
                if self._counted(ids, offsets[rank]).any():
                    ready.add(rank)
                offsets[rank] += len(ids)
            if found >= self.heldout_tokens and (self.heldout or len(ready) == self.world_size):
                return heldout_pieces
        if number == -1:
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

    def _open(self, position: dict | None, pieces: range) -> tuple[dict | None, np.ndarray, np.ndarray, Iterator]:
        """
        The text from a position on: where its group starts, tokens and documents of the group behind the position, and
        a reader of the next groups.

        A dataset's own state is not always exact (it forgets a shuffle buffer). If the tokens it leads to are others
        than those that were read, the documents are counted from the start instead, which is slow and exact.
        """
        if position is None:
            return None, NO_TOKENS, NO_TOKENS, self._groups(pieces)
        for state in (position["dataset"], None):
            start = {**position, "dataset": state}
            try:
                reader = self._groups(pieces, start)
                _, group = next(reader, (None, None))
            except (KeyError, IndexError, TypeError):  # the state of a dataset that is built otherwise
                if state is None:
                    raise
                continue
            if group is None:
                continue
            ids, documents = self._tokenize(group)
            if _digest(ids, documents) == position["digest"]:
                return start, ids[position["skip"] :], documents[position["skip"] :], reader
        raise ValueError(
            f"the saved position in the text (document {position['document']}) holds other tokens now: resume with "
            "the dataset, the tokenizer and the max_samples that the run was started with."
        )

    def _next_batch(self) -> dict[str, torch.Tensor] | None:
        """The next batch; None at the end of the text."""
        if self.read_ahead == 0:
            return self._read_batch()
        try:
            if self._reader is None or self._reader.stopped:
                source = copy.copy(self)
                # Opened here, since fsspec, in whose memory a dataset's files are, cannot be copied in another thread.
                source._opened = self._opened or self._open(self._position, self._pieces)[1:]
                self._opened = None
                self._reader = ReadAhead(source._with_positions(), self.read_ahead)
            batch, position = self._reader.take()
            self.is_reading = False  # from here on the batch is given
        except StopIteration:
            self._stop_reader()
            return None
        except BaseException:  # an error of the text, or Ctrl-C: the text is opened again where the last batch ended
            self._stop_reader()
            raise
        self._position = position
        return batch

    def _with_positions(self) -> Iterator[tuple[dict[str, torch.Tensor], dict]]:
        """The batches up to the end of the text, and the position behind each."""
        while True:
            with reading_text(self.retries):
                batch = self._read_batch()
            if batch is None:
                return
            yield batch, self._position

    def _read_batch(self) -> dict[str, torch.Tensor] | None:
        """Reads the next batch; None at the end of the text."""
        # The stream moves on when the batch is whole. After an error or Ctrl-C in between, the next call opens the
        # text again where the last batch ended: no token is lost.
        opened, self._opened = self._opened, None
        position = self._position
        ids, documents, reader = opened or self._open(position, self._pieces)[1:]
        wanted = self.prompts_per_batch * self._text_per_block
        while len(ids) < wanted:
            start, group = next(reader, (None, None))
            if group is None:
                break
            group_ids, group_documents = self._tokenize(group)
            position = _position_in(start, group_ids, group_documents)
            ids, documents = np.concatenate([ids, group_ids]), np.concatenate([documents, group_documents])
        if len(ids) == 0:
            return None
        batch = self._pack(ids[:wanted], documents[:wanted])
        left = ids[wanted:], documents[wanted:]  # always the end of the group read last
        unread = left[1][left[1] >= 0]
        next_document = int(unread[0] if len(unread) else documents.max())  # all before it was read
        position = {**position, "skip": position["tokens"] - len(left[0]), "next": next_document}
        self.is_reading = False  # from here on the batch is given, and must not be lost on its way
        self._position, self._opened = position, (*left, reader)
        return batch

    def _pack(self, ids: np.ndarray, documents: np.ndarray) -> dict[str, torch.Tensor]:
        """A batch of the tokens (n,) that stand at the beginning of a block and behind, see the class."""
        bos = int(self.prepend_bos)
        rows = -(-len(ids) // self._text_per_block)

        def blocks(values, padding, first):
            table = np.full(rows * self._text_per_block, padding, dtype=values.dtype)
            table[: len(values)] = values
            table = np.pad(table.reshape(rows, -1), ((0, 0), (bos, 0)), constant_values=first)
            return torch.from_numpy(table)

        return {
            # Padding is masked: EOS, which the text has too, and not a padding token that the model may not have.
            "input_ids": blocks(ids, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id if bos else 0),
            "attention_mask": blocks(np.ones_like(ids), 0, 1),
            "counted": blocks(self._counted(ids, 0), False, False),
            "documents": blocks(documents, -1, -1),
        }


def open_text(
    options: "CLTTrainingArguments | argparse.Namespace",
    tokenizer: PreTrainedTokenizerBase,
    heldout: bool = False,
    rank: int = 0,
    world_size: int = 1,
    read_ahead: int = 0,
) -> TokenStream:
    """
    The stream that the options of a run name, so that whoever measures a CLT reads what its training held out.

    Args:
        options: Has the fields `dataset`, `dataset_split`, `dataset_config`, `dataset_text_column`, `streaming`,
            `max_samples`, `context_size`, `prepend_bos`, `exclude_special_tokens`, `store_batch_size_prompts`,
            `eval_tokens` and `stream_retries` of [`CLTTrainingArguments`].
        tokenizer: The language model's.
        heldout: Whether to give the held-out text, or the rest.
        rank, world_size: This process, and how many share the text.
        read_ahead: Batches that a thread may read ahead.

    Raises:
        ValueError: As [`load_text_dataset`] and [`TokenStream`].
    """
    dataset = load_text_dataset(
        options.dataset,
        split=options.dataset_split,
        config_name=options.dataset_config,
        text_column=options.dataset_text_column,
        streaming=options.streaming,
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
        read_ahead=read_ahead,
    )


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space in front of its text, so that a text cut at a space must go on without it."""

    def tokens(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    whole, start, end = "The cat sat on the mat, and slept.", "The cat sat", " on the mat, and slept."
    if tokens(whole) == tokens(start) + tokens(end):
        return False
    return tokens(whole) == tokens(start) + tokens(end[1:])


def _position_in(start: dict, ids: np.ndarray, documents: np.ndarray, **place) -> dict:
    """A position in the group that begins at `start` and has these tokens."""
    return {**start, "tokens": len(ids), "digest": _digest(ids, documents), **place}


def _digest(ids: np.ndarray, documents: np.ndarray) -> str:
    return hashlib.sha256(ids.tobytes() + documents.tobytes()).hexdigest()
