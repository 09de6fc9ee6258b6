"""
Decides whether a change of training gives a better cross-layer transcoder: every candidate is trained with several
seeds on the same cached activations, and compared with today's defaults at the same tokens, features and L0.

  python scripts/prepare_quickstart.py
  python -m benchmarks.quality benchmarks/quality_smollm2.yaml --work FOLDER --model quickstart/model \\
      --train-text train.jsonl --heldout-text heldout.jsonl --plot quality.png

A run that is recorded is not made again, so an interrupted comparison goes on where it stopped. Once FOLDER holds the
activations, the texts need not be given, nor the model, but for CE recovered.
"""

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_clt.command import OneLineParser, one_line_errors
from hf_clt.configuration_clt import CLT_CONFIG_HELP, CLTConfig
from hf_clt.evaluation.metrics import ce_recovered
from hf_clt.evaluation.replacement import LayerwiseReconstruction, ReplacementModel, cross_entropy
from hf_clt.files import read_json, write_json, write_text
from hf_clt.harvest.cache import MANIFEST, ActivationCache, CachedTokens, read_manifest, sha256, write_cache
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.harvest.sites import default_hooks
from hf_clt.harvest.tokens import open_text
from hf_clt.modeling_clt import CrossLayerTranscoder
from hf_clt.training.arguments import CACHED, WITHOUT_EFFECT, CLTTrainingArguments
from hf_clt.training.trainer import CLTTrainer
from scripts.prepare_quickstart import prepare_first_layers

from .output import check_folders
from .sweep import append_record, as_key, as_run, read_records, read_yaml, resolve, run_trial, summary
from .verdicts import BASELINE, compare, format_verdicts, plot_verdicts


PARTS = {"cache", "base", "l0", "seeds", "families", "candidates"}
CACHE = {"layers": None, "train_tokens": None, "heldout_tokens": 10_000, "context_size": 128, "ce_tokens": 4096}
ACTIVATIONS = "activations"  # in the folder --work
QUIET = {"eval_interval": 0, "checkpoint_interval": 0, "disable_progress_bar": True}
OF_PLAN = ("family", "candidate", "overrides", "varied", "seed")  # of a record
# Where something lies, which changes no result; and what the cache says, which is known by its digest.
NOT_RECORDED = {*WITHOUT_EFFECT, *CACHED, "activation_cache", "base_model_name_or_path", "base_model_revision"}


# -- what is to be compared -------------------------------------------------------------------------------------------


def read_plan(path: str | Path) -> dict:
    """
    What is to be compared.

    Args:
        path: A YAML file with the keys

            - `cache`: `train_tokens`, and perhaps `layers` (the first ones of the language model; all),
              `heldout_tokens`, `context_size`, and `ce_tokens`, held-out tokens that CE recovered is measured on;
            - `base`: options of `hf-clt train`, the same for all runs, with `tokens` in place of `training_steps`
              (more than are cached are several epochs);
            - `l0`: the wanted numbers of active features per layer and token;
            - `seeds`;
            - `families`: per name further options, of which one is a list, such as `k` or `sparsity_lambda`: the
              runs that bracket the wanted L0;
            - `candidates`: per name the options that it changes. Every family is tried with them, or those under
              `families`; with another list of the same option where L0 moves.

    Returns:
        The file's contents, names with underscores, `cache` with its defaults, and `runs`: in the order in which they
        are to be made, one dict each of `family`, `candidate`, `overrides`, `varied` (the value of the family's list),
        `seed` and `settings` (all options but those of the cache).

    Raises:
        ValueError: If it is no file or not of this form; options are checked by [`check_runs`].
    """
    plan = read_yaml(path, "benchmarks/quality_smollm2.yaml")
    if not isinstance(plan, dict) or set(plan) != PARTS:
        raise ValueError(f"{path} must hold the keys {', '.join(sorted(PARTS))}; see benchmarks/quality_smollm2.yaml")
    for name in ("cache", "base", "families", "candidates"):
        plan[name] = plan[name] or {}
        of_names = plan[name].values() if isinstance(plan[name], dict) and name in ("families", "candidates") else []
        if not isinstance(plan[name], dict) or not all(isinstance(options, dict) for options in of_names):
            raise ValueError(f"{path}: {name} must hold lines of the form name: value")
    for name in ("cache", "base"):
        plan[name] = with_underscores(plan[name])
    for name in ("families", "candidates"):
        plan[name] = {key: with_underscores(options) for key, options in plan[name].items()}
    for name in set(plan["cache"]) - set(CACHE):
        raise ValueError(f"{path}: cache has no {name!r}; it has {', '.join(CACHE)}")
    plan["cache"] = {**CACHE, **plan["cache"]}
    for name, kind in (("l0", int | float), ("seeds", int)):
        if not isinstance(plan[name], list) or not all(isinstance(v, kind) and v >= 0 for v in plan[name]):
            raise ValueError(f"{path}: {name}={plan[name]!r} must be a list of numbers, such as [16, 50]")
    if BASELINE in plan["candidates"]:
        raise ValueError(f"{path}: candidates names one {BASELINE!r}, which is made of base alone; give another name")
    for name, value in (("train_tokens", plan["cache"]["train_tokens"]), ("tokens", plan["base"].get("tokens"))):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {name}={value!r} must be a number of tokens")
    runs = [
        {"family": family, "candidate": candidate, "seed": seed, "place": place, **run}
        for seed in plan["seeds"]
        for candidate, overrides in {BASELINE: {}, **plan["candidates"]}.items()
        for family in families_of(plan, path, candidate, overrides)
        for place, run in enumerate(runs_of(plan, path, family, candidate, overrides))
    ]
    plan["runs"] = sorted(runs, key=lambda run: run.pop("place"))  # all candidates at the first L0 before the next
    return plan


