"""Trains a cross-layer transcoder; the options are the fields of [`CLTTrainingArguments`] and [`CLTConfig`]."""

import os
import sys

from huggingface_hub.errors import StrictDataclassError

from ..command import one_line_errors, print_next, sigterm_as_ctrl_c
from ..files import one_line
from ..training.initial_config import build_config
from ..training.parser import parse_train_args
from ..training.processes import OtherProcessFailed, OtherProcessGone, disconnect


# What a user can mend. Anything else is a bug and keeps its traceback.
USER_ERRORS = (
    ValueError,
    OSError,
    StrictDataclassError,
    FloatingPointError,
    OtherProcessFailed,
    OtherProcessGone,
)


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    # Each process may fail for a reason of its own (its text, its memory), so the others speak too, by rank.
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"[rank {rank}] "
    try:
        with sigterm_as_ctrl_c():  # until training starts there is nothing to save
            status = train(argv)
    except KeyboardInterrupt as stop:
        # The trainer says at which step it stopped once its checkpoint is written; earlier there is nothing to keep.
        written = f" ({stop}); continue with --resume-from-checkpoint latest" if str(stop) else ""
        print(f"{who}interrupted{written}", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        if os.environ.get("HF_CLT_DEBUG") == "1":
            raise
        text = "; ".join([str(error), *getattr(error, "__notes__", [])])  # the trainer notes what to go on from
        print(f"{who}error: {one_line(text)}", file=sys.stderr)
        return 2
    disconnect()  # here, where no error holds the trainer; after a failure of one, others may still wait for it
    return status


def train(argv: list[str] | None = None) -> int:
    args, config_kwargs = parse_train_args(argv)
    from ..evaluation.evaluate import format_replacement  # --help answers without these
    from ..hub.report import format_metrics_table
    from ..training.setup import load_initial_clt
    from ..training.trainer import CLTTrainer

    if args.init_from is not None:
        trainer = CLTTrainer(args, model=load_initial_clt(args, config_kwargs))
    else:
        trainer = CLTTrainer(args, build_config(args, config_kwargs))
    trainer.train()
    metrics = trainer.evaluate() if args.eval_tokens else None
    if trainer.accelerator.is_main_process:
        if metrics is not None:
            print(format_metrics_table(metrics))
            if args.eval_replacement:
                print(format_replacement(metrics))
        print("time: " + ", ".join(f"{name} {share:.0%}" for name, share in trainer.time_shares().items()))
        print(f"The CLT is in {args.output_dir}")
        print_next("evaluate", args.output_dir, "--dataset", args.dataset or "TEXT", "--replacement")
    return 0
