"""10,000 points of a model of 10 classes: `frontier` and `sweep`, and the same points in a cvxpy loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cvxpy as cp
import numpy as np

import fluidopt as fo
from benchmarks.resolve import random_model
from fluidopt.studies.frontier import frontier
from fluidopt.studies.sweep import sweep
from fluidopt.studies.sweep_model import Variants

CLASSES = 10
POINTS = 10_000
SIDE = 100
LEVELS = (fo.PrefillFairness(at_most=0.0), fo.SlotTPOT(at_most=0.0))
SWEEPS: dict[str, Mapping[str, Sequence[Any]]] = {
    "right sides and prices": {
        "arrival_rate": np.linspace(0.5, 1.5, SIDE),
        "output_price": np.linspace(0.1, 0.4, SIDE),
    },
    "coefficients of two classes": {
        "prompt_tokens[class 1]": np.linspace(200, 2000, SIDE),
        "output_tokens[class 3]": np.linspace(200, 1500, SIDE),
    },
    "all coefficients": {"alpha": np.linspace(0.015, 0.02, SIDE), "beta": np.linspace(4e-5, 8e-5, SIDE)},
}


def numbers_of(model: fo.FluidModel) -> dict[str, Any]:
    """What stands in [L26] eq. (40), per class and mode."""
    workload, (gpu,) = model.workload, model.gpu_types
    mixed, solo = gpu.modes()
    prices = model.scenario.prices
    value = prices.prompt * workload.prompt_tokens + prices.output * workload.output_tokens
    by_mixed, by_solo = (mode.decode_speed / workload.output_tokens for mode in (mixed, solo))
    return {
        "rate": workload.arrival_rate,
        "theta": workload.abandonment_rate,
        "prefill": mixed.prefill_speed / workload.prompt_tokens,
        "by_mixed": by_mixed,
        "by_solo": by_solo,
        "gain_mixed": value * by_mixed,
        "gain_solo": value * by_solo,
    }


class CvxpyLoop:
    """[L26] eq. (40) as one writes it in cvxpy, vectorised over classes, what moves a parameter; default solver."""

    def __init__(self, model: fo.FluidModel, moving: Sequence[str], level: Any = None) -> None:
        (gpu,) = model.gpu_types
        mixed, solo = gpu.modes()
        x, y_mixed, y_solo, waiting, buffered = (cp.Variable(len(model.workload), nonneg=True) for _ in range(5))
        self.bound = cp.Parameter(nonneg=True)
        self.parameters = {name: cp.Parameter(len(model.workload), nonneg=True) for name in moving}
        n = numbers_of(model) | self.parameters
        busy = cp.sum(x)
        slots = mixed.decode_slots * busy, solo.decode_slots * (1 - busy)
        prefilled = cp.multiply(n["prefill"], x)
        rows = [
            busy <= 1,
            cp.sum(y_mixed) <= slots[0],
            cp.sum(y_solo) <= slots[1],
            n["rate"] - cp.multiply(n["theta"], waiting) == prefilled,
            prefilled - cp.multiply(n["theta"], buffered)
            == cp.multiply(n["by_mixed"], y_mixed) + cp.multiply(n["by_solo"], y_solo),
        ]
        if isinstance(level, fo.PrefillFairness):
            rows += [cp.max(x) - cp.min(x) <= self.bound, buffered == 0]
        elif level is not None:
            times = (mixed.iteration_time, solo.iteration_time)
            rows.append(sum(t * each for t, each in zip(times, slots, strict=True)) <= self.bound * sum(slots))
        self.problem = cp.Problem(cp.Maximize(n["gain_mixed"] @ y_mixed + n["gain_solo"] @ y_solo), rows)

    def at_bound(self, bound: float) -> float:
        """The optimum at one bound of the service level."""
        self.bound.value = bound
        return float(self.problem.solve())

    def at(self, numbers: Mapping[str, Any]) -> float:
        """The optimum at other numbers."""
        for name, parameter in self.parameters.items():
            parameter.value = numbers[name]
        return float(self.problem.solve())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def line(name: str, solved: Any, kinks: Any, seconds: float, loop: float) -> None:
    """A row of the table."""
    print(f"| {name} | {solved} | {kinks} | {seconds:.2f} | {loop:.1f} | {loop / seconds:.0f} |", flush=True)


def compare_frontier(model: fo.FluidModel, level: Any) -> None:
    """Print a row for one service level; fails where the routes disagree."""
    seconds, found = timed(lambda: frontier(model, level, points=POINTS))
    bounds = np.asarray(found.points[level.kind])[1:].tolist()
    cvxpy = CvxpyLoop(model, [], level)
    cvxpy.at_bound(bounds[-1])
    loop, expected = timed(lambda: [cvxpy.at_bound(at) for at in bounds])
    # cvxpy's default solver stops at 1e-8 of a program whose optimum falls to 0
    np.testing.assert_allclose(found.revenue_rate[1:], expected, rtol=1e-5, atol=1e-5 * max(expected))
    where = "right side" if found.piecewise_linear else "coefficient"
    name = f"frontier, {level.kind.replace('_', ' ')} ({where})"
    line(name, found.programs_solved, len(found.kinks), seconds, loop)


def compare_sweep(model: fo.FluidModel, what: str, over: Mapping[str, Sequence[Any]]) -> None:
    """Print a row for one grid; fails where the routes disagree. The loop is given its numbers ready-made."""
    seconds, found = timed(lambda: sweep(model, over=over))
    vary = Variants.of(model.scenario, over)
    points = [dict(zip(over, values, strict=True)) for values in product(*over.values())]
    numbers = [numbers_of(vary(point)) for point in points]
    moving = [name for name in numbers[0] if any(not np.array_equal(numbers[0][name], each[name]) for each in numbers)]
    cvxpy = CvxpyLoop(model, moving)
    cvxpy.at(numbers[-1])
    loop, expected = timed(lambda: [cvxpy.at(each) for each in numbers])
    np.testing.assert_allclose(found["revenue_rate"].values.ravel(), expected, rtol=1e-5)
    line(f"sweep, {what}", "", "", seconds, loop)


def main() -> None:
    """Print seconds for all points and ratios; fails where the routes disagree."""
    model = random_model(CLASSES)
    frontier(model, LEVELS[0], points=10)  # what is loaded and compiled once
    sweep(model, over={"arrival_rate": [1.0, 1.1], "alpha": [0.0174, 0.018]})
    print("| 10 classes, 10,000 points | programs solved | kinks | seconds | cvxpy loop, s | over it |")
    print("|---|---:|---:|---:|---:|---:|")
    for level in LEVELS:
        compare_frontier(model, level)
    for what, over in SWEEPS.items():
        compare_sweep(model, what, over)


if __name__ == "__main__":
    main()
