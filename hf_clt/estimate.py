"""
What a training run needs, on paper: memory of each process, and time per update, from the shapes alone.

Memory is counted: the parameters are those of the model itself, built without storage. Time is work divided by rates,
of which there are two kinds: measured on a machine (`python -m benchmarks.calibrate`), or taken from a device's data
sheet with an assumed share of it that a program reaches ([`DEVICES`]); a table says which of them it is made of.

L layers, F features per layer, D the width, n processes that share the features of a CLT, N tokens of each process;
all n work on the same n·N tokens, each with F / n features. J_s is the number of target layers of source layer s.
"""

from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_clt import TOPK_FAMILY, CLTConfig
from .sharding import FeatureShard
from .training.optimizers import GPU_BLOCK


# Shapes that can be planned with before anything is downloaded, as their authors published them.
LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES = {
    "openai-community/gpt2": {"model_type": "gpt2"},
    "meta-llama/Llama-3.2-1B": LLAMA_3
    | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64}
    | {"intermediate_size": 8192, "tie_word_embeddings": True},
    "google/gemma-2-2b": {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216},
    "meta-llama/Llama-3.1-8B": LLAMA_3
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
}

# From the data sheets: dense products in bfloat16 and float32 (TF32) in operations per second, memory in bytes and
# bytes per second, link between the GPUs of a node and between nodes in bytes per second and direction.
DEVICES = {
    "H100": {"bfloat16": 989e12, "float32": 495e12, "memory": 80e9, "stream": 3.35e12, "link": 450e9, "network": 50e9},
    "H200": {"bfloat16": 989e12, "float32": 495e12, "memory": 141e9, "stream": 4.8e12, "link": 450e9, "network": 50e9},
    "A100": {"bfloat16": 312e12, "float32": 156e12, "memory": 80e9, "stream": 2.04e12, "link": 300e9, "network": 25e9},
}
# Shares of the data sheet that are assumed, for products and for everything else. Not measured.
ASSUMED = {"products": 0.4, "streams": 0.6}
GPUS_PER_NODE = 8
USABLE = 0.92  # of a GPU's memory; the rest goes to its driver, libraries and fragments

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WINDOW = 2.0  # listed entries for each active one, where a jumprelu CLT has most features outside its window


# -- what is planned --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModel:
    """
    What of a language model matters here.

    Args:
        num_layers, d_model: L and D.
        num_parameters: All of them, the head included; it is loaded, if not run.
        flops_per_token: Operations of a forward pass without the head, at the given context size.
        intermediate_size: Width of its MLPs.
    """

    num_layers: int
    d_model: int
    num_parameters: int
    flops_per_token: float
    intermediate_size: int


def read_language_model(name: str, context_size: int) -> LanguageModel:
    """
    The shape of a language model: of [`SHAPES`], or of a Hub name or a folder, of which only `config.json` is read.

    Raises:
        ValueError: If there is no such model.
    """
    try:
        config = AutoConfig.for_model(**SHAPES[name]) if name in SHAPES else AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model={name!r} is not known ({reason}); give a folder, a Hub name, or one of {', '.join(SHAPES)}"
        ) from error
    config = config.get_text_config()
    return LanguageModel(
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        num_parameters=sum(p.numel() for p in model.parameters()),
        flops_per_token=flops_per_token(model, context_size),
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    )


