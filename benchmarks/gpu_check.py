"""
Whether hf_clt is right on this GPU, and what each part of a training step costs there: `make gpu-check`, four minutes.

The pieces come in the order of their importance: kernels and whole steps against float64, the rates of the machine,
the parts of a step, and updates of ours beside dense ones. What does not fit into the budget is skipped, and said.
"""

import argparse
import copy
import gc
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_clt.command import one_line_errors
from hf_clt.configuration_clt import TOPK_FAMILY
from hf_clt.estimate import Plan, memory
from hf_clt.kernels import rows as rows_module
from hf_clt.kernels import triton_adam, triton_rows, triton_select
from hf_clt.selection import largest_dead, positions_batchtopk, positions_topk
from hf_clt.sparsity import LayerFeatures, features_at, true_positions
from hf_clt.training.optimizers import CompactAdam

from . import gpu_report
from .cases import Case
from .crossover import random_entries
from .dense_reference import dense_losses_of
from .gpu_report import attempt
from .machine import measure_rates, memory_in_use, peak_memory, reset_peak_memory, synchronize
from .measure import Clock, make_batches, make_clt
from .update import Update


SHAPES = {  # L, D, F, N, k
    "A": (12, 768, 24576, 4096, 32),
    "A200": (12, 768, 24576, 4096, 200),
    "B": (30, 576, 8192, 4096, 32),
    "C": (26, 2304, 16384, 4096, 50),
}
CHECKED, TINY = (4, 256, 8192, 1024, 16), (3, 16, 256, 64, 4)
FORMATS = {
    "float32": {},
    "autocast": {"autocast": "bfloat16"},
    "bfloat16": {"autocast": "bfloat16", "dtype": "bfloat16", "optimizer": "adam_compact"},
}
# Shape, format, and about how many seconds ours and the dense side take, and ours with dead features.
UPDATES = [("A", "autocast", 8, 5), ("B", "autocast", 10, 8), ("A", "bfloat16", 10, 6), ("C", "bfloat16", 20, 18),
           ("A200", "autocast", 8, 5), ("B", "bfloat16", 12, 8), ("A200", "bfloat16", 10, 6)]  # fmt: skip
# Entries and columns at a time and warps of a program of posting_dots.
POSTINGS = ((4, 512, 1), (2, 512, 1), (8, 512, 1), (4, 256, 1), (4, 512, 2), (4, 1024, 1), (4, 1024, 2), (4, 2048, 4))
TOPKS = ((1024, 4), (2048, 4), (4096, 8))  # columns at a time and warps of a program
SPLITS = (32, 64, 128, 256, 512, 2**30)  # entries of a posting list that one program takes
ADAM_BLOCKS = [(1024, 256), (1024, 512), (2048, 256), (2048, 512), (4096, 256), (4096, 512), (8192, 512)]
TOP = 12  # kernels that are shown


def make_case(shape: tuple, form: str, device: torch.device, fn: str = "batchtopk", dead: float = 0.0) -> Case:
    L, D, num_features, N, k = shape
    return Case(L, D, num_features, N, k, fn, dead=dead, device=str(device), **FORMATS[form])


# -- is it right ------------------------------------------------------------------------------------------------------


def check_kernels(rows: list, device: torch.device, tiny: bool) -> None:
    """The sums and dot products of gathered rows against their formulas in float64, element by element."""
    on_gpu = device.type == "cuda"
    kernels = triton_rows if on_gpu else rows_module
    entry_dots = dots_by_posting if on_gpu else dots_by_row
    print("the Triton kernels" if on_gpu else "the CPU's ways in kernels/rows.py: Triton's kernels do not run here")
    shapes = [(1024, 8192, 32, 9216), (4096, 24576, 32, 768), (777, 1000, 5, 300), (64, 100, 3, 7)]
    torch.manual_seed(0)
    for num_tokens, num_features, k, columns in shapes[2 if tiny else 0 :]:
        support = torch.rand(num_tokens, num_features, device=device) < k / num_features
        support[:, :3], support[0], support[:, 5] = True, False, False  # hot features; nothing on a token; never
        values = F.dropout(torch.randn(num_tokens, num_features, device=device), 0.2)  # zero weights
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if on_gpu else (torch.float32, torch.bfloat16):
            entries = features_at(values.to(dtype), support)
            tokens, indices, offsets = entries.rows, entries.indices, entries.offsets
            decoder = torch.randn(num_features, columns, device=device, dtype=dtype)
            grad = torch.randn(num_tokens, columns, device=device, dtype=dtype)
            wide, wide_grad, acts = decoder.double(), grad.double(), entries.values.double()
            dense = entries.dense(acts)
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
                "row_dots": (partial(kernels.row_dots, grad, tokens, decoder, indices), *dots),
                "entry_dots": (partial(entry_dots, grad, decoder, entries), *dots),
                "transposed_row_sums": (
                    partial(kernels.transposed_row_sums, grad, entries, entries.values),
                    dense.T @ wide_grad,
                    dense.abs().T @ wide_grad.abs(),
                ),
            }
            for name, given in checks.items():
                shape = {"tokens": num_tokens, "features": num_features, "columns": columns}
                row = {"check": name, "dtype": str(dtype).removeprefix("torch."), **shape}
                print_check(attempt(rows, row, partial(kernel_check, *given)))


