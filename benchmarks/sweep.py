"""
Trains many cross-layer transcoders on the same tokens, to choose settings by: every trial is a whole run of
[`CLTTrainer`], but the language model reads the text once for all of them.

  python benchmarks/sweep.py benchmarks/sweep_smollm2.yaml --records benchmarks/sweep.jsonl --table docs/sweep.md

A trial that is recorded already is not run again, so an interrupted sweep goes on where it stopped.
"""

import argparse
import gc
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.configuration_clt import CLT_CONFIG_HELP, CLTConfig
from hf_clt.files import as_json, format_number, one_line, write_text
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.hub.plots import BLUE, GREEN, ORANGE, PLOT_STYLE, VIOLET
from hf_clt.training.arguments import CLTTrainingArguments
from hf_clt.training.initial_config import build_config
from hf_clt.training.options import as_text
from hf_clt.training.parser import SettingsLoader, parse_train_args
from hf_clt.training.reporting import versions
from hf_clt.training.setup import num_decay_steps, usual_learning_rate
from hf_clt.training.trainer import CLTTrainer


MEASURED = ("nmse", "l0", "dead_fraction", "num_tokens", "nmse_per_layer", "l0_per_layer", "dead_fraction_per_layer")
COLORS = {"relu": GREEN, "jumprelu": BLUE, "topk": ORANGE, "batchtopk": VIOLET}


