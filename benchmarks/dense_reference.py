"""
A cross-layer transcoder computed densely, from full (N, F) matrices of activations, by the formulas of
docs/concepts.md.

The tests compare the package with it in float64 (tests/reference.py), and the benchmarks time it as the baseline. So
it is written as a careful trainer without sparsity would be: one matrix product per source layer and direction, in
place where autograd allows it, no copy of a decoder. It reads the configuration and the parameters of a CLT and shares
nothing else with the package. The gradients that are written by hand ([`JumpReLU`], [`AddDecoded`]) are compared with
formulas in tests/benchmarks/test_dense_reference.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


STATISTICS = ("mean_in", "std_in", "mean_out", "std_out")
TERMS = ("reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss")


class JumpReLU(torch.autograd.Function):
    """
    a = h · 1[h > θ] for h (N, F) and θ (F,), with ∂a/∂h = 1[h > θ] and ∂a/∂θ = -(θ/ε) · 1[|h - θ| < ε/2]
    (Rajamanoharan et al. 2024).
    """

    @staticmethod
    def forward(ctx, h, theta, bandwidth):
        ctx.save_for_backward(h, theta)
        ctx.bandwidth = bandwidth
        return torch.where(h > theta, h, 0)

    @staticmethod
    def backward(ctx, grad):
        h, theta = ctx.saved_tensors
        inside = (h - theta).abs_() < ctx.bandwidth / 2
        grad_theta = torch.where(inside, grad, 0).sum(dim=0, dtype=theta.dtype).mul_(-theta / ctx.bandwidth)
        return torch.where(h > theta, grad, 0), grad_theta, None


class AddDecoded(torch.autograd.Function):
    """
    Adds a W[:, j] to target layer `first_target + j` of the reconstruction, in place, for activations (N, F) and a
    decoder (F, J, D): one product with the (F, J·D) matrix. Returns the norms (F,) of the decoder's rows as well, or
    None, so that both gradients of the decoder are added up in one tensor. The norm's gradient at 0 is 0.
    """

    @staticmethod
    def forward(ctx, reconstruction, acts, weight, first_target, with_norms):
        device, rows = weight.device.type, weight.reshape(weight.shape[0], -1)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        a, w = acts.to(dtype), rows.to(dtype)
        start = first_target * weight.shape[2]
        ctx.columns = slice(start, start + rows.shape[1])
        targets = reconstruction.view(reconstruction.shape[0], -1)[:, ctx.columns]
        if dtype == reconstruction.dtype:
            targets.addmm_(a, w)
        else:
            targets += a @ w
        norms = None
        if with_norms:
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
        ctx.mark_dirty(reconstruction)
        ctx.save_for_backward(a, w, weight, norms)
        ctx.acts_dtype = acts.dtype
        return reconstruction, norms

    @staticmethod
    def backward(ctx, grad, grad_norms):
        a, w, weight, norms = ctx.saved_tensors
        grad_written = grad.reshape(grad.shape[0], -1)[:, ctx.columns].to(w.dtype)
        grad_acts = (grad_written @ w.T).to(ctx.acts_dtype)
        grad_weight = (a.T @ grad_written).to(weight.dtype)
        if norms is not None:
            scale = torch.where(norms > 0, grad_norms / norms, 0).to(weight.dtype)
            grad_weight.addcmul_(weight.reshape(grad_weight.shape), scale[:, None])
        return grad, grad_acts, grad_weight.view_as(weight), None, None


def pre_activations(config, parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Normalised inputs (N, L, D) to one (N, F) tensor per layer."""
    weights = [parameters[f"encoders.{s}.weight"] for s in range(config.num_layers)]
    return [F.linear(x[:, s].to(w.dtype), w, parameters[f"encoders.{s}.bias"]) for s, w in enumerate(weights)]


def activations(config, parameters: dict[str, Tensor], h: list[Tensor], training: bool = True) -> list[Tensor]:
    """Pre-activations to activations, one (N, F) tensor per layer; `training` matters to batchtopk."""
    if config.activation_fn == "relu":
        return [F.relu(h_s) for h_s in h]
    thresholds = [parameters.get(f"thresholds.{s}.value") for s in range(config.num_layers)]
    if config.activation_fn == "jumprelu":
        bandwidth = config.jumprelu_bandwidth
        return [JumpReLU.apply(h_s, log.exp(), bandwidth) for h_s, log in zip(h, thresholds, strict=True)]
    if config.activation_fn == "batchtopk" and not training:
        return [torch.where(h_s > threshold, h_s, 0) for h_s, threshold in zip(h, thresholds, strict=True)]
    if config.k_scope == "token":
        acts = keep_largest(torch.cat(h, dim=1), config.activation_fn, config.k * config.num_layers)
        return list(acts.split(config.num_features, dim=1))
    return [keep_largest(h_s, config.activation_fn, config.k) for h_s in h]


