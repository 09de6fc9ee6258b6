"""
The metrics as `evaluate` modules, one file each, which load by path:

```python
import evaluate
from hf_clt.evaluation import MetricSums
from hf_clt.evaluation.modules import module_path

nmse = evaluate.load(module_path("nmse"))
sums = MetricSums(num_layers=1, d_model=2, num_features=1)
sums.update(labels, reconstruction, acts)  # any number of batches
nmse.add(**needed(nmse, sums.tensors()))  # any number of times, as of several processes
nmse.compute()  # {"nmse": ..., "nmse_per_layer": [...]}
```

They take sums and not activations: pushing each number through Arrow takes about a microsecond. What stands behind
the first five is [`MetricSums`]; this file holds what is the same for all.
"""

from pathlib import Path

import datasets
import evaluate
import torch

from ..metrics import MetricSums


NAMES = (
    "nmse",
    "explained_variance",
    "l0",
    "dead_fraction",
    "feature_density",
    "ce_recovered",
    "kl",
    "top1_agreement",
)

_VECTOR, _MATRIX = datasets.List(datasets.Value("float64")), datasets.List(datasets.List(datasets.Value("float64")))
# What MetricSums.tensors() gives: its type, and what it is.
TENSORS = {
    "count": (datasets.Value("int64"), "(): number of tokens"),
    "mean": (_MATRIX, "(L, D): mean of the targets"),
    "squared_deviation": (_MATRIX, "(L, D): sum of the targets' squared deviations from this mean"),
    "squared_error": (_VECTOR, "(L,): squared error of the reconstruction, summed over tokens and dimensions"),
    "active_counts": (
        datasets.List(datasets.List(datasets.Value("int64"))),
        "(L, F): number of tokens on which each feature is active",
    ),
}


def module_path(name: str) -> str:
    """
    The file of a metric's module, for `evaluate.load`.

    Args:
        name (`str`): One of `NAMES`.

    Raises:
        ValueError: If there is no such metric.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r} is no metric here; give one of {', '.join(NAMES)}")
    return str(Path(__file__).parent / f"{name}.py")


def needed(module: evaluate.EvaluationModule, tensors: dict) -> dict:
    """Those of `tensors` (as of [`MetricSums.tensors`]) that a module takes; it refuses others."""
    return {name: tensors[name] for name in module.features}


def module_info(description: str, inputs: dict[str, str], citation: str = "") -> evaluate.MetricInfo:
    """
    What `evaluate` wants to know about a metric.

    Args:
        description (`str`): The definition.
        inputs (`dict[str, str]`): Name of each input and what it is; one that is not in `TENSORS` is a float64 number.
        citation (`str`, *optional*): Where the definition comes from.
    """
    lines = "\n".join(f"    {name}: {text}" for name, text in inputs.items())
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=f"\nSums over a batch, or over any number of batches:\n{lines}\n",
        features=datasets.Features({name: TENSORS.get(name, (datasets.Value("float64"),))[0] for name in inputs}),
    )


def tensor_inputs(*names: str) -> dict[str, str]:
    """Inputs of [`module_info`] that [`MetricSums.tensors`] gives."""
    return {name: TENSORS[name][1] for name in names}


def metrics_of(rows: dict[str, list]) -> dict:
    """
    What [`MetricSums.compute`] gives for the merged sums; only what follows from the given ones has a meaning.

    Args:
        rows (`dict[str, list]`): For each input, its value in every `add`.
    """
    parts = []
    for values in zip(*rows.values(), strict=True):
        part = dict(zip(rows, values, strict=True))
        num_layers = len(part.get("active_counts", part.get("squared_error")))
        absent = {
            "count": torch.zeros(()),
            "mean": torch.zeros(num_layers, 1),
            "squared_deviation": torch.zeros(num_layers, 1),
            "squared_error": torch.zeros(num_layers),
            "active_counts": torch.zeros(num_layers, 1),
        }
        parts.append({**absent, **{name: torch.tensor(value, dtype=torch.float64) for name, value in part.items()}})
    return MetricSums.from_gathered(parts).compute()


def per_layer(metrics: dict, name: str) -> dict:
    """A metric in total and as a list per layer."""
    return {name: metrics[name], f"{name}_per_layer": metrics[f"{name}_per_layer"]}


def means_of(rows: dict[str, list]) -> dict[str, float]:
    """The mean over all predictions of each summed quantity; `count` is their number."""
    count = sum(rows["count"])
    if count == 0:
        raise ValueError("count=0: no prediction was counted; give more held-out text")
    return {name: sum(values) / count for name, values in rows.items() if name != "count"}
