"""
Whether hf_clt is right on this GPU, and what each phase of an update costs there: `make gpu-check`, five minutes.

The pieces come in the order of their importance: kernels and whole steps against float64, the rates of the machine,
phases, whole updates of ours beside dense ones, other constants of the kernels (timings: gpu_times.py). What does not
fit into the budget is skipped, and said.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_clt.command import one_line_errors
from hf_clt.configuration_clt import TOPK_FAMILY
from hf_clt.kernels import rows as rows_module
from hf_clt.kernels import triton_adam, triton_rows, triton_select
from hf_clt.kernels.decode import add_decoded, decode_layers, squared_norms
from hf_clt.kernels.encode import pre_activations_at
from hf_clt.selection import features_above, positions_batchtopk, positions_topk
from hf_clt.sparsity import LayerFeatures, features_at, join
from hf_clt.training.optimizers import CompactAdam, WideAdam

from . import gpu_report
from .cases import Case
from .dense_reference import dense_losses_of
from .gpu_report import attempt
from .gpu_times import time_constants, time_phases, time_rates, time_updates
from .measure import make_batches, make_clt


SHAPES = {  # L, D, F, N, k
    "A": (12, 768, 24576, 4096, 32),
    "A200": (12, 768, 24576, 4096, 200),
    "B": (30, 576, 8192, 4096, 32),
    "C": (26, 2304, 16384, 4096, 50),
}
# k as large as an update of A has it in comparison with F: under autocast decoder rows are rounded first.
CHECKED, TINY = (4, 256, 8192, 1024, 56), (3, 16, 256, 64, 4)
FORMATS = {
    "float32": {},
    "autocast": {"autocast": "bfloat16"},
    "bfloat16": {"autocast": "bfloat16", "dtype": "bfloat16", "optimizer": "adam_compact"},
}
# All layers at once: L, D, F, N, k, reach, whether tied, whether dead features follow, and the format.
LAYERS = [
    (12, 768, 24576, 1024, 32, 12, False, False, "autocast"),
    (12, 768, 24576, 1024, 32, 12, False, True, "float32"),
    (12, 768, 24576, 1024, 200, 12, False, False, "bfloat16"),
    (30, 576, 8192, 1024, 64, 30, False, True, "autocast"),  # read often enough to be rounded first
    (30, 576, 8192, 1024, 32, 30, False, False, "bfloat16"),
    (26, 2304, 4096, 512, 16, 26, False, True, "bfloat16"),
    (12, 768, 24576, 1024, 32, 4, False, False, "autocast"),
    (12, 768, 24576, 1024, 32, 12, True, True, "float32"),
    (12, 768, 24576, 1024, 32, 5, True, False, "bfloat16"),
    (5, 300, 1000, 777, 5, 3, False, True, "float16"),
    (3, 7, 100, 64, 3, 3, False, False, "bfloat16"),
    (3, 7, 100, 64, 3, 1, False, True, "float32"),
]
TINY_LAYERS = [
    (4, 30, 100, 77, 5, 4, False, False, "float32"),
    (4, 30, 100, 77, 5, 2, False, True, "float32"),
    (4, 7, 100, 77, 5, 4, True, True, "float32"),
    (4, 30, 100, 77, 5, 3, True, False, "float32"),
]
ADAM_SHAPES = [(1000, 9216), (100, 59904), (777, 300), (64, 7), (5000,), (768, 12, 768)]
# What is timed, in this order: pieces of shape and format, and about how many seconds each takes; updates have ours
# and the dense side, and ours with dead features.
TIMED = [
    ("phases", "A", "autocast", 12), ("update", "A", "autocast", 8), ("update", "B", "autocast", 10),
    ("constants", "A", "autocast", 25), ("phases", "B", "autocast", 10), ("phases", "A200", "autocast", 10),
    ("phases", "C", "bfloat16", 15), ("update", "A", "bfloat16", 10), ("update", "C", "bfloat16", 20),
    ("constants", "C", "bfloat16", 25), ("update", "A200", "autocast", 8), ("phases", "A", "bfloat16", 10),
    ("constants", "B", "autocast", 12), ("update", "B", "bfloat16", 12), ("dead", "A", "autocast", 5),
    ("dead", "C", "bfloat16", 18), ("dead", "B", "autocast", 8), ("dead", "A200", "autocast", 5),
    ("update", "A200", "bfloat16", 10), ("constants", "A200", "autocast", 20), ("constants", "A", "bfloat16", 15),
    ("phases", "B", "bfloat16", 10),
]  # fmt: skip


def make_case(shape: tuple, form: str, device: torch.device, fn: str = "batchtopk", dead: float = 0.0) -> Case:
    L, D, num_features, N, k = shape
    return Case(L, D, num_features, N, k, fn, dead=dead, device=str(device), **FORMATS[form])


# -- is it right ------------------------------------------------------------------------------------------------------


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run there; otherwise what a CPU does instead is checked."""
    return device.type == "cuda"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_rows(rows: list, device: torch.device, tiny: bool) -> None:
    """The sums and dot products of gathered rows against their formulas in float64, element by element."""
    on_gpu = has_kernels(device)
    kernels = triton_rows if on_gpu else rows_module
    print("the Triton kernels" if on_gpu else "the CPU's ways in kernels/: Triton's kernels do not run here")
    shapes = [(1024, 24576, 32, 768), (777, 1000, 5, 300), (64, 100, 3, 7)]
    torch.manual_seed(0)
    for num_tokens, num_features, k, columns in shapes[1 if tiny else 0 :]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if on_gpu else (torch.float32, torch.bfloat16):
            entries = random_layer(num_tokens, num_features, k, device)
            entries = entries.with_values(entries.values.to(dtype))
            tokens, indices, offsets = entries.rows, entries.indices, entries.offsets
            decoder = torch.randn(num_features, columns, device=device, dtype=dtype)
            grad = torch.randn(num_tokens, columns, device=device, dtype=dtype)
            wide, wide_grad, dense = decoder.double(), grad.double(), entries.dense(entries.values.double())
            dots = (
                rows_module.row_dots_reference(wide_grad, tokens, wide, indices),
                rows_module.row_dots_reference(wide_grad.abs(), tokens, wide.abs(), indices),
            )
            checks = {  # what is found, wanted, and the sum of the absolute values of its terms
                "row_sums": (
                    partial(kernels.row_sums, decoder, indices, offsets, entries.values),
                    dense @ wide,
                    dense.abs() @ wide.abs(),
                ),
                "row_dots": (partial(rows_module.row_dots_by_feature, grad, decoder, entries, tokens), *dots),
            }
            for name, given in checks.items():
                shape = {"tokens": num_tokens, "features": num_features, "columns": columns}
                row = {"check": name, "dtype": name_of(dtype), **shape}
                print_check(attempt(rows, row, partial(kernel_check, *given)))


