"""The benchmark from the command line to its table, figures and plot. What is timed is not asserted."""

import json
import math
import mmap
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import machine, measure, run, steps
from benchmarks.cases import Case
from benchmarks.measure import Source, make_clt, measure_step
from benchmarks.report import check_same_loss, format_table, summarize


ROOT = Path(__file__).parents[2]
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
# Without what runs in circuit-tracer's environment.
PROGRAMS = [name for name, text in SOURCES.items() if "__main__" in text and "from circuit_tracer" not in text]
SMALL = {"num_layers": 3, "d_model": 16, "num_features": 256, "tokens": 64, "l0": 8, "rounds": 1, "steps": 2}
FLAGS = "--layers 3 --d-model 16 --num-features 256 --tokens 64 --l0 8 --rounds 1 --steps 2"
REAL_FLAGS = "--num-features 128 --tokens 64 --l0 8 --rounds 1 --steps 2 --context-size 16 --prompts 4"
RATES = dict.fromkeys(("gemm_encoder", "gemm_decoder", "read", "write", "update"), 1e9)


@pytest.fixture
def script(monkeypatch):
    """The script as a module, measuring in this process, which is what the other processes would do."""

    def here(job):
        if job["kind"] == "machine":
            job = {**job, "stream_bytes": 2**20, "at_least": 0.0}
        return json.loads(json.dumps(measure.measure(json.loads(json.dumps(job)))))

    for name in ("run_case", "run_harvest"):
        function = getattr(run, name)
        monkeypatch.setattr(steps, name, lambda *a, function=function, **k: function(*a, **k, measure=here))
    return steps


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_says_what_it_is_for(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        import_module(f"benchmarks.{name}").main(["--help"])
    assert "usage: " in capsys.readouterr().out


def check_row(row, dense=True):
    for side in ("ours", "dense") if dense else ("ours",):
        seconds = row[side]["step_seconds"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        for phase in ("forward", "backward", "optimizer"):
            assert row[side][f"{phase}_seconds"] > 0
        assert row[side]["tokens_per_second"] == pytest.approx(row["case"]["tokens"] / seconds["median"])
        assert row[side]["state_bytes"] > 0
    assert row["limit_seconds"]["total"] > 0
    assert row["share_of_limit"] == row["limit_seconds"]["total"] / row["ours"]["step_seconds"]["median"]
    if dense:
        assert row["ratio"] == row["dense"]["step_seconds"]["median"] / row["ours"]["step_seconds"]["median"]
        assert row["ours"]["loss_first"] == pytest.approx(row["dense"]["loss_first"], rel=0.01)
    assert 0 < row["listed_share"] < 1


@pytest.mark.parametrize("activation_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_row_of_each_activation_function(script, activation_fn, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert script.main([*FLAGS.split(), "--activation-fn", activation_fn, "--json", str(figures)]) == 0
    record = json.loads(figures.read_text())
    (row,) = record["rows"]
    check_row(row)
    assert row["l0_first"] == pytest.approx(8, rel=0.15)
    assert row["l0_last"] == pytest.approx(8, rel=0.15)
    assert row["listed_share"] >= row["l0_last"] / 256 - 1e-6
    assert record["command"].startswith("python -m benchmarks.steps --layers 3 ")
    assert record["versions"]["torch"] and record["device"]
    output = capsys.readouterr().out
    for title in ("dense step (ms)", "ratio dense / ours", "share of the limit (%)", "encode (ms)", "optimizer (ms)"):
        assert title in output
    lines = [line for line in output.splitlines() if "(ms)" in line]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_several_rounds_and_settings(script, tmp_path):
    figures = tmp_path / "figures.json"
    flags = [*FLAGS.split(), "--rounds", "2", "--dense-steps", "1", "--autocast", "bfloat16", "--k-scope", "token"]
    assert script.main([*flags, "--activation-fn", "topk", "--json", str(figures)]) == 0
    (row,) = json.loads(figures.read_text())["rows"]
    check_row(row)
    assert len(row["ratio_per_round"]) == 2
    assert row["ours"]["step_seconds"]["steps"] == 4
    assert row["dense"]["step_seconds"]["steps"] == 2
    assert row["case"]["k_scope"] == "token"


@pytest.mark.slow
def test_growth_without_the_dense_side_and_its_plot(script, tmp_path, capsys):
    figures, plot = tmp_path / "figures.json", tmp_path / "growth.png"
    flags = [*FLAGS.split(), "--no-dense", "--grow", "k", "N", "--plot", str(plot), "--json", str(figures)]
    assert script.main(flags) == 0
    rows = json.loads(figures.read_text())["rows"]
    assert [row["case"]["l0"] for row in rows] == [2, 8, 32, 128, 8, 8, 8, 8]
    assert [row["case"]["tokens"] for row in rows[4:]] == [8, 16, 32, 64]
    for row in rows:
        check_row(row, dense=False)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "ratio" not in capsys.readouterr().out


def test_real_activations(script, tiny_gpt2, text_file, tmp_path, fresh_accelerate, capsys):
    figures = tmp_path / "figures.json"
    flags = [
        *REAL_FLAGS.split(),
        "--model",
        tiny_gpt2,
        "--dataset",
        text_file,
        "--end-to-end-steps",
        "4",
        "--json",
        str(figures),
    ]
    assert script.main(flags) == 0
    (row,) = json.loads(figures.read_text())["rows"]
    check_row(row)
    assert (row["case"]["num_layers"], row["case"]["d_model"]) == (2, 64)
    assert row["harvest"]["tokens_per_second"] > 0
    assert row["split_seconds"]["harvest"] == pytest.approx(64 / row["harvest"]["tokens_per_second"])
    assert row["end_to_end"]["tokens_per_second"] > 0
    assert row["dense_end_to_end_tokens_per_second"] < row["dense"]["tokens_per_second"]
    assert 0 < row["end_to_end"]["language_model_share"] < 1
    assert row["l0_first"] == pytest.approx(8, rel=0.3)
    assert "tokens/s with harvest, ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-features", "16", "--l0", "17"], "l0=17.*num_features=16"),
        (["--device", "tpu"], "device='tpu'"),
        (["--preset", "x"], "preset='x'.*issue"),
        (["--grow", "x"], "grow='x'.*L, F, N, k"),
        (["--preset", "issue", "--grow", "F"], "--preset.*--grow"),
        (["--model", "gpt2"], "--model.*--dataset"),
        (["--model", "gpt2", "--dataset", "x", "--grow", "F"], "--model.*--preset.*--grow"),
        (["--model", "gpt2", "--dataset", "x", "--prompts", "0"], "prompts=0"),
        (["--json", "no/such/figures.json"], "no/such/figures.json.*no/such"),
    ],
)
def test_wrong_options_give_one_line(script, flags, message, capsys):
    assert script.main(flags) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error)
    assert error.count("\n") == 1


