"""
What the phases of an update cost on a GPU, with other constants of their kernels too, and whole updates beside dense
ones: the timings of gpu_check.py. Phases are timed over all layers at once, as an update goes through them.
"""

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from hf_clt.estimate import Plan, memory
from hf_clt.kernels import decode as decode_module
from hf_clt.kernels import triton_adam, triton_layers, triton_select
from hf_clt.kernels.decode import output_rows, squared_norms
from hf_clt.kernels.encode import encode_layers, input_rows, pre_activations_at
from hf_clt.losses import reconstruction_loss
from hf_clt.selection import features_above, positions_topk, select
from hf_clt.sparsity import LayerFeatures, activate, features_at, join
from hf_clt.training.optimizers import clip_grad_norm

from . import gpu_report, phases
from .cases import Case
from .gpu_report import attempt
from .machine import device_name, measure_rates, memory_in_use, peak_memory, reset_peak_memory, synchronize
from .measure import Clock, make_batches
from .update import Update


TOP, TOP_OF_PHASE = 12, 4  # kernels that are shown
NEVER = 10**9
# Other constants that are tried: of each phase the module, the names, and what they are set to.
TRIED = {
    "decode": [
        (triton_layers, ("DECODE_BYTES", "DECODE_ENTRIES"), [(512, 4), (512, 2), (512, 8), (256, 4), (1024, 4)]),
        (decode_module, ("ROUND_ABOVE",), [(0,), (NEVER,)]),
    ],
    "gradients of decoders": [
        (
            triton_layers,
            ("POSTING_BYTES", "POSTING_ENTRIES"),
            [(1024, 4), (1024, 2), (1024, 8), (512, 2), (512, 4), (512, 8), (2048, 2), (2048, 4)],
        ),
        (triton_layers, ("POSTING_SPLIT",), [(64,), (256,)]),
    ],
    "gradients of encoders": [
        (triton_layers, ("POSTING_BYTES", "POSTING_ENTRIES"), [(1024, 4), (1024, 8), (512, 4), (512, 8), (2048, 2)])
    ],
    "values": [
        (triton_layers, ("POSTING_BYTES", "POSTING_ENTRIES"), [(1024, 4), (1024, 8), (512, 4), (512, 8), (2048, 2)])
    ],
    "selection": [
        (triton_select, ("MAXIMA_GROUPS",), [(128,), (256,), (512,)]),
        (triton_select, ("HISTOGRAM_GROUPS",), [(32,), (64,), (128,)]),
        (triton_select, ("MARK_GROUPS",), [(128,), (256,), (512,)]),
    ],
    "selection, above one per feature": [
        (triton_select, ("ABOVE_ROWS", "ABOVE_WORDS"), [(4, 64), (1, 64), (2, 64), (4, 32), (8, 32), (1, 128)]),
    ],
    "selection, k of each row": [
        (triton_select, ("TOPK_COLUMNS", "TOPK_WORDS", "TOPK_WARPS"),
         [(1024, 64, 4), (1024, 32, 4), (1024, 128, 4), (2048, 128, 4), (2048, 128, 8), (512, 64, 2), (512, 128, 4)])
    ],
    "clipping": [
        (triton_adam, ("SQUARES_ELEMENTS", "SQUARES_BLOCK", "SQUARES_WARPS"),
         [(65_536, 4096, 8), (16_384, 4096, 8), (65_536, 2048, 4), (16_384, 2048, 4), (262_144, 4096, 8)])
    ],
    "update": [
        (triton_adam, ("WIDE_ELEMENTS", "WIDE_BLOCK", "WIDE_WARPS"),
         [(4096, 1024, 4), (4096, 2048, 8), (16_384, 1024, 4), (2048, 512, 2), (4096, 2048, 4)]),
        (triton_adam, ("ADAM_COLUMNS", "ADAM_PER_WARP"),
         [(4096, 512), (1024, 512), (2048, 512), (2048, 256), (8192, 512), (4096, 256)]),
    ],
}  # fmt: skip


