"""Interpolation in L0 and verdicts, against values worked out by hand."""

import math

import pytest

from benchmarks.verdicts import at_l0, compare, format_verdicts, judge, layer_groups, plot_verdicts, seed_at_l0


def run(family="topk", candidate="baseline", seed=0, k=16, l0=16.0, nmse=(0.2, 0.3, 0.4), ce=0.9, dead=0.1):
    """A record with three layers, of which the middle one has twice the L0 of the others."""
    metrics = {"nmse": sum(nmse) / 3, "nmse_per_layer": list(nmse), "dead_fraction": dead}
    metrics |= {"l0": 3 * l0, "l0_per_layer": [0.75 * l0, 1.5 * l0, 0.75 * l0]}
    record = {"family": family, "candidate": candidate, "seed": seed, "varied": {"k": k}, "metrics": metrics}
    return {**record, "cross_entropy": None if ce is None else {"ce_recovered": ce}, "train_seconds": 10.0 * k}


def plan_of(records):
    return [{name: record[name] for name in ("family", "candidate", "seed")} for record in records]


def test_a_metric_is_linear_in_log_l0():
    points = [(64, 0.1), (8, 0.4), (16, 0.3)]  # in any order
    assert at_l0(points, 8) == 0.4 and at_l0(points, 64) == pytest.approx(0.1)
    assert at_l0(points, 32) == pytest.approx(0.2)  # half of the way from 16 to 64 in log L0
    assert at_l0(points, 8 * math.sqrt(2)) == pytest.approx(0.35)
    # A run that has no such metric is left out: from 8 to 64, 32 is two thirds of the way.
    assert at_l0([(8, 0.4), (16, None), (64, 0.1)], 32) == pytest.approx(0.2)
    assert at_l0([(8, 0.4), (64, None)], 16) is None


def test_a_wanted_l0_may_lie_a_little_outside_the_runs():
    points = [(16, 0.3), (32, 0.2)]
    assert at_l0(points, 32.5) == pytest.approx(0.2 - 0.1 * math.log2(32.5 / 32))
    assert at_l0(points, 15.5) == pytest.approx(0.3 + 0.1 * math.log2(16 / 15.5))
    assert at_l0(points, 34) is None and at_l0(points, 15) is None
    assert at_l0([(16.1, 0.3)], 16) == at_l0([(15.9, 0.3)], 16) == 0.3
    assert at_l0([(16.8, 0.3)], 16) is None
    assert at_l0([], 16) is None and at_l0([(0, 0.9)], 16) is None


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(10, ["0-2", "3-6", "7-9"]), (30, ["0-9", "10-19", "20-29"]), (2, ["0-0", "1-1"]), (1, ["0-0"])],
)
def test_groups_cover_all_layers(num_layers, expected):
    groups = layer_groups(num_layers)
    assert [f"{group[0]}-{group[-1]}" for group in groups] == expected
    assert [layer for group in groups for layer in group] == list(range(num_layers))


def test_a_seed_at_a_wanted_l0():
    records = [run(l0=10, nmse=(0.2, 0.4, 0.6), ce=0.8, dead=0.2), run(l0=40, nmse=(0.1, 0.2, 0.3), ce=0.9, dead=0)]
    found = seed_at_l0([*records, {"error": "not finite"}], 20)
    assert found["layers"] == pytest.approx([0.15, 0.3, 0.45])
    assert found["groups"] == pytest.approx([0.15, 0.3, 0.45])
    assert found["nmse"] == pytest.approx(0.3)
    assert found["ce"] == pytest.approx(0.85) and found["dead"] == pytest.approx(0.1)
    assert seed_at_l0(records, 50) is None
    assert seed_at_l0([{**record, "cross_entropy": None} for record in records], 20)["ce"] is None


