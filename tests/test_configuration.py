"""The configuration: defaults, refusals, and what survives a round trip through JSON."""

import json
import math
from dataclasses import fields

import pytest
import transformers
from transformers import AutoConfig, PreTrainedConfig

from hf_clt import CLTConfig
from hf_clt.configuration_clt import CLT_CONFIG_HELP


SHAPE = {"num_layers": 4, "d_model": 8, "num_features": 32}
OWN_FIELDS = {field.name for field in fields(CLTConfig)} - {field.name for field in fields(PreTrainedConfig)}


def refusal(**changes):
    """The message with which a configuration is refused."""
    with pytest.raises((ValueError, TypeError)) as caught:
        CLTConfig(**{**SHAPE, **changes})
    return str(caught.value)


def test_the_fields_of_the_contract_and_their_defaults():
    config = CLTConfig(**SHAPE)
    expected = {
        "base_model_name_or_path": None,
        "base_model_revision": None,
        "activation_fn": "jumprelu",
        "k": 32,
        "k_scope": "layer",
        "jumprelu_threshold": 0.03,
        "decoder_reach": None,
        "decoder_tying": "none",
        "skip_connection": False,
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
        "sparsity_c": 1.0,
        "sparsity_first_layer": 1.0,
        "preactivation_coef": 3e-6,
        "trained_decoder_tying": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    by_activation = {"jumprelu_bandwidth", "sparsity_lambda", "aux_coef", "aux_k"}
    assert OWN_FIELDS - {"model_type"} == set(expected) | by_activation | set(SHAPE)
    assert config.model_type == "cross_layer_transcoder"


def test_every_option_has_a_help_text():
    assert set(CLT_CONFIG_HELP) == OWN_FIELDS - {"model_type", "trained_decoder_tying"}
    assert all(text[0].isupper() or text.startswith("none") for text in CLT_CONFIG_HELP.values())


@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_defaults_that_depend_on_the_activation_function_are_filled_in(activation_fn):
    config = CLTConfig(**SHAPE, activation_fn=activation_fn)
    assert config.jumprelu_bandwidth > 0
    top_k = activation_fn in ("topk", "batchtopk")
    assert (config.sparsity_lambda == 0) == top_k
    assert (config.aux_coef > 0) == (config.aux_k > 0) == top_k
    # The error is summed over the width, so lambda goes with it.
    twice = CLTConfig(**{**SHAPE, "d_model": 2 * SHAPE["d_model"]}, activation_fn=activation_fn)
    assert twice.sparsity_lambda == 2 * config.sparsity_lambda


@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize(
    "name, value", [("sparsity_lambda", 0.0), ("sparsity_lambda", 5.0), ("aux_coef", 0.0), ("aux_k", 0)]
)
def test_a_given_value_wins_over_the_default_and_survives_the_file(tmp_path, activation_fn, name, value):
    config = CLTConfig(**SHAPE, activation_fn=activation_fn, **{name: value})
    assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    assert getattr(CLTConfig.from_pretrained(tmp_path), name) == value


def test_hidden_size_and_num_hidden_layers_map_to_the_shape():
    config = CLTConfig(hidden_size=8, num_hidden_layers=4, num_features=32)
    assert (config.d_model, config.num_layers) == (8, 4)
    assert (config.hidden_size, config.num_hidden_layers) == (8, 4)
    assert "hidden_size" not in config.to_dict()


@pytest.mark.parametrize(
    "reach, targets", [(None, [4, 3, 2, 1]), (1, [1, 1, 1, 1]), (3, [3, 3, 2, 1]), (4, [4, 3, 2, 1])]
)
def test_reach_and_number_of_targets(reach, targets):
    config = CLTConfig(**SHAPE, decoder_reach=reach)
    assert config.reach == (reach or 4)
    assert [config.num_targets(s) for s in range(4)] == targets


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typo, meant", [("num_feature", "num_features"), ("sparsity_lamda", "sparsity_lambda")])
def test_a_misspelt_field_is_refused_with_what_was_meant(typo, meant):
    message = refusal(**{typo: 1})
    assert repr(typo) in message and meant in message


@pytest.mark.parametrize(
    "key, value", [("a_field_of_next_year", 1), ("transformers.js_config", {"dtype": "q8"}), ("pad_token_id", 0)]
)
def test_an_unknown_key_in_a_file_is_kept_and_warned_of(tmp_path, caplog, key, value):
    CLTConfig(**SHAPE).save_pretrained(tmp_path / "one")
    path = tmp_path / "one" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    loaded = CLTConfig.from_pretrained(tmp_path / "one")
    assert key in caplog.text and loaded.num_features == SHAPE["num_features"]
    loaded.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())[key] == value


