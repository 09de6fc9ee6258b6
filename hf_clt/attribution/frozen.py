"""
The frozen model: a language model on one prompt, with everything that is not linear held at the value it had there
(Ameisen et al. 2025, "Circuit Tracing", Methods): attention patterns, the scale of every norm, what the MLPs write.

What remains is linear. With x_l the residual stream before block l, N the norms without their biases, and A^h the
pattern of head h:

    O_l(u)[p] = Σ_h W_O^h Σ_q A^h[p, q] W_V^kv(h) u[q]
    m_l = x_l + O_l(N_1 x_l) + constants        x_(l+1) = m_l + y_l, y_l what the MLP adds
    parallel blocks: m_l = x_l is what the MLP reads, and x_(l+1) = x_l + O_l(N_1 x_l) + y_l + constants

No architecture is ported. Where each map is, is found by comparing what the modules were given and gave on this very
prompt, and every step is then compared with what the model computed ([`check_steps`]).
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from ..harvest.harvester import check_context_size
from ..harvest.sites import resolve_sites


ATTENTION = "hf_clt"  # the name of our attention functions
# Of the norm of what a step adds, and of the stream it is added to; by the model's number format.
STEP_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class FreezingError(ValueError):
    """The language model cannot be written as a linear one on this prompt; the message says where."""


@dataclass(frozen=True)
class Norm:
    """y[p] = (x[p] - mean x[p], where `centred`) · scale[p] · gain + bias, the scale held at the prompt's."""

    gain: Tensor  # (D,)
    bias: Tensor  # (D,)
    scale: Tensor  # (P, 1)
    centred: bool

    def linear(self, x: Tensor) -> Tensor:
        """N x, (..., P, D) at the first P positions."""
        x = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        return x * self.scale[: x.shape[-2]] * self.gain

    def transposed(self, r: Tensor) -> Tensor:
        """Nᵀ r, (..., P, D)."""
        r = r * self.scale[: r.shape[-2]] * self.gain
        return r - r.mean(dim=-1, keepdim=True) if self.centred else r

    def at(self, positions: Tensor) -> "Norm":
        """The same at chosen positions, one for each row (B, D) that it is given."""
        return replace(self, scale=self.scale[positions])


