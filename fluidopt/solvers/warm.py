"""`Solver`: a model kept in HiGHS over many re-solves, changed in place and started from its last basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import highspy
import numpy as np
from sympy import Expr

from fluidopt.errors import InvalidInput, SolverFailure
from fluidopt.program import Array, LinearProgram, Lowering
from fluidopt.solvers import checked, highs
from fluidopt.solvers.certificate import Certificate, Certifier, Solution, SolverOptions
from fluidopt.solvers.scaling import scale
from fluidopt.tables import shorten

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


class Solver:
    """A model held for re-solves. Changes add up: each `solve` starts from what the last one left.

    A change of right sides or prices keeps the matrix and starts from the last basis; a change of coefficients passes
    a new matrix with the same basis; a change of which rows and columns exist rebuilds, and `Resolved.start` says why.
    Large programs start cold by interior point where simplex from the old basis would take longer.

    Args:
        model: what to solve; later changes of it are not seen here.
        options: limits and tolerance.
    """

    def __init__(self, model: FluidModel, *, options: SolverOptions | None = None) -> None:
        if any(added.cut is not None for added in model.copy()._additions):
            raise InvalidInput("Solver: a convex penalty (slot_tpot with penalty) is not linear; use FluidModel.solve")
        self._options = checked(options)
        self._tolerance = self._options.tolerance or 1e-7
        self._lowering = Lowering(model.symbolic, model.numbers())
        self._given = frozenset(each.name for each in model.symbolic.parameters if each.definition is None)
        self._parts = _Dependencies(self._lowering)
        self._program: LinearProgram | None = None

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
        changed = self._checked(changes or {})
        if changed:
            self._lowering.change(changed)
        start = self._apply(changed.keys())
        assert self._program is not None
        if start == "warm" and self._program.shape[0] > highs.SIMPLEX_ROWS:
            start = self._run_large()
        else:
            highs.run(self._highs)
        try:
            values, duals = highs.read(self._highs, self._scaling, self._method)
        except SolverFailure:
            if start != "warm":
                raise
            self._load(self._program)
            start = "cold: simplex from the last basis failed"
            highs.run(self._highs)
            values, duals = highs.read(self._highs, self._scaling, self._method)
        certificate = self._certifier(self._program, values, duals)
        if not certificate.holds(self._tolerance):
            raise SolverFailure(f"the re-solve fails its certificate: {certificate}")
        solution = Solution(values, duals, certificate, f"HiGHS {self._method}", self._tolerance)
        return Resolved(self._program, solution, start)

    def _checked(self, changes: Mapping[str, Any]) -> dict[str, Array]:
        checked = {}
        for name, value in changes.items():
            if name not in self._given:
                raise InvalidInput(
                    f"Solver.solve: there is no parameter {name!r}; there are {shorten(sorted(self._given), most=20)}"
                )
            present = np.asarray(self._lowering.numbers.values[name], dtype=float)
            try:
                new = np.broadcast_to(np.asarray(value, dtype=float), present.shape)
            except (TypeError, ValueError):
                raise InvalidInput(
                    f"Solver.solve: {name} must be a number or an array of shape {present.shape}; got {value!r}"
                ) from None
            if not (np.isfinite(new).all() and (new >= 0).all()):
                raise InvalidInput(f"Solver.solve: {name} must be finite and at least 0; got {value!r}")
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
            basis = self._highs.getBasis()
            self._load(program)
            self._highs.setOptionValue("solver", "simplex")
            self._highs.setBasis(basis)
            return "warm"
        right_sides = {}
        for at, names in self._parts.right_sides.items():
            if names & changed:
                right_sides[at] = self._lowering.right_side(
                    self._lowering.program.constraints[at], self._program.rows[at]
                )
        if right_sides:
            self._move_right_sides(right_sides)
        if self._parts.objective & changed:
            self._move_objective(self._lowering.objective(self._program.shape[1]))
        self._highs.setOptionValue("solver", "simplex")
        return "warm"

    def _load(self, program: LinearProgram) -> None:
        scaled, self._scaling = scale(program)
        self._highs = highs.new_highs(scaled)
        self._method = "simplex" if program.shape[0] <= highs.SIMPLEX_ROWS else "ipm"
        self._highs.setOptionValue("solver", self._method)
        if np.isfinite(self._options.time_limit):
            self._highs.setOptionValue("time_limit", float(self._options.time_limit))
        self._certifier = Certifier(program)
        self._program = program

    def _move_right_sides(self, moved: Mapping[int, Array]) -> None:
        assert self._program is not None
        lower, upper = self._program.row_lower.copy(), self._program.row_upper.copy()
        for at, right in moved.items():
            block, sense = self._program.rows[at], self._lowering.program.constraints[at].sense
            rows = block.numbers[block.numbers >= 0]
            lower[rows] = -np.inf if sense == "<=" else right
            upper[rows] = np.inf if sense == ">=" else right
            factor = self._scaling.rows[rows] / self._scaling.amount
            self._highs.changeRowsBounds(len(rows), rows.astype(np.int32), lower[rows] * factor, upper[rows] * factor)
        self._program = replace(self._program, row_lower=lower, row_upper=upper)

    def _move_objective(self, objective: Array) -> None:
        assert self._program is not None
        columns = np.arange(len(objective), dtype=np.int32)
        self._highs.changeColsCost(len(columns), columns, objective * self._scaling.columns / self._scaling.money)
        self._program = replace(self._program, objective=objective)

    def _run_large(self) -> str:
        """Simplex from the last basis for as long as it beats a cold interior point, then that."""
        assert self._program is not None
        rows = self._program.shape[0]
        self._highs.setOptionValue("simplex_iteration_limit", max(500, rows // 10))
        highs.run(self._highs)
        self._highs.setOptionValue("simplex_iteration_limit", highspy.kHighsIInf)
        if self._highs.getModelStatus() != highspy.HighsModelStatus.kIterationLimit:
            self._method = "simplex"
            return "warm"
        self._load(self._program)
        highs.run(self._highs)
        return "cold: the change was too large for simplex from the last basis"


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
        self.matrix: frozenset[str] = frozenset().union(conditions, *(coefficients for coefficients, _ in parts))
        self.right_sides = {at: constants for at, (_, constants) in enumerate(parts) if constants}
        self.objective = split(program.objective)[0]


__all__ = ["Resolved", "Solver"]
