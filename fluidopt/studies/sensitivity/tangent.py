"""Derivatives of an optimum to the numbers of its program: templates differentiated, and both sides of a kink.

The program is ``max c'x``, ``A x <= b``. Where its numbers start to move at the rates ``dc``, ``dA``, ``db``, the
maximum moves at the rate (Golshtein; of one optimal pair it is the envelope theorem)

    max over optimal x of  min over optimal prices pi of   dc'x + pi'(db - dA x).

The optimal faces are read off one optimal pair by complementary slackness, and the inner minimum is replaced by its
dual, whose variables v say how x moves: the rate is then the optimum of one linear program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from scipy import sparse
from sympy import Expr, Indexed, Integer, Symbol

from fluidopt.algebra import SymbolicProgram, base_of
from fluidopt.errors import InfeasibleModel, SolverFailure
from fluidopt.program import Array, LinearProgram, Lowering, Numbers
from fluidopt.solvers import Solution, SolverOptions, highs, solve_program
from fluidopt.solvers.certificate import Certifier
from fluidopt.solvers.scaling import scale

Flags = NDArray[np.bool_]

# On the scaled program: what is further from 0 than this is not 0, so the pair leaves no choice there.
ZERO = 1e-8
# Residuals and gap of a derivative, relative.
SMALL = 1e-6


# ---- in symbols ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def tangent(program: SymbolicProgram, moved: frozenset[str] | None = None) -> SymbolicProgram:
    """The derivative of every template along a direction: the same rows and columns, coefficients differentiated.

    For each parameter ``p`` there is a new one, ``d_p``: given where p is given, defined by the derivative of its
    definition where p has one. So the service rates, which are defined in P, D, C and tau, carry the derivative on.

    Args:
        program: what is differentiated.
        moved: names of the given parameters that move; all by default.
    """
    rates: dict[Expr, Expr] = {}
    moving = []
    for each in program.parameters:
        definition = None if each.definition is None else _along(each.definition, rates)
        if definition == 0 or (definition is None and moved is not None and each.name not in moved):
            continue
        rates[each.symbol] = type(each.symbol)(f"d_{each.name}")
        moving.append(replace(each, symbol=rates[each.symbol], definition=definition))
    rows = tuple(
        replace(row, left=_along(row.left, rates), right=_along(row.right, rates)) for row in program.constraints
    )
    return replace(
        program,
        parameters=(*program.parameters, *moving),
        objective=_along(program.objective, rates),
        constraints=rows,
        title=f"{program.title}: derivative",
    )


def _along(expression: Expr, rates: Mapping[Expr, Expr]) -> Expr:
    """d(expression) where every parameter p moves at the rate d_p and variables stay."""
    if isinstance(expression, sympy.Add):
        return sympy.Add(*(_along(part, rates) for part in expression.args))
    if isinstance(expression, sympy.Sum):
        inner = _along(expression.function, rates)
        return sympy.Sum(inner, *expression.limits) if inner != 0 else Integer(0)
    sums = expression.atoms(sympy.Sum)
    outer = {each for each in sums if not any(each in other.atoms(sympy.Sum) - {other} for other in sums)}
    inside = {each: sympy.Dummy() for each in sorted(outer, key=str)}
    rest = expression.xreplace(inside)
    members = {each: sympy.Dummy() for each in sorted(rest.atoms(Indexed, Symbol), key=str) if base_of(each) in rates}
    rest = rest.xreplace(members)
    back = {dummy: each for each, dummy in (inside | members).items()}
    total = Integer(0)
    for each, dummy in (inside | members).items():
        if each in inside:
            rate = _along(each, rates)
        else:
            rate = rates[each.base][each.indices] if isinstance(each, Indexed) else rates[each]
        total += rest.diff(dummy).xreplace(back) * rate
    return total


@dataclass(frozen=True)
class Slopes:
    """The derivative of a symbolic program along directions, as arrays."""

    program: SymbolicProgram
    numbers: Numbers

    @cached_property
    def _still(self) -> dict[str, Array]:
        """The rates of a program that does not move."""
        return {f"d_{name}": np.zeros(np.shape(value)) for name, value in self.numbers.values.items()}

    def along(self, direction: Mapping[str, Array]) -> LinearProgram:
        """dc, dA and db where the given parameters move at the rates in ``direction``."""
        rates = self._still | {f"d_{name}": np.asarray(rate) for name, rate in direction.items()}
        values = {**self.numbers.values, **rates}
        return Lowering(tangent(self.program), Numbers(self.numbers.labels, values)).run()


# ---- at an optimum ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimum:
    """An optimal pair of a program, in units near 1, and the optimal faces that it lies on."""

    program: LinearProgram

    @cached_property
    def _pair(self) -> tuple[Array, Array]:
        """Values and duals of a vertex, in the program's own units."""
        found = solve_program(self.program, "highs", SolverOptions(tolerance=1e-7))
        return found.values, found.duals

    @property
    def values(self) -> Array:
        """x, shape (columns,)."""
        return self._pair[0]

    @property
    def duals(self) -> Array:
        """pi, shape (rows,)."""
        return self._pair[1]

    def envelope(self, slopes: LinearProgram) -> float:
        """dc'x + pi'(db - dA x) of this one pair: the rate where the optimum is unique, else between both sides."""
        right = _right(slopes)
        return float(slopes.objective @ self.values + self.duals @ (right - slopes.matrix @ self.values))

    def rate(self, slopes: LinearProgram) -> float:
        """How fast the maximum moves when the program starts to move along ``slopes``; NaN where it has no solution
        then.

        Raises:
            SolverFailure: no certified answer.
        """
        faces = self._faces
        scaled, tight, used, unused = faces.program, faces.tight, faces.used, faces.unused
        change: Any = sparse.csr_array(slopes.matrix * faces.rows[:, None] * faces.columns)
        right = _right(slopes) * faces.rows / faces.amount
        cost = slopes.objective * faces.columns / faces.money
        size = max(float(np.abs(each).max(initial=0.0)) for each in (change.data, right, cost))
        if size == 0.0:
            return 0.0
        # Columns: x on its face, then v; v may be negative where x is used, and is written as a difference there.
        matrix: Any = scaled.matrix.tocsr()
        x, v = matrix[:, ~unused], sparse.hstack([matrix, -matrix[:, used]]).tocsr()
        above = sparse.hstack([x, sparse.csr_array((x.shape[0], v.shape[1]))])
        below = sparse.hstack([change[:, ~unused][tight] / size, v[tight]])
        level = np.where(faces.at_lower, scaled.row_lower, scaled.row_upper)
        problem = LinearProgram(
            objective=np.concatenate([cost[~unused] / size, scaled.objective, -scaled.objective[used]]),
            matrix=sparse.csc_array(sparse.vstack([above, below])),
            row_lower=np.concatenate(
                [
                    np.where(faces.held, level, scaled.row_lower),
                    np.where(faces.at_lower, right / size, -np.inf)[tight],
                ]
            ),
            row_upper=np.concatenate(
                [
                    np.where(faces.held, level, scaled.row_upper),
                    np.where(faces.at_upper, right / size, np.inf)[tight],
                ]
            ),
            rows=(),
            columns=(),
        )
        try:
            found = highs.solve(problem, SolverOptions())
        except InfeasibleModel as error:
            if error.kind == "infeasible":
                return float("nan")
            raise
        return _believed(problem, found) * size * faces.money * faces.amount

    @cached_property
    def _faces(self) -> _Faces:
        return _Faces.of(self.program, self.values, self.duals)


