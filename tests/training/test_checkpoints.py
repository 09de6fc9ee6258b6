"""Checkpoints: whole or absent, in safetensors and JSON, and read back as they were written."""

import errno
import json
import os
import pickletools
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.training import checkpoints
from hf_clt.training.checkpoints import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    remove_checkpoints_after,
    remove_leftovers,
    save_checkpoint,
    step_of,
)


@pytest.fixture
def accelerator(fresh_accelerate):
    return Accelerator(cpu=True)


def contents(step=1):
    """`shared` and `own` of a checkpoint, with the odd tensors that occur in one."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 6, generator=generator)
    shared = {
        "model": {
            "a.weight": weight,
            "a.half": weight.bfloat16(),
            "a.view": weight.t(),
            "b.inf": torch.tensor([-torch.inf]),
        },
        "optimizer": {"a.weight:exp_avg": weight * 2, "a.weight:step": torch.tensor(float(step))},
        "trainer": {"steps_since_fired": torch.arange(6).view(2, 3)},
        "state": {"step": step, "num_processes": 1, "seconds": 1.5, "scaler": None},
    }
    own = {
        "values": {"text": {"position": [1, None]}},
        "tensors": {"generator": torch.get_rng_state(), "none": torch.empty(0)},
    }
    return shared, own


def save(folder, accelerator, step=1, keep=None):
    return save_checkpoint(folder, step, *contents(step), accelerator, keep)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[name].dtype
            assert torch.equal(value, right[name])
        elif isinstance(value, dict):
            assert_same(value, right[name])
        else:
            assert value == right[name]


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_read_back_as_written(tmp_path, accelerator):
    folder = save(tmp_path / "run", accelerator, step=7)
    assert folder == tmp_path / "run" / "checkpoint-7"
    shared, own = load_checkpoint(folder, 0, 1)
    assert_same(shared, contents(7)[0])
    assert_same(own, contents(7)[1])


def test_safetensors_and_json_only(tmp_path, accelerator):
    folder = save(tmp_path, accelerator)
    files = sorted(path.name for path in folder.iterdir())
    assert files == [
        "model.safetensors",
        "optimizer.safetensors",
        "rank-0.json",
        "rank-0.safetensors",
        "state.json",
        "trainer.safetensors",
    ]
    for path in folder.iterdir():
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
        with pytest.raises(ValueError):  # nothing that could be unpickled
            list(pickletools.genops(path.read_bytes()))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_listed_by_step_and_only_when_complete(tmp_path, accelerator):
    for step in (100, 9, 20):
        save(tmp_path, accelerator, step)
    (tmp_path / ".checkpoint-300.tmp").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-1.tmp").mkdir()
    (tmp_path / "checkpoints").mkdir()
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert names(tmp_path / "nowhere") == []


@pytest.mark.parametrize("moment", ["_write_tensors", "_write_json", "_sync_file", "rename"])
def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path, accelerator, monkeypatch, moment):
    save(tmp_path, accelerator, step=1)
    with monkeypatch.context() as broken:
        module = os if moment == "rename" else checkpoints
        original, calls = getattr(module, moment), []

        def crash(*args):
            calls.append(args)
            if len(calls) == (1 if moment == "rename" else 2):
                raise RuntimeError("power cut")
            return original(*args)

        broken.setattr(module, moment, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            save(tmp_path, accelerator, step=2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert find_checkpoint("latest", tmp_path).name == "checkpoint-1"
    assert_same(load_checkpoint(tmp_path / "checkpoint-1", 0, 1)[0], contents(1)[0])
    # What was left behind is in nobody's way.
    save(tmp_path, accelerator, step=2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert_same(load_checkpoint(tmp_path / "checkpoint-2", 0, 1)[0], contents(2)[0])


def test_everything_is_on_the_disk_before_the_rename(tmp_path, accelerator, monkeypatch):
    synced, original_sync, original_rename = [], checkpoints._sync_file, os.rename

    def rename(source, target):
        assert sorted(path.name for path in source.iterdir()) == sorted(path.name for path in synced)
        assert folders == [source]  # the names of the files too
        original_rename(source, target)
        renamed.append(target)

    renamed, folders = [], []
    monkeypatch.setattr(checkpoints, "_sync_folder", folders.append)
    monkeypatch.setattr(checkpoints, "_sync_file", lambda path: (synced.append(path), original_sync(path)))
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, accelerator)
    assert renamed == [tmp_path / "checkpoint-1"]


def test_the_same_step_can_be_written_again(tmp_path, accelerator):
    save(tmp_path, accelerator, step=3)
    shared, own = contents(4)
    save_checkpoint(tmp_path, 3, shared, own, accelerator, None)
    assert_same(load_checkpoint(tmp_path / "checkpoint-3", 0, 1)[0], shared)


@pytest.mark.parametrize("keep, expected", [(1, [40]), (2, [9, 40]), (3, [8, 9, 40]), (None, [2, 8, 9, 40])])
def test_only_the_newest_are_kept(tmp_path, accelerator, keep, expected):
    (tmp_path / "notes.txt").write_text("mine")
    for step in (2, 8, 9, 40):
        save(tmp_path, accelerator, step, keep)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in expected]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("num_processes", [None, 0, "two"])
def test_an_unknown_layout_is_refused(tmp_path, accelerator, num_processes):
    folder = save(tmp_path, accelerator, step=5)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "num_processes": num_processes}))
    with pytest.raises(ValueError, match=f"checkpoint-5/state.json .*num_processes={num_processes!r}"):
        load_checkpoint(folder, 0, 1)


def test_a_missing_process_is_named(tmp_path, accelerator):
    """Three processes are said to have written it, and the files of one are there."""
    folder = save(tmp_path, accelerator, step=5)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "num_processes": 3}))
    with pytest.raises(ValueError, match=r"checkpoint-5/rank-1\.json "):
        load_checkpoint(folder, 0, 2)


def test_latest_and_named(tmp_path, accelerator):
    for step in (9, 10):
        save(tmp_path, accelerator, step)
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"
    assert find_checkpoint(str(tmp_path / "checkpoint-9"), tmp_path / "elsewhere") == tmp_path / "checkpoint-9"
    moved = shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "kept")
    assert find_checkpoint(str(moved), tmp_path) == moved


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='latest'.*output_dir="):
        find_checkpoint("latest", tmp_path)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='.*state\.json"):
        find_checkpoint(str(tmp_path), tmp_path)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='nowhere/checkpoint-1'"):
        find_checkpoint("nowhere/checkpoint-1", tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rank-0.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, accelerator, name):
    folder = save(tmp_path, accelerator, step=5)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"checkpoint-5.*{name}"):
        load_checkpoint(folder, 0, 1)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "trainer.safetensors", "rank-0.safetensors", "rank-0.json"]
)
def test_a_missing_file_is_named(tmp_path, accelerator, name):
    folder = save(tmp_path, accelerator, step=5)
    (folder / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        load_checkpoint(folder, 0, 1)


# The optimizer


def make_model():
    torch.manual_seed(0)
    return CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=4, num_features=6, jumprelu_threshold=0.01))


def make_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(2, 8, 2, 4, generator=generator)
    optimizer.zero_grad()
    model(inputs, labels).loss.backward()
    optimizer.step()


def make_adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01, fused=True)


def test_optimizer_state_round_trip(tmp_path, accelerator):
    model = make_model()
    optimizer = make_adam(model)
    for seed in range(3):
        make_step(model, optimizer, seed)
    shared, own = contents()
    shared |= {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
    assert set(shared["optimizer"]) == {
        f"{name}:{entry}" for name, _ in model.named_parameters() for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    folder = save_checkpoint(tmp_path, 3, shared, own, accelerator, None)

    tensors = load_checkpoint(folder, 0, 1)[0]
    other = make_model()
    other.load_state_dict(tensors["model"])
    resumed = make_adam(other)
    load_optimizer_tensors(other, resumed, tensors["optimizer"])
    fresh = make_model()
    fresh.load_state_dict(tensors["model"])
    for seed in (3, 4):
        make_step(model, optimizer, seed)
        make_step(other, resumed, seed)
        make_step(fresh, make_adam(fresh), seed)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert not torch.equal(fresh.encoders[0].weight, model.encoders[0].weight)  # else the state would not matter


def test_a_parameter_without_gradient_has_no_state():
    model = make_model()
    model.decoders[1].weight.requires_grad_(False)
    optimizer = make_adam(model)
    make_step(model, optimizer, 0)
    tensors = optimizer_tensors(model, optimizer)
    assert not any(name.startswith("decoders.1.weight") for name in tensors)
    other = make_model()
    resumed = make_adam(other)
    load_optimizer_tensors(other, resumed, tensors)
    assert len(resumed.state) == len(optimizer.state)


# Crashes, full disks, leftovers


class Killed(BaseException):
    """What SIGKILL is to a process: nothing after it is done."""


def killed_after(number, monkeypatch):
    """From call `number` on, of all that changes the disk, nothing is done any more."""
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            if len(calls) >= number:
                raise Killed
            return function(*args, **kwargs)

        return call

    for module, name in (
        (checkpoints, "save_file"), (checkpoints, "_write_json"), (checkpoints, "_sync_file"),
        (checkpoints, "_sync_folder"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return calls


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_killed_anywhere_in_a_write_the_newest_checkpoint_is_whole(tmp_path, accelerator, monkeypatch, again):
    """At every call that changes the disk: while writing, replacing one of the same step, and deleting old ones."""
    moments = 0
    for number in range(1, 1000):
        folder = tmp_path / f"run-{number}"
        save(folder, accelerator, step=1)
        save(folder, accelerator, step=2)
        step = 2 if again else 3
        shared, own = contents(9)
        with monkeypatch.context() as patched:
            killed_after(number, patched)
            try:
                save_checkpoint(folder, step, shared, own, accelerator, 1)
                done = True
            except Killed:
                done = False
        found = list_checkpoints(folder)
        assert found, f"no checkpoint at call {number}"
        for path in found:  # all of them can be gone on from, and are what was written
            weight = load_checkpoint(path, 0, 1)[0]["model"]["a.weight"]
            assert any(torch.equal(weight, contents(n)[0]["model"]["a.weight"]) for n in (1, 2, 9))
        assert step_of(found[-1]) >= 2
        assert find_checkpoint("latest", folder) == found[-1]
        remove_leftovers(folder)
        assert all(path.name.startswith("checkpoint-") for path in folder.iterdir())
        assert list_checkpoints(folder)[-1].name == found[-1].name
        save_checkpoint(folder, 7, shared, own, accelerator, 1)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-7"]
        if done:
            break
        moments += 1
    assert moments > 20


def test_killed_while_later_checkpoints_are_removed_the_newest_is_whole(tmp_path, accelerator, monkeypatch):
    for number in range(1, 1000):
        folder = tmp_path / f"run-{number}"
        for step in (1, 2, 3):
            save(folder, accelerator, step=step)
        with monkeypatch.context() as patched:
            killed_after(number, patched)
            try:
                remove_checkpoints_after(folder, 1)
                done = True
            except Killed:
                done = False
        for path in list_checkpoints(folder):
            load_checkpoint(path, 0, 1)
        if done:
            break
    assert number > 6
    assert names(folder) == ["checkpoint-1"]


def test_leftovers_are_removed_and_nothing_else(tmp_path, accelerator):
    save(tmp_path, accelerator, step=1)
    left = [".checkpoint-2.tmp", ".checkpoint-1.old.tmp", "checkpoint-1.old"]
    for name in left:
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    for name in (".W_enc_0.safetensors.123.tmp", ".metrics.jsonl.99.tmp", ".tmp3xY9aB"):
        (tmp_path / name).write_text("half")
    mine = [".gitignore", ".tmp", "notes.tmp", ".notes.tmp", ".template", "checkpoint-best.old"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "checkpoint-1"])
    remove_leftovers(tmp_path / "nowhere")


def test_the_one_that_was_to_be_replaced_is_kept_until_there_is_another(tmp_path, accelerator):
    save(tmp_path, accelerator, step=5).rename(tmp_path / "checkpoint-5.old")
    remove_leftovers(tmp_path)
    assert find_checkpoint("latest", tmp_path).name == "checkpoint-5.old"
    assert load_checkpoint(tmp_path / "checkpoint-5.old", 0, 1)[0]["state"]["step"] == 5
    save(tmp_path, accelerator, step=5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("failing", ["_write_json", "_write_tensors", "mkdir", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path, accelerator, monkeypatch, failing):
    save(tmp_path, accelerator, step=3)

    def full(path, *args, **kwargs):
        if failing.startswith("_"):
            path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints if failing.startswith("_") else os, failing, full)
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, accelerator, step=4, keep=1)
    assert str(caught.value) == (
        f"checkpoint-4 cannot be written to {str(tmp_path)!r} (No space left on device); checkpoint-3 is whole: "
        "continue with --resume-from-checkpoint latest"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert_same(load_checkpoint(tmp_path / "checkpoint-3", 0, 1)[0], contents(3)[0])


def test_a_file_that_the_system_refuses(tmp_path, accelerator):
    """Not simulated: the kernel lets no file of this process grow beyond 100 kB."""
    resource = pytest.importorskip("resource")
    shared, own = contents(1)
    shared["optimizer"] = {"large": torch.zeros(100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-1 .*File too large.*no checkpoint"):
            save_checkpoint(tmp_path, 1, shared, own, accelerator, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_the_optimizer_state_is_not_copied_to_host_memory_by_every_process():
    """Only those that write it copy it: on the meta device no copy is possible."""
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"exp_avg": torch.empty_like(parameter)}
    found = optimizer_tensors(model, optimizer)
    assert {name: value.device.type for name, value in found.items()} == {
        "weight:exp_avg": "meta",
        "bias:exp_avg": "meta",
    }
