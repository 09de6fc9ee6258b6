"""
Selections on a GPU, in Triton: exact, in ascending order, for any number of layers in the same few launches, and
without waiting for the GPU. Entries are compared as integers in the same order, with -0.0 equal to 0.0 and NaN above
all; of equal entries at a cut those that come first are taken. Atomics add integers only: results are repeatable.

- [`positions_topk`]: the k largest of each row, many short rows. One program per row folds it into `TOPK_COLUMNS`
  lanes and keeps the two largest of each lane: a list that mostly has all of the k largest, and with them the cut, the
  k-th largest entry, and how many are above. A second pass, mostly out of a cache, writes what is above and counts it.
  Where the list lacked some, the counts say how many, and the next cut is that of the list for as many fewer; after
  three such passes the cut is found by bisection.
- [`positions_largest`]: the largest of each row, a few long rows. In two rounds: of the groups of `GROUP` columns
  those with the largest maxima, then of the entries of these groups the largest. In a round a histogram of the upper
  16 bits gives the cut, with float32 one of the lower 16 bits as well.
- [`mark_above`] and [`positions_marked`]: what exceeds a threshold.

The last two write a bit per entry first, 32 in a word, and positions from the bits: rows are not read again for it.
"""

import torch
from torch import Tensor

from .triton_rows import available, triton


if triton is not None:
    import triton.language as tl

    from .triton_rows import add

# Lanes into which a row is folded, words of it at a time (fewer than 2^16 columns), and warps of a program.
TOPK_COLUMNS, TOPK_WORDS, TOPK_WARPS = 1024, 64, 4
# Columns that share a maximum: a bit each in a word.
GROUP = 32
# Groups of a program that finds their maxima, that counts entries (more take 200 registers), that makes their words.
MAXIMA_GROUPS, HISTOGRAM_GROUPS, MARK_GROUPS, SELECT_WARPS = 256, 64, 256, 4
# Rows of one layer that a program compares with the same thresholds, and words of each at a time.
ABOVE_ROWS, ABOVE_WORDS = 4, 64
# Words of a row at a time, to write their positions; [`positions_largest`] takes `MARK_GROUPS`.
WRITE_WORDS, WRITE_WARPS = 256, 2
BINS, CUT_WARPS = 65_536, 8
# Infinity as an integer: all that is above is NaN.
INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
MAX_COLUMNS = 2**30


