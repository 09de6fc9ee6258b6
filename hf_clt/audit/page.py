"""An audit as tables: for the terminal, for the model card, and as one page that needs no server (`page.html`)."""

import importlib.resources
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import jinja2

from ..files import format_duration, format_number, write_text
from ..hub.facts import without_private
from .run import BLOCKS


WIDTH, HEIGHT, LEFT, BELOW = 340, 150, 52, 22  # of a chart, and of its margins
SUBJECTS = {
    "clt": "the CLT",
    "shuffled": "its decoders shuffled between the features of a layer",
    "random": "random features, as active and as strong",
}
# What to look at first: in the terminal, on the card, and on top of the page; a label is behind the name.
GLANCE = (
    "nmse", "l0", "ce_recovered", "kl", "single_token", "absorption", "replacement", "completeness", "path_length",
    "feature_spearman", "feature_spearman_activation", "logit_spearman", "logit_spearman_activation",
    "perturbation_cosine 1", "response_cosine 2", "deletion_area", "insertion_area", "insertion_all",
    "lowest_and_highest", "paraphrases", "unrelated", "seeds", "found", "unimportant_flips", "disagreement",
)  # fmt: skip
# What a figure is; of others the name says it. docs/audit.md defines them.
MEANINGS = {
    "nmse": "squared error over the targets' variance",
    "l0": "active features per token",
    "dead": "share of features active on none of these tokens",
    "mean_distance": "mean of target minus source layer, weighted by what decoders write",
    "norm_by_distance": "share of the decoders' length, by target minus source layer",
    "explained_by_distance": "explained share of the targets' variance, by target minus source layer",
    "share_by_density": "share of the active features, by the share of tokens on which they are active",
    "ce_original": "cross-entropy of the language model, in nats",
    "ce_replaced": "cross-entropy with all MLPs replaced",
    "ce_ablated": "cross-entropy with all MLP outputs at their mean",
    "ce_recovered": "share of the cross-entropy that the MLPs give and the replacement keeps",
    "kl": "KL divergence from the language model, in nats",
    "kl_ablated": "the same with MLP outputs at their mean",
    "top1": "share of predictions with the same most probable token",
    "top1_ablated": "the same with MLP outputs at their mean",
    "replacement": "share of a target's influence that reaches tokens and not errors",
    "completeness": "share of the inputs of a graph's nodes that are not errors",
    "replacement_of_nodes": "the same without what went to features that are no nodes",
    "completeness_of_nodes": "the same without what went to features that are no nodes",
    "replacement_pruned": "the same after pruning",
    "completeness_pruned": "the same after pruning",
    "outside": "share that belongs to no node",
    "path_length": "mean number of edges from a target to a token or an error, by influence",
    "path_length_to_tokens": "mean number of edges from a target to a token, by influence",
    "influence_by_length": "share of paths of 1, 2, ... edges",
    "frozen_error": "largest error of an edge where attention and norms are held",
    "feature_spearman": "rank correlation of influence and change of later features, when a feature is ablated",
    "logit_spearman": "rank correlation of influence and KL of the next token, when a feature is ablated",
    "perturbation_cosine": "of the predicted and the measured change, by layers downstream",
    "perturbation_error": "|predicted - measured| / |measured|, by layers downstream",
    "response_cosine": "of the predicted and the measured change without what the feature writes itself, by layers "
    "downstream",
    "response_error": "|predicted - measured| / |measured| without what it writes itself, by layers downstream",
    "insertion_all": "share of the prediction that all features of a graph give without errors",
    "others_size": "what the others write over what the top features write",
    "deletion_area": "how much more of the prediction is lost with the top features than with others as large",
    "insertion_area": "how much more of the prediction the top features give than others as large",
    "lowest_and_highest": "overlap of the nodes that the lowest and the highest threshold keep",
    "paraphrases": "overlap of the features of a prompt and its paraphrase",
    "unrelated": "overlap of the features of a prompt and another one's paraphrase",
    "paraphrases_over_unrelated": "the difference of these two",
    "seeds": "share of the kept features that the CLT and this one have in common",
    "answered": "share of the questions that the language model answers",
    "through_intermediate": "share of influence through features that point to the step in between",
    "through_others": "the same for the steps of other questions",
    "kept_flips": "answers that change when the kept features are ablated",
    "unimportant_flips": "answers that change when as many unimportant features are ablated",
    "intermediate_flips": "answers that change when unimportant features of the step in between are ablated",
    "intermediate_unimportant": "share of the features of the step in between that the graph leaves out",
    "found": "questions whose graph keeps a feature that points to the step in between",
    "disagreement": "questions on which the CLT and this one differ in that",
    "single_token": "share of features whose strongest examples are one and the same token",
    "letter_f1": "F1 of the best feature for a word's first letter",
    "probe_accuracy": "of a linear probe for the first letter",
    "absorption": "share of words whose letter's feature is silent while another one writes its letter",
}
# behind feature_spearman and logit_spearman
BASELINES = {
    "effect": "the same of the signed effect over all paths",
    "direct": "the same of the direct edge alone",
    "activation": "the same of the activation of what is ablated",
    "random": "the same of random numbers",
}


