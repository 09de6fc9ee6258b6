"""
Going on with another number of processes: what the old ones had not trained on yet is dealt out to the new ones.

A process's place in its text is a stream that stands somewhere, and a buffer with unread tokens of extraction batches
that the stream has given. The new processes first finish what was begun: they get the batches with unread tokens, with
only these counted, and read the old streams to their ends, in the batches in which the old processes would have read
them. So each token that counts is trained on once, however often the number of processes changes. After that each
reads its own share of the text.
"""

import math

import torch


def deal_buffers(
    buffers: list[tuple[dict, dict[str, torch.Tensor]]], rank: int, num_processes: int
) -> tuple[dict, dict[str, torch.Tensor]]:
    """
    The state of a new process's [`ActivationBuffer`] from those of all old processes. Every new process computes its
    own, and together they have each unread token once.

    Args:
        buffers: What `ActivationBuffer.state_dict` gave in each old process, by rank.
        rank: Which of the new processes this is.
        num_processes: How many they are.

    Returns:
        What `ActivationBuffer.load_state_dict` takes: an empty buffer, the extraction batches that are to be harvested
        before the text, and the text as [`deal_text`] gives it.
    """
    values = [values for values, _ in buffers]
    batches = deal_batches([batch for state in buffers for batch in unread_batches(*state)], rank, num_processes)
    text = deal_text(values, rank, num_processes)
    nothing = torch.empty(0, dtype=torch.int64)
    tensors = {"order": nothing, "slot_batch": nothing.clone(), "slot_row": nothing.clone()}
    if rank < len(buffers):
        tensors["generator"] = buffers[rank][1]["generator"]
    tensors |= {f"ahead.{n}.{name}": value for n, batch in enumerate(batches) for name, value in batch.items()}
    return {
        "text": text,
        "text_ended": not text["streams"],
        "num_harvested": 0,
        "epoch": last_pass(values),
        "capacity": None,  # no token is in it
        "num_ahead": len(batches),
        "skipped_tokens": sum(v["skipped_tokens"] for v in values) if rank == 0 else 0,  # the run counts all of them
    }, tensors


def unread_batches(values: dict, tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The extraction batches of a buffer that have tokens to train on, with `counted` for these alone."""
    batches = []
    for number in tensors["slot_batch"].unique().tolist():
        batch = tensors_of(tensors, f"tokens.{number}.")
        rows = tensors["slot_row"][tensors["slot_batch"] == number]
        counted = torch.zeros_like(batch["counted"])
        places = batch["counted"].nonzero()[rows]  # row n of what was harvested is the n-th counted token
        counted[places[:, 0], places[:, 1]] = True
        batches.append({**batch, "counted": counted})
    return batches + [tensors_of(tensors, f"ahead.{number}.") for number in range(values["num_ahead"])]


def deal_batches(batches: list[dict], rank: int, num_processes: int) -> list[dict]:
    """Those of the batches that process `rank` gets: each goes where the fewest tokens are so far, large first."""
    sizes = [int(batch["counted"].sum()) for batch in batches]
    tokens, own = [0] * num_processes, []
    for place in sorted(range(len(batches)), key=lambda place: -sizes[place]):
        process = tokens.index(min(tokens))
        tokens[process] += sizes[place]
        if process == rank:
            own.append(place)
    return [batches[place] for place in sorted(own)]


def last_pass(values: list[dict]) -> int:
    """The number of the pass over the text that the furthest of the old processes is in."""
    return max(v["epoch"] + (v["text"] is not None) for v in values) - 1


def deal_text(values: list[dict], rank: int, num_processes: int) -> dict:
    """
    What process `rank` reads of the old processes' streams: the state of a [`DealtTokens`].

    Of n old and m new processes, with g = gcd(n, m), new process j reads the streams i with i ≡ j modulo g, and of
    their batches every (m/g)-th. So where one number divides the other, no text is tokenized that nobody reads.
    """
    common = math.gcd(len(values), num_processes)
    streams, epochs = [], []
    for old_rank, v in enumerate(values):
        # Processes whose text is shorter may be in a later pass; the others catch up.
        passes = last_pass(values) + 1 - v["epoch"] - v["text_ended"]
        epochs.append((v["text"] or {}).get("epoch", 0) + passes - 1)
        if passes > 0 and old_rank % common == rank % common:
            streams.append({"text": v["text"], "rank": old_rank, "world_size": len(values), "passes": passes})
    every = num_processes // common
    return {"streams": streams, "place": 0, "given": 0, "every": every, "turn": rank // common, "epoch": max(epochs)}


def at_position(tokens, state: dict | None):
    """
    A stream that stands where `state` says.

    Args:
        tokens ([`TokenStream`] or [`CachedTokens`]): The stream of this process.
        state: What its `state_dict` gave, or that of a [`DealtTokens`]; None: the beginning.
    """
    if state is None:
        return tokens
    if "streams" in state:
        return DealtTokens(tokens, state)
    tokens.load_state_dict(state)
    return tokens


class DealtTokens:
    """
    The extraction batches of a process that goes on where others left off, in the place of a [`TokenStream`]: the
    first iteration gives its part of what is left of the old streams, the next ones its own stream.

    The old streams give a batch each in turn, and of all these batches the process takes every so manieth. What is
    left of an old stream may itself have been dealt out.

    Args:
        tokens ([`TokenStream`] or [`CachedTokens`]): The stream of this process.
        state (`dict`): As from [`deal_text`] or `state_dict`.
    """

    def __init__(self, tokens, state: dict):
        self.rank, self.world_size = tokens.rank, tokens.world_size
        self.tokens = tokens.share(self.rank, self.world_size, state["epoch"] + 1)
        self.epoch, self.every, self.turn = state["epoch"], state["every"], state["turn"]
        self.place, self.given = state["place"], state["given"]  # which stream is next; batches so far, of everybody
        self.streams, self.passes = [], []
        for old in state["streams"]:
            self.streams.append(at_position(tokens.share(old["rank"], old["world_size"]), old["text"]))
            self.passes.append(old["passes"])

    @property
    def is_reading(self) -> bool:
        """As of a [`TokenStream`]."""
        return any(stream.is_reading for stream in (self.tokens, *self.streams))

    def __iter__(self):
        if not self.streams:
            yield from self.tokens
        while self.streams:
            batch = next(iter(self.streams[self.place]), None)  # if it fails, nothing has changed
            if batch is None:
                self._end_pass()
                continue
            is_own = self.given % self.every == self.turn
            self.given += 1
            self.place = (self.place + 1) % len(self.streams)
            if is_own:
                yield batch

    def _end_pass(self) -> None:
        """The stream whose turn it is has ended; it stands at its beginning again."""
        self.passes[self.place] -= 1
        if self.passes[self.place] == 0:
            del self.streams[self.place], self.passes[self.place]
            self.place = self.place % len(self.streams) if self.streams else 0

    def state_dict(self) -> dict:
        if not self.streams:
            return self.tokens.state_dict()
        streams = [
            {"text": stream.state_dict(), "rank": stream.rank, "world_size": stream.world_size, "passes": passes}
            for stream, passes in zip(self.streams, self.passes, strict=True)
        ]
        own = {"every": self.every, "turn": self.turn, "epoch": self.epoch}
        return {"streams": streams, "place": self.place, "given": self.given, **own}


def tensors_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Copies of those whose names begin with `prefix`, without it; `tensors` may be mapped from a large file."""
    return {name.removeprefix(prefix): tensors[name].clone() for name in tensors if name.startswith(prefix)}


__all__ = ["DealtTokens", "at_position", "deal_buffers"]
