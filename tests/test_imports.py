"""Imports run one way through the package, from what people call to what it is made of, and never in a circle."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# Who may import whom at its top: those of later lines, and of its own. (Inside a function is another matter: what
# `push_to_hub` of a CLT calls knows the CLT.)
LAYERS = [
    ["commands"],
    ["training", "features", "importers", "estimate"],
    ["evaluation"],
    ["harvest"],
    ["hub"],
    ["partial_clt"],
    ["modeling_clt"],
    ["checkpoint_format", "download", "folding", "losses", "kernels", "sparsity", "sharding"],
    ["command", "configuration_clt", "device", "files", "lazy"],
]
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


def test_the_order_is_the_one_that_contributing_shows():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = [text.find(layer[0], text.find("Imports run one way")) for layer in LAYERS]
    assert all(first < second for first, second in pairwise(places) if min(first, second) > 0)
