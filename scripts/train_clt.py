#!/usr/bin/env python
"""Trains a cross-layer transcoder: `python scripts/train_clt.py --help` says how."""

import os
import sys

from huggingface_hub.errors import StrictDataclassError

from hf_clt.training.arguments import build_config, parse_train_args


# What a user can mend. Anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, StrictDataclassError)


def main(argv=None) -> int:
    try:
        return train(argv)
    except USER_ERRORS as error:
        if os.environ.get("HF_CLT_DEBUG") == "1":
            raise
        # Each process may fail for a reason of its own (its text, its memory), so the others speak too, by rank.
        rank = os.environ.get("RANK", "0")
        who = "" if rank == "0" else f"[rank {rank}] "
        print(f"{who}error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def train(argv=None) -> int:
    args, config_kwargs = parse_train_args(argv)

    # After the parsing, so that --help and a mistyped option are answered without waiting for these imports.
    from hf_clt import CLTTrainer, CrossLayerTranscoder
    from hf_clt.evaluation.report import format_metrics_table

    if args.init_from is not None:
        clt = CrossLayerTranscoder.from_pretrained(args.init_from, **config_kwargs)
        trainer = CLTTrainer(args, model=clt)
    else:
        trainer = CLTTrainer(args, build_config(args, config_kwargs))
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        print(format_metrics_table(metrics))
        print(f"The CLT is in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
