"""
circuit-tracer and SAELens read what hf_clt saves and pushes (check.py), and circuit-tracer's graphs are hf_clt's
(compare_graphs.py), where their environment is made; and without it what can be told: how make makes it, and that the
documentation says what was measured.
"""

import json
import re
import shutil

import pytest

from tests.circuit_tracer import compare_graphs
from tests.circuit_tracer.check import GAPS, PYTHON, ROOT, SAME, run
from tests.test_packaging import FAKE_PYTHON, make


PINS = "tests/circuit_tracer/constraints.txt"
DOCUMENTATION = (ROOT / "docs" / "circuit_tracer.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_circuit_tracer_reads_what_we_push(tmp_path):
    if not PYTHON.is_file():
        pytest.skip("circuit-tracer's environment is not made; `make circuit-tracer` makes it")
    done = run(tmp_path, PYTHON)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row for row in rows if not row["passed"]] == []
    assert done.returncode == 0, done.stderr[-3000:]
    compared = {row["what"].partition(":")[0] for row in rows}
    assert compared >= {*SAME, *GAPS, "reach_1_plt", "reach_2_padded", "SAELens, relu", "docs/circuit_tracer.md"}


@pytest.mark.slow
def test_our_graphs_are_those_of_circuit_tracer(tmp_path):
    if not PYTHON.is_file():
        pytest.skip("circuit-tracer's environment is not made; `make circuit-tracer` makes it")
    rows = compare_graphs.run(tmp_path, PYTHON, quickstart=tmp_path)
    assert [row for row in rows if row["wrong"]] == []
    assert {row["case"].partition(",")[0] for row in rows} >= {*compare_graphs.ARCHITECTURES}


@pytest.fixture
def checkout(tmp_path):
    for venv in (".venv", ".venv-circuit-tracer"):
        python = tmp_path / venv / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)
    (tmp_path / PINS).parent.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "setup.cfg", "constraints.txt", PINS):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_make_gives_circuit_tracer_versions_of_its_own(checkout):
    make(checkout, "install")
    install, *checks = make(checkout, "test-circuit-tracer")
    assert install.startswith("-m pip install") and install.endswith(f"-c {PINS} circuit-tracer sae-lens")
    assert checks == ["-m tests.circuit_tracer.check", "-m tests.circuit_tracer.compare_graphs"]
    assert make(checkout, "test-circuit-tracer") == checks  # once
    assert make(checkout, "graph-scores") == ["scripts/attribute_clt.py quickstart/clt --model quickstart/model"]


def test_the_documented_scores_are_those_measured():
    measured = json.loads((ROOT / "benchmarks" / "graph_scores.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| (.*?) \*\*(.*?)\*\* \((.*?) %\) \| (.*?) \| (.*?) \|$", DOCUMENTATION, re.M)
    assert len(rows) == 3
    for column, name in ((3, "clt"), (4, "per-layer transcoders")):
        for row, found in zip(rows, measured[name]["prompts"], strict=True):
            scores = f"{found['replacement_score']:.3f}, {found['completeness_score']:.3f}"
            assert row[column].startswith(f"{scores} ({found['feature_nodes']:,} features, {found['seconds']:.0f} s)")
            assert row[:3] == (found["prompt"], found["likeliest"].strip(), f"{found['its_probability']:.1%}"[:-1])
