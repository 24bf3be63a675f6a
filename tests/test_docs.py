"""The documentation builds without a warning, its code runs, and it covers every public name and every option. Every
notebook runs from a clean kernel, says nothing on standard error, and is committed without outputs."""

import re
import shutil
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import nbclient
import nbformat
import pytest
import typer
from recorded import SHARED, recorded

import fluidopt as fo
from fluidopt.cli import app

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.toml"))


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


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """A finished build: its log, and the folder of the pages.

    The notebooks in it are already executed, so that each runs once in a test session.
    """
    root = tmp_path_factory.mktemp("docs")
    source, pages = root / "docs", root / "html"
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("_build", "notebooks", "__pycache__"))
    (source / "notebooks").mkdir()
    for path in NOTEBOOKS:
        notebook = executed(path) if can_run(path) else nbformat.read(path, as_version=4)
        nbformat.write(notebook, source / "notebooks" / path.name)
    with (source / "conf.py").open("a", encoding="utf-8") as settings:
        settings.write('\nnb_execution_excludepatterns = ["notebooks/*"]\n')
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", source, pages]
    return subprocess.run(command, capture_output=True, text=True, check=False), pages


@pytest.fixture(scope="session")
def site(build):
    """The folder of the built pages."""
    return build[1]


@pytest.fixture(scope="session")
def documented(site):
    """The Python names that the pages define, from the inventory."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(inventory).decode().splitlines()
    return {line.split(maxsplit=1)[0] for line in lines if " py:" in line}


def words(page):
    """The text of a built page, without markup."""
    return re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_builds_without_a_warning(build):
    done, _ = build
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in fo.__all__ if name != "__version__"])
def test_every_public_name_is_documented(documented, name):
    assert f"fluidopt.{name}" in documented


def test_every_command_and_option_is_documented(site):
    page = words(site / "cli.html")
    for name, command in typer.main.get_command(app).commands.items():
        assert f"fluidopt {name}" in page
        for option in command.params:
            assert all(form in page for form in option.opts if form.startswith("--"))


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_exit_codes_are_documented(site, code):
    assert f"<dt>{code}</dt>" in (site / "cli.html").read_text(encoding="utf-8")


def test_every_notebook_is_a_page(site):
    assert NOTEBOOKS
    assert all((site / "notebooks" / f"{path.stem}.html").is_file() for path in NOTEBOOKS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_scenario_examples_are_valid_and_have_a_plan(path):
    scenario = fo.read_scenario(path)
    plan = fo.FluidModel.from_scenario(scenario).solve()
    assert plan.certificate.holds(1e-7)
    assert fo.Scenario.from_dict(scenario.to_dict()) == scenario


def test_every_scenario_example_is_on_the_page():
    page = (DOCS / "scenario.md").read_text(encoding="utf-8")
    assert EXAMPLES
    assert all(f"examples/{path.name}" in page for path in EXAMPLES)


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
