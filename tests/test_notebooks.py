"""Every notebook runs from top to bottom."""

import warnings
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the kernel's transport; the notebook's code runs in another process
        from nbclient import NotebookClient

        notebook = NotebookClient(nbformat.read(path, as_version=4), timeout=900, kernel_name="python3").execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_outputs_have_no_errors_and_no_paths(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert "/tmp/" not in output.get("text", "")
