"""Why a program has no solution: which rows cannot hold together, and how little would have to give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from fluidopt.program import LinearProgram
from fluidopt.solvers import highs
from fluidopt.solvers.certificate import SolverOptions

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Conflict:
    """Rows that cannot hold together, and the least total violation (each row over its largest coefficient)."""

    rows: tuple[str, ...]
    """The rows with a non-zero multiplier in the proof of infeasibility."""
    violated: dict[str, float]
    """Rows that the least-violation point breaks, and by how much, in the row's own unit."""


def conflict(program: LinearProgram) -> Conflict:
    """Find the rows of an infeasible program that contradict each other.

    Solves the elastic program (a shortfall and an excess column per row, their scaled sum minimised); the rows with a
    non-zero dual are those of a Farkas proof.
    """
    rows, columns = program.shape
    scale = np.maximum(abs(program.matrix).max(axis=1).toarray().ravel(), 1e-300)
    slack = sparse.diags_array(scale)
    elastic = LinearProgram(
        objective=np.concatenate([np.zeros(columns), np.full(2 * rows, -1.0)]),
        matrix=sparse.csc_array(sparse.hstack([program.matrix, slack, -slack])),
        row_lower=program.row_lower,
        row_upper=program.row_upper,
        rows=program.rows,
        columns=(),
    )
    solution = highs.solve(elastic, SolverOptions())
    names = np.array(program.row_names, dtype=object)
    give = scale * (solution.values[columns : columns + rows] - solution.values[columns + rows :])
    weight = np.abs(solution.duals) * scale
    used = weight > TOLERANCE * max(1.0, float(weight.max(initial=0.0)))
    broken = np.abs(give) > TOLERANCE * scale
    return Conflict(
        rows=tuple(names[used]),
        violated={str(name): float(amount) for name, amount in zip(names[broken], give[broken], strict=True)},
    )
