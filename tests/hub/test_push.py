"""
Push and pull with the real client against a Hub on this machine. The cases run in one process beside this one (see
hub_client.py), since the client reads the Hub's address when it is imported, and importing takes most of the time.
"""

import json
import re
from pathlib import Path

import pytest

from tests.hub.protocol_table import as_table, run_client


CHECKS = re.findall(r"^def (check_\w+)", (Path(__file__).parent / "hub_client.py").read_text(encoding="utf-8"), re.M)
SLOW = [
    "check_a_connection_cut_for_good_and_the_push_resumed",
    "check_two_processes_push_one_clt",
]
QUICK = [check for check in CHECKS if check not in SLOW]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return run_client(tmp_path_factory.mktemp("hub"), QUICK)


@pytest.mark.parametrize("check", QUICK)
def test_hub(client, check):
    passed = [json.loads(line)["check"] for line in client.stdout.splitlines()]
    assert check in passed, client.stderr[-6000:]


def test_client_ends_well(client):
    assert client.returncode == 0, client.stderr[-6000:]


def test_the_table_has_every_case_once(client):
    rows = [json.loads(line) for line in client.stdout.splitlines()]
    lines = as_table(rows).splitlines()[2:]
    assert len(lines) == len(QUICK) == len({row["case"] for row in rows})


def test_the_documented_table_has_every_case():
    documented = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    source = (Path(__file__).parent / "hub_client.py").read_text(encoding="utf-8")
    cases = re.findall(r'^def check_\w+\(work\):\n    """(.*?)"""$', source, re.M)
    assert len(cases) == len(CHECKS)
    assert [case for case in cases if f"| {case} |" not in documented] == []


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW)
def test_slow_hub(tmp_path, check):
    done = run_client(tmp_path, [check])
    assert done.returncode == 0, done.stderr[-6000:]
