"""
From a topk or batchtopk CLT to a jumprelu CLT: thresholds with which every layer is exactly as active as before.

A topk CLT is active on C_s (token, feature) pairs of source layer s over a set of held-out tokens. With one threshold
θ_s per layer, a = h · 1[h > θ_s] is active on as many pairs if θ_s lies between the C_s-th largest pre-activation of
the layer and the next smaller one. All pre-activations are too many to keep and sort. But the bits of positive float32
numbers, read as integers, are in the order of the numbers (IEEE 754): a histogram of the leading 16 bits says in which
bin the C_s-th largest lies, and in a second pass over the tokens a histogram of the other 15 bits, in this bin, says
which number it is. The result is exact, and memory does not depend on the number of tokens.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..configuration_clt import ACTIVATION_DEFAULTS, TOPK_FAMILY, CLTConfig
from ..files import format_number
from ..hub.report import align_rows
from ..modeling_clt import CrossLayerTranscoder, Threshold
from .evaluate import eval_mode, measure
from .metrics import MetricSums


logger = logging.getLogger(__name__)

L0_TOLERANCE = 0.01  # of each layer's L0
NMSE_TOLERANCE = 0.02  # of the NMSE, mean over layers
LEADING_BITS, OTHER_BITS = 16, 15  # of the 31 of a positive float32
# θ lives as log θ in float32; reading it back moves it by less than this share of itself.
MARGIN = 1e-6


@torch.no_grad()
def to_jumprelu(
    clt: CrossLayerTranscoder,
    batches: Iterable[Mapping[str, Tensor]] | Callable[[], Iterable[Mapping[str, Tensor]]],
    progress: bool = False,
) -> tuple[CrossLayerTranscoder, dict]:
    """
    A jumprelu CLT with the weights of a topk or batchtopk CLT, and thresholds calibrated on held-out activations.

    All features of a layer have the same θ, with which the layer's L0 is that of the original in eval mode. A
    batchtopk CLT gates at its running thresholds in eval mode: these are kept as they are, so the function is the same
    on every token.

    Args:
        clt ([`CrossLayerTranscoder`]): A trained topk or batchtopk CLT; it is left as it is.
        batches (iterable of `dict`, or a function that returns one):
            Held-out activations: `inputs` and `labels`, raw, `(N, L, D)` each, as of [`ActivationBuffer`]. They are
            read 2 or 3 times and never kept, so an iterable must start anew each time, with the same tokens; a
            generator does not: give the function that makes it.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar for each pass.

    Returns:
        `tuple[CrossLayerTranscoder, dict]`: The new CLT, in eval mode, with copies of the weights. Normalisation
        statistics are kept where there are some: θ is in units of h, which folding does not change. What depends on
        the activation function in its configuration (λ, the bandwidth, the auxiliary loss) is jumprelu's default, so
        that training can go on, and `jumprelu_threshold` is the mean θ. Each layer's L0 is kept. The NMSE of a topk
        CLT with `k_scope="layer"`, which keeps k features on every token, can rise by more than 2 % with any
        thresholds: `nmse_kept` says so. Some further updates as batchtopk, begun from the result, lower it again
        (docs/results.md).

        And the figures on these tokens: `before` and `after`, each what [`MetricSums.compute`] gives; `num_tokens`;
        `nmse_change` and `l0_change_per_layer`, relative to the original; `l0_kept`, whether each layer's L0 changed
        by at most 1 %; `nmse_kept`, whether the NMSE rose by at most 2 %.

    Raises:
        ValueError: If the CLT has another activation function, was never trained (batchtopk) or is lazy; for batches
            that can be read only once, change between passes, or are no such dicts.
    """
    config = clt.config
    if config.activation_fn not in TOPK_FAMILY:
        raise ValueError(
            f"activation_fn={config.activation_fn!r}: only topk and batchtopk CLTs become jumprelu CLTs; use this "
            "one as it is"
        )
    if clt.lazy:
        raise ValueError("this CLT was loaded with lazy=True; load it without lazy to give it thresholds")
    if not callable(batches) and iter(batches) is batches:
        raise ValueError(
            "batches can be read only once, and calibration reads them several times; give a list, or the function "
            "that makes the generator"
        )
    with eval_mode(clt):
        if config.activation_fn == "batchtopk":
            before = measure(clt, read_rows(clt, batches, "Measuring the original", progress)).compute()
            thresholds = torch.stack([threshold().reshape(()) for threshold in clt.thresholds])
        else:
            sums, thresholds = find_thresholds(clt, batches, progress)
            before = sums.compute()
        result = with_thresholds(clt, thresholds)
    rows = read_rows(clt, batches, "Measuring the jumprelu CLT", progress, before["num_tokens"])
    figures = compare(before, measure(result, rows).compute())
    if not figures["l0_kept"]:
        logger.warning(
            "the L0 of a layer changed by %.1f %%: its pre-activations are equal too often for a threshold between; "
            "load the CLT in float32",
            100 * max(figures["l0_change_per_layer"], key=abs),
        )
    return result, figures


def read_rows(
    clt: CrossLayerTranscoder, batches: Iterable, title: str, progress: bool, num_tokens: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Raw inputs and labels, (N, L, D) each, of one pass, which must have `num_tokens` tokens, any number if None."""
    seen = 0
    batches = batches() if callable(batches) else batches
    for batch in tqdm(batches, desc=title, unit="batch", disable=not progress, leave=False):
        if not isinstance(batch, Mapping) or not {"inputs", "labels"} <= set(batch):
            held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"a batch is {held}; give dicts of inputs and labels, (N, L, D) each")
        inputs, labels = (batch[name].to(clt.device) for name in ("inputs", "labels"))
        inputs, labels = (rows.reshape(-1, *rows.shape[-2:]) for rows in (inputs, labels))
        seen += len(inputs)
        yield inputs, labels
    if seen == 0 and num_tokens is None:
        raise ValueError("batches gave no tokens; give held-out activations of some thousand tokens")
    if num_tokens is not None and seen != num_tokens:
        raise ValueError(
            f"batches gave {num_tokens} tokens in the first pass and {seen} in a later one; give the same each time"
        )


