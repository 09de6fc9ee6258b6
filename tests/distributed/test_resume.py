"""
Runs that go on with another number of processes, that fail in one of two processes, and that are told to stop. One
launch for all that needs two; what runs in it is in resume_worker.py.
"""

import json
import logging
from collections import Counter

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from hf_clt import CLTConfig, CrossLayerTranscoder
from hf_clt.commands.cache import main as cache_activations
from hf_clt.harvest.cache import ActivationCache, CachedTokens
from hf_clt.harvest.harvester import load_language_model
from hf_clt.harvest.tokens import open_text
from hf_clt.sharding import FeatureShard
from hf_clt.training.arguments import CLTTrainingArguments
from hf_clt.training.checkpoints import load_shared
from tests.distributed.launch import launch
from tests.distributed.resume_worker import __file__ as WORKER
from tests.distributed.resume_worker import counted_tokens, run


CONFIG = {"num_layers": 2, "d_model": 64, "num_features": 48, "activation_fn": "batchtopk", "k": 6}
ARGUMENTS = {
    "device": "cpu",
    "n_batches_in_buffer": 6,  # a third of the text
    "batch_size": 50,
    "training_steps": 40,  # a pass over the text ends before
    "log_interval": 4,
    "dead_feature_window": 3,
    "normalization_estimation_batches": 3,
    "stream_retries": 0,
    "disable_progress_bar": True,
}
TEXT = {"context_size": 32, "store_batch_size_prompts": 2, "eval_tokens": 300}


@pytest.fixture(scope="module")
def make(tiny_gpt2, small_text_file, tmp_path_factory):
    """The folder of all runs, and the arguments of one."""
    folder = tmp_path_factory.mktemp("resume")
    given = {**ARGUMENTS, **TEXT, "model": tiny_gpt2, "dataset": small_text_file}
    return folder, lambda name, **more: {**given, "output_dir": str(folder / name), **more}


