"""The frozen model: its logits are the model's, and what cannot be frozen is refused."""

import pytest
import torch
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_clt.attribution import frozen as frozen_module
from hf_clt.attribution.frozen import FreezingError, freeze, freeze_norm
from tests.attribution.autograd_reference import ARCHITECTURES, double_throughout, make_model, prompt
from tests.attribution.cases import HOOKS, make_case, relative
from tests.harvest.test_sites import build


def model_logits(model, ids=None):
    """Of the model as it is used, with its own eager attention, before what a softcap does."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=prompt() if ids is None else ids, use_cache=False).logits[0]
    model.set_attn_implementation(before)
    return logits


def softcapped(model, logits):
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rebuilt_logits_are_the_models(name, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    model = make_model(name, dtype)
    with double_throughout() if dtype == torch.float64 else torch.no_grad():
        expected = model_logits(model)
        frozen = freeze(model, prompt(), dtype=dtype)
    assert relative(softcapped(model, frozen.rebuilt_logits()), expected) < tolerance
    assert relative(frozen.logits, expected) < tolerance
    assert frozen.error < tolerance
    # of a prompt, not of a batch
    assert frozen.tokens.shape == (9, 16)
    assert len(frozen.blocks) == 3


def test_the_cases_have_what_goes_wrong_in_ports():
    """Else the tests above and below would say less than they seem to."""
    frozen = {name: make_case(name).frozen for name in ARCHITECTURES}
    block = {name: found.blocks[0] for name, found in frozen.items()}
    assert {name for name in block if block[name].is_parallel} == {"gpt_neox", "phi"}
    assert {name for name in block if block[name].attention.post is not None} == {"gemma2", "gemma3"}
    assert {name for name in block if block[name].pre.centred} == {
        "gpt2", "gpt_neox", "gpt_neox sequential", "phi", "olmo", "starcoder2",
    }  # fmt: skip
    assert frozen["gpt2"].positions.abs().max() > 0
    assert frozen["phi"].head_bias.abs().max() > 0
    assert block["qwen2"].attention.value_bias.abs().max() > 0
    assert block["starcoder2"].attention.output_bias.abs().max() > 0
    for name in ("llama", "qwen3", "gemma2"):
        attention = block[name].attention
        assert (attention.num_heads, len(attention.value) // attention.head_size) == (4, 2)
    windows = [b.attention.pattern[:, 8, 0].abs().max().item() == 0 for b in frozen["gemma3"].blocks]
    assert windows == [True, False, True]
    assert block["mistral"].attention.pattern[:, 8, 4].abs().max() == 0
    assert block["mistral"].attention.pattern[:, 8, 5].abs().min() > 0
    root_d = 16**0.5
    for name, embedding in (("gemma", root_d), ("gemma2", root_d), ("gemma3", root_d), ("llama", 1.0)):
        weight = make_case(name).model.get_input_embeddings().weight[prompt()[0]]
        torch.testing.assert_close(frozen[name].tokens, weight * embedding, rtol=1e-6, atol=1e-6)


def test_nothing_is_left_on_the_model():
    model = make_model("gemma2")
    before = model.config._attn_implementation, model_logits(model)
    freeze(model, prompt(), *HOOKS[3], dtype=torch.float64)
    assert model.config._attn_implementation == before[0]
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("hf_clt_recorded" in vars(module) for module in model.modules())
    torch.testing.assert_close(model_logits(model), before[1], rtol=0, atol=0)


def test_nothing_is_left_on_the_model_when_it_fails(monkeypatch):
    model = make_model("llama")
    before = model.config._attn_implementation
    monkeypatch.setattr(type(model.model.norm), "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        freeze(model, prompt())
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())


def test_without_a_registered_mask_the_logits_would_be_others(monkeypatch):
    """So that the comparison with the model as it is used notices a lost mask."""
    monkeypatch.setattr(frozen_module, "ATTENTION", "tests_no_mask")
    monkeypatch.setattr(frozen_module.ALL_MASK_ATTENTION_FUNCTIONS, "register", lambda *_: None)
    model = make_model("llama")
    ALL_ATTENTION_FUNCTIONS.register("tests_no_mask", frozen_module._recorded_attention)
    assert relative(freeze(model, prompt(), dtype=torch.float64).logits, model_logits(model)) > 1e-2


def test_norms_are_found_from_what_they_compute():
    """Also where the input is far from centred, and where two positions are alike."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 16, generator=generator, dtype=torch.float64) + 3
    x[1] = x[0]
    for centred in (True, False):
        module = torch.nn.LayerNorm(16) if centred else torch.nn.RMSNorm(16)
        module.double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(16, generator=generator))
            y = module(x)
        norm = freeze_norm(module, x, y, "a norm", torch.float64)
        assert norm.centred == centred
        torch.testing.assert_close(norm.linear(x) + norm.bias, y, rtol=1e-12, atol=1e-12)
        # Nᵀ of N: <r, N x> = <Nᵀ r, x>
        r = torch.randn(6, 16, generator=generator, dtype=torch.float64)
        assert (r * norm.linear(x)).sum().item() == pytest.approx((norm.transposed(r) * x).sum().item(), rel=1e-12)