def with_underscores(options: dict) -> dict:
    """Options by the names of their fields."""
    return {str(name).replace("-", "_"): value for name, value in options.items()}


def families_of(plan: dict, path: Path, candidate: str, overrides: dict) -> list[str]:
    """The families that a candidate is tried in."""
    names = overrides.get("families", list(plan["families"]))
    for name in names:
        if name not in plan["families"]:
            raise ValueError(
                f"{path}, candidate {candidate}: family {name!r} is unknown; choose from {', '.join(plan['families'])}"
            )
    return names


def runs_of(plan: dict, path: Path, family: str, candidate: str, overrides: dict) -> list[dict]:
    """The runs of a candidate in a family with one seed, without the seed."""
    overrides = {name: value for name, value in overrides.items() if name != "families"}
    settings = {**plan["base"], **plan["families"][family], **overrides}
    lists = [name for name, value in settings.items() if isinstance(value, list)]
    if len(lists) != 1:
        raise ValueError(
            f"{path}, family {family}, candidate {candidate}: {' and '.join(lists) or 'no option'} is a list; give "
            "one, such as k: [15, 50], whose runs bracket the wanted L0"
        )
    (name,) = lists
    runs = [{"overrides": overrides, "varied": {name: value}} for value in settings[name]]
    return [{**run, "settings": {**settings, **run["varied"]}} for run in runs]


