"""Which numbers of a model matter over whole ranges: Sobol indices and Morris's elementary effects, by SALib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.inputs import is_whole
from fluidopt.model import FluidModel
from fluidopt.program import Array
from fluidopt.scenario import Scenario
from fluidopt.simulation.experiment import checked_seed
from fluidopt.solvers.warm import Solver
from fluidopt.studies.sensitivity.parameters import ModelParameter, check_apart, checked_model, find_parameters
from fluidopt.studies.sweep_model import Variants
from fluidopt.studies.work import in_order
from fluidopt.tables import number, text
from fluidopt.views import card, figures, html, paragraph, whisker

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Method = Literal["sobol", "morris"]
Response = Callable[[FluidModel], float]

# Points per job; where a job ends is no matter of who runs it, so that results are the same in any executor.
BLOCK = 128
# Of the grid that Morris's trajectories step on, and of the bootstrap behind the intervals.
LEVELS, RESAMPLES = 8, 1000
LEVEL = 0.95

_COLUMNS = {
    "sobol": ("first_order", "first_order_half_width", "total", "total_half_width"),
    "morris": ("mean_absolute_effect", "mean_absolute_effect_half_width", "mean_effect", "effect_deviation"),
}


@dataclass(frozen=True, kw_only=True)
class GlobalSensitivity:
    """How much of a response each parameter moves when all move over their ranges at once, uniform and independent."""

    method: Method
    ranges: dict[str, tuple[float, float]]
    """Least and largest value of each parameter."""
    units: dict[str, str]
    response: str
    """What was computed of each model."""
    samples: int
    """N of Sobol's scheme (a power of 2), or trajectories of Morris's."""
    seed: int
    evaluations: int
    """Models that were solved."""
    mean: float
    """Of the response, over the ranges."""
    standard_deviation: float
    """Of the response, over the ranges."""
    indices: dict[str, tuple[float, ...]]
    """By column of `to_frame`, a number per parameter."""

    def to_frame(self) -> pd.DataFrame:
        """A row per parameter, the most important first; half-widths are of bootstrapped 95 % intervals.

        Sobol: ``first_order`` (share of the variance that the parameter explains alone), ``total`` (share that it has
        a part in). Morris: ``mean_absolute_effect``, ``mean_effect`` and ``effect_deviation`` of the elementary
        effects, in units of the response per full range.
        """
        import pandas as pd

        columns = {
            "lower": [low for low, _ in self.ranges.values()],
            "upper": [high for _, high in self.ranges.values()],
            "unit": [self.units[name] for name in self.ranges],
            **{name: list(values) for name, values in self.indices.items()},
        }
        frame = pd.DataFrame(columns, index=pd.Index(list(self.ranges), name="parameter"))
        return frame.sort_values(self.ranked_by, ascending=False, kind="stable")

    @property
    def ranked_by(self) -> str:
        """The column that says how important a parameter is."""
        return "total" if self.method == "sobol" else "mean_absolute_effect"

    @property
    def statement(self) -> str:
        """What matters most and what does not, in words."""
        frame = self.to_frame()
        column = self.ranked_by
        width = f"{column}_half_width"
        leaders = ", ".join(
            f"{name} {number(row[column])} ± {number(row[width])}" for name, row in frame.head(3).iterrows()
        )
        least = 0.01 if self.method == "sobol" else 0.01 * float(frame[column].max())
        idle = [str(name) for name, row in frame.iterrows() if row[column] + row[width] < least]
        what = "Part in the variance" if self.method == "sobol" else "Effect over the range"
        rest = f" Next to nothing: {', '.join(idle[:8])}." if idle else ""
        return (
            f"Over these ranges {self.response} is {number(self.mean)} on average, with a standard deviation of "
            f"{number(self.standard_deviation)}. {what}: {leaders}.{rest}"
        )

    @property
    def caption(self) -> str:
        """How the numbers were made, in words."""
        scheme = (
            f"Sobol indices after Saltelli, N = {self.samples}"
            if self.method == "sobol"
            else f"Morris's elementary effects, {self.samples} trajectories on {LEVELS} levels"
        )
        return f"{scheme}, {self.evaluations} models, seed {self.seed}; intervals are bootstrapped, 95 %."

    def plot(self) -> Figure:
        """Indices with their intervals, the most important parameter on top."""
        from fluidopt.studies.sensitivity.figures import plot_global

        return plot_global(self)

    def to_dict(self) -> dict[str, Any]:
        """The study as JSON-able data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GlobalSensitivity:
        """Read a study back."""
        try:
            ranges = {str(name): (float(low), float(high)) for name, (low, high) in data["ranges"].items()}
            indices = {str(name): tuple(map(float, values)) for name, values in data["indices"].items()}
            return cls(**{**data, "ranges": ranges, "indices": indices})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"not a saved global sensitivity: {error!r}") from None

    def __str__(self) -> str:
        return "\n".join([self.statement, "", text(self.to_frame()), "", self.caption])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        indices = ("first_order", "total", "mean_absolute_effect", "mean_effect")
        frame = self.to_frame()
        bars = {name: whisker(f"{name}_half_width") for name in indices if f"{name}_half_width" in frame}
        return card(
            f"Global sensitivity of {self.response}",
            figures(("Mean", self.mean, ""), ("Standard deviation", self.standard_deviation, "")),
            paragraph(self.statement),
            html(frame, title="Parameters", bars=bars),
            paragraph(self.caption, muted=True),
        )


