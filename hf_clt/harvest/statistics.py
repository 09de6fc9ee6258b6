"""Streamed mean and spread of activations per layer and dimension, merged over batches and processes."""

from typing import Self

import torch
from accelerate import Accelerator
from torch import Tensor


class Moments:
    """
    Count, mean and sum of squared deviations of rows of shape (L, D), in float64, whatever the batches: the merging
    formula of Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    Σy² - N·ȳ² is never formed: residual streams have dimensions whose mean is thousands of times their spread, where
    it would cancel. The parts do not simply add up: do not all-reduce them, [`gather`] and merge them.

    Args:
        shape: (L, D).
        device: Where the sums are kept.
    """

    STATE = ("count", "mean", "squared_deviation")

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squared_deviation = torch.zeros(shape, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def update(self, rows: Tensor) -> None:
        """Adds rows of shape (N, L, D)."""
        if len(rows) == 0:
            return
        batch = Moments(self.mean.shape, self.device)
        batch.count += len(rows)
        for layer in range(rows.shape[1]):  # one layer at a time: a float64 copy of a whole batch is large
            values = rows[:, layer].to(self.device).double()
            batch.mean[layer] = values.mean(dim=0)
            batch.squared_deviation[layer] = (values - batch.mean[layer]).square().sum(dim=0)
        Moments.merge(self, batch)

    def merge(self, other: "Moments") -> None:
        """Adds the rows of `other`, which may have seen any number of them (none included)."""
        count, mean, squared_deviation = (getattr(other, name).to(self.device) for name in Moments.STATE)
        share = count / (self.count + count).clamp(min=1).double()  # of the rows, those that come from other
        delta = mean - self.mean
        self.squared_deviation += squared_deviation + delta.square() * self.count * share
        self.mean += delta * share
        self.count += count

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, to be gathered over processes: the tensors that `STATE` names."""
        return {name: getattr(self, name) for name in self.STATE}

    @classmethod
    def from_gathered(cls, parts: list[dict[str, Tensor]]) -> Self:
        """
        Merges the states of any number of processes.

        Args:
            parts: What `tensors` gave on each process, in rank order.

        Returns:
            The sums over the rows of all parts, on the device of the first.

        Raises:
            ValueError: If there is no part, or one has other tensors or shapes.
        """
        if not parts:
            raise ValueError("no sums to merge; give the tensors() of at least one process")
        merged = []
        for part in parts:
            if set(part) != set(cls.STATE):
                raise ValueError(f"sums need the tensors {sorted(cls.STATE)}, got {sorted(part)}; give tensors()")
            if len({len(part[name]) for name in cls.STATE if name != "count"}) > 1:
                shapes = {name: tuple(value.shape) for name, value in part.items()}
                raise ValueError(f"sums of the same layers are needed, got the shapes {shapes}; give tensors()")
            own = cls.__new__(cls)
            for name in cls.STATE:
                setattr(own, name, part[name].clone())
            merged.append(own)
        for own in merged[1:]:
            merged[0].merge(own)
        return merged[0]

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and (population) standard deviation, (L, D) each, float64."""
        return self.mean, (self.squared_deviation / self.count).sqrt()


def gather(accelerator: Accelerator | None, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of all processes, in rank order, on this process's device; of the same shapes on each."""
    if accelerator is None or accelerator.num_processes == 1:
        return [tensors]
    found = {name: accelerator.gather(value.to(accelerator.device)[None]) for name, value in tensors.items()}
    return [{name: value[rank] for name, value in found.items()} for rank in range(accelerator.num_processes)]
