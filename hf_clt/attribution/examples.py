"""
What the features of a graph are: the text on which they are most active, the tokens that they make more and less
likely, and a label made of the two. From one pass over held-out text, or from feature pages.
"""

import gzip
import json
import struct
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.evaluate import eval_mode
from ..features.examples import LayerActivity, add_tokens
from ..features.links import logit_extremes
from ..features.pages import INDEX_FILE, SETTINGS_FILE, format_examples, token_string, weights_digest
from ..features.settings import ExampleSettings
from ..files import read_json
from ..folding import at_least_float32
from ..harvest.harvester import Harvester
from ..harvest.tokens import TokenStream
from ..modeling_clt import CrossLayerTranscoder
from ..sparsity import LayerFeatures
from .rows import decoder_rows


SETTINGS = ExampleSettings(top=16, quantiles=1, per_quantile=1, before=14, after=5)
SHOWN_EXAMPLES, SHOWN_LOGITS = 5, 8  # of the details
LABEL_WORDS = 3  # at each end of a label

Described = dict[tuple[int, int], tuple[str, dict]]


@torch.no_grad()
def describe(
    clt: CrossLayerTranscoder,
    harvester: Harvester,
    tokens: TokenStream,
    features: Collection[tuple[int, int]],
    *,
    progress: bool = False,
) -> Described:
    """
    One pass over text for some features alone.

    Args:
        clt ([`CrossLayerTranscoder`]): The CLT; a lazy one, whose encoders are then read once for each batch of text.
        harvester ([`Harvester`]): Of its language model with the head, at its hooks.
        tokens ([`TokenStream`]): The text, with its tokenizer. What does not count, such as the first position of a
            block, is no place where a feature fires.
        features (`Collection[tuple[int, int]]`): Layers and features.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `dict`: From (layer, feature) to its label and its details, as [`AttributionGraph`] has them. Logits are those
        of [`logit_extremes`]: what a feature writes to all its layers, through the unembedding.

    Raises:
        ValueError: If no token of the text counts.
    """
    wanted = {layer: torch.tensor(found) for layer, found in by_layer(features).items()}
    activity = {layer: LayerActivity(len(found), SETTINGS) for layer, found in wanted.items()}
    tokenizer, blocks, num_blocks, num_tokens = tokens.tokenizer, [], 0, 0
    tokens.rewind()
    bar = tqdm(total=tokens.heldout_tokens, desc="reading examples", unit="token", disable=not progress)
    with eval_mode(clt), clt.folded(), bar:
        for batch in tokens:
            inputs, _ = harvester.harvest(batch, dtype=at_least_float32(harvester.model.dtype))
            for layer, found in wanted.items():
                x = inputs[:, layer].to(clt.device)
                active = only(clt.encode_layer(layer, clt.normalize_inputs(x, layer)), found)
                add_tokens(activity[layer], layer, active, batch["counted"], num_blocks, SETTINGS)
            blocks.append(torch.where(batch["attention_mask"] > 0, batch["input_ids"].to(torch.int32), -1))
            num_blocks, num_tokens = num_blocks + len(blocks[-1]), num_tokens + len(inputs)
            bar.update(len(inputs))
        if num_tokens == 0:
            raise ValueError("no tokens to look at: the text gave none; raise example_tokens or give more text")
        text = torch.cat(blocks)
        unembedding = harvester.model.get_output_embeddings().weight[: len(tokenizer)]
        strings = Strings(tokenizer)
        described = {}
        for layer, found in wanted.items():
            rows = decoder_rows(clt, layer, found.to(clt.device), torch.float32)
            top, _, bottom, _ = logit_extremes(rows, unembedding, SHOWN_LOGITS)
            best = activity[layer].top
            for number, feature in enumerate(found.tolist()):
                order = (best.places[number] >= 0).nonzero().squeeze(1)
                examples = format_examples(best, number, order, text, strings, SETTINGS)
                ends = [[strings[token] for token in end[number].tolist()] for end in (top, bottom)]
                described[layer, feature] = label_and_details(examples, *ends)
    return described


