"""The activation buffer: harvested activations of many documents, mixed, each handed out exactly once."""

from collections import deque
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm


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

    Yields:
        `dict`: `inputs` and `labels`, (N, L, D) each, raw; row n of both is the same token.

    Raises:
        ValueError: If `batch_size` is larger than the buffer.
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
        self.overlap = overlap
        self.ahead: deque[Harvested] = deque()
        self.stream = None  # that harvests run on; None: the current one
        if overlap and (device := harvester.device).type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the weights may still be on their way

    @property
    def num_unread(self) -> int:
        return len(self.order) - self.read

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
        filled = 0
        first = self.num_harvested == 0 and self.progress
        with tqdm(total=len(free), desc="Filling the buffer", unit="token", unit_scale=True, disable=not first) as bar:
            while len(free) - filled >= self.rows_per_harvest:
                harvested = self.ahead.popleft() if self.ahead else self._harvest_next()
                if harvested is None:
                    break
                added = self._store(harvested, free[filled:])
                filled += added
                bar.update(added)
        if filled:
            unread = torch.cat([unread, free[:filled]])
            self.order = unread[torch.randperm(len(unread), generator=self.generator)]
            self.read = 0

    def _harvest_next(self) -> Harvested | None:
        """Harvests the next extraction batch of the epoch; None at its end."""
        batch = next(self._text, None)
        if batch is None:
            self._text_ended = True  # and the stream stands at its beginning again
            return None
        return self._harvest(batch)

    def _harvest(self, batch: dict) -> Harvested:
        with torch.cuda.stream(self.stream):
            inputs, labels, total = self.harvester.read(batch, dtype=self.dtype)
            done = self.stream.record_event() if self.stream is not None else None
        return Harvested(batch, inputs, labels, total, done)

    def _harvest_ahead(self) -> None:
        """Keeps as many tokens ready for the next fill as have been read since the last one: they will fit."""
        ready = sum(len(harvested.inputs) for harvested in self.ahead)
        while not self._text_ended and ready + self.rows_per_harvest <= self.read:
            harvested = self._harvest_next()
            if harvested is not None:
                self.ahead.append(harvested)
                ready += len(harvested.inputs)

    def _received(self, harvested: Harvested) -> tuple[torch.Tensor, torch.Tensor]:
        """Checked inputs and labels, (N, L, D) each, where the buffer lives."""
        if harvested.done is not None:
            stream = torch.cuda.current_stream(harvested.inputs.device)
            stream.wait_event(harvested.done)
            for tensor in (harvested.inputs, harvested.labels, harvested.total):
                tensor.record_stream(stream)  # its memory is not used again before this stream has read it
        self.harvester.check(harvested.tokens, harvested.inputs, harvested.labels, harvested.total)
        return harvested.inputs.to(self.inputs.device), harvested.labels.to(self.labels.device)

    def _store(self, harvested: Harvested, slots: torch.Tensor) -> int:
        """Puts an extraction batch into the first of the given slots; returns the number of tokens."""
        inputs, labels = self._received(harvested)
        slots = slots[: len(inputs)]
        self.inputs[slots.to(self.inputs.device)] = inputs
        self.labels[slots.to(self.labels.device)] = labels
        self.slot_batch[slots] = self.num_harvested
        self.slot_row[slots] = torch.arange(len(slots))
        if len(slots):
            self.live_batches[self.num_harvested] = {"tokens": harvested.tokens, "unread": len(slots)}
        self.num_harvested += 1
        return len(slots)

    def _next_batch(self) -> dict:
        slots = self.order[self.read : self.read + self.batch_size]
        self.read += len(slots)
        for number, count in zip(*self.slot_batch[slots].unique(return_counts=True), strict=True):
            live = self.live_batches[int(number)]
            live["unread"] -= int(count)
            if live["unread"] == 0:
                del self.live_batches[int(number)]
        slots = slots.to(self.inputs.device)
        rows = {"inputs": self.inputs[slots], "labels": self.labels[slots]}
        if self.overlap:
            self._harvest_ahead()
        return rows

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
        for number, harvested in enumerate(self.ahead):
            for name, value in harvested.tokens.items():
                tensors[f"ahead.{number}.{name}"] = value
        values = {
            "text": self.tokens.state_dict() if self._text is not None else None,
            "text_ended": self._text_ended,
            "num_harvested": self.num_harvested,
            "epoch": self.epoch,
            "capacity": self.capacity,
            "num_ahead": len(self.ahead),
        }
        return values, tensors

    def load_state_dict(self, values: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Restores the buffer, harvesting the batches with unread tokens again, each as it was harvested first."""
        if values["capacity"] != self.capacity:
            raise ValueError(
                f"the checkpoint's buffer holds {values['capacity']} tokens, this one {self.capacity}; resume with "
                "the same n_batches_in_buffer, store_batch_size_prompts and context_size"
            )
        self.order, self.read = tensors["order"].clone(), 0
        self.slot_batch[self.order] = tensors["slot_batch"]
        self.slot_row[self.order] = tensors["slot_row"]
        self.live_batches = {}
        numbers, counts = tensors["slot_batch"].unique(return_counts=True)
        for number, count in tqdm(
            zip(numbers.tolist(), counts.tolist(), strict=True),
            total=len(numbers),
            desc="Restoring the buffer",
            unit="batch",
            disable=not self.progress,
        ):
            batch = tensors_of(tensors, f"tokens.{number}.")
            inputs, labels = self._received(self._harvest(batch))
            slots = self.order[tensors["slot_batch"] == number]
            rows = self.slot_row[slots]
            self.inputs[slots.to(self.inputs.device)] = inputs[rows.to(inputs.device)]
            self.labels[slots.to(self.labels.device)] = labels[rows.to(labels.device)]
            self.live_batches[number] = {"tokens": batch, "unread": count}
        ahead = (tensors_of(tensors, f"ahead.{number}.") for number in range(values["num_ahead"]))
        self.ahead = deque(self._harvest(batch) for batch in ahead)
        self.num_harvested, self.epoch = values["num_harvested"], values["epoch"]
        self.generator.set_state(tensors["generator"])
        self._text, self._text_ended = None, values["text_ended"]
        if values["text"] is not None:
            self.tokens.load_state_dict(values["text"])
            self._text = iter(()) if self._text_ended else iter(self.tokens)


def tensors_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


__all__ = ["ActivationBuffer"]
