"""
Kills short runs of `scripts/train_clt.py` with SIGKILL at random moments, resumes them, and compares their ends.

  python tests/end_to_end/kill_runs.py FOLDER --model FOLDER_OF_A_TINY_MODEL --text FILE --kills 20

One process imports everything once and forks the runs, because the imports take longer than a run. It computes nothing
itself, as a process that has used threads cannot be forked. A run tells through shared memory in which phase it is.
"""

import argparse
import importlib.util
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers.models.gpt2.modeling_gpt2  # noqa: F401  each run would import it again

from hf_clt.harvest.buffer import ActivationBuffer
from hf_clt.hub import card
from hf_clt.training import preparation, run_state
from hf_clt.training.checkpoints import CHECKPOINT, list_checkpoints
from hf_clt.training.trainer import CLTTrainer


SCRIPT = Path(__file__).parents[2] / "scripts" / "train_clt.py"
PHASES = ("harvest", "step", "checkpoint", "evaluation", "elsewhere")
TARGETS = ("harvest", "step", "checkpoint", "evaluation", None)  # None: any moment of the run
STEPS = 24
OPTIONS = {
    "--num-features": 96,
    "--k": 6,
    "--context-size": 32,
    "--store-batch-size-prompts": 4,
    "--n-batches-in-buffer": 4,
    "--batch-size": 120,
    "--eval-tokens": 300,
    "--normalization-estimation-batches": 4,
    "--training-steps": STEPS,
    "--learning-rate": 3e-3,
    "--log-interval": 2,
    "--eval-interval": 4,
    "--checkpoint-interval": 3,
    "--save-total-limit": 2,
    "--dead-feature-window": 5,
    "--device": "cpu",
}


class Watch:
    """What a run is doing: its phase, its step, and for each phase how often it was entered and for how long, in s."""

    ENTRY = struct.Struct("qd")

    def __init__(self):
        self.memory = mmap.mmap(-1, 2 + self.ENTRY.size * len(PHASES))
        self.memory[0] = PHASES.index("elsewhere")

    @property
    def phase(self) -> str:
        return PHASES[self.memory[0]]

    @property
    def step(self) -> int:
        return self.memory[1]

    def entered(self, phase: str) -> tuple[int, float]:
        return self.ENTRY.unpack_from(self.memory, 2 + self.ENTRY.size * PHASES.index(phase))

    def watched(self, phase: str, function):
        """The function; while it runs, the phase is this one."""
        place = 2 + self.ENTRY.size * PHASES.index(phase)

        def call(*arguments, **keywords):
            outer, start = self.memory[0], time.perf_counter()
            count, seconds = self.ENTRY.unpack_from(self.memory, place)
            self.memory[0] = PHASES.index(phase)
            self.ENTRY.pack_into(self.memory, place, count + 1, seconds)
            try:
                return function(*arguments, **keywords)
            finally:
                self.ENTRY.pack_into(self.memory, place, count + 1, seconds + time.perf_counter() - start)
                self.memory[0] = outer

        return call

    def install(self) -> None:
        preparation.estimate_statistics = self.watched("harvest", preparation.estimate_statistics)
        ActivationBuffer._harvest = self.watched("harvest", ActivationBuffer._harvest)
        run_state.save_checkpoint = self.watched("checkpoint", run_state.save_checkpoint)
        CLTTrainer._evaluate_and_write = self.watched("evaluation", CLTTrainer._evaluate_and_write)
        card.draw_plots = lambda *arguments: None  # takes longer than the run
        update = CLTTrainer._update

        def counted(trainer, *arguments):
            self.memory[1] = trainer.step
            return update(trainer, *arguments)

        CLTTrainer._update = self.watched("step", counted)


def start(main, argv: list[str], log: Path) -> tuple[int, Watch]:
    """Forks a run; its process id, and what it is doing."""
    watch = Watch()
    pid = os.fork()
    if pid:
        return pid, watch
    status = 70
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        watch.install()
        status = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: Path) -> dict:
    """What two runs must have in common: weights, metrics but for times, and the names of all files outside of kept
    checkpoints. Which checkpoints are kept depends on when a run was stopped."""
    found = {}
    for path in sorted(folder.iterdir()):
        if not CHECKPOINT.fullmatch(path.name):
            found[path.name] = path.read_bytes() if path.suffix == ".safetensors" else None
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row.pop("tokens_per_second", None)
    return {**found, "metrics": rows}


