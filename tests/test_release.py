"""The files of a released CLT: what is written, what is read back, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_clt import CLTConfig, CrossLayerTranscoder, release
from hf_clt.files import read_json, write_json
from hf_clt.sharding import FeatureShard
from tests.reference import random_batch, random_clt, random_statistics


L, F, D = 3, 16, 5
VARIANTS = {
    "relu": {"activation_fn": "relu"},
    "relu, one layer each": {"activation_fn": "relu", "decoder_reach": 1},
    "jumprelu": {"activation_fn": "jumprelu"},
    "jumprelu, reach 2, skip": {"activation_fn": "jumprelu", "decoder_reach": 2, "skip_connection": True},
    "jumprelu, per source": {"activation_fn": "jumprelu", "decoder_tying": "per_source"},
    "jumprelu, per target": {"activation_fn": "jumprelu", "decoder_tying": "per_target", "skip_connection": True},
    "topk": {"activation_fn": "topk"},
    "topk over all layers": {"activation_fn": "topk", "k_scope": "token", "decoder_tying": "per_target"},
    "batchtopk": {"activation_fn": "batchtopk"},
    "batchtopk, all": {
        "activation_fn": "batchtopk",
        "k_scope": "token",
        "decoder_tying": "per_source",
        "decoder_reach": 2,
        "skip_connection": True,
    },
}
ALL_VARIANTS = pytest.mark.parametrize("variant", VARIANTS)


def trained(**fields):
    """A float32 CLT with random weights, its running thresholds started."""
    clt = random_clt(double=False, **fields)
    if clt.config.activation_fn == "batchtopk":
        clt.train()(random_batch(clt, seed=9)[0])
    return clt.eval()


def snapshot(clt):
    """Everything that a save must leave as it is."""
    tensors = {name: tensor.clone() for name, tensor in clt.state_dict().items()}
    return tensors, clt.config.to_dict(), clt.training, {id(parameter) for parameter in clt.parameters()}


def assert_same(before, after):
    assert before[0].keys() == after[0].keys() and before[1:] == after[1:]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def file_names(folder):
    return {path.name for path in Path(folder).iterdir()}


def change_tensors(path, **changes):
    """Rewrites a safetensors file with some tensors replaced, or removed where None."""
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.fixture
def saved(tmp_path):
    """Saves a CLT, which must stay as it is; returns the CLT and its folder."""

    def save(**fields):
        clt = trained(**fields)
        before = snapshot(clt)
        clt.save_pretrained(tmp_path / "clt")
        assert_same(before, snapshot(clt))
        return clt, tmp_path / "clt"

    return save


def circuit_tracer_files_alone(folder):
    """What a published CLT of circuit-tracer has: no config.json, no index."""
    for name in ("config.json", "model.safetensors.index.json", "README.md"):
        (folder / name).unlink()
    return folder


# -- what is written --------------------------------------------------------------------------------------------------


@ALL_VARIANTS
def test_names_shapes_and_values_of_the_tensors(saved, variant):
    clt, folder = saved(**VARIANTS[variant])
    config = clt.config
    reach = config.decoder_reach or L
    expected_files = {"config.json", "config.yaml", "model.safetensors.index.json", "README.md"}
    expected_files |= {f"W_{kind}_{layer}.safetensors" for kind in ("enc", "dec") for layer in range(L)}
    assert file_names(folder) == expected_files
    for s in range(L):
        encoder = load_file(folder / f"W_enc_{s}.safetensors")
        shapes = {f"W_enc_{s}": (F, D), f"b_enc_{s}": (F,), f"b_dec_{s}": (D,)}
        if config.activation_fn in ("jumprelu", "batchtopk"):
            shapes[f"threshold_{s}"] = (F,)
        if config.skip_connection:
            shapes[f"W_skip_{s}"] = (D, D)
        assert {name: tuple(tensor.shape) for name, tensor in encoder.items()} == shapes
        assert {tensor.dtype for tensor in encoder.values()} == {torch.float32}
        assert torch.equal(encoder[f"W_enc_{s}"], clt.encoders[s].weight)
        assert torch.equal(encoder[f"b_enc_{s}"], clt.encoders[s].bias)
        assert torch.equal(encoder[f"b_dec_{s}"], clt.decoders[s].bias)
        if config.skip_connection:
            assert torch.equal(encoder[f"W_skip_{s}"], clt.skips[s].weight)
        if config.activation_fn == "jumprelu":
            torch.testing.assert_close(encoder[f"threshold_{s}"], clt.thresholds[s].value.exp(), rtol=1e-6, atol=0)
        if config.activation_fn == "batchtopk":
            assert torch.equal(encoder[f"threshold_{s}"], clt.thresholds[s].value.expand(F))
        decoder = load_file(folder / f"W_dec_{s}.safetensors")
        assert list(decoder) == [f"W_dec_{s}"]
        weight = decoder[f"W_dec_{s}"]
        assert weight.shape == (F, min(L - s, reach), D)
        for j in range(weight.shape[1]):
            row = {
                "none": lambda s=s, j=j: clt.decoders[s].weight[:, j],
                "per_source": lambda s=s: clt.decoders[s].weight[:, 0],
                "per_target": lambda s=s, j=j: clt.decoders[s + j].weight[:, 0],
            }[config.decoder_tying]()
            assert torch.equal(weight[:, j], row)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("topk")])
def test_circuit_tracers_reading_of_the_files_gives_the_models_output(saved, variant):
    """Written as circuit-tracer computes: a gate at the threshold or a ReLU, one einsum per source and target."""
    clt, folder = saved(**VARIANTS[variant])
    inputs, _ = random_batch(clt)
    tensors = {}
    for path in folder.glob("W_*.safetensors"):
        tensors |= load_file(path)
    expected = []
    for t in range(L):
        target = tensors[f"b_dec_{t}"].expand(inputs.shape[0], -1)
        for s in range(t + 1):
            h = inputs[:, s] @ tensors[f"W_enc_{s}"].T + tensors[f"b_enc_{s}"]
            theta = tensors.get(f"threshold_{s}")
            acts = h.relu() if theta is None else h * (h > theta)
            if t - s < tensors[f"W_dec_{s}"].shape[1]:
                target = target + acts @ tensors[f"W_dec_{s}"][:, t - s]
        if f"W_skip_{t}" in tensors:
            target = target + inputs[:, t] @ tensors[f"W_skip_{t}"]
        expected.append(target)
    torch.testing.assert_close(clt(inputs).reconstruction, torch.stack(expected, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["openai-community/gpt2", None])
def test_config_files_and_index(saved, name):
    _, folder = saved(base_model_name_or_path=name, feature_input_hook="mlp.hook_in")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {
        **({} if name is None else {"model_name": name}),
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    config = read_json(folder / "config.json")
    assert config["model_type"] == "cross_layer_transcoder" and config["activation_fn"] == "jumprelu"
    assert config["architectures"] == ["CrossLayerTranscoder"] and config["dtype"] == "float32"
    index = read_json(folder / "model.safetensors.index.json")
    in_files = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            in_files[name] = (path.name, tensor.nbytes)
    assert index["weight_map"] == {name: file for name, (file, _) in in_files.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in in_files.values())


# -- round trip -------------------------------------------------------------------------------------------------------


@ALL_VARIANTS
@pytest.mark.parametrize(
    "load", [CrossLayerTranscoder.from_pretrained, AutoModel.from_pretrained], ids=["own", "auto"]
)
def test_round_trip(saved, variant, load):
    clt, folder = saved(**VARIANTS[variant])
    loaded, info = load(folder, output_loading_info=True)
    assert type(loaded) is CrossLayerTranscoder and not loaded.training
    assert not any(info.values()), info
    inputs, labels = random_batch(clt)
    for name, tensor in clt.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype
        if name.startswith("thresholds"):
            torch.testing.assert_close(found, tensor, rtol=1e-6, atol=1e-6)  # θ to 1e-6 relative: it lives as log θ
        else:
            assert torch.equal(found, tensor), name
    torch.testing.assert_close(loaded(inputs).reconstruction, clt(inputs).reconstruction, rtol=1e-5, atol=1e-6)
    own = {name: value for name, value in clt.config.to_dict().items() if name in release_fields()}
    assert {name: loaded.config.to_dict()[name] for name in own} == own
    # It trains on.
    loss = loaded.train()(inputs, labels=labels).loss
    torch.autograd.backward(loss)
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def release_fields():
    return set(CLTConfig(num_layers=1, d_model=1, num_features=1).to_dict()) - {
        "architectures",
        "dtype",
        "transformers_version",
        "_name_or_path",
    }


@ALL_VARIANTS
def test_saving_what_was_loaded_writes_the_same_files(saved, variant, tmp_path):
    _, folder = saved(**VARIANTS[variant])
    CrossLayerTranscoder.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert file_names(tmp_path / "again") == file_names(folder)
    for name in file_names(folder) - {"README.md"}:
        again = tmp_path / "again" / name
        if name.endswith("index.json") and VARIANTS[variant]["activation_fn"] == "jumprelu":
            one, other = (json.loads(path.read_text()) for path in (folder / name, again))
            assert one["weight_map"] == other["weight_map"]  # θ is rounded, so that the digests differ
        elif name.startswith("W_enc") and VARIANTS[variant]["activation_fn"] == "jumprelu":
            for key, tensor in load_file(folder / name).items():
                torch.testing.assert_close(load_file(again)[key], tensor, rtol=1e-6, atol=0)
        else:
            assert again.read_bytes() == (folder / name).read_bytes(), name


@ALL_VARIANTS
@pytest.mark.parametrize("same_scale", [False, True], ids=["scales differ", "one scale"])
def test_statistics_are_folded_into_the_files_and_stay_in_the_live_model(tmp_path, variant, same_scale):
    clt = random_clt(double=False, **VARIANTS[variant])
    clt.set_normalization(**random_statistics(clt, same_scale=same_scale))
    if clt.config.activation_fn == "batchtopk":
        clt.train()(random_batch(clt, seed=9)[0])
    clt.train()
    before = snapshot(clt)
    clt.save_pretrained(tmp_path)
    assert_same(before, snapshot(clt))
    loaded, info = CrossLayerTranscoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.mean_in is None
    clt.eval()
    inputs, _ = random_batch(clt)
    torch.testing.assert_close(loaded.encode(inputs), clt.encode(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded(inputs).reconstruction, clt(inputs).reconstruction, rtol=1e-4, atol=1e-4)
    tying = clt.config.decoder_tying
    if tying == "per_source" and not same_scale:
        assert (loaded.config.decoder_tying, loaded.config.trained_decoder_tying) == ("none", "per_source")
    else:
        assert (loaded.config.decoder_tying, loaded.config.trained_decoder_tying) == (tying, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_folded_tensors_are_the_formulas_of_the_rounded_weights(tmp_path, dtype):
    clt = random_clt(double=False, activation_fn="jumprelu", decoder_reach=2, skip_connection=True)
    for decoder in clt.decoders:
        decoder.weight.data = decoder.weight.data.to(dtype)
    statistics = {name: value.float() for name, value in random_statistics(clt).items()}
    clt.set_normalization(**statistics)
    clt.save_pretrained(tmp_path)
    mean_in, std_in, mean_out, std_out = (statistics[n].double() for n in ("mean_in", "std_in", "mean_out", "std_out"))
    for s in range(L):
        found = load_file(tmp_path / f"W_enc_{s}.safetensors") | load_file(tmp_path / f"W_dec_{s}.safetensors")
        w_enc, w_skip = found[f"W_enc_{s}"].double(), found[f"W_skip_{s}"].double()
        expected = {
            f"W_enc_{s}": clt.encoders[s].weight.double() / std_in[s],
            f"W_skip_{s}": torch.diag(1 / std_in[s]) @ clt.skips[s].weight.double() @ torch.diag(std_out[s]),
            # The biases follow from the weights as they stand in the file, so that the means cancel.
            f"b_enc_{s}": clt.encoders[s].bias.double() - w_enc @ mean_in[s],
            f"b_dec_{s}": clt.decoders[s].bias.double() * std_out[s] + mean_out[s] - mean_in[s] @ w_skip,
            f"W_dec_{s}": clt.decoders[s].weight.double() * std_out[s : s + 2],
        }
        for name, tensor in expected.items():
            wanted = dtype if name.startswith("W_dec") else torch.float32
            assert found[name].dtype == wanted
            torch.testing.assert_close(found[name].double(), tensor, rtol=2 * torch.finfo(wanted).eps, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
def test_a_release_computes_what_was_trained_however_large_the_means(tmp_path, mean, dtype):
    # float32 keeps 1e4 ± 1 to 1e-3, so that is what is left of the spread
    clt = random_clt(double=False, activation_fn="relu", skip_connection=True)
    for decoder in clt.decoders:
        decoder.weight.data = decoder.weight.data.to(dtype)
    spread = {name: torch.ones(L, D) for name in ("std_in", "std_out")}
    clt.set_normalization(mean_in=torch.full((L, D), mean), mean_out=torch.full((L, D), -mean), **spread)
    inputs = random_batch(clt, 64)[0] + mean
    expected = clt(inputs).reconstruction
    clt.save_pretrained(tmp_path)
    for loading in ({}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"lazy": True}):
        released = CrossLayerTranscoder.from_pretrained(tmp_path, **loading)
        # sums of some tens are rounded to 1 in 256; their spread is 2.7
        rounding = 0.25 if torch.bfloat16 in (dtype, loading.get("dtype")) else 1e-5
        torch.testing.assert_close(
            released(inputs).reconstruction,
            expected,
            rtol=0,
            atol=rounding + 2e-6 * mean,
        )


@ALL_VARIANTS
def test_the_folded_clt_is_the_release_and_ends_as_the_live_one(tmp_path, variant):
    clt = trained(**VARIANTS[variant])
    clt.set_normalization(**random_statistics(clt))
    before, parameters = snapshot(clt), dict(clt.named_parameters())
    clt.save_pretrained(tmp_path)
    released = CrossLayerTranscoder.from_pretrained(tmp_path)
    with pytest.raises(KeyboardInterrupt), clt.folded():  # whatever ends the block
        assert clt.config.decoder_tying == released.config.decoder_tying
        for name, tensor in released.state_dict().items():
            torch.testing.assert_close(clt.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)  # log θ of θ
        raise KeyboardInterrupt
    assert_same(before, snapshot(clt))
    assert all(clt.get_parameter(name) is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("activation_fn", ["jumprelu", "batchtopk", "relu"])
@pytest.mark.parametrize("normalised", [False, True])
def test_bfloat16_decoders_with_all_else_in_float32(tmp_path, activation_fn, normalised):
    config = CLTConfig(num_layers=L, d_model=D, num_features=F, activation_fn=activation_fn, k=3, skip_connection=True)
    clt = CrossLayerTranscoder._from_config(config, dtype=torch.bfloat16)
    if normalised:
        clt.set_normalization(**{n: t.float() for n, t in random_statistics(random_clt()).items()})
    clt.train()(random_batch(random_clt(double=False))[0])
    clt.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == (torch.bfloat16 if name.startswith("W_dec") else torch.float32), name
    assert read_json(tmp_path / "config.json")["dtype"] == "bfloat16"
    for loaded in (
        CrossLayerTranscoder.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
        CrossLayerTranscoder.from_pretrained(circuit_tracer_files_alone(tmp_path)),
    ):
        assert loaded.dtype == torch.bfloat16
        for name, tensor in loaded.state_dict().items():
            is_decoder = name.startswith("decoders") and name.endswith("weight")
            assert tensor.dtype == (torch.bfloat16 if is_decoder else torch.float32), name
        if not normalised:
            assert all(
                torch.equal(new.weight, old.weight) for new, old in zip(loaded.decoders, clt.decoders, strict=True)
            )


def test_float32_files_load_in_bfloat16_where_nothing_cancels(saved):
    clt, folder = saved()
    loaded = CrossLayerTranscoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    state = loaded.state_dict()
    for name, tensor in clt.state_dict().items():
        wanted = torch.bfloat16 if name.startswith("decoders") and name.endswith("weight") else torch.float32
        torch.testing.assert_close(state[name], tensor.to(wanted), rtol=1e-6, atol=1e-6)


def test_thresholds_of_zero_are_saved_and_loaded_as_zero(tmp_path):
    clt = CrossLayerTranscoder(CLTConfig(num_layers=L, d_model=D, num_features=F, jumprelu_threshold=0.0))
    with torch.no_grad():
        clt.thresholds[1].value[::2] = 0.5  # log θ
    clt.save_pretrained(tmp_path)
    theta = load_file(tmp_path / "W_enc_1.safetensors")["threshold_1"]
    assert (theta[1::2] == 0).all() and (theta[::2] > 1).all()
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path)
    assert (loaded.thresholds[0].value == -torch.inf).all()
    assert (loaded.thresholds[1].value[1::2] == -torch.inf).all()
    assert torch.equal(loaded.thresholds[0](), torch.zeros(F))


def test_batchtopk_that_was_never_trained_loads_as_not_started(tmp_path):
    clt = random_clt(double=False, activation_fn="batchtopk")
    clt.save_pretrained(tmp_path)
    assert load_file(tmp_path / "W_enc_2.safetensors")["threshold_2"].tolist() == [torch.inf] * F
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path)
    inputs, _ = random_batch(clt)
    with pytest.raises(ValueError, match="train"):
        loaded.eval().encode(inputs)
    # The first batch starts it, as if it had never been saved.
    loaded.train()(inputs)
    clt.train()(inputs)
    assert all(torch.equal(a.value, b.value) for a, b in zip(loaded.thresholds, clt.thresholds, strict=True))
    assert loaded.thresholds[0].value.isfinite().all()


def test_a_per_source_release_can_be_trained_on(tmp_path):
    clt = random_clt(double=False, activation_fn="relu", decoder_tying="per_source")
    clt.set_normalization(**random_statistics(clt))
    clt.save_pretrained(tmp_path / "first")
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "first")
    inputs, _ = random_batch(clt)
    expected = loaded(inputs).reconstruction
    loaded.set_normalization(**random_statistics(clt), reparametrize=True)
    torch.testing.assert_close(loaded(inputs).reconstruction, expected, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "second")
    again = CrossLayerTranscoder.from_pretrained(tmp_path / "second")
    assert again.config.trained_decoder_tying == "per_source"
    torch.testing.assert_close(again(inputs).reconstruction, expected, rtol=1e-4, atol=1e-4)


def test_loading_with_overrides(saved):
    clt, folder = saved(sparsity_lambda=1.0)
    for load in (CrossLayerTranscoder.from_pretrained, AutoModel.from_pretrained):
        loaded = load(folder, sparsity_lambda=0.25, jumprelu_bandwidth=0.5)
        assert (loaded.config.sparsity_lambda, loaded.config.jumprelu_bandwidth) == (0.25, 0.5)
        assert torch.equal(loaded.decoders[0].weight, clt.decoders[0].weight)
    with pytest.raises(TypeError, match="sparsity_lamda"):
        CrossLayerTranscoder.from_pretrained(folder, sparsity_lamda=0.25)
    with pytest.raises(ValueError, match="jumprelu_bandwidth=-1"):
        CrossLayerTranscoder.from_pretrained(folder, jumprelu_bandwidth=-1)


def test_a_given_configuration_is_used_and_excludes_overrides(saved):
    _, folder = saved(sparsity_lambda=1.0)
    config = CLTConfig.from_pretrained(folder, sparsity_lambda=0.5)
    assert CrossLayerTranscoder.from_pretrained(folder, config=config).config.sparsity_lambda == 0.5
    with pytest.raises((ValueError, TypeError), match="sparsity_lambda"):
        CrossLayerTranscoder.from_pretrained(folder, config=config, sparsity_lambda=0.25)


def test_a_subfolder_and_a_string_path(saved):
    clt, folder = saved()
    loaded = CrossLayerTranscoder.from_pretrained(str(folder.parent), subfolder=folder.name)
    assert torch.equal(loaded.encoders[2].weight, clt.encoders[2].weight)
    assert AutoConfig.from_pretrained(str(folder)).num_features == F


# -- circuit-tracer's files alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("topk")])
def test_a_folder_with_circuit_tracers_files_alone(saved, variant):
    clt, folder = saved(**VARIANTS[variant], base_model_name_or_path="some/model", feature_output_hook="mlp.hook_out")
    circuit_tracer_files_alone(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded, info = CrossLayerTranscoder.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    config = loaded.config
    assert config.activation_fn == ("relu" if clt.config.activation_fn == "relu" else "jumprelu")
    assert (config.num_layers, config.num_features, config.d_model) == (L, F, D)
    assert config.decoder_reach == clt.config.decoder_reach and config.decoder_tying == "none"
    assert config.skip_connection == clt.config.skip_connection
    assert config.base_model_name_or_path == "some/model"
    assert (config.feature_input_hook, config.feature_output_hook) == ("hook_resid_mid", "mlp.hook_out")
    inputs, _ = random_batch(clt)
    torch.testing.assert_close(loaded(inputs).reconstruction, clt(inputs).reconstruction, rtol=1e-5, atol=1e-5)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # nothing is written beside them


def test_circuit_tracers_files_with_overrides(saved):
    clt, folder = saved(activation_fn="batchtopk", decoder_tying="per_target")
    circuit_tracer_files_alone(folder)
    loaded = CrossLayerTranscoder.from_pretrained(
        folder, activation_fn="batchtopk", k=3, decoder_tying="per_target", base_model_name_or_path="a/b"
    )
    assert (loaded.config.activation_fn, loaded.config.k) == ("batchtopk", 3)
    assert loaded.config.base_model_name_or_path == "a/b"
    inputs, _ = random_batch(clt)
    assert loaded.decoders[0].weight.shape == (F, 1, D)
    torch.testing.assert_close(loaded(inputs).reconstruction, clt(inputs).reconstruction, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="decoder_reach=2"):
        CrossLayerTranscoder.from_pretrained(folder, decoder_reach=2)


@pytest.mark.parametrize("yaml_text", [None, "", "model_kind: cross_layer_transcoder\n"])
def test_circuit_tracers_files_without_a_model_name(saved, yaml_text):
    clt, folder = saved(activation_fn="relu", base_model_name_or_path="some/model")
    circuit_tracer_files_alone(folder)
    (folder / "config.yaml").unlink()
    if yaml_text is not None:
        (folder / "config.yaml").write_text(yaml_text)
    loaded = CrossLayerTranscoder.from_pretrained(folder)
    assert loaded.config.base_model_name_or_path is None
    assert loaded.config.feature_input_hook == "hook_resid_mid"
    assert torch.equal(loaded.decoders[0].weight, clt.decoders[0].weight)


def test_eleven_layers_are_read_in_the_order_of_their_numbers(tmp_path):
    clt = random_clt(double=False, num_layers=11, activation_fn="relu")
    clt.save_pretrained(tmp_path)
    inputs, _ = random_batch(clt)
    for folder in (tmp_path, circuit_tracer_files_alone(tmp_path)):
        loaded = CrossLayerTranscoder.from_pretrained(folder)
        assert torch.equal(loaded(inputs).reconstruction, clt(inputs).reconstruction)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["with config.json", "circuit-tracer's files alone"])
def broken(request, saved):
    """A folder to break, with and without a config.json."""

    def save(**fields):
        _, folder = saved(**fields)
        return folder if request.param == "with config.json" else circuit_tracer_files_alone(folder)

    return save


@pytest.mark.parametrize("file", [f"W_{kind}_{layer}.safetensors" for kind in ("enc", "dec") for layer in range(L)])
def test_a_missing_file_is_named(broken, file):
    folder = broken()
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 0.5, -1], ids=str)
@pytest.mark.parametrize(
    "file", ["W_enc_0.safetensors", "W_enc_1.safetensors", "W_dec_0.safetensors", "W_dec_2.safetensors"]
)
def test_a_truncated_file_is_named(broken, file, keep):
    folder = broken()
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=rf"{file}.*truncated"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize("name", ["W_enc_0", "b_enc_1", "b_dec_2", "threshold_1", "W_skip_1", "W_dec_0"])
def test_a_missing_tensor_is_named_with_its_file(broken, name):
    folder = broken(skip_connection=True)
    file = f"W_{'dec' if name == 'W_dec_0' else 'enc'}_{name[-1]}.safetensors"
    change_tensors(folder / file, **{name: None}, something=torch.zeros(1))
    with pytest.raises(ValueError, match=rf"{file}.*{name}"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, shape",
    [("W_enc_1", (F, D + 1)), ("b_enc_1", (F - 1,)), ("b_dec_0", (1,)), ("threshold_2", (1,)), ("W_dec_1", (F, L, D))],
)
def test_a_wrong_shape_is_named(broken, name, shape):
    folder = broken()
    file = f"W_{'dec' if name.startswith('W_dec') else 'enc'}_{name[-1]}.safetensors"
    change_tensors(folder / file, **{name: torch.ones(shape)})
    with pytest.raises(ValueError) as caught:
        CrossLayerTranscoder.from_pretrained(folder)
    assert name in str(caught.value) and str(shape) in str(caught.value)


@pytest.mark.parametrize(
    "load", [CrossLayerTranscoder.from_pretrained, AutoModel.from_pretrained], ids=["own", "auto"]
)
def test_negative_thresholds_are_refused_with_layer_and_count(saved, load):
    _, folder = saved()
    theta = load_file(folder / "W_enc_1.safetensors")["threshold_1"]
    theta[2:5] = -0.1
    change_tensors(folder / "W_enc_1.safetensors", threshold_1=theta)
    with pytest.raises(ValueError, match=r"threshold_1\D.*\b3 negative"):
        load(folder)


def test_a_threshold_that_is_not_a_number_is_refused(broken):
    folder = broken()
    change_tensors(folder / "W_enc_0.safetensors", threshold_0=torch.full((F,), torch.nan))
    with pytest.raises(ValueError, match="threshold_0"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize("tying", ["per_source", "per_target"])
def test_a_tied_configuration_whose_tensors_differ_is_refused(saved, tying):
    _, folder = saved(decoder_tying=tying)
    weight = load_file(folder / "W_dec_0.safetensors")["W_dec_0"]
    weight[3, 2, 1] += 1e-3
    change_tensors(folder / "W_dec_0.safetensors", W_dec_0=weight)
    with pytest.raises(ValueError, match=r"decoder_tying.*W_dec_0"):
        CrossLayerTranscoder.from_pretrained(folder)
    loaded = CrossLayerTranscoder.from_pretrained(folder, decoder_tying="none")
    assert torch.equal(loaded.decoders[0].weight, weight)


def test_batchtopk_thresholds_that_differ_within_a_layer_are_refused(saved):
    _, folder = saved(activation_fn="batchtopk")
    theta = load_file(folder / "W_enc_1.safetensors")["threshold_1"]
    theta[0] += 1
    change_tensors(folder / "W_enc_1.safetensors", threshold_1=theta)
    with pytest.raises(ValueError, match="threshold_1"):
        CrossLayerTranscoder.from_pretrained(folder)


def test_an_unknown_folder_is_refused_clearly(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        CrossLayerTranscoder.from_pretrained(tmp_path)
    missing = tmp_path / "nowhere"
    with pytest.raises(OSError, match=r"nowhere.*folder"):
        CrossLayerTranscoder.from_pretrained(missing)


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_layer": 2}))
    with pytest.raises((ValueError, TypeError), match=r"gpt2|cross_layer_transcoder"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"activation_fn": "topk", "k": 4}, "the top-k activation function"),
        ({"decoder_reach": 2}, "a decoder reach of 2 out of 3 layers"),
        ({"skip_connection": True}, "the skip connection"),
        ({}, None),
    ],
)
def test_what_circuit_tracer_cannot_express_is_said(tmp_path, caplog, fields, said):
    trained(**fields).save_pretrained(tmp_path)
    messages = [record.getMessage() for record in caplog.records if "circuit-tracer" in record.getMessage()]
    assert [said in message for message in messages] == [True] * (said is not None)
    assert (said is None) or said in (tmp_path / "README.md").read_text()


def test_others_can_read_the_files(tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {modes["plain"]}, modes


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match="taken"):
        trained().save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "x"


def test_unknown_arguments_of_save_pretrained_are_refused(tmp_path):
    with pytest.raises(TypeError, match="push_too_hub"):
        trained().save_pretrained(tmp_path / "clt", push_too_hub=True)


# -- nothing is lost --------------------------------------------------------------------------------------------------


def test_weight_files_of_a_deeper_clt_are_removed(tmp_path):
    trained(num_layers=5).save_pretrained(tmp_path)
    (tmp_path / "W_enc_notes.txt").write_text("mine")
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    clt = trained()
    clt.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("W_*.safetensors")) == sorted(
        f"W_{kind}_{layer}.safetensors" for kind in ("enc", "dec") for layer in range(L)
    )
    assert (tmp_path / "W_enc_notes.txt").exists() and (tmp_path / "other.safetensors").exists()
    loaded, info = CrossLayerTranscoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.num_layers == L


def test_only_the_main_process_writes(tmp_path):
    trained().save_pretrained(tmp_path / "clt", is_main_process=False)
    assert not (tmp_path / "clt").exists()


def failing_on_call(number, function, write_half):
    """`function`, but the given call writes half a file and raises."""
    calls = []

    def wrapper(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) == number:
            write_half(Path(path))
            raise OSError("no space left on device")
        return function(tensors, path, **kwargs)

    return wrapper


def test_a_crash_while_saving_leaves_no_half_file(tmp_path, monkeypatch):
    clt = trained()
    failing = failing_on_call(2, release.save_file, lambda path: path.write_bytes(b"half"))
    monkeypatch.setattr(release, "save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        clt.save_pretrained(tmp_path)
    assert file_names(tmp_path) == {"W_enc_0.safetensors"}  # whole, and no leftovers under another name
    assert set(load_file(tmp_path / "W_enc_0.safetensors")) == {"W_enc_0", "b_enc_0", "b_dec_0", "threshold_0"}


def test_a_crash_while_overwriting_keeps_every_file_whole(saved, monkeypatch):
    _, folder = saved()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    new = random_clt(seed=1, double=False)
    failing = failing_on_call(2, release.save_file, lambda path: path.write_bytes(b"half"))
    monkeypatch.setattr(release, "save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        new.save_pretrained(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {"W_enc_0.safetensors"}
    assert torch.equal(load_file(folder / "W_enc_0.safetensors")["W_enc_0"], new.encoders[0].weight)


def test_a_pickle_beside_the_files_is_never_read(saved):
    clt, folder = saved()
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    loaded = CrossLayerTranscoder.from_pretrained(folder)
    assert torch.equal(loaded.encoders[0].weight, clt.encoders[0].weight)


# -- float16 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(tmp_path):
    """A relu CLT whose only decoder row that matters is `scale`; returns what it is in float16."""

    def load(scale, **kwargs):
        clt = random_clt(double=False, activation_fn="relu")
        with torch.no_grad():
            clt.decoders[1].weight[0, 0, 0] = scale
            clt.encoders[1].bias[0] = 100.0  # its activation
        clt.save_pretrained(tmp_path)
        return clt, CrossLayerTranscoder.from_pretrained(tmp_path, dtype=torch.float16, **kwargs)

    return load


def test_float16_keeps_what_large_inputs_need_in_float32(narrow):
    clt, half = narrow(1.0)
    inputs, _ = random_batch(clt)
    inputs[:, :, 3] = 80_000.0  # beyond float16, as in the stream of Gemma 3
    assert torch.equal(half.encode(inputs), clt.encode(inputs))


@pytest.mark.parametrize("loading", [{}, {"layers": [1]}, {"shard": FeatureShard(0, 2)}], ids=str)
def test_weights_beyond_float16_are_refused(narrow, loading):
    with pytest.raises(ValueError, match=r"W_dec_1 exceeds float16.*bfloat16"):
        narrow(1e5, **loading)


def test_a_reconstruction_beyond_float16_is_refused(narrow):
    clt, half = narrow(6e4)  # times 100
    inputs = torch.zeros(3, L, D)
    assert clt(inputs).reconstruction.isfinite().all()
    with pytest.raises(ValueError, match=r"reconstruction exceeds float16.*bfloat16"):
        half(inputs)


@pytest.mark.parametrize("written", range(2 * L + 2))
def test_what_is_left_of_a_save_over_another_is_the_old_clt_the_new_one_or_refused(tmp_path, monkeypatch, written):
    """Writing is cut off after so many of the files of weights, or before the index."""
    old, new = trained(activation_fn="relu"), trained(activation_fn="relu")
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1.0)
    old.save_pretrained(tmp_path)
    count = 0

    def cut_off(function):
        def write(*arguments, **keywords):
            nonlocal count
            if count == written:
                raise KeyboardInterrupt
            count += 1
            function(*arguments, **keywords)

        return write

    with monkeypatch.context() as patched:
        patched.setattr(release, "write_tensors", cut_off(release.write_tensors))
        if written == 2 * L:
            patched.setattr(release, "write_text", cut_off(release.write_text))
        if written <= 2 * L:
            with pytest.raises(KeyboardInterrupt):
                new.save_pretrained(tmp_path)
        else:
            new.save_pretrained(tmp_path)
    for options in ({}, {"lazy": True}, {"layers": [0]}, {"shard": FeatureShard(0, 2)}):
        if 0 < written <= 2 * L:
            with pytest.raises(ValueError, match="another CLT than model"):
                CrossLayerTranscoder.from_pretrained(tmp_path, **options)
        else:
            loaded = CrossLayerTranscoder.from_pretrained(tmp_path, **options)
            wanted = {name: value[: len(value)] for name, value in (old if written == 0 else new).state_dict().items()}
            if not options:
                assert_same((wanted,), (loaded.state_dict(),))


@pytest.mark.parametrize("written", [1, 2 * L - 1])
def test_a_save_over_a_release_of_an_older_version_that_was_cut_off_is_refused(tmp_path, monkeypatch, written):
    trained(activation_fn="relu").save_pretrained(tmp_path)
    for path in tmp_path.glob("W_*"):
        change_tensors(path)
    index = read_json(tmp_path / "model.safetensors.index.json")
    del index["metadata"]["digests"]
    write_json(tmp_path / "model.safetensors.index.json", index)
    CrossLayerTranscoder.from_pretrained(tmp_path)
    write, left = release.write_tensors, [None] * written

    def cut_off(*arguments, **keywords):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(*arguments, **keywords)

    monkeypatch.setattr(release, "write_tensors", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trained(activation_fn="relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another CLT than model\.safetensors\.index\.json"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_files_without_digests_load(saved):
    """As older versions and other programs write them."""
    clt, folder = saved(activation_fn="topk")
    index = read_json(folder / "model.safetensors.index.json")
    assert index["metadata"].pop("digests").keys() == set(index["weight_map"].values())
    for path in folder.glob("W_*"):
        change_tensors(path)  # without metadata
        assert_same((clt.state_dict(),), (CrossLayerTranscoder.from_pretrained(folder).state_dict(),))
    write_json(folder / "model.safetensors.index.json", index)
    assert_same((clt.state_dict(),), (CrossLayerTranscoder.from_pretrained(folder).state_dict(),))
