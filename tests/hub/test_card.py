import json
import logging
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.commands import COMMANDS
from hf_clt.hub import build_model_card, card_from_folder, is_human_edited, save_model_card, update_card
from hf_clt.hub.card import check_update, circuit_tracer_gaps, count_parameters, is_hub_name, set_loading_name
from hf_clt.hub.facts import FORMAT, POINTS, as_curves, as_history, check_license, read_facts, without_private
from hf_clt.training.parser import parse_train_args
from scripts import build_cards


MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
REFERENCES = sorted(path.parent.name for path in MODEL_CARDS.glob("*/metrics.json"))
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


REPLACEMENT = {
    "ce_original": 3.0,
    "ce_replaced": 4.0,
    "ce_ablated": 8.0,
    "ce_recovered": 0.8,
    "kl": 1.5,
    "top1_agreement": 0.5,
    "num_predictions": 8000,
}
HISTORY = [
    {"step": 1, "split": "train", "loss": 9.0, "nmse": 1.0, "l0": 8.0, "dead_fraction": None},
    {"step": 2, "split": "train", "loss": 7.0, "nmse": 0.5, "l0": 8.0, "dead_fraction": 0.25},
    {"step": 2, "split": "heldout", "nmse": 0.6, "l0": 7.5, "dead_fraction": 0.125, "num_tokens": 100},
]


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


def test_each_metric_says_its_split_and_what_it_counts():
    card = build_model_card(config(), METRICS | REPLACEMENT, TRAINING)
    for result in ModelCard(card).data.eval_results:
        assert (result.dataset_split, result.dataset_args) == ("train", {"num_tokens": 8192})
        of_predictions = result.metric_type in REPLACEMENT
        assert result.metric_args == ({"num_predictions": 8000} if of_predictions else None), result.metric_type
    assert "the 8,000 next-token predictions" in card and "keeps 80.0% of" in card
    assert "has not been measured" in build_model_card(config(), METRICS, TRAINING)
    undefined = build_model_card(config(), METRICS | REPLACEMENT | {"ce_recovered": None}, TRAINING)
    assert "has not been measured" not in undefined and "keeps" not in undefined


def test_an_evaluation_on_another_text_is_told_as_such():
    evaluation = {"dataset": "someone/other", "dataset_split": "test", "context_size": 64, "eval_tokens": 8000}
    card = build_model_card(config(), METRICS, TRAINING, evaluation=evaluation)
    assert "of [someone/other](https://huggingface.co/datasets/someone/other), split `test` (its first" in card
    data = ModelCard(card).data
    assert data.datasets == ["someone/some-text", "someone/other"]
    assert {result.dataset_split for result in data.eval_results} == {"test"}
    local = build_model_card(config(), METRICS, TRAINING, evaluation=evaluation | {"dataset_on_hub": False})
    assert "of the local text `other`" in local and ModelCard(local).data.datasets == ["someone/some-text"]


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
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"README.md", "metrics.json", "plots/metrics_per_layer.png"}  # no temporary file left

    edited = path.read_text().replace("## Limitations", "## Limitations\n\n- I found another one.")
    path.write_text(edited)
    with caplog.at_level(logging.WARNING):
        assert save_model_card(tmp_path, config(), METRICS) == path
    assert path.read_text() == edited
    assert len(caplog.records) == 1 and "edited by hand" in caplog.text

    path.write_text("# Mine\n")  # no hash at all
    save_model_card(tmp_path, config(), METRICS)
    assert path.read_text() == "# Mine\n"


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


def test_the_card_comes_from_config_and_metrics_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    released = config(base_model_name_or_path="models/tiny")
    os.makedirs("models/tiny")  # the base model is a folder here, and a name that the Hub could have elsewhere
    released.save_pretrained("clt")
    metrics = METRICS | REPLACEMENT | {"kl": float("nan")}
    metrics["feature_density"] = {"bin_edges": [-10.0, -5.0, 0.0], "counts": [1, 127]}
    command = "python scripts/train_clt.py --k 4"
    save_model_card("clt", released, metrics, TRAINING, command, license="mit", note="A note.", history=HISTORY)
    card = Path("clt/README.md").read_text()
    assert card_from_folder("clt") == card
    facts = json.loads(Path("clt/metrics.json").read_text(), parse_constant=pytest.fail)
    assert facts["metrics"]["nmse_per_layer"] == METRICS["nmse_per_layer"] and facts["metrics"]["kl"] is None
    assert facts["training"]["versions"] == TRAINING["versions"] and facts["command"] == command
    assert "license: mit" in card and "A note." in card and "| kl |" not in card
    shown = re.findall(r"!\[[^\]]{20,}\]\((.*?)\)", card)
    assert shown == ["plots/metrics_per_layer.png", "plots/feature_density.png", "plots/training_curves.png"]
    assert sorted(path.name for path in Path("clt/plots").iterdir()) == sorted(Path(name).name for name in shown)

    os.rename("models", "elsewhere")  # or on another machine
    os.rename("clt", "moved")
    assert card_from_folder("moved", name="clt") == card
    assert "base_model:" not in card


