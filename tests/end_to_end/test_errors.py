"""Bad input: exit status 2 and one line that names it, before any long work, and nothing written or lost."""

import errno
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.harvest.tokens import TokenStream
from hf_clt.training import checkpoints


SCRIPT = Path(__file__).parents[2] / "scripts" / "train_clt.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("train_clt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def run(main, tiny_gpt2, small_text_file, tmp_path, capfd, fresh_accelerate, monkeypatch):
    """Runs the script with options that work and those given, and returns its status and standard error."""
    monkeypatch.delenv("HF_CLT_DEBUG", raising=False)

    def run(*options):
        options = [str(option) for option in options]
        defaults = {
            "--model": tiny_gpt2,
            "--dataset": small_text_file,
            "--num-features": "32",
            "--context-size": "32",
            "--store-batch-size-prompts": "4",
            "--n-batches-in-buffer": "4",
            "--batch-size": "64",
            "--training-steps": "2",
            "--eval-tokens": "200",
            "--output-dir": str(tmp_path / "run"),
        }
        argv = [word for pair in defaults.items() if pair[0] not in options for word in pair]
        capfd.readouterr()
        status = main([*argv, *options])
        return status, capfd.readouterr().err

    return run


def assert_refused(outcome, *expected, started=False):
    status, stderr = outcome
    assert status == 2, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    for text in expected:
        assert text in lines[0]
    assert "Traceback" not in stderr
    if not started:
        assert "Estimating statistics" not in stderr
        assert "Filling the buffer" not in stderr


def test_the_options_that_the_other_tests_spoil_work(run, tmp_path):
    status, stderr = run()
    assert status == 0, stderr
    assert (tmp_path / "run" / "config.json").is_file()


