"""Files that are written whole, JSON, and numbers in words."""

import json
import math
from pathlib import Path

import pytest

from hf_clt.files import as_json, format_duration, format_number, format_size, read_json, write_json, write_text


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")
    original = Path.write_text

    def write_half(self, text, **kwargs):
        original(self, text[:3], **kwargs)
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="no space left"):
            write_text(path, "new text")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_has_lists_on_one_line_and_null_for_what_is_not_finite(tmp_path):
    record = {"a": [1, 2.5, math.nan], "b": {"c": [], "d": [[1, 2], [3]]}, "e": "[\n 1,\n 2\n]", "f": -math.inf}
    text = as_json(record)
    expected = {**record, "a": [1, 2.5, None], "f": None}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert '"a": [1, 2.5, null]' in text and text.endswith("}\n") and text.count("\n") > 6
    assert as_json(record, indent=None).count("\n") == 1
    write_json(tmp_path / "record.json", record)
    assert read_json(tmp_path / "record.json") == expected


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json .*JSON"):
        read_json(tmp_path / "broken.json")


def test_numbers_in_words():
    assert [format_number(value, ".1%") for value in (0.256, None)] == ["25.6%", "-"]
    sizes = {0: "0 B", 999: "999 B", 3_140: "3.1 kB", 2_000_000: "2.0 MB", 1_234.5e9: "1,234.5 GB"}
    assert {size: format_size(size) for size in sizes} == sizes
    times = {0.4: "0 s", 59.6: "1 min 0 s", 303: "5 min 3 s", 3725.4: "1 h 2 min"}
    assert {seconds: format_duration(seconds) for seconds in times} == times