def dots_by_posting(left: Tensor, right: Tensor, entries: LayerFeatures) -> Tensor:
    """What `entry_dots` does on a GPU, whatever the density."""
    dots = triton_rows.posting_dots(left, right, entries)
    return torch.empty_like(dots).index_copy_(0, entries.by_feature[0], dots)


def dots_by_row(left: Tensor, right: Tensor, entries: LayerFeatures) -> Tensor:
    """The same by `row_dots`, as it was done before."""
    order, _ = entries.by_feature
    dots = rows_module.row_dots(left, entries.rows[order], right, entries.indices[order])
    return torch.empty_like(dots).index_copy_(0, order, dots)


def kernel_check(work: Callable[[], Tensor], wanted: Tensor, terms: Tensor) -> dict:
    """The largest error as a share of its bound: one rounding of the result, and sums in float32."""
    found = work()
    rounding = torch.finfo(found.dtype).eps / 2
    bound = rounding * (wanted.abs() + torch.finfo(found.dtype).tiny) + 1e-6 * terms
    error = ((found.double() - wanted).abs() / bound).max().item()
    same = torch.equal(found, work())
    return {"errors": {"of the bound": error}, "same_bits": same, "passed": error <= 1 and same}


def check_topk(rows: list, device: torch.device, tiny: bool) -> None:
    """The k largest of each row, to the position, beside a stable sort, which takes the first of equal entries."""
    shapes = [(4096, 24576, 32), (4096, 24576, 200), (777, 1000, 5), (64, 256, 4)]
    for num_tokens, num_features, k in shapes[3 if tiny else 0 :]:
        for dtype in (torch.float32, torch.bfloat16):
            row = {"check": "positions_topk", "dtype": str(dtype).removeprefix("torch.")}
            row |= {"shape": (num_tokens, num_features, k)}
            print_check(attempt(rows, row, partial(topk_check, dtype, num_tokens, num_features, k, device)))


def topk_check(dtype: torch.dtype, num_tokens: int, num_features: int, k: int, device: torch.device) -> dict:
    values = torch.randn(num_tokens, num_features, device=device).to(dtype)
    values[::2, ::3] = -torch.inf  # as of features that are not dead
    found = positions_topk(values, k)
    columns = values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    wanted = columns + num_features * torch.arange(num_tokens, device=device)[:, None]
    wanted = wanted.flatten()
    if device.type != "cuda":  # where it is not said which of equal entries are taken
        found, wanted = (values.flatten()[places].view(num_tokens, k).sort().values for places in (found, wanted))
    other = (found != wanted).sum().item()
    same = torch.equal(positions_topk(values, k), positions_topk(values, k))
    return {"errors": {"other entries": other}, "same_bits": same, "passed": other == 0 and same}


