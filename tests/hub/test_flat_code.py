"""The code of a CLT in one file. That it runs where hf_clt is not installed is tested in hub_client.py."""

import ast
import importlib
import json
import sys

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from hf_clt.hub import flat_code as module
from hf_clt.hub.flat_code import AUTO_MAP, CODE_FILE, flat_code, set_auto_map


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / CODE_FILE
    path.write_text(flat_code())
    return path


def test_needs_what_transformers_brings_and_no_file_beside_it(path):
    assert get_relative_imports(path) == []
    brought = {"huggingface_hub", "numpy", "safetensors", "torch", "transformers", "yaml"}
    assert set(get_imports(path)) - set(sys.stdlib_module_names) == brought


def test_has_each_module_once_after_what_it_imports(path):
    titles = [line.split()[2] for line in path.read_text().splitlines() if line.startswith("# -- ") and ".py " in line]
    assert len(titles) == len(set(titles))
    for name, needs in (
        (
            "modeling_clt",
            {"configuration_clt", "checkpoint_format", "download", "losses", "kernels/decode"},
        ),
        ("partial_clt", {"modeling_clt"}),
        ("kernels/decode", {"kernels/rows", "kernels/encode"}),
    ):
        before = titles[: titles.index(f"{name}.py")]
        assert {f"{needed}.py" for needed in needs} <= set(before)
    assert titles[-1] == "partial_clt.py" and "kernels/triton_rows.py" not in titles


def test_every_name_of_the_modules_is_defined(path):
    defined = {name for name, _ in module._defined(path.read_text())}
    for name in ("configuration_clt", "sparsity", "kernels.rows", "kernels.encode", "losses", "modeling_clt"):
        assert set(getattr(importlib.import_module(f"hf_clt.{name}"), "__all__", ())) <= defined
    assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level]


def test_names_that_clash_are_refused(monkeypatch):
    read = module._source
    added = {"losses": "\n\ndef row_sums():\n    return 0\n"}  # which kernels/rows.py has
    monkeypatch.setattr(module, "_source", lambda name: read(name) + added.get(name, ""))
    with pytest.raises(ValueError, match=r"row_sums means one thing in kernels\.rows and another in losses"):
        flat_code.__wrapped__()


def test_auto_map():
    text = json.dumps({"model_type": "cross_layer_transcoder", "k": 3}, indent=2)
    assert set_auto_map(text, wanted=False) == text  # to the byte
    pointing = set_auto_map(text, wanted=True)
    assert json.loads(pointing) == {**json.loads(text), "auto_map": AUTO_MAP}
    assert json.loads(set_auto_map(pointing, wanted=False)) == json.loads(text)
    assert {value.split(".")[0] + ".py" for value in AUTO_MAP.values()} == {CODE_FILE}
