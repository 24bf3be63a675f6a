"""This module owns the speed of the structured solver, as ratios measured in one process.

Against `numpy.sort` of as many numbers as there are classes, against HiGHS interior point on the same numbers (its
`run` alone: the program is lowered and passed beforehand, nothing is certified on either side), and against itself at
half the size. Run as a script it prints a Markdown table; best of several runs each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import highspy
import numpy as np

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fluidopt as fo
from fluidopt.program import LinearProgram
from fluidopt.scenario import Charging
from fluidopt.solvers.highs import new_highs, run
from fluidopt.solvers.knapsack import CapacityProblem, solve_capacity

GPU = fo.GPU(fo.IterationTime(alpha=0.0174, beta=6.2e-5, solo=0.022), batch_size=16, chunk_size=256)
# Load over what the fleet could prefill or decode if it did nothing else. At 30 the optimum is a vertex of F inside
# the classes' zonogon, the case with the most work; at 1.2 a boundary of the zonogon meets F; at 0.5 all fits.
LOADS = (0.5, 1.2, 30.0)


def random_problem(classes: int, load: float, charging: Charging, seed: int = 0) -> CapacityProblem:
    """Classes of random size, rate and patience on the pair of modes of [L26] sections 6.1-6.2."""
    rng = np.random.default_rng(seed)
    prompt, output = (np.exp(rng.uniform(np.log(50), np.log(most), classes)) for most in (5000, 2000))
    rate = 10 ** rng.uniform(-2, 0, classes)
    mixed, solo = GPU.modes()
    prefill_load = rate @ prompt / mixed.prefill_speed
    decode_load = rate @ output / (solo.decode_slots * solo.decode_speed)
    return CapacityProblem(
        arrival_rate=rate * load / max(prefill_load, decode_load),
        abandonment_rate=rng.uniform(0.05, 0.5, classes),
        prompt_tokens=prompt,
        output_tokens=output,
        prompt_price=0.1,
        output_price=0.2,
        charging=charging,
        chunk=np.array([mixed.chunk, 0]),
        decode_slots=np.array([mixed.decode_slots, solo.decode_slots]),
        iteration_time=np.array([mixed.iteration_time, solo.iteration_time]),
        gpu_type=np.array([0, 0]),
        share=np.array([1.0]),
    )


def model_of(problem: CapacityProblem) -> fo.FluidModel:
    """The same numbers as a `FluidModel`."""
    rows = zip(
        problem.arrival_rate.tolist(),
        problem.prompt_tokens.tolist(),
        problem.output_tokens.tolist(),
        problem.abandonment_rate.tolist(),
        strict=True,
    )
    classes = [
        fo.WorkloadClass(f"class {i}", arrival_rate=a, prompt_tokens=p, output_tokens=d, abandonment_rate=theta)
        for i, (a, p, d, theta) in enumerate(rows)
    ]
    prices = fo.TokenPrices(prompt=problem.prompt_price, output=problem.output_price)
    return fo.FluidModel(classes, GPU, prices=prices, charging=problem.charging)


def best(action: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def highs_time(program: LinearProgram, repeats: int = 3) -> float:
    """Seconds of the fastest interior-point run, cold each time."""
    times = []
    for _ in range(repeats):
        highs = new_highs(program)
        highs.setOptionValue("solver", "ipm")
        times.append(best(partial(run, highs), 1))
        assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return min(times)


def main() -> None:
    print(
        "| classes | load | charging | structured, ms | over sort | over half as many | HiGHS ipm, ms | HiGHS over it |"
    )
    print("|---:|---:|---|---:|---:|---:|---:|---:|")
    for classes in (1_000, 10_000, 100_000, 1_000_000):
        for load in LOADS:
            for charging in ("bundled", "separate"):
                problem, half = (random_problem(size, load, charging) for size in (classes, classes // 2))
                ratio = problem.output_tokens / problem.prompt_tokens
                repeats = 30 if classes < 100_000 else 5
                own = best(partial(solve_capacity, problem), repeats)
                shorter = best(partial(solve_capacity, half), repeats)
                sort = best(partial(np.sort, ratio), repeats)
                peer = ("–", "–")
                if classes <= 10_000:
                    took = highs_time(model_of(problem).program())
                    peer = (f"{1e3 * took:.0f}", f"{took / own:.0f}")
                print(
                    f"| {classes:,} | {load} | {charging} | {1e3 * own:.2f} | {own / sort:.1f} | {own / shorter:.2f} "
                    f"| {peer[0]} | {peer[1]} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
