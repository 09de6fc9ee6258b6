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

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ... import checkpoint_format as files
from ...configuration_clt import CLTConfig
from ...files import write_text
from . import shared
from .shared import Checkpoint


WEIGHTS, CONFIG = "clt_weights.safetensors", "clt_cfg.json"
SHARD = "rank{}_clt_weights.safetensors"
SCALING_FACTOR = "estimated_norm_scaling_factor_{}"  # in and out
BUFFERS = {"feature_count", "layer_mask", "l_idx", "k_idx"}  # counts of the training, and what follows from L


# -- reading ----------------------------------------------------------------------------------------------------------


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names holds the weights of a CLT, or a shard of them."""
    return {"W_enc", "W_dec", "log_threshold"} <= set(names)


def find_weights(folder: Path) -> list[Path]:
    """The weight file of a folder, or its shards in the order of their ranks."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not shared.file_numbers(folder, SHARD):
        raise FileNotFoundError(f"{WEIGHTS} is missing in {folder}; give the folder of the weights")
    return shared.numbered_files(folder, SHARD)


def read(path: str | Path, **overrides) -> Checkpoint:
    """
    A CLT of CLT-Forge, its scaling factors folded in.

    Args:
        path: The folder, or the weight file in it.
        overrides: Fields of [`CLTConfig`] that the files do not say; `feature_input_hook` at least.

    Raises:
        FileNotFoundError: For a missing file.
        ValueError: For a missing, unknown or wrongly shaped tensor, a scaling factor that is not positive, or another
            activation function than jumprelu.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    cfg_path = folder / CONFIG
    cfg = shared.read_json(cfg_path)
    activation_fn = cfg.get("activation_fn", "jumprelu")
    if activation_fn != "jumprelu":
        raise ValueError(f"activation_fn={activation_fn!r} in {cfg_path}: only CLT-Forge's jumprelu can be read")
    shards = [path] if path.is_file() else find_weights(folder)
    headers = [shared.read_header(shard) for shard in shards]
    shared.check_names(shards[0], headers[0], ["W_enc", "W_dec"])
    if len(headers[0]["W_enc"][0]) != 3:
        raise ValueError(f"W_enc in {shards[0]} has shape {headers[0]['W_enc'][0]}; expected (L, D, F)")
    num_layers, d_model, _ = headers[0]["W_enc"][0]
    crosses = cfg.get("cross_layer_decoders")
    if not isinstance(crosses, bool):
        raise ValueError(f"cross_layer_decoders={crosses!r} in {cfg_path} is neither true nor false; correct it")
    num_decoders = num_layers * (num_layers + 1) // 2 if crosses else num_layers
    num_features = 0
    for shard, header in zip(shards, headers, strict=True):
        shared.check_names(shard, header, ["W_enc"])
        local = header["W_enc"][0][-1]
        num_features += local
        shapes = {
            "W_enc": (num_layers, d_model, local),
            "b_enc": (num_layers, local),
            "log_threshold": (num_layers, local),
            "W_dec": (num_decoders, local, d_model),
            "b_dec": (num_decoders, d_model),
            SCALING_FACTOR.format("in"): (num_layers,),
            SCALING_FACTOR.format("out"): (num_layers,),
        }
        shared.check_tensors(shard, header, shapes, may_hold=BUFFERS)
        shared.check_threshold(shard, "log_threshold", shared.read_tensor(shard, "log_threshold").double().exp())
    for name, expected in (("n_layers", num_layers), ("d_in", d_model), ("d_latent", num_features)):
        if cfg.get(name) != expected:
            raise ValueError(
                f"{name}={cfg.get(name)!r} in {cfg_path}, but the weights in "
                f"{shared.some(shard.name for shard in shards)} say {expected}; a file is missing or belongs to "
                "another CLT"
            )
    dtype = shared.common_dtype(shards, headers, ("W_enc", "b_enc", "W_dec", "b_dec"))
    statistics = _read_statistics(shards[0], d_model)
    config = shared.make_config(
        {
            "num_layers": num_layers,
            "d_model": d_model,
            "num_features": num_features,
            "activation_fn": "jumprelu",
            "decoder_reach": None if crosses else 1,
            "base_model_name_or_path": cfg.get("model_name") or None,
            "feature_input_hook": None,
            "feature_output_hook": "hook_mlp_out",
            "dtype": dtype,
        },
        overrides,
        "the files do not say what is the input: TransformerLens' ln2.hook_normalized",
    )

    def layers():
        for layer in range(num_layers):
            # Rows of W_dec: the pairs of this source layer lie together, those of this target layer do not.
            first = _pair_row(layer, layer, num_layers) if crosses else layer
            last = first + config.num_targets(layer)
            sources = range(layer + 1) if crosses else [layer]
            rows = [_pair_row(s, layer, num_layers) if crosses else s for s in sources]
            decoder = [shared.read_slice(shard, "W_dec", slice(first, last)) for shard in shards]
            log_thresholds = [shared.read_slice(shard, "log_threshold", layer) for shard in shards]
            yield shared.make_layer(
                layer,
                dtype,
                statistics,
                W_enc=torch.cat([shared.read_slice(shard, "W_enc", layer) for shard in shards], dim=1).T,
                b_enc=torch.cat([shared.read_slice(shard, "b_enc", layer) for shard in shards]),
                b_dec=shared.sum_biases([shared.read_slice(shards[0], "b_dec", row) for row in rows]),
                W_dec=torch.cat(decoder, dim=1).transpose(0, 1),
                threshold=torch.cat(log_thresholds).double().exp(),
            )

    return config, layers()


def _read_statistics(path: Path, d_model: int) -> tuple[Tensor, ...] | None:
    """The scaling factors as means and standard deviations, (L, D) float64 each; None where all factors are 1."""
    factors = {}
    for side in ("in", "out"):
        name = SCALING_FACTOR.format(side)
        factors[side] = shared.read_tensor(path, name).double()
        if not (factors[side].isfinite() & (factors[side] > 0)).all():
            raise ValueError(f"{name} in {path} holds values that are not positive numbers; export the CLT again")
    if all((factor == 1).all() for factor in factors.values()):
        return None
    std_in, std_out = ((1 / factors[side])[:, None].expand(-1, d_model) for side in ("in", "out"))
    zero = torch.zeros_like(std_in)
    return zero, std_in, zero, std_out


def _pair_row(source: int, target: int, num_layers: int) -> int:
    """Where the pair (source, target) stands in `torch.triu_indices(L, L)`, which goes source by source."""
    return source * num_layers - source * (source - 1) // 2 + (target - source)


# -- writing ----------------------------------------------------------------------------------------------------------


def write(folder: str | Path, config: CLTConfig, layers: Iterator[dict[str, Tensor]]) -> None:
    """
    Writes a CLT of CLT-Forge with scaling factors of 1. All layers are in memory at once, since they are in one file.
    What its configuration demands about a training that is not known (seed, context size, ...) is 0.

    Raises:
        ValueError: For topk, batchtopk without a running threshold, a skip connection, or hooks other than
            `mlp.hook_in` and `hook_mlp_out`, next to which CLT-Forge reads.
    """
    shared.check_activation_fn(config, "clt-forge")
    if config.skip_connection:
        raise ValueError("skip_connection=True: clt-forge has no skip connection; keep the CLT in hf_clt's files")
    shared.check_hooks(config, "clt-forge")
    num_layers, crosses = config.num_layers, config.reach > 1 or config.num_layers == 1
    columns = {name: [] for name in ("W_enc", "b_enc", "log_threshold", "W_dec", "b_dec")}
    for source, tensors in enumerate(layers):
        decoder, bias = tensors[f"W_dec_{source}"], tensors[f"b_dec_{source}"]
        columns["W_enc"].append(tensors[f"W_enc_{source}"].T)
        columns["b_enc"].append(tensors[f"b_enc_{source}"])
        columns["log_threshold"].append(shared.jumprelu_threshold(config, tensors, source).double().log().float())
        for j in range(num_layers - source if crosses else 1):
            columns["W_dec"].append(decoder[:, j] if j < decoder.shape[1] else torch.zeros_like(decoder[:, 0]))
            columns["b_dec"].append(bias if j == 0 else torch.zeros_like(bias))
    weights = {name: torch.stack(tensors) for name, tensors in columns.items()}
    for side in ("in", "out"):
        weights[SCALING_FACTOR.format(side)] = torch.ones(num_layers)
    # Buffers that CLT-Forge misses otherwise: counts of steps without activity, and which decoders a source layer has.
    weights["feature_count"] = torch.zeros(num_layers, config.num_features, dtype=torch.int64)
    if crosses:
        sources, _ = torch.triu_indices(num_layers, num_layers)
        weights["layer_mask"] = (sources == torch.arange(num_layers)[:, None]).to(weights["W_dec"].dtype)
    folder = shared.make_folder(folder)
    files.write_tensors(folder / WEIGHTS, weights)
    cfg = {
        "device": "cpu",
        "dtype": str(config.dtype).removeprefix("torch."),
        "seed": 0,
        "model_name": config.base_model_name_or_path or "",
        "d_in": config.d_model,
        "d_latent": config.num_features,
        "n_layers": num_layers,
        "jumprelu_bandwidth": config.jumprelu_bandwidth,
        "jumprelu_init_threshold": config.jumprelu_threshold,
        "normalize_decoder": False,
        "dead_feature_window": 0,
        "cross_layer_decoders": crosses,
        "context_size": 0,
        "l0_coefficient": 0.0,
    }
    write_text(folder / CONFIG, json.dumps(cfg, indent=2) + "\n")


__all__ = ["SHARD", "WEIGHTS", "is_checkpoint", "read", "write"]
