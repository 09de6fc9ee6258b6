"""
What a training run can be told: [`CLTTrainingArguments`], and the command line and YAML file that fill it.

Every option is a field of a dataclass: of `CLTTrainingArguments`, or of `CLTConfig` for the transcoder itself. Its
type says what a flag accepts, its help text what `--help` prints; nothing is listed a second time.
"""

import argparse
import difflib
import math
import os
import re
import sys
import textwrap
import types
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..configuration_clt import ACTIVATION_DEFAULTS, CLT_CONFIG_HELP, CLTConfig


GROUPS = {
    "model": "the language model whose activations are read",
    "clt": "the cross-layer transcoder",
    "text": "text",
    "buffer": "activation buffer and batches",
    "normalisation": "normalisation and initial biases",
    "optimisation": "optimisation",
    "bookkeeping": "output, logging, evaluation, checkpoints",
    "trackers": "trackers",
    "hub": "pushing to the Hub",
}


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
        "Number format the language model runs in. auto: bfloat16, but float32 on a CPU without bfloat16 "
        "instructions, which would take several times as long. None: the one its weights are stored in.",
    )
    trust_remote_code: bool = _arg(
        "model",
        False,
        "Run Python code that the repository of --model or --dataset brings. Only for authors you trust.",
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
        "Times in a row that text which cannot be read, as when a connection breaks, is opened again where it was, "
        "after 1, 2, 4, ... seconds. Then the run stops, with a checkpoint.",
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
        "Folder that scripts/cache_activations.py wrote: train on these activations, without a language model. What "
        "the options above say comes from there. None: the language model runs along.",
    )
    cache_shuffle: bool = _arg(
        "text",
        True,
        "Read the extraction batches of --activation-cache in a random order, a new one in each epoch. Off: as they "
        "were harvested, which gives the run that the language model would have given.",
    )

    # The buffer
    store_batch_size_prompts: int = _arg(
        "buffer", 8, "Blocks of --context-size tokens per extraction batch: one forward pass of the language model."
    )
    n_batches_in_buffer: int = _arg(
        "buffer",
        32,
        "Extraction batches that the activation buffer holds. It is refilled when half read and sampled at random, so "
        "more batches mix documents better and take more memory.",
    )
    batch_size: int = _arg(
        "buffer",
        1024,
        "Tokens per process and step. At most what the buffer holds: --n-batches-in-buffer x "
        "--store-batch-size-prompts x (--context-size - 1).",
    )
    buffer_dtype: Literal["float32", "bfloat16"] | None = _arg(
        "buffer", None, "Number format of buffered activations. None: that of the CLT. bfloat16 halves the memory."
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
        "more. The same tokens come in the same order either way. Off until it was measured on a GPU.",
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
    initial_feature_rate: float | None = _arg(
        "normalisation",
        None,
        "Share of tokens on which each feature fires at the start, reached by setting the encoder's biases from data. "
        "None: min(0.02, 64 / num_features) for relu and jumprelu, off for the top-k family. 0: off.",
    )

    # Optimisation
    clt_dtype: Literal["float32", "bfloat16", "float16"] | None = _arg(
        "optimisation", None, "Number format of the CLT's weights; thresholds stay float32. None: float32."
    )
    learning_rate: float = _arg("optimisation", 2e-3, "Highest learning rate, reached at the end of the warm-up.")
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
        "second moment per feature and the first moment in float16 (NMSE 1 to 3 % below adam's on a made dictionary); "
        "almost none with --adam-beta1 0 (4 % above with topk, a third with jumprelu).",
    )
    adam_beta1: float = _arg("optimisation", 0.9, "Decay of the optimizer's mean of gradients, per update.")
    adam_beta2: float = _arg("optimisation", 0.999, "Decay of the optimizer's mean of squared gradients, per update.")
    adam_epsilon: float = _arg("optimisation", 1e-8, "Added to the root of the mean squared gradient.")
    weight_decay: float = _arg(
        "optimisation", 0.0, "Decoupled weight decay of adamw and adam_compact; never on biases and thresholds."
    )
    lr_scheduler: Literal["linear", "cosine", "constant", "none"] = _arg(
        "optimisation",
        "linear",
        "Learning rate after the warm-up: linear or cosine fall to 0, constant stays. none: constant without warm-up.",
    )
    warmup_steps: int | None = _arg(
        "optimisation",
        None,
        "Updates over which the learning rate rises from 0. None: 5 % of --training-steps, at most 1000.",
    )
    decay_steps: int = _arg(
        "optimisation",
        0,
        "With --lr-scheduler constant: updates at the end over which it falls linearly to 0. 0: none.",
    )
    max_grad_norm: float = _arg("optimisation", 1.0, "Largest norm of the gradient of all weights. 0: no clipping.")
    gradient_accumulation_steps: int = _arg(
        "optimisation", 1, "Batches of --batch-size tokens whose gradients are averaged for one update."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = _arg(
        "optimisation",
        "no",
        "Precision of the CLT's matrix products where its weights are float32. On a CPU "
        "without bfloat16 instructions they stay float32, which is faster there.",
    )
    sparsity_schedule: Literal["linear", "constant"] = _arg(
        "optimisation",
        "linear",
        "How the sparsity loss comes in: its weight rises from 0 to --sparsity-lambda over training, or is constant.",
    )
    sparsity_delay_steps: int = _arg(
        "optimisation", 0, "Updates at the beginning without the sparsity loss; --sparsity-schedule begins after them."
    )
    initial_k: int | None = _arg(
        "optimisation",
        None,
        "For topk and batchtopk: train with this larger k at first and come down to --k linearly. None: only --k.",
    )
    k_anneal_steps: int | None = _arg(
        "optimisation", None, "Updates over which k comes down from --initial-k. None: a fifth of --training-steps."
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
    checkpoint_interval: int = _arg(
        "bookkeeping", 1000, "Updates between two checkpoints. 0: none but when the run is stopped or fails."
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
            "help": "Trackers to send the metrics to, besides metrics.jsonl: tensorboard, wandb, trackio.",
        },
    )
    enable_wandb: bool = _arg("trackers", False, "The same as --report-to wandb.")
    wandb_project: str | None = _arg("trackers", None, "Project for wandb and trackio. None: clt-training.")
    wandb_entity: str | None = _arg("trackers", None, "User or team on wandb. None: the one logged in.")
    wandb_run_name: str | None = _arg("trackers", None, "Name of the run. None: the tracker picks one.")

    # The Hub
    push_to_hub: bool = _arg("hub", False, "Push the finished CLT with its model card to --hub-model-id.")
    hub_model_id: str | None = _arg("hub", None, 'Repository to push to, such as "user/clt-gpt2".')
    hub_private: bool = _arg("hub", False, "Make the repository private if it is created.")

    def __post_init__(self):
        for option in training_options():
            setattr(self, option.name, _check_value(option, getattr(self, option.name)))
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
        defaults = {
            option.name: CLTTrainingArguments.__dataclass_fields__[option.name].default
            for option in training_options()
        }
        for name in CACHED:
            now, cached = getattr(self, name), manifest[name]
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
        for name in ("adam_beta1", "adam_beta2", "initial_feature_rate"):
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
            value = getattr(self, name)
            if value is not None and not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", value):
                raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(DEVICES)}, or give cuda:0")

    def _check_combinations(self):
        if self.batch_size > self.tokens_in_buffer:
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
        for name in ("decay_steps", "sparsity_delay_steps", "k_anneal_steps"):
            value = getattr(self, name)
            if value is not None and value >= self.training_steps:
                raise ValueError(f"{name}={value} is not below training_steps={self.training_steps}; lower it")
        if self.decay_steps and self.lr_scheduler not in ("constant", "none"):
            raise ValueError(
                f"decay_steps={self.decay_steps} has no effect with lr_scheduler={self.lr_scheduler!r}; choose "
                "lr_scheduler='constant'"
            )
        if self.decay_steps + self.num_warmup_steps > self.training_steps:
            raise ValueError(
                f"decay_steps={self.decay_steps} begin before the warm-up of {self.num_warmup_steps} of "
                f"training_steps={self.training_steps} ends; lower decay_steps or warmup_steps"
            )
        if self.k_anneal_steps and self.initial_k is None:
            raise ValueError(f"k_anneal_steps={self.k_anneal_steps} has no effect without initial_k; give initial_k")
        if self.warmup_steps and self.lr_scheduler == "none":
            raise ValueError(
                f"warmup_steps={self.warmup_steps} has no effect with lr_scheduler='none'; choose "
                "lr_scheduler='constant'"
            )
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError(
                f"weight_decay={self.weight_decay} has no effect with optimizer={self.optimizer!r}; choose "
                "optimizer='adamw'"
            )
        if self.normalization_file is not None and self.normalization_method != "mean_std":
            raise ValueError(
                f"normalization_file={self.normalization_file!r} is not used with "
                f"normalization_method={self.normalization_method!r}; choose normalization_method='mean_std'"
            )
        if self.normalization_file is not None and not os.path.isfile(self.normalization_file):
            raise ValueError(f"normalization_file={self.normalization_file!r} does not exist; give an existing file")
        if self.feature_parallel_size > 1 and self.mixed_precision == "fp16":
            # Each process would scale its own gradients, and skip steps that the others make.
            raise ValueError(
                f"mixed_precision='fp16' does not go with feature_parallel_size={self.feature_parallel_size}; choose "
                "mixed_precision='bf16'"
            )
        if self.on_bad_activations == "skip" and self.activation_cache is not None:
            raise ValueError(
                "on_bad_activations='skip' has no effect with activation_cache, which holds none; leave it out"
            )
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub=True needs a repository; give hub_model_id, such as 'user/clt-gpt2'")
        if self.hub_model_id is not None:
            _check_repo_id(self.hub_model_id)

    @property
    def tokens_in_buffer(self) -> int:
        """Most tokens the buffer can hold; position 0 of each block does not enter it."""
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

    def non_default(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in the order of the class."""
        defaults = CLTTrainingArguments().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}


POSITIVE = (
    "max_samples", "store_batch_size_prompts", "n_batches_in_buffer", "batch_size", "normalization_estimation_batches",
    "learning_rate", "training_steps", "adam_epsilon", "gradient_accumulation_steps", "log_interval",
    "save_total_limit", "dead_feature_window", "initial_k", "feature_parallel_size",
)  # fmt: skip
NOT_NEGATIVE = (
    "eval_tokens", "weight_decay", "warmup_steps", "max_grad_norm", "seed", "eval_interval", "checkpoint_interval",
    "decay_steps", "sparsity_delay_steps", "k_anneal_steps", "stream_retries",
)  # fmt: skip
# What an activation cache was written with and a run on it cannot have otherwise.
CACHED = (
    "model", "model_revision", "model_dtype", "dataset", "dataset_config", "dataset_split", "dataset_text_column",
    "max_samples", "context_size", "prepend_bos", "exclude_special_tokens", "eval_tokens", "store_batch_size_prompts",
)  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "trackio")
DEVICES = ("cpu", "cuda", "mps", "xpu", "npu")


@dataclass(frozen=True)
class Option:
    """
    One field as the command line and the YAML file see it.

    Args:
        name: name of the field.
        kind: `bool`, `int`, `float`, `str` or `list` (of str).
        optional: whether None is allowed.
        choices: allowed texts; empty when any value of the kind is.
        group: key of `GROUPS`.
        help: the help text.
        default: how `--help` prints the default.
    """

    name: str
    kind: type
    optional: bool
    choices: tuple[str, ...]
    group: str
    help: str
    default: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a value has to be, for messages."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list of names"}[
            self.kind
        ]


def _make_option(name: str, hint: Any, group: str, help: str, default: str) -> Option:
    """Reads the kind, the choices and whether None is allowed out of a field's type."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = tuple(value for member in members if get_origin(member) is Literal for value in get_args(member))
    kinds = [str if get_origin(member) is Literal else get_origin(member) or member for member in members]
    # `int | float` is a number: float comes before int.
    kind = next(kind for kind in (bool, float, int, list, str) if kind in kinds)
    return Option(name, kind, types.NoneType in kinds, choices, group, help, default)


def training_options() -> list[Option]:
    """The options that are fields of `CLTTrainingArguments`, in the order of the class."""
    options = []
    for entry in fields(CLTTrainingArguments):
        default = entry.default_factory() if entry.default is MISSING else entry.default
        text = " ".join(default) or "none" if isinstance(default, list) else _text(default)
        options.append(_make_option(entry.name, entry.type, entry.metadata["group"], entry.metadata["help"], text))
    return options


# CLTConfig's fields whose value, when it is not given, is found by build_config.
FOUND_DEFAULTS = {
    "base_model_name_or_path": "as --model",
    "base_model_revision": "as --model-revision",
    "num_layers": "from the language model",
    "d_model": "from the language model",
    "num_features": "none; required",
    "sparsity_lambda": "by activation function and width",
    "feature_input_hook": "by the language model",
    "feature_output_hook": "by the language model",
}


def config_options() -> list[Option]:
    """The options that are fields of `CLTConfig`: those that `CLT_CONFIG_HELP` explains."""
    options = []
    for entry in fields(CLTConfig):
        if entry.name not in CLT_CONFIG_HELP:
            continue
        if entry.name in FOUND_DEFAULTS:
            default = FOUND_DEFAULTS[entry.name]
        elif entry.name in ACTIVATION_DEFAULTS["relu"]:
            default = ", ".join(f"{name} {_text(values[entry.name])}" for name, values in ACTIVATION_DEFAULTS.items())
        else:
            default = _text(entry.default)
        options.append(_make_option(entry.name, entry.type, "clt", CLT_CONFIG_HELP[entry.name], default))
    return options


def _text(value: Any) -> str:
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


# Values: the same checks for a Python argument, a flag and a YAML entry.


def _check_value(option: Option, value: Any) -> Any:
    """Returns `value` as the option's type, or raises a ValueError that names the option, the value and the types."""
    if value is None:
        if option.optional:
            return None
    elif option.kind is bool:
        if isinstance(value, bool):
            return value
    elif option.kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif option.kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif option.kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, str) and value and (not option.choices or value in option.choices):
            return value
    else:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return [] if list(value) == ["none"] else list(value)
    remedy = (
        f"give {option.expected}, in quotes"
        if option.kind is str and not option.choices and value
        else f"give {option.expected}"
    )
    raise ValueError(f"{option.name}={value!r} is not valid; {remedy}")