# -- the machine ------------------------------------------------------------------------------------------------------


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
        print(f"{name:64}{spent:10.3f} ms" + (f"{rates[unit]:9.3f} {unit} for {needed}" if needed else ""), flush=True)
        return {"ms": spent, "bytes": size, "flops": flops, **rates}

    attempt(rows, {"name": name}, timed)


def time_rates(rows: list, case: Case, tiny: bool) -> None:
    """What the machine reaches: copies, products, and [`measure_rates`]."""
    device = torch.device(case.device)
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
    rows.append({"name": "rates", **measure_rates(case, *((2**16, 0.001) if tiny else (2**30, 0.2)))})
    print(", ".join(f"{name} {rate / 1e12:.3f} T/s" for name, rate in rows[-1].items() if name != "name"))


# -- phases -----------------------------------------------------------------------------------------------------------


def time_phases(rows: list, case: Case) -> None:
    """
    Each phase over all layers, beside what benchmarks/phases.py models for it. Features fire equally often; then one
    of each layer fires on every token; then as unequally as those of a trained CLT.
    """
    works = phase_works(case, random_block(case))
    for name in list(works):
        time_phase(rows, case, name, *works.pop(name), profiled=True)
    del works
    for title, options in (("one hot", {"hot": 1}), ("uneven", {"hot": 3, "uneven": True})):
        entries = random_block(case, **options)
        longest = int(entries.by_feature[1].diff().max())
        print(f"{title}: the longest posting list has {longest} of {case.tokens} tokens", flush=True)
        works = phase_works(case, entries, parts=("decode", "gradients of decoders", "gradients of encoders"))
        listed = replace(case, l0=max(1, round(entries.indices.numel() / case.tokens / case.num_layers)))
        for name in list(works):
            time_phase(rows, listed, f"{name}, {title}", *works.pop(name))


def time_phase(rows: list, case: Case, name: str, phase: str | None, work: Callable, profiled: bool = False) -> None:
    """Milliseconds of a phase with the share that is modelled for it, and on demand its longest kernels."""
    device = torch.device(case.device)
    counts = modelled_counts(case).get(phase, {})
    size = counts.get("memory", 0) + counts.get("cache", 0)
    add_timing(rows, device, name, work, size, counts.get("product", 0))
    row = rows[-1]
    if "ms" not in row:
        return
    if counts:
        row["modelled_ms"] = phases.milliseconds(counts, rates_of(device))
        row["share"] = row["modelled_ms"] / row["ms"]
        print(f"    modelled {row['modelled_ms']:.3f} ms, {row['share']:.0%} of what it takes", flush=True)
    if profiled:
        with gpu_report.make_profiler(device) as profiler:
            work()
            synchronize(device)
        row |= gpu_report.profile_figures(profiler, device, 1, TOP)
        if device.type == "cuda":
            print(f"    {row['launches']:.0f} launches, kernels {row['busy_ms']:.3f} ms")
            gpu_report.print_kernels(row["kernels"][:TOP_OF_PHASE])


def modelled_counts(case: Case) -> dict[str, dict[str, float]]:
    """Bytes and operations of each phase, as the kernels are written."""
    weight = getattr(torch, case.dtype).itemsize
    return phases.phases(case, weight, 2 if case.optimizer == "adam_compact" else 8, layer_by_layer=False)


def rates_of(device: torch.device) -> dict[str, float]:
    return phases.RATES["H200" if "H200" in device_name(str(device)) else "H100"]


