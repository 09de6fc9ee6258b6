"""The language model with what its MLPs write changed: many changes of one prompt in one forward pass."""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attribution.graph import AttributionGraph
from ..attribution.rows import decoder_rows
from ..harvest.sites import resolve_sites
from ..modeling_clt import CrossLayerTranscoder


TOKENS_AT_A_TIME = 512


@torch.no_grad()
def written_by(clt: CrossLayerTranscoder, graph: AttributionGraph, sets: Tensor) -> Tensor:
    """
    What sets of feature nodes write, (K, L, P, D), for K sets as factors of the nodes (K, n): 1 or True for those in
    it. The CLT has no normalisation apart (see [`folded`]).
    """
    layers, positions, indices = graph.features.unbind(1)
    factors = sets.to(graph.activations) * graph.activations
    written = factors.new_zeros(len(sets), graph.num_layers, len(graph.input_ids), clt.config.d_model)
    for layer in layers.unique().tolist():
        nodes = (layers == layer).nonzero().squeeze(1)
        features, place = indices[nodes].unique(return_inverse=True)
        rows = decoder_rows(clt, layer, features.to(clt.device), factors.dtype).cpu()
        for position in positions[nodes].unique().tolist():
            here = positions[nodes] == position
            at = rows[place[here]]
            parts = factors[:, nodes[here]] @ at.flatten(1)
            written[:, layer : layer + rows.shape[1], position] += parts.view(len(sets), *at.shape[1:])
    return written


@torch.no_grad()
def respond(
    model: PreTrainedModel, clt: CrossLayerTranscoder, input_ids: Tensor, written: Tensor, held: bool = False
) -> tuple[list[Tensor], Tensor]:
    """
    The language model, K times on a prompt (P,), with `written` (K, L, P, D) added to what its MLPs write; or `held`,
    in its place. All else responds as it will.

    Returns:
        What the CLT's features read, L of (K, P, D), and the next token's log-probabilities (K, V), on the CPU.
    """
    reads, writes = resolve_sites(model, clt.config.feature_input_hook, clt.config.feature_output_hook)
    head, seen, handles = model.get_output_embeddings(), [[] for _ in reads], []

    def read(layer, site, module, args, output):
        seen[layer].append((args[0] if site.io == "input" else output).cpu())

    def write(layer, module, args, output):
        change = part[:, layer].to(output)
        return change if held else output + change

    for layer, (source, target) in enumerate(zip(reads, writes, strict=True)):
        handles.append(model.get_submodule(source.path).register_forward_hook(partial(read, layer, source)))
        handles.append(model.get_submodule(target.path).register_forward_hook(partial(write, layer)))
    handles.append(head.register_forward_pre_hook(lambda module, args: (args[0][:, -1:],)))
    logits = []
    try:
        for part in written.split(max(1, TOKENS_AT_A_TIME // len(input_ids))):
            ids = input_ids.to(model.device).expand(len(part), -1)
            logits.append(model(input_ids=ids).logits[:, -1].cpu())
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(found) for found in seen], torch.cat(logits).double().log_softmax(dim=1)


__all__ = ["respond", "written_by"]
