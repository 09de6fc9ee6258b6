"""
A CLT whose features are spread over two processes, compared with the same CLT in one piece: losses, gradients,
selection, weights and files. worker.py calls [`check_model`] in each process, test_processes.py reads what it found.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.harvest.normalization import set_firing_rate
from hf_clt.sharding import FeatureShard, gather_parts, gather_tokens
from hf_clt.training.setup import make_layout
from tests.reference import random_batch, random_clt, random_statistics


LOSSES = ("loss", "reconstruction_loss", "sparsity_loss", "preactivation_loss", "aux_loss")
# Fields of the CLT, beside those of tests.reference.random_clt: F = 16, so that 8 features are on each of 2 processes.
CASES = {
    "relu": {
        "activation_fn": "relu",
        "sparsity_lambda": 0.3,
        "preactivation_coef": 0.5,
        "decoder_reach": 2,
        "skip_connection": True,
    },
    "jumprelu": {"sparsity_lambda": 0.3, "preactivation_coef": 0.5, "jumprelu_bandwidth": 1.0},
    "jumprelu, per_source": {"sparsity_lambda": 0.0, "preactivation_coef": 0.5, "decoder_tying": "per_source"},
    "jumprelu, per_target": {
        "sparsity_lambda": 0.3,
        "preactivation_coef": 0.5,
        "decoder_tying": "per_target",
        "skip_connection": True,
    },
    "topk": {"activation_fn": "topk", "aux_coef": 0.5, "aux_k": 3},
    "topk, k above half": {"activation_fn": "topk", "k": 11, "aux_coef": 0.5, "aux_k": 16},
    "topk, token": {"activation_fn": "topk", "k_scope": "token", "decoder_tying": "per_target", "aux_coef": 0.5},
    "batchtopk": {"activation_fn": "batchtopk", "aux_coef": 0.5, "aux_k": 3, "skip_connection": True},
    "batchtopk, k above half": {"activation_fn": "batchtopk", "k": 11, "sparsity_lambda": 0.1, "aux_coef": 0.5},
    "batchtopk, token": {"activation_fn": "batchtopk", "k_scope": "token", "decoder_tying": "per_source"},
}


def slice_clt(clt: CrossLayerTranscoder, shard: FeatureShard) -> CrossLayerTranscoder:
    """The slice of `shard` of a whole CLT, with its statistics and dtypes."""
    part = CrossLayerTranscoder(clt.config, shard).to(clt.dtype)
    if hasattr(clt, "thresholds"):
        part.thresholds.to(clt.state_dict()["thresholds.0.value"].dtype)
    if clt.mean_in is not None:
        part.set_normalization(clt.mean_in, clt.std_in, clt.mean_out, clt.std_out)
    part.load_state_dict(slice_tensors(clt, clt.state_dict(), shard))
    return part.train(clt.training)


def slice_tensors(clt: CrossLayerTranscoder, tensors: dict, shard: FeatureShard) -> dict:
    """The rows that the shard holds of each tensor with a row per feature; the others as they are."""
    rows, names = shard.rows(clt.config.num_features), clt.per_feature()
    return {name: tensor[rows] if name in names else tensor for name, tensor in tensors.items()}


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return (found - expected).abs().max().item() if expected.numel() else 0.0


def dead_masks() -> list[torch.Tensor | None]:
    """Dead features (L, F), one mask per step: none given, nothing dead, half of all, some of one process only."""
    generator = torch.Generator().manual_seed(5)
    random = torch.rand(3, 16, generator=generator) < 0.5
    one_side = torch.zeros(3, 16, dtype=torch.bool)
    one_side[1, :5] = True
    return [None, torch.zeros(3, 16, dtype=torch.bool), random, one_side]


def compare(fields: dict, shard: FeatureShard) -> dict[str, float]:
    """Largest differences between a CLT in one piece and in slices, in float64, over several steps in train mode."""
    whole = random_clt(seed=1, **fields)
    whole.set_normalization(**random_statistics(whole, same_scale=True))
    part = slice_clt(whole.train(), shard)
    rows = shard.rows(16)
    found = {}

    def note(name, value):
        found[name] = max(found.get(name, 0.0), value)

    for step, dead in enumerate(dead_masks()):
        inputs, labels = random_batch(whole, seed=step)
        expected = whole(inputs, labels=labels, sparsity_scale=0.7, dead=dead)
        output = part(inputs, labels=labels, sparsity_scale=0.7, dead=None if dead is None else dead[:, rows])
        for name in LOSSES:
            note(name, abs(getattr(output, name).item() - getattr(expected, name).item()))
            note(f"size of {name}", getattr(expected, name).item())
        note("reconstruction", largest_difference(output.reconstruction, expected.reconstruction))
        features = expected.features.to_dense()[..., rows]
        note("features", largest_difference(output.features.to_dense(), features))
        note("selection", float(((output.features.to_dense() != 0) != (features != 0)).sum()))
        for term in LOSSES:
            gradients = []
            for clt, result in ((whole, expected), (part, output)):
                clt.zero_grad(set_to_none=False)
                getattr(result, term).backward(retain_graph=True)
                zero = {name: torch.zeros_like(p) for name, p in clt.named_parameters()}
                gradients.append(zero | {n: p.grad.clone() for n, p in clt.named_parameters() if p.grad is not None})
            for name, grad in slice_tensors(whole, gradients[0], shard).items():
                note("gradients", largest_difference(gradients[1][name], grad))
        for name, buffer in whole.named_buffers():
            note("buffers", largest_difference(dict(part.named_buffers())[name], buffer))
    whole.eval(), part.eval()
    with torch.no_grad():
        inputs, labels = random_batch(whole, seed=9)
        note("evaluation", largest_difference(part(inputs).reconstruction, whole(inputs).reconstruction))
        acts = whole.encode(inputs)
        note("encode", largest_difference(part.encode(inputs), acts[..., rows]))
        note("decode", largest_difference(part.decode(acts[..., rows], inputs), whole.decode(acts, inputs)))
    return found


def has_same_initial_weights(fields: dict, shard: FeatureShard) -> bool:
    """Whether a slice starts with the rows of the whole CLT, and leaves the random generator where that does."""
    config = CLTConfig(**{"num_layers": 3, "d_model": 5, "num_features": 16, "k": 3, **fields})
    torch.manual_seed(3)
    whole, after = CrossLayerTranscoder(config), torch.rand(2)
    torch.manual_seed(3)
    part = CrossLayerTranscoder(config, shard)
    expected = slice_tensors(whole, whole.state_dict(), shard)
    same = all(torch.equal(part.state_dict()[name], tensor) for name, tensor in expected.items())
    return same and expected.keys() == part.state_dict().keys() and torch.equal(after, torch.rand(2))


def count_selected_among_ties(activation_fn: str, k_scope: str, shard: FeatureShard) -> int:
    """How many features are selected where all pre-activations are 1, with 3 layers, 12 tokens and k = 3."""
    clt = CrossLayerTranscoder(
        CLTConfig(num_layers=3, d_model=5, num_features=16, activation_fn=activation_fn, k=3, k_scope=k_scope), shard
    )
    for encoder in clt.encoders:
        torch.nn.init.ones_(encoder.bias)
    features = clt.train()(torch.zeros(12, 3, 5)).features
    own = torch.tensor([sum(int((layer.values > 0).sum()) for layer in features.layers)])
    return int(sum(gather_parts(shard, own)))


def compare_firing_rate(shard: FeatureShard) -> float:
    """The largest difference after the biases were set from data."""
    whole = random_clt(seed=1)
    part = slice_clt(whole, shard)
    inputs, _ = random_batch(whole, 40)
    for clt in (whole, part):
        set_firing_rate(clt, inputs, 0.1)
    found, expected = part.state_dict(), slice_tensors(whole, whole.state_dict(), shard)
    return max(largest_difference(found[name], tensor) for name, tensor in expected.items())


def compare_releases(folder: Path, shard: FeatureShard) -> dict[str, bool]:
    """Whether a CLT in slices writes the files of the CLT in one piece, and its slices are read back from them."""
    same = {}
    for name, fields in CASES.items():
        for dtype in (torch.float32, torch.bfloat16) if name == "jumprelu" else (torch.float32,):
            whole = random_clt(seed=2, double=False, **fields).to(dtype)
            if hasattr(whole, "thresholds"):
                whole.thresholds.float()  # as a released CLT has them
            if dtype == torch.float32:
                whole.set_normalization(**random_statistics(whole))
            part = slice_clt(whole, shard)
            own = folder / f"{name}-{dtype}"
            part.save_pretrained(own / "part")
            if shard.rank == 0:
                whole.save_pretrained(own / "whole")
            dist.barrier()
            for path in (own / "whole").iterdir():
                same[f"{name}, {dtype}: {path.name}"] = path.read_bytes() == (own / "part" / path.name).read_bytes()
            loaded = CrossLayerTranscoder.from_pretrained(own / "whole", shard=shard)
            expected = CrossLayerTranscoder.from_pretrained(own / "whole")
            found = loaded.state_dict()
            for key, tensor in slice_tensors(expected, expected.state_dict(), shard).items():
                equal = torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype
                same[f"{name}, {dtype}: loaded {key}"] = equal
            same[f"{name}, {dtype}: mode"] = not loaded.training and loaded.dtype == expected.dtype
    return same


def gather_uneven_tokens(shard: FeatureShard) -> list:
    """What is gathered from one process with three tokens and one with one."""
    rows = torch.arange(3.0)[: 3 - 2 * shard.rank, None].bfloat16() + 10 * shard.rank
    gathered = gather_tokens(shard, {"inputs": rows, "labels": rows.float() + 1})
    nothing = gather_tokens(shard, {"inputs": rows[:0]})
    return [gathered["inputs"].flatten().tolist(), gathered["labels"].flatten().tolist(), len(nothing["inputs"])]


def check_model(folder: Path) -> None:
    shard = make_layout(Accelerator(cpu=True), dist.get_world_size()).shard
    report = {
        "compare": {name: compare(fields, shard) for name, fields in CASES.items()},
        "initial_weights": {name: has_same_initial_weights(fields, shard) for name, fields in CASES.items()},
        "ties": {
            f"{name}, {scope}": count_selected_among_ties(name, scope, shard)
            for name in ("topk", "batchtopk")
            for scope in ("layer", "token")
        },
        "firing_rate": compare_firing_rate(shard),
        "releases": compare_releases(folder / "releases", shard),
        "uneven": gather_uneven_tokens(shard),
    }
    (folder / f"model-{shard.rank}.json").write_text(json.dumps(report))
