"""
Attribution graphs: seconds and memory beside circuit-tracer's on the same language model, CLT and prompt, in turns;
and hf_clt's alone against the number of tokens and of features.

    python -m benchmarks.attribution --tracer .venv-circuit-tracer/bin/python --json attribution.json --plot growth.png

Every graph is made in a process of its own, twice, and the second time counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clt import CLTConfig, CrossLayerTranscoder, attribute
from hf_clt.command import one_line_errors
from hf_clt.hub.plots import BLUE, ORANGE
from hf_clt.importers import convert
from hf_clt.training.setup import prepare_cpu

from .machine import device_name, memory_in_use, peak_memory, reset_peak_memory, versions
from .output import align, check_folders, draw_figure


PROMPTS = ("The capital of France is", "The capital of the state containing Dallas is")
CPU = torch.device("cpu")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("quickstart/model"), help="folder of the language model")
    parser.add_argument("--clt", type=Path, default=Path("quickstart/clt"), help="folder of the CLT")
    parser.add_argument("--tracer", type=Path, help="Python of circuit-tracer's environment; without it ours alone")
    parser.add_argument("--rounds", type=int, default=2, help="of the comparison (default 2)")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8, 32, 128, 512], help="lengths, ours alone")
    parser.add_argument("--text", default="quickstart/text.jsonl", help="JSON lines with a text, of those")
    parser.add_argument("--nodes", type=int, nargs="*", default=[250, 1000, 4000], help="features, of 32 tokens")
    parser.add_argument("--json", type=Path, help="file to write the figures to, after each")
    parser.add_argument("--plot", type=Path, help="PNG of time and memory against tokens and features")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in the process of one measurement: what to measure
    return parser


def measure(model: str, clt: str, tokens: list[int], nodes: int | None) -> dict:
    """A graph made twice in this process: seconds of the second, and the peak of both in bytes, less model and CLT."""
    prepare_cpu()
    language_model = AutoModelForCausalLM.from_pretrained(model).eval().requires_grad_(False)
    transcoder = CrossLayerTranscoder.from_pretrained(clt)
    for parameter in [*language_model.parameters(), *transcoder.parameters()]:
        parameter.sum()  # so that it is in memory, and not in its file
    reset_peak_memory(CPU)
    before = memory_in_use(CPU)
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        graph = attribute(language_model, transcoder, torch.tensor(tokens), max_feature_nodes=nodes)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    scores = graph.scores()
    return {
        "features": graph.num_features,
        "active": graph.info["active_features"],
        "targets": len(graph.targets),
        "scores": [scores["replacement_of_nodes"], scores["completeness_of_nodes"]],
        "seconds": wall,
        "cpu_seconds": cpu,
        "phases": graph.info["seconds"],
        "bytes": peak_memory(CPU) - before,
    }


def in_process(command: list) -> dict:
    """The JSON that a process prints in its last line, with the machine's load before it began."""
    load = os.getloadavg()[0]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[1]} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "load_before": load}


def ours(model: Path, clt: Path, tokens: list[int], nodes: int | None = None) -> dict:
    what = json.dumps({"model": str(model), "clt": str(clt), "tokens": tokens, "nodes": nodes})
    return in_process([sys.executable, "-m", "benchmarks.attribution", "--one", what])


def theirs(python: Path, model: Path, transcoders: Path, tokens: list[int]) -> dict:
    script = Path(__file__).with_name("attribution_theirs.py")
    return in_process([python, script, model, transcoders, ",".join(map(str, tokens))])


def make_per_layer(clt: Path, folder: Path) -> tuple[Path, Path]:
    """Per-layer transcoders: a CLT's features, and what they write to their own layer; also as circuit-tracer's."""
    full = CrossLayerTranscoder.from_pretrained(clt)
    own = CrossLayerTranscoder(CLTConfig.from_dict({**full.config.to_dict(), "decoder_reach": 1}))
    weights = {name: t[:, :1] if t.ndim == 3 else t for name, t in full.state_dict().items()}  # decoders are (F, J, D)
    own.load_state_dict(weights)
    own.save_pretrained(folder / "reach_1")
    convert(folder / "reach_1", folder / "plt", to_format="circuit-tracer-plt")
    return folder / "reach_1", folder / "plt"


