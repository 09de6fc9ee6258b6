"""
Training runs that are watched: what they trained on, how they ended, and what each process held then. Tests call
[`run`] in their own process, or launch this file in several.
"""

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState
from datasets.utils import file_utils
from safetensors.torch import save_file

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments
from hf_clt.attribution import AttributionGraph, attribute
from hf_clt.training import evaluation, processes
from hf_clt.training.checkpoints import optimizer_tensors
from hf_clt.training.evaluation import read_in_lockstep
from hf_clt.training.processes import disconnect
from hf_clt.training.setup import load_initial_clt
from tests.attribution.cases import make_model, prompt
from tests.distributed.sharded_model import check_model
from tests.reference import random_clt


class DeadConnection(io.BytesIO):
    """A file at the other end of a connection that is interrupted."""

    def read(self, *arguments):
        raise file_utils.httpx.ConnectError("the network is gone")


def make_trainer(arguments: dict, config: dict) -> CLTTrainer:
    """A trainer of a new CLT, or of the one that `init_from` names."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    args = CLTTrainingArguments(**arguments)
    if args.init_from is None:
        return CLTTrainer(args, CLTConfig(**config))
    return CLTTrainer(args, model=load_initial_clt(args, {}))


def record_tokens(trainer: CLTTrainer) -> list:
    """A list that grows by every token that is trained on: the pass over the text it is in, and [`identify_token`]."""
    buffer, trained = trainer.buffer, []
    next_batch = buffer._next_batch

    def recording():
        for slot in buffer.order[buffer.read : buffer.read + buffer.batch_size].tolist():
            batch = buffer.token_batches[int(buffer.slot_batch[slot])]
            prompt, position = batch["counted"].nonzero()[int(buffer.slot_row[slot])].tolist()
            trained.append([buffer.epoch, *identify_token(batch, prompt, position)])
        return next_batch()

    buffer._next_batch = recording
    return trained


def identify_token(batch: dict, prompt: int, position: int) -> list[int]:
    """Its document, its position in its block, and the block."""
    return [int(batch["documents"][prompt, position]), position, *batch["input_ids"][prompt].tolist()]


def counted_tokens(stream) -> list[list[int]]:
    """All tokens of a stream that count."""
    return [identify_token(batch, *place) for batch in stream for place in batch["counted"].nonzero().tolist()]


def record_batches(trainer: CLTTrainer) -> dict:
    """A dict that grows by the activations of every batch that is trained on."""
    forward, recorded = trainer.model.forward, {}

    def recording(inputs, labels=None, **kwargs):
        if trainer.model.training and labels is not None:  # without, the decoders' start is made
            number = len(recorded) // 2
            recorded[f"batches.inputs.{number}"], recorded[f"batches.labels.{number}"] = inputs, labels
        return forward(inputs, labels=labels, **kwargs)

    trainer.model.forward = recording
    return recorded


def record_heldout() -> dict:
    """A dict of the activations that the last evaluation was on, if the features are spread over processes."""
    recorded = {}

    def recording(trainer, rows):
        recorded.clear()
        for number, batch in enumerate(read_in_lockstep(trainer, rows)):
            recorded.update({f"heldout.{n}.{number}": tensor for n, tensor in batch.items()})
            yield batch

    evaluation.read_in_lockstep = recording
    return recorded


def run(
    arguments: dict,
    config: dict,
    *,
    stop_at: int | None = None,
    break_at: int | None = None,
    patience: float | None = None,
    ask_seconds: float = 0.0,
) -> dict:
    """
    Trains, and reports how it ended.

    Args:
        arguments, config: Fields of [`CLTTrainingArguments`] and of [`CLTConfig`].
        stop_at: The step after which this process gets SIGTERM.
        break_at: The step from which on this process cannot read text.
        patience: Seconds for which it then waits until it gets SIGTERM.
        ask_seconds: At most between two times that the processes ask each other how they are; 0: at every batch.

    Returns:
        `dict`: how it ended; `trained`, see [`record_tokens`]; of a run that came to its end, `metrics` and how much
        this process held; `tensors`: the state before the first update ("start."), after the last ("end."), and all
        activations that it trained and was evaluated on ("batches.", "heldout.").
    """
    trainer = make_trainer(arguments, config)
    trained, batches, heldout_batches = record_tokens(trainer), record_batches(trainer), record_heldout()
    start, prepared, times_asked = {}, {}, 0
    update, smallest = trainer._update, processes.smallest

    def count_asking(*arguments):
        nonlocal times_asked
        times_asked += 1
        return smallest(*arguments)

    def watch_update(model, optimizer):
        if not start:
            start["step"] = trainer.step
            prepared.update(model=model, optimizer=optimizer)
            start["tensors"] = {
                **{f"start.model.{n}": value.clone() for n, value in trainer.model.state_dict().items()},
                **{f"start.optimizer.{n}": v.clone() for n, v in optimizer_tensors(trainer.model, optimizer).items()},
                "start.trainer.steps_since_fired": trainer.steps_since_fired.clone(),
            }
        if break_at == trainer.step:
            trainer.buffer.tokens._next_batch = fail_to_read
            if patience is not None:
                threading.Timer(patience, os.kill, (os.getpid(), signal.SIGTERM)).start()
        before = len(trained)
        try:
            done = update(model, optimizer)
        except BaseException:
            del trained[before:]  # read, and not trained on
            raise
        if trainer.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    def fail_to_read():
        if patience is not None:
            file_utils._add_retries_to_file_obj_read_method(DeadConnection()).read()
        raise ConnectionError("the network is gone")

    trainer._update = watch_update
    report = {"rank": trainer.accelerator.process_index, "processes": trainer.accelerator.num_processes}
    begun = time.monotonic()
    watched = patch.multiple(processes, ASK_SECONDS=ask_seconds, smallest=count_asking)
    with watched, patch("hf_clt.hub.card.draw_plots"):  # plots take longer than the run
        try:
            trainer.train()
        except (Exception, KeyboardInterrupt) as error:
            report["error"] = [type(error).__name__, str(error), *getattr(error, "__notes__", [])]
    report |= {"seconds": time.monotonic() - begun, "asked": times_asked, "step": trainer.step, "trained": trained}
    report["start"], tensors = start.get("step"), start.get("tensors", {})
    if "error" not in report:
        report |= count_held(trainer, prepared["optimizer"])
        report["gradients_are_views"] = getattr(prepared["model"], "gradient_as_bucket_view", None)
        report["metrics"] = trainer.evaluate()
        tensors |= {f"end.{n}": value for n, value in trainer.model.state_dict().items()}
        tensors |= {"end.steps_since_fired": trainer.steps_since_fired, **batches, **heldout_batches}
    return {**report, "tensors": tensors}


def count_held(trainer: CLTTrainer, optimizer) -> dict:
    """Numbers that this process keeps of parameters and optimizer state, and what it has of the held-out text."""
    counted = [batch["documents"][batch["counted"]] for batch in trainer.heldout]
    state = [value for entries in optimizer.optimizer.state.values() for value in entries.values()]
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "optimizer": sum(value.numel() for value in state),
        "heldout_documents": torch.cat(counted).unique().tolist() if counted else [],
        "heldout_tokens": sum(map(len, counted)),
    }


def make_graphs() -> list[AttributionGraph]:
    """Of one prompt, with every active feature a node, and with some."""
    model = make_model("llama")
    clt = random_clt(num_layers=model.config.num_hidden_layers, d_model=model.config.hidden_size, num_features=20)
    settings = {"dtype": torch.float64, "batch_size": 7}
    return [attribute(model, clt, prompt(), max_feature_nodes=nodes, rank_every=9, **settings) for nodes in (None, 25)]


def main(folder: str, runs: str) -> None:
    """Each run is a list: arguments, fields of the CLT, and per process what else [`run`] takes."""
    if os.environ["WORLD_SIZE"] == "2":
        check_model(Path(folder))
        for number, graph in enumerate(make_graphs()):
            graph.save(Path(folder) / f"graph-{number}-{os.environ['RANK']}")
    for name, (arguments, config, *further) in json.loads(runs).items():
        rank = int(os.environ["RANK"])
        report = run(arguments, config, **(further[rank] if further else {}))
        tensors = {n: tensor.contiguous().clone() for n, tensor in report.pop("tensors").items()}
        save_file(tensors, Path(folder) / f"{name}-{rank}.safetensors")
        (Path(folder) / f"{name}-{rank}.json").write_text(json.dumps(report))
    disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