def test_plots_that_are_not_of_this_release_go(tmp_path):
    pytest.importorskip("matplotlib")
    save_model_card(tmp_path, config(), METRICS, history=HISTORY)
    (tmp_path / "plots" / "mine.png").write_bytes(b"mine")
    assert {path.name for path in (tmp_path / "plots").iterdir()} > {"metrics_per_layer.png", "training_curves.png"}
    save_model_card(tmp_path, config())
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["mine.png"]
    assert not (tmp_path / "metrics.json").exists() and "plots/" not in (tmp_path / "README.md").read_text()
    (tmp_path / "metrics.json").write_text('{"nmse": 1}')  # of someone else: not removed, and not taken for ours
    save_model_card(tmp_path, config())
    with pytest.raises(ValueError, match="move it away"):
        read_facts(tmp_path)


def test_layers_whose_targets_do_not_vary_have_a_dash(tmp_path):
    metrics = {**METRICS, "nmse": float("inf"), "nmse_per_layer": [float("inf"), 0.4]}
    metrics |= {"explained_variance": -float("inf"), "explained_variance_per_layer": [-float("inf"), 0.6]}
    card = save_model_card(tmp_path, config(), metrics).read_text()
    assert "| 0 | - | - | 4.0 | 10.00% |" in card and "inf" not in card.split("## Results")[1].split("## Lim")[0]


def test_history_keeps_what_the_curves_show():
    assert as_history(as_curves(HISTORY)) == [
        {name: value for name, value in row.items() if name != "split" and value is not None} for row in HISTORY
    ]
    long = [{"step": step, "loss": 1 / step, "nmse": float("nan")} for step in range(1, 5001)]
    curves = as_curves(long)
    assert set(curves) == {"train"} and set(curves["train"]) == {"step", "loss"}
    steps = curves["train"]["step"]
    assert len(steps) == len(set(steps)) == POINTS and (steps[0], steps[-1]) == (1, 5000)
    assert len(json.dumps(curves)) < 10_000


def test_paths_and_tokens_are_left_out():
    for text, told in (
        ("python train.py --a /data/x/cache --b=/data/y.txt z/w.txt", "python train.py --a cache --b=y.txt z/w.txt"),
        ("run '/data of me/my text.jsonl' --n 3", "run 'my text.jsonl' --n 3"),
        ("https://example.org/a/b and 1/2 or a/b", "https://example.org/a/b and 1/2 or a/b"),
        ("--token hf_" + "a" * 30, "--token hf_***"),
    ):
        assert without_private(text) == told
    assert without_private({"a": ["/b/c", 3, None]}) == {"a": ["c", 3, None]}


def test_long_commands_are_broken_and_stay_the_same():
    command = "python scripts/train_clt.py " + " ".join(f"--option-{i} 'the value {i}'" for i in range(9))
    shown = re.search(r"```bash\n(.*?)\n```", build_model_card(config(), command=command), re.S)[1]
    assert max(map(len, shown.splitlines())) < 90 and len(shown.splitlines()) > 2
    assert shlex.split(shown.replace("\\\n", "")) == shlex.split(command)
    odd = "first && second " + "--x 1 " * 20  # what the shell reads otherwise than as words stays as it is
    assert odd in build_model_card(config(), command=odd)


def test_licences():
    check_license("apache-2.0")
    for wrong in ("", "MIT license", "mit\nother: 1"):
        with pytest.raises(ValueError, match=r"license="):
            check_license(wrong)


# -- measured again ---------------------------------------------------------------------------------------------------

EVALUATION = {"dataset": "someone/some-text", "dataset_config": None, "dataset_split": "train", "eval_tokens": 4096}


