"""
The command line: `hf-clt COMMAND ...`. Each command is a module of this folder with the words that it takes
(`make_parser`, and for `train` the fields of its dataclasses) and `main`.
"""

import importlib
import sys

from ..command import one_line_errors


COMMANDS = {
    "train": "train a CLT on a language model",
    "evaluate": "measure a CLT on held-out text",
    "audit": "whether a CLT can be trusted: its figures beside those of controls",
    "info": "what a CLT is, from its small files alone",
    "push": "publish a finished CLT on the Hub",
    "convert": "from the formats of several trainers, and to circuit-tracer's",
    "cache": "harvest activations to disk, to train many CLTs on them",
    "features": "pages that show what the features are",
    "trace": "the attribution graph of a prompt",
    "finish": "train a CLT's decoders to predict what its language model predicts",
    "jumprelu": "make a topk or batchtopk CLT a jumprelu CLT",
    "estimate": "memory and time of a training, before it is started",
}
USAGE = f"""\
usage: hf-clt COMMAND ...

Train, measure and publish cross-layer transcoders (CLTs).

{chr(10).join(f"  {name:<9} {text}" for name, text in COMMANDS.items())}

hf-clt COMMAND --help explains a command. On several processes, `accelerate launch ... -m hf_clt COMMAND ...`.
"""


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    """
    Runs the command that the first word names with the words after it.

    Returns:
        `int`: The exit status: that of the command; 2 for a word that is no command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if words and words[0] == "--version":
        print(f"hf_clt {importlib.import_module('hf_clt').__version__}")
        return 0
    if not words:
        raise ValueError(f"a command is missing; give one of {', '.join(COMMANDS)} (hf-clt --help)")
    if words[0] not in COMMANDS:
        raise ValueError(f"{words[0]!r} is no command; give one of {', '.join(COMMANDS)} (hf-clt --help)")
    command = importlib.import_module(f"hf_clt.commands.{words[0]}")
    before = sys.argv
    sys.argv = [f"hf-clt {words[0]}", *words[1:]]  # the command's --help and a model card name the program by it
    try:
        return command.main(words[1:])
    finally:
        sys.argv = before


__all__ = ["COMMANDS", "main"]
