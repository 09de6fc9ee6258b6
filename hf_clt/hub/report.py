"""The metrics of an evaluation as a table in plain text, and the lines of a run's `metrics.jsonl`."""

import json
from pathlib import Path

from ..files import format_number


# column title, metric name, format; the name plus "_per_layer" gives the rows
TABLE_COLUMNS = (
    ("NMSE", "nmse", ".4f"),
    ("expl. var.", "explained_variance", ".4f"),
    ("L0", "l0", ",.1f"),
    ("dead", "dead_fraction", ".1%"),
)


def is_dense(l0: float, num_features: int) -> bool:
    """Whether more than a tenth of a layer's features are active on a token: neither sparse nor fast."""
    return l0 > num_features / 10


def format_metrics_table(metrics: dict) -> str:
    """
    The metrics per target layer as aligned plain text.

    Args:
        metrics (`dict`):
            What [`MetricSums.compute`] gives. A metric that is absent or None (`dead_fraction` before one full window
            of training) has no column.

    Returns:
        `str`: One row per layer, then a row `all`: means over the layers, L0 summed; then a line with the number of
        tokens.
    """
    columns = [column for column in TABLE_COLUMNS if metrics.get(f"{column[1]}_per_layer") is not None]
    if not columns:
        raise ValueError(f"no metric per layer in {sorted(metrics)}; give the dict that an evaluation returned")
    num_layers = len(metrics[f"{columns[0][1]}_per_layer"])
    rows = [["layer"] + [title for title, _, _ in columns]]
    for layer in range(num_layers):
        rows.append(
            [str(layer)] + [format_number(metrics[f"{name}_per_layer"][layer], spec) for _, name, spec in columns]
        )
    rows.append(["all"] + [format_number(metrics[name], spec) for _, name, spec in columns])
    lines = align_rows(rows)
    means = ", ".join(title for title, name, _ in columns if name != "l0")
    note = f"all: mean over layers ({means})" if means else "all:"
    if any(name == "l0" for _, name, _ in columns):
        note += "; L0 summed" if means else " L0 summed"
    if metrics.get("num_tokens") is not None:
        note += f"; {metrics['num_tokens']:,} held-out tokens"
    return "\n".join(filter(None, [*lines, note, note_missing_nmse(metrics)]))


def align_rows(rows: list[list[str]]) -> list[str]:
    """Lines of a table in plain text, with a rule below the first row and above the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def note_missing_nmse(metrics: dict) -> str:
    """A sentence about the layers that have no NMSE; empty if all have one."""
    layers = metrics.get("layers_without_nmse")
    if not layers:
        return ""
    one = len(layers) == 1
    which = f"layer {layers[0]}" if one else f"{len(layers)} layers"
    names = "" if one else f" ({', '.join(map(str, layers))})"
    return f"The NMSE has no value in {which}, whose targets do not vary{names}; means leave them out."


def read_history(name: str | Path, was_killed: bool = False) -> list[dict]:
    """
    The lines of `metrics.jsonl` in a CLT's folder, which [`plot_metrics`] draws the training curves of; none where
    there is no such file, as in a CLT from the Hub.

    Args:
        name: The folder.
        was_killed: Whether the run may have been killed while it wrote a line: those before it are given.

    Raises:
        ValueError: If a line is no JSON.
    """
    path = Path(name).expanduser() / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if was_killed:
                break
            raise ValueError(
                f"{path} has a line that is no JSON ({error}); move it away to go on without curves"
            ) from None
    return rows
