"""The plots of the model card."""

import json
import subprocess
import sys

import pytest

from hf_clt.evaluation import plot_metrics
from hf_clt.hub.plots import _training_curves as training_curves
from tests.hub.test_card import METRICS as PER_LAYER


METRICS = PER_LAYER | {"feature_density": {"bin_edges": [-10.0, -5.0, -2.5, 0.0], "counts": [5, 70, 25]}}


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