def flops_per_token(model: torch.nn.Module, context_size: int) -> float:
    """
    Operations of a forward pass through a language model's blocks: 2 for each weight, and the attention's two products
    with T / 2 positions on average.
    """
    config = model.config.get_text_config()
    blocks = sum(p.numel() for m in model.modules() if isinstance(m, torch.nn.ModuleList) for p in m.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim * context_size
    return 2 * blocks + attention


@dataclass(frozen=True)
class Plan:
    """
    A run.

    Args:
        config: The CLT.
        language_model: What it is trained on; None: from an activation cache.
        processes: How many GPUs, or processes.
        feature_parallel_size: n.
        batch_size: N.
        l0: Active features per layer and token. For topk and batchtopk it is k.
        listed: Features per layer and token that are computed; None: `l0`, and [`WINDOW`] times as many for jumprelu.
        dead: Share of the features that are dead and revived.
        clt_dtype, model_dtype, buffer_dtype: Number formats.
        product_dtype: That of the encoders' matrix products (mixed precision).
        optimizer: "adam", "adamw" or "adam_compact".
        context_size, prompts, buffer_batches: As `--context-size`, `--store-batch-size-prompts` and
            `--n-batches-in-buffer`.
        buffer_on_device: Whether the buffer lies in the memory that is counted.
    """

    config: CLTConfig
    language_model: LanguageModel | None = None
    processes: int = 1
    feature_parallel_size: int = 1
    batch_size: int = 1024
    l0: float = 32
    listed: float | None = None
    dead: float = 0.0
    clt_dtype: str = "float32"
    model_dtype: str = "bfloat16"
    buffer_dtype: str | None = None
    product_dtype: str = "float32"
    optimizer: str = "adam"
    context_size: int = 128
    prompts: int = 8
    buffer_batches: int = 32
    buffer_on_device: bool = True

    def __post_init__(self):
        for name in ("processes", "feature_parallel_size", "batch_size", "context_size", "prompts", "buffer_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; give a positive number")
        if self.processes % self.feature_parallel_size:
            raise ValueError(
                f"feature_parallel_size={self.feature_parallel_size} does not divide processes={self.processes}; give "
                "a divisor"
            )
        if not 0 < self.l0 <= self.config.num_features:
            raise ValueError(f"l0={self.l0} is outside 0 to num_features={self.config.num_features}")
        if not 0 <= self.dead < 1:
            raise ValueError(f"dead={self.dead} is no share of the features; give 0 to less than 1")
        FeatureShard(0, self.feature_parallel_size).rows(self.config.num_features)

    @property
    def tokens_at_once(self) -> int:
        """n·N: tokens that each process computes features of."""
        return self.batch_size * self.feature_parallel_size

    @property
    def listed_per_layer(self) -> float:
        """Features per layer and token whose value or gradient is computed, over all n processes."""
        if self.listed is not None:
            return self.listed
        factor = WINDOW if self.config.activation_fn == "jumprelu" else 1.0
        return min(factor * self.l0, self.config.num_features)

    @property
    def revived_per_layer(self) -> int:
        """Of topk and batchtopk: dead features per layer and token that are decoded besides, over all n processes."""
        config = self.config
        revives = self.dead > 0 and config.aux_coef > 0 and config.activation_fn in TOPK_FAMILY
        return min(config.aux_k, config.num_features) if revives else 0

    @property
    def pulled(self) -> float:
        """Of relu and jumprelu: the share of the features that the pre-activation loss pulls up."""
        config = self.config
        return self.dead if config.preactivation_coef > 0 and config.activation_fn not in TOPK_FAMILY else 0.0

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of one process, without storage."""
        from .modeling_clt import CrossLayerTranscoder  # --help answers without it

        n = self.feature_parallel_size
        with torch.device("meta"):
            clt = CrossLayerTranscoder(self.config, FeatureShard(0, n) if n > 1 else None)
        clt.cast_decoders(getattr(torch, self.clt_dtype))
        return list(clt.parameters())


# -- memory -----------------------------------------------------------------------------------------------------------


def state_bytes(parameters: list[torch.Tensor], optimizer: str) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state."""
    size = sum(p.numel() * p.element_size() for p in parameters)
    if optimizer == "adam_compact":
        rows = sum(p.numel() * 2 if p.dim() > 1 else p.numel() * 4 for p in parameters)
        state = rows + sum(2 * 4 * len(p) for p in parameters)
    else:
        state = sum(p.numel() * 8 for p in parameters)
    return {"parameters": size, "gradients": size, "optimizer": state}


def memory(plan: Plan) -> dict[str, int]:
    """
    Bytes of one process at the peak of an update, by what they are for, and `total`.

    - `step`: what an update takes besides the gradients, at the worst of three moments. Always 40 bytes for each
      listed entry (its feature, token, value and gradient, and the same in the order of the features) and 4 numbers of
      the size of the batch, (n·N, L, D): inputs, labels, normalised inputs, reconstruction. In the forward pass there
      are no gradients, but 3 numbers of the size of a layer's pre-activations, (n·N, F / n) (themselves, those above
      the threshold, the order in which they are compared), and autocast's copies of the encoders. When the decoders'
      gradients are there, that of the reconstruction stands in place of the encoders'. When all are there, the block
      of weights that adam_compact works on, or Adam in bfloat16.
      Where topk and batchtopk revive dead features, they have aux_k more entries, reconstruct twice as many tokens
      and keep the inputs twice more until the encoders have gradients. relu and jumprelu keep the dead features'
      encoder rows so long, and write the gradient of one layer's encoder twice more.
    - `buffer`: inputs and labels of the tokens that the buffer holds.
    - `harvest`: one extraction batch's activations of all layers, twice (as read, and joined), and its widest
      intermediate values.
    """
    config, n, model = plan.config, plan.feature_parallel_size, plan.language_model
    layers, width = config.num_layers, config.d_model
    row = 2 * layers * width
    batch = 4 * plan.tokens_at_once * layers * width
    entries = 40 * plan.tokens_at_once * layers * (plan.listed_per_layer + plan.revived_per_layer) / n
    pre_activations = 4 * plan.tokens_at_once * config.num_features // n
    encoders = 4 * layers * config.num_features // n * width
    revives = plan.revived_per_layer > 0
    parameters = plan.parameters()
    block = min(GPU_BLOCK, max(p.numel() for p in parameters))
    block *= 4 if plan.optimizer == "adam_compact" else 8 if plan.clt_dtype != "float32" else 0
    in_buffer = plan.buffer_batches * plan.prompts * (plan.context_size - 1)
    buffer_bytes = BYTES[plan.buffer_dtype or plan.model_dtype]
    parts = state_bytes(parameters, plan.optimizer)
    copies = encoders // 2 if plan.product_dtype == "bfloat16" else 0
    moments = {
        "forward": (4 + 3 * revives) * batch + (3 + revives) * pre_activations + copies - parts["gradients"],
        "decoders": (5 + 4 * revives) * batch + plan.pulled * encoders - encoders,
        "all": (4 + revives) * batch + max(2 * encoders // layers if plan.pulled else 0, block),
    }
    parts["step"] = round(max(moments.values()) + entries)
    parts["buffer"] = in_buffer * row * buffer_bytes if plan.buffer_on_device else 0
    parts["language_model"] = parts["harvest"] = 0
    if model is not None:
        model_bytes, positions = BYTES[plan.model_dtype], plan.prompts * plan.context_size
        parts["language_model"] = model.num_parameters * model_bytes
        parts["harvest"] = positions * (2 * row * max(model_bytes, buffer_bytes) + 4 * model.intermediate_size * 4)
    # The optimizer's state is there while the language model runs, the step's temporaries are not, nor the gradients.
    at_rest = sum(parts[name] for name in ("parameters", "optimizer", "buffer", "language_model"))
    parts["total"] = at_rest + max(parts["step"] + parts["gradients"], parts["harvest"])
    return parts


# -- time -------------------------------------------------------------------------------------------------------------


def work(plan: Plan) -> dict[str, float]:
    """
    What one process does in an update, counted.

    - `products`: 2·n·N·(F/n)·D·L operations, the encoders' forward product.
    - `select`: bytes of the pre-activations, n·N·(F/n)·L numbers, in which the active ones are looked for; twice where
      dead ones are looked for as well.
    - `gather`: bytes of the decoder rows of all listed entries, Σ_s n·N·(listed/n)·J_s·D numbers. They are read in the
      forward pass. With dead features, those of topk and batchtopk that are revived count as listed, and the encoder
      rows of those of relu and jumprelu are read.
    - `gather_back`: bytes of rows read in the backward pass for each listed entry: of its decoder for the gradient of
      the activation, of the reconstruction's gradient for that of the decoder, and of the input for that of the
      encoder, Σ_s n·N·(listed/n)·(2·J_s + 1)·D numbers.
    - `norms`: bytes of the decoders, whose norms the sparsity loss needs.
    - `gradients`: bytes of the gradients, which are written; those of the encoders three times more where relu or
      jumprelu revive dead features (zeros, the dead rows, added).
    - `update`: bytes that the optimizer reads and writes: parameter and gradient read, parameter written, state read
      and written.
    - `language_model`: operations for the N tokens that this process harvests.
    - `shared`: bytes that it exchanges with those that share a CLT's features: the activations of their tokens, and
      the sum of the reconstructions.
    - `averaged`: bytes that it exchanges with those that hold the same features: the gradients, averaged.
    """
    config, n = plan.config, plan.feature_parallel_size
    tokens, weight = plan.tokens_at_once, BYTES[plan.clt_dtype]
    targets = sum(config.num_targets(s) for s in range(config.num_layers))
    state = state_bytes(plan.parameters(), plan.optimizer)
    replicas = plan.processes // n
    has_norms = config.activation_fn not in TOPK_FAMILY and config.sparsity_lambda > 0
    batch = tokens * config.num_layers * config.d_model
    batch_bytes = 2 * BYTES[plan.buffer_dtype or plan.model_dtype] + 2 * 4  # gathered; reduced and gathered
    entries = tokens * (plan.listed_per_layer + plan.revived_per_layer) / n
    encoders = 4 * config.num_features / n * config.d_model * config.num_layers
    model = plan.language_model
    return {
        "products": 2 * tokens * config.num_features / n * config.d_model * config.num_layers,
        "select": 4 * tokens * config.num_features / n * config.num_layers * (2 if plan.revived_per_layer else 1),
        "gather": entries * targets * config.d_model * weight + plan.pulled * encoders,
        "gather_back": entries * (2 * targets * weight + config.num_layers * 4) * config.d_model,
        "norms": config.num_features / n * targets * config.d_model * weight if has_norms else 0,
        "gradients": state["gradients"] + (3 * encoders if plan.pulled else 0),
        "update": 3 * state["parameters"] + 2 * state["optimizer"],
        "language_model": 0 if model is None else model.flops_per_token * plan.batch_size,
        "shared": (n - 1) / n * batch * batch_bytes,
        "averaged": 2 * (replicas - 1) / replicas * state["gradients"],
    }


# Which rate each part of the work is done at, in each phase of an update.
PHASES = {
    "forward": {
        "products": "products",
        "select": "select",
        "gather": "gather_forward",
        "norms": "norms_forward",
    },
    "backward": {"gather_back": "gather_backward", "gradients": "gradients", "norms": "norms_backward"},
    "optimizer": {"update": "update"},
    "language model": {"language_model": "language_model"},
    "exchange": {"shared": "shared", "averaged": "averaged"},
}


def seconds(plan: Plan, rates: dict[str, float]) -> dict[str, float]:
    """
    Seconds of an update by phase, one after another, and `total`.

    Args:
        plan: The run.
        rates: Per name in [`PHASES`], operations or bytes per second; inf for what takes no time.
    """
    counts = work(plan)
    spent = {
        phase: sum(counts[name] / rates[rate] for name, rate in parts.items() if counts[name])
        for phase, parts in PHASES.items()
    }
    return spent | {"total": sum(spent.values())}


def data_sheet_rates(device: str, plan: Plan) -> dict[str, float]:
    """The rates of a device of [`DEVICES`], as assumed: modelled, not measured."""
    sheet = DEVICES[device]
    stream = ASSUMED["streams"] * sheet["stream"]

    def link(processes):
        return ASSUMED["streams"] * (sheet["link"] if processes <= GPUS_PER_NODE else sheet["network"])

    return {
        "products": ASSUMED["products"] * sheet[plan.product_dtype],
        "select": stream / 2,  # written and read
        "gather_forward": stream,  # as if no cache kept a row
        "gather_backward": stream,
        "norms_forward": stream,
        "norms_backward": stream / 3,  # decoders and gradients read, gradients written
        "gradients": stream,
        "update": stream,
        "language_model": ASSUMED["products"] * sheet[plan.model_dtype],
        "shared": link(plan.feature_parallel_size),  # consecutive processes, so on one node if they fit there
        "averaged": link(plan.processes),
    }


# -- what fits --------------------------------------------------------------------------------------------------------


def smallest_that_fits(plan: Plan, available: float, tokens_at_once: int | None = None) -> Plan | None:
    """
    The plan with the fewest processes per CLT, a power of two of them, that fits into `available` bytes each; None if
    none does.

    Args:
        plan: The run.
        available: Bytes of a process.
        tokens_at_once: n·N to keep, by a smaller N for a larger n; None: N is kept.
    """
    n = 1
    while n <= plan.processes:
        if plan.processes % n == 0 and plan.config.num_features % n == 0:
            batch_size = plan.batch_size if tokens_at_once is None else max(1, tokens_at_once // n)
            wider = replace(plan, feature_parallel_size=n, batch_size=batch_size)
            if memory(wider)["total"] <= available:
                return wider
        n *= 2
    return None


def format_plan(plan: Plan, rates: dict[str, float], tokens: float | None = None) -> str:
    """
    What a plan needs, as plain text: memory of a process by part, time of an update by phase, time for `tokens`. All
    of it without dead features; then memory and time with those of the plan.
    """
    with_dead, plan = plan, replace(plan, dead=0.0)
    sizes, spent = memory(plan), seconds(plan, rates)
    n, config = plan.feature_parallel_size, plan.config
    count = sum(p.numel() for p in plan.parameters())
    lines = [
        f"CLT: {config.num_layers} layers, width {config.d_model}, {config.num_features:,} features per layer, "
        f"{config.activation_fn}, {plan.l0:g} active per layer and token",
        f"{plan.processes} {'process' if plan.processes == 1 else 'processes'}, a CLT on {n} of them: "
        f"{count / 1e9:.3g} billion weights each, {plan.batch_size * plan.processes:,} tokens per update",
        "",
        "memory of each process",
    ]
    for name, size in sizes.items():
        lines.append(f"  {name.replace('_', ' '):<16}{gigabytes(size):>12}")
    lines += ["", "time of an update"]
    for phase, value in spent.items():
        if value:
            lines.append(f"  {phase:<16}{value * 1000:>9,.1f} ms")
    speed = plan.batch_size * plan.processes / spent["total"]
    lines += ["", f"{speed:,.0f} tokens per second"]
    if tokens is not None:
        lines[-1] += f", {tokens / speed / 3600:,.1f} hours for {tokens:,.0f} tokens"
    if with_dead.dead:
        size, time = memory(with_dead)["total"], seconds(with_dead, rates)["total"]
        lines.append(
            f"with {with_dead.dead:.0%} of the features dead and revived: {gigabytes(size)} "
            f"({size / sizes['total'] - 1:+.1%}), an update {time * 1000:,.1f} ms ({time / spent['total'] - 1:+.1%})"
        )
    return "\n".join(lines)


def format_scale(plans: dict[str, list[tuple[int, Plan | None]]], device: str, tokens: float) -> str:
    """
    A Markdown table of plans on a device of [`DEVICES`].

    Args:
        plans: Per title, the number of GPUs and the plan for it, None where nothing fits.
        device: The device.
        tokens: For which the hours are given.
    """
    lines = ["| | GPUs | per CLT | tokens of each | memory of each | an update | of it exchange | tokens/s | hours |"]
    lines.append("|" + "---|" * 9)
    for title, found in plans.items():
        for gpus, plan in found:
            if plan is None:
                lines.append(f"| {title} | {gpus} | does not fit | | | | | | |")
                continue
            spent = seconds(plan, data_sheet_rates(device, plan))
            speed = plan.batch_size * plan.processes / spent["total"]
            cells = [title, gpus, plan.feature_parallel_size, f"{plan.batch_size:,}"]
            cells += [gigabytes(memory(plan)["total"])]
            cells += [f"{spent['total'] * 1000:,.0f} ms", f"{spent['exchange'] / spent['total']:.0%}"]
            cells += [f"{speed:,.0f}", f"{tokens / speed / 3600:,.1f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


__all__ = [
    "ASSUMED",
    "DEVICES",
    "SHAPES",
    "LanguageModel",
    "Plan",
    "data_sheet_rates",
    "flops_per_token",
    "format_plan",
    "format_scale",
    "memory",
    "read_language_model",
    "seconds",
    "smallest_that_fits",
    "work",
]
