"""`hf-clt info`: what a CLT is, from its small files. The Hub's side is in hub_client.py."""

import pytest
import torch

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.commands import info
from hf_clt.hub.card import save_model_card


EVALUATION = {"nmse": 0.5, "nmse_per_layer": [0.7, 0.3], "l0": 6.0, "l0_per_layer": [2.5, 3.5], "num_tokens": 8192}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = CLTConfig(
        base_model_name_or_path="a-model", num_layers=2, d_model=4, num_features=1024, activation_fn="batchtopk", k=3
    )
    CrossLayerTranscoder(config).save_pretrained(tmp_path / "clt")
    return tmp_path / "clt"


def printed(capsys, *words):
    assert info.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    assert info.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_shape_size_and_files(folder, capsys):
    (folder / "checkpoint-10").mkdir()
    (folder / "notes.txt").write_text("not of the release")
    text = printed(capsys, folder)
    for part in [
        "batchtopk CLT of a-model: 2 layers, width 4, 1,024 features per layer",
        "from hook_resid_mid to hook_mlp_out, k = 3 per layer and token",
        f"{2 * 1024 * 5 + 3 * 1024 * 4 + 2 * 4:,} weights in float32: 99.",  # and the thresholds, repeated, and heads
        "in 4 files",
        "W_enc_N.safetensors, N = 0 to 1",
        "config.json",
        "No metrics",
    ]:
        assert part in text
    assert "notes.txt" not in text and "checkpoint" not in text


def test_metrics_and_training(folder, capsys):
    training = {"tokens": 5000, "steps": 1500}
    metrics = EVALUATION | {"ce_recovered": 0.875}
    save_model_card(folder, CLTConfig.from_pretrained(folder), metrics, training, name="clt")
    text = printed(capsys, folder)
    assert "trained on 5,000 tokens in 1,500 updates" in text
    assert "0.7000" in text and "8,192" in text and "ce_recovered 0.8750" in text
    save_model_card(folder, CLTConfig.from_pretrained(folder), {"nmse": 0.5})
    assert "nmse 0.5000" in printed(capsys, folder)


def test_weights_are_not_read(folder, capsys):
    whole = printed(capsys, folder)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert printed(capsys, folder) == whole


def test_what_is_no_clt_is_refused(folder, tmp_path, capsys):
    assert "holds no CLT" in refused(capsys, tmp_path)
    assert "no such folder" in refused(capsys, tmp_path / "nothing")
    assert "subfolder='nothing'" in refused(capsys, folder, "--subfolder", "nothing")
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    line = refused(capsys, tmp_path / "run")
    assert "no finished CLT, only checkpoint-20" in line and "--resume-from-checkpoint latest" in line
