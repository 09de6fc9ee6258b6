"""Text to packed token blocks: what goes in comes out once, in order, whatever the files, ranks and interruptions."""

import copy
import io
import json
import os
import random
import signal
import threading
import time

import datasets
import pytest
import torch
from datasets.utils import file_utils
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_clt.harvest import text as text_module
from hf_clt.harvest.ahead import ReadAhead
from hf_clt.harvest.text import StreamError, load_text_dataset, split_document
from hf_clt.harvest.tokens import TokenStream
from hf_clt.training.processes import StopRequested, StopSignals


WORDS = "the cat sat on a mat while seven dogs watched it sleep; nobody said: 'no, 42 mice!'".split()  # noqa: SIM905


def some_text(length, seed):
    """About `length` words of text, with a line break now and then."""
    generator = random.Random(seed)
    return "".join(
        generator.choice(WORDS) + ("\n" if generator.random() < 0.05 else " ") for _ in range(length)
    ).strip()


def make_tokenizer(bos=True, pad=False, prefix_space=False):
    """Byte-level BPE as in GPT-2 (or, with `prefix_space`, BPE that puts a space before its text, as in Llama 2)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if prefix_space else None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if prefix_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
        alphabet = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    specials = ["<eos>", "<bos>", "<pad>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([some_text(3000, seed=0)], trainer)
    names = {"eos_token": "<eos>", "bos_token": "<bos>" if bos else None, "pad_token": "<pad>" if pad else None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in names.items() if v})


TOKENIZER = make_tokenizer()
NO_BOS = make_tokenizer(bos=False, pad=True)
EOS, BOS = TOKENIZER.eos_token_id, TOKENIZER.bos_token_id


def as_dataset(texts, num_shards=1):
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=num_shards)


def encode(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def expected_run(texts, tokenizer=TOKENIZER):
    """(token, document) of the whole text, straight from the definition."""
    run = []
    for index, text in enumerate(texts):
        if text is not None and text.strip():
            run += [(token, index) for token in encode(text, tokenizer)] + [(tokenizer.eos_token_id, -1)]
    return run


def text_run(batches, bos):
    """(token, document) of the text tokens of batches, in order."""
    run = []
    for batch in batches:
        for ids, mask, documents in zip(batch["input_ids"], batch["attention_mask"], batch["documents"], strict=True):
            length = int(mask.sum())
            run += list(zip(ids[bos:length].tolist(), documents[bos:length].tolist(), strict=True))
    return run


def num_counted(batches):
    return sum(int(batch["counted"].sum()) for batch in batches)


def same_batches(left, right):
    return len(left) == len(right) and all(
        set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


def odd_texts(number=60, seed=1):
    generator = random.Random(seed)
    texts = [some_text(generator.choice([1, 2, 3, 7, 30, 31, 120]), seed=index) for index in range(number)]
    texts[3], texts[10], texts[11] = "", " \n\t ", None
    return texts


def words_of(pieces):
    return " ".join(pieces).split()


TEXTS = ["The cat sat.", "A mat, 'ünïcode'\nand a second line.", "Seven dogs."]


# The blocks


@pytest.mark.parametrize("prompts", [1, 3, 8])
@pytest.mark.parametrize("context_size", [3, 16, 61, 4096])
@pytest.mark.parametrize("tokenizer, bos", [(TOKENIZER, True), (TOKENIZER, False), (NO_BOS, False)])
def test_nothing_is_lost_repeated_or_moved(tokenizer, bos, context_size, prompts):
    texts = odd_texts()
    stream = TokenStream(
        as_dataset(texts), tokenizer, context_size=context_size, prepend_bos=bos, prompts_per_batch=prompts
    )
    batches = list(stream)
    assert text_run(batches, bos) == expected_run(texts, tokenizer)
    for batch in batches[:-1]:
        assert batch["input_ids"].shape == (prompts, context_size)
        assert batch["attention_mask"].all()
    assert batches[-1]["attention_mask"][:-1].all()


@pytest.mark.parametrize("bos", [True, False])
def test_dtypes_bos_padding_and_what_counts(bos):
    width = 23
    texts = odd_texts()
    batches = list(TokenStream(as_dataset(texts), NO_BOS if not bos else TOKENIZER, context_size=width))
    padding = EOS if bos else NO_BOS.eos_token_id  # whether there is a padding token or not
    seen_padding = False
    for batch in batches:
        assert {key: value.dtype for key, value in batch.items()} == {
            "input_ids": torch.int64,
            "attention_mask": torch.int64,
            "counted": torch.bool,
            "documents": torch.int64,
        }
        for ids, mask, counted, documents in zip(*(batch[key].tolist() for key in batch), strict=True):
            assert mask == sorted(mask, reverse=True)
            for position in range(width):
                if mask[position] == 0:
                    assert ids[position] == padding
                    seen_padding = True
                special = ids[position] in (EOS, BOS)
                assert (documents[position] == -1) == (mask[position] == 0 or special)
                assert counted[position] == (position > 0 and mask[position] == 1 and not special)
            assert (ids[0] == BOS) == bos
    assert seen_padding


def test_special_tokens_count_when_they_are_not_excluded():
    texts = ["the cat", "a mat <pad> sat", "seven dogs"] * 5
    kept, excluded = (
        list(TokenStream(as_dataset(texts), NO_BOS, context_size=8, exclude_special_tokens=exclude))
        for exclude in (False, True)
    )
    ids = torch.cat([batch["input_ids"] for batch in kept])
    mask = torch.cat([batch["attention_mask"] for batch in kept]).bool()
    text = mask & (torch.arange(8) > 0)
    special = (ids == NO_BOS.eos_token_id) | (ids == NO_BOS.pad_token_id)
    assert (special & text & (ids == NO_BOS.pad_token_id)).any()
    assert torch.equal(torch.cat([batch["counted"] for batch in kept]), text)
    assert torch.equal(torch.cat([batch["counted"] for batch in excluded]), text & ~special)


def test_special_tokens_that_only_the_tokenizer_file_names_are_excluded():
    tokenizer = make_tokenizer(bos=False)
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    index = tokenizer.convert_tokens_to_ids("<think>")
    batches = list(TokenStream(as_dataset(["the cat <think> sat"] * 9), tokenizer, context_size=8))
    ids, counted = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "counted"))
    assert (ids == index).any()
    assert not counted[ids == index].any()


def test_each_epoch_is_the_same_and_rewind_goes_back():
    stream = TokenStream(as_dataset(odd_texts(), num_shards=3), TOKENIZER, context_size=16)
    first = list(stream)
    assert same_batches(first, list(stream))
    for _, batch in zip(range(3), stream, strict=False):
        assert batch["input_ids"].shape == (8, 16)
    assert same_batches(first[3:], list(stream))  # leaving a loop loses nothing
    next(iter(stream))
    stream.rewind()
    assert same_batches(first, list(stream))


# Long documents


@pytest.mark.parametrize("tokenizer", [TOKENIZER, make_tokenizer(prefix_space=True)], ids=["gpt2", "llama2"])
def test_a_document_in_pieces_has_the_tokens_of_the_whole(tokenizer):
    texts = ["a mat", some_text(30_000, seed=5), "the cat"]
    assert len(texts[1]) > 6 * text_module.PIECE_CHARACTERS
    batches = list(TokenStream(as_dataset(texts), tokenizer, context_size=128))
    assert text_run(batches, True) == expected_run(texts, tokenizer)


@pytest.mark.parametrize("text", ["x" * 50_000, "x\n" * 25_000, "  \n" * 20_000, "ab  cd\t" * 8_000, "字" * 40_000])
def test_text_without_single_spaces_is_cut_without_loss(text):
    pieces = list(split_document(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= text_module.PIECE_CHARACTERS for piece in pieces)
    assert words_of(split_document(text, drop_space=True)) == words_of(pieces)
    if text.strip():
        run = text_run(TokenStream(as_dataset([text]), TOKENIZER, context_size=64), True)
        assert TOKENIZER.decode([token for token, document in run if document == 0]) == text


@pytest.mark.slow
def test_a_huge_document_takes_bounded_time_and_is_whole():
    text = some_text(210_000, seed=3) + "\n"
    text *= 10
    assert len(text) > 10_000_000
    stream = TokenStream(as_dataset([text]), TOKENIZER, context_size=128, heldout_tokens=1000)
    start = time.process_time()  # of this process: the machine may be busy
    training = list(stream)
    seconds = time.process_time() - start
    heldout = TokenStream(as_dataset([text]), TOKENIZER, context_size=128, heldout_tokens=1000, heldout=True)
    run = text_run(heldout, True) + text_run(training, True)
    assert run[-1] == (EOS, -1)
    assert TOKENIZER.decode([token for token, _ in run[:-1]]) == text
    assert len(run) / seconds > 100_000, f"{len(run) / seconds:.0f} tokens/s"


# Held-out text and ranks


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("heldout_tokens", [1, 50, 333])
@pytest.mark.parametrize("text_per_block", [2, 16])
def test_heldout_and_training_text_are_the_whole_text(text_per_block, heldout_tokens, bos):
    texts = odd_texts()
    options = {"context_size": text_per_block + bos, "prepend_bos": bos, "heldout_tokens": heldout_tokens}
    heldout = list(TokenStream(as_dataset(texts), TOKENIZER, heldout=True, **options))
    training = list(TokenStream(as_dataset(texts), TOKENIZER, **options))
    assert text_run(heldout, bos) + text_run(training, bos) == expected_run(texts)
    assert num_counted(heldout) >= heldout_tokens
    documents = {document for _, document in text_run(heldout, bos)} - {-1}
    assert documents.isdisjoint(document for _, document in text_run(training, bos) if document >= 0)
    # only enough: without its last document it would be too short
    shorter = (
        list(TokenStream(as_dataset(texts[: max(documents)]), TOKENIZER, **{**options, "heldout_tokens": 0}))
        if max(documents) > 0
        else []
    )
    assert num_counted(shorter) < heldout_tokens


def test_a_long_document_is_held_out_piece_by_piece():
    text = some_text(60_000, seed=8)
    options = {"context_size": 64, "heldout_tokens": 6_000}
    heldout, training = (
        text_run(TokenStream(as_dataset([text]), TOKENIZER, heldout=held, **options), True) for held in (True, False)
    )
    assert 6_000 < len(heldout) < 20_000
    assert heldout + training == expected_run([text])


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_documents(world_size, heldout):
    texts = odd_texts(80)
    options = {"context_size": 16, "heldout_tokens": 700, "heldout": heldout}
    alone = text_run(TokenStream(as_dataset(texts), TOKENIZER, **options), True)
    shares = [
        text_run(TokenStream(as_dataset(texts), TOKENIZER, rank=rank, world_size=world_size, **options), True)
        for rank in range(world_size)
    ]
    documents = [{document for _, document in share} - {-1} for share in shares]
    assert all(documents)
    assert sum(map(len, documents)) == len(set().union(*documents))
    assert set().union(*documents) == {document for _, document in alone} - {-1}
    for share in shares:
        kept = {document for _, document in share} - {-1}
        assert share == expected_run([text if index in kept else None for index, text in enumerate(texts)])


def test_ranks_share_documents_evenly_when_every_second_row_is_empty():
    texts = [text for index in range(40) for text in ("", some_text(20, seed=index))]
    lengths = [
        len(text_run(TokenStream(as_dataset(texts), TOKENIZER, rank=rank, world_size=2), True)) for rank in (0, 1)
    ]
    assert 0.8 < lengths[0] / lengths[1] < 1.25


def test_ranks_share_one_long_document():
    text = some_text(50_000, seed=4)
    shares = [text_run(TokenStream(as_dataset([text]), TOKENIZER, rank=rank, world_size=2), True) for rank in (0, 1)]
    parts = [[[]], [[]]]
    for share, pieces in zip(shares, parts, strict=True):
        for token, document in share:
            if document == -1:
                pieces.append([])
            else:
                pieces[-1].append(token)
        assert pieces.pop() == []
    order = [piece for pair in zip(parts[0], parts[1] + [[]], strict=False) for piece in pair]
    assert [token for piece in order for token in piece] == encode(text)
    assert abs(len(parts[0]) - len(parts[1])) <= 1


# Resuming


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
@pytest.mark.parametrize("case", ["shards", "long", "heldout", "max_samples", "shuffled", "filtered"])
def test_resumed_at_every_batch_the_rest_is_the_same(monkeypatch, case, rank, world_size):
    monkeypatch.setattr(
        text_module, "GROUP_CHARACTERS", 700
    )  # many groups, so that states fall within and between them
    texts = odd_texts(60)
    if case == "long":
        monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 300)
        texts[5], texts[30] = some_text(900, seed=1), some_text(700, seed=2)
    dataset = as_dataset(texts, num_shards=4 if case == "shards" else 1)
    if case == "max_samples":
        dataset = dataset.select_columns(["text"]).take(50)
    if case == "shuffled":
        dataset = dataset.shuffle(seed=3, buffer_size=17)  # its own state is not exact
    if case == "filtered":
        dataset = dataset.map(lambda row: row).filter(lambda row: row["text"] != "the cat")
    options = {"context_size": 24, "prompts_per_batch": 3, "rank": rank, "world_size": world_size}
    options |= {"heldout_tokens": 500, "heldout": case == "heldout"}
    stream = TokenStream(dataset, TOKENIZER, **options)
    whole, states = [], [json.dumps(stream.state_dict())]
    for batch in stream:
        whole.append(batch)
        states.append(json.dumps(stream.state_dict()))
    assert len(whole) > 3
    for number, state in enumerate(states):
        resumed = TokenStream(dataset, TOKENIZER, **options)
        resumed.load_state_dict(json.loads(state))
        assert json.loads(state) == json.loads(json.dumps(resumed.state_dict()))
        assert same_batches(list(resumed), whole[number:]), f"resumed after batch {number}"
    assert same_batches(list(resumed), whole), "the epoch after"


def test_resuming_with_other_batch_sizes_goes_on_with_the_same_blocks():
    texts = odd_texts()
    small = TokenStream(as_dataset(texts), TOKENIZER, context_size=16, prompts_per_batch=1)
    iterator = iter(small)
    head = [next(iterator) for _ in range(5)]
    large = TokenStream(as_dataset(texts), TOKENIZER, context_size=16, prompts_per_batch=8)
    large.load_state_dict(small.state_dict())
    assert text_run(head, True) + text_run(large, True) == expected_run(texts)


def test_a_state_from_other_settings_or_text_is_refused():
    texts = odd_texts()
    stream = TokenStream(as_dataset(texts), TOKENIZER, context_size=16)
    next(iter(stream))
    state = stream.state_dict()
    with pytest.raises(ValueError, match=r"context_size=16.*context_size=32"):
        TokenStream(as_dataset(texts), TOKENIZER, context_size=32).load_state_dict(state)
    with pytest.raises(ValueError, match=r"rank=0.*rank=1"):
        TokenStream(as_dataset(texts), TOKENIZER, context_size=16, rank=1, world_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match="holds other tokens now"):
        TokenStream(as_dataset(["other"] + texts), TOKENIZER, context_size=16).load_state_dict(state)


def test_an_error_in_between_loses_nothing(monkeypatch):
    monkeypatch.setattr(text_module, "GROUP_CHARACTERS", 200)
    texts = odd_texts()
    stream = TokenStream(as_dataset(texts), TOKENIZER, context_size=16, prompts_per_batch=4)
    whole = list(stream)
    tokenize, calls = stream._tokenize, []

    def flaky(group):
        calls.append(group)
        if len(calls) in (3, 6, 7):
            raise Interrupted
        return tokenize(group)

    monkeypatch.setattr(stream, "_tokenize", flaky)
    batches, failures = [], 0
    while len(batches) < len(whole):
        try:
            batches.extend(stream)  # keeps what came before the error
        except Interrupted:
            failures += 1
    assert failures == 3
    assert same_batches(batches, whole)


# A connection that breaks


class NetworkError(Exception):
    """As those of aiohttp and httpx: no OSError."""


NetworkError.__module__ = "httpx._exceptions"


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that datasets waited for; the test does not wait."""
    pauses = []
    monkeypatch.setattr(file_utils.time, "sleep", pauses.append)
    return pauses


