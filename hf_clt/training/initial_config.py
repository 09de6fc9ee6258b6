"""The configuration of a new CLT: what was given, completed from the language model."""

import os
from typing import Any

from ..configuration_clt import CLTConfig
from ..files import one_line
from .arguments import CLTTrainingArguments


def build_config(args: CLTTrainingArguments, config_kwargs: dict[str, Any]) -> CLTConfig:
    r"""
    Completes the configuration of a new CLT from its language model, of which only `config.json` is read.

    Args:
        args: the training arguments; `model`, `model_revision` and `trust_remote_code` are used.
        config_kwargs: the given `CLTConfig` fields. Number of layers, width, hooks, and name and revision of the base
            model are filled in where they are absent or None.

    Returns:
        The configuration.

    Raises:
        ValueError: if `model` or `num_features` is missing, if the language model does not say its number of layers
            or width, or if a given number of layers or width is not the language model's.
        OSError: if the language model cannot be found.
    """
    if args.model is None:
        raise ValueError("model is missing; give the Hub name or folder of a language model")
    given = {name: value for name, value in config_kwargs.items() if value is not None}
    if "num_features" not in given:
        raise ValueError(
            "num_features is missing; give the number of features per layer, such as 8 x the model's width"
        )
    found = _facts_of_model(args)
    for name in ("num_layers", "d_model"):
        if given.setdefault(name, found[name]) != found[name]:
            raise ValueError(
                f"{name}={given[name]} does not fit model={args.model!r}, which has {found[name]}; leave {name} out"
            )
    for name in ("feature_input_hook", "feature_output_hook"):
        given.setdefault(name, found[name])
    # A revision is one of the repository that is named, which need not be the folder that is read.
    if "base_model_name_or_path" not in given:
        given["base_model_name_or_path"] = args.model
        if given.setdefault("base_model_revision", args.model_revision) != args.model_revision:
            raise ValueError(
                f"base_model_revision={given['base_model_revision']!r} is not the revision that is read, "
                f"model_revision={args.model_revision!r}; give model_revision alone"
            )
    return CLTConfig(**given)


def _facts_of_model(args: CLTTrainingArguments) -> dict[str, Any]:
    """Number of layers, width and hooks: of the activation cache, or of the language model, with its usual hooks."""
    if args.activation_cache is not None:
        from ..harvest.cache import read_manifest

        return read_manifest(args.activation_cache)
    model_config = _load_model_config(args)
    found = {}
    for name, attribute in (("num_layers", "num_hidden_layers"), ("d_model", "hidden_size")):
        found[name] = getattr(model_config, attribute, None)
        if found[name] is None:
            raise ValueError(
                f"model={args.model!r} does not say its {attribute} in config.json; choose a language model"
            )
    from ..harvest.sites import default_hooks  # brings in nnsight, which --help can do without

    found["feature_input_hook"], found["feature_output_hook"] = default_hooks(model_config.model_type)
    return found


def _load_model_config(args: CLTTrainingArguments):
    """The language model's own configuration (the text part where a model has several)."""
    from transformers import AutoConfig

    looks_local = args.model.startswith((".", "/", "~")) or args.model.count("/") > 1
    if looks_local and not os.path.isdir(args.model):
        raise OSError(f"model={args.model!r} is no folder; give a Hub name or an existing folder")
    try:
        config = AutoConfig.from_pretrained(
            args.model, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise OSError(
            f"model={args.model!r} cannot be loaded; check the name and the connection ({one_line(error)})"
        ) from error
    return config.get_text_config()
