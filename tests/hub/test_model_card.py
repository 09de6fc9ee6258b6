import logging
import os
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.hub import build_model_card, is_human_edited, save_model_card
from hf_clt.hub.model_card import circuit_tracer_gaps, count_parameters, is_hub_name, set_loading_name


METRICS = {
    "nmse": 0.3,
    "explained_variance": 0.7,
    "l0": 40.0,
    "dead_fraction": 0.05,
    "num_tokens": 8192,
    "nmse_per_layer": [0.2, 0.4],
    "explained_variance_per_layer": [0.8, 0.6],
    "l0_per_layer": [4.0, 36.0],
    "dead_fraction_per_layer": [0.1, 0.0],
}
TRAINING = {
    "settings": {"learning_rate": 4e-4, "normalization_file": "/data/of/someone/stats.safetensors"},
    "dataset": "someone/some-text",
    "dataset_split": "train",
    "context_size": 128,
    "prepend_bos": True,
    "normalization_method": "estimated_mean_std",
    "steps": 1500,
    "tokens": 1536000,
    "duration_seconds": 3725.4,
    "hardware": "two CPU cores",
    "num_processes": 1,
    "versions": {"torch": "2.13.0"},
}


def config(**changes):
    values = {"base_model_name_or_path": "someone/tiny-gpt2", "num_layers": 2, "d_model": 8, "num_features": 64}
    return CLTConfig(**{**values, "activation_fn": "batchtopk", "k": 4, **changes})


def test_metadata_reads_back_with_every_metric():
    card = ModelCard(build_model_card(config(), METRICS, TRAINING, license="mit"))
    data = card.data.to_dict()
    assert data["library_name"] == "hf_clt"
    assert (data["base_model"], data["base_model_relation"]) == ("someone/tiny-gpt2", "adapter")
    assert data["datasets"] == ["someone/some-text"]
    assert data["license"] == "mit"
    assert "cross-layer-transcoder" in data["tags"]
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        name: METRICS[name] for name in ("nmse", "explained_variance", "l0", "dead_fraction")
    }
    assert all(result.dataset_args == {"num_tokens": 8192} for result in results.values())
    assert all(result.dataset_split == "train" for result in results.values())


def test_body_states_what_was_measured_and_done():
    card = build_model_card(config(), METRICS, TRAINING, "python scripts/train_clt.py --k 4")
    for fact in (
        "Measured on 8,192 held-out tokens",
        "| nmse | 0.3000 |",
        "| 0 | 0.2000 | 0.8000 | 4.0 | 10.00% |",
        "| 1 | 0.4000 | 0.6000 | 36.0 | 0.00% |",
        "| tokens trained on | 1,536,000 |",
        "| duration | 1 h 2 min |",
        "| hardware | two CPU cores |",
        "| `learning_rate` | 0.0004 |",
        "python scripts/train_clt.py --k 4",
        "30.0% of the targets' variance unexplained (layer mean); layer 1 is the worst, with 40.0%",
        "More than a tenth of the features are active per token in 1 of 2 layers (1)",
        "torch 2.13.0",
    ):
        assert fact in card, fact


def test_unknown_facts_are_absent():
    card = build_model_card(config(base_model_name_or_path=None))
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert set(metadata) == {"library_name", "pipeline_tag", "tags"}
    for absent in (
        "None",
        "nan",
        "## Results",
        "## Training",
        "## Versions",
        "The command",
        "base model",
        "Measured on",
    ):
        assert absent not in card, absent
    some = build_model_card(config(), {"nmse": 0.5, "l0": None, "dead_fraction": float("nan")}, {"steps": 3})
    assert "| steps | 3 |" in some
    for absent in ("| l0 |", "hardware", "duration", "tokens trained on", "None", "held-out tokens"):
        assert absent not in some, absent
    assert [result.metric_type for result in ModelCard(some).data.eval_results] == ["nmse"]


def test_nothing_private_is_written(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    training = {**TRAINING, "dataset": "/home/someone/texts/mine.jsonl"}
    command = "python scripts/train_clt.py --dataset /home/someone/texts/mine.jsonl --token hf_" + "a1" * 17
    card = build_model_card(config(base_model_name_or_path="/home/someone/models/tiny"), METRICS, training, command)
    assert "someone" not in card
    assert "a1a1" not in card
    assert "`mine.jsonl`" in card and "`tiny`" in card and "`stats.safetensors`"[1:-1] in card
    assert "base_model" not in card.split("---\n")[1] and "datasets" not in card.split("---\n")[1]


def test_local_folders_are_no_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("models/tiny")
    assert is_hub_name("someone/tiny") and is_hub_name("gpt2")
    for name in (None, "", "models/tiny", "text.jsonl", "/somewhere/tiny", "./tiny", "a/b/c"):
        assert not is_hub_name(name), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_fn": "topk"}, ["top-k"]),
        ({"decoder_reach": 1}, ["reach of 1"]),
        ({"skip_connection": True, "activation_fn": "topk"}, ["top-k", "skip"]),
        ({"activation_fn": "relu"}, []),
        ({"activation_fn": "jumprelu"}, []),
        ({}, []),
    ],
)
def test_says_what_circuit_tracer_cannot_read(changes, words):
    gaps = circuit_tracer_gaps(config(**changes))
    assert len(gaps) == len(words)
    card = build_model_card(config(**changes))
    assert ("cannot express" in card) == bool(words)
    for word in words:
        assert word in card.split("## What other tools read")[1]


