"""What comes out: the plan, its policy, and what its limits are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluidopt.reports import pictures
from fluidopt.reports.blocks import Items, Prose, Section, Table, blocks, unmade
from fluidopt.reports.making import MOST_RANGES, Report, Unmade

if TYPE_CHECKING:
    from fluidopt.plan import Plan


def plan(report: Report) -> Section:
    """How the fleet is split, who gets what, whom to admit, and what holds revenue back."""
    found = report.plan
    if isinstance(found, Unmade):
        return Section("plan", "The plan", unmade(report.why(found)))
    allocation = found.allocation
    return Section(
        "plan",
        "The plan",
        blocks(
            Prose(
                f"{found.headline[0].upper()}{found.headline[1:]}. The numbers are those of the fluid limit, per GPU."
            ),
            [pictures.served(found), pictures.margins(found), pictures.split(found)],
            Table(
                "split",
                "How the fleet is split",
                found.modes,
                {
                    "fleet_share": "share of the fleet",
                    "prefill": "prefills in service",
                    "decode": "decodes in service",
                    "decode_slots": "decode slots",
                    "iteration_time": "iteration, s",
                },
                bars=("fleet_share",),
            ),
            Table(
                "allocation",
                "Who gets what (requests per GPU; completed: requests/s per GPU)",
                allocation,
                {str(name): _column(str(name)) for name in allocation.columns},
                "A dash: not determined, as no row limits it.",
            ),
            Table(
                "thresholds",
                "Whom to admit, by price (money per request)",
                found.thresholds,
                {"served": "share served"},
                "margin: value less the price of the capacity it takes. Above 0: serve all; below: turn away.",
                bars=("served",),
            ),
            Items("What holds the revenue back, and what one unit more would be worth", found.binding[:12]),
        ),
    )


def _column(name: str) -> str:
    words = {"prefill": "prefills", "prefill_queue": "wait for prefill", "decode_queue": "wait for decode"}
    if name in words:
        return words[name]
    if name == "throughput":
        return "completed/s"
    return name.replace("[", " in ").rstrip("]").replace("prefill in", "prefills in").replace("decode in", "decodes in")


def policy(report: Report) -> Section:
    """The policy in sentences."""
    rules = report.policy
    if isinstance(rules, Unmade):
        return Section("policy", "The policy", unmade(report.why(rules)))
    return Section(
        "policy",
        "The policy",
        blocks(
            Prose(f"{rules.title}: what the fleet does, event by event, to come near the plan."),
            Items("Rules", rules.rules(), ordered=True),
        ),
    )


def prices(report: Report) -> Section:
    """Shadow prices in words, and the ranges in which they hold."""
    if isinstance(report.ranges, Unmade):
        return Section("prices", "What limits are worth", unmade(report.why(report.ranges)))
    assert not isinstance(report.plan, Unmade)
    words, units = _rows_in_words(report.plan)
    frame = report.ranges.rename_axis("limit")
    frame.insert(1, "unit", [units.get(name, "") for name in frame.index])
    if not frame["note"].any():
        frame = frame.drop(columns="note")
    left_out = int((report.plan.shadow_prices.abs() > 0).sum()) - len(frame)
    return Section(
        "prices",
        "What limits are worth",
        blocks(
            Prose(
                "A shadow price is what one unit more of a limit earns, and it holds while the limit lies in the range "
                "given, all else equal. Beyond the range the price is the one in the last two columns."
            ),
            Table(
                "shadow-prices",
                "Shadow prices that are not 0, and how far they hold",
                frame,
                {
                    "shadow_price": "price",
                    "right_side": "limit now",
                    "lower": "holds from",
                    "upper": "to",
                    "price_below": "price below",
                    "price_above": "price above",
                },
                f"{left_out} more rows are left out." if left_out > 0 and len(frame) >= MOST_RANGES else "",
                words,
            ),
        ),
    )


def _rows_in_words(plan: Plan) -> tuple[dict[str, str], dict[str, str]]:
    """What each row limits, in words, and the unit of its price, by the row's name."""
    words, units = {}, {}
    rows = {row.name: row for row in plan.model.symbolic.constraints}
    for block in plan.program.rows:
        row = rows.get(block.name)
        if row is None:
            continue
        for name, place in zip(block.names(), np.argwhere(block.numbers >= 0), strict=True):
            labels = block.labels_at(row.over, place)
            words[name] = f"all GPUs of type {labels['gpu']}" if row.name == "fleet" else row.sentence(labels)
            units[name] = row.dual_unit
    return words, units
