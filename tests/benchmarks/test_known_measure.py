"""Models whose circuits are known: that they are what is said of them, and that right and wrong CLTs get their due."""

import pytest
import torch

from benchmarks.known_measure import clt_of, edges_found, match, questions, steps, trace
from benchmarks.known_models import KNOWN, Neuron
from hf_clt.audit.controls import random_clt, shuffled_clt
from hf_clt.harvest.harvester import Harvester


def harvest(known, count=300, seed=1):
    prompts = known.draw(count, seed)
    counted = torch.zeros_like(prompts, dtype=torch.bool)
    counted[:, known.counted] = True
    batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "counted": counted}
    return Harvester(known.model).harvest(batch, dtype=torch.float64)


def score(known, asked, truth, clt, inputs):
    """Edges found and there, and mean shares, by the features that stand for neurons."""
    _, _, standing = match(truth, clt, inputs)
    rows, edges = [], torch.zeros(2)
    for question in asked:
        graph = trace(known, clt, question.prompt, question.answer)
        edges += torch.tensor(edges_found(question, graph, standing))
        rows.append(torch.tensor(list(steps(question, graph, standing).values()), dtype=torch.float64))
    return (edges[0] / edges[1]).item(), torch.stack(rows).mean(dim=0)


@pytest.fixture(scope="module", params=list(KNOWN))
def case(request):
    known = KNOWN[request.param]()
    inputs, labels = harvest(known)
    return known, inputs, labels, clt_of(known, known.neurons), questions(known, 1)


def exact(values):
    return pytest.approx(values, abs=1e-9)


# -- the models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("erases", [True, False])
def test_two_hops_computes_its_functions(erases):
    known = KNOWN["two hops" if erases else "two hops, bits kept"]()
    prompts = known.draw(400, 5)
    logits = known.model(prompts).logits[:, -1]
    for i in range(6):
        a, b, c = ((prompts == known.words.index(f"{bit}{i}")).any(dim=1) for bit in "abc")
        wanted = (a & b & c) if i < 3 else (a & b) ^ c
        torch.testing.assert_close(logits[:, known.answers[f"y{i}"]], 10 * wanted.double(), rtol=0, atol=1e-8)


def test_induction_answers_the_class_of_what_followed():
    known = KNOWN["induction"]()
    prompts = known.draw(50, 5)
    answers = [known.answers[f"w{j}"] for j in range(6)]
    logits = known.model(prompts).logits[:, -1, answers]
    for prompt, row in zip(prompts.tolist(), logits, strict=True):
        followed = prompt[prompt.index(prompt[-1]) + 1]
        wanted = torch.zeros(6, dtype=torch.float64)
        wanted[(followed - known.words.index("t0")) // 2] = 10
        torch.testing.assert_close(row, wanted, rtol=0, atol=1e-6)


def test_superposition_has_more_variables_than_dimensions():
    known = KNOWN["superposition"]()
    rows = torch.stack(list(known.directions.values()))
    assert rows.shape == (104, 80)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(104, dtype=torch.float64))
    assert rows.sum(dim=1).abs().max() < 1e-9
    assert (rows @ rows.T).fill_diagonal_(0).abs().max() < 0.25
    # A token drives its u, and a u the v that it should, far more than any other.
    truth, (inputs, _) = clt_of(known, known.neurons), harvest(known)
    active = truth.encode(inputs)
    prompts = known.draw(300, 1)
    for i in range(40):
        given = (prompts == known.words.index(f"e{i}")).any(dim=1)
        assert active[given, 0, i].min() > 0.3 > active[~given, 0, i].max()


def test_the_neurons_as_features_give_what_the_mlps_do(case):
    _, inputs, labels, truth, _ = case
    torch.testing.assert_close(truth(inputs).reconstruction, labels, rtol=0, atol=2e-3)  # of thresholds: 1e-3
    assert labels.abs().amax(dim=(0, 2)).min() > 0.1  # every layer does something


def test_prompts_follow_from_the_seed(case):
    known = case[0]
    assert torch.equal(known.draw(9, 3), known.draw(9, 3))
    assert not torch.equal(known.draw(9, 3), known.draw(9, 4))
    assert known.draw(9, 3).shape == (9, known.length)


# -- the truth --------------------------------------------------------------------------------------------------------


def test_the_true_graph_has_the_weights_that_were_set():
    known = KNOWN["two hops"]()
    truth = clt_of(known, known.neurons)
    prompt = torch.tensor([known.words.index(word) for word in ("a1", "_", "c1", "b1", "a4", "_", "=")])
    graph = trace(known, truth, prompt, known.answers["y1"])
    m, y = 0, 1
    assert graph.features.tolist() == [[0, 6, 1], [2, 6, 0]]  # a AND b in layer 0, m AND c in layer 2
    tokens = graph.first_token
    wanted = torch.zeros_like(graph.edges)
    wanted[m, [tokens + 0, tokens + 3]] = 1
    wanted[y, [m, tokens + 2]] = 1
    wanted[2, y] = 10
    torch.testing.assert_close(graph.edges, wanted, rtol=0, atol=1e-8)


