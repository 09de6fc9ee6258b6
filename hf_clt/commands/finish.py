"""
Finishes a trained CLT end to end: on some thousand tokens of the training text its decoders learn to predict what the
language model predicts. Encoders and thresholds stay, and so do the features. Prints the metrics before and after.
Example:

  hf-clt finish quickstart/clt quickstart/clt-finished --dataset quickstart/text.jsonl
"""

import argparse
import shlex
import sys
from pathlib import Path

from ..command import OneLineParser, one_line_errors, print_next
from .heldout import add_heldout_options, load_clt, open_heldout, settings_of


STATISTICS_BATCHES = 8


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    add_heldout_options(parser, dtype="float32")  # bfloat16 would lose most of such small steps
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write the finished CLT to")
    parser.add_argument("--overwrite", action="store_true", help="replace a CLT that is in OUTPUT already")
    own = parser.add_argument_group("the finish")
    own.add_argument(
        "--steps", type=int, default=32, metavar="N", help="updates, of an extraction batch each (%(default)s)"
    )
    own.add_argument("--learning-rate", type=float, default=3e-4, metavar="X", help="highest one (%(default)s)")
    return parser


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from ..evaluation.evaluate import evaluate_clt
    from ..evaluation.replacement import check_layer_by_layer
    from ..files import format_number
    from ..harvest.normalization import estimate_statistics
    from ..harvest.tokens import open_text
    from ..hub.card import save_model_card
    from ..hub.facts import as_history, read_facts
    from ..training.end_to_end import finish_end_to_end

    for name in ("steps", "learning_rate"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name}={getattr(options, name)} is not positive; leave it out for the default")
    if (options.output / "config.json").exists() and not options.overwrite:
        raise ValueError(f"output={str(options.output)!r} holds a model already; give another folder, or --overwrite")
    clt = load_clt(options)
    check_layer_by_layer(clt)
    harvester, heldout = open_heldout(clt, options)
    text = open_text(options, heldout.tokenizer)
    progress = not options.disable_progress_bar
    if clt.config.decoder_tying != "per_source":  # whose rows have one scale for all layers
        statistics = estimate_statistics(text, harvester, STATISTICS_BATCHES, progress=progress)
        clt.set_normalization(**statistics, reparametrize=True)

    def measure() -> dict:
        return evaluate_clt(clt, harvester, heldout, options.batch_size, replacement=True, progress=progress)

    before = measure()
    made = finish_end_to_end(clt, harvester.model, text, options.steps, options.learning_rate, progress)
    clt.fold_normalization()
    after = measure()
    print(format_finish(before, after))
    clt.save_pretrained(options.output)
    source = read_facts(options.clt) or {}  # how the CLT was trained stays in its card
    command = shlex.join(["hf-clt", "finish", *(sys.argv[1:] if argv is None else argv)])
    note = (
        f"Made from the CLT `{Path(options.clt).name}`, finished end to end: {len(made)} updates of its decoders "
        "towards what the language model predicts. Encoders, thresholds and so the features are the same. Before, "
        f"NMSE was {format_number(before['nmse'], '.4f')}, and {format_number(before['ce_recovered'], '.1%')} of the "
        "cross-entropy was recovered."
    )
    save_model_card(
        options.output,
        clt.config,
        after,
        training=source.get("training"),
        history=as_history(source.get("history", {})),
        command="\n".join(filter(None, [source.get("command"), command])),
        evaluation=settings_of(options, clt),
        note=note,
    )
    print(f"The finished CLT is in {options.output}")
    print_next("push", options.output, "USER/REPO")


def format_finish(before: dict, after: dict) -> str:
    """NMSE and the metrics of the replacement model before and after, a line each."""
    from ..files import format_number

    lines = []
    for name, title, form in (
        ("nmse", "NMSE", ".4f"),
        ("ce_recovered", "cross-entropy recovered", ".1%"),
        ("kl", "KL", ".4f"),
        ("top1_agreement", "top-1 agreement", ".1%"),
    ):
        lines.append(f"{title:<24}" + " -> ".join(format_number(figures[name], form) for figures in (before, after)))
    return "\n".join([*lines, f"on {after['num_predictions']:,} predictions of held-out text"])
