"""
Prints what a CLT is: shape, size, metrics and files, from its small files alone. Weights are not downloaded. Examples:

  hf-clt info quickstart/clt
  hf-clt info user/clt-gpt2 --revision v1
"""

import argparse

from ..command import OneLineParser, one_line_errors, print_next


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("clt", metavar="FOLDER_OR_REPO", help="folder of a CLT, or its name on the Hub")
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit on the Hub")
    parser.add_argument("--subfolder", default="", metavar="TEXT", help="where in there the CLT is")
    return parser


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from ..hub.info import describe_clt, format_info

    print(format_info(describe_clt(options.clt, options.revision, options.subfolder)))
    print_next("evaluate", options.clt, "--dataset", "TEXT")
