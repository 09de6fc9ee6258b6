"""
The replacement model: a language model whose MLP outputs are a cross-layer transcoder's reconstruction (Ameisen et al.
2025, "Circuit Tracing: Revealing Computational Graphs in Language Models"), and how far it is from the original.

Features are read from the replaced stream: those of layer s from what layer s receives when the MLPs of all layers
before it are replaced. So the CLT runs along with the language model, source layer by source layer.
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..folding import at_least_float32
from ..harvest.harvester import Harvester, check_fit
from ..harvest.sites import default_hooks
from ..modeling_clt import CrossLayerTranscoder
from ..sparsity import LayerFeatures, SparseFeatures, features_at
from .metrics import ce_recovered


PREDICTIONS_AT_A_TIME = 256  # float64 log-probabilities of a whole batch would be as large as the model

Intervention = tuple[int, int | None, int, float]  # layer, position, feature, value; see ReplacementModel

# The warning with which nnsight ends a loop over the steps of a generation, whose number is not known beforehand.
LOOP_ENDS = r"(?s).*the loop asked for a step the run did not make"


@dataclass
class ReplacementOutput(ModelOutput):
    """
    Output of [`ReplacementModel`].

    Args:
        logits (`Tensor` of shape `(P, T, V)`): Next-token logits of the replacement model.
        features ([`SparseFeatures`]): Activations on (P, T) tokens, as read from the replaced stream and after the
            interventions; none at excluded positions. None if a function stands in for the CLT.
    """

    logits: Tensor | None = None
    features: SparseFeatures | None = None


# -- the CLT layer by layer -------------------------------------------------------------------------------------------


def check_layer_by_layer(clt: CrossLayerTranscoder) -> None:
    """
    Raises:
        ValueError: If the features of a layer cannot be read before the later layers are computed, or not yet.
    """
    config = clt.config
    if config.activation_fn == "topk" and config.k_scope == "token":
        raise ValueError(
            "k_scope='token' lets the layers of a token compete for one budget, so this topk CLT cannot be read layer "
            "by layer; train it with k_scope='layer', or make it a jumprelu CLT with clt.to_jumprelu(batches)"
        )
    clt.check_running_thresholds([clt.theta(layer) for layer in range(config.num_layers)])


class LayerwiseReconstruction:
    """
    A CLT on N tokens, given its inputs one layer after the other: what `clt(inputs)` gives in eval mode, where the
    inputs of a layer may depend on the reconstruction of the layers before it.

    Args:
        clt ([`CrossLayerTranscoder`]): The CLT.
        num_tokens (`int`): N.
        edit (`Callable`, *optional*): Called with a layer and its [`LayerFeatures`], gives those that write.

    Attributes:
        features (`list[LayerFeatures]`): Of the layers given so far.
    """

    def __init__(self, clt: CrossLayerTranscoder, num_tokens: int, edit: Callable | None = None):
        self.clt, self.edit = clt, edit
        bias = torch.stack([decoder.bias for decoder in clt.decoders])
        # ỹ̂ of all target layers as far as it is known: a source layer adds to its targets when its inputs are given.
        self.normalized = bias.to(at_least_float32(bias.dtype)).expand(num_tokens, -1, -1).clone()
        self.features: list[LayerFeatures] = []

    def __call__(self, layer: int, inputs: Tensor, outputs: Tensor | None = None) -> Tensor:
        """
        The raw reconstruction (N, D) of the MLP output of the next layer (0, then 1, ...) from what its features read,
        raw (N, D). `outputs` is not used.
        """
        clt = self.clt
        if layer != len(self.features):
            raise ValueError(f"layer={layer} is given after {len(self.features)} layers; give all layers in order")
        x = inputs.to(clt.device)
        x = clt.normalize_inputs(x, layer)
        features = clt.encode_layer(layer, x)
        if self.edit is not None:
            features = self.edit(layer, features)
        self.features.append(features)
        self.normalized = clt.decode_layer(layer, features, self.normalized)
        y = self.normalized[:, layer]
        if clt.config.skip_connection:
            y = y + clt.skips[layer](x)
        return clt.denormalize(y, layer)


# -- tokens and interventions -----------------------------------------------------------------------------------------


def token_positions(attention_mask: Tensor) -> Tensor:
    """Number of tokens before each token of its row, -1 at padding on either side; (P, T) to (P, T) int64."""
    return torch.where(attention_mask.bool(), attention_mask.long().cumsum(1) - 1, -1)


def columns_of_step(positions: Tensor, counted: Tensor, start: int, stop: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """
    Token positions of the columns `start` to `stop` that a step of a generation computes, and whether they are
    replaced, (R, stop - start) each. Prompts (P, T) are continued by generated tokens, which are replaced. R is a
    multiple of P where a prompt has several beams or samples, which are consecutive rows.
    """
    steps = torch.arange(1, max(0, stop - positions.shape[1]) + 1, device=positions.device)
    positions = torch.cat([positions, positions.amax(dim=1, keepdim=True) + steps], dim=1)
    counted = torch.cat([counted, counted.new_ones(len(counted), len(steps))], dim=1)
    beams = num_rows // len(positions)
    return tuple(values[:, start:stop].repeat_interleave(beams, dim=0) for values in (positions, counted))


def set_activations(
    features: LayerFeatures, positions: Tensor, interventions: list[tuple[int | None, int, float]]
) -> LayerFeatures:
    """
    The features of a layer on N tokens at `positions` (N,) with some activations set: (position, feature, value) each;
    position None is every one of the N tokens.
    """
    if not interventions:
        return features
    acts = features.to_dense()
    for position, feature, value in interventions:
        tokens = slice(None) if position is None else positions == position
        acts[tokens, feature] = value
    return features_at(acts, acts != 0)


def spread_features(features: LayerFeatures, rows: Tensor, num_positions: int) -> LayerFeatures:
    """The features of the tokens `rows` (N,), ascending, as features of all positions; the others have none."""
    counts = torch.zeros(num_positions, dtype=torch.int64, device=features.offsets.device)
    counts[rows.to(counts.device)] = features.offsets.diff()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return LayerFeatures(features.values, features.indices, offsets, features.num_features)


def check_layers(layers: Iterable[int] | None, num_layers: int) -> list[int]:
    """
    The layers to replace, ascending; all if None.

    Raises:
        ValueError: If `layers` is empty or names a layer that the model has not.
    """
    if layers is None:
        return list(range(num_layers))
    checked = sorted({operator.index(layer) for layer in layers})
    if not checked or checked[0] < 0 or checked[-1] >= num_layers:
        raise ValueError(
            f"layers={list(layers)} must name at least one layer from 0 to {num_layers - 1}; leave it out for all"
        )
    return checked


def check_interventions(
    interventions: Iterable[Intervention],
    clt: CrossLayerTranscoder | Callable,
    layers: list[int],
    positions: Tensor,
    counted: Tensor,
    generates: bool,
) -> dict[int, list[tuple[int | None, int, float]]]:
    """
    The interventions by source layer, as (position, feature, value) each. `positions` and `counted` (P, T) are the
    position of each token and whether it is replaced; with `generates`, generated tokens follow.

    Raises:
        ValueError: If one is not these four numbers, is out of range, or cannot change anything.
    """
    by_layer = {}
    for number, given in enumerate(interventions):
        name = f"interventions[{number}]={given!r}"
        if not isinstance(clt, CrossLayerTranscoder):
            raise ValueError(f"{name}: a function stands in for the CLT and has no features; give a CLT to intervene")
        try:
            layer, position, feature, value = given
            layer, feature, value = operator.index(layer), operator.index(feature), float(value)
            position = None if position is None else operator.index(position)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: give (layer, position, feature, value), a number each; position None is every token"
            ) from error
        config = clt.config
        for field, found, size in (("layer", layer, config.num_layers), ("feature", feature, config.num_features)):
            if not 0 <= found < size:
                raise ValueError(f"{name}: {field} {found} is outside 0 to {size - 1}; give one that the CLT has")
        if not math.isfinite(value):
            raise ValueError(f"{name}: value {value} is not finite; give the activation to set, 0 to ablate")
        last = layer + config.num_targets(layer) - 1
        if not any(layer <= target <= last for target in layers):
            raise ValueError(
                f"{name}: layer {layer} writes to layers {layer} to {last}, none of which is replaced "
                f"(layers={layers}); replace one of them"
            )
        replaced = counted if position is None else counted & (positions == position)
        is_generated = generates and (position is None or (positions.amax(dim=1) < position).any())
        if not is_generated and not replaced.any():
            raise ValueError(
                f"{name}: no row has a token at this position whose MLP outputs are replaced (position 0, padding "
                "and what counted excludes are not); give another position"
            )
        by_layer.setdefault(layer, []).append((position, feature, value))
    return by_layer


# -- the model --------------------------------------------------------------------------------------------------------


class ReplacementModel:
    """
    A language model with its MLP outputs replaced by a CLT's reconstruction, the features being read from the replaced
    stream. The language model itself can be used as before; one thread at a time may use either.

    **Layers.** With `layers`, only these get the reconstruction and the others keep their exact MLP outputs. The
    features of all layers are still read, and write to the replaced layers after them: the reconstruction of a layer
    is always the sum over all its source layers.

    **Excluded positions** keep the language model's own MLP outputs, and have no features: position 0 of each row (its
    first token that is not padding), padding, and what `counted` excludes. A CLT is not trained on them.

    **Interventions** are `(layer, position, feature, value)`: the activation of a feature of a source layer is set to
    a value, in raw units of the activation, before it writes to any layer; 0 ablates it. `position` is the number of
    tokens before it in its row, padding not counted, and holds for every row in which it is not excluded; None is
    every position that is not excluded, generated ones included. Of two on the same activation the later counts.

    Args:
        model (`PreTrainedModel`):
            A causal language model with its head, in eval mode.
        clt ([`CrossLayerTranscoder`] or `Callable`):
            The CLT; its features are computed as in eval mode. Or a function that stands in for it, called as
            `clt(layer, inputs, outputs)` for layer 0, 1, ... of each forward pass with what `hooks` read at the N
            positions that are not excluded, `(N, D)` each; it returns what replaces `outputs`, of a shape that
            broadcasts to theirs.
        layers (`Iterable[int]`, *optional*): The layers to replace; by default all.
        hooks (`tuple[str, str]`, *optional*): Input and output hook of a function; by default those of
            [`default_hooks`].

    Raises:
        `ValueError`: if the CLT does not fit the model or cannot be read layer by layer, if the model has no head, if
            a layer is out of range, or if `hooks` are given for a CLT, which has its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        clt: CrossLayerTranscoder | Callable,
        layers: Iterable[int] | None = None,
        hooks: tuple[str, str] | None = None,
    ):
        config = model.config.get_text_config()
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"model is a {type(model).__name__}, which has no language modeling head; load it with "
                "AutoModelForCausalLM"
            )
        if isinstance(clt, CrossLayerTranscoder):
            if hooks is not None:
                raise ValueError(f"hooks={hooks} are given for a CLT, which has its own; leave them out")
            check_layer_by_layer(clt)
            hooks = clt.config.feature_input_hook, clt.config.feature_output_hook
        elif callable(clt):
            hooks = hooks or default_hooks(config.model_type)
        else:
            raise ValueError(
                f"clt is a {type(clt).__name__}; give a CrossLayerTranscoder, or a function (layer, inputs, outputs)"
            )
        self.model, self.clt = model, clt
        self.layers = check_layers(layers, config.num_hidden_layers)
        self._harvester = Harvester(model, *hooks)
        if isinstance(clt, CrossLayerTranscoder):
            check_fit(clt.config, self._harvester)
        self._nnsight = self._harvester._nnsight

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        counted: Tensor | None = None,
        interventions: Iterable[Intervention] = (),
    ) -> ReplacementOutput:
        """
        One forward pass, without gradients.

        Args:
            input_ids (`Tensor` of shape `(P, T)`): Token ids.
            attention_mask (`Tensor` of shape `(P, T)`, *optional*): 1 for tokens, 0 for padding on either side; by
                default there is none.
            counted (`Tensor` of shape `(P, T)`, bool, *optional*): False where the language model's own MLP outputs
                are kept, as at special tokens. Position 0 and padding always keep them; by default nothing else does.
            interventions (`Iterable`, *optional*): See the class.

        Returns:
            [`ReplacementOutput`]

        Raises:
            `ValueError`: if the model is in training mode or cannot take these tokens, a shape does not fit, or an
                intervention is out of range or changes nothing.
        """
        arguments, positions, counted = self._prepare(input_ids, attention_mask, counted)
        by_layer = check_interventions(interventions, self.clt, self.layers, positions, counted, generates=False)
        rows = counted.flatten().nonzero().squeeze(1)
        replace = self._start(positions.flatten()[rows], by_layer)
        logits = self._run(arguments, rows, replace)
        if replace is self.clt:
            return ReplacementOutput(logits=logits)
        layers = [spread_features(features, rows, positions.numel()) for features in replace.features]
        return ReplacementOutput(logits=logits, features=SparseFeatures(layers, positions.shape))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        counted: Tensor | None = None,
        interventions: Iterable[Intervention] = (),
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """
        Continues prompts with the replacement model. Generated tokens are replaced as well, whatever they are.

        Args:
            input_ids, counted, interventions: As for a forward pass; positions of interventions may lie behind the
                prompt.
            attention_mask (`Tensor` of shape `(P, T)`, *optional*): 1 for tokens, 0 for padding, which must be on the
                left; by default there is none.
            kwargs: What the model's own `generate` takes: `max_new_tokens`, `do_sample`, `num_beams`, ...

        Returns:
            What the model's own `generate` returns: token ids, prompts included, unless asked for more.

        Raises:
            `ValueError`: as a forward pass, and if a prompt is padded on the right.
        """
        arguments, positions, counted = self._prepare(input_ids, attention_mask, counted)
        if (positions[:, -1] < 0).any():
            raise ValueError(
                "attention_mask has padding in the last column, where generation goes on: pad on the left"
            )
        by_layer = check_interventions(interventions, self.clt, self.layers, positions, counted, generates=True)
        given = {name: arguments[name] for name in ("input_ids", "attention_mask")}
        returned = []

        def run(**arguments):
            returned.append(self.model.generate(**arguments))

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=LOOP_ENDS)
            with torch.no_grad(), self._nnsight.trace(fn=run, **given, **kwargs) as tracer:
                for _ in tracer.iter[:]:
                    step = self._nnsight.inputs[1]
                    # With a cache a step computes the new tokens alone, without one the prompt again.
                    cache, ids = step.get("past_key_values"), step["input_ids"]
                    start = 0 if cache is None else int(cache.get_seq_length())
                    columns = columns_of_step(positions, counted, start, start + ids.shape[1], len(ids))
                    rows = columns[1].flatten().nonzero().squeeze(1)
                    self._replace(rows, self._start(columns[0].flatten()[rows], by_layer))
        return returned[0]

    def _prepare(self, input_ids, attention_mask, counted):
        """Arguments of the model's forward, token positions (P, T) and, as bool (P, T), what is not excluded."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give (prompts, tokens), one at least")
        for name, mask in (("attention_mask", attention_mask), ("counted", counted)):
            if mask is not None and mask.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}; they must agree"
                )
        if attention_mask is not None:
            attention_mask = attention_mask.long()
        arguments = self._harvester._arguments(input_ids, attention_mask)
        positions = token_positions(arguments["attention_mask"])
        included = positions > 0
        return arguments, positions, included if counted is None else included & counted.bool().to(included.device)

    def _start(self, positions, by_layer):
        """What replaces the outputs of one forward pass, at tokens of these positions (N,)."""
        if not isinstance(self.clt, CrossLayerTranscoder):
            return self.clt
        positions = positions.to(self.clt.device)

        def edit(layer, features):
            return set_activations(features, positions, by_layer.get(layer, []))

        return LayerwiseReconstruction(self.clt, len(positions), edit)

    def _run(self, arguments, rows, replace, gradients=False):
        """Logits (P, T, V) of a forward pass in which `replace` gives the outputs at the flat positions `rows`."""
        logits = []
        with torch.set_grad_enabled(gradients), self._nnsight.trace(**arguments) as tracer:
            self._replace(rows, replace)
            logits.append(tracer.result.logits)
        return logits[0]

    def _replace(self, rows, replace):
        """In the body of a trace: one forward pass of the model, whose modules the reads below wait for."""
        for layer in range(self._harvester.num_layers):
            module, io = self._harvester._inputs[layer]
            inputs = (module.input if io == "input" else module.output).flatten(0, 1)
            inputs = inputs[rows.to(inputs.device)]
            module, _ = self._harvester._outputs[layer]
            outputs = module.output
            changed = outputs.flatten(0, 1).clone()
            here = rows.to(changed.device)
            # A function may call the very modules that it replaces; these calls are not the ones traced.
            self._nnsight.interleaver.interleaving = False
            try:
                replacement = replace(layer, inputs, changed[here])
            finally:
                self._nnsight.interleaver.interleaving = True
            if layer in self.layers:
                changed[here] = replacement.to(changed)
                module.output = changed.view_as(outputs)


# -- the metrics ------------------------------------------------------------------------------------------------------


def cross_entropy(log_p: Tensor, targets: Tensor) -> Tensor:
    """-Σ log p[target] over M predictions: log-probabilities (M, V), token ids (M,)."""
    return -log_p.gather(1, targets[:, None]).sum()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ KL(p ‖ q) = Σ p (log p - log q) over M predictions, log-probabilities (M, V) each."""
    return (log_p.exp() * (log_p - log_q)).sum()


