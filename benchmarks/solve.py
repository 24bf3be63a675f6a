"""Time building and solving plans against HiGHS's interior point on the very same arrays.

``python benchmarks/solve.py [sizes ...]`` prints a table. Each case is (model, phase, size): *workload* makes the
`Workload` from arrays, *build* makes the model and lowers it, *solve* goes from there to a certified plan. The peer is
highspy alone, interior point with crossover, given the arrays that *build* made; it is timed in the same process,
alternating with ours. Ratios are what to look at; seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

import fluidopt as fo
from fluidopt.program import LinearProgram
from fluidopt.reference import QWEN_8B_A100

SIZES = (2, 100, 1_000, 10_000)
# From this size on, a plan from arrays may take at most TARGET times as long as the peer.
LARGE, TARGET = 10_000, 2.0


def columns(classes: int) -> dict[str, Any]:
    """Random classes that together ask for about three times what a GPU can do."""
    rng = np.random.default_rng(classes)
    prompt, output = rng.lognormal(6, 1, classes), rng.lognormal(5, 1, classes)
    weight = rng.uniform(0.5, 1.5, classes)
    return {
        "name": [f"class {at}" for at in range(classes)],
        "arrival_rate": 3 * weight / (weight @ (prompt / 7_700 + output / 700)),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "abandonment_rate": rng.uniform(0.01, 1, classes),
    }


def pair() -> fo.GPU:
    """The mixed/solo pair of the reference instance."""
    return fo.GPU(QWEN_8B_A100, batch_size=16, chunk_size=256)


def chunks() -> fo.GPU:
    """Four chunk sizes, decode-only and idle modes."""
    sizes = (128, 256, 512, 1024)
    mixed = [
        fo.Mode(f"chunk {size}", chunk=size, decode_slots=15, iteration_time=QWEN_8B_A100.mixed(size)) for size in sizes
    ]
    alone = fo.Mode("alone", chunk=2048, iteration_time=QWEN_8B_A100.mixed(2048))
    solo = fo.Mode("solo", decode_slots=16, iteration_time=0.022)
    return fo.GPU(QWEN_8B_A100, batch_size=16, chunk_size=256, operating_modes=(*mixed, alone, solo, fo.Mode("idle")))


MODELS: dict[str, tuple[Callable[[], fo.GPU], str]] = {
    "pair, bundled": (pair, "bundled"),
    "pair, separate": (pair, "separate"),
    "seven modes, bundled": (chunks, "bundled"),
}


def peer(program: LinearProgram) -> float:
    """HiGHS alone: pass the arrays, run interior point with crossover, read the solution; the optimum."""
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("solver", "ipm")
    rows, width = program.shape
    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = rows, width
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_ = program.objective
    lp.col_lower_, lp.col_upper_ = np.zeros(width), np.full(width, highspy.kHighsInf)
    lp.row_lower_, lp.row_upper_ = program.row_lower, program.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = program.matrix.indptr, program.matrix.indices
    lp.a_matrix_.value_ = program.matrix.data
    highs.passModel(lp)
    highs.run()
    solution = highs.getSolution()
    np.array(solution.col_value), np.array(solution.row_dual)
    return float(highs.getInfo().objective_function_value)


@dataclass(frozen=True)
class Measurement:
    """Median seconds of each phase of one case, and of the peer."""

    model: str
    size: int
    workload: float
    build: float
    solve: float
    peer: float

    @property
    def ratio(self) -> float:
        """From arrays to a certified plan, over the peer's time for the solution alone."""
        return (self.workload + self.build + self.solve) / self.peer


def measure(name: str, size: int, repeats: int) -> Measurement:
    """Time one case, ours and the peer alternating; the two optima must agree."""
    make, charging = MODELS[name]
    table, gpu, prices = columns(size), make(), fo.TokenPrices(prompt=0.1, output=0.2)
    times: dict[str, list[float]] = {"workload": [], "build": [], "solve": [], "peer": []}
    for _ in range(repeats):
        gc.collect()
        marks = [time.perf_counter()]
        workload = fo.Workload.from_frame(table)
        marks.append(time.perf_counter())
        model = fo.FluidModel(workload, gpu, prices=prices, charging=charging)
        program = model.program()
        marks.append(time.perf_counter())
        plan = model.solve()
        marks.append(time.perf_counter())
        optimum = peer(program)
        marks.append(time.perf_counter())
        for phase, start, end in zip(times, marks, marks[1:], strict=False):
            times[phase].append(end - start)
        if abs(plan.revenue_rate - optimum) > 1e-6 * abs(optimum):
            raise AssertionError(f"{name}, {size} classes: {plan.revenue_rate} here, {optimum} by HiGHS alone")
    return Measurement(name, size, **{phase: statistics.median(each) for phase, each in times.items()})


def table(measurements: Iterator[Measurement]) -> Iterator[str]:
    """The measurements as the lines of a markdown table."""
    yield "| model | classes | workload (s) | build (s) | solve (s) | HiGHS alone (s) | plan / HiGHS alone |"
    yield "|---|---|---|---|---|---|---|"
    for each in measurements:
        yield (
            f"| {each.model} | {each.size:,} | {each.workload:.4f} | {each.build:.4f} | {each.solve:.4f} "
            f"| {each.peer:.4f} | {each.ratio:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=list(SIZES), help="numbers of classes")
    parser.add_argument("--repeats", type=int, default=5, help="runs per case, of which the median counts")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="only these models")
    options = parser.parse_args()
    measure("pair, bundled", 2, 1)  # compiles the templates and loads HiGHS
    cases = ((name, size) for name in options.model or MODELS for size in options.sizes)
    slow = []

    def measured() -> Iterator[Measurement]:
        for name, size in cases:
            each = measure(name, size, options.repeats)
            if size >= LARGE and each.ratio > TARGET:
                slow.append(f"{each.model}, {each.size:,} classes: {each.ratio:.2f}")
            yield each

    for line in table(measured()):
        print(line, flush=True)
    if slow:
        raise SystemExit(f"slower than {TARGET} times HiGHS alone: {'; '.join(slow)}")


if __name__ == "__main__":
    main()
