"""
What the rows of attribution graphs are compared with: autograd on the language model itself, its own modules at work,
with attention patterns and the denominators of norms detached and the MLPs' outputs made of leaves. Nothing here knows
how `hf_clt.attribution` finds or multiplies anything.
"""

import contextlib
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_clt import CrossLayerTranscoder
from tests.harvest.test_sites import ARCHITECTURES as OF_SITES
from tests.harvest.test_sites import build


# gptj has an attention of its own, which is refused. In test_sites two heads share one key-value head, which says
# nothing about which head reads which: here four heads have two. Windows are shorter than the prompts.
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 4}
GEMMA3_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ARCHITECTURES = {name: row for name, row in OF_SITES.items() if name != "gptj"}
for name, further in (
    ("llama", GQA),
    ("qwen2", GQA),
    ("qwen3", {**GQA, "head_dim": 6}),
    ("phi3", GQA),
    ("phi", GQA),
    ("mistral", {**GQA, "head_dim": 8, **WINDOW}),
    ("gemma2", {**GQA, "head_dim": 8, **WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    ("gemma3", {**GQA, "head_dim": 8, **WINDOW, **GEMMA3_LAYERS}),
):
    kind, options, *rest = ARCHITECTURES[name]
    ARCHITECTURES[name] = (kind, {**options, **further}, *rest)

NAME = "tests_detached"  # of the attention function


def make_model(name: str, dtype: torch.dtype = torch.float64, **options):
    """The same weights each time."""
    model_type, own = ARCHITECTURES[name][:2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(model_type, {**own, **options}).to(dtype)


def prompt(length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def double_throughout():
    """Models take some steps in float32 whatever their dtype; within, those are in float64 as well."""
    single, to_single = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = single, to_single


@dataclass
class Leaves:
    """What the edges are derivatives by, (n,), (L, P, D), (P, D)."""

    activations: Tensor
    errors: Tensor
    tokens: Tensor


@dataclass
class Traced:
    """
    A run of the model with its MLPs' outputs made of leaves.

    Args:
        features (`Tensor` of shape `(n, 3)`): Layer, position, feature of what is active.
        pre_activations (`Tensor` of shape `(n,)`): With b_enc.
        logits (`Tensor` of shape `(P, V)`): Of the head, without its bias, before a softcap.
        leaves ([`Leaves`]): With gradients.
    """

    features: Tensor
    pre_activations: Tensor
    logits: Tensor
    leaves: Leaves

    def edges(self, tokens: list[tuple[int, int | None, int]]) -> Tensor:
        """A, (n + m, n + L·P + P), of all features and of targets (token, other token or None for all, position)."""
        targets = torch.cat([self.pre_activations, self.targets(tokens)])
        leaves = [self.leaves.activations, self.leaves.errors, self.leaves.tokens]
        found = torch.autograd.grad(
            targets, leaves, torch.eye(len(targets), dtype=targets.dtype), is_grads_batched=True, retain_graph=True
        )
        by_feature, by_error, by_token = (gradient * leaf for gradient, leaf in zip(found, leaves, strict=True))
        return torch.cat([by_feature, by_error.sum(-1).flatten(1), by_token.sum(-1)], dim=1).detach()

    def targets(self, tokens: list[tuple[int, int | None, int]]) -> Tensor:
        rows = []
        for token, other, position in tokens:
            at = self.logits[position]
            rows.append(at[token] - (at.mean() if other is None else at[other]))
        return torch.stack(rows)


def norm_forward(module: nn.Module, scales: dict | None):
    """A hook: the output of a norm with its denominator detached, or as `scales` has it; it is put there otherwise."""
    kind = type(module).__name__
    is_centred = kind in ("LayerNorm", "OlmoLayerNorm")
    if not is_centred and not kind.endswith("RMSNorm"):
        return None

    def forward(_, args, output):
        x = args[0]
        x = x - x.mean(dim=-1, keepdim=True) if is_centred else x
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5))
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps).detach()
        scale = scale if scales is None else scales.setdefault(module, scale)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        weight = 1 if weight is None else 1 + weight if kind.startswith("Gemma") else weight
        return x * scale * weight + (0 if bias is None else bias)

    return forward


@contextlib.contextmanager
def held(model: nn.Module, patterns: bool, norms: bool, kept: dict | None):
    """
    Within, attention patterns and norms' denominators are constants for autograd. With a dict `kept` they are what it
    has, and what the first run puts there.
    """

    def attention(module, query, key, value, mask, **options):
        eager = sys.modules[type(module).__module__].eager_attention_forward
        if patterns:
            query, key = query.detach(), key.detach()
        out, pattern = eager(module, query, key, value, mask, **options)
        if kept is None or not patterns:
            return out, pattern
        pattern = kept.setdefault(module, pattern)
        groups = pattern.shape[1] // value.shape[1]
        return (pattern @ value.repeat_interleave(groups, dim=1)).transpose(1, 2), pattern

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    handles = []
    for module in model.modules() if norms else ():
        forward = norm_forward(module, kept)
        if forward is not None:
            # In front of other hooks, which replace what a norm gives.
            handles.append(module.register_forward_hook(forward, prepend=True))
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


def parts_of(model, name: str) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    """Per layer the norm in front of the MLP, the MLP, and the module whose output is added to the stream."""
    _, _, blocks, _, structure, norm = ARCHITECTURES[name]
    found = []
    for block in getattr(model.get_decoder(), blocks):
        adder = block.post_feedforward_layernorm if structure == "post norms" else block.mlp
        found.append((getattr(block, norm), block.mlp, adder))
    return found


def run(model, name: str, ids: Tensor, hooks: tuple, replaced: list | None, tokens: Tensor | None, hold) -> dict:
    """
    One run in which `replaced[layer](read)`, if given, is what features write to in the place of what the model has
    there. Gives `reads`, `writes` (L of (P, D)), `tokens` (P, D), `logits`.
    """
    parts, handles = parts_of(model, name), []
    seen = {"reads": [None] * len(parts), "writes": [None] * len(parts)}

    def watch(module, hook, before=False):
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        handles.append(register(hook))

    for layer, (norm, mlp, adder) in enumerate(parts):
        reader = norm if hooks[0] == "hook_resid_mid" else mlp
        writer = mlp if hooks[1] == "mlp.hook_out" else adder

        def read(_, args, layer=layer):
            seen["reads"][layer] = args[0][0]

        def write(_, args, output, layer=layer):
            if replaced is not None:
                output = replaced[layer](seen["reads"][layer])[None]
            seen["writes"][layer] = output[0]
            return output

        watch(reader, read, before=True)
        watch(writer, write)

    def embed(_, args, output):
        seen["tokens"] = output[0]
        return output if tokens is None else tokens[None]

    head = model.get_output_embeddings()
    watch(model.get_input_embeddings(), embed)
    watch(head, lambda _, args, output: seen.update(logits=output[0] - (0 if head.bias is None else head.bias)))
    try:
        with hold:
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def trace(
    model,
    name: str,
    clt: CrossLayerTranscoder,
    ids: Tensor,
    cleared: list[int],
    patterns: bool = True,
    norms: bool = True,
    kept: dict | None = None,
    changed: Tensor | None = None,
) -> Traced:
    """
    The reference.

    Args:
        patterns, norms: What is held.
        kept: See [`held`].
        changed (`Tensor` of shape `(n,)`): Factors of the activations.
    """
    hooks = clt.config.feature_input_hook, clt.config.feature_output_hook
    with torch.no_grad():
        plain = run(model, name, ids, hooks, None, None, held(model, True, True, kept))
        reads, writes = torch.stack(plain["reads"], dim=1), torch.stack(plain["writes"], dim=1)  # (P, L, D)
        acts = clt.encode(reads)  # (P, L, F)
        acts[cleared] = 0
        errors = (writes - clt.decode(acts, reads)).transpose(0, 1).clone()
        errors[:, cleared] = 0
    features = (acts > 0).transpose(0, 1).nonzero()
    layers, positions, indices = features.unbind(1)
    values = acts[positions, layers, indices]
    leaves = Leaves(values.requires_grad_(), errors.requires_grad_(), plain["tokens"].clone().requires_grad_())
    used = leaves.activations if changed is None else leaves.activations * changed
    place = torch.zeros(len(features), len(errors), *errors.shape[1:], dtype=errors.dtype)  # (n, L, P, D)
    for number, (layer, position, feature) in enumerate(features.tolist()):
        for target in range(layer, min(layer + clt.config.num_targets(layer), len(errors))):
            place[number, target, position] = row_of(clt, layer, target, feature)
    written = torch.einsum("n,nlpd->lpd", used, place)

    def replacement(layer):
        def give(read):
            y = written[layer] + leaves.errors[layer] + clt.decoders[layer].bias
            if clt.config.skip_connection:
                y = y + read @ clt.skips[layer].weight
            keep = torch.ones(len(y), 1, dtype=y.dtype)
            keep[cleared] = 0
            return y * keep + writes[:, layer] * (1 - keep)

        return give

    replaced = [replacement(layer) for layer in range(len(errors))]
    hold = held(model, patterns, norms, kept) if patterns or norms else contextlib.nullcontext()
    seen = run(model, name, ids, hooks, replaced, leaves.tokens, hold)
    read = torch.stack(seen["reads"])
    weight = torch.stack([encoder.weight for encoder in clt.encoders])[layers, indices]
    bias = torch.stack([encoder.bias for encoder in clt.encoders])[layers, indices]
    pre_activations = (weight * read[layers, positions]).sum(1) + bias
    return Traced(features, pre_activations, seen["logits"], leaves)


def row_of(clt: CrossLayerTranscoder, layer: int, target: int, feature: int) -> Tensor:
    """W_dec of a feature of one layer to one target layer, (D,), as docs/file_format.md has it for each tying."""
    if clt.config.decoder_tying == "per_source":
        return clt.decoders[layer].weight[feature, 0]
    if clt.config.decoder_tying == "per_target":
        return clt.decoders[target].weight[feature, 0]
    return clt.decoders[layer].weight[feature, target - layer]
