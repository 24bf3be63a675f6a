"""Optimal bases taken over: solutions of programs that differ from a solved one in right sides and prices only."""

from __future__ import annotations

from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from fluidopt.program import Array, LinearProgram
from fluidopt.solvers.certificate import Certifier, Solution

# What a solution from another program's basis must meet. More than is asked of a solver, because nothing here bounds
# what a wrong-signed reduced cost could still earn.
EXACT = 1e-11


class Basis:
    """A basis of a small program: the columns in it, the rows that are tight, and the inverse of where they meet."""

    def __init__(self, program: LinearProgram, basis: Any) -> None:
        """Take the basis that HiGHS ended with; raises `numpy.linalg.LinAlgError` where it is singular in doubles."""
        basic, at_lower = highspy.HighsBasisStatus.kBasic, highspy.HighsBasisStatus.kLower
        states = list(basis.row_status)
        self.columns = np.flatnonzero([status == basic for status in basis.col_status])
        self.tight = np.flatnonzero([status != basic for status in states])
        if len(self.columns) != len(self.tight):
            raise np.linalg.LinAlgError("not a basis")
        self.at_lower = np.array([states[row] == at_lower for row in self.tight], dtype=bool)
        self.inverse: Array = np.linalg.inv(program.matrix[:, self.columns][self.tight].toarray())

    def solution(self, lower: Array, upper: Array, cost: Array) -> tuple[Array, Array]:
        """Values and duals for these right sides and prices; arrays may have leading axes, one program per entry."""
        right = np.where(self.at_lower, lower[..., self.tight], upper[..., self.tight])
        values, duals = np.zeros(cost.shape), np.zeros(lower.shape)
        values[..., self.columns] = right @ self.inverse.T
        duals[..., self.tight] = cost[..., self.columns] @ self.inverse
        return values, duals


class Batch:
    """Programs that differ in right sides and prices only, and the solutions found for them so far."""

    def __init__(self, program: LinearProgram, count: int) -> None:
        rows, columns = program.shape
        self.lower, self.upper = np.tile(program.row_lower, (count, 1)), np.tile(program.row_upper, (count, 1))
        self.cost = np.tile(program.objective, (count, 1))
        self.values, self.duals = np.full((count, columns), np.nan), np.full((count, rows), np.nan)
        self.objective = np.full(count, np.nan)
        self.done = np.zeros(count, dtype=bool)

    def move(self, rows: NDArray[np.int64], sense: str, right: Array) -> None:
        """Put other right sides, shape (N, rows) or (rows,), in one family of rows."""
        if sense != "<=":
            self.lower[:, rows] = right
        if sense != ">=":
            self.upper[:, rows] = right

    def open(self) -> int | None:
        """An entry that has no solution yet."""
        return None if self.done.all() else int(np.argmin(self.done))

    def close(self, at: int) -> None:
        """Note that an entry has no solution."""
        self.done[at] = True

    def put(self, at: int, solution: Solution) -> None:
        """Note the solution of one entry."""
        self.values[at], self.duals[at], self.done[at] = solution.values, solution.duals, True
        self.objective[at] = solution.certificate.objective

    def offer(self, basis: Basis, certifier: Certifier) -> None:
        """Take over the basis wherever its solution passes the certificate."""
        left = np.flatnonzero(~self.done)
        lower, upper, cost = self.lower[left], self.upper[left], self.cost[left]
        values, duals = basis.solution(lower, upper, cost)
        primal, dual, error, weight, objective, _ = certifier.figures(lower, upper, cost, values, duals)
        fits = (primal <= EXACT) & (dual <= EXACT) & (error <= EXACT * np.maximum(weight, 1e-300))
        taken = left[fits]
        self.values[taken], self.duals[taken], self.objective[taken] = values[fits], duals[fits], objective[fits]
        self.done[taken] = True
