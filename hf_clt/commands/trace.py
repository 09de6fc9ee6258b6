"""
Traces a prompt: its attribution graph, which says what the next token comes from, through which features. Prints the
figures of the graph, and writes the graph, its pruned part as JSON for circuit-tracer and Neuronpedia, and a page to
look at. Example:

  hf-clt trace quickstart/clt --prompt "The capital of France is" --output quickstart/trace
"""

import argparse
import re
import time
from pathlib import Path

from ..command import OneLineParser, one_line_errors, print_next
from ..device import peak_memory
from ..files import format_duration, format_size, read_json, write_json
from .heldout import MODEL_FIELDS, MODEL_HELP, TEXT_FIELDS, add_clt_options, add_fields, load_model_of, load_named_clt


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__)
    clt = add_clt_options(parser)
    clt.add_argument("--lazy", action="store_true", help="leave its weights in their files: CLTs larger than memory")
    helps = {"model": MODEL_HELP, "model_dtype": "Number format that the language model runs in."}
    add_fields(parser.add_argument_group("the language model"), MODEL_FIELDS, {"model_dtype": "float32"}, helps)

    prompt = parser.add_argument_group("the prompt")
    which = prompt.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", metavar="TEXT")
    lines = 'a {"prompt": ..., "slug": optional, "targets": optional} per line; each gets a folder named by its slug'
    which.add_argument("--prompts", type=Path, metavar="FILE", help=f".jsonl file of prompts, {lines}")
    how = prompt.add_mutually_exclusive_group()
    how.add_argument("--raw", action="store_true", help="put no special tokens in front, even if the tokenizer would")
    how.add_argument("--chat", action="store_true", help="the prompt is what a user says in the model's chat template")

    target = parser.add_argument_group("what is explained (default: the most probable next tokens)")
    target.add_argument("--targets", nargs="+", metavar="TOKEN", default=[], help='next tokens, such as " Paris"')
    text = 'why the first and not the second: " Paris" " London"; also what the graph of each has and the other lacks'
    target.add_argument("--contrast", nargs=2, metavar="TOKEN", help=text)
    names = ("LAYER", "POSITION", "FEATURE")
    target.add_argument("--feature", nargs=3, type=int, metavar=names, action="append", default=[], help="a feature")

    graph = parser.add_argument_group("the graph")
    graph.add_argument("--max-feature-nodes", type=int, metavar="N", help="the most influential ones (default: all)")
    graph.add_argument("--rank-every", type=int, default=512, metavar="N", help="rows between rankings (default: 512)")
    graph.add_argument("--batch-size", type=int, metavar="N", help="rows at a time (default: 256 or fewer)")
    graph.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="default: float32"
    )
    text = "positions without features and errors, on which a CLT is not trained (default: 0)"
    graph.add_argument("--cleared", nargs="*", type=int, default=[0], metavar="POSITION", help=text)
    text = "share of the influence that the nodes of the pruned graph have (default: 0.8)"
    graph.add_argument("--node-threshold", type=float, default=0.8, metavar="SHARE", help=text)
    graph.add_argument("--edge-threshold", type=float, default=0.98, metavar="SHARE", help="its edges (default: 0.98)")
    text = "ablate and double the N strongest features in the language model, and compare"
    graph.add_argument("--verify", type=int, metavar="N", help=text)
    text = "with --verify: these groups of features as well, each at once; a file that Save on a graph's page wrote"
    graph.add_argument("--groups", type=Path, metavar="FILE", help=text)

    example = parser.add_argument_group("examples and labels of the features in the pruned graph")
    source = example.add_mutually_exclusive_group()
    text = "held-out text to find them in: a Hub name, or a .txt, .jsonl or .parquet file, or a folder of them"
    source.add_argument("--examples", dest="dataset", metavar="TEXT", help=text)
    source.add_argument("--feature-pages", type=Path, metavar="FOLDER", help="take them from these pages instead")
    text = "tokens of the text that are read (default: 8192)"
    example.add_argument("--example-tokens", dest="eval_tokens", type=int, default=8192, metavar="N", help=text)
    fields = [name for name in TEXT_FIELDS if name not in ("dataset", "eval_tokens")]
    add_fields(example, fields, {"store_batch_size_prompts": 8})
    parser.set_defaults(streaming=True, stream_retries=5)

    text = "the language model's name on Neuronpedia (default: its own)"
    parser.add_argument("--scan", metavar="NAME", help=text)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the files")
    parser.add_argument("--overwrite", action="store_true", help="write to it though it is not empty")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what it takes, from one forward pass; write nothing"
    )
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for what would fail after the work."""
    from ..training.setup import launched_processes

    if (launched := launched_processes()) > 1:
        raise ValueError(f"WORLD_SIZE={launched}: hf-clt trace is one process; attribute() in Python shares its rows")
    if options.output is None and not options.dry_run:
        raise ValueError("output is missing; give --output FOLDER, or --dry-run")
    if options.contrast and (options.targets or options.feature):
        raise ValueError("contrast has targets of its own; leave --targets and --feature out")
    for name, path in (("prompts", options.prompts), ("groups", options.groups)):
        if path is not None and not path.is_file():
            raise ValueError(f"{name}={str(path)!r}: there is no such file; give one that exists")
    if options.groups and not options.verify:
        raise ValueError("groups are checked with the strongest features; give --verify N as well")
    values = {name: getattr(options, name) for name in ("max_feature_nodes", "rank_every", "batch_size", "verify")}
    for name, value in (*values.items(), ("example_tokens", options.eval_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is below 1; give at least 1, or leave it out")
    for name in ("node_threshold", "edge_threshold"):
        if not 0 < getattr(options, name) <= 1:
            raise ValueError(f"{name}={getattr(options, name)} is no share; give more than 0 and at most 1")


def check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={str(folder)!r} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"output={str(folder)!r} is not empty; give another folder, or --overwrite")


def remove_old(folder: Path) -> None:
    """Removes what an earlier graph left in a folder and this one may not replace: its JSON, and a contrast."""
    if (folder / "graph.json").is_file():
        slug = read_json(folder / "graph.json").get("info", {}).get("slug")
        for name in (f"{slug}.json", "contrast.json"):
            (folder / name).unlink(missing_ok=True)


def graph_options(options: argparse.Namespace) -> dict:
    """What the graph and its cost depend on."""
    import torch

    names = ("max_feature_nodes", "batch_size", "cleared")
    return {name: getattr(options, name) for name in names} | {"dtype": getattr(torch, options.dtype)}


def trace(options: argparse.Namespace, model, clt, tokenizer, input_ids, targets, prompt, output: Path) -> list:
    """Computes the graph of a prompt, checks and saves it; (folder, pruned graph), of a contrast three of them."""
    from ..attribution import attribute
    from ..attribution.contrast import of_targets
    from ..attribution.request import slug_of
    from ..attribution.verify import verify

    show = not options.disable_progress_bar
    settings = graph_options(options) | {"rank_every": options.rank_every, "tokenizer": tokenizer, "progress": show}
    graph = attribute(model, clt, input_ids, targets, **settings)
    graph.info |= {"prompt": prompt.text, "slug": prompt.slug}
    scan = options.scan or Path(model.config.name_or_path).name
    graph.info["scan"] = re.sub(r"[^a-zA-Z0-9_.-]+", "-", scan) or "model"
    found = [(output, graph)]
    if options.contrast:
        sides = [output / f"{number}-{slug_of(word)}" for number, word in enumerate(options.contrast, start=1)]
        found = [(folder, of_targets(graph, [number])) for number, folder in enumerate([output, *sides])]
    if options.verify and graph.num_features:
        begin = time.perf_counter()
        verify(found[0][1], model, clt, options.verify, options.groups or (), progress=show)
        found[0][1].info["seconds"]["checking"] = time.perf_counter() - begin
    remove_old(output)
    for folder, part in found:
        part.save(folder)
    return [(folder, part.prune(options.node_threshold, options.edge_threshold)) for folder, part in found]


def finish(options: argparse.Namespace, traced: list, described: dict) -> None:
    """Writes labels, JSON and pages of a prompt's graphs, and prints what the first of them says."""
    from ..attribution import AttributionGraph
    from ..attribution.contrast import contrast, format_contrast
    from ..attribution.report import format_graph

    for number, (folder, pruned) in enumerate(traced):
        graph = AttributionGraph.load(folder)
        own = {key: described[key] for key in map(tuple, pruned.features[:, [0, 2]].tolist()) if key in described}
        for part in (graph, pruned):
            part.labels = {key: label for key, (label, _) in own.items()}
            part.details = {key: details for key, (_, details) in own.items()}
        if own:
            graph.save(folder)
        slug = graph.info["slug"]
        pruned.to_json(folder / f"{slug}.json", slug=slug, scan=graph.info["scan"])
        pruned.to_html(folder / "index.html")
        if number == 0:
            print(f"{folder}:\n{format_graph(graph, pruned)}")
    if options.contrast:
        found = contrast(*(pruned for _, pruned in traced[1:]))
        write_json(traced[0][0] / "contrast.json", found)
        print(format_contrast(found))
    folder = traced[0][0]
    print(f"Open {folder / 'index.html'} in a browser; {folder / slug}.json is for Neuronpedia.\n")


