"""Evaluation of a finished CLT on held-out text: all metrics, streamed, whatever the batch size."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..files import format_number
from ..harvest.harvester import Harvester, check_fit
from ..modeling_clt import CrossLayerTranscoder
from .metrics import MetricSums


@torch.no_grad()
def evaluate_clt(
    clt: CrossLayerTranscoder,
    harvester: Harvester,
    token_batches: Iterable[dict],
    batch_size: int = 1024,
    *,
    replacement: bool = False,
    progress: bool = False,
) -> dict:
    """
    The metrics of a CLT, in raw space, over all counted tokens of held-out text.

    Args:
        clt ([`CrossLayerTranscoder`]): The CLT. It is evaluated in eval mode and keeps the mode that it had.
        harvester ([`Harvester`]): Runs the language model, at the CLT's hooks.
        token_batches (iterable of `dict`):
            Batches of a [`TokenStream`], as of one with `heldout=True`. With `replacement` they are walked once more.
        batch_size (`int`, *optional*, defaults to 1024):
            Most tokens that the CLT sees at a time. It bounds memory and changes no result.
        replacement (`bool`, *optional*, defaults to `False`):
            Whether to run the language model with its MLPs replaced by the CLT as well, see [`replacement_metrics`].
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `dict`: What [`MetricSums.compute`] gives; with `replacement` also `ce_original`, `ce_replaced`, `ce_ablated`,
        `ce_recovered`, `kl`, `top1_agreement` and `num_predictions`, the number of predictions that these count.

    Raises:
        ValueError: If the harvester's model or hooks are not the CLT's, no token counts, or `batch_size` is below 1.
    """
    sums = evaluation_sums(clt, harvester, token_batches, batch_size, progress=progress)
    metrics = sums.compute()
    if replacement:
        from .replacement import replacement_metrics

        metrics |= replacement_metrics(harvester.model, clt, token_batches, progress=progress)
    return metrics


@torch.no_grad()
def evaluation_sums(
    clt: CrossLayerTranscoder,
    harvester: Harvester,
    token_batches: Iterable[dict],
    batch_size: int = 1024,
    *,
    progress: bool = False,
) -> MetricSums:
    """
    What [`evaluate_clt`] computes its metrics from. Where several processes evaluate a share of the text each:
    `MetricSums.from_gathered(gather_object([evaluation_sums(...).tensors()])).compute()`.
    """
    clt._check_whole("evaluate_clt")
    check_fit(clt.config, harvester)
    rows = activations(harvester, token_batches, batch_size)
    num_tokens = getattr(token_batches, "heldout_tokens", None) or None
    bar = tqdm(total=num_tokens, desc="Evaluating", unit="token", disable=not progress, leave=False)

    def rows_of_batches():
        for batch in rows:
            yield batch["inputs"], batch["labels"]
            bar.update(len(batch["inputs"]))

    with eval_mode(clt), bar:
        return measure(clt, rows_of_batches())


def measure(
    clt: CrossLayerTranscoder, rows: Iterable[tuple[Tensor, Tensor]], forward: Callable | None = None
) -> MetricSums:
    """
    The sums of the metrics over raw inputs and labels, (N, L, D) each, wherever they are; with another `forward` than
    that of the CLT, on demand.
    """
    sums = MetricSums(clt.config.num_layers, clt.config.d_model, clt.num_held, clt.device)
    for inputs, labels in rows:
        output = (forward or clt)(inputs.to(clt.device))
        sums.update(labels, output.reconstruction, output.features)
    return sums


def activations(
    harvester: Harvester,
    token_batches: Iterable[dict],
    batch_size: int,
    dtype: torch.dtype | None = None,
    skip_bad: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """
    Harvested activations of the counted tokens, in order: dicts of `inputs` and `labels`, raw, (N, L, D) each, with N
    at most `batch_size`, in `dtype`, by default float32 (float64 if the language model is). With `skip_bad`, blocks
    with one that is NaN or infinite are left out.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is below 1; give the number of tokens that fit in memory")
    if dtype is None:
        dtype = torch.promote_types(harvester.model.dtype, torch.float32)
    for batch in token_batches:
        inputs, labels = harvester.harvest(batch, dtype=dtype, skip_bad=skip_bad)
        for start in range(0, len(inputs), batch_size):
            part = slice(start, start + batch_size)
            yield {"inputs": inputs[part], "labels": labels[part]}


@contextmanager
def eval_mode(clt: CrossLayerTranscoder) -> Iterator[None]:
    """Eval mode while the block runs, then the mode that was."""
    was_training = clt.training
    clt.eval()
    try:
        yield
    finally:
        clt.train(was_training)


def format_replacement(metrics: dict) -> str:
    """The replacement metrics of [`evaluate_clt`] as two lines of text; losses and KL in nats."""
    return (
        f"next-token cross-entropy: model {metrics['ce_original']:.4f}, MLPs replaced {metrics['ce_replaced']:.4f}, "
        f"ablated {metrics['ce_ablated']:.4f}; recovered {format_number(metrics['ce_recovered'], '.1%')}\n"
        f"KL {metrics['kl']:.4f}, top-1 agreement {metrics['top1_agreement']:.1%} on {metrics['num_predictions']:,} "
        "predictions"
    )


__all__ = ["evaluate_clt", "evaluation_sums"]
