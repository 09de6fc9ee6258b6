"""What of a run goes into a checkpoint, and comes back from one. The files are those of `checkpoints.py`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from ..configuration_clt import CLT_CONFIG_HELP, CLTConfig
from .arguments import FIXED
from .checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_optimizer_tensors,
    newest_usable,
    optimizer_tensors,
    save_checkpoint,
)
from .optimizers import make_optimizer
from .processes import OtherProcessGone, StopRequested, any_process
from .schedules import growing_reach


if TYPE_CHECKING:
    from ..modeling_clt import CrossLayerTranscoder
    from .trainer import CLTTrainer

logger = logging.getLogger(__name__)


@contextmanager
def checkpoint_on_failure(
    trainer: "CLTTrainer",
    optimizer: torch.optim.Optimizer,
    before: tuple[dict, dict] | None = None,
    alone: bool = False,
) -> Iterator[None]:
    """
    If the block fails, in all processes, a checkpoint is written, and a note on the error says what to go on from.
    Where one process may fail `alone` it cannot write a checkpoint, and the note names the newest.
    """
    try:
        yield
    except (Exception, StopRequested) as error:
        try:
            trainer.writer.wait()
            is_one = trainer.accelerator.num_processes == 1
            can_save = is_one or not (alone or isinstance(error, OtherProcessGone))
            if can_save and trainer.step > 0 and trainer.saved_step != trainer.step:
                save_run(trainer, optimizer, before, in_place=True)
            if isinstance(error, StopRequested) and trainer.step > 0:
                error.args = (f"stopped at step {trainer.step}",)
            error.add_note(newest_usable(trainer.output_dir))
        except CheckpointError as failure:
            if isinstance(error, StopRequested):
                raise
            error.add_note(str(failure))
        raise


def moving_state(trainer: "CLTTrainer") -> tuple[dict, dict]:
    """What changes between two updates: `own` of a checkpoint, and the CLT's buffers (running thresholds)."""
    values, tensors = trainer.buffer.state_dict()
    values = {
        "buffer": values,
        "tokens_since_log": trainer.tokens_since_log,
        "updates_since_log": trainer.updates_since_log,
    }
    tensors |= {"torch_rng": torch.get_rng_state(), "totals": trainer.totals.clone()}
    buffers = {name: value.clone() for name, value in trainer.model.named_buffers()}
    return {"values": values, "tensors": tensors}, buffers


def save_run(
    trainer: "CLTTrainer",
    optimizer: torch.optim.Optimizer,
    before: tuple[dict, dict] | None = None,
    in_place: bool = False,
) -> None:
    """
    Writes a checkpoint, once the last is written; with the state `before` the update that is going on, if that is
    given. Where the trainer's [`CheckpointWriter`] writes in the background, it goes on writing, unless `in_place`.
    One of weights that are not finite would in time take the place of the last good one: it raises
    [`CheckpointError`].
    """
    trainer.writer.wait()
    clt, accelerator, args = trainer.model, trainer.accelerator, trainer.args
    names = [name for name, _ in clt.named_parameters()]
    lowest = [-torch.inf if name.startswith("thresholds.") else 0.0 for name in names]  # log θ of θ = 0
    weights = zip(clt.parameters(), lowest, strict=True)
    is_bad = torch.stack([~(p.isfinite() | (p == low)).all() for p, low in weights])
    if any_process(accelerator, bool(is_bad.any())):
        bad = [name for name, found in zip(names, is_bad.tolist(), strict=True) if found]
        raise CheckpointError(
            f"step {trainer.step} is not saved: {bad[0] if bad else 'a weight of another process'} is not finite; "
            f"lower learning_rate={args.learning_rate:g}; {newest_usable(trainer.output_dir)}"
        )
    trainer.read_clocks()
    own, buffers = moving_state(trainer) if before is None else before
    # Since `before`, other tokens may have taken the place of those that were unread then.
    if args.checkpoint_activations and before is None:
        own["tensors"] |= trainer.buffer.unread_activations()
    shared = {
        "model": {**clt.state_dict(), **buffers},
        "optimizer": optimizer_tensors(clt, optimizer),
        "trainer": {"steps_since_fired": trainer.steps_since_fired},
        "state": {
            "step": trainer.step,
            "tokens_seen": trainer.tokens_seen,
            "seconds": trainer.seconds,
            "run_id": trainer.run_id,
            "num_processes": accelerator.num_processes,
            "feature_parallel_size": args.feature_parallel_size,
            "config": trainer.config.to_dict(),
            "args": args.to_dict(),
            "activations": trainer.fingerprint,
            "revives": trainer.revives,
            "steering": trainer.steering.tolist() if args.target_l0 is not None else None,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        },
    }
    step = trainer.step

    def save(shared: dict, own: dict) -> None:
        keep, writer = args.save_total_limit, trainer.writer
        folder = save_checkpoint(
            trainer.output_dir, step, shared, own, accelerator, keep, trainer.shard, lambda: writer.given_up
        )
        if accelerator.is_main_process and trainer.progress:
            tqdm.write(f"checkpoint written: {folder}")

    trainer.writer.write(save, shared, own, in_place)
    trainer.saved_step = step


