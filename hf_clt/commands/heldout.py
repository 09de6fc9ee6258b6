"""
What the commands that read a language model or a CLT share: options that are fields of a dataclass, those that name
the CLT, its language model and the held-out text, and what these options mean.
"""

import argparse
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, get_args, get_type_hints

from ..device import chosen_device, usual_model_dtype
from ..files import one_line
from ..training.arguments import CLTTrainingArguments
from ..training.options import kind_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..harvest.harvester import Harvester
    from ..harvest.tokens import TokenStream
    from ..modeling_clt import CrossLayerTranscoder

MODEL_FIELDS = ("model", "model_revision", "model_dtype", "trust_remote_code", "device")
TEXT_FIELDS = ("dataset", "dataset_config", "dataset_split", "dataset_text_column", "max_samples", "eval_tokens")
TEXT_FIELDS += ("context_size", "prepend_bos", "exclude_special_tokens", "store_batch_size_prompts")
TEXT_FIELDS += ("disable_progress_bar",)
MODEL_HELP = "Hub name or local folder of the language model. None: the one that the CLT names."


def add_fields(
    group: argparse.ArgumentParser | argparse._ArgumentGroup,
    names: Iterable[str],
    defaults: dict | None = None,
    helps: dict | None = None,
) -> None:
    """
    Adds fields of [`CLTTrainingArguments`] as options, with their types, and their defaults and help texts where
    `defaults` and `helps` have no others. What is measured is thus named and cut like what was trained on.

    Args:
        group: The parser or a group of it.
        names (`Iterable[str]`): The fields.
        defaults, helps (`dict`, *optional*): Other defaults and help texts, by field.
    """
    hints = get_type_hints(CLTTrainingArguments)
    by_name = {entry.name: entry for entry in fields(CLTTrainingArguments)}
    for name in names:
        kind, _ = kind_of(hints[name])
        default = (defaults or {}).get(name, by_name[name].default)
        text = (helps or {}).get(name, by_name[name].metadata["help"]).replace("%", "%%")
        if default is not None:
            text += " (default: %(default)s)"
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        elif choices := get_args(kind):
            group.add_argument(flag, choices=choices, default=default, help=text)
        else:
            metavar = "N" if kind is int else "TEXT"
            group.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)


def add_text_options(parser: argparse.ArgumentParser, defaults: dict | None = None, helps: dict | None = None) -> None:
    """The options that name the language model and the text, what [`open_text`] reads."""
    add_fields(parser.add_argument_group("the language model"), MODEL_FIELDS, defaults, helps)
    text = parser.add_argument_group("the text, of which training holds out the first documents")
    add_fields(text, TEXT_FIELDS, defaults, helps)
    parser.set_defaults(streaming=True, stream_retries=CLTTrainingArguments.stream_retries)


def add_clt_options(parser: argparse.ArgumentParser, dtype: str | None = None) -> argparse._ArgumentGroup:
    """The options that name the CLT, what [`load_named_clt`] reads, `dtype` its default format; gives their group."""
    clt = parser.add_argument_group("the CLT")
    clt.add_argument("clt", metavar="MODEL_OR_REPO", help="folder of a CLT, or its name on the Hub")
    clt.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of the CLT on the Hub")
    dtypes = ("float32", "bfloat16", "float16")
    usual = "its files'" if dtype is None else dtype
    text = f"number format of its decoders (default: {usual})"
    clt.add_argument("--clt-dtype", choices=dtypes, default=dtype, help=text)
    return clt


def add_heldout_options(parser: argparse.ArgumentParser, dtype: str | None = None) -> None:
    """Adds the options that [`load_clt`] and [`open_heldout`] read; `dtype` is the CLT's default number format."""
    add_clt_options(parser, dtype)
    helps = {
        "model": MODEL_HELP,
        "eval_tokens": "Held-out tokens, taken from the first documents of the split.",
        "store_batch_size_prompts": "Blocks of --context-size tokens per forward pass of the language model.",
        "batch_size": "Tokens that the CLT sees at a time.",
    }
    add_text_options(parser, {"store_batch_size_prompts": 8}, helps)
    add_fields(parser, ["batch_size"], helps=helps)


