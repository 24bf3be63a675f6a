"""Incomplete LU factorisation with no fill, ILU(0), and BiCGStab with it: the chain's iterative method."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from fluidopt.chain.packing import compiled
from fluidopt.simulation.system import FloatArray


@compiled
def diagonal_places(starts: npt.NDArray[Any], columns: npt.NDArray[Any], where: npt.NDArray[Any]) -> None:
    """Where in a sparse matrix (CSR, sorted columns) the diagonal entries stand, into where (S,)."""
    for row in range(where.size):
        for k in range(starts[row], starts[row + 1]):
            if columns[k] == row:
                where[row] = k


@compiled
def incomplete_lu(
    starts: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    where: npt.NDArray[Any],
    factors: FloatArray,
    place: npt.NDArray[Any],
) -> None:
    """ILU(0) in place, unit lower factor; a vanishing pivot (the matrix is singular) keeps its diagonal entry."""
    for row in range(where.size):
        diagonal = factors[where[row]]
        for k in range(starts[row], starts[row + 1]):
            place[columns[k]] = k
        for k in range(starts[row], where[row]):
            pivot = columns[k]
            factors[k] /= factors[where[pivot]]
            for m in range(where[pivot] + 1, starts[pivot + 1]):
                at = place[columns[m]]
                if at >= 0:
                    factors[at] -= factors[k] * factors[m]
        for k in range(starts[row], starts[row + 1]):
            place[columns[k]] = -1
        if abs(factors[where[row]]) < 1e-10 * abs(diagonal):
            factors[where[row]] = diagonal


@compiled
def solve(
    starts: npt.NDArray[Any], columns: npt.NDArray[Any], where: npt.NDArray[Any], factors: FloatArray, x: FloatArray
) -> None:
    """Solve with the factors, in place."""
    for row in range(x.size):
        value = x[row]
        for k in range(starts[row], where[row]):
            value -= factors[k] * x[columns[k]]
        x[row] = value
    for row in range(x.size - 1, -1, -1):
        value = x[row]
        for k in range(where[row] + 1, starts[row + 1]):
            value -= factors[k] * x[columns[k]]
        x[row] = value / factors[where[row]]


@compiled
def _multiply(
    starts: npt.NDArray[Any], columns: npt.NDArray[Any], entries: FloatArray, x: FloatArray, y: FloatArray
) -> None:
    for row in range(x.size):
        total = 0.0
        for k in range(starts[row], starts[row + 1]):
            total += entries[k] * x[columns[k]]
        y[row] = total


@compiled
def _dot(x: FloatArray, y: FloatArray) -> float:
    total = 0.0
    for k in range(x.size):
        total += x[k] * y[k]
    return total


@compiled
def _bicgstab(
    starts: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    where: npt.NDArray[Any],
    entries: FloatArray,
    factors: FloatArray,
    relative: float,
    most: int,
    x: FloatArray,
    residual: FloatArray,
    work: FloatArray,
) -> None:
    shadow, direction, image, smooth, smooth_image, moved = work[0], work[1], work[2], work[3], work[4], work[5]
    size = x.size
    small = relative * relative * _dot(residual, residual)
    for k in range(size):
        shadow[k] = residual[k]
        direction[k] = image[k] = 0.0
    rho = alpha = omega = 1.0
    for _ in range(most):
        if _dot(residual, residual) <= small:
            return
        fresh = _dot(shadow, residual)
        if fresh == 0.0:
            return
        beta = fresh / rho * alpha / omega
        rho = fresh
        for k in range(size):
            direction[k] = residual[k] + beta * (direction[k] - omega * image[k])
            moved[k] = direction[k]
        solve(starts, columns, where, factors, moved)
        _multiply(starts, columns, entries, moved, image)
        along = _dot(shadow, image)
        if along == 0.0:
            return
        alpha = rho / along
        for k in range(size):
            x[k] += alpha * moved[k]
            residual[k] -= alpha * image[k]
            smooth[k] = residual[k]
        solve(starts, columns, where, factors, smooth)
        _multiply(starts, columns, entries, smooth, smooth_image)
        square = _dot(smooth_image, smooth_image)
        if square == 0.0:
            return
        omega = _dot(smooth_image, residual) / square
        for k in range(size):
            x[k] += omega * smooth[k]
            residual[k] -= omega * smooth_image[k]
        if omega == 0.0:
            return


def bicgstab(
    matrix: sparse.csr_array,
    where: npt.NDArray[Any],
    factors: FloatArray,
    right: FloatArray,
    *,
    relative: float,
    most: int,
) -> FloatArray:
    """The solution of ``matrix x = right`` by BiCGStab (van der Vorst 1992), with these factors as preconditioner.

    Stops at a residual of `relative` times the right-hand side, in the 2-norm, at a breakdown, or after `most` steps;
    the caller judges by the residual. Compiled, unlike scipy's: on vectors of this length the threads of a BLAS wait
    for each other, seven times as long as the computation where others use the machine.
    """
    x, residual, work = np.zeros(right.size), right.copy(), np.empty((6, right.size))
    _bicgstab(matrix.indptr, matrix.indices, where, matrix.data, factors, relative, most, x, residual, work)
    return x
