"""
What a training run needs, on paper: memory of each process, and time per update, from the shapes alone.

Memory is counted: the parameters are those of the model itself, built without storage. Time is work divided by rates,
which are measured on a machine (`python -m benchmarks.calibrate`) or taken from a device's data sheet, with an assumed
share of it that a program reaches ([`DEVICES`]).

L layers, F features per layer, D the width, n processes that share the features of a CLT, N tokens of each process;
all n work on the same n·N tokens, each with F / n features. J_s is the number of target layers of source layer s.
"""

import math
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_clt import TOPK_FAMILY, CLTConfig
from .files import one_line
from .sharding import FeatureShard


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
# bytes per second, link between the GPUs of a node and between nodes in bytes per second and direction. Not from there
# `cache`, bytes per second of gathers that mostly come from the L2 cache: of an H200 near the best that its kernels
# reached (5.4 to 8.8 TB/s, benchmarks/README.md); of the others assumed.
DEVICES = {
    "H100": {"bfloat16": 989e12, "float32": 495e12, "memory": 80e9, "stream": 3.35e12, "cache": 5.5e12}
    | {"link": 450e9, "network": 50e9},
    "H200": {"bfloat16": 989e12, "float32": 495e12, "memory": 141e9, "stream": 4.8e12, "cache": 8.5e12}
    | {"link": 450e9, "network": 50e9},
    "A100": {"bfloat16": 312e12, "float32": 156e12, "memory": 80e9, "stream": 2.04e12, "cache": 3e12}
    | {"link": 300e9, "network": 25e9},
}
# Shares of the data sheet that are assumed, of products and of all else, chosen before anything was measured. On an
# H200 single kernels reached 67 and 88 %; updates took from 17 % less to 14 % more than estimated (docs/scale.md).
ASSUMED = {"products": 0.4, "streams": 0.6}
GPUS_PER_NODE = 8
USABLE = 0.92  # of a GPU's memory; the rest goes to its driver, libraries and fragments

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# As `kernels/decode.py`, `kernels/triton_layers.py` and `modeling_clt.py` have them, which --help answers without:
# readings of a feature's decoder row above which it is rounded first, bytes of a tile of columns, bytes of
# pre-activations that are there at once.
ROUND_ABOVE, POSTING_BYTES, DOTS_BYTES, ENCODED_BYTES = 8, 1024, 2**31, 4 * 2**30
WINDOW = 2.0  # listed entries for each active one, where a jumprelu CLT has most features outside its window


