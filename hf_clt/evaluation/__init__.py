"""How good a cross-layer transcoder is: metrics on held-out tokens, tables and plots, and the model it replaces."""

from .calibration import format_calibration, to_jumprelu
from .evaluate import evaluate_clt, evaluation_sums
from .metrics import MetricSums, density_histogram
from .replacement import ReplacementModel, ReplacementOutput, replacement_metrics
from .report import format_metrics_table, plot_metrics


__all__ = [
    "MetricSums",
    "ReplacementModel",
    "ReplacementOutput",
    "density_histogram",
    "evaluate_clt",
    "evaluation_sums",
    "format_calibration",
    "format_metrics_table",
    "plot_metrics",
    "replacement_metrics",
    "to_jumprelu",
]
