"""
The cross-layer transcoder of Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language
Models".

Notation: L layers, F features per layer, D the width of the model, N tokens; s a source layer, t a target layer, R the
reach. x and y are raw inputs and targets, x̃ and ỹ normalised ones, ŷ a reconstruction.
"""

# No `from __future__ import annotations` here: it would make `config_class` a string, and `from_pretrained` fail.

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from . import folding
from . import release as files
from .configuration_clt import TOPK_FAMILY, CLTConfig
from .device import is_on_cpu
from .folding import STATISTICS, at_least_float32
from .kernels.decode import add_decoded, decode_layers, takes_layers
from .kernels.encode import encode_dense, encode_layers, pre_activation_sums, pre_activations_at
from .losses import (
    auxiliary_loss,
    list_by_block,
    norms_over_targets,
    preactivation_loss,
    reconstruction_loss,
    sparsity_loss,
)
from .selection import largest_dead, select, shares_budget, within_budget
from .sharding import FeatureShard, any_over, min_over, rows_of, sum_over, uniform_
from .sparsity import LayerFeatures, SparseFeatures, activate, join, sparse_from_dense, window_floor


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


THRESHOLD_DECAY = 0.999  # of batchtopk's running threshold
ALL_LAYERS = slice(None)
ENCODED_BYTES = 4 * 2**30  # of pre-activations that are there at once, where several layers are encoded together


