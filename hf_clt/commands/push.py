"""
Pushes a finished CLT to the Hub in one commit: its weights as safetensors, its configuration and its card with plots,
and nothing else of the folder. The token is that of `hf auth login`, or HF_TOKEN. Example:

  hf-clt push clt-gpt2 user/clt-gpt2 --private
"""

import argparse
from pathlib import Path

from ..command import OneLineParser, one_line_errors, print_next


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what save_pretrained or a training run wrote")
    parser.add_argument("repo", help='repository, such as "user/clt-gpt2"; made if it is absent')
    parser.add_argument("--private", action="store_true", help="make it a private one; refuse one that is public")
    parser.add_argument("--branch", metavar="NAME", help="push to this branch, made if it is absent (default: main)")
    parser.add_argument("--pull-request", action="store_true", help="propose the change to main instead")
    parser.add_argument("--tag", metavar="NAME", help="name the commit, for example v1")
    parser.add_argument("--message", metavar="TEXT", help="of the commit (default: Upload CLT)")
    parser.add_argument("--license", metavar="NAME", help="licence for the card, for example mit or apache-2.0")
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="feature pages of this CLT, made by hf-clt features: push what circuit-tracer's front end reads of them",
    )
    return parser


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from ..hub import push_folder

    info = push_folder(
        options.folder,
        options.repo,
        private=options.private or None,
        revision=options.branch,
        commit_message=options.message,
        create_pr=options.pull_request,
        tag=options.tag,
        license=options.license,
        features=options.features,
    )
    print(f"The CLT is at {info.pr_url or info.commit_url}")
    print_next("info", options.repo)