def breaking(texts, failures, error):
    """A dataset that raises `error` at each row named in `failures`, as often as its number says."""
    left = dict(failures)

    def rows():
        for number, text in enumerate(texts):
            if left.get(number, 0) > 0:
                left[number] -= 1
                raise error
            yield {"text": text}

    return datasets.IterableDataset.from_generator(rows)


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route"),
        ConnectionResetError(104, "reset"),
        TimeoutError(),
        NetworkError("closed"),
        FileNotFoundError("gone"),
        PermissionError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_text_that_breaks_off_can_be_read_on_where_it_was(monkeypatch, error):
    monkeypatch.setattr(text_module, "GROUP_CHARACTERS", 200)
    texts = odd_texts()
    options = {"context_size": 16, "prompts_per_batch": 4, "heldout_tokens": 100}
    whole = list(TokenStream(as_dataset(texts), TOKENIZER, **options))
    stream = TokenStream(breaking(texts, {25: 3, 40: 1, 59: 2}, error), TOKENIZER, **options)
    batches, failures = [], 0
    while failures < 6:
        with pytest.raises(StreamError, match=rf"^the text cannot be read, .*5 \({type(error).__name__}: .*\)$"):
            batches.extend(stream)
        failures += 1
    state = json.loads(json.dumps(stream.state_dict()))
    rest = list(stream)
    assert batches and rest and same_batches(batches + rest, whole)
    resumed = TokenStream(as_dataset(texts), TOKENIZER, **options)
    resumed.load_state_dict(state)
    assert same_batches(list(resumed), rest)


