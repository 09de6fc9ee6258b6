"""A run that is killed or stopped at a random moment goes on from its newest checkpoint and ends bit for bit alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def run_all(folder, tiny_gpt2, small_text_file, kills, stops, seed=0):
    command = [sys.executable, str(ROOT / "tests" / "end_to_end" / "kill_runs.py"), str(folder)]
    command += ["--model", tiny_gpt2, "--text", small_text_file, "--seed", str(seed)]
    command += ["--kills", str(kills), "--stops", str(stops)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads((folder / "records.json").read_text())


def check(records):
    for record in records:
        assert record["resumed_status"] == 0, record
        assert record["different"] == [], record
        if record["signal"] == "SIGKILL":
            assert record["status"] == -9, record
        else:  # after the step that it was in, and with a checkpoint
            assert record["status"] == 130, record
            assert record["leftovers"] == [], record
            assert int(record["checkpoint"].partition("-")[2]) >= record["step"], record


def test_killed_and_stopped(tiny_gpt2, small_text_file, tmp_path):
    records = run_all(tmp_path / "runs", tiny_gpt2, small_text_file, kills=2, stops=1)
    assert len(records) == 3
    check(records)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tiny_gpt2, small_text_file, tmp_path):
    """`-s` shows the table that stands in benchmarks/kills.md."""
    records = run_all(tmp_path / "runs", tiny_gpt2, small_text_file, kills=20, stops=4)
    check(records)
    hit = [record["phase"] for record in records[:20]]
    assert {"harvest", "step", "checkpoint", "evaluation"} <= set(hit)
    assert any(record["leftovers"] for record in records)  # else no write was cut off
