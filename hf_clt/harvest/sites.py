"""Where each architecture's MLP activations are: what a hook name means, as the input or output of a module.

| hook | meaning |
|---|---|
| `hook_resid_mid` | the residual stream before the pre-MLP norm; in parallel-residual models the block's input |
| `mlp.hook_in` | the MLP module's input |
| `mlp.hook_out` | the MLP module's output |
| `hook_mlp_out` | what the MLP adds to the residual stream: its output, or that of the norm behind it |

Known architectures are in `LAYOUTS`. Any other is run once on four tokens, and accepted if exactly one reading of its
modules satisfies the definitions above numerically.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_clt import FEATURE_INPUT_HOOKS, FEATURE_OUTPUT_HOOKS


@dataclass(frozen=True)
class Site:
    """A place where activations are read."""

    path: str  # of a module from the model's root, e.g. "transformer.h.0.mlp"
    io: Literal["input", "output"]


@dataclass(frozen=True)
class Layout:
    """The modules that matter, by name."""

    layers: str  # the list of blocks, in the text decoder
    mlp: str  # the MLP, in a block
    pre_norm: str  # the norm in front of the MLP, in a block; its input is the residual stream
    post_norm: str | None = None  # the norm behind the MLP, whose output is then added instead of the MLP's


LLAMA_LAYOUT = Layout("layers", "mlp", "post_attention_layernorm")
GEMMA_LAYOUT = Layout("layers", "mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm")

LAYOUTS = {
    "gpt2": Layout("h", "mlp", "ln_2"),
    # With `use_parallel_residual` this norm reads the block's input, without it the stream after the attention.
    "gpt_neox": Layout("layers", "mlp", "post_attention_layernorm"),
    "llama": LLAMA_LAYOUT,
    "mistral": LLAMA_LAYOUT,
    "qwen2": LLAMA_LAYOUT,
    "qwen3": LLAMA_LAYOUT,
    "gemma": LLAMA_LAYOUT,
    "gemma2": GEMMA_LAYOUT,
    "gemma3_text": GEMMA_LAYOUT,
    # Parallel: one norm, of the block's input, feeds attention and MLP.
    "phi": Layout("layers", "mlp", "input_layernorm"),
    "phi3": LLAMA_LAYOUT,
}

# What the MLP of a block is called in the architectures that are resolved by inspection.
MLP_NAMES = ("mlp", "feed_forward", "ffn")


def default_hooks(model_type: str) -> tuple[str, str]:
    """Input hook and output hook that a CLT of this architecture (`config.model_type`) has unless told otherwise."""
    if model_type == "qwen3":
        return "mlp.hook_in", "mlp.hook_out"
    return "hook_resid_mid", "hook_mlp_out"


def check_hooks(input_hook: str, output_hook: str) -> None:
    """Raises ValueError if a hook is unknown, or an output is named where an input belongs."""
    for field, hook, known in [
        ("feature_input_hook", input_hook, FEATURE_INPUT_HOOKS),
        ("feature_output_hook", output_hook, FEATURE_OUTPUT_HOOKS),
    ]:
        if hook not in known:
            raise ValueError(
                f"{field} is {hook!r}: inputs are {' and '.join(FEATURE_INPUT_HOOKS)}, "
                f"outputs are {' and '.join(FEATURE_OUTPUT_HOOKS)}."
            )


def resolve_sites(model: PreTrainedModel, input_hook: str, output_hook: str) -> tuple[list[Site], list[Site]]:
    """
    Finds the modules that two hook names mean in a language model.

    Args:
        model: The language model, with or without its head. An architecture that is not in `LAYOUTS` is run once on
            four tokens and must be in eval mode.
        input_hook: What features read: `"hook_resid_mid"` or `"mlp.hook_in"`.
        output_hook: What is reconstructed: `"hook_mlp_out"` or `"mlp.hook_out"`.

    Returns:
        The L input sites and the L output sites. Within a layer the input comes first in the order of computation.

    Raises:
        ValueError: If a hook is unknown, or the modules cannot be told apart (the message says what was found).
    """
    check_hooks(input_hook, output_hook)
    config = model.config.get_text_config()
    decoder = model.get_decoder()
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        layout = inspect_layout(decoder, config)
    root = next(path for path, module in model.named_modules() if module is decoder)
    blocks = f"{root}.{layout.layers}" if root else layout.layers

    def sites(hook):
        name, io = {
            "hook_resid_mid": (layout.pre_norm, "input"),
            "mlp.hook_in": (layout.mlp, "input"),
            "mlp.hook_out": (layout.mlp, "output"),
            "hook_mlp_out": (layout.post_norm or layout.mlp, "output"),
        }[hook]
        return [Site(f"{blocks}.{layer}.{name}", io) for layer in range(config.num_hidden_layers)]

    return sites(input_hook), sites(output_hook)


def inspect_layout(decoder: PreTrainedModel, config: PreTrainedConfig) -> Layout:
    """
    Finds the layout of an unknown architecture: by name which modules are the MLPs, by the numbers of one forward pass
    which norm is in front of them and what is added to the residual stream.

    In every block, with `x` the input of the norm and `y` what is added, the block's output must be `x + y`, or, in
    parallel-residual models, `x + y` plus the output of one more of its children (the attention).

    Args:
        decoder: The text decoder, without head, in eval mode.
        config: Its config.

    Raises:
        ValueError: If no layout fits, or more than one; the message says what was found.
    """
    refusal = f"the architecture {config.model_type!r} is not known, and its MLPs cannot be found by inspection: "
    remedy = (
        f". Use a model of one of the types {', '.join(LAYOUTS)}, or add a row to LAYOUTS in hf_clt/harvest/sites.py."
    )
    if decoder.training:
        raise ValueError(f"{refusal}the model is in training mode, which makes its outputs random. Call model.eval().")

    lists, found = [], []
    for path, module in decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers:
            names = [[name for name, _ in block.named_children() if name in MLP_NAMES] for block in module]
            found.append(f"{path!r} of {type(module[0]).__name__}")
            if len(names[0]) == 1 and all(other == names[0] for other in names):
                lists.append((path, names[0][0]))
    if len(lists) != 1:
        raise ValueError(
            f"{refusal}of the lists of {config.num_hidden_layers} modules ({', '.join(found) or 'there is none'}), "
            f"{len(lists)} have exactly one child called {' or '.join(MLP_NAMES)} in each module{remedy}"
        )
    layers, mlp = lists[0]
    blocks = decoder.get_submodule(layers)
    readings = _record(decoder, blocks, mlp)

    in_each = [_fitting_names(block, mlp, readings) for block in blocks]
    fitting = [pair for pair in in_each[0] if all(pair in others for others in in_each)]
    # Behind an identity (a dropout) the MLP's output is found twice; the first is nearest to the MLP.
    norms = list(dict.fromkeys(norm for norm, _ in fitting))
    if len(norms) != 1:
        children = ", ".join(name for name, _ in blocks[0].named_children())
        raise ValueError(
            f"{refusal}in the blocks {layers!r} ({type(blocks[0]).__name__} with {children}), {len(norms)} modules "
            f"are a norm whose input plus the MLP's output makes the block's output{remedy}"
        )
    post_norm = fitting[0][1]
    return Layout(layers, mlp, norms[0], None if post_norm == mlp else post_norm)


def _record(decoder: PreTrainedModel, blocks: torch.nn.ModuleList, mlp: str) -> dict:
    """One forward pass over four tokens: module -> (input, output) of the blocks and their children, as tensors."""
    readings = {}
    mlps = {getattr(block, mlp) for block in blocks}

    def record(module, args, kwargs, output):
        first = args[0] if args else next(iter(kwargs.values()), None)
        # blocks and attentions may return more; of an MLP the output itself is read, and must be a tensor
        if isinstance(output, tuple) and module not in mlps:
            output = output[0]
        if torch.is_tensor(first) and torch.is_tensor(output):
            readings[module] = first.clone(), output.clone()  # the residual stream may be added to in place

    watched = [module for block in blocks for module in [block, *block.children()]]
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in watched]
    embeddings = decoder.get_input_embeddings().weight
    tokens = torch.arange(4, device=embeddings.device)[None] % len(embeddings)
    try:
        with torch.no_grad():
            decoder(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    return readings


def _fitting_names(block: torch.nn.Module, mlp: str, readings: dict) -> list[tuple[str, str]]:
    """The pairs of children (norm in front of the MLP, module whose output is added) that fit a block's numbers."""
    children = {name: readings[child] for name, child in block.named_children() if child in readings}
    if block not in readings or mlp not in children:
        return []
    _, block_out = readings[block]
    mlp_in, mlp_out = children[mlp]
    fitting = []
    for norm, (stream, normed) in children.items():
        if norm == mlp or not _equal(normed, mlp_in) or _equal(normed, stream):
            continue
        behind = [name for name, (read, _) in children.items() if name not in (mlp, norm) and _equal(read, mlp_out)]
        for name in [mlp, *behind]:
            parts = [stream, children[name][1]]
            others = [out for other, (_, out) in children.items() if other not in (mlp, norm, name, *behind)]
            if _is_sum(block_out, parts) or any(_is_sum(block_out, [*parts, other]) for other in others):
                fitting.append((norm, name))
    return fitting


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _is_sum(total: Tensor, parts: list[Tensor]) -> bool:
    """Whether a tensor is the sum of others, up to the rounding of their dtype."""
    if any(part.shape != total.shape for part in parts):
        return False
    parts = [part.double() for part in parts]
    slack = 4 * torch.finfo(total.dtype).eps * sum(part.abs() for part in parts)
    return bool(((total.double() - sum(parts)).abs() <= slack).all())
