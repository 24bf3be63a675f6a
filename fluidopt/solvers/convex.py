"""The cvxpy route: an independent second opinion (interior point, Clarabel)."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np

from fluidopt.errors import InfeasibleModel, SolverFailure
from fluidopt.program import LinearProgram
from fluidopt.solvers.certificate import Solution, SolverOptions, certify

_TIGHT = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11, "max_iter": 500}


def solve(program: LinearProgram, options: SolverOptions) -> Solution:
    """Solve with cvxpy and Clarabel; certify.

    Raises:
        InfeasibleModel: where Clarabel proves that there is no (finite) optimum.
        SolverFailure: on a limit or numerical trouble.
    """
    equal = program.row_lower == program.row_upper
    above = ~equal & np.isfinite(program.row_upper)
    below = ~equal & np.isfinite(program.row_lower)
    matrix = program.matrix.tocsr()
    # Rows scaled to largest entry 1 and the objective likewise: Clarabel's tolerances are absolute near 0.
    largest = np.maximum(abs(matrix).max(axis=1).toarray().ravel(), 1e-300)
    money = float(np.abs(program.objective).max(initial=0.0)) or 1.0
    x = cp.Variable(program.shape[1], nonneg=True)
    kinds = [
        (rows, sign, side)
        for rows, sign, side in (
            (equal, 1, program.row_upper),
            (above, 1, program.row_upper),
            (below, -1, program.row_lower),
        )
        if rows.any()
    ]
    constraints: list[cp.Constraint] = []
    for rows, sign, side in kinds:
        left = (matrix[rows] / largest[rows, None]) @ x * sign
        right = side[rows] / largest[rows] * sign
        constraints.append(left == right if rows is equal else left <= right)
    problem = cp.Problem(cp.Maximize((program.objective / money) @ x), constraints)
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
        duals[rows] = sign * np.atleast_1d(constraint.dual_value) * money / largest[rows]
    values = np.maximum(x.value, 0.0)
    return Solution(values, duals, certify(program, values, duals), "cvxpy Clarabel")
