"""
One training run in many layouts, on the same token batches of a real language model: how far do they come apart? Needs
what `scripts/prepare_quickstart.py --first-layers 10` makes; from the root of the checkout, some minutes on 2 cores:

    python -m tests.trajectories docs/trajectories.md
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.commands import cache as cache_activations
from hf_clt.evaluation.evaluate import measure
from hf_clt.harvest.cache import ActivationCache
from hf_clt.training.processes import disconnect
from tests.distributed.launch import ROOT, launch


MODEL, TEXT = "quickstart/first-10-layers", "quickstart/text.jsonl"
UPDATES, TOKENS, KILLED_AFTER, CHECKPOINT = 20, 512, 13, 10
# With θ = 1 about one feature in a hundred fires from the start.
RUNS = {
    "jumprelu": {"activation_fn": "jumprelu", "jumprelu_threshold": 1.0, "sparsity_lambda": 1.0},
    "topk": {"activation_fn": "topk", "k": 16},
}
# Processes, options, and whether the run is killed with SIGKILL after its 13th update, and goes on.
LAYOUTS = {
    "the same again": (1, {}, False),
    "2 processes, data-parallel": (2, {}, False),
    "2 processes, features shared": (2, {"feature_parallel_size": 2}, False),
    "gradient accumulation over 4": (1, {"gradient_accumulation_steps": 4}, False),
    "killed and resumed": (1, {}, True),
    "features shared, killed and resumed": (2, {"feature_parallel_size": 2}, True),
}
LOSSES = ("loss", "reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss")


def write_batches(folder: Path) -> None:
    """Harvests; leaves `batches.safetensors`, `heldout.safetensors` and `statistics.safetensors`."""
    wanted = (UPDATES + 4) * TOKENS
    argv = [str(folder / "cache"), "--model", MODEL, "--dataset", TEXT, "--dtype", "float32", "--eval-tokens", "1000"]
    assert cache_activations.main([*argv, "--model-dtype", "float32", "--max-tokens", str(wanted)]) == 0
    cache = ActivationCache(folder / "cache")
    for split in ("train", "heldout"):
        parts = [cache.harvest(cache.tokens(split, i)) for i in range(len(cache.batches[split]))]
        inputs, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        save_file({"inputs": inputs, "labels": labels}, folder / f"{split}.safetensors")
        if split == "train":
            statistics = {"mean_in": inputs.mean(0), "std_in": inputs.std(0)}
            save_file(
                statistics | {"mean_out": labels.mean(0), "std_out": labels.std(0)}, folder / "statistics.safetensors"
            )


def work(folder: str, name: str, arguments: str, config: str, kill: str) -> None:
    """What each process runs: its share of every batch, in the order in which the layout puts them together."""
    args = CLTTrainingArguments(**json.loads(arguments))
    trainer = CLTTrainer(args, CLTConfig(**json.loads(config)))
    data = load_file(Path(folder, "train.safetensors"))
    rank, size = trainer.accelerator.process_index, args.batch_size
    per_update = args.gradient_accumulation_steps

    def endless():
        for step in range(trainer.step, UPDATES):
            if kill == "kill" and step == KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
            for micro_step in range(per_update):
                start = step * TOKENS + (rank * per_update + micro_step) * size
                yield {n: tensor[start : start + size] for n, tensor in data.items()}

    trainer.buffer.endless = endless
    trainer.train()


def run(folder: Path, name: str, config: dict, processes: int, options: dict, killed: bool) -> Path:
    """One layout; returns its output folder."""
    output = folder / name.replace(" ", "-")
    arguments = {
        "activation_cache": str(folder / "cache"),
        "model": MODEL,
        "dataset": TEXT,
        "output_dir": str(output),
        "normalization_method": "mean_std",
        "normalization_file": str(folder / "statistics.safetensors"),
        "initial_feature_rate": 0.0,
        "initial_weights": "random",
        "batch_size": TOKENS // processes // options.get("gradient_accumulation_steps", 1),
        "n_batches_in_buffer": 4,
        "learning_rate": 2e-3,
        "training_steps": UPDATES,
        "dead_feature_window": 5,
        "eval_tokens": 0,
        "log_interval": 1,
        "checkpoint_interval": CHECKPOINT,
        "device": "cpu",
        "disable_progress_bar": True,
        **options,
    }

    def start(**more):
        kill = "" if more or not killed else "kill"
        argv = ["work", str(folder), name, json.dumps({**arguments, **more}), json.dumps(config), kill]
        script = ROOT / "tests" / "trajectories.py"
        if processes > 1:
            launch(processes, script, *argv, timeout=900)
        else:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, str(script), *argv], env=environment, check=True)

    try:
        start()
    except (subprocess.CalledProcessError, AssertionError):
        if not killed:
            raise
        assert not (output / "config.json").exists()
        start(resume_from_checkpoint="latest")
    return output


def read_metrics(output: Path) -> list[dict]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in lines if row["split"] == "train"]


def compare(folder: Path, output: Path, single: Path) -> dict[str, float]:
    """Largest differences to the single run: parameters, losses of all updates, metrics on held-out tokens."""
    found, expected = (CrossLayerTranscoder.from_pretrained(path) for path in (output, single))
    weights = expected.state_dict()
    gaps = [(found.state_dict()[n] - w).abs().max() / w.abs().max() for n, w in weights.items() if w.abs().max() > 0]
    logged = list(zip(read_metrics(output), read_metrics(single), strict=True))
    assert len(logged) == UPDATES
    losses = max(abs(one[n] - other[n]) / abs(other[n]) for one, other in logged for n in LOSSES if other[n])
    heldout = load_file(folder / "heldout.safetensors")
    batches = [(heldout["inputs"], heldout["labels"])]
    metrics = [measure(clt, batches).compute() for clt in (found, expected)]
    differences = [abs(metrics[0][n] / metrics[1][n] - 1) for n in ("nmse", "l0")]
    same = sum(int((found.state_dict()[n] != w).sum()) for n, w in weights.items()) == 0
    return {"parameters": max(gaps).item(), "losses": losses, "metrics": max(differences), "same": same}


def main(table: str) -> None:
    lines = [
        "| run | activation | parameters | losses of all updates | NMSE and L0, held out | bit for bit |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_batches(folder)
        for activation, fields in RUNS.items():
            config = {"num_layers": 10, "d_model": 576, "num_features": 1024, **fields}
            single = run(folder, f"{activation} single", config, 1, {}, False)
            for layout, (processes, options, killed) in LAYOUTS.items():
                output = run(folder, f"{activation} {layout}", config, processes, options, killed)
                gap = compare(folder, output, single)
                figures = [f"{gap[n]:.0e}" if gap[n] else "0" for n in ("parameters", "losses", "metrics")]
                lines.append(f"| {layout} | {activation} | {' | '.join(figures)} | {'yes' if gap['same'] else ''} |")
                print(lines[-1], flush=True)
    Path(table).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(*sys.argv[2:])
        disconnect()
    else:
        main(sys.argv[1])
