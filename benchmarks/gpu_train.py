"""
How fast hf_clt trains on a real language model on this GPU, and what comes of it: `make gpu-train`.

First short probes: small and large extraction batches, harvesting ahead or not. Then a CLT is trained with the rest of
the minutes as the fastest probe was, evaluated on held-out text, and released to --output, without checkpoints.
"""

import argparse
import math
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from statistics import mean
from tempfile import TemporaryDirectory

import torch

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments
from hf_clt.command import one_line_errors
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.hub.report import read_history

from .gpu_report import Report, add_options, device_of, make_profiler, print_kernels, profile_figures
from .machine import peak_memory, reset_peak_memory, synchronize


PROBES = [(256, False), (8, False), (256, True)]  # prompts per extraction batch, overlap_harvest; the usual first
PROBE_SECONDS = 30
AFTERWARDS = 45  # seconds for filling the buffer, evaluation and release
SHOWN = ("nmse", "explained_variance", "l0", "dead_fraction", "ce_recovered", "kl", "top1_agreement")
TINY = {"num_features": 64, "k": 4, "batch_size": 64, "context_size": 32, "probe_updates": 12, "eval_tokens": 512}


class Load(threading.Thread):
    """The GPU's load in percent, as NVML tells it ten times a second; none where it tells nothing."""

    def __init__(self):
        super().__init__(daemon=True)
        self.found, self.stopped = [], threading.Event()

    def run(self):
        with suppress(Exception):  # a figure less, no reason to fail
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            while not self.stopped.wait(0.1):
                self.found.append((time.perf_counter(), pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))

    def between(self, start: float, end: float) -> float | None:
        loads = [load for moment, load in self.found if start <= moment <= end]
        return mean(loads) if loads else None


class MeasuredTrainer(CLTTrainer):
    """Notes when the updates of `window` begin. A probe profiles from the second of them on, and writes no release."""

    window, profiler = (0, 0), None

    def _update(self, *arguments):
        device = self.accelerator.device
        if self.step in self.window:
            synchronize(device)
            self.moments.append(time.perf_counter())
            if self.profiler is not None and self.step == self.window[1]:
                self.profiler.start()
        result = super()._update(*arguments)
        if self.profiler is not None and self.step == self.args.training_steps:
            synchronize(device)
            self.profiler.stop()
        return result

    def _release(self):
        if self.profiler is None:
            super()._release()


