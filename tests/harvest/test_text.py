"""Opening text: what the files or the Hub hold is read in order, and what cannot be read is refused in one line."""

import json

import datasets
import pytest

from hf_clt.harvest.text import load_text_dataset
from hf_clt.harvest.tokens import TokenStream
from tests.harvest.test_tokens import TEXTS, TOKENIZER, expected_run, odd_texts, same_batches, text_run


def write(path, texts, column="text"):
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{column: text, "id": 1} for text in texts]), encoding="utf-8")
    else:
        datasets.Dataset.from_dict({"id": list(range(len(texts))), column: texts}).to_parquet(path)
    return path


def read(dataset, column="text"):
    return [row[column].rstrip("\n") for row in dataset]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "od[d] * name.JSONL"])
def test_local_files(tmp_path, name, streaming):
    path = write(tmp_path / name.lower(), TEXTS).rename(tmp_path / name)
    write(tmp_path / "od[d] x name.jsonl", ["matched only if the name were a pattern"])
    dataset = load_text_dataset(str(path), streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset)
    assert read(dataset) == TEXTS
    assert all(set(row) == {"text"} for row in dataset)
    assert read(load_text_dataset(path, max_samples=2)) == TEXTS[:2]
    assert read(load_text_dataset(path, max_samples=99)) == TEXTS


@pytest.mark.parametrize("suffixes", [[".txt"] * 3, [".jsonl", ".json", ".jsonl"], [".parquet"] * 3])
def test_a_folder_is_read_in_the_order_of_names(tmp_path, suffixes):
    for name, suffix, text in zip(["b", "c", "a"], suffixes, TEXTS, strict=True):
        write(tmp_path / f"{name}{suffix}", [text])
    assert read(load_text_dataset(str(tmp_path))) == [TEXTS[2], TEXTS[0], TEXTS[1]]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_streams_over_files_resume(tmp_path, suffix):
    texts = [text for text in odd_texts(200) if text and text.strip()]
    for name, part in (("a", texts[:70]), ("b", texts[70:])):
        write(tmp_path / f"{name}{suffix}", part)
    dataset = load_text_dataset(str(tmp_path), max_samples=180)
    stream = TokenStream(dataset, TOKENIZER, context_size=32)
    whole, states = [], []
    for batch in stream:
        whole.append(batch)
        states.append(json.dumps(stream.state_dict()))
    assert {document for _, document in text_run(whole, True)} == {-1, *range(180)}
    for number in range(0, len(whole), 5):
        resumed = TokenStream(load_text_dataset(str(tmp_path), max_samples=180), TOKENIZER, context_size=32)
        resumed.load_state_dict(json.loads(states[number]))
        assert same_batches(list(resumed), whole[number + 1 :])


def test_other_column_names(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS, column="content")
    dataset = load_text_dataset(path, text_column="content")
    run = text_run(TokenStream(dataset, TOKENIZER, text_column="content"), True)
    assert run == expected_run(TEXTS)
    with pytest.raises(ValueError, match=r"no column 'text'.*id, content"):
        load_text_dataset(path)


def test_files_of_other_kinds_are_left_out_with_a_warning(tmp_path, caplog):
    write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "README.md").write_text("about")
    assert read(load_text_dataset(tmp_path)) == TEXTS
    assert "README.md" in caplog.text


# Bad input


