"""What several benchmarks need to print and to write: aligned tables, plots, and a check of where files are to go."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_clt.hub.plots import PLOT_STYLE, import_matplotlib


def check_folders(*paths: Path | None) -> None:
    """Raises ValueError, before any long work, if one of these files could not be written for want of its folder."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}; make it first")


def align(rows: list[list[str] | None]) -> str:
    """Rows of cells as lines with columns of equal width, the first one left-aligned; None is a rule."""
    columns = list(zip(*(row for row in rows if row is not None), strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        None if row is None else "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join(rule if line is None else line for line in lines)


@contextmanager
def draw_figure(path: str | Path, size: tuple[float, float]) -> Iterator:
    """
    A matplotlib figure in the style of the card's plots, which is saved as PNG at the end.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(path, dpi=150)


__all__ = ["align", "check_folders", "draw_figure"]
