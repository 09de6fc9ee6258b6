"""
Another number of processes: in all that the old and the new ones hand out, every token that counts is there as often
as it would have been without the change.

As in test_buffer.py, no word occurs twice in the text, and the activations of a word are its number.
"""

import json
import random
from collections import Counter

import pytest
import torch
from safetensors.torch import load, save

from hf_clt import ActivationBuffer
from hf_clt.harvest import tokens as tokens_module
from hf_clt.harvest.cache import ActivationCache, CachedTokens, write_cache
from hf_clt.harvest.dealing import DealtTokens, at_position, deal_batches, deal_buffers, deal_text
from tests.harvest.test_buffer import NumberHarvester, ids_of, make_stream


class CacheableHarvester(NumberHarvester):
    """Its activations can be written to a cache."""

    input_hook, output_hook = "hook_resid_mid", "hook_mlp_out"

    def harvest(self, batch, dtype=torch.float32, skip_bad=False):
        return self.read(batch, dtype)[:2]


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_documents=50, seed=3)[0]


@pytest.fixture(scope="module")
def cache(stream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    write_cache(folder, CacheableHarvester(), {"train": stream}, {"eval_tokens": 0}, dtype="float32")
    return ActivationCache(folder)


@pytest.fixture(params=["text", "text in small groups", "cache", "shuffled cache"])
def source(request, stream, cache, monkeypatch):
    """The stream of all of the text, and what harvests it."""
    if request.param == "text in small groups":
        monkeypatch.setattr(tokens_module, "GROUP_PIECES", 3)
    if request.param.startswith("text"):
        return stream.share(0, 1), NumberHarvester()
    return CachedTokens(cache, "train", seed=5 if request.param.startswith("shuffled") else None), cache


def make_buffers(source, num_processes, overlap=False):
    tokens, harvester = source
    return [
        ActivationBuffer(
            tokens.share(rank, num_processes), harvester, n_batches=3, batch_size=10, seed=rank, overlap=overlap
        )
        for rank in range(num_processes)
    ]


def written(buffer):
    """The buffer's state as a checkpoint has it."""
    values, tensors = buffer.state_dict()
    return json.loads(json.dumps(values)), load(save(tensors))


def changed(source, buffers, num_processes, overlap=False):
    """The buffers of the new processes."""
    states = [written(buffer) for buffer in buffers]
    new = make_buffers(source, num_processes, overlap)
    for rank, buffer in enumerate(new):
        values, tensors = deal_buffers(states, rank, num_processes)
        buffer.load_state_dict(json.loads(json.dumps(values)), load(save(tensors)))
    return new


def take(buffers, batches, num_batches):
    """What each of the processes is given in so many steps."""
    given = Counter()
    for _ in range(num_batches):
        for iterator in batches:
            given.update(ids_of(next(iterator)))
    return given


def drain(buffers):
    """What is left of the pass over the text that the processes are in."""
    return Counter(token for buffer in buffers for batch in buffer for token in ids_of(batch))


def all_tokens(source, num_processes):
    """Each token that counts, as the text is cut for so many processes."""
    return drain(make_buffers(source, num_processes))


@pytest.mark.parametrize("before, after, steps", [(2, 1, 1), (1, 2, 9), (2, 3, 4), (4, 2, 4), (1, 4, 1)])
def test_every_token_once(source, before, after, steps):
    old = make_buffers(source, before)
    expected = all_tokens(source, before)
    given = take(old, [buffer.endless() for buffer in old], steps)
    assert set(given.values()) == {1} and given.total() < expected.total()
    new = changed(source, old, after)
    assert given + drain(new) == expected
    assert {buffer.epoch for buffer in new} == {1}
    # From then on each reads its own share.
    assert drain(new) == all_tokens(source, after)


def test_the_rest_is_spread_over_all(source):
    old = make_buffers(source, 1)
    take(old, [buffer.endless() for buffer in old], 4)
    parts = [drain([buffer]) for buffer in changed(source, old, 2)]
    assert parts[0].keys().isdisjoint(parts[1])
    assert abs(parts[0].total() - parts[1].total()) < 0.2 * (parts[0].total() + parts[1].total())


@pytest.mark.parametrize("seed", range(2))
def test_changed_again_and_again(source, seed):
    """Also while what an earlier change dealt out is being read, stopped between, and in different passes."""
    chance, overlap = random.Random(seed), seed % 2 == 1
    first = chance.randint(1, 4)
    buffers = make_buffers(source, first, overlap)
    per_pass, given = all_tokens(source, first), Counter()
    assert set(per_pass.values()) == {1}
    for _ in range(3):
        for buffer in buffers:  # not in step
            given += take([buffer], [buffer.endless()], chance.randint(1, 12))
        buffers = changed(source, buffers, chance.randint(1, 4), overlap)
    passes = max(given.values())
    given += drain(buffers)
    # In a pass that begins after a change, the text is cut for other processes, and other tokens are at position 0;
    # with BOS there that is none of them.
    assert set(given.values()) == {buffers[0].epoch} and given.keys() == per_pass.keys()
    assert passes <= buffers[0].epoch


def test_a_resume_in_between_is_bit_for_bit(source):
    old = make_buffers(source, 2)
    take(old, [buffer.endless() for buffer in old], 3)
    for steps in (0, 3, 8):
        for straight, stopped in zip(changed(source, old, 1), changed(source, old, 1), strict=True):
            one, other = straight.endless(), stopped.endless()
            for _ in range(steps):
                next(one), next(other)
            again = make_buffers(source, 1)[0]
            again.load_state_dict(*written(stopped))
            rest = again.endless()
            for _ in range(12):
                assert ids_of(next(one)) == ids_of(next(rest))
            assert straight.epoch == again.epoch


def test_a_failure_in_the_rest_loses_nothing(stream):
    source = stream.share(0, 1), NumberHarvester()
    old = make_buffers(source, 2)
    given = take(old, [buffer.endless() for buffer in old], 3)
    buffer = changed(source, old, 1)[0]
    failing = buffer.tokens.streams[1]
    read, failures = failing._next_batch, [True, False, True]

    def broken():
        if failures and failures.pop():
            raise ConnectionError("gone")
        return read()

    failing._next_batch, failing.retries = broken, 0
    found, failed = Counter(), 0
    while buffer.epoch == 0:
        try:
            for batch in buffer:
                found.update(ids_of(batch))
        except tokens_module.StreamError:
            failed += 1
    assert failed == 2
    assert given + found == all_tokens(source, 2)


def test_only_what_is_read_is_tokenized(stream):
    """Eight processes become four: each goes on with two of the old streams, and takes all of their batches."""
    values = [{"epoch": 0, "text": {"position": rank}, "text_ended": False} for rank in range(8)]
    for rank in range(4):
        state = deal_text(values, rank, 4)
        assert [old["rank"] for old in state["streams"]] == [rank, rank + 4] and state["every"] == 1
    assert deal_text(values, 2, 16)["every"] == 2


def test_batches_are_dealt_evenly():
    counted = [torch.arange(8) < size for size in (5, 1, 8, 2, 2, 6)]
    batches = [{"counted": row[None]} for row in counted]
    shares = [deal_batches(batches, rank, 2) for rank in range(2)]
    assert [sum(int(batch["counted"].sum()) for batch in share) for share in shares] == [12, 12]
    assert sorted(id(batch) for share in shares for batch in share) == sorted(map(id, batches))


def test_another_text_is_refused(stream):
    state = stream.share(1, 2).state_dict()
    dealt = deal_text([{"epoch": 0, "text": state, "text_ended": False}] * 2, 0, 1)
    with pytest.raises(ValueError, match="the saved position in the text was taken with rank=1, and now rank=0"):
        at_position(stream.share(0, 1), dealt)
    assert isinstance(at_position(stream.share(0, 1), {**dealt, "streams": []}), DealtTokens)
