"""A concave objective as a small graph of vectorised parts: linear ones, combinations, curves, minima and maxima.

Nothing here solves or certifies: `fluidopt.solvers.concave` reads values and tangents off the graph, `concave_cvxpy`
its cvxpy expressions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from scipy import sparse
from sympy import Expr, Symbol

from fluidopt.algebra import PlainPrinter, SymbolicProgram, base_of, primed
from fluidopt.errors import InvalidInput
from fluidopt.program import Array, Lowering

Indices = NDArray[np.int64]


def is_linear(program: SymbolicProgram) -> bool:
    """Whether the objective is linear in the variables, so that the program is a linear program."""
    try:
        program.terms(program.objective)
    except InvalidInput:
        return False
    return True


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the objective, for the chosen members of a grid: a vector of N values."""

    source: Expr
    """What it is in the model's symbols."""
    axes: tuple[Symbol, ...]
    members: Indices
    """Shape (N,): places of the members on the grid over ``axes``, flattened."""

    @property
    def children(self) -> Sequence[Part]:
        """The parts it is made of."""
        return ()


@dataclass(frozen=True, eq=False)
class Affine(Part):
    """``matrix @ x + constant``."""

    matrix: sparse.csr_array
    constant: Array


@dataclass(frozen=True, eq=False)
class Combination(Part):
    """The sum of ``matrix @ part``."""

    terms: tuple[tuple[sparse.csr_array, Part], ...]

    @property
    def children(self) -> Sequence[Part]:
        """The parts inside."""
        return [part for _, part in self.terms]


@dataclass(frozen=True, eq=False)
class Curve(Part):
    """One function of one part: exp, log, or a power (``exponent``)."""

    argument: Part
    exponent: float | None = None

    @property
    def children(self) -> Sequence[Part]:
        """The parts inside."""
        return [self.argument]

    @cached_property
    def functions(self) -> tuple[Callable[[Any], Any], ...]:
        """The function, its derivative and its second derivative, on arrays."""
        kind: Any = type(self.source) if self.exponent is None else self.exponent
        return _compiled(kind)

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
class Extreme(Part):
    """The largest or the least of several parts."""

    parts: tuple[Part, ...]
    largest: bool

    @property
    def children(self) -> Sequence[Part]:
        """The parts inside."""
        return self.parts


@lru_cache(maxsize=256)
def _compiled(kind: Any) -> tuple[Callable[[Any], Any], ...]:
    """A function of one variable and its derivatives, by sympy; ``kind`` is exp, log or an exponent."""
    u = Symbol("u", real=True)
    function = u ** (int(kind) if kind == int(kind) else sympy.Float(kind)) if isinstance(kind, float) else kind(u)
    return tuple(sympy.lambdify([u], function.diff(u, order), "numpy") for order in range(3))