def check_adam(rows: list, device: torch.device) -> None:
    """Three steps of CompactAdam's kernel beside the plain code on weights and gradients in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1000, 9216), (100, 59904), (777, 300), (64, 7), (5000,)):
            for beta1 in (0.9, 0.0):
                row = {"check": "adam_step", "dtype": str(dtype).removeprefix("torch."), "shape": shape}
                row["beta1"] = f"beta1 {beta1:g}"
                print_check(attempt(rows, row, partial(adam_check, dtype, shape, beta1, device)))


def adam_check(dtype: torch.dtype, shape: tuple, beta1: float, device: torch.device, steps: int = 3) -> dict:
    start = torch.randn(shape, device=device).to(dtype)
    gradients = [torch.randn(shape, device=device).mul_(10.0**-step).to(dtype) for step in range(steps)]

    def run(wanted: torch.dtype) -> Tensor:
        weight = torch.nn.Parameter(start.to(wanted, copy=True))
        optimizer = CompactAdam([weight], lr=0.01, betas=(beta1, 0.999), weight_decay=0.1)
        for gradient in gradients:
            weight.grad = gradient.to(wanted)
            optimizer.step()
        return weight.detach()

    found = run(dtype)
    with plain_adam():
        expected = run(torch.float32)
    # The weight, what is added to it (0.01 times a quotient of up to about 8) and, where it is stored, the quotient
    # are rounded at each step.
    bound = steps * (torch.finfo(dtype).eps * (expected.abs() + 0.01 * 8) + 0.01 * 2**-8 * (beta1 > 0))
    error = ((found - expected).abs() / bound).max().item()
    same = torch.equal(found, run(dtype))
    return {"errors": {"of the bound": error}, "same_bits": same, "passed": error <= 1 and same}


def plain_adam():
    """A context in which CompactAdam's step is the plain code, in torch's operators."""
    return patch.object(triton_adam, "takes", lambda parameter: False)


def print_check(row: dict) -> None:
    if "errors" in row:
        named = ", ".join(str(value) for value in list(row.values())[: list(row).index("errors")])
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        bits = "same bits" if row["same_bits"] else "OTHER BITS"
        print(f"{'PASS' if row['passed'] else 'FAIL'}  {named}: {errors}; {bits}", flush=True)


def check_steps(rows: list, device: torch.device, tiny: bool) -> None:
    """All gradients of a step against the dense formula in float64 on the same selection."""
    for fn in ("topk", "batchtopk", "jumprelu", "relu"):
        for form in FORMATS:
            for dead in (0.0, 0.3):
                case = make_case(TINY if tiny else CHECKED, form, device, fn)
                row = {"check": fn, "format": form, "dead": f"dead {dead:g}"}
                print_check(attempt(rows, row, partial(step_check, case, dead)))


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
        with autocast(), torch.no_grad():
            hidden = [encoder(inputs[:, s]) for s, encoder in enumerate(clt.encoders)]
        revived = [largest_dead(h, dead[s : s + 1], clt.config.aux_k) for s, h in enumerate(hidden)]
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


# -- what the parts cost ----------------------------------------------------------------------------------------------


def add_timing(rows: list, device: torch.device, name: str, work, size: float = 0, flops: float = 0) -> None:
    """Median milliseconds of a call, beside the bytes or the operations that it needs."""

    def timed() -> dict:
        clock = Clock(device)
        for _ in range(10):
            clock.mark()
            work()
        spent = 1000 * median(clock.seconds()[2:])
        rates = {"TB/s": size / spent / 1e9, "TFLOP/s": flops / spent / 1e9}
        needed = f"{size / 1e9:.3f} GB" if size else f"{flops / 1e12:.4f} TFLOP" if flops else ""
        unit = "TB/s" if size else "TFLOP/s"
        print(f"{name:44}{spent:10.3f} ms" + (f"{rates[unit]:9.3f} {unit} for {needed}" if needed else ""), flush=True)
        return {"ms": spent, "bytes": size, "flops": flops, **rates}

    attempt(rows, {"name": name}, timed)


def time_rates(rows: list, device: torch.device, tiny: bool) -> None:
    """What the machine reaches: copies, products, and [`measure_rates`] at shape A."""
    data = torch.empty(2**16 if tiny else 2**30, dtype=torch.uint8, device=device)
    copied, n = torch.empty_like(data), 64 if tiny else 8192
    add_timing(rows, device, "copy", lambda: copied.copy_(data), 2 * data.numel())
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, before),
        ("TF32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
    ):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        torch.set_float32_matmul_precision(precision)
        try:
            add_timing(rows, device, f"product {n}^3 in {name}", lambda a=a, b=b: a @ b, 0, 2 * n**3)
        finally:
            torch.set_float32_matmul_precision(before)
    case = make_case(TINY if tiny else SHAPES["A"], "autocast", device)
    rows.append({"name": "rates", **measure_rates(case, *((2**16, 0.001) if tiny else (2**30, 0.2)))})
    print(", ".join(f"{name} {rate / 1e12:.3f} T/s" for name, rate in rows[-1].items() if name != "name"))


def time_parts(rows: list, device: torch.device, shape: tuple) -> None:
    """The parts of the first source layer's step, in bfloat16: it writes to all layers."""
    L, D, num_features, N, k = shape
    C, form = L * D, {"device": device, "dtype": torch.bfloat16}
    add = partial(add_timing, rows, device)
    x, weight = torch.randn(N, D, **form), torch.randn(num_features, D, **form)
    bias = torch.zeros(num_features, **form)
    add("encoder product", lambda: F.linear(x, weight, bias), 0, 2 * N * num_features * D)
    h = F.linear(x, weight, bias)
    cut = h[:16].float().flatten().kthvalue(16 * (num_features - k)).values
    add("positions_topk", lambda: positions_topk(h, k), 2 * h.numel())
    with patch.object(triton_select, "takes", lambda values: False):
        add("positions_topk, in torch's operators", lambda: positions_topk(h, k), 2 * h.numel())
    if device.type == "cuda":
        for columns, warps in TOPKS:
            with patch.multiple(triton_select, TOPK_COLUMNS=columns, TOPK_WARPS=warps):
                add(f"    {columns} columns, {warps} warps", lambda: positions_topk(h, k), 2 * h.numel())
    wide = h.float()
    add("positions_topk, float32", lambda: positions_topk(wide, k), 4 * h.numel())
    with patch.object(triton_select, "takes", lambda values: False):
        add("positions_topk, float32, in torch's operators", lambda: positions_topk(wide, k), 4 * h.numel())
        # The largest of the whole batch in two rounds, as of one long row.
        add("positions_batchtopk, in groups", lambda: positions_topk(h.flatten()[None], k * N), 2 * h.numel())
    add("torch.topk", lambda: h.topk(k, dim=1, sorted=False), 2 * h.numel())
    add("positions_batchtopk", lambda: positions_batchtopk(h, k * N), 2 * h.numel())
    add("true_positions of h > cut", lambda: true_positions(h > cut), 2 * h.numel())
    found = random_entries(N, num_features, k / num_features, str(device))
    entries = found.with_values(found.values.to(torch.bfloat16))
    values, bags = entries.values, (entries.indices, entries.offsets)
    listed = values.numel()
    add("order by feature", lambda: LayerFeatures(values, *bags, num_features).by_feature, 2 * 8 * listed)
    decoder, grad = torch.randn(num_features, C, **form), torch.randn(N, C, **form)
    gathered, batch = 2 * listed * C, 2 * N * C
    add("row_sums (decode)", lambda: rows_module.row_sums(decoder, *bags, values), gathered + batch)
    add("decode, dense", lambda: entries.to_dense() @ decoder, 0, 2 * N * num_features * C)
    add("entry_dots", lambda: rows_module.entry_dots(grad, decoder, entries), gathered)
    transposed = rows_module.transposed_row_sums
    add("transposed_row_sums, decoder", lambda: transposed(grad, entries, values), gathered + 2 * decoder.numel())
    add("transposed_row_sums, encoder", lambda: transposed(x, entries, values), 2 * (listed * D + weight.numel()))


