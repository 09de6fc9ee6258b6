"""The values that a field of a dataclass takes: the same for Python, a flag and a YAML file."""

import math
import os
import types
from typing import Any, Literal, Union, get_args, get_origin


def kind_of(hint: Any) -> tuple[Any, bool]:
    """The type of a field without None, and whether None is allowed; `int | float` is float."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [member for member in members if member is not types.NoneType]
    return float if float in kinds else kinds[0], len(kinds) < len(members)


def check_value(name: str, value: Any, hint: Any) -> Any:
    """
    The value as its field keeps it: a whole number as a float where the field is one, a path as text, "none" as None.

    Raises:
        ValueError: If it is of another type, or not one of the choices; the message names field, value and types.
    """
    kind, optional = kind_of(hint)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if optional and (value is None or (value == "none" and kind is not str and "none" not in choices)):
        return None
    if choices:
        expected = "one of " + ", ".join(choices)
        if isinstance(value, str) and value in choices:
            return value
    elif kind in (bool, int):
        expected = "true or false" if kind is bool else "a whole number"
        if type(value) is kind:
            return value
    elif kind is float:
        expected = "a number"
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif kind is str:
        expected = "text, in quotes" if value else "text"
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, str) and value:
            return value
    else:
        expected = "a list of names"
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return [] if list(value) == ["none"] else list(value)
    raise ValueError(f"{name}={value!r} is not valid; give {expected}")


def as_text(value: Any) -> str:
    """A value as a flag or a YAML file spells it."""
    if isinstance(value, list):
        return " ".join(value) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
