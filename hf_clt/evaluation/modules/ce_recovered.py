"""Cross-entropy that is kept when a cross-layer transcoder replaces a model's MLPs, as an `evaluate` module."""

import evaluate

from hf_clt.evaluation.metrics import ce_recovered
from hf_clt.evaluation.modules import means_of, module_info


DESCRIPTION = """
(ce_ablated - ce_replaced) / (ce_ablated - ce_original), from the next-token cross-entropies of the language model, of
the model with its MLP outputs replaced by the reconstruction, and with them set to their means. None where the
ablation changes nothing.
"""
NAMES = ("original", "replaced", "ablated")
INPUTS = {
    "count": "number of predictions",
    "ce_original": "summed cross-entropy of the language model in nats",
    "ce_replaced": "the same with every MLP output replaced",
    "ce_ablated": "the same with every MLP output set to its mean",
}


class CERecovered(evaluate.Metric):
    """`ce_recovered`, and the means `ce_original`, `ce_replaced` and `ce_ablated`."""

    def _info(self):
        return module_info(DESCRIPTION, INPUTS)

    def _compute(self, **rows):
        means = means_of(rows)
        return {"ce_recovered": ce_recovered(*(means[f"ce_{name}"] for name in NAMES)), **means}
