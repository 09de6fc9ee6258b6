"""
A step of `CompactAdam` on a GPU as one Triton kernel per parameter. The formula, and the plain code that computes it
elsewhere, stand in `training/optimizers.py`.

A program takes a row (a feature) or, where rows are short, some of them. It reads the gradient twice, once for its
norm and once, from the end, for the update: the second time much of it comes from a cache. Beyond that every number
is read once and written once: of a weight in bfloat16 10 bytes, of one in float32 16. No atomics: the same bits each
time.
"""

import torch
from torch import Tensor

from .triton_rows import available, triton


if triton is not None:
    import triton.language as tl

    from .triton_rows import add

# Columns of a row at a time, at most; least elements of a program, which takes several rows where they are short; and
# elements of one warp, so that no element is in the registers of two.
ADAM_COLUMNS, ADAM_ELEMENTS, ADAM_PER_WARP = 4096, 256, 512


if triton is not None:

    @triton.jit(do_not_specialize=["place"])
    def adam_kernel(
        weights,
        gradients,
        second_moments,
        denominators,
        updates,
        factors,
        place,
        num_rows,
        num_columns,
        beta1,
        beta2,
        share,
        kept,
        HAS_MOMENT: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        listed = rows < num_rows
        starts = (rows * num_columns)[:, None]
        eps = tl.load(factors + 2 * place)
        rate = tl.load(factors + 2 * place + 1)
        second_moment = tl.load(second_moments + rows, mask=listed, other=0.0)
        denominator = tl.load(denominators + rows, mask=listed, other=0.0)

        squares = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
        for first in range(0, num_columns, BLOCK_C):
            columns = first + tl.arange(0, BLOCK_C)
            inside = listed[:, None] & (columns < num_columns)[None, :]
            places = starts + columns[None, :]
            g = tl.load(gradients + places, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
            squares += g * g
        second_moment = beta2 * second_moment + share * tl.reduce(squares, 1, add)
        new_denominator = tl.sqrt_rn(second_moment) + eps
        inverse = tl.div_rn(tl.full((BLOCK_R,), 1.0, tl.float32), new_denominator)
        tl.debug_barrier()  # all threads have read the old ones
        tl.store(second_moments + rows, second_moment, mask=listed)
        tl.store(denominators + rows, new_denominator, mask=listed)

        last = (num_columns - 1) // BLOCK_C * BLOCK_C
        for first in range(0, num_columns, BLOCK_C):
            columns = last - first + tl.arange(0, BLOCK_C)
            inside = listed[:, None] & (columns < num_columns)[None, :]
            places = starts + columns[None, :]
            m = tl.load(gradients + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            w = tl.load(weights + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if HAS_MOMENT:
                u = tl.load(updates + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
                m += u * (beta1 * denominator)[:, None]
            w = kept * w + m * (rate * inverse)[:, None]
            tl.store(weights + places, w.to(weights.dtype.element_ty), mask=inside, eviction_policy="evict_first")
            if HAS_MOMENT:
                u = (m * inverse[:, None]).to(updates.dtype.element_ty)
                tl.store(updates + places, u, mask=inside, eviction_policy="evict_first")


def takes(parameter: Tensor) -> bool:
    """Whether [`adam_step`] can update this parameter in place."""
    return available(parameter) and parameter.is_contiguous() and parameter.numel() > 0


def adam_step(
    parameter: Tensor, state: dict[str, Tensor], factors: Tensor, place: int, betas: tuple[float, float], kept: float
) -> None:
    """
    One step of a parameter and of its state, in place; arithmetic in float32, and each result rounded once.

    Args:
        parameter: (rows, ...) bfloat16, float16 or float32, contiguous, with its gradient.
        state: `second_moment` and `denominator`, (rows,) float32, and, unless beta1 is 0, `update`, as the parameter
            in float16 or float32.
        factors: (P, 2) float32 on the parameter's device, of this step: what is added to the root of the second
            moment, and what the quotient of the moment and that is multiplied with, a negative number.
        place: Which row of `factors` is this parameter's.
        betas: Decays of the moments.
        kept: What weight decay leaves of a weight, a factor.
    """
    (beta1, beta2), num_rows = betas, len(parameter)
    num_columns = parameter.numel() // num_rows
    block_c, block_r, num_warps = adam_blocks(num_columns)
    with torch.cuda.device_of(parameter):
        adam_kernel[(triton.cdiv(num_rows, block_r),)](
            parameter,
            parameter.grad.contiguous(),
            state["second_moment"],
            state["denominator"],
            # A pointer that is never read stands in for none.
            state["update"] if beta1 else parameter,
            factors,
            place,
            num_rows,
            num_columns,
            beta1,
            beta2,
            (1 - beta2) / num_columns,
            kept,
            HAS_MOMENT=beta1 > 0,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )


def adam_blocks(num_columns: int) -> tuple[int, int, int]:
    """Columns at a time, rows, and warps of a program for rows of this length."""
    columns = min(ADAM_COLUMNS, triton.next_power_of_2(num_columns))
    rows = max(1, ADAM_ELEMENTS // columns)
    return columns, rows, max(1, columns * rows // ADAM_PER_WARP)


__all__ = ["adam_step", "takes"]
