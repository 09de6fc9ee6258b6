"""
What an update does on a GPU, counted without one: operators, kernel launches, waits of the host, memory.

  python -m benchmarks.launches --json benchmarks/launches.json

An update (`benchmarks/update.py`) runs on fake tensors of a fake GPU, which have shapes but no values, and every
operator is recorded on its way. What it does not see: what happens inside an operator (workspace of a product or a
sort), the allocator's fragments, and time.

- **Launches**: one for each operator that computes, and for each Triton kernel; none for views and allocations. An
  operator over many tensors (fused Adam, clipping) starts one for each 320 pieces of 65,536 elements. Sorting,
  selecting and cumulative sums are several kernels each on a GPU, so this is the least.
- **Waits**: where the host has to know a value or a size that the GPU computes, or copies between the two. Operators
  for which nothing is made up below (a mask as index, `unique`) stop the count with an error of torch's.
- **Memory**: storages alive at once, in units of 512 bytes.

jumprelu and relu list features by values: here as many entries as `hf-clt estimate` assumes.
"""

import argparse
import ctypes
import json
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_clt.estimate import memory
from hf_clt.files import write_text
from hf_clt.kernels import triton_adam, triton_layers, triton_rows, triton_select

from .cases import Case
from .measure import PHASES
from .rates import plan_of
from .update import Update


ROOT = Path(__file__).resolve().parents[1]
OUR_FILES = tuple(str(ROOT / part) for part in ("hf_clt", "benchmarks/update.py"))
GPU, STAND_IN = torch.device("cuda", 0), torch.device("xla", 0)
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
PIECE, PIECES_AT_ONCE = 65_536, 320  # of torch's kernels over many tensors
READ_BY_HOST = {"_local_scalar_dense", "nonzero", "bincount"}
UNIT = 512  # bytes

SHAPES = {
    "gpt2": {"num_layers": 12, "d_model": 768, "num_features": 24_576, "l0": 32},
    "smollm2": {"num_layers": 30, "d_model": 576, "num_features": 8_192, "l0": 32},
    "gemma2": {"num_layers": 26, "d_model": 2_304, "num_features": 16_384, "l0": 50, "dtype": "bfloat16"},
}
ALL = ("topk", "batchtopk", "jumprelu", "relu")
ROWS = [
    {**SHAPES[shape], "activation_fn": activation_fn, "optimizer": optimizer, "dead": dead}
    for shape, activation_fns, optimizer in [
        ("gpt2", ALL, "adam"),
        ("gpt2", ["batchtopk"], "adam_compact"),  # an optimizer's launches are the same for all
        ("smollm2", ALL, "adam"),
        ("smollm2", ["batchtopk"], "adam_compact"),
        ("gemma2", ["batchtopk", "jumprelu"], "adam_compact"),
    ]
    for activation_fn in activation_fns
    for dead in (0.0, 0.3)
]


# -- a fake GPU -------------------------------------------------------------------------------------------------------


@contextmanager
def fake_gpu():
    """
    Lets fake tensors be on a GPU that torch was not built for. Python sees them there; torch's C++, whose autograd
    would ask a GPU for its streams, sees them on a device that has none but that CUDA's autocast takes as well.
    """
    library = next(Path(torch.__path__[0], "lib").glob("*c10.*"))
    guards = (ctypes.c_void_p * 20).in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    cuda, xla, meta = 1, 9, 14  # of torch's device types; the guard of meta tensors does nothing
    before = {device: guards[device] for device in (cuda, xla)}
    for device in before:
        guards[device] = guards[device] or guards[meta]
    try:
        with ExitStack() as stack:
            for name, value in {
                "torch.cuda.is_bf16_supported": lambda *args, **kwargs: True,
                "torch.cuda.device_of": lambda tensor: nullcontext(),
                "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
                "torch.utils._foreach_utils._foreach_supported_types": [FakeTensor, torch.Tensor],
                "benchmarks.cases.chosen_device": torch.device,
            }.items():
                stack.enter_context(patch(name, value))
            is_cuda = property(lambda tensor: tensor.device.type == "cuda")
            stack.enter_context(patch.object(FakeTensor, "is_cuda", is_cuda, create=True))
            stack.enter_context(patch.object(FakeTensor, "data_ptr", lambda tensor: 0, create=True))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            yield
    finally:
        for device, guard in before.items():
            guards[device] = guard


