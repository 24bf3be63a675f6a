"""The sections of a page, in the order in which they are read."""

from __future__ import annotations

from fluidopt.reports.basis import method, theory
from fluidopt.reports.blocks import Section
from fluidopt.reports.checked import frontier, simulation, sizing
from fluidopt.reports.inputs import inputs, trace
from fluidopt.reports.making import Report
from fluidopt.reports.planned import plan, policy, prices


def sections_of(report: Report) -> tuple[Section, ...]:
    """All sections: what goes in, what comes out, what else there is to know, and what to believe of it."""
    recorded = trace(report)
    return (
        inputs(report),
        *([recorded] if recorded is not None else []),
        plan(report),
        policy(report),
        prices(report),
        simulation(report),
        frontier(report),
        sizing(report),
        theory(report),
        method(report),
    )
