"""
Necessity and sufficiency: what becomes of the next token when the nodes that a graph calls most important are taken
out, and when they alone are left; beside as many others that write as much.
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attribution.frozen import freeze
from ..attribution.graph import AttributionGraph
from ..attribution.rows import decoder_rows
from ..folding import at_least_float32
from ..modeling_clt import CrossLayerTranscoder
from .graphs import graphs_of
from .live import respond, written_by
from .samples import BlockSkipped, Given, figure, ratio_figure


PARTS = (64, 32, 16, 8, 4)  # one in so many of a graph's features is taken, a point of the curves each
QUICK_PROMPTS = 8
FEWEST = 16  # features of a graph
NEAREST = 5  # in what they write, of which one is drawn for each important one


@torch.no_grad()
def necessity(clt: CrossLayerTranscoder, given: Given) -> dict:
    """
    Deletion and insertion curves over the most influential features of each prompt's graph, one in [`PARTS`] of them,
    beside as many, drawn from the rest, that write about as much (activation times the norm of the decoder row).

    What MLPs write is held at what the features, errors and biases of the prompt give, less what is taken out;
    attention and norms respond. *Deletion* takes features out; *insertion* leaves biases and these features alone,
    without errors. Curves are in agreement, 1 - ½ Σ |p - q| of the next token's probabilities, 0 to 1.

    Returns:
        `dict` of figures, samples are prompts: `deletion_top`, `deletion_others`, `insertion_top`, `insertion_others`,
        by share; `deletion_area` and `insertion_area`, the means over the shares of others - top and of top -
        others: 0 where the graph knows no more than chance; `insertion_all`, with all features of the graph;
        `others_size`, what the others write over what the top write (sum of norms).

    Raises:
        BlockSkipped: If no graph has [`FEWEST`] features.
    """
    curves, sizes = [], []
    found = [graph for graph in graphs_of(clt, given, QUICK_PROMPTS) if graph.num_features >= FEWEST]
    with clt.folded():
        bar = tqdm(found, "deleting and inserting", unit="prompt", disable=not given.progress)
        for number, graph in enumerate(bar):
            agreement, size = of_prompt(clt, given, graph, torch.Generator().manual_seed(given.seed + number))
            curves.append(agreement)
            sizes.append(size)
    if not curves:
        raise BlockSkipped(f"no prompt has a graph of {FEWEST} features")
    names = ("deletion_top", "deletion_others", "insertion_top", "insertion_others")
    by_name = dict(zip(names, torch.stack(curves)[:, :-1].unflatten(1, (4, -1)).unbind(1), strict=True))
    labels = [f"1/{part}" for part in PARTS]
    result = {
        name: {label: figure(point, given.seed) for label, point in zip(labels, values.T, strict=True)}
        for name, values in by_name.items()
    }
    for kind, sign in (("deletion", -1), ("insertion", 1)):
        area = sign * (by_name[f"{kind}_top"] - by_name[f"{kind}_others"]).mean(dim=1)
        result[f"{kind}_area"] = figure(area, given.seed)
    result["insertion_all"] = figure(torch.stack(curves)[:, -1], given.seed)
    return result | {"others_size": ratio_figure(*zip(*sizes, strict=True), given.seed)}


def of_prompt(
    clt: CrossLayerTranscoder, given: Given, graph: AttributionGraph, generator: torch.Generator
) -> tuple[Tensor, tuple[float, float]]:
    """
    The agreement of deletion of top and others, insertion of top and others, at each share, and insertion of all; and
    what others and top write.
    """
    n, device = graph.num_features, given.model.device
    hooks = clt.config.feature_input_hook, clt.config.feature_output_hook
    frozen = freeze(given.model, graph.input_ids, *hooks, dtype=at_least_float32(given.model.dtype))
    counts = [max(1, n // part) for part in PARTS]
    top = graph.influence()[:n].topk(counts[-1]).indices
    sizes = written_norms(clt, graph)
    others = alike(sizes, top, generator)
    sets = torch.zeros(2, len(counts), n)
    for number, nodes in enumerate((top, others)):
        for point, count in enumerate(counts):
            sets[number, point, nodes[:count]] = 1
    by_sets = written_by(clt, graph, torch.cat([sets.flatten(0, 1), torch.ones(1, n)])).to(device)
    whole = torch.stack([block.written for block in frozen.blocks])
    alone = torch.stack([decoder.bias.to(whole) for decoder in clt.decoders])[:, None].expand_as(whole).clone()
    if clt.config.skip_connection:
        alone += torch.stack(
            [block.read @ skip.weight.to(whole) for block, skip in zip(frozen.blocks, clt.skips, strict=True)]
        )
    alone[:, graph.info["cleared"]] = whole[:, graph.info["cleared"]]
    written = torch.cat([whole[None], whole - by_sets[:-1], alone + by_sets])
    log_p = respond(given.model, clt, graph.input_ids, written, held=True)[1]
    agreement = 1 - (log_p[1:].exp() - log_p[0].exp()).abs().sum(dim=1) / 2
    return agreement, (sizes[others].sum().item(), sizes[top].sum().item())


def written_norms(clt: CrossLayerTranscoder, graph: AttributionGraph) -> Tensor:
    """The norm of what each feature node writes to all its layers, (n,)."""
    layers, _, indices = graph.features.unbind(1)
    norms = torch.empty_like(graph.activations)
    for layer in layers.unique().tolist():
        at = (layers == layer).nonzero().squeeze(1)
        rows = decoder_rows(clt, layer, indices[at].to(clt.device), norms.dtype)
        norms[at] = rows.flatten(1).norm(dim=1).cpu()
    return norms * graph.activations


def alike(sizes: Tensor, nodes: Tensor, generator: torch.Generator) -> Tensor:
    """For each of some nodes another, drawn from the [`NEAREST`] in size that are not taken yet."""
    left = torch.ones(len(sizes), dtype=torch.bool)
    left[nodes] = False
    found = []
    for node in nodes.tolist():
        away = (sizes - sizes[node]).abs().masked_fill(~left, torch.inf)
        nearest = away.topk(min(NEAREST, int(left.sum())), largest=False).indices
        found.append(nearest[torch.randint(len(nearest), (1,), generator=generator)].item())
        left[found[-1]] = False
    return torch.tensor(found)


__all__ = ["necessity"]
