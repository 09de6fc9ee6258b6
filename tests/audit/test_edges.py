"""Edges against the language model: what the block predicts and measures, against plain formulas and plain hooks."""

from dataclasses import replace

import pytest
import torch

from hf_clt.attribution.frozen import freeze
from hf_clt.audit.edges import ablated, edges, over_all_paths, pre_activation_changes, predicted_reads
from hf_clt.audit.graphs import graph_of
from hf_clt.audit.live import respond, written_by
from tests.attribution.autograd_reference import double_throughout
from tests.attribution.test_graph import random_graph
from tests.audit.exact import make_exact, make_shuffled


HOOKS = ("mlp.hook_in", "mlp.hook_out")


def test_influence_and_effect_are_sums_over_all_paths():
    graph, sources = random_graph(), torch.tensor([0, 3, 9])
    graph.activations = torch.linspace(1, 2, graph.num_features, dtype=torch.float64)
    n = graph.num_features
    sums = (graph.edges.abs().sum(dim=1) + graph.dropped).clamp_min(1e-10)
    share, effect = graph.edges[:n, :n].abs() / sums[:n, None], graph.edges[:n, :n] / graph.activations
    wanted = [sum(torch.linalg.matrix_power(steps, k) for k in range(1, 6)) for steps in (share, effect)]
    found = over_all_paths(graph, sources)
    torch.testing.assert_close(found[0], wanted[0][:, sources])
    torch.testing.assert_close(found[1], wanted[1][:, sources] * graph.activations[sources])


def test_the_local_replacement_model_does_what_the_graph_says_of_small_changes():
    """In float64, and so small that no feature begins or ends."""
    clt, given = make_shuffled()
    with double_throughout():
        graph = graph_of(clt, given, given.prompts[0])
        frozen = freeze(given.model, graph.input_ids, *HOOKS, dtype=torch.float64)
    sources = torch.arange(0, graph.num_features, 40)
    written = -1e-6 * written_by(clt, graph, torch.nn.functional.one_hot(sources, graph.num_features))
    reads, own = predicted_reads(clt, frozen, [0], written)
    found = pre_activation_changes(clt, graph, reads)
    _, effect = over_all_paths(graph, sources)
    assert effect.abs().max() > 1e-3
    torch.testing.assert_close(found, -1e-6 * effect, rtol=1e-5, atol=1e-14)
    # what is written, and the residual stream passes on, through the frozen norm
    block = frozen.blocks[2]
    passed = block.read_norm.linear(written[:, :2].sum(dim=1))
    torch.testing.assert_close(own[2], passed)


def test_the_model_responds_as_with_plain_hooks():
    clt, given = make_exact()
    graph = graph_of(clt, given, given.prompts[1])
    sources = torch.tensor([0, 7, 50])
    written = written_by(clt, graph, torch.nn.functional.one_hot(sources, graph.num_features))
    reads, log_p = respond(given.model, clt, graph.input_ids, -written)
    _, held = respond(given.model, clt, graph.input_ids, written, held=True)
    blocks = given.model.transformer.h
    for k, (layer, position, feature) in enumerate(graph.features[sources].tolist()):
        row = graph.activations[sources[k]] * blocks[layer].mlp.c_proj.weight[feature]
        torch.testing.assert_close(written[k, layer, position], row)
        assert (written[k] != 0).any(dim=-1).sum() == 1
        for is_held, probabilities in ((False, log_p), (True, held)):
            seen, handles = {}, []
            for number, block in enumerate(blocks):

                def change(module, args, output, number=number, is_held=is_held, seen=seen, k=k):
                    seen[number] = args[0]
                    new = torch.zeros_like(output) if is_held else output.clone()
                    return new + (written[k, number] if is_held else -written[k, number])

                handles.append(block.mlp.register_forward_hook(change))
            logits = given.model(input_ids=graph.input_ids[None]).logits[0, -1]
            for handle in handles:
                handle.remove()
            torch.testing.assert_close(probabilities[k], logits.log_softmax(0), rtol=1e-6, atol=1e-7)
            for number in range(3) if not is_held else ():
                torch.testing.assert_close(reads[number][k], seen[number][0], rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def found():
    made = [make_exact(), make_shuffled()]
    return [edges(clt, replace(given, prompts=given.prompts[:3])) for clt, given in made]


def test_a_clt_that_is_right_predicts_and_one_that_is_not_does_not(found):
    right, wrong = found
    assert right["frozen_error"]["value"] < 1e-4
    for name in ("feature_spearman_effect", "feature_spearman", "logit_spearman"):
        assert right[name]["interval"][0] > right["feature_spearman_random"]["interval"][1]
    # Direct edges are right of any CLT, so that rank correlations tell little; what features respond with does. One
    # layer on only attention has responded, two layers on MLPs as well.
    assert list(right["response_cosine"]) == ["1", "2"]
    assert right["response_cosine"]["2"]["interval"][0] > wrong["response_cosine"]["2"]["interval"][1]
    assert right["response_error"]["2"]["interval"][1] < wrong["response_error"]["2"]["interval"][0]


def test_figures_of_perturbations_are_those_of_each_source():
    clt, given = make_shuffled()
    graph = graph_of(clt, given, given.prompts[2])
    layers, n = graph.features[:, 0], graph.num_features
    sources = torch.tensor([int((layers == 0).nonzero()[4]), int((layers == 2).nonzero()[4])])
    correlations, figures = ablated(clt, given, graph, sources, torch.Generator())
    assert correlations["feature_spearman"] > 0.2
    written = -written_by(clt, graph, torch.nn.functional.one_hot(sources, n))
    frozen = freeze(given.model, graph.input_ids, *HOOKS, dtype=torch.float64)
    expected, own = predicted_reads(clt, frozen, [0], written)
    before, _ = respond(given.model, clt, graph.input_ids, torch.zeros_like(written))
    after, _ = respond(given.model, clt, graph.input_ids, written)
    for distance in (1, 2):
        wanted, found = expected[distance][0], after[distance][0] - before[distance][0]
        for name, left, right in (
            ("perturbation", wanted, found),
            ("response", wanted - own[distance][0], found - own[distance][0]),
        ):
            cosine = torch.cosine_similarity(left.flatten(), right.flatten(), dim=0).item()
            error = ((left - right).square().sum() / right.square().sum()).sqrt().item()
            assert figures[f"{name}_cosine"][0, distance - 1].item() == pytest.approx(cosine, rel=1e-4)
            assert figures[f"{name}_error"][0, distance - 1].item() == pytest.approx(error, rel=1e-4)
    assert figures["response_cosine"][0, 2:].isnan().all() and figures["response_cosine"][1].isnan().all()
