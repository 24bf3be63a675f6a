"""Any number of a model over a grid or a design of its parameters: labelled, resumable, on one core or many."""

from __future__ import annotations

import inspect
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fluidopt.errors import InvalidInput
from fluidopt.inputs import is_number, is_whole
from fluidopt.model import FluidModel
from fluidopt.scenario import Scenario
from fluidopt.simulation.statistics import Estimate
from fluidopt.solvers.graph import is_linear
from fluidopt.studies.sweep_model import (
    REVENUE,
    Columns,
    Point,
    Resolve,
    Variants,
    each_point,
    guarded,
    optimal_revenue,
)
from fluidopt.studies.sweep_store import Outcome, Store
from fluidopt.studies.work import progress
from fluidopt.tables import shorten

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from distributed import Client


def sweep(
    subject: FluidModel | Callable[..., Any],
    *,
    over: Mapping[str, Sequence[Any]] | None = None,
    design: pd.DataFrame | None = None,
    measure: Callable[[FluidModel], Any] | None = None,
    units: Mapping[str, str] | None = None,
    checkpoint: str | Path | None = None,
    retry_failed: bool = False,
    executor: Executor | Client | None = None,
    block: int | None = None,
) -> xr.Dataset:
    """Evaluate a model, or a function, on a grid of named values or on a design.

    A model's parameters go by the names that `sensitivity` uses: a field with its owner in brackets where there are
    several (``arrival_rate[code]``, ``chunk_size``, ``alpha``, ``output_price``, ``bound[slot_tpot]``); a class field
    alone, ``arrival_rate``, is a factor on all classes. Without ``measure`` the optimal revenue rate is computed, and
    certified: all points of a block as programs that differ in numbers, of which few need a solver; those that differ
    in rows and columns, and models with penalties, one by one. The ways agree to the certificate's tolerance.

    Points are evaluated in blocks, which depend on their number alone, so every executor gives the same numbers, bit
    for bit, if the function does. A point that fails keeps its error beside the others.

    Args:
        subject: a model; or a function, called with the names as keyword arguments, that returns a number, an
            `Estimate`, or a mapping of names to these.
        over: values by name; the points are all combinations. Numbers, text or truth values, without repetition.
        design: or a point per row, a parameter per column.
        measure: for a model: a function of the model at each point, in place of the revenue rate.
        units: of results, and of a function's arguments, by name. A model's parameters have theirs.
        checkpoint: a directory (zarr) to which finished points are written, and from which a sweep that was
            interrupted goes on. It knows a function by its name only: after changing what it computes, give another.
        retry_failed: whether points that failed in the checkpoint are evaluated again.
        executor: where blocks run: any ``concurrent.futures.Executor`` or a Dask client; default here, in order.
        block: points evaluated together (default: 1; for the revenue rate of a model up to 2,500).

    Returns:
        A dimension per name (``point`` for a design) and a variable per result, both with ``units``; ``error`` holds
        what went wrong at a point, empty where nothing did. ``attrs["failed"]`` counts these.

    Raises:
        InvalidInput: an argument is out of range, a parameter is not known or cannot have one of the values, two
            parameters move the same number, or the checkpoint is of another sweep.
    """
    points = _Points.of(over, design)
    task, own_units = _task(subject, measure, points)
    given = dict(units or {})
    if not all(isinstance(name, str) and isinstance(unit, str) for name, unit in given.items()):
        raise InvalidInput(f"sweep: units must map names to text; got {units!r}")
    if block is not None and not is_whole(block, least=1):
        raise InvalidInput(f"sweep: block must be a whole number of at least 1; got {block!r}")
    size = int(block) if block is not None else task.block(points.count)
    store = None
    if checkpoint is not None:
        settings = {"subject": task.identity, "points": points.to_dict(), "block": size}
        store = Store(Path(checkpoint), settings, points.count, size)
    all_units = own_units | given
    done = {} if store is None else store.read()
    if retry_failed:
        done = {at: outcome for at, outcome in done.items() if not isinstance(outcome, str)}
    open_blocks = [
        range(start, min(start + size, points.count))
        for start in range(0, points.count, size)
        if any(at not in done for at in range(start, min(start + size, points.count)))
    ]
    found = _run(task, points, open_blocks, executor)
    total = sum(map(len, open_blocks))
    for numbers, outcomes, final in progress(found, total=total, what="points", size=lambda each: len(each[0])):
        done.update(zip(numbers, outcomes, strict=True))
        if store is not None and final:
            store.add(numbers.start, outcomes, all_units)
    return _dataset(points, [done[at] for at in range(points.count)], all_units, task.title)


