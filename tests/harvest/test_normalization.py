"""Statistics of activations against float64 over all rows at once, and the initial values that are set from data."""

import pytest
import torch
from safetensors.torch import save_file

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.harvest.normalization import (
    CLUSTER_PASSES,
    estimate_statistics,
    load_statistics,
    set_decoder_directions,
    set_encoder_directions,
    set_firing_rate,
    set_output_bias,
)
from hf_clt.harvest.statistics import Moments
from hf_clt.harvest.text import load_text_dataset
from hf_clt.harvest.tokens import TokenStream


L, D = 3, 5


def rows_with_offset(number, offset, seed=0):
    """(N, L, D) float32 rows with means around `offset` and standard deviations of 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    means = offset * (1 + torch.rand(L, D, generator=generator))
    spread = 1 + 2 * torch.rand(L, D, generator=generator)
    return (means + spread * torch.randn(number, L, D, generator=generator)).float()


def in_batches(rows, sizes):
    assert sum(sizes) == len(rows)
    return rows.split(sizes)


def assert_moments_of(moments, rows):
    mean, std = moments.mean_and_std()
    assert mean.dtype == std.dtype == torch.float64
    assert int(moments.count) == len(rows)
    torch.testing.assert_close(mean, rows.double().mean(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, rows.double().std(dim=0, correction=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4, -1e6])
@pytest.mark.parametrize("sizes", [[100], [1] * 100, [1, 97, 2], [64, 30, 6]])
def test_moments_are_exact_whatever_the_batches(offset, sizes):
    rows = rows_with_offset(100, offset)
    moments = Moments((L, D))
    for batch in in_batches(rows, sizes):
        moments.update(batch)
    assert_moments_of(moments, rows)


def test_a_constant_dimension_has_no_deviation():
    rows = rows_with_offset(50, 1e4)
    rows[:, 1, 2] = 1234.5678
    moments = Moments((L, D))
    for batch in rows.split(7):
        moments.update(batch)
    assert moments.mean_and_std()[1][1, 2] == 0


def test_half_precision_rows_are_summed_in_float64():
    rows = rows_with_offset(300, 10.0).bfloat16()
    moments = Moments((L, D))
    for batch in rows.split(11):
        moments.update(batch)
    assert_moments_of(moments, rows)


@pytest.mark.parametrize("sizes", [[40, 60], [1, 99], [0, 100], [100, 0], [0, 3, 0, 97]])
def test_merged_parts_equal_the_whole(sizes):
    rows = rows_with_offset(100, 1e4)
    merged = Moments((L, D))
    for part in in_batches(rows, sizes):
        moments = Moments((L, D))
        for batch in part.split(9):
            moments.update(batch)
        merged.merge(moments)
    assert_moments_of(merged, rows)


# Of a language model


@pytest.fixture(scope="module")
def language_model(tiny_gpt2):
    return load_language_model(tiny_gpt2)


@pytest.fixture
def tokens(language_model, small_text_file):
    return TokenStream(load_text_dataset(small_text_file), language_model[1], context_size=32, prompts_per_batch=4)


@pytest.mark.parametrize("num_batches", [1, 5, None])
def test_statistics_of_the_first_batches_or_all(language_model, tokens, num_batches):
    harvester = Harvester(language_model[0])
    batches = list(tokens)
    assert len(batches) > 10
    harvested = [harvester.harvest(batch) for batch in batches[:num_batches]]
    found = estimate_statistics(tokens, harvester, num_batches, progress=False)
    for side, rows in zip(("in", "out"), zip(*harvested, strict=True), strict=True):
        rows = torch.cat(rows).double()
        torch.testing.assert_close(found[f"mean_{side}"], rows.mean(dim=0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[f"std_{side}"], rows.std(dim=0, correction=0), rtol=1e-10, atol=1e-12)
    assert not torch.equal(found["mean_in"], found["mean_out"])


def test_the_text_is_rewound(language_model, tokens):
    before = [batch["input_ids"] for batch in tokens]
    next(iter(tokens))  # wherever it stood
    estimate_statistics(tokens, Harvester(language_model[0]), 3, progress=False)
    after = [batch["input_ids"] for batch in tokens]
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_more_batches_than_the_text_has_is_all_of_it(language_model, tokens):
    harvester = Harvester(language_model[0])
    found = estimate_statistics(tokens, harvester, 10_000, progress=False)
    whole = estimate_statistics(tokens, harvester, None, progress=False)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_no_counted_token_is_refused(language_model, tokens):
    tokens._counted = lambda ids, offset: torch.zeros(len(ids), dtype=torch.bool).numpy()
    with pytest.raises(ValueError, match=r"dataset: .*more text"):
        estimate_statistics(tokens, Harvester(language_model[0]), 2, progress=False)


# From a file


def some_statistics():
    return {name: torch.rand(L, D) + 0.5 for name in ("mean_in", "std_in", "mean_out", "std_out")}


def test_statistics_are_read_from_a_file(tmp_path):
    statistics = some_statistics()
    save_file(statistics | {"other": torch.ones(1)}, tmp_path / "statistics.safetensors")
    found = load_statistics(tmp_path / "statistics.safetensors")
    assert found.keys() == statistics.keys()
    assert all(torch.equal(found[name], statistics[name]) for name in statistics)


@pytest.mark.parametrize("name", ["mean_in", "std_in", "mean_out", "std_out"])
def test_a_missing_tensor_is_named(tmp_path, name):
    statistics = some_statistics()
    del statistics[name]
    save_file(statistics, tmp_path / "statistics.safetensors")
    with pytest.raises(ValueError, match=rf"normalization_file='.*statistics.safetensors'.* {name}"):
        load_statistics(str(tmp_path / "statistics.safetensors"))


@pytest.mark.parametrize("content", [b"", b"no safetensors file", "half"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "statistics.safetensors"
    if content == "half":
        save_file(some_statistics(), path)
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"normalization_file='.*statistics.safetensors'"):
        load_statistics(path)


# Initial values


def make_clt(activation_fn="jumprelu", with_statistics=True, **config):
    torch.manual_seed(0)
    clt = CrossLayerTranscoder(
        CLTConfig(num_layers=L, d_model=D, num_features=24, activation_fn=activation_fn, **config)
    )
    if with_statistics:
        clt.set_normalization(torch.randn(L, D) * 3, torch.rand(L, D) + 0.5, torch.randn(L, D), torch.rand(L, D) + 0.5)
    return clt


@pytest.mark.parametrize("with_statistics", [True, False])
@pytest.mark.parametrize("activation_fn, threshold", [("relu", 0.0), ("jumprelu", 0.03), ("jumprelu", 2.0)])
@pytest.mark.parametrize("rate", [0.01, 0.02, 0.3])
def test_each_feature_fires_at_the_rate_that_was_asked_for(activation_fn, threshold, rate, with_statistics):
    clt = make_clt(activation_fn, with_statistics, jumprelu_threshold=threshold)
    inputs = rows_with_offset(500, 4.0)
    before = clt.encode(inputs).gt(0).float().mean(dim=0)
    set_firing_rate(clt, inputs, rate)
    found = clt.encode(inputs).gt(0).float().mean(dim=0)
    assert (found - rate).abs().max() <= 1 / len(inputs) + 1e-6
    assert (before - rate).abs().max() > 0.1  # else nothing was shown


def test_a_rate_below_one_token_fires_on_one():
    clt = make_clt("relu")
    inputs = rows_with_offset(20, 1.0)
    set_firing_rate(clt, inputs, 0.001)
    assert (clt.encode(inputs).gt(0).sum(dim=0) == 1).all()


def test_only_the_encoder_bias_is_set():
    clt = make_clt()
    before = {name: value.clone() for name, value in clt.state_dict().items()}
    set_firing_rate(clt, rows_with_offset(100, 1.0), 0.1)
    for name, value in clt.state_dict().items():
        is_bias = name.startswith("encoders.") and name.endswith(".bias")
        assert torch.equal(value, before[name]) is not is_bias


def test_a_bias_that_was_there_does_not_matter():
    inputs = rows_with_offset(100, 1.0)
    clt, other = make_clt(), make_clt()
    with torch.no_grad():
        for encoder in other.encoders:
            encoder.bias.uniform_(-5, 5)
    set_firing_rate(clt, inputs, 0.1)
    set_firing_rate(other, inputs, 0.1)
    for one, two in zip(clt.encoders, other.encoders, strict=True):
        torch.testing.assert_close(one.bias, two.bias)


def plain_spherical_means(x, number):
    """The means of [`cluster_directions`], a token and a cluster at a time."""
    means = [x[cluster % len(x)] for cluster in range(number)]
    for _ in range(CLUSTER_PASSES):
        members = [[] for _ in means]
        for token in x:
            members[max(range(number), key=lambda cluster: float(token @ means[cluster]))].append(token)
        means = [sum(some) / sum(some).norm() if some else mean for some, mean in zip(members, means, strict=True)]
    return torch.stack(means)


@pytest.mark.parametrize("number", [200, 10])  # more tokens than features, and fewer
@pytest.mark.parametrize("with_statistics", [True, False])
def test_encoder_rows_point_where_inputs_are(with_statistics, number):
    clt = make_clt("relu", with_statistics)
    before = {name: value.clone() for name, value in clt.state_dict().items()}
    inputs = rows_with_offset(number, 100.0)
    for s in range(L):
        set_encoder_directions(clt, s, inputs[:, s])
    x = clt.normalize_inputs(inputs).double()
    x = torch.nn.functional.normalize(x - x.mean(dim=0), dim=-1)
    for s, encoder in enumerate(clt.encoders):
        old, row = before[f"encoders.{s}.weight"].double(), encoder.weight.double()
        torch.testing.assert_close(row.norm(dim=1), old.norm(dim=1))
        cosines = torch.nn.functional.normalize(row, dim=1) @ x[:, s].T
        assert (cosines.max(dim=1).values > 0.98).all() == (number < len(row))  # else they are means of several
        assert len(torch.unique(row, dim=0)) == len(row)
        lengths, means = old.norm(dim=1, keepdim=True), plain_spherical_means(x[:, s], len(row))
        expected = lengths * torch.nn.functional.normalize(means * lengths + old / 10, dim=1)
        # In float32, of which inputs 100 deviations from 0 leave 1e-5.
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    for name, value in clt.state_dict().items():
        assert torch.equal(value, before[name]) is not (name.startswith("encoders.") and name.endswith(".weight"))


@pytest.mark.parametrize("reach", [None, 2])
@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_decoder_rows_are_regressions(activation_fn, reach):
    clt = make_clt(activation_fn, k=4, decoder_reach=reach).double()
    inputs, labels = rows_with_offset(200, 4.0).double(), rows_with_offset(200, 1.0, seed=1).double()
    with torch.no_grad():
        clt.encoders[1].bias[3] = -1e3  # fires nowhere
        clt.train()
        acts = clt.encode(inputs)
    before = {name: value.clone() for name, value in clt.state_dict().items()}
    clt.eval()
    set_decoder_directions(clt, inputs, labels)
    assert not clt.training
    y = clt.normalize_targets(labels)
    slopes = torch.einsum("nsf,ntd->sftd", acts, y) / (1 + acts.square().sum(dim=0)[..., None, None])
    for s, decoder in enumerate(clt.decoders):
        targets = slice(s, s + decoder.weight.shape[1])
        silent = acts[:, s].sum(dim=0) == 0
        slopes[s][silent, targets] = before[f"decoders.{s}.weight"][silent]
        slopes[s, :, : targets.start] = slopes[s, :, targets.stop :] = 0
    written = torch.einsum("nsf,sftd->ntd", acts, slopes)
    scale = (written * y).sum(dim=(0, 2)) / written.square().sum(dim=(0, 2))
    for s, decoder in enumerate(clt.decoders):
        targets = slice(s, s + decoder.weight.shape[1])
        torch.testing.assert_close(decoder.weight, slopes[s, :, targets] * scale[targets, None])
    for name, value in clt.state_dict().items():
        is_set = name.startswith("decoders.") and name.endswith(".weight")
        assert torch.equal(value, before[name]) is not is_set or name.startswith("thresholds.")
    if activation_fn == "batchtopk":
        assert all(threshold().isinf() for threshold in clt.thresholds)
    error = (clt.train().normalize_targets(clt(inputs).reconstruction) - y).square().sum(dim=(0, 2))
    assert (error < y.square().sum(dim=(0, 2))).all()  # better than nothing, in each layer


@pytest.mark.parametrize("tying", ["per_source", "per_target"])
def test_tied_decoders_stay_as_they_are(tying):
    clt = make_clt(decoder_tying=tying)
    before = [decoder.weight.clone() for decoder in clt.decoders]
    set_decoder_directions(clt, rows_with_offset(20, 1.0), rows_with_offset(20, 1.0))
    assert all(map(torch.equal, before, [decoder.weight for decoder in clt.decoders]))


def test_output_bias_is_the_mean_of_the_targets():
    clt = make_clt(with_statistics=False)
    labels = rows_with_offset(200, 100.0)
    set_output_bias(clt, labels)
    nothing = clt.decode(torch.zeros(1, L, 24))[0]
    torch.testing.assert_close(nothing.double(), labels.double().mean(dim=0), rtol=1e-5, atol=1e-5)
