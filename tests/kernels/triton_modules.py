"""Triton kernels without a GPU: interpreted, and compiled for an H100."""

import importlib.util
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch


def load_copy(module, name):
    """A second copy of a module of `hf_clt.kernels`, to be loaded under other circumstances."""
    spec = importlib.util.spec_from_file_location(f"hf_clt.kernels.{name}", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def load_interpreted(module):
    """
    A copy of a module with the interpreter on: Triton looks at the variable when a kernel is defined. Setting it for
    the whole process would send every CPU tensor of every test through the kernels.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return load_copy(module, f"interpreted_{module.__name__.rsplit('.', 1)[1]}")


def run_twice_without_waiting(run):
    """What `run` gives on a GPU, after a second time, in which nothing may wait for it, gave the same bits."""
    first = run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    return first


def fold_in_halves(patch):
    """
    Lets the interpreter reduce and scan by halves, as a GPU does, until the patch is undone: a few steps on whole
    arrays in the place of one for each element, which takes seconds for a histogram.
    """
    from triton.runtime.interpreter import ReduceOps, ScanOps

    def combine(ops, left, right, dtype):
        return ops.combine_fn.fn(ops.to_tensor(left, dtype), ops.to_tensor(right, dtype)).handle.data

    def reduce(ops, inputs):
        (entries,) = inputs
        data = entries.handle.data
        while data.shape[ops.axis] > 1:
            data = combine(ops, *np.split(data, 2, axis=ops.axis), entries.dtype)
        data = data if ops.keep_dims else data.squeeze(ops.axis)
        return [ops.to_tensor(data if data.shape else data.item(), entries.dtype)]

    def scan(ops, inputs):
        (entries,) = inputs
        data, step = entries.handle.data, 1
        while step < data.shape[ops.axis]:
            combined = combine(ops, np.roll(data, step, axis=ops.axis), data, entries.dtype)
            first = np.split(data, [step], axis=ops.axis)[0]
            data = np.concatenate([first, np.split(combined, [step], axis=ops.axis)[1]], axis=ops.axis)
            step *= 2
        return [ops.to_tensor(data, entries.dtype)]

    patch.setattr(ReduceOps, "generic_reduce", reduce)
    patch.setattr(ScanOps, "generic_scan", scan)


def compile_kernel(folder, kernel, types, constants, num_warps, atomics=False):
    """
    Compiles a kernel as a launch with 16-divisible shapes and pointers would, and checks that it reads and writes 16
    bytes at a time, that it keeps its numbers in registers, and that it gives the same bits each time (`atomics` may
    be allowed, where they add whole numbers). Other arguments than those in `types` and `constants` are i32.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    whole = {name for name, kind in signature.items() if kind.startswith(("*", "i"))}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in whole}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    ptx, (registers, spilled) = compiled.asm["ptx"], resources(folder, compiled)
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx), "rows are not loaded 16 bytes at a time"
    assert atomics or not re.search(r"\b(atom|red)\.", ptx), "atomics make results differ from run to run"
    assert spilled == 0, f"registers are spilled, {spilled} bytes of a thread"
    return ptx, registers


def resources(folder, compiled):
    """Registers of a thread of a compiled kernel, and its bytes that are spilled."""
    import triton

    (folder / "cubin").write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", folder / "cubin"], check=True, capture_output=True, text=True)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    return found["REG"], found["STACK"] + found["LOCAL"]
