"""
Known answers, the test of the audit: how much of a circuit that is known do the graphs of a CLT show?

In the models of [`known_models`] the CLT that has the MLPs' neurons as its features is right by construction. Its
graphs are the truth that those of another CLT are held against.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_clt import CLTConfig
from hf_clt.attribution.graph import AttributionGraph, TokenTarget, influences
from hf_clt.attribution.tracing import attribute
from hf_clt.audit.graphs import row_sums
from hf_clt.folding import at_least_float32
from hf_clt.modeling_clt import CrossLayerTranscoder

from .known_models import FILLER, KnownModel, Neuron, combined


TRUE_SHARE = 0.1  # of a row's Σ|A|: a true edge has as much
PRECISION = 0.9  # a feature stands for a neuron that is active on so many of the tokens where the feature is

Places = dict[tuple[int, int], set[tuple[int, int]]]  # features (layer, feature) by neuron (layer, number)


@torch.no_grad()
def clt_of(known: KnownModel, neurons: list[Neuron]) -> CrossLayerTranscoder:
    """The CLT with these neurons as its features, in the model's number format; `neurons` of `known` are the truth."""
    config, layers = known.model.config, range(known.model.config.n_layer)
    by_layer = [[neuron for neuron in neurons if neuron.layer == layer] for layer in layers]
    clt = CrossLayerTranscoder(
        CLTConfig(
            num_layers=len(layers), d_model=config.n_embd, num_features=max(map(len, by_layer)),
            activation_fn="jumprelu", jumprelu_threshold=1e-3,
        )
    ).to(known.model.dtype).eval().requires_grad_(False)  # fmt: skip
    for encoder, decoder, own in zip(clt.encoders, clt.decoders, by_layer, strict=True):
        encoder.weight.zero_()
        encoder.bias.fill_(-1)
        decoder.weight.zero_()
        for n, neuron in enumerate(own):
            encoder.weight[n] = combined(known.directions, neuron.reads)
            encoder.bias[n] = neuron.bias
            for (target, name), weight in neuron.writes.items():
                decoder.weight[n, target - neuron.layer] += weight * known.directions[name]
    return clt


@dataclass(frozen=True)
class Question:
    """
    A prompt (P,) and a token that it makes probable, because of neurons of layer 0.

    Args:
        truth (`AttributionGraph`): The graph that is right, of n features.
        sources (`Tensor`): What truly drives each row of it: with [`TRUE_SHARE`] of the row's Σ|A| or more, (n + m,
            columns) bool.
        path (`Tensor`): The nodes from which such edges lead to the answer, (columns,) bool.
    """

    prompt: Tensor
    answer: int
    truth: AttributionGraph
    sources: Tensor
    path: Tensor

    @property
    def distance(self) -> int:
        """How many layers above layer 0 the neuron is that writes the answer."""
        n = self.truth.num_features
        return int(self.truth.features[self.truth.edges[n, :n].argmax(), 0])


def trace(known: KnownModel, clt: CrossLayerTranscoder, prompt: Tensor, answer: int) -> AttributionGraph:
    """The graph of an answer's logit, with all features of the counted positions."""
    cleared = [p for p in range(len(prompt)) if p not in range(len(prompt))[known.counted]]
    target, dtype = TokenTarget(answer, minus=FILLER), at_least_float32(known.model.dtype)
    return attribute(known.model, clt, prompt, [target], dtype=dtype, cleared=cleared)


@torch.no_grad()
def questions(known: KnownModel, count: int, seed: int = 0) -> list[Question]:
    """The first prompts of a seed that ask for each answer, `count` of each."""
    truth, found, by_answer = clt_of(known, known.neurons), [], dict.fromkeys(known.answers.values(), 0)
    prompts = known.draw(100 * count * len(by_answer), seed)
    for prompt, logits in zip(prompts, known.model(prompts).logits[:, -1], strict=True):
        for answer in by_answer:
            if logits[answer] > 5 and by_answer[answer] < count:
                question = ask(known, truth, prompt, answer)
                if question is not None:
                    found.append(question)
                    by_answer[answer] += 1
    return found


def ask(known: KnownModel, truth: CrossLayerTranscoder, prompt: Tensor, answer: int) -> Question | None:
    """The question that a prompt is; None if it takes a single step, or no neuron writes the answer."""
    graph = trace(known, truth, prompt, answer)
    sources, n = graph.edges >= TRUE_SHARE * row_sums(graph)[:, None], graph.num_features
    path = sources[n:].any(dim=0)
    for node in reversed(range(n)):
        path |= sources[node] & path[node]
    question = Question(prompt, answer, graph, sources, path)
    is_long = n > 0 and (path[:n] & (graph.features[:, 0] == 0)).any() and question.distance > 0
    return question if is_long else None


