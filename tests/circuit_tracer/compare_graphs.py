"""
Checks that hf_clt's attribution graphs are circuit-tracer's, and prints a Markdown table:

    make test-circuit-tracer        # makes its environment, and runs this after the check of files
    python -m tests.circuit_tracer.compare_graphs --python .venv-circuit-tracer/bin/python

The same language model, CLT and prompt in both: random language models of several architectures, and SmolLM2 with the
quickstart's CLT where that was made. circuit-tracer's half is trace_graphs.py, in its own environment.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hf_clt import CrossLayerTranscoder, attribute
from hf_clt.attribution import AttributionGraph
from hf_clt.harvest.harvester import Harvester
from hf_clt.importers import convert
from tests.circuit_tracer.check import PROMPT, PYTHON, ROOT, make_clt, make_tokenizer


STREAM, MLP = ("hook_resid_mid", "hook_mlp_out"), ("mlp.hook_in", "mlp.hook_out")
SHAPE = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
# By architecture: its fields, circuit-tracer's backend that loads it, and the hooks that this one knows there.
ARCHITECTURES = {
    "llama": (GROUPED, "nnsight", [STREAM, MLP]),
    "gemma2": (GROUPED | {"sliding_window": 4}, "nnsight", [STREAM]),
    "gemma3_text": (GROUPED | {"sliding_window": 4}, "nnsight", [STREAM, ("mlp.hook_in", "hook_mlp_out")]),
    "qwen3": (GROUPED, "nnsight", [MLP]),
    "gpt2": ({"n_layer": 3, "n_embd": 32, "n_head": 4, "n_ctx": 1024}, "transformerlens", [STREAM, MLP]),
    "qwen2": (GROUPED, "transformerlens", [STREAM, MLP]),
    "gpt_neox": (SHAPE, "transformerlens", [MLP]),
    "phi": (SHAPE, "transformerlens", [MLP]),
}
KINDS = {  # on the first architecture; on all others the first
    "jumprelu": {"activation_fn": "jumprelu"},
    "batchtopk": {"activation_fn": "batchtopk", "k": 8},
    "relu, tied per source": {"activation_fn": "relu", "decoder_tying": "per_source"},
    "per-layer": {"activation_fn": "jumprelu", "decoder_reach": 1},
}
# Edges relative to the row's largest, activations and probabilities to the largest of all. Random models compute in
# float64, but for their norms and circuit-tracer's edges; SmolLM2 in float32.
LIMITS = {"edges": 1e-4, "values": 1e-4, "scores": 1e-5, "pruned": 0}
BATCH, QUEUE = 8, 4  # circuit-tracer ranks features anew after QUEUE batches
QUICKSTART_PROMPT = "The capital of the state containing Dallas is"


def make_random(architecture: str, fields: dict, folder: Path) -> list[int]:
    """A random language model, whose norms and biases are random too, with a tokenizer; the prompt's ids."""
    tokenizer = make_tokenizer(folder)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, initializer_range=0.3, **ids, **fields)
        )
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return [0, *tokenizer(PROMPT).input_ids]


def write(work: Path, quickstart: Path) -> dict[str, dict]:
    """Language models, CLTs, and the list of cases for circuit-tracer; SmolLM2 only where the quickstart is."""
    cases = {}

    def add(name, model, clt, tokens, read=None, **options):
        usual = {"dtype": "float64", "backend": "nnsight", "max_feature_nodes": None, "scaled_embedding": False}
        paths = {"model": str(model), "clt": str(clt), "read": str(read or clt)}
        cases[name] = {**paths, "tokens": tokens, "batch_size": BATCH, **usual, **options}

    for architecture, (fields, backend, all_hooks) in ARCHITECTURES.items():
        folder = work / "models" / architecture
        tokens = make_random(architecture, fields, folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        for hooks in all_hooks:
            inputs, labels = (found[0].clone() for found in Harvester(model, *hooks)(torch.tensor([tokens])))
            for kind, made in list(KINDS.items())[: None if architecture == "llama" else 1]:
                clt = work / "clts" / f"{len(cases)}"
                made = {**made, "feature_input_hook": hooks[0], "feature_output_hook": hooks[1]}
                make_clt(inputs, labels, "random", kind, made).save_pretrained(clt)
                read = clt
                if kind == "per-layer":
                    read = clt.with_name(f"{clt.name}-plt")
                    convert(clt, read, to_format="circuit-tracer-plt")
                options = {"backend": backend, "scaled_embedding": architecture == "gemma3_text"}
                add(f"{architecture}, {' to '.join(hooks)}, {kind}", folder, clt, tokens, read, **options)
    first = next(iter(cases.values()))
    cases[f"the first, {2 * BATCH * QUEUE} features chosen"] = first | {"max_feature_nodes": 2 * BATCH * QUEUE}
    if (quickstart / "clt").is_dir():
        folder = quickstart / "model"
        tokens = [0, *AutoTokenizer.from_pretrained(folder)(QUICKSTART_PROMPT).input_ids]
        options = {"dtype": "float32", "batch_size": 64}
        add("SmolLM2-135M, quickstart's CLT", folder.resolve(), (quickstart / "clt").resolve(), tokens, **options)
    (work / "cases.json").write_text(json.dumps(cases))
    return cases


def trace(case: dict) -> AttributionGraph:
    """The graph of a case by hf_clt."""
    dtype = getattr(torch, case["dtype"])
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype).eval().requires_grad_(False)
    clt = CrossLayerTranscoder.from_pretrained(case["clt"], dtype=dtype)
    options = {"max_feature_nodes": case["max_feature_nodes"], "rank_every": QUEUE * case["batch_size"]}
    return attribute(model, clt, torch.tensor(case["tokens"]), dtype=dtype, **options)


