"""
The half of the comparison of graphs that runs in circuit-tracer's environment: traces the cases that compare_graphs.py
wrote, with circuit-tracer's own attribute(). Imports nothing of hf_clt, which needs another transformers.

    .venv-circuit-tracer/bin/python tests/circuit_tracer/trace_graphs.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from safetensors.torch import save_file
from transformer_lens import loading_from_pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from attribute_clt import in_old_form, load_transcoders


def load_in_transformer_lens(folder: str, transcoders, dtype: torch.dtype) -> TransformerLensReplacementModel:
    """A language model from a folder; circuit-tracer's own loader takes names of TransformerLens' list alone."""
    language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = loading_from_pretrained.get_pretrained_model_config(folder, fold_ln=False, device="cpu", dtype=dtype)
    weights = loading_from_pretrained.get_pretrained_state_dict(folder, config, language_model, dtype=dtype)
    model = TransformerLensReplacementModel(config, AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False)
    model._configure_replacement_model(transcoders)
    return model


def trace(case: dict, folder: Path) -> dict[str, torch.Tensor]:
    """The graph of a case as tensors, its scores and what pruning keeps of it."""
    dtype = getattr(torch, case["dtype"])
    transcoders = load_transcoders(case["read"], dtype)
    language_model = in_old_form(case["model"], folder)
    if case["backend"] == "transformerlens":
        model = load_in_transformer_lens(language_model, transcoders, dtype)
    else:
        model = ReplacementModel.from_pretrained_and_transcoders(
            language_model, transcoders, backend="nnsight", device=torch.device("cpu"), dtype=dtype
        )
    options = {"batch_size": case["batch_size"], "max_feature_nodes": case["max_feature_nodes"]}
    graph = attribute(case["tokens"], model, **options)
    if case["scaled_embedding"]:
        # What it multiplies with the gradient at the output of the embedding are the weights, without Gemma's factor.
        end = graph.adjacency_matrix.shape[1] - len(graph.logit_targets)
        graph.adjacency_matrix[:, end - len(graph.input_tokens) : end] *= model.cfg.d_model**0.5
    found = {
        "input_ids": graph.input_tokens,
        "features": graph.active_features[graph.selected_features],
        "activations": graph.activation_values[graph.selected_features],
        "adjacency": graph.adjacency_matrix,
        "targets": torch.tensor([target.vocab_idx for target in graph.logit_targets]),
        "weights": graph.logit_probabilities,
        "scores": torch.tensor(compute_graph_scores(graph)),
        "kept": prune_graph(graph, 0.8, 0.98).node_mask,
    }
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def main() -> None:
    work = Path(sys.argv[1])
    (work / "graphs").mkdir()
    for number, case in enumerate(json.loads((work / "cases.json").read_text()).values()):
        folder = work / "old-form" / f"{number}"
        folder.mkdir(parents=True)
        save_file(trace(case, folder), work / "graphs" / f"{number}.safetensors")


if __name__ == "__main__":
    main()
