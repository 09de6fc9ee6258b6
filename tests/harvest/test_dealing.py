"""
Another number of processes goes on: every token that counts is handed out by the old or the new ones, and at most a
buffer of each old process by both.

As in test_buffer.py, no word occurs twice in the text, and the activations of a word are its number.
"""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load, save

from hf_clt import ActivationBuffer
from hf_clt.harvest import text
from hf_clt.harvest.cache import ActivationCache, CachedTokens, write_cache
from hf_clt.harvest.dealing import deal_buffers
from hf_clt.harvest.tokens import TokenStream
from tests.harvest.test_buffer import NumberHarvester, ids_of, make_stream


class CacheableHarvester(NumberHarvester):
    """Its activations can be written to a cache."""

    input_hook, output_hook = "hook_resid_mid", "hook_mlp_out"

    def harvest(self, batch, dtype=torch.float32, skip_bad=False):
        return self.read(batch, dtype)[:2]


@pytest.fixture(scope="module")
def stream():
    return make_stream(num_documents=100, seed=3)[0]


@pytest.fixture(scope="module")
def cache(stream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    write_cache(folder, CacheableHarvester(), {"train": stream}, {"eval_tokens": 0}, dtype="float32")
    return ActivationCache(folder)


@pytest.fixture(params=["text", "text in small groups", "cache", "shuffled cache"])
def source(request, stream, cache, monkeypatch):
    """A function that gives a process its share of the text, and what harvests it."""
    if request.param == "text in small groups":
        monkeypatch.setattr(text, "GROUP_PIECES", 3)
    if request.param.startswith("text"):
        return lambda rank, number: (share_of(stream, rank, number), NumberHarvester())
    seed = 5 if request.param.startswith("shuffled") else None
    return lambda rank, number: (CachedTokens(cache, "train", rank, number, seed), cache)


def share_of(stream, rank, number):
    options = {"context_size": stream.context_size, "prompts_per_batch": stream.prompts_per_batch}
    return TokenStream(stream._dataset, stream.tokenizer, **options, rank=rank, world_size=number)


def make_buffers(source, number, overlap=False):
    options = {"n_batches": 3, "batch_size": 10, "overlap": overlap}
    return [ActivationBuffer(*source(rank, number), seed=rank, **options) for rank in range(number)]


def written(values, tensors):
    """A state as a checkpoint has it."""
    return json.loads(json.dumps(values)), load(save(tensors))


def changed(source, buffers, number, overlap=False):
    """The buffers of the new processes."""
    states = [written(*buffer.state_dict()) for buffer in buffers]
    new = make_buffers(source, number, overlap)
    for rank, buffer in enumerate(new):
        buffer.load_state_dict(*written(*deal_buffers(states, rank, number, torch.Generator().manual_seed(rank))))
    return new


def take(buffers, num_batches):
    """What the processes are given in so many steps."""
    given = Counter()
    for iterator in [buffer.endless() for buffer in buffers]:
        for _ in range(num_batches):
            given.update(ids_of(next(iterator)))
    return given


def drain(buffers):
    """What is left of the pass over the text that each of the processes is in."""
    return Counter(token for buffer in buffers for batch in buffer for token in ids_of(batch))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.slow
@pytest.mark.parametrize("before, after, steps", [(2, 1, 1), (1, 2, 19), (2, 3, 12), (4, 2, 7), (1, 4, 1)])
def test_nothing_is_left_out_and_little_is_read_twice(source, before, after, steps, overlap):
    expected = drain(make_buffers(source, 1))
    assert set(expected.values()) == {1} and expected.total() > 900
    old = make_buffers(source, before, overlap)
    given = take(old, steps)
    new = changed(source, old, after, overlap)
    rest = [drain([buffer]) for buffer in new]
    given += sum(rest, Counter())
    assert given.keys() == expected.keys()
    twice = given.total() - expected.total()
    assert max(given.values()) <= 2 and twice <= before * old[0].capacity
    assert {buffer.epoch for buffer in new} == {1}
    assert min(part.total() for part in rest) > 0
    assert drain(new) == expected  # from then on each reads its own share


def test_a_process_that_is_a_pass_ahead(source):
    """The shorter share of the text has been read, and what was read of the next pass is read again."""
    old = make_buffers(source, 2)
    given = drain(old[:1]) + take(old[:1], 2) + take(old[1:], 5)
    new = changed(source, old, 1)
    assert new[0].epoch == 0
    given += drain(new)
    assert given.keys() == drain(make_buffers(source, 1)).keys()


def test_at_the_end_of_the_text(source):
    """What lies in the buffers is trained on, and the next pass begins."""
    old = make_buffers(source, 2)
    given = Counter()
    for buffer in old:
        for batch in buffer:
            given.update(ids_of(batch))
            if buffer._text_ended:
                break
    new = changed(source, old, 1)
    assert new[0].epoch == 1
    expected = drain(make_buffers(source, 1))
    assert given + drain(new) == expected + expected


def test_changed_twice_and_resumed_between(source):
    old = make_buffers(source, 2)
    given = take(old, 3)
    new = changed(source, old, 3)
    given += take(new, 2)
    again = make_buffers(source, 3)
    for buffer, stopped in zip(again, new, strict=True):
        buffer.load_state_dict(*written(*stopped.state_dict()))
        one, other = stopped.endless(), buffer.endless()
        for _ in range(3):
            batch = ids_of(next(one))
            assert batch == ids_of(next(other))
            given.update(batch)
    last = changed(source, again, 1)
    given += drain(last)
    assert given.keys() == drain(make_buffers(source, 1)).keys()


def test_another_text_is_refused(stream):
    one = ActivationBuffer(share_of(stream, 0, 1), NumberHarvester(), n_batches=3, batch_size=10)
    take([one], 3)
    other = make_stream(num_documents=60, seed=4)[0]
    values, tensors = deal_buffers([one.state_dict()], 1, 2, torch.Generator())
    new = ActivationBuffer(share_of(other, 1, 2), NumberHarvester(), n_batches=3, batch_size=10)
    with pytest.raises(ValueError, match=r"other tokens now"):
        new.load_state_dict(values, tensors)
    cut_otherwise = TokenStream(stream._dataset, stream.tokenizer, context_size=9, prompts_per_batch=2)
    with pytest.raises(ValueError, match=r"context_size=8.*context_size=9"):
        cut_otherwise.continue_after(values["text"]["others"])
