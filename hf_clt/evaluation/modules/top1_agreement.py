"""How often a model whose MLPs a cross-layer transcoder replaces predicts the same token, as an `evaluate` module."""

import evaluate

from hf_clt.evaluation.modules import means_of, module_info


DESCRIPTION = """
Share of the predictions in which the language model and the model with its MLP outputs replaced have the same most
probable token.
"""
INPUTS = {
    "count": "number of predictions",
    "top1_agreement": "number of predictions with the same most probable token",
}


class Top1Agreement(evaluate.Metric):
    """`top1_agreement`."""

    def _info(self):
        return module_info(DESCRIPTION, INPUTS)

    def _compute(self, **rows):
        return means_of(rows)