@one_line_errors(ImportError)
def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    check_options(options)
    from ..attribution.cost import estimate_cost, format_cost
    from ..attribution.examples import check_pages, describe, from_pages
    from ..attribution.report import format_prompt
    from ..attribution.request import Prompt, chosen_targets, prompt_tokens, read_groups, read_prompts, slug_of
    from ..harvest.harvester import Harvester, check_context_size, check_fit
    from ..harvest.tokens import open_text

    if options.prompts is None:
        jobs = [(Prompt(options.prompt, slug_of(options.prompt), options.targets), options.output)]
    else:
        prompts = read_prompts(options.prompts, options.targets)
        jobs = [(prompt, options.output and options.output / prompt.slug) for prompt in prompts]
    for _, folder in jobs if not options.dry_run else ():
        check_output(folder, options.overwrite)
    clt = load_named_clt(options, lazy=options.lazy)
    model, tokenizer = load_model_of(clt, options)
    clt = clt if options.lazy else clt.to(model.device)
    harvester = Harvester(model, clt.config.feature_input_hook, clt.config.feature_output_hook)
    check_fit(clt.config, harvester)
    if options.groups:
        options.groups = read_groups(options.groups, clt.config.num_layers)
    asked = []
    for prompt, folder in jobs:  # of all, before any work
        ids = prompt_tokens(tokenizer, prompt.text, model.config, options.raw, options.chat)
        if unknown := [position for position in options.cleared if not 0 <= position < len(ids)]:
            raise ValueError(f"cleared: position {unknown[0]} is outside 0 to {len(ids) - 1} of {prompt.text[:60]!r}")
        targets = chosen_targets(tokenizer, prompt.targets, options.feature, options.contrast)
        asked.append((ids, targets, prompt, folder))
    if options.feature_pages:
        check_pages(options.feature_pages, clt)
    if options.dataset:
        check_context_size(model.config, options.context_size)
        text = open_text(options, tokenizer, heldout=True)

    traced = []
    for ids, targets, prompt, folder in asked:
        print(f"{prompt.text!r}\n{format_prompt(model, tokenizer, ids, options.cleared)}")
        if options.dry_run:
            print(format_cost(estimate_cost(model, clt, ids, targets, **graph_options(options))), end="\n\n")
        else:
            traced.append(trace(options, model, clt, tokenizer, ids, targets, prompt, folder))
    begin, described = time.perf_counter(), {}
    wanted = {tuple(key) for graphs in traced for _, pruned in graphs for key in pruned.features[:, [0, 2]].tolist()}
    if wanted and options.dataset:
        described = describe(clt, harvester, text, wanted, progress=not options.disable_progress_bar)
    elif wanted and options.feature_pages:
        described = from_pages(options.feature_pages, clt, wanted)
    if described:
        print(f"Examples of {len(described):,} features in {format_duration(time.perf_counter() - begin)}")
    for graphs in traced:
        finish(options, graphs, described)
    print(f"Peak memory {format_size(peak_memory(model.device))}")
    again = ["--examples", "TEXT"] if not described else [] if options.verify else ["--verify", 20]
    if options.dry_run or again:
        prompt = ["--prompt", options.prompt] if options.prompts is None else ["--prompts", options.prompts]
        again = [] if options.dry_run else [*again, "--overwrite"]
        print_next("trace", options.clt, *prompt, "--output", options.output or "FOLDER", *again)
    else:
        print_next("features", options.clt, "--dataset", options.dataset or "TEXT", "--output", "FOLDER")


__all__ = ["main", "make_parser"]
