"""The README's example prints what the README says it prints, and its commands name things that exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import fluidopt as fo

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


def test_every_python_block_runs():
    names: dict[str, object] = {}
    for source in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, "README.md", "exec"), names)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"fo\.(\w+)", README))))
def test_names_exist(name):
    assert hasattr(fo, name)
