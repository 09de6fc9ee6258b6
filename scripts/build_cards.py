#!/usr/bin/env python
"""
Makes the cards and plots of reference CLTs anew, each from the config.json and metrics.json in its folder. Example:

  python scripts/build_cards.py model_cards/*/
"""

import argparse
import sys
from pathlib import Path

from hf_clt import CLTConfig
from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.hub.card import write_card
from hf_clt.hub.facts import FACTS_FILE, read_facts


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder with the two files")
    return parser


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    for folder in make_parser().parse_args(argv).folders:
        facts = read_facts(folder)
        if facts is None:
            raise ValueError(f"{folder} has no {FACTS_FILE}; give folders with a config.json and a {FACTS_FILE}")
        print(write_card(folder, CLTConfig.from_pretrained(folder), facts))


if __name__ == "__main__":
    sys.exit(main())
