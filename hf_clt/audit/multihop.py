"""
Two steps or one: prompts whose answer needs an intermediate that they do not name. A CLT that is sparse may write the
answer in one step where the language model takes two; its graph then calls unimportant what is not.
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attribution.frozen import freeze
from ..attribution.graph import AttributionGraph, influences
from ..attribution.request import prompt_tokens, single_token
from ..attribution.rows import decoder_rows
from ..folding import at_least_float32
from ..modeling_clt import CrossLayerTranscoder
from .graphs import EDGE_THRESHOLD, NODE_THRESHOLD, graph_of, row_sums
from .live import respond, written_by
from .samples import BlockSkipped, Given, figure


POINTS = 4.0  # standard deviations of a feature's logits over the vocabulary
QUICK_QUESTIONS = 6  # that the language model answers

LANGUAGE = "People in the country that contains the city of {} speak"
OFFICIAL = "The official language of the country whose capital is {} is"
CONTINENT = "The country whose capital is {} lies on the continent of"
CAPITAL = "{} is a city in a country whose capital is"
STATE = "The capital of the state containing {} is"

# Prompt, what it names, intermediate, answer.
QUESTIONS = (
    (STATE, "Dallas", "Texas", "Austin"),
    (LANGUAGE, "Paris", "France", "French"),
    (CONTINENT, "Nairobi", "Kenya", "Africa"),
    (OFFICIAL, "Cairo", "Egypt", "Arabic"),
    (CAPITAL, "Munich", "Germany", "Berlin"),
    (LANGUAGE, "Milan", "Italy", "Italian"),
    (CONTINENT, "Tokyo", "Japan", "Asia"),
    (OFFICIAL, "Moscow", "Russia", "Russian"),
    (CAPITAL, "Marseille", "France", "Paris"),
    (LANGUAGE, "Kyoto", "Japan", "Japanese"),
    (CONTINENT, "Berlin", "Germany", "Europe"),
    (OFFICIAL, "Ankara", "Turkey", "Turkish"),
    (CAPITAL, "Osaka", "Japan", "Tokyo"),
    (LANGUAGE, "Barcelona", "Spain", "Spanish"),
    (CONTINENT, "Delhi", "India", "Asia"),
    (OFFICIAL, "Athens", "Greece", "Greek"),
    (STATE, "Oakland", "California", "Sacramento"),
    (LANGUAGE, "Warsaw", "Poland", "Polish"),
    (CONTINENT, "Lagos", "Nigeria", "Africa"),
    (OFFICIAL, "Helsinki", "Finland", "Finnish"),
    (CAPITAL, "Shanghai", "China", "Beijing"),
    (LANGUAGE, "Munich", "Germany", "German"),
    (OFFICIAL, "Stockholm", "Sweden", "Swedish"),
    (LANGUAGE, "Lisbon", "Portugal", "Portuguese"),
)


@torch.no_grad()
def multihop(clt: CrossLayerTranscoder, given: Given) -> dict:
    """
    Of [`QUESTIONS`] those whose intermediate and answer are single tokens and which the language model answers; of a
    quick audit the first [`QUICK_QUESTIONS`]. The graph is that of the answer's logit.

    A feature *points to* a token if what it writes to all its layers gives it, through the final norm's gain and the
    unembedding, a logit that is [`POINTS`] standard deviations above the mean. *Unimportant* is what pruning at
    [`NODE_THRESHOLD`] leaves out. Features are ablated in the live language model, all of a set at once.

    Returns:
        `dict` of figures, samples are questions: `answered`, the share of all questions that count;
        `through_intermediate`, the share of the graph's influence on paths with a feature that points to the
        intermediate, and `through_others`, the same for the other questions' intermediates; `kept_flips`,
        `unimportant_flips` and `intermediate_flips`, whether the answer changes when the kept features, as many of the
        unimportant ones as are kept (drawn), and the unimportant ones that point to the intermediate are ablated, with
        the fall of the answer's log-probability in `kept_fall`, `unimportant_fall` and `intermediate_fall`;
        `intermediate_unimportant`, the share of the features pointing to the intermediate that are left out (of those
        questions that have some); `found`, whether one is kept. With a `reference`: `disagreement`, on which share of
        the questions one of the two CLTs keeps such a feature and the other does not.

    Raises:
        BlockSkipped: If the language model answers none.
    """
    asked = answered_questions(given)
    count = len(asked)
    asked = asked[: QUICK_QUESTIONS if given.quick else None]
    if not asked:
        raise BlockSkipped(
            f"the language model answers none of {len(QUESTIONS)} questions with a known intermediate, token for token"
        )
    answers = [1.0] * count + [0.0] * (len(QUESTIONS) - count)
    intermediates, rows = sorted({middle for _, middle, _ in asked}), []
    with clt.folded():
        bar = tqdm(asked, "two hops", unit="question", disable=not given.progress)
        for number, (prompt, middle, answer) in enumerate(bar):
            graph = graph_of(clt, given, prompt, [answer])
            if graph.num_features:
                others = [token for token in intermediates if token != middle]
                generator = torch.Generator().manual_seed(given.seed + number)
                row = of_question(clt, given, graph, middle, others, answer, generator)
                if given.reference is not None:
                    row["disagreement"] = float(row["found"] != finds(given.reference, given, prompt, middle, answer))
                rows.append(row)
    if not rows:
        raise BlockSkipped(f"no feature is active on any of {len(asked)} questions")
    found = {"answered": figure(answers, given.seed)}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            found[name] = figure(values, given.seed)
    return found


def answered_questions(given: Given) -> list[tuple[str, int, int]]:
    """Prompt, intermediate and answer of each question that the language model answers."""
    found = []
    for template, name, middle, answer in QUESTIONS:
        prompt = template.format(name)
        try:
            tokens = [single_token(given.tokenizer, f" {word}") for word in (middle, answer)]
            ids = prompt_tokens(given.tokenizer, prompt, given.model.config).to(given.model.device)
        except ValueError:  # several tokens
            continue
        if given.model(input_ids=ids[None]).logits[0, -1].argmax().item() == tokens[1]:
            found.append((prompt, *tokens))
    return found


def of_question(
    clt: CrossLayerTranscoder,
    given: Given,
    graph: AttributionGraph,
    middle: int,
    others: list[int],
    answer: int,
    generator: torch.Generator,
) -> dict[str, float | None]:
    """The figures of one question."""
    n = graph.num_features
    strength = pointing(clt, given, graph, [middle, *others])
    through = [influence_through(graph, points) for points in strength >= POINTS]
    row = {"through_intermediate": through[0]}
    row["through_others"] = sum(through[1:]) / len(others) if others else None
    kept, points = kept_of(graph), strength[0] >= POINTS
    row["found"] = float((points & kept).any())
    row["intermediate_unimportant"] = (points & ~kept).sum().item() / points.sum().item() if points.any() else None
    drawn = (~kept).nonzero().squeeze(1)
    drawn = drawn[torch.randperm(len(drawn), generator=generator)[: int(kept.sum())]]
    sets = torch.stack([torch.zeros(n, dtype=torch.bool), kept, torch.zeros(n, dtype=torch.bool), points & ~kept])
    sets[2, drawn] = True
    log_p = respond(given.model, clt, graph.input_ids, -written_by(clt, graph, sets))[1]
    for number, name in enumerate(("kept", "unimportant", "intermediate"), start=1):
        there = bool(sets[number].any())
        row[f"{name}_flips"] = float(log_p[number].argmax() != answer) if there else None
        row[f"{name}_fall"] = (log_p[0, answer] - log_p[number, answer]).item() if there else None
    return row


def kept_of(graph: AttributionGraph) -> Tensor:
    """Which features pruning keeps, (n,) bool."""
    pruned = set(map(tuple, graph.prune(NODE_THRESHOLD, EDGE_THRESHOLD).features.tolist()))
    return torch.tensor([tuple(feature) in pruned for feature in graph.features.tolist()])


def finds(clt: CrossLayerTranscoder, given: Given, prompt: str, middle: int, answer: int) -> float:
    """Whether the graph of a question keeps a feature that points to the intermediate."""
    graph = graph_of(clt, given, prompt, [answer])
    if not graph.num_features:
        return 0.0
    with clt.folded():
        return float(((pointing(clt, given, graph, [middle])[0] >= POINTS) & kept_of(graph)).any())


def pointing(clt: CrossLayerTranscoder, given: Given, graph: AttributionGraph, tokens: list[int]) -> Tensor:
    """The logits that features give to tokens, in standard deviations above their mean over the vocabulary, (T, n)."""
    hooks = clt.config.feature_input_hook, clt.config.feature_output_hook
    frozen = freeze(given.model, graph.input_ids, *hooks, dtype=at_least_float32(given.model.dtype))
    layers, _, indices = graph.features.unbind(1)
    unembedding = frozen.unembedding - frozen.unembedding.mean(dim=0)
    spread = unembedding.T @ unembedding / len(unembedding)
    found = unembedding.new_empty(len(tokens), len(layers))
    for layer in layers.unique().tolist():
        at = (layers == layer).nonzero().squeeze(1)
        written = decoder_rows(clt, layer, indices[at].to(clt.device), unembedding.dtype).sum(dim=1)
        written = written.to(unembedding.device)
        written = (written - written.mean(dim=1, keepdim=True) * frozen.final.centred) * frozen.final.gain
        deviation = torch.einsum("ud,de,ue->u", written, spread, written).clamp_min(0).sqrt()
        found[:, at] = unembedding[tokens] @ written.T / deviation.clamp_min(1e-30)
    return found.cpu()


def influence_through(graph: AttributionGraph, nodes: Tensor) -> float:
    """The share of influence that reaches tokens and errors on paths through one of some feature nodes, (n,) bool."""
    n, sums = graph.num_features, row_sums(graph)
    reached = []
    for avoided in (torch.zeros_like(nodes), nodes):
        edges = graph.edges.abs().clone()
        edges[:, :n][:, avoided] = 0
        through = influences(edges, graph.features[:, 0], graph.target_weights, sums)[0]
        reached.append(through[n:].sum())
    return (1 - reached[1] / reached[0].clamp_min(1e-30)).item()


__all__ = ["multihop"]
