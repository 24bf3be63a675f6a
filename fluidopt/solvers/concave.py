"""Concave objectives over the model's linear rows: fairness utilities, costs that grow faster than linearly.

The objective's template becomes a small graph of vectorised parts (`_Part`): linear ones, combinations of others, one
curved function each, minima and maxima. From the same graph come the cvxpy expression, whose composition rules (DCP)
say whether it is concave, its value, and its tangent, which makes the certificate: a linear function that is nowhere
below a concave objective bounds it by a linear program.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import cvxpy as cp
import numpy as np
import sympy
from numpy.typing import NDArray
from scipy import sparse
from sympy import Expr, Symbol

from fluidopt.algebra import PlainPrinter, SymbolicProgram, base_of, indices_of, primed
from fluidopt.errors import InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.program import Array, LinearProgram, Lowering, Numbers
from fluidopt.solvers import checked, held
from fluidopt.solvers.certificate import ROUNDING, Certificate, Solution, SolverOptions, certify
from fluidopt.solvers.scaling import Scaling, scale

TOLERANCE = 1e-6
PASSES = 3
# A tangent to a root or logarithm at 0 is vertical; it is taken at this share of the largest argument instead, which
# leaves it above the function.
NEAREST_TO_ZERO = 1e-14
MOST_EXPLAINED = 200
_TIGHT = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11, "max_iter": 500}
_OPPOSITE = {"concave": "convex", "convex": "concave"}

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class ConcaveSolution(Solution):
    """A solution of a program with a concave objective f, and the linear program that proves it.

    ``certificate.objective`` is f at ``values`` and ``certificate.bound`` an upper bound on f at every feasible point,
    both in f's own unit. ``duals`` are d(maximum of f)/d(right side). Residuals and gap are those of ``program``, the
    tangent's linear program, whose optimum and duals are the same; so the gap is relative to the terms of the
    tangent, and adding a constant to f (the unit of a logarithm's argument) does not change it.
    """

    program: LinearProgram = None  # type: ignore[assignment]
    """The rows with the gradient of f at ``values`` for objective."""


def is_linear(program: SymbolicProgram) -> bool:
    """Whether the objective is linear in the variables, so that the program is a linear program."""
    try:
        program.terms(program.objective)
    except InvalidInput:
        return False
    return True


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


# ---- the graph of an objective ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of the objective, for the chosen members of a grid: a vector of N values."""

    source: Expr
    """What it is in the model's symbols."""
    axes: tuple[Symbol, ...]
    members: Indices
    """Shape (N,): places of the members on the grid over ``axes``, flattened."""

    @property
    def children(self) -> Sequence[_Part]:
        """The parts it is made of."""
        return ()


@dataclass(frozen=True, eq=False)
class _Affine(_Part):
    """``matrix @ x + constant``."""

    matrix: sparse.csr_array
    constant: Array


@dataclass(frozen=True, eq=False)
class _Combination(_Part):
    """The sum of ``matrix @ part``."""

    terms: tuple[tuple[sparse.csr_array, _Part], ...]

    @property
    def children(self) -> Sequence[_Part]:
        return [part for _, part in self.terms]


@dataclass(frozen=True, eq=False)
class _Curve(_Part):
    """One function of one part: exp, log, or a power (``exponent``)."""

    argument: _Part
    exponent: float | None = None

    @property
    def children(self) -> Sequence[_Part]:
        return [self.argument]

    @cached_property
    def functions(self) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """The function and its derivative, on arrays."""
        return _compiled(type(self.source) if self.exponent is None else self.exponent)

    @property
    def positive(self) -> bool:
        """Whether the argument must not be negative: logarithms and powers that are not whole or below 0."""
        if self.exponent is None:
            return isinstance(self.source, sympy.log)
        return self.exponent < 0 or self.exponent != int(self.exponent)

    @property
    def strictly_positive(self) -> bool:
        """Whether there is no value at 0 either."""
        return isinstance(self.source, sympy.log) or (self.exponent is not None and self.exponent < 0)


@dataclass(frozen=True, eq=False)
class _Extreme(_Part):
    """The largest or the least of several parts."""

    parts: tuple[_Part, ...]
    largest: bool

    @property
    def children(self) -> Sequence[_Part]:
        return self.parts


@lru_cache(maxsize=256)
def _compiled(kind: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """A function of one variable and its derivative by sympy; ``kind`` is exp, log or an exponent."""
    u = Symbol("u", real=True)
    function = u ** sympy.nsimplify(kind, rational=True) if isinstance(kind, float) else kind(u)
    return sympy.lambdify([u], function, "numpy"), sympy.lambdify([u], function.diff(u), "numpy")


class _Graph:
    """Takes an objective apart, with the numbers of a model."""

    def __init__(self, lowering: Lowering, columns: int) -> None:
        self.lowering = lowering
        self.program = lowering.program
        self.show = PlainPrinter(lowering.program).doprint
        self.columns = columns

    def refusal(self, reason: str) -> InvalidInput:
        return InvalidInput(f"maximize: the objective is not concave, or not seen to be: {reason}")

    def uses(self, expression: Expr) -> bool:
        """Whether a variable stands in it."""
        return any(base_of(each) in self.program.bases for each in expression.atoms(sympy.Indexed, Symbol))

    def size(self, axes: tuple[Symbol, ...]) -> tuple[int, ...]:
        return tuple(self.lowering.size(self.lowering.index_of(symbol)) for symbol in axes)

    def numbers(self, expression: Expr, axes: tuple[Symbol, ...], members: Indices) -> Array:
        """Values of an expression in parameters."""
        with np.errstate(all="ignore"):
            grid = np.broadcast_to(self.lowering.evaluate(expression, axes), self.size(axes))
        values: Array = np.asarray(grid, dtype=float).ravel()[members]
        if not np.isfinite(values).all():
            raise InvalidInput(f"maximize: {self.show(expression)} in the objective is not a finite number everywhere")
        return values

    def part(self, expression: Expr, axes: tuple[Symbol, ...], members: Indices) -> _Part:
        """The graph of an expression."""
        try:
            self.program.terms(expression)
        except InvalidInput:
            pass
        else:
            return self.affine(expression, axes, members)
        place = (expression, axes, members)
        match expression:
            case sympy.Add(args=terms):
                return self.sum(expression, terms, axes, members)
            case sympy.Mul(args=factors):
                return self.product(expression, factors, axes, members)
            case sympy.Sum(function=function, limits=limits):
                inner = axes
                for symbol, *_ in limits:
                    fresh = primed(symbol, inner)
                    function, inner = function.xreplace({symbol: fresh}), (*inner, fresh)
                count = int(np.prod(self.size(inner[len(axes) :])))
                group = sparse.kron(sparse.eye_array(members.size), np.ones((1, count)), format="csr")
                below = (members[:, None] * count + np.arange(count)).ravel()
                return _Combination(*place, ((group, self.part(function, inner, below)),))
            case sympy.Pow(args=(base, exponent)):
                return self.power(expression, base, exponent, axes, members)
            case sympy.exp(args=(argument,)) | sympy.log(args=(argument,)):
                return _Curve(*place, self.part(argument, axes, members))
            case sympy.Max(args=arguments) | sympy.Min(args=arguments):
                parts = tuple(self.part(each, axes, members) for each in arguments)
                return _Extreme(*place, parts, isinstance(expression, sympy.Max))
            case sympy.Abs(args=(argument,)):
                parts = tuple(self.part(each, axes, members) for each in (argument, -argument))
                return _Extreme(*place, parts, largest=True)
        raise self.refusal(
            f"{self.show(expression)} is not one of the functions understood here: sums, powers with a number as "
            "exponent, exp, log, min, max, abs"
        )

    def affine(self, expression: Expr, axes: tuple[Symbol, ...], members: Indices) -> _Affine:
        row_of = np.full(int(np.prod(self.size(axes))), -1)
        row_of[members] = np.arange(members.size)
        constant = np.zeros(members.size)
        entries: list[tuple[Indices, Indices, Array]] = []
        for term in self.program.terms(expression):
            inner = axes + term.bound
            shape = self.size(inner)
            value = np.broadcast_to(self.lowering.evaluate(term.coefficient, inner), shape).astype(float)
            row = np.broadcast_to(row_of.reshape(self.size(axes) + (1,) * len(term.bound)), shape)
            if term.variable is None:
                used = row >= 0
                constant += np.bincount(row[used], weights=value[used], minlength=members.size)
                continue
            column = np.broadcast_to(self.lowering.column(term.variable, inner), shape)
            used = (row >= 0) & (value != 0)
            self.lowering.refuse_undetermined("the objective", term.variable, inner, used & (column < 0))
            used &= column >= 0
            entries.append((row[used], column[used], value[used]))
        shape = (members.size, self.columns)
        if not entries:
            return _Affine(expression, axes, members, sparse.csr_array(shape), constant)
        rows, columns, values = (np.concatenate(each) for each in zip(*entries, strict=True))
        if not (np.isfinite(values).all() and np.isfinite(constant).all()):
            raise InvalidInput(f"maximize: a coefficient in {self.show(expression)} is not a finite number everywhere")
        matrix = sparse.coo_array((values, (rows, columns)), shape=shape).tocsr()
        return _Affine(expression, axes, members, matrix, constant)

    def sum(self, expression: Expr, terms: Sequence[Expr], axes: tuple[Symbol, ...], members: Indices) -> _Part:
        linear = [term for term in terms if is_linear(replace(self.program, objective=term))]
        curved = [term for term in terms if term not in linear]
        parts = [self.part(term, axes, members) for term in curved]
        parts += [self.affine(sympy.Add(*linear), axes, members)] if linear else []
        same = sparse.eye_array(members.size, format="csr")
        return _Combination(expression, axes, members, tuple((same, part) for part in parts))

    def product(self, expression: Expr, factors: Sequence[Expr], axes: tuple[Symbol, ...], members: Indices) -> _Part:
        curved = [factor for factor in factors if self.uses(factor)]
        if len(curved) > 1:
            raise self.refusal(
                f"{self.show(sympy.Mul(*curved))} multiplies or divides variables by each other, which has no curvature "
                "by the composition rules (the log of a product is a sum of logs; a ratio x/(1 + x) is 1 - 1/(1 + x))"
            )
        weight = self.numbers(sympy.Mul(*(factor for factor in factors if factor is not curved[0])), axes, members)
        # Members without weight are left out, so that 0*log(0) is 0.
        kept = np.flatnonzero(weight)
        matrix = sparse.csr_array((weight[kept], (kept, np.arange(kept.size))), shape=(members.size, kept.size))
        return _Combination(expression, axes, members, ((matrix, self.part(curved[0], axes, members[kept])),))

    def power(self, expression: Expr, base: Expr, exponent: Expr, axes: tuple[Symbol, ...], members: Indices) -> _Part:
        if self.uses(exponent):
            raise self.refusal(f"{self.show(expression)} has a variable in its exponent; only exp(...) may")
        values = np.unique(self.numbers(exponent, axes, members))
        if values.size > 1:
            raise self.refusal(f"the exponent in {self.show(expression)} differs between members; use one number")
        number = float(values[0]) if values.size else 1.0
        if number in (0.0, 1.0):
            return self.part(base if number else sympy.S.One, axes, members)
        return _Curve(expression, axes, members, self.part(base, axes, members), number)


# ---- what is read off the graph ---------------------------------------------------------------------------------


class _Concave:
    """A program with its concave objective taken apart."""

    def __init__(self, program: SymbolicProgram, numbers: Numbers) -> None:
        first = program.variables[0]
        total = first.indexed
        for index in reversed(first.over):
            total = index.sum(total)
        lowering = Lowering(replace(program, objective=total), numbers)
        lowered = lowering.run()
        self.lowering = lowering
        self.rows = replace(lowered, objective=np.zeros(lowered.shape[1]))
        self.graph = _Graph(lowering, lowered.shape[1])
        self.root = self.graph.part(program.check(program.objective, "maximize"), (), np.zeros(1, dtype=np.int64))
        self.order = _ordered(self.root)
        self.extremes = [part for part in self.order if isinstance(part, _Extreme)]
        self.require_domains()
        self.require_concave()

    @cached_property
    def curvatures(self) -> dict[_Part, str]:
        """Concave, convex, linear or unknown, by cvxpy's composition rules."""
        built = _Expressions(self.order, cp.Variable(self.rows.shape[1], nonneg=True), {}, None)
        kinds = {"CONSTANT": "linear", "AFFINE": "linear", "CONCAVE": "concave", "CONVEX": "convex"}
        return {part: kinds.get(built.of[part].curvature, "unknown") for part in self.order}

    def require_domains(self) -> None:
        """cvxpy takes odd and negative whole powers for functions of positive numbers only; so they must be."""
        x = cp.Variable(self.rows.shape[1], nonneg=True)
        built = _Expressions(self.order, x, {}, None)
        for part in self.order:
            if not isinstance(part, _Curve) or part.exponent is None or part.exponent != int(part.exponent):
                continue
            if part.exponent > 0 and part.exponent % 2 == 0:
                continue
            inner = part.argument
            if isinstance(inner, _Affine):
                with np.errstate(invalid="ignore"):
                    least = inner.constant + inner.matrix.minimum(0) @ self.finite_bounds
                sure = bool(np.all(least >= 0))
            else:
                sure = built.of[inner].is_nonneg()
            if not sure:
                show = self.graph.show
                raise self.graph.refusal(
                    f"{show(inner.source)} may be negative, where {show(part.source)} bends the other way"
                )

    @cached_property
    def finite_bounds(self) -> Array:
        """Upper bounds on the columns; where the rows imply none, one beyond all use."""
        return np.where(np.isinf(self.rows.column_bounds), 1e300, self.rows.column_bounds)

    def require_concave(self) -> None:
        if self.curvatures[self.root] not in ("concave", "linear"):
            raise self.graph.refusal(self.reason(self.root, "concave"))

    def reason(self, part: _Part, needed: str) -> str:
        """The innermost part that is not ``needed`` (concave or convex) where it should be, and why."""
        show, curvature = self.graph.show, self.curvatures[part]
        if isinstance(part, _Combination):
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

    def values(self, x: Array) -> dict[_Part, Array]:
        """The value of every part at a point."""
        found: dict[_Part, Array] = {}
        with np.errstate(all="ignore"):
            for part in self.order:
                match part:
                    case _Affine():
                        found[part] = part.matrix @ x + part.constant
                    case _Combination():
                        found[part] = sum((matrix @ found[inner] for matrix, inner in part.terms), np.zeros(1))
                    case _Curve():
                        inside = found[part.argument]
                        found[part] = part.functions[0](np.maximum(inside, 0.0) if part.positive else inside)
                    case _Extreme():
                        stacked = np.stack([found[inner] for inner in part.parts])
                        found[part] = stacked.max(axis=0) if part.largest else stacked.min(axis=0)
        return found

    def objective(self, x: Array) -> float:
        """f at a point; -inf or NaN outside its domain."""
        return float(self.values(x)[self.root][0])

    def tangent(self, x: Array, weights: Mapping[_Part, Array]) -> tuple[Array, float]:
        """Gradient g, shape (columns,), and constant c with f <= g @ x + c everywhere, equal at ``x`` up to rounding.

        Minima and maxima give way to the average of their parts with ``weights``, shape (parts, N), which is nowhere
        on the wrong side; by default all weight is on the part that attains it.
        """
        found = self.values(x)
        slope = {part: np.zeros(part.members.size) for part in self.order}
        slope[self.root] = np.ones(1)
        gradient, constant = np.zeros(self.rows.shape[1]), 0.0
        with np.errstate(all="ignore"):
            for part in reversed(self.order):
                price = slope[part]
                match part:
                    case _Affine():
                        gradient += part.matrix.T @ price
                        constant += float(price @ part.constant)
                    case _Combination():
                        for matrix, inner in part.terms:
                            slope[inner] = slope[inner] + matrix.T @ price
                    case _Curve():
                        at = found[part.argument]
                        if part.positive:
                            at = np.maximum(at, NEAREST_TO_ZERO * max(float(at.max(initial=0.0)), 1e-250))
                        rise = np.broadcast_to(part.functions[1](at), at.shape)
                        slope[part.argument] = slope[part.argument] + price * rise
                        constant += float(price @ (part.functions[0](at) - rise * at))
                    case _Extreme():
                        share = weights.get(part)
                        share = self.attained(part, found) if share is None else share
                        for inner, each in zip(part.parts, share, strict=True):
                            slope[inner] = slope[inner] + price * each
        return gradient, constant

    def attained(self, part: _Extreme, found: Mapping[_Part, Array]) -> Array:
        stacked = np.stack([found[inner] for inner in part.parts])
        which = stacked.argmax(axis=0) if part.largest else stacked.argmin(axis=0)
        share = np.zeros(stacked.shape)
        share[which, np.arange(which.size)] = 1.0
        return share

    def certify(self, x: Array, duals: Array, weights: Mapping[_Part, Array]) -> tuple[LinearProgram, Certificate]:
        """The tangent's linear program, and the certificate in the unit of f (see `ConcaveSolution`)."""
        gradient, constant = self.tangent(x, weights)
        program = replace(self.rows, objective=gradient)
        linear = certify(program, x, duals)
        objective = self.objective(x)
        # What the tangent lies above f at the point itself: minima with a weight on a part that is not the least.
        slack = abs(float(gradient @ x) + constant - objective)
        weight = abs(float(gradient @ x)) + ROUNDING * float(np.abs(gradient) @ np.abs(x))
        return program, Certificate(
            max(linear.primal_residual, self.domain_residual(x)),
            linear.dual_residual,
            linear.gap + (slack / weight if weight > 0 else slack),
            objective,
            linear.bound + constant,
        )

    def domain_residual(self, x: Array) -> float:
        """Largest negative argument of a logarithm or root, over the terms it is made of."""
        found, worst = self.values(x), 0.0
        for part in self.order:
            if isinstance(part, _Curve) and part.positive:
                inside = found[part.argument]
                terms = np.abs(inside).max(initial=0.0)
                if isinstance(part.argument, _Affine):
                    terms = abs(part.argument.matrix) @ np.abs(x) + np.abs(part.argument.constant)
                with np.errstate(all="ignore"):
                    worst = max(worst, float(np.max(np.where(inside < 0, -inside / terms, 0.0), initial=0.0)))
        return worst

    # -- solving

    def solve(self, options: SolverOptions) -> ConcaveSolution:
        """Solve, at most `PASSES` times in better and better units, until the certificate holds."""
        tolerance = options.tolerance or TOLERANCE
        scaled, scaling = scale(self.rows)
        near = scaling.columns * scaling.amount
        best: ConcaveSolution | None = None
        for _ in range(PASSES):
            try:
                x, duals, weights = self.attempt(scaled, scaling, near, options)
            except SolverFailure:
                if best is None:
                    raise
                break
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
            near = x
        assert best is not None
        return best

    def duals_of_tangent(self, x: Array, weights: Mapping[_Part, Array], options: SolverOptions) -> Array | None:
        """Duals of the tangent's linear program: sharper than an interior point's where these are too rough."""
        from fluidopt.solvers.highs import solve

        gradient, _ = self.tangent(x, weights)
        if not np.isfinite(gradient).all():
            return None
        try:
            return solve(replace(self.rows, objective=gradient), options).duals
        except (InfeasibleModel, SolverFailure):
            return None

    def weights_anew(self) -> Mapping[_Part, Array]:
        """Weights of the parts of minima and maxima at the optimum."""
        scaled, scaling = scale(self.rows)
        near = scaling.columns * scaling.amount
        for _ in range(2):
            near, _, weights = self.attempt(scaled, scaling, near, SolverOptions())
        return weights

    def attempt(
        self, scaled: LinearProgram, scaling: Scaling, near: Array, options: SolverOptions
    ) -> tuple[Array, Array, dict[_Part, Array]]:
        """One run of Clarabel with arguments and objective in units of their size at ``near``."""
        found = self.values(near)
        gradient, _ = self.tangent(near, {})
        size = float(np.abs(gradient) @ np.abs(near))
        money = size if np.isfinite(size) and size > 0 else 1.0
        units = {part: _unit(part, found[part.argument], near) for part in self.order if isinstance(part, _Curve)}
        x = cp.Variable(scaled.shape[1], nonneg=True)
        constraints, kinds = _rows(scaled, x)
        own = cp.multiply(scaling.columns * scaling.amount, x)
        built = _Expressions(self.order, own, units, [])
        problem = cp.Problem(cp.Maximize(cp.sum(built.of[self.root]) / money), [*constraints, *built.constraints])
        limits = {"time_limit": options.time_limit} if np.isfinite(options.time_limit) else {}
        try:
            with warnings.catch_warnings():
                # Whether the answer is accurate is for the certificate to say.
                warnings.filterwarnings("ignore", message="Solution may be inaccurate")
                problem.solve(solver=cp.CLARABEL, **_TIGHT, **limits)  # type: ignore[no-untyped-call]
        except cp.SolverError as error:
            raise SolverFailure(f"cvxpy (Clarabel) failed: {error}") from None
        if problem.status in {cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE}:
            raise self.infeasible(options)
        if problem.status in {cp.UNBOUNDED, cp.UNBOUNDED_INACCURATE}:
            raise InfeasibleModel("the objective has no finite maximum", kind="unbounded")
        if x.value is None:
            raise SolverFailure(f"cvxpy (Clarabel) stopped with {problem.status!r}")
        duals = np.zeros(scaled.shape[0])
        for (rows, sign), constraint in zip(kinds, constraints, strict=True):
            duals[rows] += sign * np.atleast_1d(constraint.dual_value)
        values = scaling.values(np.maximum(x.value, 0.0))
        return values, scaling.duals(duals) / scaling.amount * money, built.weights()

    def infeasible(self, options: SolverOptions) -> Exception:
        """Why there is no point: the rows alone, or what the objective's logarithms and roots ask for."""
        from fluidopt.solvers.highs import solve

        solve(self.rows, options)
        for part in self.order:
            if not isinstance(part, _Curve) or not part.strictly_positive or not isinstance(part.argument, _Affine):
                continue
            inner = part.argument
            for at in range(min(part.members.size, MOST_EXPLAINED)):
                goal = inner.matrix[[at]].toarray().ravel()
                try:
                    best = float(goal @ solve(replace(self.rows, objective=goal), options).values) + inner.constant[at]
                except InfeasibleModel:
                    continue
                if best <= 1e-12 * (np.abs(goal).max(initial=0.0) + abs(inner.constant[at])):
                    show = self.graph.show
                    return InvalidInput(
                        f"maximize: the objective has no finite value, because {show(inner.source)} is 0 in every plan"
                        f"{self.named(part, at)} and {show(part.source)} needs it above 0; give it the weight 0 there, "
                        "for instance lambda[i] for a class without arrivals"
                    )
        return InfeasibleModel(
            "no point satisfies all rows and keeps every logarithm and root of the objective defined"
        )

    def named(self, part: _Part, at: int) -> str:
        """`` for 'label', 'label'``: the member at a place of a part."""
        place = np.unravel_index(int(part.members[at]), self.graph.size(part.axes)) if part.axes else ()
        sets = [self.lowering.index_of(symbol) for symbol in part.axes]
        labels = [
            f"{index.name} {self.lowering.numbers.labels[index.name][int(each)]!r}"
            for index, each in zip(sets, place, strict=True)
        ]
        return f" for {', '.join(labels)}" if labels else ""


class _Expressions:
    """The cvxpy expression of every part.

    Args:
        order: the parts, inner ones first.
        x: the columns.
        units: for a `_Curve`, the size of its argument (what is subtracted from it, for exp), shape (N,).
        constraints: None for minima and maxima as cvxpy has them; a list to which the rows that define them are
            added, whose duals then are the weights of their parts.
    """

    def __init__(
        self, order: Sequence[_Part], x: Any, units: Mapping[_Part, Array], constraints: list[Any] | None
    ) -> None:
        self.of: dict[_Part, Any] = {}
        self.constraints: list[Any] = [] if constraints is None else constraints
        self.limits: dict[_Part, list[Any]] = {}
        for part in order:
            match part:
                case _Affine():
                    self.of[part] = part.matrix @ x + part.constant
                case _Combination():
                    self.of[part] = sum(matrix @ self.of[inner] for matrix, inner in part.terms)
                case _Curve():
                    self.of[part] = self.curve(part, units.get(part))
                case _Extreme():
                    inner = [self.of[each] for each in part.parts]
                    if constraints is None:
                        self.of[part] = (cp.maximum if part.largest else cp.minimum)(*inner)
                        continue
                    level = cp.Variable(part.members.size)
                    self.limits[part] = [each <= level if part.largest else level <= each for each in inner]
                    self.constraints += self.limits[part]
                    self.of[part] = level

    def curve(self, part: _Curve, unit: Array | None) -> Any:
        inner = self.of[part.argument]
        if isinstance(part.source, sympy.exp):
            return cp.exp(inner) if unit is None else cp.multiply(np.exp(unit), cp.exp(inner - unit))
        if part.exponent is None:
            return cp.log(inner) if unit is None else cp.log(cp.multiply(1 / unit, inner)) + np.log(unit)
        exponent = int(part.exponent) if part.exponent == int(part.exponent) else part.exponent
        if unit is None:
            return cp.power(inner, exponent, approx=False)
        return cp.multiply(unit**exponent, cp.power(cp.multiply(1 / unit, inner), exponent, approx=False))

    def weights(self) -> dict[_Part, Array]:
        """Weights of the parts of minima and maxima, shape (parts, N), from the duals of the rows that define them."""
        found = {}
        for part, limits in self.limits.items():
            duals = np.stack([np.maximum(np.atleast_1d(limit.dual_value), 0.0) for limit in limits])
            total = duals.sum(axis=0)
            # Without a price the part does not matter at the optimum, and any weights bound it.
            found[part] = np.where(total > 0, duals / np.where(total > 0, total, 1.0), 1.0 / len(limits))
        return found


def _rows(program: LinearProgram, x: Any) -> tuple[list[Any], list[tuple[NDArray[np.bool_], int]]]:
    """The rows as cvxpy constraints, and for each constraint its rows and the sign of their duals."""
    equal = program.row_lower == program.row_upper
    matrix = program.matrix.tocsr()
    constraints, kinds = [], []
    for rows, sign, side in (
        (equal, 1, program.row_upper),
        (~equal & np.isfinite(program.row_upper), 1, program.row_upper),
        (~equal & np.isfinite(program.row_lower), -1, program.row_lower),
    ):
        if rows.any():
            left, right = sign * (matrix[rows] @ x), sign * side[rows]
            constraints.append(left == right if rows is equal else left <= right)
            kinds.append((rows, sign))
    return constraints, kinds


def _unit(part: _Curve, inside: Array, near: Array) -> Array:
    """The size of a curve's argument at a point, where there is one."""
    if isinstance(part.source, sympy.exp):
        return np.clip(np.nan_to_num(inside), -500, 500)
    size = np.abs(inside)
    if isinstance(part.argument, _Affine):
        terms = abs(part.argument.matrix) @ np.abs(near) + np.abs(part.argument.constant)
        size = np.maximum(size, 1e-6 * terms)
    return np.where(np.isfinite(size) & (size > 0), size, 1.0)


def _ordered(root: _Part) -> list[_Part]:
    """All parts, inner ones first."""
    found: list[_Part] = []
    for child in root.children:
        found += _ordered(child)
    return [*found, root]


def _sign(matrix: sparse.csr_array) -> int:
    """1 or -1 where all entries have that sign (or are 0), else 0."""
    least, most = matrix.data.min(initial=0.0), matrix.data.max(initial=0.0)
    return 1 if least >= 0 else -1 if most <= 0 else 0


def _size(certificate: Certificate) -> float:
    figure = max(certificate.primal_residual, certificate.dual_residual, certificate.gap)
    return figure if np.isfinite(figure) and np.isfinite(certificate.objective) else np.inf
