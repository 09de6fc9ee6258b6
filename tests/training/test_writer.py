"""Checkpoints that are written while training goes on: as whole, and of the same state, as those it waits for."""

import errno
import json
import logging
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from hf_clt.training import checkpoints
from hf_clt.training import writer as writer_module
from hf_clt.training.checkpoints import CheckpointError, list_checkpoints
from hf_clt.training.writer import CheckpointWriter
from tests.training.test_resuming import assert_same_end
from tests.training.test_trainer import recorded


def in_background(trainer):
    trainer.writer = CheckpointWriter(True)
    return trainer


def before_writing(monkeypatch, act):
    """Calls `act` with the path before each file of tensors."""
    write = checkpoints._write_tensors
    monkeypatch.setattr(checkpoints, "_write_tensors", lambda path, tensors: (act(path), write(path, tensors)))


def names_of(folder):
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def test_what_is_written_is_the_state_of_that_update(make, tmp_path, monkeypatch):
    config = {"activation_fn": "batchtopk"}
    arguments = {"training_steps": 9, "checkpoint_interval": 2, "learning_rate": 3e-3, "dead_feature_window": 3}
    make(config, **arguments, save_total_limit=None).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    trainer, late = make(config, **arguments, save_total_limit=2), []

    def wait_for_the_next_update(path):
        step = int(path.parent.name.split("-")[1].split(".")[0])
        until = time.perf_counter() + 1
        while trainer.step <= step + 1 < 9 and time.perf_counter() < until and trainer.writer._thread is not None:
            time.sleep(0.001)
        late.append(trainer.step > step)

    before_writing(monkeypatch, wait_for_the_next_update)
    in_background(trainer).train()
    assert any(late)
    assert names_of(tmp_path / "run") == ["checkpoint-6", "checkpoint-8"]
    assert not any(thread.name == "hf_clt writes a checkpoint" for thread in threading.enumerate())
    for name in names_of(tmp_path / "run"):
        one, two = (tmp_path / run / name for run in ("straight", "run"))
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        for path in one.glob("*.safetensors"):
            expected, found = load_file(path), load_file(two / path.name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(value, found[key]) for key, value in expected.items()), path
        state, other = (json.loads((folder / "state.json").read_text()) for folder in (one, two))
        differ = {key for key in state if state[key] != other[key]}
        assert differ <= {"seconds", "run_id", "args"} and state["seconds"] != other["seconds"]
        assert (one / "rank-0.json").read_text() == (two / "rank-0.json").read_text()
    make(config, **arguments, resume_from_checkpoint="latest").train()
    assert_same_end(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("step", [4, 8])
def test_a_full_disk_stops_the_run_and_at_its_end_fails_it(make, tmp_path, monkeypatch, step):
    def full(path):
        if f"checkpoint-{step}" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    before_writing(monkeypatch, full)
    trainer = in_background(make(training_steps=9, checkpoint_interval=2))
    before = f"checkpoint-{step - 2}"
    with pytest.raises(CheckpointError, match=rf"checkpoint-{step} cannot .*No space.*; {before} is whole"):
        trainer.train()
    assert names_of(tmp_path / "run")[-1] == before
    assert (tmp_path / "run" / "config.json").exists() == (trainer.step == 9)
    assert trainer.step <= step + 2 if step == 4 else trainer.step == 9


def test_ctrl_c_waits_for_the_last_checkpoint_and_writes_its_own(make, tmp_path, monkeypatch):
    before_writing(monkeypatch, lambda path: time.sleep(0.05))
    trainer = in_background(make(training_steps=9, checkpoint_interval=4))
    recorded(trainer, stop_at=5)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5") as info:
        trainer.train()
    assert info.value.__notes__[0].startswith("checkpoint-5 is whole")
    assert names_of(tmp_path / "run") == ["checkpoint-4", "checkpoint-5"]
    assert len(list_checkpoints(tmp_path / "run")) == 2


def test_the_second_ctrl_c_waits_for_nothing_and_leaves_no_checkpoint_in_the_making(make, tmp_path, monkeypatch):
    go_on = threading.Event()
    before_writing(monkeypatch, lambda path: go_on.wait(20))
    trainer = in_background(make(training_steps=9, checkpoint_interval=4))
    endless = trainer.buffer.endless

    def interrupted():
        for batch in endless():
            if trainer.step == 5:
                raise KeyboardInterrupt
            yield batch

    trainer.buffer.endless = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names_of(tmp_path / "run") == [".checkpoint-4.tmp"]
    go_on.set()
    trainer.writer._thread.join()
    assert names_of(tmp_path / "run") == []


def test_without_memory_for_copies_training_waits(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writer_module, "free_memory", lambda device: 100_000)
    trainer = in_background(make(training_steps=5, checkpoint_interval=2))
    threads = []
    before_writing(monkeypatch, lambda path: threads.append(threading.current_thread()))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert set(threads) == {threading.main_thread()} and names_of(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    messages = [record.getMessage() for record in caplog.records if "training waits" in record.getMessage()]
    assert len(messages) == 1 and "of which 0.0 GB are free" in messages[0]
