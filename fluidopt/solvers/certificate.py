"""What a solver returns, and the certificate that says whether to believe it.

The certificate is computed here from the arrays of the program and the returned primal and dual vectors, never from
the solver's own status.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fluidopt.program import Array, LinearProgram


@dataclass(frozen=True)
class Certificate:
    """How far a primal-dual pair is from proving its own optimality; all three figures are relative.

    With all three at 0 the pair is optimal (weak duality): the rows and signs hold, the duals are feasible, and both
    objectives are equal.
    """

    primal_residual: float
    """Largest violation of a row or of ``x >= 0``, over 1 + the sum of the absolute terms of the row."""
    dual_residual: float
    """Largest wrong-signed reduced cost or row dual, over 1 + the sum of the absolute terms it is made of."""
    gap: float
    """|primal objective - dual objective| / (1 + |primal objective|)."""
    objective: float
    """Primal objective, in the program's unit."""
    bound: float
    """Dual objective: an upper bound on every feasible point, as far as ``dual_residual`` is 0."""

    def holds(self, tolerance: float) -> bool:
        """Whether all three figures are at most ``tolerance`` (False where one is not a number)."""
        return max(self.primal_residual, self.dual_residual, self.gap) <= tolerance and np.isfinite(self.objective)

    def __str__(self) -> str:
        return (
            f"primal residual {self.primal_residual:.1e}, dual residual {self.dual_residual:.1e}, "
            f"gap {self.gap:.1e} (relative)"
        )


@dataclass(frozen=True)
class Solution:
    """A certified primal-dual pair of a linear program."""

    values: Array
    """Shape (columns,)."""
    duals: Array
    """Shape (rows,): d(maximum)/d(right side), so >= 0 on ``<=`` rows and <= 0 on ``>=`` rows."""
    certificate: Certificate
    method: str
    """Which solver and algorithm produced the pair."""


@dataclass(frozen=True)
class SolverOptions:
    """Limits and choices that every solver understands."""

    method: str = "auto"
    """HiGHS only: ``"auto"`` (by size), ``"simplex"`` or ``"ipm"`` (interior point with crossover)."""
    time_limit: float = float("inf")
    """Seconds."""
    tolerance: float = 1e-7
    """What the certificate must meet."""


def certify(program: LinearProgram, values: Array, duals: Array) -> Certificate:
    """Compute the `Certificate` of a primal-dual pair, in time proportional to the non-zeros."""
    matrix, size = program.matrix, abs(program.matrix)
    activity = matrix @ values
    scale = 1.0 + size @ np.abs(values)
    short = np.maximum(program.row_lower - activity, activity - program.row_upper)
    primal = max(_worst(short / scale), _worst(-values))
    reduced = program.objective - matrix.T @ duals
    cost_scale = 1.0 + np.abs(program.objective) + size.T @ np.abs(duals)
    wrong = np.maximum(
        np.where(np.isinf(program.row_upper), duals, 0), np.where(np.isinf(program.row_lower), -duals, 0)
    )
    dual = max(_worst(reduced / cost_scale), _worst(wrong / (1.0 + np.abs(duals))))
    side = np.where(duals > 0, program.row_upper, program.row_lower)
    objective = float(program.objective @ values)
    bound = float(duals @ np.where(np.isinf(side), 0.0, side))
    gap = abs(objective - bound) / (1.0 + abs(objective))
    return Certificate(primal, dual, gap, objective, bound)


def _worst(violations: Array) -> float:
    """The largest positive entry; NaN stays NaN, so that it fails every tolerance."""
    return float(np.max(violations, initial=0.0))
