"""Graphs: influence, scores and pruning against plain formulas; files; what decides a graph and what does not."""

import json

import pytest
import torch

from hf_clt import CrossLayerTranscoder
from hf_clt.attribution import AttributionGraph, FeatureTarget, TokenTarget, attribute
from hf_clt.attribution import tracing as tracing_module
from hf_clt.attribution.graph import influences, threshold_at
from hf_clt.attribution.tracing import public_name
from tests.attribution.autograd_reference import double_throughout, make_model, prompt
from tests.attribution.cases import HOOKS, make_case, model_of
from tests.reference import random_clt, random_statistics


TARGETS = [TokenTarget(5), TokenTarget(6, 4, minus=7), FeatureTarget(2, 8, 3), 9]


@pytest.fixture(scope="module")
def case():
    return make_case("llama", HOOKS[0], True)


def traced(case, targets=None, **options):
    options = {"dtype": torch.float64, **options}
    with double_throughout():
        return attribute(case.model, case.clt, prompt(), targets, **options)


@pytest.fixture(scope="module")
def graph(case):
    return traced(case)


def random_graph(seed: int = 0, counts=(5, 0, 7, 4), length: int = 3, targets: int = 3) -> AttributionGraph:
    """Of random edges, with layers of some features, one of none, and a feature without any edge."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    n, num_layers = len(layers), len(counts)
    features = torch.stack([layers, torch.arange(n) % length, torch.arange(n)], dim=1)
    features = features[(layers * length + features[:, 1]).argsort(stable=True)]
    width = n + (num_layers + 1) * length
    edges = torch.randn(n + targets, width, generator=generator, dtype=torch.float64).exp()
    edges *= torch.randn(edges.shape, generator=generator, dtype=torch.float64).sign()
    edges *= torch.rand(edges.shape, generator=generator) < 0.7
    edges[:n, :n][layers[:, None] <= layers] = 0
    errors = torch.arange(num_layers).repeat_interleave(length)
    edges[:n, n : n + len(errors)][layers[:, None] <= errors] = 0
    edges[6] = 0
    return AttributionGraph(
        input_ids=torch.arange(length),
        tokens=[str(token) for token in range(length)],
        features=features,
        activations=torch.ones(n, dtype=torch.float64),
        targets=[TokenTarget(token, length - 1) for token in range(targets)],
        target_weights=torch.rand(targets, generator=generator, dtype=torch.float64),
        edges=edges,
        rest={"own bias": torch.ones(n + targets, dtype=torch.float64)},
        dropped=torch.rand(n + targets, generator=generator, dtype=torch.float64),
        num_layers=num_layers,
    )


# -- the graph of a prompt --------------------------------------------------------------------------------------------


def test_graph_is_the_rows_of_its_targets(case):
    graph = traced(case, TARGETS, cleared=[0, 3])
    assert torch.equal(graph.features, case.traced.features)
    torch.testing.assert_close(graph.activations, case.traced.leaves.activations.detach())
    n = graph.num_features
    torch.testing.assert_close(graph.edges[:n], case.edges[:n], rtol=1e-9, atol=1e-10)
    # the row of a feature that is a target is that of the node, where it is one
    logits = case.traced.logits.detach()
    found = graph.edges.sum(1) + sum(graph.rests().values())
    expected = [logits[8, 5] - logits[8].mean(), logits[4, 6] - logits[4, 7], None, logits[8, 9] - logits[8].mean()]
    for row, value in enumerate(expected):
        assert value is None or found[n + row].item() == pytest.approx(value.item(), rel=1e-9)
    assert graph.targets == [TokenTarget(5, 8), TokenTarget(6, 4, minus=7), FeatureTarget(2, 8, 3), TokenTarget(9, 8)]
    probabilities = logits.softmax(-1)
    assert graph.target_weights.tolist() == pytest.approx(
        [probabilities[8, 5].item(), 1, 1, probabilities[8, 9].item()]
    )
    read = case.frozen.blocks[2].read[8]
    encoder = case.clt.encoders[2]
    assert found[n + 2].item() == pytest.approx((encoder.weight[3] @ read + encoder.bias[3]).item(), rel=1e-9)


def test_ids_in_a_tensor_are_tokens(case):
    assert traced(case, torch.tensor([5, 9])).targets == [TokenTarget(5, 8), TokenTarget(9, 8)]


def test_default_targets_are_the_likely_tokens(case, graph):
    probabilities, tokens = case.traced.logits.detach()[-1].softmax(0).sort(descending=True)
    count = min(10, int((probabilities.cumsum(0) < 0.95).sum()) + 1)
    assert [target.token for target in graph.targets] == tokens[:count].tolist()
    torch.testing.assert_close(graph.target_weights, probabilities[:count])
    sharp = make_model("llama")
    with torch.no_grad():
        sharp.lm_head.weight *= 10
    few = attribute(sharp, case.clt, prompt(), dtype=torch.float64)
    total = few.target_weights.sum()
    assert len(few.targets) < 10
    assert total >= 0.95 > total - few.target_weights[-1]


def test_adjacency_and_order(graph):
    full, n = graph.adjacency(), graph.num_features
    assert full.shape == (graph.num_nodes, graph.num_nodes)
    assert graph.num_nodes == n + 3 * 9 + 9 + len(graph.targets)
    assert torch.equal(full[:n, : graph.first_target], graph.edges[:n])
    assert torch.equal(full[graph.first_target :, : graph.first_target], graph.edges[n:])
    assert full[n : graph.first_target].abs().max() == 0
    assert full[:, graph.first_target :].abs().max() == 0
    keys = graph.features[:, 0] * 10_000 + graph.features[:, 1] * 100 + graph.features[:, 2]
    assert (keys.diff() > 0).all()
    # position 0 has neither features nor errors
    assert (graph.features[:, 1] > 0).all()
    errors = graph.edges[:, graph.first_error : graph.first_token].view(-1, 3, 9)
    assert errors[:, :, 0].abs().max() == 0
    assert errors[:, :, 1:].abs().amax((0, 2)).min() > 0


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2"])
def test_batch_size_decides_nothing(name):
    case = make_case(name, HOOKS[3], True)
    for nodes in (None, 30):
        graphs = [traced(case, max_feature_nodes=nodes, rank_every=7, batch_size=size) for size in (1, 7, 64, None)]
        for other in graphs[1:]:
            assert torch.equal(other.features, graphs[0].features)
            torch.testing.assert_close(other.edges, graphs[0].edges, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(other.dropped, graphs[0].dropped, rtol=1e-9, atol=1e-12)
            for part, values in other.rests().items():
                torch.testing.assert_close(values, graphs[0].rests()[part], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tying", ["none", "per_source", "per_target"])
@pytest.mark.parametrize("normalized", [False, True], ids=["", "normalized"])
def test_lazy_loaded_and_live_clts_give_one_graph(tmp_path, tying, normalized):
    """Also where the live one has its normalisation apart, which the files have folded in."""
    model = model_of("gpt2", torch.float32)
    clt = random_clt(num_layers=3, d_model=16, num_features=20, double=False, decoder_tying=tying).eval()
    if normalized:
        clt.set_normalization(**random_statistics(clt, same_scale=True))
    clt.save_pretrained(tmp_path)
    graphs = [attribute(model, clt, prompt(), [5, 6])]
    for lazy in (False, True):
        stored = CrossLayerTranscoder.from_pretrained(tmp_path, lazy=lazy)
        graphs.append(attribute(model, stored, prompt(), [5, 6]))
    for other in graphs[1:]:
        assert torch.equal(other.features, graphs[0].features)
        torch.testing.assert_close(other.edges, graphs[0].edges, rtol=1e-5, atol=1e-5)
    found = graphs[0].edges.sum(1) + sum(graphs[0].rests().values())
    with torch.no_grad():
        logits = model(prompt()).logits[0, -1]
    torch.testing.assert_close(found[-2:], logits[[5, 6]] - logits.mean(), rtol=1e-4, atol=1e-4)


def test_attribution_leaves_the_clt_as_it_was():
    clt = random_clt(num_layers=3, d_model=16, num_features=20, double=False)
    clt.set_normalization(**random_statistics(clt, same_scale=True))
    before = {name: value.clone() for name, value in clt.state_dict().items()}
    attribute(model_of("gpt2", torch.float32), clt, prompt(), [5])
    for name, value in clt.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-6)
    assert clt.training == random_clt().training


def test_a_clt_in_train_mode_gives_the_graph_of_eval_mode():
    """A batchtopk CLT that trains selects over the batch, and one that is analysed by its threshold."""
    model = model_of("llama", torch.float32)
    fields = {"num_layers": 3, "d_model": 16, "num_features": 20, "activation_fn": "batchtopk", "double": False}
    graphs = []
    for training in (False, True):
        clt = random_clt(**fields).train(training)
        for part in clt.thresholds:
            part.value.fill_(0.5)
        graphs.append(attribute(model, clt, prompt(), [5]))
        assert clt.training == training
        assert clt.thresholds[0].value.item() == 0.5
    assert torch.equal(graphs[0].features, graphs[1].features)
    assert torch.equal(graphs[0].edges, graphs[1].edges)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoders_of_half_precision(dtype, tmp_path):
    """Their rows are what they are, and all else is computed in float32: nothing is lost between rows and errors."""
    model = model_of("gemma2", torch.float32)
    clt = random_clt(num_layers=3, d_model=16, num_features=20, double=False, skip_connection=True).eval()
    clt.cast_decoders(dtype)
    clt.save_pretrained(tmp_path)
    with torch.no_grad():
        cap = model.config.final_logit_softcapping
        logits = cap * torch.atanh(model(prompt()).logits[0, -1].double() / cap)
    for stored in (clt, CrossLayerTranscoder.from_pretrained(tmp_path, lazy=True)):
        assert stored.dtype == dtype
        graph = attribute(model, stored, prompt(), [5])
        assert graph.num_features > 50
        found = graph.edges.sum(1) + sum(graph.rests().values())
        assert found[-1].item() == pytest.approx((logits[5] - logits.mean()).item(), rel=1e-4)
        inputs = torch.stack([block.read for block in make_case("gemma2", dtype=torch.float32).frozen.blocks], dim=1)
        assert torch.equal(
            graph.features, (stored.encode(inputs)[1:] > 0).transpose(0, 1).nonzero() + torch.tensor([0, 1, 0])
        )


def silent_clt(threshold: float = 1e6):
    clt = random_clt(num_layers=3, d_model=16, num_features=20, double=False).eval()
    with torch.no_grad():
        for part in clt.thresholds:
            part.value.fill_(threshold).log_()
    return clt


@pytest.mark.parametrize("nodes", [None, 5])
def test_nothing_is_active(nodes, tmp_path):
    graph = attribute(model_of("llama", torch.float32), silent_clt(), prompt(), max_feature_nodes=nodes)
    assert graph.num_features == 0
    assert 0 < graph.scores()["replacement"] < 1
    pruned = graph.prune()
    assert pruned.num_features == 0
    assert (pruned.edges != 0).any()
    pruned.save(tmp_path)
    assert torch.equal(AttributionGraph.load(tmp_path).edges, pruned.edges)
    assert "strongest path" in graph.table()


def test_nothing_is_active_at_the_last_positions():
    model = model_of("llama", torch.float32)
    full = attribute(model, silent_clt(1e-3), prompt())
    positions = full.features[:, 1]
    late, early = full.activations[positions >= 7].max(), full.activations[positions < 7].max()
    assert early > late
    graph = attribute(model, silent_clt((early + late).item() / 2), prompt(), [5])
    assert graph.num_features > 0
    assert graph.features[:, 1].max() < 7
    found = (graph.edges.sum(1) + sum(graph.rests().values()))[-1]
    with torch.no_grad():
        logits = model(prompt()).logits[0, -1]
    assert found.item() == pytest.approx((logits[5] - logits.mean()).item(), rel=1e-3)


def test_cleared_positions_have_no_nodes():
    model, clt = model_of("llama", torch.float32), silent_clt(0.3)
    graph, few = attribute(model, clt, prompt(), [5]), attribute(model, clt, prompt(), [5], cleared=[0, 6, 7, 8])
    assert set(few.features[:, 1].tolist()) == {1, 2, 3, 4, 5}
    errors = few.edges[:, few.first_error : few.first_token].view(-1, 3, 9)
    assert errors[:, :, [0, 6, 7, 8]].abs().max() == 0
    # what they gave is named, and all else is as it was
    name = "MLP outputs without nodes"
    assert few.rests()[name][-1].abs() > graph.rests()[name][-1].abs()
    first = slice(few.first_token, None), slice(graph.first_token, None)
    torch.testing.assert_close(few.edges[-1, first[0]], graph.edges[-1, first[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [2, 128])
def test_short_and_long_prompts(length):
    model = make_model("gemma2", torch.float32, max_position_embeddings=128, sliding_window=16)
    clt = random_clt(num_layers=3, d_model=16, num_features=20, double=False).eval()
    graph = attribute(model, clt, prompt(length)[0], [5])
    assert len(graph.input_ids) == length
    assert torch.equal(graph.input_ids, prompt(length)[0])
    found = (graph.edges.sum(1) + sum(graph.rests().values()))[-1]
    with torch.no_grad():
        logits = model(prompt(length)).logits[0, -1]
    cap = model.config.final_logit_softcapping
    logits = cap * torch.atanh(logits.double() / cap)
    assert found.item() == pytest.approx((logits[5] - logits.mean()).item(), rel=1e-3)
    assert graph.features[:, 1].max() == length - 1
    graph.prune().table()


# -- with some features only ------------------------------------------------------------------------------------------


def plain_selection(full: AttributionGraph, count: int, rank_every: int) -> list[int]:
    """Rows of the targets first, then the most influential features not yet there, by loops over dense matrices."""
    n, known = full.num_features, []
    adjacency = full.adjacency().abs()
    targets = list(range(full.first_target, full.num_nodes))
    while len(known) < count:
        partial = torch.zeros_like(adjacency)
        for row in known + targets:
            partial[row] = adjacency[row] / max(adjacency[row].sum().item(), 1e-8)
        step = torch.zeros(full.num_nodes, dtype=adjacency.dtype)
        step[full.first_target :] = full.target_weights
        influence = torch.zeros_like(step)
        while step.any():
            step = step @ partial
            influence += step
        order = sorted((node for node in range(n) if node not in known), key=lambda node: -influence[node].item())
        known += order[: min(rank_every, count - len(known))]
    return sorted(known)


@pytest.mark.parametrize(("count", "rank_every"), [(40, 7), (40, 512), (12, 1)])
def test_max_feature_nodes(case, graph, count, rank_every):
    chosen = traced(case, max_feature_nodes=count, rank_every=rank_every)
    kept = torch.tensor(plain_selection(graph, count, rank_every))
    assert torch.equal(chosen.features, graph.features[kept])
    assert torch.equal(chosen.activations, graph.activations[kept])
    n = graph.num_features
    rows = torch.cat([kept, torch.arange(n, len(graph.edges))])
    columns = torch.cat([kept, torch.arange(n, graph.edges.shape[1])])
    torch.testing.assert_close(chosen.edges, graph.edges[rows][:, columns], rtol=1e-9, atol=1e-12)
    mass = graph.edges.abs().sum(1)[rows]
    torch.testing.assert_close(chosen.edges.abs().sum(1) + chosen.dropped, mass, rtol=1e-9, atol=1e-12)
    for part, values in chosen.rests().items():
        torch.testing.assert_close(values, graph.rests()[part][rows], rtol=1e-9, atol=1e-12)
    # less is seen as tokens than with every feature, and the nodes alone make it look like more
    scores = chosen.scores()
    assert scores["replacement"] < scores["replacement_of_nodes"]


def test_as_many_nodes_as_features_are_all(case, graph):
    other = traced(case, max_feature_nodes=graph.num_features)
    assert torch.equal(other.features, graph.features)
    assert torch.equal(other.edges, graph.edges)
    assert other.dropped.abs().max() == 0


# -- influence and scores ---------------------------------------------------------------------------------------------


def normalized(graph, with_dropped=False):
    adjacency = graph.adjacency().abs()
    sums = adjacency.sum(1)
    if with_dropped:
        n = graph.num_features
        sums[:n] += graph.dropped[:n]
        sums[graph.first_target :] += graph.dropped[n:]
    return adjacency / sums.clamp_min(1e-10)[:, None]


def weights_of(graph):
    weights = torch.zeros(graph.num_nodes, dtype=graph.edges.dtype)
    weights[graph.first_target :] = graph.target_weights
    return weights


@pytest.mark.parametrize("with_dropped", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_influence_is_that_of_all_paths(seed, with_dropped):
    graph = random_graph(seed)
    matrix = normalized(graph, with_dropped)
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    expected = weights_of(graph) @ (torch.linalg.inv(identity - matrix) - identity)
    torch.testing.assert_close(graph.influence(with_dropped), expected, rtol=1e-10, atol=1e-12)


def test_influence_of_a_prompt(graph):
    matrix = normalized(graph)
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    expected = weights_of(graph) @ (torch.linalg.inv(identity - matrix) - identity)
    torch.testing.assert_close(graph.influence(), expected, rtol=1e-9, atol=1e-12)


def test_influence_of_chosen_columns():
    """Features that are some of the columns, as while nodes are chosen."""
    graph = random_graph()
    n, kept = graph.num_features, torch.tensor([0, 3, 7, 9, 12])
    rows = torch.cat([graph.edges[kept], graph.edges[n:]])
    sums = rows.abs().sum(1).clamp_min(1e-8)
    found, passed = influences(rows, graph.features[kept, 0], graph.target_weights, sums, kept)
    matrix = torch.zeros_like(graph.adjacency())
    matrix[torch.cat([kept, torch.arange(graph.first_target, len(matrix))]), : graph.first_target] = (
        rows.abs() / sums[:, None]
    )
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    expected = weights_of(graph) @ (torch.linalg.inv(identity - matrix) - identity)
    torch.testing.assert_close(found, expected[: graph.first_target], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(passed, torch.cat([expected[kept], graph.target_weights]), rtol=1e-10, atol=1e-12)


def circuit_tracers_scores(graph):
    """As circuit-tracer 0.5 computes them, written anew: dropped features count for nothing."""
    matrix, weights = normalized(graph), weights_of(graph)
    influence, step = torch.zeros_like(weights), weights
    while step.any():
        step = step @ matrix
        influence = influence + step
    errors, tokens = slice(graph.first_error, graph.first_token), slice(graph.first_token, graph.first_target)
    to_tokens, to_errors = influence[tokens].sum(), influence[errors].sum()
    replacement = to_tokens / (to_tokens + to_errors)
    passed = influence + weights
    completeness = ((1 - matrix[:, errors].sum(1)) * passed).sum() / passed.sum()
    return replacement.item(), completeness.item()


def scores_by_loops(graph):
    """Section 4's formulas with what is dropped as one more error of each row, node by node."""
    n, first = graph.num_features, graph.first_target
    rows = {node: graph.edges[node] for node in range(n)}
    rows |= {first + k: graph.edges[n + k] for k in range(len(graph.targets))}
    dropped = {node: graph.dropped[node].item() for node in range(n)}
    dropped |= {first + k: graph.dropped[n + k].item() for k in range(len(graph.targets))}
    weight = dict.fromkeys(range(graph.num_nodes), 0.0)
    weight |= {first + k: graph.target_weights[k].item() for k in range(len(graph.targets))}
    influence = dict.fromkeys(range(graph.num_nodes), 0.0)
    lost = 0.0
    for node in [*range(first, graph.num_nodes), *reversed(range(n))]:  # features are in the order of layers
        total = max(rows[node].abs().sum().item() + dropped[node], 1e-10)
        passed = influence[node] + weight[node]
        lost += passed * dropped[node] / total
        for column, value in enumerate(rows[node].tolist()):
            influence[column] += passed * abs(value) / total
    to_tokens = sum(influence[node] for node in range(graph.first_token, first))
    to_errors = sum(influence[node] for node in range(graph.first_error, graph.first_token)) + lost
    above = below = 0.0
    for node in range(graph.num_nodes):
        share = 0.0
        if node in rows:
            total = max(rows[node].abs().sum().item() + dropped[node], 1e-10)
            share = (rows[node][graph.first_error : graph.first_token].abs().sum().item() + dropped[node]) / total
        above += (1 - share) * (influence[node] + weight[node])
        below += influence[node] + weight[node]
    return to_tokens / (to_tokens + to_errors), above / below


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores(seed):
    graph = random_graph(seed)
    scores = graph.scores()
    assert (scores["replacement"], scores["completeness"]) == pytest.approx(scores_by_loops(graph), rel=1e-10)
    plain = circuit_tracers_scores(graph)
    assert (scores["replacement_of_nodes"], scores["completeness_of_nodes"]) == pytest.approx(plain, rel=1e-10)
    graph.dropped.zero_()
    scores = graph.scores()
    assert (scores["replacement"], scores["completeness"]) == pytest.approx(plain, rel=1e-10)


