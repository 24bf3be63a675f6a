"""A symbolic program as MathML, which browsers draw by themselves: for pages and notebooks that run no script."""

from __future__ import annotations

from html import escape
from typing import Any

import sympy
from sympy import Expr, Indexed, Integer, Sum, Symbol
from sympy.printing.mathml import MathMLPresentationPrinter

from fluidopt.algebra import Parameter, RowFamily, SymbolicProgram, Variable, index_texts, uses

# As LaTeX draws the two; sympy's own printer does not tell them apart.
_LETTERS = {"phi": "\u03d5", "varphi": "\u03c6"}
_SENSES = {"<=": "≤", ">=": "≥", "==": "="}


def formula_rows(program: SymbolicProgram) -> list[tuple[str, str, str]]:
    """The objective, then each family of rows: name, formula, and the members it holds for, as HTML."""
    show = Presentation(program).inline
    goal = "minimise" if program.title.startswith("Dual") else "maximise"
    return [(goal, show(program.objective), "")] + [
        (
            escape(row.name.replace("_", " ")) + (f" ({show(row.dual_symbol)})" if row.dual else ""),
            show(row.left, row.sense, row.right),
            _scope(program, row),
        )
        for row in program.constraints
    ]


def symbol_rows(program: SymbolicProgram) -> list[tuple[str, str, str]]:
    """Every variable, then every parameter: the symbol, what it means, and its unit, as HTML."""
    quantities: tuple[Variable | Parameter, ...] = (*program.variables, *program.parameters)
    show = Presentation(program).inline
    return [
        (
            show(each.symbol[tuple(index.symbol for index in each.over)] if each.over else each.symbol),
            escape(each.meaning),
            escape(each.unit),
        )
        for each in quantities
    ]


def _scope(program: SymbolicProgram, row: RowFamily) -> str:
    show = Presentation(program).inline
    letters = ", ".join(show(index.symbol) for index in row.over)
    if not letters or row.where == sympy.true:
        return letters and f"each {letters}"
    return f"each {letters} with {show(row.where)}"


class Presentation(MathMLPresentationPrinter):  # type: ignore[misc]
    """MathML that reads as the LaTeX of `SymbolicProgram.latex` does: sums by their letter, members by their label."""

    def __init__(self, program: SymbolicProgram) -> None:
        super().__init__()
        self.program = program

    def inline(self, left: Any, sense: str | None = None, right: Any = 0) -> str:
        """An expression, or a relation of two, as a ``math`` element."""
        relation = f"<mo>{_SENSES[sense]}</mo>{self.doprint(right)}" if sense else ""
        return f"<math><mrow>{self.doprint(left)}{relation}</mrow></math>"

    def _tagged(self, tag: str, *children: Any) -> Any:
        node = self.dom.createElement(tag)
        for child in children:
            node.appendChild(self.dom.createTextNode(child) if isinstance(child, str) else child)
        return node

    def _listed(self, parts: list[Any]) -> Any:
        """Parts in a row with commas between them."""
        between = [part for each in parts for part in (self._tagged("mo", ","), each)]
        return self._tagged("mrow", *between[1:])

    def _print_Symbol(self, expression: Symbol, style: str = "plain") -> Any:
        letter = _LETTERS.get(expression.name)
        return self._tagged("mi", letter) if letter else super()._print_Symbol(expression, style)

    def _print_Indexed(self, expression: Indexed) -> Any:
        stem, _, mark = str(expression.base).partition("_")
        texts = index_texts(self.program, expression, str)
        indices = [
            self._print(index) if isinstance(index, Symbol) else self._tagged("mtext", text)
            for index, text in zip(expression.indices, texts, strict=True)
        ]
        marks = [self._tagged("mi", mark)] if mark else []
        return self._tagged("msub", self._print(Symbol(stem)), self._listed([*marks, *indices]))

    def _print_Sum(self, expression: Sum) -> Any:
        inner, letters = expression.function, self._listed([self._print(symbol) for symbol, *_ in expression.limits])
        member = [part for part in inner.args if isinstance(part, Indexed) and str(part.base) == "member"]
        if isinstance(inner, sympy.Mul) and member:
            inner = sympy.Mul(*(part for part in inner.args if part not in member))
            of, what = member[0].indices
            over_types = expression.limits[0][0] == of
            first, sign, last = (of, "∋", what) if over_types else (what, "∈", of)
            letters = self._tagged("mrow", self._print(first), self._tagged("mo", sign), self._print(last))
        body = self._print(inner)
        if isinstance(inner, sympy.Add):
            body = self._tagged("mrow", self._tagged("mo", "("), body, self._tagged("mo", ")"))
        return self._tagged("mrow", self._tagged("munder", self._tagged("mo", "∑"), letters), body)

    def _print_Mul(self, expression: Expr) -> Any:
        """Parameters before variables, as one writes them."""
        top, bottom = sympy.fraction(expression)
        if bottom != 1 or not isinstance(top, sympy.Mul) or any(isinstance(part, sympy.Add) for part in top.args):
            return super()._print_Mul(expression)
        if top.args[0] == Integer(-1):
            return self._tagged("mrow", self._tagged("mo", "-"), self._print(-top))
        names = {each.symbol for each in self.program.variables}
        parts = sorted(top.args, key=lambda part: (uses(part, names), str(part)))
        return self._tagged("mrow", *(self._print(part) for part in parts))
