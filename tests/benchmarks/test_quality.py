"""The comparison of candidates: a run is the trainer's, and a comparison goes on where it stopped."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import quality, token_curve
from benchmarks.quality import CrossEntropy, InPlaceOfFirstLayers, check_runs, mean_cross_entropy, read_plan
from benchmarks.sweep import read_records
from hf_clt import CLTTrainer
from hf_clt.evaluation.replacement import replacement_metrics
from hf_clt.harvest.cache import ActivationCache, CachedTokens
from hf_clt.harvest.harvester import load_language_model
from hf_clt.training.initial_config import build_config
from hf_clt.training.parser import parse_train_args


PLAN = """
cache: {train-tokens: 700, heldout-tokens: 200, context-size: 32, ce-tokens: 100}
base:
  {num-features: 48, tokens: 256, batch-size: 64, n-batches-in-buffer: 4, normalization-estimation-batches: 2,
   initial-weights: random}
l0: [3, 20]
seeds: [0, 1, 2]
families:
  topk: {activation-fn: topk, k: [2, 4]}
  batchtopk: {activation-fn: batchtopk, k: [2, 6]}
candidates:
  slow: {learning-rate: 1e-6}
  same: {learning-rate: 4e-3, families: [topk]}
  more-updates: {batch-size: 32, families: [topk], k: [3, 4]}
