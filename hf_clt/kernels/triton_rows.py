"""
Sums and dot products of gathered rows on a GPU, in Triton: the two primitives of everything a CLT does with its active
features only. The plain reference and the choice between it and these kernels stand in `rows.py`.

Repeatable bit for bit: no atomics, and each sum is taken in one fixed order. A `row_sums` even does not depend on the
block sizes: a column's entries are added one after the other. Posting lists (the entries by feature) are cut after
every `SPLIT` entries, so that a feature which fires on every token is the work of many programs. Accumulation is in
float32, rows are bfloat16, float16 or float32. Nothing waits for the GPU, so wrong *values* (an index out of range)
are not noticed here; wrong shapes and dtypes are. The functions are not differentiable; they are what backward passes
are made of.
"""

import torch
from torch import Tensor

from ..sparsity import LayerFeatures


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # only Linux has it; `available` says so to whoever chooses
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A program of row_sums is one warp: this many columns (or twice as many), and in each round this many entries. The
# compiler then has most or all rows of a round under way before it adds up any, in 51 to 66 registers without spilling
# (read off the machine code for an H100; with several warps or longer rounds it loaded one row after the other).
SUM_COLUMNS, SUM_ENTRIES = 256, 4
# What one column tile of all rows may take of the L2 cache (50 MB on an H100), so that a row which several bags use
# comes from memory once.
L2_BYTES = 16 * 2**20
# Entries of a posting list that one program takes.
SPLIT = 128
# A program of row_dots: this many entries times this many columns at a time.
DOT_ENTRIES, DOT_COLUMNS, DOT_WARPS = 4, 512, 4
# A program of posting_dots: in each round this many entries times this many columns, the only ones that it sees.
POSTING_ENTRIES, POSTING_COLUMNS, POSTING_WARPS = 2, 512, 1