def time_variants(rows: list, device: torch.device, shape: tuple) -> None:
    """
    The sums and dot products along posting lists of the first source layer, with other settings of the kernels than
    theirs, in both formats; features fire equally often, and as unequally as those of a trained CLT.
    """
    L, D, num_features, N, k = shape
    even, uneven = random_entries(N, num_features, k / num_features, str(device)), uneven_entries(device, shape)
    for title, found in (("even", even), ("uneven", uneven)):
        print(
            f"{title}: the longest posting list has {int(found.by_feature[1].diff().max())} of {N} tokens", flush=True
        )
        for dtype in (torch.bfloat16, torch.float32):
            entries = found.with_values(found.values.to(dtype))
            C, bytes_of, listed = L * D, dtype.itemsize, found.values.numel()
            x, grad = (torch.randn(N, width, device=device, dtype=dtype) for width in (D, C))
            form = f"{title}, {str(dtype).removeprefix('torch.')}"
            sums = partial(rows_module.transposed_row_sums, grad, entries, entries.values)
            short = partial(rows_module.transposed_row_sums, x, entries, entries.values)
            for split in SPLITS:
                with patch.object(triton_rows, "SPLIT", split):
                    size = bytes_of * C * (listed + num_features)
                    add_timing(rows, device, f"sums, {form}, split {split}", sums, size)
            decoder = torch.randn(num_features, C, device=device, dtype=dtype)
            dots = partial(rows_module.entry_dots, grad, decoder, entries)
            least = bytes_of * C * (listed + num_features)  # each row of the decoder once
            before = partial(dots_by_row, grad, decoder, entries)
            add_timing(rows, device, f"dots, {form}, row_dots", before, 2 * bytes_of * C * listed)
            for number, columns, warps in POSTINGS:
                names = {"POSTING_ENTRIES": number, "POSTING_COLUMNS": columns, "POSTING_WARPS": warps}
                with patch.multiple(triton_rows, **names):
                    add_timing(rows, device, f"dots, {form}, {number} x {columns}, {warps} warps", dots, least)
            add_timing(rows, device, f"sums, {form}, encoder", short, bytes_of * D * (listed + num_features))