def load_clt(options: argparse.Namespace) -> "CrossLayerTranscoder":
    """
    The CLT that the options name, on their device, in eval mode.

    Raises:
        ValueError: For options that could not be met later on, and if the CLT cannot be loaded.
    """
    if options.batch_size < 1:
        raise ValueError(f"batch_size={options.batch_size} is below 1; give the number of tokens that fit in memory")
    if options.dataset is None:
        raise ValueError("dataset is missing; give --dataset")
    if options.eval_tokens < 1:
        raise ValueError(f"eval_tokens={options.eval_tokens} is below 1; give some thousand tokens")
    return load_named_clt(options).to(chosen_device(options.device))


def load_named_clt(options: argparse.Namespace, **kwargs) -> "CrossLayerTranscoder":
    """The CLT that the options name, in eval mode, on the CPU; `kwargs` for `from_pretrained`. Errors as above."""
    from ..modeling_clt import CrossLayerTranscoder

    kwargs |= {"revision": options.revision} if options.revision is not None else {}
    kwargs |= {"dtype": options.clt_dtype} if options.clt_dtype is not None else {}
    chosen_device(options.device)  # a wrong one is found before a long download
    try:
        return CrossLayerTranscoder.from_pretrained(options.clt, **kwargs).eval()
    except OSError as error:
        raise ValueError(
            f"CLT {str(options.clt)!r} cannot be loaded; give its folder or its name on the Hub ({one_line(error)})"
        ) from error


def load_model_of(
    clt: "CrossLayerTranscoder", options: argparse.Namespace
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """
    The language model that the options or else the CLT name, on their device, and its tokenizer.

    Raises:
        ValueError: If neither names one, or it cannot be loaded.
    """
    from ..harvest.harvester import load_language_model

    name, revision = options.model, options.model_revision
    if name is None:
        name = clt.config.base_model_name_or_path
        revision = clt.config.base_model_revision if revision is None else revision
    if name is None:
        raise ValueError("model is missing: this CLT does not name its language model; give --model")
    device = chosen_device(options.device)
    return load_language_model(
        name,
        revision=revision,
        dtype=options.model_dtype or usual_model_dtype(device),
        trust_remote_code=options.trust_remote_code,
        device=device,
    )


def open_heldout(clt: "CrossLayerTranscoder", options: argparse.Namespace) -> "tuple[Harvester, TokenStream]":
    """
    The language model of a CLT and the held-out text that the options name.

    Returns:
        A [`Harvester`] at the CLT's hooks and on its device, and a [`TokenStream`] of the first `eval_tokens` counted
        tokens of the text.

    Raises:
        ValueError: If no language model is named, if one of the two cannot be loaded, or if they do not fit the CLT or
            the options.
    """
    from ..harvest.harvester import Harvester, check_context_size, check_fit
    from ..harvest.tokens import open_text

    model, tokenizer = load_model_of(clt, options)
    check_context_size(model.config, options.context_size)
    harvester = Harvester(model, clt.config.feature_input_hook, clt.config.feature_output_hook)
    check_fit(clt.config, harvester)
    return harvester, open_text(options, tokenizer, heldout=True)


def settings_of(options: argparse.Namespace, clt: "CrossLayerTranscoder") -> dict:
    """What a figure depends on, for the record: the CLT, its language model, the text, and how it was cut."""
    names = ("clt", "revision", "dataset", "dataset_config", "dataset_split", "dataset_text_column", "max_samples")
    names += ("eval_tokens", "context_size", "prepend_bos", "exclude_special_tokens", "model_dtype", "clt_dtype")
    settings = {name: getattr(options, name) for name in names}
    settings["model"] = options.model or clt.config.base_model_name_or_path
    return settings
