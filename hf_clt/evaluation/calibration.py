"""
From a topk or batchtopk CLT to a jumprelu CLT: thresholds with which every layer is exactly as active as before.

A top-k CLT fires on C_s (token, feature) pairs of source layer s over a set of held-out tokens. With one threshold θ_s
per layer, a = h · 1[h > θ_s] fires on as many pairs if θ_s lies between the C_s-th and the next smaller of all
pre-activations of the layer; with one threshold per feature, every feature fires on as many tokens as before if its θ
lies between two of its own. Both are order statistics of numbers too many to keep. They are found digit by digit: the
bits of positive float32 numbers, read as integers, are in the order of the numbers (IEEE 754), so a histogram of the
leading bits says in which bin the C-th largest lies, and the next pass over the tokens refines this bin alone. The
result is exact, and memory does not depend on the number of tokens.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm.auto import tqdm

from ..configuration_clt import ACTIVATION_DEFAULTS, TOPK_FAMILY, CLTConfig
from ..modeling_clt import CrossLayerTranscoder, Threshold
from .evaluate import eval_mode, measure
from .metrics import MetricSums
from .report import shown


logger = logging.getLogger(__name__)

L0_TOLERANCE = 0.01  # of each layer's L0
NMSE_TOLERANCE = 0.02  # of the NMSE, mean over layers
VALUE_BITS = 31  # of a positive float32
# Leading bits found by each pass. Histograms per layer: 65,536 counts; per feature 256 for each of its features, which
# is less than the feature's own weights.
DIGITS = {"layer": (16, 15), "feature": (8, 8, 8, 7)}
# θ lives as log θ in float32; reading it back moves it by less than this share of itself.
MARGIN = 1e-6


@torch.no_grad()
def to_jumprelu(
    clt: CrossLayerTranscoder,
    batches: Iterable[Mapping[str, Tensor]] | Callable[[], Iterable[Mapping[str, Tensor]]],
    per: str = "layer",
    progress: bool = False,
) -> tuple[CrossLayerTranscoder, dict]:
    """
    A jumprelu CLT with the weights of a topk or batchtopk CLT, and thresholds calibrated on held-out activations.

    `per="layer"`: all features of a layer have the same θ, with which the layer's L0 is that of the original in eval
    mode. A batchtopk CLT gates at its running thresholds in eval mode: these are kept as they are, so the function
    is the same on every token. `per="feature"`: every feature fires on as many of the tokens as in the original; one
    that fires on none of them gets the median threshold of its layer, or its largest pre-activation if that is higher.
    Where equal pre-activations make a count impossible (bfloat16 weights), features are given one too many or too few
    in turn, so that the layer's L0 stays.

    Args:
        clt ([`CrossLayerTranscoder`]): A topk or batchtopk CLT, trained; it is left as it is.
        batches (iterable of `dict`, or a function that returns one):
            Held-out activations: `inputs` and `labels`, raw, `(N, L, D)` each, as of [`ActivationBuffer`]. They are
            walked 2 to 6 times and never kept, so an iterable must start anew each time, with the same tokens; a
            generator does not: give the function that makes it.
        per (`str`, *optional*, defaults to `"layer"`): `"layer"` or `"feature"`.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar for each pass.

    Returns:
        `tuple[CrossLayerTranscoder, dict]`: The new CLT, in eval mode, with copies of the weights. Normalisation
        statistics are kept where there are some: θ is in units of h, which folding does not change. What depends on
        the activation function in its configuration (λ, the bandwidth, the auxiliary loss) is jumprelu's default, so
        that training can go on, and `jumprelu_threshold` is the mean θ. Each layer's L0 is kept; the NMSE of a topk
        CLT with `k_scope="layer"`, which fills up k features on every token, can rise by more than 2 %, which no
        thresholds mend: `nmse_kept` says so. Some further updates as batchtopk, begun from the result, do
        (docs/results.md); with `per="layer"` that one's calibration changes nothing.

        And the figures on these tokens: `before` and `after`, each what [`MetricSums.compute`] gives; `num_tokens`;
        `nmse_change` and `l0_change_per_layer`, relative to the original; `l0_kept`, whether each layer's L0 changed
        by at most 1 %; `nmse_kept`, whether the NMSE rose by at most 2 %.

    Raises:
        ValueError: If the CLT has another activation function, was never trained (batchtopk) or is lazy; for an
            unknown `per`; for batches that can be walked only once, change between passes, or are no such dicts.
    """
    config = clt.config
    if config.activation_fn not in TOPK_FAMILY:
        raise ValueError(
            f"activation_fn={config.activation_fn!r}: only topk and batchtopk CLTs become jumprelu CLTs; use this "
            "one as it is"
        )
    if per not in DIGITS:
        raise ValueError(f"per={per!r} is unknown; give 'layer' or 'feature'")
    if clt.lazy:
        raise ValueError("this CLT was loaded with lazy=True; load it without lazy to give it thresholds")
    walk = walker(batches)
    with eval_mode(clt):
        if per == "layer" and config.activation_fn == "batchtopk":
            sums = measure(clt, passing(clt, walk, "Measuring the original", progress))
            thresholds = [threshold().expand(config.num_features) for threshold in clt.thresholds]
        else:
            sums, thresholds = matched_thresholds(clt, walk, per, progress)
        before = sums.compute()
        result = with_thresholds(clt, thresholds)
    rows = passing(clt, walk, "Measuring the jumprelu CLT", progress, before["num_tokens"])
    figures = compared(before, measure(result, rows).compute())
    if not figures["l0_kept"]:
        worst = max(figures["l0_change_per_layer"], key=abs)
        logger.warning(
            "the L0 of a layer changed by %.1f %%: its pre-activations are equal too often for a threshold between; "
            "load the CLT in float32, or calibrate per='feature'",
            100 * worst,
        )
    return result, figures


# -- passes over the tokens -------------------------------------------------------------------------------------------


def walker(batches) -> Callable[[], Iterable]:
    """A function that gives the batches from their beginning."""
    if callable(batches):
        return batches
    if iter(batches) is batches:
        raise ValueError(
            "batches can be walked only once, and calibration walks them several times; give a list, or the function "
            "that makes the generator"
        )
    return lambda: batches


def passing(
    clt: CrossLayerTranscoder, walk: Callable, title: str, progress: bool, num_tokens: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Raw inputs and labels, (N, L, D) each, of one pass, which must have `num_tokens` tokens, any number if None."""
    seen = 0
    for batch in tqdm(walk(), desc=title, unit="batch", disable=not progress, leave=False):
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
    x = clt._normalized_inputs(inputs)
    for s, encoder in enumerate(clt.encoders):
        yield encoder.pre_activations(x[:, s]).float()