def uneven_entries(device: torch.device, shape: tuple) -> LayerFeatures:
    """Three features on every token, a quarter on none, the others about as often as a log-normal number says."""
    _, _, num_features, N, k = shape
    rates = torch.exp(1.5 * torch.randn(num_features, device=device))
    rates[torch.rand(num_features, device=device) < 0.25] = 0
    rates *= k / rates.sum()
    rates[:3] = 1
    support = torch.rand(N, num_features, device=device) < rates
    return features_at(torch.rand(N, num_features, device=device), support)


def time_optimizers(rows: list, device: torch.device, shapes: dict) -> None:
    """
    An update of the first decoder and encoder in float32, and the clipping before it; CompactAdam's kernel beside the
    plain code and with other blocks, in both formats, and for the longest rows.
    """
    L, D, num_features, *_ = shapes["A"]
    wide, half = torch.float32, torch.bfloat16
    decoder, encoder = (num_features, L, D), (num_features, D)
    longest = shapes["C"][2], shapes["C"][0], shapes["C"][1]

    def add(name: str, make, size: tuple, dtype: torch.dtype, least: int) -> None:  # bytes per weight
        weight = torch.nn.Parameter(torch.randn(size, device=device, dtype=dtype))
        weight.grad = torch.randn_like(weight)
        work = partial(torch.nn.utils.clip_grad_norm_, [weight], 1.0) if make is None else make([weight]).step
        add_timing(rows, device, name, work, least * weight.numel())

    adam = partial(torch.optim.Adam, fused=True)
    add("Adam, fused", adam, decoder, wide, 28)
    add("clip_grad_norm_", None, decoder, wide, 12)
    add("Adam, fused, encoder", adam, encoder, wide, 28)
    for name, size, dtype, least in (
        ("CompactAdam", decoder, wide, 16),
        ("CompactAdam, encoder", encoder, wide, 16),
        ("CompactAdam, bfloat16", decoder, half, 10),
        ("CompactAdam, bfloat16, rows of C", longest, half, 10),
    ):
        add(name, CompactAdam, size, dtype, least)
        if size != longest:
            with plain_adam():
                add(f"{name}, plain", CompactAdam, size, dtype, least)
        if device.type != "cuda":
            continue
        for columns, per_warp in ADAM_BLOCKS:
            with patch.multiple(triton_adam, ADAM_COLUMNS=columns, ADAM_PER_WARP=per_warp):
                add(f"    {columns} columns, {per_warp} a warp", CompactAdam, size, dtype, least)


# -- ours beside a dense step -----------------------------------------------------------------------------------------


def time_updates(rows: list, case: Case, steps: int = 6) -> None:
    """Updates of ours and of the dense reference, one after the other; what the memory has no room for is left out."""
    row = {"case": case.to_dict()}
    rows.append(row)
    for side in ("ours", "dense") if case.dead == 0 else ("ours",):  # the dense side revives nothing
        needed, free = bytes_needed(case, side), free_bytes(case.device)
        if needed > free:
            row[side] = {"skipped": f"it needs about {needed / 1e9:.0f} GB, of {free / 1e9:.0f} GB that are free"}
            print(f"{side}: skipped, {row[side]['skipped']}", flush=True)
            continue
        row[side] = found = measure_side(case, side, steps)
        print(
            f"{side:5} {found['update_ms']:9.2f} ms ({found['tokens_per_second']:,.0f} tokens/s): forward "
            f"{found['forward']:.2f}, backward {found['backward']:.2f}, optimizer {found['optimizer']:.2f}; host "
            f"{found['host_ms']:.2f}; {found['launches']:.0f} launches, kernels {found['busy_ms']:.2f} ms; peak "
            f"{(found['peak_bytes'] or 0) / 1e9:.2f} GB; waits {found['waits'] or 'none'}"
        )
        if side == "ours":
            gpu_report.print_kernels(found["kernels"])
    if all("update_ms" in row.get(side, {}) for side in ("ours", "dense")):
        row["ratio"] = row["dense"]["update_ms"] / row["ours"]["update_ms"]
        print(f"ratio dense / ours {row['ratio']:.2f}", flush=True)


