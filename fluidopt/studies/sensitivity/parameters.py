"""The numbers of a model that may move: their names, units and values, and the models they lead to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from sympy import IndexedBase, Integer, Symbol

from fluidopt.algebra import Parameter, SymbolicProgram
from fluidopt.contention import GPU
from fluidopt.errors import InvalidInput
from fluidopt.formulation import CLASSES
from fluidopt.inputs import MOST, is_number, is_whole
from fluidopt.program import Array, Numbers
from fluidopt.service_levels import MeanTTFT, names_of
from fluidopt.solvers.graph import is_linear
from fluidopt.tables import shorten

if TYPE_CHECKING:
    from fluidopt.model import FluidModel
    from fluidopt.scenario import Scenario

# Fields that may move, with their symbol in the model and their unit.
_OF_CLASS = {
    "arrival_rate": ("lambda", "requests/s/GPU"),
    "prompt_tokens": ("P", "tokens"),
    "output_tokens": ("D", "tokens"),
    "abandonment_rate": ("theta", "1/s"),
}
_OF_PRICES = {"prompt": ("c_p", "money/token"), "output": ("c_d", "money/token")}
_OF_CURVE = {
    "alpha": "s",
    "beta": "s/token",
    "per_decode": "s/decode",
    "per_kv_token": "s/token",
    "solo": "s",
    "solo_per_decode": "s/decode",
    "solo_per_kv_token": "s/token",
}
_OF_GPU = {"chunk_size": "tokens", "batch_size": "requests", "kv_tokens": "tokens"}
_OF_MODE = {"iteration_time": ("tau", "s"), "chunk": ("C", "tokens"), "decode_slots": ("b", "requests")}
_OF_LEVEL = ("at_most", "tokens", "share", "rate")
_WHOLE = {"chunk_size", "batch_size", "chunk", "decode_slots"}
# Least value of what must stay above 0; all else may fall to 0.
_ABOVE_ZERO = {"prompt_tokens", "output_tokens", "solo", "iteration_time"}
_LEAST_ONE = {"chunk_size", "batch_size", "chunk"}
# A line is measured from a step this share of its place; smaller ones are tried until two of them agree.
_STEP, _AGREE = 1e-3, 1e-9
# In place of no decode slots, so that the program keeps its rows where B falls to 1.
_HARDLY = 1e-12


@dataclass(frozen=True)
class ModelParameter:
    """One number of a model: a field of a class, of a GPU type, of a mode, a price, the bound of a service level.

    Named by the field with its owner in brackets, ``arrival_rate[code]``, ``iteration_time[mixed]``; the field alone
    where there is one owner (``alpha``). A field of several classes alone, ``arrival_rate``, is a *factor* on all of
    them, 1 at present.
    """

    model: FluidModel
    name: str
    field: str
    place: tuple[Any, ...]
    """Where the owner is found in the scenario; of a factor, where the first one is."""
    unit: str
    value: float
    """The present value; 1 of a factor."""
    factor: bool = False
    members: tuple[int, ...] = ()
    """Of a class field: the classes that move."""

    @property
    def whole(self) -> bool:
        """Whether only whole numbers mean something."""
        return self.field in _WHOLE

    @property
    def least(self) -> float:
        """No value below has a meaning (and not this one either, where `positive`)."""
        return 1.0 if self.field in _LEAST_ONE else 0.0

    @property
    def positive(self) -> bool:
        """Whether 0 is excluded."""
        return self.field in _ABOVE_ZERO or (self.factor and self.field == "abandonment_rate")

    @property
    def scale(self) -> float:
        """A change of this much is a change of 100 %; 1 where the value is 0."""
        return abs(self.value) or 1.0

    def check(self, value: object, caller: str) -> float:
        """``value`` as a number that the parameter can take.

        Raises:
            InvalidInput: where it cannot.
        """
        given = float(cast(float, value)) if is_number(value) else math.nan
        if not self.least <= given <= MOST or (self.positive and given == 0):
            rule = "above 0" if self.positive else f"of at least {self.least:g}"
            raise InvalidInput(f"{caller}: {self.name} must be a finite number {rule}; got {value!r}")
        return given

    # ---- as a scenario ----------------------------------------------------------------------------------------

    def moved(self, scenario: Scenario, value: float) -> Scenario:
        """``scenario`` with the parameter at ``value``; whole numbers must be whole.

        Raises:
            InvalidInput: the scenario refuses the value.
        """
        if self.members:
            classes = list(scenario.classes)
            for at in self.members:
                present = getattr(self.model.scenario.classes[at], self.field)
                change: dict[str, Any] = {self.field: present * value if self.factor else value}
                classes[at] = replace(classes[at], **change)
            return replace(scenario, classes=tuple(classes))
        if self.whole:
            if not is_whole(value, least=0):
                raise InvalidInput(f"{self.name} must be a whole number; got {value!r}")
            value = int(value)
        return cast("Scenario", _put(scenario, (*self.place, self.field), value))

    # ---- as the numbers of the program ------------------------------------------------------------------------

    def numbers(self, value: float) -> dict[str, Array]:
        """What the program is given in the names of the model's symbols, where it moves; C and B may be fractions."""
        numbers = in_symbols(self.model)[1].values
        if self.members:
            symbol = _OF_CLASS[self.field][0]
            array = np.array(numbers[symbol], dtype=float)
            array[list(self.members)] = array[list(self.members)] * value if self.factor else value
            return {symbol: array}
        if self.place[0] == "prices":
            return {_OF_PRICES[self.field][0]: np.float64(value)}  # type: ignore[dict-item]
        if self.place[0] == "service_levels":
            name = self._level_symbol()
            return {name: np.full(np.shape(numbers[name]), value)}
        return self._of_modes(value)

    def slope(self, side: int) -> dict[str, Array]:
        """d(number of the program)/d(parameter) to the right (``side`` 1) or to the left (-1) of the present value.

        Everything the program is given is linear in the parameter, but iteration times, which bend where the curve
        does.
        """
        present = self.numbers(self.value)
        if self.place[0] == "gpu":
            return {name: self._secant(name, side) for name in present}
        return {name: array - present[name] for name, array in self.numbers(self.value + 1.0).items()}

    def _secant(self, name: str, side: int) -> Array:
        """The slope of a piecewise linear number: a short step's, once half of it has the same."""
        start, step = self.numbers(self.value)[name], _STEP * self.scale
        slope: Array = (self.numbers(self.value + side * step)[name] - start) / (side * step)
        for _ in range(40):
            step /= 2
            shorter = (self.numbers(self.value + side * step)[name] - start) / (side * step)
            rounding = 4 * np.finfo(float).eps * np.abs(start) / step
            if np.all(np.abs(shorter - slope) <= _AGREE * np.abs(slope) + rounding):
                break
            slope = shorter
        return slope

    def bends(self, lower: float, upper: float) -> list[float]:
        """Where an iteration time bends between two values, in order."""
        if self.place[0] != "gpu":
            return []
        if self.place[-1] == "curve":
            return sorted(set(self._tangents_meet(lower, upper)))
        gpu = self.model.gpu_types[self.place[1]]
        if len(self.place) > 2 or gpu.operating_modes is not None:
            return []
        grid = gpu.curve.grid()
        knots = {
            "chunk_size": grid.chunk,
            "batch_size": np.concatenate([grid.decodes, grid.decodes + 1.0]),
            "kv_tokens": grid.kv_tokens,
        }[self.field]
        return sorted({float(knot) for knot in knots if lower < knot < upper})

    def _tangents_meet(self, lower: float, upper: float) -> Iterator[float]:
        """Iteration times are convex and piecewise linear in the numbers of their curve: between two tangents that are
        not the same line lies a bend, where they meet or to both sides of that."""
        ends = [replace(self, value=end) for end in (lower, upper)]
        for mode in range(len(self.model.modes)):
            left, right = (float(end.slope(side)["tau"][mode]) for end, side in zip(ends, (1, -1), strict=True))
            if abs(right - left) <= 10 * _AGREE * (abs(left) + abs(right)):
                continue
            meet = self._meeting(mode, lower, upper, left, right)
            start, there = (float(self.numbers(at)["tau"][mode]) for at in (lower, meet))
            if lower < meet < upper and abs(there - start - left * (meet - lower)) > 1e-7 * start:
                yield from self._tangents_meet(lower, meet)
                yield from self._tangents_meet(meet, upper)
            elif lower < meet < upper:  # each line is straight up to there, and its slope is known best from far apart
                far = [0.5 * (lower + meet), 0.5 * (meet + upper)]
                slopes = [self._chord(mode, lower, far[0]), self._chord(mode, far[1], upper)]
                yield self._meeting(mode, lower, upper, *slopes)

    def _meeting(self, mode: int, lower: float, upper: float, left: float, right: float) -> float:
        """Where the lines through the iteration times at two values, with these slopes, meet."""
        start, end = (float(self.numbers(at)["tau"][mode]) for at in (lower, upper))
        return lower + (end - start - right * (upper - lower)) / (left - right)

    def _chord(self, mode: int, lower: float, upper: float) -> float:
        start, end = (float(self.numbers(at)["tau"][mode]) for at in (lower, upper))
        return (end - start) / (upper - lower)

    def _of_modes(self, value: float) -> dict[str, Array]:
        """Chunks, decode slots and iteration times of all modes."""
        numbers = self.model.numbers().values
        arrays = {name: np.array(numbers[name], dtype=float) for name in ("C", "b", "tau")}
        at, gpu = self.place[1], self.model.gpu_types[self.place[1]]
        start = sum(len(each.modes()) for each in self.model.gpu_types[:at])
        if gpu.operating_modes is not None:
            symbol = _OF_MODE[self.field][0]
            arrays[symbol][start + self.place[3]] = max(value, _HARDLY)
            return {symbol: arrays[symbol]}
        curve = replace(gpu.curve, **{self.field: value}) if self.place[-1] == "curve" else gpu.curve
        C, B, kv = (
            value if self.field == field else float(present)
            for field, present in (
                ("chunk_size", gpu.chunk_size),
                ("batch_size", gpu.batch_size),
                ("kv_tokens", gpu.kv_tokens or 0.0),
            )
        )
        for place, (chunk, slots, time) in enumerate(
            [(C, max(B - 1, _HARDLY), curve.mixed(C, B - 1, kv)), (0.0, B, curve.decode_only(B, kv))], start
        ):
            arrays["C"][place], arrays["b"][place], arrays["tau"][place] = chunk, slots, time
        return arrays

    def _level_symbol(self) -> str:
        model = self.model
        name = names_of(model.scenario.service_levels)[self.place[1]]
        if name in _served_within(model):
            return f"at_most_{name}"
        return f"limit_{name}" if f"limit_{name}" in model.numbers().values else f"bound_{name}"


