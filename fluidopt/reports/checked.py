"""What else there is to know: the simulated check, what a promise costs, and how many GPUs it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluidopt.reports import pictures
from fluidopt.reports.blocks import Block, Items, Prose, Section, Table, Warn, blocks, unmade
from fluidopt.reports.making import Report, Unmade
from fluidopt.reports.summary import bound_in_words, counted, measured, natural, spoken
from fluidopt.service_levels import names_of
from fluidopt.studies.sizing.trace import TraceSize
from fluidopt.tables import number, shorten

if TYPE_CHECKING:
    from fluidopt.simulation.result import SimulationResult
    from fluidopt.studies.frontier import Frontier
    from fluidopt.studies.sizing.fleet import FleetSize

QUANTITIES = {
    "revenue_rate": "revenue, money/s",
    "throughput": "completed, requests/s",
    "prefill_queue": "waiting for prefill, requests",
    "decode_queue": "waiting for decode, requests",
    "time_to_first_token": "mean time to first token, s",
    "abandonment_share": "abandoned, share of arrivals",
    "role_decode": "decodes in service, requests",
}
WAITS = ("prefill_wait", "decode_wait", "time_to_first_token")


def simulation(report: Report) -> Section:
    """Plan against simulation, promises as measured, percentiles, and why not to believe them where that is so."""
    title = "The simulated check"
    result = report.result
    if isinstance(result, Unmade):
        return Section("simulation", title, unmade(report.why(result)))
    revenue = result.revenue_rate
    frame = result.to_frame()
    frame = frame.loc[list(QUANTITIES)].rename_axis(["quantity", "class or role"])
    percentiles = result.percentiles()
    if len(percentiles):
        percentiles = percentiles.rename_axis(["quantity", "class"])
    return Section(
        "simulation",
        title,
        blocks(
            Prose(
                f"The fleet of {counted(result.policy.gpus)} earns {measured(revenue)} money/s "
                f"per GPU{result.against_plan}. The gap is what a finite, random fleet loses; |z| above 2 is that, not "
                "noise."
            ),
            _distrust(result),
            _kept(report),
            Table(
                "simulated",
                "Plan against simulation, per GPU, with 95 % intervals",
                frame,
                {"fluid": "plan", "half_width": "±", "difference": "simulated less plan"},
                labels=QUANTITIES,
            ),
            pictures.simulated(result),
            Table(
                "percentiles",
                "Waits of those who are served, s",
                percentiles,
                {name: "±" if name.endswith("half_width") else name for name in map(str, percentiles.columns)},
                labels={name: name.replace("_", " ") for name in WAITS},
            )
            if len(percentiles)
            else None,
            Prose(f"How it was simulated: {result.caption}{_arrivals(report)}"),
        ),
    )


def _arrivals(report: Report) -> str:
    """Of a trace: which arrivals the simulation has."""
    if report.trace is None:
        return ""
    return (
        " The arrivals are Poisson at the mean rates of the recorded requests, and the lengths exponential; these very "
        "requests are replayed where the fleet is sized for TTFT and TPOT."
    )


def _distrust(result: SimulationResult) -> list[Warn]:
    """Why the simulation should not be believed, where it should not."""
    found = []
    if not result.stationary:
        found.append(
            Warn(
                "Do not rely on these numbers: the fleet still changed when the simulation ended. Simulate for longer "
                "(--horizon), or it never settles because more arrives than it can serve."
            )
        )
    revenue, wanted = result.revenue_rate, result.precision
    if wanted is not None and revenue.half_width > wanted * abs(revenue.mean):
        found.append(Warn(f"The precision of {wanted:g} was not reached within the horizon."))
    return found


def _kept(report: Report) -> list[Block]:
    """The plan's promises as simulated."""
    import pandas as pd

    if isinstance(report.promises, Unmade):
        return [Warn(f"Whether promises are kept could not be measured: {report.why(report.promises)}")]
    if not report.promises:
        return []
    verdict = {True: "kept", False: "NOT KEPT", None: "undecided"}
    frame = pd.DataFrame(
        {
            "measured": [each.measured for each in report.promises],
            "half_width": [each.half_width for each in report.promises],
            "verdict": [verdict[each.kept] for each in report.promises],
        },
        index=pd.Index([each.name for each in report.promises], name="promise"),
    )
    broken = [each.name for each in report.promises if each.kept is False]
    table = Table(
        "promises",
        "The plan's promises as simulated (what was measured over what is allowed: at most 1)",
        frame,
        {"half_width": "± 95 %"},
    )
    lead = (
        f"The plan keeps its promises in the fluid limit; this fleet does not keep {shorten(broken)}. Plan with a "
        "tighter bound, or with more GPUs."
    )
    return [Warn(lead), table] if broken else [table]


def frontier(report: Report) -> Section:
    """Revenue and price along the bound of a service level."""
    title = "What a promise costs"
    curve = report.frontier
    if isinstance(curve, Unmade):
        return Section("frontier", title, unmade(report.why(curve)))
    unit, scale = natural(curve.promises[0])
    return Section(
        "frontier",
        title,
        blocks(
            Prose(_lead(curve)),
            Items("What tightening it costs", _costs(curve)),
            pictures.frontier(curve, scale=scale, unit=unit),
            Table(
                "kinks",
                f"Where the price changes ({curve.promises[0].words})",
                curve.breakpoints.set_index("bound").rename_axis("bound"),
                {
                    "revenue_rate": "revenue, money/s per GPU",
                    "price_below": f"price just below, money/s per {curve.promises[0].unit}",
                    "price_above": "just above",
                    "jump": "jump of the revenue",
                },
                labels={str(each.bound): bound_in_words(curve.promises[0], each.bound) for each in curve.kinks},
            )
            if curve.kinks
            else None,
            Prose(f"How it was found: {curve.caption}"),
        ),
    )


