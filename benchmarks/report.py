"""What the benchmark shows: the rows put together, one table in the terminal, and the plot of growth."""

from pathlib import Path
from statistics import median

from hf_clt.hub.plots import BLUE, ORANGE

from .cases import GROWTH, Case
from .costs import active_costs, dense_flops, limit_seconds
from .measure import PHASES
from .output import align, draw_figure


STAGES = ("encode", "select", "decode")  # ranges of the forward pass that have a line of their own
SAME_LOSS = 0.01  # relative; in bfloat16 both sides round
AXIS_LABELS = {
    "L": "layers L",
    "F": "features per layer F",
    "N": "tokens per step N",
    "k": "active features per layer and token",
}


def summarize(case: Case, rates: dict[str, float], runs: list[dict], source: dict | None = None) -> dict:
    """
    One row of the benchmark.

    Args:
        case: The shape.
        rates: What [`measure_rates`] returned for this case.
        runs: What [`measure_step`] returned, for each side and round.
        source: With real activations: `harvest` and, if it was measured, `end_to_end`.

    Returns:
        `dict`: `case`; `ours` and `dense` (None if it was not measured): `step_seconds` with `median`, `min`, `max`,
        the median of each phase, `tokens_per_second`, `peak_bytes`, `state_bytes` (parameters, gradients, optimizer)
        and `peak_over_state`; `ratio` of the medians, and of each round; `counts`, `limit_seconds`,
        `share_of_limit`; for real activations `harvest` and `end_to_end`.
    """
    ours_runs = [run for run in runs if run["side"] == "ours"]
    dense_runs = [run for run in runs if run["side"] == "dense"]
    ours, dense = summarize_side(case, ours_runs), summarize_side(case, dense_runs) if dense_runs else None
    if dense is not None:
        check_same_loss(ours_runs[0]["loss_first"], dense_runs[0]["loss_first"])
    last = ours_runs[-1]
    costs = active_costs(
        case, last["active_rows"], last["listed_rows"], last["parameter_bytes"], last["optimizer_bytes"]
    )
    limit = limit_seconds(case, costs, rates)
    flops = dense_flops(case)
    row = {
        "case": case.to_dict(),
        "product_dtype": case.product_dtype,
        "ours": ours,
        "dense": dense,
        "l0_first": mean(ours_runs[0]["l0_first"]),
        "l0_last": mean(last["l0_last"]),
        "listed_share": mean(last["listed_last"]) / case.num_features,
        "split_seconds": split_seconds(ours, ours_runs[0]["ranges"]),
        "rates": rates,
        "counts": {**costs, "dense_flops": flops},
        "limit_seconds": limit,
        "share_of_limit": limit["total"] / ours["step_seconds"]["median"],
    }
    if dense is not None:
        row["ratio"] = dense["step_seconds"]["median"] / ours["step_seconds"]["median"]
        row["ratio_per_round"] = [
            median(step_seconds(d)) / median(step_seconds(o)) for d, o in zip(dense_runs, ours_runs, strict=True)
        ]
        rate = flops / dense["step_seconds"]["median"]
        row["dense_share_of_gemm_rate"] = rate / rates["gemm_decoder"]
    if source is not None:
        row |= source
        row["split_seconds"]["harvest"] = case.tokens / source["harvest"]["tokens_per_second"]
        if dense is not None:
            total = row["split_seconds"]["harvest"] + dense["step_seconds"]["median"]
            row["dense_end_to_end_tokens_per_second"] = case.tokens / total
    return row


def summarize_side(case: Case, runs: list[dict]) -> dict:
    seconds = [value for run in runs for value in step_seconds(run)]
    peaks = [run["peak_bytes"] for run in runs]
    peak = None if None in peaks else max(peaks)
    state = 2 * runs[0]["parameter_bytes"] + runs[0]["optimizer_bytes"]  # a gradient is as large as its parameter
    return {
        "step_seconds": {"median": median(seconds), "min": min(seconds), "max": max(seconds), "steps": len(seconds)},
        **{f"{phase}_seconds": median(value for run in runs for value in run[phase]) for phase in PHASES},
        "tokens_per_second": case.tokens / median(seconds),
        "peak_bytes": peak,
        "state_bytes": state,
        "peak_over_state": None if peak is None else peak / state,
        "loss_first": runs[0]["loss_first"],
    }