def bytes_needed(case: Case, side: str) -> int:
    formats = {"clt_dtype": case.dtype, "optimizer": case.optimizer if side == "ours" else "adam"}
    formats |= {"product_dtype": case.product_dtype, "dead": case.dead}
    plan = Plan(case.config(), batch_size=case.tokens, l0=case.l0, buffer_on_device=False, **formats)
    dense = 8 * case.tokens * case.num_features * case.num_layers  # pre-activations and activations of all layers
    return memory(plan)["total"] + (dense if side == "dense" else 0)


def free_bytes(device: str) -> float:
    if device == "cpu":
        return float("inf")
    gc.collect()
    torch.cuda.empty_cache()  # what the other side left
    return torch.cuda.mem_get_info(device)[0]


def measure_side(case: Case, side: str, steps: int) -> dict:
    """Milliseconds of an update and of its phases, and what a profiler and torch's watch on waits say of one."""
    device = torch.device(case.device)
    reset_peak_memory(device)
    before = memory_in_use(device)
    update, data, clocks = Update(case, side), make_batches(case, None), []
    for _ in range(2):
        update(*next(data))
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        clocks.append(Clock(device))
        update(*next(data), clocks[-1].mark)
    host = time.perf_counter() - begin  # until all was launched
    phases = [1000 * median(column) for column in zip(*(clock.seconds() for clock in clocks), strict=True)]
    peak = peak_memory(device)
    result = {"update_ms": sum(phases), **dict(zip(("forward", "backward", "optimizer"), phases, strict=True))}
    result |= {"host_ms": 1000 * host / steps, "tokens_per_second": 1000 * case.tokens / sum(phases)}
    result["peak_bytes"] = None if peak is None else peak - before
    batch = next(data)
    synchronize(device)
    with gpu_report.make_profiler(device) as profiler:
        update(*batch)
        synchronize(device)
    result |= gpu_report.profile_figures(profiler, device, 1, TOP)
    result["waits"] = waits(lambda: update(*batch)) if device.type == "cuda" else {}
    return result


def waits(update) -> dict[str, int]:
    """How often an update makes the host wait for the GPU, by line of code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = {}
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            place = f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    return places


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240, help="seconds for all pieces (default 240)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="only pieces that begin so")
    gpu_report.add_options(parser, "gpu_check.json")
    options = parser.parse_args(argv)
    device, tiny = gpu_report.device_of(options), options.tiny
    command = ["python", "-m", "benchmarks.gpu_check", *(sys.argv[1:] if argv is None else argv)]
    report = gpu_report.Report(options.json, command, device, options.budget, options.only)

    def piece(name, about, work, *arguments):
        report.piece(name, 1 if tiny else about, lambda rows: work(rows, *arguments))

    shapes = {name: TINY if tiny else shape for name, shape in SHAPES.items()}
    piece("kernels", 15, check_kernels, device, tiny)
    piece("topk", 4, check_topk, device, tiny)
    piece("adam", 5, check_adam, device)
    piece("steps", 12, check_steps, device, tiny)
    piece("rates", 4, time_rates, device, tiny)
    for name in ("A", "A200", "B"):
        piece(f"parts {name}", 5, time_parts, device, shapes[name])
    for name, about in (("A", 30), ("A200", 10), ("B", 8)):
        piece(f"variants {name}", about, time_variants, device, shapes[name])
    piece("optimizers", 20, time_optimizers, device, shapes)
    for name, form, *seconds in UPDATES:
        for dead, about in zip((0.0, 0.3), seconds, strict=True):
            case = make_case(shapes[name], form, device, dead=dead)
            title = f"update {name} {form}" + (f" dead {dead:g}" if dead else "")
            piece(title, about, time_updates, case, 2 if tiny else 6)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
