"""`hf-clt`: every command is there, named in its own help, and what the scripts run."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_clt import CLTConfig, __version__
from hf_clt.commands import COMMANDS, main, train
from hf_clt.commands.heldout import TEXT_FIELDS
from hf_clt.training.arguments import CLTTrainingArguments


ROOT = Path(__file__).parents[1]


def test_every_module_is_a_command():
    modules = {path.stem for path in (ROOT / "hf_clt" / "commands").glob("*.py")}
    assert modules - {"__init__", "heldout"} == set(COMMANDS)  # heldout: options that several share


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command_and_says_what_it_does(command, capsys):
    before = list(sys.argv)
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and sys.argv == before
    text = capsys.readouterr().out
    assert text.startswith(f"usage: hf-clt {command} ")
    examples = re.findall(r"^  hf-clt (\w+)", text, re.M)
    assert set(examples) <= set(COMMANDS) and (command in examples or command == "convert")


@pytest.mark.parametrize("command", ["evaluate", "features", "finish", "jumprelu", "cache"])
def test_the_text_is_named_and_cut_as_in_training(command):
    words = {"features": ["clt", "--output", "out"], "finish": ["clt", "out"], "jumprelu": ["clt", "out"]}
    words = words.get(command, ["clt"])
    options = importlib.import_module(f"hf_clt.commands.{command}").make_parser().parse_args(words)
    run = CLTTrainingArguments(model="lm", dataset="text")
    for name in set(TEXT_FIELDS) - {
        "dataset",
        "store_batch_size_prompts",
    }:  # what does not change the result may differ
        assert getattr(options, name) == getattr(run, name), name


def test_the_training_script_is_the_command():
    assert runpy.run_path(str(ROOT / "scripts" / "train_clt.py"))["main"] is train.main


def test_the_list_of_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and meaning in text for name, meaning in COMMANDS.items())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf_clt {__version__}\n"


@pytest.mark.parametrize("words", [[], ["tain"], ["train"], ["info", "--nothing"]])
def test_wrong_words_are_one_line(words, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_the_installed_program_and_the_module():
    for program in ([str(Path(sys.executable).parent / "hf-clt")], [sys.executable, "-m", "hf_clt"]):
        done = subprocess.run([*program, "--version"], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (0, f"hf_clt {__version__}\n"), done.stderr


def next_commands():
    """What each `print_next` names, where all of its words are written there: what is computed is "1"."""
    for path in sorted((ROOT / "hf_clt").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != "print_next":
                continue
            if not any(isinstance(word, ast.Starred) for word in call.args):
                words = [word.value if isinstance(word, ast.Constant) else "1" for word in call.args]
                yield pytest.param(words, id=f"{path.stem}: {' '.join(words)}")


@pytest.mark.parametrize("words", list(next_commands()))
def test_the_command_that_is_named_next_takes_these_words(words):
    if words[0] == "train":  # whose parser looks for the model and the cache
        known = {*CLTTrainingArguments().to_dict(), *CLTConfig().to_dict()}
        assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= known
    else:
        assert importlib.import_module(f"hf_clt.commands.{words[0]}").make_parser().parse_args(words[1:])
