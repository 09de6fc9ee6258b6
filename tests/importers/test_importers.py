"""
CLTs that other trainers saved: made files of each format, against that format's own formula in float64, and back.

The `..._forward` functions compute what the other library computes, from the tensors as its files hold them; nothing
in them is shared with `hf_clt`.
"""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_clt import CLTConfig, CrossLayerTranscoder, importers
from tests.reference import random_batch, random_clt, random_statistics


L, F, D, N = 3, 7, 5, 64
PAIRS = [(s, t) for s in range(L) for t in range(s, L)]
MLP_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


class Random:
    """Numbers from one seed."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def positive(self, *shape):
        return 0.3 * self(*shape).exp()


def random_inputs(seed=50):
    return Random(seed)(N, L, D)


def assert_computes(clt, inputs, acts, reconstruction):
    """That a CLT has these activations (N, L, F) and this reconstruction (N, L, D), and that the gates matter."""
    active = (acts > 0).double().mean()
    assert 0.05 < active < 0.95 and reconstruction.abs().max() > 0.1
    clt = clt.double()
    torch.testing.assert_close(clt.encode(inputs.double()), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clt(inputs.double()).reconstruction, reconstruction, rtol=1e-4, atol=1e-5)


def assert_same_clt(found, expected):
    """That two CLTs are the same: all tensors bit by bit, θ to 1e-6 relative."""
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        other = found.state_dict()[name]
        assert other.dtype == tensor.dtype, name
        if name.startswith("thresholds"):
            torch.testing.assert_close(other.exp(), tensor.exp(), rtol=1e-6, atol=0)
        else:
            assert torch.equal(other, tensor), name


def change(path, **changes):
    """Rewrites a safetensors file with some tensors replaced, or removed where None."""
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def change_json(path, **changes):
    """Changes fields of a JSON file, which is made if it is missing; returns its folder."""
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**fields, **changes}))
    return path.parent


# -- circuit-tracer, per-layer transcoders ----------------------------------------------------------------------------


def make_plt(folder, threshold=True, skip=True, dtype=torch.float32, **described):
    random = Random(1)
    folder.mkdir(exist_ok=True)
    for layer in range(L):
        tensors = {"W_enc": random(F, D), "W_dec": random(F, D), "b_enc": random(F), "b_dec": random(D)}
        if threshold:
            tensors["activation_function.threshold"] = random.positive(F)
        if skip:
            tensors["W_skip"] = random(D, D)
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / f"layer_{layer}.safetensors")
    described = {"model_name": "some/model", "model_kind": "transcoder_set", **MLP_HOOKS, **described}
    (folder / "config.yaml").write_text(yaml.safe_dump(described))
    return folder


def plt_forward(folder, inputs, k=None):
    acts, reconstruction = [], []
    for layer in range(L):
        tensors = {name: t.double() for name, t in load_file(folder / f"layer_{layer}.safetensors").items()}
        x = inputs[:, layer].double()
        h = torch.nn.functional.linear(x, tensors["W_enc"], tensors["b_enc"])
        if k is not None:
            kept = torch.zeros_like(h).scatter_(1, h.topk(k, dim=1).indices, 1)
            acts.append(h * kept)
        elif "activation_function.threshold" in tensors:
            acts.append(h * (h > tensors["activation_function.threshold"]))
        else:
            acts.append(h.relu())
        y = acts[-1] @ tensors["W_dec"] + tensors["b_dec"]
        if "W_skip" in tensors:
            y = y + x @ tensors["W_skip"].T
        reconstruction.append(y)
    return torch.stack(acts, dim=1), torch.stack(reconstruction, dim=1)


@pytest.mark.parametrize("threshold", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_plt(tmp_path, threshold, skip):
    folder = make_plt(tmp_path / "plt", threshold, skip)
    assert importers.detect_format(folder) == "circuit-tracer-plt"
    clt = importers.import_clt(folder, "circuit-tracer-plt")
    config = clt.config
    assert (config.num_layers, config.num_features, config.d_model, config.decoder_reach) == (L, F, D, 1)
    assert config.activation_fn == ("jumprelu" if threshold else "relu") and config.skip_connection is skip
    assert config.base_model_name_or_path == "some/model" and config.feature_input_hook == "mlp.hook_in"
    assert not clt.training
    for layer in range(L):
        tensors = load_file(folder / f"layer_{layer}.safetensors")
        assert torch.equal(clt.encoders[layer].weight, tensors["W_enc"])
        assert torch.equal(clt.encoders[layer].bias, tensors["b_enc"])
        assert torch.equal(clt.decoders[layer].weight[:, 0], tensors["W_dec"])
        assert torch.equal(clt.decoders[layer].bias, tensors["b_dec"])
        if threshold:
            theta = tensors["activation_function.threshold"]
            torch.testing.assert_close(clt.thresholds[layer](), theta, rtol=1e-6, atol=0)
        if skip:
            assert torch.equal(clt.skips[layer].weight, tensors["W_skip"].T)
    inputs = random_inputs()
    assert_computes(clt, inputs, *plt_forward(folder, inputs))


def test_plt_files_listed_in_the_configuration(tmp_path):
    folder = make_plt(tmp_path / "plt")
    names = []
    for layer in range(L):
        names.append(f"of_layer_{L - layer}.safetensors")  # their order is that of the list
        (folder / f"layer_{layer}.safetensors").rename(folder / names[-1])
    described = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**described, "transcoders": names}))
    assert importers.detect_format(folder) == "circuit-tracer-plt"
    assert_same_clt(
        importers.import_clt(folder), importers.import_clt(make_plt(tmp_path / "again"), "circuit-tracer-plt")
    )
    described["transcoders"] = ["hf://some/repo/layer_0.safetensors?revision=main"]
    (folder / "config.yaml").write_text(yaml.safe_dump(described))
    with pytest.raises(FileNotFoundError, match=r"hf://some/repo.*download"):
        importers.import_clt(folder)


def test_plt_top_k_needs_consent(tmp_path):
    folder = make_plt(tmp_path / "plt", threshold=False, activation="topk", k=2)
    with pytest.raises(ValueError, match=r"activation='topk'.*negative.*activation_fn='topk'"):
        importers.import_clt(folder, "circuit-tracer-plt")
    clt = importers.import_clt(folder, "circuit-tracer-plt", activation_fn="topk")
    assert (clt.config.activation_fn, clt.config.k) == ("topk", 2)
    inputs = random_inputs()
    acts, reconstruction = plt_forward(folder, inputs, k=2)
    positive = (acts >= 0).all(dim=2).all(dim=1)  # where the two agree
    assert 5 < positive.sum() < N
    assert_computes(clt, inputs[positive], acts[positive], reconstruction[positive])
    make_plt(folder, threshold=False, activation="topk")
    with pytest.raises(ValueError, match=r"k is missing"):
        importers.import_clt(folder, "circuit-tracer-plt", activation_fn="topk")
    assert importers.import_clt(folder, "circuit-tracer-plt", activation_fn="topk", k=3).config.k == 3


def test_half_precision_stays(tmp_path):
    folder = make_plt(tmp_path / "plt", dtype=torch.bfloat16)
    clt = importers.import_clt(folder, "circuit-tracer-plt")
    assert clt.dtype == torch.bfloat16 and str(clt.config.dtype).endswith("bfloat16")
    assert clt.thresholds[0].value.dtype == torch.float32
    tensors = load_file(folder / "layer_1.safetensors")
    assert torch.equal(clt.encoders[1].weight, tensors["W_enc"])
    assert torch.equal(clt.skips[1].weight, tensors["W_skip"].T)
    change(folder / "layer_1.safetensors", b_dec=tensors["b_dec"].float() + 1e-4)
    clt = importers.import_clt(folder, "circuit-tracer-plt")
    assert clt.dtype == torch.float32  # the smallest that holds all without loss
    assert torch.equal(clt.decoders[1].bias, tensors["b_dec"].float() + 1e-4)


@pytest.mark.parametrize(
    "described, message",
    [
        ({"feature_input_hook": "ln2.hook_normalized"}, r"feature_input_hook='ln2.hook_normalized' .*config\.yaml"),
        ({"feature_output_hook": None}, r"feature_output_hook=None .*give feature_output_hook"),
        ({"activation": "relu"}, r"activation='relu'.* with a tensor .*threshold"),
        ({"activation": "gelu"}, r"activation='gelu'"),
        ({"model_kind": "cross_layer_transcoder"}, r"model_kind='cross_layer_transcoder'"),
    ],
)
def test_plt_configuration_that_cannot_be_expressed(tmp_path, described, message):
    folder = make_plt(tmp_path / "plt", **described)
    with pytest.raises(ValueError, match=message):
        importers.import_clt(folder, "circuit-tracer-plt")


def test_a_hook_without_a_name_can_be_given(tmp_path):
    folder = make_plt(tmp_path / "plt", feature_input_hook="ln2.hook_normalized")
    clt = importers.import_clt(
        folder, "circuit-tracer-plt", feature_input_hook="mlp.hook_in", base_model_name_or_path="a/b"
    )
    assert clt.config.feature_input_hook == "mlp.hook_in" and clt.config.base_model_name_or_path == "a/b"
    with pytest.raises(ValueError, match=r"feature_input_hook='mlp'"):
        importers.import_clt(folder, "circuit-tracer-plt", feature_input_hook="mlp")
    with pytest.raises(ValueError, match=r"num_layers=4 is given.*leave out num_layers"):
        importers.import_clt(folder, "circuit-tracer-plt", num_layers=4)
    with pytest.raises(TypeError, match="sparsity_lamda"):
        importers.import_clt(folder, "circuit-tracer-plt", feature_input_hook="mlp.hook_in", sparsity_lamda=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"b_enc": None}, r"b_enc in .*layer_1.* shape None"),
        ({"W_dec": torch.zeros(D, F)}, rf"W_dec in .*layer_1.*\({D}, {F}\).*\({F}, {D}\)"),
        ({"W_enc": torch.zeros(F + 1, D)}, r"W_enc in .*layer_1"),
        ({"log_thresholds": torch.zeros(F)}, r"log_thresholds in .*layer_1.*not known"),
        ({"W_skip": None}, r"W_skip in .*layer_1.* shape None"),
        (
            {"activation_function.threshold": torch.tensor([-1.0, -2.0] + [1.0] * (F - 2))},
            r"threshold of layer 1 .*2 negative",
        ),
        (
            {"activation_function.threshold": torch.full((F,), torch.nan)},
            rf"layer 1 has {F} negative or NaN",
        ),
        ({"W_enc": torch.zeros(F, D, dtype=torch.int32)}, r"W_enc.* is I32"),
    ],
)
def test_plt_tensors_that_do_not_fit(tmp_path, changes, message):
    folder = make_plt(tmp_path / "plt")
    change(folder / "layer_1.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        importers.import_clt(folder, "circuit-tracer-plt")


def test_a_gap_between_the_layers(tmp_path):
    folder = make_plt(tmp_path / "plt")
    (folder / "layer_1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"layer_1\.safetensors is missing"):
        importers.import_clt(folder)


# -- crosslayer-coding ------------------------------------------------------------------------------------------------


def coding_key(source, target, tying):
    return {"none": f"{source}->{target}", "per_source": f"{source}", "per_target": f"{target}"}[tying]


def make_coding(folder, activation_fn="jumprelu", tying="none", skip=False, statistics=False, **cfg):
    random = Random(2)
    tensors = {}
    for layer in range(L):
        tensors[f"encoder_module.encoders.{layer}.weight"] = random(F, D)
        tensors[f"encoder_module.encoders.{layer}.bias_param"] = random(F)
    for s, t in PAIRS:
        key = coding_key(s, t, tying)
        tensors[f"decoder_module.decoders.{key}.weight"] = random(D, F)
        tensors[f"decoder_module.decoders.{key}.bias_param"] = random(D)
        if skip:
            tensors[f"decoder_module.skip_weights.{key}"] = random(D, D) * (s == t)
    if activation_fn == "jumprelu":
        tensors["theta_manager.log_threshold"] = random.positive(L, F).log()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "clt_checkpoint_10.safetensors")
    described = {
        "num_features": F,
        "num_layers": L,
        "d_model": D,
        "model_name": "EleutherAI/pythia-70m",
        "normalization_method": "mean_std" if statistics else "none",
        "activation_fn": activation_fn,
        "decoder_tying": tying,
        "skip_connection": skip,
        "mlp_input_template": "gpt_neox.layers.{}.mlp.input",
        "mlp_output_template": "gpt_neox.layers.{}.mlp.output",
        **cfg,
    }
    (folder / "cfg.json").write_text(json.dumps(described))
    if statistics:
        found = {
            str(layer): {
                side: {"mean": random(D).tolist(), "std": random(D).exp().tolist()} for side in ("inputs", "targets")
            }
            for layer in range(L)
        }
        # The 1e-6 that is added to each std shows on a small one. (With a mean it would drown in rounding.)
        found["1"]["inputs"]["mean"][2], found["1"]["inputs"]["std"][2] = 0.0, 1e-5
        (folder / "norm_stats.json").write_text(json.dumps(found))
    return folder


def coding_inputs(folder):
    """Inputs that look as the statistics say."""
    path = folder / "norm_stats.json"
    inputs = random_inputs()
    if not path.is_file():
        return inputs
    found = json.loads(path.read_text())
    for kind, function in (("std", torch.mul), ("mean", torch.add)):
        values = torch.tensor([found[str(layer)]["inputs"][kind] for layer in range(L)])
        inputs = function(inputs, values)
    return inputs


def coding_forward(folder, inputs):
    """Each pair has a linear layer with a bias; statistics are applied outside of the model, with 1e-6 on each std."""
    cfg = json.loads((folder / "cfg.json").read_text())
    (path,) = folder.glob("*.safetensors")
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    path = folder / "norm_stats.json"
    statistics = json.loads(path.read_text()) if path.is_file() else None

    def of(layer, side):
        found = statistics[str(layer)][side]
        return torch.tensor(found["mean"]).double(), torch.tensor(found["std"]).double() + 1e-6

    def linear(x, key):
        name = f"decoder_module.decoders.{key}"
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias_param"])

    acts, normalized = [], []
    for layer in range(L):
        x = inputs[:, layer].double()
        if statistics is not None:
            mean, std = of(layer, "inputs")
            x = (x - mean) / std
        normalized.append(x)
        name = f"encoder_module.encoders.{layer}"
        h = torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias_param"])
        if cfg["activation_fn"] == "jumprelu":
            acts.append(h * (h >= tensors["theta_manager.log_threshold"][layer].exp()))
        else:
            acts.append(h.relu())
    reconstruction = []
    for t in range(L):
        if cfg["decoder_tying"] == "per_target":
            y = linear(sum(acts[: t + 1]), coding_key(None, t, "per_target"))
        else:
            y = sum(linear(acts[s], coding_key(s, t, cfg["decoder_tying"])) for s in range(t + 1))
        if cfg["skip_connection"]:
            for s in range(t + 1):
                y = y + normalized[s] @ tensors[f"decoder_module.skip_weights.{s}->{t}"].T
        if statistics is not None:
            mean, std = of(t, "targets")
            y = y * std + mean
        reconstruction.append(y)
    return torch.stack(acts, dim=1), torch.stack(reconstruction, dim=1)


CODING_VARIANTS = [
    ("jumprelu", "none", False),
    ("jumprelu", "none", True),
    ("relu", "none", False),
    ("jumprelu", "per_source", False),
    ("relu", "per_target", False),
]


@pytest.mark.parametrize("statistics", [False, True], ids=["raw", "with statistics"])
@pytest.mark.parametrize("activation_fn, tying, skip", CODING_VARIANTS)
def test_coding(tmp_path, activation_fn, tying, skip, statistics):
    folder = make_coding(tmp_path / "coding", activation_fn, tying, skip, statistics)
    assert importers.detect_format(folder) == "crosslayer-coding"
    clt = importers.import_clt(folder, "crosslayer-coding")
    config = clt.config
    assert (config.num_layers, config.num_features, config.d_model, config.decoder_reach) == (L, F, D, None)
    assert config.activation_fn == activation_fn and config.skip_connection is skip
    assert config.base_model_name_or_path == "EleutherAI/pythia-70m"
    assert (config.feature_input_hook, config.feature_output_hook) == ("mlp.hook_in", "mlp.hook_out")
    untied = tying == "per_source" and statistics  # one row cannot carry several output scales
    assert config.decoder_tying == ("none" if untied else tying)
    assert config.trained_decoder_tying == ("per_source" if untied else None)
    inputs = coding_inputs(folder)
    acts, reconstruction = coding_forward(folder, inputs)
    if not statistics:
        tensors = load_file(folder / "clt_checkpoint_10.safetensors")
        for layer in range(L):
            assert torch.equal(clt.encoders[layer].weight, tensors[f"encoder_module.encoders.{layer}.weight"])
            assert torch.equal(clt.encoders[layer].bias, tensors[f"encoder_module.encoders.{layer}.bias_param"])
            for j in range(clt.decoders[layer].weight.shape[1]):
                key = coding_key(layer, layer + j, tying)
                weight = tensors[f"decoder_module.decoders.{key}.weight"]
                assert torch.equal(clt.decoders[layer].weight[:, j], weight.T)
            if skip:
                weight = tensors[f"decoder_module.skip_weights.{layer}->{layer}"]
                assert torch.equal(clt.skips[layer].weight, weight.T)
            if activation_fn == "jumprelu":
                theta = tensors["theta_manager.log_threshold"][layer].exp()
                torch.testing.assert_close(clt.thresholds[layer](), theta, rtol=1e-6, atol=0)
    assert_computes(clt, inputs, acts, reconstruction)


def test_coding_from_the_file_and_with_statistics_elsewhere(tmp_path):
    folder = make_coding(tmp_path / "coding", statistics=True)
    expected = importers.import_clt(folder, "crosslayer-coding")
    (folder / "norm_stats.json").rename(tmp_path / "elsewhere.json")
    file = folder / "clt_checkpoint_10.safetensors"
    assert importers.detect_format(file) == "crosslayer-coding"
    assert_same_clt(importers.import_clt(file, norm_stats=tmp_path / "elsewhere.json"), expected)
    with pytest.raises(ValueError, match=r"normalization_method='mean_std'.*norm_stats\.json"):
        importers.import_clt(file)
    with pytest.raises(ValueError, match=r"norm_stats='none', normalization_method='mean_std'"):
        importers.import_clt(file, norm_stats="none")
    # cfg.json need not know what the trainer did, so that statistics beside a checkpoint of raw activations are asked.
    change_json(folder / "cfg.json", normalization_method="none")
    assert_same_clt(importers.import_clt(file, norm_stats=tmp_path / "elsewhere.json"), expected)
    (tmp_path / "elsewhere.json").rename(folder / "norm_stats.json")
    with pytest.raises(ValueError, match=r"normalization_method='none'.*norm_stats\.json.*'none'"):
        importers.import_clt(file)
    raw = importers.import_clt(file, norm_stats="none")
    assert torch.equal(raw.encoders[0].weight, load_file(file)["encoder_module.encoders.0.weight"])


def test_coding_without_statistics_says_so(tmp_path, caplog):
    importers.import_clt(make_coding(tmp_path / "coding"))
    assert "taken to be trained on raw activations" in caplog.text


def test_coding_takes_the_latest_checkpoint_of_several(tmp_path):
    folder = make_coding(tmp_path / "coding")
    file = folder / "clt_checkpoint_10.safetensors"
    (folder / "clt_checkpoint_20.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"2 checkpoints.*clt_checkpoint_10\.safetensors, clt_checkpoint_20"):
        importers.import_clt(folder)
    (folder / "clt_checkpoint_latest.safetensors").write_bytes(file.read_bytes())
    change(folder / "clt_checkpoint_20.safetensors", **{"encoder_module.encoders.0.weight": torch.zeros(F, D)})
    assert_same_clt(importers.import_clt(folder), importers.import_clt(file))


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"activation_fn": "topk"}, r"activation_fn='topk'.*batch.*convert_batchtopk_to_jumprelu"),
        ({"activation_fn": "batchtopk"}, r"activation_fn='batchtopk'.*batch"),
        ({"enable_feature_offset": True}, r"enable_feature_offset=True"),
        ({"enable_feature_scale": True}, r"enable_feature_scale=True"),
        ({"normalization_method": "sqrt_d_model"}, r"normalization_method='sqrt_d_model'"),
        ({"skip_connection": True, "decoder_tying": "per_target"}, r"skip_connection=True.*per_target"),
        ({"decoder_tying": "per_layer"}, r"decoder_tying='per_layer'"),
        ({"num_layers": 4}, r"decoder_module\.decoders\.0->3\.weight in .*shape None"),
        ({"num_features": 8}, r"encoder_module\.encoders\.0\.weight.*\(7, 5\).*\(8, 5\)"),
        ({"d_model": None}, r"d_model=None"),
        ({"mlp_input_template": None}, r"feature_input_hook=None .*cfg\.json.*give feature_input_hook"),
        ({"mlp_output_template": "transformer.h.{}.mlp.c_proj"}, r"feature_output_hook='transformer\.h\.\{\}"),
    ],
)
def test_coding_configuration_that_cannot_be_expressed(tmp_path, cfg, message):
    folder = make_coding(tmp_path / "coding")
    change_json(folder / "cfg.json", **cfg)
    with pytest.raises(ValueError, match=message):
        importers.read_clt(folder, "crosslayer-coding")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder_module.decoders.0->2.bias_param": None}, r"decoders\.0->2\.bias_param in .*shape None"),
        ({"decoder_module.decoders.1->2.weight": torch.zeros(F, D)}, r"decoders\.1->2\.weight.*\(7, 5\).*\(5, 7\)"),
        ({"decoder_module.feature_scale.0": torch.ones(F)}, r"feature_scale\.0.*not known"),
        (
            {"theta_manager.log_threshold": torch.full((L, F), torch.nan)},
            rf"layer 0 has {F} negative or NaN",
        ),
    ],
)
def test_coding_tensors_that_do_not_fit(tmp_path, changes, message):
    folder = make_coding(tmp_path / "coding")
    change(folder / "clt_checkpoint_10.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        importers.import_clt(folder, "crosslayer-coding")


def test_coding_skip_from_an_earlier_layer(tmp_path):
    folder = make_coding(tmp_path / "coding", skip=True)
    change(folder / "clt_checkpoint_10.safetensors", **{"decoder_module.skip_weights.0->1": torch.ones(D, D)})
    with pytest.raises(ValueError, match=r"skip_weights\.0->1.*not zero"):
        importers.read_clt(folder, "crosslayer-coding")


@pytest.mark.parametrize(
    "change_statistics, message",
    [
        (lambda found: found.pop("2"), r"inputs\.mean of layer 2 "),
        (lambda found: found["1"]["targets"].update(std=[1.0] * (D - 1)), r"targets\.std of layer 1 .* 5 numbers"),
        (lambda found: found["0"]["inputs"].update(std=[-1.0] * D), r"inputs\.std of layer 0 "),
        (lambda found: found["0"]["targets"].update(mean=[float("nan")] * D), r"targets\.mean of layer 0"),
    ],
)
def test_coding_statistics_that_do_not_fit(tmp_path, change_statistics, message):
    folder = make_coding(tmp_path / "coding", statistics=True)
    found = json.loads((folder / "norm_stats.json").read_text())
    change_statistics(found)
    (folder / "norm_stats.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        importers.read_clt(folder, "crosslayer-coding")


def test_coding_without_its_configuration(tmp_path):
    folder = make_coding(tmp_path / "coding")
    (folder / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is missing"):
        importers.import_clt(folder)


# -- CLT-Forge --------------------------------------------------------------------------------------------------------


def make_forge(folder, crosses=True, scaled=True, **cfg):
    random = Random(3)
    num_decoders = L * (L + 1) // 2 if crosses else L
    tensors = {
        "W_enc": random(L, D, F),
        "b_enc": random(L, F),
        "W_dec": random(num_decoders, F, D),
        "b_dec": random(num_decoders, D),
        "log_threshold": random.positive(L, F).log(),
        "estimated_norm_scaling_factor_in": random(L).exp() if scaled else torch.ones(L),
        "estimated_norm_scaling_factor_out": random(L).exp() if scaled else torch.ones(L),
        "feature_count": torch.zeros(L, F, dtype=torch.int64),
    }
    if crosses:
        tensors["layer_mask"] = torch.zeros(L, num_decoders)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "clt_weights.safetensors")
    described = {
        "d_in": D,
        "d_latent": F,
        "n_layers": L,
        "model_name": "gpt2",
        "cross_layer_decoders": crosses,
        "activation_fn": "jumprelu",
    }
    return change_json(folder / "clt_cfg.json", **described | cfg)


def forge_forward(folder, inputs):
    """The decoders' order is that of `torch.triu_indices`; scaling factors multiply what the model sees."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "clt_weights.safetensors").items()}
    x = inputs.double() * tensors["estimated_norm_scaling_factor_in"].view(1, -1, 1)
    h = torch.einsum("bnd,ndk->bnk", x, tensors["W_enc"]) + tensors["b_enc"]
    acts = h * (h > tensors["log_threshold"].exp())
    if json.loads((folder / "clt_cfg.json").read_text())["cross_layer_decoders"]:
        sources, targets = torch.triu_indices(L, L, offset=0)
        contributions = torch.einsum("bkd,kdf->bkf", acts[:, sources], tensors["W_dec"]) + tensors["b_dec"]
        y = torch.zeros(len(x), L, D, dtype=torch.float64).index_add(1, targets, contributions)
    else:
        y = torch.einsum("bnk,nkd->bnd", acts, tensors["W_dec"]) + tensors["b_dec"]
    return acts, y / tensors["estimated_norm_scaling_factor_out"].view(1, -1, 1)