def compare(name: str, ours: AttributionGraph, theirs: dict[str, torch.Tensor]) -> dict:
    """A row of the table; `wrong` lists what is not the same."""
    row = {"case": name, "features": ours.num_features, "wrong": []}
    if not torch.equal(ours.input_ids, theirs["input_ids"]):
        row["wrong"].append("prompt")
    if not torch.equal(ours.features, theirs["features"]):
        row["wrong"].append("features")
    if [target.token for target in ours.targets] != theirs["targets"].tolist():
        row["wrong"].append("targets")
    if row["wrong"]:
        return row
    edges, expected = ours.adjacency().double(), theirs["adjacency"].double()
    largest = expected.abs().amax(dim=1, keepdim=True)
    row["edges"] = ((edges - expected).abs() / largest.clamp_min(1e-30)).max().item()
    found = torch.cat([ours.activations, ours.target_weights]).double()
    values = torch.cat([theirs["activations"], theirs["weights"]]).double()
    row["values"] = ((found - values).abs().max() / values.abs().max()).item()
    scores = ours.scores()
    row["replacement"], row["completeness"] = scores["replacement_of_nodes"], scores["completeness_of_nodes"]
    row["scores"] = (torch.tensor([row["replacement"], row["completeness"]]) - theirs["scores"]).abs().max().item()
    kept = {tuple(node) for node in ours.features[theirs["kept"][: ours.num_features]].tolist()}
    row["pruned"] = len(kept ^ {tuple(node) for node in ours.prune(0.8, 0.98).features.tolist()})
    row["kept"] = len(kept)
    row["wrong"] += [what for what, limit in LIMITS.items() if not row[what] <= limit]
    return row


def run(work: Path, python: Path, quickstart: Path) -> list[dict]:
    """
    Traces all cases in both environments, and compares.

    Raises:
        RuntimeError: If circuit-tracer's half fails, with what it wrote.
    """
    cases = write(work, quickstart)
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "PYTHON"))}
    environment = keep | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, Path(__file__).with_name("trace_graphs.py"), work]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"trace_graphs.py ended with status {done.returncode}: {done.stderr[-3000:]}")
    results = Path(work) / "graphs"
    return [
        compare(name, trace(case), load_file(results / f"{number}.safetensors"))
        for number, (name, case) in enumerate(cases.items())
    ]


def as_table(rows: list[dict]) -> str:
    """A Markdown table: sizes, scores, and the largest differences."""
    lines = ["| language model, hooks, CLT | features | replacement, completeness | edges | scores | pruned | same |"]
    lines.append("|---|---:|---|---:|---:|---|---|")
    for row in rows:
        same = "**no**: " + ", ".join(row["wrong"]) if row["wrong"] else "yes"
        if "edges" not in row:
            lines.append(f"| {row['case']} | {row['features']} | | | | | {same} |")
            continue
        figures = f"{row['replacement']:.4f}, {row['completeness']:.4f} | {row['edges']:.1e} | {row['scores']:.1e}"
        pruned = f"{row['kept']} kept, {row['pruned']} differ"
        lines.append(f"| {row['case']} | {row['features']:,} | {figures} | {pruned} | {same} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--python", type=Path, default=PYTHON, help="interpreter of circuit-tracer's environment")
    parser.add_argument("--quickstart", type=Path, default=ROOT / "quickstart", help="folder with model and clt")
    arguments = parser.parse_args()
    if not arguments.python.is_file():
        parser.error(f"{arguments.python} is missing; make circuit-tracer's environment with `make circuit-tracer`")
    disable_progress_bar()
    if not (arguments.quickstart / "clt").is_dir():
        print(f"{arguments.quickstart} has no CLT, so that SmolLM2 is left out; make it with `make quickstart`")
    with tempfile.TemporaryDirectory() as work:
        rows = run(Path(work), arguments.python, arguments.quickstart)
    print(as_table(rows))
    right = sum(not row["wrong"] for row in rows)
    print(f"\n{right} of {len(rows)} graphs are circuit-tracer's.")
    return int(right < len(rows))


if __name__ == "__main__":
    sys.exit(main())
