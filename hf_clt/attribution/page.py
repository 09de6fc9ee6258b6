"""An attribution graph as one page of HTML that needs no server and requests nothing; the page is `page.html`."""

import base64
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import as_json, write_text
from .export import edge_list, node_records
from .graph import AttributionGraph, FeatureTarget, Target


EXAMPLES, AROUND = 6, 12  # of a feature, and tokens before and after the strongest one


def rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def short_name(target: Target, words: dict[str, str]) -> str:
    if isinstance(target, FeatureTarget):
        return f"{target.layer}/{target.feature}"
    tokens = [words.get(str(token), str(token)) for token in (target.token, target.minus) if token is not None]
    return " − ".join(tokens)


def shown_details(details: dict[str, Any]) -> dict[str, Any]:
    """What a page shows of a feature: the surroundings of its first examples' peaks, and the logits."""
    examples = []
    for example in details.get("examples", [])[:EXAMPLES]:
        tokens, acts = example["tokens"], example["acts"]
        peak = max(range(len(acts)), key=acts.__getitem__, default=0)
        first, last = max(0, peak - AROUND), peak + AROUND + 1
        active = [[place, rounded(act, 3)] for place, act in enumerate(acts[first:last]) if act > 0]
        examples.append({"tokens": tokens[first:last], "acts": active})
    return {"examples": examples, "top": details.get("top_logits", []), "bottom": details.get("bottom_logits", [])}


def page_data(graph: AttributionGraph, supernodes: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """
    What the page is made of. Edges come with the most influential first, in base64: `ends`, source and target of each
    by place in `nodes`, uint16, and `weights`, float32. The influence of one is |weight| times the target's `scale`.

    Raises:
        ValueError: For more nodes than can be numbered.
    """
    info, n, records = graph.info, graph.num_features, node_records(graph)
    words, sums = info.get("target_words", {}), graph.edges.abs().sum(dim=1) + graph.dropped
    for node, record in records.items():
        row = node if node < n else node - graph.first_target + n
        passed = record["influence"]
        if record["kind"] == "target":
            weight = graph.target_weights[row - n].item()
            record |= {"weight": rounded(weight), "short": short_name(graph.targets[row - n], words)}
            passed += weight
        if record["kind"] in ("feature", "target"):
            record["scale"] = rounded(passed / max(sums[row].item(), 1e-30), 6)
            record["rest"] = {name: rounded(values[row].item(), 3) for name, values in graph.rest.items()}
            record["rest"]["nodes not shown, in absolute value"] = rounded(graph.dropped[row].item(), 3)
        for name in ("influence", "cumulative", "activation"):
            record[name] = rounded(record[name])
    if len(records) > 2**16:
        raise ValueError(f"the graph has {len(records):,} nodes; a page takes {2**16:,}: prune it further")
    places = {node: place for place, node in enumerate(records)}
    edges = [(places[source], places[target], weight) for source, target, weight in edge_list(graph)]
    scales = [record.get("scale", 0.0) for record in records.values()]
    edges.sort(key=lambda edge: abs(edge[2]) * scales[edge[1]], reverse=True)
    ends, weights = np.array([edge[:2] for edge in edges], "<u2"), np.array([edge[2] for edge in edges], "<f4")
    outside = info.get("outside", graph.outside())
    return {
        "tokens": list(graph.tokens),
        "layers": graph.num_layers,
        "names": {name: [info.get(name), info.get(f"{name}_revision")] for name in ("clt", "model")},
        "thresholds": [info.get("node_threshold"), info.get("edge_threshold")],
        "scores": {"": info.get("scores", graph.scores()), "after pruning": info.get("after_pruning")},
        "outside": outside if isinstance(outside, dict) else {"all": outside},
        "cleared": info.get("cleared", [0]),
        "verified": info.get("verified"),
        "nodes": list(records.values()),
        "edges": {name: base64.b64encode(a.tobytes()).decode() for name, a in (("ends", ends), ("weights", weights))},
        "details": {
            f"{layer}_{feature}": shown_details(graph.details[layer, feature])
            for layer, feature in sorted({(layer, feature) for layer, _, feature in graph.features.tolist()})
            if (layer, feature) in graph.details
        },
        "supernodes": [list(group) for group in supernodes],
    }


def to_html(graph: AttributionGraph, path: str | Path, supernodes: Sequence[Sequence[str]] | None = None) -> None:
    """
    Writes a graph, usually pruned, as one page.

    Args:
        path (`str` or `Path`): The file, which is replaced as a whole.
        supernodes (`Sequence`, *optional*): Groups that the page begins with, each a name and the ids of its nodes
            ([`hf_clt.attribution.export`] says how they are made).

    Raises:
        ValueError: For a supernode with an id that is no node, or more nodes than a page takes.
    """
    data = page_data(graph, supernodes or ())
    known = {node["id"] for node in data["nodes"]}
    for group in data["supernodes"]:
        if unknown := [name for name in group[1:] if name not in known]:
            raise ValueError(f"supernode {group[0]!r} names {unknown[0]!r}, which is no node of the graph")
    # In ASCII and without `<` nothing that a token holds can end the script element.
    text = json.dumps(json.loads(as_json(data, indent=None)), separators=(",", ":")).replace("<", "\\u003c")
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    write_text(Path(path), template.replace("{{data}}", text, 1))


__all__ = ["page_data", "to_html"]
