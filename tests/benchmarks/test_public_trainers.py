"""The public trainers: their losses are their sources' formulas, and what they train is measured as it computes."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import public_trainers
from benchmarks.public_trainers import Batches, Coder, Layerwise, to_clt
from benchmarks.quality import CACHE, make_cache
from benchmarks.sweep import read_records


LAYERS, FEATURES, WIDTH, TOKENS = 3, 7, 5, 200


def whole(x, layer):
    return x


@pytest.fixture
def rows():
    """Inputs and targets, (N, L, D) each, in float64."""
    return torch.randn(2, TOKENS, LAYERS, WIDTH, dtype=torch.float64)


def make_coder(**options):
    coder = Coder(LAYERS, FEATURES, WIDTH, **options).double()
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return coder


def read_dense(coder, x):
    """Pre-activations (N, L, F)."""
    return torch.einsum("nsd,sfd->nsf", x, coder.W_enc) + coder.b_enc


def decode_dense(coder, acts):
    """(N, L, D) from activations as a function of source and target layer."""
    targets = []
    for t in range(LAYERS):
        written = [acts(s, t) @ coder.W_dec[s][t - s] for s in range(t + 1)]
        biases = [coder.b_dec[s][t - s] for s in range(t + 1) if t - s < len(coder.b_dec[s])]
        targets.append(sum(written) + sum(biases))
    return torch.stack(targets, dim=1)


def jump(h, theta, bandwidth, by_h, from_zero):
    """h · 1[h > θ] whose derivatives are written as a sum of terms, of which those with `detach` have no value."""
    value = torch.where((h > theta) & (h > 0), h, 0).detach()
    passed = (h >= 0) if from_zero else (h > theta)
    pull = ((h if by_h else theta) / bandwidth * ((h - theta).abs() < bandwidth / 2)).detach()
    return value + passed * (h - h.detach()) - pull * (theta - theta.detach())


def norms(coder):
    return torch.stack([weight.square().sum(dim=(0, 2)).sqrt() for weight in coder.W_dec])


def clt_forge_formula(coder, x, y):
    h, theta = read_dense(coder, x), coder.theta.exp()
    acts = jump(h, theta, 1.0, by_h=False, from_zero=False)
    error = (decode_dense(coder, lambda s, t: acts[:, s]) - y).square().sum(dim=(1, 2)).mean()
    penalty = torch.tanh(4 * acts * norms(coder)).sum(dim=(1, 2)).mean()
    return error + 2.0 * penalty + 0.5 * ((theta - h).relu() * norms(coder)).sum(dim=(1, 2)).mean()


def crosslayer_coding_formula(coder, x, y):
    h = read_dense(coder, x)
    acts = jump(h, coder.theta.exp(), 1.0, by_h=True, from_zero=False)
    raw = (decode_dense(coder, lambda s, t: acts[:, s]) - y) * coder.std_out
    error = raw.square().mean(dim=(0, 2)).sum()
    return error + 0.3 * torch.tanh(acts * norms(coder)).sum() + 3e-6 * (-h).relu().mean()


def crosslayer_transcoder_formula(coder, x, y):
    h = read_dense(coder, x)
    acts = jump(h, coder.theta, 0.01, by_h=False, from_zero=True)
    error = (decode_dense(coder, lambda s, t: acts[:, s]) - y).square().mean()
    penalty = torch.tanh(acts * norms(coder)).sum(dim=(1, 2)).mean()
    return error + 0.3 * penalty + 1e-6 * (-h).relu().sum(dim=2).mean()


def clt_training_formula(coder, x, y):
    h = read_dense(coder, x).relu()
    kept = h.topk(coder.k, dim=2).indices
    acts = h * torch.zeros_like(h).scatter(2, kept, 1)
    output = decode_dense(coder, lambda s, t: acts[:, s] + coder.offset[s][t - s] * (acts[:, s] > 0))
    return ((output - y).square().sum(dim=(0, 2)) / (y - y.mean(dim=0)).square().sum(dim=(0, 2))).sum()


@pytest.mark.parametrize(
    "options, loss, given, formula",
    [
        ({}, public_trainers.clt_forge_loss, (2.0, 0.5), clt_forge_formula),
        ({}, public_trainers.crosslayer_coding_loss, (0.3,), crosslayer_coding_formula),
        ({"is_log": False}, public_trainers.crosslayer_transcoder_loss, (0.3,), crosslayer_transcoder_formula),
        ({"k": 3}, public_trainers.clt_training_loss, (), clt_training_formula),
    ],
)
def test_a_loss_and_its_gradients_are_the_formulas(rows, options, loss, given, formula):
    coder = make_coder(**options)
    coder.std_out.uniform_(0.5, 2)
    losses = [loss(coder, *rows, *given), formula(coder, *rows)]
    gradients = [torch.autograd.grad(value, list(coder.parameters())) for value in losses]
    assert torch.allclose(*losses)
    for (name, _), ours, theirs in zip(coder.named_parameters(), *gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12), name
        assert ours.any(), name


@pytest.mark.parametrize("options", [{}, {"is_log": False}])
def test_a_converted_clt_reconstructs_as_its_trainer(rows, options):
    coder = make_coder(**options)
    if not coder.is_log:  # some thresholds are negative then, and one bias per target layer is left
        coder.b_dec = torch.nn.ParameterList(bias[:1].detach() for bias in coder.b_dec)
    x, y = rows
    public_trainers.standardize(coder, [(x * 3 + 1, y * 2 - 1)], 1e-6)
    normalized, _ = coder.normalize(x, y)
    _, _, outputs = coder.jumprelu(normalized, 1.0)
    forward = torch.stack(outputs, dim=1) * coder.std_out + coder.mean_out
    reconstruction, acts = Layerwise(coder, whole).all_layers(x)
    assert torch.allclose(reconstruction, forward)
    converted = to_clt(coder.float())(x.float())
    assert torch.allclose(converted.reconstruction.double(), forward, atol=1e-5)
    assert torch.equal(converted.features.to_dense() > 0, acts > 0)


def test_a_topk_coder_reconstructs_as_its_loss_does(rows):
    coder = make_coder(k=2)
    x, y = rows
    reconstruction, acts = Layerwise(coder, whole).all_layers(x)
    assert (acts > 0).sum(dim=2).max() <= 2
    shares = (reconstruction - y).square().sum(dim=(0, 2)) / (y - y.mean(dim=0)).square().sum(dim=(0, 2))
    assert torch.allclose(shares.sum(), public_trainers.clt_training_loss(coder, x, y))


@pytest.mark.parametrize("name", list(public_trainers.TRAINERS))
def test_a_trainer_learns(name, monkeypatch):
    monkeypatch.setattr(public_trainers, "BATCH", 64)
    x = torch.randn(64 * 60, LAYERS, WIDTH)
    y = F.relu(x @ torch.randn(WIDTH, WIDTH)).cumsum(dim=1)
    function, _, _, runs = public_trainers.TRAINERS[name]
    sparsity = {key: 4 if key == "k" else 1e-6 for key in runs[0] if key != "rate"}
    coder = function(Batches(x, y, whole, seed=0), 16, **sparsity, rate=0.02)
    with torch.no_grad():
        reconstruction, _ = Layerwise(coder, whole).all_layers(x)
    assert (reconstruction - y).square().sum() < 0.5 * (y - y.mean(dim=0)).square().sum()


def test_behind_the_norm_is_what_the_mlp_reads():
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8, vocab_size=9)
    model = LlamaForCausalLM(config)
    residual = torch.randn(4, 2, 8)
    for layer, block in enumerate(model.model.layers):
        torch.nn.init.normal_(block.post_attention_layernorm.weight)
        behind = block.post_attention_layernorm(residual[:, layer])
        read = public_trainers.reader(model, "mlp input")
        assert torch.allclose(read(residual[:, layer], layer), behind)
        assert torch.allclose(read(residual, slice(None))[:, layer], behind)
        normalized = public_trainers.reader(model, "normalized")(residual, slice(None))
        assert torch.allclose(normalized[:, layer] * block.post_attention_layernorm.weight, behind)


def test_a_recorded_run_is_not_made_again(text, tiny_gpt2, tmp_path, monkeypatch, capsys):
    half = text.index("\n\n", len(text) // 2)
    for name, part in (("train", text[:half]), ("heldout", text[half:])):
        rows = [json.dumps({"text": paragraph}) + "\n" for paragraph in part.split("\n\n")]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    settings = {**CACHE, "train_tokens": 700, "heldout_tokens": 200, "context_size": 32}
    make_cache(tmp_path / "work", settings, tiny_gpt2, tmp_path / "train.jsonl", tmp_path / "heldout.jsonl")
    monkeypatch.setattr(public_trainers, "BATCH", 64)
    monkeypatch.setattr(public_trainers, "NUM_FEATURES", 16)
    made = []

    def train(batches, num_features, **options):
        made.append(options)
        return public_trainers.crosslayer_coding(batches, num_features, **options)

    runs = [{"sparsity": 1e-6, "rate": 1e-3}, {"sparsity": 1e-6, "rate": 1e-2}]
    monkeypatch.setitem(public_trainers.TRAINERS, "crosslayer-coding", (train, "residual", "bfloat16", runs))
    records = tmp_path / "records.jsonl"
    command = ["--work", str(tmp_path / "work"), "--model", tiny_gpt2, "--records", str(records)]
    tables = []
    for _ in range(2):
        assert public_trainers.main([*command, "--trainers", "crosslayer-coding"]) == 0
        tables.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("|")])
    assert made == runs
    assert tables[0] == tables[1]
    assert tables[0][2].startswith("| crosslayer-coding, sparsity 1e-06, rate 0.001 | 0 | ")
    for record in read_records(records):
        assert record["conversion_error"] < 1e-4
        assert len(record["nmse_per_layer"]) == len(record["l0_per_layer"]) == 2
        assert str(tmp_path) not in json.dumps(record)
    assert public_trainers.main([*command, "--trainers", "clt-training"]) == 2
    assert "model has no post_attention_layernorm" in capsys.readouterr().err
