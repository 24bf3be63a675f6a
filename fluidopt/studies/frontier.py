"""What a promise costs: the most that can be earned against the bound of a service level, or of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from sympy import Expr

from fluidopt.errors import InvalidInput
from fluidopt.formulation import formulation
from fluidopt.inputs import is_number, is_whole
from fluidopt.model import FluidModel
from fluidopt.program import Array, Lowering
from fluidopt.scenario import Scenario
from fluidopt.service_levels import ServiceLevel, names_of
from fluidopt.solvers.along import NO_PLAN, UNCERTIFIED, Bound, ProgramsAlong
from fluidopt.studies.frontier_ends import FINE, SAME, Ends, loosens
from fluidopt.studies.quiet import built_quietly
from fluidopt.studies.sensitivity.parameters import ModelParameter, checked_model, find_parameters, in_symbols
from fluidopt.tables import jsonable, number, shorten, text
from fluidopt.views import amount_bar, card, html, paragraph, sketch

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

    from fluidopt.solvers.along import Solved

# A smooth curve's price changes by less than this between points that are near enough to be taken for one piece.
BEND = 1e-6
# Where every point has a basis of its own, as where nothing can be earned, kinks are looked for so often at most.
MOST_SPLITS = 1_000


@dataclass(frozen=True)
class Promise:
    """A service level whose bound is varied."""

    name: str
    """Of its rows, ``slot_tpot``."""
    field: str
    """That holds its bound."""
    unit: str
    least_feasible: float
    """The tightest bound that some plan keeps, whatever it costs, if the other promise is as loose as can be."""

    @property
    def loosens(self) -> int:
        """1 where a larger bound promises less, -1 where it promises more."""
        return loosens(self.field)

    @property
    def words(self) -> str:
        """The bound and its unit, for axes and tables."""
        name = self.name.replace("_", " ").replace("tpot", "TPOT").replace("ttft", "TTFT").replace("kv", "KV")
        return f"{name} {'at most' if self.loosens > 0 else 'at least'}, {'share' if self.unit == '1' else self.unit}"


@dataclass(frozen=True)
class Kink:
    """A bound at which the shadow price jumps."""

    bound: float
    revenue_rate: float
    """Money/s per GPU."""
    price_below: float
    """d(revenue rate)/d(bound) just below."""
    price_above: float
    """Just above."""
    jump: float = 0.0
    """Revenue just above less that just below; not 0 where a bound makes a whole mode of operation admissible."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """The most that can be earned, money/s per GPU, against the bounds of one or two service levels."""

    model: FluidModel
    """With the service levels; their bounds are those it was given."""
    promises: tuple[Promise, ...]
    points: xr.Dataset
    """A dimension per promise. ``revenue_rate``, NaN where no plan keeps the bounds; ``shadow_price``, what a unit of
    the bound earns (of two promises ``shadow_price[name]`` each)."""
    kinks: tuple[Kink, ...]
    """Of one promise: all bounds in the range at which the shadow price jumps, in order."""
    piecewise_linear: bool
    """Whether the revenue is linear between kinks, which are then exact; else it is smooth there, and they are found
    to 1e-10 of the range, where a basis of one point of the grid stops being optimal."""
    all_kinks: bool
    """Whether every place where bases change was resolved; not where rounding decides, as where next to nothing is
    earned."""
    uncertified: int
    """Points of the grid, NaN too, for which no solver's answer passes its certificate."""
    programs_solved: int
    """Programs given to a solver. On straight pieces all other points follow from concavity, else each has the basis of
    one of these, with a certificate of its own."""

    @property
    def revenue_rate(self) -> Array:
        """Money/s per GPU on the grid; NaN where no plan keeps the bounds."""
        return np.asarray(self.points["revenue_rate"])

    @cached_property
    def breakpoints(self) -> pd.DataFrame:
        """A row per kink: ``bound``, ``revenue_rate``, ``price_below``, ``price_above``, ``jump``."""
        import pandas as pd

        columns = ("bound", "revenue_rate", "price_below", "price_above", "jump")
        return pd.DataFrame({name: [getattr(each, name) for each in self.kinks] for name in columns})

    @property
    def free_from(self) -> float | None:
        """Of one promise: the tightest bound that costs nothing; None where every bound in the range costs something,
        or none does."""
        loosens = self.promises[0].loosens
        most = max((abs(price) for each in self.kinks for price in (each.price_below, each.price_above)), default=0.0)
        beyond = [each.price_above if loosens > 0 else each.price_below for each in self.kinks]
        free = [each.bound for each, price in zip(self.kinks, beyond, strict=True) if abs(price) <= SAME * most]
        return (free[-1] if loosens > 0 else free[0]) if free else None

    def to_frame(self) -> pd.DataFrame:
        """A row per point of the grid."""
        return self.points.to_dataframe()

    @property
    def statement(self) -> str:
        """What the promise costs, in words."""
        if np.isnan(self.revenue_rate).all():
            return " ".join(filter(None, ["No plan keeps these bounds.", *map(self._tightest, self.promises)]))
        top, bottom = np.nanmax(self.revenue_rate), np.nanmin(self.revenue_rate)
        names = " and ".join(each.words for each in self.promises)
        sentences = [
            f"Against {names}: revenue from {top:.4g} down to {bottom:.4g} money/s per GPU"
            + (f", {1 - bottom / top:.1%} less." if top > 0 else ".")
        ]
        if len(self.promises) == 1 and self.free_from is not None:
            sentences.append(f"A bound of {self.free_from:.4g} costs nothing.")
        lost = int(np.isnan(self.revenue_rate).sum()) - self.uncertified
        if lost:
            sentences.append(f"{lost} of {self.revenue_rate.size} points have no plan.")
        if self.uncertified:
            sentences.append(f"{self.uncertified} have no certified one.")
        return " ".join(filter(None, [*sentences, *map(self._tightest, self.promises)]))

    @staticmethod
    def _tightest(promise: Promise) -> str:
        """Where plans end, unless that is where the bound's own range does."""
        tightest, rising = promise.least_feasible, promise.loosens > 0
        if tightest <= 0 if rising else (promise.unit == "1" and tightest >= 1):
            return ""
        return f"No plan keeps {promise.name} {'below' if rising else 'above'} {number(tightest)}."

    @property
    def caption(self) -> str:
        """How the numbers were made, in words."""
        kind = "exact" if self.piecewise_linear else f"to {FINE:.0e} of the range"
        kind += "" if self.all_kinks else ", not all resolved"
        kinks = f", {len(self.kinks)} kinks ({kind})" if len(self.promises) == 1 else ""
        proof = "on straight pieces between certified ends" if self.piecewise_linear else "each with a certificate"
        count = f"{self.revenue_rate.size} points, {proof}"
        return f"{count}, from {self.programs_solved} solved programs{kinks}; fluid values."

    def plot(self) -> Figure:
        """Revenue and shadow price against the bound; of two promises, a map of the revenue."""
        from fluidopt.studies.frontier_figure import plot_frontiers

        return plot_frontiers(self)

    def to_dict(self) -> dict[str, Any]:
        """The frontier as JSON-able data; `from_dict` reads it back."""
        return {
            "model": self.model.to_dict(),
            "promises": [asdict(each) for each in self.promises],
            "bounds": [np.asarray(self.points[each.name]).tolist() for each in self.promises],
            "revenue_rate": jsonable(self.revenue_rate.ravel()),
            "shadow_prices": [jsonable(np.asarray(self.points[each]).ravel()) for each in _prices(self.promises)],
            "kinks": [asdict(each) for each in self.kinks],
            **{name: getattr(self, name) for name in _PLAIN},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Frontier:
        """Read a frontier back."""
        try:
            promises = tuple(Promise(**each) for each in data["promises"])
            axes = [np.array(each, dtype=float) for each in data["bounds"]]
            prices = np.array(data["shadow_prices"], dtype=float).T
            return cls(
                built_quietly(Scenario.from_dict(data["model"])),
                promises,
                _dataset(promises, axes, np.array(data["revenue_rate"], dtype=float), prices),
                tuple(Kink(**each) for each in data["kinks"]),
                **{name: data[name] for name in _PLAIN},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"not a saved frontier: {error!r}") from None

    def __str__(self) -> str:
        shown = self.breakpoints if self.kinks else self.to_frame()
        return "\n".join([self.statement, "", text(shown), "", self.caption])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        first, table = self.promises[0], self.breakpoints if self.kinks else self.to_frame()
        curve = {"R*": (self.points[first.name].to_numpy(), self.revenue_rate)} if len(self.promises) == 1 else {}
        units = {each.name: each.unit for each in self.promises} | {"bound": first.unit, "jump": ""}
        return card(
            f"Frontier of {' and '.join(each.name for each in self.promises)}",
            sketch(curve, across=first.words, up="money/s per GPU"),
            paragraph(self.statement),
            html(
                table,
                title="Kinks" if self.kinks else "Points",
                units=units | {"revenue_rate": "money/s per GPU"},
                bars={"revenue_rate": amount_bar},
            ),
            paragraph(self.caption, muted=True),
        )


_PLAIN = ("piecewise_linear", "all_kinks", "uncertified", "programs_solved")


def frontier(
    model: FluidModel,
    level: ServiceLevel | str | Sequence[ServiceLevel | str],
    *,
    bounds: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
    points: int | None = None,
) -> Frontier:
    """Vary the bound of a service level, or of two, and find the most that can be earned at every value.

    A bound that is a right side (fairness, waits, abandonment, floors, KV transfer) makes the revenue concave in it,
    and, but for waits of those served, piecewise linear: then all kinks are found exactly. A bound that is a
    coefficient (times per output token, KV memory) makes it piecewise smooth.

    Args:
        model: linear, without the service level or with it.
        level: a service level to add, such as ``fo.PrefillFairness(at_most=0.1)``, whose bound does not matter here;
            or the name of one that the model has, ``"slot_tpot"``. Of two, a pair.
        bounds: from and to, in the level's unit (of two, a pair of these); by default from the tightest bound that some
            plan keeps to somewhat beyond the first that costs nothing.
        points: on the grid, per promise; by default 201, of two 41.

    Raises:
        InvalidInput: a level with a penalty, a range that is empty or has bounds that the level refuses, a model that
            is not linear or too large to keep its bases (millions of matrix entries).
        InfeasibleModel: no bound of the level leaves a plan.
    """
    wanted = [level] if isinstance(level, str) or not isinstance(level, Sequence) else list(level)
    if len(wanted) not in (1, 2):
        raise InvalidInput(f"frontier: level must be one service level or a pair; got {len(wanted)}")
    count = points if points is not None else (201, 41)[len(wanted) - 1]
    if not is_whole(count, least=2):
        raise InvalidInput(f"frontier: points must be a whole number of at least 2; got {points!r}")
    model, names = _promised(checked_model(model, "frontier"), wanted)
    parameters = find_parameters(model, [f"bound[{name}]" for name in names], "frontier")
    programs = ProgramsAlong(*in_symbols(model), [_bound(model, each) for each in parameters])
    ranges = _ranges(bounds, parameters, model.scenario)
    promises = []
    for k, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        search = Ends(programs, k, parameters)
        tightest = search.tightest(name)
        promises.append(Promise(name, parameter.field, parameter.unit, tightest))
        ranges[k] = ranges[k] if ranges[k] is not None else search.range(tightest)
    axes = [np.linspace(*ends, int(count)) for ends in ranges if ends is not None]
    linear = programs.is_linear
    curve = _Curve(programs, linear)
    pieces = None
    if len(names) == 1 and linear and model.symbolic.objective == _paid(model):
        pieces = _straight(curve, axes[0], promises[0])
    if pieces is not None:
        revenue, prices, kinks = pieces
        uncertified = 0
    else:
        solved = programs.solve(np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1))
        paid = Lowering(replace(model.symbolic, objective=_paid(model)), model.numbers())
        paid.run()
        revenue, prices = solved.values @ paid.objective(programs.columns.shape[1]), solved.prices
        curve = _Curve(programs, linear)
        kinks = tuple(_kinks(curve, _spots(axes[0], solved, turns=True))) if len(names) == 1 else ()
        uncertified = int((solved.basis == UNCERTIFIED).sum())
    grid = _dataset(promises, axes, revenue, prices)
    return Frontier(
        model,
        tuple(promises),
        grid,
        kinks,
        piecewise_linear=pieces is not None,
        all_kinks=not curve.gave_up,
        uncertified=uncertified,
        programs_solved=programs.programs_solved,
    )


