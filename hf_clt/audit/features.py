"""Whether features stand for more than a single token, and whether a feature is silent where another one took over."""

from collections import defaultdict

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..attribution.rows import decoder_rows
from ..evaluation.evaluate import eval_mode
from ..features.examples import ExampleSettings, FeatureActivity, LayerActivity, add_batch
from ..harvest.harvester import check_fit
from ..modeling_clt import CrossLayerTranscoder
from .samples import BlockSkipped, Given, figure, sequences


SEQUENCES, QUICK_SEQUENCES = 64, 24
EXAMPLES, LEAST_EXAMPLES = 8, 4  # sequences in which a feature is most active; features with fewer are left out
WORDS, LEAST_WORDS = 60, 10  # per first letter; letters with fewer are left out
WORDS_AT_A_TIME = 64
PENALTY = 1e-3  # of the probe, relative to the mean variance
LEAST_F1 = 0.3  # of a feature that stands for a first letter
LEAST_SHARE = 0.4  # of what is written towards a letter, by one feature that absorbs it


def features(clt: CrossLayerTranscoder, given: Given) -> dict:
    """
    What single features are.

    `single_token` is the share of the features whose up to 8 strongest examples (the strongest token of a sequence
    each) are all the same token, of those with at least 4 examples.

    First letters (after Chanin et al. 2024, "A is for Absorption"): words of the vocabulary, each alone after the
    token that begins a text, and a linear probe for the first letter on what one MLP writes, the one where the probe
    is right most often on the words it was not fitted to (`probe_accuracy`). A letter's feature is the one that is
    active on its words with the best F1 on the words of the fit; `letter_f1` is its F1 on the others, mean over
    letters. Of those others where the probe is right, and of letters with an F1 of at least 0.3 in the fit,
    `absorption` is the share where the letter's feature is silent and one other feature writes most in the probe's
    direction: at least 0.4 of what all features write in it that do not write against it.

    Returns:
        `dict` of figures: `single_token` over features, `letter_f1` over letters, `probe_accuracy` and `absorption`
        over words; the last is left out where no feature stands for a letter.

    Raises:
        [`BlockSkipped`]: If there is too little text, or no feature with enough examples.
        ValueError: If the CLT does not fit the language model.
    """
    check_fit(clt.config, given.harvester)
    single = single_tokens(clt, given)
    if len(single) == 0:
        raise BlockSkipped(f"no feature is active in {LEAST_EXAMPLES} sequences; raise eval_tokens, or give more text")
    return {"single_token": figure(single.double(), given.seed), **first_letters(clt, given)}


@torch.no_grad()
def single_tokens(clt: CrossLayerTranscoder, given: Given) -> Tensor:
    """Of the features with enough examples, whether these are one token; bool (n,)."""
    settings = ExampleSettings(top=EXAMPLES, quantiles=1, per_quantile=1, before=0, after=0)
    layers = [LayerActivity(clt.config.num_features, settings) for _ in range(clt.config.num_layers)]
    activity = FeatureActivity(settings, layers)
    batches = sequences(given, QUICK_SEQUENCES if given.quick else SEQUENCES)
    with eval_mode(clt):
        for batch in tqdm(batches, "Finding examples", disable=not given.progress, leave=False):
            add_batch(clt, given.harvester, activity, batch, batch["input_ids"].numel())
    text = torch.cat(activity.text).flatten()
    found = []
    for layer in layers:
        places = layer.top.places[(layer.top.places >= 0).sum(dim=1) >= LEAST_EXAMPLES]
        tokens = torch.where(places >= 0, text[places.clamp_min(0)], text[places[:, :1]])
        found.append((tokens == tokens[:, :1]).all(dim=1))
    return torch.cat(found)


# -- first letters ----------------------------------------------------------------------------------------------------


