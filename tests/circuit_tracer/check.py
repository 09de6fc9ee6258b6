"""
Checks that circuit-tracer and SAELens read what hf_clt saves and pushes, and prints a Markdown table:

    make test-circuit-tracer        # makes their environment, and runs
    python -m tests.circuit_tracer.check --python .venv-circuit-tracer/bin/python

This half makes CLTs and what they compute, pushes them to a Hub on this machine, and starts the other half,
read_clts.py, in circuit-tracer's environment, which reads them there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from hf_clt import CrossLayerTranscoder
from hf_clt.harvest.harvester import Harvester
from hf_clt.importers import convert
from tests.hub.loopback_hub import LoopbackHub
from tests.reference import random_clt


ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-circuit-tracer" / "bin" / "python"
SHAPE = {"num_layers": 3, "d_model": 32, "num_features": 96}
PROMPT = "The capital of France is word1 word2 of word3 The word4 word5 word6"
# What circuit-tracer can express. Statistics of the activations are folded in on saving.
SAME = {
    "relu": {"activation_fn": "relu"},
    "jumprelu": {"activation_fn": "jumprelu"},
    "batchtopk": {"activation_fn": "batchtopk", "k": 8},
    "batchtopk_token": {"activation_fn": "batchtopk", "k": 8, "k_scope": "token"},
    "jumprelu_bfloat16": {"activation_fn": "jumprelu"},
    "tied_per_source": {"activation_fn": "relu", "decoder_tying": "per_source"},
    "tied_per_target": {"activation_fn": "jumprelu", "decoder_tying": "per_target"},
}
GAPS = {
    "topk": {"activation_fn": "topk", "k": 8},
    "reach_1": {"activation_fn": "jumprelu", "decoder_reach": 1},
    "reach_2": {"activation_fn": "jumprelu", "decoder_reach": 2},
    "skip": {"activation_fn": "relu", "skip_connection": True},
}


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of [`PROMPT`]'s words, saved to `folder`; 64 tokens, of which the first is special."""
    words = ["<bos>", "<unk>", "The", "capital", "of", "France", "is", *(f"word{i}" for i in range(57))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_language_model(folder: Path):
    """A random Llama of three layers with a `rope_theta` of its own and a word tokenizer, saved to `folder`."""
    tokenizer = make_tokenizer(folder)
    shape = {"hidden_size": SHAPE["d_model"], "num_hidden_layers": SHAPE["num_layers"], "intermediate_size": 64}
    shape |= {"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    rope = {"rope_theta": 100.0, "rope_type": "default"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder)
    tokens = torch.tensor([[0, *tokenizer(PROMPT).input_ids]])
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False), tokens


def make_clt(inputs, labels, model_name, name, fields) -> CrossLayerTranscoder:
    """A random CLT on normalised activations, of which about one feature in five is active."""
    clt = random_clt(double=False, **SHAPE, base_model_name_or_path=model_name, **fields)
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.bias -= 2
    if fields.get("decoder_tying") != "per_source":  # which statistics would untie
        statistics = (inputs.mean(0), inputs.std(0), labels.mean(0), labels.std(0))
        clt.set_normalization(*statistics)
    if fields["activation_fn"] == "batchtopk":
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            clt.train()(inputs + 0.3 * noise)  # the running threshold, which is a pre-activation of these tokens
    if name.endswith("bfloat16"):
        clt = clt.bfloat16()
    return clt.eval()


@torch.no_grad()
def what_it_computes(folder: Path, inputs, labels) -> dict[str, torch.Tensor]:
    """Features (L, N, F) at all positions, and the reconstruction (L, N, D) without the features of position 0."""
    found = {"inputs": inputs, "labels": labels}
    for dtype in (torch.float32, torch.float64):
        clt = CrossLayerTranscoder.from_pretrained(folder, dtype=dtype)
        given = inputs.to(dtype)
        acts = clt.encode(given)
        counted = acts.clone()
        counted[0] = 0
        bits = str(dtype).removeprefix("torch.")
        found[f"acts_{bits}"] = acts
        found[f"reconstruction_{bits}"] = (
            clt.decode(counted, given) if clt.config.skip_connection else clt.decode(counted)
        )
        if clt.config.skip_connection:
            found["skip"] = found[f"reconstruction_{bits}"] - clt.decode(counted, torch.zeros_like(given))
    return {name: tensor.transpose(0, 1) for name, tensor in found.items()}


def write(work: Path) -> None:
    """Everything that the other half reads, but for the Hub."""
    model, tokens = make_language_model(work / "language-model")
    inputs, labels = (found[0].clone() for found in Harvester(model)(tokens))
    logits = model(tokens).logits[0]
    (work / "expected").mkdir()
    cases = {}

    def add(name, kind, folder, inputs):
        found = what_it_computes(folder, inputs, labels) | {"tokens": tokens[0], "logits": logits}
        save_file(
            {key: tensor.contiguous() for key, tensor in found.items()}, work / "expected" / f"{name}.safetensors"
        )
        cases[name] = kind

    for name, fields in (SAME | GAPS).items():
        folder = work / "clts" / name
        make_clt(inputs, labels, "tester/language-model", name, fields).save_pretrained(folder)
        add(name, "same" if name in SAME else "gap", folder, inputs)
    clts = work / "clts"
    convert(clts / "reach_1", clts / "reach_1_plt", to_format="circuit-tracer-plt")
    add("reach_1_plt", "plt", clts / "reach_1", inputs)
    convert(clts / "reach_2", clts / "reach_2_padded", to_format="circuit-tracer")
    add("reach_2_padded", "same", clts / "reach_2", inputs)

    clt = random_clt(double=False, **SHAPE)
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.bias.fill_(-1)
    clt.save_pretrained(work / "clts" / "silent_end")
    silent = inputs.clone()
    silent[-1] = 0  # every pre-activation is the bias
    add("silent_end", "gap", work / "clts" / "silent_end", silent)
    (work / "cases.json").write_text(json.dumps(cases))


PUSH = """
import sys
from hf_clt.hub import push_folder
for name in sys.argv[2:]:
    push_folder(f"{sys.argv[1]}/clts/{name}", f"tester/{name}", private=True)
"""


def run(work: Path, python: Path) -> subprocess.CompletedProcess:
    """Writes, pushes, and has the other half read; its lines of JSON are the output."""
    write(work)
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "PYTHON"))}
    with LoopbackHub(work / "server") as hub:
        environment = keep | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(work / "home"),
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "CIRCUIT_TRACER_CACHE_DIR": str(work / "circuit-tracer"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        ours = environment | {"PYTHONPATH": str(ROOT)}
        names = [*SAME, "reach_2_padded"]
        subprocess.run([sys.executable, "-c", PUSH, work, *names], env=ours, check=True, timeout=600)
        command = [python, Path(__file__).with_name("read_clts.py"), work]
        theirs = environment | {"HF_HOME": str(work / "their-home")}
        return subprocess.run(command, env=theirs, capture_output=True, text=True, timeout=1800)


def as_tables(rows: list[dict]) -> str:
    """Two Markdown tables: the largest differences of each case, and what else was found."""
    differences, others = {}, []
    for row in rows:
        if "difference" not in row:
            others.append(row)
            continue
        entry = differences.setdefault(row["what"].partition(":")[0], {"count": 0, "passed": True})
        entry["count"] += 1
        entry["passed"] &= row["passed"]
        entry[row["tolerance"]] = max(row["difference"], entry.get(row["tolerance"], 0.0))
    columns = {1e-12: "float64", 1e-5: "float32", 1e-4: "float32, from the tokens on"}
    lines = [f"| CLT | comparisons | {' | '.join(columns.values())} | passed |", "|---|---:|---:|---:|---:|---|"]
    for case, entry in differences.items():
        figures = [f"{entry[column]:.1e}" if column in entry else "" for column in columns]
        lines.append(
            f"| {case} | {entry['count']} | {' | '.join(figures)} | {'yes' if entry['passed'] else '**no**'} |"
        )
    lines += ["", "| what | found | passed |", "|---|---|---|"]
    for what in dict.fromkeys(row["what"] for row in others):
        same = [row for row in others if row["what"] == what]
        found = {name: value for name, value in same[0].items() if name not in ("what", "how", "passed")}
        told = ", ".join(
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        )
        lines.append(f"| {what} | {told} | {'yes' if all(row['passed'] for row in same) else '**no**'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--python", type=Path, default=PYTHON, help="interpreter of circuit-tracer's environment")
    parser.add_argument("--json", type=Path, help="writes every comparison to this file")
    arguments = parser.parse_args()
    if not arguments.python.is_file():
        parser.error(f"{arguments.python} is missing; make circuit-tracer's environment with `make circuit-tracer`")
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        done = run(Path(work), arguments.python)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(as_tables(rows))
    print(f"\n{sum(row['passed'] for row in rows)} of {len(rows)} comparisons passed.")
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
