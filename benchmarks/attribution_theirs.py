"""
circuit-tracer's side of benchmarks/attribution.py, in its own environment: two graphs of one prompt, the second timed.
Imports nothing of hf_clt, which needs another transformers. Prints a line of JSON.

    .venv-circuit-tracer/bin/python benchmarks/attribution_theirs.py MODEL TRANSCODERS TOKEN_IDS
"""

import json
import logging
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from attribute_clt import in_old_form, load_transcoders


PHASES = {
    "Precomputation": "features",
    "Forward pass": "language model",
    "Input vectors": "targets",
    "Logit attributions": "rows of targets",
    "Feature attributions": "rows of features",
}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def phase_of(message: str) -> dict[str, float]:
    """Seconds of a phase, from the line that circuit-tracer logs at its end."""
    found = re.match(r"(.*?)(?: completed| built)? in ([\d.]+)s$", message)
    return {PHASES[found[1]]: float(found[2])} if found and found[1] in PHASES else {}


def main() -> None:
    model, transcoders, tokens = sys.argv[1:]
    tokens = [int(token) for token in tokens.split(",")]
    with tempfile.TemporaryDirectory() as work:
        transcoders = load_transcoders(transcoders, lazy=False)
        options = {"backend": "nnsight", "device": torch.device("cpu"), "dtype": torch.float32}
        model = ReplacementModel.from_pretrained_and_transcoders(in_old_form(model, work), transcoders, **options)
        for parameter in [*model.parameters(), *transcoders.parameters()]:
            parameter.sum()  # so that it is in memory, and not in its file
        phases = {}
        # A filter, since with a handler of someone else's it logs no phases.
        logging.getLogger("attribution").addFilter(lambda line: phases.update(phase_of(line.getMessage())) or True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = status_bytes("VmRSS")
        for _ in range(2):
            wall, cpu = time.perf_counter(), time.process_time()
            graph = attribute(tokens, model, batch_size=64, verbose=True)  # 256 took longer
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    record = {
        "features": len(graph.selected_features),
        "targets": len(graph.logit_targets),
        "scores": compute_graph_scores(graph),
        "seconds": wall,
        "cpu_seconds": cpu,
        "phases": phases,
        "bytes": status_bytes("VmHWM") - before,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
