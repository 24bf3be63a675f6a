"""What a solver returns, and the certificate that says whether to believe it.

The certificate is computed here from the arrays of the program and the returned primal and dual vectors, never from
the solver's own status.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from fluidopt.program import Array, LinearProgram

# Terms below this share of the largest count as that much: an interior point, which ends near a vertex and not on
# one, cannot tell them from 0. Simplex answers meet far less.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Certificate:
    """How far a primal-dual pair is from proving its own optimality.

    All three figures are relative to the terms they are made of, so they mean the same in any unit of money, time or
    tokens; terms below 1e-4 of the largest ones count as that much. With all three at 0 the pair is optimal
    (weak duality): rows and signs hold, the duals are feasible, and both objectives are equal.
    """

    primal_residual: float
    """Largest violation of a row or of ``x >= 0``, over the sum of the absolute terms of the row (of all values)."""
    dual_residual: float
    """Largest wrong-signed reduced cost or row dual, over the sum of the absolute terms it is made of."""
    gap: float
    """Distance of the objective from ``bound``, plus what the violations of rows are worth, over the objective."""
    objective: float
    """Primal objective, in the program's unit."""
    bound: float
    """An upper bound on every feasible point: the dual objective, plus what is left of wrong-signed reduced costs at
    the upper bounds that the rows imply for their columns (inf where they imply none)."""

    def holds(self, tolerance: float) -> bool:
        """Whether all three figures are at most ``tolerance`` (False where one is not a number)."""
        figures = (self.primal_residual, self.dual_residual, self.gap)
        return all(figure <= tolerance for figure in figures) and bool(np.isfinite(self.objective))

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
    tolerance: float = 1e-7
    """What its certificate was held to."""


@dataclass(frozen=True)
class SolverOptions:
    """Limits and choices that every solver understands."""

    method: str = "auto"
    """HiGHS only: ``"auto"`` (by size), ``"simplex"`` or ``"ipm"`` (interior point with crossover)."""
    time_limit: float = float("inf")
    """Seconds."""
    tolerance: float | None = None
    """What the certificate must meet: by default 1e-7, for cvxpy's interior point (which ends near a vertex, not on
    one) 1e-6."""


def certify(program: LinearProgram, values: Array, duals: Array) -> Certificate:
    """Compute the `Certificate` of a primal-dual pair, in time proportional to the non-zeros."""
    matrix, size = program.matrix, abs(program.matrix)
    lower, upper = program.row_lower, program.row_upper
    activity = matrix @ values
    terms = size @ np.abs(values) + _floor(size, values, axis=1)
    primal = _largest(
        _worst(lower - activity, terms + np.where(np.isinf(lower), 0.0, np.abs(lower))),
        _worst(activity - upper, terms + np.where(np.isinf(upper), 0.0, np.abs(upper))),
        _worst(-values, np.full_like(values, np.abs(values).max(initial=0.0))),
    )
    reduced = program.objective - matrix.T @ duals
    wrong = np.where(np.isinf(upper), duals, 0.0) + np.where(np.isinf(lower), -duals, 0.0)
    dual = _largest(
        _worst(reduced, np.abs(program.objective) + size.T @ np.abs(duals) + _floor(size, duals, axis=0)),
        _worst(wrong, np.full_like(duals, np.abs(duals).max(initial=0.0))),
    )
    right = np.where(duals > 0, upper, lower)
    right = np.where(np.isinf(right), 0.0, right)
    objective = float(program.objective @ values)
    # Neumaier and Shcherbina's safe bound: what a wrong-signed reduced cost could still earn, at the column's bound.
    excess = np.maximum(reduced, 0.0)
    with np.errstate(invalid="ignore"):
        bound = float(duals @ right + np.where(excess > 0, excess * program.column_bounds, 0.0).sum())
    shortfall = np.maximum(np.maximum(lower - activity, activity - upper), 0.0)
    error = abs(bound - objective) + float(np.abs(duals) @ shortfall)
    weight = float(np.abs(program.objective) @ np.abs(values) + np.abs(duals) @ np.abs(right))
    gap = error / (abs(objective) + ROUNDING * weight) if weight > 0 else error
    return Certificate(primal, dual, gap, objective, bound)


def _floor(size: sparse.csc_array, against: Array, axis: int) -> Array:
    """What rounding of the largest values may do to each row (axis 1) or column (axis 0)."""
    largest = size.max(axis=axis).toarray().ravel() if size.nnz else np.zeros(size.shape[1 - axis])
    floor: Array = ROUNDING * largest * np.abs(against).max(initial=0.0)
    return floor


def _largest(*figures: float) -> float:
    """The largest of the figures, NaN if one is."""
    return float(np.max(figures))


def _worst(violation: Array, weight: Array) -> float:
    """The largest violation relative to its weight; NaN stays NaN, so that it fails every tolerance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(violation > 0, violation / weight, np.where(np.isnan(violation), np.nan, 0.0))
    return float(np.max(relative, initial=0.0))
