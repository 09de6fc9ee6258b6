"""
Makes a page for every layer of a CLT that shows what its features are: the text on which they are most active, the
tokens they make more likely, and the features they feed and read; and the `features/` folder that circuit-tracer's
front end reads. Interrupted, the same command goes on. Example:

  hf-clt features quickstart/clt --dataset quickstart/text.jsonl --output quickstart/pages
"""

import argparse
from pathlib import Path

from ..command import OneLineParser, one_line_errors, print_next
from ..features.settings import ExampleSettings
from .heldout import add_heldout_options, load_clt, open_heldout, settings_of


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    add_heldout_options(parser)
    kept, default = parser.add_argument_group("what the pages show"), ExampleSettings()
    kept.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the pages")
    kept.add_argument("--overwrite", action="store_true", help="replace feature pages that are in it")
    for flag, name, text in (
        ("--top-examples", "top", "examples with the highest activation"),
        ("--quantiles", "quantiles", "quantiles that further examples are drawn from"),
        ("--quantile-examples", "per_quantile", "examples per quantile"),
        ("--tokens-before", "before", "tokens shown before the one with the highest activation"),
        ("--tokens-after", "after", "tokens shown after it"),
        ("--seed", "seed", "which examples are drawn"),
    ):
        number = getattr(default, name)
        kept.add_argument(flag, dest=name, type=int, default=number, metavar="N", help=f"{text} (default: {number})")
    kept.add_argument("--logits", type=int, default=10, metavar="N", help="tokens at each end (default: 10)")
    kept.add_argument(
        "--links",
        type=int,
        default=8,
        metavar="N",
        help="features that it feeds, and that it reads (default: 8; 0 leaves the virtual weights out, which take "
        "L² F² D / 2 multiplications)",
    )
    return parser


@one_line_errors(interrupted="the same command goes on, from a state that is at most a minute of text old")
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from ..features.pages import build_feature_pages

    examples = ExampleSettings(**{name: getattr(options, name) for name in vars(ExampleSettings())})
    clt = load_clt(options)
    harvester, tokens = open_heldout(clt, options)
    activity = build_feature_pages(
        clt,
        harvester,
        tokens,
        options.output,
        settings_of(options, clt),
        examples,
        logits=options.logits,
        links=options.links,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
        progress=not options.disable_progress_bar,
    )
    if activity is None:
        print("These pages were finished before; --overwrite makes them anew.")
    else:
        active = activity.active()
        print(
            f"{int(active.sum()):,} of {active.numel():,} features were active on {activity.num_tokens:,} held-out "
            "tokens."
        )
    print(f"Open {options.output / 'index.html'} in a browser; {options.output / 'features'} is for circuit-tracer.")
    folder = options.clt if Path(options.clt).is_dir() else "FOLDER"
    print_next("push", folder, "USER/REPO", "--features", options.output)
