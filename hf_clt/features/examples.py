"""
Where each feature of a CLT is active: one pass over held-out text, in memory that does not grow with the text.

An *example* of a feature is a block of text on which it is active: its place is the block's first position with the
largest activation, the *peak*. Two sets of examples are kept per feature: those with the highest peaks, and a
uniform sample of all, from which quantiles are shown. Both are "the K best by a key": the key is the peak, or a
pseudo-random number that follows from (seed, layer, feature, block) alone. So the result does not depend on how the
text was cut into batches, nor on whether the pass was interrupted. What grows with the text is the text itself, at
4 bytes per token.

Notation as in `modeling_clt`: L layers, F features per layer, N tokens; P blocks of T positions, K examples kept per
feature, W positions shown around a peak.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.evaluate import eval_mode
from ..folding import at_least_float32
from ..harvest.harvester import Harvester, check_fit
from ..harvest.tokens import TokenStream
from ..modeling_clt import CrossLayerTranscoder
from ..release import write_tensors
from ..sparsity import LayerFeatures, counts_of
from .settings import ExampleSettings


HISTOGRAM_BINS = 32  # a power of two: widths halve and double without rounding
LOWEST_EXPONENT = -126  # of the histogram's upper end before a feature was active: the smallest normal float32


class Examples:
    """
    The K best examples of each feature of a layer, best first; none at first.

    Attributes:
        keys (`Tensor` of shape (F, K), float64): What they are ranked by; -inf where there is no example.
        peaks (`Tensor` of shape (F, K), float32): Activation at the peak, raw; 0 where there is none.
        places (`Tensor` of shape (F, K), int64): Block · T + position of the peak; -1 where there is none.
        windows (`Tensor` of shape (F, K, W), float32): Activations around the peak; 0 outside of the block and on
            tokens that do not count.
    """

    def __init__(self, num_features: int, size: int, width: int):
        self.keys = torch.full((num_features, size), -torch.inf, dtype=torch.float64)
        self.peaks = torch.zeros(num_features, size)
        self.places = torch.full((num_features, size), -1)
        self.windows = torch.zeros(num_features, size, width)


class LayerActivity:
    """
    What is known of the features of one source layer; nothing at first.

    Attributes:
        top, sample ([`Examples`]): Those with the highest peaks, and a uniform sample of all.
        counts (`Tensor` of shape (F,), int64): Counted tokens on which each feature is active.
        smallest, largest (`Tensor` of shape (F,), float32): Of the activations above zero; inf and 0 without any.
        histogram (`Tensor` of shape (F, 32), int64): The activations above zero in equal bins from 0 to 2^exponent.
        exponents (`Tensor` of shape (F,), int64): 2^exponent is the smallest power of two above `largest`.
    """

    def __init__(self, num_features: int, settings: ExampleSettings):
        self.top = Examples(num_features, settings.top, settings.width)
        self.sample = Examples(num_features, settings.sample, settings.width)
        self.counts = torch.zeros(num_features, dtype=torch.int64)
        self.smallest = torch.full((num_features,), torch.inf)
        self.largest = torch.zeros(num_features)
        self.histogram = torch.zeros(num_features, HISTOGRAM_BINS, dtype=torch.int64)
        self.exponents = torch.full((num_features,), LOWEST_EXPONENT)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, to be saved."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for kind, examples in (("top", self.top), ("sample", self.sample)):
            own |= {f"{kind}.{name}": value for name, value in vars(examples).items()}
        return own


@dataclass
class FeatureActivity:
    """
    What one pass over the text gives.

    Args:
        settings ([`ExampleSettings`]): What is kept.
        layers (`list[LayerActivity]`): One per source layer.
        text (`list[Tensor]`): Token ids of the blocks read so far, (P, T) int32 per batch; -1 is padding.
        num_tokens (`int`): Counted tokens read so far.
        finished (`bool`): Whether the text is read to its end.
    """

    settings: ExampleSettings
    layers: list[LayerActivity]
    text: list[Tensor] = field(default_factory=list)
    num_tokens: int = 0
    finished: bool = False

    @property
    def num_blocks(self) -> int:
        return sum(len(blocks) for blocks in self.text)

    def active(self) -> Tensor:
        """Which features were active on any token, bool (L, F)."""
        return torch.stack([layer.counts > 0 for layer in self.layers])


# -- one batch, one layer ---------------------------------------------------------------------------------------------


def keep_best(
    kept: Examples, keys: Tensor, peaks: Tensor, places: Tensor, window: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """
    Adds the examples of further blocks where they are better than those that are kept, in place. Of equal ones the
    earlier stays in front.

    Args:
        kept ([`Examples`]): The K best of each feature so far.
        keys (`Tensor` of shape (F, P), float64): What the P blocks are ranked by; -inf where there is no example.
        peaks, places (`Tensor` of shape (F, P)): As in [`Examples`].
        window: From features (n,) and blocks (n,) to the activations around their peaks, (n, W).
    """
    rows = (keys > kept.keys[:, -1:]).any(dim=1).nonzero().squeeze(1)
    size = kept.keys.shape[1]
    both = torch.cat([kept.keys[rows], keys[rows]], dim=1)
    # Stable: a candidate without an example never comes before an empty place.
    order = both.argsort(dim=1, descending=True, stable=True)[:, :size]
    kept.keys[rows] = both.gather(1, order)
    kept.peaks[rows] = torch.cat([kept.peaks[rows], peaks[rows]], dim=1).gather(1, order)
    kept.places[rows] = torch.cat([kept.places[rows], places[rows]], dim=1).gather(1, order)
    moved = order.clamp(max=size - 1)[:, :, None].expand(-1, -1, kept.windows.shape[2])
    windows = kept.windows[rows].gather(1, moved)
    row, place = (order >= size).nonzero(as_tuple=True)
    windows[row, place] = window(rows[row], order[row, place] - size)
    kept.windows[rows] = windows


def add_to_histogram(histogram: Tensor, exponents: Tensor, indices: Tensor, values: Tensor) -> None:
    """
    Counts activations in equal bins from 0 to 2^exponent of their feature; in place. Where a value does not fit, the
    exponent rises and neighbouring bins are joined, two by two, so that the counts are as if the final bins had been
    known from the start.

    Args:
        histogram (`Tensor` of shape (F, 32), int64), exponents (`Tensor` of shape (F,), int64): The counts so far.
        indices (`Tensor` of shape (nnz,), int64): Features.
        values (`Tensor` of shape (nnz,), float32): Their activations, above zero.
    """
    _, needed = torch.frexp(values)  # value = m · 2^needed with m in [1/2, 1)
    raised = exponents.scatter_reduce(0, indices, needed.long(), "amax")
    shift = (raised - exponents).clamp(max=HISTOGRAM_BINS.bit_length() - 1)
    rows = shift.nonzero().squeeze(1)
    bins = torch.arange(HISTOGRAM_BINS).expand(len(rows), -1) >> shift[rows, None]
    histogram[rows] = torch.zeros_like(histogram[rows]).scatter_add(1, bins, histogram[rows])
    exponents.copy_(raised)
    # numpy's ldexp is exact; torch's multiplies by a power that it computes in float32
    scale = HISTOGRAM_BINS.bit_length() - 1 - exponents[indices]
    bins = torch.from_numpy(np.ldexp(values.double().numpy(), scale.numpy()).astype(np.int64))
    histogram.view(-1).index_add_(0, indices * HISTOGRAM_BINS + bins, torch.ones_like(bins))


def sample_keys(seed: int, layer: int, num_features: int, blocks: Tensor) -> Tensor:
    """
    Pseudo-random numbers in [0, 1), (F, P) float64, that follow from (seed, layer, feature, block) alone. The K active
    blocks of a feature with the largest ones are a uniform sample of its active blocks. The numbers are those of
    SplitMix64 (Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators"), applied once per
    coordinate.
    """

    def mixed(numbers: np.ndarray) -> np.ndarray:
        numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))

    state = mixed(np.array([seed], dtype=np.uint64))
    state = mixed(state ^ np.uint64(layer))
    state = mixed(state ^ np.arange(num_features, dtype=np.uint64))
    state = mixed(state[:, None] ^ blocks.numpy().astype(np.uint64))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def add_tokens(
    activity: LayerActivity,
    layer: int,
    features: LayerFeatures,
    counted: Tensor,
    first_block: int,
    settings: ExampleSettings,
) -> None:
    """
    Adds the activations of one layer on whole blocks of text, in place, on the CPU.

    Args:
        activity ([`LayerActivity`]): What is known so far.
        layer (`int`): Number of the source layer.
        features ([`LayerFeatures`]): Of the counted tokens, in the order of (block, position).
        counted (`Tensor` of shape (P, T), bool): Which positions of the blocks they are.
        first_block (`int`): Number of the first of these blocks in the whole text.
        settings ([`ExampleSettings`]): What is kept.
    """
    values, num_features = features.values.float().cpu(), features.num_features
    features = LayerFeatures(values, features.indices.cpu(), features.offsets.cpu(), num_features)
    features = features.take((values > 0).nonzero().squeeze(1))  # topk lists zeros where too few are above zero
    values, indices = features.values, features.indices
    activity.counts += counts_of(indices, num_features)
    activity.smallest.copy_(activity.smallest.scatter_reduce(0, indices, values, "amin"))
    activity.largest.copy_(activity.largest.scatter_reduce(0, indices, values, "amax"))
    add_to_histogram(activity.histogram, activity.exponents, indices, values)

    num_blocks, context_size = counted.shape
    acts = torch.zeros(num_blocks, context_size, num_features)
    acts[counted] = features.to_dense()
    peaks = acts.amax(dim=1).T
    at = torch.where(peaks > 0, acts.argmax(dim=1).T, -1)  # of equal ones the first
    numbers = first_block + torch.arange(num_blocks)
    places = torch.where(at < 0, -1, numbers * context_size + at)
    around = torch.arange(-settings.before, settings.after + 1)

    def window(feature: Tensor, block: Tensor) -> Tensor:
        position = at[feature, block][:, None] + around
        inside = (position >= 0) & (position < context_size)
        return acts[block[:, None], position.clamp(0, context_size - 1), feature[:, None]] * inside

    keys = torch.where(at < 0, -torch.inf, peaks.double())
    keep_best(activity.top, keys, peaks, places, window)
    keys = torch.where(at < 0, -torch.inf, sample_keys(settings.seed, layer, num_features, numbers))
    keep_best(activity.sample, keys, peaks, places, window)


# -- the whole text ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def collect_activity(
    clt: CrossLayerTranscoder,
    harvester: Harvester,
    tokens: TokenStream,
    settings: ExampleSettings,
    file: Path,
    batch_size: int = 1024,
    *,
    save_seconds: float = 60.0,
    progress: bool = False,
) -> FeatureActivity:
    """
    One pass over the text.

    Args:
        clt ([`CrossLayerTranscoder`]): The CLT, evaluated in eval mode.
        harvester ([`Harvester`]): Runs the language model, at the CLT's hooks.
        tokens ([`TokenStream`]): The text; it is read from its beginning, or from where `file` stands.
        settings ([`ExampleSettings`]): What is kept.
        file (`Path`): Where the state is kept. If it exists, the pass goes on from there, with the same result as one
            that was never interrupted; it must be from the same CLT, settings and text.
        batch_size (`int`, *optional*, defaults to 1024): Most tokens that the CLT sees at a time, but always a block.
        save_seconds (`float`, *optional*, defaults to 60): Seconds between two writes of `file`.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar, with L0 and the share of
            features that were active so far.

    Raises:
        ValueError: If the harvester does not fit the CLT, or no token counts.
    """
    check_fit(clt.config, harvester)
    layers = [LayerActivity(clt.config.num_features, settings) for _ in range(clt.config.num_layers)]
    activity = FeatureActivity(settings, layers)
    tokens.rewind()
    if file.exists():
        position = load_activity(file, activity)
        if not activity.finished:
            tokens.load_state_dict(position)
    saved = time.monotonic()
    bar = tqdm(
        total=tokens.heldout_tokens or None,
        initial=activity.num_tokens,
        desc="Reading the text",
        unit="token",
        disable=not progress,
        leave=False,
    )
    with eval_mode(clt), bar:
        for batch in () if activity.finished else tokens:
            add_batch(clt, harvester, activity, batch, batch_size)
            bar.update(activity.num_tokens - bar.n)
            active = sum(int(layer.counts.sum()) for layer in activity.layers)
            alive = activity.active().float().mean().item()
            bar.set_postfix_str(f"L0 {active / max(1, activity.num_tokens):.1f}, {alive:.1%} of features active")
            if time.monotonic() - saved >= save_seconds:
                save_activity(file, activity, tokens.state_dict())
                saved = time.monotonic()
    if not activity.finished:
        activity.finished = True
        save_activity(file, activity, tokens.state_dict())
    if activity.num_tokens == 0:
        raise ValueError("no tokens to look at: the held-out text gave none; raise eval_tokens or give more text")
    return activity


def add_batch(
    clt: CrossLayerTranscoder,
    harvester: Harvester,
    activity: FeatureActivity,
    batch: dict[str, Tensor],
    batch_size: int,
) -> None:
    """Adds a batch of a [`TokenStream`]; `activity` is changed only after the language model has run."""
    inputs, _ = harvester.harvest(batch, dtype=at_least_float32(harvester.model.dtype))
    counted = batch["counted"]
    at_a_time = max(1, batch_size // counted.shape[1])
    for rows in torch.arange(len(counted)).split(at_a_time):
        first = int(counted[: rows[0]].sum())
        part = inputs[first : first + int(counted[rows].sum())]
        first_block = activity.num_blocks
        for layer, found in enumerate(clt.encode_sparse(part.to(clt.device)).layers):
            add_tokens(activity.layers[layer], layer, found, counted[rows], first_block, activity.settings)
        ids = batch["input_ids"][rows].to(torch.int32)
        activity.text.append(torch.where(batch["attention_mask"][rows] > 0, ids, -1))
        activity.num_tokens += len(part)


# -- the state on disk ------------------------------------------------------------------------------------------------


def save_activity(file: Path, activity: FeatureActivity, position: dict) -> None:
    """Writes the state of a pass, and where the text is to be read on: one safetensors file, replaced as a whole."""
    tensors = {"text": torch.cat(activity.text) if activity.text else torch.empty(0, 0, dtype=torch.int32)}
    for number, layer in enumerate(activity.layers):
        tensors |= {f"{number}.{name}": tensor for name, tensor in layer.tensors().items()}
    record = {"num_tokens": activity.num_tokens, "finished": activity.finished, "position": position}
    # As a tensor, so that the state and the place in the text it belongs to can never come from two writes.
    tensors["record"] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
    write_tensors(file, tensors)


def load_activity(file: Path, activity: FeatureActivity) -> dict:
    """Reads what [`save_activity`] wrote into `activity`; returns where the text is to be read on."""
    tensors = load_file(file)
    record = json.loads(bytes(tensors["record"].tolist()))
    for number, layer in enumerate(activity.layers):
        for name, tensor in layer.tensors().items():
            tensor.copy_(tensors[f"{number}.{name}"])
    activity.text = [tensors["text"]] if len(tensors["text"]) else []
    activity.num_tokens, activity.finished = record["num_tokens"], record["finished"]
    return record["position"]
