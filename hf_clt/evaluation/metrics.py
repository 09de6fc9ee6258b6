"""
Metrics of a cross-layer transcoder on held-out tokens, as sums that are fed batch by batch and merged over processes.

The sums are the count, mean and sum of squared deviations of the targets (Chan, Golub & LeVeque 1979, "Updating
formulae and a pairwise algorithm for computing sample variances"), the squared error of the reconstruction, and the
number of tokens on which each feature is active. Σy² - N·ȳ² is never formed: residual streams have dimensions whose
mean is thousands of times their spread, where it would cancel. Chan's form merges exactly, but its parts do not simply
add up: gather the tensors of all processes and give them to [`MetricSums.from_gathered`].
"""

import math

import torch


# log10 of the share of tokens on which a feature is active: four bins per decade; -10 stands for never
DENSITY_FLOOR = -10.0
DENSITY_BINS = 40
ROUNDING = 1e-6  # a spread below this share of the mean, or a difference below it of the value, is that of float32


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


class MetricSums:
    """
    Streamed sums from which the metrics are computed. The result does not depend on how the tokens were cut into
    batches or spread over processes.

    Args:
        num_layers (`int`): L.
        d_model (`int`): D.
        num_features (`int`): F, features per layer.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where the sums are kept. They are float64, which Apple's GPU lacks, so `"mps"` accumulates on the CPU.
    """

    def __init__(self, num_layers: int, d_model: int, num_features: int, device: str | torch.device = "cpu"):
        device = torch.device(device)
        if device.type == "mps":
            device = torch.device("cpu")
        self.num_layers, self.d_model, self.num_features, self.device = num_layers, d_model, num_features, device
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.mean = torch.zeros(num_layers, d_model, dtype=torch.float64, device=device)
        self.squared_deviation = torch.zeros(num_layers, d_model, dtype=torch.float64, device=device)
        self.squared_error = torch.zeros(num_layers, dtype=torch.float64, device=device)
        self.active_counts = torch.zeros(num_layers, num_features, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, labels: torch.Tensor, reconstruction: torch.Tensor, acts) -> None:
        """
        Add a batch of tokens.

        Args:
            labels (`torch.Tensor` of shape `(N, L, D)`): Raw targets y.
            reconstruction (`torch.Tensor` of shape `(N, L, D)`): Raw reconstruction ŷ.
            acts (`torch.Tensor` of shape `(N, L, F)`, or sparse):
                Activations of the same tokens. Sparse is anything whose `active_counts()` gives the number of these
                tokens on which each feature is above zero, of shape `(L, F)`.

        Raises:
            `ValueError`: A shape does not fit.
        """
        expected = (self.num_layers, self.d_model)
        if labels.dim() != 3 or tuple(labels.shape[1:]) != expected:
            raise ValueError(
                f"labels must have shape (N, {expected[0]}, {expected[1]}), got {tuple(labels.shape)}; give the raw"
                " targets of all layers, one row per token"
            )
        if reconstruction.shape != labels.shape:
            raise ValueError(
                f"reconstruction has shape {tuple(reconstruction.shape)} and labels {tuple(labels.shape)}; both must"
                " cover the same tokens"
            )
        if isinstance(acts, torch.Tensor):
            if tuple(acts.shape) != (len(labels), self.num_layers, self.num_features):
                raise ValueError(
                    f"acts must have shape ({len(labels)}, {self.num_layers}, {self.num_features}), got"
                    f" {tuple(acts.shape)}; give the activations of the tokens in labels"
                )
            active = (acts > 0).sum(0)
        else:
            active = acts.active_counts()
            if tuple(active.shape) != (self.num_layers, self.num_features):
                raise ValueError(
                    f"acts.active_counts() must have shape ({self.num_layers}, {self.num_features}), got"
                    f" {tuple(active.shape)}; give the activations of a CLT of this size"
                )
        if len(labels) == 0:
            return
        batch = MetricSums(self.num_layers, self.d_model, self.num_features, self.device)
        batch.count += len(labels)
        batch.active_counts += active.to(self.device)
        for layer in range(self.num_layers):  # one layer at a time: a float64 copy of a whole batch is large
            target = labels[:, layer].to(self.device).double()
            error = target - reconstruction[:, layer].to(self.device).double()
            batch.mean[layer] = target.mean(0)
            batch.squared_deviation[layer] = (target - batch.mean[layer]).square().sum(0)
            batch.squared_error[layer] = error.square().sum()
        self.merge(batch)

    def merge(self, other: "MetricSums") -> None:
        """Add the tokens of `other`, which may have seen any number of them (none included)."""
        if self.active_counts.shape != other.active_counts.shape or self.mean.shape != other.mean.shape:
            raise ValueError(
                f"cannot merge sums over (layers, d_model, features) {self.shape} with {other.shape}; both must"
                " come from the same CLT"
            )
        count = self.count + other.count
        share = other.count.to(self.device) / count.clamp(min=1).double()  # of the tokens, those that come from other
        delta = other.mean.to(self.device) - self.mean
        self.squared_deviation += other.squared_deviation.to(self.device) + delta.square() * self.count * share
        self.mean += delta * share
        self.squared_error += other.squared_error.to(self.device)
        self.active_counts += other.active_counts.to(self.device)
        self.count = count

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(L, D, F)`."""
        return self.num_layers, self.d_model, self.num_features

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        The whole state, to be gathered over processes: `count` (), int64; `mean` and `squared_deviation` (L, D) and
        `squared_error` (L,), float64; `active_counts` (L, F), int64. The mean makes them no plain sums: do not
        all-reduce them, gather them.
        """
        return {
            "count": self.count,
            "mean": self.mean,
            "squared_deviation": self.squared_deviation,
            "squared_error": self.squared_error,
            "active_counts": self.active_counts,
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over a state that [`MetricSums.tensors`] gave."""
        own = self.tensors()
        if set(tensors) != set(own):
            raise ValueError(
                f"metric sums need the tensors {sorted(own)}, got {sorted(tensors)}; give what tensors() returned"
            )
        for name, value in own.items():
            if tensors[name].shape != value.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}; the sums come"
                    " from a CLT of another size"
                )
            setattr(self, name, tensors[name].to(device=self.device, dtype=value.dtype, copy=True))

    @staticmethod
    def from_gathered(parts: list[dict[str, torch.Tensor]]) -> "MetricSums":
        """
        Merge the states of any number of processes.

        Args:
            parts (`list[dict[str, torch.Tensor]]`): What [`MetricSums.tensors`] gave on each process, in rank order.

        Returns:
            [`MetricSums`] over the tokens of all parts, on the device of the first.
        """
        if not parts:
            raise ValueError("no metric sums to merge; give the tensors() of at least one process")
        num_layers, d_model = parts[0]["mean"].shape
        num_features = parts[0]["active_counts"].shape[1]
        total = MetricSums(num_layers, d_model, num_features, parts[0]["mean"].device)
        for part in parts:
            sums = MetricSums(num_layers, d_model, num_features, total.device)
            sums.load_tensors(part)
            total.merge(sums)
        return total

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
        varies = deviation > ROUNDING**2 * self.count * self.mean.square().sum(1)
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
    return (ablated - replaced) / lost if abs(lost) > ROUNDING * original else None


__all__ = ["MetricSums", "ce_recovered", "density_histogram", "mean_of_defined"]
