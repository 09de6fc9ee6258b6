"""`scripts/show_clt.py`: the saved result of a run, printed again."""

import json

import pytest

from hf_clt import CLTConfig
from scripts import show_clt


@pytest.fixture
def run(tmp_path):
    CLTConfig(
        base_model_name_or_path="a-model", num_layers=2, d_model=4, num_features=1024, activation_fn="batchtopk", k=3
    ).save_pretrained(tmp_path)
    evaluation = {"nmse": 0.5, "nmse_per_layer": [0.7, 0.3], "l0": 6.0, "l0_per_layer": [2.5, 3.5], "num_tokens": 8192}
    training = {"loss": 3.0, "nmse": 0.9, "nmse_per_layer": [0.91, 0.89]}
    rows = [
        {"step": 10, **evaluation, **training},
        {"step": 1490, **training},
        {"step": 1500, **evaluation},
        {"step": 1510, **training},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_prints_the_last_evaluation(run, capsys):
    show_clt.main([str(run)])
    out = capsys.readouterr().out
    for text in [
        "batchtopk CLT of a-model: 2 layers, width 4, 1,024 features",
        "step 1,500",
        "0.7000",
        "8,192",
        str(run),
    ]:
        assert text in out
    assert "0.9100" not in out


def test_a_folder_without_an_evaluation_is_refused(run, capsys):
    (run / "metrics.jsonl").write_text('{"step": 10, "nmse": 0.5, "nmse_per_layer": [0.5]}\n')
    assert show_clt.main([str(run)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: no evaluation in ") and "metrics.jsonl" in lines[0]
