"""Harvests a language model's activations to disk, to train many CLTs on them without running the model again.

  hf-clt cache CACHE --model openai-community/gpt2 --dataset monology/pile-uncopyrighted \\
      --max-tokens 2_000_000
  hf-clt train --activation-cache CACHE --num-features 6144

Several processes (`accelerate launch ... -m hf_clt cache ...`) write a share of the text each. Interrupted,
the same command goes on where the last shard ended.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from ..command import OneLineParser, one_line_errors, print_next
from ..configuration_clt import FEATURE_INPUT_HOOKS, FEATURE_OUTPUT_HOOKS
from ..device import prompts_by_memory, total_memory, usual_model_dtype
from ..files import format_size, local_or_hub
from ..training.arguments import CACHED, CPU_DEFAULTS
from .heldout import add_text_options


HOOKS = {"feature_input_hook": FEATURE_INPUT_HOOKS, "feature_output_hook": FEATURE_OUTPUT_HOOKS}


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("cache", metavar="CACHE", type=Path, help="folder to write to, or to go on writing to")
    add_text_options(parser)
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--max-tokens", type=int, metavar="N", help="tokens to train on, besides the held-out ones (default: all text)"
    )
    written.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "int8"),
        default="bfloat16",
        help="number format on disk; int8 has 255 levels per layer and dimension (default: bfloat16)",
    )
    written.add_argument("--shard-megabytes", type=int, default=500, metavar="N", help="size of a file (default: 500)")
    for name, hooks in HOOKS.items():
        written.add_argument("--" + name.replace("_", "-"), choices=hooks, help="default: by the language model")
    written.add_argument("--verify", action="store_true", help="only compare a finished cache with its checksums")
    return parser


@one_line_errors(interrupted="the same command goes on after the last whole shard")
def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    from accelerate import PartialState  # --help answers without these

    from ..harvest.cache import ActivationCache, write_cache
    from ..harvest.harvester import Harvester, check_context_size, load_language_model
    from ..harvest.sites import default_hooks
    from ..harvest.tokens import open_text
    from ..training.output_folder import lock_folder
    from ..training.processes import connect_hosts, disconnect, wait_for_all
    from ..training.setup import check_num_processes, take_device

    if options.verify:
        ActivationCache(options.cache).verify(progress=not options.disable_progress_bar)
        print(f"{options.cache}: all shards are as they were written")
        return 0
    for name in ("model", "dataset"):
        if getattr(options, name) is None:
            raise ValueError(f"{name} is missing; give --{name}")
        setattr(options, name, local_or_hub(getattr(options, name)))
    for name in ("max_tokens", "shard_megabytes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} is below 1; give a positive number")
    state = PartialState(cpu=take_device(options.device).type == "cpu")
    check_num_processes(state.num_processes)
    connect_hosts(state)
    options.model_dtype = options.model_dtype or usual_model_dtype(state.device)
    model, tokenizer = load_language_model(
        options.model,
        revision=options.model_revision,
        dtype=options.model_dtype,
        trust_remote_code=options.trust_remote_code,
        device=state.device,
    )
    check_context_size(model.config, options.context_size)
    if options.store_batch_size_prompts is None:
        options.store_batch_size_prompts = CPU_DEFAULTS["store_batch_size_prompts"]
        if state.device.type == "cuda":
            config = model.config.get_text_config()
            block_bytes = 2 * 2 * config.num_hidden_layers * config.hidden_size * options.context_size
            options.store_batch_size_prompts = prompts_by_memory(block_bytes, total_memory(state.device))
    usual = default_hooks(model.config.get_text_config().model_type)
    hooks = [getattr(options, name) or default for name, default in zip(HOOKS, usual, strict=True)]
    rank, world_size = state.process_index, state.num_processes
    streams = {
        split: open_text(options, tokenizer, heldout=split == "heldout", rank=rank, world_size=world_size)
        for split in (("heldout", "train") if options.eval_tokens else ("train",))
    }
    lock = None
    if state.is_main_process:
        options.cache.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(options.cache)
    try:
        manifest = write_cache(
            options.cache,
            Harvester(model, *hooks),
            streams,
            {name: getattr(options, name) for name in CACHED if name != "prepend_bos"},
            dtype=options.dtype,
            max_tokens=options.max_tokens,
            shard_bytes=options.shard_megabytes * 10**6,
            rank=rank,
            world_size=world_size,
            wait=partial(wait_for_all, state),
            progress=state.is_local_main_process and not options.disable_progress_bar,
        )
    finally:
        if lock is not None:
            os.close(lock)
    if state.is_main_process:
        shards = [shard for split in manifest["splits"].values() for own in split["shards"] for shard in own]
        size, tokens = sum(shard["bytes"] for shard in shards), sum(shard["tokens"] for shard in shards)
        print(
            f"{manifest['splits']['train']['tokens']:,} tokens to train on and "
            f"{manifest['splits']['heldout']['tokens']:,} held out are in {options.cache}: {format_size(size)} in "
            f"{len(shards)} files, {size / tokens:,.0f} bytes per token"
        )
        print_next("train", "--activation-cache", options.cache, "--num-features", "N")
    disconnect()
    return 0
