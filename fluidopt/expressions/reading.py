"""From text to expressions.

Text is cut into the few tokens that are admitted, arranged by Python's own grammar (`ast`), and each node of the tree
is either one of those listed here or refused with its place.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
from sympy import Expr, Indexed, Integer, Rational, Sum, Symbol
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from fluidopt.algebra import Variable, base_of
from fluidopt.errors import InvalidInput
from fluidopt.expressions.vocabulary import (
    ADMITTED,
    FUNCTIONS,
    LARGEST_EXPONENT,
    MOST_ARGUMENTS,
    MOST_BITS,
    MOST_BITS_UNDER_ROOT,
    MOST_CHARACTERS,
    MOST_DEPTH,
    MOST_TOKENS,
    SMALLEST,
    Vocabulary,
    bits,
    is_plain,
)
from fluidopt.formulation import Family, Symbols

_ONE_ARGUMENT: Mapping[str, Callable[[float], float]] = {
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "abs": abs,
}
_RELATIONS: Mapping[type[ast.cmpop], Any] = {ast.LtE: sympy.Le, ast.GtE: sympy.Ge, ast.Eq: sympy.Eq}
_CONDITIONS: Mapping[type[ast.cmpop], Any] = {**_RELATIONS, ast.Lt: sympy.Lt, ast.Gt: sympy.Gt, ast.NotEq: sympy.Ne}
# What an expression may be made of; `Exp1` is exp(1).
_KINDS = (sympy.Add, sympy.Mul, sympy.Pow, Sum, Indexed, Symbol, sympy.exp, sympy.log, sympy.Abs, sympy.Max, sympy.Min)

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    |(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<label>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<sign>\*\*|<=|>=|==|!=|[-+*/()\[\],=<>])""",
    re.VERBOSE | re.DOTALL,
)
# Python reads `lambda` as a keyword. The tree is built from text in which it is written like this, which is as long and
# which no text can contain itself: it is not among the known names.
_LAMBDA = "LAMBDA"
_CHARACTERS = "allowed are numbers, names, labels in quotes and + - * / ** ( ) [ ] , <= >= =="
_WORDS: Mapping[type[ast.AST], str] = {
    ast.Compare: "a comparison",
    ast.Tuple: "a list of expressions",
    ast.List: "a list in square brackets",
    ast.Constant: "a number",
    ast.BinOp: "an expression",
    ast.UnaryOp: "an expression",
    ast.Call: "a function's value",
    ast.Subscript: "a member",
    ast.Starred: "a starred argument",
}


def parse_expression(text: str, symbols: Symbols) -> Expr:
    """Read an expression such as ``sum(w[i]*q_p[i], i)``.

    Args:
        text: numbers, ``+ - * / **`` (numeric exponents), parentheses, the model's symbols with index letters or
            quoted labels as subscripts, ``sum(..., k)`` over a set, and exp, log, sqrt, min, max, abs.
        symbols: of the model.

    Raises:
        InvalidInput: at the first thing that is none of these, with its column and what is allowed there.
    """
    reader = _Reader(text, symbols)
    return reader.expression(reader.tree(), 0)


def parse_relation(text: str, symbols: Symbols) -> Relational:
    """Read a row such as ``q_p[i] <= 2*lambda[i]``: two expressions with one of ``<= >= ==`` between them.

    Raises:
        InvalidInput: as `parse_expression`, and where the relation holds no variable.
    """
    reader = _Reader(text, symbols)
    relation = reader.relation(_RELATIONS, "a row is two expressions with one of <=, >=, == between them")
    difference = relation.lhs - relation.rhs
    if not any(base_of(member) in reader.variables for member in difference.atoms(Indexed, Symbol)):
        raise InvalidInput(f"{_brief(text)} holds no variable, so it limits nothing; {reader.allowed_names}")
    return relation


def parse_condition(text: str, symbols: Symbols) -> Boolean:
    """Read a condition on parameters such as ``theta[i] > 0``, which selects the members that a row is for.

    Raises:
        InvalidInput: as `parse_expression`, and where the condition holds a variable or no parameter at all.
    """
    reader = _Reader(text, symbols)
    condition = reader.relation(_CONDITIONS, "a condition is two expressions with one of <, <=, >, >=, ==, != between")
    members = condition.atoms(Indexed, Symbol)
    variables = sorted({str(base_of(member)) for member in members} & {str(base) for base in reader.variables})
    if variables:
        raise InvalidInput(f"{_brief(text)} is a condition on parameters, but {variables[0]} is a variable")
    if not any(isinstance(member, Indexed) or member in reader.vocabulary.scalars.values() for member in members):
        raise InvalidInput(f"{_brief(text)} holds no parameter, so it selects nothing; {reader.allowed_names}")
    return condition


