"""Share of dead features of a cross-layer transcoder, as an `evaluate` module."""

import evaluate

from hf_clt.evaluation.modules import metrics_of, module_info, per_layer, tensor_inputs


DESCRIPTION = """
Share of the features of each source layer that are active on none of the tokens, whose number is stated. In total the
mean over the layers.
"""


class DeadFraction(evaluate.Metric):
    """`dead_fraction`, `dead_fraction_per_layer` and `num_tokens`."""

    def _info(self):
        return module_info(DESCRIPTION, tensor_inputs("count", "active_counts"))

    def _compute(self, **rows):
        metrics = metrics_of(rows)
        return {**per_layer(metrics, "dead_fraction"), "num_tokens": metrics["num_tokens"]}
