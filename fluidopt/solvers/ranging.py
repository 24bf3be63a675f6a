"""How far each right side may move before its shadow price changes, and what the price is beyond."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from fluidopt.program import Array, LinearProgram
from fluidopt.solvers import highs
from fluidopt.solvers.scaling import scale

# A step beyond the end of a range, and a change of price that counts, both relative.
STEP = 1e-6
SAME = 1e-7
MOST_HOPS = 200


@dataclass(frozen=True)
class PriceRange:
    """Where one shadow price holds: right sides from ``lower`` to ``upper``, all else equal (absolute values)."""

    row: str
    price: float
    """Shadow price inside the range, d(maximum)/d(right side)."""
    right_side: float
    """The present right side."""
    lower: float
    """Least right side with this price; -inf where it holds all the way down."""
    upper: float
    """Largest right side with this price; inf where it holds all the way up."""
    price_below: float
    """The price just below ``lower``; NaN where there is nothing below, or no solution."""
    price_above: float
    """The price just above ``upper``; NaN where there is nothing above, or no solution."""

    @property
    def at_kink(self) -> bool:
        """Whether the present right side is an end of the range, so that the price holds to one side only."""
        return self.lower >= self.right_side or self.upper <= self.right_side


def price_ranges(program: LinearProgram, duals: Array, rows: Iterable[int]) -> list[PriceRange]:
    """The range of each of ``rows``, by simplex from basis to basis as long as the price stays ``duals[row]``.

    HiGHS's ranging gives where a basis ends; the price may go on beyond it, so each end is stepped over and ranged
    again until the price really changes or no solution is left.
    """
    scaled, scaling = scale(program)
    walker = _Walker(scaled, scaling.rows / scaling.amount, scaling.rows * scaling.money)
    return [walker.range(program, row, float(duals[row])) for row in rows]


class _Walker:
    def __init__(self, scaled: LinearProgram, factor: Array, money: Array) -> None:
        self.factor, self.money = factor, money
        self.lower, self.upper = scaled.row_lower, scaled.row_upper
        self.highs = highs.new_highs(scaled)
        self.highs.setOptionValue("solver", "simplex")
        highs.run(self.highs)
        self.basis: Any = self.highs.getBasis()
        weight = abs(scaled.matrix).max(axis=1).toarray().ravel() if scaled.matrix.nnz else np.zeros(scaled.shape[0])
        self.weight = np.maximum(weight * np.abs(np.array(self.highs.getSolution().col_value)).max(initial=0.0), 1e-9)

    def range(self, program: LinearProgram, row: int, price: float) -> PriceRange:
        """The range around the present right side of one row, in the program's own units."""
        upper, lower = program.row_upper[row], program.row_lower[row]
        present = float(upper if np.isfinite(upper) else lower)
        low, below = self.walk(row, price, -1)
        high, above = self.walk(row, price, +1)
        return PriceRange(program.row_names[row], price, present, low, high, below, above)

    def walk(self, row: int, price: float, direction: int) -> tuple[float, float]:
        """The end of the price's range in one direction, and the price beyond."""
        side = float(self.upper[row] if np.isfinite(self.upper[row]) else self.lower[row])
        end = side
        step = STEP * max(abs(side), float(self.weight[row]))
        self.highs.setBasis(self.basis)
        beyond = float("nan")
        for _ in range(MOST_HOPS):
            found = self.at(row, end + direction * step)
            if found is None:
                break
            beyond, reach = found
            if abs(beyond - price) > SAME * (abs(beyond) + abs(price)) + 1e-12:
                break
            beyond = float("nan")
            new_end = reach[0] if direction < 0 else reach[1]
            if abs(new_end) >= highspy.kHighsInf / 2:
                end = direction * float("inf")
                break
            end = max(end + step, new_end) if direction > 0 else min(end - step, new_end)
        self.move(row, side)
        return end / float(self.factor[row]), beyond

    def at(self, row: int, value: float) -> tuple[float, tuple[float, float]] | None:
        """Price and basis range of the row with its right side moved to ``value``; None where there is no solution."""
        self.move(row, value)
        highs.run(self.highs)
        if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        price = float(self.highs.getSolution().row_dual[row]) * float(self.money[row])
        _, ranging = self.highs.getRanging()
        return price, (float(ranging.row_bound_dn.value_[row]), float(ranging.row_bound_up.value_[row]))

    def move(self, row: int, value: float) -> None:
        self.highs.changeRowBounds(
            row,
            value if np.isfinite(self.lower[row]) else -highspy.kHighsInf,
            value if np.isfinite(self.upper[row]) else highspy.kHighsInf,
        )
