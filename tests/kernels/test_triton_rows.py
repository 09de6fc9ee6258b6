"""
The Triton kernels against the float64 formulas: under Triton's interpreter on the CPU, compiled (but not run) for an
H100, and on a GPU where there is one.
"""

import sys
from functools import partial

import pytest
import torch

from hf_clt.kernels import rows as rows_module
from hf_clt.kernels import triton_layers, triton_rows
from hf_clt.sparsity import LayerFeatures
from tests.kernels.triton_modules import compile_kernel, load_copy, load_interpreted, run_twice_without_waiting
from tests.reference import random_batch, random_clt


triton = pytest.importorskip("triton")

STEP = {"jumprelu_bandwidth": 0.5, "sparsity_lambda": 0.7, "preactivation_coef": 0.2, "aux_coef": 0.4, "aux_k": 2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
COLUMNS = pytest.mark.parametrize("num_columns", [1, 7, 300, 2304])
# Empty, one entry, a round, rounds with every possible rest, empty at the end.
LENGTHS = [0, 1, 4, 5, 2, 11, 0]
# One rounding of the result, relative. For bfloat16 the interpreter truncates where a GPU rounds to nearest.
RESULT_ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7}


@pytest.fixture(scope="module")
def interpreted():
    return load_interpreted(triton_rows)


@pytest.fixture(scope="module")
def interpreted_layers():
    return load_interpreted(triton_layers)


def random_rows(num_rows, num_columns, dtype, seed, device="cpu"):
    """Rows that are a slice of a larger tensor, which is NaN all around them; the strides of two seeds differ."""
    generator = torch.Generator(device).manual_seed(seed)
    buffer = torch.full((num_rows + 2, num_columns + 8 * seed), torch.nan, dtype=dtype, device=device)
    rows = buffer[1:-1, 3 : 3 + num_columns]
    return rows.copy_(torch.randn(rows.shape, generator=generator, device=device))


def random_bags(num_rows, dtype):
    """indices, offsets, weights; row 0 is in no bag, and the last row several times in the longest."""
    generator = torch.Generator().manual_seed(2)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    indices = torch.randint(1, num_rows, (sum(LENGTHS),), generator=generator)
    longest = LENGTHS.index(max(LENGTHS))
    indices[offsets[longest] : offsets[longest] + 3] = num_rows - 1
    return indices, offsets, torch.randn(sum(LENGTHS), generator=generator).to(dtype)


def random_features(num_tokens, num_features, dtype, always=(), device="cpu", density=0.1, seed=4):
    """Features that fire at random, except those in `always`; feature 1 never does. And their dense activations."""
    generator = torch.Generator(device).manual_seed(seed)
    support = torch.rand(num_tokens, num_features, generator=generator, device=device) < density
    support[:, list(always)] = True
    support[:, 1] = False
    tokens, indices = support.nonzero(as_tuple=True)
    offsets = torch.zeros(num_tokens + 1, dtype=torch.int64, device=device)
    torch.cumsum(support.sum(dim=1), dim=0, out=offsets[1:])
    values = torch.randn(indices.numel(), generator=generator, device=device).to(dtype)
    acts = torch.zeros(num_tokens, num_features, dtype=torch.float64, device=device)
    acts[tokens, indices] = values.double()
    return LayerFeatures(values, indices, offsets, num_features), acts


def poisoned(like, *size, **form):
    """Stands in for `new_empty`: NaN where nothing is written."""
    out = like.new_zeros(*size, **form)
    return out.fill_(torch.nan) if out.is_floating_point() else out


def dense_bags(indices, offsets, weights, num_rows):
    """The bags as a matrix (B, R) in float64."""
    bags = torch.arange(offsets.numel() - 1).repeat_interleave(offsets.diff())
    return torch.zeros(offsets.numel() - 1, num_rows, dtype=torch.float64).index_put_(
        (bags, indices), weights.double(), accumulate=True
    )


def assert_within_rounding(found, exact, magnitude, num_terms, dtype):
    """
    A float32 sum of n terms errs by at most n · 2^-24 · Σ|term|, and typically by √n instead of n since the roundings
    are independent; 4 √n is asked for. Then one rounding to the result's dtype.

    Args:
        found, exact: Any shape; `exact` in float64.
        magnitude: Σ|term|.
        num_terms: Largest n.
        dtype: Of the result.
    """
    assert found.dtype == dtype and found.shape == exact.shape
    bound = 4 * num_terms**0.5 * 2**-24 * magnitude + RESULT_ROUNDING[dtype] * exact.abs() + 1e-7
    excess = (found.double() - exact).abs() / bound
    assert not excess.isnan().any() and (excess <= 1).all(), f"{excess.max():.1f} times the bound"