def global_sensitivity(
    model: FluidModel,
    ranges: Mapping[str, tuple[float, float]],
    *,
    method: Method = "sobol",
    samples: int = 256,
    response: Response | None = None,
    seed: int = 0,
    executor: Executor | None = None,
) -> GlobalSensitivity:
    """Sobol indices or Morris's elementary effects of the optimum, or of any number of a model, over ranges.

    Sobol solves ``samples (k + 2)`` models of k parameters, Morris ``samples (k + 1)``. A model of a few classes takes
    about 5 ms, less where only rates and prices move.

    Args:
        model: what the ranges are around; other numbers stay.
        ranges: least and largest value by name of the parameter, as in `sensitivity`; B, C and other whole numbers are
            rounded.
        method: ``"sobol"``: shares of the variance; ``"morris"``: a screening, for many parameters and few models.
        samples: a power of 2 for Sobol; for Morris, trajectories.
        response: a function of the model that returns a number (default: R* of its plan, through the warm re-solver);
            defined in a module where the executor is of processes.
        seed: of points and bootstrap; the same seed gives the same numbers in any executor.
        executor: where models are solved, in blocks of 128; default here.

    Raises:
        InvalidInput: an argument is out of range, two ranges move the same number, the response is no number, or a
            model at some point of the ranges has no plan (the point is named).
        SolverFailure: no certified answer.
    """
    caller = "global_sensitivity"
    if response is None:
        checked_model(model, caller)
    elif not callable(response):
        raise InvalidInput(f"{caller}: response must be a function of a model; got {response!r}")
    if method not in _COLUMNS:
        raise InvalidInput(f"{caller}: method must be 'sobol' or 'morris'; got {method!r}")
    if not is_whole(samples, least=4) or (method == "sobol" and samples & (samples - 1)):
        rule = "a power of 2 of at least 4" if method == "sobol" else "a whole number of at least 4"
        raise InvalidInput(f"{caller}: samples must be {rule}; got {samples!r}")
    checked = _checked_ranges(model, ranges)
    points, analyse = _design(method, checked, int(samples), np.random.SeedSequence(checked_seed(seed)))
    for at, (parameter, _, _) in enumerate(checked):
        if parameter.whole:
            points[:, at] = np.rint(points[:, at])
    values = _evaluated(model, [each.name for each, _, _ in checked], points, response, executor)
    indices = analyse(values) if np.ptp(values) > 1e-12 * np.abs(values).max() else np.zeros((4, len(checked)))
    return GlobalSensitivity(
        method=method,
        ranges={each.name: (low, high) for each, low, high in checked},
        units={each.name: each.unit for each, _, _ in checked},
        response="R*" if response is None else getattr(response, "__name__", "the response"),
        samples=int(samples),
        seed=int(seed),
        evaluations=len(points),
        mean=float(values.mean()),
        standard_deviation=float(values.std(ddof=1)),
        indices={name: tuple(map(float, row)) for name, row in zip(_COLUMNS[method], indices, strict=True)},
    )


