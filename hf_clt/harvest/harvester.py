"""Tokens to activations: runs a language model through nnsight and reads a CLT's inputs and targets."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from nnsight import NNsight
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration_clt import CLTConfig
from ..device import Stopwatch, to_device
from ..files import one_line
from ..kernels.encode import multiplies_bfloat16
from .sites import resolve_sites


if TYPE_CHECKING:
    from .cache import ActivationCache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FINGERPRINT_NUMBERS = 2**16  # of each weight


class ActivationError(ValueError):
    """Activations of the language model are NaN or infinite."""


def load_language_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a causal language model and its tokenizer, for reading activations only: eval mode, no gradients.

    Args:
        name_or_path: Name of a model on the Hub, or a folder with its config, safetensors weights and tokenizer.
        revision: Branch, tag or commit on the Hub.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: bfloat16, but float32 on a CPU that has no
            instructions for bfloat16 and would take several times as long. None: that of the files.
        trust_remote_code: Whether to run model code from the Hub.
        device: Where to put the model; None: on the CPU.

    Raises:
        ValueError: If the model or its tokenizer cannot be loaded, is not a decoder-only language model, or lacks some
            of its weights.
    """
    device = torch.device(device or "cpu")
    if dtype == "auto":
        on_gpu = device.type == "cuda"
        is_fast = torch.cuda.get_device_capability(device) >= (8, 0) if on_gpu else multiplies_bfloat16()
        dtype = "bfloat16" if is_fast else "float32"
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"model_dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}, auto, or None for that of the files."
        )
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif folder.exists() or folder.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"model {name!r}: there is no such folder; give one that exists, or a Hub name.")
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}

    config = _from_pretrained("model", AutoConfig, name, **origin)
    if config.is_encoder_decoder:
        raise ValueError(
            f"model {name!r} ({config.model_type}) is an encoder-decoder: a CLT needs a decoder-only model."
        )
    tokenizer = _from_pretrained("the tokenizer of model", AutoTokenizer, name, **origin)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes where there are no files
        raise ValueError(
            f"model {name!r} has no tokenizer files: save them beside it with tokenizer.save_pretrained(folder)."
        )
    model, info = _from_pretrained(
        "model",
        AutoModelForCausalLM,
        name,
        dtype="auto" if dtype is None else DTYPES[dtype],
        use_safetensors=True,
        output_loading_info=True,
        device_map=None if device.type == "cpu" else device,  # straight there, not by way of each process's host
        **origin,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model {name!r} lacks {len(missing)} of its weights ({missing[0]}, ...): they would be random. Load a "
            f"causal language model of type {config.model_type!r} with all its files."
        )
    model.requires_grad_(False)
    return model.eval().to(device), tokenizer


def _from_pretrained(what: str, auto: type, name: str, **options):
    try:
        return auto.from_pretrained(name, **options)
    except Exception as error:  # the many ways of the network, the Hub and a repository's files
        reason = one_line(error, 300)
        if isinstance(error, OSError) and not Path(name).is_dir():
            reason = (
                "it is no local folder, and the Hub does not give it. Check the name, the revision and the network, "
                f"and log in if it is private or gated ({reason})"
            )
        raise ValueError(f"{what} {name!r} cannot be loaded: {reason}") from error


def check_context_size(model_config: PreTrainedConfig, context_size: int) -> None:
    """Raises ValueError if a language model has fewer than `context_size` positions."""
    # GPT-2's n_positions is read by this name too
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context_size > limit:
        raise ValueError(
            f"context_size is {context_size}, and the language model has {limit} positions: use at most {limit}."
        )


def check_fit(
    clt_config: CLTConfig, harvester: "Harvester | ActivationCache", model_name: str = "the language model"
) -> None:
    """
    Raises ValueError if a CLT has other layers, another width or other hooks than a [`Harvester`] or
    [`ActivationCache`]; the message calls its language model `model_name`.
    """
    for name, found in (
        ("num_layers", harvester.num_layers),
        ("d_model", harvester.d_model),
        ("feature_input_hook", harvester.input_hook),
        ("feature_output_hook", harvester.output_hook),
    ):
        own = getattr(clt_config, name)
        if own != found:
            raise ValueError(
                f"{name}={own} does not fit {model_name}, which has {found}; give {name}={found} for a new CLT, or "
                "the language model and hooks that the CLT was trained on"
            )