def test_a_shape_that_does_not_fit_the_language_model(script, tiny_gpt2, text_file, capsys):
    flags = ["--model", tiny_gpt2, "--dataset", text_file, "--tokens", "16", "--layers", "5"]
    assert script.main(flags) == 2
    assert f"error: num_layers=5 does not fit {tiny_gpt2}, which has 2" in capsys.readouterr().err


def test_a_text_that_is_too_short(tiny_gpt2, small_text_file, tmp_path):
    job = {"source": {"model": tiny_gpt2, "dataset": small_text_file}, "tokens": 4096, "device": "cpu"}
    with pytest.raises(ValueError, match=r"dataset=.*16384"):
        measure.measure({"kind": "harvest", **job, "path": str(tmp_path / "activations")})


@pytest.mark.slow
def test_the_script_measures_in_processes_of_their_own(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.steps", *FLAGS.split(), "--json", figures]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(figures.read_text())["rows"]
    check_row(row)
    if (machine.PROCESS / "status").is_file():
        for side in ("ours", "dense"):
            assert row[side]["peak_bytes"] > 0
    assert "dense step (ms)" in result.stdout
    assert "[1 of 1] round 1 of 1, dense" in result.stderr


@pytest.mark.slow
def test_what_a_process_finds_wrong_is_raised():
    case = Case(**SMALL).to_dict()
    with pytest.raises(ValueError, match="tokens=0"):
        run.measure_in_process({"kind": "machine", "case": {**case, "tokens": 0}})


def test_a_process_that_dies_is_named(monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda command, **_: subprocess.CompletedProcess(command, -9))
    with pytest.raises(RuntimeError, match=r"step.* -9 .*killed.*memory"):
        run.measure_in_process({"kind": "step"})


def test_the_ranges_of_the_forward_pass_are_read(monkeypatch):
    forward = measure.CrossLayerTranscoder.forward

    def with_range(self, *args, **kwargs):
        with torch.profiler.record_function("clt::probe"):
            return forward(self, *args, **kwargs)

    monkeypatch.setattr(measure.CrossLayerTranscoder, "forward", with_range)
    result = measure_step(Case(**SMALL), "ours", profile=True)
    assert result["ranges"]["probe"] > 0
    assert measure_step(Case(**SMALL), "ours", profile=False)["ranges"] == {}


def test_state_of_adam_is_counted_twice_over_the_parameters():
    result = measure_step(Case(**SMALL), "dense")
    parameters = 3 * (16 * 256 + 256) + 6 * 16 * 256 + 3 * 16 + 3 * 256
    assert result["parameter_bytes"] == 4 * parameters
    assert 0 <= result["optimizer_bytes"] - 8 * parameters < 1000  # and a step counter for each tensor


def test_biases_give_the_asked_rate_whatever_the_threshold():
    case = Case(**{**SMALL, "num_features": 2048, "l0": 20})
    clt = make_clt(case, None)
    with torch.no_grad():
        acts = clt.encode(torch.randn(2000, 3, 16))
    rates = (acts > 0).float().mean(dim=(0, 2))
    torch.testing.assert_close(rates, torch.full((3,), 20 / 2048), rtol=0.1, atol=0)


def test_memory_of_this_process():
    device = torch.device("cpu")
    before = machine.memory_in_use(device)
    if before is None:
        pytest.skip("this system does not say how much memory a process has")
    machine.reset_peak_memory(device)
    assert machine.peak_memory(device) < before + 2**25
    with mmap.mmap(-1, 2**26) as block:  # pages of its own: an allocator may hold freed ones
        block.write(b"1" * 2**26)
    assert machine.peak_memory(device) > before + 2**25
    assert machine.memory_in_use(device) < machine.peak_memory(device) - 2**25


def test_different_losses_stop_the_comparison():
    check_same_loss(100.2, 100.0)
    for ours in (102.0, math.nan):
        with pytest.raises(RuntimeError, match="loss"):
            check_same_loss(ours, 100.0)


def test_medians_ratio_and_table():
    case = Case(**{**SMALL, "rounds": 2})

    def side(name, forward):
        features = {}
        if name == "ours":
            features = {"l0_first": [8.0] * 3, "l0_last": [8.0] * 3, "listed_last": [12.0] * 3}
            features |= {"active_rows": [200] * 3, "listed_rows": [250] * 3}
        return {
            "side": name, "forward": forward, "backward": [0.5] * len(forward), "optimizer": [0.25] * len(forward),
            "peak_bytes": None, "parameter_bytes": 1000, "optimizer_bytes": 2000, "loss_first": 1.0,
            "ranges": {"encode": 0.125} if name == "ours" else {}, **features,
        }  # fmt: skip

    runs = [
        side("ours", [0.25, 0.5, 9.0]),
        side("dense", [1.25, 2.25]),
        side("ours", [0.25, 0.25, 1.0]),
        side("dense", [3.25, 4.25]),
    ]
    row = summarize(case, RATES, runs)
    assert row["ours"]["step_seconds"] == {"median": 1.125, "min": 1.0, "max": 9.75, "steps": 6}
    assert row["ratio"] == 3.5 / 1.125
    assert row["ratio_per_round"] == [2.5 / 1.25, 4.5 / 1.0]
    assert row["listed_share"] == 12 / 256
    assert row["counts"]["decoder_bytes"] == (3 + 2 + 1) * 450 * case.d_model * 4
    assert row["ours"]["peak_over_state"] is None
    assert row["ours"]["state_bytes"] == 4000
    table = {line.split("  ")[0]: line.split()[-1] for line in format_table([row]).splitlines() if line.strip()}
    assert table["dense step (ms)"] == "3,500.0"
    assert table["our step (ms)"] == "1,125.0"
    assert table["ratio dense / ours"] == "3.11"
    assert table["forward (ms)"] == "375.0"
    assert re.search(r"^  encode \(ms\) +125\.0$", format_table([row]), flags=re.MULTILINE)
    assert re.search(r"^  select \(ms\) +-$", format_table([row]), flags=re.MULTILINE)
    assert "peak memory, ours (GB)" not in table


def test_source_wants_whole_blocks():
    with pytest.raises(ValueError, match="context_size=2"):
        Source("model", "dataset", context_size=2)