def phase_works(case: Case, entries: LayerFeatures, parts: tuple[str, ...] = ("",)) -> dict[str, tuple]:
    """
    What is timed: of each name, if it begins with one of `parts`, the phase that it is and a call, which goes through
    that phase as an update does, on these entries of all layers. What the memory has no room for is left out.
    """
    free, device = free_bytes(case.device), torch.device(case.device)
    update = Update(case)
    clt, optimizer = update.clt, update.optimizer
    (x, y), layers = next(make_batches(case, None)), range(case.num_layers)
    blocks = clt._blocks(x)
    is_together = len(blocks) == 1
    own = [entries] if is_together else entries.by_layer()
    leaves = [some.with_values(some.values.clone().requires_grad_()) for some in own]
    rough = [some.with_values(some.values.bfloat16()) for some in own]
    decoders, encoders = ([m.weight for m in modules] for modules in (clt.decoders, clt.encoders))

    def autocast(work: Callable) -> Callable:
        def call():
            with torch.autocast(device.type, torch.bfloat16, enabled=case.follows_autocast):
                return work()

        return call

    def encode() -> list[Tensor]:
        if not is_together:
            return [clt.encoders[s](x[:, s]) for s in layers]
        (block,) = clt._blocks(x)  # stacks their weights
        return [encode_layers(x, block.weight, block.bias)]

    def values(of: list[LayerFeatures]) -> list[LayerFeatures]:
        return [
            pre_activations_at(x[:, block.layers], block.weight, block.bias, some)
            for block, some in zip(blocks, of, strict=True)
        ]

    def gradients(output: Callable, inputs: list[Tensor]) -> Callable:
        """The backward pass of what a forward pass gives, its gradient of random numbers."""
        outputs = autocast(output)()
        given = [torch.randn_like(out) for out in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, given, retain_graph=True)

    def lists() -> list[LayerFeatures]:
        """Rows, their places, the order by feature, activations: most of the operators on lists."""
        found = [LayerFeatures(f.values, f.indices, f.offsets, f.num_features, f.num_layers) for f in own]
        for some in found:
            _ = input_rows(some), output_rows(some), some.by_feature
        return [activate(some, 0.0, clt.config, True) for some in found]

    def losses() -> Callable:
        leaf = y.float().requires_grad_()
        return lambda: torch.autograd.grad(reconstruction_loss(clt.normalize_targets(y), leaf), [leaf])

    def squares() -> list[Tensor]:
        if device.type == "cuda":
            return [triton_layers.square_sums(decoders)]
        return [squared_norms(w.flatten(1)) for w in decoders]

    def rounding() -> list[Tensor]:
        if device.type == "cuda":
            return triton_layers.rounded(decoders, torch.bfloat16)
        return [w.bfloat16() for w in decoders]

    works = {}

    def add(name: str, phase: str | None, make: Callable[[], Callable]) -> None:
        if name.startswith(parts):
            works[name] = phase, make()

    with torch.no_grad():
        h = autocast(encode)()
        cuts = [some.values.view(some.num_layers, -1).amin(dim=1).float() for some in selected(h, case)]
    wide = [cut[:, None].expand(-1, case.num_features).flatten() for cut in cuts]

    def above(lower: list) -> Callable:
        return lambda: [features_above(*pair, len(cut)) for *pair, cut in zip(h, lower, cuts, strict=True)]

    quiet = torch.no_grad()
    add("encoders", "encoders", lambda: quiet(autocast(encode)))
    add("selection", "selection", lambda: partial(selected, h, case))
    add("selection, k of each row", "selection", lambda: lambda: [positions_topk(some, case.l0) for some in h])
    add("selection, above one per layer", "selection", lambda: above(cuts))
    add("selection, above one per feature", "selection", lambda: above(wide))
    add("lists of entries", "lists of entries", lambda: lists)
    add("values", "values", lambda: quiet(autocast(partial(values, rough))))
    add("decode", "decode", lambda: quiet(autocast(lambda: clt._decode(own, None)[0])))
    if case.dtype == "float32":
        add("rounding", None, lambda: rounding)
    add("square sums", None, lambda: quiet(squares))
    add("losses", "losses", losses)
    outputs = [leaf.values for leaf in leaves]
    add("gradients of decoders", "gradients of decoders",
        lambda: gradients(lambda: [clt._decode(leaves, None)[0]], [*outputs, *decoders]))  # fmt: skip
    add("gradients of encoders", "gradients of encoders",
        lambda: gradients(lambda: [some.values for some in values(own)], encoders))  # fmt: skip
    if bytes_needed(case, "ours") > free:
        print(f"clipping and update: left out, {free / 1e9:.0f} GB are free", flush=True)
        return works

    def with_gradients(work: Callable) -> Callable:
        for parameter in clt.parameters():
            if parameter.grad is None:
                parameter.grad = torch.randn_like(parameter)
        return work

    add("clipping", "clipping", lambda: with_gradients(lambda: clip_grad_norm(clt, optimizer, 1.0)))
    add("update", "update", lambda: with_gradients(optimizer.step))
    return works


