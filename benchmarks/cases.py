"""What is measured: the shape and the settings of one row of the benchmark, presets, and how a shape grows."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args

from hf_clt.configuration_clt import TOPK_FAMILY, CLTConfig
from hf_clt.device import chosen_device
from hf_clt.kernels.encode import multiplies_bfloat16
from hf_clt.training.arguments import CLTTrainingArguments


# How --grow changes a field: multiples of the given value. L0 grows upwards, towards the density at which dense wins.
GROWTH = {
    "L": ("num_layers", (1 / 8, 1 / 4, 1 / 2, 1)),
    "F": ("num_features", (1 / 8, 1 / 4, 1 / 2, 1)),
    "N": ("tokens", (1 / 8, 1 / 4, 1 / 2, 1)),
    "k": ("l0", (1 / 4, 1, 4, 16)),
}


@dataclass(frozen=True)
class Case:
    """
    One shape with its settings.

    Args:
        num_layers, d_model, num_features, tokens: L, D, F per layer, and N per step.
        l0: Active features per layer and token: k of topk and batchtopk; the rate that the biases are set to for relu
            and jumprelu.
        activation_fn, k_scope, jumprelu_bandwidth, decoder_reach: As in [`CLTConfig`].
        dead: Share of the features that never fire and that ours revives; the dense side has no such losses.
        aux_k: Of them, how many per token and layer topk and batchtopk revive; None: the default of `CLTConfig`.
        dtype: Format of the decoders' weights.
        autocast: Format of the matrix products under `torch.autocast`; None: that of the weights. A CPU without
            instructions for it multiplies in float32, see [`multiplies_bfloat16`].
        device: "cpu", "cuda" or "cuda:n".
        optimizer: As in [`CLTTrainingArguments`], for ours; the dense reference always has fused Adam.
        learning_rate: Small, so that L0 stays where it was set.
        rounds: How often each side is measured in a fresh process; the sides take turns.
        steps, dense_steps: Steps timed per round, ours and dense (None: as many as ours).
        warmup: Steps before the timed ones in each round.
        seed: Of weights and random activations.

    Raises:
        ValueError: For a value out of range; the message names the field and the remedy.
    """

    num_layers: int = 12
    d_model: int = 768
    num_features: int = 6144
    tokens: int = 512
    l0: int = 32
    activation_fn: Literal["relu", "jumprelu", "topk", "batchtopk"] = "jumprelu"
    k_scope: Literal["layer", "token"] = "layer"
    jumprelu_bandwidth: float | None = None
    decoder_reach: int | None = None
    dead: float = 0.0
    aux_k: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: Literal["bfloat16"] | None = None
    device: str = "cpu"
    optimizer: str = "adam"
    learning_rate: float = 1e-5
    rounds: int = 2
    steps: int = 5
    dense_steps: int | None = None
    warmup: int = 2
    seed: int = 0

    def __post_init__(self):
        for name in ("num_layers", "d_model", "num_features", "tokens", "l0", "rounds", "steps", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; give at least 1")
        if self.dense_steps is not None and self.dense_steps < 1:
            raise ValueError(f"dense_steps={self.dense_steps} is not positive; give at least 1, or --no-dense")
        for name in ("activation_fn", "k_scope", "dtype"):
            choices = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(choices)}")
        if self.autocast not in (None, "bfloat16"):
            raise ValueError(f"autocast={self.autocast!r} is unknown; give bfloat16, or leave it out")
        if self.l0 > self.num_features or (self.l0 == self.num_features and self.activation_fn not in TOPK_FAMILY):
            raise ValueError(
                f"l0={self.l0} does not fit num_features={self.num_features} ({self.activation_fn}); lower l0 or "
                "raise num_features"
            )
        if not 0 <= self.dead < 1:
            raise ValueError(f"dead={self.dead} is no share of the features; give 0 to less than 1")
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate={self.learning_rate} is negative; give 0 or more")
        chosen_device(self.device)
        self.config()  # checks the bandwidth and the reach
        CLTTrainingArguments(optimizer=self.optimizer)  # checks that there is such an optimizer

    def config(self) -> CLTConfig:
        is_topk = self.activation_fn in TOPK_FAMILY
        return CLTConfig(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_features=self.num_features,
            activation_fn=self.activation_fn,
            k=self.l0 if is_topk else min(CLTConfig.k, self.num_features),
            k_scope=self.k_scope,
            jumprelu_bandwidth=self.jumprelu_bandwidth,
            decoder_reach=self.decoder_reach,
            aux_k=self.aux_k,
        )

    @property
    def targets(self) -> list[int]:
        """Target layers that each source layer writes to."""
        config = self.config()
        return [config.num_targets(source) for source in range(self.num_layers)]

    @property
    def follows_autocast(self) -> bool:
        """Whether products are in the format of `autocast`: not on a CPU that would emulate them, on neither side."""
        return self.autocast is not None and (self.device != "cpu" or multiplies_bfloat16())

    @property
    def product_dtype(self) -> str:
        """Format in which the encoders' matrix products are done."""
        return self.autocast if self.follows_autocast else "float32"

    def to_dict(self) -> dict:
        return asdict(self)


SMALL = {"num_layers": 6, "d_model": 256, "num_features": 8192, "tokens": 512, "l0": 32, "activation_fn": "topk"}
GPT2 = {"num_layers": 12, "d_model": 768, "num_features": 6144, "tokens": 512, "l0": 32, "activation_fn": "jumprelu"}
LARGE = {**GPT2, "num_features": 24576, "tokens": 4096, "steps": 10, "dtype": "bfloat16", "autocast": "bfloat16"}
PRESETS = {
    "issue": [
        {**SMALL, "steps": 10},
        {**GPT2, "dense_steps": 3},
        {**SMALL, "steps": 10, "autocast": "bfloat16"},
        {**GPT2, "dense_steps": 3, "autocast": "bfloat16"},
        {**GPT2, "dense_steps": 3, "activation_fn": "batchtopk"},
        {**GPT2, "tokens": 4096, "l0": 100, "rounds": 1, "steps": 3, "dense_steps": 1, "warmup": 1},
    ],
    "issue-gpu": [{**LARGE, "device": "cuda"}, {**LARGE, "device": "cuda", "l0": 200}],
}


def preset_cases(name: str, given: dict) -> list[Case]:
    """
    The rows of a preset, each with the given fields in place of its own.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; choose from {', '.join(PRESETS)}")
    return [Case(**{**row, **given}) for row in PRESETS[name]]


def grown_cases(base: Case, axis: str) -> list[Case]:
    """
    `base` with one of L, F, N or k changed over a range; the others stay.

    Raises:
        ValueError: If there is no such axis.
    """
    if axis not in GROWTH:
        raise ValueError(f"grow={axis!r} is unknown; choose from {', '.join(GROWTH)}")
    name, factors = GROWTH[axis]
    values = {max(1, round(getattr(base, name) * factor)) for factor in factors}
    # L0 is bounded by F; half of F is already far beyond where computing densely is cheaper.
    if axis == "k":
        values = {value for value in values if value <= base.num_features // 2} or {base.l0}
    if axis == "F":
        values = {value for value in values if value > base.l0} or {base.num_features}
    cases = []
    for value in sorted(values):
        changed = {name: value}
        if axis == "L" and base.decoder_reach is not None:
            changed["decoder_reach"] = min(base.decoder_reach, value)
        cases.append(replace(base, **changed))
    return cases


CASE_FIELDS = tuple(field.name for field in fields(Case))

__all__ = ["CASE_FIELDS", "GROWTH", "PRESETS", "Case", "grown_cases", "preset_cases"]
