"""
Two processes and four on a CPU. One launch of each makes many runs, see [`two`] and [`four`]; the tests compare what
the processes report with what one process does.
"""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from hf_clt import CLTConfig, CLTTrainer, CrossLayerTranscoder
from hf_clt.attribution import AttributionGraph
from hf_clt.commands.cache import main as cache_activations
from hf_clt.evaluation.evaluate import measure
from hf_clt.harvest.cache import ActivationCache, CachedTokens
from hf_clt.harvest.harvester import load_language_model
from hf_clt.harvest.tokens import open_text
from hf_clt.sharding import FeatureShard
from hf_clt.training.arguments import CLTTrainingArguments
from hf_clt.training.checkpoints import feature_axis, load_shared, shared_file
from tests.distributed.launch import launch
from tests.distributed.sharded_model import CASES
from tests.distributed.worker import __file__ as WORKER
from tests.distributed.worker import counted_tokens, make_graphs, make_trainer, run


SHAPE = {"num_layers": 2, "d_model": 64, "num_features": 48, "k": 6}
TEXT = {"context_size": 32, "store_batch_size_prompts": 2, "eval_tokens": 300}
COMMON = {"device": "cpu", "dead_feature_window": 3, "disable_progress_bar": True}

# Features spread over two processes: the arguments of all runs, and what each has beside them, with fields of the CLT.
SHARDED = {
    **COMMON,
    "n_batches_in_buffer": 20,  # all of the text
    "batch_size": 64,
    "learning_rate": 1e-3,
    "training_steps": 12,  # the text ends before, with fewer tokens in the last batch of one process than of the other
    "log_interval": 3,
    "eval_interval": 6,
    "checkpoint_interval": 5,
    "normalization_method": "mean_std",
    "initial_feature_rate": 0.0,
    "initial_weights": "random",
}
SHARDED_RUNS = {
    "jumprelu": (
        # It falls all along, so that the last updates, of unequal batches, are small.
        {"gradient_accumulation_steps": 2, "reach_growth": 0.6, "decay_steps": 12},
        {"jumprelu_threshold": 1.5, "sparsity_lambda": 0.1},
    ),
    "steered": (
        {"target_l0": 5, "gradient_accumulation_steps": 2},
        {"activation_fn": "relu", "sparsity_lambda": 0.1},
    ),
    "topk": ({"optimizer": "adam_compact", "max_grad_norm": 0}, {"activation_fn": "topk", "skip_connection": True}),
    "batchtopk": ({"initial_k": 12, "k_anneal_steps": 4}, {"activation_fn": "batchtopk", "k_scope": "token"}),
}
FROM_DATA = {
    "normalization_method": "estimated_mean_std",
    "normalization_file": None,
    "initial_feature_rate": None,
    "initial_weights": "data",
}

# Runs that are stopped, that fail, and that go on with another number of processes.
STOPPED = {
    **COMMON,
    "n_batches_in_buffer": 6,  # a third of the text
    "batch_size": 50,
    "training_steps": 40,  # a pass over the text ends before
    "log_interval": 4,
    "normalization_estimation_batches": 3,
    "stream_retries": 0,
}
BATCHTOPK = {**SHAPE, "activation_fn": "batchtopk"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are, and what the processes found."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def sharded(folder, tiny_gpt2, small_text_file):
    """The arguments of a run named `name`, of those with given statistics."""
    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.rand(2, 64, generator=generator) for name in ("mean_in", "std_in", "mean_out", "std_out")}
    file = folder / "statistics.safetensors"
    save_file({n: draw + 0.5 * n.startswith("std") for n, draw in draws.items()}, file)
    given = {**SHARDED, **TEXT, "model": tiny_gpt2, "dataset": small_text_file, "normalization_file": str(file)}
    return lambda name, **more: {**given, "output_dir": str(folder / name), **more}


@pytest.fixture(scope="module")
def stopped(folder, tiny_gpt2, small_text_file):
    """The arguments of a run named `name`, of those that are stopped or go on."""
    given = {**STOPPED, **TEXT, "model": tiny_gpt2, "dataset": small_text_file}
    return lambda name, **more: {**given, "output_dir": str(folder / name), **more}


