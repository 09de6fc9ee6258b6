"""
Trains the same CLT on the same batches once per variant of the training step, and shows where each ends.

Variants: dense (the dense reference), dense_reversed (the same with every sum in reverse order: what rounding alone
does), ours, autocast (ours with matrix products in bfloat16), adam_compact and adam_compact_beta1_0
(ours with compact optimizer state). Example:

  python -m benchmarks.compare_training --model FOLDER --dataset text.jsonl --num-features 1024 --k 16 \\
      --json curves.json --plot curves.png
"""

import argparse
import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from hf_clt.command import one_line_errors
from hf_clt.configuration_clt import CLT_CONFIG_HELP
from hf_clt.training.arguments import CLTTrainingArguments
from hf_clt.training.initial_config import build_config

from .curves import VARIANTS, compare, format_comparison, plot_comparison
from .output import check_folders


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("activations")
    source.add_argument("--model", required=True, help="Hub name or folder of a language model")
    source.add_argument("--dataset", required=True, help="Hub name, file or folder of text")
    source.add_argument("--model-dtype", help="float32, bfloat16 or float16 (default: that of its weights)")
    source.add_argument("--buffer-dtype", help="of the batches held in memory: float32 (default) or bfloat16")
    source.add_argument("--context-size", type=int, default=128, help="tokens per block (default %(default)s)")
    source.add_argument(
        "--store-batch-size-prompts", type=int, default=8, help="blocks per harvest (default %(default)s)"
    )
    source.add_argument(
        "--n-batches-in-buffer", type=int, default=12, help="harvests mixed at a time (default %(default)s)"
    )
    source.add_argument(
        "--normalization-estimation-batches", type=int, default=8, help="harvests for statistics (default %(default)s)"
    )
    source.add_argument("--eval-tokens", type=int, default=4096, help="held out (default %(default)s)")

    clt = parser.add_argument_group("CLT")
    clt.add_argument("--num-features", type=int, default=1024, help="F per layer (default %(default)s)")
    clt.add_argument("--activation-fn", default="batchtopk", help="relu, jumprelu, topk or batchtopk (default)")
    clt.add_argument("--k", type=int, default=16, help="L0 per layer of topk and batchtopk (default %(default)s)")
    clt.add_argument("--sparsity-lambda", type=float, help="default: by activation function")
    clt.add_argument("--jumprelu-bandwidth", type=float, help="default: that of CLTConfig")
    clt.add_argument("--decoder-reach", type=int, help="target layers per source layer (default: all)")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--steps", dest="training_steps", type=int, default=100, help="updates (default %(default)s)"
    )
    training.add_argument("--batch-size", type=int, default=256, help="N, tokens per update (default %(default)s)")
    training.add_argument("--learning-rate", type=float, default=2e-3, help="highest (default %(default)s)")
    training.add_argument("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    training.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:n")

    out = parser.add_argument_group("output")
    out.add_argument("--variants", nargs="+", default=list(VARIANTS), help="default: all")
    out.add_argument("--json", type=Path, help="file to write all figures to")
    out.add_argument("--plot", type=Path, help="PNG file to draw the curves to")
    return parser


def run(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    check_folders(options["json"], options["plot"])
    training = {field.name for field in fields(CLTTrainingArguments)}
    args = CLTTrainingArguments(**{name: value for name, value in options.items() if name in training})
    config = build_config(args, {name: value for name, value in options.items() if name in CLT_CONFIG_HELP})
    command = shlex.join(["python", "-m", "benchmarks.compare_training", *(sys.argv[1:] if argv is None else argv)])

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def keep(record: dict) -> None:
        if options["json"] is not None:
            text = json.dumps({"command": command, **record}, indent=1)
            options["json"].write_text(text + "\n", encoding="utf-8")

    record = compare(args, config, options["variants"], say, keep)
    print(format_comparison(record))
    if options["plot"] is not None:
        plot_comparison(record, options["plot"])


@one_line_errors(ImportError, FloatingPointError)
def main(argv: list[str] | None = None) -> int | None:
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