if triton is not None:

    @triton.jit
    def larger(a, b):
        return tl.maximum(a, b)

    @triton.jit
    def smaller(a, b):
        return tl.minimum(a, b)

    @triton.jit
    def either(a, b):
        return a | b

    @triton.jit
    def larger_or_nan(a, b):
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def keys_of(bits, INFINITY: tl.constexpr):
        """Bits of floats, as int32, as integers in the same order, NaN above all."""
        LOWEST: tl.constexpr = -0x80000000 if INFINITY > 0x7FFF else -0x8000
        keys = tl.where(bits < 0, LOWEST - bits, bits)
        return tl.where((keys > INFINITY) | (keys < -INFINITY), INFINITY + 1, keys)

    @triton.jit
    def load_keys(values, positions, inside, INFINITY: tl.constexpr):
        """Keys of entries, and below all of them what is not inside."""
        bits = tl.load(values + positions, mask=inside, other=0).to(tl.int32)
        return tl.where(inside, keys_of(bits, INFINITY), -INFINITY - 1)

    # -- the largest of long rows: histograms -------------------------------------------------------------------------

    @triton.jit
    def bin_of(keys, INFINITY: tl.constexpr, LOWER: tl.constexpr):
        """
        Where the upper 16 bits of keys, or the lower ones, are counted. Neighbours stand 256 bins apart: what is hot
        is spread over the L2 cache.
        """
        if LOWER:
            digits = keys & 0xFFFF
        elif INFINITY > 0x7FFF:
            digits = (keys >> 16) + 0x8000
        else:
            digits = keys + 0x8000
        return (digits & 0xFF) * 256 + (digits >> 8)

    @triton.jit
    def find_digit(counts, lanes, wanted):
        """The digit of the `wanted`-th largest, counts by digit; and how many are wanted of this digit."""
        up_to = tl.associative_scan(counts, 0, add)
        from_here = tl.reduce(counts, 0, add) - up_to + counts
        digit = tl.reduce(tl.where(from_here >= wanted, lanes, 0), 0, larger)
        return digit, wanted - tl.reduce(tl.where(lanes > digit, counts, 0), 0, add)

    @triton.jit
    def cut_kernel(histogram, before, cuts, count, LOWER: tl.constexpr):
        """
        From a histogram (B, BINS) the cut of each row, its key or the key's upper half, and how many of the entries at
        the cut are among the `count` largest: (B, 2). LOWER: `before` is that of the upper halves.
        """
        row = tl.program_id(0)
        histogram += row.to(tl.int64) * 65536
        lanes, lines = tl.arange(0, 256), tl.arange(0, 16)
        totals = tl.full((256,), 0, tl.int32)
        for first in range(0, 256, 16):
            lower = first + lines
            totals += tl.reduce(tl.load(histogram + lower[:, None] * 256 + lanes[None, :]), 0, add)
        wanted = count
        if LOWER:
            wanted = tl.load(before + 2 * row + 1)
        upper, wanted = find_digit(totals, lanes, wanted)
        lower, wanted = find_digit(tl.load(histogram + lanes * 256 + upper), lanes, wanted)
        cut = upper * 256 + lower
        if LOWER:
            cut += tl.load(before + 2 * row) << 16
        else:
            cut -= 0x8000
        tl.store(cuts + 2 * row, cut)
        tl.store(cuts + 2 * row + 1, wanted)

    @triton.jit
    def maxima_kernel(
        values,
        maxima,
        histogram,
        num_columns,
        num_groups,
        INFINITY: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_G: tl.constexpr,
    ):
        """The maximum of each group, of floats, and a histogram of the upper 16 bits of its key."""
        row = tl.program_id(1).to(tl.int64)
        groups = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
        positions = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        entries = tl.load(values + row * num_columns + positions, mask=positions < num_columns, other=float("-inf"))
        highest = tl.reduce(entries.to(tl.float32), 1, larger_or_nan).to(maxima.dtype.element_ty)
        listed = groups < num_groups
        tl.store(maxima + row * num_groups + groups, highest, mask=listed)
        bits = highest.to(tl.int32 if INFINITY > 0x7FFF else tl.int16, bitcast=True).to(tl.int32)
        counted = histogram + row * 65536 + bin_of(keys_of(bits, INFINITY), INFINITY, False)
        tl.atomic_add(counted, 1, mask=listed, sem="relaxed")

    @triton.jit
    def load_groups(
        values,
        groups,
        indices,
        row,
        num_columns,
        num_groups,
        INFINITY: tl.constexpr,
        LISTED: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        """Keys of whole groups (indices, GROUP), numbers of a list or themselves the groups; and what is inside."""
        listed = indices < num_groups
        if LISTED:
            indices = tl.load(groups + row * num_groups + indices, mask=listed, other=0)
        positions = indices[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = listed[:, None] & (positions < num_columns)
        return load_keys(values + row * num_columns, positions, inside, INFINITY), inside

    @triton.jit
    def histogram_kernel(
        values,
        groups,
        cuts,
        histogram,
        num_columns,
        num_groups,
        INFINITY: tl.constexpr,
        LISTED: tl.constexpr,
        LOWER: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_G: tl.constexpr,
    ):
        """
        Of the upper 16 bits of keys: with a list those from the cut on by which it was made. LOWER: of the lower 16
        bits, where the upper ones are those of the cut.
        """
        row = tl.program_id(1).to(tl.int64)
        indices = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
        keys, counted = load_groups(values, groups, indices, row, num_columns, num_groups, INFINITY, LISTED, GROUP)
        if LOWER:
            counted &= (keys >> 16) == tl.load(cuts + 2 * row)
        elif LISTED:
            counted &= keys >= tl.load(cuts + 2 * row)
        tl.atomic_add(histogram + row * 65536 + bin_of(keys, INFINITY, LOWER), 1, mask=counted, sem="relaxed")

    # -- bits, and positions from them --------------------------------------------------------------------------------

    @triton.jit
    def popcount(words):
        """How many bits are set; shifts of int32 copy the sign, which the masks take away."""
        words -= (words >> 1) & 0x55555555
        words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
        words = (words + (words >> 4)) & 0x0F0F0F0F
        return (words * 0x01010101) >> 24

    @triton.jit
    def lowest_bits(words, counts, wanted):
        """The lowest set bits of each word, as many as are wanted."""
        chosen = tl.where(counts <= wanted, words, 0)
        rest = words ^ chosen  # of one word at most some are wanted and not all
        while tl.reduce(tl.where(rest != 0, wanted, 0), 0, larger) > 0:
            lowest = tl.where(wanted > 0, rest & -rest, 0)
            chosen |= lowest
            rest ^= lowest
            wanted -= 1
        return chosen

    @triton.jit
    def write_bits(out, places, words, counts, bits_before):
        """The numbers of the set bits of each word, from `places` on; `bits_before` is the number of its bit 0."""
        rounds = tl.reduce(counts, 0, larger)
        for _round in range(rounds):
            lowest = words & -words
            tl.store(out + places, bits_before + popcount(lowest - 1), mask=words != 0)
            words ^= lowest
            places += 1

    @triton.jit
    def mark_kernel(
        values,
        groups,
        cuts,
        above,
        equal,
        totals,
        num_columns,
        num_groups,
        num_blocks,
        INFINITY: tl.constexpr,
        LISTED: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_G: tl.constexpr,
    ):
        """A word for each group of what is above the cut and of what equals it; both counts of each block in one."""
        block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        indices = block * BLOCK_G + tl.arange(0, BLOCK_G)
        keys, _inside = load_groups(values, groups, indices, row, num_columns, num_groups, INFINITY, LISTED, GROUP)
        cut = tl.load(cuts + 2 * row)
        bits = tl.arange(0, GROUP)[None, :]
        above_words = tl.reduce((keys > cut).to(tl.int32) << bits, 1, either)
        equal_words = tl.reduce((keys == cut).to(tl.int32) << bits, 1, either)
        tl.store(above + row * num_groups + indices, above_words, mask=indices < num_groups)
        tl.store(equal + row * num_groups + indices, equal_words, mask=indices < num_groups)
        counts = (popcount(above_words).to(tl.int64) << 32) + popcount(equal_words)
        tl.store(totals + row * num_blocks + block, tl.reduce(counts, 0, add))

    @triton.jit
    def write_kernel(
        above,
        equal,
        totals,
        groups,
        cuts,
        out,
        count,
        num_groups,
        num_blocks,
        LISTED: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_G: tl.constexpr,
    ):
        """Positions of all that is above and, of what equals the cut, of the first that are lacking."""
        block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        lanes = tl.arange(0, BLOCK_G)
        before = tl.full((BLOCK_G,), 0, tl.int64)
        for first in range(0, block, BLOCK_G):
            earlier = first + lanes
            before += tl.load(totals + row * num_blocks + earlier, mask=earlier < block, other=0)
        both_before = tl.reduce(before, 0, add)
        above_before, equal_before = (both_before >> 32).to(tl.int32), (both_before & 0xFFFFFFFF).to(tl.int32)

        indices = block * BLOCK_G + lanes
        listed = indices < num_groups
        words = tl.load(above + row * num_groups + indices, mask=listed, other=0)
        equals = tl.load(equal + row * num_groups + indices, mask=listed, other=0)
        lacking = tl.load(cuts + 2 * row + 1)
        num_equals = popcount(equals)
        missing = tl.maximum(lacking - equal_before - tl.associative_scan(num_equals, 0, add) + num_equals, 0)
        words |= lowest_bits(equals, num_equals, missing)
        num_words = popcount(words)
        places = above_before + tl.minimum(equal_before, lacking) + tl.associative_scan(num_words, 0, add) - num_words
        if LISTED:
            indices = tl.load(groups + row * num_groups + indices, mask=listed, other=0)
        write_bits(out + row * count, places, words, num_words, indices * GROUP)

    @triton.jit
    def mark_above_kernel(
        values,
        lower,
        words,
        counts,
        num_rows,
        num_columns,
        num_words,
        LOWER: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_W: tl.constexpr,
    ):
        """A bit for each entry that exceeds `lower`, a number or one per layer or feature; how many in each row."""
        layer = tl.program_id(1).to(tl.int64)
        rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        listed, rows = rows < num_rows, layer * num_rows + rows
        found = tl.full((BLOCK_R, BLOCK_W), 0, tl.int32)
        for first in range(0, num_words, BLOCK_W):
            indices = first + tl.arange(0, BLOCK_W)
            columns = indices[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            inside = columns < num_columns
            if LOWER == "number":
                least = lower
            elif LOWER == "layer":
                least = tl.load(lower + layer).to(tl.float32)
            else:
                least = tl.load(lower + layer * num_columns + columns, mask=inside, other=0.0).to(tl.float32)[None]
            inside = listed[:, None, None] & inside[None, :, :]
            places = values + rows[:, None, None] * num_columns + columns[None, :, :]
            entries = tl.load(places, mask=inside, other=float("-inf"))  # which exceeds nothing
            above = entries.to(tl.float32) > least
            bits = tl.reduce(above.to(tl.int32) << tl.arange(0, GROUP)[None, None, :], 2, either)
            inside = listed[:, None] & (indices < num_words)[None, :]
            tl.store(words + rows[:, None] * num_words + indices[None, :], bits, mask=inside)
            found += popcount(bits)
        tl.store(counts + rows, tl.reduce(found, 1, add), mask=listed)

    @triton.jit
    def write_marked_kernel(words, offsets, out, num_columns, num_words, GROUP: tl.constexpr, BLOCK_W: tl.constexpr):
        """Positions of the set bits of a row, from its offset on."""
        row = tl.program_id(0).to(tl.int64)
        words += row * num_words
        before = tl.load(offsets + row)
        for first in range(0, num_words, BLOCK_W):
            indices = first + tl.arange(0, BLOCK_W)
            bits = tl.load(words + indices, mask=indices < num_words, other=0)
            counts = popcount(bits)
            places = before + tl.associative_scan(counts, 0, add) - counts
            write_bits(out, places, bits, counts, row * num_columns + indices * GROUP)
            before += tl.reduce(counts, 0, add)

    # -- the largest of short rows ------------------------------------------------------------------------------------

    @triton.jit
    def number_of(key, dtype: tl.constexpr, INFINITY: tl.constexpr):
        """The number that has this key, in float32. Beyond both infinities it is NaN."""
        LOWEST: tl.constexpr = -0x80000000 if INFINITY > 0x7FFF else -0x8000
        bits = tl.where(key < 0, LOWEST - key, key)
        return bits.to(tl.int32 if INFINITY > 0x7FFF else tl.int16).to(dtype, bitcast=True).to(tl.float32)

    @triton.jit
    def keys_of_numbers(numbers, dtype: tl.constexpr, INFINITY: tl.constexpr):
        bits = numbers.to(dtype).to(tl.int32 if INFINITY > 0x7FFF else tl.int16, bitcast=True)
        return keys_of(bits.to(tl.int32), INFINITY)

    @triton.jit
    def middle_of(low, high):
        """Rounded up, without overflow."""
        return ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)

    @triton.jit
    def listed_from(first, second, cut):
        """How many keys of both lists are the cut or above."""
        return tl.reduce((first >= cut).to(tl.int32) + (second >= cut).to(tl.int32), 0, add)

    @triton.jit
    def load_wanted(values, wanted, columns, num_columns, HAS_WANTED: tl.constexpr):
        """Numbers of a row, and -inf in the place of what is not wanted or not inside."""
        entries = tl.load(values + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
        if HAS_WANTED:
            is_wanted = tl.load(wanted + columns, mask=columns < num_columns, other=0) != 0
            entries = tl.where(is_wanted, entries, float("-inf"))
        return entries

    @triton.jit
    def topk_kernel(
        values,
        wanted,
        positions,
        num_rows,
        num_columns,
        k,
        HAS_WANTED: tl.constexpr,
        INFINITY: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK_C: tl.constexpr,
        BLOCK_W: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        dtype: tl.constexpr = values.dtype.element_ty
        values += row * num_columns
        wanted += row // num_rows * num_columns
        lanes = tl.arange(0, BLOCK_C)
        first = tl.full((BLOCK_C,), float("-inf"), tl.float32)
        second = first
        for begin in tl.range(0, num_columns, BLOCK_C, loop_unroll_factor=4):
            entries = load_wanted(values, wanted, begin + lanes, num_columns, HAS_WANTED)
            second = larger_or_nan(second, tl.minimum(first, entries))  # of NaN and a number the number
            first = larger_or_nan(first, entries)
        first, second = keys_of_numbers(first, dtype, INFINITY), keys_of_numbers(second, dtype, INFINITY)

        # The k-th largest is between both.
        low, high = tl.reduce(first, 0, smaller), tl.reduce(first, 0, larger)
        low = tl.where(k <= BLOCK_C, low, -INFINITY)
        lines, bits = tl.arange(0, BLOCK_W), 1 << tl.arange(0, GROUP)[None, :]
        unlisted, tries, done = 0, 0, False
        while done == 0:
            cut, top = low, high
            while cut < top:
                middle = middle_of(cut, top)
                enough = listed_from(first, second, middle) >= k - unlisted
                cut, top = tl.where(enough, middle, cut), tl.where(enough, top, middle - 1)
            if tries > 2:
                cut = middle_of(low, high)
            listed = listed_from(first, second, cut + 1)
            lacking = k - listed - unlisted

            # What equals the cut is above the number below it. Nothing is above NaN.
            number, below = number_of(cut, dtype, INFINITY), number_of(cut - 1, dtype, INFINITY)
            num_above, num_equal = 0, 0
            for begin in range(0, num_columns, BLOCK_W * GROUP):
                columns = begin + lines[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
                entries = load_wanted(values, wanted, columns, num_columns, HAS_WANTED)
                above = tl.reduce(tl.where(entries <= number, 0, bits), 1, either)
                above = tl.where(cut > INFINITY, 0, above)
                equal = tl.reduce(tl.where(entries <= below, 0, bits), 1, either) ^ above
                aboves, equals = popcount(above), popcount(equal)
                counts = aboves + (equals << 16)
                before = tl.associative_scan(counts, 0, add) - counts
                above_before, equal_before = num_above + (before & 0xFFFF), num_equal + (before >> 16)
                missing = tl.maximum(lacking - equal_before, 0)
                places = above_before + tl.minimum(equal_before, tl.maximum(lacking, 0))
                chosen = aboves + tl.minimum(equals, missing)
                # A cut that is too low would write more than k.
                words = tl.where(places + chosen <= k, above | lowest_bits(equal, equals, missing), 0)
                bits_before = row * num_columns + begin + lines * GROUP
                write_bits(positions + row * k, places, words, chosen, bits_before)
                total = tl.reduce(counts, 0, add)
                num_above += total & 0xFFFF
                num_equal += total >> 16

            reached = num_above + num_equal
            done = (num_above == k - lacking) & (num_above <= k) & (reached >= k)
            low = tl.where(reached >= k, cut + (num_above > k).to(tl.int32), low)
            high = tl.where(num_above <= k, cut - (reached < k).to(tl.int32), high)
            unlisted = num_above - listed
            tries += 1


def takes(values: Tensor) -> bool:
    """Whether the selections here can look through these rows."""
    return values.ndim == 2 and available(values) and values.is_contiguous()


def as_integers(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def positions_topk(values: Tensor, k: int, wanted: Tensor | None = None) -> Tensor:
    """
    Flat positions of the k largest entries of each row, ascending; NaN is above all, and of equal entries at the cut
    the first are taken. One launch.

    Args:
        values: (N, F) bfloat16, float16 or float32, contiguous.
        k: At most F.
        wanted: (B, F) bool, for each N / B rows in turn: other entries count as -inf.

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
            values if wanted is None else wanted.contiguous().view(torch.uint8),
            positions,
            num_rows if wanted is None else num_rows // len(wanted),
            num_columns,
            k,
            HAS_WANTED=wanted is not None,
            INFINITY=INFINITY[values.dtype],
            GROUP=GROUP,
            BLOCK_C=TOPK_COLUMNS,
            BLOCK_W=TOPK_WORDS,
            num_warps=TOPK_WARPS,
        )
    return positions


def positions_largest(values: Tensor, count: int) -> Tensor:
    """
    Positions within the row of the `count` largest entries of each row, ascending; NaN is above all, and of equal
    entries at the cut the first are taken. As [`positions_topk`], but for a few rows that may be long.

    The `count` groups of `GROUP` columns with the largest maxima hold all of them: an entry outside has `count` others
    above or, equal, before it. Launches, the one of zeros included: 9, float32 13. Where there are at most `count`
    groups, all of them are looked through: 5, float32 7, but slowly, since an atomic counts each entry.

    Memory read and written, in sizes of an entry and per entry of `values`, with c = count / M: 1 for the entries,
    1/16 for the maxima (float32: 3/32), and 64 c (float32: 96 c) for the groups. Besides, 2^19 bytes per histogram and
    row, 1/64 byte per entry for the bits of the groups, and 40 (float32: 44) per entry found, for lists and bits.

    Args:
        values: (B, M) bfloat16, float16 or float32, contiguous; M at most 2^30.
        count: At most M.

    Returns:
        (B, count) int64.

    Raises:
        ValueError: A row has fewer entries, or more than 2^30.
    """
    num_rows, num_columns = values.shape
    if not 0 <= count <= num_columns <= MAX_COLUMNS:
        raise ValueError(f"count is {count} of {num_columns} columns: pass at most all, in rows of at most 2^30")
    found = torch.empty(num_rows, count, dtype=torch.int64, device=values.device)
    if found.numel() == 0:
        return found
    infinity = INFINITY[values.dtype]
    num_groups, digits = triton.cdiv(num_columns, GROUP), values.element_size() // 2
    pruned = count < num_groups
    # One for each round and each 16 bits.
    histograms = values.new_zeros(1 + pruned, digits, num_rows, BINS, dtype=torch.int32)
    cuts, groups = None, None
    with torch.cuda.device_of(values):
        if pruned:
            maxima = values.new_empty(num_rows, num_groups)
            maxima_kernel[(triton.cdiv(num_groups, MAXIMA_GROUPS), num_rows)](
                values,
                maxima,
                histograms[1, 0],
                num_columns,
                num_groups,
                INFINITY=infinity,
                GROUP=GROUP,
                BLOCK_G=MAXIMA_GROUPS,
                num_warps=SELECT_WARPS,
            )
            groups = values.new_empty(num_rows, count, dtype=torch.int32)
            cuts = write_largest(as_integers(maxima), None, None, histograms[1], groups, infinity, counted=True)
        write_largest(as_integers(values), groups, cuts, histograms[0], found, infinity)
    return found


def write_largest(
    values: Tensor,
    groups: Tensor | None,
    cuts: Tensor | None,
    histograms: Tensor,
    out: Tensor,
    infinity: int,
    counted: bool = False,
) -> Tensor:
    """
    A round of [`positions_largest`], into `out` (B, count).

    Args:
        values: (B, M) integers.
        groups: Which groups are looked through, (B, G); None: all.
        cuts: Below which their entries are not counted, (B, 2).
        histograms: (1 or 2, B, BINS) int32, zeros.
        counted: Whether the first histogram is there already.

    Returns:
        The cut of each row, and how many of the entries at the cut are chosen, (B, 2) int32.
    """
    num_rows, num_columns = values.shape
    listed = groups is not None
    num_groups = groups.shape[1] if listed else triton.cdiv(num_columns, GROUP)
    num_blocks = triton.cdiv(num_groups, MARK_GROUPS)
    form = {"LISTED": listed, "GROUP": GROUP}
    any_pointer = histograms  # in the place of what is not there, and not read
    list_of_groups = groups if listed else any_pointer
    for digit, histogram in enumerate(histograms):
        before, lower = any_pointer if cuts is None else cuts, digit > 0
        if lower or not counted:
            histogram_kernel[(triton.cdiv(num_groups, HISTOGRAM_GROUPS), num_rows)](
                values,
                list_of_groups,
                before,
                histogram,
                num_columns,
                num_groups,
                INFINITY=infinity,
                LOWER=lower,
                BLOCK_G=HISTOGRAM_GROUPS,
                num_warps=SELECT_WARPS,
                **form,
            )
        cuts = histogram.new_empty(num_rows, 2)
        cut_kernel[(num_rows,)](histogram, before, cuts, out.shape[1], LOWER=lower, num_warps=CUT_WARPS)
    above, equal = histograms.new_empty(2, num_rows, num_groups)
    totals = histograms.new_empty(num_rows, num_blocks, dtype=torch.int64)
    mark_kernel[(num_blocks, num_rows)](
        values,
        list_of_groups,
        cuts,
        above,
        equal,
        totals,
        num_columns,
        num_groups,
        num_blocks,
        INFINITY=infinity,
        BLOCK_G=MARK_GROUPS,
        num_warps=SELECT_WARPS,
        **form,
    )
    write_kernel[(num_blocks, num_rows)](
        above,
        equal,
        totals,
        list_of_groups,
        cuts,
        out,
        out.shape[1],
        num_groups,
        num_blocks,
        BLOCK_G=MARK_GROUPS,
        num_warps=WRITE_WARPS,
        **form,
    )
    return cuts


def mark_above(values: Tensor, lower: Tensor | float) -> tuple[Tensor, Tensor]:
    """
    Marks what exceeds a threshold, compared in float32; NaN does not. One launch. It reads `values` once, the
    thresholds from a cache, and writes a bit per entry.

    Args:
        values: (R, F) bfloat16, float16 or float32, contiguous.
        lower: One number, or one per layer (B, 1), or per feature (B, F): R / B rows in turn are those of a layer.

    Returns:
        The bits, (R, ⌈F / 32⌉) int32, and how many there are in each row, (R,) int64.

    Raises:
        ValueError: Thresholds of another shape.
    """
    num_rows, num_columns = values.shape
    kind, num_layers = "number", 1
    if isinstance(lower, Tensor):
        kind, num_layers = "layer" if lower.shape[-1:] == (1,) else "feature", len(lower)
        if lower.ndim != 2 or lower.shape[1] not in (1, num_columns) or not num_layers or num_rows % num_layers:
            raise ValueError(
                f"lower has shape {tuple(lower.shape)}: pass (B, {num_columns}) or (B, 1), B a divisor of {num_rows}"
            )
    num_words = triton.cdiv(num_columns, GROUP)
    words = torch.empty(num_rows, num_words, dtype=torch.int32, device=values.device)
    counts = torch.empty(num_rows, dtype=torch.int64, device=values.device)
    if num_rows == 0:
        return words, counts
    rows = num_rows // num_layers
    with torch.cuda.device_of(values):
        mark_above_kernel[(triton.cdiv(rows, ABOVE_ROWS), num_layers)](
            values,
            lower.contiguous() if isinstance(lower, Tensor) else float(lower),
            words,
            counts,
            rows,
            num_columns,
            num_words,
            LOWER=kind,
            GROUP=GROUP,
            BLOCK_R=ABOVE_ROWS,
            BLOCK_W=ABOVE_WORDS,
            num_warps=SELECT_WARPS,
        )
    return words, counts


def positions_marked(words: Tensor, offsets: Tensor, total: int, num_columns: int) -> Tensor:
    """
    Flat positions, in rows of `num_columns`, of what [`mark_above`] marked, ascending. One launch. It reads the bits.

    Args:
        words: (R, ⌈F / 32⌉) int32.
        offsets: Where the positions of each row begin, (R,) int64 or longer: the sums of the counts of those before.
        total: The sum of all counts.

    Returns:
        (total,) int64.
    """
    positions = torch.empty(total, dtype=torch.int64, device=words.device)
    if total == 0:
        return positions
    with torch.cuda.device_of(words):
        write_marked_kernel[(len(words),)](
            words,
            offsets,
            positions,
            num_columns,
            words.shape[1],
            GROUP=GROUP,
            BLOCK_W=WRITE_WORDS,
            num_warps=WRITE_WARPS,
        )
    return positions


__all__ = ["mark_above", "positions_largest", "positions_marked", "positions_topk", "takes"]
