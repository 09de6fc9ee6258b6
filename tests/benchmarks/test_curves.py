"""Fast training is dense training: the same curve and the same weights in float64; and the comparison end to end."""

import json
import re

import pytest
import torch

from benchmarks import compare_training
from benchmarks.curves import VARIANTS, compare, evaluate, make_clt, reverse, train
from hf_clt import CLTConfig, CLTTrainingArguments
from hf_clt.kernels import encode


STEPS = 30
ACTIVATION_FUNCTIONS = ("relu", "jumprelu", "topk", "batchtopk")


def make_problem(dtype=torch.float64, **fields):
    """Sparse combinations of a few directions, other ones in every layer, around a mean; statistics that fit."""
    config = CLTConfig(
        **{"num_layers": 3, "d_model": 12, "num_features": 32, "k": 4, "jumprelu_bandwidth": 0.5, **fields}
    )
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(2, 24, config.num_layers, config.d_model, generator=generator, dtype=dtype)
    batches = []
    for _ in range(STEPS):
        chosen = torch.rand(64, 24, generator=generator, dtype=dtype)
        codes = torch.where(chosen > 0.8, chosen, 0)
        inputs, labels = (torch.einsum("nf,fld->nld", codes, part) + 3 for part in dictionary)
        batches.append({"inputs": inputs, "labels": labels})
    every = {name: torch.cat([batch[name] for batch in batches]) for name in ("inputs", "labels")}
    statistics = {
        "mean_in": every["inputs"].mean(dim=0),
        "std_in": every["inputs"].std(dim=0),
        "mean_out": every["labels"].mean(dim=0),
        "std_out": every["labels"].std(dim=0),
    }
    args = CLTTrainingArguments(batch_size=64, training_steps=STEPS, learning_rate=3e-2, seed=0)
    return config, args, statistics, batches


def start(config, args, statistics, batches, dtype=torch.float64):
    return make_clt(config, args, statistics, batches, torch.device("cpu")).to(dtype)


@pytest.mark.parametrize("activation_fn", ACTIVATION_FUNCTIONS)
def test_fast_training_is_dense_training(activation_fn):
    config, args, statistics, batches = make_problem(activation_fn=activation_fn)
    found = {}
    for name in ("dense", "ours", "dense_reversed"):
        clt = start(config, args, statistics, batches)
        curve = train(VARIANTS[name], clt, args, batches)
        found[name] = curve, dict(clt.named_parameters()), evaluate(clt, args, batches, batches[:2])
    curve, parameters, metrics = found["dense"]
    assert curve["nmse"][-1] < 0.8 * curve["nmse"][0]  # something was learned
    assert len(curve["loss"]) == STEPS
    initial = dict(start(config, args, statistics, batches).named_parameters())
    for name in ("ours", "dense_reversed"):
        for what in ("loss", "nmse"):
            assert found[name][0][what] == pytest.approx(curve[what], rel=1e-9)
        for parameter, expected in parameters.items():
            assert not torch.equal(expected, initial[parameter]), parameter
            torch.testing.assert_close(
                found[name][1][parameter], expected, rtol=1e-9, atol=1e-9, msg=lambda text, p=parameter: f"{p}: {text}"
            )
        assert found[name][2]["nmse"] == pytest.approx(metrics["nmse"], rel=1e-9)
        assert found[name][2]["l0"] == metrics["l0"]


def test_reversing_changes_the_rounding_and_nothing_else():
    config, args, statistics, batches = make_problem(torch.float32, activation_fn="jumprelu")
    clt = start(config, args, statistics, batches, torch.float32)
    before = {name: value.clone() for name, value in [*clt.named_parameters(), *clt.named_buffers()]}
    reverse(clt)
    assert torch.equal(clt.decoders[0].weight, before["decoders.0.weight"].flip(0, 2))
    assert torch.equal(clt.mean_in, before["mean_in"].flip(1))
    reverse(clt)
    for name, value in [*clt.named_parameters(), *clt.named_buffers()]:
        assert torch.equal(value, before[name]), name
    losses = {}
    for name in ("dense", "dense_reversed"):
        clt = start(config, args, statistics, batches, torch.float32)
        losses[name] = train(VARIANTS[name], clt, args, batches[:3])["loss"]
    assert losses["dense_reversed"] != losses["dense"]
    assert losses["dense_reversed"] == pytest.approx(losses["dense"], rel=1e-5)


