"""
Measures what a training step of a cross-layer transcoder costs, beside a dense step on the same machine.

Each side runs in fresh processes, in turns; every figure is the median of the timed steps. Examples:

  python -m benchmarks.steps --layers 12 --d-model 768 --num-features 6144 --tokens 512 --l0 32
  python -m benchmarks.steps --preset issue --json benchmarks/cpu.json
  python -m benchmarks.steps --layers 6 --d-model 256 --grow F k --plot growth.png
  python -m benchmarks.steps --model FOLDER --dataset text.jsonl --num-features 4096 --activation-fn batchtopk
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_clt.command import one_line_errors

from .cases import CASE_FIELDS, GROWTH, PRESETS, Case, grown_cases, preset_cases
from .measure import Source
from .output import check_folders
from .report import format_machine, format_table, plot_growth
from .run import run_case, run_harvest


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given comes from the preset, or from the defaults of Case
    )
    shape = parser.add_argument_group("shape")
    shape.add_argument("--layers", dest="num_layers", type=int, help="L (default 12)")
    shape.add_argument("--d-model", type=int, help="D (default 768)")
    shape.add_argument("--num-features", type=int, help="F per layer (default 6144)")
    shape.add_argument("--tokens", type=int, help="N per step (default 512)")
    shape.add_argument("--l0", type=int, help="active features per layer and token (default 32)")
    shape.add_argument("--activation-fn", help="relu, jumprelu (default), topk or batchtopk")
    shape.add_argument(
        "--k-scope", nargs="?", const="token", help="layer (default) or token: one budget over all layers"
    )
    shape.add_argument("--jumprelu-bandwidth", type=float, help="default: that of CLTConfig")
    shape.add_argument("--decoder-reach", type=int, help="target layers per source layer (default: all)")

    shape.add_argument("--dead", type=float, help="share of the features that are dead and revived (default 0)")
    shape.add_argument("--aux-k", type=int, help="of them, revived per token and layer (default: that of CLTConfig)")

    how = parser.add_argument_group("how")
    how.add_argument("--dtype", help="of the weights: float32 (default) or bfloat16")
    how.add_argument("--autocast", help="bfloat16: matrix products under torch.autocast")
    how.add_argument("--device", help="cpu (default), cuda or cuda:n")
    how.add_argument("--optimizer", help="of our side, as in scripts/train_clt.py (default adam)")
    how.add_argument("--learning-rate", type=float, help="default 1e-5, so that L0 stays")
    how.add_argument("--rounds", type=int, help="times that each side is measured, in turns (default 2)")
    how.add_argument("--steps", type=int, help="timed steps per round (default 5)")
    how.add_argument("--dense-steps", type=int, help="timed steps of the dense side (default: --steps)")
    how.add_argument("--warmup", type=int, help="steps before the timed ones (default 2)")
    how.add_argument("--seed", type=int, help="of weights and random activations (default 0)")
    how.add_argument("--no-dense", action="store_true", default=False, help="measure our side only")

    several = parser.add_argument_group("several shapes")
    several.add_argument("--preset", default=None, help=f"{', '.join(PRESETS)}; other options replace its values")
    several.add_argument("--grow", nargs="+", default=[], help=f"{', '.join(GROWTH)}: how cost grows with each")

    real = parser.add_argument_group("real activations")
    real.add_argument("--model", help="Hub name or folder of a language model; it gives L and D")
    real.add_argument("--dataset", help="Hub name, file or folder of text")
    real.add_argument("--model-dtype", help="float32, bfloat16 or float16 (default: that of its weights)")
    real.add_argument("--context-size", type=int, help="tokens per block (default 128)")
    real.add_argument("--prompts", type=int, help="blocks per forward pass of the language model (default 8)")
    real.add_argument("--end-to-end-steps", type=int, help="steps of the run with the trainer (default 40)")

    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, default=None, help="file to write all figures to")
    out.add_argument(
        "--plot", type=Path, default=Path("growth.png"), help="PNG that --grow draws (default growth.png)"
    )
    return parser


def benchmark(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    given = {name: options[name] for name in CASE_FIELDS if name in options}
    real = {name: options[name] for name in Source.__dataclass_fields__ if name in options}
    source = None
    if real:
        if not {"model", "dataset"} <= set(real):
            raise ValueError("real activations need both --model and --dataset; give the other one too")
        if options["preset"] or options["grow"]:
            raise ValueError("--model has a shape of its own; leave --preset and --grow out")
        source = Source(**real)
    if options["preset"] and options["grow"]:
        raise ValueError("--preset and --grow are two sets of shapes; give one of them")
    check_folders(options["json"], options["plot"] if options["grow"] else None)

    command = shlex.join(["python", "-m", "benchmarks.steps", *(sys.argv[1:] if argv is None else argv)])

    def say(text):
        print(text, file=sys.stderr)

    with TemporaryDirectory() as folder:
        activations = harvested = None
        if source is not None:
            say("harvesting")
            activations = str(Path(folder, "activations.safetensors"))
            case = Case(**given)
            harvested = run_harvest(source, case.tokens, case.device, activations)
            for name in ("num_layers", "d_model"):
                if given.setdefault(name, harvested[name]) != harvested[name]:
                    raise ValueError(f"{name}={given[name]} does not fit {source.model}, which has {harvested[name]}")
        groups = {axis: grown_cases(Case(**given), axis) for axis in options["grow"]}
        if not groups:
            groups = {"": preset_cases(options["preset"], given) if options["preset"] else [Case(**given)]}
        results = {}
        for axis, cases in groups.items():
            results[axis] = []
            for number, case in enumerate(cases, start=1):
                title = f"{f'{axis} ' if axis else ''}{number} of {len(cases)}"
                row, machine = run_case(
                    case,
                    dense=not options["no_dense"],
                    source=source,
                    activations=activations,
                    harvested=harvested,
                    say=lambda text, title=title: say(f"[{title}] {text}"),
                )
                results[axis].append(row)
                rows = [row for group in results.values() for row in group]
                if options["json"] is not None:  # after every row: a long run that is stopped keeps what it has
                    record = {"command": command, **machine, "rows": rows}
                    options["json"].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(format_machine(machine, rows[0]["rates"]))
    for group in results.values():
        print(format_table(group))
    if options["grow"]:
        plot_growth(results, options["plot"])
        print(f"plot: {options['plot']}")
    if options["json"] is not None:
        print(f"figures: {options['json']}")


@one_line_errors(RuntimeError, ImportError)
def main(argv: list[str] | None = None) -> int | None:
    return benchmark(argv)


if __name__ == "__main__":
    sys.exit(main())
