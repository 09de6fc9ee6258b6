"""What graphs say by themselves: paths against their enumeration, and a CLT that is right against one that is not."""

from dataclasses import replace

import pytest
import torch

from hf_clt.attribution import TokenTarget
from hf_clt.audit.graphs import graph_of, graphs, influence_by_length
from hf_clt.audit.prompts import PARAPHRASES, PROMPTS, QUICK
from hf_clt.audit.samples import BlockSkipped
from tests.attribution.test_graph import random_graph
from tests.audit.exact import make_exact, make_shuffled


def paths_from(weights: torch.Tensor, node: int, num_features: int, length: int = 1):
    """(length, end, share) of each path from a row to a column that is no feature, one edge at a time."""
    for column in weights[node].nonzero().squeeze(1).tolist():
        share = weights[node, column].item()
        if column >= num_features:
            yield length, column, share
        else:
            for steps, end, rest in paths_from(weights, column, num_features, length + 1):
                yield steps, end, share * rest


@pytest.mark.parametrize("seed", [0, 1])
def test_influence_by_length_is_that_of_each_path(seed):
    graph = random_graph(seed)
    sums = graph.edges.abs().sum(dim=1) + graph.dropped
    weights, n = graph.edges.abs() / sums.clamp_min(1e-10)[:, None], graph.num_features
    wanted = torch.zeros(4, 2, dtype=torch.float64)
    for target, weight in enumerate(graph.target_weights.tolist()):
        for length, end, share in paths_from(weights, n + target, n):
            wanted[length - 1, int(end < graph.first_token)] += weight * share
    found = influence_by_length(graph)
    torch.testing.assert_close(found, wanted[: len(found)])
    assert wanted[len(found) :].abs().max() == 0 if len(found) < 4 else True
    ends = graph.influence()[graph.first_error : graph.first_target]
    assert found.sum().item() == pytest.approx(ends.sum().item())


def test_a_clt_that_is_right_scores_better_than_its_decoders_shuffled():
    right, wrong = (graphs(*made()) for made in (make_exact, make_shuffled))
    assert right["replacement"]["value"] == pytest.approx(1, abs=1e-6)
    assert right["completeness"]["value"] == pytest.approx(1, abs=1e-6)
    for name in ("replacement", "completeness", "replacement_pruned", "completeness_pruned"):
        assert wrong[name]["interval"][1] < right[name]["interval"][0]
    assert right["influence_by_length"]["1"]["value"] < wrong["influence_by_length"]["1"]["value"]
    lengths = right["influence_by_length"]
    assert list(lengths) == ["1", "2", "3", "4", "5", "6", "7", "8+"]
    assert sum(found["value"] for found in lengths.values()) == pytest.approx(1)
    assert sum(int(n[0]) * found["value"] for n, found in lengths.items()) == pytest.approx(
        right["path_length"]["value"]
    )


def test_a_graph_is_made_once_for_each_clt_model_and_target():
    clt, given = make_exact()
    graph = graph_of(clt, given, given.prompts[0])
    assert graph_of(clt, given, given.prompts[0]) is graph
    assert graph_of(clt, given, given.prompts[0], [TokenTarget(3)]) is not graph
    other, also_given = make_shuffled()
    assert graph_of(other, given, given.prompts[0]) is not graph
    assert graph_of(clt, also_given, given.prompts[0]) is not graph


def test_a_clt_of_which_nothing_is_active_is_skipped():
    clt, given = make_exact()
    for encoder in clt.encoders:
        encoder.bias -= 1e6
    with pytest.raises(BlockSkipped, match="no feature is active on any of 1 prompts"):
        graphs(clt, replace(given, prompts=given.prompts[:1]))


def test_the_prompts_are_many_and_short():
    assert len(set(PROMPTS)) == len(PROMPTS) >= 60 and QUICK == 24
    assert max(len(prompt.split()) for prompt in PROMPTS) <= 13
    assert set(PARAPHRASES) <= set(PROMPTS[:QUICK]) and not set(PARAPHRASES.values()) & set(PROMPTS)
