"""
Stability: whether a graph names the same features when it is pruned otherwise, when the prompt is said otherwise, and
when the CLT is trained with another seed.
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attribution.graph import AttributionGraph
from ..attribution.rows import decoder_rows
from ..modeling_clt import CrossLayerTranscoder
from .graphs import EDGE_THRESHOLD, NODE_THRESHOLD, graph_of, graphs_of
from .prompts import PARAPHRASES
from .samples import BlockSkipped, Given, figure


THRESHOLDS = (0.7, 0.75, 0.8, 0.85, 0.9)
ALIKE = 0.7  # cosine of what two features of two CLTs write, from which they are one
QUICK_PROMPTS, QUICK_PAIRS = 8, 6
# in which two CLTs are alike whose features may be
KIND = ("num_features", "activation_fn", "reach", "feature_input_hook", "feature_output_hook")


@torch.no_grad()
def stability(clt: CrossLayerTranscoder, given: Given) -> dict:
    """
    Overlaps of the features that pruning keeps, |A ∩ B| / |A ∪ B|.

    Returns:
        `dict` of figures: `thresholds`, the overlap with what is kept at [`NODE_THRESHOLD`], by [`THRESHOLDS`]
        (samples are prompts), and `lowest_and_highest`, of the first and the last; `paraphrases`, of (layer, feature)
        wherever they are active, between a prompt and another way to say it (samples are pairs), `unrelated`, between
        a prompt and the other pairs' paraphrases, and `paraphrases_over_unrelated`, their difference. With a
        `reference` of the same kind, such as one of another seed: `seeds`, the share of the kept features of both with
        a partner among those that the other keeps in the same layer and position, whose writes have a cosine of
        [`ALIKE`] or more.

    Raises:
        BlockSkipped: If no feature is active.
    """
    rows, seeds = [], []
    for graph in graphs_of(clt, given, QUICK_PROMPTS):
        kept = [nodes_of(graph.prune(threshold, EDGE_THRESHOLD)) for threshold in THRESHOLDS]
        usual = kept[THRESHOLDS.index(NODE_THRESHOLD)]
        rows.append([overlap(nodes, usual) for nodes in kept] + [overlap(kept[0], kept[-1])])
    *columns, ends = (figure(values, given.seed) for values in zip(*rows, strict=True))
    by_threshold = {f"{threshold}": found for threshold, found in zip(THRESHOLDS, columns, strict=True)}
    result = {"thresholds": by_threshold, "lowest_and_highest": ends}
    pairs = list(PARAPHRASES.items())[: QUICK_PAIRS if given.quick else None]
    pairs = [
        [
            {node[::2] for node in nodes_of(graph_of(clt, given, text).prune(NODE_THRESHOLD, EDGE_THRESHOLD))}
            for text in pair
        ]
        for pair in tqdm(pairs, "paraphrases", unit="pair", disable=not given.progress)
    ]
    same = [overlap(*pair) for pair in pairs]
    unlike = [
        sum(overlap(first, second) for j, (_, second) in enumerate(pairs) if j != i) / (len(pairs) - 1)
        for i, (first, _) in enumerate(pairs)
    ]
    result["paraphrases"], result["unrelated"] = figure(same, given.seed), figure(unlike, given.seed)
    gains = [one - another for one, another in zip(same, unlike, strict=True)]
    result["paraphrases_over_unrelated"] = figure(gains, given.seed)
    other = given.reference
    if other is not None and all(getattr(clt.config, name) == getattr(other.config, name) for name in KIND):
        prompts = given.prompts[: QUICK_PROMPTS if given.quick else None]
        with clt.folded(), other.folded():
            for prompt in tqdm(prompts, "seeds", unit="prompt", disable=not given.progress):
                both = [graph_of(c, given, prompt).prune(NODE_THRESHOLD, EDGE_THRESHOLD) for c in (clt, other)]
                if all(graph.num_features for graph in both):
                    seeds.append(shared((clt, other), both))
        if not seeds:
            raise BlockSkipped("no feature of the other CLT is active on any prompt")
        result["seeds"] = figure(seeds, given.seed)
    return result


def nodes_of(graph: AttributionGraph) -> set[tuple[int, int, int]]:
    return set(map(tuple, graph.features.tolist()))


def overlap(first: set, second: set) -> float:
    """|A ∩ B| / |A ∪ B|; 1 of two that are empty."""
    return len(first & second) / len(first | second) if first or second else 1.0


def shared(clts: tuple[CrossLayerTranscoder, CrossLayerTranscoder], graphs: list[AttributionGraph]) -> float:
    """The share of the features of two graphs of a prompt that have a partner in the other."""
    found = total = 0
    places = [graph.features[:, 0] * len(graph.input_ids) + graph.features[:, 1] for graph in graphs]
    for place in torch.cat(places).unique().tolist():
        layer = place // len(graphs[0].input_ids)
        first, second = (
            directions(clt, layer, graph.features[at == place, 2])
            for clt, graph, at in zip(clts, graphs, places, strict=True)
        )
        total += len(first) + len(second)
        if len(first) and len(second):
            partners = first @ second.T >= ALIKE
            found += int(partners.any(dim=0).sum() + partners.any(dim=1).sum())
    return found / total


def directions(clt: CrossLayerTranscoder, layer: int, features: Tensor) -> Tensor:
    """What features write to all their layers, as unit vectors (u, J · D)."""
    rows = decoder_rows(clt, layer, features.to(clt.device), torch.float32).flatten(1).cpu()
    return torch.nn.functional.normalize(rows, dim=1)


__all__ = ["stability"]