def _put(node: Any, path: tuple[Any, ...], value: float) -> Any:
    """``node`` with the field at the end of ``path`` replaced."""
    head, *rest = path
    if isinstance(head, int):
        if not isinstance(node, tuple):  # a scenario may hold its one GPU type bare
            return _put(node, tuple(rest), value)
        return (*node[:head], _put(node[head], tuple(rest), value), *node[head + 1 :])
    return replace(node, **{head: _put(getattr(node, head), tuple(rest), value) if rest else value})


# ---- the parameters of a model ------------------------------------------------------------------------------------


def parameters_of(model: FluidModel) -> dict[str, ModelParameter]:
    """Every number of ``model`` that may move, by its name: factors on all classes first, then classes and the rest."""
    found = [*_of_classes(model), *_of_prices(model), *_of_gpus(model), *_of_levels(model)]
    return {each.name: each for each in found}


def find_parameters(model: FluidModel, names: Sequence[str] | str, caller: str) -> list[ModelParameter]:
    """The parameters of these names.

    Raises:
        InvalidInput: a name that there is not, with those that there are.
    """
    known = parameters_of(model)
    chosen = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InvalidInput(f"{caller}: there is no parameter {unknown[0]!r}; there are {shorten([*known], most=30)}")
    return [known[name] for name in chosen]