def test_text_that_breaks_off_elsewhere(monkeypatch):
    monkeypatch.setattr(text_module, "GROUP_CHARACTERS", 200)
    options = {"context_size": 16, "prompts_per_batch": 4}
    with pytest.raises(StreamError):
        TokenStream(breaking(odd_texts(), {0: 1}, OSError("gone")), TOKENIZER, **options)
    stream = TokenStream(as_dataset(odd_texts()), TOKENIZER, **options)
    states = [stream.state_dict() for _ in stream]
    other = TokenStream(breaking(odd_texts(), {40: 1}, OSError("gone")), TOKENIZER, **options)
    with pytest.raises(StreamError):
        other.load_state_dict(states[-1])
    assert not other.is_reading


WRONG = [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), ValueError("bad"), TypeError("bad"), KeyError("x")]


@pytest.mark.parametrize("error", WRONG, ids=lambda error: type(error).__name__)
def test_errors_in_the_text_itself_are_raised_unchanged(error):
    with pytest.raises((type(error), ValueError)):
        list(TokenStream(breaking(odd_texts(), {30: 1}, error), TOKENIZER, context_size=16))


class Gone(io.BytesIO):
    """A file at the other end of a connection that is interrupted, as datasets wraps it."""

    def __init__(self, failures):
        super().__init__(b"some words " * 20)
        self.failures = failures

    def read(self, *arguments):
        self.failures -= 1
        if self.failures >= 0:
            raise file_utils.httpx.ConnectError("no route")
        return super().read(*arguments)


