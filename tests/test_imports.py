"""Imports run one way through the package, from what people call to what it is made of, and never in a circle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# Who may import whom at its top, from CONTRIBUTING.md: those of later lines, and of its own. (Inside a function is
# another matter: what `push_to_hub` of a CLT calls knows the CLT.)
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PICTURE = re.search(r"Imports run one way.*?```\n(.*?)```", CONTRIBUTING, re.DOTALL)[1]
LAYERS = [re.findall(r"\w+", line.partition("  ")[0]) for line in PICTURE.splitlines()]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted((ROOT / "hf_clt").rglob("*.py"))}


def imported(name: str) -> set[str]:
    """The package's modules that a module imports when it is imported itself."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found & MODULES.keys() - {name, "hf_clt"}


def part_of(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") and part_of(name) != "__main__"])
def test_a_module_imports_nothing_above_it(name):
    assert part_of(name) in RANK, "give it a layer"
    above = [other for other in imported(name) if RANK[part_of(other)] < RANK[part_of(name)]]
    assert not above


def test_there_is_no_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(imported(name)):
                visit(other)
            done.add(path.pop())

    for name in MODULES:
        visit(name)


def test_loading_a_clt_imports_nothing_that_it_does_not_need(tmp_path):
    """Of accelerate's trackers the module is loaded by transformers itself."""
    program = (
        "import sys; from hf_clt import CLTConfig, CrossLayerTranscoder as CLT; folder = sys.argv[1];"
        "CLT(CLTConfig(num_layers=2, d_model=4, num_features=8)).save_pretrained(folder);"
        "CLT.from_pretrained(folder); print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "hf_clt.modeling_clt" in loaded
    assert not loaded & {"nnsight", "datasets", "pandas", "evaluate", "matplotlib", "wandb", "tensorboard", "trackio"}
