"""Two processes on CPU, in one launch: each trains on its own tokens, and what is released and measured is of both."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import ROOT, launch


# What each process leaves behind for the tests to look at.
WORKER = """
import json, os, sys
import torch
from safetensors.torch import save_file
from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments

arguments, config, folder = json.loads(sys.argv[1])
trainer = CLTTrainer(CLTTrainingArguments(**arguments), CLTConfig(**config))
rank = trainer.accelerator.process_index
harvester, documents = trainer.buffer.harvester, set()

class Recording:
    num_layers, d_model = harvester.num_layers, harvester.d_model
    check = harvester.check

    def read(self, batch, dtype):
        documents.update(batch["documents"][batch["counted"]].tolist())
        return harvester.read(batch, dtype)

trainer.buffer.harvester = Recording()
heldout = {int(d) for batch in trainer.heldout for d in batch["documents"][batch["counted"]]}
distribute, distributed = trainer._distribute, []

def keeping(optimizer):
    distributed.append(distribute(optimizer))
    return distributed[-1]

trainer._distribute = keeping
clt = trainer.train()
metrics = trainer.evaluate()
heldout_tokens = sum(int(batch["counted"].sum()) for batch in trainer.heldout)
seen = {"documents": sorted(documents), "heldout": sorted(heldout), "heldout_tokens": heldout_tokens}
seen |= {"metrics": metrics, "processes": trainer.accelerator.num_processes}
seen["views"] = distributed[0][0].gradient_as_bucket_view
with open(f"{folder}/rank-{rank}.json", "w") as file:
    json.dump(seen, file)
tensors = {name: value.contiguous() for name, value in clt.state_dict().items()}
save_file(tensors | {"steps_since_fired": trainer.steps_since_fired}, f"{folder}/rank-{rank}.safetensors")
"""


@pytest.fixture(scope="module")
def launched(tiny_gpt2, small_text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-processes")
    arguments = {
        "model": tiny_gpt2,
        "dataset": small_text_file,
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "context_size": 32,
        "store_batch_size_prompts": 2,
        "n_batches_in_buffer": 20,  # all of the text
        "batch_size": 64,
        "eval_tokens": 300,
        "training_steps": 6,
        "log_interval": 2,
        "checkpoint_interval": 4,
        "normalization_estimation_batches": 3,
        "disable_progress_bar": True,
    }
    config = {"num_layers": 2, "d_model": 64, "num_features": 48, "activation_fn": "jumprelu"}
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    launch(2, folder / "worker.py", json.dumps([arguments, config, str(folder)]))
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    tensors = [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]
    return folder / "run", ranks, tensors


def test_there_are_two_that_know_of_each_other(launched):
    assert [rank["processes"] for rank in launched[1]] == [2, 2]


def test_gradients_are_not_kept_twice(launched):
    assert [rank["views"] for rank in launched[1]] == [True, True]


def test_they_read_other_text(launched):
    one, two = (set(rank["documents"]) for rank in launched[1])
    heldout = set(launched[1][0]["heldout"]) | set(launched[1][1]["heldout"])
    assert len(one) > 3 and len(two) > 3
    assert one.isdisjoint(two)
    assert heldout.isdisjoint(one | two)
    assert one | two | heldout == set(range(max(one | two) + 1))


def test_they_hold_the_same_clt(launched):
    """Weights, statistics and counters; what is released is it."""
    folder, _, (one, two) = launched
    assert one.keys() == two.keys() >= {"mean_in", "std_out", "steps_since_fired", "encoders.0.weight"}
    for name in one:
        assert torch.equal(one[name], two[name]), name
    for layer in range(2):
        released = load_file(folder / f"W_enc_{layer}.safetensors")
        assert all(value.isfinite().all() for value in released.values())
        folded = one[f"encoders.{layer}.weight"] / one["std_in"][layer]
        torch.testing.assert_close(released[f"W_enc_{layer}"], folded)


def test_the_metrics_are_over_both(launched):
    folder, (one, two), _ = launched
    assert one["metrics"] == two["metrics"]
    assert one["heldout_tokens"] > 0 and two["heldout_tokens"] > 0
    assert one["metrics"]["num_tokens"] == one["heldout_tokens"] + two["heldout_tokens"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 4, 6]  # written by one of them
    assert [row["step"] for row in rows if row["split"] == "heldout"] == [6]
    assert train[0]["tokens"] == 2 * 64
    assert all(math.isfinite(row["loss"]) for row in train)


def test_a_checkpoint_has_both_positions_in_the_text(launched):
    folder = launched[0] / "checkpoint-4"
    assert json.loads((folder / "state.json").read_text())["num_processes"] == 2
    positions = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [values["buffer"]["text"]["settings"]["rank"] for values in positions] == [0, 1]
    assert load_file(folder / "rank-0.safetensors").keys() >= {"order", "generator"}


def test_processes_that_do_not_know_of_each_other_are_refused(tiny_gpt2, small_text_file, tmp_path):
    """WORLD_SIZE says two, and nothing else does: the misuse that would let two runs fight over one folder."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "RANK", "LOCAL_"))
    }
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train_clt.py"),
        "--model",
        tiny_gpt2,
        "--dataset",
        small_text_file,
    ]
    done = subprocess.run(
        [*command, "--num-features", "16", "--output-dir", str(tmp_path / "run"), "--context-size", "32"],
        env=environment | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "WORLD_SIZE=2" in errors[0] and "accelerate launch" in errors[0]
    assert not (tmp_path / "run").exists()
