"""This module owns `report`: everything that is computed for a page, each part whether or not the others came about."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from fluidopt.errors import FluidoptError, InvalidInput
from fluidopt.inputs import is_number, is_whole
from fluidopt.model import FluidModel
from fluidopt.scenario import Scenario
from fluidopt.service_levels import (
    AbandonmentShare,
    CompletionFloor,
    DecodeFairness,
    MeanTPOT,
    MeanTTFT,
    MeanWait,
    PrefillFairness,
    SlotTPOT,
    names_of,
)
from fluidopt.traces.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

    from fluidopt.plan import Plan
    from fluidopt.policy import Policy
    from fluidopt.policy.promises import Promise
    from fluidopt.reports.blocks import Figure, Section
    from fluidopt.service_levels import ServiceLevel
    from fluidopt.simulation.result import SimulationResult
    from fluidopt.studies.frontier import Frontier
    from fluidopt.studies.sizing.fleet import FleetSize
    from fluidopt.studies.sizing.trace import TraceSize
    from fluidopt.traces.classify import Classification

T = TypeVar("T")
# Ranges are found row by row: of a large model only those of the rows that matter most.
MOST_RANGES = 40
# Along slot TPOT revenue bends at about as many kinks as there are classes, each found by bisection: under a second for
# 20 classes, 20 s for 60. Along a floor on completions it is piecewise linear: under a second for 60, a minute for 200.
MOST_BENT, MOST_STRAIGHT = 24, 100
# What a frontier can be drawn along where the model promises nothing; the bounds do not matter.
LEVELS: tuple[ServiceLevel, ...] = (
    SlotTPOT(at_most=1.0),
    MeanTTFT(at_most=1.0),
    MeanTPOT(at_most=1.0),
    MeanWait(at_most=1.0),
    AbandonmentShare(at_most=1.0),
    CompletionFloor(share=0.0),
    PrefillFairness(at_most=1.0),
    DecodeFairness(at_most=1.0),
)


@dataclass(frozen=True, eq=False)
class Unmade:
    """A part that could not be made."""

    error: FluidoptError

    @property
    def why(self) -> str:
        """The reason, as a sentence."""
        return str(self.error)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a report was asked for, beside the model.

    Raises:
        InvalidInput: a value breaks a rule.
    """

    gpus: int | None
    policy: str | None
    horizon: float | None
    """None where the precision says how long."""
    precision: float | None
    warmup: float | None
    replications: int
    start: Literal["empty", "fluid"]
    seed: int
    ttft: float | None
    tpot: float | None
    percentile: float | None
    promise: ServiceLevel | str | None

    def __post_init__(self) -> None:
        from fluidopt.policy.extract import RULES
        from fluidopt.simulation.experiment import checked_window

        if self.gpus is not None and not is_whole(self.gpus, least=1):
            raise InvalidInput(f"report: gpus must be a whole number of at least 1; got {self.gpus!r}")
        if not is_whole(self.seed, least=0):
            raise InvalidInput(f"report: seed must be a whole number of at least 0; got {self.seed!r}")
        for name in ("ttft", "tpot"):
            limit = getattr(self, name)
            if limit is not None and not (is_number(limit) and limit > 0):
                raise InvalidInput(f"report: {name} must be a number of seconds above 0; got {limit!r}")
        if self.policy is not None and self.policy not in (*RULES, "refined"):
            known = ", ".join((*RULES, "refined"))
            raise InvalidInput(f"report: policy must be one of {known}; got {self.policy!r}")
        if self.precision is not None and not (is_number(self.precision) and 0 < self.precision < 1):
            raise InvalidInput(f"report: precision must be between 0 and 1; got {self.precision!r}")
        checked_window(self.horizon, self.warmup, self.replications, self.start)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Report:
    """Everything about one instance, for the person who decides: inputs, plan, prices, simulation, sizing, conditions.

    A part that could not be made is `Unmade`, and the page says why; it does not lose the others.
    """

    model: FluidModel
    settings: Settings
    trace: Trace | None = None
    classes: Classification | None = None
    """How the trace was classified."""
    plan: Plan | Unmade
    ranges: pd.DataFrame | Unmade
    """`Plan.price_ranges` of the rows that matter most."""
    policy: Policy | Unmade
    result: SimulationResult | Unmade
    promises: tuple[Promise, ...] | Unmade
    """The plan's hard promises as simulated; empty where it makes none."""
    frontier: Frontier | Unmade
    size: FleetSize | TraceSize | Unmade
    command: str | None = None
    """The command line that made it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each part took, s; not on the page, which the same inputs and seed make the same."""

    @cached_property
    def figures(self) -> tuple[Figure, ...]:
        """The few numbers that matter, each with a sentence."""
        from fluidopt.reports.summary import figures

        return figures(self)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The page, part by part, before anyone decides how it looks."""
        from fluidopt.reports.sections import sections_of

        return sections_of(self)

    @property
    def title(self) -> str:
        """What the report is about, in one line."""
        from fluidopt.reports.summary import counted

        classes, gpus = len(self.model.workload), self.settings.gpus
        whom = f"{classes} class{'es' if classes != 1 else ''} of requests"
        return f"Serving plan for {whom}" + (f" on {counted(gpus)}" if gpus else "")

    @property
    def unmade(self) -> dict[str, Unmade]:
        """The parts that could not be made, by name."""
        names = ("plan", "ranges", "policy", "result", "promises", "frontier", "size")
        return {name: part for name in names if isinstance(part := getattr(self, name), Unmade)}

    def why(self, part: Unmade) -> str:
        """Why a part could not be made; where another that it needs could not, that one's name will do."""
        first = next(name for name, other in self.unmade.items() if other.error is part.error)
        return part.why if getattr(self, first) is part else f"it needs the {first}, which could not be made"

    def to_html(self) -> str:
        """The page: one HTML document that needs nothing else, in dark and light, on paper, and without scripts."""
        from fluidopt.reports.page import page

        return page(self)

    def save(self, path: str | Path) -> None:
        """Write the page to a file.

        Raises:
            InvalidInput: the file cannot be written.
        """
        if not isinstance(path, str | Path):
            raise InvalidInput(f"Report.save: path must be a file name; got {path!r}")
        try:
            Path(path).write_text(self.to_html(), encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"Report.save: {str(path)!r} cannot be written: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What the page says, as JSON-able data: the figures of its head, and its sections block by block."""
        return {
            "title": self.title,
            "source": self.model.scenario.source,
            "command": self.command,
            "figures": [each.to_dict() for each in self.figures],
            "sections": [each.to_dict() for each in self.sections],
            "scenario": self.model.scenario.to_dict(),
        }

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {each.sentence}" for each in self.figures)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from fluidopt.views import bullets, card

        return card(self.title, bullets("", [each.sentence for each in self.figures]))


def report(
    subject: FluidModel | Trace,
    *,
    gpus: int | None = None,
    scenario: Scenario | None = None,
    classes: int | None = None,
    abandonment_rate: float = 0.0,
    policy: str | None = None,
    horizon: float = 2000.0,
    precision: float | None = None,
    warmup: float | None = None,
    replications: int = 8,
    start: Literal["empty", "fluid"] = "empty",
    seed: int = 1,
    promise: ServiceLevel | str | None = None,
    ttft: float | None = None,
    tpot: float | None = None,
    percentile: float | None = 90.0,
    command: str | None = None,
) -> Report:
    """Compute everything about a model, or about recorded requests, that a decision needs, for one page.

    Args:
        subject: a model, or a trace, whose requests become the classes.
        gpus: GPUs in the fleet (default: the scenario's). A trace is divided among them; with ``ttft`` and ``tpot`` it
            may be left out, and is then the number that sizing finds.
        scenario: with a trace: GPU types, prices, charging and promises (default: the reference instance's). Its own
            classes are left aside.
        classes: with a trace: how many classes to form (default: chosen).
        abandonment_rate: with a trace: 1/s at which a waiting request gives up; 0 for never.
        policy: kind of policy, as for `Plan.policy`.
        horizon: simulated seconds per replication, warm-up included; not used with ``precision``.
        precision: run until the revenue is known to this part of it (0.001: 0.1 %).
        warmup: seconds not measured (default: chosen by MSER).
        replications: independent replications, at least 2.
        start: ``"empty"``, or ``"fluid"``: the plan's equilibrium.
        seed: of all random streams, a whole number of at least 0.
        promise: along whose bound the frontier is drawn (default: the model's first hard promise, else slot TPOT, or of
            more than 24 classes a floor on completions; none of more than 100).
        ttft: time to first token at most, s, for sizing.
        tpot: time per output token at most, s, for sizing. Of a trace, sizing needs both, or neither: then every
            request is completed at the mean rates.
        percentile: with a trace: per cent of the requests that must meet both; None: the means must. Of a model they
            are means.
        command: the command line, where there is one, for the page.

    Raises:
        InvalidInput: an argument breaks a rule. What fails later, such as a plan where none exists, is `Unmade`.
    """
    settings = Settings(
        gpus=gpus,
        policy=policy,
        horizon=horizon if precision is None else None,
        precision=precision,
        warmup=warmup,
        replications=replications,
        start=start,
        seed=seed,
        ttft=ttft,
        tpot=tpot,
        percentile=percentile,
        promise=promise,
    )
    _check(subject, settings, scenario, classes, abandonment_rate)
    with _steps() as step:
        found: Classification | None = None
        replayed: TraceSize | Unmade | None = None
        if isinstance(subject, Trace):
            base = scenario if scenario is not None else _reference()
            if ttft is not None:
                replayed = step("sizing", lambda: _trace_size(subject, base, settings, classes))
            settings = replace(settings, gpus=gpus if gpus is not None else _made(replayed).gpus)
            found = step.needed("classes", lambda: _classified(subject, classes, abandonment_rate))
            model = _model_of(base, found, settings.gpus)
        else:
            model = _resized(subject, gpus)
            settings = replace(settings, gpus=gpus if gpus is not None else model.scenario.gpus)
        varied = _varied(model, promise)
        plan = step("plan", model.solve)
        ranges = step("prices", lambda: _ranges(_made(plan)))
        rules = step("policy", lambda: _policy(_made(plan), settings))
        result = step("simulation", lambda: _simulated(_made(rules), settings))
        promises = step("promises", lambda: _promises(_made(plan), _made(result), seed))
        curve = step("frontier", lambda: _frontier(model, varied))
        size = replayed if replayed is not None else step("sizing", lambda: _fleet_size(model, settings))
        return Report(
            model=model,
            settings=settings,
            trace=subject if isinstance(subject, Trace) else None,
            classes=found,
            plan=plan,
            ranges=ranges,
            policy=rules,
            result=result,
            promises=promises,
            frontier=curve,
            size=size,
            command=command,
            seconds=step.seconds,
        )


def _check(
    subject: object, settings: Settings, scenario: Scenario | None, classes: int | None, abandonment_rate: float
) -> None:
    if scenario is not None and not isinstance(scenario, Scenario):
        raise InvalidInput(f"report: scenario must be a Scenario (see read_scenario); got {type(scenario).__name__}")
    if isinstance(subject, FluidModel):
        if scenario is not None or classes is not None or abandonment_rate:
            raise InvalidInput("report: scenario, classes and abandonment_rate go with a trace; the model has its own")
    elif not isinstance(subject, Trace):
        raise InvalidInput(
            f"report: subject must be a FluidModel or a Trace; got {type(subject).__name__} "
            "(FluidModel.from_scenario and read_trace read files)"
        )
    elif (settings.ttft is None) != (settings.tpot is None):
        raise InvalidInput("report: of a trace, ttft and tpot go together; give both, or neither")
    elif settings.gpus is None and settings.ttft is None:
        raise InvalidInput(
            "report: gpus is required with a trace: the number of GPUs that share its requests; "
            "or give ttft and tpot, for which the fleet is sized"
        )


# ---- the parts ----------------------------------------------------------------------------------------------------


class _Step:
    """Makes one part after the other, keeps what fails as `Unmade`, and the time each took."""

    def __init__(self, begun: Callable[[str], None]) -> None:
        self.begun = begun
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, make: Callable[[], T]) -> T | Unmade:
        self.begun(name)
        since = time.perf_counter()
        try:
            return make()
        except FluidoptError as error:
            return Unmade(error)
        finally:
            self.seconds[name] = time.perf_counter() - since

    def needed(self, name: str, make: Callable[[], T]) -> T:
        """A part without which there is no page."""
        return _made(self(name, make))


