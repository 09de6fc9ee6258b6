"""
Measures the rates of this machine, with which `hf-clt estimate --rates` tells times, and how far off the formulas are.

  python -m benchmarks.calibrate rates.json --model quickstart/model --dataset quickstart/text.jsonl
  hf-clt estimate --model quickstart/model --num-features 1024 --device cpu --rates rates.json

Smaller shapes than the one given are measured for the rates, and estimates compared with it and others; with --model
and --dataset with a run of the trainer as well.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.estimate import read_language_model
from hf_clt.files import write_text

from .cases import Case
from .machine import device_name, versions
from .measure import Source
from .rates import check_run, format_checks, measure_rates


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rates", type=Path, metavar="FILE", help="where rates and comparisons are written to")
    parser.add_argument("--model", help="Hub name or folder of a language model, for a run of the trainer")
    parser.add_argument("--dataset", help="text for that run")
    parser.add_argument("--layers", type=int, default=12, help="L of the shape to calibrate for (default 12)")
    parser.add_argument("--d-model", type=int, default=768, help="D (default 768)")
    parser.add_argument("--num-features", type=int, default=6144, help="F per layer (default 6144)")
    parser.add_argument("--batch-size", type=int, default=1024, help="N, tokens per update (default 1024)")
    parser.add_argument("--l0", type=int, default=32, help="active features per layer and token (default 32)")
    parser.add_argument("--activation-fn", default="batchtopk", help="relu, jumprelu, topk or batchtopk (default)")
    parser.add_argument("--optimizer", choices=["adam", "adamw", "adam_compact"], default="adam")
    parser.add_argument("--rounds", type=int, default=3, help="how often, the fastest counts (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:n")
    return parser


def calibrate(options: argparse.Namespace) -> None:
    def say(text):
        print(text, file=sys.stderr)

    if (options.model is None) != (options.dataset is None):
        raise ValueError("a run of the trainer needs both --model and --dataset; give the other one too")
    if options.rounds < 1:
        raise ValueError(f"rounds={options.rounds} is below 1; give how often to measure")
    shape = {"num_layers": options.layers, "d_model": options.d_model, "num_features": options.num_features}
    base = Case(
        **shape,
        tokens=options.batch_size,
        l0=options.l0,
        activation_fn=options.activation_fn,
        device=options.device,
        optimizer=options.optimizer,
        steps=8,
    )
    rates, calibration, checks = measure_rates(base, options.rounds, say)
    if options.model is not None:
        say("the trainer")
        source = Source(model=options.model, dataset=options.dataset)
        model = read_language_model(options.model, source.context_size)
        checks.append(check_run(base, source, model, rates, options.rounds))
    record = {
        "device": device_name(base.device),
        "versions": versions(),
        "case": base.to_dict(),
        "rates": {name: None if math.isinf(rate) else rate for name, rate in rates.items()},
        "calibration": calibration,
        "checks": checks,
    }
    write_text(options.rates, json.dumps(record, indent=1) + "\n")
    print(format_checks(checks))
    print(f"rates: {options.rates}")


@one_line_errors(RuntimeError)
def main(argv: list[str] | None = None) -> None:
    calibrate(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
