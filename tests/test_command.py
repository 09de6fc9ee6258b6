"""One line for what a user can mend, a traceback for the rest."""

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