def differing(folder: Path, reference: dict) -> list[str]:
    found = contents(folder)
    return [name for name in sorted(found.keys() | reference.keys()) if found.get(name, 0) != reference.get(name, 0)]


def moment(chance: random.Random, target: str | None, whole: Watch, seconds: float):
    """A random moment of a run that does what the run `whole` did: a function that waits for it, given its Watch."""
    if target is None:
        delay = chance.uniform(0, seconds)
        return lambda watch: time.sleep(delay)
    count, total = whole.entered(target)
    number, delay = chance.randint(1, count), chance.uniform(0, total / count)

    def wait(watch):
        deadline = time.monotonic() + 120
        while watch.entered(target)[0] < number and time.monotonic() < deadline:
            time.sleep(1e-4)
        time.sleep(delay)

    return wait


def run_all(folder: Path, model: str, text: str, kills: int, stops: int, seed: int) -> list[dict]:
    """
    Kills (SIGKILL) and stops (SIGTERM, SIGINT) runs, one after the other, and goes on with each until it ends.

    Returns:
        One record per run: `signal`, `activation_fn`, `phase` and `step` that it hit, the `checkpoint` gone on from,
        `leftovers` in the folder, exit `status` of the stopped and of the resumed run, and what is `different`.
    """
    spec = importlib.util.spec_from_file_location("train_clt", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    chance = random.Random(seed)
    log = folder / "log.txt"

    def argv(output_dir, activation_fn, *further):
        options = [*OPTIONS.items(), ("--model", model), ("--dataset", text), ("--activation-fn", activation_fn)]
        options.append(("--output-dir", output_dir))
        words = [str(word) for option in options for word in option]
        if activation_fn == "batchtopk":
            words.append("--overlap-harvest")
        return [*words, "--disable-progress-bar", *further]

    references = {}
    for activation_fn in ("jumprelu", "batchtopk")[: 1 if kills + stops <= 4 else 2]:
        begun = time.perf_counter()
        pid, watch = start(script.main, argv(folder / activation_fn, activation_fn), log)
        if exit_status(pid) != 0:
            raise RuntimeError(f"the run that is not killed failed:\n{log.read_text()}")
        references[activation_fn] = contents(folder / activation_fn), watch, time.perf_counter() - begun

    records = []
    for number in range(kills + stops):
        activation_fn = list(references)[number // len(TARGETS) % len(references)]
        reference, whole, seconds = references[activation_fn]
        output_dir = folder / f"run-{number}"
        pid, watch = start(script.main, argv(output_dir, activation_fn), log)
        if number < kills:
            sent = signal.SIGKILL
            moment(chance, TARGETS[number % len(TARGETS)], whole, seconds)(watch)
        else:
            sent = (signal.SIGTERM, signal.SIGINT)[(number - kills) % 2]
            moment(chance, "step", whole, seconds)(watch)
        os.kill(pid, sent)
        record = {"signal": sent.name, "activation_fn": activation_fn, "phase": watch.phase, "step": watch.step}
        record["status"] = exit_status(pid)
        checkpoints = list_checkpoints(output_dir)
        record["checkpoint"] = checkpoints[-1].name if checkpoints else None
        record["leftovers"] = sorted(path.name for path in output_dir.glob(".*"))
        how = ("--resume-from-checkpoint", "latest") if checkpoints else ("--overwrite-output-dir",)
        pid, _ = start(script.main, argv(output_dir, activation_fn, *how), log)
        record["resumed_status"] = exit_status(pid)
        record["different"] = differing(output_dir, reference) if record["resumed_status"] == 0 else ["all"]
        records.append(record)
    return records


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    lines = ["| | signal | variant | hit | update | went on from | left behind | end |", "|" + "---|" * 8]
    for number, record in enumerate(records, start=1):
        cells = [number, record["signal"], record["activation_fn"], record["phase"]]
        cells += [record["step"] + 1, record["checkpoint"] or "start"]
        cells += [", ".join(record["leftovers"]) or "nothing", ", ".join(record["different"]) or "identical"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=0, help="runs that get SIGTERM or SIGINT in a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    records = run_all(options.folder, options.model, options.text, options.kills, options.stops, options.seed)
    (options.folder / "records.json").write_text(json.dumps(records))
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
