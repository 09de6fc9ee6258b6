"""What people look at after a run: a table per layer in the terminal, and plots."""

import io
import json
import math
from pathlib import Path

from ..files import replacing


# column title, metric name, format; the name plus "_per_layer" gives the rows
TABLE_COLUMNS = (
    ("NMSE", "nmse", ".4f"),
    ("expl. var.", "explained_variance", ".4f"),
    ("L0", "l0", ",.1f"),
    ("dead", "dead_fraction", ".1%"),
)

BLUE, ORANGE, GREY, INK = "#2f6db3", "#d9772b", "#9aa3ad", "#2b2f36"
GREEN, VIOLET = "#3f8f5b", "#7a56a6"
PLOT_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}


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
        rows.append([str(layer)] + [shown(metrics[f"{name}_per_layer"][layer], spec) for _, name, spec in columns])
    rows.append(["all"] + [shown(metrics[name], spec) for _, name, spec in columns])
    lines = align_rows(rows)
    means = ", ".join(title for title, name, _ in columns if name != "l0")
    note = f"all: mean over layers ({means})" if means else "all:"
    if any(name == "l0" for _, name, _ in columns):
        note += "; L0 summed" if means else " L0 summed"
    if metrics.get("num_tokens") is not None:
        note += f"; {metrics['num_tokens']:,} held-out tokens"
    return "\n".join([*lines, note, *without_nmse(metrics)])


def align_rows(rows: list[list[str]]) -> list[str]:
    """Lines of a table in plain text, with a rule below the first row and above the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def shown(value: float | None, spec: str) -> str:
    """A figure as text; a dash for one that has no value."""
    return "-" if value is None else format(value, spec)


def without_nmse(metrics: dict) -> list[str]:
    """A sentence about the layers that have no NMSE, where there are some."""
    layers = metrics.get("layers_without_nmse")
    if not layers:
        return []
    which = f"layer {layers[0]}, whose targets do" if len(layers) == 1 else f"{len(layers)} layers, whose targets do"
    names = "" if len(layers) == 1 else f" ({', '.join(map(str, layers))})"
    return [f"The NMSE has no value in {which} not vary{names}; means leave them out."]


def read_history(name: str | Path) -> list[dict]:
    """
    The lines of `metrics.jsonl` in a CLT's folder, which [`plot_metrics`] draws the training curves of; none where
    there is no such file, as in a CLT from the Hub.

    Raises:
        ValueError: If a line is no JSON.
    """
    path = Path(name).expanduser() / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} has a line that is no JSON ({error}); move it away to go on without curves"
        ) from None


def import_matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib; install it with `pip install "hf_clt[plots]"`') from error
    return matplotlib


def plot_metrics(metrics: dict | None, history: list[dict], folder: str | Path) -> list[Path]:
    """
    Draw PNG figures: `training_curves.png` (loss, NMSE, L0 and dead features over the steps),
    `metrics_per_layer.png` and `feature_density.png`. A figure without data is not drawn.

    Args:
        metrics (`dict` or None): What an evaluation returned.
        history (`list[dict]`):
            The lines of `metrics.jsonl`. Those that state the number of held-out tokens are evaluations.
        folder (`str` or `Path`): Where to write; made if absent.

    Returns:
        `list[Path]`: The files written.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    matplotlib = import_matplotlib()
    folder = Path(folder).expanduser()
    metrics = metrics or {}
    with matplotlib.rc_context(PLOT_STYLE):
        figures = {
            folder / "training_curves.png": _training_curves(history),
            folder / "metrics_per_layer.png": _metrics_per_layer(metrics),
            folder / "feature_density.png": _feature_density(metrics),
        }
        figures = {path: figure for path, figure in figures.items() if figure is not None}
        for path, figure in figures.items():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(_small_png(figure))
    return list(figures)


