"""
Trains every variant of a CLT on a real language model, and compares what was trained with the dense formulas
(tests/reference.py) and with what comes back from disk. Needs what `scripts/prepare_quickstart.py --first-layers 10`
makes; from the root of the checkout, about ten minutes on 2 cores:

    python -m tests.variants benchmarks/variants.jsonl benchmarks/variants.md
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.sweep import read_sweep, run_sweep
from hf_clt import CLTTrainer, CrossLayerTranscoder
from hf_clt.evaluation.evaluate import activations
from tests.reference import parameters_of, reference


SWEEP = Path(__file__).with_name("variants.yaml")
NUM_TOKENS = 48  # that are compared with the formulas
TERMS = ("reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss")


def errors(trainer: CLTTrainer) -> dict:
    """
    Largest differences, each relative to the largest entry of what is compared: of the reconstruction and the losses
    in float32 and float64, and of all gradients in float64, to the formulas; of the reconstruction to that of the CLT
    from disk.
    """
    clt = trainer.model
    rows = next(activations(trainer.harvester, trainer.heldout, NUM_TOKENS))
    inputs, labels = rows["inputs"], rows["labels"]
    with torch.no_grad():
        loaded = CrossLayerTranscoder.from_pretrained(trainer.output_dir)
        from_disk = relative(loaded(inputs).reconstruction, clt.eval()(inputs).reconstruction)

    exact = CrossLayerTranscoder(clt.config).double()
    statistics = {name: getattr(clt, name).double() for name in ("mean_in", "std_in", "mean_out", "std_out")}
    exact.set_normalization(**statistics)
    exact.load_state_dict(clt.state_dict())
    dead = torch.zeros(clt.config.num_layers, clt.config.num_features, dtype=torch.bool)
    dead[:, ::3] = True
    parameters = parameters_of(exact)
    expected = reference(exact, parameters, inputs.double(), labels.double(), 1.0, dead, statistics)
    found = exact.train()(inputs.double(), labels=labels.double(), dead=dead)
    rough = clt.train()(inputs, labels=labels, dead=dead)
    leaves = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    wanted = torch.autograd.grad(expected["loss"], list(leaves.values()))
    found.loss.backward()
    gradients = dict(exact.named_parameters())
    return {
        "float64_error": max(relative(getattr(found, name), expected[name]) for name in (*TERMS, "reconstruction")),
        "float32_error": max(relative(getattr(rough, name), expected[name]) for name in (*TERMS, "reconstruction")),
        "gradient_error": max(relative(gradients[name].grad, grad) for name, grad in zip(leaves, wanted, strict=True)),
        "save_load_error": from_disk,
    }


def relative(found: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().item()
    difference = (found.double() - expected.double()).abs().max().item()
    return difference / scale if scale > 0 else difference


def format_variants(records: list[dict]) -> str:
    lines = [
        "| variant | activation | float64 | gradients | float32 | save, load | NMSE | L0/layer | never fired | dead |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        metrics, dead = record["metrics"], record["train_dead_fraction"]
        found = [f"{record[name]:.0e}" for name in ("float64_error", "gradient_error", "float32_error")]
        found += [f"{record['save_load_error']:.0e}", f"{metrics['nmse']:.3f}"]
        found += [
            f"{metrics['l0'] / len(metrics['l0_per_layer']):.1f}",
            f"{metrics['dead_fraction']:.1%}",
            f"{dead:.1%}",
        ]
        lines.append(f"| {record['group']} | {record['settings']['activation_fn']} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = run_sweep(read_sweep(SWEEP), sys.argv[1], errors)
    Path(sys.argv[2]).write_text(format_variants(found), encoding="utf-8")