@pytest.fixture(scope="module")
def cache(folder, tiny_gpt2, small_text_file):
    options = [word for name, value in TEXT.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    options += ["--model", tiny_gpt2, "--dataset", small_text_file, "--device", "cpu", "--disable-progress-bar"]
    PartialState._reset_state()
    assert cache_activations([str(folder / "cache"), *options]) == 0
    return folder / "cache"


@pytest.fixture(scope="module")
def on_cache(cache):
    """The arguments of a run, with the cache in place of language model and text."""
    of_the_text = {"model", "dataset", *TEXT}
    return lambda arguments: {
        "activation_cache": str(cache),
        **{n: v for n, v in arguments.items() if n not in of_the_text},
    }


@pytest.fixture(scope="module")
def one(stopped):
    """A run of one process, stopped."""
    return run(stopped("one"), BATCHTOPK, stop_at=7)


@pytest.fixture(scope="module")
def two(folder, sharded, stopped, on_cache, one):
    """Launches two processes; reports of both by the name of the run, and of the comparison of models as "model"."""
    shared = {"feature_parallel_size": 2}
    runs = {n: (sharded(n, **shared, **given), {**SHAPE, **config}) for n, (given, config) in SHARDED_RUNS.items()}
    runs["from data"] = (sharded("from data", **shared, **FROM_DATA), SHAPE)
    given, config = SHARDED_RUNS["jumprelu"]
    given = {**given, "resume_from_checkpoint": str(folder / "jumprelu" / "checkpoint-5")}
    runs["resumed"] = (sharded("resumed", **given, **shared), {**SHAPE, **config})
    runs["resumed whole"] = (sharded("resumed whole", **given), {**SHAPE, **config})
    runs["went on"] = (sharded("went on", **shared, **goes_on(folder)), {})

    to_the_end = {"training_steps": 20, "checkpoint_interval": 10, "n_batches_in_buffer": 20}
    runs["plain"] = (stopped("plain", **to_the_end), {**SHAPE, "activation_fn": "jumprelu"})
    runs["on two"] = (stopped("on two", resume_from_checkpoint=str(folder / "one" / "checkpoint-7")), BATCHTOPK)
    for name, arguments, first, second in (
        ("two", stopped("two"), {}, {"stop_at": 5}),
        ("sharded", stopped("sharded", **shared), {}, {"stop_at": 5}),
        ("cached", on_cache(stopped("cached")), {}, {"stop_at": 5}),
        ("broken", stopped("broken", gradient_accumulation_steps=2), {}, {"break_at": 2}),
        ("seldom", stopped("seldom"), {"ask_seconds": 100.0}, {"ask_seconds": 100.0, "stop_at": 5}),
        (
            "several",
            stopped("several", gradient_accumulation_steps=2, batch_size=20),
            {"ask_seconds": 100.0},
            {"ask_seconds": 100.0, "stop_at": 3},
        ),
        ("seldom broken", stopped("seldom broken"), {"ask_seconds": 9.0}, {"ask_seconds": 9.0, "break_at": 2}),
        ("waiting", stopped("waiting", stream_retries=5), {}, {"break_at": 4, "patience": 2.0}),
    ):
        runs[name] = (arguments, BATCHTOPK, first, second)
    return launch_runs(2, folder, runs) | {"model": read_reports(folder, "model", 2)}


@pytest.fixture(scope="module")
def four(folder, sharded):
    """Launches four processes that train with features over two of them, twice."""
    given, config = SHARDED_RUNS["jumprelu"]
    # No end of the text: groups with unequal batches would have the same weight.
    given = {**given, "training_steps": 3, "log_interval": 1, "checkpoint_interval": 0, "eval_interval": 0}
    given |= {"decay_steps": 3, "dead_feature_window": 1, "batch_size": 16, "target_l0": 5}
    reports = launch_runs(
        4, folder, {"two groups": (sharded("two groups", feature_parallel_size=2, **given), {**SHAPE, **config})}
    )
    return reports["two groups"], given, config


def goes_on(folder: Path) -> dict:
    """Arguments of a run that trains a released CLT further."""
    return {"training_steps": 2, "init_from": str(folder / "jumprelu")}


def launch_runs(num_processes: int, folder: Path, runs: dict) -> dict[str, list[dict]]:
    """Launches [`run`] with each of these arguments; by name, the reports of all processes."""
    launch(num_processes, Path(WORKER), str(folder), json.dumps(runs))
    reports = {name: read_reports(folder, name, num_processes) for name in runs}
    for name, ranks in reports.items():
        for rank, report in enumerate(ranks):
            report["tensors"] = load_file(folder / f"{name}-{rank}.safetensors")
    return reports


def read_reports(folder: Path, name: str, num_processes: int) -> list[dict]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(num_processes)]


