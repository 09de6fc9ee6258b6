"""The parts of the streaming pass over text, each against a plain loop."""

import numpy as np
import pytest
import torch

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.features.examples import (
    HISTOGRAM_BINS,
    ExampleSettings,
    LayerActivity,
    add_to_histogram,
    add_tokens,
    sample_keys,
)
from hf_clt.features.links import logit_extremes, strongest_links
from hf_clt.sparsity import sparse_from_dense


def sparse(acts):
    """`LayerFeatures` of (N, F)."""
    return sparse_from_dense(acts[:, None]).layers[0]


@pytest.fixture
def counted():
    """Which of 5 blocks of 7 positions count: never the first; one block has none at all."""
    torch.manual_seed(1)
    counted = torch.rand(5, 7) < 0.8
    counted[:, 0] = False
    counted[3] = False
    return counted


@pytest.fixture
def acts(counted):
    """Activations (N, 6) of the tokens that count, with ties: small multiples of 1/4, half of them 0."""
    torch.manual_seed(2)
    acts = torch.randint(1, 6, (int(counted.sum()), 6)) / 4
    acts[torch.rand(acts.shape) < 0.5] = 0
    acts[:, 2] = 0
    return acts


def test_histogram_is_that_of_the_final_bins_whatever_the_order():
    torch.manual_seed(3)
    values = torch.cat([torch.rand(400) * 1e-3, torch.rand(400) * 30, torch.tensor([2.0, 4.0, 31.999])])
    values = values[torch.randperm(len(values))]
    indices = torch.randint(0, 3, values.shape)
    indices[values > 1] = 0  # feature 1 and 2 stay small
    histogram, exponents = torch.zeros(4, HISTOGRAM_BINS, dtype=torch.int64), torch.full((4,), -126)
    for part in torch.arange(len(values)).split(50):
        add_to_histogram(histogram, exponents, indices[part], values[part])
    for feature in range(3):
        own = values[indices == feature].double().numpy()
        upper = 2.0 ** int(exponents[feature])
        assert upper / 2 <= own.max() < upper
        edges = np.linspace(0, upper, HISTOGRAM_BINS + 1)
        assert histogram[feature].tolist() == np.histogram(own, edges)[0].tolist()
    assert histogram[3].sum() == 0 and exponents[3] == -126


def test_sample_keys_are_uniform_and_each_their_own():
    keys = sample_keys(7, 3, 500, torch.arange(40, 240))
    assert keys.shape == (500, 200) and keys.min() >= 0 and keys.max() < 1
    assert len(keys.unique()) == keys.numel()
    for mean in (keys.mean(), *keys.mean(dim=0), *keys.mean(dim=1)):
        assert abs(mean - 0.5) < 0.1
    assert torch.equal(sample_keys(7, 3, 20, torch.arange(60, 70)), keys[:20, 20:30])  # whatever is asked for beside
    for other in (sample_keys(8, 3, 500, torch.arange(40, 240)), sample_keys(7, 4, 500, torch.arange(40, 240))):
        assert abs(np.corrcoef(other.flatten(), keys.flatten())[0, 1]) < 0.02


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_a_layer_is_the_same_however_its_blocks_come(acts, counted, at_a_time):
    settings = ExampleSettings(top=3, quantiles=2, per_quantile=1, before=1, after=2, seed=5)
    activity = LayerActivity(6, settings)
    starts = [0, *counted.sum(dim=1).cumsum(0).tolist()]
    for first in range(0, 5, at_a_time):
        last = min(5, first + at_a_time)
        features = sparse(acts[starts[first] : starts[last]])
        add_tokens(activity, 1, features, counted[first:last], 100 + first, settings)

    dense = torch.zeros(5, 7, 6)
    dense[counted] = acts
    keys = sample_keys(5, 1, 6, torch.arange(100, 105))
    assert torch.equal(activity.counts, (acts > 0).sum(dim=0))
    assert torch.equal(activity.largest, acts.amax(dim=0))
    for feature in range(6):
        above = acts[:, feature][acts[:, feature] > 0].tolist()
        assert activity.smallest[feature] == min(above, default=float("inf"))
        blocks = [b for b in range(5) if dense[b, :, feature].max() > 0]
        by_peak = sorted(blocks, key=lambda b: -dense[b, :, feature].max())
        by_key = sorted(blocks, key=lambda b: -keys[feature, b])
        for kept, best in ((activity.top, by_peak[:3]), (activity.sample, by_key[:2])):
            places, peaks, windows = [], [], []
            for b in best:
                row = dense[b, :, feature].tolist()
                at = row.index(max(row))
                places.append((100 + b) * 7 + at)
                peaks.append(max(row))
                windows.append([row[p] if 0 <= p < 7 else 0.0 for p in range(at - 1, at + 3)])
            missing = kept.keys.shape[1] - len(best)
            assert kept.places[feature].tolist() == places + [-1] * missing
            assert kept.peaks[feature].tolist() == peaks + [0.0] * missing
            assert kept.windows[feature].tolist() == windows + [[0.0] * 4] * missing


