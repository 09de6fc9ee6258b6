"""Trains many cross-layer transcoders on the same tokens, to choose settings by; the language model reads them once.

  hf-clt sweep scripts/sweep_smollm2.yaml --records benchmarks/sweep.jsonl --table docs/sweep.md

A trial that is recorded already is not run again, so an interrupted sweep goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from ..command import OneLineParser, one_line_errors
from ..files import write_text


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="base settings and groups of trials")
    parser.add_argument("--records", type=Path, required=True, help="JSONL file, a line per finished trial")
    parser.add_argument("--table", type=Path, help="Markdown file to write the table to (default: print it)")
    parser.add_argument("--plot", type=Path, help="PNG file: NMSE against L0, a line per activation function")
    parser.add_argument("--groups", nargs="+", metavar="NAME", help="only these groups of the sweep")
    return parser


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    from ..training.sweep import format_sweep, plot_frontier, read_sweep, run_sweep

    trials = read_sweep(options.sweep)
    if options.groups:
        known = {trial["group"] for trial in trials}
        for name in options.groups:
            if name not in known:
                raise ValueError(f"groups={name!r} is not in {options.sweep}; it has {', '.join(sorted(known))}")
        trials = [trial for trial in trials if trial["group"] in options.groups]
    try:
        records = run_sweep(trials, options.records)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the next trial", file=sys.stderr)
        return 130
    if options.plot is not None:
        plot_frontier(records, options.plot)
    if options.table is None:
        print(format_sweep(records))
    else:
        write_text(options.table, format_sweep(records))
        print(f"the table of {len(records)} trials is in {options.table}")
    return 0


__all__ = ["main", "make_parser"]
