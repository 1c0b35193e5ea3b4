"""Every notebook runs from top to bottom."""

import warnings
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


SLOW = "02", "03"
"""Notebooks that train for more than a minute."""
PARAMETERS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem.startswith(SLOW) else [])
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", PARAMETERS)
def test_notebook_runs(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's transport; the notebook's own code runs in another process
        from nbclient import NotebookClient

        NotebookClient(nbformat.read(path, as_version=4), timeout=600, kernel_name="python3").execute()
