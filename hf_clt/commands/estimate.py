"""
What training a cross-layer transcoder needs: memory of each process, and time per update, without running it.

  hf-clt estimate --model meta-llama/Llama-3.2-1B --num-features 16384 --processes 8
  hf-clt estimate --model quickstart/model --num-features 1024 --device cpu --rates rates.json
  hf-clt estimate --scale                    # the table of docs/scale.md

A device's rates come from its data sheet and an assumed share of them, or, with --rates, from measurements.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from .. import CLTConfig
from ..command import OneLineParser, one_line_errors, print_next
from ..estimate import (
    ASSUMED,
    DEVICES,
    SHAPES,
    USABLE,
    Plan,
    data_sheet_rates,
    memory,
    read_language_model,
    seconds,
    smallest_that_fits,
)
from ..files import format_size
from ..training.arguments import CPU_DEFAULTS, CLTTrainingArguments
from .heldout import add_fields


SCALE_GPUS = (1, 8, 64)
SCALE_FEATURES = (8, 32)  # times the width
SCALE_TOKENS = 4096  # per CLT and update


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    clt = parser.add_argument_group("the CLT")
    clt.add_argument("--model", help=f"Hub name or folder; known without a download: {', '.join(SHAPES)}")
    clt.add_argument("--num-features", type=int, help="features per layer (default: 8 times the width)")
    clt.add_argument("--activation-fn", default="batchtopk", help="relu, jumprelu, topk or batchtopk (default)")
    clt.add_argument("--l0", type=float, default=32, help="active features per layer and token (default 32)")
    clt.add_argument("--dead", type=float, default=0.0, help="share of the features that are dead, to be revived")
    clt.add_argument("--aux-k", type=int, help="of them, how many per layer and token (topk, batchtopk; default 16)")
    clt.add_argument("--decoder-reach", type=int, help="target layers per source layer (default: all)")
    clt.add_argument("--decoder-tying", default="none", help="none (default), per_source or per_target")

    run = parser.add_argument_group("the run")
    run.add_argument("--processes", type=int, default=1, help="GPUs, or processes (default 1)")
    run.add_argument("--feature-parallel-size", type=int, help="processes per CLT (default: the fewest that fit)")
    run.add_argument("--tokens", type=float, default=1e9, help="to train on, for the hours (default 1e9)")
    sizes = ["batch_size", "context_size", "store_batch_size_prompts", "n_batches_in_buffer"]
    add_fields(run, [*sizes, "optimizer"])
    for name, default in (("clt", "float32"), ("model", "bfloat16"), ("buffer", None)):
        text = f"default: {default or 'as the model'}"
        run.add_argument(f"--{name}-dtype", choices=["float32", "bfloat16"], default=default, help=text)
    run.add_argument(
        "--mixed-precision", choices=["no", "bf16"], help="of the CLT's products (default: bf16 on a GPU, else no)"
    )
    run.add_argument("--buffer-device", choices=["device", "cpu"], default="device", help="default: with the CLT")

    machine = parser.add_argument_group("the machine")
    machine.add_argument("--device", choices=[*DEVICES, "cpu"], default="H100", help="default H100; cpu needs --rates")
    machine.add_argument(
        "--rates", type=Path, help="measured by `python -m benchmarks.calibrate`, in place of a data sheet"
    )

    other = parser.add_argument_group("instead of a single plan")
    other.add_argument("--scale", action="store_true", help="all known models on 1, 8 and 64 GPUs, as Markdown")
    return parser


def make_plan(options: argparse.Namespace, model: str, num_features: int | None, processes: int) -> Plan:
    from ..training.setup import gpu_defaults  # --help answers without what it brings in

    language_model = read_language_model(model, options.context_size)
    config = CLTConfig(
        num_layers=language_model.num_layers,
        d_model=language_model.d_model,
        num_features=num_features or 8 * language_model.d_model,
        activation_fn=options.activation_fn,
        k=max(1, round(options.l0)),
        aux_k=options.aux_k,
        decoder_reach=options.decoder_reach,
        decoder_tying=options.decoder_tying,
    )
    names = "context_size", "batch_size", "store_batch_size_prompts", "n_batches_in_buffer", "mixed_precision"
    run = CLTTrainingArguments(**{name: getattr(options, name) for name in names})
    usual = CPU_DEFAULTS
    if options.device in DEVICES:
        sizes = gpu_defaults(run, config.num_layers, config.d_model, round(DEVICES[options.device]["memory"]))
        usual = {**sizes, "mixed_precision": "bf16"}
    run = replace(run, **{name: value for name, value in usual.items() if getattr(run, name) is None})
    return Plan(
        config=config,
        language_model=language_model,
        processes=processes,
        batch_size=options.batch_size,
        l0=options.l0,
        dead=options.dead,
        clt_dtype=options.clt_dtype,
        model_dtype=options.model_dtype,
        buffer_dtype=options.buffer_dtype,
        product_dtype="bfloat16" if run.mixed_precision == "bf16" else "float32",
        optimizer=options.optimizer,
        context_size=options.context_size,
        prompts=run.store_batch_size_prompts,
        buffer_batches=run.n_batches_in_buffer,
        buffer_on_device=options.buffer_device == "device",
        on_gpu=options.device in DEVICES,
    )


def print_scale(options: argparse.Namespace) -> None:
    """All known models on 1, 8 and 64 GPUs, as a Markdown table."""
    available = USABLE * DEVICES[options.device]["memory"]
    print("| | GPUs | per CLT | tokens of each | memory of each | an update | of it exchange | tokens/s | hours |")
    print("|" + "---|" * 9)
    for model, times in product(SHAPES, SCALE_FEATURES):
        num_features = times * read_language_model(model, options.context_size).d_model
        title = f"{model.partition('/')[2]}, {num_features:,} features"
        smallest = make_plan(options, model, num_features, 1)
        for gpus in SCALE_GPUS:
            plan = smallest_that_fits(replace(smallest, processes=gpus), available, SCALE_TOKENS)
            if plan is None:
                print(f"| {title} | {gpus} | does not fit | | | | | | |")
                continue
            spent = seconds(plan, data_sheet_rates(options.device, plan))
            speed = plan.batch_size * plan.processes / spent["total"]
            cells = [title, gpus, plan.feature_parallel_size, f"{plan.batch_size:,}"]
            cells += [format_size(memory(plan)["total"]), f"{spent['total'] * 1000:,.0f} ms"]
            cells += [f"{spent['exchange'] / spent['total']:.0%}", f"{speed:,.0f}"]
            cells += [f"{options.tokens / speed / 3600:,.1f}"]
            print("| " + " | ".join(map(str, cells)) + " |")


def print_plan(with_dead: Plan, rates: Callable[[Plan], dict[str, float]], tokens: float) -> None:
    """
    Memory of a process by part, time of an update by phase, time for `tokens`: all of it without dead features; then
    memory and time with those of the plan.
    """
    plan = replace(with_dead, dead=0.0)
    sizes, spent = memory(plan), seconds(plan, rates(plan))
    n, config = plan.feature_parallel_size, plan.config
    count = sum(p.numel() for p in plan.parameters())
    speed = plan.batch_size * plan.processes / spent["total"]
    print(
        f"CLT: {config.num_layers} layers, width {config.d_model}, {config.num_features:,} features per layer, "
        f"{config.activation_fn}, {plan.l0:g} active per layer and token"
    )
    print(
        f"{plan.processes} {'process' if plan.processes == 1 else 'processes'}, a CLT on {n} of them: "
        f"{count / 1e9:.3g} billion weights each, {plan.batch_size * plan.processes:,} tokens per update"
    )
    print("\nmemory of each process")
    for name, size in sizes.items():
        print(f"  {name.replace('_', ' '):<16}{format_size(size):>12}")
    print("\ntime of an update")
    for phase, value in spent.items():
        if value:
            print(f"  {phase:<16}{value * 1000:>9,.1f} ms")
    print(f"\n{speed:,.0f} tokens per second, {tokens / speed / 3600:,.1f} hours for {tokens:,.0f} tokens")
    if with_dead.dead:
        size, time = memory(with_dead)["total"], seconds(with_dead, rates(with_dead))["total"]
        print(
            f"with {with_dead.dead:.0%} of the features dead and revived: {format_size(size)} "
            f"({size / sizes['total'] - 1:+.1%}), an update {time * 1000:,.1f} ms ({time / spent['total'] - 1:+.1%})"
        )


def estimate(options: argparse.Namespace) -> None:
    if options.model is None:
        raise ValueError("model is missing; give --model or --scale")
    if options.device == "cpu" and options.rates is None:
        raise ValueError("device='cpu' has no data sheet; give --rates, measured by `python -m benchmarks.calibrate`")
    plan = make_plan(options, options.model, options.num_features, options.processes)
    if options.feature_parallel_size is not None:
        plan = replace(plan, feature_parallel_size=options.feature_parallel_size)
    elif options.device in DEVICES:
        available = USABLE * DEVICES[options.device]["memory"]
        found = smallest_that_fits(plan, available)
        if found is None:
            plan = replace(plan, feature_parallel_size=math.gcd(plan.processes, plan.config.num_features))
            raise ValueError(
                f"processes={plan.processes} are too few: {format_size(memory(plan)['total'])} each, and a "
                f"{options.device} has {format_size(available)} usable; give more, fewer features, --optimizer "
                "adam_compact, --clt-dtype bfloat16 or --buffer-device cpu"
            )
        plan = found
    if options.rates is not None:
        saved = json.loads(options.rates.read_text(encoding="utf-8"))
        measured = {name: math.inf if rate is None else rate for name, rate in saved["rates"].items()}

        def rates(plan: Plan) -> dict[str, float]:
            return measured

        origin = f"rates measured on {saved['device']}"
    else:
        rates = partial(data_sheet_rates, options.device)
        origin = (
            f"modelled, not measured: {ASSUMED['products']:.0%} of the products and {ASSUMED['streams']:.0%} of the "
            f"bandwidths in the data sheet of the {options.device}, gathers from its cache"
        )
    print_plan(plan, rates, options.tokens)
    print(f"({origin})")
    print_next("train", "--model", options.model, "--dataset", "TEXT", "--num-features", plan.config.num_features)


@one_line_errors(RuntimeError)
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    if options.scale:
        print_scale(options)
    else:
        estimate(options)