def test_new_metrics_take_the_place_of_the_old_ones(tmp_path):
    pytest.importorskip("matplotlib")
    config().save_pretrained(tmp_path)
    training = TRAINING | {"eval_tokens": 8192}
    save_model_card(tmp_path, config(), METRICS | REPLACEMENT, training, "python train.py", history=HISTORY)
    curves = (tmp_path / "plots" / "training_curves.png").read_bytes()
    said = update_card(tmp_path, {**METRICS, "nmse": 0.125}, EVALUATION | {"clt": str(tmp_path), "revision": None})
    card = (tmp_path / "README.md").read_text()
    assert "| nmse | 0.1250 |" in card and "split `train` (its first documents)" in card
    assert "| duration | 1 h 2 min |" in card and "python train.py" in card  # what is known of the training stays
    assert "ce_replaced" not in card and said[-1].startswith("Not measured again and left out: ce_original, ce_repl")
    assert (tmp_path / "plots" / "training_curves.png").read_bytes() == curves
    assert card == card_from_folder(tmp_path) and str(tmp_path) not in (tmp_path / "metrics.json").read_text()

    (tmp_path / "README.md").write_text(card + "Mine.\n")
    said = update_card(tmp_path, {**METRICS, "nmse": 0.25}, EVALUATION)
    assert (tmp_path / "README.md").read_text() == card + "Mine.\n" and "edited by hand and is kept" in said[1]
    assert read_facts(tmp_path)["metrics"]["nmse"] == 0.25


def test_what_cannot_be_put_on_a_card_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match=r"'user/clt' .*config"):
        check_update("user/clt", EVALUATION)
    config().save_pretrained(tmp_path)
    save_model_card(tmp_path, config(), METRICS, TRAINING | {"eval_tokens": 2048})
    with pytest.raises(ValueError, match=r"eval_tokens=4096.* 2048 "):
        check_update(tmp_path, EVALUATION)
    check_update(tmp_path, EVALUATION | {"eval_tokens": 2048})
    check_update(tmp_path, EVALUATION | {"dataset": "someone/other"})  # which was not trained on
    (tmp_path / "metrics.json").unlink()  # as in a release from before there was one
    with pytest.raises(ValueError, match=r"metrics\.json .*delete"):
        check_update(tmp_path, EVALUATION)


# -- the reference CLTs -----------------------------------------------------------------------------------------------


def test_there_are_reference_cards():
    assert len(REFERENCES) >= 3
    assert sorted(path.name for path in MODEL_CARDS.iterdir() if path.is_dir() and path.name[0] != "_") == REFERENCES


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_cards_are_what_their_metrics_give(name):
    folder = MODEL_CARDS / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == card_from_folder(folder), f"make cards, or put {name}/metrics.json right"
    facts, clt_config = read_facts(folder), CLTConfig.from_pretrained(folder)
    assert without_private(facts) == facts
    assert len(facts["metrics"]["nmse_per_layer"]) == clt_config.num_layers
    assert facts["metrics"]["ce_replaced"] > facts["metrics"]["ce_original"]
    held_out = facts.get("training", {}).get("eval_tokens", facts["evaluation"]["eval_tokens"])
    assert facts["evaluation"]["eval_tokens"] <= held_out
    plots = set(re.findall(r"\]\((plots/.*?)\)", card))
    assert plots == {path.relative_to(folder).as_posix() for path in folder.glob("plots/*")}
    assert len(plots) == (3 if "history" in facts else 2)
    for plot in plots:
        assert (folder / plot).read_bytes().startswith(b"\x89PNG") and (folder / plot).stat().st_size < 100_000
    for line in facts["command"].splitlines():  # what a reader would type, and it is understood
        line = line.replace("--activation-cache CACHE ", "--model m --dataset d ")  # which is not here
        program, script, *words = shlex.split(line)
        if script == "scripts/train_clt.py":
            args, values = parse_train_args([str(MODEL_CARDS.parent / w) if w.endswith(".yaml") else w for w in words])
            assert args.training_steps == facts["training"]["steps"]
            assert values["num_features"] == clt_config.num_features
        else:
            assert program == "make" or (program == "hf-clt" and script in COMMANDS)


def test_one_command_makes_the_cards(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / REFERENCES[0]
    folder.mkdir()
    for file in ("config.json", "metrics.json"):
        (folder / file).write_bytes((MODEL_CARDS / REFERENCES[0] / file).read_bytes())
    assert build_cards.main([str(folder)]) == 0
    for path in (MODEL_CARDS / REFERENCES[0]).rglob("*"):
        assert (folder / path.relative_to(MODEL_CARDS / REFERENCES[0])).exists(), path
    assert (folder / "README.md").read_text() == (MODEL_CARDS / REFERENCES[0] / "README.md").read_text()
    assert build_cards.main([str(tmp_path)]) == 2
    assert "has no metrics.json; give folders with a config.json and a metrics.json" in capsys.readouterr().err


# -- the snippet ------------------------------------------------------------------------------------------------------


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


def test_what_an_older_version_counted_is_left_out(tmp_path):
    facts = {"format": FORMAT, "training": {"steps": 3, "energy_joules": {"cpu": 5.0}}}
    (tmp_path / "metrics.json").write_text(json.dumps(facts))
    assert read_facts(tmp_path)["training"] == {"steps": 3}