@dataclass(frozen=True)
class Attention:
    """O_l and the norm behind it, where there is one."""

    pattern: Tensor  # (H, P, P), rows are where attention looks from
    value: Tensor  # (K · d_head, D), K key-value heads
    value_bias: Tensor | None  # (K · d_head,)
    output: Tensor  # (D, H · d_head)
    output_bias: Tensor | None  # (D,)
    post: Norm | None

    def by_head(self, u: Tensor, with_bias: bool = False) -> Tensor:
        """What each head takes from where it looks: (..., P, D) to (..., P, H, d_head), before W_O."""
        bias = self.value_bias if with_bias else None
        value = nn.functional.linear(u, self.value, bias).unflatten(-1, (-1, self.head_size))
        value = value.repeat_interleave(self.num_heads // value.shape[-2], dim=-2)
        length = u.shape[-2]
        return torch.einsum("hpq,...qhe->...phe", self.pattern[:, :length, :length], value)

    def linear(self, u: Tensor, with_bias: bool = False) -> Tensor:
        """O_l(u), (..., P, D); with the biases of values and output on demand."""
        bias = self.output_bias if with_bias else None
        out = nn.functional.linear(self.by_head(u, with_bias).flatten(-2), self.output, bias)
        if self.post is None:
            return out
        return self.post.linear(out) + (self.post.bias if with_bias else 0)

    def transposed(self, r: Tensor) -> Tensor:
        """O_lᵀ r, (B, P, D)."""
        batch, length, _ = r.shape
        r = r if self.post is None else self.post.transposed(r)
        r = (r @ self.output).view(batch, length, self.num_heads, self.head_size)
        # By head, so that each is one matrix product over all rows: (H, Q, P) with (H, P, B · d_head).
        r = r.permute(2, 1, 0, 3).reshape(self.num_heads, length, -1)
        r = self.pattern[:, :length, :length].transpose(1, 2) @ r
        num_kv = len(self.value) // self.head_size
        r = r.view(num_kv, self.num_heads // num_kv, length, batch, self.head_size).sum(dim=1)
        return r.permute(2, 1, 0, 3).flatten(2) @ self.value

    @property
    def num_heads(self) -> int:
        return len(self.pattern)

    @property
    def head_size(self) -> int:
        return self.output.shape[1] // len(self.pattern)


@dataclass(frozen=True)
class Block:
    """One layer on the prompt; streams (P, D)."""

    start: Tensor  # x_l
    stream: Tensor  # m_l, from which the MLP reads
    read: Tensor  # what features read: m_l, or behind the norm
    written: Tensor  # what features write to: what the MLP adds, or its output in front of a norm
    added: Tensor  # what the MLP adds
    end: Tensor  # x_(l+1)
    is_parallel: bool
    pre: Norm  # N_1, in front of the attention
    attention: Attention
    read_norm: Norm | None  # N_2, where features read behind it
    post: Norm | None  # behind the MLP, where features write in front of it
    constant: Tensor  # (P, D): what the attention adds because of biases alone


@dataclass(frozen=True)
class FrozenModel:
    """
    A language model on one prompt of P tokens.

    Args:
        input_ids (`Tensor` of shape `(P,)`): The prompt.
        blocks (`list[Block]`): L layers.
        tokens, positions (`Tensor` of shape `(P, D)`): What the embeddings of tokens and of positions give.
        final (`Norm`): In front of the head.
        unembedding (`Tensor` of shape `(V, D)`): W_U.
        head_bias (`Tensor` of shape `(V,)`, *optional*): Of the head; it is in no row.
        logits (`Tensor` of shape `(P, V)`): What the model gave, softcap included.
        error (`float`): The largest error of a step, as a share of the stream's norm, see [`check_steps`].
        norms (`list[tuple[Module, Norm]]`): The model's norms on the paths.
        writers (`list[Module]`): The modules whose output is what the CLT reconstructs, layer by layer.
    """

    input_ids: Tensor
    blocks: list[Block]
    tokens: Tensor
    positions: Tensor
    final: Norm
    unembedding: Tensor
    head_bias: Tensor | None
    logits: Tensor
    error: float
    norms: list[tuple[nn.Module, Norm]]
    writers: list[nn.Module]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def rebuilt_logits(self) -> Tensor:
        """What the head gives, before a softcap, from embeddings and MLP outputs through the linear maps, (P, V)."""
        return nn.functional.linear(self.rebuilt_stream(), self.unembedding, self.head_bias)

    def rebuilt_stream(self) -> Tensor:
        """What the head reads, from embeddings and MLP outputs through the linear maps, (P, D)."""
        x = self.tokens + self.positions
        for block in self.blocks:
            x = x + block.attention.linear(block.pre.linear(x)) + block.constant + block.added
        return self.final.linear(x) + self.final.bias


# -- recording --------------------------------------------------------------------------------------------------------


def _recorded_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options):
    """The eager attention of the module's own family, whose values, pattern and result are kept on the module."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise FreezingError(f"{type(module).__name__} has no eager_attention_forward; use a model of another family")
    out, pattern = eager(module, query, key, value, mask, **options)
    module.hf_clt_recorded = value[0], pattern[0], out[0]
    return out, pattern


@contextmanager
def attending_by(model: PreTrainedModel, attend: Callable) -> Iterator[None]:
    """Within, the model attends by a function of transformers' attention interface."""
    # Without a mask function of the same name there would be no causal mask.
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def run_recorded(
    model: PreTrainedModel, input_ids: Tensor, watched: list[nn.Module], then: dict[nn.Module, Callable]
) -> tuple[dict, Tensor]:
    """
    One forward pass over a prompt (P,): what each watched module was given and gave, without the batch dimension, and
    the logits (P, V). A module of `then` has its function called, with these records, when it is through; what it
    records of attention, its values, pattern and result, is on the attention module by then, in `hf_clt_recorded`.
    """
    seen = {}

    def keep(module, args, kwargs, output):
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_ids"))
        output = output[0] if isinstance(output, tuple) else output
        if torch.is_tensor(given) and torch.is_tensor(output):
            seen[module] = given.detach()[0].clone(), output.detach()[0].clone()  # streams may be added to in place
            if module in then:
                then[module](seen)

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in dict.fromkeys(watched)]
    arguments = {"input_ids": input_ids[None]}
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        arguments["use_cache"] = False
    try:
        with attending_by(model, _recorded_attention):
            logits = model(**arguments).logits[0]
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            vars(module).pop("hf_clt_recorded", None)
    return seen, logits


