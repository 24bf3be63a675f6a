"""HiGHS through highspy: the program is passed as arrays, the method chosen by size."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from functools import cache
from typing import Any

import highspy
import numpy as np

from fluidopt.errors import InfeasibleModel, SolverFailure
from fluidopt.program import Array, LinearProgram
from fluidopt.solvers.certificate import Solution, SolverOptions, certify
from fluidopt.solvers.scaling import Scaling, scale

# Measured on these programs: simplex needs seconds from about 2,000 rows on, where interior point needs a tenth.
SIMPLEX_ROWS = 1_000
# On the scaled program; tighter than HiGHS's default because the certificate is relative.
FEASIBILITY = 1e-9

_STATUS = highspy.HighsModelStatus


@cache
def _silence_banner() -> None:
    """Make the process's first Highs object with file descriptor 1 closed: its banner ignores ``output_flag``."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    try:
        saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # standard output is closed already: nobody reads a banner
        highspy.Highs()
        return
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()
        with contextlib.suppress(OSError, TypeError, AttributeError):
            ctypes.CDLL(None).fflush(None)
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def new_highs(program: LinearProgram) -> Any:
    """A silent Highs object that holds ``program``."""
    _silence_banner()
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    # These programs leave nothing to do in parallel, and waking HiGHS's thread pool costs more than a warm re-solve.
    highs.setOptionValue("threads", 1)
    for tolerance in ("primal_feasibility_tolerance", "dual_feasibility_tolerance"):
        highs.setOptionValue(tolerance, FEASIBILITY)
    rows, columns = program.shape
    matrix = program.matrix.tocsc()
    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = rows, columns
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_ = program.objective
    lp.col_lower_, lp.col_upper_ = np.zeros(columns), np.full(columns, highspy.kHighsInf)
    lp.row_lower_, lp.row_upper_ = program.row_lower, program.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = matrix.indptr, matrix.indices
    lp.a_matrix_.value_ = matrix.data
    if highs.passModel(lp) == highspy.HighsStatus.kError:
        raise SolverFailure("HiGHS refused the program: a coefficient is not finite or beyond 1e15; rescale the input")
    return highs


def solve(program: LinearProgram, options: SolverOptions) -> Solution:
    """Solve by dual simplex (small) or interior point with crossover (large); certify.

    Raises:
        InfeasibleModel: where HiGHS proves that there is no (finite) optimum.
        SolverFailure: on a limit or numerical trouble.
    """
    scaled, scaling = scale(program)
    highs = new_highs(scaled)
    method = options.method
    if method == "auto":
        method = "simplex" if program.shape[0] <= SIMPLEX_ROWS else "ipm"
    highs.setOptionValue("solver", method)
    if np.isfinite(options.time_limit):
        highs.setOptionValue("time_limit", float(options.time_limit))
    run(highs)
    values, duals = read(highs, scaling, method)
    return Solution(values, duals, certify(program, values, duals), f"HiGHS {method}")


def run(highs: Any) -> None:
    """Run, with as many threads as the process's HiGHS was started with if that was not one."""
    if highs.run() == highspy.HighsStatus.kError and highs.getModelStatus() == _STATUS.kNotset:
        highs.setOptionValue("threads", 0)
        highs.run()
    if highs.getModelStatus() == _STATUS.kUnboundedOrInfeasible:
        highs.setOptionValue("presolve", "off")
        highs.run()


def read(highs: Any, scaling: Scaling, method: str) -> tuple[Array, Array]:
    """The optimal values and duals in the program's own units.

    Raises:
        InfeasibleModel: where HiGHS proves that there is no (finite) optimum.
        SolverFailure: on a limit or numerical trouble.
    """
    status = highs.getModelStatus()
    if status == _STATUS.kInfeasible:
        raise InfeasibleModel("no point satisfies all rows")
    if status == _STATUS.kUnbounded:
        raise InfeasibleModel("the objective has no finite maximum", kind="unbounded")
    if status != _STATUS.kOptimal:
        raise SolverFailure(f"HiGHS ({method}) stopped with {highs.modelStatusToString(status)!r}")
    answer = highs.getSolution()
    values = scaling.values(np.maximum(np.array(answer.col_value), 0.0))
    return values, scaling.duals(np.array(answer.row_dual))
