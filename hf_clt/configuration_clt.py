"""Configuration of a cross-layer transcoder."""

# No `from __future__ import annotations` here: string annotations silently switch off the `@strict` type checks.

import logging
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


logger = logging.getLogger(__name__)

# Defaults that depend on the activation function; each applies where the field is left at None. docs/defaults.md says
# how they were found. sparsity_lambda is per unit of d_model: lambda weighs one feature's activity against a squared
# error that is summed over the d_model dimensions of normalised targets (see losses.py).
ACTIVATION_DEFAULTS = {
    "relu": {"jumprelu_bandwidth": 1.0, "sparsity_lambda": 0.01, "aux_coef": 0.0, "aux_k": 0},
    "jumprelu": {"jumprelu_bandwidth": 0.1, "sparsity_lambda": 0.01, "aux_coef": 0.0, "aux_k": 0},
    "topk": {"jumprelu_bandwidth": 1.0, "sparsity_lambda": 0.0, "aux_coef": 1 / 32, "aux_k": 16},
    "batchtopk": {"jumprelu_bandwidth": 1.0, "sparsity_lambda": 0.0, "aux_coef": 1 / 32, "aux_k": 16},
}
TOPK_FAMILY = ("topk", "batchtopk")
WITH_THRESHOLD = ("jumprelu", "batchtopk")
FEATURE_INPUT_HOOKS = ("hook_resid_mid", "mlp.hook_in")
FEATURE_OUTPUT_HOOKS = ("hook_mlp_out", "mlp.hook_out")

# One line per field: the text of `--help` and of the class docstring's argument list.
CLT_CONFIG_HELP = {
    "base_model_name_or_path": "Hub name or folder of the language model that the CLT reads.",
    "base_model_revision": "Branch, tag or commit of the base model on the Hub.",
    "num_layers": "Number of layers L of the base model.",
    "d_model": "Width D of the base model's residual stream.",
    "num_features": "Number of features F per layer.",
    "activation_fn": "Activation function: relu, jumprelu, topk or batchtopk.",
    "k": "Active features per layer and token for topk and batchtopk (k_scope=token: k * num_layers per token).",
    "k_scope": "Whether the top-k budget is per layer, or shared by all layers of a token.",
    "jumprelu_threshold": "Initial threshold theta of every jumprelu feature, in units of the pre-activation.",
    "jumprelu_bandwidth": "Width epsilon of the window around theta in which jumprelu's straight-through gradient "
    "acts. A width comparable to the pre-activations' spread puts most features inside and makes every step dense.",
    "decoder_reach": "Number of target layers each source layer writes to: itself and the following ones. "
    "None = all (a CLT), 1 = a per-layer transcoder.",
    "decoder_tying": "none, per_source (one decoder per source layer) or per_target (one per target layer).",
    "skip_connection": "Whether each layer adds a linear map of its own input to its reconstruction.",
    "feature_input_hook": "What features read: hook_resid_mid (before the pre-MLP norm) or mlp.hook_in (after it).",
    "feature_output_hook": "What is reconstructed: hook_mlp_out (added to the residual stream) or mlp.hook_out.",
    "sparsity_lambda": "Weight lambda of the tanh sparsity loss. By default 0.01 x d_model for relu and jumprelu, 0 "
    "for topk and batchtopk.",
    "sparsity_c": "Scale c inside the tanh of the sparsity loss.",
    "sparsity_first_layer": "Weight of the first source layer's features in the sparsity loss. Below 1 it has more of "
    "the active features; errors of the first layer cost the language model most.",
    "preactivation_coef": "Weight of the pre-activation loss on dead features (relu and jumprelu).",
    "aux_coef": "Weight of the auxiliary loss on dead features (topk, batchtopk). Default: by activation function.",
    "aux_k": "Dead features per token and layer that the auxiliary loss uses. Default: by activation function.",
}
# Keys that transformers puts into `config.json` or passes to a configuration.
TRANSFORMERS_KEYS = {
    *PreTrainedConfig().to_dict(),
    "torch_dtype",
    "auto_map",
    "name_or_path",
    "gguf_file",
    "attn_implementation",
    "experts_implementation",
    "distributed_config",
    "output_attentions",
    "use_cache",
}


