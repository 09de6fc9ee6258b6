"""
A run that is stopped, fails or finds bad activations: what it writes, and that a resumed run ends where the
uninterrupted one does.
"""

import errno
import json
import math
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from hf_clt.harvest.harvester import ActivationError
from hf_clt.harvest.text import StreamError
from hf_clt.training import checkpoints, preparation, publishing
from hf_clt.training import trainer as trainer_module
from hf_clt.training.checkpoints import CheckpointError, list_checkpoints
from tests.training.test_trainer import STATISTICS, recorded, released, rows_of


WITHOUT_TIME = {"tokens_per_second"}


def assert_same_metrics(one, two):
    one, two = rows_of(one), rows_of(two)
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        assert {k: v for k, v in left.items() if k not in WITHOUT_TIME} == {
            k: v for k, v in right.items() if k not in WITHOUT_TIME
        }


@pytest.mark.parametrize("activation_fn", ["jumprelu", "relu", "batchtopk"])
@pytest.mark.parametrize("stop_at", [2, 6])
def test_killed_and_resumed_is_bit_for_bit_the_same(make, tmp_path, monkeypatch, activation_fn, stop_at):
    """Twelve steps over a text of about five, and a buffer of two: many refills, and checkpoints in several epochs."""
    config = {"activation_fn": activation_fn}
    arguments = {
        "training_steps": 12,
        "batch_size": 250,
        "log_interval": 2,
        "eval_interval": 4,
        "dead_feature_window": 3,
        "learning_rate": 3e-3,
    }
    if activation_fn == "batchtopk":
        arguments |= {"initial_k": 12, "k_anneal_steps": 8}
    if activation_fn == "relu":
        arguments |= {"target_l0": 6}
    if activation_fn == "jumprelu":
        arguments |= {"reach_growth": 0.6}
    straight = make(config, **arguments)
    straight.train()
    assert straight.buffer.epoch == 2
    shutil.move(tmp_path / "run", tmp_path / "straight")

    # Harvesting and reading ahead changes nothing either, nor does keeping the activations.
    monkeypatch.setattr(preparation, "batches_ahead", lambda args, device: stop_at)
    arguments["overlap_harvest"] = activation_fn == "batchtopk"
    arguments["checkpoint_activations"] = stop_at == 6
    stopped = make(config, **arguments)
    recorded(stopped, stop_at=stop_at)
    with pytest.raises(KeyboardInterrupt, match=f"stopped at step {stop_at}"):
        stopped.train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{stop_at}"]
    own = load_file(tmp_path / "run" / f"checkpoint-{stop_at}" / "rank-0.safetensors")
    assert ("inputs" in own) == (stop_at == 6)
    assert not (tmp_path / "run" / "config.json").exists()  # nothing is released half trained
    assert [row["step"] for row in rows_of(tmp_path / "run", "train")][-1] == stop_at
    torch.manual_seed(999)

    resumed = make(config, **arguments, resume_from_checkpoint="latest")
    resumed.train()
    assert resumed.step == 12 and resumed.tokens.read_ahead == stop_at
    assert not any(thread.name == "hf_clt reads ahead" for thread in threading.enumerate())
    for name, value in released(tmp_path / "straight").items():
        assert torch.equal(released(tmp_path / "run")[name], value), name
    assert torch.equal(resumed.steps_since_fired, straight.steps_since_fired)
    assert_same_metrics(tmp_path / "straight", tmp_path / "run")


