"""The cache of compiled code on disk: what changes makes it forget a function."""

import subprocess
import sys

CALLEE = """
from fluidopt.simulation.compilation import compiled

@compiled
def part(x: int) -> int:
    return x + {added}
"""
BETWEEN = """
from fluidopt.simulation.compilation import compiled
from callee import part

@compiled
def between(x: int) -> int:
    return part(x)
"""
CALLER = """
from fluidopt.simulation.compilation import compiled_apart
from between import between

@compiled_apart
def whole(x: int) -> int:
    return between(x)

print(whole(1), sum(whole.stats.cache_hits.values()))
"""


def run(folder):
    done = subprocess.run([sys.executable, "caller.py"], cwd=folder, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


def test_a_function_is_compiled_anew_when_the_file_of_one_it_calls_through_another_changes(tmp_path):
    (tmp_path / "callee.py").write_text(CALLEE.format(added=1))
    (tmp_path / "between.py").write_text(BETWEEN)
    (tmp_path / "caller.py").write_text(CALLER)
    assert run(tmp_path) == (2, 0)
    assert run(tmp_path) == (2, 1), "unchanged, it comes from the cache"
    (tmp_path / "callee.py").write_text(CALLEE.format(added=2))
    assert run(tmp_path) == (3, 0)


def test_without_compilation_the_functions_are_plain(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    (tmp_path / "callee.py").write_text(CALLEE.format(added=1) + "print(part(1), type(part).__name__ == 'function')")
    done = subprocess.run([sys.executable, "callee.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "True"]