def check_same_loss(ours: float, dense: float) -> None:
    """Raises RuntimeError if the first steps of the sides had different losses: they would not do the same work."""
    if not abs(ours - dense) <= SAME_LOSS * abs(dense):
        raise RuntimeError(
            f"the loss of the first step is {ours:g} in ours and {dense:g} in the dense reference: they do not "
            "compute the same, so their times cannot be compared"
        )


def step_seconds(run: dict) -> list[float]:
    return [sum(phases) for phases in zip(*(run[phase] for phase in PHASES), strict=True)]


def split_seconds(ours: dict, ranges: dict[str, float]) -> dict[str, float | None]:
    """
    Seconds of a step by what they are spent on. The stages of the forward pass come from the profiler (None where the
    model opens no such range), the rest from the clock.
    """
    stages = {name: ranges.get(name) for name in STAGES}
    return {
        "harvest": 0.0,
        **stages,
        "forward": ours["forward_seconds"],
        "backward": ours["backward_seconds"],
        "optimizer": ours["optimizer_seconds"],
        **{name: value for name, value in sorted(ranges.items()) if name not in STAGES},
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# -- table ------------------------------------------------------------------------------------------------------------


def format_table(rows: list[dict]) -> str:
    """
    The rows as an aligned table, one column per row of the benchmark, so that it stays readable in a terminal.

    Args:
        rows: What [`summarize`] returned.
    """
    lines = [["", *[str(number) for number in range(1, len(rows) + 1)]]]

    def add(title, show):
        cells = [show(row) for row in rows]
        if any(cell is not None for cell in cells):
            lines.append([title, *["-" if cell is None else cell for cell in cells]])

    def rule():
        lines.append(None)

    rule()
    add("layers L", lambda r: f"{r['case']['num_layers']}")
    add("width D", lambda r: f"{r['case']['d_model']:,}")
    add("features per layer F", lambda r: f"{r['case']['num_features']:,}")
    add("tokens per step N", lambda r: f"{r['case']['tokens']:,}")
    add("activation function", lambda r: r["case"]["activation_fn"])
    add("weights", lambda r: r["case"]["dtype"])
    add("matrix products", lambda r: r["product_dtype"])
    add("L0 per layer, asked for", lambda r: f"{r['case']['l0']}")
    add("L0 per layer, first", lambda r: f"{r['l0_first']:.1f}")
    add("L0 per layer, last", lambda r: f"{r['l0_last']:.1f}")
    add("listed entries (% of F)", lambda r: f"{100 * r['listed_share']:.2f}")
    rule()
    add("dense step (ms)", lambda r: r["dense"] and format_ms(r["dense"]["step_seconds"]["median"]))
    add("  min - max", lambda r: r["dense"] and format_span(r["dense"]["step_seconds"]))
    add("  of GEMM rate (%)", lambda r: format_percent(r.get("dense_share_of_gemm_rate")))
    add("our step (ms)", lambda r: format_ms(r["ours"]["step_seconds"]["median"]))
    add("  min - max", lambda r: format_span(r["ours"]["step_seconds"]))
    add("ratio dense / ours", lambda r: None if r["dense"] is None else f"{r['ratio']:.2f}")
    add("  by round", lambda r: None if r["dense"] is None else " ".join(f"{v:.2f}" for v in r["ratio_per_round"]))
    add("limit (ms)", lambda r: format_ms(r["limit_seconds"]["total"]))
    add("share of the limit (%)", lambda r: format_percent(r["share_of_limit"]))
    rule()
    add("harvest (ms)", lambda r: format_ms(r["split_seconds"]["harvest"]))
    add("forward (ms)", lambda r: format_ms(r["split_seconds"]["forward"]))
    for stage in STAGES:
        lines.append([f"  {stage} (ms)", *[format_ms(row["split_seconds"][stage]) or "-" for row in rows]])
    add("backward (ms)", lambda r: format_ms(r["split_seconds"]["backward"]))
    add("optimizer (ms)", lambda r: format_ms(r["split_seconds"]["optimizer"]))
    rule()
    add("tokens/s, ours", lambda r: f"{r['ours']['tokens_per_second']:,.0f}")
    add("tokens/s, dense", lambda r: r["dense"] and f"{r['dense']['tokens_per_second']:,.0f}")
    add(
        "tokens/s with harvest, ours",
        lambda r: format_number(r.get("end_to_end", {}).get("tokens_per_second")),
    )
    add("tokens/s with harvest, dense", lambda r: format_number(r.get("dense_end_to_end_tokens_per_second")))
    add("parameters, grads, Adam (GB)", lambda r: format_gigabytes(r["ours"]["state_bytes"]))
    add("peak memory, ours (GB)", lambda r: format_gigabytes(r["ours"]["peak_bytes"]))
    add("  of parameters, grads, Adam", lambda r: format_times(r["ours"]["peak_over_state"]))
    add("peak memory, dense (GB)", lambda r: r["dense"] and format_gigabytes(r["dense"]["peak_bytes"]))

    return align(lines)


def format_ms(seconds: float | None) -> str | None:
    return None if seconds is None else f"{1000 * seconds:,.1f}"


def format_span(seconds: dict) -> str:
    return f"{1000 * seconds['min']:,.0f} - {1000 * seconds['max']:,.0f}"


def format_percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f}"