def test_questions_lead_through_layer_0(case):
    known, _, _, _, asked = case
    assert sorted({question.answer for question in asked}) == sorted(known.answers.values())
    for question in asked:
        assert question.distance >= 1
        assert known.model(question.prompt[None]).logits[0, -1, question.answer] > 5


# -- the measure ------------------------------------------------------------------------------------------------------


def test_the_right_clt_gets_the_full_score(case):
    known, inputs, _, truth, asked = case
    correlations, best, standing = match(truth, truth, inputs)
    assert all(features == {neuron} for neuron, features in best.items())
    assert all(neuron in features for neuron, features in standing.items())
    assert min(correlations.values()) == pytest.approx(1, abs=1e-2)
    edges, shares = score(known, asked, truth, truth, inputs)
    assert edges == 1
    if known.name != "superposition":  # where interference gives the truth other paths
        assert shares.tolist() == exact([1, 0, 0])
    else:
        assert shares[0] > 0.5


def test_a_collapsed_clt_is_called_that(case):
    known, inputs, labels, truth, asked = case
    collapsed = clt_of(known, known.collapsed)
    edges, shares = score(known, asked, truth, collapsed, inputs)
    assert edges < 0.7
    if known.name == "superposition":  # it is so but roughly, see there
        assert shares[0] < 0.01 < 0.5 < shares[1]
        return
    torch.testing.assert_close(collapsed(inputs).reconstruction, labels, rtol=0, atol=2e-3)
    # What crosses positions cannot be done in one step.
    assert shares.tolist() == exact([1, 0, 0] if known.name == "induction" else [0, 1, 0])


def test_controls_are_told_from_the_right_clt(case):
    known, inputs, _, truth, asked = case
    random = random_clt(clt_of(known, known.neurons).float(), inputs.float()).double()
    for control in (shuffled_clt(truth), random):
        edges, shares = score(known, asked, truth, control, inputs)
        assert edges < 0.4
        assert shares[0] < 0.1
        assert shares[2] > 0.7


def test_half_in_one_step_and_half_in_two():
    """The answer is written half by m AND c, half by a AND b AND c in layer 0: shares by hand."""
    known = KNOWN["two hops"]()
    inputs, _ = harvest(known)
    neurons = [Neuron(0, {"a0": 1, "b0": 1}, -1, {(0, "m0"): 1}), Neuron(1, {"m0": 1, "c0": 1}, -1, {(1, "y0"): 0.5})]
    clt = clt_of(known, [*neurons, Neuron(0, {"a0": 1, "b0": 1, "c0": 1}, -2, {(1, "y0"): 0.5})])
    truth = clt_of(known, known.neurons)
    asked = [question for question in questions(known, 2) if question.answer == known.answers["y0"]]
    edges, shares = score(known, asked, truth, clt, inputs)
    two, one, beside = 1 / 4, 1 / 3, 1 / 4 + 1 / 6  # of c, which the answer truly depends on
    assert shares.tolist() == exact([two / (1 - beside), one / (1 - beside), 0])
    assert edges == 1  # all true ones are there, beside others


def test_features_that_share_a_variable_stand_for_it():
    """m is written by two features: one for where c is, and one for where it is not."""
    known = KNOWN["two hops"]()
    inputs, labels = harvest(known)
    split = known.neurons[:]
    for neuron in known.neurons:
        if neuron.layer == 0:
            c = next(iter(neuron.reads)).replace("a", "c")
            split.remove(neuron)
            split.append(Neuron(0, {**neuron.reads, c: 1}, -2, neuron.writes))
            split.append(Neuron(0, {**neuron.reads, c: -1}, -1, neuron.writes))
    clt, truth = clt_of(known, split), clt_of(known, known.neurons)
    torch.testing.assert_close(clt(inputs).reconstruction, labels, rtol=0, atol=1e-8)
    asked = questions(known, 2)
    edges, shares = score(known, asked, truth, clt, inputs)
    assert edges == 1
    assert shares.tolist() == exact([1, 0, 0])
    correlations, best, _ = match(truth, clt, inputs)
    assert correlations[0, 0] < 0.9
    found = sum(edges_found(q, trace(known, clt, q.prompt, q.answer), best)[0] for q in asked)
    assert found < sum(edges_found(q, q.truth, best)[1] for q in asked)


def test_a_clt_without_active_features_finds_nothing():
    known = KNOWN["two hops"]()
    inputs, _ = harvest(known)
    truth, silent = clt_of(known, known.neurons), clt_of(known, [Neuron(0, {"a0": 1}, -2, {(0, "m0"): 1})])
    edges, shares = score(known, questions(known, 1)[:2], truth, silent, inputs)
    assert edges == 0
    assert shares.tolist() == exact([0, 0, 1])
