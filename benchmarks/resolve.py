"""Re-solves of one model after changed arrival rates: HiGHS alone, `Solver`, and cvxpy with a parameter."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cvxpy as cp
import highspy
import numpy as np

import fluidopt as fo
from fluidopt.reference import reference_model

CLASSES = 10
RE_SOLVES = 2_000


def random_model(classes: int) -> fo.FluidModel:
    """Classes of random sizes that together ask for somewhat more than the fleet has."""
    rng = np.random.default_rng(classes)
    frame = {
        "name": [f"class {at}" for at in range(classes)],
        "arrival_rate": rng.uniform(0.5, 1.5, classes) / classes * 1.2,
        "prompt_tokens": rng.uniform(200, 3000, classes),
        "output_tokens": rng.uniform(200, 3000, classes),
        "abandonment_rate": rng.uniform(0.05, 0.2, classes),
    }
    return fo.FluidModel(
        fo.Workload.from_frame(frame), reference_model().gpu_types, prices=reference_model().scenario.prices
    )


def highs_alone(model: fo.FluidModel) -> Callable[[Any], float]:
    """A bare warm re-solve through highspy, with HiGHS's own defaults, reading values and duals."""
    program = model.program()
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = program.shape
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_, lp.col_lower_ = program.objective, np.zeros(program.shape[1])
    lp.col_upper_ = np.full(program.shape[1], highspy.kHighsInf)
    lp.row_lower_, lp.row_upper_ = program.row_lower, program.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = program.matrix.indptr, program.matrix.indices
    lp.a_matrix_.value_ = program.matrix.data
    highs.passModel(lp)
    highs.run()
    rows = np.flatnonzero([name.startswith("prefill_balance") for name in program.row_names]).astype(np.int32)

    def solve(rates: Any) -> float:
        highs.changeRowsBounds(len(rows), rows, rates, rates)
        highs.run()
        answer = highs.getSolution()
        values, _ = np.array(answer.col_value), np.array(answer.row_dual)
        return float(program.objective @ values)

    return solve


def kept_solver(model: fo.FluidModel) -> Callable[[Any], float]:
    """`Solver`, certified each time."""
    solver = fo.Solver(model)
    solver.solve()
    return lambda rates: solver.solve({"lambda": rates}).objective


def cvxpy_parameter(model: fo.FluidModel) -> Callable[[Any], float]:
    """[L26] eq. (40) as one writes it in cvxpy, vectorised over classes, the rates a parameter; default solver."""
    workload, (gpu,) = model.workload, model.gpu_types
    mixed, solo = gpu.modes()
    prices, classes = model.scenario.prices, len(workload)
    value = prices.prompt * workload.prompt_tokens + prices.output * workload.output_tokens
    prefill = mixed.prefill_speed / workload.prompt_tokens
    by_mixed, by_solo = (mode.decode_speed / workload.output_tokens for mode in (mixed, solo))
    x, y_mixed, y_solo, waiting, buffered = (cp.Variable(classes, nonneg=True) for _ in range(5))
    rates = cp.Parameter(classes, nonneg=True)
    theta = workload.abandonment_rate
    decoded = cp.multiply(by_mixed, y_mixed) + cp.multiply(by_solo, y_solo)
    problem = cp.Problem(
        cp.Maximize(value @ decoded),
        [
            cp.sum(x) <= 1,
            cp.sum(y_mixed) <= mixed.decode_slots * cp.sum(x),
            cp.sum(y_solo) <= solo.decode_slots * (1 - cp.sum(x)),
            rates - cp.multiply(theta, waiting) == cp.multiply(prefill, x),
            cp.multiply(prefill, x) - cp.multiply(theta, buffered) == decoded,
        ],
    )

    def solve(each: Any) -> float:
        rates.value = each
        return float(problem.solve())

    return solve


def kept_solver_many(model: fo.FluidModel, changed: Any) -> tuple[float, Any, int]:
    """All re-solves in one call: seconds each, objectives, programs solved."""
    solver = fo.Solver(model)
    solver.solve()
    start = time.perf_counter()
    found = solver.solve_many({"lambda": changed})
    return (time.perf_counter() - start) / len(changed), found.objective, found.bases


def structured(model: fo.FluidModel) -> Callable[[Any], float]:
    """The reduction to the plane, each re-solve from nothing."""
    from dataclasses import replace

    from fluidopt.solvers.knapsack import solve_capacity
    from fluidopt.solvers.structured import capacity_problem

    problem = capacity_problem(model)
    return lambda rates: solve_capacity(replace(problem, arrival_rate=rates)).objective


def main() -> None:
    """Print a table of medians and ratios; fails where the routes disagree."""
    model = random_model(CLASSES)
    changed = model.workload.arrival_rate * np.random.default_rng(0).uniform(0.8, 1.2, (RE_SOLVES, CLASSES))
    routes = {
        "HiGHS alone (highspy, warm)": highs_alone(model),
        "`Solver`, certified": kept_solver(model),
        "structured solver, cold": structured(model),
        "cvxpy with a parameter": cvxpy_parameter(model),
    }
    medians = {}
    for name, solve in routes.items():
        values, times = [], []
        for rates in changed[: RE_SOLVES if "cvxpy" not in name else 200]:
            start = time.perf_counter()
            values.append(solve(rates))
            times.append(time.perf_counter() - start)
        medians[name] = float(np.median(times))
        expected = [routes["HiGHS alone (highspy, warm)"](rates) for rates in changed[:20]]
        np.testing.assert_allclose(values[:20], expected, rtol=1e-6)
    seconds, objectives, bases = kept_solver_many(model, changed)
    name = f"`Solver.solve_many`, certified ({RE_SOLVES} points, {bases} programs solved)"
    medians[name] = seconds
    np.testing.assert_allclose(objectives[:20], [routes["`Solver`, certified"](rates) for rates in changed[:20]])
    base = medians["HiGHS alone (highspy, warm)"]
    print("| re-solve of 10 classes, changed rates | median, ms | over HiGHS alone | cvxpy over it |")
    print("|---|---:|---:|---:|")
    for name, median in medians.items():
        print(
            f"| {name} | {1e3 * median:.3f} | {median / base:.2f} | {medians['cvxpy with a parameter'] / median:.0f} |"
        )


if __name__ == "__main__":
    main()
