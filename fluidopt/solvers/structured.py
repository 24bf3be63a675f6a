"""From a model to the structured solver and back: when the reduction applies, and its answer as columns and rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluidopt.program import LinearProgram
from fluidopt.solvers.certificate import Solution, certify
from fluidopt.solvers.knapsack import CapacityProblem, StructuredSolution, applies, frontier, solve_capacity

if TYPE_CHECKING:
    from fluidopt.model import FluidModel

# The reduction's arrays by the names that the program's blocks have.
_NAMES = {"phi": "mode_share", "x": "prefill", "y": "decode", "q_p": "prefill_queue", "q_d": "decode_queue"}


def why_not(model: FluidModel) -> str | None:
    """Why the structured solver does not solve ``model`` exactly; None where it does."""
    if not model.is_standard:
        return "rows, service levels or another objective were added"
    return applies(capacity_problem(model))


def capacity_problem(model: FluidModel) -> CapacityProblem:
    """The model's numbers as the structured solver takes them."""
    workload, prices = model.workload, model.scenario.prices
    modes, types = model.modes, [gpu.name for gpu in model.gpu_types]
    return CapacityProblem(
        arrival_rate=workload.arrival_rate,
        abandonment_rate=workload.abandonment_rate,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        prompt_price=prices.prompt,
        output_price=prices.output,
        charging=model.scenario.charging,
        chunk=np.array([mode.chunk for _, mode in modes], dtype=float),
        decode_slots=np.array([mode.decode_slots for _, mode in modes], dtype=float),
        iteration_time=np.array([mode.iteration_time or np.inf for _, mode in modes]),
        gpu_type=np.array([types.index(gpu.name) for gpu, _ in modes]),
        share=np.array([gpu.share for gpu in model.gpu_types]),
    )


def mode_shares(model: FluidModel, prefill: float) -> NDArray[np.float64]:
    """Fractions of the fleet per mode, shape (K,), that prefill ``prefill`` tokens/s and can decode most beside it."""
    shares: NDArray[np.float64] = frontier(capacity_problem(model)).mode_share(prefill)
    return shares


def solve_structured(model: FluidModel, program: LinearProgram) -> Solution:
    """Solve by the reduction to the plane; the certificate is of the full program.

    Raises:
        InfeasibleModel: classes that never abandon ask for more than the fleet has.
    """
    answer = solve_capacity(capacity_problem(model))
    values, duals = np.zeros(program.shape[1]), np.zeros(program.shape[0])
    for blocks, vector in ((program.columns, values), (program.rows, duals)):
        for block in blocks:
            exists = block.numbers >= 0
            vector[block.numbers[exists]] = _grid(answer, block.name)[exists]
    method = "knapsack"
    return Solution(values, duals, certify(program, values, duals), method)


def _grid(answer: StructuredSolution, name: str) -> NDArray[np.float64]:
    return np.asarray(getattr(answer, _NAMES.get(name, name)), dtype=float)
