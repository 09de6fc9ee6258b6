"""What is to be traced, from words: prompts, their tokens, and the tokens that are targets."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..files import read_json
from .graph import FeatureTarget, Target, TokenTarget


RESERVED = ("graph", "graph-metadata", "contrast")  # names of other files beside {slug}.json
SLUG = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]*")


@dataclass
class Prompt:
    """A prompt, the name of its files, and the next tokens that are its targets (none: the most probable)."""

    text: str
    slug: str
    targets: list[str] = field(default_factory=list)


def slug_of(text: str) -> str:
    """A name for files out of a text: small letters, digits and dashes, at most 40; without special tokens."""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"<[^<> ]*>", "", text.lower())).strip("-") or "prompt"
    slug = slug if len(slug) <= 40 else slug[:41].rpartition("-")[0] or slug[:40]  # whole words
    return f"a-{slug}" if slug in RESERVED else slug


def read_groups(path: Path, num_layers: int) -> list[list[tuple[int, int, int]]]:
    """
    The groups in a file that Save on a graph's page wrote: (layer, position, feature) of each feature in them; nodes
    of other kinds are left out.

    Raises:
        ValueError: For a file that is something else, or has no group with a feature.
    """
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("supernodes"), list):
        raise ValueError(f"groups={str(path)!r} has no supernodes; give a file that Save on a graph's page wrote")
    groups = []
    for _, *ids in record["supernodes"]:
        places = [tuple(map(int, node.split("_"))) for node in ids if re.fullmatch(r"\d+_\d+_\d+", node)]
        groups.append([(layer, position, feature) for layer, feature, position in places if layer < num_layers])
    if not any(groups):
        raise ValueError(f"groups={str(path)!r} has no group with a feature; make one on the page, and save it")
    return [group for group in groups if group]


def read_prompts(path: Path, targets: Sequence[str] = ()) -> list[Prompt]:
    """
    The prompts of a file with a `{"prompt": ..., "slug": ..., "targets": [...]}` per line, of which the last two may
    be left out: slugs are then made from the number of the line and the text, and the targets are `targets`.

    Raises:
        ValueError: For a line that is something else, with its number; if two have the same slug, or there is none.
    """
    prompts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f'{where} is not JSON ({error}); give {{"prompt": TEXT}}') from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f'{where} has no text "prompt"; give {{"prompt": TEXT, "slug": NAME, "targets": [TEXT]}}')
        slug = record.get("slug") or f"{number:02}-{slug_of(record['prompt'])}"
        words = record.get("targets") or list(targets)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{where}: targets={words!r} is no list of texts")
        if not isinstance(slug, str) or not SLUG.fullmatch(slug) or slug in RESERVED:
            raise ValueError(f"{where}: slug={slug!r} names no file; give letters, digits, _, . and - ")
        if slug in prompts:
            raise ValueError(f"{where}: slug={slug!r} was there before; give each prompt its own")
        prompts[slug] = Prompt(record["prompt"], slug, words)
    if not prompts:
        raise ValueError(f"prompts={str(path)!r} is empty; give a prompt per line")
    return list(prompts.values())


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, config: PreTrainedConfig, raw: bool = False, chat: bool = False
) -> Tensor:
    """
    The ids of a prompt, (P,), as the tokenizer gives them to the language model of `config`.

    Args:
        raw (`bool`): Without the special tokens that the tokenizer would add.
        chat (`bool`): The text is what a user says, in the chat template, up to where the answer begins.

    Raises:
        ValueError: Without a chat template, and for a prompt of fewer than 2 tokens or more than there are positions.
    """
    shown = text
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("chat: the tokenizer of this language model has no chat template; leave chat out")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=not (raw or chat), verbose=False).input_ids
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or max(2, len(ids))
    if not 2 <= len(ids) <= limit:
        raise ValueError(f"prompt {shown[:60]!r} has {len(ids)} tokens; give one of 2 to {limit}")
    return torch.tensor(ids)


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The token that is this text; raises ValueError, which shows how it splits, where there is none."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    # SentencePiece writes the space in front of a word as ▁, and may split a text that begins with one.
    whole = ids[0] if len(ids) == 1 else tokenizer.get_vocab().get(text.replace(" ", "▁"))
    if whole is None:
        parts = ", ".join(repr(tokenizer.decode([token])) for token in ids) or "nothing"
        raise ValueError(f"target {text!r} is {len(ids)} tokens ({parts}); give one that is a single token")
    return whole


def chosen_targets(
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str] = (),
    features: Sequence[Sequence[int]] = (),
    contrast: Sequence[str] | None = None,
) -> list[Target] | None:
    """
    The targets that are named: next tokens and features (layer, position, feature), or of a contrast the difference of
    two next tokens and each of them; None where nothing is. Raises ValueError as [`single_token`].
    """
    if contrast is None:
        targets = [TokenTarget(single_token(tokenizer, word)) for word in words]
        return targets + [FeatureTarget(*feature) for feature in features] or None
    first, second = (single_token(tokenizer, word) for word in contrast)
    if first == second:
        raise ValueError(f"contrast: {contrast[0]!r} and {contrast[1]!r} are the same token; give two")
    return [TokenTarget(first, minus=second), TokenTarget(first), TokenTarget(second)]


__all__ = ["Prompt", "chosen_targets", "prompt_tokens", "read_prompts", "single_token", "slug_of"]