@pytest.mark.parametrize("retries", [0, 3])
def test_datasets_tries_again_as_often_as_was_asked_for(pauses, retries):
    def rows(failures):
        yield {"text": file_utils._add_retries_to_file_obj_read_method(Gone(failures)).read().decode()}

    def stream(failures):
        dataset = datasets.IterableDataset.from_generator(rows, gen_kwargs={"failures": failures})
        return TokenStream(dataset, TOKENIZER, context_size=16, retries=retries)

    assert list(stream(retries)) and pauses == [5] * 2 * retries  # looked at, then read
    with pytest.raises(StreamError, match=rf"stream_retries={retries} \(ConnectError: no route\)"):
        stream(retries + 1)
    assert datasets.config.STREAMING_READ_MAX_RETRIES == 20


# Read ahead


def events(stream, epochs):
    """Batches, errors and positions of a stream, in order."""
    found, epoch = [], 0
    while epoch < epochs:
        found.append(json.dumps(stream.state_dict()))
        try:
            for batch in stream:
                found += [{name: values.tolist() for name, values in batch.items()}, json.dumps(stream.state_dict())]
            epoch += 1
        except OSError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("ahead", [1, 4, 100])
def test_reading_ahead_gives_the_same_batches_positions_and_errors(monkeypatch, ahead):
    monkeypatch.setattr(text_module, "GROUP_CHARACTERS", 300)
    texts = odd_texts()
    options = {"context_size": 16, "prompts_per_batch": 4, "retries": 0}
    failures = {25: 2, 40: 1, 59: 3}
    plain = TokenStream(breaking(texts, failures, OSError("gone")), TOKENIZER, **options)
    stream = TokenStream(breaking(texts, failures, OSError("gone")), TOKENIZER, **options, read_ahead=ahead)
    expected = events(plain, epochs=2)
    assert sum("gone" in event for event in expected if isinstance(event, str)) == 6
    assert events(stream, epochs=2) == expected
    state = json.loads(expected[20])  # it goes to another place while it has read on
    next(iter(stream))
    stream.load_state_dict(state)
    plain.load_state_dict(state)
    assert events(stream, epochs=2) == events(plain, epochs=2)
    stream.rewind()
    next(iter(stream))
    stream.close()
    assert not any(thread.name == "hf_clt reads ahead" for thread in threading.enumerate())
    assert datasets.config.STREAMING_READ_MAX_RETRIES == 20  # read by two threads


