import json
import math

import numpy as np
import pytest
import torch

from hf_clt.evaluation import MetricSums
from hf_clt.files import as_json
from hf_clt.hub.report import format_metrics_table


def random_batch(num_tokens=240, num_layers=3, d_model=5, num_features=7, offset=1e4, seed=0):
    """Targets with a mean far above their spread, a reconstruction with a known amount of noise, and sparse
    activations."""
    generator = torch.Generator().manual_seed(seed)
    means = offset * torch.randn(num_layers, d_model, generator=generator)
    labels = means + torch.randn(num_tokens, num_layers, d_model, generator=generator)
    noise = torch.tensor([0.1, 0.5, 0.9])[:num_layers, None]
    reconstruction = labels + noise * torch.randn(num_tokens, num_layers, d_model, generator=generator)
    acts = torch.randn(num_tokens, num_layers, num_features, generator=generator)
    acts = torch.where(acts > 1, acts, 0.0)
    acts[:, 1, 2] = 0  # one feature of layer 1 is dead
    return labels, reconstruction, acts


def reference(labels, reconstruction, acts):
    """The same metrics written as docs/concepts.md has them, in numpy, over all tokens at once."""
    y, y_hat, a = (tensor.double().numpy() for tensor in (labels, reconstruction, acts))
    centred = y - y.mean(axis=0)
    nmse = ((y - y_hat) ** 2).sum(axis=(0, 2)) / (centred**2).sum(axis=(0, 2))
    share = (a > 0).mean(axis=0)
    return {"nmse": nmse, "l0": share.sum(axis=1), "dead": (share == 0).mean(axis=1), "share": share}


def fill(sums, labels, reconstruction, acts, batch_size):
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        sums.update(labels[part], reconstruction[part], acts[part])
    return sums


def test_nmse_of_the_hand_computed_case():
    sums = MetricSums(1, 2, 1)
    labels = torch.tensor([[[0.0, 0.0]], [[2.0, 4.0]]])
    reconstruction = torch.tensor([[[1.0, 1.0]], [[1.0, 3.0]]])
    sums.update(labels, reconstruction, torch.zeros(2, 1, 1))
    metrics = sums.compute()
    assert metrics["nmse"] == pytest.approx(0.4, abs=1e-15)  # 4 / (2 · (1 + 4))
    assert metrics["explained_variance"] == pytest.approx(0.6, abs=1e-15)


def test_features_by_hand():
    acts = torch.zeros(4, 2, 3)
    acts[0, 0, 0] = acts[1, 0, 0] = acts[2, 0, 0] = acts[3, 0, 0] = 1.0  # on every token
    acts[0, 0, 1] = 2.0  # on a quarter of the tokens
    acts[1, 1, 2] = acts[2, 1, 2] = 0.5  # on half of them
    acts[3, 1, 1] = -1.0  # a negative activation does not count as active
    labels = torch.arange(8.0).reshape(4, 2, 1)
    sums = MetricSums(2, 1, 3)
    sums.update(labels, labels, acts)
    metrics = sums.compute()
    assert metrics["l0_per_layer"] == [1.25, 0.5]
    assert metrics["l0"] == 1.75
    assert metrics["dead_fraction_per_layer"] == pytest.approx([1 / 3, 2 / 3])
    assert metrics["dead_fraction"] == pytest.approx(0.5)
    assert metrics["num_tokens"] == 4
    edges, counts = metrics["feature_density"]["bin_edges"], metrics["feature_density"]["counts"]
    assert len(edges) == len(counts) + 1 and (edges[0], edges[-1]) == (-10, 0)
    expected = [0] * len(counts)
    for share in (1.0, 0.25, 0.5):
        expected[min(int((math.log10(share) + 10) / 0.25), len(counts) - 1)] += 1
    expected[0] += 3  # the features that are never active, at the floor
    assert counts == expected


@pytest.mark.parametrize("batch_size", [1, 7, 240])
def test_equals_the_float64_reference_at_any_batch_size(batch_size):
    batch = random_batch()
    metrics = fill(MetricSums(3, 5, 7), *batch, batch_size).compute()
    expected = reference(*batch)
    assert metrics["nmse_per_layer"] == pytest.approx(expected["nmse"], rel=1e-9)
    assert metrics["nmse"] == pytest.approx(expected["nmse"].mean(), rel=1e-9)
    assert metrics["explained_variance_per_layer"] == pytest.approx(1 - expected["nmse"], rel=1e-9)
    assert metrics["l0_per_layer"] == pytest.approx(expected["l0"], rel=1e-12)
    assert metrics["dead_fraction_per_layer"] == pytest.approx(expected["dead"], rel=1e-12)
    density = np.histogram(
        np.log10(np.maximum(expected["share"], 1e-10)), bins=metrics["feature_density"]["bin_edges"]
    )
    assert metrics["feature_density"]["counts"] == density[0].tolist()


