"""The sites of every architecture, against activations computed from the definitions with plain forward hooks."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_clt.harvest.harvester import Harvester
from hf_clt.harvest.sites import LAYOUTS, Site, check_hooks, default_hooks, resolve_sites


L, D, VOCABULARY = 3, 16, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 8}

# name: model_type, its further options, list of blocks, attention, structure of a block, norm in front of the MLP
ARCHITECTURES = {
    "gpt2": ("gpt2", {}, "h", "attn", "sequential", "ln_2"),
    "gpt_neox": ("gpt_neox", {}, "layers", "attention", "parallel", "post_attention_layernorm"),
    "gpt_neox sequential": (
        "gpt_neox",
        {"use_parallel_residual": False},
        "layers",
        "attention",
        "sequential",
        "post_attention_layernorm",
    ),
    "llama": ("llama", {}, "layers", "self_attn", "sequential", "post_attention_layernorm"),
    "mistral": ("mistral", HEAD, "layers", "self_attn", "sequential", "post_attention_layernorm"),
    "qwen2": ("qwen2", {}, "layers", "self_attn", "sequential", "post_attention_layernorm"),
    "qwen3": ("qwen3", HEAD, "layers", "self_attn", "sequential", "post_attention_layernorm"),
    "gemma": ("gemma", HEAD, "layers", "self_attn", "sequential", "post_attention_layernorm"),
    "gemma2": ("gemma2", HEAD, "layers", "self_attn", "post norms", "pre_feedforward_layernorm"),
    "gemma3": ("gemma3_text", HEAD, "layers", "self_attn", "post norms", "pre_feedforward_layernorm"),
    "phi": ("phi", {}, "layers", "self_attn", "parallel", "input_layernorm"),
    "phi3": ("phi3", {}, "layers", "self_attn", "sequential", "post_attention_layernorm"),
    # resolved by inspection
    "gptj": ("gptj", {"rotary_dim": 4}, "h", "attn", "parallel", "ln_1"),
    "olmo": ("olmo", {}, "layers", "self_attn", "sequential", "post_attention_layernorm"),
    "starcoder2": ("starcoder2", {}, "layers", "self_attn", "sequential", "post_attention_layernorm"),
}


def randomize(model):
    """Default norms of ones and biases of zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(model_type, options, auto=AutoModelForCausalLM):
    return randomize(auto.from_config(AutoConfig.for_model(model_type, **{**SIZES, **options})))


def tokens():
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def record(model, decoder, blocks, attention, input_ids):
    """Input, attention output and output of every block, by plain forward hooks."""
    blocks = getattr(decoder, blocks)
    seen = [{} for _ in blocks]

    def first(values):
        return values[0] if isinstance(values, tuple) else values

    for layer, block in enumerate(blocks):
        store = seen[layer]
        block.register_forward_pre_hook(lambda _, args, store=store: store.update(start=args[0]))
        block.register_forward_hook(lambda _, args, out, store=store: store.update(end=first(out)))
        getattr(block, attention).register_forward_hook(
            lambda _, args, out, store=store: store.update(attention=first(out))
        )
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    return blocks, seen


def definitions(blocks, seen, structure, norm):
    """What the four hooks mean, (P, T, L, D) each, from the blocks' inputs and attention outputs."""
    hooks = {name: [] for name in ("hook_resid_mid", "mlp.hook_in", "mlp.hook_out", "hook_mlp_out")}
    for block, values in zip(blocks, seen, strict=True):
        attention = values["attention"]
        if structure == "post norms":
            attention = block.post_attention_layernorm(attention)
        stream = values["start"] + (0 if structure == "parallel" else attention)
        mlp_in = getattr(block, norm)(stream)
        mlp_out = added = block.mlp(mlp_in)
        if structure == "post norms":
            added = block.post_feedforward_layernorm(mlp_out)
        rest = attention if structure == "parallel" else 0
        # the definition itself: what is added takes the residual stream to the block's output
        torch.testing.assert_close(stream + rest + added, values["end"], rtol=1e-4, atol=1e-4)
        for name, value in zip(hooks, (stream, mlp_in, mlp_out, added), strict=True):
            hooks[name].append(value)
    return {name: torch.stack(values, dim=2) for name, values in hooks.items()}


def assert_reads_definitions(model, decoder, name):
    _, _, blocks, attention, structure, norm = ARCHITECTURES[name]
    with torch.no_grad():
        expected = definitions(*record(model, decoder, blocks, attention, tokens()), structure, norm)
    for input_hook, output_hook in [("hook_resid_mid", "hook_mlp_out"), ("mlp.hook_in", "mlp.hook_out")]:
        harvester = Harvester(model, input_hook, output_hook)
        inputs, outputs = harvester(tokens())
        assert (harvester.num_layers, harvester.d_model) == (L, D)
        torch.testing.assert_close(inputs, expected[input_hook], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outputs, expected[output_hook], rtol=1e-4, atol=1e-4)
    # the hooks differ, so that one could not have passed for another
    assert not torch.allclose(expected["hook_resid_mid"], expected["mlp.hook_in"], atol=1e-2)
    same = torch.allclose(expected["mlp.hook_out"], expected["hook_mlp_out"])
    assert same != (structure == "post norms")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_architecture_matches_plain_hooks(name, auto):
    model_type, options = ARCHITECTURES[name][:2]
    model = build(model_type, options, auto)
    assert_reads_definitions(model, model.get_decoder(), name)