if triton is not None:

    @triton.jit
    def sum_entries(
        rows, indices, weights, start, end, columns, inside, row_stride, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr
    ):
        """The columns of Σ weights[e] · rows[indices[e]] over the entries from start to end, one after the other."""
        total = tl.full((BLOCK_C,), 0.0, tl.float32)
        for first in range(start, end, BLOCK_E):
            # Unrolled: the loads of a round go out together, the sums stay in order.
            for i in tl.static_range(BLOCK_E):
                listed = first + i < end
                index = tl.load(indices + first + i, mask=listed, other=0)  # int64, as is every offset made of it
                weight = tl.load(weights + first + i, mask=listed, other=0.0).to(tl.float32)
                # jumprelu lists inactive features, whose rows are not read. (Bits: floats do not compare interpreted.)
                used = inside & (weight.to(tl.int32, bitcast=True) != 0)
                row = tl.load(rows + index * row_stride + columns, mask=used, other=0.0)
                total += weight * row.to(tl.float32)
        return total

    @triton.jit
    def row_sums_kernel(
        rows,
        indices,
        offsets,
        weights,
        pieces,
        out,
        num_columns,
        row_stride,
        out_stride,
        SPLIT: tl.constexpr,
        BLOCK_E: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        # Bags run fastest: all of them pass over one column tile of the rows while it is in the L2 cache.
        bag = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = columns < num_columns
        start = tl.load(offsets + bag)
        end = tl.load(offsets + bag + 1)
        stop = end
        if SPLIT > 0:
            stop = tl.minimum(end, start + SPLIT)
        total = sum_entries(rows, indices, weights, start, stop, columns, inside, row_stride, BLOCK_E, BLOCK_C)
        if SPLIT > 0:
            for later in range(start + SPLIT, end, SPLIT):  # pieces that `piece_sums_kernel` has added up
                total += tl.load(pieces + later // SPLIT * num_columns + columns, mask=inside, other=0.0)
        tl.store(out + bag * out_stride + columns, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def later_piece(chunk, indices, order, offsets, SPLIT: tl.constexpr):
        """
        The feature, the first entry and the end of the piece of a posting list that begins in the chunk-th SPLIT
        entries, unless it is its list's first. There is at most one: it belongs to the list that reaches into the
        chunk from before. None: the end is the first entry.
        """
        first = chunk * SPLIT
        feature = tl.load(indices + tl.load(order + first))
        begin = tl.load(offsets + feature)
        start = first + begin % SPLIT
        end = tl.minimum(tl.load(offsets + feature + 1), start + SPLIT)
        return feature, start, tl.where(begin < first, end, start)

    @triton.jit
    def piece_sums_kernel(
        rows,
        tokens,
        indices,
        order,
        offsets,
        weights,
        pieces,
        num_columns,
        row_stride,
        SPLIT: tl.constexpr,
        BLOCK_E: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        chunk = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = columns < num_columns
        _feature, start, end = later_piece(chunk, indices, order, offsets, SPLIT)
        total = sum_entries(rows, tokens, weights, start, end, columns, inside, row_stride, BLOCK_E, BLOCK_C)
        tl.store(pieces + chunk * num_columns + columns, total, mask=inside & (start < end))

    @triton.jit
    def add(a, b):
        return a + b

    @triton.jit
    def row_dots_kernel(
        left,
        left_indices,
        right,
        right_indices,
        out,
        num_entries,
        num_columns,
        left_stride,
        right_stride,
        BLOCK_E: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
        listed = entries < num_entries
        left_rows = left + tl.load(left_indices + entries, mask=listed, other=0)[:, None] * left_stride
        right_rows = right + tl.load(right_indices + entries, mask=listed, other=0)[:, None] * right_stride
        # Products are added up per column of the tile, and over the tile only once at the end.
        products = tl.full((BLOCK_E, BLOCK_C), 0.0, tl.float32)
        for first in range(0, num_columns, BLOCK_C):
            columns = first + tl.arange(0, BLOCK_C)
            inside = listed[:, None] & (columns < num_columns)[None, :]
            a = tl.load(left_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            b = tl.load(right_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            products += a * b
        # Not tl.sum: triton.language's own functions are interpreted only if all of Triton was imported so.
        tl.store(out + entries, tl.reduce(products, 1, add), mask=listed)

    @triton.jit
    def posting_dots_kernel(
        left,
        right,
        tokens,
        indices,
        order,
        offsets,
        out,
        num_features,
        num_entries,
        num_columns,
        left_stride,
        right_stride,
        SPLIT: tl.constexpr,
        BLOCK_E: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        # The first pieces of all posting lists, then the later ones; and all of them pass over one column tile of
        # `left` while it is in the L2 cache.
        piece, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        columns = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = columns < num_columns
        if piece < num_features:
            feature = piece
            start = tl.load(offsets + feature)
            end = tl.minimum(tl.load(offsets + feature + 1), start + SPLIT)
        else:
            feature, start, end = later_piece(piece - num_features, indices, order, offsets, SPLIT)
        # The row of `right` is read once for all entries of a piece, and not for none.
        row = tl.load(right + feature * right_stride + columns, mask=inside & (start < end), other=0.0).to(tl.float32)
        for first in range(start, end, BLOCK_E):
            entries = first + tl.arange(0, BLOCK_E)
            listed = entries < end
            rows = left + tl.load(tokens + entries, mask=listed, other=0)[:, None] * left_stride
            a = tl.load(rows + columns[None, :], mask=listed[:, None] & inside[None, :], other=0.0).to(tl.float32)
            tl.store(out + tile * num_entries + entries, tl.reduce(a * row[None, :], 1, add), mask=listed)


def available(tensor: Tensor) -> bool:
    """
    Whether the kernels can work on this tensor: Triton is there, the dtype is one of `DTYPES`, and the tensor is on a
    GPU, or Triton's interpreter is on (TRITON_INTERPRET=1 before this module is imported; slow, for tests).
    """
    if triton is None or tensor.dtype not in DTYPES:
        return False
    return tensor.is_cuda or not isinstance(row_sums_kernel, triton.JITFunction)


def row_sums(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """
    out[b] = Σ over the entries e of bag b of weights[e] · rows[indices[e]], summed in float32.

    Args:
        rows: (R, C) bfloat16, float16 or float32, contiguous in the last dimension.
        indices: (nnz,) int64 rows.
        offsets: (B + 1,) int64, ascending from 0 to nnz; bag b owns the entries offsets[b] to offsets[b + 1].
        weights: (nnz,), any floating dtype.

    Returns:
        (B, C) in the dtype of `rows`.

    Raises:
        ValueError: A dtype, shape or stride that the kernel does not take.
    """
    check_rows("rows", rows)
    out = rows.new_empty(offsets.numel() - 1, rows.shape[1])
    write_row_sums(rows, indices, offsets, weights, out)
    return out


def write_row_sums(
    rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor, out: Tensor, pieces: Tensor | None = None
) -> None:
    """
    `row_sums` into `out`, (B, C), contiguous in the last dimension; all of it is written. With `pieces` only the first
    `SPLIT` entries of a bag are added up; the others, that many at a time, have been, into the rows of `pieces`.
    """
    check_entries(indices=indices, weights=weights)
    check_index("indices", indices)
    check_index("offsets", offsets)
    num_bags, num_columns = out.shape
    if out.numel() == 0:
        return
    block = column_block(rows)
    with torch.cuda.device_of(rows):
        row_sums_kernel[(num_bags, triton.cdiv(num_columns, block))](
            rows,
            indices.contiguous(),
            offsets.contiguous(),
            weights.contiguous(),
            # A pointer that is never read stands in for none.
            offsets if pieces is None else pieces,
            out,
            num_columns,
            rows.stride(0),
            out.stride(0),
            SPLIT=0 if pieces is None else SPLIT,
            BLOCK_E=SUM_ENTRIES,
            BLOCK_C=block,
            num_warps=1,
        )


def row_dots(left: Tensor, left_indices: Tensor, right: Tensor, right_indices: Tensor) -> Tensor:
    """
    out[e] = <left[left_indices[e]], right[right_indices[e]]>, summed in float32.

    Entries that share a row should stand together: the cache then gives it to all of them. With many more features
    than tokens, feature order (`LayerFeatures.by_feature`) reads less than token order.

    Args:
        left: (A, C) bfloat16, float16 or float32, contiguous in the last dimension.
        left_indices: (nnz,) int64.
        right: (R, C), likewise; its dtype may be another.
        right_indices: (nnz,) int64.

    Returns:
        (nnz,) float32.

    Raises:
        ValueError: A dtype, shape or stride that the kernel does not take.
    """
    check_rows("left", left)
    check_rows("right", right)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"left has {left.shape[1]} columns and right {right.shape[1]}: pass rows of one length")
    check_entries(left_indices=left_indices, right_indices=right_indices)
    check_index("left_indices", left_indices)
    check_index("right_indices", right_indices)
    num_entries, num_columns = left_indices.numel(), left.shape[1]
    out = left.new_empty(num_entries, dtype=torch.float32)
    if num_entries == 0:
        return out
    with torch.cuda.device_of(left):
        row_dots_kernel[(triton.cdiv(num_entries, DOT_ENTRIES),)](
            left,
            left_indices.contiguous(),
            right,
            right_indices.contiguous(),
            out,
            num_entries,
            num_columns,
            left.stride(0),
            right.stride(0),
            BLOCK_E=DOT_ENTRIES,
            BLOCK_C=min(DOT_COLUMNS, triton.next_power_of_2(num_columns)),
            num_warps=DOT_WARPS,
        )
    return out


def posting_dots(left: Tensor, right: Tensor, features: LayerFeatures) -> Tensor:
    """
    <left[n], right[f]> at the listed entries (n, f), summed in float32, as `row_dots` of them, but that each row of
    `right` is read once for up to `SPLIT` entries of its posting list, and `left` in tiles of columns that stay in the
    L2 cache.

    Args:
        left: (N, C) bfloat16, float16 or float32, contiguous in the last dimension.
        right: (F, C), likewise; its dtype may be another.
        features: Lists the entries; its values are not read.

    Returns:
        (nnz,) float32, in the order of `features.by_feature`.

    Raises:
        ValueError: A dtype, shape or stride that the kernel does not take.
    """
    check_rows("left", left)
    check_rows("right", right)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"left has {left.shape[1]} columns and right {right.shape[1]}: pass rows of one length")
    given, wanted = (len(left), len(right)), (features.num_tokens, features.num_features)
    if given != wanted:
        raise ValueError(f"{given} rows of left and right for {wanted} tokens and features: pass one for each")
    order, offsets = features.by_feature
    num_entries, num_columns = order.numel(), left.shape[1]
    if num_entries == 0 or num_columns == 0:
        return left.new_zeros(num_entries, dtype=torch.float32)
    block = min(POSTING_COLUMNS, triton.next_power_of_2(num_columns))
    num_tiles = triton.cdiv(num_columns, block)
    later = triton.cdiv(num_entries, SPLIT) if min(features.num_tokens, num_entries) > SPLIT else 0
    out = left.new_empty(num_tiles, num_entries, dtype=torch.float32)
    with torch.cuda.device_of(left):
        posting_dots_kernel[(features.num_features + later, num_tiles)](
            left,
            right,
            features.tokens[order],
            features.indices.contiguous(),
            order,
            offsets,
            out,
            features.num_features,
            num_entries,
            num_columns,
            left.stride(0),
            right.stride(0),
            SPLIT=SPLIT,
            BLOCK_E=POSTING_ENTRIES,
            BLOCK_C=block,
            num_warps=POSTING_WARPS,
        )
    return out[0] if num_tiles == 1 else out.sum(dim=0)


def transposed_row_sums(rows: Tensor, features: LayerFeatures, values: Tensor) -> Tensor:
    """
    out[f] = Σ over the entries (n, f) of value · rows[n], summed in float32: the gradient of a decoder (or encoder).

    One program adds up one feature's tokens, but at most `SPLIT` of them: the rest of its posting list is cut into
    pieces, whose sums are kept in float32 and added last, in the order of the list. Wherever a list begins among the
    others, it is cut at the same of its entries.

    Args:
        rows: (N, C) bfloat16, float16 or float32, contiguous in the last dimension.
        features: The entries on N tokens; a feature occurs at most once per token.
        values: (nnz,) one per entry, used in the dtype of `rows`.

    Returns:
        (F, C) in the dtype of `rows`.

    Raises:
        ValueError: A dtype, shape or stride that the kernel does not take.
    """
    check_rows("rows", rows)
    check_entries(indices=features.indices, values=values)
    if rows.shape[0] != features.num_tokens:
        raise ValueError(f"rows has {rows.shape[0]} rows for {features.num_tokens} tokens: pass one per token")
    order, offsets = features.by_feature
    tokens, weights = features.tokens[order], values.to(rows.dtype)[order]
    pieces, num_columns = None, rows.shape[1]
    # As many rows as there could be pieces: how many there are, the host would have to wait for.
    if min(features.num_tokens, order.numel()) > SPLIT and num_columns:
        pieces = rows.new_empty(triton.cdiv(order.numel(), SPLIT), num_columns, dtype=torch.float32)
        block = column_block(rows)
        with torch.cuda.device_of(rows):
            piece_sums_kernel[(len(pieces), triton.cdiv(num_columns, block))](
                rows,
                tokens,
                features.indices.contiguous(),
                order,
                offsets,
                weights,
                pieces,
                num_columns,
                rows.stride(0),
                SPLIT=SPLIT,
                BLOCK_E=SUM_ENTRIES,
                BLOCK_C=block,
                num_warps=1,
            )
    out = rows.new_empty(features.num_features, num_columns)
    write_row_sums(rows, tokens, offsets, weights, out, pieces)
    return out


def column_block(rows: Tensor) -> int:
    """Columns of one program of `row_sums`: twice as many where L2 holds that of all rows, to start fewer programs."""
    num_rows, num_columns = rows.shape
    wide = 2 * SUM_COLUMNS * num_rows * rows.element_size() <= L2_BYTES
    return min((1 + wide) * SUM_COLUMNS, triton.next_power_of_2(num_columns))


def check_rows(name: str, rows: Tensor) -> None:
    if rows.dtype not in DTYPES:
        raise ValueError(f"{name} is {rows.dtype}: the Triton kernels take bfloat16, float16 and float32 only")
    if rows.ndim != 2 or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)} and strides {rows.stride()}: pass 2-D rows with contiguous columns"
        )


def check_index(name: str, index: Tensor) -> None:
    if index.dtype != torch.int64:
        raise ValueError(f"{name} is {index.dtype}: pass int64")


def check_entries(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"{shapes}: pass one element per entry, (nnz,)")


__all__ = ["available", "posting_dots", "row_dots", "row_sums", "transposed_row_sums"]