def test_every_other_variant_differs_from_ours_and_learns(monkeypatch):
    monkeypatch.setattr(encode, "multiplies_bfloat16", lambda: True)  # elsewhere autocast computes in float32
    config, args, statistics, batches = make_problem(torch.float32, activation_fn="topk")
    losses = {}
    for name in VARIANTS:
        clt = start(config, args, statistics, batches, torch.float32)
        losses[name] = train(VARIANTS[name], clt, args, batches)["loss"]
    assert losses["ours"][0] == pytest.approx(losses["dense"][0], rel=1e-6)
    for name in ("autocast", "adam_compact", "adam_compact_beta1_0"):
        assert losses[name][-1] != losses["ours"][-1]
        assert losses[name][-1] == pytest.approx(losses["ours"][-1], rel=0.2)


def test_the_first_rate_is_the_trainers():
    config, args, statistics, batches = make_problem(torch.float32, activation_fn="jumprelu", num_features=512)
    clt = start(config, args, statistics, batches, torch.float32)
    with torch.no_grad():
        acts = clt.encode(torch.cat([batch["inputs"] for batch in batches]))
    torch.testing.assert_close((acts > 0).float().mean(dim=0), torch.full((3, 512), 0.02), rtol=0.05, atol=0)


def flags(model, dataset, *more):
    small = "--num-features 64 --k 4 --batch-size 32 --steps 6 --context-size 16 --store-batch-size-prompts 4"
    return ["--model", model, "--dataset", dataset, *small.split(), "--eval-tokens", "100", *more]


@pytest.mark.parametrize("activation_fn", ["batchtopk", "jumprelu"])
def test_a_comparison_on_a_language_model(tiny_gpt2, text_file, tmp_path, activation_fn, capsys, monkeypatch):
    monkeypatch.setattr(encode, "multiplies_bfloat16", lambda: True)  # elsewhere autocast computes in float32
    figures, plot = tmp_path / "curves.json", tmp_path / "curves.png"
    more = ["--activation-fn", activation_fn, "--buffer-dtype", "bfloat16", "--variants", "ours", "autocast", "dense"]
    assert compare_training.main(flags(tiny_gpt2, text_file, *more, "--json", str(figures), "--plot", str(plot))) == 0
    record = json.loads(figures.read_text())
    assert record["command"].startswith("python -m benchmarks.compare_training --model ")
    assert record["settings"]["num_layers"] == 2
    assert record["settings"]["activation_fn"] == activation_fn
    variants = record["variants"]
    assert list(variants) == ["dense", "ours", "autocast"]
    assert variants["dense"]["loss_difference"] == [0] * 6
    assert variants["dense"]["parameter_difference"] == 0
    assert max(variants["ours"]["loss_difference"]) < 1e-4
    assert variants["ours"]["parameter_difference"] < 0.01
    assert variants["autocast"]["parameter_difference"] > 1e-3
    for result in variants.values():
        assert len(result["loss"]) == 6
        assert 0 < result["nmse"][-1] < 2
        assert result["heldout"]["num_tokens"] >= 100
        assert result["heldout"]["l0"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("dense ")
    assert "held-out NMSE" in lines[0] and "ours, autocast bfloat16" in lines[4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "dense", "fast"], "variants.*'fast'.*dense, dense_reversed"),
        (["--variants", "ours"], "variants.*'dense'"),
        (["--eval-tokens", "0"], "eval_tokens=0"),
        (["--steps", "0"], "training_steps=0"),
        (["--k", "65"], "k=65.*num_features=64"),
        (["--json", "no/such/curves.json"], "no/such/curves.json.*no/such"),
    ],
)
def test_wrong_options_give_one_line(tiny_gpt2, text_file, more, message, capsys):
    assert compare_training.main(flags(tiny_gpt2, text_file, *more)) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error)
    assert error.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_comparison():
    config, args, statistics, batches = make_problem(torch.float32, activation_fn="topk")
    batches[2]["labels"][0, 0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"ours: .*step 3.*learning_rate"):
        train(VARIANTS["ours"], start(config, args, statistics, batches, torch.float32), args, batches)


def test_batches_are_harvested_once(monkeypatch, tiny_gpt2, text_file):
    from benchmarks import curves
    from hf_clt.training.initial_config import build_config

    args = CLTTrainingArguments(
        model=tiny_gpt2, dataset=text_file, batch_size=32, training_steps=2, context_size=16, eval_tokens=50,
        store_batch_size_prompts=4, normalization_estimation_batches=4,
    )  # fmt: skip
    seen = []

    def record(variant, clt, args, batches, say):
        seen.append((variant.label, batches, [p.detach().clone() for p in clt.parameters()]))
        return train(variant, clt, args, batches, say)

    monkeypatch.setattr(curves, "train", record)
    compare(args, build_config(args, {"num_features": 32, "activation_fn": "relu"}), ["dense", "ours"])
    (_, first, weights), (_, second, same) = seen
    assert first is second
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
