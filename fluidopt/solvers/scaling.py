"""Units that suit a solver: rows, columns, costs and right sides brought near 1 before, and back after.

Solvers work to absolute tolerances. A price of 1e-7 money per token or a rate of 1e-6/s would disappear below them.
All factors are powers of two, so scaling itself rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from fluidopt.program import Array, LinearProgram

PASSES = 3
LEAST = 2.0**-300
"""Right sides in a smaller unit could leave the range of floating point where some are large."""


@dataclass(frozen=True)
class Scaling:
    """Factors of rows and columns, of the objective and of the right sides."""

    rows: Array
    columns: Array
    money: float
    amount: float

    def values(self, scaled: Array) -> Array:
        """Primal values in the program's own units."""
        return scaled * self.columns * self.amount

    def duals(self, scaled: Array) -> Array:
        """Dual values in the program's own units."""
        return scaled * self.rows * self.money


def scale(program: LinearProgram) -> tuple[LinearProgram, Scaling]:
    """Return the program in units near 1 and the way back.

    Rows and columns by alternating geometric means of their entries (Curtis and Reid's idea, three passes).
    """
    matrix = sparse.coo_array(program.matrix)
    row, column = matrix.coords
    size = np.log2(np.abs(matrix.data))
    row_log, column_log = np.zeros(program.shape[0]), np.zeros(program.shape[1])
    for _ in range(PASSES):
        row_log = -_mean(size + column_log[column], row, program.shape[0])
        column_log = -_mean(size + row_log[row], column, program.shape[1])
    rows, columns = np.exp2(np.rint(row_log)), np.exp2(np.rint(column_log))
    cost = program.objective * columns
    money = _near(np.abs(cost))
    lower, upper = program.row_lower * rows, program.row_upper * rows
    # What flows is set by the equations; a bound far above it must not set the unit.
    equal = np.abs(lower[lower == upper])
    sides = np.abs(np.concatenate([lower[np.isfinite(lower)], upper[np.isfinite(upper)]]))
    amount = max(_near(equal if equal.any() else sides), LEAST)
    scaled = replace(
        program,
        objective=cost / money,
        matrix=sparse.csc_array((matrix.data * rows[row] * columns[column], (row, column)), shape=program.shape),
        row_lower=lower / amount,
        row_upper=upper / amount,
    )
    return scaled, Scaling(rows, columns, money, amount)


def _mean(size: Array, of: NDArray[np.int32], count: int) -> Array:
    number = np.bincount(of, minlength=count)
    mean: Array = np.bincount(of, weights=size, minlength=count) / np.maximum(number, 1)
    return mean


def _near(values: Array) -> float:
    """The power of two nearest the largest value; 1 where all are 0."""
    largest = float(values.max(initial=0.0))
    return float(np.exp2(np.rint(np.log2(largest)))) if largest > 0 else 1.0