@pytest.mark.parametrize("new", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("old", ["relu", "jumprelu", "topk", "batchtopk"])
def test_defaults_follow_the_activation_function_when_a_file_is_read_with_another(tmp_path, old, new):
    CLTConfig(**SHAPE, activation_fn=old).save_pretrained(tmp_path)
    assert CLTConfig.from_pretrained(tmp_path, activation_fn=new).to_dict() == CLTConfig(
        **SHAPE, activation_fn=new, transformers_version=transformers.__version__
    ).to_dict() | {"architectures": None}
    assert CLTConfig.from_pretrained(tmp_path, activation_fn=new, aux_k=5).aux_k == 5
    CLTConfig(**SHAPE, activation_fn=old, sparsity_lambda=0.7).save_pretrained(tmp_path)
    assert CLTConfig.from_pretrained(tmp_path, activation_fn=new).sparsity_lambda == 0.7


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 0},
        {"d_model": -1},
        {"num_features": 0},
        {"num_features": None},
        {"k": 0},
        {"k": 33, "activation_fn": "topk"},
        {"k": 33, "activation_fn": "batchtopk"},
        {"decoder_reach": 0},
        {"decoder_reach": 5},
        {"jumprelu_threshold": -0.1},
        {"jumprelu_threshold": math.nan},
        {"jumprelu_bandwidth": 0.0},
        {"jumprelu_bandwidth": -1},
        {"sparsity_lambda": -1e-3},
        {"sparsity_c": 0.0},
        {"sparsity_c": -1.0},
        {"sparsity_first_layer": -0.5},
        {"preactivation_coef": -3e-6},
        {"aux_coef": -1.0},
        {"aux_k": -1},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(changes):
    name, value = next(iter(changes.items()))
    message = refusal(**changes)
    assert f"{name}={value}" in message


def test_a_weight_of_a_loss_that_is_not_there_is_refused():
    assert "sparsity_first_layer=0.5 has no effect with sparsity_lambda=0" in refusal(
        activation_fn="topk", k=2, sparsity_first_layer=0.5
    )
    CLTConfig(**SHAPE, activation_fn="topk", k=2, sparsity_first_layer=0.5, sparsity_lambda=0.1)


@pytest.mark.parametrize(
    "name",
    ["sparsity_lambda", "jumprelu_threshold", "preactivation_coef", "aux_coef", "sparsity_c", "sparsity_first_layer"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_number_that_is_not_finite_is_refused(name, value):
    assert name in refusal(**{name: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": "4"},
        {"num_layers": 4.0},
        {"num_layers": True},
        {"activation_fn": "gelu"},
        {"k_scope": "batch"},
        {"decoder_tying": "all"},
        {"skip_connection": "yes"},
        {"feature_input_hook": "hook_resid_pre"},
        {"feature_output_hook": "mlp.hook_in"},
        {"sparsity_lambda": "1e-4"},
        {"base_model_name_or_path": 3},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(changes):
    ((name, value),) = changes.items()
    with pytest.raises(Exception) as caught:
        CLTConfig(**{**SHAPE, **changes})
    assert name in str(caught.value) and str(value) in str(caught.value)


def test_whole_numbers_are_accepted_for_real_ones():
    names = ("sparsity_lambda", "sparsity_c", "jumprelu_threshold", "jumprelu_bandwidth", "aux_coef")
    config = CLTConfig(**SHAPE, preactivation_coef=0, **dict.fromkeys(names, 1))
    assert all(getattr(config, name) == 1 for name in names)


def test_k_may_exceed_the_features_where_it_is_not_used():
    assert CLTConfig(num_layers=2, d_model=4, num_features=8).k == 32


# -- JSON -------------------------------------------------------------------------------------------------------------

CONFIGS = {
    "defaults": {},
    "all fields": {
        "base_model_name_or_path": "openai-community/gpt2",
        "base_model_revision": "main",
        "activation_fn": "batchtopk",
        "k": 7,
        "k_scope": "token",
        "jumprelu_threshold": 0.5,
        "jumprelu_bandwidth": 2,
        "decoder_reach": 2,
        "decoder_tying": "per_target",
        "trained_decoder_tying": "per_source",
        "skip_connection": True,
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "sparsity_lambda": 1e-4,
        "sparsity_c": 3.5,
        "preactivation_coef": 0.0,
        "aux_coef": 0.25,
        "aux_k": 5,
    },
    # What is another activation function's default, given by hand:
    "relu": {"activation_fn": "relu", "jumprelu_bandwidth": 0.1, "aux_coef": 1 / 32, "aux_k": 256},
    "topk": {"activation_fn": "topk", "sparsity_lambda": 1.0, "aux_coef": 0.0, "aux_k": 0, "jumprelu_bandwidth": 0.1},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_json_round_trip(tmp_path, name):
    config = CLTConfig(**SHAPE, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written) >= OWN_FIELDS  # every field is spelt out: defaults may change, a published CLT may not
    for loaded in (
        CLTConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        CLTConfig.from_dict(config.to_dict()),
        CLTConfig(**written),
    ):
        assert type(loaded) is CLTConfig
        assert {field: getattr(loaded, field) for field in OWN_FIELDS} == {f: getattr(config, f) for f in OWN_FIELDS}


def test_overrides_when_loading_are_validated(tmp_path):
    CLTConfig(**SHAPE).save_pretrained(tmp_path)
    assert CLTConfig.from_pretrained(tmp_path, sparsity_lambda=0.25).sparsity_lambda == 0.25
    with pytest.raises(Exception, match="sparsity_lambda=-1"):
        CLTConfig.from_pretrained(tmp_path, sparsity_lambda=-1)
