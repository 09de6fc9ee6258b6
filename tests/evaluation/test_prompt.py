"""What a prompt makes active, on a tiny model, against the dense activations."""

import pytest
import torch
from transformers import AutoTokenizer

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.evaluation import (
    ReplacementModel,
    active_per_token,
    plot_prompt_features,
    prompt_features,
    top_features,
)
from hf_clt.harvest.harvester import Harvester, load_language_model


@pytest.fixture(scope="module")
def prompt(tiny_gpt2):
    """CLT, harvester, token ids (1, T), and the tokens as text."""
    torch.manual_seed(1)
    config = CLTConfig(num_layers=2, d_model=64, num_features=32, activation_fn="topk", k=5)
    clt = CrossLayerTranscoder(config).train()
    model, _ = load_language_model(tiny_gpt2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    input_ids = tokenizer("The import statement", return_tensors="pt").input_ids
    harvester = Harvester(model, config.feature_input_hook, config.feature_output_hook)
    return clt, harvester, input_ids, [tokenizer.decode(token) for token in input_ids[0]]


def dense(prompt):
    clt, harvester, input_ids, _ = prompt
    acts = clt.encode(harvester(input_ids)[0])[0].detach()  # (T, L, F)
    acts[0] = 0
    return acts


def test_features_are_those_of_encode_without_the_first_token(prompt):
    clt, harvester, input_ids, _ = prompt
    features = prompt_features(clt, harvester, input_ids)
    assert clt.training  # as it was
    torch.testing.assert_close(features.to_dense()[0], dense(prompt))
    totals = active_per_token(features)
    torch.testing.assert_close(totals, (dense(prompt) > 0).sum(dim=2).T.float())
    torch.testing.assert_close(active_per_token(features, strength=True), dense(prompt).sum(dim=2).T)


@pytest.mark.parametrize("position", [None, -1, 2])
def test_top_features(prompt, position):
    clt, harvester, input_ids, tokens = prompt
    acts = dense(prompt)
    rows = top_features(prompt_features(clt, harvester, input_ids), tokens, 7, position)
    if position is not None:
        kept = torch.zeros_like(acts)
        kept[position] = acts[position]
        acts = kept
    assert [row["activation"] for row in rows] == pytest.approx(acts.flatten().topk(7).values.tolist())
    for row in rows:
        assert row["activation"] == acts[row["position"], row["layer"], row["feature"]].item()
        assert row["token"] == tokens[row["position"]]
    assert len(top_features(prompt_features(clt, harvester, input_ids), tokens, 10**6)) == int(
        (dense(prompt) > 0).sum()
    )


def test_features_of_the_replacement_model(prompt):
    clt, harvester, input_ids, tokens = prompt
    features = ReplacementModel(harvester.model, clt)(input_ids).features
    row = top_features(features, tokens, 1)[0]
    assert row["activation"] == features.to_dense().max().item()


@pytest.mark.parametrize("strength", [False, True])
def test_heat_map_shows_the_numbers(prompt, strength, tmp_path):
    pytest.importorskip("matplotlib")
    clt, harvester, input_ids, _ = prompt
    tokens = [r"$a\n"] + [f"t{i}" for i in range(1, input_ids.shape[1])]  # no formula
    features = prompt_features(clt, harvester, input_ids)
    figure = plot_prompt_features(features, tokens, strength)
    figure.savefig(tmp_path / "map.png")
    axis = figure.axes[0]
    shown = torch.as_tensor(axis.images[0].get_array().filled(0))
    torch.testing.assert_close(shown, active_per_token(features, strength))
    assert axis.images[0].get_array().mask[:, 0].all()  # grey
    assert axis.images[0].origin == "lower"
    assert len(axis.texts) == 2 * (len(tokens) - 1)
    assert [label.get_text() for label in axis.get_xticklabels()][1:] == tokens[1:]


def test_misfits_are_refused(prompt):
    clt, harvester, input_ids, tokens = prompt
    with pytest.raises(ValueError, match=r"input_ids .*\(2, \d+\).*one prompt"):
        prompt_features(clt, harvester, input_ids.repeat(2, 1))
    features = prompt_features(clt, harvester, input_ids)
    with pytest.raises(ValueError, match="tokens has 1 "):
        top_features(features, ["a"])
    with pytest.raises(ValueError, match="position=99 "):
        top_features(features, tokens, position=99)