def test_nothing_is_written_past_the_end(interpreted):
    """In both directions a block reaches past the last element. First, since elsewhere it would corrupt memory."""
    rows = random_rows(9, 300, torch.float32, seed=1)
    bags = random_bags(9, torch.float32)
    buffer = torch.full((len(LENGTHS) + 1, 310), 7.0)
    grid = (len(LENGTHS), 3)
    interpreted.row_sums_kernel[grid](
        rows, *bags[:2], bags[2], buffer, 300, rows.stride(0), buffer.stride(0), BLOCK_E=4, BLOCK_C=128
    )
    assert (buffer[-1] == 7).all() and (buffer[:, 300:] == 7).all()
    assert torch.equal(buffer[:-1, :300], interpreted.row_sums(rows, *bags))


@DTYPES
@COLUMNS
def test_row_sums(interpreted, dtype, num_columns):
    rows = random_rows(9, num_columns, dtype, seed=1)
    bags = random_bags(9, dtype)
    rows[0] = torch.nan  # must not enter where entries past the end of a bag stand in for a full round
    found = interpreted.row_sums(rows, *bags)
    rows[0] = 0
    acts = dense_bags(*bags, 9)
    assert (found[0] == 0).all() and (found[-1] == 0).all()
    assert_within_rounding(found, acts @ rows.double(), acts.abs() @ rows.double().abs(), max(LENGTHS), dtype)


def test_no_entries_and_no_bags(interpreted):
    rows = random_rows(3, 7, torch.float32, seed=1)
    nothing, empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    found = interpreted.row_sums(rows, nothing, torch.zeros(5, dtype=torch.int64), empty)
    assert torch.equal(found, torch.zeros(4, 7))
    assert interpreted.row_sums(rows, nothing, torch.zeros(1, dtype=torch.int64), empty).shape == (0, 7)


def test_sums_do_not_depend_on_the_block_sizes(interpreted, monkeypatch):
    rows = random_rows(9, 300, torch.float32, seed=1)
    bags = random_bags(9, torch.float32)
    first = interpreted.row_sums(rows, *bags)
    assert torch.equal(interpreted.row_sums(rows, *bags), first)
    monkeypatch.setattr(interpreted, "column_block", lambda rows: 64)
    monkeypatch.setattr(interpreted, "SUM_ENTRIES", 3)
    assert torch.equal(interpreted.row_sums(rows, *bags), first)


@pytest.mark.parametrize("num_rows, num_columns, dtype, block", [
    (4096, 9216, torch.bfloat16, 512),
    (4096, 9216, torch.float32, 512),
    (24576, 9216, torch.bfloat16, 256),  # 512 columns of all rows would be 24 MiB of L2
    (24576, 9216, torch.float32, 256),
    (9, 300, torch.float32, 512),
    (9, 7, torch.float32, 8),
    (9, 1, torch.float32, 1),
])  # fmt: skip
def test_column_block(num_rows, num_columns, dtype, block):
    assert triton_rows.column_block(torch.empty(num_rows, num_columns, dtype=dtype, device="meta")) == block


@DTYPES
def test_rows_whose_weight_is_zero_are_not_read(interpreted, dtype):
    """jumprelu lists the features of its window, most of which are inactive. NaN in a row shows that it was read."""
    rows = random_rows(9, 300, dtype, 1)
    rows[[2, 7]] = torch.nan
    indices, offsets = torch.tensor([0, 2, 4, 7, 2, 1, 8]), torch.tensor([0, 4, 5, 7])
    weights = torch.tensor([0.5, 0.0, -1.0, 0.0, 0.0, 2.0, 1.0])
    out = interpreted.row_sums(rows, indices, offsets, weights)
    expected = torch.stack(
        [0.5 * rows[0].double() - rows[4].double(), torch.zeros(300), 2.0 * rows[1] + rows[8].double()]
    )
    torch.testing.assert_close(out.double(), expected.double(), rtol=4 * RESULT_ROUNDING[dtype], atol=2e-2)


def test_what_the_kernels_do_not_take_is_refused(interpreted):
    rows = torch.randn(4, 7)
    indices, offsets, weights = torch.tensor([0, 3]), torch.tensor([0, 1, 2]), torch.ones(2)
    for message, arguments in [
        ("rows is torch.float64: the Triton kernels take", (rows.double(), indices, offsets, weights)),
        ("pass 2-D rows with contiguous columns", (rows.T, indices, offsets, weights)),
        ("pass 2-D rows with contiguous columns", (rows[0], indices, offsets, weights)),
        ("indices is torch.int32: pass int64", (rows, indices.int(), offsets, weights)),
        ("offsets is torch.int32: pass int64", (rows, indices, offsets.int(), weights)),
        (r"'weights': \(3,\)}: pass one element per entry", (rows, indices, offsets, torch.ones(3))),
    ]:
        with pytest.raises(ValueError, match=message):
            interpreted.row_sums(*arguments)


