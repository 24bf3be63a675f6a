"""Why a program has no solution: which rows cannot hold together, and how little would have to give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from fluidopt.program import Array, LinearProgram
from fluidopt.solvers import highs
from fluidopt.solvers.certificate import SolverOptions

TOLERANCE = 1e-9


# Filtering tries one program per row; beyond this many the proof's own rows are reported.
MOST_FILTERED = 80


@dataclass(frozen=True)
class Conflict:
    """Rows that cannot hold together, and a point of least total violation (each row over its largest coefficient)."""

    rows: tuple[str, ...]
    """The conflicting rows."""
    irreducible: bool
    """Whether leaving out any one of ``rows`` would resolve the conflict."""
    violated: dict[str, float]
    """Rows that the point breaks: right side less left side, in the row's own unit."""


def conflict(program: LinearProgram) -> Conflict:
    """Find rows of an infeasible program that contradict each other.

    The elastic program (a shortfall and an excess per row, their scaled sum minimised) proves infeasibility by its
    duals; the rows in that proof are then left out one by one, as long as the others still conflict (deletion filter).
    """
    give, weight = _elastic(program, np.ones(program.shape[0], dtype=bool))
    kept = weight > TOLERANCE * max(1.0, float(weight.max(initial=0.0)))
    broken = np.abs(give) > TOLERANCE
    irreducible = int(kept.sum()) <= MOST_FILTERED
    if irreducible:
        for row in np.flatnonzero(kept):
            without = kept.copy()
            without[row] = False
            if np.abs(_elastic(program, without)[0]).max(initial=0.0) > TOLERANCE:
                kept = without
    names = np.array(program.row_names, dtype=object)
    scale = _row_scale(program)
    return Conflict(
        rows=tuple(names[kept]),
        irreducible=irreducible,
        violated={str(name): float(amount) for name, amount in zip(names[broken], (give * scale)[broken], strict=True)},
    )


def _elastic(program: LinearProgram, used: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Least scaled violation of the ``used`` rows: what each is missed by, and its weight in the proof; (rows,)."""
    rows, columns = program.shape
    slack = sparse.diags_array(_row_scale(program))
    elastic = LinearProgram(
        objective=np.concatenate([np.zeros(columns), np.full(2 * rows, -1.0)]),
        matrix=sparse.csc_array(sparse.hstack([program.matrix, slack, -slack])),
        row_lower=np.where(used, program.row_lower, -np.inf),
        row_upper=np.where(used, program.row_upper, np.inf),
        rows=program.rows,
        columns=(),
    )
    solution = highs.solve(elastic, SolverOptions())
    give = solution.values[columns : columns + rows] - solution.values[columns + rows :]
    return give, np.abs(solution.duals) * _row_scale(program)


def _row_scale(program: LinearProgram) -> Array:
    largest: Array = abs(program.matrix).max(axis=1).toarray().ravel()
    return np.where(largest > 0, largest, 1.0)
