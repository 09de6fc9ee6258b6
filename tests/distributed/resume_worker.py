"""
Training runs that are stopped, fail, or go on in another layout, as test_resume.py starts them: in one process, or in
each of several by launching this file. A run tells which tokens it trained on.
"""

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from datasets.utils import file_utils
from safetensors.torch import save_file

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments
from hf_clt.training import processes
from hf_clt.training.checkpoints import optimizer_tensors


class Gone(io.BytesIO):
    """A file at the other end of a connection that is interrupted."""

    def read(self, *arguments):
        raise file_utils.httpx.ConnectError("the network is gone")


def recorded(trainer) -> list:
    """Of every token that is trained on: the pass over the text it is in, and which token it is."""
    buffer, trained = trainer.buffer, []
    next_batch = buffer._next_batch

    def recording():
        for slot in buffer.order[buffer.read : buffer.read + buffer.batch_size].tolist():
            batch = buffer.token_batches[int(buffer.slot_batch[slot])]
            prompt, position = batch["counted"].nonzero()[int(buffer.slot_row[slot])].tolist()
            trained.append([buffer.epoch, *token_of(batch, prompt, position)])
        return next_batch()

    buffer._next_batch = recording
    return trained


def token_of(batch: dict, prompt: int, position: int) -> list[int]:
    """Its document, its position in its block, and the block."""
    return [int(batch["documents"][prompt, position]), position, *batch["input_ids"][prompt].tolist()]


def counted_tokens(stream) -> list[list[int]]:
    """All tokens of a stream that count."""
    return [token_of(batch, *place) for batch in stream for place in batch["counted"].nonzero().tolist()]


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
    Trains, and tells how it ended.

    Args:
        arguments, config: Fields of [`CLTTrainingArguments`] and of [`CLTConfig`].
        stop_at: The step after which this process gets SIGTERM.
        break_at: The step from which on this process cannot read text.
        patience: Seconds for which it then waits until it gets SIGTERM.
        ask_seconds: At most between two times that the processes ask each other how they are; 0: at every batch.
    """
    processes.ASK_SECONDS = ask_seconds
    asked = [0]
    smallest = processes.smallest

    def counting(*arguments):
        asked[0] += 1
        return smallest(*arguments)

    processes.smallest = counting
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trainer = CLTTrainer(CLTTrainingArguments(**arguments), CLTConfig(**config))
    trained, start = recorded(trainer), {}
    update = trainer._update

    def watched(model, optimizer):
        if not start:
            start["step"] = trainer.step
            start["tensors"] = {
                **{f"model.{n}": value.clone() for n, value in trainer.model.state_dict().items()},
                **{f"optimizer.{n}": v.clone() for n, v in optimizer_tensors(trainer.model, optimizer).items()},
                "trainer.steps_since_fired": trainer.steps_since_fired.clone(),
            }
        if break_at == trainer.step:
            trainer.buffer.tokens._next_batch = no_connection
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

    def no_connection():
        if patience is not None:
            file_utils._add_retries_to_file_obj_read_method(Gone()).read()
        raise ConnectionError("the network is gone")

    trainer._update = watched
    told = {"rank": trainer.accelerator.process_index, "processes": trainer.accelerator.num_processes}
    begun = time.monotonic()
    try:
        trainer.train()
    except (Exception, KeyboardInterrupt) as error:
        told["error"] = [type(error).__name__, str(error), *getattr(error, "__notes__", [])]
    processes.smallest = smallest
    told |= {
        "seconds": time.monotonic() - begun,
        "asked": asked[0],
        "step": trainer.step,
        "start": start.get("step"),
        "trained": trained,
    }
    return {**told, "tensors": start.get("tensors", {})}


def main(folder: str, runs: str) -> None:
    """Each run is a list: arguments, fields of the CLT, and per process what else [`run`] takes."""
    for name, (arguments, config, further) in json.loads(runs).items():
        told = run(arguments, config, **further[int(os.environ["RANK"])])
        tensors = {n: tensor.contiguous() for n, tensor in told.pop("tensors").items()}
        save_file(tensors, Path(folder) / f"{name}-{told['rank']}.safetensors")
        (Path(folder) / f"{name}-{told['rank']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
