"""Labels and examples of a graph's features, against a plain loop over the same text and against feature pages."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from hf_clt import CLTConfig, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.attribution.examples import LABEL_WORDS, SETTINGS, SHOWN_EXAMPLES, describe, from_pages, label_and_details
from hf_clt.features.pages import build_feature_pages, token_string
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.harvest.tokens import open_text


FEATURES = [(1, 3), (0, 0), (0, 17), (1, 30), (0, 17)]


@pytest.fixture(scope="module")
def parts(tiny_gpt2, text_file, tmp_path_factory):
    """A random jumprelu CLT with a feature that is never active, its language model, and a stream of text."""
    torch.manual_seed(0)
    config = CLTConfig(
        num_layers=2, d_model=64, num_features=32, activation_fn="jumprelu", jumprelu_threshold=1.0, k=4
    )
    clt = CrossLayerTranscoder(config).eval()
    for encoder in clt.encoders:
        encoder.weight.data.normal_(std=0.2)
    for decoder in clt.decoders:
        decoder.weight.data.normal_()
    clt.encoders[0].bias.data[0] = -1e4
    clt.set_normalization(*(torch.rand(2, 64) + 0.5 for _ in range(4)))
    folder = tmp_path_factory.mktemp("clt")
    clt.save_pretrained(folder)
    unfolded, clt = clt, CrossLayerTranscoder.from_pretrained(folder).eval()
    model, tokenizer = load_language_model(tiny_gpt2)
    harvester = Harvester(model, config.feature_input_hook, config.feature_output_hook)
    options = CLTTrainingArguments(
        model=tiny_gpt2, dataset=text_file, context_size=32, eval_tokens=1500, store_batch_size_prompts=5
    )
    return SimpleNamespace(
        clt=clt,
        unfolded=unfolded,
        folder=folder,
        harvester=harvester,
        tokens=open_text(options, tokenizer, heldout=True),
    )


@pytest.fixture(scope="module")
def described(parts):
    return describe(parts.clt, parts.harvester, parts.tokens, FEATURES)


@torch.no_grad()
def plainly(parts, layer, feature):
    """Examples [(tokens, acts)] of the blocks with the highest peaks, and what the feature fires on and promotes."""
    tokenizer, peaks = parts.tokens.tokenizer, []
    parts.tokens.rewind()
    for batch in parts.tokens:
        inputs, _ = parts.harvester(batch["input_ids"], batch["attention_mask"])
        for ids, x, counted, mask in zip(
            batch["input_ids"], inputs, batch["counted"], batch["attention_mask"], strict=True
        ):
            acts = parts.clt.encode(x)[:, layer, feature] * counted
            if acts.max() > 0:
                peaks.append((acts.max().item(), int(acts.argmax()), ids[mask > 0].tolist(), acts))
    peaks = sorted(peaks, key=lambda peak: -peak[0])[: SETTINGS.top]
    fires, examples = Counter(), []
    for value, position, ids, acts in peaks:
        fires[token_string(tokenizer, ids[position])] += value
        window = range(max(0, position - SETTINGS.before), min(len(ids), position + SETTINGS.after + 1))
        examples.append(([token_string(tokenizer, ids[p]) for p in window], [acts[p].item() for p in window]))
    written = parts.clt.released_layer(layer)[f"W_dec_{layer}"][feature].double().sum(0)
    head = parts.harvester.model.get_output_embeddings().weight.double()
    order = (head @ written).argsort(descending=True).tolist()
    strings = [token_string(tokenizer, token) for token in order]
    return examples, [token for token, _ in fires.most_common(LABEL_WORDS)], strings


@pytest.mark.parametrize(("layer", "feature"), sorted(set(FEATURES) - {(0, 0)}))
def test_labels_and_examples_are_those_of_a_plain_loop(parts, described, layer, feature):
    label, details = described[layer, feature]
    examples, fires, strings = plainly(parts, layer, feature)
    assert len(examples) >= SHOWN_EXAMPLES and fires
    for shown, (tokens, acts) in zip(details["examples"], examples, strict=False):
        assert shown["tokens"] == tokens
        assert shown["acts"] == pytest.approx(acts, rel=1e-4, abs=1e-6)
    assert len(details["examples"]) == SHOWN_EXAMPLES
    assert details["top_logits"] == strings[:8] and details["bottom_logits"] == strings[::-1][:8]
    quoted = [", ".join(f'"{word}"' for word in words) for words in (fires, strings[:LABEL_WORDS])]
    assert label == f"fires on {quoted[0]}; promotes {quoted[1]}"


def test_only_what_is_asked_for_is_there_and_it_is_json(described):
    assert set(described) == set(FEATURES)
    json.dumps([details for _, details in described.values()], allow_nan=False)


def test_a_feature_that_never_fires_says_so(described):
    label, details = described[0, 0]
    assert label.startswith('fires on nothing in the text; promotes "') and details["examples"] == []


def test_the_clt_is_left_as_it_was(parts, described):
    fresh = CrossLayerTranscoder.from_pretrained(parts.folder)
    assert all(torch.equal(a, b) for a, b in zip(parts.clt.parameters(), fresh.parameters(), strict=True))


def test_a_clt_with_its_statistics_beside_it_gives_the_same(parts, described):
    found = describe(parts.unfolded, parts.harvester, parts.tokens, FEATURES)
    assert {key: label for key, (label, _) in found.items()} == {key: label for key, (label, _) in described.items()}
    assert parts.unfolded.mean_in is not None


def test_a_lazy_clt_gives_the_same(parts, described):
    lazy = CrossLayerTranscoder.from_pretrained(parts.folder, lazy=True)
    assert describe(lazy, parts.harvester, parts.tokens, FEATURES) == described


@pytest.fixture(scope="module")
def pages(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    build_feature_pages(parts.clt, parts.harvester, parts.tokens, folder, {"clt": "a"}, logits=8, links=0)
    return folder


def test_feature_pages_of_the_same_text_say_the_same(parts, described, pages):
    found = from_pages(pages, parts.clt, FEATURES)
    assert {key: label for key, (label, _) in found.items()} == {key: label for key, (label, _) in described.items()}
    for key, (_, details) in found.items():
        assert details["top_logits"] == described[key][1]["top_logits"]
        peaks = [[max(example["acts"]) for example in each["examples"]] for each in (details, described[key][1])]
        assert peaks[0] == peaks[1]


def test_pages_of_another_clt_are_refused(parts, pages, tmp_path):
    config = CLTConfig(num_layers=2, d_model=64, num_features=32, activation_fn="relu")
    with pytest.raises(ValueError, match="another CLT"):  # of the same shape
        from_pages(pages, CrossLayerTranscoder(config), FEATURES)
    config = CLTConfig(num_layers=2, d_model=64, num_features=16, activation_fn="relu")
    shutil.copytree(pages, tmp_path / "copy")
    (tmp_path / "copy" / "feature_pages.json").unlink()
    with pytest.raises(ValueError, match="another CLT"):  # of another, where nothing says whose they are
        from_pages(tmp_path / "copy", CrossLayerTranscoder(config), FEATURES)
    with pytest.raises(ValueError, match=r"index\.json\.gz"):
        from_pages(tmp_path, parts.clt, FEATURES)


def test_tokens_are_ordered_by_the_sum_of_their_peaks():
    def example(token, value):
        return {"tokens": ["x", token], "tokens_acts_list": [0.0, value], "train_token_ind": 1}

    examples = [example(" a", 5.0), example(" b", 3.0), example(" b", 3.0), example(" c", 1.0), example(" d", 0.5)]
    label, details = label_and_details(examples, ["t", "u", "v", "w"], ["z"])
    assert label == 'fires on " b", " a", " c"; promotes "t", "u", "v"'
    assert details["examples"][0] == {"tokens": ["x", " a"], "acts": [0.0, 5.0]}