class Graph:
    """Takes an objective apart, with the numbers of a model."""

    def __init__(self, lowering: Lowering, bounds: Array) -> None:
        self.lowering = lowering
        self.bounds = bounds
        self.program = lowering.program
        self.show = PlainPrinter(lowering.program).doprint
        self.columns = bounds.size

    def refusal(self, reason: str) -> InvalidInput:
        """The error for an objective that cannot be solved, with the reason."""
        return InvalidInput(f"maximize: the objective is not concave, or not seen to be: {reason}")

    def uses(self, expression: Expr) -> bool:
        """Whether a variable stands in it."""
        return any(base_of(each) in self.program.bases for each in expression.atoms(sympy.Indexed, Symbol))

    def size(self, axes: tuple[Symbol, ...]) -> tuple[int, ...]:
        """Members along each axis."""
        return tuple(self.lowering.size(self.lowering.index_of(symbol)) for symbol in axes)

    def numbers(self, expression: Expr, axes: tuple[Symbol, ...], members: Indices) -> Array:
        """Values of an expression in parameters."""
        with np.errstate(all="ignore"):
            grid = np.broadcast_to(self.lowering.evaluate(expression, axes), self.size(axes))
        values: Array = np.asarray(grid, dtype=float).ravel()[members]
        if not np.isfinite(values).all():
            raise InvalidInput(f"maximize: {self.show(expression)} in the objective is not a finite number everywhere")
        return values

    def part(self, expression: Expr, axes: tuple[Symbol, ...], members: Indices) -> Part:
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
                return Combination(*place, ((group, self.part(function, inner, below)),))
            case sympy.Pow(args=(base, exponent)):
                return self.power(expression, base, exponent, axes, members)
            case sympy.exp(args=(argument,)) | sympy.log(args=(argument,)):
                return Curve(*place, self.part(argument, axes, members))
            case sympy.Max(args=arguments) | sympy.Min(args=arguments):
                parts = tuple(self.part(each, axes, members) for each in arguments)
                return Extreme(*place, parts, isinstance(expression, sympy.Max))
            case sympy.Abs(args=(argument,)):
                parts = tuple(self.part(each, axes, members) for each in (argument, -argument))
                return Extreme(*place, parts, largest=True)
        raise self.refusal(
            f"{self.show(expression)} is not one of the functions understood here: sums, powers with a number as "
            "exponent, exp, log, min, max, abs"
        )

    def affine(self, expression: Expr, axes: tuple[Symbol, ...], members: Indices) -> Affine:
        """A linear part: the matrix of its members over the columns, and its constants."""
        row_of = np.full(int(np.prod(self.size(axes))), -1)
        row_of[members] = np.arange(members.size)
        constant = np.zeros(members.size)
        entries: list[tuple[Indices, Indices, Array]] = []
        for term in self.program.terms(expression):
            inner = axes + term.bound
            shape = self.size(inner)
            with np.errstate(all="ignore"):
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
            return Affine(expression, axes, members, sparse.csr_array(shape), constant)
        rows, columns, values = (np.concatenate(each) for each in zip(*entries, strict=True))
        if not (np.isfinite(values).all() and np.isfinite(constant).all()):
            raise InvalidInput(f"maximize: a coefficient in {self.show(expression)} is not a finite number everywhere")
        matrix = sparse.coo_array((values, (rows, columns)), shape=shape).tocsr()
        return Affine(expression, axes, members, matrix, constant)

    def sum(self, expression: Expr, terms: Sequence[Expr], axes: tuple[Symbol, ...], members: Indices) -> Part:
        """A sum: what is linear in it together, every other term by itself."""
        linear = [term for term in terms if is_linear(replace(self.program, objective=term))]
        curved = [term for term in terms if term not in linear]
        parts = [self.part(term, axes, members) for term in curved]
        parts += [self.affine(sympy.Add(*linear), axes, members)] if linear else []
        same = sparse.eye_array(members.size, format="csr")
        return Combination(expression, axes, members, tuple((same, part) for part in parts))

    def place(self, part: Part, at: int) -> str:
        """`` for class 'code'``: the member at a place of a part."""
        sets = [self.lowering.index_of(symbol) for symbol in part.axes]
        places = np.unravel_index(int(part.members[at]), self.size(part.axes)) if sets else ()
        labels = [
            f"{index.name} {self.lowering.numbers.labels[index.name][int(each)]!r}"
            for index, each in zip(sets, places, strict=True)
        ]
        return f" for {', '.join(labels)}" if labels else ""

    def product(self, expression: Expr, factors: Sequence[Expr], axes: tuple[Symbol, ...], members: Indices) -> Part:
        """A product: one factor may have variables in it."""
        curved = [factor for factor in factors if self.uses(factor)]
        if len(curved) > 1:
            raise self.refusal(
                f"{self.show(sympy.Mul(*curved))} multiplies or divides variables by each other, which the composition "
                "rules cannot place (the log of a product is a sum of logs; a ratio x/(1 + x) is 1 - 1/(1 + x))"
            )
        weight = self.numbers(sympy.Mul(*(factor for factor in factors if factor is not curved[0])), axes, members)
        # Members without weight are left out, so that 0*log(0) is 0.
        kept = np.flatnonzero(weight)
        matrix = sparse.csr_array((weight[kept], (kept, np.arange(kept.size))), shape=(members.size, kept.size))
        return Combination(expression, axes, members, ((matrix, self.part(curved[0], axes, members[kept])),))

    def power(self, expression: Expr, base: Expr, exponent: Expr, axes: tuple[Symbol, ...], members: Indices) -> Part:
        """A power: of a constant, or of one part with a constant exponent."""
        if self.uses(exponent):
            raise self.refusal(f"{self.show(expression)} has a variable in its exponent; only exp(...) may")
        values = np.unique(self.numbers(exponent, axes, members))
        if values.size > 1:
            raise self.refusal(f"the exponent in {self.show(expression)} differs between members; use one number")
        number = float(values[0]) if values.size else 1.0
        if number in (0.0, 1.0):
            return self.part(base if number else sympy.S.One, axes, members)
        inner = self.part(base, axes, members)
        if 0 < number < 1 and isinstance(inner, Affine):
            # Roots of what is 0 in every plan are 0; their slope there, which is infinite, means nothing.
            with np.errstate(invalid="ignore"):
                used = np.flatnonzero(inner.constant + inner.matrix.maximum(0) @ self.bounds > 0)
            if 0 < used.size < members.size:
                matrix = sparse.csr_array(
                    (np.ones(used.size), (used, np.arange(used.size))), shape=(members.size, used.size)
                )
                rest = self.power(expression, base, exponent, axes, members[used])
                return Combination(expression, axes, members, ((matrix, rest),))
        return Curve(expression, axes, members, inner, number)
