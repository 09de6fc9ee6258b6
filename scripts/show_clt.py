#!/usr/bin/env python
"""Prints what a finished training run gave: the shape of the CLT and its last evaluation, per layer."""

import json
import sys
from pathlib import Path

from hf_clt import CLTConfig
from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.evaluation import format_metrics_table


def last_evaluation(folder: Path) -> dict:
    """
    Reads the last evaluation on held-out tokens of a training run.

    Args:
        folder: The run's output folder.

    Returns:
        The last line of its `metrics.jsonl` that states a number of held-out tokens, by the names of the metrics.

    Raises:
        ValueError: If there is none.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        row = json.loads(line)
        if "num_tokens" in row:
            return row
    raise ValueError(f"no evaluation in {path}; give the output folder of a run of scripts/train_clt.py")


def show(folder: Path) -> None:
    metrics = last_evaluation(folder)
    config = CLTConfig.from_pretrained(folder)
    print(
        f"{config.activation_fn} CLT of {config.base_model_name_or_path}: {config.num_layers} layers, "
        f"width {config.d_model}, {config.num_features:,} features per layer; evaluated after step {metrics['step']:,}"
    )
    print(format_metrics_table(metrics))
    print(f"The CLT is in {folder.resolve()}")


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the output folder of a run of scripts/train_clt.py")
    show(parser.parse_args(argv).folder)


if __name__ == "__main__":
    sys.exit(main())
