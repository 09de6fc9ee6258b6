"""What `make quickstart` leaves, in small, for tests that run what the documentation says of it."""

import contextlib
import json
import shutil
from pathlib import Path

from hf_clt import CLTTrainer, CLTTrainingArguments
from hf_clt.training.initial_config import build_config


def write_text(path: Path, text: str) -> None:
    """A `.jsonl` file with a document per paragraph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": paragraph}) + "\n" for paragraph in text.split("\n\n")]
    path.write_text("".join(lines), encoding="utf-8")


def write_quickstart(root: Path, tiny_gpt2: str, text: str, **changes) -> None:
    """The language model, the text and a trained CLT in `root/quickstart`; `changes` of the training's arguments."""
    write_text(root / "quickstart" / "text.jsonl", text)
    shutil.copytree(tiny_gpt2, root / "quickstart" / "model")
    args = CLTTrainingArguments(
        model="quickstart/model",
        dataset="quickstart/text.jsonl",
        batch_size=64,
        n_batches_in_buffer=2,
        normalization_estimation_batches=2,
        eval_tokens=200,
        output_dir="quickstart/clt",
        disable_progress_bar=True,
        **changes,
    )
    with contextlib.chdir(root):
        CLTTrainer(args, build_config(args, {"num_features": 64, "activation_fn": "batchtopk", "k": 4})).train()