def selected(h: list[Tensor], case: Case) -> list[LayerFeatures]:
    """batchtopk's selection, of all layers at once or of one after another."""
    return [select(some, 0.0, case.config(), case.l0, True, len(some) // case.tokens) for some in h]


def random_block(case: Case, hot: int = 0, uneven: bool = False) -> LayerFeatures:
    """
    Random entries of all layers: each feature fires as often as any other; or, `uneven`, a quarter never, the others
    about as often as a log-normal number says. The `hot` first ones fire on every token.
    """
    layers = []
    for _ in range(case.num_layers):
        rates = torch.ones(case.num_features, device=case.device)
        if uneven:
            rates = torch.exp(1.5 * torch.randn_like(rates)) * (torch.rand_like(rates) > 0.25)
        rates *= case.l0 / rates.sum()
        rates[:hot] = 1
        fires = torch.rand(case.tokens, case.num_features, device=case.device)
        layers.append(features_at(1 - fires, fires < rates))
    return join(layers)


def time_constants(rows: list, case: Case) -> None:
    """Phases with other constants of their kernels (on a CPU none is used), and how many reads pay for rounding."""
    works = phase_works(case, random_block(case))
    for phase, settings in TRIED.items():
        for module, names, choices in settings:
            is_other = phase == "update" and ("ADAM_COLUMNS" in names) != (case.optimizer == "adam_compact")
            if phase not in works or is_other or ("ROUND_ABOVE" in names and "rounding" not in works):
                continue
            for choice in choices:
                chosen = dict(zip(names, choice, strict=True))
                named = ", ".join(f"{name} {value}" for name, value in chosen.items())
                now = " (now)" if all(getattr(module, name) == value for name, value in chosen.items()) else ""
                with patch.multiple(module, **chosen):
                    add_timing(rows, torch.device(case.device), f"{phase}: {named}{now}", works[phase][1])
                rows[-1] |= {"phase": phase, "constants": chosen, "now": bool(now)}
    if "rounding" in works:
        add_timing(rows, torch.device(case.device), "rounding", works["rounding"][1])
        rows.append({"name": "reads of a row that pay for rounding", "reads": break_even(rows, case)})
        print(f"{rows[-1]['name']}: {rows[-1]['reads']:.1f}; ROUND_ABOVE is {decode_module.ROUND_ABOVE}", flush=True)


def break_even(rows: list, case: Case) -> float:
    """Reads of a decoder row at which rounding all rows first takes as long as it saves."""
    found = {row["name"].removesuffix(" (now)"): row.get("ms", float("nan")) for row in rows}
    rounding = found["rounding"]
    saved = found[f"decode: ROUND_ABOVE {NEVER}"] - (found["decode: ROUND_ABOVE 0"] - rounding)
    return case.tokens * case.l0 / case.num_features * rounding / saved if saved > 0 else float("inf")


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
            f"{found['host_ms']:.2f}; {found['launches']:.0f} launches, kernels {found['busy_ms']:.2f} ms, none in "
            f"{found['idle_ms']:.2f}; peak {(found['peak_bytes'] or 0) / 1e9:.2f} GB; waits {found['waits'] or 'none'}"
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
    result["idle_ms"] = max(0.0, result["update_ms"] - result["busy_ms"])
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


__all__ = ["bytes_needed", "free_bytes", "time_constants", "time_phases", "time_rates", "time_updates"]
