"""The whole audit: resumed, skipped, refused; its page, its table and the section of the card."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hf_clt import CrossLayerTranscoder
from hf_clt.audit import run as run_module
from hf_clt.audit.page import chart, for_card, format_audit, write_page
from hf_clt.audit.run import BLOCKS, Block, run_audit
from hf_clt.audit.samples import BlockSkipped, figure
from hf_clt.commands import audit as command
from hf_clt.commands import main
from hf_clt.hub.card import is_human_edited
from hf_clt.hub.facts import read_facts
from tests.reference import random_clt


OWN = ("reconstruction", "replacement", "features")
# One of several processes; it says what it measures itself.
PART = f"""
import sys
from hf_clt.audit import run
from hf_clt.commands import main
run.BLOCKS = {{name: run.BLOCKS[name] for name in {OWN}}}
add_result = run.add_result
def told(output, block, subject, result):
    print("measured", block, subject)
    add_result(output, block, subject, result)
run.add_result = told
sys.exit(main(["audit", *sys.argv[1:]]))
"""


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    for module in ("run", "page"):
        monkeypatch.setattr(f"hf_clt.audit.{module}.BLOCKS", {name: BLOCKS[name] for name in OWN})


@pytest.fixture
def options(saved, tiny_gpt2, text_file, tmp_path):
    text = ["--model", tiny_gpt2, "--dataset", text_file, "--context-size", "32", "--eval-tokens", "2000"]
    return [str(saved), *text, "--output", str(tmp_path / "audit"), "--quick", "--device", "cpu"]


def without_times(audit):
    return json.loads(re.sub(r'"seconds": [\d.]+', '"seconds": 0', json.dumps(audit)))


def error_of(argv, capsys):
    assert main(["audit", *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("error: ") == 1 and "Traceback" not in error
    return error.splitlines()[-1]  # the bar of loading the language model may be before it


def test_killed_and_resumed_is_the_same_as_uninterrupted(given, trained, tmp_path):
    lines = []
    whole = run_audit(trained, given, tmp_path / "whole", {"clt": "a"}, report=lines.append)
    assert whole["subjects"] == ["clt", "shuffled", "random"]
    assert "9 measurements (3 blocks of 3 CLTs: clt, shuffled, random) are left, about" in lines[0]
    assert len(lines) == 10

    for done in (2, 5):  # the second time it goes on from the first
        lines = []

        def report(line, lines=lines, done=done):
            lines.append(line)
            if len(lines) == 1 + done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_audit(trained, replace(given, shared={}), tmp_path / "cut", {"clt": "a"}, report=report)
    lines = []
    cut = run_audit(trained, replace(given, shared={}), tmp_path / "cut", {"clt": "a"}, report=lines.append)
    assert "2 measurements" in lines[0] and len(lines) == 3
    assert without_times(cut) == without_times(whole)
    again = []
    assert run_audit(trained, given, tmp_path / "cut", {"clt": "a"}, report=again.append) == cut and not again


@pytest.mark.slow
def test_two_processes_share_an_audit(options, tmp_path):
    """They find what one finds, and each measurement is made once; nothing but the folder is common to them."""
    assert main(["audit", *options, "--disable-progress-bar"]) == 0
    alone = json.loads((tmp_path / "audit" / "audit.json").read_text())
    options[options.index("--output") + 1] = str(tmp_path / "shared")
    argv = [sys.executable, "-c", PART, *options, "--disable-progress-bar"]
    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    parts = [subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) for env in environments]
    printed = [part.communicate(timeout=200)[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0]
    assert without_times(json.loads((tmp_path / "shared" / "audit.json").read_text())) == without_times(alone)
    made = [re.findall(r"measured (\w+ \w+)", text) for text in printed]
    assert all(made) and len(made[0]) + len(made[1]) == len(set(made[0] + made[1])) == len(OWN) * 3
    assert "Next: hf-clt trace" in printed[0] and "Next:" not in printed[1]


@pytest.mark.slow
def test_what_a_process_was_measuring_when_it_was_killed_is_measured_by_another(given, trained, tmp_path):
    """Its lock ends with it, and the blocks that it finished stay."""
    run_module.open_audit(tmp_path, run_module.describe(trained, given, {"clt": "a"}), ["clt"], False)
    code = f"""
import time
from pathlib import Path
from hf_clt.audit.run import add_result, locked
lock = locked(Path({str(tmp_path)!r}), "clt.False")
with lock:
    add_result(Path({str(tmp_path)!r}), "features", "clt", {{"skipped": "of another", "seconds": 0}})
    print("holds", flush=True)
    time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "holds\n"
    lines = []

    def report(line):
        lines.append(line)
        if line.startswith("features") and "random" in line:
            other.kill()  # all else is done

    audit = run_audit(trained, given, tmp_path, {"clt": "a"}, report=report)
    assert audit["blocks"]["features"]["clt"]["skipped"] == "of another"
    assert [line.split()[:2] for line in lines[-2:]] == [["reconstruction", "clt"], ["replacement", "clt"]]


