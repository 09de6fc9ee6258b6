"""Shapes, presets and growth."""

import pytest

from benchmarks.cases import PRESETS, Case, grown_cases, preset_cases


SMALL = {"num_layers": 8, "d_model": 4, "num_features": 512, "tokens": 64, "l0": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"l0": 600}, "l0=600 .*num_features=512"),
        ({"l0": 512}, "l0=512 .*num_features=512.*jumprelu"),
        ({"l0": 0}, "l0=0 is not positive"),
        ({"tokens": 0}, "tokens=0 is not positive"),
        ({"dense_steps": 0}, "dense_steps=0 is not positive"),
        ({"activation_fn": "gelu"}, "activation_fn='gelu'.*relu, jumprelu, topk, batchtopk"),
        ({"k_scope": "batch"}, "k_scope='batch' is unknown"),
        ({"dtype": "float64"}, "dtype='float64' is unknown"),
        ({"autocast": "float16"}, "autocast='float16' is unknown"),
        ({"device": "tpu"}, "device='tpu'.*give cpu"),
        ({"device": "cuda:x"}, "device='cuda:x': hf_clt runs on"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is negative"),
        ({"jumprelu_bandwidth": -1.0}, "jumprelu_bandwidth"),
        ({"decoder_reach": 9}, "decoder_reach=9"),
    ],
)
def test_wrong_values_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        Case(**{**SMALL, **fields})


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device='cuda'.*give cpu"):
        Case(**SMALL, device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert Case(**SMALL, device="cuda:1").device == "cuda:1"
    with pytest.raises(ValueError, match=r"device='cuda:2'.* 2,"):
        Case(**SMALL, device="cuda:2")


def test_topk_may_take_all_features():
    assert Case(**{**SMALL, "l0": 512}, activation_fn="topk").config().k == 512


def test_presets(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name in PRESETS:
        assert all(case.seed == 7 for case in preset_cases(name, {"seed": 7}))
    first, second, *_ = preset_cases("issue", {})
    assert (first.num_layers, first.d_model, first.num_features, first.l0, first.activation_fn) == (
        6, 256, 8192, 32, "topk"
    )  # fmt: skip
    assert (second.num_layers, second.d_model, second.num_features, second.tokens) == (12, 768, 6144, 512)
    with pytest.raises(ValueError, match=r"preset='x'.*issue"):
        preset_cases("x", {})


def test_growth_changes_one_field():
    base = Case(**SMALL, decoder_reach=3)
    assert [case.num_features for case in grown_cases(base, "F")] == [64, 128, 256, 512]
    assert [case.tokens for case in grown_cases(base, "N")] == [8, 16, 32, 64]
    assert [case.l0 for case in grown_cases(base, "k")] == [1, 4, 16, 64]
    assert [(case.num_layers, case.decoder_reach) for case in grown_cases(base, "L")] == [
        (1, 1),
        (2, 2),
        (4, 3),
        (8, 3),
    ]
    with pytest.raises(ValueError, match=r"grow='D'.*L, F, N, k"):
        grown_cases(base, "D")


def test_growth_stays_within_what_fits():
    base = Case(**{**SMALL, "l0": 100})
    assert [case.num_features for case in grown_cases(base, "F")] == [128, 256, 512]
    assert [case.l0 for case in grown_cases(base, "k")] == [25, 100]
