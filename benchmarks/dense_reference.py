"""
The dense training step: the baseline of the benchmark.

It computes the losses of [`CrossLayerTranscoder`] from full (N, F) matrices of activations, the way a careful trainer
without sparsity would: one matrix product per source layer and direction, in place where autograd allows it, no copy
of a decoder. It reads the parameters of a CLT and shares nothing else with the package, so that what is made faster
there does not make the baseline faster or slower.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class _JumpReLU(torch.autograd.Function):
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


class _AddDecoded(torch.autograd.Function):
    """
    Adds a W[:, j] to target layer `first_target + j` of the reconstruction, in place, for activations (N, F) and a
    decoder (F, J, D): one product with the (F, J·D) matrix. Gives the norms (F,) of the decoder's rows as well, or
    None, so that both gradients of the decoder meet in one tensor.
    """

    @staticmethod
    def forward(ctx, reconstruction, acts, weight, first_target, with_norms):
        device, rows = weight.device.type, weight.view(weight.shape[0], -1)
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
            grad_weight.addcmul_(weight.view_as(grad_weight), scale[:, None])
        return grad, grad_acts, grad_weight.view_as(weight), None, None


def dense_losses(clt, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    The losses of a training step, computed densely, with autograd.

    batchtopk's running threshold, which is no part of the loss, stays as it is.

    Args:
        clt ([`CrossLayerTranscoder`]): Gives configuration, parameters and statistics. Any activation function and
            reach; no tying and no skip connection.
        inputs (`Tensor` of shape `(N, L, D)`): Raw inputs.
        labels (`Tensor` of shape `(N, L, D)`): Raw targets.

    Returns:
        `tuple[Tensor, Tensor]`: The reconstruction loss, and the sparsity loss with λ at full scale (0 where λ is 0).
        Their sum is what is trained on.

    Raises:
        ValueError: For a CLT with tied decoders or a skip connection.
    """
    config = clt.config
    if config.decoder_tying != "none" or config.skip_connection:
        raise ValueError(
            f"decoder_tying={config.decoder_tying!r}, skip_connection={config.skip_connection}: the dense reference "
            "has neither; give decoder_tying='none' and skip_connection=False"
        )
    if clt.mean_in is not None:
        inputs = (inputs - clt.mean_in) / clt.std_in
        labels = (labels - clt.mean_out) / clt.std_out
    num_tokens = inputs.shape[0]
    pre_activations = [
        F.linear(inputs[:, s].to(encoder.weight.dtype), encoder.weight, encoder.bias)
        for s, encoder in enumerate(clt.encoders)
    ]
    bias = torch.stack([decoder.bias for decoder in clt.decoders])
    # Sums over many source layers and dimensions want float32 at least.
    reconstruction = bias.to(torch.promote_types(bias.dtype, torch.float32)).expand(num_tokens, -1, -1).clone()
    penalties = []
    for s, acts in enumerate(dense_activations(clt, pre_activations)):
        reconstruction, norms = _AddDecoded.apply(
            reconstruction, acts, clt.decoders[s].weight, s, config.sparsity_lambda > 0
        )
        if norms is not None:
            penalties.append(torch.tanh((config.sparsity_c * norms) * acts).sum())
    error = F.mse_loss(reconstruction, labels.to(reconstruction.dtype), reduction="sum") / num_tokens
    if not penalties:
        return error, 0 * error
    return error, config.sparsity_lambda * torch.stack(penalties).sum() / num_tokens


def dense_activations(clt, pre_activations: list[Tensor]) -> list[Tensor]:
    """The activation function in training: one (N, F) tensor of pre-activations per layer to one of activations."""
    config = clt.config
    if config.activation_fn == "relu":
        return [F.relu(h) for h in pre_activations]
    if config.activation_fn == "jumprelu":
        return [
            _JumpReLU.apply(h, threshold.value.exp(), config.jumprelu_bandwidth)
            for h, threshold in zip(pre_activations, clt.thresholds, strict=True)
        ]
    if config.k_scope == "token":
        (acts,) = _largest([torch.cat(pre_activations, dim=1)], config.activation_fn, config.k * config.num_layers)
        return list(acts.split(config.num_features, dim=1))
    return _largest(pre_activations, config.activation_fn, config.k)


def _largest(pre_activations: list[Tensor], activation_fn: str, k: int) -> list[Tensor]:
    """The k largest of each row (topk) or the k·N largest of each matrix (batchtopk), then ReLU; zeros elsewhere."""
    acts = []
    for h in pre_activations:
        rows = h if activation_fn == "topk" else h.view(1, -1)
        values, indices = rows.topk(k * h.shape[0] // rows.shape[0], dim=1, sorted=False)
        acts.append(torch.zeros_like(rows).scatter(1, indices, values.relu()).view_as(h))
    return acts


__all__ = ["dense_activations", "dense_losses"]
