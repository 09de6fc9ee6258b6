"""
Trains cross-layer transcoders as public trainers do, on the cached activations of benchmarks.quality, and measures
them as that does: NMSE and L0 per layer on the held-out tokens, and CE recovered.

  python -m benchmarks.public_trainers --work FOLDER --model quickstart/model \\
      --records benchmarks/public_trainers.jsonl --trainers clt-forge clt-training

Coder, loss, start, optimizer and schedules of each are written anew from its source, which its function names, for one
process and 1,024 tokens per update in random order. FOLDER is that of benchmarks.quality, which makes the cache.
A run that is recorded is not made again.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.evaluation.metrics import MetricSums, ce_recovered
from hf_clt.harvest.cache import ActivationCache, CachedTokens, read_manifest
from hf_clt.training.reporting import versions

from .output import check_folders
from .quality import ACTIVATIONS, CrossEntropy, cache_identity, commit
from .sweep import append_record, as_key, read_records


BATCH = 1024
NUM_FEATURES = 1024
CE_TOKENS = 4000
CONVERTED = 1e-4  # what a converted CLT may differ by: root mean square, in standard deviations of the targets
KEY = ("trainer", "options", "seed", "cache", "products")  # of a record


# -- what the trainers share ------------------------------------------------------------------------------------------


class JumpReLU(torch.autograd.Function):
    """
    a = h · 1[h > θ] for h (N, F) and θ (F,), and 0 where h is negative. ∂a/∂θ = -(n/ε) · 1[|h - θ| < ε/2] with n = θ,
    or n = h (`by_h`); ∂a/∂h = 1[h > θ], or 1[h ≥ 0] (`from_zero`).
    """

    @staticmethod
    def forward(ctx, h, theta, bandwidth, by_h, from_zero):
        ctx.save_for_backward(h, theta)
        ctx.options = bandwidth, by_h, from_zero
        return torch.where(h > theta.clamp_min(0), h, 0)

    @staticmethod
    def backward(ctx, grad):
        h, theta = ctx.saved_tensors
        bandwidth, by_h, from_zero = ctx.options
        inside = torch.where((h - theta).abs_() < bandwidth / 2, grad, 0)
        grad_theta = -((inside * h).sum(dim=0) if by_h else inside.sum(dim=0) * theta) / bandwidth
        return torch.where(h >= 0 if from_zero else h > theta, grad, 0), grad_theta, None, None, None


class Coder(nn.Module):
    """
    A CLT of another trainer: `W_enc` (L, F, D), `b_enc` (L, F); of each source layer with its J target layers `W_dec`
    (J, F, D) and `b_dec` (J, D); `theta` (L, F) or its logarithm; `offset` (J, F), which is added to what is active
    before it is decoded; statistics (L, D). The start is that of the jumprelu trainers:
    U(-F^-1/2, F^-1/2) and U(-(L·D)^-1/2, (L·D)^-1/2).
    """

    def __init__(self, num_layers: int, num_features: int, d_model: int, k: int | None = None, is_log: bool = True):
        super().__init__()
        self.k, self.is_log, targets = k, is_log, range(num_layers, 0, -1)
        bounds = num_features**-0.5, (num_layers * d_model) ** -0.5
        self.W_enc = nn.Parameter(torch.empty(num_layers, num_features, d_model).uniform_(-bounds[0], bounds[0]))
        self.b_enc = nn.Parameter(torch.zeros(num_layers, num_features))
        weights = (torch.empty(n, num_features, d_model).uniform_(-bounds[1], bounds[1]) for n in targets)
        self.W_dec = nn.ParameterList(weights)
        self.b_dec = nn.ParameterList(torch.zeros(n, d_model) for n in targets)
        if k is None:
            theta = math.log(0.03) if is_log else 0.03
            self.theta = nn.Parameter(torch.full((num_layers, num_features), theta))
        else:
            self.offset = nn.ParameterList(torch.zeros(n, num_features) for n in targets)
        for name, value in (("mean_in", 0.0), ("std_in", 1.0), ("mean_out", 0.0), ("std_out", 1.0)):
            self.register_buffer(name, torch.full((num_layers, d_model), value))

    def thresholds(self) -> Tensor:
        return self.theta.exp() if self.is_log else self.theta

    def normalize(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.mean_in) / self.std_in, (y - self.mean_out) / self.std_out

    def jumprelu(self, x: Tensor, bandwidth: float, by_h: bool = False, from_zero: bool = False) -> tuple:
        """Pre-activations, activations, (N, F) per layer, and reconstruction, (N, D) per layer; all normalised."""
        h = [
            F.linear(x[:, s], *weights).to(x.dtype)
            for s, weights in enumerate(zip(self.W_enc, self.b_enc, strict=True))
        ]
        theta = self.thresholds()
        acts = [JumpReLU.apply(h_s, theta[s], bandwidth, by_h, from_zero) for s, h_s in enumerate(h)]
        outputs = [torch.zeros_like(x[:, 0]) for _ in acts]
        for s, a in enumerate(acts):
            for j, weight in enumerate(self.W_dec[s]):
                outputs[s + j] = outputs[s + j] + a @ weight
            for j, bias in enumerate(self.b_dec[s]):
                outputs[s + j] = outputs[s + j] + bias
        return h, acts, outputs

    def norms(self) -> list[Tensor]:
        """Of what a feature writes to all its target layers, (F,) per source layer."""
        return [torch.linalg.vector_norm(weight, dim=(0, 2)) for weight in self.W_dec]


class Layerwise:
    """A coder as the function (layer, raw inputs (N, D)) -> raw reconstruction that [`ReplacementModel`] takes."""

    def __init__(self, coder: Coder, read: Callable[[Tensor, int | slice], Tensor]):
        self.coder, self.read = coder, read

    def __call__(self, layer: int, inputs: Tensor, outputs: Tensor | None = None) -> Tensor:
        coder = self.coder
        if layer == 0:
            self.sums = coder.mean_in.new_zeros(len(inputs), *coder.mean_in.shape)
            self.acts = []
        x = (self.read(inputs, layer) - coder.mean_in[layer]) / coder.std_in[layer]
        a = F.linear(x, coder.W_enc[layer], coder.b_enc[layer])
        if coder.k is None:
            a = torch.where(a > coder.thresholds()[layer].clamp_min(0), a, 0)
        else:
            values, indices = a.relu().topk(coder.k, dim=1)
            a = torch.zeros_like(a).scatter_(1, indices, values)
        for j, weight in enumerate(coder.W_dec[layer]):
            written = a if coder.k is None else a + coder.offset[layer][j] * (a > 0)
            self.sums[:, layer + j] += written @ weight
        for j, bias in enumerate(coder.b_dec[layer]):
            self.sums[:, layer + j] += bias
        self.acts.append(a)
        return self.sums[:, layer] * coder.std_out[layer] + coder.mean_out[layer]

    def all_layers(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Raw reconstruction (N, L, D) and activations (N, L, F) of raw inputs (N, L, D)."""
        outputs = [self(layer, inputs[:, layer]) for layer in range(inputs.shape[1])]
        return torch.stack(outputs, dim=1), torch.stack(self.acts, dim=1)