def test_an_audit_of_other_settings_is_not_gone_on_with(given, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "BLOCKS", {"features": BLOCKS["features"]})
    run_audit(trained, given, tmp_path, {"clt": "a"}, report=list)
    with pytest.raises(ValueError, match="has an audit with seed=0, now it is 1; give another folder, or --overwrite"):
        run_audit(trained, replace(given, seed=1), tmp_path, {"clt": "a"})
    other = random_clt(num_layers=2, d_model=64, double=False).eval()
    with pytest.raises(ValueError, match="with clt_digest="):
        run_audit(other, given, tmp_path, {"clt": "a"})
    run_audit(trained, replace(given, seed=1), tmp_path, {"clt": "a"}, overwrite=True, report=list)
    assert json.loads((tmp_path / "audit.json").read_text())["settings"]["seed"] == 1


def test_a_block_that_cannot_be_measured_is_skipped_and_says_so_everywhere(given, trained, tmp_path, monkeypatch):
    def poor(clt, given):
        raise BlockSkipped("no prompt\nfits")

    def hungry(clt, given):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    def broken(clt, given):
        raise RuntimeError("a bug")

    blocks = {"poor": Block(poor, "?", False, (1, 1)), "hungry": Block(hungry, "?", False, (1, 1))}
    for module in ("run", "page"):
        monkeypatch.setattr(f"hf_clt.audit.{module}.BLOCKS", blocks)
    lines = []
    audit = run_audit(trained, given, tmp_path, {"clt": "a"}, report=lines.append)
    assert audit["blocks"]["poor"]["clt"]["skipped"] == "no prompt fits"
    assert "figures" not in audit["blocks"]["poor"]["clt"]
    assert "out of memory" in audit["blocks"]["hungry"]["random"]["skipped"]
    assert sum("SKIPPED: no prompt fits" in line for line in lines) == 3
    write_page(audit, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("skipped: no prompt fits") == 2 * 3  # at a glance as well
    assert format_audit(audit).count("skipped: no prompt fits") == 3
    assert for_card(audit)["rows"][0][3] == "skipped: no prompt fits"
    blocks["poor"] = Block(broken, "?", False, (1, 1))
    with pytest.raises(RuntimeError, match="a bug"):
        run_audit(trained, given, tmp_path, {"clt": "a"}, overwrite=True)


def test_another_clt_is_measured_at_its_own_hooks(given, trained, tmp_path, monkeypatch):
    seen = []

    def look(clt, given):
        seen.append((given.harvester.input_hook, given.harvester.output_hook))
        return {"a": figure([1.0], 0)}

    monkeypatch.setattr(run_module, "BLOCKS", {"look": Block(look, "?", False, (1, 1))})
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    other = random_clt(num_layers=2, d_model=64, double=False, **hooks).eval()
    audit = run_audit(trained, given, tmp_path, {"clt": "a"}, {"other": lambda: other}, report=list)
    assert audit["subjects"] == ["clt", "shuffled", "random", "other"]
    assert seen == [("hook_resid_mid", "hook_mlp_out")] * 3 + [("mlp.hook_in", "mlp.hook_out")]
    # One that is added later is measured alone.
    audit = run_audit(trained, given, tmp_path, {"clt": "a"}, {"later": lambda: other}, report=list)
    assert audit["subjects"][-1] == "later" and len(seen) == 5


def test_the_table_marks_what_is_not_told_from_the_clt():
    def result(low, high):
        return {"figures": {"nmse": {"value": low, "interval": [low, high], "samples": 9}}, "seconds": 1.0}

    audit = {
        "subjects": ["clt", "shuffled", "random"],
        "blocks": {"reconstruction": {"clt": result(1, 2), "shuffled": result(2, 3), "random": result(3, 4)}},
    }
    line = next(line for line in format_audit(audit).splitlines() if "nmse" in line)
    assert "2 (2 to 3) ≈" in line and not line.endswith("≈") and line.split()[2] == "9"


def test_a_chart_has_a_point_per_label_and_leaves_out_what_has_no_value():
    some = [figure([1.0, 2.0], 0), {"value": None, "interval": [None, None], "samples": 1}, figure([4.0, 4.0], 0)]
    found = chart({"clt": some, "random": {"0": figure([2.0], 0)}, "none": None})
    assert [line["number"] for line in found["lines"]] == [1, 0]
    random, own = found["lines"]
    assert len(own["points"].split()) == 2 and len(own["band"].split()) == 4
    assert len(set(random["points"].split())) == 1  # a dot
    assert [label for _, label in found["x"]] == ["0", "1", "2"]
    assert found["rows"] == [
        ("0", ["1.5 (1 to 2)", "2 (2 to 2)"]),
        ("1", ["-", "-"]),
        ("2", ["4 (4 to 4)", "-"]),
    ]
    places = {label: y for y, label in found["y"]}
    assert places["4"] < places["0"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_figures_and_a_page_and_puts_them_on_the_card(
    options, saved, trained, tmp_path, capsys, without_plots
):
    folder = tmp_path / "clt"
    shutil.copytree(saved, folder)
    other = tmp_path / "per-<layer>"
    trained.save_pretrained(other)
    options[0] = str(folder)
    assert main(["audit", *options, "--disable-progress-bar", "--compare", str(other), "--update-card"]) == 0
    printed = capsys.readouterr().out
    assert "12 measurements (3 blocks of 4 CLTs" in printed and "Next: hf-clt trace" in printed
    audit = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert audit["settings"]["dataset"].endswith("topics.txt")
    own, same = (audit["blocks"]["reconstruction"][name]["figures"]["nmse"] for name in ("clt", "per-<layer>"))
    assert own == same

    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "per-&lt;layer&gt;" in page and "per-<layer>" not in page
    assert "default-src 'none'" in page and not re.search(r"https?://|<script|src=", page)
    assert str(tmp_path) not in page
    assert "≈" in page and "nmse per layer" in page

    card = (folder / "README.md").read_text()
    assert not is_human_edited(card)
    section = card.partition("\n## Audit\n")[2].partition("\n## ")[0]
    assert "with `--quick`" in section and "| block | figure | samples | this CLT | shuffled | random |" in section
    assert f"| reconstruction | nmse | 8 | {own['value']:.3g} (" in section
    assert str(tmp_path) not in card
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert read_facts(folder)["audit"]["columns"][0] == "clt"

    (folder / "README.md").write_text(card + "\nmine\n")
    assert main(["audit", *options, "--disable-progress-bar", "--compare", str(other), "--update-card"]) == 0
    printed = capsys.readouterr().out
    assert "was edited by hand and is kept" in printed and "measurements" not in printed


def test_what_does_not_fit_is_one_clear_line(options, saved, tmp_path, capsys, monkeypatch):
    wide = tmp_path / "wide"
    random_clt(num_layers=2, d_model=32, double=False).save_pretrained(wide)
    assert "d_model=32" in error_of([*options, "--compare", str(wide)], capsys)
    assert "two CLTs of the same name" in error_of([*options, "--compare", str(saved), str(saved)], capsys)
    named = shutil.copytree(saved, tmp_path / "random")
    assert "has one of the names" in error_of([*options, "--compare", str(named)], capsys)
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n")
    assert "has no line; give one prompt per line" in error_of([*options, "--prompts", str(empty)], capsys)
    assert "there is no such file" in error_of([*options, "--prompts", str(tmp_path / "none.txt")], capsys)
    assert "seed=-1" in error_of([*options, "--seed", "-1"], capsys)
    assert "dataset is missing" in error_of([str(saved), "--output", str(tmp_path / "a")], capsys)
    assert "d_model=32 does not fit" in error_of([str(wide), *options[1:]], capsys)
    few = [*options, "--eval-tokens", "40"]
    assert "2 sequences of held-out text, and 4 are needed" in error_of(few, capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "overwrite cannot be given to 2 processes at once; remove " in error_of([*options, "--overwrite"], capsys)


def test_clts_of_two_models_on_the_hub_are_not_compared(trained):
    models = [CrossLayerTranscoder(trained.config.from_dict(trained.config.to_dict())) for _ in range(2)]
    for clt, name in zip(models, ("openai-community/gpt2", "EleutherAI/pythia-70m"), strict=True):
        clt.config.base_model_name_or_path = name
    with pytest.raises(ValueError, match="'b' is of EleutherAI/pythia-70m, and 'a' of openai-community/gpt2"):
        command.check_other("a", models[0], "b", models[1])
    models[1].config.base_model_name_or_path = "/somewhere/gpt2"
    assert command.check_other("a", models[0], "b", models[1]) is models[1]


def test_random_control_does_not_depend_on_the_state_of_the_generator(given, trained):
    torch.manual_seed(1)
    first = run_module.subjects_of(trained, given, {})["random"]()
    torch.manual_seed(2)
    second = run_module.subjects_of(trained, given, {})["random"]()
    assert torch.equal(first.decoders[1].weight, second.decoders[1].weight)


@pytest.mark.slow
def test_all_eight_blocks_run_together(given, trained, tmp_path, monkeypatch):
    for module in ("run", "page"):
        monkeypatch.setattr(f"hf_clt.audit.{module}.BLOCKS", BLOCKS)
    audit = run_audit(trained, given, tmp_path, {"clt": "a"}, report=list)
    assert list(audit["blocks"]) == list(BLOCKS) and len(BLOCKS) == 8
    skipped = {name for name, results in audit["blocks"].items() if "skipped" in results["clt"]}
    assert skipped <= {"multihop"}  # a random language model answers no question
    write_page(audit, tmp_path / "audit.html")
    assert (tmp_path / "audit.html").read_text().count("<section>") == 8
