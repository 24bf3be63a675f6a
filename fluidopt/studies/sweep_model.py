"""This module owns what a sweep over a model's own numbers does at a block of points.

Where the points differ in numbers of one program, these are written straight into its arrays, for all points at once,
and solved by `Solver.solve_each`. Where they do not (an abandonment rate that falls to 0 takes a variable away), or
what is wanted is a function of the model, a validated scenario is built at every point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluidopt.formulation import formulation
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.program import Array
from fluidopt.scenario import Scenario
from fluidopt.service_levels import MeanTTFT
from fluidopt.solvers.warm import Solver
from fluidopt.studies.quiet import built_quietly
from fluidopt.studies.sensitivity.parameters import ModelParameter, check_apart, find_parameters
from fluidopt.studies.sweep_store import Outcome

# Points of a model that are solved together, at most.
MOST_WARM = 2_500
FEWEST_BLOCKS = 4
REVENUE = "revenue_rate"
Point = dict[str, Any]
"""Values by name."""
Columns = dict[str, NDArray[Any]]
"""Values of N points by name, each of shape (N,)."""


def each_point(columns: Columns) -> Iterator[Point]:
    """The points one by one."""
    for values in zip(*(column.tolist() for column in columns.values()), strict=True):
        yield dict(zip(columns, values, strict=True))


def guarded(work: Callable[[Point], Outcome], point: Point) -> Outcome:
    """What ``work`` gives at a point, or its error in words."""
    try:
        return work(point)
    except Exception as error:  # whatever a user's function raises, it may not cost the other points
        return in_words(error)


def in_words(error: Exception) -> str:
    """An error as a point keeps it."""
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Variants:
    """A model with other values of named parameters."""

    base: FluidModel
    parameters: list[ModelParameter]

    @classmethod
    def of(cls, scenario: Scenario, names: Iterable[str]) -> Variants:
        """The variants of the model that a scenario describes."""
        base = built_quietly(scenario)
        return cls(base, find_parameters(base, list(names), "sweep"))

    def __call__(self, point: Point) -> FluidModel:
        """The model at one point, from a validated scenario."""
        scenario = self.base.scenario
        for parameter in self.parameters:
            scenario = parameter.moved(scenario, point[parameter.name])
        return built_quietly(scenario)

    def check(self, columns: Columns) -> None:
        """Whether the parameters can have these values; what a scenario accepts is a range, so its ends are asked.

        Raises:
            InvalidInput: where one cannot, or two are the same number.
        """
        check_apart(self.parameters, "sweep")
        for parameter in self.parameters:
            values = np.unique(columns[parameter.name]).tolist()
            numbers = [parameter.check(value, "sweep") for value in values]
            broken = [value for value in numbers if parameter.whole and not float(value).is_integer()]
            for value in [*broken[:1], numbers[0], numbers[-1]]:
                parameter.moved(self.base.scenario, value)

    def numbers(self, columns: Columns) -> tuple[dict[str, Array], NDArray[np.bool_]] | None:
        """The numbers of the program at N points, by symbol, each with a first axis of N; and at which of them it has
        the rows and columns of the base. None where other numbers follow from these parameters.

        The same as those of the models at the points.
        """
        if not all(self._is_alone(parameter) for parameter in self.parameters):
            return None
        present = self.base.numbers().values
        count = len(next(iter(columns.values())))
        found: dict[str, Array] = {}
        gpus: dict[int, list[ModelParameter]] = {}
        for parameter in self.parameters:
            column = np.asarray(columns[parameter.name], dtype=float)
            if parameter.place[0] == "gpu":
                gpus.setdefault(parameter.place[1], []).append(parameter)
                continue
            (symbol,) = parameter.numbers(parameter.value)
            array = found.setdefault(symbol, _repeated(present[symbol], count))
            if parameter.members:
                members = list(parameter.members)
                array[:, members] = column[:, None] * (present[symbol][members] if parameter.factor else 1.0)
            else:
                array[:] = column.reshape(count, *(1,) * (array.ndim - 1))
        for at, parameters in gpus.items():
            for symbol in ("C", "b", "tau"):
                found.setdefault(symbol, _repeated(present[symbol], count))
            self._put_modes(found, at, parameters, columns)
        # What exists depends on which numbers are 0, as does what a service level asks of patient classes.
        same = np.ones(count, dtype=bool)
        for symbol, array in found.items():
            same &= ((array > 0) == (present[symbol] > 0)).reshape(count, -1).all(axis=1)
        return found, same

    def _is_alone(self, parameter: ModelParameter) -> bool:
        """Whether no other number of the program follows from it; the wait of those who are served within a time to
        first token does, from prompts and speeds."""
        if not any(isinstance(each, MeanTTFT) and each.of == "served" for each in self.base.scenario.service_levels):
            return True
        return parameter.place[0] not in ("gpu", "service_levels") and parameter.field != "prompt_tokens"

    def _put_modes(
        self,
        found: Mapping[str, Array],
        at: int,
        parameters: Sequence[ModelParameter],
        columns: Columns,
    ) -> None:
        """Chunks, decode slots and iteration times of one GPU type, read off its curve once per combination."""
        gpu = self.base.gpu_types[at]
        start = sum(len(each.modes()) for each in self.base.gpu_types[:at])
        if gpu.operating_modes is not None:
            for parameter in parameters:
                (symbol,) = parameter.numbers(parameter.value)
                found[symbol][:, start + parameter.place[3]] = columns[parameter.name]
            return
        values = np.stack([np.asarray(columns[each.name], dtype=float) for each in parameters], axis=1)
        combinations, which = np.unique(values, axis=0, return_inverse=True)
        on_curve = {each.field for each in parameters if each.place[-1] == "curve"}
        modes = []
        for row in combinations.tolist():
            fields = dict(zip((each.field for each in parameters), row, strict=True))
            curve = replace(gpu.curve, **{field: fields[field] for field in on_curve}) if on_curve else gpu.curve
            chunk = int(fields.get("chunk_size", gpu.chunk_size))
            batch = int(fields.get("batch_size", gpu.batch_size))
            cached = fields.get("kv_tokens", gpu.kv_tokens or 0.0)
            times = curve.mixed(chunk, batch - 1, cached), curve.decode_only(batch, cached)
            modes.append([(chunk, 0.0), (batch - 1, batch), times])
        for symbol, pair in zip(("C", "b", "tau"), np.array(modes)[which.ravel()].swapaxes(0, 1), strict=True):
            found[symbol][:, start : start + 2] = pair


def _repeated(array: Array, count: int) -> Array:
    return np.repeat(np.asarray(array, dtype=float)[None], count, axis=0)


@dataclass(frozen=True)
class Resolve:
    """The optimal revenue rate of a linear model at a point, by re-solves."""

    scenario: Scenario

    @property
    def identity(self) -> Any:
        """What tells it from other work, JSON-able."""
        return {"model": self.scenario.to_dict(), "measure": REVENUE}

    @property
    def title(self) -> str:
        """What it computes, in words."""
        return "optimal revenue rate of a model"

    def block(self, count: int) -> int:
        """Points evaluated together, of so many: a cold start is then a small part."""
        return min(MOST_WARM, -(-count // FEWEST_BLOCKS))

    def __call__(self, columns: Columns) -> list[Outcome]:
        """The revenue rate at every point, or its error in words."""
        vary = Variants.of(self.scenario, columns)
        solver = Solver(vary.base)
        found = self._together(vary, solver, columns)
        return [
            found.get(at) or guarded(lambda values: {REVENUE: self._revenue(solver, vary(values))}, point)
            for at, point in enumerate(each_point(columns))
        ]

    @staticmethod
    def _together(vary: Variants, solver: Solver, columns: Columns) -> dict[int, Outcome]:
        """The points whose numbers can be written into one program, if revenue is what it maximises."""
        model = vary.base
        if model.symbolic.objective != formulation(model.scenario.charging).objective:
            return {}
        numbers = vary.numbers(columns)
        if numbers is None:
            return {}
        values, alike = numbers
        places = np.flatnonzero(alike)
        if not len(places):
            return {}
        solved = solver.solve_each({symbol: array[places] for symbol, array in values.items()})
        outcomes: list[Outcome] = [{REVENUE: revenue} for revenue in solved.objective.tolist()]
        for at, error in solved.failures.items():
            outcomes[at] = in_words(error)
        return dict(zip(places.tolist(), outcomes, strict=True))

    @staticmethod
    def _revenue(solver: Solver, model: FluidModel) -> float:
        """The revenue rate of one model, by a re-solve from the last basis."""
        numbers = model.numbers().values
        found = solver.solve({name: numbers[name] for name in solver.parameters})
        return found.objective if model.is_standard else Plan(model, found.program, found.solution).revenue_rate


def optimal_revenue(model: FluidModel) -> dict[str, float]:
    """R* of a model, solved by itself; the measure where there is no basis to start from."""
    return {REVENUE: model.solve().revenue_rate}
