"""
The command line and the YAML file of a training run: both fill [`CLTTrainingArguments`] and [`CLTConfig`].

A field's type says what a flag accepts, its help text what `--help` prints; nothing is listed a second time.
"""

import argparse
import difflib
import os
import re
import sys
import textwrap
from dataclasses import fields
from typing import Any

import yaml

from ..command import OneLineParser
from ..configuration_clt import ACTIVATION_DEFAULTS, CLT_CONFIG_HELP, CLTConfig
from .arguments import CACHED, CLTTrainingArguments, training_options
from .options import Option, as_text, check_value, make_option, parse_text


GROUPS = {
    "model": "the language model whose activations are read",
    "clt": "the cross-layer transcoder",
    "text": "text",
    "buffer": "activation buffer and batches",
    "normalisation": "normalisation and initial biases",
    "optimisation": "optimisation",
    "bookkeeping": "output, logging, evaluation, checkpoints",
    "trackers": "trackers",
    "hub": "pushing to the Hub",
}


# CLTConfig's fields whose value, when it is not given, is found by build_config.
FOUND_DEFAULTS = {
    "base_model_name_or_path": "as --model",
    "base_model_revision": "as --model-revision",
    "num_layers": "from the language model",
    "d_model": "from the language model",
    "num_features": "none; required",
    "sparsity_lambda": "by activation function and width",
    "feature_input_hook": "by the language model",
    "feature_output_hook": "by the language model",
}


def config_options() -> list[Option]:
    """The options that are fields of `CLTConfig`: those that `CLT_CONFIG_HELP` explains."""
    options = []
    for entry in fields(CLTConfig):
        if entry.name not in CLT_CONFIG_HELP:
            continue
        if entry.name in FOUND_DEFAULTS:
            default = FOUND_DEFAULTS[entry.name]
        elif entry.name in ACTIVATION_DEFAULTS["relu"]:
            default = ", ".join(
                f"{name} {as_text(values[entry.name])}" for name, values in ACTIVATION_DEFAULTS.items()
            )
        else:
            default = as_text(entry.default)
        options.append(make_option(entry.name, entry.type, "clt", CLT_CONFIG_HELP[entry.name], default))
    return options


# The YAML file.


class SettingsLoader(yaml.SafeLoader):
    """
    YAML 1.2's reading of plain words, where PyYAML follows 1.1: `1e-4` is a number, only true and false are switches
    (so that `mixed_precision: no` is the text "no"), and dates are text. A key given twice is refused.
    """

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is given twice; keep one of the two")
        return super().construct_mapping(node, deep)


SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _read_settings(path: str, options: dict[str, Option]) -> dict[str, Any]:
    """Reads a YAML file of settings into field -> checked value."""
    if not os.path.isfile(path):
        raise ValueError(
            f"settings file {path!r} does not exist; give an existing YAML file, or options as --name value"
        )
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.load(file, Loader=SettingsLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"settings file {path!r} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"settings file {path!r}: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(
            f"settings file {path!r} holds a {type(settings).__name__}; write lines of the form name: value"
        )
    values = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise ValueError(f"settings file {path!r}: unknown key {key!r}; {_nearest(name, options)}")
        if name in values:
            raise ValueError(f"settings file {path!r}: {name} is given twice; keep one of the two")
        if options[name].kind is bool and isinstance(value, str):
            value = parse_text(options[name], value)
        if value == "none" and options[name].kind in (bool, int, float):
            value = None
        try:
            values[name] = check_value(options[name], value)
        except ValueError as error:
            raise ValueError(f"settings file {path!r}: {error}") from None
    return values


def _nearest(name: str, options: dict[str, Option], flags: bool = False) -> str:
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if not close:
        return "see --help for the options"
    return f"did you mean {options[close[0]].flag if flags else close[0]}?"


# The command line.

DESCRIPTION = """\
Train a cross-layer transcoder (CLT) on a language model.

  hf-clt train --model openai-community/gpt2 --dataset monology/pile-uncopyrighted --num-features 6144 \\
      --activation-fn batchtopk --k 16 --output-dir clt-gpt2

  hf-clt train settings.yaml --learning-rate 4e-4

The settings file is YAML, one "name: value" per line with the names below; options override it. Underscores are as
good as dashes (--num_features). A switch is turned on by --name or --name true and off by --no-name or --name false.
Several processes: accelerate launch --multi_gpu --num_processes 8 -m hf_clt train ...
"""
EPILOG = """\
Exit status: 0 when the CLT is finished; 2 after an error, said in one line; 130 when Ctrl-C (SIGINT) or SIGTERM, which
clusters send before they take a machine away, stopped the run: after the step it was in, and with a checkpoint if it
had made one. What was stopped, killed or failed goes on with --resume-from-checkpoint latest, to the same result.
HF_CLT_DEBUG=1 in the environment shows the traceback of an error.
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=119)

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False)  # option names stay whole


def _build_parser(options: dict[str, Option]) -> argparse.ArgumentParser:
    parser = OneLineParser(
        usage="%(prog)s [settings.yaml] --model NAME --dataset NAME --num-features N [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_HelpFormatter,
    )
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for option in options.values():
        off = f" --no-{option.flag[2:]} turns it off." if option.kind is bool and option.default != "false" else ""
        # Where a default is none, the help says what that means.
        default = "" if option.default == "none" and option.optional else f" (default: {option.default})"
        text = f"{option.help}{off}{default}".replace("%", "%%")
        metavar = {bool: "true|false", int: "N", float: "X", str: "TEXT", list: "NAME"}[option.kind]
        if option.choices:
            metavar = "{" + ",".join(option.choices) + "}"
        # Values are read by parse_text and not by argparse, so that flags and YAML give the same messages.
        extra = {bool: {"nargs": "?", "const": "true"}, list: {"nargs": "+"}}.get(option.kind, {})
        groups[option.group].add_argument(option.flag, dest=option.name, metavar=metavar, help=text, **extra)
    return parser


def _normalise_argv(argv: list[str], options: dict[str, Option]) -> list[str]:
    """One spelling for argparse: `--a_b` becomes `--a-b`, `--no-x` `--x=false`, and `--x -1e-3` `--x=-1e-3`."""
    normalised = []
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            flag = flag.replace("_", "-")
            negated = options.get(flag.removeprefix("--no-").replace("-", "_"))
            if flag.startswith("--no-") and negated is not None and negated.kind is bool:
                if equals:
                    raise ValueError(f"{token} is ambiguous; write {flag} or {negated.flag}={value}")
                flag, equals, value = negated.flag, "=", "false"
            normalised.append(flag + equals + value)
        elif normalised and re.match(r"-[.\d]", token) and re.fullmatch(r"--[^=]+", normalised[-1]):
            # argparse takes -1e-3 for an option.
            normalised[-1] += "=" + token
        else:
            normalised.append(token)
    return normalised


def parse_train_args(argv: list[str] | None = None) -> tuple[CLTTrainingArguments, dict[str, Any]]:
    r"""
    Reads the command line of `hf-clt train`, with a YAML file of settings as an optional first argument.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` when None.

    Returns:
        The training arguments, and the `CLTConfig` fields that were given, by name. Fields that were not given are
        absent, so that the configuration's own defaults, which depend on the activation function, apply.

    Raises:
        ValueError: for an unknown option or key (the nearest known one is named), a value of the wrong type or out of
            range, or a missing required option.
        SystemExit: after printing `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    training = {option.name: option for option in training_options()}
    options = training | {option.name: option for option in config_options()}
    parser = _build_parser(options)
    settings_file = argv.pop(0) if argv and not argv[0].startswith("-") else None
    flags, unknown = parser.parse_known_args(_normalise_argv(argv, options))
    for token in unknown:
        if token.startswith("-"):
            flag = token.partition("=")[0]
            name = flag.lstrip("-").replace("-", "_")
            raise ValueError(f"unknown option {flag}; {_nearest(name, options, flags=True)}")
    if unknown:
        raise ValueError(
            f"unexpected argument {unknown[0]!r}; a settings file comes first, and a value after its option"
        )

    values = _read_settings(settings_file, options) if settings_file is not None else {}
    for name, text in vars(flags).items():
        option = options[name]
        values[name] = check_value(option, _parse_list(text) if option.kind is list else parse_text(option, text))

    required = ("dataset",) if values.get("init_from") else ("model", "dataset", "num_features")
    if values.get("activation_cache"):
        required = tuple(name for name in required if name == "num_features")
    for name in required:
        if values.get(name) is None:
            raise ValueError(f"{name} is missing; give {options[name].flag} (see --help)")
    args = CLTTrainingArguments(**{name: value for name, value in values.items() if name in training})
    for name in CACHED if args.activation_cache is not None else ():
        # Where a value is given that is the default, the class cannot tell it from one that is not given.
        if name in values and values[name] != getattr(args, name):
            raise ValueError(
                f"{name}={values[name]!r}, but activation_cache={args.activation_cache!r} was written with "
                f"{getattr(args, name)!r}; leave {name} out, or write another cache"
            )
    return args, {name: value for name, value in values.items() if name not in training}


def _parse_list(texts: list[str]) -> list[str]:
    """`--report-to a b` and `--report-to a,b` are the same."""
    return [item for text in texts for item in text.split(",") if item]


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
    if os.path.isdir(args.model) and not os.path.isfile(os.path.join(args.model, "config.json")):
        raise OSError(f"model={args.model!r} has no config.json; give a folder written by save_pretrained")
    try:
        config = AutoConfig.from_pretrained(
            args.model, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"model={args.model!r} cannot be loaded; check the name and the connection ({reason})"
        ) from error
    return config.get_text_config()


__all__ = ["SettingsLoader", "build_config", "parse_train_args"]