def pre_activations(clt: CrossLayerTranscoder, inputs: Tensor) -> Iterator[Tensor]:
    """h (N, F) of one source layer after the other, computed as `forward` does, in float32."""
    x = clt.normalize_inputs(inputs)
    for s, encoder in enumerate(clt.encoders):
        yield encoder(x[:, s]).float()


def find_thresholds(clt: CrossLayerTranscoder, batches: Iterable, progress: bool) -> tuple[MetricSums, Tensor]:
    """The sums of the original, and the thresholds (L,) with which each layer is as active as in the original."""
    config = clt.config
    layers = range(config.num_layers)
    # C_s is known only after the first pass, which measures the original as well.
    leading = torch.zeros(config.num_layers, 2**LEADING_BITS, dtype=torch.int64, device=clt.device)

    def rows_of_batches():
        for inputs, labels in read_rows(clt, batches, "Measuring the original", progress):
            yield inputs, labels  # whose shapes are checked then
            for s, h in enumerate(pre_activations(clt, inputs)):
                leading[s] += torch.bincount(positive_bits(h) >> OTHER_BITS, minlength=2**LEADING_BITS)

    sums = measure(clt, rows_of_batches())
    counts = sums.active_counts.sum(dim=1).tolist()
    # A layer that is never active has no C-th largest pre-activation: all of them are below.
    bins = [bin_of_rank(leading[s], counts[s]) if counts[s] else (2**LEADING_BITS, 0) for s in layers]

    others = torch.zeros(config.num_layers, 2**OTHER_BITS, dtype=torch.int64, device=clt.device)
    below_bin = torch.zeros(config.num_layers, dtype=torch.int32, device=clt.device)
    for inputs, _ in read_rows(clt, batches, "Finding thresholds", progress, int(sums.count)):
        for s, h in enumerate(pre_activations(clt, inputs)):
            bits = positive_bits(h)
            smaller = bits[bits >> OTHER_BITS < bins[s][0]]
            inside = bits[bits >> OTHER_BITS == bins[s][0]]
            others[s] += torch.bincount(inside & (2**OTHER_BITS - 1), minlength=2**OTHER_BITS)
            if len(smaller):
                below_bin[s] = torch.maximum(below_bin[s], smaller.max())
    below_bin = below_bin.view(torch.float32).tolist()
    found = [threshold_in_bin(others[s], *bins[s], counts[s], below_bin[s]) for s in layers]
    return sums, torch.tensor(found, device=clt.device)


def positive_bits(h: Tensor) -> Tensor:
    """The bits of the positive numbers among `h` (float32), as int32, which are in the order of the numbers."""
    return h[h > 0].view(torch.int32)