@torch.no_grad()
def to_clt(coder: Coder) -> CrossLayerTranscoder:
    """The jumprelu CLT, in eval mode, with the statistics folded in, that a coder without offsets is."""
    num_layers, num_features, d_model = coder.W_enc.shape
    clt = CrossLayerTranscoder(CLTConfig(num_layers=num_layers, num_features=num_features, d_model=d_model))
    for s in range(num_layers):
        clt.encoders[s].weight.copy_(coder.W_enc[s])
        clt.encoders[s].bias.copy_(coder.b_enc[s])
        clt.decoders[s].weight.copy_(coder.W_dec[s].transpose(0, 1))
        clt.decoders[s].bias.copy_(sum(b[s - r] for r, b in enumerate(coder.b_dec[: s + 1]) if s - r < len(b)))
        clt.thresholds[s].value.copy_(coder.thresholds()[s].clamp_min(0).log())
    clt.set_normalization(coder.mean_in, coder.std_in, coder.mean_out, coder.std_out)
    clt.fold_normalization()
    return clt.eval()


class Batches:
    """The training tokens in random order, in updates of 1,024: pairs of what features read and targets, float32."""

    def __init__(self, inputs: Tensor, labels: Tensor, read: Callable, seed: int):
        self.inputs, self.labels, self.read = inputs, labels, read
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        self.rows = list(order.split(BATCH))[: len(inputs) // BATCH]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[number]  # beyond the last one an IndexError, which ends a loop
        return self.read(self.inputs[rows].float(), slice(None)), self.labels[rows].float()

    def coder(self, num_features: int, **options) -> Coder:
        _, num_layers, d_model = self.inputs.shape
        return Coder(num_layers, num_features, d_model, **options)


# -- the trainers -----------------------------------------------------------------------------------------------------


def clt_forge_loss(coder: Coder, x: Tensor, y: Tensor, l0: float, dead: float) -> Tensor:
    """
    Squared error, l0 · Σ tanh(4 a ‖W_dec‖) and dead · Σ relu(θ - h) ‖W_dec‖, summed over layers, dimensions and
    features, mean over tokens; ε = 1.
    """
    h, acts, outputs = coder.jumprelu(x, 1.0)
    loss = sum((output - y[:, t]).square().sum(dim=1).mean() for t, output in enumerate(outputs))
    for h_s, a, norm, theta in zip(h, acts, coder.norms(), coder.thresholds(), strict=True):
        loss = loss + l0 * (4 * a * norm).tanh().sum(dim=1).mean() if l0 else loss
        loss = loss + dead * ((theta - h_s).relu() * norm).sum(dim=1).mean()
    return loss


def clt_forge(batches: Batches, num_features: int, l0: float, rate: float) -> Coder:
    """
    LLM-Interp/CLT-Forge: `src/clt_forge/clt.py`, `training/clt_trainer.py`, `training/optim.py` and
    `training/activations_store.py`; the settings are those of `runners/gpt2/config.py`: Adam, a warm-up over 10
    updates (cosine), a decay over the last 20th, l0 linear over 70 %, gradients clipped to 1; its rate is 4e-4, its l0
    2. Inputs and targets are scaled to a norm of √D. Features read the normalised stream, before the norm's weight.

    Adapted: the biases start where 10,000 features per layer fire, which 1,024 cannot; here it is the share of them,
    10,000 of 24,576. `decay_stable_steps` is 0, its default: in the runner, which stops at a wanted L0, the rate is 0
    for a last quarter.
    """
    coder, steps = batches.coder(num_features), len(batches)
    few = [batches[n] for n in range(min(10, steps))]
    for name, part in (("std_in", 0), ("std_out", 1)):
        norm = torch.stack([batch[part].norm(dim=-1).mean(dim=0) for batch in few]).mean(dim=0)
        getattr(coder, name).copy_((norm / norm.new_tensor(coder.W_enc.shape[2]).sqrt())[:, None])
    with torch.no_grad():
        x = torch.cat([coder.normalize(*batch)[0] for batch in few[:5]])
        for s in range(x.shape[1]):
            h = F.linear(x[:, s], coder.W_enc[s]).sort(dim=0, descending=True).values
            coder.b_enc[s] = coder.thresholds()[s] - h[int(10_000 / 24_576 * len(h)) + 1]
    optimizer = torch.optim.Adam(coder.parameters(), lr=rate, betas=(0.9, 0.999), fused=True)
    decay, warmup = max(1, steps // 20 - 1), int(0.7 * steps) - 1
    for step in range(steps):
        loss = clt_forge_loss(coder, *coder.normalize(*batches[step]), l0 * min(1, step / warmup), 1e-5)
        update(optimizer, loss, clip=1.0)
        step += 1
        scale = 0.5 - 0.5 * math.cos(math.pi * step / 10) if step < 10 else min(1, (steps - step) / decay)
        optimizer.param_groups[0]["lr"] = rate * scale
    return coder


def crosslayer_coding_loss(coder: Coder, x: Tensor, y: Tensor, sparsity: float) -> Tensor:
    """
    The mean squared error in raw units, summed over layers; sparsity · Σ tanh(a ‖W_dec‖), summed over tokens too;
    3e-6 · mean relu(-h); ε = 1.
    """
    h, acts, outputs = coder.jumprelu(x, 1.0, by_h=True)
    loss = sum(((out - y[:, t]) * coder.std_out[t]).square().mean() for t, out in enumerate(outputs))
    if sparsity >= 1e-9:
        loss = loss + sparsity * sum((a * norm).tanh().sum() for a, norm in zip(acts, coder.norms(), strict=True))
    return loss + 3e-6 * sum((-h_s).relu().mean() for h_s in h) / len(h)


def crosslayer_coding(batches: Batches, num_features: int, sparsity: float, rate: float) -> Coder:
    """
    curt-tigges/crosslayer-coding: `scripts/train_clt.py` (settings), `clt/config/clt_config.py`,
    `clt/training/trainer.py`, `clt/models/activations.py`; utahnlp/crosslayer-coding, its copy:
    `clt/training/losses.py`, `clt/models/parallel.py`, `clt/training/data/manifest_activation_store.py`. AdamW, a rate
    (3e-4) that falls to a tenth, sparsity (1e-3; 3e-5 in `tutorials/1A-end-to-end-training-gpt2-relu.py`) linear from
    0, inputs and targets standardised per dimension; features read the residual stream, as in that tutorial.
    """
    coder, steps = batches.coder(num_features), len(batches)
    standardize(coder, [batches[n] for n in range(min(16, steps))], 1e-6)
    optimizer = torch.optim.AdamW(coder.parameters(), lr=rate, fused=True)
    for step in range(steps):
        update(optimizer, crosslayer_coding_loss(coder, *coder.normalize(*batches[step]), sparsity * step / steps))
        optimizer.param_groups[0]["lr"] = rate * (1 - 0.9 * (step + 1) / steps)
    return coder


def crosslayer_transcoder_loss(coder: Coder, x: Tensor, y: Tensor, sparsity: float) -> Tensor:
    """
    The mean squared error over tokens, layers and dimensions; sparsity · Σ tanh(a ‖W_dec‖) and 1e-6 · Σ relu(-h),
    mean over tokens, the latter over layers too; ε = 0.01.
    """
    h, acts, outputs = coder.jumprelu(x, 0.01, from_zero=True)
    loss = (torch.stack(outputs, dim=1) - y).square().mean()
    for h_s, a, norm in zip(h, acts, coder.norms(), strict=True):
        loss = loss + 1e-6 * (-h_s).relu().sum(dim=1).mean() / len(h)
        loss = loss + sparsity * (a * norm).tanh().sum(dim=1).mean()
    return loss


def crosslayer_transcoder(batches: Batches, num_features: int, sparsity: float, rate: float) -> Coder:
    """
    Goreg12345/crosslayer-transcoder: `crosslayer_transcoder/model/clt_lightning.py`, `clt.py`, `jumprelu.py`,
    `standardize.py` there; the settings are those of `config/jumprelu-clt.yaml`: Adam, a rate of 1e-4 and a tenth of
    it after 80 %, sparsity (7e-4) linear from 0, θ without a logarithm, inputs and targets standardised per dimension
    by the first batch, one bias per target layer; features read the residual stream.
    """
    coder, steps = batches.coder(num_features, is_log=False), len(batches)
    coder.b_dec = nn.ParameterList(bias[:1].detach() for bias in coder.b_dec)
    standardize(coder, [batches[0]], 0)
    optimizer = torch.optim.Adam(coder.parameters(), lr=rate, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate if step < 0.8 * steps else 0.1 * rate
        update(optimizer, crosslayer_transcoder_loss(coder, *coder.normalize(*batches[step]), sparsity * step / steps))
    return coder


def clt_training_loss(coder: Coder, x: Tensor, y: Tensor) -> Tensor:
    """The unexplained share of a batch's variance, summed over layers; the k largest count where they are above 0."""
    outputs = [0] * x.shape[1]
    for s in range(x.shape[1]):
        values, indices = F.linear(x[:, s], coder.W_enc[s], coder.b_enc[s]).relu().topk(coder.k, dim=1, sorted=False)
        for j, (weight, bias, offset) in enumerate(zip(coder.W_dec[s], coder.b_dec[s], coder.offset[s], strict=True)):
            written = values + offset[indices] * (values > 0)
            summed = F.embedding_bag(indices, weight, per_sample_weights=written, mode="sum")
            outputs[s + j] = outputs[s + j] + summed + bias
    shares = [
        (out - y[:, t]).square().sum() / (y[:, t] - y[:, t].mean(dim=0)).square().sum()
        for t, out in enumerate(outputs)
    ]
    return sum(shares)


def clt_training(batches: Batches, num_features: int, k: int, rate: float) -> Coder:
    """
    EleutherAI/clt-training: `sparsify/sparse_coder.py`, `runner.py`, `trainer.py`, `fused_encoder.py`, `config.py`:
    its defaults with `cross_layer`, `transcode`, and `normalize_io` as in `scripts/training/gpt2-sweep`. Sign updates
    under schedule-free averaging with momentum 0.95 (facebookresearch/schedule_free, `schedulefree/
    wrap_schedulefree_reference.py`): z moves by the sign of the gradient at y = x + 0.05 (z - x), x is the mean of
    all z. Decoders start at 0, the own layer's bias at the mean. Features read the MLP's input.
    """
    coder = batches.coder(num_features, k=k)
    x, y = batches[0]
    with torch.no_grad():
        for name, value in (("std_in", x), ("std_out", y)):
            getattr(coder, name).copy_(value.norm(dim=-1).mean(dim=0)[:, None] / value.shape[2] ** 0.5)
        coder.W_enc.uniform_(-(x.shape[2] ** -0.5), x.shape[2] ** -0.5)
        for s, weights in enumerate(coder.W_dec):
            weights.zero_()
            coder.b_enc[s] = -(coder.W_enc[s] @ (x[:, s].mean(dim=0) / coder.std_in[s]))
            coder.b_dec[s][0] = y[:, s].mean(dim=0) / coder.std_out[s]
    points = list(coder.parameters())
    last = [point.detach().clone() for point in points]  # z
    mean = [point.detach().clone() for point in points]  # x; the coder itself is at y
    for step in range(len(batches)):
        clt_training_loss(coder, *coder.normalize(*batches[step])).backward()
        with torch.no_grad():
            for y_p, z_p, x_p in zip(points, last, mean, strict=True):
                z_p.sub_(y_p.grad.sign_(), alpha=rate)
                x_p.lerp_(z_p, 1 / (step + 1))
                y_p.copy_(x_p.lerp(z_p, 0.05))
                y_p.grad = None
    with torch.no_grad():
        for point, x_p in zip(points, mean, strict=True):
            point.copy_(x_p)
    return coder


def standardize(coder: Coder, few: list[tuple[Tensor, Tensor]], added: float) -> None:
    """Sets mean and standard deviation of each dimension."""
    for side, rows in (("in", torch.cat([x for x, _ in few])), ("out", torch.cat([y for _, y in few]))):
        getattr(coder, f"mean_{side}").copy_(rows.mean(dim=0))
        getattr(coder, f"std_{side}").copy_(rows.std(dim=0).clamp_min(1e-8) + added)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float | None = None) -> None:
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()


# Per trainer: its function, what features read, in what products are computed, and the options of the runs to make.
# The jumprelu trainers' own settings have half precision (autocast; weights and optimizer in float32).
FORGE = [(2.0, 4e-4), (2.0, 1.6e-3), (0.1, 1.6e-3), (2.0, 4e-3), (0.5, 4e-3), (0.15, 4e-3)]
TRAINING = [(16, 5e-3), (16, 1e-2), (16, 2e-2), (50, 5e-3), (50, 1e-2)]
TRAINERS = {
    "clt-forge": (clt_forge, "normalized", "bfloat16", [{"l0": l0, "rate": rate} for l0, rate in FORGE]),
    "clt-training": (clt_training, "mlp input", "float32", [{"k": k, "rate": rate} for k, rate in TRAINING]),
    "crosslayer-coding": (
        crosslayer_coding,
        "residual",
        "bfloat16",
        [{"sparsity": sparsity, "rate": 1.2e-3} for sparsity in (1e-6, 3e-5)],
    ),
    "crosslayer-transcoder": (
        crosslayer_transcoder,
        "residual",
        "bfloat16",
        [{"sparsity": 7e-4, "rate": rate} for rate in (1e-3, 4e-3)],
    ),
}


# -- the runs ---------------------------------------------------------------------------------------------------------


def reader(model: nn.Module, what: str) -> Callable[[Tensor, int | slice], Tensor]:
    """From the residual stream before the MLP, (..., D) of a layer or (..., L, D), to what features read."""
    if what == "residual":
        return lambda x, layer: x
    norms = [getattr(block, "post_attention_layernorm", None) for block in getattr(model.base_model, "layers", [None])]
    if None in norms:
        raise ValueError(
            f"model has no post_attention_layernorm, for trainers that read the {what}; give one of Llama's"
        )
    weight = torch.stack([norm.weight.detach() for norm in norms])
    if what == "normalized":
        weight = torch.ones_like(weight)
    epsilon = norms[0].variance_epsilon

    def read(x: Tensor, layer: int | slice) -> Tensor:
        scaled = x * (x.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
        return scaled * (weight[: x.shape[-2]] if isinstance(layer, slice) else weight[layer])

    return read


def load_split(cache: ActivationCache, split: str) -> tuple[Tensor, Tensor]:
    """All inputs and labels of a split, (N, L, D) each, in the cache's dtype."""
    num_tokens, done = cache.manifest["splits"][split]["tokens"], 0
    inputs, labels = (torch.empty(num_tokens, cache.num_layers, cache.d_model, dtype=cache.dtype) for _ in range(2))
    for batch in CachedTokens(cache, split):
        some = cache.harvest(batch, cache.dtype)
        rows = slice(done, done := done + len(some[0]))
        inputs[rows], labels[rows] = some
    return inputs, labels


@torch.no_grad()
def measure(coder: Coder, read: Callable, heldout: tuple[Tensor, Tensor], entropy: CrossEntropy) -> dict:
    """
    What is recorded of a trained coder.

    Raises:
        RuntimeError: If the CLT that it is converted to, where it can be, reconstructs otherwise.
    """
    function, error = Layerwise(coder, read), None
    (num_layers, d_model), num_features = coder.mean_in.shape, coder.W_enc.shape[1]
    sums = MetricSums(num_layers, d_model, num_features)
    for x, y in zip(heldout[0].split(BATCH), heldout[1].split(BATCH), strict=True):
        reconstruction, acts = function.all_layers(x.float())
        sums.update(y.float(), reconstruction, acts)
        if coder.k is None and error is None:
            y = y.float() - y.float().mean(dim=0)
            other = to_clt(coder)(read(x.float(), slice(None))).reconstruction
            squares = (other - reconstruction).square().sum(dim=(0, 2))
            error = (squares / y.square().sum(dim=(0, 2))).max().sqrt().item()
            if not error <= CONVERTED:
                raise RuntimeError(f"the converted CLT differs by {error:.1e} standard deviations of the targets")
    metrics = sums.compute()
    replaced = entropy.mean(function)
    names = ("nmse", "nmse_per_layer", "l0", "l0_per_layer", "dead_fraction", "num_tokens")
    return {name: metrics[name] for name in names} | {
        "conversion_error": error,
        "cross_entropy": {
            "ce_original": entropy.original,
            "ce_replaced": replaced,
            "ce_ablated": entropy.ablated,
            "ce_recovered": ce_recovered(entropy.original, replaced, entropy.ablated),
        },
    }


def run_all(planned: list[dict], records: Path, cache: Path, model: Path) -> list[dict]:
    """
    Makes the runs that are not recorded yet, and appends a line to `records` after each.

    Args:
        planned: What tells a run from others, see `KEY`.
        records: A JSONL file.
        cache, model: Folders of the activations and of the whole language model.

    Returns:
        The records of all these runs.
    """

    def key(record: dict) -> str:
        return as_key({name: record[name] for name in KEY})

    done = {key(record): record for record in read_records(records)}
    missing = [run for run in planned if key(run) not in done]
    if missing:
        torch.set_flush_denormal(True)  # as our trainer does: on a CPU they take many times as long
        activations = ActivationCache(cache)
        entropy = CrossEntropy(model, cache, CE_TOKENS)
        train, heldout = load_split(activations, "train"), load_split(activations, "heldout")
    for number, run in enumerate(missing, start=1):
        options = ", ".join(f"{name} {value:g}" for name, value in run["options"].items())
        print(f"[{number} of {len(missing)}] {run['trainer']}, {options}, seed {run['seed']}", flush=True)
        function, reads, _, _ = TRAINERS[run["trainer"]]
        read, start = reader(entropy.model, reads), time.perf_counter()
        torch.manual_seed(run["seed"])
        batches = Batches(*train, read, run["seed"])
        with torch.autocast("cpu", torch.bfloat16, enabled=run["products"] == "bfloat16"):
            coder = function(batches, NUM_FEATURES, **run["options"])
        seconds = round(time.perf_counter() - start, 1)
        record = {**run, "reads": reads, "num_features": NUM_FEATURES, "updates": len(batches)}
        record |= {**measure(coder, read, heldout, entropy), "train_seconds": seconds}
        append_record(records, {**record, "commit": commit(), "versions": versions()})
        done[key(run)] = record
        l0, recovered = record["l0"] / coder.W_enc.shape[0], record["cross_entropy"]["ce_recovered"]
        print(f"    NMSE {record['nmse']:.4f}, L0 {l0:.1f}, CE recovered {recovered:.1%}, {seconds:.0f} s", flush=True)
    return [done[key(run)] for run in planned]


def format_records(records: list[dict]) -> str:
    """The records as a Markdown table."""
    layers = range(len(records[0]["nmse_per_layer"]))
    lines = ["| | seed | L0 | NMSE | " + " | ".join(f"{'layer ' * (t == 0)}{t}" for t in layers) + " | CE recovered |"]
    lines.append("|" + "---|" * (5 + len(layers)))
    for record in records:
        options = ", ".join(f"{name} {value:g}" for name, value in record["options"].items())
        cells = [f"{record['trainer']}, {options}", str(record["seed"]), f"{record['l0'] / len(layers):.1f}"]
        cells += [f"{record['nmse']:.4f}", *(f"{value:.3f}" for value in record["nmse_per_layer"])]
        lines.append("| " + " | ".join([*cells, f"{record['cross_entropy']['ce_recovered']:.1%}"]) + " |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="that of benchmarks.quality")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the whole language model")
    parser.add_argument("--records", type=Path, required=True, metavar="FILE", help="JSONL file, a line per run")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), metavar="NAME", help=", ".join(TRAINERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    return parser


@one_line_errors(interrupted="the same command goes on with the next run")
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    check_folders(options.records)
    for name in options.trainers:
        if name not in TRAINERS:
            raise ValueError(f"trainers={name!r} is unknown; choose from {', '.join(TRAINERS)}")
    cache = options.work / ACTIVATIONS
    identity = cache_identity(read_manifest(cache))
    planned = [
        {"trainer": name, "options": given, "seed": seed, "cache": identity, "products": products}
        for seed in options.seeds
        for name, (_, _, products, runs) in TRAINERS.items()
        if name in options.trainers
        for given in runs
    ]
    print(format_records(run_all(planned, options.records, cache, options.model)))


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["format_records", "run_all", "to_clt"]