def test_only_so_much_is_read_ahead():
    read = []
    ahead = ReadAhead((read.append(number) or number for number in range(100)), most=3)
    for number in range(5):
        assert ahead.take() == number
        time.sleep(0.05)
        assert len(read) == number + 1 + 3
    ahead.stop()
    ahead.join(5)
    assert len(read) == 8 and not ahead._thread.is_alive()


def test_ctrl_c_while_text_is_waited_for_ends_the_wait_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(text_module, "GROUP_CHARACTERS", 200)
    texts, go_on = odd_texts(), threading.Event()

    def rows():
        for number, text in enumerate(texts):
            if number == 40:
                go_on.wait(20)
            yield {"text": text}

    options = {"context_size": 16, "prompts_per_batch": 4}
    stream = TokenStream(datasets.IterableDataset.from_generator(rows), TOKENIZER, **options, read_ahead=5)
    batches, start = [], None
    with pytest.raises(StopRequested), StopSignals().caught(lambda: stream.is_reading, announce=False):
        for batch in stream:
            batches.append(batch)
            if len(batches) == 3:
                start = time.perf_counter()
                threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    assert time.perf_counter() - start < 10 and len(batches) > 3 and not stream.is_reading
    go_on.set()
    batches += stream
    stream.close()
    assert same_batches(batches, list(TokenStream(as_dataset(texts), TOKENIZER, **options)))


