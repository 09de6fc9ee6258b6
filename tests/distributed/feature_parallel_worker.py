"""
What each process of tests/distributed/test_feature_parallel.py runs: a CLT whose features are spread over all
processes, compared with the same CLT in one piece; then whole training runs. What was found is left in a folder.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.harvest.normalization import set_firing_rate
from hf_clt.sharding import FeatureShard, gather_parts, gather_tokens
from hf_clt.training import heldout
from hf_clt.training.setup import load_initial_clt, make_layout
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


def sliced(clt: CrossLayerTranscoder, shard: FeatureShard) -> CrossLayerTranscoder:
    """The slice of `shard` of a whole CLT, with its statistics."""
    part = CrossLayerTranscoder(clt.config, shard).to(clt.dtype)
    if clt.mean_in is not None:
        part.set_normalization(clt.mean_in, clt.std_in, clt.mean_out, clt.std_out)
    part.load_state_dict(rows_of(clt, clt.state_dict(), shard))
    return part.train(clt.training)


def rows_of(clt: CrossLayerTranscoder, tensors: dict, shard: FeatureShard) -> dict:
    rows, names = shard.rows(clt.config.num_features), clt.per_feature()
    return {name: tensor[rows] if name in names else tensor for name, tensor in tensors.items()}


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return (found - expected).abs().max().item() if expected.numel() else 0.0


def dead_patterns(shard: FeatureShard) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    random = torch.rand(3, 16, generator=generator) < 0.5
    one_side = torch.zeros(3, 16, dtype=torch.bool)
    one_side[1, :5] = True
    return {"none": None, "nothing": torch.zeros(3, 16, dtype=torch.bool), "random": random, "one side": one_side}


def compare(fields: dict, shard: FeatureShard) -> dict[str, float]:
    """Largest differences between a CLT in one piece and in slices, in float64, over several steps in train mode."""
    whole = random_clt(seed=1, **fields)
    whole.set_normalization(**random_statistics(whole, same_scale=True))
    part = sliced(whole.train(), shard)
    rows = shard.rows(16)
    found = {}

    def note(name, value):
        found[name] = max(found.get(name, 0.0), value)

    for step, dead in enumerate(dead_patterns(shard).values()):
        inputs, labels = random_batch(whole, seed=step)
        expected = whole(inputs, labels=labels, sparsity_scale=0.7, dead=dead)
        output = part(inputs, labels=labels, sparsity_scale=0.7, dead=None if dead is None else dead[:, rows])
        for name in LOSSES:
            note(name, abs(getattr(output, name).item() - getattr(expected, name).item()))
            note(f"size of {name}", getattr(expected, name).item())
        note("reconstruction", gap(output.reconstruction, expected.reconstruction))
        features = expected.features.to_dense()[..., rows]
        note("features", gap(output.features.to_dense(), features))
        note("selection", float(((output.features.to_dense() != 0) != (features != 0)).sum()))
        for term in LOSSES:
            gradients = []
            for clt, result in ((whole, expected), (part, output)):
                clt.zero_grad(set_to_none=False)
                getattr(result, term).backward(retain_graph=True)
                zero = {name: torch.zeros_like(p) for name, p in clt.named_parameters()}
                gradients.append(zero | {n: p.grad.clone() for n, p in clt.named_parameters() if p.grad is not None})
            for name, grad in rows_of(whole, gradients[0], shard).items():
                note("gradients", gap(gradients[1][name], grad))
        for name, buffer in whole.named_buffers():
            note("buffers", gap(dict(part.named_buffers())[name], buffer))
    whole.eval(), part.eval()
    with torch.no_grad():
        inputs, labels = random_batch(whole, seed=9)
        note("evaluation", gap(part(inputs).reconstruction, whole(inputs).reconstruction))
        acts = whole.encode(inputs)
        note("encode", gap(part.encode(inputs), acts[..., rows]))
        note("decode", gap(part.decode(acts[..., rows], inputs), whole.decode(acts, inputs)))
    return found


def initial_weights(fields: dict, shard: FeatureShard) -> float:
    config = CLTConfig(**{"num_layers": 3, "d_model": 5, "num_features": 16, "k": 3, **fields})
    torch.manual_seed(3)
    whole, after = CrossLayerTranscoder(config), torch.rand(2)
    torch.manual_seed(3)
    part = CrossLayerTranscoder(config, shard)
    expected = rows_of(whole, whole.state_dict(), shard)
    same = all(torch.equal(part.state_dict()[name], tensor) for name, tensor in expected.items())
    return same and expected.keys() == part.state_dict().keys() and torch.equal(after, torch.rand(2))


def selected_among_ties(activation_fn: str, k_scope: str, shard: FeatureShard) -> int:
    """How many features are selected in all where all pre-activations are 1, of 3 layers, 12 tokens, k = 3."""
    clt = CrossLayerTranscoder(
        CLTConfig(num_layers=3, d_model=5, num_features=16, activation_fn=activation_fn, k=3, k_scope=k_scope), shard
    )
    for encoder in clt.encoders:
        torch.nn.init.ones_(encoder.bias)
    features = clt.train()(torch.zeros(12, 3, 5)).features
    own = torch.tensor([sum(int((layer.values > 0).sum()) for layer in features.layers)])
    return int(sum(gather_parts(shard, own)))


def firing_rate(shard: FeatureShard) -> float:
    whole = random_clt(seed=1)
    part = sliced(whole, shard)
    inputs, _ = random_batch(whole, 40)
    for clt in (whole, part):
        set_firing_rate(clt, inputs, 0.1)
    found, expected = part.state_dict(), rows_of(whole, whole.state_dict(), shard)
    return max(gap(found[name], tensor) for name, tensor in expected.items())


def releases(folder: Path, shard: FeatureShard) -> dict[str, bool]:
    """Whether a CLT in slices writes the files of the CLT in one piece, and its slices are read back from them."""
    same = {}
    for name, fields in CASES.items():
        for dtype in (torch.float32, torch.bfloat16) if name == "jumprelu" else (torch.float32,):
            whole = random_clt(seed=2, double=False, **fields).to(dtype)
            if hasattr(whole, "thresholds"):
                whole.thresholds.float()
            if dtype == torch.float32:
                whole.set_normalization(**random_statistics(whole))
            part = sliced_like(whole, shard)
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
            for key, tensor in rows_of(expected, expected.state_dict(), shard).items():
                equal = torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype
                same[f"{name}, {dtype}: loaded {key}"] = equal
            same[f"{name}, {dtype}: mode"] = not loaded.training and loaded.dtype == expected.dtype
    return same


def sliced_like(whole: CrossLayerTranscoder, shard: FeatureShard) -> CrossLayerTranscoder:
    """[`sliced`] with the thresholds in float32 beside weights in another dtype."""
    part = sliced(whole, shard)
    if hasattr(part, "thresholds"):
        part.thresholds.float()
        names = [name for name in whole.state_dict() if name.startswith("thresholds")]
        expected = rows_of(whole, whole.state_dict(), shard)
        part.load_state_dict({name: expected[name] for name in names}, strict=False)
    return part


def uneven_tokens(shard: FeatureShard) -> list:
    rows = torch.arange(3.0)[: 3 - 2 * shard.rank, None].bfloat16() + 10 * shard.rank
    gathered = gather_tokens(shard, {"inputs": rows, "labels": rows.float() + 1})
    nothing = gather_tokens(shard, {"inputs": rows[:0]})
    return [gathered["inputs"].flatten().tolist(), gathered["labels"].flatten().tolist(), len(nothing["inputs"])]


def check_model(folder: Path) -> None:
    shard = make_layout(Accelerator(cpu=True), dist.get_world_size()).shard
    report = {
        "compare": {name: compare(fields, shard) for name, fields in CASES.items()},
        "initial_weights": {name: initial_weights(fields, shard) for name, fields in CASES.items()},
        "ties": {
            f"{name}, {scope}": selected_among_ties(name, scope, shard)
            for name in ("topk", "batchtopk")
            for scope in ("layer", "token")
        },
        "firing_rate": firing_rate(shard),
        "releases": releases(folder / "releases", shard),
        "uneven": uneven_tokens(shard),
    }
    (folder / f"model-{shard.rank}.json").write_text(json.dumps(report))


def train(folder: Path, name: str, arguments: dict, config: dict) -> None:
    """One run; leaves the batches that it trained on, and what each process held at the end."""
    args = CLTTrainingArguments(**arguments)
    if args.init_from is None:
        trainer = CLTTrainer(args, CLTConfig(**config))
    else:
        trainer = CLTTrainer(args, model=load_initial_clt(args, {}))
    forward, batches = trainer.model.forward, {}

    def recording(inputs, labels=None, **kwargs):
        if trainer.model.training:
            batches[f"inputs.{len(batches) // 2}"], batches[f"labels.{len(batches) // 2}"] = inputs, labels
        return forward(inputs, labels=labels, **kwargs)

    trainer.model.forward = recording
    in_lockstep, heldout_batches = heldout.read_in_lockstep, {}

    def recording_heldout(trainer, rows):
        heldout_batches.clear()  # of the last evaluation
        for number, batch in enumerate(in_lockstep(trainer, rows)):
            heldout_batches.update({f"{n}.{number}": tensor for n, tensor in batch.items()})
            yield batch

    heldout.read_in_lockstep = recording_heldout
    made = {}
    prepare = trainer.accelerator.prepare_optimizer
    trainer.accelerator.prepare_optimizer = lambda *args, **kwargs: made.setdefault("it", prepare(*args, **kwargs))
    clt = trainer.train()
    rank = trainer.accelerator.process_index
    tensors = {n: value.contiguous() for n, value in clt.state_dict().items()}
    tensors["steps_since_fired"] = trainer.steps_since_fired
    save_file(tensors, folder / f"{name}-{rank}.safetensors")
    for kind, recorded in (("batches", batches), ("heldout", heldout_batches)):
        copies = {n: tensor.contiguous().clone() for n, tensor in recorded.items()}
        save_file(copies, folder / f"{name}-{kind}-{rank}.safetensors")
    state = made["it"].optimizer.state.values()
    held = {
        "parameters": sum(p.numel() for p in clt.parameters()),
        "optimizer": sum(value.numel() for entries in state for value in entries.values()),
        "metrics": trainer.evaluate(),
    }
    (folder / f"{name}-{rank}.json").write_text(json.dumps(held))


def main(folder: str, runs: str) -> None:
    folder = Path(folder)
    try:
        if dist.is_initialized() is False:
            Accelerator(cpu=True)
        if dist.get_world_size() == 2:
            check_model(folder)
        for name, (arguments, config) in json.loads(runs).items():
            train(folder, name, arguments, config)
    except BaseException:
        traceback.print_exc()
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