class Recorder(TorchDispatchMode):
    """
    Counts what runs within it, from `start()` on; of all storages alive, also those made before.

    Args:
        listed (`dict`): Of the number of elements of a mask to how many of them are true; 1 of others.
        above (`int`): How many entries are above a threshold, in all layers.
    """

    def __init__(self, listed: dict[int, int], above: int = 1):
        super().__init__()
        self.listed, self.above, self.alive, self.bytes = listed, above, set(), 0
        self.start()

    def start(self) -> None:
        """Forgets what was counted."""
        self.operators = self.launches = 0
        self.waits, self.peak = Counter(), self.bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return STAND_IN if args[0].device.type == "cuda" else args[0].device
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        if kwargs.get("device") == STAND_IN:
            kwargs["device"] = GPU
        changed = {key: value for key, value in kwargs.items() if value is not None and key != "non_blocking"}
        if name == "_to_copy" and changed == {"device": args[0].device}:
            return args[0].view_as(args[0])  # C++ took the stand-in for another device
        out = self._run(func, name, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors}
        if "cuda" not in devices or func.namespace != "aten":
            return out
        self.operators += 1
        if not (func.is_view or name in ALLOCATIONS):
            many = name.startswith(("_foreach", "_fused"))
            pieces = sum(math.ceil(t.numel() / PIECE) for t in args[0]) if many else 1
            self.launches += math.ceil(pieces / PIECES_AT_ONCE)
        if does_wait(name, args, kwargs, devices):
            self.waits[f"{name} {place()}"] += 1
        self._track(t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type == "cuda")
        return out

    def _run(self, func, name, args, kwargs):
        """An operator on fake tensors, with a made-up value where that is asked for."""
        if name == "nonzero":
            return args[0].new_empty(self.listed.get(args[0].numel(), 1), args[0].dim(), dtype=torch.int64)
        if name == "bincount":
            return args[0].new_empty(args[2])
        if name == "_local_scalar_dense" and args[0].constant is None:
            return {torch.bool: True, torch.int64: self.above}.get(args[0].dtype, 1.0)
        return func(*args, **kwargs)

    def _track(self, tensors) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                size = -(-storage.nbytes() // UNIT) * UNIT
                self.alive.add(storage._cdata)
                self.bytes += size
                weakref.finalize(storage, self._release, storage._cdata, size)
        self.peak = max(self.peak, self.bytes)

    def _release(self, storage: int, size: int) -> None:
        self.alive.discard(storage)
        self.bytes -= size


def does_wait(name: str, args: tuple, kwargs: dict, devices: set[str]) -> bool:
    """Whether an operator on tensors of these devices holds up the host until the GPU has caught up."""
    if name in ("_to_copy", "copy_", "index_put", "index_put_", "where"):  # the last three copy a value first
        by_mask = name.startswith("index") and any(i is not None and i.dtype == torch.bool for i in args[1])
        return (len(devices) > 1 and not kwargs.get("non_blocking")) or (by_mask and args[2].numel() > 1)
    return name in READ_BY_HOST


def place() -> str:
    """The innermost line of the project that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OUR_FILES):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


# -- what is counted --------------------------------------------------------------------------------------------------


class CountedKernel:
    """Stands in for a Triton kernel: `kernel[grid](...)`."""

    def __init__(self, recorder: Recorder, kernel, launched: Callable | None):
        self.recorder, self.kernel, self.launched = recorder, kernel, launched

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.recorder.launches += 1
            if self.launched is not None:
                self.launched(self.kernel, grid, args, kwargs)

        return launch


def count(case: Case, launched: Callable | None = None) -> dict:
    """
    Counts an update of a case, not the first, which makes the optimizer's state.

    Args:
        case: The shape and the settings.
        launched: Called for each launch of a Triton kernel: the kernel, its grid, its arguments, and those by name.

    Returns:
        `dict`: `operators`; `launches` of `forward`, `backward` (with the counts of what fired) and `optimizer` (with
        clipping); `waits`, how often, by operator and line; `peak_bytes`.
    """
    marks = []
    dead = round(case.dead * case.num_features)
    layers, features, tokens = case.num_layers, case.num_features, case.tokens
    listed = round(tokens * plan_of(case).listed_per_layer)
    recorder = Recorder({layers * features: layers * dead}, above=layers * listed)

    def even(tensor):  # `tolist` of how many features are dead in each layer
        recorder.waits[f"tolist {place()}"] += 1
        return [dead] * len(tensor)

    with ExitStack() as stack:
        for module in (triton_adam, triton_layers, triton_rows, triton_select):
            kernels = {
                name: CountedKernel(recorder, kernel, launched)
                for name, kernel in vars(module).items()
                if name.endswith("_kernel")
            }
            stack.enter_context(patch.multiple(module, **kernels))
        stack.enter_context(patch.object(FakeTensor, "tolist", even))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(recorder)
        update = Update(replace(case, dead=0.0))
        if dead:
            update.dead = torch.zeros(layers, features, dtype=torch.bool, device=GPU)
        inputs, labels = (torch.empty(tokens, layers, case.d_model, device=GPU) for _ in range(2))
        for parameter in update.clt.parameters():
            parameter.grad = torch.empty_like(parameter)
        update.optimizer.step()
        update.optimizer.zero_grad()
        recorder.start()
        update(inputs, labels, mark=lambda: marks.append(recorder.launches))
    return {
        "operators": recorder.operators,
        "launches": {phase: marks[i + 1] - marks[i] for i, phase in enumerate(PHASES)},
        "waits": dict(recorder.waits),
        "peak_bytes": recorder.peak,
    }


def make_case(**fields) -> Case:
    """A case on the fake GPU."""
    return Case(**{"device": "cuda", "tokens": 4_096, "autocast": "bfloat16", **fields})


def estimated_bytes(case: Case) -> int:
    """What `hf-clt estimate` says of its memory."""
    return memory(replace(plan_of(case), dead=case.dead))["total"]


def format_rows(rows: list[dict]) -> str:
    """A Markdown table."""
    lines = [
        "| L, D, F, N, L0 | dead | launches: forward, backward, optimizer | operators | waits | memory, estimate |"
    ]
    lines.append("|---" * 6 + "|")
    for row in rows:
        case, launches = row["case"], row["launches"]
        shape = ", ".join(str(case[name]) for name in ("num_layers", "d_model", "num_features", "tokens", "l0"))
        cells = [f"{shape} {case['activation_fn']}, {case['optimizer']}", f"{case['dead']:.0%}"]
        split = ", ".join(f"{launches[phase]:,}" for phase in PHASES)
        cells += [f"{sum(launches.values()):,}: {split}", f"{row['operators']:,}", sum(row["waits"].values())]
        cells += [f"{row['peak_bytes'] / 1e9:.2f} GB, {row['estimated_bytes'] / row['peak_bytes'] - 1:+.1%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures, with the lines that wait")
    options = parser.parse_args(argv)
    rows = []
    with fake_gpu():
        for fields in ROWS:
            case = make_case(**fields)
            rows.append({"case": case.to_dict(), **count(case), "estimated_bytes": estimated_bytes(case)})
    if options.json is not None:
        write_text(options.json, json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(format_rows(rows))


if __name__ == "__main__":
    main()


__all__ = ["count", "estimated_bytes", "fake_gpu", "make_case"]
