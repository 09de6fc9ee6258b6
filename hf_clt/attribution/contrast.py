"""Two graphs beside each other: what one has and the other lacks, "Paris" against "London"."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .graph import AttributionGraph, feature_id


def of_targets(graph: AttributionGraph, numbers: Sequence[int]) -> AttributionGraph:
    """The graph of some of its targets alone, by their number."""
    n, m = graph.num_features, len(graph.targets)
    rows = [*range(n), *(n + number for number in numbers)]
    part = replace(
        graph,
        targets=[graph.targets[number] for number in numbers],
        target_weights=graph.target_weights[list(numbers)],
        edges=graph.edges[rows] if len(numbers) < m else graph.edges,
        rest={name: values[rows] for name, values in graph.rest.items()},
        dropped=graph.dropped[rows],
        info=dict(graph.info),
    )
    part.note_scores()
    return part


def node_ids(graph: AttributionGraph) -> list[str]:
    """An id for every node, the same in each graph of a prompt; the targets are all `target`."""
    length = len(graph.input_ids)
    features = [feature_id(*feature) for feature in graph.features.tolist()]
    errors = [f"error_{layer}_{position}" for layer in range(graph.num_layers) for position in range(length)]
    return features + errors + [f"token_{position}" for position in range(length)] + ["target"] * len(graph.targets)


def described_nodes(graph: AttributionGraph) -> dict[str, dict]:
    """By id the nodes that an edge leaves or reaches, besides targets: what they are and their share of influence."""
    ids, through = node_ids(graph), (graph.influence() / graph.target_weights.sum()).tolist()
    used = (graph.edges != 0).any(dim=0)
    used[: graph.num_features] |= (graph.edges[: graph.num_features] != 0).any(dim=1)
    return {
        ids[node]: {"node": ids[node], "name": graph.name(node), "influence": through[node]}
        for node in used.nonzero().squeeze(1).tolist()
    }


def described_edges(graph: AttributionGraph) -> dict[tuple[str, str], dict]:
    """By the ids of source and target the edges: their weights, and the share of influence that each carries."""
    ids, n = node_ids(graph), graph.num_features
    targets = ids[:n] + ids[graph.first_target :]
    passed = torch.cat([graph.influence()[:n], graph.target_weights]) / graph.target_weights.sum()
    sums = (graph.edges.abs().sum(dim=1) + graph.dropped).clamp_min(1e-10)
    rows, columns = graph.edges.nonzero(as_tuple=True)
    weights = graph.edges[rows, columns]
    carried = weights.abs() * (passed / sums)[rows]
    return {
        (ids[column], targets[row]): {
            "source": ids[column],
            "target": targets[row],
            "weight": weight,
            "influence": influence,
        }
        for row, column, weight, influence in zip(
            rows.tolist(), columns.tolist(), weights.tolist(), carried.tolist(), strict=True
        )
    }


def contrast(first: AttributionGraph, second: AttributionGraph) -> dict:
    """
    What one of two pruned graphs of a prompt has and the other lacks.

    Returns:
        `dict`, JSON-able: `targets`, the two names; `nodes` and `edges`, each with `only_first` and `only_second`, the
        largest share of influence first, and `both`, how many they have in common.

    Raises:
        ValueError: If the graphs are of two prompts.
    """
    if not torch.equal(first.input_ids, second.input_ids):
        raise ValueError("the graphs are of two prompts; give graphs of one prompt with two targets")
    result = {"targets": [graph.target_name(0) for graph in (first, second)]}
    for kind, listed in (("nodes", described_nodes), ("edges", described_edges)):
        left, right = listed(first), listed(second)
        own = [[a[key] for key in a if key not in b] for a, b in ((left, right), (right, left))]
        own = [sorted(records, key=lambda record: -record["influence"]) for records in own]
        result[kind] = {"only_first": own[0], "only_second": own[1], "both": len(left.keys() & right.keys())}
    return result


def format_contrast(found: dict, count: int = 8) -> str:
    """The strongest nodes and edges that one graph has and the other lacks, as text."""
    lines = []
    for side, name in zip(("only_first", "only_second"), found["targets"], strict=True):
        nodes, edges = found["nodes"][side], found["edges"][side]
        lines.append(f"Only in the graph of {name}: {len(nodes)} nodes and {len(edges)} edges; by influence:")
        lines += [f"  {node['influence']:.4%}  {node['node']:<14}  {node['name']}" for node in nodes[:count]]
        lines += [
            f"  {edge['influence']:.4%}  {edge['source']} -> {edge['target']}, {edge['weight']:+.3f}"
            for edge in edges[:count]
        ]
    return "\n".join(lines) + f"\nIn both: {found['nodes']['both']} nodes and {found['edges']['both']} edges."


__all__ = ["contrast", "format_contrast", "of_targets"]