def part(report: dict, prefix: str) -> dict:
    """The tensors of a report whose names begin so, without the beginning."""
    return {n.removeprefix(prefix): t for n, t in report["tensors"].items() if n.startswith(prefix)}


def join(clt: CrossLayerTranscoder, parts: list[dict]) -> dict:
    """The tensors of the whole CLT from those of the processes."""
    names = clt.per_feature()
    return {
        name: torch.cat([part[name] for part in parts], dim=axis)
        if (axis := feature_axis(name, tensor.dim(), names)) is not None
        else tensor
        for name, tensor in parts[0].items()
    }


def join_ends(clt: CrossLayerTranscoder, reports: list[dict]) -> dict:
    """What the processes of a run held at its end, as one CLT."""
    return join(clt, [part(report, "end.") for report in reports])


def train_in_one(arguments: dict, config: dict, batches: dict) -> CLTTrainer:
    """A run in one process, on recorded activations."""
    trainer = make_trainer(arguments, {**SHAPE, **config})
    trainer.buffer.endless = lambda: iter(
        {"inputs": batches[f"inputs.{i}"], "labels": batches[f"labels.{i}"]} for i in range(len(batches) // 2)
    )
    trainer.train()
    return trainer


def read_metrics(folder: Path, split: str = "train") -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["split"] == split]


# -- the model with its features over two processes -------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_whole_clt_computes(two, case):
    """Losses, reconstruction, features, all gradients of each term, running thresholds; in float64."""
    for rank in two["model"]:
        found = rank["compare"][case]
        terms = ["reconstruction_loss", "aux_loss" if "topk" in case else "preactivation_loss"]
        if CASES[case].get("sparsity_lambda"):
            terms.append("sparsity_loss")
        for term in terms:
            assert found[f"size of {term}"] > 0.1
        assert found["selection"] == 0
        for name, value in found.items():
            assert value < 1e-9 or name.startswith("size of"), (name, value)


def test_initial_weights_do_not_depend_on_the_layout(two):
    assert all(all(rank["initial_weights"].values()) for rank in two["model"])


def test_exactly_k_are_selected_among_ties(two):
    for rank in two["model"]:
        assert rank["ties"] == dict.fromkeys(rank["ties"], 3 * 12 * 3) and len(rank["ties"]) == 4


def test_biases_from_data_do_not_depend_on_the_layout(two):
    assert all(rank["firing_rate"] < 1e-9 for rank in two["model"])


def test_released_files_are_those_of_the_whole_clt_and_read_in_slices(two):
    for rank in two["model"]:
        assert len(rank["releases"]) > 250
        assert [name for name, same in rank["releases"].items() if not same] == []


def test_batches_of_unequal_length_are_put_together(two):
    for rank in two["model"]:
        assert rank["uneven"] == [[0, 1, 2, 10], [1, 2, 3, 11], 0]


# -- training with features over two processes ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SHARDED_RUNS)
def both(request, two, sharded):
    """A run whose features were spread over two processes, and the same in one."""
    name, reports = request.param, two[request.param]
    given, config = SHARDED_RUNS[name]
    trainer = train_in_one(sharded(f"{name} in one", **given), config, part(reports[0], "batches."))
    return name, trainer, reports