def _checked_ranges(
    model: FluidModel, ranges: Mapping[str, tuple[float, float]]
) -> list[tuple[ModelParameter, float, float]]:
    caller = "global_sensitivity"
    if not isinstance(ranges, Mapping) or len(ranges) < 2:
        raise InvalidInput(f"{caller}: ranges must map at least two parameters to (low, high); got {ranges!r}")
    checked = []
    for parameter in find_parameters(model, list(ranges), caller):
        try:
            low, high = ranges[parameter.name]
        except (TypeError, ValueError):
            raise InvalidInput(
                f"{caller}: the range of {parameter.name} must be (low, high); got {ranges[parameter.name]!r}"
            ) from None
        ends = parameter.check(low, caller), parameter.check(high, caller)
        if not ends[0] < ends[1]:
            raise InvalidInput(f"{caller}: the range of {parameter.name} must have low below high; got {(low, high)}")
        checked.append((parameter, *ends))
    check_apart([parameter for parameter, _, _ in checked], caller)
    return checked


def _design(
    method: Method, checked: Sequence[tuple[ModelParameter, float, float]], samples: int, seed: np.random.SeedSequence
) -> tuple[Array, Callable[[Array], Array]]:
    """The points, one per row, and what turns the responses there into the columns of the table."""
    problem = {
        "num_vars": len(checked),
        "names": [each.name for each, _, _ in checked],
        "bounds": [[low, high] for _, low, high in checked],
    }
    # SALib takes a seed of 0 for none, so it never gets one.
    at_points, at_bootstrap = (int(each) + 1 for each in seed.generate_state(2) // 2)
    if method == "sobol":
        from SALib.analyze import sobol as analysis
        from SALib.sample import sobol as sampling

        points = sampling.sample(problem, samples, calc_second_order=False, seed=at_points)

        def indices(values: Array) -> Array:
            found = analysis.analyze(
                problem, values, calc_second_order=False, num_resamples=RESAMPLES, conf_level=LEVEL, seed=at_bootstrap
            )
            return np.array([found[name] for name in ("S1", "S1_conf", "ST", "ST_conf")], dtype=float)

        return points, indices
    from SALib.analyze import morris as effects
    from SALib.sample import morris as trajectories

    points = trajectories.sample(problem, samples, num_levels=LEVELS, seed=at_points)

    def elementary(values: Array) -> Array:
        found = effects.analyze(
            problem,
            points,
            values,
            num_levels=LEVELS,
            num_resamples=RESAMPLES,
            conf_level=LEVEL,
            seed=at_bootstrap,
        )
        return np.array([found[name] for name in ("mu_star", "mu_star_conf", "mu", "sigma")], dtype=float)

    return points.copy(), elementary


# ---- responses ----------------------------------------------------------------------------------------------------


def _evaluated(
    model: FluidModel, names: Sequence[str], points: Array, response: Response | None, executor: Executor | None
) -> Array:
    blocks = [points[start : start + BLOCK].tolist() for start in range(0, len(points), BLOCK)]
    work = partial(evaluate_points, scenario=model.to_dict(), names=list(names), response=response)
    values = np.array(list(chain.from_iterable(in_order(work, blocks, executor=executor))))
    if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        place = ", ".join(f"{name} = {value:.4g}" for name, value in zip(names, points[at], strict=True))
        raise InvalidInput(
            f"global_sensitivity: the response has no value at {place} (no plan satisfies all rows there, or it is not "
            "a finite number); narrow the ranges"
        )
    return values


def evaluate_points(
    points: Sequence[Sequence[float]], *, scenario: Mapping[str, Any], names: Sequence[str], response: Response | None
) -> list[float]:
    """A response at some points; a pure function, for any executor. NaN where there is no plan.

    Args:
        points: values of the parameters that move, one list per point.
        scenario: `FluidModel.to_dict`.
        names: of the parameters.
        response: a function of the model; None for R*.
    """
    vary = Variants.of(Scenario.from_dict(scenario), names)
    models = (vary(dict(zip(names, point, strict=True))) for point in points)
    if response is None:
        return _optima(vary.base, [each.numbers().values for each in models])
    return [_value(response, each) for each in models]


def _value(response: Response, model: FluidModel) -> float:
    try:
        value = response(model)
    except InfeasibleModel:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidInput(f"global_sensitivity: response must return a number; got {value!r}") from None


def _optima(model: FluidModel, numbers: Sequence[Mapping[str, Array]]) -> list[float]:
    """R* at many numbers of one model, most from the basis of another; NaN where there is no plan."""
    solver = Solver(model)
    present = model.numbers().values
    moving = [
        name for name in solver.parameters if any(not np.array_equal(each[name], present[name]) for each in numbers)
    ]
    # Where nothing moves, all points are the present one, and any number tells how many there are.
    changes = {name: np.array([each[name] for each in numbers]) for name in sorted(moving or ["lambda"])}
    return list(map(float, solver.solve_many(changes).objective))
