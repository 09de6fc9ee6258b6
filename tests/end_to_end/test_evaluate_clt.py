"""`hf-clt evaluate`, `hf-clt finish` and `hf-clt jumprelu` on a CLT that the trainer made."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.commands import evaluate as evaluate_clt
from hf_clt.commands import finish
from hf_clt.commands import jumprelu as to_jumprelu
from hf_clt.commands import train as train_clt
from hf_clt.hub.card import card_from_folder
from hf_clt.hub.facts import read_facts


@pytest.fixture(scope="module")
def run(tiny_gpt2, text_file, tmp_path_factory):
    """The folder of a finished run, and the metrics that it measured at its end."""

    def reset():  # Accelerate keeps one state per process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    folder = tmp_path_factory.mktemp("run") / "clt"
    args = CLTTrainingArguments(
        model=tiny_gpt2,
        dataset=text_file,
        context_size=32,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        batch_size=128,
        eval_tokens=1000,
        training_steps=120,
        learning_rate=3e-3,
        log_interval=20,
        eval_interval=0,
        checkpoint_interval=0,
        disable_progress_bar=True,
        output_dir=str(folder),
        device="cpu",
    )
    config = CLTConfig(num_layers=2, d_model=64, num_features=128, activation_fn="batchtopk", k=8)
    trainer = CLTTrainer(args, config)
    trainer.train()
    metrics = trainer.evaluate()
    reset()
    return folder, metrics


@pytest.fixture
def options(text_file):
    """Those with which the run was evaluated."""
    text = ["--dataset", text_file, "--context-size", "32", "--eval-tokens", "1000"]
    return [*text, "--device", "cpu", "--disable-progress-bar"]


def test_measures_what_the_training_run_measured(run, options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, expected = run
    file, plots = tmp_path / "metrics.json", tmp_path / "plots"
    argv = [str(folder), *options, "--batch-size", "77", "--json", str(file), "--plots", str(plots)]
    assert evaluate_clt.main(argv) == 0
    out = capsys.readouterr().out
    metrics = json.loads(file.read_text(encoding="utf-8"))
    assert metrics["num_tokens"] == expected["num_tokens"]
    for name in ("nmse", "explained_variance", "l0", "dead_fraction"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
        assert metrics[f"{name}_per_layer"] == pytest.approx(expected[f"{name}_per_layer"], rel=1e-4)
    assert len(metrics["feature_density"]["counts"]) == 40
    settings = metrics["settings"]
    assert settings["clt"] == str(folder) and settings["eval_tokens"] == 1000 and settings["context_size"] == 32
    assert settings["model"] == CrossLayerTranscoder.from_pretrained(folder).config.base_model_name_or_path
    for text in ("batchtopk CLT of", "2 layers, width 64, 128 features", f"{metrics['nmse']:.4f}", str(file)):
        assert text in out
    names = {path.name for path in plots.iterdir()}
    assert names == {"training_curves.png", "metrics_per_layer.png", "feature_density.png"}


def test_with_the_replacement_model(run, options, tmp_path, capsys):
    file = tmp_path / "metrics.json"
    assert evaluate_clt.main([str(run[0]), *options, "--replacement", "--json", str(file)]) == 0
    metrics = json.loads(file.read_text(encoding="utf-8"))
    out = capsys.readouterr().out
    assert f"recovered {metrics['ce_recovered']:.1%}" in out
    assert 0 < metrics["num_predictions"] <= metrics["num_tokens"]
    assert metrics["kl"] > 0 and 0 <= metrics["top1_agreement"] <= 1


def test_the_card_is_updated(run, options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "clt"
    shutil.copytree(run[0], folder)
    before = (folder / "README.md").read_text(encoding="utf-8")
    assert evaluate_clt.main([str(folder), *options, "--replacement", "--update-card"]) == 0
    assert f"The card is {folder / 'README.md'}" in capsys.readouterr().out
    card = (folder / "README.md").read_text(encoding="utf-8")
    facts = read_facts(folder)
    assert f"| kl | {facts['metrics']['kl']:.4f} |" in card and "| kl |" not in before
    assert f"the {facts['metrics']['num_predictions']:,} next-token predictions" in card
    assert card.split("## Training")[1].split("##")[0] == before.split("## Training")[1].split("##")[0]
    assert facts["evaluation"]["dataset"] == "topics.txt" and "clt" not in facts["evaluation"]
    assert card == card_from_folder(folder)
    # what training was on is not held out
    assert evaluate_clt.main([str(folder), *options, "--eval-tokens", "1001", "--update-card"]) == 2
    assert "eval_tokens=1001, but training held out 1000 tokens" in capsys.readouterr().err
    assert evaluate_clt.main(["user/clt", *options, "--update-card"]) == 2
    assert "update_card: 'user/clt'" in capsys.readouterr().err
    assert (folder / "README.md").read_text(encoding="utf-8") == card


def test_finish_predicts_more_like_the_language_model_with_the_same_features(run, options, tmp_path, capsys):
    folder, original = run
    output, file = tmp_path / "finished", tmp_path / "metrics.json"
    assert finish.main([str(folder), str(output), *options, "--steps", "20", "--learning-rate", "3e-3"]) == 0
    out = capsys.readouterr().out
    before, after = (CrossLayerTranscoder.from_pretrained(path) for path in (folder, output))
    inputs = torch.randn(50, 2, 64)
    torch.testing.assert_close(before.eval().encode(inputs), after.eval().encode(inputs), rtol=1e-4, atol=1e-4)

    for path in (folder, output):
        assert evaluate_clt.main([str(path), *options, "--replacement", "--json", str(file)]) == 0
        metrics = json.loads(file.read_text(encoding="utf-8"))
        for name, form in (("nmse", ".4f"), ("kl", ".4f"), ("ce_recovered", ".1%")):
            assert f"{metrics[name]:{form}}" in out, name
        if path == folder:
            kl, nmse = metrics["kl"], metrics["nmse"]
            assert nmse == pytest.approx(original["nmse"], rel=1e-4)
    assert metrics["kl"] < 0.95 * kl
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "hf-clt finish" in card and f"NMSE was {nmse:.4f}" in card
    assert read_facts(output)["training"] == read_facts(folder)["training"]
    assert read_facts(output)["history"] == read_facts(folder)["history"]

    capsys.readouterr()
    for words, error in (
        ([], "--overwrite"),
        (["--overwrite", "--steps", "0"], "steps=0 "),
        (["--overwrite", "--learning-rate", "-1"], "learning_rate=-1.0 "),
    ):
        assert finish.main([str(folder), str(output), *options, *words]) == 2
        assert error in capsys.readouterr().err


def test_to_jumprelu_writes_a_clt_that_is_as_active_and_as_good(run, options, tmp_path, capsys):
    folder, original = run
    output, file = tmp_path / "jumprelu", tmp_path / "metrics.json"
    assert to_jumprelu.main([str(folder), str(output), *options]) == 0
    out = capsys.readouterr().out
    assert "L0: within 1% in every layer" in out
    assert "NMSE: within 2% of the original" in out
    assert f"{original['nmse']:.4f}" in out
    clt = CrossLayerTranscoder.from_pretrained(output)
    assert clt.config.activation_fn == "jumprelu"
    assert [threshold().unique().numel() for threshold in clt.thresholds] == [1, 1]
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "hf-clt jumprelu" in card and f"{original['num_tokens']:,} held-out tokens" in card
    assert "Made from the batchtopk CLT" in card and "threshold per layer" in card

    assert evaluate_clt.main([str(output), *options, "--json", str(file)]) == 0
    metrics = json.loads(file.read_text(encoding="utf-8"))
    assert metrics["l0_per_layer"] == pytest.approx(original["l0_per_layer"], rel=0.01)
    assert metrics["nmse"] <= original["nmse"] * 1.02
    assert f"{metrics['nmse']:.4f}" in out

    capsys.readouterr()
    assert to_jumprelu.main([str(folder), str(output), *options]) == 2  # it is there already
    assert "--overwrite" in capsys.readouterr().err
    assert to_jumprelu.main([str(output), str(tmp_path / "again"), *options]) == 2
    assert "only topk and batchtopk" in capsys.readouterr().err


def test_to_jumprelu_fails_where_l0_is_not_met(run, options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_clt.evaluation.calibration.L0_TOLERANCE", -1.0)
    assert to_jumprelu.main([str(run[0]), str(tmp_path / "jumprelu"), *options]) == 1
    assert "L0: NOT within" in capsys.readouterr().out


@pytest.mark.slow
def test_from_topk_to_jumprelu_with_further_updates(tiny_gpt2, options, tmp_path, capsys):
    """Thresholds alone cost a topk CLT quality; the remedy that the script names gives it back."""

    def nmse(folder):
        assert evaluate_clt.main([str(folder), *options, "--json", str(tmp_path / "metrics.json")]) == 0
        return json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["nmse"]

    topk, first, tuned, last = (tmp_path / name for name in ("topk", "first", "tuned", "last"))
    common = ["--store-batch-size-prompts", "4", "--n-batches-in-buffer", "8", "--batch-size", "128"]
    common += ["--eval-interval", "0", "--checkpoint-interval", "0", *options]
    new = ["--model", tiny_gpt2, "--num-features", "128", "--activation-fn", "topk", "--k", "8"]
    new += ["--learning-rate", "3e-3", "--training-steps", "120", "--output-dir", str(topk)]
    assert train_clt.main([*new, *common]) == 0
    capsys.readouterr()
    assert to_jumprelu.main([str(topk), str(first), *options]) == 0
    out = capsys.readouterr().out
    assert "NMSE: NOT within 2% of the original" in out
    assert "--init-from CLT --activation-fn batchtopk" in out
    further = ["--init-from", str(first), "--activation-fn", "batchtopk", "--output-dir", str(tuned)]
    assert train_clt.main([*further, "--learning-rate", "2e-3", "--training-steps", "120", *common]) == 0
    assert CrossLayerTranscoder.from_pretrained(tuned).config.k == 8
    assert to_jumprelu.main([str(tuned), str(last), *options]) == 0
    assert nmse(last) <= nmse(topk) * 1.02 < nmse(first)


@pytest.mark.parametrize(
    "changed, expected",
    [
        (["--dataset", "./no/such/text.txt"], ["./no/such/text.txt", "no such file"]),
        (["--model", "./no/such/model"], ["./no/such/model"]),
        (["--eval-tokens", "0"], ["eval_tokens=0"]),
        (["--eval-tokens", "10000000"], ["eval_tokens", "10000000"]),
        (["--eval-tokens", "many"], ["--eval-tokens", "many"]),
        (["--batch-size", "0"], ["batch_size=0"]),
        (["--context-size", "129"], ["context_size", "129", "128"]),
        (["--device", "gpu"], ["device='gpu'"]),
        (["--model-dtype", "int8"], ["--model-dtype", "int8"]),
        (["--json", "no/such/folder/metrics.json"], ["no/such/folder"]),
        (["--batchsize", "3"], ["--batchsize"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_wrong_options_give_one_line(run, options, changed, expected, capsys):
    assert evaluate_clt.main([str(run[0]), *options, *changed]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for text in expected:
        assert text in lines[0]


def test_a_clt_that_is_not_there_or_does_not_fit(run, options, tmp_path, capsys):
    assert evaluate_clt.main([str(tmp_path / "nothing"), *options]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=64, num_features=8)).save_pretrained(tmp_path / "nameless")
    assert evaluate_clt.main([str(tmp_path / "nameless"), *options]) == 2
    assert "model is missing" in capsys.readouterr().err
    base = CrossLayerTranscoder.from_pretrained(run[0]).config.base_model_name_or_path
    config = CLTConfig(num_layers=3, d_model=64, num_features=8, base_model_name_or_path=base)
    CrossLayerTranscoder(config).save_pretrained(tmp_path / "larger")
    assert evaluate_clt.main([str(tmp_path / "larger"), *options]) == 2
    assert "num_layers=3 does not fit" in capsys.readouterr().err


def test_a_folder_without_a_history_has_plots_too(run, options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "clt"
    shutil.copytree(run[0], folder)
    (folder / "metrics.jsonl").unlink()
    assert evaluate_clt.main([str(folder), *options, "--plots", str(tmp_path / "plots")]) == 0
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"metrics_per_layer.png", "feature_density.png"}
