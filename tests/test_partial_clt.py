"""`from_pretrained(layers=[...])`: some layers of a CLT, without reading the others."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_clt import CrossLayerTranscoder
from hf_clt.partial_clt import PartialCLT
from hf_clt.sharding import FeatureShard
from tests.reference import random_batch
from tests.test_release import VARIANTS, L, circuit_tracer_files_alone, trained


SHARED_BUDGET = "topk over all layers"


@pytest.fixture
def saved(tmp_path):
    """Saves a CLT; returns it as it is loaded from there, inputs, and its folder."""

    def save(**fields):
        clt = trained(**fields)
        clt.save_pretrained(tmp_path / "clt")
        return CrossLayerTranscoder.from_pretrained(tmp_path / "clt"), random_batch(clt, seed=3)[0], tmp_path / "clt"

    return save


def load(folder, layers, **kwargs):
    return CrossLayerTranscoder.from_pretrained(folder, layers=layers, **kwargs)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != SHARED_BUDGET])
@torch.no_grad()
def test_parts_have_the_features_of_the_whole_and_add_up_to_it(saved, tmp_path, variant):
    clt, inputs, folder = saved(**VARIANTS[variant])
    total = 0
    for layers in ([0, 2], [1]):
        own = tmp_path / f"files of {layers}"
        shutil.copytree(folder, own)
        for layer in set(range(L)) - set(layers):  # the other files are not needed
            for kind in ("enc", "dec"):
                (own / f"W_{kind}_{layer}.safetensors").unlink()
        part = load(own, layers)
        assert type(part) is PartialCLT and isinstance(part, CrossLayerTranscoder) and not part.training
        assert len(list(part.parameters())) < len(list(clt.parameters()))
        acts = part.encode(inputs)
        assert torch.equal(acts[..., layers, :], clt.encode(inputs)[..., layers, :])
        assert acts[..., layers, :].count_nonzero() == acts.count_nonzero() > 0
        total = total + part.decode(part.encode_sparse(inputs), inputs)
    torch.testing.assert_close(total, clt(inputs).reconstruction)


def test_dtype_and_order(saved):
    clt, inputs, folder = saved(activation_fn="jumprelu")
    half = load(folder, [2, 0], dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.thresholds[0].value.dtype == torch.float32
    assert half.config.dtype == torch.bfloat16 and half.encode(inputs).dtype == torch.float32
    assert torch.equal(half.decoders[2].weight, clt.decoders[2].weight.bfloat16())


def test_circuit_tracer_files_alone(saved, tmp_path):
    clt, inputs, folder = saved(activation_fn="jumprelu")
    part = load(circuit_tracer_files_alone(folder), [1])
    assert torch.equal(part.encode(inputs)[..., 1, :], clt.encode(inputs)[..., 1, :])


def test_what_needs_the_whole_is_refused(saved, tmp_path):
    clt, inputs, folder = saved(activation_fn="relu")
    part = load(folder, [1])
    for call in (
        lambda: part(inputs),
        lambda: part.train(),
        lambda: part.save_pretrained(tmp_path / "again"),
        lambda: part.push_to_hub("user/clt"),
        lambda: part.set_normalization(*[torch.ones(L, clt.config.d_model)] * 4),
    ):
        with pytest.raises(ValueError, match=r"layers=\[1\].*without layers"):
            call()
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match=r"layer 0, .*load"):
        part.decode(clt.encode(inputs))


def test_what_does_not_go_with_layers_is_refused(saved):
    _, _, folder = saved(**VARIANTS[SHARED_BUDGET])
    for layers in ([L], [-1], [], [1, 1]):
        with pytest.raises(ValueError, match=f"give different ones from 0 to {L - 1}"):
            load(folder, layers)
    for name, value in (("lazy", True), ("shard", FeatureShard(0, 2)), ("device_map", "auto")):
        with pytest.raises(ValueError, match=f"{name} .*layers"):
            load(folder, [0], **{name: value})
    with pytest.raises(ValueError, match="share a budget"):
        load(folder, [0])


def test_bad_files_are_named(saved):
    _, _, folder = saved(activation_fn="jumprelu")
    tensors = load_file(folder / "W_enc_1.safetensors")
    save_file({**tensors, "threshold_1": -tensors["threshold_1"] - 1}, folder / "W_enc_1.safetensors")
    (folder / "W_dec_2.safetensors").unlink()
    assert load(folder, [0]).layers == (0,)
    with pytest.raises(ValueError, match=r"threshold_1 .* negative"):
        load(folder, [0, 1])
    with pytest.raises(FileNotFoundError, match=r"W_dec_2\.safetensors is missing"):
        load(folder, [2])
