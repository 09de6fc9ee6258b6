"""Options: every field from a flag in both spellings and from YAML, and a clear error for every bad value."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, Qwen3Config

from hf_clt.commands import train as train_command
from hf_clt.configuration_clt import CLT_CONFIG_HELP, CLTConfig
from hf_clt.training.arguments import CLTTrainingArguments
from hf_clt.training.initial_config import build_config
from hf_clt.training.parser import parse_train_args


SCRIPT = Path(__file__).parents[2] / "scripts" / "train_clt.py"
REQUIRED = ["--model", "gpt2", "--dataset", "text.txt", "--num-features", "64"]

# The names of the reference trainer, and those beyond its list, each with a text, and the value it has to become.
TRAINING_FLAGS = {
    "--model": ("a/b", "a/b"),
    "--model-dtype": ("bfloat16", "bfloat16"),
    "--dataset": ("c/d", "c/d"),
    "--dataset-split": ("validation", "validation"),
    "--dataset-text-column": ("content", "content"),
    "--trust-remote-code": (None, True),
    "--max-samples": ("17", 17),
    "--context-size": ("64", 64),
    "--prepend-bos": (None, True),
    "--exclude-special-tokens": ("false", False),
    "--streaming": ("false", False),
    "--store-batch-size-prompts": ("12", 12),
    "--n-batches-in-buffer": ("9", 9),
    "--batch-size": ("33", 33),
    "--clt-dtype": ("bfloat16", "bfloat16"),
    "--normalization-method": ("mean_std", "mean_std"),
    "--normalization-estimation-batches": ("3", 3),
    "--learning-rate": ("4e-4", 4e-4),
    "--training-steps": ("123", 123),
    "--optimizer": ("adamw", "adamw"),
    "--lr-scheduler": ("cosine", "cosine"),
    "--log-interval": ("7", 7),
    "--eval-interval": ("0", 0),
    "--checkpoint-interval": ("0", 0),
    "--dead-feature-window": ("77", 77),
    "--output-dir": ("out", "out"),
    "--device": ("cuda:1", "cuda:1"),
    "--enable-wandb": (None, True),
    "--wandb-project": ("p", "p"),
    "--wandb-entity": ("e", "e"),
    "--wandb-run-name": ("none", "none"),
    "--seed": ("5", 5),
    "--resume-from-checkpoint": ("latest", "latest"),
    "--overwrite-output-dir": (None, True),
    "--gradient-accumulation-steps": ("4", 4),
    "--mixed-precision": ("bf16", "bf16"),
    "--max-grad-norm": ("0", 0.0),
    "--warmup-steps": ("50", 50),
    "--eval-tokens": ("100", 100),
    "--save-total-limit": ("none", None),
    "--feature-parallel-size": ("1", 1),
    "--init-from": ("user/clt", "user/clt"),
    "--hub-model-id": ("user/clt", "user/clt"),
    "--hub-branch": ("half-trained", "half-trained"),
    "--initial-feature-rate": ("0.25", 0.25),
    "--stream-retries": ("0", 0),
    "--on-bad-activations": ("skip", "skip"),
}
CONFIG_FLAGS = {
    "--base-model-name-or-path": ("a/b", "a/b"),
    "--base-model-revision": ("main", "main"),
    "--num-layers": ("3", 3),
    "--d-model": ("16", 16),
    "--num-features": ("99", 99),
    "--activation-fn": ("topk", "topk"),
    "--k": ("8", 8),
    "--k-scope": ("token", "token"),
    "--jumprelu-threshold": ("1e-2", 0.01),
    "--jumprelu-bandwidth": ("2", 2.0),
    "--decoder-reach": ("1", 1),
    "--decoder-tying": ("per_source", "per_source"),
    "--skip-connection": (None, True),
    "--feature-input-hook": ("mlp.hook_in", "mlp.hook_in"),
    "--feature-output-hook": ("mlp.hook_out", "mlp.hook_out"),
    "--sparsity-lambda": ("30", 30.0),
    "--sparsity-c": ("0.5", 0.5),
    "--sparsity-first-layer": ("0.25", 0.25),
    "--preactivation-coef": ("0", 0.0),
    "--aux-coef": (".125", 0.125),
    "--aux-k": ("4", 4),
}


def write(folder, text):
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


class TestFlags:
    @pytest.mark.parametrize("underscores", [False, True], ids=["dashes", "underscores"])
    @pytest.mark.parametrize("flag", [*TRAINING_FLAGS, *CONFIG_FLAGS])
    def test_lands_in_its_field(self, flag, underscores):
        text, expected = (TRAINING_FLAGS | CONFIG_FLAGS)[flag]
        name = flag[2:].replace("-", "_")
        spelt = "--" + name if underscores else flag
        args, config_kwargs = parse_train_args([*REQUIRED, spelt, *([] if text is None else [text])])
        if flag in TRAINING_FLAGS:
            value = getattr(args, name)
            # The field was not at this value before.
            assert flag == "--feature-parallel-size" or value != getattr(parse_train_args(REQUIRED)[0], name)
            assert config_kwargs == {"num_features": 64}
        else:
            value = config_kwargs[name]
            assert set(config_kwargs) == {"num_features", name}
        assert value == expected
        assert type(value) is type(expected)

    def test_every_config_field_is_an_option(self):
        own = {field.name for field in dataclasses.fields(CLTConfig) if field.name in CLTConfig.__annotations__}
        own -= {"model_type", "attribute_map", "trained_decoder_tying"}
        assert {flag[2:].replace("-", "_") for flag in CONFIG_FLAGS} == own
        with pytest.raises(ValueError, match="unknown option --trained-decoder-tying"):
            parse_train_args([*REQUIRED, "--trained-decoder-tying", "none"])

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (["--streaming"], True),
            (["--no-streaming"], False),
            (["--streaming", "true"], True),
            (["--streaming=False"], False),
            (["--streaming", "no"], False),
            (["--no-streaming", "--streaming"], True),
            (["--streaming", "--no_streaming"], False),
        ],
    )
    def test_switches(self, given, expected):
        assert parse_train_args([*REQUIRED, *given])[0].streaming is expected

    def test_switch_of_three_states(self):
        for given, expected in ([], None), (["--prepend-bos"], True), (["--no-prepend-bos"], False):
            assert parse_train_args([*REQUIRED, *given])[0].prepend_bos is expected

    def test_values_with_underscores_and_equals_are_kept(self):
        args, _ = parse_train_args([*REQUIRED, "--output_dir=a_b=--c_d", "--wandb_run_name", "x_y-z"])
        assert (args.output_dir, args.wandb_run_name) == ("a_b=--c_d", "x_y-z")

    def test_report_to(self):
        args, _ = parse_train_args([*REQUIRED, "--report-to", "tensorboard,trackio", "--enable-wandb"])
        assert args.report_to == ["tensorboard", "trackio", "wandb"]
        args, _ = parse_train_args([*REQUIRED, "--report-to", "tensorboard", "trackio"])
        assert args.report_to == ["tensorboard", "trackio"]
        assert parse_train_args([*REQUIRED, "--report-to", "none"])[0].report_to == []

    @pytest.mark.parametrize(
        ("given", "parts"),
        [
            (["--lerning-rate", "1"], ["--lerning-rate", "did you mean --learning-rate?"]),
            (["--num-featuers=3"], ["--num-featuers", "did you mean --num-features?"]),
            (["--zzzzqqq"], ["--zzzzqqq", "--help"]),
            (["--learning", "1"], ["unknown option --learning"]),  # no abbreviations
            (["--no-seed"], ["unknown option --no-seed"]),
            (["-x"], ["unknown option -x"]),
            (["settings.yaml"], ["'settings.yaml'", "comes first"]),
            (["--no-streaming", "true"], ["'true'"]),
            (["--no-streaming=true"], ["--no-streaming", "'true'"]),
            (["--seed"], ["--seed", "expected one argument"]),
            (["--seed", "1.5"], ["--seed", "int", "'1.5'"]),
            (["--learning-rate", "fast"], ["--learning-rate", "float", "'fast'"]),
            (["--learning-rate", "-1e-3"], ["learning_rate=-0.001", "above 0"]),
            (["--learning-rate", "nan"], ["learning_rate=nan", "a number"]),
            (["--streaming", "maybe"], ["--streaming", "maybe", "true/false"]),
            (["--decoder-tying", "all"], ["--decoder-tying", "'all'", "per_source", "per_target"]),
            (["--activation-fn", "gelu"], ["--activation-fn", "'gelu'", "batchtopk"]),
            (["--output-dir", ""], ["output_dir=''"]),
        ],
    )
    def test_mistakes_are_named(self, given, parts):
        with pytest.raises(ValueError) as error:
            parse_train_args([*REQUIRED, *given])
        assert "\n" not in str(error.value)
        for part in parts:
            assert part in str(error.value)

    @pytest.mark.parametrize("name", ["model", "dataset", "num_features"])
    def test_required(self, name):
        position = REQUIRED.index("--" + name.replace("_", "-"))
        with pytest.raises(ValueError, match=f"{name} is missing"):
            parse_train_args(REQUIRED[:position] + REQUIRED[position + 2 :])

    def test_init_from_brings_model_and_shape(self):
        args, config_kwargs = parse_train_args(["--init-from", "user/clt", "--dataset", "text.txt"])
        assert (args.model, args.init_from, config_kwargs) == (None, "user/clt", {})

    def test_reference_command(self):
        args, config_kwargs = parse_train_args(
            shlex.split(
                "--model gpt2 --num-features 12288 --activation-fn relu --dataset monology/pile-uncopyrighted "
                "--dataset-split train --dataset-text-column text --context-size 128 --exclude-special-tokens "
                "--store-batch-size-prompts 128 --batch-size 32 --n-batches-in-buffer 4 "
                "--normalization-method estimated_mean_std --normalization-estimation-batches 10 "
                "--learning-rate 1e-4 --training-steps 12000 --sparsity-lambda 30 --log-interval 10 "
                "--eval-interval 10 --dead-feature-window 500 --enable-wandb --wandb-project clt-training"
            )
        )
        assert config_kwargs == {"num_features": 12288, "activation_fn": "relu", "sparsity_lambda": 30.0}
        assert args == CLTTrainingArguments(
            model="gpt2",
            dataset="monology/pile-uncopyrighted",
            context_size=128,
            exclude_special_tokens=True,
            store_batch_size_prompts=128,
            batch_size=32,
            n_batches_in_buffer=4,
            normalization_estimation_batches=10,
            learning_rate=0.0001,
            training_steps=12000,
            eval_interval=10,
            dead_feature_window=500,
            report_to=["wandb"],
            enable_wandb=True,
            wandb_project="clt-training",
        )

    def test_programmatic_reference(self):
        args, config_kwargs = parse_train_args(
            [*REQUIRED, "--activation-fn", "jumprelu", "--jumprelu-threshold", "0.03", "--streaming", "--prepend-bos"]
            + ["--sparsity-lambda", "1e-3", "--sparsity-c", "1.0", "--preactivation-coef", "3e-6"]
        )
        assert config_kwargs == {
            "num_features": 64,
            "activation_fn": "jumprelu",
            "jumprelu_threshold": 0.03,
            "sparsity_lambda": 0.001,
            "sparsity_c": 1.0,
            "preactivation_coef": 0.000003,
        }
        assert args.streaming is True and args.prepend_bos is True


class TestYaml:
    def test_values_and_override(self, tmp_path):
        path = write(
            tmp_path,
            """
            model: gpt2
            dataset: text.txt
            num-features: 128
            learning_rate: 1e-4
            sparsity-lambda: 2
            adam-epsilon: 1.E-7
            max_grad_norm: 2
            mixed_precision: no
            streaming: no
            lr-scheduler: none
            save_total_limit: null
            max_samples: none
            wandb_run_name: 2024-01-01
            wandb_project: null
            wandb_entity: 12
            report_to: [tensorboard]
            training-steps: 100
            """.replace("\n            ", "\n"),
        )
        args, config_kwargs = parse_train_args([path, "--training_steps", "7", "--num-features", "256"])
        assert config_kwargs == {"num_features": 256, "sparsity_lambda": 2.0}
        assert args == CLTTrainingArguments(
            model="gpt2",
            dataset="text.txt",
            learning_rate=0.0001,
            adam_epsilon=0.0000001,
            max_grad_norm=2.0,
            mixed_precision="no",
            streaming=False,
            lr_scheduler="none",
            save_total_limit=None,
            wandb_run_name="2024-01-01",
            wandb_entity="12",
            report_to=["tensorboard"],
            training_steps=7,
        )

    @pytest.mark.parametrize(
        ("text", "expected"), [("1e-4", 1e-4), ("1E+2", 100.0), ("-1e-4", None), (".5e-1", 0.05), ("3", 3.0)]
    )
    def test_numbers(self, tmp_path, text, expected):
        path = write(tmp_path, f"learning_rate: {text}")
        if expected is None:
            with pytest.raises(ValueError, match=r"learning_rate=-0\.0001"):
                parse_train_args([path, *REQUIRED])
        else:
            assert parse_train_args([path, *REQUIRED])[0].learning_rate == expected

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("lerning_rate: 1", ["--lerning_rate", "did you mean --learning-rate?"]),
            ("model:\n  name: gpt2", ["model={'name': 'gpt2'}"]),
            ("seed: 3.0", ["--seed", "int", "3.0"]),
            ("seed: true", ["--seed", "int", "true"]),
            ("learning_rate: .inf", ["learning_rate=inf", "a number"]),
            ("streaming: 3", ["--streaming", "3", "true/false"]),
            ("seed: null", ["--seed", "int", "none"]),
            ("activation_fn: gelu", ["--activation-fn", "'gelu'", "batchtopk"]),
            ("seed: 1\nseed: 2", ["seed is given twice"]),
            ("batch-size: 1\nbatch_size: 2", ["batch_size is given twice"]),
            ("- seed", ["list", "name: value"]),
            ("seed: [1", ["not valid YAML"]),
            ("3: 4", ["unknown option --3"]),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, text, parts):
        with pytest.raises(ValueError) as error:
            parse_train_args([write(tmp_path, text), *REQUIRED])
        assert "\n" not in str(error.value)
        for part in [*parts, "settings.yaml"]:
            assert part in str(error.value)

    def test_missing_and_empty_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"settings file 'nowhere\.yaml': .*No such file"):
            parse_train_args(["nowhere.yaml", *REQUIRED])
        assert parse_train_args([write(tmp_path, ""), *REQUIRED]) == parse_train_args(REQUIRED)


class TestValidation:
    @pytest.mark.parametrize(
        ("name", "value", "remedy"),
        [
            *[
                (name, value, "above 0")
                for name in (
                    "max_samples",
                    "store_batch_size_prompts",
                    "n_batches_in_buffer",
                    "batch_size",
                    "normalization_estimation_batches",
                    "training_steps",
                    "gradient_accumulation_steps",
                    "log_interval",
                    "save_total_limit",
                    "dead_feature_window",
                )
                for value in (0, -1)
            ],
            ("learning_rate", 0.0, "above 0"),
            ("learning_rate", -0.5, "above 0"),
            ("learning_rate", float("inf"), "a number"),
            ("learning_rate", "1e-4", "a number"),
            ("adam_epsilon", 0.0, "above 0"),
            *[
                (name, -3, "0 or more")
                for name in ("eval_tokens", "warmup_steps", "seed", "eval_interval", "checkpoint_interval")
            ],
            ("weight_decay", -0.1, "0 or more"),
            ("max_grad_norm", -1.0, "0 or more"),
            ("adam_beta1", 1.0, "less than 1"),
            ("adam_beta2", -0.1, "less than 1"),
            ("initial_feature_rate", 1.5, "less than 1"),
            ("context_size", 1, "2 or more"),
            ("seed", 2**32, "less than"),
            ("seed", 1.0, "a whole number"),
            ("seed", True, "a whole number"),
            ("streaming", "yes", "true or false"),
            ("model", 3, "text"),
            ("model_dtype", "fp8", "auto, float32, bfloat16, float16"),
            ("clt_dtype", "float16", "float32, bfloat16"),
            ("buffer_dtype", "float16", "float32, bfloat16"),
            ("normalization_method", "mean", "estimated_mean_std, mean_std, none"),
            ("optimizer", "sgd", "adam, adamw"),
            ("lr_scheduler", "step", "linear, cosine, constant, none"),
            ("mixed_precision", "bfloat16", "no, bf16, fp16"),
            ("sparsity_schedule", "cosine", "linear, constant"),
            ("device", "gpu", "cuda"),
            ("buffer_device", "ram", "cpu"),
            ("report_to", [3], "a list of names"),
            ("feature_parallel_size", 0, "a value above 0"),
            ("weight_decay", 0.1, "adamw"),
            ("normalization_file", "s.safetensors", "mean_std"),
            ("hub_model_id", "a/b/c", "user/clt-gpt2"),
            ("warmup_steps", 10001, "training_steps=10000"),
            ("decay_steps", 10000, "training_steps=10000"),
            ("decay_steps", 0, "a value above 0"),
            ("sparsity_delay_steps", 10000, "training_steps=10000"),
            ("k_anneal_steps", 10000, "training_steps=10000"),
            ("k_anneal_steps", 5, "initial_k=64"),
            ("initial_k", 0, "a value above 0"),
            ("target_l0", 0.0, "a value above 0"),
            ("target_l0", -2.0, "a value above 0"),
        ],
    )
    def test_bad_value_is_named(self, name, value, remedy):
        with pytest.raises(ValueError) as error:
            CLTTrainingArguments(**{name: value})
        message = str(error.value)
        assert "\n" not in message
        assert f"{name}={value!r}" in message
        assert remedy in message

    def test_combinations(self, tmp_path):
        with pytest.raises(ValueError, match=r"push_to_hub=True .*hub_model_id"):
            CLTTrainingArguments(push_to_hub=True)
        CLTTrainingArguments(push_to_hub=True, hub_model_id="user/clt", hub_push_interval=10)
        with pytest.raises(ValueError, match=r"hub_push_interval=10 .*push_to_hub"):
            CLTTrainingArguments(hub_push_interval=10, hub_model_id="user/clt")
        with pytest.raises(ValueError, match="hub_push_interval=-1 is negative"):
            CLTTrainingArguments(push_to_hub=True, hub_model_id="user/clt", hub_push_interval=-1)
        CLTTrainingArguments(target_l0=16, sparsity_schedule="linear")
        for given in ({"sparsity_schedule": "constant"}, {"sparsity_delay_steps": 5}):
            with pytest.raises(
                ValueError, match=rf"{next(iter(given))}=.* no effect with target_l0=16.0; leave it out"
            ):
                CLTTrainingArguments(target_l0=16, **given)
        with pytest.raises(ValueError, match=r"warmup_steps=3 .*lr_scheduler='none'"):
            CLTTrainingArguments(lr_scheduler="none", warmup_steps=3)
        with pytest.raises(ValueError, match=r"report_to='mlflow' .*tensorboard"):
            CLTTrainingArguments(report_to=["wandb", "mlflow"])
        with pytest.raises(ValueError, match="does not exist"):
            CLTTrainingArguments(normalization_method="mean_std", normalization_file=str(tmp_path / "no.safetensors"))
        (tmp_path / "s.safetensors").write_bytes(b"")
        CLTTrainingArguments(normalization_method="mean_std", normalization_file=tmp_path / "s.safetensors")
        CLTTrainingArguments(optimizer="adamw", weight_decay=0.1)
        CLTTrainingArguments(decay_steps=5, initial_k=64, k_anneal_steps=5)
        with pytest.raises(ValueError, match=r"decay_steps=5 has no effect with lr_scheduler='constant'.*'linear'"):
            CLTTrainingArguments(lr_scheduler="constant", decay_steps=5)
        with pytest.raises(ValueError, match=r"decay_steps=7 .* 4 of training_steps=10"):
            CLTTrainingArguments(training_steps=10, warmup_steps=4, decay_steps=7)

    def test_batch_has_to_fit_the_buffer(self):
        # 2 extraction batches of 3 rows with 4 counted positions each.
        sizes = {"n_batches_in_buffer": 2, "store_batch_size_prompts": 3, "context_size": 5}
        assert CLTTrainingArguments(batch_size=24, **sizes).tokens_in_buffer == 24
        with pytest.raises(ValueError, match=r"batch_size=25 .*24"):
            CLTTrainingArguments(batch_size=25, **sizes)

    def test_python_values_are_taken_as_meant(self, tmp_path):
        args = CLTTrainingArguments(learning_rate=1, output_dir=tmp_path / "out", report_to="tensorboard")
        assert type(args.learning_rate) is float
        assert args.output_dir == str(tmp_path / "out")
        assert args.report_to == ["tensorboard"]


class TestHelpers:
    OFF_WHEN_NONE = ("dataset_config", "normalization_file", "init_from", "resume_from_checkpoint", "hub_model_id")

    def test_warmup(self):
        for steps, warmup, scheduler, expected in [
            (10000, None, "linear", 500),
            (100000, None, "cosine", 1000),
            (10, None, "constant", 0),
            (10, 10, "linear", 10),
            (10000, None, "none", 0),
        ]:
            args = CLTTrainingArguments(training_steps=steps, warmup_steps=warmup, lr_scheduler=scheduler)
            assert args.num_warmup_steps == expected

    def test_k_is_annealed_over_a_fifth_of_training(self):
        assert CLTTrainingArguments(training_steps=1003, initial_k=64).num_k_anneal_steps == 200
        assert CLTTrainingArguments(training_steps=1003, initial_k=64, k_anneal_steps=0).num_k_anneal_steps == 0

    def test_to_dict_and_non_default(self):
        args = CLTTrainingArguments(model="gpt2", seed=1, report_to=["trackio"], adam_beta1=0.5)
        assert CLTTrainingArguments(**json.loads(json.dumps(args.to_dict()))) == args
        assert args.non_default() == {"model": "gpt2", "seed": 1, "report_to": ["trackio"]}
        assert CLTTrainingArguments().non_default() == {}
        changed = dataclasses.replace(args, training_steps=3)
        assert changed.non_default() == {"model": "gpt2", "training_steps": 3, "seed": 1, "report_to": ["trackio"]}

    def test_a_buffer_smaller_than_a_batch_is_refused(self):
        sizes = {"n_batches_in_buffer": 32, "store_batch_size_prompts": 8}
        assert CLTTrainingArguments(batch_size=32512, **sizes).tokens_in_buffer == 32512
        with pytest.raises(ValueError, match=r"batch_size=32513 .*lower batch_size"):
            CLTTrainingArguments(batch_size=32513, **sizes)

    def test_every_field_is_explained(self):
        groups = {"model", "text", "buffer", "normalisation", "optimisation", "bookkeeping", "trackers", "hub"}
        fields = dataclasses.fields(CLTTrainingArguments)
        for field in fields:
            assert len(field.metadata["help"].split()) >= 4, field.name
            assert field.metadata["help"] in CLTTrainingArguments.__doc__
            # --help prints no default where it is None, so the text has to say what that means.
            if field.default is None and field.name not in self.OFF_WHEN_NONE:
                assert any(word in field.metadata["help"] for word in ("None:", "Required")), field.name
        assert {field.metadata["group"] for field in fields} == groups


class TestBuildConfig:
    @pytest.fixture
    def gpt2(self, tmp_path):
        folder = tmp_path / "gpt2"
        GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=100).save_pretrained(folder)
        return str(folder)

    def test_fills_in_what_the_model_says(self, gpt2):
        config = build_config(CLTTrainingArguments(model=gpt2), {"num_features": 32, "activation_fn": "topk", "k": 4})
        assert (config.num_layers, config.d_model, config.num_features, config.k) == (2, 64, 32, 4)
        assert (config.feature_input_hook, config.feature_output_hook) == ("hook_resid_mid", "hook_mlp_out")
        assert (config.base_model_name_or_path, config.base_model_revision) == (gpt2, None)
        # The default of the activation function, not of the class.
        assert config.sparsity_lambda == 0.0 and config.aux_coef > 0

    def test_given_values_win(self, gpt2):
        config = build_config(
            CLTTrainingArguments(model=gpt2),
            {
                "num_features": 32,
                "num_layers": 2,
                "feature_input_hook": "mlp.hook_in",
                "base_model_name_or_path": "openai-community/gpt2",
                "base_model_revision": "v1",
            },
        )
        assert (config.feature_input_hook, config.feature_output_hook) == ("mlp.hook_in", "hook_mlp_out")
        assert (config.base_model_name_or_path, config.base_model_revision) == ("openai-community/gpt2", "v1")

    def test_hooks_of_qwen3(self, tmp_path):
        Qwen3Config(num_hidden_layers=3, hidden_size=16).save_pretrained(tmp_path)
        config = build_config(CLTTrainingArguments(model=tmp_path), {"num_features": 8})
        assert (config.num_layers, config.d_model) == (3, 16)
        assert (config.feature_input_hook, config.feature_output_hook) == ("mlp.hook_in", "mlp.hook_out")

    @pytest.mark.parametrize(
        ("config_kwargs", "parts"),
        [
            ({"num_features": 8, "num_layers": 5}, ["num_layers=5", "has 2"]),
            ({"num_features": 8, "d_model": 65}, ["d_model=65", "has 64"]),
            ({}, ["num_features is missing"]),
            ({"num_features": 8, "base_model_revision": "v1"}, ["base_model_revision='v1'", "model_revision=None"]),
        ],
    )
    def test_contradictions(self, gpt2, config_kwargs, parts):
        with pytest.raises(ValueError) as error:
            build_config(CLTTrainingArguments(model=gpt2), config_kwargs)
        for part in parts:
            assert part in str(error.value)

    def test_unknown_model(self, tmp_path):
        with pytest.raises(OSError, match=r"model='.*nowhere'.*existing folder"):
            build_config(CLTTrainingArguments(model=str(tmp_path / "nowhere")), {"num_features": 8})
        with pytest.raises(OSError, match=r"model='.*config\.json"):
            build_config(CLTTrainingArguments(model=str(tmp_path)), {"num_features": 8})
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(OSError, match=r"cannot be loaded.*model_type"):
            build_config(CLTTrainingArguments(model=str(tmp_path)), {"num_features": 8})


class TestScript:
    def test_help_prints_every_option(self):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=120, check=True
        )
        names = [field.name for field in dataclasses.fields(CLTTrainingArguments)] + list(CLT_CONFIG_HELP)
        starts = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")}
        assert starts == {"--" + name.replace("_", "-") for name in names}
        assert "--no-streaming turns it off" in done.stdout
        assert "(default: 0.5)" in done.stdout
        assert "130 when Ctrl-C (SIGINT) or SIGTERM" in done.stdout

    def test_errors_are_one_line(self, capsys, monkeypatch):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("HF_CLT_DEBUG", raising=False)
        assert train_command.main([*REQUIRED, "--seed", "x"]) == 2
        assert capsys.readouterr() == ("", "error: argument --seed: invalid int value: 'x'; see --help\n")
        monkeypatch.setenv("RANK", "1")
        assert train_command.main([*REQUIRED, "--seed", "x"]) == 2
        assert capsys.readouterr().err.startswith("[rank 1] error: argument --seed")
        monkeypatch.setenv("HF_CLT_DEBUG", "1")
        with pytest.raises(ValueError, match="seed"):
            train_command.main([*REQUIRED, "--seed", "x"])

    def test_interrupt_says_how_to_go_on(self, capsys, monkeypatch):
        monkeypatch.delenv("RANK", raising=False)

        def interrupted(argv):
            raise KeyboardInterrupt("stopped at step 7")

        monkeypatch.setattr(train_command, "train", interrupted)
        assert train_command.main([]) == 130
        message = "interrupted (stopped at step 7); continue with --resume-from-checkpoint latest\n"
        assert capsys.readouterr() == ("", message)
