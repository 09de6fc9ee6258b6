"""
What a CLT does with the active features of all its layers at once on a GPU, in Triton: decoding, both gradients of the
decoders, and sums by posting list. One launch each at any depth; the formulas, layer by layer, stand in `decode.py`
and `rows.py`.

The weights of the layers are separate tensors. A kernel gets the first, and a table with how far each of the others
lies from it. Entries are those of one [`LayerFeatures`] of L layers: row s · N + n, feature s · F + f; those of dead
features follow in as many rows once more.

Bytes that the kernels ask for, with b per number of a row, J_s target layers of source s: decoding and the decoders'
gradients N · L0 · D · J_s · b each, summed over sources, mostly from the L2 cache: all programs that run at a time
work on one tile of columns. The gradients read and write each weight once more.

Repeatable bit for bit, as in `triton_rows.py`: no atomics, each sum in one fixed order, in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sparsity import LayerFeatures
from .triton_rows import available, table_on, triton


if triton is not None:
    import triton.language as tl

    from .triton_rows import add

# A program of decoding is one warp: these bytes of a row, 16 for each thread, and in each round this many entries,
# loaded together. The rows of all sources of a target are F times these bytes for each source.
DECODE_BYTES, DECODE_ENTRIES = 512, 4
# A program of the posting lists: one warp, these bytes of a row (of the wider format), and each round so many entries,
# whose rows are all under way at a time, in 72 to 128 registers. Its sum is one of sums over SPLIT entries each.
POSTING_BYTES, POSTING_ENTRIES, POSTING_SPLIT = 1024, 4, 128
# Entries of a program that adds up dot products over tiles; columns of one that adds up squares.
DOTS_ENTRIES, SQUARE_COLUMNS = 128, 1024
DOTS_BYTES = 2**31  # of dot products of single tiles
ROUND_BLOCK = 4096  # elements of a program that rounds weights
ALIGNED = 16  # elements


if triton is not None:

    @triton.jit
    def decode_kernel(
        values,
        indices,
        offsets,
        weights,
        table,
        start,
        out,
        num_tokens,
        num_layers,
        num_features,
        width,
        reach,
        token_stride,
        layer_stride,
        TIED: tl.constexpr,
        ALIGN: tl.constexpr,
        BLOCK_E: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        # Tokens run fastest: all of them pass over one column tile of the rows that write to a target.
        token, target = tl.program_id(0).to(tl.int64), tl.program_id(1)
        columns = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = columns < width
        half, n = token // num_tokens, token % num_tokens
        total = tl.load(start + token * token_stride + target * layer_stride + columns, mask=inside, other=0.0)
        for source in range(tl.maximum(0, target + 1 - reach), target + 1):
            row = (half * num_layers + source) * num_tokens + n
            first = tl.load(offsets + row)
            end = tl.load(offsets + row + 1)
            shift, row_width = 0, width
            if not TIED:
                shift = (target - source) * width
                row_width = tl.minimum(num_layers - source, reach) * width
            rows = weights + tl.multiple_of(tl.load(table + source), ALIGN) + shift
            for entry in range(first, end, BLOCK_E):
                # Unrolled: the loads of a round go out together, the sums stay in order.
                for i in tl.static_range(BLOCK_E):
                    listed = entry + i < end
                    index = tl.load(indices + entry + i, mask=listed, other=0) - source * num_features
                    value = tl.load(values + entry + i, mask=listed, other=0.0).to(tl.float32)
                    # jumprelu lists inactive features, whose rows are not read. (Bits: see triton_rows.py.)
                    used = inside & (value.to(tl.int32, bitcast=True) != 0)
                    total += value * tl.load(rows + index * row_width + columns, mask=used, other=0.0).to(tl.float32)
        tl.store(out + (token * num_layers + target) * width + columns, total, mask=inside)

    @triton.jit
    def posting_kernel(
        rows,
        places,
        values,
        offsets,
        weights,
        gradients,
        slopes,
        dots,
        table,
        num_sources,
        num_features,
        num_entries,
        row_stride,
        HAS_SUMS: tl.constexpr,
        HAS_DOTS: tl.constexpr,
        HAS_SLOPES: tl.constexpr,
        ALIGN: tl.constexpr,
        SPLIT: tl.constexpr,
        BLOCK_E: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        # Features run fastest: those of one source pass over one column tile of the rows.
        feature = tl.program_id(0).to(tl.int64)
        tile = table + 3 * num_sources + 5 * tl.program_id(1)
        source, number, width = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        column = tl.multiple_of(tl.load(tile + 3), ALIGN)
        columns = column + tl.arange(0, BLOCK_C)
        inside = columns < width
        from_rows = tl.multiple_of(tl.load(tile + 4), ALIGN) + columns
        start = tl.load(offsets + source * num_features + feature)
        end = tl.load(offsets + source * num_features + feature + 1)
        own = feature * tl.multiple_of(width, ALIGN) + columns
        weight = tl.full((BLOCK_C,), 0.0, tl.float32)
        if HAS_DOTS or HAS_SLOPES:
            shift = tl.multiple_of(tl.load(table + source), ALIGN)
            weight = tl.load(weights + shift + own, mask=inside & (HAS_SLOPES | (start < end)), other=0.0)
            weight = weight.to(tl.float32)
        total = tl.full((BLOCK_C,), 0.0, tl.float32)
        for first in range(start, end, SPLIT):
            stop = tl.minimum(end, first + SPLIT)
            part = tl.full((BLOCK_C,), 0.0, tl.float32)
            for entry in range(first, stop, BLOCK_E):
                entries = entry + tl.arange(0, BLOCK_E)
                listed = entries < stop
                place = tl.load(places + entries, mask=listed, other=0)
                wanted = listed[:, None] & inside[None, :]
                row = tl.load(rows + (place * row_stride)[:, None] + from_rows[None, :], mask=wanted, other=0.0)
                row = row.to(tl.float32)
                if HAS_SUMS:
                    value = tl.load(values + entries, mask=listed, other=0.0).to(tl.float32)
                    part += tl.reduce(value[:, None] * row, 0, add)
                if HAS_DOTS:
                    dot = tl.reduce(row * weight[None, :], 1, add)
                    tl.store(dots + number * num_entries + entries, dot, mask=listed)
            total += part
        if HAS_SLOPES:
            total += tl.load(slopes + source * num_features + feature) * weight
        if HAS_SUMS:
            shift = tl.multiple_of(tl.load(table + num_sources + source), ALIGN)
            tl.store(gradients + shift + own, total.to(gradients.dtype.element_ty), mask=inside)

    @triton.jit
    def dots_kernel(
        dots, order, indices, table, out, num_sources, num_features, num_entries, most, BLOCK_E: tl.constexpr
    ):
        """Adds up those of some tiles, of as many as the table says of a source."""
        entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
        listed = entries < num_entries
        place = tl.load(order + entries, mask=listed, other=0)
        source = tl.load(indices + place, mask=listed, other=0) // num_features
        num_tiles = tl.load(table + 2 * num_sources + source)
        total = tl.load(out + place, mask=listed, other=0.0)
        dots += entries
        for tile in range(most):
            total += tl.load(dots, mask=listed & (tile < num_tiles), other=0.0)
            dots += num_entries  # one by one, since their product may exceed 32 bits
        tl.store(out + place, total, mask=listed)

    @triton.jit
    def squares_kernel(weights, table, out, num_sources, num_features, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
        feature, source = tl.program_id(0).to(tl.int64), tl.program_id(1)
        width = tl.multiple_of(tl.load(table + num_sources + source), ALIGN)
        row = weights + tl.multiple_of(tl.load(table + source), ALIGN) + feature * width
        total = tl.full((BLOCK_C,), 0.0, tl.float32)
        for first in range(0, width, BLOCK_C):
            columns = first + tl.arange(0, BLOCK_C)
            weight = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
            total += weight * weight
        tl.store(out + source * num_features + feature, tl.reduce(total, 0, add))

    @triton.jit
    def round_kernel(weights, rounded, table, num_sources, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
        source = tl.program_id(1)
        size = tl.multiple_of(tl.load(table + 2 * num_sources + source), ALIGN)
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        weight = tl.load(weights + tl.multiple_of(tl.load(table + source), ALIGN) + places, mask=inside, other=0.0)
        shift = tl.multiple_of(tl.load(table + num_sources + source), ALIGN)
        tl.store(rounded + shift + places, weight.to(rounded.dtype.element_ty), mask=inside)


def takes(weights: Sequence[Tensor], start: Tensor) -> bool:
    """Whether the kernels can decode into `start` with these weights."""
    first = weights[0]
    alike = all(w.device == start.device and w.dtype == first.dtype and w.is_contiguous() for w in weights)
    return alike and available(first) and start.dtype == torch.float32 and start.stride(-1) == 1


def decode(
    start: Tensor, features: LayerFeatures, values: Tensor, weights: Sequence[Tensor], reach: int, tied: bool
) -> Tensor:
    """
    start[n, t] + Σ over sources s ≤ t, t - s < reach, and their entries at n of a · W[s][f, t - s].

    Args:
        start: (N, L, D) float32, with dead features (2 N, L, D); may be expanded.
        features: The entries of L layers.
        values: (nnz,).
        weights: (F, J_s, D) of each layer, of one dtype; J_s = min(L - s, reach), or 1 if tied.
        reach: Target layers of a source, at most.
        tied: Whether a source writes the same to all of them (`per_source`).

    Returns:
        (N, L, D) float32.
    """
    out = torch.empty(start.shape, dtype=start.dtype, device=start.device)
    num_rows, num_layers, width = start.shape
    if out.numel() == 0:
        return out
    block = min(DECODE_BYTES // weights[0].element_size(), triton.next_power_of_2(width))
    apart = distances(weights)
    with torch.cuda.device_of(start):
        decode_kernel[(num_rows, num_layers, triton.cdiv(width, block))](
            values.contiguous(),
            features.indices.contiguous(),
            features.offsets.contiguous(),
            weights[0],
            table_on(start.device, apart),
            start,
            out,
            features.num_tokens,
            num_layers,
            features.num_features // num_layers,
            width,
            reach,
            start.stride(0),
            start.stride(1),
            TIED=tied,
            ALIGN=alignment(apart, [width]),
            BLOCK_E=DECODE_ENTRIES,
            BLOCK_C=block,
            num_warps=1,
        )
    return out


def posting_sums(
    rows: Tensor,
    places: Tensor,
    features: LayerFeatures,
    *,
    values: Tensor | None = None,
    columns: list[tuple[int, int]],
    gradients: Sequence[Tensor] | None = None,
    weights: Sequence[Tensor] | None = None,
    slopes: Tensor | None = None,
) -> Tensor | None:
    """
    One pass over the posting lists of B layers, for up to two results. Of the entry (r, f), row p of `rows` and the
    columns of f's layer:

        gradients[b][f] = Σ over the entries of f of values · rows[p, columns[b]] (+ slopes[f] · weights[b][f])
        dots[entry]     = <rows[p, columns[b]], weights[b][f]>

    Args:
        rows: (R, C) bfloat16, float16 or float32, contiguous in the last dimension.
        places: (nnz,) int64, the row of each entry.
        features: Lists the entries.
        values: (nnz,), for the sums.
        columns: Of each layer the first of its columns, and their number.
        gradients: Of each layer (F, columns), of one dtype, contiguous; all of them is written.
        weights: Of each layer (F, columns), of one dtype, contiguous; for the dot products and slopes.
        slopes: (B · F,) float32.

    Returns:
        The dot products, (nnz,) float32, if weights were given.
    """
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()  # the gradient of a sum is one number, expanded
    num_layers = len(columns)
    num_features, num_entries = features.num_features // num_layers, features.indices.numel()
    widest = max(width for _, width in columns)
    number = max(tensor.element_size() for tensor in (rows, *(weights or ())))
    block = min(POSTING_BYTES // number, triton.next_power_of_2(widest))
    apart = [distances(tensors) if tensors else [0] * num_layers for tensors in (weights, gradients)]
    counts = [triton.cdiv(width, block) for _, width in columns]
    # So many tiles of each row at once that their dot products take at most DOTS_BYTES.
    at_once = max(1, DOTS_BYTES // (4 * max(1, num_entries))) if weights else max(counts)
    has_dots = bool(weights) and num_entries > 0
    out = torch.zeros(num_entries, device=rows.device) if weights else None
    dots = rows.new_empty(min(at_once, max(counts)), num_entries, dtype=torch.float32) if weights else None
    order, offsets = features.by_feature
    given = [
        rows,
        places[order],
        # A pointer that is never read stands in for none.
        rows if values is None else values[order],
        offsets,
        weights[0] if weights else rows,
        gradients[0] if gradients else rows,
        rows if slopes is None else slopes,
        dots if weights else rows,
    ]
    for begin in range(0, max(counts), at_once):
        tiles = [
            (source, number - begin, width, number * block, first)
            for source, (first, width) in enumerate(columns)
            for number in range(begin, min(begin + at_once, counts[source]))
        ]
        here = [max(0, min(count - begin, at_once)) for count in counts]
        table = table_on(rows.device, [*apart[0], *apart[1], *here, *(number for tile in tiles for number in tile)])
        with torch.cuda.device_of(rows):
            posting_kernel[(num_features, len(tiles))](
                *given,
                table,
                num_layers,
                num_features,
                num_entries,
                rows.stride(0),
                HAS_SUMS=gradients is not None,
                HAS_DOTS=has_dots,
                HAS_SLOPES=slopes is not None,
                ALIGN=alignment(*apart, [rows.stride(0)], *columns),
                SPLIT=POSTING_SPLIT,
                BLOCK_E=POSTING_ENTRIES,
                BLOCK_C=block,
                num_warps=1,
            )
            if has_dots:
                dots_kernel[(triton.cdiv(num_entries, DOTS_ENTRIES),)](
                    dots,
                    order,
                    features.indices,
                    table,
                    out,
                    num_layers,
                    num_features,
                    num_entries,
                    max(here),
                    BLOCK_E=DOTS_ENTRIES,
                )
    return out


def rounded(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of weights of one dtype, contiguous, in another."""
    copies, first = [torch.empty_like(weight, dtype=dtype) for weight in weights], weights[0]
    apart, sizes = [distances(weights), distances(copies)], [weight.numel() for weight in weights]
    with torch.cuda.device_of(first):
        round_kernel[(triton.cdiv(max(sizes), ROUND_BLOCK), len(weights))](
            first,
            copies[0],
            table_on(first.device, [*apart[0], *apart[1], *sizes]),
            len(weights),
            ALIGN=alignment(*apart, sizes),
            BLOCK=ROUND_BLOCK,
        )
    return copies


