"""The reach curve of an audit."""

import json

import pytest

from benchmarks import reach_curve
from hf_clt.audit.samples import figure


@pytest.fixture
def audit(tmp_path):
    def result(*values):
        return {
            "figures": {"nmse": figure(values, 0), "response_cosine": {"1": figure([0.5], 0), "2": figure(values, 0)}}
        }

    subjects = {"clt": result(0.25, 0.75), "plt": result(1.0, 3.0), "random": result(5.0, 5.0)}
    path = tmp_path / "audit.json"
    path.write_text(json.dumps({"subjects": list(subjects), "blocks": {"reconstruction": subjects}}))
    return path


def test_columns_are_by_reach_and_figures_those_of_the_audit(audit, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    reach_curve.main([str(audit), str(tmp_path / "reach.png"), "clt=30", "plt=1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["figure", "reach", "1", "reach", "30", "random"]
    nmse, cosine = (next(line for line in lines if line.startswith(name)) for name in ("nmse", "response_cosine 2"))
    assert nmse.split()[1::4] == ["2", "0.5", "5"] and cosine.split()[2::4] == ["2", "0.5", "5"]
    assert (tmp_path / "reach.png").stat().st_size > 10_000


def test_a_column_that_is_not_there_is_named(audit, tmp_path, capsys):
    assert reach_curve.main([str(audit), str(tmp_path / "reach.png"), "none=1"]) == 2
    assert "subjects=['none'] are not in the audit" in capsys.readouterr().err
    for given in ("clt", "clt=", "30"):
        assert reach_curve.main([str(audit), str(tmp_path / "reach.png"), given]) == 2
        assert f"subjects={given!r} is not a column and its reach" in capsys.readouterr().err