# -- the measure ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def match(
    truth: CrossLayerTranscoder, clt: CrossLayerTranscoder, inputs: Tensor
) -> tuple[dict[tuple[int, int], float], Places, Places]:
    """
    Finds the neurons of the language model among the features of a CLT, by their activations on some tokens.

    Args:
        truth, clt ([`CrossLayerTranscoder`]): The CLT that is right, and another.
        inputs (`Tensor` of shape `(N, L, D)`): What features read.

    Returns:
        By neuron that is active somewhere: the highest correlation of a feature; that feature alone (of those that
        are within 0.01 for each layer that they are off, the nearest); and all features that stand for the neuron: of
        its layer or an earlier one, and active where the neuron is and hardly elsewhere ([`PRECISION`]). So one that
        is active on some of the neuron's tokens, as where several features share them, stands for it as well.
    """
    neurons, features = truth.encode(inputs).double(), clt.encode(inputs).double()
    num_layers, num_features = features.shape[1:]
    correlations, best, standing = {}, {}, {}
    x = features.flatten(1)
    x = (x - x.mean(dim=0)) / (x.std(dim=0) * len(x) ** 0.5).clamp_min(1e-12)
    for layer in range(num_layers):
        off = (torch.arange(num_layers, device=x.device) - layer).abs().repeat_interleave(num_features)
        for n in (neurons[:, layer] > 0).any(dim=0).nonzero().squeeze(1).tolist():
            y = neurons[:, layer, n]
            r = (y - y.mean()) @ x / (y.std() * len(y) ** 0.5).clamp_min(1e-12)
            first = int((r - 0.01 * off).argmax())
            active = features[:, : layer + 1] > 0
            precise = active[y > 0].sum(dim=0) >= PRECISION * active.sum(dim=0).clamp_min(1)
            correlations[layer, n], best[layer, n] = r[first].item(), {divmod(first, num_features)}
            standing[layer, n] = {tuple(pair) for pair in precise.nonzero().tolist()}
    return correlations, best, standing


def edges_found(question: Question, graph: AttributionGraph, places: Places) -> tuple[int, int]:
    """
    How many of the true edges of a prompt a graph has, and how many there are; of edges from neurons, since those from
    tokens do not depend on decoders. An edge is found if one of the features in the place of its target, where k
    sources truly drive the target, has one in the place of its source among the k largest of its row, which may be
    errors and tokens too.
    """
    truth, nodes = question.truth, {tuple(feature): n for n, feature in enumerate(graph.features.tolist())}

    def standing(n: int) -> set[int]:
        """Rows and columns in the graph of what is in the place of a neuron, or the row of a target."""
        if n >= truth.num_features:
            return {n - truth.num_features + graph.num_features}
        at, position, neuron = truth.features[n].tolist()
        keys = ((layer, position, feature) for layer, feature in places.get((at, neuron), ()))
        return {nodes[key] for key in keys if key in nodes}

    found = there = 0
    for row, sources in enumerate(question.sources):
        drivers = sources[: truth.num_features].nonzero().squeeze(1).tolist()
        if drivers:
            rows = graph.edges[sorted(standing(row))]
            values, largest = rows.topk(min(int(sources.sum()), rows.shape[1]))
            has = set(largest[values > 0].tolist())
            found += sum(not has.isdisjoint(standing(driver)) for driver in drivers)
            there += len(drivers)
    return found, there


def steps(question: Question, graph: AttributionGraph, places: Places) -> dict[str, float]:
    """
    In how many steps a graph explains an answer whose way leads through neurons of layer 0, by shares of influence.

    What counts is all influence that ends at errors and tokens, but for tokens that truly drive the answer beside
    these neurons. Of this `two_steps` ends at the tokens that truly drive them, on paths through features in their
    places and then through another feature; `one_step` at the same tokens on all other paths; `elsewhere` at errors,
    and at tokens that have nothing to do with it.
    """
    truth, m = question.truth, question.truth.num_features
    first = question.path[:m] & (truth.features[:, 0] == 0)
    later = question.path[:m] & ~first
    starts, beside = (question.sources[:m][rows][:, truth.first_token :].any(dim=0) for rows in (first, later))
    beside &= ~starts
    middle = {
        (layer, position, feature)
        for at, position, neuron in truth.features[first].tolist()
        for layer, feature in places.get((at, neuron), ())
    }
    n, sums = graph.num_features, row_sums(graph)
    through = torch.tensor([tuple(feature) in middle for feature in graph.features.tolist()], dtype=torch.bool)

    def reached(edges: Tensor) -> Tensor:
        """Influence on errors and tokens."""
        return influences(edges, graph.features[:, 0], graph.target_weights, sums)[0][n:]

    indirect, cut = graph.edges.clone(), graph.edges.clone()
    indirect[n:, :n][:, through] = 0
    cut[:, :n][:, through] = 0
    whole, two = reached(graph.edges), reached(indirect) - reached(cut)
    tokens = slice(-len(starts), None)
    total = (whole.sum() - whole[tokens][beside].sum()).clamp_min(1e-30)
    found = {"two_steps": two[tokens][starts].sum() / total, "one_step": (whole - two)[tokens][starts].sum() / total}
    found = {name: value.item() for name, value in found.items()}
    return found | {"elsewhere": 1 - sum(found.values())}


__all__ = ["Question", "clt_of", "edges_found", "match", "questions", "steps", "trace"]
