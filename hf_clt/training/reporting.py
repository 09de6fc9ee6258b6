"""What a run tells: the figures of the progress bar, `metrics.jsonl`, and the facts for the model card."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from .. import __version__
from ..configuration_clt import CLTConfig
from ..files import format_number, write_text


NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")
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


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step` that a run wrote between its last checkpoint and its end."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            break
        if row["step"] > step:
            break
        kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


def last_evaluated_step(path: Path) -> int | None:
    """The step of the last evaluation in a `metrics.jsonl`; None if there is none."""
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows if row["split"] == "heldout"]
    return steps[-1] if steps else None


def non_default_config(config: CLTConfig) -> dict:
    """Fields of the configuration that were chosen, for the model card."""
    plain = CLTConfig(
        num_layers=config.num_layers,
        d_model=config.d_model,
        num_features=config.num_features,
        activation_fn=config.activation_fn,
        k=min(CLTConfig.k, config.num_features),
    )
    names = ("k", "k_scope", "jumprelu_threshold", "jumprelu_bandwidth", "decoder_reach", "decoder_tying")
    names += ("skip_connection", "sparsity_lambda", "sparsity_c", "preactivation_coef", "aux_coef", "aux_k")
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


__all__ = [
    "command_line",
    "hardware",
    "last_evaluated_step",
    "non_default_config",
    "progress_figures",
    "truncate_metrics",
    "versions",
]
