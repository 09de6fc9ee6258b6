"""
One CLT whose features are spread over a group of processes: each process holds a slice of the F axis of encoders,
thresholds and decoders, and all of them work on the same tokens.

Everything that the processes of a group tell each other goes through the functions of this module. Each takes the
process's `shard`; with None, which is one process with all features, nothing is exchanged. All processes of a group
must call them in the same order.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import initialization as init


@dataclass(frozen=True)
class FeatureShard:
    """
    Which slice of the features a process holds.

    Args:
        rank (`int`): Which of the slices, from 0.
        size (`int`): Number of slices, and of processes in the group.
        group (`ProcessGroup`): The processes that hold the other slices, in the order of their slices.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    def rows(self, num_features: int) -> slice:
        """
        The features of this process, of `num_features` in all.

        Raises:
            ValueError: If they cannot be split evenly.
        """
        if num_features % self.size:
            raise ValueError(
                f"num_features={num_features} cannot be split over feature_parallel_size={self.size} processes; "
                "give a multiple"
            )
        held = num_features // self.size
        return slice(self.rank * held, (self.rank + 1) * held)


def rows_of(shard: FeatureShard | None, num_features: int) -> slice:
    """The features that a process holds, of `num_features` in all."""
    return slice(0, num_features) if shard is None else shard.rows(num_features)


# -- sums, minima -----------------------------------------------------------------------------------------------------


class _SumOver(torch.autograd.Function):
    """
    Forward Σ over the group, backward the identity: what follows is computed from the sum by every process alike, and
    so its gradient is already that of each part.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_over(shard: FeatureShard | None, part: Tensor) -> Tensor:
    """The sum of the parts of all processes, the same on each; differentiable in this process's part."""
    return part if shard is None else _SumOver.apply(part, shard.group)


@torch.no_grad()
def min_over(shard: FeatureShard | None, values: Tensor) -> Tensor:
    """The elementwise minimum over all processes."""
    if shard is None:
        return values
    values = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.MIN, group=shard.group)
    return values


def any_over(shard: FeatureShard | None, found: bool, device: torch.device) -> bool:
    """Whether any process found it."""
    return found if shard is None else bool(sum_over(shard, torch.tensor(int(found), device=device)))


# -- candidates for a budget that all features share ------------------------------------------------------------------


def gather_parts(shard: FeatureShard, part: Tensor) -> list[Tensor]:
    """The parts of all processes, of the same shape each, in the order of their slices."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(shard.size)]
    dist.all_gather(parts, part, group=shard.group)
    return parts


@torch.no_grad()
def gather_candidates(shard: FeatureShard | None, values: Tensor) -> tuple[Tensor, slice]:
    """
    The values with which features compete, of all processes, side by side.

    Args:
        shard: This process's slice.
        values: (..., C), as many on every process.

    Returns:
        (..., size · C), the same on every process, so that each makes the same cut; and where its own stand.
    """
    width = values.shape[-1]
    if shard is None:
        return values, slice(0, width)
    return torch.cat(gather_parts(shard, values), dim=-1), slice(shard.rank * width, (shard.rank + 1) * width)


# -- tokens -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gather_tokens(
    shard: FeatureShard | None, batch: dict[str, Tensor], equally_many: bool = False
) -> dict[str, Tensor]:
    """
    The tokens that the processes of a group harvested each, one after another in the order of their slices.

    Args:
        shard: This process's slice.
        batch: Tensors of N rows each, where N may differ between processes, and be 0.
        equally_many: N is known to be the same for all, so that nobody has to ask.

    Returns:
        The same names with the rows of all processes, the same on each.
    """
    if shard is None:
        return batch
    if equally_many:
        return {name: torch.cat(gather_parts(shard, rows)) for name, rows in batch.items()}
    first = next(iter(batch.values()))
    counts = torch.cat(gather_parts(shard, torch.tensor([len(first)], device=first.device))).tolist()
    gathered = {}
    for name, rows in batch.items():
        if len(rows) < max(counts):  # all_gather takes equal parts only: filled up at the end of the text
            rows = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
        parts = gather_parts(shard, rows)
        gathered[name] = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return gathered


# -- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def uniform_(shard: FeatureShard | None, weight: Tensor, bound: float) -> None:
    """
    Draws the rows of `weight`, one per feature that this process holds, from U(±bound), and those of the other slices
    as well, so that the random numbers of a feature are the same in whatever layout it is held.
    """
    if shard is None:
        init.uniform_(weight, -bound, bound)
    elif weight.device.type == "cpu":
        # A CPU draws element after element, so that the slices can be drawn one after another.
        others = torch.empty_like(weight)
        for rank in range(shard.size):
            (weight if rank == shard.rank else others).uniform_(-bound, bound)
    else:
        whole = weight.new_empty(shard.size * len(weight), *weight.shape[1:]).uniform_(-bound, bound)
        weight.copy_(whole[shard.rows(len(whole))])


@torch.no_grad()
def collect_rows(shard: FeatureShard | None, rows: Tensor) -> Tensor:
    """
    The rows of all slices, (F / size, ...) on each process to (F, ...) in host memory of the first, where only one
    slice at a time is on the device. The other processes get their own rows back.
    """
    if shard is None:
        return rows.cpu()
    first = dist.get_global_rank(shard.group, 0)
    if shard.rank > 0:
        dist.send(rows.contiguous(), dst=first, group=shard.group)
        return rows.cpu()
    whole = torch.empty(shard.size * len(rows), *rows.shape[1:], dtype=rows.dtype)
    whole[: len(rows)] = rows
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for rank in range(1, shard.size):
        dist.recv(received, src=dist.get_global_rank(shard.group, rank), group=shard.group)
        whole[rank * len(rows) : (rank + 1) * len(rows)] = received
    return whole
