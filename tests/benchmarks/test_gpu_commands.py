"""`make gpu-check` and `make gpu-train`, tiny, on the CPU: what they find, and what they do when something fails."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_report, gpu_times, gpu_train
from hf_clt.evaluation.metrics import density_histogram
from hf_clt.kernels import rows


ROOT = Path(__file__).parents[2]
TINY = ["--device", "cpu", "--tiny"]


@pytest.fixture(scope="module")
def not_installed(tmp_path_factory):
    """Runs a module of a copy of the checkout where everything is installed but hf_clt."""
    folder = tmp_path_factory.mktemp("not-installed")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.strip("\0").split("\0"):
        if (ROOT / name).is_file() and name.split("/")[0] in ("hf_clt", "benchmarks", "model_cards", "setup.cfg"):
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "checkout" / name)
    (folder / "site").mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "hf_clt" not in path.name:
            (folder / "site" / path.name).symlink_to(path)

    def run(*words):
        environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-S", "-W", "ignore", "-m", *words, *TINY, "--json", folder / "found.json"]
        done = subprocess.run(command, cwd=folder / "checkout", env=environment, capture_output=True, text=True)
        return done, json.loads((folder / "found.json").read_text()) if done.returncode < 2 else done.stderr

    return run


def check(tmp_path, *words):
    """The status of gpu_check, and the JSON that it wrote."""
    status = gpu_check.main([*TINY, "--json", str(tmp_path / "found.json"), *words])
    return status, json.loads((tmp_path / "found.json").read_text())


@pytest.mark.slow
def test_gpu_check_runs_from_a_checkout(not_installed):
    done, record = not_installed("benchmarks.gpu_check")
    assert done.returncode == 0, done.stderr[-2000:]
    assert record["versions"]["hf_clt"] == "0+checkout" and record["device"] and "--tiny" in record["command"]
    pieces = record["pieces"]
    assert {piece["status"] for piece in pieces.values()} == {"done"}
    checks = list(pieces)[:5]
    assert checks == ["layers", "rows", "selection", "adam", "steps"] and "update C bfloat16 dead 0.3" in pieces
    assert all(row["passed"] and row["same_bits"] for name in checks for row in pieces[name]["rows"])
    (row,) = pieces["update A autocast"]["rows"]
    assert row["ratio"] == row["dense"]["update_ms"] / row["ours"]["update_ms"]
    assert row["ours"]["launches"] > 10 and row["ours"]["busy_ms"] > 0 and row["ours"]["kernels"]
    assert "dense" not in pieces["update A autocast dead 0.3"]["rows"][0]
    assert "Triton's kernels do not run here" in done.stdout and "PASS  jumprelu, bfloat16, dead 0.3:" in done.stdout


@pytest.mark.slow
def test_gpu_train_runs_from_a_checkout(not_installed, tiny_gpt2, text_file, tmp_path):
    words = ["--model", tiny_gpt2, "--dataset", text_file, "--output", str(tmp_path / "clt"), "--minutes", "1"]
    done, record = not_installed("benchmarks.gpu_train", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    pieces = record["pieces"]
    assert {piece["status"] for piece in pieces.values()} == {"done"}
    probes = [piece["rows"][0] for name, piece in pieces.items() if name.startswith("probe")]
    assert [row["overlap_harvest"] for row in probes] == [False, False, True]
    assert all(row["tokens_per_second"] > 0 and row["kernel_share"] > 0 for row in probes)
    (row,) = pieces["training"]["rows"]
    assert row["evaluation"]["nmse"] < 1.5 and row["evaluation"]["ce_recovered"] is not None
    assert sum(row["usage"].values()) == pytest.approx(1) and row["history"][-1]["step"] == row["updates"]
    assert (tmp_path / "clt" / "README.md").is_file() and not list((tmp_path / "clt").glob("checkpoint-*"))
    assert "features that fire on such a share of tokens" in done.stdout


def test_a_wrong_kernel_is_found_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    right = rows.bag_sums
    monkeypatch.setattr(rows, "bag_sums", lambda *arguments: 1.001 * right(*arguments))
    status, record = check(tmp_path, "--only", "layers", "rows", "selection", "steps")
    assert status == 1
    assert {name: piece["status"] for name, piece in record["pieces"].items()} == {
        "layers": "failed",
        "rows": "failed",
        "selection": "done",
        "steps": "failed",
    }
    passed = {(row["check"], row["dtype"]): row["passed"] for row in record["pieces"]["rows"]["rows"]}
    assert not passed["row_sums", "float32"] and passed["row_dots", "float32"]
    assert "FAIL  row_sums, float32" in capsys.readouterr().out


def test_other_bits_the_second_time_are_found():
    exact = torch.ones(3, dtype=torch.float64)
    results = iter([torch.ones(3), torch.ones(3) + 1e-7])
    found = gpu_check.kernel_check(lambda: next(results), exact, exact)
    assert found["errors"]["of the bound"] == 0 and not found["same_bits"] and not found["passed"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrong", [None, "decoded", "squares", "values", "decoders"])
def test_a_wrong_entry_of_any_layer_is_found(monkeypatch, tied, wrong):
    """By a small part of one of them, which a norm over all would not show."""
    torch.manual_seed(0)
    block = gpu_check.join([gpu_check.random_layer(50, 40, 4, torch.device("cpu")) for _ in range(3)])
    right = gpu_check.decoded

    def changed(start, block, weights, reach, tied):
        out, squares = right(start, block, weights, reach, tied)
        off = torch.zeros_like(out)
        off[-1, -1, -1] = 1e-4 * out[-1, -1, -1].abs().item()
        if wrong == "decoded":
            out = out + off
        if wrong == "squares":
            squares = squares + 1e-5 * squares.detach()
        if wrong == "values":
            out = out + 1e-3 * (block.values[-1] - block.values[-1].detach())
        if wrong == "decoders":
            out = out + 1e-3 * (weights[-1][7, 0, 3] - weights[-1][7, 0, 3].detach())
        return out, squares

    monkeypatch.setattr(gpu_check, "decoded", changed)
    found = gpu_check.layers_check(block, 24, 2, tied, "float32")
    assert found["same_bits"] and found["passed"] == (wrong is None)
    assert {name for name, error in found["errors"].items() if error > 1} == ({wrong} if wrong else set())


def test_a_wrong_gradient_of_an_encoder_is_found(monkeypatch):
    block = gpu_check.join([gpu_check.random_layer(50, 40, 4, torch.device("cpu")) for _ in range(3)])
    assert gpu_check.encoders_check(block, 24)["passed"]
    right = gpu_check.pre_activations_at
    monkeypatch.setattr(
        gpu_check, "pre_activations_at", lambda x, weight, bias, some: right(x, weight, 1.001 * bias, some)
    )
    errors = gpu_check.encoders_check(block, 24)["errors"]
    assert errors["biases"] > 1 and errors["values"] > 1 and errors["weights"] <= 1


@pytest.mark.parametrize("num_rows", [4, 200])
def test_the_largest_are_the_first_of_equal_ones(num_rows):
    rows = torch.randint(-3, 4, (num_rows, 50)).float()
    order = rows.sort(dim=1, descending=True, stable=True).indices[:, :7].sort(dim=1).values
    wanted = (order + 50 * torch.arange(num_rows)[:, None]).flatten()
    assert torch.equal(gpu_check.first_largest(rows, 7), wanted)


def test_a_gradient_of_dead_features_is_compared(monkeypatch):
    case = gpu_check.make_case(gpu_check.TINY, "float32", torch.device("cpu"), "topk")
    assert gpu_check.step_check(case, 0.3)["passed"]
    right = gpu_check.dense_loss
    monkeypatch.setattr(gpu_check, "dense_loss", lambda *given: right(*given[:-1], given[-1][::-1]))
    assert not gpu_check.step_check(case, 0.3)["passed"]


def test_phases_are_timed_beside_what_is_modelled(tmp_path, capsys):
    status, record = check(tmp_path, "--only", "phases A autocast", "phases C")
    rows = {row["name"]: row for row in record["pieces"]["phases A autocast"]["rows"]}
    assert status == 0 and len(rows) == len(record["pieces"]["phases A autocast"]["rows"])
    case = gpu_check.make_case(gpu_check.TINY, "autocast", torch.device("cpu"))
    for name, counts in gpu_times.modelled_counts(case).items():
        row = rows[name]
        assert row["bytes"] == counts.get("memory", 0) + counts.get("cache", 0) and row["launches"] > 0
        assert row["flops"] == counts.get("product", 0) and row["share"] == row["modelled_ms"] / row["ms"]
    listed = rows["gradients of decoders, one hot"]["bytes"]
    assert listed > rows["gradients of decoders"]["bytes"]
    assert {"rounding", "square sums", "selection, above one per feature"} < rows.keys()
    assert "rounding" not in {row["name"] for row in record["pieces"]["phases C bfloat16"]["rows"]}


def test_constants_are_tried_and_put_back(tmp_path):
    before = vars(gpu_times.triton_layers).copy(), vars(gpu_times.triton_adam).copy()
    _, record = check(tmp_path, "--only", "constants A autocast", "constants C")
    assert (vars(gpu_times.triton_layers), vars(gpu_times.triton_adam)) == before
    tried = [row for row in record["pieces"]["constants A autocast"]["rows"] if "constants" in row]
    for phase, settings in gpu_times.TRIED.items():
        for _module, names, choices in settings:
            found = [row for row in tried if row["phase"] == phase and tuple(row["constants"]) == names]
            assert len(found) == (0 if "ADAM_COLUMNS" in names else len(choices))
            assert sum(row["now"] for row in found) == (
                bool(found) and not {"ROUND_ABOVE", "POSTING_SPLIT"} & {*names}
            )
    of_c = [row["constants"] for row in record["pieces"]["constants C bfloat16"]["rows"]]
    assert any("ADAM_COLUMNS" in one for one in of_c) and not any("WIDE_BLOCK" in one for one in of_c)


def test_how_many_reads_pay_for_rounding():
    """Of 8 reads in 4 ms 2 are saved by rounding, for which 3 ms are spent."""
    case = gpu_check.make_case((2, 16, 100, 50, 16), "autocast", torch.device("cpu"))
    times = {"decode: ROUND_ABOVE 0": 6, f"decode: ROUND_ABOVE {gpu_times.NEVER} (now)": 4, "rounding": 3}
    rows = [{"name": name, "ms": ms} for name, ms in times.items()]
    assert gpu_times.break_even(rows, case) == 50 * 16 / 100 * 3 / (4 - (6 - 3))
    rows[0]["ms"] = 8
    assert gpu_times.break_even(rows, case) == float("inf")


def test_what_raises_is_recorded_and_stops_nothing(tmp_path, monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gpu_times, "measure_rates", out_of_memory)
    monkeypatch.setattr(gpu_times, "positions_topk", out_of_memory)
    status, record = check(tmp_path, "--only", "rates", "phases B autocast", "phases A200")
    pieces = record["pieces"]
    assert status == 1 and [piece["status"] for piece in pieces.values()] == ["failed", "failed", "failed"]
    assert "no room" in pieces["rates"]["error"] and pieces["rates"]["rows"][0]["name"] == "copy"
    rows = pieces["phases B autocast"]["rows"]
    assert [row["name"] for row in rows if row.get("passed") is False] == ["selection, k of each row"]
    assert sum("ms" in row for row in rows) == len(rows) - 1 > 15
    assert "failed: 3 (rates, phases B autocast, phases A200 autocast)" in capsys.readouterr().out


def test_what_does_not_fit_is_skipped_and_said(tmp_path, capsys):
    status, record = check(tmp_path, "--budget", "0")
    assert status == 0 and {piece["status"] for piece in record["pieces"].values()} == {"skipped"}
    report = gpu_report.Report(tmp_path / "some.json", ["python"], torch.device("cpu"), 10)
    done = []
    for name, about in (("short", 3), ("long", 20), ("last", 3)):
        report.piece(name, about, lambda rows, name=name: done.append(name))
        assert name in json.loads((tmp_path / "some.json").read_text())["pieces"]  # after each piece
    assert report.finish() == 0 and done == ["short", "last"]
    assert re.search(r"long: about 20 s, of \d+ s left\nlong: skipped", capsys.readouterr().out)


def test_a_shape_that_memory_has_no_room_for_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(gpu_times, "bytes_needed", lambda case, side: 1e9 if side == "ours" else float("inf"))
    monkeypatch.setattr(gpu_times, "free_bytes", lambda device: 80e9)
    found = []
    gpu_times.time_updates(found, gpu_check.make_case(gpu_check.TINY, "bfloat16", torch.device("cpu")), 1)
    assert "update_ms" in found[0]["ours"] and "skipped" in found[0]["dense"] and "ratio" not in found[0]
    assert "dense: skipped, it needs about" in capsys.readouterr().out


def test_bytes_needed():
    at_c = gpu_check.make_case(gpu_check.SHAPES["C"], "bfloat16", torch.device("cpu"))
    assert 86e9 < gpu_times.bytes_needed(at_c, "ours") < 141e9 < 1.1 * gpu_times.bytes_needed(at_c, "dense")


def test_the_curve_of_usage():
    counts = torch.tensor([0, 0, 0, 1, 1, 9, 50, 1000])
    found = gpu_train.usage(density_histogram(counts, 1000))
    assert found == {"never": 3 / 8, "1e-3 to 1e-2": 3 / 8, "1e-2 to 1e-1": 1 / 8, "1e-1 to 1e0": 1 / 8}


def test_without_a_gpu_it_says_what_to_give(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().err
    assert gpu_check.main(["--device", "cpu"]) == 2
    assert "give --tiny" in capsys.readouterr().err