def test_same_trajectory_as_in_one_process(both):
    _, trainer, reports = both
    expected = {**trainer.model.state_dict(), "steps_since_fired": trainer.steps_since_fired}
    found = join_ends(trainer.model, reports)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(
            found[key], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    sizes = [len(inputs) for inputs in part(reports[0], "batches.inputs.").values()]
    assert max(sizes) == 128 and min(sizes) < 128  # the end of the text was among them


def test_metrics_have_the_names_and_values_of_one_process(both, folder):
    name, trainer, _ = both
    found, expected = read_metrics(folder / name), read_metrics(trainer.output_dir)
    assert len(found) == len(expected) == 5
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"split", "tokens_per_second", "epoch"}:  # one process was fed, and is in no epoch
            if row[key] is None:
                assert other[key] is None
            else:
                assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    assert name == "steered" or any(row["dead_fraction"] for row in found)


def test_evaluated_as_in_one_process(both, folder):
    """On the same held-out tokens; the processes cut them into blocks of their own, which one process would not."""
    name, trainer, reports = both
    inputs, labels = (part(reports[0], f"heldout.{kind}.") for kind in ("inputs", "labels"))
    expected = measure(trainer.model, [(inputs[n], labels[n]) for n in inputs]).compute()
    found, other = (report["metrics"] for report in reports)
    assert found == other
    assert found.keys() == expected.keys()
    assert found["num_tokens"] == expected["num_tokens"] > 200
    for key in expected.keys() - {"feature_density"}:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    assert sum(found["feature_density"]["counts"]) == 2 * 48
    assert read_metrics(folder / name, "heldout")[0].keys() == read_metrics(trainer.output_dir, "heldout")[0].keys()


def test_each_process_holds_half(both):
    """Of weights and optimizer state; output biases, skips and step counts, which each process has, aside."""
    _, trainer, reports = both
    names = trainer.model.per_feature()
    every = sum(p.numel() for n, p in trainer.model.named_parameters() if n not in names)
    whole = trainer.model.num_parameters()
    for report in reports:
        assert report["parameters"] == (whole - every) // 2 + every
        assert report["optimizer"] <= 2 * report["parameters"] + 2 * len(list(trainer.model.parameters()))


def test_what_is_released_is_what_was_trained(both, folder):
    name, trainer, reports = both
    released = CrossLayerTranscoder.from_pretrained(folder / name)
    expected = trainer.model
    expected.load_state_dict({n: t for n, t in join_ends(expected, reports).items() if n != "steps_since_fired"})
    expected.fold_normalization()
    for key, tensor in released.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[key], atol=1e-6, rtol=1e-6)
    assert (folder / name / "README.md").is_file()


def test_a_checkpoint_loads_in_any_layout(both, folder):
    name, trainer, _ = both
    names, num_features = trainer.model.per_feature(), SHAPE["num_features"]
    sharded, whole = folder / name / "checkpoint-5", trainer.output_dir / "checkpoint-5"
    assert {path.name for path in sharded.glob("*-of-*")} == {
        f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer", "trainer") for rank in (1, 2)
    }
    assert not list(whole.glob("*-of-*"))
    for checkpoint, size in ((sharded, 2), (whole, 1)):
        complete = load_shared(checkpoint, None, names)
        for kind in ("model", "optimizer", "trainer"):
            files = [load_file(checkpoint / shared_file(kind, rank, size)) for rank in range(size)]
            written = join(trainer.model, files)
            assert complete[kind].keys() == written.keys()
            assert all(torch.equal(complete[kind][key], tensor) for key, tensor in written.items())
            for slices in (1, 2, 3, 4):
                for rank in range(slices):
                    read = load_shared(checkpoint, FeatureShard(rank, slices), names)[kind]
                    for key, tensor in written.items():
                        axis = feature_axis(key, tensor.dim(), names)
                        held = num_features // slices
                        expected = tensor if axis is None else tensor.narrow(axis, rank * held, held)
                        assert torch.equal(read[key], expected), (kind, key, rank, slices)


