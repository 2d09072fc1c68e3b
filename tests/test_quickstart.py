"""The notebook of the documentation: it runs as it stands, and what is stored with it is whole and small."""

import ast
import importlib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs/quickstart.ipynb"


def read() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    """Of its outputs, without the notices of libraries, which depend on what is installed."""
    return [
        "+".join(sorted(output.get("data", {output.get("name"): None})))
        for output in cell.outputs
        if output.get("name") != "stderr"
    ]


def test_the_stored_outputs_are_whole_and_small():
    cells = code(read())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # from one run, from the top
    pictures = [kind for cell in cells for kind in kinds(cell) if "image/" in kind]
    assert len(pictures) >= 9 and NOTEBOOK.stat().st_size < 300_000
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


def test_what_it_imports_of_the_package_is_there():
    for cell in code(read()):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("microcinema"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_is_stored(tmp_path: Path):
    stored, fresh = read(), read()
    NotebookClient(fresh, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [kinds(cell) for cell in code(fresh)] == [kinds(cell) for cell in code(stored)]