# -- pruning ----------------------------------------------------------------------------------------------------------


def sorted_threshold(scores, share):
    ordered = torch.sort(scores, descending=True).values
    reached = torch.searchsorted(ordered.cumsum(0) / ordered.sum(), share)
    return ordered[min(int(reached), len(ordered) - 1)]


def plain_pruning(graph, node_threshold, edge_threshold):
    """circuit-tracer 0.5's pruning on dense matrices, written anew: which nodes, which edges."""
    first, n, length = graph.first_target, graph.num_features, len(graph.input_ids)
    weights, adjacency = weights_of(graph), graph.adjacency()

    def influence_of(matrix):
        matrix = matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp_min(1e-10)
        total, step = torch.zeros_like(weights), weights
        while step.any():
            step = step @ matrix
            total = total + step
        return total, matrix

    influence, _ = influence_of(adjacency)
    nodes = influence >= sorted_threshold(influence, node_threshold)
    nodes[first - length :] = True
    reduced = adjacency * nodes * nodes[:, None]
    influence, matrix = influence_of(reduced)
    scores = matrix * (influence + weights)[:, None]
    edges = (scores >= sorted_threshold(scores.flatten(), edge_threshold)) & (adjacency != 0)
    while True:
        before = nodes.clone()
        edges = edges & nodes & nodes[:, None]
        for node in range(first - length):
            nodes[node] &= edges[:, node].any()
        for node in range(n):
            nodes[node] &= edges[node].any()
        if torch.equal(nodes, before):
            return nodes, edges


