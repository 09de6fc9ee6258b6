"""The controls: as sparse, as strong and as long as what they stand beside, and nothing else of it."""

import pytest
import torch

from hf_clt import CrossLayerTranscoder
from hf_clt.audit.controls import random_clt, shuffled_clt
from tests.reference import random_batch, random_statistics
from tests.reference import random_clt as make


KINDS = [
    {"activation_fn": "relu"},  # half is active
    {"activation_fn": "jumprelu", "skip_connection": True},
    {"activation_fn": "topk"},
    {"activation_fn": "batchtopk", "decoder_tying": "per_target"},
    {"activation_fn": "topk", "k_scope": "token", "decoder_reach": 2},
]


def trained(**fields):
    clt = make(num_features=32, d_model=8, **fields)
    if clt.config.activation_fn == "batchtopk":
        for threshold in clt.thresholds:
            threshold.value.fill_(0.7)
    clt.set_normalization(**random_statistics(clt))
    return clt.eval().requires_grad_(False)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_random_features_are_as_active_as_strong_and_write_as_much(fields):
    clt = trained(**fields)
    before = {name: value.clone() for name, value in clt.state_dict().items()}
    inputs, _ = random_batch(clt, 200)
    found = random_clt(clt, inputs)
    own, others = clt.encode(inputs), found.encode(inputs)
    counts = [(acts > 0).sum(dim=(0, 2)) for acts in (own, others)]
    assert (counts[0] - counts[1]).abs().max() <= 1  # of a threshold between two numbers in float32
    sizes = [acts.sum(dim=(0, 2)) / n for acts, n in zip((own, others), counts, strict=True)]
    assert torch.allclose(*sizes, rtol=0.02)
    for old, new in zip(clt.decoders, found.decoders, strict=True):
        assert torch.allclose(old.weight.norm(dim=-1), new.weight.norm(dim=-1))
        cosines = torch.cosine_similarity(old.weight, new.weight, dim=-1)
        assert cosines.abs().mean() < 0.5 and torch.equal(old.bias, new.bias)
    assert all(torch.equal(value, before[name]) for name, value in clt.state_dict().items())
    again = random_clt(clt, inputs).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in found.state_dict().items())
    assert not torch.equal(random_clt(clt, inputs, seed=1).encoders[0].weight, found.encoders[0].weight)


def test_a_layer_that_is_never_active_stays_so():
    clt = make(activation_fn="jumprelu").eval().requires_grad_(False)
    clt.thresholds[1].value.fill_(20.0)
    inputs, _ = random_batch(clt, 50)
    found = random_clt(clt, inputs).encode(inputs)
    assert not found[:, 1].any() and found[:, 0].any()


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_shuffled_decoders_are_those_of_other_features(fields):
    """Up to the numbers of the features, it is the CLT with its decoder rows permuted."""
    clt = trained(**fields)
    inputs, _ = random_batch(clt, 20)
    found = shuffled_clt(clt)
    assert found.decoders is clt.decoders
    acts, moved = clt.encode(inputs), found.encode(inputs)
    for layer in range(clt.config.num_layers):
        order = [
            next(f for f in range(32) if torch.equal(clt.encoders[layer].weight[f], row))
            for row in found.encoders[layer].weight
        ]
        assert sorted(order) == list(range(32)) != order
        assert torch.equal(moved[:, layer], acts[:, layer, order])
    assert torch.equal(shuffled_clt(clt).encode(inputs), moved)
    assert not torch.equal(shuffled_clt(clt, seed=1).encode(inputs), moved)


def test_controls_of_a_clt_in_its_files_are_those_of_one_in_memory(tmp_path):
    make(num_features=32, d_model=8, double=False, activation_fn="jumprelu").save_pretrained(tmp_path)
    whole, lazy = (CrossLayerTranscoder.from_pretrained(tmp_path, lazy=lazy) for lazy in (False, True))
    inputs, _ = random_batch(whole, 100)
    inputs = inputs.float()
    for control in (lambda clt: random_clt(clt, inputs), shuffled_clt):
        assert torch.equal(control(whole)(inputs).reconstruction, control(lazy)(inputs).reconstruction)
    assert torch.equal(whole(inputs).reconstruction, lazy(inputs).reconstruction)  # the files are untouched
