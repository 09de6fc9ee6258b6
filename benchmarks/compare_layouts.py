"""
Measures memory and time of each process in several layouts, on an activation cache and the same cores.

  hf-clt cache CACHE --model quickstart/first-10-layers --dataset quickstart/text.jsonl \\
      --max-tokens 20000
  python -m benchmarks.compare_layouts CACHE --num-features 4096 --json benchmarks/layouts.json
"""

import argparse
import json
import os
import sys
from pathlib import Path

from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.files import write_text
from hf_clt.harvest.cache import read_manifest

from .layouts import LAYOUTS, format_layouts, run_layout
from .machine import device_name, versions


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", metavar="CACHE", help="what hf-clt cache wrote")
    parser.add_argument("--num-features", type=int, default=4096, help="F per layer (default 4096)")
    parser.add_argument("--activation-fn", default="topk", help="default topk")
    parser.add_argument("--k", type=int, default=16, help="default 16")
    parser.add_argument("--tokens", type=int, default=512, help="per update, over all processes (default 512)")
    parser.add_argument("--updates", type=int, default=12, help="of which the first are not timed (default 12)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser


def benchmark(argv: list[str] | None) -> None:
    options = make_parser().parse_args(argv)
    manifest = read_manifest(options.cache)
    config = {"num_layers": manifest["num_layers"], "d_model": manifest["d_model"], "k": options.k}
    config |= {"num_features": options.num_features, "activation_fn": options.activation_fn}
    cores = len(os.sched_getaffinity(0))
    rows = {}
    for name, (processes, shared) in LAYOUTS.items():
        print(name, file=sys.stderr)
        rows[name] = run_layout(options.cache, config, options.tokens, options.updates, processes, shared, cores)
    print(format_layouts(rows))
    if options.json is not None:
        facts = {"device": device_name("cpu"), "versions": versions(), "config": config, "tokens": options.tokens}
        write_text(options.json, json.dumps({**facts, "rows": rows}, indent=1) + "\n")


@one_line_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int | None:
    return benchmark(argv)


if __name__ == "__main__":
    sys.exit(main())
