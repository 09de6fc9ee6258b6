"""Divergence of a model whose MLPs a cross-layer transcoder replaces, as an `evaluate` module."""

import evaluate

from hf_clt.evaluation.modules import means_of, module_info


DESCRIPTION = """
KL(original ‖ replaced) of the next-token distributions in nats, mean over the predictions.
"""


class KL(evaluate.Metric):
    """`kl`."""

    def _info(self):
        return module_info(DESCRIPTION, {"count": "number of predictions", "kl": "summed divergence in nats"})

    def _compute(self, **rows):
        return means_of(rows)