def kernel_check(work: Callable[[], Tensor], wanted: Tensor, terms: Tensor) -> dict:
    found = work()
    error = share_of_bound(found, wanted, terms)
    same = torch.equal(found, work())
    return {"errors": {"of the bound": error}, "same_bits": same, "passed": error <= 1 and same}


def share_of_bound(found: Tensor, wanted: Tensor, terms: Tensor) -> float:
    """
    The largest error as a share of its bound: one rounding of the result, and sums in float32 of terms whose absolute
    values add up to `terms`.
    """
    rounding = torch.finfo(found.dtype).eps / 2
    bound = rounding * (wanted.abs() + torch.finfo(found.dtype).tiny) + 1e-6 * terms
    return ((found.double() - wanted).abs() / bound).max().item() if found.numel() else 0.0


def random_layer(num_tokens: int, num_features: int, k: int, device: torch.device) -> LayerFeatures:
    """About k entries on a token, none on the first; three features are on all others, one on none; some are zero."""
    support = torch.rand(num_tokens, num_features, device=device) < k / num_features
    support[:, :3], support[0], support[:, 5] = True, False, False
    return features_at(F.dropout(torch.randn(num_tokens, num_features, device=device), 0.2), support)


def check_layers(rows: list, device: torch.device, tiny: bool) -> None:
    """What all layers decode, and all gradients, element by element against the formulas in float64."""
    torch.manual_seed(0)
    for num_layers, width, num_features, num_tokens, k, reach, tied, dead, form in TINY_LAYERS if tiny else LAYERS:
        row = {"check": "layers", "format": form, "shape": (num_layers, width, num_features, num_tokens, k)}
        row |= {"reach": f"reach {reach}", "tied": "tied" if tied else "untied", "dead": "dead" if dead else "no dead"}

        def make(of: int, num_layers=num_layers, num_features=num_features, num_tokens=num_tokens) -> LayerFeatures:
            return join([random_layer(num_tokens, num_features, of, device) for _ in range(num_layers)])

        block = make(k).with_dead(make(4)) if dead else make(k)
        print_check(attempt(rows, row, partial(layers_check, block, width, reach, tied, form)))
        row = {"check": "encoders", "shape": row["shape"], "dead": row["dead"]}
        print_check(attempt(rows, row, partial(encoders_check, block, width)))