def freeze(
    model: PreTrainedModel,
    input_ids: Tensor,
    input_hook: str = "hook_resid_mid",
    output_hook: str = "hook_mlp_out",
    dtype: torch.dtype = torch.float32,
) -> FrozenModel:
    """
    Runs a language model once and freezes it.

    Args:
        model (`PreTrainedModel`): A causal language model with its head, in eval mode.
        input_ids (`Tensor` of shape `(1, P)` or `(P,)`): The prompt, two tokens or more; nothing is put in front.
        input_hook, output_hook (`str`): What features read and write, see [`resolve_sites`].
        dtype (`torch.dtype`): Format of what is computed from the recorded values.

    Raises:
        FreezingError: If a map is not found, or a step of the linear model is not what the model computed.
        ValueError: For a model in training mode or without head, and for a prompt that does not fit.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model is a {type(model).__name__}, which has no head; load it with AutoModelForCausalLM")
    if model.training:
        raise ValueError("model is in training mode, so dropout changes its activations; call model.eval()")
    input_ids = check_prompt(model, input_ids)
    decoder = model.get_decoder()
    streams, writers = resolve_sites(model, "hook_resid_mid", output_hook)
    mlps = resolve_sites(model, "mlp.hook_in", "mlp.hook_out")[1]
    adders = resolve_sites(model, "hook_resid_mid", "hook_mlp_out")[1]
    blocks = [model.get_submodule(site.path.rpartition(".")[0]) for site in mlps]
    frozen, errors, norms = [], [], {}
    coarser = max((model.dtype, dtype), key=STEP_TOLERANCE.get)

    def norm_of(module: nn.Module, seen: dict, name: str) -> Norm:
        if module not in norms:
            norms[module] = freeze_norm(module, *seen[module], name, dtype)
        return norms[module]

    def finish(layer: int, inner: list[nn.Module], seen: dict) -> None:
        """Freezes one block and forgets its records: those of all blocks together would take much memory."""
        attended = {m: vars(m).pop("hf_clt_recorded") for m in inner if "hf_clt_recorded" in vars(m)}
        get, name = model.get_submodule, f"layer {layer}"
        mlp, adder, reader = get(mlps[layer].path), get(adders[layer].path), get(streams[layer].path)
        found = freeze_block(blocks[layer], mlp, adder, reader, seen, attended, norm_of, name, dtype)
        if input_hook == "mlp.hook_in":
            norm = norm_of(reader, seen, f"{name}, the norm in front of the MLP")
            found = replace(found, read=seen[mlp][0].to(dtype), read_norm=norm)
        if output_hook == "mlp.hook_out" and adder is not mlp:
            norm = norm_of(adder, seen, f"{name}, the norm behind the MLP")
            found = replace(found, written=seen[mlp][1].to(dtype), post=norm)
        errors.append(check_steps(found, name, coarser))
        frozen.append(found)
        for module in inner:
            seen.pop(module, None)

    watched, then = [], {}
    for layer, block in enumerate(blocks):
        mlp = model.get_submodule(mlps[layer].path)
        inside = set(mlp.modules()) - {mlp}  # the widest streams, which nothing is compared with
        inner = [m for m in block.modules() if m not in inside]
        watched += inner
        then[block] = partial(finish, layer, inner)
    watched += [*decoder.children(), *(m for m in decoder.modules() if isinstance(m, nn.Embedding)), head]
    seen, logits = run_recorded(model, input_ids, watched, then)
    if len(frozen) != len(blocks):
        raise FreezingError(
            f"{type(model).__name__}: {len(frozen)} of {len(blocks)} layers were run and gave a tensor"
        )

    tokens, positions = freeze_embeddings(model, seen, frozen[0].start, dtype)
    if frozen[0].start.shape != tokens.shape or head not in seen:
        raise FreezingError(f"{type(model).__name__}: its head or its embedding was not run; it cannot be traced")
    given = seen[head][0]
    last = [m for m in decoder.children() if m in seen and same(seen[m][1], given) and m not in blocks]
    if not last:
        raise FreezingError(f"{type(model).__name__}: no module gives what the head reads; it cannot be traced")
    final = norm_of(last[0], seen, "the norm in front of the head")
    result = FrozenModel(
        input_ids=input_ids,
        blocks=frozen,
        tokens=tokens,
        positions=positions,
        final=final,
        unembedding=head.weight.to(dtype),
        head_bias=None if head.bias is None else head.bias.to(dtype),
        logits=logits.to(dtype),
        error=max(errors),
        norms=list(norms.items()),
        writers=[model.get_submodule(site.path) for site in writers],
    )
    check_logits(result, seen[head][1], coarser)
    return result


def check_prompt(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The prompt as (P,) on the model's device; ValueError if it is none that can be traced."""
    if input_ids.dim() not in (1, 2) or (input_ids.dim() == 2 and len(input_ids) != 1):
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give one prompt, of shape (P,) or (1, P)")
    input_ids = input_ids.reshape(-1).to(model.device)
    if len(input_ids) < 2:
        raise ValueError(f"input_ids has {len(input_ids)} tokens; give two or more, nothing is traced at position 0")
    check_context_size(model.config, len(input_ids))
    known = len(model.get_input_embeddings().weight)
    unknown = input_ids[(input_ids < 0) | (input_ids >= known)].tolist()
    if unknown:
        raise ValueError(
            f"input_ids has token {unknown[0]}, and the model's are 0 to {known - 1}; use the model's own tokenizer"
        )
    return input_ids