@contextmanager
def _steps() -> Iterator[_Step]:
    """Steps that say on a terminal which one is being made."""
    from tqdm import tqdm

    with tqdm(
        bar_format="{desc}", desc="report", file=sys.stderr, disable=None, leave=False, delay=1.0, total=1
    ) as shown:
        yield _Step(lambda name: shown.set_description_str(f"report: {name}"))


def _made(part: T | Unmade | None) -> T:
    """A part that is needed for another; fails as it did."""
    if isinstance(part, Unmade):
        raise part.error
    assert part is not None
    return part


def _reference() -> Scenario:
    from fluidopt.reference import reference_model

    return reference_model().scenario


def _classified(trace: Trace, classes: int | None, abandonment_rate: float) -> Classification:
    from fluidopt.traces.classify import classify

    return classify(trace, classes, abandonment_rate=abandonment_rate)


def _model_of(base: Scenario, classes: Classification, gpus: int | None) -> FluidModel:
    assert gpus is not None
    return FluidModel.from_scenario(base.with_workload(classes.workload.per_gpu(gpus), gpus=gpus))


def _resized(model: FluidModel, gpus: int | None) -> FluidModel:
    """The model for another number of GPUs, among which total rates, if it gives totals, are divided."""
    if gpus in (None, model.scenario.gpus) or model.scenario.rates == "per_gpu":
        return model
    return FluidModel.from_scenario(replace(model.scenario, gpus=gpus))


