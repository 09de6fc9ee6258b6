"""Graphs against the language model itself: frozen, where edges are exact, and live, beside plain hooks."""

import pytest
import torch

from hf_clt.attribution import FeatureTarget, TokenTarget, attribute
from hf_clt.attribution.verify import spearman, total_effects
from tests.attribution.cases import make_model, prompt
from tests.reference import random_clt


TARGETS = [3, TokenTarget(5, minus=6), FeatureTarget(2, 8, 3)]
HOOKS = [("hook_resid_mid", "hook_mlp_out"), ("mlp.hook_in", "mlp.hook_out")]


def make(name, hooks=HOOKS[0], cleared=(0,), targets=TARGETS, **fields):
    model = make_model(name)
    shape = {"num_layers": model.config.num_hidden_layers, "d_model": model.config.hidden_size, "num_features": 20}
    clt = random_clt(feature_input_hook=hooks[0], feature_output_hook=hooks[1], **shape, **fields)
    with torch.no_grad():
        for decoder in clt.decoders:
            decoder.weight *= 0.05
    return model, clt, attribute(model, clt, prompt(), targets=targets, dtype=torch.float64, cleared=cleared)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "phi"])
def test_frozen_every_target_moves_by_its_edges(name, hooks, skip):
    """In float32 inside the models' norms; a skip connection is a path, but not where there are no nodes."""
    model, clt, graph = make(name, hooks, cleared=(0, 2), skip_connection=skip)
    groups = [[tuple(feature) for feature in graph.features[[3, 17, 40]].tolist()]]
    found = graph.verify(model, clt, 12, groups=groups)
    assert found["frozen_error"] < 1e-5 and found["count"] == 12
    assert -1 <= found["spearman"] <= 1 and graph.info["verified"] is found
    (layer, position, feature), *_ = groups[0]
    assert f"{layer}_{feature}_{position}" in found["groups"][0] and len(found["nodes"]) == 13


def test_a_wrong_edge_is_noticed():
    model, clt, graph = make("llama")
    strongest = int(graph.influence()[: graph.num_features].argmax())
    graph.edges[-3, strongest] *= 1.1
    assert graph.verify(model, clt, 3)["frozen_error"] > 1e-3


def test_live_effects_are_those_of_plain_hooks():
    """What a feature writes is taken away in all its layers, and the rest of the model responds."""
    model, clt, graph = make("llama", targets=[TokenTarget(5, minus=6)])
    found = graph.verify(model, clt, 4)
    with torch.no_grad():
        before = model(input_ids=prompt().view(1, -1)).logits[0, -1]
        for name, effect in found["nodes"].items():
            layer, feature, position = map(int, name.split("_"))
            node = graph.features.tolist().index([layer, position, feature])
            handles = []
            for target in range(layer, clt.config.num_layers):
                change = graph.activations[node] * clt.decoders[layer].weight[feature, target - layer]

                def ablate(module, args, output, change=change, position=position):
                    output[0, position] -= change.to(output.dtype)
                    return output

                handles.append(model.model.layers[target].mlp.register_forward_hook(ablate))
            after = model(input_ids=prompt().view(1, -1)).logits[0, -1]
            for handle in handles:
                handle.remove()
            measured = (after[5] - after[6]) - (before[5] - before[6])
            assert effect["measured"] == pytest.approx(measured.item(), rel=1e-4, abs=1e-6)


def test_total_effects_are_the_sums_over_all_paths():
    _, _, graph = make("llama")
    n = graph.num_features
    steps = graph.edges[:n, :n] / graph.activations  # what a feature's pre-activation takes of each one's activation
    wanted = graph.edges[n:, :n] / graph.activations @ torch.linalg.inv(torch.eye(n).double() - steps)
    torch.testing.assert_close(total_effects(graph), wanted * graph.activations)


def test_rank_correlation_with_ties():
    left, right = torch.tensor([1.0, 2.0, 2.0, 5.0, -3.0]), torch.tensor([0.0, 7.0, 7.0, 7.0, -1.0])
    ranks = torch.tensor([[2.0, 3.5, 3.5, 5.0, 1.0], [2.0, 4.0, 4.0, 4.0, 1.0]])
    assert spearman(left, right) == pytest.approx(torch.corrcoef(ranks)[0, 1].item())
    assert spearman(left, torch.ones(5)) == 0


def test_what_is_no_node_is_refused():
    model, clt, graph = make("llama")
    with pytest.raises(ValueError, match=r"\(0, 0, 0\).* no node"):
        graph.verify(model, clt, 2, groups=[[(0, 0, 0)]])
