"""What text may hold: names and what they stand for, functions, and limits on length, depth and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy import Expr, Symbol

from fluidopt.algebra import IndexSet
from fluidopt.formulation import CLASSES, MODES, PARAMETERS, TYPES, Family, Symbols

# Limits that no row a person writes comes near, and below which nothing here takes longer than about a second.
MOST_CHARACTERS = 20_000
MOST_TOKENS = 2_000
MOST_DEPTH = 40
MOST_ARGUMENTS = 20
LARGEST_EXPONENT = 100
MOST_BITS = 1_024
SMALLEST = 1e-300
MOST_BITS_UNDER_ROOT = 64

ADMITTED = "allowed are numbers, + - * / **, the model's symbols, sum(..., k), exp, log, sqrt, min, max, abs"
FUNCTIONS: Mapping[str, Any] = {
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
    "min": sympy.Min,
    "max": sympy.Max,
    "abs": sympy.Abs,
}
_INDICES: Mapping[str, IndexSet] = {index.symbol.name: index for index in (CLASSES, MODES, TYPES)}
_SCALARS: Mapping[str, Symbol] = {each.name: each.symbol for each in PARAMETERS if not each.over}


@dataclass(frozen=True)
class Vocabulary:
    """The names that text may use, and what they stand for."""

    families: Mapping[str, Family]
    indices: Mapping[str, IndexSet]
    scalars: Mapping[str, Symbol]

    @classmethod
    def of(cls, symbols: Symbols) -> Vocabulary:
        """The names of one model, whose labels its families know."""
        families = {each.quantity.name: each for each in vars(symbols).values() if isinstance(each, Family)}
        return cls(families, _INDICES, _SCALARS)

    @property
    def words(self) -> list[str]:
        """Every name that may stand in text, as it is spelt there."""
        return [*self.families, *self.scalars, *self.indices, "lambda_", "sum", "over", *FUNCTIONS]


def is_plain(number: Expr) -> bool:
    """Whether a number is finite and within the limits on size and length, so that text can hold it."""
    if number.is_Rational and bits(number) > MOST_BITS:
        return False  # before it is made a float, for which it may be too large
    return number == 0 or SMALLEST <= abs(float(number)) < math.inf


def bits(number: Expr) -> int:
    """Length of a rational number: the bits of its numerator and denominator."""
    return int(number.p).bit_length() + int(number.q).bit_length()
