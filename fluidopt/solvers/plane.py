"""The two polygons of the structured solver: cumulative sums along one sort, and a fleet's upper boundary.

`fluidopt.solvers.knapsack` says what they stand for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def bracket(passed: Callable[[float], bool], left: float, right: float, *grids: Array) -> tuple[float, float]:
    """Neighbouring points of the merged ``grids`` between which the monotone ``passed`` turns from False to True."""
    for grid in grids:
        first = int(np.searchsorted(grid, left, side="right"))
        last = int(np.searchsorted(grid, right, side="left"))
        at = bisect_left(range(first, last), True, key=lambda j: passed(float(grid[j])))
        left = float(grid[first + at - 1]) if at > 0 else left
        right = float(grid[first + at]) if first + at < last else right
    return left, right


def root(gap: Callable[[float], float], left: float, right: float, *grids: Array) -> tuple[float, float]:
    """Where ``gap``, linear between the points of ``grids``, falls below 0; and the last grid point before it."""
    left, right = bracket(lambda t: gap(t) < 0, left, right, *grids)
    ahead, behind = max(gap(left), 0.0), gap(right)
    return (left + (right - left) * (ahead / (ahead - behind)) if behind < 0 else right), left


# ---- the classes: Z -------------------------------------------------------------------------------------------------


class Fill:
    """Classes served one after the other by D/P: one boundary of the zonogon Z.

    Args:
        ratio: D/P in the order of service, shape (I,), monotone.
        weight: prompt tokens/s that each class adds when served in full, shape (I,).
    """

    def __init__(self, ratio: Array, weight: Array, *, falling: bool = False) -> None:
        self.ratio, self.weight, self.falling = ratio, weight, falling
        self.prefill = np.zeros(ratio.size + 1)
        np.cumsum(weight, out=self.prefill[1:])
        self.decode = np.zeros(ratio.size + 1)
        np.cumsum(weight * ratio, out=self.decode[1:])

    @classmethod
    def by_ratio(cls, ratio: Array, weight: Array) -> Fill:
        """The lower boundary of Z."""
        order = np.argsort(ratio)
        return cls(ratio[order], weight[order])

    def reversed(self) -> Fill:
        """The upper boundary of Z: the same classes in the opposite order, summed from their own end."""
        return Fill(self.ratio[::-1], self.weight[::-1], falling=not self.falling)

    @property
    def end(self) -> float:
        """Prompt tokens/s when all is served."""
        return float(self.prefill[-1])

    def slope_after(self, t: float) -> float:
        """D/P of the class served next when ``t`` prompt tokens/s are."""
        at = int(np.searchsorted(self.prefill, t, side="right")) - 1
        return float(self.ratio[min(max(at, 0), self.ratio.size - 1)])

    def _reached(self, t: float) -> int:
        """The class that is served when the sum reaches ``t`` prompt tokens/s."""
        return min(max(int(np.searchsorted(self.prefill, t)) - 1, 0), self.ratio.size - 1)

    def at(self, t: float) -> float:
        """Output tokens/s that come with the first ``t`` prompt tokens/s."""
        j = self._reached(t)
        return float(self.decode[j] + (t - self.prefill[j]) * self.ratio[j])

    def share(self, t: float, ratio: Array) -> Array | float:
        """Share of each class of the given ratios that is served, same shape; equal for equal ratios."""
        if t <= 0:
            return 0.0
        pivot = self.ratio[self._reached(t)]
        rising = -self.ratio if self.falling else self.ratio
        first, last = (
            float(self.prefill[np.searchsorted(rising, -pivot if self.falling else pivot, side=side)])
            for side in ("left", "right")
        )
        part = min(1.0, (t - first) / (last - first)) if last > first else 0.0
        served: Array = (ratio > pivot if self.falling else ratio < pivot).astype(float)
        served[ratio == pivot] = part
        return served


# ---- the fleet: Pi --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Frontier:
    """F, the upper boundary of Pi: concave, piecewise linear in prompt tokens/s."""

    prefill: Array
    """Break points, shape (E+1,), increasing."""
    decode: Array
    """Most output tokens/s at the break points, shape (E+1,)."""
    slope: Array
    """-F' on each edge, shape (E,), increasing."""
    first: Array
    """phi at the left end, shape (K,)."""
    moves: tuple[tuple[int, int, float], ...] = ()
    """Per edge: the mode that GPUs leave along it, the mode they enter, and the share of the fleet that moves."""
    cap: float = np.inf
    """Prompt tokens/s that a cap on the prefills in service leaves."""

    @property
    def end(self) -> float:
        """Most prompt tokens/s."""
        return min(float(self.prefill[-1]), self.cap)

    @property
    def peak(self) -> float:
        """Least prompt tokens/s at which F is largest."""
        return float(self.prefill[np.searchsorted(self.slope, 0.0)])

    @property
    def largest(self) -> float:
        """Largest value of F."""
        return self.at(min(self.peak, self.end))

    def at(self, t: float) -> float:
        """F(t)."""
        return float(np.interp(t, self.prefill, self.decode))

    def slope_before(self, t: float) -> float:
        """-F' to the left of ``t``."""
        return float(self.slope[max(int(np.searchsorted(self.prefill, t)) - 1, 0)])

    def slope_after(self, t: float) -> float:
        """-F' to the right of ``t``; inf at the right end."""
        at = int(np.searchsorted(self.prefill, t, side="right")) - 1
        return float(self.slope[at]) if at < self.slope.size else np.inf

    def minus(self, prefill: float, decode: float) -> Frontier:
        """What is left when ``prefill`` prompt and ``decode`` output tokens/s are spoken for."""
        return replace(self, prefill=self.prefill - prefill, decode=self.decode - decode, cap=self.cap - prefill)

    def flattened(self, top: float) -> Frontier:
        """The largest value of F over [t, ``top``] for t below ``top``, up to which F increases; no moves."""
        if top <= self.prefill[0]:
            return self
        height = self.at(top)
        # Where F still rises at `top` there is nothing to prefill beyond it.
        beyond = self.prefill > top if top >= self.peak else np.zeros(self.prefill.shape, bool)
        return Frontier(
            np.concatenate([[self.prefill[0], top], self.prefill[beyond]]),
            np.concatenate([[height, height], self.decode[beyond]]),
            np.concatenate([[0.0], self.slope[beyond[1:]]]),
            self.first,
            cap=self.cap,
        )

    def mode_share(self, t: float) -> Array:
        """phi, shape (K,), at ``t`` prompt tokens/s on the boundary."""
        phi = self.first.copy()
        for (out, into, amount), left, right in zip(self.moves, self.prefill[:-1], self.prefill[1:], strict=True):
            moved = amount * min(1.0, max(0.0, (t - left) / (right - left))) if right > left else 0.0
            phi[out] -= moved
            phi[into] += moved
        return phi


def upper_hull(x: Array, y: Array, members: NDArray[np.int64]) -> list[int]:
    """The members on the upper boundary of the convex hull of the points (x, y), from left to right."""
    hull: list[int] = []

    def hidden(a: int, b: int, c: int) -> bool:
        return bool((y[b] - y[a]) * (x[c] - x[a]) <= (y[c] - y[a]) * (x[b] - x[a]))

    for k in members[np.lexsort((y[members], x[members]))].tolist():
        while hull and (x[hull[-1]] == x[k] or (len(hull) > 1 and hidden(hull[-2], hull[-1], k))):
            hull.pop()
        hull.append(k)
    return hull
