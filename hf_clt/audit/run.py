"""
An audit: every block for a CLT, for its controls and for what it is compared with; one JSON, written after each. Any
number of processes share it through that file: each takes what no other has.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ..features.pages import weights_digest
from ..files import format_duration, one_line, read_json, write_json
from ..folding import at_least_float32
from ..harvest.harvester import Harvester, check_fit
from ..modeling_clt import CrossLayerTranscoder
from .controls import random_clt, shuffled_clt
from .edges import edges
from .features import features
from .graphs import graphs
from .multihop import multihop
from .necessity import necessity
from .reconstruction import reconstruction
from .replacement import replacement
from .samples import BlockSkipped, Given, sequences
from .stability import stability


FILE, LOCKS = "audit.json", ".locks"
FORMAT = "hf_clt audit 1"
WAIT_SECONDS = 2.0  # between two looks for work while other processes have it all
CONTROL_SEQUENCES = 16  # on which the random CLT is made as active as the CLT


@dataclass(frozen=True)
class Block:
    """
    A block of the audit.

    Args:
        measure: From a CLT and what is given to its figures: by name one figure, a list of them (from layer or
            distance 0 on), or a dict of them by label.
        says: What it asks, in a sentence.
        traces: Whether it reads the graphs of the prompts, which one process makes for all such blocks of a CLT.
        cost: What it takes for one CLT, whole and with `quick`, as a multiple of reading the MLPs and reconstructing
            them on two sequences: about, from CPU seconds with SmolLM2-135M.
    """

    measure: Callable[[CrossLayerTranscoder, Given], dict]
    says: str
    traces: bool
    cost: tuple[float, float]


BLOCKS = {
    "reconstruction": Block(reconstruction, "How much of the MLP outputs do its features explain?", False, (36, 9)),
    "replacement": Block(
        replacement, "What does the language model predict with its MLPs replaced?", False, (210, 33)
    ),
    "features": Block(features, "Do features stand for more than a token?", False, (36, 18)),
    "graphs": Block(graphs, "How much of a next token do its graphs explain, in how many steps?", True, (115, 32)),
    "edges": Block(edges, "Do features do in the language model what the edges say?", True, (70, 14)),
    "necessity": Block(necessity, "Does the next token need what a graph calls important?", True, (50, 7)),
    "stability": Block(stability, "Does a graph name the same features when little changes?", True, (28, 12)),
    "multihop": Block(multihop, "Is a step in between found, and what is left out unimportant?", True, (60, 20)),
}


# -- what is measured -------------------------------------------------------------------------------------------------


def subjects_of(
    clt: CrossLayerTranscoder, given: Given, compare: dict[str, Callable[[], CrossLayerTranscoder]]
) -> dict[str, Callable[[], CrossLayerTranscoder]]:
    """What is measured, by name, each as the function that makes it: one at a time is in memory besides the CLT."""

    def random() -> CrossLayerTranscoder:
        dtype = at_least_float32(given.model.dtype)
        parts = [given.harvester.harvest(batch, dtype)[0] for batch in sequences(given, CONTROL_SEQUENCES)]
        return random_clt(clt, torch.cat(parts), given.seed)

    return {"clt": lambda: clt, "shuffled": lambda: shuffled_clt(clt, given.seed), "random": random, **compare}


def describe(clt: CrossLayerTranscoder, given: Given, settings: dict) -> dict:
    """The settings of an audit with what tells its CLT, text and prompts from others of these names."""
    digest = sha256(torch.cat([batch["input_ids"] for batch in given.heldout]).numpy().tobytes())
    digest.update("\0".join(given.prompts).encode())
    own = {"quick": given.quick, "seed": given.seed, "num_prompts": len(given.prompts)}
    return {**settings, **own, "clt_digest": weights_digest(clt), "text_digest": digest.hexdigest()[:16]}


# -- the audit --------------------------------------------------------------------------------------------------------


def open_audit(output: Path, settings: dict, subjects: list[str], overwrite: bool) -> None:
    """
    Makes the file of an audit, or adds subjects to the one that is there.

    Raises:
        ValueError: If the folder has one with other settings, or another file of its name.
    """
    path = output / FILE
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; give a folder")
    (output / LOCKS).mkdir(parents=True, exist_ok=True)
    with locked(output):
        audit = {"format": FORMAT, "settings": settings, "subjects": [], "blocks": {}}
        if path.exists() and not overwrite:
            audit = read_json(path)
            if not isinstance(audit, dict) or audit.get("format") != FORMAT:
                raise ValueError(f"{path} is not of an audit; give another folder as output")
        for name in {**settings, **audit["settings"]}:
            if audit["settings"].get(name) != settings.get(name):
                raise ValueError(
                    f"output={str(output)!r} has an audit with {name}={audit['settings'].get(name)!r}, now it is "
                    f"{settings.get(name)!r}; give another folder, or --overwrite"
                )
        audit["subjects"] += [name for name in subjects if name not in audit["subjects"]]
        write_json(path, audit)


def locked(output: Path, name: str = FILE, timeout: float = -1) -> FileLock:
    """A lock of an audit's folder, which ends with its process; that of the file is held to read and write it."""
    return FileLock(output / LOCKS / f"{name}.lock", timeout=timeout)


def missing(audit: dict, subject: str, traces: bool | None = None) -> list[str]:
    """The blocks that are not yet done for one of the subjects; those alone that read graphs, or that do not."""
    done = audit["blocks"]
    return [n for n, b in BLOCKS.items() if traces in (None, b.traces) and subject not in done.get(n, {})]


