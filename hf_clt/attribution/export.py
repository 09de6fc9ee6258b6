"""
Attribution graphs for others: the JSON of circuit-tracer's front end and of Neuronpedia, and networkx.

Nodes have the ids of circuit-tracer: features `{layer}_{feature}_{position}`, errors `{layer}_-1_{position}` (no feature
is called so), tokens `E_{token}_{position}`, targets `{L+1}_{token}_{position}`; a difference of two tokens is
`{L+1}_{token}-{minus}_{position}`, a feature as target `{L+1}_F{layer}-{feature}_{position}`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..files import replacing
from .graph import AttributionGraph, FeatureTarget


if TYPE_CHECKING:
    import networkx

NAME = re.compile(r"[a-zA-Z0-9_.-]+")  # of a slug and a scan
SMALLEST, LARGEST = 2**10, 200 * 2**20  # bytes that Neuronpedia takes

FEATURE_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "target": "logit",
}
NODE_IDS = {
    "cross layer transcoder": re.compile(r"\d+_\d+_\d+"),
    "mlp reconstruction error": re.compile(r"\d+_-1_\d+"),
    "embedding": re.compile(r"E_\d+_\d+"),
    "logit": re.compile(r"\d+_(\d+|\d+-\d+|F\d+-\d+)_\d+"),
}
# What every record must have; a type that admits None may be null.
FIELDS = {
    "data": {"metadata": dict, "qParams": dict, "nodes": list, "links": list},
    "metadata": {
        "slug": str,
        "scan": str,
        "transcoder_list": list,
        "prompt_tokens": list,
        "prompt": str,
        "node_threshold": float | None,
        "schema_version": int,
        "info": dict,
        "feature_details": dict,
    },
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
    "nodes": {
        "node_id": str,
        "feature": int,
        "layer": str,
        "ctx_idx": int,
        "feature_type": str,
        "token_prob": float,
        "is_target_logit": bool,
        "run_idx": int,
        "reverse_ctx_idx": int,
        "jsNodeId": str,
        "clerp": str,
        "influence": float | None,
        "activation": float | None,
    },
    "links": {"source": str, "target": str, "weight": float},
}


def cantor_pair(layer: int, feature: int) -> int:
    """One number for two, by which Neuronpedia finds a feature."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def cumulative_shares(scores: Tensor) -> Tensor:
    """The share of the sum that each score reaches together with all larger ones; of any shape, not negative."""
    flat = scores.flatten().double()
    order = flat.argsort(descending=True, stable=True)
    shares = torch.empty_like(flat)
    shares[order] = flat[order].cumsum(0) / flat.sum().clamp_min(1e-30)
    return shares.reshape(scores.shape)


def node_records(graph: AttributionGraph, influence: Tensor | None = None) -> dict[int, dict[str, Any]]:
    """
    The nodes to show: tokens, targets, and the features and errors that have an edge.

    Args:
        graph ([`AttributionGraph`]): Pruned, if it is to be looked at.
        influence (`Tensor` of shape `(N,)`, *optional*): By default `graph.influence()`.

    Returns:
        By number of the node, in the graph's order: `id`, `kind` (of `FEATURE_TYPES`), `layer` (-1 for tokens, L for
        targets), `position`, `feature` (of tokens and targets None), `label`, `influence` and `cumulative` (the share
        of all influence that the node reaches together with stronger ones), `activation` (of features).
    """
    length, n = len(graph.input_ids), graph.num_features
    influence = graph.influence() if influence is None else influence
    shares, influence = cumulative_shares(influence).tolist(), influence.tolist()
    connected = (graph.edges != 0).any(dim=0)
    connected[:n] |= (graph.edges[:n] != 0).any(dim=1)
    connected[graph.first_token :] = True
    activations, ids = graph.activations.tolist(), graph.input_ids.tolist()
    records = {}

    def add(node: int, kind: str, layer: int, position: int, name: object, label: str, feature: int | None = None):
        first = {"token": "E", "target": graph.num_layers + 1}.get(kind, layer)
        records[node] = {
            "id": f"{first}_{name}_{position}",
            "kind": kind,
            "layer": layer,
            "position": position,
            "feature": feature,
            "label": label,
            "influence": influence[node],
            "cumulative": shares[node],
            "activation": activations[node] if kind == "feature" else None,
        }

    for node in connected.nonzero().flatten().tolist():
        if node < n:
            layer, position, feature = graph.features[node].tolist()
            add(node, "feature", layer, position, feature, graph.labels.get((layer, feature), ""), feature)
        elif node < graph.first_token:
            layer, position = divmod(node - n, length)
            add(node, "error", layer, position, -1, "")
        else:
            position = node - graph.first_token
            add(node, "token", -1, position, ids[position], graph.tokens[position])
    for number, target in enumerate(graph.targets):
        if isinstance(target, FeatureTarget):
            name = f"F{target.layer}-{target.feature}"
        else:
            name = target.token if target.minus is None else f"{target.token}-{target.minus}"
        label = graph.target_name(number)
        add(graph.first_target + number, "target", graph.num_layers, target.position % length, name, label)
    return records


