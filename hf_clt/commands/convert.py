"""Converts CLTs and per-layer transcoders of several trainers into hf_clt's files, or those of circuit-tracer."""

import argparse
from pathlib import Path

from ..command import OneLineParser, one_line_errors, print_next
from ..configuration_clt import FEATURE_INPUT_HOOKS, FEATURE_OUTPUT_HOOKS
from ..files import format_size
from ..importers import FORMATS, WRITTEN, convert


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    arguments = vars(make_parser().parse_args(argv))
    format, config, written = convert(**arguments)
    kind = "CLT" if config.reach == config.num_layers else f"CLT of reach {config.reach}"
    print(
        f"read {format} from {arguments['source']}: {config.activation_fn} {kind} of "
        f"{config.base_model_name_or_path or 'an unnamed model'}, {config.num_layers} layers, width {config.d_model}, "
        f"{config.num_features:,} features per layer, from {config.feature_input_hook} to {config.feature_output_hook}"
    )
    size = sum(path.stat().st_size for path in written)
    print(f"wrote {arguments['to_format']} to {arguments['output']}: {len(written)} files, {format_size(size)}")
    print_next("info", arguments["output"])


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a folder, or the file of a format that has a single one")
    parser.add_argument("output", type=Path, help="folder to write to; must be empty or missing")
    parser.add_argument("--from", dest="from_format", choices=FORMATS, help="format of SOURCE; recognised if left out")
    parser.add_argument("--to", dest="to_format", choices=WRITTEN, default="hf_clt", help="format of OUTPUT")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same names in OUTPUT")
    told = parser.add_argument_group("what the source does not say")
    told.add_argument("--base-model", dest="base_model_name_or_path", help="Hub name or folder of the language model")
    told.add_argument("--feature-input-hook", choices=FEATURE_INPUT_HOOKS, help="what the features read")
    told.add_argument("--feature-output-hook", choices=FEATURE_OUTPUT_HOOKS, help="what is reconstructed")
    told.add_argument(
        "--norm-stats", help="crosslayer-coding: statistics of the activations, or 'none' if trained on raw ones"
    )
    told.add_argument(
        "--drop-acausal",
        action="store_true",
        default=None,
        help="gemma-scope-2: leave out what features write to layers before their own",
    )
    told.add_argument(
        "--activation-fn", choices=("topk",), help="circuit-tracer-plt: take its top-k as one with a ReLU behind"
    )
    told.add_argument("--k", type=int, help="circuit-tracer-plt: k of its top-k, if config.yaml does not say")
    return parser
