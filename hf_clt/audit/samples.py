"""
What the blocks of an audit are given, and their figures: a mean, or a quotient of sums, over samples that are drawn
independently (sequences, prompts, features), with its bootstrap interval (Efron 1979, "Bootstrap Methods: Another Look
at the Jackknife").
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..folding import at_least_float32
from ..harvest.harvester import Harvester
from ..modeling_clt import CrossLayerTranscoder


RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles of the resamples
LEAST_SEQUENCES = 4
SEQUENCES_AT_A_TIME = 2


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
        reference ([`CrossLayerTranscoder`], *optional*): The CLT of the audit, where another is compared with it.
        shared (`dict`): What a block found for one CLT and needs again for the next: of the language model alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    harvester: Harvester
    heldout: list[dict[str, Tensor]]
    prompts: list[str]
    quick: bool = False
    seed: int = 0
    progress: bool = False
    reference: CrossLayerTranscoder | None = None
    shared: dict = field(default_factory=dict, repr=False)


# -- figures ----------------------------------------------------------------------------------------------------------


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
    with both its numbers. Of samples (n, K) it is the mean over the K quotients whose denominators do not add up to 0;
    `value` is None where all do.
    """
    whole, drawn, count = _quotients(numerators, denominators, seed)
    defined = ~np.isnan(whole)
    return _figure(whole[defined], drawn[:, defined], count)


def figures(values: Sequence[Sequence[float]] | Tensor, seed: int) -> list[dict]:
    """[`figure`] of each of K columns of samples (n, K), drawn together."""
    return ratio_figures(values, np.ones((len(values), 1)), seed)


def ratio_figures(numerators: Sequence | Tensor, denominators: Sequence | Tensor, seed: int) -> list[dict]:
    """[`ratio_figure`] of each of K columns of samples (n, K), drawn together; denominators may be (n, 1)."""
    whole, drawn, count = _quotients(numerators, denominators, seed)
    return [_figure(whole[k : k + 1], drawn[:, k : k + 1], count) for k in range(len(whole))]


def _quotients(numerators, denominators, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Quotients of the sums (K,), those of each resample (1000, K), NaN for those by 0, and the number of samples."""
    count = len(numerators)
    if count == 0:
        raise ValueError("there is no sample; give one at least")
    pair = (np.asarray(numbers, dtype=np.float64).reshape(count, -1) for numbers in (numerators, denominators))
    above, below = map(np.ascontiguousarray, pair)
    if not np.isfinite(above).all() or not np.isfinite(below).all():
        raise ValueError("a sample is not finite; leave it out")

    def quotients(times: np.ndarray) -> np.ndarray:
        divisors = times @ below
        return np.where(divisors == 0, np.nan, times @ above / divisors)

    numbers = np.random.default_rng(seed)
    drawn = np.empty((RESAMPLES, above.shape[1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        for row in drawn:
            row[:] = quotients(np.bincount(numbers.integers(count, size=count), minlength=count).astype(np.float64))
        return quotients(np.ones(count)), drawn, count


def _figure(whole: np.ndarray, drawn: np.ndarray, count: int) -> dict:
    """The mean over (K,) quotients, and its interval over those resamples (1000, K) in which all are defined."""
    drawn = drawn[~np.isnan(drawn).any(axis=1)]
    if whole.size == 0 or np.isnan(whole).any() or drawn.size == 0:
        return {"value": None, "interval": [None, None], "samples": count}
    low, high = np.percentile(drawn.mean(axis=1), INTERVAL)
    return {"value": float(whole.mean()), "interval": [float(low), float(high)], "samples": count}


# -- held-out text ----------------------------------------------------------------------------------------------------


def sequences(given: Given, count: int) -> list[dict[str, Tensor]]:
    """
    The first `count` rows of the held-out text that have counted tokens, two at a time, however the text was cut into
    batches: a figure does not depend on that.

    Raises:
        [`BlockSkipped`]: If there are fewer than four.
    """
    rows = {name: torch.cat([batch[name] for batch in given.heldout]) for name in given.heldout[0]}
    chosen = rows["counted"].any(dim=1).nonzero().squeeze(1)[:count]
    if len(chosen) < LEAST_SEQUENCES:
        raise BlockSkipped(
            f"{len(chosen)} sequences of held-out text, and {LEAST_SEQUENCES} are needed; raise eval_tokens, or give "
            "more text"
        )
    parts = chosen.split(SEQUENCES_AT_A_TIME)
    return [{name: values[part] for name, values in rows.items()} for part in parts]


def sums_by_sequence(values: Tensor, counted: Tensor) -> Tensor:
    """Of what N counted tokens have, (N, ...), sums by the row of `counted` (P, T) they are in: (P, ...) float64."""
    rows = counted.nonzero()[:, 0].to(values.device)
    sums = torch.zeros(len(counted), *values.shape[1:], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, rows, values.double()).cpu()


@torch.no_grad()
def output_means(given: Given, harvester: Harvester, count: int) -> Tensor:
    """Means (L, D) of the MLP outputs, float64, over the counted tokens of [`sequences`]."""
    key = "output_means", harvester.output_hook, count
    if key not in given.shared:
        total, tokens = 0.0, 0
        for batch in sequences(given, count):
            _, outputs = harvester.harvest(batch, dtype=at_least_float32(given.model.dtype))
            total, tokens = total + outputs.double().sum(dim=0), tokens + len(outputs)
        given.shared[key] = total / tokens
    return given.shared[key]


__all__ = ["BlockSkipped", "Given", "figure", "figures", "ratio_figure", "ratio_figures"]
