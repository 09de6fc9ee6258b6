#!/usr/bin/env python
"""
Attribution graphs of prompts with circuit-tracer, and their scores, for a CLT of hf_clt or its per-layer transcoders.

Runs in circuit-tracer's environment (`make circuit-tracer`). Its transformers is older than the one that hf_clt
needs, so that this script imports nothing of hf_clt:

    .venv-circuit-tracer/bin/python scripts/attribute_clt.py quickstart/clt --model quickstart/model
"""

import argparse
import importlib.metadata
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import Graph, compute_graph_scores
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub


PROMPTS = ("The capital of France is", "The opposite of small is", "Water is made of hydrogen and")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VERSIONS = ("circuit-tracer", "nnsight", "torch", "transformers")


def in_old_form(model: str | Path, folder: str | Path) -> str:
    """
    Makes a copy of a language model that transformers 4 reads as it is meant, if transformers 5 saved it.

    transformers 4 does not know `rope_parameters` and would take its default `rope_theta`, without a word; nor does it
    know the tokenizer class `TokenizersBackend`. The weights are linked, not copied.

    Args:
        model: Folder of the language model, or its name on the Hub, which is given back as it is.
        folder: Empty folder for the copy.

    Returns:
        What to give to transformers 4: `folder`, or `model` where nothing has to be changed.

    Raises:
        ValueError: If the model has different rotary embeddings in different layers.
    """
    model, folder = Path(model).expanduser(), Path(folder)
    if not (model / "config.json").is_file():
        return str(model)
    config = json.loads((model / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    tokenizer_path = model / "tokenizer_config.json"
    tokenizer = json.loads(tokenizer_path.read_text()) if tokenizer_path.is_file() else {}
    new_tokenizer = tokenizer.get("tokenizer_class") == "TokenizersBackend"
    if rope is None and not new_tokenizer:
        return str(model)
    if rope is not None:
        # By layer type in Gemma 3, whose local layers transformers 4 gives a frequency of their own, and no scaling.
        local = rope.pop("sliding_attention", {})
        rope = rope.pop("full_attention", rope)
        if any(isinstance(value, dict) for value in rope.values()) or local.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_parameters in {model / 'config.json'} differ between layers in a way that transformers 4 names "
                "by architecture; save the model with transformers 4"
            )
        if local:
            config["rope_local_base_freq"] = local["rope_theta"]
        config["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
    if new_tokenizer:
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for path in model.iterdir():
        if path.name not in ("config.json", "tokenizer_config.json"):
            (folder / path.name).symlink_to(path.resolve())
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if tokenizer:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    return str(folder)


def check_readable(folder: Path) -> None:
    """
    Checks the `config.json` that hf_clt writes, if there is one, for what circuit-tracer would misread.

    Raises:
        ValueError: For topk, a skip connection, or a reach below the number of layers.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.get("activation_fn") == "topk":
        raise ValueError(
            f"activation_fn='topk' in {path}: circuit-tracer would take a ReLU; make a jumprelu CLT of it with "
            "hf-clt jumprelu"
        )
    if config.get("skip_connection"):
        raise ValueError(f"skip_connection=True in {path}: circuit-tracer would leave it out; train a CLT without")
    if (config.get("decoder_reach") or config.get("num_layers", 0)) < config.get("num_layers", 0):
        raise ValueError(
            f"decoder_reach={config['decoder_reach']} in {path}: circuit-tracer needs decoders that reach the last "
            "layer; convert it with hf-clt convert --to circuit-tracer, or circuit-tracer-plt for a reach of 1"
        )


def load_transcoders(name: str, dtype: torch.dtype = torch.float32, lazy: bool = True):
    """
    Transcoders from a folder, for which circuit-tracer has no function, or from the Hub.

    Args:
        name: A folder with a `config.yaml`, or a repository's name.
        dtype: Of the weights; circuit-tracer computes in it.
        lazy: Whether decoders stay in their files until they are needed.

    Raises:
        FileNotFoundError: If a folder has no `config.yaml`.
        ValueError: For a CLT in a folder that circuit-tracer would misread.
    """
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        return load_transcoder_from_hub(name, device=DEVICE, dtype=dtype, lazy_decoder=lazy)[0]
    described = yaml.safe_load((folder / "config.yaml").read_text())
    options = {key: described[key] for key in ("feature_input_hook", "feature_output_hook")}
    options |= {"scan": folder.name, "device": DEVICE, "dtype": dtype, "lazy_decoder": lazy}
    if described["model_kind"] == "cross_layer_transcoder":
        check_readable(folder)
        return load_clt(str(folder), **options)
    layers = range(len(list(folder.glob("layer_*.safetensors"))))
    paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in layers}
    return load_transcoder_set(paths, **options, lazy_encoder=False)


def with_bos(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt behind a special token, since circuit-tracer leaves position 0 out."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [first, *tokenizer(prompt, add_special_tokens=False).input_ids]


def describe(graph: Graph, tokens: list[int]) -> dict:
    """A graph's scores by circuit-tracer's own functions, its size, and the likeliest next token."""
    replacement, completeness = compute_graph_scores(graph)
    active = len(graph.active_features)
    return {
        "replacement_score": replacement,
        "completeness_score": completeness,
        "tokens": len(tokens),
        "active_features": active,
        "active_per_token_and_layer": active / (len(tokens) - 1) / graph.cfg.n_layers,
        "feature_nodes": len(graph.selected_features),
        "logit_nodes": len(graph.logit_targets),
        "likeliest": graph.logit_targets[0].token_str,
        "its_probability": graph.logit_probabilities[0].item(),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument(
        "clt", help="folder of a CLT or of per-layer transcoders in circuit-tracer's form, or a Hub name"
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of the language model")
    parser.add_argument("--prompt", dest="prompts", action="append", help="may be repeated; by default three of ours")
    parser.add_argument("--max-feature-nodes", type=int, help="features in a graph; by default all active ones")
    parser.add_argument("--max-n-logits", type=int, default=10, help="next tokens in a graph, at most")
    parser.add_argument("--desired-logit-prob", type=float, default=0.95, help="or fewer, if these sum up to this")
    parser.add_argument("--batch-size", type=int, default=64, help="features in one backward pass")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the language model and the CLT")
    parser.add_argument("--json", type=Path, help="adds the settings, versions and figures to this file")
    parser.add_argument("--save-graphs", type=Path, help="folder for graph_0.pt and so on, which Graph.from_pt reads")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    prompts = arguments.prompts or list(PROMPTS)
    settings = {
        name: getattr(arguments, name)
        for name in ("max_feature_nodes", "max_n_logits", "desired_logit_prob", "batch_size")
    }
    dtype = DTYPES[arguments.dtype]
    rows = []
    with tempfile.TemporaryDirectory() as work:
        try:
            transcoders = load_transcoders(arguments.clt, dtype)
            folder = in_old_form(arguments.model, work)
            model = ReplacementModel.from_pretrained_and_transcoders(
                folder, transcoders, backend="nnsight", device=DEVICE, dtype=dtype
            )
        except (OSError, ValueError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        for number, prompt in enumerate(prompts):
            start = time.perf_counter()
            tokens = with_bos(model.tokenizer, prompt)
            graph = attribute(tokens, model, **settings, verbose=sys.stderr.isatty())
            row = {"prompt": prompt, **describe(graph, tokens), "seconds": time.perf_counter() - start}
            rows.append(row)
            print(
                f"{prompt!r}: replacement score {row['replacement_score']:.3f}, completeness score "
                f"{row['completeness_score']:.3f}, {row['feature_nodes']:,} of {row['active_features']:,} active "
                f"features, next {row['likeliest']!r} ({row['its_probability']:.1%}), {row['seconds']:.0f} s",
                flush=True,
            )
            if arguments.save_graphs:
                arguments.save_graphs.mkdir(parents=True, exist_ok=True)
                graph.to_pt(str(arguments.save_graphs / f"graph_{number}.pt"))
    if arguments.json:
        found = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
        found[arguments.clt] = {
            "model": arguments.model,
            "dtype": arguments.dtype,
            **settings,
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "prompts": rows,
        }
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=2) + "\n")
        os.replace(temporary, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
