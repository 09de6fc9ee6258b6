"""Sweeps: a trial is the run that `scripts/train_clt.py` would make; the language model reads the text once."""

import json
import weakref

import pytest
import torch

from benchmarks import sweep
from benchmarks.quality import read_plan
from benchmarks.sweep import (
    arguments_of,
    format_sweep,
    plot_frontier,
    read_records,
    read_sweep,
    remember,
    run_sweep,
)
from hf_clt import CLTTrainer
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.training.initial_config import build_config
from hf_clt.training.parser import parse_train_args


SWEEP = """
base:
  model: {model}
  dataset: {dataset}
  num_features: 48
  context-size: 32
  store-batch-size-prompts: 2
  n-batches-in-buffer: 4
  normalization-estimation-batches: 2
  batch-size: 64
  training-steps: 4
  eval-tokens: 128
  disable-progress-bar: true
groups:
  k: {{activation-fn: topk, k: [2, 4]}}
  lambda: {{activation-fn: relu, sparsity-lambda: [1e-1, 10], sparsity-schedule: constant}}
"""


@pytest.fixture
def sweep_file(tiny_gpt2, text_file, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.format(model=tiny_gpt2, dataset=text_file))
    return path


@pytest.mark.slow
def test_a_sweep_reads_its_text_once_and_goes_on_where_it_stopped(
    sweep_file, tmp_path, monkeypatch, capsys, without_plots
):
    reads = []
    read = Harvester.read
    monkeypatch.setattr(Harvester, "read", lambda self, batch, dtype: reads.append(batch) or read(self, batch, dtype))
    trials = read_sweep(sweep_file)
    assert [trial["varied"].get("k", trial["varied"].get("sparsity_lambda")) for trial in trials] == [2, 4, 0.1, 10]
    records = tmp_path / "records.jsonl"

    first = run_sweep(trials[:1], records)
    in_first = len(reads)
    assert in_first > 0
    with open(records, "a") as file:
        file.write('{"half a li')  # the machine stopped in the middle of a line
    reads.clear()
    found = run_sweep(trials, records)
    assert found[0] == first[0]
    assert len(reads) == in_first  # the three others share what the second trial read

    # The trial is the plain run, to the last bit.
    args, fields = parse_train_args([*arguments_of(trials[1]["settings"]), "--output-dir", str(tmp_path / "plain")])
    trainer = CLTTrainer(args, build_config(args, fields))
    trainer.train()
    metrics = trainer.evaluate()
    assert found[1]["metrics"]["nmse"] == metrics["nmse"]
    assert found[1]["metrics"]["l0_per_layer"] == metrics["l0_per_layer"]
    assert found[1]["tokens"] == 256

    # What was recorded is enough for table and plot.
    capsys.readouterr()
    options = ["--records", str(records), "--plot", str(tmp_path / "frontier.png")]
    assert sweep.main([str(sweep_file), *options]) == 0
    table = capsys.readouterr().out
    assert table.count("\n| topk |") == table.count("\n| relu |") == 2
    assert table.count("**") == 4  # the best of each group
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    assert sweep.main([str(sweep_file), *options, "--groups", "k", "--table", str(tmp_path / "k.md")]) == 0
    assert "lambda" not in (tmp_path / "k.md").read_text()
    assert len(read_records(records)) == 4

    # A trial that another group has too, there by default, is not run again.
    sweep_file.write_text(sweep_file.read_text() + "  same: {activation-fn: topk, k: 2, sparsity-lambda: 0}\n")
    (same,) = run_sweep(read_sweep(sweep_file)[-1:], records)
    assert len(read_records(records)) == 4
    assert same["group"] == "same" and same["metrics"] == first[0]["metrics"]


@pytest.mark.slow
def test_what_a_trial_leaves(sweep_file, tmp_path, without_plots):
    """Its record, which is known although options are added later, and nothing in memory."""
    records, models = tmp_path / "records.jsonl", []

    def measure(trainer):
        assert all(model() is None for model in models)
        models.append(weakref.ref(trainer.model))
        return {"seen": len(models)}

    trials = read_sweep(sweep_file)[:3]
    assert [record["seen"] for record in run_sweep(trials, records, measure)] == [1, 2, 3]
    older = read_records(records)
    for record in older:
        del record["resolved"]["stream_retries"]
    records.write_text("".join(json.dumps(record) + "\n" for record in older))
    run_sweep(trials, records, measure)
    assert len(models) == 3
    older[0]["resolved"]["learning_rate"] = 0.5  # another trial
    records.write_text("".join(json.dumps(record) + "\n" for record in older))
    run_sweep(trials, records, measure)
    assert len(models) == 4


def test_a_trial_that_diverges_is_recorded(sweep_file, tmp_path):
    sweep_file.write_text(sweep_file.read_text().replace("k: [2, 4]", "k: 2, learning-rate: 1e30, max-grad-norm: 0"))
    trials = read_sweep(sweep_file)[:1]
    (record,) = run_sweep(trials, tmp_path / "records.jsonl")
    assert "not finite" in record["error"] and "metrics" not in record
    assert "| not finite |" in format_sweep([record])
    plot_frontier([record], tmp_path / "frontier.png")


def test_remembered_activations_are_those_that_were_read(tiny_gpt2):
    model, _ = load_language_model(tiny_gpt2)
    plain, remembering = Harvester(model), Harvester(model)
    remember(remembering)
    ones = torch.ones(2, 5, dtype=torch.int64)
    for counted in (ones.bool(), torch.tensor([[False, True, True, True, False]] * 2)):
        batch = {"input_ids": ones, "attention_mask": ones, "counted": counted, "documents": 0 * ones}
        for _ in range(2):
            for found, expected in zip(remembering.harvest(batch), plain.harvest(batch), strict=True):
                assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("k: [2, 4]", "k: [2, 400]", None),  # found when the configuration is built
        ("k: [2, 4]", "kk: [2, 4]", "group k: .*kk.*k"),
        ("k: [2, 4]", "learning-rate: [1e-3, fast]", "group k: .*--learning-rate.*'fast'"),
        ("num_features: 48", "num_features: 0.5", "num_features"),
        ("groups:", "grid:", "base and groups"),
        ("base:", "base: {", "not valid YAML"),
    ],
)
def test_wrong_sweeps_are_refused_in_one_line(sweep_file, tmp_path, capsys, old, new, message):
    sweep_file.write_text(sweep_file.read_text().replace(old, new))
    records = tmp_path / "records.jsonl"
    if message is not None:
        with pytest.raises(ValueError, match=message):
            read_sweep(sweep_file)
    assert sweep.main([str(sweep_file), "--records", str(records)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not records.exists()  # before any trial ran


def test_groups_that_are_not_there_are_refused(sweep_file, tmp_path, capsys):
    assert sweep.main([str(sweep_file), "--records", str(tmp_path / "r"), "--groups", "k", "q"]) == 2
    assert "groups='q'" in capsys.readouterr().err
    assert sweep.main([str(sweep_file)]) == 2
    assert "--records" in capsys.readouterr().err


@pytest.mark.parametrize("read", [read_sweep, read_plan])
def test_a_file_that_is_not_there_is_named(read, tmp_path):
    with pytest.raises(ValueError, match="is no file; give a YAML file such as benchmarks"):
        read(tmp_path / "none.yaml")