def run(argv: list[str] | None) -> None:
    options = make_parser().parse_args(argv)
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    check_folders(options.json, options.plot)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompts = {prompt: [first, *tokenizer(prompt, add_special_tokens=False).input_ids] for prompt in PROMPTS}
    record = {"device": device_name("cpu"), "versions": versions(), "compared": [], "by_tokens": [], "by_nodes": []}

    def keep() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as work:
        if options.tracer is not None:
            kinds = {"CLT": (options.clt, options.clt), "per-layer": make_per_layer(options.clt, Path(work))}
            cases = [(kind, prompt) for prompt in prompts for kind in kinds]
            record["compared"] = [
                {"kind": kind, "prompt": prompt, "tokens": len(prompts[prompt]), "ours": [], "theirs": []}
                for kind, prompt in cases
            ]
            for _ in range(options.rounds):
                for row in record["compared"]:
                    mine, its = kinds[row["kind"]]
                    row["ours"].append(ours(options.model, mine, prompts[row["prompt"]]))
                    row["theirs"].append(theirs(options.tracer, options.model, its, prompts[row["prompt"]]))
                    keep()
                    print(as_table(record), flush=True)
        long = [first]
        with open(options.text, encoding="utf-8") as lines:
            while len(long) < max(options.tokens, default=32):
                long += tokenizer(json.loads(next(lines))["text"], add_special_tokens=False).input_ids
        for part, pairs in (
            ("by_tokens", [(count, 1000) for count in options.tokens]),
            ("by_nodes", [(32, nodes) for nodes in options.nodes]),
        ):
            for count, nodes in pairs:
                found = ours(options.model, options.clt, long[:count], nodes)
                record[part].append({"tokens": count, "nodes": nodes, **found})
                keep()
                print(f"{count} tokens, {found['features']:,} features: {found['seconds']:.1f} s", flush=True)
    if options.plot is not None:
        plot(record, options.plot)


def as_table(record: dict) -> str:
    """The comparison: medians of the rounds."""
    rows = [["", "tokens", "features", "ours", "theirs", "ratio", "CPU ratio", "ours, MB", "theirs, MB"], None]
    for row in record["compared"]:
        sides = [row["ours"], row["theirs"]]
        if not all(sides):
            continue
        wall, cpu, size = (
            [statistics.median(run[name] for run in side) for side in sides]
            for name in ("seconds", "cpu_seconds", "bytes")
        )
        cells = [
            row["kind"],
            str(row["tokens"]),
            f"{row['ours'][0]['features']:,}",
            f"{wall[0]:.2f} s",
            f"{wall[1]:.1f} s",
        ]
        cells += [f"{wall[1] / wall[0]:.1f}", f"{cpu[1] / cpu[0]:.1f}", *(f"{value / 1e6:.0f}" for value in size)]
        rows.append(cells)
    return align(rows)


def plot(record: dict, path: Path) -> None:
    """Seconds and peak memory of ours against tokens and against features."""
    with draw_figure(path, (9.0, 3.6)) as figure:
        panels = figure.subplots(1, 2)
        for panel, part, name, label in (
            (panels[0], "by_tokens", "tokens", "tokens (1,000 features)"),
            (panels[1], "by_nodes", "features", "features of 32 tokens"),
        ):
            rows = record[part]
            memory = panel.twinx()
            panel.plot([row[name] for row in rows], [row["seconds"] for row in rows], "o-", color=BLUE)
            memory.plot([row[name] for row in rows], [row["bytes"] / 1e9 for row in rows], "s--", color=ORANGE)
            panel.set_xscale("log")
            panel.set_xticks([row[name] for row in rows], [f"{row[name]:,}" for row in rows])
            panel.minorticks_off()
            panel.set_xlabel(label)
            panel.set_ylabel("seconds", color=BLUE)
            memory.set_ylabel("GB beyond model and CLT", color=ORANGE)
            panel.set_ylim(0, None)
            memory.set_ylim(0, None)
            memory.grid(visible=False)


@one_line_errors()
def main(argv: list[str] | None = None) -> int | None:
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
