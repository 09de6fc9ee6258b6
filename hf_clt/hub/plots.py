"""The plots that a model card shows."""

from importlib.util import find_spec
from pathlib import Path

from .facts import as_history


PLOTS_FOLDER = "plots"
# file in the folder of plots, title in the card, and what one sees, for those who do not see it
PLOTS = (
    ("training_curves.png", "Training", "training loss, NMSE, L0 and dead features over the steps of training"),
    ("metrics_per_layer.png", "By layer", "NMSE, L0 and dead features of each layer"),
    ("feature_density.png", "Feature density", "histogram of the share of tokens on which each feature is active"),
)


def draw_plots(folder: str | Path, facts: dict) -> None:
    """
    The plots of a card from its facts, in `folder/plots`; those of ours that it does not give are removed. Without
    matplotlib (the extra `plots`) there are none.
    """
    plots = Path(folder) / PLOTS_FOLDER
    written = []
    metrics, history = facts.get("metrics"), as_history(facts.get("history") or {})
    if (metrics or history) and find_spec("matplotlib") is not None:
        from .report import plot_metrics

        written = [path.name for path in plot_metrics(metrics, history, plots)]
    for file, _, _ in PLOTS:
        still_true = file == "training_curves.png" and history and find_spec("matplotlib") is None
        if file not in written and not still_true:
            (plots / file).unlink(missing_ok=True)


__all__ = ["PLOTS", "PLOTS_FOLDER", "draw_plots"]