def test_verdicts():
    # Both have variance 0.01 ** 2, so the spread is 0.01.
    baseline = [0.30, 0.31, 0.32]
    units, verdict = judge([0.26, 0.27, 0.28], baseline)
    assert units == pytest.approx(-4) and verdict == "better"
    assert judge([0.35, 0.36, 0.37], baseline) == (pytest.approx(5), "worse")
    assert judge([0.275, 0.285, 0.295], baseline) == (pytest.approx(-2.5), "not told apart")
    # Variances 0.0003 and 0.0001: together 0.0002.
    units, _ = judge([0.31 - math.sqrt(0.0003), 0.31, 0.31 + math.sqrt(0.0003)], [x + 0.02 for x in baseline])
    assert units == pytest.approx(-0.02 / math.sqrt(0.0002))
    # Three seeds of one and four of the other: 2 and 3 degrees.
    units, _ = judge([0.1, 0.2, 0.3], [0.4, 0.4, 0.4, 0.4])
    assert units == pytest.approx(-0.2 / math.sqrt(2 * 0.01 / 5))
    assert judge([0.2, 0.3], baseline) == (None, "too few seeds")
    assert judge([], baseline) == (None, "too few seeds")
    assert judge([0.3] * 3, [0.3] * 3) == (0.0, "not told apart")
    assert judge([0.2] * 3, [0.3] * 3) == (-math.inf, "better")


def test_a_comparison_in_table_and_plot(tmp_path):
    records = []
    for seed, shift in enumerate((-0.01, 0, 0.01)):
        for name, nmse, l0 in (("baseline", 0.3, 16), ("good", 0.2, 16), ("same", 0.3, 16), ("dense", 0.2, 30)):
            records.append(run(candidate=name, seed=seed, l0=l0, nmse=[nmse + shift] * 3, ce=None))
        # Worse in the last layer, better in the first.
        records.append(run(candidate="mixed", seed=seed, nmse=[0.2 + shift, 0.3 + shift, 0.4 + shift]))
    records[0]["cross_entropy"] = {"ce_recovered": 0.9}
    records[5]["cross_entropy"] = {"ce_recovered": 0.8}
    records.append(run(candidate="begun"))
    records.append({**run(candidate="broken"), "error": "loss is not finite"})
    del records[-1]["metrics"], records[-1]["cross_entropy"], records[-1]["train_seconds"]
    records.append(run(family="relu", candidate="good"))
    planned = [*plan_of(records), *plan_of([run(candidate="begun", seed=1), run(candidate="waiting")])]
    rows = {(row["family"], row["candidate"]): row for row in compare(records, planned, [16])}
    assert rows["topk", "good"]["verdict"] == "better"
    assert rows["topk", "good"]["units"] == pytest.approx(-10)
    assert rows["topk", "good"]["change"] == pytest.approx(-1 / 3)
    assert rows["topk", "same"]["verdict"] == "not told apart"
    assert rows["topk", "mixed"]["layers"] == (1, 1) and rows["topk", "mixed"]["verdict"] == "not told apart"
    assert rows["topk", "baseline"]["verdict"] is None and rows["topk", "baseline"]["layers"] is None
    assert (
        rows["topk", "dense"]["notes"][0] == "seed 0: its runs reach L0 30.0 to 30.0, not 16; give other values of k"
    )
    assert rows["topk", "begun"]["notes"] == ["seed 1: 0 of 1 runs are made"]
    assert rows["topk", "begun"]["verdict"] == "too few seeds"
    assert rows["topk", "broken"]["notes"] == ["seed 0: loss is not finite"]
    assert rows["topk", "waiting"]["seconds"] is None
    assert rows["relu", "good"]["verdict"] is None  # its family has no baseline

    table = format_verdicts(list(rows.values()))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    nmse, nothing = [*["0.3000"] * 3, "0.3000 ± 0.0100"], [""] * 4
    assert cells[2] == ["topk", "baseline", "16", *nmse, *nothing, "85.0% ± 7.1%", "10.0%", "160"]
    assert all(len(line) == 14 for line in cells[: 1 + len(rows)])  # all but one row
    assert "\n- no run is made of topk, waiting\n" in table
    assert "| 0.2000 ± 0.0100 | -33.3% | -10.0 | **better** | 3, 0 | - |" in table
    assert "| too few seeds (1) |" in table
    assert "- topk, dense, L0 16, seed 2: its runs reach" in table
    plot_verdicts(list(rows.values()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert "too few" not in format_verdicts(compare([], [], [16]))
