"""
Audits a CLT: what it explains, what the language model predicts through it, what its features are, and whether its
circuits are those of the language model; each figure beside those of two controls made on the spot. Writes audit.json
and a page, audit.html. Interrupted, the same command goes on; several processes share the work. Example:

  hf-clt audit quickstart/clt --dataset quickstart/text.jsonl --output quickstart/audit --quick
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..command import OneLineParser, one_line_errors, print_next
from ..device import chosen_device
from .heldout import MODEL_HELP, add_clt_options, add_text_options, load_named_clt, open_heldout, settings_of


if TYPE_CHECKING:
    from ..modeling_clt import CrossLayerTranscoder


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    add_clt_options(parser)
    helps = {
        "model": MODEL_HELP,
        "model_dtype": "Number format of the language model.",
        "eval_tokens": "Held-out tokens, from the first documents of the split. Blocks use as many as they need.",
        "store_batch_size_prompts": "Blocks of --context-size tokens that are read at a time.",
    }
    defaults = {"store_batch_size_prompts": 8, "eval_tokens": 8192, "model_dtype": "float32"}
    add_text_options(parser, defaults, helps)
    own = parser.add_argument_group("the audit")
    own.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for audit.json and the page")
    own.add_argument("--overwrite", action="store_true", help="begin anew what is in it")
    own.add_argument("--quick", action="store_true", help="measure on fewer samples")
    own.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    own.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="MODEL_OR_REPO",
        help="further CLTs of the same language model to measure, such as per-layer transcoders",
    )
    own.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts to trace, one per line (default: 64 of the package)"
    )
    own.add_argument("--update-card", action="store_true", help="put the figures on the card of the CLT, a folder")
    return parser


@one_line_errors(interrupted="the same command goes on after the last block that is done")
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from ..audit.page import for_card, format_audit, write_page
    from ..audit.prompts import PROMPTS
    from ..audit.run import run_audit
    from ..audit.samples import Given
    from ..hub.card import check_update, update_audit

    # What would fail at the end is found before any long work.
    processes, is_first = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    if processes > 1 and options.overwrite:
        raise ValueError(f"overwrite cannot be given to {processes} processes at once; remove {options.output} first")
    if options.dataset is None:
        raise ValueError("dataset is missing; give --dataset")
    if options.eval_tokens < 1:
        raise ValueError(f"eval_tokens={options.eval_tokens} is below 1; give some thousand tokens")
    if options.seed < 0:
        raise ValueError(f"seed={options.seed} is below 0; give 0 or more")
    if options.update_card:
        check_update(options.clt, vars(options))
    names = [Path(name).name for name in options.compare]
    if len(set(names)) < len(names):
        raise ValueError(f"compare={options.compare} has two CLTs of the same name; rename the folder of one")
    prompts = list(PROMPTS) if options.prompts is None else read_prompts(options.prompts)
    clt = load(options.clt, options)
    others = {
        name: check_other(options.clt, clt, given, load(given, options))
        for name, given in zip(names, options.compare, strict=True)
    }
    harvester, tokens = open_heldout(clt, options)
    heldout = list(tokens)
    tokens.close()
    given = Given(
        model=harvester.model,
        tokenizer=tokens.tokenizer,
        harvester=harvester,
        heldout=heldout,
        prompts=prompts,
        quick=options.quick,
        seed=options.seed,
        progress=is_first and not options.disable_progress_bar,
    )
    compare = {name: lambda other=other: other for name, other in others.items()}
    audit = run_audit(
        clt,
        given,
        options.output,
        settings_of(options, clt),
        compare,
        overwrite=options.overwrite,
        processes=processes,
        report=print if is_first else lambda line: None,
    )
    if not is_first:
        return
    print(format_audit(audit))
    page = options.output / "audit.html"
    write_page(audit, page)
    print(f"The figures are in {options.output / 'audit.json'}; open {page} in a browser.")
    if options.update_card:
        print("\n".join(update_audit(options.clt, for_card(audit))))
    print_next("trace", options.clt, "--prompt", "TEXT", "--output", "FOLDER")


def load(name: str, options: argparse.Namespace) -> "CrossLayerTranscoder":
    """A CLT on the options' device; on a CPU its weights stay in their files where that can be."""
    revision = options.revision if name == options.clt else None
    options = argparse.Namespace(**{**vars(options), "clt": name, "revision": revision})
    device = chosen_device(options.device)
    if device.type == "cpu" and options.clt_dtype is None:
        try:
            return load_named_clt(options, lazy=True)
        except (ValueError, RuntimeError):  # another system, or files that cannot be mapped
            pass
    return load_named_clt(options).to(device)


def check_other(
    name: str, clt: "CrossLayerTranscoder", other_name: str, other: "CrossLayerTranscoder"
) -> "CrossLayerTranscoder":
    """
    Gives `other`.

    Raises:
        ValueError: If it is a CLT of another language model.
    """
    from ..hub.card import is_hub_name

    for field in ("num_layers", "d_model"):
        own, found = getattr(clt.config, field), getattr(other.config, field)
        if own != found:
            raise ValueError(
                f"compare={other_name!r} has {field}={found}, and {name!r} {own}: give CLTs of one language model"
            )
    models = clt.config.base_model_name_or_path, other.config.base_model_name_or_path
    if models[0] != models[1] and all(map(is_hub_name, models)):
        raise ValueError(
            f"compare={other_name!r} is of {models[1]}, and {name!r} of {models[0]}: give CLTs of one language model"
        )
    return other


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, one per line."""
    if not path.is_file():
        raise ValueError(f"prompts={str(path)!r}: there is no such file; give one with a prompt per line")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={str(path)!r} has no line; give one prompt per line")
    return prompts
