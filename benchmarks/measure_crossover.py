"""Prints at which density one matrix product beats gathering the active rows, on this machine; writes it as JSON."""

import argparse
import json
import sys
from pathlib import Path

from hf_clt.command import one_line_errors
from hf_clt.device import chosen_device
from hf_clt.training.setup import prepare_cpu

from .crossover import measure_crossover
from .machine import device_name
from .output import check_folders


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512, help="N (default 512)")
    parser.add_argument("--num-features", type=int, default=6144, help="F (default 6144)")
    parser.add_argument("--targets", type=int, default=6, help="target layers of the source layer (default 6)")
    parser.add_argument("--d-model", type=int, default=768, help="D (default 768)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser


def run(argv: list[str] | None) -> None:
    options = make_parser().parse_args(argv)
    chosen_device(options.device)
    for name in ("tokens", "num_features", "targets", "d_model"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} is not positive; give at least 1")
    check_folders(options.json)
    if options.device == "cpu":
        prepare_cpu()
    shape = (options.tokens, options.num_features, options.targets, options.d_model)
    table = measure_crossover(*shape, device=options.device)
    print(f"{device_name(options.device)}: N={shape[0]} F={shape[1]} J={shape[2]} D={shape[3]}, forward and backward")
    print("active (%)  gathered (ms)  product (ms)  product / gathered")
    for row in table:
        print(
            f"{100 * row['density']:10.1f}  {1e3 * row['gathered']:13.1f}  {1e3 * row['product']:12.1f}"
            f"  {row['ratio']:18.2f}"
        )
    if options.json is not None:
        record = {"device": device_name(options.device), "shape": dict(zip("NFJD", shape, strict=True)), "rows": table}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@one_line_errors()
def main(argv: list[str] | None = None) -> int | None:
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