def prediction_sums(original: Tensor, replaced: Tensor, ablated: Tensor, targets: Tensor) -> Tensor:
    """
    Sums over M predictions of the three cross-entropies, the KL divergence, and whether the most probable token is
    the same; last, M. From logits (M, V) each and token ids (M,); (6,) float64.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=targets.device)
    for start in range(0, len(targets), PREDICTIONS_AT_A_TIME):
        part = slice(start, start + PREDICTIONS_AT_A_TIME)
        logits = [values[part].to(targets.device) for values in (original, replaced, ablated)]
        log_probs = [values.double().log_softmax(dim=1) for values in logits]
        for number, log_p in enumerate(log_probs):
            sums[number] += cross_entropy(log_p, targets[part])
        sums[3] += kl_divergence(*log_probs[:2])
        sums[4] += (logits[0].argmax(dim=1) == logits[1].argmax(dim=1)).sum()
        sums[5] += len(targets[part])
    return sums


@torch.no_grad()
def replacement_metrics(
    model: PreTrainedModel,
    clt: CrossLayerTranscoder | Callable,
    batches: Iterable[dict[str, Tensor]],
    layers: Iterable[int] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
    before_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """
    How far the replacement model is from the language model, on held-out tokens. Sums are float64, so the result does
    not depend on how the tokens are cut into batches. Four forward passes over each batch; about three times the
    logits of a batch are held.

    A prediction counts if it is made at a counted position (not position 0, padding, or excluded) and its next token
    is there. Positions that do not count keep the language model's own MLP outputs, in the ablation too.

    Args:
        model (`PreTrainedModel`): The language model, with its head, in eval mode.
        clt ([`CrossLayerTranscoder`] or `Callable`): The CLT, or a function in its place, see [`ReplacementModel`].
        batches (`Iterable[dict]`):
            Batches of a [`TokenStream`]: `input_ids`, `attention_mask`, `counted` and `documents`, each (P, T). They
            are read twice, first for the means of the ablation: give a list, or a stream that starts anew.
        layers (`Iterable[int]`, *optional*): The layers to replace, and to ablate; by default all.
        reduce (`Callable`, *optional*): Sums a float64 tensor over all processes, where each has batches of its own:
            `lambda tensor: accelerator.reduce(tensor, "sum")`.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.
        before_batch (`Callable`, *optional*): Called before each batch; it may raise, to stop.

    Returns:
        `dict`:
        - `ce_original`, `ce_replaced`, `ce_ablated`: next-token cross-entropy in nats of the language model, of the
          replacement model, and with each MLP output set to its mean over the counted tokens;
        - `ce_recovered`: (ce_ablated - ce_replaced) / (ce_ablated - ce_original); None if the ablation does nothing;
        - `kl`: KL(original ‖ replaced) of the next-token distributions in nats, mean over the predictions;
        - `top1_agreement`: share of the predictions with the same most probable token;
        - `num_predictions`: number of predictions counted.

    Raises:
        `ValueError`: as [`ReplacementModel`], and if `batches` can be read once only, or no prediction counts.
        [`ActivationError`]: if an activation of the language model is not finite.
    """
    if iter(batches) is batches:
        raise ValueError("batches is an iterator, which can be read once, and is read twice; give list(batches)")
    reduce = reduce or (lambda tensor: tensor)
    replaced = ReplacementModel(model, clt, layers)
    bar = tqdm(desc="Replacing MLPs", unit="batch", disable=not progress, leave=False)

    def total(sums_of_batch, *shape):
        sums = torch.zeros(shape, dtype=torch.float64, device=model.device)
        for batch in batches:
            if before_batch is not None:
                before_batch()
            sums += sums_of_batch(replaced, batch)
            bar.update()
        return reduce(sums)

    with bar:
        means = total(output_sums, replaced._harvester.num_layers, replaced._harvester.d_model + 1)
        means = means[:, :-1] / means[:, -1:]
        *totals, count = total(partial(batch_sums, means=means), 6).tolist()
    if count == 0:
        raise ValueError("no prediction counts: the held-out text gave none; raise eval_tokens or give more text")
    ce_original, ce_replaced, ce_ablated, kl, agreement = (value / count for value in totals)
    return {
        "ce_original": ce_original,
        "ce_replaced": ce_replaced,
        "ce_ablated": ce_ablated,
        "ce_recovered": ce_recovered(ce_original, ce_replaced, ce_ablated),
        "kl": kl,
        "top1_agreement": agreement,
        "num_predictions": int(count),
    }


def output_sums(replaced: ReplacementModel, batch: dict[str, Tensor]) -> Tensor:
    """Σ over the counted tokens of each MLP output, and of 1, (L, D + 1) float64."""
    _, _, counted = replaced._prepare(batch["input_ids"], batch["attention_mask"], batch["counted"])
    batch = {**batch, "counted": counted.to(batch["counted"].device)}
    _, outputs = replaced._harvester.harvest(batch, dtype=at_least_float32(replaced.model.dtype))
    sums = [rows.double().sum(dim=0) for rows in outputs.unbind(dim=1)]  # float64 of one layer at a time
    return torch.nn.functional.pad(torch.stack(sums), (0, 1), value=len(outputs))


def batch_sums(replaced: ReplacementModel, batch: dict[str, Tensor], means: Tensor) -> Tensor:
    """[`prediction_sums`] of a batch; `means` (L, D) are the MLP outputs of the ablation."""
    arguments, positions, counted = replaced._prepare(batch["input_ids"], batch["attention_mask"], batch["counted"])
    predicts = counted[:, :-1] & (positions[:, 1:] >= 0)
    rows = counted.flatten().nonzero().squeeze(1)

    def predictions(logits):
        return logits[:, :-1][predicts.to(logits.device)]

    reconstruct = replaced._start(positions.flatten()[rows], {})
    original = predictions(replaced.model(**arguments).logits)
    reconstructed = predictions(replaced._run(arguments, rows, reconstruct))
    ablated = predictions(replaced._run(arguments, rows, lambda layer, inputs, outputs: means[layer]))
    targets = arguments["input_ids"][:, 1:][predicts]
    return prediction_sums(original, reconstructed, ablated, targets.to(means.device))


__all__ = [
    "LayerwiseReconstruction",
    "ReplacementModel",
    "ReplacementOutput",
    "replacement_metrics",
]
