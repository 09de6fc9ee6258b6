"""
Language models whose circuits are known, because their weights are set by hand, and how much of them the graphs of a
CLT show: the test of the audit.

Each is a GPT-2 with relu whose norms do nearly nothing (eps is so large that they only subtract the mean, and all
directions have mean 0). A variable is a direction of the residual stream; a neuron of an MLP reads some variables and
writes others. The CLT that has the neurons as its features is therefore right by construction, [`clt_of`], and its
graphs are the truth that those of a trained CLT are held against.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ..attribution.graph import AttributionGraph, TokenTarget, influences
from ..attribution.tracing import attribute
from ..configuration_clt import CLTConfig
from ..folding import at_least_float32
from ..modeling_clt import CrossLayerTranscoder
from .graphs import row_sums


EPS = 1e12  # of the norms
SHARP = 80.0  # attention score of what is looked at; of anything else 0
FILLER = 0  # the token that is nothing: no embedding, and a logit of 0
TRUE_SHARE = 0.1  # of a row's Σ|A|: a true edge has as much
PRECISION = 0.9  # a feature stands for a variable if the variable is active on so many of the tokens where it is


@dataclass(frozen=True)
class Neuron:
    """max(0, Σ weight · variable + bias) of one layer; what it writes is by layer and variable."""

    layer: int
    reads: dict[str, float]
    bias: float
    writes: dict[tuple[int, str], float]


@dataclass(frozen=True)
class KnownModel:
    """
    Args:
        name (`str`).
        model (`GPT2LMHeadModel`): In float64 and eval mode.
        words (`list[str]`): The vocabulary.
        directions (`dict[str, Tensor]`): Of each variable, (D,).
        neurons, collapsed (`list[Neuron]`): What the MLPs do; and the same with each step that can be left out left
            out: what depends on variables of layer 0 alone is written by layer 0.
        draw (`Callable[[int, int], Tensor]`): So many prompts, by a seed, (N, P) int64; the last token is asked.
        answers (`dict[str, int]`): The token that says that a variable is active.
        counted (`slice`): Positions on which the CLT is trained, measured and traced.
    """

    name: str
    model: GPT2LMHeadModel
    words: list[str]
    directions: dict[str, Tensor]
    neurons: list[Neuron]
    collapsed: list[Neuron]
    draw: Callable[[int, int], Tensor]
    answers: dict[str, int]
    counted: slice

    @property
    def length(self) -> int:
        """P."""
        return self.draw(1, 0).shape[1]


# -- weights by hand --------------------------------------------------------------------------------------------------


def orthonormal(names: list[str], d_model: int, seed: int = 0) -> dict[str, Tensor]:
    """Directions (D,) at right angles to each other and to (1, ..., 1); at most D - 1 of them."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64)
    basis[:, 0] = 1
    rows = torch.linalg.qr(basis)[0].T[1:]
    return dict(zip(names, rows[: len(names)], strict=True))


def superposed(names: list[str], d_model: int, seed: int = 0) -> dict[str, Tensor]:
    """More unit directions than dimensions, as far apart as 500 steps get them."""
    basis = torch.stack(list(orthonormal([f"{n}" for n in range(d_model - 1)], d_model, seed).values()))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(names), d_model - 1, generator=generator, dtype=torch.float64)
    for _ in range(500):
        rows = rows / rows.norm(dim=1, keepdim=True)
        products = (rows @ rows.T).fill_diagonal_(0)
        rows = rows - 2 * products**3 @ rows
    return dict(zip(names, rows / rows.norm(dim=1, keepdim=True) @ basis, strict=True))


@torch.no_grad()
def make_model(
    directions: dict[str, Tensor],
    neurons: list[Neuron],
    num_layers: int,
    length: int,
    words: list[str],
    embedded: dict[str, str],
    answers: dict[str, int],
) -> GPT2LMHeadModel:
    """A GPT-2 of one head whose attention does nothing yet; `embedded` has the variable of each word."""
    d_model = len(next(iter(directions.values())))
    most = max(sum(neuron.layer == layer for neuron in neurons) for layer in range(num_layers))
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words), n_positions=length, n_embd=d_model, n_layer=num_layers, n_head=1, n_inner=most,
            activation_function="relu", layer_norm_epsilon=EPS, tie_word_embeddings=False,
            bos_token_id=FILLER, eos_token_id=FILLER,
        )
    ).double().eval().requires_grad_(False)  # fmt: skip
    for parameter in model.parameters():
        parameter.zero_()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.fill_(EPS**0.5)
    for word, variable in embedded.items():
        model.transformer.wte.weight[words.index(word)] = directions[variable]
    for variable, token in answers.items():
        model.lm_head.weight[token] = 10 * directions[variable]
    for layer, block in enumerate(model.transformer.h):
        for n, neuron in enumerate(neuron for neuron in neurons if neuron.layer == layer):
            block.mlp.c_fc.weight[:, n] = combined(directions, neuron.reads)
            block.mlp.c_fc.bias[n] = neuron.bias
            block.mlp.c_proj.weight[n] = combined(directions, {name: w for (_, name), w in neuron.writes.items()})
    return model