def bin_of_rank(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest number, from 1 on, and how many numbers are in larger bins."""
    at_least = histogram.flip(0).cumsum(0).flip(0)
    place = int((at_least >= rank).sum()) - 1
    return place, int(at_least[place] - histogram[place])


def threshold_in_bin(histogram: Tensor, leading: int, in_larger_bins: int, count: int, below_bin: float) -> float:
    """
    The threshold θ of a gate h > θ that the `count` largest pre-activations of a layer pass: midway between the last
    of them and the next smaller one, which is at least 0. Where several equal the last, so that `count` cannot be met,
    either all of these pass or none, whichever is nearer to `count`.

    Args:
        histogram (`Tensor` of shape `(2**15,)`): Of the last 15 bits of the pre-activations in the bin.
        leading (`int`): Leading 16 bits of the numbers in the bin.
        in_larger_bins (`int`): How many pre-activations are larger than those in the bin.
        count (`int`): How many are to pass.
        below_bin (`float`): The largest pre-activation that is smaller than those in the bin, or 0.
    """
    if count == 0:
        return below_bin * (1 + MARGIN)
    place, greater = bin_of_rank(histogram, count - in_larger_bins)
    greater += in_larger_bins
    numbers = torch.tensor([leading << OTHER_BITS]) + histogram[: place + 1].cpu().nonzero()[-2:, 0]
    *next_smaller, value = numbers.int().view(torch.float32).tolist()
    if greater + int(histogram[place]) - count > count - greater:
        return value * (1 + MARGIN)
    return (max([below_bin, *next_smaller]) + value) / 2


def with_thresholds(clt: CrossLayerTranscoder, thresholds: Tensor) -> CrossLayerTranscoder:
    """A jumprelu copy of `clt` with the given thresholds (L,)."""
    changes = dict.fromkeys(ACTIVATION_DEFAULTS["jumprelu"])  # None: the activation function's default
    changes |= {"activation_fn": "jumprelu", "jumprelu_threshold": thresholds.double().mean().item()}
    config = CLTConfig.from_dict(clt.config.to_dict(), **changes)
    result = copy.deepcopy(clt)
    result.config = config
    result.thresholds = nn.ModuleList(Threshold(config, config.num_features) for _ in thresholds).to(clt.device)
    for threshold, theta in zip(result.thresholds, thresholds, strict=True):
        threshold.value.copy_(theta.log())
    return result.eval()


def compare(before: dict, after: dict) -> dict:
    """The figures that [`to_jumprelu`] returns."""
    l0 = zip(before["l0_per_layer"], after["l0_per_layer"], strict=True)
    figures = {
        "num_tokens": before["num_tokens"],
        "before": before,
        "after": after,
        "nmse_change": relative_change(before["nmse"], after["nmse"]),
        "l0_change_per_layer": [relative_change(*pair) for pair in l0],
    }
    figures["l0_kept"] = all(abs(change) <= L0_TOLERANCE for change in figures["l0_change_per_layer"])
    figures["nmse_kept"] = figures["nmse_change"] <= NMSE_TOLERANCE
    return figures


def relative_change(before: float, after: float) -> float:
    if before == after:
        return 0.0
    return after / before - 1 if before != 0 else math.inf


def percent(change: float) -> str:
    return f"{round(change, 4) + 0.0:+.2%}"  # no -0.00%


def format_calibration(figures: dict) -> str:
    """
    The figures of [`to_jumprelu`] as aligned plain text: per layer and in total, then whether L0 and NMSE were kept.
    """
    before, after = figures["before"], figures["after"]

    def row(layer, nmse, l0, change):
        return [layer, *(format_number(v, ".4f") for v in nmse), *(f"{v:,.2f}" for v in l0), percent(change)]

    changes = figures["l0_change_per_layer"]
    rows = [["layer", "NMSE before", "after", "L0 before", "after", "change"]]
    for layer, change in enumerate(changes):
        pairs = [[part[name][layer] for part in (before, after)] for name in ("nmse_per_layer", "l0_per_layer")]
        rows.append(row(str(layer), *pairs, change))
    pairs = [[part[name] for part in (before, after)] for name in ("nmse", "l0")]
    rows.append(row("all", *pairs, relative_change(*pairs[1])))
    lines = align_rows(rows)
    verdicts = ["within" if figures[name] else "NOT within" for name in ("l0_kept", "nmse_kept")]
    worst = max(changes, key=abs)
    lines.append(f"L0: {verdicts[0]} {L0_TOLERANCE:.0%} in every layer (largest change {percent(worst)})")
    lines.append(f"NMSE: {verdicts[1]} {NMSE_TOLERANCE:.0%} of the original ({percent(figures['nmse_change'])})")
    if not figures["nmse_kept"]:
        lines.append(
            "  To lower it, train this jumprelu CLT for some updates with --init-from CLT --activation-fn batchtopk, "
            "and calibrate the result: docs/results.md"
        )
    lines.append(f"measured on {figures['num_tokens']:,} held-out tokens, those of the calibration")
    return "\n".join(lines)