@pytest.mark.parametrize(
    ("node_threshold", "edge_threshold"), [(0.8, 0.98), (0.5, 0.6), (0.95, 0.3), (1, 1), (0.01, 0.01)]
)
def test_pruning(graph, node_threshold, edge_threshold):
    for found in (graph, random_graph(0), random_graph(1), random_graph(2)):
        nodes, edges = plain_pruning(found, node_threshold, edge_threshold)
        n, first = found.num_features, found.first_target
        pruned = found.prune(node_threshold, edge_threshold)
        assert torch.equal(pruned.features, found.features[nodes[:n]])
        rows = torch.cat([nodes[:n].nonzero().squeeze(1), torch.arange(first, found.num_nodes)])
        columns = torch.cat([nodes[:n].nonzero().squeeze(1), torch.arange(n, first)])
        expected = (found.adjacency() * edges)[rows][:, columns]
        assert torch.equal(pruned.edges, expected)
        # what is not there any more is dropped, with what was before
        whole = found.edges.abs().sum(1) + found.dropped
        kept = torch.cat([nodes[:n], torch.ones(len(found.targets), dtype=torch.bool)])
        torch.testing.assert_close(pruned.edges.abs().sum(1) + pruned.dropped, whole[kept], rtol=1e-9, atol=1e-12)
        for part, values in pruned.rests().items():
            assert torch.equal(values, found.rests()[part][kept])


