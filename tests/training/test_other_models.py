"""
Language models, folders and settings that a run meets in the wild: what is released is what was measured, files of
others stay, and a resumed run goes on with what its checkpoint was made of.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.commands import cache, info
from hf_clt.evaluation import evaluate_clt
from hf_clt.files import local_or_hub
from hf_clt.hub.facts import read_facts
from hf_clt.kernels import encode
from hf_clt.training.checkpoints import CheckpointError, list_checkpoints
from hf_clt.training.output_folder import foreign_files
from hf_clt.training.reporting import warn_if_dense
from tests.training.test_trainer import make_trainer, recorded, released, rows_of


CARD = str(Path(__file__).parents[2] / "model_cards" / "quickstart")


@pytest.fixture
def changed(tiny_gpt2, tmp_path):
    """A function that saves the tiny model with some of its weights changed; returns the folder."""

    def save(change, name="changed"):
        model = GPT2LMHeadModel.from_pretrained(tiny_gpt2)
        with torch.no_grad():
            change(model.transformer)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def make(tiny_gpt2, small_text_file, tmp_path):
    def make_one(model=tiny_gpt2, config=None, folder="run", **arguments):
        return make_trainer(model, small_text_file, tmp_path / folder, config, arguments)

    return make_one


# -- what is released is what was measured ----------------------------------------------------------------------------


def constant(value):
    """Dimension 5 of the residual stream is `value` on every token."""

    def change(model):
        for weight in (model.wte.weight, model.wpe.weight):
            weight[:, 5] = 0
        model.wpe.weight[:, 5] = value
        for block in model.h:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight[:, 5] = 0
                part.bias[5] = 0

    return change


def shifted(mean):
    """Two dimensions with a mean far above their spread of about 0.2."""

    def change(model):
        model.wpe.weight[:, 3] += mean
        model.wpe.weight[:, 17] -= mean / 2

    return change


@pytest.mark.parametrize(
    "change, clt_dtype",
    [
        (constant(0.0), "float32"),
        (constant(10.0), "bfloat16"),
        (constant(300.0), "float32"),
        (shifted(100.0), "float32"),
        (shifted(1000.0), "bfloat16"),
    ],
    ids=["constant 0", "constant 10", "constant 300", "mean 100", "mean 1000"],
)
def test_the_card_has_the_metrics_of_the_files(make, changed, tmp_path, change, clt_dtype):
    config = {"activation_fn": "batchtopk"}
    arguments = {"clt_dtype": clt_dtype, "training_steps": 30, "warmup_steps": 0, "learning_rate": 1e-2}
    trainer = make(changed(change), config, **arguments)
    trainer.train()
    told = read_facts(tmp_path / "run")["metrics"]["nmse"]
    assert told == rows_of(tmp_path / "run", "heldout")[-1]["nmse"] < 0.9
    for dtype in (None, "float32", "bfloat16"):
        clt = CrossLayerTranscoder.from_pretrained(tmp_path / "run", dtype=dtype)
        found = evaluate_clt(clt, trainer.harvester, trainer.heldout)["nmse"]
        # The same files to the bit but for rounding; another format of the decoders moves it by less than 1 %.
        assert found == pytest.approx(told, rel=1e-4 if dtype in (None, clt_dtype) else 0.01), dtype


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_a_format_that_cannot_tell_activations_apart_is_said(make, changed, text_file, tmp_path, caplog, mean):
    model = changed(shifted(mean))
    arguments = ["--model", model, "--dataset", text_file, "--max-tokens", "200", "--context-size", "32"]

    def said():
        found = [record.getMessage() for record in caplog.records if "tell apart" in record.getMessage()]
        caplog.clear()
        return found

    make(model).train()
    for dtype in ("float32", "int8"):
        assert cache.main([str(tmp_path / dtype), *arguments, "--dtype", dtype, "--disable-progress-bar"]) == 0
    assert not said()
    make(model, folder="other", buffer_dtype="bfloat16").train()
    told = said()
    assert bool(told) == (mean > 0) and all("--buffer-dtype" in text for text in told)
    assert cache.main([str(tmp_path / "bfloat16"), *arguments, "--disable-progress-bar"]) == 0
    told = said()
    assert bool(told) == (mean > 0) and all("--dtype" in text for text in told)


def test_a_block_whose_mlp_gives_nothing(make, changed, tmp_path, capsys):
    def prune(model):
        model.h[1].mlp.c_proj.weight.zero_()
        model.h[1].mlp.c_proj.bias.zero_()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    trainer = make(changed(prune), eval_interval=2, eval_replacement=True)
    trainer.train()
    for path in (tmp_path / "run").rglob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=refuse)
    metrics = rows_of(tmp_path / "run", "heldout")[-1]
    assert metrics["layers_without_nmse"] == [1] and metrics["nmse_per_layer"][1] is None
    assert math.isfinite(metrics["nmse"]) and metrics["nmse"] == metrics["nmse_per_layer"][0]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "no value in layer 1" in card and "inf" not in card.partition("## Results")[2].partition("## Training")[0]
    assert info.main([str(tmp_path / "run")]) == 0
    assert "no value in layer 1" in capsys.readouterr().out


@pytest.mark.parametrize("name, unit", [("batchtopk", "lower k"), ("jumprelu", "raise sparsity_lambda")])
def test_a_dense_clt_gets_advice_that_it_can_follow(caplog, name, unit):
    config = CLTConfig(num_layers=2, d_model=4, num_features=16, activation_fn=name, k=4)
    assert warn_if_dense({"l0": 8.0, "step": 3}, config)
    assert unit in caplog.text and ("use batchtopk" in caplog.text) == (name == "jumprelu")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_last_threshold_is_the_mean_since_the_restart(make, accumulation):
    run = {"training_steps": 7, "gradient_accumulation_steps": accumulation, "seed": 1, "initial_weights": "random"}
    trainer = make(config={"activation_fn": "batchtopk"}, **run)
    seen, forward = [], CrossLayerTranscoder._update_running_thresholds

    def recording(clt, features):
        seen.append(torch.stack([layer.values[layer.values > 0].min() for layer in features]))
        forward(clt, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossLayerTranscoder, "_update_running_thresholds", recording)
        clt = trainer.train()
    since = seen[4 * accumulation :]  # the last restart is at step 4
    found = torch.cat([threshold() for threshold in clt.thresholds])
    torch.testing.assert_close(found, torch.stack(since).mean(dim=0))


# -- files of others --------------------------------------------------------------------------------------------------

OTHERS = {
    "config.json": '{"model_type": "gpt2"}',
    "config.yaml": "learning_rate: 1",
    "model.safetensors.index.json": '{"weight_map": {"lm_head": "model.safetensors"}}',
    "metrics.json": '{"accuracy": 1}',
    "metrics.jsonl": '{"mine": 1}\n',
    "W_enc_0.safetensors": "mine",
    "plots/training_curves.png": "mine",
    "checkpoint-2/trainer_state.json": '{"global_step": 2}',
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_with_files_of_others_is_refused_and_kept(make, tmp_path, name, overwrite):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(OTHERS[name])
    with pytest.raises(ValueError, match=f"output_dir=.*holds {name.partition('/')[0]}") as caught:
        make(overwrite_output_dir=overwrite)
    assert "overwrite" not in str(caught.value)
    assert path.read_text() == OTHERS[name]


def test_an_overwritten_run_takes_along_its_own_files_alone(make, tmp_path):
    make(checkpoint_interval=2, report_to=["tensorboard"]).train()
    assert foreign_files(tmp_path / "run") == []
    mine = {"notes.txt": "mine", "model.safetensors": "mine", "plots/mine.png": "mine", "other/config.json": "{}"}
    for name, text in mine.items():
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    make(overwrite_output_dir=True, training_steps=2).train()
    assert [row["step"] for row in rows_of(tmp_path / "run", "train")] == [1, 2]
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert {name: (tmp_path / "run" / name).read_text() for name in mine} == mine


def test_a_checkpoint_of_transformers_is_none_of_ours(make, tmp_path):
    make(checkpoint_interval=2, training_steps=5).train()
    other = tmp_path / "run" / "checkpoint-900"
    other.mkdir()
    (other / "trainer_state.json").write_text("{}")
    make(checkpoint_interval=2, training_steps=9, resume_from_checkpoint="latest", save_total_limit=1).train()
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == [
        "checkpoint-8",
        "checkpoint-900",
    ]


def test_a_clt_is_not_saved_over_a_language_model(changed, tmp_path):
    folder = Path(changed(lambda model: None))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    clt = CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=4, num_features=8))
    with pytest.raises(ValueError, match=r"config\.json .*give another folder"):
        clt.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# -- what a resumed run goes on with ----------------------------------------------------------------------------------


@pytest.fixture
def stopped(make, tmp_path):
    make(training_steps=5, checkpoint_interval=4).train()
    return lambda **arguments: make(training_steps=6, resume_from_checkpoint="latest", **arguments)


def test_another_language_model_of_the_same_shape_is_refused(stopped, changed):
    for name, change in {
        "shifted": shifted(100.0),
        "tuned": lambda model: model.h[1].mlp.c_fc.weight.add_(1e-3 * torch.randn_like(model.h[1].mlp.c_fc.weight)),
    }.items():
        with pytest.raises(ValueError, match=r"model=.*checkpoint-4"):
            stopped(model=changed(change, name)).train()


@pytest.mark.parametrize(
    "arguments", [{"clt_dtype": "bfloat16"}, {"normalization_method": "none"}], ids=lambda a: next(iter(a))
)
def test_what_cannot_change_within_a_run_is_refused(stopped, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"{name}='{value}'.*checkpoint-4 .*{name}="):
        stopped(**arguments).train()


def test_what_may_change_is_said_once(stopped, changed, caplog):
    moved = changed(lambda model: None, "moved")  # the same weights elsewhere, read in another format
    stopped(model=moved, model_dtype="bfloat16", learning_rate=1e-3, log_interval=3).train()
    (said,) = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    for text in ("learning_rate 0.004 -> 0.001", "training_steps 5 -> 6", "model_dtype None -> 'bfloat16'", "moved"):
        assert text in said
    assert "log_interval" not in said


def test_the_same_settings_are_not_spoken_of(make, caplog):
    make(training_steps=6, checkpoint_interval=4, log_interval=1).train()
    make(training_steps=6, checkpoint_interval=2, log_interval=2, resume_from_checkpoint="latest").train()
    assert "other settings" not in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_resumed_run_keeps_no_file_of_its_checkpoint_mapped(make, tmp_path):
    stopping = make(training_steps=6, checkpoint_activations=True)
    recorded(stopping, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        stopping.train()
    resumed = make(training_steps=6, checkpoint_activations=True, resume_from_checkpoint="latest")
    endless, mapped = resumed.buffer.endless, []

    def looking():
        for batch in endless():
            mapped.append([line for line in Path("/proc/self/maps").read_text().splitlines() if "checkpoint-" in line])
            yield batch

    resumed.buffer.endless = looking
    resumed.train()
    assert mapped and not any(mapped)


def test_weights_that_are_not_finite_never_take_the_place_of_a_good_checkpoint(make, tmp_path):
    trainer = make(training_steps=20, checkpoint_interval=2, save_total_limit=1, log_interval=100)
    update = trainer._update

    def breaking(*arguments):
        result = update(*arguments)
        if trainer.step == 5:
            trainer.model.decoders[1].weight.data[3, 0, 2] = torch.nan
        return result

    trainer._update = breaking
    with pytest.raises(CheckpointError, match=r"step 6 .*not finite.*checkpoint-4"):
        trainer.train()
    (left,) = list_checkpoints(tmp_path / "run")
    assert left.name == "checkpoint-4"
    saved = load_file(left / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values() if value.is_floating_point())


# -- what transformers and Accelerate call ----------------------------------------------------------------------------


@pytest.fixture
def clt():
    return CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=8, num_features=16, activation_fn="topk", k=2))


@pytest.mark.parametrize(
    "arguments",
    [
        {"state_dict": None, "save_function": torch.save, "max_shard_size": "5GB"},
        {"safe_serialization": True, "variant": None, "token": None},
        {"save_peft_format": True, "save_original_format": False},
    ],
    ids=lambda a: next(iter(a)),
)
def test_saving_takes_what_does_not_change_the_files(clt, tmp_path, arguments):
    clt.save_pretrained(tmp_path / "plain")
    clt.save_pretrained(tmp_path / "given", **arguments)
    assert all(
        torch.equal(value, released(tmp_path / "given")[n]) for n, value in released(tmp_path / "plain").items()
    )


@pytest.mark.parametrize("arguments", [{"safe_serialization": False}, {"variant": "fp16"}], ids=str)
def test_saving_refuses_other_files(clt, tmp_path, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        clt.save_pretrained(tmp_path, **arguments)
    with pytest.raises(TypeError, match="colour"):
        clt.save_pretrained(tmp_path, colour="red")


@pytest.mark.parametrize("normalised", [False, True])
def test_a_gathered_state_dict_is_saved_in_the_place_of_the_weights(clt, tmp_path, normalised):
    if normalised:
        clt.set_normalization(*(torch.rand(2, 8) + 0.5 for _ in range(4)))
    other = CrossLayerTranscoder(clt.config)
    other.save_pretrained(tmp_path / "taken", state_dict={n: v.clone() for n, v in clt.state_dict().items()})
    clt.save_pretrained(tmp_path / "own")
    assert all(torch.equal(value, released(tmp_path / "taken")[n]) for n, value in released(tmp_path / "own").items())


def test_transformers_trainer_trains_and_saves_a_clt(clt, tmp_path):
    rows = [{"inputs": x, "labels": x.tanh()} for x in torch.randn(64, 2, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=clt, args=arguments, train_dataset=rows).train()
    saved = CrossLayerTranscoder.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in clt.state_dict().items())


# -- names and paths --------------------------------------------------------------------------------------------------


def test_a_folder_is_never_taken_for_a_repository_later(make, tiny_gpt2, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    shutil.copytree(tiny_gpt2, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    make("models/tiny").train()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "run")
    clt.save_pretrained(tmp_path / "copy")
    for folder in ("run", "copy"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "base_model:" not in card and "huggingface.co/models" not in card
        assert "a local copy of `tiny`" in card


def test_names_that_exist_here_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    for name, expected in {
        "models/tiny": "./models/tiny", "./models/tiny": "./models/tiny", "../x": "../x", "openai/gpt2": "openai/gpt2",
        str(tmp_path / "models"): str(tmp_path / "models"), "~/lm": str(tmp_path / "home" / "lm"),
    }.items():  # fmt: skip
        assert local_or_hub(name) == expected


def test_home_in_every_path_of_a_run(make, tiny_gpt2, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_gpt2, home / "lm")
    make("~/lm", folder="../../~", output_dir="~/clt", checkpoint_interval=2).train()
    again = make("~/lm", output_dir="~/clt", training_steps=5, resume_from_checkpoint="~/clt/checkpoint-2")
    again.train()
    CrossLayerTranscoder.from_pretrained("~/clt").save_pretrained("~/copy")
    assert (home / "clt" / "config.json").is_file() and (home / "copy" / "config.json").is_file()
    assert info.main(["~/clt"]) == 0 and not (tmp_path / "~").exists()


# -- processes of their own -------------------------------------------------------------------------------------------


def in_a_process(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_waiting_threads_do_not_spin_unless_the_user_says_so():
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        assert name not in os.environ or os.environ[name] in ("PASSIVE", "6000")  # set by this process's own import
    code = (
        "import os, sys\n"
        "class Look:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])\n"
        "sys.meta_path.insert(0, Look())\n"
        "import hf_clt\n"
    )
    environment = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    code_without = "import os\nfor n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'): os.environ.pop(n)\n" + code
    assert in_a_process(code_without, **environment)[:2] == ["PASSIVE", "6000"]
    environment = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "77"}
    assert in_a_process(code, **environment)[:2] == ["ACTIVE", "77"]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["info", CARD]], ids=str)
def test_help_and_info_import_nothing_heavy(words):
    code = (
        "import contextlib, io, sys\n"
        "from hf_clt.commands import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({words!r})\n"
        "print(*(n for n in ('hf_clt.modeling_clt', 'nnsight', 'datasets', 'pandas') if n in sys.modules))\n"
    )
    assert in_a_process(code) == []


@pytest.mark.slow
def test_a_checkout_on_the_path_trains_to_the_card(tiny_gpt2, small_text_file, tmp_path):
    """Without an installation: no metadata."""
    root = Path(__file__).parents[2]
    site = Path(torch.__file__).parents[1]
    code = (
        "import importlib.metadata as metadata, sys\n"
        f"sys.path[:0] = [{str(root)!r}, {str(site)!r}]\n"
        "found = metadata.version\n"
        "def version(name):\n"
        "    if name in ('hf_clt', 'hf-clt'): raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.version = version\n"
        "import hf_clt\n"
        "from hf_clt.commands import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = f"--model {tiny_gpt2} --dataset {small_text_file} --num-features 48 --k 4 --activation-fn topk".split()
    options += ["--context-size", "32", "--batch-size", "64", "--n-batches-in-buffer", "4", "--training-steps", "2"]
    options += f"--eval-tokens 200 --disable-progress-bar --output-dir {tmp_path / 'run'}".split()
    done = subprocess.run([sys.executable, "-S", "-c", code, "train", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "0+checkout" in (tmp_path / "run" / "README.md").read_text()


def test_the_trained_clt_computes_as_any_other(make, monkeypatch):
    monkeypatch.setattr(encode, "multiplies_bfloat16", lambda: True)  # elsewhere autocast computes in float32
    trainer = make(mixed_precision="bf16")
    clt = trainer.train()
    inputs = torch.randn(5, 2, 64)
    assert torch.equal(clt(inputs).reconstruction, CrossLayerTranscoder.forward(clt, inputs).reconstruction)
    assert clt.forward.__func__ is CrossLayerTranscoder.forward
