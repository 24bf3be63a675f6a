"""Programs alike: the same rows and columns, other numbers anywhere; a few bases have the optima of thousands.

An optimal basis stays optimal for other numbers as long as its values and duals keep their signs. So each program that
is solved offers its basis to those that are still open, at the cost of a small linear system each, and whose
certificate holds is done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from fluidopt.algebra import RowFamily
from fluidopt.errors import FluidoptError, InfeasibleModel, SolverFailure
from fluidopt.program import Array, Block, LinearProgram, Lowering
from fluidopt.solvers import highs, solve_program
from fluidopt.solvers.bases import EXACT, Basis, suits
from fluidopt.solvers.certificate import Certifier, Solution, SolverOptions, certify
from fluidopt.solvers.moved import MovedCertifier, together
from fluidopt.solvers.scaling import scale

# A basis that suits none of so many open programs is not offered to the others: that would cost more than it saves.
FIRST = 256
# Numbers in a stack of matrices at once.
MOST_STACKED = 2_000_000


@dataclass(frozen=True)
class Alike:
    """N programs with the same rows and columns."""

    program: LinearProgram
    """One of them: names, open sides, and the rows of the matrix that all share."""
    moving: NDArray[np.int64]
    """Numbers of the rows that differ in coefficients, shape (r,)."""
    moved: Array
    """These rows, shape (N, r, columns)."""
    lower: Array
    """Shape (N, rows)."""
    upper: Array
    cost: Array
    """Shape (N, columns)."""

    def at(self, place: int) -> LinearProgram:
        """One of the programs."""
        matrix = self.program.matrix.toarray()
        matrix[self.moving] = self.moved[place]
        return replace(
            self.program,
            matrix=sparse.csc_array(matrix),
            objective=self.cost[place],
            row_lower=self.lower[place],
            row_upper=self.upper[place],
        )


def coefficients(lowering: Lowering, family: RowFamily, block: Block, count: int, columns: int) -> Array:
    """The rows of one family where parameters have a leading axis of N values, shape (N, members, columns)."""
    over = tuple(index.symbol for index in family.over)
    members = int((block.numbers >= 0).sum())
    first = int(block.numbers.max()) + 1 - members
    dense = np.zeros((count, members * columns))
    for term in lowering.program.terms(family.difference):
        if term.variable is None:
            continue
        axes = over + term.bound
        shape = tuple(lowering.size(lowering.index_of(symbol)) for symbol in axes)
        value = np.asarray(lowering.evaluate(term.coefficient, axes), dtype=float)
        value = np.broadcast_to(value, (count, *shape))
        row = np.broadcast_to(block.numbers.reshape(block.numbers.shape + (1,) * len(term.bound)), shape)
        column = np.broadcast_to(lowering.column(term.variable, axes), shape)
        used = row >= 0
        lowering.refuse_undetermined(
            f"row {family.name!r}", term.variable, axes, used & (column < 0) & (value != 0).any(axis=0)
        )
        used &= column >= 0
        places = (row[used] - first) * columns + column[used]
        if len(np.unique(places)) == len(places):
            dense[:, places] += value[:, used]
        else:
            np.add.at(dense.T, places, value[:, used].T)
    return dense.reshape(count, members, columns)


def put_right_side(lowering: Lowering, family: RowFamily, block: Block, lower: Array, upper: Array) -> None:
    """Evaluate the right side of one family of rows anew, into row bounds of shape (..., rows)."""
    rows, right = block.numbers[block.numbers >= 0], lowering.right_side(family, block)
    if family.sense != "<=":
        lower[..., rows] = right
    if family.sense != ">=":
        upper[..., rows] = right


def solved_with_basis(
    program: LinearProgram, options: SolverOptions, tolerance: float
) -> tuple[Solution, Basis | None]:
    """Solve from nothing by simplex, and take the basis; None where it is singular in doubles.

    Raises:
        InfeasibleModel: no solution, or no finite one.
        SolverFailure: no certified answer.
    """
    scaled, scaling = scale(program)
    solver = highs.new_highs(scaled)
    solver.setOptionValue("solver", "simplex")
    if np.isfinite(options.time_limit):
        solver.setOptionValue("time_limit", float(options.time_limit))
    highs.run(solver)
    values, duals = highs.read(solver, scaling, "simplex")
    try:
        basis = Basis(program, solver.getBasis())
    except np.linalg.LinAlgError:
        basis = None
    solution = Solution(values, duals, certify(program, values, duals), "HiGHS simplex", tolerance)
    if not solution.certificate.holds(tolerance):
        try:
            solution = solve_program(program, "highs", options)
        except InfeasibleModel as error:  # so near an edge that rounding decides
            raise SolverFailure(f"HiGHS finds an optimum that fails its certificate, and then: {error}") from None
    return solution, basis


class Optima:
    """The optima of programs alike, as they are found."""

    def __init__(self, programs: Alike) -> None:
        self.programs = programs
        count, columns = programs.cost.shape
        rows = programs.lower.shape[1]
        self.values, self.duals = np.full((count, columns), np.nan), np.full((count, rows), np.nan)
        self.objective = np.full(count, np.nan)
        self.failures: dict[int, FluidoptError] = {}
        """By the program's number."""
        self.done = np.zeros(count, dtype=bool)
        self._shared = programs.program.matrix.toarray()
        self._certifier = Certifier(programs.program)

    def solve(self, bases: list[Basis], options: SolverOptions, tolerance: float) -> int:
        """Find all, with ``bases`` that are known, to which those found are added; returns how many were solved."""
        for basis in bases:
            self.spread(basis)
        solved = 0
        while not self.done.all():
            place, solved = int(np.argmin(self.done)), solved + 1
            self.done[place] = True
            try:
                solution, new = solved_with_basis(self.programs.at(place), options, tolerance)
            except (InfeasibleModel, SolverFailure) as error:
                self.failures[place] = error
                continue
            self.values[place], self.duals[place] = solution.values, solution.duals
            self.objective[place] = solution.certificate.objective
            if new is not None:
                bases.append(new)
                self.spread(new)
        return solved

    def spread(self, basis: Basis) -> None:
        """Offer a basis to all open programs, if it suits one of the first."""
        places = np.flatnonzero(~self.done)
        if self.offer(basis, places[:FIRST]):
            self.offer(basis, places[FIRST:])

    def offer(self, basis: Basis, places: NDArray[np.int64]) -> int:
        """Take a basis over wherever its solution passes the certificate; says how often."""
        most, taken = together(*self._shared.shape), 0
        for start in range(0, len(places), most):
            taken += self._offer(basis, places[start : start + most])
        return taken

    def _offer(self, basis: Basis, places: NDArray[np.int64]) -> int:
        programs = self.programs
        lower, upper, cost = programs.lower[places], programs.upper[places], programs.cost[places]
        right = np.where(basis.at_lower, lower[:, basis.tight], upper[:, basis.tight])
        used: Any
        prices: Any
        if not len(programs.moving):
            used = right @ basis.inverse.T
        else:
            square = self._squares(basis, places)
            try:
                used = np.linalg.solve(square, right[:, :, None])[:, :, 0]
            except np.linalg.LinAlgError:
                return 0
        # Most bases that do not suit have negative values, which takes least to see.
        kept = np.flatnonzero(-used.min(axis=1, initial=0.0) <= EXACT * used.max(axis=1, initial=0.0))
        if not len(kept):
            return 0
        places, lower, upper, cost, used = places[kept], lower[kept], upper[kept], cost[kept], used[kept]
        if not len(programs.moving):
            prices, certifier = cost[:, basis.columns] @ basis.inverse, self._certifier
        else:
            prices = np.linalg.solve(square[kept].transpose(0, 2, 1), cost[:, basis.columns, None])[:, :, 0]
            moved = programs.moved[places]
            certifier = MovedCertifier(programs.program, self._shared, programs.moving, moved)
        values, duals = np.zeros(cost.shape), np.zeros(lower.shape)
        values[:, basis.columns], duals[:, basis.tight] = used, prices
        fits, objective = suits(certifier.figures(lower, upper, cost, values, duals))
        taken = places[fits]
        self.values[taken], self.duals[taken], self.objective[taken] = values[fits], duals[fits], objective[fits]
        self.done[taken] = True
        return len(taken)

    def _squares(self, basis: Basis, places: NDArray[np.int64]) -> Array:
        """The matrix of a basis in each program, shape (N, m, m)."""
        programs = self.programs
        square = np.tile(self._shared[np.ix_(basis.tight, basis.columns)], (len(places), 1, 1))
        rows = np.flatnonzero(np.isin(programs.moving, basis.tight))
        entries = rows[:, None] * programs.cost.shape[1] + basis.columns
        moved = programs.moved.reshape(len(programs.moved), -1)[places[:, None, None], entries]
        square[:, np.searchsorted(basis.tight, programs.moving[rows])] = moved
        return square
