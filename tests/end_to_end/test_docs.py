"""
The documentation is true: its Python runs, its commands are understood, its links lead somewhere, its options, files,
functions and fields exist, and its settings need what it says. (The README's blocks run in test_readme.py, those of
docs/hub.md against a Hub in tests/hub.)
"""

import argparse
import contextlib
import importlib
import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from hf_clt import CLTTrainer, CLTTrainingArguments, CrossLayerTranscoder
from hf_clt.commands import cache, estimate
from hf_clt.harvest import sites
from hf_clt.harvest.harvester import Harvester, load_language_model
from hf_clt.training.initial_config import build_config
from hf_clt.training.options import kind_of
from hf_clt.training.parser import all_options, parse_train_args
from tests.end_to_end.small_quickstart import write_quickstart


ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES.append(ROOT / "benchmarks" / "README.md")
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
RUN_ELSEWHERE = {
    "README.md": "tests/end_to_end/test_readme.py",
    "docs/hub.md": "tests/hub/hub_client.py",
    "docs/circuit_tracer.md": "an environment of its own",
}
# Scripts that import what is not installed here; their options are looked for in their text.
OTHER_ENVIRONMENTS = {"attribute_clt"}
# Folders and files that the pages speak of and that are not in the repository.
MADE = re.compile(r"quickstart/|docs/\*|.*[{<*]|(tests|scripts|docs|hf_clt)/?$")
# Of accelerate and argparse.
FLAGS_OF_OTHERS = {"--multi_gpu", "--num_processes", "--help"}
NEEDED = {"--model": "quickstart/model", "--dataset": "quickstart/text.jsonl", "--num-features": "8"}


def blocks(text):
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def table_after(text, *head):
    """The rows below the table head that begins with these cells, each a list of cells."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| " + " | ".join(head)))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_gpt2, text, tmp_path_factory):
    """What `make quickstart` leaves, in small: a run that was checkpointed and finished, and a cache."""
    root = tmp_path_factory.mktemp("docs")
    write_quickstart(root, tiny_gpt2, text, training_steps=4, checkpoint_interval=2)
    with contextlib.chdir(root):
        words = ["gpt2-cache", "--max-tokens", "1000", "--eval-tokens", "100", "--disable-progress-bar"]
        for flag in ("--model", "--dataset"):
            words += [flag, NEEDED[flag]]
        assert cache.main(words) == 0
    return root


def pages_with_python():
    return [name for name, text in TEXTS.items() if any(kind == "python" for kind, _ in blocks(text))]


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in pages_with_python() if name not in RUN_ELSEWHERE])
def test_python_of_the_page_runs(page, folder, tmp_path, monkeypatch, capsys, fresh_accelerate):
    work = tmp_path / "work"
    shutil.copytree(folder, work, ignore=shutil.ignore_patterns("checkpoint-*"))
    monkeypatch.chdir(work)
    monkeypatch.setattr(sites, "LAYOUTS", dict(sites.LAYOUTS))  # a page adds a row
    names = {"__name__": "page"}
    for number, (kind, code) in enumerate(blocks(TEXTS[page])):
        if kind == "python":
            exec(compile(code, f"{page}, block {number}", "exec"), names)
    check = PAGE_CHECKS.get(page)
    if check is not None:
        check(names, capsys.readouterr().out)


def check_analysis(names, said):
    acts = names["clt"].encode(names["inputs"])
    assert acts[0, -1].count_nonzero() > 0 and names["reconstruction"].shape == names["mlp_outputs"].shape
    assert names["part"].layers == (0, 1) and names["lazy"].lazy and names["half"].dtype == torch.bfloat16
    assert names["value"] > 0 and names["change"].abs().max() > 0
    ablated = names["ablated"].features.to_dense()
    assert ablated[0, names["position"], names["layer"], names["feature"]] == 0
    assert len(names["continued"][0]) == len(names["steered"][0]) == len(names["tokens"][0]) + 8
    assert names["jumprelu"].config.activation_fn == "jumprelu" and Path("clt-jumprelu/config.json").is_file()
    same, clt = names["same"], names["clt"]
    assert same.config.num_features == clt.config.num_features
    torch.testing.assert_close(same.encode(names["inputs"]), acts, rtol=1e-4, atol=1e-5)
    assert "NMSE" in said and "recovered: " in said


def check_file_format(names, said):
    assert names["features"].count_nonzero() > 0 and names["output"].reconstruction.abs().sum() > 0


def check_architecture(names, said):
    assert "model.layers.0.post_attention_layernorm" in said and "model.layers.0.post_mlp_layernorm" in said
    text = " ".join(TEXTS["docs/adding_an_architecture.md"].split())
    quoted = re.search(r"says \*(.*?)\*\. Its code", text)[1]
    assert quoted in names["refusal"]
    inputs, outputs = sites.resolve_sites(names["olmo2"], "hook_resid_mid", "hook_mlp_out")
    assert inputs[2].path == "model.layers.2.mlp" and outputs[2].path.endswith("2.post_feedforward_layernorm")


PAGE_CHECKS = {
    "docs/analysis.md": check_analysis,
    "docs/file_format.md": check_file_format,
    "docs/adding_an_architecture.md": check_architecture,
}


def test_pages_with_python_are_known():
    assert set(PAGE_CHECKS) <= set(pages_with_python())
    assert all((ROOT / where).is_file() for where in RUN_ELSEWHERE.values() if "/" in where)


# -- commands ---------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Ends a script once its options are read."""


