"""Optimal bases taken over: solutions of programs that differ from a solved one in right sides and prices only."""

from __future__ import annotations

from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from fluidopt.program import Array, LinearProgram

# What a solution from another program's basis must meet. More than is asked of a solver, because nothing here bounds
# what a wrong-signed reduced cost could still earn.
EXACT = 1e-11


def members(basis: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """What HiGHS ended with: the columns in the basis, the tight rows, and which of these on their lower side."""
    basic, at_lower = highspy.HighsBasisStatus.kBasic, highspy.HighsBasisStatus.kLower
    rows = list(basis.row_status)
    columns = np.flatnonzero([status == basic for status in basis.col_status])
    tight = np.flatnonzero([status != basic for status in rows])
    return columns, tight, np.array([rows[row] == at_lower for row in tight], dtype=bool)


class Basis:
    """A basis of a small program: the columns in it, the rows that are tight, and the inverse of where they meet."""

    def __init__(self, program: LinearProgram, basis: Any) -> None:
        """Take the basis that HiGHS ended with; raises `numpy.linalg.LinAlgError` where it is singular in doubles."""
        self.columns, self.tight, self.at_lower = members(basis)
        if len(self.columns) != len(self.tight):
            raise np.linalg.LinAlgError("not a basis")
        self.inverse: Array = np.linalg.inv(program.matrix[:, self.columns][self.tight].toarray())

    def solution(self, lower: Array, upper: Array, cost: Array) -> tuple[Array, Array]:
        """Values and duals for these right sides and prices; arrays may have leading axes, one program per entry."""
        right = np.where(self.at_lower, lower[..., self.tight], upper[..., self.tight])
        values, duals = np.zeros(cost.shape), np.zeros(lower.shape)
        values[..., self.columns] = right @ self.inverse.T
        duals[..., self.tight] = cost[..., self.columns] @ self.inverse
        return values, duals


def suits(figures: tuple[Array, ...]) -> tuple[NDArray[np.bool_], Array]:
    """Where the solutions of a basis are optimal, by the figures of a `Certifier`, and their objectives."""
    primal, dual, error, weight, objective, _ = figures
    return (primal <= EXACT) & (dual <= EXACT) & (error <= EXACT * np.maximum(weight, 1e-300)), objective
