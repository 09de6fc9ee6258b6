"""What TensorBoard, wandb and trackio wrote, read back and compared with `metrics.jsonl`."""

import importlib.metadata
import json
import logging
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments
from tests.distributed.launch import ROOT, launch


TRACKERS = ("tensorboard", "wandb", "trackio")
SECRETS = {"HF_TOKEN": "hf_" + "s3cret" * 6, "WANDB_API_KEY": "5ecret" * 6 + "0123"}

for name in TRACKERS:
    pytest.importorskip(name)


def settings_of(model, text, output_dir, **arguments) -> dict:
    defaults = {
        "model": model,
        "dataset": text,
        "output_dir": str(output_dir),
        "context_size": 32,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 4,
        "batch_size": 64,
        "eval_tokens": 200,
        "normalization_estimation_batches": 2,
        "training_steps": 6,
        "log_interval": 1,
        "eval_interval": 2,
        "checkpoint_interval": 2,
        "dead_feature_window": 2,
        "disable_progress_bar": True,
        "report_to": list(TRACKERS),
        "wandb_project": "clt-tests",
    }
    return defaults | arguments


def make_trainer(settings: dict) -> CLTTrainer:
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may have one Accelerator
    GradientState._reset_state()
    config = CLTConfig(num_layers=2, d_model=64, num_features=96, activation_fn="topk", k=6)
    return CLTTrainer(CLTTrainingArguments(**settings), config)


def keep_trackio_in(folder: Path, monkeypatch) -> None:
    """What TRACKIO_DIR in the environment does in a process that has not imported trackio yet."""
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", folder)


# -- readers: {(step, name): value}, and {(step, name): counts} of histograms -----------------------------------------