@dataclass(frozen=True)
class _Faces:
    """The optimal faces of a program in units near 1."""

    program: LinearProgram
    rows: Array
    columns: Array
    money: float
    amount: float
    used: Flags
    """Columns above 0 at the vertex: the reduced cost is 0 in every optimal dual."""
    unused: Flags
    """Columns with a reduced cost: 0 in every optimum."""
    at_lower: Flags
    at_upper: Flags
    """Rows that are tight at the vertex, on that side; all others have no price in any optimal dual."""
    held: Flags
    """Rows with a price: tight in every optimum."""

    @property
    def tight(self) -> Flags:
        """Rows that are tight at the vertex."""
        tight: Flags = self.at_lower | self.at_upper
        return tight

    @classmethod
    def of(cls, program: LinearProgram, values: Array, duals: Array) -> _Faces:
        scaled, scaling = scale(program)
        x, pi = values / scaling.columns / scaling.amount, duals / scaling.rows / scaling.money
        activity, size = scaled.matrix @ x, abs(scaled.matrix) @ np.abs(x) + 1.0
        cost = scaled.matrix.T @ pi - scaled.objective
        weight = abs(scaled.matrix).T @ np.abs(pi) + np.abs(scaled.objective)
        at_lower = activity - scaled.row_lower <= ZERO * size
        at_upper = scaled.row_upper - activity <= ZERO * size
        equal = scaled.row_lower == scaled.row_upper
        held = equal | (np.abs(pi) > ZERO * max(float(np.abs(pi).max(initial=0.0)), 1e-300))
        used = x > ZERO * max(float(x.max(initial=0.0)), 1e-300)
        unused = (cost > ZERO * weight) & ~used
        return cls(
            scaled,
            scaling.rows,
            scaling.columns,
            scaling.money,
            scaling.amount,
            used,
            unused,
            at_lower | equal,
            at_upper | equal,
            held & (at_lower | at_upper | equal),
        )


def _believed(program: LinearProgram, found: Solution) -> float:
    """The objective of a solution, if its residuals and its gap are small.

    The columns of v have no bounds, so a certificate, whose bound is safe, would be infinite where one reduced cost is
    wrong by rounding.

    Raises:
        SolverFailure: where they are not small.
    """
    figures = Certifier(program).figures(
        program.row_lower, program.row_upper, program.objective, found.values, found.duals
    )
    primal, dual, error, weight, objective, _ = (float(figure) for figure in figures)
    if not (primal <= SMALL and dual <= SMALL and error <= SMALL * max(weight, 1e-9)):
        raise SolverFailure(
            f"sensitivity: a derivative fails its check (primal residual {primal:.1e}, dual residual {dual:.1e}, gap "
            f"{error:.1e} of {weight:.1e}); rescale the input, or ask for sides=False"
        )
    return objective


def _right(slopes: LinearProgram) -> Array:
    """db, whichever side of a row is bounded."""
    return np.where(np.isinf(slopes.row_lower), slopes.row_upper, slopes.row_lower)