def test_resumed_bit_for_bit(two):
    for resumed, whole in zip(two["resumed"], two["jumprelu"], strict=True):
        found, expected = part(resumed, "end."), part(whole, "end.")
        assert len(expected) > 5 and all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_resumed_in_another_layout(two):
    """As many processes, each now with all features and its own tokens, as DistributedDataParallel has it."""
    expected = join_ends(CrossLayerTranscoder(CLTConfig(**SHAPE)), two["jumprelu"])
    for report in two["resumed whole"]:
        found = part(report, "end.")
        for key, tensor in expected.items():
            # At the end of the text the processes have unequal batches, which DDP gives the same weight: an update or
            # two differ by a part of the learning rate, 1e-3.
            torch.testing.assert_close(found[key], tensor, atol=2e-3, rtol=2e-3)


def test_goes_on_with_a_released_clt(two, sharded, folder):
    """Each process with its slice of it, and with statistics that leave its function as it is."""
    arguments = sharded("went on in one", **goes_on(folder))
    trainer = train_in_one(arguments, {}, part(two["went on"][0], "batches."))
    found = join_ends(trainer.model, two["went on"])
    for key, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)


def test_initial_values_from_data_are_those_of_both(two, folder):
    first, second = (part(report, "end.") for report in two["from data"])
    for key in ("mean_in", "std_out", "decoders.0.bias", "decoders.1.bias"):
        assert torch.equal(first[key], second[key])
    row = read_metrics(folder / "from data")[0]
    assert row["tokens"] == 2 * 64
    assert 0 < row["l0"] < 0.1 * 2 * 48


@pytest.mark.slow
def test_two_groups_of_two(four, sharded, folder):
    """Features over 2 processes, twice: as one process on the tokens of both groups."""
    reports, given, config = four
    first, second = (part(reports[rank], "batches.") for rank in (0, 2))
    batches = {name: torch.cat([rows, second[name]]) for name, rows in first.items()}
    assert {len(rows) for rows in batches.values()} == {4 * 16}
    trainer = train_in_one(sharded("two groups in one", **given), config, batches)
    for group in (reports[:2], reports[2:]):
        found = join_ends(trainer.model, group)
        for key, tensor in {**trainer.model.state_dict(), "steps_since_fired": trainer.steps_since_fired}.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)
    rows = zip(read_metrics(folder / "two groups"), read_metrics(trainer.output_dir), strict=True)
    for row, other in rows:
        for key in ("loss", "nmse", "l0", "tokens", "dead_fraction", "sparsity_scale"):
            if key in row:
                assert row[key] == pytest.approx(other[key], rel=1e-4), key


# -- two processes that each train on their own text ------------------------------------------------------------------


def trained_tokens(reports: list[dict], epoch: int = 0) -> Counter:
    """What the processes of a run trained on in a pass over the text, however it was cut: documents and token ids."""
    return as_tokens(token for report in reports for number, *token in report["trained"] if number == epoch)


def as_tokens(found) -> Counter:
    return Counter((document, block[position]) for document, position, *block in found)


@pytest.fixture(scope="module")
def all_tokens(stopped):
    """Each token that counts; at position 0 is BOS."""
    args = CLTTrainingArguments(**stopped("none"))
    return as_tokens(counted_tokens(open_text(args, load_language_model(args.model)[1])))


def test_gradients_are_not_kept_twice(two):
    assert [report["gradients_are_views"] for report in two["plain"]] == [True, True]
    assert [report["processes"] for report in two["plain"]] == [2, 2]


def test_each_reads_a_part_of_the_text_and_both_all_of_it(two, all_tokens):
    shares = [trained_tokens([report]) for report in two["plain"]]
    documents = [{document for document, _ in share} for share in shares]
    heldout = {document for report in two["plain"] for document in report["heldout_documents"]}
    assert min(map(len, documents)) > 3 and documents[0].isdisjoint(documents[1])
    assert heldout and heldout.isdisjoint(documents[0] | documents[1])
    assert shares[0] + shares[1] == all_tokens


