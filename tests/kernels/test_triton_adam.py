"""
The Triton kernels of the optimizers against their plain code: under Triton's interpreter on the CPU, compiled (but not
run) for an H100, and on a GPU where there is one.
"""

import re

import pytest
import torch

from hf_clt.kernels import triton_adam, triton_rows
from hf_clt.kernels.triton_adam import round_stochastically_, rounding_key
from hf_clt.training import optimizers
from hf_clt.training.optimizers import CompactAdam, WideAdam
from tests.kernels.triton_modules import compile_kernel, load_interpreted


triton = pytest.importorskip("triton")

# Rows of one element, short ones of which a program takes several, of one block, and of several with a rest.
SHAPES = [(5,), (300,), (70, 7), (5, 3, 4), (3, 256), (3, 2, 300)]
ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # the interpreter may truncate
SETTINGS = {"lr": 0.01, "eps": 1e-5, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def interpreted():
    copy = load_interpreted(triton_adam)
    copy.ADAM_COLUMNS = 256  # several blocks to a row: interpreted, sums are slow
    copy.WIDE_ELEMENTS, copy.WIDE_BLOCK = 256, 128
    copy.SQUARES_ELEMENTS, copy.SQUARES_BLOCK = 256, 64
    copy.LEAST_PARAMETERS = 4
    copy.takes = lambda parameter: parameter.dtype in triton_rows.DTYPES and parameter.is_contiguous()
    return copy


@pytest.fixture
def only_kernels(interpreted, monkeypatch):
    monkeypatch.setattr(optimizers, "triton_adam", interpreted)
    for optimizer in (CompactAdam, WideAdam):
        monkeypatch.setattr(optimizer, "_update", None)  # nothing goes the other way


def gradients(shapes, steps, dtype, device="cpu"):
    """Of very different sizes; each feature is silent on about half of the steps."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        step = []
        for shape in shapes:
            rows = [shape[0], *[1] * (len(shape) - 1)]
            fires = torch.rand(rows, generator=generator) < 0.5
            sizes = 10.0 ** torch.linspace(-4, 2, shape[0]).view(rows)
            step.append((torch.randn(shape, generator=generator) * fires * sizes).to(device, dtype))
        yield step


def parameters_of(shapes, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def train(parameters, history, plain=False, strided=False, make=CompactAdam, **settings):
    """The optimizer after these gradients, which `strided` gives as views with gaps."""
    optimizer = make(parameters, **SETTINGS | settings)
    for number, step in enumerate(history):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + number)
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
            if strided:
                parameter.grad = torch.stack([gradient, gradient + torch.nan], dim=-1)[..., 0]
        if plain:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(optimizers.triton_adam, "takes", lambda parameter: False)
                optimizer.step()
        else:
            optimizer.step()
    return optimizer


def assert_same_step(found, wanted, dtype, steps):
    """
    Weights and state of two optimizers, up to one rounding per step of what each holds; float32 sums over rows of up
    to 60,000 in different orders; and a quotient, in float16 up to 155, that is rounded the other way.
    """
    momentum = found.param_groups[0]["betas"][0] > 0
    for ours, plain in zip(found.param_groups[0]["params"], wanted.param_groups[0]["params"], strict=True):
        assert ours.dtype == dtype and ours.isfinite().all()
        share = 2 * steps * ROUNDING[dtype]
        rounding = {"rtol": share, "atol": max(share * 0.05, steps * 2e-5 * momentum)}
        torch.testing.assert_close(ours.detach().double(), plain.detach().double(), **rounding)
        state, expected = found.state[ours], wanted.state[plain]
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert value.dtype == expected[name].dtype and value.shape == expected[name].shape
            # A quotient's rounding stays in absolute terms where later gradients take most of it away.
            eps = 2**-10 if value.dtype == torch.float16 else 2**-18
            largest = expected[name].abs().amax().item() if value.dtype == torch.float16 else 1
            tolerance = {"rtol": steps * eps, "atol": steps * eps * max(1, largest)}
            torch.testing.assert_close(value.double(), expected[name].double(), **tolerance)
        assert state["step"] == steps


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_are_those_of_the_plain_code(interpreted, monkeypatch, dtype, beta1):
    """The plain code in float32, from weights and gradients of the kernel's format, as it rounds more than once."""
    history = list(gradients(SHAPES, 4, dtype))
    ours, plain = parameters_of(SHAPES, dtype), parameters_of(SHAPES, dtype)
    for parameter in plain:
        parameter.data = parameter.data.float()
    betas = {"betas": (beta1, 0.99)}
    wanted = train(plain, [[gradient.float() for gradient in step] for step in history], plain=True, **betas)
    monkeypatch.setattr(optimizers, "triton_adam", interpreted)
    monkeypatch.setattr(CompactAdam, "_update", None)  # nothing goes the other way
    assert_same_step(train(ours, history, **betas), wanted, dtype, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adam_is_that_of_torch(only_kernels, dtype):
    """In float64, from weights and gradients of the kernel's format. Two groups have settings of their own."""
    history = list(gradients(SHAPES, 4, dtype))
    ours, wide = parameters_of(SHAPES, dtype), parameters_of(SHAPES, dtype)
    for parameter in wide:
        parameter.data = parameter.data.double()
    groups = [
        [{"params": some[:3], "lr": 0.02}, {"params": some[3:], "betas": (0.8, 0.9), "weight_decay": 0.5}]
        for some in (ours, wide)
    ]
    found, wanted = WideAdam(groups[0], **SETTINGS), torch.optim.AdamW(groups[1], **SETTINGS, foreach=False)
    for step in history:
        for parameter, other, gradient in zip(ours, wide, step, strict=True):
            parameter.grad, other.grad = gradient, gradient.double()
        found.step()
        wanted.step()
    for parameter, other in zip(ours, wide, strict=True):
        assert parameter.dtype == dtype
        eps = 4 * ROUNDING[dtype]
        torch.testing.assert_close(parameter.detach().double(), other.detach(), rtol=eps, atol=eps / 4)
        state, expected = found.state[parameter], wanted.state[other]
        assert state.keys() == expected.keys() and state["step"] == 4
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == torch.float32
            largest = expected[name].abs().amax().item()
            torch.testing.assert_close(state[name].double(), expected[name], rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("make", [CompactAdam, WideAdam])
def test_the_same_bits_twice_and_with_strided_gradients(only_kernels, make):
    history = list(gradients(SHAPES, 2, torch.float32))
    results = []
    for strided in (False, False, True):
        parameters = parameters_of(SHAPES, torch.float32)
        state = train(parameters, history, strided=strided, make=make).state
        results.append([*parameters, *(value for parameter in parameters for value in state[parameter].values())])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_what_the_kernel_does_not_take_goes_the_plain_way(interpreted, monkeypatch):
    """And a silent feature stays, whatever its neighbours do."""
    monkeypatch.setattr(optimizers, "triton_adam", interpreted)
    wide, narrow = (torch.nn.Parameter(torch.ones(3, 4, dtype=dtype)) for dtype in (torch.float64, torch.float32))
    optimizer = CompactAdam([wide, narrow], lr=0.1)
    for parameter in (wide, narrow):
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[1] = 0
    optimizer.step()
    expected = torch.tensor([0.9, 1.0, 0.9])[:, None].expand(3, 4)
    torch.testing.assert_close(narrow.detach(), expected)
    torch.testing.assert_close(wide.detach(), expected.double(), rtol=1e-7, atol=1e-7)


def test_takes():
    assert not triton_adam.takes(torch.zeros(3))  # a CPU's, not interpreted


@pytest.mark.parametrize("name", ["compact", "wide"])
@pytest.mark.parametrize("begin", [35, 48])
def test_nothing_is_written_past_the_end(interpreted, name, begin):
    """Rows and columns of a block reach past the last element of a parameter that is the middle of a larger tensor."""
    buffers = []

    def inside(shape, dtype=torch.float32, value=0.0):
        size = torch.Size(shape).numel()
        buffers.append((torch.full((120,), 7.0, dtype=dtype), size))
        return buffers[-1][0][begin : begin + size].view(shape).fill_(value)

    parameter = torch.nn.Parameter(inside((7, 5), value=3.0))
    parameter.grad = torch.ones(7, 5)
    if name == "compact":
        state = {"update": inside((7, 5), torch.float16)}
        state |= {entry: inside((7,)) for entry in ("second_moment", "denominator")}
        interpreted.compact_step([(parameter, state, 0, (1e-8, -0.1, 1.0, 0.9, 0.99))])
    else:
        state = {entry: inside((7, 5)) for entry in ("exp_avg", "exp_avg_sq")}
        interpreted.wide_step([(parameter, state, 0, (1e-8, -0.1, 1.0, 0.1, 0.01))])
    for buffer, size in buffers:
        assert (buffer[:begin] == 7).all() and (buffer[begin + size :] == 7).all()
        written = buffer[begin : begin + size]
        assert ((written != 3) & (written != 0)).all()


# The norm, and clipping


def test_the_norm_is_that_of_all_elements_and_the_same_each_time(interpreted):
    tensors = [t for dtype in triton_rows.DTYPES for t in next(gradients([(7,), (3, 256), (40, 33)], 1, dtype))]
    tensors.append(torch.cat([torch.zeros(1), tensors[-1].float().flatten()])[1:])  # no 16 bytes at a time
    expected = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    found = interpreted.norm(tensors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(found, interpreted.norm(tensors))
    for value in (torch.nan, torch.inf):
        tensors[4][1, 255] = value
        torch.testing.assert_close(interpreted.norm(tensors).item(), value, equal_nan=True)


@pytest.mark.parametrize("make", [CompactAdam, WideAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_multiplies_and_leaves_gradients_alone(only_kernels, make, dtype):
    """With a large eps, so that Adam sees the size of gradients; a factor of a power of two rounds nothing."""
    results = []
    for clipped in (True, False):
        parameters = parameters_of(SHAPES, dtype)
        optimizer = make(parameters, lr=0.1, eps=1.0)
        for step in gradients(SHAPES, 3, dtype):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone() if clipped else gradient * 2**-6
            optimizer.clip_factor = torch.tensor(2.0**-6) if clipped else None
            optimizer.step()
            assert not clipped or all(torch.equal(p.grad, g) for p, g in zip(parameters, step, strict=True))
            assert optimizer.clip_factor is None
        results.append([*parameters, *(value for p in parameters for value in optimizer.state[p].values())])
    assert all(map(torch.equal, *results))


# Rounding at random


@pytest.mark.parametrize("make", [CompactAdam, WideAdam])
def test_the_kernels_round_as_the_plain_code_does(interpreted, monkeypatch, make):
    """Without memory a step is lr times the sign of the gradient, exactly: all that is left is the rounding."""
    results = []
    for plain in (True, False):
        monkeypatch.setattr(optimizers, "triton_adam", triton_adam if plain else interpreted)
        parameters = parameters_of([(3, 300), (700,)], torch.bfloat16)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = make(parameters, lr=2.0**-13, betas=(0.0, 0.0), eps=1e-30)
        generator = torch.Generator().manual_seed(2)
        for _ in range(20):
            for parameter in parameters:
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.grad = (4.0 * signs).bfloat16()
            optimizer.step()
        results.append(parameters)
    assert all(map(torch.equal, *results))
    assert all((one != two).float().mean() > 0.1 for one, two in zip(parameters, before, strict=True))


def test_rounding_keeps_the_mean():
    """Of 4,096 roundings of each number its neighbours come as often as they should: within 5 standard deviations."""
    number = torch.tensor([1.0, 1.001, -1.001, 1.0039, 3e-5, -700.3, 1e-39]).repeat(4096, 1)
    found = round_stochastically_(number.clone(), rounding_key(1, 2, 3))
    lower = (number.view(torch.int32) & ~0xFFFF).view(torch.float32)
    spacing = ((number.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32) - lower
    up = (found - lower) / spacing
    assert ((up == 0) | (up == 1)).all()
    share = ((number - lower) / spacing)[0]
    assert (up.mean(dim=0) - share).abs().le(5 * (share * (1 - share) / 4096).sqrt()).all()
    # And a number of the format stays, as do those that are none.
    special = torch.tensor([0.0, -0.0, 1.5, torch.inf, -torch.inf, torch.nan])
    special = torch.cat([special, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])  # a GPU's NaN
    for key in range(50):
        torch.testing.assert_close(round_stochastically_(special.clone(), key), special, equal_nan=True)


def test_random_numbers_differ_by_seed_step_parameter_and_element():
    """None agree more often than chance has it."""
    keys = [rounding_key(*parts) for parts in ((0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 1, 2), (1, 0, 1))]
    assert len(set(keys)) == len(keys)
    number = torch.full((10_000,), 1.0 + 2**-8)  # halfway
    up = torch.stack([round_stochastically_(number.clone(), key) > 1 for key in keys]).float()
    up = torch.cat([up, up[:1].roll(1, dims=1), up[:1].roll(64, dims=1)])
    assert torch.corrcoef(up).fill_diagonal_(0).abs().max() < 0.05
    parts, start = [], 2**33  # after which numbers repeat
    for part in number.split(3333):
        parts.append(round_stochastically_(part.clone(), keys[0], start))
        start += len(part)
    assert torch.equal(torch.cat(parts) > 1, up[0] > 0)


@pytest.mark.parametrize("make", [CompactAdam, WideAdam])
@pytest.mark.parametrize("kernel", [pytest.param(True, marks=pytest.mark.slow), False])
def test_tiny_updates_are_not_lost(interpreted, monkeypatch, make, kernel):
    """Steps of 1e-4 of the weights' spacing, of which rounding to the nearest leaves nothing."""
    if kernel:
        monkeypatch.setattr(optimizers, "triton_adam", interpreted)
    spacing, steps = 2**-7, 200
    weight = torch.nn.Parameter(torch.full((1, 20_000), 1.5, dtype=torch.bfloat16))
    if kernel:
        monkeypatch.setattr(interpreted, "WIDE_ELEMENTS", 20_480)
        monkeypatch.setattr(interpreted, "WIDE_BLOCK", 20_480 // 5)
        monkeypatch.setattr(interpreted, "ADAM_COLUMNS", 4096)
        steps = 20
    optimizer = make([weight], lr=1e-4 * spacing, eps=1e-30)
    weight.grad = torch.ones_like(weight)
    assert torch.equal((weight.detach().float() - 1e-4 * spacing).bfloat16(), weight)
    for _ in range(steps):
        optimizer.step()
    moved = (1.5 - weight.detach().double()) / spacing  # of each the number of times it went down
    assert moved.mean() == pytest.approx(1e-4 * steps, rel=5 / (1e-4 * steps * 20_000) ** 0.5)


@pytest.mark.parametrize("num_columns, blocks", [
    (1, (1, 256, 1)),
    (7, (8, 32, 1)),
    (300, (512, 1, 1)),
    (768, (1024, 1, 2)),
    (59904, (4096, 1, 8)),
])  # fmt: skip
def test_blocks(num_columns, blocks):
    """A warp holds at least 8 elements per thread: what is written over is in the registers of no other."""
    assert triton_adam.adam_blocks(num_columns) == blocks


TABLE = {"table": "*i64", "factor": "*fp32", "sums": "*fp32"}


@pytest.mark.parametrize("num_columns", [768, 9216])
@pytest.mark.parametrize("moment", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_compiles_for_an_h100(tmp_path, monkeypatch, dtype, moment, num_columns):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block_c, block_r, num_warps = triton_adam.adam_blocks(num_columns)
    formats = triton_adam.FORMATS
    constants = {"HAS_MOMENT": moment, "BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_P": 128, "ALIGNED": True}
    constants |= dict.fromkeys(["WEIGHT", "GRADIENT"], formats[dtype]) | {"MOMENT": formats[torch.float16]}
    constants["HAS_FACTOR"] = True
    ptx, registers = compile_kernel(tmp_path, triton_adam.adam_kernel, TABLE, constants, num_warps)
    assert registers <= 64  # 32 warps at a time on a multiprocessor
    assert is_rounded_correctly(ptx)


def is_rounded_correctly(ptx):
    """Whether quotients and roots are the nearest numbers, as on a CPU."""
    return {"div.rn.f32", "sqrt.rn.f32"} == set(re.findall(r"\b(?:div|sqrt|rcp)\.[a-z.]+f32", ptx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adam_and_the_norm_compile_for_an_h100(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shared = {"ALIGNED": True, "BLOCK_P": 128}
    constants = dict.fromkeys(["WEIGHT", "GRADIENT"], triton_adam.FORMATS[dtype]) | {"HAS_FACTOR": True} | shared
    constants |= {"ELEMENTS": triton_adam.WIDE_ELEMENTS, "BLOCK": triton_adam.WIDE_BLOCK}
    ptx, registers = compile_kernel(tmp_path, triton_adam.wide_kernel, TABLE, constants, triton_adam.WIDE_WARPS)
    assert registers <= 64  # 32 warps
    assert is_rounded_correctly(ptx)
    constants = {"FORMAT": triton_adam.FORMATS[dtype]} | shared
    constants |= {"ELEMENTS": triton_adam.SQUARES_ELEMENTS, "BLOCK": triton_adam.SQUARES_BLOCK}
    _, registers = compile_kernel(tmp_path, triton_adam.squares_kernel, TABLE, constants, triton_adam.SQUARES_WARPS)
    assert registers <= 40  # 48 warps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make, beta1", [(CompactAdam, 0.9), (CompactAdam, 0.0), (WideAdam, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype, make, beta1):
    """Rows as long as those of Gemma 2's first decoder, without waiting for the GPU."""
    shapes = [(100, 26, 2304), *SHAPES]
    history = list(gradients(shapes, 4, dtype, "cuda"))
    ours, plain = parameters_of(shapes, dtype, "cuda"), parameters_of(shapes, dtype, "cuda")
    for parameter in plain:
        parameter.data = parameter.data.float()
    settings = {"make": make, "betas": (beta1, 0.999)}
    wanted = train(plain, [[gradient.float() for gradient in step] for step in history], plain=True, **settings)
    assert all(map(triton_adam.takes, ours))
    train(parameters_of(shapes, dtype, "cuda"), history[:1], **settings)  # compiles
    triton_adam.norm(history[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = train(ours, history, **settings)
        norm = triton_adam.norm(history[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_step(found, wanted, dtype, 4)
    expected = torch.cat([gradient.double().flatten() for gradient in history[0]]).norm()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(norm, triton_adam.norm(history[0]))
    again = parameters_of(shapes, dtype, "cuda")
    train(again, history, **settings)
    assert all(map(torch.equal, ours, again))
