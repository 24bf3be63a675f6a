"""What the optimum depends on, at the model's own numbers: derivatives, one by one, with the kinks among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidopt.errors import InfeasibleModel, InvalidInput
from fluidopt.inputs import is_number
from fluidopt.model import FluidModel
from fluidopt.plan import Plan
from fluidopt.program import LinearProgram, Lowering
from fluidopt.solvers import solve_program
from fluidopt.studies.sensitivity.parameters import (
    ModelParameter,
    checked_model,
    find_parameters,
    in_symbols,
    parameters_of,
)
from fluidopt.studies.sensitivity.tangent import Optimum, Slopes
from fluidopt.tables import number, text
from fluidopt.views import card, facts, figures, html, paragraph, signed_bar

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Beyond this many classes, parameters of single classes are looked at only where they are named.
MOST_CLASSES = 30
# Beyond this many entries of the program, both sides of a kink are looked at only where asked.
MOST_ENTRIES = 100_000
# Per 100 % of the parameter and relative to the optimum: less is rounding, and two sides that differ by less are one.
NOTHING, KINK = 1e-10, 1e-6


@dataclass(frozen=True)
class ParameterSensitivity:
    """How the optimum R* answers to one parameter."""

    parameter: str
    """Its name; a class field without a class is a factor on all classes, 1 at present."""
    value: float
    """Its present value."""
    unit: str
    left: float
    """dR*/d(parameter) to the left of the present value, money/s per GPU and unit; NaN where there is no plan, or where
    it was not looked at."""
    right: float
    """The same to the right."""
    derivative: float
    """dR*/d(parameter); NaN at a kink, where the two sides differ."""
    step_down: float = math.nan
    """Of whole numbers: R* less what it is at one less (exact, no derivative)."""
    step_up: float = math.nan
    """Of whole numbers: what R* is at one more, less R*."""
    note: str = ""
    """What is special: a kink, an end of the range, a relaxation."""

    @property
    def per_percent(self) -> float:
        """What 1 % more of the parameter brings, money/s per GPU."""
        return self.derivative * self.value / 100

    @property
    def kink(self) -> bool:
        """Whether the two sides are known and differ."""
        return math.isnan(self.derivative) and not math.isnan(self.left) and not math.isnan(self.right)

    @property
    def strength(self) -> float:
        """The larger side of what 100 % of the parameter would bring at the present rate, for ranking."""
        sides = [abs(each) for each in (self.left, self.right, self.derivative) if not math.isnan(each)]
        return max(sides, default=0.0) * abs(self.value)

    def _repr_html_(self) -> str:
        per = f"money/s per GPU and {self.unit}"
        return card(
            f"Sensitivity to {self.parameter}",
            figures(("Present value", self.value, self.unit), ("1 % more brings", self.per_percent, "money/s per GPU")),
            facts(("derivative", self.derivative, per), ("left", self.left, per), ("right", self.right, per)),
            paragraph(self.note, muted=True),
        )


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Local sensitivities of a plan: what a little more of each number of the model brings."""

    model: FluidModel
    objective: float
    """R*, the optimum: the revenue rate, money/s per GPU, less penalties of service levels."""
    entries: tuple[ParameterSensitivity, ...]

    def __getitem__(self, parameter: str) -> ParameterSensitivity:
        """One parameter's entry, by its name."""
        found = next((each for each in self.entries if each.parameter == parameter), None)
        if found is None:
            raise InvalidInput(
                f"Sensitivity has no parameter {parameter!r}; it has {', '.join(e.parameter for e in self.entries)}"
            )
        return found

    def elasticity(self, parameter: str) -> float:
        """% of R* per % of the parameter; NaN at a kink, or where R* is 0."""
        each = self[parameter]
        return each.derivative * each.value / self.objective if self.objective else math.nan

    def to_frame(self) -> pd.DataFrame:
        """A row per parameter.

        Columns: ``value``, ``unit``; ``derivative`` (money/s per GPU and unit), ``left`` and ``right``; ``elasticity``
        (% of R* per %), ``per_percent`` (money/s per GPU for 1 % more); ``step_down`` and ``step_up`` (whole numbers);
        ``note``.
        """
        import pandas as pd

        rows = [
            {
                "value": each.value,
                "unit": each.unit,
                "derivative": each.derivative,
                "left": each.left,
                "right": each.right,
                "elasticity": self.elasticity(each.parameter),
                "per_percent": each.per_percent,
                "step_down": each.step_down,
                "step_up": each.step_up,
                "note": each.note,
            }
            for each in self.entries
        ]
        return pd.DataFrame(rows, index=pd.Index([each.parameter for each in self.entries], name="parameter"))

    def price_ranges(self, rows: Sequence[str] | None = None) -> pd.DataFrame:
        """Every dual of the plan with the range of right sides in which it holds; see `Plan.price_ranges`."""
        return self.plan.price_ranges(rows)

    @property
    def plan(self) -> Plan:
        """The plan, solved anew."""
        return self.model.solve()

    def swings(self, change: float = 0.1) -> pd.DataFrame:
        """R* where each parameter alone is lower and higher by a share of itself; exact, by solving again.

        Columns: ``low`` and ``high`` (values of the parameter; whole numbers are rounded, by one at least),
        ``revenue_at_low`` and ``revenue_at_high`` (NaN where there is no plan), ``unit``; by decreasing swing.

        Args:
            change: the share, between 0 and 1.

        Raises:
            InvalidInput: another share.
        """
        import pandas as pd

        if not (is_number(change) and 0 < change < 1):
            raise InvalidInput(f"swings: change must be a share between 0 and 1; got {change!r}")
        elsewhere = _Elsewhere(self.model)
        rows = {}
        for each in find_parameters(self.model, [entry.parameter for entry in self.entries], "swings"):
            low, high = each.value * (1 - change), each.value * (1 + change)
            if each.whole:
                low, high = max(each.least, min(round(low), each.value - 1)), max(round(high), each.value + 1)
            rows[each.name] = {
                "low": low,
                "high": high,
                "revenue_at_low": elsewhere.optimum(each, low),
                "revenue_at_high": elsewhere.optimum(each, high),
                "unit": each.unit,
            }
        frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("parameter")
        swing = (frame[["revenue_at_low", "revenue_at_high"]] - self.objective).abs().max(axis=1).fillna(0.0)
        return frame.iloc[np.argsort(-swing.to_numpy(), kind="stable")]

    def tornado(self, change: float = 0.1) -> Figure:
        """R* where each parameter alone moves by a share of itself, the largest swings on top."""
        from fluidopt.studies.sensitivity.figures import plot_tornado

        return plot_tornado(self, change=change)

    def spider(self, change: float = 0.5) -> Figure:
        """R* against the relative change of each parameter, as exact curves."""
        from fluidopt.studies.sensitivity.figures import plot_spider

        return plot_spider(self, change=change)

    @property
    def statement(self) -> str:
        """The optimum and what moves it most, in words."""
        ranked = sorted(self.entries, key=lambda each: each.strength, reverse=True)
        strong = [each for each in ranked if each.strength > 0 and not each.kink and not math.isnan(each.derivative)]
        shown = ", ".join(f"{each.parameter} ({each.per_percent:+.3g})" for each in strong[:5])
        kinks = [each.parameter for each in self.entries if each.kink]
        bent = f" At a kink: {', '.join(kinks[:5])}{' and others' if len(kinks) > 5 else ''}." if kinks else ""
        moved = f" 1 % more brings, most first: {shown}." if shown else " Nothing here moves it."
        return f"R* is {number(self.objective)} money/s per GPU.{moved}{bent}"

    def to_dict(self) -> dict[str, Any]:
        """The sensitivities as JSON-able data; `from_dict` reads them back.

        Raises:
            InvalidInput: the model has no JSON form.
        """
        entries = [
            {
                name: None if isinstance(value, float) and math.isnan(value) else value
                for name, value in asdict(e).items()
            }
            for e in self.entries
        ]
        return {"model": self.model.to_dict(), "objective": self.objective, "entries": entries}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Read sensitivities back."""
        try:
            saved: list[dict[str, Any]] = [
                {name: math.nan if value is None else value for name, value in each.items()} for each in data["entries"]
            ]
            entries = tuple(ParameterSensitivity(**each) for each in saved)
            return cls(FluidModel.from_dict(data["model"]), float(data["objective"]), entries)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"not saved sensitivities: {error!r}") from None

    def __str__(self) -> str:
        return "\n".join([self.statement, "", text(self._shown)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        units = dict.fromkeys(("derivative", "left", "right"), "money/s per GPU and unit")
        units |= {"elasticity": "% per %", "per_percent": "money/s per GPU"}
        units |= dict.fromkeys(("step_down", "step_up"), "money/s per GPU")
        return card(
            "Sensitivity of the plan",
            figures(("R*", self.objective, "money/s per GPU")),
            paragraph(self.statement),
            html(self._shown, title="Parameters, each alone", units=units, bars={"per_percent": signed_bar}),
        )

    @property
    def _shown(self) -> pd.DataFrame:
        """The table without columns that say nothing here."""
        frame = self.to_frame()
        sides = [] if any(each.kink or "only" in each.note for each in self.entries) else ["left", "right"]
        empty = [name for name in ("step_down", "step_up") if frame[name].isna().all()]
        return frame.drop(columns=[*sides, *empty])


def sensitivity(
    model: FluidModel, parameters: Sequence[str] | str | None = None, *, sides: bool | None = None
) -> Sensitivity:
    """How the optimum answers to each number of the model: derivatives by the envelope theorem, both sides of kinks.

    The templates of the formulation are differentiated in symbols and evaluated on arrays; the service rates carry the
    derivative on to lengths, chunk and iteration times ([L26] eq. (4)). Where the optimum or its prices are not unique
    the two sides may differ: each is then the optimum of one linear program over the optimal faces, so that a kink is
    found and not guessed. B and C are whole numbers: their derivative is that of the relaxation, and the exact
    differences for one more and one less stand beside it.

    Args:
        model: a linear model.
        parameters: names such as ``arrival_rate[code]``, ``arrival_rate`` (a factor on all classes), ``alpha``,
            ``chunk_size``, ``output_price``, ``bound[mean_wait]`` (default: all; beyond 30 classes, those of single
            classes are left out).
        sides: whether both sides are looked at, at two linear programs of twice the size each (default: in programs
            of up to 100,000 entries; otherwise ``derivative`` is that of one optimal pair).

    Raises:
        InvalidInput: no such parameter, or a model that is not linear.
        InfeasibleModel: no plan satisfies all rows.
        SolverFailure: no certified answer.
    """
    checked_model(model, "sensitivity")
    if sides not in (None, True, False):
        raise InvalidInput(f"sensitivity: sides must be True, False or None; got {sides!r}")
    names = _usual(model) if parameters is None else parameters
    chosen = find_parameters(model, names, "sensitivity")
    objective = model.solve().objective
    program, numbers = in_symbols(model)
    slopes, optimum, elsewhere = Slopes(program, numbers), Optimum(model.program()), _Elsewhere(model)
    both = optimum.program.shape[0] * optimum.program.shape[1] <= MOST_ENTRIES if sides is None else sides
    local = _Local(slopes, optimum, elsewhere, objective, both)
    return Sensitivity(model.copy(), objective, tuple(local.entry(each) for each in chosen))


def _usual(model: FluidModel) -> list[str]:
    """The parameters that are looked at where none are named."""
    many = len(model.workload) > MOST_CLASSES
    return [name for name, each in parameters_of(model).items() if not (many and each.members and not each.factor)]


@dataclass(frozen=True)
class _Local:
    """Derivatives at one optimum."""

    slopes: Slopes
    optimum: Optimum
    elsewhere: _Elsewhere
    objective: float
    both: bool

    def entry(self, each: ModelParameter) -> ParameterSensitivity:
        """How the optimum answers to one parameter."""
        steps = self._steps(each) if each.whole else (math.nan, math.nan)
        if reason := self._no_derivative(each):
            nothing = math.nan
            return ParameterSensitivity(each.name, each.value, each.unit, nothing, nothing, nothing, *steps, reason)
        right = self.slopes.along(each.slope(1))
        notes = ["derivative of the relaxation"] if each.whole else []
        at_least = each.value <= each.least
        if not self.both:
            notes.append("sides not looked at: one of several values if the optimum is degenerate")
            rate = self._rounded(self.optimum.envelope(right), each)
            return ParameterSensitivity(
                each.name, each.value, each.unit, math.nan, math.nan, rate, *steps, "; ".join(notes)
            )
        above = self._rounded(self.optimum.rate(right), each)
        below = math.nan if at_least else self._rounded(-self.optimum.rate(self._leftwards(each)), each)
        derivative = self._one(below, above, each)
        if at_least:
            derivative = above
            notes.append("at its least value: to the right only")
        elif math.isnan(above) or math.isnan(below):
            notes.append(f"no plan to the {'right' if math.isnan(above) else 'left'}: holds to one side only")
            derivative = below if math.isnan(above) else above
        elif math.isnan(derivative):
            notes.append("kink: one derivative to the left, another to the right")
        return ParameterSensitivity(
            each.name, each.value, each.unit, below, above, derivative, *steps, "; ".join(notes)
        )

    def _leftwards(self, each: ModelParameter) -> LinearProgram:
        """How the program starts to move where the parameter falls."""
        return self.slopes.along({name: -slope for name, slope in each.slope(-1).items()})

    def _no_derivative(self, each: ModelParameter) -> str:
        """Why there is none; empty where there is."""
        classes = each.model.scenario.classes
        if each.field == "abandonment_rate" and any(classes[at].abandonment_rate == 0 for at in each.members):
            return "a class that never gives up is another model: R* may jump at 0"
        if each.field == "batch_size" and each.value == 1:
            return "at 1 no decode runs beside a prefill, above 1 some do: see the step"
        return ""

    def _rounded(self, rate: float, each: ModelParameter) -> float:
        """0 where the rate is rounding."""
        return 0.0 if abs(rate) * each.scale <= NOTHING * abs(self.objective) else rate

    def _one(self, left: float, right: float, each: ModelParameter) -> float:
        """The derivative, where both sides agree."""
        room = KINK * (abs(self.objective) / each.scale + abs(left) + abs(right))
        return 0.5 * (left + right) if abs(right - left) <= room else math.nan

    def _steps(self, each: ModelParameter) -> tuple[float, float]:
        """What one less costs and what one more brings."""
        less = (
            math.nan if each.value - 1 < each.least else self.objective - self.elsewhere.optimum(each, each.value - 1)
        )
        return less, self.elsewhere.optimum(each, each.value + 1) - self.objective


class _Elsewhere:
    """The optimum with one parameter elsewhere; everything else as the model has it."""

    def __init__(self, model: FluidModel) -> None:
        self._lowering = Lowering(*in_symbols(model))

    def program(self, parameter: ModelParameter, value: float) -> LinearProgram:
        """The program there."""
        numbers = parameter.numbers(value)
        before = {name: self._lowering.numbers.values[name] for name in numbers}
        self._lowering.change(numbers)
        try:
            return self._lowering.run()
        finally:
            self._lowering.change(before)

    def optimum(self, parameter: ModelParameter, value: float) -> float:
        """R* there; NaN where there is no plan."""
        try:
            return solve_program(self.program(parameter, value)).certificate.objective
        except InfeasibleModel:
            return math.nan
