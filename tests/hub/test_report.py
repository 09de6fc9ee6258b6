"""The metrics as a table in plain text."""

import pytest

from hf_clt.hub.report import format_metrics_table
from tests.hub.test_card import METRICS


def test_table():
    lines = format_metrics_table(METRICS).splitlines()
    assert lines[0].split() == ["layer", "NMSE", "expl.", "var.", "L0", "dead"]
    assert lines[2].split() == ["0", "0.2000", "0.8000", "4.0", "10.0%"]
    assert lines[3].split() == ["1", "0.4000", "0.6000", "36.0", "0.0%"]
    assert lines[5].split() == ["all", "0.3000", "0.7000", "40.0", "5.0%"]
    assert len({len(line) for line in lines[:-1]}) == 1  # aligned
    assert "L0 summed" in lines[-1] and "8,192 held-out tokens" in lines[-1]


def test_table_without_what_is_not_known_yet():
    metrics = {**METRICS, "dead_fraction": None, "dead_fraction_per_layer": None}
    table = format_metrics_table(metrics)
    assert "dead" not in table and "NMSE" in table
    with pytest.raises(ValueError, match="no metric per layer"):
        format_metrics_table({"nmse": 0.5})
