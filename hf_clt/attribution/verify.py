"""
A graph against the language model: features are ablated or doubled in the model itself, and what changes is compared
with what the graph says.

- **Frozen**: the model's own modules run with the attention patterns, norm scales and MLP outputs of the prompt. What
  a feature writes is added, and each target must change by the edge to it: the graph is computed rightly.
- **Live**: nothing is held. What the feature writes is taken away in every layer that it writes to, and the later
  layers respond as they will. The graph's prediction is the feature's effect over all its paths. How well the two
  agree says how far the CLT tells the truth about the model, here.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..harvest.sites import resolve_sites
from ..modeling_clt import CrossLayerTranscoder
from .frozen import FrozenModel, attending_by, freeze
from .graph import AttributionGraph, FeatureTarget, Target, feature_id
from .rows import decoder_rows


@torch.no_grad()
def verify(
    graph: AttributionGraph,
    model: PreTrainedModel,
    clt: CrossLayerTranscoder,
    count: int = 20,
    groups: Sequence[Sequence[tuple[int, int, int]]] = (),
    *,
    progress: bool = False,
) -> dict:
    """
    Checks the most influential features of a graph, and groups of features, in the language model.

    Args:
        graph ([`AttributionGraph`]): Of this model and CLT, pruned or not; the result is kept in its
            `info["verified"]`.
        count (`int`): Features that are checked.
        groups (`Sequence`): Groups of features (layer, position, feature), each ablated together.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `dict`: `frozen_error`, the largest difference between a target's change when a feature is doubled, everything
        frozen, and its edge, as a share of the largest edge of that target; `spearman`, the rank correlation between
        predicted and measured changes of the targets when a feature is ablated in the live model, over all features
        and targets; `count`; `nodes`, for each feature `layer_feature_position` and group `group_N` the weighted sum
        over the targets of `predicted` and `measured`.

    Raises:
        ValueError: If the graph has no features, or a group names one that is no node of it.
    """
    if not graph.num_features:
        raise ValueError("the graph has no features to check")
    numbers = {tuple(feature): node for node, feature in enumerate(graph.features.tolist())}
    unknown = [feature for group in groups for feature in group if tuple(feature) not in numbers]
    if unknown:
        raise ValueError(f"groups name the feature {tuple(unknown[0])}, which is no node of the graph")
    strongest = graph.influence()[: graph.num_features].topk(min(count, graph.num_features)).indices
    sets = [[node] for node in strongest.tolist()] + [[numbers[tuple(f)] for f in group] for group in groups]
    n, effects = graph.num_features, total_effects(graph)
    dtype = torch.promote_types(model.dtype, torch.float32)
    hooks = clt.config.feature_input_hook, clt.config.feature_output_hook
    names = [feature_id(*graph.features[node].tolist()) for node in strongest.tolist()]
    names += [f"group_{number}" for number in range(len(groups))]
    predicted, measured, worst = [], [], 0.0
    with clt.folded():
        frozen = freeze(model, graph.input_ids, *hooks, dtype=dtype)
        largest = graph.edges[n:].abs().amax(dim=1).clamp_min(1e-30)
        kept = torch.ones(frozen.num_tokens, 1, dtype=dtype, device=frozen.tokens.device)
        kept[graph.info["cleared"]] = 0
        value = partial(target_values, model, clt, frozen, graph.targets, kept)
        base = {live: value(None, live) for live in (False, True)}
        for nodes in tqdm(sets, desc="checking", unit="feature", disable=not progress):
            change = sum(written_by(clt, frozen, *graph.features[i].tolist(), graph.activations[i]) for i in nodes)
            found = value(change, live=False) - base[False]
            edges = graph.edges[n:, nodes].sum(dim=1)
            worst = max(worst, ((found.cpu() - edges).abs() / largest).max().item())
            predicted.append(-effects[:, nodes].sum(dim=1))
            measured.append((value(-change, live=True) - base[True]).cpu())
    predicted, measured = torch.stack(predicted), torch.stack(measured).to(graph.edges.dtype)
    weights = graph.target_weights
    result = {
        "frozen_error": worst,
        "spearman": spearman(predicted.flatten(), measured.flatten()),
        "count": len(strongest),
        "groups": [[feature_id(*feature) for feature in group] for group in groups],
        "nodes": {
            name: {"predicted": (left @ weights).item(), "measured": (right @ weights).item()}
            for name, left, right in zip(names, predicted, measured, strict=True)
        },
    }
    graph.info["verified"] = result
    return result


def total_effects(graph: AttributionGraph) -> Tensor:
    """
    By how much each target falls when each feature is ablated, (m, n): over all paths, with the features on the way
    following their pre-activations.
    """
    n, layers = graph.num_features, graph.features[:, 0]
    effects = graph.edges[n:].clone()
    end = n
    for count in reversed(layers.unique_consecutive(return_counts=True)[1].tolist()):
        first = end - count
        effects += (effects[:, first:end] / graph.activations[first:end]) @ graph.edges[first:end]
        end = first
    return effects[:, :n]


def written_by(
    clt: CrossLayerTranscoder, frozen: FrozenModel, layer: int, position: int, feature: int, activation: Tensor
) -> Tensor:
    """What one feature writes, (L, P, D)."""
    rows = decoder_rows(clt, layer, torch.tensor([feature], device=clt.device), frozen.tokens.dtype)[0]
    written = frozen.tokens.new_zeros(len(frozen.blocks), *frozen.tokens.shape)
    written[layer : layer + len(rows), position] = rows.to(written) * activation.to(written)
    return written


@torch.no_grad()
def target_values(
    model: PreTrainedModel,
    clt: CrossLayerTranscoder,
    frozen: FrozenModel,
    targets: Sequence[Target],
    kept: Tensor,
    change: Tensor | None,
    live: bool,
) -> Tensor:
    """
    The targets (m,) in the language model, with `change` (L, P, D) added to what MLPs write; `live`, or held, but for
    what a skip connection writes at the positions with nodes (`kept`, (P, 1), 1 there): that follows what it reads.
    """
    seen, handles = {}, []
    sites = resolve_sites(model, clt.config.feature_input_hook, clt.config.feature_output_hook)[0]

    def on_output(module, function):
        handles.append(module.register_forward_hook(lambda _, args, output: function(args, output)))

    def keep(key, is_input, args, output):
        seen[key] = (args[0] if is_input else output)[0].to(frozen.tokens)

    def write(layer, args, y):
        block, added = frozen.blocks[layer], 0 if change is None else change[layer]
        if live:
            return (y + added).to(y.dtype)
        if clt.config.skip_connection:
            added = added + kept * (seen[layer] - block.read) @ clt.skips[layer].weight.to(block.read)
        return (block.written + added).to(y.dtype).expand_as(y)

    def normalize(norm, args, y):
        return (norm.linear(args[0]) + norm.bias).to(y.dtype)

    for layer, site in enumerate(sites):
        on_output(model.get_submodule(site.path), partial(keep, layer, site.io == "input"))
    for layer, writer in enumerate(frozen.writers):
        on_output(writer, partial(write, layer))
    for module, norm in [] if live else frozen.norms:
        on_output(module, partial(normalize, norm))
    on_output(model.get_output_embeddings(), partial(keep, "logits", False))
    try:
        with attention_as(model, None if live else frozen):
            model(input_ids=frozen.input_ids[None])
    finally:
        for handle in handles:
            handle.remove()

    values = []
    for target in targets:
        if isinstance(target, FeatureTarget):
            encoder = clt.encoders[target.layer]
            row, bias = (
                encoder.weight[target.feature].to(frozen.tokens),
                encoder.bias[target.feature].to(frozen.tokens),
            )
            values.append(seen[target.layer][target.position] @ row + bias)
        else:
            logits = seen["logits"][target.position]
            values.append(logits[target.token] - (logits.mean() if target.minus is None else logits[target.minus]))
    return torch.stack(values)


def attention_as(model: PreTrainedModel, frozen: FrozenModel | None) -> AbstractContextManager[None]:
    """Within, each layer of the model attends with the pattern that it had on the frozen prompt; None: as usual."""
    if frozen is None:
        return nullcontext()
    # In the order in which the layers run: attention functions are not told which layer they are in.
    patterns = iter([block.attention.pattern for block in frozen.blocks])

    def attend(module, query, key, value, mask, **options):
        pattern = next(patterns).to(value.dtype)
        value = value.repeat_interleave(len(pattern) // value.shape[1], dim=1)
        return (pattern @ value).transpose(1, 2).contiguous(), pattern[None]

    return attending_by(model, attend)


def spearman(left: Tensor, right: Tensor) -> float:
    """Rank correlation of two vectors; ties share the mean of their ranks. 0 where one is constant."""

    def ranks(values):
        _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        return (ends - (counts - 1) / 2)[inverse]

    left, right = ranks(left) - ranks(left).mean(), ranks(right) - ranks(right).mean()
    return (left @ right / (left.norm() * right.norm()).clamp_min(1e-30)).item()


__all__ = ["total_effects", "verify"]