@pytest.mark.parametrize(
    "options, expected",
    [
        # what there is not
        (["--model", "no-such-user/no-such-model"], ["no-such-user/no-such-model"]),
        (["--model", "./no/such/folder"], ["./no/such/folder"]),
        (["--dataset", "no-such-user/no-such-text"], ["no-such-user/no-such-text"]),
        (["--dataset", "./no/such/text.txt"], ["./no/such/text.txt", "no such file"]),
        (["--dataset-split", "validation"], ["validation", "'train'"]),
        (["--dataset-text-column", "content"], ["'content'", "text"]),
        (["--feature-input-hook", "hook_attn_out"], ["feature_input_hook", "hook_attn_out", "hook_resid_mid"]),
        (["--feature-output-hook", "mlp.hook_in"], ["feature_output_hook", "mlp.hook_in", "hook_mlp_out"]),
        (["--init-from", "./no/such/clt"], ["./no/such/clt"]),
        (["--resume-from-checkpoint", "latest"], ["resume_from_checkpoint='latest'", "holds no checkpoint"]),
        (["--resume-from-checkpoint", "./checkpoint-9"], ["./checkpoint-9", "no checkpoint folder"]),
        (["--normalization-method", "mean_std", "--normalization-file", "no.safetensors"], ["no.safetensors"]),
        (["--num-featurs", "64"], ["--num-featurs", "--num-features"]),
        # what does not fit
        (["--context-size", "129"], ["context_size", "129", "128"]),
        (["--num-layers", "3"], ["num_layers=3", "2"]),
        (["--d-model", "32"], ["d_model=32", "64"]),
        (["--activation-fn", "topk", "--k", "33"], ["k=33", "num_features=32"]),
        (["--activation-fn", "batchtopk", "--k", "0"], ["k=0"]),
        (["--decoder-reach", "3"], ["decoder_reach=3", "num_layers=2"]),
        (["--batch-size", "497"], ["batch_size=497", "496", "n_batches_in_buffer"]),
        (["--eval-tokens", "100000"], ["eval_tokens", "100000"]),
        (["--eval-tokens", "1640"], ["eval_tokens", "1640"]),
        (["--prepend-bos", "perhaps"], ["prepend_bos", "perhaps"]),
        # numbers out of range
        (["--sparsity-lambda", "-1"], ["sparsity_lambda=-1"]),
        (["--preactivation-coef", "-1e-6"], ["preactivation_coef=-1e-06"]),
        (["--aux-coef", "-0.5"], ["aux_coef=-0.5"]),
        (["--jumprelu-threshold", "-0.03"], ["jumprelu_threshold=-0.03"]),
        (["--jumprelu-bandwidth", "0"], ["jumprelu_bandwidth=0"]),
        (["--sparsity-c", "0"], ["sparsity_c=0"]),
        (["--learning-rate", "-1e-3"], ["learning_rate=-0.001"]),
        (["--training-steps", "0"], ["training_steps=0"]),
        (["--num-features", "0"], ["num_features=0"]),
        (["--weight-decay", "-1"], ["weight_decay=-1"]),
        (["--activation-fn", "gelu"], ["activation_fn", "gelu", "jumprelu"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_options(run, tmp_path, options, expected):
    assert_refused(run(*options), *expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, content", [("empty.txt", ""), ("blank.txt", "\n\n \n\n"), ("empty.jsonl", "")])
def test_an_empty_text(run, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert_refused(run("--dataset", tmp_path / name), name if content == "" else "text")


def test_too_little_text(run, tmp_path):
    (tmp_path / "short.txt").write_text("A few words are not enough.")
    assert_refused(run("--dataset", tmp_path / "short.txt"), "eval_tokens", "200", "too small")


def test_a_folder_with_a_run_and_one_that_is_a_file(run, tmp_path):
    assert run()[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert_refused(run(), "output_dir=", "already holds a run", "--resume-from-checkpoint", "--overwrite-output-dir")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert run("--overwrite-output-dir")[0] == 0
    (tmp_path / "file").write_text("mine")
    assert_refused(run("--output-dir", tmp_path / "file"), "output_dir=", "is a file")
    assert (tmp_path / "file").read_text() == "mine"


def save_clt(folder, **config):
    torch.manual_seed(0)
    clt = CrossLayerTranscoder(CLTConfig(**({"num_layers": 2, "d_model": 64, "num_features": 32} | config)))
    clt.save_pretrained(folder)


@pytest.mark.parametrize("config, expected", [({"num_layers": 3}, "num_layers=3"), ({"d_model": 48}, "d_model=48")])
def test_a_clt_of_another_model(run, tmp_path, config, expected):
    save_clt(tmp_path / "clt", **config)
    assert_refused(run_going_on(run, tmp_path / "clt"), expected, "does not fit")


def run_going_on(run, folder):
    """From a CLT, whose shape needs no options."""
    return run("--init-from", folder, "--num-features", "32")


@pytest.mark.parametrize("name", ["W_enc_1.safetensors", "W_dec_0.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_clt(run, tmp_path, name, damage):
    save_clt(tmp_path / "clt")
    path = tmp_path / "clt" / name
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(content[:-100] if damage == "truncated" else b"")
    assert_refused(run_going_on(run, tmp_path / "clt"), name)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rank-0.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint(run, tmp_path, name, damage):
    assert run("--checkpoint-interval", "1")[0] == 0
    path = tmp_path / "run" / "checkpoint-1" / name
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(content[:-100])
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert_refused(run("--resume-from-checkpoint", "latest"), "checkpoint-1", name)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("damage", ["shape", "truncated", "nan"])
def test_damaged_statistics(run, tmp_path, damage):
    path = tmp_path / "statistics.safetensors"
    shape = (2, 63) if damage == "shape" else (2, 64)
    statistics = {name: torch.ones(shape) for name in ("mean_in", "std_in", "mean_out", "std_out")}
    if damage == "nan":
        statistics["mean_out"][1, 3] = torch.nan
    save_file(statistics, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    expected = {"shape": "mean_in", "truncated": "statistics.safetensors", "nan": "mean_out"}[damage]
    assert_refused(run("--normalization-method", "mean_std", "--normalization-file", path), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite(run, tmp_path, tiny_gpt2, value):
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[3] = value
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "broken")
    outcome = run("--model", tmp_path / "broken")
    assert_refused(outcome, "not finite", "layer 1", "hook_mlp_out", "document", started=True)


@pytest.mark.parametrize("damage", ["missing", "truncated", "incomplete"])
def test_a_damaged_language_model(run, tmp_path, tiny_gpt2, damage):
    shutil.copytree(tiny_gpt2, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        tensors = load_file(path)
        del tensors["transformer.h.1.mlp.c_fc.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
    assert_refused(run("--model", tmp_path / "broken"), str(tmp_path / "broken"))


def test_ctrl_c_before_training_says_so(run, tmp_path, monkeypatch):
    """Nothing has been trained yet: no checkpoint, no traceback, and no advice to go on from one."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_clt.training.preparation.estimate_statistics", stop)
    status, stderr = run()
    assert status == 130
    assert stderr.splitlines()[-1] == "interrupted"


def test_text_that_breaks_off_for_good(run, monkeypatch):
    """One line that says how to go on, and doing so works."""
    calls, next_batch = [], TokenStream._next_batch

    def fail(stream):
        calls.append(stream.heldout)
        if calls.count(False) >= 14:  # 4 for the statistics, 4 for the first fill
            raise ConnectionError("no route to host")
        return next_batch(stream)

    options = ("--normalization-estimation-batches", "4", "--training-steps", "20")
    with monkeypatch.context() as broken:
        broken.setattr(TokenStream, "_next_batch", fail)
        outcome = run("--stream-retries", "3", *options)
    expected = ("the text cannot be read, with stream_retries=3 (ConnectionError: no route to host); checkpoint-",)
    expected += (" is whole: continue with --resume-from-checkpoint latest",)
    assert_refused(outcome, *expected, started=True)
    assert run("--resume-from-checkpoint", "latest", *options)[0] == 0


def test_a_full_disk(run, tmp_path, monkeypatch):
    write = checkpoints._write_tensors

    def full(path, tensors):
        if "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    with monkeypatch.context() as broken:
        broken.setattr(checkpoints, "_write_tensors", full)
        outcome = run("--checkpoint-interval", "1", "--training-steps", "4")
    expected = (f"checkpoint-2 cannot be written to '{tmp_path / 'run'}' (No space left on device)",)
    assert_refused(outcome, *expected, "checkpoint-1 is whole: continue with --resume", started=True)
    assert run("--resume-from-checkpoint", "latest", "--training-steps", "4")[0] == 0
