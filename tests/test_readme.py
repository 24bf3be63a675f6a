"""The README's example prints what the README says it prints, and its commands name things that exist."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fluidopt as fo
from fluidopt.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first fenced block in that language."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_prints_what_it_says():
    """The table word for word; the simulated figure within its own interval, since platforms round differently."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block("python"), "README.md", "exec"), {})  # the project's own file
    *table, line = printed.getvalue().strip().splitlines()
    *expected_table, expected = block("text").strip().splitlines()
    assert [row.split() for row in table] == [row.split() for row in expected_table]
    number = r"([\d.]+) in the fluid limit, ([\d.]+) ± ([\d.]+)"
    found, promised = (re.search(number, each) for each in (line, expected))
    assert found is not None
    assert promised is not None
    assert found[1] == promised[1]
    assert float(found[2]) == pytest.approx(float(promised[2]), abs=float(promised[3]))


def test_the_figure_shows_what_the_text_beside_it_says(tmp_path):
    """The committed figure is the one that the first command draws; its text is computed again."""
    done = CliRunner().invoke(app, ["demo", "--figure", str(tmp_path / "demo.png"), "--json"])
    data = json.loads(done.stdout)
    allocation, plan, earned = (
        data["plan"]["thresholds"],
        data["plan"],
        data["simulation"]["comparison"][0]["simulated"],
    )
    in_part = [name for name, row in allocation.items() if row["decision"] == "serve part"]
    assert len(allocation) == 5
    assert in_part == ["prompt 1.1k, output 405"]
    assert f"{100 * plan['modes']['mixed']['fleet_share']:.0f} % of the fleet may prefill" in README
    gap = 100 * (1 - earned / plan["revenue_rate"])
    (said,) = re.findall(r"20 simulated GPUs earn ([\d.]+) % less", README)
    assert gap == pytest.approx(float(said), abs=0.15)
    assert (Path(__file__).parents[1] / "docs" / "_static" / "demo.png").is_file()


def test_every_python_block_runs():
    names: dict[str, object] = {}
    for source in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, "README.md", "exec"), names)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """A directory with the files that ``fluidopt example`` writes."""
    folder = tmp_path_factory.mktemp("readme")
    fo.write_example(folder)
    return folder


@pytest.mark.parametrize("line", re.findall(r"^fluidopt .*?(?=  #)", README, re.MULTILINE))
def test_commands_work_when_pasted(line, tried, monkeypatch):
    monkeypatch.chdir(tried)
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.stderr or repr(done.exception)
    assert done.stdout


@pytest.mark.parametrize("name", sorted(set(re.findall(r"fo\.(\w+)", README))))
def test_names_exist(name):
    assert hasattr(fo, name)
