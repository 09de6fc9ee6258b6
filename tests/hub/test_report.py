import json
import subprocess
import sys

import pytest

from hf_clt.evaluation import format_metrics_table, plot_metrics
from hf_clt.hub.plots import _training_curves as training_curves


METRICS = {
    "nmse": 0.3,
    "explained_variance": 0.7,
    "l0": 1234.5,
    "dead_fraction": 0.05,
    "num_tokens": 8192,
    "nmse_per_layer": [0.2, 0.4],
    "explained_variance_per_layer": [0.8, 0.6],
    "l0_per_layer": [34.5, 1200.0],
    "dead_fraction_per_layer": [0.1, 0.0],
    "feature_density": {"bin_edges": [-10.0, -5.0, -2.5, 0.0], "counts": [5, 70, 25]},
}


def test_table():
    lines = format_metrics_table(METRICS).splitlines()
    assert lines[0].split() == ["layer", "NMSE", "expl.", "var.", "L0", "dead"]
    assert lines[2].split() == ["0", "0.2000", "0.8000", "34.5", "10.0%"]
    assert lines[3].split() == ["1", "0.4000", "0.6000", "1,200.0", "0.0%"]
    assert lines[5].split() == ["all", "0.3000", "0.7000", "1,234.5", "5.0%"]
    assert len({len(line) for line in lines[:-1]}) == 1  # aligned
    assert "L0 summed" in lines[-1] and "8,192 held-out tokens" in lines[-1]


def test_table_without_what_is_not_known_yet():
    metrics = {**METRICS, "dead_fraction": None, "dead_fraction_per_layer": None}
    table = format_metrics_table(metrics)
    assert "dead" not in table and "NMSE" in table
    with pytest.raises(ValueError, match="no metric per layer"):
        format_metrics_table({"nmse": 0.5})


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    history = [{"step": step, "loss": 100 / (step + 1), "nmse": 0.9, "l0": 0.0} for step in range(5)]
    history.append({"step": 5, **METRICS})
    history = json.loads(json.dumps(history))  # as read from metrics.jsonl
    written = plot_metrics(METRICS, history, tmp_path / "plots")
    assert [path.name for path in written] == ["training_curves.png", "metrics_per_layer.png", "feature_density.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in plot_metrics(None, history[:1], tmp_path)] == ["training_curves.png"]
    assert plot_metrics(None, [], tmp_path) == []


def test_training_and_held_out_curves_are_told_apart():
    pytest.importorskip("matplotlib")
    history = [{"step": step, "nmse": 0.8 - step / 10, "nmse_per_layer": [0.8], "l0": 3.0} for step in range(3)]
    history.append({"step": 2, "nmse": 0.7, "num_tokens": 100})
    axes = training_curves(history).axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes[0].lines}
    assert curves == {
        "training": [[0, 0.8], [1, pytest.approx(0.7)], [2, pytest.approx(0.6)]],
        "held-out (100 tokens)": [[2, 0.7]],
    }
    assert [line.get_label() for line in axes[1].lines] == ["training"]  # no L0 in the evaluation: no curve of it


def test_infinite_values_and_dead_dictionaries_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = {
        **METRICS,
        "nmse_per_layer": [float("inf"), 0.4],
        "feature_density": {"bin_edges": [-10, -5, 0], "counts": [9, 0]},
    }
    history = [{"step": 0, "loss": float("nan"), "nmse": float("inf"), "l0": 3.0}]
    assert len(plot_metrics(metrics, history, tmp_path)) == 3


def test_missing_matplotlib_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from hf_clt.evaluation import plot_metrics\n"
        f"plot_metrics(None, [], {str(tmp_path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert 'ImportError: plots need matplotlib; install it with `pip install "hf_clt[plots]"`' in done.stderr