@torch.no_grad()
def seconds_of_unit(clt: CrossLayerTranscoder, given: Given) -> float:
    """Seconds to read the MLPs and reconstruct them on two sequences, which costs are counted in."""
    batch = sequences(given, 4)[0]
    for _ in range(2):  # the first time weights come from their files
        begin = time.perf_counter()
        inputs, _ = given.harvester.harvest(batch)
        clt(inputs.to(clt.device, at_least_float32(given.model.dtype)))
        if clt.device.type == "cuda":
            torch.cuda.synchronize(clt.device)
    return time.perf_counter() - begin


def format_cost(audit: dict, unit: float, quick: bool, processes: int) -> str:
    """What is left to do and about how long it takes, as a few lines."""
    left = [(name, missing(audit, name)) for name in audit["subjects"]]
    costs = {name: BLOCKS[name].cost[quick] * unit for name in BLOCKS}
    total = sum(costs[block] for _, blocks in left for block in blocks) / min(processes, 2 * len(left))
    parts = [f"{name} {format_duration(seconds)}" for name, seconds in costs.items()]
    return (
        f"{sum(len(blocks) for _, blocks in left)} measurements ({len(BLOCKS)} blocks of {len(left)} CLTs: "
        f"{', '.join(audit['subjects'])}) are left, about {format_duration(total)} on this machine.\n"
        f"Per CLT about: {', '.join(parts)}."
    )


def run_audit(
    clt: CrossLayerTranscoder,
    given: Given,
    output: str | Path,
    settings: dict,
    compare: dict[str, Callable[[], CrossLayerTranscoder]] | None = None,
    *,
    overwrite: bool = False,
    processes: int = 1,
    report: Callable[[str], None] = print,
) -> dict:
    """
    Audits a CLT. Interrupted, it goes on where it stood when it is called again; called in several processes with the
    same `output`, each does a part, and all return when the whole is done.

    Args:
        clt ([`CrossLayerTranscoder`]): The CLT, in eval mode; lazy ones too.
        given ([`Given`]): What it is measured with.
        output (`str` or `Path`): Folder for `audit.json`; made if absent.
        settings (`dict`): What names the CLT, the language model and the text, for the record: an audit goes on only
            with the same.
        compare (`dict`, *optional*): Functions that load further CLTs of the same language model, by name.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to begin anew what is in `output`.
        processes (`int`, *optional*, defaults to 1): How many call it, for the estimate.
        report (`Callable`, *optional*): Is told what the audit will cost, and each block when it is done.

    Returns:
        `dict`: What is in `audit.json`: `settings`; `subjects`, the names of what was measured; and
        `blocks[block][subject]`, each with `seconds` and either `figures` or `skipped`, why there are none.

    Raises:
        ValueError: If a CLT does not fit the language model, or `output` has another audit.
    """
    output, compare = Path(output).expanduser(), compare or {}
    check_fit(clt.config, given.harvester)
    subjects = subjects_of(clt, given, compare)
    if len(subjects) < 3 + len(compare):
        raise ValueError(f"compare={sorted(compare)} has one of the names clt, shuffled and random; rename it")
    open_audit(output, describe(clt, given, settings), list(subjects), overwrite)
    audit = read_json(output / FILE)
    if any(missing(audit, name) for name in subjects):
        try:
            report(format_cost(audit, seconds_of_unit(clt, given), given.quick, processes))
        except BlockSkipped as error:
            raise ValueError(str(error)) from None
    measured = {}  # the CLT that was made last
    while parts := [(name, traces) for name in subjects for traces in (False, True) if missing(audit, name, traces)]:
        for subject, traces in parts:
            with suppress(Timeout), locked(output, f"{subject}.{traces}", timeout=0):
                if subject not in measured:
                    measured.clear()
                    measured[subject] = subjects[subject]()
                own = given if subject not in compare else replace(given, reference=clt)
                for name in missing(read_json(output / FILE), subject, traces):
                    result = measure(name, measured[subject], own)
                    add_result(output, name, subject, result)
                    reason = f"  SKIPPED: {result['skipped']}" if "skipped" in result else ""
                    report(f"{name:<16} {subject:<12} {format_duration(result['seconds'])}{reason}")
                break
        else:
            time.sleep(WAIT_SECONDS)  # others measure what is left
        audit = read_json(output / FILE)
    return audit


def add_result(output: Path, block: str, subject: str, result: dict) -> None:
    with locked(output):
        audit = read_json(output / FILE)
        audit["blocks"].setdefault(block, {})[subject] = result
        audit["blocks"] = {name: audit["blocks"][name] for name in BLOCKS if name in audit["blocks"]}
        write_json(output / FILE, audit)


def measure(name: str, clt: CrossLayerTranscoder, given: Given) -> dict:
    """The figures of a block, or why it was skipped, and the `seconds` that it took."""
    begin = time.perf_counter()
    hooks = clt.config.feature_input_hook, clt.config.feature_output_hook
    if hooks != (given.harvester.input_hook, given.harvester.output_hook):
        given = replace(given, harvester=Harvester(given.model, *hooks))
    try:
        result = {"figures": BLOCKS[name].measure(clt, given)}
    except BlockSkipped as error:
        result = {"skipped": one_line(error)}
    except (MemoryError, RuntimeError) as error:
        # a GPU's OutOfMemoryError is a RuntimeError; so is what the CPU's allocator raises
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        result = {"skipped": f"out of memory ({one_line(error, 120)})"}
    return {**result, "seconds": round(time.perf_counter() - begin, 2)}


__all__ = ["BLOCKS", "run_audit"]
