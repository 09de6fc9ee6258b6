"""Reading activations: padding, what is run, selection, errors; and loading the language model."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    BartConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    PreTrainedTokenizerFast,
)

from hf_clt.harvest import harvester as harvester_module
from hf_clt.harvest.harvester import ActivationError, Harvester, check_context_size, load_language_model


L, D, VOCABULARY, POSITIONS = 3, 16, 64, 32


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=D,
        n_layer=L,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return randomize(GPT2LMHeadModel(config))


def llama(**options):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=L,
        num_attention_heads=2,
        num_key_value_heads=1,
        **options,
    )
    return randomize(LlamaForCausalLM(config))


def gpt_neox():
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=L,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return randomize(GPTNeoXForCausalLM(config))


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(rows=2, length=9):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def batch(input_ids, **changes):
    """A batch as a TokenStream gives it: position 0 is never counted, each row is a document of its own."""
    counted = torch.ones_like(input_ids, dtype=torch.bool)
    counted[:, 0] = False
    documents = (10 + torch.arange(len(input_ids)))[:, None].expand_as(input_ids).clone()
    mask = torch.ones_like(input_ids)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "counted": counted,
        "documents": documents,
        **changes,
    }


@pytest.mark.parametrize("build", [gpt2, llama, gpt_neox])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, VOCABULARY])  # the latter is one that was added later, without an embedding
def test_padding_does_not_change_activations(build, side, pad):
    harvester = Harvester(build())
    prompts = [tokens(1, length)[0] for length in (9, 5, 1)]
    padded, mask = torch.full((3, 9), pad), torch.zeros(3, 9, dtype=torch.long)
    places = [slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt)) for prompt in prompts]
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        padded[row, place], mask[row, place] = prompt, 1

    inputs, outputs = harvester(padded, mask)
    counted = mask.bool()
    some_inputs, some_labels = harvester.harvest(
        {"input_ids": padded, "attention_mask": mask, "counted": counted, "documents": mask - 1}
    )

    alone = [harvester(prompt[None]) for prompt in prompts]
    for row, place in enumerate(places):
        torch.testing.assert_close(inputs[row, place], alone[row][0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[row, place], alone[row][1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some_inputs, torch.cat([values[0][0] for values in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some_labels, torch.cat([values[1][0] for values in alone]), rtol=1e-4, atol=1e-5)


class LlamaWithoutPositions(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_left_padding_is_refused_where_positions_cannot_be_given():
    harvester = Harvester(randomize(LlamaWithoutPositions(llama().config)))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    harvester(tokens(), mask)
    with pytest.raises(ValueError, match=r"LlamaWithoutPositions .*pad on the right"):
        harvester(tokens(), mask.flip(1))


@pytest.mark.parametrize("hook", ["mlp.hook_out", "hook_mlp_out"])
def test_nothing_after_the_last_site_is_run(hook):
    model = llama()
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(tokens())
    expected = ran[: ran.index(f"model.layers.{L - 1}.mlp")]
    rest = ran[len(expected) + 1 :]
    assert {"lm_head", "model.norm"} <= set(rest)
    ran.clear()
    Harvester(model, output_hook=hook)(tokens())
    assert [name for name in ran if name in expected] == expected
    assert not set(ran) & set(rest)


def test_harvest_selects_counted_tokens_in_row_major_order():
    harvester = Harvester(gpt2())
    given = batch(tokens(3, 7))
    given["counted"][1, 2:5] = False
    given["counted"][2] = False
    inputs, labels = harvester.harvest(given)
    all_inputs, all_outputs = harvester(given["input_ids"])
    places = [(0, t) for t in range(1, 7)] + [(1, t) for t in (1, 5, 6)]
    assert inputs.shape == labels.shape == (len(places), L, D)
    for n, (row, position) in enumerate(places):
        assert torch.equal(inputs[n], all_inputs[row, position])
        assert torch.equal(labels[n], all_outputs[row, position])


def test_harvest_of_no_counted_token_is_empty():
    given = batch(tokens())
    given["counted"][:] = False
    inputs, labels = Harvester(gpt2()).harvest(given)
    assert inputs.shape == labels.shape == (0, L, D)


def test_dtypes_in_bfloat16():
    model = llama().to(torch.bfloat16)
    seen = {}
    for layer, block in enumerate(model.model.layers):
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, layer=layer: seen.update({("in", layer): args[0]})
        )
        block.mlp.register_forward_hook(lambda _, args, out, layer=layer: seen.update({("out", layer): out}))
    with torch.no_grad():
        model(tokens())
    expected = [torch.stack([seen[side, layer] for layer in range(L)], 2) for side in ("in", "out")]

    harvester = Harvester(model)
    for found, value in zip(harvester(tokens()), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, value)
    for found, value in zip(harvester.harvest(batch(tokens())), expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, value[:, 1:].flatten(0, 1).float())
    assert harvester.harvest(batch(tokens()), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_no_gradients_and_plain_use_unchanged():
    model = gpt2()
    before = model(tokens()).logits
    harvester = Harvester(model)
    inputs, outputs = harvester(tokens())
    assert not inputs.requires_grad
    assert not outputs.requires_grad
    assert torch.equal(model(tokens()).logits, before)
    again, _ = harvester(tokens())
    assert torch.equal(again, inputs)
    assert again.data_ptr() != inputs.data_ptr()  # what was returned stays as it was


def test_two_harvesters_of_one_model():
    model = llama()
    first, second = Harvester(model), Harvester(model, "mlp.hook_in", "mlp.hook_out")
    inputs, outputs = first(tokens())
    normed, same = second(tokens())
    assert torch.equal(same, outputs)
    for layer in range(L):
        expected = model.model.layers[layer].post_attention_layernorm(inputs[:, :, layer])
        torch.testing.assert_close(normed[:, :, layer], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(first(tokens())[0], inputs)


def test_nan_names_layer_hook_and_document():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    message = r"float32: layer 1, hook_mlp_out, document 10 \(row 0, position 1 of the batch; 16 of 16 tokens"
    with pytest.raises(ActivationError, match=message):
        Harvester(model).harvest(batch(tokens()))


def test_infinity_names_the_documents_of_the_row():
    model = llama()
    given = batch(tokens(3, 7))
    given["input_ids"][given["input_ids"] == 5] = 6
    given["input_ids"][2, 4] = 5
    given["documents"][2] = torch.tensor([-1, 12, 12, 40, -1, 41, 41])
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 2] = torch.inf
    message = r"layer 0, hook_resid_mid, document 12 or 40 or 41 \(row 2, position \d of the batch; \d of 18 tokens"
    with pytest.raises(ActivationError, match=message):
        Harvester(model).harvest(given)
    given["counted"][2] = False
    Harvester(model).harvest(given)  # the other rows are sound


def test_overflow_of_the_dtype_asked_for():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[-1].mlp.c_proj.bias[0] = 1e6
    harvester = Harvester(model)
    harvester.harvest(batch(tokens()))
    message = r"not finite in torch\.float16: layer 2, hook_mlp_out, document 10 .*buffer_dtype"
    with pytest.raises(ActivationError, match=message):
        harvester.harvest(batch(tokens()), dtype=torch.float16)


def test_large_activations_whose_sum_overflows_are_finite():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[-1].mlp.c_proj.bias[:] = 3e38
    _, labels = Harvester(model).harvest(batch(tokens()))
    assert torch.isinf(labels.sum())
    assert torch.isfinite(labels).all()


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        Harvester(gpt2().train())(tokens())


def test_foreign_token_ids_are_refused():
    ids = tokens()
    ids[1, 3] = VOCABULARY
    with pytest.raises(ValueError, match=f"to {VOCABULARY} do not fit .*vocabulary of {VOCABULARY}"):
        Harvester(gpt2())(ids)


def test_unknown_hook():
    with pytest.raises(ValueError, match=r"hook_resid_mid and mlp\.hook_in.*hook_mlp_out and mlp\.hook_out"):
        Harvester(gpt2(), "resid")


@pytest.mark.parametrize("build", [gpt2, llama])
def test_context_longer_than_the_model_allows(build):
    model = build()
    check_context_size(model.config, POSITIONS)
    message = f"context_size is {POSITIONS + 1}, and the language model has {POSITIONS} positions"
    with pytest.raises(ValueError, match=message):
        check_context_size(model.config, POSITIONS + 1)
    with pytest.raises(ValueError, match=message):
        Harvester(model)(tokens(1, POSITIONS + 1))


def test_context_without_a_limit():
    check_context_size(MptConfig(n_layers=1), 10**9)  # ALiBi: no table of positions


# --- loading ---


def save_tokenizer(folder):
    words = {
        word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *["the", "cat", "sat", "on", "a", "mat"]])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    llama(tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_load_language_model(folder):
    saved = load_file(folder / "model.safetensors")
    model, tokenizer = load_language_model(folder)
    assert tokenizer("the cat sat").input_ids[-3:] == [3, 4, 5]
    assert model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    loaded = model.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    model, _ = load_language_model(str(folder), dtype="float32", device="cpu")
    assert model.dtype == torch.float32
    inputs, _ = Harvester(model)(tokens())
    assert torch.isfinite(inputs).all()


def test_load_refuses_unknown_dtype(folder):
    with pytest.raises(ValueError, match=r"model_dtype.*'fp8'.*float32, bfloat16, float16, auto"):
        load_language_model(folder, dtype="fp8")


def test_load_refuses_what_is_not_there(tmp_path, no_hub):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_language_model(tmp_path / "missing")
    with pytest.raises(ValueError, match="there is no such folder"):
        load_language_model("./missing")
    with pytest.raises(ValueError, match=r"'nobody/nothing' .*no local folder.*Check the name") as error:
        load_language_model("nobody/nothing")
    assert error.value.__cause__ is not None
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"model .*config\.json"):
        load_language_model(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match="there is no such folder"):
        load_language_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("build", [gpt2, llama])
def test_load_refuses_a_model_without_tokenizer(tmp_path, build):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer") as error:
        load_language_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", ["", "01="])
def test_a_tokenizer_of_a_few_tokens_is_one(tmp_path, words):
    llama().save_pretrained(tmp_path)
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="</s>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    if words:
        assert len(load_language_model(tmp_path)[1]) == 5
    else:
        with pytest.raises(ValueError, match="no tokenizer"):
            load_language_model(tmp_path)


def test_a_fingerprint_tells_models_apart_and_not_their_formats():
    model = gpt2()
    own = Harvester(model).fingerprint()
    assert json.loads(json.dumps(own, allow_nan=False)) == own
    assert Harvester(copy.deepcopy(model)).has_fingerprint(own)
    assert Harvester(copy.deepcopy(model).to(torch.bfloat16)).has_fingerprint(own)
    assert not Harvester(llama()).has_fingerprint(own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            other = copy.deepcopy(model)
            other.get_parameter(name).add_(0.003 * torch.randn_like(parameter))
            assert not Harvester(other).has_fingerprint(own), name
            other.get_parameter(name).fill_(torch.nan)
            assert Harvester(other).has_fingerprint(Harvester(other).fingerprint())


def test_load_refuses_missing_weights(folder):
    # a model without its head, as AutoModel saves it
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ValueError, match=r" 1 .*lm_head\.weight"):
        load_language_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model '.*' cannot be loaded: .*model\.safetensors"):
        load_language_model(folder)


def test_load_refuses_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model '.*' cannot be loaded: ") as error:
        load_language_model(folder)
    assert error.value.__cause__ is not None


def test_load_refuses_an_encoder_decoder(tmp_path):
    BartConfig(d_model=D).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"bart.*decoder-only"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("fast, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bfloat16_where_the_cpu_multiplies_it(tiny_gpt2, monkeypatch, fast, expected):
    monkeypatch.setattr(harvester_module, "multiplies_bfloat16", lambda: fast)
    assert load_language_model(tiny_gpt2, dtype="auto")[0].dtype == expected
