"""The model and the text of the quickstart, which come from installed packages alone."""

import ast
import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from scripts import prepare_quickstart as quickstart


ROOT = Path(__file__).parent.parent.parent

PARAGRAPH = (
    "A sparse dictionary describes what a layer computes. Each feature reads the residual stream, and only a few of "
    "them are active on any token. "
)
# Distinct long texts, none of which shares a run of words with another.
RIVER, MOUNTAIN, HARBOUR = (
    " ".join(
        f"the {subject} {verb} {'very ' * (i % 3)}slowly {place}." for i, place in enumerate(places) for verb in verbs
    )
    for subject, verbs, places in [
        ("river", ["bends", "rises", "freezes"], ["by the mill", "under ice", "in spring", "near home", "at dusk"]),
        ("mountain", ["looms", "crumbles", "glows"], ["over us", "in the east", "after rain", "all year", "at noon"]),
        (
            "harbour",
            ["empties", "wakes", "darkens"],
            ["before dawn", "with the tide", "on Sundays", "again", "at last"],
        ),
    ]
)


def test_docstrings_finds_docstrings_and_nothing_else():
    source = '''# a comment first
"""The module."""
# another: comment
VALUE = """no docstring"""


class Thing(
    Base,
):
    # why: because
    r"""
    The class.

        Indented.
    """

    def method(self, a: int = 3) -> str:  # noqa

        """The method."""
        text = f"""no docstring"""
        return call("""no docstring""")

    def other(self):
        \'\'\'The other method.\'\'\'
'''
    assert quickstart.docstrings(source) == [
        "The module.",
        "The class.\n\n    Indented.",
        "The method.",
        "The other method.",
    ]


@pytest.mark.parametrize("module", [inspect, ast, json, re, pytest, subprocess, textwrap])
def test_docstrings_agree_with_the_parser(module):
    source = inspect.getsource(module)
    holders = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    parsed = {ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, holders)}
    # a single-quoted docstring is missed on purpose, and escapes are not resolved
    expected = {text for text in parsed if text and "\n" in text and "\\" not in text}
    found = {text for text in quickstart.docstrings(source) if "\n" in text and "\\" not in text}
    assert found == expected


def test_docstrings_does_not_backtrack_on_long_comments():
    program = (
        "from scripts.prepare_quickstart import docstrings; "
        "banner = 'def f():\\n' + '    # # # # # # # # # # # # # # # #:\\n' * 12; "
        'assert docstrings(banner + \'    x = """no"""\') == []'
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PARAGRAPH * 4, True),
        (PARAGRAPH, False),  # too short
        ("| layer | nmse |\n|---|---|\n| 0 | 0.1234 |\n| 1 | 0.5678 |\n" * 10, False),
        (">>> x[0] += {'a': 1}[y] * 2 ** 3\n>>> f(x) == [1, 2, 3]\nTrue\n" * 10, False),
        ("Ein größerer Übungsänderungsöffner wäre schöner für Äpfel über Öfen. ".upper() * 8, True),
        ("これは英語ではない文章です。" * 40, False),
    ],
)
def test_is_prose(text, expected):
    assert quickstart.is_prose(text) == expected


def test_near_copies_of_earlier_documents_are_dropped():
    documents = [
        ("a", RIVER),
        ("b", MOUNTAIN),
        ("c", RIVER.replace("by the mill", "by the old bridge")),
        ("d", RIVER + " " + MOUNTAIN),
        ("e", HARBOUR + " " + RIVER[: len(RIVER) // 4]),
        ("f", "too short"),
    ]
    assert [package for package, _ in quickstart.without_near_copies(documents)] == ["a", "b", "e"]


@pytest.fixture
def packages(tmp_path):
    """Two roots of packages that cannot be imported."""
    files = {
        "site/one/__init__.py": f'"""{RIVER}"""\nraise ImportError\n',
        "site/one/tests/test_one.py": '"""A test: {HARBOUR}"""\n',
        "site/two.py": f'class Two:\n    """{MOUNTAIN}"""\n    this is no Python\n',
        "lib/three/deep/module.py": f'def three():\n    """\n    {HARBOUR}\n    """\n',
        "lib/three/short.py": '"""Too short."""\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "lib" / "latin.py").write_bytes('"""Größe"""'.encode("latin-1"))
    return [tmp_path / "site", tmp_path / "lib"]


def test_collect_documents_reads_without_importing(packages):
    assert quickstart.collect_documents(packages) == [("two", MOUNTAIN), ("one", RIVER), ("three", HARBOUR)]


def test_prepare_text_is_complete_mixed_and_the_same_each_time(packages, tmp_path, capsys):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    quickstart.prepare_text(packages, first)
    quickstart.prepare_text(packages, second)
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("*.partial"))

    rows = [json.loads(line) for line in first.read_text(encoding="utf-8").splitlines()]
    assert {RIVER, MOUNTAIN, HARBOUR} < {row["text"] for row in rows}
    sources = [row["source"] for row in rows]
    assert set(sources) == {"pydoc_data", "one", "two", "three"}
    assert sources.count("pydoc_data") > 40  # Python's own reference is on every machine
    assert max(sources.index(name) for name in ("one", "two", "three")) < len(rows) - 3  # mixed over packages
    assert f"{len(rows):,} documents, {sum(len(row['text']) for row in rows):,} characters" in capsys.readouterr().out


def test_a_second_call_changes_nothing(tmp_path, monkeypatch, capsys):
    def prepare_text(path):
        path.write_text("text")

    def prepare_model(path):
        path.mkdir()

    monkeypatch.setattr(quickstart, "prepare_machine_text", prepare_text)
    monkeypatch.setattr(quickstart, "prepare_smollm2", prepare_model)
    folder = tmp_path / "new" / "quickstart"
    quickstart.main(["--output-dir", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == ["model", "text.jsonl"]
    (folder / "text.jsonl").write_text("mine")
    capsys.readouterr()
    quickstart.main(["--output-dir", str(folder)])
    assert capsys.readouterr().out.count("already there") == 2
    assert (folder / "text.jsonl").read_text() == "mine"


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(quickstart, "MODEL_PACKAGE", "hf_clt_no_such_package")
    with pytest.raises(FileNotFoundError, match="make quickstart"):
        quickstart.find_gguf()


@pytest.mark.slow
def test_prepare_model_keeps_every_weight_of_the_file(tmp_path):
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoModelForCausalLM

    gguf = quickstart.find_gguf()
    folder = tmp_path / "model"
    quickstart.prepare_model(gguf, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.dtype) == (30, 576, torch.float32)

    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    weights = model.state_dict()
    for ours, theirs in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.29.mlp.up_proj.weight", "blk.29.ffn_up.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ]:
        expected = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
        torch.testing.assert_close(weights[ours], expected, rtol=0, atol=0)
    assert quickstart.continue_greedily(folder, "The opposite of hot is").strip().startswith("cold")


@pytest.mark.slow
def test_the_text_of_this_machine_is_much_and_mixed(tmp_path):
    path = tmp_path / "text.jsonl"
    quickstart.prepare_machine_text(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(len(row["text"]) for row in rows) > 10_000_000
    assert len({row["source"] for row in rows[:200]}) > 10  # what is held out stands for the rest
