"""Solvers of linear programs: one `solve_program` that picks, and certifies what it returns."""

from __future__ import annotations

from dataclasses import replace

from fluidopt.errors import InvalidInput, SolverFailure
from fluidopt.inputs import is_number
from fluidopt.program import LinearProgram
from fluidopt.solvers.certificate import Certificate, Solution, SolverOptions, certify

SOLVERS = ("auto", "knapsack", "highs", "cvxpy")


def solve_program(program: LinearProgram, solver: str = "auto", options: SolverOptions | None = None) -> Solution:
    """Solve ``program`` and return a pair that passes its certificate.

    Args:
        program: what to maximise.
        solver: ``"highs"``, ``"cvxpy"``, or ``"auto"`` (HiGHS; ``FluidModel.solve`` knows the structured solver too).
        options: limits and tolerance.

    Raises:
        InfeasibleModel: no solution, or no finite one.
        SolverFailure: no certified answer.
        InvalidInput: an unknown solver or method.
    """
    options = checked(options)
    tolerance = options.tolerance if options.tolerance is not None else 1e-6 if solver == "cvxpy" else 1e-7
    if solver in ("auto", "highs"):
        from fluidopt.solvers.highs import solve
    elif solver == "cvxpy":
        from fluidopt.solvers.convex import solve
    else:
        raise InvalidInput(f"solver must be one of {', '.join(map(repr, SOLVERS))}; got {solver!r}")
    solution = solve(program, options)
    if solver != "cvxpy" and options.method == "auto" and not solution.certificate.holds(tolerance):
        # Badly scaled programs: where one algorithm ends outside the certificate, the other may end inside.
        other = "ipm" if solution.method.endswith("simplex") else "simplex"
        solution = solve(program, replace(options, method=other))
    return held(solution, tolerance)


def held(solution: Solution, tolerance: float) -> Solution:
    """The solution, if its certificate meets ``tolerance``.

    Raises:
        SolverFailure: where it does not.
    """
    if not solution.certificate.holds(tolerance):
        raise SolverFailure(
            f"the answer of {solution.method} fails its certificate: {solution.certificate}, where "
            f"{tolerance:.0e} is asked; try another solver or rescale the input"
        )
    return replace(solution, tolerance=tolerance)


def checked(options: SolverOptions | None) -> SolverOptions:
    """The options, or the defaults, checked.

    Raises:
        InvalidInput: a method, time limit or tolerance outside its range.
    """
    options = SolverOptions() if options is None else options
    if type(options) is not SolverOptions:
        raise InvalidInput(f"options must be SolverOptions(...); got {options!r}")
    if options.method not in ("auto", "simplex", "ipm"):
        raise InvalidInput(f"SolverOptions.method must be 'auto', 'simplex' or 'ipm'; got {options.method!r}")
    limit, tolerance = options.time_limit, options.tolerance
    in_time = limit == float("inf") or (is_number(limit) and limit > 0)
    if not in_time or not (tolerance is None or (is_number(tolerance) and 0 < tolerance < 1)):
        raise InvalidInput(
            f"SolverOptions: time_limit must be above 0 s and tolerance between 0 and 1; got {limit!r}, {tolerance!r}"
        )
    return options


__all__ = ["SOLVERS", "Certificate", "Solution", "SolverOptions", "certify", "checked", "held", "solve_program"]
