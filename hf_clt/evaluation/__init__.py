"""How good a cross-layer transcoder is: metrics on held-out tokens, tables and plots, and the model it replaces."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "MetricSums": "metrics",
        "ReplacementModel": "replacement",
        "ReplacementOutput": "replacement",
        "active_per_token": "prompt",
        "density_histogram": "metrics",
        "evaluate_clt": "evaluate",
        "evaluation_sums": "evaluate",
        "format_calibration": "calibration",
        "format_metrics_table": ".hub.report",
        "plot_metrics": ".hub.plots",
        "plot_prompt_features": "prompt",
        "prompt_features": "prompt",
        "replacement_metrics": "replacement",
        "to_jumprelu": "calibration",
        "top_features": "prompt",
    },
)
