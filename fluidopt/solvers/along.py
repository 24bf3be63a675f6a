"""Programs along bounds: one model's program at many values of a few numbers that bound its rows.

A bound may be a right side, or a coefficient (a time per token times a share of the fleet). Either way the basis that
is optimal at one value stays so for a while: each program that is solved offers its basis to its neighbours, at the
cost of a small inverse, and whose certificate holds is done. Thousands of values need a few dozen solves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import sympy
from numpy.typing import NDArray
from scipy import sparse

from fluidopt.algebra import Parameter, RowFamily, SymbolicProgram
from fluidopt.errors import InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.program import Array, LinearProgram, Lowering, Numbers
from fluidopt.solvers.alike import put_right_side, solved_with_basis
from fluidopt.solvers.bases import EXACT, Basis, suits
from fluidopt.solvers.certificate import Solution, SolverOptions
from fluidopt.solvers.moved import MovedCertifier, together

# Matrices are kept dense; beyond this many entries a basis costs more to invert than its program to solve.
MOST_ENTRIES = 4_000_000
# Numbers in a stack of matrices at once.
MOST_STACKED = 8_000_000
NO_PLAN, UNCERTIFIED = -1, -2
# Points at which a basis is tried at once where its end is looked for.
SECTIONS = 32
TOLERANCE = 1e-7
REMEMBERED = 3


@dataclass(frozen=True)
class Bound:
    """A number that bounds rows, the same for all members of its symbol."""

    symbol: str
    """Of the given parameter that holds it."""
    enters: Parameter
    """The parameter that stands in the rows: the same, or one defined as it less what does not change."""


@dataclass(frozen=True)
class Solved:
    """Solutions at N values of K bounds, each certified; NaN where there is none, or none that passes."""

    objective: Array
    """Shape (N,)."""
    prices: Array
    """d(objective)/d(bound), shape (N, K); where the optimum is degenerate, of one of its bases."""
    values: Array
    """Shape (N, columns)."""
    basis: NDArray[np.int64]
    """Number of the basis, shape (N,); NO_PLAN where there is no solution, UNCERTIFIED where no certified one."""


class ProgramsAlong:
    """The programs of one model along ``bounds``; bases found are remembered from one call to the next."""

    def __init__(self, symbolic: SymbolicProgram, numbers: Numbers, bounds: Sequence[Bound]) -> None:
        self.bounds = tuple(bounds)
        self._lowering = Lowering(symbolic, numbers)
        self._shapes = [np.shape(numbers.values[each.symbol]) for each in bounds]
        self._start = self._lowered(np.zeros(len(bounds)))
        rows, columns = self._start.shape
        if rows * columns > MOST_ENTRIES:
            raise InvalidInput(
                f"frontier: the program has {rows:,} rows and {columns:,} columns, and bases are kept dense up to "
                f"{MOST_ENTRIES:,} entries; merge classes (classify(trace, classes=...)), or sweep the bound"
            )
        self._matrix: Array = self._start.matrix.toarray()
        slopes = np.stack([self._lowered(unit).matrix.toarray() - self._matrix for unit in np.eye(len(bounds))])
        self._moving = np.flatnonzero(slopes.any(axis=(0, 2)))
        self._slopes: Array = slopes[:, self._moving]
        self.moves = len(self._moving) > 0
        """Whether a bound is a coefficient, so that rows of the matrix move with it."""
        self._derivatives = [self._derivative(each) for each in bounds]
        self._moving_sides = [
            (family, block)
            for family, block, *slopes in zip(symbolic.constraints, self._start.rows, *self._derivatives, strict=True)
            if any(slope.right != 0 for slope in slopes)
        ]
        self.bases: list[_Pivot | None] = []
        self._recent: list[int] = []
        self.programs_solved = 0

    @property
    def columns(self) -> LinearProgram:
        """The program with all bounds at 0, for the names of its rows and columns."""
        return self._start

    # ---- the programs -----------------------------------------------------------------------------------------

    def _lowered(self, at: Array) -> LinearProgram:
        self._change(at)
        return self._lowering.run()

    def _change(self, at: Array) -> None:
        """Put bounds, shape (K,) or (N, K), in place."""
        self._lowering.change(
            {
                bound.symbol: at[..., k].reshape(at.shape[:-1] + (1,) * len(shape)) * np.ones(shape)
                for k, (bound, shape) in enumerate(zip(self.bounds, self._shapes, strict=True))
            }
        )

    def _sides(self, at: Array) -> tuple[Array, Array]:
        """Row bounds at ``at``, shape (N, K): each (N, rows)."""
        lower, upper = (np.tile(side, (len(at), 1)) for side in (self._start.row_lower, self._start.row_upper))
        if self._moving_sides:
            self._change(at)
        for family, block in self._moving_sides:
            put_right_side(self._lowering, family, block, lower, upper)
        return lower, upper

    def _derivative(self, bound: Bound) -> list[RowFamily]:
        """Per family, a row whose right side is d(right side)/d(bound)."""
        parameter, program = bound.enters, self._lowering.program
        at = parameter.symbol[tuple(index.symbol for index in parameter.over)] if parameter.over else parameter.symbol
        found = []
        for family in program.constraints:
            constants = (term for term in program.terms(family.difference) if term.variable is None)
            right = sum((-term.coefficient.diff(at) for term in constants if not term.bound), start=sympy.S.Zero)
            found.append(replace(family, left=sympy.S.Zero, right=right))
        return found

    def _right_slopes(self, at: Array, k: int) -> Array:
        """d(right side)/d(bound k) at ``at``, shape (N, rows)."""
        slopes = np.zeros((len(at), self._start.shape[0]))
        if self._moving_sides:
            self._change(at)
        for family, block in zip(self._derivatives[k], self._start.rows, strict=True):
            if family.right != 0:
                slopes[:, block.numbers[block.numbers >= 0]] = self._lowering.right_side(family, block)
        return slopes

    @property
    def is_linear(self) -> bool:
        """Whether right sides are linear in the bounds and coefficients fixed: then the maximum is piecewise linear."""
        probe = np.array([[0.5], [1.0], [2.0]]) * np.ones(len(self.bounds))
        slopes = [self._right_slopes(probe, k) for k in range(len(self.bounds))]
        return not self.moves and all(np.allclose(each, each[0], rtol=1e-12, atol=0.0) for each in slopes)

    def _moved(self, at: Array) -> Array:
        """The rows of the matrix that move, at ``at``: shape (N, moving rows, columns)."""
        return self._matrix[self._moving] + np.tensordot(at, self._slopes, axes=1)

    def _certifier(self, at: Array) -> MovedCertifier:
        """Certificates of the programs at ``at``, shape (N, K)."""
        return MovedCertifier(self._start, self._matrix, self._moving, self._moved(at))

    def program(self, at: Array) -> LinearProgram:
        """The program at one point, shape (K,)."""
        lower, upper = self._sides(at[None])
        matrix = self._matrix.copy()
        matrix[self._moving] = self._moved(at[None])[0]
        return replace(self._start, matrix=sparse.csc_array(matrix), row_lower=lower[0], row_upper=upper[0])

    # ---- solving ----------------------------------------------------------------------------------------------

    def solve(self, at: Array) -> Solved:
        """Solve at every point of ``at``, shape (N, K); neighbours in this order should be near each other.

        Raises:
            InfeasibleModel: the objective has no finite maximum.
        """
        batch = _Batch(self, at)
        followed = set[int]()  # to their ends, of one bound: what lies beyond has other bases
        while (place := batch.open()) is not None:
            for number in self._recent[:REMEMBERED]:
                if number not in followed and batch.offer(number, np.array([place])).all():
                    break
            else:
                self._solve_at(batch, place)
            if (number := int(batch.basis[place])) >= 0:
                self._recent = [number, *(each for each in self._recent if each != number)]
                batch.spread(number, place)
                if len(self.bounds) == 1:
                    followed.add(number)
        return self._solved(batch)

    def with_basis(self, number: int, at: Array) -> Solved | None:
        """The solutions at ``at``, shape (N, K), that a basis has; None where it is not optimal at all of them."""
        batch = _Batch(self, at)
        return self._solved(batch) if batch.offer(number, np.arange(len(at))).all() else None

    def reach(self, number: int, start: Array, end: Array, *, fine: float) -> tuple[float, float]:
        """How far a basis that is optimal at ``start``, shape (K,), stays so on the line to ``end``, shape (K,).

        Found by sections, without solving a program: places of the line are offered the basis, many at a time.

        Returns:
            The last share of the way at which it was, and the first at which it was not, at most ``fine`` apart; both
            1 where it is all the way.
        """

        def fits(shares: Array) -> NDArray[np.bool_]:
            batch = _Batch(self, start + shares[:, None] * (end - start))
            return batch.offer(number, np.arange(len(shares)))

        return _sections(fits, fine)

    def roomiest(self, at: Array, k: int) -> tuple[Array, float] | None:
        """Values at ``at``, shape (K,), that keep the rows of bound ``k`` with most of it to spare, to first order, and
        how much; None where there are none, or no such rows.
        """
        program, place = self.program(at), at[None]
        found = self.solve(place)
        if found.basis[0] < 0:
            return None
        room = np.abs(self._loosening(place, found.values, k)[0])
        upper = np.isfinite(program.row_upper)
        if not room.any() or (upper & np.isfinite(program.row_lower) & (room > 0)).any():
            return None
        spare = sparse.csc_array(np.where(upper, room, -room)[:, None])
        roomy = replace(
            program,
            matrix=sparse.csc_array(sparse.hstack([program.matrix, spare])),
            objective=np.append(np.zeros(program.shape[1]), 1.0),
        )
        self.programs_solved += 1
        try:
            solution, _ = solved_with_basis(roomy, SolverOptions(), TOLERANCE)
        except (InfeasibleModel, SolverFailure):
            return None
        return solution.values[:-1], float(solution.values[-1])

    def kept(self, values: Array, start: Array, end: Array, *, fine: float) -> tuple[float, float]:
        """As `reach`, for how long ``values``, shape (columns,), keep all rows."""

        def fits(shares: Array) -> NDArray[np.bool_]:
            at = start + shares[:, None] * (end - start)
            lower, upper = self._sides(at)
            many, none = np.tile(values, (len(at), 1)), np.zeros(lower.shape)
            primal: Array = self._certifier(at).figures(lower, upper, np.zeros(many.shape), many, none)[0]
            return primal <= EXACT

        return _sections(fits, fine)

    def _solved(self, batch: _Batch) -> Solved:
        prices = np.stack([self._prices(batch, k) for k in range(len(self.bounds))], axis=1)
        return Solved(batch.objective, prices, batch.values, batch.basis)

    def _solve_at(self, batch: _Batch, place: int) -> None:
        """Solve one point from nothing, and remember the basis."""
        program = self.program(batch.at[place])
        self.programs_solved += 1
        try:
            solution, basis = solved_with_basis(program, SolverOptions(), TOLERANCE)
        except InfeasibleModel as error:
            if error.kind == "unbounded":
                raise
            batch.close(place, NO_PLAN)
        except SolverFailure:
            batch.close(place, UNCERTIFIED)
        else:
            args = (program.objective, batch.at[place], self._moving, self._slopes)
            pivot = None if basis is None else _Pivot(basis, *args)
            self.bases.append(pivot)
            if not batch.offer(len(self.bases) - 1, np.array([place])).all():
                batch.put(place, solution, len(self.bases) - 1)

    def _prices(self, batch: _Batch, k: int) -> Array:
        """Envelope theorem: dual times d(right side - left side)/d(bound)."""
        prices: Array = (batch.duals * self._loosening(batch.at, batch.values, k)).sum(axis=1)
        return prices

    def _loosening(self, at: Array, values: Array, k: int) -> Array:
        """d(right side - left side)/d(bound k) of every row, shape (N, rows)."""
        change = self._right_slopes(at, k)
        change[:, self._moving] -= values @ self._slopes[k].T
        return change


def _sections(fits: Callable[[Array], NDArray[np.bool_]], fine: float) -> tuple[float, float]:
    """The last share from 0 on at which ``fits`` holds, and the first at which it does not, at most ``fine`` apart;
    both 1 where it holds all the way."""
    last, first = 0.0, 1.0
    while first - last > fine:
        shares = np.linspace(last, first, SECTIONS + 1)[1:]
        holds = fits(shares)
        if holds.all() and first == 1.0:
            return 1.0, 1.0
        at = SECTIONS - 1 if holds.all() else int(np.argmin(holds))
        last, first = float(shares[at - 1]) if at else last, float(shares[at])
    return last, first


class _Pivot:
    """A basis, and its solutions at other points than the one it was found at, where some rows of the matrix moved.

    The inverse is taken once; rows that moved are a change of low rank (Sherman, Morrison and Woodbury), the same
    for values and duals.
    """

    def __init__(self, basis: Basis, cost: Array, found_at: Array, moving: NDArray[np.int64], slopes: Array) -> None:
        self.basis, self.found_at = basis, found_at
        rows = np.flatnonzero(np.isin(moving, basis.tight))
        self.changes = slopes[:, rows][:, :, basis.columns]  # (K, r, m)
        self.carried: Array = basis.inverse[:, np.searchsorted(basis.tight, moving[rows])]  # (m, r)
        self.prices: Array = cost[basis.columns] @ basis.inverse
        self.prices_carried: Array = cost[basis.columns] @ self.carried

    def solution(self, at: Array, lower: Array, upper: Array, columns: int) -> tuple[Array, Array]:
        """Values (N, columns) and duals (N, rows) at ``at``, shape (N, K); raises where a matrix is singular."""
        basis, step = self.basis, at - self.found_at
        right = np.where(basis.at_lower, lower[:, basis.tight], upper[:, basis.tight])
        used, prices = right @ basis.inverse.T, np.tile(self.prices, (len(at), 1))
        if self.changes.shape[1]:
            change = np.tensordot(step, self.changes, axes=1)  # (N, r, m)
            turned = np.linalg.inv(np.eye(change.shape[1]) + change @ self.carried)  # (N, r, r)
            missed = np.einsum("nrm,nm->nr", change, used)
            used = used - np.einsum("nrs,ns->nr", turned, missed) @ self.carried.T
            prices -= np.einsum("nr,nrm->nm", self.prices_carried @ turned, change) @ basis.inverse
        values, duals = np.zeros((len(at), columns)), np.zeros(lower.shape)
        values[:, basis.columns], duals[:, basis.tight] = used, prices
        return values, duals


class _Batch:
    """Points that are being solved, and what has been found for them so far."""

    def __init__(self, programs: ProgramsAlong, at: Array) -> None:
        self.programs, self.at = programs, at
        rows, columns = programs.columns.shape
        self.lower, self.upper = programs._sides(at)
        self.values, self.duals = np.full((len(at), columns), np.nan), np.full((len(at), rows), np.nan)
        self.objective, self.basis = np.full(len(at), np.nan), np.full(len(at), NO_PLAN)
        self.done = np.zeros(len(at), dtype=bool)

    def open(self) -> int | None:
        """The first point that has no solution yet."""
        return None if self.done.all() else int(np.argmin(self.done))

    def close(self, place: int, why: int) -> None:
        """Note that a point has no solution, or none that passes its certificate."""
        self.basis[place], self.done[place] = why, True

    def put(self, place: int, solution: Solution, number: int) -> None:
        """Note the solution of one point."""
        self.values[place], self.duals[place] = solution.values, solution.duals
        self.objective[place], self.basis[place] = solution.certificate.objective, number
        self.done[place] = True

    def spread(self, number: int, place: int) -> None:
        """Offer a basis to open points: from ``place`` both ways for as long as it fits, or, of several bounds with a
        fixed matrix, to all."""
        left = np.flatnonzero(~self.done)
        if self.at.shape[1] > 1 and not self.programs.moves:
            self._offer_in_parts(number, left)
            return
        for way in (left[left > place], left[left < place][::-1]):
            self._offer_in_parts(number, way[: self._extent(number, way)])

    def _extent(self, number: int, way: NDArray[np.int64]) -> int:
        """On how many points of ``way``, from its first on, a basis fits; found by sections."""
        last, first = -1, len(way)
        while first - last > 1:
            tried = np.unique(np.linspace(last, first, SECTIONS, dtype=np.int64)[1:])
            tried = tried[tried < len(way)]
            fits = self.offer(number, way[tried])
            at = int(np.argmin(fits)) if not fits.all() else len(tried)
            last, first = int(tried[at - 1]) if at else last, int(tried[at]) if at < len(tried) else first
        return first

    def _offer_in_parts(self, number: int, places: NDArray[np.int64]) -> None:
        rows, columns = self.duals.shape[1], self.values.shape[1]
        stacked = (1 + len(self.programs._moving)) * columns + rows
        most = min(together(rows, columns), max(1, MOST_STACKED // stacked))
        for start in range(0, len(places), most):
            self.offer(number, places[start : start + most])

    def offer(self, number: int, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Take the basis over wherever its solution passes the certificate; says where, shape of ``places``."""
        pivot, programs = self.programs.bases[number], self.programs
        if pivot is None or not len(places):
            return np.zeros(len(places), dtype=bool)
        at, lower, upper = self.at[places], self.lower[places], self.upper[places]
        cost = np.broadcast_to(programs.columns.objective, (len(places), self.values.shape[1]))
        try:
            values, duals = pivot.solution(at, lower, upper, self.values.shape[1])
        except np.linalg.LinAlgError:
            return np.zeros(len(places), dtype=bool)
        fits, objective = suits(programs._certifier(at).figures(lower, upper, cost, values, duals))
        taken = places[fits]
        self.values[taken], self.duals[taken], self.objective[taken] = values[fits], duals[fits], objective[fits]
        self.basis[taken], self.done[taken] = number, True
        return fits
