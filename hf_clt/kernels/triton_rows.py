"""
Sums and dot products of gathered rows on a GPU, in Triton: the two primitives of everything a CLT does with its active
features only. The plain reference and the choice between it and these kernels stand in `rows.py`.

Repeatable bit for bit: no atomics, and each sum is taken in one fixed order. A `row_sums` even does not depend on the
block sizes: a column's entries are added one after the other. Accumulation is in float32, rows are bfloat16, float16
or float32. Nothing waits for the GPU, so wrong *values* (an index out of range) are not noticed here; wrong shapes and
dtypes are. The functions are not differentiable; they are what backward passes are made of. Sums by feature, along the
posting lists, stand in `triton_layers.py`.
"""

import torch
from torch import Tensor


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
# A program of row_dots: this many entries times this many columns at a time.
DOT_ENTRIES, DOT_COLUMNS, DOT_WARPS = 4, 512, 4


if triton is not None:

    @triton.jit
    def row_sums_kernel(
        rows,
        indices,
        offsets,
        weights,
        out,
        num_columns,
        row_stride,
        out_stride,
        BLOCK_E: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        # Bags run fastest: all of them pass over one column tile of the rows while it is in the L2 cache.
        bag = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = columns < num_columns
        end = tl.load(offsets + bag + 1)
        total = tl.full((BLOCK_C,), 0.0, tl.float32)
        for first in range(tl.load(offsets + bag), end, BLOCK_E):
            # Unrolled: the loads of a round go out together, the sums stay in order.
            for i in tl.static_range(BLOCK_E):
                listed = first + i < end
                index = tl.load(indices + first + i, mask=listed, other=0)  # int64, as is every offset made of it
                weight = tl.load(weights + first + i, mask=listed, other=0.0).to(tl.float32)
                # jumprelu lists inactive features, whose rows are not read. (Bits: floats do not compare interpreted.)
                used = inside & (weight.to(tl.int32, bitcast=True) != 0)
                row = tl.load(rows + index * row_stride + columns, mask=used, other=0.0)
                total += weight * row.to(tl.float32)
        tl.store(out + bag * out_stride + columns, total.to(out.dtype.element_ty), mask=inside)

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


def available(tensor: Tensor) -> bool:
    """
    Whether the kernels can work on this tensor: Triton is there, the dtype is one of `DTYPES`, and the tensor is on a
    GPU, or Triton's interpreter is on (TRITON_INTERPRET=1 before this module is imported; slow, for tests).
    """
    if triton is None or tensor.dtype not in DTYPES:
        return False
    return tensor.is_cuda or not isinstance(row_sums_kernel, triton.JITFunction)


def table_on(device: torch.device, numbers: list[int] | Tensor) -> Tensor:
    """An int64 vector on the device, which is not waited for: pinned memory is not used again before it is copied."""
    numbers = torch.as_tensor(numbers, dtype=torch.int64)
    pinned = torch.empty(len(numbers), dtype=torch.int64, pin_memory=device.type == "cuda").copy_(numbers)
    return pinned.to(device, non_blocking=True)


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
    check_entries(indices=indices, weights=weights)
    check_index("indices", indices)
    check_index("offsets", offsets)
    num_bags, num_columns = offsets.numel() - 1, rows.shape[1]
    out = rows.new_empty(num_bags, num_columns)
    if out.numel() == 0:
        return out
    block = column_block(rows)
    with torch.cuda.device_of(rows):
        row_sums_kernel[(num_bags, triton.cdiv(num_columns, block))](
            rows,
            indices.contiguous(),
            offsets.contiguous(),
            weights.contiguous(),
            out,
            num_columns,
            rows.stride(0),
            out.stride(0),
            BLOCK_E=SUM_ENTRIES,
            BLOCK_C=block,
            num_warps=1,
        )
    return out


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


__all__ = ["available", "row_dots", "row_sums", "table_on"]
