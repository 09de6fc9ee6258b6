"""
Edges against the language model. Frozen, they must be exact. Live, features are ablated one at a time in the unfrozen
model, and what changes is compared with what the graph says (Ameisen et al. 2025, "Circuit Tracing", evaluation of
mechanistic faithfulness).
"""

from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attribution.frozen import FrozenModel, freeze
from ..attribution.graph import AttributionGraph
from ..attribution.verify import spearman, total_effects, verify
from ..evaluation.replacement import LayerwiseReconstruction
from ..folding import at_least_float32
from ..modeling_clt import CrossLayerTranscoder
from .graphs import graphs_of, row_sums
from .live import respond, written_by
from .samples import BlockSkipped, Given, figure


ABLATED = 16  # features per prompt
QUICK_PROMPTS = 8
EXACT_PROMPTS, EXACT_FEATURES = 4, 2  # on which frozen edges are checked
DISTANCES = 8  # layers downstream


@torch.no_grad()
def edges(clt: CrossLayerTranscoder, given: Given) -> dict:
    """
    Of [`ABLATED`] features per prompt, drawn from the nodes of its graph, in the language model; samples are prompts.
    What a feature writes is taken away in all its layers, as [`verify`] does, and the MLPs there respond as well:
    where a later MLP would follow an earlier one anyway, a feature that writes for both is taken away twice. Compare
    CLTs of like reach.

    A change of a feature is that of its pre-activation, as a share of its activation; a change of the next token is
    KL(original ‖ ablated). Rank correlations are over all pairs of an ablated feature and a later one of a prompt, and
    over its ablated features. They are of the *influence* over all paths; beside it of the signed `effect` over all
    paths, of the direct edge alone, of the activation of what is ablated, and of random numbers.

    A *perturbation* is by how much what features read differs in a later layer; its prediction comes from the local
    replacement model, where attention patterns and norm scales are held and features respond. The *response* is what
    is left of it without what the ablated feature writes itself, which both have in common.

    Returns:
        `dict` of figures: `frozen_error`, the largest error of a frozen edge, as a share of the largest edge of its
        target; `feature_spearman` and `logit_spearman`, and these with `_effect`, `_direct`, `_activation`, `_random`
        behind; `perturbation_cosine`, `perturbation_error` (|predicted - measured| / |measured|), `response_cosine`,
        `response_error`: by distance, 1 to [`DISTANCES`] layers.

    Raises:
        BlockSkipped: If no feature is active, or none has a later one.
    """
    graphs = graphs_of(clt, given, QUICK_PROMPTS)
    copies = [replace(graph, info=dict(graph.info)) for graph in graphs[:EXACT_PROMPTS]]  # in which verify notes it
    exact = [verify(graph, given.model, clt, EXACT_FEATURES)["frozen_error"] for graph in copies]
    correlations, by_distance = [], []
    with clt.folded():
        bar = tqdm(graphs, "ablating features", unit="prompt", disable=not given.progress)
        for number, graph in enumerate(bar):
            generator = torch.Generator().manual_seed(given.seed + number)
            sources = torch.randperm(graph.num_features, generator=generator)[:ABLATED].sort().values
            found, distances = ablated(clt, given, graph, sources, generator)
            correlations += [found] if found else []
            by_distance.append(distances)
    if not correlations:
        raise BlockSkipped("no ablated feature has a later one on its prompt")
    result = {"frozen_error": figure(exact, given.seed)}
    result |= {name: figure([row[name] for row in correlations], given.seed) for name in correlations[0]}
    for name in by_distance[0]:
        means = torch.stack([distances[name].double().nanmean(dim=0) for distances in by_distance]).T
        measured = {f"{distance}": values[values.isfinite()] for distance, values in enumerate(means, start=1)}
        result[name] = {at: figure(values, given.seed) for at, values in measured.items() if len(values)}
    return result


