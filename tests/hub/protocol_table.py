"""
Runs the cases of hub_client.py against a loopback Hub and prints what they took, as a Markdown table:

    python -m tests.hub.protocol_table
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.hub.loopback_hub import LoopbackHub


TOKENS = {"hf_loopback": "tester", "hf_other": "other", "hf_readonly": "tester"}


def run_client(work: Path, checks=()) -> subprocess.CompletedProcess:
    """Starts a Hub, and the client in a process of its own; it prints a line of JSON for each case that passed."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with LoopbackHub(work / "server", tokens=TOKENS, read_only=["hf_readonly"]) as hub:
        environment = keep | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(work / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.hub.hub_client", str(work), *checks]
        root = Path(__file__).parents[2]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)


def as_table(rows: list[dict]) -> str:
    """A Markdown table of what the client printed."""
    lines = ["| case | requests | pushed, kB | pulled, kB | seconds |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        moved = " | ".join(f"{row[name] / 1000:,.0f}" for name in ("pushed", "pulled"))
        lines.append(f"| {row['case']} | {row['requests']} | {moved} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def main() -> int:
    with tempfile.TemporaryDirectory() as work:
        done = run_client(Path(work), sys.argv[1:])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print(as_table(rows))
    print(f"\n{len(rows)} cases passed, in {sum(row['seconds'] for row in rows):.0f} s.")
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
