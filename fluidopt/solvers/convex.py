"""The cvxpy route: an independent second opinion (interior point, Clarabel)."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np

from fluidopt.errors import InfeasibleModel, SolverFailure
from fluidopt.program import LinearProgram
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
    equal = scaled.row_lower == scaled.row_upper
    kinds = [
        (rows, sign, side)
        for rows, sign, side in (
            (equal, 1, scaled.row_upper),
            (~equal & np.isfinite(scaled.row_upper), 1, scaled.row_upper),
            (~equal & np.isfinite(scaled.row_lower), -1, scaled.row_lower),
        )
        if rows.any()
    ]
    matrix = scaled.matrix.tocsr()
    x = cp.Variable(program.shape[1], nonneg=True)
    constraints: list[cp.Constraint] = []
    for rows, sign, side in kinds:
        left, right = sign * (matrix[rows] @ x), sign * side[rows]
        constraints.append(left == right if rows is equal else left <= right)
    problem = cp.Problem(cp.Maximize(scaled.objective @ x), constraints)
    limits = {"time_limit": options.time_limit} if np.isfinite(options.time_limit) else {}
    try:
        with warnings.catch_warnings():
            # Whether the answer is accurate is for the certificate to say.
            warnings.filterwarnings("ignore", message="Solution may be inaccurate")
            problem.solve(solver=cp.CLARABEL, **_TIGHT, **limits)  # type: ignore[no-untyped-call]
    except cp.SolverError as error:
        raise SolverFailure(f"cvxpy (Clarabel) failed: {error}") from None
    if problem.status in {cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE}:
        raise InfeasibleModel("no point satisfies all rows")
    if problem.status in {cp.UNBOUNDED, cp.UNBOUNDED_INACCURATE}:
        raise InfeasibleModel("the objective has no finite maximum", kind="unbounded")
    if x.value is None:
        raise SolverFailure(f"cvxpy (Clarabel) stopped with {problem.status!r}")
    duals = np.zeros(program.shape[0])
    for (rows, sign, _), constraint in zip(kinds, constraints, strict=True):
        duals[rows] += sign * np.atleast_1d(constraint.dual_value)
    values, duals = scaling.values(np.maximum(x.value, 0.0)), scaling.duals(duals)
    return Solution(values, duals, certify(program, values, duals), "cvxpy Clarabel")