def refuse(match, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as info:
        load_text_dataset(*args, **kwargs)
    assert "\n" not in str(info.value)
    return info.value


def test_bad_paths_are_refused(tmp_path):
    for name in (tmp_path / "none", "./none", "none.txt", "none/none.parquet"):
        refuse("no such file or folder", str(name))
    refuse("holds no .*no files", str(tmp_path))
    (tmp_path / "a.csv").write_text("text\nhello\n")
    refuse("holds no .*a.csv", str(tmp_path))
    refuse("is not one of .txt", str(tmp_path / "a.csv"))
    write(tmp_path / "a.txt", TEXTS)
    write(tmp_path / "b.parquet", TEXTS)
    refuse("mixes .parquet and .txt", str(tmp_path))


def test_bad_requests_on_good_files_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    refuse("no split 'test'.*'train'", str(path), split="test")
    refuse("a::b.*cannot be read", write(tmp_path / "a::b.jsonl", TEXTS))
    refuse("no configurations", str(path), config_name="en")
    for number in (0, -1):
        refuse(f"max_samples is {number}", str(path), max_samples=number)
    refuse("no column 'txt'.*id, text", str(path), text_column="txt")
    refuse("no column 'content'.*text", str(write(tmp_path / "a.txt", TEXTS)), text_column="content")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_empty_and_broken_files_are_refused(tmp_path, suffix):
    empty, broken = tmp_path / f"empty{suffix}", tmp_path / f"broken{suffix}"
    empty.write_bytes(b"")
    refuse("empty", str(empty))
    broken.write_bytes(b'{"text": "\xff\xfe')
    assert refuse("cannot be read", str(broken)).__cause__ is not None


def test_a_folder_written_by_save_to_disk_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    refuse("save_to_disk", str(tmp_path / "saved"))


def test_without_a_hub_an_unknown_name_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for streaming in (True, False):
        error = refuse("'nobody/nothing' .*Hub", "nobody/nothing", streaming=streaming)
        assert error.__cause__ is not None


@pytest.mark.parametrize("streaming", [True, False])
def test_what_the_hub_may_answer(monkeypatch, streaming):
    """The Hub's side is replaced by what load_dataset gives or raises for it."""
    data = datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]})
    asked = []

    def load_dataset(name, config_name=None, split=None, streaming=False):
        asked.append((name, config_name))
        if name == "code/script":
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        if config_name == "xx":
            raise ValueError("BuilderConfig 'xx' not found.\nAvailable: ['en', 'fr']")
        if split not in (None, "train"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'validation'].")
        one = data.to_iterable_dataset() if streaming else data
        return one if split else {"train": one, "validation": one}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(load_text_dataset("some/text", config_name="en", streaming=streaming)) == TEXTS
    assert asked == [("some/text", "en")]
    refuse("test.*train.*validation", "some/text", split="test", streaming=streaming)
    refuse("'en', 'fr'", "some/text", config_name="xx", streaming=streaming)
    refuse("scripts are no longer supported", "code/script", streaming=streaming)
    refuse("no column 'content'.*text, id", "some/text", text_column="content", streaming=streaming)


def test_documents_that_are_not_text_are_named(tmp_path):
    rows = datasets.Dataset.from_dict({"text": [1, 2]})
    with pytest.raises(ValueError, match=r"document 0 .* holds a int"):
        TokenStream(rows, TOKENIZER)
    for value, kind in (([1, 2], "list"), ({"role": "user"}, "dict"), (1.5, "float"), (True, "bool")):
        (tmp_path / "other.jsonl").write_text(json.dumps({"text": value}) + "\n")
        with pytest.raises(ValueError, match=f"document 0 .* holds a {kind}"):
            TokenStream(load_text_dataset(tmp_path / "other.jsonl"), TOKENIZER)
    (tmp_path / "other.jsonl").unlink()
    with pytest.raises(TypeError, match="DatasetDict"):
        TokenStream(datasets.DatasetDict({"train": rows}), TOKENIZER)
    write(tmp_path / "a.jsonl", TEXTS)
    write(tmp_path / "b.jsonl", TEXTS, column="content")
    with pytest.raises(ValueError, match=r"document 3 .*text"):
        list(TokenStream(load_text_dataset(tmp_path), TOKENIZER))


def test_a_broken_file_behind_a_good_one_is_named(tmp_path):
    write(tmp_path / "a.txt", TEXTS)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"document 3 .*cannot be read.*utf-8"):
        list(TokenStream(load_text_dataset(tmp_path), TOKENIZER))
