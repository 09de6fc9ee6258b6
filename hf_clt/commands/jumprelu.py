"""
Makes a calibrated jumprelu CLT out of a topk or batchtopk CLT: the same weights, and thresholds with which every layer
is as active on held-out text as before. Prints NMSE and L0 before and after. Example:

  hf-clt jumprelu quickstart/clt quickstart/clt-jumprelu --dataset quickstart/text.jsonl
"""

import argparse
import shlex
import sys
from pathlib import Path

from ..command import OneLineParser, one_line_errors, print_next
from .heldout import add_heldout_options, load_clt, open_heldout, settings_of


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    add_heldout_options(parser)
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write the jumprelu CLT to")
    parser.add_argument("--overwrite", action="store_true", help="replace a CLT that is in OUTPUT already")
    return parser


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    from ..evaluation.calibration import format_calibration, to_jumprelu
    from ..evaluation.evaluate import activations
    from ..hub.card import save_model_card

    if (options.output / "config.json").exists() and not options.overwrite:
        raise ValueError(f"output={str(options.output)!r} holds a model already; give another folder, or --overwrite")
    clt = load_clt(options)
    harvester, tokens = open_heldout(clt, options)
    result, figures = to_jumprelu(
        clt,
        lambda: activations(harvester, tokens, options.batch_size),
        progress=not options.disable_progress_bar,
    )
    print(format_calibration(figures))
    result.save_pretrained(options.output)
    command = shlex.join(["hf-clt", "jumprelu", *(sys.argv[1:] if argv is None else argv)])
    note = (
        f"Made from the {clt.config.activation_fn} CLT `{Path(options.clt).name}`: the same weights, and a threshold "
        "per layer that is set so that each layer stays as active as it was. The metrics are of the tokens "
        "on which the thresholds were set."
    )
    evaluation = settings_of(options, clt)
    save_model_card(options.output, result.config, figures["after"], command=command, evaluation=evaluation, note=note)
    print(f"The jumprelu CLT is in {options.output}")
    print_next("push", options.output, "USER/REPO")
    return 0 if figures["l0_kept"] else 1