def _paid(model: FluidModel) -> Expr:
    """The revenue rate, in symbols."""
    return formulation(model.scenario.charging).objective


def _promised(model: FluidModel, levels: Sequence[Any]) -> tuple[FluidModel, list[str]]:
    """The model with the service levels that it has not yet, and the names of all that are varied."""
    scenario = Scenario.from_dict(model.to_dict())
    names = []
    for level in levels:
        have = names_of(scenario.service_levels)
        if isinstance(level, str):
            if level not in have:
                raise InvalidInput(
                    f"frontier: the model has no service level {level!r}; "
                    f"{f'it has {shorten(have)}' if have else 'it has none'}; give one such as SlotTPOT(at_most=0.025)"
                )
            names.append(level)
            continue
        if not hasattr(level, "kind") or not hasattr(level, "add"):
            raise InvalidInput(f"frontier: level must be a service level or the name of one; got {level!r}")
        scenario = replace(scenario, service_levels=(*scenario.service_levels, level))
        names.append(names_of(scenario.service_levels)[-1])
    if len(set(names)) < len(names):
        raise InvalidInput(f"frontier: the two service levels must be different; got {names}")
    for name, level in zip(names_of(scenario.service_levels), scenario.service_levels, strict=True):
        if name in names and level.penalty is not None:
            raise InvalidInput(f"frontier: {name} has a penalty, so it is no bound; leave the penalty out")
    return built_quietly(scenario), names


