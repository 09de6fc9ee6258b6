"""
The Triton kernels over all layers against the float64 formulas: under Triton's interpreter on the CPU, compiled (but
not run) for an H100, and on a GPU where there is one.
"""

from functools import partial

import pytest
import torch

from hf_clt.kernels import decode as decode_module
from hf_clt.kernels import rows as rows_module
from hf_clt.kernels import triton_layers
from hf_clt.kernels.decode import decode_layers, output_rows, takes_layers
from hf_clt.sparsity import LayerFeatures, features_at, join
from tests.kernels.test_triton_rows import DTYPES, assert_within_rounding
from tests.kernels.triton_modules import compile_kernel, load_interpreted, run_twice_without_waiting
from tests.reference import random_batch, random_clt


triton = pytest.importorskip("triton")

L, N, F, D = 3, 6, 12, 24


def on_a_cpu_too(weight):
    """Stands in for `gradient_dtype`, which follows the autocast of a GPU."""
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else weight.dtype


@pytest.fixture(scope="module")
def interpreted():
    copy = load_interpreted(triton_layers)
    copy.DECODE_BYTES, copy.POSTING_BYTES, copy.POSTING_SPLIT, copy.SQUARE_COLUMNS = 64, 64, 5, 16
    copy.available = lambda tensor: tensor.dtype != torch.float64
    return copy


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_block(dtype, num_layers=L, dead=False, seed=0):
    """
    Features of some layers on N tokens, feature 0 on all, feature 1 on none, some of value 0; with dead features below
    on demand. And their dense activations (N, L, F), or (2 N, L, F), in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(num_layers, 2 if dead else 1, N, F, generator=generator).to(dtype)
    support = torch.rand(acts.shape, generator=generator) < 0.3
    support[..., 0], support[..., 1] = True, False
    acts = torch.where(torch.rand(acts.shape, generator=generator) < 0.1, 0, acts) * support
    halves = [
        join([features_at(acts[b, half], support[b, half]) for b in range(num_layers)])
        for half in range(acts.shape[1])
    ]
    block = halves[0].with_dead(halves[1]) if dead else halves[0]
    return block, acts.double().flatten(1, 2).transpose(0, 1)


def random_weights(dtype, reach, tied=False, seed=7):
    """Decoders that are slices of a larger tensor each, at distances that are no multiple of a load."""
    weights = []
    for s in range(L):
        width = D if tied else min(L - s, reach) * D
        buffer = torch.full((F * width + 3 * s + 8,), torch.nan, dtype=dtype)
        weight = buffer[3 * s + 1 :][: F * width].view(F, -1, D)
        weights.append(weight.copy_(randn(*weight.shape, seed=seed + s)))
    return weights


def dense_decode(start, acts, weights, reach, tied):
    """The formula; with absolute values the size of what is added up."""
    out = start.double().clone()
    for s, weight in enumerate(weights):
        for t in range(s, min(L, s + reach)):
            out[:, t] += acts[:, s] @ weight[:, 0 if tied else t - s].double()
    return out


CASES = pytest.mark.parametrize("dtype, reach, tied, dead, slopes", [
    (torch.float32, 3, False, True, True),
    (torch.bfloat16, 3, False, False, False),
    pytest.param(torch.float16, 3, False, False, True, marks=pytest.mark.slow),
    (torch.float32, 2, False, True, False),
    (torch.float32, 1, False, False, True),
    (torch.float32, 3, True, True, True),
    pytest.param(torch.float32, 2, True, False, False, marks=pytest.mark.slow),
])  # fmt: skip


@CASES
def test_decode(interpreted, dtype, reach, tied, dead, slopes):
    block, acts = random_block(dtype, dead=dead)
    weights = random_weights(dtype, reach, tied)
    unused = (acts == 0).all(dim=0)  # the rows of features that do not fire must not be read
    start = randn(1, L, D, seed=3).expand(len(acts), -1, -1)
    exact = dense_decode(start, acts, weights, reach, tied)
    size = dense_decode(start.abs(), acts.abs(), [w.abs() for w in weights], reach, tied)
    for s, weight in enumerate(weights):
        weight[unused[s]] = torch.nan
    found = interpreted.decode(start, block, block.values, weights, reach, tied)
    assert_within_rounding(found, exact, size, L * F, torch.float32)
    assert torch.equal(interpreted.decode(start, block, block.values, weights, reach, tied), found)


@CASES
def test_both_gradients_of_the_decoders(interpreted, dtype, reach, tied, dead, slopes):
    block, acts = random_block(dtype, dead=dead)
    weights = random_weights(dtype, reach, tied)
    rows = randn(len(acts), L, D, seed=4).to(dtype)
    slope = randn(L * F, seed=5) if slopes else None
    gradients = [torch.full_like(weight, torch.nan) for weight in weights]
    columns = [(s * D, weight[0].numel()) for s, weight in enumerate(weights)]
    given = {"columns": columns, "weights": weights, "slopes": slope}
    found = partial(interpreted.posting_sums, rows.flatten(1), output_rows(block), block, **given)
    dots = found(values=block.values, gradients=gradients)
    flat = rows.double().flatten(1)
    exact, size = torch.zeros(2, len(acts), L, F, dtype=torch.float64)
    for s, (weight, gradient, (first, width)) in enumerate(zip(weights, gradients, columns, strict=True)):
        w, g = weight.double().flatten(1), flat[:, first : first + width]
        exact[:, s], size[:, s] = g @ w.T, g.abs() @ w.abs().T
        wanted, most = acts[:, s].T @ g, acts[:, s].abs().T @ g.abs()
        if slopes:
            of_layer = slope[s * F : (s + 1) * F, None].double()
            wanted, most = wanted + of_layer * w, most + (of_layer * w).abs()
        assert_within_rounding(gradient.flatten(1), wanted, most, len(acts), dtype)
    place = (output_rows(block), block.indices // F, block.indices % F)
    assert_within_rounding(dots, exact[place], size[place], L * D, torch.float32)
    again = [torch.empty_like(weight) for weight in weights]
    assert torch.equal(found(values=block.values, gradients=again), dots)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))
    if not slopes:
        assert torch.equal(found(), dots)  # of weights that are not trained


def test_a_gradient_that_is_one_number_and_tiles_in_turns(interpreted, monkeypatch):
    """The gradient of a sum is expanded, without strides; the dot products of few tiles at a time are added up."""
    block, _ = random_block(torch.float32)
    weights = random_weights(torch.float32, 3)
    columns = [(s * D, weight[0].numel()) for s, weight in enumerate(weights)]

    def run(rows):
        gradients = [torch.full_like(weight, torch.nan) for weight in weights]
        given = {"values": block.values, "columns": columns, "gradients": gradients, "weights": weights}
        return [interpreted.posting_sums(rows.flatten(1), output_rows(block), block, **given), *gradients]

    rows = torch.full((N, L, D), 0.5)
    wanted = run(rows)
    expanded = torch.tensor(0.5).expand(N, L, D)
    assert expanded.flatten(1).stride() == (0, 0)
    for found in (run(expanded), monkeypatch.setattr(interpreted, "DOTS_BYTES", 1) or run(rows)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_sums_alone_over_layers_whose_rows_lie_side_by_side(interpreted):
    """The gradient of the encoders: row n · L + b of the inputs is token n in layer b."""
    block, acts = random_block(torch.float32)
    x = randn(N, L, D, seed=4)
    places = block.rows % N * L + block.rows // N
    gradient = torch.full((L * F, D), torch.nan)
    found = interpreted.posting_sums(
        x.view(-1, D), places, block, values=block.values, columns=[(0, D)], gradients=[gradient]
    )
    assert found is None
    exact, size = (torch.einsum("nlf,nld->lfd", a, b).flatten(0, 1) for a, b in (
        (acts, x.double()), (acts.abs(), x.double().abs())
    ))  # fmt: skip
    assert_within_rounding(gradient, exact, size, N, torch.float32)


def test_no_entries(interpreted):
    nothing = torch.zeros(0, dtype=torch.int64)
    block = LayerFeatures(torch.zeros(0), nothing, torch.zeros(L * N + 1, dtype=torch.int64), L * F, L)
    weights, start = random_weights(torch.float32, 3), randn(N, L, D)
    assert torch.equal(interpreted.decode(start, block, block.values, weights, 3, False), start)
    gradients = [torch.full_like(weight, torch.nan) for weight in weights]
    columns = [(s * D, weight[0].numel()) for s, weight in enumerate(weights)]
    given = {"values": block.values, "columns": columns, "gradients": gradients, "weights": weights}
    assert interpreted.posting_sums(start.flatten(1), nothing, block, **given).shape == (0,)
    assert all((gradient == 0).all() for gradient in gradients)


@DTYPES
def test_square_sums(interpreted, dtype):
    weights = random_weights(dtype, 3)
    exact = torch.cat([weight.double().square().sum(dim=(1, 2)) for weight in weights])
    assert_within_rounding(interpreted.square_sums(weights), exact, exact, L * D, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded(interpreted, dtype):
    weights = random_weights(torch.float32, 3)
    for found, weight in zip(interpreted.rounded(weights, dtype), weights, strict=True):
        torch.testing.assert_close(found, weight.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.parametrize("above", [0, pytest.param(1000, marks=pytest.mark.slow)], ids=["weights rounded", "not"])
def test_autocast_rounds_the_gradient_and_the_weights(interpreted, monkeypatch, above):
    """Numbers of few bits come through unchanged, others do not."""
    monkeypatch.setattr(decode_module, "triton_layers", interpreted)
    monkeypatch.setattr(decode_module, "ROUND_ABOVE", above)
    monkeypatch.setattr(decode_module, "gradient_dtype", on_a_cpu_too)
    block, _ = random_block(torch.float32)
    start = torch.zeros(N, L, D)

    def run(weights, rough):
        leaves = [weight.detach().clone().requires_grad_() for weight in weights]
        with torch.autocast("cpu", torch.bfloat16, enabled=rough):
            out, _ = decode_layers(start, block, leaves, 3, False)
        return [out, *torch.autograd.grad(out, leaves, randn(N, L, D, seed=9))]

    weights = [weight.bfloat16().float() for weight in random_weights(torch.float32, 3)]
    (exact, *grads), (found, *found_grads) = run(weights, False), run(weights, True)
    assert torch.equal(found, exact)
    for a, b in zip(found_grads, grads, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)
    weights = random_weights(torch.float32, 3)
    assert torch.equal(run(weights, True)[0], run(weights, False)[0]) == bool(above)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_weights_of_another_format_are_rounded(interpreted, monkeypatch, dtype):
    rounded = []
    monkeypatch.setattr(interpreted, "rounded", lambda weights, dtype: rounded.append(dtype) or weights)
    monkeypatch.setattr(decode_module, "triton_layers", interpreted)
    monkeypatch.setattr(decode_module, "ROUND_ABOVE", 0)
    monkeypatch.setattr(decode_module, "gradient_dtype", on_a_cpu_too)
    block, _ = random_block(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        decode_layers(torch.zeros(N, L, D), block, random_weights(dtype, 3), 3, False)
    assert rounded == [torch.bfloat16] * (dtype == torch.float32)


def test_where_gradients_are_there_layers_are_decoded_one_by_one(interpreted, monkeypatch):
    """All new ones at once would stand beside the old ones, of an earlier batch or in the buckets of processes."""
    monkeypatch.setattr(decode_module, "triton_layers", interpreted)
    monkeypatch.setattr(rows_module, "DENSE_ABOVE", 1.0)
    block, _ = random_block(torch.float32)
    weights, start = [w.requires_grad_() for w in random_weights(torch.float32, 3)], torch.zeros(N, L, D)
    assert takes_layers(block, weights, start)
    monkeypatch.setattr(decode_module.dist, "is_initialized", lambda: True)
    assert not takes_layers(block, weights, start)
    with torch.no_grad():
        assert takes_layers(block, weights, start)
    monkeypatch.undo()
    monkeypatch.setattr(decode_module, "triton_layers", interpreted)
    weights[0].grad = torch.zeros_like(weights[0])
    assert not takes_layers(block, weights, start)


@pytest.mark.parametrize("activation, reach, tying", [
    pytest.param("relu", 2, "none", marks=pytest.mark.slow),
    ("jumprelu", None, "none"),
    pytest.param("jumprelu", 2, "per_source", marks=pytest.mark.slow),
    ("topk", None, "per_source"),
    pytest.param("batchtopk", None, "none", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_training_step_of_the_model_through_the_kernels(interpreted, monkeypatch, activation, reach, tying):
    """
    Losses, each with its gradients, as layer by layer with the CPU operators in float32; rounding of sums of at most
    100 products.
    """
    losses = {
        "jumprelu_bandwidth": 0.5,
        "sparsity_lambda": 0.7,
        "preactivation_coef": 0.2,
        "aux_coef": 0.4,
        "aux_k": 2,
    }
    clt = random_clt(double=False, activation_fn=activation, decoder_tying=tying, decoder_reach=reach, **losses)
    inputs, labels = (tensor.float() for tensor in random_batch(clt))
    inputs.requires_grad_()
    dead = torch.zeros(clt.config.num_layers, clt.config.num_features, dtype=torch.bool)
    dead[1, 3:6] = True
    terms = ("reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss", "loss")

    def step():
        output = clt.train()(inputs, labels=labels, dead=dead)
        leaves = [inputs, *clt.parameters()]
        found = [output.reconstruction, output.features.to_dense()]
        for loss in (getattr(output, name) for name in terms):
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
            found += [loss, *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True))]
        return found

    monkeypatch.setattr(rows_module, "DENSE_ABOVE", 1.0)
    wanted = step()
    calls = []
    for name in ("decode", "posting_sums"):
        kernel = getattr(interpreted, name)
        monkeypatch.setattr(
            interpreted, name, lambda *args, name=name, kernel=kernel, **kw: calls.append(name) or kernel(*args, **kw)
        )
    for module in (rows_module, decode_module):
        monkeypatch.setattr(module, "triton_layers", interpreted)
    clt.layers_together = True
    found = step()
    assert "decode" in calls and "posting_sums" in calls
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def compile_for_h100(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return partial(compile_kernel, tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tied", [False, True])
def test_decode_compiles_for_an_h100(compile_for_h100, dtype, tied):
    types = {"weights": f"*{dtype}", "values": "*fp32", "start": "*fp32", "out": "*fp32"}
    types |= dict.fromkeys(["indices", "offsets", "table"], "*i64")
    constants = {"TIED": tied, "ALIGN": 16, "BLOCK_E": triton_layers.DECODE_ENTRIES}
    constants["BLOCK_C"] = triton_layers.DECODE_BYTES // (4 if dtype == "fp32" else 2)
    compile_for_h100(triton_layers.decode_kernel, types, constants, 1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "parts", [(True, True, False), (True, True, True), (True, False, False), (False, True, False)]
)
def test_posting_sums_compile_for_an_h100(compile_for_h100, dtype, parts):
    types = dict.fromkeys(["rows", "weights", "gradients"], f"*{dtype}")
    types |= dict.fromkeys(["values", "slopes", "dots"], "*fp32")
    types |= dict.fromkeys(["places", "offsets", "table"], "*i64")
    constants = dict(zip(("HAS_SUMS", "HAS_DOTS", "HAS_SLOPES"), map(bool, parts), strict=True))
    constants |= {"ALIGN": 16, "SPLIT": triton_layers.POSTING_SPLIT, "BLOCK_E": triton_layers.POSTING_ENTRIES}
    constants["BLOCK_C"] = triton_layers.POSTING_BYTES // (4 if dtype == "fp32" else 2)
    compile_for_h100(triton_layers.posting_kernel, types, constants, 1)


def test_square_sums_compile_for_an_h100(compile_for_h100):
    types = {"weights": "*bf16", "table": "*i64", "out": "*fp32"}
    constants = {"ALIGN": 16, "BLOCK_C": triton_layers.SQUARE_COLUMNS}
    compile_for_h100(triton_layers.squares_kernel, types, constants, 4)


def test_rounding_compiles_for_an_h100(compile_for_h100):
    types = {"weights": "*fp32", "rounded": "*bf16", "table": "*i64"}
    compile_for_h100(triton_layers.round_kernel, types, {"ALIGN": 16, "BLOCK": triton_layers.ROUND_BLOCK}, 4)


@pytest.mark.parametrize("numbers, found", [([0, 32], 16), ([0, 8], 1), ([], 16), ([-160], 16)])
def test_alignment(numbers, found):
    assert triton_layers.alignment(numbers) == found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@DTYPES
def test_on_a_gpu_at_a_real_size(dtype):
    """
    GPT-2's CLT: 12 layers of 768, 24,576 features each; 1,024 tokens with about 32 features of a layer, three of them
    hot. Without waiting for the GPU, and twice the same bits.
    """
    num_layers, num_tokens, num_features, width = 12, 1024, 24_576, 768
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    layers, acts = [], []
    for _ in range(num_layers):
        support = torch.rand(num_tokens, num_features, generator=generator, device=device) < 29 / num_features
        support[:, [5, 77, num_features - 1]], support[:, 6], support[3] = True, False, False
        values = normal(num_tokens, num_features) * support
        values[::7] = 0  # listed all the same
        layers.append(features_at(values, support))
        acts.append(values.double())
    block = join(layers)
    weights = [normal(num_features, num_layers - s, width, dtype=dtype) for s in range(num_layers)]
    start, slopes = normal(1, num_layers, width).expand(num_tokens, -1, -1), normal(num_layers * num_features)
    rows = normal(num_tokens, num_layers * width, dtype=dtype)
    places, _ = output_rows(block), block.by_feature  # computed here, since they may wait for the GPU

    def run():
        gradients = [torch.empty_like(weight) for weight in weights]
        columns = [(s * width, weight[0].numel()) for s, weight in enumerate(weights)]
        given = {"columns": columns, "gradients": gradients, "weights": weights, "slopes": slopes}
        decoded = triton_layers.decode(start, block, block.values, weights, num_layers, False)
        dots = triton_layers.posting_sums(rows, places, block, values=block.values, **given)
        return decoded, dots, triton_layers.square_sums(weights), *gradients

    assert triton_layers.takes(weights, start)
    first = run_twice_without_waiting(run)

    # Some columns of everything in float64: the first, the last, and some around the borders between tiles.
    decoded, dots, squares, *gradients = first
    some = torch.tensor([0, 1, 127, 128, 255, 256, width - 1], device=device)
    for target in range(num_layers):
        exact = start[:, target, some].double()
        size = exact.abs()
        for s in range(target + 1):
            w = weights[s][:, target - s, some].double()
            exact, size = exact + acts[s] @ w, size + acts[s].abs() @ w.abs()
        longest = int(block.offsets.diff().max()) * num_layers
        assert_within_rounding(decoded[:, target, some], exact, size, longest, torch.float32)
    for s, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        weight, gradient, own = weight.flatten(1), gradient.flatten(1), slice(s * width, None)
        square = weight.double().square().sum(dim=1)
        of_layer = slice(s * num_features, (s + 1) * num_features)
        assert_within_rounding(squares[of_layer], square, square, weight.shape[1], torch.float32)
        few = [c for tile in (0, 256, 512, weight.shape[1]) for c in range(tile - 4, tile + 4)]
        few = torch.tensor([c for c in few if 0 <= c < weight.shape[1]], device=device)
        w, g = slopes[of_layer, None].double() * weight[:, few].double(), rows[:, own][:, few].double()
        exact, size = acts[s].T @ g + w, acts[s].abs().T @ g.abs() + w.abs()
        assert_within_rounding(gradient[:, few], exact, size, num_tokens, dtype)
        entries = (block.indices // num_features == s).nonzero()[-300:, 0]
        products = rows[places[entries], own].double() * weight[block.indices[entries] % num_features].double()
        exact, size = products.sum(dim=1), products.abs().sum(dim=1)
        assert_within_rounding(dots[entries], exact, size, weight.shape[1], torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_with_offsets_beyond_32_bits():
    """2^31 elements and more of a decoder, read and written, and the next one beyond it: 4 and 2 GiB."""
    num_features, width = 2**21 + 2, 512
    device = torch.device("cuda")
    weights = [torch.zeros(num_features, 2 - s, width, dtype=torch.bfloat16, device=device) for s in range(2)]
    weights[0][-1], weights[1][-1] = 3, 2
    indices = torch.tensor([num_features - 1, 2 * num_features - 1], device=device)
    offsets = torch.tensor([0, 1, 1, 1, 2], device=device)  # token 0 in layer 0, token 1 in layer 1
    block = LayerFeatures(torch.ones(2, device=device), indices, offsets, 2 * num_features, 2)
    out = triton_layers.decode(torch.zeros(2, 2, width, device=device), block, block.values, weights, 2, False)
    assert out.amin(dim=2).tolist() == out.amax(dim=2).tolist() == [[3, 3], [0, 2]]
    gradients = [torch.empty_like(weight) for weight in weights]
    rows = torch.ones(2, 2 * width, dtype=torch.bfloat16, device=device)
    given = {"columns": [(0, 2 * width), (width, width)], "gradients": gradients, "weights": weights}
    dots = triton_layers.posting_sums(rows, output_rows(block), block, values=block.values, **given)
    assert dots.tolist() == [3 * 2 * width, 2 * width]
    for gradient in gradients:
        assert (gradient[-1] == 1).all() and not gradient[:-1].any()
    squares = triton_layers.square_sums(weights).view(2, -1)
    assert squares[:, -1].tolist() == [9 * 2 * width, 4 * width] and not squares[:, :-1].any()
    del gradients
    rounded = triton_layers.rounded(weights, torch.float16)
    assert [copy[-1].amin().item() for copy in rounded] == [3, 2] and not rounded[0][:-1].any()