def test_scores_after_pruning_have_removed_features_as_errors(graph):
    """Methods: what a removed node gave goes to the error of its layer and position, with its sign."""
    pruned = graph.prune()
    n, kept = graph.num_features, {tuple(feature) for feature in pruned.features.tolist()}
    edges = graph.edges.clone()
    stays = torch.ones(edges.shape[1], dtype=torch.bool)
    for node, (layer, position, feature) in enumerate(graph.features.tolist()):
        if (layer, position, feature) not in kept:
            edges[:, graph.first_error + layer * 9 + position] += edges[:, node]
            stays[node] = False
    rows = torch.cat([stays[:n], torch.ones(len(graph.targets), dtype=torch.bool)])
    merged = AttributionGraph(
        **{**vars(pruned), "edges": edges[rows][:, stays], "dropped": torch.zeros(int(rows.sum()), dtype=edges.dtype)}
    )
    assert 0 < len(kept) < n
    assert pruned.info["after_pruning"] == pytest.approx(merged.scores(), rel=1e-9)


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.8, 0.98, 1.0])
def test_threshold_is_that_of_sorting(share):
    generator = torch.Generator().manual_seed(0)
    for scores in (
        torch.rand(5000, generator=generator, dtype=torch.float64).pow(8),
        torch.randint(0, 4, (3000,), generator=generator).double(),  # ties
        torch.ones(2000, dtype=torch.float64),
        torch.tensor([3.0, 1.0], dtype=torch.float64),
        torch.cat([torch.ones(3), torch.zeros(4000)]).double(),
    ):
        found, expected = threshold_at(scores, share), sorted_threshold(scores, share)
        if share < 1:
            assert found == expected
        assert scores[scores >= found].sum() >= share * scores.sum() * (1 - 1e-12)
        assert scores[scores > found].sum() < share * scores.sum() * (1 + 1e-12)