@pytest.fixture(scope="module")
def cache(tiny_gpt2, small_text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    options = [word for name, value in TEXT.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    options += ["--model", tiny_gpt2, "--dataset", small_text_file, "--device", "cpu", "--disable-progress-bar"]
    PartialState._reset_state()
    assert cache_activations([str(folder), *options]) == 0
    return {"activation_cache": str(folder), "model": None, "dataset": None} | dict.fromkeys(TEXT)


@pytest.fixture(scope="module")
def from_cache(cache):
    """Arguments of a run on the cache: what is written in it is not given again."""
    return lambda arguments: {n: v for n, v in {**arguments, **cache}.items() if v is not None}


@pytest.fixture(scope="module")
def one(make):
    """A run of one process, stopped."""
    return run(make[1]("one"), CONFIG, stop_at=7)


@pytest.fixture(scope="module")
def launched(make, one, from_cache):
    """What each of two processes told of each run."""
    folder, arguments = make
    nothing, stopped = [{}, {}], [{}, {"stop_at": 5}]
    checkpoint = str(folder / "one" / "checkpoint-7")
    runs = {
        "two": (arguments("two"), CONFIG, stopped),
        "sharded": (arguments("sharded", feature_parallel_size=2), CONFIG, stopped),
        "cached": (from_cache(arguments("cached")), CONFIG, stopped),
        "on two": (arguments("on two", resume_from_checkpoint=checkpoint), CONFIG, nothing),
        "broken": (arguments("broken", gradient_accumulation_steps=2), CONFIG, [{}, {"break_at": 2}]),
        "seldom": (arguments("seldom"), CONFIG, [{"ask_seconds": 100.0}, {"ask_seconds": 100.0, "stop_at": 5}]),
        "several": (
            arguments("several", gradient_accumulation_steps=2, training_steps=40, batch_size=20),
            CONFIG,
            [{"ask_seconds": 100.0}, {"ask_seconds": 100.0, "stop_at": 3}],
        ),
        "seldom broken": (
            arguments("seldom broken"),
            CONFIG,
            [{"ask_seconds": 9.0}, {"ask_seconds": 9.0, "break_at": 2}],
        ),
        "waiting": (arguments("waiting", stream_retries=5), CONFIG, [{}, {"break_at": 4, "patience": 2.0}]),
    }
    launch(2, WORKER, str(folder), json.dumps(runs))
    told = {}
    for name in runs:
        told[name] = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for rank, process in enumerate(told[name]):
            process["tensors"] = load_file(folder / f"{name}-{rank}.safetensors")
    return told


def tokens_of(told: list[dict], epoch: int = 0) -> Counter:
    """What the processes of a run trained on in a pass over the text, however it was cut: documents and token ids."""
    return as_tokens(token for process in told for number, *token in process["trained"] if number == epoch)


def as_tokens(found) -> Counter:
    return Counter((document, block[position]) for document, position, *block in found)


def assert_goes_on(before: Counter, after: Counter, expected: Counter, num_buffers: int) -> None:
    """Nothing of the text is left out, and what is read twice is at most so many buffers."""
    missing = expected - (before + after)
    assert not missing
    capacity = ARGUMENTS["n_batches_in_buffer"] * TEXT["store_batch_size_prompts"] * (TEXT["context_size"] - 1)
    assert before.total() + after.total() <= expected.total() + num_buffers * capacity


@pytest.fixture(scope="module")
def all_tokens(make):
    """Each token that counts; at position 0 is BOS."""
    args = CLTTrainingArguments(**make[1]("none"))
    return as_tokens(counted_tokens(open_text(args, load_language_model(args.model)[1])))


def assert_starts_at(checkpoint, told: dict, shard: FeatureShard | None = None) -> None:
    """Weights, running thresholds, optimizer, feature counters and step are those of the checkpoint."""
    names = CrossLayerTranscoder(CLTConfig(**CONFIG)).per_feature()
    shared = load_shared(checkpoint, shard, names)
    assert told["start"] == shared["state"]["step"] > 0
    expected = {f"{part}.{n}": t for part in ("model", "optimizer", "trainer") for n, t in shared[part].items()}
    assert told["tensors"].keys() == expected.keys() and len(expected) > 20
    for name, tensor in expected.items():
        assert torch.equal(told["tensors"][name], tensor), name


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_from_two_processes_to_one(make, launched, all_tokens, name, caplog):
    folder, arguments = make
    assert [process["error"][:2] for process in launched[name]] == [["StopRequested", "stopped at step 5"]] * 2
    before = tokens_of(launched[name])
    assert before.total() == 5 * 2 * 50
    again = arguments(name, resume_from_checkpoint="latest")
    with caplog.at_level(logging.WARNING):
        told = run(again, CONFIG)
    assert "error" not in told and told["step"] == 40
    assert_starts_at(folder / name / "checkpoint-5", told)
    after = tokens_of([told])
    assert_goes_on(before, after, all_tokens, num_buffers=2)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("checkpoint-5 was written by")]
    assert len(lines) == 1 and lines[0].startswith("checkpoint-5 was written by 2 processes, and 1 go on: ")
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    rows = {row["step"]: row["tokens"] for row in rows if row["split"] == "train"}
    assert rows[4] == 4 * 100 and rows[8] == 5 * 100 + 3 * 50  # of the steps since the line before, none is forgotten


def test_from_one_process_to_two(make, one, launched, all_tokens):
    folder, _ = make
    assert one["error"][1] == "stopped at step 7" and len(one["trained"]) == 7 * 50
    told = launched["on two"]
    for process in told:
        assert "error" not in process and process["step"] == 40 and process["processes"] == 2
        assert_starts_at(folder / "one" / "checkpoint-7", process)
    shares = [tokens_of([process]) for process in told]
    assert min(share.total() for share in shares) > 200
    assert_goes_on(tokens_of([one]), shares[0] + shares[1], all_tokens, num_buffers=1)


def test_from_two_processes_to_one_on_a_cache(make, launched, from_cache, cache):
    folder, arguments = make
    stream = CachedTokens(ActivationCache(cache["activation_cache"]), "train")
    told = run(from_cache(arguments("cached", resume_from_checkpoint="latest")), CONFIG)
    assert_starts_at(folder / "cached" / "checkpoint-5", told)
    before, after = tokens_of(launched["cached"]), tokens_of([told])
    assert before.total() == 5 * 2 * 50
    assert_goes_on(before, after, as_tokens(counted_tokens(stream)), num_buffers=2)


def test_both_stop_with_a_checkpoint_when_the_text_of_one_breaks_off(make, launched, all_tokens):
    arguments = make[1]
    step = launched["broken"][0]["step"]  # what is in the buffer lasts for a while
    whole = f"checkpoint-{step} is whole: continue with --resume-from-checkpoint latest"
    other, broken = (process["error"] for process in launched["broken"])
    assert other == ["OtherProcessFailed", "another process of this run has failed, and says why", whole]
    assert broken[0] == "StreamError" and "ConnectionError: the network is gone" in broken[1] and broken[2] == whole
    # What was read for the update that failed, by either process, counts as not trained on.
    told = run(arguments("broken", resume_from_checkpoint="latest", gradient_accumulation_steps=2), CONFIG)
    assert told["start"] == step >= 2
    assert tokens_of(launched["broken"]).total() == step * 2 * 2 * 50 < all_tokens.total()
    assert_goes_on(tokens_of(launched["broken"]), tokens_of([told]), all_tokens, num_buffers=2)


def test_they_ask_each_other_only_where_one_may_have_to_read(make, launched, all_tokens):
    """And stop, or fail, after the same update all the same."""
    folder, _ = make
    for name, error in (("seldom", "StopRequested"), ("seldom broken", "OtherProcessFailed")):
        one, two = launched[name]
        assert one["error"][0] == error and one["step"] == two["step"]
        assert 0 < one["asked"] == two["asked"] < 0.7 * one["step"]
        trained = tokens_of(launched[name])
        assert trained.total() == one["step"] * 2 * 50 and not trained - all_tokens
        assert [path.name for path in (folder / name).glob("checkpoint-*")] == [f"checkpoint-{one['step']}"]
    assert [process["error"][0] for process in launched["several"]] == ["StopRequested"] * 2
    assert 3 <= launched["several"][0]["step"] == launched["several"][1]["step"] <= 9  # five updates are ready at most
    assert 5 <= launched["seldom"][0]["step"] <= 8  # the buffer has three batches ready at most


def test_sigterm_ends_the_wait_for_text_in_one_of_two(make, launched):
    """It would wait for 6 times 5 seconds."""
    folder, _ = make
    step = launched["waiting"][0]["step"]
    for process in launched["waiting"]:
        assert process["error"][:2] == ["StopRequested", f"stopped at step {step}"]
        assert process["seconds"] < 15
    assert (folder / "waiting" / f"checkpoint-{step}").is_dir()


@pytest.mark.parametrize("patience", [0.5])
def test_sigterm_ends_the_wait_for_text(make, patience):
    """In one process; each pause takes 5 seconds."""
    folder, arguments = make
    told = run(arguments(f"pause {patience}", stream_retries=5), CONFIG, break_at=4, patience=patience)
    assert told["error"][:2] == ["StopRequested", f"stopped at step {told['step']}"]
    assert told["seconds"] < patience + 8
    assert (folder / f"pause {patience}" / f"checkpoint-{told['step']}").is_dir()