def check_apart(parameters: Sequence[ModelParameter], caller: str) -> None:
    """Whether each moves numbers of its own, so that all can move at once.

    Raises:
        InvalidInput: two move the same number, as a factor on all classes and the field of one do.
    """
    moved: dict[tuple[str, int], str] = {}
    for parameter in parameters:
        for at in parameter.members:
            other = moved.setdefault((parameter.field, at), parameter.name)
            if other != parameter.name:
                raise InvalidInput(f"{caller}: {other} and {parameter.name} move the same number; leave one out")


def _of_classes(model: FluidModel) -> Iterator[ModelParameter]:
    classes = model.scenario.classes
    if len(classes) > 1:
        for field in _OF_CLASS:
            yield ModelParameter(
                model, field, field, ("classes",), "times present", 1.0, True, tuple(range(len(classes)))
            )
    for field, (_, unit) in _OF_CLASS.items():
        for at, each in enumerate(classes):
            name = f"{field}[{each.name}]" if len(classes) > 1 else field
            yield ModelParameter(model, name, field, ("classes",), unit, getattr(each, field), False, (at,))


def _of_prices(model: FluidModel) -> Iterator[ModelParameter]:
    for field, (_, unit) in _OF_PRICES.items():
        yield ModelParameter(
            model, f"{field}_price", field, ("prices",), unit, float(getattr(model.scenario.prices, field))
        )


