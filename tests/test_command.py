"""One line for what a user can mend, a traceback for the rest."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_clt.command import OneLineParser, one_line_errors


def failing(error, *others):
    @one_line_errors(*others)
    def main(argv=None):
        raise error

    return main


def test_what_a_user_can_mend_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("HF_CLT_DEBUG", raising=False)
    assert failing(ValueError("k=0\n  is below 1"))([]) == 2
    assert capsys.readouterr().err == "error: k=0 is below 1\n"
    assert failing(FileNotFoundError("no such file"))([]) == 2
    assert failing(RuntimeError("the process ended"), RuntimeError)([]) == 2
    assert capsys.readouterr().err == "error: no such file\nerror: the process ended\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(RuntimeError):
        failing(RuntimeError("a bug"))([])
    monkeypatch.setenv("HF_CLT_DEBUG", "1")
    with pytest.raises(ValueError):
        failing(ValueError("k=0"))([])


def test_the_status_is_that_of_main():
    assert one_line_errors()(lambda argv: None)([]) == 0
    assert one_line_errors()(lambda argv: 130)([]) == 130


def test_wrong_options_are_such_an_error(capsys):
    @one_line_errors()
    def main(argv=None):
        OneLineParser(prog="x").parse_args(argv)

    assert main(["--nothing"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nothing; see --help\n"


def test_home_is_expanded_where_no_shell_does_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = OneLineParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--note")
    options = parser.parse_args(["~/clt", "--output=~/pages", "--note", "about ~/x"])
    assert (options.folder, options.output, options.note) == (tmp_path / "clt", tmp_path / "pages", "about ~/x")


def test_a_reader_that_has_read_enough_is_no_error():
    code = (
        "from hf_clt.command import one_line_errors\n"
        "@one_line_errors()\n"
        "def main(argv=None):\n"
        "    print('x' * 10**6)\n"
        "raise SystemExit(main([]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
