"""Reconstruction, replacement and features against plain sums in float64, and against what the controls get."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hf_clt import CLTConfig, CrossLayerTranscoder, evaluate_clt
from hf_clt.audit import features as features_module
from hf_clt.audit.controls import random_clt, shuffled_clt
from hf_clt.audit.features import Words, f1, features, single_tokens, words_by_letter
from hf_clt.audit.reconstruction import QUICK_SEQUENCES, reconstruction
from hf_clt.audit.replacement import replacement
from hf_clt.audit.samples import BlockSkipped, sequences
from hf_clt.evaluation import replacement_metrics
from tests.audit.conftest import read_text
from tests.reference import random_clt as make
from tests.reference import random_statistics


BLOCKS = [reconstruction, replacement, features]


def values(figures):
    """The numbers alone."""
    if isinstance(figures, list):
        return [values(entry) for entry in figures]
    return figures["value"] if "value" in figures else {name: values(entry) for name, entry in figures.items()}


@pytest.fixture
def controls(given, trained):
    inputs = torch.cat([given.harvester.harvest(batch)[0] for batch in given.heldout])
    return {"shuffled": shuffled_clt(trained), "random": random_clt(trained, inputs)}


# -- against plain sums -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"decoder_tying": "per_target"}, {"decoder_reach": 1}], ids=str)
def test_reconstruction_is_that_of_plain_sums(given_double, fields):
    given = given_double
    clt = make(num_layers=2, d_model=64, num_features=24, **fields).eval().requires_grad_(False)
    clt.set_normalization(**random_statistics(clt))
    parts = [given.harvester.harvest(batch, torch.float64) for batch in sequences(given, QUICK_SEQUENCES)]
    x, y = (torch.cat(values) for values in zip(*parts, strict=True))
    acts, deviation = clt.encode(x), y - y.mean(dim=0)
    variance = deviation.square().sum(dim=(0, 2)) / len(y)
    found = values(reconstruction(clt, given))
    nmse = (y - clt.decode(acts)).square().sum(dim=(0, 2)) / deviation.square().sum(dim=(0, 2))
    assert found["nmse_per_layer"] == pytest.approx(nmse.tolist())
    assert found["nmse"] == pytest.approx(nmse.mean().item())
    assert found["l0_per_layer"] == pytest.approx((acts > 0).double().sum(dim=(0, 2)).div(len(y)).tolist())
    counts = (acts > 0).sum(dim=0)
    assert found["dead_per_layer"] == pytest.approx((counts == 0).double().mean(dim=1).tolist())
    density = counts[counts > 0] / len(y)
    assert found["share_by_density"]["over 10 %"] == pytest.approx((density >= 0.1).double().mean().item())
    assert sum(found["share_by_density"].values()) == pytest.approx(1)

    lengths, explained = [0.0, 0.0], [0.0, 0.0]
    for s in range(2):
        rows = clt.released_layer(s)[f"W_dec_{s}"]  # (F, J, D), raw
        for j in range(rows.shape[1]):
            lengths[j] += (rows[:, j].norm(dim=1) / variance[s + j].sqrt()).sum().item()
            written = acts[:, s] @ rows[:, j]
            explained[j] += ((written * deviation[:, s + j]).sum() / len(y) / variance[s + j] / 2).item()
    assert found["norm_by_distance"] == pytest.approx([length / sum(lengths) for length in lengths])
    assert found["mean_distance"] == pytest.approx(lengths[1] / sum(lengths))
    assert found["explained_by_distance"] == pytest.approx(explained)


def test_reconstruction_agrees_with_an_evaluation(given, trained):
    text = sequences(given, QUICK_SEQUENCES)
    metrics, found = evaluate_clt(trained, given.harvester, text), values(reconstruction(trained, given))
    for name, own in (("nmse", "nmse"), ("l0", "l0"), ("dead_fraction", "dead")):
        assert found[own] == pytest.approx(metrics[name], rel=1e-5)
        assert found[f"{own}_per_layer"] == pytest.approx(metrics[f"{name}_per_layer"], rel=1e-5)
    assert found["explained_by_distance"][0] > 0.3


@pytest.mark.parametrize("layers", [None, [0], [1]], ids=str)
def test_replacement_agrees_with_that_of_an_evaluation(given, trained, layers):
    found = values(replacement(trained, given))
    text = sequences(given, 8 if layers is None else 4)
    metrics = replacement_metrics(given.model, trained, text, layers)
    names = {"ce_recovered": "ce_recovered", "kl": "kl", "top1_agreement": "top1"}
    if layers is None:
        names |= {name: name for name in ("ce_original", "ce_replaced", "ce_ablated")}
    for name, own in names.items():
        got = found[own] if layers is None else found[f"{own}_per_layer"][str(layers[0])]
        assert got == pytest.approx(metrics[name], rel=1e-5, abs=1e-7)
        if layers == [1] and own in found:
            assert found[f"{own}_by_last_layers"] == {"1": got}
    means = torch.cat([given.harvester.harvest(batch)[1] for batch in text]).mean(dim=0)
    ablation = replacement_metrics(given.model, lambda layer, inputs, outputs: means[layer], text, layers)
    got = found["kl_ablated"] if layers is None else found["kl_ablated_per_layer"][str(layers[0])]
    assert got == pytest.approx(ablation["kl"], rel=1e-4)


def test_layers_that_share_a_budget_cannot_be_replaced_and_are_skipped(given):
    clt = make(num_layers=2, d_model=64, double=False, activation_fn="topk", k_scope="token").eval()
    with pytest.raises(BlockSkipped, match="k_scope='token'"):
        replacement(clt, given)


def test_single_tokens_are_those_of_a_plain_search(given, trained, monkeypatch):
    expected, tokens = [], [[] for _ in range(512)]
    for batch in sequences(given, features_module.QUICK_SEQUENCES):
        acts = torch.zeros(*batch["input_ids"].shape, 2, 256)
        acts[batch["counted"]] = trained.encode(given.harvester.harvest(batch)[0])
        for ids, row in zip(batch["input_ids"], acts.flatten(2), strict=True):
            peaks, places = row.max(dim=0)
            for feature in peaks.nonzero().flatten().tolist():
                tokens[feature].append((peaks[feature].item(), ids[places[feature]].item()))
    for found in tokens:
        if len(found) >= 4:
            strongest = sorted(found, key=lambda pair: -pair[0])[:8]
            expected.append(len({token for _, token in strongest}) == 1)
    found = single_tokens(trained, given)
    assert found.tolist() == expected
    assert 0 < sum(expected) < len(expected)


# -- first letters ----------------------------------------------------------------------------------------------------


def test_words_are_a_space_and_small_letters(given, monkeypatch):
    monkeypatch.setattr(features_module, "LEAST_WORDS", 3)
    found = words_by_letter(given.tokenizer)
    assert len(found) > 1
    for letter, tokens in found.items():
        for token in tokens:
            text = given.tokenizer.decode([token])
            assert text[0] == " " and text[1] == letter and text[1:].isalpha() and len(text) >= 4


def test_f1_is_that_of_precision_and_recall():
    active, is_letter = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(0)) > 0.6
    found = f1(active, is_letter)
    for feature in range(3):
        for letter in range(3):
            both = (active[:, feature] & is_letter[:, letter]).sum().item()
            precision, recall = both / active[:, feature].sum().item(), both / is_letter[:, letter].sum().item()
            expected = 2 * precision * recall / (precision + recall) if both else 0
            assert found[feature, letter].item() == pytest.approx(expected)


@pytest.mark.parametrize("writes, expected", [((1.0, 0.0, 0.0), 0.25), ((1.0, 1.0, 1.0), 0.0), ((-1.0, 0, 0), 0.0)])
def test_a_letter_that_another_feature_took_over_is_absorbed(given, writes, expected):
    """
    Feature 0 stands for the first letter and feature 1 for the second. Of the four tested words of the first, two have
    features 2 to 4 in the place of feature 0, which write the letter, each more or less of it.
    """
    clt = CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=64, num_features=5, activation_fn="relu")).eval()
    clt.requires_grad_(False)
    for parameter in clt.parameters():
        parameter.zero_()
    clt.encoders[0].weight[:, :5] = torch.eye(5)
    for feature, (letter, size) in enumerate([(0, 1.0), (1, 1.0), *((0, size) for size in writes)]):
        clt.decoders[0].weight[feature, 1, letter] = size
    words = Words.__new__(Words)
    words.letters, words.layer = ["a", "b"], 1
    words.labels = torch.tensor([0] * 8 + [1] * 8)
    words.fitted = torch.tensor([True, False] * 8)
    words.right = torch.ones(16, dtype=torch.bool)
    words.directions = torch.eye(64, dtype=torch.float64)[:, :2]
    words.inputs = torch.zeros(16, 2, 64)
    words.inputs[:8, 0, 0] = words.inputs[8:, 0, 1] = 1
    words.inputs[[1, 3], 0, :5] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    harvester = SimpleNamespace(input_hook="in", output_hook="out")
    own = replace(given, harvester=harvester, shared={("words", "in", "out"): words})
    found = features_module.first_letters(clt, own)
    assert found["letter_f1"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["absorption"]["value"] == pytest.approx(expected)
    assert found["absorption"]["samples"] == 8


def test_a_probe_finds_letters_that_are_there(given):
    """Words whose outputs have their letter in one direction of one layer."""
    words = Words.__new__(Words)
    words.letters, words.labels = ["a", "b"], torch.arange(40) % 2
    words.fitted = torch.arange(40) < 20
    words.outputs = torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(0))
    words.outputs[:, 1, 7] += 8 * words.labels
    right = [(words.probe(layer)[1].argmax(dim=1) == words.labels)[20:].double().mean().item() for layer in (0, 1)]
    assert right[0] < 0.9 and right[1] == 1


# -- controls, batches, files -----------------------------------------------------------------------------------------


def test_reconstruction_tells_a_trained_clt_from_the_controls(given, trained, controls):
    own = reconstruction(trained, given)
    for control in controls.values():
        other = reconstruction(control, given)
        assert own["nmse"]["interval"][1] < other["nmse"]["interval"][0]
        assert own["explained_by_distance"][0]["interval"][0] > other["explained_by_distance"][0]["interval"][1]
        assert other["l0"]["value"] == pytest.approx(own["l0"]["value"], rel=0.1)


def test_replacement_tells_a_trained_clt_from_the_controls(given, trained, controls):
    own = replacement(trained, given)
    for control in controls.values():
        other = replacement(control, given)
        assert own["kl"]["interval"][1] < other["kl"]["interval"][0]
        assert own["ce_ablated"] == other["ce_ablated"]


def test_features_tell_a_trained_clt_from_random_ones(given, trained, controls):
    """Shuffled decoders leave the features' examples what they are."""
    own = features(trained, given)["single_token"]
    assert features(controls["shuffled"], given)["single_token"]["value"] == pytest.approx(own["value"])
    assert features(controls["random"], given)["single_token"]["interval"][1] < own["interval"][0]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_the_same_for_other_batches_and_for_a_clt_in_its_files(given, trained, saved, text_file, block):
    own = block(CrossLayerTranscoder.from_pretrained(saved).eval(), given)
    other = replace(given, heldout=read_text(text_file, given.tokenizer, prompts_per_batch=7), shared={})
    assert block(CrossLayerTranscoder.from_pretrained(saved, lazy=True).eval(), other) == own


@pytest.mark.parametrize("block", BLOCKS)
def test_too_little_text_is_skipped_and_another_model_refused(given, trained, block):
    few = replace(given, heldout=[{name: rows[:2] for name, rows in given.heldout[0].items()}])
    with pytest.raises(BlockSkipped, match="raise eval_tokens"):
        block(trained, few)
    with pytest.raises(ValueError, match="num_layers=3 does not fit"):
        block(make(num_layers=3, d_model=64, double=False), given)
