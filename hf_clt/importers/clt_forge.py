"""
`clt-forge`: a CLT of CLT-Forge, `clt_cfg.json` and `clt_weights.safetensors`, or `rank{r}_clt_weights.safetensors`
where the features are sharded.

The weights are stacked: `W_enc` (L, D, F), `b_enc` (L, F), `log_threshold` (L, F), and, with `cross_layer_decoders`,
`W_dec` (L(L+1)/2, F, D) and `b_dec` (L(L+1)/2, D), one per pair of a source and a target layer in the order of
`torch.triu_indices` (all targets of source layer 0, then of 1, ...); without it `W_dec` (L, F, D) and `b_dec` (L, D).
The biases of a target are summed. `estimated_norm_scaling_factor_in` and `_out` (L,) multiply inputs and targets
before training, so W_enc is multiplied and W_dec and b_dec are divided by them.

CLT-Forge reads TransformerLens' `ln2.hook_normalized`. With a LayerNorm model loaded without processing this can be
the MLP's input (`mlp.hook_in`); TransformerLens has had it before the norm's weight as well, and RMSNorm models do.
The files do not tell, so that `feature_input_hook` must be given. `hook_mlp_out` is the output.

Sources in LLM-Interp/CLT-Forge: `src/clt_forge/clt.py` (also of the shards, `_load_full_sharded_clt`),
`training/activations_store.py`, `attribution/loading.py`.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import shared


WEIGHTS, CONFIG = "clt_weights.safetensors", "clt_cfg.json"
SHARD = "rank{}_clt_weights.safetensors"
NAMES = {"W_enc", "W_dec", "log_threshold"}  # of tensors that tell its files from others
SCALING_FACTORS = ("estimated_norm_scaling_factor_in", "estimated_norm_scaling_factor_out")
BUFFERS = ("feature_count", "layer_mask", "l_idx", "k_idx")  # counts of the training, and what follows from L


def read(path: Path, **overrides: Any) -> shared.Checkpoint:
    """
    A CLT of CLT-Forge, its scaling factors folded in.

    Args:
        path: The folder, or the weight file in it.
        overrides: Fields of [`CLTConfig`] that the files do not say; `feature_input_hook` at least.

    Raises:
        ValueError: For a scaling factor that is not positive, another activation function than jumprelu, or a
            configuration that the weights contradict.
    """
    folder = path if path.is_dir() else path.parent
    described = folder / CONFIG
    cfg = shared.read_settings(described)
    if path.is_file():
        shards = [path]
    else:
        shards = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else shared.numbered_files(folder, SHARD)
    sizes = [shared.read_shape(shard, "W_enc", "LDF") for shard in shards]
    num_layers, d_model, _ = sizes[0]
    num_features = sum(shape[2] for shape in sizes)
    crosses = cfg.get("cross_layer_decoders")
    for name, value, expected in (
        ("activation_fn", cfg.get("activation_fn", "jumprelu"), ("jumprelu",)),
        ("cross_layer_decoders", crosses, (True, False)),
        ("n_layers", cfg.get("n_layers"), (num_layers,)),
        ("d_in", cfg.get("d_in"), (d_model,)),
        ("d_latent", cfg.get("d_latent"), (num_features,)),
    ):
        if value not in expected:
            raise ValueError(
                f"{name}={value!r} in {described}, but the weights beside it and hf_clt need "
                f"{' or '.join(map(str, expected))}; is a file missing, or of another CLT?"
            )
    sources, targets = (
        torch.triu_indices(num_layers, num_layers) if crosses else torch.arange(num_layers).expand(2, -1)
    )
    dtypes = []
    for shard, (_, _, local) in zip(shards, sizes, strict=True):
        shapes = {
            "W_enc": (num_layers, d_model, local),
            "b_enc": (num_layers, local),
            "log_threshold": (num_layers, local),
            "W_dec": (len(sources), local, d_model),
            "b_dec": (len(sources), d_model),
            **dict.fromkeys(SCALING_FACTORS, (num_layers,)),
        }
        dtypes.append(shared.check_tensors([shard], shapes, may_hold=BUFFERS))
    fields = {
        "num_layers": num_layers,
        "d_model": d_model,
        "num_features": num_features,
        "activation_fn": "jumprelu",
        "decoder_reach": None if crosses else 1,
        "base_model_name_or_path": cfg.get("model_name") or None,
        "feature_input_hook": None,
        "feature_output_hook": "hook_mlp_out",
        "dtype": functools.reduce(torch.promote_types, dtypes),
    }

    def join(name: str, index: int | slice, dim: int) -> Tensor:
        return torch.cat([shared.read_tensor(shard, name, index) for shard in shards], dim=dim)

    def read_layer(layer: int) -> dict[str, Tensor]:
        decoders = (sources == layer).nonzero()  # consecutive rows
        biases = shared.read_tensor(shards[0], "b_dec")[targets == layer]
        return {
            "W_enc": join("W_enc", layer, dim=1).T,
            "b_enc": join("b_enc", layer, dim=0),
            "b_dec": biases.sum(dim=0, dtype=torch.float64),
            "W_dec": join("W_dec", slice(int(decoders[0]), int(decoders[-1]) + 1), dim=1).transpose(0, 1),
            "threshold": join("log_threshold", layer, dim=0).double().exp(),
        }

    where = "the files do not say what is the input: TransformerLens' ln2.hook_normalized"
    return shared.make_checkpoint(fields, overrides, where, read_layer, read_statistics(shards[0], d_model))


def read_statistics(path: Path, d_model: int) -> dict[str, Tensor] | None:
    """The scaling factors as means and standard deviations, (L, D) float64 each; None where all factors are 1."""
    factors = [shared.read_tensor(path, name).double() for name in SCALING_FACTORS]
    for name, factor in zip(SCALING_FACTORS, factors, strict=True):
        if not (factor.isfinite() & (factor > 0)).all():
            raise ValueError(f"{name} in {path} holds values that are not positive numbers; export the CLT again")
    if all((factor == 1).all() for factor in factors):
        return None
    std_in, std_out = ((1 / factor)[:, None].expand(-1, d_model) for factor in factors)
    return {"mean_in": std_in * 0, "std_in": std_in, "mean_out": std_out * 0, "std_out": std_out}