def test_what_a_stopped_push_left_is_removed(make, tmp_path):
    stopped = make(training_steps=4)
    recorded(stopped, stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    (tmp_path / "run" / ".pushing.tmp").mkdir()
    (tmp_path / "run" / ".pushing.tmp" / "W_enc_0.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "notes").mkdir()
    make(training_steps=4, resume_from_checkpoint="latest").train()
    assert not (tmp_path / "run" / ".pushing.tmp").exists() and (tmp_path / "run" / "notes").exists()


def test_a_line_of_metrics_that_spans_a_resume(make, tmp_path):
    """Stopped between two lines, the line after it still tells of all the steps and tokens since the line before."""
    arguments = {"training_steps": 8, "log_interval": 4}
    make(**arguments).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    stopped = make(**arguments)
    recorded(stopped, stop_at=6)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    make(**arguments, resume_from_checkpoint="latest").train()
    assert_same_metrics(tmp_path / "straight", tmp_path / "run")


def test_lines_after_the_checkpoint_are_dropped(make, tmp_path):
    """A run that is killed without a checkpoint leaves lines that the resumed run writes again."""
    arguments = {"training_steps": 9, "checkpoint_interval": 3, "save_total_limit": None}
    make(**arguments).train()
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "spl')  # the power went
    make(**arguments, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")).train()
    assert_same_metrics(tmp_path / "straight", tmp_path / "run")
    assert all(
        torch.equal(value, released(tmp_path / "straight")[name]) for name, value in released(tmp_path / "run").items()
    )


def test_checkpoints_come_when_due_and_old_ones_go(make, tmp_path):
    make(training_steps=8, checkpoint_interval=2, save_total_limit=2).train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-6"]
    tensors = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert set(STATISTICS) <= tensors.keys()  # not folded
    assert (tmp_path / "run" / "config.json").is_file()


def test_after_a_resume_from_an_older_checkpoint_the_newest_is_the_one_written_last(make, tmp_path):
    """Going back to step 2 leaves checkpoint-6 of a past that did not happen; "latest" must not return to it."""
    arguments = {"training_steps": 8, "save_total_limit": 2}
    make(**arguments, checkpoint_interval=2).train()  # leaves 4 and 6
    resumed = make(**arguments, checkpoint_interval=0, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    recorded(resumed, stop_at=1)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5"):
        resumed.train()
    again = make(**arguments, checkpoint_interval=0, resume_from_checkpoint="latest")
    assert again.resume_from.name == "checkpoint-5"


def test_a_resume_with_another_configuration_is_refused(make, tmp_path):
    make(training_steps=4, checkpoint_interval=2).train()
    for config, message in (
        ({"num_features": 80}, "num_features=80.*checkpoint-2.*num_features=96"),
        (
            {"activation_fn": "topk"},
            "activation_fn='topk'.*checkpoint-2.*activation_fn='jumprelu'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make(config, resume_from_checkpoint="latest").train()
    with pytest.raises(ValueError, match=r"496 tokens.* 620;"):
        make(resume_from_checkpoint="latest", n_batches_in_buffer=5).train()


def test_a_checkpoint_from_before_a_field_came_had_its_default(make, tmp_path):
    make(training_steps=4, checkpoint_interval=2).train()
    path = tmp_path / "run" / "checkpoint-2" / "state.json"
    state = json.loads(path.read_text())
    del state["config"]["sparsity_first_layer"], state["args"]["decay_steps"]
    path.write_text(json.dumps(state))
    folder = str(path.parent)
    with pytest.raises(ValueError, match=r"sparsity_first_layer=0.5.*with sparsity_first_layer=1.0"):
        make({"sparsity_first_layer": 0.5}, resume_from_checkpoint=folder, training_steps=4).train()
    make(resume_from_checkpoint=folder, training_steps=4).train()


def test_a_resume_from_elsewhere_does_not_write_into_another_run(make, tmp_path):
    make(training_steps=4, checkpoint_interval=2).train()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match="already holds a run"):
        make(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))


def test_the_clock_goes_on_over_a_resume(make, tmp_path):
    make(training_steps=4, checkpoint_interval=2).train()
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())
    before = state["seconds"]
    assert set(before) == {"language_model", "clt", "total"}
    resumed = make(training_steps=4, resume_from_checkpoint="latest")
    resumed.train()
    assert all(resumed.seconds[name] > before[name] > 0 for name in before)


# Failures: of the text, of the language model, of the disk


def failing_from(stream, number):
    """From its call `number` on, reading text fails."""
    next_batch, calls = stream._next_batch, []

    def fail():
        calls.append(None)
        if len(calls) >= number:
            raise ConnectionError("no route to host")
        return next_batch()

    stream._next_batch = fail


def assert_same_end(one, two):
    for name, value in released(one).items():
        assert torch.equal(released(two)[name], value), name
    assert_same_metrics(one, two)


@pytest.mark.parametrize(
    "accumulation, overlap",
    [
        (1, False),
        pytest.param(3, True, marks=pytest.mark.slow),
        pytest.param(3, False, marks=pytest.mark.slow),
        pytest.param(1, True, marks=pytest.mark.slow),
    ],
)
def test_text_that_fails_for_good_stops_with_a_checkpoint(make, tmp_path, accumulation, overlap):
    """Whichever batch fails, also in the middle of an update, the run that goes on ends as if nothing had been."""
    config = {"activation_fn": "batchtopk"}
    arguments = {
        "training_steps": 12,
        "batch_size": 240 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "overlap_harvest": overlap,
        "stream_retries": 0,
    }
    make(config, **arguments).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    in_an_update = 0
    for number in (10, 12, 15, 17, 19):  # 4 batches for the statistics, 4 for the first fill
        trainer = make(config, **arguments)
        failing_from(trainer.tokens, number)
        with pytest.raises(StreamError, match=r"stream_retries=0 .*ConnectionError: no") as info:
            trainer.train()
        in_an_update += trainer.tokens_since_log > 0
        assert trainer.step > 0
        name = f"checkpoint-{trainer.step}"
        assert info.value.__notes__ == [f"{name} is whole: continue with --resume-from-checkpoint latest"]
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == [name]
        make(config, **arguments, resume_from_checkpoint="latest").train()
        assert_same_end(tmp_path / "straight", tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    assert (in_an_update > 0) is (accumulation > 1)


def test_text_that_fails_before_the_first_update(make, tmp_path):
    trainer = make(stream_retries=0)
    failing_from(trainer.tokens, 6)  # in the first fill
    with pytest.raises(StreamError):
        trainer.train()
    assert list_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("step", [4, 12])
def test_an_evaluation_that_fails_is_made_up_for(make, tmp_path, step):
    """In training, and after the last update."""
    arguments = {"training_steps": 12, "eval_interval": 4, "stream_retries": 0}
    make(**arguments).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    trainer = make(**arguments)
    evaluate = trainer.evaluate

    def fail():
        if trainer.step == step:
            failing_from(trainer.heldout, 1)
        return evaluate()

    trainer.evaluate = fail
    with pytest.raises(StreamError) as info:
        trainer.train()
    assert info.value.__notes__[0].startswith(f"checkpoint-{step} is whole")
    make(**arguments, resume_from_checkpoint="latest").train()
    assert_same_end(tmp_path / "straight", tmp_path / "run")


def test_a_release_that_fails_costs_no_training(make, tmp_path, monkeypatch):
    make(training_steps=6).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "save_model_card", full)
        with pytest.raises(OSError, match="No space left"):
            make(training_steps=6).train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    resumed = make(training_steps=6, resume_from_checkpoint="latest")
    resumed.train()
    assert_same_end(tmp_path / "straight", tmp_path / "run")
    assert "nmse" in resumed.evaluate()


def test_a_disk_that_is_full_at_a_checkpoint(make, tmp_path, monkeypatch):
    arguments = {"training_steps": 9, "checkpoint_interval": 3}
    make(**arguments).train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    write = checkpoints._write_tensors

    def full(path, tensors):
        if "checkpoint-6" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_write_tensors", full)
        with pytest.raises(CheckpointError, match=r"checkpoint-6 .*No space.*checkpoint-3"):
            make(**arguments).train()
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-3"]
    (tmp_path / "run" / ".checkpoint-9.tmp").mkdir()  # as a killed process leaves
    make(**arguments, resume_from_checkpoint="latest").train()
    assert_same_end(tmp_path / "straight", tmp_path / "run")
    assert list((tmp_path / "run").glob(".*")) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_is_full_at_a_line_of_metrics(make, tmp_path, monkeypatch):
    trainer = make(training_steps=9, checkpoint_interval=2)
    write = trainer_module.write_row

    def full(trainer, row):
        if row["step"] == 5:
            (tmp_path / "run" / "metrics.jsonl").unlink()
            (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
        write(trainer, row)

    monkeypatch.setattr(trainer_module, "write_row", full)
    with pytest.raises(OSError, match=r"^metrics.jsonl .*No space left.*checkpoint-4"):
        trainer.train()


@pytest.fixture
def broken_gpt2(make, tiny_gpt2, tmp_path):
    """The tiny model, giving NaN for one block in the second half of the training text; and that block's size."""
    blocks = []
    trainer = make(overwrite_output_dir=True)
    for batch in trainer.tokens:
        blocks += zip(batch["input_ids"].tolist(), batch["counted"].sum(dim=1).tolist(), strict=True)
    elsewhere = {token for batch in trainer.heldout for token in batch["input_ids"].flatten().tolist()}
    where = {}
    for number, (ids, _) in enumerate(blocks):
        for token in set(ids):
            where.setdefault(token, []).append(number)
    token, number = next(
        (token, numbers[0])
        for token, numbers in where.items()
        if len(numbers) == 1 and numbers[0] > len(blocks) / 2 and token not in elsewhere
    )
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2)
    with torch.no_grad():
        model.transformer.wte.weight[token] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "broken")
    return str(tmp_path / "broken"), blocks[number][1]


def test_blocks_that_are_not_finite_are_skipped_and_a_resumed_run_skips_the_same(make, tmp_path, broken_gpt2, caplog):
    model, size = broken_gpt2
    arguments = {"model": model, "on_bad_activations": "skip", "training_steps": 30, "log_interval": 3}
    trainer = make(**arguments)
    trainer.train()
    rows = rows_of(tmp_path / "run", "train")
    skipped = [row["skipped_tokens"] for row in rows]
    assert skipped == sorted(skipped) and skipped[0] == 0 and skipped[-1] == trainer.buffer.skipped_tokens >= size
    assert {count % size for count in skipped} == {0}
    assert all(math.isfinite(row["loss"]) for row in rows)
    messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(messages) == 2  # the first time, and at the end
    assert f"{size} tokens are skipped, and from now on all such: activations of the language model" in messages[0]
    assert messages[1].startswith(f"{skipped[-1]} tokens were skipped")
    shutil.move(tmp_path / "run", tmp_path / "straight")

    stopped = make(**arguments)
    recorded(stopped, stop_at=14)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    make(**arguments, resume_from_checkpoint="latest").train()
    assert_same_end(tmp_path / "straight", tmp_path / "run")


def test_activations_that_are_not_finite_stop_with_a_checkpoint_to_skip_them_from(make, tmp_path, broken_gpt2):
    arguments = {"model": broken_gpt2[0], "training_steps": 30}
    make(**arguments, on_bad_activations="skip").train()
    shutil.move(tmp_path / "run", tmp_path / "straight")
    stopped = make(**arguments)
    with pytest.raises(ActivationError, match="not finite") as info:
        stopped.train()
    assert 0 < stopped.step < 30
    assert info.value.__notes__[0].startswith(f"checkpoint-{stopped.step} is whole")
    again = make(**arguments, resume_from_checkpoint="latest")
    with pytest.raises(ActivationError, match="not finite"):
        again.train()
    make(**arguments, resume_from_checkpoint="latest", on_bad_activations="skip").train()
    for name, value in released(tmp_path / "straight").items():
        assert torch.equal(released(tmp_path / "run")[name], value), name


@pytest.mark.parametrize("changed", [{"training_steps": 80}, {"training_steps": 40, "reach_growth": 0.5}])
def test_a_reach_that_has_grown_does_not_shrink(make, tmp_path, changed):
    """A longer run, or a slower growth, would set trained decoders to 0."""
    run = {"training_steps": 8, "reach_growth": 0.25, "checkpoint_interval": 4}
    stopped = make({"activation_fn": "relu"}, **run)
    recorded(stopped, stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.model.decoders[0].weight[:, 1].abs().max() > 0
    resumed = make({"activation_fn": "relu"}, **{**run, **changed}, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"a reach of 1 at update 4, and checkpoint-4 has 2"):
        resumed.train()
    make({"activation_fn": "relu"}, **{**run, "training_steps": 9}, resume_from_checkpoint="latest").train()