def read_yaml(path: str | Path, example: str) -> Any:
    """
    What a file of settings holds.

    Raises:
        ValueError: If there is no such file, or it is not YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a YAML file such as {example}")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=SettingsLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from None


def read_sweep(path: str | Path) -> list[dict]:
    """
    The trials of a sweep.

    Args:
        path: A YAML file with two keys. `base`: options of `scripts/train_clt.py`, the same for all trials. `groups`:
            per name further options, of which those that are lists are varied, all combinations of them.

    Returns:
        One dict per trial: `group`, `settings` (all its options) and `varied` (those of its group).

    Raises:
        ValueError: If it is no file, not of this form, or an option is wrong; the message names the group.
    """
    sweep = read_yaml(path, "benchmarks/sweep_smollm2.yaml")
    if not isinstance(sweep, dict) or set(sweep) != {"base", "groups"} or not isinstance(sweep["groups"], dict):
        raise ValueError(f"{path} must hold the keys base and groups; see benchmarks/sweep_smollm2.yaml")
    base = {name.replace("-", "_"): value for name, value in (sweep["base"] or {}).items()}
    trials = []
    for group, options in sweep["groups"].items():
        options = {name.replace("-", "_"): value for name, value in options.items()}
        lists = [value if isinstance(value, list) else [value] for value in options.values()]
        for values in itertools.product(*lists):
            varied = dict(zip(options, values, strict=True))
            trial = {"group": group, "settings": {**base, **varied}, "varied": varied}
            try:
                parse_train_args(arguments_of(trial["settings"]))
            except ValueError as error:
                raise ValueError(f"{path}, group {group}: {error}") from None
            trials.append(trial)
    return trials


def arguments_of(settings: dict) -> list[str]:
    """The options as a command line of `scripts/train_clt.py`."""
    return [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), as_text(value))]


def run_sweep(
    trials: list[dict], records: str | Path, measure: Callable[[CLTTrainer], dict] | None = None
) -> list[dict]:
    """
    Runs the trials that are not recorded yet, one after another, and appends a line to `records` after each.

    Args:
        trials: What [`read_sweep`] gives; all on the same language model.
        records: A JSONL file.
        measure: What else to record of a trained CLT, before its folder is removed.

    Returns:
        The records of all these trials: what [`read_sweep`] gives, all settings with their defaults as `resolved`,
        `metrics` (held out), `train_dead_fraction` (null before a whole window), `steps`, `tokens`, `seconds` and
        `versions`. A trial whose loss was not finite has `error` in the place of `metrics`.
    """
    records = Path(records)
    # An option that came later had its default.
    defaults = CLTTrainingArguments().to_dict()
    done = {as_key({**defaults, **record["resolved"]}): record for record in read_records(records)}
    runs = []
    for trial in trials:  # all of them before the first one starts
        args, config = as_run(trial["settings"])
        runs.append(({**trial, "resolved": resolve(args, config)}, args, config))
    harvester = tokenizer = None
    for number, (trial, args, config) in enumerate(runs, start=1):
        if as_key(trial["resolved"]) in done:
            continue
        print(f"[{number} of {len(trials)}] {trial['group']}: {describe(trial['varied'])}", flush=True)
        if harvester is None:
            model, tokenizer = load_language_model(
                args.model, dtype=args.model_dtype, device="cuda" if torch.cuda.is_available() else "cpu"
            )
            harvester = Harvester(model, config.feature_input_hook, config.feature_output_hook)
            remember(harvester)
        record = {**trial, **run_trial(args, config, measure, harvester=harvester, tokenizer=tokenizer)}
        append_record(records, record)
        done[as_key(trial["resolved"])] = record
        print(f"    {record.get('error') or summary(record)}", flush=True)
    return [{**done[as_key(trial["resolved"])], **trial} for trial, _, _ in runs]  # two groups may share a trial


def as_run(settings: dict) -> tuple[CLTTrainingArguments, CLTConfig]:
    """The run that these options of `scripts/train_clt.py` describe; raises ValueError if one is wrong."""
    args, config_kwargs = parse_train_args(arguments_of(settings))
    return args, build_config(args, config_kwargs)


def resolve(args: CLTTrainingArguments, config: CLTConfig) -> dict:
    """All settings of a run by name, those with their default values too."""
    found = {**args.to_dict(), "learning_rate": args.learning_rate or usual_learning_rate(config)}
    if args.lr_scheduler == "linear":
        found["decay_steps"] = num_decay_steps(args, config)
    return {**found, **{name: getattr(config, name) for name in CLT_CONFIG_HELP}}


def run_trial(
    args: CLTTrainingArguments, config: CLTConfig, measure: Callable[[CLTTrainer], dict] | None = None, **read_by: Any
) -> dict:
    """
    Trains a CLT in a folder that is removed again.

    Args:
        args, config: The run; `output_dir` is replaced.
        measure: What else to record of the trained CLT.
        read_by: `harvester` and `tokenizer` of a language model that is there, as of [`CLTTrainer`].

    Returns:
        What [`run_sweep`] records of a trial, from `metrics` (or `error`) on.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        trainer = CLTTrainer(args, config, **read_by)
        try:
            trainer.train()
            metrics = trainer.evaluate()
            outcome = {"metrics": {name: metrics[name] for name in MEASURED}}
            outcome |= measure(trainer) if measure is not None else {}
        except FloatingPointError as error:
            outcome = {"error": str(error)}
        outcome["train_dead_fraction"] = trained_dead_fraction(folder)
    outcome |= {"steps": trainer.step, "tokens": trainer.tokens_seen}
    outcome |= {"seconds": round(time.perf_counter() - start, 1), "versions": versions()}
    # Model, optimizer and Accelerator refer to each other: without a collection, trials pile up in memory.
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    return outcome


def remember(harvester: Harvester) -> None:
    """
    Makes a harvester keep what it has read, in host memory and in the dtype it was first asked for, and hand it out
    when the same extraction batch comes again.
    """
    read, kept = harvester.read, {}

    def read_once(batch, dtype=torch.float32):
        content = b"".join(batch[name].numpy().tobytes() for name in ("input_ids", "attention_mask", "counted"))
        key = hashlib.sha256(content).digest()
        if key not in kept:
            kept[key] = tuple(tensor.cpu() for tensor in read(batch, dtype))
        inputs, labels, total = kept[key]
        return inputs.to(dtype), labels.to(dtype), total

    harvester.read = read_once