def square_sums(weights: Sequence[Tensor]) -> Tensor:
    """Σ of W² over a feature's row of each layer's weights (F, ...), of one dtype, contiguous: (B · F,) float32."""
    num_features, first = len(weights[0]), weights[0]
    widths, apart = [w.numel() // num_features for w in weights], distances(weights)
    out = first.new_empty(len(weights) * num_features, dtype=torch.float32)
    with torch.cuda.device_of(first):
        squares_kernel[(num_features, len(weights))](
            first,
            table_on(first.device, [*apart, *widths]),
            out,
            len(weights),
            num_features,
            ALIGN=alignment(apart, widths),
            BLOCK_C=min(SQUARE_COLUMNS, triton.next_power_of_2(max(widths))),
            num_warps=4,
        )
    return out


def distances(tensors: Sequence[Tensor]) -> list[int]:
    """How far each of some tensors of one dtype lies from the first, in elements."""
    first, size = tensors[0].data_ptr(), tensors[0].element_size()
    return [(tensor.data_ptr() - first) // size for tensor in tensors]


def alignment(*numbers: list[int] | tuple[int, ...]) -> int:
    """What all numbers of elements are a multiple of, for loads of several at a time: [`ALIGNED`] or 1."""
    return ALIGNED if all(number % ALIGNED == 0 for some in numbers for number in some) else 1


__all__ = ["decode", "posting_sums", "rounded", "square_sums", "takes"]