def test_available(interpreted, monkeypatch):
    cpu = torch.zeros(1)
    assert interpreted.available(cpu) and interpreted.available(cpu.bfloat16()) and interpreted.available(cpu.half())
    assert not interpreted.available(cpu.double())
    assert not triton_rows.available(cpu)
    monkeypatch.setattr(interpreted, "triton", None)
    assert not interpreted.available(cpu)


def test_the_module_is_there_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert not load_copy(triton_rows, "without_triton").available(torch.zeros(1))


@pytest.fixture
def compile_for_h100(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return partial(compile_kernel, tmp_path)


@pytest.mark.parametrize("dtype, block", [("fp32", 256), ("fp32", 512), ("bf16", 256), ("bf16", 512), ("fp16", 512)])
def test_row_sums_compile_for_an_h100(compile_for_h100, dtype, block):
    types = dict.fromkeys(["rows", "weights", "out"], f"*{dtype}") | dict.fromkeys(["indices", "offsets"], "*i64")
    constants = {"BLOCK_E": triton_rows.SUM_ENTRIES, "BLOCK_C": block}
    compile_for_h100(triton_rows.row_sums_kernel, types, constants, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@DTYPES
def test_on_a_gpu_at_a_real_size(dtype):
    """GPT-2's CLT: 12 target layers of 768, 24,576 features; 1,024 tokens with about 32 features, three hot ones."""
    num_tokens, num_features, num_columns = 1024, 24576, 12 * 768
    device = torch.device("cuda")
    weight = random_rows(num_features, num_columns, dtype, seed=1, device=device)
    density = 29 / num_features
    features, acts = random_features(num_tokens, num_features, dtype, [5, 77, 24575], device, density)
    assert triton_rows.available(weight)
    bags = features.indices, features.offsets, features.values
    (sums,) = run_twice_without_waiting(lambda: [triton_rows.row_sums(weight, *bags)])
    # Some columns of everything in float64: the first, the last, and some around the border between two tiles.
    columns = torch.tensor([*range(4), *range(508, 516), *range(num_columns - 4, num_columns)], device=device)
    rows = weight[:, columns].double()
    longest = int(features.offsets.diff().max())
    assert_within_rounding(sums[:, columns], acts @ rows, acts.abs() @ rows.abs(), longest, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_with_offsets_beyond_32_bits():
    """2^31 elements and more, read and written: 4 GiB each."""
    num_rows, num_columns = 2**22 + 2, 512
    rows = torch.zeros(num_rows, num_columns, dtype=torch.bfloat16, device="cuda")
    rows[-1], rows[-2] = 3, 2
    indices = torch.tensor([num_rows - 1, num_rows - 2], device="cuda")
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device="cuda")
    offsets[-2:] = torch.tensor([1, 2])
    out = triton_rows.row_sums(rows, indices, offsets, torch.ones(2, device="cuda"))
    assert (out[-2] == 3).all() and (out[-1] == 2).all() and (out[:-2] == 0).all()


@pytest.mark.parametrize("activation, tying", [("jumprelu", "per_target"), ("batchtopk", "none")])
def test_a_training_step_of_the_model_through_the_kernels(
    interpreted, interpreted_layers, monkeypatch, activation, tying
):
    """Loss and every gradient as with the CPU operators, in float32; rounding of sums of at most 100 products."""
    clt = random_clt(double=False, activation_fn=activation, decoder_tying=tying, **STEP)
    inputs, labels = (tensor.float() for tensor in random_batch(clt))
    dead = torch.zeros(clt.config.num_layers, clt.config.num_features, dtype=torch.bool)
    dead[1, 3:6] = True

    def step():
        loss = clt.train()(inputs, labels=labels, dead=dead).loss
        return [loss, *torch.autograd.grad(loss, list(clt.parameters()), allow_unused=True)]

    monkeypatch.setattr(rows_module, "DENSE_ABOVE", 1.0)
    wanted = step()
    calls = []

    def use_triton(rows):
        calls.append(rows.shape)
        return True

    monkeypatch.setattr(rows_module, "triton_rows", interpreted)
    monkeypatch.setattr(rows_module, "triton_layers", interpreted_layers)
    monkeypatch.setattr(rows_module, "use_triton", use_triton)
    found = step()
    assert len(calls) > 3 * clt.config.num_layers
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