def run(
    rows: list, options, language_model: tuple, prompts: int, overlap: bool, updates: int, output: str, probe: bool
):
    """Trains, and appends what it took: tokens per second and load over most of the run, and a probe's profile."""
    (model, tokenizer), device = language_model, torch.device(options.device)
    reset_peak_memory(device)
    harvester, tiny = Harvester(model), options.tiny
    held = (8 if tiny else 512) * (1 if probe else 3)  # prompts in the buffer, which is refilled when it is half read
    args = CLTTrainingArguments(
        model=options.model, dataset=options.dataset, device=options.device, output_dir=output,
        batch_size=options.batch_size, context_size=options.context_size, store_batch_size_prompts=prompts,
        n_batches_in_buffer=max(2, held // prompts), normalization_estimation_batches=max(1, 256 // prompts),
        buffer_dtype="bfloat16", clt_dtype="float32", mixed_precision="bf16", optimizer="adam",
        overlap_harvest=overlap, learning_rate=options.learning_rate, training_steps=updates, log_interval=100,
        eval_tokens=0 if probe else options.eval_tokens, eval_interval=0, eval_replacement=not probe,
        dead_feature_window=500, checkpoint_interval=0, overwrite_output_dir=True, disable_progress_bar=True,
    )  # fmt: skip
    config = CLTConfig(
        num_layers=harvester.num_layers, d_model=harvester.d_model, num_features=options.num_features, k=options.k,
        activation_fn="batchtopk",
    )  # fmt: skip
    trainer = MeasuredTrainer(args, config, harvester=harvester, tokenizer=tokenizer)
    trainer.moments = []
    # Whole rounds: from one refill of the buffer to the next.
    half = args.n_batches_in_buffer * prompts * (options.context_size - 1) / 2
    cycle = math.ceil(half / options.batch_size) if probe else 1
    trainer.window = max(1, updates - 5 * cycle if probe else updates // 5), updates - cycle
    trainer.profiler = make_profiler(device) if probe else None
    load = Load()
    load.start()
    try:
        trainer.train()
    finally:
        load.stopped.set()
    start, end = trainer.moments
    milliseconds = 1000 * (end - start) / (trainer.window[1] - trainer.window[0])
    row = {"prompts": prompts, "overlap_harvest": overlap, "updates": updates, "update_ms": milliseconds}
    row |= {"tokens_per_second": 1000 * options.batch_size / milliseconds, "load": load.between(start, end)}
    row |= {"peak_bytes": peak_memory(device), "time_shares": trainer.time_shares()}
    rows.append(row)
    shown = "not known" if row["load"] is None else f"{row['load']:.0f} %"
    print(f"{row['tokens_per_second']:,.0f} tokens/s ({milliseconds:.1f} ms per update); load {shown}; peak "
          f"{(row['peak_bytes'] or 0) / 1e9:.2f} GB")  # fmt: skip
    if probe:
        row |= profile_figures(trainer.profiler, device, cycle, top=20)
        row["kernel_share"] = row["busy_ms"] / milliseconds
        print(f"an update, with its part of the harvest: {row['launches']:.0f} launches, kernels run in "
              f"{row['busy_ms']:.1f} ms, {row['kernel_share']:.0%} of it")  # fmt: skip
        print_kernels(row["kernels"])
        return
    row["evaluation"], row["history"] = trainer.last_evaluation[1], read_history(output)
    row["usage"] = usage(row["evaluation"]["feature_density"])
    print(", ".join(f"{name} {row['evaluation'][name]:.4g}" for name in SHOWN if row["evaluation"][name] is not None))
    print("features that fire on such a share of tokens:")
    for name, share in row["usage"].items():
        print(f"    {name:16}{share:7.1%}  {'#' * round(50 * share)}")


def usage(density: dict[str, list]) -> dict[str, float]:
    """The curve of usage: what share of the features fires how often, by powers of ten, from a density histogram."""
    edges, counts = density["bin_edges"], density["counts"]
    found = {"never": counts[0]}  # the lowest bin
    for edge, count in zip(edges[1:-1], counts[1:], strict=True):
        power = math.floor(edge)
        name = f"1e{power} to 1e{power + 1}"
        found[name] = found.get(name, 0) + count
    return {name: count / sum(counts) for name, count in found.items() if name == "never" or count}


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="for all (default 5)")
    parser.add_argument("--model", required=True, help="Hub name or folder of the language model")
    parser.add_argument("--dataset", required=True, help="Hub name, file or folder of text")
    parser.add_argument("--output", default="quickstart/gpu_train", help="folder of the release (default %(default)s)")
    for name, default in (
        ("num-features", 8192), ("k", 32), ("batch-size", 4096), ("context-size", 128), ("probe-updates", 60),
        ("eval-tokens", 32768),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default 0.001")
    add_options(parser, "gpu_train.json")
    options = parser.parse_args(argv)
    device, tiny = device_of(options), options.tiny
    options.device = str(device)
    if tiny:
        vars(options).update(TINY)
    command = ["python", "-m", "benchmarks.gpu_train", *(sys.argv[1:] if argv is None else argv)]
    report = Report(options.json, command, device, 60 * options.minutes)
    found, probes = [], []

    def load(rows):
        dtype = "float32" if device.type == "cpu" else "bfloat16"
        found.append(load_language_model(options.model, dtype=dtype, device=device))
        rows.append({"model": options.model, "dtype": dtype})

    def probe(rows, prompts, overlap):
        with TemporaryDirectory() as folder:
            run(rows, options, found[0], prompts, overlap, options.probe_updates, folder, probe=True)
        probes.append(rows[-1])

    def train(rows):
        best = max(probes, key=lambda row: row["tokens_per_second"])
        seconds = report.left() - AFTERWARDS
        updates = 20 if tiny else max(50, int(0.9 * seconds * best["tokens_per_second"] / options.batch_size))
        prompts, overlap = best["prompts"], best["overlap_harvest"]
        print(f"{updates} updates with {prompts} prompts, overlap_harvest {'on' if overlap else 'off'}")
        run(rows, options, found[0], prompts, overlap, updates, options.output, probe=False)

    report.piece("language model", 1 if tiny else 10, load)
    for prompts, overlap in PROBES:
        name = f"probe {prompts} prompts, overlap {'on' if overlap else 'off'}"
        prompts = min(prompts, 4) if tiny else prompts
        report.piece(name, 1 if tiny else PROBE_SECONDS, partial(probe, prompts=prompts, overlap=overlap))
    report.piece("training", 2 if tiny else max(AFTERWARDS + 20, report.left() - 1), train)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