def read_tensorboard(run: Path, _trackio: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "clt-tests"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    scalars, histograms = {}, {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert (event.step, name) not in scalars
            scalars[event.step, name] = event.value
    for name in events.Tags()["histograms"]:
        for event in events.Histograms(name):
            histograms[event.step, name] = list(event.histogram_value.bucket)
    return scalars, histograms


def wandb_records(path: Path):
    """The records of a .wandb file: protobufs in the blocks of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # too little for a header
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_histories(path: Path) -> list[dict]:
    found = [record.history for record in wandb_records(path) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in h.item} for h in found]


def read_wandb(run: Path, _trackio: Path):
    """Of all parts of the run, in the order in which they were started."""
    scalars, histograms = {}, {}
    paths = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    for row in [row for path in paths for row in wandb_histories(path)]:
        step = row.pop("_step")
        for name, value in row.items():
            if name.endswith("feature_density/values"):
                histograms[step, name.removesuffix("/values")] = value
            elif not name.startswith("_") and "feature_density" not in name:
                scalars[step, name] = value
    return scalars, histograms


def read_trackio(_run: Path, trackio: Path):
    scalars, histograms = {}, {}
    with sqlite3.connect(trackio / "clt-tests.db") as database:
        rows = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
    database.close()
    assert len({run_id for run_id, _, _ in rows}) == 1
    for _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            if isinstance(value, dict):
                histograms[step, name] = value["values"]
            else:
                scalars[step, name] = value
    return scalars, histograms


READ = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


def expected(run: Path):
    """The same of `metrics.jsonl`."""
    scalars, histograms = {}, {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        step, split = row.pop("step"), row.pop("split")
        for name, value in row.items():
            name = name if split == "train" else f"heldout/{name}"
            if name == "heldout/feature_density":
                histograms[step, name] = value["counts"]
            elif name.endswith("_per_layer"):
                scalars |= {(step, f"{name}/{layer}"): number for layer, number in enumerate(value or [])}
            elif value is not None:
                scalars[step, name] = value
    return scalars, histograms


def check_equal(tracker: str, run: Path, trackio: Path) -> None:
    found, wanted = READ[tracker](run, trackio), expected(run)
    assert set(found[0]) == set(wanted[0])
    tolerance = 1e-6 if tracker == "tensorboard" else 0  # float32
    for key, value in wanted[0].items():
        assert math.isclose(found[0][key], value, rel_tol=tolerance), key
    assert set(found[1]) == set(wanted[1])
    for key, counts in wanted[1].items():
        # An empty bucket in front holds TensorBoard's lower limit.
        assert found[1][key] == ([0, *counts] if tracker == "tensorboard" else counts), key


def wait_for_wandb(run: Path) -> None:
    """wandb's file is written by another process, a moment after a run has ended."""
    deadline = time.monotonic() + 30
    for path in (run / "wandb").glob("offline-run-*/run-*.wandb"):
        while time.monotonic() < deadline:
            if any(record.WhichOneof("record_type") == "exit" for record in wandb_records(path)):
                break
            time.sleep(0.1)


# -- a run, and one that was killed and resumed ----------------------------------------------------------------------


class Killed(RuntimeError):
    pass


def kill_after(trainer: CLTTrainer, updates: int) -> None:
    endless = trainer.buffer.endless

    def batches():
        for number, batch in enumerate(endless()):
            if number == updates:
                raise Killed
            yield batch

    trainer.buffer.endless = batches


@pytest.fixture(scope="module")
def resumed(tiny_gpt2, small_text_file, tmp_path_factory):
    """
    A run that fails after update 5 and goes on from checkpoint-2, as if it had been killed: TensorBoard hides what was
    logged of steps 3 to 5, the others have the later values too. Its folder, trackio's, and its id.
    """
    folder = tmp_path_factory.mktemp("trackers")
    settings = settings_of(tiny_gpt2, small_text_file, folder / "run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        keep_trackio_in(folder / "trackio", monkeypatch)
        trainer = make_trainer(settings)
        kill_after(trainer, 5)
        with pytest.raises(Killed):
            trainer.train()
        for step in (4, 5):  # 5: written because the run failed, which a killed one could not
            shutil.rmtree(folder / "run" / f"checkpoint-{step}")
        time.sleep(1)  # wandb names its folders by the second
        trainer = make_trainer(settings | {"resume_from_checkpoint": "latest"})
        assert trainer.resume_from.name == "checkpoint-2"
        trainer.train()
    wait_for_wandb(folder / "run")
    return folder / "run", folder / "trackio", trainer.run_id


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_resumed_run_goes_on_in_the_same_place(resumed, tracker):
    run, trackio, _ = resumed
    scalars = expected(run)[0]
    assert {step for step, _ in scalars} == {1, 2, 3, 4, 5, 6}
    for name in ("loss", "heldout/nmse", "nmse_per_layer/1", "heldout/l0_per_layer/0", "dead_fraction", "epoch"):
        assert (6, name) in scalars
    check_equal(tracker, run, trackio)


def test_wandb_has_one_run_with_its_settings(resumed):
    run, _, run_id = resumed
    paths = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(paths) == 2
    for path in paths:
        records = [r.run for r in wandb_records(path) if r.WhichOneof("record_type") == "run"]
        assert {(record.run_id, record.project) for record in records} == {(run_id, "clt-tests")}
        config = {item.key: item.value_json for item in records[0].config.update}
        assert (config["training_steps"], config["num_features"], config["activation_fn"]) == ("6", "96", '"topk"')


def test_an_overwritten_run_starts_anew(resumed, tiny_gpt2, small_text_file, tmp_path):
    run = shutil.copytree(resumed[0], tmp_path / "run")
    settings = settings_of(tiny_gpt2, small_text_file, run, report_to=["tensorboard"], training_steps=2)
    trainer = make_trainer(settings | {"overwrite_output_dir": True})
    trainer.train()
    check_equal("tensorboard", run, tmp_path)
    assert trainer.run_id != resumed[2]


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_refused(tiny_gpt2, small_text_file, tmp_path, monkeypatch):
    version = importlib.metadata.version

    def without_trackio(name):
        if name == "trackio":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_trackio)
    with pytest.raises(ValueError, match=r"report_to='trackio'.*`pip") as e:
        make_trainer(settings_of(tiny_gpt2, small_text_file, tmp_path / "run"))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_does_not_lose_the_run(tiny_gpt2, small_text_file, tmp_path, caplog):
    """wandb is closed by somebody after step 2."""
    trainer = make_trainer(settings_of(tiny_gpt2, small_text_file, tmp_path / "run", report_to=["wandb"]))
    endless = trainer.buffer.endless

    def batches():
        for number, batch in enumerate(endless()):
            if number == 2:
                trainer.accelerator.get_tracker("wandb", unwrap=True).finish()
            yield batch

    trainer.buffer.endless = batches
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = [r.getMessage() for r in caplog.records if r.name == "hf_clt.training.trackers"]
    assert message.startswith("wandb failed at step 3 (") and "metrics.jsonl holds all metrics" in message
    assert {step for step, _ in expected(tmp_path / "run")[0]} == {1, 2, 3, 4, 5, 6}
    assert (tmp_path / "run" / "config.json").is_file()
    wait_for_wandb(tmp_path / "run")
    assert {step for step, _ in read_wandb(tmp_path / "run", tmp_path)[0]} == {1, 2}


def test_a_tracker_that_cannot_start_does_not_lose_the_run(tiny_gpt2, small_text_file, tmp_path, caplog):
    settings = settings_of(tiny_gpt2, small_text_file, tmp_path / "run", report_to=["tensorboard"], training_steps=2)
    trainer = make_trainer(settings)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    messages = [r.getMessage() for r in caplog.records if r.name == "hf_clt.training.trackers"]
    assert len(messages) == 1 and messages[0].startswith("tensorboard could not be started (")
    assert {step for step, _ in expected(tmp_path / "run")[0]} == {1, 2}


# -- in processes of their own ---------------------------------------------------------------------------------------


def environment(folder: Path, **more) -> dict:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(folder / "trackio")}
    return kept | {"HOME": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def flags(settings: dict) -> list[str]:
    given = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else str(value)]
        given += [f"--{name.replace('_', '-')}", *values]
    return [*given, "--num-features", "96", "--activation-fn", "topk", "--k", "6"]


@pytest.mark.slow
def test_no_secret_is_in_any_file(tiny_gpt2, small_text_file, tmp_path):
    run = tmp_path / "run"
    settings = settings_of(tiny_gpt2, small_text_file, run)
    command = [sys.executable, str(ROOT / "scripts" / "train_clt.py"), *flags(settings)]
    env = environment(tmp_path, WANDB_MODE="offline", **SECRETS)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert "Reserved keys renamed" not in done.stderr  # trackio: what we send has names of its own
    for tracker in TRACKERS:
        check_equal(tracker, run, tmp_path / "trackio")
    for path in [*run.rglob("*"), *(tmp_path / "trackio").rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in SECRETS.values()), path
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())


@pytest.mark.slow
def test_the_first_of_two_processes_reports(tiny_gpt2, small_text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    settings = settings_of(tiny_gpt2, small_text_file, tmp_path / "run", training_steps=4)
    launch(2, ROOT / "scripts" / "train_clt.py", *flags(settings))
    assert len(list((tmp_path / "run" / "tensorboard" / "clt-tests").glob("events.*"))) == 1
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    for tracker in TRACKERS:
        check_equal(tracker, tmp_path / "run", tmp_path / "trackio")


@pytest.mark.slow
def test_wandb_without_a_login_is_refused(tmp_path):
    command = "from hf_clt import CLTTrainingArguments as A; from hf_clt.training.trackers import check_trackers; "
    command += "check_trackers(A(report_to=['wandb']))"
    env = environment(tmp_path)
    for more, message in (({}, "nobody is logged in; run `wandb login`"), ({"WANDB_MODE": "offline"}, "")):
        done = subprocess.run(
            [sys.executable, "-c", command],
            env=env | more,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert (done.returncode != 0) == bool(message) and message in done.stderr, done.stderr