def test_they_hold_the_same_clt(two, folder):
    """Weights, statistics and counters; what is released is it."""
    first, second = (part(report, "end.") for report in two["plain"])
    assert first.keys() == second.keys() >= {"mean_in", "std_out", "steps_since_fired", "encoders.0.weight"}
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for layer in range(2):
        released = load_file(folder / "plain" / f"W_enc_{layer}.safetensors")
        assert all(value.isfinite().all() for value in released.values())
        folded = first[f"encoders.{layer}.weight"] / first["std_in"][layer]
        torch.testing.assert_close(released[f"W_enc_{layer}"], folded)


def test_the_metrics_are_over_both(two, folder):
    first, second = two["plain"]
    assert first["metrics"] == second["metrics"]
    assert first["heldout_tokens"] > 0 and second["heldout_tokens"] > 0
    assert first["metrics"]["num_tokens"] == first["heldout_tokens"] + second["heldout_tokens"]
    rows = read_metrics(folder / "plain")
    assert [row["step"] for row in rows] == [1, 4, 8, 12, 16, 20]  # written by one of them
    assert [row["step"] for row in read_metrics(folder / "plain", "heldout")] == [20]
    assert rows[0]["tokens"] == 2 * 50
    assert all(0 < row["loss"] < float("inf") for row in rows)


