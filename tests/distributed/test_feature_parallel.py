"""
A CLT whose features are spread over two processes against the same CLT in one piece: equations, selection, weights,
files, and whole training runs. One launch for all of it; what runs in it is in feature_parallel_worker.py.
"""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file

from hf_clt import CLTConfig, CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.evaluation.evaluate import measure
from hf_clt.evaluation.metrics import MetricSums
from hf_clt.sharding import (
    FeatureShard,
    any_over,
    collect_rows,
    gather_candidates,
    gather_tokens,
    min_over,
    rows_of,
    sum_over,
)
from hf_clt.training.checkpoints import feature_axis, load_shared, shared_file
from hf_clt.training.setup import check_shard, load_initial_clt, make_layout
from tests.distributed.feature_parallel_worker import CASES
from tests.distributed.launch import launch


WORKER = Path(__file__).with_name("feature_parallel_worker.py")
SHAPE = {"num_layers": 2, "d_model": 64, "num_features": 48, "k": 6}
# What each run has beside `ARGUMENTS`: arguments, and fields of the CLT.
RUNS = {
    "jumprelu": ({"gradient_accumulation_steps": 2}, {"jumprelu_threshold": 1.5, "sparsity_lambda": 0.1}),
    "topk": ({"optimizer": "adam_compact", "max_grad_norm": 0}, {"activation_fn": "topk", "skip_connection": True}),
    "batchtopk": ({"initial_k": 12, "k_anneal_steps": 4}, {"activation_fn": "batchtopk", "k_scope": "token"}),
}
ARGUMENTS = {
    "device": "cpu",
    "context_size": 32,
    "store_batch_size_prompts": 2,
    "n_batches_in_buffer": 20,  # all of the text
    "batch_size": 64,
    "eval_tokens": 300,
    "learning_rate": 1e-3,
    "training_steps": 12,  # the text ends before, with fewer tokens in the last batch of one process than of the other
    "log_interval": 3,
    "eval_interval": 6,
    "checkpoint_interval": 5,
    "dead_feature_window": 3,
    "normalization_method": "mean_std",
    "initial_feature_rate": 0.0,
    "disable_progress_bar": True,
}
FROM_DATA = {"normalization_method": "estimated_mean_std", "normalization_file": None, "initial_feature_rate": None}


@pytest.fixture(scope="module")
def arguments(tiny_gpt2, small_text_file, tmp_path_factory):
    """The arguments of a run named `name`, in the folder of all runs."""
    folder = tmp_path_factory.mktemp("feature-parallel")
    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.rand(2, 64, generator=generator) for name in ("mean_in", "std_in", "mean_out", "std_out")}
    save_file({n: draw + 0.5 * n.startswith("std") for n, draw in draws.items()}, folder / "statistics.safetensors")
    given = {
        **ARGUMENTS,
        "model": tiny_gpt2,
        "dataset": small_text_file,
        "normalization_file": str(folder / "statistics.safetensors"),
    }
    return folder, lambda name, **more: {**given, "output_dir": str(folder / name), **more}


@pytest.fixture(scope="module")
def launched(arguments):
    folder, make = arguments
    sharded = {"feature_parallel_size": 2}
    runs = {name: (make(name, **sharded, **given), {**SHAPE, **config}) for name, (given, config) in RUNS.items()}
    runs["from data"] = (make("from data", **sharded, **FROM_DATA), SHAPE)
    for name, size in (("resumed", 2), ("resumed whole", 1)):
        given, config = RUNS["jumprelu"]
        checkpoint = str(folder / "jumprelu" / "checkpoint-5")
        more = {"feature_parallel_size": size, "resume_from_checkpoint": checkpoint}
        runs[name] = (make(name, **given, **more), {**SHAPE, **config})
    initial = {"training_steps": 2, "init_from": str(folder / "jumprelu")}
    runs["went on"] = (make("went on", **sharded, **initial), {})
    launch(2, WORKER, str(folder), json.dumps(runs))
    return folder


@pytest.fixture(scope="module")
def report(launched):
    return [json.loads((launched / f"model-{rank}.json").read_text()) for rank in range(2)]


