"""Every notebook runs from a clean kernel, says nothing on standard error, and is committed without outputs."""

from functools import cache
from pathlib import Path

import nbclient
import nbformat
import pytest
from recorded import SHARED, recorded

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 120


def can_run(path):
    """Whether the recorded data that the notebook reads, if it reads any, are there."""
    return SHARED.exists() or path.name != "05-real-traces.ipynb"


each_that_runs = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if can_run(path) else recorded) for path in NOTEBOOKS],
    ids=lambda path: path.name,
)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


@cache
def executed(path):
    """The notebook at ``path`` with the outputs of one run, which the tests of the documentation share."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    return client.execute()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_that_runs
def test_runs_in_silence(path):
    said = [
        output.text
        for cell in code_cells(executed(path))
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not said, "\n".join(said)


@each_that_runs
def test_figures_and_tables_have_something_to_show(path):
    """A figure that only shows its ``repr``, for one, has fallen back to text."""
    shown = [
        output.data
        for cell in code_cells(executed(path))
        for output in cell.outputs
        if output.output_type in {"display_data", "execute_result"}
    ]
    assert shown
    assert all(set(data) & {"text/html", "text/latex", "text/markdown", "image/png", "image/svg+xml"} for data in shown)


@each_notebook
def test_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