def test_settings_that_cannot_be_are_refused():
    for name, value in (
        ("top", 0),
        ("quantiles", 0),
        ("per_quantile", -1),
        ("before", -1),
        ("after", -3),
        ("seed", -1),
    ):
        with pytest.raises(ValueError, match=rf"{name}={value} "):
            ExampleSettings(**{name: value})


# -- what follows from the weights alone ------------------------------------------------------------------------------


def clt_of(reach, tying="none", statistics=False):
    torch.manual_seed(4)
    config = CLTConfig(
        num_layers=4, d_model=5, num_features=7, activation_fn="relu", decoder_reach=reach, decoder_tying=tying
    )
    clt = CrossLayerTranscoder(config).eval()
    if statistics:
        clt.set_normalization(*(torch.rand(4, 5) + 0.5 for _ in range(4)))
    return clt


@pytest.mark.parametrize("block_entries", [1, 20, 2**24])
def test_logits_are_the_extremes_of_the_unembedded_decoder_rows(block_entries, monkeypatch):
    monkeypatch.setattr("hf_clt.features.links.BLOCK_ENTRIES", block_entries)
    torch.manual_seed(5)
    decoder, unembedding = torch.randn(7, 3, 5), torch.randn(11, 5)
    top_ids, top, bottom_ids, bottom = logit_extremes(decoder, unembedding, 4)
    for feature in range(7):
        logits = sum(unembedding @ decoder[feature, target] for target in range(3)).tolist()
        order = sorted(range(11), key=lambda token: logits[token])
        assert bottom_ids[feature].tolist() == order[:4] and top_ids[feature].tolist() == order[:-5:-1]
        assert top[feature].tolist() == pytest.approx([logits[token] for token in order[:-5:-1]], rel=1e-5)
        assert bottom[feature].tolist() == pytest.approx([logits[token] for token in order[:4]], rel=1e-5)
    assert logit_extremes(decoder, unembedding, 50)[0].shape == (7, 11)


@pytest.mark.parametrize("block_entries", [1, 20, 2**24])
@pytest.mark.parametrize(
    "reach, tying, statistics",
    [(4, "none", False), (2, "none", True), (1, "none", False), (3, "per_target", False), (4, "per_source", False)],
)
def test_links_are_the_strongest_of_all_pairs(reach, tying, statistics, block_entries, monkeypatch):
    monkeypatch.setattr("hf_clt.features.links.BLOCK_ENTRIES", block_entries)
    clt = clt_of(reach, tying, statistics)
    active = torch.ones(4, 7, dtype=torch.bool)
    active[2, 3] = active[0, 0] = False
    feeds, reads = strongest_links(clt, active, 6)
    released = [clt.released_layer(layer) for layer in range(4)]
    weights = {}
    for s in range(4):
        for u in range(s + 1, 4):
            for f in range(7):
                for g in range(7):
                    targets = [t for t in range(s, u) if t - s < reach]
                    rows = [released[s][f"W_dec_{s}"][f, t - s] @ released[u][f"W_enc_{u}"][g] for t in targets]
                    weights[s, f, u, g] = float(sum(rows)) if active[s, f] and active[u, g] else 0.0
    for layer in range(4):
        for feature in range(7):
            outgoing = [(u, g, w) for (s, f, u, g), w in weights.items() if (s, f) == (layer, feature) and w]
            incoming = [(s, f, w) for (s, f, u, g), w in weights.items() if (u, g) == (layer, feature) and w]
            for links, expected in ((feeds, outgoing), (reads, incoming)):
                found = links.of(layer, feature)
                expected = sorted(expected, key=lambda link: -abs(link[2]))[:6]
                assert [link[:2] for link in found] == [link[:2] for link in expected]
                assert [link[2] for link in found] == pytest.approx([link[2] for link in expected], rel=1e-4)
    assert feeds.of(0, 0) == [] and reads.of(2, 3) == [] and feeds.of(3, 1) == [] and reads.of(0, 1) == []


def test_a_virtual_weight_is_how_a_feature_moves_a_later_pre_activation():
    """Along the residual stream alone: add to what each layer reads what the features below have written."""
    clt = clt_of(4)
    with torch.no_grad():
        for encoder in clt.encoders:
            encoder.bias.fill_(100.0)  # so that every feature is active, and pre-activations are activations
        feeds, _ = strongest_links(clt, torch.ones(4, 7, dtype=torch.bool), 21)
        acts = torch.zeros(1, 4, 7)
        acts[0, 0, 2] = 1.5
        written = clt.decode(acts) - clt.decode(torch.zeros(1, 4, 7))
        stream = written.cumsum(dim=1) - written  # at layer u: what layers below u have written
        moved = (clt.encode(stream) - clt.encode(torch.zeros(1, 4, 5)))[0]
    links = feeds.of(0, 2)
    assert len(links) == 21
    for layer, feature, weight in links:
        assert moved[layer, feature].item() == pytest.approx(1.5 * weight, abs=2e-5)