@pytest.mark.parametrize("thresholds", [{"node_threshold": 0}, {"edge_threshold": 1.1}, {"node_threshold": -1}])
def test_thresholds_that_are_no_shares_are_refused(graph, thresholds):
    (name,) = thresholds
    with pytest.raises(ValueError, match=f"{name}={thresholds[name]} is no share"):
        graph.prune(**thresholds)


# -- files ------------------------------------------------------------------------------------------------------------


def assert_same(found: AttributionGraph, expected: AttributionGraph):
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
            assert other.dtype == value.dtype, name
        elif name == "rest":
            assert other.keys() == value.keys()
            assert all(torch.equal(other[part], value[part]) for part in value)
        else:
            assert other == value, name


def test_files_hold_every_bit(case, tmp_path):
    graph = traced(case, TARGETS, max_feature_nodes=30, dtype=torch.float32)
    graph.labels = {(0, 3): "a label", (2, 1): "Ω"}
    graph.details = {(0, 3): {"top_logits": ["a"]}}
    for name, written in (("full", graph), ("pruned", graph.prune())):
        written.save(tmp_path / name)
        loaded = AttributionGraph.load(tmp_path / name)
        assert_same(loaded, written)
        assert loaded.scores() == written.scores()
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["graph.json", "graph.safetensors"]
    assert_same(AttributionGraph.load(tmp_path / "full").prune(), graph.prune())


