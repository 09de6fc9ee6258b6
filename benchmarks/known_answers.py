"""
Trains CLTs of several reaches and sparsities on language models whose circuits are known, and measures how much of
these circuits their graphs show; beside them the CLTs that are right, and collapsed, by construction, a random one and
one with shuffled decoders.

  python -m benchmarks.known_answers --records benchmarks/known_answers.jsonl --plot docs/known_answers.png

A run that is recorded is not made again; if all are, the command prints the table and draws the plot.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.audit.controls import random_clt, shuffled_clt
from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.evaluation.metrics import MetricSums
from hf_clt.harvest.harvester import Harvester
from hf_clt.harvest.normalization import set_decoder_directions, set_encoder_directions, set_firing_rate
from hf_clt.hub.plots import BLUE, INK, ORANGE
from hf_clt.training.arguments import CLTTrainingArguments
from hf_clt.training.optimizers import clip_grad_norm, make_optimizer
from hf_clt.training.schedules import growing_reach, learning_rate_scale, sparsity_scale
from hf_clt.training.setup import prepare_cpu
from hf_clt.training.trainer import limit_reach

from .known_measure import clt_of, edges_found, match, questions, steps, trace
from .known_models import KNOWN, KnownModel
from .output import align, check_folders, draw_figure
from .sweep import append_record, read_records


SEEDS = (0, 1, 2)
LAMBDAS = (0.001, 0.01, 0.1)  # per unit of width; 0.01 is the default
NUM_FEATURES, BATCH_SIZE, DEAD_AFTER = 64, 512, 100
TRAINING = CLTTrainingArguments(training_steps=500, learning_rate=4e-3)
TRAIN_PROMPTS, HELDOUT_PROMPTS, PER_ANSWER = 4096, 500, 3
SHARES = {"two_steps": BLUE, "one_step": ORANGE, "elsewhere": "#d5d9de"}
NAMES = {
    "two_steps": "influence by way of the intermediate",
    "one_step": "from the same tokens past it",
    "elsewhere": "from errors and other tokens",
    "edges": "share of true edges",
}
COLUMNS = {"nmse": "NMSE", "l0": "L0", "correlation": "correlation", "edges": "edges", "edges_of_best": "of best"}
COLUMNS |= {"two_steps": "two steps", "one_step": "one step", "elsewhere": "elsewhere"}
KINDS = ("right", "collapsed", "trained", "grown", "shuffled", "random")
GROWTH = 0.6  # --reach-growth of "grown", which writes to all layers in the end
GROUPED = ("model", "clt", "reach", "lambda")


# -- the runs ---------------------------------------------------------------------------------------------------------


def train_clt(
    config: CLTConfig, inputs: Tensor, labels: Tensor, args: CLTTrainingArguments = TRAINING
) -> CrossLayerTranscoder:
    """
    Trains a jumprelu CLT on activations (N, L, D) that are there, as the trainer does: from the same start, with the
    same losses, schedules and optimizer. It is returned in eval mode, its statistics folded.
    """
    torch.manual_seed(args.seed)
    clt = CrossLayerTranscoder(config).train()
    clt.set_normalization(*(moment for rows in (inputs, labels) for moment in (rows.mean(dim=0), rows.std(dim=0))))
    order = torch.randperm(len(inputs))
    sample = order[:2048]
    for layer in range(config.num_layers):
        chosen = order.roll(-layer * len(order) // config.num_layers)[: config.num_features]
        set_encoder_directions(clt, layer, inputs[chosen, layer])
    set_firing_rate(clt, inputs[sample], 0.02)
    set_decoder_directions(clt, inputs[sample], labels[sample])
    optimizer = make_optimizer(clt, args)
    silent = torch.zeros(config.num_layers, config.num_features, dtype=torch.int64)
    falls_over = args.training_steps - args.num_warmup_steps  # the records were made so
    for step in range(args.training_steps):
        rate = learning_rate_scale(step, args.training_steps, args.num_warmup_steps, "linear", falls_over)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        rows = torch.randint(len(inputs), (BATCH_SIZE,))
        scale = sparsity_scale(step, args.training_steps, args.sparsity_schedule)
        output = clt(inputs[rows], labels[rows], sparsity_scale=scale, dead=silent >= DEAD_AFTER)
        output.loss.backward()
        clip_grad_norm(clt, optimizer, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        reach = growing_reach(step + 1, args.training_steps, args.reach_growth, config.reach)
        if reach < config.reach:
            limit_reach(clt, reach)
        silent = torch.where(output.features.active_counts() > 0, 0, silent + 1)
    clt.fold_normalization()
    return clt.eval().requires_grad_(False)


class Bench:
    """A known language model with what its CLTs are trained and measured on."""

    def __init__(self, known: KnownModel):
        self.known = known
        self.truth = clt_of(known, known.neurons)
        self.questions = questions(known, PER_ANSWER, seed=2)
        self.inputs, self.labels = self.harvest(HELDOUT_PROMPTS, 1)
        self.train_inputs, self.train_labels = (rows.float() for rows in self.harvest(TRAIN_PROMPTS, 3))

    def harvest(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """What features read and what is to be written, (N, L, D) each, on the counted positions of prompts."""
        prompts = self.known.draw(count, seed)
        counted = torch.zeros_like(prompts, dtype=torch.bool)
        counted[:, self.known.counted] = True
        batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "counted": counted}
        return Harvester(self.known.model).harvest(batch, dtype=torch.float64)

    def train(self, reach: int, sparsity: float, seed: int, reach_growth: float = 0.0) -> CrossLayerTranscoder:
        """With λ = `sparsity` · D; in float64, as the model is."""
        shape = self.known.model.config
        config = CLTConfig(
            num_layers=shape.n_layer,
            d_model=shape.n_embd,
            num_features=NUM_FEATURES,
            decoder_reach=reach,
            sparsity_lambda=sparsity * shape.n_embd,
        )
        args = replace(TRAINING, seed=seed, reach_growth=reach_growth)
        return train_clt(config, self.train_inputs, self.train_labels, args).double()

    def measure(self, clt: CrossLayerTranscoder) -> dict:
        """NMSE and L0 on held-out prompts, and what the graphs of the questions show; by distance too."""
        output = clt(self.inputs)
        sums = MetricSums(clt.config.num_layers, clt.config.d_model, clt.config.num_features)
        sums.update(self.labels, output.reconstruction, output.features)
        metrics = sums.compute()
        correlations, best, standing = match(self.truth, clt, self.inputs)
        rows, distances = [], [question.distance for question in self.questions]
        for question in self.questions:
            graph = trace(self.known, clt, question.prompt, question.answer)
            found, there = edges_found(question, graph, standing)
            row = {"found": found, "there": there, "found_by_best": edges_found(question, graph, best)[0]}
            rows.append({**row, **steps(question, graph, standing)})
        record = {name: metrics[name] for name in ("nmse", "l0", "dead_fraction")}
        record["correlation"] = mean(correlations.values())
        for name, found in (("edges", "found"), ("edges_of_best", "found_by_best")):
            record[name] = sum(row[found] for row in rows) / sum(row["there"] for row in rows)
        record |= {name: mean(row[name] for row in rows) for name in SHARES}
        record["by_distance"] = {
            str(distance): {
                name: mean(row[name] for row, at in zip(rows, distances, strict=True) if at == distance)
                for name in SHARES
            }
            for distance in sorted(set(distances))
        }
        return record | {"questions": len(rows)}


def runs(names: list[str], seeds: Sequence[int], lambdas: Sequence[float] = LAMBDAS) -> list[dict]:
    """What identifies each record, in order."""
    found = [
        {"model": name, "clt": what, "reach": None, "lambda": None, "seed": None}
        for name in names
        for what in ("right", "collapsed")
    ]
    reaches = {name: range(1, KNOWN[name]().model.config.n_layer + 1) for name in names}
    return found + [
        {"model": name, "clt": what, "reach": reach, "lambda": sparsity, "seed": seed}
        for seed in seeds
        for name in names
        for what, reach in [*(("trained", reach) for reach in reaches[name]), ("grown", reaches[name][-1])]
        for sparsity in lambdas
    ]


def make_runs(wanted: list[dict], path: Path) -> list[dict]:
    """
    Makes those that are not recorded yet; the records of all that are. Those of two controls, [`shuffled_clt`] and
    [`random_clt`], come with each CLT that writes to all layers.
    """
    torch.set_num_threads(1)
    prepare_cpu()
    bench = None
    for number, run in enumerate(wanted, start=1):
        if any(run.items() <= record.items() for record in read_records(path)):
            continue
        if bench is None or bench.known.name != run["model"]:
            bench = Bench(KNOWN[run["model"]]())
        if run["clt"] in ("trained", "grown"):
            clt = bench.train(run["reach"], run["lambda"], run["seed"], GROWTH if run["clt"] == "grown" else 0.0)
        else:
            clt = clt_of(bench.known, bench.known.neurons if run["clt"] == "right" else bench.known.collapsed)
        made = {run["clt"]: clt}
        if run["clt"] == "trained" and run["reach"] == clt.config.num_layers:
            made["shuffled"] = shuffled_clt(clt, run["seed"])
            made["random"] = random_clt(copy.deepcopy(clt).float(), bench.inputs.float(), run["seed"]).double()
        for what, each in reversed(made.items()):  # the run's own last: an interrupted one is made again
            append_record(path, {**run, "clt": what, **bench.measure(each)})
        names = ", ".join(f"{name} {value}" for name, value in run.items() if value is not None)
        print(f"[{number} of {len(wanted)}] {names}", flush=True)
    return [record for record in read_records(path) if any(is_of(record, run) for run in wanted)]


def is_of(record: dict, run: dict) -> bool:
    """Whether a record is that of a run, or of a control that came with it."""
    return all(record[name] == value for name, value in run.items() if name != "clt" or record["seed"] is None)


# -- what they say ----------------------------------------------------------------------------------------------------


def summarize(records: list[dict]) -> list[dict]:
    """Means over the seeds, by model, kind of CLT, reach and sparsity, and `seeds`, their number."""
    groups = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in GROUPED), []).append(record)
    found = []
    for key, group in groups.items():
        means = {name: mean(record[name] for record in group) for name in COLUMNS}
        found.append({**dict(zip(GROUPED, key, strict=True)), **means, "seeds": len(group)})
    return found


def format_summary(rows: list[dict]) -> str:
    lines = [["model and CLT", "reach", "λ / D", *COLUMNS.values()]]
    for name in dict.fromkeys(row["model"] for row in rows):
        lines += [None, [name, *[""] * (2 + len(COLUMNS))]]
        for row in sorted((row for row in rows if row["model"] == name), key=place):
            cells = ["" if row[key] is None else f"{row[key]:g}" for key in ("reach", "lambda")]
            lines.append([f"  {row['clt']}", *cells, *(f"{row[column]:.3f}" for column in COLUMNS)])
    return align(lines)


def format_distances(records: list[dict]) -> str:
    """`one_step` of the trained CLTs by how many layers the answer is above the intermediate; means over the rest."""
    trained = [record for record in records if record["clt"] == "trained"]
    lines = [["one step, by distance", "reach", "1", "2", "3"], None]
    for name, reach in sorted({(record["model"], record["reach"]) for record in trained}):
        found = [r["by_distance"] for r in trained if (r["model"], r["reach"]) == (name, reach)]
        cells = [[shares[n]["one_step"] for shares in found if n in shares] for n in "123"]
        lines.append([name, str(reach), *(f"{mean(values):.3f}" if values else "" for values in cells)])
    return align(lines)


def place(row: dict) -> tuple:
    """Where a row stands in table and plot."""
    return KINDS.index(row["clt"]), row["reach"] or 0, row["lambda"] or 0


def plot_summary(rows: list[dict], path: Path) -> None:
    """A panel per model: a bar per CLT, of the shares of influence, and a mark at the share of true edges."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    with draw_figure(path, (11, 2.7 * -(-len(names) // 2) + 0.5)) as figure:
        panels = figure.subplots(-(-len(names) // 2), 2, squeeze=False).flatten()
        for axes, name in zip(panels, names, strict=False):
            own = sorted((row for row in rows if row["model"] == name), key=place)
            x, last, ticks = -1.0, None, {}
            for row in own:
                group = row["clt"] if row["clt"] != "trained" else f"reach {row['reach']}"
                x += 1 if group == last else 2.6
                ticks.setdefault(group, []).append(x)
                last, bottom = group, 0.0
                for share, color in SHARES.items():
                    axes.bar(x, row[share], 0.9, bottom, color=color, label=NAMES[share] if row is own[0] else None)
                    bottom += row[share]
                label = NAMES["edges"] if row is own[0] else None
                axes.plot(x, row["edges"], "o", color=INK, markersize=4, clip_on=False, label=label, linestyle="")
            axes.set_xticks([mean(places) for places in ticks.values()], list(ticks), fontsize=7.5)
            axes.set(title=name, ylim=(0, 1))
            axes.grid(axis="x", visible=False)
            lambdas = sorted({row["lambda"] for row in own if row["lambda"] is not None})
            axes.set_xlabel(f"λ / D = {', '.join(f'{sparsity:g}' for sparsity in lambdas)}", fontsize=8)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)


# -- the command ------------------------------------------------------------------------------------------------------


@one_line_errors(ImportError, interrupted="the same command goes on with the next run")
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, metavar="FILE", help="JSONL file, a line per CLT")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for the plot")
    parser.add_argument("--models", nargs="+", choices=KNOWN, default=list(KNOWN), metavar="NAME", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="of the trained CLTs (0 1 2)")
    parser.add_argument("--lambdas", type=float, nargs="+", default=LAMBDAS, metavar="X", help="per unit of width")
    options = parser.parse_args(argv)
    check_folders(options.records, options.plot)
    records = make_runs(runs(options.models, options.seeds, options.lambdas), options.records)
    rows = summarize(records)
    print(format_summary(rows), format_distances(records), sep="\n\n")
    if options.plot is not None:
        plot_summary(rows, options.plot)


if __name__ == "__main__":
    sys.exit(main())
