"""Overlaps by hand, and of CLTs with others that are the same, the same in another order, and different."""

from dataclasses import replace

import pytest
import torch

from hf_clt.audit import stability as stability_module
from hf_clt.audit.stability import THRESHOLDS, overlap, shared, stability
from tests.audit.exact import make_exact, shuffle


def test_overlap():
    assert overlap({1, 2, 3}, {2, 3, 4}) == 0.5
    assert overlap(set(), {1}) == 0 and overlap(set(), set()) == 1


def renumbered(clt):
    for encoder, decoder in zip(clt.encoders, clt.decoders, strict=True):
        order = torch.randperm(len(encoder.weight), generator=torch.Generator().manual_seed(3))
        for values in (encoder.weight, encoder.bias, decoder.weight):
            values.copy_(values[order])


def test_stability_of_a_clt(monkeypatch):
    """Paraphrases are words of the tiny language model: one pair the same, one of other words."""
    prompts = make_exact()[1].prompts
    monkeypatch.setattr(stability_module, "PARAPHRASES", {prompts[0]: prompts[0], prompts[1]: prompts[2]})
    clt, given = make_exact()
    given = replace(given, prompts=prompts[:2])
    other = make_exact()[0]
    renumbered(other)
    found = stability(clt, replace(given, reference=other))
    assert list(found["thresholds"]) == [f"{threshold}" for threshold in THRESHOLDS]
    assert found["thresholds"]["0.8"]["value"] == 1
    ends = found["lowest_and_highest"]["value"]
    assert 0 < ends < 1
    assert ends <= min(found["thresholds"][key]["value"] for key in ("0.7", "0.9")) + 1e-9
    assert found["paraphrases"]["value"] > 0.5 > found["unrelated"]["value"]
    gain = found["paraphrases"]["value"] - found["unrelated"]["value"]
    assert found["paraphrases_over_unrelated"]["value"] == pytest.approx(gain)
    assert found["seeds"]["value"] == 1

    wrong = make_exact()[0]
    shuffle(wrong)
    assert stability(clt, replace(given, reference=wrong))["seeds"]["value"] < 0.5


def test_a_partner_is_in_the_same_layer_and_position():
    clt, given = make_exact()
    graph = stability_module.graph_of(clt, given, given.prompts[0])
    n = graph.num_features
    moved = replace(graph, features=graph.features[: n // 2], activations=graph.activations[: n // 2])
    found = shared((clt, clt), [graph, moved])
    assert found == pytest.approx(2 * (n // 2) / (n + n // 2), abs=0.02)