def test_other_formats_are_refused(graph, tmp_path):
    graph.save(tmp_path)
    header = json.loads((tmp_path / "graph.json").read_text())
    (tmp_path / "graph.json").write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(ValueError, match=r"graph\.json: format is 99; this hf_clt reads 1"):
        AttributionGraph.load(tmp_path)
    (tmp_path / "graph.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no graph\.safetensors; give a folder that"):
        AttributionGraph.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no graph\.json"):
        AttributionGraph.load(tmp_path / "missing")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "targets is empty; give at least one"),
        ([64], r"token 64 is outside 0 to 63"),
        ([-1], r"token -1 is outside 0 to 63"),
        ([TokenTarget(5, 9)], r"position 9 is outside -9 to 8"),
        ([TokenTarget(5, minus=64)], r"minus 64 is outside 0 to 63"),
        ([FeatureTarget(3, 1, 0)], r"layer 3 is outside 0 to 2"),
        ([FeatureTarget(0, -10, 0)], r"position -10 is outside -9 to 8"),
        ([FeatureTarget(0, 1, 20)], r"feature 20 is outside 0 to 19"),
        (["Dallas"], r"target 'Dallas' is a str; give a token id, a TokenTarget or a FeatureTarget"),
    ],
)
def test_targets_out_of_range_are_refused(case, targets, message):
    with pytest.raises(ValueError, match=message):
        traced(case, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_feature_nodes": 0}, "max_feature_nodes=0 is below 1"),
        ({"rank_every": 0}, "rank_every=0 is below 1"),
        ({"batch_size": -1}, "batch_size=-1 is below 1"),
        ({"cleared": [0, 9]}, r"cleared=\[0, 9\]: position 9 is outside the prompt's 0 to 8"),
        ({"cleared": [-1]}, r"position -1 is outside"),
    ],
)
def test_options_out_of_range_are_refused(case, options, message):
    with pytest.raises(ValueError, match=message):
        traced(case, **options)