def check_runs(plan: dict, caches: dict[str | None, Path], source: dict | None = None) -> list[tuple]:
    """
    All runs before the first one starts.

    Args:
        plan: What [`read_plan`] gives.
        caches: The folder of the cache for each `feature_input_hook` of the runs, None being the model's usual one.
        source: Where there are no caches yet: `model` and `dataset`.

    Returns:
        Per run of the plan: what is recorded of it, and the arguments and the configuration for the trainer.

    Raises:
        ValueError: For an option that is unknown or wrong; the message names family and candidate.
    """
    identities = {hook: cache_identity(read_manifest(cache)) for hook, cache in caches.items()}
    checked = []
    for run in plan["runs"]:
        settings = dict(run["settings"])
        hook = settings.get("feature_input_hook")
        read = source or {"activation_cache": str(caches[hook])}
        tokens = settings.pop("tokens")
        try:
            per_update = settings.get("batch_size", CLTTrainingArguments.batch_size)
            per_update *= settings.get("gradient_accumulation_steps", 1)
            steps = max(1, tokens // per_update)
            args, config = as_run({**QUIET, **settings, **read, "training_steps": steps, "seed": run["seed"]})
        except (ValueError, TypeError) as error:
            raise ValueError(f"family {run['family']}, candidate {run['candidate']}: {error}") from None
        resolved = {name: value for name, value in resolve(args, config).items() if name not in NOT_RECORDED}
        kept = {name: run[name] for name in OF_PLAN} | {"cache": identities.get(hook), "device": usual_device()}
        checked.append(({**kept, "resolved": resolved}, args, config))
    return checked


# -- activations ------------------------------------------------------------------------------------------------------


def make_cache(
    work: Path,
    settings: dict,
    model: Path | None,
    train_text: Path | None,
    heldout_text: Path | None,
    hook: str | None = None,
) -> Path:
    """
    Harvests the activations into `work`, unless they are there.

    Args:
        work: A folder, made if missing.
        settings: `cache` of [`read_plan`].
        model: Folder of the language model.
        train_text, heldout_text: What [`open_text`] reads, a file each; documents of one book belong in one of them.
        hook: `feature_input_hook`; None: the model's usual one.

    Returns:
        The folder of the cache.

    Raises:
        ValueError: If something is missing, or the cache that is there has other settings.
    """
    cache = work / (ACTIVATIONS if hook is None else f"{ACTIVATIONS}-{hook}")
    if (cache / MANIFEST).is_file():
        found = read_manifest(cache)
        wanted = {"max_tokens": settings["train_tokens"], "eval_tokens": settings["heldout_tokens"]}
        wanted |= {"context_size": settings["context_size"]}
        wanted |= {} if settings["layers"] is None else {"num_layers": settings["layers"]}
        for name, value in wanted.items():
            if found[name] != value:
                raise ValueError(f"the cache in {work} has {name}={found[name]}, not {value}; give another --work")
        return cache
    sources = {"model": model, "train-text": train_text, "heldout-text": heldout_text}
    for name, path in sources.items():
        if path is None:
            raise ValueError(f"there are no activations in {work} yet: {name} is missing; give --{name}")
    work.mkdir(parents=True, exist_ok=True)
    if settings["layers"] is not None:
        cut = work / f"first-{settings['layers']}-layers"
        if not cut.exists():
            prepare_first_layers(model, settings["layers"], cut)
        model = cut
    language_model, tokenizer = load_language_model(str(model), dtype="float32", device=usual_device())
    args = CLTTrainingArguments(
        model=str(model),
        model_dtype="float32",
        dataset=str(train_text),
        eval_tokens=settings["heldout_tokens"],
        context_size=settings["context_size"],
        store_batch_size_prompts=8,
    )
    described = {name: getattr(args, name) for name in CACHED if name != "prepend_bos"}
    weights = sorted(Path(model).glob("*.safetensors"))
    described["sources"] = {
        "model": [sha256(path) for path in weights],
        "train": sha256(Path(train_text)),
        "heldout": sha256(Path(heldout_text)),
    }
    heldout = open_text(replace(args, dataset=str(heldout_text)), tokenizer, heldout=True)
    train = open_text(replace(args, eval_tokens=0), tokenizer)
    usual, output_hook = default_hooks(language_model.config.get_text_config().model_type)
    write_cache(
        cache,
        Harvester(language_model, hook or usual, output_hook),
        {"heldout": heldout, "train": train},
        described,
        max_tokens=settings["train_tokens"],
        progress=sys.stderr.isatty(),
    )
    return cache


def usual_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def cache_identity(manifest: dict) -> str:
    """What tells the activations of a cache from others, wherever they and their sources lie."""
    settings = {name: value for name, value in manifest.items() if name not in ("model", "dataset", "splits")}
    return hashlib.sha256(as_key(settings).encode()).hexdigest()[:12]


# -- cross-entropy ----------------------------------------------------------------------------------------------------


class InPlaceOfFirstLayers:
    """
    A CLT in the place of the MLPs of a language model's first layers, as a function for [`mean_cross_entropy`].

    Args:
        clt ([`CrossLayerTranscoder`]): A CLT of the first layers, in eval mode.
    """

    def __init__(self, clt: CrossLayerTranscoder):
        self.clt, self.reconstruction = clt, None

    def __call__(self, layer: int, inputs: Tensor, outputs: Tensor) -> Tensor:
        if layer == 0:
            self.reconstruction = LayerwiseReconstruction(self.clt, len(inputs))
        return self.reconstruction(layer, inputs)


def mean_cross_entropy(
    model: PreTrainedModel,
    replace: Callable[[int, Tensor, Tensor], Tensor],
    layers: range,
    batches: list[dict],
    hooks: tuple[str, str] | None = None,
) -> float:
    """
    Mean next-token cross-entropy, in nats, over the predictions that [`replacement_metrics`] counts.

    Args:
        model: The whole language model, with its head, in eval mode.
        replace: Gives what stands in for the MLP outputs of a layer, see [`ReplacementModel`].
        layers: Those that it stands in for.
        batches: Of a [`TokenStream`].
        hooks: What `replace` is given and stands in for; see [`ReplacementModel`].
    """

    def of_all_layers(layer: int, inputs: Tensor, outputs: Tensor) -> Tensor:
        return replace(layer, inputs, outputs) if layer in layers else outputs

    replaced, total, count = ReplacementModel(model, of_all_layers, layers, hooks), 0.0, 0
    for batch in batches:
        logits = replaced(batch["input_ids"], batch["attention_mask"], batch["counted"]).logits[:, :-1]
        predicts = batch["counted"][:, :-1] & batch["attention_mask"][:, 1:].bool()
        predicts[:, 0] = False  # the position that always keeps the model's own MLP outputs
        targets = batch["input_ids"][:, 1:][predicts].to(logits.device)
        log_p = logits[predicts.to(logits.device)].double().log_softmax(dim=1)
        total += cross_entropy(log_p, targets).item()
        count += len(targets)
    return total / count


class CrossEntropy:
    """
    Measures CE recovered on the first held-out tokens of a cache, whatever the number of layers that are cached. What
    does not depend on the CLT is computed once, and kept beside the cache.

    Args:
        model: Folder of the whole language model.
        cache: Folder of the cache.
        num_tokens: How many tokens, at least; batches are whole.
    """

    def __init__(self, model: Path, cache: Path, num_tokens: int):
        self.model, _ = load_language_model(str(model), dtype="float32", device=usual_device())
        activations = ActivationCache(cache)
        self.layers, self.batches, seen = range(activations.num_layers), [], 0
        total = torch.zeros(activations.num_layers, activations.d_model, dtype=torch.float64)
        for batch in CachedTokens(activations, "heldout"):
            self.batches.append({name: batch[name] for name in ("input_ids", "attention_mask", "counted")})
            labels = activations.harvest(batch)[1]
            total += labels.double().sum(dim=0)
            seen += len(labels)
            if seen >= num_tokens:
                break
        self.hooks = tuple(activations.manifest[f"feature_{side}_hook"] for side in ("input", "output"))
        kept = cache.parent / f"cross_entropy-{cache.name}.json"
        key = [cache_identity(activations.manifest), len(self.batches), str(Path(model).resolve())]
        found = read_json(kept) if kept.is_file() else {}
        if found.get("of") != key:
            means = (total / seen).to(self.model.device)
            found = {
                "of": key,
                "ce_original": self.mean(lambda layer, inputs, outputs: outputs),
                "ce_ablated": self.mean(lambda layer, inputs, outputs: means[layer]),
            }
            write_json(kept, found)
        self.original, self.ablated = found["ce_original"], found["ce_ablated"]

    def mean(self, replace: Callable[[int, Tensor, Tensor], Tensor]) -> float:
        return mean_cross_entropy(self.model, replace, self.layers, self.batches, self.hooks)

    def of_clt(self, clt: CrossLayerTranscoder) -> dict[str, float | None]:
        """`ce_original`, `ce_replaced`, `ce_ablated` and `ce_recovered` as of [`replacement_metrics`]."""
        replaced = self.mean(InPlaceOfFirstLayers(clt))
        return {
            "ce_original": self.original,
            "ce_replaced": replaced,
            "ce_ablated": self.ablated,
            "ce_recovered": ce_recovered(self.original, replaced, self.ablated),
        }


# -- the runs ---------------------------------------------------------------------------------------------------------


def run_plan(
    checked: list[tuple],
    records: Path,
    open_cross_entropy: Callable[[Path], CrossEntropy] | None = None,
    most: int | None = None,
) -> list[dict]:
    """
    Makes the runs that are not recorded yet, one after another, and appends a line to `records` after each.

    Args:
        checked: What [`check_runs`] gives.
        records: A JSONL file.
        open_cross_entropy: Makes what measures CE recovered, of a cache, when its first run starts; None: it is not
            measured.
        most: Runs to make now, at most; None: all.

    Returns:
        The records of the runs that are finished, in the order of the plan: what [`run_trial`] gives, `commit`,
        `train_seconds` (training and evaluation without CE), and `cross_entropy`, which may be null.
    """
    # An option that came later had its default.
    defaults = {field.name: field.default for field in fields(CLTConfig) if field.name in CLT_CONFIG_HELP}
    defaults |= CLTTrainingArguments().to_dict()
    defaults = {name: value for name, value in defaults.items() if name not in NOT_RECORDED}

    def key(record):
        return as_key({**defaults, **record["resolved"], "cache": record["cache"], "device": record["device"]})

    done = {key(record): record for record in read_records(records)}
    missing = {key(run[0]): run for run in checked if key(run[0]) not in done}  # two candidates may share a run
    entropies = {}
    for number, (name, (run, args, config)) in enumerate(missing.items(), start=1):
        if most is not None and number > most:
            break
        if open_cross_entropy is not None and args.activation_cache not in entropies:
            entropies[args.activation_cache] = open_cross_entropy(Path(args.activation_cache))
        entropy = entropies.get(args.activation_cache)

        def measure(trainer: CLTTrainer, entropy=entropy) -> dict:
            trainer.read_clocks()
            seconds = round(trainer.seconds["total"], 1)
            found = None if entropy is None else entropy.of_clt(trainer.model)
            return {"train_seconds": seconds, "cross_entropy": found}

        varied = ", ".join(f"{option} {value}" for option, value in run["varied"].items())
        print(
            f"[{number} of {len(missing)} to make] {run['family']}, {run['candidate']}, {varied}, seed {run['seed']}",
            flush=True,
        )
        done[name] = {**run, "commit": commit(), **run_trial(args, config, measure)}
        append_record(records, done[name])
        print(f"    {done[name].get('error') or summary(done[name])}", flush=True)
    of_plan = ("family", "candidate", "overrides", "varied", "seed")
    return [{**done[key(run)], **{name: run[name] for name in of_plan}} for run, _, _ in checked if key(run) in done]


def commit() -> str | None:
    """The commit of this checkout, with "+" if `hf_clt` has changed since; None outside of one."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        found = git(["git", "rev-parse", "--short=10", "HEAD"])
        changed = git(["git", "status", "--porcelain", "--", "../hf_clt"])
    except FileNotFoundError:  # no git
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "") if found.returncode == 0 else None


# -- the command ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml", help="families, candidates, seeds and wanted L0")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where the activations lie")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the whole language model")
    parser.add_argument("--train-text", type=Path, metavar="FILE", help="text to train on, to make the cache")
    parser.add_argument("--heldout-text", type=Path, metavar="FILE", help="other text, to make the cache")
    parser.add_argument(
        "--records",
        type=Path,
        metavar="FILE",
        help="JSONL file, a line per finished run (default: quality.jsonl in --work)",
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="Markdown file for the table (default: print it)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG file: change of NMSE against the baseline")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="only these, and the baseline")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="in place of the plan's")
    parser.add_argument("--max-runs", type=int, metavar="N", help="make at most N runs now; 0: only the table")
    return parser


@one_line_errors(ImportError, interrupted="the same command goes on with the next run")
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    check_folders(options.table, options.plot, options.records)
    plan = read_plan(options.plan)
    plan["runs"] = choose(plan["runs"], options.plan, options.families, options.candidates, options.seeds)
    if None not in (options.model, options.train_text):  # before the caches are made
        check_runs(plan, {}, source={"model": str(options.model), "dataset": str(options.train_text)})
    sources = options.model, options.train_text, options.heldout_text
    hooks = dict.fromkeys(run["settings"].get("feature_input_hook") for run in plan["runs"])
    caches = {hook: make_cache(options.work, plan["cache"], *sources, hook) for hook in hooks}
    checked = check_runs(plan, caches)
    entropy = None
    if options.model is not None:
        entropy = partial(CrossEntropy, options.model, num_tokens=plan["cache"]["ce_tokens"])
    records = run_plan(checked, options.records or options.work / "quality.jsonl", entropy, options.max_runs)
    planned = [{name: run[name] for name in ("family", "candidate", "seed")} for run, _, _ in checked]
    verdicts = compare(records, planned, plan["l0"])
    if options.plot is not None:
        plot_verdicts(verdicts, options.plot)
    table = format_verdicts(verdicts)
    if options.table is None:
        print(table)
    else:
        write_text(options.table, table)
        print(f"the table of {len(records)} runs is in {options.table}")


def choose(
    runs: list[dict],
    path: Path,
    families: list[str] | None,
    candidates: list[str] | None,
    seeds: list[int] | None,
) -> list[dict]:
    """The runs of these families, candidates (the baseline too) and seeds; None is all."""
    for name, wanted in (("family", families), ("candidate", candidates), ("seed", seeds)):
        known = list(dict.fromkeys(run[name] for run in runs))
        for value in wanted or []:
            if value not in known:
                raise ValueError(f"{name} {value!r} is not in {path}; it has {', '.join(map(str, known))}")
        if wanted:
            runs = [run for run in runs if run[name] in [*wanted, BASELINE]]
    return runs


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["CrossEntropy", "check_runs", "make_cache", "mean_cross_entropy", "read_plan", "run_plan"]