def check_name(field: str, value: object) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"{field}={value!r} is no name for a graph; use letters, digits, `_`, `.` and `-` alone")


def check_json(data: Any, size: int | None = None) -> None:
    """
    Checks a graph in circuit-tracer's format, so that its front end and Neuronpedia load it.

    Args:
        data (`dict`): As it comes from `json.load`.
        size (`int`, *optional*): Its bytes as a file; by default those of its shortest form.

    Raises:
        ValueError: With the first field that is missing, of a wrong type or out of its pattern; for ids that are not
            unique or lead nowhere; for a size that Neuronpedia does not take.
    """

    def check_fields(place: str, record: Any, fields: Mapping[str, Any]) -> None:
        if not isinstance(record, dict):
            raise ValueError(f"{place} is {type(record).__name__}; it must be an object")
        for field, kind in fields.items():
            if field not in record:
                raise ValueError(f"{place}.{field} is missing")
            value = record[field]
            expected = kind | int if kind in (float, float | None) else kind
            if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{place}.{field}={value!r} must be {getattr(kind, '__name__', kind)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{place}.{field}={value!r} is not finite")

    def check_texts(place: str, values: Sequence) -> None:
        for value in values:
            if not isinstance(value, str):
                raise ValueError(f"{place} holds {value!r}; it must hold text alone")

    check_fields("data", data, FIELDS["data"])
    metadata, params, nodes, links = (data[name] for name in FIELDS["data"])
    check_fields("metadata", metadata, FIELDS["metadata"])
    check_name("metadata.slug", metadata["slug"])
    check_name("metadata.scan", metadata["scan"])
    for name in ("prompt_tokens", "transcoder_list"):
        check_texts(f"metadata.{name}", metadata[name])
    seen: dict[str, set] = {"node_id": set(), "jsNodeId": set()}
    for number, node in enumerate(nodes):
        check_fields(place := f"nodes[{number}]", node, FIELDS["nodes"])
        pattern = NODE_IDS.get(node["feature_type"])
        if pattern is None:
            raise ValueError(f"{place}.feature_type={node['feature_type']!r} is none of {', '.join(NODE_IDS)}")
        first, _, position = node["node_id"].split("_") if pattern.fullmatch(node["node_id"]) else (None, "", "")
        if first != node["layer"] or position != str(node["ctx_idx"]):
            raise ValueError(f"{place}.node_id={node['node_id']!r} does not fit its type, layer and position")
        if not 0 <= node["ctx_idx"] < len(metadata["prompt_tokens"]):
            raise ValueError(f"{place}.ctx_idx={node['ctx_idx']} is no position of metadata.prompt_tokens")
        if node["feature_type"] == "logit" and not re.search(r"\(p=[\d.]+\)", node["clerp"]):
            raise ValueError(f"{place}.clerp={node['clerp']!r} of a logit must hold `(p=...)`")
        for field, ids in seen.items():
            if node[field] in ids:
                raise ValueError(f"{place}.{field}={node[field]!r} is not unique")
            ids.add(node[field])
    known = seen["node_id"]

    def check_known(place: str, name: object) -> None:
        if name not in known:
            raise ValueError(f"{place}={name!r} is the id of no node")

    pairs = set()
    for number, link in enumerate(links):
        check_fields(place := f"links[{number}]", link, FIELDS["links"])
        for end in ("source", "target"):
            check_known(f"{place}.{end}", link[end])
        if (pair := (link["source"], link["target"])) in pairs:
            raise ValueError(f"{place}: there is another link from {pair[0]} to {pair[1]}")
        pairs.add(pair)
    check_fields("qParams", params, FIELDS["qParams"])
    check_texts("qParams.pinnedIds", params["pinnedIds"])
    for name in params["pinnedIds"] + [params["clickedId"]] * bool(params["clickedId"]):
        check_known("qParams", name)
    for number, group in enumerate(params["supernodes"]):
        if not isinstance(group, list) or len(group) < 2:
            raise ValueError(f"qParams.supernodes[{number}]={group!r} must be a list of a name and ids")
        check_texts(f"qParams.supernodes[{number}]", group)
        for name in group[1:]:
            check_known(f"qParams.supernodes[{number}]", name)
    size = len(json.dumps(data, separators=(",", ":"))) if size is None else size
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(
            f"the graph is {size:,} bytes; Neuronpedia takes {SMALLEST:,} to {LARGEST:,}: prune it further"
        )


def to_json(
    graph: AttributionGraph,
    path: str | Path,
    slug: str,
    scan: str | None = None,
    *,
    influence: Tensor | None = None,
    pinned: Sequence[str] = (),
    supernodes: Sequence[Sequence[str]] = (),
    transcoder_list: Sequence[str] = (),
    feature_details: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes a graph, usually pruned, for circuit-tracer's front end and Neuronpedia.

    A node's `influence` there is the share of all influence that it reaches with stronger ones, of the graph before
    pruning: of one that was pruned to `node_threshold`, that much of the share here.

    Args:
        path (`str` or `Path`): The file, which is replaced as a whole.
        slug (`str`): The graph's name.
        scan (`str`, *optional*): The model's name on Neuronpedia; by default `graph.info["scan"]`.
        influence (`Tensor` of shape `(N,)`, *optional*): By default `graph.influence()`.
        pinned (`Sequence[str]`): Ids of nodes that are pinned.
        supernodes (`Sequence`): Groups, each a name and the ids of its nodes, as pages save them.
        transcoder_list (`Sequence[str]`): Names by layer, for a `scan` that begins with `custom-`.
        feature_details (`dict`, *optional*): Where features are described: `feature_json_base_url`, or
            `neuronpedia_source_set`.

    Raises:
        ValueError: For a slug or scan that is no name, ids that are no nodes, or a size that Neuronpedia does not take.
    """
    scan = graph.info.get("scan") if scan is None else scan
    check_name("slug", slug)
    check_name("scan", scan)
    threshold = graph.info.get("node_threshold")
    records, weights = node_records(graph, influence), graph.target_weights.tolist()
    words, nodes = graph.info.get("target_words", {}), []
    for node, record in records.items():
        kind, layer, feature, position = (record[name] for name in ("kind", "layer", "feature", "position"))
        number, shown, name = 0, record["label"], record["id"].split("_")[1]
        if kind == "feature":
            feature = cantor_pair(layer, feature)
        elif kind == "error":
            feature = -1
        elif kind == "token":
            feature, shown = position, f'Emb: "{shown}"'
        else:
            number = node - graph.first_target
            # The front end tells targets apart by this number, which only tokens have of themselves.
            feature = int(name) if name.isdigit() else -2 - number
            shown = f'Output "{words.get(name, shown)}"'.replace("(p=", "(p =") + f" (p={weights[number]:.3f})"
        nodes.append(
            {
                "node_id": record["id"],
                "feature": feature,
                "layer": record["id"].split("_")[0],
                "ctx_idx": position,
                "feature_type": FEATURE_TYPES[kind],
                "token_prob": weights[number] if kind == "target" else 0.0,
                "is_target_logit": kind == "target" and number == 0,
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                "jsNodeId": f"{'L' if kind == 'target' else record['id'].split('_')[0]}_{name}-{position}",
                "clerp": shown,
                "influence": None if kind == "target" else record["cumulative"] * (threshold or 1.0),
                "activation": record["activation"],
            }
        )
    data = {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": list(transcoder_list),
            "prompt_tokens": list(graph.tokens),
            "prompt": graph.info.get("prompt") or "".join(graph.tokens),
            "node_threshold": threshold,
            "schema_version": 1,
            "info": {"generator": {"name": "hf_clt", "version": __version__}},
            "feature_details": dict(feature_details or {}),
        },
        "qParams": {
            "pinnedIds": list(pinned),
            "supernodes": [list(group) for group in supernodes],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": records[source]["id"], "target": records[target]["id"], "weight": weight}
            for source, target, weight in edge_list(graph)
        ],
    }
    text = json.dumps(data, separators=(",", ":"))
    check_json(data, len(text))
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def edge_list(graph: AttributionGraph) -> list[tuple[int, int, float]]:
    """Source, target and weight of every edge, by numbers of nodes."""
    rows, columns = graph.edges.nonzero(as_tuple=True)
    targets = torch.where(rows < graph.num_features, rows, rows - graph.num_features + graph.first_target)
    return list(zip(columns.tolist(), targets.tolist(), graph.edges[rows, columns].tolist(), strict=True))


def to_networkx(graph: AttributionGraph, influence: Tensor | None = None) -> "networkx.DiGraph":
    """
    The graph as a `networkx.DiGraph`: nodes are ids with the attributes of [`node_records`], edges lead from source to
    target and have a `weight`.

    Raises:
        ImportError: Without networkx.
    """
    try:
        import networkx
    except ImportError:
        raise ImportError("to_networkx needs networkx; install it with `pip install networkx`") from None
    records, result = node_records(graph, influence), networkx.DiGraph()
    result.add_nodes_from((record["id"], record) for record in records.values())
    result.add_weighted_edges_from((records[s]["id"], records[t]["id"], weight) for s, t, weight in edge_list(graph))
    return result


__all__ = ["check_json", "cumulative_shares", "edge_list", "node_records", "to_json", "to_networkx"]
