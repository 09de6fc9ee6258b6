"""
Rates of this machine for [`hf_clt.estimate`], solved from small measured steps; and the estimates beside
measured runs of other shapes.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from hf_clt import estimate
from hf_clt.estimate import LanguageModel, Plan, memory, seconds

from .cases import Case
from .measure import PHASES, Source
from .run import measure_in_process


# Shapes that rates are solved from, as shares of the shape that is planned: rates depend on the width, the tokens and
# the active features, and small shapes are slower for their size.
CALIBRATION = [
    {"num_layers": 1 / 2, "num_features": 1 / 2},
    {"num_layers": 1 / 2},
    {"num_layers": 3 / 4, "num_features": 1 / 2},
    {"num_layers": 3 / 4, "num_features": 3 / 4},
    {"num_layers": 1 / 2, "num_features": 3 / 4, "tokens": 1 / 2},
    {"num_layers": 1 / 2, "num_features": 1 / 2, "tokens": 2},
    {"num_layers": 3 / 4, "num_features": 1 / 2, "l0": 1 / 2},
    {"num_layers": 1 / 2, "num_features": 1 / 2, "l0": 2},
]
# What the estimates are compared with; none of them is among those.
CHECKS = [
    {},
    {"num_layers": 3 / 4},
    {"num_features": 3 / 4},
    {"num_features": 3 / 4, "tokens": 3 / 2},
    {"num_layers": 5 / 4, "l0": 3 / 4},
]
# A language model with random weights, whose speed gives the rate for all.
PROBE = {"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
PROBE |= {"num_key_value_heads": 4, "intermediate_size": 1408, "vocab_size": 4096}


def scale(base: Case, shares: dict[str, float]) -> Case:
    """`base` with some of its numbers multiplied."""
    changed = {name: max(1, round(getattr(base, name) * share)) for name, share in shares.items()}
    return replace(base, **changed)


def plan_of(case: Case, run: dict | None = None) -> Plan:
    """The plan of a benchmark's case; with what was listed in it, once it has run."""
    return Plan(
        config=case.config(),
        batch_size=case.tokens,
        l0=case.l0,
        listed=None if run is None else sum(run["listed_last"]) / case.num_layers,
        clt_dtype=case.dtype,
        product_dtype=case.product_dtype,
        optimizer=case.optimizer,
        buffer_batches=1,  # a benchmark has no buffer
        buffer_on_device=False,
        on_gpu=case.device != "cpu",
    )


def measure_rates(
    base: Case,
    rounds: int = 3,
    say: Callable[[str], None] = lambda text: None,
    measure: Callable[[dict], dict] = measure_in_process,
) -> tuple[dict[str, float], list[dict], list[dict]]:
    """
    Measures steps of the shapes of [`CALIBRATION`] and solves for the rates, and steps of those of [`CHECKS`], none of
    which the rates come from.

    Args:
        base: The shape that is planned, and all else; what the rates come from is smaller.
        rounds: How often all of it is measured, in turn, so that a slow minute of a machine that others use as well
            does not fall on some shapes alone; the fastest of each counts.
        say: Gets a line before each measurement.
        measure: Does a job of [`benchmarks.measure`].

    Returns:
        `tuple[dict, list, list]`: The rates that [`seconds`] takes, those of a language model too; and the measured
        steps beside what the rates give for them, see [`compare_step`], of both groups of shapes.
    """
    all_cases = [scale(base, shares) for shares in CALIBRATION + CHECKS]
    all_runs = []
    for turn in range(rounds):
        for number, case in enumerate(all_cases):
            say(f"round {turn + 1} of {rounds}, shape {number + 1} of {len(all_cases)}")
            run = measure({"kind": "step", "case": case.to_dict(), "side": "ours"})
            if turn == 0:
                all_runs.append(run)
            for phase in PHASES:
                all_runs[number][phase] = [min([*all_runs[number][phase], *run[phase]])]
    cases, runs = all_cases[: len(CALIBRATION)], all_runs[: len(CALIBRATION)]
    plans = [plan_of(case, run) for case, run in zip(cases, runs, strict=True)]
    rates = solve_rates(plans, [{phase: min(run[phase]) for phase in PHASES} for run in runs])
    say("language model")
    probe = {"config": PROBE, "prompts": 8, "context_size": 128, "device": base.device, "dtype": base.dtype}
    rates["language_model"] = measure({"kind": "language_model", **probe})["flops_per_second"]
    rates["shared"] = rates["averaged"] = float("inf")  # one process exchanges nothing
    rows = [compare_step(case, run, rates) for case, run in zip(all_cases, all_runs, strict=True)]
    return rates, rows[: len(cases)], rows[len(cases) :]


