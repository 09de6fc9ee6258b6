"""
Evaluates a CLT on held-out text: prints its metrics per layer and, where asked to, writes them as JSON and draws
plots. Example:

  hf-clt evaluate quickstart/clt --dataset quickstart/text.jsonl --json metrics.json --plots plots
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from ..command import OneLineParser, one_line_errors, print_next
from ..files import write_json
from .heldout import add_heldout_options, load_clt, open_heldout, settings_of


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    add_heldout_options(parser)
    parser.add_argument(
        "--replacement",
        action="store_true",
        help="also run the language model with its MLPs replaced by the CLT: cross-entropy, KL, top-1 agreement",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all metrics (what is not finite is null)")
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help="folder for plots: NMSE and L0 per layer, feature density, and training curves if the CLT's folder has a "
        "metrics.jsonl",
    )
    parser.add_argument(
        "--update-card",
        action="store_true",
        help="put the metrics in place of those in the card, metrics.json and plots of the CLT, a folder",
    )
    return parser


@one_line_errors(ImportError)
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from ..evaluation.evaluate import evaluate_clt, format_replacement
    from ..hub.card import check_update, update_card
    from ..hub.plots import plot_metrics
    from ..hub.report import format_metrics_table, read_history

    # What would fail at the end is found before any long work.
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ValueError(f"json={str(options.json)!r}: there is no folder {options.json.parent}; make it first")
    if options.plots is not None and find_spec("matplotlib") is None:
        raise ImportError('plots need matplotlib; install it with `pip install "hf_clt[plots]"`')
    history = read_history(options.clt) if options.plots is not None else []
    if options.update_card:
        check_update(options.clt, vars(options))
    clt = load_clt(options)
    harvester, tokens = open_heldout(clt, options)
    metrics = evaluate_clt(
        clt,
        harvester,
        tokens,
        options.batch_size,
        replacement=options.replacement,
        progress=not options.disable_progress_bar,
    )
    settings = settings_of(options, clt)
    print(
        f"{clt.config.activation_fn} CLT of {settings['model']}: {clt.config.num_layers} layers, width "
        f"{clt.config.d_model}, {clt.config.num_features:,} features per layer"
    )
    print(format_metrics_table(metrics))
    if options.replacement:
        print(format_replacement(metrics))
    if options.json is not None:
        write_json(options.json, {**metrics, "settings": settings})
        print(f"The metrics are in {options.json}")
    if options.plots is not None:
        written = plot_metrics(metrics, history, options.plots)
        print("Plots: " + ", ".join(str(path) for path in written))
    if options.update_card:
        print("\n".join(update_card(options.clt, metrics, settings)))
    print_next("features", options.clt, "--dataset", options.dataset, "--output", "FOLDER")
