"""
What a training run can be told: [`CLTTrainingArguments`]. Every option is a field of it, or of `CLTConfig` for the
transcoder itself; `parser.py` reads them from flags and a YAML file.
"""

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from ..device import check_kind
from ..files import local_or_hub
from ..hub.facts import check_license
from .options import check_value


def _arg(group: str, default: Any, help: str) -> Any:
    """A dataclass field with its group and help text."""
    return field(default=default, metadata={"group": group, "help": help})


@dataclass
class CLTTrainingArguments:
    r"""
    Everything about a training run except the transcoder's own shape and losses, which are `CLTConfig`.

    The fields come in the groups model, text, buffer, normalisation, optimisation, bookkeeping, trackers and hub.
    Types and ranges are checked on construction, so that a mistake is found before a model is loaded.

    Raises:
        ValueError: for a value of the wrong type or out of range and for settings that contradict each other; one line
            that names the field, its value and the remedy.

    Args:
    """

    # The language model
    model: str | None = _arg("model", None, "Hub name or local folder of the language model to train on. Required.")
    model_revision: str | None = _arg("model", None, "Branch, tag or commit of --model on the Hub. None: main.")
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = _arg(
        "model",
        None,
        "Number format the language model runs in. auto: bfloat16, but float32 on a device without bfloat16 "
        "instructions, which would take several times as long. None: auto on a GPU, on a CPU the one its weights are "
        "stored in.",
    )
    trust_remote_code: bool = _arg(
        "model",
        False,
        "Run Python code that the repository of --model brings. Only for authors you trust.",
    )

    # The text
    dataset: str | None = _arg(
        "text", None, "Hub name of a text dataset, a .txt, .jsonl or .parquet file, or a folder of these. Required."
    )
    dataset_config: str | None = _arg("text", None, "Name of the dataset's configuration (subset), where it has some.")
    dataset_split: str = _arg("text", "train", "Split of the dataset. Held-out text is taken from its beginning.")
    dataset_text_column: str = _arg("text", "text", "Column that holds the text.")
    streaming: bool = _arg("text", True, "Read a Hub dataset while training instead of downloading it whole first.")
    stream_retries: int = _arg(
        "text",
        5,
        "Times that text which cannot be read over the network, as when a connection breaks, is read again, 5 seconds "
        "apart. Then the run stops, with a checkpoint.",
    )
    max_samples: int | None = _arg("text", None, "Use only the first N documents of the split. None: all.")
    context_size: int = _arg(
        "text",
        128,
        "Tokens per block that the language model sees. Documents are joined and cut into such blocks; the first "
        "position of a block is never trained on. At most what the model allows.",
    )
    prepend_bos: bool | None = _arg(
        "text", None, "Put the tokenizer's BOS token at the first position of each block. None: when it has one."
    )
    exclude_special_tokens: bool = _arg(
        "text", True, "Leave special tokens (BOS, EOS, padding, ...) out of training and evaluation."
    )
    eval_tokens: int = _arg(
        "text",
        8192,
        "Tokens held out for evaluation, taken from the first documents of the split and never trained on. "
        "0: no evaluation.",
    )

    activation_cache: str | None = _arg(
        "text",
        None,
        "Folder that `hf-clt cache` wrote: train on these activations, without a language model. What "
        "the options above say comes from there. None: the language model runs along.",
    )
    cache_shuffle: bool = _arg(
        "text",
        True,
        "Read the extraction batches of --activation-cache in a random order, a new one in each epoch. Off: as they "
        "were harvested, which gives the run that the language model would have given.",
    )

    # The buffer
    store_batch_size_prompts: int | None = _arg(
        "buffer",
        None,
        "Blocks of --context-size tokens per extraction batch: one forward pass of the language model. None: 8 on a "
        "CPU; on a GPU 256, or fewer where their activations take more than a sixteenth of its memory.",
    )
    n_batches_in_buffer: int | None = _arg(
        "buffer",
        None,
        "Extraction batches that the activation buffer holds. It is refilled when half read and sampled at random, so "
        "more batches mix documents better and take more memory. None: 32 on a CPU; on a GPU 2 to 32, a sixteenth of "
        "its memory.",
    )
    buffer_passes: int = _arg(
        "buffer",
        1,
        "Times that each token is trained on before it leaves the buffer. 2 makes twice the updates of the same text "
        "and the same forward passes of the language model.",
    )
    batch_size: int = _arg(
        "buffer",
        1024,
        "Tokens per process and step. At most what the buffer holds: --n-batches-in-buffer x "
        "--store-batch-size-prompts x (--context-size - 1).",
    )
    buffer_dtype: Literal["float32", "bfloat16"] | None = _arg(
        "buffer",
        None,
        "Number format of buffered activations. None: that in which the language model gives them. bfloat16 halves "
        "the memory of float32.",
    )
    buffer_device: str | None = _arg(
        "buffer", None, 'Where the buffer lives, for example "cpu" to spare GPU memory. None: with the CLT.'
    )
    on_bad_activations: Literal["stop", "skip"] = _arg(
        "buffer",
        "stop",
        "What to do when the language model gives NaN or infinity: stop, with a checkpoint, or skip all tokens of the "
        "blocks where it does; metrics.jsonl counts them as skipped_tokens.",
    )
    overlap_harvest: bool = _arg(
        "buffer",
        False,
        "Harvest ahead while the CLT trains, on a GPU at the same time; takes up to half the buffer's memory once "
        "more. The same tokens come in the same order either way. Off, since on an H200 it brought nothing.",
    )

    # Normalisation
    normalization_method: Literal["estimated_mean_std", "mean_std", "none"] = _arg(
        "normalisation",
        "estimated_mean_std",
        "Mean and standard deviation per layer and dimension, divided out while training and folded into the released "
        "weights. estimated_mean_std: from the first extraction batches; mean_std: from a pass over all the text, or "
        "from --normalization-file; none: raw activations.",
    )
    normalization_estimation_batches: int = _arg(
        "normalisation",
        16,
        "Extraction batches that estimated_mean_std and --initial-feature-rate are measured on; later trained on too.",
    )
    normalization_file: str | None = _arg(
        "normalisation",
        None,
        "A safetensors file with mean_in, std_in, mean_out, std_out, each (layers, width), used with "
        "--normalization-method mean_std instead of the pass over the text.",
    )
    initial_weights: Literal["data", "random"] = _arg(
        "normalisation",
        "data",
        "data: at the start encoder rows point to inputs of tokens, decoder rows to what is to be written where their "
        "feature fires; random: anywhere.",
    )
    initial_feature_rate: float | None = _arg(
        "normalisation",
        None,
        "Share of tokens on which each feature fires at the start, reached by setting the encoder's biases from data. "
        "None: min(0.02, 64 / num_features) for relu and jumprelu, or --target-l0 features where that is "
        "more; off for the top-k family. 0: off.",
    )

    # Optimisation
    clt_dtype: Literal["float32", "bfloat16"] | None = _arg(
        "optimisation",
        None,
        "Number format of the CLT's decoders; encoders, biases and thresholds stay float32. None: float32.",
    )
    learning_rate: float | None = _arg(
        "optimisation",
        None,
        "Highest learning rate, reached at the end of the warm-up. None: 0.004, with more than 10 layers times the "
        "root of 10 over their number, with more than 4,096 features times the root of 4,096 over theirs.",
    )
    training_steps: int = _arg(
        "optimisation",
        10000,
        "Optimizer updates to make. Each sees --batch-size x --gradient-accumulation-steps tokens per process; the "
        "text is read again when it runs out.",
    )
    optimizer: Literal["adam", "adamw", "adam_compact"] = _arg(
        "optimisation",
        "adam",
        "adam, or adamw for --weight-decay: 8 bytes of state per float32 weight. adam_compact: 2 bytes, with one "
        "second moment per feature and the first moment in float16, and the same NMSE on SmolLM2-135M, also "
        "with --clt-dtype bfloat16; almost none with --adam-beta1 0 (NMSE some 3 % above).",
    )
    adam_beta1: float = _arg("optimisation", 0.5, "Decay of the optimizer's mean of gradients, per update.")
    adam_beta2: float = _arg("optimisation", 0.999, "Decay of the optimizer's mean of squared gradients, per update.")
    adam_epsilon: float = _arg("optimisation", 1e-8, "Added to the root of the mean squared gradient.")
    weight_decay: float = _arg(
        "optimisation", 0.0, "Decoupled weight decay of adamw and adam_compact; never on biases and thresholds."
    )
    lr_scheduler: Literal["linear", "cosine", "constant", "none"] = _arg(
        "optimisation",
        "linear",
        "Learning rate after the warm-up: linear stays, then falls to 0 over --decay-steps; cosine falls all along; "
        "constant stays. none: constant without warm-up.",
    )
    warmup_steps: int | None = _arg(
        "optimisation",
        None,
        "Updates over which the learning rate rises from 0. None: 5 % of --training-steps, at most 1000.",
    )
    decay_steps: int | None = _arg(
        "optimisation",
        None,
        "With --lr-scheduler linear: updates at the end over which the learning rate falls. None: half of training "
        "(relu, jumprelu) or all of it (topk, batchtopk).",
    )
    max_grad_norm: float = _arg("optimisation", 1.0, "Largest norm of the gradient of all weights. 0: no clipping.")
    gradient_accumulation_steps: int = _arg(
        "optimisation", 1, "Batches of --batch-size tokens whose gradients are averaged for one update."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _arg(
        "optimisation",
        None,
        "Precision of the CLT's matrix products where its weights are float32; the pre-activations that they select "
        "are computed again in float32. On a CPU without bfloat16 instructions they stay float32, which is faster "
        "there. None: bf16 on a GPU that has it, with TF32 for the float32 products that remain; no on a CPU.",
    )
    sparsity_schedule: Literal["linear", "constant"] = _arg(
        "optimisation",
        "linear",
        "How the sparsity loss comes in: its weight rises from 0 to --sparsity-lambda over training, or is constant.",
    )
    sparsity_delay_steps: int = _arg(
        "optimisation", 0, "Updates at the beginning without the sparsity loss; --sparsity-schedule begins after them."
    )
    target_l0: float | None = _arg(
        "optimisation",
        None,
        "For relu and jumprelu: active features per layer and token at the end of training, to which a factor on "
        "--sparsity-lambda steers them, in place of --sparsity-schedule. None: lambda as given.",
    )
    initial_k: int | None = _arg(
        "optimisation",
        None,
        "For topk and batchtopk: train with this larger k at first and come down to --k linearly. None: only --k.",
    )
    k_anneal_steps: int | None = _arg(
        "optimisation", None, "Updates over which k comes down from --initial-k. None: a fifth of --training-steps."
    )
    reach_growth: float = _arg(
        "optimisation",
        0.0,
        "Share of training over which decoders come to reach further: their own layer alone at first, at its end as "
        "far as --decoder-reach says. With 0.6 far fewer circuits of two steps are written as one. 0: all along.",
    )
    feature_parallel_size: int = _arg(
        "optimisation",
        1,
        "Processes that share the features of one CLT: each holds 1/n of encoders, decoders and optimizer state, "
        "reads its own share of the text, and works on the tokens of all n. n divides --num-features and the number "
        "of processes; with more than n processes, each n hold one CLT and average their gradients with the others.",
    )
    init_from: str | None = _arg(
        "optimisation",
        None,
        "Hub name or folder of a CLT to go on training, with fresh optimizer state; its shape comes from there.",
    )
    seed: int = _arg("optimisation", 42, "Seed of the initial weights and of the order in which tokens are sampled.")
    device: str | None = _arg(
        "optimisation",
        None,
        'Device of the language model and the CLT ("cpu", "cuda"). None: a GPU when there is one.',
    )

    # Output, logging, evaluation, checkpoints
    output_dir: str = _arg(
        "bookkeeping", "clt_output", "Folder for the finished CLT, its README.md, metrics.jsonl and checkpoints."
    )
    overwrite_output_dir: bool = _arg(
        "bookkeeping", False, "Replace what an earlier run left in --output-dir, which is refused otherwise."
    )
    resume_from_checkpoint: str | None = _arg(
        "bookkeeping",
        None,
        'A checkpoint folder to go on from, or "latest" for the newest in --output-dir. Repeat the other options of '
        "the run.",
    )
    log_interval: int = _arg("bookkeeping", 10, "Updates between two lines of training losses in metrics.jsonl.")
    eval_interval: int = _arg(
        "bookkeeping", 500, "Updates between two evaluations on the held-out text. 0: only at the end."
    )
    eval_replacement: bool = _arg(
        "bookkeeping",
        False,
        "At the end, also run the language model on the held-out text with its MLPs replaced by the CLT, for the "
        "card: cross-entropy, KL, top-1 agreement. Takes four passes of the language model over that text.",
    )
    checkpoint_interval: int = _arg(
        "bookkeeping", 1000, "Updates between two checkpoints. 0: none but when the run is stopped or fails."
    )
    checkpoint_activations: bool = _arg(
        "bookkeeping",
        False,
        "Keep the buffer's activations in each checkpoint, which grows by them; resuming then starts without running "
        "the language model on their tokens again. The run goes on the same either way.",
    )
    save_total_limit: int | None = _arg(
        "bookkeeping", 3, "Checkpoints kept in --output-dir; older ones are deleted. none: keep all."
    )
    dead_feature_window: int = _arg(
        "bookkeeping", 1000, "Updates without firing after which a feature counts as dead."
    )
    disable_progress_bar: bool = _arg("bookkeeping", False, "Show no progress bars.")

    # Trackers
    report_to: list[str] = field(
        default_factory=list,
        metadata={
            "group": "trackers",
            "help": "Trackers that receive the metrics too, under the names in metrics.jsonl: tensorboard, wandb, "
            "trackio; several are given with spaces or commas (docs/trackers.md).",
        },
    )
    enable_wandb: bool = _arg("trackers", False, "The same as --report-to wandb.")
    wandb_project: str | None = _arg("trackers", None, "Project for wandb and trackio. None: clt-training.")
    wandb_entity: str | None = _arg("trackers", None, "User or team on wandb. None: the one logged in.")
    wandb_run_name: str | None = _arg(
        "trackers", None, "Name of the run for wandb and trackio. None: the tracker picks one."
    )

    # The Hub
    push_to_hub: bool = _arg("hub", False, "Push the finished CLT with its model card to --hub-model-id.")
    hub_model_id: str | None = _arg("hub", None, 'Repository to push to, such as "user/clt-gpt2".')
    hub_private: bool = _arg("hub", False, "Make the repository private if it is created; refuse a public one.")
    hub_branch: str | None = _arg("hub", None, "Branch to push to, made if it is absent. None: main.")
    license: str | None = _arg(
        "hub", None, "Licence of the CLT for its card, as the Hub spells it: mit, apache-2.0, ... None: not stated."
    )
    hub_push_interval: int = _arg(
        "hub",
        0,
        "Updates between two pushes of the CLT as it is then, beside training. One that is due while another is under "
        "way is left out. 0: only the finished CLT.",
    )

    def __post_init__(self):
        for name, hint in get_type_hints(CLTTrainingArguments).items():
            setattr(self, name, check_value(name, getattr(self, name), hint))
        for name in PATHS:
            if getattr(self, name) is not None:
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        for name in FOLDERS_OR_REPOSITORIES:
            if getattr(self, name) is not None:
                setattr(self, name, local_or_hub(getattr(self, name)))
        if self.activation_cache is not None:
            self._take_from_cache()
        self._check_ranges()
        self._check_combinations()
        if self.enable_wandb and "wandb" not in self.report_to:
            self.report_to = [*self.report_to, "wandb"]

    def _take_from_cache(self):
        """Fills in what is fixed by the activation cache; raises ValueError where something else was asked for."""
        from ..harvest.cache import read_manifest

        manifest = read_manifest(self.activation_cache)
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in CACHED:
            if name not in manifest:
                raise ValueError(
                    f"activation_cache={self.activation_cache!r} does not say its {name}; write it with `hf-clt cache`"
                )
            now, cached = getattr(self, name), manifest[name]
            cached = local_or_hub(cached) if name in FOLDERS_OR_REPOSITORIES and cached else cached
            if now not in (defaults[name], cached) and not (name == "eval_tokens" and now == 0):
                raise ValueError(
                    f"{name}={now!r}, but activation_cache={self.activation_cache!r} was written with {cached!r}; "
                    f"leave {name} out, or write another cache"
                )
            if now == defaults[name]:
                setattr(self, name, cached)

    def _check_ranges(self):
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not positive; give a value above 0")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} is negative; give 0 or more")
        for name in ("adam_beta1", "adam_beta2", "initial_feature_rate", "reach_growth"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value} is out of range; give at least 0 and less than 1")
        if self.context_size < 2:
            raise ValueError(
                f"context_size={self.context_size} leaves no token, since the first position of a block is never "
                "trained on; give 2 or more"
            )
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} is too large; give less than 2**32")
        for tracker in self.report_to:
            if tracker not in TRACKERS:
                raise ValueError(f"report_to={tracker!r} is unknown; choose from {', '.join(TRACKERS)}")
        for name in ("device", "buffer_device"):
            if getattr(self, name) is not None:
                check_kind(getattr(self, name), name)

    def _check_combinations(self):
        sizes = self.n_batches_in_buffer, self.store_batch_size_prompts
        if None not in sizes and self.batch_size > self.tokens_in_buffer:
            raise ValueError(
                f"batch_size={self.batch_size} is larger than the buffer, which holds {self.tokens_in_buffer} tokens "
                f"(n_batches_in_buffer={self.n_batches_in_buffer} x "
                f"store_batch_size_prompts={self.store_batch_size_prompts} x (context_size={self.context_size} - 1)); "
                "lower batch_size or raise n_batches_in_buffer"
            )
        if self.warmup_steps is not None and self.warmup_steps > self.training_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than training_steps={self.training_steps}; lower it"
            )
        for name in ("sparsity_delay_steps", "k_anneal_steps"):
            value = getattr(self, name)
            if value is not None and value >= self.training_steps:
                raise ValueError(f"{name}={value} is not below training_steps={self.training_steps}; lower it")
        for name, in_vain, other, remedy in (  # one that has no effect with the value of another
            ("decay_steps", self.lr_scheduler != "linear", "lr_scheduler", "linear"),
            ("warmup_steps", self.lr_scheduler == "none", "lr_scheduler", "constant"),
            ("k_anneal_steps", self.initial_k is None, "initial_k", 64),
            ("sparsity_schedule", self.target_l0 and self.sparsity_schedule != "linear", "target_l0", None),
            ("sparsity_delay_steps", self.target_l0 is not None, "target_l0", None),
            ("weight_decay", self.optimizer == "adam", "optimizer", "adamw"),
            ("normalization_file", self.normalization_method != "mean_std", "normalization_method", "mean_std"),
            ("eval_replacement", self.eval_tokens == 0, "eval_tokens", 8192),
            ("hub_push_interval", not self.push_to_hub, "push_to_hub", True),
        ):
            if getattr(self, name) and in_vain:
                given, beside = f"{name}={getattr(self, name)!r}", f"{other}={getattr(self, other)!r}"
                raise ValueError(
                    f"{given} has no effect with {beside}; leave it out, or give for example {other}={remedy!r}"
                )
        if self.on_bad_activations == "skip" and self.activation_cache is not None:
            raise ValueError(
                "on_bad_activations='skip' has no effect with activation_cache, which holds none; leave it out"
            )
        if (self.decay_steps or 0) + self.num_warmup_steps > self.training_steps:
            raise ValueError(
                f"decay_steps={self.decay_steps} begin before the warm-up of {self.num_warmup_steps} of "
                f"training_steps={self.training_steps} ends; lower decay_steps or warmup_steps"
            )
        if self.normalization_file is not None and not os.path.isfile(self.normalization_file):
            raise ValueError(f"normalization_file={self.normalization_file!r} does not exist; give an existing file")
        if self.feature_parallel_size > 1 and self.mixed_precision == "fp16":
            # Each process would scale its own gradients, and skip steps that the others make.
            raise ValueError(
                f"mixed_precision='fp16' does not go with feature_parallel_size={self.feature_parallel_size}; choose "
                "mixed_precision='bf16'"
            )
        if self.eval_replacement:
            self._check_eval_replacement()
        if self.license is not None:
            check_license(self.license)
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub=True needs a repository; give hub_model_id, such as 'user/clt-gpt2'")
        if self.hub_model_id is not None:
            _check_repo_id(self.hub_model_id)

    def _check_eval_replacement(self):
        later = (
            "leave it out, and afterwards run `hf-clt evaluate OUTPUT_DIR --dataset ... --replacement --update-card`"
        )
        if self.activation_cache is not None:
            raise ValueError(
                "eval_replacement=True needs the language model, which does not run with activation_cache="
                f"{self.activation_cache!r}; {later}"
            )
        if self.feature_parallel_size > 1:
            raise ValueError(
                "eval_replacement=True needs the whole CLT in each process, which holds a part with "
                f"feature_parallel_size={self.feature_parallel_size}; {later}"
            )

    @property
    def tokens_in_buffer(self) -> int:
        """Most tokens the buffer can hold, its sizes given; position 0 of each block does not enter it."""
        return self.n_batches_in_buffer * self.store_batch_size_prompts * (self.context_size - 1)

    @property
    def num_warmup_steps(self) -> int:
        """Updates of learning-rate warm-up: `warmup_steps`, or 5 % of training and at most 1000 when that is None."""
        if self.lr_scheduler == "none":
            return 0
        if self.warmup_steps is None:
            return min(1000, self.training_steps // 20)
        return self.warmup_steps

    @property
    def num_k_anneal_steps(self) -> int:
        """Updates over which k is annealed: `k_anneal_steps`, or a fifth of training when that is None."""
        return self.training_steps // 5 if self.k_anneal_steps is None else self.k_anneal_steps

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values. There is no field for a token or password, so no secret is in it."""
        return asdict(self)

    def changed_since(self, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Old and new value of the fields that a result depends on, where they differ from those of `to_dict()`."""
        now = self.to_dict()
        names = [name for name in now if name in before and name not in WITHOUT_EFFECT]
        return {name: (before[name], now[name]) for name in names if before[name] != now[name]}

    def non_default(self) -> dict[str, Any]:
        """The fields that differ from their defaults, those on a CPU, in the order of the class."""
        defaults = CLTTrainingArguments().to_dict()
        usual = {**defaults, **CPU_DEFAULTS}
        return {name: value for name, value in self.to_dict().items() if value not in (defaults[name], usual[name])}


# Of fields whose default depends on the device; on a GPU, see `setup.gpu_defaults`.
CPU_DEFAULTS = {"store_batch_size_prompts": 8, "n_batches_in_buffer": 32, "mixed_precision": "no"}
POSITIVE = (
    "max_samples", "store_batch_size_prompts", "n_batches_in_buffer", "buffer_passes", "batch_size",
    "normalization_estimation_batches", "learning_rate", "training_steps", "adam_epsilon",
    "gradient_accumulation_steps", "log_interval", "save_total_limit", "dead_feature_window", "initial_k",
    "target_l0", "feature_parallel_size", "decay_steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "eval_tokens", "weight_decay", "warmup_steps", "max_grad_norm", "seed", "eval_interval", "checkpoint_interval",
    "sparsity_delay_steps", "k_anneal_steps", "stream_retries", "hub_push_interval",
)  # fmt: skip
# What an activation cache was written with and a run on it cannot have otherwise.
CACHED = (
    "model", "model_revision", "model_dtype", "dataset", "dataset_config", "dataset_split", "dataset_text_column",
    "max_samples", "context_size", "prepend_bos", "exclude_special_tokens", "eval_tokens", "store_batch_size_prompts",
)  # fmt: skip
PATHS = ("output_dir", "resume_from_checkpoint", "normalization_file", "activation_cache")
FOLDERS_OR_REPOSITORIES = ("model", "dataset", "init_from")
# What a resumed run cannot have otherwise, besides the CLT and what gives activations.
FIXED = ("clt_dtype", "normalization_method")
# Where and how a run is told of, watched and kept, which changes nothing in its result.
WITHOUT_EFFECT = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "log_interval", "eval_interval",
    "eval_replacement", "checkpoint_interval", "checkpoint_activations", "save_total_limit", "disable_progress_bar",
    "report_to", "enable_wandb", "wandb_project", "wandb_entity", "wandb_run_name", "push_to_hub", "hub_model_id",
    "hub_private", "hub_branch", "license", "hub_push_interval", "stream_retries", "streaming", "trust_remote_code",
    "device", "buffer_device", "overlap_harvest", "feature_parallel_size",
)  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "trackio")


def _check_repo_id(repo_id: str):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"hub_model_id={repo_id!r} is no repository name; give one such as 'user/clt-gpt2'") from None


def _describe_fields():
    """Adds an entry per field to the class docstring, from the help texts that `--help` prints."""
    for entry, default in zip(fields(CLTTrainingArguments), CLTTrainingArguments().to_dict().values(), strict=True):
        hint = entry.type.__name__ if entry.type in (bool, int, float, str) else str(entry.type).replace("typing.", "")
        head = f"    {entry.name} (`{hint}`, *optional*, defaults to `{default!r}`):\n"
        CLTTrainingArguments.__doc__ += f"{head}            {entry.metadata['help']}\n    "


_describe_fields()


__all__ = ["CLTTrainingArguments"]
