"""
How far the graphs of a CLT tell the truth.

    python -m benchmarks.graph_truth --model LM --dataset TEXT --output FOLDER

Trains a CLT and per-layer transcoders of as many weights on the same tokens, and takes a random CLT with the same L0
beside them. For each and each prompt: the two scores, the share that belongs to no node, and what comes of ablating
the strongest features in the language model (see [`hf_clt.attribution.verify`]). Writes the CLT's pruned graphs.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder, attribute
from hf_clt.command import one_line_errors
from hf_clt.device import chosen_device
from hf_clt.files import write_json
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.training.reporting import versions

from .machine import device_name, peak_memory, reset_peak_memory, synchronize


PROMPTS = (
    "The capital of the state containing Dallas is",
    "The opposite of hot is",
    "When Mary and John went to the store, John gave a drink to",
)


def train(options, harvester: Harvester, tokenizer, name: str, num_features: int, reach: int | None) -> tuple:
    """A CLT that was trained for the given updates, and its metrics on held-out text."""
    prompts = 8 if options.device == "cpu" else 256
    args = CLTTrainingArguments(
        store_batch_size_prompts=prompts, n_batches_in_buffer=max(2, (1536 if prompts > 8 else 64) // prompts),
        normalization_estimation_batches=max(1, 256 // prompts),
        model=options.model, dataset=options.dataset, device=options.device, output_dir=str(options.output / name),
        batch_size=options.batch_size, training_steps=options.updates, learning_rate=options.learning_rate,
        log_interval=100, eval_tokens=options.eval_tokens, eval_interval=0, eval_replacement=True,
        checkpoint_interval=0, overwrite_output_dir=True, disable_progress_bar=True,
    )  # fmt: skip
    config = CLTConfig(
        num_layers=harvester.num_layers, d_model=harvester.d_model, num_features=num_features, k=options.k,
        activation_fn="batchtopk", decoder_reach=reach,
    )  # fmt: skip
    trainer = CLTTrainer(args, config, harvester=harvester, tokenizer=tokenizer)
    trainer.train()
    clt = CrossLayerTranscoder.from_pretrained(options.output / name, device_map=options.device).eval()
    return clt, trainer.last_evaluation[1], trainer


@torch.no_grad()
def random_clt(like: CrossLayerTranscoder, inputs: torch.Tensor) -> CrossLayerTranscoder:
    """
    A CLT of the same shape with random weights: encoders of normalised inputs (N, L, D), decoders as large as those of
    `like`; its thresholds give it the L0 of its k on these inputs.
    """
    torch.manual_seed(0)
    clt = CrossLayerTranscoder(like.config).to(like.device)
    for s, encoder in enumerate(clt.encoders):
        mean, spread = inputs[:, s].mean(dim=0), inputs[:, s].std(dim=0).clamp_min(1e-6)
        encoder.weight.copy_(torch.randn_like(encoder.weight) / spread / clt.config.d_model**0.5)
        encoder.bias.copy_(-encoder.weight @ mean)
        trained = like.decoders[s].weight
        clt.decoders[s].weight.copy_(torch.randn_like(trained) * trained.std())
    clt.train()(inputs)
    return clt.eval()


def graphs_of(options, name: str, clt: CrossLayerTranscoder, model, tokenizer) -> list[dict]:
    rows = []
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        reset_peak_memory(model.device)
        begin = time.perf_counter()
        graph = attribute(model, clt, ids, tokenizer=tokenizer, max_feature_nodes=options.max_feature_nodes)
        synchronize(model.device)
        seconds = time.perf_counter() - begin
        checked = graph.verify(model, clt, options.verify)
        row = {"clt": name, "prompt": prompt, "tokens": ids.numel(), "features": graph.info["active_features"]}
        row |= {"nodes": graph.num_features, "seconds": seconds, "phases": graph.info["seconds"], **graph.scores()}
        row |= {"outside": sum(graph.outside().values()), "peak_bytes": peak_memory(model.device)}
        row |= {"frozen_error": checked["frozen_error"], "spearman": checked["spearman"]}
        rows.append(row)
        print(f"{name:12}{prompt[:34]:36}{row['features']:7,} features {seconds:7.2f} s  replacement "
              f"{row['replacement']:.3f}  completeness {row['completeness']:.3f}  outside {row['outside']:.3f}  "
              f"frozen error {row['frozen_error']:.1e}  Spearman {row['spearman']:.3f}", flush=True)  # fmt: skip
        if name == "clt":
            pruned = graph.prune()
            pruned.save(options.output / f"graph-{number}")
    return rows


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub name or folder of the language model")
    parser.add_argument("--dataset", required=True, help="Hub name, file or folder of text")
    parser.add_argument("--output", required=True, type=Path, help="folder for CLTs and graphs")
    parser.add_argument("--json", type=Path, default=Path("graph_truth.json"), help="file for all figures")
    parser.add_argument("--device", help="default: a GPU where there is one")
    for name, default in (
        ("num-features", 2048), ("k", 16), ("batch-size", 4096), ("updates", 500), ("eval-tokens", 16384),
        ("verify", 20), ("max-feature-nodes", 8192),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default 0.001")
    options = parser.parse_args(argv)
    device = chosen_device(options.device)
    options.device = str(device)
    # The language model is in float32 for graphs; training reads it in bfloat16 on a GPU.
    rows = {"device": device_name(options.device), "versions": versions()}
    rows |= {"options": {name: str(value) for name, value in vars(options).items() if name not in ("output", "json")}}
    rows |= {"trainings": [], "graphs": []}
    harvested, tokenizer = load_language_model(
        options.model, dtype="bfloat16" if device.type == "cuda" else "float32", device=device
    )
    harvester = Harvester(harvested)
    model, _ = load_language_model(options.model, dtype="float32", device=device)
    num_layers = harvester.num_layers
    # As many weights: F (L (L + 1) / 2 + L) D for a CLT, 2 F L D for per-layer transcoders.
    wide = options.num_features * (num_layers + 3) // 4
    for name, num_features, reach in (("clt", options.num_features, None), ("per-layer", wide, 1)):
        begin = time.perf_counter()
        clt, metrics, trainer = train(options, harvester, tokenizer, name, num_features, reach)
        seconds = time.perf_counter() - begin
        figures = {key: metrics[key] for key in ("nmse", "l0", "dead_fraction", "ce_recovered", "kl")}
        row = {"clt": name, "num_features": num_features, "weights": clt.num_parameters(), "seconds": seconds}
        rows["trainings"].append(row | figures)
        print(json.dumps(rows["trainings"][-1]), flush=True)
        rows["graphs"] += graphs_of(options, name, clt, model, tokenizer)
        write_json(options.json, rows)
        if name == "clt":
            read = Harvester(model)
            ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
            inputs = torch.cat([read(prompt)[0][0, 1:] for prompt in ids])
            rows["graphs"] += graphs_of(options, "random", random_clt(clt, inputs), model, tokenizer)
        del clt, trainer
    write_json(options.json, rows)
    print(f"figures: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
