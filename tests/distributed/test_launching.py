"""
The scripts as people launch them, on the CPU: each form trains with as many processes as were asked for, or says in
one line that it cannot. What docs/launching.md says of signals and of processes that die. The forms that must be
refused are in tests/training/test_setup.py too, without launching.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT


pytestmark = pytest.mark.slow

PYTHON = [sys.executable]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ON_TWO = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", *PLAIN]
CONFIG_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: {}
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
use_cpu: {}
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def start(command: list[str], log: Path) -> subprocess.Popen:
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True)


@pytest.fixture
def options(tiny_gpt2, text_file, tmp_path):
    """Script and options of a short run; `more` overrides and adds."""

    def make(**more):
        given = {
            "model": tiny_gpt2,
            "dataset": text_file,
            "num_features": 48,
            "context_size": 32,
            "store_batch_size_prompts": 2,
            "n_batches_in_buffer": 4,
            "batch_size": 64,
            "eval_tokens": 300,
            "training_steps": 3,
            "normalization_estimation_batches": 2,
            "output_dir": tmp_path / "run",
        }
        words = [
            word for name, value in (given | more).items() for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        return [str(ROOT / "scripts" / "train_clt.py"), *words, "--disable-progress-bar"]

    return make


def num_processes(tmp_path) -> int:
    """With how many processes the run trained, by the tokens of its first step; it must have come to its end."""
    assert (tmp_path / "run" / "README.md").is_file()
    return json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["tokens"] // 64


FORMS = {
    "python": (PYTHON, 1),
    "accelerate launch": ([*ACCELERATE, "--num_processes", "1", *PLAIN], 1),
    "accelerate launch --cpu": ([*ACCELERATE, "--cpu", "--num_processes", "1", *PLAIN], 1),
    "accelerate launch on two": (ON_TWO, 2),
    "accelerate launch with a file": ([*ACCELERATE, "--config_file", "MULTI_GPU"], 2),
    "torchrun": ([*TORCHRUN, "--standalone", "--nproc-per-node", "2"], 2),
}


def config_files(command: list[str], tmp_path) -> list[str]:
    """The command with names of distributed types replaced by config files."""
    for kind in ("MULTI_GPU", "MULTI_CPU"):
        (tmp_path / f"{kind}.yaml").write_text(CONFIG_FILE.format(kind, str(kind == "MULTI_CPU").lower()))
    return [str(tmp_path / f"{word}.yaml") if word in ("MULTI_GPU", "MULTI_CPU") else word for word in command]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_form_of_launching(form, size, options, tmp_path):
    """With --feature-parallel-size 2 as well, which one process refuses."""
    command, expected = FORMS[form]
    command = config_files(command, tmp_path)
    log = tmp_path / "log.txt"
    status = start([*command, *options(feature_parallel_size=size)], log).wait(timeout=120)
    if expected < size:
        assert status != 0
        assert "error: feature_parallel_size=2 does not divide the number of processes, 1" in log.read_text()
        assert not (tmp_path / "run").exists()
    else:
        assert status == 0, log.read_text()[-3000:]
        assert num_processes(tmp_path) == expected


def test_the_entry_point_on_two(options, tmp_path):
    _, *words = options()
    log = tmp_path / "log.txt"
    assert start([*ON_TWO, "-m", "hf_clt", "train", *words], log).wait(timeout=120) == 0, log.read_text()[-3000:]
    assert num_processes(tmp_path) == 2
    assert "torchrun --standalone --nproc-per-node 2 -m hf_clt train" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    "command",
    [[*ACCELERATE, "--cpu", "--num_processes", "2"], [*ACCELERATE, "--config_file", "MULTI_CPU"]],
    ids=["--cpu --num_processes 2", "MULTI_CPU in a file"],
)
@pytest.mark.parametrize("name", ["train", "cache"])
def test_one_process_where_two_were_asked_for_is_refused(command, name, options, tmp_path):
    words = options()
    if name == "cache":
        words = ["-m", "hf_clt", "cache", str(tmp_path / "run"), *words[1:5]]
    log = tmp_path / "log.txt"
    assert start([*config_files(command, tmp_path), *words], log).wait(timeout=120) == 1
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "and has started one, as it does without --multi_gpu" in errors[0]
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_know_of_each_other_are_refused(options, tmp_path, monkeypatch):
    """WORLD_SIZE says two, and nothing else does: the misuse that would let two runs fight over one folder."""
    for name in list(os.environ):
        if name.startswith(("MASTER_", "RANK", "LOCAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    log = tmp_path / "log.txt"
    assert start([*PYTHON, *options()], log).wait(timeout=120) == 2
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "WORLD_SIZE=2" in errors[0] and "accelerate launch" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_machines(launcher, options, tmp_path):
    """Both are this one; the flags are those of a cluster."""
    commands = {
        "accelerate": [*ACCELERATE, "--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank"],
        "torchrun": [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank"],
    }
    further = {
        "accelerate": ["--main_process_ip", "127.0.0.1", "--main_process_port", "29713", *PLAIN[2:]],
        "torchrun": ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29714", "--rdzv-id", "clt"],
    }
    runs = [
        start([*commands[launcher], str(rank), *further[launcher], *options()], tmp_path / f"log-{rank}.txt")
        for rank in range(2)
    ]
    for rank, run in enumerate(runs):
        assert run.wait(timeout=150) == 0, (tmp_path / f"log-{rank}.txt").read_text()[-3000:]
    assert num_processes(tmp_path) == 2


def test_a_cache_written_by_two_processes(tiny_gpt2, text_file, options, tmp_path):
    cache = ["-m", "hf_clt", "cache", str(tmp_path / "cache"), "--model", tiny_gpt2]
    cache += ["--dataset", text_file, "--eval-tokens", "300", "--context-size", "32", "--disable-progress-bar"]
    log = tmp_path / "log.txt"
    assert start([*ON_TWO, *cache], log).wait(timeout=120) == 0, log.read_text()[-3000:]
    assert len(json.loads((tmp_path / "cache" / "manifest.json").read_text())["splits"]["train"]["shards"]) == 2
    words = [str(ROOT / "scripts" / "train_clt.py"), "--activation-cache", str(tmp_path / "cache")]
    words += ["--num-features", "48", "--batch-size", "64", "--training-steps", "3", "--disable-progress-bar"]
    words += ["--output-dir", str(tmp_path / "run"), "--n-batches-in-buffer", "4", "--feature-parallel-size", "2"]
    assert start([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *words], log).wait(timeout=120) == 0
    assert num_processes(tmp_path) == 2


# -- processes that die, and signals ----------------------------------------------------------------------------------


def processes_of(output_dir: Path) -> dict[int, int]:
    """The process ids of a run by rank, without its launcher's."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_text().split("\0")
            variables = (folder / "environ").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if str(output_dir) in words and "-m" not in words[:2]:
            ranks = [int(variable.partition("=")[2]) for variable in variables if variable.startswith("RANK=")]
            found[ranks[0] if ranks else 0] = int(folder.name)
    return found


