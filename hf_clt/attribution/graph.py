"""
An attribution graph: its nodes, its edges, and what they say together: influence, scores, pruning.

Nodes are in one order everywhere: n features (by layer, position, feature), L·P errors (layer by layer), P tokens, m
targets. Edge A[t, s] is what source s gives to target t; rows are targets, and only features and targets have any.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import write_json


SMALLEST = 1e-10  # of a row's sum of |A|, which it is divided by


@dataclass(frozen=True)
class TokenTarget:
    """
    The logit of a next token, less the mean over the vocabulary; or, with `minus`, less the logit of another token
    ("why this and not that").
    """

    token: int
    position: int = -1
    minus: int | None = None


@dataclass(frozen=True)
class FeatureTarget:
    """The pre-activation of a feature."""

    layer: int
    position: int
    feature: int


Target = TokenTarget | FeatureTarget


@dataclass
class AttributionGraph:
    """
    The graph of one prompt of P tokens in a language model of L layers.

    Args:
        input_ids (`Tensor` of shape `(P,)`, int64): The prompt.
        tokens (`list[str]`): Its tokens as text; their ids as text where there was no tokenizer.
        features (`Tensor` of shape `(n, 3)`, int64): Layer, position, feature of each feature node, ascending.
        activations (`Tensor` of shape `(n,)`).
        targets (`list[Target]`): m of them.
        target_weights (`Tensor` of shape `(m,)`): What each counts: of tokens their probability, not renormalised; 1
            for differences of tokens and for features.
        edges (`Tensor` of shape `(n + m, n + L·P + P)`): A; of features that were not followed the row is 0.
        followed (`Tensor` of shape `(n,)`, bool): Whether a feature's row was computed.
        rest (`dict[str, Tensor]`): By name what of each row (n + m,) belongs to no node: biases, and MLP outputs at
            positions without nodes.
        dropped (`Tensor` of shape `(n + m,)`): |A| of a row that went to features that are no nodes of this graph.
        num_layers (`int`): L.
        info (`dict`): JSON-able: the CLT and the language model with their revisions, settings, figures measured on
            the way (`error`, seconds), `scan`, and `verified` once [`verify`] has been run.
        labels (`dict[tuple[int, int], str]`): What features (layer, feature) are about.
        details (`dict[tuple[int, int], dict]`): Of features: `examples` (a list of {"tokens": list[str], "acts":
            list[float]}), `top_logits` and `bottom_logits` (lists of text).
    """

    input_ids: Tensor
    tokens: list[str]
    features: Tensor
    activations: Tensor
    targets: list[Target]
    target_weights: Tensor
    edges: Tensor
    followed: Tensor
    rest: dict[str, Tensor]
    dropped: Tensor
    num_layers: int
    info: dict = field(default_factory=dict)
    labels: dict[tuple[int, int], str] = field(default_factory=dict)
    details: dict[tuple[int, int], dict] = field(default_factory=dict)

    # -- nodes --------------------------------------------------------------------------------------------------------

    @property
    def num_features(self) -> int:
        """n."""
        return len(self.features)

    @property
    def num_nodes(self) -> int:
        """N = n + L·P + P + m."""
        return self.edges.shape[1] + len(self.targets)

    @property
    def first_error(self) -> int:
        """Index of the first error node."""
        return self.num_features

    @property
    def first_token(self) -> int:
        return self.num_features + self.num_layers * len(self.input_ids)

    @property
    def first_target(self) -> int:
        return self.edges.shape[1]

    def adjacency(self) -> Tensor:
        """A among all nodes, (N, N): rows of errors and tokens are 0."""
        full = self.edges.new_zeros(self.num_nodes, self.num_nodes)
        n, first = self.num_features, self.first_target
        full[:n, :first], full[first:, :first] = self.edges[:n], self.edges[n:]
        return full

    def rests(self) -> dict[str, Tensor]:
        """By name what of each row (n + m,), features and then targets, belongs to no node."""
        return dict(self.rest)


__all__ = ["AttributionGraph", "FeatureTarget", "Target", "TokenTarget"]
