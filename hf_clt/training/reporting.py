"""What a run tells: the figures of the progress bar, `metrics.jsonl`, and the facts for the model card."""

import importlib.metadata
import logging
import os
import platform
import shlex
import sys
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from .. import __version__
from ..configuration_clt import CLT_CONFIG_HELP, TOPK_FAMILY, CLTConfig
from ..files import as_json, format_number, write_text
from ..hub.report import is_dense, read_history
from ..sparsity import SparseFeatures
from .checkpoints import newest_usable
from .trackers import log_row


if TYPE_CHECKING:
    from .trainer import CLTTrainer

logger = logging.getLogger(__name__)


NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")
WIDE_WINDOW = 0.2  # share of features whose computation costs as much as that of all
VERSIONED = ("torch", "transformers", "accelerate", "datasets", "nnsight")


def progress_figures(row: dict) -> dict:
    """The figures of a log line that the progress bar shows."""
    return {
        "loss": f"{row['loss']:.4g}",
        "nmse": format_number(row["nmse"], ".3f"),
        "l0": f"{row['l0']:.0f}",
        "dead": format_number(row["dead_fraction"], ".1%"),
        "tok/s": f"{row['tokens_per_second']:.0f}",
    }


def warn_if_wide(features: SparseFeatures, config: CLTConfig) -> None:
    """Warns when jumprelu's straight-through window holds so many features that computing only these saves nothing."""
    layers = features.layers
    listed = sum(layer.indices.numel() for layer in layers)
    share = listed / max(1, layers[0].num_tokens * layers[0].num_features * len(layers))
    if config.activation_fn == "jumprelu" and share > WIDE_WINDOW:
        logger.warning(
            "%.0f %% of the features are active or inside the jumprelu window (jumprelu_bandwidth=%g): every step is "
            "as slow as a dense one; a smaller jumprelu_bandwidth makes it faster",
            100 * share,
            config.jumprelu_bandwidth,
        )


def warn_if_dense(row: dict, config: CLTConfig) -> bool:
    """Warns when after a quarter of training more than a tenth of the features are active; says whether it did."""
    per_layer = row["l0"] / config.num_layers
    if not is_dense(per_layer, config.num_features):
        return False
    logger.warning(
        "step %d: %.0f of %d features per layer are active on a token, more than a tenth; such a CLT is neither "
        "sparse nor fast: %s",
        row["step"],
        per_layer,
        config.num_features,
        "lower k" if config.activation_fn in TOPK_FAMILY else "raise sparsity_lambda, or use batchtopk",
    )
    return True


def write_row(trainer: "CLTTrainer", row: dict) -> None:
    """Appends a line to `metrics.jsonl` and sends it to the trackers; the main process does."""
    if not trainer.accelerator.is_main_process:
        return
    try:
        with open(trainer.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(as_json(row, indent=None))
    except OSError as error:
        raise OSError(
            f"metrics.jsonl cannot be written to {str(trainer.output_dir)!r} ({error.strerror}); "
            f"{newest_usable(trainer.output_dir)}"
        ) from error
    log_row(trainer.accelerator, row)


def truncate_metrics(output_dir: Path, step: int) -> None:
    """Drops the lines after `step` that a run wrote to `metrics.jsonl` between its last checkpoint and its end."""
    rows = takewhile(lambda row: row["step"] <= step, read_history(output_dir, was_killed=True))
    if (path := output_dir / "metrics.jsonl").is_file():
        write_text(path, "".join(as_json(row, indent=None) for row in rows))


def last_evaluated_step(output_dir: Path) -> int | None:
    """The step of the last evaluation in a run's `metrics.jsonl`; None if there is none."""
    return max((row["step"] for row in read_history(output_dir) if row["split"] == "heldout"), default=None)


def non_default_config(config: CLTConfig) -> dict:
    """Fields of the configuration that were chosen, for the model card."""
    of_model = [name for name in CLT_CONFIG_HELP if name.startswith(("base_model", "feature_"))]
    given = {name: getattr(config, name) for name in ("num_layers", "d_model", "num_features", "activation_fn")}
    plain = CLTConfig(**given, k=min(CLTConfig.k, config.num_features))
    names = [name for name in CLT_CONFIG_HELP if name not in (*of_model, *given)]
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(plain, name)}
    return {"num_features": config.num_features, "activation_fn": config.activation_fn, **chosen}


def hardware(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    return f"{os.cpu_count()} CPU cores"


def command_line(num_processes: int = 1) -> str | None:
    """
    The command that makes this run anew, as one would type it, the program by its short name; None where it was not
    started by a program of its own, such as in a notebook.
    """
    program, words = Path(sys.argv[0]), list(sys.argv[1:])
    if sys.argv[0].startswith("hf-clt "):  # set by hf_clt.commands
        command = sys.argv[0].split()[1]
        alone, together = ["hf-clt", command], ["-m", "hf_clt", command]
    elif program.suffix == ".py" and program.name not in ("__main__.py", *NOTEBOOKS):
        shown = f"scripts/{program.name}" if program.parent.name == "scripts" else program.name
        alone, together = ["python", shown], [shown]
    else:
        return None
    start = alone
    if num_processes > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
        machines = ["--standalone"] if local == num_processes else ["--nnodes", str(num_processes // local)]
        start = ["torchrun", *machines, "--nproc-per-node", str(local), *together]
    for at, word in enumerate(words):  # what was resumed is made anew without that
        if word.replace("_", "-").partition("=")[0] == "--resume-from-checkpoint":
            del words[at : at + (1 if "=" in word else 2)]
            break
    return shlex.join([*start, *words])


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    others = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {"python": platform.python_version(), "hf_clt": __version__} | others