class _Reader:
    """Reads one text: first its tokens, then the tree that Python's grammar makes of them."""

    def __init__(self, text: str, symbols: Symbols) -> None:
        if not isinstance(text, str):
            raise InvalidInput(f"expected text such as 'q_p[i] <= 2*lambda[i]'; got {_brief(text)}")
        self.text = text
        self.vocabulary = Vocabulary.of(symbols)
        self.labels: dict[int, str] = {}
        self.variables = frozenset(
            each.quantity.symbol for each in self.vocabulary.families.values() if isinstance(each.quantity, Variable)
        )

    @property
    def allowed_names(self) -> str:
        families = [
            f"{name}[{', '.join(str(index.symbol) for index in each.quantity.over)}]"
            for name, each in self.vocabulary.families.items()
        ]
        return f"the model's symbols are {', '.join([*families, *self.vocabulary.scalars])}"

    def refusal(self, at: ast.AST | int, found: str, allowed: str) -> InvalidInput:
        column = at if isinstance(at, int) else max(1, getattr(at, "col_offset", 1))
        return InvalidInput(f"{_brief(self.text, column)}, column {column}: {found}; {allowed}")

    # -- tokens

    def prepared(self) -> str:
        """The text as Python's parser gets it: known tokens only, of the same length, labels blanked out and kept."""
        text, parts, at, depth, tokens = self.text, list[str](), 0, 0, 0
        if len(text) > MOST_CHARACTERS:
            raise InvalidInput(
                f"{_brief(text)}: {len(text):,} characters; at most {MOST_CHARACTERS:,} are allowed, so write sums as "
                "sum(..., i) and rows for all members with a free index"
            )
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None:
                raise self.refusal(at + 1, f"found {_glyph(text[at])}", _CHARACTERS)
            kind, word, following = token.lastgroup, token.group(), text[token.end() : token.end() + 1]
            if kind == "space":
                word = " " * len(word)
            elif kind == "number":
                self.check_number(word, at + 1)
                if following and (following in "._\"'" or following.isalnum()):
                    raise self.refusal(at + 1, f"found {word + following!r}", "a number is followed by an operator")
            elif kind == "name":
                self.check_name(word, at + 1)
                if following and following in "\"'":
                    raise self.refusal(
                        at + 1, f"found {word + following}...", "a label is plain text in quotes: x['code', k]"
                    )
                word = _LAMBDA if word == "lambda" else word
            elif kind == "label":
                self.labels[at + 1] = self.label(word, at + 1)
                word = '"' + " " * (len(word) - 2) + '"'
            elif word in "([":
                depth += 1
            elif word in ")]":
                depth -= 1
            elif word == "=" and "".join(parts).rstrip()[-4:] != "over":
                raise self.refusal(at + 1, "found '='", "an equation is written with ==")
            if depth < 0:
                raise self.refusal(at + 1, f"found {word!r} that closes nothing", "every bracket needs its partner")
            if depth > MOST_DEPTH:
                raise self.refusal(at + 1, f"found {depth} nested brackets", f"at most {MOST_DEPTH} are allowed")
            tokens += kind != "space"
            if tokens > MOST_TOKENS:
                raise self.refusal(
                    at + 1, f"found more than {MOST_TOKENS:,} words and signs", "write sums as sum(..., i)"
                )
            parts.append(word)
            at = token.end()
        if not tokens:
            raise InvalidInput(f"{_brief(text)} is empty; write for instance 'q_p[i] <= 2*lambda[i]'")
        return "".join(parts)

    def check_number(self, word: str, column: int) -> None:
        value = float(word)
        lost = value < SMALLEST and re.search("[1-9]", re.split("[eE]", word)[0])
        if not math.isfinite(value) or lost or len(word) > MOST_BITS // 3:
            raise self.refusal(column, f"found {_brief(word)}", "a number lies between 1e-300 and 1e300 in size")

    def check_name(self, word: str, column: int) -> None:
        words = self.vocabulary.words
        if word not in words:
            near = difflib.get_close_matches(word, words, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise self.refusal(
                column,
                f"found the name {_brief(word)}",
                f"{hint}{self.allowed_names}; functions are sum, {', '.join(FUNCTIONS)}",
            )

    def label(self, word: str, column: int) -> str:
        body = word[1:-1]
        if word[0] == "'":
            body = re.sub(r"\\.|\"", lambda part: {r"\'": "'", '"': r"\""}.get(part.group(), part.group()), body)
        try:
            return str(json.loads(f'"{body}"', strict=False))
        except ValueError:
            allowed = r"""escapes in it are \" \' \\ \n \t \uXXXX"""
            raise self.refusal(column, f"found the label {_brief(word)}", allowed) from None

    # -- the tree

    def tree(self) -> ast.expr:
        # In brackets, so that line breaks and leading blanks mean nothing; columns then count from 1.
        prepared = f"({self.prepared()})"
        try:
            return ast.parse(prepared, mode="eval").body
        except SyntaxError as error:
            column = min(max(1, (error.offset or 1) - 1), len(self.text))
            advice = "check operators, commas and brackets near there"
            raise self.refusal(column, "this is not a complete expression", advice) from None
        except (ValueError, RecursionError, MemoryError):
            raise self.refusal(1, "this is too deeply nested to be read", "write sums as sum(..., i)") from None

    def relation(self, admitted: Mapping[type[ast.cmpop], Any], rule: str) -> Any:
        """The text as one comparison, unevaluated: sympy would make ``1 <= 2`` simply true."""
        tree = self.tree()
        if not isinstance(tree, ast.Compare):
            raise self.refusal(1, f"found {self.described(tree)} alone", rule)
        if len(tree.ops) > 1:
            raise self.refusal(tree.comparators[1], f"found {len(tree.ops)} comparisons", rule)
        if type(tree.ops[0]) not in admitted:
            raise self.refusal(tree.comparators[0], "found one of <, >, !=", rule)
        left, right = self.expression(tree.left, 0), self.expression(tree.comparators[0], 0)
        return admitted[type(tree.ops[0])](left, right, evaluate=False)

    def expression(self, node: ast.AST, depth: int) -> Expr:
        """The tree as a sympy expression; ``depth`` counts the levels above."""
        if depth > MOST_DEPTH:
            raise self.refusal(node, f"found more than {MOST_DEPTH} levels of nesting", "write it with fewer")
        deeper = depth + 1
        match node:
            case ast.BinOp(op=ast.Add() | ast.Sub()) | ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                terms = [sign * self.expression(term, deeper) for term, sign in _terms(node)]
                return self.checked(sympy.Add(*terms), node)
            case ast.BinOp(op=ast.Mult() | ast.Div()):
                factors = []
                for factor, inverted in _factors(node):
                    value = Integer(-1) if factor is None else self.expression(factor, deeper)
                    factors.append(self.power(value, Integer(-1), node) if inverted else value)
                return self.checked(sympy.Mul(*factors), node)
            case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
                return self.power(self.expression(base, deeper), self.expression(exponent, deeper), exponent)
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return self.checked(Integer(value) if isinstance(value, int) else sympy.Float(value), node)
            case ast.Name(id=name):
                return self.scalar(name, node)
            case ast.Subscript():
                return self.member(node)
            case ast.Call():
                return self.call(node, deeper)
        raise self.refusal(node, f"found {self.described(node)}", ADMITTED)

    def power(self, base: Expr, exponent: Expr, node: ast.AST) -> Expr:
        if not exponent.is_Number:
            raise self.refusal(node, f"found the exponent {exponent}", "an exponent is a number, such as 2 or (1/2)")
        if abs(float(exponent)) > LARGEST_EXPONENT:
            shown = _brief(str(exponent))
            raise self.refusal(node, f"found the exponent {shown}", f"it is at most {LARGEST_EXPONENT} in size")
        if not base.free_symbols:
            self.finite(lambda: _value(base) ** float(exponent), f"{base}**{exponent}", node)
        if not exponent.is_Integer and any(bits(number) > MOST_BITS_UNDER_ROOT for number in base.atoms(Rational)):
            raise self.refusal(
                node, f"found the root of a number of more than {MOST_BITS_UNDER_ROOT} bits", "write a decimal"
            )
        return self.checked(sympy.Pow(base, exponent), node)

    def scalar(self, name: str, node: ast.AST) -> Expr:
        family = self.family(name)
        if family is not None:
            over = ", ".join(str(index.symbol) for index in family.quantity.over)
            raise self.refusal(
                node, f"found {family.quantity.name} without subscripts", f"write {family.quantity.name}[{over}]"
            )
        if name in self.vocabulary.indices:
            raise self.refusal(
                node, f"found the index {name} as a number", f"it stands in subscripts and in sum(..., {name})"
            )
        if name not in self.vocabulary.scalars:
            raise self.refusal(node, f"found {name!r} without arguments", f"it is a function; {ADMITTED}")
        return self.vocabulary.scalars[name]

    def family(self, name: str) -> Family | None:
        return self.vocabulary.families.get("lambda" if name in (_LAMBDA, "lambda_") else name)

    def member(self, node: ast.Subscript) -> Expr:
        family = self.family(node.value.id) if isinstance(node.value, ast.Name) else None
        if family is None:
            raise self.refusal(node, f"found subscripts of {self.described(node.value)}", self.allowed_names)
        entries = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        keys = tuple(self.subscript(entry) for entry in entries)
        try:
            return family[keys]
        except InvalidInput as error:
            raise self.refusal(node, str(error), "a subscript is an index letter or a quoted label") from None

    def subscript(self, node: ast.expr) -> Symbol | str:
        if isinstance(node, ast.Name) and node.id in self.vocabulary.indices:
            return self.vocabulary.indices[node.id].symbol
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.labels[node.col_offset]
        letters = ", ".join(self.vocabulary.indices)
        raise self.refusal(node, f"found {self.described(node)} as a subscript", f"write {letters} or a quoted label")

    def call(self, node: ast.Call, depth: int) -> Expr:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name == "sum":
            return self.sum(node, depth)
        if name is None or name not in FUNCTIONS:
            raise self.refusal(
                node, f"found a call of {self.described(node.func)}", f"functions are sum, {', '.join(FUNCTIONS)}"
            )
        if node.keywords:
            raise self.refusal(node, f"found {node.keywords[0].arg!r} given by name", f"{name} takes plain arguments")
        least, most = (1, 1) if name in _ONE_ARGUMENT else (2, MOST_ARGUMENTS)
        if not least <= len(node.args) <= most:
            wanted = "one argument" if most == 1 else f"2 to {MOST_ARGUMENTS} arguments"
            raise self.refusal(node, f"found {len(node.args)} arguments of {name}", f"it takes {wanted}")
        arguments = [self.expression(argument, depth) for argument in node.args]
        if name in _ONE_ARGUMENT and not arguments[0].free_symbols:
            self.finite(lambda: _ONE_ARGUMENT[name](_value(arguments[0])), f"{name}({arguments[0]})", node)
        if name == "sqrt":
            return self.power(arguments[0], Rational(1, 2), node)
        try:
            made = FUNCTIONS[name](*arguments)
        except (TypeError, ValueError):  # of sympy, where arguments cannot be compared
            raise self.refusal(
                node, f"found {name} of something without an order", "every value must be real"
            ) from None
        self.checked(made, node)
        if not all(isinstance(part, _KINDS) or not part.args for part in _parts(made)):
            raise self.refusal(
                node, f"found {name} of something it is not defined for here", "write it without that function"
            )
        return made

    def sum(self, node: ast.Call, depth: int) -> Expr:
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        usage = f"write sum(..., k) or sum(..., over=k) with one of {', '.join(self.vocabulary.indices)}"
        if len(node.args) + len(node.keywords) != 2 or not node.args or set(given) - {"over"}:
            raise self.refusal(node, "found a sum without exactly one expression and one index", usage)
        over = given.get("over", node.args[-1])
        if not isinstance(over, ast.Name) or over.id not in self.vocabulary.indices:
            raise self.refusal(over, f"found a sum over {self.described(over)}", usage)
        index = self.vocabulary.indices[over.id]
        inner = self.expression(node.args[0], depth)
        if inner.is_zero:
            return inner  # a sum of nothing, by which nothing may be divided
        summed = any(index.symbol == symbol for total in inner.atoms(Sum) for symbol, *_ in total.limits)
        if summed and index.symbol not in inner.free_symbols:
            raise self.refusal(node, f"found a second sum over {over.id} of the same terms", "leave one of them out")
        return self.checked(index.sum(inner), node)

    # -- what must hold of every part

    def checked(self, expression: Expr, node: ast.AST) -> Expr:
        for atom in expression.atoms():
            if atom.is_Number and not atom.is_Symbol:
                if not is_plain(atom):
                    raise self.refusal(
                        node, "found a number too large, too small or too long", "keep sizes within 1e-300 and 1e300"
                    )
            elif atom in (sympy.zoo, sympy.I):
                raise self.refusal(
                    node, "found a division by 0 or a root of a negative number", "every value must be real"
                )
        return expression

    def finite(self, value: Callable[[], Any], shown: str, node: ast.AST) -> None:
        """Refuse what has no finite real value, before sympy is asked to make it."""
        try:
            result = value()
            if not isinstance(result, complex) and math.isfinite(result):
                return
        except (ArithmeticError, ValueError):
            pass
        raise self.refusal(
            node, f"{_brief(shown)} has no finite real value", "every value must be real and below 1e300"
        )

    def described(self, node: ast.AST) -> str:
        """A node in the user's words."""
        if isinstance(node, ast.Name):
            return repr("lambda" if node.id == _LAMBDA else node.id)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return f"the label {_brief(self.labels.get(node.col_offset, ''))}"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
            return "the operator //"
        return _WORDS.get(type(node), "something else")


def _terms(node: ast.AST) -> Iterator[tuple[ast.AST, int]]:
    """The terms of a sum with their signs; without recursion, for long sums nest deeply to the left."""
    waiting = [(node, 1)]
    while waiting:
        node, sign = waiting.pop()
        match node:
            case ast.BinOp(op=ast.Add() | ast.Sub() as op, left=left, right=right):
                waiting += [(right, -sign if isinstance(op, ast.Sub) else sign), (left, sign)]
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                waiting.append((operand, -sign if isinstance(op, ast.USub) else sign))
            case _:
                yield node, sign


def _factors(node: ast.AST) -> Iterator[tuple[ast.AST | None, bool]]:
    """The factors of a product and whether each divides; None stands for -1."""
    waiting: list[tuple[ast.AST, bool]] = [(node, False)]
    while waiting:
        node, inverted = waiting.pop()
        match node:
            case ast.BinOp(op=ast.Mult() | ast.Div() as op, left=left, right=right) if not inverted:
                waiting += [(right, isinstance(op, ast.Div)), (left, False)]
            case ast.UnaryOp(op=ast.USub() as op, operand=operand) if not inverted:
                yield None, False
                waiting.append((operand, False))
            case _:
                yield node, inverted


def _parts(expression: sympy.Basic) -> Iterator[sympy.Basic]:
    """The nodes of an expression, without what only names things (bases and limits)."""
    yield expression
    if isinstance(expression, Sum):
        yield from _parts(expression.function)
    elif not isinstance(expression, Indexed):
        for part in expression.args:
            yield from _parts(part)


def _value(expression: Expr) -> float:
    """The value of a constant expression in floating point."""
    if expression.is_Number:
        return float(expression)
    values = [_value(part) for part in expression.args]
    match expression:
        case sympy.Add():
            return math.fsum(values)
        case sympy.Mul():
            return math.prod(values)
        case sympy.Pow():
            return float(values[0] ** values[1])
        case sympy.exp() | sympy.E:
            return math.exp(*values or [1.0])
        case sympy.log():
            return math.log(*values)
        case sympy.Abs():
            return abs(*values)
        case sympy.Max():
            return max(values)
        case sympy.Min():
            return min(values)
    raise ValueError(expression)


def _glyph(character: str) -> str:
    shown = repr(character)
    return shown if character.isascii() else f"{shown} (U+{ord(character):04X})"


def _brief(value: object, column: int = 1, most: int = 120) -> str:
    """The value as Python writes it; of a long text, what stands around ``column``."""
    if not isinstance(value, str):
        return repr(value)[:most]
    if len(value) <= most:
        return repr(value)
    start = max(0, min(column - most // 2, len(value) - most))
    return ("..." if start else "") + repr(value[start : start + most]) + ("..." if start + most < len(value) else "")
