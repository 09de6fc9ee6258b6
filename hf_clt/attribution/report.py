"""What a prompt and its graph say, as text."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import format_duration
from .graph import AttributionGraph


@torch.no_grad()
def format_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, cleared: Sequence[int] = (0,)
) -> str:
    """The tokens of a prompt (P,) with their positions, and the five most probable next ones."""
    shown = [repr(tokenizer.decode([token])) for token in input_ids.tolist()]
    lines = ["Tokens: " + "  ".join(f"{position} {token}" for position, token in enumerate(shown))]
    if list(cleared) == [0] and tokenizer.bos_token_id not in (None, int(input_ids[0])):
        lines.append(
            f"Position 0, {shown[0]}, has no features; CLTs are trained behind {tokenizer.bos_token!r}: consider to "
            "write it in front of the prompt"
        )
    likely, tokens = model(input_ids[None].to(model.device)).logits[0, -1].double().softmax(0).topk(5)
    words = zip(tokens.tolist(), likely.tolist(), strict=True)
    return "\n".join(
        [*lines, "Next token: " + ", ".join(f"{tokenizer.decode([token])!r} {p:.1%}" for token, p in words)]
    )


def format_graph(graph: AttributionGraph, pruned: AttributionGraph, count: int = 10) -> str:
    """Its size, its scores and those of the pruned graph, what belongs to no node, and its strongest features."""
    info, scores, outside = graph.info, graph.info["scores"], graph.info["outside"]
    seconds = ", ".join(f"{name} {format_seconds(value)}" for name, value in info["seconds"].items())
    active = info["active_features"]
    lines = [
        f"Graph: {graph.num_features:,} of {active:,} active features, {int((graph.edges != 0).sum()):,} edges; "
        f"pruned {pruned.num_features:,} features, {int((pruned.edges != 0).sum()):,} edges",
        f"Replacement {scores['replacement']:.3f}, completeness {scores['completeness']:.3f}; pruned "
        "{replacement:.3f}, {completeness:.3f}".format(**pruned.info["after_pruning"]),
    ]
    if graph.num_features < active:
        lines.append(
            f"Without what went to the other {active - graph.num_features:,} features, as circuit-tracer counts: "
            f"{scores['replacement_of_nodes']:.3f}, {scores['completeness_of_nodes']:.3f}"
        )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in outside.items() if share >= 5e-4)
    lines.append(f"Belongs to no node: {sum(outside.values()):.1%}" + (f" ({shares})" if shares else ""))
    if info["dtype"] != "float32" or info["step_error"] > 1e-4:
        lines.append(
            f"Computed in {info['dtype']}; the largest error of a step beyond rounding is {info['step_error']:.1e}"
        )
    if verified := info.get("verified"):
        lines.append(
            f"In the language model, {verified['count']} strongest features: frozen, the edges are off by "
            f"{verified['frozen_error']:.1e} at most; live, Spearman {verified['spearman']:.2f} of predicted and "
            "measured effect"
        )
    return "\n".join([*lines, f"Time: {seconds}", "", graph.table(count)])


def format_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)


__all__ = ["format_graph", "format_prompt"]
