"""
The optimizers' steps and the norm of all gradients on a GPU, in Triton. The formulas, and the plain code that computes
them elsewhere, stand in `training/optimizers.py`.

One launch takes all parameters of the same formats, at any depth: a program finds its parameter in a table of
addresses, sizes and settings, which the host makes anew for each step and sends without waiting. Gradients are
multiplied with the factor of clipping as they are read, and never written. No atomics: the same bits each time.

Beside what comes from a cache every number is read once and written once. Bytes per weight:

| | float32 | bfloat16 |
|---|---|---|
| `CompactAdam` (without first moment) | 16 (12) | 10 (6) |
| Adam | 28 | 22 |
| norm for clipping | 4 | 2 |

Weights in bfloat16 are rounded up or down at random, so that on average nothing is lost: rounding to the nearest, a
weight would stay where it is for ever under steps of less than half the spacing, 1/512 to 1/256 of it. The random
numbers are a hash of the run's seed, the step, the parameter and the element ([`rounding_key`],
[`round_stochastically_`]).
"""

import torch
from torch import Tensor

from .triton_rows import available, table_on, triton


if triton is not None:
    import triton.language as tl

    from .triton_rows import add

    FORMATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Of CompactAdam: columns of a row at a time, at most; least elements of a program, which takes several rows where they
# are short; and elements of one warp, so that no element is in the registers of two.
ADAM_COLUMNS, ADAM_ELEMENTS, ADAM_PER_WARP = 4096, 256, 512
# Elements of a program of Adam and of the norm, and how many of them at a time, with 8 and 16 for each thread.
WIDE_ELEMENTS, WIDE_BLOCK, WIDE_WARPS = 4096, 1024, 4
SQUARES_ELEMENTS, SQUARES_BLOCK, SQUARES_WARPS = 65_536, 4096, 8
# Parameters that a program looks for its own among, at least: a kernel is compiled again for each power of two.
LEAST_PARAMETERS = 128


