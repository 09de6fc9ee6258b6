"""How well the language model predicts with its MLP outputs replaced by a CLT's, and with their means beside it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.metrics import FLOAT32_ROUNDING
from ..evaluation.replacement import ReplacementModel, check_layer_by_layer, cross_entropy, kl_divergence
from ..harvest.harvester import Harvester, check_fit
from ..harvest.sites import default_hooks
from ..modeling_clt import CrossLayerTranscoder
from .samples import BlockSkipped, Given, output_means, ratio_figure, sequences


SEQUENCES, QUICK_SEQUENCES = 32, 8  # with all layers replaced
FEW_SEQUENCES, QUICK_FEW_SEQUENCES = 8, 4  # for each other choice of layers
ALONE, QUICK_ALONE = 10, 3  # layers that are replaced one at a time, evenly spread


def replacement(clt: CrossLayerTranscoder, given: Given) -> dict:
    """
    The language model with MLP outputs replaced: of all layers, of one, and of the last k. Features are read from the
    replaced stream; see [`ReplacementModel`].

    Returns:
        `dict` of figures over sequences: `ce_original`, `ce_replaced`, `ce_ablated` (every MLP output set to its mean
        over these tokens), in nats; `ce_recovered`, (ce_ablated - ce_replaced) / (ce_ablated - ce_original); `kl`,
        KL(original ‖ replaced) in nats, and `kl_ablated`; `top1`, the share of predictions with the same most probable
        token, and `top1_ablated`. And `ce_recovered`, `kl`, `kl_ablated` and `top1` with one layer replaced or
        ablated at a time, by layer (`kl_per_layer`), and with the last k (`kl_by_last_layers`).

    Raises:
        [`BlockSkipped`]: If there is too little text, or the CLT cannot be read layer by layer.
        ValueError: If the CLT does not fit the language model.
    """
    check_fit(clt.config, given.harvester)
    try:
        check_layer_by_layer(clt)
    except ValueError as error:
        raise BlockSkipped(str(error)) from error
    num_layers, quick = clt.config.num_layers, given.quick
    alone = QUICK_ALONE if quick else ALONE
    layers = sorted({round(i * (num_layers - 1) / max(1, alone - 1)) for i in range(alone)})
    counts = [2**i for i in range(num_layers.bit_length()) if 2**i < num_layers]
    counts = counts[-2:-1] or counts if quick else counts
    few = {f"{layer} alone": [layer] for layer in layers}
    few |= {f"last {k}": range(num_layers - k, num_layers) for k in counts}
    whole = predict(clt, given, QUICK_SEQUENCES if quick else SEQUENCES, {"all": range(num_layers)})["all"]
    parts = predict(clt, given, QUICK_FEW_SEQUENCES if quick else FEW_SEQUENCES, few)
    result = figures_of(whole, given.seed)
    for kind, names in (
        ("per_layer", {layer: f"{layer} alone" for layer in layers}),
        ("by_last_layers", {k: f"last {k}" for k in counts}),
    ):
        found = {str(label): figures_of(parts[name], given.seed) for label, name in names.items()}
        for name in ("ce_recovered", "kl", "kl_ablated", "top1"):
            result[f"{name}_{kind}"] = {label: row[name] for label, row in found.items()}
    return result


def figures_of(sums: dict[str, Tensor], seed: int) -> dict[str, dict]:
    """The figures from the sums (S,) that [`predict`] gives."""
    count = sums["count"]
    result = {name: ratio_figure(values, count, seed) for name, values in sums.items() if name != "count"}
    ablated, replaced, original = (sums[f"ce_{name}"] for name in ("ablated", "replaced", "original"))
    lost = ablated - original
    if lost.sum().abs() <= FLOAT32_ROUNDING * original.sum():  # the ablation does nothing
        lost = torch.zeros_like(lost)
    return result | {"ce_recovered": ratio_figure(ablated - replaced, lost, seed)}


@torch.no_grad()
def predict(
    clt: CrossLayerTranscoder, given: Given, count: int, choices: dict[str, Iterable[int]]
) -> dict[str, dict[str, Tensor]]:
    """
    For each choice of layers sums over the predictions of each of S sequences, (S,) float64: `ce_original`; cross-
    entropy, KL and agreement of the model with these layers replaced (`ce_replaced`, `kl`, `top1`) and ablated
    (`ce_ablated`, ...); and `count`. What the ablation gives is kept for the next CLT.
    """
    harvester = Harvester(given.model, *default_hooks(given.model.config.get_text_config().model_type))
    means = output_means(given, harvester, count)
    ablated = ReplacementModel(given.model, lambda layer, inputs, outputs: means[layer])
    replaced = ReplacementModel(given.model, clt)
    found = {choice: [] for choice in choices}
    bar = tqdm(sequences(given, count), "Replacing MLPs", disable=not given.progress, leave=False)
    for number, batch in enumerate(bar):
        names = ("input_ids", "attention_mask", "counted")
        ids, mask, counted = (batch[name].to(given.model.device) for name in names)
        predicts = counted[:, :-1] & mask[:, 1:].bool()
        targets = [row[chosen] for row, chosen in zip(ids[:, 1:], predicts, strict=True)]
        original = log_probabilities(given.model(input_ids=ids, attention_mask=mask).logits, predicts)
        always = {"count": predicts.sum(dim=1).double().cpu()}
        always["ce_original"] = per_sequence(cross_entropy, original, targets)
        for choice, layers in choices.items():
            sums, key = dict(always), ("ablated", count, choice, number)
            for model, ending in ((replaced, ""), (ablated, "_ablated")):
                if ending and key in given.shared:
                    sums |= given.shared[key]
                    continue
                model.layers = list(layers)
                changed = log_probabilities(model(ids, mask, counted).logits, predicts)
                own = {
                    f"ce{ending or '_replaced'}": per_sequence(cross_entropy, changed, targets),
                    f"kl{ending}": per_sequence(kl_divergence, original, changed),
                    f"top1{ending}": per_sequence(agreements, original, changed),
                }
                sums |= own
                if ending:
                    given.shared[key] = own
            found[choice].append(sums)
    return {
        choice: {name: torch.cat([sums[name] for sums in rows]) for name in rows[0]} for choice, rows in found.items()
    }


def log_probabilities(logits: Tensor, predicts: Tensor) -> list[Tensor]:
    """Of logits (P, T, V), those of each sequence at the predictions that count, (M, V) float64 each."""
    pairs = zip(logits[:, :-1], predicts.to(logits.device), strict=True)
    return [row[chosen].double().log_softmax(dim=1) for row, chosen in pairs]


def per_sequence(measure: Callable[[Tensor, Tensor], Tensor], *rows: list[Tensor]) -> Tensor:
    """What `measure` gives for each sequence, (P,) float64."""
    return torch.stack([measure(*pair).double().cpu() for pair in zip(*rows, strict=True)])


def agreements(log_p: Tensor, log_q: Tensor) -> Tensor:
    """On how many of M predictions the most probable token is the same."""
    return (log_p.argmax(dim=1) == log_q.argmax(dim=1)).sum()


__all__ = ["replacement"]