def _lead(curve: Frontier) -> str:
    """What is varied, where plans end, and from where on it costs nothing."""
    (promise,) = curve.promises
    if not np.isfinite(curve.revenue_rate).any():
        return curve.statement
    rising = promise.loosens > 0
    sentences = [
        f"The most that can be earned where {spoken(promise)} must be {'at most' if rising else 'at least'} a bound",
        f"unpromised, {number(float(np.nanmax(curve.revenue_rate)))} money/s per GPU",
    ]
    if curve.free_from is not None:
        sentences.append(f"{bound_in_words(promise, curve.free_from)} or {'more' if rising else 'less'} costs nothing")
    if promise.least_feasible > 0 if rising else not (promise.unit == "1" and promise.least_feasible >= 1):
        end = bound_in_words(promise, promise.least_feasible)
        sentences.append(f"no plan keeps {'less' if rising else 'more'} than {end}")
    return f"{sentences[0]}: {'; '.join(sentences[1:])}."


def _costs(curve: Frontier) -> tuple[str, ...]:
    """What the next unit costs, piece by piece from the free end on."""
    (promise,) = curve.promises
    unit, scale = natural(promise)
    rising = promise.loosens > 0
    found = []
    for each in sorted(curve.kinks, key=lambda each: each.bound, reverse=rising)[:6]:
        price = each.price_below if rising else each.price_above
        found.append(
            f"{'Below' if rising else 'Above'} {bound_in_words(promise, each.bound)}, where the plan earns "
            f"{number(each.revenue_rate)}, 1 {unit} costs {number(abs(price) / scale)} money/s per GPU at first."
        )
    return tuple(found) or (f"In this range {spoken(promise)} has one price, or none.",)


def sizing(report: Report) -> Section:
    """The fleet that recorded requests need, replayed; or that of a perfect system at the mean rates."""
    title = "How many GPUs it takes"
    size = report.size
    if isinstance(size, Unmade):
        return Section("sizing", title, unmade(report.why(size)))
    made = _trace_sizing(size) if isinstance(size, TraceSize) else _fleet_sizing(report, size)
    return Section("sizing", title, made)


def _trace_sizing(size: TraceSize) -> tuple[Block, ...]:
    costs = {"least_cost": f"cost at least, {size.unit}", "cost": f"cost, {size.unit}"}
    frame = size.to_frame().rename_axis("GPU type")
    if size.unit == "GPUs":
        frame = frame.drop(columns=list(costs))
    return blocks(
        Prose(size.statement),
        Table(
            "fleets",
            f"GPUs for {size.promise}",
            frame,
            {
                "fluid_gpus": "perfect system, mean rates",
                "bound_gpus": "bound for every policy",
                "least_gpus": "GPUs at least",
                "gpus": "GPUs, replayed",
                "prefill_gpus": "of them prefill",
                "share": "share that meets both",
                "mean_ttft": "mean TTFT, s",
                "mean_tpot": "mean TPOT, s",
                **costs,
            },
        ),
        pictures.trace_fleet(size),
        Table(
            "tried",
            "Fleets that were replayed",
            size.tried.rename_axis(["GPU type", "GPUs"]),
            {
                "kept": "promise kept",
                "prefill_gpus": "of them prefill",
                "share": "share that meets both",
                "mean_ttft": "mean TTFT, s",
                "mean_tpot": "mean TPOT, s",
            },
            bars=("share",),
        ),
        Table(
            "intervals",
            "Rates by interval, and GPUs of a perfect system",
            size.intervals.set_index("start").rename_axis("from, s"),
            {
                "request_rate": "requests/s",
                "prompt_rate": "prompt tokens/s",
                "output_rate": "output tokens/s",
                "gpus": "GPUs",
            },
        ),
        Prose(size.caption),
    )


def _fleet_sizing(report: Report, size: FleetSize) -> tuple[Block, ...]:
    levels = names_of(size.problem.service_levels)
    asked = f"keeps {shorten([name.replace('_', ' ') for name in levels])}"
    lead = (
        f"The cheapest fleet of a perfect system that {'completes every request' if len(levels) == 1 else asked}: "
        f"{number(float(size.gpus.sum()))} GPUs, {int(size.whole_gpus.sum())} whole ones."
    )
    if report.trace is not None:
        lead += " It goes by the mean rates of the recorded requests; with --ttft and --tpot they are replayed instead."
    promises, frame = size.promises, size.to_frame().rename_axis("GPU type")
    if not size.problem.priced:
        frame = frame[["gpus", "whole_gpus"]]
    return blocks(
        Prose(lead),
        Warn("Rows and objectives of one's own are not part of the sizing.")
        if report.model.scenario.rows or report.model.scenario.objective
        else None,
        Table(
            "fleet",
            "The fleet by GPU type",
            frame,
            {
                "gpus": "GPUs",
                "whole_gpus": "rounded up",
                "hourly_price": "price, money/hour",
                "cost": "cost, money/hour",
                "whole_cost": "rounded up, money/hour",
            },
        ),
        Table(
            "fleet-classes",
            "By class (requests/s of the whole stream)",
            size.classes,
            {
                "arrival_rate": "arrive",
                "completed_share": "share completed",
                "mean_wait": "mean wait, s",
                "decode_queue": "wait for decode, requests",
                "marginal_cost": f"one more request/s, {size.unit}",
            },
            bars=("completed_share",),
        ),
        pictures.fleet(size),
        Table(
            "fleet-promises",
            f"What each promise costs ({size.unit} per unit of its bound)",
            promises,
            {"marginal_cost": "d(cost)/d(bound)"},
        )
        if len(promises)
        else None,
        Items("To know about it", size.notes),
    )