# -- order statistics -------------------------------------------------------------------------------------------------


def matched_thresholds(
    clt: CrossLayerTranscoder, walk: Callable, per: str, progress: bool
) -> tuple[MetricSums, list[Tensor]]:
    """
    The sums of the original, and for each layer the thresholds (F,) with which each group of features, all of the
    layer or one, is as active as in the original.
    """
    config = clt.config
    layers, num_features, digits = range(config.num_layers), config.num_features, DIGITS[per]
    # group (F,): features of the same group have one threshold.
    group = torch.zeros(num_features, dtype=torch.int64, device=clt.device)
    if per == "feature":
        group = torch.arange(num_features, device=clt.device)
    num_groups = int(group[-1]) + 1

    # The first pass measures the original as well: only then it is known which order statistics are wanted.
    sums = MetricSums(config.num_layers, config.d_model, num_features, clt.device)
    histograms = [0 for _ in layers]
    prefixes = [torch.zeros(num_groups, dtype=torch.int64, device=clt.device) for _ in layers]
    for inputs, labels in passing(clt, walk, "Measuring the original", progress):
        output = clt(inputs)
        sums.update(labels, output.reconstruction, output.features)
        for s, h in enumerate(pre_activations(clt, inputs)):
            histograms[s] += digit_histogram(h, group, prefixes[s], 0, digits[0])
    num_tokens = int(sums.count)
    active = sums.active_counts.to(clt.device)
    counts = [torch.zeros(num_groups, dtype=torch.int64, device=clt.device).index_add_(0, group, a) for a in active]

    ranks, known = list(counts), 0
    for number, bits in enumerate(digits):
        if number > 0:
            histograms = [0 for _ in layers]
            title = f"Finding thresholds ({number} of {len(digits)})"
            for inputs, _ in passing(clt, walk, title, progress, num_tokens):
                for s, h in enumerate(pre_activations(clt, inputs)):
                    histograms[s] += digit_histogram(h, group, prefixes[s], known, bits)
        found = [next_digit(*state) for state in zip(histograms, prefixes, ranks, strict=True)]
        prefixes, ranks, equal = (list(column) for column in zip(*found, strict=True))
        known += bits

    # A group that never fires has no C-th largest pre-activation: everything lies below.
    values = [
        torch.where(count > 0, prefix.int().view(torch.float32), torch.inf)
        for prefix, count in zip(prefixes, counts, strict=True)
    ]
    below = [torch.zeros(num_groups, device=clt.device) for _ in layers]
    title = f"Finding thresholds ({len(digits)} of {len(digits)})"
    for inputs, _ in passing(clt, walk, title, progress, num_tokens):
        for s, h in enumerate(pre_activations(clt, inputs)):
            largest = torch.where(h < values[s][group], h, 0).amax(dim=0).clamp(min=0)
            below[s].scatter_reduce_(0, group, largest, "amax")
    return sums, [place_between(below[s], values[s], counts[s], counts[s] - ranks[s], equal[s])[group] for s in layers]


