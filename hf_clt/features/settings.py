"""What is kept of each feature; apart from what it takes to do so, so that `hf-clt features --help` is fast."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ExampleSettings:
    """
    What is kept per feature.

    Args:
        top (`int`): Examples with the highest peaks.
        quantiles (`int`): Quantiles that the sample is cut into.
        per_quantile (`int`): Examples per quantile; the sample has `quantiles * per_quantile`.
        before, after (`int`): Positions shown before and after a peak, within its block.
        seed (`int`): Which sample is drawn, 0 or larger.
    """

    top: int = 16
    quantiles: int = 5
    per_quantile: int = 4
    before: int = 20
    after: int = 11
    seed: int = 0

    def __post_init__(self):
        for name, value in asdict(self).items():
            smallest = 0 if name in ("before", "after", "seed") else 1
            if value < smallest:
                raise ValueError(f"{name}={value} is below {smallest}; give {smallest} or more")

    @property
    def sample(self) -> int:
        return self.quantiles * self.per_quantile

    @property
    def width(self) -> int:
        """W, positions of a window; the peak is position `before` of it."""
        return self.before + 1 + self.after
