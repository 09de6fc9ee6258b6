"""How good a cross-layer transcoder is: metrics on held-out tokens, tables and plots of them."""

from .metrics import MetricSums, density_histogram
from .report import format_metrics_table, plot_metrics


__all__ = ["MetricSums", "density_histogram", "format_metrics_table", "plot_metrics"]
