"""Metrics of a cross-layer transcoder on held-out tokens, as sums that are fed batch by batch."""

import math

import torch

from ..harvest.statistics import Moments
from ..sparsity import SparseFeatures


# log10 of the share of tokens on which a feature is active: four bins per decade; -10 stands for never
DENSITY_FLOOR = -10.0
DENSITY_BINS = 40
# A spread below this share of the mean, or a difference below it of the value, is that of float32.
FLOAT32_ROUNDING = 1e-6


def density_histogram(active_counts: torch.Tensor, num_tokens: int) -> dict[str, list]:
    """
    Histogram of log10 of the share of tokens on which each feature is active.

    Args:
        active_counts (`torch.Tensor` of any shape, int64): Tokens on which each feature is active.
        num_tokens (`int`): Tokens seen.

    Returns:
        `dict` with `bin_edges` (41 floats from -10 to 0) and `counts` (40 integers, the last bin including 0).
    """
    density = active_counts.double().flatten().cpu() / num_tokens
    log_density = density.log10().clamp(min=DENSITY_FLOOR)
    counts = torch.histc(log_density, bins=DENSITY_BINS, min=DENSITY_FLOOR, max=0.0)
    edges = [DENSITY_FLOOR + i * -DENSITY_FLOOR / DENSITY_BINS for i in range(DENSITY_BINS + 1)]
    return {"bin_edges": edges, "counts": [int(count) for count in counts]}