# -- what is planned --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModel:
    """What matters here of a language model."""

    num_layers: int  # L
    d_model: int  # D
    num_parameters: int  # with the head, which is loaded, if not run
    flops_per_token: float  # of a forward pass without the head, at the given context size
    intermediate_size: int  # width of its MLPs


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
        raise ValueError(
            f"model={name!r} is not known ({one_line(error, 200)}); give a folder, a Hub name, or one of "
            f"{', '.join(SHAPES)}"
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
    """A run. Fields without a comment are those of [`CLTTrainingArguments`]."""

    config: CLTConfig
    language_model: LanguageModel | None = None  # None: from an activation cache
    processes: int = 1  # GPUs, or processes
    feature_parallel_size: int = 1  # n
    batch_size: int = 1024  # N
    l0: float = 32  # active features per layer and token; for topk and batchtopk it is k
    listed: float | None = None  # features per layer and token that are computed; None: l0, for jumprelu WINDOW times
    dead: float = 0.0  # share of the features that are dead and revived
    clt_dtype: str = "float32"
    model_dtype: str = "bfloat16"
    buffer_dtype: str | None = None  # None: as the model
    product_dtype: str = "float32"  # of the encoders' matrix products (mixed precision)
    optimizer: str = "adam"
    context_size: int = 128
    prompts: int = 8  # store_batch_size_prompts
    buffer_batches: int = 32  # n_batches_in_buffer
    buffer_on_device: bool = True  # whether the buffer lies in the memory that is counted
    on_gpu: bool = False  # where all layers are worked on at once, if they can be

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
    def layers_together(self) -> bool:
        """Whether all layers are worked on at once: on a GPU, unless they share a budget, a decoder or a group."""
        config = self.config
        alone = self.feature_parallel_size > 1 or config.k_scope == "token" or config.decoder_tying == "per_target"
        return self.on_gpu and not alone and config.num_layers > 1

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
    """Bytes of parameters, gradients and optimizer state: two float32 for each weight, or the compact form."""
    size = sum(p.numel() * p.element_size() for p in parameters)
    state = 8 * sum(p.numel() for p in parameters)
    if optimizer == "adam_compact":
        state = sum(p.numel() * (2 if p.dim() > 1 else 4) + 2 * 4 * len(p) for p in parameters)
    return {"parameters": size, "gradients": size, "optimizer": state}


def encoding_bytes(plan: Plan, batch: int, encoders: int, revives: bool) -> float:
    """
    Bytes at the end of encoding, beside parameters and the optimizer's state.
    """
    config, number = plan.config, BYTES[plan.product_dtype]
    layers, pre_activations = (
        config.num_layers,
        plan.tokens_at_once * config.num_features // plan.feature_parallel_size,
    )
    if not plan.layers_together:
        # Inputs, labels, normalised inputs and reconstruction; of a layer the pre-activations, those above the
        # threshold, the order in which they are compared.
        copies = encoders // 2 if plan.product_dtype == "bfloat16" else 0
        return (4 + 3 * revives) * batch + (3 + revives) * 4 * pre_activations + copies
    # Inputs, labels, normalised inputs, all encoders in one; of as many layers as are encoded at a time the
    # pre-activations and their encoders, in the format of the product.
    at_a_time = layers / max(1, min(layers, -(-layers * number * pre_activations // ENCODED_BYTES)))
    encoded = at_a_time * number * pre_activations
    return 3 * batch + encoders + encoded + encoders * number / 4 * at_a_time / layers


def tiles_bytes(plan: Plan, entry_count: float) -> float:
    """On a GPU, bytes of the gradients of activations: one per entry and tile of columns of its decoder row."""
    if not plan.layers_together:
        return 0
    number = BYTES[plan.clt_dtype]
    targets = 1 if plan.config.decoder_tying == "per_source" else plan.config.num_targets(0)
    return min(DOTS_BYTES, 4 * entry_count * math.ceil(targets * plan.config.d_model * number / POSTING_BYTES))


def memory(plan: Plan) -> dict[str, int]:
    """
    Bytes of one process at the peak of an update, by what they are for, and `total`. `step` is what an update takes
    besides the gradients, at the worst of three moments; `buffer` the inputs and labels of the tokens in the buffer;
    `harvest` the activations of one extraction batch.
    """
    config, n, model = plan.config, plan.feature_parallel_size, plan.language_model
    layers, width = config.num_layers, config.d_model
    parts = state_bytes(plan.parameters(), plan.optimizer)

    batch = 4 * plan.tokens_at_once * layers * width  # (n·N, L, D) in float32
    entry_count = plan.tokens_at_once * layers * (plan.listed_per_layer + plan.revived_per_layer) / n
    encoders = 4 * layers * config.num_features // n * width
    # Of each listed entry its feature, token, value and gradient, and the same in the order of the features.
    entries = 40 * entry_count
    # topk and batchtopk revive dead features by reconstructing twice as many tokens, and keep the inputs twice more
    # until the encoders have gradients. relu and jumprelu keep the dead features' encoder rows so long, and write the
    # gradients of the encoders twice more.
    revives = plan.revived_per_layer > 0
    moments = (
        # Forward: there are no gradients yet.
        encoding_bytes(plan, batch, encoders, revives) - parts["gradients"],
        # When the decoders have gradients: the reconstruction's stands in place of the encoders'.
        (5 + 4 * revives) * batch + plan.pulled * encoders - encoders + tiles_bytes(plan, entry_count),
        # When all have.
        (4 + revives) * batch + (2 * encoders if plan.pulled else 0),
    )
    parts["step"] = round(max(moments) + entries)

    row = 2 * layers * width  # inputs and labels of a token
    buffer_bytes = BYTES[plan.buffer_dtype or plan.model_dtype]
    in_buffer = plan.buffer_batches * plan.prompts * (plan.context_size - 1)
    parts["buffer"] = in_buffer * row * buffer_bytes if plan.buffer_on_device else 0
    parts["language_model"] = parts["harvest"] = 0
    if model is not None:
        model_bytes, positions = BYTES[plan.model_dtype], plan.prompts * plan.context_size
        parts["language_model"] = model.num_parameters * model_bytes
        # All layers, as read and joined, and the widest intermediate values.
        parts["harvest"] = positions * (2 * row * max(model_bytes, buffer_bytes) + 4 * model.intermediate_size * 4)
    # While the language model runs, there is the optimizer's state, but neither gradients nor the step's temporaries.
    at_rest = sum(parts[name] for name in ("parameters", "optimizer", "buffer", "language_model"))
    parts["total"] = at_rest + max(parts["step"] + parts["gradients"], parts["harvest"])
    return parts


# -- time -------------------------------------------------------------------------------------------------------------


def work(plan: Plan) -> dict[str, float]:
    """
    What one process does in an update: operations for `products` and `language_model`, bytes for all else. With dead
    features, those of topk and batchtopk that are revived count as listed.
    """
    config, n, model = plan.config, plan.feature_parallel_size, plan.language_model
    tokens, weight = plan.tokens_at_once, BYTES[plan.clt_dtype]
    layers, width = config.num_layers, config.d_model
    targets = sum(config.num_targets(s) for s in range(layers))  # Σ_s J_s
    state = state_bytes(plan.parameters(), plan.optimizer)
    replicas = plan.processes // n
    has_norms = config.activation_fn not in TOPK_FAMILY and config.sparsity_lambda > 0
    entries = tokens * (plan.listed_per_layer + plan.revived_per_layer) / n  # of a layer
    encoders = 4 * config.num_features / n * width * layers
    batch_bytes = 2 * BYTES[plan.buffer_dtype or plan.model_dtype] + 2 * 4  # gathered; reduced and gathered
    return {
        # The encoders' forward product.
        "products": 2 * tokens * config.num_features / n * width * layers,
        # Pre-activations, searched for active features, and again for dead ones.
        "select": 4 * tokens * config.num_features / n * layers * (2 if plan.revived_per_layer else 1),
        # Forward: decoder rows of the listed entries, and encoder rows of those that the pre-activation loss pulls.
        "gather": entries * targets * width * weight + plan.pulled * encoders,
        # Backward, for each listed entry: rows of its decoder for the gradient of the activation, of the
        # reconstruction's gradient for that of the decoder, of the input for that of the encoder.
        "gather_back": entries * (2 * targets * weight + layers * 4) * width,
        # Decoders, whose norms the sparsity loss needs.
        "norms": config.num_features / n * targets * width * weight if has_norms else 0,
        # Gradients, written; the encoders' three times more for dead features: zeros, the dead rows, added.
        "gradients": state["gradients"] + (3 * encoders if plan.pulled else 0),
        # Optimizer: parameter and gradient read, parameter written, state read and written.
        "update": 3 * state["parameters"] + 2 * state["optimizer"],
        # The tokens that this process harvests.
        "language_model": 0 if model is None else model.flops_per_token * plan.batch_size,
        # Exchanged with those that share the features: activations, and the sum of the reconstructions.
        "shared": (n - 1) / n * (tokens * layers * width) * batch_bytes,
        # Exchanged with those that hold the same features: gradients, averaged.
        "averaged": 2 * (replicas - 1) / replicas * state["gradients"],
    }


# Which rate each part of the work is done at, in each phase of an update.
PHASES = {
    "forward": {"products": "products", "select": "select", "gather": "gather_forward", "norms": "norms_forward"},
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


def gather_seconds(plan: Plan, sheet: dict[str, float]) -> tuple[float, float]:
    """Seconds of the gathers on a GPU, mostly from its L2 cache, forward and backward; see `benchmarks/phases.py`."""
    config, weight, is_rough = plan.config, BYTES[plan.clt_dtype], plan.product_dtype == "bfloat16"
    targets = sum(config.num_targets(s) for s in range(config.num_layers))
    held = config.num_features / plan.feature_parallel_size
    entries = plan.tokens_at_once * (plan.listed_per_layer + plan.revived_per_layer) / plan.feature_parallel_size
    rows, inputs = entries * targets * config.d_model, 4 * entries * config.num_layers * config.d_model
    is_rounded = plan.layers_together and is_rough and weight > 2 and entries > ROUND_ABOVE * held
    forward = rows * (2 if is_rounded else weight) + is_rough * inputs  # under autocast values are computed again
    # One gather for both gradients of a decoder; where layers are worked on one by one, two.
    backward = rows * ((2 if is_rough else weight) if plan.layers_together else 2 * weight) + inputs
    streamed = 6 * held * targets * config.d_model * is_rounded + plan.pulled * 4 * held * config.d_model
    return forward / sheet["cache"] + streamed / (ASSUMED["streams"] * sheet["stream"]), backward / sheet["cache"]


def data_sheet_rates(device: str, plan: Plan) -> dict[str, float]:
    """The rates of a device of [`DEVICES`], as assumed: modelled, not measured."""
    sheet, counts = DEVICES[device], work(plan)
    stream = ASSUMED["streams"] * sheet["stream"]
    gather_forward, gather_backward = gather_seconds(plan, sheet)
    gradients = state_bytes(plan.parameters(), plan.optimizer)["gradients"]

    def link(processes):
        return ASSUMED["streams"] * (sheet["link"] if processes <= GPUS_PER_NODE else sheet["network"])

    return {
        "products": ASSUMED["products"] * sheet[plan.product_dtype],
        "select": stream / 2,  # written and read
        "gather_forward": counts["gather"] / gather_forward,
        "gather_backward": counts["gather_back"] / gather_backward,
        "norms_forward": stream,
        "norms_backward": stream / 3,  # decoders and gradients read, gradients written
        "gradients": stream / 2,  # weights are read beside
        "update": stream * counts["update"] / (counts["update"] + gradients),  # which clipping reads once more
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
