"""Rows and columns of attribution graphs: conservation, autograd, pushes and pulls; and what each of them notices."""

from dataclasses import replace

import pytest
import torch

from hf_clt.attribution import rows as rows_module
from hf_clt.attribution.frozen import Attention, Norm
from tests.attribution import cases
from tests.attribution.autograd_reference import ARCHITECTURES
from tests.attribution.cases import CHECKS, HOOKS, make_case, traced_edges, with_blocks


VARIANTS = {
    "reach 1": {"decoder_reach": 1},
    "reach 2": {"decoder_reach": 2},
    "per_source": {"decoder_tying": "per_source"},
    "per_source, reach 2": {"decoder_tying": "per_source", "decoder_reach": 2},
    "per_target": {"decoder_tying": "per_target"},
    "per_target, reach 2": {"decoder_tying": "per_target", "decoder_reach": 2},
    "relu": {"activation_fn": "relu"},
    "topk": {"activation_fn": "topk", "k": 5},
    "batchtopk": {"activation_fn": "batchtopk", "k": 5},
}


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("hooks", HOOKS, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_are_exact(name, hooks, skip):
    """Checks 2 and 3 of every architecture, pair of hooks, with and without skip."""
    case = make_case(name, hooks, skip)
    assert torch.equal(case.sources.features, case.traced.features)
    assert len(case.sources.features) > 50
    assert cases.autograd(case) < 1e-10
    assert cases.conservation(case) < 1e-9


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", ["gpt_neox", "gemma2"])
def test_rows_of_every_clt_are_exact(name, fields, skip):
    for hooks in (HOOKS[0], HOOKS[3]):
        case = make_case(name, hooks, skip, **fields)
        assert torch.equal(case.sources.features, case.traced.features)
        assert len(case.sources.features) > 20
        assert cases.autograd(case) < 1e-10
        assert cases.conservation(case) < 1e-9


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_columns_are_exact(name):
    """Check 5 in float64: a push is the transpose of a pull, and what the model does when a feature is doubled."""
    case = make_case(name, HOOKS[3], True)
    assert cases.columns(case) < 1e-10
    assert cases.doubling(case) < 1e-9


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32(name):
    case = make_case(name, HOOKS[3], True, torch.float32)
    assert cases.conservation(case) < 1e-4
    assert cases.columns(case) < 1e-3
    assert cases.doubling(case) < 1e-3


def test_pushes_reach_logits_as_rows_say():
    case = make_case("gemma2", HOOKS[3], True)
    nodes = torch.arange(0, len(case.sources.features), 7)
    pushed = rows_module.push(case.frozen, case.sources, rows_module.writes_of(case.sources, nodes))
    logits = pushed.final @ case.frozen.unembedding.T  # (K, P, V)
    expected = case.pulled()[0][len(case.sources.features) :, nodes]
    for row, (token, other, position) in enumerate(cases.TARGETS):
        against = logits[:, position].mean(-1) if other is None else logits[:, position, other]
        torch.testing.assert_close(logits[:, position, token] - against, expected[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "phi"])
def test_edges_split_by_head_add_up(name):
    case = make_case(name, HOOKS[3], True)
    features = case.sources.features
    targets = torch.cat([features[::31], features[-1:]])
    seeds = rows_module.feature_seeds(case.clt, case.frozen, targets)
    edges, _ = rows_module.pull(case.frozen, case.sources, seeds)
    for row in range(len(targets)):
        for node in (0, len(features) // 2):
            heads, direct = rows_module.head_loadings(case.frozen, case.sources, node, seeds.take(torch.tensor([row])))
            assert (heads.sum() + direct.sum()).item() == pytest.approx(edges[row, node].item(), rel=1e-9, abs=1e-12)


def test_factors_scale_what_is_written():
    sources = make_case("llama").sources
    nodes = torch.tensor([3, 0, 17])
    factors = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    written = rows_module.writes_of(sources, nodes)
    assert written.abs().flatten(1).amax(1).min() > 0
    torch.testing.assert_close(rows_module.writes_of(sources, nodes, factors), written * factors.view(3, 1, 1, 1))


def test_rows_do_not_depend_on_what_else_is_in_the_batch():
    """Targets of all layers and positions together, and each alone, which starts at its own layer and position."""
    for name in ("gpt_neox", "gemma2"):
        case = make_case(name, HOOKS[3], True)
        features = case.sources.features
        together, rests = rows_module.pull(
            case.frozen, case.sources, rows_module.feature_seeds(case.clt, case.frozen, features)
        )
        for node in range(0, len(features), 13):
            seeds = rows_module.feature_seeds(case.clt, case.frozen, features[node : node + 1])
            alone, own = rows_module.pull(case.frozen, case.sources, seeds)
            torch.testing.assert_close(alone[0], together[node], rtol=1e-10, atol=1e-12)
            for part, values in own.items():
                torch.testing.assert_close(values[0], rests[part][node], rtol=1e-10, atol=1e-12)


def test_rows_are_causal():
    case = make_case("llama")
    edges, _ = case.pulled()
    layers, positions, _ = case.sources.features.unbind(1)
    n = len(layers)
    features = edges[:n, :n]
    assert features[layers[:, None] <= layers].abs().max() == 0
    assert features[positions[:, None] < positions].abs().max() == 0
    assert features[(layers[:, None] > layers) & (positions[:, None] == positions)].abs().min() > 0


# -- mutants ----------------------------------------------------------------------------------------------------------
# Each takes one thing of the frozen model away or makes it wrong. The checks named must notice.


def attention_with(change, pre=None):
    """A mutant of the attention; the constants follow from it."""

    def mutate(case):
        def edit(block):
            attention = replace(block.attention, **change(block.attention))
            bias = block.pre.bias.expand(len(block.start), -1) * (0 if pre == "no bias" else 1)
            return replace(block, attention=attention, constant=attention.linear(bias, with_bias=True))

        return with_blocks(case, edit)

    return mutate


def block_with(**changes):
    def mutate(case):
        return with_blocks(case, lambda block: replace(block, **{k: change(block) for k, change in changes.items()}))

    return mutate


def frozen_with(**changes):
    return lambda case: replace(
        case, frozen=replace(case.frozen, **{k: change(case.frozen) for k, change in changes.items()})
    )


def sources_with(**changes):
    return lambda case: replace(
        case, sources=replace(case.sources, **{k: change(case.sources) for k, change in changes.items()})
    )


def rows_with(edit):
    def mutate(case):
        rows = [edit(rows) for rows in case.sources.rows]
        written = torch.cat([part.flatten(0, 1) for part in rows])
        return replace(case, sources=replace(case.sources, rows=rows, written=written))

    return mutate


def seeds_with(change):
    return lambda case: replace(case, edit_seeds=lambda seeds: change(case, seeds))


def norm_with(field, **change):
    def edit(block):
        norm = getattr(block, field)
        return replace(norm, **{name: value(norm) for name, value in change.items()})

    return edit


def ones(name):
    return lambda norm: torch.ones_like(getattr(norm, name))


def zeros(name):
    return lambda holder: torch.zeros_like(getattr(holder, name))


def heads_tiled(attention):
    """Head h reads key-value head h mod K: written as one value head for each head."""
    per_head = attention.value.view(-1, attention.head_size, attention.value.shape[1])
    return {"value": per_head.repeat(attention.num_heads // len(per_head), 1, 1).flatten(0, 1)}


def other_third(case):
    """The last third of NeoX's fused projection, as if it were not interleaved by head."""
    layers = iter(case.model.gpt_neox.layers)

    def change(attention):
        fused = next(layers).attention.query_key_value
        return {"value": fused.weight[-16:], "value_bias": fused.bias[-16:]}

    return attention_with(change)(case)


def without_demeaning(case, seeds):
    tokens = seeds.layers == len(case.frozen.blocks)
    tokens[-2] = False  # a difference of two
    mean = case.frozen.unembedding.mean(dim=0).expand(int(tokens.sum()), -1)
    vectors = seeds.vectors.clone()
    vectors[tokens] += case.frozen.final.at(seeds.positions[tokens]).transposed(mean)
    return replace(seeds, vectors=vectors)


def without_final_norm(case, seeds):
    tokens = seeds.layers == len(case.frozen.blocks)
    wanted = [
        case.frozen.unembedding[token] - (case.frozen.unembedding.mean(0) if o is None else case.frozen.unembedding[o])
        for token, o, _ in cases.TARGETS
    ]
    vectors = seeds.vectors.clone()
    vectors[tokens] = torch.stack(wanted)
    return replace(seeds, vectors=vectors)


# name: mutant, architecture, hooks, skip, the checks that notice it
MUTANTS = {
    "pattern of no head": (
        attention_with(lambda a: {"pattern": torch.zeros_like(a.pattern)}),
        "llama", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "pattern transposed": (
        attention_with(lambda a: {"pattern": a.pattern.transpose(1, 2)}),
        "llama", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "pattern uniform": (
        attention_with(lambda a: {"pattern": (a.pattern != 0) / (a.pattern != 0).sum(-1, keepdim=True).to(a.value)}),
        "llama", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "pattern without the window": (
        attention_with(lambda a: {"pattern": (a.pattern + 0.01).tril() / (a.pattern + 0.01).tril().sum(-1, True)}),
        "mistral", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "heads of values mixed up": (
        attention_with(heads_tiled), "llama", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "values transposed": (
        attention_with(lambda a: {"value": a.value.T}),
        "gpt2", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "output transposed": (
        attention_with(lambda a: {"output": a.output.T}),
        "gpt2", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "fused values not interleaved": (
        other_third, "gpt_neox", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "value bias": (
        attention_with(lambda a: {"value_bias": None}), "qwen2", HOOKS[0], False, "logits conservation",
    ),
    "output bias": (
        attention_with(lambda a: {"output_bias": None}), "gpt2", HOOKS[0], False, "logits conservation",
    ),
    "bias of the norm in front of attention": (
        attention_with(lambda a: {}, pre="no bias"), "gpt2", HOOKS[0], False, "logits conservation",
    ),
    "post-attention norm": (
        attention_with(lambda a: {"post": None}),
        "gemma2", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "scale of the norm in front of attention": (
        block_with(pre=norm_with("pre", scale=ones("scale"))),
        "llama", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "scale of one position for all": (
        block_with(pre=norm_with("pre", scale=lambda n: n.scale[:1].expand_as(n.scale))),
        "llama", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "gain of the norm in front of attention": (
        block_with(pre=norm_with("pre", gain=ones("gain"))),
        "gpt2", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "gain without Gemma's 1 +": (
        block_with(pre=norm_with("pre", gain=lambda n: n.gain - 1)),
        "gemma", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "centring of the norm in front of attention": (
        block_with(pre=norm_with("pre", centred=lambda n: False)),
        "gpt2", HOOKS[0], False, "logits conservation autograd doubling",
    ),
    "centring of the norm that features read behind": (
        block_with(read_norm=norm_with("read_norm", centred=lambda n: False)),
        "gpt2", HOOKS[2], False, "conservation autograd doubling",
    ),
    "scale of the norm that features read behind": (
        block_with(read_norm=norm_with("read_norm", scale=ones("scale"))),
        "llama", HOOKS[2], False, "conservation autograd doubling",
    ),
    "gain of the norm that features read behind": (
        block_with(read_norm=norm_with("read_norm", gain=ones("gain"))),
        "gemma", HOOKS[2], False, "conservation autograd doubling",
    ),
    "bias of the norm that features read behind": (
        block_with(read_norm=norm_with("read_norm", bias=zeros("bias"))), "gpt2", HOOKS[2], False, "conservation",
    ),
    "norm that features read behind": (
        block_with(read_norm=lambda b: None), "llama", HOOKS[2], False, "conservation autograd doubling",
    ),
    "norm behind the MLP": (
        block_with(post=lambda b: None), "gemma3", HOOKS[1], False, "conservation autograd doubling",
    ),
    "scale of the norm behind the MLP": (
        block_with(post=norm_with("post", scale=ones("scale"))),
        "gemma3", HOOKS[1], False, "conservation autograd doubling",
    ),
    "parallel block as a sequential one": (
        block_with(is_parallel=lambda b: False), "phi", HOOKS[0], False, "conservation autograd doubling",
    ),
    "sequential block as a parallel one": (
        block_with(is_parallel=lambda b: True), "llama", HOOKS[0], False, "conservation autograd doubling",
    ),
    "parallel block's skip in front of the attention": (
        block_with(is_parallel=lambda b: False), "gpt_neox", HOOKS[3], True, "conservation autograd doubling",
    ),
    "constants of attention": (
        block_with(constant=zeros("constant")), "gpt2", HOOKS[0], False, "logits conservation",
    ),
    "MLP outputs at cleared positions": (
        block_with(written=zeros("written")), "llama", HOOKS[0], False, "conservation",
    ),
    "position embeddings": (
        frozen_with(positions=zeros("positions")), "gpt2", HOOKS[0], False, "logits conservation",
    ),
    "position embeddings as tokens": (
        frozen_with(tokens=lambda f: f.tokens + f.positions, positions=zeros("positions")),
        "gpt2", HOOKS[0], False, "autograd",
    ),
    "tokens without Gemma's factor": (
        frozen_with(tokens=lambda f: f.tokens / 4), "gemma", HOOKS[0], False, "logits conservation autograd",
    ),
    "final norm": (
        seeds_with(without_final_norm), "llama", HOOKS[0], False, "conservation autograd",
    ),
    "centring of the final norm": (
        frozen_with(final=lambda f: replace(f.final, centred=False)),
        "gpt2", HOOKS[0], False, "logits conservation autograd",
    ),
    "bias of the final norm": (
        frozen_with(final=lambda f: replace(f.final, bias=torch.zeros_like(f.final.bias))),
        "gpt2", HOOKS[0], False, "logits conservation",
    ),
    "demeaning": (
        seeds_with(without_demeaning), "llama", HOOKS[0], False, "conservation autograd",
    ),
    "own bias": (
        seeds_with(lambda _, seeds: replace(seeds, own=torch.zeros_like(seeds.own))),
        "llama", HOOKS[0], False, "conservation",
    ),
    "seeds one layer higher": (
        seeds_with(lambda c, seeds: replace(seeds, layers=(seeds.layers + 1).clamp_max(len(c.frozen.blocks)))),
        "llama", HOOKS[0], False, "conservation autograd doubling",
    ),
    "seeds one position on": (
        seeds_with(lambda c, seeds: replace(seeds, positions=(seeds.positions + 1).clamp_max(8))),
        "llama", HOOKS[0], False, "conservation autograd doubling",
    ),
    "skip": (
        sources_with(skips=lambda s: None), "llama", HOOKS[0], True, "conservation autograd doubling",
    ),
    "skip transposed": (
        sources_with(skips=lambda s: [skip.T for skip in s.skips]),
        "llama", HOOKS[2], True, "conservation autograd doubling",
    ),
    "skip where no features are": (
        sources_with(cleared=lambda s: s.cleared & (torch.arange(9) != 3)),
        "llama", HOOKS[0], True, "conservation autograd",
    ),
    "decoder biases": (
        sources_with(biases=zeros("biases")), "llama", HOOKS[0], False, "conservation",
    ),
    "decoder biases within errors": (
        sources_with(errors=lambda s: s.errors + s.biases[:, None]),
        "llama", HOOKS[0], False, "conservation autograd",
    ),
    "errors": (
        sources_with(errors=zeros("errors")), "llama", HOOKS[0], False, "conservation autograd",
    ),
    "errors where none are": (
        sources_with(errors=lambda s: s.errors + s.cleared[:, None] * 1.0),
        "llama", HOOKS[0], False, "conservation autograd",
    ),
    "activations": (
        sources_with(activations=ones("activations")), "llama", HOOKS[0], False, "conservation autograd doubling",
    ),
    "decoder rows in the wrong order": (
        rows_with(lambda rows: rows.flip(1)), "llama", HOOKS[0], False, "conservation autograd doubling",
    ),
    "features that write to their own layer alone": (
        rows_with(lambda rows: torch.cat([rows[:, :1], 0 * rows[:, 1:]], dim=1)),
        "llama", HOOKS[0], False, "conservation autograd doubling",
    ),
    "rows of other features": (
        rows_with(lambda rows: rows.roll(1, 0)), "llama", HOOKS[0], False, "conservation autograd doubling",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name):
    mutate, architecture, hooks, skip, noticing = MUTANTS[name]
    case = make_case(architecture, hooks, skip)
    mutant = mutate(case)
    for check in noticing.split():
        assert CHECKS[check](case) < 1e-9
        assert CHECKS[check](mutant) > 1e-3, check


# -- mutants of the transposed pass, which pushes must notice too


def norm_without_centring(norm, r):
    return r * norm.scale[: r.shape[-2]] * norm.gain


def norm_centred_before(norm, r):
    r = r - r.mean(dim=-1, keepdim=True) if norm.centred else r
    return r * norm.scale[: r.shape[-2]] * norm.gain


def norm_without_gain(norm, r):
    r = r * norm.scale[: r.shape[-2]]
    return r - r.mean(dim=-1, keepdim=True) if norm.centred else r


def attention_mutant(**changes):
    original = Attention.transposed
    return lambda self, r: original(replace(self, **{name: change(self) for name, change in changes.items()}), r)


def inject_everywhere(r, seeds, layer):
    """At all positions up to the target's, not at its own alone."""
    for row in (seeds.layers == layer).nonzero().squeeze(1).tolist():
        r[row, : seeds.positions[row] + 1] += seeds.vectors[row]


TRANSPOSED_MUTANTS = {
    "centring": ("gpt2", Norm, "transposed", norm_without_centring),
    "centring in front of the gain": ("gpt2", Norm, "transposed", norm_centred_before),
    "gain": ("llama", Norm, "transposed", norm_without_gain),
    "pattern": ("llama", Attention, "transposed", attention_mutant(pattern=lambda a: a.pattern.transpose(1, 2))),
    "heads": ("llama", Attention, "transposed", attention_mutant(value=lambda a: heads_tiled(a)["value"])),
    "post norm": ("gemma2", Attention, "transposed", attention_mutant(post=lambda a: None)),
    "seeds": ("llama", rows_module, "inject", inject_everywhere),
}


@pytest.mark.parametrize("name", TRANSPOSED_MUTANTS)
def test_mutants_of_the_transposed_pass_are_noticed(name, monkeypatch):
    architecture, holder, function, mutant = TRANSPOSED_MUTANTS[name]
    case = make_case(architecture, HOOKS[2])
    monkeypatch.setattr(holder, function, mutant)
    for check in ("conservation", "autograd", "columns", "doubling"):
        assert CHECKS[check](case) > 1e-3, check


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("unfrozen", ["patterns", "norms"])
def test_rows_hold_patterns_and_norms(name, unfrozen):
    """With either left to follow, autograd and a doubled feature say something else than the rows do."""
    case = make_case(name)
    options = {"patterns": unfrozen != "patterns", "norms": unfrozen != "norms"}
    _, edges = traced_edges(name, case.model, case.clt, None, **options)
    assert cases.autograd(replace(case, edges=edges)) > 1e-3
