"""The evaluations of a run, on its held-out text, by all its processes together."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from ..evaluation.evaluate import activations, measure
from ..evaluation.metrics import MetricSums
from ..evaluation.replacement import replacement_metrics
from ..harvest.statistics import gather
from ..modeling_clt import CLTOutput, CrossLayerTranscoder
from ..sharding import gather_tokens
from .processes import StopRequested, any_process, together


if TYPE_CHECKING:
    from .trainer import CLTTrainer


@torch.no_grad()
def evaluate_heldout(trainer: "CLTTrainer", folded: bool, with_replacement: bool) -> dict:
    """
    The metrics of a trainer's CLT on its held-out text, in raw space, over all processes.

    Args:
        trainer: The run; its CLT is in eval mode afterwards.
        folded: Measures what a release would have, statistics folded into the weights.
        with_replacement: Measures the language model with its MLPs replaced by the CLT as well.
    """
    clt, accelerator, shard = trainer.model, trainer.accelerator, trainer.shard
    clt.eval()
    if clt.config.activation_fn == "batchtopk" and accelerator.num_processes > 1:
        for threshold in clt.thresholds:  # those of the first process, which are released
            torch.distributed.broadcast(threshold.value, src=0)
    bar = tqdm(
        total=trainer.args.eval_tokens, desc="Evaluating", unit="token", disable=not trainer.progress, leave=False
    )
    dtype = torch.promote_types(trainer.buffer.dtype, torch.float32)

    def forward(inputs: torch.Tensor) -> CLTOutput:
        with trainer.clt_stopwatch.running():
            # Not `clt(...)`, which with mixed precision would round the raw activations to half precision.
            return CrossLayerTranscoder.forward(clt, inputs)

    def rows() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = activations(trainer.harvester, trainer.heldout, trainer.args.batch_size, dtype, trainer.skip_bad)
        for batch in batches if shard is None else read_in_lockstep(trainer, batches):
            if trainer.signals.requested and shard is None:
                raise StopRequested
            yield batch["inputs"], batch["labels"]
            bar.update(len(batch["inputs"]))

    def measured() -> MetricSums:
        return measure(clt, rows(), forward)

    with clt.folded() if folded else nullcontext():
        with bar:
            sums = together(accelerator, measured) if shard is None else measured()
        metrics = gather_sums(trainer, sums).compute()
        return {**metrics, **measure_replacement(trainer)} if with_replacement else metrics


def measure_replacement(trainer: "CLTTrainer") -> dict:
    """The metrics of the language model with its MLPs replaced by the CLT, on the held-out text."""
    accelerator = trainer.accelerator
    batches = together(accelerator, lambda: list(trainer.heldout))  # what fails in reading fails here
    alone = accelerator.num_processes == 1

    def stop_if_asked() -> None:
        if trainer.signals.requested and alone:
            raise StopRequested

    return replacement_metrics(
        trainer.harvester.model,
        trainer.model,
        batches,
        reduce=None if alone else lambda sums: accelerator.reduce(sums, "sum"),
        progress=trainer.progress,
        before_batch=stop_if_asked,
    )


def read_in_lockstep(trainer: "CLTTrainer", batches: Iterable[dict]) -> Iterator[dict]:
    """The batches of the processes that share the features, together, until the last of all processes runs out."""
    batches, accelerator = iter(batches), trainer.accelerator
    nothing = torch.empty(0, trainer.config.num_layers, trainer.config.d_model)

    def read() -> dict:
        if trainer.signals.requested:
            raise StopRequested
        return next(batches, {"inputs": nothing, "labels": nothing})

    while True:
        own = together(accelerator, read)
        batch = gather_tokens(trainer.shard, {name: rows.to(accelerator.device) for name, rows in own.items()})
        has_rows = len(batch["inputs"]) > 0
        # Reading is agreed on by all processes, so a group that has run out goes on for those that have not.
        if not any_process(accelerator, has_rows):
            return
        if has_rows:
            yield batch


def gather_sums(trainer: "CLTTrainer", sums: MetricSums) -> MetricSums:
    """The sums of all processes, with the features of all slices."""
    parts = gather(trainer.accelerator, sums.tensors())
    if trainer.shard is not None:
        parts = MetricSums.with_joined_features(parts, trainer.shard.size)
    return MetricSums.from_gathered(parts)
