"""
What a model card is made from besides config.json, in `metrics.json`: the measurements, the facts of the training run
and its curves. The card can be made again from it when a measurement is added.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from ..files import as_json, read_json, write_json


FACTS_FILE = "metrics.json"
FORMAT = "hf_clt model card 1"
KEYS = (
    "format",
    "name",
    "base_model",
    "note",
    "license",
    "tags",
    "command",
    "metrics",
    "evaluation",
    "audit",
    "training",
    "history",
)

CURVES = ("step", "loss", "nmse", "l0", "dead_fraction", "num_tokens")
POINTS = 400  # of a curve, more than its plot can show

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
QUOTED_PATH = re.compile(r"""(['"])/[^'"\n]*?([^'"\n/]+)/?\1""")
PLAIN_PATH = re.compile(r"""(?<![^\s=:,])/(?:[^\s/'"]+/)*([^\s/'",]+)/?(?![^\s,])""")


def without_private(value: object) -> object:
    """
    A text, or the texts in dicts and lists, without Hub tokens and folders of this machine: an absolute path becomes
    its last part.
    """
    if isinstance(value, dict):
        return {name: without_private(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_private(entry) for entry in value]
    if not isinstance(value, str):
        return value
    value = PLAIN_PATH.sub(r"\1", QUOTED_PATH.sub(r"\1\2\1", value))
    home = os.path.expanduser("~")
    if home not in ("~", "/", ""):
        value = re.sub(re.escape(home) + r"(?=/|\s|$)", "~", value)
    return TOKEN.sub("hf_***", value)


def as_curves(history: list[dict]) -> dict[str, dict[str, list]]:
    """
    The lines of `metrics.jsonl` that the training curves are drawn from, as columns, by split; of many lines at most
    `POINTS` evenly spaced ones, with five digits.
    """
    curves = {}
    for split in ("train", "heldout"):
        rows = [row for row in history if ("num_tokens" in row) == (split == "heldout")]
        if len(rows) > POINTS:
            rows = [rows[round(i * (len(rows) - 1) / (POINTS - 1))] for i in range(POINTS)]
        columns = {name: [_rounded(row.get(name)) for row in rows] for name in CURVES}
        columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
        if columns:
            curves[split] = columns
    return curves


def as_history(curves: dict[str, dict[str, list]]) -> list[dict]:
    """The lines that [`as_curves`] kept, in order."""
    rows = []
    for columns in curves.values():
        for values in zip(*columns.values(), strict=True):
            rows.append({name: value for name, value in zip(columns, values, strict=True) if value is not None})
    return sorted(rows, key=lambda row: row["step"])


def _rounded(value):
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def make_facts(**facts: Any) -> dict:
    """
    The content of `metrics.json`: those of `KEYS` that are known, without private names, as JSON returns them (None
    where a number is not finite).

    Raises:
        `ValueError`: A name is not one of `KEYS`.
    """
    if unknown := sorted(set(facts) - set(KEYS[1:])):
        raise ValueError(f"{unknown[0]} is not a fact of a model card; use {', '.join(KEYS[1:])}")
    known = {name: facts[name] for name in KEYS[1:] if facts.get(name)}
    return json.loads(as_json({"format": FORMAT, **without_private(known)}))


def check_license(license: str) -> None:
    """
    Raises:
        `ValueError`: `license` cannot be one of the Hub's names of licences.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"license={license!r} is not a licence name of the Hub; give one, such as mit, apache-2.0 or other"
        )


def read_facts(folder: str | Path) -> dict | None:
    """
    The facts beside a card; None where there are none.

    Raises:
        `ValueError`: `metrics.json` is another file than the one that is written with a card.
    """
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        return None
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{path} is not the one that is written with a model card; move it away")
    if unknown := sorted(set(facts) - set(KEYS)):
        raise ValueError(f"{path} has {unknown[0]}, which this version of hf_clt does not know; update hf_clt")
    (facts.get("training") or {}).pop("energy_joules", None)  # which older versions counted
    return facts


def write_facts(folder: str | Path, facts: dict) -> None:
    """Writes `metrics.json`; where nothing is known there is none, and one of ours that is there is removed."""
    path = Path(folder) / FACTS_FILE
    if set(facts) > {"format"}:
        write_json(path, facts)
    elif path.is_file() and FORMAT in path.read_text(encoding="utf-8", errors="replace"):
        path.unlink()
