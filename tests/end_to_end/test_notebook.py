"""The notebook runs from top to bottom, in a kernel of this interpreter, and is committed with what it shows."""

import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "first_clt.ipynb"
QUICKSTART = ROOT / "quickstart"


def read_notebook():
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed (the extra `notebook`)")
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook, folder: Path) -> None:
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (the extra `notebook`)")
    client = pytest.importorskip("nbclient", reason="nbclient is not installed (the extra `notebook`)")
    from nbformat.v4 import new_code_cell

    notebook.cells.append(new_code_cell("import sys\nprint(sys.executable)"))
    client.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    assert notebook.cells.pop().outputs[0].text.strip() == sys.executable


def shown(notebook) -> list[str]:
    """The kinds of data that its cells show, and the names of its streams, sorted."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sorted(kind for output in outputs for kind in output.get("data", [output.get("name")]))


def test_committed_with_small_outputs():
    notebook = read_notebook()
    assert NOTEBOOK.stat().st_size < 300_000
    kinds = shown(notebook)
    assert kinds.count("image/png") == 1 and kinds.count("text/html") == 3 and "stderr" not in kinds
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", "notebooks"])
def test_runs(folder, tmp_path, monkeypatch):
    """From the root only as far as it looks for its files, which is all that differs."""
    if not (QUICKSTART / "model").is_dir():
        pytest.skip("no quickstart/model: python scripts/prepare_quickstart.py prepares it")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read_notebook()
    (tmp_path / "quickstart").symlink_to(QUICKSTART.resolve())
    (tmp_path / "notebooks").mkdir()
    if folder == "":
        notebook.cells = notebook.cells[:3]
    expected = [kind for kind in shown(notebook) if kind != "stdout"]
    execute(notebook, tmp_path / folder)
    assert [kind for kind in shown(notebook) if kind not in ("stdout", "stderr")] == expected
