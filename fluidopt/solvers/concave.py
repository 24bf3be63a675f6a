"""Concave objectives over the model's linear rows: fairness utilities, costs that grow faster than linearly.

The objective's template becomes a small graph of vectorised parts (`Part`): linear ones, combinations of others, one
curved function each, minima and maxima. From the same graph come the cvxpy expression (`concave_cvxpy`), whose
composition rules (DCP) say whether it is concave, its value, and its tangent, which makes the certificate: a linear
function that is nowhere below a concave objective bounds it by a linear program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import sympy
from scipy import sparse

from fluidopt.algebra import SymbolicProgram
from fluidopt.errors import InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.program import Array, LinearProgram, Lowering, Numbers
from fluidopt.solvers import checked, held
from fluidopt.solvers.certificate import ROUNDING, Certificate, Solution, SolverOptions, certify
from fluidopt.solvers.graph import Affine, Combination, Curve, Extreme, Graph, Part
from fluidopt.solvers.scaling import Scaling, scale
from fluidopt.tables import shorten

if TYPE_CHECKING:
    from fluidopt.solvers.concave_cvxpy import Expressions

TOLERANCE = 1e-6
# Runs until the certificate holds: on the curves themselves (False), or on their quadratic models at the best point so
# far (True).
RUNS = (False, True, True, True, False, True, True, True)
# A tangent to a root or logarithm at 0 is vertical; it is taken at this share of the largest argument instead, which
# leaves it above the function.
NEAREST_TO_ZERO = 1e-14
# Stands for a bound on a column where the rows imply none.
BEYOND = 1e100
_OPPOSITE = {"concave": "convex", "convex": "concave"}


@dataclass(frozen=True)
class ConcaveSolution(Solution):
    """A solution of a program with a concave objective f, and the linear program that proves it.

    ``certificate.objective`` is f at ``values`` and ``certificate.bound`` an upper bound on f at every feasible point,
    both in f's own unit: f <= g @ x + c for its tangent g @ x + c at ``values``, so c plus the bound of the linear
    program max g @ x bounds f. ``duals`` are d(maximum of f)/d(right side). Residuals and gap are relative to the terms
    that the tangent is made of (slopes times values, and how much a slope changes over a value), so neither the unit of
    f nor a constant added to it (the unit of a logarithm's argument) changes them.
    """

    program: LinearProgram = None  # type: ignore[assignment]
    """The rows with the gradient of f at ``values`` for objective."""


def lower_rows(program: SymbolicProgram, numbers: Numbers) -> LinearProgram:
    """Lower the rows of a program whose objective need not be linear; the objective is 0."""
    return _lowered(program, numbers)[1]


def _lowered(program: SymbolicProgram, numbers: Numbers) -> tuple[Lowering, LinearProgram]:
    first = program.variables[0]
    total = first.indexed
    for index in reversed(first.over):
        total = index.sum(total)
    lowering = Lowering(replace(program, objective=total), numbers)
    lowered = lowering.run()
    return lowering, replace(lowered, objective=np.zeros(lowered.shape[1]))


def solve_concave(program: SymbolicProgram, numbers: Numbers, options: SolverOptions | None = None) -> ConcaveSolution:
    """Maximise a concave objective over linear rows with cvxpy and Clarabel; certify.

    The objective may be built from sums, products with parameters, powers with a number as exponent, exp, log, min,
    max and abs; log and roots add the condition that their argument is positive. It is concave if the composition
    rules say so: x/(1 + x) must be written 1 - 1/(1 + x).

    Args:
        program: rows and objective in symbols.
        numbers: labels and parameter values.
        options: time limit, and what the certificate must meet (default 1e-6).

    Raises:
        InvalidInput: where the objective is not concave, with the part that is not and why; where it has no finite
            value in any plan; where a row is not linear.
        InfeasibleModel: no point satisfies all rows, or the objective has no finite maximum.
        SolverFailure: no answer that passes its certificate.
    """
    options = checked(options)
    return held(_Concave(program, numbers).solve(options), options.tolerance or TOLERANCE)  # type: ignore[return-value]


def certify_concave(
    program: SymbolicProgram, numbers: Numbers, values: Array, duals: Array
) -> tuple[LinearProgram, Certificate]:
    """Certify a primal-dual pair anew, such as one read from a file (see `ConcaveSolution` for what it means).

    Where the objective holds min, max or abs the weights of their parts are not part of the pair, and are found by
    solving the program again.
    """
    problem = _Concave(program, numbers)
    return problem.certify(values, duals, problem.weights_anew() if problem.extremes else {})


@dataclass(frozen=True)
class _Tangent:
    """``gradient @ x + constant``, and how large what it is made of is."""

    gradient: Array
    constant: float
    terms_of_gradient: Array
    """Shape (columns,): what the slopes of curves change by over their arguments (over the terms of these, where they
    may cancel; over 1 at most for exp), and the slopes of all parts of minima and maxima."""
    terms: float
    """The same, times the terms of the arguments."""


class _Concave:
    """A program with its concave objective taken apart."""

    def __init__(self, program: SymbolicProgram, numbers: Numbers) -> None:
        self.lowering, self.rows = _lowered(program, numbers)
        self.graph = Graph(self.lowering, self.finite_bounds)
        self.root = self.graph.part(program.check(program.objective, "maximize"), (), np.zeros(1, dtype=np.int64))
        self.order = _ordered(self.root)
        self.extremes = [part for part in self.order if isinstance(part, Extreme)]
        self.require_domains()
        self.require_concave()

    @cached_property
    def plain(self) -> Expressions:
        """The objective's parts as cvxpy expressions in the model's own units, for its composition rules."""
        from fluidopt.solvers.concave_cvxpy import plain

        return plain(self.order, self.rows.shape[1])

    @cached_property
    def curvatures(self) -> dict[Part, str]:
        """Concave, convex, linear or unknown, by cvxpy's composition rules."""
        kinds = {"CONSTANT": "linear", "AFFINE": "linear", "CONCAVE": "concave", "CONVEX": "convex"}
        return {part: kinds.get(self.plain.of[part].curvature, "unknown") for part in self.order}

    def require_domains(self) -> None:
        """cvxpy takes odd and negative whole powers for functions of positive numbers only; so they must be."""
        for part in self.order:
            if not isinstance(part, Curve) or part.exponent is None or part.exponent != int(part.exponent):
                continue
            if part.exponent > 0 and part.exponent % 2 == 0:
                continue
            inner = part.argument
            if isinstance(inner, Affine):
                with np.errstate(invalid="ignore"):
                    least = inner.constant + inner.matrix.minimum(0) @ self.finite_bounds
                sure = bool(np.all(least >= 0))
            else:
                sure = self.plain.of[inner].is_nonneg()
            if not sure:
                show = self.graph.show
                raise self.graph.refusal(
                    f"{show(inner.source)} may be negative, where {show(part.source)} bends the other way"
                )

    @cached_property
    def finite_bounds(self) -> Array:
        """Upper bounds on the columns; where the rows imply none, one beyond all use."""
        return np.where(np.isinf(self.rows.column_bounds), BEYOND, self.rows.column_bounds)

    def require_concave(self) -> None:
        if self.curvatures[self.root] not in ("concave", "linear"):
            raise self.graph.refusal(self.reason(self.root, "concave"))

    def reason(self, part: Part, needed: str) -> str:
        """The innermost part that is not ``needed`` (concave or convex) where it should be, and why."""
        show, curvature = self.graph.show, self.curvatures[part]
        if isinstance(part, Combination):
            for matrix, inner in part.terms:
                sign = _sign(matrix)
                if self.curvatures[inner] != "linear" and sign == 0:
                    return f"{show(inner.source)} has coefficients of both signs in {show(part.source)}"
                wanted = needed if sign > 0 else _OPPOSITE[needed]
                if self.curvatures[inner] not in ("linear", wanted):
                    return self.reason(inner, wanted)
        if curvature == "unknown":
            for inner in part.children:
                if self.curvatures[inner] == "unknown":
                    return self.reason(inner, "concave")
            bent = next((each for each in part.children if self.curvatures[each] != "linear"), part.children[0])
            return (
                f"{show(part.source)} is neither concave nor convex by the composition rules, because "
                f"{show(bent.source)} inside it is {self.curvatures[bent]}"
            )
        role = "" if needed == "concave" else " (it is subtracted, or inside a falling function)"
        return f"{show(part.source)} is {curvature} where a {needed} or linear part is needed{role}"

    # -- values and tangents

    def values(self, x: Array) -> dict[Part, Array]:
        """The value of every part at a point."""
        found: dict[Part, Array] = {}
        with np.errstate(all="ignore"):
            for part in self.order:
                match part:
                    case Affine():
                        found[part] = part.matrix @ x + part.constant
                    case Combination():
                        found[part] = sum((matrix @ found[inner] for matrix, inner in part.terms), np.zeros(1))
                    case Curve():
                        inside = found[part.argument]
                        found[part] = part.functions[0](np.maximum(inside, 0.0) if part.positive else inside)
                    case Extreme():
                        stacked = np.stack([found[inner] for inner in part.parts])
                        found[part] = stacked.max(axis=0) if part.largest else stacked.min(axis=0)
        return found

    def objective(self, x: Array) -> float:
        """f at a point; -inf or NaN outside its domain."""
        return float(self.values(x)[self.root][0])

    def tangent(self, x: Array, weights: Mapping[Part, Array]) -> _Tangent:
        """A linear function that is nowhere below f, and equal to it at ``x`` up to rounding.

        Minima and maxima give way to the average of their parts with ``weights``, shape (parts, N), which is nowhere
        on the wrong side; by default all weight is on the part that attains it.
        """
        found = self.values(x)
        slope = {part: np.zeros(part.members.size) for part in self.order}
        slope[self.root] = np.ones(1)
        gradient, constant = np.zeros(self.rows.shape[1]), 0.0
        terms_of_gradient, terms = np.zeros(self.rows.shape[1]), 0.0
        reach = np.abs(x) + ROUNDING * np.abs(x).max(initial=0.0)
        with np.errstate(all="ignore"):
            for part in reversed(self.order):
                price = slope[part]
                match part:
                    case Affine():
                        gradient += part.matrix.T @ price
                        constant += float(price @ part.constant)
                    case Combination():
                        for matrix, inner in part.terms:
                            slope[inner] = slope[inner] + matrix.T @ price
                    case Curve():
                        inner, (function, rise, bend) = part.argument, part.functions
                        at = _positive(part, found[inner])
                        rises = np.broadcast_to(rise(at), at.shape)
                        slope[inner] = slope[inner] + price * rises
                        constant += float(price @ (function(at) - rises * at))
                        size = np.abs(at)
                        if isinstance(inner, Affine) and not part.positive:
                            size = abs(inner.matrix) @ reach + np.abs(inner.constant)
                        if isinstance(part.source, sympy.exp):
                            bends, size = bend(at), np.minimum(size, 1.0)
                        else:
                            bends = bend(size)
                        bends = np.abs(price * bends)
                        terms += float(bends @ size**2)
                        if isinstance(inner, Affine):
                            terms_of_gradient += abs(inner.matrix).T @ (bends * size)
                    case Extreme():
                        share = weights.get(part)
                        share = self.attained(part, found) if share is None else share
                        for inner, each in zip(part.parts, share, strict=True):
                            slope[inner] = slope[inner] + price * each
                            if isinstance(inner, Affine):
                                terms_of_gradient += abs(inner.matrix).T @ np.abs(price)
                                terms += float(np.abs(price) @ (abs(inner.matrix) @ reach))
        return _Tangent(gradient, constant, terms_of_gradient, terms)

    def attained(self, part: Extreme, found: Mapping[Part, Array]) -> Array:
        stacked = np.stack([found[inner] for inner in part.parts])
        which = stacked.argmax(axis=0) if part.largest else stacked.argmin(axis=0)
        share = np.zeros(stacked.shape)
        share[which, np.arange(which.size)] = 1.0
        return share

    def certify(self, x: Array, duals: Array, weights: Mapping[Part, Array]) -> tuple[LinearProgram, Certificate]:
        """The tangent's linear program, and the certificate in the unit of f (see `ConcaveSolution`)."""
        tangent = self.tangent(x, weights)
        program = replace(self.rows, objective=tangent.gradient)
        linear, objective = certify(program, x, duals), self.objective(x)
        lower, upper, matrix, size = program.row_lower, program.row_upper, program.matrix, abs(program.matrix)
        activity = matrix @ x
        shortfall = np.maximum(np.maximum(lower - activity, activity - upper), 0.0)
        largest = float(np.abs(duals).max(initial=0.0))
        excess = tangent.gradient - matrix.T @ duals
        pieces = np.abs(tangent.gradient) + size.T @ np.abs(duals) + tangent.terms_of_gradient
        pieces += ROUNDING * largest * (size.max(axis=0).toarray().ravel() if size.nnz else 0.0)
        wrong = np.maximum(np.where(np.isinf(upper), duals, 0.0), np.where(np.isinf(lower), -duals, 0.0))
        value = float(tangent.gradient @ x)
        # The tangent lies above f at the point itself where a minimum has weight on a part that is not the least.
        error = abs(linear.bound - value) + float(np.abs(duals) @ shortfall) + abs(value + tangent.constant - objective)
        weight = abs(value) + tangent.terms + ROUNDING * float(np.abs(tangent.gradient) @ np.abs(x))
        return program, Certificate(
            max(linear.primal_residual, self.domain_residual(x)),
            max(_relative(excess, pieces), _relative(wrong, np.full(wrong.shape, largest))),
            error / weight if weight > 0 else error,
            objective,
            linear.bound + tangent.constant,
        )

    def domain_residual(self, x: Array) -> float:
        """Largest negative argument of a logarithm or root, over the terms it is made of."""
        found, worst = self.values(x), 0.0
        for part in self.order:
            if isinstance(part, Curve) and part.positive:
                inside = found[part.argument]
                terms = np.full(inside.shape, np.abs(inside).max(initial=0.0))
                if isinstance(part.argument, Affine):
                    terms = abs(part.argument.matrix) @ np.abs(x) + np.abs(part.argument.constant)
                worst = max(worst, _relative(-inside, terms))
        return worst

    # -- solving

    def solve(self, options: SolverOptions) -> ConcaveSolution:
        """Solve, then solve again around the answer, until the certificate holds.

        Later runs replace every curve by its quadratic model at the answer (Newton's step): quadratic programs are
        solved more sharply than exponential and power cones.
        """
        tolerance = options.tolerance or TOLERANCE
        scaled, scaling = scale(self.rows)
        near = self.start(options)
        best: ConcaveSolution | None = None
        for sharpen in RUNS:
            try:
                x, duals, weights = self.attempt(scaled, scaling, near, options, sharpen=sharpen)
            except (SolverFailure, InfeasibleModel):
                if best is None:
                    raise
                continue
            for found in (duals, None):
                if found is None:
                    found = self.duals_of_tangent(x, weights, options)
                if found is None:
                    continue
                program, certificate = self.certify(x, found, weights)
                solution = ConcaveSolution(x, found, certificate, "cvxpy Clarabel (concave)", program=program)
                if certificate.holds(tolerance):
                    return solution
                if best is None or _size(certificate) < _size(best.certificate):
                    best = solution
            near = x if best is None else best.values
        if best is None or self.grows(best, options):
            # An optimum would have duals; a point without has a direction in which the objective still grows.
            raise InfeasibleModel("the objective has no finite maximum, or none that is attained", kind="unbounded")
        return best

    def grows(self, solution: ConcaveSolution, options: SolverOptions) -> bool:
        """Whether the tangent at a point has no finite maximum, which that at an optimum has."""
        from fluidopt.solvers.highs import solve

        try:
            solve(solution.program, options)
        except InfeasibleModel as error:
            return error.kind == "unbounded"
        except SolverFailure:
            pass
        return False

    def duals_of_tangent(self, x: Array, weights: Mapping[Part, Array], options: SolverOptions) -> Array | None:
        """Duals of the tangent's linear program: sharper than an interior point's where these are too rough."""
        from fluidopt.solvers.highs import solve

        gradient = self.tangent(x, weights).gradient
        if not np.isfinite(gradient).all():
            return None
        try:
            return solve(replace(self.rows, objective=gradient), options).duals
        except (InfeasibleModel, SolverFailure):
            return None

    def weights_anew(self) -> Mapping[Part, Array]:
        """Weights of the parts of minima and maxima at the optimum."""
        scaled, scaling = scale(self.rows)
        near = self.start(SolverOptions())
        for _ in range(2):
            near, _, weights = self.attempt(scaled, scaling, near, SolverOptions())
        return weights

    def start(self, options: SolverOptions) -> Array:
        """A point that satisfies the rows and keeps logarithms and roots away from 0, as far as linear ones go.

        Raises:
            InfeasibleModel: no point satisfies the rows.
            InvalidInput: none of those that do gives the objective a finite value.
        """
        from fluidopt.solvers.highs import solve

        calm = self.away_from_exponentials()
        try:
            point = solve(replace(self.rows, objective=calm), options).values
        except InfeasibleModel as error:
            if error.kind == "infeasible":
                raise
            calm = np.zeros_like(calm)
            point = solve(self.rows, options).values
        curves = [
            (part, part.argument)
            for part in self.order
            if isinstance(part, Curve) and part.positive and isinstance(part.argument, Affine) and part.members.size
        ]
        if not curves:
            return point
        # max t with every argument at least t times the most it can be.
        shares = []
        for part, inner in curves:
            top = self.most(inner)
            if part.strictly_positive and top.min() <= 0:
                raise self.undefined(part, int(top.argmin()))
            shares.append(np.where((top > 0) & (top < BEYOND**0.5), top, 1.0) * part.strictly_positive)
        below = sparse.hstack(
            [
                sparse.vstack([inner.matrix for _, inner in curves]),
                sparse.csr_array(-np.concatenate(shares)[:, None]),
            ]
        )
        count, columns = below.shape
        width = sparse.csr_array((np.ones(1), (np.zeros(1, int), np.array([columns - 1]))), shape=(1, columns))
        above = sparse.hstack([self.rows.matrix, sparse.csr_array((self.rows.shape[0], 1))])
        program = LinearProgram(
            objective=np.append(1e-3 * calm, 1.0),
            matrix=sparse.csc_array(sparse.vstack([above, below, width])),
            row_lower=np.concatenate([self.rows.row_lower, *(-inner.constant for _, inner in curves), [-np.inf]]),
            row_upper=np.concatenate([self.rows.row_upper, np.full(count, np.inf), [1.0]]),
            rows=(),
            columns=(),
        )
        owners = [(part, at) for part, _ in curves for at in range(part.members.size)]
        try:
            best = solve(program, options)
        except InfeasibleModel:
            names = shorten([self.graph.show(inner.source) for _, inner in curves])
            raise InvalidInput(
                f"maximize: in no plan are all of these at least 0, as the objective needs: {names}"
            ) from None
        if best.values[-1] <= 1e-12:
            prices = -best.duals[self.rows.shape[0] : -1]
            raise self.undefined(*owners[int(prices.argmax())])
        inside: Array = best.values[:-1]
        return inside

    def away_from_exponentials(self) -> Array:
        """Coefficients of a linear objective, at most about 1, that keeps the arguments of exponentials small."""
        calm = np.zeros(self.rows.shape[1])
        for part in self.order:
            if isinstance(part, Curve) and isinstance(part.source, sympy.exp) and isinstance(part.argument, Affine):
                inner = part.argument
                size = float(
                    abs(inner.matrix).sum(axis=0) @ np.where(self.finite_bounds < BEYOND, self.finite_bounds, 1.0)
                )
                calm -= inner.matrix.sum(axis=0) / (size if size > 0 else 1.0)
        return calm

    def most(self, part: Affine) -> Array:
        """An upper bound on each value that the rows imply, shape (N,)."""
        with np.errstate(invalid="ignore"):
            most: Array = part.constant + part.matrix.maximum(0) @ self.finite_bounds
        return most

    def undefined(self, part: Curve, at: int) -> InvalidInput:
        show, place = self.graph.show, self.graph.place(part, at)
        return InvalidInput(
            f"maximize: the objective has no finite value, because {show(part.argument.source)} is not above 0 in any "
            f"plan{place}, as {show(part.source)} needs; where a term is not meant, give it the weight 0 (a class "
            "without arrivals: multiply by lambda[i])"
        )

    def attempt(
        self,
        scaled: LinearProgram,
        scaling: Scaling,
        near: Array,
        options: SolverOptions,
        *,
        sharpen: bool = False,
    ) -> tuple[Array, Array, dict[Part, Array]]:
        """One run of Clarabel with arguments and objective in units of their size at ``near``.

        With ``sharpen``, curves are replaced by their quadratic models there.
        """
        from fluidopt.solvers.concave_cvxpy import maximize

        found = self.values(near)
        tangent = self.tangent(near, {})
        # Columns that happen to be 0 at that point count as the rows would have them.
        usual = np.maximum(near, np.minimum(scaling.columns * scaling.amount, self.rows.column_bounds))
        size = float(np.abs(tangent.gradient) @ usual) + tangent.terms
        money = size if np.isfinite(size) and size > 0 else 1.0
        units = {part: _unit(part, found[part.argument], near) for part in self.order if isinstance(part, Curve)}
        with np.errstate(all="ignore"):
            around = {part: _positive(part, found[part.argument]) for part in units if sharpen}
        return maximize(self.order, scaled, scaling, options, money=money, units=units, around=around)


def _unit(part: Curve, inside: Array, near: Array) -> Array:
    """The size of a curve's argument at a point, where there is one."""
    if isinstance(part.source, sympy.exp):
        return np.clip(np.nan_to_num(inside), -500, 500)
    size = np.abs(inside)
    if isinstance(part.argument, Affine):
        terms = abs(part.argument.matrix) @ np.abs(near) + np.abs(part.argument.constant)
        size = np.maximum(size, 1e-6 * terms)
    return np.where(np.isfinite(size) & (size > 0), size, 1.0)


def _positive(part: Curve, at: Array) -> Array:
    """Arguments at which the curve has a slope."""
    return np.maximum(at, NEAREST_TO_ZERO * max(float(at.max(initial=0.0)), 1e-250)) if part.positive else at


def _ordered(root: Part) -> list[Part]:
    """All parts, inner ones first."""
    found: list[Part] = []
    for child in root.children:
        found += _ordered(child)
    return [*found, root]


def _sign(matrix: sparse.csr_array) -> int:
    """1 or -1 where all entries have that sign (or are 0), else 0."""
    least, most = matrix.data.min(initial=0.0), matrix.data.max(initial=0.0)
    return 1 if least >= 0 else -1 if most <= 0 else 0


def _relative(violation: Array, weight: Array) -> float:
    """The largest violation relative to its weight; NaN stays NaN."""
    with np.errstate(all="ignore"):
        return float(np.max(np.where(violation <= 0, 0.0, violation / weight), initial=0.0))


def _size(certificate: Certificate) -> float:
    figure = max(certificate.primal_residual, certificate.dual_residual, certificate.gap)
    return figure if np.isfinite(figure) and np.isfinite(certificate.objective) else np.inf