def _bound(model: FluidModel, parameter: ModelParameter) -> Bound:
    """Where a service level's bound stands in the program: by itself, or in a parameter that is defined by it."""
    (symbol,) = parameter.numbers(parameter.value)
    parameters = in_symbols(model)[0].parameters
    given = next(each for each in parameters if each.name == symbol)
    defined = (each for each in parameters if each.definition is not None and each.definition.has(given.symbol))
    return Bound(symbol, next(defined, given))


def _ranges(bounds: Any, parameters: Sequence[ModelParameter], scenario: Scenario) -> list[tuple[float, float] | None]:
    """From and to of each bound, checked; None where none is given."""
    if bounds is None:
        return [None] * len(parameters)
    pairs = [bounds] if len(parameters) == 1 else bounds
    try:
        ends = [(low, high) for low, high in pairs]
    except (TypeError, ValueError):
        ends = []
    if len(ends) != len(parameters) or not all(is_number(end) for pair in ends for end in pair):
        raise InvalidInput(f"frontier: bounds must be (from, to), of two promises a pair of these; got {bounds!r}")
    for (low, high), parameter in zip(ends, parameters, strict=True):
        if not low < high:
            raise InvalidInput(f"frontier: bounds must go from a smaller to a larger number; got {(low, high)}")
        for end in (low, high):
            parameter.moved(scenario, parameter.check(end, "frontier"))
    return [(float(low), float(high)) for low, high in ends]


