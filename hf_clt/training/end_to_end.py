"""
The end-to-end finish: some thousand tokens on which a trained CLT's decoders learn to predict what the language model
predicts, where training had them reconstruct its MLP outputs.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..evaluation.replacement import ReplacementModel, kl_divergence
from ..folding import at_least_float32
from ..modeling_clt import CrossLayerTranscoder
from .schedules import learning_rate_scale


def mean_kl(replaced: ReplacementModel, batch: dict) -> Tensor:
    """
    KL(language model ‖ replacement model) of the next-token distributions, in nats, mean over the positions at which
    the CLT stands in; (), differentiable in the CLT's parameters.
    """
    arguments, positions, counted = replaced._prepare(*map(batch.get, ("input_ids", "attention_mask", "counted")))
    rows = counted.flatten().nonzero().squeeze(1)
    with torch.no_grad():
        expected = replaced.model(**arguments).logits[counted]
    reconstruct = replaced._start(positions.flatten()[rows], {})
    found = replaced._run(arguments, rows, reconstruct, gradients=True)[counted]
    log_p, log_q = (logits.to(at_least_float32(logits.dtype)).log_softmax(dim=1) for logits in (expected, found))
    return kl_divergence(log_p, log_q) / len(rows)


def finish_end_to_end(
    clt: CrossLayerTranscoder,
    model: PreTrainedModel,
    batches: Iterable[dict],
    steps: int,
    learning_rate: float,
    progress: bool = False,
) -> list[float]:
    """
    Lowers the mean KL(language model ‖ replacement model) of the next-token distributions over the tokens that the CLT
    stands in for, by Adam on decoders and their biases. Encoders and thresholds stay, and so do the features.

    Args:
        clt: A trained CLT, in eval mode, changed in place. With statistics of its inputs and targets inside, a step
            moves all dimensions alike.
        model: Its language model, with its head, in eval mode; its weights are frozen.
        batches: Extraction batches of a [`TokenStream`], an update each.
        steps: Updates; fewer if the batches run out. The learning rate rises over a sixth of them and falls to 0.
        learning_rate: The highest.
        progress: Whether to show a progress bar.

    Returns:
        The KL of each batch before its update, in nats.

    Raises:
        ValueError: As [`ReplacementModel`], and if there is no batch.
        FloatingPointError: If the KL is not finite.
    """
    replaced = ReplacementModel(model.requires_grad_(False), clt)
    trains = {parameter: parameter.requires_grad for parameter in clt.parameters()}
    clt.requires_grad_(False)
    trained = list(clt.decoders.requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    found = []
    bar = tqdm(islice(batches, steps), desc="Finishing", total=steps, unit="update", disable=not progress)
    for step, batch in enumerate(bar):
        optimizer.param_groups[0]["lr"] = learning_rate * learning_rate_scale(
            step, steps, steps // 6, "linear", decay_steps=steps - steps // 6
        )
        kl = mean_kl(replaced, batch)
        if not kl.isfinite():
            raise FloatingPointError(f"the KL is not finite at update {step}; lower learning_rate={learning_rate:g}")
        kl.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(kl.item())
        bar.set_postfix(kl=f"{found[-1]:.4f}")
    for parameter, flag in trains.items():
        parameter.requires_grad_(flag)
    if not found:
        raise ValueError("dataset: there is no text to train on; give more than the held-out tokens")
    return found