def restore_run(trainer: "CLTTrainer") -> torch.optim.Optimizer:
    """
    Brings a trainer to where its checkpoint stands. The tensors are mapped from their files and count as memory of the
    process where they were read, so each part is let go of when it is copied, and nothing keeps a view.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the checkpoint is damaged, or of a run with other settings that cannot change.
    """
    shared, own = load_checkpoint(
        trainer.resume_from,
        trainer.accelerator.process_index,
        trainer.accelerator.num_processes,
        trainer.shard,
        trainer.model.per_feature(),
    )
    state = shared["state"]
    check_same_run(trainer, state)
    restore_weights(trainer.model, shared.pop("model"))
    optimizer = make_optimizer(trainer.model, trainer.args)
    load_optimizer_tensors(trainer.model, optimizer, shared.pop("optimizer"))
    trainer.steps_since_fired.copy_(shared["trainer"]["steps_since_fired"])
    trainer.step, trainer.tokens_seen, trainer.seconds = state["step"], state["tokens_seen"], state["seconds"]
    if trainer.goes_on:
        trainer.saved_step = trainer.step
        trainer.run_id = state.get("run_id", trainer.run_id)
    trainer.revives = state.get("revives", True)
    if state.get("steering") is not None:
        trainer.steering.copy_(torch.tensor(state["steering"], dtype=torch.float64))
    if state["scaler"] is not None and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.tokens_since_log = own["values"]["tokens_since_log"]
    trainer.updates_since_log = own["values"]["updates_since_log"]
    trainer.totals.copy_(own["tensors"]["totals"])
    trainer.buffer.load_state_dict(own["values"]["buffer"], own["tensors"])
    torch.set_rng_state(own["tensors"]["torch_rng"])
    return optimizer


def restore_weights(clt: "CrossLayerTranscoder", tensors: dict[str, torch.Tensor]) -> None:
    """The weights and statistics of a checkpoint."""
    if "mean_in" in tensors:
        clt.set_normalization(*(tensors[name] for name in ("mean_in", "std_in", "mean_out", "std_out")))
    clt.load_state_dict(tensors)


def check_same_run(trainer: "CLTTrainer", state: dict) -> None:
    """
    Refuses a checkpoint with another configuration, language model, or another setting that cannot change within a
    run, whose `state.json` is given; names other settings that differ.
    """
    args, name = trainer.args, trainer.resume_from.name
    saved = state["config"]
    for field in CLT_CONFIG_HELP:
        now = getattr(trainer.config, field)
        before = saved.get(field, getattr(CLTConfig, field, None))  # a field that came later had its default
        if before != now and not field.startswith("base_model"):
            raise ValueError(
                f"{field}={now!r}, but {name} was trained with {field}={before!r}; resume with the same configuration"
            )
    before = state.get("activations", trainer.fingerprint)  # of a version that did not keep it
    if type(before) is not type(trainer.fingerprint) or not trainer.harvester.has_fingerprint(before):
        what = "activation_cache" if args.activation_cache is not None else "model"
        raise ValueError(
            f"{what}={getattr(args, what)!r} gives other activations than those that {name} was trained on, of "
            f"{state['args'].get(what)!r}; resume with these, or begin a run with init_from"
        )
    changed = args.changed_since(state["args"])
    if isinstance(before, dict) and before["dtype"] == trainer.fingerprint["dtype"]:
        changed.pop("model_dtype", None)  # said in another way, or by the device
    for field in FIXED:
        if field in changed:
            raise ValueError(
                f"{field}={changed[field][1]!r}, but {name} was trained with {field}={changed[field][0]!r}; resume "
                "with the same"
            )
    before, now = (
        growing_reach(state["step"], values["training_steps"], values.get("reach_growth", 0.0), trainer.config.reach)
        for values in (state["args"], args.to_dict())
    )
    if now < before:  # decoders that are trained would be set to 0
        raise ValueError(
            f"reach_growth={args.reach_growth:g} of training_steps={args.training_steps} is a reach of {now} at "
            f"update {state['step']}, and {name} has {before}; resume with the same two"
        )
    if changed and trainer.accelerator.is_main_process:
        told = ", ".join(f"{field} {old!r} -> {new!r}" for field, (old, new) in changed.items())
        logger.warning("%s was trained with other settings, and goes on with: %s", name, told)
