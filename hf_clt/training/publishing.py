"""The release of a run: its files, its card, and its pushes to the Hub."""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration_clt import CLTConfig
from ..hub.card import save_model_card
from ..hub.report import read_history
from .output_folder import PUSH_FOLDER
from .processes import any_process
from .reporting import command_line, hardware, non_default_config, versions


if TYPE_CHECKING:
    from .trainer import CLTTrainer

logger = logging.getLogger(__name__)


def write_release(trainer: "CLTTrainer", folder: Path) -> None:
    """Writes the CLT as it is now, its card and plots, with its metrics where it was measured as it is now."""
    trainer.read_clocks()
    is_main = trainer.accelerator.is_main_process
    if is_main or (trainer.shard is not None and trainer.layout.replica == 0):
        trainer.model.save_pretrained(folder, is_main_process=is_main)
    if not is_main:
        return
    step, metrics = trainer.last_evaluation or (None, None)
    save_model_card(
        folder,
        CLTConfig.from_pretrained(folder),  # of the release, which may be untied where the live one is not
        metrics if step == trainer.step else None,
        training_facts(trainer),
        command_line(trainer.accelerator.num_processes),
        license=trainer.args.license,
        history=read_history(trainer.output_dir),
    )


def push_in_background(trainer: "CLTTrainer") -> None:
    """Writes the CLT as it is now beside the output and begins to push it, unless a push is under way."""
    if any_process(trainer.accelerator, trainer.background_push.is_running):
        logger.info("step %d: the push before is still under way, this one is left out", trainer.step)
        return
    folder = trainer.output_dir / PUSH_FOLDER
    write_release(trainer, folder)
    if trainer.accelerator.is_main_process:
        trainer.background_push.start(folder, f"Step {trainer.step}")


def push_finished(trainer: "CLTTrainer") -> None:
    """Pushes the finished CLT after a push that may still be under way; a note on an error says what is safe."""
    if trainer.background_push is not None:
        trainer.background_push.wait()
        if trainer.accelerator.is_main_process:
            shutil.rmtree(trainer.output_dir / PUSH_FOLDER, ignore_errors=True)
    try:
        trainer.push_to_hub()
    except Exception as error:
        error.add_note(
            f"the CLT is finished, in {str(trainer.output_dir)!r}; push it with `hf-clt push {trainer.output_dir} "
            f"{trainer.args.hub_model_id}`"
        )
        raise


def training_facts(trainer: "CLTTrainer") -> dict:
    """What the model card says about the run; only what is known."""
    args = trainer.args
    settings = {**args.non_default(), **non_default_config(trainer.config)}
    for name in ("output_dir", "resume_from_checkpoint", "overwrite_output_dir"):
        settings.pop(name, None)
    return {
        "dataset": args.dataset,
        "dataset_config": args.dataset_config,
        "dataset_split": args.dataset_split,
        "context_size": args.context_size,
        "eval_tokens": args.eval_tokens,
        "prepend_bos": trainer.tokens.prepend_bos,
        "normalization_method": args.normalization_method,
        "num_processes": trainer.accelerator.num_processes,
        "steps": trainer.step,
        "tokens": trainer.tokens_seen,
        "duration_seconds": trainer.seconds["total"],
        "hardware": hardware(trainer.accelerator),
        "settings": settings,
        "versions": versions(),
    }
