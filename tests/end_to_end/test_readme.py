"""Runs every code block of the README, in a folder where tiny stand-ins lie under the names that it uses."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_clt.commands import cache as cache_activations
from hf_clt.commands.train import main
from tests.end_to_end.small_quickstart import write_quickstart, write_text


ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
# The sizes of SmolLM2 and of real runs, and those of the stand-in.
SIZES = {"num_layers=30": "num_layers=2", "d_model=576": "d_model=64", "training_steps=20": "training_steps=3"}
SMALL_RUN = ["--training-steps", "2", "--batch-size", "64", "--n-batches-in-buffer", "2", "--eval-tokens", "200"]
SMALL_RUN += ["--num-features", "64", "--k", "4", "--normalization-estimation-batches", "2"]


@pytest.fixture(scope="module")
def folder(tiny_gpt2, text, tmp_path_factory):
    """A folder with what the README's paths and Hub names stand for, in small."""
    root = tmp_path_factory.mktemp("readme")
    write_quickstart(root, tiny_gpt2, text, training_steps=3)
    write_text(root / "monology/pile-uncopyrighted/text.jsonl", text)
    shutil.copytree(tiny_gpt2, root / "openai-community/gpt2")
    shutil.copytree(ROOT / "scripts", root / "scripts")
    return root


@pytest.mark.parametrize("block", [code for kind, code in BLOCKS if kind == "python"])
def test_python_block_runs(block, folder, monkeypatch, capsys, fresh_accelerate):
    monkeypatch.chdir(folder)
    for size, small in SIZES.items():
        block = block.replace(size, small)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert re.search(r"\d", capsys.readouterr().out)  # each block prints figures


def test_snippet_of_the_model_card_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    card = Path("quickstart/clt/README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    exec(compile(snippet, "model card", "exec"), {"__name__": "card"})
    assert "layer 1: features" in capsys.readouterr().out


def commands():
    for kind, code in BLOCKS:
        if kind == "bash":
            yield from (line for line in code.replace("\\\n", " ").splitlines() if line.strip())


@pytest.mark.parametrize("command", [c for c in commands() if "hf-clt cache" in c])
def test_caching_command_runs(command, folder, monkeypatch, capsys, fresh_accelerate):
    words = shlex.split(command)
    monkeypatch.chdir(folder)
    options = words[words.index("cache") + 1 :]
    assert cache_activations.main([*options, "--eval-tokens", "200", "--max-tokens", "2000"]) == 0
    assert "tokens to train on" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in commands() if "scripts/train_clt.py" in c])
def test_training_command_runs(command, folder, monkeypatch, capsys, fresh_accelerate):
    # `accelerate launch` itself is tested in tests/distributed; eight processes are too many here.
    words = shlex.split(command)
    options = words[words.index("scripts/train_clt.py") + 1 :]
    monkeypatch.chdir(folder)
    assert main([*options, *SMALL_RUN]) == 0
    assert "NMSE" in capsys.readouterr().out
    assert (folder / options[options.index("--output-dir") + 1] / "config.json").is_file()


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make")])
def test_make_target_exists(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_every_block_is_covered():
    assert {kind for kind, _ in BLOCKS} == {"python", "bash"}
    covered = ("scripts/train_clt.py", "hf-clt cache")
    assert all(c.startswith("make ") or any(script in c for script in covered) for c in commands())
