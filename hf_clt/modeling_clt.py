"""
The cross-layer transcoder of Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language
Models".

Notation: L layers, F features per layer, D the width of the model, N tokens; s a source layer, t a target layer, R the
reach. x and y are raw inputs and targets, x̃ and ỹ normalised ones, ŷ a reconstruction.
"""

# No `from __future__ import annotations` here: it would make `config_class` a string, and `from_pretrained` fail.

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from . import folding
from . import release as files
from .configuration_clt import CLT_CONFIG_HELP, TOPK_FAMILY, CLTConfig
from .device import values_at_hand
from .download import HUB_ARGUMENTS, find_folder
from .folding import STATISTICS, at_least_float32
from .kernels.decode import add_decoded
from .kernels.encode import encode_dense, pre_activations_at
from .losses import dead_above, largest_dead, preactivation_loss, reconstruction_loss, safe_sqrt, sparsity_loss
from .sharding import FeatureShard, any_over, min_over, rows_of, sum_over, uniform_
from .sparsity import (
    AtEntries,
    JumpReLU,
    LayerFeatures,
    SparseFeatures,
    batchtopk_over_layers,
    entries_at,
    features_at,
    positions_batchtopk,
    positions_topk,
    sparse_from_dense,
    topk_over_layers,
)


logger = logging.getLogger(__name__)

THRESHOLD_DECAY = 0.999  # of batchtopk's running threshold


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
    """
    h_s = W_enc[s] x̃_s + b_enc[s], (N, D) to (N, F), of which only the entries that are asked for stay.
    """

    def __init__(self, num_features: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(wide_empty(num_features, d_model))
        self.bias = nn.Parameter(wide_empty(num_features))

    def forward(
        self,
        x: Tensor,
        select: list[Callable[[Tensor], LayerFeatures]] | None = None,
        selected: list[LayerFeatures] | None = None,
        dead: Tensor | None = None,
    ) -> tuple[LayerFeatures, int, Tensor | None]:
        """
        Args:
            x: (N, D).
            select: From all pre-activations, (N, F), to the entries that matter; and perhaps, in a second function, to
                those of dead features, which stand in the result as if N more tokens had them.
            selected: Such entries, instead of `select`.
            dead: Features of which Σ_n h is wanted, (dead,) int64.

        Returns:
            The entries with their h, how many of them are of the first function, and Σ_n h of the dead features,
            (dead,) or None; all differentiable.
        """
        x, weight, bias = self._wide(x)
        if selected is None:
            with torch.no_grad():
                with record_function("clt::encode"):
                    h = encode_dense(x, weight, bias)
                with record_function("clt::select"):
                    selected = [choose(h) for choose in select]
        # no matmul, which autocast would round to half precision
        sums = None if dead is None else (weight[dead] * x.sum(dim=0)).sum(dim=1) + len(x) * bias[dead]
        listed = selected[0] if len(selected) == 1 else selected[0].followed_by(selected[1])
        features = pre_activations_at(x if len(selected) == 1 else x.repeat(2, 1), weight, bias, listed)
        return features, selected[0].indices.numel(), sums

    def pre_activations(self, x: Tensor) -> Tensor:
        """h of all features, (N, D) to (N, F)."""
        return encode_dense(*self._wide(x))

    def _wide(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = at_least_float32(
            self.weight.dtype
        )  # less than float32 only in mapped files, and after `clt.to(dtype)`
        return x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)


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

    @torch.no_grad()
    def update(self, smallest_selected: Tensor, decay: float) -> None:
        """Moves the running threshold towards the smallest selected pre-activation of a batch; infinite: none was."""
        average = decay * self.value + (1 - decay) * smallest_selected
        moved = torch.where(self.value.isinf(), smallest_selected, average)
        self.value.copy_(torch.where(smallest_selected.isinf(), self.value, moved))


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
        self, reconstruction: Tensor, features: LayerFeatures, target: int, num_targets: int, with_squares: bool
    ) -> tuple[Tensor, Tensor | None]:
        """
        Adds a_s W_dec[s] to target layers `target` to `target + num_targets` of (N, L, D), in place; with it, on
        demand, the sum of W_dec² over targets and dimensions, (F,), as stored (a tied decoder counts once).
        """
        with record_function("clt::decode"):
            if self.in_file:
                files.read_ahead(self.weight, features.indices)
            added, squares = add_decoded(reconstruction, features, self.weight, target, num_targets, with_squares)
        if self.weight.dtype == torch.float16 and not added.isfinite().all():
            raise ValueError("the reconstruction exceeds float16, which ends at 65,504; load the CLT in bfloat16")
        return added, squares