def test_how_jumprelu_started_is_said_of_trained_clts_alone():
    jumprelu = config(activation_fn="jumprelu", jumprelu_threshold=0.25)
    assert "initial threshold 0.25" in build_model_card(jumprelu, training={"steps": 10})
    assert "threshold" not in build_model_card(jumprelu).split("## How to use it")[0]


@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_reach": 2},
        {"decoder_tying": "per_source"},
        {"decoder_tying": "per_target"},
        {"skip_connection": True},
    ],
)
def test_parameter_count_is_the_models(activation_fn, changes):
    clt_config = config(num_layers=3, num_features=16, activation_fn=activation_fn, **changes)
    model = CrossLayerTranscoder(clt_config)
    assert count_parameters(clt_config) == sum(parameter.numel() for parameter in model.parameters())


def test_generated_card_is_replaced_and_a_human_one_kept(tmp_path, caplog):
    path = save_model_card(tmp_path, config(), {**METRICS, "nmse": 0.9})
    first = path.read_text()
    assert not is_human_edited(first)
    assert not is_human_edited(first.replace("\n", "\r\n"))  # as git may check it out on Windows
    save_model_card(tmp_path, config(), METRICS)
    assert "| nmse | 0.3000 |" in path.read_text() and "| nmse | 0.9000 |" not in path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]  # no temporary file left

    edited = path.read_text().replace("## Limitations", "## Limitations\n\n- I found another one.")
    path.write_text(edited)
    with caplog.at_level(logging.WARNING):
        assert save_model_card(tmp_path, config(), METRICS) == path
    assert path.read_text() == edited
    assert len(caplog.records) == 1 and "edited by hand" in caplog.text

    path.write_text("# Mine\n")  # no hash at all
    save_model_card(tmp_path, config(), METRICS)
    assert path.read_text() == "# Mine\n"
    assert build_model_card(config(), METRICS, existing="# Mine\n") == "# Mine\n"
    assert build_model_card(config(), METRICS, existing=first) == build_model_card(config(), METRICS)


def test_loading_name_of_a_card_can_be_set():
    card = build_model_card(config(), METRICS)
    assert 'CrossLayerTranscoder.from_pretrained("path/to/this/folder")' in card
    moved = set_loading_name(card, "someone/clt")
    assert 'CrossLayerTranscoder.from_pretrained("someone/clt")' in moved and not is_human_edited(moved)
    assert moved == build_model_card(config(), METRICS, name="someone/clt")
    assert set_loading_name(card + "mine", "someone/clt") == card + "mine"


def test_relative_folder_is_named_in_the_snippet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'from_pretrained("out/clt")' in save_model_card("out/clt", config()).read_text()
    assert str(tmp_path) not in save_model_card(tmp_path / "other", config()).read_text()


def test_unknown_training_fact_is_refused():
    with pytest.raises(ValueError, match=r"training=\['durations'\].*duration_seconds"):
        build_model_card(config(), training={"durations": 3})


@pytest.mark.parametrize("skip_connection", [False, True])
def test_snippet_without_a_base_model_runs(tmp_path, skip_connection):
    clt = CrossLayerTranscoder(
        config(base_model_name_or_path=None, activation_fn="relu", skip_connection=skip_connection)
    )
    clt.save_pretrained(tmp_path)
    path = save_model_card(tmp_path, clt.config, name=str(tmp_path))
    names = {}
    exec(re.search(r"```python\n(.*?)```", path.read_text(), re.S)[1], names)
    assert names["features"].shape == (1, 2, 64)
    torch.testing.assert_close(names["reconstruction"], clt(names["inputs"]).reconstruction)


def test_snippet_with_a_base_model_runs(tmp_path):
    base = tiny_language_model(tmp_path / "base")
    clt = CrossLayerTranscoder(config(base_model_name_or_path=str(base), activation_fn="relu"))
    clt.save_pretrained(tmp_path / "clt")
    path = save_model_card(tmp_path / "clt", clt.config, training={"prepend_bos": True}, name=str(tmp_path / "clt"))
    names = {}
    exec(re.search(r"```python\n(.*?)```", path.read_text(), re.S)[1], names)
    assert names["features"].shape == (1, 6, 2, 64)  # BOS and five words
    assert names["tokens"]["input_ids"][0, 0] == names["tokenizer"].bos_token_id
    torch.testing.assert_close(names["reconstruction"], clt(names["inputs"]).reconstruction)


def tiny_language_model(folder):
    """A random GPT-2 of 2 layers and width 8 with a word tokenizer, saved to `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<bos>", "<unk>", "The", "capital", "of", "France", "is", *(f"word{i}" for i in range(64))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": len(words), "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder
