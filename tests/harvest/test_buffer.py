"""
The buffer hands out every counted token once per epoch, mixed, aligned, and resumable at every batch.

Most tests read a text in which no word occurs twice through a harvester whose activations are the number of the word,
so that each row says which token, layer and side it is. The last ones run a real language model.
"""

import json
import random

import datasets
import pytest
import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from hf_clt import ActivationBuffer
from hf_clt.harvest.dealing import deal_buffers
from hf_clt.harvest.harvester import ActivationError, Harvester, load_language_model
from hf_clt.harvest.text import load_text_dataset
from hf_clt.harvest.tokens import TokenStream


LAYERS, WIDTH = 3, 2


class NumberHarvester:
    """Activations that tell their token: inputs are id + layer / 4, labels -(id + layer / 4), in every dimension."""

    num_layers, d_model = LAYERS, WIDTH
    device = torch.device("cpu")

    def read(self, batch, dtype=torch.float32):
        ids = batch["input_ids"][batch["counted"]].to(dtype)
        inputs = (ids[:, None] + torch.arange(LAYERS) / 4)[..., None].expand(-1, -1, WIDTH).to(dtype)
        return inputs, -inputs, inputs.sum()

    def check(self, batch, inputs, labels, total):
        assert torch.equal(total, inputs.sum())


def make_stream(num_documents=30, context_size=8, prompts_per_batch=2, seed=0):
    """A stream over documents of 1 to 20 words, no word twice; and the document that each word id is in."""
    generator = random.Random(seed)
    lengths = [generator.randint(1, 20) for _ in range(num_documents)]
    vocabulary = {"<eos>": 0, "<bos>": 1} | {f"w{i}": i + 2 for i in range(sum(lengths))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", bos_token="<bos>")
    starts = [sum(lengths[:i]) for i in range(num_documents)]
    texts = [" ".join(f"w{start + i}" for i in range(n)) for start, n in zip(starts, lengths, strict=True)]
    dataset = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
    stream = TokenStream(dataset, tokenizer, context_size=context_size, prompts_per_batch=prompts_per_batch)
    return stream, {
        start + i + 2: d for d, (start, n) in enumerate(zip(starts, lengths, strict=True)) for i in range(n)
    }


def make_buffer(n_batches=4, batch_size=10, seed=0, overlap=False, passes=1, **stream):
    stream = make_stream(**stream)[0]
    shape = {"n_batches": n_batches, "batch_size": batch_size, "passes": passes}
    return ActivationBuffer(stream, NumberHarvester(), seed=seed, overlap=overlap, **shape)


def ids_of(batch):
    return batch["inputs"][:, 0, 0].int().tolist()


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"inputs", "labels"}
        assert torch.equal(a["inputs"], b["inputs"])
        assert torch.equal(a["labels"], b["labels"])


# One epoch


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("n_batches", [2, 4, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 10, 13, 25])
def test_every_counted_token_once_per_epoch_or_so_many_times_as_there_are_passes(n_batches, batch_size, passes):
    documents = make_stream()[1]
    buffer = make_buffer(n_batches, batch_size, passes=passes)
    for epoch in range(3):
        assert buffer.epoch == epoch
        seen = [number for batch in buffer for number in ids_of(batch)]
        assert sorted(seen) == sorted(list(documents) * passes)  # BOS, EOS and padding never


def test_more_passes_harvest_no_more():
    """The same extraction batches once each, and between fills, which come when half of the reads is done, none."""
    plain, buffer = make_buffer(n_batches=8), make_buffer(n_batches=8, passes=3)
    list(plain)
    fills = []
    for _ in buffer:
        fills.append(buffer.num_harvested)
    assert buffer.num_harvested == plain.num_harvested
    assert 4 < len(set(fills)) < len(fills) / 3


def test_inputs_and_labels_of_all_layers_stay_aligned():
    for batch in make_buffer():
        inputs, labels = batch["inputs"], batch["labels"]
        assert inputs.shape == labels.shape == (len(inputs), LAYERS, WIDTH)
        expected = inputs[:, :1, :1] + torch.arange(LAYERS)[:, None] / 4
        assert torch.equal(inputs, expected.expand(-1, -1, WIDTH))
        assert torch.equal(labels, -inputs)


def test_only_the_last_batch_is_short():
    documents = make_stream()[1]
    buffer = make_buffer(batch_size=10)
    for _ in range(2):
        sizes = [len(batch["inputs"]) for batch in buffer]
        assert sizes[:-1] == [10] * (len(documents) // 10)
        assert sizes[-1] == len(documents) % 10 != 0


def test_a_batch_as_large_as_half_the_buffer_is_full_too():
    buffer = make_buffer(n_batches=4, batch_size=28, num_documents=60)  # capacity 56, with at most 14 from a harvest
    sizes = [len(batch["inputs"]) for batch in buffer]
    assert len(sizes) > 5
    assert set(sizes[:-1]) == {28}


def test_refilled_when_half_is_read():
    """Between refills nothing is harvested; a refill comes at the first batch with half or less unread."""
    buffer = make_buffer(n_batches=8, batch_size=5, num_documents=200)
    batches = iter(buffer)
    next(batches)
    assert buffer.capacity == 8 * 2 * 7
    refills = 0
    for _ in range(100):
        unread, harvested = buffer.num_unread, buffer.num_harvested
        next(batches)
        if unread > buffer.capacity // 2:
            assert buffer.num_harvested == harvested
            assert buffer.num_unread == unread - 5
        else:
            refills += 1
            assert buffer.num_harvested > harvested
            # All that fits goes in: less than one extraction batch stays free.
            assert buffer.num_unread + 5 > buffer.capacity - buffer.rows_per_harvest
    assert refills > 3


def test_a_batch_mixes_documents_of_the_whole_buffer():
    stream, documents = make_stream(num_documents=100)
    buffer = ActivationBuffer(stream, NumberHarvester(), n_batches=20, batch_size=40)
    first = ids_of(next(iter(buffer)))
    reach = max(buffer.order.numel(), 1)  # tokens that were in the buffer
    places = sorted(sorted(documents).index(number) for number in first)
    # 40 of 280: were they taken in order, the last would stand at 40, and from few documents.
    assert places[0] < reach / 4
    assert places[-1] > reach * 3 / 4
    assert len({documents[number] for number in first}) > 12


def test_the_order_depends_on_the_seed_alone():
    def order(seed):
        return [number for batch in make_buffer(seed=seed) for number in ids_of(batch)]

    torch.manual_seed(1)
    first = order(seed=3)
    torch.manual_seed(2)
    torch.rand(5)
    state = torch.get_rng_state()
    assert order(seed=3) == first
    assert order(seed=4) != first
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the random numbers of the program alone


def test_epochs_differ_in_order():
    buffer = make_buffer(n_batches=100)
    orders = [[number for batch in buffer for number in ids_of(batch)] for _ in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_leaving_the_loop_and_coming_back_goes_on():
    whole = list(make_buffer())
    buffer = make_buffer()
    parts = []
    for batch in buffer:
        parts.append(batch)
        if len(parts) == 7:
            break
    parts.extend(buffer)
    assert_same_batches(parts, whole)


def test_endless_goes_through_epochs():
    buffer, plain = make_buffer(), make_buffer()
    expected = [batch for _ in range(3) for batch in plain]
    endless = buffer.endless()
    assert_same_batches([next(endless) for _ in expected], expected)


# What cannot be done


def test_a_batch_larger_than_the_buffer_is_refused():
    stream = make_stream()[0]  # 2 prompts of 7 tokens and BOS: 14 tokens per extraction batch
    ActivationBuffer(stream, NumberHarvester(), n_batches=2, batch_size=28)
    with pytest.raises(ValueError, match=r"batch_size=29 .*28"):
        ActivationBuffer(stream, NumberHarvester(), n_batches=2, batch_size=29)


def test_a_text_without_counted_tokens_is_refused():
    stream = make_stream(num_documents=1)[0]
    stream._counted = lambda ids, offset: torch.zeros(len(ids), dtype=torch.bool).numpy()
    buffer = ActivationBuffer(stream, NumberHarvester(), n_batches=2, batch_size=4)
    assert list(buffer) == []
    with pytest.raises(ValueError, match=r"dataset: .*no token"):
        next(buffer.endless())


def test_an_error_of_the_harvester_comes_out_as_it_is():
    class Broken(NumberHarvester):
        def read(self, batch, dtype=torch.float32):
            if batch["documents"].max() > 10:
                raise error
            return super().read(batch, dtype)

    error = ActivationError("layer 1, document 11")
    buffer = ActivationBuffer(make_stream()[0], Broken(), n_batches=4, batch_size=10)
    with pytest.raises(ActivationError) as caught:
        list(buffer)
    assert caught.value is error


# Failures


class Flaky:
    """Fails at the calls whose numbers are given."""

    def __init__(self, calls, error):
        self.calls, self.error, self.count = calls, error, 0

    def __call__(self):
        self.count += 1
        if self.count in self.calls:
            raise self.error


def not_finite(harvester, number, times):
    """The extraction batch `number` that is new is not finite so many times that it is checked."""
    read, seen, left = harvester.read, [], [times]

    def is_bad(batch):
        return left[0] > 0 and len(seen) >= number and batch is seen[number - 1]

    def failing_read(batch, dtype=torch.float32):
        inputs, labels, total = read(batch, dtype)
        if not any(batch is other for other in seen):
            seen.append(batch)
        return inputs, labels, total * torch.nan if is_bad(batch) else total

    def check(batch, inputs, labels, total):
        assert bool(total.isnan()) == is_bad(batch)
        if is_bad(batch):
            left[0] -= 1
            raise OSError("gone")

    harvester.read, harvester.check = failing_read, check


@pytest.mark.parametrize("overlap, passes", [(False, 1), (True, 1), (True, 2)], ids=["", "ahead", "ahead, 2 passes"])
@pytest.mark.parametrize("where", ["text", "model", "check"])
def test_a_failure_loses_and_repeats_nothing(where, overlap, passes):
    """Wherever it comes, the buffer can be iterated again or its state saved, and the batches are the same."""
    shape = {"batch_size": 10, "n_batches": 4, "num_documents": 40, "overlap": overlap, "passes": passes}
    whole = [batch for buffer in [make_buffer(**shape)] for _ in range(2) for batch in buffer]

    def make_failing(calls):
        buffer = make_buffer(**shape)
        if where == "check":
            not_finite(buffer.harvester, min(calls), len(calls))
            return buffer
        flaky = Flaky(calls, OSError("gone"))
        owner = buffer.tokens if where == "text" else buffer.harvester
        name = {"text": "_next_batch", "model": "read"}[where]
        method = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (flaky(), method(*args, **kwargs))[1])
        if where == "text":
            buffer.tokens.retries = 0
        return buffer

    failures = 0
    for call in (1, 2, 5, 6, 9, 14, 21, 30):  # in the first fill, in later ones, in the second epoch
        buffer = make_failing({call, call + 1})
        batches = []
        while buffer.epoch < 2:
            try:
                batches.extend(buffer)
            except OSError:
                failures += 1
                state = through_files(buffer.state_dict())
                resumed = make_buffer(**shape, seed=99)
                resumed.load_state_dict(*state)
                rest = [batch for _ in range(2 - resumed.epoch) for batch in resumed]
                assert_same_batches(batches + rest, whole)
        assert_same_batches(batches, whole)
    assert failures == 16


class NaNHarvester(NumberHarvester):
    """NaN or infinity at some tokens."""

    bad = (9, 50, 51, 200)

    def read(self, batch, dtype=torch.float32):
        inputs, labels, _ = super().read(batch, dtype)
        for token in self.bad:
            inputs[inputs[:, 0, 0] == token, 1, 1] = torch.nan
            labels[labels[:, 0, 0] == -token, 2, 0] = torch.inf
        return inputs, labels, inputs.sum() + labels.sum()

    def check(self, batch, inputs, labels, total):
        if not torch.isfinite(total):
            raise ActivationError("not finite")


@pytest.mark.parametrize("overlap", [False, True], ids=["", "ahead"])
def test_blocks_that_are_not_finite_are_skipped_and_counted(caplog, overlap):
    shape = {"n_batches": 4, "batch_size": 10, "overlap": overlap}
    blocks = [
        ids[counted].tolist()
        for batch in make_stream()[0]
        for ids, counted in zip(batch["input_ids"], batch["counted"], strict=True)
    ]
    bad = [block for block in blocks if set(block) & set(NaNHarvester.bad)]
    assert 0 < len(bad) < len(blocks)
    expected = sorted(token for block in blocks if block not in bad for token in block)
    buffer = ActivationBuffer(make_stream()[0], NaNHarvester(), skip_bad=True, **shape)
    for epoch in (1, 2):
        assert sorted(token for batch in buffer for token in ids_of(batch)) == expected
        assert buffer.skipped_tokens == epoch * sum(map(len, bad))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and messages[0].endswith("tokens are skipped, and from now on all such: not finite")


@pytest.mark.parametrize("overlap", [False, True], ids=["", "ahead"])
def test_skipping_resumes_bit_for_bit_at_every_batch(overlap):
    def make():
        stream = make_stream()[0]
        return ActivationBuffer(stream, NaNHarvester(), n_batches=4, batch_size=10, overlap=overlap, skip_bad=True)

    buffer = make()
    endless, batches, states, counts = buffer.endless(), [], [through_files(buffer.state_dict())], []
    for _ in range(60):
        batches.append(next(endless))
        states.append(through_files(buffer.state_dict()))
        counts.append(buffer.skipped_tokens)
    assert buffer.epoch >= 1 and counts[-1] > counts[0]
    for done in range(0, 60, 3):
        resumed = make()
        resumed.load_state_dict(*states[done])
        endless = resumed.endless()
        for expected, count in zip(batches[done:], counts[done:], strict=True):
            assert_same_batches([next(endless)], [expected])
            assert resumed.skipped_tokens == count


# Harvesting ahead


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("batch_size, n_batches", [(1, 4), (10, 4), (13, 7), (25, 2), (40, 100)])
def test_harvesting_ahead_gives_the_same_batches(batch_size, n_batches, passes):
    shape = {"batch_size": batch_size, "n_batches": n_batches, "num_documents": 60, "passes": passes}
    plain, ahead = make_buffer(**shape), make_buffer(**shape, overlap=True)
    for epoch in range(3):
        assert_same_batches(list(ahead), list(plain))
        assert ahead.epoch == plain.epoch == epoch + 1
        assert not ahead.ahead


def test_harvesting_ahead_spreads_the_language_models_work():
    """After the first fill no batch waits for more than it consumed, where a plain buffer refills half at once."""
    most = {}
    for overlap in (False, True):
        buffer = make_buffer(n_batches=20, batch_size=10, num_documents=300, overlap=overlap)
        counts, read = [], buffer.harvester.read
        buffer.harvester.read = lambda batch, dtype, read=read, counts=counts: counts.append(1) or read(batch, dtype)
        batches = iter(buffer)
        next(batches)
        most[overlap] = 0
        for _ in range(100):
            counts.clear()
            next(batches)
            most[overlap] = max(most[overlap], len(counts))
            assert sum(len(harvested.inputs) for harvested in buffer.ahead) <= buffer.capacity // 2 + 14
    assert most[False] >= 9
    assert most[True] <= 3  # batches of 10 tokens, harvests of up to 14 with padding among them


# Type and place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype(dtype):
    buffer = ActivationBuffer(make_stream()[0], NumberHarvester(), n_batches=4, batch_size=10, dtype=dtype)
    batch = next(iter(buffer))
    assert batch["inputs"].dtype == batch["labels"].dtype == dtype
    assert buffer.inputs.nbytes == buffer.capacity * LAYERS * WIDTH * dtype.itemsize


def test_preallocated():
    buffer = make_buffer()
    storage = buffer.inputs.data_ptr(), buffer.labels.data_ptr()
    for _ in range(2):
        list(buffer)
    assert (buffer.inputs.data_ptr(), buffer.labels.data_ptr()) == storage


def test_device():
    buffer = ActivationBuffer(make_stream()[0], NumberHarvester(), n_batches=4, batch_size=10, device="meta")
    assert buffer.inputs.device.type == buffer.labels.device.type == "meta"


class CopiesToMeta(TorchDispatchMode):
    """Counts copies to the meta device, which has no values: nothing that asks it for one goes through."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == META
        return function(*args, **(kwargs or {}))


META = torch.device("meta")


def test_a_batch_waits_for_no_device():
    """The order is copied once per fill, and whether activations are finite is asked once; meta stands for a GPU."""

    class MetaHarvester(NumberHarvester):
        def read(self, batch, dtype=torch.float32):
            inputs, labels, total = super().read(batch, dtype)
            return inputs.new_empty(inputs.shape, device=META), labels.new_empty(labels.shape, device=META), total

        def check(self, *args):
            raise AssertionError("asked for each batch")

    stream = make_stream(num_documents=200)[0]
    buffer = ActivationBuffer(stream, MetaHarvester(), n_batches=20, batch_size=5, device=META)
    fills = 0
    batches = iter(buffer)
    for _ in range(200):
        harvested = buffer.num_harvested
        with CopiesToMeta() as copies:
            batch = next(batches)
        assert batch["inputs"].device == META and batch["inputs"].shape == (5, LAYERS, WIDTH)
        filled = buffer.num_harvested > harvested
        fills += filled
        assert copies.count == (2 if filled else 0)  # the free slots and the order
    assert fills > 5


# Checkpoints


def through_files(state):
    """State as it comes back from a checkpoint's JSON and safetensors."""
    values, tensors = state
    return json.loads(json.dumps(values)), load(save({name: t.contiguous() for name, t in tensors.items()}))


@pytest.mark.parametrize("overlap", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("batch_size, n_batches", [(10, 4), (25, 2), (40, 100)])
def test_resumes_bit_for_bit_at_every_batch(batch_size, n_batches, overlap):
    """Also in the middle of the second epoch, at its end, and where the text is read and the buffer is not."""
    shape = {"batch_size": batch_size, "n_batches": n_batches, "num_documents": 20, "overlap": overlap}
    buffer = make_buffer(**shape)
    total = 3 * len([None for _ in make_buffer(**shape)])
    batches, states, epochs = [], [buffer.state_dict()], []
    endless = buffer.endless()
    for _ in range(total):
        batches.append(next(endless))
        states.append(through_files(buffer.state_dict()))
        epochs.append(buffer.epoch)
    assert any(state[0]["num_ahead"] for state in states) == (overlap and n_batches < 100)
    for done, state in enumerate(states):
        resumed = make_buffer(**shape, seed=99)  # the state holds the generator
        resumed.load_state_dict(*state)
        endless = resumed.endless()
        for expected, epoch in zip(batches[done:], epochs[done:], strict=True):
            batch = next(endless)
            assert_same_batches([batch], [expected])
            assert resumed.epoch == epoch


@pytest.mark.parametrize("overlap", [False, True], ids=["", "ahead"])
def test_resumes_without_harvesting_again_where_the_activations_are_kept(overlap):
    shape = {"batch_size": 10, "n_batches": 4, "num_documents": 20, "overlap": overlap}
    buffer = make_buffer(**shape)
    batches = iter(buffer)
    for _ in range(4):
        next(batches)
    values, tensors = buffer.state_dict()
    state = through_files((values, tensors | buffer.unread_activations()))
    resumed = make_buffer(**shape, seed=99)
    read, resumed.harvester.read = resumed.harvester.read, None
    resumed.load_state_dict(*state)
    resumed.harvester.read = read
    assert_same_batches(list(resumed), list(batches))
    again = make_buffer(**shape, seed=99)  # and a state from it needs nothing that was not restored
    resumed = make_buffer(**shape, seed=99)
    resumed.load_state_dict(*state)
    again.load_state_dict(*through_files(resumed.state_dict()))
    assert_same_batches(list(again), list(resumed))


def test_resumes_after_an_epoch_read_with_a_plain_loop():
    buffer = make_buffer()
    list(buffer)
    resumed = make_buffer()
    resumed.load_state_dict(*through_files(buffer.state_dict()))
    assert resumed.epoch == buffer.epoch == 1
    assert_same_batches(list(resumed), list(buffer))


def test_a_state_does_not_change_when_the_buffer_goes_on():
    buffer = make_buffer()
    batches = iter(buffer)
    for _ in range(5):
        next(batches)
    state = buffer.state_dict()
    before = through_files(state)
    list(buffer)
    after = through_files(state)
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_another_capacity_is_refused():
    state = make_buffer(n_batches=4).state_dict()
    with pytest.raises(ValueError, match=r"56 tokens.* 70;"):
        make_buffer(n_batches=5).load_state_dict(*state)


def test_memory_for_checkpoints_is_bounded():
    """Only the tokens of batches with unread rows are saved, and not many others are kept."""
    buffer = make_buffer(n_batches=8, batch_size=7, num_documents=300)
    most = 0
    for _ in range(2):
        for _ in buffer:
            _, tensors = buffer.state_dict()
            saved = {int(name.split(".")[1]) for name in tensors if name.startswith("tokens.")}
            assert saved == set(tensors["slot_batch"].tolist()) <= buffer.token_batches.keys()
            most = max(most, len(buffer.token_batches))
        assert buffer.token_batches == {}
    assert buffer.num_harvested > 300
    assert 8 <= most <= 8 * 6  # a row stays unread for a few refills


# With a language model


@pytest.fixture(scope="module")
def language_model(tiny_gpt2):
    return load_language_model(tiny_gpt2)


def real_buffer(language_model, text_file, **arguments):
    model, tokenizer = language_model
    stream = TokenStream(load_text_dataset(text_file), tokenizer, context_size=32, prompts_per_batch=4)
    return ActivationBuffer(stream, Harvester(model), **({"n_batches": 4, "batch_size": 50, "seed": 5} | arguments))


def test_activations_are_those_of_the_model(language_model, small_text_file):
    """As a set of rows, one epoch is what plain forward hooks see at the counted positions."""
    model = language_model[0]
    buffer = real_buffer(language_model, small_text_file)
    caught = {}
    handles = [
        handle
        for layer, block in enumerate(model.transformer.h)
        for handle in (
            block.ln_2.register_forward_pre_hook(lambda m, args, i=layer: caught.update({("in", i): args[0]})),
            block.mlp.register_forward_hook(lambda m, args, out, i=layer: caught.update({("out", i): out})),
        )
    ]
    rows = []
    with torch.no_grad():
        for batch in buffer.tokens:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            both = [torch.stack([caught[side, layer] for layer in range(2)], dim=2) for side in ("in", "out")]
            rows.append(torch.cat(both, dim=2)[batch["counted"]])
    for handle in handles:
        handle.remove()
    expected = torch.cat(rows)  # (N, 2 L, D): inputs of all layers, then labels
    found = torch.cat([torch.cat([batch["inputs"], batch["labels"]], dim=1) for batch in buffer])
    assert found.shape == expected.shape
    found, expected = found.flatten(1).double(), expected.flatten(1).double()
    # The same rows in another order. Some tokens have the same context: each row must be there as often.
    times_found = (torch.cdist(found, expected) < 1e-3).sum(dim=0)
    times_expected = (torch.cdist(expected, expected) < 1e-3).sum(dim=0)
    assert torch.equal(times_found, times_expected)


@pytest.mark.parametrize("dtype, overlap", [(torch.float32, True), (torch.bfloat16, False)])
def test_resumes_bit_for_bit_with_a_language_model(language_model, small_text_file, dtype, overlap):
    buffer = real_buffer(language_model, small_text_file, dtype=dtype, overlap=overlap)
    endless = buffer.endless()
    batches, states = [], []
    for _ in range(70):  # two epochs
        states.append(through_files(buffer.state_dict()))
        batches.append(next(endless))
    assert buffer.epoch == 2
    for done in (1, 13, 33, 34, 50):
        resumed = real_buffer(language_model, small_text_file, dtype=dtype, overlap=overlap)
        resumed.load_state_dict(*states[done])
        endless = resumed.endless()
        assert_same_batches([next(endless) for _ in batches[done:]], batches[done:])


def test_activations_that_are_not_finite_are_named(tiny_gpt2, small_text_file):
    model, tokenizer = load_language_model(tiny_gpt2)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[3] = torch.nan
    buffer = real_buffer((model, tokenizer), small_text_file)
    with pytest.raises(ActivationError, match=r"not finite .*layer 1, hook_mlp_out, document 0"):
        next(iter(buffer))


def test_a_position_of_an_older_version_is_refused_in_words():
    buffer = make_buffer()
    next(iter(buffer))
    values, tensors = buffer.state_dict()
    values["text"] = {"streams": []}
    for state in ((values, tensors), deal_buffers([(values, tensors)] * 2, 0, 1, torch.Generator())):
        with pytest.raises(ValueError, match="context_size=None"):
            make_buffer().load_state_dict(*state)