def _ranges(plan: Plan) -> pd.DataFrame:
    """Ranges of the shadow prices that are not 0, the limits that carry most revenue first."""
    prices, right = plan.solution.duals, plan.program.row_upper
    worth = np.abs(prices * np.where(np.isfinite(right), right, 0.0))
    order = np.lexsort((-np.abs(prices), -worth))
    names = [plan.program.row_names[at] for at in order if abs(prices[at]) > 1e-9 * (1.0 + abs(plan.objective))]
    # prefill_slots only says that a mode with a prefill lasts as long as its prefill.
    limits = [name for name in names if not name.startswith("prefill_slots")]
    return plan.price_ranges(limits[:MOST_RANGES])


def _policy(plan: Plan, settings: Settings) -> Policy:
    if settings.gpus is None:
        raise InvalidInput("a policy needs the number of GPUs in the fleet; give gpus, or --gpus")
    return plan.policy(gpus=settings.gpus, kind=settings.policy)


def _simulated(policy: Policy, settings: Settings) -> SimulationResult:
    return policy.simulate(
        horizon=settings.horizon,
        precision=settings.precision,
        warmup=settings.warmup,
        replications=settings.replications,
        seed=settings.seed,
        start=settings.start,
    )


def _promises(plan: Plan, result: SimulationResult, seed: int) -> tuple[Promise, ...]:
    """The plan's hard promises as measured in the fleet that was simulated."""
    from fluidopt.policy.refine import measured_promises

    return measured_promises(plan, result, seed)