def read_records(path: str | Path) -> list[dict]:
    """The lines of a record file; none if there is no such file. A half-written last line is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # a whole line ends with a newline


def append_record(path: Path, record: dict) -> None:
    """Adds a line, in place of a half-written last one; whatever happens meanwhile, the file is the old or the new."""
    lines = [as_json(line, indent=None) for line in [*read_records(path), record]]
    write_text(path, "".join(lines))


def as_key(settings: dict) -> str:
    return json.dumps(settings, sort_keys=True)


def trained_dead_fraction(folder: str | Path) -> float | None:
    """The last `dead_fraction` that the run logged."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
    return rows[-1]["dead_fraction"] if rows else None


def describe(varied: dict) -> str:
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in varied.items())


def summary(record: dict) -> str:
    metrics = record["metrics"]
    return f"NMSE {format_number(metrics['nmse'], '.4f')}, L0 {metrics['l0']:.0f}, dead {metrics['dead_fraction']:.1%}"


def format_sweep(records: list[dict]) -> str:
    """The records as Markdown: one table per group, in the order of the trials, the lowest NMSE in bold."""
    parts = []
    for group, members in itertools.groupby(records, key=lambda record: record["group"]):
        members = list(members)
        names = list(members[0]["varied"])
        found = [record["metrics"]["nmse"] for record in members if "metrics" in record]
        found = [nmse for nmse in found if nmse is not None]
        lines = [f"### {group}", "", "| " + " | ".join(name.replace("_", "-") for name in names)]
        lines[-1] += " | NMSE | L0 per layer | never fired, held out | dead, training |"
        lines.append("|" + "---|" * (len(names) + 4))
        for record in members:
            cells = [str(record["varied"][name]) for name in names]
            if "metrics" not in record:
                cells += ["not finite", "", "", ""]
            else:
                metrics, dead = record["metrics"], record["train_dead_fraction"]
                nmse = format_number(metrics["nmse"], ".4f")
                cells.append(f"**{nmse}**" if len(found) > 1 and metrics["nmse"] == min(found) else nmse)
                cells.append(f"{metrics['l0'] / len(metrics['l0_per_layer']):.1f}")
                cells.append(f"{metrics['dead_fraction']:.1%}")
                cells.append("" if dead is None else f"{dead:.1%}")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot_frontier(records: list[dict], path: str | Path) -> None:
    """Draws held-out NMSE against L0 per layer, a line per activation function, as PNG."""
    import matplotlib

    with matplotlib.rc_context(PLOT_STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, color in COLORS.items():
            points = sorted(
                (record["metrics"]["l0"] / len(record["metrics"]["l0_per_layer"]), record["metrics"]["nmse"])
                for record in records
                if record.get("metrics", {}).get("nmse") is not None
                and record["settings"].get("activation_fn", "jumprelu") == name
            )
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set(xlabel="active features per layer and token (L0)", ylabel="NMSE, held out")
        if axes.lines:
            axes.legend()
        figure.savefig(path, dpi=150)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="base settings and groups of trials")
    parser.add_argument("--records", type=Path, required=True, help="JSONL file, a line per finished trial")
    parser.add_argument("--table", type=Path, help="Markdown file to write the table to (default: print it)")
    parser.add_argument("--plot", type=Path, help="PNG file: NMSE against L0, a line per activation function")
    parser.add_argument("--groups", nargs="+", metavar="NAME", help="only these groups of the sweep")
    return parser


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    trials = read_sweep(options.sweep)
    if options.groups:
        known = {trial["group"] for trial in trials}
        for name in options.groups:
            if name not in known:
                raise ValueError(f"groups={name!r} is not in {options.sweep}; it has {', '.join(sorted(known))}")
        trials = [trial for trial in trials if trial["group"] in options.groups]
    try:
        records = run_sweep(trials, options.records)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the next trial", file=sys.stderr)
        return 130
    if options.plot is not None:
        plot_frontier(records, options.plot)
    if options.table is None:
        print(format_sweep(records))
    else:
        write_text(options.table, format_sweep(records))
        print(f"the table of {len(records)} trials is in {options.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["format_sweep", "plot_frontier", "read_sweep", "run_sweep"]
