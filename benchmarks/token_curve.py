"""
Draws NMSE against the tokens of text that were trained on, of the records of benchmarks.quality and of the runs on a
GPU: the first version's defaults, the second ones, these with every token trained on twice, and today's.

  python -m benchmarks.token_curve docs/tokens.png
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.hub.plots import BLUE, GREEN, GREY, ORANGE

from .output import check_folders, draw_figure


HERE = Path(__file__).parent
FUNCTIONS = {"topk": "topk, k = 16", "jumprelu": "jumprelu, --target-l0 16"}
# Of the settings in which a record may differ from the others of its curve.
CURVES = {
    "first defaults": ((0.9, 0.002, "random", 1), GREY),
    "second": ((0.5, 0.004, "data", 1), BLUE),
    "second, --buffer-passes 2": ((0.5, 0.004, "data", 2), ORANGE),
    "today's": ((0.5, 0.004, "clusters", 1), GREEN),
}
UPDATES = 128  # per pass
OTHERS = {"optimizer": "adam", "num_features": 1024, "decoder_reach": None, "decoder_tying": "none"}
OTHERS |= {"weight_decay": 0.0, "initial_k": None, "reach_growth": 0.0, "feature_input_hook": "hook_resid_mid"}


def read_points(quality: Path, screen: Path) -> dict[tuple, dict[int, float]]:
    """
    NMSE by tokens of text, for each activation function with L0 16 and each curve's settings: means over seeds.

    Args:
        quality: Records of benchmarks.quality, of which those count that made 128 updates per pass.
        screen: Records of the runs on a GPU, of 524,288 tokens.
    """
    found = {}
    for line in quality.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        settings = record["resolved"]
        function, passes = settings["activation_fn"], settings.get("buffer_passes", 1)
        is_plain = all(settings.get(name, value) == value for name, value in OTHERS.items())
        sparsity = settings.get("target_l0") if function == "jumprelu" else settings["k"]
        if "metrics" not in record or function not in FUNCTIONS or not is_plain or sparsity != 16:
            continue
        if settings["training_steps"] != UPDATES * passes:
            continue
        tokens = settings["batch_size"] * UPDATES
        start = settings.get("initial_weights", "random")
        if start == "data" and settings.get("decay_steps"):  # 0 until encoders began as clusters
            start = "clusters"
        kind = settings["adam_beta1"], settings["learning_rate"], start, passes
        if any(kind == wanted for wanted, _ in CURVES.values()):
            found.setdefault((function, kind), {}).setdefault(tokens, []).append(record["metrics"]["nmse"])
    for line in screen.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        names = {("jumprelu", "default"): CURVES["first defaults"], ("topk", "adam"): CURVES["first defaults"]}
        names |= {(function, "new"): CURVES["second"] for function in FUNCTIONS}
        curve = names.get((record["fn"], record["name"]))
        if curve is not None and record["tokens"] == 524_288:
            found.setdefault((record["fn"], curve[0]), {}).setdefault(record["tokens"], []).append(record["nmse"])
    return {key: {tokens: mean(values) for tokens, values in points.items()} for key, points in found.items()}


def plot_curves(points: dict[tuple, dict[int, float]], path: Path) -> None:
    with draw_figure(path, (9.5, 4.2)) as figure:
        for place, (function, title) in enumerate(FUNCTIONS.items(), start=1):
            axes = figure.add_subplot(1, len(FUNCTIONS), place)
            for label, (kind, color) in CURVES.items():
                curve = sorted(points.get((function, kind), {}).items())
                axes.plot(*zip(*curve, strict=True), marker="o", color=color, label=label) if curve else None
            axes.set(title=title, xlabel="tokens of text", ylabel="NMSE", xscale="log", yscale="log")
            ticks = sorted({tokens for values in points.values() for tokens in values})
            axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
            axes.set_yticks([0.36, 0.4, 0.45, 0.5, 0.55, 0.6], ["0.36", "0.40", "0.45", "0.50", "0.55", "0.60"])
            axes.minorticks_off()
            axes.legend()


@one_line_errors(ImportError)
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plot", type=Path, metavar="PNG", help="file for the plot")
    parser.add_argument("--quality", type=Path, default=HERE / "quality.jsonl", metavar="FILE", help="CPU records")
    parser.add_argument("--screen", type=Path, default=HERE / "screen.jsonl", metavar="FILE", help="GPU records")
    options = parser.parse_args(argv)
    check_folders(options.plot)
    points = read_points(options.quality, options.screen)
    labels = {kind: label for label, (kind, _) in CURVES.items()}
    for (function, kind), curve in sorted(points.items()):
        text = ", ".join(f"{tokens:,}: {nmse:.4f}" for tokens, nmse in sorted(curve.items()))
        print(f"{function}, {labels[kind]}: {text}")
    plot_curves(points, options.plot)


if __name__ == "__main__":
    main()
