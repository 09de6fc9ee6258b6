"""
The Triton kernels of exact selections against stable sorts and masks: under Triton's interpreter on the CPU, compiled
(but not run) for an H100, and on a GPU where there is one.
"""

import re

import pytest
import torch

from hf_clt import selection
from hf_clt.kernels import triton_select
from tests.kernels.triton_modules import compile_kernel, fold_in_halves, load_interpreted


triton = pytest.importorskip("triton")

# float16 has 16 bits as bfloat16, and is interpreted in the slow tests alone.
SLOW = pytest.mark.slow
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=SLOW)], ids=str
)


@pytest.fixture(scope="module")
def interpreted():
    copy = load_interpreted(triton_select)
    # Several blocks in a small row, and rows that are no multiple of them.
    copy.TOPK_COLUMNS, copy.TOPK_WORDS = 16, 2
    copy.MAXIMA_GROUPS, copy.HISTOGRAM_GROUPS, copy.MARK_GROUPS = 16, 16, 8
    copy.ABOVE_ROWS, copy.ABOVE_WORDS, copy.WRITE_WORDS = 2, 2, 2
    with pytest.MonkeyPatch.context() as patch:
        fold_in_halves(patch)
        yield copy


def sorted_topk(values, k):
    """By a stable sort on the CPU: of equal entries those that come first."""
    columns = values.cpu().double().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return (columns + values.shape[1] * torch.arange(len(values))[:, None]).flatten().to(values.device)


def sorted_largest(values, count):
    """Positions within rows, by a stable sort on the CPU; -0.0 equals 0.0, and NaN of either sign is above all."""
    order = values.cpu().double().sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values.to(values.device)


def marked_positions(module, values, lower):
    """By both steps, as a caller does."""
    words, counts = module.mark_above(values, lower)
    offsets = counts.cumsum(0) - counts
    return module.positions_marked(words, offsets, int(counts.sum()), values.shape[1]), counts


