"""Where gathering rows stops paying: both ways to decode and to give gradients, timed at growing density."""

import time
from contextlib import contextmanager

import torch

from hf_clt.kernels import rows as rows_module
from hf_clt.kernels.decode import add_decoded
from hf_clt.sparsity import LayerFeatures

from .machine import synchronize


DENSITIES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2)


@contextmanager
def force(dense: bool):
    """Decodes by one matrix product, or by gathering rows, whatever the density."""
    before = rows_module.DENSE_ABOVE, rows_module.DENSE_ABOVE_GPU
    rows_module.DENSE_ABOVE = rows_module.DENSE_ABOVE_GPU = -1.0 if dense else 1.0
    try:
        yield
    finally:
        rows_module.DENSE_ABOVE, rows_module.DENSE_ABOVE_GPU = before


def random_entries(num_tokens: int, num_features: int, density: float, device: str) -> LayerFeatures:
    """The same number of random features on every token."""
    per_token = max(1, round(density * num_features))
    indices = torch.rand(num_tokens, num_features, device=device).topk(per_token, dim=1).indices.sort(dim=1).values
    offsets = torch.arange(num_tokens + 1, device=device) * per_token
    return LayerFeatures(torch.rand(indices.numel(), device=device), indices.flatten(), offsets, num_features)


def decoder_seconds(features: LayerFeatures, weight: torch.Tensor, dense: bool, repeats: int) -> float:
    """Median seconds of one source layer's decoding, forward and backward."""
    weight.requires_grad_()
    num_targets = weight.shape[1]
    shape = (features.num_rows, num_targets, weight.shape[2])
    grad = torch.randn(shape, device=weight.device, dtype=weight.dtype)
    seconds = []
    for _ in range(repeats + 1):
        weight.grad = None
        values = features.values.detach().clone().requires_grad_()
        # A new object, so that the entries are sorted by feature anew, as in every step.
        entries = LayerFeatures(values, features.indices, features.offsets, features.num_features)
        synchronize(weight.device)
        start = time.perf_counter()
        with force(dense):
            out, _ = add_decoded(torch.zeros_like(grad), entries, weight, slice(0, num_targets))
            out.backward(grad)
        synchronize(weight.device)
        seconds.append(time.perf_counter() - start)
    return torch.tensor(seconds[1:]).median().item()


def measure_crossover(
    num_tokens: int, num_features: int, num_targets: int, d_model: int, device: str = "cpu", repeats: int = 5
) -> list[dict]:
    """
    Times one source layer's decoding at every density in `DENSITIES`.

    Args:
        num_tokens: N.
        num_features: F.
        num_targets: J, target layers of the source layer.
        d_model: D.
        device: Where to compute.
        repeats: Timed repeats; the median counts.

    Returns:
        One `dict` per density: `density`, `gathered` and `product` in seconds, and `ratio`, above 1 where gathering
        rows is faster.
    """
    weight = torch.randn(num_features, num_targets, d_model, device=device)
    table = []
    for density in DENSITIES:
        features = random_entries(num_tokens, num_features, density, device)
        gathered = decoder_seconds(features, weight, dense=False, repeats=repeats)
        product = decoder_seconds(features, weight, dense=True, repeats=repeats)
        table.append({"density": density, "gathered": gathered, "product": product, "ratio": product / gathered})
    return table


__all__ = ["DENSITIES", "measure_crossover"]