@dataclass(frozen=True)
class _Points:
    """The points of a sweep: a value per name and point, and the axes whose combinations they are."""

    columns: dict[str, NDArray[Any]]
    """By name, shape (N,)."""
    axes: dict[str, NDArray[Any]] | None
    """By name, without repetition; None for a design."""

    @classmethod
    def of(cls, over: Mapping[str, Sequence[Any]] | None, design: pd.DataFrame | None) -> _Points:
        if (over is None) == (design is None):
            raise InvalidInput("sweep: give exactly one of over={name: values} and design=frame")
        given: Any = over if over is not None else design
        if not hasattr(given, "items"):
            kind = "over" if over is not None else "design"
            raise InvalidInput(f"sweep: {kind} must map names to values; got {given!r}")
        columns = {name: _values(name, values, axis=over is not None) for name, values in given.items()}
        if not columns or not all(len(column) for column in columns.values()):
            raise InvalidInput("sweep: there are no points; give at least one name with at least one value")
        if over is None:
            return cls(columns, None)
        shape = [len(column) for column in columns.values()]
        places = np.unravel_index(np.arange(int(np.prod(shape))), shape)
        return cls({name: columns[name][at] for name, at in zip(columns, places, strict=True)}, columns)

    @cached_property
    def count(self) -> int:
        """Number of points, N."""
        return len(next(iter(self.columns.values())))

    def part(self, numbers: range) -> Columns:
        """The values at consecutive points, by name."""
        return {name: column[numbers.start : numbers.stop] for name, column in self.columns.items()}

    def to_dict(self) -> dict[str, Any]:
        """The points as JSON-able data."""
        kind, columns = ("grid", self.axes) if self.axes is not None else ("design", self.columns)
        return {"kind": kind, **{name: column.tolist() for name, column in columns.items()}}


