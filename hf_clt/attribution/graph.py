"""
An attribution graph: its nodes, its edges, and what they say together: influence, scores, pruning.

Nodes are in one order everywhere: n features (by layer, position, feature), L·P errors (layer by layer), P tokens, m
targets. Edge A[t, s] is what source s gives to target t; rows are targets, and only features and targets have any.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..files import read_json, write_json
from ..release import write_tensors


FORMAT = 1
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


def feature_id(layer: int, position: int, feature: int) -> str:
    """What a feature node is called in files and pages, as circuit-tracer does."""
    return f"{layer}_{feature}_{position}"


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
        edges (`Tensor` of shape `(n + m, n + L·P + P)`): A, the rows of features and then of targets.
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

    def outside(self) -> dict[str, float]:
        """Of the targets, weighted: the share of each rest in the sum of absolute values of all that makes them up."""
        rows = slice(self.num_features, None)
        rests = {name: (values[rows].abs() @ self.target_weights).item() for name, values in self.rest.items()}
        total = (
            sum(rests.values()) + ((self.edges[rows].abs().sum(1) + self.dropped[rows]) @ self.target_weights).item()
        )
        return {name: value / max(total, SMALLEST) for name, value in rests.items()}

    # -- what they say together ---------------------------------------------------------------------------------------

    def influence(self, with_dropped: bool = True) -> Tensor:
        """
        I = w (Â + Â² + ...), (N,): how much of the targets passes through each node, over all paths, with w the
        targets' weights and Â = |A| / Σ|A| of a row. Targets have none.

        Args:
            with_dropped (`bool`): Whether what went to features that are no nodes counts in Σ|A|.
        """
        through, _ = influences(self.edges, self.features[:, 0], self.target_weights, self._sums(with_dropped))
        return torch.cat([through, torch.zeros_like(self.target_weights)])

    def scores(self) -> dict[str, float]:
        """
        `replacement`, I(tokens) / (I(tokens) + I(errors)), the share of influence that reaches tokens through features
        alone, and `completeness`, the mean over nodes of 1 - (share of errors in the row), weighted by I + w. What
        went to features that are no nodes counts as error; in `replacement_of_nodes` and `completeness_of_nodes` it is
        left out, as circuit-tracer does. The two are the same where every active feature is a node.
        """
        found = {}
        for name, with_dropped in (("", True), ("_of_nodes", False)):
            sums = self._sums(with_dropped)
            through, passed = influences(self.edges, self.features[:, 0], self.target_weights, sums)
            errors = slice(self.first_error, self.first_token)
            lost = self.dropped if with_dropped else torch.zeros_like(self.dropped)
            share = (self.edges[:, errors].abs().sum(1) + lost) / sums
            to_tokens, to_errors = through[self.first_token :].sum(), through[errors].sum() + passed @ (lost / sums)
            # Tokens and errors are nodes as well, of whose rows nothing is an error.
            others = through[self.num_features :].sum()
            found[f"replacement{name}"] = (to_tokens / (to_tokens + to_errors).clamp_min(SMALLEST)).item()
            complete = (passed @ (1 - share) + others) / (passed.sum() + others).clamp_min(SMALLEST)
            found[f"completeness{name}"] = complete.item()
        return found

    def note_scores(self) -> None:
        """Keeps scores and what belongs to no node in `info`, which a graph that is pruned from this one takes on."""
        self.info |= {"scores": self.scores(), "outside": self.outside()}

    def _sums(self, with_dropped: bool) -> Tensor:
        """Σ|A| of each row, (n + m,)."""
        sums = self.edges.abs().sum(dim=1)
        return (sums + self.dropped if with_dropped else sums).clamp_min(SMALLEST)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> "AttributionGraph":
        """
        The part that carries most of the influence.

        Nodes are kept until they have `node_threshold` of all influence, tokens and targets always; of the edges among
        them, with influence computed anew, those until `edge_threshold`; then features and errors that lead nowhere
        and features that come from nowhere go, until there are none. `info["after_pruning"]` of the result has the
        scores where what a removed node gave is added to the error of its layer and position (Methods).

        Raises:
            ValueError: For a threshold that is not above 0 and at most 1.
        """
        for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} is no share; give more than 0 and at most 1")
        n, first_token = self.num_features, self.first_token
        layers, sums = self.features[:, 0], self._sums(False)
        through, _ = influences(self.edges, layers, self.target_weights, sums)
        kept = through >= threshold_at(through, node_threshold)
        kept[first_token:] = True
        rows = torch.cat([kept[:n], torch.ones_like(self.target_weights, dtype=torch.bool)])
        edges = self.edges * kept * rows[:, None]
        sums = edges.abs().sum(dim=1).clamp_min(SMALLEST)
        _, passed = influences(edges, layers, self.target_weights, sums)
        edge_scores = edges.abs() * (passed / sums)[:, None]
        edge_mask = (edge_scores >= threshold_at(edge_scores.flatten(), edge_threshold)) & (edges != 0)
        while True:
            before = kept.clone()
            kept[:first_token] &= edge_mask[:, :first_token].any(dim=0)
            kept[:n] &= edge_mask[:n].any(dim=1)
            edge_mask &= kept
            edge_mask[:n] &= kept[:n, None]
            if torch.equal(kept, before):
                break
        pruned = self._restricted(kept[:n], self.edges * edge_mask)
        pruned.info["after_pruning"] = self._with_removed_as_errors(kept[:n]).scores()
        pruned.info |= {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
        return pruned

    def _restricted(self, kept: Tensor, edges: Tensor) -> "AttributionGraph":
        """The graph of some features (n,), bool, with these edges among the nodes; the rest of each row is dropped."""
        columns = torch.cat([kept, kept.new_ones(edges.shape[1] - len(kept))])
        rows = torch.cat([kept, kept.new_ones(len(self.targets))])
        edges = edges[rows][:, columns]
        dropped = (self._sums(True)[rows] - edges.abs().sum(1)).clamp_min(0)
        return replace(
            self,
            features=self.features[kept],
            activations=self.activations[kept],
            edges=edges,
            rest={name: values[rows] for name, values in self.rest.items()},
            dropped=dropped,
            info=dict(self.info),
        )

    def _with_removed_as_errors(self, kept: Tensor) -> "AttributionGraph":
        edges = self.edges.clone()
        layers, positions, _ = self.features[~kept].unbind(1)
        columns = self.first_error + layers * len(self.input_ids) + positions
        edges.index_add_(1, columns, edges[:, : self.num_features][:, ~kept])
        graph = self._restricted(kept, edges)
        rows = torch.cat([kept, kept.new_ones(len(self.targets))])
        return replace(graph, dropped=self.dropped[rows])

    def table(self, count: int = 10) -> str:
        """The strongest features, and the strongest path from each target, as text."""
        through = self.influence()
        lines = [f"{'influence':>9}  {'activation':>10}  {'layer':>5}  {'position':<18}  {'feature':>7}  label"]
        for node in through[: self.num_features].topk(min(count, self.num_features)).indices.tolist():
            layer, position, feature = self.features[node].tolist()
            place = f"{position} {self.tokens[position]!r}"
            label = self.labels.get((layer, feature), "")
            lines.append(
                f"{through[node]:9.4f}  {self.activations[node]:10.3f}  {layer:5}  {place:<18}  {feature:7}  {label}"
            )
        lines += ["", "strongest path to each target:"]
        lines += ["  " + " -> ".join(self.path_to(row)) for row in range(len(self.targets))]
        return "\n".join(lines)

    def path_to(self, target: int) -> list[str]:
        """Names of the nodes on the way back from a target, at each step the source with the largest |A|."""
        row, names = self.num_features + target, [self.name(self.first_target + target)]
        while True:
            column = int(self.edges[row].abs().argmax())
            if self.edges[row, column] == 0:
                return names[::-1]
            names.append(self.name(column))
            if column >= self.num_features:
                return names[::-1]
            row = column

    def name(self, node: int) -> str:
        """What a node is, in words."""
        length = len(self.input_ids)
        if node < self.num_features:
            layer, position, feature = self.features[node].tolist()
            label = self.labels.get((layer, feature))
            return f"layer {layer} {self.tokens[position]!r} feature {feature}" + (f" ({label})" if label else "")
        if node < self.first_token:
            layer, position = divmod(node - self.first_error, length)
            return f"layer {layer} {self.tokens[position]!r} error"
        if node < self.first_target:
            return f"token {self.tokens[node - self.first_token]!r}"
        return self.target_name(node - self.first_target)

    def target_name(self, number: int) -> str:
        target, words = self.targets[number], self.info.get("target_words", {})
        if isinstance(target, FeatureTarget):
            return f"pre-activation of layer {target.layer} feature {target.feature} at position {target.position}"
        name = repr(words.get(str(target.token), target.token))
        return name if target.minus is None else f"{name} less {words.get(str(target.minus), target.minus)!r}"

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """
        Writes `graph.safetensors` (nodes, edges in compressed rows, rests) and `graph.json` (all else) to a folder,
        which is made if it is missing. Each replaces one that is there as a whole.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows, columns = self.edges.nonzero(as_tuple=True)
        offsets = torch.cat([rows.new_zeros(1), rows.bincount(minlength=len(self.edges)).cumsum(0)])
        tensors = {
            "input_ids": self.input_ids,
            "features": self.features.int(),
            "activations": self.activations,
            "target_weights": self.target_weights,
            "edges.values": self.edges[rows, columns],
            "edges.columns": columns.int(),
            "edges.offsets": offsets,
            "dropped": self.dropped,
            **{f"rest.{name}": values for name, values in self.rest.items()},
        }
        write_tensors(folder / "graph.safetensors", {name: tensor.cpu() for name, tensor in tensors.items()})
        write_json(
            folder / "graph.json",
            {
                "format": FORMAT,
                "tokens": self.tokens,
                "num_layers": self.num_layers,
                "targets": [{"kind": type(target).__name__, **asdict(target)} for target in self.targets],
                "info": self.info,
                "labels": [[*key, label] for key, label in self.labels.items()],
                "details": [[*key, value] for key, value in self.details.items()],
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "AttributionGraph":
        """
        Reads what `save` wrote.

        Raises:
            FileNotFoundError: If there is no graph in the folder.
            ValueError: If its format is another.
        """
        folder = Path(folder)
        for name in ("graph.json", "graph.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; give a folder that AttributionGraph.save wrote")
        header = read_json(folder / "graph.json")
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{folder / 'graph.json'}: format is {header.get('format')!r}; this hf_clt reads {FORMAT}"
            )
        tensors = load_file(folder / "graph.safetensors")
        offsets, columns = tensors["edges.offsets"], tensors["edges.columns"].long()
        n, num_tokens = len(tensors["features"]), len(tensors["input_ids"])
        width = n + (header["num_layers"] + 1) * num_tokens
        edges = tensors["edges.values"].new_zeros(len(offsets) - 1, width)
        rows = torch.arange(len(edges)).repeat_interleave(offsets.diff())
        edges[rows, columns] = tensors["edges.values"]
        kinds = {kind.__name__: kind for kind in (TokenTarget, FeatureTarget)}
        return cls(
            input_ids=tensors["input_ids"],
            tokens=header["tokens"],
            features=tensors["features"].long(),
            activations=tensors["activations"],
            targets=[kinds[target.pop("kind")](**target) for target in header["targets"]],
            target_weights=tensors["target_weights"],
            edges=edges,
            rest={name.removeprefix("rest."): t for name, t in tensors.items() if name.startswith("rest.")},
            dropped=tensors["dropped"],
            num_layers=header["num_layers"],
            info=header["info"],
            labels={(layer, feature): label for layer, feature, label in header["labels"]},
            details={(layer, feature): value for layer, feature, value in header["details"]},
        )

    def verify(self, model, clt, count: int = 20, **options) -> dict:
        """Checks the strongest features in the language model; see [`hf_clt.attribution.verify.verify`]."""
        from .verify import verify

        return verify(self, model, clt, count, **options)

    def to_json(self, path: str | Path, **options) -> None:
        """Writes circuit-tracer's JSON; see [`hf_clt.attribution.export.to_json`]."""
        from .export import to_json

        to_json(self, path, **options)

    def to_networkx(self):
        """The graph as a `networkx.DiGraph`; see [`hf_clt.attribution.export.to_networkx`]."""
        from .export import to_networkx

        return to_networkx(self)

    def to_html(self, path: str | Path, **options) -> None:
        """Writes one page that needs nothing else; see [`hf_clt.attribution.page.to_html`]."""
        from .page import to_html

        to_html(self, path, **options)


def influences(
    edges: Tensor, layers: Tensor, weights: Tensor, sums: Tensor, nodes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    Influence in one sweep from the top: a feature's is complete when all layers above it have passed theirs on.

    Args:
        edges (`Tensor` of shape `(n + m, columns)`): A, the rows of n features and of the targets.
        layers (`Tensor` of shape `(n,)`): Of these features, ascending.
        weights (`Tensor` of shape `(m,)`): Of the targets.
        sums (`Tensor` of shape `(n + m,)`): What |A| of a row is divided by.
        nodes (`Tensor` of shape `(n,)`, *optional*): The columns of the features; by default the first n.

    Returns:
        I of the sources, (columns,); I + w of the rows, (n + m,).
    """
    n = len(layers)
    nodes = torch.arange(n, device=layers.device) if nodes is None else nodes
    through = (weights / sums[n:]) @ edges[n:].abs()
    end = n
    for count in reversed(layers.unique_consecutive(return_counts=True)[1].tolist()):
        first = end - count
        through += (through[nodes[first:end]] / sums[first:end]) @ edges[first:end].abs()
        end = first
    return through, torch.cat([through[nodes], weights])


def threshold_at(scores: Tensor, share: float) -> Tensor:
    """The largest value such that the scores (K,) that reach it have at least `share` of the sum of all."""
    wanted, count = share * scores.sum(), 1024
    while True:
        largest = scores.topk(min(count, len(scores))).values
        reached = (largest.cumsum(0) < wanted).sum()
        if reached < len(largest) or len(largest) == len(scores):
            return largest[reached.clamp_max(len(largest) - 1)]
        count *= 8


__all__ = ["AttributionGraph", "FeatureTarget", "Target", "TokenTarget"]