def words_by_letter(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokens that are a space and three small letters or more, by the first letter; evenly from the vocabulary."""
    found = defaultdict(list)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece = tokenizer.convert_ids_to_tokens(token)
        word = text[1:] if text.startswith(" ") else text
        if piece[0] in "Ġ▁ " and len(word) >= 3 and word.isascii() and word.isalpha() and word.islower():
            found[word[0]].append(token)
    found = {letter: tokens for letter, tokens in sorted(found.items()) if len(tokens) >= LEAST_WORDS}
    return {
        letter: [tokens[i * len(tokens) // WORDS] for i in range(WORDS)] if len(tokens) > WORDS else tokens
        for letter, tokens in found.items()
    }


class Words:
    """
    W words, and a probe for their first letters.

    Attributes:
        letters (`list[str]`): C of them.
        inputs, outputs (`Tensor` of shape `(W, L, D)`): Of the MLPs, at the word.
        labels (`Tensor` of shape `(W,)`, int64): First letter of each word, by its place among the letters.
        fitted (`Tensor` of shape `(W,)`, bool): Words that the probe was fitted to, every other one of a letter.
        layer (`int`): Whose output the probe reads.
        directions (`Tensor` of shape `(D, C)`, float64): The probe: (y - mean) @ directions is largest at the letter.
        right (`Tensor` of shape `(W,)`, bool): Where that is so.
    """

    def __init__(self, given: Given):
        harvester, tokenizer = given.harvester, given.tokenizer
        by_letter = words_by_letter(tokenizer)
        self.letters = list(by_letter)
        tokens = torch.tensor([token for group in by_letter.values() for token in group], dtype=torch.long)
        sizes = torch.tensor([len(group) for group in by_letter.values()], dtype=torch.long)
        self.labels = torch.arange(len(sizes)).repeat_interleave(sizes)
        self.fitted = torch.cat([torch.arange(size) % 2 == 0 for size in sizes] or [torch.zeros(0, dtype=torch.bool)])
        if len(self.letters) < 2:
            return
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = torch.stack([torch.full_like(tokens, start), tokens], dim=1)
        parts = [harvester(part) for part in ids.split(WORDS_AT_A_TIME)]
        self.inputs, self.outputs = (torch.cat([part[kind][:, 1] for part in parts]) for kind in (0, 1))
        best = -1
        for layer in range(harvester.num_layers):
            directions, scores = self.probe(layer)
            right = scores.argmax(dim=1).cpu() == self.labels
            accuracy = right[~self.fitted].double().mean().item()
            if accuracy > best:
                best, self.layer, self.directions, self.right = accuracy, layer, directions, right

    def probe(self, layer: int) -> tuple[Tensor, Tensor]:
        """Directions (D, C) of a ridge regression to the letters on the outputs of a layer, and scores (W, C)."""
        y = self.outputs[:, layer].double()
        y = y - y[self.fitted].mean(dim=0)
        x = y[self.fitted]
        wanted = torch.nn.functional.one_hot(self.labels[self.fitted], len(self.letters)).to(x)
        covariance = x.T @ x
        penalty = PENALTY * covariance.trace() * torch.eye(len(covariance)).to(x)
        directions = torch.linalg.solve(covariance + penalty, x.T @ (wanted - wanted.mean(dim=0)))
        return directions, y @ directions


@torch.no_grad()
def first_letters(clt: CrossLayerTranscoder, given: Given) -> dict:
    """`letter_f1`, `probe_accuracy` and `absorption`; nothing for a vocabulary without words."""
    key = "words", given.harvester.input_hook, given.harvester.output_hook
    if key not in given.shared:
        given.shared[key] = Words(given)
    words = given.shared[key]
    if len(words.letters) < 2:
        return {}
    with eval_mode(clt):
        found = clt.encode_sparse(words.inputs.to(clt.device)).layers
    first = max(0, words.layer - clt.config.reach + 1)
    layers = range(first, words.layer + 1)  # that write to the probe's
    active = torch.cat([found[s].to_dense().cpu() > 0 for s in layers], dim=1)  # (W, G)
    is_letter = torch.nn.functional.one_hot(words.labels, len(words.letters)).bool()
    fit, test = words.fitted, ~words.fitted
    scores = f1(active[fit], is_letter[fit])  # (G, C)
    best, chosen = scores.max(dim=0)
    tested = f1(active[test][:, chosen], is_letter[test]).diagonal()
    seed = given.seed
    result = {"letter_f1": figure(tested, seed), "probe_accuracy": figure(words.right[test].double(), seed)}
    written = torch.cat([towards(clt, s, found[s], words) for s in layers], dim=1)  # (W, G)
    asked = test & words.right & (best >= LEAST_F1)[words.labels]
    if asked.any():
        own = chosen[words.labels]
        silent = ~active.gather(1, own[:, None]).squeeze(1)
        largest = written.max(dim=1).values
        took_over = silent & (largest > 0) & (largest >= LEAST_SHARE * written.clamp_min(0).sum(dim=1))
        result["absorption"] = figure(took_over[asked].double(), seed)
    return result


def f1(active: Tensor, is_letter: Tensor) -> Tensor:
    """F1 of each of G features as a sign of each of C letters, (G, C) float64, from bool (W, G) and (W, C)."""
    both = active.double().T @ is_letter.double()
    return 2 * both / (active.sum(dim=0)[:, None] + is_letter.sum(dim=0)).clamp_min(1)


def towards(clt: CrossLayerTranscoder, layer: int, found, words: Words) -> Tensor:
    """What each feature of a source layer writes on each word in the direction of its letter: (W, F) float64."""
    unique, places = found.indices.unique(return_inverse=True)
    rows = decoder_rows(clt, layer, unique, torch.float64)[:, words.layer - layer]
    scale = 1.0 if clt.std_out is None else clt.std_out[words.layer]
    along = (rows * scale) @ words.directions.to(rows.device)  # (u, C)
    values = found.values.double() * along[places, words.labels.to(rows.device)[found.rows]]
    return found.dense(values).cpu()


__all__ = ["features"]