def train_in_one(arguments: dict, config: dict, batches: dict) -> CLTTrainer:
    """The same run in one process, on the recorded token batches."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    args = CLTTrainingArguments(**arguments)
    if args.init_from is None:
        trainer = CLTTrainer(args, CLTConfig(**{**SHAPE, **config}))
    else:
        trainer = CLTTrainer(args, model=load_initial_clt(args, {}))
    trainer.buffer.endless = lambda: iter(
        {"inputs": batches[f"inputs.{i}"], "labels": batches[f"labels.{i}"]} for i in range(len(batches) // 2)
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module", params=RUNS)
def both(request, launched, arguments):
    """A run whose features were spread over two processes, and the same in one."""
    given, config = RUNS[request.param]
    batches = load_file(launched / f"{request.param}-batches-0.safetensors")
    trainer = train_in_one(arguments[1](f"{request.param} in one", **given), config, batches)
    tensors = [load_file(launched / f"{request.param}-{rank}.safetensors") for rank in range(2)]
    held = [json.loads((launched / f"{request.param}-{rank}.json").read_text()) for rank in range(2)]
    return request.param, launched, trainer, tensors, held


def joined(clt: CrossLayerTranscoder, parts: list[dict]) -> dict:
    """The tensors of the whole CLT from those of the processes."""
    names = clt.per_feature()
    return {
        name: torch.cat([part[name] for part in parts], dim=axis)
        if (axis := feature_axis(name, tensor.dim(), names)) is not None
        else tensor
        for name, tensor in parts[0].items()
    }


def rows(folder: Path, split: str = "train") -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["split"] == split]


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_whole_clt_computes(report, case):
    """Losses, reconstruction, features, all gradients of each term, running thresholds; in float64."""
    for rank in report:
        found = rank["compare"][case]
        terms = ["reconstruction_loss", "aux_loss" if "topk" in case else "preactivation_loss"]
        if CASES[case].get("sparsity_lambda"):
            terms.append("sparsity_loss")
        for term in terms:
            assert found[f"size of {term}"] > 0.1
        assert found["selection"] == 0
        for name, value in found.items():
            assert value < 1e-9 or name.startswith("size of"), (name, value)


def test_initial_weights_do_not_depend_on_the_layout(report):
    assert all(all(rank["initial_weights"].values()) for rank in report)


def test_exactly_k_are_selected_among_ties(report):
    for rank in report:
        assert rank["ties"] == dict.fromkeys(rank["ties"], 3 * 12 * 3) and len(rank["ties"]) == 4


def test_biases_from_data_do_not_depend_on_the_layout(report):
    assert all(rank["firing_rate"] < 1e-9 for rank in report)


def test_released_files_are_those_of_the_whole_clt_and_read_in_slices(report):
    for rank in report:
        assert len(rank["releases"]) > 250
        assert [name for name, same in rank["releases"].items() if not same] == []


def test_batches_of_unequal_length_are_put_together(report):
    for rank in report:
        assert rank["uneven"] == [[0, 1, 2, 10], [1, 2, 3, 11], 0]


# -- training ---------------------------------------------------------------------------------------------------------


def test_same_trajectory_as_in_one_process(both):
    name, folder, trainer, tensors, _ = both
    expected = {**trainer.model.state_dict(), "steps_since_fired": trainer.steps_since_fired}
    found = joined(trainer.model, tensors)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(
            found[key], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    sizes = [len(t) for n, t in load_file(folder / f"{name}-batches-0.safetensors").items() if n.startswith("inputs")]
    assert max(sizes) == 128 and min(sizes) < 128  # the end of the text was among them


def test_metrics_have_the_names_and_values_of_one_process(both):
    name, folder, trainer, _, _ = both
    found, expected = rows(folder / name), rows(trainer.output_dir)
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"split", "tokens_per_second", "epoch"}:  # one process was fed, and is in no epoch
            if one[key] is None:
                assert other[key] is None
            else:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    assert any(row["dead_fraction"] for row in found)


def test_evaluated_as_in_one_process(both):
    """On the same held-out tokens; the processes cut them into blocks of their own, which one process would not."""
    name, folder, trainer, _, held = both
    batches = load_file(folder / f"{name}-heldout-0.safetensors")
    pairs = [(batches[f"inputs.{i}"], batches[f"labels.{i}"]) for i in range(len(batches) // 2)]
    expected = measure(trainer.model, pairs).compute()
    assert held[0]["metrics"] == held[1]["metrics"]
    assert held[0]["metrics"].keys() == expected.keys()
    assert held[0]["metrics"]["num_tokens"] == expected["num_tokens"] > 200
    for key in expected.keys() - {"feature_density"}:
        assert held[0]["metrics"][key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    assert sum(held[0]["metrics"]["feature_density"]["counts"]) == 2 * 48
    assert rows(folder / name, "heldout")[0].keys() == rows(trainer.output_dir, "heldout")[0].keys()


def test_each_process_holds_half(both):
    """Of weights and optimizer state; output biases, skips and step counts, which each process has, aside."""
    _, _, trainer, _, held = both
    names = trainer.model.per_feature()
    every = sum(p.numel() for n, p in trainer.model.named_parameters() if n not in names)
    whole = trainer.model.num_parameters()
    for process in held:
        assert process["parameters"] == (whole - every) // 2 + every
        assert process["optimizer"] <= 2 * process["parameters"] + 2 * len(list(trainer.model.parameters()))


def test_what_is_released_is_what_was_trained(both):
    name, folder, trainer, tensors, _ = both
    released = CrossLayerTranscoder.from_pretrained(folder / name)
    expected = trainer.model
    expected.load_state_dict({n: t for n, t in joined(expected, tensors).items() if n != "steps_since_fired"})
    expected.fold_normalization()
    for key, tensor in released.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[key], atol=1e-6, rtol=1e-6)
    assert (folder / name / "README.md").is_file()


def test_a_checkpoint_loads_in_any_layout(both):
    name, folder, trainer, _, _ = both
    names, num_features = trainer.model.per_feature(), SHAPE["num_features"]
    sharded, whole = folder / name / "checkpoint-5", trainer.output_dir / "checkpoint-5"
    assert {path.name for path in sharded.glob("*-of-*")} == {
        f"{part}-0000{rank}-of-00002.safetensors" for part in ("model", "optimizer", "trainer") for rank in (1, 2)
    }
    assert not list(whole.glob("*-of-*"))
    for folder, size in ((sharded, 2), (whole, 1)):
        complete = load_shared(folder, None, names)
        for part in ("model", "optimizer", "trainer"):
            files = [load_file(folder / shared_file(part, rank, size)) for rank in range(size)]
            written = joined(trainer.model, files)
            assert complete[part].keys() == written.keys()
            assert all(torch.equal(complete[part][key], tensor) for key, tensor in written.items())
            for slices in (1, 2, 3, 4):
                for rank in range(slices):
                    shard = FeatureShard(rank, slices)
                    read = load_shared(folder, shard, names)[part]
                    for key, tensor in written.items():
                        axis = feature_axis(key, tensor.dim(), names)
                        held = num_features // slices
                        expected = tensor if axis is None else tensor.narrow(axis, rank * held, held)
                        assert torch.equal(read[key], expected), (part, key, rank, slices)


def test_resumed_bit_for_bit(launched):
    for rank in range(2):
        found, expected = (load_file(launched / f"{name}-{rank}.safetensors") for name in ("resumed", "jumprelu"))
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_resumed_in_another_layout(launched):
    """As many processes, each now with all features and its own tokens, as DistributedDataParallel has it."""
    clt = CrossLayerTranscoder(CLTConfig(**SHAPE))
    expected = joined(clt, [load_file(launched / f"jumprelu-{rank}.safetensors") for rank in range(2)])
    for rank in range(2):
        found = load_file(launched / f"resumed whole-{rank}.safetensors")
        for key, tensor in expected.items():
            # At the end of the text the processes have unequal batches, which DDP gives the same weight: an update or
            # two differ by a part of the learning rate, 1e-3.
            torch.testing.assert_close(found[key], tensor, atol=2e-3, rtol=2e-3)


def test_goes_on_with_a_released_clt(launched, arguments):
    """Each process with its slice of it, and with statistics that leave its function as it is."""
    batches = load_file(launched / "went on-batches-0.safetensors")
    initial = {"training_steps": 2, "init_from": str(launched / "jumprelu")}
    trainer = train_in_one(arguments[1]("went on in one", **initial), {}, batches)
    found = joined(trainer.model, [load_file(launched / f"went on-{rank}.safetensors") for rank in range(2)])
    for key, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)


def test_initial_values_from_data_are_those_of_both(launched):
    one, two = (load_file(launched / f"from data-{rank}.safetensors") for rank in range(2))
    for key in ("mean_in", "std_out", "decoders.0.bias", "decoders.1.bias"):
        assert torch.equal(one[key], two[key])
    assert rows(launched / "from data")[0]["tokens"] == 2 * 64
    assert 0 < rows(launched / "from data")[0]["l0"] < 0.1 * 2 * 48


def test_two_groups_of_two(arguments, tmp_path):
    """Features over 2 processes, twice: as one process on the tokens of both groups."""
    _, make = arguments
    given, config = RUNS["jumprelu"]
    # No end of the text: groups with unequal batches would have the same weight.
    given = {**given, "training_steps": 3, "log_interval": 1, "checkpoint_interval": 0, "eval_interval": 0}
    given |= {"dead_feature_window": 1, "batch_size": 16}
    run = make("two groups", feature_parallel_size=2, **given) | {"output_dir": str(tmp_path / "run")}
    launch(4, WORKER, str(tmp_path), json.dumps({"run": (run, {**SHAPE, **config})}))
    first, second = (load_file(tmp_path / f"run-batches-{rank}.safetensors") for rank in (0, 2))
    batches = {name: torch.cat([rows, second[name]]) for name, rows in first.items()}
    trainer = train_in_one(make("one", **given) | {"output_dir": str(tmp_path / "one")}, config, batches)
    tensors = [load_file(tmp_path / f"run-{rank}.safetensors") for rank in range(4)]
    assert {len(rows) for rows in batches.values()} == {4 * 16}
    for group in (tensors[:2], tensors[2:]):
        found = joined(trainer.model, group)
        for key, tensor in {**trainer.model.state_dict(), "steps_since_fired": trainer.steps_since_fired}.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)
    for one, other in zip(rows(tmp_path / "run"), rows(tmp_path / "one"), strict=True):
        for key in ("loss", "nmse", "l0", "tokens", "dead_fraction"):
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=1e-4), key


# -- what needs one process only --------------------------------------------------------------------------------------


def test_without_a_shard_nothing_is_exchanged():
    tensor = torch.rand(3, 4)
    assert sum_over(None, tensor) is tensor
    assert min_over(None, tensor) is tensor
    assert gather_candidates(None, tensor) == (tensor, slice(0, 4))
    assert gather_tokens(None, {"inputs": tensor})["inputs"] is tensor
    assert collect_rows(None, tensor) is tensor
    assert any_over(None, True, tensor.device) and not any_over(None, False, tensor.device)
    assert rows_of(None, 12) == slice(0, 12)


def test_slices_cover_the_features():
    assert [FeatureShard(rank, 3).rows(12) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(ValueError, match="num_features=10 cannot be split over feature_parallel_size=3"):
        FeatureShard(0, 3).rows(10)
    with pytest.raises(ValueError, match="num_features=10 "):
        check_shard(CLTConfig(num_layers=2, d_model=4, num_features=10, k=2), 3, None)


def test_a_whole_clt_is_not_trained_in_slices():
    clt = CrossLayerTranscoder(CLTConfig(num_layers=2, d_model=4, num_features=8, k=2))
    with pytest.raises(ValueError, match="feature_parallel_size=2, but each process has 1/1 of the model's features"):
        check_shard(clt.config, 2, clt)


def test_the_number_of_processes_is_a_multiple():
    class One:
        process_index, num_processes = 0, 1

    with pytest.raises(ValueError, match="feature_parallel_size=2 does not divide the number of processes, 1"):
        make_layout(One, 2)
    assert make_layout(One, 1).shard is None


def test_half_precision_that_needs_scaled_gradients_is_refused():
    with pytest.raises(ValueError, match="mixed_precision='fp16' does not go with feature_parallel_size=2"):
        CLTTrainingArguments(mixed_precision="fp16", feature_parallel_size=2)


def test_what_a_slice_cannot_do_says_so(tmp_path):
    config = CLTConfig(num_layers=2, d_model=4, num_features=8, k=2)
    CrossLayerTranscoder(config).save_pretrained(tmp_path)
    clt = CrossLayerTranscoder.from_pretrained(tmp_path, shard=FeatureShard(1, 2))
    assert clt.num_held == 4
    with pytest.raises(ValueError, match="inputs require a gradient"):
        clt(torch.zeros(3, 2, 4, requires_grad=True))
    with pytest.raises(ValueError, match="push_to_hub on a CLT with a shard"):
        clt.push_to_hub("user/clt")
    with pytest.raises(ValueError, match="lazy is given with shard"):
        CrossLayerTranscoder.from_pretrained(tmp_path, shard=FeatureShard(0, 2), lazy=True)


def test_metrics_of_slices_are_put_together():
    labels, reconstruction = torch.rand(2, 10, 2, 3).unbind()
    acts = torch.rand(10, 2, 8) - 0.5
    parts = []
    for tokens in (slice(0, 6), slice(6, 10)):
        for features in (slice(0, 4), slice(4, 8)):
            sums = MetricSums(2, 3, 4)
            sums.update(labels[tokens], reconstruction[tokens], acts[tokens][..., features])
            parts.append(sums.tensors())
    found = MetricSums.from_gathered(MetricSums.with_joined_features(parts, 2)).compute()
    whole = MetricSums(2, 3, 8)
    whole.update(labels, reconstruction, acts)
    expected = whole.compute()
    assert found["num_tokens"] == 10 and found["feature_density"] == expected["feature_density"]
    for name in ("nmse", "l0", "dead_fraction", "nmse_per_layer", "l0_per_layer"):
        assert found[name] == pytest.approx(expected[name])
