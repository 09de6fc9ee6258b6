"""The activation cache: what is trained on it is what would have been trained on the language model."""

import json
import shutil
from contextlib import suppress
from itertools import chain

import pytest
import torch

from hf_clt import CLTTrainer, CLTTrainingArguments
from hf_clt.commands import cache as cache_activations
from hf_clt.harvest import cache
from hf_clt.harvest.cache import ActivationCache, CachedTokens, from_stored, to_stored, write_cache
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.harvest.tokens import open_text
from hf_clt.training.initial_config import build_config
from hf_clt.training.parser import parse_train_args
from hf_clt.training.publishing import training_facts


TEXT = ["--context-size", "32", "--store-batch-size-prompts", "2", "--eval-tokens", "128"]
TRAINING = ["--num-features", "48", "--activation-fn", "batchtopk", "--k", "4", "--batch-size", "64"]
TRAINING += ["--n-batches-in-buffer", "4", "--training-steps", "6", "--log-interval", "1"]
TRAINING += ["--normalization-estimation-batches", "2", "--disable-progress-bar"]


@pytest.fixture(scope="module")
def cached(tiny_gpt2, text_file, tmp_path_factory):
    """Folders of caches by dtype, of several shards each."""
    root = tmp_path_factory.mktemp("caches")

    def make(dtype, *options):
        folder = root / "-".join([dtype, *(option.strip("-") for option in options)])
        if not folder.exists():
            arguments = [str(folder), "--model", tiny_gpt2, "--dataset", text_file, *TEXT, "--dtype", dtype]
            arguments += ["--max-tokens", "1000", "--disable-progress-bar"]
            assert run(*arguments, *options) == 0
        return folder

    return make


