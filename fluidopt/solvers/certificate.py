"""What a solver returns, and the certificate that says whether to believe it.

The certificate is computed here from the arrays of the program and the returned primal and dual vectors, never from
the solver's own status.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluidopt.program import Array, LinearProgram
from fluidopt.views import card, facts, figures

# Terms below this share of the largest count as that much: an interior point, which ends near a vertex and not on
# one, cannot tell them from 0. Simplex answers meet far less.
ROUNDING = 1e-4
# Below this, relative to the terms it is made of, a wrong-signed reduced cost is rounding.
NEGLIGIBLE = 1e-13
DENSE = 20_000


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

    def _repr_html_(self) -> str:
        return card(
            "Certificate",
            figures(("Objective", self.objective, ""), ("No point above", self.bound, "")),
            facts(
                ("primal residual", f"{self.primal_residual:.1e}", "relative"),
                ("dual residual", f"{self.dual_residual:.1e}", "relative"),
                ("gap", f"{self.gap:.1e}", "relative"),
            ),
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
    return Certifier(program)(program, values, duals)


class Certifier:
    """Certificates of programs that share one matrix and the same open sides; what follows from these is kept.

    Small matrices are kept dense: sparse products cost more in overhead than in arithmetic there.
    """

    def __init__(self, program: LinearProgram) -> None:
        matrix, size = program.matrix, abs(program.matrix)
        rows, columns = size.shape
        entries = size.nnz > 0
        self.row_rounding = ROUNDING * (size.max(axis=1).toarray().ravel() if entries else np.zeros(rows))
        self.column_rounding = ROUNDING * (size.max(axis=0).toarray().ravel() if entries else np.zeros(columns))
        self.matrix: Any = matrix.toarray() if rows * columns <= DENSE else matrix
        self.size: Any = size.toarray() if rows * columns <= DENSE else size
        self.no_lower, self.no_upper = np.isinf(program.row_lower), np.isinf(program.row_upper)

    def __call__(self, program: LinearProgram, values: Array, duals: Array) -> Certificate:
        """Certify one pair of vectors for ``program``."""
        lower, upper, cost = program.row_lower, program.row_upper, program.objective
        figures = self.figures(lower, upper, cost, values, duals)
        primal, dual, error, weight, objective, bound = (float(figure) for figure in figures)
        if dual > NEGLIGIBLE:
            # Neumaier and Shcherbina's safe bound: what a wrong-signed reduced cost could still earn.
            excess = np.maximum(cost - duals @ self.matrix, 0.0)
            with np.errstate(invalid="ignore"):
                bound += float(np.where(excess > 0, excess * program.bounds_above(objective), 0.0).sum())
                # Nothing earns more than every column at the bound that the rows imply for it.
                most = float(np.where(cost > 0, cost * program.column_bounds, 0.0).sum())
            bound = min(bound, most)
            error = abs(bound - objective) + float(np.abs(duals) @ self.shortfall(lower, upper, values))
        gap = error / weight if weight > 0 else error
        if math.isnan(objective + bound + gap):  # comparisons let a NaN pass
            primal = dual = gap = math.nan
        return Certificate(primal, dual, gap, objective, bound)

    def shortfall(self, lower: Array, upper: Array, values: Array) -> Array:
        """By how much each row is missed, shape (rows,)."""
        activity: Array = values @ self.matrix.T
        return np.maximum(np.maximum(lower - activity, activity - upper), 0.0)

    def figures(self, lower: Array, upper: Array, cost: Array, values: Array, duals: Array) -> tuple[Array, ...]:
        """Primal and dual residual, error of the objective and what it is relative to, objective, dual objective.

        Arrays may have leading axes, one pair per entry; so do the figures.
        """
        closed_lower, closed_upper = np.where(self.no_lower, 0.0, lower), np.where(self.no_upper, 0.0, upper)
        size_of_values, size_of_duals, size_of_cost = np.abs(values), np.abs(duals), np.abs(cost)
        largest_value, largest_dual = size_of_values.max(axis=-1, initial=0.0), size_of_duals.max(axis=-1, initial=0.0)

        shortfall = self.shortfall(lower, upper, values)
        right = np.where(duals > 0, closed_upper, closed_lower)
        row_weight = size_of_values @ self.size.T + self.row_rounding * largest_value[..., None]
        row_weight += np.maximum(np.abs(closed_lower), np.abs(closed_upper))
        negative = np.maximum(-values.min(axis=-1, initial=0.0), 0.0)
        primal = np.maximum(_worst(shortfall, row_weight), _relative(negative, largest_value))

        excess = np.maximum(cost - duals @ self.matrix, 0.0)
        column_weight = size_of_cost + size_of_duals @ self.size + self.column_rounding * largest_dual[..., None]
        wrong = np.maximum(
            duals[..., self.no_upper].max(axis=-1, initial=0.0), -duals[..., self.no_lower].min(axis=-1, initial=0.0)
        )
        dual = np.maximum(_worst(excess, column_weight), _relative(wrong, largest_dual))

        objective, bound = (cost * values).sum(axis=-1), (duals * right).sum(axis=-1)
        error = np.abs(bound - objective) + (size_of_duals * shortfall).sum(axis=-1)
        weight = (size_of_cost * size_of_values).sum(axis=-1) + (size_of_duals * np.abs(right)).sum(axis=-1)
        return primal, dual, error, np.abs(objective) + ROUNDING * weight, objective, bound


def _relative(violation: Array, weight: Array) -> Array:
    quotient: Array = np.divide(violation, weight, out=np.zeros_like(violation), where=violation > 0)
    return quotient


def _worst(violation: Array, weight: Array) -> Array:
    """The largest violation relative to its weight."""
    worst: Array = _relative(violation, weight).max(axis=-1, initial=0.0)
    return worst