def positions_above(values, lower):
    """By a mask, each row with the thresholds of its layer."""
    if isinstance(lower, torch.Tensor):
        lower = lower.float().repeat_interleave(len(values) // len(lower), dim=0)
    above = values.float() > lower
    return above.flatten().nonzero()[:, 0], above.sum(dim=1)


def random_values(num_rows, num_columns, dtype, device="cpu"):
    """Rows of normal numbers, of few different ones, of one, of tiny and of huge ones, with NaN and infinities."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(num_rows, num_columns, generator=generator)
    values[1] = values[1].mul(2).round()
    values[2] = 1
    values[3] *= 1e-7
    values[4] *= 1e4
    values[5] = -torch.inf
    values[5, ::3] = torch.inf
    values[6, ::4] = torch.nan
    values[7] = -values[7].abs()
    return values.to(device, dtype)


@DTYPES
@pytest.mark.parametrize(
    "num_columns, k",
    [(40, 3), pytest.param(48, 16, marks=SLOW), (40, 21), (7, 7), pytest.param(16, 1, marks=SLOW), (33, 0)],
)
def test_it_is_that_of_a_stable_sort(interpreted, dtype, num_columns, k):
    """k below and above the number of maxima, all of a row, and none."""
    values = random_values(8, num_columns, dtype)
    assert torch.equal(interpreted.positions_topk(values, k), sorted_topk(values, k))


def test_nan_of_either_sign_is_above_all(interpreted):
    values = torch.tensor([[1.0, torch.inf, -torch.nan, torch.nan, -0.0]])  # and the zeros are equal
    assert interpreted.positions_topk(values, 2).tolist() == [2, 3]
    assert interpreted.positions_topk(values, 3).tolist() == [1, 2, 3]
    assert interpreted.positions_topk(torch.tensor([[-1.0, -0.0, 0.0]]), 1).tolist() == [1]


@DTYPES
@pytest.mark.parametrize("k", [3, 9, pytest.param(60, marks=SLOW)])
def test_the_largest_share_few_lanes(interpreted, dtype, k):
    """So the list of the two largest of each lane lacks some: all in one lane, in two, and k beyond the list."""
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(8))
    values[0, 5::16] += 20
    values[1, 3::8] += 20
    values[2, 7::16] = 9.0  # and equal
    values = values.to(dtype)
    assert torch.equal(interpreted.positions_topk(values, k), sorted_topk(values, k))


def test_the_largest_of_what_is_wanted(interpreted):
    """Of three layers, of one of which fewer are wanted than are taken."""
    values = random_values(9, 75, torch.bfloat16)
    wanted = torch.rand(3, 75, generator=torch.Generator().manual_seed(9)) < torch.tensor([[0.5], [0.04], [1.0]])
    masked = torch.where(wanted.repeat_interleave(3, dim=0), values, -torch.inf)
    assert torch.equal(interpreted.positions_topk(values, 6, wanted), sorted_topk(masked, 6))


def test_the_selection_uses_it_and_finds_the_same(interpreted, monkeypatch):
    """Of one layer and of three, by rank and by thresholds of each kind."""
    h = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    dead = torch.rand(3, 96, generator=torch.Generator().manual_seed(2)) < 0.3
    theta = torch.rand(3 * 96, generator=torch.Generator().manual_seed(3))

    def select():
        found = [selection.positions_topk(h, 4), selection.positions_batchtopk(h, 5, 3)]
        found.append(selection.positions_batchtopk(h, 15))
        layers = [selection.largest_dead(h, dead, 3), selection.largest_dead(h[:2], dead[:1], 3)]
        layers += [selection.features_above(h, lower, 3) for lower in (0.0, theta[:3], theta)]
        layers += [selection.features_above(h, lower) for lower in (0.0, theta[:1], theta[:96])]
        for layer in layers:
            found += [layer.values, layer.indices, layer.offsets, layer.rows]
        return found

    wanted = select()
    monkeypatch.setattr(selection, "triton_select", interpreted)
    monkeypatch.setattr(interpreted, "takes", lambda values: values.is_contiguous())
    monkeypatch.setattr(selection, "is_on_cpu", lambda tensor: False)
    for a, b in zip(select(), wanted, strict=True):
        assert torch.equal(a, b)


@DTYPES
@pytest.mark.parametrize(
    "num_columns, count",
    [
        pytest.param(2048, 20, marks=SLOW),  # several blocks of maxima, of groups and of totals
        pytest.param(2048, 63, marks=SLOW),  # all groups but one
        pytest.param(2048, 64, marks=SLOW),  # all groups
        (1000, 9),  # a last group that is not whole
        pytest.param(777, 777, marks=SLOW),
        pytest.param(64, 1, marks=SLOW),
        (33, 1),  # two groups, one entry in the second
        (1, 1),
        (50, 0),
    ],
)
def test_the_largest_are_those_of_a_stable_sort(interpreted, dtype, num_columns, count):
    """Rows with NaN, infinities, few different entries, one entry, tiny and huge ones."""
    values = random_values(8, num_columns, dtype)
    found = interpreted.positions_largest(values, count)
    assert found.dtype == torch.int64
    assert torch.equal(found, sorted_largest(values, count))


@DTYPES
@pytest.mark.parametrize("num_rows", [1, pytest.param(3, marks=SLOW)])
def test_the_largest_of_rows_with_ties_at_both_cuts(interpreted, dtype, num_rows):
    """Whole numbers: groups with the same maximum are taken and left, and so are entries of one group."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(-3, 4, (num_rows, 1300), generator=generator).to(dtype)
    values[:, ::7] *= -0.0  # both zeros
    for count in (5, 31):
        assert torch.equal(interpreted.positions_largest(values, count), sorted_largest(values, count))


def test_the_largest_differ_in_the_lowest_bits(interpreted):
    """Float32, where the upper 16 bits of all are the same, of either sign; then where only NaN is above them."""
    bits = torch.arange(2048, dtype=torch.int32).mul(7919) % 2048
    for sign in (1, -1):
        values = sign * (bits + 0x3F800000).view(torch.float32)[None]
        assert torch.equal(interpreted.positions_largest(values, 50), sorted_largest(values, 50))
    values[0, [3, 1900]] = torch.tensor([-torch.nan, torch.nan])
    assert interpreted.positions_largest(values, 2).tolist() == [[3, 1900]]
    assert torch.equal(interpreted.positions_largest(values, 50), sorted_largest(values, 50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_in_its_place(interpreted, monkeypatch, dtype):
    for name in ("MAXIMA_GROUPS", "HISTOGRAM_GROUPS", "MARK_GROUPS"):
        monkeypatch.setattr(interpreted, name, 512)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(6))].view(dtype)[None]
    for count in (700, 2000):  # NaN alone, or some; one and two in a group
        assert torch.equal(interpreted.positions_largest(values, count), sorted_largest(values, count))


def test_many_of_the_largest_in_one_group(interpreted):
    values = torch.zeros(2, 4096)
    values[0, 320:352] = torch.arange(32) + 1.0
    values[1, 40:60] = 2.0
    assert interpreted.positions_largest(values, 10)[0].tolist() == list(range(342, 352))
    assert interpreted.positions_largest(values, 10)[1].tolist() == list(range(40, 50))
    assert torch.equal(interpreted.positions_largest(values, 40), sorted_largest(values, 40))


class Launches:
    """Stands in for all kernels."""

    def __init__(self):
        self.number = 0

    def __getitem__(self, grid):
        self.number += 1
        return lambda *args, **constants: None


@pytest.mark.parametrize("num_layers", [1, 12])
def test_launches_are_as_many_for_any_number_of_layers(monkeypatch, num_layers):
    for name in vars(triton_select):
        if name.endswith("_kernel"):
            monkeypatch.setattr(triton_select, name, Launches())
    kernels = [value for value in vars(triton_select).values() if isinstance(value, Launches)]

    def launches(call, *args):
        before = sum(kernel.number for kernel in kernels)
        call(*args)
        return sum(kernel.number for kernel in kernels) - before

    values = torch.empty(num_layers, 2**20, device="meta")
    for dtype, pruned, whole in ((torch.bfloat16, 8, 4), (torch.float16, 8, 4), (torch.float32, 12, 6)):
        assert launches(triton_select.positions_largest, values.to(dtype), 2000) == pruned
        assert launches(triton_select.positions_largest, values.to(dtype), 2**15) == whole
    assert launches(triton_select.mark_above, values.view(-1, 2**10), 0.0) == 1
    assert launches(triton_select.mark_above, values.view(-1, 2**10), values[:, : 2**10]) == 1


@pytest.mark.parametrize("count, num_columns", [(11, 10), (-1, 10), (1, 2**30 + 1)])
def test_counts_and_rows_that_are_too_large_are_named(count, num_columns):
    with pytest.raises(ValueError, match=f"count is {count} of {num_columns} columns"):
        triton_select.positions_largest(torch.empty(1, num_columns, device="meta"), count)


@DTYPES
@pytest.mark.parametrize("num_columns", [1, pytest.param(32, marks=SLOW), 75, pytest.param(200, marks=SLOW)])
@pytest.mark.parametrize("lower", ["number", "layers", "features"])
def test_what_is_above_is_that_of_a_mask(interpreted, dtype, num_columns, lower):
    """Layers of an odd number of rows, which the programs share; NaN among entries and thresholds."""
    values = random_values(9, num_columns, dtype)
    thresholds = torch.randn(3, num_columns, generator=torch.Generator().manual_seed(7))
    thresholds[1, 0], thresholds[2, -1] = torch.nan, -torch.inf
    lower = {"number": 0.0, "layers": thresholds[:, :1], "features": thresholds}[lower]
    found, counts = marked_positions(interpreted, values, lower)
    wanted, wanted_counts = positions_above(values, lower)
    assert found.dtype == counts.dtype == torch.int64
    assert torch.equal(counts, wanted_counts)
    assert torch.equal(found, wanted)


def test_what_is_above_at_the_edges(interpreted):
    values = torch.tensor([[0.0, -0.0, 1e-45, torch.nan, torch.inf, -1.0]])
    assert marked_positions(interpreted, values, 0.0)[0].tolist() == [2, 4]
    assert marked_positions(interpreted, values, -torch.inf)[0].tolist() == [0, 1, 2, 4, 5]
    assert marked_positions(interpreted, values, torch.inf)[0].tolist() == []
    assert marked_positions(interpreted, torch.ones(3, 70), 0.5)[0].tolist() == list(range(210))
    assert marked_positions(interpreted, torch.ones(0, 70), 0.5)[0].tolist() == []


@pytest.mark.parametrize("shape", [(70,), (4, 70), (3, 69), (0, 70)])
def test_thresholds_of_another_shape_are_named(interpreted, shape):
    with pytest.raises(ValueError, match=r"lower has shape .*: pass"):
        interpreted.mark_above(torch.ones(6, 70), torch.zeros(shape))


def test_takes():
    assert not triton_select.takes(torch.zeros(3, 4))  # a CPU's, not interpreted


@DTYPES
@pytest.mark.parametrize("wanted", [False, True], ids=["all", "some"])
def test_it_compiles_for_an_h100(tmp_path, monkeypatch, dtype, wanted):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"values": {torch.float32: "*fp32", torch.bfloat16: "*bf16"}.get(dtype, "*fp16"), "positions": "*i64"}
    types["wanted"] = "*u8" if wanted else types["values"]
    constants = {"INFINITY": triton_select.INFINITY[dtype], "GROUP": triton_select.GROUP, "HAS_WANTED": wanted}
    constants |= {"BLOCK_C": triton_select.TOPK_COLUMNS, "BLOCK_W": triton_select.TOPK_WORDS}
    ptx, registers = compile_kernel(tmp_path, triton_select.topk_kernel, types, constants, triton_select.TOPK_WARPS)
    assert "max.NaN" in ptx and not re.search(r"\.ftz\b", ptx)  # subnormal numbers stay what they are
    assert registers <= (102 if dtype == torch.float32 else 80)  # 5 and 6 programs of 4 warps fit