def _varied(model: FluidModel, promise: ServiceLevel | str | None) -> ServiceLevel | str | None:
    """The service level along which the frontier is drawn, or the name of one that the model has; None for none.

    Raises:
        InvalidInput: there is none of this name.
    """
    levels = model.scenario.service_levels
    names, known = names_of(levels), {level.kind: level for level in LEVELS}
    if promise is None:
        hard = [name for name, level in zip(names, levels, strict=True) if level.penalty is None]
        if hard or len(model.workload) > MOST_STRAIGHT:
            return hard[0] if hard else None
        return known["slot_tpot" if len(model.workload) <= MOST_BENT else "completion_floor"]
    if not isinstance(promise, str) or promise in names:
        return promise
    if promise not in known:
        raise InvalidInput(
            f"report: promise must be one of {', '.join(known)}, or the name of one that the model has; got {promise!r}"
        )
    return known[promise]


def _frontier(model: FluidModel, promise: ServiceLevel | str | None) -> Frontier:
    from fluidopt.studies.frontier import frontier

    if promise is None:
        raise InvalidInput(
            f"a frontier of {len(model.workload)} classes can take minutes, so none is drawn unasked; name a promise, "
            "such as completion_floor (--promise)"
        )
    return frontier(model, promise)


def _fleet_size(model: FluidModel, settings: Settings) -> FleetSize:
    """The least fleet of a perfect system that completes every request and keeps the hard promises."""
    from fluidopt.studies.sizing.fleet import size_fleet

    if settings.gpus is None:
        raise InvalidInput(
            "sizing needs the whole stream, and the scenario gives its rates per GPU; give gpus, or --gpus, to say of "
            "how many"
        )
    scenario = model.scenario
    levels: list[ServiceLevel] = [level for level in scenario.service_levels if level.penalty is None]
    if not any(isinstance(level, CompletionFloor) for level in levels):
        levels.insert(0, CompletionFloor(share=1.0))
    if settings.ttft is not None:
        levels.append(MeanTTFT(at_most=settings.ttft))
    if settings.tpot is not None:
        levels.append(MeanTPOT(at_most=settings.tpot))
    return size_fleet(
        model.workload.scaled(settings.gpus),
        scenario.gpu_types,
        prices=scenario.prices,
        charging=scenario.charging,
        service_levels=levels,
    )


def _trace_size(trace: Trace, base: Scenario, settings: Settings, classes: int | None) -> TraceSize:
    from fluidopt.studies.sizing.trace import size_trace

    assert settings.ttft is not None
    assert settings.tpot is not None
    return size_trace(
        trace,
        [replace(each, operating_modes=None, share=1.0) for each in base.gpu_types],
        ttft=settings.ttft,
        tpot=settings.tpot,
        percentile=settings.percentile,
        classes=classes,
        prices=base.prices,
        seed=settings.seed,
    )
