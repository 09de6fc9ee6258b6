"""
Draws what an audit says of CLTs that differ in their reach, the number of layers that a feature writes to, beside the
random control; and prints it. Example:

  python -m benchmarks.reach_curve audit.json docs/reach.png clt=30 reach8=8 reach4=4 reach2=2 plt=1
"""

import argparse
import json
from pathlib import Path

from hf_clt.audit.page import by_label, shown
from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.hub.plots import BLUE, GREY

from .output import align, check_folders, draw_figure


FIGURES = {
    "nmse": "NMSE",
    "ce_recovered": "CE recovered",
    "replacement": "graphs: replacement",
    "completeness": "graphs: completeness",
    "path_length": "path length (edges)",
    "feature_spearman": "Spearman, features",
    "logit_spearman": "Spearman, logits",
    "deletion_area": "deletion area",
    "insertion_all": "insertion of all",
    "response_cosine 2": "response cosine, 2 layers on",
}


def figures_of(audit: dict, subject: str) -> dict[str, dict]:
    """All figures of a subject by name and label."""
    results = [results.get(subject, {}).get("figures", {}) for results in audit["blocks"].values()]
    flat = [(name, label, figure) for r in results for name, v in r.items() for label, figure in by_label(v).items()]
    return {f"{name} {label}".strip(): figure for name, label, figure in flat if figure["value"] is not None}


def plot_reach(by_reach: dict[int, dict], random: dict, path: Path) -> None:
    """A panel per figure, against the reach, with 95 % intervals; the random control as a grey line."""
    with draw_figure(path, (13.5, 5.4)) as figure:
        for place, (name, title) in enumerate(FIGURES.items(), start=1):
            axes = figure.add_subplot(2, 5, place)
            points = {reach: figures[name] for reach, figures in by_reach.items() if name in figures}
            values = [point["value"] for point in points.values()]
            ends = [[abs(p["interval"][side] - p["value"]) for p in points.values()] for side in (0, 1)]
            axes.errorbar(list(points), values, ends, marker="o", color=BLUE)
            if name in random:
                axes.axhline(random[name]["value"], color=GREY, linestyle="--")
            axes.set(title=title, xscale="log")
            axes.set_xticks(list(points), [f"{reach}" for reach in points])
            axes.minorticks_off()


@one_line_errors(ImportError)
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path, metavar="JSON", help="what hf-clt audit --compare wrote")
    parser.add_argument("plot", type=Path, metavar="PNG", help="file for the plot")
    parser.add_argument("subjects", nargs="+", metavar="NAME=REACH", help="columns of the audit, and their reach")
    options = parser.parse_args(argv)
    check_folders(options.plot)
    for given in options.subjects:
        if not given.rpartition("=")[2].isdecimal() or "=" not in given:
            raise ValueError(f"subjects={given!r} is not a column and its reach; give for example clt=30")
    audit = json.loads(options.audit.read_text(encoding="utf-8"))
    names = {int(reach): name for name, _, reach in (given.rpartition("=") for given in options.subjects)}
    unknown = set(names.values()) - set(audit["subjects"])
    if unknown:
        raise ValueError(f"subjects={sorted(unknown)} are not in the audit, which has {audit['subjects']}; give these")
    by_reach = {reach: figures_of(audit, name) for reach, name in sorted(names.items())}
    random = figures_of(audit, "random")
    rows = [["figure", *(f"reach {reach}" for reach in by_reach), "random"], None]
    rows += [[n, *(shown(f.get(n)) for f in (*by_reach.values(), random))] for n in FIGURES]
    print(align(rows))
    plot_reach(by_reach, random, options.plot)
    print(f"The plot is {options.plot}")


if __name__ == "__main__":
    main()
