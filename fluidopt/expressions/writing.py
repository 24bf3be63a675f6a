"""From expressions to text: text is returned only where reading it gives back the same expression."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import sympy
from sympy import Expr, Indexed, Rational, Sum, Symbol
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from fluidopt.algebra import relation_parts
from fluidopt.errors import InvalidInput
from fluidopt.expressions.reading import parse_condition, parse_expression, parse_relation
from fluidopt.expressions.vocabulary import ADMITTED, FUNCTIONS, Vocabulary, is_plain
from fluidopt.formulation import Symbols
from fluidopt.tables import shorten

_SIGNS: Mapping[type[Relational], str] = {
    sympy.Le: "<=",
    sympy.Ge: ">=",
    sympy.Eq: "==",
    sympy.Lt: "<",
    sympy.Gt: ">",
    sympy.Ne: "!=",
}
# How strongly an operator binds.
_SUM, _PRODUCT, _POWER = 1, 2, 3


def write_expression(expression: Expr, symbols: Symbols) -> str:
    """Write an expression as text that `parse_expression` reads back as the same expression.

    Raises:
        InvalidInput: where there is no such text (symbols of other models, functions that are not admitted).
    """
    text = _Writer(symbols).write(sympy.sympify(expression), 0)
    return _faithful(text, expression, partial(parse_expression, symbols=symbols))


def write_relation(relation: Relational, symbols: Symbols) -> str:
    """Write a row as text that `parse_relation` reads back as the same row.

    Raises:
        InvalidInput: as `write_expression`, and where ``relation`` is not a row.
    """
    relation_parts(relation)
    return _faithful(_related(relation, symbols), relation, partial(parse_relation, symbols=symbols))


def write_condition(condition: Boolean, symbols: Symbols) -> str:
    """Write a condition on parameters as text that `parse_condition` reads back as the same condition.

    Raises:
        InvalidInput: as `write_expression`, and where ``condition`` is not a single comparison.
    """
    if type(condition) not in _SIGNS:
        raise InvalidInput(f"a condition with a text form is a single comparison such as theta[i] > 0; got {condition}")
    return _faithful(_related(condition, symbols), condition, partial(parse_condition, symbols=symbols))


class _Writer:
    """Writes expressions with as few brackets as Python's precedence asks for."""

    def __init__(self, symbols: Symbols) -> None:
        self.vocabulary = Vocabulary.of(symbols)
        self.families = {each.quantity.symbol: each for each in self.vocabulary.families.values()}

    def write(self, expression: Expr, level: int) -> str:
        """The expression as text, in brackets where its outermost operator binds less than ``level``."""
        text, binding = self.written(expression)
        return text if binding >= level else f"({text})"

    def written(self, expression: Expr) -> tuple[str, int]:
        """The expression as text, and how strongly its outermost operator binds."""
        match expression:
            case sympy.Add():
                first, *others = (self.write(term, _PRODUCT) for term in expression.args)
                return first + "".join(f" - {each[1:]}" if each[0] == "-" else f" + {each}" for each in others), _SUM
            case sympy.Mul():
                return self.product(expression.args), _PRODUCT
            case sympy.Number():
                return self.number(expression)
            case sympy.Pow(args=(base, exponent)):
                return self.power(base, exponent)
            case Sum(function=function, limits=limits):
                text = self.write(function, 0)
                for symbol, *bounds in limits:
                    index = self.vocabulary.indices.get(str(symbol))
                    if index is None or bounds != [1, index.size]:
                        raise InvalidInput(f"{expression} does not run over a whole set, so it has no text form")
                    text = f"sum({text}, {symbol})"
                return text, _POWER + 1
            case Indexed():
                return self.member(expression), _POWER + 1
            case Symbol() if expression in self.vocabulary.scalars.values():
                return expression.name, _POWER + 1
            case sympy.E:
                return "exp(1)", _POWER + 1
        for name, function in FUNCTIONS.items():
            if name != "sqrt" and isinstance(expression, function):
                return f"{name}({', '.join(sorted(self.write(part, 0) for part in expression.args))})", _POWER + 1
        raise InvalidInput(f"{expression} has no text form: {ADMITTED}")

    def number(self, number: Expr) -> tuple[str, int]:
        if not is_plain(number):
            raise InvalidInput(
                f"{number} is not a number that a text form can hold; keep sizes within 1e-300 and 1e300"
            )
        text = str(number) if number.is_Rational else repr(float(number))
        return text, _POWER + 1 if text[0] != "-" and "/" not in text else _PRODUCT

    def product(self, factors: Sequence[Expr]) -> str:
        """Division by one factor at a time: brackets around several would let sympy multiply them out."""
        sign, above, below = "", list[str](), list[str]()
        for factor in factors:
            if factor.is_Number:
                text, _ = self.number(abs(factor))
                sign = "-" if factor.is_negative else ""
                top, _, bottom = text.partition("/")
                above += [top] if top != "1" else []
                below += [bottom] if bottom else []
            elif isinstance(factor, sympy.Pow) and factor.exp.is_Number and factor.exp.is_negative:
                below.append(self.write(factor.base**-factor.exp, _POWER))
            else:
                above.append(self.write(factor, _POWER))
        return sign + "/".join(["*".join(above) or "1", *below])

    def power(self, base: Expr, exponent: Expr) -> tuple[str, int]:
        if not exponent.is_Number:
            raise InvalidInput(f"{base**exponent} has no text form: an exponent is a number")
        if exponent.is_negative:
            return self.product([base**exponent]), _PRODUCT
        if exponent == Rational(1, 2):
            return f"sqrt({self.write(base, 0)})", _POWER + 1
        return f"{self.write(base, _POWER + 1)}**{self.write(exponent, _POWER + 1)}", _POWER

    def member(self, member: Indexed) -> str:
        family = self.families.get(member.base)
        if family is None:
            names = shorten([str(base) for base in self.families], most=20)
            raise InvalidInput(f"{member} is not a symbol that text can use; they are {names}")
        keys = [
            json.dumps(family.labels[index.name][int(key)], ensure_ascii=False) if key.is_Integer else str(key)
            for key, index in zip(member.indices, family.quantity.over, strict=True)
        ]
        return f"{family.quantity.name}[{', '.join(keys)}]"


def _related(relation: Relational, symbols: Symbols) -> str:
    write = _Writer(symbols).write
    return f"{write(relation.lhs, 0)} {_SIGNS[type(relation)]} {write(relation.rhs, 0)}"


def _faithful(text: str, original: sympy.Basic, read: Callable[[str], sympy.Basic]) -> str:
    """The text, once reading it has given back the original."""
    found = read(text)
    if found != original:
        raise InvalidInput(f"{original} has no text form: {text!r} would be read as {found}")
    return text