"""


@pytest.fixture
def texts(text, tmp_path):
    """Options that name two texts that share nothing."""
    half = text.index("\n\n", len(text) // 2)
    for name, part in (("train", text[:half]), ("heldout", text[half:])):
        rows = [json.dumps({"text": paragraph}) + "\n" for paragraph in part.split("\n\n")]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return ["--train-text", str(tmp_path / "train.jsonl"), "--heldout-text", str(tmp_path / "heldout.jsonl")]


@pytest.fixture
def command(tiny_gpt2, tmp_path, texts):
    (tmp_path / "plan.yaml").write_text(PLAN)
    work, table = tmp_path / "work", tmp_path / "table.md"
    given = [str(tmp_path / "plan.yaml"), "--work", str(work), "--model", tiny_gpt2, "--table", str(table)]
    return [*given, *texts]


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_stopped(command, tmp_path, monkeypatch, capsys, without_plots):
    records, table, work = tmp_path / "records.jsonl", tmp_path / "table.md", tmp_path / "work"
    chosen = ["--families", "topk", "--records", str(records), "--plot", str(tmp_path / "plot.png")]
    assert quality.main([*command, *chosen, "--max-runs", "2"]) == 0
    assert len(read_records(records)) == 2
    assert "topk, baseline, L0 3, seed 0: 1 of 2 runs are made" in table.read_text()

    # Killed in the middle of a run, and of a line.
    train, trained = CLTTrainer.train, []

    def stop_at_third(trainer):
        trained.append(trainer)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(trainer)

    monkeypatch.setattr(CLTTrainer, "train", stop_at_third)
    assert quality.main([*command, *chosen]) == 130
    assert "interrupted; the same command" in capsys.readouterr().err
    with open(records, "a") as file:
        file.write('{"half a li')
    assert len(read_records(records)) == 4
    assert quality.main([*command, *chosen]) == 0
    # Of 4 candidates with 2 runs and 3 seeds each, "same" is the baseline.
    assert len(read_records(records)) == 18
    whole = table.read_text()
    assert whole.count("| topk | ") == 8
    assert (tmp_path / "plot.png").stat().st_size > 5000

    # Not interrupted, it would have been the same, but for the seconds.
    other = tmp_path / "other.jsonl"
    assert quality.main([*command, "--families", "topk", "--records", str(other)]) == 0

    def without_seconds(text):
        return [line.split("|")[:-2] for line in text.splitlines()]

    assert without_seconds(table.read_text()) == without_seconds(whole)

    # Nothing is left to do, so neither model nor text is needed.
    count = len(trained)
    at_the_end = [command[0], "--work", str(work), "--records", str(records), "--families", "topk"]
    capsys.readouterr()
    assert quality.main(at_the_end) == 0
    assert len(trained) == count
    assert without_seconds(capsys.readouterr().out)[: len(without_seconds(whole))] == without_seconds(whole)

    rows = {(row[1].strip(), row[2].strip(), row[3].strip()): row for row in without_seconds(whole) if len(row) > 5}
    assert "worse" in rows["topk", "slow", "3"][9]
    assert rows["topk", "same", "3"][4:7] == rows["topk", "baseline", "3"][4:7]
    assert "its runs reach L0 2.0 to 4.0, not 20; give other values of k" in whole
    for record in read_records(records):
        assert record["tokens"] == 256
        assert record["steps"] == (8 if record["candidate"] == "more-updates" else 4)
        assert set(record["cross_entropy"]) == {"ce_original", "ce_replaced", "ce_ablated", "ce_recovered"}
        assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("hook", [None, "mlp.hook_in"])
def test_a_run_is_that_of_the_trainer(command, tmp_path, tiny_gpt2, without_plots, hook):
    if hook is not None:
        plan = PLAN.replace("{num-features: 48", f"{{feature-input-hook: {hook}, num-features: 48")
        (tmp_path / "plan.yaml").write_text(plan)
    assert quality.main([*command, "--families", "batchtopk", "--seeds", "1", "--max-runs", "1"]) == 0
    (record,) = read_records(tmp_path / "work" / "quality.jsonl")
    cache = ActivationCache(tmp_path / "work" / ("activations" if hook is None else f"activations-{hook}"))
    assert cache.input_hook == (hook or "hook_resid_mid")
    assert cache.manifest["splits"]["train"]["tokens"] >= 700
    assert cache.manifest["splits"]["heldout"]["tokens"] >= 200
    options = "--num-features 48 --activation-fn batchtopk --k 2 --training-steps 4 --batch-size 64 --seed 1"
    options += " --n-batches-in-buffer 4 --normalization-estimation-batches 2 --disable-progress-bar"
    options += " --initial-weights random"
    places = ["--activation-cache", str(cache.folder), "--output-dir", str(tmp_path / "plain")]
    args, fields = parse_train_args([*options.split(), *places])
    trainer = CLTTrainer(args, build_config(args, fields))
    clt = trainer.train()
    metrics = trainer.evaluate()
    assert record["metrics"]["nmse_per_layer"] == metrics["nmse_per_layer"]
    assert record["metrics"]["num_tokens"] == cache.manifest["splits"]["heldout"]["tokens"]
    assert record["resolved"]["learning_rate"] == 4e-3 and record["seed"] == 1

    # Recorded, it is not made again, also where an option came later.
    for name in ("reach_growth", "sparsity_first_layer"):
        del record["resolved"][name]
    (tmp_path / "work" / "quality.jsonl").write_text(json.dumps(record) + "\n")
    assert quality.main([*command, "--families", "batchtopk", "--seeds", "1", "--max-runs", "1"]) == 0
    found = read_records(tmp_path / "work" / "quality.jsonl")
    assert [(other["candidate"], other["varied"]) for other in found] == [("baseline", {"k": 2}), ("slow", {"k": 2})]

    # CE recovered is that of the usual evaluation, on the tokens that it is measured on.
    model, _ = load_language_model(tiny_gpt2)
    entropy = CrossEntropy(Path(tiny_gpt2), cache.folder, 100)
    batches = list(CachedTokens(cache, "heldout"))[: len(entropy.batches)]
    expected = replacement_metrics(model, clt, batches)
    for name, value in record["cross_entropy"].items():
        # Not exact, since the means of the ablation are of outputs in bfloat16.
        assert value == pytest.approx(expected[name], abs=1e-3 if name == "ce_recovered" else 1e-4)
    # Of the first layers alone, the others stay as they are.
    one = mean_cross_entropy(model, InPlaceOfFirstLayers(clt), range(1), batches, entropy.hooks)
    assert one == pytest.approx(replacement_metrics(model, clt, batches, layers=[0])["ce_replaced"], rel=1e-6)


@pytest.mark.slow
def test_the_first_layers_alone(command, tmp_path, tiny_gpt2):
    plan = tmp_path / "plan.yaml"
    plan.write_text(plan.read_text().replace("cache: {", "cache: {layers: 1, "))
    assert quality.main([*command, "--max-runs", "1"]) == 0
    (record,) = read_records(tmp_path / "work" / "quality.jsonl")
    assert len(record["metrics"]["nmse_per_layer"]) == 1
    assert record["cross_entropy"]["ce_replaced"] != record["cross_entropy"]["ce_original"]
    # Their activations are those in the whole model.
    cache = ActivationCache(tmp_path / "work" / "activations")
    batch = next(iter(CachedTokens(cache, "train")))
    whole = quality.Harvester(load_language_model(tiny_gpt2)[0], cache.input_hook, cache.output_hook)
    expected = [values[:, :1].bfloat16().float() for values in whole.harvest(batch)]
    for found, values in zip(cache.harvest(batch), expected, strict=True):
        assert torch.allclose(found, values, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning-rate: 1e-6", "learning-rat: 1e-6", "candidate slow: .*learning-rat.*--learning-rate"),
        ("k: [3, 4]", "k: [3, 400]", "candidate more-updates: .*k=400"),
        ("k: [3, 4]", "optimizer: [adam, adamw]", "k and optimizer is a list"),
        ("k: [2, 6]", "k: 2", "no option is a list"),
        ("families: [topk], k", "families: [relu], k", "'relu' is unknown"),
        ("slow: {learning-rate: 1e-6}", "slow: 3", "candidates must hold lines"),
        ("slow:", "baseline:", "'baseline'"),
        ("context-size", "context-sise", "cache has no 'context_sise'"),
        ("tokens: 256", "training-steps: 256", "tokens=None"),
        ("seeds: [0, 1, 2]", "seeds: 3", "seeds=3 must be a list"),
        ("seeds: [0, 1, 2]", "", "must hold the keys base, cache"),
        ("l0:", "l0: {", "not valid YAML"),
    ],
)
def test_wrong_plans_are_refused_in_one_line(command, tmp_path, capsys, old, new, message):
    plan = tmp_path / "plan.yaml"
    assert old in plan.read_text()
    plan.write_text(plan.read_text().replace(old, new))
    assert quality.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        check_runs(read_plan(plan), {}, source={"model": command[4], "dataset": command[-1]})
    assert not (tmp_path / "work").exists()  # before anything is harvested


def test_what_is_missing_is_said(command, tmp_path, capsys):
    assert quality.main(command[:3]) == 2
    assert "model is missing; give --model" in capsys.readouterr().err
    assert quality.main([*command, "--candidates", "fast"]) == 2
    assert "candidate 'fast' is not in" in capsys.readouterr().err
    assert quality.main([*command, "--max-runs", "0"]) == 0
    plan = tmp_path / "plan.yaml"
    plan.write_text(plan.read_text().replace("train-tokens: 700", "train-tokens: 800"))
    assert quality.main(command) == 2
    assert "max_tokens=700, not 800" in capsys.readouterr().err


def test_the_curve_over_tokens_reads_the_records_that_belong_to_it(tmp_path):
    def record(nmse, tokens=64, steps=128, **changed):
        settings = {"activation_fn": "topk", "k": 16, "adam_beta1": 0.5, "learning_rate": 0.004}
        settings |= {"initial_weights": "data", "batch_size": tokens, "training_steps": steps, **changed}
        return json.dumps({"resolved": settings, "metrics": {"nmse": nmse}})

    lines = [record(0.4), record(0.6), record(0.3, steps=256, buffer_passes=2), record(0.2, k=50)]
    lines += [record(0.1, optimizer="adam_compact"), record(0.1, steps=64), record(0.1, learning_rate=0.006)]
    lines += [record(0.1, reach_growth=0.6), record(0.1, feature_input_hook="mlp.hook_in")]
    lines += [record(0.35, decay_steps=9)]
    quality, screen = tmp_path / "quality.jsonl", tmp_path / "screen.jsonl"
    quality.write_text("\n".join(lines), encoding="utf-8")
    runs = [("topk", "new", 0.25, 524_288), ("topk", "new", 0.1, 131_072), ("topk", "muon", 0.1, 524_288)]
    runs = [dict(zip(("fn", "name", "nmse", "tokens"), run, strict=True)) for run in runs]
    screen.write_text("\n".join(map(json.dumps, runs)), encoding="utf-8")
    points = token_curve.read_points(quality, screen)
    second, today = ((0.5, 0.004, start) for start in ("data", "clusters"))
    expected = {(*second, 1): {8192: 0.5, 524_288: 0.25}, (*second, 2): {8192: 0.3}, (*today, 1): {8192: 0.35}}
    assert points == {("topk", kind): curve for kind, curve in expected.items()}
