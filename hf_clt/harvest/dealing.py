"""Going on with another number of processes: each new one gets a part of what lay in the old ones' buffers."""

import torch


def deal_buffers(
    buffers: list[tuple[dict, dict[str, torch.Tensor]]], rank: int, num_processes: int, generator: torch.Generator
) -> tuple[dict, dict[str, torch.Tensor]]:
    """
    The state of a new process's [`ActivationBuffer`] from those of all old processes. Its text goes on where the first
    of the old processes stood, so nothing is left out, and what the others had read beyond is read again.

    Args:
        buffers: What `ActivationBuffer.state_dict` gave in each old process, by rank.
        rank: Which of the new processes this is.
        num_processes: How many they are.
        generator: Of the order in which this process will read.

    Returns:
        What `ActivationBuffer.load_state_dict` takes: an empty buffer, and every `num_processes`-th of the extraction
        batches in which an old process had unread tokens, to be harvested before the text.
    """
    values = [values for values, _ in buffers]
    batches = [batch for state in buffers for batch in unread_batches(*state)][rank::num_processes]
    passes = [v["epoch"] + v["text_ended"] for v in values]  # over the text; a short share may be in a later one
    texts = [v["text"] for v, number in zip(values, passes, strict=True) if number == min(passes)]
    old = next((text for text in texts if text is not None and "streams" in text), None)  # of an older version
    nothing = torch.empty(0, dtype=torch.int64)
    tensors = {"order": nothing, "slot_batch": nothing.clone(), "slot_row": nothing.clone()}
    tensors |= {f"ahead.{n}.{name}": value for n, batch in enumerate(batches) for name, value in batch.items()}
    return {
        "text": old or (None if None in texts else {"others": texts}),
        "text_ended": False,
        "num_harvested": 0,
        "epoch": min(passes),
        "capacity": None,  # no token is in it
        "num_ahead": len(batches),
        "skipped_tokens": sum(v["skipped_tokens"] for v in values) if rank == 0 else 0,  # the run counts all of them
    }, {**tensors, "generator": generator.get_state()}


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


def tensors_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Copies of those whose names begin with `prefix`, without it; `tensors` may be mapped from a large file."""
    return {name.removeprefix(prefix): tensors[name].clone() for name in tensors if name.startswith(prefix)}


__all__ = ["deal_buffers", "tensors_of", "unread_batches"]
