"""Programs that share a matrix but for some rows: their matrices, and their certificates, many at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fluidopt.program import Array, LinearProgram
from fluidopt.solvers.certificate import ROUNDING, Certifier

# Multiplications in one product of matrices: beyond so many the linear algebra starts threads, and on a busy machine
# waiting for these takes a hundred times as long as the product.
ONE_THREAD = 500_000
FEWEST_TOGETHER, MOST_TOGETHER = 32, 1_024


def together(rows: int, columns: int) -> int:
    """How many programs of this size are best treated at once."""
    return min(MOST_TOGETHER, max(FEWEST_TOGETHER, ONE_THREAD // (rows * columns)))


class MovedCertifier(Certifier):
    """Certificates of programs of which each has its own ``moved`` rows, shape (N, r, columns)."""

    def __init__(self, program: LinearProgram, shared: Array, moving: NDArray[np.int64], moved: Array) -> None:
        self.matrix, self.size = Moved(shared, moving, moved), Moved(np.abs(shared), moving, np.abs(moved))
        self.row_rounding = ROUNDING * self.size.row_most()
        self.column_rounding = ROUNDING * self.size.column_most()
        self.no_lower, self.no_upper = np.isinf(program.row_lower), np.isinf(program.row_upper)


@dataclass(frozen=True)
class Moved:
    """A matrix per program, the same but for some rows; multiplies one vector per program from the right."""

    shared: Array
    """Shape (rows, columns)."""
    moving: NDArray[np.int64]
    """Numbers of the rows that differ, shape (r,)."""
    moved: Array
    """These rows, shape (N, r, columns)."""
    transposed: bool = False
    __array_ufunc__ = None  # so that numpy leaves ``vectors @ matrices`` to this class

    @property
    def T(self) -> Moved:
        """The transposed matrices."""
        return replace(self, transposed=not self.transposed)

    def __rmatmul__(self, vectors: Array) -> Array:
        product: Array
        if self.transposed:
            product = vectors @ self.shared.T
            product[:, self.moving] = np.einsum("nrc,nc->nr", self.moved, vectors)
            return product
        fixed = vectors.copy()
        fixed[:, self.moving] = 0.0
        product = fixed @ self.shared + np.einsum("nr,nrc->nc", vectors[:, self.moving], self.moved)
        return product

    def row_most(self) -> Array:
        """The largest entry of every row, shape (N, rows)."""
        most = np.tile(self.shared.max(axis=1), (len(self.moved), 1))
        most[:, self.moving] = self.moved.max(axis=2)
        return most

    def column_most(self) -> Array:
        """The largest entry of every column, shape (N, columns)."""
        fixed = np.delete(self.shared, self.moving, axis=0).max(axis=0, initial=0.0)
        most: Array = np.maximum(fixed, self.moved.max(axis=1, initial=0.0))
        return most