def _values(name: object, values: Any, *, axis: bool) -> NDArray[Any]:
    """The values of one name as an array of numbers, text or truth values."""
    if not isinstance(name, str) or not name:
        raise InvalidInput(f"sweep: names must be text that is not empty; got {name!r}")
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise InvalidInput(f"sweep: {name} must have a list of values; got {values!r}; write [{values!r}]")
    values = list(values)
    array = np.asarray(values)
    kinds = {type(value.item() if hasattr(value, "item") else value) for value in values}
    if array.ndim != 1 or array.dtype.kind not in "iufbU" or (str in kinds and len(kinds) > 1):
        raise InvalidInput(f"sweep: {name} must have numbers, text or truth values, one kind; got {values!r}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput(f"sweep: {name} must have finite values; got {values!r}")
    if axis and len(np.unique(array)) < len(array):
        raise InvalidInput(f"sweep: {name} must not repeat a value; got {values!r}")
    return array


class _Task(Protocol):
    """The work at a block of points: a pure function that can be sent to another process."""

    @property
    def identity(self) -> Any:
        """What tells it from other work, JSON-able."""

    @property
    def title(self) -> str:
        """What it computes, in words."""

    def block(self, count: int) -> int:
        """Points evaluated together, of so many."""

    def __call__(self, columns: Columns) -> list[Outcome]: ...


@dataclass(frozen=True)
class _Call:
    """A function of the values at a point."""

    function: Callable[..., Any]

    @property
    def identity(self) -> Any:
        return _name(self.function)

    @property
    def title(self) -> str:
        return _name(self.function)

    def block(self, count: int) -> int:  # noqa: ARG002
        return 1

    def __call__(self, columns: Columns) -> list[Outcome]:
        return [guarded(lambda at: _numbers(self.function(**at), at), point) for point in each_point(columns)]


@dataclass(frozen=True)
class _Measure:
    """A function of the model at a point."""

    scenario: Scenario
    function: Callable[[FluidModel], Any]

    @property
    def identity(self) -> Any:
        return {"model": self.scenario.to_dict(), "measure": _name(self.function)}

    @property
    def title(self) -> str:
        return f"{_name(self.function)} of a model"

    def block(self, count: int) -> int:  # noqa: ARG002
        return 1

    def __call__(self, columns: Columns) -> list[Outcome]:
        vary = Variants.of(self.scenario, columns)
        return [guarded(lambda at: _numbers(self.function(vary(at)), at), point) for point in each_point(columns)]


def _task(
    subject: object, measure: Callable[[FluidModel], Any] | None, points: _Points
) -> tuple[_Task, dict[str, str]]:
    """The work at a block of points, and the units that are known."""
    if isinstance(subject, FluidModel):
        scenario = Scenario.from_dict(subject.to_dict())
        vary = Variants.of(scenario, points.columns)
        vary.check(points.columns)
        units = {each.name: each.unit for each in vary.parameters}
        if measure is None:
            # A convex penalty needs tangents of its own at every point.
            warm = is_linear(subject.symbolic) and not subject.has_convex_penalty
            units[REVENUE] = "money/s per GPU"
            return (Resolve(scenario) if warm else _Measure(scenario, optimal_revenue)), units
        if not callable(measure):
            raise InvalidInput(f"sweep: measure must be a function of a model; got {measure!r}")
        return _Measure(scenario, measure), units
    if not callable(subject):
        raise InvalidInput(f"sweep: expected a FluidModel or a function; got {subject!r}")
    if measure is not None:
        raise InvalidInput("sweep: measure goes with a model; a function is its own measure, so leave it out")
    try:
        inspect.signature(subject).bind(**next(each_point(points.part(range(1)))))
    except TypeError as error:
        raise InvalidInput(
            f"sweep: {_name(subject)} cannot be called with {shorten(list(points.columns))}: {error}; the names in "
            "over or design are its keyword arguments"
        ) from None
    except ValueError:  # no signature to be had: the calls will tell
        pass
    return _Call(subject), {}


def _numbers(result: Any, point: Point) -> dict[str, float]:
    """A function's result as numbers by name; an `Estimate` brings its half-width along."""
    named = result if isinstance(result, Mapping) else {"value": result}
    numbers: dict[str, float] = {}
    for name, value in named.items():
        if isinstance(value, Estimate):
            numbers |= {name: value.mean, f"{name}_half_width": value.half_width}
        elif isinstance(value, bool | np.bool_ | float) or is_number(getattr(value, "item", lambda v=value: v)()):
            numbers[name] = float(value)
        else:
            raise InvalidInput(f"a swept function must return numbers, or a mapping of names to numbers; got {value!r}")
    clash = [name for name in numbers if not isinstance(name, str) or name in point or name in ("error", "status")]
    if clash:
        raise InvalidInput(f"a result cannot be named {clash[0]!r}, which is taken; give it another name")
    return numbers


def _name(function: Callable[..., Any]) -> str:
    """Where a function is defined; of a partial one, where what it calls is."""
    function = getattr(function, "func", function)
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


def _run(
    task: _Task, points: _Points, blocks: Sequence[range], executor: Executor | Client | None
) -> Iterator[tuple[range, list[Outcome], bool]]:
    """Numbers of points, what became of them, and whether that is final (False where a worker was lost)."""
    if executor is None:
        for numbers in blocks:
            yield numbers, task(points.part(numbers)), True
        return
    # A Dask client is asked for its futures in the form of the standard library.
    pool: Executor = executor.get_executor() if hasattr(executor, "get_executor") else executor
    if not hasattr(pool, "submit"):
        raise InvalidInput(f"sweep: executor must be a concurrent.futures.Executor or a Dask client; got {executor!r}")
    if isinstance(pool, ProcessPoolExecutor):
        _check_pickles(task)
    futures = {_submitted(pool, task, points.part(numbers)): numbers for numbers in blocks}
    try:
        for future in as_completed(futures):
            numbers = futures[future]
            try:
                outcomes, final = future.result(), True
            # The executor's own, of any kind that it may have: what the function raises comes as an outcome.
            except Exception as error:
                outcomes, final = [f"lost by the executor: {type(error).__name__}: {error}"] * len(numbers), False
            yield numbers, outcomes, final
    finally:
        for future in futures:
            future.cancel()


def _submitted(pool: Executor, task: _Task, columns: Columns) -> Future[list[Outcome]]:
    """The future of a block; one that has failed where the pool broke before it took this block."""
    try:
        return pool.submit(task, columns)
    except BrokenExecutor as error:
        refused = Future[list[Outcome]]()
        refused.set_exception(error)
        return refused


def _check_pickles(task: _Task) -> None:
    try:
        pickle.dumps(task)
    except Exception as error:  # an object's own code may run here, and raise what it likes
        raise InvalidInput(
            f"sweep: {task.title} cannot be sent to another process ({error}); define the function at the top level "
            "of a module, or use threads or a Dask client"
        ) from None


def _dataset(points: _Points, outcomes: Sequence[Outcome], units: Mapping[str, str], title: str) -> xr.Dataset:
    """The results on their grid, labelled."""
    import xarray as xr

    axes = points.axes if points.axes is not None else {"point": np.arange(points.count)}
    dims, shape = tuple(axes), tuple(len(values) for values in axes.values())
    names = dict.fromkeys(itertools.chain.from_iterable(each for each in outcomes if isinstance(each, dict)))
    variables: dict[str, Any] = {}
    for name in names:
        column = [each.get(name, np.nan) if isinstance(each, dict) else np.nan for each in outcomes]
        variables[name] = (dims, np.array(column).reshape(shape), {"units": units.get(name, "")})
    errors = np.array([each if isinstance(each, str) else "" for each in outcomes], dtype=object)
    variables["error"] = (dims, errors.reshape(shape), {"long_name": "what went wrong; empty where nothing did"})
    coordinates: dict[str, Any] = {name: (name, values) for name, values in axes.items()}
    if points.axes is None:
        coordinates |= {name: ("point", column) for name, column in points.columns.items()}
    for name in points.columns:
        coordinates[name] = (*coordinates[name], {"units": units.get(name, "")})
    failed = sum(isinstance(each, str) for each in outcomes)
    return xr.Dataset(variables, coordinates, {"title": title, "points": points.count, "failed": failed})