def _of_gpus(model: FluidModel) -> Iterator[ModelParameter]:
    alone = len(model.gpu_types) == 1
    for at, gpu in enumerate(model.gpu_types):
        if gpu.operating_modes is not None:
            yield from _of_modes(model, at, gpu)
            continue
        of = "" if alone else f"[{gpu.name}]"
        for field, unit in _OF_CURVE.items():
            if hasattr(gpu.curve, field):
                value = float(getattr(gpu.curve, field))
                yield ModelParameter(model, field + of, field, ("gpu", at, "curve"), unit, value)
        for field, unit in _OF_GPU.items():
            if field != "kv_tokens" or gpu.curve.depends_on_kv:
                yield ModelParameter(model, field + of, field, ("gpu", at), unit, float(getattr(gpu, field)))


def _of_modes(model: FluidModel, at: int, gpu: GPU) -> Iterator[ModelParameter]:
    start = sum(len(each.modes()) for each in model.gpu_types[:at])
    for field, (_, unit) in _OF_MODE.items():
        for place, mode in enumerate(gpu.modes()):
            value = getattr(mode, field)
            if value:
                name = f"{field}[{model.labels['mode'][start + place]}]"
                yield ModelParameter(model, name, field, ("gpu", at, "operating_modes", place), unit, float(value))


def _of_levels(model: FluidModel) -> Iterator[ModelParameter]:
    levels = model.scenario.service_levels
    for at, (name, level) in enumerate(zip(names_of(levels), levels, strict=True)):
        field = next(each for each in _OF_LEVEL if getattr(level, each, None) is not None)
        unit = "1" if field == "share" else _level_unit(model, name)
        yield ModelParameter(model, f"bound[{name}]", field, ("service_levels", at), unit, float(getattr(level, field)))


def _level_unit(model: FluidModel, name: str) -> str:
    return next(
        (each.unit for each in model.symbolic.parameters if each.name in (f"bound_{name}", f"limit_{name}")), ""
    )


# ---- the program with everything in symbols -----------------------------------------------------------------------


def in_symbols(model: FluidModel) -> tuple[SymbolicProgram, Numbers]:
    """The model's program and its numbers, with the one bound that depends on other parameters defined through them.

    Those served within a time to first token T wait at most T - P tau/C, of the slowest prefill mode.
    """
    program, numbers = model.symbolic, model.numbers()
    parameters, values = list(program.parameters), dict(numbers.values)
    for name, level in _served_within(model).items():
        limit = Parameter(Symbol(f"at_most_{name}"), (), "s", "time to first token at most")
        speeds = [mode.prefill_speed if mode.prefills else np.inf for _, mode in model.modes]
        i, k = CLASSES.symbol, Integer(int(np.argmin(speeds)))
        P, C, tau = (IndexedBase(each) for each in ("P", "C", "tau"))
        wait = Parameter(
            IndexedBase(f"bound_{name}"), (CLASSES,), "s", "wait at most", limit.symbol - P[i] * tau[k] / C[k]
        )
        parameters = [limit, *(wait if each.name == wait.name else each for each in parameters)]
        del values[wait.name]
        values[limit.name] = np.asarray(float(level.at_most))
    return replace(program, parameters=tuple(parameters)), Numbers(numbers.labels, values)


def _served_within(model: FluidModel) -> dict[str, MeanTTFT]:
    """The levels on the time to first token of those who are served, by name."""
    levels = model.scenario.service_levels
    named = zip(names_of(levels), levels, strict=True)
    return {name: level for name, level in named if isinstance(level, MeanTTFT) and level.of == "served"}


def checked_model(model: FluidModel, caller: str) -> FluidModel:
    """The model, if it is a linear one.

    Raises:
        InvalidInput: it is no `FluidModel`, or not linear.
    """
    if not hasattr(model, "symbolic") or not hasattr(model, "scenario"):
        raise InvalidInput(f"{caller}: model must be a FluidModel; got {model!r}")
    if not is_linear(model.symbolic) or model.has_convex_penalty:
        raise InvalidInput(
            f"{caller}: the model has a concave objective or a convex penalty, and only linear programs have bases and "
            "shadow prices that are followed here; use a hard bound, or global_sensitivity with a response of your own"
        )
    return model
