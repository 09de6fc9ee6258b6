"""
The command line and the YAML file of a training run: both fill [`CLTTrainingArguments`] and [`CLTConfig`], whose
fields, types and help texts are the options.
"""

import argparse
import difflib
import re
import sys
import textwrap
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..command import OneLineParser
from ..configuration_clt import ACTIVATION_DEFAULTS, CLT_CONFIG_HELP, CLTConfig
from ..files import one_line
from .arguments import CACHED, CLTTrainingArguments
from .options import as_text, check_value, kind_of


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


class Option(NamedTuple):
    """A field as an option: its group, type and help, and its default as `--help` tells it."""

    group: str
    hint: Any
    help: str
    default: str


def all_options() -> dict[str, Option]:
    """Every option by the name of its field, those of the CLT first."""
    options, hints = {}, {entry.name: entry.type for entry in fields(CLTConfig)}
    usual = {entry.name: as_text(entry.default) for entry in fields(CLTConfig) if entry.name in CLT_CONFIG_HELP}
    for name in ACTIVATION_DEFAULTS["relu"]:
        usual[name] = ", ".join(f"{fn} {as_text(values[name])}" for fn, values in ACTIVATION_DEFAULTS.items())
    for name, default in (usual | FOUND_DEFAULTS).items():
        options[name] = Option("clt", hints[name], CLT_CONFIG_HELP[name], default)
    hints = get_type_hints(CLTTrainingArguments)
    for entry in fields(CLTTrainingArguments):
        default = entry.default_factory() if entry.default is MISSING else entry.default
        options[entry.name] = Option(
            entry.metadata["group"], hints[entry.name], entry.metadata["help"], as_text(default)
        )
    return options


# The YAML file.


class SettingsLoader(yaml.SafeLoader):
    """
    YAML 1.2's reading of plain words, where PyYAML follows 1.1: `1e-4` is a number, only true and false are switches
    (so that `mixed_precision: no` is the text "no"), and dates are text. A key given twice is refused.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [str(self.construct_object(key, deep=True)).replace("-", "_") for key, _ in node.value]
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


def read_settings(path: str, options: dict[str, Option]) -> list[str]:
    """The settings of a YAML file as options of the command line."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.load(file, Loader=SettingsLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid YAML: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"it holds a {type(settings).__name__}; write lines of the form name: value")
    words = []
    for name, value in settings.items():
        option = options.get(str(name).replace("-", "_"))
        if value is None and option is not None and kind_of(option.hint)[0] is str:
            continue  # as if it were not there, since "none" may be a name
        if isinstance(value, dict):
            raise ValueError(f"{name}={value!r} is not valid; write lines of the form name: value")
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(as_text, values)] if len(values) > 1 else [f"--{name}={as_text(value)}"]
    return words


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


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option once, with dashes, and keeps option names in texts whole."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=119)

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _format_action_invocation(self, action):
        flags = [flag for flag in action.option_strings if "_" not in flag]
        return ", ".join(flags) + (f" {self._format_args(action, None)}" if action.nargs != 0 else "")


class TrainParser(OneLineParser, HfArgumentParser):
    """An option per field, in both spellings. What is not given is absent from what it returns."""


def make_parser(options: dict[str, Option]) -> TrainParser:
    """The parser, a group of options per entry of `GROUPS`."""
    groups = []
    for group, title in GROUPS.items():
        members = [_dataclass_field(name, option) for name, option in options.items() if option.group == group]
        groups.append(make_dataclass(group, members, namespace={"_argument_group_name": title}))
    parser = TrainParser(
        groups,
        usage="%(prog)s [settings.yaml] --model NAME --dataset NAME --num-features N [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser._negative_number_matcher = re.compile(r"-[.\d]")  # -1e-3 is a value, which Python 3.11 does not know
    for name, option in options.items():
        if kind_of(option.hint)[0] is bool:
            flags = {f"--no_{name}", f"--no-{name.replace('_', '-')}"}
            absent = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            parser.add_argument(*sorted(flags), dest=name, action="store_false", **absent)
    return parser


def _dataclass_field(name: str, option: Option) -> tuple:
    """Name, type and field of an option for `HfArgumentParser`."""
    kind, optional = kind_of(option.hint)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    metavar = {bool: "true|false", int: "N", float: "X", str: "TEXT"}.get(kind, "NAME")
    off = f" --no-{name.replace('_', '-')} turns it off." if kind is bool and option.default != "false" else ""
    default = "" if option.default == "none" and optional else f" (default: {option.default})"
    metadata = {
        "help": f"{option.help}{off}{default}".replace("%", "%%"),
        "metavar": "{" + ",".join(choices) + "}" if choices else metavar,
    }
    if choices and optional:
        kind = Literal[(*choices, "none")]
    elif optional and kind in (int, float):
        kind = _number_or_none(kind)
    # Of a list HfArgumentParser looks at the factory alone.
    absent = {"default_factory": lambda: argparse.SUPPRESS} if kind == list[str] else {"default": argparse.SUPPRESS}
    return name, kind, field(**absent, metadata=metadata)


def _number_or_none(kind: type):
    def read(text: str) -> int | float | None:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # for argparse's message
    return read


def parse_values(parser: TrainParser, options: dict[str, Option], words: list[str]) -> dict[str, Any]:
    """The values of the options that are given, by field; raises ValueError for one that is unknown or not valid."""
    flags, unknown = parser.parse_known_args(words)
    for word in unknown:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            raise ValueError(f"unexpected argument {word!r}; a settings file comes first, a value after its option")
        close = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), options, n=1, cutoff=0.5)
        remedy = f"did you mean --{close[0].replace('_', '-')}?" if close else "see --help for the options"
        raise ValueError(f"unknown option {flag}; {remedy}")
    values = {}
    for name, value in vars(flags).items():
        if isinstance(value, list):  # `--report-to a b` and `--report-to a,b` are the same
            value = [item for text in value for item in text.split(",") if item]
        values[name] = check_value(name, value, options[name].hint)
    return values


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
    options = all_options()
    parser = make_parser(options)
    values = {}
    if argv and not argv[0].startswith("-"):
        path = argv.pop(0)
        try:
            values = parse_values(parser, options, read_settings(path, options))
        except (OSError, ValueError) as error:
            raise ValueError(f"settings file {path!r}: {error}") from None
    values |= parse_values(parser, options, argv)
    required = ("dataset",) if values.get("init_from") else ("model", "dataset", "num_features")
    if values.get("activation_cache"):
        required = tuple(name for name in required if name == "num_features")
    for name in required:
        if values.get(name) is None:
            raise ValueError(f"{name} is missing; give --{name.replace('_', '-')} (see --help)")
    args = CLTTrainingArguments(**{name: value for name, value in values.items() if name not in CLT_CONFIG_HELP})
    for name in CACHED if args.activation_cache is not None else ():
        # Where a value is given that is the default, the class cannot tell it from one that is not given.
        if name in values and values[name] != getattr(args, name):
            raise ValueError(
                f"{name}={values[name]!r}, but activation_cache={args.activation_cache!r} was written with "
                f"{getattr(args, name)!r}; leave {name} out, or write another cache"
            )
    return args, {name: value for name, value in values.items() if name in CLT_CONFIG_HELP}