class MetricSums(Moments):
    """
    Streamed sums from which the metrics are computed: the [`Moments`] of the targets, the squared error of the
    reconstruction, and the number of tokens on which each feature is active. The result does not depend on how the
    tokens were cut into batches or spread over processes.

    Args:
        num_layers (`int`): L.
        d_model (`int`): D.
        num_features (`int`): F, features per layer.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the sums are kept.

    Its `tensors` are `count` (), int64; `mean` and `squared_deviation` (L, D) and `squared_error` (L,), float64;
    `active_counts` (L, F), int64.
    """

    STATE = (*Moments.STATE, "squared_error", "active_counts")

    def __init__(self, num_layers: int, d_model: int, num_features: int, device: str | torch.device = "cpu"):
        super().__init__((num_layers, d_model), device)
        self.squared_error = torch.zeros(num_layers, dtype=torch.float64, device=self.device)
        self.active_counts = torch.zeros(num_layers, num_features, dtype=torch.int64, device=self.device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(L, D, F)`."""
        return *self.mean.shape, self.active_counts.shape[1]

    @torch.no_grad()
    def update(self, labels: torch.Tensor, reconstruction: torch.Tensor, acts: torch.Tensor | SparseFeatures) -> None:
        """
        Adds a batch of tokens.

        Args:
            labels (`torch.Tensor` of shape `(N, L, D)`): Raw targets y.
            reconstruction (`torch.Tensor` of shape `(N, L, D)`): Raw reconstruction ŷ.
            acts (`torch.Tensor` of shape `(N, L, F)`, or [`SparseFeatures`]): Activations of the same tokens.

        Raises:
            `ValueError`: A shape is another.
        """
        num_layers, d_model, num_features = self.shape
        if labels.dim() != 3 or labels.shape[1:] != (num_layers, d_model):
            raise ValueError(
                f"labels must have shape (N, {num_layers}, {d_model}), got {tuple(labels.shape)}; give the raw targets"
                " of all layers, one row per token"
            )
        if reconstruction.shape != labels.shape:
            raise ValueError(
                f"reconstruction has shape {tuple(reconstruction.shape)} and labels {tuple(labels.shape)}; both must"
                " cover the same tokens"
            )
        is_dense = isinstance(acts, torch.Tensor)
        active = (acts > 0).sum(0) if is_dense else acts.active_counts()
        found = acts.shape if is_dense else (len(labels), *active.shape)
        if found != (len(labels), num_layers, num_features):
            raise ValueError(
                f"acts must have shape ({len(labels)}, {num_layers}, {num_features}), got {tuple(found)}; give the"
                " activations of the tokens in labels"
            )
        super().update(labels)
        for layer in range(num_layers):
            error = labels[:, layer].to(self.device).double() - reconstruction[:, layer].to(self.device).double()
            self.squared_error[layer] += error.square().sum()
        self.active_counts += active.to(self.device)

    def merge(self, other: "MetricSums") -> None:
        """Adds the tokens of `other`, which may have seen any number of them (none included)."""
        if self.shape != other.shape:
            raise ValueError(
                f"cannot merge sums over (layers, d_model, features) {self.shape} with {other.shape}; both must"
                " come from the same CLT"
            )
        super().merge(other)
        self.squared_error += other.squared_error.to(self.device)
        self.active_counts += other.active_counts.to(self.device)

    @staticmethod
    def with_joined_features(parts: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
        """
        Of processes that share the features of one CLT in groups of `size`, and see the same tokens in a group: the
        states of the groups, with the features of all of a group's processes side by side.

        Args:
            parts (`list[dict[str, torch.Tensor]]`): What [`MetricSums.tensors`] gave on each process, in rank order.
            size (`int`): Processes per group; those of a group have consecutive ranks.
        """
        groups = [parts[first : first + size] for first in range(0, len(parts), size)]
        return [
            {**group[0], "active_counts": torch.cat([part["active_counts"] for part in group], dim=1)}
            for group in groups
        ]

    def compute(self) -> dict:
        """
        The metrics over all tokens seen. `nmse` of a layer is its squared error over its squared deviation from the
        mean, both summed over tokens and dimensions; a layer whose targets do not vary has none (None) and is left out
        of the means.

        Returns:
            `dict`: `nmse` and `explained_variance` (means over layers), `l0` (active features per token, summed over
            layers) and `dead_fraction` (share of the features that are active on none of the tokens), each also as a
            list `<name>_per_layer`; `num_tokens`; `feature_density`, the histogram of [`density_histogram`] over
            all layers; and, where there are some, `layers_without_nmse`.

        Raises:
            `ValueError`: No token was seen.
        """
        num_tokens = int(self.count)
        if num_tokens == 0:
            raise ValueError(
                "no tokens to evaluate on: the held-out text gave none; raise eval_tokens or give more text"
            )
        deviation = self.squared_deviation.sum(1)
        varies = deviation > FLOAT32_ROUNDING**2 * self.count * self.mean.square().sum(1)
        nmse = torch.where(varies, self.squared_error / deviation, torch.nan).tolist()
        nmse = [None if math.isnan(value) else value for value in nmse]
        l0 = (self.active_counts.sum(1).double() / num_tokens).tolist()
        dead = (self.active_counts == 0).double().mean(1).tolist()
        explained = [None if value is None else 1 - value for value in nmse]
        without = [layer for layer, value in enumerate(nmse) if value is None]
        return {
            "nmse": mean_of_defined(nmse),
            "explained_variance": mean_of_defined(explained),
            "l0": sum(l0),
            "dead_fraction": sum(dead) / len(dead),
            "num_tokens": num_tokens,
            "nmse_per_layer": nmse,
            "explained_variance_per_layer": explained,
            "l0_per_layer": l0,
            "dead_fraction_per_layer": dead,
            "feature_density": density_histogram(self.active_counts, num_tokens),
            **({"layers_without_nmse": without} if without else {}),
        }


def mean_of_defined(values: list[float | None]) -> float | None:
    """The mean of those that have a value; None where none has."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def ce_recovered(original: float, replaced: float, ablated: float) -> float | None:
    """(ce_ablated - ce_replaced) / (ce_ablated - ce_original); None where the ablation does nothing but rounding."""
    lost = ablated - original
    return (ablated - replaced) / lost if abs(lost) > FLOAT32_ROUNDING * original else None