def wait_for_steps(output_dir: Path, run: subprocess.Popen, log: Path) -> None:
    metrics = output_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("form, size", [("torchrun", 1), ("torchrun", 2), ("accelerate launch on two", 1)])
@pytest.mark.parametrize("event", ["one is killed", "the launcher gets SIGTERM", "all get SIGTERM", "Ctrl-C"])
def test_no_process_is_left_waiting(form, size, event, options, tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log.txt"
    words = options(feature_parallel_size=size, training_steps=100_000, log_interval=1, checkpoint_interval=3)
    run = start([*FORMS[form][0], *words], log)
    wait_for_steps(output_dir, run, log)
    workers = processes_of(output_dir)
    assert workers.keys() == {0, 1}
    begun = time.monotonic()
    if event == "one is killed":
        os.kill(workers[1], signal.SIGKILL)
    elif event == "the launcher gets SIGTERM":
        run.send_signal(signal.SIGTERM)
    elif event == "all get SIGTERM":
        for pid in (*workers.values(), run.pid):
            os.kill(pid, signal.SIGTERM)
    else:
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    assert run.wait(timeout=60) == 1
    assert time.monotonic() - begun < 30
    assert processes_of(output_dir) == {}
    text = log.read_text()
    if event != "one is killed":
        assert text.count("interrupted (stopped at step ") == 2, text[-3000:]
        step = int(text.partition("interrupted (stopped at step ")[2].partition(")")[0])
        assert (output_dir / f"checkpoint-{step}" / "state.json").is_file()
    assert not list(output_dir.glob(".checkpoint*")) or event == "one is killed"
