"""`attribute`: from a prompt to its graph."""

import time
from collections.abc import Sequence
from operator import index
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..device import free_memory
from ..evaluation.replacement import check_layer_by_layer
from ..files import format_size
from ..harvest.harvester import Harvester, check_fit
from ..modeling_clt import CrossLayerTranscoder
from .frozen import FrozenModel, freeze
from .graph import AttributionGraph, FeatureTarget, Target, TokenTarget, influences
from .rows import RESTS, Seeds, Sources, feature_seeds, find_sources, logit_seeds, pull


GRADIENT_BYTES, MOST_ROWS = 2**27, 256  # of one batch of rows; bytes at one layer
MOST_TARGETS, PROBABILITY = 10, 0.95  # by default: the most probable next tokens until they have this


@torch.no_grad()
def attribute(
    model: PreTrainedModel,
    clt: CrossLayerTranscoder,
    input_ids: Tensor,
    targets: Sequence[Target | int] | None = None,
    max_feature_nodes: int | None = None,
    *,
    rank_every: int = 512,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    cleared: Sequence[int] = (0,),
    tokenizer=None,
    progress: bool = False,
) -> AttributionGraph:
    """
    The attribution graph of one prompt (Ameisen et al. 2025): what each target and each active feature comes from,
    exactly, in the language model with attention patterns and the scales of norms held as they are on this prompt.
    Processes of a group (`torchrun`) share the rows: all of them call this, with the same arguments.

    Args:
        model (`PreTrainedModel`): The causal language model, in eval mode.
        clt ([`CrossLayerTranscoder`]): A CLT of that model; a lazy one, whose weights stay in their files, as well.
        input_ids (`Tensor` of shape `(1, P)` or `(P,)`): The prompt, as it is: no token is put in front.
        targets (`Sequence`, *optional*): [`TokenTarget`], [`FeatureTarget`] or token ids, which are next tokens. By
            default the most probable next tokens until they have 0.95 of the probability, at most 10.
        max_feature_nodes (`int`, *optional*): Features that become nodes, the most influential ones; by default all.
        rank_every (`int`): With `max_feature_nodes`, how many rows are computed between two rankings. It decides the
            graph, which the batch size does not.
        batch_size (`int`, *optional*): Rows computed at a time; by default 256, or what takes 128 MB at one layer.
        dtype (`torch.dtype`): Of the computation.
        cleared (`Sequence[int]`): Positions without features and errors, on which a CLT is not trained.
        tokenizer (*optional*): To show tokens as text.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`AttributionGraph`]

    Raises:
        FreezingError: If the language model cannot be written as a linear one on this prompt.
        ValueError: For a CLT that does not fit, a prompt, target or number out of range, and if memory is too small.
    """
    for name, value in (
        ("max_feature_nodes", max_feature_nodes),
        ("rank_every", rank_every),
        ("batch_size", batch_size),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is below 1; give at least 1, or leave it out")
    device, seconds = model.device, {}
    with clt.folded():
        frozen, sources, chosen, weights, start = read_prompt(model, clt, input_ids, targets, dtype, cleared, seconds)
        begin = time.perf_counter()
        n = len(sources.features)
        followed = n if max_feature_nodes is None else min(n, max_feature_nodes)
        check_memory(followed + len(chosen), num_columns(frozen, sources), dtype, device)
        batch_size = batch_size or usual_batch(frozen)
        bar = tqdm(total=followed + len(chosen), unit="row", disable=not progress, desc="attribution")
        with bar:
            if followed == n:
                seeds = Seeds.joined([feature_seeds(clt, frozen, sources.features), start])
                edges = frozen.tokens.new_zeros(n + len(chosen), num_columns(frozen, sources))
                rests = rows_of(frozen, sources, seeds, edges, batch_size, bar)
                kept, dropped = torch.arange(n, device=device), edges.new_zeros(len(edges))
            else:
                kept, edges, rests, dropped = chosen_rows(
                    frozen, clt, sources, start, weights, followed, rank_every, batch_size, bar
                )
        seconds["rows"] = time.perf_counter() - begin
    words = {}
    if tokenizer is not None:
        used = [t for target in chosen if isinstance(target, TokenTarget) for t in (target.token, target.minus)]
        words = {str(token): tokenizer.decode([token]) for token in used if token is not None}
    ids = frozen.input_ids.cpu()
    graph = AttributionGraph(
        input_ids=ids,
        tokens=[str(token) if tokenizer is None else tokenizer.decode([token]) for token in ids.tolist()],
        features=sources.features[kept].cpu(),
        activations=sources.activations[kept].cpu(),
        targets=chosen,
        target_weights=weights.cpu(),
        edges=edges.cpu(),
        rest={name: values.cpu() for name, values in rests.items()},
        dropped=dropped.cpu(),
        num_layers=len(frozen.blocks),
        info={
            "clt": public_name(clt.config.name_or_path),
            "clt_revision": getattr(clt.config, "_commit_hash", None),
            "model": public_name(model.config.name_or_path),
            "model_revision": getattr(model.config, "_commit_hash", None),
            "dtype": str(dtype).removeprefix("torch."),
            "active_features": n,
            "cleared": list(cleared),
            "max_feature_nodes": max_feature_nodes,
            "rank_every": rank_every,
            "step_error": frozen.error,
            "seconds": seconds,
            "target_words": words,
        },
    )
    graph.note_scores()
    return graph


def read_prompt(
    model: PreTrainedModel,
    clt: CrossLayerTranscoder,
    input_ids: Tensor,
    targets: Sequence[Target | int] | None,
    dtype: torch.dtype,
    cleared: Sequence[int],
    seconds: dict[str, float],
) -> tuple[FrozenModel, Sources, list[Target], Tensor, Seeds]:
    """
    Runs the language model on a prompt, and finds what the rows of its graph begin and end in: the frozen model, the
    sources, the targets with their weights and where their rows begin. Notes the seconds. Errors as of [`attribute`].
    """
    begin = time.perf_counter()
    check_layer_by_layer(clt)
    hooks = clt.config.feature_input_hook, clt.config.feature_output_hook
    check_fit(clt.config, Harvester(model, *hooks))
    frozen = freeze(model, input_ids, *hooks, dtype=dtype)
    length = frozen.num_tokens
    unknown = [position for position in cleared if not 0 <= position < length]
    if unknown:
        raise ValueError(f"cleared={list(cleared)}: position {unknown[0]} is outside the prompt's 0 to {length - 1}")
    blank = torch.zeros(length, dtype=torch.bool, device=frozen.tokens.device)
    blank[list(cleared)] = True
    seconds["language model"] = time.perf_counter() - begin
    begin = time.perf_counter()
    sources = find_sources(clt, frozen, blank, dtype)
    seconds["features"] = time.perf_counter() - begin
    chosen, weights = choose_targets(frozen, clt, targets)
    return frozen, sources, chosen, weights, target_seeds(frozen, clt, chosen)


def public_name(name_or_path: str) -> str | None:
    """A name on the Hub; of a local folder its own name alone, since pages and graphs are passed on."""
    if not name_or_path:
        return None
    return Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path


# -- targets ----------------------------------------------------------------------------------------------------------


def choose_targets(
    frozen: FrozenModel, clt: CrossLayerTranscoder, targets: Sequence[Target | int] | None
) -> tuple[list[Target], Tensor]:
    """The targets with positions counted from the front, and their weights (m,)."""
    length, vocabulary = frozen.num_tokens, len(frozen.unembedding)
    if targets is None:
        probabilities = frozen.logits[-1].double().softmax(dim=0)
        likely, tokens = probabilities.topk(min(MOST_TARGETS, vocabulary))
        count = int((likely.cumsum(0) < PROBABILITY).sum()) + 1
        targets = tokens[:count].tolist()
    if not len(targets):
        raise ValueError("targets is empty; give at least one, or leave it out for the most probable next tokens")
    chosen, weights = [], []
    for given in targets:
        target = TokenTarget(index(given)) if hasattr(given, "__index__") else given
        if not isinstance(target, Target):
            kind = type(given).__name__
            raise ValueError(f"target {given!r} is a {kind}; give a token id, a TokenTarget or a FeatureTarget")
        sizes = {"position": length, "token": vocabulary, "minus": vocabulary}
        sizes |= {"layer": clt.config.num_layers, "feature": clt.config.num_features}
        for name, value in vars(target).items():
            lowest = -length if name == "position" else 0
            if value is not None and not lowest <= value < sizes[name]:
                raise ValueError(f"target {target}: {name} {value} is outside {lowest} to {sizes[name] - 1}")
        target = type(target)(**{**vars(target), "position": target.position % length})
        is_plain = isinstance(target, TokenTarget) and target.minus is None
        at = frozen.logits[target.position].double().softmax(dim=0) if is_plain else None
        weights.append(at[target.token].item() if is_plain else 1.0)
        chosen.append(target)
    return chosen, torch.tensor(weights, dtype=frozen.tokens.dtype, device=frozen.tokens.device)


def target_seeds(frozen: FrozenModel, clt: CrossLayerTranscoder, targets: list[Target]) -> Seeds:
    """Where the rows of the targets begin, in their order."""
    found = []
    for target in targets:
        if isinstance(target, FeatureTarget):
            node = torch.tensor([[target.layer, target.position, target.feature]], device=frozen.tokens.device)
            found.append(feature_seeds(clt, frozen, node))
        else:
            found.append(logit_seeds(frozen, [target.token], [target.minus], [target.position]))
    return Seeds.joined(found)


# -- rows -------------------------------------------------------------------------------------------------------------


def usual_batch(frozen: FrozenModel) -> int:
    """How many rows have gradients of [`GRADIENT_BYTES`], at most [`MOST_ROWS`]."""
    return max(1, min(MOST_ROWS, GRADIENT_BYTES // (frozen.tokens.numel() * frozen.tokens.element_size())))


def check_memory(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError if the edges do not fit into memory, before anything is computed."""
    needed, free = num_rows * num_columns * torch.empty(0, dtype=dtype).element_size(), free_memory(device)
    if needed > free:
        raise ValueError(
            f"a graph of {num_rows:,} rows and {num_columns:,} columns takes {format_size(needed)}, and "
            f"{format_size(free)} are free; give max_feature_nodes, of which each takes "
            f"{format_size(needed / num_rows)}"
        )


def num_columns(frozen: FrozenModel, sources: Sources) -> int:
    """n + L·P + P."""
    return len(sources.features) + (len(frozen.blocks) + 1) * frozen.num_tokens


def batches_of(seeds: Seeds, batch_size: int) -> tuple[Tensor, ...]:
    """Numbers of the rows that are computed together: of like positions, since a pass needs those up to its last."""
    return seeds.positions.argsort(stable=True, descending=True).split(batch_size)


def rows_of(
    frozen: FrozenModel, sources: Sources, seeds: Seeds, out: Tensor, batch_size: int, bar
) -> dict[str, Tensor]:
    """
    Writes the rows of seeds (R,) to `out` (R, columns), of zeros, those of like positions together; the rests. Of
    processes in a group each computes a share of the batches, and all have all rows in the end.
    """
    rests = {name: seeds.own.new_zeros(len(seeds.own)) for name in RESTS}
    in_group = dist.is_available() and dist.is_initialized()
    share, shares = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
    for number, batch in enumerate(batches_of(seeds, batch_size)):
        if number % shares == share:
            out[batch], found = pull(frozen, sources, seeds.take(batch))
            for name, values in found.items():
                rests[name][batch] = values
        bar.update(len(batch))
    for tensor in (out, *rests.values()) if shares > 1 else ():
        dist.all_reduce(tensor)
    return rests


def chosen_rows(
    frozen, clt, sources: Sources, start: Seeds, weights: Tensor, count: int, rank_every: int, batch_size: int, bar
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """
    The rows of the targets, and of the `count` features that are found most influential: `rank_every` at a time, by
    their influence through the rows that are there.

    Returns:
        The chosen features' numbers, ascending; A and rests with rows of these and the targets, and columns of these
        and all other nodes; Σ|A| of each row over the other features.
    """
    n, m, width = len(sources.features), len(start.layers), num_columns(frozen, sources)
    edges = frozen.tokens.new_zeros(count + m, width)
    rests = rows_of(frozen, sources, start, edges[:m], batch_size, bar)
    visited = torch.zeros(n, dtype=torch.bool, device=edges.device)
    picked = torch.empty(0, dtype=torch.int64, device=edges.device)
    while len(picked) < count:
        # Rows in the order of [`influences`]: the features by layer, then the targets.
        order = sources.features[picked, 0].argsort(stable=True)
        rows = torch.cat([edges[m : m + len(picked)][order], edges[:m]])
        sums = torch.stack([row.abs().sum() for row in rows]).clamp_min(1e-8)
        through, _ = influences(rows, sources.features[picked[order], 0], weights, sums, picked[order])
        ranked = through[:n].masked_fill(visited, -1).topk(min(rank_every, count - len(picked))).indices
        out = edges[m + len(picked) : m + len(picked) + len(ranked)]
        found = rows_of(frozen, sources, feature_seeds(clt, frozen, sources.features[ranked]), out, batch_size, bar)
        rests = {name: torch.cat([values, found[name]]) for name, values in rests.items()}
        visited[ranked] = True
        picked = torch.cat([picked, ranked])
    kept, order = picked.sort()
    rows = torch.cat([m + order, torch.arange(m, device=order.device)])
    columns = torch.cat([visited, visited.new_ones(width - n)])
    others = (~visited).to(edges.dtype)
    dropped = torch.stack([row[:n].abs() @ others for row in edges])[rows]  # row by row: edges may be gigabytes
    return kept, edges[:, columns][rows], {name: values[rows] for name, values in rests.items()}, dropped


__all__ = ["attribute", "batches_of", "num_columns", "read_prompt", "rows_of", "usual_batch"]
