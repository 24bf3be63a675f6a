"""The optimum as an exact function of one parameter: its pieces and its kinks, no grid.

With a basis held, the optimum is a *branch*: ``c_B(p) A_B(p)^-1 b(p)``. Where two optima lie on different branches,
these meet somewhere between; there the optimum is either on both, and they meet in a kink, or on a third one, and the
search goes on to both sides. Where p moves only right sides or only prices, branches are straight lines and the optimum
is concave or convex, so that a line which touches it at two points is the optimum between them: nothing can be missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.polynomial import Chebyshev
from numpy.typing import ArrayLike
from scipy import optimize, sparse
from scipy.sparse import linalg

from fluidopt.algebra import SymbolicProgram
from fluidopt.errors import InfeasibleModel, InvalidInput, SolverFailure
from fluidopt.program import Array, LinearProgram, Lowering, Numbers
from fluidopt.solvers import Solution, certify, held, highs
from fluidopt.solvers.bases import members
from fluidopt.solvers.scaling import scale
from fluidopt.studies.sensitivity.parameters import ModelParameter, checked_model, find_parameters, in_symbols
from fluidopt.studies.sensitivity.tangent import tangent
from fluidopt.tables import number, text
from fluidopt.views import card, html, paragraph, sketch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fluidopt.model import FluidModel

Shape = Literal["constant", "concave, piecewise linear", "convex, piecewise linear", "piecewise smooth"]

# Two values of the optimum are the same value, relative to the largest on the curve.
SAME = 1e-9
# Two slopes are the same slope, relative to their size; a kink is a larger step. Below a share of the largest slope on
# the curve there is none.
KINK, NO_SLOPE = 1e-6, 1e-8
# A breakpoint is known to this share of the interval.
CLOSE = 1e-12
# An optimum below this share of the largest price is 0.
EARNS_NOTHING = 1e-6
# Of the polynomial that stands for a smooth piece, and what it must meet halfway between its nodes.
DEGREES, FIT = (4, 8, 16, 32), 1e-11
# Places inside a smooth piece at which it is compared with the optimum.
CHECKS = 16
MOST_POINTS = 20_000


@dataclass(frozen=True)
class Piece:
    """One piece of the curve, on which the optimum is a smooth function of the parameter."""

    lower: float
    upper: float
    coefficients: tuple[float, ...]
    """Of its Chebyshev series on [lower, upper]; two where it is a straight line."""

    @property
    def linear(self) -> bool:
        """Whether it is a straight line."""
        return len(self.coefficients) <= 2

    @cached_property
    def series(self) -> Chebyshev:
        """The function on the piece."""
        return Chebyshev(np.array(self.coefficients), domain=[self.lower, self.upper])

    def slope(self, at: float) -> float:
        """Its derivative."""
        return float(self.series.deriv()(at))


@dataclass(frozen=True)
class Kink:
    """Where the curve bends."""

    at: float
    value: float
    """The optimum there."""
    left: float
    """The derivative just below."""
    right: float
    """The derivative just above."""


@dataclass(frozen=True)
class SensitivityCurve:
    """The optimum as a function of one parameter between two values of it, all else equal.

    The optimum is that of the model's objective: the revenue rate, money/s per GPU, less penalties of service levels.
    """

    parameter: str
    unit: str
    present: float
    """The model's own value (1 for a factor on all classes)."""
    shape: Shape
    """What the curve is by theory; says how it was found."""
    pieces: tuple[Piece, ...]
    solves: int
    """Linear programs that were solved."""

    @property
    def lower(self) -> float:
        """The least value of the parameter."""
        return self.pieces[0].lower

    @property
    def upper(self) -> float:
        """The largest value of the parameter."""
        return self.pieces[-1].upper

    def revenue_rate(self, at: ArrayLike) -> Array:
        """The optimum, money/s per GPU, at these values of the parameter; the shape is that of ``at``.

        Raises:
            InvalidInput: a value outside the curve.
        """
        places = self._checked(at)
        return self._evaluated(places, self._piece_of(places), [piece.series for piece in self.pieces])

    def derivative(self, at: ArrayLike) -> Array:
        """d(optimum)/d(parameter); at a kink, the derivative to the right.

        Raises:
            InvalidInput: a value outside the curve.
        """
        places = self._checked(at)
        return self._evaluated(places, self._piece_of(places), [piece.series.deriv() for piece in self.pieces])

    @cached_property
    def kinks(self) -> tuple[Kink, ...]:
        """Where the derivative jumps, in order."""
        largest = max(abs(piece.slope(end)) for piece in self.pieces for end in (piece.lower, piece.upper))
        found = []
        for before, after in pairwise(self.pieces):
            slopes = before.slope(before.upper), after.slope(after.lower)
            left, right = (slope if abs(slope) > NO_SLOPE * largest else 0.0 for slope in slopes)
            if abs(right - left) > KINK * (abs(left) + abs(right)) + NO_SLOPE * largest:
                found.append(Kink(before.upper, float(after.series(after.lower)), left, right))
        return tuple(found)

    def to_frame(self) -> pd.DataFrame:
        """A row per piece: its ends, the optimum and its derivative there, and whether it is a straight line."""
        import pandas as pd

        rows = [
            {
                "lower": each.lower,
                "upper": each.upper,
                "revenue_at_lower": float(each.series(each.lower)),
                "revenue_at_upper": float(each.series(each.upper)),
                "derivative_at_lower": each.slope(each.lower),
                "derivative_at_upper": each.slope(each.upper),
                "linear": each.linear,
            }
            for each in self.pieces
        ]
        return pd.DataFrame(rows, index=pd.RangeIndex(len(rows), name="piece"))

    @property
    def statement(self) -> str:
        """What the curve is and where it bends, in words."""
        where = ", ".join(number(each.at) for each in self.kinks[:8])
        more = f" and {len(self.kinks) - 8} more" if len(self.kinks) > 8 else ""
        bends = f"bends at {where}{more}" if self.kinks else "has no kink"
        start, end = (float(self.revenue_rate(at)) for at in (self.lower, self.upper))
        return (
            f"From {self.parameter} = {number(self.lower)} to {number(self.upper)} {self.unit} the optimum goes from "
            f"{number(start)} to {number(end)} money/s per GPU. It is {self.shape} and {bends}."
        )

    @property
    def caption(self) -> str:
        """How sure the pieces are, in words."""
        if self.shape != "piecewise smooth":
            return f"{self.solves} linear programs; exact, as the shape leaves no room for another piece."
        return (
            f"{self.solves} linear programs; each piece was compared with the optimum at {CHECKS} places inside. A "
            "piece that begins and ends between two of them would be missed."
        )

    def plot(self) -> Figure:
        """The curve with its kinks, and its derivative below."""
        from fluidopt.studies.sensitivity.figures import plot_curve

        return plot_curve(self)

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON-able data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SensitivityCurve:
        """Read a curve back."""
        try:
            pieces = tuple(
                Piece(float(each["lower"]), float(each["upper"]), tuple(map(float, each["coefficients"])))
                for each in data["pieces"]
            )
            return cls(**{**data, "pieces": pieces})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"not a saved sensitivity curve: {error!r}") from None

    def __str__(self) -> str:
        return "\n".join([self.statement, "", text(self.to_frame()), "", self.caption])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        units = {"lower": self.unit, "upper": self.unit}
        units |= dict.fromkeys(("revenue_at_lower", "revenue_at_upper"), "money/s per GPU")
        units |= dict.fromkeys(("derivative_at_lower", "derivative_at_upper"), f"money/s per GPU and {self.unit}")
        at = np.linspace(self.lower, self.upper, 81)
        return card(
            f"The optimum over {self.parameter}",
            sketch({"R*": (at, self.revenue_rate(at))}, across=f"{self.parameter}, {self.unit}", up="money/s per GPU"),
            paragraph(self.statement),
            html(self.to_frame(), title="Pieces", units=units),
            paragraph(self.caption, muted=True),
        )

    def _checked(self, at: ArrayLike) -> Array:
        try:
            places = np.asarray(at, dtype=float)
            inside = bool(np.all((places >= self.lower) & (places <= self.upper)))
        except (TypeError, ValueError):
            inside = False
        if not inside:
            raise InvalidInput(
                f"SensitivityCurve: values of {self.parameter} must be numbers from {self.lower:g} to {self.upper:g}, "
                f"where the curve was made; got {at!r}"
            )
        return places

    def _piece_of(self, places: Array) -> Any:
        starts = np.array([piece.lower for piece in self.pieces])
        return np.clip(np.searchsorted(starts, places, side="right") - 1, 0, len(self.pieces) - 1)

    @staticmethod
    def _evaluated(places: Array, pieces: Any, functions: list[Chebyshev]) -> Array:
        result = np.empty(places.shape)
        for at, function in enumerate(functions):
            result[pieces == at] = function(places[pieces == at])
        return result


