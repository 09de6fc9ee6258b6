"""Share of the targets' variance that a cross-layer transcoder explains, as an `evaluate` module."""

import evaluate

from hf_clt.evaluation.modules import metrics_of, module_info, per_layer, tensor_inputs


DESCRIPTION = """
1 - NMSE per target layer, where NMSE = Σ(y - ŷ)² / Σ(y - ȳ)² over tokens and dimensions. In total the mean over the
layers.
"""


class ExplainedVariance(evaluate.Metric):
    """`explained_variance` and `explained_variance_per_layer`."""

    def _info(self):
        return module_info(DESCRIPTION, tensor_inputs("count", "mean", "squared_deviation", "squared_error"))

    def _compute(self, **rows):
        return per_layer(metrics_of(rows), "explained_variance")
