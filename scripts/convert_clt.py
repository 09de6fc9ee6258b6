#!/usr/bin/env python
"""Converts a CLT or per-layer transcoders between the formats of several trainers, hf_clt's own by default."""

import argparse
import os
import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from hf_clt.configuration_clt import FEATURE_INPUT_HOOKS, FEATURE_OUTPUT_HOOKS
from hf_clt.hub.formats import FORMATS, convert


# What a user can mend. Anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, StrictDataclassError)


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = vars(build_parser().parse_args(argv))
        format, config, written = convert(**arguments)
    except USER_ERRORS as error:
        if os.environ.get("HF_CLT_DEBUG") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    kind = "CLT" if config.reach == config.num_layers else f"CLT of reach {config.reach}"
    print(
        f"read {format} from {arguments['source']}: {config.activation_fn} {kind} of "
        f"{config.base_model_name_or_path or 'an unnamed model'}, {config.num_layers} layers, width {config.d_model}, "
        f"{config.num_features:,} features per layer, from {config.feature_input_hook} to {config.feature_output_hook}"
    )
    size = sum(path.stat().st_size for path in written)
    print(f"wrote {arguments['to_format']} to {arguments['output']}: {len(written)} files, {size / 1e6:,.1f} MB")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.error = refuse
    parser.add_argument("source", type=Path, help="a folder, or the file of a format that has a single one")
    parser.add_argument("output", type=Path, help="folder to write to; must be empty or missing")
    parser.add_argument("--from", dest="from_format", choices=FORMATS, help="format of SOURCE; recognised if left out")
    parser.add_argument("--to", dest="to_format", choices=FORMATS, default="hf_clt", help="format of OUTPUT")
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


def refuse(message: str) -> None:
    """Instead of argparse's exit with several lines."""
    raise ValueError(f"{message}; --help lists the options")


if __name__ == "__main__":
    sys.exit(main())