def check_run(
    base: Case,
    source: Source,
    language_model: LanguageModel,
    rates: dict[str, float],
    rounds: int = 3,
    measure: Callable[[dict], dict] = measure_in_process,
) -> dict:
    """
    Measures a run of the trainer on a language model, with all that belongs to it, beside the estimate; the fastest of
    `rounds` runs.

    Returns:
        `dict` as of [`compare_step`]; the time is that of an update with the language model's share of it.
    """
    case = Case(**{**asdict(base), "num_layers": language_model.num_layers, "d_model": language_model.d_model})
    job = {"kind": "end_to_end", "case": case.to_dict(), "source": asdict(source), "statistics": None}
    run = max((measure(job) for _ in range(rounds)), key=lambda run: run["tokens_per_second"])
    plan = Plan(
        config=case.config(),
        language_model=language_model,
        batch_size=case.tokens,
        l0=case.l0,
        clt_dtype=case.dtype,
        model_dtype=run["model_dtype"],
        optimizer=case.optimizer,
        context_size=source.context_size,
        prompts=source.prompts,
        buffer_batches=run["buffer_batches"],
    )
    return compare(case, plan, case.tokens / run["tokens_per_second"], run["peak_bytes"], rates) | {
        "source": source.model
    }


def compare_step(case: Case, run: dict, rates: dict[str, float]) -> dict:
    """
    A measured step beside its estimate.

    Returns:
        `dict`: `case`; `seconds` and `bytes`, each `{"measured", "estimated", "error"}`, where the error is relative.
        Seconds are those of the fastest steps: a machine that others use is never faster than itself. Estimated with
        the number of listed features that was measured, which is no matter of the formulas.
    """
    measured = sum(min(run[phase]) for phase in PHASES)
    return compare(case, plan_of(case, run), measured, run["peak_bytes"], rates)


def compare(case: Case, plan: Plan, measured_seconds: float, measured_bytes: int | None, rates: dict) -> dict:
    figures = {"seconds": (measured_seconds, seconds(plan, rates)["total"])}
    if measured_bytes is not None:
        figures["bytes"] = (measured_bytes, memory(plan)["total"])
    return {"case": case.to_dict()} | {
        name: {"measured": measured, "estimated": estimated, "error": estimated / measured - 1}
        for name, (measured, estimated) in figures.items()
    }


def format_checks(rows: list[dict]) -> str:
    """Measured beside estimated, as a Markdown table."""
    lines = ["| L, D, F, N, active | time: measured, estimated | error | memory: measured, estimated | error |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        case = row["case"]
        shape = ", ".join(str(case[name]) for name in ("num_layers", "d_model", "num_features", "tokens", "l0"))
        name = f"{shape}, with its language model" if "source" in row else shape
        time, size = row["seconds"], row.get("bytes")
        cells = [
            name,
            f"{time['measured'] * 1000:,.0f} ms, {time['estimated'] * 1000:,.0f} ms",
            f"{time['error']:+.1%}",
        ]
        cells += ["", ""] if size is None else []
        if size is not None:
            cells += [f"{size['measured'] / 1e9:.2f} GB, {size['estimated'] / 1e9:.2f} GB", f"{size['error']:+.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def solve_rates(plans: list[Plan], measured: list[dict[str, float]]) -> dict[str, float]:
    """
    The rates with which the formulas come nearest to measured steps, in relative least squares, each phase for itself.

    Args:
        plans: The runs; more of them than a phase has rates.
        measured: Seconds of `forward`, `backward` and `optimizer` of each.

    Returns:
        Rates of all parts of the work that occurs; what came out as taking no time has the rate inf.
    """
    rates = {}
    counts = [estimate.work(plan) for plan in plans]
    for phase in ("forward", "backward", "optimizer"):
        times = torch.tensor([run[phase] for run in measured], dtype=torch.float64)
        parts = {name: rate for name, rate in estimate.PHASES[phase].items() if any(count[name] for count in counts)}
        rates |= dict.fromkeys(estimate.PHASES[phase].values(), math.inf)
        matrix = torch.tensor([[count[name] for name in parts] for count in counts], dtype=torch.float64)
        found = nonnegative_least_squares(matrix / times[:, None], torch.ones_like(times))
        rates |= {rate: 1 / cost if cost > 0 else math.inf for rate, cost in zip(parts.values(), found, strict=True)}
    return rates


def nonnegative_least_squares(matrix: torch.Tensor, target: torch.Tensor, sweeps: int = 10_000) -> list[float]:
    """
    The x ≥ 0 for which |matrix x - target|² is smallest, one coordinate after another, many times. Where columns are
    nearly the same (two kinds of work that occur in proportion), any of the equivalent answers.
    """
    scale = matrix.norm(dim=0)
    matrix = matrix / scale
    gram, wanted = (matrix.T @ matrix).tolist(), (matrix.T @ target).tolist()
    x = [0.0] * len(wanted)
    for _ in range(sweeps):
        for j, row in enumerate(gram):
            x[j] = max(0.0, x[j] + wanted[j] - sum(g * value for g, value in zip(row, x, strict=True)))
    return [value / s for value, s in zip(x, scale.tolist(), strict=True)]


__all__ = ["check_run", "compare_step", "format_checks", "measure_rates", "plan_of"]
