"""
What the scripts that measure a finished CLT share: the options that name the CLT, its language model and the held-out
text, and what these options mean.
"""

import argparse

from ..device import chosen_device, usual_model_dtype
from ..training.arguments import CLTTrainingArguments


DTYPES = ("float32", "bfloat16", "float16")
MODEL_DTYPE = "number format (default: on a GPU auto, on a CPU that of its files)"


def add_heldout_options(parser: argparse.ArgumentParser, eval_tokens: int = 8192) -> None:
    """
    Adds the options that [`load_clt`] and [`open_heldout`] read. Those that `scripts/train_clt.py` has too are named
    alike and have the same defaults, so that a CLT is measured on the text that its own training held out.

    Args:
        parser (`argparse.ArgumentParser`): The script's parser.
        eval_tokens (`int`, *optional*, defaults to 8192): Default of `--eval-tokens`.
    """
    clt = parser.add_argument_group("the CLT")
    clt.add_argument("clt", metavar="MODEL_OR_REPO", help="folder of a CLT, or its name on the Hub")
    clt.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of the CLT on the Hub")
    clt.add_argument("--clt-dtype", choices=DTYPES, help="number format of its decoders (default: its files')")

    add_text_options(parser, "the one that the CLT names", eval_tokens)
    parser.add_argument(
        "--batch-size", type=int, default=1024, metavar="N", help="tokens that the CLT sees at a time (default: 1024)"
    )


def add_text_options(
    parser: argparse.ArgumentParser, default_model: str, eval_tokens: int, prompts: int | None = 8
) -> None:
    """
    The options of [`add_heldout_options`] that name the language model and the text, what [`open_text`] reads;
    `prompts` is the default of `--store-batch-size-prompts`, None by the device.
    """
    model = parser.add_argument_group("the language model")
    model.add_argument("--model", metavar="TEXT", help=f"Hub name or folder (default: {default_model})")
    model.add_argument("--model-revision", metavar="TEXT", help="branch, tag or commit of --model on the Hub")
    model.add_argument("--model-dtype", choices=["auto", *DTYPES], help=MODEL_DTYPE)
    model.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository brings")
    model.add_argument("--device", metavar="TEXT", help="cpu, cuda or cuda:n (default: a GPU when there is one)")

    text = parser.add_argument_group("the text, of which training holds out the first documents")
    text.add_argument("--dataset", metavar="TEXT", help="Hub name, file or folder of text; required")
    text.add_argument("--dataset-config", metavar="TEXT", help="configuration of a Hub dataset")
    text.add_argument("--dataset-split", default="train", metavar="TEXT", help="default: %(default)s")
    text.add_argument("--dataset-text-column", default="text", metavar="TEXT", help="default: %(default)s")
    text.add_argument("--max-samples", type=int, metavar="N", help="use the first N documents only")
    text.add_argument(
        "--eval-tokens", type=int, default=eval_tokens, metavar="N", help="held-out tokens (default: %(default)s)"
    )
    text.add_argument("--context-size", type=int, default=128, metavar="N", help="tokens per block (default: 128)")
    text.add_argument(
        "--prepend-bos", action=argparse.BooleanOptionalAction, help="BOS in front of each block (default: if any)"
    )
    text.add_argument(
        "--exclude-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave special tokens out",
    )
    text.add_argument(
        "--store-batch-size-prompts",
        type=int,
        default=prompts,
        metavar="N",
        help=f"blocks per forward pass (default: {prompts or '8; on a GPU up to 256, by its memory'})",
    )
    parser.set_defaults(streaming=True, stream_retries=CLTTrainingArguments.stream_retries)
    text.add_argument("--disable-progress-bar", action="store_true", help="show no progress bars")


def load_clt(options: argparse.Namespace):
    """
    The CLT that the options name, on their device, in eval mode.

    Raises:
        ValueError: For options that could not be met later on, and if the CLT cannot be loaded.
    """
    from ..modeling_clt import CrossLayerTranscoder

    if options.batch_size < 1:
        raise ValueError(f"batch_size={options.batch_size} is below 1; give the number of tokens that fit in memory")
    if options.dataset is None:
        raise ValueError("dataset is missing; give --dataset")
    if options.eval_tokens < 1:
        raise ValueError(f"eval_tokens={options.eval_tokens} is below 1; give some thousand tokens")
    kwargs = {"revision": options.revision} if options.revision is not None else {}
    if options.clt_dtype is not None:
        kwargs["dtype"] = options.clt_dtype
    device = chosen_device(options.device)
    try:
        return CrossLayerTranscoder.from_pretrained(options.clt, **kwargs).to(device).eval()
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"CLT {str(options.clt)!r} cannot be loaded; give its folder or its name on the Hub ({reason})"
        ) from error


def open_heldout(clt, options: argparse.Namespace):
    """
    The language model of a CLT and the held-out text that the options name.

    Returns:
        A [`Harvester`] at the CLT's hooks and on its device, and a [`TokenStream`] of the first `eval_tokens` counted
        tokens of the text.

    Raises:
        ValueError: If no language model is named, if one of the two cannot be loaded, or if they do not fit the CLT or
            the options.
    """
    from ..harvest.harvester import Harvester, check_context_size, check_fit, load_language_model
    from ..harvest.tokens import open_text

    name, revision = options.model, options.model_revision
    if name is None:
        name = clt.config.base_model_name_or_path
        revision = clt.config.base_model_revision if revision is None else revision
    if name is None:
        raise ValueError("model is missing: this CLT does not name its language model; give --model")
    model, tokenizer = load_language_model(
        name,
        revision=revision,
        dtype=options.model_dtype or usual_model_dtype(clt.device),
        trust_remote_code=options.trust_remote_code,
        device=clt.device,
    )
    check_context_size(model.config, options.context_size)
    harvester = Harvester(model, clt.config.feature_input_hook, clt.config.feature_output_hook)
    check_fit(clt.config, harvester)
    return harvester, open_text(options, tokenizer, heldout=True)


def settings_of(options: argparse.Namespace, clt) -> dict:
    """What a figure depends on, for the record: the CLT, its language model, the text, and how it was cut."""
    names = ("clt", "revision", "dataset", "dataset_config", "dataset_split", "dataset_text_column", "max_samples")
    names += ("eval_tokens", "context_size", "prepend_bos", "exclude_special_tokens", "model_dtype", "clt_dtype")
    settings = {name: getattr(options, name) for name in names}
    settings["model"] = options.model or clt.config.base_model_name_or_path
    return settings


__all__ = ["add_heldout_options", "load_clt", "open_heldout", "settings_of"]
