"""The crossover measurement times the two ways that it says."""

import json

import pytest

from benchmarks import crossover, measure_crossover
from hf_clt.kernels import rows


def test_each_density_is_timed_both_ways(monkeypatch):
    ways = []
    use_dense = rows.use_dense

    def spy(entries, num_tokens, num_features):
        ways.append((entries.numel() / (num_tokens * num_features), use_dense(entries, num_tokens, num_features)))
        return ways[-1][1]

    monkeypatch.setattr("hf_clt.kernels.decode.use_dense", spy)
    table = crossover.measure_crossover(16, 200, 2, 8, repeats=1)
    assert [row["density"] for row in table] == list(crossover.DENSITIES)
    assert {way for _, way in ways} == {True, False}
    assert {density for density, _ in ways} == {max(1, round(d * 200)) / 200 for d in crossover.DENSITIES}
    for row in table:
        assert row["gathered"] > 0 and row["product"] > 0 and row["ratio"] == row["product"] / row["gathered"]
    assert rows.DENSE_ABOVE == 0.15  # as it was


def test_the_script_prints_and_writes_the_table(tmp_path, capsys):
    figures = tmp_path / "crossover.json"
    flags = ["--tokens", "16", "--num-features", "200", "--targets", "2", "--d-model", "8", "--json"]
    assert measure_crossover.main([*flags, str(figures)]) == 0
    record = json.loads(figures.read_text())
    assert record["shape"] == {"N": 16, "F": 200, "J": 2, "D": 8}
    assert len(record["rows"]) == len(crossover.DENSITIES)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(crossover.DENSITIES)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "tpu"], "error: device='tpu': hf_clt runs on CPUs and NVIDIA GPUs"),
        (["--tokens", "0"], "error: tokens=0 is not positive; give at least 1"),
        (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder; make it first"),
    ],
)
def test_wrong_options_give_one_line(flags, message, capsys):
    assert measure_crossover.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