def test_gemma3_with_vision_reads_the_text_decoder():
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": L,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {**SIZES, **HEAD}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = randomize(AutoModelForCausalLM.from_config(config))
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert_reads_definitions(model, model.model.language_model, "gemma3")


@pytest.mark.parametrize("name", [name for name, row in ARCHITECTURES.items() if row[0] in LAYOUTS])
def test_inspection_finds_what_the_table_says(name, monkeypatch):
    model_type, options = ARCHITECTURES[name][:2]
    model = build(model_type, options)
    hooks = [("hook_resid_mid", "hook_mlp_out"), ("mlp.hook_in", "mlp.hook_out")]
    known = [resolve_sites(model, *pair) for pair in hooks]
    monkeypatch.delitem(LAYOUTS, model_type)
    assert [resolve_sites(model, *pair) for pair in hooks] == known


def test_every_architecture_of_the_table_is_tested():
    assert set(LAYOUTS) <= {row[0] for row in ARCHITECTURES.values()}


def test_inspection_in_bfloat16():
    model = build("gptj", {"rotary_dim": 4}).to(torch.bfloat16)
    inputs, outputs = resolve_sites(model, "hook_resid_mid", "hook_mlp_out")
    assert inputs == [Site(f"transformer.h.{layer}.ln_1", "input") for layer in range(L)]
    assert outputs == [Site(f"transformer.h.{layer}.mlp", "output") for layer in range(L)]


@pytest.mark.parametrize(
    ("model_type", "options", "found"),
    [
        # adds a multiple of the MLP's output: neither it nor anything else is what is added
        (
            "granite",
            {"residual_multiplier": 0.22},
            r"GraniteDecoderLayer with .*post_attention_layernorm\), 0 modules",
        ),
        # no norm in front of the MLP
        ("olmo2", {}, r"Olmo2DecoderLayer with .*post_feedforward_layernorm\), 0 modules"),
        # no MLP module
        ("opt", {"ffn_dim": 24, "word_embed_proj_dim": D}, r"'layers' of OPTDecoderLayer\), 0 have exactly one child"),
        # the MLP adds the residual itself
        ("bloom", {"n_head": 2}, r"BloomBlock with .*mlp\), 0 modules"),
    ],
)
def test_inspection_refuses_what_it_cannot_tell(model_type, options, found):
    with pytest.raises(ValueError, match=f"'{model_type}' is not known.*{found}"):
        resolve_sites(build(model_type, options), "hook_resid_mid", "hook_mlp_out")


def test_inspection_refuses_two_lists_of_blocks():
    model = build("olmo", {})
    model.model.more = torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": torch.nn.Linear(D, D)}) for _ in range(L))
    with pytest.raises(ValueError, match=r"'layers' of OlmoDecoderLayer, 'more' of ModuleDict.*2 have exactly one"):
        resolve_sites(model, "hook_resid_mid", "hook_mlp_out")


class TwoOutputs(torch.nn.Module):
    """An MLP that returns its router's logits too, as mixtures of experts do."""

    class Pair(tuple):
        def __radd__(self, residual):
            return residual + self[0]

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden_states):
        return self.Pair((self.mlp(hidden_states), torch.zeros(1)))


def test_inspection_refuses_an_mlp_that_returns_a_tuple():
    model = build("olmo", {})
    for layer in model.model.layers:
        layer.mlp = TwoOutputs(layer.mlp)
    with pytest.raises(ValueError, match=r"OlmoDecoderLayer with .*\), 0 modules are a norm"):
        resolve_sites(model, "hook_resid_mid", "hook_mlp_out")


def test_inspection_leaves_no_hooks():
    model = build("olmo", {})
    resolve_sites(model, "hook_resid_mid", "hook_mlp_out")
    assert not any(module._forward_hooks for module in model.modules())


def test_inspection_needs_eval_mode():
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        resolve_sites(build("olmo", {}).train(), "hook_resid_mid", "hook_mlp_out")


@pytest.mark.parametrize(
    ("hooks", "field"),
    [
        (("hook_resid_post", "hook_mlp_out"), "feature_input_hook is 'hook_resid_post'"),
        (("hook_resid_mid", "mlp_out"), "feature_output_hook is 'mlp_out'"),
        (("mlp.hook_out", "hook_mlp_out"), "feature_input_hook is 'mlp.hook_out'"),
    ],
)
def test_unknown_hook_is_refused_with_the_known_ones(hooks, field):
    known = "hook_resid_mid and mlp.hook_in, outputs are hook_mlp_out and mlp.hook_out"
    with pytest.raises(ValueError, match=f"{field}.*{known}"):
        resolve_sites(build("llama", {}), *hooks)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_default_hooks(model_type):
    hooks = default_hooks(model_type)
    check_hooks(*hooks)
    assert (hooks == ("mlp.hook_in", "mlp.hook_out")) == (model_type == "qwen3")
    assert hooks in [("mlp.hook_in", "mlp.hook_out"), ("hook_resid_mid", "hook_mlp_out")]