def sensitivity_curve(model: FluidModel, parameter: str, *, lower: float, upper: float) -> SensitivityCurve:
    """The optimum as an exact function of one parameter between two values.

    Piecewise linear, and then exact with certainty, in arrival rates and in bounds that stand alone on a right side
    (concave), and in prices (convex). Piecewise smooth in all else: lengths, iteration times, B and C (which may be
    fractions on the curve; at whole numbers it is the model's optimum). A smooth piece is kept as a Chebyshev series.
    Costs two to four linear programs per linear piece, and twenty to forty per smooth one.

    Args:
        model: a linear model.
        parameter: its name, as in `Sensitivity`; a class field without a class is a factor on all of them.
        lower, upper: the interval.

    Raises:
        InvalidInput: no such parameter, an interval that is none, or a model that is not linear.
        InfeasibleModel: no plan at some value in the interval.
        SolverFailure: no certified answer.
    """
    (chosen,) = find_parameters(checked_model(model, "sensitivity_curve"), [parameter], "sensitivity_curve")
    ends = [chosen.check(end, "sensitivity_curve") for end in (lower, upper)]
    if not ends[0] < ends[1]:
        raise InvalidInput(f"sensitivity_curve: lower must be below upper; got {lower!r} and {upper!r}")
    if chosen.field == "abandonment_rate" and (ends[0] == 0 or _any_patient(chosen)):
        raise InvalidInput(
            "sensitivity_curve: abandonment rates must stay above 0: a class that never gives up is another model"
        )
    search = _Search(chosen, ends[0], ends[1])
    pieces = tuple(search.pieces())
    return SensitivityCurve(chosen.name, chosen.unit, chosen.value, search.shape, pieces, search.solves)


