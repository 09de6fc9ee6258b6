"""
The k largest entries of each row on a GPU, in Triton: exact, in ascending order, and among equal ones those that come
first.

One program per row looks for the cut, the k-th largest entry, by bisection. It starts close: the row is folded into
`TOPK_COLUMNS` maxima, and the k-th largest of these is hardly below the cut. Then it mostly takes a pass or two over
the row, which is in a cache by then, and one that writes what is above.
"""

import torch
from torch import Tensor

from .triton_rows import available, triton


if triton is not None:
    import triton.language as tl

    from .triton_rows import add

# Columns of a row at a time, as many as there are maxima; and warps of a program.
TOPK_COLUMNS, TOPK_WARPS = 1024, 4
# Low bits that are 0 in every entry of these once it is in float32.
EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


if triton is not None:

    @triton.jit
    def larger(a, b):
        return tl.maximum(a, b)

    @triton.jit
    def load_keys(values, columns, num_columns, EMPTY: tl.constexpr):
        """Entries as integers in the same order, NaN above all; below all what is past the end of the row."""
        inside = columns < num_columns
        bits = tl.load(values + columns, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        keys = tl.where(size > 0x7F800000, 0x7FFFFFFE, tl.where(bits < 0, -size, size))
        return tl.where(inside, keys >> EMPTY, -0x7FFFFFFF)

    @triton.jit
    def middle(low, high):
        return ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)

    @triton.jit
    def topk_kernel(
        values,
        positions,
        num_columns,
        row_stride,
        k,
        EMPTY: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        values += row * row_stride
        lanes = tl.arange(0, BLOCK_C)
        maxima = tl.full((BLOCK_C,), -0x7FFFFFFF, tl.int32)
        for first in range(0, num_columns, BLOCK_C):
            maxima = tl.maximum(maxima, load_keys(values, first + lanes, num_columns, EMPTY))

        # At least k entries are `low` or above; fewer are `high` or above.
        high = tl.reduce(maxima, 0, larger) + 1
        low = high - high - 0x7FFFFFFF  # below all entries
        if k <= BLOCK_C:
            upper = high
            while low + 1 < upper:
                cut = middle(low, upper)
                reached = tl.reduce((maxima >= cut).to(tl.int32), 0, add) >= k
                low = tl.where(reached, cut, low)
                upper = tl.where(reached, upper, cut)

        num_above, cut, found = 0, low, False
        while (low + 1 < high) & (found == 0):
            counts = tl.full((BLOCK_C,), 0, tl.int32)
            for first in range(0, num_columns, BLOCK_C):
                counts += (load_keys(values, first + lanes, num_columns, EMPTY) >= cut).to(tl.int32)
            count = tl.reduce(counts, 0, add)
            found = count == k
            num_above = tl.where(count < k, count, num_above)
            low = tl.where(count >= k, cut, low)
            high = tl.where(count < k, cut, high)
            cut = middle(low, high)

        # Of those at the cut as many as are lacking, or all of them.
        wanted = tl.where(found, num_columns, k - num_above)
        above_before, equal_before = 0, 0
        for first in range(0, num_columns, BLOCK_C):
            keys = load_keys(values, first + lanes, num_columns, EMPTY)
            above, equal = keys > low, (keys == low) & (first + lanes < num_columns)
            both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
            up_to = tl.associative_scan(both, 0, add)
            equals = equal_before + (up_to >> 16)
            place = above_before + (up_to & 0xFFFF) + tl.minimum(equals, wanted) - 1
            chosen = above | (equal & (equals <= wanted))
            position = row * num_columns + first + lanes
            tl.store(positions + row * k + place, position, mask=chosen & (place < k))
            total = tl.reduce(both, 0, add)
            above_before += total & 0xFFFF
            equal_before += total >> 16


def takes(values: Tensor) -> bool:
    """Whether [`positions_topk`] can look through these rows."""
    return values.ndim == 2 and available(values) and values.is_contiguous()


def positions_topk(values: Tensor, k: int) -> Tensor:
    """
    Flat positions of the k largest entries of each row, ascending; NaN is above all, and of equal entries at the cut
    the first are taken.

    Args:
        values: (N, F) bfloat16, float16 or float32, contiguous.
        k: At most F.

    Returns:
        (N · k,) int64.
    """
    num_rows, num_columns = values.shape
    positions = torch.empty(num_rows * k, dtype=torch.int64, device=values.device)
    if positions.numel() == 0:
        return positions
    with torch.cuda.device_of(values):
        topk_kernel[(num_rows,)](
            values,
            positions,
            num_columns,
            values.stride(0),
            k,
            EMPTY=EMPTY_BITS[values.dtype],
            BLOCK_C=TOPK_COLUMNS,
            num_warps=TOPK_WARPS,
        )
    return positions


__all__ = ["positions_topk", "takes"]