def layers_check(block: LayerFeatures, width: int, reach: int, tied: bool, form: str) -> dict:
    """Decoding, the norms of decoders, and their gradients. What is rounded on the way has few bits beforehand."""
    device, num_layers, num_features = block.values.device, block.num_layers, block.num_features // block.num_layers
    dtype = torch.float32 if form == "autocast" else getattr(torch, form)
    exact = dtype if form != "autocast" else torch.bfloat16
    targets = [range(s, min(num_layers, s + reach)) for s in range(num_layers)]
    weights = [
        torch.randn(num_features, 1 if tied else len(some), width, device=device, dtype=exact).to(dtype)
        for some in targets
    ]
    num_rows = block.num_rows // num_layers
    start = torch.randn(num_rows, num_layers, width, device=device)
    # Whole numbers where those of several targets are added up before they are rounded.
    grad = torch.randint(-4, 5, start.shape, device=device).to(exact) if tied else torch.randn_like(start).to(exact)
    grad, slopes = grad.float(), torch.randn(num_layers * num_features, device=device)

    def step() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        leaves = [block.values.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
        with torch.autocast(device.type, torch.bfloat16, enabled=form == "autocast"):
            outputs = decoded(start, block.with_values(leaves[0]), leaves[1:], reach, tied)
        return *(out.detach() for out in outputs), torch.autograd.grad(outputs, leaves, [grad, slopes])

    found, squares, (dots, *gradients) = step()
    acts_of, rows_of = dense_layers(block), grad.double()
    wanted, most = start.double(), start.double().abs()
    errors = dict.fromkeys(("decoded", "values", "decoders", "squares"), 0.0)
    entries = block.rows // (num_layers * block.num_tokens) * block.num_tokens + block.rows % block.num_tokens
    layer_of = block.indices // num_features
    for s, (weight, gradient, some) in enumerate(zip(weights, gradients, targets, strict=True)):
        acts, w = acts_of(s), weight.double().expand(-1, len(some), -1).flatten(1)
        columns = slice(some.start, some.stop)
        wanted[:, columns] += (acts @ w).view(num_rows, len(some), width)
        most[:, columns] += (acts.abs() @ w.abs()).view(num_rows, len(some), width)
        own = (layer_of == s).nonzero()[:, 0]
        place = entries[own], block.indices[own] % num_features
        g = rows_of[:, columns].flatten(1)
        pair = (g @ w.T)[place], (g.abs() @ w.abs().T)[place]
        errors["values"] = max(errors["values"], share_of_bound(dots[own], *pair))
        w, g = weight.double().flatten(1), rows_of[:, columns]
        g, of_terms = (g.sum(dim=1), g.abs().sum(dim=1)) if tied else (g.flatten(1), g.abs().flatten(1))
        own = slice(s * num_features, (s + 1) * num_features)
        slope = 2 * slopes[own, None].double() * w
        pair = acts.T @ g + slope, acts.abs().T @ of_terms + slope.abs()
        errors["decoders"] = max(errors["decoders"], share_of_bound(gradient.flatten(1), *pair))
        square = w.square().sum(dim=1)
        errors["squares"] = max(errors["squares"], share_of_bound(squares[own], square, square))
        del acts, w, g, of_terms, slope, pair, place
    errors["decoded"] = share_of_bound(found, wanted, most)
    *again, others = step()
    same = all(map(torch.equal, (found, squares, dots, *gradients), (*again, *others)))
    return {"errors": errors, "same_bits": same, "passed": same and max(errors.values()) <= 1}


def decoded(start: Tensor, block: LayerFeatures, weights: list[Tensor], reach: int, tied: bool) -> tuple[Tensor, ...]:
    """By the kernels over all layers; on a CPU, which has none, layer by layer."""
    if has_kernels(start.device):
        return decode_layers(start, block, weights, reach, tied, with_squares=True)
    out, squares = start.clone(), []
    for s, (layer, weight) in enumerate(zip(block.by_layer(), weights, strict=True)):
        out, _ = add_decoded(out, layer, weight, slice(s, min(len(weights), s + reach)))
        squares.append(squared_norms(weight.flatten(1)))
    return out, torch.cat(squares)


def dense_layers(block: LayerFeatures) -> Callable[[int], Tensor]:
    """The activations of a layer with its dead features below, (N or 2 N, F), in float64."""
    layers = block.by_layer()
    return lambda s: layers[s].dense(layers[s].values.double())


def encoders_check(block: LayerFeatures, width: int) -> dict:
    """Values computed again after a rough product, and the gradients of encoders and inputs."""
    device, num_layers, num_tokens = block.values.device, block.num_layers, block.num_tokens
    num_features = block.num_features // num_layers
    x = torch.randn(num_tokens, num_layers, width, device=device)
    weight = torch.randn(num_layers, num_features, width, device=device)
    bias = torch.randn(num_layers, num_features, device=device)
    rough, grad = block.with_values(block.values.bfloat16()), torch.randn_like(block.values)

    def step() -> list[Tensor]:
        leaves = [some.clone().requires_grad_() for some in (x, weight, bias)]
        if has_kernels(device):
            values = pre_activations_at(*leaves, rough).values
            return [values.detach(), *torch.autograd.grad(values, leaves, grad)]
        layers, out = rough.by_layer(), [torch.empty_like(grad)]
        places = [(block.indices // num_features == s).nonzero()[:, 0] for s in range(num_layers)]
        total = 0.0
        for s, (layer, place) in enumerate(zip(layers, places, strict=True)):
            part = leaves[0][:, s : s + 1], leaves[1][s : s + 1], leaves[2][s : s + 1]
            values = pre_activations_at(*part, layer).values
            out[0][place] = values.detach()
            total = total + (values * grad[place]).sum()
        return [*out, *torch.autograd.grad(total, leaves)]

    found, errors = step(), dict.fromkeys(("values", "inputs", "weights", "biases"), 0.0)
    tokens, layer_of = block.rows % num_tokens, block.indices // num_features
    for s in range(num_layers):
        own = (layer_of == s).nonzero()[:, 0]
        place = tokens[own], block.indices[own] % num_features
        a, w, b = (some.double() for some in (x[:, s], weight[s], bias[s]))
        g, most = torch.zeros(2, num_tokens, num_features, dtype=torch.float64, device=device)
        g.index_put_(place, grad[own].double(), accumulate=True)
        most.index_put_(place, grad[own].double().abs(), accumulate=True)
        pairs = {
            "values": (found[0][own], (a @ w.T + b)[place], (a.abs() @ w.abs().T + b.abs())[place]),
            "inputs": (found[1][:, s], g @ w, most @ w.abs()),
            "weights": (found[2][s], g.T @ a, most.T @ a.abs()),
            "biases": (found[3][s], g.sum(dim=0), most.sum(dim=0)),
        }
        for name, given in pairs.items():
            errors[name] = max(errors[name], share_of_bound(*given))
    same = all(map(torch.equal, found, step()))
    return {"errors": errors, "same_bits": same, "passed": same and max(errors.values()) <= 1}


def check_selection(rows: list, device: torch.device, tiny: bool) -> None:
    """Selections position by position: of equal entries at a cut the first. (A CPU takes any: there their values.)"""
    shapes = [(12, 4096, 24576, 32), (12, 4096, 24576, 200), (26, 4096, 16384, 50), (3, 777, 1000, 5), (2, 64, 256, 4)]
    torch.manual_seed(0)
    for shape in shapes[4 if tiny else 0 :]:
        for dtype in (torch.bfloat16, torch.float32):
            for name in ("topk", "batchtopk", "above", "above per layer", "above per feature"):
                if dtype == torch.float32 and shape in shapes[1:3]:
                    continue
                row = {"check": name, "dtype": name_of(dtype), "shape": shape}
                print_check(attempt(rows, row, partial(selection_check, name, dtype, shape, device)))


def selection_check(name: str, dtype: torch.dtype, shape: tuple, device: torch.device) -> dict:
    num_layers, num_tokens, num_features, k = shape
    h = torch.randn(num_layers * num_tokens, num_features, device=device, dtype=dtype)
    h[::2, ::3] = -torch.inf  # as of features that are not dead
    if name.startswith("above"):
        # Each feature above its own mean of two rows; numbers that all layers share, or one has.
        theta = {"above": 2.0, "above per layer": torch.linspace(1, 3, num_layers, device=device)}.get(name)
        lower = theta if theta is not None else 1 + torch.rand(num_layers * num_features, device=device)
        found = features_above(h, lower, num_layers)
        found = found.rows * num_features + found.indices % num_features
        above = lower if name == "above" else lower.view(num_layers, 1, -1)
        wanted = (h.view(num_layers, num_tokens, -1).float() > above).flatten().nonzero()[:, 0]
        work = partial(features_above, h, lower, num_layers)
        same = torch.equal(work().values, work().values)
    else:
        per_row = name == "topk"
        count = k if per_row else k * num_tokens
        work = partial(positions_topk, h, k) if per_row else partial(positions_batchtopk, h, count, num_layers)
        found, wanted = work(), first_largest(h if per_row else h.view(num_layers, -1), count)
        same = torch.equal(found, work())
        if not has_kernels(device):
            found, wanted = (h.flatten()[p].view(-1, count).sort().values for p in (found, wanted))
    other = (found != wanted).sum().item() if found.shape == wanted.shape else float("inf")
    taken = not has_kernels(device) or triton_select.takes(h)
    return {"errors": {"other entries": other}, "same_bits": same, "passed": other == 0 and same and taken}


def first_largest(rows: Tensor, count: int) -> Tensor:
    """Flat positions of the `count` largest of each row (B, M), of equal ones the first, by their values alone."""
    cut = rows.topk(count, dim=1).values[:, -1:]
    chosen, equal = rows > cut, rows == cut
    for row, more, lacking in zip(chosen, equal, count - chosen.sum(dim=1), strict=True) if len(rows) < 100 else ():
        row[more.nonzero()[:lacking, 0]] = True
    if len(rows) >= 100:
        chosen |= equal & (equal.cumsum(dim=1, dtype=torch.int32) <= count - chosen.sum(dim=1, keepdim=True))
    return chosen.flatten().nonzero()[:, 0]


def check_adam(rows: list, device: torch.device, tiny: bool) -> None:
    """Three steps of each optimizer's kernel beside the plain code in float64; and norms."""
    shapes = ADAM_SHAPES[2:5] if tiny else ADAM_SHAPES
    for dtype in (torch.float32, torch.bfloat16):
        for make, beta1 in ((CompactAdam, 0.9), (CompactAdam, 0.0), (WideAdam, 0.9)):
            row = {"check": make.__name__, "dtype": name_of(dtype), "beta1": f"beta1 {beta1:g}"}
            print_check(attempt(rows, row, partial(adam_check, make, dtype, beta1, shapes, device)))
        row = {"check": "norm", "dtype": name_of(dtype)}
        print_check(attempt(rows, row, partial(norm_check, dtype, shapes, device)))


def adam_check(
    make, dtype: torch.dtype, beta1: float, shapes: list[tuple], device: torch.device, steps: int = 3
) -> dict:
    """All shapes by one optimizer, with clipping."""
    starts = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    gradients = [
        [torch.randn(shape, device=device).mul_(10.0**-step).to(dtype) for shape in shapes] for step in range(steps)
    ]

    def run(wanted: torch.dtype) -> list[Tensor]:
        weights = [torch.nn.Parameter(start.to(wanted, copy=True)) for start in starts]
        optimizer = make(weights, lr=0.01, betas=(beta1, 0.999), weight_decay=0.1)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.to(wanted, copy=True)
            optimizer.clip_factor = torch.full((), 0.7, device=device)
            optimizer.step()
        return [weight.detach() for weight in weights]

    found = run(dtype)
    with patch.object(triton_adam, "takes", lambda parameter: False):
        expected = run(torch.float64)  # so that the roundings are those of the kernel alone
    errors = {}
    for shape, one, other in zip(shapes, found, expected, strict=True):
        # The weight, what is added to it (0.01 times a quotient of up to about 8) and, where it is stored, the
        # quotient are rounded at each step.
        bound = torch.finfo(dtype).eps * (other.abs() + 0.01 * 8) + 0.01 * 2**-8 * (make is CompactAdam and beta1 > 0)
        errors[" x ".join(map(str, shape))] = ((one - other).abs() / (steps * bound)).max().item()
    same = all(map(torch.equal, found, run(dtype)))
    return {"errors": errors, "same_bits": same, "passed": max(errors.values()) <= 1 and same}


def norm_check(dtype: torch.dtype, shapes: list[tuple], device: torch.device) -> dict:
    """On a CPU of torch, as the package has it."""
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    norm = triton_adam.norm if has_kernels(device) else torch.nn.utils.get_total_norm
    found, wanted = norm(tensors), torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    error, same = ((found.double() - wanted).abs() / wanted).item(), torch.equal(found, norm(tensors))
    bound = 1e-6 if has_kernels(device) else 1e-2
    return {"errors": {"norm": error}, "same_bits": same, "passed": same and error <= bound}


def print_check(row: dict) -> None:
    if "errors" in row:
        named = ", ".join(str(value) for value in list(row.values())[: list(row).index("errors")])
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        bits = "same bits" if row["same_bits"] else "OTHER BITS"
        print(f"{'PASS' if row['passed'] else 'FAIL'}  {named}: {errors}; {bits}", flush=True)


def check_steps(rows: list, device: torch.device, tiny: bool) -> None:
    """All gradients of a step against the dense formula in float64 on the same selection."""
    for fn in ("batchtopk", "jumprelu", "topk", "relu"):
        for form in FORMATS:
            for dead in (0.0, 0.3):
                case = make_case(TINY if tiny else CHECKED, form, device, fn)
                row = {"check": fn, "format": form, "dead": f"dead {dead:g}"}
                print_check(attempt(rows, row, partial(step_check, case, dead)))
    for fn in ("batchtopk", "jumprelu"):
        case = replace(make_case(TINY if tiny else CHECKED, "float32", device, fn), decoder_reach=2)
        row = {"check": fn, "format": "float32", "dead": "dead 0.3", "reach": "reach 2"}
        print_check(attempt(rows, row, partial(step_check, case, 0.3)))


def step_check(case: Case, dead: float) -> dict:
    errors, same = step_errors(case, dead)
    exact = case.dtype == "float32" and case.autocast is None
    bounds = dict.fromkeys(errors, 1e-5 if exact else 2e-2)
    if "thresholds.value" in errors:  # an entry at the edge of the window is in or out
        bounds["thresholds.value"] = 1e-3 if exact else 5e-2
    passed = same and all(errors[name] <= bounds[name] for name in errors)
    return {"errors": errors, "bounds": bounds, "same_bits": same, "passed": passed}


def step_errors(case: Case, dead_share: float) -> tuple[dict[str, float], bool]:
    """Relative errors of the loss and of each kind of gradient, and whether a second step had the same bits."""
    clt = make_clt(case, None)
    inputs, labels = next(make_batches(case, None))
    dead = None
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.bias[:3] += 3  # hot: they fire on every token, and their gradients are long sums
        if dead_share:
            dead = torch.rand(case.num_layers, case.num_features, device=inputs.device) < dead_share
    autocast = partial(torch.autocast, inputs.device.type, torch.bfloat16, enabled=case.follows_autocast)

    def gradients():
        state = copy.deepcopy(clt)  # batchtopk's threshold moves
        with autocast():
            output = state(inputs, labels, dead=dead)
        return output, torch.autograd.grad(output.loss, list(state.parameters()), materialize_grads=True)

    (output, found), (other, again) = gradients(), gradients()
    revived = None
    if dead is not None and case.activation_fn in TOPK_FAMILY:
        x = clt.normalize_inputs(inputs)
        with autocast(), torch.no_grad():
            _, written = clt._encode(x, clt._blocks(x), True, dead)
        revived = [layer for block in written for layer in block.halves()[1].by_layer()]
    wide = copy.deepcopy(clt).double()
    loss = dense_loss(wide, inputs.double(), labels.double(), output.features.layers, dead, revived)
    wanted = torch.autograd.grad(loss, list(wide.parameters()), materialize_grads=True)
    errors = {"loss": relative(output.loss, loss)}
    for (name, _), a, b in zip(clt.named_parameters(), found, wanted, strict=True):
        kind = ".".join(name.split(".")[::2])
        errors[kind] = max(errors.get(kind, 0.0), relative(a, b))
    same = torch.equal(output.loss, other.loss) and all(map(torch.equal, found, again))
    return errors, same


def dense_loss(clt, x: Tensor, y: Tensor, layers: list[LayerFeatures], dead: Tensor | None, revived) -> Tensor:
    """
    The loss by the dense reference, on what was selected here: which of two nearly equal entries is taken is no error.

    Args:
        clt, x, y: In float64; inputs and labels (N, L, D).
        layers: What our step selected.
        dead: (L, F) bool; with `revived`, the entries that the auxiliary loss took, for the top-k family.
    """

    def activate(config, parameters, hidden):
        acts = []
        for s, (h, layer) in enumerate(zip(hidden, layers, strict=True)):
            acts.append(h * layer.dense((layer.values.detach() > 0).to(h.dtype)))
            if config.activation_fn == "jumprelu":
                theta, width = clt.thresholds[s](), config.jumprelu_bandwidth
                inside = ((h - theta).abs() < width / 2) * layer.dense(torch.ones_like(layer.values, dtype=h.dtype))
                acts[s] = acts[s] - (theta / width * inside).detach() * (theta - theta.detach())
        return acts

    def revive(config, hidden, dead):
        chosen = [layer.dense(torch.ones_like(layer.values, dtype=x.dtype)) for layer in revived]
        return [h.relu() * mask for h, mask in zip(hidden, chosen, strict=True)]

    return dense_losses_of(clt, x, y, dead=dead, activate=activate, revive=revive)["loss"]


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=300, help="seconds for all pieces (default 300)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="only pieces that begin so")
    gpu_report.add_options(parser, "gpu_check.json")
    options = parser.parse_args(argv)
    device, tiny = gpu_report.device_of(options), options.tiny
    command = ["python", "-m", "benchmarks.gpu_check", *(sys.argv[1:] if argv is None else argv)]
    report = gpu_report.Report(options.json, command, device, options.budget, options.only)

    def piece(name, about, work, *arguments):
        report.piece(name, 1 if tiny else about, lambda rows: work(rows, *arguments))

    shapes = {name: TINY if tiny else shape for name, shape in SHAPES.items()}
    piece("layers", 40, check_layers, device, tiny)
    piece("rows", 4, check_rows, device, tiny)
    piece("selection", 12, check_selection, device, tiny)
    piece("adam", 6, check_adam, device, tiny)
    piece("steps", 15, check_steps, device, tiny)
    piece("rates", 4, time_rates, make_case(shapes["A"], "autocast", device), tiny)
    works = {"phases": time_phases, "constants": time_constants}
    for kind, name, form, about in TIMED:
        case = make_case(shapes[name], form, device, dead=0.3 if kind == "dead" else 0.0)
        if kind in works:
            piece(f"{kind} {name} {form}", about, works[kind], case)
        else:
            title = f"update {name} {form}" + (" dead 0.3" if kind == "dead" else "")
            piece(title, about, time_updates, case, 2 if tiny else 6)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