def test_bad_documents_train_as_what_is_readable_of_them(tmp_path):
    """Empty documents, white space and None are skipped; a document of one token is one."""
    word = next(word for word in WORDS if len(encode(word)) == 1)
    texts = ["", word, None, " \n", some_text(40, seed=1), "", word, "\ufffd\x00"]
    assert text_run(TokenStream(as_dataset(texts), TOKENIZER, context_size=8), True) == expected_run(texts)
    (tmp_path / "broken.jsonl").write_bytes(b'{"text": "a mat"}\n' * 3 + b'{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="cannot be read"):
        list(TokenStream(load_text_dataset(str(tmp_path / "broken.jsonl")), TOKENIZER, context_size=8))


def test_streams_on_one_dataset_do_not_disturb_each_other():
    dataset = as_dataset(odd_texts(), num_shards=2)
    options = {"context_size": 16, "prompts_per_batch": 2, "heldout_tokens": 300}
    alone = [list(TokenStream(dataset, TOKENIZER, heldout=heldout, **options)) for heldout in (False, True)]
    training = TokenStream(dataset, TOKENIZER, **options)
    evaluation = TokenStream(dataset, TOKENIZER, heldout=True, **options)
    batches = []
    for batch in training:
        batches.append(batch)
        assert same_batches(list(evaluation), alone[1])
    assert same_batches(batches, alone[0])


# What cannot be done


@pytest.mark.parametrize(
    "options, match",
    [
        ({"context_size": 2}, "context_size is 2: .*at least 3"),
        ({"context_size": 1, "prepend_bos": False}, "context_size is 1: .*at least 2"),
        ({"prompts_per_batch": 0}, "prompts_per_batch is 0"),
        ({"heldout_tokens": -1}, "heldout_tokens is -1"),
        ({"heldout": True}, "heldout_tokens is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"heldout_tokens": 10**6}, r"too small.*1000000.*gives \d+ tokens"),
        ({"heldout_tokens": 10**6, "heldout": True}, r"too small.*1000000.*gives \d+ tokens"),
        ({"rank": 0, "world_size": 4}, "3 of 4 processes"),
        ({"text_column": "content"}, "document 0 .*'content'.*text_column"),
    ],
)
def test_bad_stream_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        TokenStream(as_dataset(TEXTS), TOKENIZER, **options)


def test_bos_and_eos_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no BOS token"):
        TokenStream(as_dataset(TEXTS), NO_BOS, prepend_bos=True)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        TokenStream(as_dataset(TEXTS), tokenizer)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="no text"):
        TokenStream(as_dataset(["", " ", None]), TOKENIZER)
    available = num_counted(list(TokenStream(as_dataset(TEXTS), TOKENIZER)))
    options = {"heldout_tokens": available}
    assert num_counted(list(TokenStream(as_dataset(TEXTS), TOKENIZER, heldout=True, **options))) == available
    with pytest.raises(ValueError, match=rf"{available} tokens .*0 of 1 "):
        TokenStream(as_dataset(TEXTS), TOKENIZER, **options)
    # one token that falls on position 0 trains nothing
    word = next(word for word in WORDS if len(encode(word)) == 1)
    with pytest.raises(ValueError, match="0 of 1 processes"):
        TokenStream(as_dataset([word]), NO_BOS)
