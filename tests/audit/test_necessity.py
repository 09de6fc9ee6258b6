"""Deletion and insertion curves, against plain hooks; a CLT that is right against one that is not."""

import pytest
import torch

from hf_clt.audit.graphs import graph_of
from hf_clt.audit.necessity import PARTS, alike, necessity, of_prompt, written_norms
from tests.audit.exact import make_exact, make_shuffled


def with_features(given, clt, graph, kept: torch.Tensor, errors: bool):
    """The next token's probabilities where MLPs write what these features do (n,) bool, biases, and errors."""
    blocks, handles, base = given.model.transformer.h, [], []
    for block in blocks:
        handles.append(block.mlp.register_forward_hook(lambda module, args, output: base.append(output[0])))
    given.model(input_ids=graph.input_ids[None])
    for handle in handles:
        handle.remove()
    handles = []
    for layer, block in enumerate(blocks):
        written = base[layer].clone()
        if not errors:
            written[1:] = clt.decoders[layer].bias
        sign = -1 if errors else 1
        for node, (at, position, feature) in enumerate(graph.features.tolist()):
            if at == layer and bool(kept[node]) != errors:
                written[position] += sign * graph.activations[node] * clt.decoders[layer].weight[feature, 0]
        handles.append(block.mlp.register_forward_hook(lambda module, args, output, new=written: new[None]))
    logits = given.model(input_ids=graph.input_ids[None]).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits.softmax(0)


@pytest.mark.parametrize("make", [make_exact, make_shuffled])
def test_curves_are_those_of_plain_hooks(make):
    clt, given = make()
    graph = graph_of(clt, given, given.prompts[1])
    n = graph.num_features
    agreement, _ = of_prompt(clt, given, graph, torch.Generator().manual_seed(5))
    top = graph.influence()[:n].topk(n // PARTS[-1]).indices
    others = alike(written_norms(clt, graph), top, torch.Generator().manual_seed(5))
    whole = with_features(given, clt, graph, torch.ones(n, dtype=torch.bool), errors=True)
    curves = agreement[:-1].view(2, 2, len(PARTS))
    for point in (0, 3):
        for which, nodes in enumerate((top, others)):
            chosen = torch.zeros(n, dtype=torch.bool)
            chosen[nodes[: n // PARTS[point]]] = True
            for kind, kept in enumerate((~chosen, chosen)):
                found = with_features(given, clt, graph, kept, errors=kind == 0)
                wanted = 1 - (found - whole).abs().sum() / 2
                assert curves[kind, which, point].item() == pytest.approx(wanted.item(), abs=1e-6)
    found = with_features(given, clt, graph, torch.ones(n, dtype=torch.bool), errors=False)
    assert agreement[-1].item() == pytest.approx(1 - (found - whole).abs().sum().item() / 2, abs=1e-6)


def test_others_write_as_much_and_are_none_of_the_top():
    sizes = torch.tensor([5.0, 5.1, 1.0, 1.2, 9.0, 4.9, 0.9, 5.2, 1.1, 5.3, 4.8])
    nodes = torch.tensor([0, 2])
    for seed in range(5):
        found = alike(sizes, nodes, torch.Generator().manual_seed(seed))
        assert found[0].item() in (1, 5, 7, 9, 10) and found[1].item() in (3, 6, 8, 1, 5, 7, 9, 10)
        assert len(set(found.tolist()) | {0, 2}) == 4


def test_a_clt_that_is_right_says_what_is_needed_and_what_suffices():
    right, wrong = (necessity(*made()) for made in (make_exact, make_shuffled))
    assert right["insertion_all"]["value"] == pytest.approx(1, abs=1e-5)
    assert right["insertion_all"]["interval"][0] > wrong["insertion_all"]["interval"][1]
    for name in ("deletion_area", "insertion_area"):
        assert right[name]["interval"][0] > 0.05
    assert right["insertion_area"]["interval"][0] > wrong["insertion_area"]["interval"][1]
    assert 0.5 < right["others_size"]["value"] < 1.5
    assert list(right["deletion_top"]) == [f"1/{part}" for part in PARTS]
