"""
What each process of a run takes, in several layouts: one process, two that average their gradients, two that share
the features. The trainer itself, on an activation cache, so that no language model is in the figures.

`python -m benchmarks.layouts JOB RESULT` is one process of a run: it reads the job from a JSON file and writes
`RESULT-<rank>.json`.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from hf_clt.configuration_clt import CLTConfig
from hf_clt.estimate import Plan, memory
from hf_clt.training.arguments import CLTTrainingArguments

from .machine import memory_in_use, peak_memory, reset_peak_memory
from .measure import TimedTrainer


LAYOUTS = {
    "1 process": (1, 1),
    "2 processes, data-parallel": (2, 1),
    "2 processes, features shared": (2, 2),
}
WARMUP = 3  # updates that are not timed


def measure_run(job: dict) -> dict:
    """
    Trains, in this process and those that were started with it.

    Args:
        job: `arguments` of [`CLTTrainingArguments`] and `config` of [`CLTConfig`].

    Returns:
        `dict` of this process: `step_seconds`, the median time of an update without the time that its batch took;
        `update_seconds`, with it; `peak_bytes` beyond what the imports take; `parameter_bytes`.
    """
    args = CLTTrainingArguments(**job["arguments"])
    device = torch.device(args.device)
    before = memory_in_use(device)
    reset_peak_memory(device)
    trainer = TimedTrainer(args, CLTConfig(**job["config"]))
    endless, marks = trainer.buffer.endless, []

    def mark():
        trainer._read_clocks()  # else it does so when it logs
        marks.append((time.perf_counter(), trainer.seconds["clt"]))

    def mark_batches():
        for batch in endless():
            mark()
            yield batch

    trainer.buffer.endless = mark_batches
    trainer.train()
    mark()
    walls, steps = (
        [b - a for a, b in zip(c[WARMUP:], c[WARMUP + 1 :], strict=False)] for c in zip(*marks, strict=True)
    )
    peak = peak_memory(device)
    return {
        "step_seconds": median(steps),
        "update_seconds": median(walls),
        "peak_bytes": None if peak is None else peak - before,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
    }


def run_layout(cache: str, config: dict, tokens: int, updates: int, processes: int, shared: int, cores: int) -> dict:
    """
    Measures one layout.

    Args:
        cache: Folder of an activation cache.
        config: Fields of [`CLTConfig`].
        tokens: Tokens per update, over all processes.
        updates: How many, [`WARMUP`] of them not timed.
        processes, shared: How many processes, and over how many of them the features are spread.
        cores: Threads over all processes.

    Returns:
        `dict`: `processes` (what [`measure_run`] found in each) and `estimated_bytes` of each.

    Raises:
        RuntimeError: If a process fails; its own words are on stderr.
    """
    with TemporaryDirectory() as folder:
        arguments = {
            "activation_cache": cache,
            "output_dir": str(Path(folder, "run")),
            "batch_size": tokens // processes,
            "n_batches_in_buffer": 4,
            "feature_parallel_size": shared,
            "training_steps": updates,
            "normalization_method": "none",
            "eval_tokens": 0,
            "checkpoint_interval": 0,
            "log_interval": updates,
            "device": "cpu",
            "disable_progress_bar": True,
        }
        job, result = Path(folder, "job.json"), Path(folder, "result")
        job.write_text(json.dumps({"arguments": arguments, "config": config}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "benchmarks.layouts", str(job), str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(cores // processes), "ACCELERATE_USE_CPU": "true"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        status = subprocess.run(command, stdout=sys.stderr, env=environment).returncode
        if status:
            raise RuntimeError(f"a run of {processes} processes ended with status {status}")
        found = [json.loads(Path(f"{result}-{rank}.json").read_text()) for rank in range(processes)]
        manifest = json.loads(Path(cache, "manifest.json").read_text(encoding="utf-8"))
    clt = CLTConfig(**config)
    plan = Plan(
        clt,
        processes=processes,
        feature_parallel_size=shared,
        batch_size=tokens // processes,
        l0=clt.k,
        context_size=manifest["context_size"],
        prompts=manifest["store_batch_size_prompts"],
        buffer_batches=arguments["n_batches_in_buffer"],
    )
    return {"processes": found, "estimated_bytes": memory(plan)["total"]}


def format_layouts(rows: dict[str, dict]) -> str:
    """The layouts as a Markdown table; ratios are to the first."""
    lines = ["| | weights of each | peak memory of each | estimated | a step | ratio |", "|---|---|---|---|---|---|"]
    first = next(iter(rows.values()))
    for name, row in rows.items():
        largest = {key: max(p[key] for p in row["processes"]) for key in ("step_seconds", "parameter_bytes")}
        peaks = [p["peak_bytes"] for p in row["processes"]]
        peak = "" if None in peaks else f"{max(peaks) / 1e9:.2f} GB"
        ratio = largest["step_seconds"] / max(p["step_seconds"] for p in first["processes"])
        cells = [name, f"{largest['parameter_bytes'] / 1e9:.2f} GB", peak, f"{row['estimated_bytes'] / 1e9:.2f} GB"]
        cells += [f"{largest['step_seconds'] * 1000:,.0f} ms", f"{ratio:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="JSON file with the arguments and the CLT of the run")
    parser.add_argument("result", help="beginning of the name of the JSON file that it writes")
    options = parser.parse_args(argv)
    found = measure_run(json.loads(options.job.read_text()))
    rank = os.environ.get("RANK", "0")
    Path(f"{options.result}-{rank}.json").write_text(json.dumps(found))
    gc.collect()  # a group lives while a DistributedDataParallel refers to it
    if dist.is_initialized():
        dist.destroy_process_group()  # its threads can abort the process while the interpreter exits
    return 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["LAYOUTS", "format_layouts", "measure_run", "run_layout"]
