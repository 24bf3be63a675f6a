"""What to believe: what theory promises about this instance and what not, and how the page was made."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import fluidopt
from fluidopt.contention import warn_if_unphysical
from fluidopt.errors import ContentionWarning
from fluidopt.reports.blocks import Items, Section, Source, Table, Warn, blocks
from fluidopt.reports.making import Report, Unmade
from fluidopt.reports.summary import counted
from fluidopt.tables import number
from fluidopt.traces.statistics import ALL

if TYPE_CHECKING:
    import pandas as pd

    from fluidopt.model import FluidModel
    from fluidopt.scenario import Scenario
    from fluidopt.traces.trace import Trace

# A scenario of more classes is too long to be printed on its page.
MOST_PRINTED = 50


def theory(report: Report) -> Section:
    """Guarantees, the conditions they rest on, notes on the plan, and what is assumed."""
    from fluidopt.policy.bound import revenue_bound

    title = "What theory promises here, and what not"
    if isinstance(report.plan, Unmade):
        return Section("theory", title, blocks(Items("Not promised", _not_promised(report))))
    plan = report.plan
    bound = report.result.bound if not isinstance(report.result, Unmade) else revenue_bound(plan)
    promised = (
        bound.statement,
        f"The plan is optimal for the fluid model, to its certificate: {plan.certificate}.",
        "Proposition 3.2 applies: some optimal plan has no decode queue."
        if plan.decode_buffer_vanishes
        else "Proposition 3.2 does not apply (kappa < (B-1)/B): an optimal plan may need a decode queue.",
    )
    frame: pd.DataFrame = bound.to_frame()
    return Section(
        "theory",
        title,
        blocks(
            Items("Promised", promised),
            Table("conditions", "What the bound rests on", frame, {"why": "what was found"}),
            [Warn(each) for each in _unphysical(report.model)],
            Items("Notes on this plan", plan.notes),
            Items("Not promised", _not_promised(report)),
        ),
    )


def _unphysical(model: FluidModel) -> list[str]:
    """Warnings about GPU types whose prefills would speed decodes up."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ContentionWarning)
        for gpu in model.gpu_types:
            warn_if_unphysical(gpu)
    return [str(each.message) for each in found]


def _not_promised(report: Report) -> tuple[str, ...]:
    gpus = report.settings.gpus
    found = [
        "The revenue of a finite fleet: the policy is optimal only as the fleet grows"
        + (f"; {counted(gpus)} {'lose' if gpus > 1 else 'loses'} what the simulation shows." if gpus else "."),
        "Exponential lengths and Poisson arrivals are assumed in the simulation; the bound needs no Poisson arrivals.",
        "Percentiles: the plan knows means; the simulation and the replay give percentiles.",
        "KV memory, prefix caches and transfers between GPUs, unless a service level or a row says so.",
    ]
    if report.trace is not None:
        found.append(_recorded_is_not(report.trace))
    return tuple(found)


def _recorded_is_not(trace: Trace) -> str:
    uneven = trace.dispersion()
    row: Any = uneven[uneven["label"] == ALL].iloc[-1]
    outside = row.dispersion > row.poisson_high
    return (
        f"The recorded stream {'is burstier than' if outside else 'is as even as'} a Poisson one in windows of "
        f"{number(row.window)} s: variance {number(row.dispersion)} times the mean (Poisson: {number(row.poisson_low)} "
        f"to {number(row.poisson_high)})."
    )


def method(report: Report) -> Section:
    """Version, seed, sources, solver, command, and the scenario as a file."""
    settings, scenario = report.settings, report.model.scenario
    made = [
        f"fluidopt {fluidopt.__version__}, numpy {version('numpy')}, highspy {version('highspy')}.",
        f"Seed {settings.seed}; the same inputs and seed give the same page.",
    ]
    if scenario.source:
        made.append(f"Source of the numbers: {scenario.source}.")
    if not isinstance(report.plan, Unmade):
        made.append(f"Solved by {report.plan.solution.method}.")
    listed = len(scenario.classes) <= MOST_PRINTED
    return Section(
        "method",
        "How this page was made",
        blocks(
            Items("Made with", tuple(made)),
            Source("Command", report.command, brief=True) if report.command else None,
            Source("The scenario, as a file that makes this plan again (.json)", _as_file(scenario))
            if listed
            else None,
        ),
    )


def _as_file(scenario: Scenario) -> str:
    return json.dumps(scenario.to_dict(), indent=1, ensure_ascii=False)
