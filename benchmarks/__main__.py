"""Run every benchmark and write the tables of the documentation: ``python -m benchmarks``.

Each benchmark is a module with a ``main()`` that prints; every one states its peer and measures it in the same run.
"""

from __future__ import annotations

import importlib
import io
import os
import platform
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numba
import numpy

import fluidopt

OUT = Path(__file__).resolve().parents[1] / "docs" / "_benchmarks.md"

REGISTRY = {
    "solve": "From arrays to a certified plan, against HiGHS interior point on the same arrays",
    "knapsack": "The structured solver, against sorting as many numbers and against HiGHS interior point",
    "resolve": "Re-solves after changed arrival rates",
    "frontier": "Ten thousand points of a frontier or a sweep, against a cvxpy loop with a parameter",
    "plain_gillespie": "The Markov-chain simulator, against a plain per-GPU Gillespie in numba",
    "queue_peers": "The Markov-chain simulator, against Ciw and SimPy on the same queues",
    "replay": "The replay of traces, against an engine in plain Python that walks through every iteration",
    "chain": "The exact Markov chain: building, and the stationary law by three routes",
}


def section(name: str) -> str:
    """One benchmark's heading and what it printed; what is no table is set as text."""
    module = importlib.import_module(f"benchmarks.{name}")
    printed = io.StringIO()
    arguments, sys.argv = sys.argv, [name]
    try:
        with redirect_stdout(printed):
            module.main()
    finally:
        sys.argv = arguments
    lines = printed.getvalue().strip().splitlines()
    body = "\n".join(lines) if lines[0].startswith("|") else "```text\n" + "\n".join(lines) + "\n```"
    return f"## {REGISTRY[name]}\n\n{body}\n\n`python benchmarks/{name}.py`\n"


def main() -> None:
    """Run all, or those named on the command line (the others keep their old section)."""
    names = sys.argv[1:] or list(REGISTRY)
    old = OUT.read_text(encoding="utf-8") if OUT.exists() else ""
    kept = {f"## {part.splitlines()[0]}": part for part in old.split("\n## ")[1:]}
    machine = (
        f"Measured on {os.cpu_count()} cores ({platform.machine()}, {platform.system()}), Python "
        f"{platform.python_version()}, numpy {numpy.__version__}, numba {numba.__version__}, fluidopt "
        f"{fluidopt.__version__}.\n"
    )
    parts = [machine]
    for name, title in REGISTRY.items():
        if name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            parts.append(section(name))
        elif f"## {title}" in kept:
            parts.append("## " + kept[f"## {title}"].strip() + "\n")
    OUT.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {OUT}", file=sys.stderr)


if __name__ == "__main__":
    main()
