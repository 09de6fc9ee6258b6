#!/usr/bin/env python
"""
What a training step takes alone and beside a busy process: with threads that wait as libgomp has them by default, as
`import hf_clt` has them, asleep at once, and with one thread. Each figure is the median of the steps of fresh
processes, in turns.

  python benchmarks/contention.py --rounds 3
"""

import argparse
import os
import statistics
import subprocess
import sys


SETTINGS = {
    "by libgomp's default": {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": "300000"},
    "as hf_clt sets it": {},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
STEP = """
import sys, time
import hf_clt  # before torch: it says how threads wait
import torch
from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.training.setup import prepare_cpu

prepare_cpu()
steps, layers, width, features, tokens, k = map(int, sys.argv[1:])
torch.manual_seed(0)
config = CLTConfig(num_layers=layers, d_model=width, num_features=features, activation_fn="batchtopk", k=k)
clt = CrossLayerTranscoder(config).train()
optimizer = torch.optim.Adam(clt.parameters(), lr=1e-4, fused=True)
for step in range(steps + 2):
    batch = torch.randn(tokens, layers, width)
    start = time.perf_counter()
    clt(batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step >= 2:
        print(time.perf_counter() - start)
"""


def measure(environment: dict[str, str], shape: list[int], busy: bool) -> list[float]:
    """Seconds of each step of a process of its own."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        words = [sys.executable, "-c", STEP, *map(str, shape)]
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        }
        done = subprocess.run(words, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    finally:
        if other is not None:
            other.kill()
            other.wait()
    return [float(line) for line in done.stdout.split()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (default 3)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each process (default 8)")
    parser.add_argument(
        "--shape", type=int, nargs=5, default=[30, 576, 1024, 256, 16], metavar="N",
        help="layers, width, features, tokens, k (default: those of the quickstart)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    found = {(name, busy): [] for name in SETTINGS for busy in (False, True)}
    for number in range(options.rounds):
        for name, busy in found:
            print(f"round {number + 1} of {options.rounds}: {name}, {'busy' if busy else 'alone'}", file=sys.stderr)
            found[name, busy] += measure(SETTINGS[name], [options.steps, *options.shape], busy)
    print("| threads that wait | alone | beside a busy process | ratio |\n|---|---|---|---|")
    for name in SETTINGS:
        alone, busy = (statistics.median(found[name, flag]) for flag in (False, True))
        print(f"| {name} | {alone:.2f} s | {busy:.2f} s | {busy / alone:.1f} |")


if __name__ == "__main__":
    main()
