"""What the graph of a prompt needs, before it is computed: counted, and its time from a few of its own rows."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..files import format_duration, format_size
from ..modeling_clt import CrossLayerTranscoder
from .frozen import FrozenModel
from .graph import Target
from .rows import Seeds, Sources, feature_seeds
from .tracing import batches_of, num_columns, read_prompt, rows_of, usual_batch


SAMPLED_BATCHES = 3


@torch.no_grad()
def estimate_cost(
    model: PreTrainedModel,
    clt: CrossLayerTranscoder,
    input_ids: Tensor,
    targets: Sequence[Target | int] | None = None,
    max_feature_nodes: int | None = None,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    cleared: Sequence[int] = (0,),
) -> dict[str, float]:
    """
    What [`attribute`] with these arguments needs. The language model runs once.

    Returns:
        `dict`: `active_features`; `rows` and `columns` of the edges; in bytes `edges`, `decoder_rows`, `gradients` of
        a batch, `language_model` and `clt` (its weights in memory); `flops`, two per multiplication; `seconds`, from
        the time of a few batches of rows.
    """
    before_rows = {}
    with clt.folded():
        frozen, sources, chosen, _, start = read_prompt(model, clt, input_ids, targets, dtype, cleared, before_rows)
        seeds = Seeds.joined([feature_seeds(clt, frozen, sources.features), start])
    n, m, columns = len(sources.features), len(chosen), num_columns(frozen, sources)
    rows = m + (n if max_feature_nodes is None else min(n, max_feature_nodes))
    batch_size = batch_size or usual_batch(frozen)
    share = rows / (n + m)
    return {
        "active_features": n,
        "rows": rows,
        "columns": columns,
        "edges": rows * columns * sources.activations.element_size(),
        "decoder_rows": sum(found.nbytes for found in sources.rows),
        "gradients": min(batch_size, rows) * frozen.tokens.nbytes,
        "language_model": sum(weight.nbytes for weight in model.parameters()),
        "clt": sum(weight.nbytes for weight in clt.parameters() if not clt.lazy),
        "flops": share * flops(frozen, sources, seeds),
        "seconds": sum(before_rows.values()) + share * sampled_seconds(frozen, sources, seeds, batch_size),
    }


def flops(frozen: FrozenModel, sources: Sources, seeds: Seeds) -> float:
    """Two for each multiplication of a row's pass and of its products with decoder rows, over all rows."""
    num_layers, length, width = sources.errors.shape
    attention = frozen.blocks[0].attention
    inner = attention.num_heads * attention.head_size
    per_position = torch.arange(1, length + 1, dtype=torch.float64)
    # Of one layer, a row from position p: outputs, patterns, values; errors.
    step = per_position * width * (inner + len(attention.value) + 1) + per_position**2 * inner
    starts = torch.zeros(num_layers + 1, length, dtype=torch.float64)
    starts.index_put_((seeds.layers.cpu(), seeds.positions.cpu()), torch.ones(len(seeds.layers)).double(), True)
    passes = torch.arange(num_layers + 1, dtype=torch.float64) @ starts @ step
    sources_at = torch.zeros(num_layers, length, dtype=torch.float64)
    layers, positions, _ = sources.features.cpu().unbind(1)
    sources_at.index_put_((layers, positions), torch.ones(len(layers)).double(), True)
    reach = torch.tensor([rows.shape[1] for rows in sources.rows])
    between = torch.arange(num_layers + 1)[:, None] - torch.arange(num_layers)
    written = torch.minimum(between.clamp_min(0), reach).double()
    contracted = torch.einsum("lp,ls,sp->", starts, written, sources_at.cumsum(1)) * width
    return 2 * (passes + contracted).item()


def sampled_seconds(frozen: FrozenModel, sources: Sources, seeds: Seeds, batch_size: int) -> float:
    """Seconds of all rows, from those of a few batches at even distances in the order in which they are computed."""
    batches, total = batches_of(seeds, batch_size), len(seeds.layers)
    count = min(SAMPLED_BATCHES, len(batches))
    sample = [batches[(2 * number + 1) * len(batches) // (2 * count)] for number in range(count)]
    width = num_columns(frozen, sources)
    begin = time.perf_counter()
    with tqdm(disable=True) as bar:
        for batch in sample:
            rows_of(frozen, sources, seeds.take(batch), frozen.tokens.new_zeros(len(batch), width), len(batch), bar)
    if frozen.tokens.device.type == "cuda":
        torch.cuda.synchronize(frozen.tokens.device)
    return (time.perf_counter() - begin) * total / sum(len(batch) for batch in sample)


def format_cost(cost: dict[str, float]) -> str:
    """As two lines of text."""
    memory = sum(cost[name] for name in ("edges", "decoder_rows", "gradients", "language_model", "clt"))
    size = {name: format_size(cost[name]) for name in ("edges", "decoder_rows", "gradients", "language_model", "clt")}
    return (
        f"{cost['active_features']:,} active features; {cost['rows']:,} rows of {cost['columns']:,} columns; "
        f"{cost['flops'] / 1e9:,.1f} GFLOP, about {format_duration(cost['seconds'])}\n"
        f"Memory {format_size(memory)}: edges {size['edges']}, active decoder rows {size['decoder_rows']}, a batch of "
        f"gradients {size['gradients']}, language model {size['language_model']}, CLT {size['clt']}"
    )


__all__ = ["estimate_cost", "flops", "format_cost"]
