"""Revenue against the bound of a service level, 10,000 points: `frontier`, and a cvxpy loop with a parameter."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cvxpy as cp
import numpy as np

import fluidopt as fo
from benchmarks.resolve import random_model
from fluidopt.studies.frontier import frontier

CLASSES = 10
POINTS = 10_000


def cvxpy_parameter(model: fo.FluidModel, level: Any) -> Callable[[float], float]:
    """[L26] eq. (40) with the promise of ``level``, vectorised over classes, its bound a parameter; default solver."""
    workload, (gpu,) = model.workload, model.gpu_types
    mixed, solo = gpu.modes()
    prices, classes = model.scenario.prices, len(workload)
    value = prices.prompt * workload.prompt_tokens + prices.output * workload.output_tokens
    prefill = mixed.prefill_speed / workload.prompt_tokens
    by_mixed, by_solo = (mode.decode_speed / workload.output_tokens for mode in (mixed, solo))
    x, y_mixed, y_solo, waiting, buffered = (cp.Variable(classes, nonneg=True) for _ in range(5))
    bound = cp.Parameter(nonneg=True)
    decoded = cp.multiply(by_mixed, y_mixed) + cp.multiply(by_solo, y_solo)
    theta, busy = workload.abandonment_rate, cp.sum(x)
    rows = [
        busy <= 1,
        cp.sum(y_mixed) <= mixed.decode_slots * busy,
        cp.sum(y_solo) <= solo.decode_slots * (1 - busy),
        workload.arrival_rate - cp.multiply(theta, waiting) == cp.multiply(prefill, x),
        cp.multiply(prefill, x) - cp.multiply(theta, buffered) == decoded,
    ]
    if isinstance(level, fo.PrefillFairness):
        rows += [cp.max(x) - cp.min(x) <= bound, buffered == 0]
    else:
        slots = (mixed.decode_slots * busy, solo.decode_slots * (1 - busy))
        times = (mixed.iteration_time, solo.iteration_time)
        rows.append(
            sum(t * each for t, each in zip(times, slots, strict=True)) <= bound * sum(slots),
        )
    problem = cp.Problem(cp.Maximize(value @ decoded), rows)

    def solve(at: float) -> float:
        bound.value = at
        return float(problem.solve())

    return solve


def main() -> None:
    """Print seconds for all points and ratios; fails where the routes disagree."""
    model = random_model(CLASSES)
    frontier(model, fo.PrefillFairness(at_most=0.0), points=10)  # what is loaded and compiled once
    print("| frontier of 10 classes, 10,000 points | programs solved | kinks | seconds | cvxpy loop, s | over it |")
    print("|---|---:|---:|---:|---:|---:|")
    for level in (fo.PrefillFairness(at_most=0.0), fo.SlotTPOT(at_most=0.0)):
        begin = time.perf_counter()
        found = frontier(model, level, points=POINTS)
        seconds = time.perf_counter() - begin
        bounds = np.asarray(found.points[level.kind])
        solve = cvxpy_parameter(model, level)
        solve(float(bounds[-1]))
        begin = time.perf_counter()
        expected = np.array([solve(float(at)) for at in bounds[1:]])
        loop = time.perf_counter() - begin
        # cvxpy's default solver stops at 1e-8 of a program whose optimum falls to 0
        np.testing.assert_allclose(found.revenue_rate[1:], expected, rtol=1e-5, atol=1e-5 * expected.max())
        kind = level.kind.replace("_", " ")
        where = "right side" if found.piecewise_linear else "coefficient"
        print(
            f"| {kind} ({where}) | {found.programs_solved} | {len(found.kinks)} | {seconds:.2f} | {loop:.1f} | "
            f"{loop / seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