def _parse_text(option: Option, text: str) -> Any:
    """Reads a flag's text: `1e-4` for a number, `none` for None, true/false, yes/no, on/off or 1/0 for a switch."""
    # A name (of a project, a run) may well be "none"; in the other kinds the word can only mean no value.
    if option.optional and text.lower() == "none" and (option.kind is not str or option.choices):
        return None
    if option.kind is bool:
        return BOOLEANS.get(text.lower(), text)
    if option.kind in (int, float):
        try:
            return option.kind(text)
        except ValueError:
            return text
    return text


BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _check_repo_id(repo_id: str):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"hub_model_id={repo_id!r} is no repository name; give one such as 'user/clt-gpt2'") from None


# The YAML file.


class SettingsLoader(yaml.SafeLoader):
    """
    YAML 1.2's reading of plain words, where PyYAML follows 1.1: `1e-4` is a number, only true and false are switches
    (so that `mixed_precision: no` is the text "no"), and dates are text. A key given twice is refused.
    """

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is given twice; keep one of the two")
        return super().construct_mapping(node, deep)


SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _read_settings(path: str, options: dict[str, Option]) -> dict[str, Any]:
    """Reads a YAML file of settings into field -> checked value."""
    if not os.path.isfile(path):
        raise ValueError(
            f"settings file {path!r} does not exist; give an existing YAML file, or options as --name value"
        )
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.load(file, Loader=SettingsLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"settings file {path!r} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"settings file {path!r}: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(
            f"settings file {path!r} holds a {type(settings).__name__}; write lines of the form name: value"
        )
    values = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise ValueError(f"settings file {path!r}: unknown key {key!r}; {_nearest(name, options)}")
        if name in values:
            raise ValueError(f"settings file {path!r}: {name} is given twice; keep one of the two")
        if options[name].kind is bool and isinstance(value, str):
            value = _parse_text(options[name], value)
        if value == "none" and options[name].kind in (bool, int, float):
            value = None
        try:
            values[name] = _check_value(options[name], value)
        except ValueError as error:
            raise ValueError(f"settings file {path!r}: {error}") from None
    return values


def _nearest(name: str, options: dict[str, Option], flags: bool = False) -> str:
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if not close:
        return "see --help for the options"
    return f"did you mean {options[close[0]].flag if flags else close[0]}?"


# The command line.

DESCRIPTION = """\
Train a cross-layer transcoder (CLT) on a language model.

  python scripts/train_clt.py --model openai-community/gpt2 --dataset monology/pile-uncopyrighted \\
      --num-features 6144 --activation-fn batchtopk --k 16 --output-dir clt-gpt2

  python scripts/train_clt.py settings.yaml --learning-rate 4e-4

The settings file is YAML, one "name: value" per line with the names below; options override it. Underscores are as
good as dashes (--num_features). A switch is turned on by --name or --name true and off by --no-name or --name false.
Where several processes are wanted, put "accelerate launch" in the place of "python".
"""
EPILOG = """\
Exit status: 0 when the CLT is finished; 2 after an error, said in one line; 130 when Ctrl-C (SIGINT) or SIGTERM, which
clusters send before they take a machine away, stopped the run: after the step it was in, and with a checkpoint if it
had made one. What was stopped, killed or failed goes on with --resume-from-checkpoint latest, to the same result.
HF_CLT_DEBUG=1 in the environment shows the traceback of an error.
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=119)

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False)  # option names stay whole


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        # argparse would print a page of usage and exit; the caller prints one line.
        raise ValueError(message[0].lower() + message[1:] + "; see --help")


def _build_parser(options: dict[str, Option]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train_clt.py",
        usage="%(prog)s [settings.yaml] --model NAME --dataset NAME --num-features N [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_HelpFormatter,
    )
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for option in options.values():
        off = f" --no-{option.flag[2:]} turns it off." if option.kind is bool and option.default != "false" else ""
        # Where a default is none, the help says what that means.
        default = "" if option.default == "none" and option.optional else f" (default: {option.default})"
        text = f"{option.help}{off}{default}".replace("%", "%%")
        metavar = {bool: "true|false", int: "N", float: "X", str: "TEXT", list: "NAME"}[option.kind]
        if option.choices:
            metavar = "{" + ",".join(option.choices) + "}"
        # Values are read by _parse_text and not by argparse, so that flags and YAML give the same messages.
        extra = {bool: {"nargs": "?", "const": "true"}, list: {"nargs": "+"}}.get(option.kind, {})
        groups[option.group].add_argument(option.flag, dest=option.name, metavar=metavar, help=text, **extra)
    return parser


def _normalise_argv(argv: list[str], options: dict[str, Option]) -> list[str]:
    """One spelling for argparse: `--a_b` becomes `--a-b`, `--no-x` `--x=false`, and `--x -1e-3` `--x=-1e-3`."""
    normalised = []
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            flag = flag.replace("_", "-")
            negated = options.get(flag.removeprefix("--no-").replace("-", "_"))
            if flag.startswith("--no-") and negated is not None and negated.kind is bool:
                if equals:
                    raise ValueError(f"{token} is ambiguous; write {flag} or {negated.flag}={value}")
                flag, equals, value = negated.flag, "=", "false"
            normalised.append(flag + equals + value)
        elif normalised and re.match(r"-[.\d]", token) and re.fullmatch(r"--[^=]+", normalised[-1]):
            # argparse takes -1e-3 for an option.
            normalised[-1] += "=" + token
        else:
            normalised.append(token)
    return normalised


def parse_train_args(argv: list[str] | None = None) -> tuple[CLTTrainingArguments, dict[str, Any]]:
    r"""
    Reads the command line of `scripts/train_clt.py`, with a YAML file of settings as an optional first argument.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` when None.

    Returns:
        The training arguments, and the `CLTConfig` fields that were given, by name. Fields that were not given are
        absent, so that the configuration's own defaults, which depend on the activation function, apply.

    Raises:
        ValueError: for an unknown option or key (the nearest known one is named), a value of the wrong type or out of
            range, or a missing required option.
        SystemExit: after printing `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    training = {option.name: option for option in training_options()}
    options = training | {option.name: option for option in config_options()}
    parser = _build_parser(options)
    settings_file = argv.pop(0) if argv and not argv[0].startswith("-") else None
    flags, unknown = parser.parse_known_args(_normalise_argv(argv, options))
    for token in unknown:
        if token.startswith("-"):
            flag = token.partition("=")[0]
            name = flag.lstrip("-").replace("-", "_")
            raise ValueError(f"unknown option {flag}; {_nearest(name, options, flags=True)}")
    if unknown:
        raise ValueError(
            f"unexpected argument {unknown[0]!r}; a settings file comes first, and a value after its option"
        )

    values = _read_settings(settings_file, options) if settings_file is not None else {}
    for name, text in vars(flags).items():
        option = options[name]
        values[name] = _check_value(option, _parse_list(text) if option.kind is list else _parse_text(option, text))

    required = ("dataset",) if values.get("init_from") else ("model", "dataset", "num_features")
    if values.get("activation_cache"):
        required = tuple(name for name in required if name == "num_features")
    for name in required:
        if values.get(name) is None:
            raise ValueError(f"{name} is missing; give {options[name].flag} (see --help)")
    args = CLTTrainingArguments(**{name: value for name, value in values.items() if name in training})
    return args, {name: value for name, value in values.items() if name not in training}


def _parse_list(texts: list[str]) -> list[str]:
    """`--report-to a b` and `--report-to a,b` are the same."""
    return [item for text in texts for item in text.split(",") if item]


def build_config(args: CLTTrainingArguments, config_kwargs: dict[str, Any]) -> CLTConfig:
    r"""
    Completes the configuration of a new CLT from its language model, of which only `config.json` is read.

    Args:
        args: the training arguments; `model`, `model_revision` and `trust_remote_code` are used.
        config_kwargs: the given `CLTConfig` fields. Number of layers, width, hooks, and name and revision of the base
            model are filled in where they are absent or None.

    Returns:
        The configuration.

    Raises:
        ValueError: if `model` or `num_features` is missing, if the language model does not say its number of layers
            or width, or if a given number of layers or width is not the language model's.
        OSError: if the language model cannot be found.
    """
    if args.model is None:
        raise ValueError("model is missing; give the Hub name or folder of a language model")
    given = {name: value for name, value in config_kwargs.items() if value is not None}
    if "num_features" not in given:
        raise ValueError(
            "num_features is missing; give the number of features per layer, such as 8 x the model's width"
        )
    found = _facts_of_model(args)
    for name in ("num_layers", "d_model"):
        if given.setdefault(name, found[name]) != found[name]:
            raise ValueError(
                f"{name}={given[name]} does not fit model={args.model!r}, which has {found[name]}; leave {name} out"
            )
    for name in ("feature_input_hook", "feature_output_hook"):
        given.setdefault(name, found[name])
    # A revision is one of the repository that is named, which need not be the folder that is read.
    if "base_model_name_or_path" not in given:
        given["base_model_name_or_path"] = args.model
        if given.setdefault("base_model_revision", args.model_revision) != args.model_revision:
            raise ValueError(
                f"base_model_revision={given['base_model_revision']!r} is not the revision that is read, "
                f"model_revision={args.model_revision!r}; give model_revision alone"
            )
    return CLTConfig(**given)


def _facts_of_model(args: CLTTrainingArguments) -> dict[str, Any]:
    """Number of layers, width and hooks: of the activation cache, or of the language model, with its usual hooks."""
    if args.activation_cache is not None:
        from ..harvest.cache import read_manifest

        return read_manifest(args.activation_cache)
    model_config = _load_model_config(args)
    found = {}
    for name, attribute in (("num_layers", "num_hidden_layers"), ("d_model", "hidden_size")):
        found[name] = getattr(model_config, attribute, None)
        if found[name] is None:
            raise ValueError(
                f"model={args.model!r} does not say its {attribute} in config.json; choose a language model"
            )
    from ..harvest.sites import default_hooks  # brings in nnsight, which --help can do without

    found["feature_input_hook"], found["feature_output_hook"] = default_hooks(model_config.model_type)
    return found


def _load_model_config(args: CLTTrainingArguments):
    """The language model's own configuration (the text part where a model has several)."""
    from transformers import AutoConfig

    looks_local = args.model.startswith((".", "/", "~")) or args.model.count("/") > 1
    if looks_local and not os.path.isdir(args.model):
        raise OSError(f"model={args.model!r} is no folder; give a Hub name or an existing folder")
    if os.path.isdir(args.model) and not os.path.isfile(os.path.join(args.model, "config.json")):
        raise OSError(f"model={args.model!r} has no config.json; give a folder written by save_pretrained")
    try:
        config = AutoConfig.from_pretrained(
            args.model, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"model={args.model!r} cannot be loaded; check the name and the connection ({reason})"
        ) from error
    return config.get_text_config()


def _describe_fields():
    """Adds an entry per field to the class docstring, from the help texts that `--help` prints."""
    for entry, default in zip(fields(CLTTrainingArguments), CLTTrainingArguments().to_dict().values(), strict=True):
        hint = entry.type.__name__ if entry.type in (bool, int, float, str) else str(entry.type).replace("typing.", "")
        head = f"    {entry.name} (`{hint}`, *optional*, defaults to `{default!r}`):\n"
        CLTTrainingArguments.__doc__ += f"{head}            {entry.metadata['help']}\n    "


_describe_fields()


__all__ = ["CLTTrainingArguments", "SettingsLoader", "build_config", "parse_train_args"]
