"""The benchmark of attribution graphs: ours end to end, and how circuit-tracer's figures are read and shown."""

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks import attribution
from tests.reference import random_clt


THEIRS = Path(attribution.__file__).with_name("attribution_theirs.py")


@pytest.fixture(scope="module")
def clt(tmp_path_factory, tiny_gpt2):
    config = json.loads((Path(tiny_gpt2) / "config.json").read_text())
    folder = tmp_path_factory.mktemp("clt")
    shape = {"num_layers": config["n_layer"], "d_model": config["n_embd"], "num_features": 24}
    random_clt(double=False, **shape, base_model_name_or_path=tiny_gpt2).save_pretrained(folder)
    return folder


def test_a_graph_is_measured(clt, tiny_gpt2):
    found = attribution.measure(tiny_gpt2, str(clt), list(range(1, 9)), nodes=6)
    # Of its memory nothing is asked: this process has been larger before.
    assert found["features"] == 6 < found["active"] and isinstance(found["bytes"], int)
    assert 0 < sum(found["phases"].values()) <= 1.05 * found["seconds"]


@pytest.mark.slow
def test_ours_alone_end_to_end(tmp_path, capsys, clt, tiny_gpt2, text):
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"text": text[:300]}))
    figures, plot = tmp_path / "figures.json", tmp_path / "growth.png"
    flags = ["--model", tiny_gpt2, "--clt", str(clt), "--text", str(lines), "--json", str(figures)]
    assert attribution.main([*flags, "--plot", str(plot), "--tokens", "6", "9", "--nodes", "5", "7"]) == 0
    record = json.loads(figures.read_text())
    assert [row["tokens"] for row in record["by_tokens"]] == [6, 9]
    assert [row["features"] for row in record["by_nodes"]] == [5, 7]
    for row in record["by_tokens"] + record["by_nodes"]:
        assert row["features"] <= row["active"] and row["seconds"] > 0
    assert plot.stat().st_size > 5000 and "9 tokens" in capsys.readouterr().out


def test_per_layer_transcoders_have_the_features_of_the_clt(tmp_path, clt):
    mine, its = attribution.make_per_layer(clt, tmp_path)
    full, own = (attribution.CrossLayerTranscoder.from_pretrained(folder) for folder in (clt, mine))
    assert own.config.reach == 1 and list(its.glob("layer_0.safetensors"))
    for layer in range(full.config.num_layers):
        assert full.encoders[layer].weight.equal(own.encoders[layer].weight)
        assert full.decoders[layer].weight[:, :1].equal(own.decoders[layer].weight)


def test_the_table_has_medians_and_ratios():
    side = {"features": 7, "cpu_seconds": 1.0, "bytes": 2e6}
    ours = [{**side, "seconds": seconds} for seconds in (2.0, 4.0)]
    theirs = [{**side, "seconds": seconds, "bytes": 9e6} for seconds in (30.0, 60.0)]
    row = {"kind": "CLT", "prompt": "", "tokens": 5, "ours": ours, "theirs": theirs}
    line = attribution.as_table({"compared": [row]}).splitlines()[-1]
    assert line.split() == ["CLT", "5", "7", "3.00", "s", "45.0", "s", "15.0", "1.0", "2", "9"]


def test_phases_of_circuit_tracer_are_read_from_its_log():
    """The other environment's script cannot be imported here; its one function that can be told wrong is run alone."""
    tree = ast.parse(THEIRS.read_text())
    parts = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.Assign) and "PHASES" in ast.unparse(n)]
    names = {"re": re}
    exec(compile(ast.Module([n for n in parts if getattr(n, "name", "") != "main"], []), str(THEIRS), "exec"), names)
    phase_of = names["phase_of"]
    assert phase_of("Precomputation completed in 1.25s") == {"features": 1.25}
    assert phase_of("Input vectors built in 0.50s") == {"targets": 0.5}
    assert phase_of("Feature attributions completed in 90.10s") == {"rows of features": 90.1}
    assert phase_of("Attribution completed in 95.00s") == {} and phase_of("Found 7 active features") == {}