def _small_png(figure) -> bytes:
    """The figure with a palette of 64 colours, a third of the bytes: models' cards show it, and git keeps it."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=150, facecolor="white")
    image = Image.open(drawn).convert("RGB")
    image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def _percent(value, _position=None):
    return f"{100 * value:g}%"


def _points(rows, name):
    """Steps and values of the rows that hold a finite `name`."""
    found = [
        (row["step"], row[name])
        for row in rows
        if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
    ]
    return [step for step, _ in found], [value for _, value in found]


def _training_curves(history):
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    held_out = [row for row in history if "num_tokens" in row]
    training = [row for row in history if "num_tokens" not in row]
    # not always the tokens of the figures beside the plot, which may have been measured later
    counts = sorted({row["num_tokens"] for row in held_out})
    of_tokens = f" ({counts[0]:,} tokens)" if len(counts) == 1 else ""
    # title, metric name, log scale
    panels = (
        ("training loss", "loss", True),
        ("NMSE (mean over layers)", "nmse", False),
        ("L0 (active features per token, all layers)", "l0", True),
        ("dead features", "dead_fraction", False),
    )
    panels = [panel for panel in panels if _points(history, panel[1])[0]]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axis, (title, name, logarithmic) in zip(axes, panels, strict=False):
        for rows_of, colour, label, marker in (
            (training, BLUE, "training", None),
            (held_out, ORANGE, f"held-out{of_tokens}", "o"),
        ):
            steps, values = _points(rows_of, name)
            if steps:
                axis.plot(steps, values, color=colour, label=label, marker=marker, markersize=3.5, linewidth=1.3)
        values = _points(history, name)[1]
        if logarithmic and min(values) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.yaxis.set_major_formatter(EngFormatter(sep=""))
            axis.yaxis.set_minor_formatter(NullFormatter())
        if name == "dead_fraction":
            axis.yaxis.set_major_formatter(_percent)
        if name in ("nmse", "dead_fraction"):
            axis.set_ylim(0, min(1.05, 1.08 * max(values)) if max(values) > 0 else 1)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.tick_params(labelbottom=True)
        axis.legend(loc="best")
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def _metrics_per_layer(metrics):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = (
        ("NMSE", "nmse", BLUE),
        ("L0 (active features per token)", "l0", BLUE),
        ("dead features", "dead_fraction", BLUE),
    )
    panels = [panel for panel in panels if metrics.get(f"{panel[1]}_per_layer") is not None]
    if not panels:
        return None
    num_layers = len(metrics[f"{panels[0][1]}_per_layer"])
    width = min(9.5, max(4.6, 1.6 + 0.27 * num_layers))
    figure = Figure(figsize=(width, 2.1 * len(panels) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False).flatten()
    for axis, (title, name, colour) in zip(axes, panels, strict=True):
        # what is not finite is None where it was read from JSON
        values = [math.nan if v is None or not math.isfinite(v) else v for v in metrics[f"{name}_per_layer"]]
        axis.bar(range(num_layers), values, color=colour, width=0.72)
        defined = [value for value in values if not math.isnan(value)]
        if defined:
            average = sum(defined) / len(defined)
            axis.axhline(average, color=ORANGE, linewidth=1.2, linestyle="--")
            text = f"{average:.1%}" if name == "dead_fraction" else f"{average:.3g}"
            axis.set_title(f"mean over layers {text}", loc="right", color=ORANGE, fontsize=9, fontweight="normal")
        if name == "dead_fraction":
            axis.yaxis.set_major_formatter(_percent)
        axis.set_title(title)
        axis.grid(axis="x", visible=False)
        axis.set_xlim(-0.7, num_layers - 0.3)
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=num_layers if num_layers <= 32 else 16, integer=True))
    return figure


def _feature_density(metrics):
    from matplotlib.figure import Figure

    histogram = metrics.get("feature_density")
    if not histogram:
        return None
    edges, counts = histogram["bin_edges"], histogram["counts"]
    total = sum(counts)
    # the floor's bin holds the features that are never active: they get a label instead of a bar far out on the left
    never, shown = counts[0], [i for i in range(1, len(counts)) if counts[i]]
    figure = Figure(figsize=(9.2, 2.9), layout="constrained")
    axis = figure.subplots()
    if shown:
        first = shown[0]
        axis.stairs([count / total for count in counts[first:]], edges[first:], fill=True, color=BLUE, alpha=0.85)
        axis.set_xlim(edges[first] - 0.1, 0.05)
    axis.set_title("feature density")
    axis.set_title(
        f"{never / total:.1%} of {total:,} never active", loc="right", color=ORANGE, fontsize=9, fontweight="normal"
    )
    axis.set_xlabel("share of held-out tokens on which a feature is active")
    axis.set_ylabel("share of features")
    ticks = list(range(math.ceil(edges[shown[0]]) if shown else -4, 1))
    axis.set_xticks(ticks, [f"$10^{{{tick}}}$" if tick else "1" for tick in ticks])
    axis.yaxis.set_major_formatter(_percent)
    return figure


__all__ = ["format_metrics_table", "plot_metrics", "shown", "without_nmse"]
