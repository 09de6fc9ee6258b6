"""
The Triton kernel of `CompactAdam` against the optimizer's plain code: under Triton's interpreter on the CPU, compiled
(but not run) for an H100, and on a GPU where there is one.
"""

import pytest
import torch

from hf_clt.kernels import triton_adam, triton_rows
from hf_clt.training import optimizers
from hf_clt.training.optimizers import CompactAdam
from tests.kernels.triton_modules import compile_kernel, load_copy


triton = pytest.importorskip("triton")

# Rows of one element, short ones of which a program takes several, of one block, and of several with a rest.
SHAPES = [(5,), (300,), (70, 7), (5, 3, 4), (3, 256), (3, 2, 300)]
ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # the interpreter may truncate
SETTINGS = {"lr": 0.01, "eps": 1e-5, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        copy = load_copy(triton_adam, "interpreted_adam")
    copy.ADAM_COLUMNS = 256  # several blocks to a row: interpreted, sums are slow
    copy.takes = lambda parameter: parameter.dtype in triton_rows.DTYPES and parameter.is_contiguous()
    return copy


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


def train(parameters, history, plain=False, strided=False, **settings):
    """The optimizer after these gradients, which `strided` gives as views with gaps."""
    optimizer = CompactAdam(parameters, **SETTINGS | settings)
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


def test_the_same_bits_twice_and_with_strided_gradients(interpreted, monkeypatch):
    monkeypatch.setattr(optimizers, "triton_adam", interpreted)
    history = list(gradients(SHAPES, 2, torch.float32))
    results = []
    for strided in (False, False, True):
        parameters = parameters_of(SHAPES, torch.float32)
        state = train(parameters, history, strided=strided).state
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


def test_nothing_is_written_past_the_end(interpreted):
    """Rows and columns of a block reach past the last element of a parameter that is the middle of a larger tensor."""
    buffer, half = torch.full((3, 7, 5), 7.0), torch.full((3, 7, 5), 7.0, dtype=torch.float16)
    parameter, state = torch.nn.Parameter(buffer[1]), {"update": half[1].zero_()}
    for name in ("second_moment", "denominator"):
        state[name] = torch.full((21,), 7.0)[7:14].zero_()
    parameter.grad = torch.ones(7, 5)
    interpreted.adam_step(parameter, state, torch.tensor([[torch.nan] * 2, [1e-8, -0.1]]), 1, (0.9, 0.99), 1.0)
    for tensor in (buffer, half):
        assert (tensor[::2] == 7).all() and (tensor[1] != 7).all()
    for name in ("second_moment", "denominator"):
        around = torch.empty(0).set_(state[name].untyped_storage())
        assert (around[:7] == 7).all() and (around[14:] == 7).all() and (around[7:14] != 7).all()


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


@pytest.mark.parametrize("num_columns", [768, 9216])
@pytest.mark.parametrize("moment", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_compiles_for_an_h100(tmp_path, monkeypatch, dtype, moment, num_columns):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block_c, block_r, num_warps = triton_adam.adam_blocks(num_columns)
    types = dict.fromkeys(["weights", "gradients"], f"*{dtype}") | {"updates": "*fp16"}
    types |= dict.fromkeys(["second_moments", "denominators", "factors"], "*fp32")
    types |= dict.fromkeys(["beta1", "beta2", "share", "kept"], "fp32")
    constants = {"HAS_MOMENT": moment, "BLOCK_R": block_r, "BLOCK_C": block_c}
    _, registers = compile_kernel(tmp_path, triton_adam.adam_kernel, types, constants, num_warps)
    assert registers <= 64  # 32 warps at a time on a multiprocessor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype, beta1):
    """Rows as long as those of Gemma 2's first decoder, without waiting for the GPU."""
    shapes = [(100, 26, 2304), *SHAPES]
    history = list(gradients(shapes, 4, dtype, "cuda"))
    ours, plain = parameters_of(shapes, dtype, "cuda"), parameters_of(shapes, dtype, "cuda")
    for parameter in plain:
        parameter.data = parameter.data.float()
    betas = {"betas": (beta1, 0.999)}
    wanted = train(plain, [[gradient.float() for gradient in step] for step in history], plain=True, **betas)
    assert all(map(triton_adam.takes, ours))
    train(parameters_of(shapes, dtype, "cuda"), history[:1], **betas)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = train(ours, history, **betas)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_step(found, wanted, dtype, 4)
    again = parameters_of(shapes, dtype, "cuda")
    train(again, history, **betas)
    assert all(map(torch.equal, ours, again))