def format_gigabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e9:.2f}"


def format_times(factor: float | None) -> str | None:
    return None if factor is None else f"{factor:.2f} x"


def format_number(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def format_machine(machine: dict, rates: dict) -> str:
    """One line: the device, and the rates of the first case."""
    gemm, bandwidth = 1e9 * (1000 if rates["gemm_encoder"] > 1e12 else 1), 1e9
    unit = "TFLOP/s" if gemm == 1e12 else "GFLOP/s"
    return (
        f"{machine['device']}: products {rates['gemm_encoder'] / gemm:,.0f} (encoder) and "
        f"{rates['gemm_decoder'] / gemm:,.0f} {unit} (decoder), memory read {rates['read'] / bandwidth:,.0f}, written "
        f"{rates['write'] / bandwidth:,.0f}, updated {rates['update'] / bandwidth:,.0f} GB/s"
    )


# -- plot -------------------------------------------------------------------------------------------------------------


def plot_growth(rows_by_axis: dict[str, list[dict]], path: Path) -> None:
    """
    Draws step time against each axis, ours and dense, with the limit; both scales logarithmic.

    Args:
        rows_by_axis: For each of "L", "F", "N", "k" that was grown, its rows.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with draw_figure(path, (4.2 * len(rows_by_axis), 3.4)) as figure:
        panels = figure.subplots(1, len(rows_by_axis), squeeze=False)[0]
        for panel, (axis, rows) in zip(panels, rows_by_axis.items(), strict=True):
            values = [row["case"][GROWTH[axis][0]] for row in rows]
            series = [("ours", BLUE, "-", [row["ours"]["step_seconds"]["median"] for row in rows])]
            if all(row["dense"] is not None for row in rows):
                dense = [row["dense"]["step_seconds"]["median"] for row in rows]
                series.insert(0, ("dense reference", ORANGE, "-", dense))
            series.append(("limit of the machine", BLUE, ":", [row["limit_seconds"]["total"] for row in rows]))
            for label, colour, style, seconds in series:
                panel.plot(
                    values, [1000 * s for s in seconds], style, marker="o", markersize=3, color=colour, label=label
                )
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.minorticks_off()
            panel.set_xlabel(AXIS_LABELS[axis])
            panel.set_ylabel("step (ms)")
            panel.set_title(title_of_others(rows[0]["case"], axis))
        panels[0].legend()


def title_of_others(case: dict, axis: str) -> str:
    """What stays while one axis grows, as a title."""
    shown = {"L": "num_layers", "D": "d_model", "F": "num_features", "N": "tokens", "k": "l0"}
    short = ", ".join(f"{name} {case[field]:,}" for name, field in shown.items() if name != axis)
    return f"{case['activation_fn']}, {short}"


__all__ = ["format_machine", "format_table", "plot_growth", "summarize"]