def keep_largest(h: Tensor, activation_fn: str, k: int) -> Tensor:
    """The k largest of each row (topk) or the k·N largest of the matrix (batchtopk), then ReLU; zeros elsewhere."""
    rows = h if activation_fn == "topk" else h.view(1, -1)
    values, indices = rows.topk(k * h.shape[0] // rows.shape[0], dim=1, sorted=False)
    return torch.zeros_like(rows).scatter(1, indices, values.relu()).view_as(h)


def revived_activations(config, h: list[Tensor], dead: Tensor) -> list[Tensor]:
    """Of each token and layer the `aux_k` largest pre-activations of dead features (L, F), then ReLU."""
    candidates = [h_s.masked_fill(~dead_s, -torch.inf) for h_s, dead_s in zip(h, dead, strict=True)]
    return [keep_largest(h_s, "topk", config.aux_k) for h_s in candidates]


def written_decoder(config, parameters: dict[str, Tensor], source: int) -> Tensor:
    """What a source layer writes to itself and the layers above it, (F, J, D), ties written out."""
    reach = config.num_layers if config.decoder_reach is None else config.decoder_reach
    targets = range(source, min(config.num_layers, source + reach))
    if config.decoder_tying == "per_target":
        return torch.cat([parameters[f"decoders.{target}.weight"] for target in targets], dim=1)
    return parameters[f"decoders.{source}.weight"].expand(-1, len(targets), -1)


def dense_losses(
    config,
    parameters: dict[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    statistics: dict[str, Tensor] | None = None,
    sparsity_scale: float = 1.0,
    dead: Tensor | None = None,
    activate: Callable[..., list[Tensor]] = activations,
    revive: Callable[..., list[Tensor]] = revived_activations,
) -> dict[str, Tensor]:
    """
    The losses of a training step, computed densely, with autograd. batchtopk's running threshold is not moved.

    Args:
        config ([`CLTConfig`]): Of the CLT.
        parameters: By name, as of `named_parameters`.
        inputs, labels (`Tensor` of shape `(N, L, D)`): Raw.
        statistics: `mean_in`, `std_in`, `mean_out` and `std_out`, (L, D) each; None: no normalisation.
        sparsity_scale: Multiplies λ.
        dead (`Tensor` of shape `(L, F)`): Which features are dead, bool; None: none.
        activate, revive: Take the place of [`activations`] and [`revived_activations`].

    Returns:
        `dict`: `reconstruction_loss`, `sparsity_loss`, `preactivation_loss`, `aux_loss` and their sum, `loss`; `acts`,
        one (N, F) tensor per layer; `reconstruction` (N, L, D), normalised.
    """
    if statistics is not None:
        inputs = (inputs - statistics["mean_in"]) / statistics["std_in"]
        labels = (labels - statistics["mean_out"]) / statistics["std_out"]
    num_tokens, layers = inputs.shape[0], range(config.num_layers)
    h = pre_activations(config, parameters, inputs)
    acts = activate(config, parameters, h)
    decoders = [written_decoder(config, parameters, s) for s in layers]
    has_dead = dead is not None and bool(dead.any())
    pulls_up = has_dead and config.activation_fn in ("relu", "jumprelu")

    bias = torch.stack([parameters[f"decoders.{t}.bias"] for t in layers])
    # Sums over many source layers and dimensions want float32 at least.
    reconstruction = bias.to(torch.promote_types(bias.dtype, torch.float32)).expand(num_tokens, -1, -1).clone()
    penalties, missing = [], []
    for s in layers:
        with_norms = config.sparsity_lambda > 0 or pulls_up
        reconstruction, norms = AddDecoded.apply(reconstruction, acts[s], decoders[s], s, with_norms)
        if config.sparsity_lambda > 0:
            weight = config.sparsity_first_layer if s == 0 else 1
            penalties.append(weight * torch.tanh((config.sparsity_c * norms) * acts[s]).sum())
        if pulls_up:
            theta = parameters[f"thresholds.{s}.value"].exp() if config.activation_fn == "jumprelu" else 0
            missing.append((norms * (theta - h[s]).relu())[:, dead[s]].sum())
    if config.skip_connection:
        skips = [inputs[:, t] @ parameters[f"skips.{t}.weight"] for t in layers]
        reconstruction = reconstruction + torch.stack(skips, dim=1)
    labels = labels.to(reconstruction.dtype)

    error = F.mse_loss(reconstruction, labels, reduction="sum") / num_tokens
    losses = {"reconstruction_loss": error, **dict.fromkeys(TERMS[1:], error.new_zeros(()))}
    if penalties:
        penalty = config.sparsity_lambda * torch.stack(penalties).sum() / num_tokens
        losses["sparsity_loss"] = sparsity_scale * penalty
    if missing:
        losses["preactivation_loss"] = config.preactivation_coef * torch.stack(missing).sum() / num_tokens
    elif has_dead:
        explained = torch.zeros_like(reconstruction)
        for s, revived in enumerate(revive(config, h, dead)):
            explained, _ = AddDecoded.apply(explained, revived, decoders[s], s, False)
        left = (labels - reconstruction).detach()
        losses["aux_loss"] = config.aux_coef * (left - explained).square().sum() / num_tokens
    return {**losses, "loss": sum(losses.values()), "acts": acts, "reconstruction": reconstruction}


def dense_losses_of(clt, inputs: Tensor, labels: Tensor, **options) -> dict[str, Tensor]:
    """[`dense_losses`] of a CLT, with its statistics."""
    statistics = {name: getattr(clt, name) for name in STATISTICS} if clt.mean_in is not None else None
    return dense_losses(clt.config, dict(clt.named_parameters()), inputs, labels, statistics, **options)


__all__ = [
    "AddDecoded",
    "JumpReLU",
    "activations",
    "dense_losses",
    "dense_losses_of",
    "keep_largest",
    "pre_activations",
    "written_decoder",
]
