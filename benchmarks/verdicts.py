"""
What runs at several sparsities and seeds say: metrics at a wanted L0, and whether a candidate differs from the
baseline by more than seeds do.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import mean, variance

from hf_clt.files import format_number
from hf_clt.hub.plots import BLUE, GREEN, GREY, ORANGE, VIOLET

from .output import draw_figure


BASELINE = "baseline"
BEYOND = 1.05  # a wanted L0 may lie outside the runs by this factor; the line through the nearest two is prolonged
ALONE = 1.01  # or by this one where a seed has a single run, which then counts as it is
SEEDS = 3  # of candidate and baseline each, for a verdict
SPREADS = 3  # that a difference must exceed; with three seeds each, 1 in 50 do by chance (Student's t, 4 degrees)
COLORS = (BLUE, ORANGE, GREEN, VIOLET)


# -- one seed ---------------------------------------------------------------------------------------------------------


def at_l0(points: Iterable[tuple[float, float | None]], wanted: float) -> float | None:
    """
    A metric at a wanted L0, linear in log L0 between the two nearest runs.

    Args:
        points: (L0, metric) of runs that differ in sparsity alone; a metric of None leaves the run out.
        wanted: L0.

    Returns:
        The metric; None if the runs do not reach this L0: it lies outside of them by more than 5 %, or, for one run,
        1 %.
    """
    known = {l0: value for l0, value in points if value is not None and l0 > 0}
    found = sorted(known.items())
    if not found:
        return None
    if len(found) == 1:
        ((l0, value),) = found
        return value if max(l0 / wanted, wanted / l0) <= ALONE else None
    if not found[0][0] / BEYOND <= wanted <= found[-1][0] * BEYOND:
        return None
    (low, first), (high, second) = next(
        (pair for pair in pairwise(found) if wanted <= pair[1][0]), (found[-2], found[-1])
    )
    return first + (second - first) * math.log(wanted / low) / math.log(high / low)


def layer_groups(num_layers: int) -> list[range]:
    """Three groups of consecutive layers, as equal as can be (of 10: 0-2, 3-6, 7-9); fewer for fewer layers."""
    ends = [round(num_layers * part / 3) for part in range(4)]
    return [range(first, last) for first, last in pairwise(ends) if last > first]


def seed_at_l0(records: list[dict], wanted: float) -> dict | None:
    """
    The runs of one seed at a wanted L0 per layer, which is the mean over layers.

    Returns:
        `layers` (NMSE of each), `groups` (NMSE of each of [`layer_groups`]), `nmse`, `ce` (None where it was not
        measured) and `dead`; None if the runs do not reach this L0.
    """
    measured = [record for record in records if "metrics" in record]

    def interpolated(metric):
        return at_l0([(l0_of(record), metric(record)) for record in measured], wanted)

    nmse = interpolated(lambda record: record["metrics"]["nmse"])
    if nmse is None:
        return None
    num_layers = len(measured[0]["metrics"]["l0_per_layer"])
    layers = [interpolated(lambda record, n=n: record["metrics"]["nmse_per_layer"][n]) for n in range(num_layers)]
    return {
        "layers": layers,
        "groups": [known_mean(layers[n] for n in group) for group in layer_groups(num_layers)],
        "nmse": nmse,
        "ce": interpolated(lambda record: (record["cross_entropy"] or {}).get("ce_recovered")),
        "dead": interpolated(lambda record: record["metrics"]["dead_fraction"]),
    }


def l0_of(record: dict) -> float:
    """Active features per token, mean over layers."""
    return record["metrics"]["l0"] / len(record["metrics"]["l0_per_layer"])


# -- seeds ------------------------------------------------------------------------------------------------------------


def judge(candidate: list[float], baseline: list[float]) -> tuple[float | None, str]:
    """
    Whether a candidate's NMSE differs from the baseline's by more than seeds do.

    Args:
        candidate, baseline: A value per seed.

    Returns:
        The difference of the means, below 0 if the candidate is better, in units of the seeds' standard deviation
        (pooled over both); and "better" or "worse" if it exceeds `SPREADS`, "not told apart", or "too few seeds".
    """
    degrees = len(candidate) + len(baseline) - 2
    if min(len(candidate), len(baseline)) < SEEDS:
        return None, "too few seeds"
    squares = sum((len(values) - 1) * variance(values) for values in (candidate, baseline))
    spread, difference = math.sqrt(squares / degrees), mean(candidate) - mean(baseline)
    if difference == 0:
        return 0.0, "not told apart"
    units = difference / spread if spread > 0 else math.copysign(math.inf, difference)
    return units, "not told apart" if abs(units) <= SPREADS else "worse" if units > 0 else "better"


def compare(records: list[dict], planned: list[dict], wanted: list[float]) -> list[dict]:
    """
    The comparison of each candidate with its family's baseline at each wanted L0.

    Args:
        records: What [`run_plan`] gave.
        planned: `family`, `candidate` and `seed` of each run that is wanted, finished or not.
        wanted: L0 per layer.

    Returns:
        Per family, candidate and L0, in the order of the plan: `family`, `candidate`, `l0`; `begun`, whether it has a
        record; `seeds`, by seed what [`seed_at_l0`] gives; `seconds`, mean of the runs; `units` and `verdict` of
        [`judge`], None for a baseline; `layers`, how many of them are better and worse by [`judge`], None without a
        verdict; `change`, of the mean NMSE against the baseline's, relative; `group_names`; `notes`: what is missing.
    """
    rows, by_place = [], {}
    names = list(dict.fromkeys((run["family"], run["candidate"]) for run in planned))
    layers = next((len(record["metrics"]["l0_per_layer"]) for record in records if "metrics" in record), 0)
    for family, candidate in names:
        own = [record for record in records if (record["family"], record["candidate"]) == (family, candidate)]
        seconds = [record["train_seconds"] for record in own if "train_seconds" in record]
        for l0 in wanted:
            row = {"family": family, "candidate": candidate, "l0": l0, "seeds": {}, "notes": []}
            row["group_names"] = [f"{group[0]}-{group[-1]}" for group in layer_groups(layers)]
            row |= {"seconds": mean(seconds) if seconds else None, "begun": bool(own)}
            place = {"family": family, "candidate": candidate}
            seeds = [run["seed"] for run in planned if {**place, "seed": run["seed"]} == run]
            for seed in dict.fromkeys(seeds):
                runs = [record for record in own if record["seed"] == seed]
                found = seed_at_l0(runs, l0)
                if found is not None:
                    row["seeds"][seed] = found
                else:
                    row["notes"].append(f"seed {seed}: {why_missing(runs, seeds.count(seed), l0)}")
            rows.append(row)
            by_place[family, candidate, l0] = row
    for row in rows:
        baseline = by_place.get((row["family"], BASELINE, row["l0"]))
        row |= {"units": None, "verdict": None, "change": None, "layers": None}
        if row["candidate"] == BASELINE or baseline is None:
            continue
        sides = row["seeds"].values(), baseline["seeds"].values()
        values, others = ([seed["nmse"] for seed in side] for side in sides)
        row["units"], row["verdict"] = judge(values, others)
        if row["units"] is not None:
            by_layer = [zip(*(seed["layers"] for seed in side), strict=True) for side in sides]
            pairs = [pair for pair in zip(*by_layer, strict=True) if None not in (*pair[0], *pair[1])]
            words = [judge(*pair)[1] for pair in pairs]
            row["layers"] = words.count("better"), words.count("worse")
        if values and others:
            row["change"] = mean(values) / mean(others) - 1
    return rows


def why_missing(runs: list[dict], planned: int, wanted: float) -> str:
    """Why runs of one seed, of which so many are planned, give nothing at a wanted L0."""
    for record in runs:
        if "error" in record:
            return record["error"]
    if len(runs) < planned:
        return f"{len(runs)} of {planned} runs are made"
    found = sorted(l0_of(record) for record in runs)
    names = " or ".join(name.replace("_", "-") for name in runs[0]["varied"])
    return f"its runs reach L0 {found[0]:.1f} to {found[-1]:.1f}, not {wanted:g}; give other values of {names}"


# -- table and plot ---------------------------------------------------------------------------------------------------


def format_verdicts(rows: list[dict]) -> str:
    """
    The comparison as one Markdown table, with what is missing below.

    Args:
        rows: What [`compare`] gives.
    """
    groups = next((row["group_names"] for row in rows), [])
    titles = ["family", "candidate", "L0", *[f"NMSE {name}" for name in groups], "mean", "change", "in spreads", ""]
    titles += ["layers better, worse", "CE recovered", "dead", "seconds"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    notes, waiting = [], []
    for row in rows:
        if not row["begun"]:
            waiting.append(f"{row['family']}, {row['candidate']}")
            continue
        seeds = list(row["seeds"].values())
        cells = [row["family"], row["candidate"], f"{row['l0']:g}"]
        cells += [format_number(known_mean(seed["groups"][n] for seed in seeds), ".4f") for n in range(len(groups))]
        cells.append(with_spread((seed["nmse"] for seed in seeds), ".4f"))
        cells.append("" if row["change"] is None else f"{row['change']:+.1%}")
        cells.append("" if row["units"] is None else f"{row['units']:+.1f}")
        verdict = row["verdict"] or ""
        if verdict == "too few seeds":
            verdict += f" ({len(seeds)})"
        cells.append(f"**{verdict}**" if verdict in ("better", "worse") else verdict)
        cells.append("" if row["layers"] is None else "{}, {}".format(*row["layers"]))
        cells.append(with_spread((seed["ce"] for seed in seeds), ".1%"))
        cells.append(format_number(known_mean(seed["dead"] for seed in seeds), ".1%"))
        cells.append(format_number(row["seconds"], ".0f"))
        lines.append("| " + " | ".join(cells) + " |")
        place = f"{row['family']}, {row['candidate']}, L0 {row['l0']:g}"
        notes += [f"- {place}, {note}" for note in row["notes"]]
    explained = (
        "NMSE of groups of layers and mean over layers, CE recovered and dead features, at the same L0 per layer;\n"
        "± is the standard deviation over seeds. The mean's difference from that of the family's baseline counts\n"
        f"beyond {SPREADS} such spreads, with {SEEDS} seeds each."
    )
    if waiting:
        notes.append("- no run is made of " + "; ".join(dict.fromkeys(waiting)))
    return "\n".join([*lines, "", explained, *([""] if notes else []), *notes]) + "\n"


def with_spread(values: Iterable[float | None], spec: str) -> str:
    """The mean of what is known ± its standard deviation."""
    known = [value for value in values if value is not None]
    spread = f" ± {math.sqrt(variance(known)):{spec}}" if len(known) > 1 else ""
    return format_number(known_mean(known), spec) + spread


def known_mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def plot_verdicts(rows: list[dict], path: str | Path) -> None:
    """
    Draws the NMSE of every seed against the mean of the family's baseline, a panel per wanted L0, as PNG; what has no
    seed that reached it is left out.

    Args:
        rows: What [`compare`] gives.
        path: The file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [row for row in rows if row["seeds"]]
    wanted = list(dict.fromkeys(row["l0"] for row in rows))
    names = list(dict.fromkeys((row["family"], row["candidate"]) for row in rows))
    families = list(dict.fromkeys(family for family, _ in names))
    with draw_figure(path, (4.4 * max(1, len(wanted)) + 1.6, 1.2 + 0.26 * len(names))) as figure:
        panels = figure.subplots(1, max(1, len(wanted)), squeeze=False, sharey=True)[0]
        for panel, l0 in zip(panels, wanted, strict=False):
            for row in (row for row in rows if row["l0"] == l0):
                baseline = [other for other in rows if (other["family"], other["l0"]) == (row["family"], l0)]
                baseline = [
                    seed for other in baseline if other["candidate"] == BASELINE for seed in other["seeds"].values()
                ]
                if not baseline or not row["seeds"]:
                    continue
                zero = mean(seed["nmse"] for seed in baseline)
                changes = [100 * (seed["nmse"] / zero - 1) for seed in row["seeds"].values()]
                height = names.index((row["family"], row["candidate"]))
                color = COLORS[families.index(row["family"]) % len(COLORS)]
                panel.plot(changes, [height] * len(changes), "o", color=color, markersize=4, alpha=0.5)
                panel.plot([mean(changes)], [height], "|", color=color, markersize=12, markeredgewidth=2)
            panel.axvline(0, color=GREY, linewidth=1)
            panel.set_title(f"L0 {l0:g} per layer")
            panel.set_xlabel("NMSE, % above the baseline")
        panels[0].set_yticks(range(len(names)), [f"{family}: {candidate}" for family, candidate in names])
        panels[0].set_ylim(len(names) - 0.5, -0.5)


__all__ = ["at_l0", "compare", "format_verdicts", "judge", "layer_groups", "plot_verdicts", "seed_at_l0"]
