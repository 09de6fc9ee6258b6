"""
Language models whose circuits are known, because their weights are set by hand.

Each is a GPT-2 with relu whose norms do nearly nothing: their eps is so large that they only subtract the mean, which
is 0 in all directions that are used. A variable is a direction of the residual stream; a neuron of an MLP reads some
variables and writes others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel


EPS = 1e12  # of the norms
SHARP = 80.0  # attention score of what is looked at; of anything else 0
FILLER = 0  # the token that is nothing: no embedding, and a logit of 0


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
        neurons, collapsed (`list[Neuron]`): What the MLPs do; and features that do the same, in superposition about
            the same, with fewer active: they write in one step what the MLPs do in two.
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
        else:
            neurons += [Neuron(t, {m: 1, c: -1}, 0, {(t, y): 1}), Neuron(t, {c: 1, m: -1}, 0, {(t, y): 1})]
            collapsed.append(neurons[-1])
        answered, other = {(0, m): 1, (t, y): 1}, {(0, m): 1}  # one feature writes m and the answer at once
        with_c, without = (answered, other) if i < 3 else (other, answered)
        collapsed += [Neuron(0, {a: 1, b: 1, c: 1}, -2, with_c), Neuron(0, {a: 1, b: 1, c: -1}, -1, without)]
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
    collapsed = neurons + [Neuron(1, {f"r{j}": 1}, 0, {(1, f"s{j}"): 1, (2, f"w{j}"): 1}) for j in classes]
    neurons += [Neuron(1, {f"r{j}": 1}, 0, {(1, f"s{j}"): 1}) for j in classes]
    neurons += [Neuron(2, {f"s{j}": 1}, 0, {(2, f"w{j}"): 1}) for j in classes]
    answers = {f"w{j}": words.index(f"W{j}") for j in classes}
    embedded = {word: word for word in words if word in directions}
    model = make_model(directions, neurons, 3, length, words, embedded, answers)
    at = torch.stack([directions[f"at{p}"] for p in range(length)])
    model.transformer.wpe.weight.copy_(at)
    t, p, g, r = ([directions[name] for name in names if name[0] == kind] for kind in "tpgr")
    before = [(*pair, SHARP) for pair in zip(at[1:], at[:-1], strict=True)]
    attend(model, 0, before, [(*pair, 1) for pair in zip(t, p, strict=True)])
    again = [(*pair, SHARP) for pair in zip(t, p, strict=True)] + [(sum(t), directions["first"], SHARP / 2)]
    attend(model, 1, again, [(*pair, 1) for pair in zip(g, r, strict=True)])

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


__all__ = ["FILLER", "KNOWN", "KnownModel", "Neuron", "combined"]
