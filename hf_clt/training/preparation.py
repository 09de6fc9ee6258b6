"""What a run reads, and the initial values of its CLT that come from data."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..configuration_clt import TOPK_FAMILY, CLTConfig
from ..harvest.cache import ActivationCache, CachedTokens
from ..harvest.harvester import Harvester, check_context_size, load_language_model
from ..harvest.normalization import (
    estimate_statistics,
    load_statistics,
    set_decoder_directions,
    set_encoder_directions,
    set_firing_rate,
    set_output_bias,
    warn_if_lost,
)
from ..harvest.tokens import open_text
from ..sharding import gather_tokens
from .arguments import CLTTrainingArguments
from .processes import together


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .trainer import CLTTrainer

RATE_SAMPLE = 8192  # tokens on which the initial firing rate is set
CLUSTERED_TOKENS = 2**16  # whose inputs give encoders their directions, or 8 per feature where that is more
AHEAD_TOKENS = 2**20  # that may be read ahead, with what is known of them: 26 MB


def open_activations(
    args: CLTTrainingArguments,
    config: CLTConfig,
    name: str | None,
    accelerator: Accelerator,
    harvester: Harvester | None,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> tuple:
    """
    What gives activations (a [`Harvester`] or an [`ActivationCache`]), and the extraction batches to train and (or
    None) to evaluate on.

    Args:
        args, config: The run.
        name: Of the language model.
        accelerator: Says which share of the text is this process's.
        harvester, tokenizer: Of a language model that is there; None: `name` is loaded, unless a cache is read.
    """
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    if args.activation_cache is not None:
        cache = ActivationCache(args.activation_cache)
        tokens = CachedTokens(cache, "train", **share, seed=args.seed if args.cache_shuffle else None)
        return cache, tokens, CachedTokens(cache, "heldout", **share) if args.eval_tokens else None
    if harvester is None:
        if name is None:
            raise ValueError("model=None: give the Hub name or folder of the language model to train on")
        model, tokenizer = load_language_model(
            name,
            revision=args.model_revision,
            dtype=args.model_dtype,
            trust_remote_code=args.trust_remote_code,
            device=accelerator.device,
        )
        harvester = Harvester(model, config.feature_input_hook, config.feature_output_hook)
    check_context_size(harvester.model.config, args.context_size)
    heldout = open_text(args, tokenizer, heldout=True, **share) if args.eval_tokens else None
    return harvester, open_text(args, tokenizer, **share, read_ahead=batches_ahead(args, accelerator.device)), heldout


def batches_ahead(args: CLTTrainingArguments, device: torch.device) -> int:
    """
    Extraction batches to read ahead while a GPU works: as many as a fill of the buffer asks for, unless they are very
    large. On a CPU none: a thread that tokenizes would take its cores from the language model and the CLT.
    """
    if device.type == "cpu":
        return 0
    return max(1, min(args.n_batches_in_buffer, AHEAD_TOKENS // (args.store_batch_size_prompts * args.context_size)))


def initialize_from_data(trainer: "CLTTrainer") -> None:
    """Sets the statistics of the normalisation, and in a new CLT what follows from activations."""
    args, clt, accelerator = trainer.args, trainer.model, trainer.accelerator
    statistics = read_statistics(trainer)
    if statistics is not None:
        clt.set_normalization(**statistics, reparametrize=not trainer.is_new)
        if trainer.buffer.dtype != trainer.harvester.dtype and accelerator.is_main_process:
            for side in ("in", "out"):
                mean, std = statistics[f"mean_{side}"], statistics[f"std_{side}"]
                warn_if_lost(mean, std, trainer.buffer.dtype, "--buffer-dtype")
    if not trainer.is_new:
        return
    together(accelerator, trainer.buffer.fill)
    size = 1 if trainer.shard is None else trainer.shard.size

    def sample(name: str, *slots: torch.Tensor | slice | int) -> torch.Tensor:
        rows = getattr(trainer.buffer, name)[slots].to(accelerator.device)
        return gather_tokens(trainer.shard, {name: rows})[name]

    shuffled = torch.tensor(list(dict.fromkeys(trainer.buffer.order.tolist())))  # each once, whatever the passes
    if args.initial_weights == "data":
        count = -(-max(CLUSTERED_TOKENS, 8 * clt.config.num_features) // size)
        for layer in tqdm(
            range(clt.config.num_layers), "Initial features", unit="layer", disable=not trainer.progress
        ):
            slots = shuffled.roll(-layer * len(shuffled) // clt.config.num_layers)[:count]  # begins with other tokens
            set_encoder_directions(clt, layer, sample("inputs", slots, layer))
    first = slice(0, min(RATE_SAMPLE // size, len(shuffled)))  # the slots fill from the first on
    if statistics is None:
        set_output_bias(clt, sample("labels", first))
    rate = args.initial_feature_rate
    if rate is None:
        rate = 0.0 if clt.config.activation_fn in TOPK_FAMILY else min(0.02, 64 / clt.config.num_features)
        if args.target_l0 is not None:  # few updates could not make more fire
            rate = max(rate, min(0.5, args.target_l0 / clt.config.num_features))
    if rate > 0:
        set_firing_rate(clt, sample("inputs", first), rate)
    if args.initial_weights == "data":
        set_decoder_directions(clt, sample("inputs", first), sample("labels", first))


def read_statistics(trainer: "CLTTrainer") -> dict | None:
    """Mean and standard deviation of inputs and targets, estimated or from a file; None where they are not used."""
    args = trainer.args
    if args.normalization_method == "none":
        return None
    if args.normalization_file is not None:
        return load_statistics(args.normalization_file)
    estimates = args.normalization_method == "estimated_mean_std"
    return estimate_statistics(
        trainer.tokens,
        trainer.harvester,
        args.normalization_estimation_batches if estimates else None,
        trainer.accelerator,
        trainer.progress,
        trainer.skip_bad,
        partial(together, trainer.accelerator),
    )
