"""
Push and pull with the real client against a Hub on this machine. All checks run in one process beside this one (see
hub_client.py), since the client reads the Hub's address when it is imported, and importing takes most of the time.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.loopback_hub import LoopbackHub


CLIENT = Path(__file__).parent / "hub_client.py"
CHECKS = re.findall(r"^def (check_\w+)", CLIENT.read_text(), re.M)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    work = tmp_path_factory.mktemp("hub")
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with LoopbackHub(work / "server", tokens={"hf_loopback": "tester", "hf_other": "other"}) as hub:
        environment = keep | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(work / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(CLIENT), str(work)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("check", CHECKS)
def test_hub(client, check):
    passed = [json.loads(line) for line in client.stdout.splitlines()]
    assert check in passed, client.stderr[-3000:]


def test_client_ends_well(client):
    assert client.returncode == 0, client.stderr[-3000:]
