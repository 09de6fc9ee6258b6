"""
Each launch of an update, compiled for an H100 as it is launched: with the formats of all its arguments, and with what
Triton makes of their values (a 1 becomes a constant, a multiple of 16 is known to be one). Nothing is run.
"""

import pytest
import torch

from benchmarks.launches import count, fake_gpu, make_case
from tests.kernels.triton_modules import resources


triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU launches them")

SHAPES = {  # of multiples of 16; of others; a single token, and layers that write to themselves alone
    "even": {"num_layers": 3, "d_model": 256, "num_features": 4096, "tokens": 512, "l0": 16},
    "odd": {"num_layers": 3, "d_model": 75, "num_features": 3001, "tokens": 77, "l0": 5},
    "one": {"num_layers": 2, "d_model": 64, "num_features": 1000, "tokens": 1, "l0": 1, "decoder_reach": 1},
}
FORMATS = {
    "float32": {"autocast": None},
    "autocast": {},
    "bfloat16": {"dtype": "bfloat16", "optimizer": "adam_compact"},
}


class Driver:
    """An H100 as Triton asks for one."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("activation_fn, dead", [
    ("batchtopk", 0.1),
    pytest.param("topk", 0.0, marks=pytest.mark.slow),
    pytest.param("jumprelu", 0.1, marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [
    shape if i == 0 else pytest.param(shape, marks=pytest.mark.slow) for i, shape in enumerate(SHAPES)
])  # fmt: skip
def test_all_launches_of_an_update_compile(tmp_path, monkeypatch, shape, form, activation_fn, dead):
    """And hardly spill: 16 bytes where float32 decoders get gradients from rows in bfloat16."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    found = {}

    def launched(kernel, grid, args, constants):
        assert all(0 < size < (2**31 if axis == 0 else 2**16) for axis, size in enumerate(grid)), (kernel, grid)
        compiled = kernel.run(*args, grid=grid, warmup=True, **constants)
        if compiled.hash not in found:
            found[compiled.hash] = kernel.__name__, resources(tmp_path, compiled)

    with fake_gpu():
        count(make_case(**SHAPES[shape], **FORMATS[form], activation_fn=activation_fn, dead=dead), launched)
    names = {name for name, _ in found.values()}
    assert names > {"decode_kernel", "posting_kernel", "dots_kernel", "squares_kernel"}
    assert "adam_kernel" in names or "wide_kernel" in names
    assert all(spilled <= 16 for _, (_registers, spilled) in found.values()), found