def ablated(
    clt: CrossLayerTranscoder, given: Given, graph: AttributionGraph, sources: Tensor, generator: torch.Generator
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """
    The correlations of one prompt, none where no pair has a later feature; and the perturbations' figures, by source
    and distance, (K, [`DISTANCES`]) each, NaN where there is no such layer.
    """
    n, layers = graph.num_features, graph.features[:, 0]
    hooks = clt.config.feature_input_hook, clt.config.feature_output_hook
    sets = torch.nn.functional.one_hot(sources, n)
    written = -written_by(clt, graph, torch.cat([torch.zeros_like(sets[:1]), sets]))
    reads, log_p = respond(given.model, clt, graph.input_ids, written)
    reads = [read[1:] - read[:1] for read in reads]
    kl = (log_p[0].exp() * (log_p[0] - log_p[1:])).sum(dim=1)
    share, effect = over_all_paths(graph, sources)
    direct = graph.edges[:, sources].abs() / row_sums(graph)[:, None]
    weights, activations = graph.target_weights, graph.activations[sources]
    later = (layers[:, None] > layers[sources]) & (graph.features[:, 1, None] >= graph.features[sources, 1])
    correlations = {}
    if later.any() and len(sources) > 1:
        changed = pre_activation_changes(clt, graph, reads) / graph.activations[:, None]
        predicted = {"": share, "_effect": effect.abs() / graph.activations[:, None], "_direct": direct[:n]}
        predicted |= {
            "_activation": activations.expand_as(share),
            "_random": torch.rand(n, len(sources), generator=generator),
        }
        for name, values in predicted.items():
            correlations[f"feature_spearman{name}"] = spearman(values[later], changed.abs()[later])
        predicted = {"": graph.influence()[sources], "_effect": weights @ total_effects(graph)[:, sources].abs()}
        predicted |= {"_direct": weights @ direct[n:], "_activation": activations}
        predicted |= {"_random": torch.rand(len(sources), generator=generator)}
        for name, values in predicted.items():
            correlations[f"logit_spearman{name}"] = spearman(values, kl)
    frozen = freeze(given.model, graph.input_ids, *hooks, dtype=at_least_float32(given.model.dtype))
    expected, own = predicted_reads(clt, frozen, graph.info["cleared"], written[1:])
    figures = {name: torch.full((len(sources), DISTANCES), torch.nan) for name in (
        "perturbation_cosine", "perturbation_error", "response_cosine", "response_error"
    )}  # fmt: skip
    for k, layer in enumerate(layers[sources].tolist()):
        for distance in range(1, min(DISTANCES, graph.num_layers - 1 - layer) + 1):
            at = layer + distance
            found, wanted, itself = reads[at][k].to(own[at]), expected[at][k], own[at][k]
            for name, left, right in (
                ("perturbation", wanted, found), ("response", wanted - itself, found - itself)
            ):  # fmt: skip
                cosine = (left * right).sum() / (left.norm() * right.norm()).clamp_min(1e-30)
                figures[f"{name}_cosine"][k, distance - 1] = cosine
                figures[f"{name}_error"][k, distance - 1] = (left - right).norm() / right.norm()
    return correlations, figures


def over_all_paths(graph: AttributionGraph, sources: Tensor) -> tuple[Tensor, Tensor]:
    """
    Of sources (K,) on all features, (n, K) each: the influence, Σ_k Âᵏ; and by how much a feature's pre-activation
    falls when the source is ablated and all features in between follow theirs.
    """
    n = graph.num_features
    share = graph.edges[:n, :n].abs() / row_sums(graph)[:n, None]
    effect = graph.edges[:n, :n] / graph.activations
    one = torch.eye(n, dtype=share.dtype)
    # Features are in the order of their layers, so that both are lower triangular.
    return tuple(
        torch.linalg.solve_triangular(one - steps, columns, upper=False, unitriangular=True)
        for steps, columns in ((share, share[:, sources]), (effect, graph.edges[:n, sources]))
    )


def pre_activation_changes(clt: CrossLayerTranscoder, graph: AttributionGraph, reads: list[Tensor]) -> Tensor:
    """Of all features (n, K), from changes of what they read, L of (K, P, D)."""
    layers, positions, indices = graph.features.unbind(1)
    changed = reads[0].new_empty(graph.num_features, len(reads[0]))
    for layer in layers.unique().tolist():
        nodes = (layers == layer).nonzero().squeeze(1)
        rows = clt.encoders[layer].weight[indices[nodes].to(clt.device)].to(reads[0])
        changed[nodes] = torch.einsum("kud,ud->uk", reads[layer][:, positions[nodes]], rows)
    return changed


def predicted_reads(
    clt: CrossLayerTranscoder, frozen: FrozenModel, cleared: list[int], written: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """
    By how much what features read changes in the local replacement model, when `written` (K, L, P, D) is added to what
    MLPs write: attention patterns, norm scales and errors are held, features respond. And how much of it is `written`
    itself, that the residual stream passes on. L of (K, P, D) each, on the CPU.
    """
    count, length = len(written), frozen.num_tokens
    kept = torch.ones(length, 1).to(frozen.tokens)
    kept[cleared] = 0
    before, after = LayerwiseReconstruction(clt, length), LayerwiseReconstruction(clt, count * length)
    x = torch.zeros_like(written[:, 0], device=frozen.tokens.device)
    passed, changes, own = x, [], []
    for layer, block in enumerate(frozen.blocks):
        attended = block.attention.linear(block.pre.linear(x))
        stream = x if block.is_parallel else x + attended
        read, itself = (s if block.read_norm is None else block.read_norm.linear(s) for s in (stream, passed))
        changes.append(read.cpu())
        own.append(itself.cpu())
        given = after(layer, (block.read + read).flatten(0, 1)).view_as(read)
        y = written[:, layer].to(read)
        replaced = y + kept * (given - before(layer, block.read))
        direct, y = (v if block.post is None else block.post.linear(v) for v in (y, replaced))
        passed, x = passed + direct, x + attended + y
    return changes, own


__all__ = ["edges"]
