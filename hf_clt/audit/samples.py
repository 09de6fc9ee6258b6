"""
What the blocks of an audit are given, and their figures: a mean, or a quotient of sums, over samples that are drawn
independently (sequences, prompts, features), with its bootstrap interval (Efron 1979, "Bootstrap Methods: Another Look
at the Jackknife").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..harvest.harvester import Harvester


RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles of the resamples


class BlockSkipped(Exception):
    """A block of an audit cannot be measured on what is given; the message says why, on one line."""


@dataclass(frozen=True)
class Given:
    """
    What every block of an audit is given besides the CLT.

    Args:
        model (`PreTrainedModel`): The language model, with its head, in float32 and eval mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        harvester ([`Harvester`]): Reads that model at the CLT's hooks.
        heldout (`list[dict]`): Batches of a [`TokenStream`] of held-out text, (P, T) each.
        prompts (`list[str]`): Short texts whose next token is explained.
        quick (`bool`): Whether to measure on fewer samples.
        seed (`int`): Of whatever is drawn, the bootstrap included.
        progress (`bool`): Whether to show progress bars.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    harvester: Harvester
    heldout: list[dict[str, Tensor]]
    prompts: list[str]
    quick: bool = False
    seed: int = 0
    progress: bool = False


def figure(values: Sequence[float] | Tensor, seed: int) -> dict:
    """
    The mean of samples (n,) with its 95 % bootstrap interval.

    Returns:
        `dict`: `value`, `interval` (low, high) and `samples`, their number.

    Raises:
        ValueError: If there is no sample, or one is not finite.
    """
    return ratio_figure(values, np.ones(len(values)), seed)


def ratio_figure(numerators: Sequence[float] | Tensor, denominators: Sequence[float] | Tensor, seed: int) -> dict:
    """
    The quotient of two sums over samples (n,) each, such as an NMSE, as [`figure`] gives a mean: a sample is drawn
    with both its numbers. `value` is None where the denominators add up to 0; resamples in which they do are left out.
    """
    pairs = np.stack([np.asarray(numbers, dtype=np.float64) for numbers in (numerators, denominators)])
    if pairs.ndim != 2 or pairs.shape[1] == 0:
        raise ValueError(f"samples have shape {pairs.shape[1:]}; give (n,) with one sample at least")
    if not np.isfinite(pairs).all():
        raise ValueError("a sample is not finite; leave it out")
    numbers, count = np.random.default_rng(seed), pairs.shape[1]
    sums = np.stack([pairs[:, numbers.integers(count, size=count)].sum(axis=1) for _ in range(RESAMPLES)])
    drawn = sums[sums[:, 1] != 0]
    above, below = pairs.sum(axis=1)
    if below == 0 or len(drawn) == 0:
        return {"value": None, "interval": [None, None], "samples": count}
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], INTERVAL)
    return {"value": float(above / below), "interval": [float(low), float(high)], "samples": count}


__all__ = ["BlockSkipped", "Given", "figure", "ratio_figure"]
