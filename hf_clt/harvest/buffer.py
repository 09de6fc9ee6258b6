"""
The activation buffer: mixes the activations of many documents and hands out each token exactly once per epoch, or
`passes` times.

The buffer has a fixed number of slots, one token each. `fill` harvests extraction batches into the free slots and puts
all slots with unread tokens in a new random order. Batches are read in this order, and when half of it has been read,
the buffer is filled again. With several passes a slot stands in the order so many times, and is free after the last.
What is random depends on `seed` alone.

A checkpoint saves no activations, but the order of the unread slots, where the token of each came from (the number of
its extraction batch and the row in it), and the tokens of these extraction batches. Resuming harvests them again.
"""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..device import to_device
from .cache import ActivationCache, CachedTokens
from .dealing import tensors_of
from .harvester import ActivationError, Harvester, without_bad_rows
from .tokens import TokenStream


logger = logging.getLogger(__name__)


@dataclass
class Harvested:
    """
    An extraction batch and its activations, (N, L, D) each; a GPU has computed them when `done`, None: they are there.
    `total` is finite if all of them are.
    """

    tokens: dict[str, Tensor]
    inputs: Tensor
    labels: Tensor
    total: Tensor
    done: torch.cuda.Event | None


class ActivationBuffer:
    """
    Mixes the activations of many extraction batches and hands them out in training batches.

    Iterating gives one epoch of the text: every counted token exactly `passes` times, the last batch possibly short.
    The next iteration gives the next epoch, in another order.

    With `overlap` the extraction batches of the next fill are harvested ahead, a few after each training batch: on a
    GPU on a stream of their own, so that language model and CLT share the GPU and nothing waits. The batches and their
    order are the same; the activations that wait take up to half the buffer's memory once more.

    After an error, of the text or of the language model, the buffer stands where it stood before the batch that could
    not be given: its state can be saved, and it can be iterated again, and nothing is lost or repeated.

    Args:
        tokens: The text, in extraction batches.
        harvester: Gives their activations.
        n_batches: Extraction batches that the buffer holds.
        batch_size: N, tokens per training batch.
        passes: Times that each token is handed out before it leaves the buffer.
        dtype: Type in which activations are kept and handed out.
        device: Where activations are kept.
        seed: Seed of the order.
        progress: Whether the first fill, which can take minutes, shows a progress bar.
        overlap: Whether to harvest ahead.
        skip_bad: Whether to leave out blocks in which the language model gives NaN or infinity, instead of raising.
        pin_memory: Whether batches of a buffer on the CPU are in pinned memory, for a copy to a GPU that is not waited
            for.

    Attributes:
        num_unread (`int`): Tokens in the buffer that were not yet handed out, each for every pass that remains.
        skipped_tokens (`int`): Counted tokens of the blocks left out so far.

    Yields:
        `dict`: `inputs` and `labels`, (N, L, D) each, raw; row n of both is the same token.

    Raises:
        ValueError: If `batch_size` is larger than the buffer.
        [`ActivationError`]: While iterating, if an activation is NaN or infinite, without `skip_bad`.
    """

    def __init__(
        self,
        tokens: TokenStream | CachedTokens,
        harvester: Harvester | ActivationCache,
        *,
        n_batches: int = 32,
        batch_size: int = 1024,
        passes: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: bool = False,
        overlap: bool = False,
        skip_bad: bool = False,
        pin_memory: bool = False,
    ):
        # At most so many tokens of an extraction batch count: position 0 never does.
        self.rows_per_harvest = tokens.prompts_per_batch * (tokens.context_size - 1)
        self.capacity = n_batches * self.rows_per_harvest
        if batch_size > self.capacity:
            raise ValueError(
                f"batch_size={batch_size} is larger than the buffer, which holds {self.capacity} tokens; lower "
                "batch_size or raise n_batches_in_buffer"
            )
        self.tokens, self.harvester, self.batch_size, self.passes = tokens, harvester, batch_size, passes
        self.dtype, self.progress, self.overlap, self.skip_bad = dtype, progress, overlap, skip_bad
        self.half = passes * self.capacity // 2  # reads that remain when it is filled again
        # Room for one more extraction batch beside an unread training batch, so that none is short but the last.
        num_slots = max(self.capacity, batch_size + self.rows_per_harvest)
        shape = (num_slots, harvester.num_layers, harvester.d_model)
        self.inputs = torch.empty(shape, dtype=dtype, device=device)
        self.labels = torch.empty(shape, dtype=dtype, device=device)
        self.pin_memory = pin_memory and self.inputs.device.type == "cpu"
        self.generator = torch.Generator().manual_seed(seed)
        self._set_order(torch.empty(0, dtype=torch.int64))
        self.slot_batch = torch.zeros(num_slots, dtype=torch.int64)  # number of the extraction batch, and ...
        self.slot_row = torch.zeros(num_slots, dtype=torch.int64)  # ... row in it, of the token in each slot
        self.token_batches: dict[int, dict[str, Tensor]] = {}  # by number, those with unread tokens (or some more)
        self.num_harvested = 0  # extraction batches so far
        self.skipped_tokens = 0
        self._checks_each = False
        self.epoch = 0
        self._text: Iterator | None = None  # the rest of this epoch's text; None: not started
        self._text_ended = False  # whether this epoch's text has been read, though perhaps not yet all of the buffer
        self.ahead: deque[Harvested] = deque()  # harvested for the next fill
        self.waiting: deque[dict[str, Tensor]] = deque()  # read from the text, and harvested before the rest of it
        self.stream = None  # of a GPU, for harvesting; None: the current one
        if overlap and (device := harvester.device).type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the weights may still be on their way

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def num_unread(self) -> int:
        return len(self.order) - self.read

    @property
    def num_ready(self) -> int:
        """How many batches can be given before text or language model are asked for more, where something may fail."""
        above_half = -(-(self.num_unread - self.half) // self.batch_size)
        return 0 if self.overlap else max(0, min(above_half, self.num_unread // self.batch_size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            self.fill()
            if self.num_unread == 0:
                break
            yield self._next_batch()
        self._text, self._text_ended = None, False
        self.epoch += 1

    def endless(self) -> Iterator[dict[str, Tensor]]:
        """Epoch after epoch; raises ValueError if the text has no token that counts."""
        empty_epochs = 0
        while empty_epochs < 2:  # one may be empty: a run resumed at the end of its text
            empty_epochs += 1
            for batch in self:
                empty_epochs = 0
                yield batch
        raise ValueError("dataset: the text has no token that counts for training; give more text")

    def _next_batch(self) -> dict[str, Tensor]:
        slots = self.order_here[self.read : self.read + self.batch_size]
        if self.overlap:
            freed = int(self.freed[self.read + len(slots) - 1])
            self._harvest_ahead(freed)  # it may fail, and then the batch is still unread
        self.read += len(slots)
        return self._activations(slots, self.pin_memory)

    def _activations(self, slots: Tensor, pin_memory: bool) -> dict[str, Tensor]:
        """Rows of the buffer, (N, L, D) each; `slots` are where the activations are."""
        found = {}
        for name, values in (("inputs", self.inputs), ("labels", self.labels)):
            shape = len(slots), *values.shape[1:]
            out = torch.empty(shape, dtype=values.dtype, pin_memory=True) if pin_memory else None
            found[name] = torch.index_select(values, 0, slots, out=out)
        return found

    def _set_order(self, order: Tensor) -> None:
        self.order = order  # slots with tokens, in the order of reading, each for every pass that remains
        self.order_here = to_device(order, self.inputs.device)  # the same, where the activations are
        self.read = 0  # how many of them were read
        places = torch.arange(len(order))
        last = torch.zeros(len(self.inputs), dtype=torch.int64).scatter_reduce_(0, order, places, "amax")
        self.freed = (last[order] == places).cumsum(0)  # slots that have been read for the last time, after each

    # -- filling ------------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Fills the buffer if half of it has been read, or if it holds less than a batch, and the text goes on."""
        if self.num_unread > self.half and self.num_unread >= self.batch_size:
            return
        if self._text is None:
            self._text = iter(self.tokens)
        unread = self.order[self.read :]
        is_free = torch.ones(len(self.inputs), dtype=torch.bool)
        is_free[unread] = False
        free = is_free.nonzero().squeeze(1)
        # Whether all are finite is asked once, since a GPU has to be waited for; once some were not, of each batch.
        filled = self._harvest_into(free, self._checks_each)
        if filled is None:
            self._checks_each = True
            filled = self._harvest_into(free, self._checks_each)
        if filled:
            unread = torch.cat([unread, *[free[:filled]] * self.passes])
            self._set_order(unread[torch.randperm(len(unread), generator=self.generator)])
        self.token_batches = self._unread_batches()

    def _harvest_into(self, free: Tensor, check_each: bool) -> int | None:
        """
        Harvests extraction batches into free slots; the number of tokens. None if some are not finite, without
        `check_each`: then, as after an error, the slots stay free, and the batches wait.
        """
        free_here = to_device(free, self.inputs.device)
        filled, taken, totals = 0, [], []
        before = self.num_harvested, self.skipped_tokens
        first = self.num_harvested == 0 and self.progress
        with tqdm(total=len(free), desc="Filling the buffer", unit="token", unit_scale=True, disable=not first) as bar:
            try:
                while len(free) - filled >= self.rows_per_harvest:
                    harvested = self.ahead.popleft() if self.ahead else self._harvest_next()
                    if harvested is None:
                        break
                    taken.append(harvested.tokens)
                    totals.append(harvested.total)
                    added = self._store(harvested, free[filled:], free_here[filled:], check_each)
                    filled += added
                    bar.update(added)
                if check_each or not totals or bool(torch.stack(totals).isfinite().all()):
                    taken = None
                    return filled
            finally:
                if taken is not None:
                    self.waiting = deque([*taken, *(harvested.tokens for harvested in self.ahead), *self.waiting])
                    self.ahead.clear()
                    self.num_harvested, self.skipped_tokens = before
        return None

    def _unread_batches(self) -> dict[int, dict[str, Tensor]]:
        """The extraction batches that have unread tokens, by number."""
        numbers = self.slot_batch[self.order[self.read :]].unique().tolist()
        return {number: self.token_batches[number] for number in numbers}

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

    def _harvest(self, batch: dict[str, Tensor]) -> Harvested:
        with torch.cuda.stream(self.stream):
            inputs, labels, total = self.harvester.read(batch, dtype=self.dtype)
            done = self.stream.record_event() if self.stream is not None else None
        return Harvested(batch, inputs, labels, total, done)

    def _harvest_ahead(self, freed: int) -> None:
        """Keeps as many tokens ready for the next fill as slots have become free since the last: they will fit."""
        ready = sum(len(harvested.inputs) for harvested in self.ahead)
        while (self.waiting or not self._text_ended) and ready + self.rows_per_harvest <= freed:
            harvested = self._harvest_next()
            if harvested is not None:
                self.ahead.append(harvested)
                ready += len(harvested.inputs)

    def _await(self, harvested: Harvested) -> None:
        """Lets the current stream of a GPU wait for the activations."""
        if harvested.done is not None:
            stream = torch.cuda.current_stream(harvested.inputs.device)
            stream.wait_event(harvested.done)
            for tensor in (harvested.inputs, harvested.labels, harvested.total):
                tensor.record_stream(stream)  # its memory is not used again before this stream has read it

    def _check(self, harvested: Harvested) -> None:
        """Raises [`ActivationError`] if an activation is not finite; a GPU is waited for."""
        self.harvester.check(harvested.tokens, harvested.inputs, harvested.labels, harvested.total)

    def _store(self, harvested: Harvested, slots: Tensor, slots_here: Tensor, check: bool) -> int:
        """
        Puts an extraction batch into the first of the given slots, which are also given where the activations are;
        returns the number of tokens.
        """
        tokens, inputs, labels = harvested.tokens, harvested.inputs, harvested.labels
        self._await(harvested)
        try:
            if check:
                self._check(harvested)
        except ActivationError as error:
            if not self.skip_bad:
                raise
            tokens, inputs, labels = without_bad_rows(tokens, inputs, labels)
            skipped = len(harvested.inputs) - len(inputs)
            if self.skipped_tokens == 0:
                logger.warning("%d tokens are skipped, and from now on all such: %s", skipped, error)
            self.skipped_tokens += skipped
        slots = slots[: len(inputs)]
        self._put(slots_here[: len(inputs)], inputs, labels)
        self.slot_batch[slots] = self.num_harvested
        self.slot_row[slots] = torch.arange(len(slots))
        self.token_batches[self.num_harvested] = tokens
        self.num_harvested += 1
        return len(slots)

    def _put(self, slots: Tensor, inputs: Tensor, labels: Tensor) -> None:
        self.inputs[slots], self.labels[slots] = inputs.to(self.inputs), labels.to(self.labels)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict, dict[str, Tensor]]:
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
        ahead = [*(harvested.tokens for harvested in self.ahead), *self.waiting]
        for group, batches in (("tokens", self._unread_batches()), ("ahead", dict(enumerate(ahead)))):
            for number, batch in batches.items():
                tensors |= {f"{group}.{number}.{name}": value for name, value in batch.items()}
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

    def unread_activations(self) -> dict[str, Tensor]:
        """
        `inputs` and `labels` of the unread tokens, (N, L, D) each on the CPU, in the order of `state_dict`, to whose
        tensors they can be added: they need not be harvested again then.
        """
        return {name: rows.cpu() for name, rows in self._activations(self.order_here[self.read :], False).items()}

    def load_state_dict(self, values: dict, tensors: dict[str, Tensor]) -> None:
        """
        Restores the buffer, harvesting the batches with unread tokens again, each as it was harvested first, unless
        their activations are in the state. A state from [`deal_buffers`] has an empty buffer, and the batches wait.

        Raises:
            ValueError: If the buffer had another capacity, or the position in the text does not fit.
        """
        if values["capacity"] not in (self.capacity, None):
            raise ValueError(
                f"the checkpoint's buffer holds {values['capacity']} tokens, this one {self.capacity}; resume with "
                "the same n_batches_in_buffer, store_batch_size_prompts and context_size"
            )
        self._set_order(tensors["order"].clone())
        self.slot_batch[self.order], self.slot_row[self.order] = tensors["slot_batch"], tensors["slot_row"]
        numbers = tensors["slot_batch"].unique().tolist()
        self.token_batches = {number: tensors_of(tensors, f"tokens.{number}.") for number in numbers}
        if "inputs" in tensors:
            self._put(self.order_here, tensors["inputs"], tensors["labels"])
        else:
            bar = tqdm(numbers, desc="Restoring the buffer", unit="batch", disable=not self.progress)
            for number in bar:
                harvested = self._harvest(self.token_batches[number])
                self._await(harvested)
                self._check(harvested)  # rows that were skipped do not count any more
                slots = self.order[tensors["slot_batch"] == number]
                rows = to_device(self.slot_row[slots], harvested.inputs.device)
                self._put(to_device(slots, self.inputs.device), harvested.inputs[rows], harvested.labels[rows])
        self.ahead = deque()
        self.waiting = deque(tensors_of(tensors, f"ahead.{number}.") for number in range(values["num_ahead"]))
        self.num_harvested, self.epoch = values["num_harvested"], values["epoch"]
        self.skipped_tokens = values.get("skipped_tokens", 0)  # older checkpoints have none
        self.generator.set_state(tensors["generator"])
        self._text, self._text_ended = None, values["text_ended"]
        text = values["text"]
        if text is not None:
            self.tokens.continue_after(text["others"]) if "others" in text else self.tokens.load_state_dict(text)
            self._text = iter(()) if self._text_ended else iter(self.tokens)


__all__ = ["ActivationBuffer"]
