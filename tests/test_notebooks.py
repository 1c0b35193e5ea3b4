"""Every notebook runs from top to bottom."""

import warnings
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's transport; the notebook's own code runs in another process
        from nbclient import NotebookClient

        NotebookClient(nbformat.read(path, as_version=4), timeout=300, kernel_name="python3").execute()