def freeze_block(
    block: nn.Module,
    mlp: nn.Module,
    adder: nn.Module,
    reader: nn.Module,
    seen: dict,
    attended: dict,
    norm_of: Callable[[nn.Module, dict, str], Norm],
    name: str,
    dtype: torch.dtype,
) -> Block:
    """One layer, from what its modules were given and gave."""
    start, end = seen[block]
    stream = seen[reader][0]
    attentions = [module for module in block.modules() if module in attended]
    if len(attentions) != 1:
        raise FreezingError(
            f"{name}: {len(attentions)} modules of {type(block).__name__} ran their attention through transformers' "
            "attention interface, where patterns are read, and one is expected; this model cannot be traced"
        )
    (attention,) = attentions
    given, gave = seen[attention]
    value, pattern, taken = attended[attention]
    children = [m for _, m in block.named_children() if m in seen and m not in (attention, mlp)]
    pre = [m for m in children if torch.equal(seen[m][1], given) and torch.equal(seen[m][0], start)]
    if not pre:
        raise FreezingError(f"{name}: no norm of the block's input gives what {type(attention).__name__} reads")
    # A dropout that does nothing reads it as well.
    post = [m for m in children if same(seen[m][0], gave) and not same(seen[m][1], gave)]
    weights = freeze_attention(attention, given, value, taken, seen, name, dtype)
    behind = norm_of(post[0], seen, f"{name}, the norm behind the attention") if post else None
    maps = Attention(pattern=pattern.to(dtype), post=behind, **weights)
    norm = norm_of(pre[0], seen, f"{name}, the norm in front of the attention")
    bias = norm.bias.expand(len(start), -1)
    added = seen[adder][1]
    return Block(
        start=start.to(dtype),
        stream=stream.to(dtype),
        read=stream.to(dtype),
        written=added.to(dtype),
        added=added.to(dtype),
        end=end.to(dtype),
        is_parallel=torch.equal(stream, start),
        pre=norm,
        attention=maps,
        read_norm=None,
        post=None,
        constant=maps.linear(bias, with_bias=True),
    )


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def freeze_norm(module: nn.Module, x: Tensor, y: Tensor, name: str, dtype: torch.dtype) -> Norm:
    """
    A norm at its input (P, D) and output. Gain and bias are what it gives on ±1, whatever its formula (Gemma's gain is
    1 + w); what is left is one number per position, fitted, and the fit says whether it is centred.
    """
    probe = 1.0 - 2.0 * (torch.arange(x.shape[1], device=x.device, dtype=torch.float64) % 2)
    wide = copy.deepcopy(module).double()
    wide._forward_hooks.clear()
    wide._forward_pre_hooks.clear()
    with torch.no_grad():
        plus, minus = wide(probe[None])[0].double(), wide(-probe[None])[0].double()
    bias = (plus + minus) / 2
    best, smallest = None, torch.inf
    for centred in (False, True):
        gain = (plus - minus) / 2 / (probe - probe.mean() * centred)
        linear = x.double() - x.double().mean(dim=1, keepdim=True) * centred
        linear, wanted = linear * gain, y.double() - bias
        scale = (linear * wanted).sum(1, keepdim=True) / linear.square().sum(1, keepdim=True).clamp_min(1e-300)
        error = ((scale * linear - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()
        if error < smallest:
            smallest = error
            best = Norm(gain.to(dtype), bias.to(dtype), scale.to(dtype), centred)
    if not smallest <= STEP_TOLERANCE[x.dtype]:
        raise FreezingError(
            f"{name} ({type(module).__name__}) is no norm with one scale per token: off by {smallest:.1e}"
        )
    return best


def freeze_attention(
    attention: nn.Module, given: Tensor, value: Tensor, taken: Tensor, seen: dict, name: str, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """
    W_V and W_O with their biases: the linear module whose output holds the values (alone, or behind queries and keys,
    or head by head between them), and the one that reads what the heads took.

    Args:
        attention: The attention module; its linear modules were recorded.
        given (`Tensor` of shape `(P, D)`): Its input.
        value (`Tensor` of shape `(K, P, d_head)`), taken (`(P, H, d_head)`): Of the attention function.
    """
    num_kv, length, size = value.shape
    values, heads = value.transpose(0, 1).reshape(length, -1), taken.reshape(length, -1)
    linears = [m for m in attention.modules() if isinstance(m, nn.Linear | Conv1D) and m in seen]
    found = {}
    for module in linears:
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        read, gave = seen[module]
        if "value" not in found and same(read, given):
            width = gave.shape[1]
            places = [torch.arange(width - num_kv * size, width)]
            if width == 3 * num_kv * size:
                places.append(torch.arange(width).view(num_kv, 3, size)[:, 2].flatten())
            for rows in places:
                rows = rows.to(gave.device)
                if same(gave[:, rows], values):
                    found["value"] = weight[rows].to(dtype)
                    found["value_bias"] = None if module.bias is None else module.bias[rows].to(dtype)
                    break
        if "output" not in found and same(read, heads):
            found["output"] = weight.to(dtype)
            found["output_bias"] = None if module.bias is None else module.bias.to(dtype)
    for part, what in (("value", "gives the values"), ("output", "reads what the heads take")):
        if part not in found:
            raise FreezingError(f"{name}: no linear module of {type(attention).__name__} {what}")
    return found


def freeze_embeddings(model: PreTrainedModel, seen: dict, start: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What tokens and positions bring into the first layer: its input is a multiple of one embedding, or a sum."""
    embedding = model.get_input_embeddings()
    if embedding not in seen:
        raise FreezingError(f"{type(model).__name__}: its embedding was not run on token ids; it cannot be traced")
    tokens = seen[embedding][1].to(dtype)
    factor = (tokens * start).sum() / tokens.square().sum()
    tolerance = max(STEP_TOLERANCE[model.dtype], STEP_TOLERANCE[dtype])
    if (factor * tokens - start).norm() <= tolerance * start.norm():
        return start, torch.zeros_like(start)
    others = [m for m in seen if isinstance(m, nn.Embedding) and m is not embedding]
    for other in others:
        positions = seen[other][1].to(dtype)
        if positions.shape == start.shape and (tokens + positions - start).norm() <= tolerance * start.norm():
            return tokens, positions
    raise FreezingError(f"{type(model).__name__}: the first layer reads more than embeddings of tokens and positions")


# -- is it the model --------------------------------------------------------------------------------------------------


def check_steps(block: Block, name: str, dtype: torch.dtype) -> float:
    """
    The largest error of what attention and MLP add, and of what features read, computed through the maps, against the
    recorded streams; as a share of the norm of the stream.

    Raises:
        FreezingError: If one is more of what is added than the rounding of the model's number format `dtype` explains.
    """
    attended = block.attention.linear(block.pre.linear(block.start)) + block.constant
    wanted = block.end - block.start - block.added if block.is_parallel else block.stream - block.start
    written = block.written if block.post is None else block.post.linear(block.written) + block.post.bias
    behind = block.start + wanted if block.is_parallel else block.stream
    read = block.stream if block.read_norm is None else block.read_norm.linear(block.stream) + block.read_norm.bias
    largest, tolerance = 0.0, STEP_TOLERANCE[dtype]
    for what, found, expected, stream in (
        ("attention", attended, wanted, block.end),
        ("what the MLP adds", written, block.end - behind, block.end),
        ("what features read", read, block.read, block.read),
    ):
        off, whole = (found - expected).norm(), stream.norm().clamp_min(1e-30)
        rounding = 4 * torch.finfo(dtype).eps * whole
        error = (off - rounding).clamp_min(0) / expected.norm().clamp_min(1e-30)
        largest = max(largest, (off / whole).item())
        if not error <= tolerance:
            raise FreezingError(
                f"{name}: {what} is off by {error:.1e} of its norm when computed through the linear maps; this "
                "architecture does something that is not known here"
            )
    return largest


def check_logits(frozen: FrozenModel, logits: Tensor, dtype: torch.dtype) -> None:
    """Raises [`FreezingError`] if the logits that the linear model gives are not what the head gave, (P, V)."""
    off = []
    for x, expected in zip(frozen.rebuilt_stream().split(64), logits.split(64), strict=True):  # a vocabulary is large
        off.append((nn.functional.linear(x, frozen.unembedding, frozen.head_bias) - expected).abs().max())
    error = (torch.stack(off).max() / logits.abs().max().clamp_min(1e-30)).item()
    if not error <= 10 * STEP_TOLERANCE[dtype]:
        raise FreezingError(f"the logits are off by {error:.1e} of the largest when computed through the linear maps")


__all__ = ["Attention", "Block", "FreezingError", "FrozenModel", "Norm", "freeze", "freeze_norm", "run_recorded"]