class Skip(nn.Module):
    """x̃_t W_skip[t]: (N, D) to (N, D), in at least float32."""

    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(wide_empty(d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        dtype = at_least_float32(self.weight.dtype)
        return x.to(dtype) @ self.weight.to(dtype)


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
        sparsity_scale: float = 1.0,
        dead: Tensor | None = None,
    ) -> CLTOutput:
        """
        Args:
            inputs (`Tensor` of shape `(..., L, D)`): What features read at each layer, raw.
            labels (`Tensor` of shape `(..., L, D)`, *optional*): The MLP outputs to reconstruct, raw.
            sparsity_scale (`float`, defaults to 1): Multiplies λ; the trainer raises it from 0 to 1.
            dead (`Tensor` of shape `(L, F)`, bool, *optional*): Features that the pre-activation and the auxiliary
                loss shall revive; None = none.

        Returns:
            [`CLTOutput`]

        Raises:
            ValueError: If a shape does not fit, or for a batchtopk model in eval mode that was never trained.
        """
        config = self.config
        if dead is not None and tuple(dead.shape) != (config.num_layers, self.num_held):
            raise ValueError(
                f"dead has shape {tuple(dead.shape)}; expected (num_layers={config.num_layers}, "
                f"num_features={self.num_held})"
            )
        x = self._normalized_inputs(inputs)
        revived = None if dead is None or labels is None else self._to_revive(dead)
        features, written, above, sums = self._features(x, self.training, self.training, revived)
        penalises = config.sparsity_lambda > 0
        revives = revived is not None and config.activation_fn not in TOPK_FAMILY
        wants_norms = labels is not None and (penalises or revives)
        normalized, norms = self._decode(written, x, with_norms=wants_norms)
        normalized, *explained = normalized.split(max(1, len(x)))  # the second half is of dead features
        reconstruction = self._denormalize(normalized, inputs.shape[:-2])
        sparse = SparseFeatures(features, inputs.shape[:-2])
        if labels is None:
            return CLTOutput(reconstruction=reconstruction, features=sparse)
        if labels.shape != inputs.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, inputs {tuple(inputs.shape)}; they must agree")

        targets = self._normalized_targets(labels)
        error = reconstruction_loss(targets, normalized)
        penalty = preactivation = auxiliary = 0 * error  # an absent term can be back-propagated as well
        if penalises:
            penalty = sum_over(self.shard, sparsity_loss(features, norms, config.sparsity_c))
            penalty = config.sparsity_lambda * sparsity_scale * penalty
        if revives:
            thetas = self._thresholds_or_zero()
            preactivation = sum_over(self.shard, preactivation_loss(sums, above, thetas, norms, revived))
            preactivation = config.preactivation_coef * preactivation
        elif explained:
            is_any_dead = sum_over(self.shard, dead.any().to(error.dtype)) > 0
            auxiliary = reconstruction_loss((targets - normalized).detach(), explained[0])
            auxiliary = config.aux_coef * auxiliary * is_any_dead
        return CLTOutput(
            loss=error + penalty + preactivation + auxiliary,
            reconstruction_loss=error,
            sparsity_loss=penalty,
            preactivation_loss=preactivation,
            aux_loss=auxiliary,
            reconstruction=reconstruction,
            features=sparse,
        )

    def encode_sparse(self, inputs: Tensor) -> SparseFeatures:
        """Feature activations of raw inputs (..., L, D), in the ragged form of the hot path."""
        features, *_ = self._features(self._normalized_inputs(inputs), training=self.training)
        return SparseFeatures(features, inputs.shape[:-2])

    def encode(self, inputs: Tensor) -> Tensor:
        """Feature activations (..., L, F) of raw inputs (..., L, D)."""
        return self.encode_sparse(inputs).to_dense()

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
            x = self._normalized_inputs(inputs)
        return self._denormalize(self._decode(acts.layers, x)[0], acts.batch_shape)

    def _normalized_inputs(self, inputs: Tensor) -> Tensor:
        """x̃_s = (x_s - mean_in[s]) / std_in[s], flattened to (N, L, D)."""
        expected = (self.config.num_layers, self.config.d_model)
        if inputs.shape[-2:] != expected:
            raise ValueError(
                f"inputs have shape {tuple(inputs.shape)}; expected (..., num_layers={expected[0]}, "
                f"d_model={expected[1]})"
            )
        if self.shard is not None and inputs.requires_grad:
            raise ValueError(
                "inputs require a gradient, which a process with a slice of the features cannot give; load the CLT "
                "without shard"
            )
        x = inputs.reshape(-1, *expected)
        return x if self.mean_in is None else (x - self.mean_in) / self.std_in

    def _normalized_targets(self, labels: Tensor) -> Tensor:
        """ỹ_t = (y_t - mean_out[t]) / std_out[t], flattened to (N, L, D)."""
        y = labels.reshape(-1, *labels.shape[-2:])
        y = y.to(at_least_float32(y.dtype))
        return y if self.mean_out is None else (y - self.mean_out) / self.std_out

    def _denormalize(self, normalized: Tensor, batch_shape: torch.Size) -> Tensor:
        """ŷ_t = ỹ̂_t · std_out[t] + mean_out[t], (N, L, D) to (*batch_shape, L, D)."""
        raw = normalized if self.mean_out is None else normalized * self.std_out + self.mean_out
        return raw.view(*batch_shape, *raw.shape[1:])

    def _features(
        self, x: Tensor, training: bool, update: bool = False, dead: Tensor | list[Tensor] | None = None
    ) -> tuple[list[LayerFeatures], list[LayerFeatures], list[LayerFeatures | None], list[Tensor | None]]:
        """
        The features of normalised inputs (N, L, D), source layer by source layer, so that the pre-activations of only
        one layer exist at a time.

        With `dead`, of [`_to_revive`], also what revives dead features. For the top-k family, second: the same
        features followed, as if N more tokens had them, by the largest of the dead ones, so that both are decoded and
        differentiated in one pass (otherwise the features again). For the others, third and fourth: the entries of
        dead features above their thresholds with their h, and Σ_n h of each dead feature.
        """
        config = self.config
        layers = range(config.num_layers)
        thetas = (
            [threshold() for threshold in self.thresholds] if hasattr(self, "thresholds") else [None for _ in layers]
        )
        if config.activation_fn == "batchtopk" and not training and any(theta.isinf().any() for theta in thetas):
            raise ValueError(
                "this batchtopk CLT has no running threshold yet: run forward on a batch in train mode first"
            )
        is_topk = config.activation_fn in TOPK_FAMILY
        select = [
            [partial(self._select, theta=theta, training=training, grad=torch.is_grad_enabled())] for theta in thetas
        ]
        for s in layers if dead is not None else ():
            if is_topk:
                select[s].append(partial(largest_dead, dead=dead[s], aux_k=config.aux_k, shard=self.shard))
            else:
                theta = thetas[s] if thetas[s] is not None else torch.zeros_like(self.encoders[s].bias)
                select[s].append(partial(dead_above, dead=dead[s], threshold=theta))
        summed = [None for _ in layers] if dead is None or is_topk else dead
        if self._shares_budget(training):
            # The budget is cut from each layer's candidates, and only what is kept is differentiated.
            with torch.no_grad():
                found = [encoder(x[:, s], select[s]) for s, encoder in enumerate(self.encoders)]
            parts = [entries.parted(len(x), count) for entries, count, _ in found]
            kept = self._within_budget([part for part, _ in parts], self._k(training), len(x))
            selected = [[k] if d is None else [k, d] for k, (_, d) in zip(kept, parts, strict=True)]
            found = [encoder(x[:, s], None, selected[s]) for s, encoder in enumerate(self.encoders)]
        else:
            found = [encoder(x[:, s], select[s], None, summed[s]) for s, encoder in enumerate(self.encoders)]
        features, written, above = [], [], []
        for s, ((entries, count, _), theta) in enumerate(zip(found, thetas, strict=True)):
            if is_topk:
                entries = self._activate(entries, theta, training, None if dead is None else dead[s], count)
            listed, others = entries.parted(len(x), count)
            features.append(listed if is_topk else self._activate(listed, theta, training))
            written.append(entries if is_topk else features[-1])
            above.append(listed if others is None and dead is not None else others)  # the same where N = 0
        if update and config.activation_fn == "batchtopk":
            self._update_running_thresholds(features)
        return features, written, above, [sums for *_, sums in found]

    def _k(self, training: bool) -> int:
        return self.training_k if training and self.training_k is not None else self.config.k

    def _shares_budget(self, training: bool) -> bool:
        """Whether features compete with those of other layers or processes: no layer can be selected on its own."""
        selects = self.config.activation_fn == "topk" or (self.config.activation_fn == "batchtopk" and training)
        return selects and (self.config.k_scope == "token" or self.shard is not None)

    def _within_budget(self, candidates: list[LayerFeatures], k: int, num_tokens: int) -> list[LayerFeatures]:
        """Of the candidates of each layer those that are within the budget of all layers, or of their own."""
        budget, select = k, topk_over_layers
        if self.config.activation_fn == "batchtopk":
            budget, select = k * num_tokens, batchtopk_over_layers
        if self.config.k_scope == "token":
            return select(candidates, budget * self.config.num_layers, self.shard)
        return [select([layer], budget, self.shard)[0] for layer in candidates]

    def _select(self, h: Tensor, theta: Tensor | None, training: bool, grad: bool) -> LayerFeatures:
        """Where the activation function of a layer, or its gradient, can be non-zero, with h there."""
        config = self.config
        if config.activation_fn in TOPK_FAMILY and (training or config.activation_fn == "topk"):
            k = min(self._k(training) * (config.num_layers if config.k_scope == "token" else 1), self.num_held)
            if config.activation_fn == "topk":
                return entries_at(h, positions_topk(h, k))
            return entries_at(h, positions_batchtopk(h, k * len(h)))
        lower = 0.0 if theta is None else theta
        if config.activation_fn == "jumprelu" and training and grad:
            # Inactive features inside the straight-through window receive gradient for their threshold.
            lower = theta - config.jumprelu_bandwidth / 2
        return features_at(h, h > lower)

    def _activate(
        self,
        features: LayerFeatures,
        theta: Tensor | None,
        training: bool,
        dead: Tensor | None = None,
        num_live: int | None = None,
    ) -> LayerFeatures:
        """
        The activation function on selected pre-activations, the gate included: those of a rough product (autocast) are
        computed again, and what was above it may be below. With `dead`, (F,) bool, the entries after the first
        `num_live` are rectified where they are of dead features, and 0 elsewhere.
        """
        if self.config.activation_fn == "jumprelu":
            at_entries = AtEntries.apply(theta, features)
            return features.with_values(JumpReLU.apply(features.values, at_entries, self.config.jumprelu_bandwidth))
        values = torch.relu(features.values)
        if self.config.activation_fn == "batchtopk" and not training:
            passes = values > theta
            passes[num_live if dead is not None else len(passes) :] = True
            values = values * passes
        if dead is not None:
            live, revived = values.tensor_split([num_live])
            values = torch.cat([live, revived * dead[features.indices[num_live:]]])
        return features.with_values(values)

    def _to_revive(self, dead: Tensor) -> Tensor | list[Tensor] | None:
        """
        Of the dead features, (L, F) bool, those to revive; None where no loss would, or where there are none. For the
        top-k family they stay as they are, since asking a GPU for their number would wait for it; for the others,
        whose selection waits in any case, they are listed, one (dead,) vector per layer.
        """
        config = self.config
        is_topk = config.activation_fn in TOPK_FAMILY
        if not (config.aux_coef > 0 and config.aux_k > 0 if is_topk else config.preactivation_coef > 0):
            return None
        if is_topk and not values_at_hand(dead):
            return dead
        if not any_over(self.shard, bool(dead.any()), dead.device):
            return None
        if is_topk:
            return dead
        layer, feature = dead.nonzero(as_tuple=True)
        return list(feature.split(layer.bincount(minlength=config.num_layers).tolist()))

    @torch.no_grad()
    def _update_running_thresholds(self, features: list[LayerFeatures]) -> None:
        """EMA of the smallest selected positive pre-activation; a batch without one leaves it."""
        infinite = self.thresholds[0].value.new_full((1,), torch.inf)
        smallest = [torch.cat([infinite, torch.where(f.values > 0, f.values, torch.inf)]).amin() for f in features]
        smallest = min_over(self.shard, torch.stack(smallest)).unbind()
        if self.config.k_scope == "token":  # one budget over all layers has one threshold
            smallest = [torch.stack(smallest).amin()] * len(features)
        for threshold, value in zip(self.thresholds, smallest, strict=True):
            threshold.update(value, self.threshold_decay)

    @torch.no_grad()
    def restart_running_thresholds(self) -> None:
        """Makes the next training batch start batchtopk's running thresholds, as the first one did."""
        for threshold in self.thresholds:
            threshold.value.fill_(torch.inf)

    def _decode(
        self, features: list[LayerFeatures], x: Tensor | None, with_norms: bool = False
    ) -> tuple[Tensor, list[Tensor] | None]:
        """
        ỹ̂_t = Σ_{s ≤ t, t-s < R} W_dec[s][:, t-s]ᵀ a_s + b_dec[t] (+ x̃_t W_skip[t]), (N, L, D), for further tokens of
        `features` without b_dec and skip, (2 N, L, D); and on demand
        ‖W_dec[s][f]‖ over all targets and dimensions, one (F,) tensor per source layer, with a finite gradient at 0.
        """
        bias = torch.stack([decoder.bias for decoder in self.decoders])
        num_tokens = features[0].num_tokens if x is None else len(x)
        start = bias.to(at_least_float32(bias.dtype)).expand(num_tokens, -1, -1)
        if self.config.skip_connection:
            start = start + torch.stack([skip(x[:, t]) for t, skip in enumerate(self.skips)], dim=1)
        if features[0].num_tokens > num_tokens:  # of dead features, which explain what the others leave
            start = torch.cat([start, torch.zeros_like(start)])
        if self.shard is None:
            normalized, squares = self._add_features(start.clone(), features, with_norms)
        else:
            written, squares = self._add_features(torch.zeros_like(start), features, with_norms)
            normalized = start + sum_over(self.shard, written)
        if not with_norms:
            return normalized, None
        reached = [range(s, s + self.config.num_targets(s)) for s in range(self.config.num_layers)]
        if self.config.decoder_tying == "per_source":
            squares = [square * len(targets) for square, targets in zip(squares, reached, strict=True)]
        elif self.config.decoder_tying == "per_target":
            squares = [torch.stack([squares[t] for t in targets]).sum(dim=0) for targets in reached]
        return normalized, [safe_sqrt(square) for square in squares]

    def _add_features(
        self, reconstruction: Tensor, features: list[LayerFeatures], with_squares: bool = False
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Adds what all features write, in place; with it the squared norms of each decoder's rows, as stored."""
        squares = []
        for s, layer_features in enumerate(features):
            num_targets = self.config.num_targets(s)
            if self.config.decoder_tying != "per_target":
                reconstruction, square = self.decoders[s](reconstruction, layer_features, s, num_targets, with_squares)
            else:
                reconstruction, square = self.decoders[s](reconstruction, layer_features, s, 1, with_squares)
                for t in range(s + 1, s + num_targets):
                    reconstruction, _ = self.decoders[t](reconstruction, layer_features, t, 1, False)
            squares.append(square)
        return reconstruction, squares

    def _thresholds_or_zero(self) -> list[Tensor]:
        if self.config.activation_fn == "jumprelu":
            return [threshold() for threshold in self.thresholds]
        return [encoder.bias.new_zeros(encoder.bias.shape) for encoder in self.encoders]

    # -- normalisation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        if self.lazy:
            raise ValueError("this CLT was loaded with lazy=True, for analysis; load it without lazy to normalise it")
        given = dict(zip(STATISTICS, (mean_in, std_in, mean_out, std_out), strict=True))
        given = folding.check_statistics(self, given)
        if reparametrize:
            for std in (given["std_out"], self.std_out):
                if std is not None and folding.scales_untie(self.config, std):
                    raise ValueError(
                        "decoder_tying='per_source' with a std_out that differs between layers cannot be "
                        "reparametrized: load the CLT with decoder_tying='none'"
                    )
            self.fold_normalization()
            inverse = folding.unfold_statistics(*(given[name].double() for name in STATISTICS))
            folding.fold_into(self, dict(zip(STATISTICS, inverse, strict=True)))
        for name, value in given.items():
            setattr(self, name, value.to(at_least_float32(self.dtype), copy=True))

    def fold_normalization(self) -> None:
        """
        Folds the statistics into the weights, in place: the same function, without statistics.

        A `per_source` CLT whose `std_out` differs between layers becomes untied, since one row cannot carry several
        output scales; its parameters are replaced (rebuild the optimizer), and `config.trained_decoder_tying`
        remembers the tie.
        """
        if self.mean_in is not None:
            folding.fold_into(self, folding.statistics_of(self))
            for name in STATISTICS:
                setattr(self, name, None)

    def folded(self):
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
        save_directory,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        distributed_checkpoint: bool = False,
        **kwargs,
    ) -> None:
        """
        Writes the released CLT: the files of `hf_clt.release`, with statistics folded into the weights, and
        a model card. The live model is left as it is. Every file is replaced as a whole or not at all.

        Args:
            save_directory (`str` or `Path`): Folder to write to; created if missing.
            is_main_process (`bool`): Whether this process writes. Where the features are spread over a group, all its
                processes call this, and the first writes.
            state_dict (`dict`, *optional*): The weights to save in the place of the CLT's own, as Accelerate and
                transformers' Trainer gather them from all processes.
            push_to_hub (`bool`): Whether to push as well, to `kwargs["repo_id"]`, by default the folder's name.
            safe_serialization, variant, distributed_checkpoint: Taken where they ask for nothing else than the files
                of a CLT; so are `max_shard_size`, `save_function` and others of transformers in `kwargs`.
            kwargs: Passed to `push_to_hub`.

        Raises:
            ValueError: If files in another format are asked for, or a file of the folder is of another model.
        """
        folder = Path(save_directory).expanduser()
        if not safe_serialization or variant is not None or distributed_checkpoint:
            raise ValueError(
                f"safe_serialization={safe_serialization}, variant={variant!r}, distributed_checkpoint="
                f"{distributed_checkpoint}: a CLT is saved in safetensors files with fixed names; leave these out"
            )
        for name in ("max_shard_size", "save_function", "save_peft_format", "save_original_format"):
            kwargs.pop(name, None)  # a CLT has a file for each layer and half of it
        if not push_to_hub:
            kwargs.pop("token", None)
            if kwargs:
                raise TypeError(f"save_pretrained has no argument {next(iter(kwargs))!r}")
        if state_dict is not None:
            gathered = files.with_weights(self, state_dict)
            gathered.save_pretrained(folder, is_main_process, push_to_hub=push_to_hub, **kwargs)
            return
        if folder.is_file():
            raise ValueError(f"save_directory={str(folder)!r} is a file; give a folder")
        if self.shard is not None and push_to_hub:
            raise ValueError("push_to_hub=True on a CLT with a shard of the features; save it and push the folder")
        config = files.write_clt(self, folder, is_main_process)
        if config is not None:
            from .hub.card import circuit_tracer_gaps, save_model_card

            save_model_card(folder, config)
            for gap in circuit_tracer_gaps(config):
                logger.warning("circuit-tracer cannot express %s; hf_clt loads the CLT as it is", gap)
            if push_to_hub:
                self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        config: CLTConfig | None = None,
        lazy: bool = False,
        layers: list[int] | None = None,
        shard: FeatureShard | None = None,
        **kwargs,
    ):
        """
        Loads a CLT from a folder or from the Hub, or a folder that has circuit-tracer's files alone.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder, or a repository name on the Hub.
            config ([`CLTConfig`], *optional*): Used instead of the one in the folder.
            lazy (`bool`, defaults to `False`): Leaves the encoders and the decoders in their files, for the analysis
                of a CLT that may be larger than memory: `encode` streams the encoders, `decode` reads the rows of
                active features. On the CPU and in the dtype of the files, on Linux; such a CLT cannot be trained, and
                its files must not be changed in place. Tied decoders, which are written out on disk and whose files
                are read once to check the tie, lie in memory, each once. `forward` with labels reads all decoders
                where λ > 0, whose penalty takes their norms.
            layers (`list[int]`, *optional*): Downloads and reads these layers alone, onto the CPU, for looking at
                their features with `encode` and `decode`; the result is a [`PartialCLT`].
            shard ([`FeatureShard`], *optional*): Reads the rows of this slice of the features alone, onto the CPU.
            kwargs: Fields of `CLTConfig` to override, and what `PreTrainedModel.from_pretrained` takes (`revision`,
                `subfolder`, `dtype`, `device_map`, `token`, `cache_dir`, `output_loading_info`, ...).

        Raises:
            FileNotFoundError: If a weight file is missing; from the Hub also if the CLT is not in the cache and cannot
                be downloaded now.
            OSError: If the Hub has no such repository or revision, or the token may not read it.
            ValueError: If a file is truncated or does not fit the configuration; the message names it. With `lazy`,
                also for a `dtype` other than the files' and for a `device_map`; with `layers` and `shard` for what
                does not go with them.
            RuntimeError: If the weights cannot stay in their files, as on some network mounts.
        """
        name = str(pretrained_model_name_or_path)
        hub = {argument: kwargs.pop(argument) for argument in HUB_ARGUMENTS if argument in kwargs}
        folder = find_folder(name, kwargs.pop("subfolder", None) or "", layers, **hub)
        overrides = {name: kwargs.pop(name) for name in CLT_CONFIG_HELP if name in kwargs}
        if config is not None and overrides:
            raise ValueError(f"{next(iter(overrides))} is given beside config=; set it in the configuration instead")
        if config is None:
            config = files.read_config(folder, overrides)
        if lazy or layers is not None or shard is not None:
            for argument in ("_from_auto", "adapter_kwargs", "trust_remote_code"):  # which AutoModel adds
                kwargs.pop(argument, None)
        if layers is not None:
            from .partial_clt import load_layers

            return load_layers(folder, config, layers, name, lazy=lazy, shard=shard, **kwargs)
        if lazy or shard is not None:
            return files.load_slices(cls, folder, config, shard, name, lazy, **kwargs)
        files.check_files(folder, config)
        state = files.read_state(folder, config)
        loaded = super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = name
        files.check_half_range(model)
        return loaded

    def train(self, mode: bool = True):
        """Sets training mode; a CLT loaded with `lazy=True` refuses, since a step would copy its files to memory."""
        if mode and self.lazy:
            raise ValueError("this CLT was loaded with lazy=True, for analysis; load it without lazy to train it")
        return super().train(mode)

    def to_jumprelu(self, batches, progress: bool = False):
        """
        A calibrated jumprelu CLT from this topk or batchtopk CLT, which stays as it is, and the figures of both; see
        [`hf_clt.evaluation.calibration.to_jumprelu`].
        """
        from .evaluation.calibration import to_jumprelu

        self._check_whole("to_jumprelu")
        return to_jumprelu(self, batches, progress)

    def push_to_hub(self, repo_id: str, **kwargs):
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


def wide_empty(*shape: int) -> Tensor:
    """An uninitialised tensor for what stays at least float32 in a CLT of less; see `CrossLayerTranscoder`."""
    return torch.empty(shape, dtype=at_least_float32(torch.get_default_dtype()))


AutoModel.register(CLTConfig, CrossLayerTranscoder)

__all__ = ["CLTOutput", "CrossLayerTranscoder"]
