"""
The graphs of an audit, one per prompt, made once and shared by the blocks that read them; and what they say by
themselves: their scores before and after pruning, and by how many steps their targets are explained.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attribution.graph import SMALLEST, AttributionGraph, Target
from ..attribution.request import prompt_tokens
from ..attribution.tracing import attribute
from ..folding import at_least_float32
from ..modeling_clt import CrossLayerTranscoder
from .prompts import QUICK
from .samples import BlockSkipped, Given, figure


# The same for every CLT, or graphs could not be compared.
MAX_FEATURE_NODES, RANK_EVERY = 1024, 512
NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98
LONGEST = 8  # steps; longer paths count there

_made = WeakKeyDictionary()  # by language model and CLT


def graph_of(
    clt: CrossLayerTranscoder, given: Given, prompt: str, targets: Sequence[Target | int] | None = None
) -> AttributionGraph:
    """
    The graph of a prompt with at most [`MAX_FEATURE_NODES`] features, as the tokenizer gives it, nothing in front. It
    is kept as long as the CLT and the language model are, whose weights must stay what they are; do not change it.

    Raises:
        ValueError: As [`attribute`] and [`prompt_tokens`].
    """
    made = _made.setdefault(given.model, WeakKeyDictionary()).setdefault(clt, {})
    key = prompt, None if targets is None else tuple(targets)
    if key not in made:
        made[key] = attribute(
            given.model,
            clt,
            prompt_tokens(given.tokenizer, prompt, given.model.config),
            targets,
            MAX_FEATURE_NODES,
            rank_every=RANK_EVERY,
            dtype=at_least_float32(given.model.dtype),
        )
    return made[key]


def graphs_of(clt: CrossLayerTranscoder, given: Given, quick: int = QUICK) -> list[AttributionGraph]:
    """
    Those of the prompts, of a quick audit of the first `quick` of them; without those on which no feature is active.

    Raises:
        BlockSkipped: If there is none.
    """
    prompts = given.prompts[: quick if given.quick else None]
    bar = tqdm(prompts, "graphs", unit="prompt", disable=not given.progress)
    found = [graph_of(clt, given, prompt) for prompt in bar]
    found = [graph for graph in found if graph.num_features]
    if not found:
        raise BlockSkipped(f"no feature is active on any of {len(prompts)} prompts")
    return found


def graphs(clt: CrossLayerTranscoder, given: Given) -> dict:
    """
    What the graphs of the prompts say; samples are prompts.

    Returns:
        `dict` of figures: `replacement` and `completeness` (what went to features that are no nodes counts as error),
        `replacement_of_nodes` and `completeness_of_nodes` (it is left out, as circuit-tracer does),
        `replacement_pruned` and `completeness_pruned`, at [`NODE_THRESHOLD`] and [`EDGE_THRESHOLD`] (see
        [`AttributionGraph.prune`]); `outside`, the share that belongs to no node; `active_features`, `nodes` and
        `nodes_pruned`, how many features; `path_length` and `path_length_to_tokens`, the mean number of edges of a
        path from a target to a token or an error, and to a token, by influence; `influence_by_length`, the shares of
        paths by how many edges they have.

    Raises:
        BlockSkipped: If no feature is active.
    """
    rows, lengths = [], []
    for graph in graphs_of(clt, given):
        pruned = graph.prune(NODE_THRESHOLD, EDGE_THRESHOLD)
        row = dict(graph.scores()) | {f"{name}_pruned": value for name, value in _scores_pruned(pruned).items()}
        row |= {"outside": sum(graph.outside().values()), "active_features": graph.info["active_features"]}
        row |= {"nodes": graph.num_features, "nodes_pruned": pruned.num_features}
        ends = influence_by_length(graph)
        steps = torch.arange(1, len(ends) + 1, dtype=ends.dtype)
        row["path_length"] = (steps @ ends.sum(dim=1) / ends.sum()).item()
        row["path_length_to_tokens"] = (steps @ ends[:, 0] / ends[:, 0].sum().clamp_min(1e-30)).item()
        rows.append(row)
        shares = torch.zeros(LONGEST, dtype=torch.float64)
        shares.index_add_(0, (steps.long() - 1).clamp_max(LONGEST - 1), (ends.sum(dim=1) / ends.sum()).double())
        lengths.append(shares)
    found = {name: figure([row[name] for row in rows], given.seed) for name in rows[0]}
    by_length = enumerate(torch.stack(lengths, dim=1), start=1)
    found["influence_by_length"] = {
        f"{steps}+" if steps == LONGEST else f"{steps}": figure(values, given.seed) for steps, values in by_length
    }
    return found


def _scores_pruned(pruned: AttributionGraph) -> dict[str, float]:
    return {name: pruned.info["after_pruning"][name] for name in ("replacement", "completeness")}


def row_sums(graph: AttributionGraph) -> Tensor:
    """Σ|A| of each row, with what went to features that are no nodes, (n + m,)."""
    return (graph.edges.abs().sum(dim=1) + graph.dropped).clamp_min(SMALLEST)


def influence_by_length(graph: AttributionGraph) -> Tensor:
    """
    Influence that ends at tokens and at errors after paths of 1, 2, ... edges, (steps, 2); what goes to features that
    are no nodes ends nowhere.
    """
    n, sums = graph.num_features, row_sums(graph)
    through = (graph.target_weights / sums[n:]) @ graph.edges[n:].abs()
    found = []
    while True:
        found.append(
            torch.stack([through[graph.first_token :].sum(), through[graph.first_error : graph.first_token].sum()])
        )
        if not through[:n].any():
            return torch.stack(found)
        through = (through[:n] / sums[:n]) @ graph.edges[:n].abs()


__all__ = ["EDGE_THRESHOLD", "MAX_FEATURE_NODES", "NODE_THRESHOLD", "graph_of", "graphs", "graphs_of"]
