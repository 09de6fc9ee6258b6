"""Normalised mean squared error of a cross-layer transcoder, as an `evaluate` module."""

import evaluate

from hf_clt.evaluation.modules import metrics_of, module_info, per_layer, tensor_inputs


DESCRIPTION = """
Squared error of the reconstruction over the targets' squared deviation from each dimension's mean, both summed over
tokens and dimensions, per target layer: Σ(y - ŷ)² / Σ(y - ȳ)². In total the mean over the layers.
"""


class NMSE(evaluate.Metric):
    """`nmse` and `nmse_per_layer`; None for a layer whose targets do not vary."""

    def _info(self):
        return module_info(DESCRIPTION, tensor_inputs("count", "mean", "squared_deviation", "squared_error"))

    def _compute(self, **rows):
        return per_layer(metrics_of(rows), "nmse")