def combined(directions: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return sum(weight * directions[name] for name, weight in weights.items())


@torch.no_grad()
def attend(model: GPT2LMHeadModel, layer: int, looks: list[tuple], moves: list[tuple]) -> None:
    """
    Sets the head of a layer.

    Args:
        looks: (query, key, score): directions (D,), and the score that a pair of tokens gets that have both. Without
            any the head looks at all tokens up to its own equally.
        moves: (read, write, weight): directions (D,), what the head takes and what it makes of it.
    """
    attention, d_model = model.transformer.h[layer].attn, model.config.n_embd
    for n, (query, key, score) in enumerate(looks):
        attention.c_attn.weight[:, n] = query * score * d_model**0.5
        attention.c_attn.weight[:, d_model + n] = key
    for n, (read, write, weight) in enumerate(moves):
        attention.c_attn.weight[:, 2 * d_model + n] = read
        attention.c_proj.weight[n] = write * weight


# -- the models -------------------------------------------------------------------------------------------------------


def two_hops(erases: bool = True) -> KnownModel:
    """
    Six functions of three bits in four layers: layer 0 computes m = a AND b, layer 1, 2 or 3 computes y = m AND c (of
    three) or m XOR c (of the others). A prompt names the bits that are set, in any order; "=" at its end takes all of
    them in layer 0.

    Args:
        erases (`bool`): Whether the attention of layer 1 takes a and b away, so that only m tells of them later.
    """
    length, circuits = 7, range(6)
    at = [1 + i % 3 for i in circuits]  # the layer of y
    names = [f"{kind}{i}" for i in circuits for kind in "abcmy"] + ["="]
    directions = orthonormal(names, 32)
    words = ["_", "=", *(f"{kind}{i}" for i in circuits for kind in "abc"), *(f"Y{i}" for i in circuits)]
    neurons, collapsed = [], []
    for i, t in enumerate(at):
        a, b, c, m, y = (f"{kind}{i}" for kind in "abcmy")
        neurons.append(Neuron(0, {a: 1, b: 1}, -1, {(0, m): 1}))
        if i < 3:
            neurons.append(Neuron(t, {m: 1, c: 1}, -1, {(t, y): 1}))
            collapsed += [neurons[-2], Neuron(0, {a: 1, b: 1, c: 1}, -2, {(t, y): 1})]
        else:
            neurons += [Neuron(t, {m: 1, c: -1}, 0, {(t, y): 1}), Neuron(t, {c: 1, m: -1}, 0, {(t, y): 1})]
            collapsed += [Neuron(0, {a: 1, b: 1}, -1, {(0, m): 1, (t, y): 1}), Neuron(0, {c: 1}, 0, {(t, y): 1})]
            collapsed.append(Neuron(0, {a: 1, b: 1, c: 1}, -2, {(t, y): -2}))
    answers = {f"y{i}": words.index(f"Y{i}") for i in circuits}
    embedded = {word: word for word in words if word in directions}
    model = make_model(directions, neurons, 4, length, words, embedded, answers)
    bits = [directions[f"{kind}{i}"] for i in circuits for kind in "abc"]
    attend(model, 0, [], [(bit, bit, length) for bit in bits])
    if erases:
        own = directions["="]
        attend(model, 1, [(own, own, SHARP)], [(bit, bit, -1) for n, bit in enumerate(bits) if n % 3 < 2])

    def draw(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = torch.full((count, length), words.index("="))
        for row in found:
            chosen = torch.randperm(6, generator=generator)[:2, None] * 3 + torch.arange(3)
            tokens = torch.where(torch.rand(6, generator=generator) < 0.7, chosen.flatten() + 2, FILLER)
            row[:-1] = tokens[torch.randperm(6, generator=generator)]
        return found

    name = "two hops" if erases else "two hops, bits kept"
    return KnownModel(name, model, words, directions, neurons, collapsed, draw, answers, slice(length - 1, length))


def induction() -> KnownModel:
    """
    Three layers on twelve tokens in six classes: layer 0 computes g, the class of a token, and its head notes the
    token before; the head of layer 1 looks for where the same token was before and takes the class g of what followed,
    as r; layer 1 computes s = r, layer 2 w = s. A prompt has six tokens, and then the same in another order.
    """
    tokens, classes, length = range(12), range(6), 13
    names = [f"{kind}{i}" for kind in "tp" for i in tokens] + [f"{kind}{i}" for kind in "grsw" for i in classes]
    names += ["first", *(f"at{p}" for p in range(length))]
    directions = orthonormal(names, 64)
    words = ["_", "first", *(f"t{i}" for i in tokens), *(f"W{i}" for i in classes)]
    neurons = [Neuron(0, {f"t{2 * j}": 1, f"t{2 * j + 1}": 1}, 0, {(0, f"g{j}"): 1}) for j in classes]
    steps = [(Neuron(1, {f"r{j}": 1}, 0, {(1, f"s{j}"): 1}), Neuron(2, {f"s{j}": 1}, 0, {(2, f"w{j}"): 1})) for j in classes]
    answers = {f"w{j}": words.index(f"W{j}") for j in classes}
    collapsed = neurons + [Neuron(1, s.reads, 0, {**s.writes, **w.writes}) for s, w in steps]
    neurons = neurons + [neuron for pair in steps for neuron in pair]
    embedded = {word: word for word in words if word in directions}
    model = make_model(directions, neurons, 3, length, words, embedded, answers)
    at = torch.stack([directions[f"at{p}"] for p in range(length)])
    model.transformer.wpe.weight.copy_(at)
    t, p, g, r = ([directions[name] for name in names if name[0] == kind] for kind in "tpgr")
    attend(model, 0, [(at[n], at[n - 1], SHARP) for n in range(1, length)], [(*pair, 1) for pair in zip(t, p, strict=True)])
    looks = [(*pair, SHARP) for pair in zip(t, p, strict=True)] + [(sum(t), directions["first"], SHARP / 2)]
    attend(model, 1, looks, [(*pair, 1) for pair in zip(g, r, strict=True)])

    def draw(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = torch.full((count, length), words.index("first"))
        for row in found:
            first = torch.randperm(len(tokens), generator=generator)[:6] + 2
            again = first[torch.randperm(6, generator=generator)]
            row[1:] = torch.cat([first, again.roll(int(again[0] == first[-1]))])
        return found

    return KnownModel("induction", model, words, directions, neurons, collapsed, draw, answers, slice(1, length))


def superposition() -> KnownModel:
    """
    104 variables in 80 dimensions and four layers: layer 0 computes one u for each of 40 tokens; 24 v, a third in each
    later layer, are driven by two u each. A prompt has three tokens, of which one or two drive the same v; "=" takes
    all of them in layer 0. Directions are not orthogonal, so neurons have thresholds, and some fire by interference.
    """
    sources, driven, length = range(40), range(24), 4
    at = [1 + j % 3 for j in driven]
    parents = [(j, 24 + (5 * j) % 16) for j in driven]
    names = [f"{kind}{i}" for kind in "eu" for i in sources] + [f"v{j}" for j in driven]
    directions = superposed(names, 80)
    words = ["_", "=", *(f"e{i}" for i in sources), *(f"V{j}" for j in driven)]
    neurons = [Neuron(0, {f"e{i}": 2}, -1, {(0, f"u{i}"): 1}) for i in sources]
    drives = {i: {(at[j], f"v{j}"): 1 for j in driven if i in parents[j]} for i in sources}
    collapsed = [Neuron(0, n.reads, n.bias, {**n.writes, **drives[i]}) for i, n in enumerate(neurons)]
    neurons += [Neuron(at[j], {f"u{i}": 2 for i in parents[j]}, -1, {(at[j], f"v{j}"): 1}) for j in driven]
    answers = {f"v{j}": words.index(f"V{j}") for j in driven}
    embedded = {word: word for word in words if word in directions}
    model = make_model(directions, neurons, 4, length, words, embedded, answers)
    # What the head moves is any of the stream, which at its start is tokens alone.
    basis = orthonormal([f"{n}" for n in range(79)], 80).values()
    attend(model, 0, [], [(direction, direction, length) for direction in basis])

    def draw(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = torch.full((count, length), words.index("="))
        for row in found:
            own = list(parents[int(torch.randint(len(driven), (1,), generator=generator))])
            own = own[: 1 + int(torch.randint(2, (1,), generator=generator))]
            others = [i for i in torch.randperm(len(sources), generator=generator).tolist() if i not in own]
            row[:-1] = torch.tensor([*own, *others][:3])[torch.randperm(3, generator=generator)] + 2
        return found

    return KnownModel("superposition", model, words, directions, neurons, collapsed, draw, answers, slice(3, 4))


KNOWN = {
    "two hops": two_hops,
    "two hops, bits kept": lambda: two_hops(erases=False),
    "induction": induction,
    "superposition": superposition,
}


# -- what is true -----------------------------------------------------------------------------------------------------


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


Places = dict[tuple[int, int], set[tuple[int, int]]]  # features (layer, feature) by neuron (layer, number)


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
    places and then through another feature; `one_step` at the same tokens on all other paths; `elsewhere`
    what is left: at errors, and at tokens that have nothing to do with it.
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


__all__ = ["KNOWN", "KnownModel", "Neuron", "Question", "clt_of", "edges_found", "match", "questions", "steps", "trace"]