def test_clts_that_do_not_fit_are_refused(case):
    model = case.model
    for fields, message in (
        ({"num_layers": 2}, "num_layers=2 does not fit"),
        ({"d_model": 8}, "d_model=8 does not fit"),
        ({"activation_fn": "topk", "k_scope": "token"}, "k_scope='token' lets the layers of a token compete"),
    ):
        clt = random_clt(**{"num_layers": 3, "d_model": 16, "num_features": 20, **fields}).eval()
        with pytest.raises(ValueError, match=message):
            attribute(model, clt, prompt())


def test_prompts_that_do_not_fit_are_refused(case):
    for ids, message in (
        (torch.tensor([[5]]), "1 tokens; give two or more"),
        (torch.full((33,), 5), "32 positions"),
        (torch.full((2, 4), 5), "give one prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute(case.model, case.clt, ids)
    with pytest.raises(ValueError, match="training mode"):
        attribute(make_model("llama").train(), case.clt, prompt())


def test_graphs_larger_than_memory_are_refused(case, monkeypatch):
    monkeypatch.setattr(tracing_module, "free_memory", lambda _: 100_000)
    message = r"a graph of [\d,]+ rows and [\d,]+ columns takes .* free; give max_feature_nodes, of which each takes"
    with pytest.raises(ValueError, match=message):
        traced(case)
    assert traced(case, max_feature_nodes=5).num_features == 5


def test_bfloat16_model():
    """The graph is that of what the model computed, whose rounding is shown."""
    model = make_model("llama", torch.bfloat16)
    clt = random_clt(num_layers=3, d_model=16, num_features=20, double=False).eval()
    graph = attribute(model, clt, prompt(), [5])
    assert 1e-5 < graph.info["step_error"] < 2e-2
    with torch.no_grad():
        logits = model(prompt()).logits[0, -1].float()
    found = (graph.edges.sum(1) + sum(graph.rests().values()))[-1]
    assert found.item() == pytest.approx((logits[5] - logits.mean()).item(), abs=0.05 * logits.abs().max().item())


def test_a_graph_tells_no_folders(tmp_path):
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("user/clt") == "user/clt" and public_name("") is None
