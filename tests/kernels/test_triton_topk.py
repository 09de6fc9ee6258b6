"""
The Triton kernel of an exact top-k against a stable sort: under Triton's interpreter on the CPU, compiled (but not
run) for an H100, and on a GPU where there is one.
"""

import pytest
import torch

from hf_clt import selection
from hf_clt.kernels import triton_topk
from tests.kernels.triton_modules import compile_kernel, load_copy


triton = pytest.importorskip("triton")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        copy = load_copy(triton_topk, "interpreted_topk")
    copy.TOPK_COLUMNS = 16
    return copy


def sorted_topk(values, k):
    """By a stable sort on the CPU: of equal entries those that come first."""
    columns = values.cpu().double().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return (columns + values.shape[1] * torch.arange(len(values))[:, None]).flatten().to(values.device)


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
@pytest.mark.parametrize("num_columns, k", [(40, 3), (48, 16), (40, 21), (7, 7), (16, 1), (33, 0)])
def test_it_is_that_of_a_stable_sort(interpreted, dtype, num_columns, k):
    """k below and above the number of maxima, all of a row, and none."""
    values = random_values(8, num_columns, dtype)
    assert torch.equal(interpreted.positions_topk(values, k), sorted_topk(values, k))


def test_nan_of_either_sign_is_above_all(interpreted):
    values = torch.tensor([[1.0, torch.inf, -torch.nan, torch.nan, -0.0]])  # and the zeros are equal
    assert interpreted.positions_topk(values, 2).tolist() == [2, 3]
    assert interpreted.positions_topk(values, 3).tolist() == [1, 2, 3]
    assert interpreted.positions_topk(torch.tensor([[-1.0, -0.0, 0.0]]), 1).tolist() == [1]


def test_the_selection_uses_it_and_finds_the_same(interpreted, monkeypatch):
    h = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    dead = torch.rand(96, generator=torch.Generator().manual_seed(2)) < 0.3
    wanted = selection.positions_topk(h, 4), selection.largest_dead(h, dead[None], 3)
    monkeypatch.setattr(selection, "triton_topk", interpreted)
    monkeypatch.setattr(interpreted, "takes", lambda values: values.is_contiguous())
    monkeypatch.setattr(selection, "is_on_cpu", lambda tensor: False)
    found = selection.positions_topk(h, 4), selection.largest_dead(h, dead[None], 3)
    assert torch.equal(found[0], wanted[0])
    for name in ("values", "indices", "offsets"):
        assert torch.equal(getattr(found[1], name), getattr(wanted[1], name))


def test_takes():
    assert not triton_topk.takes(torch.zeros(3, 4))  # a CPU's, not interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_compiles_for_an_h100(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    types = {"values": f"*{name}", "positions": "*i64"}
    constants = {"EMPTY": triton_topk.EMPTY_BITS[dtype], "BLOCK_C": triton_topk.TOPK_COLUMNS}
    compile_kernel(tmp_path, triton_topk.topk_kernel, types, constants, triton_topk.TOPK_WARPS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@DTYPES
@pytest.mark.parametrize("num_columns, k", [(24576, 32), (24576, 200), (8192, 3000), (1000, 5), (7, 7)])
def test_on_a_gpu(dtype, num_columns, k):
    values = random_values(512, num_columns, dtype, "cuda")
    assert triton_topk.takes(values)
    assert torch.equal(selection.positions_topk(values, k), sorted_topk(values, k))
