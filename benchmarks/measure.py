"""
One measurement in one process: a training step of one side, the rates of the machine, a harvest, or a run end to end.

`python -m benchmarks.measure JOB RESULT` reads the job from a JSON file and writes the result to another: each
side gets a process of its own, so that neither finds the other's memory, nor do both have to fit at once.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hf_clt.configuration_clt import TOPK_FAMILY
from hf_clt.device import chosen_device
from hf_clt.estimate import flops_per_token
from hf_clt.files import one_line
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.harvest.normalization import set_firing_rate
from hf_clt.harvest.text import load_text_dataset
from hf_clt.harvest.tokens import TokenStream
from hf_clt.modeling_clt import CrossLayerTranscoder
from hf_clt.training.arguments import CLTTrainingArguments
from hf_clt.training.optimizers import make_optimizer
from hf_clt.training.setup import prepare_cpu
from hf_clt.training.trainer import CLTTrainer

from .cases import Case
from .dense_reference import dense_losses_of
from .machine import (
    best_seconds,
    device_name,
    measure_rates,
    memory_in_use,
    peak_memory,
    reset_peak_memory,
    synchronize,
    versions,
)


PHASES = ("forward", "backward", "optimizer")
RANGE_PREFIX = "clt::"  # of the profiler ranges that the model's forward opens
PROFILED_STEPS = 2
RATE_SAMPLE = 4096  # tokens on which the firing rate is set
POOL_BYTES = 2**30  # of harvested activations, inputs and labels together
POOL_BATCHES = 4


@dataclass(frozen=True)
class Source:
    """
    Where real activations come from.

    Args:
        model: Hub name or folder of the language model.
        dataset: Hub name, file or folder of the text.
        model_dtype: Format that the language model runs in; None: that of its weights.
        context_size: Tokens per block.
        prompts: Blocks per forward pass of the language model.
        end_to_end_steps: Steps of the run end to end.
    """

    model: str
    dataset: str
    model_dtype: str | None = None
    context_size: int = 128
    prompts: int = 8
    end_to_end_steps: int = 40

    def __post_init__(self):
        for name in ("prompts", "end_to_end_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; give at least 1")
        if self.context_size < 3:
            raise ValueError(f"context_size={self.context_size} leaves hardly a token per block; give at least 3")


class Clock:
    """Marks moments in the stream of work: wall time on a CPU, events on a GPU, read once all work is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds from each mark to the next."""
        synchronize(self.device)
        if self.device.type == "cuda":
            return [first.elapsed_time(second) / 1000 for first, second in pairwise(self.marks)]
        return [second - first for first, second in pairwise(self.marks)]


# -- a training step --------------------------------------------------------------------------------------------------


def make_clt(case: Case, pool: dict[str, Tensor] | None) -> CrossLayerTranscoder:
    """A CLT of the case's shape and L0, in train mode; normalised by the statistics of real activations."""
    torch.manual_seed(case.seed)
    with torch.device(case.device):
        clt = CrossLayerTranscoder(case.config())
    clt.cast_decoders(getattr(torch, case.dtype))
    if pool is not None:
        clt.set_normalization(*(pool[name].to(case.device) for name in ("mean_in", "std_in", "mean_out", "std_out")))
    if case.activation_fn not in TOPK_FAMILY:
        rate = case.l0 / case.num_features
        if pool is None:
            set_normal_firing_rate(clt, rate)
        else:
            set_firing_rate(clt, pool["inputs"][:RATE_SAMPLE].to(case.device), rate)
    return clt.train()


@torch.no_grad()
def set_normal_firing_rate(clt: CrossLayerTranscoder, rate: float) -> None:
    """
    Sets b_enc so that each feature fires on a share `rate` of standard normal inputs, where h - b_enc is normal with
    standard deviation ‖W_enc[f]‖: b = θ + ‖W_enc[f]‖ · (the `rate` quantile).
    """
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(rate)).item()
    for s, encoder in enumerate(clt.encoders):
        theta = clt.thresholds[s]() if clt.config.activation_fn == "jumprelu" else 0.0
        encoder.bias.copy_(theta + encoder.weight.float().norm(dim=1) * quantile)