def run(*arguments, shard_bytes=60_000):
    """The script with shards so small that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "write_cache", lambda *a, **k: write_cache(*a, **{**k, "shard_bytes": shard_bytes}))
        return cache_activations.main([str(argument) for argument in arguments])


def train(tmp_path, name, *options):
    args, fields = parse_train_args([*TRAINING, "--output-dir", str(tmp_path / name), *map(str, options)])
    trainer = CLTTrainer(args, build_config(args, fields))
    clt = trainer.train()
    return clt, trainer.evaluate(), trainer


@pytest.mark.slow
def test_training_from_it_equals_training_from_the_stream(cached, tiny_gpt2, text_file, tmp_path):
    streamed, expected, _ = train(tmp_path, "stream", "--model", tiny_gpt2, "--dataset", text_file, *TEXT)
    clt, metrics, trainer = train(tmp_path, "cache", "--activation-cache", cached("float32"), "--no-cache-shuffle")
    assert metrics == expected
    for name, parameter in streamed.state_dict().items():
        assert torch.equal(clt.state_dict()[name], parameter), name
    # The run knows what it was trained on.
    assert clt.config.base_model_name_or_path == tiny_gpt2
    assert (trainer.args.dataset, trainer.args.context_size) == (text_file, 32)
    assert training_facts(trainer)["dataset"] == text_file
    with pytest.raises(ValueError, match=r"eval_replacement=True .*activation_cache="):
        CLTTrainingArguments(**{**trainer.args.to_dict(), "eval_replacement": True})

    # In another order, and with rounding, it is nearly as good.
    for name, folder in (("shuffled", cached("float32")), ("bf16", cached("bfloat16")), ("int8", cached("int8"))):
        _, metrics, _ = train(tmp_path, name, "--activation-cache", folder)
        assert metrics["nmse"] != expected["nmse"]
        assert metrics["nmse"] == pytest.approx(expected["nmse"], rel=0.1), name
        assert metrics["num_tokens"] == expected["num_tokens"]


def test_a_stopped_run_on_a_cache_goes_on_bit_for_bit(cached, tmp_path):
    options = ["--activation-cache", cached("bfloat16"), "--checkpoint-interval", "4"]
    whole, _, _ = train(tmp_path, "whole", *options)
    for folder in (tmp_path / "whole").glob("checkpoint-*"):
        options += ["--resume-from-checkpoint", folder]
    resumed, _, _ = train(tmp_path, "resumed", *options)
    for name, parameter in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], parameter), name


def test_every_batch_once_per_epoch_whatever_the_order_and_the_processes(cached):
    cache = ActivationCache(cached("bfloat16"))
    assert len({file for file, _ in cache.batches["train"]}) > 2
    for seed in (None, 3):
        orders = []
        for world_size in (1, 3):
            streams = [CachedTokens(cache, "train", rank, world_size, seed=seed) for rank in range(world_size)]
            for _ in range(2):
                seen = [[int(batch["cached"][1]) for batch in stream] for stream in streams]
                assert sorted(chain.from_iterable(seen)) == list(range(streams[0].num_batches))
                orders.append(seen)
        if seed is None:
            assert orders[0] == [list(range(len(cache.batches["train"])))] == orders[1]
        else:
            assert orders[0] != orders[1]  # each epoch has its own
    stream = CachedTokens(cache, "train", seed=3)
    head = [next(iter(stream))["cached"] for _ in range(3)]
    state = json.loads(json.dumps(stream.state_dict()))
    rest = [batch["cached"].tolist() for batch in stream]
    again = CachedTokens(cache, "train", seed=3)
    again.load_state_dict(state)
    assert [batch["cached"].tolist() for batch in again] == rest
    assert len(head) + len(rest) == stream.num_batches
    with pytest.raises(ValueError, match="does not fit this cache"):
        CachedTokens(cache, "train", seed=4).load_state_dict(state)


def test_writing_that_was_interrupted_goes_on(cached, tiny_gpt2, text_file, tmp_path, monkeypatch, capsys):
    whole = cached("bfloat16")
    harvest, count = Harvester.harvest, 0

    def failing(self, *arguments, **options):
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return harvest(self, *arguments, **options)

    monkeypatch.setattr(Harvester, "harvest", failing)
    arguments = [tmp_path / "c", "--model", tiny_gpt2, "--dataset", text_file, *TEXT, "--max-tokens", "1000"]
    arguments += ["--disable-progress-bar"]
    assert run(*arguments) == 130
    assert "goes on after the last whole shard" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no complete"):
        ActivationCache(tmp_path / "c")
    done = sorted(path.name for path in (tmp_path / "c").glob("*.safetensors"))
    assert done
    assert run(*arguments, "--max-tokens", "999") == 2
    assert "max_tokens=999, but the cache" in capsys.readouterr().err
    before = count
    assert run(*arguments) == 0
    assert count - before < 20
    ours, theirs = ActivationCache(tmp_path / "c"), ActivationCache(whole)
    for split in ("heldout", "train"):
        assert len(ours.batches[split]) == len(theirs.batches[split]) > 0
        for number in range(len(ours.batches[split])):
            a, b = ours.tokens(split, number), theirs.tokens(split, number)
            assert all(torch.equal(a[name], b[name]) for name in a)
            assert all(torch.equal(x, y) for x, y in zip(ours.harvest(a), theirs.harvest(b), strict=True))
    assert run(*arguments) == 0  # finished: nothing is harvested again
    assert "tokens to train on" in capsys.readouterr().out


def test_shares_of_several_writers_are_read_by_any_number(tiny_gpt2, text_file, tmp_path):
    options = cache_activations.make_parser().parse_args(["c", "--dataset", text_file, *TEXT])
    model, tokenizer = load_language_model(tiny_gpt2)
    streams = {}
    for rank in (1, 0):  # the last to finish writes the manifest
        streams[rank] = {"train": open_text(options, tokenizer, rank=rank, world_size=2)}
        arguments = (tmp_path / "c", Harvester(model), streams[rank], {"eval_tokens": 0})
        wait = (lambda: None) if rank == 0 else stop
        with suppress(InterruptedError):
            write_cache(*arguments, max_tokens=800, rank=rank, world_size=2, wait=wait, shard_bytes=100_000)
        streams[rank]["train"].rewind()
    cache = ActivationCache(tmp_path / "c")
    for rank in range(2):
        mine = CachedTokens(cache, "train", rank, 2)
        for own, streamed in zip(mine, streams[rank]["train"], strict=False):
            assert torch.equal(own["input_ids"], streamed["input_ids"])
    assert sum(int(batch["counted"].sum()) for batch in CachedTokens(cache, "train")) >= 800


def stop():
    raise InterruptedError


def test_int8_has_a_scale_for_each_dimension():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 2, 6, generator=generator)
    values[:, 0, 3] = 2000 + 300 * values[:, 0, 3]  # a dimension of outliers
    values[:, 1, 2] = 7.0  # one that does not vary
    values[7, 1, 4] = 90.0  # one token that is an outlier
    found = from_stored(to_stored(values, "x", "int8"), "x", torch.float32)
    step = (values.amax(0) - values.amin(0)) / 254
    assert ((found - values).abs() <= step / 2 * 1.001 + 1e-4).all()
    error = (found - values).square().mean(0) / values.var(0)
    assert error[0].max() < 1e-4 and error[1, 0] < 1e-4
    assert torch.equal(found[:, 1, 2], values[:, 1, 2])
    assert to_stored(values[:0], "x", "int8")["x"].shape == (0, 2, 6)


def test_a_cache_that_does_not_fit_is_refused(cached, tiny_gpt2, text_file, tmp_path):
    folder = cached("bfloat16")
    for options, message in (
        (["--context-size", "64"], "context_size=64, but activation_cache"),
        (["--context-size", "128"], "context_size=128, but activation_cache"),  # the default, but asked for
        (["--on-bad-activations", "skip"], "on_bad_activations='skip' .*activation_cache"),
        (["--model", "other/model"], "model='other/model', but activation_cache"),
        (["--dataset", "other.txt"], "dataset='other.txt'"),
        (["--num-layers", "3"], "num_layers=3 does not fit"),
        (["--feature-input-hook", "mlp.hook_in"], "feature_input_hook=mlp.hook_in does not fit"),
        (["--activation-cache", str(tmp_path)], "no complete"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, "refused", "--activation-cache", folder, *options)
    assert not (tmp_path / "refused").exists()


def test_damage_is_found(cached, tiny_gpt2, text_file, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(cached("bfloat16"), folder)
    assert run(folder, "--verify") == 0
    shard = folder / "train-0-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert run(folder, "--verify") == 2
    assert "has changed since it was written" in capsys.readouterr().err
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="the manifest says"):
        ActivationCache(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json .*JSON"):
        ActivationCache(folder)


def test_the_script_refuses_wrong_options_in_one_line(tiny_gpt2, text_file, tmp_path, capsys):
    base = [tmp_path / "c", "--model", tiny_gpt2, "--dataset", text_file]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.pdf").touch()
    for arguments, message in (
        ([tmp_path / "c", "--dataset", text_file], "model is missing"),
        ([*base, "--max-tokens", "0"], "max_tokens=0"),
        ([*base, "--context-size", "4096"], "context_size is 4096"),
        ([*base, "--dtype", "int4"], "int4"),
        ([tmp_path / "full", *base[1:], *TEXT], "is not empty (thesis.pdf)"),
        ([tmp_path / "c", "--verify"], "no complete"),
    ):
        assert run(*arguments) == 2
        *bars, error = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and message in error
        assert all("Loading weights" in bar for bar in bars if bar)
