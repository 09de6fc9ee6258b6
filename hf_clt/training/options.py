"""One field of a dataclass as an option: what values it takes, and the same checks for Python, a flag and YAML."""

import math
import os
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Option:
    """
    One field as the command line and the YAML file see it.

    Args:
        name: name of the field.
        kind: `bool`, `int`, `float`, `str` or `list` (of str).
        optional: whether None is allowed.
        choices: allowed texts; empty when any value of the kind is.
        group: key of `GROUPS`.
        help: the help text.
        default: how `--help` prints the default.
    """

    name: str
    kind: type
    optional: bool
    choices: tuple[str, ...]
    group: str
    help: str
    default: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a value has to be, for messages."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list of names"}[
            self.kind
        ]


def make_option(name: str, hint: Any, group: str, help: str, default: str) -> Option:
    """Reads the kind, the choices and whether None is allowed out of a field's type."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = tuple(value for member in members if get_origin(member) is Literal for value in get_args(member))
    kinds = [str if get_origin(member) is Literal else get_origin(member) or member for member in members]
    # `int | float` is a number: float comes before int.
    kind = next(kind for kind in (bool, float, int, list, str) if kind in kinds)
    return Option(name, kind, types.NoneType in kinds, choices, group, help, default)


def as_text(value: Any) -> str:
    """A value as a flag or a YAML file spells it."""
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


# Values: the same checks for a Python argument, a flag and a YAML entry.


def check_value(option: Option, value: Any) -> Any:
    """Returns `value` as the option's type, or raises a ValueError that names the option, the value and the types."""
    if value is None:
        if option.optional:
            return None
    elif option.kind is bool:
        if isinstance(value, bool):
            return value
    elif option.kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif option.kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif option.kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, str) and value and (not option.choices or value in option.choices):
            return value
    else:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return [] if list(value) == ["none"] else list(value)
    remedy = (
        f"give {option.expected}, in quotes"
        if option.kind is str and not option.choices and value
        else f"give {option.expected}"
    )
    raise ValueError(f"{option.name}={value!r} is not valid; {remedy}")


def parse_text(option: Option, text: str) -> Any:
    """Reads a flag's text: `1e-4` for a number, `none` for None, true/false, yes/no, on/off or 1/0 for a switch."""
    # A name (of a project, a run) may well be "none"; in the other kinds the word can only mean no value.
    if option.optional and text.lower() == "none" and (option.kind is not str or option.choices):
        return None
    if option.kind is bool:
        return BOOLEANS.get(text.lower(), text)
    if option.kind in (int, float):
        try:
            return option.kind(text)
        except ValueError:
            return text
    return text


BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


__all__ = ["Option", "as_text", "check_value", "make_option", "parse_text"]