def test_three_unequal_parts_merge_to_the_whole():
    labels, reconstruction, acts = random_batch()
    whole = fill(MetricSums(3, 5, 7), labels, reconstruction, acts, 32)
    parts = []
    for start, stop in ((0, 17), (17, 200), (200, 240)):
        part = slice(start, stop)
        parts.append(fill(MetricSums(3, 5, 7), labels[part], reconstruction[part], acts[part], 32).tensors())
    merged = MetricSums.from_gathered(parts)
    assert merged.compute()["nmse_per_layer"] == pytest.approx(whole.compute()["nmse_per_layer"], rel=1e-12)
    assert merged.compute()["feature_density"] == whole.compute()["feature_density"]
    assert merged.compute()["num_tokens"] == 240
    empty = MetricSums(3, 5, 7).tensors()  # a process without a token changes nothing, wherever it stands
    with_empty = MetricSums.from_gathered([empty, *parts, empty])
    assert with_empty.compute() == merged.compute()


def test_state_moves_to_another_object():
    labels, reconstruction, acts = random_batch()
    first = fill(MetricSums(3, 5, 7), labels[:100], reconstruction[:100], acts[:100], 50)
    before = first.compute()
    second = MetricSums.from_gathered([first.tensors()])
    fill(second, labels[100:], reconstruction[100:], acts[100:], 50)
    expected = reference(labels, reconstruction, acts)["nmse"]
    assert second.compute()["nmse_per_layer"] == pytest.approx(expected, rel=1e-9)
    assert first.compute() == before  # a copy, not a view


def test_sparse_features_count_like_dense_ones():
    labels, reconstruction, acts = random_batch()

    class Sparse:
        def active_counts(self):
            return (acts != 0).sum(0)

    dense, sparse = MetricSums(3, 5, 7), MetricSums(3, 5, 7)
    dense.update(labels, reconstruction, acts)
    sparse.update(labels, reconstruction, Sparse())
    assert dense.compute() == sparse.compute()


def test_bfloat16_batches_are_summed_in_float64():
    labels, reconstruction, acts = (tensor.bfloat16() for tensor in random_batch(offset=3.0))
    metrics = fill(MetricSums(3, 5, 7), labels, reconstruction, acts, 16).compute()
    assert metrics["nmse_per_layer"] == pytest.approx(reference(labels, reconstruction, acts)["nmse"], rel=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, 300.0])
@pytest.mark.parametrize("off", [0.0, 1.0])
def test_a_layer_whose_targets_do_not_vary_has_no_nmse_and_is_left_out_of_the_means(constant, off):
    labels = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0))
    labels[:, 1] = constant * (1 + 1e-7 * labels[:, 1])  # rounding
    sums, others = MetricSums(3, 2, 1), MetricSums(2, 2, 1)
    sums.update(labels, labels * 0.5 + off, torch.zeros(50, 3, 1))
    others.update(labels[:, [0, 2]], labels[:, [0, 2]] * 0.5 + off, torch.zeros(50, 2, 1))
    metrics, expected = sums.compute(), others.compute()
    assert metrics["layers_without_nmse"] == [1] and "layers_without_nmse" not in expected
    for name in ("nmse", "explained_variance"):
        assert metrics[name] == expected[name]
        assert metrics[f"{name}_per_layer"][1] is None
        assert [metrics[f"{name}_per_layer"][layer] for layer in (0, 2)] == expected[f"{name}_per_layer"]
    table = format_metrics_table(metrics).splitlines()
    assert table[3].split()[1] == "-" and "no value in layer 1" in table[-1]


def test_no_layer_has_an_nmse_where_no_target_varies():
    sums = MetricSums(2, 2, 1)
    sums.update(torch.zeros(5, 2, 2), torch.ones(5, 2, 2), torch.zeros(5, 2, 1))
    metrics = sums.compute()
    assert metrics["nmse"] is None and metrics["nmse_per_layer"] == [None, None]
    assert "-" in format_metrics_table(metrics) and json.loads(as_json(metrics))["nmse"] is None


def test_bad_input_is_refused():
    sums = MetricSums(2, 3, 4)
    good = torch.zeros(5, 2, 3)
    acts = torch.zeros(5, 2, 4)
    with pytest.raises(ValueError, match=r"eval_tokens"):
        sums.compute()
    with pytest.raises(ValueError, match=r"labels .*\(N, 2, 3\).*\(5, 3, 2\)"):
        sums.update(good.transpose(1, 2), good, acts)
    with pytest.raises(ValueError, match="same tokens"):
        sums.update(good, good[:4], acts)
    with pytest.raises(ValueError, match=r"acts .*shape"):
        sums.update(good, good, acts[:4])
    with pytest.raises(ValueError, match="same CLT"):
        sums.merge(MetricSums(2, 3, 5))
    with pytest.raises(ValueError, match="need the tensors"):
        MetricSums.from_gathered([{"count": torch.zeros(())}])
    with pytest.raises(ValueError, match=r"same layers .*'squared_error': \(3,\)"):
        MetricSums.from_gathered([{**sums.tensors(), "squared_error": torch.zeros(3)}])
    with pytest.raises(ValueError, match="at least one process"):
        MetricSums.from_gathered([])
    sums.update(good[:0], good[:0], acts[:0])  # an empty batch is no error, and no token
    assert int(sums.count) == 0