def commands():
    """(page, command) of every command of `hf-clt` and of a script, in blocks and in the text; but not "..."."""
    for page, text in TEXTS.items():
        shell = [code for kind, code in blocks(text) if kind == "bash"]
        lines = [line.partition(" # ")[0] for code in shell for line in code.replace("\\\n", " ").splitlines()]
        for line in [*lines, *inline_code(text)]:
            found = re.search(r"(^hf-clt \w+|(?:^|[\s/])(scripts|benchmarks)(/\w+\.py|\.\w+))( .*)?$", line.strip())
            if found and "..." not in line and not line.startswith("#SBATCH"):
                yield page, line.strip()


COMMANDS = sorted(set(commands()))


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_is_understood(page, command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = shlex.split(re.sub(r"\s(\$\w+|&)", "", command))  # a variable of the shell that may be empty
    if words[0] == "hf-clt":
        name, words = words[1], words[2:]
        main, trains = importlib.import_module(f"hf_clt.commands.{name}").main, name == "train"
    else:
        place = next(n for n, word in enumerate(words) if re.match(r"(scripts|benchmarks)(/\w+\.py|\.\w+)$", word))
        where, name = words[place].removesuffix(".py").replace("/", ".").split(".")
        words = words[place + 1 :]
        source = ROOT / where / f"{name}.py"
        assert source.is_file()
        if name in OTHER_ENVIRONMENTS:
            for flag in (word for word in words if word.startswith("--")):
                assert f'"{flag}"' in source.read_text(encoding="utf-8"), flag
            return
        if words:
            main, trains = importlib.import_module(f"{where}.{name}").main, name == "train_clt"
    if not words or "--help" in words:  # it is only named
        return
    if not trains:
        parse_args = argparse.ArgumentParser.parse_args

        def parse_only(parser, args=None, namespace=None):
            raise Parsed(parse_args(parser, args, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(Parsed):
            main(words)
        return
    # What a page leaves to the reader, and what is on the reader's disk.
    if "OPTIONS" in words:
        words = [word for word in words if word != "OPTIONS"] + [word for pair in NEEDED.items() for word in pair]
    words[1:] = ["gpt2-cache" if before == "--activation-cache" else word for before, word in pairwise(words)]
    if not words[0].startswith("-"):
        words[0] = str(ROOT / words[0])
    args, _ = parse_train_args(words)
    assert args.dataset


def test_commands_are_found():
    assert len(COMMANDS) > 40
    assert {"docs/training.md", "docs/analysis.md", "docs/launching.md", "CONTRIBUTING.md"} <= {p for p, _ in COMMANDS}


def test_modules_that_are_run_exist():
    found = [name for text in TEXTS.values() for name in re.findall(r"python -m ((?:tests|hf_clt)[.\w]*)", text)]
    assert found
    for name in found:
        assert (ROOT / Path(*name.split("."))).with_suffix(".py").is_file(), name


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page, text in TEXTS.items():
        code = [
            *inline_code(text),
            *(line for kind, part in blocks(text) if kind == "bash" for line in part.split("\n")),
        ]
        for command in code:
            if command.startswith("make "):
                assert command.split()[1] in targets, f"{page}: {command}"


# -- links, files, names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_files_exist(page):
    text = without_blocks(TEXTS[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            path = (ROOT / page).parent / target.partition("#")[0]
            assert path.exists(), f"{page} links to {target}"
    for code in inline_code(text):
        path = code.split()[0]
        if re.match(r"(hf_clt|scripts|tests|docs|benchmarks|model_cards)/", path) and not MADE.match(path):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_index_lists_every_page():
    listed = set(re.findall(r"\]\(([^)]+)\)", TEXTS["docs/README.md"]))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


def test_functions_of_the_concepts_exist():
    text = TEXTS["docs/concepts.md"]
    modules = "modeling_clt|folding|sparsity|selection|losses|release|training|evaluation"
    names = [code for code in inline_code(text) if re.fullmatch(rf"({modules})(\.\w+)+", code)]
    assert len(names) > 15
    for name in names:
        parts = f"hf_clt.{name}".split(".")
        for length in range(len(parts), 0, -1):
            with contextlib.suppress(ModuleNotFoundError):
                found = importlib.import_module(".".join(parts[:length]))
                break
        for part in parts[length:]:
            found = getattr(found, part)
        assert callable(found), name


# -- options ----------------------------------------------------------------------------------------------------------

OPTIONS = {"--" + name.replace("_", "-"): option for name, option in all_options().items()}


def test_table_of_options_is_that_of_the_dataclasses():
    rows = table_after(TEXTS["docs/training.md"], "purpose", "option", "default")
    flags = [row[1].strip("`") for row in rows]
    assert len(flags) == len(set(flags)) > 40
    for flag, row in zip(flags, rows, strict=True):
        assert row[2] == OPTIONS[flag].default, flag


def test_flags_in_the_text_exist(monkeypatch):
    """Each `--flag` that a page names is an option of some script."""
    known = set(OPTIONS) | FLAGS_OF_OTHERS
    known |= {flag.replace("--", "--no-", 1) for flag, option in OPTIONS.items() if kind_of(option.hint)[0] is bool}

    def collect(parser, args=None, namespace=None):
        known.update(parser._option_string_actions)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", collect)
    programs = [
        path for folder in ("scripts", "benchmarks", "hf_clt/commands") for path in (ROOT / folder).glob("*.py")
    ]
    for path in programs:
        text = path.read_text(encoding="utf-8")
        has_options = "def main(" in text and re.search("add_argument|make_parser", text)
        if path.stem in OTHER_ENVIRONMENTS:
            known.update(re.findall(r'"(--[a-z-]+)"', text))
        elif has_options and path.stem != "__init__":
            with pytest.raises(Parsed):
                importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)).main([])
    known |= {flag.replace("-", "_").replace("__", "--", 1) for flag in known}
    for page, text in TEXTS.items():
        for code in inline_code(text):
            if re.match("accelerate|torchrun", code) or not (code.startswith("--") or "scripts/" in code):
                continue  # a command of another program
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert flag in known, f"{page} names {flag}"


# -- settings and what they need --------------------------------------------------------------------------------------

SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192}
SMOLLM2 |= {"tie_word_embeddings": True}


@pytest.mark.parametrize("row", table_after(TEXTS["docs/training.md"], "model", "features", "k"), ids=lambda r: r[0])
def test_settings_need_what_the_table_says(row, tmp_path, monkeypatch, capsys):
    model, features, k, processes, per_clt, batch, weights, mixed, optimizer, buffer, *figures = row
    monkeypatch.chdir(tmp_path)
    AutoConfig.for_model("llama", **SMOLLM2).save_pretrained("quickstart/model")
    words = ["--model", model.split("`")[1], "--num-features", features.replace(",", ""), "--l0", k]
    words += ["--processes", processes, "--feature-parallel-size", per_clt, "--batch-size", batch.replace(",", "")]
    words += ["--clt-dtype", weights, "--mixed-precision", mixed, "--optimizer", optimizer]
    buffer, _, buffer_device = buffer.partition(", ")
    words += ["--buffer-dtype", buffer, "--buffer-device", buffer_device or "device"]
    assert estimate.main(words) == 0
    said = capsys.readouterr().out
    memory, milliseconds = re.findall(r"total +([\d,.]+ (?:GB|ms))", said)
    speed, hours = re.search(r"([\d,]+) tokens per second, ([\d.]+) hours", said).groups()
    needed = [memory, milliseconds, speed, hours]
    assert figures == needed, f"the row has to end with | {' | '.join(needed)} |"
    # The options that the training takes.
    training = CLTTrainingArguments(
        batch_size=int(batch.replace(",", "")),
        feature_parallel_size=int(per_clt),
        clt_dtype=weights,
        mixed_precision=mixed,
        optimizer=optimizer,
        buffer_dtype=buffer,
        buffer_device=buffer_device or None,
    )
    assert int(features.replace(",", "")) % training.feature_parallel_size == 0
    assert int(processes) % training.feature_parallel_size == 0


# -- files ------------------------------------------------------------------------------------------------------------


def names_in_first_column(rows):
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def format_tables(*head):
    """All tables of docs/file_format.md with this head, in order."""
    text, found = TEXTS["docs/file_format.md"], []
    while "| " + " | ".join(head) in text:
        found.append(table_after(text, *head))
        text = text.split("| " + " | ".join(head), 1)[1]
    return found


def test_fields_of_metrics_are_documented(folder):
    train, heldout = format_tables("field", "|")
    rows = [json.loads(line) for line in (folder / "quickstart/clt/metrics.jsonl").read_text().splitlines()]
    for table, split in ((train, "train"), (heldout, "heldout")):
        written = {name for row in rows if row["split"] == split for name in row}
        assert names_in_first_column(table) - {"skipped_tokens"} == written


def test_files_of_a_release_and_of_a_checkpoint_are_documented(folder):
    release, output, checkpoint = format_tables("file", "holds")
    out = folder / "quickstart/clt"

    def documented(rows):
        names = {re.sub(r"\{\w+\}", "0", name) for name in names_in_first_column(rows)}
        return {name.rstrip("/") for name in names}

    def written(path):
        return {re.sub(r"(W_enc|W_dec)_\d+|(rank)-\d+", r"\1_0", entry.name) for entry in path.iterdir()}

    found = {name for name in written(out) if not name.startswith("checkpoint-")}
    assert found == documented(release) | {"metrics.jsonl"}
    assert documented(output) == {"metrics.jsonl", "checkpoint-0"}
    plots = dict(release)["`plots/`"]
    assert {path.name for path in (out / "plots").iterdir()} == set(re.findall(r"`(\w+\.png)`", plots))
    saved = {path.name for path in (out / "checkpoint-2").iterdir()}
    assert saved == documented(checkpoint)
    with safe_open(out / "checkpoint-2/model.safetensors", "pt") as tensors:
        inside = {re.sub(r"\d+", "{l}", name) for name in tensors.keys()}  # noqa: SIM118
    assert inside == set(re.findall(r"`([^`]+)`", checkpoint[0][1]))
    with safe_open(out / "checkpoint-2/optimizer.safetensors", "pt") as tensors:
        assert {name.partition(":")[2] for name in tensors.keys()} == {"step", "exp_avg", "exp_avg_sq"}  # noqa: SIM118
    state = json.loads((out / "checkpoint-2/state.json").read_text())
    assert set(state) == set(re.findall(r"`([^`]+)`", checkpoint[3][1]))
    config = (out / "config.yaml").read_text()
    assert {line.partition(":")[0] for line in config.splitlines()} == set(re.findall(r"`(\w+)`", release[1][1]))


@pytest.mark.slow
def test_a_checkpoint_is_released_by_going_on_from_it(folder, tmp_path, monkeypatch, fresh_accelerate):
    shutil.copytree(folder / "quickstart", tmp_path / "quickstart")
    monkeypatch.chdir(tmp_path)
    state = json.loads(Path("quickstart/clt/checkpoint-2/state.json").read_text())
    args = CLTTrainingArguments(
        **{**state["args"], "training_steps": 2, "resume_from_checkpoint": "quickstart/clt/checkpoint-2"}
    )
    CLTTrainer(args, build_config(args, {"num_features": 64, "activation_fn": "batchtopk", "k": 4})).train()
    early, late = (CrossLayerTranscoder.from_pretrained(root / "quickstart/clt") for root in (tmp_path, folder))
    model, tokenizer = load_language_model("quickstart/model")
    inputs, _ = Harvester(model, "hook_resid_mid", "hook_mlp_out")(tokenizer("A word", return_tensors="pt").input_ids)
    assert not torch.equal(early(inputs).reconstruction, late(inputs).reconstruction)


def test_manifest_of_a_cache_is_documented(folder):
    manifest = json.loads((folder / "gpt2-cache/manifest.json").read_text())
    (table,) = format_tables("in `manifest.json`", "|")
    assert names_in_first_column(table) == set(manifest)
    shard = manifest["splits"]["train"]["shards"][0][0]
    last = set(re.findall(r"`([^`]+)`", table[-1][1]))
    assert last == set(shard) | {"heldout", "train", "shards"}
    with safe_open(folder / "gpt2-cache" / shard["file"], "pt") as tensors:
        inside = {name.replace("0.", "{b}.", 1) for name in tensors.keys() if name.startswith("0.")}  # noqa: SIM118
    text = TEXTS["docs/file_format.md"]
    assert inside == set(re.findall(r"`(\{b\}\.\w+)`", text))
