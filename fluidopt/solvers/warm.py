"""`Solver`: a model kept in HiGHS over many re-solves, changed in place and started from its last basis."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import highspy
import numpy as np
from numpy.typing import NDArray
from sympy import Expr

from fluidopt.errors import FluidoptError, InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.program import Array, Block, LinearProgram, Lowering
from fluidopt.solvers import checked, held, highs
from fluidopt.solvers.alike import MOST_STACKED, Alike, Optima, coefficients, put_right_side
from fluidopt.solvers.bases import EXACT, Basis
from fluidopt.solvers.certificate import DENSE, Certificate, Certifier, Solution, SolverOptions
from fluidopt.solvers.scaling import scale
from fluidopt.tables import shorten
from fluidopt.views import card, figures, paragraph

if TYPE_CHECKING:
    from fluidopt.model import FluidModel


@dataclass(frozen=True)
class Resolved:
    """One re-solve: the certified solution, as arrays by name, and how it was started."""

    program: LinearProgram
    solution: Solution
    start: str
    """``"cold"`` or ``"warm"``, with the reason where a warm start was not possible."""

    @property
    def objective(self) -> float:
        """Value of what was maximised; the revenue rate, money/s per GPU, unless the model replaced it."""
        return self.solution.certificate.objective

    @property
    def certificate(self) -> Certificate:
        """Residuals and gap, computed from the arrays."""
        return self.solution.certificate

    @cached_property
    def values(self) -> dict[str, Array]:
        """Every variable on the grid of its index sets, by its name in the model's symbols."""
        return self.program.column_grids(self.solution.values)

    @cached_property
    def shadow_prices(self) -> dict[str, Array]:
        """Every row family's duals on the grid of its index sets, by the family's name."""
        return self.program.row_grids(self.solution.duals)

    def _repr_html_(self) -> str:
        certificate = paragraph(f"Started {self.start}. {self.certificate}.", muted=True)
        return card("Re-solve", figures(("Objective", self.objective, "")), certificate)


@dataclass(frozen=True)
class ResolvedMany:
    """Many re-solves of one model, certified one by one; first axis N, one entry per re-solve."""

    program: LinearProgram
    """The program with the numbers held by the solver; those of each re-solve differ."""
    objective: Array
    """Shape (N,); NaN where there is no solution."""
    solution_values: Array
    """Shape (N, columns); NaN where an entry has other rows or columns than ``program``."""
    solution_duals: Array
    """Shape (N, rows); NaN likewise."""
    bases: int
    """How many programs had to be solved; all others have the basis of one of these."""
    failures: dict[int, FluidoptError] = field(default_factory=dict)
    """By entry: why it has no objective."""

    def values(self, name: str) -> Array:
        """A variable by its name in the model's symbols, shape (N, ...); NaN where it does not exist."""
        return self._grid(self.program.columns, name, self.solution_values)

    def shadow_prices(self, name: str) -> Array:
        """The duals of a row family by its name, shape (N, ...); NaN where a member does not exist."""
        return self._grid(self.program.rows, name, self.solution_duals)

    @staticmethod
    def _grid(blocks: Sequence[Block], name: str, vectors: Array) -> Array:
        block = next((block for block in blocks if block.name == name), None)
        if block is None:
            raise InvalidInput(f"there is no {name!r}; there are {shorten([block.name for block in blocks], most=20)}")
        return np.where(block.numbers >= 0, vectors[:, block.numbers], np.nan)

    def _repr_html_(self) -> str:
        solved = self.objective[np.isfinite(self.objective)]
        ends = [("Least objective", solved.min(), ""), ("Largest", solved.max(), "")] if solved.size else []
        return card("Re-solves", figures(("Asked for", self.objective.size, ""), ("Solved", solved.size, ""), *ends))


# Token counts and iteration times divide; 0 has no meaning.
_POSITIVE = {"P", "D", "tau"}