def test_a_checkpoint_has_both_positions_in_the_text(two, folder):
    checkpoint = folder / "plain" / "checkpoint-10"
    assert json.loads((checkpoint / "state.json").read_text())["num_processes"] == 2
    positions = [json.loads((checkpoint / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [values["buffer"]["text"]["settings"]["rank"] for values in positions] == [0, 1]
    assert load_file(checkpoint / "rank-0.safetensors").keys() >= {"order", "generator"}


# -- another number of processes, failure and signals -----------------------------------------------------------------


def assert_goes_on(before: Counter, after: Counter, expected: Counter, num_buffers: int) -> None:
    """Nothing of the text is left out, and what is read twice is at most so many buffers."""
    assert not expected - (before + after)
    capacity = STOPPED["n_batches_in_buffer"] * TEXT["store_batch_size_prompts"] * (TEXT["context_size"] - 1)
    assert before.total() + after.total() <= expected.total() + num_buffers * capacity


def assert_starts_at(checkpoint: Path, report: dict) -> None:
    """Weights, running thresholds, optimizer, feature counters and step are those of the checkpoint."""
    shared = load_shared(checkpoint, None, CrossLayerTranscoder(CLTConfig(**BATCHTOPK)).per_feature())
    assert report["start"] == shared["state"]["step"] > 0
    expected = {f"{kind}.{n}": t for kind in ("model", "optimizer", "trainer") for n, t in shared[kind].items()}
    found = part(report, "start.")
    assert found.keys() == expected.keys() and len(expected) > 20
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_from_two_processes_to_one(two, stopped, folder, all_tokens, name, caplog):
    assert [report["error"][:2] for report in two[name]] == [["StopRequested", "stopped at step 5"]] * 2
    before = trained_tokens(two[name])
    assert before.total() == 5 * 2 * 50
    again = stopped(name, resume_from_checkpoint="latest")
    with caplog.at_level(logging.WARNING):
        report = run(again, BATCHTOPK)
    assert "error" not in report and report["step"] == 40
    assert_starts_at(folder / name / "checkpoint-5", report)
    assert_goes_on(before, trained_tokens([report]), all_tokens, num_buffers=2)
    lines = [line for line in caplog.messages if line.startswith("checkpoint-5 ")]
    assert len(lines) == 1 and "2 processes" in lines[0] and "1 go on" in lines[0]
    rows = {row["step"]: row["tokens"] for row in read_metrics(folder / name)}
    assert rows[4] == 4 * 100 and rows[8] == 5 * 100 + 3 * 50  # of the steps since the line before, none is forgotten


def test_from_one_process_to_two(one, two, folder, all_tokens):
    assert one["error"][1] == "stopped at step 7" and len(one["trained"]) == 7 * 50
    for report in two["on two"]:
        assert "error" not in report and report["step"] == 40 and report["processes"] == 2
        assert_starts_at(folder / "one" / "checkpoint-7", report)
    shares = [trained_tokens([report]) for report in two["on two"]]
    assert min(share.total() for share in shares) > 200
    assert_goes_on(trained_tokens([one]), shares[0] + shares[1], all_tokens, num_buffers=1)


def test_from_two_processes_to_one_on_a_cache(two, stopped, folder, cache, on_cache):
    stream = CachedTokens(ActivationCache(str(cache)), "train")
    report = run(on_cache(stopped("cached", resume_from_checkpoint="latest")), BATCHTOPK)
    assert_starts_at(folder / "cached" / "checkpoint-5", report)
    before, after = trained_tokens(two["cached"]), trained_tokens([report])
    assert before.total() == 5 * 2 * 50
    assert_goes_on(before, after, as_tokens(counted_tokens(stream)), num_buffers=2)


def test_both_stop_with_a_checkpoint_when_the_text_of_one_breaks_off(two, stopped, all_tokens):
    step = two["broken"][0]["step"]  # what is in the buffer lasts for a while
    other, broken = (report["error"] for report in two["broken"])
    assert other[0] == "OtherProcessFailed"
    assert broken[0] == "StreamError" and "ConnectionError: the network is gone" in broken[1]
    for error in (other, broken):
        assert f"checkpoint-{step}" in error[2] and "--resume-from-checkpoint latest" in error[2]
    # What was read for the update that failed, by either process, counts as not trained on.
    report = run(stopped("broken", resume_from_checkpoint="latest", gradient_accumulation_steps=2), BATCHTOPK)
    assert report["start"] == step >= 2
    assert trained_tokens(two["broken"]).total() == step * 2 * 2 * 50 < all_tokens.total()
    assert_goes_on(trained_tokens(two["broken"]), trained_tokens([report]), all_tokens, num_buffers=2)


def test_they_ask_each_other_only_where_one_may_have_to_read(two, folder, all_tokens):
    """And stop, or fail, after the same update all the same."""
    for name, error in (("seldom", "StopRequested"), ("seldom broken", "OtherProcessFailed")):
        first, second = two[name]
        assert first["error"][0] == error and first["step"] == second["step"]
        assert 0 < first["asked"] == second["asked"] < 0.7 * first["step"]
        trained = trained_tokens(two[name])
        assert trained.total() == first["step"] * 2 * 50 and not trained - all_tokens
        assert [path.name for path in (folder / name).glob("checkpoint-*")] == [f"checkpoint-{first['step']}"]
    assert [report["error"][0] for report in two["several"]] == ["StopRequested"] * 2
    assert 3 <= two["several"][0]["step"] == two["several"][1]["step"] <= 9  # five updates are ready at most
    assert 5 <= two["seldom"][0]["step"] <= 8  # the buffer has three batches ready at most


def test_sigterm_ends_the_wait_for_text_in_one_of_two(two, folder):
    """It would wait for 6 times 5 seconds."""
    step = two["waiting"][0]["step"]
    for report in two["waiting"]:
        assert report["error"][:2] == ["StopRequested", f"stopped at step {step}"]
        assert report["seconds"] < 15
    assert (folder / "waiting" / f"checkpoint-{step}").is_dir()


def test_sigterm_ends_the_wait_for_text(stopped, folder):
    """In one process; each pause takes 5 seconds."""
    report = run(stopped("pause", stream_retries=5), BATCHTOPK, break_at=4, patience=0.5)
    assert report["error"][:2] == ["StopRequested", f"stopped at step {report['step']}"]
    assert report["seconds"] < 8.5
    assert (folder / "pause" / f"checkpoint-{report['step']}").is_dir()


def test_a_graph_is_the_same_from_two_processes(two, folder):
    """Up to the rounding of sums over other batches; the selection too."""
    for number, graph in enumerate(make_graphs()):
        for rank in range(2):
            found = AttributionGraph.load(folder / f"graph-{number}-{rank}")
            assert torch.equal(found.features, graph.features)
            torch.testing.assert_close(found.edges, graph.edges, rtol=1e-10, atol=1e-12)
            for name, values in graph.rests().items():
                torch.testing.assert_close(found.rests()[name], values, rtol=1e-10, atol=1e-12)