def without_bad_rows(
    batch: dict[str, Tensor], inputs: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """
    Leaves out the rows of a batch in which an activation is NaN or infinite, whole: one spreads through the attention
    to all tokens of its row, masked or not.

    Args:
        batch: Of a [`TokenStream`], (P, T) each.
        inputs, labels: (N, L, D), activations of its counted tokens.

    Returns:
        The batch with `counted` off in these rows, so that harvesting it gives what is left; inputs and labels of the
        counted tokens that are left.
    """
    row = batch["counted"].nonzero()[:, 0]
    bad = ~(inputs.isfinite().flatten(1).all(dim=1) & labels.isfinite().flatten(1).all(dim=1)).cpu()
    bad_rows = row[bad].unique()
    counted = batch["counted"].clone()
    counted[bad_rows] = False
    kept = ~torch.isin(row, bad_rows).to(inputs.device)
    return {**batch, "counted": counted}, inputs[kept], labels[kept]


class Harvester:
    """
    Reads the activations that a CLT maps from and to out of a language model.

    Only as much of the model is computed as the last site needs; the language modeling head never is. Padding,
    on either side, does not change the activations of the tokens. A harvester is used by one thread at a time.

    Args:
        model: The language model, with or without its head, in eval mode.
        input_hook: What features read, see [`resolve_sites`].
        output_hook: What is reconstructed.
        device: Where to move the model; None: it stays where it is.

    Attributes:
        num_layers (`int`): L.
        d_model (`int`): D.
        device (`torch.device`), dtype (`torch.dtype`): Where, and in which number format, the model gives activations.
        stopwatch ([`Stopwatch`]): Of the time spent in `harvest`.

    Raises:
        ValueError: If a hook is unknown, or the model's architecture is, see [`resolve_sites`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_hook: str = "hook_resid_mid",
        output_hook: str = "hook_mlp_out",
        device: str | torch.device | None = None,
    ):
        self.model = model if device is None else model.to(device)
        self.input_hook, self.output_hook = input_hook, output_hook
        self.input_sites, self.output_sites = resolve_sites(model, input_hook, output_hook)
        config = model.config.get_text_config()
        self.num_layers = config.num_hidden_layers
        self.d_model = config.hidden_size
        self.stopwatch = Stopwatch(model.device)
        self._accepted = inspect.signature(type(model).forward).parameters
        self._nnsight = NNsight(model)
        self._inputs = [(self._nnsight.get(site.path), site.io) for site in self.input_sites]
        self._outputs = [(self._nnsight.get(site.path), site.io) for site in self.output_sites]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def fingerprint(self) -> dict:
        """
        What tells the language model from another of its shape, JSON-able: its `dtype`, and `numbers`, for each of its
        weights the norm of the first 65,536 values, and their product with a wave, as a share of the norm.
        """
        found = []
        for weight in self.model.parameters():
            values = weight.detach().flatten()[:FINGERPRINT_NUMBERS].float().nan_to_num(0, 0, 0)
            norm = values.norm()
            wave = torch.cos(torch.arange(len(values), device=values.device, dtype=torch.float32))
            found += [norm.item(), (values @ wave / norm.clamp_min(1e-30)).item()]
        return {"dtype": str(self.dtype), "numbers": found}

    def has_fingerprint(self, fingerprint: dict) -> bool:
        """Whether `fingerprint` is of this model, in the same number format or rounded to another."""
        own, other = self.fingerprint(), torch.tensor(fingerprint["numbers"])
        tolerance = 1e-4 if own["dtype"] == fingerprint["dtype"] else 1e-2
        own = torch.tensor(own["numbers"])
        return own.shape == other.shape and torch.allclose(own, other, rtol=tolerance, atol=tolerance)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Activations at every position.

        Args:
            input_ids: (P, T) token ids.
            attention_mask: (P, T), 1 for tokens, 0 for padding; None: there is none. What is returned at padding has
                no meaning.

        Returns:
            Inputs and outputs of the MLPs, each (P, T, L, D), in the model's dtype and on its device, without
            gradients.

        Raises:
            ValueError: If the model is in training mode, or cannot take these tokens.
        """
        inputs, outputs = self._read(input_ids, attention_mask, None, self.model.dtype)
        shape = *input_ids.shape, self.num_layers, self.d_model
        return inputs.view(shape), outputs.view(shape)

    def harvest(
        self, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32, skip_bad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """
        Activations of the tokens that count.

        Args:
            batch: Of a [`TokenStream`], (P, T) each.
            dtype: Dtype of the result.
            skip_bad: Leave out rows of the batch with an activation that is NaN or infinite, instead of raising.

        Returns:
            Inputs and labels, each (N, L, D), N counted tokens in the order of (row, position).

        Raises:
            [`ActivationError`]: If an activation is NaN or infinite; the message names layer, hook and document.
            ValueError: If the model is in training mode, or cannot take these tokens.
        """
        inputs, labels, total = self.read(batch, dtype)
        try:
            self.check(batch, inputs, labels, total)
        except ActivationError:
            if not skip_bad:
                raise
            _, inputs, labels = without_bad_rows(batch, inputs, labels)
        return inputs, labels

    def read(self, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """
        What `harvest` returns, unchecked, so that nothing waits for a GPU; and for `check` a number, which is finite
        if all activations are.
        """
        with self.stopwatch.running():
            rows = batch["counted"].flatten().nonzero().squeeze(1)
            inputs, labels = self._read(batch["input_ids"], batch["attention_mask"], rows, dtype)
            total = inputs.sum(dtype=torch.float32) + labels.sum(dtype=torch.float32)
        return inputs, labels, total

    def check(self, batch: dict[str, Tensor], inputs: Tensor, labels: Tensor, total: Tensor) -> None:
        """Raises [`ActivationError`] for the first activation that `read` returned and that is NaN or infinite."""
        if torch.isfinite(total):  # where it is not, a sum may have overflowed and no summand
            return
        rows = batch["counted"].flatten().nonzero().squeeze(1)
        for layer in range(self.num_layers):
            for hook, values in ((self.input_hook, inputs), (self.output_hook, labels)):
                bad = ~torch.isfinite(values[:, layer]).all(dim=1)
                if bad.any():
                    row, position = divmod(int(rows[bad.nonzero()[0, 0]]), batch["input_ids"].shape[1])
                    # A NaN spreads through the attention, masked or not, so the whole row is suspect.
                    documents = [str(number) for number in batch["documents"][row].unique().tolist() if number >= 0]
                    raise ActivationError(
                        f"activations of the language model are not finite in {values.dtype}: layer {layer}, {hook}, "
                        f"document {' or '.join(documents)} (row {row}, position {position} of the batch; "
                        f"{int(bad.sum())} of {len(bad)} tokens). Load the model and keep the buffer in float32 or "
                        "bfloat16 (model_dtype, buffer_dtype), or leave such text out (in training: "
                        "on_bad_activations='skip')."
                    )

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor | None, rows: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Inputs and outputs, each (N, L, D), at the positions `rows` (N,) of the flattened (P * T,), or at all."""
        arguments = self._arguments(input_ids, attention_mask)
        count = input_ids.numel() if rows is None else len(rows)
        device = self.model.device
        inputs = torch.empty(count, self.num_layers, self.d_model, dtype=dtype, device=device)
        outputs = torch.empty_like(inputs)
        rows = None if rows is None else to_device(rows, device)

        # The body of the trace runs along with the model: each read waits for its module, so they come in its order.
        with torch.no_grad(), self._nnsight.trace(**arguments) as tracer:
            for layer in range(self.num_layers):
                for target, (module, io) in ((inputs, self._inputs[layer]), (outputs, self._outputs[layer])):
                    value = (module.input if io == "input" else module.output).flatten(0, 1)
                    target[:, layer] = value if rows is None else value[rows.to(value.device)]
            tracer.stop()  # the rest of the model is not run
        return inputs, outputs

    def _arguments(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict:
        """
        What the model's forward takes; raises ValueError in training mode, and for tokens that are too many or not in
        its vocabulary.
        """
        if self.model.training:
            raise ValueError(
                "the language model is in training mode, so dropout changes its activations: call model.eval()."
            )
        check_context_size(self.model.config, input_ids.shape[1])
        embedding = self.model.get_input_embeddings().weight
        device = embedding.device
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # Nobody reads what stands at padding; a padding token that was added later has no embedding.
        input_ids = input_ids.masked_fill(attention_mask == 0, 0)
        if input_ids.numel() and not 0 <= input_ids.min() <= input_ids.max() < len(embedding):
            raise ValueError(
                f"token ids from {int(input_ids.min())} to {int(input_ids.max())} do not fit the language model's "
                f"vocabulary of {len(embedding)}: use the model's own tokenizer."
            )
        arguments = {
            "input_ids": to_device(input_ids, device),
            "attention_mask": to_device(attention_mask, device),
        }
        # A token's position is the number of tokens before it: on left-padded rows that is not its column.
        if "position_ids" in self._accepted:
            arguments["position_ids"] = to_device((attention_mask.cumsum(1) - 1).clamp(min=0), device)
        elif not attention_mask[:, 0].all():
            raise ValueError(
                f"{type(self.model).__name__} takes no position_ids, so left padding would change its activations: "
                "pad on the right."
            )
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        return arguments


__all__ = [
    "ActivationError",
    "Harvester",
    "check_context_size",
    "check_fit",
    "load_language_model",
    "without_bad_rows",
]