@dataclass(frozen=True)
class _Spot:
    """A point of a frontier of one promise."""

    at: float
    objective: float
    price: float
    basis: int


def _spots(at: Array, solved: Solved, *, turns: bool = False) -> list[_Spot]:
    """The points that have a plan; of ``turns`` only the first and last of each run with one basis."""
    chosen = np.flatnonzero(solved.basis >= 0)
    if turns:
        runs = solved.basis[chosen]
        chosen = chosen[(np.diff(runs, prepend=NO_PLAN) != 0) | (np.diff(runs, append=NO_PLAN) != 0)]
    columns = (at[chosen], solved.objective[chosen], solved.prices[chosen, 0], solved.basis[chosen])
    return [_Spot(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


class _Curve:
    """A frontier of one promise, evaluated where it is asked for, so many times at most."""

    def __init__(self, programs: ProgramsAlong, linear: bool) -> None:
        self.programs, self.linear = programs, linear
        self.left = MOST_SPLITS
        self.gave_up = False
        """Whether a point that was asked for could not be had."""

    def __call__(self, at: float) -> _Spot | None:
        """A point; None where it has no certified plan, or nothing more may be asked."""
        found = []
        if self.left > 0:
            self.left -= 1
            found = _spots(np.array([at]), self.programs.solve(np.array([[at]])))
        self.gave_up |= not found
        return found[0] if found else None

    def with_basis(self, basis: int, at: float) -> _Spot | None:
        """The point as a basis has it; None where that is not optimal."""
        place = np.array([[at]])
        found = self.programs.with_basis(basis, place)
        return None if found is None else _spots(place[:, 0], found)[0]

    def narrowed(self, left: _Spot, right: _Spot, width: float) -> tuple[_Spot, _Spot]:
        """The last point that the left basis has, and the first after it that the right one has, to ``width``."""
        start, end = np.array([left.at]), np.array([right.at])
        last, first = self.programs.reach(left.basis, start, end, fine=width / (right.at - left.at))
        after = left.at + first * (right.at - left.at)
        ended = self.with_basis(left.basis, left.at + last * (right.at - left.at)) or left
        if after < right.at:
            back, _ = self.programs.reach(right.basis, end, np.array([after]), fine=width / (right.at - after))
            right = self.with_basis(right.basis, right.at + back * (after - right.at)) or right
        return ended, right


def _straight(curve: _Curve, grid: Array, promise: Promise) -> tuple[Array, Array, tuple[Kink, ...]] | None:
    """Revenue, shadow price (N, 1) and kinks of a curve of straight pieces, from its ends and kinks alone; None where
    these cannot all be certified."""
    revenue, prices = np.full(len(grid), np.nan), np.full(len(grid), np.nan)
    feasible = grid >= promise.least_feasible if promise.loosens > 0 else grid <= promise.least_feasible
    if not feasible.any():
        return revenue, prices[:, None], ()
    inside = grid[feasible]
    left, right = curve(float(inside[0])), curve(float(inside[-1]))
    if left is None or right is None:
        return None
    found = list(_kinks(curve, [left, right]))
    if curve.gave_up:
        return None
    # At an end the price beyond it, where there may be no plan, is of no interest.
    kinks = tuple(each for each in found if inside[0] < each.bound < inside[-1])
    at = [inside[0], *(each.bound for each in kinks), inside[-1]]
    revenue[feasible] = np.interp(inside, at, [left.objective, *(each.revenue_rate for each in kinks), right.objective])
    first = found[0].price_above if found and found[0].bound <= inside[0] else left.price
    steps = np.array([first, *(each.price_above for each in kinks)])
    prices[feasible] = steps[np.searchsorted(at[1:-1], inside, side="left")]
    return revenue, prices[:, None], kinks


def _kinks(curve: _Curve, spots: Sequence[_Spot]) -> Iterator[Kink]:
    """All places where the price jumps, from left to right."""
    width = FINE * (spots[-1].at - spots[0].at) if spots else 0.0
    steepest = max((abs(each.price) for each in spots), default=0.0)
    for left, right in pairwise(spots):
        yield from _between(curve, left, right, width, steepest)


def _between(
    curve: _Curve, left: _Spot, right: _Spot, width: float, steepest: float, *, parted: bool = False
) -> Iterator[Kink]:
    """Kinks between two points, as long as their bases differ (``parted``: neither is known to reach the other end).

    A curve of straight pieces is concave: tangents at both ends meet on the curve, at its only kink between them, or
    above it, and then there are more (Eisner and Severance, 1976). Else by bisection.
    """
    if left.basis == right.basis:
        return
    for end, basis in () if parted else ((left, right.basis), (right, left.basis)):
        other = curve.with_basis(basis, end.at)
        if other is not None:  # both bases are optimal at this end, and one of them at the other end too
            below, above = (end.price, other.price) if end is left else (other.price, end.price)
            if abs(above - below) > SAME * steepest:
                yield Kink(end.at, end.objective, below, above)
            return
    if _one_piece(curve, left, right, steepest):
        return
    if not curve.linear and right.at - left.at > width:
        left, right = curve.narrowed(left, right, width)
        if _one_piece(curve, left, right, steepest):
            return
    step, rise = right.at - left.at, right.objective - left.objective
    smooth = abs(right.price - left.price) <= (SAME if curve.linear else BEND) * steepest
    if step <= width:
        size = max(abs(left.objective), abs(right.objective))
        jump = rise if abs(rise) > SAME * size + steepest * width else 0.0
        if jump or not smooth:
            yield Kink(right.at, right.objective, left.price, right.price, jump)
        return
    middle = 0.5 * (left.at + right.at)
    if curve.linear and not smooth:
        meet = left.at + (rise - right.price * step) / (left.price - right.price)
        meet = min(max(meet, left.at), right.at)
        expected = left.objective + left.price * (meet - left.at)
        found = curve(meet)
        if found is None:
            return
        if found.objective >= expected - SAME * abs(expected):
            yield Kink(meet, found.objective, left.price, right.price)
            return
        middle = meet
    between = curve(middle)
    if between is None:  # nothing can be certified in there, so nothing is said
        return
    inside = between.basis in (left.basis, right.basis)
    yield from _between(curve, left, between, width, steepest, parted=inside)
    yield from _between(curve, between, right, width, steepest, parted=inside)


def _one_piece(curve: _Curve, left: _Spot, right: _Spot, steepest: float) -> bool:
    """Whether prices and revenues at two points are those of one piece."""
    rise, size = right.objective - left.objective, max(abs(left.objective), abs(right.objective))
    bend = abs(right.price - left.price)
    straight = abs(rise - 0.5 * (left.price + right.price) * (right.at - left.at)) <= SAME * size
    return straight and bend <= (SAME if curve.linear else BEND) * steepest


def _prices(promises: Sequence[Promise]) -> list[str]:
    """The names of the shadow prices."""
    return ["shadow_price"] if len(promises) == 1 else [f"shadow_price[{each.name}]" for each in promises]


def _dataset(promises: Sequence[Promise], axes: Sequence[Array], revenue: Array, shadow_prices: Array) -> xr.Dataset:
    """Revenue (N,) and shadow prices (N, K) on the grid, labelled."""
    import xarray as xr

    names, shape = tuple(each.name for each in promises), tuple(map(len, axes))
    rate = "money/s per GPU"
    variables: dict[str, Any] = {"revenue_rate": (names, revenue.reshape(shape), {"units": rate})}
    for k, (label, promise) in enumerate(zip(_prices(promises), promises, strict=True)):
        prices = shadow_prices[:, k].reshape(shape)
        variables[label] = (names, prices, {"units": f"{rate} per {promise.unit}"})
    coordinates = {
        promise.name: (promise.name, axis, {"units": promise.unit, "long_name": promise.words})
        for promise, axis in zip(promises, axes, strict=True)
    }
    return xr.Dataset(variables, coordinates, {"title": "revenue against service levels"})