if triton is not None:

    @triton.jit
    def find(table, num_parameters, begin, BLOCK_P: tl.constexpr):
        """The column of the table with this program's parameter, and which of the parameter's programs this is."""
        program = begin + tl.program_id(0).to(tl.int64)
        numbers = tl.arange(0, BLOCK_P)
        firsts = tl.load(table + numbers, mask=numbers < num_parameters, other=0)
        begun = (numbers < num_parameters) & (firsts <= program)
        column = table + tl.reduce(begun.to(tl.int32), 0, add) - 1
        return column, program - tl.load(column)

    @triton.jit
    def pointer(place, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
        address = tl.load(place).to(tl.pointer_type(FORMAT))
        if ALIGNED:
            address = tl.multiple_of(address, 16)
        return address

    @triton.jit
    def size_of(place, ALIGNED: tl.constexpr):
        size = tl.load(place)
        if ALIGNED:
            size = tl.multiple_of(size, 16)
        return size

    @triton.jit
    def number(place):
        return tl.load(place).to(tl.float64, bitcast=True).to(tl.float32)

    @triton.jit
    def rounded(w, places, key, FORMAT: tl.constexpr):
        """float32 to the format of the weights: `round_stochastically_`, and to the nearest in other formats."""
        if FORMAT.is_bf16():
            x = (places >> 1).to(tl.int32) ^ key
            x ^= x >> 16
            x *= 0x7FEB352D
            x ^= x >> 15
            x *= -0x7B935975
            x ^= (x >> 16) & 0xFFFF
            noise = (x >> ((places.to(tl.int32) & 1) * 16)) & 0xFFFF
            bits = tl.minimum(w.to(tl.int32, bitcast=True), 0x7FFF0000)  # NaN stays
            w = ((bits + noise) & -0x10000).to(tl.float32, bitcast=True)
        return w.to(FORMAT)

    @triton.jit(do_not_specialize=["num_parameters", "begin"])
    def adam_kernel(
        table,
        num_parameters,
        begin,
        factor,
        HAS_FACTOR: tl.constexpr,
        HAS_MOMENT: tl.constexpr,
        WEIGHT: tl.constexpr,
        GRADIENT: tl.constexpr,
        MOMENT: tl.constexpr,
        ALIGNED: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        column, program = find(table, num_parameters, begin, BLOCK_P)
        weights = pointer(column + num_parameters, WEIGHT, ALIGNED)
        gradients = pointer(column + 2 * num_parameters, GRADIENT, ALIGNED)
        updates = pointer(column + 3 * num_parameters, MOMENT, ALIGNED)
        second_moments = pointer(column + 4 * num_parameters, tl.float32, False)
        denominators = pointer(column + 5 * num_parameters, tl.float32, False)
        key = tl.load(column + 6 * num_parameters).to(tl.int32)
        num_rows = tl.load(column + 7 * num_parameters)
        num_columns = size_of(column + 8 * num_parameters, ALIGNED).to(tl.int32)
        eps = number(column + 9 * num_parameters)
        rate = number(column + 10 * num_parameters)
        kept = number(column + 11 * num_parameters)
        beta1 = number(column + 12 * num_parameters)
        beta2 = number(column + 13 * num_parameters)
        share = number(column + 14 * num_parameters)

        if HAS_FACTOR:
            clip = tl.load(factor)

        rows = program * BLOCK_R + tl.arange(0, BLOCK_R)
        listed = rows < num_rows
        starts = (rows * num_columns)[:, None]
        second_moment = tl.load(second_moments + rows, mask=listed, other=0.0)
        denominator = tl.load(denominators + rows, mask=listed, other=0.0)

        squares = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
        for first in range(0, num_columns, BLOCK_C):
            columns = first + tl.arange(0, BLOCK_C)
            inside = listed[:, None] & (columns < num_columns)[None, :]
            places = starts + columns[None, :]
            g = tl.load(gradients + places, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
            if HAS_FACTOR:
                g *= clip
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
            if HAS_FACTOR:
                m *= clip
            if HAS_MOMENT:
                u = tl.load(updates + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
                m += u * (beta1 * denominator)[:, None]
            w = kept * w + m * (rate * inverse)[:, None]
            w = rounded(w, places, key, WEIGHT)
            tl.store(weights + places, w, mask=inside, eviction_policy="evict_first")
            if HAS_MOMENT:
                u = (m * inverse[:, None]).to(MOMENT)
                tl.store(updates + places, u, mask=inside, eviction_policy="evict_first")

    @triton.jit(do_not_specialize=["num_parameters", "begin"])
    def wide_kernel(
        table,
        num_parameters,
        begin,
        factor,
        HAS_FACTOR: tl.constexpr,
        WEIGHT: tl.constexpr,
        GRADIENT: tl.constexpr,
        ALIGNED: tl.constexpr,
        BLOCK_P: tl.constexpr,
        ELEMENTS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        column, program = find(table, num_parameters, begin, BLOCK_P)
        weights = pointer(column + num_parameters, WEIGHT, ALIGNED)
        gradients = pointer(column + 2 * num_parameters, GRADIENT, ALIGNED)
        first_moments = pointer(column + 3 * num_parameters, tl.float32, ALIGNED)
        second_moments = pointer(column + 4 * num_parameters, tl.float32, ALIGNED)
        key = tl.load(column + 5 * num_parameters).to(tl.int32)
        size = size_of(column + 6 * num_parameters, ALIGNED)
        eps = number(column + 7 * num_parameters)
        rate = number(column + 8 * num_parameters)
        kept = number(column + 9 * num_parameters)
        share1 = number(column + 10 * num_parameters)
        share2 = number(column + 11 * num_parameters)

        if HAS_FACTOR:
            clip = tl.load(factor)

        start = program * ELEMENTS
        size = tl.minimum(size - start, ELEMENTS).to(tl.int32)
        weights += start
        gradients += start
        first_moments += start
        second_moments += start
        for first in range(0, ELEMENTS, BLOCK):
            places = first + tl.arange(0, BLOCK)
            inside = places < size
            g = tl.load(gradients + places, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weights + places, mask=inside, other=0.0).to(tl.float32)
            m = tl.load(first_moments + places, mask=inside, other=0.0)
            v = tl.load(second_moments + places, mask=inside, other=0.0)
            if HAS_FACTOR:
                g *= clip
            m += share1 * (g - m)
            v += share2 * (g * g - v)
            w = kept * w + rate * tl.div_rn(m, tl.sqrt_rn(v) + eps)
            tl.store(first_moments + places, m, mask=inside)
            tl.store(second_moments + places, v, mask=inside)
            tl.store(weights + places, rounded(w, start + places, key, WEIGHT), mask=inside)

    @triton.jit(do_not_specialize=["num_parameters", "begin"])
    def squares_kernel(
        table,
        num_parameters,
        begin,
        sums,
        FORMAT: tl.constexpr,
        ALIGNED: tl.constexpr,
        BLOCK_P: tl.constexpr,
        ELEMENTS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        column, program = find(table, num_parameters, begin, BLOCK_P)
        tensors = pointer(column + num_parameters, FORMAT, ALIGNED)
        size = size_of(column + 2 * num_parameters, ALIGNED)
        squares = tl.full((BLOCK,), 0.0, tl.float32)
        for first in range(0, ELEMENTS, BLOCK):
            places = program * ELEMENTS + first + tl.arange(0, BLOCK)
            x = tl.load(tensors + places, mask=places < size, other=0.0).to(tl.float32)
            squares += x * x
        tl.store(sums + begin + tl.program_id(0), tl.reduce(squares, 0, add))


def takes(tensor: Tensor) -> bool:
    """Whether the kernels can read this tensor, and write it in place."""
    return available(tensor) and tensor.is_contiguous() and tensor.numel() > 0


def compact_step(steps: list[tuple], factor: Tensor | None = None) -> None:
    """
    A step of `CompactAdam` in place; arithmetic in float32, and each result rounded once.

    Args:
        steps: Of each parameter, all on one device: the parameter, (rows, ...) bfloat16, float16 or float32,
            contiguous, with its gradient; its state, `second_moment` and `denominator`, (rows,) float32, and, unless
            beta1 is 0, `update`, as the parameter in float16 or float32; the key of its rounding; and a tuple of: what
            is added to the root of the second moment, what the quotient of the moment and that is multiplied with (a
            negative number), what weight decay leaves of a weight (a factor), beta1, beta2.
        factor: () float32 on that device: what gradients are multiplied with; None: 1.
    """
    entries, gradients = [], []
    for parameter, state, key, numbers in steps:
        num_rows, (*_, beta1, beta2) = len(parameter), numbers
        num_columns = parameter.numel() // num_rows
        block_c, block_r, num_warps = adam_blocks(num_columns)
        gradients.append(parameter.grad.contiguous())
        # A pointer that is never read stands in for none.
        tensors = [parameter, gradients[-1], state["update"] if beta1 else parameter]
        constants = {
            "HAS_MOMENT": beta1 > 0,
            "WEIGHT": FORMATS[parameter.dtype],
            "GRADIENT": FORMATS[gradients[-1].dtype],
            "MOMENT": FORMATS[tensors[2].dtype],
            "ALIGNED": num_columns % 16 == 0 and are_aligned(tensors),
            "BLOCK_R": block_r,
            "BLOCK_C": block_c,
            "num_warps": num_warps,
        }
        tensors += [state["second_moment"], state["denominator"]]
        integers = [*(tensor.data_ptr() for tensor in tensors), key, num_rows, num_columns]
        share = (1 - beta2) / num_columns
        entries.append((constants, triton.cdiv(num_rows, block_r), integers, [*numbers, share]))
    launch(adam_kernel, entries, steps[0][0], steps[0][0] if factor is None else factor, HAS_FACTOR=factor is not None)


def wide_step(steps: list[tuple], factor: Tensor | None = None) -> None:
    """
    A step of Adam in place; arithmetic in float32, and each result rounded once.

    Args:
        steps: Of each parameter, all on one device: the parameter, bfloat16, float16 or float32, contiguous, with its
            gradient; its state, `exp_avg` and `exp_avg_sq`, as the parameter in float32; the key of its rounding; and
            a tuple of: what is added to the root of the second moment, what the quotient of the first moment and that
            is multiplied with (a negative number), what weight decay leaves of a weight (a factor), 1 - beta1,
            1 - beta2.
        factor: () float32 on that device: what gradients are multiplied with; None: 1.
    """
    entries, gradients = [], []
    for parameter, state, key, numbers in steps:
        gradients.append(parameter.grad.contiguous())
        tensors = [parameter, gradients[-1], state["exp_avg"], state["exp_avg_sq"]]
        constants = {
            "WEIGHT": FORMATS[parameter.dtype],
            "GRADIENT": FORMATS[gradients[-1].dtype],
            "ALIGNED": parameter.numel() % 16 == 0 and are_aligned(tensors),
            "ELEMENTS": WIDE_ELEMENTS,
            "BLOCK": WIDE_BLOCK,
            "num_warps": WIDE_WARPS,
        }
        integers = [*(tensor.data_ptr() for tensor in tensors), key, parameter.numel()]
        entries.append((constants, triton.cdiv(parameter.numel(), WIDE_ELEMENTS), integers, numbers))
    launch(wide_kernel, entries, steps[0][0], steps[0][0] if factor is None else factor, HAS_FACTOR=factor is not None)


def norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm, () float32, of all elements of some tensors that the kernels take, one or more on one device."""
    entries = []
    for tensor in tensors:
        constants = {
            "FORMAT": FORMATS[tensor.dtype],
            "ALIGNED": tensor.numel() % 16 == 0 and are_aligned([tensor]),
            "ELEMENTS": SQUARES_ELEMENTS,
            "BLOCK": SQUARES_BLOCK,
            "num_warps": SQUARES_WARPS,
        }
        programs = triton.cdiv(tensor.numel(), SQUARES_ELEMENTS)
        entries.append((constants, programs, [tensor.data_ptr(), tensor.numel()], []))
    sums = torch.empty(sum(entry[1] for entry in entries), device=tensors[0].device)
    launch(squares_kernel, entries, tensors[0], sums)
    return sums.sum().sqrt()


def launch(kernel, entries: list[tuple], like: Tensor, *arguments, **options) -> None:
    """
    Starts a kernel once for all entries of the same constants.

    Args:
        kernel: Takes a table, its number of parameters, the number of its first program, `arguments`, and as constants
            `BLOCK_P`, `options` and those of the entries.
        entries: Of each parameter its constants, its number of programs, its integers and its numbers, which make its
            column of the table, in this order after the number of its first program.
        like: A tensor on the device.
    """
    groups = {}
    for constants, *entry in entries:
        groups.setdefault(tuple(constants.items()), []).append(entry)
    calls, tables, begin = [], [], 0
    for constants, group in groups.items():
        start, integers = begin, []
        for programs, own, _ in group:
            integers.append([begin, *own])
            begin += programs
        numbers = torch.tensor([entry[2] for entry in group], dtype=torch.float64).view(torch.int64)
        tables.append(torch.cat([torch.tensor(integers), numbers], dim=1).T.flatten())
        block_p = max(LEAST_PARAMETERS, triton.next_power_of_2(len(group)))
        constants = {"BLOCK_P": block_p} | dict(constants) | options
        calls.append((begin - start, len(group), start, constants))
    sizes = [len(table) for table in tables]
    tables = table_on(like.device, torch.cat(tables)).split(sizes)
    with torch.cuda.device_of(like):
        for table, (programs, size, start, constants) in zip(tables, calls, strict=True):
            kernel[(programs,)](table, size, start, *arguments, **constants)


def are_aligned(tensors: list[Tensor]) -> bool:
    """Whether 16 bytes at a time can be read from the beginning of each on."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def adam_blocks(num_columns: int) -> tuple[int, int, int]:
    """Columns at a time, rows, and warps of a program for rows of this length."""
    columns = min(ADAM_COLUMNS, triton.next_power_of_2(num_columns))
    rows = max(1, ADAM_ELEMENTS // columns)
    return columns, rows, max(1, columns * rows // ADAM_PER_WARP)


# -- rounding at random -----------------------------------------------------------------------------------------------


def rounding_key(seed: int, step: int, number: int) -> int:
    """What makes the random numbers of a parameter's step, an int32, of the run's seed, the step, and which it is."""
    key = 0
    for part in (seed, step, number):
        key = (key ^ part) & 0xFFFFFFFF
        key = (key ^ key >> 16) * 0x7FEB352D & 0xFFFFFFFF
        key = (key ^ key >> 15) * 0x846CA68B & 0xFFFFFFFF
        key ^= key >> 16
    return key - 2**31


def round_stochastically_(wide: Tensor, key: int, start: int = 0) -> Tensor:
    """
    Rounds to numbers of bfloat16, up or down with the probabilities that keep the mean: a number from 0 to 65,535 is
    added to the 16 bits that go. It is half of a hash (Wellons' lowbias32, but for its shifts) of the key and of which
    pair of elements it is, modulo 2^33 elements.

    Args:
        wide: float32, contiguous; rounded in place.
        key: Of [`rounding_key`].
        start: Which element of its parameter the first one is.

    Returns:
        `wide`.
    """
    odd, first = start % 2, start // 2 % 2**32
    x = torch.arange((odd + wide.numel() + 1) // 2, dtype=torch.int32, device=wide.device)
    x += first - 2**32 if first >= 2**31 else first
    x ^= key
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= -0x7B935975
    x ^= (x >> 16) & 0xFFFF
    noise = x.view(torch.uint16)[odd : odd + wide.numel()].to(torch.int32)
    bits = wide.view(-1).view(torch.int32).clamp_(max=0x7FFF0000)  # which NaN of all ones would exceed
    bits += noise
    bits &= -0x10000
    return wide


__all__ = ["compact_step", "norm", "rounding_key", "round_stochastically_", "takes", "wide_step"]