def _any_patient(parameter: ModelParameter) -> bool:
    classes = parameter.model.scenario.classes
    return any(classes[at].abandonment_rate == 0 for at in parameter.members)


# ---- the search ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Branch:
    """A basis: its columns, and its tight rows with the side that they are tight on."""

    columns: Any
    rows: Any
    at_lower: Any

    @classmethod
    def of(cls, basis: Any) -> _Branch:
        return cls(*members(basis))

    def value(self, program: LinearProgram) -> float:
        """What the basis is worth in a program; NaN where it is none there."""
        right = np.where(self.at_lower, program.row_lower[self.rows], program.row_upper[self.rows])
        square = program.matrix[:, self.columns].tocsr()[self.rows]
        if square.shape[0] != square.shape[1]:
            return math.nan
        try:
            values = linalg.splu(sparse.csc_array(square)).solve(right)
        except RuntimeError:  # singular
            return math.nan
        return float(program.objective[self.columns] @ values)


@dataclass(frozen=True)
class _Point:
    """The optimum at one value of the parameter."""

    at: float
    value: float
    branch: _Branch
    program: LinearProgram


_Span = tuple[_Point, _Point, _Branch]


class _Search:
    """The pieces of one curve."""

    def __init__(self, parameter: ModelParameter, lower: float, upper: float) -> None:
        self.parameter, self.lower, self.upper = parameter, lower, upper
        program, numbers = in_symbols(parameter.model)
        self.lowering = Lowering(program, numbers)
        self.shape = _shape(program, frozenset(parameter.numbers(parameter.value)))
        self.solves = 0
        self.scale = 1e-300
        self._basis: Any = None

    def pieces(self) -> Iterator[Piece]:
        """The pieces in order; neighbours on one straight line are one piece."""
        bends = self.parameter.bends(self.lower, self.upper)
        points = [self.solve(at) for at in sorted({self.lower, self.upper, *bends})]
        found = [
            piece
            for left, right in pairwise(points)
            for span in self.merged(self.between(left, right))
            for piece in self.fitted(*span)
        ]
        made = found[0]
        for piece in found[1:]:
            joined = self.joined(made, piece)
            if joined is None:
                yield made
            made = joined or piece
        yield made

    def merged(self, spans: Iterator[_Span]) -> list[_Span]:
        """The spans, neighbours on one branch as one: at a kink many bases are optimal, and the search may have met one
        that is of neither side."""
        together: list[_Span] = []
        for left, right, branch in spans:
            if together:
                start, middle, before = together[-1]
                if self.shape == "piecewise smooth" and self.agree(branch, before, start.at, right.at):
                    together[-1] = (start, right, before if middle.at - start.at > right.at - middle.at else branch)
                    continue
            together.append((left, right, branch))
        return together if self.shape != "piecewise smooth" else self.sharpened(together)

    def sharpened(self, spans: list[_Span]) -> list[_Span]:
        """The spans with their borders where their branches meet: a point so near to a kink that the optimum there is
        the same on both may have been taken for it."""
        for at in range(len(spans) - 1):
            (left, middle, before), (_, right, after) = spans[at : at + 2]
            room = 0.01 * min(middle.at - left.at, right.at - middle.at)
            around = (
                replace(middle, at=middle.at - room, branch=before),
                replace(middle, at=middle.at + room, branch=after),
            )
            border = self.solve(self.meeting(*around))
            spans[at], spans[at + 1] = (left, border, before), (border, right, after)
        return spans

    def agree(self, one: _Branch, other: _Branch, lower: float, upper: float) -> bool:
        """Whether two branches are the same function between two values."""
        programs = (self.at(float(at)) for at in _nodes(lower, upper, CHECKS))
        return all(abs(one.value(each) - other.value(each)) <= SAME * self.scale for each in programs)

    def between(self, left: _Point, right: _Point) -> Iterator[_Span]:
        """Spans between two points, each on one branch."""
        if right.at - left.at <= 4 * CLOSE * max(self.upper - self.lower, abs(right.at)):
            yield left, right, left.branch
            return
        for branch in (left.branch, right.branch):
            if self.on(branch, left) and self.on(branch, right):
                other = None if self.shape != "piecewise smooth" else self.off(branch, left, right)
                if other is None:
                    yield left, right, branch
                else:
                    yield from self.between(left, other)
                    yield from self.between(other, right)
                return
        middle = self.solve(self.meeting(left, right))
        if self.on(left.branch, middle) and self.on(right.branch, middle) and self.shape != "piecewise smooth":
            yield left, middle, left.branch
            yield middle, right, right.branch
            return
        yield from self.between(left, middle)
        yield from self.between(middle, right)

    def meeting(self, left: _Point, right: _Point) -> float:
        """Where the branches of two points meet between them; the middle, where they do not."""
        middle = 0.5 * (left.at + right.at)

        def lead(at: float) -> float:
            program = self.at(at)
            return left.branch.value(program) - right.branch.value(program)

        start, end = lead(left.at), lead(right.at)
        if not start * end < 0:  # equal signs, one of them 0, or no basis
            return middle
        try:
            found = float(optimize.brentq(lead, left.at, right.at, xtol=1e-15 * abs(right.at) + 1e-300, rtol=1e-14))
        except (RuntimeError, ValueError):
            return middle
        room = CLOSE * max(right.at - left.at, abs(right.at))
        return found if left.at + room < found < right.at - room else middle

    def off(self, branch: _Branch, left: _Point, right: _Point) -> _Point | None:
        """A point between two others at which a branch that both are on is not the optimum."""
        for at in _nodes(left.at, right.at, CHECKS):
            point = self.solve(float(at))
            if not self.on(branch, point):
                return point
        return None

    def on(self, branch: _Branch, point: _Point) -> bool:
        """Whether a branch is the optimum at a point."""
        return branch is point.branch or abs(branch.value(point.program) - point.value) <= SAME * self.scale

    def fitted(self, left: _Point, right: _Point, branch: _Branch) -> Iterator[Piece]:
        """A span as pieces: a straight line, or series that meet the branch between their nodes."""
        if self.shape != "piecewise smooth":
            yield _line(left.at, left.value, right.at, right.value)
            return
        line = _line(left.at, left.value, right.at, right.value)
        if right.at - left.at <= 1e-9 * (self.upper - self.lower):
            yield line
            return

        def exact(places: Array) -> Array:
            return np.array([branch.value(self.at(float(at))) for at in places])

        for degree in (1, *DEGREES):
            domain = [left.at, right.at]
            series = Chebyshev.interpolate(exact, degree, domain=domain) if degree > 1 else line.series
            checks = _nodes(left.at, right.at, degree + 2)
            if np.all(np.abs(series(checks) - exact(checks)) <= FIT * self.scale):
                yield Piece(left.at, right.at, tuple(map(float, series.coef)))
                return
        middle = self.solve(0.5 * (left.at + right.at))
        yield from self.fitted(left, middle, branch)
        yield from self.fitted(middle, right, branch)

    def joined(self, before: Piece, after: Piece) -> Piece | None:
        """Two pieces as one, where both are on the same straight line."""
        if not (before.linear and after.linear):
            return None
        first, last = float(before.series(before.lower)), float(after.series(after.upper))
        line = _line(before.lower, first, after.upper, last)
        same = abs(float(line.series(before.upper)) - float(before.series(before.upper))) <= 0.1 * SAME * self.scale
        slopes = abs(before.slope(before.lower) - after.slope(after.lower)) <= KINK * abs(line.slope(before.lower))
        return line if same and (slopes or self.shape == "piecewise smooth") else None

    # ---- programs and optima ----------------------------------------------------------------------------------

    def at(self, value: float) -> LinearProgram:
        """The program with the parameter at a value."""
        self.lowering.change(self.parameter.numbers(value))
        return self.lowering.run()

    def solve(self, value: float) -> _Point:
        """The optimum at a value, from the last basis, certified.

        Raises:
            InfeasibleModel, SolverFailure: no optimum, or none with a certificate.
        """
        if self.solves >= MOST_POINTS:
            raise SolverFailure(f"sensitivity_curve: {MOST_POINTS} optima were not enough; ask for a shorter interval")
        self.solves += 1
        program = self.at(value)
        scaled, scaling = scale(program)
        solver = highs.new_highs(scaled)
        solver.setOptionValue("solver", "simplex")
        if self._basis is not None:
            solver.setBasis(self._basis)
        highs.run(solver)
        try:
            values, duals = highs.read(solver, scaling, "simplex")
        except InfeasibleModel as error:
            raise InfeasibleModel(
                f"sensitivity_curve: there is no plan at {self.parameter.name} = {value:g} ({error}); "
                "FluidModel.solve says why; choose another interval",
                kind=error.kind,
            ) from None
        answer = held(Solution(values, duals, certify(program, values, duals), "HiGHS simplex"), 1e-7)
        self._basis = solver.getBasis()
        branch = _Branch.of(self._basis)
        exact = branch.value(program)
        objective = answer.certificate.objective
        # Where nothing is earned, what rounding earns is measured against what a request in service would.
        self.scale = max(self.scale, abs(objective), EARNS_NOTHING * float(np.abs(program.objective).max(initial=0.0)))
        agrees = abs(exact - objective) <= 1e-7 * self.scale
        return _Point(value, exact if agrees else objective, branch, program)


