"""The reference trainer's own command lines on a tiny model, and Ctrl-C."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder


ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "train_clt.py")]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def environment():
    # A run that reported to wandb in this process may have left its settings.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**inherited, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_the_command_line_with_relu(tiny_gpt2, text_file, tmp_path):
    pytest.importorskip("wandb")
    options = f"""
        --model {tiny_gpt2} --num-features 12288 --activation-fn relu
        --dataset {text_file} --dataset-split train --dataset-text-column text
        --context-size 128 --exclude-special-tokens --store-batch-size-prompts 128 --batch-size 32
        --n-batches-in-buffer 4 --normalization-method estimated_mean_std --normalization-estimation-batches 10
        --learning-rate 1e-4 --training-steps 12 --sparsity-lambda 30 --log-interval 10 --eval-interval 10
        --dead-feature-window 500 --enable-wandb --wandb-project clt-training
    """
    done = subprocess.run(
        [*SCRIPT, *options.split()], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "clt_output"  # the default
    assert [(row["step"], row["split"]) for row in rows_of(folder)] == [
        (1, "train"),
        (10, "train"),
        (10, "heldout"),
        (12, "train"),
        (12, "heldout"),
    ]
    assert rows_of(folder)[-2]["tokens"] == 12 * 32
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    clt = CrossLayerTranscoder.from_pretrained(folder)
    config = clt.config
    assert (config.num_layers, config.d_model, config.num_features) == (2, 64, 12288)
    assert (config.activation_fn, config.sparsity_lambda) == ("relu", 30)
    assert config.base_model_name_or_path == tiny_gpt2
    assert load_file(folder / "W_dec_0.safetensors")["W_dec_0"].shape == (12288, 2, 64)
    # At the end: the table per layer, and where the result is.
    metrics = rows_of(folder)[-1]
    assert f"{metrics['nmse']:.4f}" in done.stdout
    assert "The CLT is in clt_output" in done.stdout
    assert (folder / "README.md").read_text(encoding="utf-8").count("--sparsity-lambda 30") == 1


@pytest.mark.slow
def test_the_program_with_jumprelu(tiny_gpt2, text_file, tmp_path, fresh_accelerate):
    args = CLTTrainingArguments(
        model=tiny_gpt2,
        dataset=text_file,
        streaming=True,
        context_size=128,
        prepend_bos=True,
        batch_size=8,
        store_batch_size_prompts=128,
        n_batches_in_buffer=16,
        normalization_method="estimated_mean_std",
        normalization_estimation_batches=50,
        learning_rate=3e-4,
        training_steps=20,
        log_interval=5,
        eval_interval=10,
        checkpoint_interval=10,
        output_dir=str(tmp_path / "run"),
    )
    config = CLTConfig(
        num_features=3072,
        num_layers=2,
        d_model=64,
        activation_fn="jumprelu",
        jumprelu_threshold=0.03,
        sparsity_lambda=1e-3,
        sparsity_c=1.0,
        preactivation_coef=3e-6,
    )
    trainer = CLTTrainer(args, config)
    clt = trainer.train()
    metrics = trainer.evaluate()
    assert isinstance(clt, CrossLayerTranscoder)
    assert [row["step"] for row in rows_of(tmp_path / "run") if row["split"] == "train"] == [1, 5, 10, 15, 20]
    assert metrics["num_tokens"] >= 8192
    assert math.isfinite(metrics["nmse"]) and metrics["nmse"] < 1
    assert (tmp_path / "run" / "checkpoint-10" / "state.json").is_file()
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "run")
    assert loaded.config.jumprelu_threshold == 0.03
    assert load_file(tmp_path / "run" / "W_enc_1.safetensors")["threshold_1"].mean().item() == pytest.approx(
        0.03, rel=0.1
    )


@pytest.mark.slow  # tests/end_to_end/test_kill.py stops a run too
def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on(tiny_gpt2, text_file, tmp_path):
    folder = tmp_path / "run"
    common = f"""
        --model {tiny_gpt2} --dataset {text_file} --num-features 64 --activation-fn batchtopk --k 4 --context-size 32
        --store-batch-size-prompts 4 --n-batches-in-buffer 4 --batch-size 64 --eval-tokens 500 --log-interval 1
        --checkpoint-interval 0 --output-dir {folder} --disable-progress-bar
    """.split()
    process = subprocess.Popen(
        [*SCRIPT, *common, "--training-steps", "1000000"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(rows_of_running(folder)) < 5:
            assert process.poll() is None, process.communicate()[1][-4000:]
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, stderr[-4000:]
    (checkpoint,) = folder.glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert step >= 5
    assert f"interrupted (stopped at step {step}); continue with --resume-from-checkpoint latest" in stderr
    assert "Traceback" not in stderr
    assert not (folder / "config.json").exists()

    more = [*common, "--training-steps", str(step + 4), "--resume-from-checkpoint", "latest"]
    done = subprocess.run([*SCRIPT, *more], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = [row["step"] for row in rows_of(folder) if row["split"] == "train"]
    assert steps == list(range(1, step + 5))
    assert CrossLayerTranscoder.from_pretrained(folder).config.k == 4


def rows_of_running(folder):
    """Lines of a file that is being written."""
    return (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
