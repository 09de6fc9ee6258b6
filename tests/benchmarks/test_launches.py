"""An update on fake tensors of a fake GPU: nothing in it waits for the GPU, and what is put in is noticed."""

from dataclasses import replace

import pytest
import torch

from benchmarks.launches import count, estimated_bytes, fake_gpu, make_case
from hf_clt import estimate, modeling_clt
from hf_clt.kernels import triton_rows


pytestmark = pytest.mark.skipif(triton_rows.triton is None, reason="Triton is not there")
SHAPE = {"num_layers": 3, "d_model": 64, "num_features": 2048, "tokens": 256, "l0": 8}


@pytest.fixture(autouse=True)
def on_a_fake_gpu():
    with fake_gpu():
        yield


def total(case):
    return sum(count(case)["launches"].values())


@pytest.mark.parametrize("optimizer", ["adam", "adam_compact"])
@pytest.mark.parametrize("dead", [0.0, 0.3])
@pytest.mark.parametrize("activation_fn", ["topk", "batchtopk"])
@pytest.mark.parametrize("num_features", [2048, 256], ids=["", "dense"])
def test_an_update_never_waits(activation_fn, dead, optimizer, num_features):
    shape = SHAPE | {"num_features": num_features}
    found = count(make_case(**shape, activation_fn=activation_fn, dead=dead, optimizer=optimizer))
    assert found["waits"] == {}
    assert all(found["launches"].values())


@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu"])
def test_features_above_a_threshold_are_waited_for_once(activation_fn):
    (line, times), *others = count(make_case(**SHAPE, activation_fn=activation_fn))["waits"].items()
    assert line.startswith("_local_scalar_dense hf_clt/selection.py:")
    assert times == 1
    assert not others


@pytest.mark.parametrize(
    "wait, name",
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: torch.zeros(3).to(x.device), "_to_copy"),
        (lambda x: torch.zeros(3, device=x.device).copy_(torch.zeros(3)), "copy_"),
        (lambda x: x.clone().index_put_((x > 0,), torch.zeros(5, device=x.device)), "index_put_"),
        (lambda x: x[0, 0].tolist(), "tolist"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wait_that_is_put_in_is_noticed(wait, name, monkeypatch):
    loss = modeling_clt.reconstruction_loss

    def waiting_loss(targets, reconstruction):
        wait(targets)
        return loss(targets, reconstruction)

    monkeypatch.setattr(modeling_clt, "reconstruction_loss", waiting_loss)
    ((line, times),) = count(make_case(**SHAPE, activation_fn="topk"))["waits"].items()
    assert line.startswith(f"{name} hf_clt/modeling_clt.py:")
    assert times == 1


@pytest.mark.parametrize("choice", [lambda x: x[x > 0], lambda x: x.unique()], ids=["mask", "unique"])
def test_a_size_that_nobody_makes_up_stops_the_count(choice, monkeypatch):
    monkeypatch.setattr(modeling_clt, "reconstruction_loss", lambda targets, reconstruction: choice(targets).sum())
    with pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException):
        count(make_case(**SHAPE, activation_fn="topk"))


@pytest.mark.parametrize("reach", [None, 2])
@pytest.mark.parametrize("dead", [0.0, 0.3])
@pytest.mark.parametrize("activation_fn", ["topk", "batchtopk", "relu", "jumprelu"])
def test_forward_and_backward_are_as_many_launches_at_any_depth(activation_fn, dead, reach):
    case = make_case(**SHAPE, activation_fn=activation_fn, dead=dead, decoder_reach=reach)
    few, many = (count(replace(case, num_layers=n))["launches"] for n in (3, 30))
    for phase in ("forward", "backward"):
        assert few[phase] == many[phase]
    assert few["forward"] + few["backward"] <= (205 if dead else 140)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "adam_compact"])
def test_the_optimizer_with_clipping_takes_few_launches_at_any_depth(optimizer, dtype):
    shape = SHAPE | {"d_model": 768, "dtype": dtype}
    cases = [make_case(**shape | {"num_layers": n}, activation_fn="topk", optimizer=optimizer) for n in (6, 30)]
    six, thirty = (count(case)["launches"]["optimizer"] for case in cases)
    assert six == thirty < 20


def test_more_dead_features_take_no_more_launches():
    case = make_case(**SHAPE, activation_fn="topk", dead=0.1)
    assert total(case) == total(replace(case, dead=0.6))


@pytest.mark.parametrize(
    "optimizer, dtype",
    [("adam", "float32"), ("adam", "bfloat16"), ("adam_compact", "float32"), ("adam_compact", "bfloat16")],
)
@pytest.mark.parametrize("dead", [0.0, 0.3])
@pytest.mark.parametrize("activation_fn", ["batchtopk", "jumprelu"])
def test_memory_is_what_the_plan_says(activation_fn, dead, optimizer, dtype):
    shape = SHAPE | {"d_model": 128, "tokens": 128}  # gradients outweigh a layer's pre-activations, as in real ones
    case = make_case(**shape, activation_fn=activation_fn, dead=dead, optimizer=optimizer, dtype=dtype)
    assert estimated_bytes(case) == pytest.approx(count(case)["peak_bytes"], rel=0.1)


@pytest.mark.parametrize("autocast", ["bfloat16", None])
@pytest.mark.parametrize(
    "activation_fn, tokens, dead",
    [("batchtopk", 256, 0.0), ("batchtopk", 256, 0.3), ("batchtopk", 2048, 0.0)]
    + [("jumprelu", 256, 0.0), ("jumprelu", 256, 0.3)],
)
def test_memory_while_encoding_is_what_the_plan_says(activation_fn, tokens, dead, autocast, monkeypatch):
    # Of per-layer transcoders gradients are few, and pre-activations are the most; 2,048 tokens are encoded in parts.
    for module in (modeling_clt, estimate):
        monkeypatch.setattr(module, "ENCODED_BYTES", 16 * 2**20)
    shape = SHAPE | {"num_layers": 6, "tokens": tokens, "decoder_reach": 1, "autocast": autocast}
    case = make_case(**shape, activation_fn=activation_fn, dead=dead)
    assert estimated_bytes(case) == pytest.approx(count(case)["peak_bytes"], rel=0.1)
