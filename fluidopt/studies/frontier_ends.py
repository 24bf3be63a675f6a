"""This module owns the ends of a frontier: where a bound begins to be feasible, and where it begins to cost nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluidopt.errors import InfeasibleModel
from fluidopt.explain import BOUNDS
from fluidopt.program import Array
from fluidopt.solvers.along import NO_PLAN, ProgramsAlong
from fluidopt.studies.sensitivity.parameters import ModelParameter

# Ends and kinks are found to this share of the range; prices, and revenues, that differ by less than SAME are equal.
FINE, SAME = 1e-10, 1e-9
# So much tighter than the tightest bound no solver, with its tolerance, finds a plan.
BEYOND = 1e-7
# Steps of Newton's method to the tightest bound; it takes two to five.
MOST_STEPS = 12
# Where a default range ends is worth this share of it.
NEAR = 1e-3
# Where ends are looked for if no range is given: every bound of interest lies in it, in its own unit.
DECADES = np.logspace(-6, 7, 14)
MARGIN = 0.15


def loosens(field: str) -> int:
    """1 where a larger bound promises less, -1 where it promises more."""
    return 1 if BOUNDS[field](0.5, 0.25) > 0.5 else -1


class Ends:
    """Where one bound begins to be feasible, and where it begins to cost nothing; the others as loose as can be."""

    def __init__(self, programs: ProgramsAlong, k: int, parameters: Sequence[ModelParameter]) -> None:
        self.programs, self.k, self.loosens = programs, k, loosens(parameters[k].field)
        self.loosest = np.array([DECADES[-1] if loosens(each.field) > 0 else 0.0 for each in parameters])
        self.largest = 1.0 if parameters[k].unit == "1" else float("inf")
        order = np.concatenate([[0.0], DECADES])
        self.trials = order if self.loosens > 0 else order[::-1]
        """Bounds, from the tightest on."""
        self.objective, self.basis = np.full(len(order), np.nan), np.full(len(order), NO_PLAN)
        for place in range(len(order) - 1, -1, -1):
            solved = programs.solve(self.at(self.trials[[place]]))
            self.objective[place], self.basis[place] = solved.objective[0], solved.basis[0]
            if solved.basis[0] == NO_PLAN:  # nor is there one for anything tighter
                break

    def at(self, bounds: Array) -> Array:
        """Points of the programs with these bounds, shape (N, K)."""
        points = np.tile(self.loosest, (len(bounds), 1))
        points[:, self.k] = bounds
        return points

    def tightest(self, name: str) -> float:
        """The tightest feasible bound.

        Raises:
            InfeasibleModel: there is none.
        """
        if np.isnan(self.objective).all():
            raise InfeasibleModel(f"frontier: the other rows leave no plan, whatever the bound of {name}")
        at = int(np.argmax(~np.isnan(self.objective)))
        outside, inside = float(self.trials[max(at - 1, 0)]), float(self.trials[at])
        if at == 0:
            return inside
        tightest = self._tightened(outside, inside)
        if tightest is not None and np.isnan(self._earned(tightest - self.loosens * self._fine(tightest, BEYOND))):
            return tightest
        return self._halved(outside, inside, -np.inf)

    def _tightened(self, outside: float, inside: float) -> float | None:
        """The tightest bound by Newton's method (Dinkelbach, 1967); None where it says nothing.

        Of all values the roomiest keep the bound longest while it is tightened; where no values have room, it is tight.
        """
        for _ in range(MOST_STEPS):
            found = self.programs.roomiest(self.at(np.array([inside]))[0], self.k)
            if found is None:
                return None
            values, room = found
            fine = self._fine(inside)
            if room <= fine:
                return inside
            share = 0.1 * fine / abs(outside - inside)
            last, _ = self.programs.kept(values, *self.at(np.array([inside, outside])), fine=share)
            inside += (last - 5 * share) * (outside - inside)
        return None

    @staticmethod
    def _fine(bound: float, share: float = FINE) -> float:
        """A small share of a bound: how close ends are found."""
        return share * max(abs(bound), float(DECADES[1]))

    def range(self, tightest: float) -> tuple[float, float]:
        """From the tightest bound to somewhat beyond the first that costs nothing."""
        free = self._free(tightest)
        beyond = free + self.loosens * (MARGIN * abs(free - tightest) or abs(free) or 1.0)
        low, high = sorted((tightest, beyond))
        return max(low, 0.0), min(high, self.largest)

    def _free(self, tightest: float) -> float:
        """The first bound, from the tightest on, that costs nothing; near that, where the optimum has other bases than
        the one at the loosest bound, which is followed to where it ends."""
        best = float(np.nanmax(self.objective))
        enough = best - SAME * abs(best)
        if self._earned(tightest) >= enough:
            return tightest
        at = int(np.argmax(self.objective >= enough))
        free, basis = float(self.trials[at]), int(self.basis[at])
        fine = self._fine(free) / abs(free - tightest)
        last, _ = self.programs.reach(basis, *self.at(np.array([free, tightest])), fine=fine)
        free += last * (tightest - free)
        nearer = free + NEAR * (tightest - free)
        return self._halved(tightest, nearer, enough, NEAR) if self._earned(nearer) >= enough else free

    def _earned(self, bound: float) -> float:
        """The objective at a bound; NaN where there is no plan."""
        return float(self.programs.solve(self.at(np.array([bound]))).objective[0])

    def _halved(self, outside: float, inside: float, enough: float, near: float = 0.0) -> float:
        """The first bound after ``outside`` that earns ``enough``, to `FINE` or to ``near`` of its way from there."""
        start = outside
        while abs(inside - outside) > max(self._fine(inside), near * abs(inside - start)):
            middle = 0.5 * (inside + outside)
            inside, outside = (middle, outside) if self._earned(middle) >= enough else (inside, middle)
        return inside
