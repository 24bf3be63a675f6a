"""The cvxpy side of a concave objective: its parts as cvxpy expressions, and one run of Clarabel on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cvxpy
import numpy as np
import sympy

from fluidopt.program import Array, LinearProgram
from fluidopt.solvers.certificate import SolverOptions
from fluidopt.solvers.convex import Rows, run
from fluidopt.solvers.graph import Affine, Combination, Curve, Extreme, Part
from fluidopt.solvers.scaling import Scaling

cp: Any = cvxpy  # which does not say that it exports its functions


def plain(order: Sequence[Part], columns: int) -> Expressions:
    """The parts as the model states them, in its own units: what cvxpy's composition rules are asked about."""
    return Expressions(order, cp.Variable(columns, nonneg=True), {}, {}, levels=False)


def maximize(
    order: Sequence[Part],
    scaled: LinearProgram,
    scaling: Scaling,
    options: SolverOptions,
    *,
    money: float,
    units: Mapping[Curve, Array],
    around: Mapping[Curve, Array],
) -> tuple[Array, Array, dict[Part, Array]]:
    """Maximise the last part in units of ``money`` over the scaled rows; the others are as in `Expressions`.

    Returns:
        Values of the columns, duals of the rows, and weights of the parts of minima and maxima, all unscaled.

    Raises:
        InfeasibleModel: where Clarabel proves that there is no (finite) optimum.
        SolverFailure: on a limit or numerical trouble.
    """
    x = cp.Variable(scaled.shape[1], nonneg=True)
    rows = Rows(scaled, x)
    with np.errstate(all="ignore"):
        built = Expressions(order, cp.multiply(scaling.columns * scaling.amount, x), units, around, levels=True)
        objective = cp.Maximize(cp.sum(built.of[order[-1]]) / money)
        problem = cp.Problem(objective, [*rows.constraints, *built.constraints])
    values = scaling.values(np.maximum(run(problem, x, options), 0.0))
    return values, scaling.duals(rows.duals()) / scaling.amount * money, built.weights()


class Expressions:
    """The cvxpy expression of every part.

    Args:
        order: the parts, inner ones first.
        x: the columns.
        units: for a `Curve`, the size of its argument (what is subtracted from it, for exp), shape (N,).
        around: for each `Curve` that is replaced by its quadratic model, where it has a slope there, shape (N,).
        levels: whether minima and maxima are levels with rows that define them, whose duals then are the weights of
            their parts, in place of cvxpy's own.
    """

    def __init__(
        self,
        order: Sequence[Part],
        x: Any,
        units: Mapping[Curve, Array],
        around: Mapping[Curve, Array],
        *,
        levels: bool,
    ) -> None:
        self.around = around
        self.of: dict[Part, Any] = {}
        self.limits: dict[Part, list[Any]] = {}
        for part in order:
            match part:
                case Affine():
                    self.of[part] = part.matrix @ x + part.constant
                case Combination():
                    self.of[part] = sum(matrix @ self.of[inner] for matrix, inner in part.terms)
                case Curve():
                    self.of[part] = self.curve(part, units.get(part))
                case Extreme():
                    inner = [self.of[each] for each in part.parts]
                    if not levels:
                        self.of[part] = (cp.maximum if part.largest else cp.minimum)(*inner)
                        continue
                    level = cp.Variable(part.members.size)
                    self.limits[part] = [each <= level if part.largest else level <= each for each in inner]
                    self.of[part] = level

    def curve(self, part: Curve, unit: Array | None) -> Any:
        """The function itself, of the argument in its unit; or its quadratic model."""
        inner = self.of[part.argument]
        if part in self.around:
            return self.model(part, inner, self.around[part])
        if isinstance(part.source, sympy.exp):
            return cp.exp(inner) if unit is None else cp.multiply(np.exp(unit), cp.exp(inner - unit))
        if part.exponent is None:
            return cp.log(inner) if unit is None else cp.log(cp.multiply(1 / unit, inner)) + np.log(unit)
        exponent = int(part.exponent) if part.exponent == int(part.exponent) else part.exponent
        if unit is None:
            return cp.power(inner, exponent, approx=False)
        return cp.multiply(unit**exponent, cp.power(cp.multiply(1 / unit, inner), exponent, approx=False))

    def model(self, part: Curve, inner: Any, at: Array) -> Any:
        """Value, slope and, where the argument is linear, curvature at a point."""
        value, slope, bend = (np.broadcast_to(function(at), at.shape) for function in part.functions)
        unit = np.where(at == 0, 1.0, np.abs(at))
        step = cp.multiply(1 / unit, inner) - at / unit
        model = value + cp.multiply(slope * unit, step)
        return model + cp.multiply(bend / 2 * unit**2, cp.square(step)) if inner.is_affine() else model

    @property
    def constraints(self) -> list[Any]:
        """The rows that define the levels of minima and maxima."""
        return [limit for limits in self.limits.values() for limit in limits]

    def weights(self) -> dict[Part, Array]:
        """Weights of the parts of minima and maxima, shape (parts, N), from the duals of the rows that define them."""
        found = {}
        for part, limits in self.limits.items():
            duals = np.stack([np.maximum(np.atleast_1d(limit.dual_value), 0.0) for limit in limits])
            total = duals.sum(axis=0)
            # Without a price the part does not matter at the optimum, and any weights bound it.
            found[part] = np.where(total > 0, duals / np.where(total > 0, total, 1.0), 1.0 / len(limits))
        return found