@strict
class CLTConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CrossLayerTranscoder`]. Every field is described in `CLT_CONFIG_HELP`; the defaults that are
    `None` here and depend on the activation function are filled in from `ACTIVATION_DEFAULTS`.

    Raises:
        ValueError: for a value out of range or a combination that cannot be built; the message names the field.
        TypeError: for an argument that is no field (a misspelt name) or a missing one.
    """

    model_type = "cross_layer_transcoder"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "num_layers"}

    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    num_layers: int | None = None
    d_model: int | None = None
    num_features: int | None = None
    activation_fn: Literal["relu", "jumprelu", "topk", "batchtopk"] = "jumprelu"
    k: int = 32
    k_scope: Literal["layer", "token"] = "layer"
    jumprelu_threshold: int | float = 0.03
    jumprelu_bandwidth: int | float | None = None
    decoder_reach: int | None = None
    decoder_tying: Literal["none", "per_source", "per_target"] = "none"
    trained_decoder_tying: str | None = None
    skip_connection: bool = False
    feature_input_hook: Literal["hook_resid_mid", "mlp.hook_in"] = "hook_resid_mid"
    feature_output_hook: Literal["hook_mlp_out", "mlp.hook_out"] = "hook_mlp_out"
    sparsity_lambda: int | float | None = None
    sparsity_c: int | float = 1.0
    sparsity_first_layer: int | float = 1.0
    preactivation_coef: int | float = 3e-6
    aux_coef: int | float | None = None
    aux_k: int | None = None

    def __post_init__(self, **kwargs):
        # PreTrainedConfig accepts unknown keyword arguments, so a misspelt field would pass unnoticed.
        for name in self._unknown(kwargs):
            nearest = get_close_matches(name, CLT_CONFIG_HELP, n=3, cutoff=0.4) or sorted(CLT_CONFIG_HELP)
            raise TypeError(f"CLTConfig has no field {name!r}; did you mean one of {', '.join(nearest)}?")
        super().__post_init__(**kwargs)  # which knows hidden_size for d_model
        for name, value in derived_defaults(self.activation_fn, self.d_model).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_ranges()

    def _check_ranges(self):
        # Not in a `validate_...` method: `@strict` would wrap the message. Types were checked as fields were set.
        # transformers builds the configuration without arguments to see which values are defaults.
        shape = {name: getattr(self, name) for name in ("num_layers", "d_model", "num_features")}
        if all(value is None for value in shape.values()):
            return
        for name, value in shape.items():
            if value is None or value < 1:
                raise ValueError(f"{name}={value} is not a positive number; give {name} (an integer of at least 1)")
        if self.decoder_reach is not None and not 1 <= self.decoder_reach <= self.num_layers:
            raise ValueError(
                f"decoder_reach={self.decoder_reach} is outside 1 to num_layers={self.num_layers}; "
                "leave it out for all layers"
            )
        if self.k < 1:
            raise ValueError(f"k={self.k} is below 1; give at least one active feature")
        if self.activation_fn in TOPK_FAMILY and self.k > self.num_features:
            raise ValueError(
                f"k={self.k} is larger than num_features={self.num_features}; lower k or raise num_features"
            )
        for name in (
            "jumprelu_threshold", "sparsity_lambda", "sparsity_first_layer", "preactivation_coef", "aux_coef", "aux_k",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is negative or not finite; give 0 or more")
        if self.sparsity_first_layer != 1 and self.sparsity_lambda == 0:
            raise ValueError(
                f"sparsity_first_layer={self.sparsity_first_layer} has no effect with sparsity_lambda=0; give "
                "sparsity_first_layer=1, or a sparsity_lambda"
            )
        for name in ("jumprelu_bandwidth", "sparsity_c"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not a positive number; give one above 0")

    @classmethod
    def _unknown(cls, names) -> list[str]:
        """Those of `names` that are neither fields nor keys of transformers."""
        known = {field.name for field in fields(cls)} | set(cls.attribute_map) | TRANSFORMERS_KEYS
        return [name for name in names if name not in known and not name.startswith("_")]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "CLTConfig | tuple[CLTConfig, dict[str, Any]]":
        """As [`from_values`]; transformers calls it."""
        from . import modeling_clt  # noqa: F401  AutoModel looks for the class of a configuration, and finds it then

        return cls.from_values(config_dict, **kwargs)

    @classmethod
    def from_values(cls, config_dict: dict[str, Any], **kwargs: Any) -> "CLTConfig | tuple[CLTConfig, dict[str, Any]]":
        """
        The configuration in a file, with fields overridden by `kwargs`. If these change the activation function,
        values that are only the defaults of the file's are replaced by those of the new one. A key that is not a
        field, of a newer version or another tool, is kept, with a warning.
        """
        values = {**config_dict}
        saved = derived_defaults(values.get("activation_fn", cls.activation_fn), values.get("d_model"))
        for name, default in saved.items():
            if values.get(name) == default:
                values.pop(name, None)
        # Before construction: the base class would set them after it, past the defaults and the checks.
        values |= {name: kwargs.pop(name) for name in CLT_CONFIG_HELP if name in kwargs}
        foreign = {name: values.pop(name) for name in cls._unknown(values)}
        if foreign:
            logger.warning("a CLT's configuration has %s, unknown here: kept and not used", ", ".join(foreign))
        loaded = super().from_dict(values, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in foreign.items():
            if value is not None:  # transformers takes the mere presence of some for a setting
                setattr(config, name, value)
        return loaded

    @property
    def reach(self) -> int:
        """Number of target layers a source layer can write to (`decoder_reach`, or all)."""
        return self.num_layers if self.decoder_reach is None else self.decoder_reach

    def num_targets(self, source: int) -> int:
        """Number of target layers that source layer `source` writes to: min(L - source, R)."""
        return min(self.num_layers - source, self.reach)


def derived_defaults(activation_fn: str, d_model: int | None) -> dict[str, int | float | None]:
    """The defaults that depend on other fields: by activation function, and λ by width (None where that is open)."""
    defaults = dict(ACTIVATION_DEFAULTS.get(activation_fn, {}))
    if "sparsity_lambda" in defaults:
        defaults["sparsity_lambda"] = None if d_model is None else defaults["sparsity_lambda"] * d_model
    return defaults


__all__ = ["CLTConfig", "CLT_CONFIG_HELP"]
