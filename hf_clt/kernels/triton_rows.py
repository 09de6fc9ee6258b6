"""
Sums of gathered rows on a GPU, in Triton. The plain reference and the choice between it and this kernel stand in
`rows.py`.

Repeatable bit for bit: no atomics, and each sum is taken in one fixed order. A `row_sums` even does not depend on the
block sizes: a column's entries are added one after the other. Accumulation is in float32, rows are bfloat16, float16
or float32. Nothing waits for the GPU, so wrong *values* (an index out of range) are not noticed here; wrong shapes and
dtypes are. It is not differentiable. Sums and dot products along posting lists stand in `triton_layers.py`.
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


__all__ = ["available", "row_sums", "table_on"]