@torch.no_grad()
def silence(clt: CrossLayerTranscoder, case: Case) -> Tensor:
    """Makes a share of the features never fire; returns which, (L, F) bool."""
    generator = torch.Generator().manual_seed(case.seed)
    dead = (torch.rand(case.num_layers, case.num_features, generator=generator) < case.dead).to(clt.device)
    for encoder, silent in zip(clt.encoders, dead, strict=True):
        encoder.bias[silent] -= 20 * encoder.weight.float().norm(dim=1)[silent]
    return dead


def make_batches(case: Case, pool: dict[str, Tensor] | None):
    """Endless inputs and labels, (N, L, D) each: fresh normal numbers, or the pool's tokens in turn."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    if pool is None:
        generator = torch.Generator(device).manual_seed(case.seed)
        shape = (case.tokens, case.num_layers, case.d_model)
        while True:
            yield tuple(torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    while True:
        for start in range(0, len(pool["inputs"]) - case.tokens + 1, case.tokens):
            rows = slice(start, start + case.tokens)
            yield tuple(pool[name][rows].to(device, dtype, copy=True) for name in ("inputs", "labels"))


def measure_step(case: Case, side: str, activations: str | None = None, profile: bool = False) -> dict:
    """
    Times training steps: forward, backward, optimizer.

    Args:
        case: The shape and the number of steps.
        side: "ours", the model and its optimizer; or "dense", the dense reference and fused Adam.
        activations: A file written by [`harvest`]; None: random activations.
        profile: Whether to profile a few more steps afterwards, for the ranges in ours.

    Returns:
        `dict`: seconds of each timed step for each phase; `peak_bytes` of a step beyond what was in use before the
        CLT was built (None where the system does not say); `parameter_bytes`, `optimizer_bytes`; `loss_first`, of
        the first step; for ours `l0_first`, `l0_last` and `listed_last` per layer and token, `active_rows` and
        `listed_rows` of the last step, the number of different features in each layer, and `ranges`, seconds per
        step of each profiled range.
    """
    device = chosen_device(case.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current one
    if device.type == "cpu":
        prepare_cpu()  # as the trainer does; both sides gain
    pool = load_file(activations) if activations is not None else None
    before = memory_in_use(device)
    clt = make_clt(case, pool)
    if side == "ours":
        # Only what the optimizer is made of is read; nothing is written to the folder.
        optimizer = make_optimizer(
            clt, CLTTrainingArguments(optimizer=case.optimizer, learning_rate=case.learning_rate)
        )
    else:
        optimizer = torch.optim.Adam(clt.parameters(), lr=case.learning_rate, fused=True)
    dead = silence(clt, case) if case.dead > 0 and side == "ours" else None
    reset_peak_memory(device)

    data = make_batches(case, pool)
    features = None

    def step(clock: Clock, read_features: bool = False) -> Tensor:
        nonlocal features
        inputs, labels = next(data)
        clock.mark()
        with torch.autocast(device.type, torch.bfloat16, enabled=case.follows_autocast):
            if side == "ours":
                output = clt(inputs, labels, dead=dead)
                loss = output.loss
            else:
                loss = dense_losses_of(clt, inputs, labels)["loss"]
        clock.mark()
        loss.backward()
        clock.mark()
        optimizer.step()
        optimizer.zero_grad()
        clock.mark()
        if read_features and side == "ours":
            features = count_features(output.features)
        return loss.detach()

    result = {"side": side, **{phase: [] for phase in PHASES}}
    for number in range(case.warmup):
        loss = step(Clock(device), read_features=number == 0)
        result.setdefault("loss_first", loss.item())
    result["l0_first"] = features["l0"] if features is not None else None
    count = case.dense_steps if side == "dense" and case.dense_steps is not None else case.steps
    clocks = []
    for number in range(count):
        clocks.append(Clock(device))
        loss = step(clocks[-1], read_features=number == count - 1)
    if not loss.isfinite():
        raise FloatingPointError(f"the loss of the {side} step is not finite; lower learning_rate")
    for clock in clocks:
        for phase, seconds in zip(PHASES, clock.seconds(), strict=True):
            result[phase].append(seconds)
    result["l0_last"] = features["l0"] if features is not None else None
    for name in ("listed_last", "active_rows", "listed_rows"):
        result[name] = features[name] if features is not None else None

    peak = peak_memory(device)
    result["peak_bytes"] = None if peak is None else peak - before
    result["parameter_bytes"] = sum(p.numel() * p.element_size() for p in clt.parameters())
    result["optimizer_bytes"] = optimizer_bytes(optimizer)
    result["ranges"] = profile_ranges(lambda: step(Clock(device)), device) if profile and side == "ours" else {}
    return result


def count_features(features) -> dict[str, list]:
    """Active and listed features per token in each layer, and how many different ones there are."""
    return {
        "l0": features.l0_per_layer().tolist(),
        "listed_last": [layer.indices.numel() / max(1, layer.num_tokens) for layer in features.layers],
        "active_rows": (features.active_counts() > 0).sum(dim=1).tolist(),
        "listed_rows": [layer.indices.unique().numel() for layer in features.layers],
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Size of the optimizer's state."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def profile_ranges(step, device: torch.device) -> dict[str, float]:
    """Seconds per step inside each range whose name begins with `clt::`, measured by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        synchronize(device)
    seconds = {}
    for average in profiler.key_averages():
        if average.key.startswith(RANGE_PREFIX):
            # On a GPU a range is listed twice, as seen by the host and by the device.
            micros = average.device_time_total if device.type == "cuda" else average.cpu_time_total
            name = average.key.removeprefix(RANGE_PREFIX)
            seconds[name] = max(seconds.get(name, 0.0), micros / 1e6 / PROFILED_STEPS)
    return seconds