def meaning(name: str) -> str:
    """What a figure is; of one per layer, or by something, what it is of."""
    name = name.split(" ")[0]
    _, spearman, baseline = name.partition("_spearman_")
    if spearman:
        return BASELINES[baseline]
    return MEANINGS.get(name) or MEANINGS.get(re.split("_(?:per|by)_", name)[0], "")


def is_figure(value: Any) -> bool:
    return isinstance(value, dict) and "interval" in value


def shown(figure: dict | None) -> str:
    """A figure with its interval; a dash where there is none."""
    if figure is None or figure["value"] is None:
        return "-"
    low, high = (format_number(value, ".3g") for value in figure["interval"])
    return f"{figure['value']:.3g} ({low} to {high})"


def overlap(figure: dict | None, other: dict | None) -> bool:
    """Whether the intervals of two figures have a number in common: then they are not told apart."""
    if any(found is None or found["value"] is None for found in (figure, other)):
        return False
    (low, high), (other_low, other_high) = figure["interval"], other["interval"]
    return low <= other_high and other_low <= high


def names_of(audit: dict, block: str) -> list[str]:
    """The figures of a block, those of any subject."""
    results = audit["blocks"].get(block, {}).values()
    return list(dict.fromkeys(name for result in results for name in result.get("figures", {})))


def of_subjects(audit: dict, block: str, name: str) -> dict[str, Any]:
    """A figure, or figures, by subject; None where there is none."""
    results = audit["blocks"].get(block, {})
    return {subject: results.get(subject, {}).get("figures", {}).get(name) for subject in audit["subjects"]}


def by_label(value: Any) -> dict[str, dict]:
    """Figures by their label, a layer or distance of a list; a single one has the label ''."""
    if is_figure(value):
        return {"": value}
    return {f"{label}": found for label, found in (enumerate(value) if isinstance(value, list) else value.items())}


def rows_of(audit: dict, chosen: Container[str] | None = None) -> list[dict]:
    """
    The figures of all blocks, the single ones or those that are `chosen` by name (and label), and the skipped blocks:
    `block`, `name`, `samples` and `cells` by subject. A cell ends in ≈ where its interval and that of the CLT overlap.
    """
    rows = []
    for block in BLOCKS:
        results = audit["blocks"].get(block, {})
        reasons = {subject: results.get(subject, {}).get("skipped") for subject in audit["subjects"]}
        if any(reasons.values()) or not results:
            cells = {s: "measured" if s in results else "not measured" for s in reasons}
            cells |= {s: f"skipped: {reason}" for s, reason in reasons.items() if reason}
            rows.append({"block": block, "name": "", "samples": None, "cells": cells})
        for name in names_of(audit, block):
            found = {subject: by_label(value or {}) for subject, value in of_subjects(audit, block, name).items()}
            for label in dict.fromkeys(label for figures in found.values() for label in figures):
                full = f"{name} {label}".strip()
                if full in chosen if chosen is not None else not label:
                    figures = {subject: figures.get(label) for subject, figures in found.items()}
                    samples = next(figure["samples"] for figure in figures.values() if figure)
                    rows.append({"block": block, "name": full, "samples": samples, "cells": cells_of(figures)})
    return rows


def cells_of(figures: dict[str, dict | None]) -> dict[str, str]:
    own, cells = figures.get("clt"), {}
    for subject, figure in figures.items():
        mark = "" if subject == "clt" or not overlap(own, figure) else " =" if figure == own else " ≈"
        cells[subject] = shown(figure) + mark
    return cells


