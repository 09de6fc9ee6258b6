"""Number of active features of a cross-layer transcoder, as an `evaluate` module."""

import evaluate

from hf_clt.evaluation.modules import metrics_of, module_info, per_layer, tensor_inputs


DESCRIPTION = """
Mean number of active features per token in each source layer. In total the sum over the layers.
"""


class L0(evaluate.Metric):
    """`l0` and `l0_per_layer`."""

    def _info(self):
        return module_info(DESCRIPTION, tensor_inputs("count", "active_counts"))

    def _compute(self, **rows):
        return per_layer(metrics_of(rows), "l0")
