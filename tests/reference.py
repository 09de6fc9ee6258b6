"""
The equations of a cross-layer transcoder once more, as plain dense loops in float64, to compare the package with.

Nothing here is shared with `hf_clt`, and nothing is fast: every feature of every token is computed and decoded, every
tie is written out, and each quantity is the line of the table it comes from. Gradients come from autograd; jumprelu's
straight-through gradient is written as a surrogate whose value is the activation and whose derivative is the formula.
"""

import torch
from torch import Tensor

from hf_clt import CLTConfig, CrossLayerTranscoder


STATISTICS = ("mean_in", "std_in", "mean_out", "std_out")


# -- models and data to compare on -----------------------------------------------------------------------------------


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


# -- the table -------------------------------------------------------------------------------------------------------


def decoder_matrices(config: CLTConfig, parameters: dict[str, Tensor]) -> dict[tuple[int, int], Tensor]:
    """(source, target) -> (F, D): what each source layer writes to each target layer, ties written out."""
    reach = config.num_layers if config.decoder_reach is None else config.decoder_reach
    matrices = {}
    for s in range(config.num_layers):
        for t in range(s, min(config.num_layers, s + reach)):
            if config.decoder_tying == "per_source":
                matrices[s, t] = parameters[f"decoders.{s}.weight"][:, 0]
            elif config.decoder_tying == "per_target":
                matrices[s, t] = parameters[f"decoders.{t}.weight"][:, 0]
            else:
                matrices[s, t] = parameters[f"decoders.{s}.weight"][:, t - s]
    return matrices


def decoder_norms(config: CLTConfig, matrices: dict[tuple[int, int], Tensor]) -> list[Tensor]:
    """‖W_dec[s][f]‖ over all targets, one (F,) tensor per source layer. torch's norm has gradient 0 at 0."""
    rows = [torch.cat([m for (s, _), m in matrices.items() if s == layer], 1) for layer in range(config.num_layers)]
    return [torch.linalg.vector_norm(row, dim=1) for row in rows]