class Strings(dict):
    """How a tokenizer's tokens are shown, found when they are asked for."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        return self.setdefault(token, token_string(self.tokenizer, token))


def by_layer(features: Collection[tuple[int, int]]) -> dict[int, list[int]]:
    """The features of each layer, ascending."""
    found = defaultdict(list)
    for layer, feature in sorted(set(features)):
        found[layer].append(feature)
    return found


def only(found: LayerFeatures, wanted: Tensor) -> LayerFeatures:
    """Of the features of a layer those that are wanted (n,), ascending, as features 0 to n - 1."""
    place = torch.full((found.num_features,), -1, device=found.indices.device)
    place[wanted.to(place.device)] = torch.arange(len(wanted), device=place.device)
    found = found.take((place[found.indices] >= 0).nonzero().squeeze(1))
    return LayerFeatures(found.values, place[found.indices], found.offsets, len(wanted))


def label_and_details(examples: list[dict], top: list[str], bottom: list[str]) -> tuple[str, dict]:
    """
    The label `fires on " Paris", " Rome"; promotes " France"`, and the details that a graph keeps of a feature. It
    fires on the tokens at the peaks of its best examples, those with the largest sum of activations first.

    Args:
        examples (`list[dict]`): As feature pages have them, the highest peak first.
        top, bottom (`list[str]`): The tokens that it makes more and less likely, the strongest first.
    """
    fires = Counter()
    for example in examples:
        peak = example["train_token_ind"]
        fires[example["tokens"][peak]] += example["tokens_acts_list"][peak]
    fires = [token for token, _ in fires.most_common(LABEL_WORDS)]
    label = f"fires on {quoted(fires) if fires else 'nothing in the text'}; promotes {quoted(top[:LABEL_WORDS])}"
    shown = [{"tokens": example["tokens"], "acts": example["tokens_acts_list"]} for example in examples]
    logits = {"top_logits": top[:SHOWN_LOGITS], "bottom_logits": bottom[:SHOWN_LOGITS]}
    return label, {"examples": shown[:SHOWN_EXAMPLES], **logits}


def quoted(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def from_pages(folder: str | Path, clt: CrossLayerTranscoder, features: Collection[tuple[int, int]]) -> Described:
    """
    What [`describe`] gives, out of the feature pages of a CLT that `hf-clt features` wrote, at the length that their
    examples have there.

    Raises:
        ValueError: If there are none, or they are of another CLT.
    """
    index = check_pages(folder, clt)
    described = {}
    for layer, found in by_layer(features).items():
        entry = index[str(layer)]
        with open(Path(folder) / "features" / entry["filename"], "rb") as file:
            for feature in found:
                file.seek(entry["offsets"][feature])
                (length,) = struct.unpack("<I", file.read(4))
                record = json.loads(gzip.decompress(file.read(length)))
                examples = record["examples_quantiles"][0]["examples"]
                described[layer, feature] = label_and_details(examples, record["top_logits"], record["bottom_logits"])
    return described


def check_pages(folder: str | Path, clt: CrossLayerTranscoder) -> dict:
    """The index of the feature pages in a folder, which must be those of this CLT; errors as of [`from_pages`]."""
    path, settings = Path(folder) / INDEX_FILE, Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"feature_pages={str(folder)!r} has no {INDEX_FILE}; give a folder of `hf-clt features`")
    index = json.loads(gzip.decompress(path.read_bytes()))
    shape = [len(entry["offsets"]) - 1 for entry in index.values()]
    same = shape == [clt.config.num_features] * clt.config.num_layers
    if same and settings.is_file() and not clt.lazy:  # of a lazy CLT it would read every weight
        same = read_json(settings).get("clt_digest") == weights_digest(clt)
    if not same:
        raise ValueError(f"feature_pages={str(folder)!r} are those of another CLT; give those of {clt.name_or_path!r}")
    return index


__all__ = ["by_layer", "check_pages", "describe", "from_pages", "label_and_details"]
