"""Optimization models in symbols: index sets, parameters, variables and one template per family of rows.

Nothing here knows about LLMs and nothing holds numbers: a `SymbolicProgram` is the formulation that prints as LaTeX,
has a dual, and is lowered to sparse arrays by `fluidopt.program.lower` once numbers are given. A template is written
once over free indices (``x[i, k]``), whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import sympy
from sympy import Expr, Indexed, IndexedBase, Integer, Sum, Symbol
from sympy.core.relational import GreaterThan, LessThan, Relational
from sympy.printing.latex import LatexPrinter
from sympy.printing.str import StrPrinter

from fluidopt.errors import InvalidInput

Sense = Literal["<=", "==", ">="]
FLIPPED: Mapping[str, Sense] = {"<=": ">=", ">=": "<=", "==": "=="}


@dataclass(frozen=True)
class IndexSet:
    """A set that templates run over, such as the workload classes."""

    name: str
    symbol: Symbol
    size: Symbol
    """The symbol that stands for the number of members."""

    def sum(self, expression: Expr) -> Expr:
        """Sum ``expression`` over the set."""
        return Sum(expression, (self.symbol, 1, self.size))


@dataclass(frozen=True)
class Parameter:
    """A given quantity: a number per member of the sets in ``over``, or one number where ``over`` is empty."""

    symbol: IndexedBase | Symbol
    over: tuple[IndexSet, ...]
    unit: str
    meaning: str
    definition: Expr | None = None
    """In terms of other parameters, over the sets' own symbols; None where the numbers are given."""

    @cached_property
    def name(self) -> str:
        """Name in the model's symbols."""
        return str(self.symbol)


@dataclass(frozen=True)
class Variable:
    """A nonnegative quantity to be chosen, one per member of the sets in ``over`` for which ``exists`` holds."""

    symbol: IndexedBase | Symbol
    over: tuple[IndexSet, ...]
    unit: str
    meaning: str
    exists: sympy.Basic = sympy.true
    absent: str | None = None
    """Why a member without the variable has no value; None where it is simply 0 there."""

    @cached_property
    def name(self) -> str:
        """Name in the model's symbols."""
        return str(self.symbol)

    @property
    def indexed(self) -> Expr:
        """The variable at the sets' own symbols."""
        return self.symbol[tuple(index.symbol for index in self.over)] if self.over else self.symbol


@dataclass(frozen=True)
class RowFamily:
    """One template of rows, ``left sense right``, for every member of its free indices for which ``where`` holds."""

    name: str
    left: Expr
    sense: Sense
    right: Expr
    over: tuple[IndexSet, ...]
    where: sympy.Basic = sympy.true
    meaning: str = ""
    """The row in words, used in the list of binding constraints."""
    dual: str = ""
    """Symbol of its shadow price."""
    dual_unit: str = ""

    @cached_property
    def difference(self) -> Expr:
        """Left side less right side."""
        return self.left - self.right

    def sentence(self, labels: Mapping[str, str]) -> str:
        """The row in words, with the labels of its members put in (``{class}`` becomes the class's name)."""
        words = self.meaning or self.name
        for index, label in labels.items():
            words = words.replace(f"{{{index}}}", label)
        return words

    @property
    def dual_symbol(self) -> Expr:
        """The shadow price at the sets' own symbols."""
        if not self.over:
            return Symbol(self.dual or self.name)
        return IndexedBase(self.dual or self.name)[tuple(index.symbol for index in self.over)]


@dataclass(frozen=True)
class Term:
    """``coefficient * variable`` summed over ``bound``; a constant where ``variable`` is None."""

    coefficient: Expr
    variable: Expr | None
    """A member of a family (`Indexed`) or a variable without indices (`Symbol`)."""
    bound: tuple[Symbol, ...]


