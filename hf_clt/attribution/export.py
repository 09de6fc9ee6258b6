"""
Attribution graphs for others: the JSON of circuit-tracer's front end and of Neuronpedia, and networkx.

Ids are those of circuit-tracer: features `{layer}_{feature}_{position}`, errors `{layer}_-1_{position}` (no feature is
called so), tokens `E_{token}_{position}`, targets `{L+1}_{token}_{position}`; a difference of two tokens is
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
    "metadata": dict.fromkeys(("slug", "scan", "prompt"), str)
    | dict.fromkeys(("prompt_tokens", "transcoder_list"), list)
    | {"node_threshold": float | None, "schema_version": int, "info": dict, "feature_details": dict},
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
    "nodes": dict.fromkeys(("node_id", "layer", "feature_type", "jsNodeId", "clerp"), str)
    | dict.fromkeys(("feature", "ctx_idx", "run_idx", "reverse_ctx_idx"), int)
    | {"token_prob": float, "is_target_logit": bool, "influence": float | None, "activation": float | None},
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


def node_records(graph: AttributionGraph) -> dict[int, dict[str, Any]]:
    """
    The nodes to show: tokens, targets, and the features and errors that have an edge.

    Returns:
        By number of the node, in the graph's order: `id`, `kind` (of `FEATURE_TYPES`), `layer` (-1 for tokens, L for
        targets), `position`, `feature` (of tokens and targets None), `label`, `influence` and `cumulative` (the share
        of all influence that the node reaches together with stronger ones), `activation` (of features).
    """
    length, n, influence = len(graph.input_ids), graph.num_features, graph.influence()
    shares, influence = cumulative_shares(influence).tolist(), influence.tolist()
    connected = (graph.edges != 0).any(dim=0)
    connected[:n] |= (graph.edges[:n] != 0).any(dim=1)
    connected[graph.first_token :] = True
    activations, ids = graph.activations.tolist(), graph.input_ids.tolist()
    records = {}

    def add(node: int, kind: str, layer: int, position: int, name: object, label: str, feature: int | None = None):
        first = {"token": "E", "target": graph.num_layers + 1}.get(kind, layer)
        record = {"id": f"{first}_{name}_{position}", "kind": kind, "layer": layer, "position": position}
        record |= {"feature": feature, "label": label, "influence": influence[node], "cumulative": shares[node]}
        records[node] = record | {"activation": activations[node] if kind == "feature" else None}

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


def check_fields(place: str, record: Any, kind: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{place} is {type(record).__name__}; it must be an object")
    for field, expected in FIELDS[kind].items():
        if field not in record:
            raise ValueError(f"{place}.{field} is missing")
        value, allowed = record[field], expected | int if expected in (float, float | None) else expected
        if not isinstance(value, allowed) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(f"{place}.{field}={value!r} must be {getattr(expected, '__name__', expected)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{place}.{field}={value!r} is not finite")


def check_node(place: str, node: Any, num_tokens: int) -> None:
    check_fields(place, node, "nodes")
    pattern = NODE_IDS.get(node["feature_type"])
    if pattern is None:
        raise ValueError(f"{place}.feature_type={node['feature_type']!r} is none of {', '.join(NODE_IDS)}")
    first, _, position = node["node_id"].split("_") if pattern.fullmatch(node["node_id"]) else ("", "", "")
    if first != node["layer"] or position != str(node["ctx_idx"]):
        raise ValueError(f"{place}.node_id={node['node_id']!r} does not fit its feature_type, layer and ctx_idx")
    if not 0 <= node["ctx_idx"] < num_tokens:
        raise ValueError(f"{place}.ctx_idx={node['ctx_idx']} is no position of metadata.prompt_tokens")
    if node["feature_type"] == "logit" and not re.search(r"\(p=[\d.]+\)$", node["clerp"]):
        raise ValueError(f"{place}.clerp={node['clerp']!r} of a logit must end in `(p=...)`")


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
    check_fields("data", data, "data")
    metadata, params, nodes, links = (data[name] for name in FIELDS["data"])
    check_fields("metadata", metadata, "metadata")
    check_fields("qParams", params, "qParams")
    for name in ("slug", "scan"):
        check_name(f"metadata.{name}", metadata[name])
    for name in ("prompt_tokens", "transcoder_list"):
        for value in metadata[name]:
            if not isinstance(value, str):
                raise ValueError(f"metadata.{name} holds {value!r}; it must hold text alone")
    seen: set[tuple[str, Any]] = set()

    def check_new(place: str, field: str, value: Any) -> None:
        if (field, value) in seen:
            raise ValueError(f"{place}.{field}={value!r} is not unique")
        seen.add((field, value))

    def check_known(place: str, value: Any) -> None:
        if not isinstance(value, str) or ("node_id", value) not in seen:
            raise ValueError(f"{place}={value!r} is the id of no node")

    for number, node in enumerate(nodes):
        check_node(place := f"nodes[{number}]", node, len(metadata["prompt_tokens"]))
        for field in ("node_id", "jsNodeId"):
            check_new(place, field, node[field])
    for number, link in enumerate(links):
        check_fields(place := f"links[{number}]", link, "links")
        for end in ("source", "target"):
            check_known(f"{place}.{end}", link[end])
        check_new(place, "source, target", (link["source"], link["target"]))
    for name in params["pinnedIds"]:
        check_known("qParams.pinnedIds", name)
    if params["clickedId"]:
        check_known("qParams.clickedId", params["clickedId"])
    for number, group in enumerate(params["supernodes"]):
        if not isinstance(group, list) or len(group) < 2 or not isinstance(group[0], str):
            raise ValueError(f"qParams.supernodes[{number}]={group!r} must be a list of a name and ids")
        for name in group[1:]:
            check_known(f"qParams.supernodes[{number}]", name)
    size = len(json.dumps(data, separators=(",", ":"))) if size is None else size
    if not SMALLEST <= size <= LARGEST:
        remedy = "prune it further" if size > LARGEST else "give it a longer prompt or more targets"
        raise ValueError(f"the graph is {size:,} bytes, Neuronpedia takes {SMALLEST:,} to {LARGEST:,}; {remedy}")


def to_json(
    graph: AttributionGraph,
    path: str | Path,
    slug: str,
    scan: str | None = None,
    *,
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
        pinned (`Sequence[str]`): Ids of nodes that are pinned.
        supernodes (`Sequence`): Groups, each a name and the ids of its nodes, as pages save them.
        transcoder_list (`Sequence[str]`): Names by layer, for a `scan` that begins with `custom-`.
        feature_details (`dict`, *optional*): Where features are described: `feature_json_base_url`, or
            `neuronpedia_source_set`.

    Raises:
        ValueError: For a slug or scan that is no name, ids of no node, or a size that Neuronpedia does not take.
    """
    scan = graph.info.get("scan") if scan is None else scan
    check_name("slug", slug)
    check_name("scan", scan)
    threshold = graph.info.get("node_threshold")
    records, weights = node_records(graph), graph.target_weights.tolist()
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
        is_target, first = kind == "target", record["id"].split("_")[0]
        entry = {"node_id": record["id"], "feature": feature, "layer": first, "ctx_idx": position, "clerp": shown}
        entry |= {"jsNodeId": f"{'L' if is_target else first}_{name}-{position}", "feature_type": FEATURE_TYPES[kind]}
        entry |= {"token_prob": weights[number] if is_target else 0.0, "is_target_logit": is_target and number == 0}
        entry |= {"run_idx": 0, "reverse_ctx_idx": 0, "activation": record["activation"]}
        nodes.append(entry | {"influence": None if is_target else record["cumulative"] * (threshold or 1.0)})
    metadata = {"slug": slug, "scan": scan, "transcoder_list": list(transcoder_list)}
    metadata |= {"prompt_tokens": list(graph.tokens), "prompt": graph.info.get("prompt") or "".join(graph.tokens)}
    metadata |= {"node_threshold": threshold, "schema_version": 1, "feature_details": dict(feature_details or {})}
    metadata["info"] = {"generator": {"name": "hf_clt", "version": __version__}}
    params = {"pinnedIds": list(pinned), "supernodes": [list(group) for group in supernodes]}
    data = {
        "metadata": metadata,
        "qParams": params | {"linkType": "both", "clickedId": "", "sg_pos": ""},
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


def to_networkx(graph: AttributionGraph) -> "networkx.DiGraph":
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
    records, result = node_records(graph), networkx.DiGraph()
    result.add_nodes_from((record["id"], record) for record in records.values())
    result.add_weighted_edges_from((records[s]["id"], records[t]["id"], weight) for s, t, weight in edge_list(graph))
    return result


__all__ = ["check_json", "cumulative_shares", "edge_list", "node_records", "to_json", "to_networkx"]
