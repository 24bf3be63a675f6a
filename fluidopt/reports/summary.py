"""The head of a page: the few numbers that matter, each with the sentence that says what it means."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fluidopt.plan import SIGNIFICANT
from fluidopt.reports.blocks import Figure
from fluidopt.reports.making import Report, Unmade
from fluidopt.service_levels import names_of
from fluidopt.studies.sizing.trace import TraceSize
from fluidopt.tables import number, shorten

if TYPE_CHECKING:
    from fluidopt.model import FluidModel
    from fluidopt.plan import Plan
    from fluidopt.simulation.result import SimulationResult
    from fluidopt.simulation.statistics import Estimate
    from fluidopt.studies.frontier import Frontier, Promise

# A bound's own unit, the one people speak in, how many of the latter make one of the former.
NATURAL = {"s/token": ("ms", 1e3), "s": ("s", 1.0), "1": ("percentage point", 100.0)}


def figures(report: Report) -> tuple[Figure, ...]:
    """Revenue in the fluid limit and simulated, who is served, the fleet needed, and what a promise costs."""
    found: list[Figure | None] = []
    if not isinstance(report.plan, Unmade):
        found.append(_optimum(report, report.plan))
    if not isinstance(report.result, Unmade):
        found.append(_simulated(report.result))
    if not isinstance(report.plan, Unmade):
        found.append(_completed(report.plan))
    if not isinstance(report.size, Unmade):
        found.append(_fleet(report))
    if not isinstance(report.frontier, Unmade):
        found.append(_promise(report.model, report.frontier))
    return tuple(each for each in found if each is not None)


def _optimum(report: Report, plan: Plan) -> Figure:
    gpus, rate = report.settings.gpus, plan.revenue_rate
    whole = f", {number(rate * gpus)} money/s on {counted(gpus)}" if gpus else ""
    sentence = f"In the fluid limit the plan earns {number(rate)} money/s per GPU{whole}"
    bound = report.result.bound if not isinstance(report.result, Unmade) else None
    if bound is None:
        sentence += "."
    elif bound.holds and math.isclose(bound.rate, rate, rel_tol=1e-6):
        sentence += "; no policy earns more."
    else:  # promises, rows or another objective lower the plan's revenue below the bound
        sentence += f". {bound.statement}"
    return Figure("Fluid optimum", number(rate), rate, "money/s per GPU", sentence)


def _simulated(result: SimulationResult) -> Figure:
    revenue, policy = result.revenue_rate, result.policy
    sentence = (
        f"Simulated on {counted(policy.gpus)}, {policy.kind} earns {measured(revenue)} money/s per GPU (95 %)"
        f"{result.against_plan}."
    )
    if not result.stationary:
        sentence += " Do not rely on it: the fleet had not settled when the simulation ended."
    return Figure(
        "Simulated fleet",
        measured(revenue),
        revenue.mean,
        "money/s per GPU",
        sentence,
    )


def _completed(plan: Plan) -> Figure | None:
    rates = plan.model.workload.arrival_rate
    if not rates.sum() > 0:
        return None
    names = np.array(plan.model.workload.names, dtype=object)
    whole = plan.throughput >= (1 - SIGNIFICANT) * rates
    none = ~whole & (plan.throughput <= SIGNIFICANT * rates)
    parts = [
        f"{'every class' if group.all() else _named(names[group])} {how}"
        for how, group in (("in full", whole), ("in part", ~whole & ~none), ("not at all", none))
        if group.any()
    ]
    share = float(plan.throughput.sum() / rates.sum())
    sentence = f"The plan completes {share:.1%} of the requests that arrive: {'; '.join(parts)}."
    return Figure("Completed in the plan", f"{100 * share:.1f}", 100 * share, "% of the requests", sentence)


def _named(names: Iterable[object]) -> str:
    """Names of classes in a sentence; in quotation marks, as they may hold commas of their own."""
    return shorten([f"“{name}”" for name in names], most=4)


def _fleet(report: Report) -> Figure:
    size, gpus = report.size, report.settings.gpus
    assert not isinstance(size, Unmade)
    if isinstance(size, TraceSize):
        return Figure(
            "GPUs needed, replayed", f"{size.gpus}", float(size.gpus), "GPUs", size.statement.partition(". ")[0] + "."
        )
    exact, whole = float(size.gpus.sum()), int(size.whole_gpus.sum())
    have = f"; this fleet has {gpus}" if gpus else ""
    promise = (
        "Completing every request"
        if len(size.problem.service_levels) == 1
        else "Completing the requests and keeping the promises"
    )
    sentence = (
        f"{promise} takes {number(exact)} GPUs of a perfect system, {whole} whole ones, and more of a real one{have}."
    )
    return Figure("GPUs needed at least", f"{whole}", float(whole), "GPUs", sentence)


def _promise(model: FluidModel, curve: Frontier) -> Figure | None:
    """What the promise that the model makes costs, or else the first unit of one; None where nothing is to be paid."""
    (promise,) = curve.promises
    given, top = promised(model, promise), float(np.nanmax(curve.revenue_rate))
    found = first_price(curve) if given is None else (given, price_at(curve, given))
    if found is None or not top > 0:
        return None
    at, price = found
    step, unit = _step(promise, at)
    cost = step * price
    limit, side = ("at most", "less") if promise.loosens > 0 else ("at least", "more")
    sentence = f"{spoken(promise)} {limit} {bound_in_words(promise, at)}"
    if given is None:
        sentence += f" costs nothing; the first {unit} {side} costs"
    else:
        lost = max(top - float(np.interp(at, curve.points[promise.name], curve.revenue_rate)), 0.0)
        sentence += f", as promised, costs {number(lost)} money/s per GPU; {unit} {side} would cost another"
    sentence += f" {number(cost)} money/s per GPU, {cost / top:.2%} of the revenue, at that rate."
    label = f"Price of {spoken(promise)}"
    return Figure(label, number(cost), cost, f"money/s per {unit}", sentence[0].upper() + sentence[1:])


def _step(promise: Promise, at: float) -> tuple[float, str]:
    """How much tighter a bound is made to say what that costs: in its own unit, and in words.

    One of the unit people speak in, or a tenth, a hundredth: no more than there is up to the tightest bound.
    """
    unit, scale = natural(promise)
    room = scale * abs(at - promise.least_feasible)
    step = 1.0 if room >= 1 or room <= 0 else 10.0 ** math.floor(math.log10(room))
    return step / scale, unit if step == 1 else f"{number(step)} {unit}"


def promised(model: FluidModel, promise: Promise) -> float | None:
    """The bound that the model itself promises; None where the promise is not one of its own."""
    levels = model.scenario.service_levels
    own = dict(zip(names_of(levels), levels, strict=True)).get(promise.name)
    return None if own is None else float(getattr(own, promise.field))


def price_at(curve: Frontier, bound: float) -> float:
    """What a unit costs at a bound, going tighter: the price at the nearest point of the grid on that side."""
    (promise,) = curve.promises
    bounds, prices = (np.asarray(curve.points[name]) for name in (promise.name, "shadow_price"))
    tighter = (bounds <= bound if promise.loosens > 0 else bounds >= bound) & np.isfinite(prices)
    if not tighter.any():
        return 0.0
    return abs(float(prices[tighter][-1 if promise.loosens > 0 else 0]))


def first_price(curve: Frontier) -> tuple[float, float] | None:
    """The tightest bound that costs nothing, and the price of a unit on its tight side; None where there is none."""
    (promise,) = curve.promises
    free = curve.free_from
    kinks = [each for each in curve.kinks if each.bound == free]
    if free is None or not kinks:
        return None
    return free, abs(kinks[0].price_below if promise.loosens > 0 else kinks[0].price_above)


def counted(gpus: int) -> str:
    """A number of GPUs in words."""
    return f"{gpus} GPU{'s' if gpus != 1 else ''}"


def measured(estimate: Estimate) -> str:
    """An estimate with its 95 % interval."""
    return f"{estimate.mean:.5g} ± {estimate.half_width:.2g}"


def natural(promise: Promise) -> tuple[str, float]:
    """The unit people speak in, and how many of it make one of the bound's."""
    return NATURAL.get(promise.unit, (promise.unit, 1.0))


def spoken(promise: Promise) -> str:
    """The promise without its direction and unit."""
    return promise.words.rpartition(" at ")[0]


def bound_in_words(promise: Promise, value: float) -> str:
    """A value of the bound in the unit people speak in."""
    unit, scale = natural(promise)
    return f"{number(scale * value)} {'%' if promise.unit == '1' else unit}"
