"""Starts several processes that know of each other, on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
OPTIONS = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def launch(num_processes: int, script: Path, *arguments: str, timeout: int = 300) -> None:
    """Runs a script with `accelerate launch` on the CPU; all processes must end well."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes"]
    done = subprocess.run(
        [*command, str(num_processes), *OPTIONS, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-6000:]