# -- real activations -------------------------------------------------------------------------------------------------


def harvest(source: Source, tokens: int, device: str, path: str) -> dict:
    """
    Writes activations of a language model to a safetensors file: `inputs` and `labels` (rows, L, D), rows mixed, and
    the statistics `mean_in`, `std_in`, `mean_out`, `std_out` (L, D).

    Args:
        source: The language model and the text.
        tokens: N; a few batches of it are harvested, at least one.
        device: Where the language model runs.
        path: The file.

    Returns:
        `dict`: `num_layers`, `d_model`, `tokens_per_second` of the language model.

    Raises:
        ValueError: If the model or the text cannot be loaded, or the text is too short.
    """
    model, tokenizer = load_language_model(source.model, dtype=source.model_dtype, device=device)
    stream = TokenStream(
        load_text_dataset(source.dataset),
        tokenizer,
        context_size=source.context_size,
        prompts_per_batch=source.prompts,
    )
    harvester = Harvester(model)
    row_bytes = 2 * 4 * harvester.num_layers * harvester.d_model
    rows = tokens * max(1, min(POOL_BATCHES, POOL_BYTES // (row_bytes * tokens)))
    parts, found, timed, seconds = [], 0, 0, 0.0
    for number, batch in enumerate(stream):
        start = time.perf_counter()
        inputs, labels = harvester.harvest(batch)
        synchronize(torch.device(device))
        if number > 0:  # the first one warms up
            seconds += time.perf_counter() - start
            timed += len(inputs)
        parts.append((inputs.cpu(), labels.cpu()))
        found += len(inputs)
        if found >= rows and timed:
            break
    if found < rows or not timed:
        raise ValueError(f"dataset={source.dataset!r} has {found} tokens that count; give a text of over {rows}")
    order = torch.randperm(found, generator=torch.Generator().manual_seed(0))[:rows]
    tensors = {
        name: torch.cat(part)[order] for name, part in zip(("inputs", "labels"), zip(*parts, strict=True), strict=True)
    }
    for name, short in (("inputs", "in"), ("labels", "out")):
        tensors[f"mean_{short}"] = tensors[name].mean(dim=0)
        tensors[f"std_{short}"] = tensors[name].std(dim=0)
    save_file(tensors, path)
    return {
        "num_layers": harvester.num_layers,
        "d_model": harvester.d_model,
        "tokens_per_second": timed / seconds,
    }


class TimedTrainer(CLTTrainer):
    """A trainer whose result is its speed: it writes no release."""

    def _release(self) -> None:
        pass


def end_to_end(case: Case, source: Source, statistics: str | None) -> dict:
    """
    Trains with the trainer as users run it: language model, buffer, CLT, logging; no evaluation and no checkpoint.

    Args:
        case: The shape of the CLT.
        source: The language model and the text.
        statistics: A file written by [`harvest`]; None: the activations are not normalised.

    Returns:
        `dict`: `tokens_per_second` trained on, from the first fill of the buffer to the last step. The language
        model's time on tokens that are left in the buffer at the end is taken off. `language_model_share` and
        `clt_share` of that time. `peak_bytes` beyond what was in use before anything was loaded, `buffer_batches`,
        and `model_dtype`, the language model's format.
    """
    device = torch.device(case.device)
    before = memory_in_use(device)
    reset_peak_memory(device)
    per_harvest = source.prompts * (source.context_size - 1)
    args = {
        "model": source.model,
        "model_dtype": source.model_dtype,
        "dataset": source.dataset,
        "context_size": source.context_size,
        "store_batch_size_prompts": source.prompts,
        "n_batches_in_buffer": max(2, -(-2 * case.tokens // per_harvest)),
        "batch_size": case.tokens,
        "eval_tokens": 0,
        "normalization_method": "none" if statistics is None else "mean_std",
        "normalization_file": statistics,
        "initial_feature_rate": 0.0 if case.activation_fn in TOPK_FAMILY else case.l0 / case.num_features,
        "clt_dtype": case.dtype,
        "mixed_precision": "bf16" if case.autocast else "no",
        "learning_rate": case.learning_rate,
        "lr_scheduler": "none",
        "optimizer": case.optimizer,
        "training_steps": source.end_to_end_steps,
        "checkpoint_interval": 0,
        "seed": case.seed,
        "device": case.device,
        "disable_progress_bar": True,
    }
    with TemporaryDirectory() as folder:
        trainer = TimedTrainer(CLTTrainingArguments(output_dir=folder, **args), case.config())
        trainer.train()
        synchronize(device)
    peak = peak_memory(device)
    trained, unread = source.end_to_end_steps * case.tokens, trainer.buffer.num_unread
    seconds = trainer.seconds
    spare = seconds["language_model"] * unread / (trained + unread)
    total = seconds["total"] - spare
    return {
        "tokens_per_second": trained / total,
        "steps": source.end_to_end_steps,
        "language_model_share": (seconds["language_model"] - spare) / total,
        "clt_share": seconds["clt"] / total,
        "peak_bytes": None if peak is None else peak - before,
        "buffer_batches": args["n_batches_in_buffer"],
        "model_dtype": str(trainer.harvester.model.dtype).removeprefix("torch."),
    }


def measure_language_model(config: dict, prompts: int, context_size: int, device: str, dtype: str) -> dict:
    """
    How fast a language model with random weights gives activations.

    Args:
        config: `model_type` and shape, as of `AutoConfig.for_model`.
        prompts, context_size: Blocks of a forward pass, and tokens of each.
        device: Where it runs.
        dtype: Format of its weights.

    Returns:
        `dict`: `flops_per_second`, the operations of [`flops_per_token`] over the fastest of several passes.
    """
    if torch.device(device).type == "cpu":
        prepare_cpu()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=getattr(torch, dtype))
    harvester = Harvester(model.to(device).eval())
    ids = torch.randint(model.config.vocab_size, (prompts, context_size))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "counted": torch.ones_like(ids).bool()}
    fastest = best_seconds(lambda: harvester.harvest(batch), torch.device(device), at_least=2.0)
    return {"flops_per_second": flops_per_token(model, context_size) * ids.numel() / fastest}


# -- the process ------------------------------------------------------------------------------------------------------


def measure(job: dict) -> dict:
    """
    Does one job.

    Args:
        job: `kind` ("machine", "step", "harvest", "end_to_end" or "language_model") and the arguments of the function
            of that kind.
    """
    arguments = {name: value for name, value in job.items() if name != "kind"}
    if "case" in arguments:
        arguments["case"] = Case(**arguments["case"])
    if "source" in arguments:
        arguments["source"] = Source(**arguments["source"])
    if job["kind"] == "machine":
        case = arguments["case"]
        return {"device": device_name(case.device), "versions": versions(), "rates": measure_rates(**arguments)}
    functions = {
        "step": measure_step,
        "harvest": harvest,
        "end_to_end": end_to_end,
        "language_model": measure_language_model,
    }
    return functions[job["kind"]](**arguments)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="JSON file with a job, see `measure`")
    parser.add_argument("result", type=Path, help="JSON file for what was measured, or for the error")
    options = parser.parse_args(argv)
    try:
        result = measure(json.loads(options.job.read_text()))
    except (ValueError, OSError, FloatingPointError) as error:  # what a user can mend
        result = {"error": one_line(error)}
    except torch.OutOfMemoryError as error:
        result = {"error": f"out of memory on the GPU: {one_line(error, 200)}; give a smaller shape"}
    options.result.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["PHASES", "Source", "TimedTrainer", "end_to_end", "harvest", "measure", "measure_step"]