def pre_activations(config: CLTConfig, parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    return [
        torch.einsum("nd,fd->nf", x[:, s], parameters[f"encoders.{s}.weight"]) + parameters[f"encoders.{s}.bias"]
        for s in range(config.num_layers)
    ]


def thresholds(config: CLTConfig, parameters: dict[str, Tensor]) -> list[Tensor]:
    """θ of the pre-activation loss."""
    if config.activation_fn == "relu":
        return [torch.zeros(config.num_features, dtype=torch.float64)] * config.num_layers
    return [parameters[f"thresholds.{s}.value"].exp() for s in range(config.num_layers)]


def jumprelu(h: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """Value h·1[h > θ], gradient 1[h > θ] to h and -(θ/ε)·1[|h - θ| < ε/2] to θ."""
    gate = (h > theta).to(h.dtype).detach()
    slope = (-(theta / bandwidth) * ((h - theta).abs() < bandwidth / 2)).detach()
    return h * gate + slope * (theta - theta.detach())


def mask_of_largest(values: Tensor, count: int) -> Tensor:
    """1 at the `count` largest entries, 0 elsewhere (no ties in random float64 numbers)."""
    return (values >= values.flatten().sort(descending=True).values[count - 1]).to(values.dtype).detach()


def activations(config: CLTConfig, parameters: dict[str, Tensor], h: list[Tensor], training: bool) -> list[Tensor]:
    if config.activation_fn == "relu":
        return [h_s.clamp(min=0) for h_s in h]
    if config.activation_fn == "jumprelu":
        theta = thresholds(config, parameters)
        return [jumprelu(h_s, theta_s, config.jumprelu_bandwidth) for h_s, theta_s in zip(h, theta, strict=True)]
    if config.activation_fn == "batchtopk" and not training:
        return [h_s * (h_s > parameters[f"thresholds.{s}.value"]).to(h_s.dtype) for s, h_s in enumerate(h)]
    stacked = torch.stack(h, dim=1)  # (N, L, F)
    num_tokens, num_layers, _ = stacked.shape
    mask = torch.zeros_like(stacked)
    if config.activation_fn == "topk" and config.k_scope == "layer":
        for n in range(num_tokens):
            for s in range(num_layers):
                mask[n, s] = mask_of_largest(stacked[n, s], config.k)
    elif config.activation_fn == "topk":
        for n in range(num_tokens):
            mask[n] = mask_of_largest(stacked[n], config.k * num_layers)
    elif config.k_scope == "layer":
        for s in range(num_layers):
            mask[:, s] = mask_of_largest(stacked[:, s], config.k * num_tokens)
    else:
        mask = mask_of_largest(stacked, config.k * num_layers * num_tokens)
    return list((mask * stacked).clamp(min=0).unbind(dim=1))


def auxiliary_activations(config: CLTConfig, h: list[Tensor], dead: Tensor) -> list[Tensor]:
    """Per token and layer the aux_k largest h among the dead features, then ReLU."""
    result = []
    for h_s, dead_s in zip(h, dead, strict=True):
        candidates = h_s.detach().masked_fill(~dead_s, -torch.inf)
        mask = torch.zeros_like(h_s)
        for n in range(h_s.shape[0]):
            for f in candidates[n].sort(descending=True).indices[: min(config.aux_k, int(dead_s.sum()))]:
                mask[n, f] = 1
        result.append((mask * h_s).clamp(min=0))
    return result


def decoded(config: CLTConfig, matrices: dict[tuple[int, int], Tensor], acts: list[Tensor]) -> Tensor:
    """Σ_s a_s W_dec[s][:, t-s] for every target t, (N, L, D), without bias and skip."""
    num_tokens = acts[0].shape[0]
    targets = [torch.zeros(num_tokens, config.d_model, dtype=torch.float64) for _ in range(config.num_layers)]
    for (s, t), matrix in matrices.items():
        targets[t] = targets[t] + torch.einsum("nf,fd->nd", acts[s], matrix)
    return torch.stack(targets, dim=1)


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
    config = clt.config
    coefficients = {name: getattr(config, name) for name in ("sparsity_lambda", "preactivation_coef", "aux_coef")}
    shape = (config.num_layers, config.d_model)
    zero, one = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    given = statistics or {"mean_in": zero, "std_in": one, "mean_out": zero, "std_out": one}
    num_tokens = inputs.shape[0]

    x = (inputs - given["mean_in"]) / given["std_in"].clamp(min=1e-6)
    y = (labels - given["mean_out"]) / given["std_out"].clamp(min=1e-6)
    h = pre_activations(config, parameters, x)
    a = activations(config, parameters, h, training)
    matrices = decoder_matrices(config, parameters)
    norms = decoder_norms(config, matrices)

    y_hat = decoded(config, matrices, a)
    y_hat = y_hat + torch.stack([parameters[f"decoders.{t}.bias"] for t in range(config.num_layers)])
    if config.skip_connection:
        skips = [torch.einsum("nd,de->ne", x[:, t], parameters[f"skips.{t}.weight"]) for t in range(config.num_layers)]
        y_hat = y_hat + torch.stack(skips, dim=1)

    terms = {"reconstruction_loss": sum(((y - y_hat)[n] ** 2).sum() for n in range(num_tokens)) / num_tokens}
    penalty = sum(torch.tanh(config.sparsity_c * norms[s] * a[s]).sum() for s in range(config.num_layers)) / num_tokens
    terms["sparsity_loss"] = coefficients["sparsity_lambda"] * sparsity_scale * penalty
    terms["preactivation_loss"] = torch.zeros((), dtype=torch.float64)
    terms["aux_loss"] = torch.zeros((), dtype=torch.float64)
    if dead is not None and dead.any():
        if config.activation_fn in ("relu", "jumprelu"):
            theta = thresholds(config, parameters)
            for s in range(config.num_layers):
                for f in dead[s].nonzero().flatten():
                    missing = (theta[s][f] - h[s][:, f]).clamp(min=0)
                    mean = (missing * norms[s][f]).sum() / num_tokens
                    terms["preactivation_loss"] = (
                        terms["preactivation_loss"] + coefficients["preactivation_coef"] * mean
                    )
        else:
            explained = decoded(config, matrices, auxiliary_activations(config, h, dead))
            terms["aux_loss"] = coefficients["aux_coef"] * (((y - y_hat).detach() - explained) ** 2).sum() / num_tokens
    return {
        **terms,
        "loss": sum(terms.values()),
        "acts": torch.stack(a, dim=1),
        "reconstruction": y_hat * given["std_out"].clamp(min=1e-6) + given["mean_out"],
    }
