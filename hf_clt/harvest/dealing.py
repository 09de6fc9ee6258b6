"""Resuming with another number of processes: each new one gets a part of what lay in the old ones' buffers."""

import torch
from torch import Tensor


def deal_buffers(
    buffers: list[tuple[dict, dict[str, Tensor]]], rank: int, num_processes: int, generator: torch.Generator
) -> tuple[dict, dict[str, Tensor]]:
    """
    The state of a new process's [`ActivationBuffer`] from those of all old processes. Its text goes on where the first
    of the old processes stood: nothing is left out, and what the others had read beyond is read again.

    Args:
        buffers: What `ActivationBuffer.state_dict` gave in each old process, by rank.
        rank: Number of the new process.
        num_processes: How many new ones there are.
        generator: Of the order in which the new process will read.

    Returns:
        What `ActivationBuffer.load_state_dict` takes: an empty buffer, and every `num_processes`-th of the extraction
        batches in which an old process had unread tokens, to be harvested before the text.
    """
    values = [values for values, _ in buffers]
    batches = [batch for state in buffers for batch in unread_batches(*state)][rank::num_processes]
    passes = [v["epoch"] + v["text_ended"] for v in values]  # over the text; a short share may be in a later one
    texts = [v["text"] for v, number in zip(values, passes, strict=True) if number == min(passes)]
    tensors = {name: torch.empty(0, dtype=torch.int64) for name in ("order", "slot_batch", "slot_row")}
    tensors |= {f"ahead.{n}.{name}": value for n, batch in enumerate(batches) for name, value in batch.items()}
    return {
        "text": None if None in texts else {"others": texts},
        "text_ended": False,
        "num_harvested": 0,
        "epoch": min(passes),
        "capacity": None,  # no token is in it
        "num_ahead": len(batches),
        "skipped_tokens": sum(v["skipped_tokens"] for v in values) if rank == 0 else 0,  # the run counts all of them
    }, {**tensors, "generator": generator.get_state()}


def unread_batches(values: dict, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The extraction batches of a buffer that have unread tokens, with `counted` for these alone."""
    batches = []
    for number in tensors["slot_batch"].unique().tolist():
        batch = tensors_of(tensors, f"tokens.{number}.")
        rows = tensors["slot_row"][tensors["slot_batch"] == number]
        counted = torch.zeros_like(batch["counted"])
        places = batch["counted"].nonzero()[rows]  # row n of what was harvested is the n-th counted token
        counted[places[:, 0], places[:, 1]] = True
        batches.append({**batch, "counted": counted})
    return batches + [tensors_of(tensors, f"ahead.{number}.") for number in range(values["num_ahead"])]


def tensors_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Copies of those whose names begin with `prefix`, without it; `tensors` may be mapped from a large file."""
    return {name.removeprefix(prefix): tensors[name].clone() for name in tensors if name.startswith(prefix)}
