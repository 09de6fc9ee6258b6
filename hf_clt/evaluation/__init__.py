"""How good a cross-layer transcoder is: metrics on held-out tokens, tables and plots, and the model it replaces."""

from .calibration import format_calibration, to_jumprelu
from .evaluate import evaluate_clt, evaluation_sums
from .metrics import MetricSums, density_histogram
from .prompt import active_per_token, plot_prompt_features, prompt_features, top_features
from .replacement import ReplacementModel, ReplacementOutput, replacement_metrics
from .report import format_metrics_table, plot_metrics


__all__ = [
    "MetricSums",
    "ReplacementModel",
    "ReplacementOutput",
    "active_per_token",
    "density_histogram",
    "evaluate_clt",
    "evaluation_sums",
    "format_calibration",
    "format_metrics_table",
    "plot_metrics",
    "plot_prompt_features",
    "prompt_features",
    "replacement_metrics",
    "to_jumprelu",
    "top_features",
]