@dataclass
class CLTOutput(ModelOutput):
    """
    Output of [`CrossLayerTranscoder`].

    Args:
        loss (scalar): Sum of the four terms below.
        reconstruction_loss (scalar): Σ_t mean_N ‖ỹ_t - ỹ̂_t‖².
        sparsity_loss (scalar): The tanh penalty, with λ and `sparsity_scale`.
        preactivation_loss (scalar): With its coefficient; 0 where nothing is dead.
        aux_loss (scalar): With its coefficient; 0 where nothing is dead.
        reconstruction (`Tensor` of shape `(..., L, D)`): Raw reconstruction of the MLP outputs.
        features ([`SparseFeatures`]): The feature activations.

    The five losses are None when no labels were given. Each can be back-propagated on its own.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    sparsity_loss: Tensor | None = None
    preactivation_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    reconstruction: Tensor | None = None
    features: SparseFeatures | None = None


class Encoder(nn.Module):
    """h_s = W_enc[s] x̃_s + b_enc[s], (N, D) to (N, F), in at least float32."""

    def __init__(self, num_features: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(wide_empty(num_features, d_model))
        self.bias = nn.Parameter(wide_empty(num_features))

    def forward(self, x: Tensor) -> Tensor:
        dtype = at_least_float32(self.weight.dtype)  # it is less in mapped files, and after `clt.to(dtype)`
        with record_function("clt::encode"):
            return encode_dense(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class Threshold(nn.Module):
    """
    θ of one layer, always in float32. For jumprelu `value` is log θ per feature, a parameter (F,); for batchtopk it is
    the running threshold, a buffer (1,), infinite before the first training batch.
    """

    def __init__(self, config: CLTConfig, num_features: int):
        super().__init__()
        if config.activation_fn == "jumprelu":
            self.value = nn.Parameter(torch.empty(num_features, dtype=torch.float32))
        else:
            self.register_buffer("value", torch.empty(1, dtype=torch.float32))
        self.is_log = config.activation_fn == "jumprelu"

    def forward(self) -> Tensor:
        return self.value.exp() if self.is_log else self.value


class Decoder(nn.Module):
    """
    W_dec[s], shape (F, J, D), and the output bias b_dec of the layer.

    J is the number of target layers of source layer s. With `per_source` tying J = 1 and the row is written to all of
    them; with `per_target` tying J = 1 and module t holds what every source layer writes to target layer t.
    """

    def __init__(self, num_features: int, num_targets: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, num_targets, d_model))
        self.bias = nn.Parameter(wide_empty(d_model))
        self.in_file = False  # whether the weight is mapped from its file (`lazy=True`)

    def forward(
        self, reconstruction: Tensor, features: LayerFeatures, targets: slice, with_squares: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """
        Adds a_s W_dec[s] to the `targets` of (N, L, D), in place; with it, on demand, the sum of W_dec² over targets
        and dimensions, (F,), as stored (a tied decoder counts once).
        """
        with record_function("clt::decode"):
            if self.in_file:
                files.read_ahead(self.weight, features.indices)
            added, squares = add_decoded(reconstruction, features, self.weight, targets, with_squares)
        check_half(added, self.weight.dtype)
        return added, squares


class Skip(nn.Module):
    """x̃_t W_skip[t]: (N, D) to (N, D), in at least float32."""

    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(wide_empty(d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        dtype = at_least_float32(self.weight.dtype)
        return x.to(dtype) @ self.weight.to(dtype)


class Block(NamedTuple):
    """
    B consecutive source layers that are worked on at once, with their encoders, (B, F, D) and (B, F), and θ: (B · F,)
    for jumprelu, (B,) for batchtopk, 0 for relu and topk.
    """

    layers: slice
    weight: Tensor
    bias: Tensor
    theta: Tensor | float


class CrossLayerTranscoder(PreTrainedModel):
    """
    A cross-layer transcoder: features read the residual stream at one layer and write to the MLP outputs of that layer
    and all later ones.

    Inputs and outputs are always raw activations. Normalisation statistics, where set, are applied inside; they live
    in the model only while it trains, and `save_pretrained` folds them into the weights that it writes.

    Args:
        config ([`CLTConfig`]): The configuration.
        shard ([`FeatureShard`], *optional*): The slice of the features that this process holds; None: all of them.
            Then all processes of the group call the methods below together, with the same tokens. What is one per
            target layer (losses, reconstruction, biases, skips) is the same on each; what is one per feature
            (features, `dead`, gradients) is that of the slice.
    """

    config_class = CLTConfig
    base_model_prefix = ""
    main_input_name = "inputs"
    # A CLT's dtype is that of its decoders, nearly all of it. The mean of raw activations, which can be thousands of
    # times their spread, cancels between W_enc x and b_enc, and W_skip x and b_dec: not so in half precision.
    _keep_in_fp32_modules_strict = ["thresholds", "encoders", "skips", "decoders.*.bias"]
    lazy = False  # whether the weights stay in their files; see `from_pretrained`
    threshold_decay: float = THRESHOLD_DECAY  # smaller where the trainer has a mean of few batches
    training_k: int | None = None  # k in train mode, where the trainer anneals it; None: that of the configuration
    layers_together: bool | None = None  # whether all layers are worked on at once; None: as `_blocks` says

    def __init__(self, config: CLTConfig, shard: FeatureShard | None = None):
        if config.num_layers is None:
            raise ValueError("num_layers=None: give num_layers, d_model and num_features")
        super().__init__(config)
        self.shard = shard
        held = rows_of(shard, config.num_features)
        self.num_held = held.stop - held.start  # features per layer that are here: F, or F / n
        layers, f, d = range(config.num_layers), self.num_held, config.d_model
        tied = config.decoder_tying != "none"
        self.encoders = nn.ModuleList(Encoder(f, d) for _ in layers)
        self.decoders = nn.ModuleList(Decoder(f, 1 if tied else config.num_targets(s), d) for s in layers)
        if config.activation_fn in ("jumprelu", "batchtopk"):
            self.thresholds = nn.ModuleList(Threshold(config, f) for _ in layers)
        if config.skip_connection:
            self.skips = nn.ModuleList(Skip(d) for _ in layers)
        for name in STATISTICS:
            self.register_buffer(name, None)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, Encoder):
            uniform_(self.shard, module.weight, config.num_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, Decoder):
            uniform_(self.shard, module.weight, (config.num_layers * config.d_model) ** -0.5)
            init.zeros_(module.bias)
        elif isinstance(module, Threshold):
            init.constant_(module.value, torch.tensor(config.jumprelu_threshold).log() if module.is_log else torch.inf)
        elif isinstance(module, Skip):
            init.zeros_(module.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the decoders; encoders, biases, skips and thresholds are at least float32."""
        return self.decoders[0].weight.dtype

    def cast_decoders(self, dtype: torch.dtype) -> None:
        """Makes `dtype` that of the CLT."""
        for decoder in self.decoders:
            decoder.weight.data = decoder.weight.data.to(dtype)

    # -- the equations ------------------------------------------------------------------------------------------------

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        sparsity_scale: float | Tensor = 1.0,
        dead: Tensor | None = None,
    ) -> CLTOutput:
        """
        Args:
            inputs (`Tensor` of shape `(..., L, D)`): What features read at each layer, raw.
            labels (`Tensor` of shape `(..., L, D)`, *optional*): The MLP outputs to reconstruct, raw.
            sparsity_scale (`float` or scalar `Tensor`, defaults to 1): Multiplies λ; the trainer's schedule.
            dead (`Tensor` of shape `(L, F)`, bool, *optional*): Features that the pre-activation and the auxiliary
                loss revive; None: none.

        Returns:
            [`CLTOutput`]

        Raises:
            ValueError: If a shape does not fit, or for a batchtopk model in eval mode that was never trained.
        """
        config = self.config
        rows = self._flatten(inputs, labels, dead)
        revives = labels is not None and dead is not None and self._revives(dead)
        is_topk = config.activation_fn in TOPK_FAMILY
        has_penalty = labels is not None and config.sparsity_lambda > 0
        has_preactivation, has_auxiliary = revives and not is_topk, revives and is_topk

        x = self.normalize_inputs(rows)
        blocks = self._blocks(x)
        h, written = self._encode(x, blocks, self.training, dead if has_auxiliary else None)
        features = [block.halves()[0] for block in written]
        if self.training and config.activation_fn == "batchtopk":
            self._update_running_thresholds(features)
        if has_preactivation:  # before decoding, so that decoders get their gradients first: it takes less memory
            listed = list_by_block(dead, features[0].num_layers)
            sums = [
                pre_activation_sums(x[:, block.layers], block.weight, block.bias, some)
                for block, some in zip(blocks, listed, strict=True)
            ]
        normalized, norms = self._decode(written, x, with_norms=has_penalty or has_preactivation)
        norms = None if norms is None else norms.view(len(blocks), -1).unbind()
        if has_auxiliary:
            normalized, explained = normalized.split([len(x), len(x)])
        reconstruction = self.denormalize(normalized).view(inputs.shape)
        sparse = SparseFeatures(features, inputs.shape[:-2])
        if labels is None:
            return CLTOutput(reconstruction=reconstruction, features=sparse)

        targets = self.normalize_targets(labels.reshape(rows.shape))
        error = reconstruction_loss(targets, normalized)
        penalty = preactivation = auxiliary = 0 * error  # an absent term can be back-propagated as well
        if has_penalty:
            penalty = sum_over(
                self.shard, sparsity_loss(features, norms, config.sparsity_c, config.sparsity_first_layer)
            )
            penalty = config.sparsity_lambda * sparsity_scale * penalty
        if has_preactivation:
            thetas = [block.theta + torch.zeros_like(block.bias).flatten() for block in blocks]
            preactivation = sum_over(self.shard, preactivation_loss(h, sums, thetas, norms, listed))
            preactivation = config.preactivation_coef * preactivation
        if has_auxiliary:
            is_any_dead = sum_over(self.shard, dead.any().to(error.dtype)) > 0
            auxiliary = config.aux_coef * auxiliary_loss(targets, normalized, explained) * is_any_dead
        return CLTOutput(
            loss=error + penalty + preactivation + auxiliary,
            reconstruction_loss=error,
            sparsity_loss=penalty,
            preactivation_loss=preactivation,
            aux_loss=auxiliary,
            reconstruction=reconstruction,
            features=sparse,
        )

    def encode(self, inputs: Tensor) -> Tensor:
        """Feature activations (..., L, F) of raw inputs (..., L, D)."""
        return self.encode_sparse(inputs).to_dense()

    def encode_sparse(self, inputs: Tensor) -> SparseFeatures:
        """Feature activations of raw inputs (..., L, D), in the ragged form of the hot path."""
        x = self.normalize_inputs(self._flatten(inputs))
        _, features = self._encode(x, self._blocks(x), self.training)
        return SparseFeatures(features, inputs.shape[:-2])

    def decode(self, acts: Tensor | SparseFeatures, inputs: Tensor | None = None) -> Tensor:
        """
        Raw reconstruction (..., L, D) from feature activations.

        Args:
            acts (`Tensor` of shape `(..., L, F)`, or [`SparseFeatures`]): Feature activations.
            inputs (`Tensor` of shape `(..., L, D)`): Raw inputs, needed with a skip connection only.
        """
        if isinstance(acts, Tensor):
            if acts.shape[-2:] != (self.config.num_layers, self.num_held):
                raise ValueError(
                    f"acts have shape {tuple(acts.shape)}; expected (..., num_layers={self.config.num_layers}, "
                    f"num_features={self.num_held})"
                )
            acts = sparse_from_dense(acts)
        x = None
        if self.config.skip_connection:
            if inputs is None:
                raise ValueError("this CLT has a skip connection: call decode(acts, inputs) with the raw inputs")
            x = self.normalize_inputs(self._flatten(inputs))
        raw = self.denormalize(self._decode(acts.blocks, x)[0])
        return raw.view(*acts.batch_shape, *raw.shape[1:])

    def _flatten(self, inputs: Tensor, labels: Tensor | None = None, dead: Tensor | None = None) -> Tensor:
        """Checks the arguments of a forward pass; gives the inputs as (N, L, D)."""
        config = self.config
        if inputs.shape[-2:] != (config.num_layers, config.d_model):
            raise ValueError(
                f"inputs have shape {tuple(inputs.shape)}; expected (..., num_layers={config.num_layers}, "
                f"d_model={config.d_model})"
            )
        if labels is not None and labels.shape != inputs.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, inputs {tuple(inputs.shape)}; they must agree")
        if dead is not None and tuple(dead.shape) != (config.num_layers, self.num_held):
            raise ValueError(
                f"dead has shape {tuple(dead.shape)}; expected (num_layers={config.num_layers}, "
                f"num_features={self.num_held})"
            )
        if self.shard is not None and inputs.requires_grad:
            raise ValueError(
                "inputs require a gradient, which a process with a slice of the features cannot give; load the CLT "
                "without shard"
            )
        return inputs.reshape(-1, config.num_layers, config.d_model)

    # Normalisation: of all layers, (N, L, D), or of one, (N, D).

    def normalize_inputs(self, x: Tensor, layer: int | slice = ALL_LAYERS) -> Tensor:
        """x̃_s = (x_s - mean_in[s]) / std_in[s]."""
        return x if self.mean_in is None else (x - self.mean_in[layer]) / self.std_in[layer]

    def normalize_targets(self, y: Tensor, layer: int | slice = ALL_LAYERS) -> Tensor:
        """ỹ_t = (y_t - mean_out[t]) / std_out[t], in at least float32."""
        y = y.to(at_least_float32(y.dtype))
        return y if self.mean_out is None else (y - self.mean_out[layer]) / self.std_out[layer]

    def denormalize(self, normalized: Tensor, layer: int | slice = ALL_LAYERS) -> Tensor:
        """ŷ_t = ỹ̂_t · std_out[t] + mean_out[t]."""
        return normalized if self.mean_out is None else normalized * self.std_out[layer] + self.mean_out[layer]

    # From inputs to features: h at the entries that an activation function selects, then the function there.

    def encode_layer(self, layer: int, x: Tensor) -> LayerFeatures:
        """
        The features of one source layer as in eval mode, also while the CLT is in train mode.

        Args:
            layer (`int`): The source layer.
            x (`Tensor` of shape `(N, D)`): Its inputs, normalised (see `normalize_inputs`).

        Raises:
            ValueError: For a CLT whose layers share a budget of active features, or a batchtopk one never trained.
        """
        if shares_budget(self.config, False, self.shard):
            raise ValueError(
                f"layer={layer}: the features of this topk CLT compete with those of other layers or processes; "
                "use encode_sparse, for all layers"
            )
        block = self._block(layer)
        self.check_running_thresholds([block.theta])
        selected, _ = self._select(block, x[:, None], block.theta, self.config.k, training=False)
        h = pre_activations_at(x[:, None], block.weight, block.bias, selected)
        return activate(h, block.theta, self.config, training=False)

    def _block(self, layer: int) -> Block:
        encoder = self.encoders[layer]
        return Block(slice(layer, layer + 1), encoder.weight[None], encoder.bias[None], self.theta(layer))

    def _blocks(self, x: Tensor) -> list[Block]:
        """
        The layers, in blocks that are worked on at once: one by one on a CPU, where each stays in a cache; in training
        on a GPU, where each launch costs and memory for copies of the encoders is there, all, unless they share a
        budget, a decoder or a process group. (Hooks on the modules of single layers are not called then.)
        """
        config, together = self.config, self.layers_together
        if together is None:
            together = self.training and not is_on_cpu(x)
        alone = self.shard is not None or config.k_scope == "token" or config.decoder_tying == "per_target"
        if not together or alone or config.num_layers == 1:
            return [self._block(layer) for layer in range(config.num_layers)]
        weight, bias = (torch.stack([getattr(e, name) for e in self.encoders]) for name in ("weight", "bias"))
        theta = 0.0
        if hasattr(self, "thresholds"):
            values = torch.cat([threshold.value for threshold in self.thresholds])
            theta = values.exp() if self.thresholds[0].is_log else values
        return [Block(slice(0, config.num_layers), weight, bias, theta)]

    def _encode(
        self, x: Tensor, blocks: list[Block], training: bool, dead: Tensor | None = None
    ) -> tuple[list[LayerFeatures], list[LayerFeatures]]:
        """
        Pre-activations and activations of the source layers, in blocks, from normalised inputs (N, L, D), where an
        activation or its gradient can be non-zero.

        With `dead`, (L, F) bool, the result has twice the rows. The first half has the features of each token as ever,
        the second the largest dead features of the same token, which the auxiliary loss revives; one pass decodes and
        differentiates both. A row is independent of the others from here on, so this changes nothing in the first.
        """
        config = self.config
        k = self.training_k if training and self.training_k is not None else config.k
        thetas = [block.theta for block in blocks]
        if not training:
            self.check_running_thresholds(thetas)
        # Where h is wanted ...
        lower = thetas
        if config.activation_fn == "jumprelu" and training and torch.is_grad_enabled():
            # Inactive features inside the straight-through window receive gradient for their threshold.
            lower = [window_floor(theta, config.jumprelu_bandwidth) for theta in thetas]
        found = [
            self._select(block, x[:, block.layers], floor, k, training, None if dead is None else dead[block.layers])
            for block, floor in zip(blocks, lower, strict=True)
        ]
        selected = within_budget([own for own, _ in found], config, k, training, self.shard)
        if dead is not None:
            selected = [own.with_dead(others) for own, (_, others) in zip(selected, found, strict=True)]
        # ... h there, differentiable, and the activation function.
        h = [
            pre_activations_at(x[:, block.layers], block.weight, block.bias, some)
            for block, some in zip(blocks, selected, strict=True)
        ]
        return h, [activate(some, theta, config, training) for some, theta in zip(h, thetas, strict=True)]

    def theta(self, layer: int) -> Tensor | float:
        """θ of one layer: (F,) for jumprelu; (1,) for batchtopk, the running threshold; 0 for relu and topk."""
        return self.thresholds[layer]() if hasattr(self, "thresholds") else 0.0

    def check_running_thresholds(self, thetas: list[Tensor | float]) -> None:
        """Raises ValueError if these are batchtopk's and no training batch has started them."""
        if self.config.activation_fn == "batchtopk" and any(theta.isinf().any() for theta in thetas):
            raise ValueError(
                "this batchtopk CLT has no running threshold yet: run forward on a batch in train mode first"
            )

    @torch.no_grad()
    def _select(
        self,
        block: Block,
        x: Tensor,
        lower: Tensor | float,
        k: int,
        training: bool,
        dead: Tensor | None = None,
    ) -> tuple[LayerFeatures, LayerFeatures | None]:
        """The selected entries of a block, x (N, B, D), and, with `dead`, (B, F) bool, its largest dead features."""
        num_layers, own, others = x.shape[1], [], []
        for part in parts_of(num_layers, x, self.num_held):
            if num_layers == 1:
                h = self.encoders[block.layers.start](x[:, 0])
            else:
                with record_function("clt::encode"):
                    h = encode_layers(x[:, part], block.weight[part], block.bias[part])
            above = lower
            if num_layers > 1 and isinstance(lower, Tensor):
                above = lower.view(num_layers, -1)[part].flatten()
            with record_function("clt::select"):
                own.append(select(h, above, self.config, k, training, part.stop - part.start))
                if dead is not None:
                    others.append(largest_dead(h, dead[part], self.config.aux_k, self.shard))
            del h  # before the next part has its own
        return join(own), join(others) if others else None

    def _revives(self, dead: Tensor) -> bool:
        """
        Whether there are dead features, and a loss that revives them. For the top-k family a GPU is not asked whether
        there are any, since that would wait for it; for the others selection waits in any case.
        """
        config = self.config
        is_topk = config.activation_fn in TOPK_FAMILY
        if not (config.aux_coef > 0 and config.aux_k > 0 if is_topk else config.preactivation_coef > 0):
            return False
        if is_topk and not is_on_cpu(dead):
            return True
        return any_over(self.shard, bool(dead.any()), dead.device)

    @torch.no_grad()
    def _update_running_thresholds(self, features: list[LayerFeatures]) -> None:
        """EMA of the smallest selected positive pre-activation; a batch without one leaves it."""
        smallest = [
            torch.segment_reduce(
                torch.where(f.values > 0, f.values, torch.inf),
                "min",
                offsets=f.offsets[torch.arange(f.num_layers + 1, device=f.offsets.device) * f.num_tokens],
                initial=torch.inf,
            )
            for f in features
        ]
        smallest = min_over(self.shard, torch.cat(smallest))
        if self.config.k_scope == "token":  # one budget over all layers has one threshold
            smallest = smallest.amin().expand_as(smallest)
        values = torch.cat([threshold.value for threshold in self.thresholds])
        average = self.threshold_decay * values + (1 - self.threshold_decay) * smallest
        moved = torch.where(values.isinf(), smallest, average)
        moved = torch.where(smallest.isinf(), values, moved)
        torch._foreach_copy_([threshold.value for threshold in self.thresholds], list(moved.split(1)))

    @torch.no_grad()
    def restart_running_thresholds(self) -> None:
        """Makes the next training batch start batchtopk's running thresholds, as the first one did."""
        for threshold in self.thresholds:
            threshold.value.fill_(torch.inf)

    # From features to MLP outputs.

    def _decode(
        self, features: list[LayerFeatures], x: Tensor | None, with_norms: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """
        ỹ̂_t = Σ_{s ≤ t, t-s < R} W_dec[s][:, t-s]ᵀ a_s + b_dec[t] (+ x̃_t W_skip[t]), (N, L, D), and on demand
        ‖W_dec[s][f]‖, (L, F). Rows of dead features, below those of the N tokens, are decoded without b_dec and skip:
        (2 N, L, D).
        """
        config = self.config
        bias = torch.stack([decoder.bias for decoder in self.decoders])
        start = bias.to(at_least_float32(bias.dtype)).expand(features[0].num_tokens, -1, -1)
        if config.skip_connection:
            start = start + torch.stack([skip(x[:, t]) for t, skip in enumerate(self.skips)], dim=1)
        if features[0].first is not None:
            start = torch.cat([start, torch.zeros_like(start)])
        if features[0].num_layers > 1:
            weights = [decoder.weight for decoder in self.decoders]
            if takes_layers(features[0], weights, start):
                tied = config.decoder_tying == "per_source"
                with record_function("clt::decode"):
                    normalized, squares = decode_layers(
                        start, features[0], weights, config.num_targets(0), tied, with_norms
                    )
                check_half(normalized, weights[0].dtype)
                return normalized, norms_over_targets(squares.view(len(weights), -1), config) if with_norms else None
        # Each process of a group adds up what its own features write.
        normalized = start.clone() if self.shard is None else torch.zeros_like(start)
        squares = [] if with_norms else None
        layers = [layer for block in features for layer in block.by_layer()]
        for s, layer_features in enumerate(layers):
            normalized = self.decode_layer(s, layer_features, normalized, squares)
        if self.shard is not None:
            normalized = start + sum_over(self.shard, normalized)
        return normalized, norms_over_targets(torch.stack(squares), config) if with_norms else None

    def decode_layer(
        self, layer: int, features: LayerFeatures, normalized: Tensor, squares: list[Tensor] | None = None
    ) -> Tensor:
        """
        Adds a_s W_dec[s][:, t-s] to all target layers t of one source layer, in place.

        Args:
            layer (`int`): The source layer s.
            features ([`LayerFeatures`]): Its features on N tokens.
            normalized (`Tensor` of shape `(N, L, D)`): The reconstruction so far, normalised.
            squares (`list`, *optional*): To append ‖W_dec[s][f]‖² to, (F,), as stored: a tied decoder counts once.
        """
        targets = range(layer, layer + self.config.num_targets(layer))
        if self.config.decoder_tying == "per_target":
            writers = [(t, slice(t, t + 1)) for t in targets]
        else:
            writers = [(layer, slice(targets.start, targets.stop))]
        for s, written in writers:
            wants_squares = squares is not None and s == layer
            normalized, square = self.decoders[s](normalized, features, written, wants_squares)
            if wants_squares:
                squares.append(square)
        return normalized

    # -- statistics ---------------------------------------------------------------------------------------------------

    def set_normalization(
        self, mean_in: Tensor, std_in: Tensor, mean_out: Tensor, std_out: Tensor, reparametrize: bool = False
    ) -> None:
        """
        Sets the statistics with which inputs and targets are normalised inside the model.

        Args:
            mean_in, std_in, mean_out, std_out (`Tensor` of shape `(L, D)`): Per layer and dimension, raw units;
                dimensions that do not vary are scaled as the others of their layer, see [`check_statistics`].
            reparametrize (`bool`): Changes the weights so that the function from raw inputs to raw reconstructions
                stays what it is; for going on with a published CLT. Otherwise the same weights act on normalised
                values from now on.

        Raises:
            ValueError: For a wrong shape, a value that is not finite, or `reparametrize` on a `per_source` CLT whose
                `std_out` differs between layers (one row cannot carry several output scales).
        """
        given = dict(zip(STATISTICS, (mean_in, std_in, mean_out, std_out), strict=True))
        folding.set_statistics(self, given, reparametrize)

    def fold_normalization(self) -> None:
        """
        Folds the statistics into the weights, in place: the same function, without statistics.

        A `per_source` CLT whose `std_out` differs between layers becomes untied, since one row cannot carry several
        output scales; its parameters are replaced (rebuild the optimizer), and `config.trained_decoder_tying`
        remembers the tie.
        """
        folding.fold(self)

    def folded(self) -> AbstractContextManager[None]:
        """A context in which the CLT is as its release has it; see [`hf_clt.folding.folded`]."""
        return folding.folded(self)

    # -- files --------------------------------------------------------------------------------------------------------

    def released_layer(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer as they are released; see [`hf_clt.release.released_layer`]."""
        return files.released_layer(self, layer)

    def per_feature(self) -> set[str]:
        """Names of the parameters that have a row per feature, of which a process may hold a slice."""
        names = {f"encoders.{s}.{part}" for s in range(self.config.num_layers) for part in ("weight", "bias")}
        names |= {f"decoders.{s}.weight" for s in range(self.config.num_layers)}
        return names | {name for name, _ in self.named_parameters() if name.startswith("thresholds.")}

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Writes the released CLT, statistics folded into the weights, and a model card. The live model is left as it
        is; every file is replaced as a whole or not at all.

        Args:
            save_directory (`str` or `Path`): Folder to write to; created if missing.
            is_main_process (`bool`): Whether this process writes. Where the features are spread over a group, all its
                processes call this, and the first writes.
            state_dict (`dict`, *optional*): The weights to save in the place of the CLT's own, as Accelerate and
                transformers' Trainer gather them from all processes.
            push_to_hub (`bool`): Whether to push as well, to `kwargs["repo_id"]`, by default the folder's name.
            kwargs: Passed to `push_to_hub`. Transformers' options on the format of files are taken where a CLT's
                files, whose names are fixed, are as they ask.

        Raises:
            ValueError: If files in another format are asked for, or a file of the folder is of another model.
        """
        files.save(self, save_directory, is_main_process, state_dict, push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: CLTConfig | None = None,
        lazy: bool = False,
        layers: list[int] | None = None,
        shard: FeatureShard | None = None,
        **kwargs: Any,
    ) -> "CrossLayerTranscoder":
        """
        Loads a CLT from a folder or from the Hub, or a folder that has circuit-tracer's files alone.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder, or a repository name on the Hub.
            config ([`CLTConfig`], *optional*): Used instead of the one in the folder.
            lazy (`bool`, defaults to `False`): Leaves encoders and untied decoders in their files, for the analysis of
                a CLT that may be larger than memory: on the CPU, in the dtype of the files, on Linux. It cannot be
                trained; its files must not be changed in place.
            layers (`list[int]`, *optional*): Downloads and reads these layers alone, onto the CPU, for looking at
                their features with `encode` and `decode`; the result is a [`PartialCLT`].
            shard ([`FeatureShard`], *optional*): Reads the rows of this slice of the features alone, onto the CPU.
            kwargs: Fields of `CLTConfig` to override, and what `PreTrainedModel.from_pretrained` takes (`revision`,
                `subfolder`, `dtype`, `device_map`, `token`, `cache_dir`, `output_loading_info`, ...).

        Raises:
            FileNotFoundError: If a weight file is missing; from the Hub also if the CLT is not in the cache and cannot
                be downloaded now.
            OSError: If the Hub has no such repository or revision, or the token may not read it.
            ValueError: If a file is truncated or does not fit the configuration, or an argument does not go with
                `lazy`, `layers` or `shard`.
            RuntimeError: If the weights cannot stay in their files, as on some network mounts.
        """
        name, read_whole = str(pretrained_model_name_or_path), super().from_pretrained
        return files.load(cls, read_whole, name, config, lazy, layers, shard, *args, **kwargs)

    def train(self, mode: bool = True) -> "CrossLayerTranscoder":
        """Sets training mode; a CLT loaded with `lazy=True` refuses, since a step would copy its files to memory."""
        if mode and self.lazy:
            raise ValueError("this CLT was loaded with lazy=True, for analysis; load it without lazy to train it")
        return super().train(mode)

    def to_jumprelu(self, batches: Iterable[dict], progress: bool = False) -> tuple["CrossLayerTranscoder", dict]:
        """
        A calibrated jumprelu CLT from this topk or batchtopk CLT, which stays as it is, and the figures of both; see
        [`hf_clt.evaluation.calibration.to_jumprelu`].
        """
        from .evaluation.calibration import to_jumprelu

        self._check_whole("to_jumprelu")
        return to_jumprelu(self, batches, progress)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> "CommitInfo":
        """Pushes the released CLT and its card to the Hub in one commit; see [`hf_clt.hub.push.push_to_hub`]."""
        from .hub.push import push_to_hub

        self._check_whole("push_to_hub")
        return push_to_hub(self, repo_id, **kwargs)

    def _check_whole(self, method: str) -> None:
        if self.shard is not None:
            raise ValueError(
                f"{method} on a CLT with a shard of the features; call save_pretrained on all processes, and {method} "
                "on what from_pretrained loads from there"
            )


def parts_of(num_layers: int, x: Tensor, num_features: int) -> list[slice]:
    """The layers of a block, of inputs (N, B, D), in as few parts as have at most ENCODED_BYTES of pre-activations."""
    size = (2 if torch.is_autocast_enabled(x.device.type) else 4) * len(x) * num_features  # of one layer
    parts = max(1, min(num_layers, -(-num_layers * size // ENCODED_BYTES)))
    ends = [num_layers * part // parts for part in range(parts + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def check_half(reconstruction: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if a reconstruction by weights of this dtype is not finite because that is float16."""
    if dtype == torch.float16 and not reconstruction.isfinite().all():
        raise ValueError("the reconstruction exceeds float16, which ends at 65,504; load the CLT in bfloat16")


def wide_empty(*shape: int) -> Tensor:
    """An uninitialised tensor for what stays at least float32 in a CLT of less; see `CrossLayerTranscoder`."""
    return torch.empty(shape, dtype=at_least_float32(torch.get_default_dtype()))


AutoModel.register(CLTConfig, CrossLayerTranscoder)

__all__ = ["CLTOutput", "CrossLayerTranscoder"]