def _shape(program: SymbolicProgram, moved: frozenset[str]) -> Shape:
    """What the optimum is as a function of parameters that move along a line, by where they stand."""
    slopes = tangent(program, moved)
    lowering = Lowering(slopes, Numbers({}, {}))
    rows = [term for row in slopes.constraints for term in slopes.terms(row.difference)]
    prices = [term for term in slopes.terms(slopes.objective) if term.coefficient != 0]
    moving = [term for term in rows if term.coefficient != 0] + prices
    straight = not any(lowering.given(term.coefficient) & moved for term in moving)
    in_matrix = any(term.variable is not None for term in rows)
    if not moving:
        return "constant"
    if in_matrix or not straight or (prices and len(moving) > len(prices)):
        return "piecewise smooth"
    return "convex, piecewise linear" if prices else "concave, piecewise linear"


def _nodes(lower: float, upper: float, count: int) -> Array:
    """Chebyshev nodes inside an interval."""
    angle = np.pi * (np.arange(count) + 0.5) / count
    return 0.5 * (lower + upper) - 0.5 * (upper - lower) * np.cos(angle)


def _line(lower: float, first: float, upper: float, last: float) -> Piece:
    """A straight piece through two points."""
    return Piece(lower, upper, (0.5 * (first + last), 0.5 * (last - first)))