def format_audit(audit: dict) -> str:
    """The figures to look at first as aligned plain text."""
    rows = [["block", "figure", "samples", *audit["subjects"]]]
    for row in rows_of(audit, GLANCE):
        rows.append([row["block"], row["name"], f"{row['samples'] or '-'}", *row["cells"].values()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "(95 % intervals; ≈ overlaps with the CLT's, so not told from it; = the same)"])


def for_card(audit: dict) -> dict:
    """What a model card says of an audit: `columns`, `rows` and the `settings` that a reader needs."""
    rows = [
        [row["block"], row["name"].replace("_", " "), row["samples"] or "-", *row["cells"].values()]
        for row in rows_of(audit, GLANCE)
    ]
    names = ("dataset", "eval_tokens", "seed", "quick", "num_prompts")
    settings = {name: audit["settings"][name] for name in names if audit["settings"].get(name) is not None}
    return {"columns": audit["subjects"], "rows": rows, "settings": settings}


# -- the page ---------------------------------------------------------------------------------------------------------


def chart(found: dict[str, Any]) -> dict:
    """
    A line per subject over the labels of its figures, with its interval, as points of an SVG: `lines` of `subject`,
    `number` (its colour), `points` and `band`; `ticks` of both axes; and `rows`, the figures as text.
    """
    series = {subject: by_label(figures) for subject, figures in found.items() if figures}
    labels = list(dict.fromkeys(label for figures in series.values() for label in figures))
    # The axis is that of the values: a wide interval of one control would flatten all the rest.
    values = [f["value"] for figures in series.values() for f in figures.values() if f["value"] is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    high = high if high > low else low + 1.0

    def x(label: str) -> float:
        return round(LEFT + (WIDTH - LEFT - 8) * labels.index(label) / max(1, len(labels) - 1), 1)

    def y(value: float) -> float:
        return round(8 + (HEIGHT - BELOW - 8) * (high - min(max(value, low), high)) / (high - low), 1)

    lines = []
    for subject, figures in series.items():
        defined = {label: f for label, f in figures.items() if f["value"] is not None}
        upper = [f"{x(label)},{y(f['interval'][1])}" for label, f in defined.items()]
        lower = [f"{x(label)},{y(f['interval'][0])}" for label, f in defined.items()]
        points = [f"{x(label)},{y(f['value'])}" for label, f in defined.items()]
        points = points * 2 if len(points) == 1 else points  # a line of no length is a dot
        number = list(found).index(subject)
        lines.append({"number": number, "points": " ".join(points), "band": " ".join([*upper, *reversed(lower)])})
    places = labels if len(labels) <= 8 else labels[:: -(-len(labels) // 8)]
    return {
        "lines": lines[::-1],  # the CLT on top
        "x": [(x(label), label) for label in places],
        "y": [(y(value), f"{value:.2g}") for value in (low, (low + high) / 2, high)],
        "zero": y(0.0),
        "rows": [(label, [shown(figures.get(label)) for figures in series.values()]) for label in labels],
        "columns": list(series),
    }


def write_page(audit: dict, path: Path) -> None:
    """Writes the page of an audit, whole or not at all."""
    rows, blocks = rows_of(audit), []
    for name, block in BLOCKS.items():
        found = {figure: of_subjects(audit, name, figure) for figure in names_of(audit, name)}
        charts = [
            (figure, chart(values))
            for figure, values in found.items()
            if not any(is_figure(value) for value in values.values()) and any(values.values())
        ]
        seconds = {s: format_duration(result["seconds"]) for s, result in audit["blocks"].get(name, {}).items()}
        own = [row for row in rows if row["block"] == name]
        blocks.append({"name": name, "says": block.says, "rows": own, "charts": charts, "seconds": seconds})
    text = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    settings = {name: value for name, value in without_private(audit["settings"]).items() if value is not None}
    page = environment.from_string(text).render(
        audit=audit,
        blocks=blocks,
        glance=rows_of(audit, GLANCE),
        meaning=meaning,
        subjects={name: SUBJECTS.get(name, "compared with") for name in audit["subjects"]},
        settings=settings,
        size=(WIDTH, HEIGHT, LEFT, BELOW),
    )
    write_text(path, page)


__all__ = ["for_card", "format_audit", "write_page"]