def digit_histogram(h: Tensor, group: Tensor, prefix: Tensor, known: int, bits: int) -> Tensor:
    """
    How often each next digit occurs among the positive pre-activations that may still be the wanted ones.

    Args:
        h (`Tensor` of shape `(N, F)`, float32): Pre-activations.
        group (`Tensor` of shape `(F,)`, int64): Group of each feature.
        prefix (`Tensor` of shape `(G,)`, int64): The leading `known` bits of each group's wanted number.
        known (`int`): Number of bits that are known.
        bits (`int`): Number of bits of the next digit.

    Returns:
        `Tensor` of shape `(G, 2**bits)`, int64.
    """
    token, feature = (h > 0).nonzero(as_tuple=True)
    number, owner = h[token, feature].view(torch.int32), group[feature]
    wanted = number >> (VALUE_BITS - known) == prefix[owner]
    number, owner = number[wanted], owner[wanted]
    digit = (number >> (VALUE_BITS - known - bits)) & (2**bits - 1)
    return torch.bincount(owner * 2**bits + digit, minlength=len(prefix) * 2**bits).view(len(prefix), -1)


def next_digit(histogram: Tensor, prefix: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    The digit of the `rank`-th largest number of each group, from the histogram (G, 2**bits) of the digits.

    Returns:
        The prefix with the digit, the rank among the numbers that share it, and how many these are, (G,) int64 each.
    """
    at_least = pad(histogram.flip(1).cumsum(1).flip(1), (0, 1))  # numbers whose digit is d or larger
    digit = ((at_least[:, :-1] >= rank[:, None]).sum(dim=1) - 1)[:, None]
    rank = rank - at_least.gather(1, digit + 1)[:, 0]
    return prefix * histogram.shape[1] + digit[:, 0], rank, histogram.gather(1, digit)[:, 0]


def place_between(below: Tensor, value: Tensor, count: Tensor, greater: Tensor, equal: Tensor) -> Tensor:
    """
    Thresholds θ for a strict gate h > θ that let `count` pre-activations of each group pass.

    Args:
        below (`Tensor` of shape `(G,)`): The largest pre-activation smaller than `value`, at least 0.
        value (`Tensor` of shape `(G,)`): The `count`-th largest, inf where `count` is 0.
        count (`Tensor` of shape `(G,)`, int64): How many shall pass.
        greater (`Tensor` of shape `(G,)`, int64): How many are larger than `value`.
        equal (`Tensor` of shape `(G,)`, int64): How many are `value`, itself included.

    Returns:
        `Tensor` of shape `(G,)`, float32: midway between `below` and `value`. Where so many are equal to `value` that
        `count` cannot be met, either all of them pass or none, whichever keeps the sum over the groups.
    """
    theta = below + (value - below) / 2
    missed = 0
    for g in ((count > 0) & (greater + equal > count)).nonzero().flatten().tolist():
        too_many, too_few = int(greater[g] + equal[g] - count[g]), int(greater[g] - count[g])
        if abs(missed + too_many) <= abs(missed + too_few):
            missed += too_many
        else:
            missed += too_few
            theta[g] = value[g] * (1 + MARGIN)
    fires = count > 0
    usual = theta[fires].median() if fires.any() else theta.new_zeros(())
    return torch.where(fires, theta, torch.maximum(below * (1 + MARGIN), usual))


# -- the result -------------------------------------------------------------------------------------------------------


def with_thresholds(clt: CrossLayerTranscoder, thresholds: list[Tensor]) -> CrossLayerTranscoder:
    """A jumprelu copy of `clt` with the given thresholds, (F,) per layer."""
    theta = torch.stack(thresholds).double().mean().item()
    changes = dict.fromkeys(ACTIVATION_DEFAULTS["jumprelu"])  # None: the activation function's default
    changes |= {"activation_fn": "jumprelu", "jumprelu_threshold": theta}
    config = CLTConfig.from_dict(clt.config.to_dict(), **changes)
    result = copy.deepcopy(clt)
    result.config = config
    result.thresholds = nn.ModuleList(Threshold(config, config.num_features) for _ in thresholds).to(clt.device)
    for threshold, theta in zip(result.thresholds, thresholds, strict=True):
        threshold.value.copy_(theta.log())
    return result.eval()


def compared(before: dict, after: dict) -> dict:
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
    rows = [["layer", "NMSE before", "after", "L0 before", "after", "change"]]
    changes = [*figures["l0_change_per_layer"], relative_change(before["l0"], after["l0"])]
    for layer, change in enumerate(changes):
        is_total = layer == len(changes) - 1
        nmse = [part["nmse"] if is_total else part["nmse_per_layer"][layer] for part in (before, after)]
        l0 = [part["l0"] if is_total else part["l0_per_layer"][layer] for part in (before, after)]
        name = "all" if is_total else str(layer)
        rows.append([name, *(shown(v, ".4f") for v in nmse), *(f"{v:,.2f}" for v in l0), percent(change)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * len(lines[0])
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    worst = max(figures["l0_change_per_layer"], key=abs)
    verdict = "within" if figures["l0_kept"] else "NOT within"
    lines.append(f"L0: {verdict} {L0_TOLERANCE:.0%} in every layer (largest change {percent(worst)})")
    verdict = "within" if figures["nmse_kept"] else "NOT within"
    lines.append(f"NMSE: {verdict} {NMSE_TOLERANCE:.0%} of the original ({percent(figures['nmse_change'])})")
    if not figures["nmse_kept"]:
        lines.append(
            "  To mend it, train this jumprelu CLT (thresholds per layer) for some updates with --init-from CLT "
            "--activation-fn batchtopk, and calibrate what comes out: docs/results.md"
        )
    lines.append(f"measured on {figures['num_tokens']:,} held-out tokens, those of the calibration")
    return "\n".join(lines)


__all__ = ["format_calibration", "to_jumprelu"]
