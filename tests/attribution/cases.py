"""Cases of the rows' tests, and the checks that they are put to: each gives the largest relative difference."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from hf_clt import CrossLayerTranscoder
from hf_clt.attribution.frozen import FrozenModel, freeze
from hf_clt.attribution.rows import Seeds, Sources, feature_seeds, find_sources, logit_seeds, pull, push, writes_of
from tests.attribution.autograd_reference import Traced, double_throughout, make_model, prompt, trace
from tests.reference import random_clt


READS, WRITES = ("hook_resid_mid", "mlp.hook_in"), ("hook_mlp_out", "mlp.hook_out")
HOOKS = [(read, write) for read in READS for write in WRITES]
CLEARED = [0, 3]
TARGETS = [(5, None, 8), (6, 7, 3), (9, None, 0)]  # token, other token, position


@dataclass
class Case:
    """What was computed, and the reference; mutants replace parts of it."""

    name: str
    model: torch.nn.Module
    clt: CrossLayerTranscoder
    frozen: FrozenModel
    sources: Sources
    traced: Traced
    kept: dict  # patterns and denominators of the reference
    edges: Tensor  # of the reference
    edit_seeds: Callable[[Seeds], Seeds] = lambda seeds: seeds

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen.tokens.dtype

    def pulled(self) -> tuple[Tensor, dict[str, Tensor]]:
        """A of all features and of [`TARGETS`], and the rests."""
        tokens, minus, positions = (list(column) for column in zip(*TARGETS, strict=True))
        own = feature_seeds(self.clt, self.frozen, self.sources.features)
        heads = logit_seeds(self.frozen, tokens, minus, positions)
        seeds = Seeds(*(torch.cat([getattr(own, name), getattr(heads, name)]) for name in vars(own)))
        return pull(self.frozen, self.sources, self.edit_seeds(seeds))


@cache
def model_of(name: str, dtype: torch.dtype):
    return make_model(name, dtype).requires_grad_(False)


@cache
def make_case(
    name: str, hooks: tuple[str, str] = HOOKS[0], skip: bool = False, dtype: torch.dtype = torch.float64, **fields
) -> Case:
    """One architecture with a random CLT: about 200 active features on 9 tokens, of which two are cleared."""
    model = model_of(name, dtype)
    fields = {"feature_input_hook": hooks[0], "feature_output_hook": hooks[1], "skip_connection": skip, **fields}
    clt = random_clt(num_layers=3, d_model=16, num_features=20, double=dtype == torch.float64, **fields).eval()
    clt.requires_grad_(False)
    for threshold in clt.thresholds if clt.config.activation_fn == "batchtopk" else ():
        threshold.value.fill_(0.5)
    cleared = torch.zeros(9, dtype=torch.bool)
    cleared[CLEARED] = True
    kept = {}
    with double_throughout() if dtype == torch.float64 else torch.no_grad():
        frozen = freeze(model, prompt(), *hooks, dtype=dtype)
    sources = find_sources(clt, frozen, cleared, dtype)
    traced, edges = traced_edges(name, model, clt, kept)
    return Case(name, model, clt, frozen, sources, traced, kept, edges)


def traced_edges(name: str, model, clt: CrossLayerTranscoder, kept: dict | None, **options) -> tuple[Traced, Tensor]:
    if clt.dtype == torch.float64:
        with double_throughout():
            traced = trace(model, name, clt, prompt(), CLEARED, kept=kept, **options)
    else:
        traced = trace(model, name, clt, prompt(), CLEARED, kept=kept, **options)
    return traced, traced.edges(TARGETS)


# -- checks -----------------------------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def logits(case: Case) -> float:
    """Check 1: the head's logits through the linear maps are the model's."""
    bias = 0 if case.frozen.head_bias is None else case.frozen.head_bias
    return relative(case.frozen.rebuilt_logits() - bias, case.traced.logits.detach())


def conservation(case: Case) -> float:
    """Check 2: edges and rests of a row add up to the pre-activation or logit that the model computed."""
    edges, rests = case.pulled()
    expected = torch.cat([case.traced.pre_activations, case.traced.targets(TARGETS)]).detach()
    return relative(edges.sum(dim=1) + sum(rests.values()), expected)


def autograd(case: Case) -> float:
    """Check 3: rows are the derivatives that autograd gives, each relative to the largest edge of its row."""
    edges, _ = case.pulled()
    largest = case.edges.abs().amax(dim=1, keepdim=True)
    return ((edges - case.edges) / largest).abs().max().item()


def columns(case: Case, every: int = 11) -> float:
    """Check 5: what some features push to all pre-activations is what these pull from them."""
    nodes = torch.arange(0, len(case.sources.features), every)
    reads = push(case.frozen, case.sources, writes_of(case.sources, nodes)).reads
    pushed = at_features(case, torch.stack(reads))
    pulled = case.pulled()[0][: len(case.sources.features), nodes]
    return relative(pushed, pulled.T)


def doubling(case: Case, every: int = 37) -> float:
    """Check 5: a feature doubled in the model, patterns and norms held, moves pre-activations by its column."""
    pulled = case.pulled()[0][: len(case.sources.features)]
    worst = 0.0
    for node in range(0, len(case.sources.features), every):
        factors = torch.ones(len(case.sources.features), dtype=case.dtype)
        factors[node] = 2
        moved, _ = retraced(case, factors)
        column = pulled[:, node]
        error = (moved.pre_activations - case.traced.pre_activations - column).abs().max()
        # Beside what is moved, the rounding of pre-activations, of which this is a difference.
        worst = max(worst, (error / column.abs().max().clamp_min(1e-2)).item())
    return worst


def retraced(case: Case, factors: Tensor):
    with double_throughout() if case.dtype == torch.float64 else torch.no_grad(), torch.no_grad():
        traced = trace(case.model, case.name, case.clt, prompt(), CLEARED, kept=case.kept, changed=factors)
    return traced, factors


def at_features(case: Case, reads: Tensor) -> Tensor:
    """W_enc of the features (n,) with changes of what layers read (L, K, P, D), (K, n)."""
    layers, positions, indices = case.sources.features.unbind(1)
    weight = torch.stack([encoder.weight for encoder in case.clt.encoders])[layers, indices]
    return torch.einsum("nkd,nd->kn", reads.transpose(1, 2)[layers, positions], weight)


def with_blocks(case: Case, edit: Callable) -> Case:
    return replace(case, frozen=replace(case.frozen, blocks=[edit(block) for block in case.frozen.blocks]))


CHECKS = {check.__name__: check for check in (logits, conservation, autograd, columns, doubling)}
