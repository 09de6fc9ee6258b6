"""`hf-clt convert`: what it prints, what it writes, and one line for what it refuses."""

import re

import pytest
import torch

from hf_clt import CrossLayerTranscoder
from hf_clt.commands import convert as convert_clt
from hf_clt.importers import import_clt
from tests.importers.test_importers import D, F, L, make_coding


@pytest.fixture
def source(tmp_path):
    folder = make_coding(tmp_path / "source", model_name="some/model", mlp_input_template=None)
    return import_clt(folder, feature_input_hook="mlp.hook_in"), folder


def convert(capsys, *argv):
    status = convert_clt.main([str(word) for word in argv])
    return status, *capsys.readouterr()


HOOKS = ("--feature-input-hook", "mlp.hook_in", "--feature-output-hook", "hook_mlp_out")


def test_says_what_was_read_and_written(source, tmp_path, capsys):
    clt, folder = source
    status, out, err = convert(capsys, folder, tmp_path / "out", *HOOKS)
    assert status == 0, err
    assert (
        f"read crosslayer-coding from {folder}: jumprelu CLT of some/model, {L} layers, width {D}, {F} features" in out
    )
    assert "from mlp.hook_in to hook_mlp_out" in out
    assert f"wrote hf_clt to {tmp_path / 'out'}: 10 files, " in out
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.decoders[0].weight, clt.decoders[0].weight)


def test_the_formats_and_the_base_model_can_be_named(source, tmp_path, capsys):
    _, folder = source
    options = ("--from", "crosslayer-coding", "--to", "circuit-tracer", "--base-model", "a/b", *HOOKS)
    status, out, err = convert(capsys, folder, tmp_path / "out", *options)
    assert status == 0, err
    assert "of a/b" in out and "wrote circuit-tracer" in out
    status, out, err = convert(capsys, tmp_path / "out", tmp_path / "back")
    assert status == 0 and "read hf_clt" in out and "of a/b" in out, err


@pytest.mark.parametrize(
    "argv, message",
    [
        (("source", "out"), "feature_input_hook=None"),
        (("nowhere", "out"), "nowhere: there is no such file or folder"),
        (("source", "source", *HOOKS), "not empty|where the source lies"),
        (("source", "out", "--drop-acausal", *HOOKS), "drop_acausal is for gemma-scope-2"),
        (("source", "out", "--to", "circuit-tracer-plt", *HOOKS), "decoder_reach=3"),
        (("source", "out", "--to", "saelens"), "invalid choice: 'saelens'.*--help"),
        (("source",), "required: output"),
        (("source", "out", "--overwite"), "--overwite"),
    ],
)
def test_what_is_refused_is_one_line(source, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.delenv("HF_CLT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    status, out, err = convert(capsys, *argv)
    assert status == 2 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_overwrite(source, tmp_path, capsys):
    _, folder = source
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    status, _, err = convert(capsys, folder, tmp_path / "out", *HOOKS)
    assert status == 2 and "not empty" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    status, _, err = convert(capsys, folder, tmp_path / "out", *HOOKS, "--overwrite")
    assert status == 0, err
    assert (tmp_path / "out" / "mine.txt").exists() and (tmp_path / "out" / "config.json").exists()