@dataclass(frozen=True)
class SymbolicProgram:
    """``max objective`` subject to rows, variables nonnegative. Prints as LaTeX in a notebook."""

    index_sets: tuple[IndexSet, ...]
    parameters: tuple[Parameter, ...]
    variables: tuple[Variable, ...]
    objective: Expr
    constraints: tuple[RowFamily, ...]
    title: str = ""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    """Names of the members of each set, for printing only."""

    def with_row(self, row: RowFamily) -> SymbolicProgram:
        """Add a family of rows; its name must be new."""
        if any(row.name == other.name for other in self.constraints):
            raise InvalidInput(f"subject_to: a row named {row.name!r} exists already; give another name")
        return replace(self, constraints=(*self.constraints, row))

    @cached_property
    def index_of(self) -> Mapping[Symbol, IndexSet]:
        """The index set of each index symbol."""
        return {index.symbol: index for index in self.index_sets}

    @cached_property
    def bases(self) -> frozenset[Expr]:
        """The symbols of the variables."""
        return frozenset(variable.symbol for variable in self.variables)

    def variable_of(self, member: Expr) -> Variable:
        """The variable that ``member`` is a member of."""
        return next(variable for variable in self.variables if variable.symbol == base_of(member))

    def free_indices(self, *expressions: Expr) -> tuple[IndexSet, ...]:
        """The index sets that appear free (not summed) in ``expressions``, in the program's order."""
        free: set[Any] = set().union(*(expression.free_symbols for expression in expressions))
        return tuple(index for index in self.index_sets if index.symbol in free)

    def check(self, expression: object, caller: str) -> Expr:
        """Return ``expression`` if it is one in this program's symbols, with sums over whole sets only."""
        if not isinstance(expression, Expr):
            raise InvalidInput(f"{caller}: expected an expression in the model's symbols; got {expression!r}")
        if expression.has(sympy.I, sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
            raise InvalidInput(f"{caller}: every number must be real and finite; got {expression}")
        for total in expression.atoms(Sum):
            for symbol, *limits in total.limits:
                index = self.index_of.get(symbol)
                if index is None or limits != [1, index.size]:
                    raise InvalidInput(f"{caller}: {total} does not run over a whole set; use symbols.sum(..., over=i)")
        return expression

    def terms(self, expression: Expr) -> tuple[Term, ...]:
        """Take a linear expression apart.

        Raises:
            InvalidInput: where the expression is not linear in the variables, with the factor that is not.
        """
        return linear_terms(expression, self.bases)

    def dual(self) -> SymbolicProgram:
        """The linear program dual to this one, in the same parameters: ``min right' duals``.

        Signs: the dual of a ``<=`` row is >= 0, of a ``>=`` row <= 0, of an ``==`` row free. It is
        d(maximum)/d(right side).
        """
        rows = []
        for variable in self.variables:
            column = sum((part for row in self.constraints for part in self._column(row, variable)), Integer(0))
            cost = sum(
                (self._match(term, variable, ()) for term in self.terms(self.objective) if _is(term, variable)),
                Integer(0),
            )
            rows.append(
                RowFamily(
                    variable.name,
                    column,
                    ">=",
                    cost,
                    variable.over,
                    where=variable.exists,
                    dual=variable.name,
                )
            )
        value = sum(
            (
                _summed(self._right(row) * row.dual_symbol, row.over)
                for row in self.constraints
                if self._right(row) != 0
            ),
            Integer(0),
        )
        duals = tuple(
            Variable(
                symbol=IndexedBase(row.dual or row.name),
                over=row.over,
                unit=row.dual_unit,
                meaning=f"shadow price of {row.name} ({_SIGNS[row.sense]})",
                exists=row.where,
            )
            for row in self.constraints
        )
        return replace(
            self,
            variables=duals,
            objective=value,
            constraints=tuple(rows),
            title="Dual: minimise",
            labels=self.labels,
        )

    def kkt(self) -> tuple[Relational, ...]:
        """Complementary slackness: one equation per inequality row and per variable, over free indices."""
        slack = tuple(
            sympy.Eq(row.dual_symbol * (row.right - row.left), 0) for row in self.constraints if row.sense != "=="
        )
        reduced = tuple(
            sympy.Eq(variable.indexed * (row.left - row.right), 0)
            for variable, row in zip(self.variables, self.dual().constraints, strict=True)
        )
        return slack + reduced

    def _right(self, row: RowFamily) -> Expr:
        """What is left on the right side once all variables are on the left."""
        constants = (term for term in self.terms(row.difference) if term.variable is None)
        return sum((-_rebuilt(term, self.index_of) for term in constants), Integer(0))

    def _column(self, row: RowFamily, variable: Variable) -> Iterator[Expr]:
        """Coefficient times dual of every place where ``variable`` stands in ``row``, as a column of the matrix."""
        for term in self.terms(row.difference):
            if _is(term, variable):
                yield self._match(term, variable, row.over, times=row.dual_symbol)

    def _match(self, term: Term, variable: Variable, over: tuple[IndexSet, ...], times: Expr = sympy.S.One) -> Expr:
        """Rewrite ``term`` in the variable's own symbols, summing over row indices the variable does not have."""
        assert term.variable is not None
        renamed, fixed = {}, []
        indices = indices_of(term.variable)
        for index, symbol in zip(indices, (each.symbol for each in variable.over), strict=True):
            if isinstance(index, Symbol):
                renamed[index] = symbol
            else:
                fixed.append(sympy.Eq(symbol, index))
        product = (term.coefficient * times).xreplace(renamed)
        left_over = tuple(index for index in over if index.symbol not in indices)
        product = _summed(product, left_over)
        return sympy.Piecewise((product, sympy.And(*fixed)), (0, True)) if fixed else product

    def latex(self) -> str:
        """The program as a LaTeX ``aligned`` block."""
        goal = r"\min" if self.title.startswith("Dual") else r"\max"
        show = Printer(self).doprint
        sense = {"<=": r"\le", ">=": r"\ge", "==": "="}
        lines = [rf"{goal}\quad & {show(self.objective)} && \\"]
        for position, row in enumerate(self.constraints):
            lead = r"\text{s.t.}\quad" if position == 0 else ""
            scope = self._scope(row)
            note = rf"\text{{{escaped(row.name.replace('_', ' '))}}}" + (
                rf"\ ({show(row.dual_symbol)})" if row.dual else ""
            )
            lines.append(rf"{lead} & {show(row.left)} {sense[row.sense]} {show(row.right)} && {scope} \quad {note} \\")
        names = ",\\ ".join(show(variable.symbol) for variable in self.variables)
        if not self.title.startswith("Dual"):
            lines.append(rf"& {names} \ge 0 &&")
        return "\\begin{aligned}\n" + "\n".join(lines) + "\n\\end{aligned}"

    def _scope(self, row: RowFamily) -> str:
        if not row.over:
            return ""
        scope = r"\forall " + ", ".join(sympy.latex(index.symbol) for index in row.over)
        return scope if row.where == sympy.true else scope + ": " + Printer(self).doprint(row.where)

    def _repr_latex_(self) -> str:
        return "$\\displaystyle " + self.latex() + "$"

    def __str__(self) -> str:
        show = sympy.sstr
        lines = [("min  " if self.title.startswith("Dual") else "max  ") + show(self.objective), "s.t."]
        lines += [f"  {row.name}: {show(row.left)} {row.sense} {show(row.right)}" for row in self.constraints]
        return "\n".join(lines)

    __repr__ = __str__


_SIGNS = {"<=": ">= 0", ">=": "<= 0", "==": "free"}


@lru_cache(maxsize=512)
def linear_terms(expression: Expr, bases: frozenset[Expr]) -> tuple[Term, ...]:
    """Split ``expression`` into constants and multiples of members of ``bases`` (see `SymbolicProgram.terms`)."""
    return tuple(_terms(sympy.sympify(expression), bases, Integer(1), (), frozenset(expression.free_symbols)))


def _terms(
    expression: Expr, bases: frozenset[Expr], factor: Expr, bound: tuple[Symbol, ...], taken: frozenset[Expr]
) -> Iterator[Term]:
    if not uses(expression, bases):
        while isinstance(expression, Sum):
            expression, factor, bound = _enter(expression, factor, bound, taken)
        yield Term(factor * expression, None, bound)
    elif isinstance(expression, Indexed) or expression in bases:
        yield Term(factor, expression, bound)
    elif isinstance(expression, sympy.Add):
        for part in expression.args:
            yield from _terms(part, bases, factor, bound, taken)
    elif isinstance(expression, sympy.Mul):
        with_variables = [part for part in expression.args if uses(part, bases)]
        if len(with_variables) > 1:
            raise InvalidInput(f"{expression} multiplies variables with each other, so it is not linear")
        others = sympy.Mul(*(part for part in expression.args if part is not with_variables[0]))
        yield from _terms(with_variables[0], bases, factor * others, bound, taken)
    elif isinstance(expression, Sum):
        inner, factor, bound = _enter(expression, factor, bound, taken)
        yield from _terms(inner, bases, factor, bound, taken)
    else:
        raise InvalidInput(f"{expression} is not linear in the variables")


def _enter(
    expression: Sum, factor: Expr, bound: tuple[Symbol, ...], taken: frozenset[Expr]
) -> tuple[Expr, Expr, tuple[Symbol, ...]]:
    """Step into a sum, renaming its index where that letter is taken outside."""
    inner = expression.function
    for symbol, *_ in expression.limits:
        fresh = primed(symbol, taken | factor.free_symbols | set(bound))
        inner = inner.xreplace({symbol: fresh})
        bound = (*bound, fresh)
    return inner, factor, bound


def uses(expression: Expr, bases: Collection[Expr]) -> bool:
    """Whether a symbol of ``bases``, indexed or not, occurs in ``expression``."""
    return any(base_of(member) in bases for member in expression.atoms(Indexed, Symbol))


def base_of(member: Expr) -> Expr:
    """The family that a member belongs to; a symbol without indices is its own."""
    return member.base if isinstance(member, Indexed) else member


def indices_of(member: Expr) -> tuple[Expr, ...]:
    """The indices of a member; none for a symbol without indices."""
    return tuple(member.indices) if isinstance(member, Indexed) else ()


def _is(term: Term, variable: Variable) -> bool:
    return term.variable is not None and base_of(term.variable) == variable.symbol


def _summed(expression: Expr, over: tuple[IndexSet, ...]) -> Expr:
    for index in reversed(over):
        expression = index.sum(expression)
    return expression


def _rebuilt(term: Term, index_of: Mapping[Symbol, IndexSet]) -> Expr:
    """A constant term with its sums put back."""
    expression = term.coefficient
    for symbol in reversed(term.bound):
        expression = Sum(expression, (symbol, 1, index_of[unprimed(symbol)].size))
    return expression


def primed(symbol: Symbol, taken: Collection[Expr]) -> Symbol:
    """The index symbol itself, or with as many primes as it takes to be new."""
    while symbol in taken:
        symbol = Symbol(symbol.name + "'", integer=True)
    return symbol


def unprimed(symbol: Symbol) -> Symbol:
    """The index symbol that a renamed one (it carries primes) stands for."""
    return Symbol(symbol.name.rstrip("'"), integer=True)


def relation_parts(relation: object) -> tuple[Expr, Sense, Expr]:
    """Take ``left <= right``, ``left >= right`` or ``Eq(left, right)`` apart.

    Raises:
        InvalidInput: where it is something else, or strict (``<``, ``>``), which no optimum attains.
    """
    if isinstance(relation, LessThan):
        return relation.lhs, "<=", relation.rhs
    if isinstance(relation, GreaterThan):
        return relation.lhs, ">=", relation.rhs
    if isinstance(relation, sympy.Eq):
        return relation.lhs, "==", relation.rhs
    if isinstance(relation, Relational):
        raise InvalidInput(f"subject_to: {relation} is strict or an inequation; use <=, >= or sympy.Eq")
    raise InvalidInput(
        f"subject_to: expected a relation in the model's symbols such as symbols.q_p[symbols.i] <= 2; got {relation!r}"
    )


def escaped(text: str) -> str:
    """A label as LaTeX text."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


_ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    letter: "\\" + letter for letter in "&%$#_{}"
}


class PlainPrinter(StrPrinter):  # type: ignore[misc]
    """Plain text with members by their label and numbers as short as they are exact."""

    printmethod = "_fluidopt_text"  # not sympy's own, by which a member would print itself

    def __init__(self, program: SymbolicProgram) -> None:
        super().__init__()
        self.program = program

    def _print_Float(self, expression: sympy.Float) -> str:
        return repr(float(expression))

    def _print_Indexed(self, expression: Indexed) -> str:
        return f"{expression.base}[{', '.join(index_texts(self.program, expression, self._print))}]"


def index_texts(program: SymbolicProgram, expression: Indexed, show: Callable[[Expr], str]) -> list[str]:
    """Each index as text: the label of a fixed member, else the letter."""
    quantities: tuple[Variable | Parameter, ...] = (*program.variables, *program.parameters)
    kind = next((each for each in quantities if each.symbol == expression.base), None)
    return [
        program.labels[kind.over[at].name][int(index)]
        if isinstance(index, Integer) and kind is not None and kind.over[at].name in program.labels
        else show(index)
        for at, index in enumerate(expression.indices)
    ]


class Printer(LatexPrinter):  # type: ignore[misc]
    """LaTeX that reads like the model's page: sums over a set by its letter, members by their label."""

    def __init__(self, program: SymbolicProgram) -> None:
        super().__init__()
        self.program = program

    def _print_Sum(self, expression: Sum) -> str:
        letters = ",".join(self._print(symbol) for symbol, *_ in expression.limits)
        inner = expression.function
        member = [part for part in inner.args if isinstance(part, Indexed) and str(part.base) == "member"]
        if isinstance(inner, sympy.Mul) and member:
            inner = sympy.Mul(*(part for part in inner.args if part not in member))
            of, what = (self._print(index) for index in member[0].indices)
            letters = rf"{what} \in {of}" if letters == what else rf"{of} \ni {what}"
        body = self._print(inner)
        if isinstance(inner, sympy.Add):
            body = rf"\left({body}\right)"
        return rf"\sum_{{{letters}}} {body}"

    def _print_Mul(self, expression: Expr) -> str:
        """Parameters before variables, as one writes them."""
        top, bottom = sympy.fraction(expression)
        if bottom != 1 or not isinstance(top, sympy.Mul) or any(isinstance(part, sympy.Add) for part in top.args):
            return str(super()._print_Mul(expression))
        names = {each.symbol for each in self.program.variables}
        if top.args[0] == -1:
            return f"- {self._print(-top)}"
        return " ".join(self._print(part) for part in sorted(top.args, key=lambda part: (uses(part, names), str(part))))

    def _print_Symbol(self, expression: Symbol, style: str = "plain") -> str:
        name = expression.name
        return (
            rf"\mathrm{{{name}}}"
            if len(name) > 1 and name == "share"
            else str(super()._print_Symbol(expression, style))
        )

    def _print_Indexed(self, expression: Indexed) -> str:
        stem, _, mark = str(expression.base).partition("_")
        texts = index_texts(self.program, expression, self._print)
        indices = [
            text if isinstance(index, Symbol) else rf"\text{{{escaped(text)}}}"
            for index, text in zip(expression.indices, texts, strict=True)
        ]
        return rf"{self._print(Symbol(stem))}_{{{','.join([mark, *indices] if mark else indices)}}}"

    def _print_IndexedBase(self, expression: IndexedBase) -> str:
        stem, _, mark = str(expression).partition("_")
        return f"{self._print(Symbol(stem))}" + (f"_{{{mark}}}" if mark else "")
