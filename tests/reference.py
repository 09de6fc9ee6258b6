"""
Random CLTs and data, and what they compute by the dense formulas of benchmarks/dense_reference.py in float64: what the
package is compared with.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.dense_reference import STATISTICS, activations, dense_losses
from hf_clt import CLTConfig, CrossLayerTranscoder


def random_clt(seed: int = 0, double: bool = True, **fields) -> CrossLayerTranscoder:
    """A small CLT whose every parameter is random (thresholds spread around 0.3), in float64 if `double`."""
    values = {"num_layers": 3, "d_model": 5, "num_features": 16, "activation_fn": "jumprelu", "k": 3, **fields}
    clt = CrossLayerTranscoder(CLTConfig(**values))
    if double:
        clt.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in clt.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((0.3 * noise.exp()).log() if name.startswith("thresholds") else 0.5 * noise)
    return clt


def random_statistics(clt: CrossLayerTranscoder, seed: int = 0, same_scale: bool = False) -> dict[str, Tensor]:
    """Normalisation statistics, (L, D) each; with `same_scale` std_out is the same in all layers."""
    generator = torch.Generator().manual_seed(100 + seed)
    shape = (clt.config.num_layers, clt.config.d_model)
    draws = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in STATISTICS}
    statistics = {name: draw.exp() if name.startswith("std") else draw for name, draw in draws.items()}
    if same_scale:
        statistics["std_out"] = statistics["std_out"][:1].expand(shape).clone()
    return {name: value.to(clt.dtype) for name, value in statistics.items()}


def random_batch(clt: CrossLayerTranscoder, num_tokens: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Raw inputs and targets, (N, L, D) each."""
    generator = torch.Generator().manual_seed(200 + seed)
    shape = (2, num_tokens, clt.config.num_layers, clt.config.d_model)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(clt.dtype).unbind())


def parameters_of(clt: CrossLayerTranscoder) -> dict[str, Tensor]:
    """Copies of the parameters and of batchtopk's running thresholds, by name, as leaves of their own."""
    copies = {name: p.detach().clone().requires_grad_() for name, p in clt.named_parameters()}
    return copies | {name: b.detach().clone() for name, b in clt.named_buffers() if name.startswith("thresholds")}


def reference(
    clt: CrossLayerTranscoder,
    parameters: dict[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    sparsity_scale: float = 1.0,
    dead: Tensor | None = None,
    statistics: dict[str, Tensor] | None = None,
    training: bool = True,
) -> dict[str, Tensor]:
    """
    Everything that `forward` returns, from `parameters` (see `parameters_of`).

    Args:
        clt: Only its configuration is read.
        parameters: By name.
        inputs, labels: Raw, (N, L, D).
        sparsity_scale: Multiplies λ.
        dead: (L, F) bool, or None for none.
        statistics: Of the normalisation, (L, D) each, or None for none.
        training: Whether batchtopk selects over the batch or gates at its running threshold.

    Returns:
        `reconstruction` (N, L, D) raw, `acts` (N, L, F), the four loss terms and their sum `loss`.
    """
    if statistics is not None:
        statistics = {n: value.clamp(min=1e-6) if n.startswith("std") else value for n, value in statistics.items()}
    activate = partial(activations, training=training)
    found = dense_losses(clt.config, parameters, inputs, labels, statistics, sparsity_scale, dead, activate)
    if statistics is not None:
        found["reconstruction"] = found["reconstruction"] * statistics["std_out"] + statistics["mean_out"]
    return {**found, "acts": torch.stack(found["acts"], dim=1)}