class Solver:
    """A model held for re-solves. Changes add up: each `solve` starts from what the last one left.

    A change of right sides or prices keeps the matrix; the last basis is tried first, and where its solution is no
    longer optimal simplex goes on from it. A change of coefficients passes
    a new matrix with the same basis; a change of which rows and columns exist rebuilds, and `Resolved.start` says why.
    Large programs start cold by interior point where simplex from the old basis would take longer.

    Args:
        model: what to solve; later changes of it are not seen here.
        options: limits and tolerance.
    """

    def __init__(self, model: FluidModel, *, options: SolverOptions | None = None) -> None:
        if not hasattr(model, "symbolic"):
            raise InvalidInput(f"Solver: model must be a FluidModel; got {model!r}")
        if model.has_convex_penalty:
            raise InvalidInput("Solver: a convex penalty (slot_tpot with penalty) is not linear; use FluidModel.solve")
        self._options = checked(options)
        self._tolerance = self._options.tolerance or 1e-7
        self._lowering = Lowering(model.symbolic, model.numbers())
        self._given = frozenset(each.name for each in model.symbolic.parameters if each.definition is None)
        self._parts = _Dependencies(self._lowering)
        self._program: LinearProgram | None = None
        self._basis: Basis | None = None
        self._moved_rows: set[int] = set()
        self._moved_prices = False

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters that `solve` may change, as in the model's symbols (``lambda``, ``theta``, ...)."""
        return self._given

    def solve(self, changes: Mapping[str, Any] | None = None) -> Resolved:
        """Apply ``changes`` and solve.

        Args:
            changes: new numbers by parameter name (see `parameters`): ``{"lambda": rates, "c_d": 0.3}``; bounds of
                service levels are ``bound_<name>``. Scalars, or arrays of the parameter's shape.

        Raises:
            InvalidInput: an unknown parameter, a wrong shape, a number that is not finite or negative.
            InfeasibleModel: no solution (call `FluidModel.solve` for the reason in words).
            SolverFailure: no certified answer.
        """
        changes = {} if changes is None else changes
        _check_mapping(changes)
        changed = self._checked(changes)
        before = {name: self._lowering.numbers.values[name] for name in changed}
        self._lowering.change(changed)
        try:
            start = self._apply(changed.keys())
        except SolverFailure:
            self._lowering.change(before)
            raise
        if start == "warm" and (same := self._same_basis()) is not None:
            return same
        self._hand_over()
        start, solution = self._run(start)
        self._basis = self._read_basis()
        return Resolved(self._held(), held(solution, self._tolerance), start)

    def _run(self, start: str) -> tuple[str, Solution]:
        """Run HiGHS from where it is; where a warm start ends in no answer, or in one that fails, from nothing.

        A warm answer fails where the optimum is 0, say when arrivals stop: what rounding leaves is then all there is.
        """
        program = self._held()
        if start == "warm" and program.shape[0] > highs.SIMPLEX_ROWS:
            start = self._run_large()
        else:
            highs.run(self._highs)
        if start == "warm":
            with contextlib.suppress(SolverFailure):
                solution = self._read()
                if solution.certificate.holds(self._tolerance):
                    return start, solution
            self._load(program)
            start = "cold: simplex from the last basis failed"
            highs.run(self._highs)
        return start, self._read()

    def _read(self) -> Solution:
        values, duals = highs.read(self._highs, self._scaling, self._method)
        return Solution(values, duals, self._certifier(self._held(), values, duals), f"HiGHS {self._method}")

    def _same_basis(self) -> Resolved | None:
        """The last basis on the present numbers, if its solution passes; HiGHS is not asked then."""
        if self._basis is None:
            return None
        program = self._held()
        values, duals = self._basis.solution(program.row_lower, program.row_upper, program.objective)
        certificate = self._certifier(program, values, duals)
        if not certificate.holds(EXACT):
            return None
        return Resolved(program, Solution(values, duals, certificate, "last basis", self._tolerance), "warm")

    def _read_basis(self) -> Basis | None:
        program = self._held()
        if program.shape[0] * program.shape[1] > DENSE:
            return None
        try:
            return Basis(program, self._highs.getBasis())
        except np.linalg.LinAlgError:
            return None

    def _held(self) -> LinearProgram:
        assert self._program is not None, "the program is made by the first solve"
        return self._program

    def solve_many(self, changes: Mapping[str, Any]) -> ResolvedMany:
        """Solve once per entry of the first axis of ``changes``; the numbers held by the solver stay as they are.

        An optimal basis stays optimal for other numbers as long as its primal and dual solutions keep their signs. So
        each program that is solved offers its basis to those that are still open, and whose certificate holds is done:
        for other right sides and prices at the cost of two products of matrices, for other coefficients of a small
        linear system. A sweep of thousands of points needs a few dozen solves.

        Args:
            changes: arrays by parameter name, with a first axis of N and then the parameter's own. Entries that change
                which rows and columns exist are solved by themselves, and so are all of a large program.

        Raises:
            InvalidInput: as `solve`, or first axes that differ.
            SolverFailure: no certified answer for an entry.
        """
        found = self.solve_each(changes)
        for error in found.failures.values():
            if isinstance(error, SolverFailure):
                raise error
        return found

    def solve_each(self, changes: Mapping[str, Any]) -> ResolvedMany:
        """As `solve_many`, with a missing objective also where there is no certified answer; see its ``failures``."""
        _check_mapping(changes)
        try:
            columns = {name: np.asarray(value, dtype=float) for name, value in changes.items()}
        except (TypeError, ValueError):
            raise InvalidInput(f"Solver.solve_many: changes must be arrays of numbers; got {changes!r}") from None
        counts = {name: value.shape[:1] for name, value in columns.items()}
        if not columns or len(set(counts.values())) > 1 or () in counts.values():
            raise InvalidInput(f"Solver.solve_many: every change needs the same first axis; got {counts}")
        count = next(iter(counts.values()))[0]
        if self._program is None:
            with contextlib.suppress(InfeasibleModel):  # the numbers held may have no solution, others may
                self.solve()
        program = self._held()
        rows, width = program.shape
        objective, values, duals = (np.full((count, *each), np.nan) for each in ((), (width,), (rows,)))
        found = ResolvedMany(program, objective, values, duals, bases=0)
        checked = self._checked(columns, count)
        together = self._alike(checked, count) if rows * width <= DENSE else np.zeros(count, dtype=bool)
        bases, known = 0, list[Basis]()
        places = np.flatnonzero(together)
        stack = max(1, MOST_STACKED // (rows * width))
        for start in range(0, len(places), stack):
            part = places[start : start + stack]
            optima = Optima(self._programs({name: value[part] for name, value in checked.items()}, len(part)))
            bases += optima.solve(known, self._options, self._tolerance)
            found.objective[part] = optima.objective
            found.solution_values[part], found.solution_duals[part] = optima.values, optima.duals
            found.failures.update((int(part[at]), error) for at, error in optima.failures.items())
        bases += self._solve_singly(found, {name: columns[name] for name in checked}, np.flatnonzero(~together))
        return replace(found, bases=bases)

    def _solve_singly(self, found: ResolvedMany, columns: Mapping[str, Array], places: NDArray[np.int64]) -> int:
        """Solve some entries one after the other; then the numbers held are what they were."""
        if not len(places):
            return 0
        before = {name: self._lowering.numbers.values[name] for name in columns}
        names = found.program.row_names, found.program.column_names
        try:
            for place in places.tolist():
                try:
                    each = self.solve({name: value[place] for name, value in columns.items()})
                except (InfeasibleModel, SolverFailure) as error:
                    found.failures[place] = error
                    continue
                found.objective[place] = each.objective
                if (each.program.row_names, each.program.column_names) == names:
                    found.solution_values[place] = each.solution.values
                    found.solution_duals[place] = each.solution.duals
        finally:
            self._move(self._checked(before))
        return len(places)

    def _alike(self, changed: dict[str, Array], count: int) -> NDArray[np.bool_]:
        """Which entries have the rows and columns of the numbers held, shape (N,)."""
        lowering, program = self._lowering, self._held()
        alike = np.ones(count, dtype=bool)
        if not self._parts.conditions & changed.keys():
            return alike
        members = [(row.where, row.over) for row in lowering.program.constraints]
        members += [(variable.exists, variable.over) for variable in lowering.program.variables]
        with self._put(changed):
            for (condition, over), block in zip(members, (*program.rows, *program.columns), strict=True):
                there = lowering.evaluate(condition, tuple(index.symbol for index in over))
                there = np.broadcast_to(there, (count, *block.numbers.shape)).reshape(count, -1)
                alike &= (there == (block.numbers >= 0).ravel()).all(axis=1)
        return alike

    def _programs(self, changed: dict[str, Array], count: int) -> Alike:
        """The programs of all entries, from parameters with a leading axis."""
        lowering, program, parts = self._lowering, self._held(), self._parts
        lower, upper, cost = (
            np.tile(array, (count, 1)) for array in (program.row_lower, program.row_upper, program.objective)
        )
        moving, moved = [np.zeros(0, dtype=np.int64)], [np.zeros((count, 0, program.shape[1]))]
        with self._put(changed):
            for at, (row, block) in enumerate(zip(lowering.program.constraints, program.rows, strict=True)):
                rows = block.numbers[block.numbers >= 0]
                if parts.right_sides.get(at, frozenset()) & changed.keys():
                    put_right_side(lowering, row, block, lower, upper)
                if parts.coefficients[at] & changed.keys() and len(rows):
                    moving.append(rows)
                    moved.append(coefficients(lowering, row, block, count, program.shape[1]))
            if parts.objective & changed.keys():
                cost[:] = lowering.objective(program.shape[1])
        return Alike(program, np.concatenate(moving), np.concatenate(moved, axis=1), lower, upper, cost)

    @contextlib.contextmanager
    def _put(self, changed: dict[str, Array]) -> Iterator[None]:
        """Other numbers for a while."""
        before = {name: self._lowering.numbers.values[name] for name in changed}
        self._lowering.change(changed)
        try:
            yield
        finally:
            self._lowering.change(before)

    def _move(self, changed: dict[str, Array]) -> None:
        """Apply checked changes without solving."""
        if changed:
            self._lowering.change(changed)
            self._apply(changed.keys())

    def _checked(self, changes: Mapping[str, Any], count: int | None = None) -> dict[str, Array]:
        """The changes as arrays of the parameters' shapes (with a first axis of ``count``), without those that change
        nothing."""
        lead = () if count is None else (count,)
        checked = {}
        for name, value in changes.items():
            if name not in self._given:
                raise InvalidInput(
                    f"Solver.solve: there is no parameter {name!r}; there are {shorten(sorted(self._given), most=20)}"
                )
            present = np.asarray(self._lowering.numbers.values[name], dtype=float)
            try:
                new = np.asarray(value, dtype=float)
                if new.shape == lead:  # one number for all members
                    new = new.reshape(lead + (1,) * present.ndim)
                new = np.broadcast_to(new, lead + present.shape)
            except (TypeError, ValueError):
                raise InvalidInput(
                    f"Solver.solve: {name} must be a number or an array of shape {lead + present.shape}; got {value!r}"
                ) from None
            if not (np.isfinite(new).all() and (new >= 0).all()):
                raise InvalidInput(f"Solver.solve: {name} must be finite and at least 0; got {value!r}")
            if name in _POSITIVE and not (new > 0).all():
                raise InvalidInput(f"Solver.solve: {name} must be above 0; got {value!r}")
            if not np.array_equal(new, present):
                checked[name] = new
        return checked

    def _apply(self, changed: Any) -> str:
        """Bring program and HiGHS up to date; say how the next run starts."""
        if self._program is None:
            self._load(self._lowering.run())
            return "cold: first solve"
        if self._parts.matrix & changed:
            program = self._lowering.run()
            if program.shape != self._program.shape or program.row_names != self._program.row_names:
                self._load(program)
                return f"cold: {shorten(sorted(self._parts.matrix & changed))} changed which rows and columns exist"
            self._hand_over()
            basis = self._highs.getBasis()
            self._load(program)
            self._highs.setOptionValue("solver", "simplex")
            self._highs.setBasis(basis)
            return "warm"
        self._move_right_sides([at for at, names in self._parts.right_sides.items() if names & changed])
        if self._parts.objective & changed:
            self._program = replace(self._program, objective=self._lowering.objective(self._program.shape[1]))
            self._moved_prices = True
        self._highs.setOptionValue("solver", "simplex")
        return "warm"

    def _load(self, program: LinearProgram) -> None:
        scaled, scaling = scale(program)
        self._highs = highs.new_highs(scaled)
        self._scaling = scaling
        self._method = "simplex" if program.shape[0] <= highs.SIMPLEX_ROWS else "ipm"
        self._highs.setOptionValue("solver", self._method)
        if np.isfinite(self._options.time_limit):
            self._highs.setOptionValue("time_limit", float(self._options.time_limit))
        self._certifier = Certifier(program)
        self._program, self._basis = program, None
        self._moved_rows, self._moved_prices = set(), False
        self._rows = [block.numbers[block.numbers >= 0].astype(np.int32) for block in program.rows]

    def _move_right_sides(self, families: Sequence[int]) -> None:
        """Evaluate the right sides of some families of rows anew."""
        if not families:
            return
        program = self._held()
        lower, upper = program.row_lower.copy(), program.row_upper.copy()
        for at in families:
            put_right_side(self._lowering, self._lowering.program.constraints[at], program.rows[at], lower, upper)
        self._program = replace(program, row_lower=lower, row_upper=upper)
        self._moved_rows.update(families)

    def _hand_over(self) -> None:
        """Pass HiGHS what has moved since its last run."""
        program, scaling = self._held(), self._scaling
        for at in self._moved_rows:
            rows = self._rows[at]
            factor = scaling.rows[rows] / scaling.amount
            self._highs.changeRowsBounds(
                len(rows), rows, program.row_lower[rows] * factor, program.row_upper[rows] * factor
            )
        if self._moved_prices:
            columns = np.arange(program.shape[1], dtype=np.int32)
            self._highs.changeColsCost(len(columns), columns, program.objective * scaling.columns / scaling.money)
        self._moved_rows, self._moved_prices = set(), False

    def _run_large(self) -> str:
        """Simplex from the last basis for as long as it beats a cold interior point, then that."""
        program = self._held()
        rows = program.shape[0]
        self._highs.setOptionValue("simplex_iteration_limit", max(500, rows // 10))
        highs.run(self._highs)
        self._highs.setOptionValue("simplex_iteration_limit", highspy.kHighsIInf)
        if self._highs.getModelStatus() != highspy.HighsModelStatus.kIterationLimit:
            self._method = "simplex"
            return "warm"
        self._load(program)
        highs.run(self._highs)
        return "cold: the change was too large for simplex from the last basis"


def _check_mapping(changes: object) -> None:
    if not isinstance(changes, Mapping):
        raise InvalidInput(f"Solver: changes must map parameter names to numbers; got {changes!r}")


class _Dependencies:
    """Which given parameters each part of the arrays depends on."""

    def __init__(self, lowering: Lowering) -> None:
        program = lowering.program

        def split(expression: Expr) -> tuple[frozenset[str], frozenset[str]]:
            """Parameters in the coefficients, and in the constants, of an expression."""
            terms = program.terms(expression)
            return (
                lowering.given(*(term.coefficient for term in terms if term.variable is not None)),
                lowering.given(*(term.coefficient for term in terms if term.variable is None)),
            )

        parts = [split(row.difference) for row in program.constraints]
        conditions = lowering.given(
            *(row.where for row in program.constraints), *(variable.exists for variable in program.variables)
        )
        self.conditions = conditions
        self.coefficients = [coefficients for coefficients, _ in parts]
        self.matrix: frozenset[str] = frozenset().union(conditions, *self.coefficients)
        self.right_sides = {at: constants for at, (_, constants) in enumerate(parts) if constants}
        self.objective = split(program.objective)[0]


__all__ = ["Resolved", "ResolvedMany", "Solver"]