@pytest.mark.parametrize("crosses", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_forge(tmp_path, crosses, scaled):
    folder = make_forge(tmp_path / "forge", crosses, scaled)
    assert importers.detect_format(folder) == "clt-forge"
    assert importers.detect_format(folder / "clt_weights.safetensors") == "clt-forge"
    clt = importers.import_clt(folder, "clt-forge", feature_input_hook="mlp.hook_in")
    config = clt.config
    assert (config.num_layers, config.num_features, config.d_model) == (L, F, D)
    assert config.decoder_reach == (None if crosses else 1) and config.base_model_name_or_path == "gpt2"
    assert (config.feature_input_hook, config.feature_output_hook) == ("mlp.hook_in", "hook_mlp_out")
    if not scaled:
        tensors = load_file(folder / "clt_weights.safetensors")
        for layer in range(L):
            assert torch.equal(clt.encoders[layer].weight, tensors["W_enc"][layer].T)
            assert torch.equal(clt.encoders[layer].bias, tensors["b_enc"][layer])
            theta = tensors["log_threshold"][layer].exp()
            torch.testing.assert_close(clt.thresholds[layer](), theta, rtol=1e-6, atol=0)
        if crosses:
            for k, (s, t) in enumerate(PAIRS):
                assert torch.equal(clt.decoders[s].weight[:, t - s], tensors["W_dec"][k])
    inputs = random_inputs()
    assert_computes(clt, inputs, *forge_forward(folder, inputs))


def test_forge_shards_in_the_order_of_their_ranks(tmp_path):
    folder = make_forge(tmp_path / "forge")
    expected = importers.import_clt(folder, "clt-forge", feature_input_hook="mlp.hook_in")
    tensors = load_file(folder / "clt_weights.safetensors")
    (folder / "clt_weights.safetensors").unlink()
    sizes = [1, 3, 3]
    dims = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1, "feature_count": 1}
    for rank in range(3):
        parts = {
            name: (tensor.split(sizes, dim=dims[name])[rank] if name in dims else tensor).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(parts, folder / f"rank{rank}_clt_weights.safetensors")
    assert importers.detect_format(folder) == "clt-forge"
    assert_same_clt(importers.import_clt(folder, feature_input_hook="mlp.hook_in"), expected)
    (folder / "rank2_clt_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"d_latent=7.*need 4.*missing"):
        importers.import_clt(folder, feature_input_hook="mlp.hook_in")
    (folder / "rank0_clt_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"rank0_clt_weights\.safetensors is missing"):
        importers.import_clt(folder, feature_input_hook="mlp.hook_in")


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"activation_fn": "topk", "k": 3}, r"activation_fn='topk'"),
        ({"activation_fn": "groupmax"}, r"activation_fn='groupmax'"),
        ({"cross_layer_decoders": False}, r"W_dec in .*\(6, 7, 5\).*\(3, 7, 5\)"),
        ({"cross_layer_decoders": None}, r"cross_layer_decoders=None"),
        ({"n_layers": 4}, r"n_layers=4.*need 3"),
    ],
)
def test_forge_configuration_that_cannot_be_expressed(tmp_path, cfg, message):
    folder = make_forge(tmp_path / "forge")
    change_json(folder / "clt_cfg.json", **cfg)
    with pytest.raises(ValueError, match=message):
        importers.read_clt(folder, "clt-forge", feature_input_hook="mlp.hook_in")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"b_dec": None}, r"b_dec in .*shape None"),
        ({"W_enc": torch.zeros(L, D)}, r"W_enc in .*\(3, 5\).*\(L, D, F\)"),
        ({"b_enc": torch.zeros(L, D)}, r"b_enc in .*\(3, 5\).*\(3, 7\)"),
        ({"log_threshold": torch.full((L, F), torch.nan)}, r"threshold of layer 0 .*7 negative"),
        ({"estimated_norm_scaling_factor_in": torch.tensor([1.0, 0.0, 1.0])}, r"factor_in.*not positive"),
        ({"W_skip": torch.zeros(L, D, D)}, r"W_skip.*not known"),
    ],
)
def test_forge_tensors_that_do_not_fit(tmp_path, changes, message):
    folder = make_forge(tmp_path / "forge")
    change(folder / "clt_weights.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        importers.import_clt(folder, "clt-forge", feature_input_hook="mlp.hook_in")


def test_forge_does_not_say_its_input(tmp_path):
    with pytest.raises(ValueError, match=r"feature_input_hook=None .*ln2\.hook_normalized.*give feature_input_hook"):
        importers.import_clt(make_forge(tmp_path / "forge"))


# -- Gemma Scope 2 ----------------------------------------------------------------------------------------------------


def make_gemma(folder, skip=True, acausal=False, **cfg):
    random = Random(4)
    folder.mkdir(exist_ok=True)
    for layer in range(L):
        w_dec = random(F, L, D)
        if not acausal:
            w_dec[:, :layer] = 0
        tensors = {
            "w_enc": random(D, F),
            "b_enc": random(F),
            "threshold": random.positive(F),
            "w_dec": w_dec,
            "b_dec": random(D),
        }
        if skip:
            tensors["affine_skip_connection"] = random(D, D)
        save_file(tensors, folder / f"params_layer_{layer}.safetensors")
    described = {
        "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
        "width": L * F,
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "affine_connection": skip,
        "type": "clt",
    }
    return change_json(folder / "config.json", **described | cfg)


def gemma_forward(folder, inputs):
    """All layers' tensors stacked; a decoder's second index is the target layer."""
    layers = [load_file(folder / f"params_layer_{layer}.safetensors") for layer in range(L)]
    tensors = {name: torch.stack([layer[name] for layer in layers]).double() for name in layers[0]}
    x = inputs.double()
    h = torch.einsum("nld,ldf->nlf", x, tensors["w_enc"]) + tensors["b_enc"]
    acts = (h > tensors["threshold"]) * h.relu()
    y = torch.einsum("nsf,sftd->ntd", acts, tensors["w_dec"]) + tensors["b_dec"]
    if "affine_skip_connection" in tensors:
        y = y + torch.einsum("nld,lde->nle", x, tensors["affine_skip_connection"])
    return acts, y


@pytest.mark.parametrize("skip", [True, False])
def test_gemma(tmp_path, skip):
    folder = make_gemma(tmp_path / "gemma", skip)
    assert importers.detect_format(folder) == "gemma-scope-2"
    clt = importers.import_clt(folder, "gemma-scope-2")
    config = clt.config
    assert (config.num_layers, config.num_features, config.d_model, config.decoder_reach) == (L, F, D, None)
    assert config.skip_connection is skip and config.base_model_name_or_path == "google/gemma-3-270m-pt"
    assert (config.feature_input_hook, config.feature_output_hook) == ("mlp.hook_in", "hook_mlp_out")
    for layer in range(L):
        tensors = load_file(folder / f"params_layer_{layer}.safetensors")
        assert torch.equal(clt.encoders[layer].weight, tensors["w_enc"].T)
        assert torch.equal(clt.encoders[layer].bias, tensors["b_enc"])
        assert torch.equal(clt.decoders[layer].weight, tensors["w_dec"][:, layer:])
        assert torch.equal(clt.decoders[layer].bias, tensors["b_dec"])
        torch.testing.assert_close(clt.thresholds[layer](), tensors["threshold"], rtol=1e-6, atol=0)
        if skip:
            assert torch.equal(clt.skips[layer].weight, tensors["affine_skip_connection"])
    inputs = random_inputs()
    assert_computes(clt, inputs, *gemma_forward(folder, inputs))


def test_gemma_decoders_to_earlier_layers(tmp_path):
    folder = make_gemma(tmp_path / "gemma", acausal=True)
    with pytest.raises(ValueError, match=r"w_dec in .*params_layer_1.*before its own, 1, .*drop_acausal"):
        importers.import_clt(folder, "gemma-scope-2")
    clt = importers.import_clt(folder, "gemma-scope-2", drop_acausal=True)
    for layer in range(L):
        path = folder / f"params_layer_{layer}.safetensors"
        change(path, w_dec=load_file(path)["w_dec"] * (torch.arange(L) >= layer)[:, None])
    assert_same_clt(clt, importers.import_clt(folder, "gemma-scope-2"))


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"type": "crosscoder"}, r"type='crosscoder'"),
        ({"architecture": "topk"}, r"architecture='topk'"),
        ({"affine_connection": False}, r"affine_connection=False.*True"),
        ({"hf_hook_point_in": "model.layers.{5,9}.output"}, r"feature_input_hook='model\.layers\.\{5,9\}\.output'"),
    ],
)
def test_gemma_configuration_that_cannot_be_expressed(tmp_path, cfg, message):
    folder = make_gemma(tmp_path / "gemma", **cfg)
    with pytest.raises(ValueError, match=message):
        importers.read_clt(folder, "gemma-scope-2")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"threshold": None}, r"threshold in .*shape None"),
        ({"threshold": torch.tensor([-0.1] * 3 + [1.0] * (F - 3))}, r"threshold of layer 1 .*3 negative"),
        ({"w_dec": torch.zeros(F, L - 1, D)}, r"w_dec in .*\(7, 2, 5\).*\(7, 3, 5\)"),
        ({"w_enc": torch.zeros(F, D)}, r"w_enc in .*\(7, 5\).*\(5, 7\)"),
        ({"b_skip": torch.zeros(D)}, r"b_skip.*not known"),
    ],
)
def test_gemma_tensors_that_do_not_fit(tmp_path, changes, message):
    folder = make_gemma(tmp_path / "gemma")
    change(folder / "params_layer_1.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        importers.import_clt(folder, "gemma-scope-2")


def test_gemma_without_its_configuration_needs_the_hooks(tmp_path):
    folder = make_gemma(tmp_path / "gemma")
    expected = importers.import_clt(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"feature_input_hook=None .*config\.json"):
        importers.import_clt(folder)
    assert_same_clt(importers.import_clt(folder, **MLP_HOOKS), expected)


def test_a_layer_is_read_when_it_is_asked_for(tmp_path):
    folder = make_gemma(tmp_path / "gemma")
    _, layers = importers.read_clt(folder, "gemma-scope-2")
    (folder / "params_layer_1.safetensors").unlink()
    assert torch.equal(next(layers)["b_dec_0"], load_file(folder / "params_layer_0.safetensors")["b_dec"])
    with pytest.raises(FileNotFoundError):
        next(layers)


# -- circuit-tracer's CLTs, and what is in no format ------------------------------------------------------------------


@pytest.mark.parametrize("config_json", [True, False])
def test_circuit_tracer(tmp_path, config_json):
    clt = random_clt(double=False, skip_connection=True).eval()
    clt.save_pretrained(tmp_path / "clt")
    if not config_json:
        (tmp_path / "clt" / "config.json").unlink()
    assert importers.detect_format(tmp_path / "clt") == ("hf_clt" if config_json else "circuit-tracer")
    assert_same_clt(importers.import_clt(tmp_path / "clt", "circuit-tracer"), clt)
    found = importers.import_clt(tmp_path / "clt", base_model_name_or_path="a/b")
    assert_same_clt(found, clt)
    assert found.config.base_model_name_or_path == "a/b"


@pytest.mark.parametrize("tying", ["none", "per_source", "per_target"])
def test_circuit_tracer_gets_decoders_that_reach_the_last_layer(tmp_path, tying):
    fields = {"activation_fn": "jumprelu", "decoder_reach": 2, "decoder_tying": tying}
    clt = random_clt(double=False, **fields).eval()
    clt.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "converted"
    importers.convert(tmp_path / "saved", folder, to_format="circuit-tracer")
    inputs = random_inputs().float()
    for layer in range(clt.config.num_layers):
        decoder = load_file(folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
        assert decoder.shape[1] == clt.config.num_layers - layer and not decoder[:, 2:].any()
    (folder / "config.json").unlink()  # the files alone, as circuit-tracer reads them
    found = importers.import_clt(folder)
    assert found.config.decoder_reach is None
    torch.testing.assert_close(found(inputs).reconstruction, clt(inputs).reconstruction, rtol=1e-4, atol=1e-5)
    assert "reach" not in (folder / "README.md").read_text().split("What other tools read")[1]


def test_what_is_in_no_format(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        importers.detect_format(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"in none of the formats hf_clt, .*it holds nothing"):
        importers.detect_format(tmp_path)
    (tmp_path / "clt.pt").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match=r"clt\.pt .*pickle"):
        importers.detect_format(tmp_path / "clt.pt")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    for path, held in ((tmp_path, "clt.pt, model.safetensors"), (tmp_path / "model.safetensors", "weight")):
        with pytest.raises(ValueError, match=f"none of the formats.*it holds {held}"):
            importers.import_clt(path)
    with pytest.raises(ValueError, match=r"format='saelens'.*hf_clt"):
        importers.import_clt(tmp_path, format="saelens")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        importers.detect_format(tmp_path / "model.safetensors")


@pytest.mark.parametrize("option", ["norm_stats", "drop_acausal"])
def test_an_option_of_another_format_is_refused(tmp_path, option):
    for path in (make_plt(tmp_path / "plt"), saved_clt(tmp_path / "clt")):
        with pytest.raises(ValueError, match=f"{option} is for .*leave out {option}"):
            importers.import_clt(path, **{option: "none"})


def test_importing_leaves_the_random_numbers_alone(tmp_path):
    folder = make_gemma(tmp_path / "gemma")
    before = torch.get_rng_state()
    importers.import_clt(folder)
    assert torch.equal(torch.get_rng_state(), before)


# -- and back: what circuit-tracer reads ------------------------------------------------------------------------------


def saved_clt(folder, **fields):
    random_clt(double=False, **fields).save_pretrained(folder)
    return folder


def plt_clt(**fields):
    fields = {"num_layers": L, "num_features": F, "d_model": D, "decoder_reach": 1, **MLP_HOOKS, **fields}
    return random_clt(double=False, **fields).eval()


def to_plt(clt, folder, **options):
    clt.save_pretrained(folder / "saved")
    importers.convert(folder / "saved", folder / "plt", to_format="circuit-tracer-plt", **options)
    return folder / "plt"


@pytest.mark.parametrize("skip", [True, False])
def test_plt_round_trip(tmp_path, skip):
    clt = plt_clt(skip_connection=skip, base_model_name_or_path="some/model")
    folder = to_plt(clt, tmp_path)
    assert importers.detect_format(folder) == "circuit-tracer-plt"
    found = importers.import_clt(folder)
    assert_same_clt(found, clt)
    assert found.config.base_model_name_or_path == "some/model" and found.config.decoder_reach == 1
    inputs = random_inputs()
    acts, reconstruction = plt_forward(folder, inputs)
    torch.testing.assert_close(clt.encode(inputs).double(), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clt(inputs).reconstruction.double(), reconstruction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"activation_fn": "relu"},
        {"activation_fn": "batchtopk", "k": 2},
        {"decoder_tying": "per_source"},
        {"decoder_tying": "per_target"},
    ],
    ids=str,
)
def test_plt_computes_the_same(tmp_path, fields):
    clt = plt_clt(**fields)
    clt.set_normalization(**random_statistics(clt))
    if clt.config.activation_fn == "batchtopk":
        clt.train()(random_batch(clt, num_tokens=40)[0])
        clt.eval()
    folder, inputs = to_plt(clt, tmp_path), random_inputs()
    acts, reconstruction = plt_forward(folder, inputs)
    assert 0.02 < (acts > 0).double().mean() < 0.95
    torch.testing.assert_close(clt.encode(inputs).double(), acts, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(clt(inputs).reconstruction.double(), reconstruction, rtol=1e-3, atol=1e-3)
    found = importers.import_clt(folder)
    torch.testing.assert_close(found(inputs).reconstruction.double(), reconstruction, rtol=1e-3, atol=1e-3)
    assert found.config.activation_fn in ("relu", "jumprelu")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"activation_fn": "topk"}, r"activation_fn='topk'"),
        ({"activation_fn": "batchtopk"}, r"no running threshold"),
        ({"decoder_reach": 2}, r"decoder_reach=2"),
    ],
)
def test_what_per_layer_transcoders_cannot_express(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        to_plt(plt_clt(**fields), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_files_of_more_layers_are_removed(tmp_path):
    to_plt(plt_clt(num_layers=L + 2), tmp_path)
    clt = plt_clt()
    assert_same_clt(importers.import_clt(to_plt(clt, tmp_path, overwrite=True)), clt)


# -- conversion -------------------------------------------------------------------------------------------------------

MAKERS = {
    "circuit-tracer-plt": make_plt,
    "crosslayer-coding": lambda folder: make_coding(folder, tying="per_target", statistics=True),
    "clt-forge": make_forge,
    "gemma-scope-2": make_gemma,
    "hf_clt": lambda folder: saved_clt(folder, num_layers=L, num_features=F, d_model=D, **MLP_HOOKS),
}


@pytest.mark.parametrize("format", MAKERS)
def test_convert_gives_what_import_gives(tmp_path, format):
    source = MAKERS[format](tmp_path / "source")
    options = {"feature_input_hook": "mlp.hook_in"} if format == "clt-forge" else {}
    found, config, written = importers.convert(source, tmp_path / "a" / "out", **options)
    assert found == format and config.num_layers == L
    assert {path.name for path in written} == {path.name for path in (tmp_path / "a" / "out").iterdir()}
    assert "README.md" in {path.name for path in written}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]  # nothing is left beside it
    converted = CrossLayerTranscoder.from_pretrained(tmp_path / "a" / "out")
    expected = importers.import_clt(source, **options)
    assert_same_clt(converted, expected)
    for name in set(expected.config.to_dict()) - {"_name_or_path", "architectures", "transformers_version", "dtype"}:
        assert getattr(converted.config, name, None) == getattr(expected.config, name, None), name


def test_a_conversion_that_fails_halfway_writes_nothing(tmp_path):
    source = make_gemma(tmp_path / "gemma")
    path = source / "params_layer_2.safetensors"
    change(path, w_dec=load_file(path)["w_dec"] + 1)
    with pytest.raises(ValueError, match="drop_acausal"):
        importers.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["gemma"]


def test_nothing_is_overwritten_unasked(tmp_path):
    source = make_gemma(tmp_path / "gemma")
    output = saved_clt(tmp_path / "out", num_layers=5)
    (output / "mine.txt").write_text("mine")
    (output / "README.md").write_text("edited by hand")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ValueError, match=r"output=.*out.*not empty"):
        importers.convert(source, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    importers.convert(source, output, overwrite=True)
    assert (output / "mine.txt").read_text() == "mine"
    assert (output / "README.md").read_text() == "edited by hand"
    assert_same_clt(CrossLayerTranscoder.from_pretrained(output), importers.import_clt(source))
    assert not (output / "W_enc_3.safetensors").exists()
    with pytest.raises(ValueError, match="where the source lies"):
        importers.convert(source, source, overwrite=True)
    with pytest.raises(ValueError, match=r"output=.*is a file"):
        importers.convert(source, output / "mine.txt")
    with pytest.raises(ValueError, match=r"to_format='saelens'"):
        importers.convert(source, tmp_path / "new", to_format="saelens")


def test_a_converted_clt_trains_on(tmp_path):
    importers.convert(make_gemma(tmp_path / "gemma"), tmp_path / "out")
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "out").train()
    inputs = random_inputs()
    clt(inputs, labels=inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in clt.parameters())
    assert CLTConfig.from_pretrained(tmp_path / "out").architectures == ["CrossLayerTranscoder"]
