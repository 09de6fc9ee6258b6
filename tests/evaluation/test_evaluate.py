"""Evaluation on held-out text against a dense float64 computation on activations from plain forward hooks."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.evaluation import MetricSums, evaluate_clt, evaluation_sums
from hf_clt.evaluation.evaluate import format_replacement
from hf_clt.files import as_json
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.harvest.text import load_text_dataset
from hf_clt.harvest.tokens import TokenStream
from hf_clt.hub.report import read_history
from tests.reference import parameters_of, random_clt, reference


@pytest.fixture(scope="module")
def language_model(tiny_gpt2):
    return load_language_model(tiny_gpt2)


@pytest.fixture(scope="module")
def harvester(language_model):
    return Harvester(language_model[0])


@pytest.fixture(scope="module")
def tokens(language_model, small_text_file):
    """300 held-out tokens in batches of `prompts_per_batch` blocks."""

    def make(prompts_per_batch=4):
        return TokenStream(
            load_text_dataset(small_text_file),
            language_model[1],
            context_size=32,
            prompts_per_batch=prompts_per_batch,
            heldout_tokens=300,
            heldout=True,
        )

    return make


@pytest.fixture(scope="module")
def rows(language_model, tokens):
    """Inputs and labels of the counted tokens by plain forward hooks, (N, L, D) each."""
    model, caught, rows = language_model[0], {}, []
    handles = []
    for layer, block in enumerate(model.transformer.h):
        handles.append(
            block.ln_2.register_forward_pre_hook(lambda m, args, i=layer: caught.update({("in", i): args[0]}))
        )
        handles.append(block.mlp.register_forward_hook(lambda m, args, out, i=layer: caught.update({("out", i): out})))
    with torch.no_grad():
        for batch in tokens():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            sides = [torch.stack([caught[side, i] for i in range(2)], dim=2) for side in ("in", "out")]
            rows.append([side[batch["counted"]] for side in sides])
    for handle in handles:
        handle.remove()
    return tuple(torch.cat(side) for side in zip(*rows, strict=True))


def make_clt(**fields):
    clt = random_clt(double=False, **{"num_layers": 2, "d_model": 64, "num_features": 96, "k": 6, **fields})
    with torch.no_grad():
        for encoder, decoder in zip(clt.encoders, clt.decoders, strict=True):
            encoder.weight.mul_(0.2)
            decoder.weight.mul_(0.1)
    return clt


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_equals_the_dense_float64_computation(activation, harvester, tokens, rows):
    clt = make_clt(activation_fn=activation)
    inputs, labels = rows
    if activation == "batchtopk":
        clt.train()(inputs[:64])
    metrics = evaluate_clt(clt, harvester, tokens(), batch_size=50)
    parameters = {name: value.double() for name, value in parameters_of(clt).items()}
    expected = reference(clt, parameters, inputs.double(), labels.double(), training=False)
    y, y_hat = labels.double(), expected["reconstruction"].detach()
    nmse = (y - y_hat).square().sum(dim=(0, 2)) / (y - y.mean(dim=0)).square().sum(dim=(0, 2))
    share = (expected["acts"] > 0).double().mean(dim=0)
    assert metrics["num_tokens"] == len(inputs) >= 300
    assert metrics["nmse_per_layer"] == pytest.approx(nmse.tolist(), rel=1e-4)
    assert metrics["nmse"] == pytest.approx(nmse.mean().item(), rel=1e-4)
    assert metrics["l0_per_layer"] == pytest.approx(share.sum(dim=1).tolist(), rel=1e-3)
    assert metrics["dead_fraction_per_layer"] == pytest.approx((share == 0).double().mean(dim=1).tolist(), abs=0.011)
    assert clt.training  # it keeps its mode, and was evaluated in eval mode


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk"])
def test_does_not_depend_on_the_batches(activation, harvester, tokens, rows):
    clt = make_clt(activation_fn=activation)
    if activation == "batchtopk":
        clt.train()(rows[0][:64])
    expected = evaluate_clt(clt, harvester, tokens(), batch_size=1024)
    for batch_size, prompts_per_batch in ((1, 4), (17, 4), (64, 1), (1024, 20)):
        metrics = evaluate_clt(clt, harvester, tokens(prompts_per_batch), batch_size)
        assert metrics["num_tokens"] == expected["num_tokens"]
        for name in ("nmse_per_layer", "l0_per_layer", "dead_fraction_per_layer"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
        assert metrics["feature_density"] == expected["feature_density"]


def test_shares_of_several_processes_merge(harvester, tokens):
    clt = make_clt()
    batches = list(tokens(1))
    parts = [evaluation_sums(clt, harvester, batches[rank::3]).tensors() for rank in range(3)]
    merged = MetricSums.from_gathered(parts).compute()
    whole = evaluate_clt(clt, harvester, batches)
    assert merged["num_tokens"] == whole["num_tokens"]
    assert merged["nmse_per_layer"] == pytest.approx(whole["nmse_per_layer"], rel=1e-6)
    assert merged["feature_density"] == whole["feature_density"]


def test_with_the_replacement_model(harvester, tokens):
    metrics = evaluate_clt(make_clt().train(), harvester, tokens(), replacement=True)
    plain = evaluate_clt(make_clt(), harvester, tokens())
    assert {name: metrics[name] for name in plain} == plain
    assert 0 < metrics["num_predictions"] <= metrics["num_tokens"]
    assert metrics["kl"] > 0 and 0 <= metrics["top1_agreement"] <= 1
    kept = metrics["ce_ablated"] - metrics["ce_replaced"]
    assert metrics["ce_recovered"] == pytest.approx(kept / (metrics["ce_ablated"] - metrics["ce_original"]))
    text = format_replacement(metrics)
    assert f"model {metrics['ce_original']:.4f}, MLPs replaced {metrics['ce_replaced']:.4f}" in text
    assert f"{metrics['num_predictions']:,} predictions" in text


def test_wrong_input_gives_one_clear_line(harvester, tokens, language_model):
    clt = make_clt()
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate_clt(clt, harvester, tokens(), batch_size=0)
    with pytest.raises(ValueError, match=r"num_layers=3 .*num_layers=2"):
        evaluate_clt(make_clt(num_layers=3), harvester, tokens())
    with pytest.raises(ValueError, match="d_model=32"):
        evaluate_clt(make_clt(d_model=32), harvester, tokens())
    with pytest.raises(ValueError, match=r"feature_input_hook="):
        evaluate_clt(make_clt(feature_input_hook="mlp.hook_in"), harvester, tokens())
    with pytest.raises(ValueError, match="eval_tokens"):
        evaluate_clt(clt, harvester, [])
    with pytest.raises(ValueError, match="no running threshold yet"):
        evaluate_clt(make_clt(activation_fn="batchtopk"), harvester, tokens())


def test_a_float64_language_model_is_harvested_in_float64(tokens):
    asked = []

    def harvest(batch, dtype, skip_bad):
        asked.append(dtype)
        return (torch.ones(5, 2, 4, dtype=dtype),) * 2

    config = {"num_layers": 2, "d_model": 4, "input_hook": "hook_resid_mid", "output_hook": "hook_mlp_out"}
    clt = CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=4, num_features=8, activation_fn="relu")).eval()
    for model_dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        fake = SimpleNamespace(model=SimpleNamespace(dtype=model_dtype), harvest=harvest, **config)
        evaluate_clt(clt, fake, [{}])
        assert asked.pop() == expected


def test_json_is_readable_everywhere():
    record = {"nmse": math.inf, "per_layer": [1.5, math.nan], "deeper": {"value": -math.inf, "count": 3}, "text": "a"}

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(as_json(record), parse_constant=refuse)
    assert read == {
        "nmse": None,
        "per_layer": [1.5, None],
        "deeper": {"value": None, "count": 3},
        "text": "a",
    }


def test_history(tmp_path):
    assert read_history("user/a-repository") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert [row["loss"] for row in read_history(tmp_path)] == [2.0, 1.0]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": ')
    with pytest.raises(ValueError, match=r"metrics\.jsonl .*JSON"):
        read_history(tmp_path)
