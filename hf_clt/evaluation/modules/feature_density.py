"""Histogram of how often the features of a cross-layer transcoder are active, as an `evaluate` module."""

import evaluate

from hf_clt.evaluation.modules import metrics_of, module_info, tensor_inputs


DESCRIPTION = """
Histogram over all features of log10 of the share of tokens on which a feature is active, floored at -10.
"""


class FeatureDensity(evaluate.Metric):
    """`feature_density`: `bin_edges` (41 numbers) and `counts` (40)."""

    def _info(self):
        return module_info(DESCRIPTION, tensor_inputs("count", "active_counts"))

    def _compute(self, **rows):
        return {"feature_density": metrics_of(rows)["feature_density"]}
