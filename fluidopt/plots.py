"""Figures of plans and simulation results. Each function draws on one matplotlib figure and returns it.

Colours are told apart in grey too (light to dark), and every axis carries its unit.
"""

from __future__ import annotations

from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fluidopt.plan import Plan
    from fluidopt.simulation.result import SimulationResult

INK = "#1f2933"
DARK, MIDDLE, LIGHT = "#16697a", "#e07a1f", "#b9d8de"
MOST_CLASSES = 12


def plot_plan(plan: Plan) -> Figure:
    """Who is served, at what price, and how the fleet is split: one figure of three panels."""
    figure, axes = _figure(1, 3, rows=_shown(plan))
    _served(axes[0], plan)
    _margins(axes[1], plan)
    _fleet(axes[2], plan)
    _title(figure, f"Fluid plan: {plan.revenue_rate:.4g} money/s per GPU, {plan.model.scenario.charging} charging")
    return figure


def plot_result(result: SimulationResult) -> Figure:
    """Plan against simulation with 95 % intervals: throughput, waiting and abandonment."""
    figure, axes = _figure(1, 3, rows=min(len(result.policy.scenario.classes), MOST_CLASSES))
    _against(axes[0], result, "throughput", "Completed, requests/s per GPU")
    _against(axes[1], result, "time_to_first_token", "Mean time to first token, s")
    _against(axes[2], result, "abandonment_share", "Abandoned, % of arrivals", scale=100.0)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    _title(figure, f"{result.policy.kind} on {result.policy.gpus} GPUs: {_earned(result)}")
    return figure


def plot_summary(plan: Plan, result: SimulationResult) -> Figure:
    """Plan and simulated check on one page."""
    figure, axes = _figure(2, 2, rows=_shown(plan))
    _served(axes[0, 0], plan)
    _margins(axes[0, 1], plan)
    _fleet(axes[1, 0], plan)
    _against(axes[1, 1], result, "throughput", "Simulated: completed, requests/s per GPU")
    for axis in axes[:, 1]:
        axis.set_yticklabels([])
    axes[1, 1].set_yticks(*_ticks(_names(plan)))
    _title(figure, f"{result.policy.kind} on {result.policy.gpus} GPUs: {_earned(result)}")
    return figure


def _earned(result: SimulationResult) -> str:
    rate = result.revenue_rate
    return f"{rate.mean:.4g} ± {rate.half_width:.2g} money/s per GPU{result.against_plan}"


def _figure(down: int, across: int, *, rows: int) -> tuple[Figure, Any]:
    """A figure of panels that belongs to no global state (nothing to close)."""
    figure = _shown_figure()(figsize=(11.0, 0.4 + down * (1.5 + 0.3 * rows)), layout="constrained", dpi=130)
    axes = figure.subplots(down, across)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
    return figure, axes


@cache
def _shown_figure() -> type[Figure]:
    """A matplotlib figure that a notebook shows by itself, whether or not pyplot was ever imported."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            picture = BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    return ShownFigure


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, color=INK)


def _panel(axis: Axes, title: str, legend: bool = True) -> None:
    """Title above, legend between title and axes, where no bar can be."""
    axis.set_title(title, loc="left", fontsize=9, color=INK, pad=22 if legend else 6)
    if legend:
        axis.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=8, borderaxespad=0.2
        )


def _shown(plan: Plan) -> int:
    return min(len(plan.model.workload), MOST_CLASSES)


def _names(plan: Plan) -> list[str]:
    return list(plan.model.workload.names[:MOST_CLASSES])


def _ticks(names: list[str]) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Places from top to bottom, and labels short enough to leave room for the bars."""
    return np.arange(len(names))[::-1], [name if len(name) <= 26 else name[:25] + "…" for name in names]


def _class_axis(axis: Axes, names: list[str]) -> np.ndarray[Any, Any]:
    places, labels = _ticks(names)
    axis.set_yticks(places, labels)
    axis.set_ylim(-0.7, len(names) - 0.3)
    return places


def _served(axis: Axes, plan: Plan) -> None:
    names = _names(plan)
    places = _class_axis(axis, names)
    axis.barh(places, plan.model.workload.arrival_rate[: len(names)], color=LIGHT, label="arriving")
    axis.barh(places, plan.throughput[: len(names)], height=0.45, color=DARK, label="completed in the plan")
    _panel(axis, "Requests/s per GPU")


def _margins(axis: Axes, plan: Plan) -> None:
    names = _names(plan)
    table = plan.thresholds.head(len(names))
    places = _class_axis(axis, names)
    axis.barh(places, table["value"], color=LIGHT, label="value")
    axis.barh(places, table["margin"], height=0.45, color=MIDDLE, label="less the price of capacity")
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticklabels([])
    _panel(axis, "Money per request")


def _fleet(axis: Axes, plan: Plan) -> None:
    modes = plan.modes
    places = _class_axis(axis, list(modes.index))
    axis.barh(places, 100 * modes["fleet_share"], height=0.5, color=DARK)
    for place, share in zip(places, modes["fleet_share"], strict=True):
        axis.annotate(
            f"{share:.0%}", (100 * share, place), xytext=(3, 0), textcoords="offset points", va="center", size=8
        )
    axis.set_xlim(0, 115 * max(float(modes["fleet_share"].max()), 0.1))
    _panel(axis, "Modes, % of the fleet", legend=False)


def _against(axis: Axes, result: SimulationResult, quantity: str, title: str, scale: float = 1.0) -> None:
    table = result.to_frame().loc[quantity].head(MOST_CLASSES)
    places = _class_axis(axis, list(table.index))
    axis.barh(places, scale * table["fluid"].fillna(0.0), color=LIGHT, label="fluid plan")
    axis.errorbar(
        scale * table["simulated"],
        places,
        xerr=scale * table["half_width"],
        fmt="o",
        markersize=4,
        color=MIDDLE,
        ecolor=INK,
        capsize=2,
        label="simulated, 95 % interval",
    )
    axis.set_xlim(left=0)
    _panel(axis, title)
