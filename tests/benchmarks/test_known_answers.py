"""The benchmark of known answers, on one model and few updates."""

from dataclasses import replace

import pytest

from benchmarks import known_answers
from benchmarks.sweep import read_records


@pytest.mark.slow
def test_trained_clts_are_told_from_their_controls(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(known_answers, "TRAINING", replace(known_answers.TRAINING, training_steps=300))
    records, plot = tmp_path / "records.jsonl", tmp_path / "known.png"
    command = ["--records", str(records), "--plot", str(plot), "--models", "two hops", "--seeds", "0"]
    command += ["--lambdas", "0.01"]
    known_answers.main(command)
    found = read_records(records)
    by_kind = {(record["clt"], record["reach"]): record for record in found}
    assert sorted(record["clt"] for record in found) == sorted(
        ["right", "collapsed", *["trained"] * 4, "grown", "shuffled", "random"]
    )
    for record in found:
        assert sum(record[name] for name in known_answers.SHARES) == pytest.approx(1)
        for name in known_answers.SHARES:
            parts = [shares[name] for shares in record["by_distance"].values()]
            assert min(parts) - 1e-9 <= record[name] <= max(parts) + 1e-9
    right, collapsed = by_kind["right", None], by_kind["collapsed", None]
    assert right["nmse"] < 1e-9 and collapsed["nmse"] < 1e-9
    assert collapsed["l0"] < right["l0"]  # which is why sparsity asks for it
    for reach in range(1, 5):
        trained = by_kind["trained", reach]
        assert trained["nmse"] < 0.05
        for control in (by_kind["shuffled", 4], by_kind["random", 4]):
            assert control["nmse"] > 0.5
            assert trained["edges"] > 2 * control["edges"]
            assert trained["two_steps"] > 2 * control["two_steps"]
    # What a per-layer transcoder cannot do, and one whose reach grew could and does not.
    assert max(by_kind["trained", 1]["one_step"], by_kind["grown", 4]["one_step"]) < 0.05
    assert by_kind["trained", 4]["one_step"] > 0.05 > by_kind["grown", 4]["nmse"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "two hops" in table and "right" in table

    known_answers.main(command[:2] + command[4:])  # all is recorded
    assert read_records(records) == found
    assert "[" not in capsys.readouterr().out


def test_the_options_say_what_is_run(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(known_answers, "make_runs", lambda wanted, path: asked.extend(wanted) or [])
    given = ["--records", str(tmp_path / "r.jsonl"), "--models", "induction", "--seeds", "4", "--lambdas", "0.5", "2"]
    known_answers.main(given)
    assert {run["model"] for run in asked} == {"induction"}
    assert {run["seed"] for run in asked} == {None, 4}
    assert {run["lambda"] for run in asked} == {None, 0.5, 2.0}


def test_what_is_to_be_run():
    wanted = known_answers.runs(["induction"], [0, 1])
    assert len(wanted) == 2 + 2 * (3 + 1) * len(known_answers.LAMBDAS)
    assert [run["clt"] for run in wanted[:2]] == ["right", "collapsed"]
    control = {**wanted[-1], "clt": "shuffled"}
    assert known_answers.is_of(control, wanted[-1])
    assert not known_answers.is_of(control, wanted[0])
    assert not known_answers.is_of({**wanted[0]}, wanted[1])


def test_summary_is_by_reach_and_sparsity():
    columns = dict.fromkeys(known_answers.COLUMNS, 0.25)
    run = {"model": "induction", "clt": "trained", "reach": 1, "lambda": 0.1}
    rows = known_answers.summarize(
        [{**run, "seed": 0, **columns}, {**run, "seed": 1, **columns, "nmse": 0.75}, {**run, "reach": 2, **columns}]
    )
    assert [(row["reach"], row["nmse"], row["seeds"]) for row in rows] == [(1, 0.5, 2), (2, 0.25, 1)]
    assert "0.500" in known_answers.format_summary(rows)


def test_distances_are_of_trained_clts():
    run = {"model": "two hops", "clt": "trained", "reach": 3}
    records = [
        {**run, "by_distance": {"1": {"one_step": 0.5}, "3": {"one_step": 0.0}}},
        {**run, "by_distance": {"1": {"one_step": 0.75}}},
        {**run, "clt": "shuffled", "by_distance": {"1": {"one_step": 0.0}}},
    ]
    assert known_answers.format_distances(records).splitlines()[-1].split() == ["two", "hops", "3", "0.625", "0.000"]
