"""The activation buffer: harvested activations of many documents, mixed, each handed out exactly once."""

import logging
from collections import deque
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .dealing import tensors_of
from .harvester import ActivationError, without_bad_rows


logger = logging.getLogger(__name__)


@dataclass
class Harvested:
    """
    An extraction batch that the language model has read, or on a GPU is reading: `done` says when it has. `total` is
    finite if all activations are.
    """

    tokens: dict[str, torch.Tensor]
    inputs: torch.Tensor
    labels: torch.Tensor
    total: torch.Tensor
    done: torch.cuda.Event | None


class ActivationBuffer:
    """
    Mixes the activations of many extraction batches and hands them out in training batches.

    The buffer is filled, sampled at random without replacement, and refilled when half of it has been read. Iterating
    gives one epoch of the text: every counted token exactly once, the last batch possibly short. The next iteration
    gives the next epoch, in another order.

    With `overlap` the extraction batches of the next refill are harvested ahead, a few after each training batch: on a
    GPU on a stream of their own, so that language model and CLT share the GPU and nothing waits. The batches and their
    order are the same; the activations that wait take up to half the buffer's memory once more.

    After an error, of the text or of the language model, the buffer stands where it stood before the batch that could
    not be given: its state can be saved, and it can be iterated again, and nothing is lost or repeated.

    Args:
        tokens ([`TokenStream`]): The text, in extraction batches.
        harvester ([`Harvester`] or [`ActivationCache`]): Gives their activations.
        n_batches (`int`): Extraction batches that the buffer holds.
        batch_size (`int`): N, tokens per training batch.
        dtype (`torch.dtype`): Type in which activations are kept and handed out.
        device: Where activations are kept.
        seed (`int`): Seed of the sampling.
        progress (`bool`): Whether the first fill, which can take minutes, shows a progress bar.
        overlap (`bool`): Whether to harvest ahead.
        skip_bad (`bool`): Whether to leave out blocks in which the language model gives NaN or infinity, instead of
            raising.

    Attributes:
        skipped_tokens (`int`): Counted tokens of the blocks left out so far.

    Yields:
        `dict`: `inputs` and `labels`, (N, L, D) each, raw; row n of both is the same token.

    Raises:
        ValueError: If `batch_size` is larger than the buffer.
        [`ActivationError`]: While iterating, if an activation is NaN or infinite, without `skip_bad`.
    """

    def __init__(
        self,
        tokens,
        harvester,
        *,
        n_batches: int = 32,
        batch_size: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: bool = False,
        overlap: bool = False,
        skip_bad: bool = False,
    ):
        self.rows_per_harvest = tokens.prompts_per_batch * (
            tokens.context_size - 1
        )  # at most: position 0 never counts
        self.capacity = n_batches * self.rows_per_harvest
        if batch_size > self.capacity:
            raise ValueError(
                f"batch_size={batch_size} is larger than the buffer, which holds {self.capacity} tokens; lower "
                "batch_size or raise n_batches_in_buffer"
            )
        self.tokens, self.harvester, self.batch_size = tokens, harvester, batch_size
        self.dtype, self.progress = dtype, progress
        # Room for one more extraction batch beside an unread training batch, so that none is short but the last.
        num_slots = max(self.capacity, batch_size + self.rows_per_harvest)
        shape = (num_slots, harvester.num_layers, harvester.d_model)
        self.inputs = torch.empty(shape, dtype=dtype, device=device)
        self.labels = torch.empty(shape, dtype=dtype, device=device)
        self.generator = torch.Generator().manual_seed(seed)
        # Slots that hold unread tokens, in the random order in which they will be read, from `read` on.
        self.order = torch.empty(0, dtype=torch.int64)
        self.read = 0
        # Where each slot's token came from: the number of the extraction batch and the row in it. With the tokens of
        # the batches that still have unread rows, this is all that a checkpoint needs to restore the buffer.
        self.slot_batch = torch.zeros(num_slots, dtype=torch.int64)
        self.slot_row = torch.zeros(num_slots, dtype=torch.int64)
        self.live_batches: dict[int, dict] = {}
        self.num_harvested = 0
        self.epoch = 0
        self._text = None  # iterator over the rest of this epoch's text; None: not started
        self._text_ended = False  # the text of this epoch has been read, though perhaps not yet all of the buffer
        self.skip_bad, self.skipped_tokens = skip_bad, 0
        self.overlap = overlap
        self.ahead: deque[Harvested] = deque()
        self.waiting: deque[dict] = deque()  # extraction batches that were read, and are harvested before the text
        self.stream = None  # that harvests run on; None: the current one
        if overlap and (device := harvester.device).type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the weights may still be on their way

    @property
    def num_unread(self) -> int:
        return len(self.order) - self.read

    @property
    def num_ready(self) -> int:
        """How many batches can be given before text or language model are asked for more, where something may fail."""
        above_half = -(-(self.num_unread - self.capacity // 2) // self.batch_size)
        return 0 if self.overlap else max(0, min(above_half, self.num_unread // self.batch_size))

    def __iter__(self):
        while True:
            self.fill()
            if self.num_unread == 0:
                break
            yield self._next_batch()
        self._text, self._text_ended = None, False
        self.epoch += 1

    def endless(self):
        """Epoch after epoch; raises ValueError if the text has no token that counts."""
        empty_epochs = 0
        while empty_epochs < 2:  # one may be empty: a run resumed at the end of its text
            empty_epochs += 1
            for batch in self:
                empty_epochs = 0
                yield batch
        raise ValueError("dataset: the text has no token that counts for training; give more text")

    def fill(self) -> None:
        """Refills the buffer if half of it has been read, or if it holds less than a batch, and the text goes on."""
        if self.num_unread > self.capacity // 2 and self.num_unread >= self.batch_size:
            return
        if self._text is None:
            self._text = iter(self.tokens)
        unread = self.order[self.read :]
        is_free = torch.ones(len(self.inputs), dtype=torch.bool)
        is_free[unread] = False
        free = is_free.nonzero().squeeze(1)
        filled, taken = 0, []
        before = self.num_harvested, self.skipped_tokens
        first = self.num_harvested == 0 and self.progress
        with tqdm(total=len(free), desc="Filling the buffer", unit="token", unit_scale=True, disable=not first) as bar:
            try:
                while len(free) - filled >= self.rows_per_harvest:
                    harvested = self.ahead.popleft() if self.ahead else self._harvest_next()
                    if harvested is None:
                        break
                    taken.append(harvested.tokens)
                    added = self._store(harvested, free[filled:])
                    filled += added
                    bar.update(added)
            except BaseException:
                self._undo_fill(taken, *before)
                raise
        if filled:
            unread = torch.cat([unread, free[:filled]])
            self.order = unread[torch.randperm(len(unread), generator=self.generator)]
            self.read = 0

    def _undo_fill(self, taken: list[dict], num_harvested: int, skipped_tokens: int) -> None:
        """Takes back a fill that failed; what it stored lies in slots that are free."""
        self.waiting = deque([*taken, *(harvested.tokens for harvested in self.ahead), *self.waiting])
        self.ahead.clear()
        for number in range(num_harvested, self.num_harvested):
            self.live_batches.pop(number, None)
        self.num_harvested, self.skipped_tokens = num_harvested, skipped_tokens

    def _harvest_next(self) -> Harvested | None:
        """Harvests the next extraction batch of the epoch; None at its end."""
        if not self.waiting:
            try:
                batch = next(self._text, None)
            except BaseException:
                self._text = iter(self.tokens)  # an iterator that has failed looks like the end of the text
                raise
            if batch is None:
                self._text_ended = True  # and the stream stands at its beginning again
                return None
            self.waiting.append(batch)
        harvested = self._harvest(self.waiting[0])
        self.waiting.popleft()
        return harvested

    def _harvest(self, batch: dict) -> Harvested:
        with torch.cuda.stream(self.stream):
            inputs, labels, total = self.harvester.read(batch, dtype=self.dtype)
            done = self.stream.record_event() if self.stream is not None else None
        return Harvested(batch, inputs, labels, total, done)

    def _harvest_ahead(self, read: int) -> None:
        """Keeps as many tokens ready for the next fill as have been read since the last one: they will fit."""
        ready = sum(len(harvested.inputs) for harvested in self.ahead)
        while (self.waiting or not self._text_ended) and ready + self.rows_per_harvest <= read:
            harvested = self._harvest_next()
            if harvested is not None:
                self.ahead.append(harvested)
                ready += len(harvested.inputs)

    def _received(self, harvested: Harvested) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels, (N, L, D) each, when the language model has given them."""
        if harvested.done is not None:
            stream = torch.cuda.current_stream(harvested.inputs.device)
            stream.wait_event(harvested.done)
            for tensor in (harvested.inputs, harvested.labels, harvested.total):
                tensor.record_stream(stream)  # its memory is not used again before this stream has read it
        return harvested.inputs, harvested.labels

    def _store(self, harvested: Harvested, slots: torch.Tensor) -> int:
        """Puts an extraction batch into the first of the given slots; returns the number of tokens."""
        tokens, (inputs, labels) = harvested.tokens, self._received(harvested)
        try:
            self.harvester.check(tokens, inputs, labels, harvested.total)
        except ActivationError as error:
            if not self.skip_bad:
                raise
            found = len(inputs)
            tokens, inputs, labels = without_bad_rows(tokens, inputs, labels)
            if self.skipped_tokens == 0:
                logger.warning("%d tokens are skipped, and from now on all such: %s", found - len(inputs), error)
            self.skipped_tokens += found - len(inputs)
        slots = slots[: len(inputs)]
        self.inputs[slots.to(self.inputs.device)] = inputs.to(self.inputs.device)
        self.labels[slots.to(self.labels.device)] = labels.to(self.labels.device)
        self.slot_batch[slots] = self.num_harvested
        self.slot_row[slots] = torch.arange(len(slots))
        if len(slots):
            self.live_batches[self.num_harvested] = {"tokens": tokens, "unread": len(slots)}
        self.num_harvested += 1
        return len(slots)

    def _next_batch(self) -> dict:
        slots = self.order[self.read : self.read + self.batch_size]
        if self.overlap:
            self._harvest_ahead(self.read + len(slots))  # it may fail, and then the batch is still unread
        self.read += len(slots)
        for number, count in zip(*self.slot_batch[slots].unique(return_counts=True), strict=True):
            live = self.live_batches[int(number)]
            live["unread"] -= int(count)
            if live["unread"] == 0:
                del self.live_batches[int(number)]
        slots = slots.to(self.inputs.device)
        return {"inputs": self.inputs[slots], "labels": self.labels[slots]}

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """
        What restoring needs: which tokens are unread and in what order, not their activations.

        Returns:
            A JSON-able dict, and a dict of small tensors.
        """
        unread = self.order[self.read :]
        tensors = {
            "order": unread.clone(),
            "slot_batch": self.slot_batch[unread],
            "slot_row": self.slot_row[unread],
            "generator": self.generator.get_state(),
        }
        for number, live in self.live_batches.items():
            for name, value in live["tokens"].items():
                tensors[f"tokens.{number}.{name}"] = value
        ahead = [*(harvested.tokens for harvested in self.ahead), *self.waiting]
        for number, batch in enumerate(ahead):
            for name, value in batch.items():
                tensors[f"ahead.{number}.{name}"] = value
        values = {
            "text": self.tokens.state_dict() if self._text is not None else None,
            "text_ended": self._text_ended,
            "num_harvested": self.num_harvested,
            "epoch": self.epoch,
            "capacity": self.capacity,
            "num_ahead": len(ahead),
            "skipped_tokens": self.skipped_tokens,
        }
        return values, tensors

    def unread_activations(self) -> dict[str, torch.Tensor]:
        """
        `inputs` and `labels` of the unread tokens, in the order of `state_dict`, to whose tensors they can be added:
        they need not be harvested again then.
        """
        slots = self.order[self.read :].to(self.inputs.device)
        return {"inputs": self.inputs[slots].cpu(), "labels": self.labels[slots].cpu()}

    def load_state_dict(self, values: dict, tensors: dict[str, torch.Tensor]) -> None:
        """
        Restores the buffer, harvesting the batches with unread tokens again, each as it was harvested first, unless
        their activations are in the state. A state from [`deal_buffers`] has an empty buffer, and the batches wait.
        """
        if values["capacity"] not in (self.capacity, None):
            raise ValueError(
                f"the checkpoint's buffer holds {values['capacity']} tokens, this one {self.capacity}; resume with "
                "the same n_batches_in_buffer, store_batch_size_prompts and context_size"
            )
        self.order, self.read = tensors["order"].clone(), 0
        self.slot_batch[self.order] = tensors["slot_batch"]
        self.slot_row[self.order] = tensors["slot_row"]
        self.live_batches = {}
        is_kept = "inputs" in tensors
        if is_kept:
            slots = self.order.to(self.inputs.device)
            self.inputs[slots] = tensors["inputs"].to(self.inputs)
            self.labels[slots] = tensors["labels"].to(self.labels)
        numbers, counts = tensors["slot_batch"].unique(return_counts=True)
        for number, count in tqdm(
            zip(numbers.tolist(), counts.tolist(), strict=True),
            total=len(numbers),
            desc="Restoring the buffer",
            unit="batch",
            disable=not self.progress,
        ):
            batch = tensors_of(tensors, f"tokens.{number}.")
            self.live_batches[number] = {"tokens": batch, "unread": count}
            if is_kept:
                continue
            harvested = self._harvest(batch)
            inputs, labels = self._received(harvested)
            self.harvester.check(batch, inputs, labels, harvested.total)  # rows that were skipped no longer count
            slots = self.order[tensors["slot_batch"] == number]
            rows = self.slot_row[slots]
            self.inputs[slots.to(self.inputs.device)] = inputs[rows.to(inputs.device)].to(self.inputs.device)
            self.labels[slots.to(self.labels.device)] = labels[rows.to(labels.device)].to(self.labels.device)
        self.ahead = deque()
        self.waiting = deque(tensors_of(tensors, f"ahead.{number}.") for number in range(values["num_ahead"]))
        self.skipped_tokens = values.get("skipped_tokens", 0)  # absent in checkpoints from before there was skipping
        self.num_harvested, self.epoch = values["num_harvested"], values["epoch"]
        self.generator.set_state(tensors["generator"])
        self._text, self._text_ended = None, values["text_ended"]
        text = values["text"]
        if text is not None and "streams" in text:
            raise ValueError(
                "the checkpoint is of a run that an older version of hf_clt had gone on with on another number of "
                "processes; go on with that version, or begin a run with init_from"
            )
        if text is not None:
            self.tokens.go_on_from(text["others"]) if "others" in text else self.tokens.load_state_dict(text)
            self._text = iter(()) if self._text_ended else iter(self.tokens)


__all__ = ["ActivationBuffer"]
