"""The cvxpy route: an independent second opinion (interior point, Clarabel)."""

from __future__ import annotations

import warnings
from typing import Any

import cvxpy as cp
import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InfeasibleModel, SolverFailure
from fluidopt.program import Array, LinearProgram
from fluidopt.solvers.certificate import Solution, SolverOptions, certify
from fluidopt.solvers.scaling import scale

_TIGHT = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11, "max_iter": 500}


def solve(program: LinearProgram, options: SolverOptions) -> Solution:
    """Solve with cvxpy and Clarabel; certify.

    Raises:
        InfeasibleModel: where Clarabel proves that there is no (finite) optimum.
        SolverFailure: on a limit or numerical trouble.
    """
    scaled, scaling = scale(program)
    x = cp.Variable(program.shape[1], nonneg=True)
    rows = Rows(scaled, x)
    found = run(cp.Problem(cp.Maximize(scaled.objective @ x), rows.constraints), x, options)
    # An interior point stays clear of bounds that the rows imply, such as 0 for what cannot be served at all.
    values = np.minimum(scaling.values(np.maximum(found, 0.0)), program.column_bounds)
    duals = scaling.duals(rows.duals())
    return Solution(values, duals, certify(program, values, duals), "cvxpy Clarabel")


class Rows:
    """The rows of a program as cvxpy constraints on ``x``, and their duals once solved."""

    def __init__(self, program: LinearProgram, x: Any) -> None:
        equal = program.row_lower == program.row_upper
        matrix = program.matrix.tocsr()
        self._count = program.shape[0]
        self._kinds: list[tuple[NDArray[np.bool_], int]] = []
        self.constraints: list[Any] = []
        for rows, sign, side in (
            (equal, 1, program.row_upper),
            (~equal & np.isfinite(program.row_upper), 1, program.row_upper),
            (~equal & np.isfinite(program.row_lower), -1, program.row_lower),
        ):
            if rows.any():
                left, right = sign * (matrix[rows] @ x), sign * side[rows]
                self.constraints.append(left == right if rows is equal else left <= right)
                self._kinds.append((rows, sign))

    def duals(self) -> Array:
        """d(maximum)/d(right side) of every row, shape (rows,)."""
        duals = np.zeros(self._count)
        for (rows, sign), constraint in zip(self._kinds, self.constraints, strict=True):
            duals[rows] += sign * np.atleast_1d(constraint.dual_value)
        return duals


def run(problem: Any, x: Any, options: SolverOptions) -> Array:
    """Solve a cvxpy problem in ``x`` with Clarabel, tightly; a certificate has to say whether the answer is accurate.

    Raises:
        InfeasibleModel: where Clarabel proves that there is no (finite) optimum.
        SolverFailure: on a limit or numerical trouble.
    """
    limits = {"time_limit": options.time_limit} if np.isfinite(options.time_limit) else {}
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            problem.solve(solver=cp.CLARABEL, **_TIGHT, **limits)
    except cp.SolverError as error:
        raise SolverFailure(f"cvxpy (Clarabel) failed: {error}") from None
    if problem.status in {cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE}:
        raise InfeasibleModel("no point satisfies all rows")
    if problem.status in {cp.UNBOUNDED, cp.UNBOUNDED_INACCURATE}:
        raise InfeasibleModel("the objective has no finite maximum", kind="unbounded")
    if x.value is None:
        raise SolverFailure(f"cvxpy (Clarabel) stopped with {problem.status!r}")
    return np.asarray(x.value)
