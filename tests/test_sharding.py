"""
Slices of a CLT in one process: which rows they have, what they refuse, and metrics put together from them. What needs
several processes is in tests/distributed.
"""

import pytest
import torch

from hf_clt import CLTConfig, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.evaluation.metrics import MetricSums
from hf_clt.sharding import (
    FeatureShard,
    any_over,
    collect_rows,
    gather_candidates,
    gather_tokens,
    min_over,
    rows_of,
    sum_over,
)
from hf_clt.training.setup import check_shard, make_layout


def test_without_a_shard_nothing_is_exchanged():
    tensor = torch.rand(3, 4)
    assert sum_over(None, tensor) is tensor
    assert min_over(None, tensor) is tensor
    assert gather_candidates(None, tensor) == (tensor, slice(0, 4))
    assert gather_tokens(None, {"inputs": tensor})["inputs"] is tensor
    assert collect_rows(None, tensor) is tensor
    assert any_over(None, True, tensor.device) and not any_over(None, False, tensor.device)
    assert rows_of(None, 12) == slice(0, 12)


def test_slices_cover_the_features():
    assert [FeatureShard(rank, 3).rows(12) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(ValueError, match=r"num_features=10.*feature_parallel_size=3"):
        FeatureShard(0, 3).rows(10)
    with pytest.raises(ValueError, match="num_features=10 "):
        check_shard(CLTConfig(num_layers=2, d_model=4, num_features=10, k=2), 3, None)


def test_a_whole_clt_is_not_trained_in_slices():
    clt = CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=4, num_features=8, k=2))
    with pytest.raises(ValueError, match=r"feature_parallel_size=2.*1/1"):
        check_shard(clt.config, 2, clt)


def test_the_number_of_processes_is_a_multiple():
    class One:
        process_index, num_processes = 0, 1

    with pytest.raises(ValueError, match=r"feature_parallel_size=2.* 1"):
        make_layout(One, 2)
    assert make_layout(One, 1).shard is None


def test_half_precision_that_needs_scaled_gradients_is_refused():
    with pytest.raises(ValueError, match=r"mixed_precision='fp16'.*feature_parallel_size=2"):
        CLTTrainingArguments(mixed_precision="fp16", feature_parallel_size=2)


def test_what_a_slice_cannot_do_says_so(tmp_path):
    config = CLTConfig(num_layers=2, d_model=4, num_features=8, k=2)
    CrossLayerTranscoder(config).save_pretrained(tmp_path)
    clt = CrossLayerTranscoder.from_pretrained(tmp_path, shard=FeatureShard(1, 2))
    assert clt.num_held == 4
    with pytest.raises(ValueError, match=r"inputs.*gradient"):
        clt(torch.zeros(3, 2, 4, requires_grad=True))
    with pytest.raises(ValueError, match=r"push_to_hub.*shard"):
        clt.push_to_hub("user/clt")
    with pytest.raises(ValueError, match=r"lazy.*shard"):
        CrossLayerTranscoder.from_pretrained(tmp_path, shard=FeatureShard(0, 2), lazy=True)


def test_metrics_of_slices_are_put_together():
    labels, reconstruction = torch.rand(2, 10, 2, 3).unbind()
    acts = torch.rand(10, 2, 8) - 0.5
    parts = []
    for tokens in (slice(0, 6), slice(6, 10)):
        for features in (slice(0, 4), slice(4, 8)):
            sums = MetricSums(2, 3, 4)
            sums.update(labels[tokens], reconstruction[tokens], acts[tokens][..., features])
            parts.append(sums.tensors())
    found = MetricSums.from_gathered(MetricSums.with_joined_features(parts, 2)).compute()
    whole = MetricSums(2, 3, 8)
    whole.update(labels, reconstruction, acts)
    expected = whole.compute()
    assert found["num_tokens"] == 10 and found["feature_density"] == expected["feature_density"]
    for name in ("nmse", "l0", "dead_fraction", "nmse_per_layer", "l0_per_layer"):
        assert found[name] == pytest.approx(expected[name])