def test_attention_transposed_is_the_transpose():
    for name in ("gemma2", "gpt2", "llama", "gpt_neox"):
        attention = make_case(name).frozen.blocks[1].attention
        generator = torch.Generator().manual_seed(0)
        u, r = torch.randn(2, 3, 7, 16, generator=generator, dtype=torch.float64)
        forward, backward = (r * attention.linear(u)).sum(), (attention.transposed(r) * u).sum()
        assert forward.item() == pytest.approx(backward.item(), rel=1e-10)


def test_bfloat16():
    """Recorded values are rounded, so that steps agree as well as 8 bits do."""
    for name in ("gpt2", "gemma2", "llama"):
        model = make_model(name, torch.bfloat16)
        frozen = freeze(model, prompt(), dtype=torch.float32)
        assert 0 < frozen.error < 5e-2
        rebuilt = softcapped(model, frozen.rebuilt_logits())
        assert relative(rebuilt, frozen.logits) < 0.1


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_without_the_attention_interface_is_refused():
    model = build("gptj", {"rotary_dim": 4})
    with pytest.raises(FreezingError, match=r"layer 0: 0 modules of GPTJBlock.*attention interface.*cannot be traced"):
        freeze(model, prompt())


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        freeze(make_model("llama").train(), prompt())


def test_a_model_without_head_is_refused():
    model = build("llama", {}, AutoModel)
    with pytest.raises(ValueError, match="no head; load it with AutoModelForCausalLM"):
        freeze(model, prompt())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[5]]), "input_ids has 1 tokens; give two or more"),
        (torch.full((33,), 5), "33.*32 positions"),
        (torch.full((2, 5), 5), r"input_ids has shape \(2, 5\); give one prompt"),
        (torch.tensor([5, 64]), "input_ids has token 64.*0 to 63"),
        (torch.tensor([5, -1]), "input_ids has token -1.*0 to 63"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        freeze(make_model("llama"), ids)


def test_a_step_that_is_not_linear_is_refused():
    """Something between attention and stream that is no norm: the maps that are found do not explain the model."""
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    attention.register_forward_hook(lambda _, args, output: (output[0] + 0.1 * output[0].square(), *output[1:]))
    with pytest.raises(FreezingError, match=r"layer 1: attention is off by .* of its norm"):
        freeze(model, prompt())


def test_a_norm_that_is_none_is_refused():
    model = make_model("llama")
    norm = model.model.layers[2].input_layernorm
    forward = norm.forward
    norm.forward = lambda x: torch.tanh(forward(x))
    with pytest.raises(FreezingError, match=r"layer 2, the norm in front of the attention .* is no norm"):
        freeze(model, prompt())
