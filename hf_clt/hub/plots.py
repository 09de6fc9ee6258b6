"""The plots of a model card, and the style of all plots."""

import io
import math
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ..files import replacing
from .facts import as_history


PLOTS_FOLDER = "plots"
# file in the folder of plots, title in the card, and what one sees, for those who do not see it
PLOTS = (
    ("training_curves.png", "Training", "training loss, NMSE, L0 and dead features over the steps of training"),
    ("metrics_per_layer.png", "By layer", "NMSE, L0 and dead features of each layer"),
    ("feature_density.png", "Feature density", "histogram of the share of tokens on which each feature is active"),
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


def draw_plots(folder: str | Path, facts: dict) -> None:
    """
    Draws the plots of a card from its facts into `folder/plots`, and removes those of `PLOTS` that they do not give.
    Without matplotlib (the extra `plots`) there are none but training curves that are there already.
    """
    plots = Path(folder) / PLOTS_FOLDER
    metrics, history = facts.get("metrics"), as_history(facts.get("history") or {})
    has_matplotlib = find_spec("matplotlib") is not None
    kept = []
    if (metrics or history) and has_matplotlib:
        kept = [path.name for path in plot_metrics(metrics, history, plots)]
    elif history:
        kept = ["training_curves.png"]
    for file, _, _ in PLOTS:
        if file not in kept:
            (plots / file).unlink(missing_ok=True)


def import_matplotlib() -> ModuleType:
    """matplotlib; raises ImportError with the remedy where it is not installed."""
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
    found = [row for row in rows if row.get(name) is not None and math.isfinite(row[name])]
    return [row["step"] for row in found], [row[name] for row in found]


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

    panels = (("NMSE", "nmse"), ("L0 (active features per token)", "l0"), ("dead features", "dead_fraction"))
    panels = [panel for panel in panels if metrics.get(f"{panel[1]}_per_layer") is not None]
    if not panels:
        return None
    num_layers = len(metrics[f"{panels[0][1]}_per_layer"])
    width = min(9.5, max(4.6, 1.6 + 0.27 * num_layers))
    figure = Figure(figsize=(width, 2.1 * len(panels) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False).flatten()
    for axis, (title, name) in zip(axes, panels, strict=True):
        # what is not finite is None where it was read from JSON
        values = [math.nan if v is None or not math.isfinite(v) else v for v in metrics[f"{name}_per_layer"]]
        axis.bar(range(num_layers), values, color=BLUE, width=0.72)
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
    never, occupied = counts[0], [i for i in range(1, len(counts)) if counts[i]]
    figure = Figure(figsize=(9.2, 2.9), layout="constrained")
    axis = figure.subplots()
    if occupied:
        first = occupied[0]
        axis.stairs([count / total for count in counts[first:]], edges[first:], fill=True, color=BLUE, alpha=0.85)
        axis.set_xlim(edges[first] - 0.1, 0.05)
    axis.set_title("feature density")
    axis.set_title(
        f"{never / total:.1%} of {total:,} never active", loc="right", color=ORANGE, fontsize=9, fontweight="normal"
    )
    axis.set_xlabel("share of held-out tokens on which a feature is active")
    axis.set_ylabel("share of features")
    ticks = list(range(math.ceil(edges[occupied[0]]) if occupied else -4, 1))
    axis.set_xticks(ticks, [f"$10^{{{tick}}}$" if tick else "1" for tick in ticks])
    axis.yaxis.set_major_formatter(_percent)
    return figure