def integers_of(dtype):
    return "i32" if dtype == torch.float32 else "i16"


POINTERS = dict.fromkeys(["groups", "cuts", "before", "histogram", "above", "equal", "words"], "*i32")
POINTERS |= dict.fromkeys(["totals", "counts", "offsets"], "*i64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name, flags",
    [
        ("maxima_kernel", {}),
        ("histogram_kernel", {"LISTED": False, "LOWER": True}),
        ("histogram_kernel", {"LISTED": True, "LOWER": False}),
        ("mark_kernel", {"LISTED": False}),
        ("mark_kernel", {"LISTED": True}),
        ("mark_above_kernel", {"LOWER": "number"}),
        ("mark_above_kernel", {"LOWER": "feature"}),
        ("cut_kernel", {"LOWER": True}),
        ("write_kernel", {"LISTED": True}),
        ("write_kernel", {"LISTED": False}),
        ("write_marked_kernel", {}),
    ],
    ids=str,
)
def test_the_others_compile_for_an_h100(tmp_path, monkeypatch, dtype, name, flags):
    """Whole numbers alone are added up by atomics, and nothing waits for their results."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_select, name)
    floats = "*fp32" if dtype == torch.float32 else "*bf16"
    types = POINTERS | {"values": f"*{integers_of(dtype)}", "out": "*i64"}
    if name in ("maxima_kernel", "mark_above_kernel"):
        lower = "*fp32" if flags.get("LOWER") == "feature" else "fp32"
        types |= {"values": floats, "maxima": floats, "lower": lower}
    if flags == {"LISTED": False}:
        types["out"] = "*i32"
    constants = flags | {"INFINITY": triton_select.INFINITY[dtype], "GROUP": triton_select.GROUP}
    constants |= {"BLOCK_G": triton_select.MARK_GROUPS, "BLOCK_R": triton_select.ABOVE_ROWS}
    constants["BLOCK_W"] = triton_select.WRITE_WORDS
    if name == "maxima_kernel":
        constants["BLOCK_G"] = triton_select.MAXIMA_GROUPS
    if name == "histogram_kernel":
        constants["BLOCK_G"] = triton_select.HISTOGRAM_GROUPS
    if name == "mark_above_kernel":
        constants["BLOCK_W"] = triton_select.ABOVE_WORDS
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    warps = triton_select.WRITE_WARPS if name.startswith("write") else triton_select.SELECT_WARPS
    warps = triton_select.CUT_WARPS if name == "cut_kernel" else warps
    atomics = name in ("maxima_kernel", "histogram_kernel")
    ptx, _ = compile_kernel(tmp_path, kernel, types, constants, warps, atomics=atomics)
    assert ("atom.global" in ptx) == atomics
    # The interpreter's maximum is NaN in any case. And subnormal numbers stay what they are.
    assert name != "maxima_kernel" or "max.NaN" in ptx
    assert not re.search(r"\.ftz\b", ptx)
    assert not re.search(r"atom\.\S*\.f", ptx)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@DTYPES
@pytest.mark.parametrize("num_rows, num_columns, count", [(12, 2**21, 9000), (3, 10**6 + 7, 3), (1, 5000, 4999)])
def test_the_largest_on_a_gpu(dtype, num_rows, num_columns, count):
    values = random_values(12, num_columns, dtype, "cuda")[:num_rows]
    found = triton_select.positions_largest(values, count)
    assert torch.equal(found, sorted_largest(values, count))
    assert torch.equal(found, triton_select.positions_largest(values, count))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_largest_on_a_gpu_beyond_2_to_the_31():
    """Planted in zeros, the last at the end of all."""
    values = torch.zeros(3, 2**30, dtype=torch.bfloat16, device="cuda")
    places = torch.arange(2**30 - 1, 0, -(2**20 + 1), device="cuda").flip(0)
    values[:, places] = 1
    assert torch.equal(triton_select.positions_largest(values, len(places)), places.expand(3, -1))
    rows = values.view(3 * 2**14, 2**16)
    offsets = places + 2**30 * torch.arange(3, device="cuda")[:, None]
    assert torch.equal(marked_positions(triton_select, rows, 0.5)[0], offsets.flatten())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@DTYPES
@pytest.mark.parametrize("lower", ["number", "layers", "features"])
def test_what_is_above_on_a_gpu(dtype, lower):
    values = random_values(510, 24_573, dtype, "cuda")
    thresholds = torch.randn(3, 24_573, device="cuda")
    lower = {"number": 1.0, "layers": thresholds[:, :1], "features": thresholds}[lower]
    found, counts = marked_positions(triton_select, values, lower)
    wanted, wanted_counts = positions_above(values, lower)
    assert torch.equal(counts, wanted_counts)
    assert torch.equal(found, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@DTYPES
@pytest.mark.parametrize("num_columns, k", [(24576, 32), (24576, 200), (8192, 3000), (1000, 5), (7, 7)])
def test_on_a_gpu(dtype, num_columns, k):
    values = random_values(512, num_columns, dtype, "cuda")
    assert triton_select.takes(values)
    assert torch.equal(selection.positions_topk(values, k), sorted_topk(values, k))
