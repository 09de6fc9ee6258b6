"""Two hops: influence through nodes against its paths, what points to a token, and questions that a model answers."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_clt.audit.graphs import graph_of
from hf_clt.audit.multihop import (
    QUESTIONS,
    QUICK_QUESTIONS,
    answered_questions,
    finds,
    influence_through,
    multihop,
    of_question,
    pointing,
)
from hf_clt.audit.samples import BlockSkipped, Given
from hf_clt.harvest.harvester import Harvester
from tests.attribution.cases import make_model
from tests.attribution.test_graph import random_graph
from tests.audit.exact import exact_clt, make_exact
from tests.audit.test_graphs import paths_from


def test_influence_through_nodes_is_that_of_the_paths_with_one_of_them():
    graph = random_graph(2)
    n, nodes = graph.num_features, [1, 8, 14]
    sums = (graph.edges.abs().sum(dim=1) + graph.dropped).clamp_min(1e-10)
    weights = graph.edges.abs() / sums[:, None]
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[nodes] = True
    reached = {}
    for avoid in (False, True):
        allowed = weights.clone()
        if avoid:
            allowed[:, nodes] = 0
        reached[avoid] = sum(
            weight * share
            for target, weight in enumerate(graph.target_weights.tolist())
            for _, _, share in paths_from(allowed, n + target, n)
        )
    assert influence_through(graph, chosen) == pytest.approx(1 - reached[True] / reached[False])
    assert influence_through(graph, torch.zeros(n, dtype=torch.bool)) == 0


def test_pointing_is_in_deviations_of_the_logits():
    clt, given = make_exact()
    graph = graph_of(clt, given, given.prompts[0])
    found = pointing(clt, given, graph, [5, 9])
    final, head = given.model.transformer.ln_f, given.model.lm_head.weight
    for node in range(0, graph.num_features, 60):
        layer, _, feature = graph.features[node].tolist()
        row = clt.decoders[layer].weight[feature].sum(dim=0)
        logits = head @ ((row - row.mean()) * final.weight)
        wanted = (logits - logits.mean()) / logits.std(correction=0)
        torch.testing.assert_close(found[:, node], wanted[[5, 9]], rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def trained() -> Given:
    """A tiny GPT-2 that has learnt the answers to the questions, words being tokens."""
    texts = [f"{template.format(name)} {answer}" for template, name, _, answer in QUESTIONS]
    words = sorted({word for text in texts for word in text.split()} | {middle for _, _, middle, _ in QUESTIONS})
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["?", *words])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", pad_token="?", padding_side="left")
    model = make_model("gpt2", torch.float32, vocab_size=len(words) + 1, hidden_size=32, activation_function="relu")
    rows = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    groups = [torch.stack([row for row in rows if len(row) == length]) for length in {len(row) for row in rows}]
    for _ in range(60):
        loss = sum(
            torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits[:, -1], ids[:, -1]) for ids in groups
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = model.eval().requires_grad_(False)
    return Given(model, tokenizer, Harvester(model, "mlp.hook_in", "mlp.hook_out"), [], [])


def test_questions_that_a_model_answers(trained):
    asked = answered_questions(trained)
    assert len(asked) >= 20
    clt = exact_clt(trained.model)
    found = multihop(clt, replace(trained, quick=True))
    assert found["answered"]["value"] == pytest.approx(len(asked) / len(QUESTIONS))
    assert found["answered"]["samples"] == len(QUESTIONS)
    assert found["kept_flips"]["samples"] == QUICK_QUESTIONS
    # To ablate what matters changes the answer more than to ablate as much of the rest.
    assert found["kept_fall"]["value"] > found["unimportant_fall"]["value"]
    for name in ("through_intermediate", "through_others"):
        assert 0 <= found[name]["value"] <= 1


def planted(given, prompt, middle, answer):
    """A CLT whose most influential feature on a question writes the intermediate as well, and strongly."""
    clt = exact_clt(given.model)
    graph = graph_of(clt, given, prompt, [answer])
    layer, _, feature = graph.features[graph.influence()[: graph.num_features].argmax()].tolist()
    head = given.model.lm_head.weight
    changed = exact_clt(given.model)
    changed.decoders[layer].weight[feature, 0] += 100 * (head[middle] - head.mean(dim=0))
    return changed


def test_a_feature_that_writes_the_intermediate_is_found(trained):
    prompt, middle, answer = answered_questions(trained)[0]
    clts = exact_clt(trained.model), planted(trained, prompt, middle, answer)
    graphs = [graph_of(clt, trained, prompt, [answer]) for clt in clts]
    others = [token for token in range(1, 40) if token not in (middle, answer)]
    without, with_it = (
        of_question(clt, trained, graph, middle, others, answer, torch.Generator().manual_seed(0))
        for clt, graph in zip(clts, graphs, strict=True)
    )
    assert pointing(clts[1], trained, graphs[1], [middle])[0].max() > 4
    assert with_it["through_intermediate"] > without["through_intermediate"]
    assert with_it["through_intermediate"] > 2 * with_it["through_others"]
    assert finds(clts[0], trained, prompt, middle, answer) == without["found"] == 0
    assert finds(clts[1], trained, prompt, middle, answer) == with_it["found"] == 1


def test_disagreement_is_with_the_reference(trained):
    clt = planted(trained, *answered_questions(trained)[0])
    given = replace(trained, quick=True, reference=exact_clt(trained.model))
    of_planted, of_same = multihop(clt, given), multihop(exact_clt(trained.model), given)
    assert of_same["disagreement"]["value"] == 0
    assert of_planted["disagreement"]["value"] >= 1 / QUICK_QUESTIONS
    assert "disagreement" not in multihop(clt, replace(given, reference=None))


def test_a_model_that_knows_no_answer_is_skipped():
    clt, given = make_exact()
    with pytest.raises(BlockSkipped, match=f"answers none of {len(QUESTIONS)} questions"):
        multihop(clt, given)
